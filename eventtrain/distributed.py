"""The seam between a run and several processes: one process's view of the others.

The trainer talks to an object of type :class:`Processes` and never asks whether a run is distributed. A callback that
starts a process group puts its own object there, at ``join_processes``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, TypeVar

from torch import Tensor

Reduction = Literal["mean", "sum", "min", "max"]
Place = Literal["batch_end", "in_between", "meeting"]
Weight = Tensor | float | None
T = TypeVar("T")


class Processes(Protocol):
    """The processes that train together, as one of them sees them.

    Every method is an exchange in which all processes take part, in the same order. In a run of one process it returns its
    own value.
    """

    @property
    def world_size(self) -> int:
        """The number of processes."""

    @property
    def global_rank(self) -> int:
        """The index of this process among all, from 0."""

    @property
    def local_rank(self) -> int:
        """The index of this process on its machine, from 0."""

    @property
    def data(self) -> Processes:
        """The processes whose data differ, as this one sees them; fewer than all if several work on the same batches."""
        return self

    def reduce(self, value: Tensor, reduction: Reduction) -> Tensor:
        """Combine a tensor of every process; return the result on all of them."""
        return value

    def any(self, flag: bool) -> bool:
        """Return whether the flag holds in any process."""
        return flag

    def read_together(self, read: Callable[[], T], ahead: bool) -> Callable[[], T]:
        """Return a function that reads the next batch as long as all processes have one.

        Args:
            read: Reads the next batch, or END.
            ahead: Whether more batches may be read than are used, so that no process waits for another.
        """
        return read

    def agree(self, flags: list[bool], place: Place, name: str = "") -> list[bool]:
        """Return for each flag whether all processes act on it from here on. It is true once.

        Only at a ``"meeting"`` all processes wait for each other; there a flag of any process holds. At other places nothing is
        exchanged if no process sets a flag. If all processes set a flag at the same place, it holds there. Else it holds at
        the end of the next batch, at the latest of the one that closes the accumulation window.

        Args:
            flags: What this process asks for.
            place: ``"batch_end"``, ``"meeting"``, or ``"in_between"`` for another place that all processes pass.
            name: Who asks; the run's own requests have no name.
        """
        return flags

    @property
    def evaluates_together(self) -> bool:
        """Whether each forward of an evaluation waits for all processes, as with sharded weights."""

    @property
    def is_called_off(self) -> bool:
        """Whether a process has called off the current evaluation, as far as this one has heard; until the next meeting."""

    def call_off(self) -> None:
        """Tell the others that this process leaves the current evaluation."""
        return

    def begin_reduction(self, batches: int, missing: int, weight: Weight) -> None:
        """Tell the others how much this process contributes to its accumulation window, if they do not know.

        It comes before the reduction of the gradients, once in a window.

        Args:
            batches: The batches that had a loss.
            missing: The batches that had none.
            weight: The sum of the weights; None if they have none.
        """
        return

    def end_reduction(self, batches: int, missing: int, weight: Weight) -> tuple[Tensor | float, Weight]:
        """Return the mean number of batches and the mean weight that the processes have contributed to the window.

        It comes after the reduction of the gradients, with the arguments of :meth:`begin_reduction`.
        """
        return batches, weight

    def broadcast(self, value: T) -> T:
        """Return the first process's value, any object that can be pickled; tensors arrive on the CPU."""
        return value

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes in the first one, in their order; an empty list in the others."""
        return [value]

    def gather_for_all(self, value: T) -> list[T]:
        """Return the values of all processes, in their order, in every process."""
        return [value]

    def barrier(self) -> None:
        """Wait until every process has come here."""
        return


class SingleProcess(Processes):
    """The :class:`Processes` of a run in one process."""

    world_size = 1
    global_rank = 0
    local_rank = 0
    evaluates_together = is_called_off = False
