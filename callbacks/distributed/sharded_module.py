"""Modules that torch's ``fully_shard`` spreads over processes: the parts to shard, and gradients that are not reduced yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from eventtrain._torch import fsdp_parameters, held_gradient, hold_gradient


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
# not show them.


def held_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return this process's sums of the gradients in an open window, by the parameters' names.

    Do not call it between a forward and its backward.
    """
    reshard(module)
    names = {parameter: name for name, parameter in module.named_parameters()}
    gradients = {names[record.sharded_param]: held_gradient(record) for record in records(module)}
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def hold_gradients(module: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """Replace this process's sums of the gradients in an open window. Do not call it between a forward and its backward.

    Args:
        module: The module, sharded.
        gradients: The sums by the parameters' names. Other parameters get none.
    """
    drop_gradients(module)
    reshard(module)
    names = {parameter: name for name, parameter in module.named_parameters()}
    for record in records(module):
        hold_gradient(record, gradients.get(names[record.sharded_param]))


def drop_gradients(module: nn.Module) -> None:
    """Drop the gradients of a window that was never closed."""
    for record in records(module):
        hold_gradient(record, None)


def records(module: nn.Module) -> Iterator[Any]:
    """Yield torch's record of each sharded parameter."""
    for part in sharded_parts(module):
        yield from fsdp_parameters(part)
