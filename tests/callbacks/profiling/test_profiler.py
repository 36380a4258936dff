"""Where a run's time goes. Most runs here are by a clock that only the work itself moves, so that every figure is exact."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eventtrain import Callback, LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping, TensorBoardLogger
from eventtrain.callbacks.profiling.profiler import Profiler
from eventtrain.callbacks.profiling.spans import MOST_LABELS, DeviceTimes, Label, Sampling, SelfTimes, Span, layers
from eventtrain.callbacks.profiling.time_tables import QUANTILE_ERROR, Distribution, RunTimes, UnitTimes, duration
from eventtrain.checkpoint import storage


class Clock:
    """Stands still but where something spends time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


class Loader:
    """Batches of ones, each of which takes its time."""

    def __init__(self, clock: Clock, batches: int, seconds: float | Callable[[int], float] = 0.0, opening: float = 0.0) -> None:
        self.clock = clock
        self.batches = batches
        self.seconds = seconds
        self.opening = opening

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        self.clock.spend(self.opening)
        return self._read()

    def _read(self) -> Iterator[Tensor]:
        for index in range(self.batches):
            self.clock.spend(self.seconds(index) if callable(self.seconds) else self.seconds)
            yield torch.ones(2, 4)


class Slow(nn.Module):
    def __init__(self, spend: Callable[[float], None], seconds: float) -> None:
        super().__init__()
        self.spend = spend
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        self.spend(self.seconds)
        return x


class SlowSGD(torch.optim.SGD):
    def __init__(self, parameters: Any, clock: Clock, seconds: float) -> None:
        super().__init__(parameters, lr=0.01)
        self.clock = clock
        self.seconds = seconds

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.clock.spend(self.seconds)
        return loss


class Model(LightningModule):
    """Each part of a step takes as long as it is told."""

    def __init__(self, clock: Clock, **seconds: float) -> None:
        super().__init__()
        self.clock = clock
        self.seconds = seconds
        self.first = nn.Linear(4, 4)
        self.net = nn.Sequential(Slow(clock.spend, seconds.get("inner", 0.0)), nn.Linear(4, 1))

    def spend(self, part: str) -> None:
        self.clock.spend(self.seconds.get(part, 0.0))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.spend("forward")
        return self.net(self.first(batch)).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.spend("validation")
        self.log("val_loss", self.net(self.first(batch)).mean())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.spend("test")

    def predict_step(self, batch: Tensor, batch_idx: int) -> None:
        self.spend("predict")

    def transfer_batch_to_device(self, batch: Tensor, device: Any, dataloader_idx: int) -> Tensor:
        self.spend("transfer")
        return batch

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.spend("backward")
        loss.backward()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.spend("zero_grad")
        optimizer.zero_grad()

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        self.spend("clipping")
        self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.spend("scheduler")
        scheduler.step()

    def configure_optimizers(self) -> Any:
        return SlowSGD(self.parameters(), self.clock, self.seconds.get("update", 0.0))


class Scheduled(Model):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def profiled(clock: Clock, **options: Any) -> Profiler:
    return Profiler(**{"clock": clock, "print_summary": False, **options})


def fitted(profiler: Any, model: LightningModule, loader: Any, *callbacks: Any, val: Any = None, **options: Any) -> Trainer:
    options = {"max_epochs": 1, "default_callbacks": False, "device": "cpu", "num_sanity_val_steps": 0, **options}
    trainer = Trainer(callbacks=[profiler, *callbacks], **options)
    trainer.fit(model, loader, val)
    return trainer


def means(table: UnitTimes) -> dict[str, float]:
    """Seconds per unit of each row that took any."""
    return {label.name: table.mean(label) for label, row in table.rows.items() if row.total}


def observers(trainer: Trainer) -> list[str]:
    return [signal.name for signal in trainer.signals if signal._observers]


# ------------------------------------------------------------------ what each part takes


def test_each_phase_and_each_callback_has_its_own_time_and_no_others() -> None:
    clock = Clock()

    class Busy(Callback):
        def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
            clock.spend(100)

        def on_safe_point(self, trainer: Trainer, event: Any) -> None:
            clock.spend(200)

    class Clipping(GradientClipping):
        def threshold(self, trainer: Trainer) -> float | None:
            clock.spend(300)
            return 1.0

    class Stepping(LRSchedulerStepping):
        def on_after_update(self, trainer: Trainer, event: Any) -> None:
            clock.spend(400)
            super().on_after_update(trainer, event)

    seconds = {"forward": 2, "backward": 4, "zero_grad": 8, "clipping": 16, "update": 32, "scheduler": 64}
    profiler = profiled(clock)
    fitted(profiler, Scheduled(clock, **seconds), Loader(clock, 8, 1), GradientAccumulation(2), Busy(), Clipping(), Stepping())
    steps = profiler.times.steps
    assert steps.observed == steps.units == 8
    assert means(steps) == {
        "fetch": 1,
        "forward": 2,
        "backward": 4,
        "zero_grad": 8 / 2,  # in every other batch
        "clipping": 16 / 2,
        "update": 32 / 2,
        # The last batch of an epoch ends with its optimization; what follows comes once an epoch.
        "scheduler": 64 / 2,
        "Busy.on_train_batch_start": 100,
        "Busy.on_safe_point": 200 * 7 / 8,
        "Clipping.on_before_gradient_clipping": 300 / 2,
        "Stepping.on_after_update": 400 / 2,
    }
    assert steps.whole.total == sum(row.total for row in steps.rows.values())
    update = steps.rows[Label("phase", "update")]
    assert (update.count, update.mean, update.quantile(0.5), update.quantile(0.95)) == (4, 32, 32, 32)
    assert means(profiler.times.turns) == {"Busy.on_safe_point": 200 / profiler.times.turns.units}


def test_what_the_observing_takes_is_in_no_row() -> None:
    """With a clock that moves whenever it is read, all that observing does lies between two readings."""

    class Ticking(Clock):
        def __call__(self) -> float:
            self.now += 1
            return super().__call__()

    clock = Ticking()
    profiler = profiled(clock)
    fitted(profiler, Model(clock), Loader(clock, 8))
    observing = profiler.times.steps.observing
    assert observing.count == 8
    # A row cannot be shorter than one tick where it begins and ends; an observed batch has some twenty events.
    assert observing.mean > 10
    assert profiler.times.steps.mean(Label("phase", "backward")) == 1


