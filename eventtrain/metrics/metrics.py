"""Collect values from ``self.log()`` and reduce them at the end of each step and epoch."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from eventtrain._torch import is_view, value_on_batch
from eventtrain.distributed import Processes
from eventtrain.errors import MisconfigurationError
from eventtrain.events import Stage
from eventtrain.metrics.entry import REDUCTIONS, Entry, on_device, plain, reduction_name
from eventtrain.metrics.torchmetrics import load_metric_states, metric_states

Scope = Literal["batch", "epoch"]


class Metrics:
    """The values that a run's module logs.

    Args:
        processes: The processes whose epochs are merged.

    Attributes:
        callback_metrics: The latest value of every name, as scalar tensors. A name that is logged on step and on epoch is
            also there as ``name_step`` and ``name_epoch``.
        logged_metrics: The latest values that went to loggers.
        progress_bar_metrics: The latest values with ``prog_bar=True``.
        update_counts: How often each name in ``callback_metrics`` was set. A listener that acts on new values only
            compares the count with the one that it saw last.
        fresh: The values for loggers since the last ``metrics_logged`` of scope ``"step"``.
        device: The device of the run's values.
        processes: The processes whose epochs are merged.
        stage: The current stage.
        scope: ``"batch"`` in a batch, ``"epoch"`` in an epoch between its batches, None if nothing can be logged. The
            loops write it, and ``batch``.
        suffix: The text that the index of the current evaluation loader adds to names.
        silent: Whether values are dropped, as in the sanity check.
        batch: The current batch, for its size.

    Example:
        >>> from eventtrain import LightningModule, Trainer
        >>> class Constant(LightningModule, torch.nn.Linear):
        ...     def training_step(self, batch, batch_idx):
        ...         self.log("level", batch.sum(), on_epoch=True)
        ...         return self(batch).sum()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters())
        >>> trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False)
        >>> trainer.fit(Constant(2, 1), [torch.ones(2), torch.zeros(2)])
        >>> trainer.callback_metrics
        {'level_step': tensor(0.), 'level': tensor(1.), 'level_epoch': tensor(1.)}
    """

    def __init__(self, processes: Processes) -> None:
        self.device = torch.device("cpu")
        self.processes = processes
        self.callback_metrics: dict[str, Tensor] = {}
        self.logged_metrics: dict[str, Any] = {}
        self.progress_bar_metrics: dict[str, Tensor] = {}
        self.update_counts: defaultdict[str, int] = defaultdict(int)
        self.fresh: dict[str, Any] = {}
        self.stage: Stage = "train"
        self.scope: Scope | None = None
        self.suffix = ""
        self.silent = False
        self.batch: Any = None
        self._entries: dict[Stage, dict[str, Entry]] = {"train": {}, "validation": {}, "test": {}, "predict": {}}
        self._stage_entries = self._entries["train"]

    def enter(self, stage: Stage, scope: Scope | None) -> None:
        """Enter a stage, and a scope in it.

        Args:
            stage: The stage.
            scope: The scope; None if nothing can be logged.
        """
        self.stage = stage
        self.scope = scope
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
        """Collect one value; see :meth:`eventtrain.LightningModule.log`."""
        if self.scope is None or self.stage == "predict":
            self._refuse_scope(name)
        suffix = self.suffix if add_dataloader_idx else ""
        options = (prog_bar, logger, on_step, on_epoch, reduce_fx, sync_dist)
        entry = self._stage_entries.get(name + suffix if suffix else name)
        if entry is None:
            entry = self._new_entry(name, suffix, options)
        elif entry.options != options or (entry.on_step and self.scope == "epoch"):
            self._change_options(entry, options)
        if isinstance(value, Tensor):
            # A result of the graph stays as it is; a weight, a buffer, or a view of one may be changed in place.
            computed = not value.is_leaf and not is_view(value)
            value = value.detach() if computed else value.detach().clone()
        elif (value := self._as_tensor(entry, value)) is None:
            return
        if value.ndim:
            value = self._as_scalar(name, value)
        if entry.on_epoch and entry.metric is None:
            if batch_size is None:
                batch_size = 1 if self.scope == "epoch" or entry.reduction != "mean" else infer_batch_size(self.batch)
            entry.accumulate(value, batch_size)
        # Written out instead of calling _set: this runs once or more in every batch.
        if (step_name := entry.step_name) is None:
            return
        if entry.sync_dist:
            value = self.processes.reduce(value.clone(), entry.reduction)
        if self.silent:
            return
        self.callback_metrics[step_name] = value
        self.update_counts[step_name] += 1
        if entry.on_epoch:
            self._set(entry.name, value)
        if entry.logger:
            self.fresh[step_name] = value
        if entry.prog_bar:
            self.progress_bar_metrics[step_name] = value

    def take_fresh(self) -> dict[str, Any]:
        """Return the values that were logged on step for loggers since the last call."""
        fresh = self.fresh
        self.logged_metrics.update(fresh)
        self.fresh = {}
        return fresh

    def show_epoch(self) -> None:
        """Put the epoch's values so far into ``callback_metrics``, for hooks at the end of the epoch.

        They are not final, because these hooks may log more, and they do not count as updates.
        """
        if self.silent:
            return
        for entry in self._epoch_entries():
            if entry.epoch_name is not None and (value := entry.reduced()) is not None:
                self.callback_metrics[entry.epoch_name] = self.callback_metrics[entry.name] = value

    def _epoch_entries(self) -> list[Entry]:
        """Return the entries that the current stage logged on epoch, merged over all processes.

        So all processes see one value, and decide alike. There is one exchange for all names, in which each process sends
        the names that it has: a process that had no batch has none.
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
        """Reduce the values that the current stage logged on epoch, and start its next epoch.

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
        """Forget the values that a stage logged and did not reduce, and their options."""
        for entry in self._entries[stage].values():
            if entry.metric is not None:
                entry.metric.reset()
        self._entries[stage].clear()

    def results(self, stage: Stage, loaders: int) -> list[dict[str, float]]:
        """Return the epoch values of an evaluation, one dict per loader.

        Args:
            stage: The stage.
            loaders: How many loaders it ran over.
        """
        results: list[dict[str, float]] = [{} for _ in range(loaders)]
        for entry in self._entries[stage].values():
            name = entry.epoch_name
            if name is None or name not in self.callback_metrics:
                continue
            _, separator, index = name.partition("/dataloader_idx_")
            number = float(self.callback_metrics[name])
            for at in [int(index.partition("_")[0])] if separator else range(loaders):
                results[at][name] = number
        return results

    # ------------------------------------------------------------------ state

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Return the state for a checkpoint: the reductions of the epoch so far, and the latest values.

        Args:
            module: The module that holds the metric objects.
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
            "renewals": dict(self.update_counts),  # the name in the schema of checkpoints
        }

    def load_state_dict(self, state: Mapping[str, Any], module: nn.Module, device: torch.device) -> None:
        """Restore the result of :meth:`state_dict`.

        Args:
            state: The state.
            module: The module.
            device: The device for the values.
        """
        for entry_state in state["entries"]:
            entry = Entry.of(entry_state, device)
            if entry_state["metric"] is not None:
                entry.metric = module.get_submodule(entry_state["metric"])
            known = self._entries["train"].setdefault(entry.name, entry)
            if known is not entry:  # of another process
                known.merge(entry.total, entry.weight)
        load_metric_states(module, state["metric_objects"])
        for name in ("callback_metrics", "progress_bar_metrics", "logged_metrics", "fresh"):
            setattr(self, name, {key: on_device(value, device) for key, value in state[name].items()})
        self.update_counts.update(state["renewals"])

    def _set(self, name: str, value: Tensor) -> None:
        self.callback_metrics[name] = value
        self.update_counts[name] += 1

    def _new_entry(self, name: str, suffix: str, options: tuple[Any, ...]) -> Entry:
        _, _, on_step, on_epoch, reduction, _ = options
        if not isinstance(name, str):
            raise MisconfigurationError(f"self.log's first argument is the metric's name, a string; it is {name!r}.")
        if reduction_name(reduction) not in REDUCTIONS:
            raise MisconfigurationError(
                f"self.log({name!r}, ..., reduce_fx={reduction!r}): reduce_fx has to be one of {list(REDUCTIONS)}."
            )
        per_step = self.stage == "train" and self.scope == "batch"
        resolved_step = per_step if on_step is None else on_step
        resolved_epoch = not per_step if on_epoch is None else on_epoch
        if not resolved_step and not resolved_epoch:
            raise MisconfigurationError(
                f"self.log({name!r}, ...) in {calling_hook()} has neither on_step nor on_epoch, so no value would be kept. Set "
                "one of them."
            )
        if resolved_step and self.scope == "epoch":
            raise MisconfigurationError(
                f"self.log({name!r}, ..., on_step=True) in {calling_hook()}, which belongs to no step. Leave on_step out."
            )
        entry = Entry(name, suffix, options, resolved_step, resolved_epoch)
        self._stage_entries[entry.name] = entry
        return entry

    def _change_options(self, entry: Entry, options: tuple[Any, ...]) -> None:
        """Take options that differ from the entry's only in their form; refuse others."""
        if not entry.accepts(options) or (entry.on_step and self.scope == "epoch"):
            self._refuse_options(entry, options)
        entry.options = options

    def _as_scalar(self, name: str, value: Tensor) -> Tensor:
        """Return a tensor without dimensions; refuse one with several elements."""
        if value.numel() != 1:
            raise MisconfigurationError(
                f"self.log({name!r}, ...) in {calling_hook()} got a tensor of shape {tuple(value.shape)}. Log a scalar: "
                "take its mean or sum."
            )
        return value.reshape(())

    def _as_tensor(self, entry: Entry, value: Any) -> Tensor | None:
        """Return the tensor of a number; for a torchmetrics object the value of its batch, None without ``on_step``."""
        if isinstance(value, (int, float)):
            return torch.tensor(float(value))
        if callable(getattr(value, "compute", None)) and callable(getattr(value, "reset", None)):
            if entry.on_epoch:
                entry.metric = value
            if not entry.on_step:
                return None
            on_batch = value_on_batch(value)
            computed: Tensor = value.compute() if on_batch is None else on_batch
            return computed.detach()
        if not isinstance(value, str) and callable(getattr(value, "item", None)) and getattr(value, "size", 0) == 1:
            return torch.tensor(float(value.item()))  # NumPy's scalars
        described = "a mapping: use self.log_dict" if isinstance(value, Mapping) else f"{value!r} ({type(value).__name__})"
        raise MisconfigurationError(
            f"self.log({entry.name!r}, ...) in {calling_hook()} got {described}. Log a number, a scalar tensor or a metric."
        )

    def _refuse_scope(self, name: str) -> NoReturn:
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
        difference = ", ".join(changes) or "once in a step and once between steps"
        raise MisconfigurationError(
            f"self.log({entry.name!r}, ...) in {calling_hook()}: the name is logged with different options ({difference}). "
            "Use the same options for one name, or another name."
        )


def infer_batch_size(batch: Any) -> int:
    """Return the size of a batch: the first dimension of its first tensor; 1 if there is none."""
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
    """Return the name of the module's method that is being executed, for messages."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        name = frame.f_code.co_name
        if isinstance(owner, torch.nn.Module) and name not in ("log", "log_dict"):
            return f"{type(owner).__name__}.{name}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "a function that is no method of the module"
