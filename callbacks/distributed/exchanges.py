"""Wait for other processes: name each exchange, notice that it cannot end, and say which process is missing."""

from __future__ import annotations

import inspect
import sys
import sysconfig
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions, Store  # type: ignore[attr-defined]

import eventtrain
from eventtrain.callbacks.distributed.notices import ExchangeError, Notices, summary, within
from eventtrain.checkpoint import storage

HEADER = 256
"""The bytes that each exchange begins with: its key, a part of its name, and its content if that is short."""
NAME = 96
INLINE = HEADER - NAME - 12
LONG = timedelta(days=30)  # for gloo: how long an exchange waits is decided here
LOOK = 1.0  # seconds after which a process that waits looks after the others
LOST = 30.0  # seconds in which a store that did not answer is not asked again
ANSWER = 2.0  # seconds in which a process that is alive answers

T = TypeVar("T")
ROOM = Path(__file__).parent
INNER = tuple(str(ROOM / name) for name in ("exchanges.py", "processes.py", "compact.py", "sharded_tensors.py"))
OURS = (str(Path(eventtrain.__file__).parent), str(ROOM.parent), str(ROOM.parent.resolve()))
LIBRARIES = (str(Path(torch.__file__).parent), sysconfig.get_path("stdlib"), "<")
RUNS = {"Trainer.fit", "Trainer.validate", "Trainer.test", "Trainer.predict"}
SLOW_FILES = (storage.__file__, str(ROOM.parent / "checkpointing" / "folder.py"), str(ROOM / "sharded_checkpoint.py"))
SLOW_FUNCTIONS = {"prepare_data", "ModelCheckpoint.wait"}
"""Code that may take longer than the timeout. As long as a process answers and is in it, the others wait."""
NAMES = {
    "read_checkpoint": "finding the checkpoint",
    "gather": "gathering the state for a checkpoint",
    "StopRequest.take_up": "the agreement on requests",
    "average_gradients": "averaging gradients",
    "ReadTogether.__call__": "the question whether all processes have another batch",
    "ReadTogether._begin": "the question whether all processes have another batch",
}


GIVEN_UP: list[tuple[str, Any]] = []
"""Exchanges that this process does not wait for any more, by name, with torch's work, which does not end."""


class Exchange(NamedTuple):
    """One exchange, as one process has entered it.

    Attributes:
        number: How many exchanges the process has entered in its run.
        key: Equal in all processes that have entered the same exchange.
        name: Its name, for errors.
        tick: How many ticks the process had passed.
    """

    number: int
    key: int
    name: str
    tick: Any


