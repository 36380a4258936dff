"""In manual optimization any object is a scheduler: the module alone steps it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, StepLR

from eventtrain import MisconfigurationError
from eventtrain.callbacks import LearningRateMonitor, LRSchedulerStepping
from tests.kit import Logged, On, Probe, batches, new_trainer, train
from tests.semantics.optimizers import Lookahead


class Halving:
    """No class of torch, and without a state: halves the rate at each step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.groups = optimizer.param_groups

    def step(self) -> None:
        for group in self.groups:
            group["lr"] *= 0.5


class ByUpdates(Halving):
    """As timm's: ``step`` wants the epoch, and ``step_update`` is called at each update."""

    def step(self, epoch: int) -> None:  # type: ignore[override]
        raise AssertionError("never called")

    def step_update(self, updates: int) -> None:
        for group in self.groups:
            group["lr"] = 0.5**updates

    def state_dict(self) -> dict[str, Any]:
        return {"lr": self.groups[0]["lr"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.groups[0]["lr"] = state["lr"]


class Metered(Halving):
    """Wants a metric, and has no monitor."""

    def step(self, metric: float) -> None:  # type: ignore[override]
        super().step()


class Steps(Probe):
    """Steps its optimizer and its scheduler by hand.

    Args:
        configure: Takes the SGD and returns the result of ``configure_optimizers``.
        step: Takes the scheduler and the number of updates, and steps it.
    """

    def __init__(self, configure: Any, step: Any) -> None:
        super().__init__(automatic=False, configure=configure)
        self.step = step

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        self.step(self.lr_schedulers(), batch_idx + 1)


def plainly(scheduler: Any, updates: int) -> None:
    scheduler.step()


FORMS: dict[str, tuple[Any, Any]] = {
    "two lists": (lambda sgd: ([sgd], [Halving(sgd)]), plainly),
    "a pair": (lambda sgd: (sgd, Halving(sgd)), plainly),
    "a dict": (lambda sgd: {"optimizer": sgd, "lr_scheduler": Halving(sgd)}, plainly),
    "a config": (lambda sgd: {"optimizer": sgd, "lr_scheduler": {"scheduler": Halving(sgd), "interval": "step"}}, plainly),
    "by updates": (lambda sgd: ([sgd], [ByUpdates(sgd)]), lambda scheduler, updates: scheduler.step_update(updates)),
    "by a metric": (lambda sgd: ([sgd], [Metered(sgd)]), lambda scheduler, updates: scheduler.step(0.1)),
    "torch's": (lambda sgd: ([sgd], [StepLR(sgd, 1, gamma=0.5)]), plainly),
    "without step": (
        lambda sgd: ([sgd], [SimpleNamespace(halve=Halving(sgd).step)]),
        lambda scheduler, updates: scheduler.halve(),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_object_is_a_scheduler_in_manual_optimization(form: str) -> None:
    module = Steps(*FORMS[form])
    train(module, 3, LRSchedulerStepping())
    assert module.rates == [1.0, 0.5, 0.25]
    assert module.w.item() == -1.0 - 2 * 0.5 - 3 * 0.25


def test_several_come_as_a_list() -> None:
    module = Steps(lambda sgd: ([sgd], [Halving(sgd), ByUpdates(sgd)]), lambda schedulers, updates: schedulers[0].step())
    train(module, 3)
    assert module.rates == [1.0, 0.5, 0.25]


def test_automatic_optimization_still_wants_a_scheduler_whose_state_it_can_keep() -> None:
    with pytest.raises(MisconfigurationError, match=r"Halving.*lacks \['state_dict', 'load_state_dict'\]"):
        train(Probe(configure=lambda sgd: ([sgd], [Halving(sgd)])), 1)


def test_a_scheduler_with_a_state_is_in_checkpoints(in_tmp_path: Any) -> None:
    configure, step = FORMS["by updates"]
    save = On(take_checkpoint=lambda trainer, event: trainer.batch_idx == 1 and trainer.save_checkpoint("mid.ckpt"))
    train(Steps(configure, step), 2, save)
    module, trainer = Steps(configure, lambda scheduler, updates: None), new_trainer(max_epochs=2)
    trainer.fit(module, batches(1), ckpt_path="mid.ckpt")
    assert module.rates == [0.25]


def test_a_scheduler_without_a_state_is_left_out_of_checkpoints_with_a_warning(in_tmp_path: Any) -> None:
    def save(trainer: Any, event: Any) -> None:
        with pytest.warns(UserWarning, match="Halving has no state_dict"):
            trainer.save_checkpoint("end.ckpt")

    configure, step = FORMS["two lists"]
    train(Steps(configure, step), 2, On(train_end=save))
    assert torch.load("end.ckpt", weights_only=True)["lr_schedulers"] == [None]
    trainer = new_trainer(max_epochs=2)
    trainer.fit(Steps(configure, step), batches(2), ckpt_path="end.ckpt")
    assert trainer.global_step == 4


@pytest.mark.parametrize("automatic", [True, False])
def test_a_scheduler_of_the_optimizer_that_lookahead_holds_belongs_to_it(automatic: bool) -> None:
    def configure(sgd: Optimizer) -> Any:
        return [Lookahead(sgd)], [{"scheduler": StepLR(sgd, 1, gamma=0.5), "interval": "step", "name": "rate"}]

    module: Any = Probe(configure=configure) if automatic else Steps(configure, plainly)
    logged = Logged()
    train(module, 3, LRSchedulerStepping(), LearningRateMonitor(), logged)
    assert module.rates == [1.0, 0.5, 0.25]
    assert logged.of("rate") == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_a_scheduler_of_an_optimizer_that_was_not_returned_is_still_an_error() -> None:
    def configure(sgd: Optimizer) -> Any:
        stray = SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        return [sgd], [LambdaLR(stray, lambda n: 1.0)]

    with pytest.raises(
        MisconfigurationError, match="LambdaLR sets the rates of a SGD that configure_optimizers did not return"
    ):
        train(Steps(configure, plainly), 1)
