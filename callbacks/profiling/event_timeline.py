"""Shows the events, listeners and phases of a few steps: their order, their nesting and their durations."""

from __future__ import annotations

import json
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any

from eventtrain.callback import Callback
from eventtrain.callbacks.profiling.timeline import Recorder, plain
from eventtrain.checkpoint import storage
from eventtrain.checks import check_whole_number
from eventtrain.errors import MisconfigurationError
from eventtrain.events import (
    BeforeBatchFetch,
    Event,
    ExceptionRaised,
    SafePoint,
    Setup,
    Teardown,
    TrainStart,
)
from eventtrain.paths import AnyPath, check_path
from eventtrain.trainer import Trainer

WARM_UP = 2  # windows that allocate, compile and fill caches
WINDOWS = 3


class EventTimeline(Callback):
    """Records the events of some steps with their listeners and durations, nested as they ran.

    Writes two files when the run ends: a web page that needs no network, and a trace for Perfetto
    (https://ui.perfetto.dev) or ``chrome://tracing``.

    A step is chosen by the value of ``global_step`` before it. Accumulation windows are recorded whole, with the validation
    and the checkpoint that follow before the next window. ``validate``, ``test`` and ``predict`` are recorded from their
    first batch on.

    Listens to ``setup``, ``train_start``, ``safe_point``, ``exception`` and ``teardown``, and observes all signals
    (:meth:`~eventtrain.core.signals.Signals.observe`) in the chosen steps; each other batch costs one listener's call.
    Writes ``timeline-<n>.html`` and ``timeline-<n>.json`` under the next free number when the run ends, also if an error
    ends it. In a ``fast_dev_run``, and on ranks other than zero, it records and writes nothing. Override :meth:`is_due` to
    choose steps by another rule.

    Durations are the host's: work that a GPU does asynchronously appears at the place that waits for it. Recording adds a
    few microseconds to an event and to a listener's call.

    Args:
        steps: Values of ``global_step``, such as ``range(100, 103)`` or ``{0, 500}``. If None, three windows of each fit
            are recorded, after two to warm up.
        dirpath: The folder of the files; relative to the trainer's ``default_root_dir``.
        evaluation_batches: The number of batches that are recorded in ``validate``, ``test`` and ``predict``.
        max_events: The largest number of events, listeners and phases that are recorded together. If a recording reaches
            it, the files say so.
        clock: Returns the time in nanoseconds.

    Raises:
        MisconfigurationError: If ``steps`` holds no step, or a value that is not a whole number from 0, or if a limit is
            not a whole number from 1.

    Example:
        >>> from eventtrain.callbacks import EventTimeline
        >>> timeline = EventTimeline(steps=range(100, 103), max_events=2000)
        >>> [step for step in (99, 100, 102, 103) if timeline.is_due(step)]
        [100, 102]
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
        self.dirpath = check_path(dirpath, "EventTimeline", "dirpath")
        self.evaluation_batches = check_whole_number(evaluation_batches, "EventTimeline", "evaluation_batches", least=1)
        self.max_events = check_whole_number(max_events, "EventTimeline", "max_events", least=1)
        self.clock = clock
        self._trainer: Trainer | None = None
        self._stage = ""
        self._recorder: Recorder | None = None  # of the current run or the last one; None if it records nothing
        self._running = False  # between the setup and the teardown of a run that may be recorded
        self._first_step = 0
        self._fetched = 0
        self._error = ""
        self._paths: tuple[AnyPath, AnyPath] | None = None

    def is_due(self, global_step: int) -> bool:
        """Return whether a step is recorded: the policy to override.

        Args:
            global_step: The number of updates before it.

        Returns:
            Whether its events are recorded.
        """
        if self.steps is not None:
            return global_step in self.steps
        return WARM_UP <= global_step - self._first_step < WARM_UP + WINDOWS

    def write(self) -> tuple[AnyPath, AnyPath]:
        """Write the recording of the current run, or of the last one. The files of that run are replaced.

        Returns:
            The paths of the page and of the trace.

        Raises:
            MisconfigurationError: If nothing has been recorded.
            OSError: If a file could not be written.
        """
        trainer, recorder = self._trainer, self._recorder
        if trainer is None or recorder is None or not recorder.records:
            raise MisconfigurationError(
                "EventTimeline has recorded nothing yet. Call write() after one of the chosen steps. In a fast_dev_run, and on "
                "ranks other than zero, nothing is recorded."
            )
        timeline = recorder.timeline(type(trainer.module).__name__, self._stage, self._notes(recorder))
        page, trace = timeline.page(), json.dumps(timeline.trace())
        if self._paths is None:
            self._paths = free_paths(self._directory(trainer))
        for path, text in zip(self._paths, (page, trace), strict=True):
            with storage.writing(path) as file:
                file.write(text.encode())
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
        self._first_step = trainer.global_step
        self._look_ahead(trainer)

    def on_safe_point(self, trainer: Trainer, event: SafePoint) -> None:
        self._look_ahead(trainer)

    def on_exception(self, trainer: Trainer, event: ExceptionRaised) -> None:
        if self._running:
            self._error = plain(f"{type(event.exception).__name__}: {event.exception}")

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        recorder = self._recorder
        if recorder is None or not self._running:  # a run that failed before its setup keeps the files of the last one
            return
        self._running = False
        self._stop(trainer, recorder)
        if recorder.records:
            try:
                self.write()
            except OSError as error:  # the results of the run matter more than its timeline
                warnings.warn(f"EventTimeline could not write its files: {storage.first_line(error)}.", stacklevel=2)
        elif not self._error:
            chosen = self.steps if self.steps is not None else f"None, the third to the fifth from {self._first_step}"
            warnings.warn(
                f"EventTimeline(steps={chosen}) recorded nothing: the run took global_step from {self._first_step} to "
                f"{trainer.global_step}. Choose steps that it takes.",
                stacklevel=2,
            )

    # ------------------------------------------------------------------ choosing

    def _look_ahead(self, trainer: Trainer) -> None:
        """Observe from now on if the next step is due. The recording begins at the gate before it."""
        recorder = self._recorder
        if recorder is None or recorder.observes or recorder.is_full:
            return
        if self.is_due(trainer.global_step):
            self._observe(trainer, recorder)

    def _observe(self, trainer: Trainer, recorder: Recorder) -> None:
        recorder.observes = True
        trainer.signals.observe(recorder)

    def _at_gate(self, name: str, event: Event) -> None:
        """Decide before one of the ``GATES`` whether the next events are recorded. The safe point is too early for that:
        the checkpoint that is taken there belongs to the step before."""
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
            step = trainer.global_step
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
                f"Truncated: the recording ended after max_events={self.max_events}. Choose fewer steps, or raise the limit: "
                f"EventTimeline(max_events={10 * self.max_events})."
            )
        if self._error:
            notes.append(f"The run was ended by {self._error}")
        return notes

    def _directory(self, trainer: Trainer) -> AnyPath:
        return trainer.root / self.dirpath


def check_steps(steps: Iterable[int] | int) -> range | frozenset[int]:
    """Return the steps that a user chose.

    Args:
        steps: The value that the user wrote.

    Raises:
        MisconfigurationError: If it holds no step, or a value that is not a whole number from 0.
    """
    if isinstance(steps, range):
        ends: list[Any] = [*steps[:1], *steps[-1:]]  # it may be a long one
    else:
        ends = list(steps) if isinstance(steps, Iterable) else [steps]
    if not ends or any(isinstance(step, bool) or not isinstance(step, int) or step < 0 for step in ends):
        raise MisconfigurationError(
            f"EventTimeline(steps={steps!r}): give values of global_step, which are whole numbers from 0, for example "
            "steps=range(10, 13)."
        )
    return steps if isinstance(steps, range) else frozenset(ends)


def check_writable(directory: AnyPath, dirpath: AnyPath) -> None:
    """Make a directory and check that files can be written to it.

    Args:
        directory: The directory.
        dirpath: The argument that it comes from.

    Raises:
        MisconfigurationError: If it cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        trial = directory / f".{uuid.uuid4().hex}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise MisconfigurationError(
            f"EventTimeline(dirpath={str(dirpath)!r}) cannot be written to: {error}. Give another directory."
        ) from error


def free_paths(directory: AnyPath) -> tuple[AnyPath, AnyPath]:
    """Create an empty page under the number after the largest that is taken.

    Args:
        directory: The folder of the files.

    Returns:
        The paths of the page and of the trace with that number.
    """
    taken = [int(match.group(1)) for path in directory.glob("timeline-*") if (match := re.search(r"-(\d+)\.", path.name))]
    number = max(taken, default=-1) + 1
    while True:
        page, trace = (directory / f"timeline-{number}.{kind}" for kind in ("html", "json"))
        try:
            page.touch(exist_ok=False)
            return page, trace
        except FileExistsError:  # another run has taken it since
            number += 1
