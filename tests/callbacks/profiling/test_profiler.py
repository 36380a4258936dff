"""The profiler measures each part of a run, and names the slow ones. A test's clock makes most figures exact."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eventtrain import Callback, LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping, Profiler
from eventtrain.callbacks.profiling.spans import Label
from eventtrain.checkpoint import storage
from eventtrain.distributed import SingleProcess
from tests.callbacks.profiling.clocked import (
    Clock,
    Loader,
    Model,
    Scheduled,
    Slow,
    SlowSGD,
    fitted,
    means,
    observed_signals,
    profiled,
)
from tests.kit import new_trainer

# ------------------------------------------------------------------ the parts of a step


def test_the_time_of_a_phase_or_callback_counts_in_its_row_only() -> None:
    clock = Clock()

    class Busy(Callback):
        def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
            clock.spend(100)

        def on_safe_point(self, trainer: Trainer, event: Any) -> None:
            clock.spend(200)

        def on_request_stop(self, trainer: Trainer, event: Any) -> None:
            clock.spend(500)

        def on_take_checkpoint(self, trainer: Trainer, event: Any) -> None:
            clock.spend(600)

        def on_gradients_final(self, trainer: Trainer, event: Any) -> None:
            clock.spend(700)

        def on_clipping_decided(self, trainer: Trainer, event: Any) -> None:
            clock.spend(800)

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
        # The last batch of an epoch ends with its optimization. The rest of it is between two epochs.
        "scheduler": 64 / 2,
        "Busy.on_train_batch_start": 100,
        "Busy.on_safe_point": 200 * 7 / 8,
        "Busy.on_request_stop": 500 * 7 / 8,
        "Busy.on_take_checkpoint": 600 * 7 / 8,
        "Busy.on_gradients_final": 700 / 2,
        "Busy.on_clipping_decided": 800 / 2,
        "Clipping.on_before_gradient_clipping": 300 / 2,
        "Stepping.on_after_update": 400 / 2,
    }
    assert steps.whole.total == sum(row.total for row in steps.rows.values())
    update = steps.rows[Label("phase", "update")]
    assert (update.count, update.mean, update.quantile(0.5), update.quantile(0.95)) == (4, 32, 32, 32)
    assert profiler.times.turns.units == 2
    assert means(profiler.times.turns) == {
        "Busy.on_safe_point": 200 / 2,
        "Busy.on_request_stop": 500 / 2,
        "Busy.on_take_checkpoint": 600 / 2,
    }


def test_no_row_holds_the_time_of_the_observing() -> None:
    """The clock moves whenever it is read. The observing lies between two readings."""

    class Ticking(Clock):
        def __call__(self) -> float:
            self.now += 1
            return super().__call__()

    clock = Ticking()
    profiler = profiled(clock)
    fitted(profiler, Model(clock), Loader(clock, 8))
    observing = profiler.times.steps.observing
    assert observing.count == 8
    # The shortest row takes one tick, from its beginning to its end; an observed batch has some twenty events.
    assert observing.mean > 10
    assert profiler.times.steps.mean(Label("phase", "backward")) == 1


def test_the_transfer_to_the_device_is_not_the_wait_for_the_loader() -> None:
    clock = Clock()
    profiler = profiled(clock)
    fitted(profiler, Model(clock, transfer=3), Loader(clock, 4, 5))
    assert means(profiler.times.steps) == {"fetch": 5, "transfer": 3}


def test_an_error_in_the_transfer_reaches_the_user() -> None:
    clock = Clock()

    class Failing(Model):
        def transfer_batch_to_device(self, batch: Tensor, device: Any, dataloader_idx: int) -> Tensor:
            raise OSError("the device is gone")

    with pytest.raises(OSError, match="the device is gone"):
        fitted(profiled(clock), Failing(clock), Loader(clock, 4))


def test_if_a_policy_does_not_clip_the_time_is_the_updates() -> None:
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
            torch.autograd.backward(loss)

        def configure_optimizers(self) -> Any:
            return [SlowSGD(part.parameters(), clock, 8.0 * (index + 1)) for index, part in enumerate(self.parts)]

    profiler = profiled(clock)
    fitted(profiler, Gan(), Loader(clock, 4, 2))
    assert means(profiler.times.steps) == {"fetch": 2, "forward": 2, "backward": 8, "update": 24}


def test_the_start_of_an_epoch_is_opening_the_loader() -> None:
    clock = Clock()
    profiler = profiled(clock)
    fitted(profiler, Model(clock, forward=1), Loader(clock, 5, opening=64), max_epochs=3)
    opening = profiler.times.turns.rows[Label("phase", "open loader")]
    assert (opening.count, opening.mean) == (3, 64)
    assert means(profiler.times.steps) == {"forward": 1}
    assert "Opening the loader takes 93 % of the run" in profiler.summary()
    assert "persistent_workers=True" in profiler.summary()


# ------------------------------------------------------------------ the sentences of the summary


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


def test_functions_hooks_and_weak_listeners_have_rows() -> None:
    clock = Clock()

    class Hooked(Model):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            clock.spend(1)

    def function(trainer: Trainer, event: Any) -> None:
        clock.spend(2)

    def weak(trainer: Trainer, event: Any) -> None:
        clock.spend(4)

    profiler = profiled(clock)
    trainer = new_trainer(profiler)
    trainer.signals.train_batch_start.connect(function)
    trainer.signals.after_update.connect(weak, weak=True)
    trainer.fit(Hooked(clock), Loader(clock, 4))
    assert means(profiler.times.steps) == {
        "Hooked.on_train_batch_start": 1,
        function.__qualname__: 2,
        "EventSignal._send": 4,  # blinker calls weak listeners itself, all under one name
    }


def test_a_listener_with_the_name_of_a_phase_has_a_separate_row() -> None:
    clock = Clock()

    class Forward:
        described = "forward"

        def __call__(self, trainer: Trainer, event: Any) -> None:
            clock.spend(2)

    profiler = profiled(clock)
    trainer = new_trainer(profiler)
    trainer.signals.train_batch_start.connect(Forward())
    trainer.fit(Model(clock, forward=1), Loader(clock, 4))
    steps = profiler.times.steps
    assert steps.mean(Label("callback", "forward")) == 2 and steps.mean(Label("phase", "forward")) == 1


# ------------------------------------------------------------------ validations, other evaluations, checkpoints


def test_a_validation_is_not_part_of_the_step_and_has_a_table_of_its_batches() -> None:
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


def test_the_batches_of_later_validations_are_sampled() -> None:
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
    trainer = new_trainer(profiler, Slowly())
    for _ in range(2):  # the second run begins with an empty table
        getattr(trainer, stage)(model, Loader(clock, 3, 1))
        assert means(profiler.times.evaluations[stage]) == {"fetch": 1, "forward": 4, "Slowly.on_before_forward": 2}
        assert profiler.times.evaluations[stage].units == 3
        assert observed_signals(trainer) == []
        assert f"a batch of {stage}" in capsys.readouterr().out
    assert profiler.times.validations.count == 0


def test_an_evaluation_after_a_fit_leaves_the_tables_of_the_fit() -> None:
    clock = Clock()
    profiler = profiled(clock)
    model = Model(clock, forward=1, validation=2, test=4)
    trainer = fitted(profiler, model, Loader(clock, 3), val=Loader(clock, 2))
    trainer.validate(model, Loader(clock, 2))
    trainer.test(model, Loader(clock, 2))
    assert profiler.times.evaluations.keys() == {"validation", "validate", "test"}
    for part in ("a step, by itself", "a batch of validation", "a batch of validate", "a batch of test"):
        assert part in profiler.summary()


@pytest.mark.filterwarnings("ignore:The test loader")
def test_an_evaluation_without_a_batch_has_no_table() -> None:
    clock = Clock()
    profiler = Profiler(clock=clock)
    trainer = new_trainer(profiler)
    trainer.test(Model(clock), Loader(clock, 0))
    assert profiler.summary() == "Profiler: nothing has been measured yet."


@pytest.mark.parametrize("name", ["safe_point", "take_checkpoint"])
def test_the_writing_of_a_checkpoint_is_not_part_of_the_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    write = storage.write

    def slow(*args: Any) -> None:
        clock.spend(50)
        write(*args)

    monkeypatch.setattr(storage, "write", slow)

    def save(self: Any, trainer: Trainer, event: Any) -> None:
        clock.spend(2)
        trainer.save_checkpoint(tmp_path / "run.ckpt")

    saves = type("Saves", (Callback,), {f"on_{name}": save})()
    profiler = profiled(clock, first=2, every=10**6)
    trainer = fitted(profiler, Model(clock, forward=1), Loader(clock, 6), saves)
    trainer.save_checkpoint(tmp_path / "after.ckpt")  # not part of the run
    assert (profiler.times.checkpoints.count, profiler.times.checkpoints.mean) == (6, 50)
    assert means(profiler.times.steps) == {"forward": 1, "Saves.save": 2}
    assert re.search(r"^checkpoint +50 s +50 s +50 s ", profiler.summary(), re.MULTILINE)


def test_a_checkpoint_that_is_gathered_and_not_written_is_not_counted(tmp_path: Path) -> None:
    """Ranks other than zero gather a checkpoint and do not write it."""
    clock = Clock()

    class SecondRank(SingleProcess):
        global_rank = 1

    class Saves(Callback):
        def on_join_processes(self, trainer: Trainer, event: Any) -> None:
            event.processes = SecondRank()

        def on_safe_point(self, trainer: Trainer, event: Any) -> None:
            trainer.save_checkpoint(tmp_path / "run.ckpt")
            clock.spend(2)

    profiler = profiled(clock)
    fitted(profiler, Model(clock, forward=1), Loader(clock, 6), Saves())
    assert list(tmp_path.iterdir()) == []
    assert profiler.times.checkpoints.count == 0
    assert means(profiler.times.steps) == {"forward": 1, "Saves.on_safe_point": pytest.approx(2 * 5 / 6)}


# ------------------------------------------------------------------ side effects


def test_training_is_the_same_to_the_bit_and_no_random_number_is_drawn() -> None:
    class Random(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch + torch.rand(2, 4), batch_idx)

    def trained(*callbacks: Any) -> tuple[Tensor, Tensor, Any]:
        torch.manual_seed(1)
        random.seed(1)
        model = Random(Clock())
        trainer = new_trainer(*callbacks, max_epochs=3, num_sanity_val_steps=2)
        trainer.fit(model, Loader(Clock(), 20), Loader(Clock(), 2))
        return nn.utils.parameters_to_vector(model.parameters()).detach(), torch.get_rng_state(), random.getstate()

    plain, measured = trained(), trained(Profiler(first=2, every=2, layers=True, print_summary=False))
    assert torch.equal(plain[0], measured[0])
    assert torch.equal(plain[1], measured[1]) and plain[2] == measured[2]


@pytest.mark.parametrize(
    "place",
    ["training_step", "validation_step", "on_train_batch_end", "on_safe_point", "on_request_stop", "on_take_checkpoint"],
)
def test_after_an_error_nothing_is_observed_and_the_next_run_begins_anew(place: str) -> None:
    clock = Clock()

    class Fails:
        armed = True

        def fail(self, trainer: Trainer, event: Any) -> None:
            if self.armed and trainer.total_batch_idx == 4:
                raise ValueError("in the middle")

    fails = Fails()

    class Failing(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if place == "training_step":
                fails.fail(self.trainer, None)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            if place == "validation_step":
                fails.fail(self.trainer, None)

    profiler = profiled(clock, layers=True)
    trainer = new_trainer(profiler, max_epochs=2, val_check_interval=1, num_sanity_val_steps=2)
    if place.startswith("on_"):
        trainer.signals[place.removeprefix("on_")].connect(fails.fail)
    model = Failing(clock, forward=1)
    attached = {signal.name: signal.attached() for signal in trainer.signals}
    with pytest.raises(ValueError, match="in the middle"):
        trainer.fit(model, Loader(clock, 6), Loader(clock, 1))
    assert observed_signals(trainer) == [] and not model.first._forward_hooks
    assert {signal.name: signal.attached() for signal in trainer.signals} == attached
    assert profiler.times.steps.units == (5 if place == "on_take_checkpoint" else 4)
    fails.armed = False
    trainer.fit(model, Loader(clock, 6), Loader(clock, 1))
    assert profiler.times.steps.units == 12
    assert profiler.times.validations.count == 12
    assert means(profiler.times.steps) == {"forward": 1}


def test_after_an_interrupt_nothing_is_observed() -> None:
    class Interrupts(Callback):
        def on_after_update(self, trainer: Trainer, event: Any) -> None:
            raise KeyboardInterrupt

    clock = Clock()
    profiler = profiled(clock)
    trainer = new_trainer(profiler, Interrupts(), max_epochs=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(Model(clock), Loader(clock, 6))
    assert observed_signals(trainer) == []


def test_two_profilers_are_refused() -> None:
    with pytest.raises(MisconfigurationError, match="both have the role 'profiler'"):
        new_trainer(Profiler(), Profiler())


@pytest.mark.parametrize(
    "argument", [{"every": 0}, {"first": 0}, {"every": 1.5}, {"layers": 0}, {"layers": "all"}, {"log_every_n_steps": True}]
)
def test_a_number_that_is_not_a_whole_number_from_1_is_refused(argument: dict[str, Any]) -> None:
    (name,) = argument
    with pytest.raises(MisconfigurationError, match=rf"Profiler\({name}=.*whole number from 1"):
        Profiler(**argument)
