"""LearningRateMonitor logs the rate that the update used, under a distinct name."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR
from torch.utils._python_dispatch import TorchDispatchMode

from eventtrain import LightningModule, LightningOptimizer, Trainer
from eventtrain.callbacks import GradientAccumulation, LRSchedulerStepping, TensorBoardLogger
from eventtrain.callbacks.monitoring.learning_rate_monitor import LearningRateMonitor
from eventtrain.callbacks.monitoring.numbered import numbered
from tests.kit import On, Recorder, train

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

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return (self.first + self.second).sum()

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def sgd(parameters: Any, lr: float = 0.5, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, **options)


def fit(model: LightningModule, monitor: LearningRateMonitor, *callbacks: Any) -> tuple[Logged, Trainer]:
    """Train for an epoch; return the values that loggers get at each update, and the trainer."""
    recorder = Recorder("metrics_logged")
    trainer = train(model, BATCHES, LRSchedulerStepping(), monitor, *callbacks, recorder)
    return updates(recorder), trainer


def updates(recorder: Recorder) -> Logged:
    return [dict(event.metrics) for event in recorder.events if event.scope == "step"]


class Moves:
    """Record how far each update moved the first weight, which is the rate that it used."""

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


def test_the_rate_is_logged_before_the_scheduler_steps() -> None:
    model = Model(one_cycle)
    moves = Moves(model)
    logged, _ = fit(model, LearningRateMonitor(), moves)
    rates = [values["lr-SGD"] for values in logged]
    assert rates == pytest.approx(moves.rates, abs=1e-6)
    assert len(set(rates)) == 6, "each update used another rate"


def test_with_accumulation_there_is_one_value_per_update() -> None:
    model = Model(one_cycle)
    moves = Moves(model)
    logged, _ = fit(model, LearningRateMonitor(), GradientAccumulation(2), moves)
    assert [values["lr-SGD"] for values in logged] == pytest.approx(moves.rates, abs=1e-6)
    assert len(logged) == 3


def test_a_warm_up_in_the_optimizer_step_hook_is_logged() -> None:
    class WarmsUp(Model):
        def optimizer_step(
            self, epoch: int, batch_idx: int, optimizer: LightningOptimizer, optimizer_closure: Any = None
        ) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.125 * (self.trainer.global_step + 1)
            optimizer.step(closure=optimizer_closure)

    logged, _ = fit(WarmsUp(lambda model: sgd(model.parameters())), LearningRateMonitor())
    assert logged == [{"lr-SGD": 0.125 * step} for step in range(1, 7)]


def veto_every_other(trainer: Trainer, event: Any) -> None:
    if trainer.batch_idx % 2:
        event.skip("every other")


def test_a_skipped_step_logs_nothing() -> None:
    def decaying(model: Model) -> Any:
        optimizer = sgd(model.parameters())
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.5), "interval": "step"}]

    logged, trainer = fit(Model(decaying), LearningRateMonitor(), On(before_optimizer_step=veto_every_other))
    assert logged == [{"lr-SGD": 0.5}, {"lr-SGD": 0.25}, {"lr-SGD": 0.125}]
    assert trainer.global_step == 3


def test_a_rate_that_is_a_tensor_is_copied_before_it_changes() -> None:
    """An optimizer has such a rate if it is capturable, and schedulers change it in place."""

    class Doubles(Model):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.optimizers().param_groups[0]["lr"].mul_(2)

    rate = torch.tensor(0.125)
    logged, _ = fit(Doubles(lambda model: torch.optim.Adam(model.parameters(), lr=rate, foreach=False)), LearningRateMonitor())
    rates = [values["lr-Adam"] for values in logged]
    assert [float(rate) for rate in rates] == [0.125 * 2**i for i in range(6)]


def test_no_value_is_read_out_of_a_tensor() -> None:
    reads: list[str] = []

    class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.name() == "aten::_local_scalar_dense":
                reads.append(func.name())
            return func(*args, **(kwargs or {}))

    class Watched(LearningRateMonitor):
        def on_after_optimizer_step(self, trainer: Trainer, event: Any) -> None:
            with Reads():  # type: ignore[no-untyped-call]
                super().on_after_optimizer_step(trainer, event)

    with Reads():  # type: ignore[no-untyped-call]
        assert float(torch.ones(())) == 1.0
    assert len(reads) == 1, "it sees a read"
    reads.clear()
    model = Model(lambda model: torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1), foreach=False))
    trainer = train(model, BATCHES, Watched(momentum=True, weight_decay=True))
    assert reads == [] and isinstance(trainer.logged_metrics["lr-Adam"], Tensor)


# ------------------------------------------------------------------ names


def names_of(configure: Callable[[Model], Any], monitor: LearningRateMonitor | None = None) -> dict[str, Any]:
    logged, _ = fit(Model(configure), monitor or LearningRateMonitor())
    assert all(values.keys() == logged[0].keys() for values in logged)
    return logged[0]


def groups(*options: dict[str, Any]) -> Callable[[Model], Any]:
    return lambda model: sgd([{"params": [p], **each} for p, each in zip((model.first, model.second), options, strict=True)])


def test_parameter_groups_are_numbered() -> None:
    assert names_of(groups({"lr": 0.25}, {})) == {"lr-SGD/group_0": 0.25, "lr-SGD/group_1": 0.5}


def test_a_parameter_group_is_logged_under_its_name() -> None:
    configure = groups({"lr": 0.25, "name": "backbone"}, {})
    assert names_of(configure) == {"lr-SGD/backbone": 0.25, "lr-SGD/group_1": 0.5}


def test_parameter_groups_with_the_same_name_are_numbered() -> None:
    configure = groups({"lr": 0.25, "name": "head"}, {"name": "head"})
    assert names_of(configure) == {"lr-SGD/head-0": 0.25, "lr-SGD/head-1": 0.5}


def test_a_single_group_is_logged_without_its_name() -> None:
    assert names_of(lambda model: sgd([{"params": [model.first], "name": "backbone"}])) == {"lr-SGD": 0.5}


def test_momentum_and_weight_decay_are_logged_on_request() -> None:
    both = LearningRateMonitor(momentum=True, weight_decay=True)
    values = names_of(lambda model: sgd(model.parameters(), momentum=0.75, weight_decay=0.25), both)
    assert values == {"lr-SGD": 0.5, "lr-SGD-momentum": 0.75, "lr-SGD-weight_decay": 0.25}


def test_the_first_beta_is_logged_as_momentum() -> None:
    values = names_of(lambda model: torch.optim.Adam(model.parameters(), 0.5, (0.75, 0.9)), LearningRateMonitor(momentum=True))
    assert values == {"lr-Adam": 0.5, "lr-Adam-momentum": 0.75}


def test_values_that_an_optimizer_does_not_have_are_left_out() -> None:
    class ChoosesItsRate(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.param_groups[0]["lr"] = 0.5
            try:
                return super().step(closure)
            finally:
                self.param_groups[0]["lr"] = None

    def configure(model: Model) -> Any:
        optimizer = ChoosesItsRate(model.parameters(), lr=0.5)
        optimizer.param_groups[0]["lr"] = None
        return optimizer

    assert names_of(configure, LearningRateMonitor(weight_decay=True)) == {"lr-ChoosesItsRate-weight_decay": 0}
    model = Model(lambda model: torch.optim.Adagrad(model.parameters(), lr=0.5))
    logged, _ = fit(model, LearningRateMonitor(momentum=True))
    assert logged[0] == {"lr-Adagrad": 0.5}


def test_a_group_that_is_added_during_the_run_is_logged_from_that_batch_on() -> None:
    class Unfreezes(Model):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                self.optimizers().add_param_group({"params": [self.second], "lr": 0.25, "name": "late"})

    logged, _ = fit(Unfreezes(lambda model: sgd([model.first])), LearningRateMonitor())
    assert logged[:3] == [{"lr-SGD": 0.5}] * 3
    assert logged[3:] == [{"lr-SGD/group_0": 0.5, "lr-SGD/late": 0.25}] * 3


def test_equal_names_are_numbered() -> None:
    assert numbered(["SGD", "Adam", "SGD"]) == ["SGD-0", "Adam", "SGD-1"]
    assert numbered([]) == []


# ------------------------------------------------------------------ manual optimization


class TwoOptimizers(Model):
    """The first optimizer steps in each batch and the second in every other batch, each with its scheduler."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for index, (optimizer, scheduler) in enumerate(zip(self.optimizers(), self.lr_schedulers(), strict=True)):
            if batch_idx % (index + 1) == 0:
                optimizer.zero_grad()
                self.manual_backward((self.first + self.second).sum())
                optimizer.step()
                scheduler.step()


