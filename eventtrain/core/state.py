"""The state that the parts of a run share: its limits, its counters, the current batch, and requests to end it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from eventtrain.errors import MisconfigurationError
from eventtrain.events import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from eventtrain.distributed import Place, Processes

RunStage = Literal["fit", "validate", "test", "predict"]


@dataclass(slots=True)
class RunLimits:
    """How long a fit is, and when it validates.

    Attributes:
        max_epochs: Epochs of training; None for no limit.
        max_steps: Updates; None for no limit.
        min_epochs: A request to stop waits until this many epochs are complete.
        min_steps: A request to stop waits until there were this many updates.
        batches_per_epoch: Training batches of the current epoch, with ``limit_train_batches`` applied; None if unknown.
        first_epoch_batches: The same for the run's first epoch, from which schedules are estimated.
        is_estimated: Something has asked for this estimate.
        val_check_interval: Batches between two validations; None for one at the epoch's end.
        check_val_every_n_epoch: Epochs between two that validate; None if the interval counts the run's batches.
    """

    max_epochs: int | None = None
    max_steps: int | None = None
    min_epochs: int = 0
    min_steps: int = 0
    batches_per_epoch: int | None = None
    first_epoch_batches: int | None = None
    is_estimated: bool = False
    val_check_interval: int | None = None
    check_val_every_n_epoch: int | None = 1


@dataclass(slots=True)
class Progress:
    """The counters of a fit. Checkpoints keep them.

    Attributes:
        current_epoch: Epochs of training completed. Counted after the epoch's ``take_checkpoint``.
        global_step: Batches of the run in which at least one optimizer updated. Counted once a batch's optimization is over,
            right before ``after_update``.
        batch_idx: The index of the current batch in its epoch, or of the last one; -1 before an epoch's first.
        total_batch_idx: The index of the current batch in the run, or of the last one; -1 before the first.
        validations: Completed validations of the run, without sanity checks.
        validated_at: ``total_batch_idx`` of the batch after which the last validation ran, or runs.
        epoch_is_over: The current epoch has ended and is about to be counted: true at its ``safe_point``.
    """

    current_epoch: int = 0
    global_step: int = 0
    batch_idx: int = -1
    total_batch_idx: int = -1
    validations: int = 0
    validated_at: int = -1
    epoch_is_over: bool = False

    @property
    def epochs_done(self) -> int:
        """Epochs of training completed, also right at the safe point of the last of them."""
        return self.current_epoch + self.epoch_is_over

    def count_epoch(self) -> None:
        """Count the epoch that is over."""
        self.current_epoch += 1
        self.epoch_is_over = False


@dataclass(slots=True)
class BatchState:
    """The current training batch, and its accumulation window. One object for a run: loop, closure and optimizers read and
    write it, so that none of them knows another.

    Attributes:
        automatic: The run optimizes automatically.
        batch: The batch.
        batch_idx: Its index in the epoch.
        plan: What it does to its window.
        skipped: A listener made it a batch without a loss.
        evaluations: How often the closure has run in this batch.
        outputs: The value that ``training_step`` returned.
        loss: The raw loss with its graph; None if the batch has none.
        under_way: A batch is being trained: its updates are counted at its end, and others at once.
        closing: The loop closes the window: a step is the loop's. All others are steps of the user's own.
        updated: An optimizer has updated in this batch.
        skip_reason: Why the last step that was skipped was; None if none was in this epoch.
        had_loss: A batch of this epoch had a loss.
        window_open: The last batch that was trained left its window open: gradients are held.
        contributions: Batches of the open window that had a loss.
        weight: The sum of their weights; None if they have none.
        weight_reference: The run's first weight; 1 if that is 0.
        processes: The processes that have to agree; None in a run of one.
        count_update: Counts an update that no batch counts.
    """

    automatic: bool = True
    batch: Any = None
    batch_idx: int = 0
    plan: Plan = field(default_factory=Plan)
    skipped: bool = False
    evaluations: int = 0
    outputs: Any = None
    loss: Tensor | None = None
    under_way: bool = False
    closing: bool = False
    updated: bool = False
    skip_reason: str | None = None
    had_loss: bool = False
    window_open: bool = False
    contributions: int = 0
    weight: Tensor | float | None = None
    weight_reference: Tensor | float | None = None
    processes: Processes | None = None
    count_update: Callable[[], None] = field(init=False)

    def contribute(self, weight: Tensor | float | None) -> None:
        """Count the current batch into its window.

        Args:
            weight: The ``"weight"`` that ``training_step`` returned; None if it returned none.

        Raises:
            MisconfigurationError: If some batches of the window carry a weight and others do not.
        """
        if self.contributions == 0:
            self.weight = None
        elif (weight is None) != (self.weight is None):
            raise MisconfigurationError(
                f"training_step returned {'no ' if weight is None else 'a '}'weight' for batch {self.batch_idx}, "
                "unlike for the batches before it in the same accumulation window. Return one for every batch, or none."
            )
        if weight is not None:
            self.weight = weight if self.weight is None else self.weight + weight
            if self.weight_reference is None:
                self.weight_reference = nonzero(weight if self.processes is None else self._first_process_weight(weight))
        self.contributions += 1

    def _first_process_weight(self, weight: Any) -> Any:
        assert self.processes is not None
        first = self.processes.broadcast(weight)
        return first.to(weight.device) if hasattr(weight, "to") and hasattr(first, "to") else first


def nonzero(weight: Tensor | float) -> Any:
    """Return a weight that can be divided by: the weight, or 1 if it is 0. Reads nothing from a tensor's device."""
    if isinstance(weight, (int, float)):
        return weight or 1.0
    return weight.masked_fill(weight == 0, 1)


