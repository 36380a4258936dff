"""Stop a run once its monitored metric no longer improves."""

from __future__ import annotations

import math
from typing import Any, Literal

from eventtrain.callback import Callback
from eventtrain.callbacks.watched_metric import WatchedMetric
from eventtrain.checks import check_number, check_option, check_whole_number
from eventtrain.errors import MisconfigurationError
from eventtrain.events import FitStart, MetricsLogged, Setup, ValidationStart
from eventtrain.trainer import Trainer


class EarlyStopping(Callback):
    """Stops the run once a metric has not improved for some time, by ``trainer.stop``.

    Listens to ``metrics_logged``: looks at a metric of the validation after each validation, and at a metric that only
    training logs at the end of each complete epoch. If both log the name, it belongs to the validation once that has run.
    Only new values count. Each look reads one value from its device; batches read nothing. Several processes look at one value:
    if theirs differ, as values of steps do, at the mean. If one of them stops, all of them stop.

    A request waits for the trainer's ``min_epochs`` and ``min_steps``, and stands: there are no more looks. A run that is
    resumed after its request asks again (``fit_start``), unless it has more patience. Also listens to ``setup`` and
    ``validation_start``. Does nothing in a ``fast_dev_run``. Emits nothing. Override :meth:`reason_to_stop` for another
    policy.

    Args:
        monitor: The metric's name, as in ``trainer.callback_metrics``.
        mode: ``"min"`` if small values are good, ``"max"`` if large ones are.
        patience: The number of looks in a row without an improvement after which the run stops.
        min_delta: The number that an improvement has to exceed.
        threshold: Stop once the metric has reached this value; None for no such goal.
        divergence_threshold: Stop once the metric is worse than this; None for no such limit.
        check_finite: Whether to stop if the metric is infinite or NaN; else such a value is no improvement.
        strict: Whether a metric that was never logged is an error, once the stage that should log it is over. Else it is one
            warning, and the run continues.

    Raises:
        MisconfigurationError: If an argument is not valid; during the run, with ``strict``, if the metric is missing.

    Attributes:
        best: The best value so far; infinite before the first.
        wait_count: The number of looks since the best value.
        value: The value at the last look; None before the first look.

    Example:
        >>> stopping = EarlyStopping("val_loss", patience=5, min_delta=0.001)
        >>> trainer = Trainer(max_epochs=90, callbacks=[stopping])
        >>> stopping.best, stopping.wait_count
        (inf, 0)
    """

    def __init__(
        self,
        monitor: str,
        *,
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
        threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_finite: bool = True,
        strict: bool = False,
    ) -> None:
        if not isinstance(monitor, str) or not monitor:
            raise MisconfigurationError(f"EarlyStopping(monitor={monitor!r}): give the name of a metric.")
        check_number(min_delta, "EarlyStopping", "min_delta", least=0)
        for name, limit in (("threshold", threshold), ("divergence_threshold", divergence_threshold)):
            if limit is not None:
                check_number(limit, "EarlyStopping", name)
        self.monitor = monitor
        self.mode = check_option(mode, "EarlyStopping", "mode", ("min", "max"))
        self.patience = check_whole_number(patience, "EarlyStopping", "patience", least=1)
        self.min_delta = min_delta
        self.threshold = threshold
        self.divergence_threshold = divergence_threshold
        self.check_finite = check_finite
        self.strict = strict
        self._begin()

    def _begin(self) -> None:
        self.best = math.inf if self.mode == "min" else -math.inf
        self.wait_count = 0
        self.value: float | None = None
        self._metric = WatchedMetric(self.monitor, f"EarlyStopping(monitor={self.monitor!r})")
        self._before_validation = 0  # how often the metric was logged before the current validation
        self._is_validated = False  # validation logs it
        self._asked = False

    def reason_to_stop(self, trainer: Trainer, value: float) -> str | None:
        """Decide why the run stops, if it does.

        Called after each look, when :attr:`best` and :attr:`wait_count` include it, and once if a run is resumed.

        Args:
            trainer: The trainer.
            value: The value at the last look.

        Returns:
            The reason, in a few words; None if the run continues.
        """
        sign = 1 if self.mode == "min" else -1
        metric = f"{self.monitor}, at best {self.best:.6g},"
        if self.check_finite and not math.isfinite(value):
            return f"{metric} is {value}"
        # With a tolerance, because metrics are in float32, in which 0.9 is less than 0.9.
        if self.threshold is not None and sign * (value - self.threshold) <= 1e-6 * abs(self.threshold):
            return f"{metric} has reached the threshold {self.threshold:g} with {value:.6g}"
        if self.divergence_threshold is not None and sign * (value - self.divergence_threshold) > 0:
            return f"{metric} is beyond the divergence threshold {self.divergence_threshold:g} with {value:.6g}"
        if self.wait_count >= self.patience:
            return f"{metric} has not improved in {self.wait_count} looks"
        return None

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        if event.stage == "fit":
            self._begin()

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        self._agree(trainer, None if self.value is None else self.reason_to_stop(trainer, self.value))

    def on_validation_start(self, trainer: Trainer, event: ValidationStart) -> None:
        self._before_validation = trainer.times_logged(self.monitor)

    def on_metrics_logged(self, trainer: Trainer, event: MetricsLogged) -> None:
        if event.scope != "epoch" or trainer.stage != "fit" or trainer.fast_dev_run or self._asked:
            return
        if event.stage == "validation":
            is_new = trainer.times_logged(self.monitor) != self._before_validation
        else:
            is_new = event.epoch_complete and self._metric.has_new_value(trainer) and not self._is_validated
        agreed = self._metric.agreed(trainer, is_new)
        self._is_validated |= event.stage == "validation" and agreed is not None
        if event.stage == "train" and self._metric.is_missing(trainer):
            remedy = "strict=False makes this a warning." if self.strict else ""
            self._metric.report_missing(trainer, strict=self.strict, remedy=remedy)
        reason = None
        if agreed is not None:
            self._metric.look(trainer)
            self.value = value = float(agreed)
            improvement = self.best - value if self.mode == "min" else value - self.best
            if improvement > self.min_delta:  # never true for NaN
                self.best, self.wait_count = value, 0
            else:
                self.wait_count += 1
            reason = self.reason_to_stop(trainer, value)
        self._agree(trainer, reason)

    def _agree(self, trainer: Trainer, reason: str | None) -> None:
        """Stop the run if any process has a reason. All processes take part, also those without a new value."""
        self._asked = trainer.processes.any(reason is not None)
        if self._asked:
            trainer.stop(f"EarlyStopping: {reason or f'{self.monitor}, in another process'}", by_all=True)

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}({self.monitor}, {self.mode})"

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE} | {"_seen": self._metric.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, state[name])
        self._metric.seen = state["_seen"]


STATE = ("best", "wait_count", "value", "_is_validated")
