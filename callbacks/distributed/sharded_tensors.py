"""Tensors of which each process holds a part: how to find them in nested values, and how to divide others like them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, zeros

from eventtrain.callbacks.distributed.processes import TorchProcesses

Place = tuple[Any, ...]
"""The keys and indices that lead to a tensor in nested values, from the outside in."""
T = TypeVar("T")


class ShardedProcesses(TorchProcesses):
    """Processes that hold sharded tensors: in values that one process sends to another, sharded tensors become None."""

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks on rank zero, and an empty list on the others."""
        return super().gather(without_shards(value))

    def gather_for_all(self, value: T) -> list[T]:
        """Return the values of all ranks, on every rank."""
        return super().gather_for_all(without_shards(value))


class Placement:
    """The way in which the processes of this run hold a module's parameters.

    Args:
        module: The module, sharded or not.
    """

    def __init__(self, module: nn.Module) -> None:
        self.named = {name: each for name, each in module.named_parameters() if isinstance(each, DTensor)}
        self.shapes = {tuple(each.shape): each for each in self.named.values()}

    def model_for(self, place: Place, shape: Any) -> DTensor | None:
        """Return the sharded parameter that a tensor has to be divided like; None if there is none.

        It is the parameter that the tensor is named after if that has the same shape, else any parameter of that shape.

        Args:
            place: The tensor's place in the checkpoint.
            shape: Its shape.
        """
        named = self.named.get(place[-1])
        return named if named is not None and named.shape == shape else self.shapes.get(tuple(shape))

    def allocate(self, place: Place, dim: int | None, shape: Any, dtype: torch.dtype) -> Tensor:
        """Allocate a tensor that another one can be read into.

        Args:
            place: The other tensor's place in the checkpoint.
            dim: The dimension along which it was divided; None if each process had all of it.
            shape: Its shape.
            dtype: Its type.
        """
        model = self.model_for(place, shape)
        if model is not None:
            return zeros(*shape, dtype=dtype, device_mesh=model.device_mesh, placements=model.placements)
        if dim is None or not self.named:
            return torch.zeros(shape, dtype=dtype)
        other = next(iter(self.named.values()))
        placements = [Shard(dim) if each.is_shard() else each for each in other.placements]
        return zeros(*shape, dtype=dtype, device_mesh=other.device_mesh, placements=placements)

    def distribute(self, content: dict[str, Any]) -> None:
        """Reduce the whole tensors in a checkpoint of a run that does not shard to this process's parts.

        Args:
            content: The checkpoint, changed in place.
        """
        for key in ("state_dict", "optimizer_states", "window", "callbacks"):
            if key in content:
                content[key] = map_tensors(content[key], (key,), self._part)

    def _part(self, place: Place, tensor: Tensor) -> Tensor:
        is_optimizer_state = place[0] == "optimizer_states"
        model = self.model_for(place, tensor.shape) if is_optimizer_state else self.named.get(place[-1])
        return tensor if model is None or model.shape != tensor.shape else part_of(tensor, model)


def part_of(tensor: Tensor, model: Tensor) -> DTensor:
    """Divide a tensor that all processes hold, without an exchange.

    Args:
        tensor: The whole tensor.
        model: A sharded tensor; the result is divided in the same way.
    """
    assert isinstance(model, DTensor)
    whole = tensor.to(model.device)
    return distribute_tensor(whole, model.device_mesh, model.placements, src_data_rank=None)


def map_tensors(value: Any, place: Place, function: Callable[[Place, Tensor], Any]) -> Any:
    """Return a copy of nested values in which the result of a function replaces each tensor.

    Args:
        value: Tensors and plain values in dicts, lists and tuples.
        place: The place of the value: keys and indices.
        function: It is called with a tensor's place and the tensor.
    """
    if isinstance(value, Tensor):
        return function(place, value)
    if isinstance(value, dict):
        copied = type(value)({key: map_tensors(item, (*place, key), function) for key, item in value.items()})
        if type(value) is not dict:
            vars(copied).update(vars(value))
        return copied
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, (*place, index), function) for index, item in enumerate(value))
    return value


def without_shards(value: T) -> T:
    """Return a copy of nested values in which None replaces each sharded tensor."""
    copied: T = map_tensors(value, (), lambda place, tensor: collect_shard({}, place, tensor))
    return copied


