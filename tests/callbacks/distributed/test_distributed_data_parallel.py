"""Two processes train as a hand-written loop with torch's wrapper does, decide alike, and share a checkpoint.

What happens in several processes runs in ``tests/callbacks/distributed/checks.py``, once for all of these tests.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler, WeightedRandomSampler

from eventtrain import LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import GradientAccumulation
from eventtrain.callbacks.distributed.distributed_data_parallel import DistributedDataParallel
from eventtrain.callbacks.distributed.processes import EveryNth, join, own_device, shared_out
from eventtrain.distributed import SingleProcess
from tests.resuming import equal

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SCRIPTS = HERE
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start(*arguments: Any, options: tuple[str, ...] = (), processes: int = 2, timeout: float = 120) -> str:
    """Starts a script under torchrun, or in one plain process; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *options]
    command = [sys.executable, *(torchrun if processes > 1 else []), *map(str, arguments)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            printed, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes
            raise
    assert process.returncode == 0, errors[-8000:]
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each check gave, on rank zero and on rank one."""
    start(SCRIPTS / "checks.py", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def trained(state: dict[str, Any]) -> dict[str, Any]:
    """What all ranks have in common: not the statistics of batch norm, of which rank zero's count."""
    return {name: value for name, value in state["module"].items() if "running" not in name}


# ------------------------------------------------------------------ training


def test_equals_a_loop_by_hand_with_the_wrapper(ranks: list[Any]) -> None:
    for rank in ranks:
        assert equal(rank["automatic"]["ours"], rank["automatic"]["by hand"])
    (first, _), (second, _) = (rank["automatic"]["ours"] for rank in ranks)
    assert equal(trained(first), trained(second))


def test_gradients_are_exchanged_once_a_window(ranks: list[Any]) -> None:
    for rank in ranks:
        counted = rank["automatic"]
        assert counted["batches"] == 5  # windows of 3 and 2
        assert counted["all-reduces"] == counted["updates"] == 3 * 2
        assert counted["estimated"] == 3 * 2, "of this process's batches, not of all"


class Weighted(LightningModule):
    """As in the script."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, weight = batch
        return {"loss": F.mse_loss(self.net(x), y), "weight": weight}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def weighted_batches() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    xs, ys = torch.randn(100, 3, generator=generator), torch.randn(100, 1, generator=generator)
    sizes = [1 + (5 * index) % 7 for index in range(16)]
    starts = [sum(sizes[:index]) for index in range(16)]
    return [(xs[at : at + size], ys[at : at + size], float(size)) for at, size in zip(starts, sizes, strict=True)]


def by_samples(batches: list[Any], window: int) -> nn.Linear:
    """One process over the batches of all ranks: the mean over the samples of each window."""
    net = Weighted().net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for start in range(0, len(batches), window):
        xs, ys, weights = zip(*batches[start : start + window], strict=True)
        optimizer.zero_grad()
        (F.mse_loss(net(torch.cat(xs)), torch.cat(ys), reduction="sum") / sum(weights)).backward()
        optimizer.step()
    return net


def test_a_window_counts_by_the_weights_of_all_ranks(ranks: list[Any]) -> None:
    alone = Weighted()
    Trainer(callbacks=[GradientAccumulation(6)], default_callbacks=False, max_epochs=1, device="cpu").fit(
        alone, weighted_batches()
    )
    by_hand = by_samples(weighted_batches(), 6)
    for rank in ranks:
        for name, value in rank["weighted"].items():
            assert torch.allclose(value, alone.get_parameter(name), atol=1e-6)
            assert torch.allclose(value, by_hand.get_parameter(name.removeprefix("net.")), atol=1e-6)


def test_manual_optimization_equals_a_loop_by_hand(ranks: list[Any]) -> None:
    for rank in ranks:
        assert equal(rank["manual"]["ours"], rank["manual"]["by hand"])
    assert equal(ranks[0]["manual"]["ours"]["module"], ranks[1]["manual"]["ours"]["module"])


def test_a_window_whose_last_batch_is_skipped_is_averaged_too(ranks: list[Any]) -> None:
    by_hand = by_samples(weighted_batches()[:2], 2)
    assert equal(ranks[0]["skipped"], ranks[1]["skipped"])
    for name, value in ranks[0]["skipped"].items():
        assert torch.allclose(value, by_hand.get_parameter(name.removeprefix("net.")), atol=1e-6)


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: list[Any]) -> None:
    assert equal(ranks[0]["overflow"], ranks[1]["overflow"])
    assert ranks[0]["overflow"]["skipped"] == ["overflow"]
    assert ranks[0]["overflow"]["scale"] == 512.0
    assert ranks[0]["overflow"]["updates"] == 2


def test_shares_of_unequal_lengths_end_together(ranks: list[Any]) -> None:
    assert equal(ranks[0]["unequal"], ranks[1]["unequal"])
    for result in ranks[0]["unequal"]:  # two epochs of five batches: windows of 2, 2 and 1
        assert result["updates"] == result["all-reduces"] == 6


def test_a_layer_that_is_thawed_is_averaged_and_all_begin_with_rank_zeros_weights(ranks: list[Any]) -> None:
    assert equal(ranks[0]["thawed"], ranks[1]["thawed"])
    frozen, thawed = ranks[0]["thawed"]["firsts"]
    assert not torch.equal(frozen, thawed)


def test_the_wrapper_is_let_go_when_the_run_ends(ranks: list[Any]) -> None:
    assert all(rank["thawed"]["released"] for rank in ranks)


# ------------------------------------------------------------------ decisions and metrics


def test_values_of_a_step_are_reduced_where_asked_and_those_of_an_epoch_always(ranks: list[Any]) -> None:
    for index, rank in enumerate(ranks):
        values = rank["logged"]["values"]
        steps = [each for each in values if "own" in each][:3]
        assert [each["own"] for each in steps] == [10.0 * index + at for at in range(3)]
        assert [each["mean"] for each in steps] == [5.0, 6.0, 7.0]
        assert [each["max_step"] for each in steps] == [10.0, 11.0, 12.0]
        epoch = next(each for each in values if "epoch" in each)
        assert epoch["max_epoch"] == 12.0
        assert epoch["sum"] == 36.0
        assert epoch["epoch"] == pytest.approx((1 * 3 + 3 * 33) / 12)  # by the samples that each rank says it has


def test_schedulers_and_stopping_decide_alike(ranks: list[Any]) -> None:
    first, second = (rank["logged"] for rank in ranks)
    assert first["epochs"] == second["epochs"] == 4  # "val" is 0, 1, 2, 3, and -0, -1, -2, -3 on rank zero
    assert first["lr"] == second["lr"] == pytest.approx(1e-3)


def test_each_sample_is_evaluated_once(ranks: list[Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 3, generator=generator)[:, 0]
    both = [rank["evaluation"] for rank in ranks]
    assert both[0]["within fit"] == both[1]["within fit"]
    assert both[0]["within fit"]["samples"] == 7
    assert both[0]["within fit"]["mean"] == pytest.approx(float(values.mean()), abs=1e-6)
    assert both[0]["within fit"]["metric"] == pytest.approx(float(values.mean()), abs=1e-6)
    assert sorted(both[0]["seen"] + both[1]["seen"]) == pytest.approx(sorted(values.tolist()))
    assert [len(each["seen"]) for each in both] == [4, 3]
    assert [each["validated"]["samples"] for each in both] == [9, 9]
    assert [each["tested"]["samples"] for each in both] == [5, 5]
    assert [len(each["seen later"]) for each in both] == [5 + 3, 4 + 2]
    assert [len(each["predicted"]) for each in both] == [5, 4]


def test_evaluation_uses_rank_zeros_statistics(ranks: list[Any]) -> None:
    first, second = (rank["evaluation"]["statistics"] for rank in ranks)
    assert len(first) == 2
    assert equal(first, second)


# ------------------------------------------------------------------ checkpoints


def test_a_run_goes_on_exactly_from_each_safe_point(ranks: list[Any]) -> None:
    for rank in ranks:
        assert len(rank["resumed"]["resumed"]) == 2 * (4 + 1)  # after each batch but the last, and at the epoch's end
        for resumed in rank["resumed"]["resumed"]:
            assert equal(resumed["optimizers"], rank["resumed"]["undisturbed"]["optimizers"])
            assert equal(trained(resumed), trained(rank["resumed"]["undisturbed"]))
    for resumed in ranks[0]["resumed"]["resumed"]:
        assert equal(resumed, ranks[0]["resumed"]["undisturbed"])  # with its statistics


def test_rank_zero_writes(ranks: list[Any]) -> None:
    assert all(ranks[0]["resumed"]["written"])
    assert not any(ranks[1]["resumed"]["written"])


def parts() -> Any:
    """What the scripts share."""
    specification = importlib.util.spec_from_file_location("parts", SCRIPTS / "parts.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_one_process_goes_on_where_two_left_off(ranks: list[Any], folder: Path) -> None:
    # After the fifth batch an epoch is over; after the third a window, where 12 of 20 samples were trained.
    for index in (4, 2):
        module = parts().Model()
        run, batches = parts().resumable()
        trained: list[int] = []
        run.signals.train_batch_end.connect(lambda trainer, event, trained=trained: trained.append(event.batch_idx), weak=False)
        run.fit(module, batches, ckpt_path=folder / f"resume-{index}-rank-0.ckpt")
        assert trained == ([] if index == 4 else [6, 7, 8, 9]) + list(range(10))
        assert run.current_epoch == 2


def test_one_process_cannot_go_on_inside_of_a_window_of_two(ranks: list[Any], folder: Path) -> None:
    run, batches = parts().resumable()
    with pytest.raises(MisconfigurationError, match="written by 2 processes in an open accumulation window"):
        run.fit(parts().Model(), batches, ckpt_path=folder / "resume-1-rank-0.ckpt")


def test_a_run_whose_process_is_killed_is_started_anew_and_goes_on(ranks: list[Any], tmp_path: Path) -> None:
    start(SCRIPTS / "elastic.py", tmp_path, options=("--max-restarts", "1"))
    for rank, checks in enumerate(ranks):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert result["trained"] == [6, 7, 8, 9]
        assert equal(result["state"]["optimizers"], checks["resumed"]["undisturbed"]["optimizers"])
        assert equal(trained(result["state"]), trained(checks["resumed"]["undisturbed"]))


def test_a_signal_to_one_rank_ends_all_at_a_safe_point(ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank["preempted"] == {"batches": 2, "kept": True}


def test_one_rank_ends_the_run_or_the_epoch_for_all(ranks: list[Any]) -> None:
    for rank in ranks:
        stopped, *ended = rank["stopped"]
        assert stopped == (1, 6 + 3)
        assert ended == [(3, 6 + 3 + 6)] * 2


# ------------------------------------------------------------------ one process


def test_a_process_that_is_alone_trains_as_without_the_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    states = []
    for callbacks in ([], [DistributedDataParallel()]):
        torch.manual_seed(1)
        module = parts().Model()
        run = Trainer(callbacks=callbacks, max_epochs=2, device="cpu")
        run.fit(module, parts().loader(22))
        states.append(parts().state(module, run.optimizers))
        assert run.world_size == 1
    assert equal(*states)


def test_joining_needs_what_torchrun_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert join(torch.device("cpu")) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(MisconfigurationError, match=r"LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set.*torchrun"):
        join(torch.device("cpu"))


def test_each_process_has_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device(torch.device("cuda", 0), 1) == torch.device("cuda", 1) == chosen[0]
    with pytest.raises(MisconfigurationError, match=r"LOCAL_RANK=2, and torch sees 2 CUDA devices.*--nproc-per-node 2"):
        own_device(torch.device("cuda", 0), 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # it is shown its own alone
    assert own_device(torch.device("cuda", 0), 3) == torch.device("cuda", 0)
    with pytest.raises(MisconfigurationError, match="the trainer's device is 'mps'"):
        own_device(torch.device("mps"), 0)


@pytest.mark.parametrize("timeout", [0, -1.0, True, "10"])
def test_a_timeout_is_a_time(timeout: Any) -> None:
    with pytest.raises(MisconfigurationError, match=re.escape(f"timeout={timeout!r}")):
        DistributedDataParallel(timeout=timeout)


# ------------------------------------------------------------------ shares


class Second(SingleProcess):
    """The second of three processes; rank zero's seed is 5."""

    world_size, global_rank = 3, 1

    def broadcast(self, value: Any) -> Any:
        return 5


def indices(loader: Any) -> list[int]:
    return [int(index) for batch in loader for index in (batch if isinstance(batch, Tensor) else [batch])]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_training_reads_the_share_of_a_distributed_sampler(shuffle: bool, drop_last: bool) -> None:
    loader = DataLoader(range(20), 3, shuffle=shuffle, drop_last=drop_last)
    shared = shared_out(loader, "train", Second())
    sampler = DistributedSampler(range(20), 3, 1, shuffle=shuffle, seed=5, drop_last=drop_last)
    expected = DataLoader(range(20), 3, sampler=sampler, drop_last=drop_last)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        shared.sampler.set_epoch(epoch)
        assert [batch.tolist() for batch in shared] == [batch.tolist() for batch in expected]
    assert len(shared) == len(expected)
    assert len(loader) == (6 if drop_last else 7)  # as it was


@pytest.mark.parametrize("batch_size", [2, None])
@pytest.mark.parametrize("shuffle", [False, True])
def test_evaluation_reads_every_nth_sample(shuffle: bool, batch_size: int | None) -> None:
    shared = shared_out(DataLoader(range(8), batch_size, shuffle=shuffle), "test", Second())
    assert indices(shared) == [1, 4, 7]
    assert len(shared) == (2 if batch_size else 3)


def test_shares_have_no_sample_in_common_and_leave_none_out() -> None:
    shares = [list(EveryNth(10, rank, 4)) for rank in range(4)]
    assert sorted(itertools.chain(*shares)) == list(range(10))
    assert [len(EveryNth(10, rank, 4)) for rank in range(4)] == [3, 3, 2, 2]


def test_a_loader_that_knows_of_several_processes_stays_as_it_is() -> None:
    sampler = DistributedSampler(range(8), 2, 0)
    for loader in (
        DataLoader(range(8), 2, sampler=sampler),
        DataLoader(range(8), None, sampler=sampler),
        DataLoader(range(8), batch_sampler=BatchSampler(sampler, 2, False)),
    ):
        assert shared_out(loader, "train", Second()) is loader


class Stream(IterableDataset[int]):
    """An iterable data set."""

    def __iter__(self) -> Any:
        return iter(range(8))


class Pairs(BatchSampler):
    """A batch sampler of the user's own."""


@pytest.mark.parametrize(
    ("loader", "named"),
    [
        ([torch.zeros(2)], "list"),
        (DataLoader(Stream()), "DataLoader over Stream"),
        (DataLoader(range(8), sampler=WeightedRandomSampler([1.0] * 8, 8)), "WeightedRandomSampler"),
        (DataLoader(range(8), batch_sampler=Pairs(range(8), 2, False)), "Pairs"),
        (DataLoader(range(8), sampler=RandomSampler(range(8), replacement=True)), "RandomSampler"),
        (DataLoader(range(8), sampler=RandomSampler(range(8), num_samples=4)), "RandomSampler"),
    ],
)
@pytest.mark.parametrize("stage", ["train", "validation"])
def test_what_cannot_be_shared_out_is_refused(loader: Any, named: str, stage: Any) -> None:
    with pytest.raises(MisconfigurationError, match=rf"the {stage} loader \(.*{named}.*DistributedSampler.*shares_data=False"):
        shared_out(loader, stage, Second())


# ------------------------------------------------------------------ what cannot be


def test_what_would_hang_is_refused(ranks: list[Any]) -> None:
    for rank in ranks:
        line_search, batches, sparse = rank["refused"]
        assert "LBFGS decides by the loss" in line_search
        assert "the train loader (list" in batches
        assert "shares_data=False" in batches
        assert "sparse gradients in manual optimization" in sparse


@pytest.mark.slow
def test_the_example_runs_in_two_processes_as_in_one(tmp_path: Path) -> None:
    example = ROOT / "examples" / "distributed.py"
    options = ("--epochs", "2", "--log-dir", tmp_path)
    (_, two, _), (_, one, _) = (start(example, *options, processes=count).splitlines() for count in (2, 1))
    assert two == "processes 2, updates 40"
    assert one == "processes 1, updates 40"
