"""The phases of the loop and the calls of listeners, as nested spans that follow from a run's events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from eventtrain.core.signals import Listener, Observer, describe_listener
from eventtrain.events import BeforeBatchFetch, Event, SafePoint, TakeCheckpoint

Kind = Literal["phase", "callback", "layer", "rest", "observing"]


class Label(NamedTuple):
    """The name of the work that time is spent on.

    Attributes:
        kind: A ``"phase"`` of the loop, a ``"callback"`` (any listener), a ``"layer"``, the ``"rest"``, which is
            the loop's work between them, or ``"observing"``, the time that the measurement itself takes.
        name: Its name.
    """

    kind: Kind
    name: str


REST = Label("rest", "other")
OBSERVING = Label("observing", "observing")
FETCH = Label("phase", "fetch")
TRANSFER = Label("phase", "transfer")
OPEN_LOADER = Label("phase", "open loader")
CHECKPOINT = Label("phase", "checkpoint")
OVERFLOW = Label("callback", "all others")
MOST_LABELS = 256  # bounds the listeners that are remembered, and the rows of a table

# Each phase of the loop: the event that it begins after, and the events that end it.
PHASES: tuple[tuple[Label, str, tuple[str, ...]], ...] = (
    *((OPEN_LOADER, f"{stage}_epoch_start", ("before_batch_fetch",)) for stage in ("train", "validation", "test", "predict")),
    (FETCH, "before_batch_fetch", ("after_batch_fetch",)),
    (Label("phase", "update"), "optimizer_step", ("after_optimizer_step", "optimizer_step_skipped")),
    (Label("phase", "forward"), "before_forward", ("after_forward",)),
    (Label("phase", "zero_grad"), "before_zero_grad", ("after_zero_grad",)),
    (Label("phase", "backward"), "before_backward", ("after_backward",)),
    # The listeners of clipping_decided and checkpoint_gathered are rows within these two.
    (Label("phase", "clipping"), "before_gradient_clipping", ("after_gradient_clipping",)),
    (Label("phase", "scheduler"), "before_lr_scheduler_step", ("after_lr_scheduler_step",)),
    (CHECKPOINT, "save_checkpoint", ("checkpoint_saved",)),
)


class Span:
    """A span of time that has begun.

    Attributes:
        key: The object that its end is recognised by, compared by identity.
        label: The work that the time is spent on.
        seconds: The time so far that was spent in this span and in no span within it.
        range: An object that a subclass of :class:`Spans` stores with it.
    """

    __slots__ = ("key", "label", "range", "seconds")

    def __init__(self, key: Any, label: Label) -> None:
        self.key = key
        self.label = label
        self.seconds = 0.0
        self.range: Any = None


class Spans(Observer):
    """Turns the events of a run into nested spans: the loop's phases, and the calls of listeners.

    A phase lasts from the end of one event to the beginning of another. Some phases never end, for example clipping if no
    policy clips. Such a phase becomes part of the span around it as soon as that one ends.

    Attributes:
        opens: The phase that begins at an event, by the event's name.
        closes: The phase that ends at an event.
        open: The spans that have begun, the innermost last.
        before: Functions by event name; each is called without arguments before the event is observed.
        after: Functions by event name; each is called with the event after its listeners.
    """

    opens: Mapping[str, Label] = {begins: label for label, begins, _ in PHASES}
    closes: Mapping[str, Label] = {end: label for label, _, ends in PHASES for end in ends}

    def __init__(self) -> None:
        self.open: list[Span] = []
        self.before: dict[str, Callable[[], None]] = {}
        self.after: dict[str, Callable[[Any], None]] = {}
        self._labels: dict[int, tuple[Listener, Label]] = {}  # by id, which stays unique while the listener is held here

    def call_after_batches(self, function: Callable[[TakeCheckpoint], None]) -> None:
        """Call a function at the end of each training batch: after its safe point and the two events that follow it.

        Args:
            function: Called with the ``take_checkpoint`` event. One that is published elsewhere is ignored.
        """
        at_safe_point = False

        def remember(event: SafePoint) -> None:
            nonlocal at_safe_point
            at_safe_point = True

        def end_batch(event: TakeCheckpoint) -> None:
            nonlocal at_safe_point
            if at_safe_point:
                at_safe_point = False
                function(event)

        self.after["safe_point"] = remember
        self.after["take_checkpoint"] = end_batch

    def pause(self) -> None:
        """Note that the run has come to an event or to the end of a listener. The time from here on is overhead."""

    def resume(self) -> None:
        """Note that the run continues."""

    def begin(self, key: Any, label: Label) -> Span:
        """Begin a span within the open ones.

        Args:
            key: The object that its end is recognised by.
            label: The work that the time is spent on.

        Returns:
            The span.
        """
        span = Span(key, label)
        self.open.append(span)
        return span

    def end(self, key: Any) -> None:
        """End the innermost span with a key. Do nothing if there is none, because it began before the observing did.

        Args:
            key: The object that :meth:`begin` was called with.
        """
        spans = self.open
        for at in range(len(spans) - 1, -1, -1):
            if spans[at].key is key:
                break
        else:
            return
        while len(spans) > at + 1:
            self.dropped(spans.pop(), spans[at])
        self.closed(spans.pop())

    def closed(self, span: Span) -> None:
        """Handle the end of a span."""

    def dropped(self, span: Span, around: Span) -> None:
        """Handle a span whose end never came, once the span around it ends."""

    def event_begins(self, name: str, event: Event) -> None:
        """End the phase that ends at this event."""
        before = self.before.get(name)
        if before is not None:
            before()
        self.pause()
        phase = self.closes.get(name)
        if phase is not None:
            self.end(phase)

    def event_ends(self, name: str, event: Event) -> None:
        """Begin the phase that begins at this event."""
        phase = self.opens.get(name)
        if phase is not None:
            self.begin(phase, phase)
            if isinstance(event, BeforeBatchFetch):
                self._observe_transfer(event)
        self.resume()
        after = self.after.get(name)
        if after is not None:
            after(event)

    def listener_begins(self, listener: Listener) -> None:
        """Begin the span of a listener's call."""
        known = self._labels.get(id(listener))
        if known is None:
            if len(self._labels) >= MOST_LABELS:  # listeners that come and go
                self._labels.clear()
            known = self._labels[id(listener)] = listener, Label("callback", describe_listener(listener))
        self.begin(listener, known[1])
        self.resume()

    def listener_ends(self, listener: Listener) -> None:
        """End the span of a listener's call."""
        self.pause()
        self.end(listener)

    def _observe_transfer(self, event: BeforeBatchFetch) -> None:
        """Make the batch's move to its device a span within the fetch."""
        transfer = event.transfer

        def observed(batch: Any) -> Any:
            self.pause()
            self.begin(TRANSFER, TRANSFER)
            self.resume()
            try:
                return transfer(batch)
            finally:
                self.pause()
                self.end(TRANSFER)
                self.resume()

        event.transfer = observed
