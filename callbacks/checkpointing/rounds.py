"""The decisions of all ModelCheckpoints at one safe point, which come before the first file of that safe point is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from eventtrain.checks import check_number, check_whole_number
from eventtrain.events import TakeCheckpoint

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer


class Keeper(Protocol):
    """The part of a ModelCheckpoint that decides."""

    _round: Round | None

    def _look(self, trainer: Trainer, event: TakeCheckpoint) -> bool | None: ...

    def _plan(self, trainer: Trainer, *, ranked: bool) -> None: ...

    def wait(self, trainer: Trainer) -> None:
        """Wait for the file of an earlier safe point."""


@dataclass
class Round:
    """The decisions of all ModelCheckpoints at one safe point.

    They come before the first file of that safe point is written, so that each file holds all of them. A run that is killed
    between two files finishes the others when it resumes.

    Attributes:
        event: The safe point's event.
        sequence: The number of the checkpoints that are written there; 0 before the first.
    """

    event: TakeCheckpoint
    sequence: int = 0


def decide(together: Sequence[Keeper], trainer: Trainer, event: TakeCheckpoint) -> None:
    """Let each of several ModelCheckpoints decide whether and under which names it keeps a checkpoint.

    Args:
        together: All ModelCheckpoints of the trainer.
        trainer: The trainer.
        event: The safe point's event.
    """
    decisions = Round(event)
    due: list[tuple[Keeper, bool]] = []
    for each in together:
        each._round = decisions
        if (ranked := each._look(trainer, event)) is not None:
            due.append((each, ranked))
    for each in together if due else ():
        each.wait(trainer)  # the files of earlier safe points are complete before there is one of this
    for each, ranked in due:
        each._plan(trainer, ranked=ranked)


def current_place(trainer: Trainer) -> tuple[int, ...]:
    """Return numbers that no other safe point of the run has; a validation may lie between two safe points of one batch."""
    progress = trainer.progress
    return progress.total_batch_idx, progress.validated_at, progress.epochs_done


def check_schedule(every_n_steps: int | None, every_n_epochs: int | None, every_n_minutes: float | None) -> None:
    """Check the arguments of ModelCheckpoint that say when a checkpoint is due.

    Raises:
        MisconfigurationError: If one is not a positive number.
    """
    for name, every in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
        if every is not None:
            check_whole_number(every, "ModelCheckpoint", name, least=1)
    if every_n_minutes is not None:
        check_number(every_n_minutes, "ModelCheckpoint", "every_n_minutes", above=0)
