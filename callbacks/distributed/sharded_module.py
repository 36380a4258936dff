"""Modules that torch's ``fully_shard`` spreads over processes: the parts to shard, and gradients that are not reduced yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Placement, Shard, distribute_tensor

from eventtrain._torch import fsdp_parameters, held_gradient, hold_gradient
from eventtrain.callbacks.distributed.processes import TorchProcesses
from eventtrain.callbacks.distributed.sharded_tensors import divided_dim


def units(module: nn.Module, kinds: tuple[type[nn.Module], ...] | None) -> list[nn.Module]:
    """Return the submodules to shard separately, inner ones first, except modules that share weights with others.

    Args:
        module: The module.
        kinds: Their classes; None for the module's children.
    """
    inner = list(module.modules())[1:]
    candidates = children(module) if kinds is None else [part for part in inner if isinstance(part, kinds)]
    users = Counter(parameter for part in module.modules() for parameter in set(part.parameters(recurse=False)))
    chosen = []
    for candidate in candidates:
        inside = Counter(parameter for part in candidate.modules() for parameter in set(part.parameters(recurse=False)))
        if inside and all(users[parameter] == count for parameter, count in inside.items()):
            chosen.append(candidate)
    return chosen[::-1]


def children(module: nn.Module) -> list[nn.Module]:
    """Return a module's children; of lists and dicts of modules, which have no forward, their children instead."""
    parts: list[nn.Module] = []
    for child in module.children():
        parts += children(child) if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
    return parts


def sharded_parts(module: nn.Module) -> list[FSDPModule]:
    """Return the submodules that are sharded, and the module if it is sharded."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def reshard(module: nn.Module) -> None:
    """Free the weights that torch has gathered and would keep for a backward."""
    for part in sharded_parts(module):
        part.reshard()


# While a window is open, torch keeps the sums of its gradients, whole and different in each process. ``parameter.grad`` does
# not show them. If the layer itself is divided, tensor-parallel, they are of this process's part of the layer.

PARTIAL = "~partial="
"""The part of a gradient's name after which the dimensions stand along which it is not added up yet."""


def held_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return this process's sums of the gradients in an open window, by the parameters' names.

    Do not call it between a forward and its backward.
    """
    reshard(module)
    names = {parameter: name for name, parameter in module.named_parameters()}
    gradients: dict[str, Tensor] = {}
    for record in records(module):
        name, gradient = names[record.sharded_param], held_gradient(record)
        if isinstance(gradient, DTensor):
            placements = layer_placements(record.sharded_param, gradient.device_mesh)
            partial = [dim for dim, each in enumerate(gradient.placements) if each.is_partial()]
            if any(dim not in partial and each != placements[dim] for dim, each in enumerate(gradient.placements)):
                gradient, partial = gradient.redistribute(placements=placements), []
            name += PARTIAL + ",".join(map(str, partial)) if partial else ""
            gradient = gradient.to_local()
        if gradient is not None:
            gradients[name] = gradient
    return gradients


def hold_gradients(module: nn.Module, gradients: Mapping[str, Tensor], layers: DeviceMesh | None = None) -> None:
    """Replace this process's sums of the gradients in an open window. Do not call it between a forward and its backward.

    Args:
        module: The module, sharded.
        gradients: The sums by the parameters' names: those of :func:`held_gradients`, or whole ones. Other parameters get
            none.
        layers: The mesh along which layers are divided; None if none are.
    """
    drop_gradients(module)
    reshard(module)
    names = {parameter: name for name, parameter in module.named_parameters()}
    held = {name.partition(PARTIAL)[0]: (name.partition(PARTIAL)[2], gradient) for name, gradient in gradients.items()}
    for record in records(module):
        parameter = record.sharded_param
        partial, gradient = held.get(names[parameter], ("", None))
        if gradient is not None and layers is not None and is_divided(parameter, layers):
            placements: list[Any] = list(layer_placements(parameter, layers))
            for dim in filter(None, partial.split(",")):
                placements[int(dim)] = Partial()
            if gradient.shape == parameter.shape and not partial:
                gradient = distribute_tensor(gradient, layers, placements, src_data_rank=None)
            else:
                shape, stride = parameter.shape, parameter.stride()
                gradient = DTensor.from_local(gradient, layers, placements, run_check=False, shape=shape, stride=stride)
        hold_gradient(record, gradient)


def reduce_held_gradients(module: nn.Module, processes: TorchProcesses, mesh: DeviceMesh) -> None:
    """Average the gradients that torch still holds, because no backward closes their window, and give them to the parameters.

    Args:
        module: The module, sharded.
        processes: All processes.
        mesh: The mesh of those that share the data.
    """
    reshard(module)
    parameters: list[Any] = []
    sums: list[Tensor] = []
    for record in records(module):
        if (gradient := held_gradient(record)) is None:
            continue
        if isinstance(gradient, DTensor):
            placements = layer_placements(record.sharded_param, gradient.device_mesh)
            gradient = gradient.redistribute(placements=placements).to_local()
        parameters.append(record.sharded_param)
        sums.append(gradient)
    if mesh.size() == processes.world_size:
        processes.average(sums)
    else:  # each of the other processes has another part of a layer
        for gradient, dim in product(sums, range(mesh.ndim)):
            dist.all_reduce(gradient.div_(mesh.size(dim)), group=mesh.get_group(dim))
    for parameter, gradient in zip(parameters, sums, strict=True):
        of_data: list[Any] = [
            Shard(divided) if (divided := divided_dim(each)) is not None else each for each in parameter.placements[: mesh.ndim]
        ]
        part = distribute_tensor(gradient.to(parameter.dtype), mesh, of_data, src_data_rank=None).to_local()
        shape, stride = parameter.shape, parameter.stride()
        parameter.grad = DTensor.from_local(
            part, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
        )
    drop_gradients(module)


def layer_placements(parameter: DTensor, layers: DeviceMesh) -> tuple[Placement, ...]:
    """Return how a layer's parameter is divided along the last dimensions of its mesh, those of the layer."""
    return parameter.placements[-layers.ndim :]


def is_divided(parameter: DTensor, layers: DeviceMesh) -> bool:
    """Return whether a parameter is of a layer that is divided along a mesh."""
    return set(layers.mesh_dim_names or ()) <= set(parameter.device_mesh.mesh_dim_names or ())


def drop_gradients(module: nn.Module) -> None:
    """Drop the gradients of a window that was never closed."""
    for record in records(module):
        hold_gradient(record, None)


def records(module: nn.Module) -> Iterator[Any]:
    """Yield torch's record of each sharded parameter."""
    for part in sharded_parts(module):
        yield from fsdp_parameters(part)
