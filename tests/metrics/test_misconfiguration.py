"""Logged values and their options that are refused, each beside the nearest form that trains."""

from __future__ import annotations

import pytest
import torch

from tests.misconfigurations import Case, Log, check_refusal, check_remedy, fit, hooked

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
}


@pytest.mark.parametrize("case", CASES)
def test_the_refusal_names_the_mistake_and_the_remedy(case: str) -> None:
    check_refusal(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_correct_form_trains(case: str) -> None:
    check_remedy(CASES[case])
