"""The choice of the units that are measured in a long sequence."""

from __future__ import annotations

import random


class Sampling:
    """Chooses units of a long sequence: the first ones, then one here and there.

    The distances between them are random, so that nothing periodic in the sequence can hide. They come from a separate
    generator with a fixed seed: they are the same in each run, and the run's random numbers stay as they are.

    Args:
        first: The number of units that are chosen from the beginning.
        every: The mean distance between two units afterwards.
    """

    def __init__(self, first: int, every: int) -> None:
        self.first = first
        self.every = every
        self._drawn = 0
        self._random = random.Random(0)

    def draw(self) -> int:
        """Return the distance from the unit that was chosen last to the next. The next unit represents all of them."""
        self._drawn += 1
        return 1 if self._drawn < self.first else self._random.randint(1, 2 * self.every - 1)
