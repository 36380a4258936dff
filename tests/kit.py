"""The helpers that tests share: small modules, a trainer without surprises, and callbacks made of functions.

The probe: one parameter ``w = 0``, ``loss = w * x``, batches ``x = 1, 2, 3, ...``, plain ``SGD(lr=1)``. The gradient of a
batch is ``x``, so the gradient of each update shows exactly what was accumulated, scaled or clipped:

>>> module = Probe()
>>> trainer = train(module, 5, GradientAccumulation(2))
>>> module.updates
[1.5, 3.5, 5.0]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from eventtrain import LightningModule, Trainer


def batches(xs: int | Iterable[float]) -> list[Tensor]:
    """A loader: batches 1, 2, ..., n for a number; else one batch for each x given."""
    return [torch.tensor(float(x)) for x in (range(1, xs + 1) if isinstance(xs, int) else xs)]


class Probe(LightningModule):
    """The probe, optimized automatically.

    Args:
        width: Elements of ``w``; each has the gradient ``x``.
        lr: The learning rate.
        configure: Called with the SGD; what it returns is what ``configure_optimizers`` returns. Watches
            the SGD either way.
        nothing_for: The xs for which ``training_step`` returns None.
        automatic: Whether to optimize automatically.

    Attributes:
        seen: The x of each ``training_step``, in order.
        updates: The gradient that each update used, as torch's own step hook found it: a number for a
            ``w`` of one element, else a list. Independent of the events.
        rates: The learning rate that each update used.
        sgd: The SGD of the last run.
    """

    def __init__(
        self,
        *,
        width: int = 1,
        lr: float = 1.0,
        configure: Callable[[Optimizer], Any] | None = None,
        nothing_for: Iterable[float] = (),
        automatic: bool = True,
    ) -> None:
        super().__init__()
        self.automatic_optimization = automatic
        self.w = nn.Parameter(torch.zeros(width))
        self.lr = lr
        self.configure = configure
        self.nothing_for = frozenset(nothing_for)
        self.seen: list[float] = []
        self.updates: list[Any] = []
        self.rates: list[float] = []

    def loss(self, x: Tensor) -> Tensor:
        """``w * x``; of several elements, the sum."""
        return (self.w * x).sum()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.seen.append(batch.item())
        return None if batch.item() in self.nothing_for else self.loss(batch)

    def configure_optimizers(self) -> Any:
        self.sgd = self.watch(SGD([self.w], lr=self.lr))
        return self.sgd if self.configure is None else self.configure(self.sgd)

    def watch(self, optimizer: Optimizer, parameter: Tensor | None = None, into: list[Any] | None = None) -> Optimizer:
        """Records the gradient of each real step of an optimizer.

        Args:
            optimizer: The optimizer.
            parameter: The parameter whose gradient is recorded; ``w`` where None.
            into: Where it is recorded; ``updates`` where None.

        Returns:
            The optimizer.
        """
        parameter = self.w if parameter is None else parameter
        into = self.updates if into is None else into

        def record(stepped: Optimizer, *_: Any) -> None:
            gradient = parameter.grad
            into.append(None if gradient is None else gradient.item() if gradient.numel() == 1 else gradient.tolist())
            self.rates.append(stepped.param_groups[0]["lr"])

        optimizer.register_step_post_hook(record)
        return optimizer


class Line(LightningModule):
    """One linear layer that learns to give zero: a module for tests that need any module.

    Args:
        inputs: The size of a sample.
        outputs: The size of the layer's output.
        lr: The learning rate of the SGD.
        automatic: Whether to optimize automatically.
        **log: The options of ``self.log("loss", ...)`` in ``training_step``; nothing is logged without any.
    """

    def __init__(self, inputs: int = 1, outputs: int = 1, *, lr: float = 0.1, automatic: bool = True, **log: Any) -> None:
        super().__init__()
        self.automatic_optimization = automatic
        self.layer = nn.Linear(inputs, outputs)
        self.lr = lr
        self.log_options = log

    def forward(self, batch: Tensor) -> Tensor:
        output: Tensor = self.layer(batch)
        return output

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self(batch).square().mean()
        if self.log_options:
            self.log("loss", loss, **self.log_options)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self(batch).square().mean())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=self.lr)


def train(module: LightningModule, xs: Any = 5, *callbacks: Any, val: Any = None, **arguments: Any) -> Trainer:
    """Fits a module on the CPU, with no callbacks but the given ones.

    Args:
        module: The module.
        xs: The training batches, in the form that :func:`batches` takes; or a loader, which is used as it is.
        *callbacks: What is attached, in this order.
        val: The same for validation; None for none.
        **arguments: For the trainer. One epoch where neither ``max_epochs`` nor ``max_steps`` is given.

    Returns:
        The trainer, after the run.
    """
    trainer = new_trainer(*callbacks, **arguments)
    trainer.fit(module, _loader(xs), None if val is None else _loader(val))
    return trainer


def new_trainer(*callbacks: Any, **arguments: Any) -> Trainer:
    """The trainer that :func:`train` uses."""
    if not arguments.keys() & {"max_epochs", "max_steps"}:
        arguments["max_epochs"] = 1
    return Trainer(
        **{"device": "cpu", "default_callbacks": False, "num_sanity_val_steps": 0, "callbacks": callbacks, **arguments}
    )


def _loader(xs: Any) -> Any:
    numbers = isinstance(xs, int) or (isinstance(xs, (list, tuple, range)) and all(isinstance(x, (int, float)) for x in xs))
    return batches(xs) if numbers else xs


class On:
    """A callback made of functions: ``On(train_batch_start=f)`` calls ``f(trainer, event)`` there."""

    def __init__(self, **functions: Callable[[Any, Any], Any]) -> None:
        for name, function in functions.items():
            setattr(self, f"on_{name}", _listener(function))


def _listener(function: Callable[[Any, Any], Any]) -> Callable[..., None]:
    def listener(trainer: Any, event: Any) -> None:
        function(trainer, event)

    return listener


class Recorder(On):
    """A callback that keeps the events it is given the names of.

    Attributes:
        events: The payloads, in order.
        names: Their signals' names, in order.
    """

    def __init__(self, *names: str) -> None:
        self.events: list[Any] = []
        self.names: list[str] = []
        super().__init__(**{name: self._keeper(name) for name in names})

    def _keeper(self, name: str) -> Callable[[Any, Any], None]:
        def keep(trainer: Any, event: Any) -> None:
            self.names.append(name)
            self.events.append(event)

        return keep

    def count(self, name: str) -> int:
        """How often an event came."""
        return self.names.count(name)

    def of(self, name: str) -> list[Any]:
        """The payloads of one event."""
        return [event for its_name, event in zip(self.names, self.events, strict=True) if its_name == name]
