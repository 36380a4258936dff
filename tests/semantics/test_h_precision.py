"""H. Precision: autocast, and loss scaling against the hand-written AMP loop of the PyTorch documentation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from eventtrain import LightningModule, MisconfigurationError
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping, MixedPrecision
from tests.kit import On, Probe, Recorder, batches, new_trainer, train

INF = float("inf")
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


def data(n: int, *, bad: tuple[int, ...] = ()) -> list[tuple[Tensor, Tensor]]:
    """A regression; the batches with the indices ``bad`` overflow in fp16, whatever the scale."""
    generator = torch.Generator().manual_seed(3)
    drawn = [(torch.randn(5, 4, generator=generator), torch.randn(5, 1, generator=generator)) for _ in range(n)]
    return [(x * 1e6 if i in bad else x, y) for i, (x, y) in enumerate(drawn)]


class Net(LightningModule):
    def __init__(self, make: Callable[[Any], Optimizer] = lambda parameters: AdamW(parameters, lr=0.05)) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        self.make = make

    def loss(self, batch: Any) -> Tensor:
        return mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def small_scaler(**changes: Any) -> GradScaler:
    """Grows after two clean updates, so that a short run sees it."""
    return GradScaler("cpu", **{"init_scale": 64.0, "growth_interval": 2, **changes})


def autocast(dtype: torch.dtype = torch.float16) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype)


class Scales(On):
    """Keeps the scale at the end of each batch, once every callback has seen it."""

    def __init__(self, scaler: GradScaler) -> None:
        self.kept: list[float] = []
        super().__init__(safe_point=lambda trainer, event: self.kept.append(scaler.get_scale()))


def assert_same(module: nn.Module, optimizer: Any, expected: nn.Module, expected_optimizer: Any) -> None:
    for (name, value), other in zip(module.state_dict().items(), expected.state_dict().values(), strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, other), name
    state, other_state = optimizer.state_dict()["state"], expected_optimizer.state_dict()["state"]
    assert state.keys() == other_state.keys()
    for index, values in other_state.items():
        for name, other in values.items():
            value = state[index][name]
            assert torch.equal(value, other) if isinstance(other, Tensor) else value == other, name


# ------------------------------------------------------------------ H1: autocast


class Watching(Net):
    """Keeps, at each place, which type a linear layer computes in there."""

    def __init__(self) -> None:
        super().__init__()
        self.at: dict[str, torch.dtype] = {}

    def note(self, place: str) -> None:
        with torch.no_grad():
            self.at[place] = nn.functional.linear(torch.ones(1, 4), self.net[0].weight).dtype

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note("training_step")
        loss = self.loss(batch)
        loss.register_hook(lambda _: self.note("backward"))
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

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
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
        loss.backward()
        optimizer.step()
    assert_same(module, trainer.optimizers[0], expected, optimizer)


class Manual(Net):
    """Several steps in each batch, each on a forward of its own."""

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
            other.scale(loss).backward()
            other.step(optimizer)
            other.update()
    assert_same(module, trainer.optimizers[0], expected, optimizer)
    if scaler is not None:
        assert scaler.state_dict() == other.state_dict()


def test_h1_in_manual_mode_backward_runs_outside_of_autocast() -> None:
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


def by_hand(
    make: Callable[[Any], Optimizer],
    batches_: list[Any],
    *,
    accumulate: int = 1,
    clip: Callable[[Any], Any] | None = None,
    scaler: GradScaler | None = None,
) -> tuple[Net, Optimizer, GradScaler, list[float], int]:
    """The loop of the AMP examples, with accumulation; a short window is normalised as rule B3 says.

    Returns:
        The module, its optimizer, the scaler, the scale after each batch, and the number of updates.
    """
    module = Net(make)
    optimizer = module.configure_optimizers()
    updates: list[None] = []
    optimizer.register_step_post_hook(lambda *_: updates.append(None))
    scaler = scaler or small_scaler()
    scales: list[float] = []
    skipped = held = 0
    for i, batch in enumerate(batches_):
        with autocast():
            loss = module.loss(batch)
        if held == 0:
            optimizer.zero_grad()
        scaler.scale(loss / accumulate if accumulate > 1 else loss).backward()
        held += 1
        if held == accumulate or i == len(batches_) - 1:
            scaler.unscale_(optimizer)
            if held != accumulate:
                for parameter in module.parameters():
                    parameter.grad.mul_(accumulate / held)
            if clip is not None:
                clip(module.parameters())
            overflow = not all(bool(p.grad.isfinite().all()) for p in module.parameters())
            scaler.step(optimizer)
            scaler.update()
            skipped += overflow
            held = 0
        scales.append(scaler.get_scale())
    windows = math.ceil(len(batches_) / accumulate)
    return module, optimizer, scaler, scales, windows - skipped


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
        return kind(parameters, lr=0.05, fused=fused)

    scaler, module = small_scaler(), Net(make)
    scales, updates = Scales(scaler), Recorder("after_update", "after_optimizer_step", "optimizer_step_skipped")
    callbacks = [GradientAccumulation(accumulate)] if accumulate > 1 else []
    trainer = train(module, batches_, *callbacks, MixedPrecision("fp16", scaler=scaler), scales, updates)

    expected, optimizer, other, other_scales, steps = by_hand(make, batches_, accumulate=accumulate)
    assert_same(module, trainer.optimizers[0], expected, optimizer)
    assert scaler.state_dict() == other.state_dict()
    assert scales.kept == other_scales
    assert len(set(scales.kept)) > 1  # the case shows something
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
        return lambda trainer, event: seen.append((name, trainer.module.w.grad.item()))

    places = ("after_backward", "reduce_gradients", "gradients_ready", "before_optimizer_step", "before_gradient_clipping")
    precision = MixedPrecision("fp16", scaler=small_scaler())
    train(Probe(), [3.0], precision, On(**{name: note(name) for name in places}))
    assert seen == [(name, 192.0 if name in places[:2] else 3.0) for name in places]


def test_h2_the_default_scaler_is_torchs() -> None:
    precision = MixedPrecision("fp16")
    train(Probe(), 2, precision)
    assert precision.scaler is not None
    assert precision.scaler.state_dict() == {**GradScaler("cpu").state_dict(), "_growth_tracker": 2}


# ------------------------------------------------------------------ H2: several optimizers


class Pair(LightningModule):
    """Two numbers with an optimizer each; the test writes the training step."""

    def __init__(self, step: Callable[[Any, Any, Any, Tensor, int], None]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.g = nn.Parameter(torch.zeros(()))
        self.d = nn.Parameter(torch.zeros(()))
        self.step = step
        self.g_updates: list[float] = []
        self.d_updates: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        g_optimizer, d_optimizer = self.optimizers()
        self.step(self, g_optimizer, d_optimizer, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        g, d = SGD([self.g], lr=1.0), SGD([self.d], lr=1.0)
        g.register_step_post_hook(lambda *_: self.g_updates.append(self.g.grad.item()))
        d.register_step_post_hook(lambda *_: self.d_updates.append(self.d.grad.item()))
        return g, d


def eager_scaler(**changes: Any) -> GradScaler:
    """The scale doubles at every update: whoever unscales by another scale than the one of backward is seen."""
    return GradScaler("cpu", **{"init_scale": 8.0, "growth_interval": 1, **changes})


def run_pair(step: Any, xs: Any, scaler: GradScaler, *callbacks: Any) -> tuple[Pair, Any, list[float]]:
    module, scales = Pair(step), Scales(scaler)
    trainer = train(module, xs, MixedPrecision("fp16", scaler=scaler), scales, *callbacks)
    return module, trainer, scales.kept


def test_h2_two_optimizers_whose_backwards_come_first() -> None:
    """Lightning: the second is unscaled by the scale after the first's update, 1.0 becomes 0.5."""

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        d.zero_grad()
        module.manual_backward(module.g * x)
        module.manual_backward(module.d * x)
        g.step()
        d.step()

    module, trainer, scales = run_pair(step, 3, eager_scaler())
    assert module.g_updates == module.d_updates == [1.0, 2.0, 3.0]
    assert scales == [16.0, 32.0, 64.0]  # one update for each batch, as in the documentation
    assert trainer.global_step == 3
    assert [optimizer.num_steps for optimizer in trainer.optimizers] == [3, 3]


