"""Passes over a loader that begin again at the batch of a checkpoint.

A pass begins again with the same draws as the first time: the generators are set to their states before
``iter(loader)``, the sampler yields its indices again, the indices of the finished batches are dropped before anything
is loaded for them, and the generators are set to their states at the checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from eventtrain._torch import copy_loader, has_running_workers
from eventtrain.checkpoint.rng import seed_process
from eventtrain.data.generators import generator_states, set_generator_states
from eventtrain.errors import MisconfigurationError


class ResumableLoader:
    """A loader whose passes can begin at any batch.

    The loader itself is never changed. If it has to be read in another way, it is read through a shallow copy that has
    another sampler.

    Args:
        loader: The loader.
        key: The seeds of its workers depend on it, besides the pass and the batch: the run's seed, the stage, and the
            loader's index.
        passes: The number of passes over it that the run began earlier, in another process.

    Attributes:
        passes: The number of passes over it that the run has begun.
        is_stateful: Whether the loader saves its own position.
        has_sampler: Whether the loader reads by the indices of its sampler only.

    Example:
        >>> loader = ResumableLoader(["a", "b", "c"], key=(0, "train", 0))
        >>> list(loader.begin_at(1, batches=2, state=None))
        ['c']
    """

    def __init__(self, loader: Any, key: tuple[Any, ...], passes: int = 0) -> None:
        self.loader = loader
        self.passes = passes
        self.key = key
        self.is_stateful = is_stateful(loader)
        self.has_sampler = isinstance(loader, DataLoader) and has_plain_sampler(loader)
        self._copy: tuple[Any, Indices] | None = None
        if self.has_sampler and loader.num_workers > 0:
            self._copy = with_indices(loader)  # one for the run, so that persistent workers persist

    @property
    def is_exact(self) -> bool:
        """Whether a pass that begins again at a batch gives exactly the same batches."""
        return self.is_stateful or self.has_sampler or isinstance(self.loader, Sequence)

    def begin(self, number: int) -> Iterator[Any]:
        """Begin a pass.

        Args:
            number: The number of the pass, for the seeds of its workers.
        """
        if self._copy is None:
            self.passes += 1
            return iter(self.loader)
        return self._iterate(*self._copy, number, 0)

    def begin_at(self, number: int, batches: int, state: Any) -> Iterator[Any]:
        """Begin a pass after its first batches.

        The generators must be in the states in which the pass began the first time.

        Args:
            number: The number of the pass, for the seeds of its workers.
            batches: How many batches are done.
            state: The loader's own state, if it has one.

        Raises:
            MisconfigurationError: If the loader has fewer batches.
        """
        if self.is_stateful:
            self.passes += 1
            self.loader.load_state_dict(state)
            return iter(self.loader)
        if self.has_sampler:
            loader, indices = self._copy or with_indices(self.loader)
            iterator = self._iterate(loader, indices, number, batches)
            indices.drop_skipped()
            return iterator
        if not self.is_exact:
            warnings.warn(
                f"The training loader ({describe_loader(self.loader)}) keeps no position: it is read again from the beginning "
                f"of the epoch, and its first {batches} batches are dropped. That is exact only if it gives the same "
                "batches each time, and draws no random numbers for them. For an iterable data set that keeps its "
                "state, use torchdata's StatefulDataLoader; or give the loader state_dict and load_state_dict.",
                stacklevel=2,
            )
        iterator = self.begin(number)
        for done in range(batches):
            if next(iterator, _MISSING) is _MISSING:
                raise MisconfigurationError(
                    f"The checkpoint was written after {batches} batches of an epoch; the training loader "
                    f"({describe_loader(self.loader)}) has {done} now. Resume with the data that the run had."
                )
        return iterator

    def _iterate(self, loader: DataLoader[Any], indices: Indices, number: int, skip: int) -> Iterator[Any]:
        if loader.persistent_workers and not has_running_workers(loader) and self.passes:
            # Such a loader draws the seed of its workers only in the run's first pass, which was in another process.
            indices.is_closed = True
            with torch.random.fork_rng(devices=()):
                states = generator_states(loader)
                iter(loader)
                set_generator_states(loader, states)
            indices.is_closed = False
        self.passes += 1
        indices.skip, indices.key = skip, (*self.key, number)
        return iter(loader)


_MISSING = object()


def is_stateful(loader: Any) -> bool:
    """Return whether a loader saves its own position, as torchdata's ``StatefulDataLoader`` does."""
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


