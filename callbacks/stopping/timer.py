"""End a run before a limit of wall-clock time."""

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
    """Ends a fit after some time; ``fit(ckpt_path="last")`` resumes from a checkpoint of the next safe point.

    ``fit`` returns as at any other end, and ``trainer.stop_reason`` says why. The clock runs from ``setup`` to ``teardown``.
    Checkpoints hold it, and a resumed run continues it, so that ``max_time`` limits the whole run; with ``per_job`` it limits
    each fit. A run that is resumed without time left ends at ``train_start``, before it trains. ``min_epochs`` and
    ``min_steps`` do not hold the end off.

    Calls ``trainer.interrupt`` at ``request_stop``, and also at ``validation_start`` and ``validation_batch_end``: a
    validation during the fit is left at its next batch, and repeated by the resumed run. If one of several processes has no
    time left, all of them end. Also listens to ``find_checkpoint``. Emits nothing, reads nothing from the device. Override
    :meth:`is_due` for another policy.

    Args:
        max_time: The limit: seconds, a ``timedelta``, its arguments as a dict, ``"HH:MM:SS"`` or ``"DD:HH:MM:SS"``.
        margin: How much sooner the run is asked to end, in the same forms: it still has to complete a batch and to write a
            checkpoint.
        per_job: Whether the clock starts again if a run is resumed: for the time limit of a scheduler.

    Raises:
        MisconfigurationError: If a duration is not valid, or if the margin leaves no time.

    Attributes:
        max_time: The limit in seconds.
        margin: The margin in seconds.

    Example:
        >>> timer = Timer("23:50:00", margin={"minutes": 5}, per_job=True)
        >>> trainer = Trainer(max_epochs=90, callbacks=[timer])
        >>> timer.remaining
        85500.0
    """

    def __init__(self, max_time: Duration, *, margin: Duration = 0.0, per_job: bool = False) -> None:
        self.max_time = seconds("max_time", max_time)
        self.margin = seconds("margin", margin)
        if self.margin >= self.max_time:
            raise MisconfigurationError(
                f"Timer(max_time={max_time!r}, margin={margin!r}) leaves no time to train. Give a max_time above the margin."
            )
        self.per_job = per_job
        self._before = 0.0  # seconds of the run before this fit; after the fit, of the whole run
        self._began: float | None = None

    @property
    def elapsed(self) -> float:
        """The seconds on the clock."""
        return self._before + (0.0 if self._began is None else monotonic() - self._began)

    @property
    def remaining(self) -> float:
        """The seconds until the run is asked to end, never less than 0."""
        return max(0.0, self.max_time - self.margin - self.elapsed)

    def is_due(self, trainer: Trainer) -> bool:
        """Decide whether the run ends at this safe point; also asked at each batch of a validation.

        Args:
            trainer: The trainer.

        Returns:
            Whether it ends. Once true, the answer must stay true.
        """
        return self.remaining == 0

    # ------------------------------------------------------------------ events

    def on_find_checkpoint(self, trainer: Trainer, event: FindCheckpoint) -> None:
        if event.which == "last":
            event.offer()  # no file, so that the first job of a run starts without one; the trainer finds its own

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        if event.stage == "fit":
            self._before, self._began = 0.0, monotonic()

    def on_train_start(self, trainer: Trainer, event: TrainStart) -> None:
        if self.is_due(trainer):
            trainer.stop(self._reason(), force=True)

    def on_request_stop(self, trainer: Trainer, event: RequestStop) -> None:
        self._interrupt_if_due(trainer)

    def on_validation_start(self, trainer: Trainer, event: ValidationStart) -> None:
        self._interrupt_if_due(trainer)

    def on_validation_batch_end(self, trainer: Trainer, event: ValidationBatchEnd) -> None:
        self._interrupt_if_due(trainer)

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        self._before, self._began = self.elapsed, None

    def _interrupt_if_due(self, trainer: Trainer) -> None:
        if trainer.stage == "fit" and self.is_due(trainer):
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


def seconds(argument: str, duration: Duration) -> float:
    """Return a duration in seconds.

    Args:
        argument: The argument's name, for messages.
        duration: Seconds, a ``timedelta``, its arguments, ``"HH:MM:SS"``, or with days ``"DD:HH:MM:SS"`` or ``"DD-HH:MM:SS"``.

    Raises:
        MisconfigurationError: If it is anything else, negative or infinite.
    """
    value: Any = duration
    if isinstance(value, str) and (match := re.fullmatch(r"(?:(\d+)[:-])?(\d+):([0-5]\d):([0-5]\d)", value.strip())):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        value = timedelta(days=days, hours=hours, minutes=minutes, seconds=rest)
    elif isinstance(value, Mapping):
        try:
            value = timedelta(**value)
        except (TypeError, OverflowError) as error:
            raise MisconfigurationError(
                f"Timer({argument}={duration!r}): {error}. Write for example {{'hours': 11}}."
            ) from None
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise MisconfigurationError(
            f"Timer({argument}={duration!r}): give seconds, a timedelta, its arguments as a dict, or a text such as '11:50:00' "
            "or, with days, '01:11:50:00'."
        )
    return float(value)
