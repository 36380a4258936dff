"""Write logged values, and a description of the run, for TensorBoard."""

from __future__ import annotations

import math
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from eventtrain.callback import Callback, decides_alike, on_demand
from eventtrain.callbacks.claims import Claim, Extents, is_over
from eventtrain.callbacks.loggers import event_files, run_files
from eventtrain.callbacks.loggers.masking import masked
from eventtrain.callbacks.saved_state import field, is_name, items, whole
from eventtrain.checkpoint.shape import is_of
from eventtrain.checkpoint.storage import first_line
from eventtrain.checks import check_option, check_whole_number
from eventtrain.errors import MisconfigurationError, printable
from eventtrain.events import (
    AfterUpdate,
    BeforeOptimizerStep,
    CheckpointSaved,
    FitEnd,
    FitStart,
    MetricsLogged,
    RunInterrupted,
    Setup,
    Teardown,
    TrainBatchStart,
)
from eventtrain.metrics.batch_size import batch_sizes, unknown_size
from eventtrain.paths import AnyPath, check_path
from eventtrain.trainer import Trainer

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

XAxis = Literal["global_step", "batches", "samples", "wall_time"]
OWNER = "TensorBoardLogger"
VERSION = re.compile(r"version_\d+")
X_AXES: tuple[XAxis, ...] = ("global_step", "batches", "samples", "wall_time")


