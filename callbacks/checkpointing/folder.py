"""Write, name, delete and find the checkpoints of a folder."""

from __future__ import annotations

import math
import re
import shutil
import string
from collections.abc import Iterable, Mapping
from typing import Any

from eventtrain.callbacks.saved_state import file_names, is_of, items
from eventtrain.checkpoint import storage
from eventtrain.errors import MisconfigurationError
from eventtrain.paths import AnyPath, RemotePath

SUFFIX = ".ckpt"
LAST, PREVIOUS = f"last{SUFFIX}", f"previous{SUFFIX}"
HALF_WRITTEN = re.compile(rf"\..+{re.escape(SUFFIX)}(\.[0-9a-f]{{16}})?{re.escape(storage.TEMPORARY)}")
KEPT = rf"(?!(?:{re.escape(LAST)}|{re.escape(PREVIOUS)})\Z).+{re.escape(SUFFIX)}"
TEMPLATE = "'{epoch}-{step}-{val_loss:.3f}'"


class CheckpointFolder:
    """A folder into which one run at a time writes checkpoints.

    Args:
        path: The folder.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = path

    def prepare(self, surplus: Iterable[str]) -> None:
        """Make the folder, try to write in it, and delete the files that a killed run left there half written or half deleted.

        Args:
            surplus: Names of files that an earlier run had still to delete.

        Raises:
            OSError: If nothing can be written there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        storage.temporary_name(self.path / LAST).touch(exist_ok=False)
        halves = [path for path in self.path.glob(f".*{storage.TEMPORARY}") if HALF_WRITTEN.fullmatch(path.name)]
        for left in [*halves, *(self.path / name for name in surplus)]:
            left.unlink(missing_ok=True)

    def write(self, content: Mapping[str, Any], names: list[str], surplus: list[str]) -> None:
        """Write a checkpoint, then delete others.

        Args:
            content: The checkpoint.
            names: Its names. If one is ``last.ckpt``, the earlier file of that name becomes ``previous.ckpt``.
            surplus: Names of files to delete once the checkpoint is complete under all of its names.

        Raises:
            OSError: If it could not be written; the other files are intact.
        """
        first, *more = names
        previous = self.path / PREVIOUS
        storage.write(content, self.path / first, previous=previous if first == LAST else None)
        for name in more:
            link(self.path / first, self.path / name, previous=previous if name == LAST else None)
        for name in surplus:
            (self.path / name).unlink(missing_ok=True)

    def newest(self) -> list[AnyPath]:
        """Return the files, newest first. A file with two names is listed once; a remote store has two files then."""
        files: dict[Any, AnyPath] = {}
        paths: list[AnyPath] = list(self.path.glob(f"*{SUFFIX}"))
        for path in sorted(paths, key=lambda path: path.name != LAST):
            if path.is_file():
                status = None if isinstance(path, RemotePath) else path.stat()
                files.setdefault(path if status is None else (status.st_dev, status.st_ino), path)
        return sorted(files.values(), key=storage.written_at, reverse=True)


def link(path: AnyPath, new: AnyPath, *, previous: AnyPath | None = None) -> None:
    """Give a checkpoint a second name, without a second copy if the file system has hard links.

    Args:
        path: The file.
        new: Its other name, in the same directory.
        previous: As in :func:`~eventtrain.checkpoint.storage.write`.

    Raises:
        OSError: If the file cannot be written.
    """
    with storage.renamed_to(new, previous) as temporary:
        try:
            temporary.hardlink_to(path)
        except OSError:
            with path.open("rb") as source, storage.writing(temporary) as file:
                shutil.copyfileobj(source, file)


def kept_names(names: Any, key: str) -> list[str]:
    """Return the names of checkpoints that a state lists, if each can only be a file of the folder.

    Args:
        names: The names, in a list or as the keys of a dict.
        key: Their name in the state, for the error.

    Raises:
        MisconfigurationError: If one is a path, or no checkpoint besides the last two.
    """
    return file_names(names, key, KEPT, f"the name of a file that ModelCheckpoint keeps, such as 'epoch=3-step=99{SUFFIX}'")


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
