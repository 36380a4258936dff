"""Find out which methods a user's module or datamodule overrides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eventtrain.module.module import LightningModule


def overridden(instance: Any, name: str, *bases: type) -> bool:
    """Return whether an object has another version of a method than its bases.

    A function that was assigned to the object counts too.

    Args:
        instance: The object.
        name: The method's name.
        *bases: The classes that may define the default version; Lightning's own LightningDataModule may too.

    Example:
        >>> class Model(LightningModule):
        ...     def test_step(self, batch, batch_idx): ...
        >>> overridden(Model(), "test_step", LightningModule)
        True
        >>> overridden(Model(), "predict_step", LightningModule)
        False
    """
    if name in getattr(instance, "__dict__", {}):
        return True
    method = getattr(type(instance), name, None)
    theirs = [base for base in type(instance).__mro__ if base.__name__ == "LightningDataModule"]
    return method is not None and all(method is not getattr(base, name, None) for base in (*bases, *theirs))


def overridden_method(module: LightningModule, name: str) -> Callable[..., Any] | None:
    """Return a module's method if the module overrides it, else None."""
    return getattr(module, name) if overridden(module, name, LightningModule) else None
