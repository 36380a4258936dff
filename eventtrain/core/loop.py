"""The training loop. It reads like the loop map in the README, and only publishes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from eventtrain.core.closure import Closure, forward, parse_outputs
from eventtrain.core.optimizer import LightningOptimizer
from eventtrain.core.signals import SignalTable
from eventtrain.core.state import BatchState, Progress, StopRequest
from eventtrain.data.batches import END, Batches
from eventtrain.errors import EvaluationInterrupted, MisconfigurationError, StepSkipped
from eventtrain.events import (
    AfterForward,
    AfterUpdate,
    MetricsLogged,
    RequestStop,
    RunInterrupted,
    SafePoint,
    TakeCheckpoint,
    TrainBatchEnd,
    TrainBatchStart,
    TrainDataEnd,
    TrainEnd,
    TrainEpochEnd,
    TrainEpochStart,
    TrainStart,
)
from eventtrain.metrics.metrics import Metrics


@dataclass(slots=True)
class Extent:
    """How long a run is, and when it validates.

    Attributes:
        max_epochs: Epochs of training; None for no limit.
        max_steps: Updates; None for no limit.
        min_epochs: A request to stop waits until so many epochs are complete.
        min_steps: A request to stop waits until there were so many updates.
        batches_per_epoch: Training batches per epoch, limits counted; None where unknown.
        val_check_interval: Batches between two validations; None for one at the epoch's end.
        check_val_every_n_epoch: Validate in every so many epochs; None: the interval counts the run's
            batches.
    """

    max_epochs: int | None = None
    max_steps: int | None = None
    min_epochs: int = 0
    min_steps: int = 0
    batches_per_epoch: int | None = None
    val_check_interval: int | None = None
    check_val_every_n_epoch: int | None = 1


@dataclass(slots=True)
class Resumption:
    """Where a checkpoint left a run, as far as it is the loop's to find it again.

    Attributes:
        position: Where in its epoch, see :meth:`~eventtrain.data.batches.Batches.position`; None between two epochs.
        epoch_reason: Why the epoch was about to end, None where it was not.
        put_generators_back: Puts all random number generators into the checkpoint's states.
    """

    position: Mapping[str, Any] | None
    epoch_reason: str | None
    put_generators_back: Callable[[], None]


class TrainLoop:
    """Trains a module, automatically or manually.

    Args:
        signals: Where events are published.
        progress: The run's counters.
        batch: The batch at hand.
        stop: Requests to stop.
        metrics: What is logged.
        extent: How long the run is.
        open_epoch: Begins the pass over the training data with a number, at a position.
        data_state: What a checkpoint keeps of the loaders, inside of an epoch or between two.
        training_step: The module's, called as ``training_step(batch, batch_idx)``.
        takes_index: Whether ``training_step`` takes ``batch_idx``.
        closure: The closure of the run; None in manual optimization and without an optimizer.
        optimizer: Its optimizer.
        optimizer_step: The module's overridden ``optimizer_step``, or None.
        validate: Runs a validation; None where there is nothing to validate.
        keep_checkpoint: Has a checkpoint written for a reason; returns its file.
    """

    def __init__(
        self,
        *,
        signals: SignalTable,
        progress: Progress,
        batch: BatchState,
        stop: StopRequest,
        metrics: Metrics,
        extent: Extent,
        open_epoch: Callable[[int, Mapping[str, Any] | None], Batches],
        data_state: Callable[[bool], dict[str, Any]],
        training_step: Callable[..., Any],
        takes_index: bool,
        closure: Closure | None,
        optimizer: LightningOptimizer | None,
        optimizer_step: Callable[..., Any] | None,
        validate: Callable[[], Any] | None,
        keep_checkpoint: Callable[[str], str | None],
    ) -> None:
        self.signals = signals
        self.progress = progress
        self.batch = batch
        self.stop = stop
        self.metrics = metrics
        self.extent = extent
        self.open_epoch = open_epoch
        self.data_state = data_state
        self.training_step = training_step
        self.takes_index = takes_index
        self.closure = closure
        self.optimizer = optimizer
        self.optimizer_step = optimizer_step
        self.validate = validate
        self.keep_checkpoint = keep_checkpoint
        self.is_last_batch = False
        self.batches: Batches | None = None  # of the epoch at hand, or of the one that the run has ended inside of
        self.resumption: Resumption | None = None

    # ------------------------------------------------------------------ run, epoch, batch

    def run(self) -> None:
        """Trains until the run is complete or a request stops it."""
        signals = self.signals
        self.metrics.enter("train", None)
        signals.train_start.publish(TrainStart())
        if self.resumption is not None:
            self.resumption.put_generators_back()
        # A checkpoint of a run's last safe point, inside of an epoch, lies before the end of that epoch.
        self.agree()
        while self.resumes_inside() or not (self.is_complete() or self.is_stopping()):
            self.train_epoch()
        # Once more, because the run may have been asked to stop after its last safe point.
        if signals.take_checkpoint.listeners:
            signals.take_checkpoint.publish(TakeCheckpoint(False, self.batch.window_open))
        signals.train_end.publish(TrainEnd())

    def train_epoch(self) -> None:
        """Trains one epoch, or what a checkpoint written inside of it or the run's end leave of it."""
        progress, stop, resumption = self.progress, self.stop, self.resumption
        self.resumption = None
        position = None if resumption is None else resumption.position
        if position is None:
            progress.batch_idx = -1
        batch_idx = progress.batch_idx
        stop.epoch_reason = None
        self.metrics.enter("train", "epoch")
        self.signals.train_epoch_start.publish(TrainEpochStart(progress.current_epoch, batch_idx + 1))
        batches = self.batches = self.open_epoch(progress.current_epoch, position)
        if resumption is not None and position is not None:
            resumption.put_generators_back()
            stop.epoch_reason = resumption.epoch_reason
            self.is_last_batch = batches.is_last
            # What is left to do for the last batch: a validation that was interrupted, and so the epoch's end.
            if self.validate_if_due(batch_idx, batches.is_last or stop.epoch_reason is not None):
                self.end_epoch()
                return
            if stop.interruption is not None and self.interrupt():  # in that validation, at the same safe point again
                self.leave_epoch()
                return
        max_steps = self.extent.max_steps
        while (max_steps is None or progress.global_step < max_steps) and (stop.reason is None or not self.is_stopping()):
            if stop.epoch_reason is None:
                batch = batches.fetch()
                if batch is END:
                    self.warn_of_no_data(batches)
                    ends_epoch = True
                else:
                    batch_idx += 1
                    ends_epoch = self.train_batch(batch, batch_idx, batches.is_last)
            else:  # requested at a safe point
                ends_epoch = self.validate_if_due(batch_idx, True)
            if ends_epoch:
                self.end_epoch()
                return
            if self.reach_safe_point(epoch_end=False):
                break
        self.leave_epoch()

    def train_batch(self, batch: Any, batch_idx: int, is_last: bool) -> bool:
        """Trains one batch and validates where that is due; returns whether the epoch ends with it."""
        signals, state, progress, metrics = self.signals, self.batch, self.progress, self.metrics
        progress.batch_idx = batch_idx
        progress.total_batch_idx += 1
        self.is_last_batch = is_last
        metrics.batch, metrics.moment = batch, "batch"
        state.batch, state.batch_idx, state.evaluations = batch, batch_idx, 0
        state.skipped = state.updated = False
        if signals.train_batch_start.listeners and self.gate(batch, batch_idx, is_last):
            metrics.moment = "epoch"
            progress.batch_idx -= 1  # it was not trained
            return self.validate_if_due(batch_idx, True)
        if (closure := self.closure) is None:
            self.step_manually(state)
        elif state.plan.step:
            state.window_open = False
            self.step_optimizer(state, closure)
        else:
            state.window_open = True
            closure()
        if state.updated:
            progress.global_step += 1
            if signals.after_update.listeners:
                signals.after_update.publish(AfterUpdate(progress.global_step))
        if is_last and signals.train_data_end.listeners:
            signals.train_data_end.publish(TrainDataEnd(progress.current_epoch))
        if signals.train_batch_end.listeners:
            outputs, loss = detached_outputs(state)
            signals.train_batch_end.publish(TrainBatchEnd(outputs, batch, batch_idx, loss))
        state.loss = state.outputs = None  # the graph ends with the batch
        metrics.moment = "epoch"
        if state.updated and signals.metrics_logged.listeners:
            signals.metrics_logged.publish(MetricsLogged("train", "step", progress.global_step, metrics.take_fresh()))
        if state.processes is not None:
            self.agree()
        ends_epoch = is_last or self.stop.epoch_reason is not None
        return ends_epoch if self.validate is None else self.validate_if_due(batch_idx, ends_epoch)

    def gate(self, batch: Any, batch_idx: int, is_last: bool) -> bool:
        """Lets listeners write the batch's plan; returns whether they end the epoch before it."""
        state = self.batch
        plan = state.plan
        plan.step = plan.zero_grad = True
        plan.loss_scale = 1.0
        plan.weighted = False
        event = TrainBatchStart(batch, batch_idx, is_last, plan)
        self.signals.train_batch_start.publish(event)
        state.plan = event.plan
        if state.processes is not None:
            event.skipped, event.ends_epoch = state.processes.any_of([event.skipped, event.ends_epoch])
        state.skipped = event.skipped
        if event.ends_epoch:
            self.stop.epoch_reason = "a listener of train_batch_start"
        return event.ends_epoch

    # ------------------------------------------------------------------ optimization

    def step_optimizer(self, state: BatchState, closure: Closure) -> None:
        """Automatic optimization of a batch that closes its window."""
        optimizer = self.optimizer
        assert optimizer is not None
        try:
            if self.optimizer_step is None:
                optimizer.step(closure)
            else:
                self.optimizer_step(self.progress.current_epoch, state.batch_idx, optimizer, closure)
        except StepSkipped as skip:  # from a step of the wrapped optimizer, which only the loop can leave
            assert optimizer.run is not None
            optimizer.run.abandon(skip.reason)
        if state.evaluations == 0:
            raise MisconfigurationError(
                f"optimizer_step of the module did not run its closure in batch {state.batch_idx}, nor did "
                f"{type(optimizer.optimizer).__name__}.step, so there was no forward and no backward. Call "
                "`optimizer.step(closure=optimizer_closure)`, or `optimizer_closure()` where nothing is to be updated."
            )

    def step_manually(self, state: BatchState) -> None:
        """Manual optimization: everything happens in ``training_step``. Also a run without optimizers."""
        if state.skipped:
            return
        args = (state.batch, state.batch_idx) if self.takes_index else (state.batch,)
        outputs = forward(self.signals, "train", self.training_step, args)
        if isinstance(outputs, Tensor):
            loss: Tensor | None = outputs
        elif isinstance(outputs, Mapping):
            loss = outputs.get("loss")
        else:
            loss, _ = parse_outputs(outputs)
        if self.signals.after_forward.listeners:
            event = AfterForward("train", state.batch, state.batch_idx, outputs, loss)
            self.signals.after_forward.publish(event)
            outputs, loss = event.outputs, event.loss
        state.outputs, state.loss = outputs, loss

    # ------------------------------------------------------------------ metrics and validation

    def validate_if_due(self, batch_idx: int, ends_epoch: bool) -> bool:
        """Validates after a batch, once, where interval and epoch say so.

        Args:
            batch_idx: The batch's index.
            ends_epoch: Whether the epoch ends with it.

        Returns:
            Whether the epoch ends now: not where the validation was interrupted, which is to be run again before.
        """
        progress = self.progress
        at, before = progress.total_batch_idx, progress.validated_at
        if self.validate is None or at == before or not self.validation_is_due(batch_idx, ends_epoch):
            return ends_epoch
        progress.validated_at = at
        try:
            self.validate()
        except EvaluationInterrupted:
            progress.validated_at = before
            self.agree()
            return False
        finally:
            self.metrics.enter("train", "epoch")
        progress.validations += 1
        self.agree()
        return ends_epoch

    def validation_is_due(self, batch_idx: int, ends_epoch: bool) -> bool:
        """Whether a validation follows a batch. A run that ``max_steps`` ends inside of an epoch gets the one
        that the epoch's end would have had."""
        extent, progress = self.extent, self.progress
        if extent.check_val_every_n_epoch is None:
            assert extent.val_check_interval is not None
            return (progress.total_batch_idx + 1) % extent.val_check_interval == 0
        if (progress.current_epoch + 1) % extent.check_val_every_n_epoch:
            return False
        if extent.val_check_interval is None:
            return ends_epoch or self.has_all_steps()
        if (batch_idx + 1) % extent.val_check_interval == 0:
            return True
        batches = extent.batches_per_epoch
        due_at_end = batches is not None and batches % extent.val_check_interval == 0
        return due_at_end and (self.has_all_steps() or self.stop.epoch_reason is not None)

    # ------------------------------------------------------------------ ends

    def end_epoch(self) -> None:
        """Ends an epoch after its last batch, or after the one at which it was asked to end."""
        assert self.batches is not None
        complete = self.stop.epoch_reason is None
        if self.batches.is_last:
            self.batches.finish()
        self.close_metrics(complete)
        self.batches.close()
        self.batches = None
        self.agree()
        self.progress.epoch_is_over = True  # what a checkpoint written at the safe point says
        self.reach_safe_point(epoch_end=True)
        self.progress.count_epoch()
        self.agree()

    def reach_safe_point(self, *, epoch_end: bool) -> bool:
        """Publish the events of a safe point: state may change, then the run may be ended, then checkpoints are taken.

        Args:
            epoch_end: Whether the epoch is complete.

        Returns:
            Whether the run was interrupted.
        """
        signals, stop, window_open = self.signals, self.stop, self.batch.window_open
        if signals.safe_point.listeners:
            signals.safe_point.publish(SafePoint(epoch_end, window_open))
        if signals.request_stop.listeners:
            signals.request_stop.publish(RequestStop(epoch_end, window_open))
            self.agree()
        if stop.interruption is not None and self.interrupt():
            return True
        if signals.take_checkpoint.listeners:
            signals.take_checkpoint.publish(TakeCheckpoint(epoch_end, window_open))
        return False

    def interrupt(self) -> bool:
        """Have a checkpoint of this safe point written and end the run, if all processes know of the request.

        Returns:
            Whether the run was interrupted.
        """
        stop, reason = self.stop, self.stop.interruption
        if reason is None or not (stop.interrupts or self.batch.processes is None):
            return False
        path = self.keep_checkpoint(reason)
        stop.interrupt(reason)
        self.signals.run_interrupted.publish(RunInterrupted(reason, path))
        return True

    def agree(self) -> None:
        """Lets all processes know what one was asked to end. A request that one makes after its batch's end, at a safe
        point for example, is known to all after the next batch."""
        if self.batch.processes is not None:
            self.stop.agree(self.batch.processes)

    def leave_epoch(self) -> None:
        """Winds down an epoch that the run ends inside of: it is not counted. Its last safe point lies
        behind, so that a checkpoint taken there knows nothing of this."""
        self.close_metrics(complete=False)

    def close_metrics(self, complete: bool) -> None:
        """Publishes ``train_epoch_end``, then the epoch's final values."""
        signals, progress = self.signals, self.progress
        self.metrics.moment = "epoch"
        self.metrics.show_epoch()
        signals.train_epoch_end.publish(TrainEpochEnd(progress.current_epoch))
        self.metrics.moment = None
        values = self.metrics.end_epoch()
        signals.metrics_logged.publish(MetricsLogged("train", "epoch", progress.global_step, values, complete))

    def warn_of_no_data(self, batches: Batches) -> None:
        """An epoch without a single batch: an error where nothing but ``max_steps`` would end the run."""
        message = (
            f"The training loader ({type(batches.loader).__name__}) gave no batch in epoch {self.progress.current_epoch}. Is "
            "it an iterator that is used up? Give a loader that can be iterated anew."
        )
        if self.extent.max_epochs is None:
            raise MisconfigurationError(message)
        warnings.warn(message, stacklevel=2)

    def has_all_steps(self) -> bool:
        """Whether ``max_steps`` is reached."""
        return self.extent.max_steps is not None and self.progress.global_step >= self.extent.max_steps

    def is_complete(self) -> bool:
        """Whether the run has trained all it was to train."""
        return self.has_all_steps() or self.has_all_epochs()

    def has_all_epochs(self) -> bool:
        """Whether ``max_epochs`` is reached."""
        return self.extent.max_epochs is not None and self.progress.epochs_done >= self.extent.max_epochs

    def resumes_inside(self) -> bool:
        """Whether there is an epoch to go on with."""
        return self.resumption is not None and self.resumption.position is not None and not self.has_all_epochs()

    def is_stopping(self) -> bool:
        """Whether a request to stop holds now."""
        stop, progress = self.stop, self.progress
        if stop.reason is None or not (stop.is_agreed or self.batch.processes is None):
            return False
        early = progress.epochs_done < self.extent.min_epochs or progress.global_step < self.extent.min_steps
        return stop.force or not early


def detached_outputs(state: BatchState) -> tuple[Any, Tensor | None]:
    """What ``train_batch_end`` carries: the outputs as a mapping without graphs, and the raw loss."""
    loss = state.loss.detach() if isinstance(state.loss, Tensor) else None
    outputs = state.outputs
    if outputs is None:
        return None, loss
    if isinstance(outputs, Mapping):
        detached = {name: v.detach() if isinstance(v, Tensor) else v for name, v in outputs.items()}
        if loss is not None:
            detached["loss"] = loss
        return detached, loss
    return {"loss": loss}, loss
