"""Notices: short messages from one process to all, over the store of the process group. Without one, nothing is sent."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed.distributed_c10d import PrefixStore, Store

T = TypeVar("T")
Handler = Callable[[int, Any], None]

END, FAILED = "end", "failed"
"""The kinds of notices after which a process hears no more."""

FOREVER = timedelta(days=3650)
STORE_IS_GONE = (
    "the process that holds it (torchrun's on the first machine, or rank 0) was ended, or the network is down. Look at the "
    "errors of the other processes."
)
SOON = 2.0  # seconds in which a store that works delivers a notice


class ExchangeError(RuntimeError):
    """An exchange between processes has failed: another process has failed, or has not come in time, or the link is down.

    Example:
        >>> raise ExchangeError("the requests after batch 7: rank 1 has not answered in 60 s")
        Traceback (most recent call last):
        eventtrain.callbacks.distributed.notices.ExchangeError: the requests after batch 7: rank 1 has not answered in 60 s
    """


class Notices:
    """The notices of one run, as one process hears and posts them.

    Every process hears all notices, also its own, in the same order, in a thread that waits in the store and needs no time
    while there is none. All methods except :meth:`hear` may be called in any thread.

    Args:
        store: The store of the process group; under a prefix that only this run has.
        rank: The rank of this process.
        world_size: The number of processes.
        timeout: How long a process waits for the others.

    Attributes:
        changed: Notified after each notice. Handlers run while it is locked, so it guards the state that they share with
            other threads.
        failure: The first process that has failed, with its error: ``(rank, text)``; None if none has.

    Example:
        >>> from datetime import timedelta
        >>> from torch.distributed import HashStore
        >>> heard = []
        >>> notices = Notices(HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=10))
        >>> notices.on("greeting", lambda rank, content: heard.append((rank, content)))
        >>> notices.open()
        >>> number = notices.post("greeting", {"words": ["good", "morning"]}, acknowledged=True)
        >>> notices.wait_until_heard(number, "a greeting")
        >>> notices.close()
        >>> heard
        [(0, {'words': ['good', 'morning']})]
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: timedelta) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.changed = threading.Condition()
        self.failure: tuple[int, str] | None = None
        self._handlers: dict[str, Handler] = {FAILED: self._on_failed}
        self._store = store
        self._store_of_thread = clone(store)
        self._thread = threading.Thread(target=self._listen, daemon=True, name="eventtrain-notices")
        self._broken: Exception | None = None
        self._is_over = False

    def on(self, kind: str, handler: Handler) -> None:
        """Have a kind of notices handled. Each kind has one handler.

        Args:
            kind: The kind.
            handler: Called as ``handler(rank, content)`` in the thread of the notices, which it must not keep waiting.
        """
        self._handlers[kind] = handler

    def open(self) -> None:
        """Begin to hear. Notices that others have posted before are heard too."""
        self._thread.start()
        atexit.register(self.end)

    def post(self, kind: str, content: Any, *, acknowledged: bool = False) -> int:
        """Tell all processes something.

        Args:
            kind: The kind.
            content: Plain data: text, numbers, lists, dicts with text as keys, and None.
            acknowledged: Whether the processes tell that they have heard it, for :meth:`wait_until_heard`.

        Returns:
            The number of the notice, from 1.

        Raises:
            ExchangeError: If the store does not take it in time.
        """
        store = self.store

        def write() -> int:
            number = store.add("notices", 1)
            store.set(f"notice/{number}", json.dumps([self.rank, kind, content, acknowledged]))
            return number

        return self.in_time(write)

    def in_time(self, action: Callable[[], T], *, longer: float = 0.0) -> T:
        """Return the result of an action on the store, which waits without a limit if the network is down.

        Args:
            action: The action. The thread of the notices calls it directly.
            longer: Seconds in addition to the timeout.

        Raises:
            ExchangeError: If the store does not answer in time.
        """
        if threading.current_thread() is self._thread:
            return action()
        result = within(self.timeout.total_seconds() + longer, lambda: [action()])
        if result is None:
            raise ExchangeError(f"Rank {self.rank} cannot reach the store of the process group: {STORE_IS_GONE}")
        value: T = result[0]
        return value

    def wait_until_heard(self, number: int, exchange: str) -> None:
        """Wait until every process has handled a notice.

        Args:
            number: The number of the notice, which was posted with ``acknowledged=True``.
            exchange: A name for the exchange, for errors.

        Raises:
            ExchangeError: If a process fails or does not answer in time.
        """
        store, deadline = self.store, time.monotonic() + self.timeout.total_seconds()

        def count_them() -> int:
            pause = 1e-4
            while (count := store.add(f"heard/{number}", 0)) < self.world_size:
                if self.failure is not None or self._broken is not None or time.monotonic() > deadline:
                    break
                time.sleep(pause)
                pause = min(2 * pause, 0.01)
            return count

        if (count := self.in_time(count_them, longer=SOON)) < self.world_size:
            self.check(exchange)
            raise self._late(exchange, f"{self.world_size - count} of {self.world_size} processes have not heard it")

    def wait_for(self, condition: Callable[[], T], exchange: str, missing: Callable[[], str]) -> T:
        """Wait until a condition holds that notices change. :attr:`changed` has to be locked.

        Args:
            condition: Asked after each notice; true if the wait is over.
            exchange: A name for the exchange, for errors.
            missing: Returns who or what did not come, for the error after the timeout.

        Returns:
            The value of the condition.

        Raises:
            ExchangeError: If a process fails, or the condition does not hold in time.
        """
        deadline = time.monotonic() + self.timeout.total_seconds()
        while not (value := condition()):
            self.check(exchange)
            if (left := deadline - time.monotonic()) <= 0:
                raise self._late(exchange, missing())
            self.changed.wait(left)
        return value

    def check(self, exchange: str) -> None:
        """Raise an error if an exchange cannot succeed any more.

        Args:
            exchange: Its name.

        Raises:
            ExchangeError: If a process has failed, or the store is gone.
        """
        if self.failure is not None:
            rank, text = self.failure
            raise ExchangeError(
                f"Rank {rank} has failed with {text.rstrip('.')}. Rank {self.rank} waited for it in {exchange}."
            )
        if self._broken is not None:
            raise ExchangeError(
                f"{exchange}: rank {self.rank} has lost the store of the process group ({self._broken}): {STORE_IS_GONE}"
            ) from self._broken

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process ends by an error, unless they know of another one.

        Args:
            error: The error.
        """
        if self._thread.is_alive() and self.failure is None and self._broken is None:
            within(SOON, lambda: self.post(FAILED, summary(error)))

    def close(self) -> None:
        """End the notices of a run that no process has failed in. The others hear it from rank zero, when it comes here."""
        if self.rank == 0 and self._thread.is_alive() and self.failure is None and self._broken is None:
            within(SOON, lambda: self.post(END, None))
            self._thread.join(SOON)

    def end(self) -> None:
        """Make sure that the thread has ended, before the interpreter does: a thread that comes back from the store later would
        abort the process."""
        atexit.unregister(self.end)
        self._thread.join(SOON / 4)
        if self._thread.is_alive():
            if within(SOON, lambda: self.post(END, None)) is None:
                return  # the store is gone, and with it the thread's reason to come back
            self._thread.join(SOON)

    @property
    def store(self) -> Store:
        """The store, for this thread: one that waits there keeps its connection busy."""
        return self._store_of_thread if threading.current_thread() is self._thread else self._store

    def _listen(self) -> None:
        store = self._store_of_thread
        try:
            for number in itertools.count(1):
                store.wait([f"notice/{number}"], FOREVER)
                rank, kind, content, is_acknowledged = json.loads(store.get(f"notice/{number}"))
                with self.changed:
                    if kind in self._handlers:
                        self._handlers[kind](rank, content)
                    self.changed.notify_all()
                if is_acknowledged:
                    store.add(f"heard/{number}", 1)
                if kind in (END, FAILED):
                    return
        except Exception as error:  # shown to the main thread, which must not wait for this one
            with self.changed:
                self._broken = error
                self.changed.notify_all()

    def _on_failed(self, rank: int, text: str) -> None:
        self.failure = rank, text

    def _late(self, exchange: str, missing: str) -> ExchangeError:
        return ExchangeError(f"{exchange}: {missing}, and rank {self.rank} has waited {self.timeout.total_seconds():g} s.")


def clone(store: Any) -> Store:
    """Return another connection to a store, for another thread."""
    another: Store = store.clone()
    return another


NUMBERS = itertools.count()


def open_notices(store: Store, rank: int, world_size: int, timeout: timedelta) -> Notices:
    """Begin the notices of a run, under a prefix of its own: each process has had the same number of runs.

    Args:
        store: The store of the process group.
        rank: The rank of this process.
        world_size: The number of processes.
        timeout: How long a process waits for the others.
    """
    return Notices(PrefixStore(f"eventtrain/{next(NUMBERS)}", store), rank, world_size, timeout)


def summary(error: BaseException) -> str:
    """Return an error in one line: its class, its first line, and the place in the run if it is known."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Original Traceback" in str(error):  # of a loader's worker
        return lines[-1]
    places = [note for note in getattr(error, "__notes__", ()) if note.startswith("raised in ")]
    return f"{type(error).__name__}{': ' if lines else ''}{lines[0] if lines else ''}{f' ({places[0]})' if places else ''}"


def within(seconds: float, action: Callable[[], Any]) -> Any:
    """Return the result of an action on the store; None if it fails or takes longer, because the store is gone.

    Args:
        seconds: How long to wait.
        action: The action.
    """
    results: list[Any] = []

    def act() -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: the caller goes on without an answer
            results.append(action())

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
