"""The training loop. It reads like the loop map in the README, and only publishes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from eventtrain import events
from eventtrain.core.closure import Closure, after_forward, forward, never_returns_a_value, parse_outputs
from eventtrain.core.interfaces import END, Batches, LoggedValues
from eventtrain.core.signals import SignalTable
from eventtrain.core.state import BatchState, Progress, RunLimits, StopRequest
from eventtrain.distributed import Place
from eventtrain.errors import EvaluationInterrupted, MisconfigurationError, StepSkipped

# Built once, since there is one in every batch and no listener writes to it.
IN_WINDOW = events.SafePoint(epoch_end=False, window_open=True)
BETWEEN_WINDOWS = events.SafePoint(epoch_end=False, window_open=False)


@dataclass(slots=True)
class Resumption:
    """The place in the training data at which a checkpoint was written.

    Attributes:
        position: The position in its epoch, see :meth:`~eventtrain.data.batches.LoaderPass.position`; None between two epochs.
        epoch_reason: Why the epoch was about to end; None if it was not.
        restore_last: Restores what hooks at the start of the run or of the epoch may change: all random number generators,
            and the module's flags.
    """

    position: Mapping[str, Any] | None
    epoch_reason: str | None
    restore_last: Callable[[], None]


@dataclass(kw_only=True, eq=False)
class TrainLoop:
    """Trains a module, automatically or manually.

    Args:
        signals: The signals on which events are published.
        progress: The counters of the fit.
        batch: The current batch.
        stop: The requests to stop that hold in all processes.
        mine: Those of this process; in a run of one process the same object.
        metrics: The values that the module logs.
        limits: How long the fit is.
        open_epoch: Begins the pass over the training data for an epoch, at a position.
        training_step: The module's, called as ``training_step(batch, batch_idx)``.
        takes_index: Whether ``training_step`` takes ``batch_idx``.
        closure: The closure of the run; None in manual optimization and without an optimizer.
        optimizer_step: The module's overridden ``optimizer_step``, or None.
        validate: Runs a validation; None if there is nothing to validate.
        keep_checkpoint: Has a checkpoint written for a reason; returns its file.

    Attributes:
        is_last_batch: The current batch is its epoch's last.
        batches: The pass over the training data of the current epoch, or of the one that the run has ended in.
        resumption: The place that the next epoch continues from; None for its beginning.
        known_request: The request to stop, as it was at the last safe point; None before the first.
        steps_before_epoch: ``global_step`` at the current epoch's beginning; None if the run resumed in it.
    """

    signals: SignalTable
    progress: Progress
    batch: BatchState
    stop: StopRequest
    mine: StopRequest
    metrics: LoggedValues
    limits: RunLimits
    open_epoch: Callable[[int, Mapping[str, Any] | None], Batches]
    training_step: Callable[..., Any]
    takes_index: bool
    closure: Closure | None
    optimizer_step: Callable[..., Any] | None
    validate: Callable[[], Any] | None
    keep_checkpoint: Callable[[str], str | None]
    is_last_batch: bool = False
    batches: Batches | None = None
    resumption: Resumption | None = None
    known_request: tuple[str | None, bool] | None = None
    steps_before_epoch: int | None = None

    def __post_init__(self) -> None:
        self.batch.count_update = self.count_update

    # ------------------------------------------------------------------ fit, epoch, batch

    def train(self) -> None:
        """Train until the run is complete or a request stops it."""
        signals = self.signals
        self.metrics.enter("train", "start")
        signals.train_start.publish(events.TrainStart())
        if self.resumption is not None:
            self.resumption.restore_last()
        # A checkpoint of a run's last safe point in an epoch was written before the end of that epoch.
        self.agree("meeting")
        while self.resumes_in_epoch() or not (self.is_complete() or self.is_stopping()):
            self.train_epoch()
        self.agree("meeting")  # nobody leaves before all have passed the last place at which one may ask
        if self.known_request not in (None, (self.stop.reason, self.stop.force)) and signals.take_checkpoint.listeners:
            # The run was asked to stop after its last safe point, at which no listener knew of its end.
            signals.take_checkpoint.publish(events.TakeCheckpoint(False, self.batch.window_open))
        self.metrics.enter("train", None)
        signals.train_end.publish(events.TrainEnd())

    def train_epoch(self) -> None:
        """Train an epoch: all of it, or the rest after the checkpoint that the run resumes from."""
        progress, stop, signals, max_steps = self.progress, self.stop, self.signals, self.limits.max_steps
        several = self.batch.processes is not None
        batches, ends_epoch = self.begin_epoch()
        while ends_epoch or (
            (max_steps is None or progress.global_step < max_steps) and (stop.reason is None or not self.is_stopping())
        ):
            if ends_epoch:
                pass  # its last batch was trained before the checkpoint
            elif stop.epoch_reason is not None:  # requested at a safe point
                ends_epoch = self.validate_if_due(progress.batch_idx, True)
            elif (batch := batches.fetch()) is END:
                ends_epoch = self.end_data(batches)
            else:
                ends_epoch = self.train_batch(batch, progress.batch_idx + 1, batches.is_last)
            if ends_epoch:
                self.end_epoch(batches)
            if signals.safe_point.listeners:
                safe_point = IN_WINDOW if self.batch.window_open else BETWEEN_WINDOWS
                signals.safe_point.publish(events.SafePoint(True, self.batch.window_open) if ends_epoch else safe_point)
            if signals.request_stop.listeners:
                signals.request_stop.publish(events.RequestStop(ends_epoch, self.batch.window_open))
            if several and (signals.safe_point.listeners or signals.request_stop.listeners):
                self.agree("in_between")
            self.known_request = stop.reason, stop.force
            interrupted = stop.interruption is not None and self.interrupt()  # takes a checkpoint too
            if signals.take_checkpoint.listeners and not interrupted:
                signals.take_checkpoint.publish(events.TakeCheckpoint(ends_epoch, self.batch.window_open))
            if ends_epoch:
                progress.count_epoch()
            if several and (ends_epoch or signals.take_checkpoint.listeners):
                self.agree("in_between")
            if ends_epoch:
                return
        # An epoch that the run ends in is not counted. A checkpoint of its last safe point knows nothing of this.
        self.close_metrics(complete=False)

    def begin_epoch(self) -> tuple[Batches, bool]:
        """Open the training data at the epoch's beginning, or at the batch that a checkpoint was written after.

        Returns:
            The pass over the data, and whether nothing is left of the epoch but its end.
        """
        progress, stop, resumption = self.progress, self.stop, self.resumption
        self.resumption = None
        position = None if resumption is None else resumption.position
        self.steps_before_epoch = None
        if position is None:
            progress.batch_idx, self.steps_before_epoch = -1, progress.global_step
        stop.epoch_reason = self.mine.epoch_reason = self.batch.skip_reason = None
        self.batch.had_loss = False
        self.metrics.enter("train", "start")
        self.signals.train_epoch_start.publish(events.TrainEpochStart(progress.current_epoch, progress.batch_idx + 1))
        self.agree("meeting")
        if (processes := self.batch.processes) is not None:
            listeners = self.signals.before_optimizer_step.attached()
            self.batch.agrees_on_vetoes = processes.any(not all(getattr(each, "decides_alike", False) for each in listeners))
        batches = self.batches = self.open_epoch(progress.current_epoch, position)
        if resumption is None or position is None:
            return batches, False
        resumption.restore_last()
        stop.epoch_reason = resumption.epoch_reason or stop.epoch_reason
        self.is_last_batch = batches.is_last
        # A validation that was interrupted is left to do for the last batch, and then the epoch's end.
        ends_epoch = self.validate_if_due(progress.batch_idx, batches.is_last or stop.epoch_reason is not None)
        self.interrupt()  # at the same safe point again, if that validation was interrupted once more
        return batches, ends_epoch

    def train_batch(self, batch: Any, batch_idx: int, is_last: bool) -> bool:
        """Train one batch, and validate if that is due; return whether the epoch ends with it."""
        signals, state, progress, metrics = self.signals, self.batch, self.progress, self.metrics
        progress.batch_idx = batch_idx
        progress.total_batch_idx += 1
        self.is_last_batch = is_last
        metrics.batch, metrics.batch_size, metrics.scope = batch, None, "batch"
        state.batch, state.batch_idx, state.evaluations = batch, batch_idx, 0
        state.skipped = state.updated = False
        state.under_way = True
        if signals.train_batch_start.listeners and self.gate(batch, batch_idx, is_last):
            metrics.scope = "epoch"
            progress.batch_idx -= 1  # it was not trained
            state.under_way = False
            if state.updated:
                self.count_update()
            return self.validate_if_due(batch_idx, True)
        if (closure := self.closure) is None:
            self.step_manually(state)
        elif state.plan.step:
            state.window_open, state.closing = False, True
            self.step_optimizer(state, closure)
            state.closing = False
        else:
            state.window_open = True
            closure()
        if updated := state.updated:
            progress.global_step += 1
            if signals.after_update.listeners:
                signals.after_update.publish(events.AfterUpdate(progress.global_step))
        elif progress.total_batch_idx == 0:
            self.warn_of_no_loss()
        if is_last and signals.train_data_end.listeners:
            signals.train_data_end.publish(events.TrainDataEnd(progress.current_epoch))
        if signals.train_batch_end.listeners:
            outputs, loss = detached_outputs(state)
            signals.train_batch_end.publish(events.TrainBatchEnd(outputs, batch, batch_idx, loss))
        state.loss = state.outputs = None  # the graph ends with the batch
        metrics.scope = "epoch"
        state.under_way = False
        if state.updated and not updated:  # in a listener of train_data_end or train_batch_end
            self.count_update()
        elif updated and signals.metrics_logged.listeners:
            signals.metrics_logged.publish(events.MetricsLogged("train", "step", progress.global_step, metrics.take_fresh()))
        if state.processes is not None:
            self.agree("batch_end")
        ends_epoch = is_last or self.stop.epoch_reason is not None
        return ends_epoch if self.validate is None else self.validate_if_due(batch_idx, ends_epoch)

    def gate(self, batch: Any, batch_idx: int, is_last: bool) -> bool:
        """Let listeners write the batch's plan; return whether they end the epoch before it."""
        state = self.batch
        plan = state.plan
        plan.step = plan.zero_grad = True
        plan.loss_scale = 1.0
        plan.weighted = False
        event = events.TrainBatchStart(batch, batch_idx, is_last, plan)
        self.signals.train_batch_start.publish(event)
        state.plan = event.plan
        state.skipped = event.skipped
        if state.processes is not None:
            return self.agree("in_between", event.ends_epoch)
        if event.ends_epoch:
            self.stop.epoch_reason = "a listener of train_batch_start"
        return event.ends_epoch

    # ------------------------------------------------------------------ optimization

    def step_optimizer(self, state: BatchState, closure: Closure) -> None:
        """Optimize a batch that closes its window, automatically."""
        optimizer = closure.stepping.optimizer
        try:
            if self.optimizer_step is None:
                optimizer.step(closure)
            else:
                self.optimizer_step(self.progress.current_epoch, state.batch_idx, optimizer, closure)
        except StepSkipped as skip:  # from a step of the wrapped optimizer, which only the loop can leave
            closure.stepping.abandon(skip.reason)
        if state.evaluations == 0:
            raise MisconfigurationError(
                f"optimizer_step of the module did not run its closure in batch {state.batch_idx}, nor did "
                f"{type(optimizer.optimizer).__name__}.step, so there was no forward and no backward. Call "
                "`optimizer.step(closure=optimizer_closure)`, or `optimizer_closure()` if nothing is to be updated."
            )

    def step_manually(self, state: BatchState) -> None:
        """Run ``training_step`` in manual optimization, in which it does everything; also in a run without optimizers."""
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
            outputs, loss = after_forward(self.signals, "train", state.batch, state.batch_idx, outputs, loss)
        state.outputs, state.loss = outputs, loss

    def count_update(self) -> None:
        """Count an update that comes after its batch's optimization or outside the batches, as in ``on_train_epoch_end``."""
        self.progress.global_step = step = self.progress.global_step + 1
        self.signals.after_update.publish(events.AfterUpdate(step))
        self.signals.metrics_logged.publish(events.MetricsLogged("train", "step", step, self.metrics.take_fresh()))

    # ------------------------------------------------------------------ validation

    def validate_if_due(self, batch_idx: int, ends_epoch: bool) -> bool:
        """Validate after a batch, once, if interval and epoch say so.

        Args:
            batch_idx: The batch's index.
            ends_epoch: Whether the epoch ends with it.

        Returns:
            Whether the epoch ends now. It does not if the validation was interrupted: a resumed run repeats it first.
        """
        progress = self.progress
        current, before = progress.total_batch_idx, progress.validated_at
        if self.validate is None or current == before or not self.validation_is_due(batch_idx, ends_epoch):
            return ends_epoch
        progress.validated_at = current
        try:
            self.validate()
        except EvaluationInterrupted:
            progress.validated_at = before
            self.agree("meeting")
            return False
        finally:
            self.metrics.enter("train", "epoch")
        progress.validations += 1
        self.agree("meeting")
        return ends_epoch

    def validation_is_due(self, batch_idx: int, ends_epoch: bool) -> bool:
        """Return whether a validation follows a batch. If ``max_steps`` ends the run in an epoch, the validation of that
        epoch's end is due."""
        limits, progress = self.limits, self.progress
        if limits.check_val_every_n_epoch is None:
            assert limits.val_check_interval is not None
            return (progress.total_batch_idx + 1) % limits.val_check_interval == 0
        if (progress.current_epoch + 1) % limits.check_val_every_n_epoch:
            return False
        if limits.val_check_interval is None:
            return ends_epoch or self.has_all_steps()
        if (batch_idx + 1) % limits.val_check_interval == 0:
            return True
        batches = limits.batches_per_epoch
        due_at_end = batches is not None and batches % limits.val_check_interval == 0
        return due_at_end and (self.has_all_steps() or self.stop.epoch_reason is not None)

    # ------------------------------------------------------------------ ends

    def end_data(self, batches: Batches) -> bool:
        """Do what is due after an epoch's last batch if it was not known to be the last; return whether the epoch ends."""
        if self.progress.batch_idx < 0:
            self.warn_of_no_data(batches)
            return True
        if not self.is_last_batch:
            self.is_last_batch = True
            self.signals.train_data_end.publish(events.TrainDataEnd(self.progress.current_epoch))
        return self.validate_if_due(self.progress.batch_idx, True)

    def end_epoch(self, batches: Batches) -> None:
        """End an epoch after its last batch, or after the batch at which it was asked to end."""
        complete = self.stop.epoch_reason is None
        if batches.is_last:
            batches.finish()
        self.close_metrics(complete)
        batches.close()
        self.batches = None
        self.agree("meeting")
        if self.progress.global_step == self.steps_before_epoch:
            self.report_no_update()
        self.progress.epoch_is_over = True  # for a checkpoint that is written at the safe point

    def close_metrics(self, complete: bool) -> None:
        """Publish ``train_epoch_end``, then the epoch's final values."""
        signals, progress = self.signals, self.progress
        self.metrics.scope = "epoch"
        self.metrics.show_epoch()
        signals.train_epoch_end.publish(events.TrainEpochEnd(progress.current_epoch))
        self.metrics.scope = None
        values = self.metrics.end_epoch()
        signals.metrics_logged.publish(events.MetricsLogged("train", "epoch", progress.global_step, values, complete))

    def interrupt(self) -> bool:
        """Have a checkpoint of this safe point written and stop, if the run is to be interrupted.

        Returns:
            Whether the run was interrupted.
        """
        stop, reason = self.stop, self.stop.interruption
        if reason is None:
            return False
        path = self.keep_checkpoint(reason)
        stop.reason = self.mine.reason = reason
        stop.force = True
        self.known_request = reason, True
        self.signals.run_interrupted.publish(events.RunInterrupted(reason, path))
        return True

    def agree(self, place: Place, ends_epoch: bool = False) -> bool:
        """Take up the requests that hold from here on, see :meth:`StopRequest.take_up`."""
        processes = self.batch.processes
        return processes is not None and self.stop.take_up(self.mine, processes, place, ends_epoch)

    def warn_of_no_data(self, batches: Batches) -> None:
        """Warn of an epoch without a single batch; raise if nothing but ``max_steps`` would end the run."""
        message = (
            f"The training loader ({type(batches.loader).__name__}) gave no batch in epoch {self.progress.current_epoch}: "
            f"nothing was trained. {batches.why_empty()}"
        )
        if self.limits.max_epochs is None:
            raise MisconfigurationError(message)
        warnings.warn(message, stacklevel=2)

    def warn_of_no_loss(self) -> None:
        """Warn if ``training_step`` forgets its loss in the run's first batch."""
        if self.closure is not None and not self.batch.had_loss and never_returns_a_value(self.training_step):
            warnings.warn(
                "training_step returned None in the first batch, and has no other `return`: nothing is trained. Write `return "
                "loss` at its end.",
                stacklevel=2,
            )

    def report_no_update(self) -> None:
        """Raise if nothing was updated in an epoch and nothing but ``max_steps`` would end the run; warn of an epoch without
        a loss."""
        state, limits, epoch = self.batch, self.limits, self.progress.current_epoch
        no_loss = self.closure is not None and not state.had_loss and self.progress.batch_idx >= 0
        if self.stop.epoch_reason is not None:
            cause = f"it was ended ({self.stop.epoch_reason})"
        elif no_loss:
            cause = "none of its batches had a loss, which training_step has to return"
        elif state.skip_reason is not None:
            cause = f"its steps were skipped ({state.skip_reason})"
        else:
            cause = "no optimizer was stepped"
        message = f"Nothing was trained in epoch {epoch}: {cause}."
        endless = limits.max_epochs is None and limits.max_steps is not None and not self.is_stopping()
        # An open window may step in the next epoch, and loss scaling ends a run itself that only overflows.
        if endless and not state.window_open and state.skip_reason != "overflow":
            raise MisconfigurationError(
                f"{message} max_steps={limits.max_steps} would never be reached. Give Trainer(max_epochs=...) too if an "
                "epoch may pass without an update."
            )
        if no_loss:
            warnings.warn(message, stacklevel=2)

    def has_all_steps(self) -> bool:
        """Return whether ``max_steps`` is reached."""
        return self.limits.max_steps is not None and self.progress.global_step >= self.limits.max_steps

    def has_all_epochs(self) -> bool:
        """Return whether ``max_epochs`` is reached."""
        return self.limits.max_epochs is not None and self.progress.epochs_done >= self.limits.max_epochs

    def is_complete(self) -> bool:
        """Return whether the run has trained everything that it was to train."""
        return self.has_all_steps() or self.has_all_epochs()

    def resumes_in_epoch(self) -> bool:
        """Return whether a checkpoint was written in an epoch that the run is to continue."""
        return self.resumption is not None and self.resumption.position is not None and not self.has_all_epochs()

    def is_stopping(self) -> bool:
        """Return whether a request to stop holds now."""
        stop, progress = self.stop, self.progress
        if stop.reason is None:
            return False
        early = progress.epochs_done < self.limits.min_epochs or progress.global_step < self.limits.min_steps
        return not early or stop.force


def detached_outputs(state: BatchState) -> tuple[Any, Tensor | None]:
    """Return the outputs of a batch as a mapping without graphs, and its raw loss, for ``train_batch_end``."""
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
