"""Train one module in several processes, each on its share of the data."""

from __future__ import annotations

import inspect
from collections.abc import Callable
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
from eventtrain.events import BeforeForward, ReduceGradients, Setup, Teardown, TrainEpochStart
from eventtrain.hints import check_arguments
from eventtrain.module.module import LightningModule
from eventtrain.trainer import Trainer


class Step(nn.Module):
    """A module whose ``forward`` is a step of another module, because torch's wrapper only wraps ``forward``.

    Args:
        module: The module whose steps are called.
        expect_nothing: Called if a step returned nothing, so that the wrapper has no backward to wait for.
    """

    def __init__(self, module: LightningModule, expect_nothing: Callable[[], None]) -> None:
        super().__init__()
        self.module, self.expect_nothing = module, expect_nothing

    def forward(self, step: Callable[..., Any], *args: Any) -> Any:
        """Call the step."""
        if (outputs := step(*args)) is None:
            self.expect_nothing()
        return outputs


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
        self._parameters = self._parameters or list(trainer.module.parameters())
        if self._trains_others():
            if self._window_open:  # the new wrapper does not know what the window holds for layers that are frozen now
                self.average_gradients([parameter for parameter in self._parameters if not parameter.requires_grad])
            self._wrap(trainer.module)
        if self._order is not None:
            self._send_in_order(trainer.module)
        self._window_open = not event.closes_window
        if self._arrivals is not None and self._arrivals.is_open:
            self._arrivals.begin(event.closes_window)
        if self._wrapper is not None:
            event.call = self._wrapper
            self._wrapper.require_backward_grad_sync = True
            if not event.closes_window:
                event.enter(self._wrapper.no_sync())

    @on_demand
    def on_reduce_gradients(self, trainer: Trainer, event: ReduceGradients) -> None:
        # The wrapper has averaged them in the backward of the batch that closes the window, unless that batch was skipped, or
        # froze or thawed layers.
        if event.skipped or not trainer.module.automatic_optimization or self._trains_others():
            self.average_gradients(list(event.optimizer.parameters()))

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        super().on_teardown(trainer, event)
        self._wrapper = self._arrivals = self._order = None
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
        has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        has_gradient_anywhere = self._processes.reduce(has_gradient, "max").tolist()
        gradients = []
        for parameter, is_needed in zip(parameters, has_gradient_anywhere, strict=True):
            if is_needed:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        if any(gradient.is_sparse for gradient in gradients):
            raise MisconfigurationError(
                "DistributedDataParallel cannot average sparse gradients in manual optimization. Use sparse=False, or "
                "automatic optimization."
            )
        self._processes.average(gradients)

    def _wrap(self, module: LightningModule) -> None:
        """Make torch's wrapper for the parameters that are trained now."""
        self._wrapped = [parameter for parameter in self._parameters if parameter.requires_grad]
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        if self._arrivals is not None:
            self._arrivals.stop()
        self._wrapper = self.wrap(Step(module, self._expect_nothing)) if self._wrapped else None
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

    def _expect_nothing(self) -> None:
        """Have the wrapper wait for no backward: the module has taken its own step, or had nothing to train in this batch."""
        assert self._wrapper is not None
        self._wrapper.require_backward_grad_sync = False

    def _trains_others(self) -> bool:
        """Return whether other parameters are trained than when the wrapper was made, which only knows those."""
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        return len(trained) != len(self._wrapped) or any(map(is_not, trained, self._wrapped))
