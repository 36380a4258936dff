"""Tensors of which each process holds a part: how to find them in nested values, and how to divide others like them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, zeros

from eventtrain.callbacks.distributed.processes import TorchProcesses

Place = tuple[Any, ...]
"""The keys and indices that lead to a tensor in nested values, from the outside in."""
T = TypeVar("T")


class ShardedProcesses(TorchProcesses):
    """Processes that hold sharded tensors: in values that one process sends to another, sharded tensors become None.

    Attributes:
        shares: The processes of different data that this one is among, if not all processes have different data.
    """

    shares: ShardedProcesses | None = None

    @property
    def data(self) -> ShardedProcesses:
        """The processes whose data differ, as this one sees them."""
        return self.shares or self

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
        groups: The names of the parameters in each optimizer's groups, as a checkpoint has them; None if it has none.
    """

    def __init__(self, module: nn.Module, groups: Any = None) -> None:
        self.named = {name: each for name, each in module.named_parameters() if isinstance(each, DTensor)}
        self.shapes = {tuple(each.shape): each for each in self.named.values()}
        self.optimized = [list(chain.from_iterable(of_optimizer)) for of_optimizer in (groups or {}).get("current", ())]

    def model_for(self, place: Place, shape: Any) -> DTensor | None:
        """Return the sharded parameter that a tensor has to be divided like; None if there is none.

        It is the parameter that the tensor is named after, or whose optimizer state it is, if that has the same shape; else any
        parameter of that shape.

        Args:
            place: The tensor's place in the checkpoint.
            shape: Its shape.
        """
        name = place[-1]
        if place[0] == "optimizer_states" and place[2] == "state" and place[1] < len(self.optimized):
            names = self.optimized[place[1]]
            name = names[place[3]] if type(place[3]) is int and place[3] < len(names) else name
        named = self.named.get(name)
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
            return torch.empty(shape, dtype=dtype)
        other = next(iter(self.named.values()))
        placements = [each if divided_dim(each) is None else Shard(dim) for each in other.placements]
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
    return next((dim for each in tensor.placements if (dim := divided_dim(each)) is not None), None)


def divided_dim(placement: Any) -> int | None:
    """Return the dimension that a placement divides, also if it divides parts that a tensor-parallel layer has made."""
    dim: int | None = getattr(placement, "dim", None)
    return dim


def dotted(place: Place) -> str:
    """Return a place as a name: its keys and indices with dots between them."""
    return ".".join(map(str, place))
