"""Collect values from ``self.log()`` and reduce them at the end of each step and epoch."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import chain
from numbers import Real
from typing import Any, get_args

import torch
from torch import Tensor, nn

from eventtrain._torch import is_view, value_on_batch
from eventtrain.distributed import Processes
from eventtrain.errors import MisconfigurationError
from eventtrain.events import Stage
from eventtrain.metrics.batch_size import batch_sizes, unknown_size
from eventtrain.metrics.entry import COMBINE, SCOPES, Entry, Scope, on_device, plain, reduction_name
from eventtrain.metrics.torchmetrics import NamedValues, is_loggable_metric, load_metric_states, metric_states, unnamed


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
        fresh: The values of the current stage for loggers since its last ``metrics_logged`` of scope ``"step"``.
        evaluated: The batches of the run's evaluations so far, which are the x-axis of the values of their steps.
        device: The device of the run's values.
        processes: The processes whose epochs are merged.
        stage: The current stage.
        scope: ``"start"`` before the first batch of an epoch, ``"batch"`` in a batch, ``"epoch"`` after one, None if nothing
            can be logged. The loops write it, and ``batch`` and ``batch_size``.
        suffix: The text that the index of the current evaluation loader adds to names.
        silent: Whether values are dropped, as in the sanity check.
        batch: The current batch, for its size.
        batch_size: Its size; None as long as it is not needed.

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
        self._fresh: dict[Stage, dict[str, Any]] = {stage: {} for stage in get_args(Stage)}
        self.evaluated = 0
        self.suffix = ""
        self.silent = False
        self.batch: Any = None
        self.batch_size: int | None = None
        self._entries: dict[Stage, dict[Scope, dict[str, Entry]]] = {
            stage: {scope: {} for scope in SCOPES} for stage in get_args(Stage)
        }
        self._of_loaders: list[tuple[Entry, Tensor]] = []
        self._warned: set[str] = set()
        self.enter("train", None)

    def enter(self, stage: Stage, scope: Scope | None) -> None:
        """Enter a stage, and a scope in it.

        Args:
            stage: The stage.
            scope: The scope; None if nothing can be logged.
        """
        self.stage = stage
        self.scope: Scope | None = scope
        self.fresh = self._fresh[stage]
        self._stage_entries = self._entries[stage]

    def log(self, name: str, value: Any, options: tuple[Any, ...], batch_size: Any, add_dataloader_idx: bool) -> None:
        """Collect one value; see :meth:`eventtrain.LightningModule.log`.

        Args:
            name: Its name.
            value: The value.
            options: See :class:`~eventtrain.metrics.entry.Entry`.
            batch_size: The weight in the mean; None for the size of the batch.
            add_dataloader_idx: Whether the index of an evaluation loader becomes a part of the name.
        """
        if (scope := self.scope) is None or self.stage == "predict":
            raise MisconfigurationError(
                f"self.log({name!r}, ...) was called in {calling_hook()}, where a value belongs to no step and no epoch. Log "
                "in training_step, validation_step, test_step, or in a hook from on_train_start to on_train_epoch_end."
            )
        key = f"{name}{self.suffix}" if add_dataloader_idx else f"{self.suffix}{name}"
        entry = self._stage_entries[scope].get(key)
        if entry is None:
            entry = self._new_entry(name, self.suffix if add_dataloader_idx else "", options, scope)
            self._stage_entries[scope][key] = entry
        elif entry.options != options:
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
            if type(batch_size) is not int or batch_size < 0:
                batch_size = self._weight(entry, batch_size)
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

    def check_processes(self, name: str, value: Any, sync_dist_group: Any) -> None:
        """Check that a call of ``self.log`` neither reduces over a group of processes nor has one wait for the others.

        Raises:
            MisconfigurationError: If it does.
        """
        if sync_dist_group is not None:
            raise MisconfigurationError(
                f"self.log({name!r}, ..., sync_dist_group=...): values are reduced over all processes, never over a group. "
                "Reduce it by torch.distributed and log the result, without sync_dist_group."
            )
        if self.processes.world_size > 1 and is_loggable_metric(value):
            raise MisconfigurationError(
                f"self.log({name!r}, {type(value).__name__}, rank_zero_only=True): a metric object is computed by all "
                "processes together. Leave rank_zero_only out."
            )

    def take_fresh(self) -> dict[str, Any]:
        """Return the values that were logged on step for loggers since the last call."""
        fresh = self.fresh
        self.logged_metrics.update(fresh)
        self.fresh = self._fresh[self.stage] = {}
        return fresh

    def show_epoch(self) -> None:
        """Put the epoch's values so far into ``callback_metrics``, for hooks at the end of the epoch.

        They are not final, because these hooks may log more, and they do not count as updates.
        """
        if self.silent:
            return
        for entry, value in self._epoch_values():
            self.callback_metrics[str(entry.epoch_name)] = self.callback_metrics[entry.name] = value

    def _epoch_values(self) -> list[tuple[Entry, Tensor]]:
        """Return the values that the current stage logged on epoch, each with its entry, merged over all processes.

        So all processes see one value, and decide alike. There is one exchange for all names, in which each process sends
        the names that it has: a process that had no batch has none. A name that several loaders share has one value for all,
        and each loader's is there for :meth:`results`; metric objects cannot be merged, and the last loader's counts.
        """
        entries = [entry for entry in self._entries_of(self.stage) if entry.epoch_name is not None]
        if self.processes.world_size > 1:
            entries = self._merged(entries)
        self._of_loaders = [pair for entry in entries for pair in entry.values()]
        shared: dict[tuple[Scope, str], Entry] = {}
        for entry in entries:
            if (other := shared.get((entry.scope, entry.name))) is not None:
                entry = copy.copy(entry)
                entry.merge(other)
            shared[entry.scope, entry.name] = entry
        return self._of_loaders if len(shared) == len(entries) else [p for entry in shared.values() for p in entry.values()]

    def _merged(self, entries: list[Entry]) -> list[Entry]:
        mine = [entry.state_dict() for entry in entries if entry.metric is None]
        merged = {(entry.scope, entry.name, entry.loader): entry for entry in entries if entry.metric is not None}
        for states in self.processes.gather_for_all(mine):
            for state in states:
                entry = Entry.of(state, self.device)
                if (known := merged.setdefault((entry.scope, entry.name, entry.loader), entry)) is not entry:
                    known.merge(entry)
        return sorted(merged.values(), key=lambda entry: SCOPES.index(entry.scope))

    def _entries_of(self, stage: Stage) -> Iterator[Entry]:
        """Return the entries of a stage, those of its epoch's start first."""
        return chain.from_iterable(entries.values() for entries in self._entries[stage].values())

    def end_epoch(self) -> dict[str, Tensor]:
        """Reduce the values that the current stage logged on epoch, and start its next epoch.

        Returns:
            The values for loggers, by name.
        """
        for_loggers: dict[str, Tensor] = {}
        values = self._epoch_values()
        for entry in self._entries_of(self.stage):
            entry.reset()
        for entry, value in values:
            if entry.epoch_name is None or self.silent:
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
        for entry in self._entries_of(stage):
            entry.reset()
        for entries in (self._fresh[stage], *self._entries[stage].values()):
            entries.clear()

    def objects(self) -> list[Any]:
        """Return the metric objects that were logged in the run."""
        return [entry.metric for stage in self._entries for entry in self._entries_of(stage) if entry.metric is not None]

    def results(self, loaders: int) -> list[dict[str, float]]:
        """Return the epoch values of the evaluation that ended last, one dict per loader.

        Args:
            loaders: How many loaders it ran over.
        """
        results: list[dict[str, float]] = [{} for _ in range(loaders)]
        for entry, value in self._of_loaders:
            for index in [int(entry.loader.rpartition("_")[2])] if entry.loader else range(loaders):
                results[index][str(entry.epoch_name)] = float(value)
        return results

    # ------------------------------------------------------------------ state

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Return the state for a checkpoint: the reductions of the epoch so far, and the latest values.

        Args:
            module: The module that holds the metric objects.
        """
        paths = {id(part): path for path, part in module.named_modules()}
        entries = []
        for entry in self._entries_of("train"):
            metric = None if entry.metric is None else paths.get(id(entry.metric))
            entries.append(entry.state_dict() | {"metric": metric})
        return {
            "entries": entries,
            "metric_objects": metric_states(module),
            "callback_metrics": dict(self.callback_metrics),
            "progress_bar_metrics": dict(self.progress_bar_metrics),
            "logged_metrics": {name: plain(value) for name, value in self.logged_metrics.items()},
            "fresh": {name: plain(value) for name, value in self._fresh["train"].items()},
            "evaluated": self.evaluated,
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
                if entry.naming == "keys":
                    entry.name = unnamed(entry.metric) + entry.suffix
            known = self._entries["train"][entry.scope].setdefault(entry.name, entry)
            if known is not entry:  # of another process
                known.merge(entry)
        load_metric_states(module, state["metric_objects"])
        for name in ("callback_metrics", "progress_bar_metrics", "logged_metrics"):
            setattr(self, name, {key: on_device(value, device) for key, value in state[name].items()})
        self._fresh["train"].update((key, on_device(value, device)) for key, value in state["fresh"].items())
        self.evaluated = state.get("evaluated", 0)
        self.update_counts.update(state["renewals"])

    def _set(self, name: str, value: Tensor) -> None:
        self.callback_metrics[name] = value
        self.update_counts[name] += 1

    def _new_entry(self, name: str, suffix: str, options: tuple[Any, ...], scope: Scope) -> Entry:
        _, _, on_step, on_epoch, reduction, _ = options
        if not isinstance(name, str):
            raise MisconfigurationError(f"self.log's first argument is the metric's name, a string; it is {name!r}.")
        if reduction_name(reduction) not in COMBINE:
            raise MisconfigurationError(
                f"self.log({name!r}, ..., reduce_fx={reduction!r}): reduce_fx has to be one of {list(COMBINE)}."
            )
        per_step = self.stage == "train" and scope == "batch"
        resolved_step = per_step if on_step is None else on_step
        resolved_epoch = not per_step if on_epoch is None else on_epoch
        if not resolved_step and not resolved_epoch:
            raise MisconfigurationError(
                f"self.log({name!r}, ...) in {calling_hook()} has neither on_step nor on_epoch, so no value would be kept. Set "
                "one of them."
            )
        if resolved_step and scope != "batch":
            raise MisconfigurationError(
                f"self.log({name!r}, ..., on_step=True) in {calling_hook()}, which belongs to no step. Leave on_step out."
            )
        entry = Entry(name, suffix, options, resolved_step, resolved_epoch, scope)
        entry.loader = self.suffix
        for other in self._stage_entries[scope].values():
            if other.name == entry.name:  # of another loader
                self._change_options(other, options)
        return entry

    def _change_options(self, entry: Entry, options: tuple[Any, ...]) -> None:
        """Take options that differ from the entry's only in their form; refuse others."""
        names = ("prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "sync_dist")
        changes = [
            f"{name}={new!r} after {name}={old!r}"
            for name, old, new in zip(names, entry.options, options, strict=True)
            if reduction_name(old) != reduction_name(new)  # an entry of a checkpoint has the name of the function
        ]
        if changes:
            raise MisconfigurationError(
                f"self.log({entry.name!r}, ...) in {calling_hook()}: the name is logged with different options "
                f"({', '.join(changes)}). Use the same options for one name, or another name."
            )
        entry.options = options

    def _weight(self, entry: Entry, batch_size: Any) -> float:
        """Return the weight of a value: the size that the user gave, else the current batch's.

        If the parts of the batch have several sizes there is one warning.
        """
        if batch_size is not None:
            number = batch_size.item() if isinstance(batch_size, Tensor) and batch_size.numel() == 1 else batch_size
            if isinstance(number, Real) and (weight := float(number)) >= 0:
                return weight
            raise MisconfigurationError(
                f"self.log({entry.name!r}, ..., batch_size={batch_size!r}): batch_size is the number of samples in the batch, "
                "such as len(batch)."
            )
        if entry.scope != "batch" or entry.reduction != "mean":
            return 1
        if self.batch_size is None:
            sizes = batch_sizes(self.batch)
            if not sizes or sizes.count(sizes[0]) != len(sizes):
                remedy = f"Give it in {calling_hook()}: self.log({entry.name!r}, ..., batch_size=...)."
                if not sizes:
                    raise unknown_size(self.batch, remedy)
                self._warn_once("batch_size", f"Parts of the batch have the sizes {sizes[:5]}: means take the first. {remedy}")
            self.batch_size = sizes[0]
        return self.batch_size

    def _log_metric(self, entry: Entry, metric: Any) -> Tensor | None:
        """Log a metric object; return its value of the batch for ``on_step``, or log its several values and return None."""
        if entry.metric is not metric:
            self._adopt(entry, metric)
        entry.weight = 1.0
        if not entry.on_step:
            return None
        on_batch = value_on_batch(metric)
        for part, value in entry.values_of(metric.compute() if on_batch is None else on_batch):
            if part is entry:
                return value
            name, options = str(part.step_name).removesuffix(part.suffix), (*entry.options[:2], True, False, *entry.options[4:])
            self.log(name, value, options, None, bool(part.suffix))
            if part.on_epoch and not self.silent:
                self._set(part.name, self.callback_metrics[str(part.step_name)])
        return None

    def _adopt(self, entry: Entry, metric: Any) -> None:
        """Let a metric object make the reduction of an entry; warn once if another stage or loader logs the same object."""
        entry.metric = metric
        if (computed := value_on_batch(metric)) is not None:
            entry.values_of(computed)  # raises now instead of at the epoch's end
        for stage in self._entries:
            for other in self._entries_of(stage):
                if other.metric is metric and (stage != self.stage or other.loader != entry.loader):
                    self._warn_once(
                        f"object {other.name} {entry.name}",
                        f"self.log({entry.name!r}, ...) in {calling_hook()}: the same {type(metric).__name__} is "
                        f"logged as {other.name!r} in {stage}. It has one state, which is updated by both and reset after "
                        "either. Give each stage and each loader a metric object of its own.",
                    )

    def _warn_once(self, subject: str, message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(message, stacklevel=2)

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
            return torch.tensor(float(value), dtype=torch.float64)
        if isinstance(value, NamedValues):
            entry.naming = value.naming
            return self._log_metric(entry, value.metric)
        if is_loggable_metric(value) and not hasattr(value, "items"):
            return self._log_metric(entry, value)
        if not isinstance(value, str) and callable(getattr(value, "item", None)) and getattr(value, "size", 0) == 1:
            return torch.tensor(float(value.item()), dtype=torch.float64)  # NumPy's scalars
        several = hasattr(value, "items")  # a collection of metrics too
        described = (
            f"a mapping ({type(value).__name__}): use self.log_dict" if several else f"{value!r} ({type(value).__name__})"
        )
        raise MisconfigurationError(
            f"self.log({entry.name!r}, ...) in {calling_hook()} got {described}. Log a number, a scalar tensor or a metric."
        )


def calling_hook() -> str:
    """Return the name of the module's method that is being executed, for messages."""
    current = inspect.currentframe()
    frame = current and current.f_back  # the locals of this frame would hold it, and so every frame below it
    while frame is not None:
        owner = frame.f_locals.get("self")
        name = frame.f_code.co_name
        if isinstance(owner, torch.nn.Module) and name not in ("log", "log_dict"):
            return f"{type(owner).__name__}.{name}"
        frame = frame.f_back
    return "a function that is no method of the module"
