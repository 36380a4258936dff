"""Writes what a run logs for TensorBoard."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from eventtrain.callback import Callback
from eventtrain.errors import MisconfigurationError
from eventtrain.events import AfterOptimizerStep, ExceptionRaised, FitStart, MetricsLogged, Setup, Teardown, TrainBatchStart
from eventtrain.metrics import infer_batch_size
from eventtrain.optimizer import LightningOptimizer
from eventtrain.trainer import Trainer

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

XAxis = Literal["global_step", "batches", "samples", "wall_time"]
X_AXES = ("global_step", "batches", "samples", "wall_time")


class TensorBoardLogger(Callback):
    """Writes metrics, learning rates and hyperparameters to a directory of the run's own.

    Listens to ``metrics_logged``, ``after_optimizer_step`` (the rates that the step used, where they will be written),
    ``train_batch_start`` (samples, for the x-axis of that name), ``fit_start``, ``exception`` and ``teardown``. Writes the
    scalars that ``self.log`` collected under their names, ``epoch``, and ``lr-<optimizer>`` per parameter group. Override
    :meth:`is_due` for another cadence.

    Args:
        log_dir: Where runs are kept; relative to the trainer's ``default_root_dir``.
        name: The runs' name; the module's class name where None. A run's directory is
            ``log_dir/name/version_<n>``, with the first free number.
        log_every_n_steps: Updates between two values that are written of what is logged on step.
        x_axis: What values are drawn against: ``"global_step"``, ``"batches"`` or ``"samples"`` of the run, or
            ``"wall_time"`` in seconds since the fit began.

    Raises:
        MisconfigurationError: An unknown x-axis, or a cadence under 1.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] = "runs",
        *,
        name: str | None = None,
        log_every_n_steps: int = 50,
        x_axis: XAxis = "global_step",
    ) -> None:
        if x_axis not in X_AXES:
            raise MisconfigurationError(f"TensorBoardLogger(x_axis={x_axis!r}): it has to be one of {list(X_AXES)}.")
        if isinstance(log_every_n_steps, bool) or not isinstance(log_every_n_steps, int) or log_every_n_steps < 1:
            raise MisconfigurationError(
                f"TensorBoardLogger(log_every_n_steps={log_every_n_steps!r}): it has to be a whole number from 1."
            )
        self.log_dir = Path(log_dir)
        self.name = name
        self.log_every_n_steps = log_every_n_steps
        self.x_axis = x_axis
        self._trainer: Trainer | None = None
        self._writer: SummaryWriter | None = None
        self._run_dir: Path | None = None
        self._rates: dict[str, float] = {}
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
            MisconfigurationError: No run has begun.
        """
        if self._writer is None:
            if self._trainer is None:
                raise MisconfigurationError("TensorBoardLogger has no writer yet: no run has begun.")
            if not self._writes(self._trainer):
                return cast("SummaryWriter", SilentWriter())
            from torch.utils.tensorboard import SummaryWriter  # when used: it takes seconds to import

            self._writer = SummaryWriter(str(self.run_dir))
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
            raise MisconfigurationError("TensorBoardLogger has no directory yet: no run has begun.")
        return self._run_dir

    # ------------------------------------------------------------------ events

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        self._trainer = trainer
        if event.stage == "fit" or self._run_dir is None:
            # An evaluation after a fit goes on in the fit's directory.
            parent = Path(trainer.default_root_dir) / self.log_dir / (self.name or type(trainer.module).__name__)
            self._run_dir = next_version(parent)
            self._samples = 0
            self._seconds_before = self._began = 0.0

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        self._began = time.monotonic()
        module = trainer.module
        if self.x_axis == "samples":
            trainer.signals.train_batch_start.connect(self.count_samples)
        if not self._writes(trainer):
            return
        assert self.writer is not None  # opened now: a directory that can't be written is found before training
        if module.hparams and getattr(module, "_log_hyperparams", True):
            self.log_hyperparams(module.hparams)

    def count_samples(self, trainer: Trainer, event: TrainBatchStart) -> None:
        """Connected to ``train_batch_start`` where values are drawn against samples."""
        self._samples += infer_batch_size(event.batch) * trainer.world_size

    def on_after_optimizer_step(self, trainer: Trainer, event: AfterOptimizerStep) -> None:
        # The update is counted after this event, and schedulers step then: now the rates are those that it used.
        if self.is_due(trainer.progress.global_step + 1):
            self._rates.update(learning_rates(event.optimizer, trainer.optimizers))

    def on_metrics_logged(self, trainer: Trainer, event: MetricsLogged) -> None:
        if event.scope == "step" and not self.is_due(event.step):
            return
        if not self._writes(trainer):
            return
        if event.scope == "step":
            self.log_scalars({**event.metrics, **self._rates}, self._x(trainer))
            self._rates.clear()
            return
        scalars = dict(event.metrics)
        if event.stage == "train" and event.scope == "epoch":
            scalars["epoch"] = trainer.current_epoch
        if scalars:
            self.log_scalars(scalars, self._x(trainer))
            self.writer.flush()

    def on_exception(self, trainer: Trainer, event: ExceptionRaised) -> None:
        if self._writer is not None:
            self._writer.flush()

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        trainer.signals.train_batch_start.disconnect(self.count_samples)
        if self._writer is not None:
            self._writer.close()
            self._writer = None  # the next use opens another file in the same directory

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
        """Writes hyperparameters, for TensorBoard's HParams page.

        Args:
            hparams: Their values by name; what is no number, string or bool is written as text.
        """
        from torch.utils.tensorboard.summary import hparams as summaries

        plain = {name: v if isinstance(v, (bool, int, float, str)) else repr(v) for name, v in flat(hparams).items()}
        # SummaryWriter.add_hparams would open a run of its own beside this one.
        writer: Any = self.writer
        for summary in summaries(plain, {"epoch": 0}):  # type: ignore[no-untyped-call]
            writer.file_writer.add_summary(summary)

    def _writes(self, trainer: Trainer) -> bool:
        return trainer.is_global_zero and not trainer.fast_dev_run

    def _x(self, trainer: Trainer) -> int:
        if self.x_axis == "global_step":
            return trainer.global_step
        if self.x_axis == "batches":
            return trainer.total_batch_idx + 1
        if self.x_axis == "samples":
            return self._samples
        return round(self._seconds())

    def _seconds(self) -> float:
        """Seconds of fitting in the run so far, those before a resume included."""
        return self._seconds_before + (time.monotonic() - self._began if self._began else 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self._samples, "seconds": self._seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._samples = state["samples"]
        self._seconds_before = state["seconds"]
        self._began = 0.0


class SilentWriter:
    """A ``SummaryWriter`` that writes nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def learning_rates(optimizer: LightningOptimizer, optimizers: list[LightningOptimizer]) -> dict[str, float]:
    """The rates of an optimizer's parameter groups, as ``lr-<class>``, numbered where there are several.

    Args:
        optimizer: The optimizer.
        optimizers: All of the run's, among which it is.
    """
    kind = type(optimizer.optimizer).__name__
    alike = [other for other in optimizers if type(other.optimizer).__name__ == kind]
    number = f"-{next(i for i, other in enumerate(alike) if other is optimizer)}" if len(alike) > 1 else ""
    rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
    if len(rates) == 1:
        return {f"lr-{kind}{number}": rates[0]}
    return {f"lr-{kind}{number}/group_{i}": rate for i, rate in enumerate(rates)}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with names joined by slashes."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{name}/"))
        else:
            result[f"{prefix}{name}"] = value
    return result


def next_version(parent: Path) -> Path:
    """The first ``version_<n>`` in a directory that is free, after the largest that is taken."""
    taken = [int(m.group(1)) for child in parent.glob("version_*") if (m := re.fullmatch(r"version_(\d+)", child.name))]
    return parent / f"version_{max(taken, default=-1) + 1}"
