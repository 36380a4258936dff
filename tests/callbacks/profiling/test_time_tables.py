"""The tables, sentences and scalars of the profiler, and the statistics behind them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventtrain import Callback, Trainer
from eventtrain.callbacks import GradientAccumulation, Profiler, TensorBoardLogger
from eventtrain.callbacks.profiling.spans import MOST_LABELS, Label
from eventtrain.callbacks.profiling.time_tables import QUANTILE_ERROR, Distribution, RunTimes, duration
from tests.callbacks.profiling.clocked import Clock, Loader, Model, fitted, means, profiled
from tests.kit import new_trainer

# ------------------------------------------------------------------ the summary and the scalars


def test_the_table_is_printed_when_the_run_is_over(capsys: Any) -> None:
    clock = Clock()
    profiler = Profiler(clock=clock)
    trainer = fitted(profiler, Model(clock, forward=1), Loader(clock, 4))
    assert capsys.readouterr().out == profiler.summary() + "\n"
    profiler.print_summary = False
    trainer.fit(Model(clock), Loader(clock, 4))
    assert capsys.readouterr().out == ""


def test_a_failed_run_prints_no_table_and_has_a_summary(capsys: Any) -> None:
    clock = Clock()

    class Fails(Callback):
        def on_safe_point(self, trainer: Trainer, event: Any) -> None:
            if trainer.batch_idx == 2:
                raise ValueError("enough")

    profiler = Profiler(clock=clock)
    with pytest.raises(ValueError, match="enough"):
        fitted(profiler, Model(clock, forward=1), Loader(clock, 4), Fails())
    assert capsys.readouterr().out == ""
    assert "forward" in profiler.summary()


def test_there_is_a_summary_at_any_time() -> None:
    clock = Clock()
    profiler = profiled(clock)
    assert profiler.summary() == "Profiler: nothing has been measured yet."
    texts: list[str] = []

    class Asks(Callback):
        def on_safe_point(self, trainer: Trainer, event: Any) -> None:
            texts.append(profiler.summary())

    fitted(profiler, Model(clock, forward=1), Loader(clock, 3), Asks())
    assert texts[0] == "Profiler: nothing has been measured yet."
    assert "1 batches were observed" in texts[1]


class Monitored(Callback):
    """Collects the values that monitors log."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def on_metrics_logged(self, trainer: Trainer, event: Any) -> None:
        if event.scope == "monitor":
            self.logged.append({"step": event.step, **event.metrics})


def test_scalars_are_the_means_since_the_last_time() -> None:
    clock = Clock()

    class Busy(Callback):
        def on_after_update(self, trainer: Trainer, event: Any) -> None:
            clock.spend(0.004 * (1 + trainer.current_epoch))

    monitored = Monitored()
    profiler = profiled(clock)
    model = Model(clock, forward=0.002, validation=0.25)
    fitted(profiler, model, Loader(clock, 4, 0.002), Busy(), monitored, val=Loader(clock, 2), max_epochs=2)
    assert [logged["step"] for logged in monitored.logged] == [4, 8]
    first, second = monitored.logged
    assert first["time/forward_ms"] == pytest.approx(2.0)
    assert first["time/callback/Busy.on_after_update_ms"] == pytest.approx(4.0)
    assert second["time/callback/Busy.on_after_update_ms"] == pytest.approx(8.0)
    assert (first["time/step_ms"], second["time/step_ms"]) == (pytest.approx(8.0), pytest.approx(12.0))
    assert (first["time/data_wait"], second["time/data_wait"]) == (pytest.approx(2 / 8), pytest.approx(2 / 12))
    assert first["time/validation_ms"] == pytest.approx(500.0)
    assert "time/checkpoint_ms" not in first
    assert not any(name.startswith("time/callback/Profiler") and value for name, value in first.items())


def test_scalars_are_also_logged_every_n_steps() -> None:
    clock = Clock()
    monitored = Monitored()
    fitted(profiled(clock, log_every_n_steps=4), Model(clock, forward=1), Loader(clock, 16), GradientAccumulation(2), monitored)
    assert [logged["step"] for logged in monitored.logged] == [4, 8]
    again = Monitored()
    fitted(profiled(clock, log_every_n_steps=None), Model(clock, forward=1), Loader(clock, 16), again)
    assert [logged["step"] for logged in again.logged] == [16]