def collect_shard(shards: dict[Place, DTensor], place: Place, tensor: Tensor) -> Tensor | None:
    """Add a tensor to a collection if it is sharded.

    Args:
        shards: The collection of sharded tensors, by place.
        place: The tensor's place.
        tensor: The tensor.

    Returns:
        The value that has to stay in the tensor's place: None for a sharded tensor, else the whole tensor.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    if any(isinstance(each, Partial) for each in tensor.placements):
        tensor = tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
    if all(each.is_replicate() for each in tensor.placements):
        return tensor.to_local()
    shards[place] = tensor
    return None


def shard_dim(tensor: DTensor) -> int | None:
    """Return the dimension along which a tensor is divided."""
    return next((each.dim for each in tensor.placements if isinstance(each, Shard)), None)


# ------------------------------------------------------------------ the parts of one tensor


@dataclass(frozen=True)
class Box:
    """The part of a tensor that one process holds.

    Attributes:
        offsets: The index of its first element in the whole tensor.
        sizes: Its shape.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.sizes)

    def overlap(self, other: Box) -> Box | None:
        """Return the elements that two parts have in common; None if there are none."""
        bounds = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        ranges = [(max(a, b), min(a + m, b + n)) for a, m, b, n in bounds]
        if any(begin >= end for begin, end in ranges):
            return None
        return Box(tuple(begin for begin, _ in ranges), tuple(end - begin for begin, end in ranges))

    def of(self, tensor: Tensor, outer: Box) -> Tensor:
        """Return a view of this part.

        Args:
            tensor: A tensor that holds another part.
            outer: That part, which this one is a part of.
        """
        for dim, size in enumerate(self.sizes):
            tensor = tensor.narrow(dim, self.offsets[dim] - outer.offsets[dim], size)
        return tensor


@dataclass(frozen=True)
class StoredTensor:
    """A sharded tensor of a checkpoint, with the parts that were written.

    Attributes:
        place: Its place in the checkpoint; or its name, if only one process holds it.
        owner: The process that holds it; None if all of them hold parts.
        dim: The dimension along which it was divided; None if it was not.
        shape: Its shape.
        dtype: Its type.
        parts: The parts, each with a function that reads a part of it.
    """

    place: Place
    owner: int | None
    dim: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Sequence[tuple[Box, Callable[[Box], Tensor]]]

    def read_into(self, tensor: Tensor) -> None:
        """Fill the part of a tensor that this process holds."""
        box = box_of(tensor)
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for written, read in self.parts:
            if common := box.overlap(written):
                common.of(local, box).copy_(read(common))


def box_of(tensor: Tensor) -> Box:
    """Return the part of a tensor that this process holds."""
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.ndim, tuple(tensor.shape))
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def is_written_here(tensor: DTensor, place: Place) -> bool:
    """Return whether this process writes its part. Of several that hold the same part one does, another one for each tensor."""
    coordinates = tensor.device_mesh.get_coordinate()
    if coordinates is None:
        return False
    number = zlib.crc32(repr(place).encode())
    copies = [dim for dim, each in enumerate(tensor.placements) if each.is_replicate()]
    return all(coordinates[dim] == number % tensor.device_mesh.size(dim) for dim in copies)


def check_boxes(shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """Check that parts make up a whole tensor.

    Args:
        shape: The tensor's shape.
        boxes: The parts.

    Raises:
        ValueError: If a part is not in the tensor, two parts overlap, or one is missing.
    """
    for box in boxes:
        if not len(box.offsets) == len(box.sizes) == len(shape):
            raise ValueError(f"a part has another number of dimensions than {tuple(shape)}")
        if any(
            begin < 0 or size < 1 or begin + size > all_
            for begin, size, all_ in zip(box.offsets, box.sizes, shape, strict=True)
        ):
            raise ValueError(f"a part of a tensor of shape {tuple(shape)} is not in it")
    if sum(box.count for box in boxes) != math.prod(shape):
        raise ValueError(f"the parts are not all of a tensor of shape {tuple(shape)}")
    # Along the dimension with the most cuts, only neighbours can overlap.
    dim = max(range(len(shape)), key=lambda dim: len({box.offsets[dim] for box in boxes}), default=-1)
    current: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[dim]) if shape else ():
        current = [each for each in current if each.offsets[dim] + each.sizes[dim] > box.offsets[dim]]
        if any(box.overlap(each) for each in current):
            raise ValueError(f"two parts of a tensor of shape {tuple(shape)} overlap")
        current.append(box)
