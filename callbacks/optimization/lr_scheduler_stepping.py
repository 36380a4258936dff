"""Steps the learning rate schedulers of automatic optimization."""

from __future__ import annotations

import warnings
from typing import Any

from eventtrain.callback import Callback
from eventtrain.errors import MisconfigurationError
from eventtrain.events import AfterUpdate, FitStart, MetricsLogged, Teardown, TrainBatchEnd, TrainDataEnd, ValidationEnd
from eventtrain.optim.lr_scheduler import LRSchedulerConfig, looks_stepwise
from eventtrain.trainer import Trainer


class LRSchedulerStepping(Callback):
    """Steps each scheduler at its interval, and only where something was updated since its last step.

    Attached by default. Listens to ``after_update`` for the interval ``"step"``, ``train_batch_end`` for ``"batch"``,
    ``train_data_end`` for ``"epoch"``, ``validation_end`` for ``"validation"``, and the epoch's ``metrics_logged`` for
    those by epoch that monitor a metric. Does nothing in manual optimization. Override :meth:`is_due` to step at
    other counts.
    """

    role = "lr_scheduler_stepping"

    def __init__(self) -> None:
        # By the scheduler's place in configure_optimizers: the metric's renewals and the global step at its last step.
        self._seen: dict[int, int] = {}
        self._last_update: dict[int, int] = {}
        self._warned: set[str] = set()
        self._by_interval: dict[str, list[tuple[int, LRSchedulerConfig]]] = {}

    def is_due(self, config: LRSchedulerConfig, count: int) -> bool:
        """The policy: whether a scheduler steps.

        Args:
            config: The scheduler's config.
            count: How many of its intervals the run has completed, this one included.
        """
        return count % config.frequency == 0

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        if trainer.global_step == 0:
            self._seen.clear()
            self._last_update.clear()
        self._by_interval = {interval: [] for interval in ("step", "batch", "epoch", "monitored", "validation")}
        if not trainer.module.automatic_optimization:
            return
        for index, config in enumerate(trainer.lr_scheduler_configs):
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
            # Not an on_... method: hardly a run has such a scheduler, and every batch would pay for the event.
            trainer.signals.train_batch_end.connect(self.step_by_batches)

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        trainer.signals.train_batch_end.disconnect(self.step_by_batches)

    def on_after_update(self, trainer: Trainer, event: AfterUpdate) -> None:
        for index, config in self._by_interval["step"]:
            if self.is_due(config, event.global_step):
                self._step(trainer, index, config)

    def step_by_batches(self, trainer: Trainer, event: TrainBatchEnd) -> None:
        """Connected to ``train_batch_end`` for runs that have a scheduler with the interval ``"batch"``."""
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

    def on_metrics_logged(self, trainer: Trainer, event: MetricsLogged) -> None:
        if event.scope != "epoch" or event.stage != "train" or not event.epoch_complete:
            return
        for index, config in self._by_interval["monitored"]:
            if self.is_due(config, trainer.current_epoch + 1):
                self._step(trainer, index, config)

    def _step(self, trainer: Trainer, index: int, config: LRSchedulerConfig, *, counts_updates: bool = True) -> None:
        """Steps one scheduler, unless nothing was updated, or its metric not renewed, since its last step. One that
        counts batches waits for the run's first update alone."""
        global_step = trainer.progress.global_step
        if global_step == (self._last_update.get(index, 0) if counts_updates else 0):
            return
        metric: Any = None
        if config.monitor is not None:
            renewals = trainer.times_logged(config.monitor)
            if renewals == 0:
                self._on_absent_metric(trainer, config)
                return
            if renewals == self._seen.get(index, 0):
                return
            self._seen[index] = renewals
            metric = trainer.callback_metrics[config.monitor]
            if config.interval in ("step", "batch") and trainer.world_size > 1:  # an epoch's value is that of all processes
                metric = trainer.processes.reduce(metric.clone(), "mean")
        self._last_update[index] = global_step
        trainer.step_lr_scheduler(config, metric)

    def _on_absent_metric(self, trainer: Trainer, config: LRSchedulerConfig) -> None:
        awaits_validation = trainer.validates and trainer.progress.validations == 0 and config.interval != "validation"
        awaits_epoch = config.interval in ("step", "batch") and trainer.current_epoch == 0
        if awaits_validation or awaits_epoch:
            return  # the stage that may log it has not been there yet
        message = (
            f"{type(config.scheduler).__name__} monitors {config.monitor!r}, which was never logged; there are "
            f"{sorted(trainer.callback_metrics)}. Log it with self.log({config.monitor!r}, ...), or monitor one of those."
        )
        if config.strict:
            raise MisconfigurationError(f"{message} 'strict': False makes this a warning.")
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        return {"last_update": dict(self._last_update), "seen": dict(self._seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last_update = dict(state["last_update"])
        self._seen = dict(state.get("seen", {}))  # older checkpoints kept neither this nor the metrics' renewals
