"""Read the states of callbacks from checkpoints: they are input, and a name in them is a name, never a path."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from eventtrain.errors import MisconfigurationError

REQUIRED: Any = object()


def field(state: Any, name: str, *kinds: Any, default: Any = REQUIRED) -> Any:
    """Return a value of a callback's state if it is of the right type.

    Args:
        state: The state, as a checkpoint holds it.
        name: The value's name.
        *kinds: The types that it may have; None stands for itself. ``float`` admits whole numbers. No number is a bool.
        default: The value if there is none, as in the states of older versions.

    Raises:
        MisconfigurationError: If it is missing and has no default, or has another type. The error of the checkpoint that is
            raised from it names the file.

    Example:
        >>> field({"elapsed": 3}, "elapsed", float)
        3
        >>> field({"elapsed": "3"}, "elapsed", float)
        Traceback (most recent call last):
        eventtrain.errors.MisconfigurationError: 'elapsed' is a str, and has to be a float.
    """
    if not isinstance(state, Mapping):
        raise MisconfigurationError(f"the state is a {type(state).__name__}, and has to be a dict.")
    value = state.get(name, default)
    if value is REQUIRED:
        raise MisconfigurationError(f"it lacks {name!r}.")
    if value is default or any(is_of(value, kind) for kind in kinds):
        return value
    wanted = " or ".join("None" if kind is None else kind.__name__ for kind in kinds)
    raise MisconfigurationError(f"{name!r} is {article(value)}, and has to be a {wanted}.")


def is_of(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type, see :func:`field`."""
    if kind is None or isinstance(value, bool):
        return value is None if kind is None else kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def article(value: Any) -> str:
    """Return a value's type for an error."""
    return "None" if value is None else f"a {type(value).__name__}"


def items(state: Any, name: str, check: Callable[[Any, Any], bool], wanted: str, default: Any = REQUIRED) -> dict[Any, Any]:
    """Return a dict of a callback's state whose keys and values are right.

    Args:
        state: The state.
        name: The dict's name.
        check: Takes a key and its value, and returns whether both are right.
        wanted: What they have to be, for the error.
        default: As for :func:`field`.

    Raises:
        MisconfigurationError: If the dict is missing, or a key or a value is wrong.
    """
    values: dict[Any, Any] = field(state, name, dict, default=default)
    for key, value in values.items():
        if not check(key, value):
            raise MisconfigurationError(f"{name!r} holds {key!r}: {short(value)}, and has to hold {wanted}.")
    return dict(values)


def whole(state: Any, name: str, *, least: int = 0, default: Any = REQUIRED) -> int:
    """Return a whole number of a callback's state.

    Raises:
        MisconfigurationError: If it is missing, of another type, or below ``least``.
    """
    value: int = field(state, name, int, default=default)
    if value < least:
        raise MisconfigurationError(f"{name!r} is {value}, and has to be a whole number from {least}.")
    return value


def short(value: Any) -> str:
    """Return the beginning of a value's ``repr``."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_name(value: Any) -> bool:
    """Return whether a value is the name of an entry of a folder, and no path to another one on any system.

    Example:
        >>> [is_name(each) for each in ("step=3.ckpt", "../step=3.ckpt", "/tmp/a", "C:a", "..", "")]
        [True, False, False, False, False, False]
    """
    if not isinstance(value, str) or "\0" in value or value in ("", ".", ".."):
        return False
    return PurePosixPath(value).name == value and PureWindowsPath(value).name == value


def file_names(values: Any, key: str, pattern: str, wanted: str) -> list[str]:
    """Return the names of files that a checkpoint lists, if each of them is a name and fits a pattern.

    Args:
        values: The names, in a list or as the keys of a dict.
        key: Their name in the state, for the error.
        pattern: A regular expression for the whole name.
        wanted: The meaning of the pattern, for the error.

    Raises:
        MisconfigurationError: If one is no such name.
    """
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        raise MisconfigurationError(f"{key!r} is {article(values)}, and has to hold names of files.")
    for value in values:
        if not is_name(value) or not re.fullmatch(pattern, value, re.DOTALL):
            raise MisconfigurationError(f"{key!r} names {short(value)}, which is not {wanted}. Nothing was changed.")
    return list(values)
