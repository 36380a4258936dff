"""What ``configure_optimizers`` may return, parsed and checked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, cast, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from eventtrain.core.optimizer import LightningOptimizer
from eventtrain.errors import MisconfigurationError, nearest

Interval = Literal["epoch", "step", "batch", "validation"]
INTERVALS = get_args(Interval)
FORMS = (
    "an optimizer; a list or tuple of optimizers; ([optimizers], [schedulers]); (optimizer, scheduler); "
    "{'optimizer': ..., 'lr_scheduler': ...}; a list of such dicts; None"
)


@dataclass(slots=True)
class LRSchedulerConfig:
    """A learning rate scheduler and when it steps.

    Attributes:
        scheduler: The scheduler.
        interval: What ``frequency`` counts: ``"epoch"`` the run's epochs, ``"step"`` its optimizer steps,
            ``"batch"`` its training batches, ``"validation"`` its validations.
        frequency: The scheduler steps at every so many of them.
        monitor: The metric whose value each step is given, None for none.
        strict: An absent metric is an error; else a warning.
        name: What monitors and loggers call it.
        reduce_on_plateau: ``step`` takes the metric. None: as the scheduler's type says.
    """

    scheduler: Any
    interval: Interval = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    name: str | None = None
    reduce_on_plateau: bool | None = None

    def __post_init__(self) -> None:
        kind = type(self.scheduler).__name__
        if self.interval not in INTERVALS:
            hint = nearest(str(self.interval), INTERVALS)
            raise MisconfigurationError(
                f"The scheduler config of {kind} has interval={self.interval!r}; it has to be one of {list(INTERVALS)}. {hint}"
            )
        if isinstance(self.frequency, bool) or not isinstance(self.frequency, int) or self.frequency < 1:
            raise MisconfigurationError(
                f"The scheduler config of {kind} has frequency={self.frequency!r}; it has to be a whole number from 1."
            )
        if self.reduce_on_plateau is None:
            self.reduce_on_plateau = isinstance(self.scheduler, ReduceLROnPlateau)

    @property
    def takes_no_metric(self) -> bool:
        """Whether the scheduler is one of torch's whose ``step`` means something else by its argument."""
        return isinstance(self.scheduler, LRScheduler) and not self.reduce_on_plateau

    @property
    def optimizer(self) -> Any:
        """The optimizer whose rates the scheduler sets; None where the scheduler does not tell."""
        return getattr(self.scheduler, "optimizer", None)

    def learning_rates(self) -> list[float]:
        """The rate of each parameter group, as it is now; empty where the scheduler has no optimizer."""
        groups = getattr(self.optimizer, "param_groups", [])
        return [group["lr"] for group in groups if "lr" in group]


@dataclass(slots=True)
class Configuration:
    """What ``configure_optimizers`` returned.

    Attributes:
        optimizers: The optimizers, in the order given.
        schedulers: The scheduler configs, in the order given.
    """

    optimizers: list[LightningOptimizer]
    schedulers: list[LRSchedulerConfig]


