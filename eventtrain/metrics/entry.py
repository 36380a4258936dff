"""One name of ``self.log()``: its options, and its reduction over the epoch so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

REDUCTIONS = ("mean", "min", "max", "sum")


class Entry:
    """One name of ``self.log()`` in one stage.

    Args:
        name: The name that the user wrote.
        suffix: The text that the index of an evaluation loader adds to the name.
        options: ``prog_bar``, ``logger``, ``on_step``, ``on_epoch``, ``reduce_fx`` and ``sync_dist``, as the user wrote them.
        on_step: Whether the value of each step is kept.
        on_epoch: Whether the reduction over the epoch is kept.

    Attributes:
        options: The options; they are the same at every call.
        step_name: The name of the values of steps; None if they are not kept.
        epoch_name: The name of the value of the epoch; None if there is none.
        total: The running reduction over the epoch.
        weight: The sum of the batch sizes, for ``"mean"``.
        metric: A torchmetrics object, which makes the reduction instead; None for other values.

    Example:
        >>> entry = Entry("loss", "", (False, True, True, True, "mean", False), on_step=True, on_epoch=True)
        >>> entry.accumulate(torch.tensor(1.0), batch_size=1)
        >>> entry.accumulate(torch.tensor(4.0), batch_size=2)
        >>> entry.epoch_name, entry.reduced()
        ('loss_epoch', tensor(3.))
    """

    __slots__ = (
        "epoch_name", "logger", "metric", "name", "on_epoch", "on_step", "options", "prog_bar", "reduction",
        "step_name", "suffix", "sync_dist", "total", "weight",
    )  # fmt: skip

    def __init__(self, name: str, suffix: str, options: tuple[Any, ...], on_step: bool, on_epoch: bool) -> None:
        self.name = name + suffix
        self.suffix = suffix
        self.options = options
        self.prog_bar, self.logger, _, _, reduction, self.sync_dist = options
        self.reduction: Any = reduction_name(reduction)
        self.on_step, self.on_epoch = on_step, on_epoch
        both = on_step and on_epoch
        self.step_name = (f"{name}_step{suffix}" if both else self.name) if on_step else None
        self.epoch_name = (f"{name}_epoch{suffix}" if both else self.name) if on_epoch else None
        self.metric: Any = None
        self.total: Tensor | None = None
        self.weight: float = 0.0

    def accumulate(self, value: Tensor, batch_size: float) -> None:
        """Add one value to the reduction of the epoch, on the value's device and in float32 or wider."""
        if value.dtype not in (torch.float32, torch.float64):
            value = value.float()
        if self.reduction == "mean":
            self.weight += batch_size
            # In place, so that an epoch keeps one tensor per name and not one per step.
            self.total = value * batch_size if self.total is None else self.total.add_(value, alpha=batch_size)
        elif self.total is None:
            self.total = value.clone()
        elif self.reduction == "sum":
            self.total.add_(value)
        else:
            self.total = (torch.minimum if self.reduction == "min" else torch.maximum)(self.total, value)

    def merge(self, total: Tensor | None, weight: float) -> None:
        """Add the reduction that another process made of the same epoch.

        Args:
            total: Its running reduction; None if it logged nothing.
            weight: Its sum of batch sizes.
        """
        if total is None:
            return
        if self.total is None:
            self.total, self.weight = total.clone(), weight
        elif self.reduction in ("mean", "sum"):
            self.total, self.weight = self.total + total.to(self.total.device), self.weight + weight
        else:
            smaller_or_larger = torch.minimum if self.reduction == "min" else torch.maximum
            self.total = smaller_or_larger(self.total, total.to(self.total.device))

    def reduced(self) -> Tensor | None:
        """Return the value of the epoch so far; None if nothing was logged."""
        if self.metric is not None:
            value: Tensor = self.metric.compute().detach()
            return value
        if self.total is None:
            return None
        return self.total / self.weight if self.reduction == "mean" else self.total.clone()

    def accepts(self, options: tuple[Any, ...]) -> bool:
        """Return whether options equal those of the entry.

        ``reduce_fx`` may have another form: an entry from a checkpoint has its name instead of the function.
        """
        mine, others = list(self.options), list(options)
        mine[4], others[4] = self.reduction, reduction_name(options[4])
        return mine == others

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint. The state of a metric object is saved with the module's, not here."""
        options = list(self.options)
        options[4] = self.reduction
        return {
            "name": self.name,
            "suffix": self.suffix,
            "options": options,
            "on_step": self.on_step,
            "on_epoch": self.on_epoch,
            "total": self.total,
            "weight": self.weight,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device) -> Entry:
        """Build an entry from the result of :meth:`state_dict`.

        Args:
            state: The state.
            device: The device for its values.
        """
        name = state["name"].removesuffix(state["suffix"])
        entry = cls(name, state["suffix"], tuple(state["options"]), state["on_step"], state["on_epoch"])
        entry.total, entry.weight = on_device(state["total"], device), state["weight"]
        return entry

    def reset(self) -> None:
        """Start the next epoch."""
        self.total, self.weight = None, 0.0
        if self.metric is not None:
            self.metric.reset()


def reduction_name(reduction: Any) -> Any:
    """Return the name of a reduction, also if it was given as torch's function: ``torch.max`` -> ``"max"``."""
    return getattr(reduction, "__name__", reduction)


def plain(value: Any) -> Any:
    """Return a logged value as a checkpoint can hold it: a tensor or a number."""
    return value if isinstance(value, (Tensor, int, float)) else float(value)


def on_device(value: Any, device: torch.device) -> Any:
    """Move a tensor to a device; return anything else unchanged."""
    return value.to(device) if isinstance(value, Tensor) else value
