"""The training and evaluation modes of a module and its submodules."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from eventtrain.module.module import LightningModule
from eventtrain.module.overriding import overridden_method


@contextmanager
def evaluation_mode(module: LightningModule, stage: Literal["validation", "test", "predict"]) -> Generator[None, None, None]:
    """Put a module into evaluation mode during a ``with`` block, and each submodule back into its mode after it.

    A module can do both in its hooks ``on_<stage>_model_eval`` and ``on_<stage>_model_train``.

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
    training = modes(module)
    try:
        _switch(module, f"on_{stage}_model_eval", module.eval)
        yield
    finally:
        restore_modes(training)
        _switch(module, f"on_{stage}_model_train", None)


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


def _switch(module: LightningModule, hook: str, otherwise: Callable[[], Any] | None) -> None:
    """Call the module's mode switch if it has one, else the other function if there is one."""
    switch = overridden_method(module, hook) or otherwise
    if switch is not None:
        switch()
