"""The callbacks that come with eventtrain, one file per concern."""

if __name__ != "eventtrain.callbacks":
    raise ImportError("This folder is the package eventtrain.callbacks: write `from eventtrain.callbacks import ...`.")

from typing import TYPE_CHECKING, Any

from eventtrain.callbacks.checkpointing.model_checkpoint import ModelCheckpoint
from eventtrain.callbacks.distributed.distributed_data_parallel import DistributedDataParallel
from eventtrain.callbacks.lambda_callback import LambdaCallback
from eventtrain.callbacks.loggers.json_lines_logger import JSONLinesLogger
from eventtrain.callbacks.loggers.tensorboard_logger import TensorBoardLogger
from eventtrain.callbacks.monitoring.gradient_norm_monitor import GradientNormMonitor
from eventtrain.callbacks.monitoring.learning_rate_monitor import LearningRateMonitor
from eventtrain.callbacks.monitoring.model_summary import ModelSummary
from eventtrain.callbacks.monitoring.progress_bar import ProgressBar
from eventtrain.callbacks.monitoring.system_monitor import SystemMonitor
from eventtrain.callbacks.optimization.activation_checkpointing import ActivationCheckpointing
from eventtrain.callbacks.optimization.exponential_moving_average import ExponentialMovingAverage
from eventtrain.callbacks.optimization.gradient_accumulation import GradientAccumulation
from eventtrain.callbacks.optimization.gradient_clipping import GradientClipping
from eventtrain.callbacks.optimization.lr_scheduler_stepping import LRSchedulerStepping
from eventtrain.callbacks.optimization.mixed_precision import MixedPrecision
from eventtrain.callbacks.profiling.event_timeline import EventTimeline
from eventtrain.callbacks.profiling.profiler import Profiler
from eventtrain.callbacks.profiling.torch_profiler import TorchProfiler
from eventtrain.callbacks.stopping.early_stopping import EarlyStopping
from eventtrain.callbacks.stopping.preemption import Preemption
from eventtrain.callbacks.stopping.terminate_on_nan import TerminateOnNaN
from eventtrain.callbacks.stopping.timer import Timer
from eventtrain.hints import hint

if TYPE_CHECKING:
    from eventtrain.callbacks.distributed.fully_sharded_data_parallel import FullyShardedDataParallel

__all__ = [
    "ActivationCheckpointing",
    "DistributedDataParallel",
    "EarlyStopping",
    "EventTimeline",
    "ExponentialMovingAverage",
    "FullyShardedDataParallel",
    "GradientAccumulation",
    "GradientClipping",
    "GradientNormMonitor",
    "JSONLinesLogger",
    "LRSchedulerStepping",
    "LambdaCallback",
    "LearningRateMonitor",
    "MixedPrecision",
    "ModelCheckpoint",
    "ModelSummary",
    "Preemption",
    "Profiler",
    "ProgressBar",
    "SystemMonitor",
    "TensorBoardLogger",
    "TerminateOnNaN",
    "Timer",
    "TorchProfiler",
]


def __getattr__(name: str) -> Any:
    """Imports what takes long to import, of torch, once it is asked for."""
    if name == "FullyShardedDataParallel":
        from eventtrain.callbacks.distributed.fully_sharded_data_parallel import FullyShardedDataParallel

        return FullyShardedDataParallel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}. {hint('class', name, __all__)}".rstrip())
