"""The number of samples in a batch of any form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import fields, is_dataclass
from typing import Any, TypeGuard

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from eventtrain.errors import MisconfigurationError


def batch_sizes(batch: Any) -> list[int]:
    """Return the sizes that the parts of a batch show; the first one is the batch's. Return nothing if it is unknown.

    Each tensor and array shows its first dimension, at any depth of mappings, lists, tuples and dataclasses. Only if there is
    none, lists show their lengths, and other objects the sizes of their tensors, of their items, or their own length. A batch
    of nothing but scalars is one sample, and so is None.

    Args:
        batch: The batch.

    Example:
        >>> batch_sizes((["a", "b", "c"], torch.zeros(3, 5)))
        [3]
    """
    return list(_dimensions(batch)) or list(_lengths(batch)) or [1] * (batch is None or _has_scalar(batch))


def unknown_size(batch: Any, remedy: str) -> MisconfigurationError:
    """Return the error for a batch that shows no size.

    Args:
        batch: The batch.
        remedy: What to write instead.
    """
    return MisconfigurationError(f"The batch is a {type(batch).__name__}, whose number of samples is unknown. {remedy}")


def _dimensions(part: Any) -> Iterator[int]:
    """Yield the first dimension of each tensor and array in a part of a batch."""
    if isinstance(part, PackedSequence):
        yield int(part.batch_sizes[0])
    elif isinstance(part, Tensor):
        if part.ndim:
            yield part.size(0)
    elif isinstance(graphs := getattr(part, "num_graphs", None), int):  # its tensors are as long as all graphs together
        yield graphs
    elif isinstance(shape := getattr(part, "shape", None), tuple):
        yield from shape[:1]
    else:
        for each in _parts(part):
            yield from _dimensions(each)


def _lengths(part: Any) -> Iterator[int]:
    """Yield the length of each list and of each other object in a part of a batch that has no tensor."""
    parts = _parts(part)
    columns = [each for each in parts if isinstance(each, (Iterable, Sized)) and not isinstance(each, (Tensor, str, bytes))]
    lengths = [[len(each)] if _is_column(each) else list(_lengths(each)) for each in columns]
    if sizes := [size for each in lengths for size in each]:
        yield from sizes
    elif isinstance(part, (list, tuple)):
        if len({type(each) for each in parts}) == 1 and not isinstance(parts[0], Tensor):
            yield len(part)
    elif not isinstance(part, (Mapping, Tensor, str, bytes, Iterator)):
        yield from _object_sizes(part)


def _is_column(part: Any) -> TypeGuard[Sized]:
    """Return whether a part holds a value of each sample. A tuple of several types is one sample."""
    return isinstance(part, list) or (isinstance(part, tuple) and len({type(each) for each in part}) == 1)


def _object_sizes(part: Any) -> list[int]:
    sizes = [size for each in getattr(part, "__dict__", {}).values() if isinstance(each, Tensor) for size in each.shape[:1]]
    if isinstance(part, Sized) and (len(part) in sizes or not isinstance(part, Iterable)):
        return [len(part)]
    items = list(part) if isinstance(part, Iterable) else []
    return sizes or list(_dimensions(items)) or list(_lengths(items)) or [len(items)] * isinstance(part, Iterable)


def _has_scalar(part: Any) -> bool:
    is_scalar = isinstance(part, (Tensor, int, float, complex, str, bytes)) or getattr(part, "shape", None) == ()
    return is_scalar or any(_has_scalar(each) for each in _parts(part))


def _parts(part: Any) -> list[Any]:
    """Return the parts of a mapping, list, tuple or dataclass; nothing for any other object."""
    if isinstance(part, (Mapping, list, tuple)):
        return list(part.values() if isinstance(part, Mapping) else part)
    return [getattr(part, each.name) for each in fields(part)] if is_dataclass(part) and not isinstance(part, type) else []
