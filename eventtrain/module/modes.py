"""The flags of a module: the training and evaluation modes of its submodules, and which of its parameters are trained."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from torch import nn

from eventtrain.errors import printable

BEFORE = "modes_before_evaluation"
"""The attribute of a module that holds the modes from before the current evaluation."""


@contextmanager
def evaluation_mode(module: Any, stage: Literal["validation", "test", "predict"]) -> Generator[None, None, None]:
    """Put a module into evaluation mode during a ``with`` block, and each submodule back into its mode after it.

    The module does both, in its hooks ``on_<stage>_model_eval`` and ``on_<stage>_model_train``.

    Args:
        module: The module.
        stage: The stage of the evaluation.

    Example:
        >>> module = LightningModule()
        >>> module.frozen = nn.Dropout().eval()
        >>> with evaluation_mode(module, "validation"):
        ...     module.training
        False
        >>> module.training, module.frozen.training
        (True, False)
    """
    attributes = vars(module)
    outer = attributes.get(BEFORE)
    attributes[BEFORE] = modes(module)
    try:
        (getattr(module, f"on_{stage}_model_eval") or module.eval)()
        yield
    finally:
        (getattr(module, f"on_{stage}_model_train") or partial(leave_evaluation, module))()
        attributes[BEFORE] = outer


def leave_evaluation(module: nn.Module) -> None:
    """Put each submodule back into its mode before the evaluation; outside an evaluation, all into training mode."""
    before = vars(module).get(BEFORE)
    module.train() if before is None else restore_modes(before)


def warn_of_evaluation_mode(module: nn.Module) -> None:
    """Warn if a module is in evaluation mode at the start of a fit, or a submodule, the outermost ones by name.

    Two kinds of submodules are so on purpose: norms with running statistics, and those without a parameter that is trained.
    """
    outermost: list[str] = []
    names: list[str] = []
    for name, part in module.named_modules():
        if part.training or any(not outer or name.startswith(f"{outer}.") for outer in outermost):
            continue
        outermost.append(name)
        is_trained = any(parameter.requires_grad for parameter in part.parameters())
        if not name or (is_trained and not hasattr(part, "running_mean")):
            names.append(name)
    if names:
        which = "The module" if names == [""] else f"A part of the module ({printable(', '.join(names))})"
        warnings.warn(
            f"{which} is in evaluation mode at the start of the fit: {type(module).__name__}. Dropout does nothing there, and "
            "batch norm keeps its statistics. Call train() before fit; or, if it is on purpose, requires_grad_(False).",
            stacklevel=2,
        )


def modes(module: nn.Module) -> dict[nn.Module, bool]:
    """Return the ``training`` flag of a module and of each of its submodules."""
    return {part: part.training for part in module.modules()}


def restore_modes(training: dict[nn.Module, bool]) -> None:
    """Restore the ``training`` flag of each submodule: a frozen layer stays in evaluation mode.

    Args:
        training: The result of :func:`modes`.
    """
    for part, flag in training.items():
        part.training = flag


def flags(module: nn.Module) -> dict[str, dict[str, bool]]:
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


def restore_flags(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Restore the flags of the parameters and submodules that a checkpoint names.

    Args:
        module: The module.
        checkpoint: The checkpoint, in the current schema.
    """
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(checkpoint["requires_grad"].get(name, parameter.requires_grad))
    for name, part in module.named_modules():
        part.training = checkpoint["training"].get(name, part.training)
