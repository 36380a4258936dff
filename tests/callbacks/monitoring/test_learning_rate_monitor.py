"""The logged rate is the one that the update used, under a name of its own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR
from torch.utils._python_dispatch import TorchDispatchMode

from eventtrain import LightningModule, Trainer
from eventtrain.callbacks import GradientAccumulation, LRSchedulerStepping, TensorBoardLogger
from eventtrain.callbacks.monitoring.learning_rate_monitor import LearningRateMonitor, numbered

BATCHES = list(torch.ones(6, 2, 2))
Logged = list[dict[str, Any]]


class Model(LightningModule):
    """Weights of ones whose gradients are ones: with plain SGD each update moves them by its rate."""

    def __init__(self, configure: Callable[[Model], Any], *, manual: bool = False) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(1))
        self.second = nn.Parameter(torch.ones(1))
        self.configure = configure
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.first + self.second).sum()

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def sgd(parameters: Any, lr: float = 0.5, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, **options)


def fit(model: LightningModule, monitor: LearningRateMonitor, *callbacks: Any, **options: Any) -> tuple[Logged, Trainer]:
    """What loggers are given at each update."""
    options = {"max_epochs": 1, **options}
    trainer = Trainer(device="cpu", default_callbacks=False, callbacks=[LRSchedulerStepping(), monitor, *callbacks], **options)
    logged: Logged = []

    def keep(trainer: Trainer, event: Any) -> None:
        if event.scope == "step":
            logged.append(dict(event.metrics))

    trainer.signals.metrics_logged.connect(keep)
    trainer.fit(model, BATCHES)
    return logged, trainer


class Moves:
    """Notes at each update how far it moved the first weight: the rate that it used."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.before = float(model.first.detach())
        self.rates: list[float] = []

    def on_after_update(self, trainer: Trainer, event: Any) -> None:
        now = float(self.model.first.detach())
        self.rates.append(self.before - now)
        self.before = now


# ------------------------------------------------------------------ the value


def one_cycle(model: Model) -> Any:
    optimizer = sgd(model.parameters(), momentum=0.0)
    total = model.trainer.estimated_stepping_batches
    scheduler = OneCycleLR(optimizer, max_lr=0.5, total_steps=total, cycle_momentum=False)
    return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def test_a_scheduler_steps_after_the_rate_was_used() -> None:
    model = Model(one_cycle)
    moves = Moves(model)
    logged, _ = fit(model, LearningRateMonitor(), moves)
    rates = [values["lr-SGD"] for values in logged]
    assert rates == pytest.approx(moves.rates, abs=1e-6)
    assert len(set(rates)) == 6, "each update used another"


def test_with_accumulation_there_is_one_value_per_update() -> None:
    model = Model(one_cycle)
    moves = Moves(model)
    logged, _ = fit(model, LearningRateMonitor(), GradientAccumulation(2), moves)
    assert [values["lr-SGD"] for values in logged] == pytest.approx(moves.rates, abs=1e-6)
    assert len(logged) == 3


def test_a_warm_up_in_the_optimizer_step_hook_is_seen() -> None:
    class WarmsUp(Model):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.125 * (self.trainer.global_step + 1)
            optimizer.step(closure=optimizer_closure)

    logged, _ = fit(WarmsUp(lambda model: sgd(model.parameters())), LearningRateMonitor())
    assert logged == [{"lr-SGD": 0.125 * step} for step in range(1, 7)]


class Vetoes:
    def on_before_optimizer_step(self, trainer: Trainer, event: Any) -> None:
        if trainer.batch_idx % 2:
            event.skip("every other")


def test_a_skipped_step_logs_nothing() -> None:
    def decaying(model: Model) -> Any:
        optimizer = sgd(model.parameters())
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.5), "interval": "step"}]

    logged, trainer = fit(Model(decaying), LearningRateMonitor(), Vetoes())
    assert logged == [{"lr-SGD": 0.5}, {"lr-SGD": 0.25}, {"lr-SGD": 0.125}]
    assert trainer.global_step == 3


