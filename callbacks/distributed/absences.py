"""Batches without a loss in a process whose layers are sharded: it waits for nobody, and nobody waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from eventtrain.callbacks.distributed.notices import Notices
from eventtrain.errors import MisconfigurationError


class Absences:
    """The processes that have no loss in a batch, as one process knows them.

    Sharded layers exchange weights in each forward and backward, so a batch has a loss in all processes or in none. A process
    without a loss posts a notice, and waits until all others have no loss either. A process that has a loss, or that has called
    more layers than the other one, answers that the other one is alone: then all raise an error. Else nothing is sent.

    Args:
        notices: The notices of the run.

    Attributes:
        problem: Why the run cannot go on; None if it can.

    Example:
        >>> from datetime import timedelta
        >>> from torch.distributed import HashStore
        >>> notices = Notices(HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=10))
        >>> absences = Absences(notices)
        >>> notices.open()
        >>> absences.begin(batch=7)
        >>> absences.wait()  # until no process has a loss
        >>> absences.has_settled
        True
        >>> notices.close()
    """

    def __init__(self, notices: Notices) -> None:
        self.problem: str | None = None
        self._notices = notices
        # Written by the main thread and read in the thread of the notices; for _absent it is the other way round.
        self._batch, self._layers, self._has_loss = -1, 0, False
        self._absent: dict[int, dict[int, int]] = {}  # by batch and rank how many layers were called
        self._settled = -1
        notices.on("absent", self._on_absent)
        notices.on("alone", self._on_alone)

    @property
    def has_settled(self) -> bool:
        """Whether it is known for the current batch which processes have a loss."""
        return self._settled == self._batch

    def begin(self, batch: int) -> None:
        """Begin a batch of training.

        Args:
            batch: Its number in the run, the same in all processes.
        """
        if batch != self._batch:
            self._layers, self._has_loss = 0, False
            self._batch = batch

    def enter_layer(self) -> None:
        """Count a layer that exchanges weights, before it does.

        Raises:
            MisconfigurationError: If another process does not call it.
        """
        self._layers += 1
        if self._absent:
            self._look()

    def bring_loss(self) -> None:
        """Tell that this process has a loss in the current batch.

        Raises:
            MisconfigurationError: If another process has none.
        """
        self._has_loss, self._settled = True, self._batch
        if self._absent:
            self._look()

    def wait(self) -> None:
        """Wait until all processes know that none has a loss in the current batch.

        Raises:
            MisconfigurationError: If another process has one.
        """
        batch, notices = self._batch, self._notices
        self._settled = batch
        notices.post("absent", [batch, self._layers])
        with notices.changed:
            absent = self._absent.setdefault(batch, {})
            notices.wait_for(
                lambda: self.problem is not None or len(absent) == notices.world_size,
                f"the batch without a loss, number {batch} of the run",
                lambda: (
                    f"rank {', '.join(str(rank) for rank in range(notices.world_size) if rank not in absent)} did not tell "
                    "whether it has a loss"
                ),
            )
            self._absent.pop(batch)
        self.check()

    def check(self) -> None:
        """Raise the error that ends the run, if there is one.

        Raises:
            MisconfigurationError: If there is.
        """
        if self.problem is not None:
            raise MisconfigurationError(self.problem)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Raise the error that ends the run in place of the one that torch raises because another process has left."""
        try:
            yield
        except RuntimeError as error:
            if self.problem is not None and not isinstance(error, MisconfigurationError):
                raise MisconfigurationError(self.problem) from error
            raise

    def _look(self) -> None:
        """Raise an error if another process is absent from the current batch, and this one is not."""
        for rank, layers in dict(self._absent.get(self._batch, {})).items():
            if rank != self._notices.rank and (self._has_loss or self._layers > layers):
                self._notices.post("alone", [self._batch, rank])
                self.problem = self._problem(rank, self._batch)
        self.check()

    def _problem(self, rank: int, batch: int) -> str:
        return (
            f"FullyShardedDataParallel: rank {rank} has no loss in batch {batch} of the run, and other processes have one. "
            "They exchange weights and gradients in each layer, and would wait for it forever. Compute the loss in all "
            "processes, and return {'loss': 0 * loss, 'weight': 0} in place of None, or of skip_batch(); or skip the batch in "
            "all of them."
        )

    # ------------------------------------------------------------------ notices, in their thread

    def _on_absent(self, rank: int, content: list[int]) -> None:
        batch, layers = content
        self._absent.setdefault(batch, {})[rank] = layers
        is_here = batch == self._batch and rank != self._notices.rank
        if is_here and (self._has_loss or self._layers > layers):
            self._notices.post("alone", [batch, rank])

    def _on_alone(self, rank: int, content: list[int]) -> None:
        batch, alone = content
        self.problem = self.problem or self._problem(alone, batch)
