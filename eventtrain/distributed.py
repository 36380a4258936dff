"""The seam between a run and several processes: one process's view of the others.

The trainer talks to an object of type :class:`Processes` and never asks whether a run is distributed. A callback that
starts a process group puts its own object there, at ``join_processes``.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeVar

from torch import Tensor

Reduction = Literal["mean", "sum", "min", "max"]
Place = Literal["batch_end", "in_between", "meeting"]
T = TypeVar("T")


class Processes(Protocol):
    """The processes that train together, as one of them sees them.

    Every method is an exchange in which all processes take part, in the same order.
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

    def reduce(self, value: Tensor, reduction: Reduction) -> Tensor:
        """Combine a tensor of every process; return the result on all of them."""

    def any(self, flag: bool) -> bool:
        """Return whether the flag holds in any process."""

    def any_of(self, flags: list[bool]) -> list[bool]:
        """Return for each flag whether it holds in any process, by one exchange."""

    def agree(self, flags: list[bool], place: Place) -> list[bool]:
        """Return for each flag whether all processes act on it from here on. It is true once.

        Only at a ``"meeting"`` all processes wait for each other; there a flag of any process holds. At other places nothing is
        exchanged if no process sets a flag. If all processes set a flag at the same place, it holds there. Else it holds at
        the end of the next batch, at the latest of the one that closes the accumulation window.

        Args:
            flags: What this process asks for.
            place: ``"batch_end"``, ``"meeting"``, or ``"in_between"`` for another place that all processes pass.
        """

    @property
    def is_called_off(self) -> bool:
        """Whether a process has called off the current evaluation, as far as this one has heard; until the next meeting."""

    def call_off(self) -> None:
        """Tell the others that this process leaves the current evaluation."""

    def broadcast(self, value: T) -> T:
        """Return the first process's value, any object that can be pickled; tensors arrive on the CPU."""

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes in the first one, in their order; an empty list in the others."""

    def gather_for_all(self, value: T) -> list[T]:
        """Return the values of all processes, in their order, in every process."""

    def barrier(self) -> None:
        """Wait until every process has come here."""


class SingleProcess:
    """The :class:`Processes` of a run in one process: every exchange returns its own value."""

    world_size = 1
    global_rank = 0
    local_rank = 0
    is_called_off = False

    def reduce(self, value: Tensor, reduction: Reduction) -> Tensor:
        """Return the value."""
        return value

    def any(self, flag: bool) -> bool:
        """Return the flag."""
        return flag

    def any_of(self, flags: list[bool]) -> list[bool]:
        """Return the flags, each as :meth:`any` answers it."""
        return [self.any(flag) for flag in flags]

    def agree(self, flags: list[bool], place: Place) -> list[bool]:
        """Return the flags."""
        return flags

    def call_off(self) -> None:
        """Do nothing."""

    def broadcast(self, value: T) -> T:
        """Return the value."""
        return value

    def gather(self, value: T) -> list[T]:
        """Return a list of the value."""
        return [value]

    def gather_for_all(self, value: T) -> list[T]:
        """Return a list of the value."""
        return [value]

    def barrier(self) -> None:
        """Return at once."""
