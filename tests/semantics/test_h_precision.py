"""H. Precision: autocast, and loss scaling against the hand-written AMP loop of the PyTorch documentation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from eventtrain import MisconfigurationError
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping, MixedPrecision
from tests.kit import On, Probe, Recorder, gradient, new_trainer, train
from tests.reference import backward
from tests.semantics.precision import (
    FUSED,
    INF,
    Net,
    Pair,
    Scales,
    assert_same,
    autocast,
    by_hand,
    data,
    eager_scaler,
    run_pair,
    small_scaler,
)

# ------------------------------------------------------------------ H1: autocast


class Watching(Net):
    """Keeps, at each place, which type a linear layer computes in there."""

    def __init__(self) -> None:
        super().__init__()
        self.at: dict[str, torch.dtype] = {}

    def note(self, place: str) -> None:
        with torch.no_grad():
            self.at[place] = nn.functional.linear(torch.ones(1, 4), next(self.net.parameters())).dtype

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note("training_step")
        loss = self.loss(batch)
        loss.register_hook(lambda _: self.note("backward"))  # type: ignore[no-untyped-call]
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note("sanity check" if self.trainer.sanity_checking else "validation_step")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.note("test_step")

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.note("predict_step")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.note("on_train_batch_start")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.note("on_before_optimizer_step")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.note("on_train_batch_end")

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.note("on_validation_batch_end")


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_h1_autocast_is_around_the_forward_of_every_stage_and_nothing_else(precision: Any, dtype: torch.dtype) -> None:
    module = Watching()
    trainer = new_trainer(MixedPrecision(precision), num_sanity_val_steps=1)
    trainer.fit(module, data(1), data(1))
    trainer.test(module, data(1))
    trainer.predict(module, data(1))
    forward = ("training_step", "sanity check", "validation_step", "test_step", "predict_step")
    elsewhere = (
        "on_train_batch_start", "backward", "on_before_optimizer_step", "on_train_batch_end", "on_validation_batch_end",
    )  # fmt: skip
    assert module.at == {**dict.fromkeys(forward, dtype), **dict.fromkeys(elsewhere, torch.float32)}
    trainer.validate(module, data(1))
    assert module.at["validation_step"] == dtype


def test_h1_autocast_is_left_when_a_step_raises() -> None:
    class Raising(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        train(Raising(), data(1), MixedPrecision("bf16"))
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_h1_parameters_gradients_and_optimizer_state_stay_float32(precision: Any) -> None:
    module = Net()
    dtypes: set[torch.dtype] = set()
    look = On(before_optimizer_step=lambda t, e: dtypes.update(p.grad.dtype for p in e.optimizer.parameters()))
    trainer = train(module, data(3), MixedPrecision(precision), look)
    assert dtypes == {torch.float32}
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert {v["exp_avg"].dtype for v in trainer.optimizers[0].state.values()} == {torch.float32}


def test_h1_the_policy_may_be_overridden() -> None:
    class Off(MixedPrecision):
        def autocast(self, trainer: Any) -> torch.autocast:
            return torch.autocast("cpu", enabled=False)

    module = Watching()
    train(module, data(1), Off("bf16"))
    assert module.at["training_step"] == torch.float32


@FUSED
def test_h1_bf16_equals_the_hand_written_loop(fused: bool) -> None:
    def make(parameters: Any) -> Optimizer:
        return AdamW(parameters, lr=0.05, fused=fused)

    module = Net(make)
    trainer = train(module, data(6), MixedPrecision("bf16"), max_epochs=2)

    expected = Net(make)
    optimizer = expected.configure_optimizers()
    for batch in data(6) * 2:
        with autocast(torch.bfloat16):
            loss = expected.loss(batch)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
    assert_same(module, trainer.optimizers[0], expected, optimizer)


class Manual(Net):
    """Takes several steps in each batch, each after a new forward."""

    def __init__(self, steps: int, *, raw: bool = False) -> None:
        super().__init__(lambda parameters: SGD(parameters, lr=0.5))
        self.automatic_optimization = False
        self.steps = steps
        self.raw = raw

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(self.steps):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            (optimizer.optimizer if self.raw else optimizer).step()


@pytest.mark.parametrize(("precision", "raw"), [("bf16", False), ("fp16", False), ("bf16", True)])
def test_h1_in_manual_mode_a_forward_after_a_step_uses_the_new_weights(precision: Any, raw: bool) -> None:
    """Autocast keeps the lower-precision copies of weights for as long as it is entered."""
    module = Manual(3, raw=raw)
    scaler = small_scaler() if precision == "fp16" else None
    trainer = train(module, data(4), MixedPrecision(precision, scaler=scaler))

    expected = Manual(3)
    optimizer = expected.configure_optimizers()
    other = small_scaler(enabled=precision == "fp16")
    for batch in data(4):
        for _ in range(3):
            with autocast(torch.float16 if precision == "fp16" else torch.bfloat16):
                loss = expected.loss(batch)
            optimizer.zero_grad()
            backward(other.scale(loss))
            other.step(optimizer)
            other.update()
    assert_same(module, trainer.optimizers[0], expected, optimizer)
    if scaler is not None:
        assert scaler.state_dict() == other.state_dict()


def test_h1_in_manual_mode_backward_runs_without_autocast() -> None:
    class Module(Watching):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            self.note("after backward")

    module = Module()
    train(module, data(1), MixedPrecision("bf16"))
    assert module.at["training_step"] == module.at["after backward"] == torch.bfloat16
    assert module.at["backward"] == torch.float32


# ------------------------------------------------------------------ H2: the documentation's loop


CASES: dict[str, dict[str, Any]] = {
    "growth": {"n": 7},
    "backoff": {"n": 7, "bad": (1,)},
    "backoff twice": {"n": 9, "bad": (2, 3)},
    "overflow at first": {"n": 4, "bad": (0,)},
    "overflow at last": {"n": 4, "bad": (3,)},
    "accumulation": {"n": 8, "accumulate": 2},
    "accumulation of a third": {"n": 9, "accumulate": 3},
    "short window": {"n": 7, "accumulate": 3},
    "overflow in the middle of a window": {"n": 9, "bad": (4,), "accumulate": 3},
    "overflow in a short window": {"n": 7, "bad": (6,), "accumulate": 3},
}


@FUSED
@pytest.mark.parametrize("kind", [SGD, Adam], ids=["SGD", "Adam"])
@pytest.mark.parametrize("case", CASES)
def test_h2_equals_the_documentations_loop(case: str, kind: Any, fused: bool) -> None:
    options = dict(CASES[case])
    accumulate = options.pop("accumulate", 1)
    batches_ = data(options.pop("n"), **options)

    def make(parameters: Any) -> Optimizer:
        optimizer: Optimizer = kind(parameters, lr=0.05, fused=fused)
        return optimizer

    scaler, module = small_scaler(), Net(make)
    scales, updates = Scales(scaler), Recorder("after_update", "after_optimizer_step", "optimizer_step_skipped")
    callbacks = [GradientAccumulation(accumulate)] if accumulate > 1 else []
    trainer = train(module, batches_, *callbacks, MixedPrecision("fp16", scaler=scaler), scales, updates)

    expected, optimizer, other, other_scales, steps = by_hand(make, batches_, accumulate=accumulate)
    assert_same(module, trainer.optimizers[0], expected, optimizer)
    assert scaler.state_dict() == other.state_dict()
    assert scales.values == other_scales
    assert len(set(scales.values)) > 1  # the case shows something
    assert trainer.global_step == trainer.optimizers[0].num_steps == steps
    assert updates.count("after_update") == updates.count("after_optimizer_step") == steps
    assert updates.count("optimizer_step_skipped") == math.ceil(len(batches_) / accumulate) - steps


@FUSED
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_h2_clipping_equals_the_documentations_loop(algorithm: str, fused: bool) -> None:
    """Unscaled, then clipped, also with a fused optimizer (H4)."""

    def make(parameters: Any) -> Optimizer:
        return SGD(parameters, lr=0.5, momentum=0.9, fused=fused)

    def clip(parameters: Any) -> None:
        clip_grad_norm_(parameters, 0.1) if algorithm == "norm" else clip_grad_value_(parameters, 0.05)

    scaler, module, batches_ = small_scaler(), Net(make), data(7, bad=(3,))
    threshold = 0.1 if algorithm == "norm" else 0.05
    trainer = train(module, batches_, GradientClipping(threshold, algorithm), MixedPrecision("fp16", scaler=scaler))
    expected, optimizer, other, _, steps = by_hand(make, batches_, clip=clip)
    assert_same(module, trainer.optimizers[0], expected, optimizer)
    assert scaler.state_dict() == other.state_dict()
    assert trainer.global_step == steps == 6


@FUSED
def test_h2_accumulation_and_clipping_equal_the_documentations_loop(fused: bool) -> None:
    def make(parameters: Any) -> Optimizer:
        return Adam(parameters, lr=0.05, fused=fused)

    scaler, module, batches_ = small_scaler(), Net(make), data(8, bad=(2,))
    callbacks = [MixedPrecision("fp16", scaler=scaler), GradientClipping(0.1), GradientAccumulation(3)]
    trainer = train(module, batches_, *callbacks)
    clip = lambda parameters: clip_grad_norm_(parameters, 0.1)  # noqa: E731
    expected, optimizer, other, _, steps = by_hand(make, batches_, accumulate=3, clip=clip)
    assert_same(module, trainer.optimizers[0], expected, optimizer)
    assert scaler.state_dict() == other.state_dict()
    assert trainer.global_step == steps == 2


def test_h2_gradients_are_scaled_in_backward_and_unscaled_at_gradients_ready() -> None:
    seen: list[tuple[str, float]] = []

    def note(name: str) -> Callable[[Any, Any], None]:
        return lambda trainer, event: seen.append((name, gradient(trainer.module.w).item()))

    places = ("after_backward", "reduce_gradients", "gradients_ready", "before_optimizer_step", "before_gradient_clipping")
    precision = MixedPrecision("fp16", scaler=small_scaler())
    train(Probe(), [3.0], precision, On(**{name: note(name) for name in places}))
    assert seen == [(name, 192.0 if name in places[:2] else 3.0) for name in places]


def test_h2_the_default_scaler_is_torchs() -> None:
    precision = MixedPrecision("fp16")
    train(Probe(), 2, precision)
    assert precision.scaler is not None
    assert precision.scaler.state_dict() == {**GradScaler("cpu").state_dict(), "_growth_tracker": 2}


# ------------------------------------------------------------------ H2: vetoes


@pytest.mark.parametrize("first", [False, True], ids=["after the precision", "before the precision"])
def test_h2_a_veto_under_loss_scaling(first: bool) -> None:
    """The window's update is left out; scale and later updates are as if it had been a clean one."""
    scaler = eager_scaler()
    precision = MixedPrecision("fp16", scaler=scaler)
    veto = On(before_optimizer_step=lambda t, e: e.skip("mine") if t.batch_idx == 1 else None)
    scales, skipped, module = Scales(scaler), Recorder("optimizer_step_skipped"), Probe()
    trainer = train(module, 4, *([veto, precision] if first else [precision, veto]), scales, skipped)
    assert module.updates == [1.0, 3.0, 4.0]
    assert [event.reason for event in skipped.events] == ["mine"]
    assert scales.values == [16.0, 32.0, 64.0, 128.0]
    assert trainer.global_step == trainer.optimizers[0].num_steps == 3