class Exchanges:
    """The exchanges of one process with the others.

    While a process waits, it asks each second where the missing ones are. A thread of theirs answers. So an exchange costs
    nothing more if nobody is late.

    Args:
        rank: The rank of this process.
        world_size: The number of processes.
        timeout: How long an exchange waits.
        store: The store of the process group.

    Attributes:
        notices: The notices of the current run; None before the first.
    """

    def __init__(self, rank: int, world_size: int, timeout: timedelta, store: Store) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout.total_seconds()
        self.notices: Notices | None = None
        self._store = store
        self._number = 0
        self._current: Exchange | None = None
        self._thread = threading.get_ident()
        self._place: Callable[[], str] = str
        self._tick: Callable[[], Any] = int
        self._answers: dict[int, dict[str, Any]] = {}
        self._asked: tuple[int, float] = (0, 0.0)  # an exchange, and when somebody asked for it
        self._store_is_lost = -LOST

    def begin_run(self, notices: Notices, place: Callable[[], str], tick: Callable[[], Any] = int) -> None:
        """Begin the exchanges of a run.

        Args:
            notices: The notices of the run.
            place: Returns the place in the run, for errors.
            tick: Returns a value that grows whenever the process passes a place that all processes pass.

        Raises:
            ExchangeError: If the processes are not in step any more, because one has given up an exchange.
        """
        if GIVEN_UP:
            raise ExchangeError(
                f"Rank {self.rank} has given up an exchange ({GIVEN_UP[0][0]}) in an earlier run, so the processes are not "
                "in step any more. Start them again."
            )
        self.notices, self._place, self._tick = notices, place, tick
        self._number, self._current, self._thread = 0, None, threading.get_ident()
        self._answers.clear()
        notices.on("where", self._on_where)
        notices.on("here", self._on_here)

    # ------------------------------------------------------------------ waiting

    def share(self, kind: str, content: bytes, group: Any) -> tuple[list[bytes], list[int]]:
        """Exchange a short content with all processes. Each exchange begins with it, so that none is mistaken for another.

        Args:
            kind: The kind of the exchange.
            content: The content of this process.
            group: A group of gloo.

        Returns:
            The contents of all processes by rank, empty if they are too long, and their lengths.

        Raises:
            ExchangeError: If another process fails, is in another exchange, goes on without it, or does not come in time.
        """
        exchange = self._enter(kind)
        head = b"".join(
            (
                exchange.key.to_bytes(4, "little"),
                len(content).to_bytes(8, "little"),
                exchange.name.encode()[:NAME].ljust(NAME),
                content if len(content) <= INLINE else b"",
            )
        )
        sent = torch.frombuffer(bytearray(head.ljust(HEADER, b"\0")), dtype=torch.uint8)
        received = [torch.empty_like(sent) for _ in range(self.world_size)]
        options = AllgatherOptions()
        options.timeout, options.asyncOp = LONG, True
        self.wait(group.allgather([received], [sent], options), exchange)
        heads = [bytes(each.tolist()) for each in received]
        others = {int.from_bytes(each[:4], "little"): (rank, each) for rank, each in enumerate(heads)}
        if len(others) > 1:
            del others[exchange.key]
            rank, other = min(others.values())
            name = other[12 : 12 + NAME].decode(errors="ignore").strip()
            same = f" ({kind}, number {exchange.number} of the run)" if exchange.name.startswith(name) else ""
            mine = f"rank {self.rank} in {exchange.name}{same}"
            raise ExchangeError(f"The processes are in different exchanges: {mine}, and rank {rank} in {name}. {ADVICE}")
        lengths = [int.from_bytes(each[4:12], "little") for each in heads]
        start = 12 + NAME
        contents = [each[start : start + size] if size <= INLINE else b"" for each, size in zip(heads, lengths, strict=True)]
        return contents, lengths

    def wait(self, work: Any, exchange: Exchange | None = None) -> None:
        """Wait until an asynchronous operation of gloo has ended.

        Args:
            work: The operation.
            exchange: The exchange that it belongs to; None for one that begins with it.

        Raises:
            ExchangeError: If another process fails, goes on without the exchange, or does not come in time.
        """
        exchange = exchange or self._enter("wait")
        look = min(LOOK, self.timeout / 4)
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                work.wait(timedelta(seconds=look))
                break
            except RuntimeError as error:
                if work.is_completed():
                    raise self.explanation(exchange.name, error) from error
            try:
                if self._look_after_others(exchange):
                    deadline = time.monotonic() + self.timeout
                if time.monotonic() > deadline:
                    raise self._late(exchange)
            except ExchangeError:
                GIVEN_UP.append((exchange.name, work))
                raise
        self._current = None

    def _enter(self, kind: str) -> Exchange:
        self._number += 1
        caller, name = called_from(inspect.currentframe(), kind)
        key = zlib.crc32(f"{self._number} {caller}".encode())
        self._current = exchange = Exchange(self._number, key, name, self._tick())
        return exchange

    # ------------------------------------------------------------------ looking after others

    def _look_after_others(self, exchange: Exchange) -> bool:
        """Raise if an exchange cannot end; return whether another process is in code that may take long."""
        self._check(exchange.name)
        answers = [(rank, each) for rank, each in list(self._answers.items()) if each["for"] == exchange.number]
        for rank, answer in answers:
            if answer["number"] < exchange.number and answer["tick"] > exchange.tick:
                raise ExchangeError(
                    f"{exchange.name}: all processes take part in it, but rank {rank} goes on without it: {answer['text']}. "
                    f"{ADVICE}"
                )
        asked, at = self._asked
        if asked < exchange.number or time.monotonic() - at >= LOOK:
            self._ask(exchange.number, everyone=False)
        return any(each["is_slow"] and time.monotonic() - each["time"] < ANSWER for _, each in answers)

    def _check(self, name: str) -> None:
        """Raise if a process has failed, or has ended its program."""
        if self.notices is not None:
            self.notices.check(name)
        for rank, text in self._departed().items():
            if text and self.notices is not None:  # it has told its error before; that notice may be on its way
                with self.notices.changed:
                    self.notices.changed.wait_for(lambda: self.notices is not None and self.notices.failure is not None, ANSWER)
                self.notices.check(name)
            advice = "" if text else f" {ADVICE}"
            raise ExchangeError(f"Rank {rank} has ended its program{text}. Rank {self.rank} waited for it in {name}.{advice}")

    def _departed(self) -> dict[int, str]:
        def read() -> dict[int, str]:
            if not self._store.add("departed", 0):
                return {}
            ranks = [rank for rank in range(self.world_size) if rank != self.rank and self._store.check([f"departed/{rank}"])]
            return {rank: self._store.get(f"departed/{rank}").decode() for rank in ranks}

        return self._within(read) or {}

    def depart(self, error: BaseException | None) -> None:
        """Tell the others that the program of this process ends.

        Args:
            error: The error that ends it; None if there is none.
        """

        def write() -> None:
            self._store.set(f"departed/{self.rank}", "" if error is None else f" with {summary(error)}")
            self._store.add("departed", 1)

        self._within(write)

    def _ask(self, number: int, *, everyone: bool) -> None:
        notices = self.notices
        if notices is not None:
            self._within(lambda: notices.post("where", [number, everyone]))

    def _within(self, action: Callable[[], T]) -> T | None:
        """Return the result of an action on the store; None if the store is gone."""
        if time.monotonic() - self._store_is_lost < LOST:
            return None
        start = time.monotonic()
        result: T | None = within(ANSWER, action)
        if time.monotonic() - start >= ANSWER:
            self._store_is_lost = time.monotonic()
        return result

    def _on_where(self, rank: int, content: Any) -> None:
        number, everyone = content
        self._asked = number, time.monotonic()
        tick = self._tick()  # first, so that it is not later than the number
        if self.notices is not None and (everyone or self._number < number):
            current, frame = self._current, sys._current_frames().get(self._thread)
            text = f"it waits in {current.name}" if current is not None else whereabouts(frame)
            place = self._place()
            answer = {
                "for": number,
                "number": self._number,
                "tick": tick,
                "is_slow": current is None and is_slow(frame),
                "text": f"{text} ({place})" if place else text,
            }
            self.notices.post("here", answer)

    def _on_here(self, rank: int, content: Any) -> None:
        if rank != self.rank:
            self._answers[rank] = {**content, "time": time.monotonic()}

    def _all_answers(self, number: int) -> dict[int, dict[str, Any]]:
        """Ask all processes where they are; return the answers by rank."""
        self._answers.clear()
        self._ask(number, everyone=True)
        end = time.monotonic() + (0 if time.monotonic() - self._store_is_lost < LOST else ANSWER)
        while len(self._answers) < self.world_size - 1 and time.monotonic() < end:
            if self.notices is None or self.notices.failure is not None:
                break
            time.sleep(0.02)
        return dict(self._answers)

    # ------------------------------------------------------------------ errors

    def _late(self, exchange: Exchange) -> ExchangeError:
        answers = self._all_answers(exchange.number)
        if silent := [rank for rank in range(self.world_size) if rank != self.rank and rank not in answers]:
            return self._gone(silent, f"{exchange.name} for {self.timeout:g} s")
        return self._waited(exchange.name, {rank: each for rank, each in answers.items() if each["number"] < exchange.number})

    def _waited(self, name: str, answers: dict[int, dict[str, Any]]) -> ExchangeError:
        lines = [f"rank {rank}: {answer['text']}" for rank, answer in sorted(answers.items())]
        return ExchangeError(
            f"{name}: rank {self.rank} has waited {self.timeout:g} s for {few(lines)}. All processes have to take part in it; "
            "give the callback a longer timeout if one may be that late."
        )

    def _gone(self, ranks: list[int], name: str) -> ExchangeError:
        return ExchangeError(
            f"{ranks_in_words(ranks)} gone: no error was reported and no answer comes, so the process was killed, or its "
            f"machine or the network is down. Rank {self.rank} waited in {name}."
        )

    def explanation(self, name: str, error: BaseException) -> ExchangeError:
        """Return an error that says why an exchange broke: which process has failed, is gone, or is late.

        Args:
            name: The exchange in which this process waited.
            error: The error of torch.
        """
        try:
            self._check(name)
            answers = self._all_answers(self._number)
            self._check(name)
        except ExchangeError as failure:
            return failure
        silent = [rank for rank in range(self.world_size) if rank != self.rank and rank not in answers]
        if silent:
            return self._gone(silent, name)
        if "imed out" in str(error):
            return self._waited(name, answers)
        lines = [f"rank {rank}: {answer['text']}" for rank, answer in sorted(answers.items())]
        return ExchangeError(f"{name}: rank {self.rank} has lost a connection, although all processes answer: {few(lines)}.")


