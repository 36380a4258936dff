"""Four processes on a mesh of 2 x 2 train like one process: hybrid sharding, and tensor parallelism.

The script ``meshed.py`` runs once in four processes and saves its results; the slow tests look at them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eventtrain import MisconfigurationError
from eventtrain.callbacks.distributed.fully_sharded_data_parallel import FullyShardedDataParallel
from tests.callbacks.distributed import meshed
from tests.callbacks.distributed.launch import HERE, result, start
from tests.callbacks.distributed.meshed import SHARES
from tests.resuming import equal

SCRIPT = HERE / "meshed.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("meshed")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """The results of each check, on each of four ranks."""
    start(SCRIPT, folder, processes=4)
    return [result(folder, rank) for rank in range(4)]


def close(one: Any, other: Any) -> bool:
    """Return whether nested values are equal but for another order of additions."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, Tensor):
        return torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    return bool(one == (pytest.approx(other, rel=1e-5) if isinstance(other, float) else other))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.parametrize("weight", [False, True])
def test_a_mesh_trains_like_one_process(results: list[Any], kind: str, weight: bool) -> None:
    expected = meshed.by_hand(SHARES[kind], weight)
    for rank in results:
        trained = rank["trained"][f"{kind} {weight}"]
        assert close(trained["ours"], expected["ours"])
        assert close(trained["averages"], expected["averages"])
        assert close(trained["norms"], expected["norms"])  # of all parts together, on two meshes
        assert trained["metrics"]["val"] == pytest.approx(expected["val"], rel=1e-5)
        assert trained["metrics"]["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARES)
def test_data_are_divided_between_the_processes_of_different_data_alone(results: list[Any], kind: str) -> None:
    shares = SHARES[kind]
    runs = [rank["trained"][f"{kind} False"] for rank in results]
    assert [run["share"] for run in runs] == [(rank * shares // 4, shares) for rank in range(4)]
    seen = {run["share"][0]: run["seen"] for run in runs}
    assert all(run["seen"] == seen[run["share"][0]] for run in runs)
    of_epoch = [x for share in range(shares) for batch in seen[share][:3] for x in batch]
    assert len(of_epoch) == len(set(of_epoch)) == 6 * shares
    for run in runs:  # nothing counts twice
        assert run["metrics"]["samples"] == run["metrics"]["total"] == 6 * shares
        assert run["metrics"]["val_samples"] == 8


@pytest.mark.slow
def test_processes_that_divide_a_layer_hold_the_same_of_other_layers(results: list[Any]) -> None:
    runs = [rank["trained"]["tensor False"] for rank in results]
    for pair in (runs[:2], runs[2:]):
        assert equal(pair[0]["replicated"], pair[1]["replicated"])
        assert equal(pair[0]["metrics"], pair[1]["metrics"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARES)
def test_a_mesh_resumes_exactly_with_dropout(results: list[Any], kind: str) -> None:
    for rank in results:
        resumed = rank["resumed"][kind]
        assert len(resumed["resumed"]) == len(meshed.POINTS)
        assert all(equal(each, resumed["undisturbed"]) for each in resumed["resumed"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARES)
def test_activations_that_are_computed_again_change_no_bit(results: list[Any], kind: str) -> None:
    for rank in results:
        resumed = rank["resumed"][kind]
        assert all(equal(each, resumed["undisturbed"]) for each in resumed["recomputed"])


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_is_resumed_on_another(results: list[Any], folder: Path) -> None:
    for rank in results:
        exchanged = rank["exchanged"]
        for kind, other in (("hybrid", "tensor"), ("tensor", "hybrid"), ("tensor", "flat")):
            assert equal(exchanged[f"{kind} to {other}"], result(folder / kind, "epoch-0"))
            message = exchanged[f"{kind} to {other}, in a window"]
            assert message and "open accumulation window" in message and "mesh" in message


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_fewer_processes_resume_a_mesh(results: list[Any], folder: Path, count: int) -> None:
    start(SCRIPT, folder, "elsewhere", processes=count)
    for name in ["single"] if count == 1 else range(count):
        elsewhere = result(folder, name)["elsewhere"]
        for kind in SHARES:
            assert equal(elsewhere[f"{kind} 1"], result(folder / kind, "epoch-0"))
            assert not equal(elsewhere[f"{kind} 1"], elsewhere[f"{kind} 2"])  # it trained on


@pytest.mark.slow
def test_gradients_that_are_summands_in_a_window_are_resumed_exactly(results: list[Any]) -> None:
    for rank in results:
        undisturbed, *resumed = rank["in_parts"]["ends"]
        assert len(resumed) == 2 and all(equal(each, undisturbed) for each in resumed)
        assert close(undisturbed, rank["in_parts"]["by hand"])


@pytest.mark.slow
def test_a_run_that_a_mesh_would_train_wrongly_is_refused_by_all(results: list[Any]) -> None:
    for rank in results:
        refused = rank["refused"]
        assert "no layer of Model is divided along 'tensor'" in refused["same work"]
        assert "mesh=(3,)) has places for 3 processes, and there are 4" in refused["sizes"]
        assert "shard did not shard Model itself" in refused["unfinished"]
        assert "[0, 1] divide the same layers between them, and train on different batches" in refused["batches"]
        assert "draw different random numbers" in refused["random"]


@pytest.mark.slow
def test_an_override_without_the_mesh_and_a_mesh_that_exists_are_taken(results: list[Any]) -> None:
    for rank in results:
        (flat, (placement,)), (hybrid, placements) = rank["old_override"]
        assert close(flat, hybrid)
        assert placement.is_shard()
        assert placements[0].is_replicate() and placements[1].is_shard()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": 4}, r"mesh=4\): give the size of each dimension"),
        ({"mesh": (2, 0)}, r"mesh=\(2, 0\)\): give the size of each dimension"),
        ({"mesh": (2, 2)}, r"name each of the 2 dimensions, such as mesh=\(2, 4\)"),
        ({"mesh": (2, 2), "mesh_dim_names": ("shard",)}, "name each of the 2 dimensions"),
        ({"mesh_dim_names": ("shard",)}, "a mesh needs sizes too"),
        ({"mesh": (2, 2), "mesh_dim_names": ("shard", "rows")}, "does not know whether data are divided along 'rows'"),
        ({"mesh": (2, 2), "mesh_dim_names": ("replicate", "tensor")}, "one dimension has to be 'shard'"),
        ({"mesh": (2, 2), "mesh_dim_names": ("dp", "shard")}, "one dimension has to be 'shard'"),
        ({"mesh": (2, 2), "mesh_dim_names": ("tensor", "shard")}, "in the order 'replicate', 'shard', 'tensor'"),
        ({"mesh_dim_name": ("shard",)}, "Did you mean 'mesh_dim_names'"),
        ({"reshard_after_backward": None}, "reshard_after_backward"),
    ],
)
def test_a_mesh_that_says_too_little_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationError, match=message):
        FullyShardedDataParallel(**options)
