"""Checkpoint files: written so that a crash leaves the old one, read so that nothing in them runs."""

from __future__ import annotations

import inspect
import os
import pickle
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eventtrain.errors import MisconfigurationError

LOADABLE = (torch.Tensor, torch.Size, torch.dtype, torch.device, bool, int, float, complex, str, bytes, type(None))
"""What ``torch.load(weights_only=True)`` gives back; besides lists, tuples, sets and dicts of them."""


def write(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a checkpoint under its final name only once it is whole on disk.

    Args:
        content: The checkpoint.
        path: The file; its directory is made.

    Raises:
        MisconfigurationError: Something in it could not be read back.
        OSError: The file could not be written; one that was there before is intact.
    """
    check_loadable(content)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the rename itself is on disk once its directory is; Windows has no such call
        directory = os.open(target.parent, os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def read(path: str | os.PathLike[str], map_location: Any = None) -> dict[str, Any]:
    """Reads a checkpoint; code in the file is refused, never run.

    Args:
        path: The file.
        map_location: Where tensors go, as in :func:`torch.load`; the CPU where None.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: There is no such file.
        MisconfigurationError: It is no checkpoint, is damaged, or holds code.
    """
    try:
        content = torch.load(path, map_location=map_location or "cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file could not be opened; seeking in a damaged one fails without its name
        raise MisconfigurationError(
            f"{os.fspath(path)} is no checkpoint that can be read safely: it is damaged, or holds more than tensors and plain "
            "values. Give a file that trainer.save_checkpoint wrote."
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise MisconfigurationError(f"{os.fspath(path)} is no checkpoint: it holds no 'state_dict'.")
    return content


def read_first(paths: Sequence[Path], map_location: Any = None) -> dict[str, Any] | None:
    """Reads the first checkpoint that is whole; damaged ones are named in a warning and passed over.

    Args:
        paths: The files, in the order in which they are tried; one that has vanished is passed over too.
        map_location: As for :func:`read`.

    Returns:
        The checkpoint; None where there are no files.

    Raises:
        MisconfigurationError: There are files, and none can be read.
    """
    last: MisconfigurationError | OSError | None = None
    for path in paths:
        try:
            return read(path, map_location)
        except (MisconfigurationError, OSError) as error:
            warnings.warn(f"passed over a checkpoint: {error}", stacklevel=2)
            last = error
    if last is not None:
        raise MisconfigurationError(f"None of the {len(paths)} checkpoints can be read; the last error was: {last}") from last
    return None


def check_loadable(value: Any, where: str = "checkpoint") -> None:
    """Refuses what a checkpoint could hold but not give back.

    Raises:
        MisconfigurationError: Naming the key.
    """
    if type(value) in LOADABLE or isinstance(value, torch.Tensor):
        return
    if isinstance(value, dict) and type(value) in (dict, OrderedDict):
        for key, item in value.items():
            check_loadable(key, f"a key of {where}")
            check_loadable(item, f"{where}[{key!r}]")
        return
    if type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            check_loadable(item, f"{where}[{index}]")
        return
    raise MisconfigurationError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot give back safely. "
        "Convert it to tensors, numbers, strings, lists and dicts; for a hyperparameter, "
        "save_hyperparameters(ignore=[...]) leaves it out."
    )


def init_arguments(cls: type, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the kept hyperparameters that a class's ``__init__`` takes."""
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(kept)
    return {name: value for name, value in kept.items() if name in parameters}
