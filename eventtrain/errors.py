"""The errors that eventtrain raises on its own account."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MisconfigurationError(Exception):
    """Something was put together in a way that cannot work.

    The message says what is wrong, in which object, and what to write instead.
    """


class NonFiniteGradientError(MisconfigurationError, FloatingPointError):
    """Gradients that hold infinities or NaNs were about to be used where a step can't be skipped, or
    were met so often in a row that the run can't be healthy."""


class StepSkipped(BaseException):
    """Leaves an optimizer's ``step`` before it has updated anything. Private to the core.

    A ``BaseException``, so that an ``except Exception`` in an optimizer's or a user's ``step`` does not
    swallow it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class EvaluationInterrupted(BaseException):
    """Leaves an evaluation inside of a fit that is to end at once. Private to the core, for the same reason."""


def nearest(name: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """A hint for an unknown name.

    Args:
        name: What was written.
        known: What could have been meant.
        otherwise: The hint where nothing is near.

    Returns:
        ``"Did you mean 'x'?"``, or ``otherwise``.
    """
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {matches[0]!r}?" if matches else otherwise
