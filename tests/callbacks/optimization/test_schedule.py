"""Schedule: a value for each count."""

from __future__ import annotations

from typing import Any

import pytest

from eventtrain import MisconfigurationError
from eventtrain.callbacks.optimization.schedule import Schedule


def no_check(value: Any) -> None: ...


def test_a_value_holds_from_its_key_to_the_next() -> None:
    schedule = Schedule({4: "b", 0: "a", 6: "c"}, "Owner", no_check)
    assert [schedule.at(count) for count in range(8)] == ["a", "a", "a", "a", "b", "b", "c", "c"]
    assert schedule.starts == [0, 4, 6] and schedule.values == ["a", "b", "c"]


def test_each_value_is_checked() -> None:
    checked: list[int] = []
    Schedule({3: 1, 0: 2}, "Owner", checked.append)
    assert checked == [2, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"The schedule of Owner is empty\. Give at least \{0: value\}\."),
        ({2: 1, 5: 2}, r"The schedule of Owner starts at 2: it has no value for the counts before\. Add the key 0\."),
        ({0: 1, "4": 2}, r"The schedule of Owner\(key='4'\): give a whole number from 0\."),
        ({0: 1, 0.5: 2}, r"The schedule of Owner\(key=0\.5\): give a whole number from 0\."),
        ({False: 1}, r"The schedule of Owner\(key=False\): give a whole number from 0\."),
        ({-1: 1, 0: 2}, r"The schedule of Owner\(key=-1\): give a whole number from 0\."),
    ],
)
def test_a_schedule_that_cannot_be_right_is_an_error(values: Any, message: str) -> None:
    with pytest.raises(MisconfigurationError, match=f"^{message}$"):
        Schedule(values, "Owner", no_check)
