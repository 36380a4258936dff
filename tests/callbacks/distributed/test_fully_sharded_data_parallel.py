"""Two processes that each hold a part of a module train as a hand-written loop does, and share a checkpoint with any number.

What happens in several processes runs in ``tests/callbacks/distributed/sharded.py``, once for all of these tests.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.utils.data import DataLoader, DistributedSampler

from eventtrain import LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import GradientAccumulation
from eventtrain.callbacks.distributed.fully_sharded_data_parallel import FullyShardedDataParallel, padded
from eventtrain.callbacks.distributed.sharded_checkpoint import OWNER, SafeUnpickler, Shards, units
from eventtrain.checkpoint import storage
from eventtrain.distributed import SingleProcess
from tests.resuming import equal

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SCRIPT = HERE / "sharded.py"


def start(*arguments: Any, processes: int = 2) -> None:
    """Starts the script under torchrun, or in one plain process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), *map(str, arguments)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes
            raise
    assert process.returncode == 0, errors[-8000:]


def result(folder: Path, name: Any) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each check gave, on rank zero and on rank one."""
    start(SCRIPT, folder)
    return [result(folder, rank) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(ranks: list[Any], folder: Path) -> Any:
    """What one process made of the checkpoints of two; of one it gets what torch's converter made of it."""
    checkpoint = storage.read(folder / "automatic" / "4.ckpt")
    shards = Path(checkpoint["shards"]["root"])
    whole, damaged = shards / checkpoint["shards"]["name"], shards / "damaged"
    converter = [sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", whole]
    subprocess.run([*converter, folder / "converted.ckpt"], check=True, capture_output=True)
    shutil.copytree(whole, damaged)
    part = next(damaged.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    for name in ("gone", "damaged"):
        checkpoint["shards"]["name"] = name
        storage.write(checkpoint, folder / f"{name}.ckpt")
    start(SCRIPT, folder, "elsewhere", processes=1)
    return result(folder, "alone")["elsewhere"]


# ------------------------------------------------------------------ training


def test_equals_a_loop_by_hand_with_fully_shard(ranks: list[Any]) -> None:
    for rank in ranks:
        assert equal(rank["automatic"]["ours"], rank["automatic"]["by hand"])
    assert equal(ranks[0]["automatic"]["ours"]["optimizers"], ranks[1]["automatic"]["ours"]["optimizers"])


def test_each_process_holds_a_part_and_no_number_twice(ranks: list[Any]) -> None:
    (mine, total), (others, _) = (rank["automatic"]["numbers"] for rank in ranks)
    assert mine + others == total
    assert max(mine, others) < 0.6 * total


def test_gradients_are_reduced_once_a_window(ranks: list[Any]) -> None:
    for rank in ranks:
        units_and_module = 3
        assert rank["automatic"]["updates"] == 3 * 2  # three epochs of five batches, in windows of 3 and 2
        assert rank["automatic"]["scatters"] == 6 * units_and_module


def test_gradient_norms_are_of_all_parts(ranks: list[Any]) -> None:
    for rank in ranks:
        automatic = rank["automatic"]
        assert automatic["norms"] == automatic["expected norms"]
        for logged in automatic["layers"]:
            layers = torch.tensor([value for name, value in logged.items() if name.startswith("grad_norm/")])
            assert len(layers) == 7
            assert torch.allclose(layers.norm(), torch.tensor(logged["grad_norm"]))


def test_clipping_is_by_the_norm_of_one_process(ranks: list[Any]) -> None:
    for rank in ranks:
        for (norm,), expected, ours, by_hand in rank["norms"]:
            # Another order of additions than in one process over the samples of both.
            assert norm == pytest.approx(expected, rel=1e-6)
            assert all(torch.allclose(ours[name], by_hand[name], atol=1e-7) for name in by_hand)
    assert ranks[0]["norms"][1][0] == ranks[1]["norms"][1][0]


def test_manual_optimization_equals_averaging_by_hand(ranks: list[Any]) -> None:
    for rank in ranks:
        assert equal(rank["manual"]["ours"], rank["manual"]["by hand"])


@pytest.mark.parametrize("kind", ["drop", "skip", "weights"])
def test_a_window_ends_as_with_the_other_wrapper(ranks: list[Any], kind: str) -> None:
    for rank in ranks:
        wrapped, sharded = rank["windows"][kind]
        assert equal(wrapped, sharded)


def test_layers_that_share_a_weight_are_sharded_together(ranks: list[Any]) -> None:
    for rank in ranks:
        wrapped, sharded = rank["tied"]["ends"]
        assert equal(wrapped, sharded)
        assert torch.equal(sharded["into.weight"], sharded["out.weight"])
        assert rank["tied"]["apart"] == ["middle"]


def test_a_module_can_be_trained_again_after_an_error_inside_of_a_step(ranks: list[Any]) -> None:
    for rank in ranks:
        after_error, undisturbed = rank["failed"]
        assert equal(after_error, undisturbed)


def test_what_cannot_be_right_is_refused(ranks: list[Any]) -> None:
    for rank in ranks:
        line_search, scaling, copying, order = rank["refused"]
        assert "LBFGS decides by the loss" in line_search
        assert "MixedPrecision scales the loss" in scaling and "MixedPrecision('bf16')" in scaling
        assert "save_on_exception=True" in copying
        assert "ExponentialMovingAverage is attached before" in order


# ------------------------------------------------------------------ evaluation


def test_evaluation_leaves_training_as_it_is(ranks: list[Any]) -> None:
    for rank in ranks:
        without, with_evaluation = rank["evaluation"]["ends"]
        assert equal(without, with_evaluation)


def test_evaluation_is_by_the_averages_on_as_many_batches_on_each_rank(ranks: list[Any]) -> None:
    first, second = (rank["evaluation"] for rank in ranks)
    assert [len(batch) for batch in first["seen"]] == [len(batch) for batch in second["seen"]]
    tested = [list(itertools.chain(*rank["seen"][-2:])) for rank in (first, second)]
    assert len({*tested[0], *tested[1]}) == 7  # all samples; one of them twice
    assert tested[1][-1] == tested[0][0]
    assert first["metrics"] == second["metrics"]
    expected = torch.stack([*first["test by hand"], *second["test by hand"]]).mean()
    assert torch.allclose(torch.tensor(first["metrics"][-1]["val"]), expected)
    assert len(first["predicted"]) == len(second["predicted"]) == 4


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("kind", ["automatic", "mixed", "manual"])
def test_goes_on_exactly(ranks: list[Any], kind: str) -> None:
    for rank in ranks:
        resumed = rank["resumed"][kind]
        assert resumed["resumed"]
        assert all(equal(each, resumed["undisturbed"]) for each in resumed["resumed"])


def test_a_file_holds_no_sharded_tensor_and_every_part_is_written_once(ranks: list[Any], folder: Path) -> None:
    checkpoint = storage.read(folder / "automatic" / "4.ckpt")
    assert [name for name, value in checkpoint["state_dict"].items() if value is not None] == ["seen"]
    shards = Path(checkpoint["shards"]["root"]) / checkpoint["shards"]["name"]
    assert shards.parent == folder / "automatic" / "checkpoints" / "shards"
    assert {path.name for path in shards.iterdir()} == {"__0_0.distcp", "__1_0.distcp", ".metadata", OWNER}


def test_sharded_tensors_stay_as_long_as_a_file_refers_to_them(ranks: list[Any]) -> None:
    for rank in ranks:
        kept = rank["kept"]
        for there, referred in (kept["first"], kept["second"]):
            assert there == referred
        assert equal(kept["resumed"], kept["undisturbed"])


@pytest.mark.parametrize("place", ["epoch", "window"])
def test_goes_on_from_a_run_that_does_not_shard(ranks: list[Any], place: str) -> None:
    for rank in ranks:
        whole, sharded = rank["from_whole"][place]
        assert equal(whole, sharded)


@pytest.mark.parametrize("kind", ["automatic", "mixed", "manual"])
def test_one_process_gets_what_two_had(alone: Any, folder: Path, kind: str) -> None:
    assert equal(alone[f"{kind} 1"], result(folder / kind, "epoch-0"))
    assert not equal(alone[f"{kind} 1"], alone[f"{kind} 2"])  # it trained on


def test_one_process_validates_with_the_averages_of_two(alone: Any) -> None:
    assert torch.allclose(torch.tensor(alone["validated"][0]["val"]), alone["validated by hand"])
    assert not equal(alone["automatic 1"]["averages"], alone["automatic 1"]["module"])


def test_a_converted_checkpoint_is_a_file_of_weights(alone: Any, folder: Path) -> None:
    assert equal(alone["converted"], result(folder / "automatic", "epoch-0")["module"])


def test_what_cannot_be_read_says_so(alone: Any) -> None:
    window, gone, damaged = alone["refused"]
    assert "open accumulation window" in window
    assert "neither in" in gone and "gone" in gone
    assert "damaged cannot be read" in damaged


@pytest.mark.slow
def test_goes_on_exactly_from_each_batch(folder: Path) -> None:
    start(SCRIPT, folder, "everywhere")
    for rank in range(2):
        for kind, resumed in result(folder, rank)["everywhere"].items():
            assert [equal(each, resumed["undisturbed"]) for each in resumed["resumed"]] == [True] * 10, kind


@pytest.mark.slow
def test_four_processes_get_what_two_had(ranks: list[Any], folder: Path) -> None:
    start(SCRIPT, folder, "elsewhere", processes=4)
    for rank in range(4):
        elsewhere = result(folder, rank)["elsewhere"]
        for kind in ("automatic", "mixed", "manual"):
            assert equal(elsewhere[f"{kind} 1"], result(folder / kind, "epoch-0"))


@pytest.mark.slow
def test_four_processes_of_which_two_hold_the_same_parts_go_on_exactly(folder: Path) -> None:
    start(SCRIPT, folder, "hybrid", processes=4)
    for rank in range(4):
        undisturbed, resumed = result(folder, rank)["hybrid"]
        assert equal(undisturbed, resumed)


# ------------------------------------------------------------------ files, without processes


def written(root: Path, name: str, owner: Path | None = None) -> Path:
    """A folder of sharded tensors."""
    (root / name).mkdir(parents=True)
    if owner is not None:
        (root / name / OWNER).write_text(str(owner))
    return root / name


def test_only_what_no_file_refers_to_is_removed(tmp_path: Path) -> None:
    root, run, other = tmp_path / "checkpoints" / "shards", tmp_path / "run", tmp_path / "other"
    saved, exported = run / "last.ckpt", run / "exported.pt"
    for path, name in ((saved, "last"), (run / "kept.ckpt", "kept"), (exported, "exported"), (other / "a.ckpt", "unowned")):
        storage.write({"state_dict": {}, "shards": {"name": name}}, path)
    (run / "damaged.ckpt").write_bytes(b"nothing")
    stay = [written(root, "last"), written(root, "kept", saved), written(root, "exported", exported)]
    stay += [written(root, "another's", other / "last.ckpt"), written(root, "unowned"), written(root, "being written")]
    go = [written(root, "surplus", saved), written(root, "of a killed run")]
    shards = Shards(root, SingleProcess())
    shards._used.add("being written")
    shards.clear(saved)
    assert [folder.name for folder in stay if not folder.exists()] == []
    assert [folder.name for folder in go if folder.exists()] == []
    assert (stay[0] / OWNER).read_text() == str(saved)


class Harmful:
    """Runs code where it is unpickled without care."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize(
    "content", [Harmful(), os.getcwd, subprocess.Popen, Metadata], ids=["Harmful", "getcwd", "Popen", "Metadata"]
)
def test_an_index_is_read_without_running_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "index").write_bytes(pickle.dumps(content))
    with open("index", "rb") as file:
        if content is Metadata:
            assert SafeUnpickler(file).load() is Metadata
        else:
            with pytest.raises(pickle.UnpicklingError, match="it names"):
                SafeUnpickler(file).load()
    assert not Path("harmed").exists()


@pytest.mark.parametrize("name", ["os.mkdir", "dataclass", "io.open"])
def test_an_index_names_nothing_that_its_module_merely_imports(name: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match="it names"):
        SafeUnpickler(io.BytesIO()).find_class("torch.distributed.checkpoint.metadata", name)


# ------------------------------------------------------------------ parts


class Block(nn.Module):
    """A block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


class Model(LightningModule):
    """Blocks in a list, one in another module, and what has no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.nested = nn.ModuleDict({"a": nn.Sequential(Block(), nn.Linear(2, 2))})
        self.dropout = nn.Dropout(0.5)
        self.own = nn.Parameter(torch.ones(2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.blocks[0].linear(batch).mul(self.own).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_units_are_children_or_of_the_given_classes() -> None:
    module = Model()
    first, second, third = module.blocks[0], module.blocks[1], module.nested["a"][0]
    assert units(module, None) == [module.nested["a"], second, first]
    assert units(module, (Block,)) == [third, second, first]
    assert units(module, (nn.Dropout,)) == []
    second.linear.bias = first.linear.bias
    assert units(module, (Block,)) == [third]


class Second(SingleProcess):
    """The second of three processes."""

    world_size, global_rank = 3, 1


@pytest.mark.parametrize(("batch_size", "drop_last"), [(2, False), (2, True), (None, False)])
def test_evaluation_reads_a_padded_share(batch_size: int | None, drop_last: bool) -> None:
    loader = DataLoader(range(8), batch_size, drop_last=drop_last)
    expected = DataLoader(range(8), batch_size, sampler=DistributedSampler(range(8), 3, 1, shuffle=False), drop_last=drop_last)
    shared = padded(loader, Second())
    assert [torch.as_tensor(each).tolist() for each in shared] == [torch.as_tensor(each).tolist() for each in expected]
    assert len(loader) == (8 if batch_size is None else 4)  # as it was


def test_a_process_alone_trains_as_without_it(tmp_path: Path) -> None:
    ends = []
    for callbacks in ((), (FullyShardedDataParallel(),)):
        torch.manual_seed(3)
        module = Model()
        run = Trainer(callbacks=callbacks, default_callbacks=False, max_epochs=2, device="cpu", seed=1)
        run.fit(module, DataLoader(torch.randn(8, 2), 2, shuffle=True))
        run.save_checkpoint(tmp_path / "alone.ckpt")
        assert run.world_size == 1
        ends.append(module.state_dict())
    assert equal(dict(ends[0]), dict(ends[1]))
    assert "shards" not in storage.read(tmp_path / "alone.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["alone.ckpt"]


def test_a_process_alone_goes_on_in_an_open_window(tmp_path: Path) -> None:
    ends = []
    for path in (None, tmp_path / "window.ckpt"):
        torch.manual_seed(3)
        module = Model()
        callbacks = [FullyShardedDataParallel(), GradientAccumulation(4)]
        run = Trainer(callbacks=callbacks, default_callbacks=False, max_epochs=1, device="cpu", seed=1)

        def keep(trainer: Any, event: Any) -> None:
            if trainer.total_batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "window.ckpt")

        run.signals.safe_point.connect(keep)
        run.fit(module, DataLoader(torch.randn(8, 2), 2), ckpt_path=path)
        ends.append(dict(module.state_dict()))
    assert equal(*ends)


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": True}, {"timeout": "10"}, {"units": ("Block",)}])
def test_arguments_that_cannot_be_right_are_refused(options: Any) -> None:
    (name,) = options
    with pytest.raises(MisconfigurationError, match=rf"FullyShardedDataParallel\({name}="):
        FullyShardedDataParallel(**options)
