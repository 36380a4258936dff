"""Names for several optimizers or parameter groups of one kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


def numbered(names: Iterable[str]) -> list[str]:
    """Return names, with a number behind each that occurs several times: ``a, b, a`` becomes ``a-0, b, a-1``.

    Example:
        >>> numbered(["SGD", "Adam", "SGD"])
        ['SGD-0', 'Adam', 'SGD-1']
    """
    names = list(names)
    total, seen = Counter(names), Counter[str]()
    result = []
    for name in names:
        result.append(f"{name}-{seen[name]}" if total[name] > 1 else name)
        seen[name] += 1
    return result
