"""Helpers of loggers: a place for each run, files that survive a full disk, and a description of the run."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import platform
import re
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from eventtrain.callbacks.saved_state import is_name
from eventtrain.checkpoint import storage
from eventtrain.errors import MisconfigurationError, printable
from eventtrain.paths import AnyPath, RemotePath
from eventtrain.version import __version__

if TYPE_CHECKING:
    from eventtrain.module.module import LightningModule
    from eventtrain.trainer import Trainer

MOST_TEXT = 20_000  # characters of a module's text that are written
SEND_INTERVAL = 60.0  # seconds after which a file goes to a remote store again

# ------------------------------------------------------------------ a place for each run


def next_version(parent: AnyPath) -> AnyPath:
    """Return the first free ``version_<n>`` in a directory, after the largest number in use."""
    taken = [int(m.group(1)) for child in parent.glob("version_*") if (m := re.fullmatch(r"version_(\d+)", child.name))]
    return parent / f"version_{max(taken, default=-1) + 1}"


def new_version(parent: AnyPath) -> AnyPath:
    """Make the directory of :func:`next_version`. Runs that begin at the same time get different ones."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        directory = next_version(parent)
        with contextlib.suppress(FileExistsError):  # another run took it just now
            directory.mkdir()
            return directory


def new_file(path: AnyPath) -> AnyPath:
    """Make a new empty file for the caller: at the path, or at ``<stem>-<n><suffix>`` if the path exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    candidate, number = path, 0
    while True:
        with contextlib.suppress(FileExistsError):
            candidate.touch(exist_ok=False)
            return candidate
        number += 1
        name = Path(path.name)
        candidate = path.with_name(f"{name.stem}-{number}{name.suffix}")


def portable(path: AnyPath | None, root: AnyPath) -> str | None:
    """Return a path in the form for checkpoints: relative to the run's root if it lies below it, so that the tree can move.

    Args:
        path: The path; None is returned as None.
        root: The root directory of the run.
    """
    if path is None:
        return None
    if isinstance(path, RemotePath):
        return str(path).removeprefix(f"{root}/")
    full, base = path.resolve(), Path(str(root)).resolve()
    return (full.relative_to(base) if full.is_relative_to(base) else full).as_posix()


def own_place(root: AnyPath, name: str, parent: AnyPath, pattern: re.Pattern[str]) -> Any:
    """Return the file or directory that a checkpoint names if it is an entry of the logger's own directory, and no link.

    Args:
        root: The root directory of the run.
        name: The result of :func:`portable`, as the checkpoint holds it.
        parent: The logger's directory.
        pattern: The form of its entries' names.

    Returns:
        The path; None if it is another place, which a run never touches because a file names it.
    """
    if "\0" in name or not is_name(last := re.split(r"[/\\]", name)[-1]) or not pattern.fullmatch(last):
        return None
    if isinstance(root / name if "://" not in name else parent, RemotePath) or isinstance(parent, RemotePath):
        return parent / last if str(root / name if "://" not in name else name) == str(parent / last) else None
    path = Path(str(root / name))
    is_own = not path.is_symlink() and path.parent.resolve() == Path(str(parent)).resolve()
    return path if is_own else None


def warn_of_other_place(owner: str, name: str, parent: AnyPath) -> None:
    """Warn that a checkpoint names a place at which the run does not continue."""
    warnings.warn(
        f"{owner}: the checkpoint names {name!r}, which is not a place of this logger in {printable(parent)}. Nothing is "
        "changed there, and the run begins a new one.",
        stacklevel=2,
    )


# ------------------------------------------------------------------ files


def copy_beginning(source: AnyPath, target: AnyPath, length: int) -> None:
    """Write the first bytes of a file to another one, which exists.

    Args:
        source: The file.
        target: The other file.
        length: The number of bytes.

    Raises:
        OSError: If they cannot be copied.
    """
    with storage.reading(source) as file, storage.writing(target) as copy:
        while length > 0 and (part := file.read(min(length, 1 << 20))):
            copy.write(part)
            length -= len(part)


@contextlib.contextmanager
def refusing_bad_places(owner: str, argument: str) -> Generator[None, None, None]:
    """Turn an ``OSError`` in the ``with`` block into an error that names the logger and the argument to change.

    Args:
        owner: The name of the logger.
        argument: Its argument that holds the place.

    Raises:
        MisconfigurationError: If the place cannot be written to.
    """
    try:
        yield
    except OSError as error:
        raise MisconfigurationError(
            f"{owner} cannot write to {error.filename or argument}: {error.strerror or error}. Give a {argument} that can be "
            "written to."
        ) from error


def local_copy(path: RemotePath) -> Any:
    """Return a temporary file with the content of a file in a remote store, which is made if there is none.

    Most stores cannot append to a file.
    """
    if not path.exists():
        path.touch()
    with contextlib.ExitStack() as on_error:
        file = on_error.enter_context(tempfile.NamedTemporaryFile())
        path.get(file.name)
        on_error.pop_all()
    return file


def append_to(path: Path) -> Any:
    """Open a local file to append to it; fail if a symbolic link has its name."""
    return open(path, "ab", opener=storage.without_following)  # the caller closes it


class RunFile:
    """Append to a file for as long as that works.

    At the first failure, such as a full disk or a file that was removed, there is one warning. From then on everything is
    dropped, because a run is worth more than its log.

    Args:
        path: The file. It and its directory are made if they do not exist.
        owner: The name of the logger, for the warning.
        position: The length in bytes to continue at; everything behind it is cut off. None to continue at the end.

    Raises:
        OSError: If the file cannot be opened.

    Attributes:
        position: The file's length in bytes, as of the last flush that succeeded.
    """

    def __init__(self, path: AnyPath, owner: str, position: int | None = None) -> None:
        self.path = path.absolute()  # the program may change its directory
        self.owner = owner
        path.parent.mkdir(parents=True, exist_ok=True)
        file: Any = append_to(path) if isinstance(path, Path) else local_copy(path)
        self.position = file.seek(0, os.SEEK_END)
        if position is not None and position < self.position:
            file.truncate(position)
            self.position = file.seek(0, os.SEEK_END)
        self._file: Any = file
        self._sent = time.monotonic()

    @property
    def works(self) -> bool:
        """Whether there was no failure, and the file is open."""
        return self._file is not None

    def write(self, data: bytes) -> None:
        """Append to a buffer, which :meth:`flush` writes."""
        if self._file is not None:
            try:
                self._file.write(data)
            except OSError as error:
                self._give_up(error)

    def flush(self, *, now: bool = True) -> None:
        """Write the buffer to disk. A file in a remote store is replaced as a whole; without ``now`` once in a minute."""
        if self._file is not None:
            try:
                self._file.flush()
                if isinstance(self.path, Path):
                    self.path.stat()  # a file that was removed accepts writes without an error
                elif now or time.monotonic() - self._sent > SEND_INTERVAL:
                    self.path.put(self._file.name)
                    self._sent = time.monotonic()
                self.position = self._file.tell()
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Flush and close the file; do nothing if it is closed."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _give_up(self, error: OSError) -> None:
        file, self._file = self._file, None
        with contextlib.suppress(OSError):  # its buffer can't be written either
            file.close()
        warnings.warn(
            f"{self.owner} has stopped writing: {printable(self.path)} cannot be written to any more "
            f"({error.strerror or error}). The run continues, and nothing more is logged there.",
            stacklevel=3,
        )


# ------------------------------------------------------------------ a description of the run


def environment(trainer: Trainer) -> dict[str, Any]:
    """Return the versions, the machine and the device of a run, by name."""
    facts = {
        "eventtrain": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": " ".join(sys.argv),
        "working directory": os.getcwd(),
        "device": trainer.device,
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
    }
    if trainer.device.type == "cuda":
        facts |= {"CUDA": torch.version.cuda, "GPU": torch.cuda.get_device_name(trainer.device)}
    return facts


def configuration(trainer: Trainer) -> dict[str, Any]:
    """Return the settings of a run by name. Its optimizers have to exist."""
    facts: dict[str, Any] = {
        "module": type(trainer.module).__name__,
        "optimization": "automatic" if trainer.module.automatic_optimization else "manual",
        **dataclasses.asdict(trainer.limits),
        **{f"limit of {stage} batches": limit for stage, limit in trainer.arguments.batch_limits.items()},
        "num_sanity_val_steps": trainer.arguments.num_sanity_val_steps,
        "seed": trainer.seed,
    }
    for kind, parts in (
        ("callback", [described(callback) for callback in trainer.callbacks]),
        ("optimizer", [repr(optimizer.optimizer) for optimizer in trainer.optimizers]),
        ("scheduler", [f"{type(c.scheduler).__name__} per {c.interval}" for c in trainer.lr_scheduler_configs]),
    ):
        facts |= {f"{kind} {number}": text for number, text in enumerate(parts, 1)}
    return facts


def logged_hparams(trainer: Trainer) -> dict[Any, Any]:
    """Return the hyperparameters that loggers write: the module's and the datamodule's.

    If both have one of the same name with different values, the datamodule's gets the prefix ``datamodule/``.
    """
    module, data = trainer.module, trainer.datamodule
    hparams = dict(module.hparams) if module.logs_hparams else {}
    for name, value in data.hparams.items() if data is not None and getattr(data, "logs_hparams", False) else ():
        hparams[name if repr(hparams.get(name, value)) == repr(value) else f"datamodule/{name}"] = value
    return hparams


def described(part: Any) -> str:
    """Describe an object in a line: by its class's ``repr``, or by its class and its public attributes of plain types."""
    kind: Any = type(part)
    if kind.__repr__ is not object.__repr__:
        return repr(part)
    plain = (bool, int, float, str, os.PathLike, type(None))
    attributes = [f"{name}={v!r}" for name, v in vars(part).items() if not name.startswith("_") and isinstance(v, plain)]
    return f"{kind.__name__}({', '.join(attributes)})"


def table(facts: Mapping[str, Any]) -> str:
    """Return facts as a table in Markdown, which TensorBoard renders."""
    rows = [f"| {name} | {' '.join(str(value).split()).replace('|', chr(92) + '|')} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def module_text(module: LightningModule) -> str:
    """Return a module's parts as a block of code in Markdown, after a line with the number of its parameters.

    The text is shortened if it is very long.
    """
    text = repr(module)
    if len(text) > MOST_TEXT:
        text = f"{text[:MOST_TEXT]}\n... and {len(text) - MOST_TEXT} characters more"
    parameters = [parameter for parameter in module.parameters() if not is_lazy(parameter)]
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    head = f"{sum(p.numel() for p in parameters)} parameters, {trained} of them trained"
    if lazy := sum(map(is_lazy, module.parameters())):
        head += f"; {lazy} tensors of lazy modules get their sizes at the first forward and are not counted"
    return "\n".join([head, "", *(f"    {line}" for line in text.splitlines())])
