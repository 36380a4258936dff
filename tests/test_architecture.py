"""The measures of the floor plan: which file may import which, how large the rooms are, and how the prose reads."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import eventtrain
from eventtrain import callbacks as shipped

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = [path for path in sorted((ROOT / "eventtrain").rglob("*.py")) if "callbacks" not in path.parts[len(ROOT.parts) :]]
CALLBACKS = sorted((ROOT / "callbacks").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    """Return the name under which a file of the package is imported."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "callbacks":
        parts.insert(0, "eventtrain")
    return ".".join(parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in [*LIBRARY, *CALLBACKS]}


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
    """Return the modules that each module imports.

    A module of a package counts, and not the package around it: that one is only passed through.
    """
    imports: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        modules = set(imported(path, when_loaded=when_loaded)) & MODULES.keys()
        imports[name] = {m for m in modules if not any(other.startswith(f"{m}.") for other in modules)} - {name}
    return imports


# ------------------------------------------------------------------ imports

# Every file has a layer, and imports files of its own layer and of layers above it in this list. The last entry that a
# file's name begins with counts.
LAYERS = [
    [
        "eventtrain.version",
        "eventtrain.errors",
        "eventtrain.hints",
        "eventtrain.checks",
        "eventtrain.paths",
        "eventtrain._torch",
    ],
    ["eventtrain.distributed", "eventtrain.events"],
    ["eventtrain.core"],
    [*(f"eventtrain.checkpoint.{name}" for name in ("archive", "rng", "storage", "weights"))],
    ["eventtrain.data", "eventtrain.metrics"],
    ["eventtrain.module"],
    ["eventtrain.optim"],
    ["eventtrain.callback"],
    ["eventtrain.checkpoint"],
    ["eventtrain.run"],
    ["eventtrain.describe"],
    ["eventtrain.trainer"],
    ["eventtrain"],
    ["eventtrain.callbacks"],
]


def layer_of(module: str) -> int:
    """Return the layer of a module: of the longest name in the list that its name begins with."""
    places = [
        (len(name), place)
        for place, layer in enumerate(LAYERS)
        for name in layer
        if module == name or (name != "eventtrain" and module.startswith(f"{name}."))
    ]
    assert places, f"{module} has no layer: add it to LAYERS"
    return max(places)[1]


def test_every_file_has_a_layer_and_imports_only_layers_above() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in graph(when_loaded=True).items()
        for other in others
        if layer_of(other) > layer_of(module)
    ]
    assert wrong == []


def test_no_import_circle_at_run_time() -> None:
    list(TopologicalSorter(graph(when_loaded=True)).static_order())  # raises CycleError, which names the circle


def test_no_import_circle_in_annotations_except_through_the_trainer() -> None:
    imports = graph(when_loaded=False)
    # Whatever is annotated with a trainer imports it for type checkers, and the trainer finds its default callbacks late.
    for module in imports:
        imports[module] = imports[module] - {"eventtrain.trainer"}
    imports["eventtrain.trainer"] = imports["eventtrain.trainer"] - {"eventtrain.callbacks"}
    list(TopologicalSorter(imports).static_order())


def test_a_circle_would_be_noticed() -> None:
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


def test_the_library_finds_callbacks_by_one_late_import() -> None:
    imports = [f"{path.name}: {name}" for path in LIBRARY for name in imported(path) if name == "eventtrain.callbacks"]
    assert imports == ["trainer.py: eventtrain.callbacks"]
    assert not [name for path in LIBRARY for name in imported(path, when_loaded=True) if "callbacks" in name.split(".")]


def test_no_callback_imports_another() -> None:
    homes = {getattr(shipped, name).__module__ for name in shipped.__all__}
    wrong = [f"{path.name}: {name}" for path in rooms_of_callbacks() for name in imported(path) if name in homes]
    assert wrong == []


def test_callbacks_import_helpers_of_their_own_room_or_of_all_rooms() -> None:
    names = ("claims", "saved_state", "terminal", "watched_metric")
    shared = tuple(f"eventtrain.callbacks.{name}" for name in names)
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in rooms_of_callbacks()
        for name in imported(path)
        if name.startswith("eventtrain.callbacks.") and name.split(".")[2] != path.parent.name and not name.startswith(shared)
    ]
    assert wrong == []


def rooms_of_callbacks() -> list[Path]:
    """Return the files of callbacks, without the files that make the packages."""
    return [path for path in CALLBACKS if path.name != "__init__.py"]


def test_nothing_in_the_library_serves_one_room_of_callbacks() -> None:
    """A helper that only one room needs lives in that room. The core and the public names serve everybody."""
    used_by_library = {name for path in LIBRARY for name in imported(path)}
    rooms = defaultdict(set)
    for path in rooms_of_callbacks():
        for name in imported(path):
            if name.startswith("eventtrain.") and not name.startswith("eventtrain.callbacks"):
                rooms[name].add(path.parent.name)
    public = {f"eventtrain.{name}" for name in eventtrain.__all__}
    homes = {
        f"{getattr(eventtrain, name).__module__}.{name}"
        for name in eventtrain.__all__
        if name[0].isalpha() and name != "events"
    }
    wrong = [
        f"{name}: {users}"
        for name, users in rooms.items()
        if len(users) == 1
        and name not in used_by_library | public | homes
        and not name.startswith(("eventtrain.events", "eventtrain._torch"))
        and not is_defined_and_used_at_home(name)
    ]
    assert wrong == []


