"""Traces a few batches by torch's profiler, with the loop's phases in the trace."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from eventtrain import _torch
from eventtrain.callback import Callback, on_demand
from eventtrain.callbacks.profiling.spans import Label, Span, Spans
from eventtrain.callbacks.terminal import show
from eventtrain.checkpoint import storage
from eventtrain.checks import check_whole_number
from eventtrain.errors import MisconfigurationError
from eventtrain.events import (
    Event,
    ExceptionRaised,
    FitEnd,
    PredictBatchEnd,
    PredictEnd,
    PredictStart,
    SafePoint,
    Setup,
    Teardown,
    TestBatchEnd,
    TestEnd,
    TestStart,
    TrainEnd,
    TrainStart,
    ValidationBatchEnd,
    ValidationEnd,
    ValidationStart,
)
from eventtrain.paths import AnyPath, check_path
from eventtrain.trainer import Trainer

if TYPE_CHECKING:
    from torch.profiler import ProfilerAction


class TorchProfiler(Callback):
    """Records every operator and kernel of a few batches by :mod:`torch.profiler`. The other batches run without it.

    The trace is for Perfetto and for TensorBoard's profiler plugin. It holds the loop's phases as ranges
    (``eventtrain/forward``, ``eventtrain/backward``, ``eventtrain/fetch``, ...), each callback's calls
    (``eventtrain/callback/<name>``) and the batches (``ProfilerStep#<n>``). When the run is over, the callback prints a
    table of the operators that take the most time.

    The recording is bounded: by default it is one cycle of 5 batches that wait, 3 that warm up the tracing and 8 that are
    recorded, in ``fit`` as in ``validate``, ``test`` and ``predict``. If the run is known to be shorter, the cycle is
    shortened to fit. After the last cycle only listeners of rare events remain. If a run ends within a cycle, also by an
    error, the batches that were recorded become a trace, and the table says how many they are.

    Listens to the start and end of training and of each evaluation, ``setup``, ``fit_end``, ``exception`` and
    ``teardown``. While it waits, it also listens to one of ``safe_point``, ``validation_batch_end``, ``test_batch_end`` and
    ``predict_batch_end``; while it traces, it observes all signals. Works on rank zero. In a ``fast_dev_run`` it writes no
    file.

    Args:
        dirpath: The folder of the traces; relative to the trainer's ``default_root_dir``. If None, the directory of the
            logger's run, so that TensorBoard shows the trace beside the run's scalars; ``"profiles"`` if there is no such
            logger.
        wait: The number of batches that pass before each cycle.
        warmup: The number of batches that are traced and thrown away, because the first ones pay for the tracing's start.
        active: The number of batches that are recorded.
        repeat: The number of cycles. Each has its own trace; the table shows the last.
        record_shapes: Whether operators are recorded with the shapes of their inputs.
        profile_memory: Whether allocations and deallocations of memory are recorded.
        with_stack: Whether operators are recorded with the lines of source, and the modules, that called them.
        with_flops: Whether the operations of matrix products and convolutions are estimated.
        activities: The ``torch.profiler.ProfilerActivity`` to record; None for the CPU and whatever device there is.
        sort_by: The column that the table is sorted by, such as ``"cpu_time_total"`` or ``"self_cuda_memory_usage"``; None
            for the device's self time if there is a device, and for the CPU's otherwise.
        row_limit: The largest number of rows in the table.
        print_summary: Whether the table is printed when the run is over.

    Attributes:
        traces: The files of the current run, or of the last one.

    Raises:
        MisconfigurationError: If a number is too small. When a run begins: if another torch profiler is active, or if the
            directory cannot be written to.

    Example:
        >>> from eventtrain import Trainer
        >>> from eventtrain.callbacks import TorchProfiler
        >>> trainer = Trainer(max_epochs=1, callbacks=[TorchProfiler("profiles", wait=10, active=4)])
        >>> trainer.callback(TorchProfiler).traces
        []
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
        self.dirpath = None if dirpath is None else check_path(dirpath, "TorchProfiler", "dirpath")
        self.wait = check_whole_number(wait, "TorchProfiler", "wait")
        self.warmup = check_whole_number(warmup, "TorchProfiler", "warmup")
        self.active = check_whole_number(active, "TorchProfiler", "active", least=1)
        self.repeat = check_whole_number(repeat, "TorchProfiler", "repeat", least=1)
        self.options = {
            "record_shapes": record_shapes,
            "profile_memory": profile_memory,
            "with_stack": with_stack,
            "with_flops": with_flops,
            "activities": activities,
        }
        self.sort_by = sort_by
        self.row_limit = check_whole_number(row_limit, "TorchProfiler", "row_limit", least=1)
        self.print_summary = print_summary
        self.traces: list[AnyPath] = []
        self._trainer: Trainer | None = None
        self._begin_run()

    def _begin_run(self) -> None:
        self.traces = []
        self._averages: Any = None  # torch's rows of the last cycle's table
        self._recorded = 0  # batches of the last cycle
        self._cycle = Cycle(self.wait, self.warmup, self.active)
        self._cycles = 0
        self._batches = 0  # in this part of the current cycle
        self._profile: Any = None
        self._ranges: Ranges | None = None
        self._counting: Callable[..., None] | None = None  # the handler that counts the batches of the current run
        self._complete = False

    # ------------------------------------------------------------------ the stages of a run

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        self._begin_run()
        self._trainer = trainer

    def on_train_start(self, trainer: Trainer, event: TrainStart) -> None:
        batches = trainer.num_training_batches
        whole = None if batches is None or trainer.max_epochs is None else batches * trainer.max_epochs
        if trainer.max_steps is not None:  # an update takes at least a batch
            whole = trainer.max_steps if whole is None else min(whole, trainer.max_steps)
        self._begin(trainer, self.on_safe_point, whole)

    def on_validation_start(self, trainer: Trainer, event: ValidationStart) -> None:
        if trainer.stage != "fit":
            self._begin(trainer, self.on_validation_batch_end, trainer.num_evaluation_batches)

    def on_test_start(self, trainer: Trainer, event: TestStart) -> None:
        self._begin(trainer, self.on_test_batch_end, trainer.num_evaluation_batches)

    def on_predict_start(self, trainer: Trainer, event: PredictStart) -> None:
        self._begin(trainer, self.on_predict_batch_end, trainer.num_evaluation_batches)

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
            show(trainer, self.summary(), "TorchProfiler")

    def _begin(self, trainer: Trainer, counting: Callable[..., None], whole: int | None) -> None:
        if not trainer.is_global_zero:
            return
        if not trainer.fast_dev_run:
            make_directory(self._directory(trainer))
        self._counting = counting
        self._cycle = Cycle(self.wait, self.warmup, self.active).within(whole)
        self._begin_cycle(trainer)

    # ------------------------------------------------------------------ batches that wait

    @on_demand
    def on_safe_point(self, trainer: Trainer, event: SafePoint) -> None:
        self._count_waiting(trainer)

    @on_demand
    def on_validation_batch_end(self, trainer: Trainer, event: ValidationBatchEnd) -> None:
        self._count_waiting(trainer)

    @on_demand
    def on_test_batch_end(self, trainer: Trainer, event: TestBatchEnd) -> None:
        self._count_waiting(trainer)

    @on_demand
    def on_predict_batch_end(self, trainer: Trainer, event: PredictBatchEnd) -> None:
        self._count_waiting(trainer)

    def _begin_cycle(self, trainer: Trainer) -> None:
        assert self._counting is not None
        self._batches = 0
        if self._cycle.wait:
            trainer.listen(self._counting)
        else:
            self._start(trainer)

    def _count_waiting(self, trainer: Trainer) -> None:
        assert self._counting is not None
        self._batches += 1
        if self._batches == self._cycle.wait:
            trainer.stop_listening(self._counting)
            self._start(trainer)

    # ------------------------------------------------------------------ batches that are traced

    def _start(self, trainer: Trainer) -> None:
        from torch.profiler import profile

        if _torch.is_profiling():
            raise MisconfigurationError(
                "TorchProfiler cannot begin: another torch profiler is active in this thread, and there can be only one. End "
                "it before this run, or leave TorchProfiler out."
            )
        self._profile = profile(schedule=self._cycle.action, on_trace_ready=self._save_trace, **self.options)
        self._profile.__enter__()
        self._batches = 0
        self._ranges = Ranges()
        if trainer.stage == "fit":
            self._ranges.call_after_batches(self._count_traced)
        else:
            stage = "validation" if trainer.stage == "validate" else trainer.stage
            self._ranges.after[f"{stage}_batch_end"] = self._count_traced
        trainer.signals.observe(self._ranges)

    def _count_traced(self, event: Event) -> None:
        """Count a batch that was traced, after all listeners of its last event."""
        self._batches += 1
        if self._batches < self._cycle.warmup + self._cycle.active:
            self._profile.step()
            return
        self._stop()
        self._cycles += 1
        if self._cycles < self.repeat:
            assert self._trainer is not None
            self._begin_cycle(self._trainer)

    def _stop(self) -> None:
        """Stop tracing, if it is on. The batches that were recorded become a trace."""
        profile, ranges, self._profile, self._ranges = self._profile, self._ranges, None, None
        if ranges is not None:
            assert self._trainer is not None
            self._trainer.signals.unobserve(ranges)
            ranges.leave()
        if profile is not None:
            profile.__exit__(None, None, None)

    def _end(self) -> None:
        """End the current cycle, because no batch follows."""
        if self._trainer is not None and self._counting is not None:
            self._trainer.stop_listening(self._counting)
            self._stop()

    # ------------------------------------------------------------------ the results

    def _save_trace(self, profile: Any) -> None:
        """Write a cycle's trace. The profiler calls this when the trace is ready."""
        assert self._trainer is not None
        self._averages = profile.key_averages()
        self._recorded = min(self._batches - self._cycle.warmup, self._cycle.active)
        if not self._trainer.fast_dev_run:
            # The form of name that TensorBoard's plugin looks for: who, when, and this suffix.
            trace = self._directory(self._trainer) / f"{self._trainer.stage}.{time.time_ns()}.pt.trace.json"
            with storage.writing(trace) as file:
                profile.export_chrome_trace(file.name)
            self.traces.append(trace)

    def _directory(self, trainer: Trainer) -> AnyPath:
        if self.dirpath is not None:
            return trainer.root / self.dirpath
        directories = (getattr(callback, "run_dir", None) for callback in trainer.callbacks)
        run_dir = next((directory for directory in directories if directory is not None), None)
        return trainer.root / ("profiles" if run_dir is None else check_path(run_dir, "TorchProfiler", "dirpath"))

    def summary(self, sort_by: str | None = None, row_limit: int | None = None) -> str:
        """Return the operators that took the most time in the last cycle of the current run, or of the last one.

        Args:
            sort_by: The column to sort by. If None, the one that was given to the class.
            row_limit: The largest number of rows. If None, the one that was given to the class.

        Returns:
            The table, with the number of batches and the traces; a sentence if nothing was recorded.
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
    """Divides batches into those to pass, those to warm up the tracing, and those to record.

    Args:
        wait: The number of batches that pass.
        warmup: The number of batches that are traced and thrown away.
        active: The number of batches that are recorded.
    """

    def __init__(self, wait: int, warmup: int, active: int) -> None:
        self.wait = wait
        self.warmup = warmup
        self.active = active

    def within(self, batches: int | None) -> Cycle:
        """Return the cycle for a run of a given length. If it is too long, the wait is shortened first, then the warm-up, and
        then the recording.

        Args:
            batches: The number of batches of the run; None if it is unknown, which leaves the cycle as it is.
        """
        if batches is None:
            return self
        active = max(1, min(self.active, batches - min(self.warmup, 1)))
        warmup = max(0, min(self.warmup, batches - active))
        return Cycle(max(0, min(self.wait, batches - active - warmup)), warmup, active)

    def action(self, step: int) -> ProfilerAction:
        """Return the action of torch's profiler in a batch.

        Args:
            step: The index of the batch, counted from the end of the wait.
        """
        from torch.profiler import ProfilerAction

        if step < self.warmup:
            return ProfilerAction.WARMUP
        last = self.warmup + self.active - 1
        return ProfilerAction.RECORD if step < last else ProfilerAction.RECORD_AND_SAVE


VALIDATION = Label("phase", "validation")


class Ranges(Spans):
    """Turns phases and listeners' calls into named ranges of torch's profiler."""

    opens: Mapping[str, Label] = {**Spans.opens, "validation_start": VALIDATION}
    closes: Mapping[str, Label] = {**Spans.closes, "validation_end": VALIDATION}

    def begin(self, key: Any, label: Label) -> Span:
        """Begin a range."""
        span = super().begin(key, label)
        name = f"callback/{label.name}" if label.kind == "callback" else label.name
        span.range = torch.profiler.record_function(f"eventtrain/{name}")
        span.range.__enter__()
        return span

    def closed(self, span: Span) -> None:
        """End the range of a span."""
        span.range.__exit__(None, None, None)

    def dropped(self, span: Span, around: Span) -> None:
        """End the range of a span whose end never came."""
        self.closed(span)

    def leave(self) -> None:
        """End all open ranges: an error has left them, or the tracing ends within them."""
        while self.open:
            self.closed(self.open.pop())


def make_directory(directory: AnyPath) -> None:
    """Make the directory of the traces.

    Args:
        directory: The directory.

    Raises:
        MisconfigurationError: If it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MisconfigurationError(
            f"TorchProfiler cannot write to {directory}: {error.strerror or error}. Give a dirpath that can be written to."
        ) from error
