"""Find out which methods a user's module or datamodule overrides."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from eventtrain.module.module import LightningModule


def overridden(instance: Any, name: str, *bases: type) -> bool:
    """Return whether an object has another version of a method than its bases.

    A function that was assigned to the object counts too. None in the place of a method means that there is none.

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
    if getattr(instance, name, None) is None:
        return False
    method = getattr(type(instance), name, None)
    theirs = [base for base in type(instance).__mro__ if base.__name__ == "LightningDataModule"]
    inherited = [getattr(base, name, None) for base in (*bases, *theirs)]
    return name in getattr(instance, "__dict__", {}) or all(method is not other for other in inherited)


def overridden_method(module: LightningModule, name: str) -> Callable[..., Any] | None:
    """Return a module's method if the module overrides it, else None."""
    return getattr(module, name) if overridden(module, name, LightningModule) else None


def method_of(instance: Any, name: str, base: type) -> Callable[..., Any]:
    """Return an object's method, or the base class's method if the object has none or has None in its place.

    Args:
        instance: The object.
        name: The method's name.
        base: The class that has the default version.

    Example:
        >>> module = LightningModule()
        >>> module.configure_callbacks = None
        >>> method_of(module, "configure_callbacks", LightningModule)()
        []
    """
    method: Callable[..., Any] | None = getattr(instance, name, None)
    return MethodType(getattr(base, name), instance) if method is None else method