@dataclass(slots=True)
class StopRequest:
    """The requests to end the run, its epoch or an evaluation: those that hold in all processes, or those of this process. In
    a run of one process they are one object.

    Attributes:
        reason: Why the run is to stop; None if it is not.
        force: The request does not wait for ``min_epochs`` and ``min_steps``.
        at_once: An evaluation in the fit is left at its next batch.
        epoch_reason: Why the current epoch is to end; None if it is not.
        interruption: Why the run is to be interrupted at its next safe point; None if it is not.
    """

    reason: str | None = None
    force: bool = False
    at_once: bool = False
    epoch_reason: str | None = None
    interruption: str | None = None

    def take_up(self, mine: StopRequest, processes: Processes, place: Place, ends_epoch: bool) -> bool:
        """Take up the requests that hold from here on in all processes.

        Args:
            mine: The requests of this process.
            processes: The processes.
            place: The kind of place in the run, see :meth:`~eventtrain.distributed.Processes.agree`.
            ends_epoch: Whether a listener of this process ends the epoch before the current batch.

        Returns:
            Whether ``ends_epoch`` holds in all processes. If it holds in some, they end the epoch after the batch.
        """
        asked = [
            mine.reason is not None and self.reason is None,
            mine.force and not self.force,
            mine.at_once and not self.at_once,
            mine.epoch_reason is not None and self.epoch_reason is None,
            mine.interruption is not None and self.interruption is None,
            ends_epoch,
        ]
        holding = processes.agree(asked, place)
        if True not in holding:
            return False
        stops, forces, at_once, ends, interrupts, ends_before = holding
        elsewhere = "another process asked for it"
        if stops:
            self.reason = mine.reason = mine.reason or elsewhere
        if ends or ends_before:
            gate = "a listener of train_batch_start"
            self.epoch_reason = mine.epoch_reason = mine.epoch_reason or (gate if ends_before else elsewhere)
        if interrupts:
            self.interruption = mine.interruption = mine.interruption or elsewhere
        self.force, self.at_once = self.force or forces, self.at_once or at_once
        return ends_before
