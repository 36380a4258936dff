"""Finding the checkpoint that ``ckpt_path`` names, and reading it in every process."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from eventtrain.checkpoint import storage
from eventtrain.distributed import Processes
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
    candidates: list[AnyPath] = []
    processes = trainer.processes
    # The first process finds them and says which they are, so that all resume the same.
    try:
        if trainer.is_global_zero:
            candidates = find_checkpoints(trainer, ckpt_path)
    except BaseException as error:
        processes.broadcast((candidates, storage.first_line(error)))
        raise
    candidates, problem = processes.broadcast((candidates, None))
    if problem is not None:
        raise MisconfigurationError(f"The first process found no checkpoint. {problem}")
    share = (processes.global_rank, processes.world_size)
    read = partial(in_all, processes, partial(storage.read, share=share))
    if ckpt_path not in ("last", "best", None):
        return candidates[0], read(candidates[0])
    chosen, content = storage.read_first(candidates, read)
    if chosen is not None and trainer.is_global_zero:
        say(f"trainer.{trainer.stage} takes the checkpoint {chosen}.")
    return chosen, content


def in_all(processes: Processes, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in all processes; if it raises in one of them, raise the same error in all.

    Args:
        processes: The processes.
        function: The function, which raises an error for a file that cannot be read.
        *arguments: Its arguments.

    Returns:
        The function's result in this process.

    Raises:
        MisconfigurationError: If it raises one, or an ``OSError``, in any process.
    """
    failure: Any = None
    try:
        result = function(*arguments)
    except (MisconfigurationError, OSError) as error:
        failure = error
    for first in filter(None, processes.gather_for_all(failure)):
        raise first
    return result


def find_checkpoints(trainer: Trainer, ckpt_path: Any) -> list[AnyPath]:
    """Return the checkpoints that may be read, the best choice first; none for a fresh start, or if ``None`` finds no best."""
    if ckpt_path not in ("last", "best", None):
        return [check_path(ckpt_path, f"Trainer.{trainer.stage}", "ckpt_path")]
    event = FindCheckpoint(ckpt_path or "best")
    trainer.signals.find_checkpoint.publish(event)
    if ckpt_path is None and not event.is_best_of_fit:
        return []
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
    return paths


LOGGER = logging.getLogger("eventtrain")
if LOGGER.level == logging.NOTSET:
    LOGGER.setLevel(logging.INFO)


def say(message: str) -> None:
    """Log a message; print it if nothing handles logs, because Python then shows none below a warning."""
    message = printable(message)
    if LOGGER.hasHandlers():
        LOGGER.info(message)
    else:
        print(message, file=sys.stderr)
