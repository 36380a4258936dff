"""The state of a run that outlives it: a test after a fit reads it, and so do the trainer's properties and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eventtrain.core.state import BatchState, Progress, RunLimits, StopRequest
from eventtrain.errors import MisconfigurationError
from eventtrain.events import EstimateSteppingBatches

if TYPE_CHECKING:
    from eventtrain.core.loop import TrainLoop
    from eventtrain.core.optimizer import LightningOptimizer
    from eventtrain.core.signals import SignalTable
    from eventtrain.core.stepping import Stepping
    from eventtrain.metrics.metrics import Metrics
    from eventtrain.module.module import LightningModule
    from eventtrain.optim.lr_scheduler import LRSchedulerConfig
    from eventtrain.run.compiled import ModuleSteps
    from eventtrain.run.loaders import RunLoaders


@dataclass(slots=True)
class RunState:
    """The state of the current run, or of the last one. A fit begins a new one; an evaluation continues the last.

    Attributes:
        limits: How long the fit is.
        metrics: The values that the module logs in the current run, or in the last one.
        fit_metrics: Those of the fit, which checkpoints keep.
        progress: The counters of the fit.
        stop_request: The requests of this process to end it.
        stop: Those that hold in all processes.
        batch: The current training batch.
        module: The module of the run.
        fitted: The module of the fit; None if there was none.
        steps: Its steps as the run calls them.
        datamodule: The datamodule of the run, if it has one.
        optimizers: The optimizers of the fit, wrapped.
        steppings: Their steps in the run, in the same order.
        configured_groups: Their parameter groups as ``configure_optimizers`` returned them, by the names of the parameters.
        lr_scheduler_configs: The schedulers of the fit.
        loaders: The loaders of the fit.
        loop: The training loop of the fit.
        num_evaluation_batches: Batches of the current evaluation over all of its loaders; None if unknown.
        sequence: The number of the last checkpoint that was collected.
    """

    limits: RunLimits
    metrics: Metrics
    fit_metrics: Metrics = field(init=False)
    progress: Progress = field(default_factory=Progress)
    stop_request: StopRequest = field(default_factory=StopRequest)
    stop: StopRequest = field(init=False)
    batch: BatchState = field(default_factory=BatchState)
    module: LightningModule | None = None
    fitted: LightningModule | None = None
    steps: ModuleSteps | None = None
    datamodule: Any = None
    optimizers: list[LightningOptimizer] = field(default_factory=list)
    steppings: list[Stepping] = field(default_factory=list)
    configured_groups: list[list[list[str | None]]] = field(default_factory=list)
    lr_scheduler_configs: list[LRSchedulerConfig] = field(default_factory=list)
    loaders: RunLoaders | None = None
    loop: TrainLoop | None = None
    num_evaluation_batches: int | None = None
    sequence: int = 0

    def __post_init__(self) -> None:
        self.fit_metrics = self.metrics
        self.stop = self.stop_request


def stepping_batches(limits: RunLimits, signals: SignalTable) -> int:
    """Estimate how many batches of a fit will update something, with the help of listeners.

    Args:
        limits: The limits of the fit.
        signals: The trainer's signals.

    Raises:
        MisconfigurationError: If it cannot be known.
    """
    epochs, length, max_steps = limits.max_epochs, limits.first_epoch_batches, limits.max_steps
    if epochs is None or length is None:
        if max_steps is not None:
            return max_steps
        raise MisconfigurationError(
            "estimated_stepping_batches cannot be known: the run has neither max_steps nor both max_epochs and a training "
            "loader with a length. Give Trainer(max_steps=...), or limit_train_batches as a whole number."
        )
    limits.is_estimated = True
    event = EstimateSteppingBatches(length, epochs, max_steps)
    signals.estimate_stepping_batches.publish(event)
    batches = epochs * length if event.stepping_batches is None else event.stepping_batches
    return batches if max_steps is None else min(batches, max_steps)
