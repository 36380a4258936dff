"""Write the table of a benchmark into ``docs/performance.md``, between the comments with its name."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from docs.generate import ROOT, replaced

PAGE = ROOT / "docs" / "performance.md"
FIGURES = ROOT / "docs" / "performance.json"


def environment() -> dict[str, Any]:
    """Return facts about the machine and the software."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def save(name: str, table: str, facts: dict[str, Any], figures: Any, page: Path = PAGE, path: Path = FIGURES) -> None:
    """Rewrite one block of the page, and its figures.

    Args:
        name: The name of the block.
        table: The new text of the block, as Markdown.
        facts: Facts about the machine and the software.
        figures: All measured values, for programs.
        page: The page.
        path: The file of figures.

    Raises:
        ValueError: If the page has no block with this name.
    """
    measured = ", ".join(f"{fact} {value}" for fact, value in facts.items())
    page.write_text(replaced(page.read_text(), name, f"{table}\n\n*{measured}*"))
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = {"measured on": facts, "figures": figures}
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
