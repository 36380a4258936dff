"""Say what to write instead of a name that does not exist here, in the words of ``hints.toml``."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from eventtrain.errors import MisconfigurationError, nearest

F = TypeVar("F", bound=Callable[..., Any])


@cache
def tables() -> dict[str, dict[str, str]]:
    """Return the tables of ``hints.toml``. It is read when the first error needs it."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def hint(table: str, name: str, known: Iterable[str] = (), *, value: Any = ...) -> str:
    """Return what to write instead of a name.

    Args:
        table: The table of ``hints.toml`` for the place at which the name was written.
        name: The name.
        known: The names that exist at this place.
        value: The value that the user wrote with the name; it replaces ``{value}`` in a hint.

    Returns:
        The hint for the name, else ``"Did you mean 'x'?"``, with the hint for ``x`` if there is one, else ``""``.

    Example:
        >>> hint("trainer", "lightning_module")
        'Write `trainer.module`.'
        >>> hint("Trainer", "max_epoch", ["max_epochs", "max_steps"])
        "Did you mean 'max_epochs'?"
    """
    sentences = tables().get(table, {})
    similar, suggestion = name, ""
    if name not in sentences:
        suggestion = nearest(name, [*known, *sentences])
        similar = next((other for other in sentences if repr(other) in suggestion), "")
    return f"{suggestion} {sentences.get(similar, '').replace('{value}', short(value))}".strip()


def short(value: Any) -> str:
    """Return the text of a value for a message, or three dots if it is long."""
    text = "..." if value is ... else repr(value)
    return text if len(text) < 40 else "..."


def misfit(method: Callable[..., Any], name: str, arguments: Iterable[str], owner: str = "") -> MisconfigurationError:
    """Return the error for a method of a user that takes other arguments than it is called with.

    Args:
        method: The method.
        name: Its name.
        arguments: The arguments that it has to take, after ``self``.
        owner: The name of its class, with a dot; empty if it is not known.
    """
    signature, form = inspect.signature(method), ", ".join(("self", *arguments))
    hints = [tables()["parameter"].get(parameter, "") for parameter in signature.parameters if parameter not in form]
    message = f"{owner}{name}{signature} does not fit. Write `def {name}({form}):`."
    return MisconfigurationError(" ".join([message, *filter(None, dict.fromkeys(hints))]))


class MissingAttribute(AttributeError):
    """The error for an attribute that a trainer does not have. Its text is made when it is read, so that ``hasattr``, which
    reads none, stays fast."""

    def __str__(self) -> str:
        remedy = hint("trainer", str(self.name), dir(self.obj))
        return f"{type(self.obj).__name__} has no attribute {self.name!r}. {remedy}".rstrip()


def explained(method: F) -> F:
    """Have a function refuse arguments that do not fit it, with the hints of the table that is named after it.

    Args:
        method: A method or function; the table of an ``__init__`` is named after the class.

    Returns:
        A function with the same signature, which raises MisconfigurationError in place of TypeError.

    Example:
        >>> class Clock:
        ...     @explained
        ...     def __init__(self, *, interval=1): ...
        >>> Clock(intervall=2)
        Traceback (most recent call last):
        eventtrain.errors.MisconfigurationError: Clock(intervall=2): there is no such argument. Did you mean 'interval'?
    """
    table = method.__qualname__.removesuffix(".__init__")
    signature = inspect.signature(method)

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            problem, known = str(error), [name for name in signature.parameters if name != "self"]
        else:
            return method(*args, **kwargs)
        check_arguments(table, kwargs, known)
        values = ", ".join(short(value) for value in args["self" in signature.parameters :])
        raise MisconfigurationError(f"{table}({values}): {problem}. {hint(table, '*') or _names(known)}")

    return cast(F, call)


def check_arguments(table: str, arguments: Mapping[str, Any], known: Sequence[str]) -> None:
    """Check that arguments exist.

    Args:
        table: The table of ``hints.toml``; messages begin with its name.
        arguments: The arguments by name.
        known: The names that exist.

    Raises:
        MisconfigurationError: If some do not, with a line for each.
    """
    lines = []
    for name, value in arguments.items():
        if name not in known:
            remedy = hint(table, name, known, value=value) or _names(known)
            lines.append(f"{table}({name}={short(value)}): there is no such argument. {remedy}")
    if lines:
        raise MisconfigurationError("\n".join(lines))


def _names(known: Sequence[str]) -> str:
    return f"The arguments are {', '.join(known)}." if known else "It takes none."
