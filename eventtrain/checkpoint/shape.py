"""The shape of a checkpoint of the current schema: a file is input, and an error names it and the key that is wrong."""

from __future__ import annotations

import tomllib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from eventtrain.checkpoint.storage import first_line
from eventtrain.errors import MisconfigurationError, escaped

REMEDY = "The file was changed, or another program wrote it: resume another checkpoint, or load only the weights."


TYPES: dict[str, Any] = {
    "None": None,
    **{each.__name__: each for each in (object, bool, int, float, str, dict, list, tuple, torch.Tensor)},
}
"""The types that ``shape.toml`` names."""
MISSING = object()


@cache
def shapes() -> dict[str, Any]:
    """Return the tables of ``shape.toml``, which says how they are read."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def check_shape(checkpoint: Mapping[str, Any], path: Any) -> None:
    """Check the types of the values of a checkpoint that a run uses later.

    Args:
        checkpoint: The checkpoint, in the current schema.
        path: Its file, for the error.

    Raises:
        MisconfigurationError: If a value is missing or has another type.

    Example:
        >>> check_shape({"state_dict": []}, "last.ckpt")
        Traceback (most recent call last):
        eventtrain.errors.MisconfigurationError: last.ckpt: 'state_dict' is a list, and has to be a dict. The file was ...
    """
    if (problem := mismatch(checkpoint, "Checkpoint", "")) is not None:
        raise MisconfigurationError(f"{path}: {problem}. {REMEDY}")


def mismatch(value: Any, shape: Any, where: str) -> str | None:
    """Return how a value differs from a shape; None if it does not.

    Args:
        value: The value.
        shape: A text, a list or a table of ``shape.toml``.
        where: The place of the value in the checkpoint.
    """
    if isinstance(shape, str):
        names = shape.split(" or ")
        kinds = (type(shapes()[each]).__name__ if each in shapes() else each for each in names)
        refused = f"{where} is {article(value)}, and has to be a {' or '.join(kinds)}"
        if len(names) > 1:
            problems = [mismatch(value, each, where) for each in names]
            inner = [each for each in problems if each is not None and not each.startswith(f"{where} is ")]
            return None if None in problems else (inner or [refused])[0]
        if shape not in shapes():
            return None if shape == "object" or is_of(value, TYPES[shape]) else refused
        shape = shapes()[shape]
    if not isinstance(value, type(shape)):
        return f"{where} is {article(value)}, and has to be a {type(shape).__name__}"
    for key, each, part in parts(value, shape):
        place = f"{where}[{key!r}]" if where else repr(key)
        if each is MISSING:
            return f"{place} is missing"
        if "*" in shape and not isinstance(key, str):
            return f"{where} holds the key {short(key)}, and has to hold names"
        if (problem := mismatch(each, part, place)) is not None:
            return problem
    return None


def parts(value: Any, shape: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Return the keys of a value, the values at them, and their shapes."""
    if isinstance(shape, list):
        return ((index, each, shape[0]) for index, each in enumerate(value))
    if "*" in shape:
        return ((key, each, shape["*"]) for key, each in value.items())
    keys = {key.removesuffix("?"): part for key, part in shape.items() if key[-1] != "?" or key[:-1] in value}
    return ((key, value.get(key, MISSING), part) for key, part in keys.items())


@contextmanager
def believing(path: Any, key: str) -> Generator[None, None, None]:
    """Let an error of a ``with`` block that uses a part of a checkpoint name the file and the part.

    Args:
        path: The file.
        key: The part.

    Raises:
        MisconfigurationError: If the block raises anything but a ``MisconfigurationError`` that names the file.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MisconfigurationError) and str(path) in str(error):
            raise
        what = f"{key}: {error}" if isinstance(error, MisconfigurationError) else f"{key} cannot be used ({first_line(error)})."
        raise MisconfigurationError(f"{path}: {what} {REMEDY}") from escaped(error)


def is_of(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type, or is None if that is the type."""
    if kind is None or isinstance(value, bool):
        return value is None if kind is None else kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def article(value: Any) -> str:
    """Return a value's type for an error."""
    return "None" if value is None else f"a {type(value).__name__}"


def short(value: Any) -> str:
    """Return the beginning of a value's ``repr``."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
