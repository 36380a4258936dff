"""The loop map as a tree, with the listeners that are attached at each event."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eventtrain.callback import is_on_demand
from eventtrain.core.signals import EventSignal, Signals, describe_listener
from eventtrain.events import EVENTS, LOOP_MAP, evaluation_map

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer

NOTES = 47
"""The column of the notes: four to the right of the map's, which has no root above it."""


def event_of(line: str) -> str | None:
    """Return the event that a line of the loop map stands for; None for other lines."""
    first = line.split(maxsplit=1)[0] if line.strip() else ""
    return first if first in EVENTS else None


def maps() -> Iterator[tuple[str, str]]:
    """Yield the loop maps, as pairs of title and text."""
    yield "fit", LOOP_MAP
    for stage in ("validation", "test", "predict"):
        yield stage, evaluation_map(stage)


@dataclass(slots=True)
class Node:
    """A line of the tree, and the lines below it.

    Attributes:
        text: The line, without its indentation.
        note: A remark in the column to the right.
        event: The event that it stands for; None for other lines.
        children: The nodes below it, in order.
    """

    text: str
    note: str = ""
    event: str | None = None
    children: list[Node] = field(default_factory=list)


def describe(signals: Signals, *, all_events: bool = True) -> str:
    """Return the loop as a tree, with the listeners of every event in the order in which they are called.

    Args:
        signals: A trainer's signals.
        all_events: Whether to show events without a listener, and the core's own work.

    Returns:
        Text of several lines: a tree for ``fit``, and one for each other stage that has listeners to its own events. A
        listener has the sign ``->`` in front, and behind it ``(on demand)`` if it is called only in runs that ask for it,
        ``(muted)`` if its signal is, and ``(weak)`` if it is held weakly.
    """
    lines: list[str] = []
    for title, text in maps():
        names = [name for line in text.splitlines() if (name := event_of(line))]
        stage_events = [name for name in names if title == "fit" or name.startswith(title)]
        if title != "fit" and not any(signals[name].attached() for name in stage_events):
            continue
        root = parsed(title, text)
        add_listeners(root, signals)
        if not all_events:
            prune(root)
        lines += ["", *drawn(root)] if lines else drawn(root)
    return "\n".join(lines)


def overview(trainer: Trainer) -> str:
    """Return the settings of a trainer in one line, and its callbacks and observers in order.

    Args:
        trainer: The trainer.
    """
    limits = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
    settings = [f"{name}={limit}" for name, limit in limits.items() if limit is not None] or ["no limit"]
    module = trainer.run_state.module
    described = "no module yet" if module is None else f"module {type(module).__name__}"
    observers = {id(each): each for signal in trainer.signals for each in signal._observers}
    lines = [f"Trainer: {', '.join(settings)}, on {trainer.device}, {described}", f"callbacks: {named(trainer.callbacks)}"]
    return "\n".join([*lines, f"observers: {named(observers.values())}"] if observers else lines)


def named(parts: Iterable[object]) -> str:
    """Return the names of the classes of some objects."""
    return ", ".join(type(part).__name__ for part in parts) or "none"


def parsed(title: str, text: str) -> Node:
    """Return a loop map as a tree, by its indentation."""
    root = Node(title)
    above = [(-1, root)]
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        while above[-1][0] >= indent:
            above.pop()
        line, _, note = line.strip().partition("  ")
        node = Node(line, note.strip(), event_of(line))
        above[-1][1].children.append(node)
        above.append((indent, node))
    return root


def add_listeners(node: Node, signals: Signals) -> None:
    """Put the listeners of each event in front of the lines below it."""
    for child in node.children:
        add_listeners(child, signals)
    if node.event is not None:
        node.children[:0] = [Node(f"-> {each}") for each in listeners(signals[node.event])]


def listeners(signal: EventSignal) -> Iterator[str]:
    """Yield the names of a signal's listeners, in the order in which they are called, with their marks."""
    weak = [receiver() for receiver in signal.receivers.values() if isinstance(receiver, weakref.ref)]
    for listener in signal.attached():
        marks = " (weak)" * (listener in weak) + " (muted)" * signal.is_muted + " (on demand)" * is_on_demand(listener)
        yield describe_listener(listener) + marks


def prune(node: Node) -> None:
    """Drop the lines that have no listener below them."""
    for child in node.children:
        prune(child)
    node.children[:] = [child for child in node.children if child.children or child.text.startswith("-> ")]


def drawn(root: Node) -> list[str]:
    """Return a tree's lines."""
    lines = [root.text]

    def draw(node: Node, margin: str) -> None:
        for child in node.children:
            last = child is node.children[-1]
            text = f"{margin}{'└── ' if last else '├── '}{child.text}"
            lines.append(f"{text:<{NOTES}} {child.note}".rstrip())
            draw(child, margin + ("    " if last else "│   "))

    draw(root, "")
    return lines