def two(model: Model, second: Any = torch.optim.SGD) -> Any:
    optimizers = [sgd([model.first]), second([model.second], lr=0.25)]
    return optimizers, [ExponentialLR(optimizer, 0.5) for optimizer in optimizers]


def test_each_of_several_optimizers_is_logged_when_it_steps() -> None:
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


def test_a_logger_writes_the_rate_at_its_cadence(tmp_path: Any) -> None:
    model = Model(one_cycle)
    moves = Moves(model)
    logger = TensorBoardLogger(tmp_path, log_every_n_steps=2)
    fit(model, LearningRateMonitor(), logger, moves)
    events = EventAccumulator(str(logger.run_dir)).Reload().Scalars("lr-SGD")
    assert [event.step for event in events] == [2, 4, 6]
    assert [event.value for event in events] == pytest.approx(moves.rates[1::2], abs=1e-6)


def test_the_next_run_has_new_names() -> None:
    recorder = Recorder("metrics_logged")
    trainer = train(Model(groups({}, {})), BATCHES, LearningRateMonitor(), recorder)
    logged = updates(recorder)
    assert logged[0].keys() == {"lr-SGD/group_0", "lr-SGD/group_1"}
    trainer.fit(Model(lambda model: sgd(model.parameters(), 0.25)), BATCHES)
    assert updates(recorder)[-1] == {"lr-SGD": 0.25}


