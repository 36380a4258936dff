"""The training process that the chaos harness kills: a run with all parts that draw, count or hold state.

    python tests/chaos/train.py ROOT EPOCHS [--marks FILE] [--in-background]

It resumes the newest checkpoint under ROOT if there is one, and writes ROOT/final.pt once it is complete. It writes its
current phase into the file of marks, which the harness maps into its memory to know the phase that it killed.
"""

from __future__ import annotations

import argparse
import math
import mmap
import os
import random
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import (
    EarlyStopping,
    ExponentialMovingAverage,
    GradientAccumulation,
    GradientClipping,
    JSONLinesLogger,
    LearningRateMonitor,
    LRSchedulerStepping,
    MixedPrecision,
    ModelCheckpoint,
    TensorBoardLogger,
)

STARTING, TRAINING, WINDOW, VALIDATING, WRITING, RENAMING, DONE = range(7)
"""What the first byte of the marks says; the next four are the batches that this process has trained. The harness may ask it,
by the sixth byte, to pause in a phase once it has trained as many batches as the seventh says."""
PAUSE = 0.5  # seconds
SAMPLES, BATCH = 96, 8


class Noisy(Dataset[Any]):
    """Samples that are drawn anew each time they are loaded, from every generator that a worker has."""

    def __init__(self) -> None:
        self.values = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = 0.1 * torch.randn(6) + 0.01 * random.random() + 0.01 * float(numpy.random.random())
        return self.values[index] + noise, self.values[index].sum(0, keepdim=True).sin()


class Model(LightningModule):
    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.epochs = epochs
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        inputs = inputs + 0.01 * random.random() + 0.01 * float(numpy.random.random())
        loss = (self.net(inputs) - targets).pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        self.log("val_loss", (self.net(inputs) - targets).pow(2).mean())
        # Improves until the run is nearly over, so that early stopping has to remember how long it has waited.
        self.log("stagnating", -float(min(self.trainer.current_epoch, self.epochs - 3)))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.003)
        total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Watched:
    """A file that marks the moment when half of a checkpoint is in it."""

    def __init__(self, file: Any, marks: Marks) -> None:
        self.file, self.marks, self.parts = file, marks, 0

    def write(self, part: Any) -> Any:
        self.parts += 1
        if self.parts == 20:
            self.file.flush()
            self.marks.mark(WRITING)
        return self.file.write(part)

    def flush(self) -> None:
        self.file.flush()


class Marks(Callback):
    """Writes the current phase of the process into the file of marks."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 8)
        self.batches = 0
        self.mark(STARTING)
        save, replace = torch.save, os.replace

        def marking_save(content: Any, file: Any) -> None:
            self.before = self.memory[0]
            save(content, Watched(file, self))  # type: ignore[arg-type]
            self.mark(RENAMING)

        def marking_replace(*args: Any) -> None:
            replace(*args)
            if self.memory[0] == RENAMING:
                self.mark(self.before)

        torch.save, os.replace = marking_save, marking_replace  # type: ignore[assignment]

    def mark(self, phase: int) -> None:
        self.memory[0] = phase
        if self.memory[5] == phase and self.batches >= self.memory[6]:
            time.sleep(PAUSE)

    def on_train_start(self, trainer: Trainer, event: Any) -> None:
        self.mark(TRAINING)

    def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
        self.mark(WINDOW if trainer.window_open else TRAINING)

    def on_train_batch_end(self, trainer: Trainer, event: Any) -> None:
        self.batches += 1
        self.memory[1:5] = self.batches.to_bytes(4, "little")
        self.mark(WINDOW if trainer.window_open else TRAINING)

    def on_validation_start(self, trainer: Trainer, event: Any) -> None:
        if trainer.training or trainer.stage == "fit":
            self.mark(VALIDATING)

    def on_validation_end(self, trainer: Trainer, event: Any) -> None:
        self.mark(TRAINING)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("epochs", type=int)
    parser.add_argument("--marks")
    parser.add_argument("--in-background", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "This DataLoader will create")  # on a machine with one core
    averages = ExponentialMovingAverage(0.9)
    logger, board = JSONLinesLogger(log_every_n_steps=1), TensorBoardLogger(log_every_n_steps=1)
    trainer = Trainer(
        callbacks=[
            *([Marks(arguments.marks)] if arguments.marks else []),
            GradientAccumulation(3),
            MixedPrecision("fp16"),
            GradientClipping(1.0),
            LRSchedulerStepping(),
            averages,
            EarlyStopping("stagnating", patience=4),
            LearningRateMonitor(),
            logger,
            board,
            ModelCheckpoint(every_n_steps=2, monitor="val_loss", in_background=arguments.in_background),
        ],
        default_callbacks=False,
        device="cpu",
        max_epochs=arguments.epochs,
        val_check_interval=4,
        default_root_dir=arguments.root,
        seed=11,
    )
    train = DataLoader(Noisy(), BATCH, shuffle=True, num_workers=2, multiprocessing_context="fork")
    validation = DataLoader(Noisy(), BATCH * 4)
    trainer.fit(Model(arguments.epochs), train, validation, ckpt_path="last")
    assert logger.run_path is not None
    final = {
        "state_dict": trainer.module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "averages": averages.averages,
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "draws": [torch.rand(3), random.random(), float(numpy.random.random())],
        "reason": trainer.stop_reason,
        "steps": trainer.global_step,
        "log": str(logger.run_path),
        "board": str(board.run_dir),
    }
    assert math.isfinite(float(trainer.callback_metrics["loss"]))
    torch.save(final, arguments.root / "final.tmp")
    os.replace(arguments.root / "final.tmp", arguments.root / "final.pt")


if __name__ == "__main__":
    main()
