"""A value that changes during a run: the form of schedule that policies share."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from eventtrain.checks import check_whole_number
from eventtrain.errors import MisconfigurationError

T = TypeVar("T")


class Schedule(Generic[T]):
    """A value for each count: each value holds from its key until the next key.

    Args:
        values: The values by the counts from which they hold; the first key is 0.
        owner: The class that takes the schedule, for messages.
        check: Called with each value; it raises an error if the value is not allowed.

    Raises:
        MisconfigurationError: If there is no value, if no key is 0, or if a key is not a whole number.

    Attributes:
        starts: The keys in ascending order.
        values: The values in the same order.

    Example:
        >>> schedule = Schedule({0: 8, 4: 2}, "GradientAccumulation", check=lambda value: None)
        >>> [schedule.at(epoch) for epoch in range(6)]
        [8, 8, 8, 8, 2, 2]
    """

    def __init__(self, values: Mapping[int, T], owner: str, check: Callable[[Any], object]) -> None:
        if not values:
            raise MisconfigurationError(f"The schedule of {owner} is empty. Give at least {{0: value}}.")
        for key in values:
            check_whole_number(key, f"The schedule of {owner}", "key")
        self.starts = sorted(values)
        if self.starts[0] != 0:
            raise MisconfigurationError(
                f"The schedule of {owner} starts at {self.starts[0]}: it has no value for the counts before. Add the key 0."
            )
        self.values = [values[start] for start in self.starts]
        for value in self.values:
            check(value)

    def at(self, count: int) -> T:
        """Return the value that holds at a count.

        Args:
            count: The count, from 0.
        """
        return self.values[bisect_right(self.starts, count) - 1]
