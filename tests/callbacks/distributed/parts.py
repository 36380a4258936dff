"""A model, data and a quiet trainer, for the scripts that the tests start in several processes."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping
from eventtrain.callbacks.distributed.distributed_data_parallel import DistributedDataParallel

SEED = 7
TIMEOUT = 60.0


def data(samples: int = 23) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(samples, 3, generator=generator), torch.randn(samples, 1, generator=generator))


def loader(samples: int = 23, batch_size: int | None = 2, **options: Any) -> DataLoader[Any]:
    return DataLoader(data(samples), batch_size, **{"shuffle": True, **options})


def net() -> nn.Sequential:
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))


class Model(LightningModule):
    """A module with dropout, batch norm and a schedule."""

    def __init__(self, steps: int = 50) -> None:
        super().__init__()
        self.net, self.steps = net(), steps

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Weighted(LightningModule):
    """A module whose batches have a weight, their third part, by which their mean loss counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.net = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, weight = batch
        return {"loss": F.mse_loss(self.net(x), y), "weight": weight}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OwnSteps(LightningModule):
    """A module that steps by itself in some batches, and returns a loss in some.

    Args:
        steps: The batches in which it steps.
        losses: The batches in which it returns a loss.
    """

    def __init__(self, steps: Collection[int], losses: Collection[int]) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)
        self.steps, self.losses = steps, losses

    def loss(self, batch: Any) -> Any:
        return self.last(self.first(batch)).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx in self.steps:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.loss(batch).backward()
            optimizer.step()
        return self.loss(batch) if batch_idx in self.losses else None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


OWN_STEPS: list[tuple[Collection[int], Collection[int], int]] = [
    (range(4), (), 1),
    (range(4), range(4), 1),
    ((1, 2), (0, 3), 1),
    (range(4), (), 2),
    (range(4), range(4), 2),
]
"""The batches of :class:`OwnSteps` that step, and that return a loss, and the size of a window."""


def train_own_steps(callback: Callback) -> list[tuple[Any, nn.Module]]:
    """Train each of :data:`OWN_STEPS` in this process; return the modules, and those that one process trained by hand."""
    xs = data(32).tensors[0].reshape(4, 2, 4, 3)  # by batch and rank
    results: list[tuple[Any, nn.Module]] = []
    for steps, losses, size in OWN_STEPS:
        module, by_hand = OwnSteps(steps, losses), OwnSteps(steps, losses)
        trainer = Trainer(max_epochs=1, device="cpu", callbacks=[callback, GradientAccumulation(size)], default_callbacks=False)
        trainer.fit(module, list(xs[:, int(os.environ["RANK"])]))
        optimizer = by_hand.configure_optimizers()
        for index, both in enumerate(xs):
            if index in steps:
                optimizer.zero_grad()
                (sum(map(by_hand.loss, both)) / 2).backward()
                optimizer.step()
            if index % size == 0 and index in losses:
                optimizer.zero_grad()
            if index in losses:
                (sum(map(by_hand.loss, both)) / 2 / size).backward()
                if index % size == size - 1:
                    optimizer.step()
        results.append((module, by_hand))
    return results


def weighted_batches() -> list[Any]:
    """Return sixteen batches of one to seven samples. The weight of a batch is the number of its samples."""
    xs, ys = data(100).tensors
    sizes = [1 + (5 * index) % 7 for index in range(16)]
    starts = [sum(sizes[:index]) for index in range(16)]
    return [(xs[at : at + size], ys[at : at + size], float(size)) for at, size in zip(starts, sizes, strict=True)]


class Counting(DistributedDataParallel):
    """A callback that counts all-reduces: the wrapper gives each of its buckets to a communication hook."""

    def __init__(self, **options: Any) -> None:
        super().__init__(timeout=TIMEOUT, **options)
        self.reduced = 0

    def wrap(self, module: nn.Module) -> Any:
        wrapper = super().wrap(module)
        wrapper.register_comm_hook(None, lambda state, bucket: self.count(bucket))
        return wrapper

    def count(self, bucket: Any) -> Any:
        self.reduced += bucket.is_last()
        group = torch.distributed.group.WORLD
        assert group is not None
        return allreduce_hook(group, bucket)


def new_trainer(*callbacks: Any, **options: Any) -> Trainer:
    torch.manual_seed(SEED)
    if not any(isinstance(each, DistributedDataParallel) for each in callbacks):
        callbacks = (DistributedDataParallel(timeout=TIMEOUT), *callbacks)
    options = {"max_epochs": 2, "device": "cpu", "num_sanity_val_steps": 0, **options}
    return Trainer(callbacks=[*callbacks, LRSchedulerStepping()], default_callbacks=False, **options)


def resumable(*callbacks: Any) -> tuple[Trainer, DataLoader[Any]]:
    """Return a trainer for two epochs of five batches, in windows of three, and the loader."""
    return new_trainer(GradientAccumulation(3), GradientClipping(0.5), *callbacks), loader(20)


def state(module: nn.Module, optimizers: Any = ()) -> dict[str, Any]:
    """Return a copy of the weights, buffers and optimizer states."""
    return copy.deepcopy({"module": module.state_dict(), "optimizers": [each.state_dict() for each in optimizers]})
