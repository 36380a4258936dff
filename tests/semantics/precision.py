"""The modules, data and comparisons that tests of precision share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.functional import mse_loss
from torch.optim import SGD, AdamW, Optimizer

from eventtrain import LightningModule
from eventtrain.callbacks import MixedPrecision
from tests.kit import On, gradient, train
from tests.reference import backward

INF = float("inf")
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


def data(n: int, *, bad: tuple[int, ...] = ()) -> list[tuple[Tensor, Tensor]]:
    """Return the batches of a regression; those with the indices ``bad`` overflow in fp16 at any scale."""
    generator = torch.Generator().manual_seed(3)
    drawn = [(torch.randn(5, 4, generator=generator), torch.randn(5, 1, generator=generator)) for _ in range(n)]
    return [(x * 1e6 if i in bad else x, y) for i, (x, y) in enumerate(drawn)]


class Net(LightningModule):
    def __init__(self, make: Callable[[Any], Optimizer] = lambda parameters: AdamW(parameters, lr=0.05)) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        self.make = make

    def loss(self, batch: Any) -> Tensor:
        return mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def small_scaler(**changes: Any) -> GradScaler:
    """Return a scaler that grows after two clean updates, so that a short run sees it."""
    return GradScaler("cpu", **{"init_scale": 64.0, "growth_interval": 2, **changes})


def autocast(dtype: torch.dtype = torch.float16) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype)


class Scales(On):
    """Records the scale at the end of each batch, once every callback has seen it."""

    def __init__(self, scaler: GradScaler) -> None:
        self.values: list[float] = []
        super().__init__(safe_point=lambda trainer, event: self.values.append(scaler.get_scale()))


def assert_same(module: nn.Module, optimizer: Any, expected: nn.Module, expected_optimizer: Any) -> None:
    for (name, value), other in zip(module.state_dict().items(), expected.state_dict().values(), strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, other), name
    state, other_state = optimizer.state_dict()["state"], expected_optimizer.state_dict()["state"]
    assert state.keys() == other_state.keys()
    for index, values in other_state.items():
        for name, other in values.items():
            value = state[index][name]
            assert torch.equal(value, other) if isinstance(other, Tensor) else value == other, name


def by_hand(
    make: Callable[[Any], Optimizer],
    batches_: list[Any],
    *,
    accumulate: int = 1,
    clip: Callable[[Any], Any] | None = None,
    scaler: GradScaler | None = None,
) -> tuple[Net, Optimizer, GradScaler, list[float], int]:
    """Train by the loop of the AMP examples, with accumulation; a short window is normalised as rule B3 says.

    Returns:
        The module, its optimizer, the scaler, the scale after each batch, and the number of updates.
    """
    module = Net(make)
    optimizer = module.configure_optimizers()
    updates: list[None] = []
    optimizer.register_step_post_hook(lambda *_: updates.append(None))
    scaler = scaler or small_scaler()
    scales: list[float] = []
    skipped = held = 0
    for i, batch in enumerate(batches_):
        with autocast():
            loss = module.loss(batch)
        if held == 0:
            optimizer.zero_grad()
        backward(scaler.scale(loss / accumulate if accumulate > 1 else loss))
        held += 1
        if held == accumulate or i == len(batches_) - 1:
            scaler.unscale_(optimizer)
            if held != accumulate:
                for parameter in module.parameters():
                    gradient(parameter).mul_(accumulate / held)
            if clip is not None:
                clip(module.parameters())
            overflow = not all(bool(gradient(p).isfinite().all()) for p in module.parameters())
            scaler.step(optimizer)
            scaler.update()
            skipped += overflow
            held = 0
        scales.append(scaler.get_scale())
    windows = math.ceil(len(batches_) / accumulate)
    return module, optimizer, scaler, scales, windows - skipped


class Pair(LightningModule):
    """Two numbers with an optimizer each; the test writes the training step."""

    def __init__(self, step: Callable[[Any, Any, Any, Tensor, int], None]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.g = nn.Parameter(torch.zeros(()))
        self.d = nn.Parameter(torch.zeros(()))
        self.step = step
        self.g_updates: list[float] = []
        self.d_updates: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        g_optimizer, d_optimizer = self.optimizers()
        self.step(self, g_optimizer, d_optimizer, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        g, d = SGD([self.g], lr=1.0), SGD([self.d], lr=1.0)
        g.register_step_post_hook(lambda *_: self.g_updates.append(gradient(self.g).item()))
        d.register_step_post_hook(lambda *_: self.d_updates.append(gradient(self.d).item()))
        return g, d


def eager_scaler(**changes: Any) -> GradScaler:
    """Return a scaler whose scale doubles at every update, so that gradients unscaled by a wrong scale show."""
    return GradScaler("cpu", **{"init_scale": 8.0, "growth_interval": 1, **changes})


def run_pair(step: Any, xs: Any, scaler: GradScaler, *callbacks: Any) -> tuple[Pair, Any, list[float]]:
    module, scales = Pair(step), Scales(scaler)
    trainer = train(module, xs, MixedPrecision("fp16", scaler=scaler), scales, *callbacks)
    return module, trainer, scales.values
