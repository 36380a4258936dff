"""Print for people: a terminal that is gone costs one warning, and not the run."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

from eventtrain.errors import printable

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer

BROKEN = (OSError, ValueError)
"""The errors of a stream: a reader that has left, a full disk, a file that was closed, a character that it cannot encode."""


def show(trainer: Trainer, text: Any, owner: str) -> None:
    """Print a text of several lines with ``trainer.print``; if that fails, there is one warning.

    Args:
        trainer: The trainer.
        text: The text, or an object whose ``str`` is meant. Control characters in it are escaped.
        owner: The callback that prints, for the warning.
    """
    shown = printable(text, keep="\n\t")
    try:
        trainer.print(shown)
    except BROKEN as error:
        warn_of_silence(owner, error)


def warn_of_silence(owner: str, error: Exception) -> None:
    """Warn that a callback prints nothing more, also if warnings cannot be printed either.

    Args:
        owner: The callback.
        error: The stream's error.
    """
    with contextlib.suppress(*BROKEN):  # the warning goes to the stream that is broken
        reason = printable(f"{type(error).__name__}: {error}")
        warnings.warn(f"{owner} prints nothing more, because its output is broken ({reason}). The run continues.", stacklevel=4)
