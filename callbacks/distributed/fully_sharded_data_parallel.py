"""Train a module that is spread over several processes, each of which holds a part of every weight."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from eventtrain.callback import Callback, on_demand
from eventtrain.callbacks.distributed.absences import Absences
from eventtrain.callbacks.distributed.data_parallel import DataParallel
from eventtrain.callbacks.distributed.meshes import Mesh, Shares, check_alike, check_parallelized, data_mesh
from eventtrain.callbacks.distributed.sharded_checkpoint import KEY, put_back, refuse_remote_places, take_out
from eventtrain.callbacks.distributed.sharded_module import (
    drop_gradients,
    held_gradients,
    hold_gradients,
    reduce_held_gradients,
    reshard,
    units,
)
from eventtrain.callbacks.distributed.sharded_tensors import Placement, ShardedProcesses
from eventtrain.callbacks.distributed.shared_writing import Writers
from eventtrain.checkpoint.find import in_all
from eventtrain.checks import check_option
from eventtrain.errors import MisconfigurationError
from eventtrain.events import (
    AfterZeroGrad,
    BeforeBackward,
    BeforeForward,
    CheckpointGathered,
    CheckpointRead,
    ExceptionRaised,
    FitStart,
    JoinProcesses,
    ReduceGradients,
    Setup,
    Teardown,
    TrainBatchEnd,
    TrainEpochStart,
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
    - ``before_backward`` and ``train_batch_end``: a batch without a loss in only some processes ends the run in all (only if
      there are other processes);
    - ``train_epoch_start``: in the epoch's first batch, processes that divide layers check that their batches and random
      numbers are the same (only if there are such processes);
    - ``after_zero_grad`` and ``reduce_gradients``: handle windows that were never closed, or closed by a skipped batch (only
      if there are other processes);
    - ``validation_epoch_start``, ``test_epoch_start`` and ``predict_epoch_start``: all processes get rank zero's buffers;
    - ``checkpoint_gathered``: takes sharded tensors out of a checkpoint, for each process to write its own;
      ``checkpoint_read`` puts them back;
    - ``exception`` and ``teardown``: clean up.

    Emits no metrics; reads nothing from the device, except the first batch of an epoch if layers are divided. Override
    :meth:`shard` for another layout.

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
        mesh: The sizes of the dimensions in which the processes are arranged, such as ``(2, 4)``, or a ``DeviceMesh``; None for
            one dimension, along which weights and data are divided.
        mesh_dim_names: Their names: ``"shard"``, perhaps ``"replicate"`` before it, for hybrid sharding, and perhaps
            ``"tensor"`` after it, whose processes see the same batches and divide layers, see :meth:`shard`.
        reshard_after_backward: Whether weights are freed after a backward that does not close its accumulation window. If not,
            the next batch gathers none that are still there.
        shares_data: Whether loaders get a sampler that gives each process its share. Loaders that have such a sampler stay as
            they are. Write False if each process loads its share, in as many batches as the other processes.
        timeout: How long an exchange waits for the other processes, a ``timedelta`` or seconds; None for torch's default.
        **options: Options of :func:`torch.distributed.fsdp.fully_shard`: ``reshard_after_forward``, ``mp_policy``,
            ``offload_policy``, ... .

    Raises:
        MisconfigurationError: If the timeout is not a time, the units are not classes of modules, or the mesh does not say
            along which dimensions weights, data and layers are divided; in a run, if the optimizer, a loader, a callback or a
            checkpoint cannot be used with sharded weights, or a batch has a loss in some processes and none in others.

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
        mesh: DeviceMesh | Sequence[int] | None = None,
        mesh_dim_names: Sequence[str] | None = None,
        reshard_after_backward: bool = True,
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
        self.reshard_after_backward = check_option(
            reshard_after_backward, "FullyShardedDataParallel", "reshard_after_backward", (True, False)
        )
        known = [*inspect.signature(FullyShardedDataParallel).parameters, *inspect.signature(fully_shard).parameters]
        check_arguments("FullyShardedDataParallel", options, [each for each in known if each not in ("module", "options")])
        self.options = options
        self._mesh = Mesh(mesh, mesh_dim_names)
        self._checks_batch = False  # the next training batch is the first of its epoch, and is divided by layers
        self._writers: Writers | None = None
        self._absences: Absences | None = None
        self._hooks: list[Any] = []
        self._syncs: bool | None = None  # the last value of the module's requires_gradient_sync
        self._may_hold_gradients = True  # of a window, not reduced yet
        self._has_called_a_step = False  # in this run
        self._module: Any = None

    @property
    def mesh(self) -> DeviceMesh | None:
        """The mesh of the processes; None before they have joined, and in one process."""
        return self._mesh.made

    def shard(self, module: nn.Module, mesh: DeviceMesh | None = None) -> None:
        """Shard the units, then the rest of the module. Override it for another layout.

        For tensor parallelism, divide layers before the rest is sharded::

            class Parallel(FullyShardedDataParallel):
                def shard(self, module, mesh):
                    for block in module.blocks:
                        plan = {"into": ColwiseParallel(), "out": RowwiseParallel()}
                        parallelize_module(block, mesh["tensor"], plan)
                    super().shard(module, mesh)

        Args:
            module: The module, with the same weights on all ranks.
            mesh: The mesh of the processes; None for :attr:`mesh`. An override may also leave this argument out.
        """
        mesh = self.mesh if mesh is None else mesh
        assert mesh is not None
        mesh = mesh if "dp_mesh_dims" in self.options else data_mesh(mesh)
        for unit in [*units(module, self.units), module]:
            fully_shard(unit, mesh=mesh, **self.options)

    def on_join_processes(self, trainer: Trainer, event: JoinProcesses) -> None:
        super().on_join_processes(trainer, event)
        processes = self._processes
        if isinstance(processes, ShardedProcesses) and processes.shares is None:
            self._mesh.make(event.device)
            if self._mesh.tensor is not None:
                processes.shares = Shares(processes, self._mesh.groups()[0])

    # ------------------------------------------------------------------ the beginning of a run

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        if self._processes is None:
            return
        for handler in (self.on_before_forward, self.on_after_zero_grad, self.on_reduce_gradients):
            trainer.listen(handler)
        if self._mesh.tensor is not None:
            trainer.listen(self.on_train_epoch_start)
        module = self._module = trainer.module
        self.check_initialized(module)
        self._syncs, self._may_hold_gradients, self._has_called_a_step = None, True, False
        if not isinstance(module, FSDPModule):
            self._processes.overwrite([*module.parameters(), *module.buffers()])
            self._mesh.divide_metrics(module)
            takes_mesh = len(inspect.signature(self.shard).parameters) > 1
            self.shard(*(module, self.mesh) if takes_mesh else (module,))
            self._check_sharded(module)
        if CALL not in vars(module):
            vars(module)[CALL] = call
            register_fsdp_forward_method(module, CALL)
        self._absences = None
        if event.stage == "fit" and module.automatic_optimization:
            assert self._processes.notices is not None
            absences = self._absences = Absences(self._processes.notices)
            for part in module.modules():
                if part is not module and isinstance(part, FSDPModule):  # before torch's hook, which waits for the others
                    self._hooks.append(part.register_forward_pre_hook(lambda part, args: absences.enter_layer(), prepend=True))
            trainer.listen(self.on_before_backward)
            trainer.listen(self.on_train_batch_end)

    def _check_sharded(self, module: nn.Module) -> None:
        """Check that :meth:`shard` has sharded the module itself, and has divided layers if the mesh is for that."""
        if not isinstance(module, FSDPModule):
            raise MisconfigurationError(
                f"{type(self).__name__}.shard did not shard {type(module).__name__} itself. End it with "
                "`super().shard(module, mesh)`, or with `fully_shard(module, mesh=...)` after its parts."
            )
        if self._mesh.tensor is not None:
            check_parallelized(module, self._mesh.tensor)

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
        if self._checks_batch and event.stage == "train":
            self._checks_batch = False
            assert isinstance(self._processes, ShardedProcesses)
            check_alike(self._processes, self._mesh.groups()[1], event.batch, trainer.device)
        self._has_called_a_step = True
        if event.stage != "train":
            event.call = lambda step, *args: evaluate(module, step, *args)
            return
        if self._absences is None:
            event.call = getattr(module, CALL)
        else:
            self._absences.begin(trainer.total_batch_idx)
            event.call = self._call
            event.enter(self._absences.explaining())
        syncs = event.closes_window or not module.automatic_optimization
        if syncs is not self._syncs:
            self._syncs = syncs
            module.set_requires_gradient_sync(syncs)
            if not self.reshard_after_backward:  # the next batch of the window uses the gathered weights
                module.set_reshard_after_backward(syncs)
        self._may_hold_gradients = self._may_hold_gradients or not syncs

    def _call(self, step: Callable[..., Any], *args: Any) -> Any:
        """Call a training step; if it returns no loss, wait until it is known that none has one."""
        module: Any = self._module
        assert self._absences is not None
        self._absences.enter_layer()  # the module's own weights
        outputs = getattr(module, CALL)(step, *args)
        if outputs is None or (isinstance(outputs, Mapping) and outputs.get("loss") is None):
            self._wait_without_loss()
        return outputs

    @on_demand
    def on_before_backward(self, trainer: Trainer, event: BeforeBackward) -> None:
        assert self._absences is not None
        event.enter(self._absences.explaining())
        self._absences.bring_loss()

    @on_demand
    def on_train_batch_end(self, trainer: Trainer, event: TrainBatchEnd) -> None:
        self._wait_if_skipped(trainer)

    def _wait_if_skipped(self, trainer: Trainer) -> None:
        """Wait for the others in a batch that was skipped, or whose loss a listener has removed."""
        assert self._absences is not None
        self._absences.begin(trainer.total_batch_idx)
        if not self._absences.has_settled:
            self._wait_without_loss()

    def _wait_without_loss(self) -> None:
        assert self._absences is not None
        self._absences.wait()
        if self._has_called_a_step:
            reshard(self._module)  # no backward frees what the forward has gathered

    @on_demand
    def on_after_zero_grad(self, trainer: Trainer, event: AfterZeroGrad) -> None:
        if self._may_hold_gradients:  # from a window that was never closed
            self._may_hold_gradients = not self._syncs  # a backward may follow in this batch
            drop_gradients(trainer.module)

    @on_demand
    def on_reduce_gradients(self, trainer: Trainer, event: ReduceGradients) -> None:
        # Torch has averaged them in the backward of the batch that closes the window, if that batch had a loss.
        if self._absences is not None and self._processes is not None:
            self._wait_if_skipped(trainer)
            if event.skipped:  # no backward waits for the others, whose counts have to be heard first
                self._processes.barrier()
        if self._may_hold_gradients:
            assert self._processes is not None and self.mesh is not None
            reduce_held_gradients(trainer.module, self._processes, data_mesh(self.mesh))

    @on_demand
    def on_train_epoch_start(self, trainer: Trainer, event: TrainEpochStart) -> None:
        self._checks_batch = True

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        super().on_teardown(trainer, event)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def on_exception(self, trainer: Trainer, event: ExceptionRaised) -> None:
        # If the error came in the middle of a step, torch has left whole weights in the module.
        module: Any = trainer.module
        if self._has_called_a_step:
            module.reset_iter_state()
        super().on_exception(trainer, event)  # may raise another error, which explains this one

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
        event.checkpoint["mesh"] = self._mesh.sizes_by_role()

    def on_checkpoint_read(self, trainer: Trainer, event: CheckpointRead) -> None:
        content, module = event.checkpoint, trainer.module
        gradients: dict[str, Any] = {}
        if KEY in content:
            if trainer.stage == "fit":
                self._mesh.check_window(content, self._processes)
            read = partial(put_back, content, event.path, module, trainer.global_rank, trainer.root)
            gradients = in_all(trainer.processes, read)
        elif self._processes is not None:
            gradients = self._take_gradients_out(content, trainer.processes.data.global_rank)
            Placement(module, content.get("parameter_groups")).distribute(content)
        if self._processes is not None:
            hold_gradients(module, gradients, self._mesh.layers())

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
