"""Times of nested spans on the host and on a device, and the hooks that time layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eventtrain import Callback, Trainer
from eventtrain.callbacks import GradientAccumulation, Profiler
from eventtrain.callbacks.profiling.self_times import DeviceTimes, SelfTimes, layers
from eventtrain.callbacks.profiling.spans import Label, Span
from tests.callbacks.profiling.clocked import Clock, Loader, Model, Slow, fitted, means, profiled
from tests.kit import new_trainer


def test_an_end_without_a_beginning_is_ignored_and_a_span_without_an_end_joins_the_one_around_it() -> None:
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
    times.end(outer)  # inner has no end, so that its time is outer's
    times.resume()
    clock.spend(8)
    assert {label.name: seconds for label, seconds in times.take().items() if seconds} == {"other": 9, "outer": 6}
    assert times.open == []


def test_time_counts_nowhere_while_the_clock_is_stopped() -> None:
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


def test_a_start_drops_the_times_that_were_not_taken() -> None:
    clock = Clock()
    times = SelfTimes(clock)
    times.start()
    times.begin("a", Label("phase", "a"))
    clock.spend(5)
    times.start()
    clock.spend(1)
    assert sum(times.take().values()) == 1


# ------------------------------------------------------------------ on a device


class FakeEvent:
    """An event of a device. The device has reached it only if the test says so."""

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
        reached: bool = self.number <= self.device.done
        return reached

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


def test_a_unit_is_read_once_the_device_has_reached_its_end() -> None:
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


def test_events_are_reused_and_a_limited_number_is_pending() -> None:
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


def test_a_run_on_a_device_has_a_table_of_the_devices_times() -> None:
    clock, device = Clock(), FakeDevice()

    class OnDevice(Profiler):
        def device_times(self, trainer: Trainer) -> DeviceTimes | None:
            return device.times()

    class Queues(Model):
        """The host spends little time. The device works, and is two steps behind."""

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
    trainer = new_trainer(profiler, Kernel())
    trainer.signals.safe_point.connect(lambda trainer, event: synced.append(device.syncs))
    trainer.fit(Queues(clock, forward=1), Loader(clock, 10, 1))
    table = profiler.times.device_steps
    assert means(table) == {"forward": 6, "backward": 12, "Kernel.on_after_update": 1}
    assert table.units == 10
    assert set(synced) == {0} and device.syncs > 0, "nothing waits before the run is over"
    text = profiler.summary()
    assert "a step, on the device" in text
    # The host waits half of its time for the loader; the device does not wait.
    assert profiler.times.steps.share(Label("phase", "fetch")) == 0.5
    assert "Waiting for data: 0 % of the step." in text


# ------------------------------------------------------------------ layers


def test_the_time_of_a_layer_counts_in_its_row_only() -> None:
    clock = Clock()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = Slow(clock.spend, 4)

        def forward(self, x: Tensor) -> Tensor:
            clock.spend(1)
            output: Tensor = self.inside(self.inside(x))
            return output

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


def test_no_layer_within_a_compiled_one_gets_hooks() -> None:
    model = Model(Clock())
    model.net = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), backend="eager")
    assert [name for name, _ in layers(model, None)] == ["first", "net"]
    in_place = Model(Clock())
    in_place.net.compile(backend="eager")
    assert [name for name, _ in layers(in_place, None)] == ["first", "net"]


def test_hooks_leave_no_trace_in_a_compiled_function() -> None:
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
            return self.forward(batch).square().mean()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.compiled(batch)

    torch.compiler.reset()
    fitted(profiled(clock, layers=True, first=2, every=2), Compiled(), Loader(clock, 12))
    # Compiled whole and twice, with and without the hooks, however often they come and go. Both graphs are the same.
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
    # The layers of a batch before a validation are counted too.
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
