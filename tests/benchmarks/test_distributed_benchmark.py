"""The benchmarks of several processes: instruments that delay and count exchanges, turns of two loops, and formulas."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from benchmarks import distributed, report, scaling
from benchmarks.distributed import LATENCIES, Result, Setting
from benchmarks.exchanges import Census, Latency, written

LONGEST = 300.0  # seconds that a start of processes may take


@pytest.fixture
def group() -> Iterator[Any]:
    """A process group of this process alone; returns its store."""
    store = HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=20))
    yield store
    dist.destroy_process_group()


# ------------------------------------------------------------------ a latency


def seconds(action: Any) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def test_a_latency_delays_each_blocking_exchange_and_each_request_to_a_store(group: Any) -> None:
    allreduce, get = dist.ProcessGroup.allreduce, Store.get
    with Latency(0.05) as latency:
        assert seconds(lambda: dist.all_reduce(torch.ones(1))) >= 0.05
        assert seconds(lambda: dist.barrier()) >= 0.05
        assert seconds(lambda: dist.broadcast_object_list(["text"])) >= 0.1  # its length, then the text
        assert seconds(lambda: group.set("key", "value")) >= 0.05
        assert group.get("key") == b"value"
        latency.seconds = 0.0
        assert seconds(lambda: dist.all_reduce(torch.ones(1))) < 0.05
    assert (dist.ProcessGroup.allreduce, Store.get) == (allreduce, get)


def test_work_that_is_done_in_the_meantime_hides_the_latency_of_an_asynchronous_exchange(group: Any) -> None:
    with Latency(0.1):
        began = time.perf_counter()
        work: Any = dist.all_reduce(torch.ones(1), async_op=True)
        assert time.perf_counter() - began < 0.05
        assert not work.is_completed()
        time.sleep(0.1)
        assert work.is_completed()
        assert seconds(work.wait) < 0.05


def test_the_reduction_of_gradients_by_torchs_wrapper_is_not_delayed(group: Any) -> None:
    wrapper = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    for _ in range(2):  # torch exchanges the order of gradients after the first
        wrapper(torch.ones(1, 2)).sum().backward()
    with Latency(1.0), Census() as census:
        assert seconds(lambda: wrapper(torch.ones(1, 2)).sum().backward()) < 0.5
    assert census.collectives == {"allreduce": 1}


# ------------------------------------------------------------------ a census


def test_a_census_counts_exchanges_with_their_bytes_and_requests_by_thread(group: Any) -> None:
    with Census() as census:
        census.mark("first")
        dist.all_reduce(torch.ones(3))
        dist.all_reduce(torch.ones(2, dtype=torch.uint8), async_op=True).wait()
        group.set("key", "value")
        thread = threading.Thread(target=lambda: group.get("key"))
        thread.start()
        thread.join()
        census.mark("second")
        dist.all_gather_object([None], "text")
        census.mark("first")
    assert census.between("first", "second") == [{"allreduce": 2, "allreduce bytes": 14, "store": 1}]
    assert census.between("second", "first")[0]["allgather"] == 2
    assert census.requests == {("main", "set"): 1, ("other", "get"): 1}
    dist.all_reduce(torch.ones(1))
    group.get("key")
    assert census.collectives == {"allreduce": 2, "allgather": 2}
    assert census.requests.total() == 2


def test_the_system_counts_what_is_written(tmp_path: Path) -> None:
    before = written()
    (tmp_path / "file").write_bytes(bytes(1000))
    assert [after - first for first, after in zip(before, written(), strict=True)] == [1000, 1]


# ------------------------------------------------------------------ taking turns


def result(ours: list[float], by_hand: list[float], **setting: Any) -> Result:
    return Result(Setting(**{"size": "5 ms", "accumulate": 1, "usual": False, **setting}), True, by_hand, ours)


def test_a_block_is_divided_by_the_mean_of_its_neighbours() -> None:
    measured = result([12.0, 30.0, 80.0, 33.0, 60.0, 200.0], [10.0, 14.0, 16.0, 24.0, 20.0, 20.0, 30.0])
    assert measured.around() == [12.0, 15.0, 20.0, 22.0, 20.0, 25.0]
    assert [measured.ratio(latency) for latency in LATENCIES] == [1.25, 2.5, 6.0]
    assert measured.added(0.0) == 5.5
    assert measured.late() == 117.5 - 5.5


def test_the_report_says_which_aims_are_missed() -> None:
    slow, fast = result([106.0, 106.0, 500.0], [100.0] * 4), result([102.0, 102.0, 110.0], [100.0] * 4, accumulate=4)
    tiny = result([128.0, 128.0, 128.0], [100.0] * 4, size="1 ms", usual=True)
    lines = distributed.report([slow, fast, tiny]).splitlines()
    assert "| 5 ms | 1 | bare | 100 | 1.000 | 1.060 | 1.060 | 5.000 | +6 | +394 | equal |" in lines
    assert "- bare, long steps: a ratio of at most 1.03: missed in 1 of 2; the worst is 1.06 (5 ms, a window of 1)." in lines
    assert (
        "- bare, 5 ms: a latency of 4 ms adds at most 300 us: missed in 1 of 2; the worst is 394 (5 ms, a window of 1)."
        in lines
    )
    assert "- usual callbacks, 1 ms: beyond 5%, at most 25 us: reached; the worst is 23 (1 ms, a window of 1)." in lines


@pytest.mark.slow
def test_two_processes_take_turns_and_both_loops_end_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, path = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text("<!-- generated: distributed -->\n<!-- end: distributed -->\n")
    monkeypatch.setattr(distributed, "LONGEST", LONGEST)
    monkeypatch.setattr(distributed, "save", functools.partial(report.save, page=page, path=path))
    distributed.main(["--sizes", "1 ms", "--rounds", "1", "--save"])
    figures = json.loads(path.read_text())["distributed"]["figures"]
    assert [(each["setting"]["accumulate"], each["setting"]["usual"]) for each in figures] == [
        (window, usual) for window in (1, 4, 0) for usual in (False, True)
    ]
    for each in figures:
        assert each["equal"], each["setting"]
        assert len(each["ours"]) == len(LATENCIES) == len(each["by_hand"]) - 1
        assert min(*each["ours"], *each["by_hand"]) > 0
    assert "| 1 ms | 4 | usual |" in page.read_text()


# ------------------------------------------------------------------ formulas


def test_formulas_grow_with_the_number_of_processes() -> None:
    assert scaling.traffic({"allreduce": 2, "allreduce bytes": 8000, "store": 3}, 2) == (8000 + 2 * 12 * 48, 24)
    assert scaling.traffic({"gather": 1, "gather bytes": 100}, 11) == (10 * 196, 20)
    assert scaling.traffic({"barrier": 1}, 256) == (24 * 48, 24)
    assert scaling.traffic({}, 256) == (0, 0)


def test_sizes_of_more_processes_follow_from_two_numbers_of_processes() -> None:
    counted = {
        2: {"allreduce": 1, "allreduce bytes": 1000, "allgather_base": 2, "allgather_base bytes": 800, "gather bytes": 100},
        4: {"allreduce": 1, "allreduce bytes": 1000, "allgather_base": 2, "allgather_base bytes": 400, "gather bytes": 300},
    }
    assert scaling.extrapolated(counted, 8) == {
        "allreduce": 1,
        "allreduce bytes": 1000,
        "allgather_base": 2,
        "allgather_base bytes": 200,
        "gather bytes": 700,
    }


@pytest.fixture(scope="module")
def counted() -> dict[int, Any]:
    """The figures of runs in two, three and four processes."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(distributed, "LONGEST", LONGEST)
        return {processes: scaling.counted(processes) for processes in scaling.COUNTED}


