"""Keep checkpoints of a run: the last one, and the best or the newest of all."""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

from eventtrain.callback import Callback
from eventtrain.callbacks.checkpointing.folder import (
    LAST,
    CheckpointFolder,
    check_template,
    file_name,
    kept_names,
    kept_scores,
)
from eventtrain.callbacks.checkpointing.staging import Staging
from eventtrain.callbacks.checkpointing.top_k import TopK
from eventtrain.callbacks.saved_state import field, whole
from eventtrain.callbacks.watched_metric import WatchedMetric
from eventtrain.checkpoint import storage
from eventtrain.checks import check_number, check_option, check_whole_number
from eventtrain.errors import MisconfigurationError, printable
from eventtrain.events import (
    CheckpointSaved,
    ExceptionRaised,
    FindCheckpoint,
    FitStart,
    Setup,
    TakeCheckpoint,
    Teardown,
)
from eventtrain.paths import AnyPath, check_path
from eventtrain.trainer import Trainer


class ModelCheckpoint(Callback):
    """Writes checkpoints at safe points, from which ``trainer.fit(ckpt_path="last")`` resumes exactly.

    Listens to ``take_checkpoint``, when the state of a safe point is final, and to ``find_checkpoint``, at which it offers
    its files; also to ``setup``, ``fit_start``, ``exception`` and ``teardown``. Emits ``checkpoint_saved``, and the events
    that the trainer publishes as it gathers a checkpoint. Reads the monitored metric from its device if a checkpoint is due.

    A file gets its name once it is complete on disk, and only then are older files deleted. So a crash, a full disk or a kill
    leaves the earlier checkpoints intact at any moment. ``last.ckpt`` is the newest; its predecessor is ``previous.ckpt``,
    from which a run is resumed if the newest file is damaged. A file with two names takes its space once.

    Without a schedule a checkpoint is due after each validation and at the end of each epoch; with ``every_n_...`` it is due
    when one of these says so; and always at the end of the run. Override :meth:`is_due` for another schedule and
    :meth:`file_name_values` for other names. A ``fast_dev_run`` writes nothing.

    Args:
        dirpath: The folder, relative to the trainer's ``default_root_dir``, or one with a protocol of fsspec, such as
            ``"s3://bucket/run"``. One run at a time writes there.
        filename: The names, such as ``"{epoch}-{step}-{val_loss:.3f}"``, which gives ``epoch=3-step=99-val_loss=0.123.ckpt``.
            Besides ``epoch`` and ``step`` any name in ``trainer.callback_metrics``. None for ``"{epoch}-{step}"``.
        every_n_steps: Updates between two checkpoints.
        every_n_epochs: Epochs between two checkpoints.
        every_n_minutes: Minutes between two checkpoints.
        monitor: The metric by which the best are chosen. A checkpoint without a new value of it is only the last one.
        mode: ``"min"`` if small values are good, ``"max"`` if large ones are.
        save_top_k: The number of checkpoints to keep besides the last: the best, or without ``monitor`` the newest; -1 for
            all.
        save_last: Whether to keep ``last.ckpt``. A run that is interrupted writes it in any case.
        in_background: Whether a thread writes the files. Then the run waits only for the copy, which takes as much of the
            host's memory as the checkpoint; it waits for the thread before the next checkpoint and at its end.
        on_error: ``"raise"`` if a file that cannot be written ends the run, ``"warn"`` if the run continues without it.
        save_on_exception: Whether a run that an error ends leaves a checkpoint of its last safe point. For this the state of
            each safe point is copied, which takes time in each batch.

    Raises:
        MisconfigurationError: If an argument is not valid, or nothing would be kept; before training, if nothing can be
            written to the folder, or state cannot be read back from a file.

    Example:
        >>> checkpoint = ModelCheckpoint("checkpoints/resnet", monitor="val_loss", save_top_k=3)
        >>> trainer = Trainer(max_epochs=90, callbacks=[checkpoint])
        >>> checkpoint.kept, checkpoint.best_model_path
        ({}, '')
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] = "checkpoints",
        *,
        filename: str | None = None,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        every_n_minutes: float | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        save_last: bool = True,
        in_background: bool = False,
        on_error: Literal["raise", "warn"] = "raise",
        save_on_exception: bool = False,
    ) -> None:
        for name, every in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
            if every is not None:
                check_whole_number(every, "ModelCheckpoint", name, least=1)
        if every_n_minutes is not None:
            check_number(every_n_minutes, "ModelCheckpoint", "every_n_minutes", above=0)
        check_option(mode, "ModelCheckpoint", "mode", ("min", "max"))
        check_option(on_error, "ModelCheckpoint", "on_error", ("raise", "warn"))
        check_whole_number(save_top_k, "ModelCheckpoint", "save_top_k", least=-1)
        if save_top_k == 0 and not save_last:
            raise MisconfigurationError("ModelCheckpoint(save_top_k=0, save_last=False) keeps no file. Change one of the two.")
        self.dirpath = check_path(dirpath, "ModelCheckpoint", "dirpath")
        self.filename = check_template("{epoch}-{step}" if filename is None else filename, "ModelCheckpoint")
        self.every_n_steps, self.every_n_epochs, self.every_n_minutes = every_n_steps, every_n_epochs, every_n_minutes
        self.monitor, self.mode = monitor, mode
        self.save_top_k, self.save_last = save_top_k, save_last
        self.in_background, self.on_error, self.save_on_exception = in_background, on_error, save_on_exception
        self._folder = CheckpointFolder(self.dirpath)
        self._thread: ThreadPoolExecutor | None = None
        self._staging = Staging()  # for the thread
        self._exception_staging = Staging()  # for save_on_exception
        self._begin()

    def _begin(self) -> None:
        self._top = TopK(self.save_top_k, self.mode if self.monitor is not None else None)
        self._reached: tuple[int, ...] | None = None  # the last safe point
        self._saved: tuple[int, ...] | None = None  # the safe point of the last checkpoint
        self._path: AnyPath | None = None  # its file
        self._steps = self._validations = 0  # the counters at that safe point
        self._time = time.monotonic()
        self._metric = (
            None if self.monitor is None else WatchedMetric(self.monitor, f"ModelCheckpoint(monitor={self.monitor!r})")
        )
        self._is_new = False  # the metric was logged between the last two safe points
        self._writing: tuple[dict[str, float | None], Future[None]] | None = None  # the scores before, and the thread's work
        self._copy: dict[str, Any] | None = None  # the state of the last safe point, with save_on_exception
        self._is_failing = False  # an error ends the run, so other processes may be gone

    # ------------------------------------------------------------------ the policy

    def is_due(self, trainer: Trainer, event: TakeCheckpoint) -> bool:
        """Decide whether to write a checkpoint at a safe point.

        Args:
            trainer: The trainer.
            event: The event; its ``epoch_end`` and ``window_open`` describe the safe point.

        Returns:
            Whether to write one. The answer has to be the same in all processes.
        """
        progress = trainer.progress
        if trainer.is_ending:
            return True
        if self.every_n_steps and progress.global_step % self.every_n_steps == 0 and progress.global_step != self._steps:
            return True
        if self.every_n_epochs and event.epoch_end and progress.epochs_done % self.every_n_epochs == 0:
            return True
        if self.every_n_minutes:
            is_time = time.monotonic() - self._time >= 60 * self.every_n_minutes
            return trainer.processes.agree([is_time], "in_between", self.state_key)[0]
        if self.every_n_steps or self.every_n_epochs:
            return False
        return event.epoch_end or progress.validations != self._validations

    def file_name_values(self, trainer: Trainer) -> dict[str, Any]:
        """Return the values that ``filename`` may name besides those of ``trainer.callback_metrics``.

        Args:
            trainer: The trainer.

        Returns:
            The values by name; ``epoch`` and ``step`` here.
        """
        return {"epoch": trainer.current_epoch, "step": trainer.global_step}

    # ------------------------------------------------------------------ events

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        if event.stage == "fit":
            self._begin()
            self._folder = CheckpointFolder(trainer.root / self.dirpath)

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        if trainer.fast_dev_run:
            return
        for other in trainer.callbacks:
            if isinstance(other, ModelCheckpoint) and other is not self and other._folder.path == self._folder.path:
                raise MisconfigurationError(
                    f"Two ModelCheckpoints write to {str(self.dirpath)!r}, and each would delete the files of the other. "
                    "Give each of them another dirpath."
                )
        # Without the weights: those of a lazy module do not exist yet, and will when they are written.
        storage.loadable(
            {name: value for name, value in trainer.collect_checkpoint(publish=False).items() if name != "state_dict"}
        )
        if trainer.is_global_zero:
            try:
                self._folder.prepare(self._top.surplus)
            except OSError as error:
                raise MisconfigurationError(
                    f"ModelCheckpoint(dirpath={str(self.dirpath)!r}): nothing can be written there: "
                    f"{storage.first_line(error)}. Give another directory."
                ) from error
        self._top.surplus.clear()
        # The run may be resumed from a checkpoint of another folder.
        names = trainer.processes.broadcast([name for name in self.kept if (self._folder.path / name).is_file()])
        self._top.scores = {name: self.kept[name] for name in names}
        self._reached = self._saved = current_place(trainer)
        self._time = time.monotonic()

    def on_take_checkpoint(self, trainer: Trainer, event: TakeCheckpoint) -> None:
        # Several processes wait at the same place, because they tell each other the result.
        if self._writing is not None and (event.reason is not None or (trainer.world_size == 1 and self._writing[1].done())):
            self.wait(trainer)
        if trainer.fast_dev_run:
            return
        place = current_place(trainer)
        if self._saved != place:
            is_new_place, self._reached = self._reached != place, place
            # An epoch that the run leaves logs its metrics after its last safe point, whose weights are not theirs.
            self._is_new = self._metric is not None and self._metric.look(trainer) and is_new_place
            if self.is_due(trainer, event):
                self._save(trainer, ranked=True)
            if self.save_on_exception:
                self._copy = self._exception_staging.copy(trainer.collect_checkpoint())
        if event.reason is not None:
            if self._saved != place or self._path is None:
                self._save(trainer, ranked=False)
            self.wait(trainer)
            event.path = None if self._path is None else str(self._path)

    def on_find_checkpoint(self, trainer: Trainer, event: FindCheckpoint) -> None:
        self._folder = CheckpointFolder(trainer.root / self.dirpath)
        self.wait(trainer)
        if event.which == "last":
            event.offer(*self._folder.newest())
        elif self.monitor is None or event.is_best_of_fit:
            event.offer(*self._best())
        else:  # before the files of listeners that monitor no metric, after those of the first that does
            event.is_best_of_fit = bool(self.kept)
            event.paths = [*self._best(), *(event.paths or ())]

    def on_exception(self, trainer: Trainer, event: ExceptionRaised) -> None:
        content, self._copy, self._is_failing = self._copy, None, True
        if content is None or not isinstance(event.exception, Exception):
            return
        self.wait(trainer)
        for part in storage.parts_of(content).values():
            part.meet()
        if trainer.is_global_zero:
            self._folder.write(content, [LAST], [])
        else:
            storage.write(content, None)

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        try:
            self.wait(trainer)
        finally:
            self._copy = None
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None

    # ------------------------------------------------------------------ writing

    def _save(self, trainer: Trainer, *, ranked: bool) -> None:
        """Write a checkpoint of the current safe point.

        Args:
            trainer: The trainer.
            ranked: Whether it may be kept besides the last one.
        """
        self.wait(trainer)
        before = dict(self._top.scores)
        values = {**trainer.callback_metrics, **self.file_name_values(trainer)}
        score = None if self._metric is None or not ranked else self._metric.agreed(trainer, self._is_new)
        if score is not None:
            values[str(self.monitor)] = score
        name = trainer.processes.broadcast(file_name(self.filename, values))  # values of steps differ between processes
        names = [name] if ranked and self._rank(trainer, name, score) else []
        if self.save_last or not ranked:
            names.append(LAST)
        progress = trainer.progress
        self._saved, self._steps, self._validations = current_place(trainer), progress.global_step, progress.validations
        self._time = time.monotonic()
        if not names:
            return
        self._path = self._folder.path / names[0]
        content = trainer.collect_checkpoint()
        write: Callable[[dict[str, Any]], None]
        if trainer.is_global_zero:
            content = storage.loadable(content)
            write = partial(self._folder.write, names=names, surplus=list(self._top.surplus))
        else:
            content, write = dict(storage.parts_of(content)), partial(storage.write, path=None)
        if not self.in_background:
            self._settle(trainer, before, partial(write, content))
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = before, self._thread.submit(write, self._staging.copy(content))

    def _rank(self, trainer: Trainer, name: str, score: Any) -> bool:
        """Add the current checkpoint to the top k if it is good enough; return whether it is."""
        if self._metric is None:
            return self._top.add(name, None)
        self._warn_if_missing(trainer, self._metric)
        return score is not None and self._top.add(name, float(score))

    def _warn_if_missing(self, trainer: Trainer, metric: WatchedMetric) -> None:
        """Warn once if the metric was never logged, when the stages that may log it are over."""
        is_complete = trainer.is_ending and not trainer.should_stop
        never_logged = is_complete and not metric.was_logged(trainer)
        if never_logged or (trainer.progress.epochs_done > 0 and metric.is_missing(trainer)):
            last = "only the last checkpoint is" if self.save_last else "no checkpoint is"
            metric.report_missing(trainer, strict=False, remedy=f"Until then {last} kept.")

    def wait(self, trainer: Trainer) -> None:
        """Wait until the thread has written its file, and report the result like a file that is written at once.

        Args:
            trainer: The trainer.

        Raises:
            OSError: If the file could not be written, unless ``on_error="warn"``.
        """
        if self._writing is not None:
            (before, future), self._writing = self._writing, None
            self._settle(trainer, before, future.result)

    def _settle(self, trainer: Trainer, before: dict[str, float | None], written: Callable[[], None]) -> None:
        """Publish that a file is written; if it could not be, keep the files of before, in all processes."""
        failure: OSError | None = None
        try:
            written()
        except OSError as error:
            failure = error
        problem = None if failure is None else (failure.errno, storage.first_line(failure))
        if not self._is_failing:
            trainer.processes.barrier()  # as long as the write takes, not in an exchange with a timeout
        problems = [problem] if self._is_failing else trainer.processes.gather_for_all(problem)
        problem = next((each for each in problems if each is not None), None)
        if problem is not None:
            failed, self._path, self._saved = printable(self._path), None, None
            self._top.scores = before
            self._top.surplus = [name for name in self._top.surplus if name not in before]
            intact = [path.name for path in self._folder.newest()]
            message = (
                f"ModelCheckpoint could not write {failed}: {problem[1]}. Earlier files are intact: {intact}. "
                "Free some space or give another dirpath; with ModelCheckpoint(on_error='warn') a run continues without the "
                "checkpoint."
            )
            if self.on_error == "raise":
                raise OSError(problem[0] or errno.EIO, message) from failure
            warnings.warn(message, stacklevel=2)
            return
        assert self._path is not None
        self._top.surplus.clear()
        if trainer.is_global_zero:
            trainer.signals.checkpoint_saved.publish(CheckpointSaved(str(self._path)))

    # ------------------------------------------------------------------ the files

    def _best(self) -> list[AnyPath]:
        """Return the kept files, best first. If this process has kept none, its newest checkpoint names them."""
        if not self.kept and (content := storage.read_first(self._folder.newest())[1]) is not None:
            states = field(content, "callbacks", dict, default={})
            self._top.scores = kept_scores(states[self.state_key]) if self.state_key in states else {}
        return [path for name in self._top.best() if (path := self._folder.path / name).exists()]

    @property
    def kept(self) -> dict[str, float | None]:
        """The names of the files that are kept besides the last, oldest first, with the metric's value or None."""
        return self._top.scores

    @property
    def best_model_path(self) -> str:
        """The best file of the run, or without ``monitor`` the newest; empty if there is none."""
        return next((str(path) for path in self._best()), "")

    @property
    def best_model_score(self) -> float | None:
        """The best file's value of the monitored metric; None if there is none."""
        return self.kept.get(Path(self.best_model_path).name)

    @property
    def last_model_path(self) -> str:
        """The newest file in the folder; empty if there is none."""
        return next((str(path) for path in self._folder.newest()), "")

    # ------------------------------------------------------------------ state

    @property
    def state_key(self) -> str:
        # Without dirpath and filename, because a run may be resumed with others.
        every = (self.every_n_steps, self.every_n_epochs, self.every_n_minutes)
        return f"{type(self).__qualname__}({self.monitor}, {self.mode}, {every})"

    def state_dict(self) -> dict[str, Any]:
        return {
            "kept": dict(self.kept),
            "surplus": list(self._top.surplus),
            "steps": self._steps,
            "validations": self._validations,
            "seen": 0 if self._metric is None else self._metric.seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._top.scores = kept_scores(state)
        self._top.surplus = kept_names(field(state, "surplus", list, tuple), "surplus")
        self._steps, self._validations = whole(state, "steps"), whole(state, "validations")
        if self._metric is not None:
            self._metric.seen = whole(state, "seen")


def current_place(trainer: Trainer) -> tuple[int, ...]:
    """Return numbers that no other safe point of the run has; a validation may lie between two safe points of one batch."""
    progress = trainer.progress
    return progress.total_batch_idx, progress.validated_at, progress.epochs_done
