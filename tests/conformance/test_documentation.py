"""The guide for Lightning's users leaves nothing out."""

from __future__ import annotations

import inspect
import re

from .differences import PAGE
from .frameworks import lightning


def first_column(title: str) -> set[str]:
    """Return the names in code in the first column of a section's table."""
    section = PAGE.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")]
    return {name for cell in cells for code in re.findall(r"`([^`]+)`", cell) for name in re.findall(r"^\w+", code)}


def test_every_argument_of_its_trainer_is_there() -> None:
    arguments = set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self"}
    assert arguments - first_column("The Trainer's arguments") == set()


def test_every_callback_is_there() -> None:
    assert set(lightning.callbacks.__all__) - first_column("Its callbacks") == set()
