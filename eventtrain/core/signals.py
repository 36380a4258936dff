"""The signals: ordered, one per event, in a closed namespace; and observers, which see every event.

This is the only file that imports blinker. Each trainer owns one :class:`Signals` with one :class:`EventSignal` per event, so
two trainers never meet.
"""

from __future__ import annotations

import inspect
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import blinker
from blinker import ANY

from eventtrain.errors import MisconfigurationError, nearest
from eventtrain.events import EVENTS, Event

F = TypeVar("F", bound=Callable[..., Any])
Listener = Callable[..., Any]


class EventSignal(blinker.Signal):
    """A :class:`blinker.Signal` of one event and one sender.

    Everything that blinker documents keeps its meaning, but connections are strong by default (a bound method of an object
    without another reference would disappear), and receivers are called in the order in which they were connected.

    Attributes:
        event_type: The class of the event that is published here.
        listeners: The callables that :meth:`publish` calls, in order; empty if there is none, and while the signal is muted.
            Read-only. A listener that connects or disconnects during an event takes effect at the next.

    Example:
        >>> trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False)
        >>> @trainer.signals.fit_end.connect
        ... def report(trainer, event):
        ...     print("updates:", trainer.global_step)
        >>> trainer.fit(Line(), [torch.ones(4, 1)])
        updates: 1
    """

    def __init__(self, name: str, event_type: type[Event], sender: Any) -> None:
        self.name = name
        self.event_type = event_type
        self.listeners: tuple[Listener, ...] = ()
        self._sender = sender
        self._idle: list[Listener] = []
        self._reached: tuple[Listener, ...] = ()
        self._observers: tuple[Observer, ...] = ()
        super().__init__(event_type.__doc__)

    def publish(self, event: Event) -> None:
        """Call every listener as ``listener(trainer, event=event)``.

        Args:
            event: The payload. Callers build it only if ``listeners`` is not empty.

        Raises:
            Exception: The error of a listener, unchanged, with a note that names listener and event.
        """
        # The tuple instead of blinker's send: 0.2 to 0.3 us a listener instead of 2 to 5.
        sender = self._sender
        listener: Listener | None = None
        try:
            for listener in self.listeners:
                listener(sender, event=event)
        except BaseException as error:
            self._add_note(error, listener, event)
            for observer in self._observers:
                observer.event_ends(self.name, event)
            raise

    def publish_to_all(self, event: Event) -> None:
        """Publish an event to every listener, even if one of them raises.

        Raises:
            BaseException: The first error, once every listener has been called.
        """
        first: BaseException | None = None
        for listener in self.listeners:
            try:
                listener(self._sender, event=event)
            except BaseException as error:
                self._add_note(error, listener, event)
                first = first or error
        if first is not None:
            raise first

    def connect(self, receiver: F, sender: Any = ANY, weak: bool = False) -> F:
        """Connect a listener; usable as a decorator.

        Args:
            receiver: Any callable that can be called as ``receiver(trainer, event=event)``.
            sender: Restricts the connection to one sender; a trainer's signals have no other.
            weak: Whether to hold the receiver weakly, which takes blinker's own, slower path.

        Returns:
            The receiver.

        Raises:
            MisconfigurationError: If the receiver cannot be called like that.
        """
        check_listener(receiver, self.name)
        super().connect(receiver, sender=sender, weak=weak)
        self._renew()
        return receiver

    def disconnect(self, receiver: Listener, sender: Any = ANY) -> None:
        """Disconnect a listener; do nothing if it is not connected."""
        super().disconnect(receiver, sender)
        self._idle = [listener for listener in self._idle if listener != receiver]
        self._renew()

    def idle(self, listener: Listener) -> None:
        """Keep a listener connected, in its place, without calling it. It costs nothing until :meth:`wake`.

        Args:
            listener: A connected listener.
        """
        if listener not in self._idle:
            self._idle.append(listener)
            self._renew()

    def wake(self, listener: Listener) -> None:
        """Call a listener again that :meth:`idle` put to rest; do nothing if it is not idle.

        Args:
            listener: A connected listener.
        """
        if listener in self._idle:
            self._idle.remove(listener)
            self._renew()

    @property
    def is_muted(self) -> bool:
        """Whether the signal is silenced; set by blinker's :meth:`muted`."""
        return self._is_muted

    @is_muted.setter
    def is_muted(self, muted: bool) -> None:
        self._is_muted = muted
        if hasattr(self, "_by_sender"):  # blinker writes the flag in __init__, before its maps exist
            self._renew()

    def receivers_for(self, sender: Any) -> Generator[Listener, None, None]:
        """Yield the receivers that a sender reaches, in the order in which they were connected."""
        # Blinker keeps them in sets, but looks them up in a dict, which remembers the order.
        reached = list(super().receivers_for(sender))
        for receiver in list(self.receivers.values()):
            strong = receiver() if isinstance(receiver, weakref.ref) else receiver
            if strong in reached:
                yield strong

    def attached(self) -> list[Listener]:
        """Return the receivers that are connected for the trainer, in order, idle ones included."""
        return list(self.receivers_for(self._sender))

    def _renew(self) -> None:
        """Rebuild ``listeners`` after anything that may change it."""
        self._reached = ()
        if not self._is_muted:
            self._reached = tuple(listener for listener in self.attached() if listener not in self._idle)
            if any(isinstance(receiver, weakref.ref) for receiver in self.receivers.values()):
                self._reached = (self._send,)  # blinker's own path
        self.observe(self._observers)

    def observe(self, observers: tuple[Observer, ...]) -> None:
        """Let these observers, and no others, see the event and the calls of its listeners."""
        self._observers = observers
        self.listeners = self._reached
        if observers:
            observed = (ObservedListener(listener, observers) for listener in self._reached)
            self.listeners = (self._begin, *observed, self._end)

    def _begin(self, sender: Any, event: Event) -> None:
        for observer in self._observers:
            observer.event_begins(self.name, event)

    def _end(self, sender: Any, event: Event) -> None:
        for observer in self._observers:
            observer.event_ends(self.name, event)

    def _send(self, sender: Any, event: Event) -> None:
        """Call the listeners that are there now: of those held weakly, some may have gone."""
        for listener in list(self.receivers_for(sender)):
            if listener not in self._idle:
                listener(sender, event=event)

    def _add_note(self, error: BaseException, listener: Listener | None, event: Event) -> None:
        # A trace and blinker's own path call listeners themselves: the innermost note is the true one.
        if not getattr(error, "_eventtrain_noted", False):
            error.add_note(f"raised by {describe_listener(listener)} at the event {self.name!r}{_where(self._sender, event)}")
            error._eventtrain_noted = True  # type: ignore[attr-defined]


