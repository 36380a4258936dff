"""The work that every contestant does: three settings, each a model, its data and what is done per step.

What is measured is the time between the moments at which the data hand out two batches, so that no framework's start
and end counts, and nothing of the measurement is inside of a framework.
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
    """What a contestant is to do.

    Attributes:
        name: ``"bare"``, ``"standard"`` or ``"transformer"``.
        batches: Batches per repetition that are measured.
        warm_up: Batches before the clock starts: the first ones grow caches, allocate and specialise the bytecode.
        accumulate: Batches per update.
        extras: Whether norm clipping, OneCycleLR per update, loss and rate to TensorBoard every
            50 updates, a progress bar and ``self.log`` of the loss come on top.
        monitors: Whether every monitor is attached besides, for those who have any.
    """

    name: str
    batches: int
    warm_up: int = 40
    accumulate: int = 1
    extras: bool = False
    monitors: bool = False

    @property
    def total_batches(self) -> int:
        """Batches of a run, those that warm up included, and one more, whose handing out stops the clock."""
        return self.warm_up + self.batches + self.accumulate

    @property
    def total_steps(self) -> int:
        """Updates of a run."""
        return self.total_batches // self.accumulate


SETTINGS = {
    "bare": Setting("bare", 400),
    "standard": Setting("standard", 400, accumulate=4, extras=True),
    # Begins once the monitors that look at a run's beginning alone are through, and spans many of the Profiler's samples.
    "monitored": Setting("monitored", 1600, warm_up=200, accumulate=4, extras=True, monitors=True),
    "transformer": Setting("transformer", 10, warm_up=2),
}
CLIP = 0.25
"""Below the norms that come up, so that clipping is work and shows in the parameters."""
MAX_LR = 0.01
LOG_EVERY = 50


class Transformer(nn.Module):
    """A decoder-only character transformer of four layers: about 20 ms a step on one core."""

    def __init__(self, characters: int = 96, size: int = 96, heads: int = 4, layers: int = 4, context: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, size)
        self.position = nn.Parameter(torch.randn(context, size) * 0.05)
        block = nn.TransformerEncoderLayer(size, heads, 4 * size, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(size, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits ``(batch, context, characters)`` of characters ``(batch, context)``."""
        logits: Tensor = self.head(self.blocks(self.embedding(characters) + self.position, mask=self.mask, is_causal=True))
        return logits


def make_model(setting: Setting) -> nn.Module:
    """The setting's network, with the same weights at each call."""
    torch.manual_seed(0)
    if setting.name == "transformer":
        return Transformer()
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))


def make_loss(setting: Setting) -> Any:
    """What compares predictions with targets."""
    if setting.name == "transformer":
        return lambda logits, target: F.cross_entropy(logits.flatten(0, 1), target.flatten())
    return F.mse_loss


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """SGD, the cheapest there is: whatever a trainer adds weighs most beside it."""
    return torch.optim.SGD(model.parameters(), lr=MAX_LR)


def make_scheduler(setting: Setting, optimizer: Any) -> torch.optim.lr_scheduler.OneCycleLR:
    """One cycle over the run's updates, and a few to spare for those who step once more."""
    # Without its cycle of momenta, which would give the optimizer one.
    steps = setting.total_steps + 2
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=MAX_LR, total_steps=steps, cycle_momentum=False)


class Batches(torch.utils.data.Dataset[Any]):
    """A run's batches ``(inputs, targets)``, which looks at the clock as it hands them out.

    It is a loader (``len``, ``iter``) for contestants that take any, and a map-style data set whose items are whole
    batches for those that want a ``DataLoader``.

    Attributes:
        seconds: What the measured batches took.
    """

    def __init__(self, setting: Setting) -> None:
        generator = torch.Generator().manual_seed(1)
        few = 32  # different ones; a run goes through them again and again
        if setting.name == "transformer":
            drawn = torch.randint(96, (few, 8, 65), generator=generator)
            self._batches = [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in drawn]
        else:
            x, y = torch.randn(few, 16, 16, generator=generator), torch.randn(few, 16, 1, generator=generator)
            self._batches = list(zip(x, y, strict=True))
        # Materialised, so that handing one out is an index and no arithmetic.
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
    """All parameters in one vector, for comparing what contestants ended with."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
