"""Keep checkpoints of a run: the last one, and the best or the newest of all."""

from __future__ import annotations

import errno
import math
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
    Written,
    check_folder,
    check_template,
    contains,
    file_name,
    is_there,
    kept_names,
    kept_scores,
    sequence_of,
    written_names,
)
from eventtrain.callbacks.checkpointing.rounds import Round, check_schedule, current_place, decide
from eventtrain.callbacks.checkpointing.staging import Staging
from eventtrain.callbacks.checkpointing.top_k import TopK
from eventtrain.callbacks.saved_state import field, whole
from eventtrain.callbacks.watched_metric import WatchedMetric
from eventtrain.checkpoint import storage
from eventtrain.checks import check_option, check_whole_number
from eventtrain.errors import MisconfigurationError
from eventtrain.events import (
    CheckpointRead,
    CheckpointSaved,
    ExceptionRaised,
    FindCheckpoint,
    FitStart,
    SaveCheckpoint,
    Setup,
    TakeCheckpoint,
    Teardown,
)
from eventtrain.paths import AnyPath, check_path
from eventtrain.trainer import Trainer


class ModelCheckpoint(Callback):
    """Writes checkpoints at safe points, from which ``trainer.fit(ckpt_path="last")`` resumes exactly.

    Listens to ``take_checkpoint``, when the state of a safe point is final, and to ``find_checkpoint``, at which it offers
    its files; also to ``setup``, ``checkpoint_read``, ``fit_start``, ``save_checkpoint``, ``exception`` and ``teardown``.
    Emits ``checkpoint_saved``, and the events that the trainer publishes as it gathers a checkpoint. Reads the monitored
    metric from its device if a checkpoint is due.

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
            written to the folder, another run writes its last checkpoint there, or state cannot be read back from a file.

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
        check_schedule(every_n_steps, every_n_epochs, every_n_minutes)
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
        # For save_on_exception: while one of them copies, the other holds the last copy that is complete.
        self._exception_stagings = Staging(), Staging()
        self._begin()

    def _begin(self) -> None:
        self._top = TopK(self.save_top_k, self.mode if self.monitor is not None else None)
        self._reached: tuple[int, ...] | None = None  # the last safe point
        self._saved: tuple[int, ...] | None = None  # the safe point of the last checkpoint
        self._names: list[str] = []  # its names
        self._named_at: tuple[int, ...] | None = None  # the safe point at which they were chosen, maybe of an earlier run
        self._path: AnyPath | None = None  # its file
        self._round: Round | None = None  # the last decisions
        self._left: list[str] = []  # names of files that could not be deleted yet
        self._planned: tuple[list[str], dict[str, float | None]] | None = None  # the names to write, and the scores before
        self._resumed: AnyPath | None = None  # the file that the run resumes from
        # Whether the run resumes by ckpt_path="last"; and the largest sequence number of the folder as it begins.
        self._takes_newest, self._newest = False, 0.0
        self._steps = self._validations = 0  # the counters at that safe point
        self._time = time.monotonic()
        self._metric = (
            None if self.monitor is None else WatchedMetric(self.monitor, f"ModelCheckpoint(monitor={self.monitor!r})")
        )
        self._is_new = False  # the metric was logged between the last two safe points
        # The scores before, and the thread's work.
        self._writing: tuple[dict[str, float | None], Future[Written]] | None = None
        # With save_on_exception: the state of the last safe point, and that safe point.
        self._copy: tuple[dict[str, Any], tuple[int, ...]] | None = None
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

    def on_checkpoint_read(self, trainer: Trainer, event: CheckpointRead) -> None:
        if trainer.stage == "fit":
            self._resumed = event.path

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        if trainer.fast_dev_run:
            return
        check_folder(self._folder.path, [each._folder.path for each in keepers(trainer)], str(self.dirpath))
        # Without the weights: those of a lazy module do not exist yet, and will when they are written.
        storage.loadable(
            {name: value for name, value in trainer.collect_checkpoint(publish=False).items() if name != "state_dict"}
        )
        names: list[str] = []
        if trainer.is_global_zero:
            try:
                self._folder.prepare(claims=self.save_last)
                self._finish(trainer)
                self._newest = max(
                    (number for path in self._folder.files() if (number := sequence_of(path)) < math.inf), default=0
                )
                # The run may be resumed from a checkpoint of another folder.
                names = [name for name in self.kept if (self._folder.path / name).is_file()]
            except OSError as error:
                raise MisconfigurationError(
                    f"ModelCheckpoint(dirpath={str(self.dirpath)!r}): nothing can be written there: "
                    f"{storage.first_line(error)}. Give another directory."
                ) from error
        self._top.scores = {name: self.kept[name] for name in trainer.processes.broadcast(names)}
        self._reached = self._saved = current_place(trainer)
        self._time = time.monotonic()
        self._resumed = None

    def on_take_checkpoint(self, trainer: Trainer, event: TakeCheckpoint) -> None:
        # Several processes wait at the same place, because they tell each other the result.
        if self._writing is not None and (event.reason is not None or (trainer.world_size == 1 and self._writing[1].done())):
            self.wait(trainer)
        if trainer.fast_dev_run:
            return
        if self._round is None or self._round.event is not event:
            decide(keepers(trainer), trainer, event)
        if self._planned is not None:
            self._save(trainer)
        if self.save_on_exception:
            content = trainer.collect_checkpoint()
            self._exception_stagings = self._exception_stagings[::-1]
            self._copy = self._exception_stagings[0].copy(content), current_place(trainer)
        if event.reason is not None:
            self.wait(trainer)
            event.path = None if self._path is None else str(self._path)

    def on_save_checkpoint(self, trainer: Trainer, event: SaveCheckpoint) -> None:
        # The folder may hold files of a run that this one does not continue.
        event.checkpoint["sequence"] = max(event.checkpoint["sequence"], int(self._newest) + 1)

    def on_find_checkpoint(self, trainer: Trainer, event: FindCheckpoint) -> None:
        self._folder = CheckpointFolder(trainer.root / self.dirpath)
        self.wait(trainer)
        if event.which == "last":
            self._takes_newest = True
            event.offer(*self._folder.offered(str(self.dirpath)))
        elif self.monitor is None or event.is_best_of_fit:
            event.offer(*self._best())
        else:  # before the files of listeners that monitor no metric, after those of the first that does
            event.is_best_of_fit = bool(self.kept)
            event.paths = [*self._best(), *(event.paths or ())]

    def on_exception(self, trainer: Trainer, event: ExceptionRaised) -> None:
        copy, self._copy, self._is_failing = self._copy, None, True
        if copy is None or not isinstance(event.exception, Exception):
            return
        try:
            self.wait(trainer)
        finally:
            if copy[1] != self._saved:
                self._write_copy(trainer, copy[0])

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        try:
            self.wait(trainer)
        finally:
            self._copy = None
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None
            self._folder.release()

    # ------------------------------------------------------------------ writing

    def _look(self, trainer: Trainer, event: TakeCheckpoint) -> bool | None:
        """Decide whether a checkpoint of the current safe point is due.

        Returns:
            True if it is one that may be kept besides the last one, False if it is only the last one; None if none is due.
        """
        place = current_place(trainer)
        if self._planned is not None:
            if self._saved == place:
                return None  # it is about to be written
            self._top.scores, self._planned, self._saved = self._planned[1], None, None  # an error came between
        if self._saved != place:
            is_new_place, self._reached = self._reached != place, place
            # An epoch that the run leaves logs its metrics after its last safe point, whose weights are not theirs.
            self._is_new = self._metric is not None and self._metric.look(trainer) and is_new_place
            if self.is_due(trainer, event):
                return True
        is_asked_for = event.reason is not None and (self._saved != place or self._path is None)
        return False if is_asked_for else None

    def _plan(self, trainer: Trainer, *, ranked: bool) -> None:
        """Choose the names of a checkpoint of the current safe point.

        Args:
            trainer: The trainer.
            ranked: Whether it may be kept besides the last one.
        """
        before, self._top.surplus = dict(self._top.scores), self._left
        values = {**trainer.callback_metrics, **self.file_name_values(trainer)}
        score = None if self._metric is None or not ranked else self._metric.agreed(trainer, self._is_new)
        if score is not None:
            values[str(self.monitor)] = score
        name = trainer.processes.broadcast(file_name(self.filename, values))  # values of steps differ between processes
        self._names = [name] if ranked and self._rank(trainer, name, score) else []
        if self.save_last or not ranked:
            self._names.append(LAST)
        progress = trainer.progress
        self._saved, self._steps, self._validations = current_place(trainer), progress.global_step, progress.validations
        self._time = time.monotonic()
        self._planned, self._named_at = (self._names, before), self._saved

    def _save(self, trainer: Trainer) -> None:
        """Write a checkpoint of the current safe point, under the names that were chosen."""
        assert self._planned is not None and self._round is not None
        (names, before), self._planned = self._planned, None
        if not names:
            return
        self._path = self._folder.path / names[0]
        content = trainer.collect_checkpoint()
        # All files of a safe point have one number, by which a resumed run knows those that are there already.
        content["sequence"] = self._round.sequence = self._round.sequence or content["sequence"]
        write: Callable[[dict[str, Any]], Written]
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

    def _write_copy(self, trainer: Trainer, content: dict[str, Any]) -> None:
        """Write the copy of the last safe point, with ``save_on_exception``."""
        for part in storage.parts_of(content).values():
            part.meet()
        if not trainer.is_global_zero:
            storage.write(content, None)
            return
        try:
            self._folder.write(content, [LAST], [])
        except OSError as error:
            self._report(self._folder.path / LAST, error.errno, storage.first_line(error), error)

    def _settle(self, trainer: Trainer, before: dict[str, float | None], written: Callable[[], Written]) -> None:
        """Publish that a file is written; if it could not be, keep the files of before, in all processes."""
        failure: OSError | None = None
        left: dict[str, OSError] = {}
        try:
            left = written() or {}
        except OSError as error:
            failure = error
        failure = failure or next(iter(left.values()), None)
        # The number and the text of the error; and the files that could not be deleted, if the checkpoint is written.
        problem = None if failure is None else (failure.errno, storage.first_line(failure), list(left))
        # The others wait here as long as the write takes, not in torch's exchanges, which have a timeout.
        gathered = [problem] if self._is_failing else trainer.processes.gather_for_all(problem)
        problems = [each for each in gathered if each is not None]
        assert self._path is not None
        if unwritten := [each for each in problems if not each[2]]:
            failed, self._path, self._saved, self._names = self._path, None, None, []
            self._top.scores = before
            self._left = [name for name in self._top.surplus if name not in before]
            if failed.name not in (LAST, *before):
                self._left.append(failed.name)  # it may be complete, and only have no second name
            self._top.surplus = self._left
            self._report(failed, *unwritten[0][:2], failure)
            return
        self._left = [name for each in problems for name in each[2]]
        if trainer.is_global_zero:
            trainer.signals.checkpoint_saved.publish(CheckpointSaved(str(self._path)))
        if problems:
            code, reason, (name, *_) = problems[0]
            self._complain(code, self._folder.undeleted(name, self._path, reason), failure)

    def _report(self, failed: AnyPath, code: int | None, reason: str, cause: OSError | None) -> None:
        """Say that a checkpoint could not be written."""
        self._complain(code, self._folder.unwritten(failed, reason), cause)

    def _complain(self, code: int | None, message: str, cause: OSError | None) -> None:
        """Raise an error that tells of another one, or warn of it."""
        if self.on_error == "raise":
            raise OSError(code or errno.EIO, message) from cause
        warnings.warn(message, stacklevel=2)

    # ------------------------------------------------------------------ the files

    def _finish(self, trainer: Trainer) -> None:
        """Do what a killed run had still to do when its checkpoint was complete, from which this run resumes.

        It had been decided at that safe point under which names each ModelCheckpoint keeps it.

        Raises:
            OSError: If a file cannot be written or deleted.
        """
        path = self._resumed
        if path is None or not any(contains(other._folder.path, path) for other in keepers(trainer)):
            self._top.surplus = []
            return
        names = self._names if self._named_at == current_place(trainer) else []
        self._folder.finish(path, names, self._top.surplus, passes_over_newer=self._takes_newest)

    def _best(self) -> list[AnyPath]:
        """Return the kept files, best first. If this process has kept none, its newest checkpoint names them."""
        if not self.kept and (content := storage.read_first(self._folder.newest())[1]) is not None:
            states = field(content, "callbacks", dict, default={})
            self._top.scores = kept_scores(states[self.state_key]) if self.state_key in states else {}
        return [path for name in self._top.best() if is_there(path := self._folder.path / name)]

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
            "names": list(self._names),
            "named_at": list(self._named_at or ()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._top.scores = kept_scores(state)
        self._top.surplus = kept_names(field(state, "surplus", list, tuple), "surplus")
        self._steps, self._validations = whole(state, "steps"), whole(state, "validations")
        self._names = written_names(field(state, "names", list, default=[]))
        self._named_at = tuple(field(state, "named_at", list, default=[]))
        if self._metric is not None:
            self._metric.seen = whole(state, "seen")


def keepers(trainer: Trainer) -> list[ModelCheckpoint]:
    """Return the ModelCheckpoints of a trainer."""
    return [each for each in trainer.callbacks if isinstance(each, ModelCheckpoint)]