def test_the_way_to_the_device_is_not_the_wait_for_the_loader() -> None:
    clock = Clock()
    profiler = profiled(clock)
    fitted(profiler, Model(clock, transfer=3), Loader(clock, 4, 5))
    assert means(profiler.times.steps) == {"fetch": 5, "transfer": 3}


def test_an_error_on_the_way_to_the_device_reaches_the_user() -> None:
    clock = Clock()

    class Failing(Model):
        def transfer_batch_to_device(self, batch: Tensor, device: Any, dataloader_idx: int) -> Tensor:
            raise OSError("the device is gone")

    with pytest.raises(OSError, match="the device is gone"):
        fitted(profiled(clock), Failing(clock), Loader(clock, 4))


def test_a_policy_that_clips_nothing_leaves_the_update_its_time() -> None:
    clock = Clock()
    profiler = profiled(clock)
    fitted(profiler, Model(clock, clipping=1, update=32), Loader(clock, 4), GradientClipping(None))
    assert means(profiler.times.steps) == {"update": 33}
    assert profiler.times.steps.slowest("phase") == Label("phase", "update")


def test_a_vetoed_step_ends_the_update() -> None:
    clock = Clock()

    class Veto(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, event: Any) -> None:
            clock.spend(1)
            event.skip("a test")

    profiler = profiled(clock)
    fitted(profiler, Model(clock, forward=2, update=32), Loader(clock, 4, 8), Veto())
    assert means(profiler.times.steps) == {"forward": 2, "fetch": 8, "Veto.on_before_optimizer_step": 1}


def test_a_closure_that_is_evaluated_often_adds_up_within_the_batch() -> None:
    clock = Clock()
    evaluations: list[int] = []

    class Model2(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            evaluations.append(batch_idx)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=3)

    profiler = profiled(clock)
    fitted(profiler, Model2(clock, forward=1, backward=2), Loader(clock, 3), GradientClipping(1.0))
    assert len(evaluations) > 3
    forward, backward = (profiler.times.steps.rows[Label("phase", name)] for name in ("forward", "backward"))
    assert (forward.count, forward.total, backward.total) == (3, len(evaluations), 2 * len(evaluations))


def test_manual_optimization_nests_in_the_forward() -> None:
    clock = Clock()

    class Gan(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.parts = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            for part, optimizer in zip(self.parts, self.optimizers(), strict=True):
                clock.spend(1)
                loss = part(batch).mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            clock.spend(4)
            loss.backward()

        def configure_optimizers(self) -> Any:
            return [SlowSGD(part.parameters(), clock, 8.0 * (index + 1)) for index, part in enumerate(self.parts)]

    profiler = profiled(clock)
    fitted(profiler, Gan(), Loader(clock, 4, 2))
    assert means(profiler.times.steps) == {"fetch": 2, "forward": 2, "backward": 8, "update": 24}


def test_what_begins_an_epoch_is_opening_the_loader() -> None:
    clock = Clock()
    profiler = profiled(clock)
    fitted(profiler, Model(clock, forward=1), Loader(clock, 5, opening=64), max_epochs=3)
    opening = profiler.times.turns.rows[Label("phase", "open loader")]
    assert (opening.count, opening.mean) == (3, 64)
    assert means(profiler.times.steps) == {"forward": 1}
    assert "Opening the loader takes 93 % of the run" in profiler.summary()
    assert "persistent_workers=True" in profiler.summary()


# ------------------------------------------------------------------ what it names


def test_the_loader_is_named_as_the_bottleneck() -> None:
    clock = Clock()
    profiler = profiled(clock)
    fitted(profiler, Model(clock, forward=30, backward=27), Loader(clock, 8, 43))
    text = profiler.summary()
    assert "The loader is the bottleneck: 43 % of the step is spent waiting for it. Raise num_workers" in text
    rows = [line.split()[0] for line in text.splitlines() if line.endswith("100 %")]
    assert rows[:3] == ["fetch", "forward", "backward"], "the largest first"
    assert re.search(r"^fetch +43 s +43 s +43 s +43.0 % +100 %$", text, re.MULTILINE)
    assert re.search(r"^all +100 s +100 s +100 s +100.0 % +8$", text, re.MULTILINE)


def test_a_fast_loader_is_no_bottleneck() -> None:
    clock = Clock()
    profiler = profiled(clock)
    fitted(profiler, Model(clock, forward=97), Loader(clock, 8, 3))
    assert "Waiting for data: 3 % of the step." in profiler.summary()
    assert "bottleneck" not in profiler.summary()


class Sleepy(Callback):
    def __init__(self, seconds: float = 0.0, at_epoch_end: float = 0.0) -> None:
        self.seconds, self.at_epoch_end = seconds, at_epoch_end

    def on_train_batch_end(self, trainer: Trainer, event: Any) -> None:
        time.sleep(self.seconds)

    def on_train_epoch_end(self, trainer: Trainer, event: Any) -> None:
        time.sleep(self.at_epoch_end)


class SleepyLoader(Loader):
    def _read(self) -> Iterator[Tensor]:
        for batch in super()._read():
            time.sleep(0.02)
            yield batch


def test_real_clocks_name_the_slow_loader() -> None:
    profiler = Profiler(print_summary=False)
    fitted(profiler, Model(Clock()), SleepyLoader(Clock(), 8), Sleepy())
    assert profiler.times.steps.slowest("phase") == Label("phase", "fetch")
    assert "The loader is the bottleneck" in profiler.summary()


def test_real_clocks_name_the_slow_callback() -> None:
    profiler = Profiler(print_summary=False)
    fitted(profiler, Model(Clock()), Loader(Clock(), 8), GradientClipping(1.0), Sleepy(0.02))
    assert "The slowest callback is Sleepy.on_train_batch_end" in profiler.summary()


def test_real_clocks_name_the_slow_layer() -> None:
    model = Model(Clock())
    model.net[0] = Slow(time.sleep, 0.02)
    profiler = Profiler(print_summary=False, layers=True)
    fitted(profiler, model, Loader(Clock(), 8))
    assert "The slowest layer is net.0 (Slow)" in profiler.summary()


def test_functions_hooks_and_weak_listeners_are_named_too() -> None:
    clock = Clock()

    class Hooked(Model):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            clock.spend(1)

    def function(trainer: Trainer, event: Any) -> None:
        clock.spend(2)

    def weak(trainer: Trainer, event: Any) -> None:
        clock.spend(4)

    profiler = profiled(clock)
    trainer = Trainer(max_epochs=1, callbacks=[profiler], default_callbacks=False, device="cpu")
    trainer.signals.train_batch_start.connect(function)
    trainer.signals.after_update.connect(weak, weak=True)
    trainer.fit(Hooked(clock), Loader(clock, 4))
    assert means(profiler.times.steps) == {
        "Hooked.on_train_batch_start": 1,
        function.__qualname__: 2,
        "EventSignal._send": 4,  # what blinker calls itself cannot be told apart
    }


def test_a_function_that_bears_a_phases_name_is_a_row_of_its_own() -> None:
    clock = Clock()

    class Forward:
        described = "forward"

        def __call__(self, trainer: Trainer, event: Any) -> None:
            clock.spend(2)

    profiler = profiled(clock)
    trainer = Trainer(max_epochs=1, callbacks=[profiler], default_callbacks=False, device="cpu")
    trainer.signals.train_batch_start.connect(Forward())
    trainer.fit(Model(clock, forward=1), Loader(clock, 4))
    steps = profiler.times.steps
    assert steps.mean(Label("callback", "forward")) == 2 and steps.mean(Label("phase", "forward")) == 1


# ------------------------------------------------------------------ layers


def test_layers_have_their_own_time_and_no_others() -> None:
    clock = Clock()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = Slow(clock.spend, 4)

        def forward(self, x: Tensor) -> Tensor:
            clock.spend(1)
            return self.inside(self.inside(x))

    model = Model(clock, inner=16, forward=32)
    model.first = nn.Sequential(Block(), nn.Linear(4, 4))
    profiler = profiled(clock, layers=True)
    fitted(profiler, model, Loader(clock, 4), GradientAccumulation(2))
    table = profiler.times.layer_steps
    layer_rows = {label.name: table.mean(label) for label in table.rows if label.kind == "layer" and table.mean(label)}
    assert layer_rows == {"first.0 (Block)": 1, "first.0.inside (Slow)": 8, "net.0 (Slow)": 16}
    assert table.slowest("layer") == Label("layer", "net.0 (Slow)")
    assert "The slowest layer is net.0 (Slow): 28 % of the step, 16 s where it runs." in profiler.summary()


def test_depth_limits_the_layers() -> None:
    model = Model(Clock())
    assert [name for name, _ in layers(model, None)] == ["first", "net", "net.0", "net.1"]
    assert [name for name, _ in layers(model, 1)] == ["first", "net"]
    assert [name for name, _ in layers(model, 2)] == [name for name, _ in layers(model, None)]


def test_what_is_compiled_or_scripted_has_no_hooks_inside() -> None:
    model = Model(Clock())
    model.net = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), backend="eager")
    assert [name for name, _ in layers(model, None)] == ["first", "net"]
    in_place = Model(Clock())
    in_place.net.compile(backend="eager")
    assert [name for name, _ in layers(in_place, None)] == ["first", "net"]


