"""Steps the learning rate schedulers of automatic optimization."""

from __future__ import annotations

import warnings
from typing import Any

from torch.optim.lr_scheduler import OneCycleLR

from eventtrain.callback import Callback, on_demand
from eventtrain.callbacks.watched_metric import WatchedMetric
from eventtrain.events import AfterUpdate, FitStart, MetricsLogged, Setup, TrainBatchEnd, TrainDataEnd, ValidationEnd
from eventtrain.optim.lr_scheduler import LRSchedulerConfig
from eventtrain.trainer import Trainer


class LRSchedulerStepping(Callback):
    """Steps each scheduler at its interval, and only if something was updated since its last step.

    Attached by default. Listens to ``after_update`` for the interval ``"step"``, to ``train_data_end`` for ``"epoch"``, to
    ``validation_end`` for ``"validation"``, to ``setup`` and to ``fit_start``. If the run has such schedulers it also listens
    to ``train_batch_end`` for the interval ``"batch"``, and to ``metrics_logged`` for those by epoch that monitor a metric:
    they step when the epoch's values are final. Steps by ``trainer.step_lr_scheduler``. Does nothing in manual optimization.
    Emits no metrics. Override :meth:`is_due` to step at other counts.

    A monitored scheduler waits until its metric has a new value. Several processes give it one value: the mean
    of theirs, if they differ, as values of steps do. If the metric was never logged, although the stage that
    should log it is over, that is an error, or one warning if the scheduler's config has ``'strict': False``.

    Raises:
        MisconfigurationError: During the run, if a monitored metric was never logged.

    Example:
        >>> from eventtrain import Trainer
        >>> class OnlyAfterWarmup(LRSchedulerStepping):
        ...     def is_due(self, config, count):
        ...         return count > 100 and super().is_due(config, count)
        >>> trainer = Trainer(max_epochs=1, callbacks=[OnlyAfterWarmup()])  # in place of the default one
        >>> [type(callback).__name__ for callback in trainer.callbacks]
        ['OnlyAfterWarmup', 'ProgressBar']
    """

    role = "lr_scheduler_stepping"

    def __init__(self) -> None:
        # These dicts are by the scheduler's place in configure_optimizers.
        self._last_update: dict[int, int] = {}  # the global step at its last step
        self._seen: dict[int, int] = {}  # the counts of monitored metrics that a checkpoint had
        self._metrics: dict[int, WatchedMetric] = {}
        self._by_interval: dict[str, list[tuple[int, LRSchedulerConfig]]] = {}

    def is_due(self, config: LRSchedulerConfig, count: int) -> bool:
        """Return whether a scheduler steps: the policy, which a subclass may override.

        Args:
            config: The scheduler's config.
            count: The number of its intervals that the run has completed, with the current one.
        """
        return count % config.frequency == 0

    # ------------------------------------------------------------------ events

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        if event.stage == "fit":
            self._last_update, self._seen, self._metrics = {}, {}, {}

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        self._by_interval = {interval: [] for interval in ("step", "batch", "epoch", "monitored", "validation")}
        if not trainer.module.automatic_optimization:
            return
        for index, config in enumerate(trainer.lr_scheduler_configs):
            if config.monitor is not None:
                metric = WatchedMetric(config.monitor, f"{type(config.scheduler).__name__}(monitor={config.monitor!r})")
                metric.seen = self._seen.get(index, 0)
                self._metrics[index] = metric
            kind = "monitored" if config.interval == "epoch" and config.monitor is not None else config.interval
            self._by_interval[kind].append((index, config))
            if looks_stepwise(config, trainer.max_epochs):
                warnings.warn(
                    f"{type(config.scheduler).__name__} was built with total_steps={config.scheduler.total_steps}, which looks "
                    f"like the number of optimizer steps, and steps by epochs, of which there are {trainer.max_epochs}. Return "
                    "{'scheduler': scheduler, 'interval': 'step'} as its config.",
                    stacklevel=2,
                )
        if self._by_interval["batch"]:
            trainer.listen(self.on_train_batch_end)
        if self._by_interval["monitored"]:
            trainer.listen(self.on_metrics_logged)

    def on_after_update(self, trainer: Trainer, event: AfterUpdate) -> None:
        for index, config in self._by_interval["step"]:
            if self.is_due(config, event.global_step):
                self._step(trainer, index, config)

    @on_demand
    def on_train_batch_end(self, trainer: Trainer, event: TrainBatchEnd) -> None:
        for index, config in self._by_interval["batch"]:
            if self.is_due(config, trainer.total_batch_idx + 1):
                self._step(trainer, index, config, counts_updates=False)

    def on_train_data_end(self, trainer: Trainer, event: TrainDataEnd) -> None:
        for index, config in self._by_interval["epoch"]:
            if self.is_due(config, event.epoch + 1):
                self._step(trainer, index, config)

    def on_validation_end(self, trainer: Trainer, event: ValidationEnd) -> None:
        if trainer.stage != "fit" or trainer.sanity_checking:
            return
        for index, config in self._by_interval["validation"]:
            if self.is_due(config, trainer.progress.validations + 1):
                self._step(trainer, index, config)

    @on_demand
    def on_metrics_logged(self, trainer: Trainer, event: MetricsLogged) -> None:
        if event.scope != "epoch" or event.stage != "train" or not event.epoch_complete:
            return
        for index, config in self._by_interval["monitored"]:
            if self.is_due(config, trainer.current_epoch + 1):
                self._step(trainer, index, config)

    # ------------------------------------------------------------------ one scheduler

    def _step(self, trainer: Trainer, index: int, config: LRSchedulerConfig, *, counts_updates: bool = True) -> None:
        """Step one scheduler, unless nothing was updated, or its metric has no new value, since its last step.

        Args:
            trainer: The trainer.
            index: The scheduler's place in ``configure_optimizers``.
            config: Its config.
            counts_updates: Wait for an update since the last step. Schedulers by batches wait only for the run's first one.
        """
        global_step = trainer.progress.global_step
        if global_step == (self._last_update.get(index, 0) if counts_updates else 0):
            return
        value: Any = None
        if config.monitor is not None:
            metric = self._metrics[index]
            value = metric.agreed(trainer, metric.look(trainer))
            if value is None:
                if not metric.was_logged(trainer):
                    self._report_missing(trainer, config, metric)
                return
        self._last_update[index] = global_step
        trainer.step_lr_scheduler(config, value)

    def _report_missing(self, trainer: Trainer, config: LRSchedulerConfig, metric: WatchedMetric) -> None:
        """Report that a metric was never logged, once the stage that may log it is over."""
        awaits_epoch = config.interval in ("step", "batch") and trainer.current_epoch == 0
        # At a validation's end, that validation is not counted yet.
        if config.interval == "validation" or (metric.is_missing(trainer) and not awaits_epoch):
            metric.report_missing(trainer, strict=config.strict, remedy="'strict': False makes this a warning.")

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        seen = {index: metric.seen for index, metric in self._metrics.items() if metric.seen}
        return {"last_update": dict(self._last_update), "seen": self._seen | seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last_update = dict(state["last_update"])
        self._seen = dict(state.get("seen", {}))  # older checkpoints have neither this nor the counts of metrics
        self._metrics = {}


def looks_stepwise(config: LRSchedulerConfig, epochs: int | None) -> bool:
    """Return whether a scheduler that steps by epochs was built for more steps than there are epochs.

    Args:
        config: The scheduler config.
        epochs: The run's number of epochs; None if only ``max_steps`` ends it.
    """
    scheduler = config.scheduler
    if config.interval != "epoch" or not isinstance(scheduler, OneCycleLR):
        return False
    return epochs is None or bool(scheduler.total_steps > epochs)
