"""Progress in the terminal, a notebook, or a log file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

from eventtrain.callback import Callback
from eventtrain.errors import MisconfigurationError
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
    """Shows how far the run is: a tqdm bar per epoch, one below it for validation, with throughput, the loss and
    what was logged with ``prog_bar=True``. Where the output is neither a terminal nor a notebook with ipywidgets, a
    line now and then instead. The time and throughput of an epoch are those of its training, without validation.

    Attached by default. Draws at a cadence rather than per batch, because drawing reads the loss from its device: it
    looks at the clock at ``safe_point``, and connects to ``train_batch_end``, which carries the loss, for the batches
    that are drawn alone. Evaluations are counted at their batches' ends. Override :meth:`metrics` to show other values.

    Args:
        interval: Seconds between two redraws of a bar; 0 for one per batch.
        line_interval: Seconds between two lines where there is no bar. An epoch's last line is always printed.
        leave: Whether the bar of a finished epoch stays on the screen.

    Raises:
        MisconfigurationError: An interval is negative or no number.
    """

    role = "progress_bar"

    def __init__(self, *, interval: float = 0.1, line_interval: float = 10.0, leave: bool = True) -> None:
        self.interval = check_seconds(interval, "interval")
        self.line_interval = check_seconds(line_interval, "line_interval")
        self.leave = leave
        self._shown: dict[str, Bar | Lines] = {}
        self._loss: Any = None  # of the last batch that was drawn, or of the epoch's last
        self._next = self._before = 0.0

    def metrics(self, trainer: Trainer, loss: Any) -> dict[str, float]:
        """The policy: what is shown beside the bar.

        Args:
            trainer: The trainer.
            loss: The raw loss of the last batch; None where it had none.
        """
        shown = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
        if loss is not None and "loss" not in shown:
            shown = {"loss": float(loss), **shown}
        return shown

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar, with the arguments of :func:`print`."""
        from tqdm import tqdm

        with tqdm.external_write_mode(file=kwargs.get("file")):
            print(*args, **kwargs)

    # ------------------------------------------------------------------ training

    def on_train_epoch_start(self, trainer: Trainer, event: TrainEpochStart) -> None:
        title = f"epoch {event.epoch + 1}" + (f"/{trainer.max_epochs}" if trainer.max_epochs is not None else "")
        done = trainer.progress.batch_idx + 1  # of an epoch that a resumed run goes on with; else 0
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
        trainer.signals.train_batch_end.connect(self.draw)

    def draw(self, trainer: Trainer, event: TrainBatchEnd) -> None:
        """Connected to ``train_batch_end`` for one batch, at whose end it is probably time to draw."""
        trainer.signals.train_batch_end.disconnect(self.draw)
        if time.monotonic() < self._next:
            return
        self._loss = event.loss
        self._show(trainer)
        self._next = time.monotonic() + (self.interval if isinstance(self._shown["train"], Bar) else self.line_interval)

    def on_train_data_end(self, trainer: Trainer, event: TrainDataEnd) -> None:
        loss = trainer.batch.loss
        self._loss = None if loss is None else loss.detach()

    def on_train_end(self, trainer: Trainer, event: TrainEnd) -> None:
        self._finish(trainer)  # of an epoch that the run ended inside of

    def _show(self, trainer: Trainer) -> None:
        self._shown["train"].update(trainer.progress.batch_idx + 1, self.metrics(trainer, self._loss))

    def _finish(self, trainer: Trainer) -> None:
        if "train" in self._shown:
            self._show(trainer)
        self._close("train")

    # ------------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self, trainer: Trainer, event: ValidationEpochStart) -> None:
        if "train" in self._shown:
            self._shown["train"].pause(trainer.progress.batch_idx + 1)
        self._evaluate(trainer, "validation", "sanity check" if trainer.sanity_checking else "validation")

    def on_validation_batch_end(self, trainer: Trainer, event: ValidationBatchEnd) -> None:
        self._advance("validation")

    def on_validation_end(self, trainer: Trainer, event: ValidationEnd) -> None:
        self._close("validation")
        if "train" in self._shown:
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
        # What is shown of an evaluation inside of a fit is gone when it is over.
        self._open(trainer, stage, title, trainer.num_evaluation_batches, leave=trainer.stage != "fit")

    def _advance(self, stage: str) -> None:
        if stage in self._shown:
            self._shown[stage].advance()

    # ------------------------------------------------------------------ opening and closing

    def on_exception(self, trainer: Trainer, event: ExceptionRaised) -> None:
        self._close_all()  # so that the traceback begins on a line of its own

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        trainer.signals.train_batch_end.disconnect(self.draw)
        self._close_all()
        self._loss = None

    def _open(
        self, trainer: Trainer, stage: str, title: str, total: int | None, *, leave: bool, done: int = 0
    ) -> Bar | Lines | None:
        self._close(stage)
        if not trainer.is_global_zero or sys.stderr is None:  # a process without a console has none
            return None
        if has_widgets() or sys.stderr.isatty():
            # Training draws when it is told to; an evaluation, which has no loss to wait for, when it is time.
            interval = 0.0 if stage == "train" else self.interval
            self._shown[stage] = Bar(title, total, interval, leave=leave, done=done)
        else:
            self._shown[stage] = Lines(title, total, self.line_interval, final=leave or stage == "train", done=done)
        return self._shown[stage]

    def _close(self, stage: str) -> None:
        shown = self._shown.pop(stage, None)
        if shown is not None:
            shown.close()

    def _close_all(self) -> None:
        for stage in reversed(list(self._shown)):  # the lower bar first: it finds its line by its distance from the upper
            self._close(stage)


