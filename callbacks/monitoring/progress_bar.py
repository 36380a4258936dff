"""Show progress in a terminal, in a notebook, or in a log file."""

from __future__ import annotations

import errno
import math
import os
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from typing import Any

from eventtrain.callback import Callback, on_demand
from eventtrain.callbacks.terminal import BROKEN, warn_of_silence
from eventtrain.checks import check_number
from eventtrain.errors import printable
from eventtrain.events import (
    ExceptionRaised,
    PredictBatchEnd,
    PredictEnd,
    PredictEpochStart,
    SafePoint,
    Teardown,
    TestBatchEnd,
    TestEnd,
    TestEpochStart,
    TrainBatchEnd,
    TrainDataEnd,
    TrainEnd,
    TrainEpochStart,
    ValidationBatchEnd,
    ValidationEnd,
    ValidationEpochStart,
)
from eventtrain.trainer import Trainer


class ProgressBar(Callback):
    """Show how far the run is: a tqdm bar for each epoch, one below it for validation, with throughput, the loss and the
    metrics that were logged with ``prog_bar=True``.

    If the output is neither a terminal nor a notebook with ipywidgets, prints a line now and then instead of a bar. The time
    and the throughput of an epoch are those of its training, without validation. Attached by default.

    Draws at a cadence and not for each batch, because drawing reads the loss from its device. Looks at the clock at
    ``safe_point``, and wakes its listener of ``train_batch_end``, which carries the loss, only for the batches that are to
    be drawn and for the last one of the epoch (``train_data_end``). Counts evaluations at ``validation_batch_end``,
    ``test_batch_end`` and ``predict_batch_end``. Bars open at the start of each epoch of training or evaluation
    (``train_epoch_start``, ``validation_epoch_start``, ...) and close at its end (``safe_point``, ``train_end``,
    ``validation_end``, ``test_end``, ``predict_end``), or at ``exception`` and ``teardown``. Emits no metrics. Override
    :meth:`metrics` to show other values. If the output breaks, such as a pipe whose reader has left or a full disk, there is
    one warning, and nothing more is shown in this run.

    Args:
        interval: Seconds between two redraws of a bar; 0 to draw each batch.
        line_interval: Seconds between two lines if there is no bar. The last line of an epoch is always printed.
        leave: Whether the bar of a finished epoch stays on the screen.

    Raises:
        MisconfigurationError: If an interval is negative or not a number.

    Example:
        >>> from eventtrain import Trainer
        >>> from eventtrain.callbacks import ProgressBar
        >>> class ShowLoss(ProgressBar):
        ...     def metrics(self, trainer, loss):
        ...         return {} if loss is None else {"loss": float(loss)}
        >>> trainer = Trainer(max_epochs=1, callbacks=[ShowLoss(line_interval=60)])
    """

    role = "progress_bar"

    def __init__(self, *, interval: float = 0.1, line_interval: float = 10.0, leave: bool = True) -> None:
        self.interval = check_number(interval, "ProgressBar", "interval", least=0, finite=False, unit="seconds")
        self.line_interval = check_number(line_interval, "ProgressBar", "line_interval", least=0, finite=False, unit="seconds")
        self.leave = leave
        self._shown: dict[str, Bar | Lines] = {}
        self._loss: Any = None  # of the last batch that was looked at
        self._draws = False  # the current batch is to be drawn if it is time then
        self._is_silent = False  # the output broke in this run
        self._next = self._before = 0.0

    def metrics(self, trainer: Trainer, loss: Any) -> dict[str, float]:
        """Return the values to show beside the bar: a policy to override.

        Args:
            trainer: The trainer.
            loss: The raw loss of the last batch; None if it had none.

        Returns:
            Numbers by name.
        """
        shown = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
        if loss is not None and "loss" not in shown:
            shown = {"loss": float(loss), **shown}
        return shown

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar, with the arguments of :func:`print`."""
        from tqdm import tqdm

        with ExitStack() as bars:
            with self._watching_output():
                bars.enter_context(tqdm.external_write_mode(file=kwargs.get("file")))
            print(*args, **kwargs)
            with self._watching_output():
                bars.close()  # draws the bars again

    # ------------------------------------------------------------------ training

    def on_train_epoch_start(self, trainer: Trainer, event: TrainEpochStart) -> None:
        title = f"epoch {event.epoch + 1}" + (f"/{trainer.max_epochs}" if trainer.max_epochs is not None else "")
        done = trainer.progress.batch_idx + 1  # more than 0 if a resumed run continues the epoch
        shown = self._open(trainer, "train", title, trainer.num_training_batches, leave=self.leave, done=done)
        self._before = time.monotonic()
        self._next = math.inf
        if shown is not None:
            self._next = self._before + (0.0 if isinstance(shown, Bar) else self.line_interval)
            self._draw_next(trainer)  # the first batch may take longer than the interval

    def on_safe_point(self, trainer: Trainer, event: SafePoint) -> None:
        if event.epoch_end:
            self._finish(trainer)
            return
        now = time.monotonic()
        if now + (now - self._before) >= self._next:  # another batch like this one, and it is time
            self._draw_next(trainer)
        self._before = now

    def _draw_next(self, trainer: Trainer) -> None:
        self._draws = True
        trainer.listen(self.on_train_batch_end)

    def on_train_data_end(self, trainer: Trainer, event: TrainDataEnd) -> None:
        if "train" in self._shown:
            trainer.listen(self.on_train_batch_end)  # to show the loss of the epoch's last batch at the epoch's end

    @on_demand
    def on_train_batch_end(self, trainer: Trainer, event: TrainBatchEnd) -> None:
        trainer.stop_listening(self.on_train_batch_end)
        self._loss = event.loss
        draws, self._draws = self._draws, False
        if draws and "train" in self._shown and time.monotonic() >= self._next:
            self._show(trainer)
            interval = self.interval if isinstance(self._shown.get("train"), Bar) else self.line_interval
            self._next = time.monotonic() + interval

    def on_train_end(self, trainer: Trainer, event: TrainEnd) -> None:
        self._finish(trainer)  # if the run ended in the middle of an epoch

    def _show(self, trainer: Trainer) -> None:
        # The epoch's length is known after its start, and may differ from the previous epoch's length.
        values, total = self.metrics(trainer, self._loss), trainer.num_training_batches
        with self._watching_output():
            self._shown["train"].update(trainer.progress.batch_idx + 1, values, total)

    def _finish(self, trainer: Trainer) -> None:
        if "train" in self._shown:
            self._show(trainer)
        self._close("train")

    # ------------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self, trainer: Trainer, event: ValidationEpochStart) -> None:
        if "train" in self._shown:
            with self._watching_output():
                self._shown["train"].pause(trainer.progress.batch_idx + 1)
        self._evaluate(trainer, "validation", "sanity check" if trainer.sanity_checking else "validation")

    def on_validation_batch_end(self, trainer: Trainer, event: ValidationBatchEnd) -> None:
        self._advance("validation")

    def on_validation_end(self, trainer: Trainer, event: ValidationEnd) -> None:
        self._close("validation")
        if "train" in self._shown:
            with self._watching_output():
                self._shown["train"].resume()

    def on_test_epoch_start(self, trainer: Trainer, event: TestEpochStart) -> None:
        self._evaluate(trainer, "test", "test")

    def on_test_batch_end(self, trainer: Trainer, event: TestBatchEnd) -> None:
        self._advance("test")

    def on_test_end(self, trainer: Trainer, event: TestEnd) -> None:
        self._close("test")

    def on_predict_epoch_start(self, trainer: Trainer, event: PredictEpochStart) -> None:
        self._evaluate(trainer, "predict", "predict")

    def on_predict_batch_end(self, trainer: Trainer, event: PredictBatchEnd) -> None:
        self._advance("predict")

    def on_predict_end(self, trainer: Trainer, event: PredictEnd) -> None:
        self._close("predict")

    def _evaluate(self, trainer: Trainer, stage: str, title: str) -> None:
        # The bar of an evaluation during a fit disappears at its end.
        self._open(trainer, stage, title, trainer.num_evaluation_batches, leave=trainer.stage != "fit")

    def _advance(self, stage: str) -> None:
        if stage in self._shown:
            try:
                self._shown[stage].advance()
            except BROKEN as error:
                self._fall_silent(error)

    # ------------------------------------------------------------------ opening and closing

    def on_exception(self, trainer: Trainer, event: ExceptionRaised) -> None:
        self._close_all()  # so that the traceback begins on a new line

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        self._close_all()
        self._loss, self._draws, self._is_silent = None, False, False

    def _open(
        self, trainer: Trainer, stage: str, title: str, total: int | None, *, leave: bool, done: int = 0
    ) -> Bar | Lines | None:
        self._close(stage)
        if not trainer.is_global_zero or sys.stderr is None or self._is_silent:  # a process without a console has no stderr
            return None
        with self._watching_output():
            if has_widgets() or sys.stderr.isatty():
                # Training draws when it is told to. An evaluation draws when it is time: it has no loss to wait for.
                interval = 0.0 if stage == "train" else self.interval
                self._shown[stage] = Bar(title, total, interval, leave=leave, done=done)
            else:
                self._shown[stage] = Lines(title, total, self.line_interval, final=leave or stage == "train", done=done)
        return self._shown.get(stage)

    def _close(self, stage: str) -> None:
        shown = self._shown.pop(stage, None)
        if shown is not None:
            with self._watching_output():
                shown.close()

    @contextmanager
    def _watching_output(self) -> Generator[None, None, None]:
        """Fall silent if the output breaks in the ``with`` block, in which no code of a user may run."""
        try:
            yield
        except BROKEN as error:
            self._fall_silent(error)

    def _fall_silent(self, error: Exception) -> None:
        """Let go of everything on the screen, with one warning."""
        left = list(self._shown.values())
        self._shown.clear()
        for shown in left:
            shown.abandon()
        if not self._is_silent:
            self._is_silent = True
            warn_of_silence("ProgressBar", error)

    def _close_all(self) -> None:
        # The lower bar first: it finds its line by its distance from the upper one.
        for stage in reversed(list(self._shown)):
            self._close(stage)


class Bar:
    """Show one pass over data as a tqdm bar, below the bars on the screen.

    Args:
        title: The text before it.
        total: The length of the pass in batches; None if it is unknown.
        interval: Seconds between two redraws.
        leave: Whether the bar stays on the screen.
        done: Batches of the pass that were trained earlier.
    """

    def __init__(self, title: str, total: int | None, interval: float, *, leave: bool, done: int = 0) -> None:
        # Without adaptive `miniters`: a run that becomes slower would wait too long for the next redraw.
        self._bar = bar_class()(
            total=total, desc=title, leave=leave, mininterval=interval, miniters=1, initial=done, dynamic_ncols=True
        )

    def update(self, done: int, values: Mapping[str, float], total: int | None) -> None:
        """Draw the bar.

        Args:
            done: The number of batches done.
            values: The numbers beside the bar.
            total: The length of the pass in batches; None if it is unknown.
        """
        self._bar.total = total
        self._bar.set_postfix(format_metrics(values), refresh=False)
        if not self._bar.update(done - self._bar.n):  # tqdm draws in `update` if the count has changed
            self._bar.refresh()
        self._check()

    def pause(self, done: int) -> None:
        """Draw the bar with the number of batches done, and stop its clock until :meth:`resume`."""
        self._bar.update(done - self._bar.n)

    def resume(self) -> None:
        """Start the clock again."""
        self._bar.unpause()

    def advance(self) -> None:
        """Count a batch, and draw if it is time."""
        if self._bar.update(1):
            self._check()

    def close(self) -> None:
        """Leave the bar as it is, or remove it."""
        self._bar.close()

    def abandon(self) -> None:
        """Forget the bar: the output is broken."""
        with suppress(*BROKEN):
            self._bar.close()

    def _check(self) -> None:
        """Raise an ``OSError`` if tqdm has noticed a terminal that is gone: it then draws nothing more, and says nothing."""
        if self._bar.miniters == math.inf:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


class Lines:
    """Show one pass over data as a line now and then, without control characters.

    Args:
        title: The text at the start of each line.
        total: The length of the pass in batches; None if it is unknown.
        interval: Seconds between two lines that :meth:`advance` prints.
        final: Whether the last line is printed even if the pass was short.
        done: Batches of the pass that were trained earlier.
    """

    def __init__(self, title: str, total: int | None, interval: float, *, final: bool = False, done: int = 0) -> None:
        self.title = title
        self.of = f"/{total}" if total is not None else ""
        self.interval = interval
        self._initial = self._done = self._printed = done
        self._final = final
        self._began = self._paused = time.monotonic()
        self._next = self._began + interval

    def update(self, done: int, values: Mapping[str, float], total: int | None) -> None:
        """Print a line.

        Args:
            done: The number of batches done.
            values: The numbers at the end of the line.
            total: The length of the pass in batches; None if it is unknown.
        """
        self.of = f"/{total}" if total is not None else ""
        self._done = done
        self._print(values)

    def pause(self, done: int) -> None:
        """Take note of the number of batches done, and stop the clock until :meth:`resume`."""
        self._done = done
        self._paused = time.monotonic()

    def resume(self) -> None:
        """Start the clock again."""
        self._began += time.monotonic() - self._paused

    def advance(self) -> None:
        """Count a batch, and print a line if it is time."""
        self._done += 1
        if time.monotonic() >= self._next:
            self._print({})

    def close(self) -> None:
        """Print the last line, if it is wanted and was not printed."""
        if self._final and self._printed < self._done:
            self._print({})

    def abandon(self) -> None:
        """Forget the lines: the output is broken."""

    def _print(self, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        self._next = now + self.interval
        self._printed = self._done
        rate = (self._done - self._initial) / max(now - self._began, 1e-9)
        parts = [f"{self.title}: {self._done}{self.of} batches", f"{rate:.1f} it/s"]
        parts += [f"{name}={value}" for name, value in format_metrics(values).items()]
        print(", ".join(parts), file=sys.stderr, flush=True)


def format_metrics(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return numbers as texts with four significant digits, under names that a terminal only shows."""
    return {printable(name): f"{value:.4g}" for name, value in metrics.items()}


@cache
def bar_class() -> Any:
    """Return the class of tqdm for the output, a notebook or a terminal."""
    from tqdm.auto import tqdm  # imported late, because it takes longer than the rest of the package

    # Without the thread that tqdm starts beside its first bar and never ends. It redraws bars with adaptive `miniters`.
    return type("tqdm", (tqdm,), {"monitor_interval": 0})


def has_widgets() -> bool:
    """Return whether the output goes to a Jupyter notebook that can show tqdm's bar, which needs ipywidgets."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell" and find_spec("ipywidgets") is not None
