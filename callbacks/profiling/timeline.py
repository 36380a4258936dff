"""Records the events, listeners and phases of a few steps, and writes them as a trace and a page."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from importlib.resources import files
from typing import Any, Literal

from eventtrain.core.optimizer import LightningOptimizer
from eventtrain.core.signals import Listener, Observer, describe_listener
from eventtrain.events import (
    EVENTS,
    ClippingDecided,
    Event,
    ExceptionRaised,
    Plan,
    TrainBatchStart,
)
from eventtrain.optim.lr_scheduler import LRSchedulerConfig

RecordKind = Literal["span", "event", "listener"]

GATES = ("train_epoch_start", "before_batch_fetch", "train_end", "teardown")
"""The events before which a recording may begin or end: the first ones after the events of a safe point."""


@dataclass(frozen=True, slots=True)
class SpanType:
    """The kind of span between an event and its counterpart, both included.

    Attributes:
        label: Its name.
        closed_by: The counterparts; one of them is published.
        number: The field of the opening event that tells two spans of this type apart; empty if there is none.
    """

    label: str
    closed_by: tuple[str, ...]
    number: str = ""


SPANS: dict[str, SpanType] = {
    "train_epoch_start": SpanType("epoch", ("train_epoch_end",), "epoch"),
    "before_batch_fetch": SpanType("batch fetch", ("after_batch_fetch",)),
    "train_batch_start": SpanType("batch", ("train_batch_end",), "batch_idx"),
    "optimizer_step": SpanType("optimizer step", ("after_optimizer_step", "optimizer_step_skipped")),
    "before_forward": SpanType("forward", ("after_forward",)),
    "before_zero_grad": SpanType("zero_grad", ("after_zero_grad",)),
    "before_backward": SpanType("backward", ("after_backward",)),
    "before_gradient_clipping": SpanType("clipping", ("after_gradient_clipping",)),
    "before_lr_scheduler_step": SpanType("scheduler step", ("after_lr_scheduler_step",)),
    "save_checkpoint": SpanType("checkpoint", ("checkpoint_saved",)),
}
"""The types of spans, by the event that opens them."""

for _stage in ("validation", "test", "predict"):
    SPANS[f"{_stage}_start"] = SpanType(_stage, (f"{_stage}_end",))
    SPANS[f"{_stage}_batch_start"] = SpanType(f"{_stage} batch", (f"{_stage}_batch_end",), "batch_idx")

CATEGORIES: dict[str, tuple[str, ...]] = {
    "loop": (),
    "loader": ("batch_fetch",),
    "forward": ("forward",),
    "backward": ("backward",),
    "optimizer": ("zero_grad", "optimizer_step", "gradient", "clipping", "after_update"),
    "scheduler": ("lr_scheduler",),
    "evaluation": ("validation_", "test_", "predict_"),
    "checkpoint": ("checkpoint",),
    "callbacks": (),
}
"""The categories, which give records their colours. An event belongs to the first category that has a part of its name,
and else to the loop. The category of listeners is ``"callbacks"``."""

CATEGORY_OF: dict[str, str] = {
    event: next((name for name, words in CATEGORIES.items() if any(word in event for word in words)), "loop")
    for event in EVENTS
}
"""The category of each event."""


@dataclass(slots=True)
class Record:
    """A span, an event or a listener's call.

    Attributes:
        kind: ``"span"``, ``"event"`` or ``"listener"``.
        name: The span's label, or the name of the signal or listener.
        category: One of :data:`CATEGORIES`.
        depth: The number of records around it.
        start: The time of its beginning, in the clock's nanoseconds.
        end: The time of its end; None while it lasts.
        details: Numbers and names from the event's payload.
        cut: The reason, if its beginning or end was not recorded; else empty.
        failed: Whether an error ended it.
    """

    kind: RecordKind
    name: str
    category: str
    depth: int
    start: int
    end: int | None = None
    details: dict[str, Any] = field(default_factory=dict)
    cut: str = ""
    failed: bool = False


@dataclass(slots=True)
class Interval:
    """A part of the recording: the steps that were recorded without a pause, or one value of ``global_step``."""

    start: int
    end: int | None = None
    step: int = 0


@dataclass(slots=True)
class Frame:
    """A record that has not ended.

    Attributes:
        record: The record.
        of: The type of span, the event or the listener that it records.
        handled: The error that was being handled when it began.
    """

    record: Record
    of: Any
    handled: BaseException | None


class Recorder(Observer):
    """Records events, listeners and the spans between events, in the order in which they begin.

    The depth of a record says how it is nested. Only the thread that built the recorder is recorded: the events of another
    thread are not nested in its records.

    Args:
        gate: Called as ``gate(name, event)`` before the events in :data:`GATES`; it begins and ends the recording.
        max_events: The largest number of records.
        clock: Returns the time in nanoseconds.

    Attributes:
        records: The records so far.
        segments: The parts without a pause.
        windows: The values of ``global_step`` that were recorded.
        observes: Whether the signals know the recorder.
        is_full: Whether a record was left out because there are ``max_events`` records.
    """

    def __init__(self, gate: Callable[[str, Event], None], max_events: int, clock: Callable[[], int]) -> None:
        self.records: list[Record] = []
        self.segments: list[Interval] = []
        self.windows: list[Interval] = []
        self.observes = self.is_full = False
        self._gate = gate
        self._max_events = max_events
        self._clock = clock
        self._thread = threading.get_ident()
        self._recording = False
        self._open: list[Frame] = []

    # ------------------------------------------------------------------ beginning and ending

    def begin(self, enclosing: str = "") -> None:
        """Begin a segment; do nothing if one is being recorded.

        Args:
            enclosing: The label of the current epoch; empty if there is none.
        """
        if self._recording:
            return
        now = self._clock()
        self._recording = True
        self.segments.append(Interval(now))
        if enclosing:
            self._push("span", enclosing, "loop", SPANS["train_epoch_start"], now, cut="began before the recording")

    def pause(self, cut: str) -> None:
        """End the current segment, if there is one.

        Args:
            cut: The reason, for records that have not ended.
        """
        if not self._recording:
            return
        now = self._clock()
        self._close(0, now, cut)
        self._recording = False
        for interval in (*self.segments[-1:], *self.windows[-1:]):
            if interval.end is None:
                interval.end = now

    def enter_window(self, step: int) -> None:
        """Note the value that ``global_step`` has from now on.

        Args:
            step: The value.
        """
        if not self._recording or (self.windows and self.windows[-1].end is None and self.windows[-1].step == step):
            return
        now = self._clock()
        if self.windows and self.windows[-1].end is None:
            self.windows[-1].end = now
        self.windows.append(Interval(now, step=step))

    # ------------------------------------------------------------------ observing

    def event_begins(self, name: str, event: Event) -> None:
        if threading.get_ident() != self._thread:
            return
        if name in GATES:
            self._gate(name, event)
        if not self._recording:
            return
        now = self._clock()
        if isinstance(event, ExceptionRaised):  # the error has left everything that was open
            self._close(0, now, type(event.exception).__name__, failed=True)
        if (span := SPANS.get(name)) is not None:
            label = f"{span.label} {getattr(event, span.number)}" if span.number else span.label
            self._push("span", label, CATEGORY_OF[name], span, now)
        self._push("event", name, CATEGORY_OF[name], event, now)

    def event_ends(self, name: str, event: Event) -> None:
        now = self._clock()
        if (at := self._find("event", event)) is None:
            return
        opened = self._open[at - 1] if at > 0 and self._open[at - 1].of is SPANS.get(name) else None
        (self._open[at] if opened is None else opened).record.details = summary(event)
        self._close(at, now, *self._error(at))
        if opened is not None and nothing_follows(event):
            self._close(at - 1, now)
        # Its span, if both lie in the same listener's call, or both in none.
        for place in range(len(self._open) - 1, -1, -1):
            if self._open[place].record.kind != "span":
                return
            if ends_span(name, event, self._open[place].of):
                self._close(place, now)
                return

    def listener_begins(self, listener: Listener) -> None:
        if self._recording and threading.get_ident() == self._thread:
            name = describe_listener(listener)
            self._push("listener", name, "callbacks", listener)

    def listener_ends(self, listener: Listener) -> None:
        now = self._clock()
        if (at := self._find("listener", listener)) is not None:
            self._close(at, now, *self._error(at))

    # ------------------------------------------------------------------ the records that have not ended

    def _push(self, kind: RecordKind, name: str, about: str, of: Any, now: int | None = None, cut: str = "") -> None:
        if len(self.records) >= self._max_events and self._recording:
            self.is_full = True
            self.pause(f"max_events={self._max_events} was reached")
        if self._recording:
            record = Record(kind, name, about, len(self._open), now or 0, cut=cut)
            self.records.append(record)
            self._open.append(Frame(record, of, sys.exception()))
            if now is None:  # read last here, and first at the end, so that the listener's time holds nothing else
                record.start = self._clock()

    def _find(self, kind: str, of: Any) -> int | None:
        """Return the place of the record that ends; None if it began before the recording, or in another thread."""
        if threading.get_ident() != self._thread:
            return None
        for at in range(len(self._open) - 1, -1, -1):
            if self._open[at].of is of and self._open[at].record.kind == kind:
                return at
        return None

    def _error(self, at: int) -> tuple[str, bool]:
        """Return the name of the error that ends a record, empty if none does, and whether one does."""
        error = sys.exception()
        failed = error is not None and error is not self._open[at].handled
        return (type(error).__name__ if failed else "", failed)

    def _close(self, at: int, now: int, cut: str = "", failed: bool = False) -> None:
        """End the open record at a place, and the records in it, whose ends never came."""
        for place in range(len(self._open) - 1, at - 1, -1):
            frame = self._open.pop()
            record = frame.record
            reason = cut
            if place > at and not cut:
                counterparts = frame.of.closed_by if record.kind == "span" else ("end",)
                reason = f"no {' or '.join(counterparts)} came"
            record.end = now
            record.failed = failed
            record.cut = "; ".join(filter(None, (record.cut, reason)))

    # ------------------------------------------------------------------ the result

    def timeline(self, module: str, stage: str, notes: Iterable[str]) -> Timeline:
        """Return the recording so far.

        Args:
            module: The module's name.
            stage: The trainer's stage.
            notes: Sentences that a reader has to know.
        """
        return Timeline(module, stage, list(notes), self.records, self.segments, self.windows, self._clock())


def nothing_follows(event: Event) -> bool:
    """Return whether an event's counterpart will not be published, after its listeners have decided."""
    return isinstance(event, TrainBatchStart) and event.ends_epoch


