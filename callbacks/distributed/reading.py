"""Read data in several processes until one of them has no batch left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eventtrain.core.interfaces import END

Ask = Callable[[bool], Callable[[], bool]]
"""Begins to ask whether a flag holds in any process; the function that it returns waits for the answer."""


class ReadTogether:
    """A function that reads the next batch, as long as all processes have one.

    It has always read one batch more than it has returned, and has asked whether all processes have that one. So the answer
    comes while the batch before it is trained, and nobody waits for it.

    Args:
        read: Reads the next batch, or :data:`~eventtrain.core.interfaces.END`. It is not called after that.
        ask: Begins to ask whether a flag holds in any process.
        ahead: Whether it may read ahead. If not, each batch waits for the answer.

    Example:
        >>> batches = iter(["a", "b"])
        >>> read = ReadTogether(lambda: next(batches, END), lambda flag: lambda: flag, ahead=True)
        >>> [read(), read(), read() is END]
        ['a', 'b', True]
    """

    def __init__(self, read: Callable[[], Any], ask: Ask, *, ahead: bool) -> None:
        self._read, self._ask, self._ahead = read, ask, ahead
        self._asked: tuple[Any, Callable[[], bool]] | None = None

    def __call__(self) -> Any:
        batch, is_over = self._asked or self._begin()
        self._asked = None
        if is_over():
            return END
        if self._ahead:
            self._asked = self._begin()
        return batch

    def _begin(self) -> tuple[Any, Callable[[], bool]]:
        batch = self._read()
        return batch, self._ask(batch is END)
