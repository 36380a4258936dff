"""Writes what a run logs for TensorBoard."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from eventtrain.callback import Callback
from eventtrain.callbacks.loggers import run_files as runs
from eventtrain.errors import MisconfigurationError
from eventtrain.events import (
    AfterUpdate,
    BeforeOptimizerStep,
    FitEnd,
    FitStart,
    MetricsLogged,
    Setup,
    Teardown,
    TrainBatchStart,
)
from eventtrain.metrics.metrics import infer_batch_size
from eventtrain.trainer import Trainer

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

XAxis = Literal["global_step", "batches", "samples", "wall_time"]
X_AXES = ("global_step", "batches", "samples", "wall_time")


class TensorBoardLogger(Callback):
    """Writes metrics, hyperparameters, and what the run is, to a directory of the run's own.

    Listens to ``metrics_logged``, ``setup``, ``fit_start``, ``fit_end`` and ``teardown``; where they are asked
    for, to ``train_batch_start`` for the x-axis of samples, and to ``before_optimizer_step`` and ``after_update``
    for histograms. Writes the scalars that were logged under their names, of those logged on step those of the updates
    that are due, and ``epoch``; the text ``run/environment``, ``run/configuration`` and ``run/module``; the module's
    ``hparams`` for the HParams page, whose columns are the hyperparameters and the scalars of all runs below TensorBoard's
    ``logdir``. Whatever else goes through ``trainer.callback(TensorBoardLogger).writer``. Override :meth:`is_due` for
    another cadence.

    Values on the x-axis never fall: those of an evaluation after the fit stand where the fit ended, a batch in which
    several optimizers step is one update, and a run that resumes a checkpoint goes on where that was written. It does so
    in the directory that the checkpoint's run had, as long as it is there, and cuts off what was written there after the
    checkpoint, so that each step is there once. Readers that have it forget it: the new event file begins with the mark that
    ``SummaryWriter(purge_step=...)`` writes.

    What is written is buffered, and on disk after each epoch, before a checkpoint, after an error, when the run is over,
    and every few seconds. A directory that cannot be written to is an error before training; where it vanishes or the disk
    fills up later, there is one warning, and the run goes on without it.

    Args:
        log_dir: Where runs are kept; relative to the trainer's ``default_root_dir``.
        name: The runs' name; the module's class name where None. A run's directory is
            ``log_dir/name/version_<n>``, with the first free number.
        log_every_n_steps: Updates between two values that are written of what is logged on step.
        x_axis: What values are drawn against: ``"global_step"``, ``"batches"`` or ``"samples"`` of the run, or
            ``"wall_time"``, whole seconds since the fit began, with those before a resume.
        log_graph: Whether to draw the graph of the module's ``forward`` on its ``example_input_array``.
        histograms: Updates between two histograms of each parameter (after the update) and of each gradient (the true
            one, unclipped), as ``parameters/<name>`` and ``gradients/<name>``; None for none. What is not finite is left out.
        resume: What a resumed run does: go on in the ``"same"`` directory, or begin a ``"new"`` one.

    Raises:
        MisconfigurationError: An unknown x-axis or way to resume, or a cadence under 1; at ``fit_start``, a directory
            that cannot be written to.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] = "runs",
        *,
        name: str | None = None,
        log_every_n_steps: int = 50,
        x_axis: XAxis = "global_step",
        log_graph: bool = False,
        histograms: int | None = None,
        resume: Literal["same", "new"] = "same",
    ) -> None:
        if x_axis not in X_AXES:
            raise MisconfigurationError(f"TensorBoardLogger(x_axis={x_axis!r}): it has to be one of {list(X_AXES)}.")
        if resume not in ("same", "new"):
            raise MisconfigurationError(f"TensorBoardLogger(resume={resume!r}): it has to be 'same' or 'new'.")
        runs.check_cadence("TensorBoardLogger", "log_every_n_steps", log_every_n_steps)
        if histograms is not None:
            runs.check_cadence("TensorBoardLogger", "histograms", histograms)
        self.log_dir = Path(log_dir)
        self.name = name
        self.log_every_n_steps = log_every_n_steps
        self.x_axis = x_axis
        self.log_graph = log_graph
        self.histograms = histograms
        self.resume = resume
        self._trainer: Trainer | None = None
        self._writer: SummaryWriter | None = None
        self._event_files: dict[str, int] | None = None  # of the checkpoint's run, with their lengths then
        self._run_dir: Path | None = None
        self._resumed = False
        self._gradients: dict[str, Tensor] = {}
        self._last_x = 0
        self._samples = 0
        self._seconds_before = 0.0
        self._began = 0.0

    def is_due(self, global_step: int) -> bool:
        """The policy: whether what was logged on step is written at a step.

        Args:
            global_step: The count of updates, the one at hand included.
        """
        return global_step % self.log_every_n_steps == 0

    @property
    def state_key(self) -> str:
        return f"TensorBoardLogger({self.log_dir}, {self.name})"

    @property
    def writer(self) -> SummaryWriter:
        """The run's writer, for pictures, text, histograms and whatever else it takes. In a ``fast_dev_run``, and on
        other ranks than zero, one that takes everything and writes nothing.

        Raises:
            MisconfigurationError: No run has begun, or its directory cannot be written to.
        """
        if self._writer is None:
            trainer = self._running()
            if not self._writes(trainer):
                return cast("SummaryWriter", SilentWriter())
            # The values up to here are the checkpoint's, those from the next one on are to be written again.
            purge_step = self._place(trainer) + 1 if self._resumed else None
            with runs.refusing_bad_places("TensorBoardLogger", "log_dir"):
                if self._resumed and self._event_files is not None:
                    runs.cut_off(self.run_dir, self._event_files)
                self._writer = runs.open_writer(self.run_dir, "TensorBoardLogger", purge_step)
        return self._writer

    @property
    def experiment(self) -> SummaryWriter:
        """The writer, under the name that modules written for Lightning use."""
        return self.writer

    @property
    def run_dir(self) -> Path:
        """The directory of the run at hand, or of the last.

        Raises:
            MisconfigurationError: No run has begun.
        """
        if self._run_dir is None:
            trainer = self._running()
            parent = Path(trainer.default_root_dir) / self.log_dir / (self.name or type(trainer.module).__name__)
            self._run_dir = runs.new_version(parent) if self._writes(trainer) else runs.next_version(parent)
        return self._run_dir

    def _running(self) -> Trainer:
        if self._trainer is None:
            raise MisconfigurationError("TensorBoardLogger has no writer and no directory yet: no run has begun.")
        return self._trainer

    def _writes(self, trainer: Trainer) -> bool:
        return trainer.is_global_zero and not trainer.fast_dev_run

    # ------------------------------------------------------------------ events

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        self._trainer = trainer
        if event.stage == "fit":
            self._run_dir = None  # made when it is used first: a checkpoint may bring another
            self._resumed = False
            self._event_files = None
            self._last_x = self._samples = 0
            self._seconds_before = self._began = 0.0
        elif event.stage != "predict":
            _ = self.writer  # a bad directory is found now; an evaluation after a fit goes on in the fit's

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        self._began = time.monotonic()
        if self.x_axis == "samples":
            trainer.signals.train_batch_start.connect(self.count_samples)
        if not self._writes(trainer):
            return
        if self.histograms is not None:
            trainer.signals.before_optimizer_step.connect(self.keep_gradients)
            trainer.signals.after_update.connect(self.write_histograms)
        module, x = trainer.module, self._x(trainer)
        self.writer.add_text("run/environment", runs.table(runs.environment(trainer)), x)
        self.writer.add_text("run/configuration", runs.table(runs.configuration(trainer)), x)
        self.writer.add_text("run/module", runs.module_text(module), x)
        if self._logs_hyperparams(trainer):
            self.log_hyperparams(module.hparams)
        if self.log_graph and not self._resumed:  # else it is there
            runs.draw_graph(self.writer, module)
        self.writer.flush()

    def count_samples(self, trainer: Trainer, event: TrainBatchStart) -> None:
        """Connected to ``train_batch_start`` where values are drawn against samples."""
        self._samples += infer_batch_size(event.batch) * trainer.world_size

    def on_metrics_logged(self, trainer: Trainer, event: MetricsLogged) -> None:
        scope = event.scope
        if scope == "step" and not self.is_due(event.step):
            return
        if not self._writes(trainer):
            return
        scalars = dict(event.metrics)
        if scope == "epoch" and event.stage == "train":
            scalars["epoch"] = trainer.current_epoch
        if scalars:
            self.log_scalars(scalars, self._x(trainer))
        if scope == "epoch":
            self.writer.flush()

    def on_fit_end(self, trainer: Trainer, event: FitEnd) -> None:
        if self._writes(trainer) and self._logs_hyperparams(trainer):
            self._add_summary(runs.session_end())

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        trainer.signals.train_batch_start.disconnect(self.count_samples)
        trainer.signals.before_optimizer_step.disconnect(self.keep_gradients)
        trainer.signals.after_update.disconnect(self.write_histograms)
        self._gradients.clear()
        self._close()  # after an error too
        self._resumed = False

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None  # the next use opens another file in the same directory

    # ------------------------------------------------------------------ histograms

    def keep_gradients(self, trainer: Trainer, event: BeforeOptimizerStep) -> None:
        """Connected to ``before_optimizer_step`` where histograms are asked for. Copies, because clipping comes next; they
        are written once the update is counted, which a veto would prevent."""
        assert self.histograms is not None
        if event.evaluation > 1 or (trainer.progress.global_step + 1) % self.histograms:
            return
        names = {parameter: name for name, parameter in trainer.module.named_parameters()}
        for group in event.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in names:
                    self._gradients[f"gradients/{names[parameter]}"] = finite_values(parameter.grad)

    def write_histograms(self, trainer: Trainer, event: AfterUpdate) -> None:
        """Connected to ``after_update`` where histograms are asked for."""
        assert self.histograms is not None
        if event.global_step % self.histograms:
            return
        x = self._x(trainer)
        parameters = {f"parameters/{name}": finite_values(p) for name, p in trainer.module.named_parameters()}
        for name, values in {**parameters, **self._gradients}.items():
            if values.numel():
                self.writer.add_histogram(name, values, x)
        self._gradients.clear()

    # ------------------------------------------------------------------ writing

    def log_scalars(self, scalars: Mapping[str, Any], x: int) -> None:
        """Writes scalars.

        Args:
            scalars: Numbers or scalar tensors by name.
            x: Their place on the x-axis.
        """
        for name, value in scalars.items():
            self.writer.add_scalar(name, float(value), x)

    def log_hyperparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes hyperparameters, for TensorBoard's HParams page, which shows the first that a run writes.

        Args:
            hparams: Their values by name; what is no number, string or bool is written as text.
        """
        self._add_summary(runs.session_start(hparams))

    def _logs_hyperparams(self, trainer: Trainer) -> bool:
        return bool(trainer.module.hparams) and getattr(trainer.module, "_log_hyperparams", True)

    def _add_summary(self, summary: Any) -> None:
        writer: Any = self.writer  # SummaryWriter.add_hparams would open a run of its own beside this one
        if not isinstance(writer, SilentWriter):
            writer.file_writer.add_summary(summary)

    def _x(self, trainer: Trainer) -> int:
        """Where values logged now stand on the x-axis: never before those that stand there already."""
        self._last_x = max(self._last_x, self._place(trainer))
        return self._last_x

    def _place(self, trainer: Trainer) -> int:
        if self.x_axis == "global_step":
            return trainer.global_step
        if self.x_axis == "batches":
            return trainer.total_batch_idx + 1
        return self._samples if self.x_axis == "samples" else int(self._seconds())

    def _seconds(self) -> float:
        """Seconds of fitting in the run so far, those before a resume included."""
        return self._seconds_before + (time.monotonic() - self._began if self._began else 0.0)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        run_dir, files = None, None
        if self._run_dir is not None:
            run_dir = runs.portable(self._run_dir, self._running().default_root_dir)
            if self._writer is not None:
                self._writer.flush()  # a run that goes on from here does not write this again
                files = {path.name: path.stat().st_size for path in runs.event_files(self._run_dir)}
        kept = {"run_dir": run_dir, "event_files": files, "x_axis": self.x_axis}
        return kept | {"samples": self._samples, "seconds": self._seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._samples = state["samples"]
        self._seconds_before = state["seconds"]
        self._began = 0.0
        run_dir = state["run_dir"] and Path(self._running().default_root_dir) / state["run_dir"]
        if run_dir and run_dir.is_dir() and self.resume == "same" and state["x_axis"] == self.x_axis:
            self._close()  # where the new run's directory was used before
            self._run_dir = run_dir
            self._resumed = True
            self._event_files = state.get("event_files")


class SilentWriter:
    """A ``SummaryWriter`` that writes nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def finite_values(tensor: Tensor) -> Tensor:
    """A copy on the CPU of a tensor's finite values, of a sparse one those that it stores."""
    values = tensor.detach()
    if values.is_sparse:
        values = values.coalesce().values()
    values = values.to("cpu", torch.float32)
    return values[values.isfinite()]  # indexed by a mask, so a copy