@pytest.mark.slow
@pytest.mark.parametrize("processes", scaling.COUNTED)
def test_the_formulas_give_the_bytes_and_messages_that_the_system_counts(counted: dict[int, Any], processes: int) -> None:
    for name, sent in counted[processes]["primitives"].items():
        if name == "gather":  # the first process receives what the others send
            busiest = tuple(map(sum, zip(*sent[1:], strict=True)))
        else:
            busiest = tuple(max(sent))
        assert scaling.FORMULAS[name](scaling.PRIMITIVE, processes) == busiest, name


@pytest.mark.slow
@pytest.mark.parametrize("processes", scaling.COUNTED)
@pytest.mark.parametrize("engine", scaling.ENGINES)
def test_the_exchanges_of_an_update_send_what_the_formulas_say(counted: dict[int, Any], engine: str, processes: int) -> None:
    figures = counted[processes][engine]
    batches = [figures["accumulating batch"]] * (scaling.WINDOW - 1) + [figures["closing batch"]]
    expected = sum(scaling.traffic(each, processes)[0] for each in batches)
    assert figures["sent per update"][0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", scaling.ENGINES)
@pytest.mark.parametrize("phase", scaling.PHASES)
def test_two_and_three_processes_tell_the_exchanges_of_four(counted: dict[int, Any], engine: str, phase: str) -> None:
    few = {processes: counted[processes][engine][phase] for processes in (2, 3)}
    computed, actual = scaling.extrapolated(few, 4), counted[4][engine][phase]
    if phase != "checkpoint":
        assert computed == pytest.approx(actual, rel=0.05)
    else:  # while the first process writes, the others ask again and again
        assert computed.keys() == actual.keys()
        assert all(computed[name] <= 1.05 * actual[name] for name in actual)


@pytest.mark.slow
def test_the_report_has_a_row_for_each_phase(counted: dict[int, Any]) -> None:
    text = scaling.report(counted)
    for engine in scaling.ENGINES:
        table = text[text.index(f"| {engine} |") :]
        assert all(f"| {phase} |" in table for phase in scaling.PHASES)
    two, three, four = (counted[processes]["connections"] for processes in (2, 3, 4))
    assert four - three == three - two > 0
