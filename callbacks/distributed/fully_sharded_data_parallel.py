"""Train a module that is spread over several processes, each of which holds a part of every weight."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from eventtrain.callback import Callback, on_demand
from eventtrain.callbacks.distributed.data_parallel import DataParallel
from eventtrain.callbacks.distributed.sharded_checkpoint import KEY, put_back, refuse_remote_places, take_out
from eventtrain.callbacks.distributed.sharded_module import drop_gradients, held_gradients, hold_gradients, reshard, units
from eventtrain.callbacks.distributed.sharded_tensors import Placement, ShardedProcesses, part_of
from eventtrain.callbacks.distributed.shared_writing import Writers
from eventtrain.checkpoint.find import in_all
from eventtrain.errors import MisconfigurationError
from eventtrain.events import (
    AfterZeroGrad,
    BeforeForward,
    CheckpointGathered,
    CheckpointRead,
    ExceptionRaised,
    FitStart,
    ReduceGradients,
    Setup,
)
from eventtrain.hints import check_arguments
from eventtrain.trainer import Trainer

CALL = "_call_step"
"""The name under which the module gets a method that calls a step; torch treats that method as a forward."""


class FullyShardedDataParallel(DataParallel, Callback):
    """Train in the processes that torchrun started, each of which holds a part of every weight, gradient and optimizer state.

    If there is only one process, it trains as if the callback were not there, and can read the checkpoints of several
    processes. The other callbacks may be attached before or after it.

    Listens to:

    - ``join_processes``: joins the other processes over gloo, or over NCCL with the GPU of the local rank;
    - ``setup``: all processes get rank zero's weights, and :meth:`shard` spreads the module by torch's ``fully_shard``;
    - ``load_checkpoint`` and ``prepare_loader``: each loader reads only this process's share, also of the rest of an epoch
      that another number of processes began;
    - ``fit_start``: refuses optimizers that decide by the loss how often they evaluate their closure, and loss scaling;
    - ``before_forward``: each step is called as a forward of the sharded module; gradients are only reduced if the batch
      closes a window (only if there are other processes);
    - ``after_zero_grad`` and ``reduce_gradients``: handle windows that were never closed, or closed by a skipped batch (only
      if there are other processes);
    - ``validation_epoch_start``, ``test_epoch_start`` and ``predict_epoch_start``: all processes get rank zero's buffers;
    - ``checkpoint_gathered``: takes sharded tensors out of a checkpoint, for each process to write its own;
      ``checkpoint_read`` puts them back;
    - ``exception`` and ``teardown``: clean up.

    Emits no metrics; reads nothing from the device. Override :meth:`shard` for another layout.

    **Evaluation counts up to** ``world_size - 1`` **samples twice.** A forward waits for all processes, so each process needs
    the same number of batches: the shares of validation, test and prediction are filled up with samples from the beginning.

    **Checkpoints.** Each process writes the tensors that it holds to the checkpoint's file, which has to be on a disk that all
    processes see. It gets its name once all of them have written. Any number of processes can read it, and can also read
    checkpoints of runs that do not shard. To write a file with whole tensors, for ``load_from_checkpoint``:
    ``python -m eventtrain.callbacks.distributed.whole_checkpoint FILE NEW_FILE``.

    While a window of several batches is open, each process holds the whole sum of its gradients, as torch does.

    In manual optimization, parts of the module may be called directly. Parameters that the module itself holds, not one of its
    submodules, may then be used until the first backward of a step.

    Args:
        units: The classes of the submodules whose weights are gathered and freed together, such as ``(Block,)``; None for
            the module's children.
        shares_data: Whether loaders get a sampler that gives each process its share. Loaders that have such a sampler stay as
            they are. Write False if each process loads its share, in as many batches as the other processes.
        timeout: How long an exchange waits for the other processes, a ``timedelta`` or seconds; None for torch's default.
        **options: Options of :func:`torch.distributed.fsdp.fully_shard`: ``mesh``, ``reshard_after_forward``, ``mp_policy``,
            ``offload_policy``, ... .

    Raises:
        MisconfigurationError: If the timeout is not a time, or the units are not classes of modules; in a run, if the
            optimizer, a loader, a callback or a checkpoint cannot be used with sharded weights.

    Example:
        Started by ``torchrun --nproc-per-node 8 train.py``, this trains in eight processes; here there is one.

        >>> from torch import nn
        >>> from eventtrain import Trainer
        >>> from eventtrain.callbacks import FullyShardedDataParallel
        >>> trainer = Trainer(max_epochs=2, callbacks=[FullyShardedDataParallel(units=(nn.TransformerEncoderLayer,))])
        >>> trainer.world_size, trainer.is_global_zero
        (1, True)
    """

    processes_type = ShardedProcesses
    pads_evaluation = True

    def __init__(
        self,
        *,
        units: Sequence[type[nn.Module]] | None = None,
        shares_data: bool = True,
        timeout: timedelta | float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(shares_data, timeout)
        if units is not None and not all(isinstance(unit, type) and issubclass(unit, nn.Module) for unit in units):
            raise MisconfigurationError(
                f"FullyShardedDataParallel(units={units!r}): give classes of modules, such as (Block,), or None for the "
                "module's children."
            )
        self.units = None if units is None else tuple(units)
        known = list(inspect.signature(fully_shard).parameters)[1:]
        check_arguments("FullyShardedDataParallel", options, ["units", "shares_data", "timeout", *known])
        self.options = options
        self._mesh: DeviceMesh | None = None
        self._writers: Writers | None = None
        self._syncs: bool | None = None  # the last value of the module's requires_gradient_sync
        self._may_hold_gradients = True  # of a window, not reduced yet
        self._has_called_a_step = False  # in this run

    def shard(self, module: nn.Module) -> None:
        """Shard the units, then the rest of the module. Override it for another layout.

        Args:
            module: The module, with the same weights on all ranks.
        """
        for unit in [*units(module, self.units), module]:
            fully_shard(unit, **{"mesh": self._mesh, **self.options})

    # ------------------------------------------------------------------ the beginning of a run

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        if self._processes is None:
            return
        for handler in (self.on_before_forward, self.on_after_zero_grad, self.on_reduce_gradients):
            trainer.listen(handler)
        module = trainer.module
        self.check_initialized(module)
        self._syncs, self._may_hold_gradients, self._has_called_a_step = None, True, False
        if not isinstance(module, FSDPModule):
            if self._mesh is None and "mesh" not in self.options:
                self._mesh = init_device_mesh(trainer.device.type, (self._processes.world_size,))
            self._processes.overwrite([*module.parameters(), *module.buffers()])
            self.shard(module)
        if CALL not in vars(module):
            vars(module)[CALL] = call
            register_fsdp_forward_method(module, CALL)

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        super().on_fit_start(trainer, event)
        if self._processes is not None:
            refuse_remote_places(trainer)
        for callback in trainer.callbacks if self._processes is not None else ():
            if getattr(callback, "scaler", None) is not None:
                raise MisconfigurationError(
                    f"{type(callback).__name__} scales the loss, and each process would only see overflows in its part of the "
                    "gradients. Use MixedPrecision('bf16'), or "
                    "FullyShardedDataParallel(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))."
                )

    # ------------------------------------------------------------------ steps

    @on_demand
    def on_before_forward(self, trainer: Trainer, event: BeforeForward) -> None:
        module: Any = trainer.module
        self._has_called_a_step = True
        if event.stage != "train":
            event.call = lambda step, *args: evaluate(module, step, *args)
            return
        event.call = getattr(module, CALL)
        syncs = event.closes_window or not module.automatic_optimization
        if syncs is not self._syncs:
            self._syncs = syncs
            module.set_requires_gradient_sync(syncs)
        self._may_hold_gradients = self._may_hold_gradients or not syncs

    @on_demand
    def on_after_zero_grad(self, trainer: Trainer, event: AfterZeroGrad) -> None:
        if self._may_hold_gradients:  # from a window that was never closed
            self._may_hold_gradients = not self._syncs  # a backward may follow in this batch
            drop_gradients(trainer.module)

    @on_demand
    def on_reduce_gradients(self, trainer: Trainer, event: ReduceGradients) -> None:
        if not event.skipped:  # torch has averaged them in the backward of the batch that closes the window
            return
        assert self._processes is not None
        sums = held_gradients(trainer.module)
        self._processes.average(list(sums.values()))
        for name, gradient in sums.items():
            parameter = trainer.module.get_parameter(name)
            parameter.grad = part_of(gradient.to(parameter.dtype), parameter)
        drop_gradients(trainer.module)

    def on_exception(self, trainer: Trainer, event: ExceptionRaised) -> None:
        super().on_exception(trainer, event)
        # If the error came in the middle of a step, torch has left whole weights in the module.
        module: Any = trainer.module
        if self._has_called_a_step:
            module.reset_iter_state()

    # ------------------------------------------------------------------ checkpoints

    def on_checkpoint_gathered(self, trainer: Trainer, event: CheckpointGathered) -> None:
        if self._processes is None:
            return
        if self._writers is None:
            world_size = self._processes.world_size
            self._writers = Writers(self._processes.global_rank, world_size, self.timeout)
        progress, sums = trainer.progress, held_gradients(trainer.module) if trainer.window_open else {}
        moment = (progress.total_batch_idx, progress.validated_at, progress.epochs_done)
        take_out(event.checkpoint, sums, self._processes, self._writers, moment)

    def on_checkpoint_read(self, trainer: Trainer, event: CheckpointRead) -> None:
        content, module = event.checkpoint, trainer.module
        gradients: dict[str, Any] = {}
        if KEY in content:
            read = partial(put_back, content, event.path, module, trainer.global_rank, trainer.root)
            gradients = in_all(trainer.processes, read)
        elif self._processes is not None:
            gradients = self._take_gradients_out(content, trainer.global_rank)
            Placement(module).distribute(content)
        if self._processes is not None:
            hold_gradients(module, gradients)

    def _take_gradients_out(self, content: dict[str, Any], rank: int) -> dict[str, Any]:
        """Remove one rank's gradients from a checkpoint that holds them whole, if its window is open; return them."""
        states = [content, *content.get("ranks", ())]
        if rank >= len(states) or not content.get("window", {}).get("open"):
            return {}
        window = states[rank]["window"]
        gradients: dict[str, Any] = window["gradients"]
        window["gradients"] = {}
        return gradients


def call(step: Callable[..., Any], *args: Any) -> Any:
    """Call a step. Torch is told to treat this function as a forward of the module."""
    return step(*args)


def evaluate(module: Any, step: Callable[..., Any], *args: Any) -> Any:
    """Call a step that no backward follows, and free the weights that torch keeps for a backward."""
    try:
        return getattr(module, CALL)(step, *args)
    finally:
        reshard(module)
