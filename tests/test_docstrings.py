"""The examples in docstrings run, and every public class and method has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import itertools
import pathlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch

import eventtrain
from eventtrain import callbacks, events
from tests import kit

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Line(kit.Line):
    """The module that examples use: that of the example of :class:`~eventtrain.Trainer`, which logs its loss."""

    def __init__(self) -> None:
        super().__init__(prog_bar=False)


NAMES: dict[str, Any] = {
    "torch": torch,
    "itertools": itertools,
    "pathlib": pathlib,
    "Line": Line,
    **{name: getattr(eventtrain, name) for name in eventtrain.__all__},
    **{name: getattr(callbacks, name) for name in callbacks.__all__},
}


class Finder(doctest.DocTestFinder):
    """Finds examples of methods that a decorator wraps, too."""

    def _from_module(self, module: Any, object: Any) -> bool:
        return bool(super()._from_module(module, inspect.unwrap(object)))  # type: ignore[misc]


def examples() -> list[doctest.DocTest]:
    """Return the examples of every docstring of the package, one for each docstring that has any."""
    finder = Finder(exclude_empty=True)
    tests: list[doctest.DocTest] = []
    for module_info in pkgutil.walk_packages(eventtrain.__path__, "eventtrain."):
        module = importlib.import_module(module_info.name)
        tests += [test for test in finder.find(module, extraglobs=NAMES) if test.examples]
    return tests


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name.removeprefix("eventtrain."))
def test_an_example_runs(example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(example, out=output.append)
    assert runner.failures == 0, "".join(output)


def has_example(thing: Any) -> bool:
    return ">>> " in (inspect.getdoc(thing) or "")


PUBLIC_CLASSES = [
    *(getattr(eventtrain, name) for name in eventtrain.__all__ if inspect.isclass(getattr(eventtrain, name))),
    *(getattr(callbacks, name) for name in callbacks.__all__),
]


@pytest.mark.parametrize("kind", PUBLIC_CLASSES, ids=lambda kind: kind.__name__)
def test_a_public_class_has_an_example(kind: type) -> None:
    assert has_example(kind)


@pytest.mark.parametrize("kind", [eventtrain.Trainer, eventtrain.LightningModule], ids=lambda kind: kind.__name__)
def test_each_public_method_has_an_example(kind: type) -> None:
    ours = [base for base in kind.__mro__ if base.__module__.startswith("eventtrain")]
    hooks = {f"on_{name}" for name in events.EVENTS}
    methods = {
        name: method
        for base in ours
        for name, method in vars(base).items()
        if inspect.isfunction(method) or isinstance(method, classmethod)
        if not name.startswith("_") and name not in hooks
    }
    assert len(methods) > 10
    missing = [name for name in methods if not has_example(getattr(kind, name)) and name not in HOOKS_FROM_THE_TABLE]
    assert missing == []


HOOKS_FROM_THE_TABLE = {
    "teardown",
    *(name for name in dir(eventtrain.LightningModule) if name.startswith("on_") and "_model_" in name),
}
"""Hooks of the module that the event table documents."""


def test_events_that_listeners_write_have_an_example() -> None:
    writable = [
        event
        for event in events.EVENTS.values()
        if any(field.metadata.get("writable") for field in event.__dataclass_fields__.values())
    ]
    assert len(writable) > 8
    assert [event.__name__ for event in writable if not has_example(event)] == []
