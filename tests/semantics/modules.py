"""The modules, data and comparisons that tests of several rules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from eventtrain import LightningModule
from tests.kit import Probe
from tests.resuming import assert_same


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.01)


class Regression(LightningModule):
    """A small regression; its batches are ``(x, y)`` or ``(x, y, weight)``.

    Args:
        make_optimizer: Makes the optimizer of the parameters.
    """

    def __init__(self, make_optimizer: Callable[[Any], Optimizer] = adamw) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        self.make_optimizer = make_optimizer

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss(batch), "weight": batch[2]} if len(batch) > 2 else self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def regression_data(n: int, weights: Any = None) -> list[Any]:
    """Return ``n`` batches of four samples, with these weights if there are any."""
    generator = torch.Generator().manual_seed(2)
    data = [(torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(n)]
    return data if weights is None else [(*pair, weight) for pair, weight in zip(data, weights, strict=True)]


def assert_same_training(module: nn.Module, optimizer: Any, expected: nn.Module, expected_optimizer: Any) -> None:
    """Check that parameters and the optimizer's state are the same, bit for bit."""
    assert_same(dict(module.state_dict()), dict(expected.state_dict()), "module")
    assert_same(optimizer.state_dict(), expected_optimizer.state_dict(), "optimizer")


class Stepping(Probe):
    """Its ``optimizer_step`` is a function of ``(module, epoch, batch_idx, optimizer, closure)``."""

    def __init__(self, how: Any, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.how = how

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> Any:
        self.how(self, epoch, batch_idx, optimizer, optimizer_closure)


class Weighted(Probe):
    """Its batches are pairs of x and weight."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, weight = batch
        self.seen.append(x.item())
        return {"loss": self.loss(x), "weight": weight}


def weighted(*pairs: tuple[float, Any]) -> list[Any]:
    return [(torch.tensor(x), weight) for x, weight in pairs]


class Manual(Probe):
    """The probe, optimized by hand, as in the guide's minimal step."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(automatic=False, **arguments)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        opt = self.optimizers()
        opt.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        opt.step()


class Pair(LightningModule):
    """Two optimizers with a parameter each: the gradients are x and 10 x.

    Args:
        step: Called in each batch as ``step(module, batch, batch_idx)``.
        configure: Takes the two, and returns the result of ``configure_optimizers``.
    """

    def __init__(self, step: Callable[..., Any] = lambda module, batch, batch_idx: None, configure: Any = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.step, self.configure = step, configure

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a * x + 10 * self.b * x).sum()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        first, second = SGD([self.a], lr=1.0), SGD([self.b], lr=1.0)
        return [first, second] if self.configure is None else self.configure(first, second)
