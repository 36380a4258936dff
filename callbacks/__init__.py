"""The callbacks that come with eventtrain, one file per concern."""

if __name__ != "eventtrain.callbacks":
    raise ImportError("This folder is the package eventtrain.callbacks: write `from eventtrain.callbacks import ...`.")

from typing import TYPE_CHECKING, Any

from eventtrain.callbacks.distributed_data_parallel import DistributedDataParallel
from eventtrain.callbacks.early_stopping import EarlyStopping
from eventtrain.callbacks.event_timeline import EventTimeline
from eventtrain.callbacks.exponential_moving_average import ExponentialMovingAverage
from eventtrain.callbacks.gradient_accumulation import GradientAccumulation
from eventtrain.callbacks.gradient_clipping import GradientClipping
from eventtrain.callbacks.gradient_norm_monitor import GradientNormMonitor
from eventtrain.callbacks.json_lines_logger import JSONLinesLogger
from eventtrain.callbacks.lambda_callback import LambdaCallback
from eventtrain.callbacks.learning_rate_monitor import LearningRateMonitor
from eventtrain.callbacks.lr_scheduler_stepping import LRSchedulerStepping
from eventtrain.callbacks.mixed_precision import MixedPrecision
from eventtrain.callbacks.model_checkpoint import ModelCheckpoint
from eventtrain.callbacks.model_summary import ModelSummary
from eventtrain.callbacks.preemption import Preemption
from eventtrain.callbacks.profiler import Profiler
from eventtrain.callbacks.progress_bar import ProgressBar
from eventtrain.callbacks.system_monitor import SystemMonitor
from eventtrain.callbacks.tensorboard_logger import TensorBoardLogger
from eventtrain.callbacks.terminate_on_nan import TerminateOnNaN
from eventtrain.callbacks.timer import Timer
from eventtrain.callbacks.torch_profiler import TorchProfiler

if TYPE_CHECKING:
    from eventtrain.callbacks.fully_sharded_data_parallel import FullyShardedDataParallel

__all__ = [
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
        from eventtrain.callbacks.fully_sharded_data_parallel import FullyShardedDataParallel

        return FullyShardedDataParallel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
