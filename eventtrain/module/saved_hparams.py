"""Hyperparameters in checkpoints: plain values with notes of their types, and the objects that are built from them."""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from operator import attrgetter
from pathlib import Path, PurePath
from typing import Any

import torch

from eventtrain.checkpoint.storage import LOADABLE, first_line, loadable, reading
from eventtrain.errors import MisconfigurationError, nearest, printable
from eventtrain.module.hparams import AttributeDict, fields_of, kind_of
from eventtrain.paths import check_path

RESTORE: dict[str, Callable[[Any], Any]] = {
    "array": lambda value: value.numpy(),
    "frozenset": frozenset,
    "mapping": AttributeDict,
    "namespace": lambda value: Namespace(**value),
    "path": Path,
}
"""How a plain value becomes the value that it was, by the note of its type."""


def packed(instance: Any) -> dict[str, Any]:
    """Return an object's hyperparameters for a checkpoint, under Lightning's keys.

    The values are plain, and a note tells the type of each that was not: a path, an enum, a dataclass object. A value that
    only code in the file could give back, such as a function, is left out with one warning.

    Args:
        instance: The module or datamodule.
    """
    values: dict[Any, Any] = {}
    notes: dict[Any, Any] = {}
    left_out = []
    for name, value in instance.hparams.items():
        try:
            values[name] = _plain(value, (loadable(name),), notes)
        except (MisconfigurationError, TypeError):
            left_out.append(name)
    warned = instance.__dict__.setdefault("_hparams_left_out", set())
    if new := [name for name in left_out if name not in warned]:
        warned.update(new)
        described = ", ".join(f"{name} ({type(instance.hparams[name]).__name__})" for name in new)
        warnings.warn(
            f"Checkpoints leave out hyperparameters of {type(instance).__name__}, because reading them would run code: "
            f"{described}. Give them to load_from_checkpoint(path, {new[0]}=...). Without this warning: "
            f"save_hyperparameters(ignore={new!r}).",
            stacklevel=2,
        )
    name, kind, arguments = instance.__dict__.get("_hparams_object", (None, None, []))
    if name is not None:
        notes |= {(): kind, "arguments": [each for each in arguments if each in values]}
    keys = (instance.CHECKPOINT_HYPER_PARAMS_KEY, instance.CHECKPOINT_HYPER_PARAMS_NAME, instance.CHECKPOINT_HYPER_PARAMS_TYPE)
    return dict(zip(keys, (values, name, notes), strict=True))


def _plain(value: Any, path: tuple[Any, ...], notes: dict[Any, Any]) -> Any:
    """Return a value in a plain form, and note its type if that form does not tell it.

    Args:
        value: The value.
        path: The keys that lead to it.
        notes: Takes the notes, by path.

    Raises:
        MisconfigurationError: If it has no plain form.
        TypeError: If it is an array of objects.
    """
    kind, plain = kind_of(value), value
    if type(value) in LOADABLE:
        return value
    if isinstance(value, Enum):
        kind, plain = f"enum {type(value).__module__}:{type(value).__qualname__}", value.value
    elif isinstance(value, PurePath):
        kind, plain = "path", str(value)
    elif isinstance(value, frozenset):
        kind, plain = "frozenset", set(value)
    elif type(value).__module__ == "numpy" and getattr(value, "shape", ()) != ():
        kind, plain = "array", torch.from_numpy(value.copy())
    if kind is not None:
        notes[path] = kind
    if kind in ("mapping", "namespace") or type(value) is dict or (kind or "").startswith("record"):
        return {loadable(key): _plain(item, (*path, key), notes) for key, item in fields_of(value).items()}
    if isinstance(plain, Sequence) and not isinstance(plain, (str, bytes, bytearray, range)):
        items = [_plain(item, (*path, index), notes) for index, item in enumerate(plain)]
        return tuple(items) if isinstance(plain, tuple) else items
    return loadable(plain)


def _restored(value: Any, path: tuple[Any, ...], notes: Mapping[Any, Any]) -> Any:
    """Return the value that :func:`_plain` made plain. No code in the checkpoint is run, and nothing is imported for it."""
    if isinstance(value, dict):
        value = {key: _restored(item, (*path, key), notes) for key, item in value.items()}
    elif type(value) in (list, tuple):
        value = type(value)(_restored(item, (*path, index), notes) for index, item in enumerate(value))
    return _as(notes.get(path), value)


