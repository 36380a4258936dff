"""Passes over a loader that begin again at the batch of a checkpoint.

A pass begins again with the same draws as the first time: the generators are set to their states before
``iter(loader)``, the sampler yields its indices again, the indices of the finished batches are dropped before anything
is loaded for them, and the generators are set to their states at the checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from eventtrain._torch import copy_loader, has_running_workers
from eventtrain.checkpoint.rng import seed_process
from eventtrain.data.combined import CombinedLoader, Part, loaders_in
from eventtrain.data.generators import generator_states, mark, put_back, set_generator_states
from eventtrain.data.limits import known_length
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

    def begin(self, number: Any) -> Iterator[Any]:
        """Begin a pass.

        Args:
            number: The number of the pass, for the seeds of its workers.
        """
        if self._copy is None:
            self.passes += 1
            return iter(self.loader)
        return self._iterate(*self._copy, number, 0)

    def begin_at(self, number: Any, batches: int, state: Any, before_first: Callable[[], None] = lambda: None) -> Iterator[Any]:
        """Begin a pass after its first batches.

        The generators must be in the states in which the pass began the first time.

        Args:
            number: The number of the pass, for the seeds of its workers.
            batches: How many batches are done.
            state: The loader's own state, if it has one.
            before_first: Called between the begin of the pass and its first batch, when the run may have drawn numbers.

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
            before_first()
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
        before_first()
        for done in range(batches):
            if next(iterator, _MISSING) is _MISSING:
                raise MisconfigurationError(
                    f"The checkpoint was written after {batches} batches of an epoch; the training loader "
                    f"({describe_loader(self.loader)}) has {done} now. Resume with the data that the run had."
                )
        return iterator

    def state(self) -> Any:
        """Return the loader's own state; None if it has none, or was never read."""
        return self.loader.state_dict() if self.is_stateful and self.passes > 0 else None

    def end_at(self, state: Any) -> None:
        """Give the loader the state that it had after a pass, so that the next begins as it did in that run.

        Args:
            state: The result of :meth:`state` after the pass.
        """
        if state is not None and self.is_stateful:
            self.loader.load_state_dict(state)
            iter(self.loader)  # the pass that the state belongs to, which is over

    def close(self) -> None:
        """Let go of the current pass; its state stays."""

    def _iterate(self, loader: DataLoader[Any], indices: Indices, number: Any, skip: int) -> Iterator[Any]:
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


class ResumableCombination:
    """A combination of loaders whose passes can begin at any batch: each of the loaders has its own position.

    It has the attributes and methods of :class:`ResumableLoader`, and its state is the list of these positions.

    Args:
        loader: The combination.
        key: See :class:`ResumableLoader`.
        passes: The passes over each loader that the run began earlier.

    Example:
        >>> loader = ResumableCombination(CombinedLoader([["a", "b", "c"], [1, 2]], "max_size_cycle"), key=(0, "train", 0))
        >>> begun = loader.begin(0)
        >>> [next(begun), next(begun)]
        [['a', 1], ['b', 2]]
        >>> list(loader.begin_at(0, batches=2, state=loader.state()))
        [['c', 1]]
    """

    is_exact = is_stateful = True

    def __init__(self, loader: CombinedLoader, key: tuple[Any, ...], passes: Sequence[int] = ()) -> None:
        self.loader = loader
        self._sources = [ResumableLoader(each, (*key, index)) for index, each in enumerate(loader.flattened)]
        for source, begun in zip(self._sources, passes, strict=False):
            source.passes = begun
        self._parts: list[ResumablePart] = []

    @property
    def passes(self) -> list[int]:
        """The passes over each loader that the run has begun."""
        return [source.passes for source in self._sources]

    def begin(self, number: Any) -> Iterator[Any]:
        """See :meth:`ResumableLoader.begin`."""
        self._parts = [ResumablePart(source, number) for source in self._sources]
        return (batch for batch, *_ in self.loader.read(self._parts))

    def begin_at(self, number: Any, batches: int, state: Any) -> Iterator[Any]:
        """See :meth:`ResumableLoader.begin_at`."""
        self._parts = [ResumablePart(source, number) for source in self._sources]
        for part, position in self._with_positions(self._parts, state):
            part.begin_at(position)
        return (batch for batch, *_ in self.loader.read_on(self._parts))

    def state(self) -> list[Any]:
        """See :meth:`ResumableLoader.state`."""
        if not self._parts:
            return [{"state": source.state()} for source in self._sources]
        return [part.position() for part in self._parts]

    def end_at(self, state: Any) -> None:
        """See :meth:`ResumableLoader.end_at`."""
        for source, position in self._with_positions(self._sources, state):
            source.end_at(position["state"])

    def _with_positions(self, parts: list[Any], state: Any) -> Iterator[tuple[Any, Any]]:
        if not isinstance(state, list) or len(state) != len(parts):
            written = f"{len(state)} training loaders" if isinstance(state, list) else "one training loader"
            raise MisconfigurationError(
                f"The checkpoint holds the position in {written}, and the run has {len(parts)}. Resume with the loaders that "
                "the run had, or load only the weights with load_from_checkpoint."
            )
        return zip(parts, state, strict=True)

    def close(self) -> None:
        """See :meth:`ResumableLoader.close`."""
        for part in self._parts:
            part.iterator = iter(())


