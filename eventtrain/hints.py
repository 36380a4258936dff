"""Say what to write instead of a name that does not exist here, in the words of ``hints.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from eventtrain.errors import nearest


@cache
def tables() -> dict[str, dict[str, str]]:
    """Return the tables of ``hints.toml``. It is read when the first error needs it."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def hint(table: str, name: str, known: Iterable[str] = (), *, value: object = "...") -> str:
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
    if name in sentences:
        return sentences[name].replace("{value}", _short(value))
    suggestion = nearest(name, [*known, *sentences])
    similar = next((other for other in sentences if repr(other) in suggestion), None)
    return suggestion if similar is None else f"{suggestion} {sentences[similar].replace('{value}', _short(value))}"


def _short(value: object) -> str:
    """Return the text of a value, or three dots if it is long."""
    text = value if value == "..." else repr(value)
    return str(text) if len(str(text)) < 40 else "..."
