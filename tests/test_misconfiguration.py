"""Callbacks that are refused, each beside the nearest form that trains."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from eventtrain import Callback
from eventtrain.callbacks import (
    GradientClipping,
    MixedPrecision,
    ProgressBar,
)
from tests.misconfigurations import Case, after_fit, before_fit, check_refusal, check_remedy, fit

pytestmark = pytest.mark.usefixtures("in_tmp_path")


class Misspelled(Callback):
    def on_train_batch_stop(self, trainer: Any, event: Any) -> None:
        pass


class Spelled(Callback):
    def on_train_batch_end(self, trainer: Any, event: Any) -> None:
        pass


class WrongArguments(Callback):
    def on_train_batch_end(self, trainer: Any) -> None:  # type: ignore[override]
        pass


class ForLightning(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        pass


class Coroutine(Callback):
    async def on_train_batch_end(self, trainer: Any, event: Any) -> None:  # type: ignore[override]
        pass


class Keeps(Callback):
    def __init__(self, key: str = "kept") -> None:
        self.key = key

    @property
    def state_key(self) -> str:
        return self.key

    def state_dict(self) -> dict[str, Any]:
        return {"value": 1}


CASES: dict[str, Case] = {
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
}


@pytest.mark.parametrize("case", CASES)
def test_the_refusal_names_the_mistake_and_the_remedy(case: str) -> None:
    check_refusal(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_correct_form_trains(case: str) -> None:
    check_remedy(CASES[case])


ROOMS = ("callbacks", "checkpoint", "core", "data", "metrics", "module", "optim", "run")


def test_the_rooms_hold_many_cases() -> None:
    rooms = [import_module(f"tests.{room}.test_misconfiguration") for room in ROOMS]
    assert len(CASES) + sum(len(room.CASES) for room in rooms) > 100