def ends_span(name: str, event: Event, span_type: SpanType) -> bool:
    """Return whether an event ends a span of a type. If the decision is not to clip, no counterpart is published."""
    if isinstance(event, ClippingDecided):
        return span_type is SPANS["before_gradient_clipping"] and event.gradient_clip_val is None
    return name in span_type.closed_by


PAYLOAD: dict[type[Any], list[str]] = {
    event_type: [each.name for each in fields(event_type) if each.name not in ("batch", "outputs", "checkpoint")]
    for event_type in EVENTS.values()
}
"""The fields of each event that may be shown in a few letters; batches can not."""


def summary(event: Event) -> dict[str, Any]:
    """Return numbers and names from an event's payload, without reading a tensor."""
    details: dict[str, Any] = {}
    for name in PAYLOAD[type(event)]:
        value = getattr(event, name)
        if value is None or value is False:  # only flags that are set are shown
            continue
        if value is True or type(value) in (int, float, str):
            details[name] = plain(value)
        elif isinstance(value, LightningOptimizer):
            details[name] = type(value.optimizer).__name__
        elif isinstance(value, Plan):
            details |= {"step": value.step, "zero_grad": value.zero_grad, "loss_scale": plain(value.loss_scale)}
        elif isinstance(value, LRSchedulerConfig):
            details["scheduler"] = type(value.scheduler).__name__
        elif isinstance(value, BaseException):
            details[name] = type(value).__name__
        elif isinstance(value, list):
            details[name] = [plain(each) for each in value if type(each) in (int, float)]
        elif isinstance(value, Mapping):
            details[name] = plain(", ".join(map(str, value)))
    return details


