"""The helpers that tests share: small modules, trainers without surprises, callbacks made of functions, fake processes.

The probe: one parameter ``w = 0``, ``loss = w * x``, batches ``x = 1, 2, 3, ...``, plain ``SGD(lr=1)``. The gradient of a
batch is ``x``, so the gradient of each update shows exactly which batches were accumulated, scaled or clipped:

>>> module = Probe()
>>> trainer = train(module, 5, GradientAccumulation(2))
>>> module.updates
[1.5, 3.5, 5.0]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from eventtrain import Callback, LightningModule, Trainer
from eventtrain.distributed import Reduction, SingleProcess
from eventtrain.events import MetricsLogged
from eventtrain.paths import AnyPath

# ------------------------------------------------------------------ paths


def local(path: AnyPath) -> Path:
    """Return a path that has to be a local one."""
    assert isinstance(path, Path)
    return path


# ------------------------------------------------------------------ batches


def batches(xs: int | Iterable[float]) -> list[Tensor]:
    """Return scalar batches: 1, 2, ..., n for a whole number n, else one for each x."""
    return [torch.tensor(float(x)) for x in (range(1, xs + 1) if isinstance(xs, int) else xs)]


def rows(xs: int | Iterable[float], *, size: int = 2, width: int = 1) -> list[Tensor]:
    """Return batches of ``size`` equal samples of ``width`` numbers: 1, 2, ..., n for a whole number n, else one for each x."""
    return [x.expand(size, width).clone() for x in batches(xs)]


class NoLength:
    """A loader without a length.

    Args:
        batches: The batches of each pass.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


# ------------------------------------------------------------------ modules


class Probe(LightningModule):
    """The probe, optimized automatically.

    Args:
        width: The number of elements of ``w``; each has the gradient ``x``.
        lr: The learning rate.
        configure: Takes the SGD and returns the result of ``configure_optimizers``. The SGD is watched either way.
        nothing_for: The xs for which ``training_step`` returns None.
        automatic: Whether to optimize automatically.

    Attributes:
        seen: The x of each ``training_step``, in order.
        updates: The gradient of each update, as a hook of torch's optimizer reads it: a number if ``w`` has one
            element, else a list. Independent of the events.
        rates: The learning rate of each update.
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
        """Return ``w * x``, summed over the elements."""
        return (self.w * x).sum()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.seen.append(batch.item())
        return None if batch.item() in self.nothing_for else self.loss(batch)

    def configure_optimizers(self) -> Any:
        self.sgd = self.watch(SGD([self.w], lr=self.lr))
        return self.sgd if self.configure is None else self.configure(self.sgd)

    def watch(self, optimizer: Optimizer, parameter: Tensor | None = None, into: list[Any] | None = None) -> Optimizer:
        """Record the gradient of each real step of an optimizer.

        Args:
            optimizer: The optimizer.
            parameter: The parameter whose gradient is recorded; ``w`` if None.
            into: The list that takes the gradients; ``updates`` if None.

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
        configure: Takes the SGD and returns the result of ``configure_optimizers``.
        **log: The options of ``self.log("loss", ...)`` in ``training_step``; nothing is logged there without any.
    """

    def __init__(
        self,
        inputs: int = 1,
        outputs: int = 1,
        *,
        lr: float = 0.1,
        automatic: bool = True,
        configure: Callable[[Optimizer], Any] | None = None,
        **log: Any,
    ) -> None:
        super().__init__()
        self.automatic_optimization = automatic
        self.layer = nn.Linear(inputs, outputs)
        self.lr = lr
        self.configure = configure
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

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        output: Tensor = self(batch)
        return output

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=self.lr)
        return optimizer if self.configure is None else self.configure(optimizer)


class ModuleOf(LightningModule):
    """A module made of functions: each takes the place of the method of its name, without ``self``.

    Without any, it trains one parameter ``w = 0`` by ``loss = w * x``, as :class:`Probe` does.

    Args:
        **methods: The functions, such as ``training_step=lambda batch, batch_idx: ...``; or other attributes.
    """

    def __init__(self, **methods: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        for name, method in methods.items():
            setattr(self, name, method)

    def loss(self, batch: Tensor) -> Tensor:
        """Return ``w * x``, summed over the batch."""
        return (self.w * batch).sum()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return SGD([self.w], lr=0.1)


def recording_plateau(monitor: str, seen: list[float]) -> Callable[[Optimizer], Any]:
    """Return a ``configure`` with a ``ReduceLROnPlateau`` that appends each value of its metric to a list."""

    class Plateau(ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: Any = None) -> None:  # type: ignore[override]
            seen.append(float(metrics))
            super().step(metrics)

    return lambda sgd: ([sgd], [{"scheduler": Plateau(sgd), "monitor": monitor}])


def gradient(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient, which has to exist."""
    assert parameter.grad is not None
    return parameter.grad


# ------------------------------------------------------------------ trainers


def train(module: LightningModule, xs: Any = 5, *callbacks: Any, val: Any = None, **arguments: Any) -> Trainer:
    """Fit a module on the CPU, with no callbacks but these.

    Args:
        module: The module.
        xs: The training batches, in the form that :func:`batches` takes; or a loader, which is used as it is.
        *callbacks: The callbacks, attached in this order.
        val: The same for validation; None for none.
        **arguments: The trainer's arguments. If neither ``max_epochs`` nor ``max_steps`` is among them, one epoch.

    Returns:
        The trainer, after the run.
    """
    trainer = new_trainer(*callbacks, **arguments)
    trainer.fit(module, _loader(xs), None if val is None else _loader(val))
    return trainer


