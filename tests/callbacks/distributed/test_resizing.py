"""Another number of processes continues an epoch: each of its remaining samples is trained once, or an error says why not.

The script ``resized.py`` does it with real processes. The other tests run one process after the other, with fakes of the rest,
which is enough to see which samples each of them trains.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from eventtrain import Callback, MisconfigurationError, Trainer
from eventtrain.callbacks.distributed.data_parallel import DataParallel
from eventtrain.events import JoinProcesses, PrepareLoader
from tests.callbacks.distributed import resized
from tests.callbacks.distributed.launch import HERE, ROOT
from tests.callbacks.distributed.resized import KINDS, REFUSED, RESIZES, Seen, Unmerged
from tests.kit import FakeProcesses


class Shares(DataParallel, Callback):
    """Divides data like the callbacks for several processes, and joins fakes."""

    def __init__(self, processes: FakeProcesses | None) -> None:
        super().__init__(True, None)
        self._processes: Any = processes

    def on_prepare_loader(self, trainer: Trainer, event: PrepareLoader) -> None:
        if event.stage == "train":
            super().on_prepare_loader(trainer, event)

    def on_validation_epoch_start(self, trainer: Trainer, event: Any) -> None:
        """Overwrite no buffers: there are none."""

    def on_join_processes(self, trainer: Trainer, event: JoinProcesses) -> None:
        self._continues = False
        event.processes = self._processes or event.processes


class OneOfSeveral(FakeProcesses):
    """One of several processes that run one after the other, from the last.

    Args:
        world_size: Their number.
        global_rank: The index of this one.
        states: The states for checkpoints of those that have run, by rank.
        ckpt_path: The checkpoint that the first process has found.
    """

    def __init__(self, world_size: int, global_rank: int, states: dict[int, Any], ckpt_path: Any) -> None:
        super().__init__(world_size, global_rank)
        self.states, self.ckpt_path = states, ckpt_path

    def broadcast(self, value: Any) -> Any:
        return ([self.ckpt_path], None) if isinstance(value, tuple) else value

    def gather(self, value: Any) -> list[Any]:
        if isinstance(value, dict) and "rng" in value:
            self.states[self.global_rank] = copy.deepcopy(value)
        return [self.states.get(rank, value) for rank in range(self.world_size)] if self.global_rank == 0 else []


def train(
    monkeypatch: pytest.MonkeyPatch,
    make: Any,
    count: int,
    ckpt_path: Any = None,
    saves: Path | None = None,
    module: Any = Seen,
    place: tuple[int, int] = (1, 3),
    **options: Any,
) -> list[Any]:
    """Train in each of some processes in turn, from the last; return their modules from the first."""
    modules: list[Any] = []
    states: dict[int, Any] = {}
    monkeypatch.setenv("WORLD_SIZE", str(count))
    for rank in reversed(range(count)):
        monkeypatch.setenv("RANK", str(rank))
        torch.manual_seed(1)
        processes = None if count == 1 else OneOfSeveral(count, rank, states, ckpt_path)
        callback = Shares(processes)
        trainer = Trainer(max_epochs=2, device="cpu", callbacks=[callback], default_callbacks=False, **options)

        def save(trainer: Trainer, event: Any) -> None:
            if saves is not None and (trainer.current_epoch, trainer.batch_idx) == place:
                trainer.save_checkpoint(saves)

        trainer.signals.safe_point.connect(save)
        modules.insert(0, module())
        trainer.fit(modules[0], make(), ckpt_path=ckpt_path)
    return modules


def samples(modules: list[Any], batches: range = range(99), part: int = 0) -> Counter[int]:
    """Count the samples that all processes trained in some batches of the second epoch."""
    seen = [parts[part] for module in modules for epoch, batch, parts in module.seen if epoch == 1 and batch in batches]
    return Counter(index for each in seen for index in each)


def by_batch(modules: list[Any]) -> dict[int, Counter[int]]:
    return {
        batch: samples(modules, range(batch, batch + 1)) for batch in range(99) if samples(modules, range(batch, batch + 1))
    }


FAST = [kind for kind in KINDS if kind != "workers"]


SLOWER = [pytest.param(*resize, marks=pytest.mark.slow) if 4 in resize else resize for resize in RESIZES]


@pytest.mark.parametrize(("before", "now"), SLOWER)
@pytest.mark.parametrize("kind", FAST)
def test_the_samples_that_are_left_are_trained_once(
    kind: str, before: int, now: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(monkeypatch, KINDS[kind], before, saves=tmp_path / "a.ckpt")
    resumed = train(monkeypatch, KINDS[kind], now, tmp_path / "a.ckpt")
    check_samples(kind, whole, resumed, before, now)


def check_samples(kind: str, whole: list[Any], resumed: list[Any], before: int, now: int) -> None:
    """Check that two runs together train each sample of the second epoch once, but for those that fill up shares."""
    together = samples(whole, range(4)) + samples(resumed)
    count = 93 if kind == "padded samplers" else 95 if kind == "padded" else 96
    if kind == "left out":
        assert len(together) == 88 and set(together.values()) == {1}
        return
    if kind == "several in turn":
        assert together == Counter(range(16)) + Counter(range(48)) + Counter(range(32))
        return
    assert set(together) == set(range(count))
    assert sum(together.values()) - count == -count % now, "the shares are filled up as in any epoch of so many processes"
    for batch, trained in by_batch(resumed).items():
        if batch < 11:
            assert trained == samples(whole, range(batch, batch + 1)), "in the order in which the epoch began"


@pytest.mark.parametrize("mode", ["shuffled", "padded", "several"])
def test_an_epoch_can_be_resized_again(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(monkeypatch, KINDS[mode], 1, saves=tmp_path / "1.ckpt")
    train(monkeypatch, KINDS[mode], 4, tmp_path / "1.ckpt", tmp_path / "2.ckpt", place=(1, 5))
    again = train(monkeypatch, KINDS[mode], 4, tmp_path / "2.ckpt", tmp_path / "3.ckpt", place=(1, 7))
    last = train(monkeypatch, KINDS[mode], 2, tmp_path / "3.ckpt")
    assert sorted(by_batch(again)) == list(range(6, 12))
    assert {batch: seen for batch, seen in by_batch(last).items() if batch < 11} == {
        batch: seen for batch, seen in by_batch(whole).items() if 8 <= batch < 11
    }


def test_a_loader_that_draws_has_its_generator_restored_after_the_epoch_that_was_resized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> Any:
        generator = torch.Generator().manual_seed(5)
        return resized.load(96, shuffle=False, sampler=RandomSampler(resized.Ids(96), generator=generator))

    def only_two() -> Any:
        return make() if resized.world_size() == 1 else resized.load(96)

    train(monkeypatch, only_two, 2, saves=tmp_path / "1.ckpt", place=(0, 3))
    whole = train(monkeypatch, only_two, 1, tmp_path / "1.ckpt", tmp_path / "2.ckpt", place=(1, 3))
    resumed = train(monkeypatch, only_two, 1, tmp_path / "2.ckpt")
    assert by_batch(resumed) == {batch: seen for batch, seen in by_batch(whole).items() if batch > 3}


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2), (4, 2)])
def test_the_first_process_takes_over_the_values_of_the_epoch(
    before: int, now: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noting(Seen):
        """Notes its values of the epoch so far when the run goes on."""

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if (self.current_epoch, batch_idx) == (1, 4):
                entries = {entry.name: entry for entry in self.trainer.run_state.metrics._entries_of("train")}
                total = entries["sum"].total if "sum" in entries else None
                self.noted = (float(total or 0), self.mean.update_count, float(self.mean.mean_value), "metric" in entries)

    whole = train(monkeypatch, KINDS["shuffled"], before, saves=tmp_path / "a.ckpt")
    first, *others = train(monkeypatch, KINDS["shuffled"], now, tmp_path / "a.ckpt", module=Noting)
    total = float(sum(samples(whole, range(4)).elements()))
    assert first.noted == (total, 4 * before, total, True)
    for other in others:
        assert other.noted == (0.0, 0, 0.0, True), "all of them compute the metric object"


REFUSALS = {
    "the batch size": r"after 32 samples of the epoch: 4 batches of 4 on each of 2 processes.*batches of 7 on each of 1",
    "a batch size of several": r"gave 8 samples a batch to all 2 processes.*3 to 1 processes",
    "a sampler": r"it is not known which samples of the training data \(DataLoader over Ids, Blocks\) are left for 1",
    "other data": r"it is not known which samples.*data set of the same length",
    "a metric object": r"has updated a Last, which cannot add the updates of another process",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_epoch_that_cannot_be_divided_is_refused_before_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = REFUSED[name]
    module: Any = Unmerged if name == "a metric object" else Seen
    train(monkeypatch, first, 2, saves=tmp_path / "a.ckpt", module=module)
    with pytest.raises(MisconfigurationError, match=REFUSALS[name] + ".*Resume with 2 processes, or from a checkpoint of"):
        train(monkeypatch, second, 1, tmp_path / "a.ckpt", module=module)


def test_a_run_without_a_callback_for_several_processes_refuses_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(monkeypatch, KINDS["shuffled"], 2, saves=tmp_path / "a.ckpt")
    monkeypatch.setenv("WORLD_SIZE", "1")
    trainer = Trainer(max_epochs=2, device="cpu", default_callbacks=False)
    with pytest.raises(MisconfigurationError, match=r"written by 2 processes in an epoch.*Attach DistributedDataParallel\(\)"):
        trainer.fit(Seen(), KINDS["shuffled"](), ckpt_path=tmp_path / "a.ckpt")


def test_several_processes_continue_a_run_that_had_no_callback_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    trainer = Trainer(max_epochs=2, device="cpu", default_callbacks=False)

    def save(trainer: Trainer, event: Any) -> None:
        if (trainer.current_epoch, trainer.batch_idx) == (1, 3):
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    trainer.signals.safe_point.connect(save)
    alone = Seen()
    trainer.fit(alone, KINDS["shuffled"]())
    check_samples("shuffled", [alone], train(monkeypatch, KINDS["shuffled"], 2, tmp_path / "a.ckpt"), 1, 2)


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1)])
def test_a_validation_after_the_batch_is_not_repeated(
    before: int, now: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Validated(Seen):
        validations = 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.validations += 1

        def val_dataloader(self) -> Any:
            return [torch.ones(1)]

    options: dict[str, Any] = {"val_check_interval": 2, "num_sanity_val_steps": 0}
    train(monkeypatch, KINDS["shuffled"], before, saves=tmp_path / "a.ckpt", module=Validated, **options)
    for module in train(monkeypatch, KINDS["shuffled"], now, tmp_path / "a.ckpt", module=Validated, **options):
        assert module.validations == 4  # after batches 5, 7, 9 and 11, and not again after 3


def test_a_smaller_batch_of_all_processes_continues_at_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with batches of four go on as one with batches of four: 32 samples are eight of its batches."""

    def fours() -> Any:
        return DataLoader(resized.Ids(96), 4, shuffle=True)

    whole = train(monkeypatch, fours, 2, saves=tmp_path / "a.ckpt")
    (alone,) = train(monkeypatch, fours, 1, tmp_path / "a.ckpt")
    assert samples(whole, range(4)) + samples([alone]) == Counter(range(96))
    assert [batch for _, batch, _ in alone.seen] == list(range(8, 24))
    assert alone.trainer.total_batch_idx == 12 + 24 - 1


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The results of real processes."""
    folder = tmp_path_factory.mktemp("resized")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, HERE / "resized.py", folder], env=environment, check=True, timeout=600)
    return torch.load(folder / "results.pt", weights_only=False)


class Trained:
    """The samples of a process."""

    def __init__(self, outcome: Any) -> None:
        self.seen = outcome["seen"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_real_processes_train_them_once_and_end_with_the_weights_of_those_that_began(real: Any, kind: str) -> None:
    for before, now in RESIZES:
        whole, resumed = real["begun"][before], real[before, now]
        check_samples(kind, [Trained(each[kind]) for each in whole], [Trained(each[kind]) for each in resumed], before, now)
        ends, first = resumed[0][kind], whole[0][kind]
        assert ends["updates"] == first["updates"]
        if "padded" not in kind and "several" not in kind:
            assert torch.allclose(ends["weights"], first["weights"], atol=1e-6)
            assert ends["logged"] == pytest.approx(first["logged"])
        for each in resumed:
            assert torch.equal(each[kind]["weights"], ends["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_real_processes_can_be_resized_again(real: Any, kind: str) -> None:
    for before, between, last in ((2, 1, 1), (1, 2, 2), (2, 4, 1), (4, 1, 2)):
        batches = by_batch([Trained(each[kind]) for each in real[before, between]])
        again = by_batch([Trained(each[kind]) for each in real[before, between, last]])
        assert {at: seen for at, seen in again.items() if at < 11} == {at: seen for at, seen in batches.items() if 6 <= at < 11}
        if between == last:
            weights = [runs[0][kind]["weights"] for runs in (real[before, between], real[before, between, last])]
            assert torch.equal(*weights)
