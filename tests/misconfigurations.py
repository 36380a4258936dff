"""Pairs of a misconfiguration and the nearest form that trains, and their common parts.

Each room's ``test_misconfiguration.py`` holds the pairs whose misconfiguration the room refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from eventtrain import LightningDataModule, MisconfigurationError, Trainer
from tests.kit import ModuleOf

BATCHES = [torch.full((1,), float(x)) for x in (1, 2, 3, 4)]


class Case(NamedTuple):
    """A misconfiguration.

    Attributes:
        wrong: Raises a MisconfigurationError.
        message: Patterns that its message holds: the object, the wrong value, and the remedy.
        right: Does the same in the right form, and trains.
    """

    wrong: Callable[[], Any]
    message: tuple[str, ...]
    right: Callable[[], Trainer]


def check_refusal(case: Case) -> None:
    """Check that a case is refused, and that the message says how to write it."""
    with pytest.raises(MisconfigurationError) as caught:
        case.wrong()
    message = str(caught.value)
    for part in case.message:
        assert re.search(part, message), f"{part!r} is not in: {message}"


def check_remedy(case: Case) -> None:
    """Check that the right form trains."""
    assert case.right().global_step > 0


def fit(model: Any = None, *callbacks: Any, data: Any = BATCHES, val: Any = None, **arguments: Any) -> Trainer:
    options = {"max_epochs": 1, "device": "cpu", "default_callbacks": False, "num_sanity_val_steps": 0, **arguments}
    fitting = {key: options.pop(key) for key in ("datamodule", "ckpt_path") if key in options}
    trainer = Trainer(callbacks=callbacks, **options)
    trainer.fit(ModuleOf() if model is None else model, data, val, **fitting)
    return trainer


def returns(value: Callable[[ModuleOf, Tensor], Any], **methods: Any) -> Trainer:
    """Train a module whose `training_step` returns a function of itself and the batch."""
    model = ModuleOf(**methods)
    model.training_step = lambda batch, batch_idx: value(model, batch)  # type: ignore[method-assign]
    return fit(model)


def stray() -> SGD:
    return SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


class Manual(ModuleOf):
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
    """Train a module of a class that has these functions as hooks."""
    return fit(type("Hooked", (ModuleOf,), hooks)())


class Log(ModuleOf):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("value", **self.options)
        return self.loss(batch)


class Stream:
    """A loader that yields `has` batches, and says a length or none."""

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


def evaluates(**methods: Any) -> Any:
    return type("Evaluates", (ModuleOf,), {"validation_step": lambda self, batch, batch_idx: None, **methods})()


def after_fit(use: Callable[[Trainer, Any], Any], model: Any = None) -> Trainer:
    trainer = fit(model)
    use(trainer, trainer.module)
    return trainer


def before_fit(use: Callable[[Trainer], Any]) -> Trainer:
    trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False)
    use(trainer)
    trainer.fit(ModuleOf(), BATCHES)
    return trainer
