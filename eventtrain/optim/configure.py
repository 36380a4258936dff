"""Calls ``configure_optimizers`` and checks its answer against the module."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from eventtrain.errors import MisconfigurationError
from eventtrain.module.module import LightningModule, overridden
from eventtrain.optim.lr_scheduler import Configuration, LRSchedulerConfig, has_torch_api, parse_configuration


def configure_optimizers(module: LightningModule) -> Configuration:
    """A module's optimizers and schedulers.

    Args:
        module: The module.

    Returns:
        What its ``configure_optimizers`` returned.

    Raises:
        MisconfigurationError: It returned what cannot be; automatic optimization got several optimizers, or a
            scheduler that nobody says how to step.
    """
    name = type(module).__name__
    automatic = module.automatic_optimization
    if automatic and own(module, "configure_optimizers") is None:
        raise MisconfigurationError(f"{name} has no configure_optimizers. Define it, and return an optimizer.")
    configuration = parse_configuration(module.configure_optimizers())
    if not automatic:
        return configuration
    if len(configuration.optimizers) > 1:
        raise MisconfigurationError(
            f"{name}.configure_optimizers returned {len(configuration.optimizers)} optimizers; automatic optimization steps "
            "one. Use manual optimization: set self.automatic_optimization = False in __init__ and step them in training_step."
        )
    if not configuration.optimizers:
        warnings.warn(
            f"{name}.configure_optimizers returned no optimizer: the run computes losses and updates nothing.", stacklevel=2
        )
    for config in configuration.schedulers:
        _check_steps(module, config)
    return configuration


def warn_of_idle_schedulers(module: LightningModule, callbacks: list[Any]) -> None:
    """Warns where no callback steps the schedulers that a module returned."""
    if any(getattr(callback, "role", None) == "lr_scheduler_stepping" for callback in callbacks):
        return
    warnings.warn(
        f"{type(module).__name__}.configure_optimizers returned schedulers and nothing attached steps them. Attach "
        "LRSchedulerStepping(), or leave default_callbacks on.",
        stacklevel=2,
    )


def own(module: LightningModule, name: str) -> Callable[..., Any] | None:
    """A module's method where it is overridden, else None."""
    return getattr(module, name) if overridden(module, name, LightningModule) else None


def _check_steps(module: LightningModule, config: LRSchedulerConfig) -> None:
    if config.reduce_on_plateau and config.monitor is None:
        raise MisconfigurationError(
            f"{type(config.scheduler).__name__} steps by a metric and its config names none. Return "
            "{'scheduler': ..., 'monitor': 'val_loss'} with the name of a metric that you log."
        )
    if config.takes_no_metric:
        config.monitor = None  # beside a StepLR it is common in dicts that other code makes, and means nothing
    if not has_torch_api(config) and own(module, "lr_scheduler_step") is None:
        raise MisconfigurationError(
            f"{type(config.scheduler).__name__}.step does not have torch's form, step() or step(metric). Override "
            f"`lr_scheduler_step(self, scheduler, metric)` in {type(module).__name__} and call it there as it wants to be."
        )
