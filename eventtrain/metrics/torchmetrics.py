"""The states of a module's torchmetrics objects, for checkpoints. The library does not import torchmetrics."""

from __future__ import annotations

from typing import Any

from torch import nn

from eventtrain._torch import is_metric, metric_state, set_metric_state


def metric_states(module: nn.Module) -> dict[str, Any]:
    """Return the accumulated values of the torchmetrics objects among a module's submodules, by their paths.

    The objects leave them out of ``state_dict``, unless their users ask for them.
    """
    for part in module.modules():
        if hasattr(part, "compute_groups") and callable(items := getattr(part, "items", None)):
            items()  # asked for its metrics, a collection lets those of a group share the state of the first
    return {path: metric_state(part) for path, part in module.named_modules() if is_metric(part)}


def load_metric_states(module: nn.Module, states: dict[str, Any]) -> None:
    """Restore the accumulated values of a module's torchmetrics objects.

    Args:
        module: The module.
        states: The result of :func:`metric_states`. States of objects that are no longer there are ignored.
    """
    for path, part in module.named_modules():
        if path in states and is_metric(part):
            set_metric_state(part, states[path])
