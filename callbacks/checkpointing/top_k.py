"""Decide which checkpoints to keep: the best by a metric, or the newest."""

from __future__ import annotations

import math
from typing import Literal


class TopK:
    """Names in the order of their scores.

    Args:
        size: The number of names to keep; -1 for all.
        mode: ``"min"`` if small scores are good, ``"max"`` if large ones are; None if there are no scores, and newer names
            are better than older ones.

    Attributes:
        scores: The names to keep, oldest first, with their scores.
        surplus: Names that are no longer among them, whose files are to be deleted.
    """

    def __init__(self, size: int, mode: Literal["min", "max"] | None) -> None:
        self.size = size
        self.mode = mode
        self.scores: dict[str, float | None] = {}
        self.surplus: list[str] = []

    def add(self, name: str, score: float | None) -> bool:
        """Add a name if its score is good enough; of equal scores the older one is better.

        Args:
            name: The name. If it is there already, it gets the new score unless that is worse.
            score: Its score; NaN is the worst.

        Returns:
            Whether it was added.
        """
        others = {other: value for other, value in self.scores.items() if other != name}
        if name in self.scores and self._order({name: score, "": self.scores[name]})[0] == "":
            return False
        ranked = self._order({**others, name: score})
        out = ranked[self.size :] if self.size >= 0 else []
        if name in out:
            return False
        self.scores = {other: value for other, value in {**others, name: score}.items() if other not in out}
        self.surplus = [other for other in self.surplus if other != name] + out
        return True

    def best(self) -> list[str]:
        """Return the names, best first."""
        return self._order(self.scores)

    def _order(self, scores: dict[str, float | None]) -> list[str]:
        names = list(scores)
        if self.mode is None:
            return names[::-1]
        sign = 1 if self.mode == "min" else -1
        values = {name: math.nan if score is None else sign * score for name, score in scores.items()}
        return sorted(names, key=lambda name: math.inf if math.isnan(values[name]) else values[name])  # stable
