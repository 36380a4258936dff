"""An event-driven PyTorch trainer: the loop only publishes, everything else is a callback."""

from eventtrain import events
from eventtrain.callback import Callback, decides_alike, on_demand
from eventtrain.checkpoint.rng import seed_everything
from eventtrain.core.closure import Closure
from eventtrain.core.optimizer import LightningOptimizer
from eventtrain.data.combined import CombinedLoader
from eventtrain.errors import MisconfigurationError
from eventtrain.module.datamodule import LightningDataModule
from eventtrain.module.module import LightningModule
from eventtrain.trainer import Trainer
from eventtrain.version import __version__

__all__ = [
    "Callback",
    "Closure",
    "CombinedLoader",
    "LightningDataModule",
    "LightningModule",
    "LightningOptimizer",
    "MisconfigurationError",
    "Trainer",
    "__version__",
    "decides_alike",
    "events",
    "on_demand",
    "seed_everything",
]
