"""How a process that waits looks after the others. Each process is a thread here, and the operation of gloo never ends."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from eventtrain.callbacks.distributed import exchanges
from eventtrain.callbacks.distributed.exchanges import Exchanges, few, is_of_an_exchange, ranks_in_words
from eventtrain.callbacks.distributed.notices import ExchangeError, Notices, summary, within

TIMEOUT = 0.5


class Work:
    """An operation of gloo, which ends after a time, or never."""

    def __init__(self, seconds: float = 1e9) -> None:
        self.end = time.monotonic() + seconds

    def wait(self, timeout: timedelta) -> None:
        left = self.end - time.monotonic()
        time.sleep(min(left, timeout.total_seconds()))
        if left > timeout.total_seconds():
            raise RuntimeError("Operation timed out!")

    def is_completed(self) -> bool:
        return False


class Broken(Work):
    """An operation whose connection is closed by the other process."""

    def wait(self, timeout: timedelta) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    def is_completed(self) -> bool:
        return True


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Exchanges]]:
    """Three processes in a run: the first waits, and each counts its ticks."""
    monkeypatch.setattr(exchanges, "LOOK", 0.05)
    monkeypatch.setattr(exchanges, "ANSWER", 0.3)
    monkeypatch.setattr(exchanges, "GIVEN_UP", [])
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    made = [Exchanges(rank, 3, timedelta(seconds=TIMEOUT), store) for rank in range(3)]
    notices = [Notices(store, rank, 3, timedelta(seconds=TIMEOUT)) for rank in range(3)]
    for each, own_notices in zip(made, notices, strict=True):
        each.begin_run(own_notices, lambda: "epoch 0, batch 4", itertools.repeat(0).__next__)
        own_notices.open()
    yield made
    notices[0].close()
    for own_notices in notices:
        own_notices.end()


def save_checkpoint(waiting: Exchanges, work: Any) -> None:
    waiting.wait(work)


def arrive(process: Exchanges) -> None:
    """Have a process be in the same exchange as the first."""
    process._number = 1


def test_a_process_that_passes_its_next_tick_without_the_exchange_ends_it_at_once(processes: list[Exchanges]) -> None:
    first, second, third = processes
    arrive(second)
    third._tick = lambda: 1
    start = time.monotonic()
    with pytest.raises(
        ExchangeError, match=r"all processes take part in it, but rank 2 goes on without it: it is in .*batch 4"
    ):
        save_checkpoint(first, Work())
    assert time.monotonic() - start < TIMEOUT
    with pytest.raises(ExchangeError, match=r"Rank 0 has given up an exchange .* Start them again"):
        first.begin_run(first.notices, str)  # type: ignore[arg-type]


def test_a_process_that_is_late_is_named_with_its_place_after_the_timeout(processes: list[Exchanges]) -> None:
    first, second, _ = processes
    arrive(second)
    with pytest.raises(
        ExchangeError, match=r"rank 0 has waited 0.5 s for rank 2: it is in .* \(epoch 0, batch 4\)\. All pro"
    ) as error:
        save_checkpoint(first, Work())
    assert "rank 1" not in str(error.value)


def test_a_process_that_does_not_answer_is_gone(processes: list[Exchanges], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = processes
    arrive(second)
    for process in (second, third):
        process.notices.on("where", lambda rank, content: None)  # type: ignore[union-attr]
    with pytest.raises(ExchangeError, match=r"^Ranks 1, 2 are gone: no error was reported .* Rank 0 waited in .* for 0.5 s\."):
        save_checkpoint(first, Work())
    with pytest.raises(ExchangeError, match=r"^Ranks 1, 2 are gone: no error was reported .* Rank 0 waited in .*\w\.") as error:
        save_checkpoint(first, Broken())
    assert "Connection closed" in str(error.value.__cause__)


def test_a_process_in_slow_code_is_waited_for_however_long_it_takes(processes: list[Exchanges]) -> None:
    first, second, third = processes
    arrive(second)
    is_over = threading.Event()

    def prepare_data() -> None:
        third._thread = threading.get_ident()
        is_over.wait()

    thread = threading.Thread(target=prepare_data)
    thread.start()
    save_checkpoint(first, Work(2.5 * TIMEOUT))
    is_over.set()
    thread.join()


def test_an_error_of_another_process_is_told_before_that_of_the_connection(processes: list[Exchanges]) -> None:
    first, _, third = processes
    assert third.notices is not None
    error = ValueError("wrong\nand more")
    error.add_note("raised in Net.training_step (epoch 0, batch 3)")
    third.notices.fail(error)
    with pytest.raises(ExchangeError, match=r"^Rank 2 has failed with ValueError: wrong \(raised in Net.training") as told:
        save_checkpoint(first, Broken())
    assert "(epoch 0, batch 3)). Rank 0 waited for it in " in str(told.value)


def test_a_program_that_has_ended_is_named(processes: list[Exchanges]) -> None:
    first, second, third = processes
    third.depart(None)
    with pytest.raises(ExchangeError, match=r"^Rank 2 has ended its program\. Rank 0 waited .* All processes have to call it"):
        save_checkpoint(first, Work())
    second.depart(OSError("disk full"))
    with pytest.raises(ExchangeError, match=r"^Rank 1 has ended its program with OSError: disk full\. Rank 0 waited for it in"):
        save_checkpoint(first, Work())


def test_an_error_that_was_told_before_the_end_of_a_program_is_the_reason(processes: list[Exchanges]) -> None:
    first, _, third = processes
    assert first.notices is not None and third.notices is not None
    first.notices.on("slow", lambda rank, content: time.sleep(0.2))  # so that it hears of the error later than of the end
    third.notices.post("slow", None)
    third.notices.fail(error := ValueError("wrong"))
    third.depart(error)
    with pytest.raises(ExchangeError, match=r"^Rank 2 has failed with ValueError: wrong\. Rank 0 waited for it in"):
        save_checkpoint(first, Work())


def test_a_store_that_hangs_keeps_nobody_waiting(processes: list[Exchanges]) -> None:
    first, hangs = processes[0], threading.Event()
    first._store = type("Store", (), {"add": lambda *arguments: int(not hangs.wait())})()
    start = time.monotonic()
    with pytest.raises(ExchangeError, match="Ranks 1, 2 are gone"):
        save_checkpoint(first, Broken())
    assert time.monotonic() - start < 1
    hangs.set()


def test_few_words_describe_many_ranks() -> None:
    assert ranks_in_words([3]) == "Rank 3 is" and ranks_in_words([1, 2]) == "Ranks 1, 2 are"
    assert ranks_in_words(list(range(20))).endswith("14, 15 and 4 more are")
    assert few(["a", "b", "c", "d", "e"]) == "a; b; c; d; and 1 others"


def test_errors_of_exchanges_are_recognised() -> None:
    gloo = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    wrapped = OSError("could not be written")
    wrapped.__cause__ = CheckpointException("write", {1: (gloo, None)})  # type: ignore[dict-item]
    assert is_of_an_exchange(gloo) and is_of_an_exchange(wrapped) and is_of_an_exchange(dist.DistNetworkError("timeout"))
    assert not is_of_an_exchange(RuntimeError("wrong shapes")) and not is_of_an_exchange(None)


def test_an_error_in_one_line() -> None:
    assert summary(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert summary(ValueError("a\nb")) == "ValueError: a"
    of_a_worker = ValueError(
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most ...):\n  x\nValueError: bad\n"
    )
    assert summary(of_a_worker) == "ValueError: bad"


def test_an_action_on_a_store_that_is_gone_has_no_result() -> None:
    def fail() -> None:
        raise dist.DistNetworkError("gone")

    assert within(1, lambda: 3) == 3 and within(1, fail) is None and within(0.01, threading.Event().wait) is None
