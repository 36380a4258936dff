"""Shows what ran when, in which order and how long: events, listeners and phases of a few steps."""

from __future__ import annotations

import json
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from eventtrain.callback import Callback
from eventtrain.callbacks.profiling.timeline import Recorder, plain
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
from eventtrain.trainer import Trainer

WARM_UP = 2  # windows that allocate, compile and fill caches
WINDOWS = 3


class EventTimeline(Callback):
    """Records the events of chosen steps with their listeners and durations, nested as they ran, and writes them as a
    web page that needs no network, and as a trace for Perfetto (https://ui.perfetto.dev) or ``chrome://tracing``.

    A step is chosen by the value that ``global_step`` has while it is taken, so that accumulation windows are recorded
    whole, with the validation and the checkpoint that follow before the next window. A run that only evaluates is
    recorded from its first batch on.

    Listens to ``setup``, ``train_start``, ``safe_point``, ``exception`` and ``teardown``, and observes all signals
    (:meth:`~eventtrain.core.signals.Signals.observe`) in the chosen steps; the others pay for one listener's call a batch.
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