class SignalTable:
    """A trainer's signals, one attribute per event and no others, as the core uses them.

    Args:
        sender: The first argument of listeners: the trainer.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> EventSignal: ...

    def __init__(self, sender: Any) -> None:
        for name, event_type in EVENTS.items():
            setattr(self, name, EventSignal(name, event_type, sender))

    def __getitem__(self, name: str) -> EventSignal:
        signal: EventSignal = getattr(self, name)
        return signal

    def __iter__(self) -> Iterator[EventSignal]:
        """Iterate over the signals in loop order."""
        return (self[name] for name in EVENTS)


class Signals(SignalTable):
    """The same signals for people: a name without an event raises, and suggests the nearest.

    Attributes:
        table: The signals without that help. A class with ``__getattr__`` makes each look-up twice as slow, and a bare step
            has some twenty.
    """

    def __init__(self, sender: Any) -> None:
        super().__init__(sender)
        self.table = SignalTable.__new__(SignalTable)
        self.table.__dict__.update((signal.name, signal) for signal in self)

    def __getattr__(self, name: str) -> EventSignal:
        # Reached only if the attribute does not exist.
        if name.startswith("__"):
            raise AttributeError(name)
        hint = nearest(name, EVENTS, otherwise="eventtrain.events lists them all.")
        raise AttributeError(f"There is no event {name!r}. {hint}")

    def observe(self, observer: Observer) -> None:
        """Let an observer see every event from the next one on, also events without a listener."""
        for signal in self:
            signal.observe((*signal._observers, observer))

    def unobserve(self, observer: Observer) -> None:
        """Undo :meth:`observe`; do nothing if the observer was not there."""
        for signal in self:
            signal.observe(tuple(other for other in signal._observers if other is not observer))

    @contextmanager
    def trace(self) -> Generator[Trace, None, None]:
        """Record every event that is published in the ``with`` block.

        Yields:
            The :class:`Trace`, which fills during the run.

        Example:
            >>> trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False)
            >>> with trainer.signals.trace() as trace:
            ...     trainer.fit(Line(), [torch.ones(4, 1)])
            >>> trace.names()[:2]
            ['join_processes', 'setup']
        """
        trace = Trace()
        self.observe(trace)
        try:
            yield trace
        finally:
            self.unobserve(trace)


class Observer:
    """Sees every event and every call of a listener, by methods that do nothing until they are overridden.

    Between ``event_begins`` and ``event_ends`` of one event come its listeners, each between ``listener_begins`` and
    ``listener_ends``; a listener may publish other events in between. If a listener raises, both ends are called.
    """

    def event_begins(self, name: str, event: Event) -> None:
        """Take note that an event is about to reach its listeners.

        Args:
            name: The signal's name.
            event: The payload.
        """

    def event_ends(self, name: str, event: Event) -> None:
        """Take note that an event has reached its listeners."""

    def listener_begins(self, listener: Listener) -> None:
        """Take note that a listener is about to be called."""

    def listener_ends(self, listener: Listener) -> None:
        """Take note that a listener has returned or raised."""


class ObservedListener:
    """Calls a listener and lets observers see the call.

    Args:
        listener: The listener.
        observers: The observers.
    """

    __slots__ = ("listener", "observers")

    def __init__(self, listener: Listener, observers: tuple[Observer, ...]) -> None:
        self.listener = listener
        self.observers = observers

    @property
    def described(self) -> str:
        """The listener's name."""
        return describe_listener(self.listener)

    def __call__(self, sender: Any, event: Event) -> None:
        """Call the listener."""
        listener, observers = self.listener, self.observers
        for observer in observers:
            observer.listener_begins(listener)
        try:
            listener(sender, event=event)
        finally:
            for observer in observers:
                observer.listener_ends(listener)


