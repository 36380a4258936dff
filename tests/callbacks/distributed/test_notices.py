"""Notices between processes, and how they agree on requests; here each process is a thread with the same store."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from eventtrain.callbacks.distributed import notices
from eventtrain.callbacks.distributed.notices import ExchangeError, Notices, clone
from eventtrain.callbacks.distributed.requests import Requests

torch_stores: Any = dist  # whose types do not export the stores
new_store = torch_stores.HashStore
STORES: dict[str, Callable[[Path], Store]] = {
    "hash": lambda folder: new_store(),
    "file": lambda folder: torch_stores.FileStore(str(folder / "store"), 1),
    "tcp": lambda folder: torch_stores.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False),
}


@contextmanager
def opened(store: Store, count: int, timeout: float = 20) -> Iterator[list[Notices]]:
    processes = [Notices(clone(store), rank, count, timedelta(seconds=timeout)) for rank in range(count)]
    yield processes
    for each in reversed(processes):
        each.close()
    for each in processes:
        each.end()
        assert not each._thread.is_alive()


def together(*functions: Callable[[], Any]) -> list[Any]:
    """Call functions in threads; return their results, or the errors that they raise."""
    results: list[Any] = [None] * len(functions)

    def call(index: int) -> None:
        try:
            results[index] = functions[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=call, args=(index,), daemon=True) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a process waits forever"
    return results


@pytest.mark.parametrize("kind", STORES)
def test_all_processes_hear_all_notices_in_the_same_order(tmp_path: Path, kind: str) -> None:
    def note(notes: list[Any], rank: int, content: Any) -> None:
        notes.append((rank, content))

    heard: list[list[Any]] = [[], [], []]
    with opened(STORES[kind](tmp_path), 3) as processes:
        for each, notes in zip(processes, heard, strict=True):
            each.on("word", partial(note, notes))
            each.open()

        def post(each: Notices) -> None:
            for number in range(5):
                last = each.post("word", {"number": number}, acknowledged=True)
            each.wait_until_heard(last, "the words")

        assert together(*[lambda each=each: post(each) for each in processes]) == [None] * 3
    assert heard[0] == heard[1] == heard[2] and len(heard[0]) == 15


def test_a_notice_that_came_before_a_process_began_to_hear_is_heard() -> None:
    notes: list[Any] = []
    with opened(new_store(), 2) as (first, second):
        first.open()
        number = first.post("word", "early", acknowledged=True)
        second.on("word", lambda rank, content: notes.append(content))
        second.open()
        first.wait_until_heard(number, "a word")
    assert notes == ["early"]


def test_a_process_that_is_not_heard_in_time_is_an_error_that_names_the_exchange() -> None:
    with opened(new_store(), 2, timeout=0.2) as (first, second):
        first.open()
        number = first.post("word", "hello", acknowledged=True)
        with pytest.raises(ExchangeError, match="the greeting: 1 of 2 processes have not heard it, and rank 0 has"):
            first.wait_until_heard(number, "the greeting")
        second.open()


class Silent:
    """A store that takes no more requests after a while, as if the network were down.

    Args:
        store: The store that it stands for.
    """

    def __init__(self, store: Any) -> None:
        self.store, self.is_down, self.goes_on = store, False, threading.Event()

    def clone(self) -> Any:
        return clone(self.store)

    def __getattr__(self, name: str) -> Any:
        if self.is_down:
            assert self.goes_on.wait(20)
        return getattr(self.store, name)


def test_no_process_waits_for_a_silent_store_longer_than_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "SOON", 0.3)
    silent: Any = Silent(new_store())
    first = Notices(silent, 0, 2, timedelta(seconds=0.3))
    requests = Requests(first)
    first.open()
    number = first.post("word", None, acknowledged=True)
    silent.is_down = True
    waits: list[Callable[[], Any]] = [
        lambda: first.wait_until_heard(number, "the greeting"),
        lambda: first.post("word", None),
        lambda: requests.pass_tick([True], ends_batch=True),
    ]
    for wait in waits:
        begun = time.monotonic()
        with pytest.raises(ExchangeError, match=r"cannot reach the store|does not answer"):
            wait()
        assert time.monotonic() - begun < 10
    silent.goes_on.set()
    silent.is_down = False
    first.end()


def test_a_failure_ends_the_waiting_of_the_others_and_is_named() -> None:
    with opened(new_store(), 2) as (first, second):
        requests = Requests(first), Requests(second)
        for each in (first, second):
            each.open()
        began = time.monotonic()
        error = OSError("disk full\nand more")
        waits, _ = together(lambda: requests[0].pass_tick([True], ends_batch=True), lambda: second.fail(error))
        assert isinstance(waits, ExchangeError) and time.monotonic() - began < 5
        assert str(waits) == "Rank 1 has failed with OSError: disk full. Rank 0 waited for it in the requests after batch 1."


def test_a_handler_that_raises_is_an_error_in_the_main_thread() -> None:
    def fail(rank: int, content: Any) -> None:
        raise KeyError("wrong")

    with opened(new_store(), 1) as (only,):
        only.on("word", fail)
        only.open()
        number = only.post("word", None, acknowledged=True)
        with pytest.raises(ExchangeError, match=r"a word: rank 0 has lost the store of the process group \('wrong'\)"):
            only.wait_until_heard(number, "a word")


# ------------------------------------------------------------------ requests

BATCHES = 6
PLACES = 3  # ticks in a batch: its end, after request_stop, after take_checkpoint


def run(requests: Requests, asks: dict[tuple[int, int], list[int]], barrier: threading.Barrier, window: int) -> Any:
    """Pass all ticks of six batches; return where each request held.

    Args:
        requests: The process.
        asks: The requests that it makes, by batch and place.
        barrier: The reduction of gradients, in each batch that closes a window.
        window: Batches of an accumulation window.
    """
    flags, held = [False] * 3, []
    for batch, place in itertools.product(range(BATCHES), range(PLACES)):
        if place == 0 and batch % window == window - 1:
            barrier.wait(20)
        for index in asks.get((batch, place), ()):
            flags[index] = True
        for index, holds in enumerate(requests.pass_tick(list(flags), ends_batch=place == 0)):
            if holds:
                flags[index] = False
                held.append((index, batch, place))
    barrier.wait(20)
    requests.meet()
    return held


def agreed(*asks: dict[tuple[int, int], list[int]], window: int = 1) -> Any:
    """Return where the requests of processes held, which has to be the same in all of them."""
    with opened(new_store(), len(asks)) as processes:
        requests = [Requests(each) for each in processes]
        for each in processes:
            each.open()
        barrier = threading.Barrier(len(asks))
        first, *others = together(
            *[lambda each=each, mine=mine: run(each, mine, barrier, window) for each, mine in zip(requests, asks, strict=True)]
        )
    assert all(other == first for other in others), (first, others)
    return first


ALL_PLACES = list(itertools.product(range(BATCHES - 1), range(PLACES)))


def test_nothing_is_posted_if_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    posted, post = [], Notices.post

    def record(self: Notices, kind: str, content: Any) -> int:
        posted.append(kind)
        return post(self, kind, content)

    monkeypatch.setattr(Notices, "post", record)
    assert agreed({}, {}) == [] and posted == ["end"]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("place", ALL_PLACES)
def test_a_request_of_all_processes_holds_where_they_make_it(place: tuple[int, int], processes: int) -> None:
    assert agreed(*[{place: [1]}] * processes) == [(1, *place)]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("place", ALL_PLACES)
def test_a_request_of_one_process_holds_at_the_end_of_the_next_batch(place: tuple[int, int], processes: int) -> None:
    for asker in {0, processes - 1}:
        asks: list[Any] = [{place: [1]} if rank == asker else {} for rank in range(processes)]
        assert agreed(*asks) == [(1, place[0] + 1, 0)]


def test_different_requests_at_the_same_place_hold_together() -> None:
    assert agreed({(2, 0): [0]}, {(2, 0): [2]}) == [(0, 3, 0), (2, 3, 0)]
    assert agreed({(2, 0): [0, 1]}, {(2, 0): [1, 2]}) == [(1, 2, 0), (0, 3, 0), (2, 3, 0)]


def test_the_same_request_at_two_places_holds_once() -> None:
    assert agreed({(1, 0): [0]}, {(1, 1): [0]}) == [(0, 2, 0)]
    assert agreed({(1, 0): [0]}, {(2, 0): [0]}) == [(0, 2, 0)]


def test_a_request_may_be_made_again_after_it_held() -> None:
    assert agreed({(0, 0): [0], (2, 1): [0]}, {(4, 2): [0]}) == [(0, 1, 0), (0, 3, 0), (0, 5, 0)]


def test_a_request_in_the_last_batch_holds_if_all_make_it_and_keeps_nobody_waiting_else() -> None:
    last = BATCHES - 1
    assert agreed({(last, 0): [0]}, {(last, 0): [0]}) == [(0, last, 0)]
    for place in range(PLACES):
        assert agreed({(last, place): [0]}, {}) == []
        assert agreed({}, {}, {(last, place): [0]}, {}) == []


@pytest.mark.parametrize("place", ALL_PLACES)
def test_a_request_in_an_open_window_holds_at_the_latest_in_the_batch_that_closes_one(place: tuple[int, int]) -> None:
    ((request, batch, at),) = agreed({}, {place: [1]}, window=3)
    after = place[0] + 1
    assert request == 1 and at == 0 and after <= batch <= after + 2 - after % 3


@pytest.mark.parametrize("seed", range(8))
def test_processes_agree_on_any_requests_in_any_timing(seed: int) -> None:
    generator = random.Random(seed)
    asks = [{place: [generator.randrange(3)] for place in ALL_PLACES if generator.random() < 0.2} for _ in range(2 + seed % 3)]
    agreed(*asks, window=1 + seed % 3)


def test_a_process_that_is_far_ahead_waits_at_its_next_tick() -> None:
    with opened(new_store(), 2) as processes:
        ahead, behind = [Requests(each) for each in processes]
        for each in processes:
            each.open()
        for _ in range(3):
            assert ahead.pass_tick([False], ends_batch=True) == [False]
        go_on = threading.Event()

        def be_ahead() -> Any:
            go_on.wait(20)
            return [ahead.pass_tick([False], ends_batch=True) for _ in range(2)]

        def be_behind() -> Any:
            first = behind.pass_tick([True], ends_batch=True)
            go_on.set()
            return [first, *[behind.pass_tick([False], ends_batch=True) for _ in range(4)]]

        theirs, mine = together(be_ahead, be_behind)
    assert theirs == [[True], [False]]
    assert mine == [[False], [False], [False], [True], [False]]


def test_an_evaluation_that_is_called_off_is_known_to_all_until_they_meet() -> None:
    with opened(new_store(), 2) as processes:
        first, second = [Requests(each) for each in processes]
        for each in processes:
            each.open()
        first.call_off()
        deadline = time.monotonic() + 10
        while not second.is_called_off and time.monotonic() < deadline:
            time.sleep(0.001)
        assert second.is_called_off
        for requests in (first, second):
            requests.meet()
        assert not first.is_called_off and not second.is_called_off
