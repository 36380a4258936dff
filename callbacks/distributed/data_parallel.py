"""The part that the callbacks for several processes share."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from eventtrain.callbacks.distributed.processes import TorchProcesses, check_timeout, device_of_process, join
from eventtrain.callbacks.distributed.resizing import continuable, divide_anew, innermost_sampler, must_continue, sampling
from eventtrain.callbacks.distributed.samplers import set_shuffling_seed, shuffling_seed, with_share
from eventtrain.core.optimizer import evaluates_often
from eventtrain.errors import MisconfigurationError
from eventtrain.events import (
    ExceptionRaised,
    FitStart,
    JoinProcesses,
    LoadCheckpoint,
    PrepareLoader,
    Teardown,
    ValidationEpochStart,
)
from eventtrain.trainer import Trainer


class DataParallel:
    """Join the other processes, divide the data between them, and refuse optimizers that would make them wait forever.

    A base for callbacks that train one module in several processes. It listens to ``join_processes``, ``load_checkpoint``,
    ``prepare_loader``, ``fit_start``, ``validation_epoch_start``, ``test_epoch_start``, ``predict_epoch_start`` and
    ``teardown``.

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
        self._samplings: list[dict[str, Any]] = []
        self._of_one_process: list[dict[str, Any]] = []  # the same, if no process had a share
        self._continues = False  # the epoch that is resumed was begun by another number of processes

    def on_join_processes(self, trainer: Trainer, event: JoinProcesses) -> None:
        if self._processes is None:
            self._processes = join(event.device, self.timeout, self.processes_type)
        self._continues = False
        if self._processes is not None:
            self._processes.begin_run(partial(place_of, trainer))
            event.processes = self._processes
            event.device = device_of_process(event.device, self._processes.local_rank)

    def on_prepare_loader(self, trainer: Trainer, event: PrepareLoader) -> None:
        if event.stage == "train" and self._continues:
            self._of_one_process.append(sampling(event.loader))
        if self._processes is not None and self.shares_data:
            event.loader = with_share(event.loader, event.stage, self._processes, pads_evaluation=self.pads_evaluation)
        if event.stage == "train":
            if self._continues:
                event.loader = continuable(event.loader, trainer.global_rank, trainer.world_size)
            self._train_loaders.append(event.loader)

    def on_load_checkpoint(self, trainer: Trainer, event: LoadCheckpoint) -> None:
        self._continues = must_continue(event.checkpoint, trainer.world_size)

    def divide_checkpoint(self, trainer: Trainer, checkpoint: dict[str, Any], states: list[Any]) -> dict[str, Any]:
        """Return this process's part of a run that another number of processes left in an epoch.

        Args:
            trainer: The trainer, whose loaders exist.
            checkpoint: The content of the checkpoint.
            states: For each process that wrote it, its ``window``, ``metrics``, ``rng`` and ``data``.

        Returns:
            The same for this process, and ``progress``.

        Raises:
            MisconfigurationError: If the rest of the epoch cannot be divided so that each sample is trained once.
        """
        return divide_anew(trainer, checkpoint, states, self._train_loaders, self._of_one_process)

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
        if self._processes is None:
            return
        explanation = self._processes.explain(event.exception)
        self._processes.end_run(explanation or event.exception)
        if explanation is not None:
            raise explanation from event.exception

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        if self._processes is not None:
            self._processes.end_run()
        self.state_dict()  # a checkpoint of the run may still be taken
        self._train_loaders.clear()
        self._of_one_process.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the seeds by which the data of each training loader are shuffled, and the order of the current epoch."""
        if self._train_loaders:
            self._seeds = [shuffling_seed(loader) for loader in self._train_loaders]
            self._samplings = [sampling(loader) for loader in self._train_loaders]
        return {"seeds": self._seeds, "samplers": self._samplings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Shuffle the training data by the seed of a checkpoint.

        Args:
            state: The result of :meth:`state_dict`.
        """
        seeds = state.get("seeds", [state.get("seed")])  # older checkpoints have one
        for loader, seed in zip(self._train_loaders, seeds, strict=False):
            set_shuffling_seed(loader, seed)
        for loader, written in zip(self._train_loaders, state.get("samplers", ()), strict=False):
            if "continues" in written and (sampler := innermost_sampler(loader)).continues is None:
                sampler.continues = written["continues"]


def place_of(trainer: Trainer) -> str:
    """Return the place of a run in words, for errors of exchanges."""
    if trainer.stage != "fit" or trainer.batch_idx < 0:
        return f"in Trainer.{trainer.stage}" if trainer.stage else ""
    return f"epoch {trainer.current_epoch}, batch {trainer.batch_idx}"
