"""The places at which the chaos tests kill a process: each change to a file, and each event of a run.

    places = Places(at=17)  # in the process that is to die
    places.count_file_operations()
    places.count_events(trainer)

Counted are, in every thread of the process, in the order in which they come:

- ``write``: each write to a file that ``open`` opened to write. The process dies with half of the data in the file;
- ``create``, ``truncate``, ``fsync``, ``rename`` (``os.replace`` too), ``link``, ``unlink``, ``mkdir`` and ``rmdir``: the
  process dies before the operation;
- ``event``: the beginning of each event, and ``listener``: the end of each call of a listener.

If a process is killed, it is by SIGKILL, so no ``finally`` block and no exit handler runs.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from eventtrain import Trainer
from eventtrain.core.signals import Observer

OPERATIONS = {
    **dict.fromkeys(("fsync", "fdatasync"), "fsync"),
    **dict.fromkeys(("rename", "replace"), "rename"),
    **dict.fromkeys(("link", "symlink"), "link"),
    **dict.fromkeys(("unlink", "remove"), "unlink"),
    **dict.fromkeys(("truncate", "ftruncate"), "truncate"),
    **{name: name for name in ("mkdir", "rmdir", "write")},
}
"""The functions of ``os`` that are counted, with the names under which they are."""
READS = {"stat": "stat", "lstat": "stat", "listdir": "list", "scandir": "list"}
"""Those that are counted besides, if reads are."""

GETPID = os.getpid  # a run may be given another number


class Places:
    """Count the places of this process, and kill it at one of them.

    Args:
        at: The number of the place, from 1; None to count without a kill.
        before: Called with the kind of each place, before the kill; to do something else there, such as to raise an error.
        within: A part of the paths of the files whose operations are counted; empty for all. Operations on open files are
            counted always.
        reads: Whether operations that only read are counted too: ``stat``, ``list``, and ``open`` of a file to read.

    Attributes:
        kinds: The kinds of the places so far, in order.
    """

    def __init__(
        self,
        at: int | None = None,
        before: Callable[[str], None] | None = None,
        *,
        within: str = "",
        reads: bool = False,
    ) -> None:
        self.at = at
        self.before = before
        self.within = within
        self.reads = reads
        self.kinds: list[str] = []
        self.counts = True
        self._process = GETPID()
        self._lock = threading.Lock()
        self._replaced: list[tuple[Any, str, Any]] = []

    def reach(self, kind: str, prepare: Callable[[], Any] | None = None) -> None:
        """Count a place, and die there if its turn has come.

        Args:
            kind: The kind of the place.
            prepare: Called before the death, for example to do half of a write.
        """
        if not self.counts or GETPID() != self._process:  # in a worker of a loader
            return
        with self._lock:
            self.kinds.append(kind)
            dies = len(self.kinds) == self.at
        if self.before is not None:
            self.before(kind)
        if dies:
            if prepare is not None:
                prepare()
            os.kill(self._process, signal.SIGKILL)
            time.sleep(60)  # until the signal has arrived

    def count_events(self, trainer: Trainer) -> None:
        """Count the events of a trainer's runs, and the calls of its listeners, from the next event on."""
        trainer.signals.observe(EventPlaces(self))

    # ------------------------------------------------------------------ files

    def count_file_operations(self) -> None:
        """Count the operations on files from now on."""
        for name, kind in {**OPERATIONS, **(READS if self.reads else {})}.items():
            if hasattr(os, name):
                self._replace(os, name, self._counted(getattr(os, name), kind))
        self._replace(os, "open", self._counted_open(os.open))
        watched = self._watched_open(builtins.open)
        for module in (builtins, io):
            self._replace(module, "open", watched)

    def stop(self) -> None:
        """Count nothing more, and give the functions back."""
        self.counts = False
        while self._replaced:
            setattr(*self._replaced.pop())

    def _replace(self, module: Any, name: str, function: Callable[..., Any]) -> None:
        self._replaced.append((module, name, getattr(module, name)))
        setattr(module, name, function)

    def _is_within(self, path: Any) -> bool:
        return isinstance(path, int) or self.within in os.fsdecode(path)

    def _counted(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if not args or self._is_within(args[0]):
                self.reach(kind)
            return function(*args, **kwargs)

        return counted

    def _counted_open(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any, flags: int, *args: Any, **kwargs: Any) -> Any:
            if (flags & os.O_CREAT or self.reads) and self._is_within(path):
                self.reach("create" if flags & os.O_CREAT else "open")
            return function(path, flags, *args, **kwargs)

        return counted

    def _watched_open(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            is_counted = not isinstance(file, int) and self._is_within(file)
            if not set(mode) & set("wax+"):
                if self.reads and is_counted:
                    self.reach("open")
                return function(file, mode, *args, **kwargs)
            if is_counted:
                self.reach("create")
            opened = function(file, mode, *args, **kwargs)
            return WatchedFile(opened, self) if is_counted or isinstance(file, int) else opened

        return watched


class WatchedFile:
    """A file that is open to write, whose writes are counted.

    Args:
        file: The file.
        places: The counter.
    """

    def __init__(self, file: Any, places: Places) -> None:
        self._file = file
        self._places = places

    def write(self, data: Any) -> Any:
        """Write; or write the first half to the disk, and die."""

        def half() -> None:
            view: Any = data if isinstance(data, str) else memoryview(data).cast("B")
            self._file.write(view[: len(view) // 2])
            self._file.flush()

        self._places.reach("write", half)
        return self._file.write(data)

    def truncate(self, size: int | None = None) -> Any:
        """Change the file's length."""
        self._places.reach("truncate")
        return self._file.truncate(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> WatchedFile:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._file)


class EventPlaces(Observer):
    """Count the events that a trainer publishes.

    Args:
        places: The counter.
    """

    def __init__(self, places: Places) -> None:
        self.places = places

    def event_begins(self, name: str, event: Any) -> None:
        self.places.reach(f"event {name}")

    def listener_ends(self, listener: Any) -> None:
        self.places.reach("listener")
