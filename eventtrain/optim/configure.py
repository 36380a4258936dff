"""The results that ``configure_optimizers`` may return, parsed and checked against the module."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from eventtrain.core.optimizer import LightningOptimizer
from eventtrain.errors import MisconfigurationError, nearest
from eventtrain.module.module import LightningModule
from eventtrain.module.overriding import method_of, overridden_method
from eventtrain.optim.lr_scheduler import STATE, LRSchedulerConfig, has_torch_api

FORMS = (
    "an optimizer; a list or tuple of optimizers; ([optimizers], [schedulers]); (optimizer, scheduler); "
    "{'optimizer': ..., 'lr_scheduler': ...}; a list of such dicts; None"
)


def configure_optimizers(module: LightningModule) -> Configuration:
    """Call a module's ``configure_optimizers``, and check the result against the module.

    Args:
        module: The module.

    Raises:
        MisconfigurationError: If the result is not valid; or, in automatic optimization, if there are several optimizers,
            or a scheduler of which it is unknown how to step it.
    """
    name = type(module).__name__
    automatic = module.automatic_optimization
    if automatic and overridden_method(module, "configure_optimizers") is None:
        raise MisconfigurationError(f"{name} has no configure_optimizers. Define it, and return an optimizer.")
    returned = method_of(module, "configure_optimizers", LightningModule)()
    optimizers, schedulers = parse_configuration(returned, automatic=automatic)
    if not automatic:
        return optimizers, schedulers
    if len(optimizers) > 1:
        raise MisconfigurationError(
            f"{name}.configure_optimizers returned {len(optimizers)} optimizers; automatic optimization steps "
            "one. Use manual optimization: set self.automatic_optimization = False in __init__ and step them in training_step."
        )
    if not optimizers:
        warnings.warn(
            f"{name}.configure_optimizers returned no optimizer: the run computes losses and updates nothing.", stacklevel=2
        )
    elif overridden_method(module, "optimizer_step") is None:
        _check_takes_closure(optimizers[0].optimizer)
    for config in schedulers:
        _check_steps(module, config)
    return optimizers, schedulers


def warn_of_idle_schedulers(module: LightningModule, callbacks: list[Any]) -> None:
    """Warn if no callback steps the schedulers that a module returned."""
    if any(getattr(callback, "role", None) == "lr_scheduler_stepping" for callback in callbacks):
        return
    warnings.warn(
        f"{type(module).__name__}.configure_optimizers returned schedulers and nothing attached steps them. Attach "
        "LRSchedulerStepping(), or leave default_callbacks on.",
        stacklevel=2,
    )


def _check_takes_closure(optimizer: Optimizer) -> None:
    try:
        inspect.signature(optimizer.step).bind(None)
    except TypeError:
        raise MisconfigurationError(
            f"{type(optimizer).__name__}.step takes no closure, which automatic optimization gives it. Write `def step(self, "
            "closure=None)` and begin it with `with torch.enable_grad(): loss = closure()`. Or override optimizer_step in the "
            "module: `optimizer_closure()`, then `optimizer.step()`."
        ) from None
    except ValueError:
        pass  # it has no Python code to tell


def _check_steps(module: LightningModule, config: LRSchedulerConfig) -> None:
    if config.reduce_on_plateau and config.monitor is None:
        raise MisconfigurationError(
            f"{type(config.scheduler).__name__} steps by a metric and its config names none. Return "
            "{'scheduler': ..., 'monitor': 'val_loss'} with the name of a metric that you log."
        )
    if isinstance(config.scheduler, LRScheduler) and not config.reduce_on_plateau:
        config.monitor = None  # common next to a StepLR in dicts that other code makes; its step takes no metric
    if not has_torch_api(config) and overridden_method(module, "lr_scheduler_step") is None:
        raise MisconfigurationError(
            f"{type(config.scheduler).__name__}.step does not have torch's form, step() or step(metric). Override "
            f"`lr_scheduler_step(self, scheduler, metric)` in {type(module).__name__} and call its step there."
        )


Configuration = tuple[list[LightningOptimizer], list[LRSchedulerConfig]]
"""The optimizers and the scheduler configs of a module, both in the order given."""


def parse_configuration(returned: Any, *, automatic: bool = True) -> Configuration:
    """Return the optimizers and schedulers of a result of ``configure_optimizers``.

    Args:
        returned: The result, in one of the forms of :data:`FORMS`.
        automatic: Whether the trainer steps the schedulers. Else any object is a scheduler.

    Returns:
        The optimizers, each in a wrapper, and the scheduler configs. An optimizer that is in a wrapper already keeps it,
        because a scheduler may be built on the wrapper.

    Raises:
        MisconfigurationError: If the result has none of these forms, if a key, interval or frequency is unknown, or if a
            scheduler belongs to an optimizer that was not returned.

    Example:
        >>> from torch import nn, optim
        >>> sgd = optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
        >>> _, [config] = parse_configuration({"optimizer": sgd, "lr_scheduler": optim.lr_scheduler.StepLR(sgd, 1)})
        >>> config.interval
        'epoch'
    """
    optimizers: list[Any] = []
    schedulers: list[Any] = []
    if returned is None:
        pass
    elif isinstance(returned, Optimizer):
        optimizers = [returned]
    elif isinstance(returned, Mapping):
        optimizers, schedulers = _from_mapping(returned)
    elif isinstance(returned, Sequence) and not isinstance(returned, str):
        optimizers, schedulers = _from_sequence(returned)
    else:
        raise _unknown_form(returned)
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            remedy = _remedy(optimizer) or "Optimizers derive from torch.optim.Optimizer."
            raise MisconfigurationError(
                f"configure_optimizers returned {optimizer!r} ({type(optimizer).__name__}) where an optimizer is expected. "
                f"{remedy}"
            )
    wrapped = [each if isinstance(each, LightningOptimizer) else LightningOptimizer(each) for each in optimizers]
    plain = [wrapper.optimizer for wrapper in wrapped]
    if len({id(optimizer) for optimizer in plain}) < len(plain):
        raise MisconfigurationError("configure_optimizers returned one optimizer twice. Return each of them once.")
    configs = [_scheduler_config(scheduler, automatic) for scheduler in schedulers]
    for config in configs:
        _check_ownership(config, plain)
    return wrapped, configs


def _from_sequence(returned: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    items = list(returned)
    if items and all(isinstance(item, Mapping) for item in items):
        pairs = [_from_mapping(item) for item in items]
        return [o for optimizers, _ in pairs for o in optimizers], [s for _, schedulers in pairs for s in schedulers]
    several = [isinstance(item, (list, tuple)) for item in items]
    if len(items) == 2 and (several[0] or isinstance(items[0], Optimizer)) and (several[1] or _is_scheduler(items[1])):
        optimizers, schedulers = (list(item) if each else [item] for item, each in zip(items, several, strict=True))
        return optimizers, schedulers
    if all(isinstance(item, Optimizer) for item in items):
        return items, []
    raise _unknown_form(next((item for item in items if _remedy(item)), returned))


def _from_mapping(returned: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    known = ("optimizer", "lr_scheduler", "monitor")
    for key in returned:
        if key not in known:
            hint = nearest(str(key), known)
            raise MisconfigurationError(
                f"configure_optimizers returned a dict with the unknown key {key!r}; it may have {list(known)}. {hint}"
            )
    if "optimizer" not in returned:
        raise MisconfigurationError("configure_optimizers returned a dict without 'optimizer'. Put the optimizer there.")
    scheduler = returned.get("lr_scheduler")
    monitor = returned.get("monitor")
    if scheduler is None:
        return [returned["optimizer"]], []
    if isinstance(scheduler, Mapping):
        config = dict(scheduler)
        if monitor is not None:
            config.setdefault("monitor", monitor)
    elif isinstance(scheduler, (list, tuple)):
        raise MisconfigurationError(
            "configure_optimizers returned a dict whose 'lr_scheduler' is a list. Return ([optimizer], [schedulers]) "
            "for several schedulers of one optimizer."
        )
    else:
        config = {"scheduler": scheduler, "monitor": monitor}
    return [returned["optimizer"]], [config]


def _scheduler_config(item: Any, automatic: bool) -> LRSchedulerConfig:
    if isinstance(item, LRSchedulerConfig):
        return item
    options = item if isinstance(item, Mapping) else {"scheduler": item}
    known = [declared.name for declared in fields(LRSchedulerConfig)]
    for key in options:
        if key not in known:
            hint = nearest(str(key), known)
            raise MisconfigurationError(f"A scheduler config has the unknown key {key!r}; it may have {known}. {hint}")
    if "scheduler" not in options:
        raise MisconfigurationError(
            f"A scheduler config has the keys {sorted(options)} and no 'scheduler'. Put the scheduler there."
        )
    scheduler = options["scheduler"]
    missing = [name for name in ("step", *STATE) if not callable(getattr(scheduler, name, None))]
    if isinstance(scheduler, (Optimizer, type)) or (missing and automatic):
        raise MisconfigurationError(
            f"configure_optimizers returned {scheduler!r} ({type(scheduler).__name__}) as a scheduler; it lacks {missing}. "
            "Any object with step, state_dict and load_state_dict will do."
        )
    return LRSchedulerConfig(**cast(dict[str, Any], dict(options)))


def _is_scheduler(item: Any) -> bool:
    if isinstance(item, (Optimizer, type)):
        return False
    if isinstance(item, Mapping):
        return "scheduler" in item
    return callable(getattr(item, "step", None)) and not hasattr(item, "zero_grad")


def _check_ownership(config: LRSchedulerConfig, optimizers: list[Optimizer]) -> None:
    owner = config.optimizer
    if hasattr(owner, "param_groups") and not any(config.sets_rates_of(optimizer) for optimizer in optimizers):
        raise MisconfigurationError(
            f"{type(config.scheduler).__name__} sets the rates of a {owner.__class__.__name__} that configure_optimizers did "
            "not return. Build it on one of the optimizers that are returned."
        )


def _remedy(value: Any) -> str:
    if isinstance(value, type):
        return f"Return an object of the class: {value.__name__}(self.parameters(), ...). "
    if isinstance(value, (LRScheduler, LRSchedulerConfig)):
        return "Return the optimizer with its scheduler: [optimizer], [scheduler]. "
    if hasattr(value, "step") and not isinstance(value, Optimizer):
        name = type(value).__name__
        return f"Write `class {name}(torch.optim.Optimizer)`, and `super().__init__(params, defaults)` in its __init__. "
    return ""


def _unknown_form(returned: Any) -> MisconfigurationError:
    return MisconfigurationError(
        f"configure_optimizers returned {returned!r} ({type(returned).__name__}). {_remedy(returned)}It may return {FORMS}."
    )
