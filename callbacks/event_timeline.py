"""Shows what ran when, in which order and how long: events, listeners and phases of a few steps."""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from eventtrain.callback import Callback
from eventtrain.configure import LRSchedulerConfig
from eventtrain.errors import MisconfigurationError
from eventtrain.events import (
    EVENTS,
    BeforeBatchFetch,
    BeforeGradientClipping,
    Event,
    ExceptionRaised,
    Plan,
    SafePoint,
    Setup,
    Teardown,
    TrainBatchStart,
    TrainStart,
)
from eventtrain.optimizer import LightningOptimizer
from eventtrain.signals import Listener, Observer, describe_listener
from eventtrain.trainer import Trainer

Kind = Literal["span", "event", "listener"]

WARM_UP = 2  # windows that allocate, compile and fill caches
WINDOWS = 3


class EventTimeline(Callback):
    """Records the events of chosen steps with their listeners and durations, nested as they ran, and writes them as a
    web page that needs no network, and as a trace for Perfetto (https://ui.perfetto.dev) or ``chrome://tracing``.

    A step is chosen by the value that ``global_step`` has while it is taken, so that accumulation windows are recorded
    whole, with the validation and the checkpoint that follow before the next window. A run that only evaluates is
    recorded from its first batch on.

    Listens to ``setup``, ``train_start``, ``safe_point``, ``exception`` and ``teardown``, and observes all signals
    (:meth:`~eventtrain.signals.Signals.observe`) in the chosen steps; the others pay for one listener's call a batch.
    Writes ``timeline-<n>.html`` and ``timeline-<n>.json``, with a number of its own for each run, when the run ends, by
    an error too. Nothing is recorded or written in a ``fast_dev_run``, nor on other ranks than zero. Override
    :meth:`is_due` for a choice of your own.

    Durations are the host's: work that a GPU does asynchronously shows up where the host waits for it. Recording adds a
    few microseconds to an event and to a listener's call.

    Args:
        steps: Values of ``global_step``, such as ``range(100, 103)`` or ``{0, 500}``. None: three windows of each fit,
            after two to warm up.
        dirpath: Where the files go; relative to the trainer's ``default_root_dir``.
        evaluation_batches: How many batches of a run that only evaluates are recorded.
        max_events: How much is recorded at most: events, listeners and phases together. The files say where it ended.
        clock: Tells the time in nanoseconds.

    Raises:
        MisconfigurationError: Steps that no run can take, or a limit under 1.
    """

    def __init__(
        self,
        *,
        steps: Iterable[int] | int | None = None,
        dirpath: str | PathLike[str] = "timelines",
        evaluation_batches: int = 3,
        max_events: int = 5000,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self.steps = None if steps is None else check_steps(steps)
        for name, value in (("evaluation_batches", evaluation_batches), ("max_events", max_events)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MisconfigurationError(f"EventTimeline({name}={value!r}): it has to be a whole number from 1.")
        self.dirpath = Path(dirpath)
        self.evaluation_batches = evaluation_batches
        self.max_events = max_events
        self.clock = clock
        self._trainer: Trainer | None = None
        self._stage = ""
        self._recorder: Recorder | None = None  # of the run at hand or the last; None where it records nothing
        self._running = False  # a run is at hand that is recorded
        self._first_step = 0
        self._fetched = 0
        self._error = ""
        self._paths: tuple[Path, Path] | None = None

    def is_due(self, global_step: int) -> bool:
        """The policy: whether a step is recorded.

        Args:
            global_step: The updates before it.
        """
        if self.steps is not None:
            return global_step in self.steps
        return WARM_UP <= global_step - self._first_step < WARM_UP + WINDOWS

    def write(self) -> tuple[Path, Path]:
        """Writes what has been recorded so far in the run at hand, or in the last; that run's files are replaced.

        Returns:
            The page and the trace.

        Raises:
            MisconfigurationError: Nothing has been recorded.
            OSError: A file could not be written.
        """
        trainer, recorder = self._trainer, self._recorder
        if trainer is None or recorder is None or not recorder.records:
            raise MisconfigurationError(
                "EventTimeline has recorded nothing yet. Call write() once a chosen step has been taken; in a fast_dev_run, "
                "and on other ranks than zero, none is recorded."
            )
        timeline = recorder.timeline(type(trainer.module).__name__, self._stage, self._notes(recorder))
        page, trace = timeline.page(), json.dumps(timeline.trace())
        if self._paths is None:
            self._paths = free_paths(self._directory(trainer))
        for path, text in zip(self._paths, (page, trace), strict=True):
            path.write_text(text, encoding="utf-8")
        return self._paths

    # ------------------------------------------------------------------ events

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        self._trainer, self._stage = trainer, event.stage
        self._recorder, self._paths, self._error = None, None, ""
        self._first_step = self._fetched = 0
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        check_writable(self._directory(trainer), self.dirpath)
        self._recorder = Recorder(self._at_gate, self.max_events, self.clock)
        self._running = True
        if event.stage != "fit":
            self._observe(trainer, self._recorder)
            self._recorder.begin()

    def on_train_start(self, trainer: Trainer, event: TrainStart) -> None:
        self._first_step = trainer.progress.global_step
        self._look_ahead(trainer)

    def on_safe_point(self, trainer: Trainer, event: SafePoint) -> None:
        self._look_ahead(trainer)

    def on_exception(self, trainer: Trainer, event: ExceptionRaised) -> None:
        if self._running:
            self._error = plain(f"{type(event.exception).__name__}: {event.exception}")

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        recorder = self._recorder
        if recorder is None or not self._running:  # a run that failed before its setup leaves the last one's files alone
            return
        self._running = False
        self._stop(trainer, recorder)
        if recorder.records:
            try:
                self.write()
            except OSError as error:  # the run's results are worth more than a picture of it
                warnings.warn(f"EventTimeline could not write its files: {error}.", stacklevel=2)
        elif not self._error:
            chosen = self.steps if self.steps is not None else f"None, the third to the fifth from {self._first_step}"
            warnings.warn(
                f"EventTimeline(steps={chosen}) recorded nothing: the run took global_step from {self._first_step} to "
                f"{trainer.global_step}. Choose steps that it takes.",
                stacklevel=2,
            )

    # ------------------------------------------------------------------ choosing

    def _look_ahead(self, trainer: Trainer) -> None:
        """Observes from here on where the next step is due; the recording begins at the gate behind which it lies."""
        recorder = self._recorder
        if recorder is None or recorder.observes or recorder.is_full:
            return
        if self.is_due(trainer.progress.global_step):
            self._observe(trainer, recorder)

    def _observe(self, trainer: Trainer, recorder: Recorder) -> None:
        recorder.observes = True
        trainer.signals.observe(recorder)

    def _at_gate(self, name: str, event: Event) -> None:
        """Decides before one of :data:`GATES` whether what follows is recorded. Not at the safe point itself, at which
        other listeners may still be about to write a checkpoint."""
        trainer, recorder = self._trainer, self._recorder
        assert trainer is not None and recorder is not None
        if name in ("train_end", "teardown"):
            self._stop(trainer, recorder)
        elif trainer.stage != "fit":
            if name == "before_batch_fetch":
                if self._fetched == self.evaluation_batches:
                    self._stop(trainer, recorder)
                self._fetched += 1
        elif not isinstance(event, BeforeBatchFetch) or event.stage == "train":
            step = trainer.progress.global_step
            if recorder.is_full or not self.is_due(step):
                self._stop(trainer, recorder)
            else:
                recorder.begin(f"epoch {trainer.current_epoch}" if name == "before_batch_fetch" else "")
                recorder.enter_window(step)

    def _stop(self, trainer: Trainer, recorder: Recorder) -> None:
        recorder.pause("the recording ended")
        recorder.observes = False
        trainer.signals.unobserve(recorder)

    def _notes(self, recorder: Recorder) -> list[str]:
        notes = []
        if recorder.is_full:
            notes.append(
                f"Truncated: the recording ended after max_events={self.max_events}. Choose fewer steps, or raise it: "
                f"EventTimeline(max_events={10 * self.max_events})."
            )
        if self._error:
            notes.append(f"The run was ended by {self._error}")
        return notes

    def _directory(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.dirpath


def check_steps(steps: Iterable[int] | int) -> range | frozenset[int]:
    """What ``steps=`` means.

    Raises:
        MisconfigurationError: It holds no step, or what is none.
    """
    if isinstance(steps, range):
        ends: list[Any] = [*steps[:1], *steps[-1:]]  # it may be a long one
    else:
        ends = list(steps) if isinstance(steps, Iterable) else [steps]
    if not ends or any(isinstance(step, bool) or not isinstance(step, int) or step < 0 for step in ends):
        raise MisconfigurationError(
            f"EventTimeline(steps={steps!r}): it has to hold values of global_step, which are whole numbers from 0. Write "
            "for example steps=range(10, 13)."
        )
    return steps if isinstance(steps, range) else frozenset(ends)


def check_writable(directory: Path, given: Path) -> None:
    """Makes a directory, and refuses one that cannot be written to.

    Raises:
        MisconfigurationError: It cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise MisconfigurationError(
            f"EventTimeline(dirpath={str(given)!r}) cannot be written to: {error}. Give another directory."
        ) from error


def free_paths(directory: Path) -> tuple[Path, Path]:
    """The page and the trace with the first number that is free after the largest taken, which they take."""
    taken = [int(found.group(1)) for path in directory.glob("timeline-*") if (found := re.search(r"-(\d+)\.", path.name))]
    number = max(taken, default=-1) + 1
    while True:
        page, trace = (directory / f"timeline-{number}.{kind}" for kind in ("html", "json"))
        try:
            page.open("x").close()
            return page, trace
        except FileExistsError:  # another run's, since the look
            number += 1


# ---------------------------------------------------------------------- what is recorded

GATES = ("train_epoch_start", "before_batch_fetch", "train_end", "teardown")
"""The events before which a recording may begin or end: what comes first after a ``safe_point``."""


@dataclass(frozen=True, slots=True)
class Span:
    """What lies between an event and its counterpart, both included.

    Attributes:
        label: What it is called.
        closed_by: The counterparts, of which one comes.
        number: The field of the opening event that tells it from others of its kind; none where empty.
    """

    label: str
    closed_by: tuple[str, ...]
    number: str = ""


SPANS: dict[str, Span] = {
    "train_epoch_start": Span("epoch", ("train_epoch_end",), "epoch"),
    "before_batch_fetch": Span("batch fetch", ("after_batch_fetch",)),
    "train_batch_start": Span("batch", ("train_batch_end",), "batch_idx"),
    "optimizer_step": Span("optimizer step", ("after_optimizer_step", "optimizer_step_skipped")),
    "before_forward": Span("forward", ("after_forward",)),
    "before_zero_grad": Span("zero_grad", ("after_zero_grad",)),
    "before_backward": Span("backward", ("after_backward",)),
    "before_gradient_clipping": Span("clipping", ("after_gradient_clipping",)),
    "before_lr_scheduler_step": Span("scheduler step", ("after_lr_scheduler_step",)),
    "save_checkpoint": Span("checkpoint", ("checkpoint_saved",)),
}
"""The spans by the event that opens them."""

for _stage in ("validation", "test", "predict"):
    SPANS[f"{_stage}_start"] = Span(_stage, (f"{_stage}_end",))
    SPANS[f"{_stage}_batch_start"] = Span(f"{_stage} batch", (f"{_stage}_batch_end",), "batch_idx")

CATEGORIES: dict[str, tuple[str, ...]] = {
    "loop": (),
    "loader": ("batch_fetch",),
    "forward": ("forward",),
    "backward": ("backward",),
    "optimizer": ("zero_grad", "optimizer_step", "gradient", "after_update"),
    "scheduler": ("lr_scheduler",),
    "evaluation": ("validation_", "test_", "predict_"),
    "checkpoint": ("checkpoint",),
    "callbacks": (),
}
"""What gives a record its colour, with the words by which events belong to it. The rest belongs to the loop; callbacks
have the listeners."""

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
        name: The span's label, the signal's name, or the listener's.
        category: What it is about.
        depth: How many others it lies in.
        start: When it began, in the clock's nanoseconds.
        end: When it ended; None while it lasts.
        details: Numbers and names from the event's payload.
        cut: Why it did not end, or begin, by itself; empty where it did.
        failed: An error ended it.
    """

    kind: Kind
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
    """A stretch of the recording: the steps that were recorded without a pause, or one value of ``global_step``."""

    start: int
    end: int | None = None
    step: int = 0


@dataclass(slots=True)
class Frame:
    """A record that has not ended.

    Attributes:
        record: The record.
        of: The span, the event or the listener that it is of.
        handled: The error that was being handled when it began.
    """

    record: Record
    of: Any
    handled: BaseException | None


class Recorder(Observer):
    """Records events, listeners and the spans between events, in the order in which they begin.

    Records that lie in one another are told by their depth. Only the thread that built the recorder is recorded: what
    another publishes meanwhile lies in nothing of it.

    Args:
        gate: Called as ``gate(name, event)`` before the events in :data:`GATES`; it begins and ends the recording.
        max_events: Records at most.
        clock: Tells the time in nanoseconds.

    Attributes:
        records: What was recorded.
        segments: The stretches without a pause.
        windows: The values of ``global_step`` that were recorded.
        observes: The signals know the recorder.
        is_full: There are ``max_events`` records, and more was to be recorded.
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
        """Begins a segment; does nothing while one is being recorded.

        Args:
            enclosing: The label of the epoch that is under way; empty where none is.
        """
        if self._recording:
            return
        now = self._clock()
        self._recording = True
        self.segments.append(Interval(now))
        if enclosing:
            self._push("span", enclosing, "loop", SPANS["train_epoch_start"], now, cut="began before the recording")

    def pause(self, cut: str) -> None:
        """Ends the segment at hand, if any.

        Args:
            cut: What is said of records that have not ended.
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
        """Says which value ``global_step`` has from here on."""
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
        if isinstance(event, ExceptionRaised):  # whatever was under way has been left
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
        # Its span, if it lies in the same listener's call, or in none as this event does.
        for place in range(len(self._open) - 1, -1, -1):
            if self._open[place].record.kind != "span":
                return
            if name in self._open[place].of.closed_by:
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

    def _push(self, kind: Kind, name: str, about: str, of: Any, now: int | None = None, cut: str = "") -> None:
        if len(self.records) >= self._max_events and self._recording:
            self.is_full = True
            self.pause(f"max_events={self._max_events} was reached")
        if self._recording:
            record = Record(kind, name, about, len(self._open), now or 0, cut=cut)
            self.records.append(record)
            self._open.append(Frame(record, of, sys.exception()))
            if now is None:  # a listener's time is its own: read last here, and first where it ends
                record.start = self._clock()

    def _find(self, kind: str, of: Any) -> int | None:
        """The place of what is ending; None where it began before the recording, or in another thread."""
        if threading.get_ident() != self._thread:
            return None
        for at in range(len(self._open) - 1, -1, -1):
            if self._open[at].of is of and self._open[at].record.kind == kind:
                return at
        return None

    def _error(self, at: int) -> tuple[str, bool]:
        """How what is ending ended: the error's name where it is being raised right now, and whether there is one."""
        error = sys.exception()
        failed = error is not None and error is not self._open[at].handled
        return (type(error).__name__ if failed else "", failed)

    def _close(self, at: int, now: int, cut: str = "", failed: bool = False) -> None:
        """Ends the open record at a place, and those in it, whose own ends have not come."""
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
        """What was recorded so far.

        Args:
            module: The module's name.
            stage: What was run.
            notes: What a reader has to know.
        """
        return Timeline(module, stage, list(notes), self.records, self.segments, self.windows, self._clock())


def nothing_follows(event: Event) -> bool:
    """Whether an event's counterpart is not going to come, now that its listeners have had their say."""
    if isinstance(event, BeforeGradientClipping):
        return event.gradient_clip_val is None
    return isinstance(event, TrainBatchStart) and event.ends_epoch


PAYLOAD: dict[type[Any], list[str]] = {
    event_type: [each.name for each in fields(event_type) if each.name not in ("batch", "outputs", "checkpoint")]  # type: ignore[arg-type]
    for event_type in EVENTS.values()
}
"""The fields of each event that may say something in a few letters; batches do not."""


def summary(event: Event) -> dict[str, Any]:
    """Numbers and names from an event's payload. Reads no tensor."""
    details: dict[str, Any] = {}
    for name in PAYLOAD[type(event)]:
        value = getattr(event, name)
        if value is None or value is False:  # of flags, those that are set
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
    """A value that JSON has, and not a long one: it has no infinity."""
    if isinstance(value, str):
        return value if len(value) <= 200 else f"{value[:199]}…"
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------- what is written


@dataclass(slots=True)
class Timeline:
    """A recording, ready to be written.

    Attributes:
        module: The module's name.
        stage: What was run.
        notes: What a reader has to know.
        records: What was recorded, in the order in which it began.
        segments: The stretches without a pause.
        windows: The values of ``global_step`` that were recorded.
        now: The time for whatever has not ended.
    """

    module: str
    stage: str
    notes: list[str]
    records: list[Record]
    segments: list[Interval]
    windows: list[Interval]
    now: int

    def trace(self) -> dict[str, Any]:
        """The recording in the Trace Event Format, which Perfetto and Chrome read: complete events (``"ph": "X"``),
        times in microseconds since the recording began."""
        process = {"pid": 0, "tid": 0}
        steps, calls = {"pid": 0, "tid": 1}, {"pid": 0, "tid": 2}
        names = [
            ("process_name", process, {"name": f"{self.module}.{self.stage}"}),
            ("thread_name", steps, {"name": "global_step"}),
            ("thread_sort_index", steps, {"sort_index": 1}),
            ("thread_name", calls, {"name": "events"}),
            ("thread_sort_index", calls, {"sort_index": 2}),
        ]
        events: list[dict[str, Any]] = [{"ph": "M", "name": name, **where, "args": args} for name, where, args in names]
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
        """The recording as a web page that holds all it needs."""
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
        template = files("eventtrain").joinpath("timeline.html").read_text(encoding="utf-8")
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
    """JSON that stays data inside of a ``<script>`` element, whatever the names in it: no character of it can end the
    element or begin another. What is not ASCII is escaped by ``dumps``."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
