"""Trains a module that is spread over several processes, each of which holds a part of every weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.utils.data import BatchSampler, DistributedSampler

from eventtrain.callback import Callback
from eventtrain.callbacks.distributed import sharded_checkpoint as shards
from eventtrain.callbacks.distributed.processes import (
    TorchProcesses,
    check_timeout,
    join,
    own_device,
    shared_out,
    shuffle_by,
    shuffling_seed,
    with_sampler,
)
from eventtrain.core.optimizer import evaluates_often
from eventtrain.distributed import Processes, SingleProcess
from eventtrain.errors import MisconfigurationError
from eventtrain.events import (
    AfterZeroGrad,
    BeforeForward,
    CheckpointSaved,
    ExceptionRaised,
    FitStart,
    JoinProcesses,
    LoadCheckpoint,
    PrepareLoader,
    ReduceGradients,
    SaveCheckpoint,
    Setup,
    Teardown,
    ValidationStart,
)
from eventtrain.trainer import Trainer

CALL = "_call_step"


class FullyShardedDataParallel(Callback):
    """Trains by the processes that torchrun started, each of which holds a part of every weight, gradient and optimizer state.

    In a process that is alone it trains as if it were not there, and reads the checkpoints of several. Attach it before
    callbacks that read checkpoints.

    Listens to ``join_processes``, where it joins the others over gloo, or NCCL with the GPU of its local rank; ``setup``, where
    all get rank zero's weights, and :meth:`shard` spreads the module by torch's ``fully_shard``; ``prepare_loader``, for this
    process's share of the data; ``before_forward``, where each step is called as a forward of the sharded module, and
    gradients are reduced only where the batch closes a window; ``after_zero_grad`` and ``reduce_gradients``, for windows that
    were never closed, or by a skipped batch; ``validation_start``, ``test_start`` and ``predict_start``, where all get rank
    zero's buffers. ``fit_start`` refuses what cannot be right: optimizers that decide by a process's own loss, and loss
    scaling. Emits nothing; reads nothing from the device.

    **Evaluation counts up to** ``world_size - 1`` **samples twice.** A forward waits for all processes, so that each needs as
    many batches as the others: the shares of validation, test and prediction are filled up with samples from the beginning.

    **Checkpoints.** Sharded tensors are written by ``torch.distributed.checkpoint``, each process its part, to a new folder in
    ``checkpoints/shards`` under the trainer's ``default_root_dir``, which all have to see (at ``save_checkpoint``, after all
    other listeners). The checkpoint's file, by rank zero, comes after them and names the folder, so that a kill in between
    leaves what there was; ``checkpoint_saved`` removes folders that no file refers to any more. ``load_checkpoint`` reads them
    for any number of processes, and the files of runs that do not shard. For a file of weights like any other:
    ``python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE``.

    While a window of several batches is open, each process holds the sum of its own gradients whole, as torch does.

    In manual optimization, parts of the module may be called by themselves. The module's own parameters, those of no
    submodule, may then be used until the first backward of a step.

    Args:
        units: The classes of the submodules whose weights are gathered and freed together, such as ``(Block,)``; None for
            the module's own children.
        shares_data: Whether loaders are given a sampler that gives each process its share. Loaders that have one stay as
            they are. False where each process loads a share of its own, in as many batches as the others.
        timeout: How long an exchange waits for the others, a ``timedelta`` or seconds; None for torch's own.
        **options: Those of :func:`torch.distributed.fsdp.fully_shard`: ``mesh``, ``reshard_after_forward``, ``mp_policy``,
            ``offload_policy``, ... .

    Raises:
        MisconfigurationError: A timeout that is no time, or units that are no classes of modules.
    """

    role = "distribution"

    def __init__(
        self,
        *,
        units: Sequence[type[nn.Module]] | None = None,
        shares_data: bool = True,
        timeout: timedelta | float | None = None,
        **options: Any,
    ) -> None:
        if units is not None and not all(isinstance(unit, type) and issubclass(unit, nn.Module) for unit in units):
            raise MisconfigurationError(
                f"FullyShardedDataParallel(units={units!r}): it has to be classes of modules, such as (Block,), or None "
                "for the module's own children."
            )
        self.units = None if units is None else tuple(units)
        self.shares_data = shares_data
        self.timeout = check_timeout(timeout, "FullyShardedDataParallel")
        self.options = options
        self._processes: TorchProcesses | None = None
        self._mesh: DeviceMesh | None = None
        self._shards: shards.Shards | None = None
        self._syncs: bool | None = None  # what the module was told last
        self._holds = True  # there may be gradients of a window that are not reduced
        self._has_run = False  # since the run began
        self._train_loader: Any = None

    def shard(self, module: nn.Module) -> None:
        """The policy: shards the units, then what is left of the module.

        Args:
            module: The module, with the same weights on all ranks.
        """
        for unit in [*shards.units(module, self.units), module]:
            fully_shard(unit, **{"mesh": self._mesh, **self.options})

    # ------------------------------------------------------------------ beginning

    def on_join_processes(self, trainer: Trainer, event: JoinProcesses) -> None:
        if self._processes is None:
            joined = join(event.device, self.timeout)
            self._processes = joined and shards.ShardedProcesses(joined.local_rank, self.timeout)
        if self._processes is not None:
            event.processes = self._processes
            event.device = own_device(event.device, self._processes.local_rank)

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        root = Path(trainer.default_root_dir) / "checkpoints" / shards.KEY
        self._shards = shards.Shards(root, self._processes or SingleProcess())
        if self._processes is None:
            return
        for other in trainer.callbacks[: trainer.callbacks.index(self)]:
            if hasattr(other, "on_load_checkpoint"):
                raise MisconfigurationError(
                    f"{type(other).__name__} is attached before FullyShardedDataParallel, and would see checkpoints without "
                    "their weights. Write Trainer(callbacks=[FullyShardedDataParallel(), ...])."
                )
        # After all others: they may yet add sharded tensors, or replace some.
        trainer.signals.save_checkpoint.disconnect(self.take_shards_out)
        trainer.signals.save_checkpoint.connect(self.take_shards_out)
        module = trainer.module
        self._syncs, self._holds, self._has_run = None, True, False
        if not isinstance(module, FSDPModule):
            if self._mesh is None and "mesh" not in self.options:
                self._mesh = init_device_mesh(trainer.device.type, (self._processes.world_size,))
            self._processes.overwrite([*module.parameters(), *module.buffers()])
            self.shard(module)
        if CALL not in vars(module):
            vars(module)[CALL] = call
            register_fsdp_forward_method(module, CALL)

    def on_prepare_loader(self, trainer: Trainer, event: PrepareLoader) -> None:
        if self._processes is not None and self.shares_data:
            shared = shared_out(event.loader, event.stage, self._processes)
            if event.stage != "train" and shared is not event.loader:
                shared = padded(shared, self._processes)
            event.loader = shared
        if event.stage == "train":
            self._train_loader = event.loader

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        if self._processes is None:
            return
        for optimizer in trainer.optimizers:
            if evaluates_often(optimizer):
                raise MisconfigurationError(
                    f"{type(optimizer.optimizer).__name__} decides by the loss how often it evaluates its closure, and each "
                    "process has a loss of its own: they would wait for each other. Train with it in one process."
                )
        for each in trainer.callbacks:
            if getattr(each, "scaler", None) is not None:
                raise MisconfigurationError(
                    f"{type(each).__name__} scales the loss, and each process would see overflows in its own part of the "
                    "gradients alone. Use MixedPrecision('bf16'), or "
                    "FullyShardedDataParallel(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))."
                )
            if getattr(each, "save_on_exception", False):
                raise MisconfigurationError(
                    f"{type(each).__name__}(save_on_exception=True) copies the run's state in each batch, which "
                    "FullyShardedDataParallel would write to the disk. Use save_on_exception=False, and every_n_steps."
                )

    # ------------------------------------------------------------------ steps

    def on_before_forward(self, trainer: Trainer, event: BeforeForward) -> None:
        if self._processes is None:
            return
        module: Any = trainer.module
        self._has_run = True
        if event.stage != "train":
            event.call = lambda step, *args: evaluate(module, step, *args)
            return
        event.call = getattr(module, CALL)
        syncs = event.closes_window or not trainer.module.automatic_optimization
        if syncs is not self._syncs:
            self._syncs = syncs
            module.set_requires_gradient_sync(syncs)
        self._holds = self._holds or not syncs

    def on_after_zero_grad(self, trainer: Trainer, event: AfterZeroGrad) -> None:
        # Those of a window that was never closed.
        if self._holds and self._processes is not None:
            self._holds = False
            shards.drop_gradients(trainer.module)

    def on_reduce_gradients(self, trainer: Trainer, event: ReduceGradients) -> None:
        # Backward has averaged them, unless that was another batch's than the one that closes the window.
        if self._processes is None or not event.skipped:
            return
        held = shards.held_gradients(trainer.module)
        self._processes.average(list(held.values()))
        for name, gradient in held.items():
            parameter = trainer.module.get_parameter(name)
            parameter.grad = shards.part_of(gradient.to(parameter.dtype), parameter)
        shards.drop_gradients(trainer.module)

    def on_validation_start(self, trainer: Trainer, event: ValidationStart) -> None:
        if self._processes is not None:
            # Sharded weights, and what is gathered of them, cannot be used after inference mode.
            event.enter(torch.inference_mode(False))
            event.enter(torch.no_grad())
            self._processes.overwrite(trainer.module.buffers())

    on_test_start = on_predict_start = on_validation_start

    def on_exception(self, trainer: Trainer, event: ExceptionRaised) -> None:
        # Perhaps in the middle of a step, where torch has put whole weights into the module.
        module: Any = trainer.module
        if self._has_run and hasattr(module, "reset_iter_state"):  # of today's torch
            module.reset_iter_state()

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        self._train_loader = None

    # ------------------------------------------------------------------ checkpoints

    def on_load_checkpoint(self, trainer: Trainer, event: LoadCheckpoint) -> None:
        assert self._shards is not None
        content, module = event.checkpoint, trainer.module
        held: dict[str, Any] = {}
        if shards.KEY in content:
            held = self._shards.put_back(content, module)
        elif self._processes is not None:
            held = self._window_of(content, trainer)
            shards.Placing(module).distribute(content)
        if self._processes is not None:
            shards.hold_gradients(module, held)

    def _window_of(self, content: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
        """Takes the gradients of an open window out of a checkpoint that holds them whole."""
        every = [content, *content.get("ranks", ())]
        if trainer.global_rank >= len(every) or not content.get("window", {}).get("open"):
            return {}
        window = every[trainer.global_rank]["window"]
        held: dict[str, Any] = window["gradients"]
        window["gradients"] = {}
        return held

    def take_shards_out(self, trainer: Trainer, event: SaveCheckpoint) -> None:
        """Connected to ``save_checkpoint``."""
        assert self._shards is not None
        rank = trainer.global_rank
        held = shards.held_gradients(trainer.module) if trainer.window_open else {}
        self._shards.take_out(event.checkpoint, {f"{rank}.{name}": gradient for name, gradient in held.items()})

    def on_checkpoint_saved(self, trainer: Trainer, event: CheckpointSaved) -> None:
        if self._shards is not None and trainer.is_global_zero:
            self._shards.clear(Path(event.path))

    def state_dict(self) -> dict[str, Any]:
        """What the training data are shuffled by."""
        return {"seed": shuffling_seed(self._train_loader)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Shuffles the training data as they were."""
        shuffle_by(self._train_loader, state["seed"])


def call(step: Callable[..., Any], *args: Any) -> Any:
    """Calls a step: what is registered with torch as a forward of the module."""
    return step(*args)


def evaluate(module: Any, step: Callable[..., Any], *args: Any) -> Any:
    """Calls a step without a backward, after which torch would keep weights that it gathered."""
    try:
        return getattr(module, CALL)(step, *args)
    finally:
        shards.reshard(module)


def padded(loader: Any, processes: Processes) -> Any:
    """A loader that reads this process's share in as many batches as the others: at its end some samples are repeated."""
    own: DistributedSampler[Any] = DistributedSampler(
        loader.dataset, processes.world_size, processes.global_rank, shuffle=False
    )
    batches = loader.batch_sampler
    return with_sampler(loader, own, batches and BatchSampler(own, batches.batch_size, batches.drop_last))
