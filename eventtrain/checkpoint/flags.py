"""The flags of a module in a checkpoint: which parameters are trained, and which submodules are in training mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eventtrain.module.modes import BEFORE, modes
from eventtrain.module.module import LightningModule


def flags(module: LightningModule) -> dict[str, dict[str, bool]]:
    """Return the flags that a module has in training, whatever an evaluation or a toggled optimizer makes of them now.

    Args:
        module: The module.

    Returns:
        ``requires_grad`` of each parameter and ``training`` of each submodule, by name.
    """
    toggles = vars(module).get("_toggles")
    before_toggles = toggles[0][1] if toggles else {}
    training = vars(module).get(BEFORE) or modes(module)
    return {
        "requires_grad": {name: before_toggles.get(each, each.requires_grad) for name, each in module.named_parameters()},
        "training": {name: training.get(part, part.training) for name, part in module.named_modules()},
    }


def restore_flags(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Restore the flags of the parameters and submodules that a checkpoint names.

    Args:
        module: The module.
        checkpoint: The checkpoint, in the current schema.
    """
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(checkpoint["requires_grad"].get(name, parameter.requires_grad))
    for name, part in module.named_modules():
        part.training = checkpoint["training"].get(name, part.training)
