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


@pytest.mark.parametrize("interval", ["epoch", "step", "batch", "validation"])
@pytest.mark.parametrize("only_on", [None, 0, 1])
def test_a_scheduler_gets_one_value_at_each_interval(results: list[Any], interval: str, only_on: int | None) -> None:
    first, second = (rank["schedules"][interval, only_on] for rank in results)
    assert first == second
    # On average the values get worse, and on rank zero alone they get better. The first look is never worse than one before.
    looks = {"epoch": 3, "validation": 3, "step": 6, "batch": 6}[interval]
    gets_better = only_on == 0 and interval != "validation"
    assert first == pytest.approx(1.0 if gets_better else 0.1 ** (looks - 1))


@pytest.mark.parametrize(("monitor", "only_on"), [("loss", None), ("loss", 1), ("val", None), ("val", 1)])
def test_early_stopping_looks_at_one_value(results: list[Any], monitor: str, only_on: int | None) -> None:
    (epochs, best, waited, reason), *others = (rank["stopping"][monitor, only_on] for rank in results)
    assert (epochs, waited) == (3, 2)
    assert best == (0.0 if monitor == "val" else 1.0 if only_on is None else 3.0)
    assert "has not improved in 2 looks" in reason
    assert [each[:3] for each in others] == [(epochs, best, waited)]


def test_checkpoints_are_ranked_and_named_by_one_value(results: list[Any]) -> None:
    for rank in results:
        assert rank["checkpoints"]["scores"] == {"epoch=0-loss=1.0.ckpt": 1.0, "epoch=1-loss=3.0.ckpt": 3.0}
        assert rank["checkpoints"]["files"] == [
            "epoch=0-loss=1.0.ckpt",
            "epoch=1-loss=3.0.ckpt",
            "last.ckpt",
            "previous.ckpt",
        ]


def test_one_of_two_processes_prepares_the_data_and_both_end_with_its_error(results: list[Any]) -> None:
    (lines, first), (_, second) = (rank["prepared"] for rank in results)
    assert lines == ["0"]
    assert first == "OSError: no space left"
    assert second == "MisconfigurationError: Preparing.prepare_data has failed on rank 0: OSError: no space left"
