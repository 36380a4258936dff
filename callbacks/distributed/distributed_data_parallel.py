"""Train one module in several processes, each on its share of the data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from datetime import timedelta
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as TorchDistributedDataParallel

from eventtrain.callback import Callback, on_demand
from eventtrain.callbacks.distributed.buckets import Arrivals
from eventtrain.callbacks.distributed.data_parallel import DataParallel
from eventtrain.errors import MisconfigurationError
from eventtrain.events import AfterBackward, BeforeBackward, BeforeForward, ReduceGradients, Setup, Teardown, TrainEpochStart
from eventtrain.hints import check_arguments
from eventtrain.module.module import LightningModule
from eventtrain.trainer import Trainer


class Zeros(torch.autograd.Function):
    """A loss of zero, whose backward gives each parameter a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, sparse: set[nn.Parameter], *parameters: nn.Parameter) -> Tensor:
        """Return the loss.

        Args:
            ctx: The context of autograd.
            sparse: The parameters whose gradients are sparse.
            *parameters: The parameters.
        """
        ctx.sparse, ctx.parameters = sparse, parameters
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the zeros."""
        layouts = [torch.sparse_coo if each in ctx.sparse else torch.strided for each in ctx.parameters]
        return None, *[torch.zeros_like(each, layout=layout) for each, layout in zip(ctx.parameters, layouts, strict=True)]


class Step(nn.Module):
    """A module whose ``forward`` is a step of another module, because torch's wrapper only wraps ``forward``.

    If a step returns no loss, the wrapper gets a loss of zero, because the other processes wait for its gradients.

    Args:
        module: The module whose steps are called.
        parameters: The parameters that are trained.

    Attributes:
        has_no_loss: The last step returned no loss.
        outputs: The outputs of that step.
    """

    def __init__(self, module: LightningModule, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.module, self.trained = module, parameters
        self.has_no_loss, self.outputs = False, None

    def forward(self, step: Callable[..., Any], *args: Any) -> Any:
        """Call the step."""
        outputs = step(*args)
        self.has_no_loss = outputs is None or (isinstance(outputs, Mapping) and outputs.get("loss") is None)
        if not self.has_no_loss:
            return outputs
        self.outputs = outputs
        return self.zeros()

    def zeros(self) -> Tensor:
        """Return a loss of zero of all parameters."""
        tables = [each for each in self.module.modules() if isinstance(each, (nn.Embedding, nn.EmbeddingBag)) and each.sparse]
        loss: Tensor = Zeros.apply({each.weight for each in tables}, *self.trained)  # type: ignore[no-untyped-call]
        return loss


class DistributedDataParallel(DataParallel, Callback):
    """Train in the processes that torchrun started, each with the whole model and its share of the data.

    If there is only one process, the callback does nothing. The other callbacks may be attached before or after it.

    Listens to:

    - ``join_processes``: joins the other processes over gloo, or over NCCL with the GPU of the local rank;
    - ``setup``: all processes get rank zero's weights; in automatic optimization torch's wrapper is put around the module;
    - ``load_checkpoint`` and ``prepare_loader``: each loader reads only this process's share, also of the rest of an epoch
      that another number of processes began;
    - ``fit_start``: refuses optimizers that decide by the loss how often they evaluate their closure;
    - ``train_epoch_start``: reads the module's parameters anew in the next step;
    - ``before_forward``: training steps are called through the wrapper, a new one if layers were frozen or thawed; in a
      resumed run of three or more processes, gradients are sent in the order of the run before (only if there are other
      processes);
    - ``reduce_gradients``: averages the gradients that the wrapper does not average: those of manual optimization, and those
      of a window whose last batch was skipped, or froze or thawed layers (only if there are other processes);
    - ``validation_epoch_start``, ``test_epoch_start`` and ``predict_epoch_start``: all processes get rank zero's buffers, such
      as the statistics of batch norm;
    - ``teardown``: releases the wrapper.

    Gradients are averaged once in each accumulation window, in the backward of its last batch. Evaluation calls the module
    directly, so some processes may have more batches than others. Emits no metrics; reads nothing from the device. Override
    :meth:`wrap` for another wrapper.

    Args:
        shares_data: Whether loaders get a sampler that gives each process its share. Loaders that have such a sampler stay as
            they are. Write False if each process loads its share.
        timeout: How long an exchange waits for the other processes, a ``timedelta`` or seconds; None for torch's default.
        **options: Options of :class:`torch.nn.parallel.DistributedDataParallel`: ``find_unused_parameters``,
            ``bucket_cap_mb``, ... .

    Raises:
        MisconfigurationError: If the timeout is not a time; in a run, if the optimizer, a loader or a gradient cannot be used
            by several processes.

    Example:
        Started by ``torchrun --nproc-per-node 8 train.py``, this trains in eight processes; here there is one.

        >>> from eventtrain import Trainer
        >>> from eventtrain.callbacks import DistributedDataParallel
        >>> trainer = Trainer(max_epochs=2, callbacks=[DistributedDataParallel(bucket_cap_mb=50)])
        >>> trainer.world_size, trainer.is_global_zero
        (1, True)
    """

    def __init__(self, *, shares_data: bool = True, timeout: timedelta | float | None = None, **options: Any) -> None:
        super().__init__(shares_data, timeout)
        known = list(inspect.signature(TorchDistributedDataParallel).parameters)[1:]
        check_arguments("DistributedDataParallel", options, ["shares_data", "timeout", *known])
        self.options = options
        self._wrapper: TorchDistributedDataParallel | None = None
        self._parameters: list[nn.Parameter] = []
        self._wrapped: list[nn.Parameter] = []  # those of them that were trained when the wrapper was made
        self._names: dict[nn.Parameter, str] = {}
        self._arrivals: Arrivals | None = None
        self._order: list[str] | None = None  # of a checkpoint: the names of the parameters, as their gradients were sent
        self._window_open = False
        self._step: Step | None = None
        self._was_called = False  # for the batch that closes the window
        self._zeros: Tensor | None = None  # the loss in place of the one that a step did not return

    def wrap(self, module: nn.Module) -> TorchDistributedDataParallel:
        """Return torch's wrapper around a module. Override it for a communication hook, for example.

        Args:
            module: The module whose ``forward`` calls the steps.

        Returns:
            The wrapper.
        """
        return TorchDistributedDataParallel(module, **self.options)

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        if self._processes is None:
            return
        module = trainer.module
        self.check_initialized(module)
        if event.stage == "fit":
            trainer.listen(self.on_before_forward)
            trainer.listen(self.on_reduce_gradients)
            if module.automatic_optimization:
                self._parameters = list(module.parameters())
                self._wrap(module)
        if self._wrapper is None:  # the wrapper overwrites them when it is made
            self._processes.overwrite([*module.parameters(), *module.buffers()])

    def on_train_epoch_start(self, trainer: Trainer, event: TrainEpochStart) -> None:
        self._parameters = []
        self._window_open = trainer.window_open

    @on_demand
    def on_before_forward(self, trainer: Trainer, event: BeforeForward) -> None:
        if event.stage != "train" or not trainer.module.automatic_optimization:
            return
        self._prepare(trainer.module, event.closes_window)
        if self._wrapper is not None:
            event.call = self._call
            self._was_called = event.closes_window
            if not event.closes_window:
                event.enter(self._wrapper.no_sync())

    @on_demand
    def on_reduce_gradients(self, trainer: Trainer, event: ReduceGradients) -> None:
        module, was_called, self._was_called = trainer.module, self._was_called, False
        if not module.automatic_optimization or event.own_step:
            self._was_called = was_called
            self.average_gradients(list(event.optimizer.parameters()))
            return
        if not was_called:
            self._prepare(module, closes_window=True)
        if self._trains_others():  # the step itself froze or thawed layers
            self.average_gradients(list(event.optimizer.parameters()))
        elif event.skipped and self._wrapper is not None:
            zeros = self._zero_loss(self._wrapper, was_called)
            with (phase := BeforeBackward(zeros, zeros, 1)):
                trainer.signals.before_backward.publish(phase)
                torch.autograd.backward(phase.loss)
            trainer.signals.after_backward.publish(AfterBackward(zeros))

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        super().on_teardown(trainer, event)
        self._wrapper = self._step = self._zeros = self._arrivals = self._order = None
        self._parameters = self._wrapped = []
        self._names = {}

    def average_gradients(self, parameters: list[Tensor]) -> None:
        """Average gradients over all processes.

        A parameter that has no gradient in some processes counts as zero there. If it has none in any process, it gets none.

        Args:
            parameters: The same parameters in all processes.

        Raises:
            MisconfigurationError: If a gradient is sparse.
        """
        assert self._processes is not None
        if not parameters:
            return
        if any(parameter.grad is not None and parameter.grad.is_sparse for parameter in parameters):
            raise MisconfigurationError(
                "DistributedDataParallel cannot average sparse gradients in manual optimization. Use sparse=False, or "
                "automatic optimization."
            )
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        shares = gradients[0].new_tensor([parameter.grad is not None for parameter in parameters])  # goes with the gradients
        self._processes.average([*gradients, shares])
        for parameter, gradient, share in zip(parameters, gradients, shares.tolist(), strict=True):
            parameter.grad = gradient if share else None

    def _prepare(self, module: LightningModule, closes_window: bool) -> None:
        """Make the wrapper ready for a batch: a new one if layers were frozen or thawed."""
        self._parameters = self._parameters or list(module.parameters())
        if self._trains_others():
            if self._window_open:  # the new wrapper does not know what the window holds for layers that are frozen now
                self.average_gradients([parameter for parameter in self._parameters if not parameter.requires_grad])
            self._wrap(module)
        if self._order is not None:
            self._send_in_order(module)
        self._window_open = not closes_window
        if self._arrivals is not None and self._arrivals.is_open:
            self._arrivals.begin(closes_window)
        if self._wrapper is not None:
            self._wrapper.require_backward_grad_sync = True

    def _wrap(self, module: LightningModule) -> None:
        """Make torch's wrapper for the parameters that are trained now."""
        self._wrapped = [parameter for parameter in self._parameters if parameter.requires_grad]
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        if self._arrivals is not None:
            self._arrivals.stop()
        self._step = Step(module, self._wrapped)
        self._wrapper = self.wrap(self._step) if self._wrapped else None
        self._arrivals = None if self._wrapper is None else Arrivals(self._wrapper, self._wrapped)

    def state_dict(self) -> dict[str, Any]:
        """Return the seeds by which the data are shuffled, and the order in which gradients are sent."""
        state = super().state_dict()
        order = self._order
        if self._arrivals is not None and (arrived := self._arrivals.complete_order) is not None:
            order = [self._names[self._wrapped[index]] for index in arrived]
        return state | {"gradient_order": order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Shuffle the training data by the seed of a checkpoint, and send gradients in its order.

        Args:
            state: The result of :meth:`state_dict`.
        """
        super().load_state_dict(state)
        self._order = state.get("gradient_order")

    def _send_in_order(self, module: LightningModule) -> None:
        """Have the wrapper send gradients in the order of a checkpoint, if it reduces the same parameters."""
        order, self._order = self._order, None
        numbers = {self._names[parameter]: index for index, parameter in enumerate(self._wrapped)}
        if order is not None and self._arrivals is not None and sorted(order) == sorted(numbers):
            self._arrivals.repeat([numbers[name] for name in order])

    def _call(self, step: Callable[..., Any], *args: Any) -> Any:
        """Call a training step through the wrapper."""
        assert self._wrapper is not None and self._step is not None
        outputs = self._wrapper(step, *args)
        if not self._step.has_no_loss:
            return outputs
        self._zeros = outputs
        return self._step.outputs

    def _zero_loss(self, wrapper: Any, was_called: bool) -> Any:
        """Return a loss of zero for a batch without one, which takes part in the reduction of the other processes."""
        assert self._step is not None
        zeros, self._zeros = self._zeros, None
        if not was_called:  # as often as in other processes, which exchange buffers in each call
            zeros = wrapper(lambda: None)
        elif zeros is None:  # a listener has removed the loss
            zeros = self._step.zeros()
            wrapper.reducer.prepare_for_backward([zeros] if wrapper.find_unused_parameters else [])
        return zeros

    def _trains_others(self) -> bool:
        """Return whether other parameters are trained than when the wrapper was made, which only knows those."""
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        return len(trained) != len(self._wrapped) or any(map(is_not, trained, self._wrapped))
