"""A run that stops before a limit of wall-clock time, and goes on with the time that is left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from eventtrain import Callback, MisconfigurationError, Trainer, events
from eventtrain.callbacks import GradientAccumulation, LRSchedulerStepping
from eventtrain.callbacks.stopping.timer import Timer
from eventtrain.distributed import SingleProcess
from tests.resuming import Build, Model, assert_same_run, run

KEPT = Path("checkpoints") / "interrupted.ckpt"

# Runs are resumed here without the timer that ended them.
pytestmark = pytest.mark.filterwarnings("ignore:The checkpoint holds state of .'Timer'")


class Clock(Callback):
    """A clock that batches, of training and of validation, move on; counts them."""

    def __init__(self, train: float = 1.0, validation: float = 0.0) -> None:
        self.seconds = {"train": train, "validation": validation}
        self.now = 100.0
        self.counts = {"train": 0, "validation": 0}

    def on_after_forward(self, trainer: Trainer, event: events.AfterForward) -> None:
        self.now += self.seconds[event.stage]
        self.counts[event.stage] += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("eventtrain.callbacks.stopping.timer.monotonic", lambda: clock.now)
    return clock


def build(folder: Path, *callbacks: Any, **options: Any) -> Build:
    """Three epochs of five batches, in windows of two, with a validation of two batches after the third of each."""

    def build() -> Any:
        values = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
        loader: Any = DataLoader(values, batch_size=4, shuffle=True)  # type: ignore[arg-type]
        given = {
            "max_epochs": 3,
            "val_check_interval": 3,
            "num_sanity_val_steps": 0,
            "default_root_dir": folder,
            **options,
        }
        return Model(), loader, [values[:4], values[4:8]], [GradientAccumulation(2), LRSchedulerStepping(), *callbacks], given

    return build


def assert_goes_on(folder: Path) -> None:
    resumed, straight = run(build(folder), ckpt_path="last"), run(build(folder))
    assert_same_run(resumed, straight, "resumed")


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("seconds", [1, 5, 7.5, 15, 15.5])
def test_it_stops_at_the_first_safe_point_past_the_limit(tmp_path: Path, clock: Clock, seconds: float, first: bool) -> None:
    timer = Timer(seconds)
    trainer = run(build(tmp_path, *((timer, clock) if first else (clock, timer))))
    assert clock.counts["train"] == min(15, -(-seconds // 1))
    reason = trainer.stop_request.reason
    if seconds > 15:
        assert reason is None and not (tmp_path / KEPT).exists()
        assert (timer.elapsed, timer.remaining) == (15, 0.5)
    else:
        assert reason is not None and reason.startswith("Timer: 0:00:")
        assert timer.remaining == 0
        assert_goes_on(tmp_path)


def test_the_reason_says_how_long_it_was(tmp_path: Path, clock: Clock) -> None:
    clock.seconds["train"] = 1800.0
    trainer = run(build(tmp_path, clock, Timer("01:00:00", margin=60)))
    assert trainer.stop_request.reason == "Timer: 1:00:00 of 1:00:00 are over"


def test_a_margin_ends_it_sooner(tmp_path: Path, clock: Clock) -> None:
    run(build(tmp_path, clock, Timer(10, margin={"seconds": 3})))
    assert clock.counts["train"] == 7


def test_no_minimum_holds_it_off(tmp_path: Path, clock: Clock) -> None:
    run(build(tmp_path, clock, Timer(2), min_epochs=3, min_steps=6))
    assert clock.counts["train"] == 2


@pytest.mark.parametrize(("seconds", "batches"), [(3, 0), (4, 1)])
def test_a_validation_is_left_and_runs_again(tmp_path: Path, clock: Clock, seconds: float, batches: int) -> None:
    """The limit passes in the third batch of training, or in the first one of the validation that follows it."""
    clock.seconds["validation"] = 10.0
    trainer = run(build(tmp_path, clock, Timer(seconds)))
    assert clock.counts == {"train": 3, "validation": batches}
    assert trainer.progress.validations == 0 and trainer.stop_request.at_once
    again = Clock()
    resumed = run(build(tmp_path, again), ckpt_path="last")
    assert again.counts == {"train": 12, "validation": 6} and resumed.progress.validations == 3
    assert_goes_on(tmp_path)


def test_a_sanity_check_is_left_too(tmp_path: Path, clock: Clock) -> None:
    clock.seconds["validation"] = 10.0
    trainer = run(build(tmp_path, clock, Timer(5), num_sanity_val_steps=2))
    assert clock.counts == {"train": 0, "validation": 1}
    assert trainer.stop_request.reason is not None and not (tmp_path / KEPT).exists()


def test_an_evaluation_by_itself_is_not_left(tmp_path: Path, clock: Clock) -> None:
    timer = Timer(2)
    trainer = run(build(tmp_path, clock, timer))
    clock.seconds["validation"] = 10.0
    trainer.validate(dataloaders=[torch.ones(4, 3)] * 3)
    assert clock.counts["validation"] == 3 and timer.elapsed == 2, "the clock stands between fits"


# ------------------------------------------------------------------ the clock of a resumed run


def test_the_clock_goes_on_where_a_run_is_resumed(tmp_path: Path, clock: Clock) -> None:
    run(build(tmp_path, clock, Timer(4)))
    clock.now += 1000  # nothing runs
    timer = Timer(9)
    run(build(tmp_path, clock, timer), ckpt_path="last")
    assert clock.counts["train"] == 9 and timer.elapsed == 9


def test_without_time_left_nothing_is_trained(tmp_path: Path, clock: Clock) -> None:
    run(build(tmp_path, clock, Timer(4)))
    written = os.stat(tmp_path / KEPT).st_mtime_ns
    trainer = run(build(tmp_path, clock, Timer(4)), ckpt_path="last")
    assert clock.counts["train"] == 4 and trainer.stop_request.reason is not None
    assert os.stat(tmp_path / KEPT).st_mtime_ns == written
    assert_goes_on(tmp_path)


def test_each_job_has_its_own_limit(tmp_path: Path, clock: Clock) -> None:
    for done in (4, 8, 12, 15):
        run(build(tmp_path, clock, Timer(4, per_job=True)), ckpt_path="last")
        assert clock.counts["train"] == done


def test_a_run_and_its_jobs_have_limits_together(tmp_path: Path, clock: Clock) -> None:
    for done in (4, 8, 10, 10):
        run(build(tmp_path, Timer(4, per_job=True), Timer(10), clock), ckpt_path="last")
        assert clock.counts["train"] == done


def test_a_fit_begins_anew(tmp_path: Path, clock: Clock) -> None:
    timer = Timer(4)
    run(build(tmp_path, clock, timer))
    run(build(tmp_path, clock, timer))
    assert clock.counts["train"] == 8


def test_a_policy_of_ones_own_is_one_method(tmp_path: Path, clock: Clock) -> None:
    class AtNoon(Timer):
        def is_due(self, trainer: Trainer) -> bool:
            return trainer.global_step == 2

    run(build(tmp_path, clock, AtNoon(1)))
    assert clock.counts["train"] == 4, "two windows of two"


def test_it_reads_the_real_clock(tmp_path: Path) -> None:
    timer = Timer(0.05)
    begun = time.monotonic()

    class Sleeps:
        def on_train_batch_start(self, trainer: Trainer, event: events.TrainBatchStart) -> None:
            time.sleep(0.02)

    trainer = run(build(tmp_path, timer, Sleeps()))
    assert 0.05 <= timer.elapsed <= time.monotonic() - begun and trainer.total_batch_idx < 4


# ------------------------------------------------------------------ others


class CountsSafePoints(Callback):
    count = 0

    def on_safe_point(self, trainer: Trainer, event: events.SafePoint) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}


@pytest.mark.parametrize("first", [False, True])
def test_the_checkpoint_has_what_others_do_at_the_safe_point(tmp_path: Path, clock: Clock, first: bool) -> None:
    counts, timer = CountsSafePoints(), Timer(7)
    run(build(tmp_path, clock, *((timer, counts) if first else (counts, timer))))
    assert torch.load(tmp_path / KEPT, weights_only=True)["callbacks"]["CountsSafePoints"] == {"count": 7}


class Fails:
    def on_after_update(self, trainer: Trainer, event: events.AfterUpdate) -> None:
        raise RuntimeError("at the worst moment")


@pytest.mark.parametrize("fails", [False, True])
def test_it_is_connected_for_the_length_of_a_fit(tmp_path: Path, fails: bool) -> None:
    module, loader, _, callbacks, options = build(tmp_path, Timer(60), *([Fails()] if fails else []))()
    del options["val_check_interval"]
    trainer = Trainer(callbacks=callbacks, default_callbacks=False, device="cpu", **options)
    during: list[int] = []
    trainer.signals.train_batch_start.connect(lambda trainer, event: during.append(len(trainer.signals.safe_point.attached())))
    if fails:
        with pytest.raises(RuntimeError):
            trainer.fit(module, loader)
    else:
        trainer.fit(module, loader)
    assert set(during) == {1} and trainer.signals.safe_point.attached() == []


class Ranks(Callback, SingleProcess):
    """One of two processes, of which the other has no time left at the safe point of a batch."""

    world_size = 2

    def __init__(self, due_at: int | None = None) -> None:
        self.due_at = due_at
        self.asked, self.due = 0, False

    def on_safe_point(self, trainer: Trainer, event: events.SafePoint) -> None:
        self.due = trainer.total_batch_idx == self.due_at

    def any(self, flag: bool) -> bool:
        self.asked += 1
        return flag or self.due


def test_processes_end_where_any_has_no_time_left(tmp_path: Path, clock: Clock) -> None:
    def train(ranks: Ranks, *callbacks: Any) -> Trainer:
        module, loader, _, given, options = build(tmp_path, clock, ranks, *callbacks)()
        del options["val_check_interval"]
        trainer = Trainer(callbacks=given, default_callbacks=False, device="cpu", **options)
        trainer.processes = ranks
        trainer.fit(module, loader)
        return trainer

    without, ranks = Ranks(), Ranks()
    train(without)
    train(ranks, Timer(1000))
    assert ranks.asked - without.asked == 16, "before training, and at each batch"
    clock.counts["train"] = 0
    trainer = train(Ranks(due_at=6), Timer(1000))
    assert trainer.stop_request.reason is not None and (tmp_path / KEPT).exists() and clock.counts["train"] == 7


# ------------------------------------------------------------------ arguments

DURATIONS: list[tuple[Any, float]] = [
    (90, 90),
    (1.5, 1.5),
    (timedelta(minutes=2), 120),
    ({"hours": 1, "minutes": 30}, 5400),
    ("01:30:00", 5400),
    ("100:00:01", 360001),
    ("01:12:00:00", 129600),
    ("1-12:00:00", 129600),
]


@pytest.mark.parametrize(("given", "seconds"), DURATIONS)
def test_durations(given: Any, seconds: float) -> None:
    timer = Timer(given)
    assert timer.max_time == timer.remaining == seconds and timer.elapsed == 0
    assert Timer(10**6, margin=given).margin == seconds


WRONG: list[Any] = [
    "10",
    "1:2:3",
    "00:60:00",
    "-1:00:00",
    -1,
    float("nan"),
    float("inf"),
    True,
    None,
    {"hour": 1},
    {"days": 1e20},
]


@pytest.mark.parametrize("given", WRONG)
@pytest.mark.parametrize("argument", ["max_time", "margin"])
def test_what_cannot_be_right_is_refused(argument: str, given: Any) -> None:
    make: Callable[..., Timer] = Timer
    with pytest.raises(MisconfigurationError, match=rf"Timer\({argument}="):
        make(**{"max_time": 10, argument: given})


@pytest.mark.parametrize("margin", [10, 11])
def test_a_margin_leaves_some_time(margin: float) -> None:
    with pytest.raises(MisconfigurationError, match="leaves no time"):
        Timer(10, margin=margin)