def is_defined_and_used_at_home(name: str) -> bool:
    """Return whether a name is used in the file that defines it, so that it serves the library too."""
    module, _, attribute = name.rpartition(".")
    if module not in MODULES:
        return True
    uses = [
        node for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Name) and node.id == attribute
    ]
    return bool(uses)


def test_only_one_file_knows_blinker() -> None:
    users = [path.name for path in [*LIBRARY, *CALLBACKS] if "blinker" in set(imported(path))]
    assert users == ["signals.py"]


def test_the_wrapper_of_optimizers_knows_no_event() -> None:
    assert not [name for name in imported(MODULES["eventtrain.core.optimizer"]) if name.startswith("eventtrain.events")]


def test_the_core_imports_only_events_errors_and_the_seam_of_processes() -> None:
    known = ("eventtrain.core", "eventtrain.events", "eventtrain.errors", "eventtrain.distributed")
    wrong = [
        f"{path.name}: {name}"
        for path in LIBRARY
        if path.parent.name == "core"
        for name in imported(path)
        if name.startswith("eventtrain") and name != "eventtrain" and not name.startswith(known)
    ]
    assert wrong == []


# ------------------------------------------------------------------ sizes


def code_lines(path: Path) -> int:
    """Return the number of lines of a file without docstrings, comments and blanks."""
    source = path.read_text()
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for statement in node.body:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    docstrings.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    lines: set[int] = set()
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_code_lines_leave_out_docstrings_comments_and_blanks(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    lines = ['"""A docstring', 'of two lines."""', "", "# a comment", "x = 1  # code", "", "def f():", '    """Return."""']
    path.write_text("\n".join([*lines, "    return (", "        x", "    )"]))
    assert code_lines(path) == 5


def test_the_core_is_small() -> None:
    assert sum(code_lines(path) for path in LIBRARY if path.parent.name == "core") <= 1800


def test_the_library_is_small() -> None:
    assert sum(code_lines(path) for path in LIBRARY) <= 6600


def test_no_file_is_long() -> None:
    long = {str(path.relative_to(ROOT)): code_lines(path) for path in [*LIBRARY, *CALLBACKS] if path.name != "events.py"}
    assert {name: lines for name, lines in long.items() if lines > 350} == {}


def test_no_function_is_long() -> None:
    long = {
        f"{path.relative_to(ROOT)}: {node.name}": length
        for path in [*LIBRARY, *CALLBACKS]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (length := (node.end_lineno or 0) - node.lineno + 1 - docstring_lines(node)) > 50
    }
    assert long == {}


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines of a function's docstring."""
    first = node.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0


def test_no_test_file_is_long() -> None:
    assert {str(path.relative_to(ROOT)): n for path in TESTS if (n := len(path.read_text().splitlines())) > 800} == {}


def test_every_room_says_in_one_line_what_it_is_for() -> None:
    for path in [*LIBRARY, *CALLBACKS]:
        if path.name == "__init__.py" and path.parent.name not in ("eventtrain", "callbacks"):
            docstring = ast.get_docstring(ast.parse(path.read_text()))
            assert docstring and "\n" not in docstring, path


# ------------------------------------------------------------------ habits


def test_callbacks_connect_nothing_by_hand() -> None:
    by_hand = [
        f"{path.name}: {line}"
        for path in CALLBACKS
        for line in path.read_text().splitlines()
        if re.search(r"\.(dis)?connect\(", line)
    ]
    assert by_hand == []


def test_callbacks_use_the_trainer_as_users_do() -> None:
    """No callback reads a private attribute of another object, nor the state that belongs to the run."""
    wrong = []
    for path in CALLBACKS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "trainer":
                internal = node.attr.startswith("_") or node.attr in (
                    "run_state",
                    "batch",
                    "metrics",
                    "stop_request",
                )
                if internal:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: trainer.{node.attr}")
    assert wrong == []


def test_callbacks_import_nothing_of_the_machinery_of_a_run() -> None:
    machinery = ("eventtrain.run", *(f"eventtrain.core.{name}" for name in ("loop", "closure", "stepping", "evaluation")))
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in CALLBACKS
        for name in imported(path)
        if name.startswith((*machinery, "eventtrain.checkpoint.contents", "eventtrain.checkpoint.ranks"))
    ]
    assert wrong == []


PROSE = {"what": 2.0, "where": 2.0, "at hand": 0.0, "inside of": 0.0, "outside of": 0.0}
"""How often a phrase may occur in 1,000 words of docstrings and comments."""


def prose(paths: list[Path]) -> str:
    """Return the docstrings and comments of some files."""
    texts = []
    for path in paths:
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                texts.append(ast.get_docstring(node) or "")
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                texts.append(token.string.lstrip("# "))
    return "\n".join(texts)


@pytest.mark.parametrize("paths", [LIBRARY + CALLBACKS, TESTS], ids=["package", "tests"])
def test_the_prose_is_plain(paths: list[Path]) -> None:
    text = prose(paths)
    words = len(re.findall(r"[A-Za-z']+", text))
    rates = {phrase: 1000 * len(re.findall(rf"\b{phrase}\b", text, re.IGNORECASE)) / words for phrase in [*PROSE, "if"]}
    assert {phrase: rate for phrase, rate in rates.items() if phrase in PROSE and rate > PROSE[phrase]} == {}
    assert rates["if"] >= 3
