"""Checkpoint files: a crash during a write leaves the old file, and no code in a file is run when it is read."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from errno import EINVAL
from glob import escape
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO

import torch

from eventtrain.checkpoint.archive import verify_checksums
from eventtrain.checkpoint.weights import kind_of, some
from eventtrain.errors import MisconfigurationError, escaped, printable
from eventtrain.paths import AnyPath, check_path

LOADABLE = (torch.Size, torch.dtype, torch.device, bool, int, float, complex, str, bytes, bytearray, type(None))
"""The types that ``torch.load(weights_only=True)`` reads, besides tensors, and lists, tuples, sets and dicts of them."""
TENSORS = (torch.Tensor, torch.nn.Parameter)
TEMPORARY = ".tmp"


class Part:
    """A value of a checkpoint that several processes write into its file together, each of them its own tensors.

    Attributes:
        write: Writes a checkpoint as :func:`write` does. All processes call it.
        meet: Waits shortly for the other processes, which may never come, because an error ends the run.
        copied: Returns the same part with copies of its tensors, which the given function makes.
    """

    write: Callable[[Mapping[str, Any], Any, Any], None]
    meet: Callable[[], None]
    copied: Callable[[Callable[[torch.Tensor], torch.Tensor]], Part]


def write(content: Mapping[str, Any], path: AnyPath | str | None, *, before: Callable[[], None] | None = None) -> None:
    """Write a checkpoint; it gets its final name only when it is whole on disk.

    Args:
        content: The checkpoint.
        path: The file; its directory is made. None in a process that only writes its :class:`Part` of the file.
        before: Called once the file is whole, before it gets its name and replaces the file that was there before.

    Raises:
        MisconfigurationError: If the content has a value that could not be read back.
        OSError: If the file cannot be written. A file that was there before is intact.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write({"state_dict": {}, "epoch": 3}, f"{folder}/last.ckpt")
        ...     read(f"{folder}/last.ckpt")["epoch"]
        3
    """
    for part in parts_of(content).values():
        part.write(content, path, before)
        return
    if path is None:
        return
    content = loadable(content)
    target = check_path(path, "storage.write", "path")
    with renamed_to(target, before) as temporary, writing(temporary) as file:
        save(content, file)


def save(content: Mapping[str, Any], file: BinaryIO) -> None:
    """Write a checkpoint to a file, with the checksums that :func:`read` verifies, even if the user turned them off.

    Raises:
        OSError: If the file cannot be written.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # The cause is the error of the file; torch then fails to end its archive, and raises that error instead.
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    finally:
        torch.serialization.set_crc32_options(before)


def parts_of(content: Mapping[str, Any]) -> dict[str, Part]:
    """Return the values of a checkpoint that several processes write."""
    return {key: value for key, value in content.items() if isinstance(value, Part)}


@contextmanager
def renamed_to(target: AnyPath, before: Callable[[], None] | None = None) -> Generator[Any, None, None]:
    """Yield a temporary path next to a file, and rename it to the file after the ``with`` block has written it.

    Nobody can plant a link under its name, which is drawn. A process that is killed leaves the temporary file; the next writer
    of the same file deletes it. In a remote store too, no reader sees half a file; in most of them a rename is a copy.

    Args:
        target: The file.
        before: As in :func:`write`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):  # it can be written even if its folder cannot be listed now
        for left in target.parent.glob(f".{escape(target.name)}.*{TEMPORARY}"):
            left.unlink(missing_ok=True)
    temporary: Any = temporary_name(target)
    try:
        yield temporary
        if before is not None:
            before()
        temporary.replace(target)
    finally:
        # It is still there after an error, and after a rename to another name of the same file, which does nothing.
        temporary.unlink(missing_ok=True)
    # The rename itself is on disk once its directory is. Windows has no such call.
    if isinstance(target, Path) and hasattr(os, "O_DIRECTORY"):
        directory = os.open(target.parent, os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def temporary_name(target: AnyPath) -> AnyPath:
    """Return a name next to a file that nobody can know."""
    return target.with_name(f".{target.name}.{token_hex(8)}{TEMPORARY}")


def without_following(path: Any, flags: int) -> int:
    """Open a file as :func:`open` does, for its ``opener``; fail if it is a symbolic link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


@contextmanager
def reading(path: AnyPath) -> Generator[Any, None, None]:
    """Open a file, of which most will be read: a local copy of a remote one."""
    if isinstance(path, Path):
        with open(path, "rb") as file:
            yield file
    else:
        with tempfile.NamedTemporaryFile() as copy:
            path.get(copy.name)
            yield copy


@contextmanager
def writing(path: AnyPath) -> Generator[Any, None, None]:
    """Open a file to write it anew. After the ``with`` block it is on disk, or in its store, to which it goes as a whole.

    Raises:
        OSError: If the file cannot be opened, or a symbolic link has its name.
    """
    mode = "xb" if path.name.endswith(TEMPORARY) else "wb"
    with open(path, mode, opener=without_following) if isinstance(path, Path) else tempfile.NamedTemporaryFile() as file:
        yield file
        file.flush()
        if isinstance(path, Path):
            os.fsync(file.fileno())
        else:
            path.put(file.name)


