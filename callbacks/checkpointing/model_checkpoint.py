"""Keeps checkpoints of a run: the last one, and the best or newest of all."""

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
from eventtrain.callbacks.checkpointing.folder import LAST, CheckpointFolder, check_template, file_name
from eventtrain.callbacks.checkpointing.staging import Snapshot
from eventtrain.callbacks.checkpointing.top_k import Ranking
from eventtrain.checkpoint import contents as checkpoints
from eventtrain.checkpoint import storage
from eventtrain.checks import check_number, check_option, check_whole_number
from eventtrain.errors import MisconfigurationError
from eventtrain.events import (
    CheckpointSaved,
    ExceptionRaised,
    FindCheckpoint,
    FitStart,
    Setup,
    TakeCheckpoint,
    Teardown,
)
from eventtrain.metrics.watched import WatchedMetric
from eventtrain.trainer import Trainer


class ModelCheckpoint(Callback):
    """Writes checkpoints at safe points, from which ``trainer.fit(ckpt_path="last")`` goes on as if nothing had happened.

    Connects to ``safe_point`` at ``train_start``, so that it comes after those whose state it keeps. Listens to
    ``keep_checkpoint`` and ``find_checkpoint``, by which the trainer asks for one now and for those that there are; to
    ``setup``, ``fit_start``, ``train_end``, ``exception`` and ``teardown``. Emits ``checkpoint_saved``, besides
    what the trainer emits as it gathers one. Reads the monitored metric from its device when one is due.

    A file gets its name once it is whole on disk, and no older one is deleted before that, so that a crash, a full disk or
    a kill at any moment leaves what there was. ``last.ckpt`` is the newest; what was it before is ``previous.ckpt``, which
    is resumed from should the newest be damaged. Where a file has two names it takes its space once.

    Without a schedule one is due after each validation and at the end of each epoch; with ``every_n_...`` when one of
    these says so; and always where the run ends. Override :meth:`is_due` for another schedule and :meth:`file_name_values`
    for other names. In a ``fast_dev_run`` nothing is written.

    Args:
        dirpath: Where the files go; relative to the trainer's ``default_root_dir``. One run at a time writes there.
        filename: The names, such as ``"{epoch}-{step}-{val_loss:.3f}"``, which gives ``epoch=3-step=99-val_loss=0.123.ckpt``.
            Besides ``epoch`` and ``step`` any name in ``trainer.callback_metrics``. None for ``"{epoch}-{step}"``.
        every_n_steps: Updates from one to the next.
        every_n_epochs: Epochs.
        every_n_minutes: Minutes.
        monitor: The metric that says which are the best; a checkpoint without a value of its own is the last one at most.
        mode: Whether the metric is to become small, ``"min"``, or large, ``"max"``.
        save_top_k: How many are kept besides the last: the best, or without ``monitor`` the newest; -1 for all.
        save_last: Whether ``last.ckpt`` is kept. A run that is interrupted writes it in any case.
        in_background: Whether a thread writes the files: the run waits only for the copy, which takes as much of the host's
            memory as the checkpoint. At the end of the run, and before the next checkpoint, it is waited for.
        on_error: What a file that cannot be written does: ``"raise"`` ends the run, ``"warn"`` goes on without it.
        save_on_exception: Whether a run that an error ends leaves a checkpoint of its last safe point. For that each safe
            point's state is copied, which takes time in each batch.

    Raises:
        MisconfigurationError: An argument that cannot be right; nothing would be kept; before training, a directory that
            cannot be written to, or state that could not be read back.
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
            raise MisconfigurationError("ModelCheckpoint(save_top_k=0, save_last=False) keeps nothing. Change one of them.")
        self.dirpath = Path(dirpath).expanduser()
        self.filename = check_template("{epoch}-{step}" if filename is None else filename, "ModelCheckpoint: filename")
        self.every_n_steps, self.every_n_epochs, self.every_n_minutes = every_n_steps, every_n_epochs, every_n_minutes
        self.monitor, self.mode = monitor, mode
        self.save_top_k, self.save_last = save_top_k, save_last
        self.in_background, self.on_error, self.save_on_exception = in_background, on_error, save_on_exception
        self._folder = CheckpointFolder(self.dirpath)
        self._thread: ThreadPoolExecutor | None = None
        self._copies = Snapshot()
        self._last_safe_point = Snapshot()
        self._begin()

    def _begin(self) -> None:
        self._ranking = Ranking(self.save_top_k, self.mode if self.monitor is not None else None)
        self._place: tuple[Any, ...] | None = None  # where the last one was taken, and which file it is in
        self._path: Path | None = None
        self._steps = self._validations = 0  # the counters then
        self._time = time.monotonic()
        self._metric = (
            None if self.monitor is None else WatchedMetric(self.monitor, f"ModelCheckpoint(monitor={self.monitor!r})")
        )
        self._is_new = False  # the metric was logged between the last two safe points
        self._writing: tuple[dict[str, float | None], Future[None]] | None = None  # what was kept before, and the thread's work
        self._held: dict[str, Any] | None = None  # the last safe point's state

    # ------------------------------------------------------------------ the policy

    def is_due(self, trainer: Trainer, event: TakeCheckpoint) -> bool:
        """The policy: whether a checkpoint is written at a safe point.

        Args:
            trainer: The trainer.
            event: The event; its ``epoch_end`` and ``window_open`` describe the safe point.
        """
        progress = trainer.progress
        if trainer.is_ending:
            return True
        if self.every_n_steps and progress.global_step % self.every_n_steps == 0 and progress.global_step != self._steps:
            return True
        if self.every_n_epochs and event.epoch_end and progress.epochs_done % self.every_n_epochs == 0:
            return True
        if self.every_n_minutes:
            return trainer.processes.any(time.monotonic() - self._time >= 60 * self.every_n_minutes)
        if self.every_n_steps or self.every_n_epochs:
            return False
        return event.epoch_end or progress.validations != self._validations

    def file_name_values(self, trainer: Trainer) -> dict[str, Any]:
        """The policy: the fields of ``filename`` besides the names in ``trainer.callback_metrics``."""
        return {"epoch": trainer.current_epoch, "step": trainer.global_step}

    # ------------------------------------------------------------------ events

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        if event.stage == "fit":
            self._begin()
            self._folder = CheckpointFolder(Path(trainer.default_root_dir) / self.dirpath)

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        if trainer.fast_dev_run:
            return
        for other in trainer.callbacks:
            if isinstance(other, ModelCheckpoint) and other is not self and other.dirpath == self.dirpath:
                raise MisconfigurationError(
                    f"Two ModelCheckpoints write to {os.fspath(self.dirpath)!r}, where each would delete what the other keeps. "
                    "Give each a dirpath of its own."
                )
        # Weights that a lazy module has not got yet cannot be written, and will be there by then.
        storage.loadable({name: value for name, value in checkpoints.state_of(trainer).items() if name != "state_dict"})
        if trainer.is_global_zero:
            try:
                self._folder.prepare(self._ranking.surplus)
            except OSError as error:
                raise MisconfigurationError(
                    f"ModelCheckpoint(dirpath={os.fspath(self.dirpath)!r}): nothing can be written there: "
                    f"{storage.first_line(error)}. Give another directory."
                ) from error
        self._ranking.surplus.clear()
        there = trainer.processes.broadcast([name for name in self.kept if (self._folder.path / name).is_file()])
        self._ranking.scores = {name: self.kept[name] for name in there}  # the checkpoint may be of another folder
        self._place = place(trainer)
        self._time = time.monotonic()

    def on_take_checkpoint(self, trainer: Trainer, event: TakeCheckpoint) -> None:
        if self._writing is not None and self._writing[1].done():
            self.wait(trainer)
        if trainer.fast_dev_run:
            return
        if self._place != place(trainer):
            self._is_new = self._metric is not None and self._metric.look(trainer)
            if self.is_due(trainer, event):
                self._save(trainer, ranked=True)
            if self.save_on_exception:
                self._held = self._last_safe_point.copy(checkpoints.gather(trainer))
        if event.reason is not None:
            if self._place != place(trainer) or self._path is None:
                self._save(trainer, ranked=False)
            self.wait(trainer)
            event.path = None if self._path is None else os.fspath(self._path)

    def on_find_checkpoint(self, trainer: Trainer, event: FindCheckpoint) -> None:
        self._folder = CheckpointFolder(Path(trainer.default_root_dir) / self.dirpath)
        self.wait(trainer)
        if event.which == "last":
            event.offer(*self._folder.newest())
        elif self.monitor is None:
            event.offer(*self._best())
        else:  # before those of who has no opinion
            event.paths = [*self._best(), *(event.paths or ())]

    def on_exception(self, trainer: Trainer, event: ExceptionRaised) -> None:
        held, self._held = self._held, None
        if held is not None and isinstance(event.exception, Exception) and trainer.is_global_zero:
            self.wait(trainer)
            self._folder.write(held, [LAST], [])

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        try:
            self.wait(trainer)
        finally:
            self._held = None
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None

    # ------------------------------------------------------------------ writing

    def _save(self, trainer: Trainer, *, ranked: bool) -> None:
        """Writes a checkpoint of the safe point at hand.

        Args:
            trainer: The trainer.
            ranked: Whether it may be one of those that are kept besides the last.
        """
        self.wait(trainer)
        before = dict(self._ranking.scores)
        name = file_name(self.filename, {**trainer.callback_metrics, **self.file_name_values(trainer)})
        names = [name] if ranked and self._is_kept(trainer, name) else []
        if self.save_last or not ranked:
            names.append(LAST)
        progress = trainer.progress
        self._place, self._steps, self._validations = place(trainer), progress.global_step, progress.validations
        self._time = time.monotonic()
        if not names:
            return
        self._path = self._folder.path / names[0]
        content = checkpoints.gather(trainer)
        if not trainer.is_global_zero:
            return
        content = storage.loadable(content)
        write = partial(self._folder.write, names=names, surplus=list(self._ranking.surplus))
        if not self.in_background:
            self._settle(trainer, before, partial(write, content))
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = before, self._thread.submit(write, self._copies.copy(content))

    def _is_kept(self, trainer: Trainer, name: str) -> bool:
        """Takes the checkpoint at hand among those that are kept, where it is good enough."""
        if self.monitor is None:
            return self._ranking.take(name, None)
        assert self._metric is not None
        score = float(self._metric.value(trainer)) if self._is_new else None
        if self._metric.is_missing(trainer) and (trainer.progress.epochs_done > 0 or not trainer.should_stop):
            last = "only the last checkpoint is" if self.save_last else "nothing is"
            self._metric.report_missing(trainer, strict=False, remedy=f"Until then {last} kept.")
        score = trainer.processes.broadcast(score)  # what is logged on step is each process's own
        return score is not None and self._ranking.take(name, score)

    def wait(self, trainer: Trainer) -> None:
        """Waits for the thread, and says what became of its file."""
        if self._writing is not None:
            (before, future), self._writing = self._writing, None
            self._settle(trainer, before, future.result)

    def _settle(self, trainer: Trainer, before: dict[str, float | None], written: Callable[[], None]) -> None:
        """Publishes that a file is written; where it could not be, what was kept before it still is."""
        try:
            written()
        except OSError as error:
            path, self._path, self._place = self._path, None, None
            self._ranking.scores = before
            self._ranking.surplus = [name for name in self._ranking.surplus if name not in before]
            there = [kept.name for kept in self._folder.newest()]
            message = (
                f"ModelCheckpoint could not write {path}: {storage.first_line(error)}. What was there is intact: {there}. Free "
                "or choose another place; ModelCheckpoint(on_error='warn') lets a run go on without the checkpoint."
            )
            if self.on_error == "raise":
                raise OSError(error.errno or errno.EIO, message) from error
            warnings.warn(message, stacklevel=2)
        else:
            assert self._path is not None
            self._ranking.surplus.clear()
            trainer.signals.checkpoint_saved.publish(CheckpointSaved(os.fspath(self._path)))

    # ------------------------------------------------------------------ what there is

    def _best(self) -> list[Path]:
        """The kept files, best first; those of a run in another process by what its newest checkpoint says."""
        if not self.kept and (content := storage.read_first(self._folder.newest())[1]) is not None:
            self._ranking.scores = dict(content["callbacks"].get(self.state_key, {}).get("kept", {}))
        return [path for name in self._ranking.best() if (path := self._folder.path / name).exists()]

    @property
    def kept(self) -> dict[str, float | None]:
        """The files that are kept besides the last, by name, oldest first, with the metric's value; None without one."""
        return self._ranking.scores

    @property
    def best_model_path(self) -> str:
        """The best file of the run, without ``monitor`` the newest; empty where there is none."""
        return next((os.fspath(path) for path in self._best()), "")

    @property
    def best_model_score(self) -> float | None:
        """The best file's value of the monitored metric; None where there is none."""
        return self.kept.get(Path(self.best_model_path).name)

    @property
    def last_model_path(self) -> str:
        """The newest file in the folder; empty where there is none."""
        return next((os.fspath(path) for path in self._folder.newest()), "")

    # ------------------------------------------------------------------ state

    @property
    def state_key(self) -> str:
        # Neither by the folder nor by the names: a run may go on in another place, and under others.
        every = (self.every_n_steps, self.every_n_epochs, self.every_n_minutes)
        return f"{type(self).__qualname__}({self.monitor}, {self.mode}, {every})"

    def state_dict(self) -> dict[str, Any]:
        return {
            "kept": dict(self.kept),
            "surplus": list(self._ranking.surplus),
            "steps": self._steps,
            "validations": self._validations,
            "seen": 0 if self._metric is None else self._metric.seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._ranking.scores, self._ranking.surplus = dict(state["kept"]), list(state["surplus"])
        self._steps, self._validations = state["steps"], state["validations"]
        if self._metric is not None:
            self._metric.seen = state["seen"]


def place(trainer: Trainer) -> tuple[Any, ...]:
    """What tells the safe point at hand from others: a validation that is due may lie between two of one batch."""
    progress = trainer.progress
    return progress.total_batch_idx, progress.validated_at, progress.epochs_done