def test_h2_a_vetoed_overflow_still_backs_off() -> None:
    scaler = eager_scaler()
    veto = On(before_optimizer_step=lambda t, e: e.skip("mine"))
    scales, module = Scales(scaler), Probe()
    train(module, [1.0, INF, 3.0], veto, MixedPrecision("fp16", scaler=scaler), scales)
    assert module.updates == []
    assert scales.values == [16.0, 8.0, 16.0]


def test_h2_a_veto_in_manual_mode() -> None:
    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        for optimizer, parameter in ((g, module.g), (d, module.d)):
            optimizer.zero_grad()
            module.manual_backward(parameter * x)
            optimizer.step()

    veto = On(before_optimizer_step=lambda t, e: e.skip("mine") if e.optimizer is t.optimizers[1] else None)
    module, trainer, _ = run_pair(step, 3, eager_scaler(), veto)
    assert module.g_updates == [1.0, 2.0, 3.0]
    assert module.d_updates == []
    assert [optimizer.num_steps for optimizer in trainer.optimizers] == [3, 0]
    assert trainer.global_step == 3


def test_h2_lbfgs_is_refused() -> None:
    module = Net(lambda parameters: LBFGS(parameters))
    with pytest.raises(MisconfigurationError, match=r"LBFGS evaluates its closure several times.*MixedPrecision\('bf16'\)"):
        train(module, data(1), MixedPrecision("fp16"))
    train(module, data(1), MixedPrecision("bf16"))