def new_trainer(*callbacks: Any, **arguments: Any) -> Trainer:
    """Return the trainer that :func:`train` uses: on the CPU, without default callbacks and sanity check."""
    if not arguments.keys() & {"max_epochs", "max_steps"}:
        arguments["max_epochs"] = 1
    return Trainer(
        **{"device": "cpu", "default_callbacks": False, "num_sanity_val_steps": 0, "callbacks": callbacks, **arguments}
    )


def connections(trainer: Trainer) -> dict[str, list[Any]]:
    """Return the listeners of each signal that has some, in order; idle ones too."""
    return {signal.name: signal.attached() for signal in trainer.signals if signal.attached()}


def _loader(xs: Any) -> Any:
    numbers = isinstance(xs, int) or (isinstance(xs, (list, tuple, range)) and all(isinstance(x, (int, float)) for x in xs))
    return batches(xs) if numbers else xs


# ------------------------------------------------------------------ callbacks


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
    """A callback that records events.

    Args:
        *names: The names of the events' signals.

    Attributes:
        events: The payloads, in order.
        names: Their signals' names, in order.
    """

    def __init__(self, *names: str) -> None:
        self.events: list[Any] = []
        self.names: list[str] = []
        super().__init__(**{name: self._recorder(name) for name in names})

    def _recorder(self, name: str) -> Callable[[Any, Any], None]:
        def record(trainer: Any, event: Any) -> None:
            self.names.append(name)
            self.events.append(event)

        return record

    def count(self, name: str) -> int:
        """Return how often an event came."""
        return self.names.count(name)

    def of(self, name: str) -> list[Any]:
        """Return the payloads of one event."""
        return [event for its_name, event in zip(self.names, self.events, strict=True) if its_name == name]


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as plain numbers."""
    return {name: value.item() if isinstance(value, Tensor) else float(value) for name, value in metrics.items()}


class Logged(Callback):
    """Records the values that loggers get.

    Attributes:
        entries: ``(stage, scope, step, metrics)`` of each ``metrics_logged`` that has metrics, as plain numbers.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, int, dict[str, float]]] = []

    def on_metrics_logged(self, trainer: Trainer, event: MetricsLogged) -> None:
        if event.metrics:
            self.entries.append((event.stage, event.scope, event.step, numbers(event.metrics)))

    def of_scope(self, scope: str) -> list[dict[str, float]]:
        """Return the metrics of one scope: ``"step"``, ``"epoch"`` or ``"monitor"``."""
        return [metrics for _, its_scope, _, metrics in self.entries if its_scope == scope]

    def of(self, name: str) -> list[tuple[int, float]]:
        """Return the steps and values of one metric."""
        return [(step, metrics[name]) for _, _, step, metrics in self.entries if name in metrics]


# ------------------------------------------------------------------ processes


class FakeProcesses(SingleProcess):
    """One process's view of several, for ``trainer.processes``. The others answer as this one, but for these arguments.

    It has the methods that callbacks for several processes call too, so that it can take the place of their processes.

    Args:
        world_size: The number of processes.
        global_rank: The index of this one.
        elsewhere: Takes the number of a question, from 0, and returns whether its flag holds in another process.
        reduce: Takes this process's tensor and the reduction, and returns the result.
        broadcast: Takes this process's value, and returns the first one's.
        gather: Takes this process's value, and returns those of all, in their order.

    Attributes:
        flags: This process's flag of each question, in order.
        reduced: This process's tensor and the reduction of each call of ``reduce``, in order.
        errors: The error of each run, of which this process tells the others; None for none.
    """

    def __init__(
        self,
        world_size: int = 2,
        global_rank: int = 0,
        *,
        elsewhere: Callable[[int], bool] | None = None,
        reduce: Callable[[Tensor, Reduction], Tensor] | None = None,
        broadcast: Callable[[Any], Any] | None = None,
        gather: Callable[[Any], list[Any]] | None = None,
    ) -> None:
        self.world_size = world_size
        self.global_rank = self.local_rank = global_rank
        self.flags: list[bool] = []
        self.reduced: list[tuple[Tensor, Reduction]] = []
        self.errors: list[BaseException | None] = []
        self._elsewhere = elsewhere
        self._reduce = reduce
        self._broadcast = broadcast
        self._gather = gather

    def any(self, flag: bool) -> bool:
        self.flags.append(flag)
        return flag if self._elsewhere is None else self._elsewhere(len(self.flags) - 1) or flag

    def begin_any(self, flag: bool) -> Callable[[], bool]:
        answer = self.any(flag)
        return lambda: answer

    def reduce(self, value: Tensor, reduction: Reduction) -> Tensor:
        self.reduced.append((value, reduction))
        if self._reduce is not None:
            return self._reduce(value, reduction)
        return value * self.world_size if reduction == "sum" else value

    def broadcast(self, value: Any) -> Any:
        return value if self._broadcast is None else self._broadcast(value)

    def gather(self, value: Any) -> list[Any]:
        return self.gather_for_all(value) if self.global_rank == 0 else []

    def gather_for_all(self, value: Any) -> list[Any]:
        return [value] * self.world_size if self._gather is None else self._gather(value)

    def begin_run(self, place: Callable[[], str] = str) -> None:
        """Do nothing."""

    def end_run(self, error: BaseException | None = None) -> None:
        self.errors.append(error)

    def explain(self, error: BaseException) -> Exception | None:
        """Return None: no other process fails."""
        return None

    def overwrite(self, tensors: Iterable[Tensor]) -> None:
        """Keep the values, which the first process has too."""

    def average(self, tensors: list[Tensor], most: int = 2**23) -> None:
        """Keep the values, which the others have too."""