def read(path: Any, map_location: Any = None, *, weights_only: bool = True, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Read a checkpoint. Its checksums are verified; code in the file is refused, never run.

    Args:
        path: The file.
        map_location: The device of the tensors, as in :func:`torch.load`; None for the CPU.
        weights_only: False runs code in the file.
        share: The index and the number of the processes that read the file. Each verifies its share of their tensors.

    Raises:
        OSError: If there is no such file, or if it cannot be opened.
        MisconfigurationError: If the file is not a checkpoint, is damaged, or holds code.
    """
    path = check_path(path, "storage.read", "path")
    if path.is_dir():
        files = sorted(each.name for each in path.glob("*") if each.is_file())
        advice = f"Give a file in it: {some(files) or 'it has none'}; or fit(ckpt_path='last') for the newest checkpoint."
        raise MisconfigurationError(f"{path} is a folder. {advice}")
    with reading(path) as file:
        try:
            verify_checksums(file, share)
            content = torch.load(file, map_location=map_location or "cpu", weights_only=weights_only)
        except Exception as error:  # a damaged file can cause any error in its reader
            code = re.search(r"GLOBAL (\S+)", str(error))
            problem = f"it is damaged, or of another kind ({first_line(error)})"
            if code is not None:
                problem = (
                    f"it holds a {code[1]}, and only tensors and plain values are read, so that no code in a file is run. If "
                    "you trust it, write its weights to another one: "
                    "torch.save({'state_dict': torch.load(path, weights_only=False)['state_dict']}, new_path)"
                )
            raise MisconfigurationError(
                f"{path} is no checkpoint that can be read safely: {problem}. Give a file that trainer.save_checkpoint wrote."
            ) from escaped(error)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise MisconfigurationError(f"{path} is no checkpoint: {kind_of(content)}")
    return content


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of its message."""
    return printable(f"{type(error).__name__}: {error}".partition("\n")[0])


def without_tensors(path: AnyPath) -> dict[str, Any]:
    """Read the plain values of a checkpoint; its tensors hold no numbers."""
    with path.open("rb") as file, torch.serialization.skip_data():
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return content


def written_at(path: AnyPath) -> tuple[float, float, float]:
    """Return the place of a checkpoint in the order in which checkpoints were written, as numbers to sort by.

    They are its sequence number, its number of batches and its time, so a clock that is set back changes nothing. Files of
    older versions have only the time. A damaged file counts as the newest, so that it is named and passed over.

    Raises:
        OSError: If the file cannot be opened.
    """
    try:
        content = without_tensors(path)
        sequence = int(content.get("sequence", 0))
        return sequence, content["progress"]["total_batch_idx"] if sequence else 0, float(content.get("written_at", 0))
    except Exception as error:
        if isinstance(error, OSError) and error.errno != EINVAL:  # which a place before the beginning of a cut file gives
            raise
        return float("inf"), 0, 0


def read_first(
    paths: Sequence[AnyPath], read: Callable[[AnyPath], dict[str, Any]] = read
) -> tuple[AnyPath | None, dict[str, Any] | None]:
    """Read the first checkpoint that is whole; name damaged ones in a warning, and pass over them.

    Args:
        paths: The files, in the order in which they are tried. A file that is no longer there is passed over too.
        read: Reads one file.

    Returns:
        The file and the checkpoint; None twice if there are no files.

    Raises:
        MisconfigurationError: If there are files, and none can be read.
    """
    last: MisconfigurationError | OSError | None = None
    for path in paths:
        try:
            return path, read(path)
        except (MisconfigurationError, OSError) as error:
            warnings.warn(f"passed over a checkpoint: {error}", stacklevel=2)
            last = error
    if last is not None:
        raise MisconfigurationError(f"None of the {len(paths)} checkpoints can be read; the last error was: {last}") from last
    return None, None


def loadable(value: Any, where: str = "checkpoint") -> Any:
    """Return a value in the form in which a checkpoint can hold it: NumPy's scalars become Python's numbers.

    Args:
        value: Tensors, numbers, texts, and lists, tuples, sets and dicts of them.
        where: The path of the value in the checkpoint, for the error.

    Raises:
        MisconfigurationError: If a value of another type is in it; the message names its path.

    Example:
        >>> loadable({"step": 3, "mean": object()})
        Traceback (most recent call last):
        eventtrain.errors.MisconfigurationError: checkpoint['mean'] is a builtins.object, ...
    """
    kind = type(value)
    if kind in LOADABLE:
        return value
    if hasattr(value, "full_tensor") or isinstance(value, Part):  # a callback takes a sharded tensor out before it is written
        return value
    if kind in TENSORS:
        if vars(value):  # the attributes that a user gave to a tensor are written too
            loadable(vars(value), f"vars({where})")
        return value
    if kind in (dict, OrderedDict, Counter):
        items = {loadable(key, f"a key of {where}"): loadable(item, f"{where}[{key!r}]") for key, item in value.items()}
        if kind is dict:
            return items
        copied = kind(items)
        vars(copied).update(vars(value))  # a state_dict has the versions of its modules there
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