def test_the_logging_of_the_scalars_is_not_observed() -> None:
    """A logger's work for the scalars of the profiler is not part of the run."""
    clock = Clock()

    class Logger(Callback):
        def on_metrics_logged(self, trainer: Trainer, event: Any) -> None:
            if event.scope == "monitor":
                clock.spend(1000)

    profiler = profiled(clock, log_every_n_steps=1)
    fitted(profiler, Model(clock, forward=1), Loader(clock, 10), Logger(), max_epochs=2)
    assert means(profiler.times.steps) == {"forward": 1}
    assert means(profiler.times.turns) == {}


def test_scalars_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    def odd(trainer: Trainer, event: Any) -> None: ...

    logger = TensorBoardLogger(tmp_path)
    profiler = Profiler(print_summary=False)
    trainer = new_trainer(profiler, logger, max_epochs=2)
    trainer.signals.after_update.connect(odd)  # its name contains <locals>
    trainer.fit(Model(Clock()), Loader(Clock(), 4))
    events = EventAccumulator(str(logger.run_dir)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"time/forward_ms", "time/step_ms", "time/data_wait"} <= tags
    assert any("odd" in tag for tag in tags)
    assert [event.step for event in events.Scalars("time/forward_ms")] == [4, 8]


def test_a_fast_dev_run_is_measured(capsys: Any) -> None:
    trainer = new_trainer(Profiler(), fast_dev_run=True)
    trainer.fit(Model(Clock()), Loader(Clock(), 4), Loader(Clock(), 2))
    assert "1 batches were observed" in capsys.readouterr().out


# ------------------------------------------------------------------ statistics in bounded memory


def test_the_tables_do_not_grow_with_the_run() -> None:
    clock = Clock()

    class Passing(Callback):
        """Connects a new listener in each batch, each with another name."""

        def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
            def listener(trainer: Trainer, event: Any) -> None:
                clock.spend(1)
                trainer.signals.after_update.disconnect(listener)

            listener.described = f"listener {trainer.batch_idx}"  # type: ignore[attr-defined]
            trainer.signals.after_update.connect(listener)

    profiler = profiled(clock, first=1000)
    fitted(profiler, Model(clock, forward=3), Loader(clock, 500, lambda index: 1.0 + index), Passing())
    steps = profiler.times.steps
    assert steps.observed == 500
    assert len(steps.rows) <= MOST_LABELS + 1
    assert sum(row.total for label, row in steps.rows.items() if label.kind == "callback") == 500
    assert len(steps.rows[Label("phase", "fetch")]._buckets) <= 8 * math.log2(501) + 2


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(1e-8, 1e5), st.integers(1, 20)), min_size=1), st.sampled_from([0.05, 0.5, 0.95, 1.0]))
def test_quantiles_are_exact_to_their_error(values: list[tuple[float, int]], fraction: float) -> None:
    distribution = Distribution()
    for value, weight in values:
        distribution.add(value, weight)
    ordered = sorted(value for value, weight in values for _ in range(weight))
    exact = ordered[max(math.ceil(fraction * len(ordered)) - 1, 0)]
    assert distribution.quantile(fraction) == pytest.approx(exact, rel=QUANTILE_ERROR + 1e-9)
    assert distribution.count == len(ordered)
    assert distribution.mean == pytest.approx(sum(ordered) / len(ordered))


def test_quantiles_at_the_ends_of_the_scale() -> None:
    distribution = Distribution()
    assert (distribution.mean, distribution.quantile(0.5)) == (0.0, 0.0)
    distribution.add(0.0)
    assert distribution.quantile(0.5) == 0.0
    distribution.add(1e300)
    assert distribution.quantile(1.0) >= 2**20
    assert len(distribution._buckets) == 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 us"), (1e-7, "0.1 us"), (9.996e-4, "1 ms"), (0.0123, "12.3 ms"), (1.0, "1 s"), (754.3, "754 s")],
)
def test_times_have_three_digits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_without_measurements_there_is_a_summary_and_no_scalar() -> None:
    assert RunTimes().summary() == "Profiler: nothing has been measured yet."
    assert RunTimes().fresh_scalars() == {}