def test_the_optimizers_of_a_run_are_released() -> None:
    _, trainer = fit(Model(groups({}, {})), LearningRateMonitor())
    first = weakref.ref(trainer.optimizers[0])
    trainer.fit(Model(lambda model: sgd(model.parameters())), BATCHES)
    gc.collect()
    assert first() is None


# ------------------------------------------------------------------ the name in a scheduler's config


def named(*names: str | None, groups: int = 1) -> Callable[[Model], Any]:
    def configure(model: Model) -> Any:
        parameters = [[model.first], [model.second]] if len(names) > 1 else [[model.first, model.second]]
        optimizers = [sgd([{"params": p} for p in own] if groups > 1 else own, momentum=0.9) for own in parameters]
        configs = [{"scheduler": ExponentialLR(each, 0.5), "name": name} for each, name in zip(optimizers, names, strict=True)]
        return optimizers, configs

    return configure


def curves_of(configure: Callable[[Model], Any], *, manual: bool = False, **options: Any) -> set[str]:
    class Manual(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if not manual:
                return super().training_step(batch, batch_idx)
            self.manual_backward((self.first + self.second).sum())
            optimizers = self.optimizers()
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.step()
            return None

    logged, _ = fit(Manual(configure, manual=manual), LearningRateMonitor(**options))
    return set(logged[0])


def test_the_name_of_a_schedulers_config_names_the_curve() -> None:
    assert curves_of(named("rate")) == {"rate"}
    assert curves_of(named("rate"), momentum=True, weight_decay=True) == {"rate", "rate-momentum", "rate-weight_decay"}
    assert curves_of(named("rate", groups=2)) == {"rate/group_0", "rate/group_1"}
    assert curves_of(named(None)) == {"lr-SGD"}


def test_each_of_several_optimizers_has_the_name_of_its_own_scheduler() -> None:
    assert curves_of(named("g", "d"), manual=True) == {"g", "d"}
    assert curves_of(named("g", None), manual=True) == {"g", "lr-SGD"}
    assert curves_of(named("rate", "rate"), manual=True) == {"rate-0", "rate-1"}


def test_the_name_is_that_of_the_curve_in_tensorboard(tmp_path: Any) -> None:
    fit(Model(named("rate")), LearningRateMonitor(), TensorBoardLogger(tmp_path, log_every_n_steps=1))
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent))
    events.Reload()
    assert "rate" in events.Tags()["scalars"]
