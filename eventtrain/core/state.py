"""What the parts of a run share: counters, the batch at hand, requests to stop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from eventtrain.errors import MisconfigurationError
from eventtrain.events import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from eventtrain.distributed import Processes


@dataclass(slots=True)
class Progress:
    """The counters of a run; they are kept in checkpoints.

    Attributes:
        current_epoch: Epochs of training completed. Counted after an epoch's ``safe_point``.
        global_step: Batches of the run in which at least one optimizer updated. Counted once a batch's
            optimization is over, right before ``after_update``.
        batch_idx: The index in its epoch of the batch at hand, or of the last one; -1 before an epoch's first.
        total_batch_idx: Batches of the run whose training began, the one at hand included, less one.
        validations: Validations of the run completed, sanity checks not counted.
        validated_at: ``total_batch_idx`` of the batch after which the last validation ran, or runs.
        epoch_is_over: The epoch at hand has ended and is about to be counted: so it is at its ``safe_point``.
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
        """Epochs of training completed, also at the safe point of the last of them."""
        return self.current_epoch + self.epoch_is_over

    def count_epoch(self) -> None:
        """Counts the epoch that is over."""
        self.current_epoch += 1
        self.epoch_is_over = False


@dataclass(slots=True)
class BatchState:
    """The training batch at hand, and the accumulation window that it belongs to. One object for a run:
    loop, closure, optimizers and metrics read and write it, so that none of them knows another.

    Attributes:
        automatic: The run optimizes automatically.
        batch: The batch.
        batch_idx: Its index in the epoch.
        plan: What it does to its window.
        skipped: A listener made it a batch without a loss.
        evaluations: How often the closure has run in this batch.
        outputs: What ``training_step`` returned.
        loss: The raw loss with its graph, None where there is none.
        updated: An optimizer has updated in this batch.
        window_open: The last batch that was trained left its window open: gradients are held.
        contributions: Batches of the open window that had a loss.
        weight: The sum of their weights, None where they carry none.
        weight_reference: The run's first weight; 1 where that is 0.
        processes: The processes that have to agree; None in a run of one, which has nobody to ask.
    """

    automatic: bool = True
    batch: Any = None
    batch_idx: int = 0
    plan: Plan = field(default_factory=Plan)
    skipped: bool = False
    evaluations: int = 0
    outputs: Any = None
    loss: Tensor | None = None
    updated: bool = False
    window_open: bool = False
    contributions: int = 0
    weight: Tensor | float | None = None
    weight_reference: Tensor | float | None = None
    processes: Processes | None = None

    def contribute(self, weight: Tensor | float | None) -> None:
        """Counts the batch at hand into the window.

        Args:
            weight: What ``training_step`` returned as ``"weight"``, None where it returned none.

        Raises:
            MisconfigurationError: Some batches of the window carry a weight and others do not.
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
                self.weight_reference = nonzero(weight if self.processes is None else self.agreed(weight))
        self.contributions += 1

    def agreed(self, weight: Any) -> Any:
        """Rank zero's first weight."""
        assert self.processes is not None
        agreed = self.processes.broadcast(weight)
        return agreed.to(weight.device) if hasattr(weight, "to") and hasattr(agreed, "to") else agreed


def nonzero(weight: Tensor | float) -> Any:
    """A weight to divide by: itself, or 1 where it is 0. Of a tensor without asking its device."""
    if isinstance(weight, (int, float)):
        return weight or 1.0
    return weight.masked_fill(weight == 0, 1)


@dataclass(slots=True)
class StopRequest:
    """A request to end the run or the epoch.

    Attributes:
        reason: Why the run is to stop; None where it is not.
        force: The request does not wait for ``min_epochs`` and ``min_steps``.
        at_once: An evaluation inside of a fit is left at its next batch.
        epoch_reason: Why the epoch at hand is to end; None where it is not.
        is_agreed: All processes know of the request; where there is one process it has nobody to tell.
        interruption: Why the run is to be interrupted at its next safe point; None if it is not.
        interrupts: All processes know of the interruption.
    """

    reason: str | None = None
    force: bool = False
    at_once: bool = False
    epoch_reason: str | None = None
    is_agreed: bool = False
    interruption: str | None = None
    interrupts: bool = False

    def agree(self, processes: Processes) -> None:
        """Take up the requests of all processes, by one exchange."""
        requests = [self.reason, self.force, self.at_once, self.epoch_reason, self.interruption]
        asked = processes.any_of([request not in (None, False) for request in requests])
        self.is_agreed, self.force, self.at_once, ends_epoch, self.interrupts = asked
        elsewhere = "another process asked for it"
        if self.is_agreed and self.reason is None:
            self.reason = elsewhere
        if ends_epoch and self.epoch_reason is None:
            self.epoch_reason = elsewhere
        if self.interrupts and self.interruption is None:
            self.interruption = elsewhere

    def interrupt(self, reason: str) -> None:
        """Make the interruption a stop that holds now.

        Args:
            reason: Why, in a few words.
        """
        self.reason, self.force, self.is_agreed = reason, True, True


RunStage = Literal["fit", "validate", "test", "predict"]
