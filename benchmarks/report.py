"""Puts what a benchmark printed into ``docs/performance.md``, between the comments that bear its name."""

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
    """What the figures were measured on."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def save(name: str, table: str, facts: dict[str, Any], figures: Any, page: Path = PAGE, path: Path = FIGURES) -> None:
    """Rewrites one block of the page, and its figures.

    Args:
        name: The block's name.
        table: What is to stand there, as Markdown.
        facts: What it was measured on.
        figures: All that was measured, for programs.
        page: The page.
        path: The file of figures.
    """
    measured = ", ".join(f"{fact} {value}" for fact, value in facts.items())
    page.write_text(replaced(page.read_text(), name, f"{table}\n\n*{measured}*"))
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = {"measured on": facts, "figures": figures}
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
