"""The loaders of one run, stage by stage, and the passes over them; and the data that a call is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import nn

from eventtrain.core.signals import SignalTable
from eventtrain.core.state import RunStage
from eventtrain.data.batches import LoaderPass
from eventtrain.data.combined import CombinedLoader, as_loaders, as_one_loader, check_loader, loaders_in
from eventtrain.data.device import transfer_to
from eventtrain.data.generators import generator_states, set_generator_states
from eventtrain.data.limits import known_length, limit_name, limited_length, samples_per_batch
from eventtrain.data.resumable import ResumableCombination, ResumableLoader, set_epoch
from eventtrain.distributed import Processes, SingleProcess
from eventtrain.errors import MisconfigurationError
from eventtrain.events import PrepareLoader, Stage
from eventtrain.module.datamodule import DataHooks, LightningDataModule
from eventtrain.module.module import LightningModule
from eventtrain.module.overriding import method_of, overridden
from eventtrain.run.arguments import RunArguments

HOOKS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")
LOADER_HOOKS: dict[Stage, str] = dict(zip(get_args(Stage), HOOKS, strict=True))
"""The methods of modules and datamodules that return loaders, by stage."""

FIT_STAGES: tuple[Stage, ...] = ("train", "validation")
"""The stages whose loaders a fit reads."""


@dataclass(eq=False)
class RunLoaders:
    """The loaders of one run, by stage, and the transfer of their batches to the device.

    Args:
        dataloaders: The loaders that the call was given, by stage.
        module: The module, whose loaders and transfer hooks are used if the datamodule has none.
        datamodule: The datamodule; None if there is none.
        arguments: The trainer's, which say how many batches of each stage are used, and whether training loaders without a
            length are read one batch ahead.
        signals: The signals on which fetching is published.
        device: The device of the batches.
        processes: The processes that share the data.

    Attributes:
        seed: The number that loaders' workers are seeded from, together with stage, pass and batch.
    """

    dataloaders: dict[Stage, Any]
    module: LightningModule
    datamodule: Any
    arguments: RunArguments
    signals: SignalTable
    device: torch.device
    processes: Processes

    def __post_init__(self) -> None:
        self.seed = torch.initial_seed()
        self._sources: dict[str, ResumableLoader | ResumableCombination] = {}
        self._passes: dict[str, Any] = {}  # begun by the run before, in another process for example
        self._loaders: dict[Stage, list[Any]] = {}

    def of(self, stage: Stage) -> list[Any]:
        """Return a stage's loaders: those of the call, else the datamodule's, else the module's. They are made once a run.

        Returns:
            For training, one loader, or none; several are combined. For an evaluation, the loaders in their order.
        """
        if stage not in self._loaders:
            loaders = self.dataloaders.get(stage)
            if loaders is None:
                hook = LOADER_HOOKS[stage]
                loaders = method_of(self._owner(hook, LightningModule, LightningDataModule, DataHooks), hook, DataHooks)()
            if stage == "train":
                loaders = None if loaders is None else [as_one_loader(loaders)]
            else:
                loaders = as_loaders(loaders)
            self._loaders[stage] = self._prepared(stage, loaders or [])
        return self._loaders[stage]

    def _prepared(self, stage: Stage, loaders: list[Any]) -> list[Any]:
        """Check a stage's loaders, each one if several are combined, and let listeners replace them."""
        prepared: list[Any] = []
        dataloader_idx = 0
        for loader in loaders:
            check_loader(loader, stage)
            parts = []
            for part in loaders_in(loader):
                event = PrepareLoader(stage, dataloader_idx, part)
                self.signals.prepare_loader.publish(event)
                parts.append(event.loader)
                dataloader_idx += 1
            prepared.append(loader.replaced(parts) if isinstance(loader, CombinedLoader) else parts[0])
        return prepared

    def length(self, stage: Stage, loader: Any, most: int | None = None) -> int | None:
        """Return how many batches of a loader are used now; None for all of a loader without a length.

        Args:
            stage: The stage.
            loader: One of its loaders.
            most: Batches at most; None for the stage's limit alone.

        Raises:
            MisconfigurationError: If the stage's limit does not fit the loader.
        """
        length = limited_length(known_length(loader), self.arguments.batch_limits[stage], limit_name(stage))
        if stage == "train" and length is not None and self.processes.world_size > 1:
            return min(self.processes.gather_for_all(length))  # no process trains on after others have nothing left
        return length if most is None else most if length is None else min(most, length)

    def open(
        self,
        stage: Stage,
        loader: Any,
        measure: Callable[[], int | None],
        number: int,
        position: Mapping[str, Any] | None = None,
        *,
        dataloader_idx: int = 0,
    ) -> LoaderPass:
        """Begin a pass over a loader.

        Args:
            stage: The stage.
            loader: The loader.
            measure: Returns how many of its batches are used, see :meth:`length`. It is called when the pass has begun.
            number: The pass's number, for the seeds of the loader's workers.
            position: The position that it continues from, see :meth:`LoaderPass.position`; None for its beginning.
            dataloader_idx: The loader's index among those of the stage.
        """
        if stage == "train":
            set_epoch(loader, number)
        if self.arguments.batch_limits[stage] == 0:
            loader = ()
        source, transfer = self._source(stage, loader, dataloader_idx), self._transfer(dataloader_idx)
        together = (self.processes if stage == "train" else SingleProcess()).read_together
        reads_ahead = stage == "train" and self.arguments.read_ahead
        return LoaderPass(source, number, measure, stage, self.signals, transfer, position, together, reads_ahead)

    def _source(self, stage: Stage, loader: Any, dataloader_idx: int) -> ResumableLoader | ResumableCombination:
        name = f"{stage}/{dataloader_idx}"
        if name not in self._sources:
            rank = self.processes.data.global_rank
            key = (self.seed, stage, dataloader_idx, *([rank] if rank else []))  # each process draws its own
            passes = self._passes.get(name, 0)
            if isinstance(loader, CombinedLoader):
                self._sources[name] = ResumableCombination(loader, key, passes if isinstance(passes, list) else ())
            else:
                self._sources[name] = ResumableLoader(loader, key, 0 if isinstance(passes, list) else passes)
        return self._sources[name]

    def passes(self, stage: Stage, *, most: int | None = None, number: int = 0) -> list[Callable[[], LoaderPass]]:
        """Return for each loader of an evaluation a function that begins a pass over it.

        Args:
            stage: The stage.
            most: Batches of each loader at most; None for the stage's limit alone.
            number: The passes' number, for the seeds of the loaders' workers.
        """
        return [
            partial(self.open, stage, loader, partial(self.length, stage, loader, most), number, dataloader_idx=index)
            for index, loader in enumerate(self.of(stage))
        ]

    def lengths(self, stage: Stage, *, most: int | None = None) -> list[int | None]:
        """Return how many batches of each loader of an evaluation are used now; None for all of a loader without a length."""
        return [self.length(stage, loader, most) for loader in self.of(stage)]

    def state_dict(self, in_epoch: bool) -> dict[str, Any]:
        """Return the loaders' state for a checkpoint, beside the position in the current training epoch.

        Args:
            in_epoch: Whether there is such an epoch.
        """
        passes = self._passes_begun()
        (train,) = self.of("train")
        if in_epoch and not isinstance(train, CombinedLoader):  # the position of a combination has its passes
            passes["train/0"] -= 1  # it is begun again
        return {
            "seed": self.seed,
            "passes": passes,
            "batch_sizes": [samples_per_batch(loader) for loader in loaders_in(train)],
            "loader": None if in_epoch else self._source("train", train, 0).state(),
            "generators": {stage: [generator_states(loader) for loader in self.of(stage)] for stage in FIT_STAGES},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state that :meth:`state_dict` returned, but for the generators, which the run restores when it continues."""
        self.seed, self._passes = state["seed"], state["passes"]
        self._sources.clear()
        if state["loader"] is not None:
            (train,) = self.of("train")
            self._source("train", train, 0).end_at(state["loader"])

    def restore_generators(self, state: Mapping[str, Any]) -> None:
        """Put the loaders' generators into the states of :meth:`state_dict`."""
        for stage in FIT_STAGES:
            for loader, states in zip(self.of(stage), state["generators"][stage], strict=False):
                set_generator_states(loader, states)

    def release(self) -> None:
        """Let the loaders' workers go."""
        self._passes = self._passes_begun()
        self._sources.clear()

    def _passes_begun(self) -> dict[str, Any]:
        return self._passes | {name: source.passes for name, source in self._sources.items()}

    def _transfer(self, dataloader_idx: int) -> Callable[[Any], Any]:
        hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
        before, move, after = (method_of(self._owner(hook, DataHooks), hook, DataHooks) for hook in hooks)
        if not any(overridden(part, hook, DataHooks) for part in (self.datamodule, self.module) if part for hook in hooks):
            return transfer_to(self.module, self.device)  # no hooks: one call a batch in place of four

        def transfer(batch: Any) -> Any:
            return after(move(before(batch, dataloader_idx), self.device, dataloader_idx), dataloader_idx)

        return transfer_to(self.module, self.device, transfer)

    def _owner(self, hook: str, *bases: type) -> Any:
        """Return the datamodule if it overrides a hook, else the module."""
        if self.datamodule is not None and overridden(self.datamodule, hook, *bases):
            return self.datamodule
        return self.module


# ------------------------------------------------------------------ the data that a call is given


def is_datamodule(value: Any) -> bool:
    """Return whether an object, or a class, has a method that returns loaders, and is not a module."""
    kind = value if isinstance(value, type) else type(value)
    hooks = LOADER_HOOKS.values()
    return not issubclass(kind, nn.Module) and any(callable(getattr(value, hook, None)) for hook in hooks)


def data_of_call(call: RunStage, model: Any, dataloaders: dict[Stage, Any], datamodule: Any) -> tuple[dict[Stage, Any], Any]:
    """Return the loaders and the datamodule of a call. A datamodule in the place of the first loaders is the datamodule.

    Args:
        call: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        model: The model that the call was given.
        dataloaders: The loaders that it was given, by stage; None for none.
        datamodule: The datamodule that it was given, or None.

    Raises:
        MisconfigurationError: If there are both, if the datamodule is none, or if the model stands in another place.
    """
    modules = [value for value in (*dataloaders.values(), datamodule) if isinstance(value, LightningModule)]
    if is_datamodule(model) or (modules and not isinstance(model, LightningModule)):
        raise MisconfigurationError(
            f"{call}({type(model).__name__}, ...): the model comes first, then loaders or a datamodule. Write "
            f"{call}(model, {'datamodule' if is_datamodule(model) else 'loader'})."
        )
    names = ("train_dataloaders", "val_dataloaders") if call == "fit" else ("dataloaders",)
    arguments = dict(zip(names, dataloaders.values(), strict=True))
    if datamodule is None and is_datamodule(arguments[names[0]]):
        datamodule, dataloaders = arguments.pop(names[0]), {}
    for name, loaders in arguments.items():
        if is_datamodule(loaders) or (datamodule is not None and loaders is not None):
            raise MisconfigurationError(
                f"{call}({name}={type(loaders).__name__}): give either loaders or a datamodule, not both. A datamodule has the "
                f"loaders of all stages: {call}(model, datamodule=...)."
            )
    if isinstance(datamodule, type):
        raise MisconfigurationError(f"{datamodule.__name__} is a class. Give an object of it: {datamodule.__name__}(...).")
    if datamodule is not None and not is_datamodule(datamodule):
        raise MisconfigurationError(
            f"{call}(datamodule={type(datamodule).__name__}): give a LightningDataModule, or another object that has one of "
            f"{', '.join(LOADER_HOOKS.values())}. Loaders are given as {' and '.join(f'{name}=...' for name in names)}."
        )
    return dataloaders, datamodule
