"""No process waits for another in a batch: the exchanges of each batch are counted, in each mode of a run.

The script ``exchanges.py`` runs once in two processes and saves its counts. All exchanges are counted, also those that torch's
wrappers begin, and the requests that the main thread makes to the store. Lower a figure here when it shrinks.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.callbacks.distributed.exchanges import DDP, FIRST, FSDP, WINDOW
from tests.callbacks.distributed.launch import HERE, start

Counts = dict[str, int]
NOTHING: Counts = {}
GRADIENTS = {"allreduce": 1}
"""Torch's wrapper reduces all gradients of this small module in one bucket."""
GATHER = {"allgather_base": 1}
"""The weights of the only unit that is sharded by itself, for a forward."""
SHARDED = {"allgather_base": 2, "reduce_scatter_base": 1}
"""The weights for forward and backward, and the gradients."""
NORM = {"allreduce": 1}
"""The norm of gradients whose parts are in different processes."""

COMMITTED: dict[str, tuple[Counts, Counts, Counts]] = {
    **dict.fromkeys(DDP, (NOTHING, GRADIENTS, NOTHING)),
    "weighted": (NOTHING, {"allreduce": 2}, NOTHING),  # gradients, and the sum of the weights of all processes
    # The question whether all have the batch after the next is asked now and answered in the next batch: see test_streams.py.
    "loader without a length": (NOTHING, {"allreduce": 2}, NOTHING),
    "loader without a length, accumulation": ({"allreduce": 1}, {"allreduce": 2}, NOTHING),
    "FSDP": (NOTHING, SHARDED, GATHER),
    "FSDP, accumulation": ({"allgather_base": 2}, SHARDED, GATHER),
    "FSDP, clipping by norm": (NOTHING, SHARDED | NORM, GATHER),
    "FSDP, usual callbacks": ({"allgather_base": 2}, SHARDED | NORM, GATHER),
}
"""The exchanges of a batch that accumulates, of a batch that closes a window, and of an evaluation batch."""


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The counts of each process."""
    folder = tmp_path_factory.mktemp("exchanges")
    start(HERE / "exchanges.py", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def exchanges(batches: list[Counts]) -> list[Counts]:
    """Return the numbers of exchanges, without their bytes."""
    return [{name: number for name, number in batch.items() if "bytes" not in name} for batch in batches]


def test_all_modes_have_figures() -> None:
    assert COMMITTED.keys() == (DDP | FSDP).keys()


@pytest.mark.slow
@pytest.mark.parametrize("mode", COMMITTED)
def test_a_batch_exchanges_gradients_and_nothing_else(counts: list[Any], mode: str) -> None:
    for rank, counted in enumerate(counts):
        batches = counted[mode]
        names = ("accumulating", "closing", "evaluation batch")
        assert len(batches["closing"]) >= 1 and len(batches["evaluation batch"]) >= 2
        for name, expected in zip(names, COMMITTED[mode], strict=True):
            actual = exchanges(batches[name])
            assert actual == [expected] * len(actual), f"{mode}, rank {rank}, {name}"


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "window"), [("bare", 1), ("usual callbacks", 1), ("accumulation", WINDOW)])
def test_a_batch_sends_the_bytes_that_the_hand_written_loop_sends(counts: list[Any], mode: str, window: int) -> None:
    for counted in counts:
        by_hand = counted[f"by hand, {window}"]
        assert len(by_hand["closing"]) >= 2
        for name in ("accumulating", "closing"):
            assert counted[mode][name] == by_hand[name]
        assert (by_hand["accumulating"] == []) is (window == 1)
        assert FIRST % WINDOW == 0