class TensorBoardLogger(Callback):
    """Write metrics, hyperparameters and a description of the run for TensorBoard, to a new directory for each run.

    Listens to ``metrics_logged``, ``setup``, ``fit_start``, ``fit_end``, ``checkpoint_saved``, ``run_interrupted`` and
    ``teardown``; and, only if you ask for them, to ``train_batch_start`` for the x-axis of samples, and to
    ``before_optimizer_step`` and ``after_update`` for histograms.
    Writes the logged scalars under their names (values logged on step only for the updates that are due) and ``epoch``; the
    texts ``run/environment``, ``run/configuration`` and ``run/module``; and the ``hparams`` of module and datamodule for the
    HParams page, whose columns are the hyperparameters and scalars of all runs below TensorBoard's ``logdir``. Write anything
    else through ``trainer.callback(TensorBoardLogger).writer``. Override :meth:`is_due` for another cadence.

    Values that a validation or test logs on step are all written; their x is the count of evaluation batches. The x of all
    others never falls. An evaluation after the fit is drawn at the end of the fit. A batch in which several
    optimizers step is one update. A run that resumes the newest checkpoint of a run continues at its position, in the
    directory of that run if it still exists. Everything that was written there after the checkpoint is cut off, so that each
    step is there once. The new event file begins with the mark of ``SummaryWriter(purge_step=...)``, so that TensorBoard drops
    these values even if it has read them. A run that begins at an older checkpoint leaves this directory as it is, and
    continues a copy of its values up to the checkpoint in a new one; so does one that begins at a checkpoint of a run that has
    ended. Until a run has ended without a stop, the hidden file ``.run`` in its directory says which run writes there; while it
    does, another one gets an error.

    Values are buffered. They are written to disk after each epoch, before a checkpoint, after an error, at the end of the
    run, and every few seconds. A directory that cannot be written to is an error before training. If it vanishes or the disk
    fills up later, there is one warning, and the run continues without the logger.

    Args:
        log_dir: The directory of all runs; relative to the trainer's ``default_root_dir``.
        name: The name of the runs; None for the module's class name. A run's directory is
            ``log_dir/name/version_<n>``, with the first free number.
        log_every_n_steps: Updates between two written values that training logged on step.
        x_axis: The x-axis of values of training, and of epochs: ``"global_step"``, ``"batches"`` or ``"samples"`` of the run,
            or ``"wall_time"``, whole seconds since the fit began, including those before a resume.
        log_graph: Whether to draw the graph of the module's ``forward`` on its ``example_input_array``.
        histograms: Updates between two histograms of each parameter (after the update) and of each gradient (the true
            one, unclipped), as ``parameters/<name>`` and ``gradients/<name>``; None for no histograms. Values that are not
            finite are left out.
        resume: Whether a resumed run continues in the ``"same"`` directory or begins a ``"new"`` one.
        describe_run: Whether to write the three texts about the run. They hold the command line, and the public attributes of
            the callbacks. In them, and in hyperparameters, values that look like secrets are masked: by their names, such as
            ``api_key``, ``hf_token`` and ``password``, and in URLs.

    Raises:
        MisconfigurationError: If the x-axis or the way to resume is unknown, or a cadence is below 1; at ``fit_start``, if
            the directory cannot be written to.

    Example:
        >>> from eventtrain import Trainer
        >>> from eventtrain.callbacks import TensorBoardLogger
        >>> logger = TensorBoardLogger("runs", name="digits", log_every_n_steps=10, histograms=100)
        >>> trainer = Trainer(max_epochs=1, callbacks=[logger])
        >>> trainer.logger is logger
        True
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
        describe_run: bool = True,
    ) -> None:
        self.log_dir = check_path(log_dir, OWNER, "log_dir")
        self.name = name
        self.log_every_n_steps = check_whole_number(log_every_n_steps, OWNER, "log_every_n_steps", least=1)
        self.x_axis = check_option(x_axis, OWNER, "x_axis", X_AXES)
        self.log_graph = log_graph
        self.histograms = None if histograms is None else check_whole_number(histograms, OWNER, "histograms", least=1)
        self.resume = check_option(resume, OWNER, "resume", ("same", "new"))
        self.describe_run = describe_run
        self._trainer: Trainer | None = None
        self._writer: SummaryWriter | None = None
        self._event_files: dict[str, int] | None = None  # of the checkpoint's run, with their lengths at the checkpoint
        self._run_dir: AnyPath | None = None
        self._resumed = False
        self._claim: Claim | None = None  # on the directory
        self._lengths: dict[str, int] | None = None  # of the event files, when they could be read last
        self._is_readable = True
        self._is_complete = self._is_interrupted = False  # the run of the directory has ended as it should; was interrupted
        self._extents = Extents(self.state_key, itemgetter("event_files"))
        self._gradients: dict[str, Tensor] = {}
        self._last_x = 0
        self._evaluated = 0  # the highest x of values that an evaluation logged on step
        self._samples = 0
        self._seconds_before = 0.0
        self._began = 0.0

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
        return f"TensorBoardLogger({self.log_dir}, {self.name})"

    @property
    def writer(self) -> SummaryWriter:
        """The run's ``SummaryWriter``, for images, text, histograms and more. In a ``fast_dev_run``, and on other ranks than
        zero, a writer that accepts everything and writes nothing.

        Raises:
            MisconfigurationError: If no run has begun, or its directory cannot be written to.
        """
        if self._writer is None:
            trainer = self._running()
            if not self._writes(trainer):
                return cast("SummaryWriter", SilentWriter())
            # The checkpoint has the values up to here. The later ones are to be written again.
            purge_step = max(self._place(trainer), self._evaluated) + 1 if self._resumed else None
            with run_files.refusing_bad_places(OWNER, "log_dir"):
                self._claim = self._claim or claim_on(self.run_dir)
                if trainer.stage is not None:  # between runs it would last until the next one ends
                    self._claim.take()
                try:
                    if self._resumed and self._event_files is not None:
                        event_files.cut_off(self.run_dir, OWNER, self._event_files)
                    self._writer = event_files.open_writer(self.run_dir, OWNER, purge_step)
                except BaseException:
                    self._claim.release()
                    raise
        return self._writer

    @property
    def experiment(self) -> SummaryWriter:
        """The :attr:`writer`, under the name that modules written for Lightning use."""
        return self.writer

    @property
    def run_dir(self) -> AnyPath:
        """The directory of the current run, or of the last one.

        Raises:
            MisconfigurationError: If no run has begun.
        """
        if self._run_dir is None:
            trainer = self._running()
            parent = trainer.root / self.log_dir / (self.name or type(trainer.module).__name__)
            self._run_dir = run_files.new_version(parent) if self._writes(trainer) else run_files.next_version(parent)
        return self._run_dir

    def _running(self) -> Trainer:
        if self._trainer is None:
            raise MisconfigurationError(
                "TensorBoardLogger has no writer and no directory yet, because no run has begun. Use them from setup on."
            )
        return self._trainer

    def _writes(self, trainer: Trainer) -> bool:
        return trainer.is_global_zero and not trainer.fast_dev_run

    # ------------------------------------------------------------------ events

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        self._trainer = trainer
        if event.stage == "fit":
            self._run_dir = None  # made at its first use, because a checkpoint may bring another one
            self._resumed = False
            self._event_files = self._claim = self._lengths = None
            self._is_complete = self._is_interrupted = False
            self._last_x = self._evaluated = self._samples = 0
            self._seconds_before = self._began = 0.0
        elif event.stage != "predict":
            self._is_complete |= self._run_dir is None
            _ = self.writer  # raises now if the directory is bad; an evaluation after a fit continues in the fit's directory

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        self._began = time.monotonic()
        if self.x_axis == "samples":
            trainer.listen(self.on_train_batch_start)
        if not self._writes(trainer):
            return
        if self.histograms is not None:
            trainer.listen(self.on_before_optimizer_step)
            trainer.listen(self.on_after_update)
        module, x = trainer.module, self._x(trainer)
        if self.describe_run:
            self.writer.add_text("run/environment", run_files.table(run_files.environment(trainer)), x)
            self.writer.add_text("run/configuration", run_files.table(run_files.configuration(trainer)), x)
            self.writer.add_text("run/module", run_files.module_text(module), x)
        if hparams := run_files.logged_hparams(trainer):
            self.log_hyperparams(hparams)
        if self.log_graph and not self._resumed:  # a resumed run has it
            event_files.draw_graph(self.writer, module)
        self.writer.flush()

    @on_demand
    def on_train_batch_start(self, trainer: Trainer, event: TrainBatchStart) -> None:
        if not (sizes := batch_sizes(event.batch)):
            raise unknown_size(event.batch, 'Give TensorBoardLogger(x_axis="batches").')
        self._samples += sizes[0] * trainer.processes.data.world_size

    def on_metrics_logged(self, trainer: Trainer, event: MetricsLogged) -> None:
        scope = event.scope
        in_evaluation = scope == "step" and event.stage != "train"
        if scope == "step" and not in_evaluation and not self.is_due(event.step):
            return
        if not self._writes(trainer):
            return
        scalars = dict(event.metrics)
        if scope == "epoch" and event.stage == "train":
            scalars["epoch"] = trainer.current_epoch
        if in_evaluation:
            self._evaluated = max(self._evaluated, event.step)
        if scalars:
            self.log_scalars(scalars, event.step if in_evaluation else self._x(trainer))
        if scope == "epoch" and isinstance(self.run_dir, Path):  # the files of a remote store go there once in a minute
            self.writer.flush()

    def on_run_interrupted(self, trainer: Trainer, event: RunInterrupted) -> None:
        self._is_interrupted, self._is_complete = True, False

    def on_fit_end(self, trainer: Trainer, event: FitEnd) -> None:
        self._is_complete = not self._is_interrupted and is_over(trainer, self._claim)
        if self._writes(trainer) and run_files.logged_hparams(trainer):
            self._add_summary(event_files.session_end())

    def on_checkpoint_saved(self, trainer: Trainer, event: CheckpointSaved) -> None:
        lengths = self._extents.in_checkpoint(event.path)
        if self._claim is not None and self._works() and lengths and event_files.is_longer(lengths, self._claim.saved or {}):
            self._claim.note(lengths)

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        self._gradients.clear()
        self._close()  # after an error too
        self._resumed, self._is_readable = False, True

    def _works(self) -> bool:
        """Return whether values are written: there was no failure."""
        return self._events() is not None and self._events().works

    def _events(self) -> Any:
        """Return the event file that is open; None if there is none."""
        return getattr(getattr(self._writer, "file_writer", None), "event_writer", None)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None  # the next use opens another file in the same directory
        if self._claim is not None:
            self._claim.release(remove=self._is_complete)

    # ------------------------------------------------------------------ histograms

    @on_demand
    @decides_alike
    def on_before_optimizer_step(self, trainer: Trainer, event: BeforeOptimizerStep) -> None:
        assert self.histograms is not None
        if event.evaluation > 1 or (trainer.global_step + 1) % self.histograms:
            return
        # Copies, because clipping comes next. They are written when the update is counted, which a veto prevents.
        names = {parameter: name for name, parameter in trainer.module.named_parameters()}
        for group in event.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in names:
                    self._gradients[f"gradients/{names[parameter]}"] = finite_values(parameter.grad)

    @on_demand
    def on_after_update(self, trainer: Trainer, event: AfterUpdate) -> None:
        assert self.histograms is not None
        if event.global_step % self.histograms:
            return
        x = self._x(trainer)
        parameters = {
            f"parameters/{name}": finite_values(parameter)
            for name, parameter in trainer.module.named_parameters()
            if not is_lazy(parameter)
        }
        for name, values in {**parameters, **self._gradients}.items():
            if values.numel():
                self.writer.add_histogram(name, values, x)
        self._gradients.clear()

    # ------------------------------------------------------------------ writing

    def log_scalars(self, scalars: Mapping[str, Any], x: int) -> None:
        """Write scalars.

        Args:
            scalars: Numbers or scalar tensors by name.
            x: Their position on the x-axis.
        """
        for name, value in scalars.items():
            number = float(value)
            is_long = math.isfinite(number) and torch.tensor(number, dtype=torch.float32).item() != number
            # TensorBoard's own scalars have 32 bits. Readers of its API find the others among its tensors.
            is_long &= abs(number) > 2**24
            self.writer.add_scalar(name, number, x, new_style=is_long, double_precision=is_long)

    def log_hyperparams(self, hparams: Mapping[str, Any]) -> None:
        """Write hyperparameters for TensorBoard's HParams page, which shows the first ones that a run writes.

        Args:
            hparams: Their values by name. A value that is not a number, string or bool is written as text. What looks like a
                secret is masked.
        """
        self._add_summary(event_files.session_start(masked(hparams)))

    def _add_summary(self, summary: Any) -> None:
        writer: Any = self.writer  # SummaryWriter.add_hparams would open another run beside this one
        if not isinstance(writer, SilentWriter):
            writer.file_writer.add_summary(summary)

    def _x(self, trainer: Trainer) -> int:
        """Return the position on the x-axis of values that are logged now, which never falls."""
        self._last_x = max(self._last_x, self._place(trainer))
        return self._last_x

    def _place(self, trainer: Trainer) -> int:
        if self.x_axis == "global_step":
            return trainer.global_step
        if self.x_axis == "batches":
            return trainer.total_batch_idx + 1
        return self._samples if self.x_axis == "samples" else int(self._seconds())

    def _seconds(self) -> float:
        """Return the seconds of the fit so far, including those before a resume."""
        return self._seconds_before + (time.monotonic() - self._began if self._began else 0.0)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        run_dir, files = None, None
        if self._run_dir is not None:
            run_dir = run_files.portable(self._run_dir, self._running().root)
            if self._writer is not None:
                self._writer.flush()  # a run that resumes here does not write these values again
                files = self._read_lengths(self._run_dir)
                self._extents.add(files)
        return {
            "run_dir": run_dir,
            "run": None if self._claim is None else self._claim.run,
            "event_files": files,
            "x_axis": self.x_axis,
            "samples": self._samples,
            "evaluated": self._evaluated,
            "seconds": self._seconds(),
        }

    def _read_lengths(self, directory: AnyPath) -> dict[str, int] | None:
        """Return the lengths of the event files. If they cannot be read, the others have their last ones, with one warning."""
        try:
            self._lengths = event_files.lengths_of(directory)
        except OSError as error:
            if self._is_readable and self._works():  # else there was a warning
                warnings.warn(
                    f"{OWNER} cannot read {printable(directory)}: {first_line(error)}. The run continues. A run that resumes a "
                    "checkpoint of this time may have values twice there, if other programs write events there too.",
                    stacklevel=2,
                )
            self._is_readable = False
            if self._lengths is not None:
                self._lengths = self._lengths | self._events().length
        return self._lengths

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._samples = whole(state, "samples")
        self._evaluated = whole(state, "evaluated", default=0)  # older states lack this, a directory or a run
        self._seconds_before = field(state, "seconds", float)
        self._began = 0.0
        run_dir, run = (field(state, name, str, None, default=None) for name in ("run_dir", "run"))
        lengths = state.get("event_files")
        if lengths is not None:
            wanted = "the length of each event file"
            lengths = items(state, "event_files", lambda name, length: is_name(name) and is_of(length, int), wanted)
        if run_dir is not None and self.resume == "same" and field(state, "x_axis", str) == self.x_axis:
            with run_files.refusing_bad_places(OWNER, "log_dir"):
                self._continue(run_dir, run, lengths)

    def _continue(self, name: str, run: str | None, lengths: dict[str, int] | None) -> None:
        """Continue in the directory of the checkpoint's run, or in a copy of it, if it is a directory of this logger.

        Args:
            name: The directory, as the checkpoint names it.
            run: The run's identity in the checkpoint.
            lengths: The lengths of the event files at the checkpoint, by their names; None if it has none.
        """
        trainer = self._running()
        parents = [*re.split(r"[/\\]", name), ""][-3:-2]  # of an older name of the module
        parent = trainer.root / self.log_dir / (self.name or (parents[0] if parents and is_name(parents[0]) else "version"))
        before = run_files.own_place(trainer.root, name, parent, VERSION)
        if before is None:
            run_files.warn_of_other_place(OWNER, name, parent)
        if before is None or not before.is_dir():
            return
        claim, new = claim_on(before), None
        if self._writes(trainer) and (not claim.exists or claim.run == run):
            # Older versions left no claim: then only files that would not be shortened are continued.
            longest = claim.saved or {} if claim.exists else event_files.lengths_of(before)
            if lengths is not None and event_files.is_longer(longest, lengths):
                new = run_files.new_version(parent)
                event_files.copy_up_to(before, new, lengths)
        elif self._writes(trainer):
            return  # the name is another run's by now
        self._close()  # the writer of the new run's directory may be in use
        self._run_dir, self._claim = (before, claim) if new is None else (new, claim_on(new))
        self._resumed = True
        self._event_files = lengths if new is None else None


def claim_on(directory: AnyPath) -> Claim:
    """Return a claim on the directory of a run."""
    return Claim(directory / ".run", directory, OWNER, "log_dir")


class SilentWriter:
    """A ``SummaryWriter`` that accepts every call and writes nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def finite_values(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU of a tensor's finite values; for a sparse tensor, of the values that it stores."""
    values = tensor.detach()
    if values.is_sparse:
        values = values.coalesce().values()
    values = values.to("cpu", torch.float32)
    return values[values.isfinite()]  # a mask as the index makes a copy