def test_a_rate_that_is_a_tensor_is_kept_as_it_was_used() -> None:
    """Capturable optimizers have one, and schedulers change it in place."""

    class Doubles(Model):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.optimizers().param_groups[0]["lr"].mul_(2)

    rate = torch.tensor(0.125)
    logged, _ = fit(Doubles(lambda model: torch.optim.Adam(model.parameters(), lr=rate, foreach=False)), LearningRateMonitor())
    rates = [values["lr-Adam"] for values in logged]
    assert [float(rate) for rate in rates] == [0.125 * 2**i for i in range(6)]


def test_no_value_is_read_out_of_a_tensor() -> None:
    reads: list[str] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.name() == "aten::_local_scalar_dense":
                reads.append(func.name())
            return func(*args, **(kwargs or {}))

    monitor = LearningRateMonitor(momentum=True, weight_decay=True)
    with Reads():
        assert float(torch.ones(())) == 1.0
    assert len(reads) == 1, "it sees a read"
    reads.clear()
    model = Model(lambda model: torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1), foreach=False))
    trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False, callbacks=[monitor])
    handler = trainer.signals.after_optimizer_step.attached()[0]

    def watched_handler(sender: Trainer, event: Any) -> None:
        with Reads():
            handler(sender, event=event)

    trainer.signals.after_optimizer_step.disconnect(handler)
    trainer.signals.after_optimizer_step.connect(watched_handler)
    trainer.fit(model, BATCHES)
    assert reads == [] and isinstance(trainer.logged_metrics["lr-Adam"], Tensor)


# ------------------------------------------------------------------ names


def names_of(configure: Callable[[Model], Any], monitor: LearningRateMonitor | None = None) -> dict[str, Any]:
    logged, _ = fit(Model(configure), monitor or LearningRateMonitor())
    assert all(values.keys() == logged[0].keys() for values in logged)
    return logged[0]


def groups(*options: dict[str, Any]) -> Callable[[Model], Any]:
    return lambda model: sgd([{"params": [p], **each} for p, each in zip((model.first, model.second), options, strict=True)])


def test_groups_are_numbered() -> None:
    assert names_of(groups({"lr": 0.25}, {})) == {"lr-SGD/group_0": 0.25, "lr-SGD/group_1": 0.5}


def test_groups_have_their_own_names() -> None:
    configure = groups({"lr": 0.25, "name": "backbone"}, {})
    assert names_of(configure) == {"lr-SGD/backbone": 0.25, "lr-SGD/group_1": 0.5}


def test_groups_of_one_name_are_told_apart() -> None:
    configure = groups({"lr": 0.25, "name": "head"}, {"name": "head"})
    assert names_of(configure) == {"lr-SGD/head-0": 0.25, "lr-SGD/head-1": 0.5}


def test_one_group_needs_no_name() -> None:
    assert names_of(lambda model: sgd([{"params": [model.first], "name": "backbone"}])) == {"lr-SGD": 0.5}


def test_momentum_and_weight_decay_are_logged_where_they_are_asked_for() -> None:
    both = LearningRateMonitor(momentum=True, weight_decay=True)
    values = names_of(lambda model: sgd(model.parameters(), momentum=0.75, weight_decay=0.25), both)
    assert values == {"lr-SGD": 0.5, "lr-SGD-momentum": 0.75, "lr-SGD-weight_decay": 0.25}


def test_the_first_beta_is_momentum() -> None:
    values = names_of(lambda model: torch.optim.Adam(model.parameters(), 0.5, (0.75, 0.9)), LearningRateMonitor(momentum=True))
    assert values == {"lr-Adam": 0.5, "lr-Adam-momentum": 0.75}