def _as(note: str | None, value: Any) -> Any:
    """Return a plain value as an object of the type that a note tells."""
    if note is None or note in RESTORE:
        return value if note is None else RESTORE[note](value)
    sort, _, place = note.partition(" ")
    module, _, name = place.partition(":")
    try:
        kind: Any = attrgetter(name)(sys.modules.get(module))
    except AttributeError:
        kind = None
    if not isinstance(kind, type):
        warnings.warn(
            printable(f"A hyperparameter was of the class {name}, which {module} does not have now: it is {value!r}."),
            stacklevel=2,
        )
        return AttributeDict(value) if isinstance(value, dict) else value
    if sort == "enum" and issubclass(kind, Enum) and len(kind):
        return kind(value)
    if issubclass(kind, tuple):
        return tuple.__new__(kind, value.values())
    record = object.__new__(kind)  # not by its __init__, which could do anything with values from a file
    for each, item in value.items():
        object.__setattr__(record, each, item)
    return record


def build(cls: Any, content: Mapping[str, Any], hparams_file: Any, overrides: dict[str, Any]) -> Any:
    """Build an object from the hyperparameters in a checkpoint.

    Args:
        cls: The class.
        content: The checkpoint.
        hparams_file: A file of hyperparameters to use instead of those of the checkpoint; None for none.
        overrides: Arguments that replace or complete them.

    Raises:
        MisconfigurationError: If ``__init__`` needs an argument that neither of them has, or takes no such argument.
    """
    values = content.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}) if hparams_file is None else read_hparams(hparams_file)
    name, notes = content.get(cls.CHECKPOINT_HYPER_PARAMS_NAME), content.get(cls.CHECKPOINT_HYPER_PARAMS_TYPE)
    notes = notes if isinstance(notes, dict) else {}  # Lightning has a class there
    values = {key: _restored(value, (key,), notes) for key, value in values.items()}
    signature = inspect.signature(cls)
    parameters = signature.parameters
    if name in parameters and name not in overrides:  # one argument holds the others
        arguments = {each: values.pop(each) for each in notes.get("arguments", ()) if each in values}
        inner = {each: overrides.pop(each) for each in list(overrides) if each in values or each not in parameters}
        values = {**arguments, name: _as(notes.get(()), {**values, **inner})}
    rest = next((each.name for each in parameters.values() if each.kind is each.VAR_KEYWORD), None)
    if rest is None and (unknown := [each for each in overrides if each not in parameters]):
        hint = nearest(unknown[0], parameters, otherwise=f"It has {', '.join(parameters) or 'none'}.")
        raise MisconfigurationError(
            f"{cls.__name__}.load_from_checkpoint({unknown[0]}=...): __init__ has no such argument. {hint}"
        )
    values = {**values, **overrides}
    known = {each: value for each, value in values.items() if each in parameters and each != rest}
    if rest is not None:
        known[rest] = {each: value for each, value in values.items() if isinstance(each, str) and each not in known}
    needed = [each.name for each in parameters.values() if each.default is each.empty and each.kind.name[:3] != "VAR"]
    if missing := [each for each in needed if each not in known]:
        raise MisconfigurationError(
            f"{cls.__name__}.__init__ needs {', '.join(missing)}, and the checkpoint holds the hyperparameters {list(values)}. "
            f"Give it: {cls.__name__}.load_from_checkpoint(path, {missing[0]}=...). A checkpoint holds it if __init__ calls "
            "save_hyperparameters()."
        )
    call = inspect.BoundArguments(signature, known)
    return cls(*call.args, **call.kwargs)


def read_hparams(path: Any) -> dict[str, Any]:
    """Read a file of hyperparameters.

    Args:
        path: A ``.yaml``, ``.yml`` or ``.json`` file that holds a mapping.

    Raises:
        MisconfigurationError: If it is another file, or PyYAML is not installed.
    """
    path = check_path(path, "load_from_checkpoint", "hparams_file")
    values: Any = None
    try:
        if path.name.endswith(".json"):
            with reading(path) as file:
                values = json.load(file)
        elif path.name.endswith((".yaml", ".yml")):
            import yaml

            with reading(path) as file:
                values = yaml.safe_load(file)
    except ImportError as error:
        raise MisconfigurationError(f"hparams_file={str(path)!r}: install PyYAML, or give a .json file.") from error
    except OSError:
        raise
    except Exception as error:  # each format has its own
        raise MisconfigurationError(f"hparams_file={str(path)!r} cannot be read: {first_line(error)}. Correct it.") from error
    if not isinstance(values, dict):
        raise MisconfigurationError(f"hparams_file={str(path)!r}: give a .yaml, .yml or .json file that holds a mapping.")
    return values
