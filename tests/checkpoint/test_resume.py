"""A run that resumes from any of its safe points ends with the bits of the run that was never interrupted."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]

from eventtrain import LightningModule
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping
from tests.kit import train
from tests.resuming import KeepAll, Model, Record, assert_same, assert_same_run, check_all_safe_points, run


class Samples(Dataset[Any]):
    """Samples with an augmentation that draws random numbers. Records the indices that are loaded."""

    def __init__(self, length: int = 20) -> None:
        self.values = torch.randn(length, 3, generator=torch.Generator().manual_seed(1))
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.loaded.append(index)
        return self.values[index] + 0.1 * torch.randn(3)


@pytest.mark.parametrize("val_check_interval", [None, 2], ids=["at the end", "within"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
def test_every_safe_point_of_a_run(tmp_path: Path, shuffle: bool, accumulate: int, val_check_interval: int | None) -> None:
    def build() -> Any:
        loader = DataLoader(Samples(), batch_size=4, shuffle=shuffle)
        callbacks = [GradientAccumulation(accumulate), GradientClipping(1.0), LRSchedulerStepping()]
        return (
            Model(),
            loader,
            DataLoader(Samples(8), batch_size=4),
            callbacks,
            {"max_epochs": 3, "val_check_interval": val_check_interval},
        )

    # A batch each, but the epoch's last is the epoch's own.
    assert check_all_safe_points(build, tmp_path) == 15


# ------------------------------------------------------------------ loaders


def trained_with(loader: Any, tmp_path: Path, *, every: int = 1, **options: Any) -> int:
    """Check all safe points of two epochs over the loader that ``loader()`` makes."""

    def build() -> Any:
        callbacks = [GradientAccumulation(2), LRSchedulerStepping()]
        return Model(), loader(), [torch.ones(4, 3)], callbacks, {"max_epochs": 2, **options}

    return check_all_safe_points(build, tmp_path, every=every)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weighted_batches() -> Any:
    sampler = WeightedRandomSampler([float(weight) for weight in range(1, 21)], 18)
    return DataLoader(Samples(), batch_sampler=BatchSampler(sampler, 4, drop_last=True))


def with_replacement() -> Any:
    sampler = RandomSampler(Samples(), replacement=True, num_samples=19, generator=seeded())
    return DataLoader(Samples(), batch_size=4, sampler=sampler)


def ready_batches() -> Any:
    return [torch.randn(4, 3, generator=seeded(n)) for n in range(6)]


class Restarting(Sampler[int]):
    """Draws each index when it is needed, from its own generators, and has no length."""

    def __init__(self) -> None:
        self.generator = seeded()
        self.python = random.Random(5)
        self.numpy = numpy.random.default_rng(5)

    def __iter__(self) -> Any:
        for _ in range(18):
            drawn = int(torch.randint(10, (), generator=self.generator))
            yield drawn + self.python.randrange(5) + int(self.numpy.integers(5))


class Restartable:
    """A loader that keeps its own state."""

    def __init__(self) -> None:
        self.epoch, self.at = 0, 0

    def __iter__(self) -> Any:
        order = torch.randperm(5, generator=seeded(self.epoch)).tolist()
        while self.at < len(order):
            self.at += 1
            yield torch.full((4, 3), float(order[self.at - 1])) + 0.1 * torch.randn(4, 3)
        self.epoch, self.at = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.at = state["epoch"], state["at"]


LOADERS: dict[str, Any] = {
    "generator": lambda: DataLoader(Samples(), batch_size=4, shuffle=True, generator=seeded()),
    "weighted": weighted_batches,
    "replacement": with_replacement,
    "no length": lambda: DataLoader(Samples(), batch_size=4, sampler=Restarting()),
    "no batches": lambda: DataLoader(ready_batches(), batch_size=None, shuffle=True),
    "list": lambda: [torch.randn(4, 3, generator=seeded(n)) for n in range(5)],
    "own state": Restartable,
    "stateful": lambda: StatefulDataLoader(Samples(), batch_size=4, shuffle=True),
    "stateful, generator": lambda: StatefulDataLoader(Samples(), batch_size=4, shuffle=True, generator=seeded()),
    "stateful, torch's sampler": lambda: StatefulDataLoader(Samples(), batch_size=4, sampler=RandomSampler(Samples())),
}


# torchdata's loader calls a function that torch 2.13 deprecates.
STATEFUL = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


@STATEFUL
@pytest.mark.parametrize("limit", [None, 3], ids=["all", "limited"])
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_loaders(tmp_path: Path, loader: Any, limit: int | None) -> None:
    trained_with(loader, tmp_path, limit_train_batches=limit)


@STATEFUL
@pytest.mark.parametrize("max_steps", [3, 4])
@pytest.mark.parametrize("loader", [LOADERS["generator"], LOADERS["stateful"]], ids=["generator", "stateful"])
def test_a_run_that_ends_within_an_epoch(tmp_path: Path, loader: Any, max_steps: int) -> None:
    trained_with(loader, tmp_path, max_steps=max_steps)


WORKERS: dict[str, Any] = {
    "spawn": {"multiprocessing_context": "spawn"},
    "fork": {"multiprocessing_context": "fork"},
    "persistent": {"multiprocessing_context": "fork", "persistent_workers": True},
    "generator": {"multiprocessing_context": "fork", "generator": 3},
    "no batches": {"multiprocessing_context": "fork", "batch_size": None},
}


# On a machine with one core torch advises against two workers.
FEW_CORES = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@FEW_CORES
@pytest.mark.parametrize(
    "options",
    # Spawned workers import torch anew, a second each.
    [pytest.param(each, id=name, marks=[pytest.mark.slow] * (name == "spawn")) for name, each in WORKERS.items()],
)
def test_workers(tmp_path: Path, options: dict[str, Any]) -> None:
    def loader() -> Any:
        arguments = {"batch_size": 4, "shuffle": True, "num_workers": 2, **options}
        if "generator" in arguments:
            arguments["generator"] = seeded(arguments["generator"])
        dataset: Any = Samples()
        if arguments["batch_size"] is None:
            dataset = ready_batches()
        return DataLoader(dataset, **arguments)

    # Each resumed run starts its workers anew, which takes a second if they are spawned.
    trained_with(loader, tmp_path, every=4 if options["multiprocessing_context"] == "spawn" else 2)


@FEW_CORES
def test_workers_of_a_run_that_is_not_resumed_read_the_batches_of_a_plain_loop(tmp_path: Path) -> None:
    """Seeding by batch changes the draws of workers, but neither the order nor the generators of the process."""

    class Plain(Samples):
        def __getitem__(self, index: int) -> torch.Tensor:
            return self.values[index]

    def loader() -> Any:
        return DataLoader(Plain(), batch_size=4, shuffle=True, num_workers=2, multiprocessing_context="fork")

    torch.manual_seed(1)
    expected = [batch for _ in range(2) for batch in loader()]
    drawn = torch.rand(2)

    class Reader(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[torch.Tensor] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.seen.append(batch.clone())

        def configure_optimizers(self) -> None:
            return None

    module, its_loader = Reader(), loader()
    before = dict(its_loader.__dict__)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="configure_optimizers"):
        train(module, its_loader, max_epochs=2)
    assert_same(module.seen, expected, "batches")
    assert torch.equal(torch.rand(2), drawn)
    assert its_loader.__dict__ == before, "the user's loader is never changed"


def test_nothing_is_loaded_for_batches_that_are_done(tmp_path: Path) -> None:
    loaded: list[Samples] = []

    def build() -> Any:
        loaded.append(Samples())
        callbacks = [LRSchedulerStepping()]
        return Model(), DataLoader(loaded[-1], batch_size=4, shuffle=True), None, callbacks, {"max_epochs": 1}

    keep = KeepAll(tmp_path, Record())
    run(build, keep)
    run(build, ckpt_path=keep.kept[2][0])
    assert loaded[1].loaded == loaded[0].loaded[12:]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(torch.randn(20, 3, generator=seeded()))


def test_an_iterable_data_set_without_state_warns_that_it_cannot_be_exact(tmp_path: Path) -> None:
    def build() -> Any:
        return Model(), DataLoader(Stream(), batch_size=4), None, [LRSchedulerStepping()], {"max_epochs": 2}

    keep = KeepAll(tmp_path, Record())
    straight = run(build, keep)
    message = r"DataLoader over Stream\) keeps no position.*first 3 batches are dropped.*StatefulData"
    with pytest.warns(UserWarning, match=message) as said:
        resumed = run(build, ckpt_path=keep.kept[2][0])
    assert len(said) == 1, "once"
    # It gives the same batches each time and draws nothing, so that it is exact all the same.
    assert_same_run(resumed, straight, "iterable")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(build, ckpt_path=keep.kept[4][0])  # between two epochs there is no position to keep


def test_a_stateful_iterable_data_set_resumes_after_the_last_batch_used(tmp_path: Path) -> None:
    class Stateful(Stream):
        def __init__(self) -> None:
            self.at = 0

        def __iter__(self) -> Any:
            values = torch.randn(20, 3, generator=seeded())
            while self.at < 20:
                self.at += 1
                yield values[self.at - 1] + 0.1 * torch.randn(3)
            self.at = 0

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        trained_with(lambda: StatefulDataLoader(Stateful(), batch_size=4), tmp_path)


@STATEFUL
@FEW_CORES
def test_a_stateful_loader_with_workers_resumes_after_the_last_batch_used(tmp_path: Path) -> None:
    """It does not resume after the last batch that its workers have loaded ahead. Draws in workers are not compared."""
    values = list(torch.randn(24, 3, generator=seeded()))

    def loader() -> Any:
        return StatefulDataLoader(values, batch_size=4, shuffle=True, num_workers=2, multiprocessing_context="fork")

    trained_with(loader, tmp_path, every=2)


def test_a_loader_of_another_length_is_a_warning(tmp_path: Path) -> None:
    length = 20

    def build() -> Any:
        return Model(), DataLoader(Samples(length), batch_size=4), None, [LRSchedulerStepping()], {"max_epochs": 1}

    keep = KeepAll(tmp_path, Record())
    run(build, keep)
    length = 24
    message = r"after 2 of 5 batches of an epoch; the training loader .DataLoader over Samples. has 6"
    with pytest.warns(UserWarning, match=message):
        run(build, ckpt_path=keep.kept[1][0])
