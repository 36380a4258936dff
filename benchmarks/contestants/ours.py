"""The contestant eventtrain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.work import CLIP, LOG_EVERY, Batches, Setting, make_loss, make_model, make_optimizer, make_scheduler
from eventtrain import LightningModule, Trainer
from eventtrain.callbacks import (
    EventTimeline,
    GradientAccumulation,
    GradientClipping,
    GradientNormMonitor,
    JSONLinesLogger,
    LearningRateMonitor,
    LRSchedulerStepping,
    ModelSummary,
    Profiler,
    ProgressBar,
    SystemMonitor,
    TensorBoardLogger,
    TorchProfiler,
)


class Module(LightningModule):
    """A module with the network of a setting."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.network = make_model(setting)
        self.loss_function = make_loss(setting)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        return self.loss_function(self.network(x), y)

    def configure_optimizers(self) -> Any:
        """Return SGD."""
        return make_optimizer(self.network)


class LoggingModule(Module):
    """The same module with the additions of the standard setting."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.setting = setting

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Log the loss of a batch, and return it."""
        x, y = batch
        loss = self.loss_function(self.network(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return SGD, and one cycle over the updates."""
        optimizer = make_optimizer(self.network)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": make_scheduler(self.setting, optimizer), "interval": "step"},
        }


def train(setting: Setting, batches: Batches, folder: Path) -> nn.Module:
    """Bare: no callbacks at all. Standard: GradientAccumulation(4), GradientClipping(0.25), LRSchedulerStepping(),
    LearningRateMonitor(), TensorBoardLogger(log_every_n_steps=50), ProgressBar(), self.log(prog_bar=True). Monitored: those
    and GradientNormMonitor(), SystemMonitor(), Profiler(), TorchProfiler(), EventTimeline(), ModelSummary() and
    JSONLinesLogger(), each with its default options."""
    callbacks: list[Any] = []
    if setting.extras:
        callbacks = [
            GradientAccumulation(setting.accumulate),
            GradientClipping(CLIP),
            LRSchedulerStepping(),
            LearningRateMonitor(),
            TensorBoardLogger(folder, log_every_n_steps=LOG_EVERY),
            ProgressBar(),
        ]
    if setting.monitors:
        callbacks += [
            GradientNormMonitor(),
            SystemMonitor(),
            Profiler(),
            TorchProfiler(),
            EventTimeline(),
            ModelSummary(),
            JSONLinesLogger(folder / "metrics.jsonl"),
        ]
    module = (LoggingModule if setting.extras else Module)(setting)
    trainer = Trainer(max_epochs=1, callbacks=callbacks, default_callbacks=False, device="cpu", default_root_dir=folder)
    trainer.fit(module, batches)
    return module.network
