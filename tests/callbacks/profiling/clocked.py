"""Modules and loaders that move a clock by exact amounts, so that every measured time is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from eventtrain import LightningModule, Trainer
from eventtrain.callbacks import Profiler
from eventtrain.callbacks.profiling.time_tables import UnitTimes
from tests.kit import train


class Clock:
    """Stands still unless something spends time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


class Loader:
    """Gives batches of ones, and takes time for each."""

    def __init__(self, clock: Clock, batches: int, seconds: float | Callable[[int], float] = 0.0, opening: float = 0.0) -> None:
        self.clock = clock
        self.batches = batches
        self.seconds = seconds
        self.opening = opening

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        self.clock.spend(self.opening)
        return self._read()

    def _read(self) -> Iterator[Tensor]:
        for index in range(self.batches):
            self.clock.spend(self.seconds(index) if callable(self.seconds) else self.seconds)
            yield torch.ones(2, 4)


class Slow(nn.Module):
    """A layer that does nothing but spend time."""

    def __init__(self, spend: Callable[[float], None], seconds: float) -> None:
        super().__init__()
        self.spend = spend
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        self.spend(self.seconds)
        return x


class SlowSGD(torch.optim.SGD):
    """Spends time in each step."""

    def __init__(self, parameters: Any, clock: Clock, seconds: float) -> None:
        super().__init__(parameters, lr=0.01)
        self.clock = clock
        self.seconds = seconds

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.clock.spend(self.seconds)
        return loss


class Model(LightningModule):
    """Spends a given time in each part of a step.

    Args:
        clock: The clock that is moved.
        **seconds: The time of each part, such as ``forward=2``. A part takes no time if it is not named.
    """

    def __init__(self, clock: Clock, **seconds: float) -> None:
        super().__init__()
        self.clock = clock
        self.seconds = seconds
        self.first: Any = nn.Linear(4, 4)
        self.net: Any = nn.Sequential(Slow(clock.spend, seconds.get("inner", 0.0)), nn.Linear(4, 1))

    def spend(self, part: str) -> None:
        self.clock.spend(self.seconds.get(part, 0.0))

    def forward(self, batch: Tensor) -> Tensor:
        output: Tensor = self.net(self.first(batch))
        return output

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.spend("forward")
        return self.forward(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.spend("validation")
        self.log("val_loss", self.forward(batch).mean())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.spend("test")

    def predict_step(self, batch: Tensor, batch_idx: int) -> None:
        self.spend("predict")

    def transfer_batch_to_device(self, batch: Tensor, device: Any, dataloader_idx: int) -> Tensor:
        self.spend("transfer")
        return batch

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.spend("backward")
        torch.autograd.backward(loss)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.spend("zero_grad")
        optimizer.zero_grad()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        self.spend("clipping")
        self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.spend("scheduler")
        scheduler.step()

    def configure_optimizers(self) -> Any:
        return SlowSGD(self.parameters(), self.clock, self.seconds.get("update", 0.0))


class Scheduled(Model):
    """The same with a scheduler."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def profiled(clock: Clock, **options: Any) -> Profiler:
    """Return a profiler that reads a clock and prints nothing."""
    return Profiler(**{"clock": clock, "print_summary": False, **options})


def fitted(profiler: Any, model: LightningModule, loader: Any, *callbacks: Any, val: Any = None, **options: Any) -> Trainer:
    """Fit a module with a profiler, which is attached first, and return the trainer."""
    return train(model, loader, profiler, *callbacks, val=val, **options)


def means(table: UnitTimes) -> dict[str, float]:
    """Return the seconds per unit of each row that took any."""
    return {label.name: table.mean(label) for label, row in table.rows.items() if row.total}


def observed_signals(trainer: Trainer) -> list[str]:
    """Return the names of the signals that an observer sees."""
    return [signal.name for signal in trainer.signals if signal._observers]
