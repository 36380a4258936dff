"""A value that changes as a run goes on: the form that policies share."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from eventtrain.errors import MisconfigurationError

T = TypeVar("T")


class Schedule(Generic[T]):
    """A value by a counter: the one whose key is the largest not above it.

    Args:
        values: The values by the counts from which on they hold; the first key is 0.
        named: What the schedule is of, for messages.
        check: Called with each value; raises for those that cannot be.

    Raises:
        MisconfigurationError: It is empty, does not start at 0, or a key is no whole number.
    """

    def __init__(self, values: Mapping[int, T], named: str, check: Callable[[Any], None]) -> None:
        if not values:
            raise MisconfigurationError(f"The schedule of {named} is empty. Give at least {{0: value}}.")
        for key in values:
            if isinstance(key, bool) or not isinstance(key, int) or key < 0:
                raise MisconfigurationError(f"The schedule of {named} has the key {key!r}; keys are whole numbers from 0.")
        self.starts = sorted(values)
        if self.starts[0] != 0:
            raise MisconfigurationError(
                f"The schedule of {named} starts at {self.starts[0]} and says nothing of what holds before. Add the key 0."
            )
        self.values = [values[start] for start in self.starts]
        for value in self.values:
            check(value)

    def at(self, count: int) -> T:
        """The value that holds at a count."""
        return self.values[bisect_right(self.starts, count) - 1]