ADVICE = (
    "All processes have to call it: not under `if trainer.is_global_zero:`, which is for output of your own, and not in a "
    "branch that only some processes take."
)


# ------------------------------------------------------------------ names


def called_from(frame: FrameType | None, kind: str) -> tuple[str, str]:
    """Return a key and a name of an exchange: the code of eventtrain that began it, and the code of the user that called that.

    Args:
        frame: The frame that the exchange is called in.
        kind: The kind of the exchange.
    """
    begun: CodeType | None = None
    verb: CodeType | None = None
    method = kind
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(OURS):
            if begun is None and code.co_filename in INNER:
                method = code.co_name
            elif begun is None:
                begun = code
            if begun is not None and "<" not in code.co_qualname:
                verb = code
        elif not code.co_filename.startswith(LIBRARIES):
            break
        frame = frame.f_back
    caller = "" if frame is None else f", called by {in_words(frame.f_code, frame.f_lineno)}"
    if begun is None:
        return kind, f"trainer.processes.{method}(){caller}"
    key = f"{kind} {begun.co_qualname}"
    if begun.co_name == "on_join_processes" and verb is not None:
        return f"{kind} {verb.co_qualname}", f"the beginning of {verb.co_qualname}(){caller}"
    if verb is None or verb.co_qualname in RUNS:
        name = NAMES.get(begun.co_qualname, f"the exchange in {begun.co_qualname}")
        return key, f"{name} ({verb.co_qualname})" if verb is not None else name
    return key, f"{verb.co_qualname}(){caller}"


