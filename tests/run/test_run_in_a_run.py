"""A run of another trainer on the same module, in a fit, leaves no trace in the fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from eventtrain import LightningDataModule, LightningModule, Trainer
from tests.kit import On, batches, new_trainer, rows

BATCHES = rows(3)


class Child(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, batch: Tensor) -> Tensor:
        self.log("of the child", 1.0)
        output: Tensor = self.layer(batch)
        return output

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self(batch).mean())


class Parent(LightningModule):
    def __init__(self, *, nests: str | None = None, fails: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.child, self.other, self.nests, self.fails = Child(), nn.Linear(1, 1), nests, fails
        self.inner: list[Any] = []
        self.seen: list[Any] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        with self.toggled_optimizer(first):
            if self.nests is not None:
                self.run_inside()
            self.seen.append([parameter.requires_grad for parameter in self.parameters()])
            self.seen.append([part.training for part in self.modules()])
            self.log("loss", self.child(batch).mean())
            first.zero_grad()
            self.manual_backward(self.child(batch).square().mean())
            first.step()
        second.zero_grad()
        self.manual_backward(self.other(batch).square().mean())
        second.step()
        self.seen.append((self.global_step, self.current_epoch, self.trainer.global_step))

    def run_inside(self) -> None:
        module: LightningModule = self.child if self.nests == "child" else self
        trainer = new_trainer(On(validation_batch_end=lambda trainer, event: self.inner.append(module.trainer is trainer)))
        if not self.fails:
            trainer.validate(module, BATCHES)
            return
        with pytest.raises(ZeroDivisionError):
            trainer.validate(module, iter_that_fails())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.child(batch).mean())

    def configure_optimizers(self) -> Any:
        return [SGD(self.child.parameters(), lr=0.1), SGD(self.other.parameters(), lr=0.1)]


def iter_that_fails() -> Any:
    class Failing:
        def __iter__(self) -> Any:
            yield BATCHES[0]
            raise ZeroDivisionError

    return Failing()


def trained(**options: Any) -> tuple[Parent, Trainer, list[Any]]:
    torch.manual_seed(0)
    module = Parent(**options)
    logged: list[Any] = []
    trainer = new_trainer(
        On(metrics_logged=lambda trainer, event: logged.append((event.stage, event.step, dict(event.metrics)))), max_epochs=2
    )
    trainer.fit(module, BATCHES, BATCHES)
    return module, trainer, logged


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("nests", ["child", "itself"])
def test_a_validation_by_another_trainer_inside_a_fit_leaves_no_trace(nests: str, fails: bool) -> None:
    plain, plain_trainer, plain_logged = trained()
    module, trainer, logged = trained(nests=nests, fails=fails)
    assert module.inner and all(module.inner)
    assert module.trainer is trainer and module.child.trainer is trainer
    assert module.seen == plain.seen and logged == plain_logged
    assert trainer.global_step == plain_trainer.global_step
    for value, expected in zip(module.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(value, expected)


def test_the_datamodule_gets_its_trainer_back() -> None:
    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return BATCHES

        def val_dataloader(self) -> Any:
            return BATCHES

    data, seen = Data(), []

    def nest(outer: Trainer, event: Any) -> None:
        if event.global_step == 1:
            new_trainer().validate(outer.module, datamodule=data)
        seen.append(data.trainer is outer and outer.module.trainer is outer)

    trainer = new_trainer(On(after_update=nest))
    model = Parent()
    trainer.fit(model, datamodule=data)
    assert seen and all(seen)


def test_a_module_belongs_to_the_trainer_of_its_last_run_if_no_other_is_running() -> None:
    module, first, _ = trained()
    second = new_trainer()
    second.validate(module, BATCHES)
    assert module.trainer is second is module.child.trainer and first.global_step == len(batches(3)) * 2