# ------------------------------------------------------------------ H3: overflows


def test_h3_an_overflow_changes_nothing_but_the_scale() -> None:
    class Module(Probe):
        def configure_optimizers(self) -> Any:
            optimizer = self.watch(Adam([self.w], lr=1.0))
            return [optimizer], [{"scheduler": LambdaLR(optimizer, lambda n: 0.5**n), "interval": "step"}]

    before: list[Any] = []

    def look(trainer: Any, event: Any) -> None:
        state = trainer.optimizers[0].state[trainer.module.w]
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        step = state["step"].item() if state else 0.0
        before.append((trainer.module.w.item(), step, scheduler.last_epoch, trainer.global_step))

    recorder = Recorder("optimizer_step_skipped", "after_optimizer_step", "after_update", "after_lr_scheduler_step")
    module = Module()
    precision = MixedPrecision("fp16", scaler=small_scaler())
    trainer = train(module, [1.0, INF, float("nan"), 4.0], LRSchedulerStepping(), precision, recorder, On(train_batch_end=look))
    assert before[0] == before[1] == before[2]
    assert before[3][1:] == (2.0, 2, 2)
    assert module.rates == [1.0, 0.5]
    updated = ["after_optimizer_step", "after_lr_scheduler_step", "after_update"]
    assert recorder.names[0] == recorder.names[5] == "after_optimizer_step"
    assert recorder.names[3:5] == ["optimizer_step_skipped"] * 2
    assert sorted(recorder.names[:3]) == sorted(recorder.names[5:]) == sorted(updated)
    assert [event.reason for event in recorder.events[3:5]] == ["overflow", "overflow"]
    assert trainer.global_step == trainer.optimizers[0].num_steps == 2


