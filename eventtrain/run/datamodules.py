"""The data that a call is given: loaders, or a datamodule, which may stand in the place of the loaders."""

from __future__ import annotations

from typing import Any

from torch import nn

from eventtrain.core.state import RunStage
from eventtrain.errors import MisconfigurationError
from eventtrain.events import Stage
from eventtrain.module.module import LightningModule
from eventtrain.run.loaders import LOADER_HOOKS


def is_datamodule(value: Any) -> bool:
    """Return whether an object, or a class, has a method that returns loaders, and is not a module."""
    kind = value if isinstance(value, type) else type(value)
    hooks = LOADER_HOOKS.values()
    return not issubclass(kind, nn.Module) and any(callable(getattr(value, hook, None)) for hook in hooks)


def data_of_call(call: RunStage, model: Any, dataloaders: dict[Stage, Any], datamodule: Any) -> tuple[dict[Stage, Any], Any]:
    """Return the loaders and the datamodule of a call. A datamodule in the place of the first loaders is the datamodule.

    Args:
        call: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        model: The model that the call was given.
        dataloaders: The loaders that it was given, by stage; None for none.
        datamodule: The datamodule that it was given, or None.

    Raises:
        MisconfigurationError: If there are both, if the datamodule is none, or if the model stands in another place.
    """
    modules = [value for value in (*dataloaders.values(), datamodule) if isinstance(value, LightningModule)]
    if is_datamodule(model) or (modules and not isinstance(model, LightningModule)):
        raise MisconfigurationError(
            f"{call}({type(model).__name__}, ...): the model comes first, then loaders or a datamodule. Write "
            f"{call}(model, {'datamodule' if is_datamodule(model) else 'loader'})."
        )
    names = ("train_dataloaders", "val_dataloaders") if call == "fit" else ("dataloaders",)
    arguments = dict(zip(names, dataloaders.values(), strict=True))
    if datamodule is None and is_datamodule(arguments[names[0]]):
        datamodule, dataloaders = arguments.pop(names[0]), {}
    for name, loaders in arguments.items():
        if is_datamodule(loaders) or (datamodule is not None and loaders is not None):
            raise MisconfigurationError(
                f"{call}({name}={type(loaders).__name__}): give either loaders or a datamodule, not both. A datamodule has the "
                f"loaders of all stages: {call}(model, datamodule=...)."
            )
    if isinstance(datamodule, type):
        raise MisconfigurationError(f"{datamodule.__name__} is a class. Give an object of it: {datamodule.__name__}(...).")
    if datamodule is not None and not is_datamodule(datamodule):
        raise MisconfigurationError(
            f"{call}(datamodule={type(datamodule).__name__}): give a LightningDataModule, or another object that has one of "
            f"{', '.join(LOADER_HOOKS.values())}. Loaders are given as {' and '.join(f'{name}=...' for name in names)}."
        )
    return dataloaders, datamodule
