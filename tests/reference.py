"""Hand-written PyTorch loops, which eventtrain has to equal bit for bit. Nothing here imports eventtrain.

Each loop takes a model, its optimizer and its data, trains in place, and returns the learning rate of each update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

Batches = Iterable[Any]


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def scale_gradients(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.mul_(factor)


def plain(model: nn.Module, optimizer: Optimizer, batches: Batches, epochs: int) -> list[float]:
    rates = []
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
    return rates


def accumulating(
    model: nn.Module, optimizer: Optimizer, batches: list[Any], epochs: int, window_of: Callable[[int], int]
) -> list[float]:
    rates = []
    for epoch in range(epochs):
        window = window_of(epoch)
        for start in range(0, len(batches), window):
            members = batches[start : start + window]
            optimizer.zero_grad()
            for batch in members:
                backward(loss_of(model, batch) / window)
            if len(members) < window:  # the mean over the batches that are there
                scale_gradients(model, window / len(members))
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
    return rates


def clipping(
    model: nn.Module, optimizer: Optimizer, batches: Batches, epochs: int, algorithm: str, threshold: float
) -> list[float]:
    clip = clip_grad_norm_ if algorithm == "norm" else clip_grad_value_
    rates = []
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            clip(model.parameters(), threshold)
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
    return rates


def scheduled(
    model: nn.Module, optimizer: Optimizer, batches: Batches, epochs: int, scheduler: Any, by_step: bool
) -> list[float]:
    rates = []
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
            if by_step:
                scheduler.step()
        if not by_step:
            scheduler.step()
    return rates


def bf16(model: nn.Module, optimizer: Optimizer, batches: Batches, epochs: int) -> list[float]:
    rates = []
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, batch)
            backward(loss)
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
    return rates


def fp16(
    model: nn.Module, optimizer: Optimizer, batches: list[Any], epochs: int, scaler: torch.amp.GradScaler, window: int
) -> None:
    for _ in range(epochs):
        for start in range(0, len(batches), window):
            members = batches[start : start + window]
            optimizer.zero_grad()
            for batch in members:
                with torch.autocast("cpu", dtype=torch.float16):
                    loss = loss_of(model, batch)
                backward(scaler.scale(loss / window))
            scaler.unscale_(optimizer)
            if len(members) < window:
                scale_gradients(model, window / len(members))
            scaler.step(optimizer)
            scaler.update()


def evaluate(model: nn.Module, optimizer: Optimizer, batch: Any) -> Any:
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    backward(loss)
    return loss


def closure_driven(model: nn.Module, optimizer: Optimizer, batches: Batches, epochs: int) -> list[float]:
    rates = []
    for _ in range(epochs):
        for batch in batches:
            optimizer.step(partial(evaluate, model, optimizer, batch))
            rates.append(optimizer.param_groups[0]["lr"])
    return rates


def gan(generator: nn.Module, critic: nn.Module, optimizers: list[Optimizer], batches: Batches, epochs: int) -> None:
    for_generator, for_critic = optimizers
    for _ in range(epochs):
        for real, _ in batches:
            fake = generator(torch.randn(len(real), 3))
            for_critic.zero_grad()
            backward(F.softplus(critic(fake.detach()) - critic(real).mean()).mean())
            for_critic.step()
            for_generator.zero_grad()
            backward(F.softplus(-critic(fake)).mean())
            for_generator.step()
