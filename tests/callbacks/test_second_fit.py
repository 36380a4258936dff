"""Nothing of one fit is left in the next, whether the trainer runs again or another one has the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.amp import GradScaler  # type: ignore[attr-defined]

from eventtrain import Callback, Trainer, callbacks
from eventtrain.callbacks import MixedPrecision
from tests.kit import On, Probe, new_trainer, rows, train
from tests.resuming import assert_same
from tests.together import PARALLEL, Model, repeatable, shipped

NAMES = [name for name in callbacks.__all__ if name not in PARALLEL] + [PARALLEL[0]]
OF_A_PLACE = ("path", "run", "run_dir", "position", "event_files", "seconds", "elapsed")
"""The state that names a run's own files, or measures time."""


class Logged(Callback):
    """Records the values that loggers get."""

    def __init__(self) -> None:
        self.entries: list[Any] = []

    def on_metrics_logged(self, trainer: Trainer, event: Any) -> None:
        self.entries.append((event.stage, event.scope, event.step, repeatable(event.metrics)))


def fit(trainer: Trainer, *, fails: bool = False) -> None:
    torch.manual_seed(5)
    data = [*rows(5, width=2)[:3], "no batch"] if fails else rows(5, width=2)
    trainer.fit(Model(), data, rows(2, width=2))


def outcome(trainer: Trainer, callback: Any, logged: Logged) -> dict[str, Any]:
    state = callback.state_dict() if isinstance(callback, Callback) else {}
    return {
        "weights": dict(trainer.module.state_dict()),
        "counters": (trainer.progress, trainer.stop_reason),
        "logged": [entry for entry in logged.entries if entry[-1]],
        "values": repeatable(trainer.callback_metrics),
        "state": {name: value for name, value in state.items() if name not in OF_A_PLACE},
    }


def trainer_of(folder: Path, callback: Any, *more: Any) -> tuple[Trainer, Logged]:
    logged = Logged()
    others = () if isinstance(callback, callbacks.LRSchedulerStepping) else (callbacks.LRSchedulerStepping(),)
    options = {"max_epochs": 3, "num_sanity_val_steps": 1, "default_root_dir": folder}
    return new_trainer(callback, *others, logged, *more, **options), logged


@pytest.mark.parametrize("first", ["whole", "failed", "of another trainer"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # some are for another module
def test_a_second_fit_equals_a_first(name: str, first: str, tmp_path: Path) -> None:
    def count(trainer: Trainer, event: Any) -> None:
        counted.append(trainer.global_step)

    counted: list[int] = []
    fresh = shipped(PARALLEL[0], count)[name]
    trainer, logged = trainer_of(tmp_path / "fresh", fresh)
    fit(trainer)
    expected, expected_count = outcome(trainer, fresh, logged), list(counted)

    used = shipped(PARALLEL[0], count)[name]
    trainer, logged = trainer_of(tmp_path / "used", used)
    if first == "failed":
        with pytest.raises(Exception, match=r"str|batch"):
            fit(trainer, fails=True)
    else:
        fit(trainer)
    if first == "of another trainer":
        trainer, logged = trainer_of(tmp_path / "other", used)
    counted.clear()
    logged.entries.clear()
    fit(trainer)
    assert_same(outcome(trainer, used, logged), expected, name)
    assert counted == expected_count


# ------------------------------------------------------------------ the scale of fp16


@pytest.mark.parametrize("given", [False, True], ids=["its own scaler", "the user's scaler"])
@pytest.mark.parametrize("left", ["whole", "with an open window"])
def test_a_second_fit_in_fp16_begins_with_the_first_scale(given: bool, left: str) -> None:
    scaler = GradScaler("cpu", init_scale=64.0, growth_interval=2) if given else None
    precision, scales = MixedPrecision("fp16", scaler=scaler), []

    def note(trainer: Trainer, event: Any) -> None:
        assert precision.scaler is not None
        scales.append(precision.scaler.get_scale())

    def fail(trainer: Trainer, event: Any) -> None:
        if left != "whole" and trainer.batch_idx == 3:
            raise ZeroDivisionError

    failing = On(after_backward=fail)
    trainer = new_trainer(precision, failing, On(train_batch_end=note))
    data = [1.0, float("inf"), 2.0, 3.0, 4.0]
    batches = [torch.tensor(x) for x in data]
    if left == "whole":
        trainer.fit(Probe(), batches)
    else:
        with pytest.raises(ZeroDivisionError):
            trainer.fit(Probe(), batches)
    trainer.callbacks.remove(failing)
    first, module = list(scales), Probe()
    scales.clear()
    trainer.fit(module, batches)
    assert scales[: len(first)] == first and scales[0] > scales[1]
    again = Probe()
    train(again, data, MixedPrecision("fp16", scaler=GradScaler("cpu", init_scale=64.0, growth_interval=2) if given else None))
    assert module.updates == again.updates


def test_an_evaluation_after_a_fit_keeps_the_scale() -> None:
    precision = MixedPrecision("fp16", scaler=GradScaler("cpu", init_scale=8.0))
    trainer = new_trainer(precision, callbacks.LRSchedulerStepping())
    model = Model()
    trainer.fit(model, [torch.full((2, 2), float("inf"))] * 2)
    state = precision.state_dict()
    assert state["scaler"]["scale"] == 2.0
    trainer.validate(model, rows(1, width=2))
    assert precision.state_dict() == state
