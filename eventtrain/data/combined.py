"""Several loaders that are read as one: the form of their batches, and the modes in which they are combined."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from itertools import repeat
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from eventtrain.checks import check_option
from eventtrain.core.interfaces import END
from eventtrain.data.limits import known_length
from eventtrain.errors import MisconfigurationError

MODES: dict[str, Callable[[Iterable[int]], int]] = {
    "min_size": min,
    "max_size_cycle": max,
    "max_size": max,
    "sequential": sum,
}
"""The modes, each with the function that gives the number of batches from those of the loaders."""


_INSTEAD = (
    "Instead of a dict of tensors, which is a batch, give [batch] or a dict of DataLoaders; instead of a CombinedLoader, the "
    "dict or list of its loaders."
)


class CombinedLoader:
    """Several loaders that are read as one. They are not changed.

    A run reads the batches alone. Iterated by hand, it gives triples ``(batch, batch_idx, dataloader_idx)``.

    Args:
        iterables: The loaders, in dicts and lists that may be nested; batches have the same form. A list in a list or dict is
            several loaders if each of its items is one; else it is one loader, a list of batches.
        mode: ``"min_size"`` ends with the shortest loader. ``"max_size_cycle"`` ends with the longest, and shorter ones start
            anew. ``"max_size"`` ends with the longest, and gives None for a loader that has ended. ``"sequential"`` reads one
            loader after the other, and gives its batches as they are.

    Attributes:
        iterables: See the argument.
        mode: See the argument.
        flattened: The loaders as a list.

    Raises:
        MisconfigurationError: If the mode is unknown, if there is no loader, or if one of them is a tensor or a
            CombinedLoader.

    Example:
        >>> combined = CombinedLoader({"a": range(2), "b": range(3)}, "max_size_cycle")
        >>> [batch for batch, batch_idx, dataloader_idx in combined]
        [{'a': 0, 'b': 0}, {'a': 1, 'b': 1}, {'a': 0, 'b': 2}]
        >>> len(combined)
        3
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        self.iterables = iterables
        self.mode = check_option(mode, "CombinedLoader", "mode", tuple(MODES))
        self.flattened: list[Any] = []

        def number(loader: Any) -> int:
            self.flattened.append(loader)
            return len(self.flattened) - 1

        self._form = _mapped(iterables, number, lambda tree: _is_list(tree) and (tree is iterables or is_several(tree)))
        if not self.flattened:
            raise MisconfigurationError(f"CombinedLoader(iterables={iterables!r}): there is no loader. Give at least one.")
        for loader in self.flattened:
            if isinstance(loader, (Tensor, CombinedLoader)):
                raise MisconfigurationError(f"One of several loaders is a {type(loader).__name__}. {_INSTEAD}")

    def __len__(self) -> int:
        lengths = [known_length(loader) for loader in self.flattened]
        if None in lengths:
            raise TypeError("A CombinedLoader has a length if each of its loaders has one.")
        return MODES[self.mode](length for length in lengths if length is not None)

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        return self.read([Part(loader) for loader in self.flattened])

    def read(self, parts: Sequence[Part]) -> Iterator[tuple[Any, int, int]]:
        """Begin a pass.

        Args:
            parts: One for each loader. The loader holds no state of a pass; the parts do.

        Returns:
            Triples of a batch, its index, and the index of its loader, which is 0 unless the mode is ``"sequential"``.
        """
        if self.mode != "sequential":
            for part in parts:
                part.begin()
        return self.read_on(parts)

    def read_on(self, parts: Sequence[Part]) -> Iterator[tuple[Any, int, int]]:
        """Continue a pass whose parts are at some batch."""
        if self.mode == "sequential":
            for index, part in enumerate(parts):
                if not (part.is_open or part.has_ended):
                    part.begin()
                while part.is_open and (batch := part.next()) is not END:
                    yield batch, part.done - 1, index
            return
        read = _in_cycles(parts) if self.mode == "max_size_cycle" else _side_by_side(parts, self.mode == "min_size")
        for batch_idx, batches in enumerate(read):
            yield _mapped(self._form, batches.__getitem__, _is_list), batch_idx, 0

    def replaced(self, loaders: list[Any]) -> CombinedLoader:
        """Return a copy with other loaders, in the order of :attr:`flattened`."""
        other = copy.copy(self)
        other.flattened = loaders
        return other


