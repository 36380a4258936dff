"""The part that the callbacks for several processes share."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from eventtrain.callbacks.distributed.processes import TorchProcesses, check_timeout, device_of_process, join
from eventtrain.callbacks.distributed.samplers import set_shuffling_seed, shuffling_seed, with_share
from eventtrain.core.optimizer import evaluates_often
from eventtrain.errors import MisconfigurationError
from eventtrain.events import ExceptionRaised, FitStart, JoinProcesses, PrepareLoader, Teardown, ValidationEpochStart
from eventtrain.trainer import Trainer


class DataParallel:
    """Join the other processes, divide the data between them, and refuse optimizers that would make them wait forever.

    A base for callbacks that train one module in several processes. It listens to ``join_processes``, ``prepare_loader``,
    ``fit_start``, ``validation_epoch_start``, ``test_epoch_start``, ``predict_epoch_start`` and ``teardown``.

    Args:
        shares_data: Whether loaders get a sampler that gives each process its share.
        timeout: How long an exchange waits for the other processes, a ``timedelta`` or seconds; None for torch's default.

    Raises:
        MisconfigurationError: If the timeout is not a time.
    """

    role: str | None = "distribution"
    processes_type: type[TorchProcesses] = TorchProcesses
    pads_evaluation = False

    def __init__(self, shares_data: bool, timeout: timedelta | float | None) -> None:
        self.shares_data = shares_data
        self.timeout = check_timeout(timeout, type(self).__name__)
        self._processes: TorchProcesses | None = None
        self._train_loaders: list[Any] = []
        self._seeds: list[Any] = []

    def on_join_processes(self, trainer: Trainer, event: JoinProcesses) -> None:
        if self._processes is None:
            self._processes = join(event.device, self.timeout, self.processes_type)
        if self._processes is not None:
            self._processes.begin_run()
            event.processes = self._processes
            event.device = device_of_process(event.device, self._processes.local_rank)

    def on_prepare_loader(self, trainer: Trainer, event: PrepareLoader) -> None:
        if self._processes is not None and self.shares_data:
            event.loader = with_share(event.loader, event.stage, self._processes.data, pads_evaluation=self.pads_evaluation)
        if event.stage == "train":
            self._train_loaders.append(event.loader)

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        for optimizer in trainer.optimizers:
            if self._processes is not None and evaluates_often(optimizer):
                raise MisconfigurationError(
                    f"{type(optimizer.optimizer).__name__} decides by the loss how often it evaluates its closure. The loss "
                    "differs between processes, so they would wait for each other forever. Train with it in one process."
                )

    def check_initialized(self, module: nn.Module) -> None:
        """Check that all processes can get the same weights.

        Raises:
            MisconfigurationError: If a lazy module has no weights yet.
        """
        if lazy := [name for name, parameter in module.named_parameters() if is_lazy(parameter)]:
            raise MisconfigurationError(
                f"{type(self).__name__}: {lazy[0]} of {type(module).__name__} is not initialized yet, and each process would "
                "draw other weights at its first forward. Run one forward in configure_model."
            )

    # After validation_start, where other callbacks put their weights and buffers into the module.
    def on_validation_epoch_start(self, trainer: Trainer, event: ValidationEpochStart) -> None:
        if self._processes is not None:
            self._processes.overwrite(trainer.module.buffers())

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def on_exception(self, trainer: Trainer, event: ExceptionRaised) -> None:
        if self._processes is not None:
            self._processes.end_run(event.exception)

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        if self._processes is not None:
            self._processes.end_run()
        self.state_dict()  # a checkpoint of the run may still be taken
        self._train_loaders.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the seeds by which the data of each training loader are shuffled."""
        if self._train_loaders:
            self._seeds = [shuffling_seed(loader) for loader in self._train_loaders]
        return {"seeds": self._seeds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Shuffle the training data by the seed of a checkpoint.

        Args:
            state: The result of :meth:`state_dict`.
        """
        seeds = state.get("seeds", [state.get("seed")])  # older checkpoints have one
        for loader, seed in zip(self._train_loaders, seeds, strict=False):
            set_shuffling_seed(loader, seed)
