"""The position in the data: how a pass over a loader is begun, and begun again where a checkpoint left it.

A pass is begun again by making the same draws as the first time: the generators are put where they were before
``iter(loader)``, the sampler hands out its indices again, those of the batches that are done are dropped before anything
is loaded for them, and the generators are put where they were at the checkpoint.
"""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from eventtrain.checkpoint.rng import seed_process
from eventtrain.errors import MisconfigurationError


class Source:
    """One loader of a run, as it is read: never changed, and where it has to be read in another way, through a shallow
    copy with another sampler.

    Args:
        loader: The loader.
        key: What its workers are seeded from, besides the pass and the batch: the run's seed, the stage, the loader's index.
        passes: How many passes over it the run has begun before, in another process.

    Attributes:
        passes: How many passes over it the run has begun.
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
        """Whether a pass can be begun again at a batch, exactly."""
        return self.is_stateful or self.has_sampler or isinstance(self.loader, Sequence)

    def begin(self, number: int) -> Iterator[Any]:
        """Begins a pass.

        Args:
            number: The pass's, for the seeds of its workers.
        """
        if self._copy is None:
            self.passes += 1
            return iter(self.loader)
        return self._iterate(*self._copy, number, 0)

    def begin_at(self, number: int, batches: int, state: Any) -> Iterator[Any]:
        """Begins a pass after its first batches. The generators have to be where they were when it was begun first.

        Args:
            number: As for :meth:`begin`.
            batches: How many batches are done.
            state: The loader's own state, where it has any.

        Raises:
            MisconfigurationError: The loader has fewer batches.
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
                f"The training loader ({describe_loader(self.loader)}) keeps no position: it is read from the epoch's "
                f"beginning again, and its first {batches} batches are dropped. That is exact only where it gives the same "
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
        if loader.persistent_workers and loader._iterator is None and self.passes:
            # Such a loader draws its workers' seed in the run's first pass alone, which was in another process.
            indices.is_closed = True
            with torch.random.fork_rng(devices=()):
                kept = generator_states(loader)
                iter(loader)
                set_generator_states(loader, kept)
            indices.is_closed = False
        self.passes += 1
        indices.skip, indices.key = skip, (*self.key, number)
        return iter(loader)


_MISSING = object()


def is_stateful(loader: Any) -> bool:
    """Whether a loader keeps its own position, as torchdata's ``StatefulDataLoader`` does."""
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


def has_plain_sampler(loader: DataLoader[Any]) -> bool:
    """Whether a loader reads by its sampler's indices and nothing else: over a map-style data set, by torch's own
    ``__iter__``."""
    return type(loader).__iter__ is DataLoader.__iter__ and not isinstance(loader.dataset, IterableDataset)


def with_indices(loader: DataLoader[Any]) -> tuple[DataLoader[Any], Indices]:
    """A shallow copy of a loader that reads by :class:`Indices`."""
    copied = copy.copy(loader)
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    indices = Indices(getattr(loader, name), numbered=loader.num_workers > 0)
    # Not by setattr, which a DataLoader refuses once it is built.
    object.__setattr__(copied, name, indices)
    object.__setattr__(copied, "_iterator", None)
    return copied, indices


class Indices:
    """A sampler's indices from one on, and for workers with what they are seeded from.

    Args:
        sampler: A loader's ``batch_sampler``, or its ``sampler`` where it makes no batches.
        numbered: Whether they go to workers.

    Attributes:
        skip: How many indices the next pass drops.
        key: What the next pass's workers are seeded from.
        is_closed: Whether the next pass gives none, and asks for none.
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
        """Drops the indices at the beginning of the pass that has begun: the sampler makes its draws. A loader with
        workers has asked for indices by then."""
        if self._iterator is not None:
            self._iterator.drop_skipped()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._sampler, name)  # a loader's user may look for batch_size, or for its own


class _IndexIterator:
    """One pass of :class:`Indices`. Drops at the first call and not before: a loader draws a seed of its own between
    making this iterator and asking it."""

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
    """A batch's indices on their way to a worker: they arrive as they are, and seed the process that they arrive in.

    So a batch's random numbers depend on the batch alone, not on what its worker did before, and are the same in a
    resumed run, which has workers that did nothing before. Neither the data set nor the worker is wrapped for that.

    Args:
        index: The indices, or the index where a loader makes no batches.
        key: What identifies the batch.
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
    """Tells a loader's samplers that shuffle by the epoch which one it is, as ``DistributedSampler`` wants to be told."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        if callable(tell := getattr(sampler, "set_epoch", None)):
            tell(epoch)


# ------------------------------------------------------------------ generators that loaders hold


def generators(loader: Any) -> dict[str, Any]:
    """The random number generators that a loader, its samplers and its data set hold, by where they were found; one that is
    shared is there once. A data set's transforms, and the data set that it is a part of, are looked into too."""
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if "numpy" in sys.modules:
        numpy_random = sys.modules["numpy"].random
        kinds += (numpy_random.Generator, numpy_random.RandomState)
    found: dict[str, Any] = {}
    seen: set[int] = set()
    pending = [("loader", loader)]
    while pending:
        where, part = pending.pop()
        if id(part) in seen or isinstance(part, (ModuleType, type)):
            continue  # a library that a data set holds is no part of it
        seen.add(id(part))
        for name, value in getattr(part, "__dict__", {}).items():
            if isinstance(value, kinds):
                if not any(value is known for known in found.values()):
                    found[f"{where}.{name}"] = value
            elif name in NESTED or (f"{where}.{name}".startswith("loader.dataset.") and hasattr(value, "__dict__")):
                pending.append((f"{where}.{name}", value))
    return dict(sorted(found.items()))


NESTED = ("sampler", "batch_sampler", "dataset")
"""What of a loader, and of its samplers, is looked into."""


def generator_states(loader: Any) -> dict[str, Any]:
    """The states of a loader's generators, in values that a checkpoint gives back."""
    states: dict[str, Any] = {}
    for where, generator in generators(loader).items():
        if isinstance(generator, torch.Generator):
            states[where] = generator.get_state()
        elif isinstance(generator, random.Random):
            states[where] = generator.getstate()
        elif hasattr(generator, "get_state"):
            name, words, *rest = generator.get_state()
            states[where] = (name, torch.tensor(words.tolist()), *rest)
        else:
            states[where] = generator.bit_generator.state
    return states


def set_generator_states(loader: Any, states: dict[str, Any]) -> None:
    """Puts a loader's generators into states that :func:`generator_states` gave; those that it has no more are left out."""
    for where, generator in generators(loader).items():
        if where not in states:
            continue
        if isinstance(generator, torch.Generator):
            generator.set_state(states[where])
        elif isinstance(generator, random.Random):
            generator.setstate(states[where])
        elif hasattr(generator, "set_state"):
            name, words, *rest = states[where]
            generator.set_state((name, words.numpy().astype("uint32"), *rest))
        else:
            generator.bit_generator.state = states[where]


def describe_loader(loader: Any) -> str:
    """A loader's class, and its data set's where it has one, for messages."""
    dataset = getattr(loader, "dataset", None)
    over = f" over {type(dataset).__name__}" if dataset is not None else ""
    return f"{type(loader).__name__}{over}"
