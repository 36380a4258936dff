"""The helpers of the loggers' tests: runs that save a checkpoint after each epoch and may crash, and readers of event files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor, nn

from eventtrain import LightningModule, Trainer
from eventtrain.callbacks import LRSchedulerStepping, TensorBoardLogger
from tests.kit import On, new_trainer

BATCHES = [torch.full((size, 2), float(i + 1)) for i, size in enumerate((4, 4, 4, 2))]
EVERYTHING = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
Histogram = tuple[float, float, int, Any]


class Crash(RuntimeError):
    pass


def run(
    root: Path,
    module: LightningModule,
    data: list[Tensor],
    *callbacks: Any,
    fails_at: int | None = None,
    saves: bool = True,
    ckpt_path: Any = None,
    **options: Any,
) -> Trainer:
    """Train two epochs, each of which leaves a checkpoint ``epoch_<n>.ckpt`` in the root.

    Args:
        root: The run's directory.
        module: The module.
        data: The training batches. The first one is the validation batch.
        *callbacks: The callbacks to attach.
        fails_at: The update after which the run crashes; None if it does not.
        saves: Whether to save the checkpoints.
        ckpt_path: A checkpoint to resume.
        **options: For the trainer.
    """

    def fail(trainer: Trainer, event: Any) -> None:
        if event.global_step == fails_at:
            raise Crash("at the worst moment")

    def save(trainer: Trainer, event: Any) -> None:
        if event.epoch_end and saves and not trainer.fast_dev_run:
            trainer.save_checkpoint(root / f"epoch_{trainer.current_epoch}.ckpt")

    actions = On(after_update=fail, take_checkpoint=save)
    trainer = new_trainer(*callbacks, actions, default_root_dir=root, **{"max_epochs": 2, **options})
    if fails_at is None:
        trainer.fit(module, data, data[:1], ckpt_path=ckpt_path)
    else:
        with pytest.raises(Crash):
            trainer.fit(module, data, data[:1], ckpt_path=ckpt_path)
    return trainer


# ------------------------------------------------------------------ TensorBoard


class Model(LightningModule):
    """Logs a value of each kind, with one optimizer or several.

    Attributes:
        losses: The losses of all batches.
    """

    def __init__(self, optimizers: int = 1, rate: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.rate = rate
        self.layers = nn.ModuleList(nn.Linear(2, 1) for _ in range(optimizers))
        self.automatic_optimization = optimizers == 1
        self.losses: list[float] = []

    def forward(self, batch: Tensor) -> Tensor:
        return torch.cat([layer(batch) for layer in self.layers])

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = torch.stack([layer(batch).pow(2).mean() for layer in self.layers]).sum()
        self.losses.append(float(loss.detach()))
        self.log("loss", loss)
        self.log("size", float(len(batch)), on_step=False, on_epoch=True, reduce_fx="sum")
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", batch.mean())

    def configure_optimizers(self) -> Any:
        if not self.automatic_optimization:
            return [torch.optim.SGD(layer.parameters(), lr=self.rate / (i + 1)) for i, layer in enumerate(self.layers)]
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Drawn(Model):
    """Shows any trace of tracing: it has a frozen layer in evaluation mode and a moving average, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.frozen = nn.BatchNorm1d(2).eval().requires_grad_(False)
        self.dropout = nn.Dropout()
        self.example_input_array = torch.rand(3, 2)
        self.training_modes: dict[str, bool] = {}

    def forward(self, batch: Tensor) -> Tensor:
        random.random()
        torch.rand(1)
        output: Tensor = self.dropout(self.layers[0](self.norm(batch)))
        return output

    def on_train_start(self) -> None:
        self.training_modes = {name: part.training for name, part in self.named_modules()}


def fit(
    root: Path, *callbacks: Any, model: Model | None = None, logger: dict[str, Any] | None = None, **options: Any
) -> tuple[TensorBoardLogger, Model, Trainer]:
    """Train with a TensorBoardLogger.

    Args:
        root: The run's directory.
        *callbacks: More callbacks.
        model: The module; None for a new one.
        logger: Arguments of the logger. It writes every step if they do not say otherwise.
        **options: See :func:`run`.
    """
    board = TensorBoardLogger(**{"log_every_n_steps": 1, **(logger or {})})
    model = model or Model()
    trainer = run(root, model, BATCHES, board, *callbacks, LRSchedulerStepping(), **options)
    return board, model, trainer


def read(logger: TensorBoardLogger) -> Any:
    # TensorBoard reads the files of a directory in the order of their names.
    return EventAccumulator(str(logger.run_dir), size_guidance=EVERYTHING).Reload()


def points(logger: TensorBoardLogger, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(logger).Scalars(tag)]


def texts(logger: TensorBoardLogger, tag: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in read(logger).Tensors(f"{tag}/text_summary")]


def histograms(logger: TensorBoardLogger, tag: str) -> dict[int, Histogram]:
    values = {event.step: event.histogram_value for event in read(logger).Histograms(tag)}
    return {step: (value.min, value.max, int(value.num), value.sum) for step, value in values.items()}


def summary(values: Tensor) -> Histogram:
    doubles = values.double()
    return float(doubles.min()), float(doubles.max()), doubles.numel(), pytest.approx(float(doubles.sum()))


def single(value: float) -> float:
    return float(torch.tensor(value))  # event files hold float32


def numbered(values: list[float]) -> list[tuple[int, float]]:
    return [(step, single(value)) for step, value in enumerate(values, 1)]
