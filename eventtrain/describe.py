"""The loop map as a tree, with what is attached at each event."""

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
"""Where the column of notes begins: four to the right of the map's, which has no root above it."""


def event_of(line: str) -> str | None:
    """The event that a line of the loop map stands for; None for the others."""
    first = line.split(maxsplit=1)[0] if line.strip() else ""
    return first if first in EVENTS else None


def maps() -> Iterator[tuple[str, str]]:
    """The loop maps, as pairs of title and text."""
    yield "fit", LOOP_MAP
    for stage in ("validation", "test", "predict"):
        yield stage, evaluation_map(stage)


@dataclass(slots=True)
class Node:
    """A line of the tree, and the lines below it.

    Attributes:
        text: The line, without its indentation.
        note: What is said of it, in a column of its own.
        event: The event that it stands for; None for the others.
        children: The nodes below it, in order.
    """

    text: str
    note: str = ""
    event: str | None = None
    children: list[Node] = field(default_factory=list)


def describe(signals: Signals, *, all_events: bool = True) -> str:
    """The loop as a tree, with every event's listeners in the order in which they are called.

    Args:
        signals: A trainer's signals.
        all_events: Whether events without a listener, and the core's own work, are shown too.

    Returns:
        Text of several lines: a tree for ``fit``, and one for each other stage that has a listener of its own. A
        listener bears the sign ``->``, and behind it ``(muted)`` where its signal is, ``(weak)`` where it is held
        weakly.
    """
    lines: list[str] = []
    for title, text in maps():
        names = [name for line in text.splitlines() if (name := event_of(line))]
        own = [name for name in names if title == "fit" or name.startswith(title)]
        if title != "fit" and not any(signals[name].attached() for name in own):
            continue
        root = parsed(title, text)
        add_listeners(root, signals)
        if not all_events:
            prune(root)
        lines += ["", *drawn(root)] if lines else drawn(root)
    return "\n".join(lines)


def overview(trainer: Trainer) -> str:
    """What a trainer is set to do, in one line, and its callbacks and observers in order.

    Args:
        trainer: The trainer.
    """
    limits = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
    settings = [f"{name}={limit}" for name, limit in limits.items() if limit is not None] or ["no limit"]
    module = "no module yet" if trainer._module is None else f"module {type(trainer._module).__name__}"
    observers = {id(each): each for signal in trainer.signals for each in signal._observers}
    lines = [f"Trainer: {', '.join(settings)}, on {trainer.device}, {module}", f"callbacks: {named(trainer.callbacks)}"]
    return "\n".join([*lines, f"observers: {named(observers.values())}"] if observers else lines)


def named(parts: Iterable[object]) -> str:
    """The names of the classes of some objects."""
    return ", ".join(type(part).__name__ for part in parts) or "none"


def parsed(title: str, text: str) -> Node:
    """A loop map as a tree: what is indented under a line is below it."""
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
    """Puts the listeners of each event first among what is below it."""
    for child in node.children:
        add_listeners(child, signals)
    if node.event is not None:
        node.children[:0] = [Node(f"-> {each}") for each in listeners(signals[node.event])]


def listeners(signal: EventSignal) -> Iterator[str]:
    """The names of a signal's listeners, in the order in which they are called, with what is to be said of them."""
    held = [receiver() for receiver in signal.receivers.values() if isinstance(receiver, weakref.ref)]
    for listener in signal.attached():
        marks = " (weak)" * (listener in held) + " (muted)" * signal.is_muted + " (on demand)" * is_on_demand(listener)
        yield describe_listener(listener) + marks


def prune(node: Node) -> None:
    """Leaves out what has no listener below it."""
    for child in node.children:
        prune(child)
    node.children[:] = [child for child in node.children if child.children or child.text.startswith("-> ")]


def drawn(root: Node) -> list[str]:
    """A tree's lines."""
    lines = [root.text]

    def draw(node: Node, margin: str) -> None:
        for child in node.children:
            last = child is node.children[-1]
            text = f"{margin}{'└── ' if last else '├── '}{child.text}"
            lines.append(f"{text:<{NOTES}} {child.note}".rstrip())
            draw(child, margin + ("    " if last else "│   "))

    draw(root, "")
    return lines
