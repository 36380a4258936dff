"""Progress in the terminal, a notebook, or a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from eventtrain.callback import Callback
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
    what was logged with ``prog_bar=True``. Where the output is no terminal, a line now and then instead.

    Attached by default. Counts batches at ``safe_point`` and draws at a cadence rather than per batch, because drawing
    reads the loss from its device: it connects to ``train_batch_end``, which carries the loss, for the batches that
    are drawn alone. Evaluations are counted at their batches' ends. Override :meth:`metrics` to show other values.

    Args:
        interval: Seconds between two redraws of a bar.
        line_interval: Seconds between two lines where the output is no terminal.
        leave: Whether the bar of a finished epoch stays on the screen.
    """

    role = "progress_bar"

    def __init__(self, *, interval: float = 0.1, line_interval: float = 10.0, leave: bool = True) -> None:
        self.interval = interval
        self.line_interval = line_interval
        self.leave = leave
        self._shown: dict[str, Bar | Lines] = {}
        self._loss: Any = None
        self._pending = 0  # batches trained and not yet shown
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
        """Prints above the bar."""
        from tqdm import tqdm

        if kwargs:
            with tqdm.external_write_mode(file=kwargs.get("file")):
                print(*args, **kwargs)
        else:
            tqdm.write(" ".join(map(str, args)))

    # ------------------------------------------------------------------ training

    def on_train_epoch_start(self, trainer: Trainer, event: TrainEpochStart) -> None:
        of = f"/{trainer.max_epochs}" if trainer.max_epochs is not None else ""
        shown = self._open(trainer, "train", f"epoch {event.epoch + 1}{of}", trainer.num_training_batches, self.leave)
        self._pending = 0
        self._before = time.monotonic()
        self._next = self._before + (self.line_interval if isinstance(shown, Lines) else 0.0)
        if self._next <= self._before:
            self._draw_next(trainer)

    def on_safe_point(self, trainer: Trainer, event: SafePoint) -> None:
        self._pending += 1
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
        """Connected to ``train_batch_end`` for one batch, where it is time to draw."""
        trainer.signals.train_batch_end.disconnect(self.draw)
        self._pending += 1
        self._show(trainer, event.loss)
        self._pending = -1  # the batch at hand, which its safe point counts
        self._next = time.monotonic() + (self.line_interval if isinstance(self._shown.get("train"), Lines) else self.interval)

    def on_train_data_end(self, trainer: Trainer, event: TrainDataEnd) -> None:
        loss = trainer.batch.loss
        self._loss = None if loss is None else loss.detach()

    def on_train_end(self, trainer: Trainer, event: TrainEnd) -> None:
        self._finish(trainer)  # of an epoch that the run ended inside of

    def _show(self, trainer: Trainer, loss: Any) -> None:
        shown = self._shown.get("train")
        self._loss = loss
        if shown is not None:
            shown.update(self._pending, self.metrics(trainer, loss))
        self._pending = 0

    def _finish(self, trainer: Trainer) -> None:
        if "train" in self._shown:
            self._show(trainer, self._loss)
        self._close("train")

    # ------------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self, trainer: Trainer, event: ValidationEpochStart) -> None:
        if not trainer.sanity_checking:
            self._open(trainer, "validation", "validation", trainer.num_evaluation_batches, trainer.stage != "fit")

    def on_validation_batch_end(self, trainer: Trainer, event: ValidationBatchEnd) -> None:
        self._advance("validation")

    def on_validation_end(self, trainer: Trainer, event: ValidationEnd) -> None:
        self._close("validation")

    def on_test_epoch_start(self, trainer: Trainer, event: TestEpochStart) -> None:
        self._open(trainer, "test", "test", trainer.num_evaluation_batches, True)

    def on_test_batch_end(self, trainer: Trainer, event: TestBatchEnd) -> None:
        self._advance("test")

    def on_test_end(self, trainer: Trainer, event: TestEnd) -> None:
        self._close("test")

    def on_predict_epoch_start(self, trainer: Trainer, event: PredictEpochStart) -> None:
        self._open(trainer, "predict", "predict", trainer.num_evaluation_batches, True)

    def on_predict_batch_end(self, trainer: Trainer, event: PredictBatchEnd) -> None:
        self._advance("predict")

    def on_predict_end(self, trainer: Trainer, event: PredictEnd) -> None:
        self._close("predict")

    def _advance(self, stage: str) -> None:
        if stage in self._shown:
            self._shown[stage].advance()

    # ------------------------------------------------------------------ ends

    def on_exception(self, trainer: Trainer, event: ExceptionRaised) -> None:
        self._close_all()  # so that the traceback begins on a line of its own

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        trainer.signals.train_batch_end.disconnect(self.draw)
        self._close_all()

    def _open(self, trainer: Trainer, stage: str, title: str, total: int | None, leave: bool) -> Bar | Lines | None:
        self._close(stage)
        if not trainer.is_global_zero:
            return None
        if sys.stderr.isatty() or in_notebook():
            self._shown[stage] = Bar(title, total, leave=leave, place=len(self._shown), interval=self.interval)
        else:
            # Training draws at its own cadence; an evaluation, which has no loss to wait for, at that of its lines.
            self._shown[stage] = Lines(title, total, self.line_interval, final=stage != "validation" or trainer.stage != "fit")
        return self._shown[stage]

    def _close(self, stage: str) -> None:
        shown = self._shown.pop(stage, None)
        if shown is not None:
            shown.close()

    def _close_all(self) -> None:
        for stage in list(self._shown):
            self._close(stage)


class Bar:
    """One pass over data as a tqdm bar.

    Args:
        title: What stands before it.
        total: Its length in batches; None where that is unknown.
        leave: Whether it stays on the screen.
        place: How many bars stand above it.
        interval: Seconds between two redraws.
    """

    def __init__(self, title: str, total: int | None, *, leave: bool, place: int, interval: float) -> None:
        from tqdm.auto import tqdm  # when used: importing it takes longer than the rest of the package

        self._bar = tqdm(total=total, desc=title, leave=leave, position=place, mininterval=interval, dynamic_ncols=True)

    def update(self, batches: int, values: Mapping[str, float]) -> None:
        """Draws, with so many more batches and these values."""
        self._bar.set_postfix(format_metrics(values), refresh=False)
        if not self._bar.update(batches):  # it draws by itself where it is time
            self._bar.refresh()

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
    """

    def __init__(self, title: str, total: int | None, interval: float, *, final: bool = False) -> None:
        self.title = title
        self.of = f"/{total}" if total is not None else ""
        self.interval = interval
        self._done = self._printed = 0
        self._final = final
        self._began = time.monotonic()
        self._next = self._began + interval

    def update(self, batches: int, values: Mapping[str, float]) -> None:
        """Prints a line, with so many more batches and these values."""
        self._done += batches
        self._print(values)

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
        rate = self._done / max(now - self._began, 1e-9)
        parts = [f"{self.title}: {self._done}{self.of} batches", f"{rate:.1f} it/s"]
        parts += [f"{name}={value}" for name, value in format_metrics(values).items()]
        print(", ".join(parts), file=sys.stderr, flush=True)


def format_metrics(metrics: Mapping[str, float]) -> dict[str, str]:
    """Numbers with four significant digits."""
    return {name: f"{value:.4g}" for name, value in metrics.items()}


def in_notebook() -> bool:
    """Whether the output goes to a Jupyter notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"
