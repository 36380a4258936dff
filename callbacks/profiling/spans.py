"""Where a run's time goes: from its events to the self times of phases, callbacks and layers."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from eventtrain.core.signals import Listener, Observer, describe_listener
from eventtrain.events import BeforeBatchFetch, Event

Clock = Callable[[], float]
Kind = Literal["phase", "callback", "layer", "rest", "observing"]


class Label(NamedTuple):
    """What a span of time was spent on.

    Attributes:
        kind: A ``"phase"`` of the loop, a ``"callback"`` (any listener), a ``"layer"``, the ``"rest"``, which is
            the loop's own, or ``"observing"``, which would not be there if nobody observed.
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
MOST_LABELS = 256  # that are remembered of listeners, or of rows in a table

# Each phase of the loop: the event at whose end it begins, and those at whose beginning it ends.
PHASES: tuple[tuple[Label, str, tuple[str, ...]], ...] = (
    *((OPEN_LOADER, f"{stage}_epoch_start", ("before_batch_fetch",)) for stage in ("train", "validation", "test", "predict")),
    (FETCH, "before_batch_fetch", ("after_batch_fetch",)),
    (Label("phase", "update"), "optimizer_step", ("after_optimizer_step", "optimizer_step_skipped")),
    (Label("phase", "forward"), "before_forward", ("after_forward",)),
    (Label("phase", "zero_grad"), "before_zero_grad", ("after_zero_grad",)),
    (Label("phase", "backward"), "before_backward", ("after_backward",)),
    (Label("phase", "clipping"), "before_gradient_clipping", ("after_gradient_clipping",)),
    (Label("phase", "scheduler"), "before_lr_scheduler_step", ("after_lr_scheduler_step",)),
    (CHECKPOINT, "save_checkpoint", ("checkpoint_saved",)),
)


class Span:
    """Something that has begun.

    Attributes:
        key: What its end is recognised by, compared by identity.
        label: What the time in it is spent on.
        seconds: The time so far that was spent in it and in no span inside of it.
        range: What a subclass of :class:`Spans` keeps with it.
    """

    __slots__ = ("key", "label", "range", "seconds")

    def __init__(self, key: Any, label: Label) -> None:
        self.key = key
        self.label = label
        self.seconds = 0.0
        self.range: Any = None


class Spans(Observer):
    """Nests what the events of a run say into spans: the loop's phases, and the calls of listeners.

    A phase lasts from the end of one event to the beginning of another. One whose end never came, such as that of
    clipping where no policy clips, becomes part of what is around it when that ends.

    Attributes:
        opens: The phase that begins at an event, by the event's name.
        closes: The phase that ends at an event.
        open: The spans that have begun, the innermost last.
        before: Called without arguments before an event of such a name is observed.
        after: Called with the event when it has been.
    """

    opens: Mapping[str, Label] = {begins: label for label, begins, _ in PHASES}
    closes: Mapping[str, Label] = {end: label for label, _, ends in PHASES for end in ends}

    def __init__(self) -> None:
        self.open: list[Span] = []
        self.before: dict[str, Callable[[], None]] = {}
        self.after: dict[str, Callable[[Any], None]] = {}
        self._labels: dict[int, tuple[Listener, Label]] = {}  # by id, which is the listener's own while it is held here

    def pause(self) -> None:
        """The run has come to an event or to the end of a listener; what follows is the observer's and the signal's own."""

    def resume(self) -> None:
        """The run goes on."""

    def begin(self, key: Any, label: Label) -> Span:
        """Begins a span inside of those that are open."""
        span = Span(key, label)
        self.open.append(span)
        return span

    def end(self, key: Any) -> None:
        """Ends the innermost span with a key; does nothing where there is none, since observing began inside of it."""
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
        """A span is over."""

    def dropped(self, span: Span, around: Span) -> None:
        """A span is over without an end of its own, because one around it is."""

    def event_begins(self, name: str, event: Event) -> None:
        """Ends the phase that ends here."""
        before = self.before.get(name)
        if before is not None:
            before()
        self.pause()
        phase = self.closes.get(name)
        if phase is not None:
            self.end(phase)

    def event_ends(self, name: str, event: Event) -> None:
        """Begins the phase that begins here."""
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
        """Begins a listener's span."""
        known = self._labels.get(id(listener))
        if known is None:
            if len(self._labels) >= MOST_LABELS:  # listeners that come and go
                self._labels.clear()
            known = self._labels[id(listener)] = listener, Label("callback", describe_listener(listener))
        self.begin(listener, known[1])
        self.resume()

    def listener_ends(self, listener: Listener) -> None:
        """Ends it."""
        self.pause()
        self.end(listener)

    def _observe_transfer(self, event: BeforeBatchFetch) -> None:
        """Lets the batch's way to its device be a span inside of the fetch's."""
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


