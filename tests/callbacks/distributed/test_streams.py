"""Loaders without a length in several processes: an epoch ends in all of them when the first share ends, and nobody waits.

The script ``streams.py`` runs once for the quick half, in two processes, and once for the other, in four; it saves its results.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eventtrain import LightningModule
from eventtrain.callbacks.distributed.reading import ReadTogether
from eventtrain.core.interfaces import END
from eventtrain.distributed import SingleProcess
from tests.callbacks.distributed.launch import HERE, ROOT
from tests.callbacks.distributed.streams import KINDS, MODES, QUICK, SHARES
from tests.kit import train
from tests.resuming import equal

LIMIT = 3
HALVES = [pytest.param("quick", id="two processes"), pytest.param("rest", id="four", marks=pytest.mark.slow)]
RESUMED = [("quick", kind) for kind in KINDS[:QUICK]] + [
    pytest.param("rest", kind, marks=pytest.mark.slow) for kind in KINDS[QUICK:]
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Return a function that returns the results of a half; it runs the half first if nobody has asked for it before."""
    saved: dict[str, Any] = {}

    def of(half: str) -> Any:
        if half not in saved:
            folder: Path = tmp_path_factory.mktemp("streams")
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            subprocess.run([sys.executable, HERE / "streams.py", folder, half], env=environment, check=True, timeout=240)
            saved[half] = torch.load(folder / "results.pt", weights_only=False)
        return saved[half]

    return of


def shortest(mode: str, ranks: int) -> list[int]:
    """Return the number of batches that each epoch has to have."""
    shares = [shares[:ranks] for shares in SHARES]
    if mode == "several loaders":  # the longer of the two loaders of a process, then the shortest process
        return [min(max(length, 2) for length in each) for each in shares]
    return [min(*each, LIMIT) if mode == "a limit" else min(each) for each in shares]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("half", HALVES)
def test_epochs_end_in_all_processes_when_the_first_share_ends(results: Any, half: str, mode: str) -> None:
    ranks = [each[mode] for each in results(half)["ends"]]
    lengths = shortest(mode, len(ranks))
    knows = mode != "read_ahead=False"
    expected = [(epoch, index, knows and index == n - 1) for epoch, n in enumerate(lengths) for index in range(n)]
    windows = sum(lengths) // 2 if mode == "read_ahead=False" else sum((n + 1) // 2 for n in lengths)
    for rank in ranks:
        assert rank["seen"] == expected
        assert rank["updates"] == windows
        assert equal(rank["state"], ranks[0]["state"])


@pytest.mark.parametrize("half", HALVES)
def test_a_process_reads_at_most_one_batch_more_than_all_have(results: Any, half: str) -> None:
    ranks = [each["usual"]["reads"] for each in results(half)["ends"]]
    for index, reads in enumerate(ranks):
        assert reads == [min(each[index], min(each[: len(ranks)]) + 1) for each in SHARES]


@pytest.mark.parametrize(("half", "kind"), RESUMED)
def test_a_run_resumes_exactly_at_each_safe_point(results: Any, half: str, kind: str) -> None:
    for rank in results(half)["resumes"]:
        seen, state = rank[kind]["undisturbed"]
        resumed = rank[kind]["resumed"]
        assert [len(each) for each, _ in resumed] == list(range(len(seen) - 1, -1, -1))
        for its_batches, its_state in resumed:
            assert its_batches == seen[len(seen) - len(its_batches) :]
            assert equal(its_state, state)


# ---------------------------------------------------------------- the order of questions and answers


class Asking(SingleProcess):
    """Two processes that note their questions; the other one has a number of batches of its own.

    Args:
        length: That number.
    """

    world_size = 2

    def __init__(self, length: int) -> None:
        self.length, self.asked = length, 0
        self.notes: list[str] = []

    def gather_for_all(self, value: Any) -> list[Any]:
        return [value, value]

    def ask(self, flag: bool) -> Callable[[], bool]:
        number, self.asked = self.asked, self.asked + 1
        self.notes.append(f"ask {number}")

        def answer() -> bool:
            self.notes.append(f"hear {number}")
            return flag or number >= self.length

        return answer

    def read_together(self, read: Callable[[], Any], ahead: bool) -> Callable[[], Any]:
        return ReadTogether(read, self.ask, ahead=ahead)


class Noting(LightningModule):
    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self.notes, self.net = notes, nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.notes.append(f"train {batch_idx}{' as the last' if self.trainer.is_last_batch else ''}")
        return self.net(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def notes_of(other: int, **options: Any) -> list[str]:
    class Join:
        def on_join_processes(self, trainer: Any, event: Any) -> None:
            event.processes = processes

    class Batches:
        def __iter__(self) -> Any:
            return iter([torch.ones(2, 1)] * 4)

    processes = Asking(other)
    train(Noting(processes.notes), Batches(), Join(), **options)
    return processes.notes


@pytest.mark.parametrize("other", [3, 7])
def test_a_question_is_asked_a_batch_before_its_answer_is_needed(other: int) -> None:
    notes = notes_of(other)
    batches = min(other, 4)
    expected = ["ask 0", "hear 0", "ask 1"]
    for index in range(batches):
        is_last = index == batches - 1
        expected += [f"hear {index + 1}", *([] if is_last else [f"ask {index + 2}"])]
        expected.append(f"train {index}{' as the last' if is_last else ''}")
    assert notes == expected


def test_without_reading_ahead_each_batch_waits_for_its_answer() -> None:
    notes = notes_of(2, read_ahead=False)
    assert notes == ["ask 0", "hear 0", "train 0", "ask 1", "hear 1", "train 1", "ask 2", "hear 2"]


def test_nothing_is_read_after_the_end() -> None:
    batches = iter([1, END])
    read = ReadTogether(lambda: next(batches), lambda flag: lambda: flag, ahead=True)
    assert [read(), read()] == [1, END]
