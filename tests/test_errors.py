"""Every way to put a run together wrongly that is known, beside the nearest way that works.

A case is a pair: what must raise a MisconfigurationError whose message holds what is said in ``message``
(the object, what was found, what to write), and the same thing written rightly, which trains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, SGD
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from eventtrain import Callback, LightningDataModule, LightningModule, MisconfigurationError, Trainer, seed_everything
from eventtrain.callbacks import (
    GradientAccumulation,
    GradientClipping,
    LRSchedulerStepping,
    MixedPrecision,
    ProgressBar,
    TensorBoardLogger,
)

BATCHES = [torch.full((1,), float(x)) for x in (1, 2, 3, 4)]


class Model(LightningModule):
    """Made of functions: any attribute given to it takes the place of the method of that name."""

    def __init__(self, **methods: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        for name, method in methods.items():
            setattr(self, name, method)

    def loss(self, batch: Tensor) -> Tensor:
        return (self.w * batch).sum()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return SGD([self.w], lr=0.1)


def fit(model: Any = None, *callbacks: Any, data: Any = BATCHES, val: Any = None, **arguments: Any) -> Trainer:
    options = {"max_epochs": 1, "device": "cpu", "default_callbacks": False, "num_sanity_val_steps": 0, **arguments}
    fitting = {key: options.pop(key) for key in ("datamodule", "ckpt_path") if key in options}
    trainer = Trainer(callbacks=callbacks, **options)
    trainer.fit(Model() if model is None else model, data, val, **fitting)
    return trainer


# ------------------------------------------------------------------ modules


def returns(value: Callable[[Model, Tensor], Any], **methods: Any) -> Trainer:
    """Trains a module whose training_step returns a function of itself and the batch."""
    model = Model(**methods)
    model.training_step = lambda batch, batch_idx: value(model, batch)
    return fit(model)


def configured(by: Callable[[SGD], Any], model: Any = None, **methods: Any) -> Trainer:
    """Trains a module whose configure_optimizers returns a function of its SGD."""
    model = model or Model(**methods)
    model.configure_optimizers = lambda: by(SGD([model.w], lr=0.1))
    return fit(model, LRSchedulerStepping())


def scheduled(**config: Any) -> Trainer:
    return configured(lambda sgd: ([sgd], [{"scheduler": constant(sgd), **config}]))


def constant(sgd: Any) -> LambdaLR:
    return LambdaLR(sgd, lambda n: 1.0)


def stray() -> SGD:
    return SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


class Manual(Model):
    def __init__(self, body: Callable[[Any, Any, Tensor], Any], **methods: Any) -> None:
        super().__init__(**methods)
        self.automatic_optimization = False
        self.body = body

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.body(self, self.optimizers(), batch)


def manual(body: Callable[[Any, Any, Tensor], Any], *callbacks: Any, **methods: Any) -> Trainer:
    return fit(Manual(body, **methods), *callbacks)


def steps(model: Any, optimizer: Any, batch: Tensor) -> None:
    optimizer.zero_grad()
    model.manual_backward(model.loss(batch))
    optimizer.step()


def hooked(**hooks: Any) -> Trainer:
    """Trains a module of a class that has these functions as hooks."""
    return fit(type("Hooked", (Model,), hooks)())


def steps_by_closure(model: Any, optimizer: Any, batch: Tensor) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(batch)
        model.manual_backward(loss)
        return loss

    optimizer.step(closure)


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


def with_optimizer(kind: Any, *callbacks: Any) -> Trainer:
    model = Model()
    model.configure_optimizers = lambda: kind([model.w], lr=0.1)
    return fit(model, *callbacks)


def weighted(weigh: Callable[[float], Any]) -> Trainer:
    model = Model()
    model.training_step = lambda batch, i: {"loss": model.loss(batch), **({} if weigh(i) is None else {"weight": weigh(i)})}
    return fit(model, GradientAccumulation(2))


class Log(Model):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("value", **self.given)
        return self.loss(batch)


# ------------------------------------------------------------------ callbacks


class Misspelled(Callback):
    def on_train_batch_stop(self, trainer: Any, event: Any) -> None:
        pass


class Spelled(Callback):
    def on_train_batch_end(self, trainer: Any, event: Any) -> None:
        pass


class WrongArguments(Callback):
    def on_train_batch_end(self, trainer: Any) -> None:
        pass


class ForLightning(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass


class Coroutine(Callback):
    async def on_train_batch_end(self, trainer: Any, event: Any) -> None:
        pass


class Keeps(Callback):
    def __init__(self, key: str = "kept") -> None:
        self.key = key

    @property
    def state_key(self) -> str:
        return self.key

    def state_dict(self) -> dict[str, Any]:
        return {"value": 1}


# ------------------------------------------------------------------ data, stages


class Stream:
    """A loader that says a length, or none, and has another."""

    def __init__(self, has: int, says: int | None = None) -> None:
        self.has, self.says = has, says

    def __iter__(self) -> Iterator[Tensor]:
        return iter(BATCHES[: self.has])

    def __len__(self) -> int:
        if self.says is None:
            raise TypeError("no length")
        return self.says


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return BATCHES


def evaluates(**methods: Any) -> Model:
    return type("Evaluates", (Model,), {"validation_step": lambda self, batch, batch_idx: None, **methods})()


def after_fit(use: Callable[[Trainer, Any], Any], model: Any = None) -> Trainer:
    trainer = fit(model)
    use(trainer, trainer.module)
    return trainer


def before_fit(use: Callable[[Trainer], Any]) -> Trainer:
    trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False)
    use(trainer)
    trainer.fit(Model(), BATCHES)
    return trainer


def estimating(**arguments: Any) -> Trainer:
    model = Model()

    def configure() -> Any:
        assert model.trainer.estimated_stepping_batches
        return SGD([model.w], lr=0.1)

    model.configure_optimizers = configure
    return fit(model, data=Stream(4), **arguments)


class Hyper(Model):
    def __init__(self, width: Any, keep: Any = ()) -> None:
        super().__init__()
        self.save_hyperparameters(*keep)


def saved(model: Any, tmp: str = "checkpoint.pt") -> Trainer:
    return after_fit(lambda trainer, module: trainer.save_checkpoint(tmp), model)


def resumed(content: Any) -> Trainer:
    torch.save(content, "resumed.pt")
    return fit(ckpt_path="resumed.pt")


def good_checkpoint(**changes: Any) -> Any:
    saved(Model())
    return {**torch.load("checkpoint.pt", weights_only=True), **changes}


class Case(NamedTuple):
    wrong: Callable[[], Any]
    message: tuple[str, ...]
    right: Callable[[], Trainer]


CASES: dict[str, Case] = {
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
        ("Model", "2 optimizers", "manual optimization", r"self\.automatic_optimization = False"),
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
        (r"Timm\.step", "torch's form", r"lr_scheduler_step\(self, scheduler, metric\)", "Model"),
        lambda: configured(lambda sgd: (sgd, Timm(sgd)), lr_scheduler_step=lambda scheduler, metric: scheduler.step(epoch=0)),
    ),
    "a scheduler without a state": Case(
        lambda: configured(lambda sgd: ([sgd], [SimpleNamespace(step=lambda: None)])),
        ("namespace", "state_dict", "load_state_dict", "step, state_dict and load_state_dict"),
        lambda: configured(lambda sgd: ([sgd], [constant(sgd)])),
    ),
    "a scheduler's class": Case(
        lambda: configured(lambda sgd: {"optimizer": sgd, "lr_scheduler": LambdaLR}),
        ("LambdaLR", "as a scheduler"),
        lambda: configured(lambda sgd: {"optimizer": sgd, "lr_scheduler": constant(sgd)}),
    ),
    # ---------------------------------------------------------------- closures
    "an optimizer_step that never runs the closure": Case(
        lambda: fit(Model(optimizer_step=lambda epoch, batch_idx, optimizer, closure: optimizer.zero_grad())),
        ("optimizer_step", "SGD", "did not run its closure", r"optimizer\.step\(closure=optimizer_closure\)"),
        lambda: fit(Model(optimizer_step=lambda epoch, batch_idx, optimizer, closure: optimizer.step(closure=closure))),
    ),
    "an optimizer_step that forgets to pass the closure": Case(
        lambda: fit(Model(optimizer_step=lambda epoch, batch_idx, optimizer, closure: optimizer.step())),
        ("optimizer_step", "closure", r"optimizer\.step\(closure=optimizer_closure\)"),
        lambda: fit(Model(optimizer_step=lambda epoch, batch_idx, optimizer, closure: optimizer.step(closure))),
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
    # ---------------------------------------------------------------- accumulation
    **{
        f"accumulation of {batches!r}": Case(
            lambda batches=batches: fit(None, GradientAccumulation(batches)),  # type: ignore[misc]
            ("GradientAccumulation", "whole number from 1", re.escape(repr(batches))),
            lambda: fit(None, GradientAccumulation(2)),
        )
        for batches in (0, -1, 1.5, "2", None, True)
    },
    "accumulation by a schedule that does not start at 0": Case(
        lambda: fit(None, GradientAccumulation({4: 2})),
        ("GradientAccumulation", "starts at 4", "Add the key 0"),
        lambda: fit(None, GradientAccumulation({0: 1, 4: 2})),
    ),
    "accumulation by an empty schedule": Case(
        lambda: fit(None, GradientAccumulation({})),
        ("GradientAccumulation", "empty", r"\{0: value\}"),
        lambda: fit(None, GradientAccumulation({0: 2})),
    ),
    "accumulation by a schedule with a value of 0": Case(
        lambda: fit(None, GradientAccumulation({0: 2, 4: 0})),
        ("GradientAccumulation", "whole number from 1", "batches=0"),
        lambda: fit(None, GradientAccumulation({0: 2, 4: 1})),
    ),
    "accumulation by a schedule with a key that is no count": Case(
        lambda: fit(None, GradientAccumulation({0: 2, "4": 1})),
        ("GradientAccumulation", "key='4'", "whole number from 0"),
        lambda: fit(None, GradientAccumulation({0: 2, 4: 1})),
    ),
    "accumulation by a function that returns 0": Case(
        lambda: fit(None, GradientAccumulation(lambda trainer: 0)),
        ("GradientAccumulation", "whole number from 1", "batches=0"),
        lambda: fit(None, GradientAccumulation(lambda trainer: 2)),
    ),
    "accumulation in an unknown unit": Case(
        lambda: fit(None, GradientAccumulation(2, unit="epochs")),
        ("GradientAccumulation", "unit='epochs'", "epoch", "step", "batch"),
        lambda: fit(None, GradientAccumulation(2, unit="epoch")),
    ),
    "accumulation with an unknown normalization": Case(
        lambda: fit(None, GradientAccumulation(2, normalize="mean")),
        ("GradientAccumulation", "normalize='mean'", "window", "fixed"),
        lambda: fit(None, GradientAccumulation(2, normalize="fixed")),
    ),
    "accumulation with an unknown remainder": Case(
        lambda: fit(None, GradientAccumulation(2, remainder="keep")),
        ("GradientAccumulation", "remainder='keep'", "step", "drop", "carry"),
        lambda: fit(None, GradientAccumulation(2, remainder="carry")),
    ),
    "accumulation that drops whole epochs": Case(
        lambda: fit(None, GradientAccumulation(9, remainder="drop")),
        ("GradientAccumulation", "4 batches", "window 9", "'step' or 'carry'"),
        lambda: fit(None, GradientAccumulation(4, remainder="drop")),
    ),
    "accumulation in manual mode": Case(
        lambda: manual(steps, GradientAccumulation(2)),
        ("GradientAccumulation", "Manual", "manually", r"\(batch_idx \+ 1\) % N == 0"),
        lambda: manual(steps),
    ),
    # ---------------------------------------------------------------- clipping
    **{
        f"clipping by {value!r}": Case(
            lambda value=value: fit(None, GradientClipping(value)),  # type: ignore[misc]
            ("gradient_clip_val", "positive number, or None", re.escape(repr(value))),
            lambda: fit(None, GradientClipping(1.0)),
        )
        for value in (0, 0.0, -1.0, float("nan"), "1.0", True)
    },
    "clipping by a schedule that does not start at 0": Case(
        lambda: fit(None, GradientClipping({5: 2.0})),
        ("GradientClipping", "starts at 5", "Add the key 0"),
        lambda: fit(None, GradientClipping({0: None, 5: 2.0})),
    ),
    "clipping by a function that returns 0": Case(
        lambda: fit(None, GradientClipping(lambda trainer: 0.0)),
        ("gradient_clip_val", "positive number, or None", r"0\.0"),
        lambda: fit(None, GradientClipping(lambda trainer: None)),
    ),
    "an unknown clipping algorithm": Case(
        lambda: fit(None, GradientClipping(1.0, "l2")),
        ("gradient_clip_algorithm", "'norm' or 'value'", "'l2'"),
        lambda: fit(None, GradientClipping(1.0, "norm")),
    ),
    "a norm of order 0": Case(
        lambda: fit(None, GradientClipping(1.0, norm_type=0)),
        ("GradientClipping", "norm_type=0", "number above 0"),
        lambda: fit(None, GradientClipping(1.0, norm_type=float("inf"))),
    ),
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
    # ---------------------------------------------------------------- precision
    "an unknown precision": Case(
        lambda: fit(None, MixedPrecision("16-mixed")),
        ("MixedPrecision", "'16-mixed'", "bf16", "fp16"),
        lambda: fit(None, MixedPrecision("fp16")),
    ),
    "a scaler that is none": Case(
        lambda: fit(None, MixedPrecision("fp16", scaler=1024.0)),
        ("MixedPrecision", "scaler", r"1024\.0", "GradScaler"),
        lambda: fit(None, MixedPrecision("fp16", scaler=GradScaler("cpu", init_scale=1024.0))),
    ),
    "no overflow allowed": Case(
        lambda: fit(None, MixedPrecision("fp16", max_consecutive_overflows=0)),
        ("MixedPrecision", "max_consecutive_overflows=0", "whole number from 1"),
        lambda: fit(None, MixedPrecision("fp16", max_consecutive_overflows=1)),
    ),
    "a scaler for bf16": Case(
        lambda: fit(None, MixedPrecision("bf16", scaler=GradScaler("cpu"))),
        ("MixedPrecision", "'bf16'", "not scaled"),
        lambda: fit(None, MixedPrecision("fp16", scaler=GradScaler("cpu"))),
    ),
    "overflows without end": Case(
        lambda: returns_with(MixedPrecision("fp16", max_consecutive_overflows=2), lambda model, x: model.loss(x / 0)),
        ("2 steps in a row", "bf16", "max_consecutive_overflows"),
        lambda: returns_with(MixedPrecision("fp16"), lambda model, x: model.loss(x)),
    ),
    # ---------------------------------------------------------------- the trainer's arguments
    "a run without an end": Case(
        lambda: fit(max_epochs=None), ("no end", r"max_epochs=", r"max_steps="), lambda: fit(max_epochs=None, max_steps=3)
    ),
    **{
        f"{name}={value!r}": Case(
            lambda name=name, value=value: fit(**{name: value}),  # type: ignore[misc]
            (rf"{name}={re.escape(repr(value))}", "whole number"),
            lambda name=name, right=right: fit(**{name: right}),  # type: ignore[misc]
        )
        for name, value, right in (
            ("max_epochs", -2, 2),
            ("max_epochs", 1.5, 1),
            ("max_epochs", "3", 3),
            ("max_epochs", True, 1),
            ("max_steps", -2, 2),
            ("max_steps", 2.5, 2),
            ("min_epochs", -1, 1),
            ("min_steps", 0.5, 1),
            ("num_sanity_val_steps", -2, -1),
            ("num_sanity_val_steps", 1.5, 1),
            ("fast_dev_run", -1, 1),
            ("fast_dev_run", 1.5, 1),
            ("fast_dev_run", "yes", True),
            ("check_val_every_n_epoch", 0, 1),
            ("check_val_every_n_epoch", 0.5, 1),
            ("limit_train_batches", -1, 1),
            ("limit_train_batches", 1.5, 0.5),
            ("limit_train_batches", "2", 2),
            ("limit_train_batches", True, 1),
            ("limit_val_batches", -0.5, 0.5),
            ("limit_test_batches", 2.0, 2),
            ("limit_predict_batches", -1, 0),
        )
    },
    "a limit below one batch": Case(
        lambda: fit(limit_train_batches=0.1),
        (r"limit_train_batches=0\.1", "4 batches", "less than one", r"0\.25"),
        lambda: fit(limit_train_batches=0.25),
    ),
    "a fraction of a loader without a length": Case(
        lambda: fit(data=Stream(4), limit_train_batches=0.5),
        (r"limit_train_batches=0\.5", "length is unknown", "whole number"),
        lambda: fit(data=Stream(4), limit_train_batches=2),
    ),
    "an interval longer than the epoch": Case(
        lambda: fit(val_check_interval=5),
        ("val_check_interval=5", "4 batches", "check_val_every_n_epoch=None"),
        lambda: fit(val_check_interval=5, check_val_every_n_epoch=None),
    ),
    "an interval of 0": Case(
        lambda: fit(val_check_interval=0), ("val_check_interval=0", "limit_val_batches=0"), lambda: fit(limit_val_batches=0)
    ),
    "an interval that is a fraction of an unknown length": Case(
        lambda: fit(data=Stream(4), val_check_interval=0.5),
        (r"val_check_interval=0\.5", "length is unknown", "number of batches"),
        lambda: fit(data=Stream(4), val_check_interval=2),
    ),
    "an interval of the run that is no number of batches": Case(
        lambda: fit(check_val_every_n_epoch=None),
        ("check_val_every_n_epoch=None", "val_check_interval", "None"),
        lambda: fit(check_val_every_n_epoch=None, val_check_interval=3),
    ),
    **{
        f"device={device!r}": Case(
            lambda device=device: fit(device=device),  # type: ignore[misc]
            (re.escape(f"device={device!r}"), "cpu|'auto'"),
            lambda: fit(device="cpu"),
        )
        for device in ("gpu", "tpu", "cuda:99", "cpu:x", 2.5, None)
    },
    "a bad seed": Case(lambda: fit(seed=-1), ("seed", "-1", "whole number"), lambda: fit(seed=1)),
    "seed_everything of a string": Case(
        lambda: seed_everything("1"), ("seed", "'1'", "whole number"), lambda: fit(seed=seed_everything(1))
    ),
    # ---------------------------------------------------------------- callbacks
    "a callback's class": Case(
        lambda: fit(None, GradientClipping),
        ("GradientClipping is a class", r"GradientClipping\(\.\.\.\)"),
        lambda: fit(None, Spelled()),
    ),
    "a callback twice": Case(
        lambda: fit(None, *[Spelled()] * 2), ("Spelled", "attached twice", "once"), lambda: fit(None, Spelled(), Spelled())
    ),
    "two of one role": Case(
        lambda: fit(None, MixedPrecision("bf16"), MixedPrecision("fp16")),
        ("MixedPrecision and MixedPrecision", "role 'precision'", "Keep one"),
        lambda: fit(None, MixedPrecision("bf16")),
    ),
    "two with one state key": Case(
        lambda: fit(None, Keeps(), Keeps()), ("Keeps and Keeps", "'kept'", "state_key"), lambda: fit(None, Keeps(), Keeps("b"))
    ),
    "a misspelled handler": Case(
        lambda: fit(None, Misspelled()),
        (r"Misspelled\.on_train_batch_stop", "names no event", "Did you mean 'on_train_batch_"),
        lambda: fit(None, Spelled()),
    ),
    "a handler with other arguments": Case(
        lambda: fit(None, WrongArguments()),
        (r"WrongArguments\.on_train_batch_end", "trainer", r"def on_train_batch_end\(self, trainer, event\)"),
        lambda: fit(None, Spelled()),
    ),
    "a handler written for Lightning": Case(
        lambda: fit(None, ForLightning()),
        (r"ForLightning\.on_train_batch_end", "Lightning", r"trainer\.module", r"\(self, trainer, event\)"),
        lambda: fit(None, Spelled()),
    ),
    "a handler that is a coroutine": Case(
        lambda: fit(None, Coroutine()), (r"Coroutine\.on_train_batch_end", "coroutine"), lambda: fit(None, Spelled())
    ),
    "a callback's name": Case(
        lambda: fit(None, "progress_bar"), ("'progress_bar'|str", "callback|listen|on_"), lambda: fit(None, ProgressBar())
    ),
    "a number for callbacks": Case(lambda: fit(None, 5), ("5|int", "callback|listen|on_"), lambda: fit(None, Spelled())),
    "a listener with other arguments": Case(
        lambda: before_fit(lambda trainer: trainer.signals.train_start.connect(lambda: None)),
        ("lambda", r"\(trainer, event=event\)", "train_start"),
        lambda: before_fit(lambda trainer: trainer.signals.train_start.connect(lambda trainer, event: None)),
    ),
    "a callback that is not attached": Case(
        lambda: after_fit(lambda trainer, module: trainer.callback(MixedPrecision)),
        ("No MixedPrecision", r"there are \[\]", r"callbacks=\[\.\.\.\]"),
        lambda: before_fit(lambda trainer: None),
    ),
    "an unknown x-axis": Case(
        lambda: TensorBoardLogger(x_axis="time"), ("TensorBoardLogger", "x_axis='time'", "wall_time"), fit
    ),
    "a cadence of 0": Case(
        lambda: TensorBoardLogger(log_every_n_steps=0), ("TensorBoardLogger", "log_every_n_steps=0", "from 1"), fit
    ),
    # ---------------------------------------------------------------- modules and hooks
    "a plain module": Case(lambda: fit(nn.Linear(1, 1)), ("Linear", r"eventtrain\.LightningModule"), fit),
    "a module's class": Case(lambda: fit(Model), ("Model", r"class|Model\("), lambda: fit(Model())),
    "a module of another library": Case(
        lambda: fit(type("LightningModule", (nn.Module,), {"__module__": "lightning.pytorch"})()),
        ("LightningModule", "lightning", "from eventtrain import LightningModule"),
        fit,
    ),
    "no module": Case(
        lambda: Trainer(max_epochs=1, device="cpu", default_callbacks=False).validate(dataloaders=BATCHES),
        ("no module yet", "fit first"),
        lambda: after_fit(lambda trainer, module: trainer.validate(dataloaders=BATCHES), evaluates()),
    ),
    "a datamodule that is none": Case(
        lambda: fit(data=None, datamodule=BATCHES),
        ("datamodule", "list", r"LightningDataModule", "train_dataloaders="),
        lambda: fit(data=None, datamodule=Data()),
    ),
    "a module's hook with other arguments": Case(
        lambda: hooked(on_train_batch_end=lambda self, trainer, outputs, batch, batch_idx: None),
        (r"Hooked\.on_train_batch_end", r"def on_train_batch_end\(self, outputs, batch, batch_idx\):"),
        lambda: hooked(on_train_batch_end=lambda self, outputs, batch, batch_idx: None),
    ),
    "a module's misspelled hook": Case(
        lambda: hooked(on_train_epoch_ends=lambda self: None),
        (r"Hooked\.on_train_epoch_ends", "no hook", "Did you mean 'on_train_epoch_end'"),
        lambda: hooked(on_train_epoch_end=lambda self: None),
    ),
    "a trainer's property without a trainer": Case(
        lambda: Model().trainer,
        ("Model is not attached to a trainer", "fit"),
        lambda: after_fit(lambda t, module: module.trainer),
    ),
    "optimizers without a trainer": Case(
        lambda: Model().optimizers(), ("Model is not attached", "fit"), lambda: after_fit(lambda t, module: module.optimizers())
    ),
    "a trainer's module without one": Case(
        lambda: before_fit(lambda trainer: trainer.module),
        ("no module yet", "fit"),
        lambda: after_fit(lambda trainer, module: trainer.module),
    ),
    "a run inside of a run": Case(
        lambda: hooked(on_train_start=lambda self: self.trainer.fit(Model(), BATCHES)),
        ("running fit", "another trainer"),
        lambda: hooked(on_train_start=lambda self: fit() and None),
    ),
    # ---------------------------------------------------------------- calls in the wrong mode
    "manual_backward in automatic mode": Case(
        lambda: returns(lambda model, x: model.manual_backward(model.loss(x))),
        (r"Model\.manual_backward", "automatic optimization", r"self\.automatic_optimization = False"),
        lambda: manual(steps),
    ),
    "manual_backward of a number": Case(
        lambda: manual(lambda model, optimizer, x: model.manual_backward(3.0)),
        ("manual_backward", r"3\.0", "scalar tensor"),
        lambda: manual(steps),
    ),
    "toggle_model outside of a run": Case(
        lambda: after_fit(lambda trainer, module: trainer.optimizers[0].toggle_model()),
        ("toggle_model", "training_step"),
        lambda: manual(toggles),
    ),
    "toggles that cross": Case(
        lambda: manual(crossing, configure_optimizers=lambda: [stray(), Lazy([nn.Parameter(torch.zeros(1))], lr=0.1)]),
        (r"untoggle_optimizer\(SGD\)", "Lazy was toggled after it", "with self.toggled_optimizer"),
        lambda: manual(toggles),
    ),
    # ---------------------------------------------------------------- loaders
    "no loader": Case(
        lambda: fit(data=None), ("nothing to train on", "train_dataloaders=", "train_dataloader"), lambda: fit(data=BATCHES)
    ),
    "several training loaders": Case(
        lambda: fit(data=[Stream(2), Stream(2)]), ("several training loaders", "ConcatDataset"), lambda: fit(data=Stream(2))
    ),
    "a loader that cannot be iterated": Case(
        lambda: fit(data=5), ("training loader", r"5 \(int\)", "DataLoader"), lambda: fit(data=BATCHES)
    ),
    "a datamodule in the place of a loader": Case(
        lambda: fit(data=Data()),
        ("training loader", "Data", "datamodule|DataLoader"),
        lambda: fit(data=None, datamodule=Data()),
    ),
    "a validation loader that cannot be iterated": Case(
        lambda: fit(evaluates(), val=5), ("validation", "5", "iterated|DataLoader"), lambda: fit(evaluates(), val=BATCHES)
    ),
    "a test loader that cannot be iterated": Case(
        lambda: Trainer(max_epochs=1, device="cpu").test(evaluates(test_step=lambda self, batch, i: None), 5),
        ("test", "5", "iterated|DataLoader"),
        lambda: after_fit(
            lambda trainer, module: trainer.test(module, BATCHES), evaluates(test_step=lambda self, batch, i: None)
        ),
    ),
    "a loader shorter than its length": Case(
        lambda: fit(data=Stream(2, says=3)),
        ("Stream", "3 batches", "ended after 2", "__len__"),
        lambda: fit(data=Stream(2, says=2)),
    ),
    "a loader longer than its length": Case(
        lambda: fit(data=Stream(3, says=2)), ("Stream", "2 batches", "has more", "__len__"), lambda: fit(data=Stream(3, says=3))
    ),
    "a loader without batches and without an end": Case(
        lambda: fit(data=Stream(0), max_epochs=None, max_steps=3),
        ("Stream", "no batch in epoch 0", "iterated anew"),
        lambda: fit(data=Stream(2), max_epochs=None, max_steps=3),
    ),
    "an iterator that is used up": Case(
        lambda: fit(data=iter(BATCHES), max_epochs=None, max_steps=9),
        ("list_iterator", "no batch in epoch 1", "used up"),
        lambda: fit(data=BATCHES, max_epochs=None, max_steps=9),
    ),
    "an estimate of an unknown length": Case(
        lambda: estimating(),
        ("estimated_stepping_batches", "length", r"Trainer\(max_steps=\.\.\.\)"),
        lambda: estimating(max_steps=3),
    ),
    # ---------------------------------------------------------------- stages and checkpoints
    "validate without a validation_step": Case(
        lambda: after_fit(lambda trainer, module: trainer.validate(module, BATCHES)),
        ("Model has no validation_step", "Define it"),
        lambda: after_fit(lambda trainer, module: trainer.validate(module, BATCHES), evaluates()),
    ),
    "test without a test_step": Case(
        lambda: after_fit(lambda trainer, module: trainer.test(module, BATCHES)),
        ("Model has no test_step", "Define it"),
        lambda: after_fit(lambda trainer, module: trainer.validate(module, BATCHES), evaluates()),
    ),
    "validate without data": Case(
        lambda: after_fit(lambda trainer, module: trainer.validate(module), evaluates()),
        ("nothing to validate on", "dataloaders=", "val_dataloader"),
        lambda: after_fit(lambda trainer, module: trainer.validate(module, BATCHES), evaluates()),
    ),
    "ckpt_path='last' with nothing that keeps checkpoints": Case(
        lambda: fit(ckpt_path="last"), ("ckpt_path='last'", "keeps checkpoints", "path"), lambda: resumed(at_start())
    ),
    "a file that is no checkpoint": Case(
        lambda: resumed({"weights": 1}), (r"resumed\.pt", "no checkpoint", "state_dict"), lambda: resumed(at_start())
    ),
    "a checkpoint of another version": Case(
        lambda: resumed({**at_start(), "schema_version": 99}), ("schema version 99", "version"), lambda: resumed(at_start())
    ),
    "a checkpoint of other optimizers": Case(
        lambda: resumed({**at_start(), "optimizer_states": []}),
        ("0 optimizer_states", "returned 1", "load_from_checkpoint"),
        lambda: resumed(at_start()),
    ),
    "a hyperparameter that cannot be given back": Case(
        lambda: saved(Hyper(lambda: 3)),
        (r"hyper_parameters", "width", "function", r"ignore=\[\.\.\.\]"),
        lambda: saved(Hyper(3)),
    ),
    "a hyperparameter that is no argument": Case(
        lambda: Hyper(3, keep=("depth",)), ("'depth'", r"Hyper\.__init__", "width"), lambda: fit(Hyper(3, keep=("width",)))
    ),
    # ---------------------------------------------------------------- logging
    **{
        f"logging {case}": Case(
            lambda value=value: fit(Log(value=value)),  # type: ignore[misc]
            (r"self\.log\('value'", found, "Log a|log_dict"),
            lambda: fit(Log(value=1.0)),
        )
        for case, value, found in (
            ("a vector", torch.ones(2), r"shape \(2,\)"),
            ("a string", "high", "'high'"),
            ("None", None, "NoneType"),
            ("a list", [1.0], "list"),
            ("a mapping", {"a": 1.0}, "mapping"),
        )
    },
    "logging nowhere": Case(
        lambda: fit(Log(value=1.0, on_step=False)),
        (r"'value'", "neither on_step nor on_epoch", "Set one"),
        lambda: fit(Log(value=1.0)),
    ),
    "logging with an unknown reduction": Case(
        lambda: fit(Log(value=1.0, reduce_fx="median")),
        ("'value'", "'median'", "mean"),
        lambda: fit(Log(value=1.0, reduce_fx="max")),
    ),
    "logging under a name that is none": Case(
        lambda: hooked(on_train_epoch_end=lambda self: self.log(3, 1.0)),
        ("name", "string", "3"),
        lambda: hooked(on_train_epoch_end=lambda self: self.log("3", 1.0)),
    ),
    "logging where it means nothing": Case(
        lambda: hooked(on_train_start=lambda self: self.log("value", 1.0)),
        (r"self\.log\('value'", "no step and no epoch", "on_train_epoch_start"),
        lambda: hooked(on_train_epoch_start=lambda self: self.log("value", 1.0)),
    ),
    "log_dict of a list": Case(
        lambda: hooked(on_train_epoch_end=lambda self: self.log_dict([1.0])),
        ("log_dict", r"\[1\.0\]|list", "mapping|dict"),
        lambda: hooked(on_train_epoch_end=lambda self: self.log_dict({"value": 1.0})),
    ),
    "logging on the step where there is none": Case(
        lambda: hooked(on_train_epoch_end=lambda self: self.log("value", 1.0, on_step=True)),
        (r"self\.log\('value'", "no step", "Leave on_step out"),
        lambda: hooked(on_train_epoch_end=lambda self: self.log("value", 1.0)),
    ),
}


# ------------------------------------------------------------------ what some cases need


class Vetoes(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_before_optimizer_step(self, trainer: Any, event: Any) -> None:
        if event.evaluation == self.at:
            event.skip("mine")


def returns_with(callback: Any, value: Callable[[Model, Tensor], Any]) -> Trainer:
    model = Model()
    model.training_step = lambda batch, batch_idx: value(model, batch)
    return fit(model, callback)


def clips_by(value: Any) -> Trainer:
    return fit(
        type("Clips", (Model,), {"on_before_optimizer_step": lambda self, optimizer: self.clip_gradients(optimizer, value)})()
    )


def toggles(model: Any, optimizer: Any, batch: Tensor) -> None:
    with optimizer.toggle_model():
        steps(model, optimizer, batch)


def crossing(model: Any, optimizers: Any, batch: Tensor) -> None:
    for optimizer in optimizers:
        model.toggle_optimizer(optimizer)
    for optimizer in optimizers:
        model.untoggle_optimizer(optimizer)


def at_start() -> Any:
    """A checkpoint that was written before the first batch."""

    class Saves(Callback):
        def on_train_start(self, trainer: Any, event: Any) -> None:
            trainer.save_checkpoint("start.pt")

    fit(None, Saves())
    return torch.load("start.pt", weights_only=True)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_a_misconfiguration_says_what_is_wrong_and_what_to_write(case: str) -> None:
    with pytest.raises(MisconfigurationError) as caught:
        CASES[case].wrong()
    message = str(caught.value)
    for part in CASES[case].message:
        assert re.search(part, message), f"{part!r} is not in: {message}"


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_correct_form_trains(case: str) -> None:
    assert CASES[case].right().global_step > 0


def test_there_are_many_cases() -> None:
    assert len(CASES) > 100
