"""The time that is spent in each span and in no span within it, on the host and on an accelerator's stream."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from eventtrain import _torch
from eventtrain.callbacks.profiling.spans import OBSERVING, REST, Label, Span, Spans

Clock = Callable[[], float]


class SelfTimes(Spans):
    """Adds up the time that is spent in each span and in no span within it.

    Args:
        clock: Returns the time in seconds.
        device: Measures the same spans on an accelerator's stream; None if there is no accelerator.
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
        """Begin a unit of work, with no span open. Times that were measured and not taken are dropped."""
        self.open.clear()
        self._times = {}
        self._rest.seconds = self._observing = 0.0
        if self.device is not None:
            self.device.start()
        self.go_on()

    def take(self) -> dict[Label, float]:
        """End the unit of work and begin the next.

        Returns:
            The seconds of each label since the unit began.
        """
        self.suspend()
        times, self._times = self._times, {}
        times[OBSERVING], self._observing = self._observing, 0.0
        self.go_on()
        return times

    def suspend(self) -> None:
        """Leave all spans and stop the clock until :meth:`go_on`."""
        self.pause()
        for span in (*self.open, self._rest):
            self.closed(span)
        self.open.clear()
        self._rest.seconds = 0.0

    def go_on(self) -> None:
        """Start the clock again. The time since :meth:`suspend` counts nowhere."""
        if self.device is not None:
            self.device.skip()
        self._paused = False
        self._since = self.clock()

    def pause(self) -> None:
        """Add the time so far to the innermost open span."""
        if not self._paused:
            self._paused = True
            now = self.clock()
            current = self.open[-1] if self.open else self._rest
            current.seconds += now - self._since
            self._since = now
            if self.device is not None:
                self.device.mark(current)

    def resume(self) -> None:
        """Add the time since :meth:`pause` to the observing."""
        if self._paused:
            self._paused = False
            now = self.clock()
            self._observing += now - self._since
            self._since = now

    def closed(self, span: Span) -> None:
        """Add the time of a span to the time of its label."""
        self._times[span.label] = self._times.get(span.label, 0.0) + span.seconds

    def dropped(self, span: Span, around: Span) -> None:
        """Add the time of a span without an end to the span around it."""
        around.seconds += span.seconds
        span.label = around.label


class DeviceTimes:
    """Measures the same spans on a stream of an accelerator, without waiting for it.

    Each point is an event on the stream. A unit of work is read once the device has reached the unit's last event. Only a
    limited number of units is pending; a unit beyond the limit is not measured.

    Args:
        make_event: Makes an event with ``record(stream)``, ``query``, ``synchronize`` and ``elapsed_time`` in
            milliseconds, such as ``torch.cuda.Event(enable_timing=True)``.
        stream: Returns the current stream.
        most_pending: The largest number of units that wait for the device.
    """

    def __init__(self, make_event: Callable[[], Any], stream: Callable[[], Any], most_pending: int = 64) -> None:
        self.make_event = make_event
        self.stream = stream
        self.most_pending = most_pending
        self._free: list[Any] = []
        self._unit: list[tuple[Any, Span | None]] = []  # an event, and the span that ran between it and the one before
        self._pending: deque[tuple[list[tuple[Any, Span | None]], int]] = deque()

    def start(self) -> None:
        """Begin a unit of work and drop the current one."""
        self._release(self._unit)
        self._unit = []
        self._record(None)

    def mark(self, span: Span) -> None:
        """Assign the work that was queued since the last mark to a span.

        Args:
            span: The span.
        """
        self._record(span)

    def skip(self) -> None:
        """Assign the work that was queued since the last mark to no span."""
        self._record(None)

    def cut(self, weight: int) -> None:
        """End the unit of work, to be read later, and begin the next.

        Args:
            weight: The number of units that it represents.
        """
        unit, self._unit = self._unit, []
        if len(self._pending) < self.most_pending:
            self._pending.append((unit, weight))
        else:
            self._release(unit)
        self._record(None)

    def read(self, *, wait: bool = False) -> Iterator[tuple[dict[Label, float], int]]:
        """Yield the seconds of each label, and the weight, of each unit that the device has finished.

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
    """Return a measurement on the current stream of a CUDA device.

    Args:
        device: The device.
    """
    return DeviceTimes(partial(torch.cuda.Event, enable_timing=True), partial(torch.cuda.current_stream, device))


class LayerTimes:
    """Times the forward of each submodule, by hooks that exist only between :meth:`attach` and :meth:`detach`.

    A compiled or scripted submodule is one layer: hooks within a compiled one would change the compiled code.

    Args:
        module: The module whose submodules are timed.
        depth: The number of levels of submodules; None for all.
        times: Adds up their spans.
    """

    def __init__(self, module: nn.Module, depth: int | None, times: SelfTimes) -> None:
        self.times = times
        self._labels = {layer: Label("layer", f"{name} ({type(layer).__name__})") for name, layer in layers(module, depth)}
        self._handles: list[Any] = []
        times.start()

    def attach(self) -> None:
        """Register the hooks, unless they are there, and continue the unit of work."""
        if not self._handles:
            for layer in self._labels:
                self._handles += [layer.register_forward_pre_hook(self._begin), layer.register_forward_hook(self._end)]
            self.times.go_on()

    def detach(self) -> None:
        """Remove the hooks and stop the clock."""
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
    """Yield the submodules of a module with their paths, once each. Those within a compiled or scripted one are left out.

    Args:
        module: The module.
        depth: The number of levels; None for all.
        path: The beginning of each path.
    """
    compiled = _torch.original_module(module) is not module or _torch.is_compiled_in_place(module)
    if compiled or isinstance(module, torch.jit.ScriptModule) or depth == 0:
        return
    for name, child in module.named_children():
        if not isinstance(child, torch.jit.ScriptModule):
            yield f"{path}{name}", child
        yield from layers(child, None if depth is None else depth - 1, f"{path}{name}.")