def test_hooks_leave_nothing_in_what_is_compiled() -> None:
    """A function that calls the layers is compiled while their hooks are there."""
    clock = Clock()
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Compiled(Model):
        def __init__(self) -> None:
            super().__init__(clock)
            self.net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
            self.compiled = torch.compile(self.loss, backend=backend, fullgraph=True)

        def loss(self, batch: Tensor) -> Tensor:
            return self.net(self.first(batch)).square().mean()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.compiled(batch)

    torch._dynamo.reset()
    fitted(profiled(clock, layers=True, first=2, every=2), Compiled(), Loader(clock, 12))
    # Whole each time; once where the hooks are and once where not, however often they come and go, and the same.
    with_hooks, without = ([node.target for node in graph.graph.nodes if node.op == "call_function"] for graph in graphs)
    assert with_hooks == without
    assert len(without) == 3


def test_hooks_are_there_only_in_observed_batches_and_never_in_a_validation() -> None:
    clock = Clock()
    hooked: list[tuple[str, bool]] = []

    class Watching(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            hooked.append(("train", bool(self.first._forward_hooks or self.first._forward_pre_hooks)))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            hooked.append(("validation", bool(self.first._forward_hooks or self.first._forward_pre_hooks)))
            super().validation_step(batch, batch_idx)

    model = Watching(clock)
    profiler = profiled(clock, layers=True, first=3, every=4)
    loaders = Loader(clock, 40), Loader(clock, 2)
    fitted(profiler, model, loaders[0], val=loaders[1], val_check_interval=2)
    training = [present for stage, present in hooked if stage == "train"]
    assert training[:3] == [True] * 3
    assert 3 < sum(training) == profiler.times.steps.observed < 40
    assert not any(present for stage, present in hooked if stage == "validation")
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    # The layers of a batch that a validation follows are not lost.
    assert profiler.times.layer_steps.observed == profiler.times.steps.observed


def test_a_layer_that_raises_leaves_no_hook() -> None:
    clock = Clock()

    class Breaking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("broken")

    model = Model(clock)
    model.first = nn.Sequential(Breaking())
    profiler = profiled(clock, layers=True)
    with pytest.raises(ValueError, match="broken"):
        fitted(profiler, model, Loader(clock, 4))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


# ------------------------------------------------------------------ sampling


def test_the_first_windows_are_observed_and_then_some() -> None:
    clock = Clock()
    profiler = profiled(clock, first=5, every=10)
    observed: list[int] = []

    class Watch(Callback):
        def on_after_update(self, trainer: Trainer, event: Any) -> None:
            if profiler._watched is not None:
                observed.append(event.global_step - 1)

    fitted(profiler, Model(clock), Loader(clock, 800), Watch(), GradientAccumulation(2))
    assert observed[:5] == [0, 1, 2, 3, 4]
    distances = [after - before for before, after in pairwise(observed[4:])]
    assert set(distances) <= set(range(1, 20)) and len(set(distances)) > 10, "at random"
    assert 7 < sum(distances) / len(distances) < 13
    # Whole windows, and each stands for those since the last.
    steps = profiler.times.steps
    assert steps.observed == 2 * len(observed)
    assert steps.units == 2 * (observed[-1] + 1)


@pytest.mark.parametrize("every", [5, 10, 20])
@pytest.mark.parametrize("period", [2, 3, 5, 10, 20, 40])
def test_nothing_periodic_hides(period: int, every: int) -> None:
    """One unit in so many takes long; what each sampled one stands for gives the mean."""
    sampling, at, units, total = Sampling(1, every), 0, 0, 0.0
    for _ in range(50_000):
        distance = sampling.draw()
        at += distance
        units += distance
        total += distance * period * (at % period == 0)
    assert total / units == pytest.approx(1.0, rel=0.1)


def test_a_slow_start_does_not_weigh_more_than_it_is_long() -> None:
    clock = Clock()
    profiler = profiled(clock, every=10)
    fitted(profiler, Model(clock), Loader(clock, 500, lambda index: 100.0 if index < 20 else 1.0))
    assert profiler.times.steps.observed < 120
    assert profiler.times.steps.mean(Label("phase", "fetch")) == pytest.approx((20 * 100 + 480) / 500, rel=0.03)


def test_a_batch_that_is_not_observed_reads_no_clock() -> None:
    def reads(batches: int) -> int:
        clock = Clock()
        profiler = profiled(clock, first=1, every=10**6)
        fitted(profiler, Model(clock), Loader(clock, batches), GradientAccumulation(4))
        assert profiler.times.steps.observed in (4, 5)
        return clock.reads

    assert reads(40) == reads(160)


def test_what_comes_once_an_epoch_is_always_observed() -> None:
    clock = Clock()

    class Plots(Callback):
        def on_train_epoch_end(self, trainer: Trainer, event: Any) -> None:
            clock.spend(64)

    profiler = profiled(clock, first=1, every=10**6)
    fitted(profiler, Model(clock), Loader(clock, 9), Plots(), max_epochs=7)
    row = profiler.times.turns.rows[Label("callback", "Plots.on_train_epoch_end")]
    assert (row.count, row.total) == (7, 7 * 64)
    assert means(profiler.times.steps) == {}
    assert "The slowest callback is Plots.on_train_epoch_end: 100 % of what comes once an epoch" in profiler.summary()


@pytest.mark.parametrize("before", [True, False])
def test_a_window_that_is_observed_begins_with_its_first_batch(before: bool) -> None:
    """A listener of the safe point before it is no part of it, whichever of the two was attached first."""
    clock = Clock()

    class Saves(Callback):
        def on_safe_point(self, trainer: Trainer, event: Any) -> None:
            clock.spend(1)

    profiler = profiled(clock, first=1, every=5)
    trainer = Trainer(
        max_epochs=1,
        callbacks=[Saves(), profiler] if before else [profiler, Saves()],
        default_callbacks=False,
        device="cpu",
    )
    trainer.fit(Model(clock), Loader(clock, 100))
    rows = means(profiler.times.steps)
    assert rows.keys() == {"Saves.on_safe_point"}
    row = profiler.times.steps.rows[Label("callback", "Saves.on_safe_point")]
    assert row.mean == 1


@pytest.mark.parametrize("remainder", ["step", "drop", "carry"])
@pytest.mark.parametrize(("batches", "window"), [(1, 1), (1, 4), (5, 2), (7, 3), (8, 4), (3, 8)])
def test_windows_of_any_length(batches: int, window: int, remainder: Any) -> None:
    if remainder == "drop" and batches < window:
        return  # an epoch without an update, which is an error
    clock = Clock()
    profiler = profiled(clock, first=2, every=3)
    trainer = Trainer(
        max_epochs=5,
        callbacks=[profiler, GradientAccumulation(window, remainder=remainder)],
        default_callbacks=False,
        device="cpu",
    )
    short = batches < window and remainder != "carry"
    loader = Loader(clock, batches, 1)
    if short:
        with pytest.warns(UserWarning, match="batches"):
            trainer.fit(Model(clock), loader)
    else:
        trainer.fit(Model(clock), loader)
    assert 0 < profiler.times.steps.observed <= 5 * batches
    assert profiler.times.steps.units <= 5 * batches
    assert means(profiler.times.steps) == {"fetch": 1}
    assert profiler.times.turns.units == 6  # before each epoch and after the last


def test_a_run_that_ends_inside_of_an_epoch() -> None:
    clock = Clock()
    profiler = profiled(clock)
    trainer = fitted(profiler, Model(clock, forward=1), Loader(clock, 100, 2), max_steps=7, max_epochs=None)
    assert profiler.times.steps.units == 7
    assert means(profiler.times.steps) == {"forward": 1, "fetch": 2}
    assert observers(trainer) == []


def test_a_muted_safe_point_stops_the_sampling_and_breaks_nothing() -> None:
    clock = Clock()
    profiler = profiled(clock, first=3, every=2)
    trainer = Trainer(max_epochs=2, callbacks=[profiler], default_callbacks=False, device="cpu")
    with trainer.signals.safe_point.muted():
        trainer.fit(Model(clock, forward=1), Loader(clock, 10))
    assert means(profiler.times.steps) == {"forward": 1}
    assert observers(trainer) == []
    trainer.fit(Model(clock, forward=1), Loader(clock, 10))
    assert profiler.times.steps.observed > 3


def test_a_trace_at_the_same_time_sees_what_it_would_see_alone() -> None:
    def names(*callbacks: Any) -> list[str]:
        trainer = Trainer(max_epochs=2, callbacks=[*callbacks], default_callbacks=False, device="cpu", num_sanity_val_steps=0)
        with trainer.signals.trace() as trace:
            trainer.fit(Model(Clock()), Loader(Clock(), 30), Loader(Clock(), 2))
        assert observers(trainer) == []
        return [name for name in trace.names() if name != "metrics_logged"]

    # The profiler logs, which is an event of its own.
    assert names(Profiler(print_summary=False, first=2, every=3)) == names()


def test_a_trainer_within_a_callback_is_the_callbacks_time() -> None:
    clock = Clock()

    class Nested(Callback):
        def on_train_batch_end(self, trainer: Trainer, event: Any) -> None:
            inner = Trainer(max_epochs=1, default_callbacks=False, device="cpu", callbacks=[profiled(clock)])
            inner.fit(Model(clock, forward=16), Loader(clock, 2, 32))

    profiler = profiled(clock)
    fitted(profiler, Model(clock, forward=1), Loader(clock, 4), Nested())
    assert means(profiler.times.steps)["forward"] == 1
    row = profiler.times.steps.rows[Label("callback", "Nested.on_train_batch_end")]
    assert row.mean == 2 * (16 + 32)


# ------------------------------------------------------------------ validation, other evaluations, checkpoints


def test_a_validation_is_no_part_of_the_step_and_its_inside_is_shown() -> None:
    clock = Clock()

    class Slowly(Callback):
        def on_validation_batch_end(self, trainer: Trainer, event: Any) -> None:
            clock.spend(2)

        def on_validation_end(self, trainer: Trainer, event: Any) -> None:
            clock.spend(10)

    profiler = profiled(clock)
    loaders = Loader(clock, 6), Loader(clock, 5, 8, opening=100)
    model = Model(clock, validation=4, forward=1)
    fitted(profiler, model, loaders[0], Slowly(), val=loaders[1], max_epochs=3, val_check_interval=3)
    validations = profiler.times.validations
    assert (validations.count, validations.mean) == (6, 100 + 5 * (8 + 4 + 2) + 10)
    assert means(profiler.times.steps) == {"forward": 1}
    inside = profiler.times.evaluations["validation"]
    assert means(inside) == {
        "fetch": 8,
        "forward": 4,
        "open loader": 20,
        "Slowly.on_validation_batch_end": 2,
        "Slowly.on_validation_end": 2,
    }
    assert inside.whole.mean * 5 == validations.mean
    assert "a batch of validation" in profiler.summary()


def test_the_insides_of_later_validations_are_sampled() -> None:
    clock = Clock()
    profiler = profiled(clock, every=5)
    fitted(profiler, Model(clock, validation=1), Loader(clock, 100), val=Loader(clock, 2), val_check_interval=1)
    assert profiler.times.validations.count == 100
    assert 2 * 12 < profiler.times.evaluations["validation"].observed < 2 * 40


def test_a_sanity_check_is_not_measured() -> None:
    clock = Clock()
    profiler = profiled(clock)
    fitted(profiler, Model(clock, validation=1), Loader(clock, 2), val=Loader(clock, 2), num_sanity_val_steps=2)
    assert profiler.times.validations.count == 1
    assert profiler.times.evaluations["validation"].units == 2


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_each_evaluation_has_a_table(stage: str, capsys: Any) -> None:
    clock = Clock()

    class Slowly(Callback):
        def on_before_forward(self, trainer: Trainer, event: Any) -> None:
            clock.spend(2)

    profiler = Profiler(clock=clock)
    model = Model(clock, validation=4, test=4, predict=4)
    trainer = Trainer(max_epochs=1, callbacks=[profiler, Slowly()], default_callbacks=False, device="cpu")
    for _ in range(2):  # the second begins anew
        getattr(trainer, stage)(model, Loader(clock, 3, 1))
        assert means(profiler.times.evaluations[stage]) == {"fetch": 1, "forward": 4, "Slowly.on_before_forward": 2}
        assert profiler.times.evaluations[stage].units == 3
        assert observers(trainer) == []
        assert f"a batch of {stage}" in capsys.readouterr().out
    assert profiler.times.validations.count == 0


def test_an_evaluation_after_a_fit_keeps_the_fits_table() -> None:
    clock = Clock()
    profiler = profiled(clock)
    model = Model(clock, forward=1, validation=2, test=4)
    trainer = fitted(profiler, model, Loader(clock, 3), val=Loader(clock, 2))
    trainer.validate(model, Loader(clock, 2))
    trainer.test(model, Loader(clock, 2))
    assert profiler.times.evaluations.keys() == {"validation", "validate", "test"}
    for part in ("a step, by itself", "a batch of validation", "a batch of validate", "a batch of test"):
        assert part in profiler.summary()


def test_an_evaluation_without_a_batch() -> None:
    clock = Clock()
    profiler = Profiler(clock=clock)
    trainer = Trainer(max_epochs=1, callbacks=[profiler], default_callbacks=False, device="cpu")
    trainer.test(Model(clock), Loader(clock, 0))
    assert profiler.summary() == "Profiler: nothing has been measured yet."


def test_writing_a_checkpoint_is_timed_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    write = storage.write

    def slow(*args: Any) -> None:
        clock.spend(50)
        write(*args)

    monkeypatch.setattr(storage, "write", slow)

    class Saves(Callback):
        def on_safe_point(self, trainer: Trainer, event: Any) -> None:
            clock.spend(2)
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    profiler = profiled(clock, first=2, every=10**6)
    trainer = fitted(profiler, Model(clock, forward=1), Loader(clock, 6), Saves())
    trainer.save_checkpoint(tmp_path / "after.ckpt")  # no part of the run
    assert (profiler.times.checkpoints.count, profiler.times.checkpoints.mean) == (6, 50)
    assert means(profiler.times.steps) == {"forward": 1, "Saves.on_safe_point": 2}
    assert re.search(r"^checkpoint +50 s +50 s +50 s ", profiler.summary(), re.MULTILINE)


def test_a_checkpoint_that_never_gets_to_disk_breaks_nothing(tmp_path: Path) -> None:
    """As on other ranks than zero: it is gathered there, and saved nowhere."""
    clock = Clock()

    class Gathers(Callback):
        def on_safe_point(self, trainer: Trainer, event: Any) -> None:
            from eventtrain.checkpoint import contents as checkpoint

            checkpoint.gather(trainer)
            clock.spend(2)

    profiler = profiled(clock)
    fitted(profiler, Model(clock, forward=1), Loader(clock, 6), Gathers())
    assert profiler.times.checkpoints.count == 0
    assert means(profiler.times.steps) == {"forward": 1, "Gathers.on_safe_point": pytest.approx(2 * 5 / 6)}


# ------------------------------------------------------------------ it changes nothing


def test_training_is_the_same_to_the_bit_and_draws_nothing() -> None:
    class Random(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch + torch.rand(2, 4), batch_idx)

    def run(*callbacks: Any) -> tuple[Tensor, Tensor, Any]:
        torch.manual_seed(1)
        random.seed(1)
        model = Random(Clock())
        trainer = Trainer(max_epochs=3, callbacks=[*callbacks], default_callbacks=False, device="cpu")
        trainer.fit(model, Loader(Clock(), 20), Loader(Clock(), 2))
        return nn.utils.parameters_to_vector(model.parameters()).detach(), torch.get_rng_state(), random.getstate()

    plain, measured = run(), run(Profiler(first=2, every=2, layers=True, print_summary=False))
    assert torch.equal(plain[0], measured[0])
    assert torch.equal(plain[1], measured[1]) and plain[2] == measured[2]


@pytest.mark.parametrize("where", ["training_step", "validation_step", "on_train_batch_end", "on_safe_point"])
def test_an_error_leaves_nothing_behind_and_the_next_run_is_a_new_one(where: str) -> None:
    clock = Clock()

    class Fails:
        armed = True

        def _fail(self, trainer: Trainer, event: Any) -> None:
            if self.armed and trainer.total_batch_idx == 4:
                raise ValueError("in the middle")

    fails = Fails()

    class Failing(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if where == "training_step":
                fails._fail(self.trainer, None)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            if where == "validation_step":
                fails._fail(self.trainer, None)

    profiler = profiled(clock, layers=True)
    trainer = Trainer(max_epochs=2, callbacks=[profiler], default_callbacks=False, device="cpu", val_check_interval=1)
    if where.startswith("on_"):
        trainer.signals[where.removeprefix("on_")].connect(fails._fail)
    model = Failing(clock, forward=1)
    attached = {signal.name: signal.attached() for signal in trainer.signals}
    with pytest.raises(ValueError, match="in the middle"):
        trainer.fit(model, Loader(clock, 6), Loader(clock, 1))
    assert observers(trainer) == [] and not model.first._forward_hooks
    assert {signal.name: signal.attached() for signal in trainer.signals} == attached
    assert profiler.times.steps.units == (5 if where == "on_safe_point" else 4)
    fails.armed = False
    trainer.fit(model, Loader(clock, 6), Loader(clock, 1))
    assert profiler.times.steps.units == 12
    assert profiler.times.validations.count == 12
    assert means(profiler.times.steps) == {"forward": 1}


def test_an_interrupt_leaves_nothing_behind() -> None:
    class Interrupts(Callback):
        def on_after_update(self, trainer: Trainer, event: Any) -> None:
            raise KeyboardInterrupt

    clock = Clock()
    profiler = profiled(clock)
    trainer = Trainer(max_epochs=2, callbacks=[profiler, Interrupts()], default_callbacks=False, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(Model(clock), Loader(clock, 6))
    assert observers(trainer) == []


def test_two_profilers_are_refused() -> None:
    with pytest.raises(MisconfigurationError, match="both have the role 'profiler'"):
        Trainer(max_epochs=1, callbacks=[Profiler(), Profiler()], device="cpu")


@pytest.mark.parametrize(
    "argument", [{"every": 0}, {"first": 0}, {"every": 1.5}, {"layers": 0}, {"layers": "all"}, {"log_every_n_steps": True}]
)
def test_what_makes_no_sense_is_refused(argument: dict[str, Any]) -> None:
    (name,) = argument
    with pytest.raises(MisconfigurationError, match=rf"Profiler\({name}=.*whole number from 1"):
        Profiler(**argument)


# ------------------------------------------------------------------ what it prints and logs


def test_the_table_is_printed_when_the_run_is_over(capsys: Any) -> None:
    clock = Clock()
    profiler = Profiler(clock=clock)
    trainer = fitted(profiler, Model(clock, forward=1), Loader(clock, 4))
    assert capsys.readouterr().out == profiler.summary() + "\n"
    profiler.print_summary = False
    trainer.fit(Model(clock), Loader(clock, 4))
    assert capsys.readouterr().out == ""


def test_a_failed_run_prints_nothing_and_can_be_asked(capsys: Any) -> None:
    clock = Clock()

    class Fails(Callback):
        def on_safe_point(self, trainer: Trainer, event: Any) -> None:
            if trainer.batch_idx == 2:
                raise ValueError("enough")

    profiler = Profiler(clock=clock)
    with pytest.raises(ValueError, match="enough"):
        fitted(profiler, Model(clock, forward=1), Loader(clock, 4), Fails())
    assert capsys.readouterr().out == ""
    assert "forward" in profiler.summary()


def test_the_summary_can_be_asked_for_at_any_time() -> None:
    clock = Clock()
    profiler = profiled(clock)
    assert profiler.summary() == "Profiler: nothing has been measured yet."
    texts: list[str] = []

    class Asks(Callback):
        def on_safe_point(self, trainer: Trainer, event: Any) -> None:
            texts.append(profiler.summary())

    fitted(profiler, Model(clock, forward=1), Loader(clock, 3), Asks())
    assert texts[0] == "Profiler: nothing has been measured yet."
    assert "1 batches were observed" in texts[1]


class Monitored(Callback):
    """Keeps what monitors log."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def on_metrics_logged(self, trainer: Trainer, event: Any) -> None:
        if event.scope == "monitor":
            self.logged.append({"step": event.step, **event.metrics})


def test_scalars_are_the_means_since_they_were_logged_last() -> None:
    clock = Clock()

    class Busy(Callback):
        def on_after_update(self, trainer: Trainer, event: Any) -> None:
            clock.spend(0.004 * (1 + trainer.current_epoch))

    monitored = Monitored()
    profiler = profiled(clock)
    model = Model(clock, forward=0.002, validation=0.25)
    fitted(profiler, model, Loader(clock, 4, 0.002), Busy(), monitored, val=Loader(clock, 2), max_epochs=2)
    assert [logged["step"] for logged in monitored.logged] == [4, 8]
    first, second = monitored.logged
    assert first["time/forward_ms"] == pytest.approx(2.0)
    assert first["time/callback/Busy.on_after_update_ms"] == pytest.approx(4.0)
    assert second["time/callback/Busy.on_after_update_ms"] == pytest.approx(8.0)
    assert (first["time/step_ms"], second["time/step_ms"]) == (pytest.approx(8.0), pytest.approx(12.0))
    assert (first["time/data_wait"], second["time/data_wait"]) == (pytest.approx(2 / 8), pytest.approx(2 / 12))
    assert first["time/validation_ms"] == pytest.approx(500.0)
    assert "time/checkpoint_ms" not in first
    assert not any(name.startswith("time/callback/Profiler") and value for name, value in first.items())


def test_scalars_are_logged_at_their_cadence_too() -> None:
    clock = Clock()
    monitored = Monitored()
    fitted(profiled(clock, log_every_n_steps=4), Model(clock, forward=1), Loader(clock, 16), GradientAccumulation(2), monitored)
    assert [logged["step"] for logged in monitored.logged] == [4, 8]
    again = Monitored()
    fitted(profiled(clock, log_every_n_steps=None), Model(clock, forward=1), Loader(clock, 16), again)
    assert [logged["step"] for logged in again.logged] == [16]


def test_logging_is_observed_by_nobody() -> None:
    """What a logger does with the profiler's own scalars is no part of the run."""
    clock = Clock()

    class Logger(Callback):
        def on_metrics_logged(self, trainer: Trainer, event: Any) -> None:
            if event.scope == "monitor":
                clock.spend(1000)

    profiler = profiled(clock, log_every_n_steps=1)
    fitted(profiler, Model(clock, forward=1), Loader(clock, 10), Logger(), max_epochs=2)
    assert means(profiler.times.steps) == {"forward": 1}
    assert means(profiler.times.turns) == {}


def test_scalars_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def odd(trainer: Trainer, event: Any) -> None: ...

    logger = TensorBoardLogger(tmp_path)
    profiler = Profiler(print_summary=False)
    trainer = Trainer(max_epochs=2, callbacks=[profiler, logger], default_callbacks=False, device="cpu")
    trainer.signals.after_update.connect(odd)  # whose name has <locals> in it
    trainer.fit(Model(Clock()), Loader(Clock(), 4))
    events = EventAccumulator(str(logger.run_dir)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"time/forward_ms", "time/step_ms", "time/data_wait"} <= tags
    assert any("odd" in tag for tag in tags)
    assert [event.step for event in events.Scalars("time/forward_ms")] == [4, 8]


def test_it_trains_in_a_fast_dev_run(capsys: Any) -> None:
    trainer = Trainer(fast_dev_run=True, callbacks=[Profiler()], default_callbacks=False, device="cpu")
    trainer.fit(Model(Clock()), Loader(Clock(), 4), Loader(Clock(), 2))
    assert "1 batches were observed" in capsys.readouterr().out


# ------------------------------------------------------------------ memory


def test_nothing_grows_with_the_run() -> None:
    clock = Clock()

    class Passing(Callback):
        """Connects a new listener in each batch, each with a name of its own."""

        def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
            def listener(trainer: Trainer, event: Any) -> None:
                clock.spend(1)
                trainer.signals.after_update.disconnect(listener)

            listener.described = f"listener {trainer.batch_idx}"  # type: ignore[attr-defined]
            trainer.signals.after_update.connect(listener)

    profiler = profiled(clock, first=1000)
    fitted(profiler, Model(clock, forward=3), Loader(clock, 500, lambda index: 1.0 + index), Passing())
    steps = profiler.times.steps
    assert steps.observed == 500
    assert len(steps.rows) <= MOST_LABELS + 1
    assert sum(row.total for label, row in steps.rows.items() if label.kind == "callback") == 500
    assert len(steps.rows[Label("phase", "fetch")]._buckets) <= 8 * math.log2(501) + 2


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(1e-8, 1e5), st.integers(1, 20)), min_size=1), st.sampled_from([0.05, 0.5, 0.95, 1.0]))
def test_quantiles_are_exact_to_their_error(values: list[tuple[float, int]], fraction: float) -> None:
    distribution = Distribution()
    for value, weight in values:
        distribution.add(value, weight)
    ordered = sorted(value for value, weight in values for _ in range(weight))
    exact = ordered[max(math.ceil(fraction * len(ordered)) - 1, 0)]
    assert distribution.quantile(fraction) == pytest.approx(exact, rel=QUANTILE_ERROR + 1e-9)
    assert distribution.count == len(ordered)
    assert distribution.mean == pytest.approx(sum(ordered) / len(ordered))


