"""Progress in the terminal, a notebook, or a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

from eventtrain.callback import Callback
from eventtrain.events import (
    ExceptionRaised,
    MetricsLogged,
    Teardown,
    TestBatchEnd,
    TestEpochStart,
    TrainBatchEnd,
    TrainEpochEnd,
    TrainEpochStart,
    TrainStart,
    ValidationBatchEnd,
    ValidationEnd,
    ValidationEpochStart,
)
from eventtrain.trainer import Trainer


class ProgressBar(Callback):
    """Shows how far the run is: a tqdm bar per epoch, one below it for validation, with throughput, the loss and
    what was logged with ``prog_bar=True``. Where the output is no terminal, a line now and then instead.

    Attached by default. Listens to the starts and ends of epochs and batches, and redraws at a cadence rather than per
    batch, because a redraw reads the loss from its device. Override :meth:`metrics` to show other values.

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
        self._bars: dict[str, Any] = {}
        self._loss: Any = None
        self._pending = 0
        self._done = 0
        self._next = 0.0
        self._began = 0.0
        self._plain = False

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

    def on_train_start(self, trainer: Trainer, event: TrainStart) -> None:
        self._plain = not (sys.stderr.isatty() or in_notebook())

    def on_train_epoch_start(self, trainer: Trainer, event: TrainEpochStart) -> None:
        of = f"/{trainer.max_epochs}" if trainer.max_epochs is not None else ""
        self._open(trainer, "train", f"epoch {event.epoch + 1}{of}", trainer.num_training_batches, self.leave)
        self._pending = self._done = 0
        self._began = time.monotonic()
        self._next = self._began + (self.line_interval if self._plain else 0.0)

    def on_train_batch_end(self, trainer: Trainer, event: TrainBatchEnd) -> None:
        self._pending += 1
        self._loss = event.loss
        now = time.monotonic()
        if now >= self._next:
            self._show(trainer)
            self._next = now + (self.line_interval if self._plain else self.interval)

    def on_train_epoch_end(self, trainer: Trainer, event: TrainEpochEnd) -> None:
        self._close("validation")

    def on_metrics_logged(self, trainer: Trainer, event: MetricsLogged) -> None:
        if event.stage == "train" and event.scope == "epoch":
            self._show(trainer, final=True)
            self._close("train")

    def _show(self, trainer: Trainer, *, final: bool = False) -> None:
        bar = self._bars.get("train")
        self._done += self._pending
        if bar is not None:
            bar.set_postfix(format_metrics(self.metrics(trainer, self._loss)), refresh=False)
            bar.update(self._pending)
            if final:
                bar.refresh()
        elif self._plain and trainer.is_global_zero:
            self._line(trainer)
        self._pending = 0

    def _line(self, trainer: Trainer) -> None:
        """One line for a log file: no control characters."""
        of = f"/{trainer.max_epochs}" if trainer.max_epochs is not None else ""
        total = f"/{trainer.num_training_batches}" if trainer.num_training_batches is not None else ""
        rate = self._done / max(time.monotonic() - self._began, 1e-9)
        values = ", ".join(f"{name}={value}" for name, value in format_metrics(self.metrics(trainer, self._loss)).items())
        epoch = f"epoch {trainer.current_epoch + 1}{of}"
        print(f"{epoch}: {self._done}{total} batches, {rate:.1f} it/s, {values}".rstrip(", "), file=sys.stderr, flush=True)

    # ------------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self, trainer: Trainer, event: ValidationEpochStart) -> None:
        if not trainer.sanity_checking:
            self._open(trainer, "validation", "validation", trainer.num_evaluation_batches, False)

    def on_validation_batch_end(self, trainer: Trainer, event: ValidationBatchEnd) -> None:
        self._advance("validation")

    def on_validation_end(self, trainer: Trainer, event: ValidationEnd) -> None:
        self._close("validation")

    def on_test_epoch_start(self, trainer: Trainer, event: TestEpochStart) -> None:
        self._open(trainer, "test", "test", trainer.num_evaluation_batches, True)

    def on_test_batch_end(self, trainer: Trainer, event: TestBatchEnd) -> None:
        self._advance("test")

    def _advance(self, stage: str) -> None:
        if stage in self._bars:
            self._bars[stage].update(1)

    # ------------------------------------------------------------------ ends

    def on_exception(self, trainer: Trainer, event: ExceptionRaised) -> None:
        self._close_all()  # so that the traceback begins on a line of its own

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        self._close_all()

    def _open(self, trainer: Trainer, stage: str, title: str, total: int | None, leave: bool) -> None:
        self._close(stage)
        if not trainer.is_global_zero or not (sys.stderr.isatty() or in_notebook()):
            return
        from tqdm.auto import tqdm  # when used: importing it takes longer than the rest of the package

        place = len(self._bars)
        bar = tqdm(total=total, desc=title, leave=leave, position=place, mininterval=self.interval, dynamic_ncols=True)
        self._bars[stage] = bar

    def _close(self, stage: str) -> None:
        bar = self._bars.pop(stage, None)
        if bar is not None:
            bar.close()

    def _close_all(self) -> None:
        for stage in list(self._bars):
            self._close(stage)


def format_metrics(metrics: dict[str, float]) -> dict[str, str]:
    """Numbers with four significant digits."""
    return {name: f"{value:.4g}" for name, value in metrics.items()}


def in_notebook() -> bool:
    """Whether the output goes to a Jupyter notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"
