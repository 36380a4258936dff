"""What a trainer says of its run: read-only, for callbacks, modules and users. Control is by the trainer's verbs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from eventtrain.core.loop import Extent, TrainLoop
from eventtrain.core.signals import Signals
from eventtrain.core.state import BatchState, Progress, RunStage, StopRequest
from eventtrain.distributed import Processes
from eventtrain.errors import MisconfigurationError
from eventtrain.events import EstimateSteppingBatches
from eventtrain.metrics.metrics import Metrics
from eventtrain.module.module import LightningModule


class RunView:
    """The properties of a :class:`~eventtrain.Trainer`.

    Attributes:
        signals: One signal per event.
        callbacks: The attached callbacks, in order.
        processes: The other processes, if any.
        extent: How long the run is.
        progress: Its counters.
        metrics: What is logged.
        stage: Which of ``fit``, ``validate``, ``test`` and ``predict`` is running; None between runs.
        stop_request: What was asked of the run by ``stop`` and ``end_epoch``.
    """

    signals: Signals
    callbacks: list[Any]
    processes: Processes
    extent: Extent
    progress: Progress
    metrics: Metrics
    stage: RunStage | None
    stop_request: StopRequest
    batch: BatchState
    _module: LightningModule | None
    _loop: TrainLoop | None

    @property
    def module(self) -> LightningModule:
        """The module of the run at hand, or of the last.

        Raises:
            MisconfigurationError: There was none yet.
        """
        if self._module is None:
            raise MisconfigurationError("The trainer has no module yet: call fit, validate, test or predict with one.")
        return self._module

    @property
    def current_epoch(self) -> int:
        """Epochs of training completed, which is the index of the one at hand."""
        return self.progress.current_epoch

    @property
    def global_step(self) -> int:
        """Batches of the run in which at least one optimizer updated."""
        return self.progress.global_step

    @property
    def batch_idx(self) -> int:
        """The index in its epoch of the training batch at hand."""
        return self.progress.batch_idx

    @property
    def total_batch_idx(self) -> int:
        """The index in the run of the training batch at hand."""
        return self.progress.total_batch_idx

    @property
    def max_epochs(self) -> int | None:
        """Epochs of training; None for no limit."""
        return self.extent.max_epochs

    @property
    def max_steps(self) -> int | None:
        """Updates of the run; None for no limit."""
        return self.extent.max_steps

    @property
    def num_training_batches(self) -> int | None:
        """Training batches per epoch on this rank, limits counted; None where the loader has no length."""
        return self.extent.batches_per_epoch

    @property
    def run_limits(self) -> dict[str, int | None]:
        """Return how long the run is and when it validates, by name, such as ``max_epochs``: for loggers."""
        return asdict(self.extent)

    @property
    def is_last_batch(self) -> bool:
        """Whether the training batch at hand is its epoch's last."""
        return self._loop is not None and self._loop.is_last_batch

    @property
    def training(self) -> bool:
        """Whether training batches are being run, as opposed to a validation inside of a fit."""
        return self.stage == "fit" and self.metrics.stage == "train"

    @property
    def validating(self) -> bool:
        """Whether a validation is being run, inside of a fit or by itself."""
        return self.stage is not None and self.metrics.stage == "validation"

    @property
    def testing(self) -> bool:
        """Whether a test is being run."""
        return self.stage == "test"

    @property
    def predicting(self) -> bool:
        """Whether predictions are being made."""
        return self.stage == "predict"

    @property
    def validates(self) -> bool:
        """Whether the run at hand has something to validate on."""
        return self._loop is not None and self._loop.validate is not None

    @property
    def estimated_stepping_batches(self) -> int:
        """How many batches of the whole run will update something, if none is skipped and nothing stops it.

        Raises:
            MisconfigurationError: The training loader has no length and ``max_steps`` is not given.
        """
        extent = self.extent
        event = EstimateSteppingBatches(extent.batches_per_epoch, extent.max_epochs, extent.max_steps)
        if extent.max_epochs is None or extent.batches_per_epoch is None:
            if extent.max_steps is not None:
                return extent.max_steps
            raise MisconfigurationError(
                "estimated_stepping_batches cannot be known: the run has neither max_steps nor both max_epochs and a training "
                "loader with a length. Give Trainer(max_steps=...), or limit_train_batches as a whole number."
            )
        self.signals.estimate_stepping_batches.publish(event)
        batches = event.stepping_batches
        if batches is None:
            batches = extent.max_epochs * extent.batches_per_epoch
        return batches if extent.max_steps is None else min(batches, extent.max_steps)

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """The latest value of every logged name, as scalar tensors."""
        return self.metrics.callback_metrics

    @property
    def logged_metrics(self) -> dict[str, Any]:
        """The latest values that went to loggers."""
        return {**self.metrics.logged_metrics, **self.metrics.fresh}

    @property
    def progress_bar_metrics(self) -> dict[str, Any]:
        """The latest values that were logged with ``prog_bar=True``."""
        return self.metrics.progress_bar_metrics

    @property
    def loggers(self) -> list[Any]:
        """The attached callbacks that have an ``experiment``."""
        return [callback for callback in self.callbacks if hasattr(type(callback), "experiment")]

    @property
    def logger(self) -> Any:
        """The first of :attr:`loggers`; None where there is none."""
        return next(iter(self.loggers), None)

    @property
    def should_stop(self) -> bool:
        """Whether :meth:`stop` was called in this run."""
        return self.stop_request.reason is not None

    @property
    def stop_reason(self) -> str | None:
        """Why the run was asked to stop, in this run or the last; None if it was not."""
        return self.stop_request.reason

    @property
    def window_open(self) -> bool:
        """Whether gradients of an unfinished accumulation window are held."""
        return self.batch.window_open

    @property
    def is_ending(self) -> bool:
        """Whether the run ends at the safe point at hand: it is complete, or was asked to stop."""
        return self._loop is not None and (self._loop.is_complete() or self._loop.is_stopping())

    @property
    def world_size(self) -> int:
        """The number of processes that train together."""
        return self.processes.world_size

    @property
    def global_rank(self) -> int:
        """This process's index among them."""
        return self.processes.global_rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.processes.global_rank == 0
