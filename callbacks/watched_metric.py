"""One logged metric that a callback or a scheduler watches for new values."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from eventtrain.errors import MisconfigurationError, nearest

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer


class WatchedMetric:
    """A name in ``trainer.callback_metrics``, and how much of it was seen.

    Args:
        name: The metric's name.
        watcher: Who watches it, for messages, such as ``"EarlyStopping(monitor='val_loss')"``.

    Attributes:
        seen: ``trainer.times_logged(name)`` at the last look; kept in checkpoints by the watcher.

    Example:
        >>> from eventtrain import Callback
        >>> class Announce(Callback):
        ...     def __init__(self):
        ...         self.accuracy = WatchedMetric("accuracy", "Announce()")
        ...     def on_metrics_logged(self, trainer, event):
        ...         if self.accuracy.look(trainer):
        ...             print(f"accuracy: {float(self.accuracy.value(trainer)):.3f}")
    """

    def __init__(self, name: str, watcher: str) -> None:
        self.name = name
        self.watcher = watcher
        self.seen = 0
        self._warned = False

    def has_new_value(self, trainer: Trainer) -> bool:
        """Return whether the metric was logged since the last look."""
        return trainer.times_logged(self.name) != self.seen

    def look(self, trainer: Trainer) -> bool:
        """Return whether the metric was logged since the last look, and take note of it."""
        count = trainer.times_logged(self.name)
        is_new, self.seen = count != self.seen, count
        return is_new

    def value(self, trainer: Trainer) -> Any:
        """Return the latest value, a scalar tensor.

        Raises:
            KeyError: If the metric was never logged.
        """
        return trainer.callback_metrics[self.name]

    def is_missing(self, trainer: Trainer) -> bool:
        """Return whether the metric was never logged, although a validation that might log it is over."""
        may_come = trainer.validates and trainer.progress.validations == 0
        return trainer.times_logged(self.name) == 0 and not may_come

    def report_missing(self, trainer: Trainer, *, strict: bool, remedy: str = "") -> None:
        """Say that the metric was never logged, and which metrics there are; warn once.

        Args:
            trainer: The trainer.
            strict: Raise instead of a warning.
            remedy: A sentence that is added to the message.

        Raises:
            MisconfigurationError: If ``strict``.
        """
        if self._warned and not strict:
            return
        known = sorted(trainer.callback_metrics)
        log_it = f"Log it with self.log({self.name!r}, ...), or monitor one of those."
        hint = nearest(self.name, known, otherwise=log_it)
        message = f"{self.watcher}: no metric {self.name!r} was logged; there are {known}. {hint} {remedy}".rstrip()
        if strict:
            raise MisconfigurationError(message)
        self._warned = True
        warnings.warn(message, stacklevel=3)
