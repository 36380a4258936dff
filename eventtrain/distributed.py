"""The seam between the core and several processes: one rank's view of the others.

The core asks this object and never whether a run is distributed. A callback that starts a process group
puts an object with the same methods in its place, at ``join_processes``.
"""

from __future__ import annotations

from typing import Literal, TypeVar

from torch import Tensor

Reduction = Literal["mean", "sum", "min", "max"]
T = TypeVar("T")


class SingleProcess:
    """The world of one process.

    Attributes:
        world_size: The number of processes.
        global_rank: This process's index among all.
        local_rank: This process's index on its machine.
    """

    world_size = 1
    global_rank = 0
    local_rank = 0

    def reduce(self, value: Tensor, reduction: Reduction) -> Tensor:
        """Combines a tensor of every rank; all ranks get the result."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag holds on any rank."""
        return flag

    def any_of(self, flags: list[bool]) -> list[bool]:
        """Whether each flag holds on any rank, by one exchange."""
        return [self.any(flag) for flag in flags]

    def broadcast(self, value: T) -> T:
        """Rank zero's value of any object that can be pickled, on all ranks; tensors come on the CPU."""
        return value

    def gather(self, value: T) -> list[T]:
        """All ranks' values, in their order: on rank zero, and an empty list on others."""
        return [value]

    def gather_for_all(self, value: T) -> list[T]:
        """All ranks' values, in their order, on every rank."""
        return [value]

    def barrier(self) -> None:
        """Waits until every rank is here."""
