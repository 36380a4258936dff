"""A module's torchmetrics objects: their values and their states. The library does not import torchmetrics."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from eventtrain._torch import is_metric, metric_state, set_metric_state, value_on_batch


class LoggableMetric(Protocol):
    """A metric object, or a collection of them, as :meth:`eventtrain.LightningModule.log_dict` takes it."""

    def compute(self) -> Any:
        """Return the value, or the values by name."""

    def reset(self) -> None:
        """Forget all updates."""


class MetricPart:
    """One value of a metric object whose ``compute`` gives a mapping, as a metric of its own.

    Args:
        metric: The object.
        name: The value's key.

    Example:
        >>> from torchmetrics import MinMaxMetric, MeanMetric
        >>> metric = MinMaxMetric(MeanMetric())
        >>> metric.update(2.0)
        >>> MetricPart(metric, "max").compute()
        tensor(2.)
    """

    def __init__(self, metric: Any, name: str) -> None:
        self.metric = metric
        self.name = name

    def compute(self) -> Any:
        """Return the value."""
        return self.metric.compute()[self.name]

    def reset(self) -> None:
        """Reset the object."""
        self.metric.reset()

    @property
    def _forward_cache(self) -> Any:
        on_batch = value_on_batch(self.metric)
        return None if on_batch is None else on_batch[self.name]


def is_loggable_metric(value: Any) -> bool:
    """Return whether a value is a metric object or a collection of them."""
    return callable(getattr(value, "compute", None)) and callable(getattr(value, "reset", None))


def whole_metric(metric: Any) -> Any:
    """Return the object that a :class:`MetricPart` is a part of; any other object as it is."""
    return metric.metric if isinstance(metric, MetricPart) else metric


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