def test_quantiles_at_the_ends_of_the_scale() -> None:
    distribution = Distribution()
    assert (distribution.mean, distribution.quantile(0.5)) == (0.0, 0.0)
    distribution.add(0.0)
    assert distribution.quantile(0.5) == 0.0
    distribution.add(1e300)
    assert distribution.quantile(1.0) >= 2**20
    assert len(distribution._buckets) == 2


def test_distances_repeat_and_have_their_mean() -> None:
    first, second = Sampling(3, 10), Sampling(3, 10)
    drawn = [first.draw() for _ in range(5000)]
    assert drawn == [second.draw() for _ in range(5000)]
    assert drawn[:2] == [1, 1]
    assert 9.5 < sum(drawn[2:]) / len(drawn[2:]) < 10.5
    assert {Sampling(1, 1).draw() for _ in range(10)} == {1}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 us"), (1e-7, "0.1 us"), (9.996e-4, "1 ms"), (0.0123, "12.3 ms"), (1.0, "1 s"), (754.3, "754 s")],
)
def test_times_are_written_with_three_digits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_an_empty_run_has_a_summary() -> None:
    assert RunTimes().summary() == "Profiler: nothing has been measured yet."
    assert RunTimes().fresh_scalars() == {}


# ------------------------------------------------------------------ on a device


