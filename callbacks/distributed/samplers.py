"""The share of a data set that each process reads: samplers, and loaders that use them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler, SequentialSampler

from eventtrain._torch import copy_loader
from eventtrain.data.resumable import describe_loader, has_plain_sampler
from eventtrain.distributed import Processes
from eventtrain.errors import MisconfigurationError
from eventtrain.events import Stage


class EveryNth(Sampler[int]):
    """The indices that one process evaluates: every n-th, so that no sample counts twice.

    Args:
        length: The data set's length.
        first: The rank of the process.
        step: The number of processes.
    """

    def __init__(self, length: int, first: int, step: int) -> None:
        self.indices = range(first, length, step)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def with_share(loader: Any, stage: Stage, processes: Processes, *, pads_evaluation: bool = False) -> Any:
    """Return a loader that reads only this process's share of the data.

    Args:
        loader: A loader that reads all of the data. It is not changed. If its sampler knows of several processes, it is
            returned as it is.
        stage: If it is ``"train"``, the share is chosen by torch's ``DistributedSampler``, which shuffles if the loader's
            sampler does. In evaluation it is every n-th sample.
        processes: The processes that share the data; all of them have to call this function.
        pads_evaluation: Repeat samples in evaluation, so that all processes have the same number of batches.

    Raises:
        MisconfigurationError: If the loader's sampler may give samples in a way that this function cannot divide.
    """
    if any(hasattr(sampler, name) for sampler in samplers(loader) for name in ("set_epoch", "num_replicas")):
        return loader
    plain = plain_sampler(loader)
    if plain is None:
        raise MisconfigurationError(
            f"eventtrain cannot divide the {stage} loader ({describe_loader(loader)}{describe_sampler(loader)}) between "
            "processes. Give a DataLoader(..., sampler=DistributedSampler(dataset)), or attach the callback with "
            "shares_data=False and let each process load its share."
        )
    rank, world_size = processes.global_rank, processes.world_size
    sampler: Sampler[Any]
    if stage == "train":
        generator = getattr(plain, "generator", None)
        seed = torch.initial_seed() if generator is None else generator.initial_seed()
        sampler = DistributedSampler(
            loader.dataset,
            world_size,
            rank,
            shuffle=isinstance(plain, RandomSampler),
            seed=processes.broadcast(seed) % 2**32,  # DistributedSampler adds the epoch's number
            drop_last=getattr(loader.batch_sampler, "drop_last", False),
        )
    elif pads_evaluation:
        sampler = DistributedSampler(loader.dataset, world_size, rank, shuffle=False)
    else:
        sampler = EveryNth(len(loader.dataset), rank, world_size)
    return with_sampler(loader, sampler)


def with_sampler(loader: DataLoader[Any], sampler: Sampler[Any]) -> DataLoader[Any]:
    """Return a shallow copy of a loader with another sampler.

    Args:
        loader: The loader. If it makes batches, the copy makes batches of the same size.
        sampler: The sampler of the copy.
    """
    batches: Any = loader.batch_sampler
    batch_sampler = batches and BatchSampler(sampler, batches.batch_size, batches.drop_last)
    return copy_loader(loader, sampler=sampler, batch_sampler=batch_sampler)


def samplers(loader: Any) -> list[Any]:
    """Return the objects that may choose a loader's indices: the loader and its samplers."""
    batches = getattr(loader, "batch_sampler", None)
    candidates = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    return [each for each in candidates if each is not None]


def plain_sampler(loader: Any) -> Any:
    """Return a loader's sampler if it gives each sample once, in order or shuffled; else None."""
    if not isinstance(loader, DataLoader) or not has_plain_sampler(loader):
        return None
    batches = loader.batch_sampler
    if batches is not None and type(batches) is not BatchSampler:
        return None
    sampler = loader.sampler if batches is None else batches.sampler
    if type(sampler) is SequentialSampler:
        return sampler
    once = type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return sampler if once else None


def describe_sampler(loader: Any) -> str:
    """Return the class names of a loader's samplers, for messages."""
    return "".join(f", {type(each).__name__}" for each in samplers(loader)[1:])


def shuffling_seed(loader: Any) -> int | None:
    """Return the seed by which a loader's ``DistributedSampler`` shuffles; None if it has no such sampler."""
    return next((each.seed for each in samplers(loader) if hasattr(each, "seed")), None)


def set_shuffling_seed(loader: Any, seed: int | None) -> None:
    """Set the seed by which a loader's ``DistributedSampler`` shuffles; None changes nothing."""
    for sampler in samplers(loader):
        if seed is not None and hasattr(sampler, "seed"):
            sampler.seed = seed
