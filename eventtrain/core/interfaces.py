"""The two neighbours that the loops talk to, as the loops see them: a source of batches, and a place for logged values."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from torch import Tensor

from eventtrain.events import Stage

Scope = Literal["start", "batch", "epoch"]


END: Any = object()
"""Returned by :meth:`Batches.fetch` if there is no batch left."""


class Batches(Protocol):
    """One pass over a loader.

    Attributes:
        loader: The loader.
        is_last: The batch that was fetched last is the last of the pass.
    """

    loader: Any
    is_last: bool

    def fetch(self) -> Any:
        """Return the next batch on its device, or :data:`END`."""

    def finish(self) -> None:
        """End a pass that was read in full as a ``for`` loop ends it."""

    def close(self) -> None:
        """Let the loader's workers go."""

    def why_empty(self) -> str:
        """Return why a pass may have no batch, and what to write."""

    def position(self) -> dict[str, Any]:
        """Return the position of the batch that was fetched last, for a checkpoint."""


class LoggedValues(Protocol):
    """The values that a module logs.

    Attributes:
        batch: The current batch.
        batch_size: The size of the current batch; None as long as it is not known.
        scope: ``"start"`` before an epoch's first batch, ``"batch"`` in a batch, ``"epoch"`` after one; None if nothing can be
            logged.
        fresh: The values of steps for loggers since the last :meth:`take_fresh` of the stage.
        evaluated: The batches of the run's evaluations so far.
        suffix: A suffix for the names that are logged, such as ``"/dataloader_idx_1"``.
        silent: Whether values are dropped, as in a sanity check.
    """

    batch: Any
    batch_size: int | None
    scope: Scope | None
    fresh: dict[str, Any]
    evaluated: int
    suffix: str
    silent: bool

    def enter(self, stage: Stage, scope: Scope | None) -> None:
        """Begin a stage and a scope."""

    def begin_stage(self, stage: Stage) -> None:
        """Drop what a stage has logged and not reduced."""

    def take_fresh(self) -> dict[str, Any]:
        """Return the values of steps for loggers, and forget them."""

    def show_epoch(self) -> None:
        """Let the hooks of an epoch's end read its values so far."""

    def end_epoch(self) -> dict[str, Tensor]:
        """Reduce the epoch's values and return those for loggers, by name."""
