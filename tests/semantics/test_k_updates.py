"""K3. An update is whatever moved an optimizer's parameters by a step, also if torch's hooks do not see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import StepLR

from eventtrain import LightningModule, MisconfigurationError
from eventtrain.callbacks import (
    ExponentialMovingAverage,
    GradientAccumulation,
    GradientClipping,
    LearningRateMonitor,
    LRSchedulerStepping,
    MixedPrecision,
)
from tests.kit import Logged, On, Recorder, train
from tests.semantics.optimizers import MAKERS, SAM, BareSAM, Lookahead, with_method

XS = [torch.tensor([x, -x / 2]) for x in (1.0, 2.0, 3.0, 4.0)]


class Curve(LightningModule):
    """Two weights on a curve, whose optimizer the test makes.

    Args:
        make: Takes the parameters, and returns the optimizer.
        step: Steps the module in manual optimization: takes the module and the batch. None for automatic optimization.
        rate: Whether a scheduler halves the rate after each two updates.
        **methods: Hooks, without ``self``.
    """

    def __init__(
        self,
        make: Callable[[list[nn.Parameter]], Any],
        step: Callable[[Any, Tensor], Any] | None = None,
        *,
        rate: Any = False,
        **methods: Any,
    ) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.5]))
        self.make, self.step, self.rate = make, step, rate
        self.automatic_optimization = step is None
        for name, method in methods.items():
            setattr(self, name, method)

    def loss(self, batch: Tensor) -> Tensor:
        return ((self.w - batch).square() * 0.1).sum()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch) if self.step is None else self.step(self, batch)

    def configure_optimizers(self) -> Any:
        optimizer = self.make([self.w])
        if not self.rate:
            return optimizer
        return [optimizer], [{"scheduler": StepLR(optimizer, 2, gamma=0.5), "interval": "step"}]


def by_hand(make: Callable[[list[nn.Parameter]], Any], *, rate: bool = False) -> Tensor:
    """Return the weights that a plain loop gives."""
    module = Curve(make)
    optimizer = make([module.w])
    scheduler = StepLR(optimizer, 2, gamma=0.5) if rate else None
    for x in XS:
        optimizer.zero_grad()
        module.loss(x).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return module.w


def manually(model: Any, batch: Tensor) -> None:
    optimizer = model.optimizers()
    optimizer.zero_grad()
    model.manual_backward(model.loss(batch))
    optimizer.step()


def by_closure(model: Any, batch: Tensor) -> None:
    optimizer = model.optimizers()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(batch)
        model.manual_backward(loss)
        return loss  # type: ignore[no-any-return]

    optimizer.step(closure)


def by_raw_step(model: Any, batch: Tensor) -> None:
    optimizer = model.optimizers(use_pl_optimizer=False)
    optimizer.zero_grad()
    model.manual_backward(model.loss(batch))
    optimizer.step()


STEPS: dict[str, Any] = {"automatic": None, "manual": manually, "closure": by_closure, "raw": by_raw_step}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", MAKERS)
def test_k3_each_update_of_any_optimizer_counts_once(kind: str, step: str) -> None:
    module, events = Curve(MAKERS[kind], STEPS[step]), Recorder("after_update", "after_optimizer_step")
    trainer = train(module, XS, events)
    assert torch.equal(module.w, by_hand(MAKERS[kind]))
    assert trainer.global_step == trainer.optimizers[0].num_steps == events.count("after_update") == 4
    assert events.count("after_optimizer_step") == (0 if step == "raw" else 4)


@pytest.mark.parametrize("kind", ["lookahead", "empty hooks", "initialized", "handwritten", "a method on a lookahead"])
def test_k3_schedulers_averages_and_loggers_move_with_the_updates(kind: str) -> None:
    module, logged, average = Curve(MAKERS[kind], rate=True), Logged(), ExponentialMovingAverage(decay=0.5)
    trainer = train(module, XS, LRSchedulerStepping(), LearningRateMonitor(), average, logged)
    assert torch.equal(module.w, by_hand(MAKERS[kind], rate=True))
    assert [rate for name in logged.of_scope("step") for rate in name.values()] == [0.5, 0.5, 0.25, 0.25]
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4


@pytest.mark.parametrize("kind", MAKERS)
def test_k3_after_the_run_the_optimizer_is_as_it_was(kind: str) -> None:
    made: list[tuple[Optimizer, Any]] = []

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        optimizer = MAKERS[kind](parameters)
        made.append((optimizer, vars(optimizer).get("step")))
        return optimizer

    train(Curve(make), XS)
    ((optimizer, step),) = made
    assert vars(optimizer).get("step") is step


def test_k3_a_second_run_watches_the_same_optimizer_anew() -> None:
    optimizers: list[Any] = []

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        optimizers[:] = optimizers or [Lookahead(SGD(parameters, lr=0.5))]
        return optimizers[0]  # type: ignore[no-any-return]

    module = Curve(make, by_raw_step)
    for _ in range(2):
        assert train(module, XS).global_step == 4


def test_k3_a_step_that_is_replaced_during_the_run_counts() -> None:
    module = Curve(MAKERS["sgd"], manually)
    module.on_train_start = lambda: with_method(module.optimizers().optimizer)  # type: ignore[assignment]
    trainer = train(module, XS)
    assert torch.equal(module.w, by_hand(MAKERS["sgd"]))
    assert trainer.global_step == trainer.optimizers[0].num_steps == 4


def test_k3_a_scheduler_that_is_built_during_the_run_steps_without_a_warning() -> None:
    schedulers: list[Any] = []
    module = Curve(MAKERS["lookahead"])
    module.on_train_start = lambda: schedulers.append(StepLR(module.optimizers().optimizer, 2, gamma=0.5))  # type: ignore[method-assign]
    module.on_train_batch_end = lambda *args: schedulers[0].step()  # type: ignore[method-assign]
    trainer = train(module, XS)
    assert torch.equal(module.w, by_hand(MAKERS["lookahead"], rate=True))
    assert trainer.global_step == 4


@pytest.mark.parametrize("skip", [True, False])
def test_k3_a_vetoed_step_does_not_count(skip: bool) -> None:
    veto = On(before_optimizer_step=lambda trainer, event: event.skip("mine") if skip and trainer.batch_idx == 1 else None)
    trainer = train(Curve(MAKERS["lookahead"]), XS, veto)
    assert trainer.global_step == trainer.optimizers[0].num_steps == 4 - skip


@pytest.mark.parametrize("kind", ["sgd", "lookahead", "initialized"])
def test_k3_an_overflow_does_not_count(kind: str) -> None:
    """A scale of 2**127 overflows in the first batches, until it has been halved often enough."""
    scaler = GradScaler(device="cpu", init_scale=2.0**127, backoff_factor=2.0**-64)
    trainer = train(Curve(MAKERS[kind]), [x * 1000 for x in XS], MixedPrecision("fp16", scaler=scaler))
    assert 0 < trainer.global_step == trainer.optimizers[0].num_steps < 4


@pytest.mark.parametrize("kind", ["lookahead", "a method on the object"])
def test_k3_a_window_counts_once(kind: str) -> None:
    trainer = train(Curve(MAKERS[kind]), XS, GradientAccumulation(2))
    assert trainer.global_step == trainer.optimizers[0].num_steps == 2


# ------------------------------------------------------------------ methods other than step


def twice(model: Any, batch: Tensor) -> None:
    optimizer = model.optimizers()
    model.manual_backward(model.loss(batch))
    optimizer.first_step(zero_grad=True)
    model.manual_backward(model.loss(batch))
    optimizer.second_step(zero_grad=True)


def twice_raw(model: Any, batch: Tensor) -> None:
    optimizer = model.optimizers().optimizer
    model.manual_backward(model.loss(batch))
    optimizer.first_step(zero_grad=True)
    model.manual_backward(model.loss(batch))
    optimizer.second_step(zero_grad=True)


def sharpness_aware(*, clip: float | None = None, rho: float = 0.05) -> Tensor:
    """Return the weights of a plain loop of SAM."""
    module = Curve(MAKERS["sgd"])
    optimizer = SAM([module.w], lr=0.5, rho=rho)
    for x in XS:
        for step in (optimizer.first_step, optimizer.second_step):
            module.loss(x).backward()  # type: ignore[no-untyped-call]
            if clip is not None:
                nn.utils.clip_grad_norm_([module.w], clip)
            step(zero_grad=True)
    return module.w


def sam(parameters: list[nn.Parameter]) -> Optimizer:
    return SAM(parameters, lr=0.5)


@pytest.mark.parametrize("step", [twice, twice_raw])
def test_k3_sams_two_methods_are_one_update(step: Any) -> None:
    module, events = Curve(sam, step), Recorder("after_update", "after_optimizer_step")
    trainer = train(module, XS, events)
    assert torch.equal(module.w, sharpness_aware())
    assert trainer.global_step == trainer.optimizers[0].num_steps == events.count("after_update") == 4
    assert events.count("after_optimizer_step") == (4 if step is twice else 0)


def test_k3_methods_of_an_optimizer_that_holds_no_other_count_if_weights_move() -> None:
    module = Curve(lambda parameters: BareSAM(parameters, lr=0.5), twice)
    trainer = train(module, XS)
    assert torch.equal(module.w, sharpness_aware())
    assert trainer.global_step == 4


@pytest.mark.parametrize("name", ["step_all", "step1", "fullstep"])
def test_k3_a_method_counts_whose_name_begins_or_ends_with_step(name: str) -> None:
    def update(optimizer: Any) -> None:
        with torch.no_grad():
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.sub_(parameter.grad, alpha=0.5)

    def step(model: Any, batch: Tensor) -> None:
        model.optimizers().zero_grad()
        model.manual_backward(model.loss(batch))
        getattr(model.optimizers(), name)()

    module = Curve(lambda parameters: type("Other", (SGD,), {name: update})(parameters), step)
    assert train(module, XS).global_step == 4
    assert torch.allclose(module.w, by_hand(lambda parameters: SGD(parameters, lr=0.5)))


def test_k3_a_method_that_moves_nothing_does_not_count() -> None:
    class Telling(SGD):
        def last_step(self) -> int:
            return 7

    module = Curve(lambda parameters: Telling(parameters, lr=0.5), lambda model, batch: model.optimizers().last_step() and None)
    assert train(module, XS).global_step == 0


def test_k3_sams_gradients_are_clipped() -> None:
    module = Curve(sam, twice)
    train(module, XS, GradientClipping(0.1))
    assert torch.equal(module.w, sharpness_aware(clip=0.1))


def test_k3_sams_gradients_are_unscaled() -> None:
    plain = Curve(sam, twice)
    train(plain, XS, MixedPrecision("fp16", scaler=GradScaler(device="cpu", enabled=False)))
    scaled = Curve(sam, twice)
    trainer = train(scaled, XS, MixedPrecision("fp16", scaler=GradScaler(device="cpu", init_scale=256.0)))
    assert torch.equal(plain.w, scaled.w)
    assert trainer.global_step == 4


def test_k3_an_overflow_in_a_method_that_cannot_be_skipped_is_an_error() -> None:
    scaler = GradScaler(device="cpu", init_scale=2.0**127)
    with pytest.raises(MisconfigurationError, match="SAM, which cannot be skipped"):
        train(Curve(sam, twice), [x * 1000 for x in XS], MixedPrecision("fp16", scaler=scaler))


def test_k3_sam_in_optimizer_step_of_automatic_optimization() -> None:
    def optimizer_step(epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        closure()
        optimizer.first_step(zero_grad=True)
        closure()
        optimizer.second_step(zero_grad=True)

    module = Curve(sam, optimizer_step=optimizer_step)
    trainer = train(module, XS)
    assert torch.equal(module.w, sharpness_aware())
    assert trainer.global_step == trainer.optimizers[0].num_steps == 4


def test_k3_sams_own_step_evaluates_the_closure_twice_and_counts_once() -> None:
    module = Curve(sam)
    trainer = train(module, XS)
    assert torch.equal(module.w, sharpness_aware())
    assert trainer.global_step == trainer.optimizers[0].num_steps == 4


# ------------------------------------------------------------------ outside the batches


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_epoch_start"])
def test_k3_a_step_at_an_epochs_end_counts_at_once(hook: str) -> None:
    counts: list[int] = []

    def step() -> None:
        for _ in range(2):
            manually(module, XS[0])
            counts.append(module.global_step)

    module = Curve(MAKERS["sgd"], lambda model, batch: None, **{hook: step})
    events, logged = Recorder("after_update"), Logged()
    trainer = train(module, XS, LearningRateMonitor(), logged, events, max_epochs=2)
    assert counts == [1, 2, 3, 4] == [event.global_step for event in events.events]
    assert trainer.global_step == trainer.optimizers[0].num_steps == 4
    assert logged.of("lr-SGD") == [(n, 0.5) for n in counts]


def test_k3_a_raw_step_at_an_epochs_end_counts_at_once() -> None:
    module: Any = Curve(MAKERS["lookahead"], lambda model, batch: None, on_train_epoch_end=lambda: by_raw_step(module, XS[0]))
    updates = Recorder("after_update")
    assert train(module, XS, updates, max_epochs=3).global_step == updates.count("after_update") == 3


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_end", "on_validation_epoch_end"])
def test_k3_a_step_in_any_hook_counts(hook: str) -> None:
    def step() -> None:
        with torch.enable_grad():
            manually(module, XS[0])

    module = Curve(MAKERS["sgd"], lambda model, batch: None, validation_step=lambda batch, batch_idx: None, **{hook: step})
    trainer = train(module, XS, val=XS)
    assert trainer.global_step == trainer.optimizers[0].num_steps == 1


def test_k3_several_steps_of_a_batch_count_once_whatever_hook_takes_them() -> None:
    def step(*args: Any) -> None:
        manually(module, XS[0])
        manually(module, XS[0])

    module = Curve(MAKERS["sgd"], manually, on_train_batch_start=step, on_train_batch_end=step)
    updates = Recorder("after_update")
    trainer = train(module, XS, updates)
    assert trainer.global_step == updates.count("after_update") == 4
    assert trainer.optimizers[0].num_steps == 20


def test_k3_a_batch_that_steps_in_its_last_hook_alone_counts_once() -> None:
    module = Curve(MAKERS["sgd"], lambda model, batch: None)
    module.on_train_batch_end = lambda *args: [manually(module, XS[0]) for _ in range(2)]  # type: ignore[assignment,func-returns-value]
    updates, logged = Recorder("after_update"), Logged()
    trainer = train(module, XS, updates, LearningRateMonitor(), logged)
    assert trainer.global_step == updates.count("after_update") == 4
    assert [step for step, _ in logged.of("lr-SGD")] == [1, 2, 3, 4]


def test_k3_max_steps_counts_the_steps_of_epoch_ends() -> None:
    module: Any = Curve(MAKERS["sgd"], lambda model, batch: None, on_train_epoch_end=lambda: manually(module, XS[0]))
    trainer = train(module, XS, max_steps=3)
    assert (trainer.global_step, trainer.current_epoch) == (3, 3)


def test_k3_a_step_before_a_batch_that_ends_the_epoch_counts() -> None:
    def leave(batch: Any, batch_idx: int) -> int:
        manually(module, XS[0])
        return -1

    module = Curve(MAKERS["sgd"], manually, on_train_batch_start=leave)
    trainer = train(module, XS)
    assert (trainer.global_step, trainer.current_epoch) == (1, 1)
