"""The floor plan: which file may import which, how large the rooms are, and how the prose reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from eventtrain import callbacks as shipped

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "eventtrain").rglob("*.py"))
CALLBACKS = sorted((ROOT / "callbacks").rglob("*.py"))
FILES = {
    **{"eventtrain." + ".".join(path.relative_to(ROOT / "eventtrain").with_suffix("").parts): path for path in LIBRARY},
    **{
        "eventtrain.callbacks." + ".".join(path.relative_to(ROOT / "callbacks").with_suffix("").parts): path
        for path in CALLBACKS
    },
}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}


def imported(path: Path, *, when_loaded: bool = False) -> Iterator[str]:
    """Yield the modules and names that a file imports.

    Args:
        path: The file.
        when_loaded: Leave out imports in functions and imports for type checkers.
    """
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif when_loaded and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        elif when_loaded and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)


def graph(*, when_loaded: bool) -> dict[str, set[str]]:
    """Return the modules that each module imports."""
    return {name: set(imported(path, when_loaded=when_loaded)) & MODULES.keys() - {name} for name, path in MODULES.items()}


def test_no_import_circle_at_run_time() -> None:
    list(TopologicalSorter(graph(when_loaded=True)).static_order())  # raises CycleError, which names the circle


def test_the_library_finds_callbacks_by_one_late_import() -> None:
    imports = [f"{path.name}: {name}" for path in LIBRARY for name in imported(path) if name == "eventtrain.callbacks"]
    assert imports == ["trainer.py: eventtrain.callbacks"]
    assert not [name for path in LIBRARY for name in imported(path, when_loaded=True) if "callbacks" in name.split(".")]


def test_no_callback_imports_another() -> None:
    homes = {getattr(shipped, name).__module__ for name in shipped.__all__}
    wrong = [
        f"{path.name}: {name}" for path in CALLBACKS if path.name != "__init__.py" for name in imported(path) if name in homes
    ]
    assert wrong == []


def test_callbacks_import_helpers_of_their_own_room_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in CALLBACKS
        if path.name != "__init__.py"
        for name in imported(path)
        if name.startswith("eventtrain.callbacks.") and name.split(".")[2] != path.parent.name
    ]
    assert wrong == []


def test_only_one_file_knows_blinker() -> None:
    users = [path.name for path in [*LIBRARY, *CALLBACKS] if "blinker" in set(imported(path))]
    assert users == ["signals.py"]


def test_a_circle_would_be_noticed() -> None:
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
