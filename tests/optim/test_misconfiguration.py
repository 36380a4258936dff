"""The results of ``configure_optimizers`` that are refused, each beside the nearest form that trains."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from eventtrain import LightningModule, Trainer
from eventtrain.callbacks import (
    LRSchedulerStepping,
)
from tests.kit import ModuleOf
from tests.misconfigurations import Case, Log, check_refusal, check_remedy, fit, manual, steps, stray

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def configured(by: Callable[[SGD], Any], model: Any = None, **methods: Any) -> Trainer:
    """Train a module whose `configure_optimizers` returns a function of its SGD."""
    model = model or ModuleOf(**methods)
    model.configure_optimizers = lambda: by(SGD([model.w], lr=0.1))
    return fit(model, LRSchedulerStepping())


def scheduled(**config: Any) -> Trainer:
    return configured(lambda sgd: ([sgd], [{"scheduler": constant(sgd), **config}]))


def constant(sgd: Any) -> LambdaLR:
    return LambdaLR(sgd, lambda n: 1.0)


def step_both(model: Any, optimizers: Any, batch: Tensor) -> None:
    for optimizer in optimizers:
        steps(model, optimizer, batch)


class Timm:
    """A scheduler whose ``step`` wants the epoch, as timm's do."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, epoch: int, metric: Any = None) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Bare:
    """Has an optimizer's methods, and is none."""

    def __init__(self, optimizer: Any) -> None:
        self.param_groups = optimizer.param_groups
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad


class NoClosure(SGD):
    """Takes no closure."""

    def step(self) -> Any:  # type: ignore[override]
        return super().step()


class TakesClosure(SGD):
    """Takes its closure first."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        super().step()
        return loss


class ClosureFirst(ModuleOf):
    """Runs the closure, and then steps."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        optimizer.step()


def replaced(sgd: SGD, step: Any) -> SGD:
    """Replace an optimizer's ``step``."""
    sgd.step = step  # type: ignore[method-assign]
    return sgd


