"""Traces of a few batches by torch's own profiler, with the loop's phases in them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eventtrain.callback import Callback
from eventtrain.callbacks.profiling.spans import Label, Span, Spans
from eventtrain.errors import MisconfigurationError
from eventtrain.events import (
    Event,
    ExceptionRaised,
    FitEnd,
    PredictEnd,
    PredictStart,
    Setup,
    Teardown,
    TestEnd,
    TestStart,
    TrainEnd,
    TrainStart,
    ValidationEnd,
    ValidationStart,
)
from eventtrain.trainer import Trainer

if TYPE_CHECKING:
    from torch.profiler import ProfilerAction


class TorchProfiler(Callback):
    """Records every operator and kernel of a few batches by :mod:`torch.profiler`, and leaves the others alone.

    In the trace, for Perfetto and for TensorBoard's profiler plugin, stand the loop's phases as ranges
    (``eventtrain/forward``, ``eventtrain/backward``, ``eventtrain/fetch``, ...), each callback's calls
    (``eventtrain/callback/<name>``) and the batches (``ProfilerStep#<n>``). Prints the table of the operators that take the
    most time when the run is over.

    Bounded: by default one cycle of 5 batches that wait, 3 that warm the tracing up and 8 that are recorded, in ``fit`` as
    in ``validate``, ``test`` and ``predict``; where the run is known to be shorter, of as many as there are. Once the last
    cycle is over nothing is left but a few listeners of rare events. A run that ends within a cycle, by an error too,
    leaves the trace of what it had recorded, and the table says how much that was.

    Listens to the start and end of training and of each evaluation, ``setup``, ``fit_end``, ``exception`` and
    ``teardown``; while it waits to ``safe_point``, or to the ends of an evaluation's batches; while it records it observes
    everything. Works on rank zero. In a ``fast_dev_run`` it writes no file.

    Args:
        dirpath: Where traces are written; relative to the trainer's ``default_root_dir``. Where None, the directory of
            the logger's run, so that TensorBoard shows the trace beside the run's scalars; without such a logger
            ``"profiles"``.
        wait: Batches that pass before each cycle.
        warmup: Batches that are traced and thrown away, because the first ones pay for the tracing's start.
        active: Batches that are recorded.
        repeat: Cycles; each has a trace of its own, the table is of the last.
        record_shapes: Whether operators are recorded with the shapes of their inputs.
        profile_memory: Whether what is allocated and freed is recorded.
        with_stack: Whether operators are recorded with the lines of source, and the modules, that called them.
        with_flops: Whether the operations of matrix products and convolutions are estimated.
        activities: The ``torch.profiler.ProfilerActivity`` to record; None for the CPU and whatever device there is.
        sort_by: The column that the table is sorted by, such as ``"cpu_time_total"`` or ``"self_cuda_memory_usage"``; None
            for the device's own time where there is one, and the CPU's where there is none.
        row_limit: Rows of the table at most.
        print_summary: Whether the table is printed when the run is over.

    Raises:
        MisconfigurationError: A number is too small; or, when a run begins, another profiler is at work, or the directory
            cannot be written to.
    """

    role = "torch_profiler"

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        *,
        wait: int = 5,
        warmup: int = 3,
        active: int = 8,
        repeat: int = 1,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        with_flops: bool = False,
        activities: Any = None,
        sort_by: str | None = None,
        row_limit: int = 20,
        print_summary: bool = True,
    ) -> None:
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.wait = check_count("wait", wait, 0)
        self.warmup = check_count("warmup", warmup, 0)
        self.active = check_count("active", active, 1)
        self.repeat = check_count("repeat", repeat, 1)
        self.options = {
            "record_shapes": record_shapes,
            "profile_memory": profile_memory,
            "with_stack": with_stack,
            "with_flops": with_flops,
            "activities": activities,
        }
        self.sort_by = sort_by
        self.row_limit = check_count("row_limit", row_limit, 1)
        self.print_summary = print_summary
        self.traces: list[Path] = []
        self._trainer: Trainer | None = None
        self._begin_run()

    def _begin_run(self) -> None:
        self.traces = []
        self._averages: Any = None  # torch's rows of the last cycle's table
        self._recorded = 0  # batches of the last cycle
        self._cycle = Cycle(self.wait, self.warmup, self.active)
        self._cycles = 0
        self._batches = 0  # of the cycle at hand
        self._profile: Any = None
        self._ranges: Ranges | None = None
        self._signal = ""
        self._complete = False

    # ------------------------------------------------------------------ when

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        self._begin_run()
        self._trainer = trainer

    def on_train_start(self, trainer: Trainer, event: TrainStart) -> None:
        batches = trainer.num_training_batches
        whole = None if batches is None or trainer.max_epochs is None else batches * trainer.max_epochs
        if trainer.max_steps is not None:  # an update takes at least a batch
            whole = trainer.max_steps if whole is None else min(whole, trainer.max_steps)
        self._begin(trainer, "safe_point", whole)

    def on_validation_start(self, trainer: Trainer, event: ValidationStart) -> None:
        if trainer.stage != "fit":
            self._begin(trainer, "validation_batch_end", trainer.num_evaluation_batches)

    def on_test_start(self, trainer: Trainer, event: TestStart) -> None:
        self._begin(trainer, "test_batch_end", trainer.num_evaluation_batches)

    def on_predict_start(self, trainer: Trainer, event: PredictStart) -> None:
        self._begin(trainer, "predict_batch_end", trainer.num_evaluation_batches)

    def on_train_end(self, trainer: Trainer, event: TrainEnd) -> None:
        self._end()

    def on_validation_end(self, trainer: Trainer, event: ValidationEnd) -> None:
        if trainer.stage != "fit":
            self._end()
            self._complete = True

    def on_test_end(self, trainer: Trainer, event: TestEnd) -> None:
        self._end()
        self._complete = True

    def on_predict_end(self, trainer: Trainer, event: PredictEnd) -> None:
        self._end()
        self._complete = True

    def on_fit_end(self, trainer: Trainer, event: FitEnd) -> None:
        self._complete = True

    def on_exception(self, trainer: Trainer, event: ExceptionRaised) -> None:
        self._end()

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        self._end()
        complete, self._complete = self._complete, False
        self._trainer = None
        if complete and self.print_summary and trainer.is_global_zero:
            trainer.print(self.summary())

    def _begin(self, trainer: Trainer, signal: str, whole: int | None) -> None:
        if not trainer.is_global_zero:
            return
        if not trainer.fast_dev_run:
            make_directory(self._directory(trainer))
        self._signal = signal
        self._cycle = Cycle(self.wait, self.warmup, self.active).within(whole)
        self._begin_cycle()

    def _begin_cycle(self) -> None:
        self._batches = 0
        if self._cycle.wait:
            assert self._trainer is not None
            self._trainer.signals[self._signal].connect(self.count)
        else:
            self._start()

    def count(self, trainer: Trainer, event: Event) -> None:
        """Connected to the end of each batch while nothing is traced."""
        self._batches += 1
        if self._batches == self._cycle.wait:
            trainer.signals[self._signal].disconnect(self.count)
            self._start()

    def _start(self) -> None:
        from torch.profiler import profile

        if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
            raise MisconfigurationError(
                "TorchProfiler cannot begin: another torch profiler is at work in this thread, and there can be one. End it "
                "before this run, or leave TorchProfiler out."
            )
        assert self._trainer is not None
        self._profile = profile(schedule=self._cycle.action, on_trace_ready=self._keep, **self.options)
        self._profile.__enter__()
        self._batches = 0
        self._ranges = Ranges()
        self._ranges.after[self._signal] = self._count_traced
        self._trainer.signals.observe(self._ranges)

    def _count_traced(self, event: Event) -> None:
        """A batch is over that was traced, all listeners of its last event included."""
        self._batches += 1
        if self._batches < self._cycle.warmup + self._cycle.active:
            self._profile.step()
            return
        self._stop()
        self._cycles += 1
        if self._cycles < self.repeat:
            self._begin_cycle()

    def _stop(self) -> None:
        """Stops tracing; what was recorded becomes a trace."""
        assert self._trainer is not None
        running, ranges, self._profile, self._ranges = self._profile, self._ranges, None, None
        if ranges is not None:
            self._trainer.signals.unobserve(ranges)
            ranges.leave()
        if running is not None:
            running.__exit__(None, None, None)

    def _end(self) -> None:
        """Nothing comes any more: ends what is under way."""
        if self._trainer is not None and self._signal:
            self._trainer.signals[self._signal].disconnect(self.count)
            self._stop()

    # ------------------------------------------------------------------ what comes of it

    def _keep(self, profile: Any) -> None:
        """Called by the profiler when a cycle's trace is ready."""
        assert self._trainer is not None
        self._averages = profile.key_averages()
        self._recorded = min(self._batches - self._cycle.warmup, self._cycle.active)
        if not self._trainer.fast_dev_run:
            # The form of name that TensorBoard's plugin looks for: who, when, and this suffix.
            trace = self._directory(self._trainer) / f"{self._trainer.stage}.{time.time_ns()}.pt.trace.json"
            profile.export_chrome_trace(str(trace))
            self.traces.append(trace)

    def _directory(self, trainer: Trainer) -> Path:
        if self.dirpath is not None:
            return Path(trainer.default_root_dir) / self.dirpath
        run = next((directory for each in trainer.callbacks if (directory := getattr(each, "run_dir", None)) is not None), None)
        return Path(trainer.default_root_dir) / "profiles" if run is None else Path(run)

    def summary(self, sort_by: str | None = None, row_limit: int | None = None) -> str:
        """The operators that took the most time in the last cycle of the run at hand, or of the last.

        Args:
            sort_by: The column to sort by, where not the one given to the class.
            row_limit: Rows at most, where not as many as given to the class.

        Returns:
            The table, with the number of batches and the traces; a sentence where nothing was recorded.
        """
        if self._averages is None:
            return (
                f"TorchProfiler: nothing was recorded. The run ended before {self._cycle.wait} batches that wait and "
                f"{self._cycle.warmup} that warm up were over; lower wait and warmup."
            )
        column = sort_by or self.sort_by
        if column is None:
            on_device = any(getattr(row, "self_device_time_total", 0) for row in self._averages)
            column = "self_device_time_total" if on_device else "self_cpu_time_total"
        table = self._averages.table(sort_by=column, row_limit=row_limit or self.row_limit)
        cut = "" if self._recorded == self.active else f" of {self.active} that were to be"
        lines = [f"TorchProfiler: {self._recorded} batches were recorded{cut}.", table]
        return "\n".join([*lines, *(f"trace: {trace}" for trace in self.traces)])


class Cycle:
    """Which batches wait, warm the tracing up, and are recorded.

    Args:
        wait: Batches that pass.
        warmup: Batches that are traced and thrown away.
        active: Batches that are recorded.
    """

    def __init__(self, wait: int, warmup: int, active: int) -> None:
        self.wait = wait
        self.warmup = warmup
        self.active = active

    def within(self, batches: int | None) -> Cycle:
        """The cycle for a run of so many batches: what is too many is taken from the wait first, and from what is recorded
        last. As it is where the number is None."""
        if batches is None:
            return self
        active = max(1, min(self.active, batches - min(self.warmup, 1)))
        warmup = max(0, min(self.warmup, batches - active))
        return Cycle(max(0, min(self.wait, batches - active - warmup)), warmup, active)

    def action(self, step: int) -> ProfilerAction:
        """What torch's profiler does in a batch, counted from the end of the wait."""
        from torch.profiler import ProfilerAction

        if step < self.warmup:
            return ProfilerAction.WARMUP
        last = self.warmup + self.active - 1
        return ProfilerAction.RECORD if step < last else ProfilerAction.RECORD_AND_SAVE


VALIDATION = Label("phase", "validation")


class Ranges(Spans):
    """Phases and listeners' calls as named ranges of torch's profiler."""

    opens: Mapping[str, Label] = {**Spans.opens, "validation_start": VALIDATION}
    closes: Mapping[str, Label] = {**Spans.closes, "validation_end": VALIDATION}

    def begin(self, key: Any, label: Label) -> Span:
        """Begins a range."""
        span = super().begin(key, label)
        name = f"callback/{label.name}" if label.kind == "callback" else label.name
        span.range = torch.profiler.record_function(f"eventtrain/{name}")
        span.range.__enter__()
        return span

    def closed(self, span: Span) -> None:
        """Ends it."""
        span.range.__exit__(None, None, None)

    def dropped(self, span: Span, around: Span) -> None:
        """Ends it."""
        self.closed(span)

    def leave(self) -> None:
        """Ends all of them: the run has left them by an error, or the tracing ends inside of them."""
        while self.open:
            self.closed(self.open.pop())


def make_directory(directory: Path) -> None:
    """Makes a directory that is to be written to.

    Raises:
        MisconfigurationError: It can't be.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MisconfigurationError(
            f"TorchProfiler cannot write to {directory}: {error.strerror}. Give a dirpath that can be written to."
        ) from error


def check_count(name: str, value: Any, least: int) -> int:
    """Refuses what is no whole number, or too small.

    Raises:
        MisconfigurationError: It is.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise MisconfigurationError(f"TorchProfiler({name}={value!r}): it has to be a whole number from {least}.")
    return value
