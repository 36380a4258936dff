"""One logged metric that a callback or a scheduler watches for new values."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

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
        self._logged_elsewhere = False

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

    def agreed(self, trainer: Trainer, is_new: bool) -> Any | None:
        """Return the latest value, one for all processes, so that they decide alike. All of them have to call this.

        Values of steps differ between processes: then it is the mean of those that have a new one.

        Args:
            trainer: The trainer.
            is_new: Whether this process has a new value to decide by.

        Returns:
            The value, a scalar tensor; None if no process has a new one.

        Example:
            >>> from eventtrain import Callback
            >>> class StopAtZero(Callback):
            ...     def __init__(self):
            ...         self.loss = WatchedMetric("loss", "StopAtZero()")
            ...     def on_train_epoch_end(self, trainer, event):
            ...         loss = self.loss.agreed(trainer, self.loss.look(trainer))
            ...         if loss is not None and float(loss) == 0:
            ...             trainer.stop("the loss is zero")
        """
        value = self.value(trainer) if is_new else None
        if trainer.world_size == 1:
            return value
        everywhere = trainer.processes.gather_for_all(None if value is None else float(value))
        values = [each for each in everywhere if each is not None]
        self._logged_elsewhere |= bool(values)
        if not values or (value is not None and values.count(values[0]) == len(values)):
            return value
        return torch.tensor(sum(values) / len(values), dtype=torch.float64)

    def was_logged(self, trainer: Trainer) -> bool:
        """Return whether the metric was ever logged: in this process, or in another when :meth:`agreed` asked."""
        return trainer.times_logged(self.name) > 0 or self._logged_elsewhere

    def is_missing(self, trainer: Trainer) -> bool:
        """Return whether the metric was never logged, although a validation that might log it is over."""
        may_come = trainer.validates and trainer.progress.validations == 0
        return not self.was_logged(trainer) and not may_come

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