class FakeEvent:
    """What the device does is played by hand: it gets to an event when it is told to."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.at = math.nan
        self.waited = 0

    def record(self, stream: Any) -> None:
        assert stream is self.device
        self.device.recorded += 1
        self.at = self.device.now
        self.number = self.device.recorded

    def query(self) -> bool:
        return self.number <= self.device.done

    def synchronize(self) -> None:
        self.device.syncs += 1
        self.device.done = max(self.device.done, self.number)

    def elapsed_time(self, other: FakeEvent) -> float:
        assert other.query() and self.query()
        return 1000.0 * (other.at - self.at)


class FakeDevice:
    def __init__(self) -> None:
        self.now = 0.0
        self.recorded = self.done = self.syncs = self.made = 0

    def make(self) -> FakeEvent:
        self.made += 1
        return FakeEvent(self)

    def times(self, **options: Any) -> DeviceTimes:
        return DeviceTimes(self.make, lambda: self, **options)


def unit(device: FakeDevice, times: DeviceTimes, seconds: float, weight: int = 1) -> None:
    device.now += seconds
    times.mark(Span(None, Label("phase", "forward")))
    device.now += 2 * seconds
    times.mark(Span(None, Label("phase", "backward")))
    device.now += 100
    times.skip()
    device.now += 4 * seconds
    times.mark(Span(None, Label("phase", "forward")))
    times.cut(weight)


def test_a_device_is_read_when_it_has_got_there() -> None:
    device = FakeDevice()
    times = device.times()
    times.start()
    unit(device, times, 1.0, weight=3)
    unit(device, times, 2.0)
    assert list(times.read()) == [], "it has done nothing yet"
    device.done = device.recorded // 2
    forward, backward = Label("phase", "forward"), Label("phase", "backward")
    assert list(times.read()) == [({forward: 5.0, backward: 2.0}, 3)]
    assert list(times.read()) == []
    device.done = device.recorded
    assert list(times.read()) == [({forward: 10.0, backward: 4.0}, 1)]
    assert device.syncs == 0


def test_the_end_of_a_run_waits_for_the_device() -> None:
    device = FakeDevice()
    times = device.times()
    times.start()
    unit(device, times, 1.0)
    unit(device, times, 2.0)
    assert [weight for _, weight in times.read(wait=True)] == [1, 1]
    assert device.syncs == 2


def test_events_are_used_again_and_few_are_pending() -> None:
    device = FakeDevice()
    times = device.times(most_pending=4)
    times.start()
    for _ in range(1000):
        unit(device, times, 1.0)
    assert device.made <= 6 * 6, "units beyond the four that wait are not measured"
    device.done = device.recorded
    assert len(list(times.read())) == 4
    for _ in range(1000):
        unit(device, times, 1.0)
        device.done = device.recorded
        assert len(list(times.read())) == 1
    assert device.made <= 6 * 6


def test_a_run_on_a_device_has_a_table_of_its_own() -> None:
    clock, device = Clock(), FakeDevice()

    class OnDevice(Profiler):
        def device_times(self, trainer: Trainer) -> DeviceTimes | None:
            return device.times()

    class Queues(Model):
        """The host spends next to nothing, the device works; it is two steps behind."""

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            device.now += 6
            device.done = device.recorded - 60
            return super().training_step(batch, batch_idx)

        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            device.now += 12
            super().backward(loss)

    class Kernel(Callback):
        def on_after_update(self, trainer: Trainer, event: Any) -> None:
            device.now += 1

    profiler = OnDevice(clock=clock, print_summary=False, layers=True)
    synced: list[int] = []
    trainer = Trainer(max_epochs=1, callbacks=[profiler, Kernel()], default_callbacks=False, device="cpu")
    trainer.signals.safe_point.connect(lambda trainer, event: synced.append(device.syncs))
    trainer.fit(Queues(clock, forward=1), Loader(clock, 10, 1))
    table = profiler.times.device_steps
    assert means(table) == {"forward": 6, "backward": 12, "Kernel.on_after_update": 1}
    assert table.units == 10
    assert set(synced) == {0} and device.syncs > 0, "nothing waits before the run is over"
    text = profiler.summary()
    assert "a step, on the device" in text
    # The host waits half of its time for the loader; the device has nothing to wait for.
    assert profiler.times.steps.share(Label("phase", "fetch")) == 0.5
    assert "Waiting for data: 0 % of the step." in text


def test_self_times_nest_and_forgive() -> None:
    """Ends that have no beginning, and beginnings without an end."""
    clock = Clock()
    times = SelfTimes(clock)
    outer, inner = Label("phase", "outer"), Label("phase", "inner")
    times.start()
    times.end("never began")
    clock.spend(1)
    for label, seconds in ((outer, 2), (inner, 4)):
        times.pause()
        times.begin(label, label)
        times.resume()
        clock.spend(seconds)
    times.pause()
    times.end(outer)  # inner had no end: it was outer's
    times.resume()
    clock.spend(8)
    assert {label.name: seconds for label, seconds in times.take().items() if seconds} == {"other": 9, "outer": 6}
    assert times.open == []


def test_what_comes_while_the_clock_is_stopped_counts_nowhere() -> None:
    clock = Clock()
    times = SelfTimes(clock)
    times.start()
    clock.spend(1)
    times.suspend()
    clock.spend(10)
    times.listener_ends(print)  # of an event that began before, and ends after
    clock.spend(100)
    times.go_on()
    clock.spend(2)
    assert sum(times.take().values()) == 3


def test_partial_runs_are_dropped_by_the_next_start() -> None:
    clock = Clock()
    times = SelfTimes(clock)
    times.start()
    times.begin("a", Label("phase", "a"))
    clock.spend(5)
    times.start()
    clock.spend(1)
    assert sum(times.take().values()) == 1
