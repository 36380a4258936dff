"""The work that every contestant does: four settings, each with a model, its data and the work of a step.

The clock starts as the data hand out one batch and stops as they hand out another. So the time that a framework takes to start
and to end does not count, and no framework runs code of the measurement.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Setting:
    """The task of a contestant.

    Attributes:
        name: A key of :data:`SETTINGS`, or another name in tests and other benchmarks.
        batches: The number of measured batches in a repetition.
        warm_up: The number of batches before the clock starts: they grow caches, allocate, and specialise the bytecode.
        accumulate: The number of batches per update.
        extras: Whether to add clipping by norm, OneCycleLR per update, loss and rate in TensorBoard every 50 updates, a
            progress bar, and ``self.log`` of the loss.
        monitors: Whether to attach every monitor too, if a contestant has any.
    """

    name: str
    batches: int
    warm_up: int = 40
    accumulate: int = 1
    extras: bool = False
    monitors: bool = False

    @property
    def total_batches(self) -> int:
        """Return the number of batches of a run: the warm-up, the measured ones, and one more window, which stops the clock."""
        return self.warm_up + self.batches + self.accumulate

    @property
    def total_steps(self) -> int:
        """Return the number of updates of a run."""
        return self.total_batches // self.accumulate


SETTINGS = {
    "bare": Setting("bare", 400),
    "standard": Setting("standard", 400, accumulate=4, extras=True),
    # It begins after the monitors that look only at the start of a run, and spans many samples of the Profiler.
    "monitored": Setting("monitored", 1600, warm_up=200, accumulate=4, extras=True, monitors=True),
    "transformer": Setting("transformer", 10, warm_up=2),
}
CLIP = 0.25
"""A threshold below the norms of the gradients, so that clipping does work and changes the parameters."""
MAX_LR = 0.01
LOG_EVERY = 50


class Transformer(nn.Module):
    """A decoder-only character transformer of four layers, which takes about 20 ms for a step on one core."""

    def __init__(self, characters: int = 96, size: int = 96, heads: int = 4, layers: int = 4, context: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, size)
        self.position = nn.Parameter(torch.randn(context, size) * 0.05)
        block = nn.TransformerEncoderLayer(size, heads, 4 * size, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(size, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, characters: Tensor) -> Tensor:
        """Return logits ``(batch, context, characters)`` of characters ``(batch, context)``."""
        logits: Tensor = self.head(self.blocks(self.embedding(characters) + self.position, mask=self.mask, is_causal=True))
        return logits


def make_model(setting: Setting) -> nn.Module:
    """Return the network of a setting, with the same weights at each call."""
    torch.manual_seed(0)
    if setting.name == "transformer":
        return Transformer()
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))


def make_loss(setting: Setting) -> Any:
    """Return the function that compares predictions with targets."""
    if setting.name == "transformer":
        return lambda logits, target: F.cross_entropy(logits.flatten(0, 1), target.flatten())
    return F.mse_loss


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD, the cheapest optimizer, so that the time which a trainer adds is easy to see."""
    return torch.optim.SGD(model.parameters(), lr=MAX_LR)


def make_scheduler(setting: Setting, optimizer: Any) -> torch.optim.lr_scheduler.OneCycleLR:
    """Return one cycle over the updates of a run, and a few more, because some contestants step the scheduler once more."""
    # Without the cycle of momenta, which would give the optimizer a momentum.
    steps = setting.total_steps + 2
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=MAX_LR, total_steps=steps, cycle_momentum=False)


class Batches(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The batches ``(inputs, targets)`` of a run, and the clock, which is read as they are handed out.

    It is a loader (``len``, ``iter``) for contestants that accept any loader, and a map-style data set whose items are whole
    batches if a contestant needs a ``DataLoader``.

    Attributes:
        seconds: The time of the measured batches.
    """

    def __init__(self, setting: Setting) -> None:
        generator = torch.Generator().manual_seed(1)
        few = 32  # different batches, which a run repeats
        if setting.name == "transformer":
            drawn = torch.randint(96, (few, 8, 65), generator=generator)
            self._batches = [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in drawn]
        else:
            x, y = torch.randn(few, 16, 16, generator=generator), torch.randn(few, 16, 1, generator=generator)
            self._batches = list(zip(x, y, strict=True))
        # A list with repetitions, so that handing out a batch needs no arithmetic.
        self._batches = [self._batches[i % few] for i in range(setting.total_batches)]
        self._first, self._last = setting.warm_up, setting.warm_up + setting.batches
        self._began = 0.0
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.__getitem__, range(len(self._batches)))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self._first:
            self._began = time.perf_counter()
        elif index == self._last:
            self.seconds = time.perf_counter() - self._began
        return self._batches[index]


def parameters(model: nn.Module) -> Tensor:
    """Return all parameters in one vector, to compare the results of contestants."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