class ResumablePart(Part):
    """A loader of several, whose pass can begin at any batch.

    Args:
        source: The loader.
        number: The number of the pass over all of them.
    """

    def __init__(self, source: ResumableLoader, number: Any) -> None:
        super().__init__(source.loader)
        self._source = source
        self._number = number
        self._starts = 0
        # The others draw between the two, and the run does before a loader that begins anew.
        self._began: Mapping[str, Any] | None = None
        self._before_first: Any = None

    def iterate(self) -> Iterator[Any]:
        """Begin a pass over the loader."""
        self._began = mark(self.loader)
        self._starts += 1
        return self._source.begin((self._number, self._starts))

    def next(self) -> Any:
        """Return the next batch, or END."""
        if self.done == 0:
            self._before_first = mark(self.loader)
        return super().next()

    def position(self) -> dict[str, Any]:
        """Return the position in the loader, as values that a checkpoint can hold."""
        return {
            "done": self.done,
            "is_open": self.is_open,
            "has_ended": self.has_ended,
            "starts": self._starts,
            "passes": self._source.passes - self.is_open,  # an open one is begun again
            "began": self._began,
            "before_first": self._before_first,
            "state": self._source.state(),
        }

    def begin_at(self, position: Mapping[str, Any]) -> None:
        """Continue at the result of :meth:`position`."""
        self.done, self.is_open, self.has_ended = position["done"], position["is_open"], position["has_ended"]
        self._starts, self._source.passes = position["starts"], position["passes"]
        self._began, self._before_first = position["began"], position["before_first"]
        if not self.is_open:
            self._source.end_at(position["state"])
            return
        put_back(self.loader, position["began"])
        number, before_first = (self._number, self._starts), partial(put_back, self.loader, self._before_first)
        self.iterator = self._source.begin_at(number, self.done, position["state"], before_first)
        self.length = known_length(self.loader)


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
        self._indices: Iterator[Any] = iter(())
        self._to_skip = self.skip = 0
        self.key: tuple[Any, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        if self.is_closed:
            return iter(())
        self._indices, self._to_skip = iter(self._sampler), self.skip
        return self._pass(self._indices, self.skip, self.key)

    def _pass(self, indices: Iterator[Any], first: int, key: tuple[Any, ...]) -> Iterator[Any]:
        # At the first call and not earlier, because a loader draws a seed between making this iterator and asking it.
        self.drop_skipped()
        for number, index in enumerate(indices, first):
            yield SeedingIndex(index, (*key, number)) if self._numbered else index

    def __len__(self) -> int:
        return len(self._sampler)

    def drop_skipped(self) -> None:
        """Drop the indices at the beginning of the current pass; the sampler makes its draws.

        A loader with workers has asked for indices before this is called.
        """
        skip, self._to_skip = self._to_skip, 0
        for _ in range(skip):
            if next(self._indices, _MISSING) is _MISSING:
                return  # asking for the next will say that there is none

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._sampler, name)  # a user may read batch_size, or an attribute of a custom sampler


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
    for each in loaders_in(loader):
        batch_sampler = getattr(each, "batch_sampler", None)
        for sampler in (getattr(each, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
            if callable(tell := getattr(sampler, "set_epoch", None)):
                tell(epoch)


def describe_loader(loader: Any) -> str:
    """Return the class of a loader, and of its data set if it has one, for messages."""
    dataset = getattr(loader, "dataset", None)
    over = f" over {type(dataset).__name__}" if dataset is not None else ""
    return f"{type(loader).__name__}{over}"
