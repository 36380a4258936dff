"""A folder of checkpoints: their names, the order that they are written and deleted in, and finding them again."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eventtrain.checkpoint import storage
from eventtrain.errors import MisconfigurationError

SUFFIX = ".ckpt"
LAST, PREVIOUS = f"last{SUFFIX}", f"previous{SUFFIX}"
TEMPLATE = "'{epoch}-{step}-{val_loss:.3f}'"


class CheckpointFolder:
    """A folder that one run at a time writes checkpoints to.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def prepare(self, surplus: Iterable[str]) -> None:
        """Makes the folder, tries to write in it, and clears what a run left there that was killed as it wrote or deleted.

        Args:
            surplus: Files that were to be deleted.

        Raises:
            OSError: Nothing can be written there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        trial = self.path / f".{LAST}{storage.TEMPORARY}"
        trial.touch()
        for left in [*self.path.glob(f".*{SUFFIX}{storage.TEMPORARY}"), *(self.path / name for name in surplus)]:
            left.unlink(missing_ok=True)

    def write(self, content: Mapping[str, Any], names: list[str], surplus: list[str]) -> None:
        """Writes a checkpoint, then deletes others.

        Args:
            content: The checkpoint.
            names: Its names: the file that is there under ``last.ckpt`` becomes ``previous.ckpt``.
            surplus: What is deleted once the checkpoint is whole under all of its names.

        Raises:
            OSError: It could not be written; the others are intact.
        """
        first, *more = names
        previous = self.path / PREVIOUS
        storage.write(content, self.path / first, previous=previous if first == LAST else None)
        for name in more:
            storage.link(self.path / first, self.path / name, previous=previous if name == LAST else None)
        for name in surplus:
            (self.path / name).unlink(missing_ok=True)

    def newest(self) -> list[Path]:
        """The files, newest first; one that has two names once."""
        found: dict[tuple[int, int], Path] = {}
        for path in sorted(self.path.glob(f"*{SUFFIX}"), key=lambda path: path.name != LAST):
            if path.is_file():
                status = path.stat()
                found.setdefault((status.st_dev, status.st_ino), path)
        return sorted(found.values(), key=storage.written_at, reverse=True)


def file_name(template: str, values: Mapping[str, Any]) -> str:
    """A template with its fields filled in, each as ``name=value``.

    Args:
        template: Such as ``"{epoch}-{val_loss:.3f}"``.
        values: The fields' values; NaN where there is none. A metric's name may hold a slash, the file's an underscore there.
    """
    parts = []
    for text, field, form, _ in string.Formatter().parse(template):
        parts.append(text)
        if field is not None:
            value = values.get(field, math.nan)
            value = value if isinstance(value, int) else float(value)
            parts.append(f"{field.replace('/', '_')}={format(value, form or '')}")
    return "".join(parts) + SUFFIX


def check_template(template: Any, named: str) -> str:
    """Refuses what gives no file's name.

    Args:
        template: See :func:`file_name`.
        named: What it is in the message.

    Raises:
        MisconfigurationError: It is no text, no template, or leads to another folder.
    """
    problem = f"{named}={template!r}"
    if not isinstance(template, str) or not template or template in ("last", "previous"):
        raise MisconfigurationError(f"{problem}: it has to be a text, and not 'last' or 'previous'. Write {TEMPLATE}.")
    try:
        parts = list(string.Formatter().parse(template))
        for _, field, form, _ in parts:
            format(1 if field in ("epoch", "step") else 1.0, form or "")
    except ValueError as error:
        raise MisconfigurationError(f"{problem}: {error}. Write {TEMPLATE}.") from error
    if any("/" in text or "\\" in text or field == "" for text, field, *_ in parts):
        raise MisconfigurationError(f"{problem}: fields have names, and a file's name no slash. Write {TEMPLATE}.")
    return template
