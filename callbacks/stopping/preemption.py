"""Ends a run by a signal without losing it: it saves at the next safe point and exits with the signal's status."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

from eventtrain.callback import Callback, on_demand
from eventtrain.errors import MisconfigurationError, nearest
from eventtrain.events import AfterBatchFetch, FindCheckpoint, FitEnd, FitStart, RunInterrupted, Teardown, TrainStart
from eventtrain.trainer import Trainer

DEFAULT = ("SIGTERM", "SIGINT", "SIGUSR1")
ECHO = 1.0  # seconds in which a signal that comes again is one request that was sent to a group and forwarded by its leader

ON_ITS_WAY = 0.2  # seconds in which a signal that has ended a worker may still reach this process


class Preemption(Callback):
    """Ends a fit that is sent a signal: with a checkpoint at the next safe point, from which ``fit(ckpt_path="last")`` goes on.

    The batch at hand is completed. A validation is left at its next batch, and runs again after the resume. ``fit`` then
    raises ``SystemExit(128 + number)``, ``KeyboardInterrupt`` for SIGINT, so that the process ends with the status that tells
    its scheduler to start it again. A second signal ends the run at once, as if this callback were not there; one other than
    SIGINT that comes again within a second is taken for the first. With several processes all end where any got a signal, and
    not before the checkpoint is written. On SLURM::

        #SBATCH --signal=USR1@120 --requeue
        srun python train.py
        [ $? -eq 138 ] && scontrol requeue $SLURM_JOB_ID  # 128 + SIGUSR1: two minutes before the time limit

    Listens to ``fit_start``, where it takes the signals over, and to ``teardown``, where it gives them back, after an error
    too: validation, tests and predictions by themselves have nothing to save and end as ever. Connects to ``safe_point`` at
    ``train_start``, so that it comes after those who listen there. A signal that comes before training begins ends the run at
    ``train_start``, without a checkpoint; one after the last safe point at ``fit_end``, with one. It reads nothing from the
    device, and says on the process's error output that a signal came and where the checkpoint is.

    Signals that the process ignores stay ignored. Python hands signals to the main thread alone: a fit in another warns that
    it can't be ended by one. Where the whole process group gets a signal, forked data loading workers leave it to the trainer;
    of SIGTERM, and where they are spawned of any, they die, which is an error only if a batch has still to come from one.

    Args:
        signals: Their names or numbers; None for SIGTERM, SIGINT and, where the system has it, SIGUSR1.

    Raises:
        MisconfigurationError: A signal that does not exist, or that no process can handle.

    Attributes:
        received: The number of the signal that came in this fit, or in the last; None where none did.
    """

    role = "preemption"

    def __init__(self, signals: Iterable[str | int] | None = None) -> None:
        self.signals = parse(signals)
        self.received: int | None = None
        self._when = 0.0
        self._pid = 0
        self._is_over = False  # it was asked to end, by all that this callback does about it
        self._installed: dict[int, tuple[Any, Any]] = {}  # by number the handler, and the one before

    def end_run(self, trainer: Trainer, signum: int) -> None:
        """The policy: how the run ends, once the checkpoint is written. Where this returns, ``fit`` returns too.

        Args:
            trainer: The trainer, which has been asked to stop.
            signum: The signal's number; SIGTERM's where another process got it.

        Raises:
            KeyboardInterrupt: For SIGINT.
            SystemExit: For others, with 128 and the number as the status.
        """
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signum)

    # ------------------------------------------------------------------ events

    def on_find_checkpoint(self, trainer: Trainer, event: FindCheckpoint) -> None:
        if event.which == "last":
            event.offer()  # none of its own, so that a run's first job begins anew; what the trainer keeps it finds itself

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        self.received, self._is_over = None, False
        self._pid = os.getpid()
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "Preemption: signals can't be handled in a thread other than the main one, so that they end this run without "
                "a checkpoint. Call fit in the main thread.",
                stacklevel=2,
            )
            return
        handler = partial(self._receive, trainer)
        for number in self.signals:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not installed by Python
                self._install(number, handler)

    def on_train_start(self, trainer: Trainer, event: TrainStart) -> None:
        if trainer.processes.any(self.received is not None):
            self._end(trainer, None)
        trainer.listen(self.on_after_batch_fetch)

    def on_run_interrupted(self, trainer: Trainer, event: RunInterrupted) -> None:
        if trainer.processes.any(self.received is not None):
            self._end(trainer, event.path)

    def on_fit_end(self, trainer: Trainer, event: FitEnd) -> None:
        if not self._is_over and trainer.processes.any(self.received is not None):
            self._end(trainer, trainer.keep_checkpoint(self._reason()))

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        self._restore()  # before the look, so that none comes in between
        if self.received is not None and not self._is_over:
            self._is_over = True
            self.end_run(trainer, self.received)

    def _end(self, trainer: Trainer, path: str | None) -> None:
        """Say where the run is kept, and end it by the policy."""
        if self._is_over:
            return
        self._is_over = True
        trainer.stop(self._reason(), force=True, by_all=True)
        if path is not None and trainer.is_global_zero:
            say(f"{self._reason()}: the run is kept in {path}")
        self.end_run(trainer, self.received or signal.SIGTERM)

    def _reason(self) -> str:
        return f"Preemption: {signal.Signals(self.received or signal.SIGTERM).name}"

    # ------------------------------------------------------------------ signals

    def _receive(self, trainer: Trainer, signum: int, frame: FrameType | None) -> None:
        """The handler. It runs between any two instructions of the main thread: it only writes attributes."""
        if os.getpid() != self._pid:  # a forked worker, which ends when the trainer does, or by terminate()
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                signal.raise_signal(signum)
        elif self.received is None:
            self.received, self._when = signum, time.monotonic()
            trainer.interrupt(self._reason())
            if trainer.is_global_zero:
                name = signal.Signals(signum).name
                say(f"{name}: the run saves at the next safe point and ends; a second one ends it at once")
        elif signum != self.received or signum == signal.SIGINT or time.monotonic() - self._when > ECHO:
            self._is_over = True
            self._restore()
            signal.raise_signal(signum)

    @on_demand
    def on_after_batch_fetch(self, trainer: Trainer, event: AfterBatchFetch) -> None:
        """Outlive workers: for the first batch of training, before which torch has installed a handler.

        Workers that got the same signal may die of it, and one may before this process has got it: torch's handler would make
        that an error in the midst of a batch. One that is still waited for is an error of the loader's all the same.
        """
        trainer.stop_listening(self.on_after_batch_fetch)
        before = signal.getsignal(signal.SIGCHLD) if self._installed and hasattr(signal, "SIGCHLD") else None
        if callable(before):

            def handler(signum: int, frame: FrameType | None) -> None:
                try:
                    before(signum, frame)
                except RuntimeError:
                    if self.received is None:
                        time.sleep(ON_ITS_WAY)  # Python calls other handlers meanwhile
                    if self.received is None:
                        raise

            self._install(signal.SIGCHLD, handler)

    def _install(self, number: int, handler: Callable[[int, FrameType | None], None]) -> None:
        self._installed[number] = handler, signal.getsignal(number)
        signal.signal(number, handler)

    def _restore(self) -> None:
        """Gives the signals back; those that somebody else has taken over since stay as they are."""
        while self._installed:
            number, (handler, before) = self._installed.popitem()
            if signal.getsignal(number) is handler:
                signal.signal(number, before)


def parse(given: Iterable[str | int] | None) -> tuple[signal.Signals, ...]:
    """Signals by their names or numbers.

    Args:
        given: The names and numbers; None for those of :data:`DEFAULT` that the system has.

    Raises:
        MisconfigurationError: There are none, one does not exist, or one cannot be handled.
    """
    if given is None:
        return tuple(signal.Signals[name] for name in DEFAULT if hasattr(signal, name))
    parsed: dict[signal.Signals, None] = {}
    for each in [given] if isinstance(given, (str, int)) else given:
        try:
            number = signal.Signals[each] if isinstance(each, str) else signal.Signals(each)
        except (KeyError, ValueError):
            hint = nearest(str(each), signal.Signals.__members__, otherwise=f"Write names, such as {DEFAULT}.")
            raise MisconfigurationError(f"Preemption(signals={given!r}): this system has no signal {each!r}. {hint}") from None
        if number.name in ("SIGKILL", "SIGSTOP", "SIGCHLD"):
            raise MisconfigurationError(
                f"Preemption(signals={given!r}): {number.name} can't ask a run to end. Write others, such as {DEFAULT}."
            )
        parsed[number] = None
    if not parsed:
        raise MisconfigurationError(f"Preemption(signals={given!r}): there is none. Write {DEFAULT}, or None for these.")
    return tuple(parsed)


def say(text: str) -> None:
    """Writes a line to the process's error output, past Python's buffers, which a signal's handler must not enter again."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
