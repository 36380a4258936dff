"""Private names of torch and torchmetrics are used in one file only, ``eventtrain/_torch.py``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GATHERED = ROOT / "eventtrain" / "_torch.py"
FILES = [path for folder in ("eventtrain", "callbacks") for path in sorted((ROOT / folder).rglob("*.py")) if path != GATHERED]

ALLOWED = {
    ("callbacks/distributed/exchanges.py", "_current_frames"): "of sys, which documents it",
    ("eventtrain/core/signals.py", "_by_sender"): "of blinker, which calls a setter before it has built its maps",
    ("eventtrain/data/combined.py", "_fields"): "of namedtuple, which documents it",
    ("eventtrain/data/device.py", "_fields"): "of namedtuple, which documents it",
}
"""Private names of other libraries, by file, with the reason."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier() and name != "_"


def uses(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Yield the private names that a file uses, each with whether it is an attribute of ``self`` or ``cls``."""
    pieces = {id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
    for node in ast.walk(tree):
        if id(node) in pieces:
            continue  # text between the fields of an f-string
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr, isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_private(node.value):
            yield node.value, False  # as in getattr(module, "_name"), or as a key of vars(module)
        elif isinstance(node, ast.Import):
            yield from ((part, False) for alias in node.names for part in alias.name.split(".") if is_private(part))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("eventtrain"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from ((name, False) for name in names if is_private(name))


def defined(tree: ast.AST) -> Iterator[str]:
    """Yield the private names that a file defines: attributes of ``self``, members of classes, functions and slots."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):  # __slots__
            yield from (str(each.value) for each in node.value.elts if isinstance(each, ast.Constant))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("object.__setattr__", "write"):
            yield from (str(each.value) for each in node.args[1:2] if isinstance(each, ast.Constant))


TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}
OURS = {name for tree in TREES.values() for name in defined(tree) if is_private(name)} | {
    "_on_demand", "_eventtrain_noted", "_trainer", "_toggles", "_hparams", "_hparams_ignored", "_hparams_initial",
    "_hparams_left_out", "_hparams_object", "_log_hyperparams", "_call_step", "_entered", "_seen", "_left_metrics",
}  # fmt: skip
"""The private names of the package's own classes; those after the bar are attributes and keys that are not assigned by name."""
OF_TORCH = {name for name, _ in uses(ast.parse(GATHERED.read_text()))}


def private_names(file: str) -> set[str]:
    """Return the private names of other libraries that a file uses.

    A name that ``_torch.py`` uses counts even if a class of the package has the same, unless it is read from ``self`` in a
    file that defines it.
    """
    defines = set(defined(TREES[file]))
    return {
        name
        for name, of_self in uses(TREES[file])
        if (name not in OURS or name in OF_TORCH) and not (of_self and name in defines) and (file, name) not in ALLOWED
    }


def test_private_names_of_torch_are_used_in_one_file() -> None:
    assert {file: names for file in TREES if (names := private_names(file))} == {}


def test_private_names_are_recognised() -> None:
    source = """
    import torch._dynamo
    from torch.nn import _private
    class Own:
        def __init__(self): self._iterator = None
        def read(self, loader, module):
            return self._iterator, loader._iterator, getattr(module, "_buffers"), module._hooks(1)
    """
    tree = ast.parse(source.replace("\n    ", "\n"))
    assert sorted(name for name, of_self in uses(tree) if not of_self) == [
        "_buffers", "_dynamo", "_hooks", "_iterator", "_private",
    ]  # fmt: skip
    assert "_iterator" in set(defined(tree))


def test_every_gathered_name_is_documented() -> None:
    tree = ast.parse(GATHERED.read_text())
    undocumented = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not ast.get_docstring(node)]
    assert undocumented == []
