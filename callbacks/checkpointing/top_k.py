"""Which checkpoints are kept: the best by a metric, or the newest."""

from __future__ import annotations

import math
from typing import Literal


class Ranking:
    """Names in the order of their scores.

    Args:
        most: How many are kept at most; -1 for all.
        mode: Whether small scores are good, ``"min"``, or large ones, ``"max"``; None where there are no scores, and a
            newer name is better than an older one.

    Attributes:
        scores: The kept names, oldest first, with their scores.
        surplus: Names that were kept and are so no more, whose files are to be deleted.
    """

    def __init__(self, most: int, mode: Literal["min", "max"] | None) -> None:
        self.most = most
        self.mode = mode
        self.scores: dict[str, float | None] = {}
        self.surplus: list[str] = []

    def take(self, name: str, score: float | None) -> bool:
        """Takes a name in where it is good enough; of equal scores the older is the better.

        Args:
            name: The name; one that is there already gets the new score, if that is no worse.
            score: Its score; NaN is the worst.

        Returns:
            Whether it is kept.
        """
        others = {other: value for other, value in self.scores.items() if other != name}
        if name in self.scores and self._order({name: score, "": self.scores[name]})[0] == "":
            return False
        ranked = self._order({**others, name: score})
        out = ranked[self.most :] if self.most >= 0 else []
        if name in out:
            return False
        self.scores = {other: value for other, value in {**others, name: score}.items() if other not in out}
        self.surplus = [other for other in self.surplus if other != name] + out
        return True

    def best(self) -> list[str]:
        """The kept names, best first."""
        return self._order(self.scores)

    def _order(self, scores: dict[str, float | None]) -> list[str]:
        names = list(scores)
        if self.mode is None:
            return names[::-1]
        sign = 1 if self.mode == "min" else -1
        values = {name: math.nan if score is None else sign * score for name, score in scores.items()}
        return sorted(names, key=lambda name: math.inf if math.isnan(values[name]) else values[name])  # stable
