"""The share of the data that each process reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)

from eventtrain import MisconfigurationError
from eventtrain.callbacks.distributed.samplers import EveryNth, with_share
from eventtrain.distributed import SingleProcess

Sampler = DistributedSampler[Any]


class Numbers(Dataset[int]):
    """The numbers from zero.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self.numbers = range(count)

    def __getitem__(self, index: int) -> int:
        return self.numbers[index]

    def __len__(self) -> int:
        return len(self.numbers)


class Second(SingleProcess):
    """The second of three processes, which gets the seed 5 from rank zero."""

    world_size, global_rank = 3, 1

    def broadcast(self, value: Any) -> Any:
        return 5


def indices(loader: Any) -> list[int]:
    """Return the samples of all batches."""
    return [int(index) for batch in loader for index in (batch if isinstance(batch, Tensor) else [batch])]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_training_reads_the_share_of_a_distributed_sampler(shuffle: bool, drop_last: bool) -> None:
    loader = DataLoader(Numbers(20), 3, shuffle=shuffle, drop_last=drop_last)
    shared = with_share(loader, "train", Second())
    sampler: Sampler = DistributedSampler(Numbers(20), 3, 1, shuffle=shuffle, seed=5, drop_last=drop_last)
    expected = DataLoader(Numbers(20), 3, sampler=sampler, drop_last=drop_last)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        shared.sampler.set_epoch(epoch)
        assert [batch.tolist() for batch in shared] == [batch.tolist() for batch in expected]
    assert len(shared) == len(expected)
    assert len(loader) == (6 if drop_last else 7)  # as it was


@pytest.mark.parametrize("batch_size", [2, None])
@pytest.mark.parametrize("shuffle", [False, True])
def test_evaluation_reads_every_nth_sample(shuffle: bool, batch_size: int | None) -> None:
    shared = with_share(DataLoader(Numbers(8), batch_size, shuffle=shuffle), "test", Second())
    assert indices(shared) == [1, 4, 7]
    assert len(shared) == (2 if batch_size else 3)


def test_shares_have_no_sample_in_common_and_leave_none_out() -> None:
    shares = [list(EveryNth(10, rank, 4)) for rank in range(4)]
    assert sorted(itertools.chain(*shares)) == list(range(10))
    assert [len(EveryNth(10, rank, 4)) for rank in range(4)] == [3, 3, 2, 2]


def test_a_loader_that_knows_of_several_processes_stays_as_it_is() -> None:
    sampler: Sampler = DistributedSampler(Numbers(8), 2, 0)
    loaders: list[DataLoader[int]] = [
        DataLoader(Numbers(8), 2, sampler=sampler),
        DataLoader(Numbers(8), None, sampler=sampler),
        DataLoader(Numbers(8), batch_sampler=BatchSampler(sampler, 2, False)),
    ]
    for loader in loaders:
        assert with_share(loader, "train", Second()) is loader


class Stream(IterableDataset[int]):
    """An iterable data set."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


class Pairs(BatchSampler):
    """A batch sampler that a user wrote."""


@pytest.mark.parametrize(
    ("loader", "named"),
    [
        ([torch.zeros(2)], "list"),
        (DataLoader(Stream()), "DataLoader over Stream"),
        (DataLoader(Numbers(8), sampler=WeightedRandomSampler([1.0] * 8, 8)), "WeightedRandomSampler"),
        (DataLoader(Numbers(8), batch_sampler=Pairs(range(8), 2, False)), "Pairs"),
        (DataLoader(Numbers(8), sampler=RandomSampler(Numbers(8), replacement=True)), "RandomSampler"),
        (DataLoader(Numbers(8), sampler=RandomSampler(Numbers(8), num_samples=4)), "RandomSampler"),
    ],
)
@pytest.mark.parametrize("stage", ["train", "validation"])
def test_a_loader_that_cannot_be_divided_is_refused(loader: Any, named: str, stage: Any) -> None:
    with pytest.raises(MisconfigurationError, match=rf"the {stage} loader \(.*{named}.*DistributedSampler.*shares_data=False"):
        with_share(loader, stage, Second())


@pytest.mark.parametrize(("batch_size", "drop_last"), [(2, False), (2, True), (None, False)])
def test_evaluation_reads_a_padded_share(batch_size: int | None, drop_last: bool) -> None:
    loader = DataLoader(Numbers(8), batch_size, drop_last=drop_last)
    sampler: Sampler = DistributedSampler(Numbers(8), 3, 1, shuffle=False)
    expected = DataLoader(Numbers(8), batch_size, sampler=sampler, drop_last=drop_last)
    shared = with_share(loader, "test", Second(), pads_evaluation=True)
    assert [torch.as_tensor(each).tolist() for each in shared] == [torch.as_tensor(each).tolist() for each in expected]
    assert len(loader) == (8 if batch_size is None else 4)  # as it was
