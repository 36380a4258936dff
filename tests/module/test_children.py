"""A LightningModule within another one takes part in the run of the outer one."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from eventtrain import LightningModule
from eventtrain.callbacks import TensorBoardLogger
from tests.kit import Line, ModuleOf, new_trainer, rows, train


class Child(LightningModule):
    """Logs from its forward, and notes what it knows of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.notes: list[tuple[int, int, int]] = []
        self.hooks: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        self.notes.append((self.current_epoch, self.global_step, self.trainer.batch_idx))
        self.log("child_mean", x.mean(), on_step=False, on_epoch=True)
        output: Tensor = self.layer(x)
        return output

    def on_train_start(self) -> None:
        self.hooks.append("on_train_start")

    def setup(self, stage: str) -> None:
        self.hooks.append("setup")


class Parent(Line):
    """Has a child, in a place that a function chooses."""

    def __init__(self, place: Callable[[Any, Child], None], when: str = "init") -> None:
        super().__init__()
        self.place, self.when, self.child_of = place, when, [Child()]
        self.add("init")

    def add(self, when: str) -> None:
        if when == self.when:
            self.place(self, self.child_of[0])

    def setup(self, stage: str) -> None:
        self.add("setup")

    def configure_model(self) -> None:
        self.add("configure_model")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        output: Tensor = self.child_of[0](batch)
        return output.square().mean()


def as_attribute(parent: Any, child: Child) -> None:
    parent.child = child


def in_a_list(parent: Any, child: Child) -> None:
    parent.children_of = nn.ModuleList([nn.Linear(1, 1), child])


def in_a_plain_module(parent: Any, child: Child) -> None:
    parent.stack = nn.Sequential(nn.Identity(), nn.Sequential(child))


def in_another_child(parent: Any, child: Child) -> None:
    parent.middle = LightningModule()
    parent.middle.inner = nn.ModuleDict({"child": child})


PLACES = [as_attribute, in_a_list, in_a_plain_module, in_another_child]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("when", ["init", "setup", "configure_model"])
def test_a_child_knows_the_run_and_logs(place: Callable[[Any, Child], None], when: str) -> None:
    parent = Parent(place, when)
    (child,) = parent.child_of
    trainer = train(parent, rows(2), max_epochs=2)
    assert child.trainer is trainer
    assert child.notes == [(0, 0, 0), (0, 1, 1), (1, 2, 0), (1, 3, 1)]
    assert trainer.callback_metrics["child_mean"] == 1.5
    assert child.hooks == [], "hooks are those of the outer module"


def test_a_child_logs_in_evaluations() -> None:
    class Evaluates(Parent):
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.child_of[0](batch)

    assert new_trainer().test(Evaluates(as_attribute), rows(3)) == [{"child_mean": 2.0}]


def test_a_child_has_the_logger_of_the_run() -> None:
    logger = TensorBoardLogger()
    parent = Parent(as_attribute)
    train(parent, rows(1), logger, fast_dev_run=True)
    assert parent.child_of[0].logger is logger


def test_a_child_without_parameters_is_on_the_device_of_the_run() -> None:
    class Scale(LightningModule):
        def forward(self, x: Tensor) -> Tensor:
            assert self.device == x.device
            return torch.full((1,), 2.0, device=self.device) * x

    class Outer(Line):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Scale()

        def forward(self, batch: Tensor) -> Tensor:
            return super().forward(self.scale(batch))

    outer = Outer()
    (output,) = new_trainer(device="meta").predict(outer, rows(1))
    assert output.device.type == outer.scale.device.type == "meta"
    assert Scale().device == torch.device("cpu")


def test_a_child_may_train_alone_afterwards_and_the_parent_again() -> None:
    class Learner(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("batches", 1.0, reduce_fx="sum", on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    child = Learner()
    parent = ModuleOf(child=child, training_step=lambda batch, batch_idx: child.training_step(batch, batch_idx))
    parent.configure_optimizers = child.configure_optimizers  # type: ignore[method-assign]
    first = train(parent, rows(3))
    alone = train(child, rows(2))
    assert child.trainer is alone and parent.trainer is first
    assert (first.callback_metrics["batches"], alone.callback_metrics["batches"]) == (3.0, 2.0)
    first.fit(parent, rows(4))
    assert child.trainer is first and first.callback_metrics["batches"] == 4.0
    assert alone.callback_metrics["batches"] == 2.0


class ManualChild(LightningModule):
    """Optimizes itself when the outer module asks for it; its own mode is the default."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.v = nn.Parameter(torch.zeros(1))

    def learn(self, x: Tensor) -> None:
        of_w, of_v = self.optimizers()
        self.toggle_optimizer(of_w)
        assert (self.w.requires_grad, self.v.requires_grad) == (True, False)
        of_w.zero_grad()
        self.manual_backward((self.w * x).sum())
        self.clip_gradients(of_w, gradient_clip_val=2.0, gradient_clip_algorithm="value")
        of_w.step()


class ManualParent(LightningModule):
    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.child = ManualChild()
        self.backwards = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.child.learn(batch)
        self.child.untoggle_optimizer(self.optimizers()[0]) if batch_idx == 0 else None

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.backwards += 1
        super().backward(loss, *args, **kwargs)

    def configure_optimizers(self) -> list[SGD]:
        return [SGD([self.child.w], lr=1.0), SGD([self.child.v], lr=1.0)]


def test_a_child_may_optimize_by_hand_in_the_mode_of_the_run() -> None:
    parent = ManualParent()
    trainer = train(parent, rows([1, 3], size=1))
    assert parent.child.w.item() == -3.0, "the second gradient was clipped to 2"
    assert trainer.global_step == parent.backwards == 2
    assert parent.child.v.requires_grad, "a toggle that is left open ends with the run"


def test_the_trainer_can_be_taken_away_from_all() -> None:
    parent = Parent(in_another_child)
    train(parent, rows(1))
    parent.trainer = None
    assert parent.child_of[0].logger is None


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda module: torch.load(_saved(module), weights_only=False),
    ],
    ids=["deepcopy", "pickle"],
)
def test_copies_leave_the_trainer_behind(copied: Callable[[Any], Any]) -> None:
    parent = WithChild()
    train(parent, rows(1))
    clone = copied(parent)
    assert clone.child.logger is None and parent.child.trainer is parent.trainer
    assert torch.equal(clone.child.layer.weight, parent.child.layer.weight)
    trainer = train(clone, rows(1))
    assert clone.child.trainer is trainer is not parent.child.trainer


class WithChild(Line):
    def __init__(self) -> None:
        super().__init__()
        self.child = Line()


def _saved(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file