def test_h2_one_of_two_overflows() -> None:
    """It alone is skipped, and the scale backs off once, as in the documentation."""

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        d.zero_grad()
        module.manual_backward(module.g * (INF if batch_idx == 1 else x))
        module.manual_backward(module.d * x)
        g.step()
        d.step()

    module, trainer, scales = run_pair(step, 3, eager_scaler())
    assert module.g_updates == [1.0, 3.0]
    assert module.d_updates == [1.0, 2.0, 3.0]
    assert scales == [16.0, 8.0, 16.0]
    assert trainer.global_step == 3
    assert [optimizer.num_steps for optimizer in trainer.optimizers] == [2, 3]


def test_h2_both_overflow_and_nothing_is_counted() -> None:
    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        d.zero_grad()
        module.manual_backward((module.g + module.d) * x)
        g.step()
        d.step()

    module, trainer, scales = run_pair(step, [1.0, INF, 3.0], eager_scaler())
    assert module.g_updates == module.d_updates == [1.0, 3.0]
    assert scales == [16.0, 8.0, 16.0]
    assert trainer.global_step == 2


def critic(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
    for i in range(5):
        d.zero_grad()
        module.manual_backward(module.d * (x + i))
        d.step()
    g.zero_grad()
    module.manual_backward(module.g * x)
    g.step()


def test_h2_five_critic_steps_a_batch() -> None:
    """The scale changes between them, where the critic is zeroed again; each is unscaled by what it was scaled with."""
    module, trainer, scales = run_pair(critic, 2, eager_scaler())
    assert module.d_updates == [1.0, 2.0, 3.0, 4.0, 5.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert module.g_updates == [1.0, 2.0]
    assert scales == [8.0 * 2**5, 8.0 * 2**10]  # an update for each critic step, as written by hand
    assert [optimizer.num_steps for optimizer in trainer.optimizers] == [2, 10]
    assert trainer.global_step == 2


def test_h2_critic_steps_while_another_holds_scaled_gradients() -> None:
    """The generator's backward came first, so the scale is kept until it steps."""
    scales_within: list[float] = []

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        module.manual_backward(module.g * x)
        for i in range(3):
            d.zero_grad()
            module.manual_backward(module.d * (x + i))
            d.step()
            scales_within.append(scaler.get_scale())
        g.step()

    scaler = eager_scaler()
    module, _, scales = run_pair(step, 2, scaler)
    assert module.d_updates == [1.0, 2.0, 3.0, 2.0, 3.0, 4.0]
    assert module.g_updates == [1.0, 2.0]
    assert scales_within == [8.0, 8.0, 8.0, 16.0, 16.0, 16.0]
    assert scales == [16.0, 32.0]


def test_h2_an_overflow_while_the_scale_is_kept_still_backs_off_later() -> None:
    """The second of three critic steps overflows, the third does not."""

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        module.manual_backward(module.g * x)
        for factor in (1.0, INF, 3.0):
            d.zero_grad()
            module.manual_backward(module.d * factor)
            d.step()
        g.step()

    skipped = Recorder("optimizer_step_skipped")
    module, trainer, scales = run_pair(step, 2, eager_scaler(), skipped)
    assert module.d_updates == [1.0, 3.0, 1.0, 3.0]
    assert module.g_updates == [1.0, 2.0]
    assert scales == [4.0, 2.0]
    assert [event.reason for event in skipped.events] == ["overflow", "overflow"]
    assert [optimizer.num_steps for optimizer in trainer.optimizers] == [2, 4]


@pytest.mark.parametrize("zeroes_first", [False, True], ids=["zero after step", "zero before backward"])
def test_h2_a_discriminator_accumulating_by_hand_beside_a_generator_that_steps(zeroes_first: bool) -> None:
    """D = -5 on the probe: means 1.5 and 3.5; G steps on each of 1, 2, 3, 4."""

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        module.manual_backward(module.g * x)
        g.step()
        if zeroes_first and batch_idx % 2 == 0:
            d.zero_grad()
        module.manual_backward(module.d * x / 2)
        held.append(scaler.get_scale())
        if (batch_idx + 1) % 2 == 0:
            d.step()
            if not zeroes_first:
                d.zero_grad()

    held: list[float] = []
    scaler = eager_scaler()
    module, trainer, _ = run_pair(step, 4, scaler)
    assert module.d.item() == -5.0
    assert module.d_updates == [1.5, 3.5]
    assert module.g.item() == -10.0
    assert module.g_updates == [1.0, 2.0, 3.0, 4.0]
    assert held == [8.0, 8.0, 16.0, 16.0]  # kept while D holds scaled gradients, and no longer
    assert trainer.global_step == 4


def test_h2_an_overflow_beside_an_open_window_backs_off_once_it_is_closed() -> None:
    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        module.manual_backward(module.g * (INF if batch_idx == 0 else x))
        g.step()
        module.manual_backward(module.d * x / 2)
        held.append(scaler.get_scale())
        if (batch_idx + 1) % 2 == 0:
            d.step()
            d.zero_grad()

    held: list[float] = []
    scaler = eager_scaler()
    module, _, _ = run_pair(step, 4, scaler)
    assert module.g_updates == [2.0, 3.0, 4.0]
    assert module.d_updates == [1.5, 3.5]
    assert held == [8.0, 8.0, 4.0, 4.0]


def test_h2_an_optimizer_that_steps_rarely_does_not_hold_the_scale() -> None:
    """Gradients that it has stepped with, and not zeroed yet, are not scaled: another's overflow backs off."""

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        if batch_idx % 8 == 0:
            g.zero_grad()
            module.manual_backward(module.g)
            g.step()
        d.zero_grad()
        module.manual_backward(module.d * 4.0)  # overflows until the scale has backed off to 2 ** 125
        d.step()

    scaler = GradScaler("cpu", init_scale=2.0**127)
    module, trainer, scales = run_pair(step, 8, scaler)
    assert module.g_updates == [1.0]
    assert module.d_updates == [4.0] * 6
    assert scales == [2.0**126] + [2.0**125] * 7
    assert [optimizer.num_steps for optimizer in trainer.optimizers] == [1, 6]


def test_h2_an_optimizer_stepped_again_without_zeroing_keeps_the_scale() -> None:
    """Gradients that pile up from one backward to the next, as torch's scaler alone would refuse."""

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        module.manual_backward(module.g * x)
        g.step()
        d.zero_grad()
        module.manual_backward(module.d * x)
        d.step()
        g.zero_grad()
        module.manual_backward(module.g * x)
        g.step()

    module, _, _ = run_pair(step, 3, eager_scaler())
    assert module.g_updates == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    assert module.d_updates == [1.0, 2.0, 3.0]


def test_h2_gradients_that_were_zeroed_do_not_hold_the_scale() -> None:
    """G's backward of the first batch is thrown away, and G does nothing afterwards."""

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        if batch_idx == 0:
            module.manual_backward(module.g * x)
            g.zero_grad()
        d.zero_grad()
        module.manual_backward(module.d * x)
        d.step()

    module, _, scales = run_pair(step, 3, eager_scaler())
    assert module.d_updates == [1.0, 2.0, 3.0]
    assert scales == [16.0, 32.0, 64.0]


def test_h2_a_backward_through_the_other_model_leaves_it_right() -> None:
    """The usual GAN that does not detach: D's loss leaves scaled gradients in G, which G zeroes next."""

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        module.manual_backward(module.g * x)
        g.step()
        d.zero_grad()
        module.manual_backward(module.d * x + module.g * 100.0)
        d.step()

    module, _, _ = run_pair(step, 4, eager_scaler())
    assert module.g_updates == module.d_updates == [1.0, 2.0, 3.0, 4.0]


def test_h2_gan_equals_the_hand_written_loop() -> None:
    """Two small networks, discriminator first, an overflow, growth and backoff."""

    class Gan(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.automatic_optimization = False
            self.generator = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
            self.discriminator = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

        def d_loss(self, x: Tensor) -> Tensor:
            real, fake = self.discriminator(x), self.discriminator(self.generator(x.flip(0)).detach())
            return mse_loss(real, torch.ones(5, 1)) + mse_loss(fake, torch.zeros(5, 1))

        def g_loss(self, x: Tensor) -> Tensor:
            return mse_loss(self.discriminator(self.generator(x.flip(0))), torch.ones(5, 1))

        def training_step(self, batch: Any, batch_idx: int) -> None:
            g, d = self.optimizers()
            d_loss = self.d_loss(batch[0])
            d.zero_grad()
            self.manual_backward(d_loss)
            g.zero_grad()
            with self.toggled_optimizer(g):
                self.manual_backward(self.g_loss(batch[0]))
            d.step()
            g.step()

        def configure_optimizers(self) -> Any:
            return [Adam(net.parameters(), lr=0.02) for net in (self.generator, self.discriminator)]

    batches_, scaler, module = data(8, bad=(3,)), small_scaler(), Gan()
    trainer = train(module, batches_, MixedPrecision("fp16", scaler=scaler))

    expected, other = Gan(), small_scaler()
    g, d = expected.configure_optimizers()
    for x, _ in batches_:
        with autocast():
            d_loss = expected.d_loss(x)
        d.zero_grad()
        other.scale(d_loss).backward()
        g.zero_grad()
        expected.discriminator.requires_grad_(False)
        with autocast():
            g_loss = expected.g_loss(x)
        other.scale(g_loss).backward()
        expected.discriminator.requires_grad_(True)
        other.step(d)
        other.step(g)
        other.update()
    assert_same(module, trainer.optimizers[0], expected, g)
    assert_same(module, trainer.optimizers[1], expected, d)
    assert scaler.state_dict() == other.state_dict()
    assert trainer.global_step == 7


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
    assert scales.kept == [16.0, 32.0, 64.0, 128.0]
    assert trainer.global_step == trainer.optimizers[0].num_steps == 3


def test_h2_a_vetoed_overflow_still_backs_off() -> None:
    scaler = eager_scaler()
    veto = On(before_optimizer_step=lambda t, e: e.skip("mine"))
    scales, module = Scales(scaler), Probe()
    train(module, [1.0, INF, 3.0], veto, MixedPrecision("fp16", scaler=scaler), scales)
    assert module.updates == []
    assert scales.kept == [16.0, 8.0, 16.0]


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


# ------------------------------------------------------------------ H4: what else is stepped


@FUSED
def test_h4_closure_then_step_in_the_hook_trains(fused: bool) -> None:
    """Lightning: never updates."""

    class Own(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
            optimizer_closure()
            optimizer.step()

    def make(parameters: Any) -> Optimizer:
        return Adam(parameters, lr=0.05, fused=fused)

    scaler, batches_ = small_scaler(), data(7, bad=(2,))
    module = Own(make)
    trainer = train(module, batches_, GradientClipping(0.1), MixedPrecision("fp16", scaler=scaler))
    clip = lambda parameters: clip_grad_norm_(parameters, 0.1)  # noqa: E731
    expected, optimizer, other, _, steps = by_hand(make, batches_, clip=clip)
    assert_same(module, trainer.optimizers[0], expected, optimizer)
    assert scaler.state_dict() == other.state_dict()
    assert trainer.global_step == trainer.optimizers[0].num_steps == steps == 6


def test_h4_a_hook_that_steps_every_other_batch_trains() -> None:
    class Own(Probe):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
            optimizer_closure()
            if batch_idx % 2 == 1:
                optimizer.step()

    scaler, module = eager_scaler(), Own()
    trainer = train(module, 4, MixedPrecision("fp16", scaler=scaler))
    assert module.updates == [2.0, 4.0]
    assert trainer.global_step == 2


def test_h4_an_optimizer_without_gradients_is_skipped_under_a_scaler() -> None:
    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        d.zero_grad()
        module.manual_backward(module.g * x)
        d.step()
        g.step()

    skipped = Recorder("optimizer_step_skipped")
    module, trainer, scales = run_pair(step, 3, eager_scaler(), skipped)
    assert module.g_updates == [1.0, 2.0, 3.0]
    assert [(event.reason, event.optimizer is trainer.optimizers[1]) for event in skipped.events] == [
        ("no gradients", True)
    ] * 3
    assert [optimizer.num_steps for optimizer in trainer.optimizers] == [3, 0]
    assert scales == [16.0, 32.0, 64.0]


def test_h4_a_batch_in_which_no_optimizer_has_gradients_counts_nothing() -> None:
    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.step()
        d.step()

    module, trainer, scales = run_pair(step, 2, eager_scaler())
    assert trainer.global_step == 0
    assert scales == [8.0, 8.0]


class Apart(Probe):
    """The optimizer's parameter takes no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.zeros(()))

    def configure_optimizers(self) -> Any:
        return SGD([self.other], lr=1.0)


def test_h4_an_automatic_optimizer_without_gradients_is_skipped_under_a_scaler() -> None:
    skipped = Recorder("optimizer_step_skipped")
    trainer = train(Apart(), 2, MixedPrecision("fp16"), skipped)
    assert [event.reason for event in skipped.events] == ["no gradients", "no gradients"]
    assert trainer.global_step == 0


@pytest.mark.parametrize("callbacks", [(), ("bf16",)], ids=["float32", "bf16"])
def test_h4_without_a_scaler_the_step_is_torchs_own_business(callbacks: tuple[Any, ...]) -> None:
    skipped = Recorder("optimizer_step_skipped", "after_optimizer_step")
    trainer = train(Apart(), 2, *map(MixedPrecision, callbacks), skipped)
    assert skipped.names == ["after_optimizer_step"] * 2
    assert trainer.global_step == trainer.optimizers[0].num_steps == 2


@FUSED
@pytest.mark.parametrize("kind", [SGD, Adam, AdamW], ids=["SGD", "Adam", "AdamW"])
def test_h4_fused_optimizers_with_clipping(kind: Any, fused: bool) -> None:
    """Four gradients of 3.0 under the scale 1024, norm 1.0: 0.5 each."""

    class Module(Probe):
        def configure_optimizers(self) -> Any:
            return self.watch(kind([self.w], lr=1.0, fused=fused))

    module = Module(width=4)
    norms = Recorder("after_gradient_clipping")
    train(module, [3.0], GradientClipping(1.0), MixedPrecision("fp16", scaler=small_scaler(init_scale=1024.0)), norms)
    assert torch.tensor(module.updates[0]).allclose(torch.full((4,), 0.5))
    assert norms.events[0].total_norm.item() == 6.0


@pytest.mark.parametrize(("algorithm", "expected"), [("norm", 0.5), ("value", 1.0)])
@FUSED
def test_h4_clip_gradients_in_manual_mode(algorithm: str, expected: float, fused: bool) -> None:
    """Unscales first, once: the step that follows does not divide again. Lightning: 0.0039."""
    norms: list[Any] = []

    class Module(Probe):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            norms.append(self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm=algorithm))
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return self.watch(SGD([self.w], lr=1.0, fused=fused))

    module, scaler = Module(width=4, automatic=False), small_scaler(init_scale=1024.0)
    trainer = train(module, [3.0, INF, 3.0], MixedPrecision("fp16", scaler=scaler))
    assert len(module.updates) == 2
    for update in module.updates:
        assert torch.tensor(update).allclose(torch.full((4,), expected))
    if algorithm == "norm":
        assert norms[0].item() == norms[2].item() == 6.0
    else:
        assert norms[0] is None
    assert trainer.global_step == 2
    assert scaler.get_scale() == 512.0


def test_h4_manual_closures_under_a_scaler() -> None:
    class Module(Probe):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                loss = self.loss(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

    module = Module(automatic=False)
    trainer = train(module, [1.0, INF, 3.0], MixedPrecision("fp16", scaler=eager_scaler()))
    assert module.updates == [1.0, 3.0]
    assert trainer.global_step == 2


# ------------------------------------------------------------------ H5: the scaler's state


def test_h5_the_scalers_state_is_in_the_checkpoint(tmp_path: Any) -> None:
    path = tmp_path / "checkpoint.pt"
    scaler = small_scaler()
    save = On(train_epoch_start=lambda t, e: t.save_checkpoint(path) if e.epoch == 1 else None)
    kept: list[Any] = []
    look = On(save_checkpoint=lambda t, e: kept.append((e.checkpoint["callbacks"], scaler.state_dict())))
    batches_ = data(5, bad=(1,))
    module = Net()
    whole = train(module, batches_, MixedPrecision("fp16", scaler=scaler), save, look, max_epochs=3)
    callbacks, at_the_time = kept[0]
    assert at_the_time["scale"] == 64.0
    assert at_the_time["_growth_tracker"] == 1
    assert callbacks["MixedPrecision"]["scaler"] == at_the_time

    resumed, other = Net(), small_scaler(init_scale=2.0)
    trainer = new_trainer(MixedPrecision("fp16", scaler=other), max_epochs=3)
    trainer.fit(resumed, batches_, ckpt_path=path)
    assert other.state_dict() == scaler.state_dict()
    assert_same(resumed, trainer.optimizers[0], module, whole.optimizers[0])
    assert trainer.global_step == whole.global_step == 12


def test_h5_the_default_scalers_state_is_in_the_checkpoint(tmp_path: Any) -> None:
    path = tmp_path / "checkpoint.pt"
    save = On(train_epoch_start=lambda t, e: t.save_checkpoint(path) if e.epoch == 1 else None)
    train(Probe(), [INF, INF, 1.0], MixedPrecision("fp16"), save, max_epochs=2)
    precision = MixedPrecision("fp16")
    trainer = new_trainer(precision, max_epochs=1)
    trainer.fit(Probe(), batches(1), ckpt_path=path)
    assert precision.scaler is not None
    assert precision.scaler.get_scale() == 65536.0 / 4


def test_h5_overflows_in_a_row_are_in_the_checkpoint(tmp_path: Any) -> None:
    path = tmp_path / "checkpoint.pt"
    save = On(train_epoch_start=lambda t, e: t.save_checkpoint(path) if e.epoch == 1 else None)
    train(Probe(), [1.0, INF, INF], MixedPrecision("fp16"), save, max_epochs=2)
    with pytest.raises(MisconfigurationError, match="3 steps in a row"):
        new_trainer(MixedPrecision("fp16", max_consecutive_overflows=3), max_epochs=2).fit(
            Probe(), batches([INF]), ckpt_path=path
        )


def test_h5_bf16_uses_no_scaler() -> None:
    losses: list[tuple[float, float]] = []
    look = On(before_backward=lambda t, e: losses.append((e.loss.item(), e.raw_loss.item())))
    precision, module = MixedPrecision("bf16"), Probe()
    recorder = Recorder("optimizer_step_skipped")
    train(module, [1.0, 2.0, INF], precision, look, recorder)
    assert precision.scaler is None
    assert losses == [(0.0, 0.0), (-2.0, -2.0), (-INF, -INF)]
    assert module.updates == [1.0, 2.0, INF]
    assert recorder.names == []
    with pytest.raises(MisconfigurationError, match=r"MixedPrecision\('bf16', scaler=\.\.\.\)"):
        MixedPrecision("bf16", scaler=GradScaler("cpu"))


class Raw(Probe):
    """Steps the wrapped optimizer."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.optimizer.step(closure=optimizer_closure)


@pytest.mark.parametrize("kind", [Probe, Raw])
@pytest.mark.parametrize(
    ("nothing_for", "expected"),
    [([2.0], [1.0, 3.5]), ([1.0], [2.0, 3.5]), ([1.0, 2.0], [3.5]), ([4.0], [1.5, 3.0])],
)
def test_h5_a_none_loss_in_the_closing_batch_keeps_the_windows_gradients(
    nothing_for: list[float], expected: list[float], kind: Any
) -> None:
    module, scaler = kind(nothing_for=nothing_for), eager_scaler()
    trainer = train(module, 4, GradientAccumulation(2), MixedPrecision("fp16", scaler=scaler))
    assert module.updates == expected
    assert trainer.global_step == len(expected)
    assert scaler.get_scale() == 8.0 * 2 ** len(expected)


def test_h5_a_dropped_window_does_not_hold_the_scale_for_ever() -> None:
    """Three batches, N = 2: what is left of each epoch is discarded, scaled as it is."""
    module, scaler = Probe(), eager_scaler()
    scales = Scales(scaler)
    train(module, 3, GradientAccumulation(2, remainder="drop"), MixedPrecision("fp16", scaler=scaler), scales, max_epochs=3)
    assert module.updates == [1.5, 1.5, 1.5]
    assert scales.kept == [8.0, 16.0, 16.0, 16.0, 32.0, 32.0, 32.0, 64.0, 64.0]


def test_h5_carried_windows_are_unscaled_by_the_scale_they_were_scaled_with() -> None:
    module, scaler = Probe(), eager_scaler()
    train(module, 3, GradientAccumulation(2, remainder="carry"), MixedPrecision("fp16", scaler=scaler), max_epochs=2)
    assert module.updates == [1.5, 2.0, 2.5]
    assert scaler.get_scale() == 64.0


def test_h2_a_second_run_of_the_same_callback_begins_anew() -> None:
    """What an unfinished run held does not bind the next."""
    scaler = eager_scaler()
    precision = MixedPrecision("fp16", scaler=scaler)
    trainer = new_trainer(precision, GradientAccumulation(4, remainder="drop"), max_epochs=1)
    stop = On(train_batch_end=lambda trainer, event: trainer.stop("enough") if event.batch_idx == 1 else None)
    with_stop = new_trainer(precision, GradientAccumulation(4), stop)
    with_stop.fit(Probe(), batches(5))
    module = Probe()
    trainer.fit(module, batches(4))
    assert module.updates == [2.5]
    assert scaler.get_scale() == 16.0


def test_h2_scaled_gradients_on_top_of_unscaled_ones_are_an_error() -> None:
    """Their sum means nothing: 1, 2.06, 3.06 in place of 1, 3, 6 where nobody says so."""

    class NeverZeroed(Probe):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            self.optimizers().step()

    with pytest.raises(MisconfigurationError, match=r"(?s)SGD.*unscaled already.*zero_grad"):
        train(NeverZeroed(), 2, MixedPrecision("fp16", scaler=GradScaler("cpu", init_scale=16.0)))


def test_h2_gradients_dropped_by_the_module_are_not_mistaken_for_unscaled_ones() -> None:
    class ZeroedByTheModule(Probe):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.zero_grad()
            self.manual_backward(self.loss(batch))
            self.optimizers().step()

    module = ZeroedByTheModule()
    train(module, 3, MixedPrecision("fp16", scaler=GradScaler("cpu", init_scale=16.0)))
    assert module.w.item() == -6.0
