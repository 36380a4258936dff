"""Logged values and their options that are refused, each beside the nearest form that trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import CatMetric, MeanMetric, MetricCollection

from tests.kit import ModuleOf, NoLength
from tests.misconfigurations import Case, Log, check_refusal, check_remedy, fit, hooked


class Averages(Log):
    """Logs a mean over the epoch, whatever the batches are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(value=1.0, on_step=False, on_epoch=True, **options)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("value", **self.options)
        return self.w.sum()


class Spread(CatMetric):
    """A metric of two values by name."""

    def compute(self) -> Any:
        values: Any = super().compute()
        return {"low": values.min(), "high": values.max()}


class Pair(CatMetric):
    """A metric of two values without names."""

    def compute(self) -> Any:
        values: Any = super().compute()
        return tuple(values[:2])


class Nothing(CatMetric):
    """A metric that computes nothing."""

    def compute(self) -> Any:
        return None


class Metered(ModuleOf):
    """Updates a metric, or calls it, and logs it by ``self.log`` or ``self.log_dict``, on the epoch."""

    def __init__(self, metric: Any, *, log: str, forward: bool = False) -> None:
        super().__init__()
        self.metric = metric
        self.by = log
        self.calls_forward = forward

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        (self.metric if self.calls_forward else self.metric.update)(batch.repeat(2))
        arguments = ("value", self.metric) if self.by == "log" else (self.metric,)
        getattr(self, self.by)(*arguments, on_step=False, on_epoch=True)
        return self.loss(batch)


pytestmark = pytest.mark.usefixtures("in_tmp_path")


CASES: dict[str, Case] = {
    **{
        f"logging {case}": Case(
            lambda value=value: fit(Log(value=value)),  # type: ignore[misc]
            (r"self\.log\('value'", named, "Log a|log_dict"),
            lambda: fit(Log(value=1.0)),
        )
        for case, value, named in (
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
        lambda: hooked(on_fit_start=lambda self: self.log("value", 1.0)),
        (r"self\.log\('value'", "no step and no epoch", "on_train_start"),
        lambda: hooked(on_train_start=lambda self: self.log("value", 1.0)),
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
    **{
        f"a batch of unknown size: {case}": Case(
            lambda batch=batch: fit(Averages(), data=NoLength([batch])),  # type: ignore[misc]
            (kind, "samples is unknown", r"self\.log\('value', \.\.\., batch_size="),
            lambda batch=batch: fit(Averages(batch_size=1), data=NoLength([batch])),  # type: ignore[misc]
        )
        for case, kind, batch in (
            ("a dict of nothing", "dict", {}),
            ("an object", "object", object()),
            ("an iterator", "list_iterator", iter([1.0])),
            ("a mapping of nothing", "dict", {"x": None}),
            ("a tuple of objects", "tuple", (None, object())),
        )
    },
    **{
        f"a batch size that is {case}": Case(
            lambda size=size: fit(Averages(batch_size=size)),  # type: ignore[misc]
            (r"self\.log\('value'", "batch_size=", r"len\(batch\)"),
            lambda: fit(Averages(batch_size=4)),
        )
        for case, size in (("negative", -1), ("a string", "4"), ("a shape", (4, 3)), ("a vector", torch.ones(2)))
    },
    **{
        f"logging {case} of several values": Case(
            lambda metric=metric, forward=forward: fit(Metered(metric(), log="log", forward=forward)),  # type: ignore[misc]
            (r"self\.log\('value'", kind, r"self\.log_dict"),
            lambda: fit(Metered(MeanMetric(), log="log")),
        )
        for case, metric, kind, forward in (
            ("a metric object", Spread, r"Spread\.compute gives a dict", False),
            ("a metric object that is called", Spread, r"Spread\.compute gives a dict", True),
            ("a metric object of a vector", CatMetric, r"CatMetric\.compute gives a tensor of shape \(8,\)", False),
            ("a metric object of a tuple", Pair, r"Pair\.compute gives a tuple", False),
            ("a metric object of None", Nothing, r"Nothing\.compute gives a NoneType", False),
            ("a collection", lambda: MetricCollection([MeanMetric()]), r"mapping \(MetricCollection\)", False),
        )
    },
    **{
        f"log_dict of {case}": Case(
            lambda metric=metric: fit(Metered(metric(), log="log_dict")),  # type: ignore[misc]
            (r"self\.log_dict", kind, r"self\.log\(name, metric\)"),
            lambda: fit(Metered(Spread(), log="log_dict")),
        )
        for case, metric, kind in (
            ("a metric object of one value", MeanMetric, r"MeanMetric\.compute gives a tensor of shape \(\)"),
            ("a metric object of a vector", CatMetric, r"CatMetric\.compute gives a tensor of shape \(8,\)"),
            ("a metric object of a tuple", Pair, r"Pair\.compute gives a tuple"),
        )
    },
    "logging on the step before the first one": Case(
        lambda: hooked(on_train_start=lambda self: self.log("value", 1.0, on_step=True)),
        (r"self\.log\('value'", "no step", "Leave on_step out"),
        lambda: hooked(on_train_start=lambda self: self.log("value", 1.0)),
    ),
    "logging after the last epoch": Case(
        lambda: hooked(on_train_end=lambda self: self.log("value", 1.0)),
        (r"self\.log\('value'", "no step and no epoch", "on_train_epoch_end"),
        lambda: hooked(on_train_epoch_end=lambda self: self.log("value", 1.0)),
    ),
    "reducing over a group of processes": Case(
        lambda: fit(Log(value=1.0, sync_dist_group=object())),
        (r"self\.log\('value'", "sync_dist_group", r"torch\.distributed"),
        lambda: fit(Log(value=1.0, sync_dist_group=None)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_refusal_names_the_mistake_and_the_remedy(case: str) -> None:
    check_refusal(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_correct_form_trains(case: str) -> None:
    check_remedy(CASES[case])