@dataclass(slots=True)
class Call:
    """One listener's call in a :class:`TracedEvent`.

    Attributes:
        listener: The listener's name.
        start: When it began, in seconds of ``time.perf_counter``.
        duration: How long it took, in seconds.
    """

    listener: str
    start: float
    duration: float


@dataclass(slots=True)
class TracedEvent:
    """One published event in a :class:`Trace`.

    Attributes:
        name: The signal's name.
        event: The payload.
        start: When it was published, in seconds of ``time.perf_counter``.
        duration: How long its listeners took together, in seconds.
        calls: The listeners, in the order in which they were called.
    """

    name: str
    event: Event
    start: float
    duration: float = 0.0
    calls: list[Call] = field(default_factory=list)


class Trace(Observer):
    """The record of :meth:`Signals.trace`: a sequence of :class:`TracedEvent`."""

    def __init__(self) -> None:
        self.events: list[TracedEvent] = []
        self._open: list[TracedEvent] = []  # a listener may publish other events

    def names(self) -> list[str]:
        """Return the names of the events, in the order in which they were published."""
        return [traced.name for traced in self.events]

    def __iter__(self) -> Iterator[TracedEvent]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def event_begins(self, name: str, event: Event) -> None:
        traced = TracedEvent(name, event, time.perf_counter())
        self.events.append(traced)
        self._open.append(traced)

    def event_ends(self, name: str, event: Event) -> None:
        traced = self._open.pop()
        traced.duration = time.perf_counter() - traced.start

    def listener_begins(self, listener: Listener) -> None:
        self._open[-1].calls.append(Call(describe_listener(listener), time.perf_counter(), 0.0))

    def listener_ends(self, listener: Listener) -> None:
        call = self._open[-1].calls[-1]
        call.duration = time.perf_counter() - call.start


def check_listener(listener: Listener, event_name: str, *, named: str = "") -> None:
    """Check that a listener can be called as ``listener(trainer, event=event)``.

    Args:
        listener: The candidate.
        event_name: The signal's name, for the message.
        named: The listener's name in the message; its own name if empty.

    Raises:
        MisconfigurationError: If it is not callable, is a coroutine function, or takes other arguments.
    """
    named = named or describe_listener(listener)
    if not callable(listener):
        _refuse(f"{listener!r} is connected to the event {event_name!r} but cannot be called.", event_name)
    if inspect.iscoroutinefunction(listener):
        _refuse(f"{named} is a coroutine function; the loop does not await its listeners.", event_name)
    try:
        signature = inspect.signature(listener)
    except (TypeError, ValueError):  # a builtin without a signature
        return
    try:
        signature.bind(None, event=None)
    except TypeError:
        hint = ""
        if "pl_module" in signature.parameters:
            hint = " It is written for Lightning: the module is trainer.module, everything else is in the event."
        _refuse(f"{named}{signature} cannot be called as (trainer, event=event).{hint}", event_name)


def _refuse(problem: str, event_name: str) -> NoReturn:
    form = f"def on_{event_name}(self, trainer, event): ..."
    raise MisconfigurationError(f"{problem} Write {form!r}, or connect any callable that takes (trainer, event).")


def describe_listener(listener: Listener | None) -> str:
    """Return a listener's name for people: ``GradientClipping.on_before_gradient_clipping``, ``report``."""
    described = getattr(listener, "described", None)
    if isinstance(described, str):
        return described
    owner = getattr(listener, "__self__", None)
    name = getattr(listener, "__name__", None)
    if owner is not None and name is not None:
        return f"{type(owner).__name__}.{name}"
    return getattr(listener, "__qualname__", None) or repr(listener)


def _where(trainer: Any, event: Event) -> str:
    epoch, batch_idx = getattr(trainer, "current_epoch", None), getattr(trainer, "batch_idx", None)
    batch_idx = getattr(event, "batch_idx", batch_idx)  # an evaluation counts its own
    return "" if epoch is None else f" (epoch {epoch}, batch {batch_idx})"
