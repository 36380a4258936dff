"""What ``self.log()`` collects, and what becomes of it at the end of a step and of an epoch."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from eventtrain.distributed import Processes
from eventtrain.errors import MisconfigurationError
from eventtrain.events import Stage

REDUCTIONS = ("mean", "min", "max", "sum")
Moment = Literal["batch", "epoch"]


class Entry:
    """One name of ``self.log()`` in one stage.

    Attributes:
        options: What it is logged with; the same at every call.
        step_name: What its step's values are called, None where they are not kept.
        epoch_name: What its epoch's value is called, None where there is none.
        total: The running reduction over the epoch.
        weight: The sum of the batch sizes, for ``"mean"``.
        metric: A torchmetrics object, which reduces for itself.
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
        """Adds one value to the epoch's reduction, on the value's device and in float32 or wider."""
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
        """Adds what another process has of the same epoch."""
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
        """The epoch's value so far; None where nothing was logged."""
        if self.metric is not None:
            value: Tensor = self.metric.compute().detach()
            return value
        if self.total is None:
            return None
        return self.total / self.weight if self.reduction == "mean" else self.total.clone()

    def accepts(self, options: tuple[Any, ...]) -> bool:
        """Whether options are the same as its own, but for the form of ``reduce_fx``: of a checkpoint it is a name."""
        mine, others = list(self.options), list(options)
        mine[4], others[4] = self.reduction, reduction_name(options[4])
        return mine == others

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: a metric object's own state is kept with the module's."""
        options = list(self.options)
        options[4] = self.reduction
        kept = {
            "name": self.name,
            "suffix": self.suffix,
            "options": options,
            "on_step": self.on_step,
            "on_epoch": self.on_epoch,
        }
        return kept | {"total": self.total, "weight": self.weight}

    @classmethod
    def of(cls, kept: Mapping[str, Any], device: torch.device) -> Entry:
        """The entry whose :meth:`state_dict` this is.

        Args:
            kept: The state.
            device: Where the values are to be.
        """
        name = kept["name"].removesuffix(kept["suffix"])
        entry = cls(name, kept["suffix"], tuple(kept["options"]), kept["on_step"], kept["on_epoch"])
        entry.total, entry.weight = on_device(kept["total"], device), kept["weight"]
        return entry

    def reset(self) -> None:
        """Starts the next epoch."""
        self.total, self.weight = None, 0.0
        if self.metric is not None:
            self.metric.reset()


class Metrics:
    """All that a trainer's module logs.

    Attributes:
        callback_metrics: The latest value of every name, as scalar tensors: of a name that is logged on
            step and on epoch also ``name_step`` and ``name_epoch``.
        logged_metrics: The latest values that went to loggers.
        progress_bar_metrics: The latest values with ``prog_bar=True``.
        renewals: How often each name in ``callback_metrics`` was set: a listener that acts on fresh
            values only compares it with what it saw.
        fresh: What was logged for loggers since the last ``metrics_logged`` of scope ``"step"``.
        device: Where the run's values are.
        processes: The processes whose epochs are merged.
        moment: Where the run is: in a ``"batch"``, in an ``"epoch"`` outside of its batches, or, where
            nothing can be logged, None. The loops write it, and ``batch``.
        batch: The batch at hand, for its size.
    """

    def __init__(self, processes: Processes) -> None:
        self.device = torch.device("cpu")
        self.processes = processes
        self.callback_metrics: dict[str, Tensor] = {}
        self.logged_metrics: dict[str, Any] = {}
        self.progress_bar_metrics: dict[str, Tensor] = {}
        self.renewals: defaultdict[str, int] = defaultdict(int)
        self.fresh: dict[str, Any] = {}
        self.stage: Stage = "train"
        self.moment: Moment | None = None
        self.suffix = ""
        self.silent = False
        self.batch: Any = None
        self._entries: dict[Stage, dict[str, Entry]] = {"train": {}, "validation": {}, "test": {}, "predict": {}}
        self._stage_entries = self._entries["train"]

    def enter(self, stage: Stage, moment: Moment | None) -> None:
        """Says where the run is."""
        self.stage = stage
        self.moment = moment
        self._stage_entries = self._entries[stage]

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool,
        logger: bool,
        on_step: bool | None,
        on_epoch: bool | None,
        reduce_fx: Any,
        sync_dist: bool,
        batch_size: int | None,
        add_dataloader_idx: bool,
    ) -> None:
        """Collects one value; see :meth:`eventtrain.LightningModule.log`."""
        if self.moment is None or self.stage == "predict":
            self._refuse_moment(name)
        suffix = self.suffix if add_dataloader_idx else ""
        options = (prog_bar, logger, on_step, on_epoch, reduce_fx, sync_dist)
        entry = self._stage_entries.get(name + suffix if suffix else name)
        if entry is None:
            entry = self._new_entry(name, suffix, options)
        elif entry.options != options or (entry.on_step and self.moment == "epoch"):
            if not entry.accepts(options) or (entry.on_step and self.moment == "epoch"):
                self._refuse_options(entry, options)
            entry.options = options
        if not isinstance(value, Tensor):
            value = self._as_tensor(entry, value)
            if value is None:
                return
        else:
            # What was computed in the graph stays as it is; a weight, a buffer, or a view of one may be changed in place.
            computed = not value.is_leaf and not value._is_view()
            value = value.detach() if computed else value.detach().clone()
        if value.ndim:
            if value.numel() != 1:
                raise MisconfigurationError(
                    f"self.log({name!r}, ...) in {calling_hook()} got a tensor of shape {tuple(value.shape)}. Log a scalar: "
                    "take its mean or sum."
                )
            value = value.reshape(())
        if entry.on_epoch and entry.metric is None:
            if batch_size is None:
                batch_size = 1 if self.moment == "epoch" or entry.reduction != "mean" else infer_batch_size(self.batch)
            entry.accumulate(value, batch_size)
        # Inlined, like _set in it: this is called once or more in every batch.
        if (step_name := entry.step_name) is None:
            return
        if entry.sync_dist:
            value = self.processes.reduce(value.clone(), entry.reduction)
        if self.silent:
            return
        self.callback_metrics[step_name] = value
        self.renewals[step_name] += 1
        if entry.on_epoch:
            self._set(entry.name, value)
        if entry.logger:
            self.fresh[step_name] = value
        if entry.prog_bar:
            self.progress_bar_metrics[step_name] = value

    def take_fresh(self) -> dict[str, Any]:
        """The values logged on step for loggers since this was last called."""
        fresh = self.fresh
        self.logged_metrics.update(fresh)
        self.fresh = {}
        return fresh

    def show_epoch(self) -> None:
        """Lets the hooks of an epoch's end read its values so far in ``callback_metrics``; they are not final, as
        more may be logged there, and do not count as renewed."""
        if self.silent:
            return
        for entry in self._epoch_entries():
            if entry.epoch_name is not None and (value := entry.reduced()) is not None:
                self.callback_metrics[entry.epoch_name] = self.callback_metrics[entry.name] = value

    def _epoch_entries(self) -> list[Entry]:
        """What the stage at hand logged on epoch, that of all processes merged: so they all see one value, and decide alike.

        By one exchange for all names, in which each process says which it has: one that had no batch has none.
        """
        entries = [entry for entry in self._stage_entries.values() if entry.epoch_name is not None]
        if self.processes.world_size == 1:
            return entries
        mine = [entry.state_dict() for entry in entries if entry.metric is None]
        merged: dict[str, Entry] = {entry.name: entry for entry in entries if entry.metric is not None}
        for states in self.processes.gather_for_all(mine):
            for state in states:
                if state["name"] in merged:
                    merged[state["name"]].merge(state["total"], state["weight"])
                else:
                    merged[state["name"]] = Entry.of(state, self.device)
        return list(merged.values())

    def end_epoch(self) -> dict[str, Tensor]:
        """Reduces what the stage at hand logged on epoch, and starts its next epoch.

        Returns:
            The values for loggers, by name.
        """
        for_loggers: dict[str, Tensor] = {}
        values = [(entry, entry.reduced()) for entry in self._epoch_entries()]
        for entry in self._stage_entries.values():
            if entry.epoch_name is not None:
                entry.reset()
        for entry, value in values:
            if entry.epoch_name is None or value is None:
                continue
            if self.silent:
                continue
            self._set(entry.epoch_name, value)
            if entry.on_step:
                self._set(entry.name, value)
            if entry.logger:
                for_loggers[entry.epoch_name] = value
            if entry.prog_bar:
                self.progress_bar_metrics[entry.epoch_name] = value
        self.logged_metrics.update(for_loggers)
        return for_loggers

    def begin_stage(self, stage: Stage) -> None:
        """Forgets what a stage has logged and not reduced, and with which options."""
        for entry in self._entries[stage].values():
            if entry.metric is not None:
                entry.metric.reset()
        self._entries[stage].clear()

    def results(self, stage: Stage, loaders: int) -> list[dict[str, float]]:
        """The epoch values of an evaluation, one dict per loader.

        Args:
            stage: The stage.
            loaders: How many loaders it ran over.
        """
        results: list[dict[str, float]] = [{} for _ in range(loaders)]
        for entry in self._entries[stage].values():
            name = entry.epoch_name
            if name is None or name not in self.callback_metrics:
                continue
            _, found, index = name.partition("/dataloader_idx_")
            number = float(self.callback_metrics[name])
            for at in [int(index.partition("_")[0])] if found else range(loaders):
                results[at][name] = number
        return results

    # ------------------------------------------------------------------ state

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """What a checkpoint keeps: the epoch's reductions so far, and the latest values.

        Args:
            module: The module, among whose submodules the metric objects are.
        """
        paths = {id(part): path for path, part in module.named_modules()}
        entries = []
        for entry in self._entries["train"].values():
            metric = None if entry.metric is None else paths.get(id(entry.metric))
            entries.append(entry.state_dict() | {"metric": metric})
        return {
            "entries": entries,
            "metric_objects": metric_states(module),
            "callback_metrics": dict(self.callback_metrics),
            "progress_bar_metrics": dict(self.progress_bar_metrics),
            "logged_metrics": {name: plain(value) for name, value in self.logged_metrics.items()},
            "fresh": {name: plain(value) for name, value in self.fresh.items()},
            "renewals": dict(self.renewals),
        }

    def load_state_dict(self, state: Mapping[str, Any], module: nn.Module, device: torch.device) -> None:
        """Restores what :meth:`state_dict` gave.

        Args:
            state: The kept state.
            module: The module.
            device: Where the values were, or are to be.
        """
        for kept in state["entries"]:
            entry = Entry.of(kept, device)
            if kept["metric"] is not None:
                entry.metric = module.get_submodule(kept["metric"])
            known = self._entries["train"].setdefault(entry.name, entry)
            if known is not entry:  # of another process
                known.merge(entry.total, entry.weight)
        load_metric_states(module, state["metric_objects"])
        for name in ("callback_metrics", "progress_bar_metrics", "logged_metrics", "fresh"):
            setattr(self, name, {key: on_device(value, device) for key, value in state[name].items()})
        self.renewals.update(state["renewals"])

    def _set(self, name: str, value: Tensor) -> None:
        self.callback_metrics[name] = value
        self.renewals[name] += 1

    def _new_entry(self, name: str, suffix: str, options: tuple[Any, ...]) -> Entry:
        _, _, on_step, on_epoch, reduction, _ = options
        if not isinstance(name, str):
            raise MisconfigurationError(f"self.log's first argument is the metric's name, a string; it is {name!r}.")
        if reduction_name(reduction) not in REDUCTIONS:
            raise MisconfigurationError(
                f"self.log({name!r}, ..., reduce_fx={reduction!r}): reduce_fx has to be one of {list(REDUCTIONS)}."
            )
        per_step = self.stage == "train" and self.moment == "batch"
        resolved_step = per_step if on_step is None else on_step
        resolved_epoch = not per_step if on_epoch is None else on_epoch
        if not resolved_step and not resolved_epoch:
            raise MisconfigurationError(
                f"self.log({name!r}, ...) in {calling_hook()} has neither on_step nor on_epoch, so it would be kept nowhere. "
                "Set one of them."
            )
        if resolved_step and self.moment == "epoch":
            raise MisconfigurationError(
                f"self.log({name!r}, ..., on_step=True) in {calling_hook()}, which belongs to no step. Leave on_step out."
            )
        entry = Entry(name, suffix, options, resolved_step, resolved_epoch)
        self._stage_entries[entry.name] = entry
        return entry

    def _as_tensor(self, entry: Entry, value: Any) -> Tensor | None:
        """A number's tensor; for a torchmetrics object its value on the step, None where there is none."""
        if isinstance(value, (int, float)):
            return torch.tensor(float(value))
        if callable(getattr(value, "compute", None)) and callable(getattr(value, "reset", None)):
            if entry.on_epoch:
                entry.metric = value
            if not entry.on_step:
                return None
            # What torchmetrics' forward computed on this batch alone.
            on_batch = getattr(value, "_forward_cache", None)
            computed: Tensor = value.compute() if on_batch is None else on_batch
            return computed.detach()
        if not isinstance(value, str) and callable(getattr(value, "item", None)) and getattr(value, "size", 0) == 1:
            return torch.tensor(float(value.item()))  # NumPy's scalars
        what = "a mapping: use self.log_dict" if isinstance(value, Mapping) else f"{value!r} ({type(value).__name__})"
        raise MisconfigurationError(
            f"self.log({entry.name!r}, ...) in {calling_hook()} got {what}. Log a number, a scalar tensor or a metric."
        )

    def _refuse_moment(self, name: str) -> NoReturn:
        raise MisconfigurationError(
            f"self.log({name!r}, ...) was called in {calling_hook()}, where a value belongs to no step and no epoch. Log in "
            "training_step, validation_step, test_step, or in a hook between on_train_epoch_start and on_train_epoch_end."
        )

    def _refuse_options(self, entry: Entry, options: tuple[Any, ...]) -> NoReturn:
        names = ("prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "sync_dist")
        changes = [
            f"{name}={new!r} after {name}={old!r}"
            for name, old, new in zip(names, entry.options, options, strict=True)
            if old != new
        ]
        difference = ", ".join(changes) or "once in a step and once outside of one"
        raise MisconfigurationError(
            f"self.log({entry.name!r}, ...) in {calling_hook()}: the name is logged with different options ({difference}). "
            "Use the same options for one name, or another name."
        )


def plain(value: Any) -> Any:
    """A logged value as a checkpoint can give it back: itself, or the number that it stands for."""
    return value if isinstance(value, (Tensor, int, float)) else float(value)


def on_device(value: Any, device: torch.device) -> Any:
    """A tensor on a device, and moved no more; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def metric_states(module: nn.Module) -> dict[str, Any]:
    """What the torchmetrics objects among a module's submodules have accumulated, by their paths.

    They keep it out of ``state_dict``, unless asked to.
    """
    for part in module.modules():
        if hasattr(part, "compute_groups") and callable(items := getattr(part, "items", None)):
            items()  # a collection lets the metrics of a group share the state of the first when it is asked for them
    return {
        path: {"states": {name: getattr(part, name) for name in part._defaults}, "updates": part._update_count}
        for path, part in module.named_modules()
        if is_metric(part)
    }


def load_metric_states(module: nn.Module, states: Mapping[str, Any]) -> None:
    """Restores what :func:`metric_states` gave, to the metrics that are there still."""
    for path, part in module.named_modules():
        if path in states and is_metric(part):
            for name, value in states[path]["states"].items():
                moved = [each.to(part.device) for each in value] if isinstance(value, list) else value.to(part.device)
                setattr(part, name, moved)
            part._update_count = states[path]["updates"]
            part._computed = None


def is_metric(part: Any) -> bool:
    """Whether a module is a torchmetrics object, which the core does not import."""
    return all(hasattr(part, name) for name in ("_defaults", "_update_count", "compute", "update"))


def reduction_name(reduction: Any) -> Any:
    """A reduction's name, where it was given as torch's function: ``torch.max`` -> ``"max"``."""
    return getattr(reduction, "__name__", reduction)


def infer_batch_size(batch: Any) -> int:
    """The size of a batch: that of the first dimension of the first tensor found in it; 1 where none is."""
    if isinstance(batch, Tensor):
        return int(batch.shape[0]) if batch.ndim else 1
    items: Any = ()
    if isinstance(batch, Mapping):
        items = batch.values()
    elif isinstance(batch, (list, tuple)):
        items = batch
    for item in items:
        if isinstance(item, (Tensor, Mapping, list, tuple)):
            return infer_batch_size(item)
    return 1


def calling_hook() -> str:
    """The name of the module's method that is being run, for messages."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        name = frame.f_code.co_name
        if isinstance(owner, torch.nn.Module) and name not in ("log", "log_dict"):
            return f"{type(owner).__name__}.{name}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "a function outside of the module"
