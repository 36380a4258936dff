"""The callbacks that come with eventtrain, one file per concern."""

if __name__ != "eventtrain.callbacks":
    raise ImportError("This folder is the package eventtrain.callbacks: write `from eventtrain.callbacks import ...`.")

from eventtrain.callbacks.gradient_accumulation import GradientAccumulation
from eventtrain.callbacks.gradient_clipping import GradientClipping
from eventtrain.callbacks.lr_scheduler_stepping import LRSchedulerStepping
from eventtrain.callbacks.mixed_precision import MixedPrecision
from eventtrain.callbacks.progress_bar import ProgressBar
from eventtrain.callbacks.tensorboard_logger import TensorBoardLogger

__all__ = [
    "GradientAccumulation",
    "GradientClipping",
    "LRSchedulerStepping",
    "MixedPrecision",
    "ProgressBar",
    "TensorBoardLogger",
]
