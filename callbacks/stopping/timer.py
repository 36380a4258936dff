"""Ends a run before a limit of wall-clock time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import timedelta
from time import monotonic
from typing import Any

from eventtrain.callback import Callback
from eventtrain.errors import MisconfigurationError
from eventtrain.events import FindCheckpoint, RequestStop, Setup, Teardown, TrainStart, ValidationBatchEnd, ValidationStart
from eventtrain.trainer import Trainer

Duration = timedelta | Mapping[str, float] | float | str


class Timer(Callback):
    """Ends a fit once it has taken some time: with a checkpoint at the next safe point, from which ``fit(ckpt_path="last")``
    goes on. ``fit`` returns as at any other end, and ``trainer.stop_request.reason`` says why.

    The clock runs from ``setup`` to ``teardown``. It is kept in checkpoints and goes on where a run is resumed, so that
    ``max_time`` is for the whole run; with ``per_job`` each fit has its own. A run resumed without time left ends at
    ``train_start``, before it trains. The request to end does not wait for the trainer's ``min_epochs`` and ``min_steps``.

    Connects to ``safe_point`` at ``train_start``, so that it comes after those who listen there. Also listens to
    ``validation_start`` and ``validation_batch_end``: a validation inside of the fit is left at its next batch, and runs
    again after the resume. With several processes all end where any has no time left. Emits nothing, reads nothing from the
    device. Override :meth:`is_due` for another policy.

    Args:
        max_time: The limit: seconds, a ``timedelta``, its arguments as a dict, ``"HH:MM:SS"`` or ``"DD:HH:MM:SS"``.
        margin: How much sooner the run is asked to end, in the same forms: a batch, and writing the checkpoint, take a while.
        per_job: Whether the clock begins anew where a run is resumed: for a scheduler's limit.

    Raises:
        MisconfigurationError: A duration that can't be right, or a margin that leaves no time.

    Attributes:
        max_time: The limit in seconds.
        margin: The margin in seconds.
    """

    def __init__(self, max_time: Duration, *, margin: Duration = 0.0, per_job: bool = False) -> None:
        self.max_time = seconds("max_time", max_time)
        self.margin = seconds("margin", margin)
        if self.margin >= self.max_time:
            raise MisconfigurationError(
                f"Timer(max_time={max_time!r}, margin={margin!r}) leaves no time to train. Give a max_time above the margin."
            )
        self.per_job = per_job
        self._before = 0.0  # seconds of the run before this fit, or of all of it after the fit
        self._began: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds on the clock."""
        return self._before + (0.0 if self._began is None else monotonic() - self._began)

    @property
    def remaining(self) -> float:
        """Seconds until the run is asked to end, 0 at least."""
        return max(0.0, self.max_time - self.margin - self.elapsed)

    def is_due(self, trainer: Trainer) -> bool:
        """The policy: whether the run is to end, from now on. Asked at each safe point, and in validations.

        Args:
            trainer: The trainer.
        """
        return self.remaining == 0

    # ------------------------------------------------------------------ events

    def on_find_checkpoint(self, trainer: Trainer, event: FindCheckpoint) -> None:
        if event.which == "last":
            event.offer()  # none of its own, so that a run's first job begins anew; what the trainer keeps it finds itself

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        if event.stage == "fit":
            self._before, self._began = 0.0, monotonic()

    def on_train_start(self, trainer: Trainer, event: TrainStart) -> None:
        if trainer.processes.any(self.is_due(trainer)):
            trainer.stop(self._reason(), force=True, by_all=True)

    def on_request_stop(self, trainer: Trainer, event: RequestStop) -> None:
        self._interrupt_if_due(trainer)

    def on_validation_start(self, trainer: Trainer, event: ValidationStart) -> None:
        self._interrupt_if_due(trainer)

    def on_validation_batch_end(self, trainer: Trainer, event: ValidationBatchEnd) -> None:
        self._interrupt_if_due(trainer)

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        self._before, self._began = self.elapsed, None

    def _interrupt_if_due(self, trainer: Trainer) -> None:
        if self.is_due(trainer):
            trainer.interrupt(self._reason())

    def _reason(self) -> str:
        return f"Timer: {timedelta(seconds=round(self.elapsed))} of {timedelta(seconds=self.max_time)} are over"

    # ------------------------------------------------------------------ state

    @property
    def state_key(self) -> str:
        return "Timer(per_job)" if self.per_job else "Timer"

    def state_dict(self) -> dict[str, Any]:
        return {"elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.per_job:
            self._before = state["elapsed"]


def seconds(named: str, given: Duration) -> float:
    """A duration in seconds.

    Args:
        named: The argument, for messages.
        given: Seconds, a ``timedelta``, its arguments, ``"HH:MM:SS"``, or with days ``"DD:HH:MM:SS"`` or ``"DD-HH:MM:SS"``.

    Raises:
        MisconfigurationError: It is none, is negative or has no end.
    """
    value: Any = given
    if isinstance(value, str) and (found := re.fullmatch(r"(?:(\d+)[:-])?(\d+):([0-5]\d):([0-5]\d)", value.strip())):
        days, hours, minutes, rest = (int(part or 0) for part in found.groups())
        value = timedelta(days=days, hours=hours, minutes=minutes, seconds=rest)
    elif isinstance(value, Mapping):
        try:
            value = timedelta(**value)
        except (TypeError, OverflowError) as error:
            raise MisconfigurationError(f"Timer({named}={given!r}): {error}. Write such as {{'hours': 11}}.") from None
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise MisconfigurationError(
            f"Timer({named}={given!r}): write seconds, a timedelta, its arguments as a dict, or a text such as '11:50:00', "
            "with days '01:11:50:00'."
        )
    return float(value)
