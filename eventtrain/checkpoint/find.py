"""Finding the checkpoint that ``ckpt_path`` names, and reading it in every process."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from eventtrain.checkpoint import storage
from eventtrain.errors import MisconfigurationError, printable
from eventtrain.events import FindCheckpoint
from eventtrain.paths import AnyPath, check_path

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer


def interrupted_path(trainer: Trainer) -> AnyPath:
    """Return the file of an interrupted run that no callback keeps checkpoints of."""
    return trainer.root / "checkpoints" / "interrupted.ckpt"


def read_checkpoint(trainer: Trainer, ckpt_path: Any, *, best_of_fit: bool = False) -> tuple[Any, dict[str, Any] | None]:
    """Read a checkpoint.

    Args:
        trainer: The trainer.
        ckpt_path: A path, ``"last"`` or ``"best"``; None for none.
        best_of_fit: Whether None means the best checkpoint of the trainer's last fit, if it monitored a metric.

    Returns:
        Its file and its content. None twice for None; and for ``"last"`` if there is none yet, which is a fresh start.

    Raises:
        MisconfigurationError: If there is no such checkpoint, or it cannot be read.
    """
    if ckpt_path is None and not best_of_fit:
        return None, None
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
    return path, content if path is None or trainer.is_global_zero else storage.read(path)


def find_checkpoint(trainer: Trainer, ckpt_path: Any) -> tuple[Any, dict[str, Any] | None]:
    """Return a checkpoint's path and content; None twice for a fresh start, or if ``None`` finds none that is the best."""
    if ckpt_path not in ("last", "best", None):
        path = check_path(ckpt_path, f"Trainer.{trainer.stage}", "ckpt_path")
        return path, storage.read(path)
    event = FindCheckpoint(ckpt_path or "best")
    trainer.signals.find_checkpoint.publish(event)
    if ckpt_path is None and not event.is_best_of_fit:
        return None, None
    if not event.paths and ckpt_path == "last" and interrupted_path(trainer).exists():
        event.offer(interrupted_path(trainer))
    if event.paths is None:
        raise MisconfigurationError(
            f"ckpt_path={ckpt_path!r}: nothing attached keeps checkpoints. Attach a ModelCheckpoint, or give the path of a "
            "file that trainer.save_checkpoint wrote."
        )
    if not event.paths and ckpt_path is None:
        raise MisconfigurationError(
            f"trainer.{trainer.stage}() takes the best checkpoint of the fit, and it is gone. Give the module, "
            f"trainer.{trainer.stage}(model), to use its current weights."
        )
    if not event.paths and (ckpt_path == "best" or trainer.stage != "fit"):
        raise MisconfigurationError(f"ckpt_path={ckpt_path!r}: there is no checkpoint yet. Give the path of one, or None.")
    paths = [check_path(path, "FindCheckpoint.offer", "paths") for path in event.paths]
    if ckpt_path == "last":
        paths.sort(key=storage.written_at, reverse=True)  # the answers of several listeners
    chosen, content = storage.read_first(paths)
    if chosen is not None:
        say(f"trainer.{trainer.stage} takes the checkpoint {chosen}.")
    return chosen, content


LOGGER = logging.getLogger("eventtrain")
if LOGGER.level == logging.NOTSET:
    LOGGER.setLevel(logging.INFO)


def say(message: str) -> None:
    """Log a message; print it if nothing handles logs, because Python then shows none below a warning."""
    if LOGGER.hasHandlers():
        LOGGER.info(printable(message))
    else:
        print(printable(message), file=sys.stderr)
