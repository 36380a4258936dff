"""The profiler observes whole windows: the first ones, then some at random distances."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from eventtrain import Callback, Trainer
from eventtrain.callbacks import GradientAccumulation, Profiler
from eventtrain.callbacks.profiling.sampling import Sampling
from eventtrain.callbacks.profiling.spans import Label
from tests.callbacks.profiling.clocked import Clock, Loader, Model, fitted, means, observed_signals, profiled
from tests.kit import new_trainer


def test_the_first_windows_are_observed_and_then_some() -> None:
    clock = Clock()
    profiler = profiled(clock, first=5, every=10)
    observed: list[int] = []

    class Watch(Callback):
        def on_after_update(self, trainer: Trainer, event: Any) -> None:
            if trainer.signals.after_update._observers:
                observed.append(event.global_step - 1)

    fitted(profiler, Model(clock), Loader(clock, 800), Watch(), GradientAccumulation(2))
    assert observed[:5] == [0, 1, 2, 3, 4]
    distances = [after - before for before, after in pairwise(observed[4:])]
    assert set(distances) <= set(range(1, 20)) and len(set(distances)) > 10, "at random"
    assert 7 < sum(distances) / len(distances) < 13
    # Whole windows are observed, and each represents the windows since the last.
    steps = profiler.times.steps
    assert steps.observed == 2 * len(observed)
    assert steps.units == 2 * (observed[-1] + 1)


@pytest.mark.parametrize("every", [5, 10, 20])
@pytest.mark.parametrize("period", [2, 3, 5, 10, 20, 40])
def test_a_periodic_cost_has_the_right_mean(period: int, every: int) -> None:
    """One unit in each period takes long. The sampled units, by weight, have the mean of all."""
    sampling, at, units, total = Sampling(1, every), 0, 0, 0.0
    for _ in range(50_000):
        distance = sampling.draw()
        at += distance
        units += distance
        total += distance * period * (at % period == 0)
    assert total / units == pytest.approx(1.0, rel=0.1)


def test_slow_first_batches_weigh_as_many_as_they_are() -> None:
    clock = Clock()
    profiler = profiled(clock, every=10)
    fitted(profiler, Model(clock), Loader(clock, 500, lambda index: 100.0 if index < 20 else 1.0))
    assert profiler.times.steps.observed < 120
    assert profiler.times.steps.mean(Label("phase", "fetch")) == pytest.approx((20 * 100 + 480) / 500, rel=0.03)


def test_no_clock_is_read_in_a_batch_that_is_not_observed() -> None:
    def reads(batches: int) -> int:
        clock = Clock()
        profiler = profiled(clock, first=1, every=10**6)
        fitted(profiler, Model(clock), Loader(clock, batches), GradientAccumulation(4))
        assert profiler.times.steps.observed in (4, 5)
        return clock.reads

    assert reads(40) == reads(160)


def test_the_time_between_two_epochs_is_always_observed() -> None:
    clock = Clock()

    class Plots(Callback):
        def on_train_epoch_end(self, trainer: Trainer, event: Any) -> None:
            clock.spend(64)

    profiler = profiled(clock, first=1, every=10**6)
    fitted(profiler, Model(clock), Loader(clock, 9), Plots(), max_epochs=7)
    row = profiler.times.turns.rows[Label("callback", "Plots.on_train_epoch_end")]
    assert (row.count, row.total) == (7, 7 * 64)
    assert means(profiler.times.steps) == {}
    assert "The slowest callback is Plots.on_train_epoch_end: 100 % of the time between two epochs" in profiler.summary()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["safe_point", "request_stop", "take_checkpoint"])
def test_an_observed_window_begins_with_its_first_batch(name: str, before: bool) -> None:
    """The safe point before it is not part of it, in either order of attachment. The safe point at its end is."""
    clock = Clock()

    def save(self: Any, trainer: Trainer, event: Any) -> None:
        clock.spend(1)

    saves = type("Saves", (Callback,), {f"on_{name}": save})()
    profiler = profiled(clock, first=1, every=5)
    trainer = new_trainer(*([saves, profiler] if before else [profiler, saves]))
    trainer.fit(Model(clock), Loader(clock, 100))
    rows = {label: row for label, row in profiler.times.steps.rows.items() if row.total}
    assert [label.name for label in rows] == ["Saves.save"]
    (row,) = rows.values()
    assert row.mean == 1


@pytest.mark.parametrize("remainder", ["step", "drop", "carry"])
@pytest.mark.parametrize(("batches", "window"), [(1, 1), (1, 4), (5, 2), (7, 3), (8, 4), (3, 8)])
def test_windows_of_any_length_are_sampled_whole(batches: int, window: int, remainder: Any) -> None:
    if remainder == "drop" and batches < window:
        return  # the run fails if an epoch has no update
    clock = Clock()
    profiler = profiled(clock, first=2, every=3)
    trainer = new_trainer(profiler, GradientAccumulation(window, remainder=remainder), max_epochs=5)
    short = batches < window and remainder != "carry"
    loader = Loader(clock, batches, 1)
    if short:
        with pytest.warns(UserWarning, match="batches"):
            trainer.fit(Model(clock), loader)
    else:
        trainer.fit(Model(clock), loader)
    assert 0 < profiler.times.steps.observed <= 5 * batches
    assert profiler.times.steps.units <= 5 * batches
    assert means(profiler.times.steps) == {"fetch": 1}
    assert profiler.times.turns.units == 6  # before each epoch and after the last


def test_a_run_that_ends_within_an_epoch_counts_all_its_batches() -> None:
    clock = Clock()
    profiler = profiled(clock)
    trainer = fitted(profiler, Model(clock, forward=1), Loader(clock, 100, 2), max_steps=7, max_epochs=None)
    assert profiler.times.steps.units == 7
    assert means(profiler.times.steps) == {"forward": 1, "fetch": 2}
    assert observed_signals(trainer) == []


def test_a_muted_safe_point_stops_the_sampling_for_one_run() -> None:
    clock = Clock()
    profiler = profiled(clock, first=3, every=2)
    trainer = new_trainer(profiler, max_epochs=2)
    with trainer.signals.safe_point.muted():
        trainer.fit(Model(clock, forward=1), Loader(clock, 10))
    assert means(profiler.times.steps) == {"forward": 1}
    assert observed_signals(trainer) == []
    trainer.fit(Model(clock, forward=1), Loader(clock, 10))
    assert profiler.times.steps.observed > 3


def test_a_trace_sees_the_same_events_with_and_without_the_profiler() -> None:
    def names(*callbacks: Any) -> list[str]:
        trainer = new_trainer(*callbacks, max_epochs=2)
        with trainer.signals.trace() as trace:
            trainer.fit(Model(Clock()), Loader(Clock(), 30), Loader(Clock(), 2))
        assert observed_signals(trainer) == []
        return [name for name in trace.names() if name != "metrics_logged"]

    # The profiler logs, which publishes metrics_logged.
    assert names(Profiler(print_summary=False, first=2, every=3)) == names()


def test_the_time_of_a_trainer_within_a_callback_is_the_callbacks() -> None:
    clock = Clock()

    class Nested(Callback):
        def on_train_batch_end(self, trainer: Trainer, event: Any) -> None:
            inner = new_trainer(profiled(clock))
            inner.fit(Model(clock, forward=16), Loader(clock, 2, 32))

    profiler = profiled(clock)
    fitted(profiler, Model(clock, forward=1), Loader(clock, 4), Nested())
    assert means(profiler.times.steps)["forward"] == 1
    row = profiler.times.steps.rows[Label("callback", "Nested.on_train_batch_end")]
    assert row.mean == 2 * (16 + 32)


def test_distances_are_the_same_in_each_run_and_have_their_mean() -> None:
    first, second = Sampling(3, 10), Sampling(3, 10)
    drawn = [first.draw() for _ in range(5000)]
    assert drawn == [second.draw() for _ in range(5000)]
    assert drawn[:2] == [1, 1]
    assert 9.5 < sum(drawn[2:]) / len(drawn[2:]) < 10.5
    assert {Sampling(1, 1).draw() for _ in range(10)} == {1}
