"""Runs of two and four processes, of which one or all are killed at a random place, leave what a run leaves that was not.

A killed process dies at one of its places: a write, another change to a file, an event, or the end of a listener. Then either
the others notice by themselves, and have to end with an error in time, or all are killed at that moment, in whatever phase
they are. All are started again, as torchrun would do, and killed again or left to complete the run. In the end the final state
of each process, the checkpoints and the logs are compared with those of a run that was not killed, bit for bit.

The test suite kills some 40 times; ``make chaos`` ten times as often.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests.chaos import ranks
from tests.chaos.harness import Ended, assert_same_outcome, launch, logged, scalars, wait
from tests.resuming import assert_same

RUNS = 30 if "CHAOS_KILLS" in os.environ else 3  # of each kind; each is killed two or three times
IN_TIME = ranks.TIMEOUT + 20
"""The seconds in which the other processes of one that died have to end; the machine may be slow."""
CHANGES = ("write", "fsync", "rename", "link", "unlink", "create", "truncate", "mkdir", "rmdir")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")]


@dataclass
class Runs:
    """Starts the processes of runs of one kind.

    Attributes:
        name: The kind.
        store: The store over which the processes find each other, as torchrun's agent holds it.
        starts: The numbers of the starts.
        killed: How often a process was killed, by the kind of its place and by what happened to the others.
    """

    name: str
    store: TCPStore
    starts: Iterator[int] = field(default_factory=itertools.count)
    killed: Counter[str] = field(default_factory=Counter)

    @property
    def size(self) -> int:
        """The number of processes."""
        return ranks.KINDS[self.name][0]

    def start(self, root: Path, at: dict[int, int]) -> list[Any]:
        """Start all processes.

        Args:
            root: The folder of the run.
            at: The place at which a process kills itself, by rank.
        """
        number = next(self.starts)
        return [launch(ranks.train, self.name, root, rank, self.store.port, number, at.get(rank)) for rank in range(self.size)]

    def complete(self, root: Path) -> None:
        """Let a run go to its end."""
        ends = wait(*self.start(root, {}))
        assert [end.exit_code for end in ends] == [0] * self.size, f"{self.name}: {ends}\n{errors(root)}"

    def kill(self, root: Path, rank: int, at: int, everyone: bool) -> bool:
        """Kill a process at a place, and then all others, or wait until they end by themselves.

        Returns:
            Whether the process came to the place.
        """
        processes = self.start(root, {rank: at})
        processes[rank].join(ranks.TIMEOUT * 3)
        began = time.monotonic()
        if everyone:
            for process in processes:
                process.kill()
        ends = wait(*processes)
        others = [end for index, end in enumerate(ends) if index != rank]
        described = f"{self.name}: rank {rank} died at its place {at}"
        if not ends[rank].killed:
            assert {end.exit_code for end in ends} <= {0, -9 if everyone else 0}, f"{described}: {ends}\n{errors(root)}"
            return False
        if not everyone:
            assert time.monotonic() - began < IN_TIME, f"{described}: the others took too long"
            assert {end.exit_code for end in others} <= {0, 1}, f"{described}: the others ended with {others}\n{errors(root)}"
        return True


def errors(root: Path) -> str:
    """Return the ends of the errors that processes printed last."""
    files = sorted(root.glob("errors-*.txt"), key=lambda path: path.stat().st_mtime)[-4:]
    return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in files)


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def places_of(root: Path, size: int) -> list[list[str]]:
    """Return the kinds of the places of each process in a run that went through."""
    return [json.loads((root / f"places-{rank}.json").read_text()) for rank in range(size)]


def choose(rng: random.Random, places: list[list[str]]) -> tuple[int, int]:
    """Return a rank and one of its places; mostly the first rank, which writes the files, and one of its changes to files."""
    rank = rng.choice([0, rng.randrange(len(places))])
    changes = [number for number, kind in enumerate(places[rank], 1) if kind in CHANGES]
    if changes and rng.random() < 0.6:
        kind = rng.choice(sorted({places[rank][number - 1] for number in changes}))
        changes = [number for number in changes if places[rank][number - 1] == kind]
        return rank, rng.choice(changes)
    return rank, rng.randrange(len(places[rank])) + 1


def assert_same_files(name: str, root: Path, straight: Path) -> None:
    """Compare the final states of all processes, the checkpoints and the logs of two runs."""
    for rank in range(1, ranks.KINDS[name][0]):
        mine, expected = (torch.load(each / f"final-{rank}.pt", weights_only=True) for each in (root, straight))
        assert_same(mine, expected, f"{name}: rank {rank}")
    if "sharded" not in name:
        return assert_same_outcome(root, straight, name)
    mine, expected = (torch.load(each / "final.pt", weights_only=True) for each in (root, straight))
    (log, board), (expected_log, expected_board) = ((each.pop("log"), each.pop("board")) for each in (mine, expected))
    assert_same(mine, expected, f"{name}: final")
    assert logged(log) == logged(expected_log)
    assert scalars(board) == scalars(expected_board)
    assert weights_of(name, root).keys() == weights_of(name, straight).keys()
    assert_same(weights_of(name, root), weights_of(name, straight), f"{name}: checkpoints")
    return None


def weights_of(name: str, root: Path) -> dict[str, Any]:
    """Return the weights in each checkpoint under a folder, which another process reads, by its path."""
    paths = sorted(root.rglob("*.ckpt"))
    result = root / "weights.pt"
    if not result.exists():
        ends = wait(launch(ranks.read, name, root / "read", paths, result))
        assert ends == [Ended(0)], errors(root / "read")
    weights: list[Any] = torch.load(result, weights_only=True)
    return {re.sub("[0-9a-f]{12}", "", str(path.relative_to(root))): each for path, each in zip(paths, weights, strict=True)}


@pytest.mark.parametrize("name", ranks.KINDS)
def test_processes_that_are_killed_leave_the_files_of_a_run_that_was_not(tmp_path: Path, store: TCPStore, name: str) -> None:
    runs, rng = Runs(name, store), random.Random(name)
    straight = tmp_path / "straight"
    (straight / "read").mkdir(parents=True)
    runs.complete(straight)
    places = places_of(straight, runs.size)
    for number in range(RUNS):
        root = tmp_path / str(number)
        (root / "read").mkdir(parents=True)
        history = []
        for _ in range(2 + number % 2):
            rank, at = choose(rng, places)
            everyone = rng.random() < 0.5
            history.append(f"rank {rank} at {at}, {places[rank][at - 1]}, {'all' if everyone else 'one'}")
            if runs.kill(root, rank, at, everyone):
                runs.killed[f"{'all' if everyone else 'one'}, {places[rank][at - 1]}"] += 1
        try:
            runs.complete(root)
            assert_same_files(name, root, straight)
        except AssertionError as error:
            raise AssertionError(f"{name}, run {number}, killed: {'; '.join(history)}\n{error}") from error
    print(f"{name}: {runs.killed.total()} kills: {dict(runs.killed)}")
    assert runs.killed.total() >= RUNS
