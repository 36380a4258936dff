"""Two processes decide alike, whatever each of them logs, and do together what they have to do together.

The script ``alike.py`` runs once and saves its results.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.callbacks.distributed.launch import HERE, ROOT


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each check, on rank zero and on rank one."""
    folder = tmp_path_factory.mktemp("alike")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, HERE / "alike.py", folder], env=environment, check=True, timeout=240)
    saved: list[dict[str, Any]] = torch.load(folder / "results.pt", weights_only=False)
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("interval", ["epoch", "step", "batch", "validation"])
@pytest.mark.parametrize("only_on", [None, 0, 1])
def test_a_scheduler_gets_one_value_at_each_interval(results: list[Any], interval: str, only_on: int | None) -> None:
    first, second = (rank["schedules"][interval, only_on] for rank in results)
    assert first == second
    # On average the values get worse, and on rank zero alone they get better. The first look is never worse than one before.
    looks = {"epoch": 3, "validation": 3, "step": 6, "batch": 6}[interval]
    gets_better = only_on == 0 and interval != "validation"
    assert first == pytest.approx(1.0 if gets_better else 0.1 ** (looks - 1))


@pytest.mark.slow
@pytest.mark.parametrize(("monitor", "only_on"), [("loss", None), ("loss", 1), ("val", None), ("val", 1)])
def test_early_stopping_looks_at_one_value(results: list[Any], monitor: str, only_on: int | None) -> None:
    (epochs, best, waited, reason), *others = (rank["stopping"][monitor, only_on] for rank in results)
    assert (epochs, waited) == (3, 2)
    assert best == (0.0 if monitor == "val" else 1.0 if only_on is None else 3.0)
    assert "has not improved in 2 looks" in reason
    assert [each[:3] for each in others] == [(epochs, best, waited)]


@pytest.mark.slow
def test_checkpoints_are_ranked_and_named_by_one_value(results: list[Any]) -> None:
    for rank in results:
        assert rank["checkpoints"]["scores"] == {"epoch=0-loss=1.0.ckpt": 1.0, "epoch=1-loss=3.0.ckpt": 3.0}
        assert rank["checkpoints"]["files"] == [
            "epoch=0-loss=1.0.ckpt",
            "epoch=1-loss=3.0.ckpt",
            "last.ckpt",
            "previous.ckpt",
        ]


@pytest.mark.slow
def test_an_evaluation_exchanges_the_same_with_any_number_of_batches_and_names(results: list[Any]) -> None:
    for rank in results:
        counts = {size: count for size, (count, _) in rank["exchanges"].items()}
        # The buffers, of which there are none; whether one has left; the values before and after the hooks of the epoch's end.
        assert counts[1, 1] == counts[6, 1] == 3
        assert counts[1, 12] == counts[6, 12] == 5, "their numbers are longer than the head of a message"


@pytest.mark.slow
def test_values_of_an_epoch_are_merged_by_name_and_to_the_bit(results: list[Any]) -> None:
    first, second = (rank["exchanges"][6, 12][1] for rank in results)
    assert first == second
    combine = {"mean": None, "sum": sum, "min": min, "max": max}
    for index in range(12):
        values: list[list[float]] = [
            [float(torch.tensor(0.1 + batch + index * (1 + rank))) for batch in range(6 + rank)] for rank in range(2)
        ]
        reduction = ("mean", "sum", "min", "max")[index % 4]
        total = torch.zeros(())
        parts = []
        for rank, each in enumerate(values):
            size = 1 + 2 * rank if reduction == "mean" else 1
            part = torch.tensor(each[0]) * size
            for value in each[1:]:
                part = part.add(torch.tensor(value), alpha=size)
            parts.append(part)
        total = parts[0] + parts[1]
        function = combine[reduction]
        if reduction == "mean":
            expected = float(total / (6 * 1.0 + 7 * 3.0))
        else:
            expected = float(total) if reduction == "sum" else function([*values[0], *values[1]])  # type: ignore[misc]
        assert first[f"value {index}"] == expected
    assert first["only here"] == 3.0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_a_validation_that_one_process_leaves_is_left_by_all(results: list[Any], ranks: Any) -> None:
    for rank, each in enumerate(results):
        left = each["interrupted"][ranks]
        assert left["ended"] == [] and left["saved"]
        assert 3 <= left["batches"] < 40, "in the middle of the first loader"
        assert left["epochs"] == (0, 1)
        assert left["resumed"] == 4 + rank + 3


@pytest.mark.slow
def test_one_of_two_processes_prepares_the_data_longer_than_the_timeout_and_both_end_with_its_error(results: list[Any]) -> None:
    (lines, first), (_, second) = (rank["prepared"] for rank in results)
    assert lines == ["0"]
    assert first == "OSError: no space left"
    assert second == "MisconfigurationError: Preparing.prepare_data has failed on rank 0: OSError: no space left"
