"""Exchanges between the processes that write one file, apart from those of training, which may go on meanwhile."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from eventtrain.checkpoint.storage import first_line

T = TypeVar("T")
LONGEST_PAUSE = 2.0
"""Seconds between two exchanges of processes that write, so that one that is slow is known from one that is gone."""
PATIENCE = timedelta(seconds=10)
"""How long the processes of a run that an error ends wait for each other."""


class Writers:
    """The processes that write a checkpoint together. One thread of each takes part in the exchanges.

    They have connections of their own, so that a thread can use them during the exchanges of training. All processes have to
    make their object at the same place.

    Args:
        rank: The index of this process.
        world_size: The number of processes.
        timeout: How long an exchange waits for the other processes; None for torch's default.
    """

    def __init__(self, rank: int, world_size: int, timeout: timedelta | None = None) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout)

    def exchange(self, purpose: str, value: Any = None, problem: BaseException | None = None) -> list[Any]:
        """Exchange a value with the other processes.

        Args:
            purpose: The name of the exchange, for errors.
            value: The value, plain data.
            problem: An error of this process, to be told instead.

        Returns:
            The values of all processes.

        Raises:
            OSError: In all other processes, if one of them has a problem; or if one of them is gone.
        """
        told = None if problem is None else (getattr(problem, "errno", None), first_line(problem))
        received: list[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(received, (told, value), self._group)
        except Exception as error:  # gloo's errors have no class of their own
            raise OSError(errno.EIO, f"rank {self.rank} lost the other processes at {purpose}: {first_line(error)}") from error
        for rank, (failure, _) in enumerate(received):
            if failure is not None and rank != self.rank:
                number, text = failure
                raise OSError(number or errno.EIO, f"rank {rank} failed at {purpose}: {text}")
        return [each for _, each in received]

    def work(self, purpose: str, function: Callable[[], T]) -> list[T]:
        """Do something in all processes, each in its own time, which may be longer than an exchange may take.

        Args:
            purpose: As in :meth:`exchange`.
            function: The work.

        Returns:
            The results of all processes.

        Raises:
            OSError: If one of them fails, in all of them.
        """
        pause, longest = 0.005, LONGEST_PAUSE
        if self.timeout is not None:
            longest = min(longest, self.timeout.total_seconds() / 4)
        with ThreadPoolExecutor(1, thread_name_prefix="shards") as thread:
            result = thread.submit(function)
            while True:
                wait([result], timeout=pause)
                pause = min(2 * pause, longest)
                is_done = result.done()
                problem = result.exception() if is_done else None
                values = self.exchange(purpose, (is_done, None if problem or not is_done else result.result()), problem)
                if problem is not None:
                    raise problem
                if all(done for done, _ in values):
                    return [value for _, value in values]

    def meet(self, purpose: str) -> None:
        """Wait for the other processes, but not for long, because some of them may never come.

        Args:
            purpose: As in :meth:`exchange`.

        Raises:
            OSError: If one of them does not come.
        """
        patience = PATIENCE if self.timeout is None else min(PATIENCE, self.timeout)
        try:
            dist.monitored_barrier(self._group, timeout=patience)
        except RuntimeError as error:
            raise OSError(
                errno.EIO, f"rank {self.rank} waited {patience} for the others at {purpose}: {first_line(error)}"
            ) from error
