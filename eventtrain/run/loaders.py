"""The loaders of one run, stage by stage, and the passes over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch

from eventtrain.core.signals import SignalTable
from eventtrain.data.batches import LoaderPass
from eventtrain.data.device import move_to_device
from eventtrain.data.generators import generator_states, set_generator_states
from eventtrain.data.limits import Limit, as_loaders, known_length, limited_length
from eventtrain.data.resumable import ResumableLoader, is_stateful, set_epoch
from eventtrain.distributed import Processes
from eventtrain.errors import MisconfigurationError
from eventtrain.events import PrepareLoader, Stage
from eventtrain.module.datamodule import DataHooks, LightningDataModule
from eventtrain.module.module import LightningModule
from eventtrain.module.overriding import method_of, overridden
from eventtrain.run.arguments import limit_name

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
        batch_limits: How many batches of each stage are used.
        signals: The signals on which fetching is published.
        device: The device of the batches.
        processes: The processes that share the data.

    Attributes:
        seed: The number that loaders' workers are seeded from, together with stage, pass and batch.
    """

    dataloaders: dict[Stage, Any]
    module: LightningModule
    datamodule: Any
    batch_limits: dict[Stage, Limit]
    signals: SignalTable
    device: torch.device
    processes: Processes

    def __post_init__(self) -> None:
        self.seed = torch.initial_seed()
        self._opened: dict[tuple[Stage, int], ResumableLoader] = {}
        self._passes: dict[str, int] = {}  # begun by the run before, in another process for example
        self._loaders: dict[Stage, Any] = {}

    def loader(self, stage: Stage) -> Any:
        """Return a stage's loader or loaders: those of the call, else the datamodule's, else the module's; None if there is
        none. They are made once a run."""
        if stage not in self._loaders:
            loader = self.dataloaders.get(stage)
            if loader is None:
                hook = LOADER_HOOKS[stage]
                loader = method_of(self._owner(hook, LightningModule, LightningDataModule, DataHooks), hook, DataHooks)()
            self._loaders[stage] = self._prepared(stage, loader)
        return self._loaders[stage]

    def _prepared(self, stage: Stage, loader_or_loaders: Any) -> Any:
        """Let listeners replace a stage's loader or loaders."""
        if loader_or_loaders is None or not self.signals.prepare_loader.listeners:
            return loader_or_loaders
        loaders = [loader_or_loaders] if stage == "train" else as_loaders(loader_or_loaders)
        prepared = []
        for index, loader in enumerate(loaders):
            event = PrepareLoader(stage, index, loader)
            self.signals.prepare_loader.publish(event)
            prepared.append(event.loader)
        return prepared[0] if len(loaders) == 1 and loaders[0] is loader_or_loaders else prepared

    def length(self, stage: Stage, loader: Any) -> int | None:
        """Return how many batches of a loader are used; None for all of a loader without a length.

        Raises:
            MisconfigurationError: If the stage's limit does not fit the loader.
        """
        length = limited_length(known_length(loader), self.batch_limits[stage], limit_name(stage))
        if stage != "train" or length is None or self.processes.world_size == 1:
            return length
        return min(self.processes.gather_for_all(length))  # no process trains on after others have nothing left

    def open(
        self,
        stage: Stage,
        loader: Any,
        limit: int | None,
        number: int,
        position: Mapping[str, Any] | None = None,
        *,
        dataloader_idx: int = 0,
    ) -> LoaderPass:
        """Begin a pass over a loader.

        Args:
            stage: The stage.
            loader: The loader.
            limit: Batches at most; None for all.
            number: The pass's number, for the seeds of the loader's workers.
            position: The position that it continues from, see :meth:`LoaderPass.position`; None for its beginning.
            dataloader_idx: The loader's index among those of the stage.
        """
        if stage == "train":
            set_epoch(loader, number)
        resumable = self._opened.get((stage, dataloader_idx))
        if resumable is None:
            passes = self._passes.get(f"{stage}/{dataloader_idx}", 0)
            rank = self.processes.global_rank
            key = (self.seed, stage, dataloader_idx, *([rank] if rank else []))  # each process draws its own
            resumable = self._opened[stage, dataloader_idx] = ResumableLoader(loader, key, passes)
        agree = self.processes.any if stage == "train" and self.processes.world_size > 1 else None
        return LoaderPass(resumable, number, limit, stage, self.signals, self._transfer(dataloader_idx), position, agree)

    def passes(self, stage: Stage, *, most: int | None = None, number: int = 0) -> list[Callable[[], LoaderPass]]:
        """Return for each loader of an evaluation a function that begins a pass over it.

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

    def state_dict(self, in_epoch: bool) -> dict[str, Any]:
        """Return the loaders' state for a checkpoint, beside the position in the current training epoch.

        Args:
            in_epoch: Whether there is such an epoch.
        """
        passes = self._passes_begun()
        train = self.loader("train")
        between = is_stateful(train) and not in_epoch and passes.get("train/0", 0) > 0
        if in_epoch:
            passes["train/0"] -= 1  # it is begun again
        return {
            "seed": self.seed,
            "passes": passes,
            "loader": train.state_dict() if between else None,
            "generators": {stage: [generator_states(loader) for loader in self._all(stage)] for stage in FIT_STAGES},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state that :meth:`state_dict` returned, but for the generators, which the run restores when it continues."""
        self.seed, self._passes = state["seed"], state["passes"]
        if state["loader"] is not None and is_stateful(train := self.loader("train")):
            train.load_state_dict(state["loader"])
            iter(train)  # the pass that the state belongs to, which is over: the next begins anew

    def restore_generators(self, state: Mapping[str, Any]) -> None:
        """Put the loaders' generators into the states of :meth:`state_dict`."""
        for stage in FIT_STAGES:
            for loader, states in zip(self._all(stage), state["generators"][stage], strict=False):
                set_generator_states(loader, states)

    def release(self) -> None:
        """Let the loaders' workers go."""
        self._passes = self._passes_begun()
        self._opened.clear()

    def _passes_begun(self) -> dict[str, int]:
        return self._passes | {f"{stage}/{index}": resumable.passes for (stage, index), resumable in self._opened.items()}

    def _all(self, stage: Stage) -> list[Any]:
        return [self.loader(stage)] if stage == "train" else as_loaders(self.loader(stage))

    def lengths(self, stage: Stage, *, most: int | None = None) -> list[int | None]:
        """Return how many batches of each loader of an evaluation are used; None for all of a loader without a length."""
        known = [self.length(stage, loader) for loader in as_loaders(self.loader(stage))]
        return known if most is None else [most if length is None else min(most, length) for length in known]

    def _transfer(self, dataloader_idx: int) -> Callable[[Any], Any]:
        hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
        before, move, after = (method_of(self._owner(hook, DataHooks), hook, DataHooks) for hook in hooks)
        if not any(overridden(part, hook, DataHooks) for part in (self.datamodule, self.module) if part for hook in hooks):
            return partial(move_to_device, device=self.device)  # no hooks: one call a batch in place of four
        return lambda batch: after(move(before(batch, dataloader_idx), self.device, dataloader_idx), dataloader_idx)

    def _owner(self, hook: str, *bases: type) -> Any:
        """Return the datamodule if it overrides a hook, else the module."""
        if self.datamodule is not None and overridden(self.datamodule, hook, *bases):
            return self.datamodule
        return self.module
