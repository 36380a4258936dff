"""End a run by a signal without losing it: write a checkpoint at the next safe point, and exit with the signal's status."""

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

# Seconds in which a repeated signal counts as the first one: a launcher may send it to the group and forward it besides.
ECHO = 1.0

ON_ITS_WAY = 0.2  # seconds until a signal that has ended a worker has surely reached this process too


class Preemption(Callback):
    """Ends a fit when the process gets a signal; ``fit(ckpt_path="last")`` resumes from a checkpoint of the next safe point.

    The current batch is completed. A validation is left at its next batch, and repeated by the resumed run. ``fit`` then
    raises ``SystemExit(128 + number)``, or ``KeyboardInterrupt`` for SIGINT, so that the process ends with the status that
    tells its scheduler to start it again. A second signal ends the run at once, as if this callback were not attached; a
    repeated signal other than SIGINT is ignored for a second. If one of several processes gets a signal, all of them end,
    once the checkpoint is written. On SLURM::

        #SBATCH --signal=USR1@120 --requeue
        srun python train.py
        [ $? -eq 138 ] && scontrol requeue $SLURM_JOB_ID  # 128 + SIGUSR1: two minutes before the time limit

    Listens to ``fit_start``, to install its signal handlers, and to ``teardown``, to put the earlier handlers back, also
    after an error; separate validations, tests and predictions have nothing to save, and end as they do without this
    callback. The handler calls ``trainer.interrupt``; ``run_interrupted`` ends the process. A signal that comes before
    training ends the run at ``train_start``, without a checkpoint; a signal after the last safe point ends it at ``fit_end``,
    with one. Listens to ``after_batch_fetch`` for one batch, and to ``find_checkpoint``. Reads nothing from the device, emits
    nothing, and writes to the standard error that a signal came and which file holds the checkpoint.

    Signals that the process ignores stay ignored. Python delivers signals to the main thread only: ``fit`` warns if it runs
    in another thread. If the whole process group gets a signal, forked data loading workers leave it to the trainer. SIGTERM
    ends them, and so does every signal if they are spawned; that is an error only if one of them still owes a batch.

    Override :meth:`end_run` for another policy.

    Args:
        signals: Names or numbers of the signals; None for SIGTERM, SIGINT and, if the system has it, SIGUSR1.

    Raises:
        MisconfigurationError: If a signal does not exist, or if no process can handle it.

    Attributes:
        received: The number of the signal that came in this fit, or in the last one; None if none came.

    Example:
        >>> preemption = Preemption(["SIGTERM", "SIGINT"])
        >>> trainer = Trainer(max_epochs=90, callbacks=[preemption])
        >>> [signal.name for signal in preemption.signals]
        ['SIGTERM', 'SIGINT']
    """

    role = "preemption"

    def __init__(self, signals: Iterable[str | int] | None = None) -> None:
        self.signals = parse(signals)
        self.received: int | None = None
        self._when = 0.0
        self._pid = 0
        self._is_over = False  # this callback has done all that it does about the signal
        self._installed: dict[int, tuple[Any, Any]] = {}  # by number the handler, and the one before

    def end_run(self, trainer: Trainer, signum: int) -> None:
        """Decide how the run ends once the checkpoint is written. If this returns, ``fit`` returns too.

        Args:
            trainer: The trainer, which was asked to stop.
            signum: The signal's number; SIGTERM if only another process got one.

        Raises:
            KeyboardInterrupt: For SIGINT.
            SystemExit: For other signals; the status is the number plus 128.
        """
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signum)

    # ------------------------------------------------------------------ events

    def on_find_checkpoint(self, trainer: Trainer, event: FindCheckpoint) -> None:
        if event.which == "last":
            event.offer()  # no file, so that the first job of a run starts without one; the trainer finds its own

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        self.received, self._is_over = None, False
        self._pid = os.getpid()
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "Preemption: Python delivers signals to the main thread only, and fit runs in another one. A signal ends this "
                "run without a checkpoint. Call fit in the main thread.",
                stacklevel=2,
            )
            return
        handler = partial(self._receive, trainer)
        for number in self.signals:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not installed by Python
                self._install(number, handler)

    def on_train_start(self, trainer: Trainer, event: TrainStart) -> None:
        if trainer.processes.any(self._is_asked):
            self._end(trainer, None)
        trainer.listen(self.on_after_batch_fetch)

    def on_run_interrupted(self, trainer: Trainer, event: RunInterrupted) -> None:
        if event.reason == self._reason:  # also if a second signal came while the checkpoint was written
            self._is_over = False
        if trainer.processes.any(self._is_asked):
            self._end(trainer, event.path)

    def on_fit_end(self, trainer: Trainer, event: FitEnd) -> None:
        if trainer.processes.any(self._is_asked):
            self._end(trainer, trainer.keep_checkpoint(self._reason))

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        self._restore()  # first, so that no signal comes after the test
        if self._is_asked:
            self._is_over = True
            self.end_run(trainer, self.received or signal.SIGTERM)

    def _end(self, trainer: Trainer, path: str | None) -> None:
        """Report the checkpoint, and end the run by the policy."""
        self._is_over = True
        trainer.stop(self._reason, force=True, by_all=True)
        if path is not None and trainer.is_global_zero:
            say(f"{self._reason}: the checkpoint is {path}")
        self.end_run(trainer, self.received or signal.SIGTERM)

    @property
    def _is_asked(self) -> bool:
        return self.received is not None and not self._is_over

    @property
    def _reason(self) -> str:
        return f"Preemption: {signal.Signals(self.received or signal.SIGTERM).name}"

    # ------------------------------------------------------------------ signals

    def _receive(self, trainer: Trainer, signum: int, frame: FrameType | None) -> None:
        """Handle a signal. This runs between any two instructions of the main thread, so it only writes attributes."""
        if os.getpid() != self._pid:  # a forked worker, which ends with the trainer, or by terminate()
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                signal.raise_signal(signum)
        elif self.received is None:
            self.received, self._when = signum, time.monotonic()
            trainer.interrupt(self._reason)
            if trainer.is_global_zero:
                name = signal.Signals(signum).name
                say(f"{name}: the run ends with a checkpoint at the next safe point; a second signal ends it at once")
        elif signum != self.received or signum == signal.SIGINT or time.monotonic() - self._when > ECHO:
            self._is_over = True
            trainer.interrupt(None)  # the earlier handler may let the run continue
            self._restore()
            signal.raise_signal(signum)

    @on_demand
    def on_after_batch_fetch(self, trainer: Trainer, event: AfterBatchFetch) -> None:
        """Wrap the handler of SIGCHLD that torch has installed before the first batch of training.

        A signal that ends this process's workers may reach them first. torch's handler would raise an error for that in the
        middle of a batch. If the loader still waits for such a worker, it raises its own error.
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
        """Put the earlier handlers back, except for signals that got another handler since."""
        while self._installed:
            number, (handler, before) = self._installed.popitem()
            if signal.getsignal(number) is handler:
                signal.signal(number, before)


def parse(names: Iterable[str | int] | None) -> tuple[signal.Signals, ...]:
    """Return signals by their names or numbers.

    Args:
        names: The names and numbers; None for the signals of :data:`DEFAULT` that the system has.

    Raises:
        MisconfigurationError: If there is no signal, if one does not exist, or if one cannot be handled.
    """
    if names is None:
        return tuple(signal.Signals[name] for name in DEFAULT if hasattr(signal, name))
    parsed: dict[signal.Signals, None] = {}
    for name in [names] if isinstance(names, (str, int)) else names:
        try:
            number = signal.Signals[name] if isinstance(name, str) else signal.Signals(name)
        except (KeyError, ValueError):
            hint = nearest(str(name), signal.Signals.__members__, otherwise=f"Write names, such as {DEFAULT}.")
            raise MisconfigurationError(f"Preemption(signals={names!r}): this system has no signal {name!r}. {hint}") from None
        if number.name in ("SIGKILL", "SIGSTOP", "SIGCHLD"):
            raise MisconfigurationError(
                f"Preemption(signals={names!r}): {number.name} cannot ask a run to end. Write other signals, such as {DEFAULT}."
            )
        parsed[number] = None
    if not parsed:
        raise MisconfigurationError(f"Preemption(signals={names!r}): there is no signal. Write {DEFAULT}, or None for these.")
    return tuple(parsed)


def say(text: str) -> None:
    """Write a line to the process's standard error, past Python's buffers, which a signal handler must not enter again."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