def test_what_an_optimizer_does_not_have_is_left_out() -> None:
    class FindsItsOwnRate(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.param_groups[0]["lr"] = 0.5
            try:
                return super().step(closure)
            finally:
                self.param_groups[0]["lr"] = None

    def configure(model: Model) -> Any:
        optimizer = FindsItsOwnRate(model.parameters(), lr=0.5)
        optimizer.param_groups[0]["lr"] = None
        return optimizer

    assert names_of(configure, LearningRateMonitor(weight_decay=True)) == {"lr-FindsItsOwnRate-weight_decay": 0}
    model = Model(lambda model: torch.optim.Adagrad(model.parameters(), lr=0.5))
    logged, _ = fit(model, LearningRateMonitor(momentum=True))
    assert logged[0] == {"lr-Adagrad": 0.5}


def test_a_group_that_is_added_during_the_run_is_logged_from_then_on() -> None:
    class Unfreezes(Model):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                self.optimizers().add_param_group({"params": [self.second], "lr": 0.25, "name": "late"})

    logged, _ = fit(Unfreezes(lambda model: sgd([model.first])), LearningRateMonitor())
    assert logged[:3] == [{"lr-SGD": 0.5}] * 3
    assert logged[3:] == [{"lr-SGD/group_0": 0.5, "lr-SGD/late": 0.25}] * 3


def test_names_are_numbered_where_several_are_alike() -> None:
    assert numbered(["SGD", "Adam", "SGD"]) == ["SGD-0", "Adam", "SGD-1"]
    assert numbered([]) == []


# ------------------------------------------------------------------ manual optimization


class TwoOptimizers(Model):
    """The first optimizer steps in each batch, the second in every other, and both schedulers with them."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for index, (optimizer, scheduler) in enumerate(zip(self.optimizers(), self.lr_schedulers(), strict=True)):
            if batch_idx % (index + 1) == 0:
                optimizer.zero_grad()
                self.manual_backward((self.first + self.second).sum())
                optimizer.step()
                scheduler.step()


def two(model: Model, second: Any = torch.optim.SGD) -> Any:
    optimizers = [sgd([model.first]), second([model.second], lr=0.25)]
    return optimizers, [ExponentialLR(optimizer, 0.5) for optimizer in optimizers]


def test_each_of_several_optimizers_is_logged_where_it_steps() -> None:
    logged, _ = fit(TwoOptimizers(two, manual=True), LearningRateMonitor())
    assert [values["lr-SGD-0"] for values in logged] == [0.5 / 2**i for i in range(6)]
    assert [values.get("lr-SGD-1") for values in logged] == [0.25, None, 0.125, None, 0.0625, None]


def test_optimizers_of_different_classes_are_not_numbered() -> None:
    logged, _ = fit(TwoOptimizers(lambda model: two(model, torch.optim.Adam), manual=True), LearningRateMonitor())
    assert logged[0] == {"lr-SGD": 0.5, "lr-Adam": 0.25}


def test_a_step_on_the_wrapped_optimizer_logs_nothing() -> None:
    class Raw(Model):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward((self.first + self.second).sum())
            self.optimizers().optimizer.step()

    logged, trainer = fit(Raw(lambda model: sgd(model.parameters()), manual=True), LearningRateMonitor())
    assert trainer.global_step == 6 and logged == [{}] * 6


# ------------------------------------------------------------------ loggers, runs


def test_a_logger_writes_it_at_its_cadence(tmp_path: Any) -> None:
    model = Model(one_cycle)
    moves = Moves(model)
    logger = TensorBoardLogger(tmp_path, log_every_n_steps=2)
    fit(model, LearningRateMonitor(), logger, moves)
    events = EventAccumulator(str(logger.run_dir)).Reload().Scalars("lr-SGD")
    assert [event.step for event in events] == [2, 4, 6]
    assert [event.value for event in events] == pytest.approx(moves.rates[1::2], abs=1e-6)


def test_the_next_run_has_names_of_its_own() -> None:
    monitor = LearningRateMonitor()
    logged, trainer = fit(Model(groups({}, {})), monitor)
    assert logged[0].keys() == {"lr-SGD/group_0", "lr-SGD/group_1"}
    trainer.fit(Model(lambda model: sgd(model.parameters(), 0.25)), BATCHES)
    assert logged[-1] == {"lr-SGD": 0.25}


def test_the_optimizers_of_a_run_are_let_go() -> None:
    _, trainer = fit(Model(groups({}, {})), LearningRateMonitor())
    first = weakref.ref(trainer.optimizers[0])
    trainer.fit(Model(lambda model: sgd(model.parameters())), BATCHES)
    gc.collect()
    assert first() is None