def parse_configuration(returned: Any) -> Configuration:
    """Parses what ``configure_optimizers`` returned.

    Args:
        returned: One of the forms of :data:`FORMS`.

    Returns:
        The optimizers, each in its wrapper (its own where it came in one, since a scheduler may be built on that),
        and the scheduler configs.

    Raises:
        MisconfigurationError: It has none of these forms; a key, interval or frequency is unknown; a
            scheduler belongs to an optimizer that was not returned.
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
            raise MisconfigurationError(
                f"configure_optimizers returned {optimizer!r} ({type(optimizer).__name__}) where an optimizer is expected. "
                "Optimizers derive from torch.optim.Optimizer."
            )
    wrapped = [each if isinstance(each, LightningOptimizer) else LightningOptimizer(each) for each in optimizers]
    plain = [wrapper.optimizer for wrapper in wrapped]
    if len({id(optimizer) for optimizer in plain}) < len(plain):
        raise MisconfigurationError("configure_optimizers returned one optimizer twice. Return each of them once.")
    configs = [_scheduler_config(scheduler) for scheduler in schedulers]
    for config in configs:
        _check_ownership(config, plain)
    return Configuration(wrapped, configs)


def _from_sequence(returned: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    items = list(returned)
    if items and all(isinstance(item, Mapping) for item in items):
        pairs = [_from_mapping(item) for item in items]
        return [o for optimizers, _ in pairs for o in optimizers], [s for _, schedulers in pairs for s in schedulers]
    if len(items) == 2 and all(isinstance(item, (list, tuple)) for item in items):
        return list(items[0]), list(items[1])
    if len(items) == 2 and isinstance(items[0], (list, tuple)) and _is_scheduler(items[1]):
        return list(items[0]), [items[1]]
    if len(items) == 2 and isinstance(items[0], Optimizer) and _is_scheduler(items[1]):
        return [items[0]], [items[1]]
    if len(items) == 2 and isinstance(items[0], Optimizer) and isinstance(items[1], (list, tuple)):
        return [items[0]], list(items[1])
    if all(isinstance(item, Optimizer) for item in items):
        return items, []
    raise _unknown_form(returned)


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


def _scheduler_config(given: Any) -> LRSchedulerConfig:
    if isinstance(given, LRSchedulerConfig):
        return given
    if not isinstance(given, Mapping):
        given = {"scheduler": given}
    known = [declared.name for declared in fields(LRSchedulerConfig)]
    for key in given:
        if key not in known:
            hint = nearest(str(key), known)
            raise MisconfigurationError(f"A scheduler config has the unknown key {key!r}; it may have {known}. {hint}")
    if "scheduler" not in given:
        raise MisconfigurationError(
            f"A scheduler config has the keys {sorted(given)} and no 'scheduler'. Put the scheduler there."
        )
    scheduler = given["scheduler"]
    if not _is_scheduler(scheduler):
        missing = [name for name in ("step", "state_dict", "load_state_dict") if not callable(getattr(scheduler, name, None))]
        raise MisconfigurationError(
            f"configure_optimizers returned {scheduler!r} ({type(scheduler).__name__}) as a scheduler; it lacks {missing}. "
            "Any object with step, state_dict and load_state_dict will do."
        )
    return LRSchedulerConfig(**cast(dict[str, Any], dict(given)))


def _is_scheduler(item: Any) -> bool:
    if isinstance(item, (Optimizer, type)):
        return False
    if isinstance(item, Mapping):
        return "scheduler" in item
    return all(callable(getattr(item, name, None)) for name in ("step", "state_dict", "load_state_dict"))


def _check_ownership(config: LRSchedulerConfig, optimizers: list[Optimizer]) -> None:
    owner = _unwrapped(config.optimizer)
    if owner is not None and not any(owner is optimizer for optimizer in optimizers):
        raise MisconfigurationError(
            f"{type(config.scheduler).__name__} sets the rates of a {type(owner).__name__} that configure_optimizers did not "
            "return. Build it on one of the optimizers that are returned."
        )


def _unwrapped(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _unknown_form(returned: Any) -> MisconfigurationError:
    return MisconfigurationError(
        f"configure_optimizers returned {returned!r} ({type(returned).__name__}). It may return {FORMS}."
    )


def has_torch_api(config: LRSchedulerConfig) -> bool:
    """Whether the scheduler's ``step`` can be called as torch's are: without arguments, or with the metric
    that it monitors."""
    try:
        inspect.signature(config.scheduler.step).bind(*([0.0] if config.monitor is not None else []))
    except TypeError:
        return False
    return True


def looks_stepwise(config: LRSchedulerConfig, epochs: int | None) -> bool:
    """Whether a scheduler that steps by epochs was built for more steps than there are epochs.

    Args:
        config: The scheduler config.
        epochs: The run's number of epochs, None where only ``max_steps`` ends it.
    """
    scheduler = config.scheduler
    if config.interval != "epoch" or not isinstance(scheduler, OneCycleLR):
        return False
    return epochs is None or bool(scheduler.total_steps > epochs)
