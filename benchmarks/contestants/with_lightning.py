"""The contestant Lightning, with its default options and in its barebones mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from benchmarks.work import CLIP, LOG_EVERY, Batches, Setting, make_loss, make_model, make_optimizer, make_scheduler


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
    """Checkpoints and the model summary are off. Bare: the logger and the progress bar too. Standard:
    accumulate_grad_batches=4, gradient_clip_val=0.25, TensorBoardLogger with log_every_n_steps=50, which counts updates,
    LearningRateMonitor, TQDMProgressBar, which redraws at each batch by default, self.log(prog_bar=True)."""
    switched_on: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    if setting.extras:
        switched_on = {
            "accumulate_grad_batches": setting.accumulate,
            "gradient_clip_val": CLIP,
            "logger": TensorBoardLogger(folder),
            "log_every_n_steps": LOG_EVERY,
            "callbacks": [LearningRateMonitor("step"), TQDMProgressBar()],
        }
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **switched_on,
    )
    module = (LoggingModule if setting.extras else Module)(setting)
    trainer.fit(module, batches)
    return module.network


def barebones(setting: Setting, batches: Batches, folder: Path) -> nn.Module:
    """Trainer(barebones=True), the mode in which Lightning measures its overhead. It refuses loggers, bars and checkpoints,
    and drops logged values, so it takes no part in the standard setting."""
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=1, barebones=True, default_root_dir=folder)
    module = Module(setting)
    trainer.fit(module, batches)
    return module.network
