"""One name of ``self.log()``: its options, and its reduction over the epoch so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from eventtrain.errors import MisconfigurationError

Scope = Literal["start", "batch", "epoch"]
SCOPES: tuple[Scope, ...] = ("start", "batch", "epoch")
"""The parts of an epoch that log separately, in the order in which the later ones replace a value of the same name."""
Naming = Literal["own", "keys", "either"]
COMBINE: dict[str, Any] = {"mean": torch.add, "min": torch.minimum, "max": torch.maximum, "sum": torch.add}
"""The reductions, and how two parts of each make one."""


class Entry:
    """One name of ``self.log()`` in one scope of one stage.

    Args:
        name: The name that the user wrote.
        suffix: The text that the index of an evaluation loader adds to the name.
        options: ``prog_bar``, ``logger``, ``on_step``, ``on_epoch``, ``reduce_fx`` and ``sync_dist``, as the user wrote them.
        on_step: Whether the value of each step is kept.
        on_epoch: Whether the reduction over the epoch is kept.
        scope: The scope.

    Attributes:
        loader: The suffix of the evaluation loader that logged it; ``""`` belongs to all.
        options: The options; they are the same at every call.
        step_name: The name of the values of steps; None if they are not kept.
        epoch_name: The name of the value of the epoch; None if there is none.
        total: The running reduction over the epoch.
        weight: The sum of the batch sizes, for ``"mean"``; for a metric object 1 once it is logged in the epoch.
        metric: A torchmetrics object, which makes the reduction instead; None for other values.
        naming: The names of its values: the entry's ``"own"``; the ``"keys"`` of the mapping that it computes; or ``"either"``.

    Example:
        >>> entry = Entry("loss", "", (False, True, True, True, "mean", False), on_step=True, on_epoch=True)
        >>> entry.accumulate(torch.tensor(1.0), batch_size=1)
        >>> entry.accumulate(torch.tensor(4.0), batch_size=2)
        >>> [(each.epoch_name, value) for each, value in entry.values()]
        [('loss_epoch', tensor(3.))]
    """

    def __init__(
        self, name: str, suffix: str, options: tuple[Any, ...], on_step: bool, on_epoch: bool, scope: Scope = "batch"
    ) -> None:
        self.name = name + suffix
        self.suffix = suffix
        self.options = options
        self.prog_bar, self.logger, _, _, reduction, self.sync_dist = options
        self.reduction: Any = reduction_name(reduction)
        self.on_step, self.on_epoch, self.scope = on_step, on_epoch, scope
        self.loader = suffix
        both = on_step and on_epoch
        self.step_name = (f"{name}_step{suffix}" if both else self.name) if on_step else None
        self.epoch_name = (f"{name}_epoch{suffix}" if both else self.name) if on_epoch else None
        self.metric: Any = None
        self.naming: Naming = "own"
        self.total: Tensor | None = None
        self.weight: float = 0.0

    def accumulate(self, value: Tensor, batch_size: float) -> None:
        """Add one value to the reduction of the epoch, on the value's device and in float32 or wider."""
        if value.dtype not in (torch.float32, torch.float64):
            is_exact = value.dtype.is_floating_point or value.device.type == "mps"  # which has no float64
            value = value.float() if is_exact else value.double()
        if self.reduction == "mean":
            self.weight += batch_size
            # Not in place: a later value may be on another device or of a wider type.
            self.total = value * batch_size if self.total is None else self.total.add(value, alpha=batch_size)
        elif self.total is None:
            self.total = value.clone()
        else:
            self.total = COMBINE[self.reduction](self.total, value)

    def merge(self, other: Entry) -> None:
        """Add the reduction that another process, or another loader, made of the same epoch."""
        if self.total is None:
            self.total, self.weight = other.total, other.weight
        elif other.total is not None:
            self.total = COMBINE[self.reduction](self.total, other.total.to(self.total.device))
            self.weight += other.weight

    def values(self) -> list[tuple[Entry, Tensor]]:
        """Return the value of the epoch so far with the entry; for several values of a metric object, each with an entry of its
        own; nothing if nothing was logged."""
        if self.metric is not None:
            return self.values_of(self.metric.compute()) if self.weight else []
        if self.total is None:
            return []
        return [(self, self.total / self.weight if self.reduction == "mean" else self.total.clone())]

    def values_of(self, computed: Any) -> list[tuple[Entry, Tensor]]:
        """Return the values in a result of the metric object, each with the entry that has its name.

        Raises:
            MisconfigurationError: If they have no names.
        """
        if isinstance(computed, Mapping) and self.naming != "own":
            return [pair for name, value in computed.items() for pair in self._part(name).values_of(value)]
        if isinstance(computed, (int, float)):
            computed = torch.tensor(float(computed), dtype=torch.float64)
        if self.naming != "keys" and isinstance(computed, Tensor) and computed.numel() == 1:
            return [(self, computed.detach().reshape(()))]
        kind, call = type(self.metric).__name__, f"self.log({self.name!r}, ...)"
        shown = f"a tensor of shape {tuple(computed.shape)}" if isinstance(computed, Tensor) else f"a {type(computed).__name__}"
        raise MisconfigurationError(
            f"{'self.log_dict(...)' if self.naming == 'keys' else call}: {kind}.compute gives {shown}. Log one value by "
            "self.log(name, metric), a mapping by self.log_dict(metric), and give others names: self.log_dict({'a': ..., ...})."
        )

    def _part(self, name: str) -> Entry:
        part = Entry(name, self.suffix, self.options, self.on_step, self.on_epoch, self.scope)
        part.loader, part.metric = self.loader, self.metric
        return part

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint. The state of a metric object is saved with the module's, not here."""
        options = list(self.options)
        options[4] = self.reduction
        names = ("name", "suffix", "on_step", "on_epoch", "scope", "naming", "loader", "total", "weight")
        return {name: getattr(self, name) for name in names} | {"options": options}

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device) -> Entry:
        """Build an entry from the result of :meth:`state_dict`.

        Args:
            state: The state.
            device: The device for its values.
        """
        name = state["name"].removesuffix(state["suffix"])
        scope = state.get("scope", "batch")  # older states have none
        entry = cls(name, state["suffix"], tuple(state["options"]), state["on_step"], state["on_epoch"], scope)
        entry.naming, entry.loader = state.get("naming", "own"), state.get("loader", entry.loader)
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
    """Move a tensor to a device; return anything else unchanged, and a tensor of a type that the device does not have."""
    is_lacking = device.type == "mps" and isinstance(value, Tensor) and value.dtype == torch.float64
    return value.to(device) if isinstance(value, Tensor) and not is_lacking else value
