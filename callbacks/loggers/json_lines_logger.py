"""Write logged values as lines of JSON."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from eventtrain.callback import Callback
from eventtrain.callbacks.loggers.run_files import RunFile, new_file, portable, refusing_bad_places
from eventtrain.checks import check_whole_number
from eventtrain.events import FitStart, MetricsLogged, Setup, Teardown
from eventtrain.paths import AnyPath, check_path
from eventtrain.trainer import Trainer


class JSONLinesLogger(Callback):
    """Write metrics to a new file for each run, one JSON object per line: for ``tail -f``, ``jq``, and
    ``pandas.read_json(path, lines=True)``.

    Listens to ``metrics_logged``, ``setup``, ``fit_start`` and ``teardown``. A line holds ``time`` (seconds since 1970),
    ``stage``, ``scope``, ``step`` and ``epoch``, then each value under its name. A value whose name is one of these five is
    written as ``logged/<name>``. For values that a validation or test logs on step, which are all written, ``step`` is the
    count of evaluation batches. JSON has no numbers that are not finite: they are the strings ``"nan"``, ``"inf"`` and
    ``"-inf"``, which ``float`` accepts. A line is written as a whole, so that a reader never sees half of one. Override
    :meth:`is_due` for another cadence.

    A run that resumes a checkpoint continues in the file of the checkpoint's run if it still exists, and cuts off everything
    that was written after the checkpoint, so that each step is there once. A file that cannot be written to is an error
    before training. If it vanishes or the disk fills up later, there is one warning, and the run continues without the
    logger.

    Args:
        path: The file; relative to the trainer's ``default_root_dir``. If it exists, the run's file is
            ``<stem>-<n><suffix>``, with the first free number.
        log_every_n_steps: Updates between two lines of values that training logged on step.

    Attributes:
        run_path: The file of the current run, or of the last one. It is None before the first ``fit_start``, in a
            ``fast_dev_run``, and on other ranks than zero, because they write no file.

    Raises:
        MisconfigurationError: If the cadence is below 1; at ``fit_start``, if the file cannot be written to.

    Example:
        >>> from eventtrain import Trainer
        >>> from eventtrain.callbacks import JSONLinesLogger
        >>> class PowersOfTwo(JSONLinesLogger):
        ...     def is_due(self, global_step):
        ...         return global_step.bit_count() == 1
        >>> trainer = Trainer(max_epochs=1, callbacks=[PowersOfTwo("metrics.jsonl")])
    """

    def __init__(self, path: str | os.PathLike[str] = "metrics.jsonl", *, log_every_n_steps: int = 50) -> None:
        self.path = check_path(path, "JSONLinesLogger", "path")
        self.log_every_n_steps = check_whole_number(log_every_n_steps, "JSONLinesLogger", "log_every_n_steps", least=1)
        self.run_path: AnyPath | None = None
        self._position = 0  # the length in bytes of this run's part of the file at run_path
        self._root: AnyPath = Path(".")
        self._file: RunFile | None = None

    def is_due(self, global_step: int) -> bool:
        """Decide whether values that were logged on step are written: a policy to override.

        Args:
            global_step: The count of updates, including the current one.

        Returns:
            True if they are written.
        """
        return global_step % self.log_every_n_steps == 0

    @property
    def state_key(self) -> str:
        return f"JSONLinesLogger({self.path})"

    # ------------------------------------------------------------------ events

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        self._root = trainer.root
        if event.stage == "fit":
            self.run_path, self._position = None, 0  # a checkpoint may bring other ones before fit_start
        elif event.stage != "predict":
            self._open(trainer)  # an evaluation after a fit continues in the fit's file

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        self._open(trainer)

    def on_metrics_logged(self, trainer: Trainer, event: MetricsLogged) -> None:
        if event.scope == "step" and event.stage == "train" and not self.is_due(event.step):
            return
        if self._file is None or not event.metrics:
            return
        record: dict[str, Any] = {"time": time.time(), "stage": event.stage, "scope": event.scope, "step": event.step}
        record["epoch"] = trainer.current_epoch
        record |= {f"logged/{name}" if name in record else name: number(value) for name, value in event.metrics.items()}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush(now=False)
        self._position = self._file.position

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            with refusing_bad_places("JSONLinesLogger", "path"):
                self.run_path = self.run_path or new_file(trainer.root / self.path)
                self._file = RunFile(self.run_path, "JSONLinesLogger", self._position)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        if self._file is not None:
            self._file.flush()  # a run that resumes here does not write these lines again
        return {"path": portable(self.run_path, self._root), "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        path = state["path"] and self._root / check_path(state["path"], "JSONLinesLogger", "path")
        if path and path.is_file():
            self.run_path, self._position = path, state["position"]


def number(value: Any) -> float | str:
    """Return a number or scalar tensor as a number for JSON, or as its name if it is not finite."""
    value = float(value)
    return value if math.isfinite(value) else str(value)
