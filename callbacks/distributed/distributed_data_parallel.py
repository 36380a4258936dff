"""Trains one module in several processes, each on its share of the data."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as TorchDistributedDataParallel

from eventtrain.callback import Callback
from eventtrain.callbacks.distributed.processes import (
    TorchProcesses,
    check_timeout,
    join,
    own_device,
    shared_out,
    shuffle_by,
    shuffling_seed,
)
from eventtrain.core.optimizer import evaluates_often
from eventtrain.errors import MisconfigurationError
from eventtrain.events import (
    BeforeForward,
    FitStart,
    JoinProcesses,
    PrepareLoader,
    ReduceGradients,
    Setup,
    Teardown,
    TrainEpochStart,
    ValidationStart,
)
from eventtrain.module.module import LightningModule
from eventtrain.trainer import Trainer


class Step(nn.Module):
    """A step as a forward: what a wrapper around ``forward`` has to see of a module that trains by ``training_step``.

    Args:
        module: The module whose step it is.
    """

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, step: Callable[..., Any], *args: Any) -> Any:
        """Calls the step."""
        return step(*args)


class DistributedDataParallel(Callback):
    """Trains by the data-parallel processes that torchrun started. In a process that is alone it does nothing.

    Listens to ``join_processes``, where it joins the others over gloo, or NCCL with the GPU of its local rank;
    ``prepare_loader``, for its share of the data; ``setup``, where all get rank zero's weights, and in automatic
    optimization torch's wrapper is put around the module; ``before_forward``, where training steps are called through it;
    ``reduce_gradients``, for gradients that no wrapper averages: those of manual optimization, and those of a window whose
    last batch was skipped; ``train_epoch_start``, which shuffles anew; and ``validation_start``, where all get rank
    zero's buffers, such as the statistics of batch norm. ``fit_start`` refuses optimizers that decide by a process's own loss.

    Gradients are averaged over ranks once in each accumulation window, by its last batch's backward. Evaluation calls the
    module itself, on batches that may be fewer on some ranks than on others. Emits nothing; reads nothing from the device.

    Args:
        shares_data: Whether loaders are given a sampler that gives each process its share. Loaders that have one stay as
            they are. False where each process loads a share of its own.
        timeout: How long an exchange waits for the others, a ``timedelta`` or seconds; None for torch's own.
        **options: Those of :class:`torch.nn.parallel.DistributedDataParallel`: ``find_unused_parameters``,
            ``bucket_cap_mb``, ... .
    """

    role = "distribution"

    def __init__(self, *, shares_data: bool = True, timeout: timedelta | float | None = None, **options: Any) -> None:
        self.shares_data = shares_data
        self.timeout = check_timeout(timeout, "DistributedDataParallel")
        self.options = options
        self._processes: TorchProcesses | None = None
        self._wrapper: TorchDistributedDataParallel | None = None
        self._wrapped: list[nn.Parameter] = []
        self._epoch_begins = False
        self._train_loader: Any = None

    def wrap(self, module: nn.Module) -> TorchDistributedDataParallel:
        """The policy: torch's wrapper. Override it for a communication hook, for example.

        Args:
            module: What its forward is to call.
        """
        return TorchDistributedDataParallel(module, **self.options)

    def on_join_processes(self, trainer: Trainer, event: JoinProcesses) -> None:
        if self._processes is None:
            self._processes = join(event.device, self.timeout)
        if self._processes is not None:
            event.processes = self._processes
            event.device = own_device(event.device, self._processes.local_rank)

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        if self._processes is None:
            return
        module = trainer.module
        if event.stage == "fit" and module.automatic_optimization:
            self._wrap(module)
        if self._wrapper is None:  # which begins with the same
            self._processes.overwrite([*module.parameters(), *module.buffers()])

    def on_prepare_loader(self, trainer: Trainer, event: PrepareLoader) -> None:
        if self._processes is not None and self.shares_data:
            event.loader = shared_out(event.loader, event.stage, self._processes)
        if event.stage == "train":
            self._train_loader = event.loader

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        for optimizer in trainer.optimizers:
            if self._processes is not None and evaluates_often(optimizer):
                raise MisconfigurationError(
                    f"{type(optimizer.optimizer).__name__} decides by the loss how often it evaluates its closure, and each "
                    "process has a loss of its own: they would wait for each other. Train with it in one process."
                )

    def on_train_epoch_start(self, trainer: Trainer, event: TrainEpochStart) -> None:
        self._epoch_begins = True

    def on_before_forward(self, trainer: Trainer, event: BeforeForward) -> None:
        if event.stage != "train" or self._processes is None or not trainer.module.automatic_optimization:
            return
        if self._epoch_begins:
            self._epoch_begins = False
            self._wrap(trainer.module)
        if self._wrapper is not None:
            event.call = self._wrapper
            if not event.closes_window:
                event.enter(self._wrapper.no_sync())

    def on_reduce_gradients(self, trainer: Trainer, event: ReduceGradients) -> None:
        # The wrapper has averaged them in a backward, unless that was another batch's than the one that closes the window.
        if self._processes is not None and (not trainer.module.automatic_optimization or event.skipped):
            self.average_gradients(list(event.optimizer.parameters()))

    def on_validation_start(self, trainer: Trainer, event: ValidationStart) -> None:
        if self._processes is not None:
            self._processes.overwrite(trainer.module.buffers())

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        self._wrapper = self._train_loader = None
        self._wrapped = []

    def average_gradients(self, parameters: list[Tensor]) -> None:
        """Averages gradients over ranks. A parameter that has none on some ranks counts as zero there; one that has none on
        any rank keeps none.

        Args:
            parameters: The same ones on all ranks.
        """
        assert self._processes is not None
        mine = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        anybodys = self._processes.reduce(mine, "max").tolist()
        gradients = []
        for parameter, is_there in zip(parameters, anybodys, strict=True):
            if is_there:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        if any(gradient.is_sparse for gradient in gradients):
            raise MisconfigurationError(
                "DistributedDataParallel can't average sparse gradients in manual optimization. Use sparse=False, or automatic "
                "optimization."
            )
        self._processes.average(gradients)

    def _wrap(self, module: LightningModule) -> None:
        """Puts torch's wrapper around a module, and a new one where other parameters are trained than before: a wrapper
        knows those alone that needed gradients when it was made."""
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if len(trained) != len(self._wrapped) or any(new is not old for new, old in zip(trained, self._wrapped, strict=True)):
            self._wrapped = trained
            self._wrapper = self.wrap(Step(module)) if trained else None

    def state_dict(self) -> dict[str, Any]:
        """What the training data are shuffled by."""
        return {"seed": shuffling_seed(self._train_loader)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Shuffles the training data as they were."""
        shuffle_by(self._train_loader, state["seed"])
