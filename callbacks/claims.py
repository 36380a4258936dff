"""Say which run writes to a place: one at a time, and a run that begins at an older checkpoint shortens nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from eventtrain.checkpoint import storage
from eventtrain.errors import MisconfigurationError, printable
from eventtrain.paths import AnyPath
from eventtrain.trainer import Trainer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
PATIENCE = 2.0  # seconds that a killed process may take to be gone
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: WeakValueDictionary[tuple[int, int], Claim] = WeakValueDictionary()
"""The claims of this process, by the device and number of their files: locks of files hold between processes only."""


class Claim:
    """The right of one run to write to a log, and the facts about this log that later runs need.

    They are in a hidden file beside the log: the run's identity; the log's extent at the newest checkpoint that was written;
    and, for the error of another run, the process. The lock on this file ends with the process, however it ends, and is not
    inherited by its children. A remote store, and a network disk without locks, have only the facts.

    Args:
        path: The hidden file.
        log: The log, for errors.
        owner: The name of the logger.
        argument: Its argument that holds the place.

    Attributes:
        run: The identity of the run that the log belongs to, which its checkpoints hold too.
        saved: The extent of the log at the newest checkpoint of that run; None if there is none.
        exists: Whether the file could be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     claim = Claim(Path(folder, ".log.run"), Path(folder, "log"), "JSONLinesLogger", "path")
        ...     claim.take()
        ...     claim.note(120)
        ...     claim.release()
        ...     later = Claim(Path(folder, ".log.run"), Path(folder, "log"), "JSONLinesLogger", "path")
        >>> later.run == claim.run, later.saved
        (True, 120)
    """

    def __init__(self, path: AnyPath, log: AnyPath, owner: str, argument: str) -> None:
        self.path, self.log, self.owner, self.argument = path.absolute(), log, owner, argument
        facts = self._read()
        self.exists = facts is not None
        self.run: str = facts["run"] if facts else uuid.uuid4().hex
        self.saved: Any = facts.get("saved") if facts else None
        self._since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file: Any = None
        self._pid = 0
        self._warned = False

    def begin(self) -> None:
        """Forget the run that had a log of this name before: the log is new."""
        self.run, self.saved = uuid.uuid4().hex, None

    def take(self) -> None:
        """Take the lock, and note the process.

        Raises:
            MisconfigurationError: If another run has it.
            OSError: If the file cannot be written to.
        """
        if isinstance(self.path, Path) and self._file is None:
            if (other := self._of_this_process()) is not None:
                raise self._refusal(f"another trainer in this process, {os.getpid()}, since {other._since}")
            self._file = opened(self.path)
            self._lock()
            if key(os.fstat(self._file.fileno())) != key(os.stat(self.path)):  # its owner removed it meanwhile
                self.release()
                self.take()
                return
        self._write()

    def note(self, saved: Any) -> None:
        """Note that a checkpoint was written.

        Args:
            saved: The extent of the log in it.
        """
        self.saved = saved
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{self.owner} could not note a checkpoint in {printable(self.path)}: {storage.first_line(error)}. A run "
                    "that resumes an older one may cut off what was logged since.",
                    stacklevel=2,
                )

    def release(self, *, remove: bool = False) -> None:
        """Let other runs write.

        Args:
            remove: Whether to remove the facts. Without them the log is never shortened.
        """
        if remove and self._file is not None:
            with contextlib.suppress(OSError):  # then they stay, and do no harm
                self.path.unlink()
        if self._file is not None:
            _held.pop(key(os.fstat(self._file.fileno())), None)
            self._file.close()  # with the lock
            self._file = None

    def _of_this_process(self) -> Claim | None:
        """Return the claim of this process on the same file. To open and close the file would end its lock."""
        try:
            other = _held.get(key(os.stat(self.path))) if isinstance(self.path, Path) else None
        except OSError:  # there is no such file
            return None
        return other if other is not None and other._pid == os.getpid() else None

    def _lock(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while fcntl is not None:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in UNSUPPORTED:
                    break
                if time.monotonic() > deadline:
                    self._file.close()
                    self._file = None
                    raise self._refusal(self._holder()) from error
            time.sleep(0.05)
        self._pid = os.getpid()
        _held[key(os.fstat(self._file.fileno()))] = self

    def _holder(self) -> str:
        facts = self._read() or {}
        if not facts.get("pid"):
            return "another process"
        return printable(f"the process {facts['pid']} on {facts.get('host')}, since {facts.get('since')}")

    def _refusal(self, holder: str) -> MisconfigurationError:
        return MisconfigurationError(
            f"{self.owner} cannot write to {self.log}: another run writes there, that of {holder}. Wait until it has ended, or "
            f"give another {self.argument}."
        )

    def _read(self) -> dict[str, Any] | None:
        """Return the facts; None if there is no file, or it was not written by a claim."""
        if (other := self._of_this_process()) is not None:
            return {"run": other.run, "saved": other.saved}
        try:
            with self.path.open("rb") as file:
                facts = json.loads(file.readline())
        except (OSError, ValueError):
            return None
        return facts if isinstance(facts, dict) and isinstance(facts.get("run"), str) else None

    def _write(self) -> None:
        facts = {"run": self.run, "saved": self.saved, "host": socket.gethostname(), "pid": os.getpid(), "since": self._since}
        line = json.dumps(facts).encode() + b"\n"
        if self._file is not None:
            # In place, because the lock is on this file. Readers take the first line, so half of an older one may follow it.
            os.pwrite(self._file.fileno(), line, 0)
            self._file.truncate(len(line))
        elif not isinstance(self.path, Path):
            with tempfile.NamedTemporaryFile() as file:
                file.write(line)
                file.flush()
                self.path.put(file.name)


def is_over(trainer: Trainer, claim: Claim | None) -> bool:
    """Return whether no run will resume a fit that has ended: it was not stopped, or has no checkpoint to resume it from."""
    return trainer.stop_reason is None or claim is None or claim.saved is None


def key(status: os.stat_result) -> tuple[int, int]:
    """Return the device and number of a file, which no other file has meanwhile."""
    return status.st_dev, status.st_ino


def opened(path: Path) -> Any:
    """Open a file to read and write it, and make it if there is none; fail if it is a symbolic link."""
    return os.fdopen(storage.without_following(path, os.O_RDWR | os.O_CREAT), "r+b", buffering=0)


class Extents:
    """The extents of a log in the states that were asked for, of which one is that of a checkpoint that is written now.

    Args:
        state_key: The logger's key in checkpoints.
        of_state: Returns the extent in a state.
    """

    def __init__(self, state_key: str, of_state: Callable[[Any], Any]) -> None:
        self._state_key, self._of_state = state_key, of_state
        self._asked: list[Any] = []

    def add(self, extent: Any) -> None:
        """Add the extent of a state."""
        if extent not in self._asked:
            self._asked.append(extent)

    def in_checkpoint(self, path: Any) -> Any:
        """Return the extent in a checkpoint. The file is read only if it may be one of several.

        Args:
            path: The checkpoint's file.
        """
        asked, self._asked = self._asked, []
        if len(asked) > 1:  # copies for the case of an error, or a thread that writes
            with contextlib.suppress(Exception):  # it may be gone already, and the largest is right too
                return self._of_state(storage.without_tensors(path)["callbacks"][self._state_key])
        return asked[-1] if asked else None
