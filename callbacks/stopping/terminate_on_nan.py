"""End a run if its loss is infinite or NaN, without waiting for the device in each step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from eventtrain.callback import Callback
from eventtrain.checks import check_whole_number
from eventtrain.errors import MisconfigurationError
from eventtrain.events import BeforeBackward, FitStart, SafePoint, SaveCheckpoint, TrainEpochEnd
from eventtrain.trainer import Trainer

NAMED = 8  # parameters that the error names


class NonFiniteLossError(MisconfigurationError, FloatingPointError):
    """A training loss is infinite or NaN."""


class Loss(NamedTuple):
    """A loss, and its place in the run.

    Attributes:
        value: A scalar tensor.
        epoch: The epoch's index.
        batch_idx: The batch's index in the epoch.
        updates: The number of the run's updates before it.
        backward: The number of its backward in the batch, from 1.
    """

    value: Tensor
    epoch: int
    batch_idx: int
    updates: int
    backward: int


class TerminateOnNaN(Callback):
    """Raises :class:`NonFiniteLossError` once a training loss is infinite or NaN, and names the first such loss.

    Listens to ``before_backward`` for the raw loss; in manual optimization, for the loss of each backward. Never looks at
    gradients, which loss scaling may make infinite.

    On the CPU it looks at each loss before its backward, so that the loss has updated nothing. On other devices a look has to
    wait for the device: the losses stay there, and it looks at all of them together, every ``every_n_batches`` at
    ``safe_point``, and at ``train_epoch_end``. It does the same with several processes; if one of them finds a bad loss, all
    raise after the next batch. No checkpoint is
    written after a bad loss, in any order of attachment: it looks at ``save_checkpoint`` too, and raises until another fit
    begins. Also listens to ``fit_start``. Emits nothing.

    The error names the epoch, the batch, the number of updates and the value of the loss, and the parameters and buffers
    that are not finite by then. Override :meth:`ends_run` to end a run by other losses.

    Args:
        every_n_batches: Batches between two looks, if a look has to wait. With 1 it looks at each loss before its backward on
            any device.

    Raises:
        MisconfigurationError: If the number of batches is less than 1.

    Example:
        >>> class EndsAbove(TerminateOnNaN):
        ...     def ends_run(self, loss):
        ...         return super().ends_run(loss) or loss > 1e6
        >>> trainer = Trainer(max_epochs=90, callbacks=[EndsAbove(every_n_batches=100)])
    """

    def __init__(self, *, every_n_batches: int = 50) -> None:
        self.every_n_batches = check_whole_number(every_n_batches, "TerminateOnNaN", "every_n_batches", least=1)
        self._at_once = False
        self._pending: list[Loss] = []  # the losses since the last look
        self._last: tuple[int, int] = (-1, 0)  # the batch of the last loss, and its backwards so far
        self._bad: tuple[Loss, float] | None = None  # a bad loss that the other processes do not know of
        self._error: str | None = None

    def ends_run(self, loss: float) -> bool:
        """Decide whether a loss ends the run.

        Args:
            loss: Its value.

        Returns:
            Whether it ends the run; here if it is infinite or NaN.
        """
        return not math.isfinite(loss)

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        self._at_once = trainer.world_size == 1 and (self.every_n_batches == 1 or trainer.device.type == "cpu")
        self._pending.clear()
        self._last, self._bad, self._error = (-1, 0), None, None

    def on_before_backward(self, trainer: Trainer, event: BeforeBackward) -> None:
        # Later evaluations of an optimizer's closure are trials, which the optimizer may take back.
        if event.evaluation > 1:
            return
        progress = trainer.progress
        batch, backwards = self._last
        backwards = backwards + 1 if batch == progress.total_batch_idx else 1
        self._last = (progress.total_batch_idx, backwards)
        value = event.raw_loss.detach().sum()  # a copy, because a captured graph overwrites its loss at its next step
        loss = Loss(value, progress.current_epoch, progress.batch_idx, progress.global_step, backwards)
        if not self._at_once:
            self._pending.append(loss)
        elif self.ends_run(number := value.item()):
            self._end(trainer, loss, number)

    def on_safe_point(self, trainer: Trainer, event: SafePoint) -> None:
        if (trainer.progress.total_batch_idx + 1) % self.every_n_batches == 0:
            self._look(trainer)
            if self._bad is None:
                return
            if trainer.world_size == 1:
                self._end(trainer, *self._bad)
            trainer.stop("TerminateOnNaN: a loss is not finite", force=True)  # then all look, and raise

    def on_train_epoch_end(self, trainer: Trainer, event: TrainEpochEnd) -> None:
        self._look_together(trainer)

    def on_save_checkpoint(self, trainer: Trainer, event: SaveCheckpoint) -> None:
        if self._error is not None:  # a checkpoint after the error
            raise NonFiniteLossError(self._error)
        self._look_together(trainer)

    def _look(self, trainer: Trainer) -> None:
        """Read the losses since the last look, and note the first bad one."""
        losses, self._pending = self._pending, []
        values = torch.stack([loss.value.to(trainer.device) for loss in losses]).tolist() if losses else []
        self._bad = self._bad or next((pair for pair in zip(losses, values, strict=True) if self.ends_run(pair[1])), None)

    def _look_together(self, trainer: Trainer) -> None:
        """End the run if a loss since the last look does, in any process."""
        self._look(trainer)
        if trainer.processes.any(self._bad is not None):
            self._end(trainer, *(self._bad or (None, math.nan)))

    def _end(self, trainer: Trainer, loss: Loss | None, value: float) -> None:
        elsewhere = "TerminateOnNaN: a loss of another process is not finite. See the error of that process."
        self._error = elsewhere if loss is None else describe(trainer, loss, value)
        raise NonFiniteLossError(self._error)


def describe(trainer: Trainer, loss: Loss, value: float) -> str:
    """Return the error message for a bad loss.

    Args:
        trainer: The trainer.
        loss: The first bad loss.
        value: Its value.
    """
    of = "" if trainer.module.automatic_optimization else f" of backward {loss.backward}"
    bad = non_finite(trainer.module)
    named = ", ".join(bad[:NAMED]) + (f" and {len(bad) - NAMED} more" if len(bad) > NAMED else "")
    others = f"Not finite by now: {named}." if bad else "All parameters are finite: look at the batch and at forward."
    return (
        f"TerminateOnNaN: the loss{of} in batch {loss.batch_idx} of epoch {loss.epoch}, after {loss.updates} updates, is "
        f"{value}. {others} Try a smaller learning rate, a warm-up or GradientClipping. To find the operation, resume "
        "from the last checkpoint with TerminateOnNaN(every_n_batches=1), which stops before that backward, and "
        "torch.autograd.set_detect_anomaly(True), which names the operation of a backward that gives NaN."
    )


def non_finite(module: nn.Module) -> list[str]:
    """Return the parameters with values that are not finite and the buffers with NaNs, as ``name (3 of 8 values)``.

    Args:
        module: The module. Infinities in its buffers are allowed, because masks have them.
    """
    bad = {name: ~parameter.isfinite() for name, parameter in module.named_parameters() if not is_lazy(parameter)}
    bad |= {name: buffer.isnan() for name, buffer in module.named_buffers() if not is_lazy(buffer)}
    counts = {name: int(values.sum()) for name, values in bad.items()}
    return [f"{name} ({count} of {bad[name].numel()} values)" for name, count in counts.items() if count]