def plain(value: Any) -> Any:
    """Return a short value that JSON can hold. JSON has no infinity."""
    if isinstance(value, str):
        return value if len(value) <= 200 else f"{value[:199]}…"
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------- the files


@dataclass(slots=True)
class Timeline:
    """A recording, ready to be written.

    Attributes:
        module: The module's name.
        stage: The trainer's stage.
        notes: Sentences that a reader has to know.
        records: The records, in the order in which they began.
        segments: The parts without a pause.
        windows: The values of ``global_step`` that were recorded.
        now: The time that is used for records that have not ended.
    """

    module: str
    stage: str
    notes: list[str]
    records: list[Record]
    segments: list[Interval]
    windows: list[Interval]
    now: int

    def trace(self) -> dict[str, Any]:
        """Return the recording in the Trace Event Format, which Perfetto and Chrome read: complete events (``"ph": "X"``),
        with times in microseconds since the recording began."""
        process = {"pid": 0, "tid": 0}
        steps, calls = {"pid": 0, "tid": 1}, {"pid": 0, "tid": 2}
        names = [
            ("process_name", process, {"name": f"{self.module}.{self.stage}"}),
            ("thread_name", steps, {"name": "global_step"}),
            ("thread_sort_index", steps, {"sort_index": 1}),
            ("thread_name", calls, {"name": "events"}),
            ("thread_sort_index", calls, {"sort_index": 2}),
        ]
        events: list[dict[str, Any]] = [{"ph": "M", "name": name, **track, "args": args} for name, track, args in names]
        for window in self.windows:
            events.append({"ph": "X", "name": f"global_step {window.step}", "cat": "loop", **self._times(window), **steps})
        for record in self.records:
            args = {"kind": record.kind, **record.details, **self._cut(record)}
            events.append(
                {"ph": "X", "name": record.name, "cat": record.category, **self._times(record), **calls, "args": args}
            )
        about = {"module": self.module, "stage": self.stage, "notes": self.notes}
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}

    def page(self) -> str:
        """Return the recording as a web page that needs no other file."""
        data = {
            "module": self.module,
            "stage": self.stage,
            "written": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
            "notes": self.notes,
            "categories": list(CATEGORIES),
            "segments": [self._range(segment) for segment in self.segments],
            "windows": [[window.step, *self._range(window)] for window in self.windows],
            "records": [
                [
                    *(record.kind, record.name, record.category, record.depth, *self._range(record)),
                    *(record.details, self._cut(record).get("cut", ""), record.failed),
                ]
                for record in self.records
            ],
        }
        template = files("eventtrain.callbacks.profiling").joinpath("timeline.html").read_text(encoding="utf-8")
        return template.replace("{{ timeline }}", json_in_html(data), 1)

    def _range(self, lasting: Record | Interval) -> tuple[int, int]:
        origin = self.segments[0].start
        return lasting.start - origin, (self.now if lasting.end is None else lasting.end) - origin

    def _times(self, lasting: Record | Interval) -> dict[str, float]:
        start, end = self._range(lasting)
        return {"ts": start / 1000, "dur": (end - start) / 1000}

    def _cut(self, record: Record) -> dict[str, str]:
        under_way = "under way when this was written" if record.end is None else ""
        cut = "; ".join(filter(None, (record.cut, under_way)))
        return {"cut": cut} if cut else {}


def json_in_html(data: Any) -> str:
    """Return JSON that stays data within a ``<script>`` element: no character of it can end the element or begin another,
    whatever names it holds. ``dumps`` escapes characters that are not ASCII."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