class Part:
    """One loader of several, as a pass over all of them reads it.

    Args:
        loader: The loader.

    Attributes:
        done: The batches that were read since the loader began, or began anew.
        is_open: It has begun and has not ended.
        has_ended: All its batches were read at least once.
        length: Its length; None if it is unknown, or nothing was read.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.done = 0
        self.is_open = self.has_ended = False
        self.length: int | None = None
        self.iterator: Iterator[Any] = iter(())

    def begin(self) -> None:
        """Begin, or begin anew."""
        self.done, self.is_open = 0, True
        self.iterator = self.iterate()

    def iterate(self) -> Iterator[Any]:
        """Begin a pass over the loader."""
        return iter(self.loader)

    def next(self) -> Any:
        """Return the next batch, or END."""
        batch = next(self.iterator, END)
        if batch is END:
            self.has_ended, self.is_open = True, False
            return END
        self.done += 1
        if self.done == 1:  # not earlier: a loader may only now know how long it is this time
            self.length = known_length(self.loader)
        self.has_ended |= self.done == self.length
        return batch


def _side_by_side(parts: Sequence[Part], until_the_shortest: bool) -> Generator[list[Any], None, None]:
    while True:
        batches: list[Any] = []
        for part in parts:
            batch = part.next() if part.is_open else END
            if batch is END and until_the_shortest:
                return  # the others are not asked, as in zip
            batches.append(None if batch is END else batch)
        if not any(part.is_open for part in parts):
            return
        yield batches


def _in_cycles(parts: Sequence[Part]) -> Generator[list[Any], None, None]:
    while True:
        ended = [part.has_ended for part in parts]
        if all(ended):
            # Only the longest is asked for one more, as a `for` loop over it does; no other begins anew for nothing.
            longest = max(parts, key=lambda part: part.length or 0)
            if longest.next() is END:
                return
            raise MisconfigurationError(
                f"{type(longest.loader).__name__} says that it has {longest.length} batches and has more. Correct its __len__."
            )
        batches = []
        for index, part in enumerate(parts):
            batch = part.next()
            if batch is END:
                ended[index] = True
                if all(ended):
                    return
                part.begin()
                batch = part.next()
            batches.append(batch)
        if empty := [part for part in parts if part.done == 0]:
            raise MisconfigurationError(
                f"CombinedLoader(mode='max_size_cycle'): {type(empty[0].loader).__name__} gave no batch, so it cannot start "
                "anew until the longest loader ends. Give a loader with batches that can be iterated again, or another mode."
            )
        yield batches


# ------------------------------------------------------------------ the loaders that a run was given


def as_loaders(loaders: Any) -> list[Any]:
    """Return the loader or loaders of an evaluation as a list, in the order in which they are read.

    Args:
        loaders: One loader; several in lists and dicts, see :func:`is_several`; a CombinedLoader; or None.
    """
    if loaders is None or (isinstance(loaders, Mapping) and not loaders):
        return []
    if is_several(loaders):
        loaders = CombinedLoader(loaders, "sequential")
    if isinstance(loaders, CombinedLoader) and loaders.mode == "sequential":
        return loaders.flattened
    return [loaders]


def as_one_loader(loaders: Any) -> Any:
    """Return the loader or loaders of a training as one loader: several are read until the longest ends.

    Args:
        loaders: As for :func:`as_loaders`. A list of one loader is this loader. A list of objects that can be iterated, none
            of them torch's, is one loader too, because batches may be such objects.
    """
    if not is_several(loaders):
        return loaders
    if _is_list(loaders) and len(loaders) == 1:
        return as_one_loader(loaders[0])
    return CombinedLoader(loaders, "max_size_cycle") if _holds_loaders(loaders) else loaders


def loaders_in(loader: Any) -> list[Any]:
    """Return the loaders that a loader combines; the loader itself if it combines none."""
    return loader.flattened if isinstance(loader, CombinedLoader) else [loader]


def is_several(loaders: Any) -> bool:
    """Return whether a value is a dict, or a list or tuple, of loaders, and not one loader.

    A list is, if each item is a loader and not a batch: an iterable that is no tensor, array, string, set, list or dict, and
    has no ``to`` as batches have. A list or dict counts as a loader here if all its items do.

    Raises:
        MisconfigurationError: If some items are DataLoaders and others are not loaders.
    """
    if not _is_list(loaders):
        return isinstance(loaders, Mapping)
    if not any(map(isinstance, loaders, repeat(DataLoader))):
        return bool(loaders) and all(_is_loader(item) for item in loaders)
    if strangers := [item for item in loaders if not _is_loader(item)]:
        raise MisconfigurationError(
            f"A list of loaders holds a {type(strangers[0]).__name__}, which may be a loader or a batch. Give a dict of "
            "loaders, such as {'a': loader, 'b': [batch, batch]}, or CombinedLoader([...])."
        )
    return True


def _is_loader(item: Any) -> bool:
    if isinstance(item, (Tensor, str, bytes, Set)) or hasattr(item, "shape") or hasattr(item, "to"):
        return False
    if isinstance(item, (list, tuple, Mapping)):
        items = item.values() if isinstance(item, Mapping) else item
        return bool(item) and all(_is_loader(each) for each in items)
    return isinstance(item, Iterable)


def _holds_loaders(tree: Any) -> bool:
    if isinstance(tree, Mapping):  # a batch is one in a list, but not this one
        return True
    if _is_list(tree):
        return any(map(_holds_loaders, tree))
    return isinstance(tree, (DataLoader, IterableDataset, Iterator)) or hasattr(tree, "dataset")


def _is_list(tree: Any) -> bool:
    return isinstance(tree, (list, tuple))


def _mapped(tree: Any, function: Callable[[Any], Any], is_node: Callable[[Any], bool]) -> Any:
    """Return dicts and lists of the same form with a function of each of their leaves.

    Args:
        tree: The dicts and lists.
        function: The function.
        is_node: Whether a list or tuple is a part of the form, and not a leaf.
    """
    if isinstance(tree, Mapping):
        return {key: _mapped(value, function, is_node) for key, value in tree.items()}
    if not is_node(tree):
        return function(tree)
    items = [_mapped(item, function, is_node) for item in tree]
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)


def check_loader(loader: Any, stage: str) -> None:
    """Check that a run can read a loader.

    Raises:
        MisconfigurationError: If it cannot be iterated, or one of those that it combines.
    """
    for index, each in enumerate(loaders_in(loader)):
        if not isinstance(each, Iterable):
            several = f" {index} of several" if each is not loader else ""
            raise MisconfigurationError(
                f"The {'training' if stage == 'train' else stage} loader{several} is {each!r} ({type(each).__name__}), which "
                "cannot be iterated. Give a DataLoader."
            )
