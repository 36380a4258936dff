"""Steps, closures and toggles that are refused, each beside the nearest form that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD

from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import (
    GradientAccumulation,
    MixedPrecision,
)
from tests.kit import ModuleOf
from tests.misconfigurations import (
    Case,
    Manual,
    after_fit,
    check_refusal,
    check_remedy,
    fit,
    hooked,
    manual,
    returns,
    steps,
    stray,
)

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def steps_by_closure(model: Any, optimizer: Any, batch: Tensor) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(batch)
        model.manual_backward(loss)
        return loss  # type: ignore[no-any-return]

    optimizer.step(closure)


class Lazy(SGD):
    """Never runs its closure."""

    def step(self, closure: Any = None) -> Any:
        return super().step()


class Twice(SGD):
    """Evaluates its closure twice."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
            loss = closure()
        super().step()
        return loss


class NoGrad(SGD):
    """Evaluates its closure without gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        super().step()
        return loss


class EnableGrad(SGD):
    """Evaluates its closure with gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        super().step()
        return loss


def manual_with_optimizer(kind: Any, body: Any) -> Trainer:
    model = Manual(body)
    model.configure_optimizers = lambda: kind([model.w], lr=0.1)  # type: ignore[method-assign]
    return fit(model)


def with_optimizer(kind: Any, *callbacks: Any, training_step: Any = None) -> Trainer:
    model = ModuleOf()
    if training_step is not None:
        model.training_step = lambda batch, batch_idx: training_step(model, batch)  # type: ignore[method-assign]
    model.configure_optimizers = lambda: kind([model.w], lr=0.1)  # type: ignore[method-assign]
    return fit(model, *callbacks)


def weighted(weigh: Callable[[float], Any]) -> Trainer:
    model = ModuleOf()

    def training_step(batch: Tensor, batch_idx: int) -> dict[str, Any]:
        weight = weigh(batch_idx)
        return {"loss": model.loss(batch), **({} if weight is None else {"weight": weight})}

    model.training_step = training_step  # type: ignore[method-assign]
    return fit(model, GradientAccumulation(2))


