"""The errors that eventtrain raises."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class MisconfigurationError(Exception):
    """Objects, arguments or methods were combined in a way that cannot work.

    The message names the object and the value that is wrong, and says how to write it instead.

    Example:
        >>> from eventtrain import Trainer
        >>> Trainer(max_epochs=0.5)
        Traceback (most recent call last):
        eventtrain.errors.MisconfigurationError: Trainer(max_epochs=0.5): give a whole number from -1.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n\t")


class StepSkipped(BaseException):
    """Leaves an optimizer's ``step`` before it updates anything. Private to the core.

    It is a ``BaseException``, so that an ``except Exception`` in the ``step`` of an optimizer or a user does not catch it.

    Args:
        reason: The reason, for the event.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class EvaluationInterrupted(BaseException):
    """Leaves an evaluation within a fit that has to end at once. Private to the core.

    It is a ``BaseException`` for the same reason.
    """


def printable(text: Any, *, keep: str = "") -> str:
    """Return a text in which escapes stand for the characters that a terminal obeys or hides: names in files are input.

    Args:
        text: The text, or an object whose ``str`` is meant.
        keep: Characters that stay, such as the newlines of a message that is not one name.

    Example:
        >>> print(printable("loss\x1b[2J"))
        loss\\x1b[2J
    """
    return "".join(each if each.isprintable() or each in keep else ascii(each)[1:-1] for each in str(text))


def escaped(error: Exception) -> Exception:
    """Make an error's message printable, so that a trace can show it as the cause of another error; return the error."""
    error.args = tuple(printable(each, keep="\n\t") if isinstance(each, str) else each for each in error.args)
    return error


def nearest(name: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """Return a hint for an unknown name.

    Args:
        name: The name that the user wrote.
        known: The names that exist.
        otherwise: The hint if no known name is similar.

    Returns:
        ``"Did you mean 'x'?"``, or ``otherwise``.

    Example:
        >>> nearest("epochs", ["epoch", "step"])
        "Did you mean 'epoch'?"
    """
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {matches[0]!r}?" if matches else otherwise
