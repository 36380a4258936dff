"""The loop map as text, with what is attached at each event."""

from __future__ import annotations

from collections.abc import Iterator

from eventtrain.events import EVENTS, LOOP_MAP, evaluation_map
from eventtrain.signals import Signals, describe_listener


def event_of(line: str) -> str | None:
    """The event that a line of the loop map stands for; None for the others."""
    first = line.split(maxsplit=1)[0] if line.strip() else ""
    return first if first in EVENTS else None


def maps() -> Iterator[tuple[str, str]]:
    """The loop maps, as pairs of title and text."""
    yield "fit", LOOP_MAP
    for stage in ("validation", "test", "predict"):
        yield stage, evaluation_map(stage)


def describe(signals: Signals) -> str:
    """The loop map with every event's listeners, in the order in which they are called.

    Args:
        signals: A trainer's signals.

    Returns:
        Text of several lines. The maps of stages that have no listener of their own are left out.
    """
    lines: list[str] = []
    for title, text in maps():
        names = [name for line in text.splitlines() if (name := event_of(line))]
        own = [name for name in names if title == "fit" or name.startswith(title)]
        if title != "fit" and not any(signals[name].attached() for name in own):
            continue
        lines += ["", f"[{title}]"] if lines else [f"[{title}]"]
        for line in text.splitlines():
            lines.append(line.rstrip())
            name = event_of(line)
            if name is None:
                continue
            indent = " " * (len(line) - len(line.lstrip()) + 2)
            muted = " (muted)" if signals[name].is_muted else ""
            lines += [f"{indent}-> {describe_listener(listener)}{muted}" for listener in signals[name].attached()]
    return "\n".join(lines)