CASES: dict[str, Case] = {
    # ---------------------------------------------------------------- configure_optimizers
    "no configure_optimizers": Case(
        lambda: fit(type("Stepping", (LightningModule,), {"training_step": lambda self, batch, i: None})()),
        ("Stepping", "no configure_optimizers", "return an optimizer"),
        fit,
    ),
    "configure_optimizers returns a string": Case(
        lambda: configured(lambda sgd: "sgd"),
        ("configure_optimizers", r"'sgd' \(str\)", r"It may return an optimizer"),
        lambda: configured(lambda sgd: sgd),
    ),
    "configure_optimizers returns a class": Case(
        lambda: configured(lambda sgd: SGD),
        ("configure_optimizers", "SGD", "It may return an optimizer"),
        lambda: configured(lambda sgd: sgd),
    ),
    "configure_optimizers returns parameters": Case(
        lambda: configured(lambda sgd: list(sgd.param_groups[0]["params"])),
        ("configure_optimizers", "Parameter", "It may return an optimizer"),
        lambda: configured(lambda sgd: [sgd]),
    ),
    "configure_optimizers returns a scheduler": Case(
        lambda: configured(constant),
        ("configure_optimizers", "LambdaLR", r"\(optimizer, scheduler\)"),
        lambda: configured(lambda sgd: (sgd, constant(sgd))),
    ),
    "the scheduler before the optimizer": Case(
        lambda: configured(lambda sgd: (constant(sgd), sgd)),
        ("configure_optimizers", "LambdaLR", r"\(optimizer, scheduler\)"),
        lambda: configured(lambda sgd: (sgd, constant(sgd))),
    ),
    "schedulers where optimizers belong": Case(
        lambda: configured(lambda sgd: ([constant(sgd)], [sgd])),
        ("configure_optimizers", "LambdaLR", "an optimizer is expected"),
        lambda: configured(lambda sgd: ([sgd], [constant(sgd)])),
    ),
    "an optimizer where a scheduler belongs": Case(
        lambda: configured(lambda sgd: ([sgd], [sgd])),
        ("SGD", "as a scheduler"),
        lambda: configured(lambda sgd: ([sgd], [constant(sgd)])),
    ),
    "three lists": Case(
        lambda: configured(lambda sgd: ([sgd], [constant(sgd)], [])),
        ("configure_optimizers", "tuple", r"\(\[optimizers\], \[schedulers\]\)"),
        lambda: configured(lambda sgd: ([sgd], [constant(sgd)])),
    ),
    "an optimizer and a number": Case(
        lambda: configured(lambda sgd: (sgd, 3)),
        ("configure_optimizers", "tuple", r"\(optimizer, scheduler\)"),
        lambda: configured(lambda sgd: (sgd, constant(sgd))),
    ),
    "dicts and optimizers mixed": Case(
        lambda: configured(lambda sgd: [{"optimizer": sgd}, stray()]),
        ("configure_optimizers", "list", "a list of such dicts"),
        lambda: configured(lambda sgd: [{"optimizer": sgd}]),
    ),
    "an unknown key": Case(
        lambda: configured(lambda sgd: {"optimizer": sgd, "lr_schduler": constant(sgd)}),
        ("configure_optimizers", "'lr_schduler'", "Did you mean 'lr_scheduler'"),
        lambda: configured(lambda sgd: {"optimizer": sgd, "lr_scheduler": constant(sgd)}),
    ),
    "frequency beside the optimizer": Case(
        lambda: configured(lambda sgd: {"optimizer": sgd, "frequency": 2}),
        ("configure_optimizers", "'frequency'", "it may have"),
        lambda: scheduled(frequency=2, interval="step"),
    ),
    "a dict without an optimizer": Case(
        lambda: configured(lambda sgd: {"lr_scheduler": constant(sgd)}),
        ("configure_optimizers", "without 'optimizer'", "Put the optimizer there"),
        lambda: configured(lambda sgd: {"optimizer": sgd, "lr_scheduler": constant(sgd)}),
    ),
    "a dict whose optimizer is none": Case(
        lambda: configured(lambda sgd: {"optimizer": "sgd"}),
        ("configure_optimizers", "'sgd'", "an optimizer is expected"),
        lambda: configured(lambda sgd: {"optimizer": sgd}),
    ),
    "a list under 'lr_scheduler'": Case(
        lambda: configured(lambda sgd: {"optimizer": sgd, "lr_scheduler": [constant(sgd)]}),
        ("'lr_scheduler' is a list", r"Return \(\[optimizer\], \[schedulers\]\)"),
        lambda: configured(lambda sgd: ([sgd], [constant(sgd)])),
    ),
    "one optimizer twice": Case(
        lambda: configured(lambda sgd: [sgd, sgd]),
        ("configure_optimizers", "one optimizer twice", "once"),
        lambda: configured(lambda sgd: [sgd]),
    ),
    "several optimizers in automatic mode": Case(
        lambda: configured(lambda sgd: [sgd, stray()]),
        ("ModuleOf", "2 optimizers", "manual optimization", r"self\.automatic_optimization = False"),
        lambda: manual(step_both, configure_optimizers=lambda: [stray(), stray()]) and manual(steps),
    ),
    # ---------------------------------------------------------------- schedulers
    "an unknown key of a scheduler config": Case(
        lambda: scheduled(intervall="step"),
        ("scheduler config", "'intervall'", "Did you mean 'interval'"),
        lambda: scheduled(interval="step"),
    ),
    "a scheduler config without a scheduler": Case(
        lambda: configured(lambda sgd: {"optimizer": sgd, "lr_scheduler": {"interval": "step"}}),
        (r"\['interval'\]", "no 'scheduler'", "Put the scheduler there"),
        lambda: scheduled(interval="step"),
    ),
    "an unknown interval": Case(
        lambda: scheduled(interval="steps"),
        ("LambdaLR", "interval='steps'", "Did you mean 'step'"),
        lambda: scheduled(interval="step"),
    ),
    "an interval that is a number": Case(
        lambda: scheduled(interval=2),
        ("LambdaLR", "interval=2", "'epoch', 'step', 'batch', 'validation'"),
        lambda: scheduled(interval="step", frequency=2),
    ),
    "a frequency of zero": Case(
        lambda: scheduled(frequency=0),
        ("LambdaLR", "frequency=0", "whole number from 1"),
        lambda: scheduled(frequency=1),
    ),
    "a fractional frequency": Case(
        lambda: scheduled(frequency=0.5),
        ("LambdaLR", r"frequency=0\.5", "whole number from 1"),
        lambda: scheduled(frequency=2),
    ),
    "a plateau scheduler that monitors nothing": Case(
        lambda: configured(lambda sgd: (sgd, ReduceLROnPlateau(sgd))),
        ("ReduceLROnPlateau", "names none", "'monitor'"),
        lambda: configured(
            lambda sgd: {"optimizer": sgd, "lr_scheduler": ReduceLROnPlateau(sgd), "monitor": "value"},
            Log(value=1.0, on_epoch=True),
        ),
    ),
    "a monitored metric that is never logged": Case(
        lambda: configured(lambda sgd: {"optimizer": sgd, "lr_scheduler": ReduceLROnPlateau(sgd), "monitor": "val_loss"}),
        ("ReduceLROnPlateau", "no metric 'val_loss' was logged", r"self\.log\('val_loss', \.\.\.\)", "'strict': False"),
        lambda: configured(
            lambda sgd: {"optimizer": sgd, "lr_scheduler": ReduceLROnPlateau(sgd), "monitor": "value"},
            Log(value=1.0, on_epoch=True),
        ),
    ),
    "a scheduler of an optimizer that was not returned": Case(
        lambda: configured(lambda sgd: ([sgd], [constant(stray())])),
        ("LambdaLR", "SGD", "did not return", "one of the optimizers that are returned"),
        lambda: configured(lambda sgd: ([sgd], [constant(sgd)])),
    ),
    "a scheduler of another API": Case(
        lambda: configured(lambda sgd: (sgd, Timm(sgd))),
        (r"Timm\.step", "torch's form", r"lr_scheduler_step\(self, scheduler, metric\)", "ModuleOf"),
        lambda: configured(lambda sgd: (sgd, Timm(sgd)), lr_scheduler_step=lambda scheduler, metric: scheduler.step(epoch=0)),
    ),
    "a scheduler without a state": Case(
        lambda: configured(lambda sgd: ([sgd], [SimpleNamespace(step=lambda: None)])),
        ("namespace", "state_dict", "load_state_dict", "step, state_dict and load_state_dict"),
        lambda: configured(lambda sgd: ([sgd], [constant(sgd)])),
    ),
    "a class among optimizers": Case(
        lambda: configured(lambda sgd: [sgd, SGD]),
        ("SGD", "Return an object of the class", r"SGD\(self.parameters\(\), \.\.\.\)"),
        lambda: configured(lambda sgd: [sgd]),
    ),
    "a class under 'optimizer'": Case(
        lambda: configured(lambda sgd: {"optimizer": SGD}),
        ("where an optimizer is expected", "Return an object of the class", r"SGD\(self.parameters\(\)"),
        lambda: configured(lambda sgd: {"optimizer": sgd}),
    ),
    "an object that is no Optimizer": Case(
        lambda: configured(Bare),
        (r"\(Bare\)", r"Write `class Bare\(torch.optim.Optimizer\)`", r"super\(\).__init__\(params, defaults\)"),
        lambda: configured(lambda sgd: sgd),
    ),
    "an object that is no Optimizer, with a scheduler": Case(
        lambda: configured(lambda sgd: ([Bare(sgd)], [constant(sgd)])),
        (r"\(Bare\) where an optimizer is expected", r"Write `class Bare\(torch.optim.Optimizer\)`"),
        lambda: configured(lambda sgd: ([sgd], [constant(sgd)])),
    ),
    "an object that is no Optimizer, beside one": Case(
        lambda: configured(lambda sgd: [sgd, Bare(sgd)]),
        (r"\(Bare\)", r"Write `class Bare\(torch.optim.Optimizer\)`"),
        lambda: configured(lambda sgd: [sgd]),
    ),
    "an object that is no Optimizer, under 'optimizer'": Case(
        lambda: configured(lambda sgd: {"optimizer": Bare(sgd), "lr_scheduler": constant(sgd)}),
        (r"\(Bare\) where an optimizer is expected", r"Write `class Bare\(torch.optim.Optimizer\)`"),
        lambda: configured(lambda sgd: {"optimizer": sgd, "lr_scheduler": constant(sgd)}),
    ),
    "a scheduler alone": Case(
        lambda: configured(constant),
        ("LambdaLR", r"Return the optimizer with its scheduler: \[optimizer\], \[scheduler\]"),
        lambda: configured(lambda sgd: (sgd, constant(sgd))),
    ),
    "a scheduler among optimizers": Case(
        lambda: configured(lambda sgd: [constant(sgd), sgd]),
        ("LambdaLR", r"Return the optimizer with its scheduler"),
        lambda: configured(lambda sgd: [sgd]),
    ),
    "a scheduler under 'optimizer'": Case(
        lambda: configured(lambda sgd: {"optimizer": constant(sgd)}),
        ("LambdaLR", "where an optimizer is expected", r"Return the optimizer with its scheduler"),
        lambda: configured(lambda sgd: {"optimizer": sgd, "lr_scheduler": constant(sgd)}),
    ),
    "an optimizer under 'scheduler'": Case(
        lambda: configured(lambda sgd: ([sgd], [{"scheduler": sgd}])),
        ("SGD", "as a scheduler", "step, state_dict and load_state_dict"),
        lambda: configured(lambda sgd: ([sgd], [{"scheduler": constant(sgd)}])),
    ),
    "an optimizer as a scheduler in manual optimization": Case(
        lambda: manual(steps, configure_optimizers=lambda: ([stray()], [stray()])),
        ("SGD", "as a scheduler", "step, state_dict and load_state_dict"),
        lambda: manual(steps),
    ),
    "a scheduler of another optimizer in manual optimization": Case(
        lambda: manual(steps, configure_optimizers=lambda: ([stray()], [constant(stray())])),
        ("LambdaLR sets the rates of a SGD", "did not return", "Build it on one"),
        lambda: manual(steps),
    ),
    "an object that is no Optimizer in manual optimization": Case(
        lambda: manual(steps, configure_optimizers=lambda: [Bare(stray())]),
        (r"\(Bare\)", r"Write `class Bare\(torch.optim.Optimizer\)`"),
        lambda: manual(steps),
    ),
    "a step that takes no closure": Case(
        lambda: configured(lambda sgd: NoClosure(sgd.param_groups, lr=0.1)),
        ("NoClosure.step takes no closure", r"def step\(self, closure=None\)", r"enable_grad\(\)", "override optimizer_step"),
        lambda: configured(lambda sgd: TakesClosure(sgd.param_groups, lr=0.1)),
    ),
    "a step that takes no closure, which optimizer_step may work around": Case(
        lambda: configured(lambda sgd: NoClosure(sgd.param_groups, lr=0.1)),
        (r"`optimizer_closure\(\)`, then `optimizer.step\(\)`",),
        lambda: configured(lambda sgd: NoClosure(sgd.param_groups, lr=0.1), ClosureFirst()),
    ),
    "a step on the object that takes no closure": Case(
        lambda: configured(lambda sgd: replaced(sgd, lambda: None)),
        ("SGD.step takes no closure", r"def step\(self, closure=None\)"),
        lambda: configured(lambda sgd: replaced(sgd, sgd.step)),
    ),
    "a step that takes its closure by another name alone": Case(
        lambda: configured(lambda sgd: replaced(sgd, lambda *, evaluate=None: None)),
        ("SGD.step takes no closure", r"def step\(self, closure=None\)"),
        lambda: configured(lambda sgd: replaced(sgd, lambda evaluate=None: evaluate())),
    ),
    "a scheduler's class": Case(
        lambda: configured(lambda sgd: {"optimizer": sgd, "lr_scheduler": LambdaLR}),
        ("LambdaLR", "as a scheduler"),
        lambda: configured(lambda sgd: {"optimizer": sgd, "lr_scheduler": constant(sgd)}),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_refusal_names_the_mistake_and_the_remedy(case: str) -> None:
    check_refusal(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_correct_form_trains(case: str) -> None:
    check_remedy(CASES[case])