class Bar:
    """One pass over data as a tqdm bar, below those that are there already.

    Args:
        title: What stands before it.
        total: Its length in batches; None where that is unknown.
        interval: Seconds between two redraws.
        leave: Whether it stays on the screen.
        done: Batches of the pass that came before.
    """

    def __init__(self, title: str, total: int | None, interval: float, *, leave: bool, done: int = 0) -> None:
        # No adaptive `miniters`, which a run that becomes slower would wait for.
        self._bar = bar_class()(
            total=total, desc=title, leave=leave, mininterval=interval, miniters=1, initial=done, dynamic_ncols=True
        )

    def update(self, done: int, values: Mapping[str, float]) -> None:
        """Draws, with so many batches done and these values."""
        self._bar.set_postfix(format_metrics(values), refresh=False)
        if not self._bar.update(done - self._bar.n):  # it draws by itself where there is something new
            self._bar.refresh()

    def pause(self, done: int) -> None:
        """Draws, with so many batches done; the time from here to :meth:`resume` does not count."""
        self._bar.update(done - self._bar.n)

    def resume(self) -> None:
        """Lets the clock go on."""
        self._bar.unpause()

    def advance(self) -> None:
        """Counts a batch; draws where it is time."""
        self._bar.update(1)

    def close(self) -> None:
        """Leaves the bar as it is, or removes it."""
        self._bar.close()


class Lines:
    """One pass over data as a line now and then, without control characters.

    Args:
        title: What each begins with.
        total: The pass's length in batches; None where that is unknown.
        interval: Seconds between two lines that :meth:`advance` prints.
        final: Whether the last line of such a pass is printed however short it was.
        done: Batches of the pass that came before.
    """

    def __init__(self, title: str, total: int | None, interval: float, *, final: bool = False, done: int = 0) -> None:
        self.title = title
        self.of = f"/{total}" if total is not None else ""
        self.interval = interval
        self._initial = self._done = self._printed = done
        self._final = final
        self._began = self._paused = time.monotonic()
        self._next = self._began + interval

    def update(self, done: int, values: Mapping[str, float]) -> None:
        """Prints a line, with so many batches done and these values."""
        self._done = done
        self._print(values)

    def pause(self, done: int) -> None:
        """Takes note that so many batches are done; the time from here to :meth:`resume` does not count."""
        self._done = done
        self._paused = time.monotonic()

    def resume(self) -> None:
        """Lets the clock go on."""
        self._began += time.monotonic() - self._paused

    def advance(self) -> None:
        """Counts a batch; prints where it is time."""
        self._done += 1
        if time.monotonic() >= self._next:
            self._print({})

    def close(self) -> None:
        """Prints the last line, if it is wanted and was not printed."""
        if self._final and self._printed < self._done:
            self._print({})

    def _print(self, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        self._next = now + self.interval
        self._printed = self._done
        rate = (self._done - self._initial) / max(now - self._began, 1e-9)
        parts = [f"{self.title}: {self._done}{self.of} batches", f"{rate:.1f} it/s"]
        parts += [f"{name}={value}" for name, value in format_metrics(values).items()]
        print(", ".join(parts), file=sys.stderr, flush=True)


def check_seconds(value: Any, named: str) -> float:
    """Refuses what is no interval.

    Raises:
        MisconfigurationError: It is no number from 0.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise MisconfigurationError(f"ProgressBar({named}={value!r}): it has to be a number of seconds, 0 or more.")
    return float(value)


def format_metrics(metrics: Mapping[str, float]) -> dict[str, str]:
    """Numbers with four significant digits."""
    return {name: f"{value:.4g}" for name, value in metrics.items()}


@cache
def bar_class() -> Any:
    """The bar of tqdm that fits where the output goes: to a notebook or to a terminal."""
    from tqdm.auto import tqdm  # when used: importing it takes longer than the rest of the package

    # Without the thread that tqdm starts beside its first bar, and never ends, to redraw bars with adaptive `miniters`.
    return type("tqdm", (tqdm,), {"monitor_interval": 0})


def has_widgets() -> bool:
    """Whether the output goes to a Jupyter notebook that can show tqdm's bar; it needs ipywidgets."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell" and find_spec("ipywidgets") is not None
