"""One logged metric that is watched for new values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from eventtrain import Callback, MisconfigurationError, Trainer
from eventtrain.callbacks.watched_metric import WatchedMetric
from eventtrain.events import MetricsLogged
from tests.kit import Line, On, new_trainer, rows

BATCHES = rows(3)


def watched(name: str = "val_loss") -> WatchedMetric:
    return WatchedMetric(name, f"Watcher(monitor={name!r})")


class Announce(Callback):
    """Takes note of each new value.

    Attributes:
        looks: The scope of each `metrics_logged`, and whether there was a new value.
        values: The new values.
    """

    def __init__(self, name: str) -> None:
        self.metric = watched(name)
        self.looks: list[tuple[str, bool]] = []
        self.values: list[float] = []

    def on_metrics_logged(self, trainer: Trainer, event: MetricsLogged) -> None:
        expected = self.metric.has_new_value(trainer)
        is_new = self.metric.look(trainer)
        assert is_new is expected
        self.looks.append((event.scope, is_new))
        if is_new:
            self.values.append(float(self.metric.value(trainer)))


def test_a_look_finds_each_new_value_once() -> None:
    announce = Announce("val_loss")
    trainer = new_trainer(announce, max_epochs=2)
    trainer.fit(Line(lr=0.01), BATCHES, BATCHES[:1])
    # In each epoch three steps, the validation, which logs the metric, and the epoch of training.
    assert announce.looks == [*[("step", False)] * 3, ("epoch", True), ("epoch", False)] * 2
    assert len(set(announce.values)) == 2
    assert announce.metric.seen == trainer.times_logged("val_loss") == 2


def test_a_metric_that_is_logged_on_each_step_is_new_on_each_step() -> None:
    announce = Announce("loss")
    new_trainer(announce).fit(Line(on_step=True), BATCHES)
    assert announce.looks == [*[("step", True)] * 3, ("epoch", False)]


def test_the_same_value_twice_is_new_twice() -> None:
    announce = Announce("loss")
    new_trainer(announce, max_epochs=2).fit(Line(lr=0.0, on_step=False, on_epoch=True), BATCHES[:1])
    assert [is_new for scope, is_new in announce.looks if scope == "epoch"] == [True, True]
    assert announce.values[0] == announce.values[1]


def test_another_metric_is_not_new() -> None:
    announce = Announce("accuracy")
    trainer = new_trainer(announce)
    trainer.fit(Line(on_step=True), BATCHES)
    assert announce.values == []
    with pytest.raises(KeyError, match="accuracy"):
        announce.metric.value(trainer)


def test_a_value_stays_new_until_a_look() -> None:
    metric = watched("loss")
    trainer = new_trainer()
    trainer.fit(Line(on_step=True), BATCHES[:1])
    assert metric.has_new_value(trainer) and metric.has_new_value(trainer)
    assert metric.look(trainer)
    assert not metric.has_new_value(trainer)


# ------------------------------------------------------------------ a metric that is never logged


def missing_at(event: str, metric: WatchedMetric, *, val: Any = None) -> list[bool]:
    """Return whether the metric was missing, at each event of a fit of two epochs."""
    answers: list[bool] = []
    look: Callable[[Any, Any], None] = lambda trainer, _: answers.append(metric.is_missing(trainer))  # noqa: E731
    new_trainer(On(**{event: look}), max_epochs=2).fit(Line(), BATCHES[:1], val)
    return answers


def test_a_metric_may_still_come_until_the_first_validation_is_over() -> None:
    assert missing_at("train_batch_end", watched("accuracy"), val=BATCHES[:1]) == [False, True]
    assert missing_at("train_batch_end", watched("val_loss"), val=BATCHES[:1]) == [False, False]


def test_without_a_validation_a_metric_that_was_not_logged_is_missing() -> None:
    assert missing_at("train_epoch_end", watched()) == [True, True]


def report(metric: WatchedMetric, **options: Any) -> None:
    trainer = new_trainer()
    trainer.fit(Line(on_step=True), BATCHES[:1])
    metric.report_missing(trainer, **options)


def test_a_missing_metric_is_reported_with_the_known_ones() -> None:
    with pytest.warns(UserWarning, match="losses") as caught:
        report(watched("losses"), strict=False, remedy="Or leave it.")
    assert str(caught[0].message) == (
        "Watcher(monitor='losses'): no metric 'losses' was logged; there are ['loss']. Did you mean 'loss'? Or leave it."
    )


def test_without_a_similar_name_the_report_says_how_to_log_it() -> None:
    with pytest.warns(UserWarning, match=r"Log it with self\.log\('accuracy', \.\.\.\), or monitor one of those\.$"):
        report(watched("accuracy"), strict=False)


def test_a_missing_metric_is_one_warning() -> None:
    metric = watched("accuracy")
    with pytest.warns(UserWarning, match="accuracy"):
        report(metric, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report(metric, strict=False)


def test_a_strict_report_is_an_error_each_time() -> None:
    metric = watched("accuracy")
    for _ in range(2):
        with pytest.raises(MisconfigurationError, match=r"Watcher\(monitor='accuracy'\): no metric 'accuracy' was logged"):
            report(metric, strict=True)
