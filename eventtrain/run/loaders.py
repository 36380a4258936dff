"""Where a run's batches come from: the loaders of each stage, and what moves a batch to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from eventtrain.core.signals import SignalTable
from eventtrain.data.batches import Batches
from eventtrain.data.device import move_to_device
from eventtrain.data.generators import generator_states, set_generator_states
from eventtrain.data.limits import Limit, as_loaders, known_length, limited_length
from eventtrain.data.resumable import ResumableLoader, is_stateful, set_epoch
from eventtrain.distributed import Processes
from eventtrain.errors import MisconfigurationError
from eventtrain.events import PrepareLoader, Stage
from eventtrain.module.datamodule import DataHooks, LightningDataModule
from eventtrain.module.module import LightningModule
from eventtrain.module.overriding import overridden
from eventtrain.run.arguments import limit_name

LOADER_HOOKS: dict[Stage, str] = {
    "train": "train_dataloader",
    "validation": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}


KEPT_STAGES: tuple[Stage, ...] = ("train", "validation")  # whose loaders a run inside of fit reads


class DataSources:
    """The data of one run.

    Args:
        given: The loaders that the call was given, by stage.
        module: The module, whose loaders and transfer hooks are used where the datamodule has none.
        datamodule: The datamodule, None where there is none.
        limits: How many batches of each stage are used.
        signals: Where fetching is published.
        device: Where batches go.
        processes: The processes that share the data.

    Attributes:
        seed: What loaders' workers are seeded from, besides stage, pass and batch.
    """

    def __init__(
        self,
        given: dict[Stage, Any],
        module: LightningModule,
        datamodule: LightningDataModule | None,
        limits: dict[Stage, Limit],
        signals: SignalTable,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self._module = module
        self._datamodule = datamodule
        self._limits = limits
        self._signals = signals
        self._device = device
        self._processes = processes
        self.seed = torch.initial_seed()
        self._sources: dict[tuple[Stage, int], ResumableLoader] = {}
        self._passes: dict[str, int] = {}  # that the run has begun before, in another process for example
        self._given = {stage: loader for stage, loader in given.items() if loader is not None}
        self._loaders: dict[Stage, Any] = {}

    def loader(self, stage: Stage) -> Any:
        """A stage's loader or loaders: those given to the call, else the datamodule's, else the module's; made
        once a run. None where there is none."""
        if stage not in self._loaders:
            given = self._given.get(stage)
            if given is None:
                hook = LOADER_HOOKS[stage]
                given = getattr(self._owner(hook, LightningModule, LightningDataModule, DataHooks), hook)()
            self._loaders[stage] = self._prepared(stage, given)
        return self._loaders[stage]

    def _prepared(self, stage: Stage, given: Any) -> Any:
        """What listeners make of a stage's loader or loaders."""
        if given is None or not self._signals.prepare_loader.listeners:
            return given
        loaders = [given] if stage == "train" else as_loaders(given)
        prepared = []
        for index, loader in enumerate(loaders):
            event = PrepareLoader(stage, index, loader)
            self._signals.prepare_loader.publish(event)
            prepared.append(event.loader)
        return prepared[0] if len(loaders) == 1 and loaders[0] is given else prepared

    def length(self, stage: Stage, loader: Any) -> int | None:
        """How many batches of a loader are used; None for all of one whose length is unknown.

        Raises:
            MisconfigurationError: The stage's limit does not fit the loader.
        """
        length = limited_length(known_length(loader), self._limits[stage], limit_name(stage))
        if stage != "train" or length is None or self._processes.world_size == 1:
            return length
        return min(self._processes.gather_for_all(length))  # no process trains on while others have nothing left

    def open(
        self,
        stage: Stage,
        loader: Any,
        limit: int | None,
        number: int,
        position: Mapping[str, Any] | None = None,
        *,
        dataloader_idx: int = 0,
    ) -> Batches:
        """Begins a pass over a loader.

        Args:
            stage: The stage.
            loader: The loader.
            limit: Batches at most; None for all.
            number: The pass's number, for the seeds of the loader's workers.
            position: Where it goes on, see :meth:`Batches.position`; None for its beginning.
            dataloader_idx: The loader's index among those of the stage.
        """
        if stage == "train":
            set_epoch(loader, number)
        source = self._sources.get((stage, dataloader_idx))
        if source is None:
            passes = self._passes.get(f"{stage}/{dataloader_idx}", 0)
            rank = self._processes.global_rank
            key = (self.seed, stage, dataloader_idx, *([rank] if rank else []))  # each process draws its own
            source = self._sources[stage, dataloader_idx] = ResumableLoader(loader, key, passes)
        agree = self._processes.any if stage == "train" and self._processes.world_size > 1 else None
        return Batches(source, number, limit, stage, self._signals, self._transfer(dataloader_idx), position, agree)

    def passes(self, stage: Stage, *, most: int | None = None, number: int = 0) -> list[Callable[[], Batches]]:
        """What begins a pass over each loader of an evaluation.

        Args:
            stage: The stage.
            most: Batches of each loader at most; None for the stage's limit alone.
            number: The passes' number, for the seeds of the loaders' workers.
        """
        loaders = as_loaders(self.loader(stage))
        for loader in loaders:
            if not isinstance(loader, Iterable):
                raise MisconfigurationError(
                    f"The {stage} loader is {loader!r} ({type(loader).__name__}), which cannot be iterated. Give a DataLoader."
                )
        limits = self.lengths(stage, most=most)
        pairs = zip(loaders, limits, strict=True)
        return [partial(self.open, stage, *pair, number, dataloader_idx=index) for index, pair in enumerate(pairs)]

    def state_dict(self, inside_epoch: bool) -> dict[str, Any]:
        """What a checkpoint keeps of the loaders, beside the position in the training epoch at hand.

        Args:
            inside_epoch: Whether there is one.
        """
        passes = self._passes_begun()
        train = self.loader("train")
        between = is_stateful(train) and not inside_epoch and passes.get("train/0", 0) > 0
        if inside_epoch:
            passes["train/0"] -= 1  # it is begun again
        return {
            "seed": self.seed,
            "passes": passes,
            "loader": train.state_dict() if between else None,
            "generators": {stage: [generator_states(loader) for loader in self._all(stage)] for stage in KEPT_STAGES},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, but for the generators, which the run puts back when it goes on."""
        self.seed, self._passes = state["seed"], state["passes"]
        if state["loader"] is not None and is_stateful(train := self.loader("train")):
            train.load_state_dict(state["loader"])
            iter(train)  # the pass that the state belongs to, which is over: the next begins anew

    def put_generators_back(self, state: Mapping[str, Any]) -> None:
        """Puts the loaders' generators into the states that :meth:`state_dict` kept."""
        for stage in KEPT_STAGES:
            for loader, kept in zip(self._all(stage), state["generators"][stage], strict=False):
                set_generator_states(loader, kept)

    def release(self) -> None:
        """Lets the loaders' workers go."""
        self._passes = self._passes_begun()
        self._sources.clear()

    def _passes_begun(self) -> dict[str, int]:
        return self._passes | {f"{stage}/{index}": source.passes for (stage, index), source in self._sources.items()}

    def _all(self, stage: Stage) -> list[Any]:
        return [self.loader(stage)] if stage == "train" else as_loaders(self.loader(stage))

    def lengths(self, stage: Stage, *, most: int | None = None) -> list[int | None]:
        """How many batches of each loader of an evaluation are used; None for all of one of unknown length."""
        known = [self.length(stage, loader) for loader in as_loaders(self.loader(stage))]
        return known if most is None else [most if length is None else min(most, length) for length in known]

    def _transfer(self, dataloader_idx: int) -> Callable[[Any], Any]:
        hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
        before, move, after = (getattr(self._owner(hook, DataHooks), hook) for hook in hooks)
        if not any(overridden(part, hook, DataHooks) for part in (self._datamodule, self._module) if part for hook in hooks):
            return partial(move_to_device, device=self._device)  # no hooks: one call a batch in place of four
        return lambda batch: after(move(before(batch, dataloader_idx), self._device, dataloader_idx), dataloader_idx)

    def _owner(self, hook: str, *bases: type) -> LightningModule | LightningDataModule:
        """The datamodule where it overrides a hook, else the module."""
        if self._datamodule is not None and overridden(self._datamodule, hook, *bases):
            return self._datamodule
        return self._module
