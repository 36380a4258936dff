"""Steps, schedulers and optimizers as people write them: the same source, trained by eventtrain and by Lightning."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor as Theirs

import eventtrain
from eventtrain.callbacks import LearningRateMonitor as Ours
from tests.kit import Logged
from tests.semantics.optimizers import Calling, EmptyHooks, Handwritten, Initialized, Lookahead, SharedDict

from .frameworks import Settings, assert_same, batches, lightning
from .test_parity import optimizers, regression

SGD = torch.optim.SGD


def sgd(self: Any) -> Any:
    return SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize("kind", [Lookahead, EmptyHooks, Initialized, SharedDict])
@pytest.mark.parametrize("settings", [Settings(), Settings(accumulate=2), Settings(max_steps=7, epochs=9)], ids=str)
def test_an_optimizer_that_holds_another(kind: Any, settings: Settings) -> None:
    outcome = assert_same(optimizers(lambda self: kind(sgd(self))), settings)
    expected = settings.max_steps or 12 // settings.accumulate  # type: ignore[operator]
    assert outcome.trainer.global_step == expected


@pytest.mark.parametrize("kind", [Handwritten, Calling])
def test_an_optimizer_with_a_step_of_its_own(kind: Any) -> None:
    outcome = assert_same(optimizers(lambda self: kind(self.parameters(), lr=0.05)), Settings())
    assert outcome.trainer.global_step == 12


def test_a_scheduler_by_steps_over_an_optimizer_without_hooks() -> None:
    def build(self: Any) -> Any:
        optimizer = Handwritten(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    assert_same(optimizers(build), Settings())


def own(self: Any, batch: Any) -> Any:
    optimizer = self.optimizers()
    optimizer.zero_grad()
    self.loss(batch).backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("returns", [False, True])
def test_a_step_of_ones_own_in_training_step(returns: bool) -> None:
    def training_step(self: Any, batch: torch.Tensor, batch_idx: int) -> Any:
        own(self, batch)
        return self.loss(batch) if returns else None

    assert_same(lambda base: regression(base, training_step=training_step, configure_optimizers=sgd), Settings())


HOOKS = ("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end")


@pytest.mark.parametrize("hook", HOOKS)
def test_a_step_of_ones_own_in_a_hook(hook: str) -> None:
    def step(self: Any, *args: Any) -> None:
        own(self, batches(1)[0])

    assert_same(lambda base: regression(base, configure_optimizers=sgd, **{hook: step}), Settings())


def test_manual_steps_at_the_end_of_an_epoch() -> None:
    def training_step(self: Any, batch: torch.Tensor, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))

    def on_train_epoch_end(self: Any) -> None:
        self.optimizers().step()
        self.optimizers().zero_grad()

    def make(base: type) -> Any:
        module = regression(base, training_step=training_step, on_train_epoch_end=on_train_epoch_end, configure_optimizers=sgd)
        module.automatic_optimization = False
        return module

    outcome = assert_same(make, Settings(epochs=3))
    assert outcome.trainer.global_step == 3


def test_the_optimizer_is_an_instance_of_its_class() -> None:
    def training_step(self: Any, batch: torch.Tensor, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        kinds = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Optimizer)
        self.journal.append([isinstance(optimizer, kind) for kind in kinds])
        return self.loss(batch)

    def adam(self: Any) -> Any:
        return torch.optim.Adam(self.parameters())

    def adamw(self: Any) -> Any:
        return torch.optim.AdamW(self.parameters())

    for build in (sgd, adam, adamw):
        changes: dict[str, Any] = {"training_step": training_step, "configure_optimizers": build}
        assert_same(lambda base, changes=changes: regression(base, **changes), Settings())  # type: ignore[misc]


class Halving:
    """A scheduler that is none of torch's."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, *args: Any) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_any_scheduler_in_manual_optimization() -> None:
    def build(self: Any) -> Any:
        optimizer = sgd(self)
        return [optimizer], [Halving(optimizer)]

    def training_step(self: Any, batch: torch.Tensor, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        self.optimizers().step()
        self.optimizers().zero_grad()
        self.lr_schedulers().step(batch_idx, 0.5)
        self.journal.append(self.optimizers().param_groups[0]["lr"])

    def make(base: type) -> Any:
        module = regression(base, training_step=training_step, configure_optimizers=build)
        module.automatic_optimization = False
        return module

    assert_same(make, Settings())


@pytest.mark.filterwarnings("ignore:Nothing was trained")
def test_none_in_every_batch_trains_nothing_in_both_and_both_say_so() -> None:
    def training_step(self: Any, batch: torch.Tensor, batch_idx: int) -> None:
        self.loss(batch)

    def make(base: type) -> Any:
        return regression(base, training_step=training_step, configure_optimizers=sgd)

    with pytest.warns(UserWarning, match="training_step returned None in the first batch"):
        assert_same(make, Settings())


@pytest.mark.parametrize("groups", [1, 2])
def test_the_name_of_a_schedulers_config_names_its_curve(groups: int, tmp_path: Any) -> None:
    def build(self: Any) -> Any:
        parameters = list(self.parameters())
        optimizer = SGD([{"params": parameters}] if groups == 1 else [{"params": [each]} for each in parameters], lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return [optimizer], [{"scheduler": scheduler, "name": "rate"}]

    theirs = Theirs(logging_interval="step")
    loader: Any = torch.utils.data.DataLoader(batches(2), batch_size=None)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[theirs],
            logger=lightning.loggers.CSVLogger(tmp_path),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(optimizers(build)(lightning.LightningModule), loader)
    logged = Logged()
    trainer = eventtrain.Trainer(max_epochs=1, device="cpu", callbacks=[Ours(), logged])
    trainer.fit(optimizers(build)(eventtrain.LightningModule), loader)
    (values, _) = logged.of_scope("step")
    assert {name.split("/")[0] for name in values} == {"rate"} == {name.split("/")[0] for name in theirs.lrs}
    assert len(values) == groups == len(theirs.lrs)
