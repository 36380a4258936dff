"""A learning rate scheduler, and when it steps."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch.optim.lr_scheduler import ReduceLROnPlateau

from eventtrain.errors import MisconfigurationError, nearest

Interval = Literal["epoch", "step", "batch", "validation"]
INTERVALS = get_args(Interval)
STATE = ("state_dict", "load_state_dict")


@dataclass(slots=True)
class LRSchedulerConfig:
    """A learning rate scheduler, and when it steps.

    Args:
        scheduler: The scheduler.
        interval: The unit of ``frequency``: ``"epoch"`` for the run's epochs, ``"step"`` for its optimizer steps,
            ``"batch"`` for its training batches, ``"validation"`` for its validations.
        frequency: The number of these units between two steps.
        monitor: The name of the metric that each step gets; None for no metric.
        strict: Whether a missing metric is an error; else it is a warning.
        name: The name for monitors and loggers.
        reduce_on_plateau: Whether ``step`` takes the metric. None: depends on the scheduler's type.

    Raises:
        MisconfigurationError: If the interval or the frequency is not valid.

    Example:
        >>> from torch import nn, optim
        >>> optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
        >>> config = LRSchedulerConfig(optim.lr_scheduler.StepLR(optimizer, step_size=3), interval="step")
        >>> config.learning_rates()
        [0.1]
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
    def optimizer(self) -> Any:
        """The optimizer whose learning rates the scheduler sets; None if the scheduler does not tell it."""
        return getattr(self.scheduler, "optimizer", None)

    def state_dict(self) -> Any:
        """Return the scheduler's state; None, with a warning, if it has no method for that."""
        if all(callable(getattr(self.scheduler, name, None)) for name in STATE):
            return self.scheduler.state_dict()
        warnings.warn(
            f"{type(self.scheduler).__name__} has no state_dict and load_state_dict, so that checkpoints leave it out. Define "
            "them, or a resumed run begins its schedule anew.",
            stacklevel=2,
        )
        return None

    def sets_rates_of(self, optimizer: Any) -> bool:
        """Return whether the scheduler sets an optimizer's rates: it was built on the optimizer, or on one that shares its
        parameter groups, as the optimizer that Lookahead holds does."""
        groups = [id(group) for group in optimizer.param_groups]
        return any(id(group) in groups for group in getattr(self.optimizer, "param_groups", ()))

    def learning_rates(self) -> list[float]:
        """Return the current learning rate of each parameter group; an empty list if the scheduler tells no optimizer."""
        groups = getattr(self.optimizer, "param_groups", [])
        return [group["lr"] for group in groups if "lr" in group]


def has_torch_api(config: LRSchedulerConfig) -> bool:
    """Return whether the scheduler's ``step`` can be called as torch's: without arguments, or with the monitored metric."""
    try:
        inspect.signature(config.scheduler.step).bind(*([0.0] if config.monitor is not None else []))
    except TypeError:
        return False
    return True