def whereabouts(frame: FrameType | None) -> str:
    """Return in words where a thread is: the innermost code of the user or of eventtrain."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename not in INNER and not code.co_filename.startswith(LIBRARIES):
            return f"it is in {in_words(code, frame.f_lineno)}"
        frame = frame.f_back
    return "it is alive"


def is_slow(frame: FrameType | None) -> bool:
    """Return whether a thread is in code that may take long."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename in SLOW_FILES or {code.co_name, code.co_qualname} & SLOW_FUNCTIONS:
            return True
        frame = frame.f_back
    return False


def in_words(code: CodeType, line: int) -> str:
    """Return a place in a program in words."""
    name = "the program" if code.co_name == "<module>" else code.co_qualname.rpartition("<locals>.")[2]
    return f"{name} ({Path(code.co_filename).name}, line {line})"


def few(lines: list[str], most: int = 4) -> str:
    """Return some of several descriptions, and the number of the others."""
    more = f"; and {len(lines) - most} others" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more


def ranks_in_words(ranks: list[int], most: int = 16) -> str:
    """Return some ranks with their verb."""
    if len(ranks) == 1:
        return f"Rank {ranks[0]} is"
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return f"Ranks {', '.join(map(str, ranks[:most]))}{more} are"


# ------------------------------------------------------------------ errors of torch


def is_of_an_exchange(error: BaseException | None) -> bool:
    """Return whether an error of torch says that an exchange has failed."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        failures: Iterable[Any] = getattr(error, "failures", {}).values()  # of a sharded checkpoint
        if any(is_of_an_exchange(failure) for failure, _ in failures):
            return True
        error = error.__cause__
    return False


def raised_in(traceback: TracebackType | None) -> str:
    """Return in words the exchange of torch in which an error was raised."""
    names = set()
    while traceback is not None:
        names.add(traceback.tb_frame.f_code.co_qualname)
        innermost, traceback = traceback, traceback.tb_next
    for name, words in TORCH.items():
        if name in names:
            return words
    return f"{in_words(innermost.tb_frame.f_code, innermost.tb_lineno)}" if names else "an exchange"


TORCH = {
    "DistributedDataParallel.__init__": "making torch's wrapper",
    "FSDPParam.wait_for_unshard": "gathering the weights of a unit",
    "FSDPParamGroup.unshard": "gathering the weights of a unit",
    "FSDPParamGroup.wait_for_unshard": "gathering the weights of a unit",
    "FSDPParamGroup.post_backward": "reducing the gradients of a unit",
    "save": "writing a sharded checkpoint",
    "load": "reading a sharded checkpoint",
    "Tensor.backward": "the reduction of gradients in the backward",
}