def test_h3_epoch_schedulers_wait_for_an_update_too() -> None:
    def configure(sgd: Any) -> Any:
        return [sgd], [LambdaLR(sgd, lambda n: 0.5**n)]

    trainer = train(Probe(configure=configure), [INF, INF], LRSchedulerStepping(), MixedPrecision("fp16"), max_epochs=2)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 0
    assert trainer.global_step == 0


def test_h3_in_manual_mode() -> None:
    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        module.manual_backward(module.g * x)
        g.step()

    skipped = Recorder("optimizer_step_skipped")
    module, trainer, scales = run_pair(step, [1.0, INF, 3.0], eager_scaler(), skipped)
    assert module.g_updates == [1.0, 3.0]
    assert [event.reason for event in skipped.events] == ["overflow"]
    assert scales == [16.0, 8.0, 16.0]
    assert trainer.global_step == 2


def test_h3_a_hundred_overflows_in_a_row_are_an_error() -> None:
    skipped = Recorder("optimizer_step_skipped")
    with pytest.raises(MisconfigurationError, match=r"100 steps in a row overflowed.*bf16.*max_consecutive_overflows"):
        train(Probe(), [INF] * 200, MixedPrecision("fp16"), skipped)
    assert skipped.count("optimizer_step_skipped") == 99
    train(Probe(), [INF] * 99 + [1.0] + [INF] * 99, MixedPrecision("fp16"))


def test_h3_the_number_is_settable() -> None:
    with pytest.raises(MisconfigurationError, match="3 steps in a row overflowed"):
        train(Probe(), [1.0, INF, INF, INF], MixedPrecision("fp16", max_consecutive_overflows=3))
    trainer = train(Probe(), [INF, INF, 1.0, INF, INF], MixedPrecision("fp16", max_consecutive_overflows=3))
    assert trainer.global_step == 1
