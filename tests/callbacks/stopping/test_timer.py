"""Timer: a run stops before a limit of wall-clock time, and a resumed run has the rest of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from eventtrain import Callback, MisconfigurationError, Trainer, events
from eventtrain.callbacks.stopping.timer import Timer
from tests.callbacks.stopping.common import INTERRUPTED, CountsSafePoints, TwoProcesses, train_as
from tests.callbacks.stopping.common import build as build_with_sanity_check
from tests.resuming import Build, assert_same_run, run

# Runs are resumed here without the timer that ended them.
pytestmark = pytest.mark.filterwarnings("ignore:The checkpoint holds state of .'Timer")


class Clock(Callback):
    """A clock that batches of training and of validation advance; counts them."""

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
    """The shared run, without a sanity check unless the options say otherwise."""
    return build_with_sanity_check(folder, *callbacks, **{"num_sanity_val_steps": 0, **options})


def assert_resumes(folder: Path, **options: Any) -> None:
    """Resume the run without a timer, and compare it with a run that never stopped."""
    resumed, straight = run(build(folder, **options), ckpt_path="last"), run(build(folder, **options))
    assert_same_run(resumed, straight, "resumed")


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("seconds", [1, 5, 7.5, 15, 15.5])
def test_a_run_stops_at_the_first_safe_point_past_the_limit(tmp_path: Path, clock: Clock, seconds: float, first: bool) -> None:
    timer = Timer(seconds)
    trainer = run(build(tmp_path, *((timer, clock) if first else (clock, timer))))
    assert clock.counts["train"] == min(15, -(-seconds // 1))
    reason = trainer.stop_reason
    if seconds > 15:
        assert reason is None and not (tmp_path / INTERRUPTED).exists()
        assert (timer.elapsed, timer.remaining) == (15, 0.5)
    else:
        assert reason is not None and reason.startswith("Timer: 0:00:")
        assert timer.remaining == 0
        assert_resumes(tmp_path)


def test_the_reason_says_how_long_the_run_took(tmp_path: Path, clock: Clock) -> None:
    clock.seconds["train"] = 1800.0
    trainer = run(build(tmp_path, clock, Timer("01:00:00", margin=60)))
    assert trainer.stop_reason == "Timer: 1:00:00 of 1:00:00 are over"


def test_a_margin_ends_a_run_sooner(tmp_path: Path, clock: Clock) -> None:
    run(build(tmp_path, clock, Timer(10, margin={"seconds": 3})))
    assert clock.counts["train"] == 7


def test_no_minimum_holds_the_end_off(tmp_path: Path, clock: Clock) -> None:
    run(build(tmp_path, clock, Timer(2), min_epochs=3, min_steps=6))
    assert clock.counts["train"] == 2


@pytest.mark.parametrize(("seconds", "batches"), [(3, 0), (4, 1)])
def test_a_validation_is_left_and_repeated_by_the_resumed_run(
    tmp_path: Path, clock: Clock, seconds: float, batches: int
) -> None:
    """The limit passes in the third batch of training, or in the first batch of the validation that follows it."""
    clock.seconds["validation"] = 10.0
    trainer = run(build(tmp_path, clock, Timer(seconds)))
    assert clock.counts == {"train": 3, "validation": batches}
    assert trainer.progress.validations == 0 and trainer.should_stop
    again = Clock()
    resumed = run(build(tmp_path, again), ckpt_path="last")
    assert again.counts == {"train": 12, "validation": 6} and resumed.progress.validations == 3
    assert_resumes(tmp_path)


@pytest.mark.parametrize("interval", [3, 5], ids=["in the epoch", "at its end"])
def test_a_validation_that_is_left_twice_is_repeated_twice(tmp_path: Path, clock: Clock, interval: int) -> None:
    clock.seconds["validation"] = 10.0
    for ckpt_path, validated in ((None, 1), ("last", 2)):
        timer = Timer(interval + 1, per_job=True)
        trainer = run(build(tmp_path, clock, timer, val_check_interval=interval), ckpt_path=ckpt_path)
        assert clock.counts == {"train": interval, "validation": validated}
        assert trainer.progress.validations == 0 and trainer.should_stop
    assert_resumes(tmp_path, val_check_interval=interval)


def test_a_sanity_check_is_left_too(tmp_path: Path, clock: Clock) -> None:
    clock.seconds["validation"] = 10.0
    trainer = run(build(tmp_path, clock, Timer(5), num_sanity_val_steps=2))
    assert clock.counts == {"train": 0, "validation": 1}
    assert trainer.stop_reason is not None and not (tmp_path / INTERRUPTED).exists()


def test_a_separate_validation_is_not_left(tmp_path: Path, clock: Clock) -> None:
    timer = Timer(2)
    trainer = run(build(tmp_path, clock, timer))
    clock.seconds["validation"] = 10.0
    trainer.validate(dataloaders=[torch.ones(4, 3)] * 3)
    assert clock.counts["validation"] == 3 and timer.elapsed == 2, "the clock stands between fits"


# ------------------------------------------------------------------ the clock of a resumed run


def test_a_resumed_run_continues_the_clock(tmp_path: Path, clock: Clock) -> None:
    run(build(tmp_path, clock, Timer(4)))
    clock.now += 1000  # nothing runs
    timer = Timer(9)
    run(build(tmp_path, clock, timer), ckpt_path="last")
    assert clock.counts["train"] == 9 and timer.elapsed == 9


def test_a_run_that_is_resumed_without_time_left_trains_nothing(tmp_path: Path, clock: Clock) -> None:
    run(build(tmp_path, clock, Timer(4)))
    written = os.stat(tmp_path / INTERRUPTED).st_mtime_ns
    trainer = run(build(tmp_path, clock, Timer(4)), ckpt_path="last")
    assert clock.counts["train"] == 4 and trainer.stop_reason is not None
    assert os.stat(tmp_path / INTERRUPTED).st_mtime_ns == written
    assert_resumes(tmp_path)


def test_with_per_job_each_fit_has_the_whole_limit(tmp_path: Path, clock: Clock) -> None:
    for done in (4, 8, 12, 15):
        run(build(tmp_path, clock, Timer(4, per_job=True)), ckpt_path="last")
        assert clock.counts["train"] == done


def test_a_run_and_its_jobs_have_limits_together(tmp_path: Path, clock: Clock) -> None:
    for done in (4, 8, 10, 10):
        run(build(tmp_path, Timer(4, per_job=True), Timer(10), clock), ckpt_path="last")
        assert clock.counts["train"] == done


def test_the_clock_of_a_second_fit_starts_at_zero(tmp_path: Path, clock: Clock) -> None:
    timer = Timer(4)
    run(build(tmp_path, clock, timer))
    run(build(tmp_path, clock, timer))
    assert clock.counts["train"] == 8


def test_another_policy_is_one_method(tmp_path: Path, clock: Clock) -> None:
    class AtTheSecondUpdate(Timer):
        def is_due(self, trainer: Trainer) -> bool:
            return trainer.global_step == 2

    run(build(tmp_path, clock, AtTheSecondUpdate(1)))
    assert clock.counts["train"] == 4, "two windows of two"


def test_the_clock_is_the_real_one(tmp_path: Path) -> None:
    timer = Timer(0.05)
    begun = time.monotonic()

    class Sleeps:
        def on_train_batch_start(self, trainer: Trainer, event: events.TrainBatchStart) -> None:
            time.sleep(0.02)

    trainer = run(build(tmp_path, timer, Sleeps()))
    assert 0.05 <= timer.elapsed <= time.monotonic() - begun and trainer.total_batch_idx < 4


# ------------------------------------------------------------------ other callbacks and processes


@pytest.mark.parametrize("first", [False, True])
def test_the_checkpoint_holds_what_other_callbacks_change_at_the_safe_point(tmp_path: Path, clock: Clock, first: bool) -> None:
    counts, timer = CountsSafePoints(), Timer(7)
    run(build(tmp_path, clock, *((timer, counts) if first else (counts, timer))))
    assert torch.load(tmp_path / INTERRUPTED, weights_only=True)["callbacks"]["CountsSafePoints"] == {"count": 7}


class Fails:
    def on_after_update(self, trainer: Trainer, event: events.AfterUpdate) -> None:
        raise RuntimeError("at the worst moment")


@pytest.mark.parametrize("fails", [False, True])
def test_its_connections_stay_the_same_during_and_after_a_fit(tmp_path: Path, fails: bool) -> None:
    timer = Timer(60)
    module, loader, validation, callbacks, options = build(tmp_path, timer, *([Fails()] if fails else []))()
    trainer = Trainer(callbacks=callbacks, default_callbacks=False, device="cpu", **options)

    def connections() -> dict[str, list[Any]]:
        return {signal.name: signal.attached() for signal in trainer.signals}

    during: list[dict[str, list[Any]]] = []
    trainer.signals.train_batch_start.connect(lambda trainer, event: during.append(connections()))
    before = connections()
    assert before["request_stop"] == [timer.on_request_stop] and before["safe_point"] == []
    if fails:
        with pytest.raises(RuntimeError):
            trainer.fit(module, loader, validation)
    else:
        trainer.fit(module, loader, validation)
    assert during and all(
        [listener for listener in connected[name] if listener in before[name]] == before[name]
        for connected in during
        for name in before
    )
    assert all(timer.on_request_stop in connected["request_stop"] for connected in during)
    assert connections() == before


def test_processes_exchange_nothing_more_per_batch(tmp_path: Path, clock: Clock) -> None:
    without, processes = TwoProcesses(), TwoProcesses()
    train_as(without, tmp_path, clock)
    train_as(processes, tmp_path, clock, Timer(1000))
    assert processes.exchanges - without.exchanges == 1, "before training"


def test_all_processes_end_if_one_has_no_time_left(tmp_path: Path, clock: Clock) -> None:
    processes = TwoProcesses()

    class OtherIsDue(Callback):
        def on_safe_point(self, trainer: Trainer, event: events.SafePoint) -> None:
            if trainer.total_batch_idx == 6:
                processes.request.interruption = "no time left"

    trainer = train_as(processes, tmp_path, clock, OtherIsDue(), Timer(1000))
    assert trainer.stop_reason == "another process asked for it"
    assert (tmp_path / INTERRUPTED).exists() and clock.counts["train"] == 8, "one batch later"


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


@pytest.mark.parametrize(("duration", "seconds"), DURATIONS)
def test_every_form_of_a_duration_is_read(duration: Any, seconds: float) -> None:
    timer = Timer(duration)
    assert timer.max_time == timer.remaining == seconds and timer.elapsed == 0
    assert Timer(10**6, margin=duration).margin == seconds


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


@pytest.mark.parametrize("duration", WRONG)
@pytest.mark.parametrize("argument", ["max_time", "margin"])
def test_other_durations_are_refused(argument: str, duration: Any) -> None:
    make: Callable[..., Timer] = Timer
    with pytest.raises(MisconfigurationError, match=rf"Timer\({argument}="):
        make(**{"max_time": 10, argument: duration})


@pytest.mark.parametrize("margin", [10, 11])
def test_a_margin_that_leaves_no_time_is_refused(margin: float) -> None:
    with pytest.raises(MisconfigurationError, match="leaves no time"):
        Timer(10, margin=margin)
