"""A module's torchmetrics objects: their values and their states. The library does not import torchmetrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from eventtrain._torch import is_metric, metric_state, set_metric_state
from eventtrain.metrics.entry import Naming


class LoggableMetric(Protocol):
    """A metric object, or a collection of them, as :meth:`eventtrain.LightningModule.log_dict` takes it."""

    def compute(self) -> Any:
        """Return the value, or the values by name."""

    def reset(self) -> None:
        """Forget all updates."""


@dataclass(frozen=True, slots=True)
class NamedValues:
    """A metric object that may have several values, for ``self.log``.

    Attributes:
        metric: The object.
        naming: See :class:`~eventtrain.metrics.entry.Entry`.
    """

    metric: Any
    naming: Naming


def named_values(metric: Any) -> dict[str, NamedValues]:
    """Return the metric objects in one, or in a collection, by the names for ``self.log``."""
    if hasattr(metric, "items"):
        return {name: NamedValues(part, "either") for name, part in metric.items()}
    return {unnamed(metric): NamedValues(metric, "keys")}


def unnamed(metric: Any) -> str:
    """Return the name of an entry for a metric object whose values have their own names."""
    return f"{type(metric).__name__}, an object at {id(metric)}"


def is_loggable_metric(value: Any) -> bool:
    """Return whether a value is a metric object or a collection of them."""
    return callable(getattr(value, "compute", None)) and callable(getattr(value, "reset", None))


def unused_metrics(module: nn.Module) -> list[Any]:
    """Return the torchmetrics objects among a module's submodules that no update has reached yet."""
    return [part for part in module.modules() if is_metric(part) and not metric_state(part)["updates"]]


def metric_states(module: nn.Module) -> dict[str, Any]:
    """Return the accumulated values of the torchmetrics objects among a module's submodules, by their paths.

    The objects leave them out of ``state_dict``, unless their users ask for them.
    """
    for part in module.modules():
        if hasattr(part, "compute_groups") and callable(items := getattr(part, "items", None)):
            items()  # asked for its metrics, a collection lets those of a group share the state of the first
    return {path: metric_state(part) for path, part in module.named_modules() if is_metric(part)}


def load_metric_states(module: nn.Module, states: dict[str, Any]) -> None:
    """Restore the accumulated values of a module's torchmetrics objects.

    Args:
        module: The module.
        states: The result of :func:`metric_states`. States of objects that are no longer there are ignored.
    """
    for path, part in module.named_modules():
        if path in states and is_metric(part):
            set_metric_state(part, states[path])
