"""The checks of numbers and options that constructors share. All messages have the same form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from eventtrain.errors import MisconfigurationError, nearest

T = TypeVar("T")


def check_whole_number(value: Any, owner: str, argument: str, *, least: int = 0) -> int:
    """Return a value if it is a whole number that is large enough.

    Args:
        value: The value that the user wrote.
        owner: The class or function that takes it, such as ``"ModelCheckpoint"``.
        argument: The argument's name.
        least: The smallest number that is allowed.

    Raises:
        MisconfigurationError: If it is anything else, ``True`` and ``False`` included.

    Example:
        >>> check_whole_number(3, "EarlyStopping", "patience", least=1)
        3
        >>> check_whole_number(0, "EarlyStopping", "patience", least=1)
        Traceback (most recent call last):
        eventtrain.errors.MisconfigurationError: EarlyStopping(patience=0): give a whole number from 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise MisconfigurationError(f"{owner}({argument}={value!r}): give a whole number from {least}.")
    return value


def check_number(
    value: Any,
    owner: str,
    argument: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    finite: bool = True,
    unit: str = "",
) -> float:
    """Return a value as a float if it is a number in a range.

    Args:
        value: The value that the user wrote.
        owner: The class or function that takes it.
        argument: The argument's name.
        least: The smallest number that is allowed.
        above: A number that the value has to exceed.
        most: The largest number that is allowed.
        finite: Whether infinities are refused; NaN always is.
        unit: The unit, for the message, such as ``"seconds"``.

    Raises:
        MisconfigurationError: If it is anything else, ``True`` and ``False`` included.

    Example:
        >>> check_number(0.9, "ExponentialMovingAverage", "decay", least=0, most=1)
        0.9
        >>> check_number(-1, "SystemMonitor", "interval", above=0, unit="seconds")
        Traceback (most recent call last):
        eventtrain.errors.MisconfigurationError: SystemMonitor(interval=-1): give a finite number above 0, in seconds.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    too_small = is_number and ((least is not None and value < least) or (above is not None and not value > above))
    too_large = is_number and ((most is not None and value > most) or (finite and math.isinf(value)))
    if not is_number or too_small or too_large:
        bounds = [("from", least), ("above", above), ("to", most)]
        limits = "".join(f" {word} {bound:g}" for word, bound in bounds if bound is not None)
        kind = "finite number" if finite and most is None else "number"
        raise MisconfigurationError(f"{owner}({argument}={value!r}): give a {kind}{limits}{unit and f', in {unit}'}.")
    return float(value)


def check_option(value: T, owner: str, argument: str, options: Sequence[T]) -> T:
    """Return a value if it is one of the options.

    Args:
        value: The value that the user wrote.
        owner: The class or function that takes it.
        argument: The argument's name.
        options: The values that are allowed.

    Raises:
        MisconfigurationError: If it is anything else.

    Example:
        >>> check_option("min", "EarlyStopping", "mode", ("min", "max"))
        'min'
        >>> check_option("minimum", "EarlyStopping", "mode", ("min", "max"))
        Traceback (most recent call last):
        eventtrain.errors.MisconfigurationError: EarlyStopping(mode='minimum'): give 'min' or 'max'. Did you mean 'min'?
    """
    if value not in options:
        *others, last = [repr(option) for option in options]
        names = f"{', '.join(others)} or {last}" if others else last
        hint = nearest(str(value), [option for option in options if isinstance(option, str)])
        raise MisconfigurationError(f"{owner}({argument}={value!r}): give {names}. {hint}".rstrip())
    return value
