"""Two processes that shard a module train like a hand-written loop, and any number of processes reads their checkpoints.

The script ``sharded.py`` runs once in two processes and saves its results; most of these tests look at them.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eventtrain import LightningModule, MisconfigurationError
from eventtrain.callbacks import GradientAccumulation
from eventtrain.callbacks.distributed.fully_sharded_data_parallel import FullyShardedDataParallel
from eventtrain.callbacks.distributed.sharded_module import units
from eventtrain.checkpoint import storage
from tests.callbacks.distributed.launch import HERE, ROOT, result, start
from tests.callbacks.distributed.shards import place_of_shard
from tests.kit import On, new_trainer, train
from tests.resuming import equal

SCRIPT = HERE / "sharded.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """The results of each check, on rank zero and on rank one."""
    start(SCRIPT, folder)
    return [result(folder, rank) for rank in range(2)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of the first check alone, which takes a sixth of the time of all."""
    folder = tmp_path_factory.mktemp("quick")
    start(SCRIPT, folder, "automatic")
    return [result(folder, rank) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(results: list[Any], folder: Path) -> Any:
    """The results of one process that reads the checkpoints of two: whole, damaged, missing, and converted."""
    whole = folder / "automatic" / "4.ckpt"
    command = [sys.executable, "-m", "eventtrain.callbacks.distributed.whole_checkpoint"]
    subprocess.run([*command, str(whole), str(folder / "converted.ckpt")], check=True, capture_output=True, cwd=ROOT)
    content = bytearray(whole.read_bytes())
    content[place_of_shard(whole, 1) + 10] ^= 1
    (folder / "damaged.ckpt").write_bytes(content)
    storage.write(storage.read(whole), folder / "gone.ckpt")  # without the processes' bytes
    start(SCRIPT, folder, "elsewhere", processes=1)
    return result(folder, "single")["elsewhere"]


# ------------------------------------------------------------------ training


def test_automatic_optimization_equals_a_loop_by_hand_with_fully_shard(quick: list[Any]) -> None:
    for rank in quick:
        assert equal(rank["automatic"]["ours"], rank["automatic"]["by hand"])
    assert equal(quick[0]["automatic"]["ours"]["optimizers"], quick[1]["automatic"]["ours"]["optimizers"])


def test_each_number_is_held_by_one_process(quick: list[Any]) -> None:
    (mine, total), (others, _) = (rank["automatic"]["numbers"] for rank in quick)
    assert mine + others == total
    assert max(mine, others) < 0.6 * total


def test_gradients_are_reduced_once_per_window(quick: list[Any]) -> None:
    for rank in quick:
        units_and_module = 3
        assert rank["automatic"]["updates"] == 3 * 2  # three epochs of five batches, in windows of 3 and 2
        assert rank["automatic"]["scatters"] == 6 * units_and_module


@pytest.mark.slow
def test_weights_can_stay_gathered_in_a_window(results: list[Any]) -> None:
    units, module, batches = 2, 1, 4
    once = units + module
    for rank in results:
        counts = {kind: gathered["counts"][-1] for kind, gathered in rank["gathered"].items()}
        assert counts["default"] == 2 * batches * (once + units)  # the module's own weights stay between forward and backward
        assert counts["backward"] == 2 * (once + batches * units)  # once in a forward, and in each backward
        assert counts["both"] == 2 * once


@pytest.mark.slow
def test_weights_that_stay_gathered_are_saved_resumed_and_averaged_in_a_window(results: list[Any]) -> None:
    for rank in results:
        expected, _ = rank["gathered"]["default"]["ends"]
        for gathered in rank["gathered"].values():
            assert all(equal(end, expected) for end in gathered["ends"])


def test_gradient_norms_count_all_parts(quick: list[Any]) -> None:
    for rank in quick:
        automatic = rank["automatic"]
        assert automatic["norms"] == automatic["expected norms"]
        for logged in automatic["layers"]:
            layers = torch.tensor([value for name, value in logged.items() if name.startswith("grad_norm/")])
            assert len(layers) == 7
            assert torch.allclose(layers.norm(), torch.tensor(logged["grad_norm"]))


@pytest.mark.slow
def test_clipping_uses_the_norm_that_one_process_computes(results: list[Any]) -> None:
    for rank in results:
        for (norm,), expected, ours, by_hand in rank["norms"]:
            # Another order of additions than in one process over the samples of both.
            assert norm == pytest.approx(expected, rel=1e-6)
            assert all(torch.allclose(ours[name], by_hand[name], atol=1e-7) for name in by_hand)
    assert results[0]["norms"][1][0] == results[1]["norms"][1][0]


@pytest.mark.slow
def test_manual_optimization_equals_averaging_by_hand(results: list[Any]) -> None:
    for rank in results:
        assert equal(rank["manual"]["ours"], rank["manual"]["by hand"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["drop", "skip", "weights", "early", "late", "nothing"])
def test_a_window_ends_as_with_distributed_data_parallel(results: list[Any], kind: str) -> None:
    for rank in results:
        wrapped, sharded = rank["windows"][kind]
        assert equal(wrapped, sharded)


@pytest.mark.slow
def test_steps_of_ones_own_are_averaged_as_by_hand(results: list[Any]) -> None:
    for rank in results:
        for sharded, by_hand in rank["own_steps"]:
            assert all(torch.allclose(sharded[name], value, atol=1e-6) for name, value in by_hand.items())


@pytest.mark.slow
def test_layers_that_share_a_weight_are_sharded_together(results: list[Any]) -> None:
    for rank in results:
        wrapped, sharded = rank["tied"]["ends"]
        assert equal(wrapped, sharded)
        assert torch.equal(sharded["into.weight"], sharded["out.weight"])
        assert rank["tied"]["apart"] == ["middle"]


@pytest.mark.slow
def test_a_module_can_be_trained_again_after_an_error_in_a_step(results: list[Any]) -> None:
    for rank in results:
        after_error, undisturbed = rank["failed"]
        assert equal(after_error, undisturbed)


@pytest.mark.slow
def test_a_run_that_would_be_wrong_is_refused(results: list[Any]) -> None:
    for rank in results:
        line_search, scaling = rank["refused"]
        assert "LBFGS decides by the loss" in line_search
        assert "MixedPrecision scales the loss" in scaling and "MixedPrecision('bf16')" in scaling


@pytest.mark.slow
def test_the_order_of_attachment_does_not_matter(results: list[Any]) -> None:
    for rank in results:
        first, other_order = rank["order"]
        assert equal(first, other_order)
    undisturbed, resumed = results[0]["order"][0]["ends"]
    assert equal(undisturbed, resumed)
    (fit, _, *evaluated), (fit_on_rank_one, _, *evaluated_on_rank_one) = (rank["order"][0]["metrics"] for rank in results)
    assert evaluated == evaluated_on_rank_one
    for name in ("val", "seen"):
        assert fit[name] == fit_on_rank_one[name] == evaluated[0][name] != evaluated[1][name]
    assert fit["seen"] == pytest.approx(float(undisturbed["averages"][0]["seen"]))
    assert fit["seen"] != pytest.approx(float(results[1]["order"][0]["ends"][0]["averages"][0]["seen"]))


# ------------------------------------------------------------------ evaluation


@pytest.mark.slow
def test_evaluation_leaves_training_as_it_is(results: list[Any]) -> None:
    for rank in results:
        without, with_evaluation = rank["evaluation"]["ends"]
        assert equal(without, with_evaluation)


@pytest.mark.slow
def test_evaluation_uses_the_averages_and_as_many_batches_on_each_rank(results: list[Any]) -> None:
    first, second = (rank["evaluation"] for rank in results)
    assert [len(batch) for batch in first["seen"]] == [len(batch) for batch in second["seen"]]
    tested = [list(itertools.chain(*rank["seen"][-2:])) for rank in (first, second)]
    assert len({*tested[0], *tested[1]}) == 7  # all samples; one of them twice
    assert tested[1][-1] == tested[0][0]
    assert first["metrics"] == second["metrics"]
    expected = torch.stack([*first["test by hand"], *second["test by hand"]]).mean()
    assert torch.allclose(torch.tensor(first["metrics"][-1]["val"]), expected)
    assert len(first["predicted"]) == len(second["predicted"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_a_validation_that_one_process_leaves_is_left_by_all_at_the_same_batch(results: list[Any], ranks: Any) -> None:
    for rank in results:
        each, undisturbed = rank["interrupted"][ranks], rank["interrupted"][()]
        assert undisturbed["left"] == 8
        assert each["left"] == 3 if len(ranks) == 2 else 3 <= each["left"] <= 4
        assert each["left"] == results[0]["interrupted"][ranks]["left"]
        assert equal(each["end"], undisturbed["end"])


# ------------------------------------------------------------------ checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["automatic", "mixed", "manual", "finetuned"])
def test_a_run_resumes_exactly(results: list[Any], kind: str) -> None:
    for rank in results:
        resumed = rank["resumed"][kind]
        assert resumed["resumed"]
        assert all(equal(each, resumed["undisturbed"]) for each in resumed["resumed"])


@pytest.mark.slow
def test_a_checkpoint_is_one_file_and_each_part_is_written_once(results: list[Any], folder: Path) -> None:
    checkpoint = storage.read(folder / "automatic" / "4.ckpt")
    assert [name for name, value in checkpoint["state_dict"].items() if value is not None] == ["seen"]
    for tensor in checkpoint["shards"]["tensors"]:
        assert sum(math.prod(sizes) for *_, sizes in tensor["parts"]) == math.prod(tensor["shape"])
    assert [path.name for path in (folder / "automatic").rglob("*") if path.is_dir()] == []


@pytest.mark.slow
def test_a_resumed_run_leaves_its_checkpoints_and_nothing_else(results: list[Any]) -> None:
    for rank in results:
        checkpointed = rank["checkpointed"]
        assert checkpointed["first"] == ["checkpoints", "epoch=0-step=5.ckpt", "last.ckpt", "previous.ckpt"]
        assert checkpointed["second"] == ["checkpoints", "epoch=1-step=10.ckpt", "last.ckpt", "previous.ckpt"]
        assert equal(checkpointed["resumed"], checkpointed["undisturbed"])


@pytest.mark.slow
@pytest.mark.parametrize("place", ["epoch", "window"])
def test_a_run_that_does_not_shard_is_resumed_by_one_that_shards(results: list[Any], place: str) -> None:
    for rank in results:
        whole, sharded = rank["from_whole"][place]
        assert equal(whole, sharded)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["automatic", "mixed", "manual", "finetuned"])
def test_one_process_restores_the_state_of_two(alone: Any, folder: Path, kind: str) -> None:
    assert equal(alone[f"{kind} 1"], result(folder / kind, "epoch-0"))
    assert not equal(alone[f"{kind} 1"], alone[f"{kind} 2"])  # it trained on


@pytest.mark.slow
def test_one_process_validates_with_the_averages_of_two(alone: Any) -> None:
    assert torch.allclose(torch.tensor(alone["validated"][0]["val"]), alone["validated by hand"])
    assert not equal(alone["automatic 1"]["averages"], alone["automatic 1"]["module"])


@pytest.mark.slow
def test_a_converted_checkpoint_is_a_file_of_weights(alone: Any, folder: Path) -> None:
    assert equal(alone["converted"], result(folder / "automatic", "epoch-0")["module"])


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_resumed_is_an_error(alone: Any) -> None:
    window, gone, damaged = alone["refused"]
    assert "open accumulation window" in window
    assert "gone.ckpt cannot be read: ValueError: the bytes of rank 0 are missing" in gone
    assert "shards/1 has another checksum" in damaged


@pytest.mark.slow
def test_a_run_resumes_exactly_from_each_batch(folder: Path) -> None:
    start(SCRIPT, folder, "everywhere")
    for rank in range(2):
        for kind, resumed in result(folder, rank)["everywhere"].items():
            assert [equal(each, resumed["undisturbed"]) for each in resumed["resumed"]] == [True] * 10, kind


@pytest.mark.slow
def test_four_processes_restore_the_state_of_two(results: list[Any], folder: Path) -> None:
    start(SCRIPT, folder, "elsewhere", processes=4)
    for rank in range(4):
        elsewhere = result(folder, rank)["elsewhere"]
        for kind in ("automatic", "mixed", "manual"):
            assert equal(elsewhere[f"{kind} 1"], result(folder / kind, "epoch-0"))


@pytest.mark.slow
def test_four_processes_resume_exactly_if_two_hold_the_same_parts(folder: Path) -> None:
    start(SCRIPT, folder, "hybrid", processes=4)
    for rank in range(4):
        undisturbed, resumed = result(folder, rank)["hybrid"]
        assert equal(undisturbed, resumed)


# ------------------------------------------------------------------ parts


class Block(nn.Module):
    """A block with one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


class Model(LightningModule):
    """A module with blocks in a list, one block in another module, and a layer without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.nested = nn.ModuleDict({"a": nn.Sequential(Block(), nn.Linear(2, 2))})
        self.dropout = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.first().linear(batch[0]).mul(self.scale).square().mean()

    def first(self) -> Block:
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_units_are_children_or_of_chosen_classes() -> None:
    module = Model()
    nested = module.get_submodule("nested.a")
    first, second, third = module.first(), module.blocks[1], module.get_submodule("nested.a.0")
    assert units(module, None) == [nested, second, first]
    assert units(module, (Block,)) == [third, second, first]
    assert units(module, (nn.Dropout,)) == []
    assert isinstance(second, Block)
    second.linear.bias = first.linear.bias
    assert units(module, (Block,)) == [third]


def test_a_single_process_trains_as_without_the_callback(tmp_path: Path) -> None:
    ends = []
    for callbacks in ((), (FullyShardedDataParallel(),)):
        torch.manual_seed(3)
        module = Model()
        loader = DataLoader(TensorDataset(torch.randn(8, 2)), 2, shuffle=True)
        trainer = train(module, loader, *callbacks, max_epochs=2, seed=1)
        trainer.save_checkpoint(tmp_path / "alone.ckpt")
        assert trainer.world_size == 1
        ends.append(module.state_dict())
    assert equal(dict(ends[0]), dict(ends[1]))
    assert "shards" not in storage.read(tmp_path / "alone.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["alone.ckpt"]


def test_a_single_process_resumes_in_an_open_window(tmp_path: Path) -> None:
    def save(trainer: Any, event: Any) -> None:
        if trainer.total_batch_idx == 1:
            trainer.save_checkpoint(tmp_path / "window.ckpt")

    ends = []
    for path in (None, tmp_path / "window.ckpt"):
        torch.manual_seed(3)
        module = Model()
        trainer = new_trainer(FullyShardedDataParallel(), GradientAccumulation(4), On(take_checkpoint=save), seed=1)
        trainer.fit(module, DataLoader(TensorDataset(torch.randn(8, 2)), 2), ckpt_path=path)
        ends.append(dict(module.state_dict()))
    assert equal(*ends)


def test_units_have_to_be_classes_of_modules() -> None:
    with pytest.raises(MisconfigurationError, match=r"FullyShardedDataParallel\(units=\('Block',\)\): give classes of modules"):
        FullyShardedDataParallel(units=("Block",))  # type: ignore[arg-type]