class SelfTimes(Spans):
    """Adds up the time that is spent in each span and in no span inside of it.

    Args:
        clock: Gives the time in seconds.
        device: Measures the same on an accelerator's stream; None where there is none.
    """

    def __init__(self, clock: Clock = time.perf_counter, device: DeviceTimes | None = None) -> None:
        super().__init__()
        self.clock = clock
        self.device = device
        self._times: dict[Label, float] = {}
        self._rest = Span(None, REST)  # around all of them
        self._observing = 0.0
        self._since = 0.0
        self._paused = True

    def start(self) -> None:
        """Begins a unit of work, outside of all spans; what was measured and not taken is dropped."""
        self.open.clear()
        self._times = {}
        self._rest.seconds = self._observing = 0.0
        if self.device is not None:
            self.device.start()
        self.go_on()

    def take(self) -> dict[Label, float]:
        """Ends the unit of work, and begins the next.

        Returns:
            The seconds of each label since the unit began.
        """
        self.suspend()
        times, self._times = self._times, {}
        times[OBSERVING], self._observing = self._observing, 0.0
        self.go_on()
        return times

    def suspend(self) -> None:
        """Leaves all spans and stops the clock until :meth:`go_on`."""
        self.pause()
        for span in (*self.open, self._rest):
            self.closed(span)
        self.open.clear()
        self._rest.seconds = 0.0

    def go_on(self) -> None:
        """Starts the clock again; what was in between counts nowhere."""
        if self.device is not None:
            self.device.skip()
        self._paused = False
        self._since = self.clock()

    def pause(self) -> None:
        """Gives the time so far to the span that the run was in."""
        if not self._paused:
            self._paused = True
            now = self.clock()
            current = self.open[-1] if self.open else self._rest
            current.seconds += now - self._since
            self._since = now
            if self.device is not None:
                self.device.mark(current)

    def resume(self) -> None:
        """Gives the time since :meth:`pause` to the observing."""
        if self._paused:
            self._paused = False
            now = self.clock()
            self._observing += now - self._since
            self._since = now

    def closed(self, span: Span) -> None:
        """Adds what was spent in a span to its label's time."""
        self._times[span.label] = self._times.get(span.label, 0.0) + span.seconds

    def dropped(self, span: Span, around: Span) -> None:
        """Adds it to the one around it, whose it turned out to be."""
        around.seconds += span.seconds
        span.label = around.label


