"""The checks of numbers and options that constructors share."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from eventtrain import MisconfigurationError
from eventtrain.checks import check_number, check_option, check_whole_number


def refused(check: Any, value: Any, *args: Any, **bounds: Any) -> str:
    """Return the message with which a check refuses a value, after its first part, which names owner, argument and value."""
    with pytest.raises(MisconfigurationError) as caught:
        check(value, "Owner", "argument", *args, **bounds)
    head = f"Owner(argument={value!r}): "
    assert str(caught.value).startswith(head)
    return str(caught.value).removeprefix(head)


@pytest.mark.parametrize(("value", "least"), [(0, 0), (1, 1), (7, 1), (-1, -1), (10**20, 0)])
def test_a_whole_number_from_the_least_on_is_returned(value: int, least: int) -> None:
    assert check_whole_number(value, "Owner", "argument", least=least) is value


@pytest.mark.parametrize("value", [-1, True, False, 1.0, "1", None, math.nan])
def test_anything_else_is_no_whole_number(value: Any) -> None:
    assert refused(check_whole_number, value) == "give a whole number from 0."


def test_a_whole_number_below_the_least_is_refused_with_the_least() -> None:
    assert refused(check_whole_number, 1, least=2) == "give a whole number from 2."
    assert refused(check_whole_number, -2, least=-1) == "give a whole number from -1."


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (3, {}),
        (-3.5, {}),
        (0, {"least": 0}),
        (1, {"least": 0, "most": 1}),
        (1e-9, {"above": 0}),
        (math.inf, {"finite": False}),
        (-math.inf, {"finite": False}),
    ],
)
def test_a_number_within_its_bounds_is_returned_as_a_float(value: float, bounds: dict[str, Any]) -> None:
    number = check_number(value, "Owner", "argument", **bounds)
    assert type(number) is float and number == value


@pytest.mark.parametrize(
    ("value", "bounds", "remedy"),
    [
        (True, {}, "give a finite number."),
        ("3", {}, "give a finite number."),
        (None, {}, "give a finite number."),
        (math.nan, {"finite": False}, "give a number."),
        (math.inf, {}, "give a finite number."),
        (-math.inf, {"most": 1}, "give a number to 1."),
        (-0.1, {"least": 0}, "give a finite number from 0."),
        (0, {"above": 0}, "give a finite number above 0."),
        (1.5, {"least": 0, "most": 1}, "give a number from 0 to 1."),
        (-1, {"above": 0, "unit": "seconds"}, "give a finite number above 0, in seconds."),
    ],
)
def test_a_number_out_of_its_bounds_is_refused_with_them(value: Any, bounds: dict[str, Any], remedy: str) -> None:
    assert refused(check_number, value, **bounds) == remedy


def test_an_option_is_returned() -> None:
    assert check_option("min", "Owner", "argument", ("min", "max")) == "min"
    assert check_option(None, "Owner", "argument", (None, "max")) is None


@pytest.mark.parametrize(
    ("value", "options", "remedy"),
    [
        ("minimum", ("min", "max"), "give 'min' or 'max'. Did you mean 'min'?"),
        ("none of these", ("min", "max"), "give 'min' or 'max'."),
        ("a", ("one", "two", "three"), "give 'one', 'two' or 'three'."),
        (1, ("one",), "give 'one'."),
        ("Min", ("min", None), "give 'min' or None. Did you mean 'min'?"),
    ],
)
def test_anything_but_an_option_is_refused_with_the_options(value: Any, options: tuple[Any, ...], remedy: str) -> None:
    assert re.fullmatch(re.escape(remedy), refused(check_option, value, options))
