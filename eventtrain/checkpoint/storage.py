"""Checkpoint files: written so that a crash leaves the old one, read so that nothing in them runs."""

from __future__ import annotations

import inspect
import os
import shutil
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from eventtrain.errors import MisconfigurationError

LOADABLE = (torch.Size, torch.dtype, torch.device, bool, int, float, complex, str, bytes, bytearray, type(None))
"""What ``torch.load(weights_only=True)`` gives back; besides tensors, and lists, tuples, sets and dicts of them."""
TENSORS = (torch.Tensor, torch.nn.Parameter)
TEMPORARY = ".tmp"


def write(content: Mapping[str, Any], path: str | os.PathLike[str], *, previous: Path | None = None) -> None:
    """Writes a checkpoint under its final name only once it is whole on disk.

    Args:
        content: The checkpoint.
        path: The file; its directory is made.
        previous: What the file that was there before becomes; it is replaced where None.

    Raises:
        MisconfigurationError: Something in it could not be read back.
        OSError: The file could not be written; one that was there before is intact.
    """
    content = loadable(content)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with renamed_to(target, previous) as temporary, crc32_computed(), open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # What went wrong is the file's error; torch then cannot end its archive, and complains of that instead.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        file.flush()
        os.fsync(file.fileno())


def link(path: Path, new: Path, *, previous: Path | None = None) -> None:
    """Gives a checkpoint a second name, without a second copy where the file system has hard links.

    Args:
        path: The file.
        new: Its other name, in the same directory.
        previous: As in :func:`write`.

    Raises:
        OSError: As in :func:`write`.
    """
    with renamed_to(new, previous) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            with open(path, "rb") as source, open(temporary, "wb") as file:
                shutil.copyfileobj(source, file)
                file.flush()
                os.fsync(file.fileno())


@contextmanager
def renamed_to(target: Path, previous: Path | None) -> Generator[Path, None, None]:
    """Yields a temporary name beside a file, which becomes the file's once the ``with`` block has written it.

    A process that is killed leaves the temporary file; the next writer of the same file writes over it.
    """
    temporary = target.with_name(f".{target.name}{TEMPORARY}")
    try:
        yield temporary
        if previous is not None and target.exists():
            os.replace(target, previous)
        os.replace(temporary, target)
    finally:
        # After an error; and a rename to another name of the same file does nothing.
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the rename itself is on disk once its directory is; Windows has no such call
        directory = os.open(target.parent, os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextmanager
def crc32_computed() -> Generator[None, None, None]:
    """Has :func:`torch.save` write the checksums that :func:`read` verifies, which it leaves out where told so."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def read(path: str | os.PathLike[str], map_location: Any = None) -> dict[str, Any]:
    """Reads a checkpoint. Its checksums are verified; code in the file is refused, never run.

    Args:
        path: The file.
        map_location: Where tensors go, as in :func:`torch.load`; the CPU where None.

    Returns:
        The checkpoint.

    Raises:
        OSError: There is no such file, or it cannot be opened.
        MisconfigurationError: It is no checkpoint, is damaged, or holds code.
    """
    with open(path, "rb") as file:
        try:
            verify_checksums(file)
            content = torch.load(file, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:  # what a damaged file makes of its reader is anything
            raise MisconfigurationError(
                f"{os.fspath(path)} is no checkpoint that can be read safely: it is damaged, or holds more than tensors and "
                f"plain values. Give a file that trainer.save_checkpoint wrote. ({first_line(error)})"
            ) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise MisconfigurationError(f"{os.fspath(path)} is no checkpoint: it holds no 'state_dict'.")
    return content


def verify_checksums(file: BinaryIO) -> None:
    """Reads a file and compares the checksum of each of its parts, which :func:`torch.load` does not do for tensors.

    Raises:
        ValueError: A part is damaged.
    """
    if zipfile.is_zipfile(file):  # else it is no file of today's torch.save, which torch.load tells apart
        with zipfile.ZipFile(file) as parts:
            damaged = parts.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} has another checksum than when it was written")
    file.seek(0)


def first_line(error: BaseException) -> str:
    """An error's class and the first line of its message."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def written_at(path: Path) -> float:
    """When a checkpoint was written, in seconds since 1970: by its own account, since a copy of a file has another date.
    Of a damaged one the file's date, so that it is named when its turn comes."""
    try:
        # Mapped into memory, so that no tensor is read.
        return float(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["written_at"])
    except Exception:
        return path.stat().st_mtime


def read_first(paths: Sequence[Path], map_location: Any = None) -> tuple[Path | None, dict[str, Any] | None]:
    """Reads the first checkpoint that is whole; damaged ones are named in a warning and passed over.

    Args:
        paths: The files, in the order in which they are tried; one that has vanished is passed over too.
        map_location: As for :func:`read`.

    Returns:
        The file and the checkpoint; None twice where there are no files.

    Raises:
        MisconfigurationError: There are files, and none can be read.
    """
    last: MisconfigurationError | OSError | None = None
    for path in paths:
        try:
            return path, read(path, map_location)
        except (MisconfigurationError, OSError) as error:
            warnings.warn(f"passed over a checkpoint: {error}", stacklevel=2)
            last = error
    if last is not None:
        raise MisconfigurationError(f"None of the {len(paths)} checkpoints can be read; the last error was: {last}") from last
    return None, None


def loadable(value: Any, where: str = "checkpoint") -> Any:
    """What a checkpoint can give back: the value itself, with NumPy's scalars and other numbers as Python's own.

    Args:
        value: Tensors, numbers, texts, and lists, tuples, sets and dicts of them.
        where: Where it is, for the error.

    Raises:
        MisconfigurationError: Something in it could not be given back; names the key.
    """
    kind = type(value)
    if kind in LOADABLE:
        return value
    if hasattr(value, "full_tensor"):  # a part of a tensor: who shards it takes it out before it is written
        return value
    if kind in TENSORS:
        if vars(value):  # what somebody hung on to a tensor is written too
            loadable(vars(value), f"vars({where})")
        return value
    if kind in (dict, OrderedDict, Counter):
        items = {loadable(key, f"a key of {where}"): loadable(item, f"{where}[{key!r}]") for key, item in value.items()}
        if kind is dict:
            return items
        copied = kind(items)
        vars(copied).update(vars(value))  # a state_dict says there which versions its modules have
        return copied
    if kind in (list, tuple, set):
        return kind(loadable(item, f"{where}[{index}]") for index, item in enumerate(value))
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
        return loadable(value.item(), where)
    for base in (int, float, str):
        if isinstance(value, base):
            return base(value)
    raise MisconfigurationError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot give back safely. "
        "Convert it to tensors, numbers, strings, lists and dicts; for a hyperparameter, "
        "save_hyperparameters(ignore=[...]) leaves it out."
    )


def init_arguments(cls: type, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the kept hyperparameters that a class's ``__init__`` takes."""
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(kept)
    return {name: value for name, value in kept.items() if name in parameters}