class DeviceTimes:
    """What a stream of an accelerator spends between the same points, read once it has got there.

    Nothing waits for the device: a unit of work is read when its last event has come about. So many are pending at
    most; a unit beyond that is not measured.

    Args:
        make_event: Makes an event with ``record(stream)``, ``query``, ``synchronize`` and ``elapsed_time`` in
            milliseconds, such as ``torch.cuda.Event(enable_timing=True)``.
        stream: Gives the stream at hand.
        most_pending: Units that wait for the device at most.
    """

    def __init__(self, make_event: Callable[[], Any], stream: Callable[[], Any], most_pending: int = 64) -> None:
        self.make_event = make_event
        self.stream = stream
        self.most_pending = most_pending
        self._free: list[Any] = []
        self._unit: list[tuple[Any, Span | None]] = []  # an event, and what ran before it since the last one
        self._pending: deque[tuple[list[tuple[Any, Span | None]], int]] = deque()

    def start(self) -> None:
        """Begins a unit of work; the one at hand is dropped."""
        self._release(self._unit)
        self._unit = []
        self._record(None)

    def mark(self, span: Span) -> None:
        """What the stream was given since the last mark belongs to a span."""
        self._record(span)

    def skip(self) -> None:
        """What the stream was given since the last mark belongs nowhere."""
        self._record(None)

    def cut(self, weight: int) -> None:
        """Ends the unit of work, to be read later, and begins the next.

        Args:
            weight: How many units it stands for.
        """
        unit, self._unit = self._unit, []
        if len(self._pending) < self.most_pending:
            self._pending.append((unit, weight))
        else:
            self._release(unit)
        self._record(None)

    def read(self, *, wait: bool = False) -> Iterator[tuple[dict[Label, float], int]]:
        """Yields the seconds of each label, and the weight, of the units that the device is through with.

        Args:
            wait: Whether to wait for the device, for the end of a run.
        """
        while self._pending:
            unit, weight = self._pending[0]
            last = unit[-1][0]
            if wait:
                last.synchronize()
            elif not last.query():
                return
            self._pending.popleft()
            times: dict[Label, float] = {}
            for (before, _), (after, span) in pairwise(unit):
                if span is not None:
                    times[span.label] = times.get(span.label, 0.0) + before.elapsed_time(after) / 1000.0
            self._release(unit)
            yield times, weight

    def _record(self, span: Span | None) -> None:
        event = self._free.pop() if self._free else self.make_event()
        event.record(self.stream())
        self._unit.append((event, span))

    def _release(self, unit: list[tuple[Any, Span | None]]) -> None:
        self._free += [event for event, _ in unit]


def cuda_times(device: torch.device) -> DeviceTimes:
    """Measures on the current stream of a CUDA device."""
    return DeviceTimes(partial(torch.cuda.Event, enable_timing=True), partial(torch.cuda.current_stream, device))


class LayerTimes:
    """Times the forward of each submodule, by hooks that are there only between :meth:`attach` and :meth:`detach`.

    What torch compiles is one layer: hooks inside of it would change what is compiled. So is what is scripted.

    Args:
        module: The module whose submodules are timed.
        depth: Levels of submodules; None for all.
        times: Where their spans are added up.
    """

    def __init__(self, module: nn.Module, depth: int | None, times: SelfTimes) -> None:
        self.times = times
        self._labels = {layer: Label("layer", f"{name} ({type(layer).__name__})") for name, layer in layers(module, depth)}
        self._handles: list[Any] = []
        times.start()

    def attach(self) -> None:
        """Registers the hooks, unless they are there; the unit of work goes on."""
        if not self._handles:
            for layer in self._labels:
                self._handles += [layer.register_forward_pre_hook(self._begin), layer.register_forward_hook(self._end)]
            self.times.go_on()

    def detach(self) -> None:
        """Removes the hooks, and stops the clock."""
        if self._handles:
            self.times.suspend()
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def _begin(self, layer: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():  # a constant there, so that nothing of this is compiled
            return
        self.times.pause()
        self.times.begin(layer, self._labels[layer])
        self.times.resume()

    def _end(self, layer: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.times.pause()
        self.times.end(layer)
        self.times.resume()


def layers(module: nn.Module, depth: int | None, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The submodules of a module with their paths, once each; none inside of what is compiled or scripted."""
    compiled = "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
    if compiled or isinstance(module, torch.jit.ScriptModule) or depth == 0:
        return
    for name, child in module.named_children():
        if not isinstance(child, torch.jit.ScriptModule):
            yield f"{path}{name}", child
        yield from layers(child, None if depth is None else depth - 1, f"{path}{name}.")


class Sampling:
    """Which units of a long sequence are looked at: the first ones, then one here and there.

    The distances between them are random, so that nothing periodic in the sequence can hide, and drawn from a generator
    of its own, so that they repeat in each run and take nothing from the run's random numbers.

    Args:
        first: How many are looked at from the beginning.
        every: The mean distance between two afterwards.
    """

    def __init__(self, first: int, every: int) -> None:
        self.first = first
        self.every = every
        self._drawn = 0
        self._random = random.Random(0)

    def draw(self) -> int:
        """The distance from the unit that was looked at last to the next; the unit there stands for so many."""
        self._drawn += 1
        return 1 if self._drawn < self.first else self._random.randint(1, 2 * self.every - 1)
