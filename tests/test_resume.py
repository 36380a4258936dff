"""A run that goes on from any of its safe points ends with the bits of the run that was never interrupted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping
from tests.resuming import Model, check_all_safe_points


class Samples(Dataset[Any]):
    """Samples with an augmentation that draws; counts what is loaded."""

    def __init__(self, length: int = 20) -> None:
        self.values = torch.randn(length, 3, generator=torch.Generator().manual_seed(1))
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.loaded.append(index)
        return self.values[index] + 0.1 * torch.randn(3)


@pytest.mark.parametrize("val_check_interval", [None, 2], ids=["at the end", "inside"])
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
    """Checks all safe points of two epochs over what ``loader()`` makes."""

    def build() -> Any:
        callbacks = [GradientAccumulation(2), LRSchedulerStepping()]
        return Model(), loader(), [torch.ones(4, 3)], callbacks, {"max_epochs": 2, **options}

    return check_all_safe_points(build, tmp_path, every=every)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weighted_batches() -> Any:
    sampler = WeightedRandomSampler(torch.arange(1.0, 21.0), 18)
    return DataLoader(Samples(), batch_sampler=BatchSampler(sampler, 4, drop_last=True))


def with_replacement() -> Any:
    sampler = RandomSampler(Samples(), replacement=True, num_samples=19, generator=seeded())
    return DataLoader(Samples(), batch_size=4, sampler=sampler)


class Restarting(Sampler[int]):
    """Draws while it goes, from generators of its own, and has no length."""

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
    "no batches": lambda: DataLoader([torch.randn(4, 3, generator=seeded(n)) for n in range(6)], batch_size=None, shuffle=True),
    "list": lambda: [torch.randn(4, 3, generator=seeded(n)) for n in range(5)],
    "own state": Restartable,
    "stateful": lambda: StatefulDataLoader(Samples(), batch_size=4, shuffle=True),
    "stateful, generator": lambda: StatefulDataLoader(Samples(), batch_size=4, shuffle=True, generator=seeded()),
    "stateful, torch's sampler": lambda: StatefulDataLoader(Samples(), batch_size=4, sampler=RandomSampler(Samples())),
}


# torchdata's loader calls what torch 2.13 deprecates.
STATEFUL = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


@STATEFUL
@pytest.mark.parametrize("limit", [None, 3], ids=["all", "limited"])
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_loaders(tmp_path: Path, loader: Any, limit: int | None) -> None:
    trained_with(loader, tmp_path, limit_train_batches=limit)


@STATEFUL
@pytest.mark.parametrize("max_steps", [3, 4])
@pytest.mark.parametrize("loader", [LOADERS["generator"], LOADERS["stateful"]], ids=["generator", "stateful"])
def test_a_run_that_ends_inside_of_an_epoch(tmp_path: Path, loader: Any, max_steps: int) -> None:
    trained_with(loader, tmp_path, max_steps=max_steps)


WORKERS: dict[str, Any] = {
    "fork": {"multiprocessing_context": "fork"},
    "persistent": {"multiprocessing_context": "fork", "persistent_workers": True},
    "generator": {"multiprocessing_context": "fork", "generator": 3},
    "no batches": {"multiprocessing_context": "fork", "batch_size": None},
}


@pytest.mark.parametrize("options", WORKERS.values(), ids=WORKERS)
def test_workers(tmp_path: Path, options: dict[str, Any]) -> None:
    def loader() -> Any:
        given = {"batch_size": 4, "shuffle": True, "num_workers": 2, **options}
        if "generator" in given:
            given["generator"] = seeded(given["generator"])
        dataset: Any = Samples()
        if given["batch_size"] is None:
            dataset = [torch.randn(4, 3, generator=seeded(n)) for n in range(6)]
        return DataLoader(dataset, **given)

    trained_with(loader, tmp_path, every=2)
