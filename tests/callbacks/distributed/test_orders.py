"""With three processes the order in which gradients are sent decides about their last bits, and a resumed run has it.

The script ``orders.py`` runs once in three processes.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.callbacks.distributed.launch import HERE, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """For each process and each way to wrap, whether the run that resumed each checkpoint ended with the same bits."""
    folder = tmp_path_factory.mktemp("orders")
    start(HERE / "orders.py", folder, processes=3)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("mode", ["plain", "a new wrapper", "find_unused_parameters", "views", "small buckets"])
def test_three_processes_resume_each_checkpoint_with_the_bits_of_the_run_before(results: list[Any], mode: str) -> None:
    for rank, result in enumerate(results):
        assert result[mode] == [True] * 10, f"rank {rank}"