class Vetoes(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_before_optimizer_step(self, trainer: Any, event: Any) -> None:
        if event.evaluation == self.at:
            event.skip("mine")


def clips_by(value: Any) -> Trainer:
    return hooked(on_before_optimizer_step=lambda self, optimizer: self.clip_gradients(optimizer, value))


def toggles(model: Any, optimizer: Any, batch: Tensor) -> None:
    with optimizer.toggle_model():
        steps(model, optimizer, batch)


def crossing(model: Any, optimizers: Any, batch: Tensor) -> None:
    for optimizer in optimizers:
        model.toggle_optimizer(optimizer)
    for optimizer in optimizers:
        model.untoggle_optimizer(optimizer)


def raw_with_optimizer(kind: Any) -> Trainer:
    def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.optimizer.step(optimizer_closure)

    model: Any = type("Raw", (ModuleOf,), {"optimizer_step": optimizer_step})()
    model.configure_optimizers = lambda: kind([model.w], lr=0.1)
    return fit(model)


def with_own_step(kind: Any) -> Trainer:
    model = ModuleOf()

    def closure() -> Tensor:
        loss = model.loss(torch.ones(1))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    model.on_train_start = lambda: model.optimizers().step(closure)  # type: ignore[method-assign]
    model.configure_optimizers = lambda: kind([model.w], lr=0.1)  # type: ignore[method-assign]
    return fit(model)


CASES: dict[str, Case] = {
    # ---------------------------------------------------------------- gradients that are off
    "an optimizer that evaluates its closure without gradients": Case(
        lambda: with_optimizer(NoGrad),
        (
            "gradients are off",
            "NoGrad.step has to run its closure with gradients",
            r"torch.enable_grad\(\): loss = closure\(\)",
        ),
        lambda: with_optimizer(EnableGrad),
    ),
    "an optimizer that evaluates its closure without gradients, for a mapping": Case(
        lambda: with_optimizer(NoGrad, training_step=lambda model, batch: {"loss": model.loss(batch)}),
        ("gradients are off", "NoGrad.step"),
        lambda: with_optimizer(EnableGrad, training_step=lambda model, batch: {"loss": model.loss(batch)}),
    ),
    "the wrapped optimizer evaluates its closure without gradients": Case(
        lambda: raw_with_optimizer(NoGrad),
        ("gradients are off", "NoGrad.step"),
        lambda: raw_with_optimizer(EnableGrad),
    ),
    "an optimizer that evaluates a closure of manual optimization without gradients": Case(
        lambda: manual_with_optimizer(NoGrad, steps_by_closure),
        ("gradients are off", "The optimizer's step has to run its closure with gradients", r"torch.enable_grad\(\)"),
        lambda: manual_with_optimizer(EnableGrad, steps_by_closure),
    ),
    "optimizer_step runs the closure without gradients": Case(
        lambda: hooked(optimizer_step=lambda self, epoch, i, optimizer, closure: torch.no_grad()(closure)()),
        ("gradients are off", r"torch.enable_grad\(\)"),
        lambda: hooked(optimizer_step=lambda self, epoch, i, optimizer, closure: optimizer.step(closure)),
    ),
    "a step of one's own whose optimizer never runs its closure": Case(
        lambda: with_own_step(Lazy),
        ("Lazy.step did not run the closure", r"loss = closure\(\)"),
        lambda: with_own_step(SGD),
    ),
    # ---------------------------------------------------------------- training_step
    "no training_step": Case(
        lambda: fit(type("Stepless", (LightningModule,), {"configure_optimizers": lambda self: stray()})()),
        ("Stepless", r"no training_step\(self, batch, batch_idx\)", "Define it"),
        fit,
    ),
    "training_step returns a string": Case(
        lambda: returns(lambda model, x: "loss"),
        ("training_step", r"'loss' \(str\)", "scalar tensor"),
        lambda: returns(lambda model, x: model.loss(x)),
    ),
    "training_step returns a number": Case(
        lambda: returns(lambda model, x: model.loss(x).item()),
        ("training_step", r"\(float\)", "scalar tensor"),
        lambda: returns(lambda model, x: model.loss(x)),
    ),
    "training_step returns a tuple": Case(
        lambda: returns(lambda model, x: (model.loss(x), x)),
        ("training_step", r"\(tuple\)", "mapping with the key 'loss'"),
        lambda: returns(lambda model, x: {"loss": model.loss(x), "x": x}),
    ),
    "training_step returns minus one": Case(
        lambda: returns(lambda model, x: -1),
        ("training_step", r"-1 \(int\)", "None for a batch without a loss"),
        lambda: returns(lambda model, x: None if x.item() == 1 else model.loss(x)),
    ),
    "training_step returns a mapping without a loss": Case(
        lambda: returns(lambda model, x: {"losses": model.loss(x), "x": x}),
        ("training_step", r"\['losses', 'x'\]", "no 'loss'", "under 'loss'"),
        lambda: returns(lambda model, x: {"loss": model.loss(x), "x": x}),
    ),
    "training_step returns a number under 'loss'": Case(
        lambda: returns(lambda model, x: {"loss": 3.0}),
        ("training_step", r"3\.0 \(float\)", "'loss'", "scalar tensor"),
        lambda: returns(lambda model, x: {"loss": model.loss(x)}),
    ),
    "training_step returns a vector": Case(
        lambda: returns(lambda model, x: model.w * torch.ones(3)),
        ("training_step", r"shape \(3,\)", "scalar", "mean"),
        lambda: returns(lambda model, x: (model.w * torch.ones(3)).mean()),
    ),
    "training_step returns a detached loss": Case(
        lambda: returns(lambda model, x: model.loss(x).detach()),
        ("training_step", "needs no gradient", "detached"),
        lambda: returns(lambda model, x: model.loss(x)),
    ),
    "training_step of a frozen module": Case(
        lambda: returns(lambda model, x: model.w.requires_grad_(False).sum()),
        ("training_step", "needs no gradient", "trainable parameter"),
        lambda: returns(lambda model, x: model.w.sum()),
    ),
    "training_step in manual mode returns a string": Case(
        lambda: manual(lambda model, optimizer, x: "done"),
        ("training_step", r"'done' \(str\)"),
        lambda: manual(steps),
    ),
    "a weight for some batches of a window": Case(
        lambda: weighted(lambda i: 2.0 if i == 0 else None),
        ("training_step", "'weight'", "batch 1", "for every batch, or none"),
        lambda: weighted(lambda i: 2.0),
    ),
    "a weight that is no number": Case(
        lambda: weighted(lambda i: "two"),
        ("training_step", "'weight'", "'two'", "number"),
        lambda: weighted(lambda i: 2.0),
    ),
    "a weight for each sample": Case(
        lambda: weighted(lambda i: torch.ones(2)),
        ("training_step", "'weight'", r"shape \(2,\)", "scalar|sum"),
        lambda: weighted(lambda i: torch.ones(2).sum()),
    ),
    # ---------------------------------------------------------------- closures
    "an optimizer_step that never runs the closure": Case(
        lambda: fit(ModuleOf(optimizer_step=lambda epoch, batch_idx, optimizer, closure: optimizer.zero_grad())),
        ("optimizer_step", "SGD", "did not run its closure", r"optimizer\.step\(closure=optimizer_closure\)"),
        lambda: fit(ModuleOf(optimizer_step=lambda epoch, batch_idx, optimizer, closure: optimizer.step(closure=closure))),
    ),
    "an optimizer_step that forgets to pass the closure": Case(
        lambda: fit(ModuleOf(optimizer_step=lambda epoch, batch_idx, optimizer, closure: optimizer.step())),
        ("optimizer_step", "closure", r"optimizer\.step\(closure=optimizer_closure\)"),
        lambda: fit(ModuleOf(optimizer_step=lambda epoch, batch_idx, optimizer, closure: optimizer.step(closure))),
    ),
    "an optimizer that never runs its closure": Case(
        lambda: with_optimizer(Lazy),
        ("optimizer_step of the module", r"Lazy\.step", "did not run its closure", r"optimizer_closure\(\)"),
        lambda: with_optimizer(SGD),
    ),
    "an optimizer that never runs its closure in manual mode": Case(
        lambda: manual(steps_by_closure, configure_optimizers=lambda: Lazy([nn.Parameter(torch.zeros(1))], lr=0.1)),
        (r"Lazy\.step", "did not run the closure", r"closure\(\)"),
        lambda: manual(steps_by_closure),
    ),
    "a closure that cannot be called": Case(
        lambda: manual(lambda model, optimizer, x: optimizer.step(model.loss(x))),
        (r"SGD\.step", "as its closure", "function of no arguments"),
        lambda: manual(steps_by_closure),
    ),
    "LBFGS with accumulation": Case(
        lambda: with_optimizer(LBFGS, GradientAccumulation(2)),
        ("LBFGS", "several times", "GradientAccumulation", "larger batches"),
        lambda: with_optimizer(LBFGS),
    ),
    "a second evaluation with accumulation": Case(
        lambda: with_optimizer(Twice, GradientAccumulation(2)),
        ("Twice", "second time", "GradientAccumulation", "larger batches"),
        lambda: with_optimizer(Twice),
    ),
    "LBFGS with loss scaling": Case(
        lambda: with_optimizer(LBFGS, MixedPrecision("fp16")),
        ("LBFGS", "several times", r"MixedPrecision\('bf16'\)"),
        lambda: with_optimizer(LBFGS, MixedPrecision("bf16")),
    ),
    "a second evaluation with loss scaling": Case(
        lambda: with_optimizer(Twice, MixedPrecision("fp16")),
        ("Twice", "second time", r"MixedPrecision\('bf16'\)"),
        lambda: with_optimizer(Twice, MixedPrecision("bf16")),
    ),
    "a veto at a later evaluation": Case(
        lambda: with_optimizer(Twice, Vetoes(at=2)),
        ("Twice", "vetoed", "evaluation 2", "first evaluation only"),
        lambda: with_optimizer(Twice, Vetoes(at=1)) and with_optimizer(Twice),
    ),
    # ---------------------------------------------------------------- clipping
    "toggling an optimizer of another model": Case(
        lambda: manual(lambda model, optimizer, x: model.toggle_optimizer(stray())),
        ("toggle_optimizer", "SGD", "configure_optimizers|optimizers()"),
        lambda: manual(toggles),
    ),
    "toggling a number": Case(
        lambda: manual(lambda model, optimizer, x: model.toggle_optimizer(0)),
        ("0", "optimizer"),
        lambda: manual(toggles),
    ),
    "clip_gradients of a module": Case(
        lambda: manual(lambda model, optimizer, x: model.clip_gradients(model, 1.0)),
        ("Manual", "optimizer"),
        lambda: clips_by(1.0),
    ),
    "clip_gradients by 0": Case(
        lambda: clips_by(0),
        ("gradient_clip_val", "positive number", "0"),
        lambda: clips_by(1.0),
    ),
    # ---------------------------------------------------------------- calls in the wrong mode
    "toggle_model without a run": Case(
        lambda: after_fit(lambda trainer, module: trainer.optimizers[0].toggle_model()),
        ("toggle_model", "training_step"),
        lambda: manual(toggles),
    ),
    "toggles that cross": Case(
        lambda: manual(crossing, configure_optimizers=lambda: [stray(), Lazy([nn.Parameter(torch.zeros(1))], lr=0.1)]),
        (r"untoggle_optimizer\(SGD\)", "Lazy was toggled after it", "with self.toggled_optimizer"),
        lambda: manual(toggles),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_refusal_names_the_mistake_and_the_remedy(case: str) -> None:
    check_refusal(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_correct_form_trains(case: str) -> None:
    check_remedy(CASES[case])
