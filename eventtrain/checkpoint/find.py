"""Finding the checkpoint that ``ckpt_path`` names, and reading it in every process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eventtrain.checkpoint import storage
from eventtrain.errors import MisconfigurationError
from eventtrain.events import FindCheckpoint
from eventtrain.paths import AnyPath, check_path

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer


def interrupted_path(trainer: Trainer) -> AnyPath:
    """Return the file of an interrupted run that no callback keeps checkpoints of."""
    return trainer.root / "checkpoints" / "interrupted.ckpt"


def read_checkpoint(trainer: Trainer, ckpt_path: Any) -> dict[str, Any] | None:
    """Read a checkpoint.

    Args:
        trainer: The trainer.
        ckpt_path: A path, ``"last"`` or ``"best"``.

    Returns:
        Its content; None for ``"last"`` if there is none yet, which is a fresh start.

    Raises:
        MisconfigurationError: If there is no such checkpoint, or it cannot be read.
    """
    path: Any = None
    content: dict[str, Any] | None = None
    failure: BaseException | None = None
    if trainer.is_global_zero:
        try:
            path, content = find_checkpoint(trainer, ckpt_path)
        except BaseException as error:
            failure = error
    # The first process finds it and says which it is, so that all resume the same.
    path, problem = trainer.processes.broadcast((path, None if failure is None else storage.first_line(failure)))
    if failure is not None:
        raise failure
    if problem is not None:
        raise MisconfigurationError(f"The first process found no checkpoint. {problem}")
    return content if path is None or trainer.is_global_zero else storage.read(path)


def find_checkpoint(trainer: Trainer, ckpt_path: Any) -> tuple[Any, dict[str, Any] | None]:
    """Return a checkpoint's path and content; None twice for a fresh start."""
    if ckpt_path not in ("last", "best"):
        path = check_path(ckpt_path, f"Trainer.{trainer.stage}", "ckpt_path")
        return path, storage.read(path)
    event = FindCheckpoint(ckpt_path)
    trainer.signals.find_checkpoint.publish(event)
    if not event.paths and ckpt_path == "last" and interrupted_path(trainer).exists():
        event.offer(interrupted_path(trainer))
    if event.paths is None:
        raise MisconfigurationError(
            f"ckpt_path={ckpt_path!r}: nothing attached keeps checkpoints. Attach a ModelCheckpoint, or give the path of a "
            "file that trainer.save_checkpoint wrote."
        )
    if not event.paths and (ckpt_path == "best" or trainer.stage != "fit"):
        raise MisconfigurationError(f"ckpt_path={ckpt_path!r}: there is no checkpoint yet. Give the path of one, or None.")
    paths = [check_path(path, "FindCheckpoint.offer", "paths") for path in event.paths]
    if ckpt_path == "last":
        paths.sort(key=storage.written_at, reverse=True)  # the answers of several listeners
    return storage.read_first(paths)
