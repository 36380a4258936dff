"""Write, name, delete and find the checkpoints of a folder."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import math
import os
import re
import shutil
import string
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from eventtrain.callbacks.claims import Claim
from eventtrain.callbacks.saved_state import file_names, items
from eventtrain.checkpoint import storage
from eventtrain.checkpoint.shape import is_of
from eventtrain.errors import MisconfigurationError, printable
from eventtrain.paths import AnyPath, RemotePath

SUFFIX = ".ckpt"
LAST, PREVIOUS = f"last{SUFFIX}", f"previous{SUFFIX}"
HALF_WRITTEN = re.compile(rf"\..+{re.escape(SUFFIX)}(\.[0-9a-f]{{16}})?{re.escape(storage.TEMPORARY)}")
KEPT = rf"(?!(?:{re.escape(LAST)}|{re.escape(PREVIOUS)})\Z).+{re.escape(SUFFIX)}"
TEMPLATE = "'{epoch}-{step}-{val_loss:.3f}'"

Written = dict[str, OSError] | None
"""The errors of the files that could not be deleted after a checkpoint was written; None in other processes than the first."""


class CheckpointFolder:
    """A folder into which one run at a time writes checkpoints.

    Args:
        path: The folder.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self._claim: Claim | None = None

    def prepare(self, *, claims: bool) -> None:
        """Make the folder, try to write in it, and delete the files that a killed run left there half written.

        Args:
            claims: Whether to claim the right to write ``last.ckpt``, which one run at a time has. The hidden file of the
                claim is beside the folder. If there can be none, as on a disk without locks, nobody is refused.

        Raises:
            OSError: If nothing can be written there.
            MisconfigurationError: If another run has the claim.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if claims and isinstance(self.path, Path):
            place = self.path.resolve()
            self._claim = Claim(place.with_name(f".{place.name}.run"), self.path, "ModelCheckpoint", "dirpath")
            with contextlib.suppress(OSError):
                self._claim.take()
        storage.temporary_name(self.path / LAST).touch(exist_ok=False)
        for left in self.files(f".*{storage.TEMPORARY}"):
            if HALF_WRITTEN.fullmatch(left.name):
                left.unlink(missing_ok=True)

    def release(self) -> None:
        """Let other runs write, and remove the hidden file."""
        if self._claim is not None:
            self._claim.release(remove=True)
            self._claim = None

    def write(self, content: Mapping[str, Any], names: list[str], surplus: list[str]) -> dict[str, OSError]:
        """Write a checkpoint, then delete others.

        Args:
            content: The checkpoint.
            names: Its names. If one is ``last.ckpt``, the earlier file of that name becomes ``previous.ckpt``.
            surplus: Names of files to delete once the checkpoint is complete under all of its names.

        Returns:
            The errors of the files that could not be deleted.

        Raises:
            OSError: If it could not be written; the other files are intact.
        """
        first, *more = names
        storage.write(content, self.path / first, before=self._keep_previous if first == LAST else None)
        for name in more:
            self.link(self.path / first, name)
        return self.delete(surplus)

    def link(self, path: AnyPath, name: str, *, keeps_previous: bool = True) -> None:
        """Give a complete checkpoint a name in this folder.

        Args:
            path: Its file, in this folder or in another one.
            name: The name. If it is ``last.ckpt``, the earlier file of that name becomes ``previous.ckpt``.
            keeps_previous: Whether it does.

        Raises:
            OSError: If the file cannot be written.
        """
        link(path, self.path / name, before=self._keep_previous if name == LAST and keeps_previous else None)

    def delete(self, names: Iterable[str]) -> dict[str, OSError]:
        """Delete files, as far as that is possible; return the errors of the others."""
        errors = {}
        for name in names:
            try:
                (self.path / name).unlink(missing_ok=True)
            except OSError as error:
                errors[name] = error
        return errors

    def files(self, pattern: str = f"*{SUFFIX}") -> list[AnyPath]:
        """Return the files whose names match, in the order of their names; none if there is no such folder.

        Raises:
            OSError: If the folder cannot be read.
        """
        if isinstance(self.path, RemotePath):
            return self.path.glob(pattern)
        try:
            names = os.listdir(self.path)  # Path.glob takes a folder that may not be read for an empty one
        except FileNotFoundError:
            return []
        return [self.path / name for name in sorted(fnmatch.filter(names, pattern))]

    def newest(self) -> list[AnyPath]:
        """Return the checkpoints, newest first. A file with two names is listed once; a remote store has two files then.

        Raises:
            OSError: If the folder, or a file in it, cannot be read.
        """
        files: dict[Any, tuple[Any, AnyPath]] = {}
        for path in sorted(self.files(), key=lambda path: path.name != LAST):
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # another process may have deleted it by now
                status = None if isinstance(path, RemotePath) else path.stat()
                key = path if status is None else (status.st_dev, status.st_ino)
                if key not in files:
                    files[key] = storage.written_at(path), path
        return [path for _, path in sorted(files.values(), key=lambda each: each[0], reverse=True)]

    def offered(self, dirpath: str) -> list[AnyPath]:
        """Return the checkpoints, newest first.

        Args:
            dirpath: The folder as the user gave it, for the message.

        Raises:
            MisconfigurationError: If it is not known which is the newest, because the folder or a file cannot be read.
        """
        try:
            return self.newest()
        except OSError as error:
            raise MisconfigurationError(
                f"ModelCheckpoint(dirpath={dirpath!r}): its checkpoints cannot be read, so it is not known which is the "
                f"newest: {storage.first_line(error)}. Try again, move the file away, or give the path of one."
            ) from error

    def finish(self, path: AnyPath, names: list[str], surplus: list[str], *, passes_over_newer: bool) -> None:
        """Do what a killed run had still to do when a checkpoint was complete.

        Args:
            path: The checkpoint, in this folder or in another one.
            names: The names that it has to have here.
            surplus: The names of files to delete.
            passes_over_newer: Whether newer files were passed over, because they are damaged.

        Raises:
            OSError: If a file cannot be written or deleted.
        """
        sequence = sequence_of(path)
        for name in names:
            other = sequence_of(self.path / name)
            if other < sequence:
                self.link(path, name)
            elif other > sequence and passes_over_newer:
                self.link(path, name, keeps_previous=False)
        # A newer file of such a name is that of a run which this one does not continue.
        for error in self.delete(name for name in surplus if sequence_of(self.path / name) <= sequence).values():
            raise error

    def unwritten(self, failed: AnyPath, reason: str) -> str:
        """Return a message: a checkpoint could not be written."""
        try:
            intact = f": {[path.name for path in self.newest()]}"
        except OSError:
            intact = ""
        return (
            f"ModelCheckpoint could not write {printable(failed)}: {reason}. Earlier files are intact{intact}. "
            "Free some space or give another dirpath; with ModelCheckpoint(on_error='warn') a run continues without the "
            "checkpoint."
        )

    def undeleted(self, name: str, saved: AnyPath, reason: str) -> str:
        """Return a message: a file could not be deleted after a new one was saved."""
        return (
            f"ModelCheckpoint could not delete {printable(self.path / name)}: {reason}. The new one {printable(saved)} is "
            "complete. Delete the old one; with ModelCheckpoint(on_error='warn') a run continues, and tries it again with the "
            "next checkpoint."
        )

    def _keep_previous(self) -> None:
        """Let ``last.ckpt`` be ``previous.ckpt`` too. It is replaced after that, so there is one at every moment."""
        if (self.path / LAST).exists():
            link(self.path / LAST, self.path / PREVIOUS)


def link(path: AnyPath, new: AnyPath, *, before: Callable[[], None] | None = None) -> None:
    """Give a checkpoint a second name, without a second copy if the file system has hard links.

    Args:
        path: The file.
        new: Its other name, at which there may be another file.
        before: As in :func:`~eventtrain.checkpoint.storage.write`.

    Raises:
        OSError: If the file cannot be written.
    """
    with storage.renamed_to(new, before) as temporary:
        try:
            if type(path) is not type(new):
                raise OSError(errno.EXDEV, "a disk and a store share no file")
            temporary.hardlink_to(path)
        except OSError:
            with path.open("rb") as source, storage.writing(temporary) as file:
                shutil.copyfileobj(source, file)


def sequence_of(path: AnyPath) -> float:
    """Return the sequence number of a checkpoint: 0 if there is none or an older version wrote it, infinity if it is damaged.

    Raises:
        OSError: If the file cannot be opened.
    """
    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
        return storage.written_at(path)[0]
    return 0


def contains(folder: AnyPath, path: AnyPath) -> bool:
    """Return whether a folder holds a file, however the two are written."""
    if isinstance(folder, RemotePath) or isinstance(path, RemotePath):
        return path.parent == folder
    return path.parent.resolve() == folder.resolve()


def is_there(path: AnyPath) -> bool:
    """Return whether there is a file; True if it cannot be known, because to read the file will tell."""
    try:
        return path.exists()
    except OSError:
        return True


def kept_names(names: Any, key: str) -> list[str]:
    """Return the names of checkpoints that a state lists, if each can only be a file of the folder.

    Args:
        names: The names, in a list or as the keys of a dict.
        key: Their name in the state, for the error.

    Raises:
        MisconfigurationError: If one is a path, or no checkpoint besides the last two.
    """
    return file_names(names, key, KEPT, f"the name of a file that ModelCheckpoint keeps, such as 'epoch=3-step=99{SUFFIX}'")


def written_names(names: Any) -> list[str]:
    """Return the names under which a state says that its checkpoint is kept, ``last.ckpt`` included.

    Raises:
        MisconfigurationError: If one is a path, or no checkpoint.
    """
    return file_names(names, "names", rf".+{re.escape(SUFFIX)}", f"the name of a checkpoint, such as {LAST!r}")


def kept_scores(state: Any) -> dict[str, float | None]:
    """Return the kept files of a callback's state with their scores.

    Args:
        state: The state, as a checkpoint holds it.

    Raises:
        MisconfigurationError: If a name is no name of such a file, or a score is no number.
    """
    scores = items(state, "kept", lambda _, score: is_of(score, float) or score is None, "a number or None for each file")
    kept_names(scores, "kept")
    return scores


def file_name(template: str, values: Mapping[str, Any]) -> str:
    """Fill in the fields of a template, each as ``name=value``.

    Args:
        template: For example ``"{epoch}-{val_loss:.3f}"``. A slash in a metric's name becomes an underscore.
        values: The values of the fields; a missing one is NaN.

    Returns:
        The name, with the suffix.
    """
    parts = []
    for text, field, form, _ in string.Formatter().parse(template):
        parts.append(text)
        if field is not None:
            value = values.get(field, math.nan)
            value = value if isinstance(value, int) else float(value)
            parts.append(f"{field.replace('/', '_')}={format(value, form or '')}")
    return "".join(parts) + SUFFIX


def check_folder(path: AnyPath, paths: list[AnyPath], dirpath: str) -> None:
    """Check that a folder is that of one ModelCheckpoint.

    Args:
        path: The folder.
        paths: The folders of all ModelCheckpoints of a trainer.
        dirpath: The folder as the user gave it, for the message.

    Raises:
        MisconfigurationError: If two have it.
    """
    if paths.count(path) > 1:
        raise MisconfigurationError(
            f"Two ModelCheckpoints write to {dirpath!r}, and each would delete the files of the other. "
            "Give each of them another dirpath."
        )


def check_template(template: Any, owner: str) -> str:
    """Return a template if it gives names of files.

    Args:
        template: See :func:`file_name`.
        owner: The class that takes it, for the message.

    Raises:
        MisconfigurationError: If it is no text, no template, or leads to another folder.
    """
    problem = f"{owner}(filename={template!r})"
    if not isinstance(template, str) or not template or template in ("last", "previous"):
        raise MisconfigurationError(f"{problem}: give a text other than 'last' and 'previous', such as {TEMPLATE}.")
    try:
        parts = list(string.Formatter().parse(template))
        for _, field, form, _ in parts:
            format(1 if field in ("epoch", "step") else 1.0, form or "")
    except ValueError as error:
        raise MisconfigurationError(f"{problem}: {error}. Give a template such as {TEMPLATE}.") from error
    if any("/" in text or "\\" in text or field == "" for text, field, *_ in parts):
        raise MisconfigurationError(f"{problem}: fields need names, and a slash is not allowed. Give one such as {TEMPLATE}.")
    return template