def has_plain_sampler(loader: DataLoader[Any]) -> bool:
    """Return whether a loader reads a map-style data set by the indices of its sampler, with torch's ``__iter__``."""
    return type(loader).__iter__ is DataLoader.__iter__ and not isinstance(loader.dataset, IterableDataset)


def with_indices(loader: DataLoader[Any]) -> tuple[DataLoader[Any], Indices]:
    """Return a shallow copy of a loader that reads by :class:`Indices`, and these indices."""
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    indices = Indices(getattr(loader, name), numbered=loader.num_workers > 0)
    return copy_loader(loader, **{name: indices}), indices


class Indices:
    """The indices of a sampler from a chosen one on, each with a seed if it goes to a worker.

    Args:
        sampler: A loader's ``batch_sampler``; its ``sampler`` if it makes no batches.
        numbered: Whether the indices go to workers.

    Attributes:
        skip: How many indices the next pass drops.
        key: The seeds of the next pass's workers depend on it.
        is_closed: Whether the next pass yields no indices, and does not ask the sampler for any.
    """

    def __init__(self, sampler: Any, *, numbered: bool) -> None:
        self._sampler = sampler
        self.is_closed = False
        self._numbered = numbered
        self._iterator: _IndexIterator | None = None
        self.skip = 0
        self.key: tuple[Any, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        if self.is_closed:
            return iter(())
        self._iterator = _IndexIterator(iter(self._sampler), self.skip, self.key if self._numbered else None)
        return self._iterator

    def __len__(self) -> int:
        return len(self._sampler)

    def drop_skipped(self) -> None:
        """Drop the indices at the beginning of the current pass; the sampler makes its draws.

        A loader with workers has asked for indices before this is called.
        """
        if self._iterator is not None:
            self._iterator.drop_skipped()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._sampler, name)  # a user may read batch_size, or an attribute of a custom sampler


class _IndexIterator:
    """One pass of :class:`Indices`.

    It drops indices at the first call and not earlier, because a loader draws a seed between making this iterator and
    asking it.
    """

    def __init__(self, indices: Iterator[Any], skip: int, key: tuple[Any, ...] | None) -> None:
        self._indices = indices
        self._skip = skip
        self._key = key
        self._number = skip

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._skip:
            self.drop_skipped()
        index = next(self._indices)
        if self._key is None:
            return index
        number = self._number
        self._number += 1
        return SeedingIndex(index, (*self._key, number))

    def drop_skipped(self) -> None:
        skip, self._skip = self._skip, 0
        for _ in range(skip):
            if next(self._indices, _MISSING) is _MISSING:
                return  # asking for the next will say that there is none


class SeedingIndex:
    """The indices of a batch on their way to a worker: they arrive unchanged, and seed the process in which they arrive.

    So the random numbers of a batch depend on the batch only, and not on earlier batches of the same worker. They are the
    same in a resumed run, whose workers are new. Neither the data set nor the worker has to be wrapped.

    Args:
        index: The indices; a single index if the loader makes no batches.
        key: It identifies the batch.
    """

    __slots__ = ("index", "key")

    def __init__(self, index: Any, key: tuple[Any, ...]) -> None:
        self.index = index
        self.key = key

    def __reduce__(self) -> Any:
        return _arrive, (self.index, self.key)


def _arrive(index: Any, key: tuple[Any, ...]) -> Any:
    seed_process(*key)
    return index


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the epoch to samplers of a loader that shuffle by it, such as ``DistributedSampler``."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        if callable(tell := getattr(sampler, "set_epoch", None)):
            tell(epoch)


def describe_loader(loader: Any) -> str:
    """Return the class of a loader, and of its data set if it has one, for messages."""
    dataset = getattr(loader, "dataset", None)
    over = f" over {type(dataset).__name__}" if dataset is not None else ""
    return f"{type(loader).__name__}{over}"
