"""E. Manual optimization."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.amp import GradScaler
from torch.optim import LBFGS, SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, StepLR

from eventtrain import LightningModule, LightningOptimizer, MisconfigurationError
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping, MixedPrecision
from tests.kit import On, Probe, Recorder, batches, train
from tests.reference import backward
from tests.semantics.modules import Manual, Pair

# ------------------------------------------------------------------ E1: the calls of a module


def test_e1_the_minimal_step_of_the_guide() -> None:
    module = Manual()
    trainer = train(module, 3, max_epochs=2)
    assert module.updates == [1.0, 2.0, 3.0] * 2 and trainer.global_step == 6 and trainer.current_epoch == 2


def one(sgd: Any) -> Any:
    return LambdaLR(sgd, lambda step: 1.0)


@pytest.mark.parametrize(
    "configure",
    [
        lambda sgd: sgd,
        lambda sgd: [sgd],
        lambda sgd: {"optimizer": sgd},
        lambda sgd: [{"optimizer": sgd}],
        lambda sgd: ([sgd], []),
    ],
)
def test_e1_one_optimizer_in_any_form_is_one_object(configure: Any) -> None:
    module = Manual(configure=configure)
    train(module, 2)
    assert isinstance(module.optimizers(), LightningOptimizer) and module.optimizers().optimizer is module.sgd
    assert module.optimizers(use_pl_optimizer=False) is module.sgd
    assert module.lr_schedulers() is None


@pytest.mark.parametrize(
    "configure",
    [
        lambda sgd, scheduler: (sgd, scheduler),
        lambda sgd, scheduler: ([sgd], [scheduler]),
        lambda sgd, scheduler: ([sgd], [{"scheduler": scheduler, "interval": "step"}]),
        lambda sgd, scheduler: {"optimizer": sgd, "lr_scheduler": scheduler},
        lambda sgd, scheduler: {"optimizer": sgd, "lr_scheduler": {"scheduler": scheduler}},
        lambda sgd, scheduler: [{"optimizer": sgd, "lr_scheduler": scheduler}],
    ],
)
def test_e1_one_scheduler_in_any_form_is_one_object(configure: Any) -> None:
    made: list[Any] = []

    def configured(sgd: Any) -> Any:
        made.append(one(sgd))
        return configure(sgd, made[0])

    module = Manual(configure=configured)
    train(module, 2)
    assert module.lr_schedulers() is made[0]


@pytest.mark.parametrize(
    "configure",
    [
        lambda a, b, schedulers: ([a, b], schedulers),
        lambda a, b, schedulers: [{"optimizer": o, "lr_scheduler": s} for o, s in zip((a, b), schedulers, strict=True)],
        lambda a, b, schedulers: tuple(
            {"optimizer": o, "lr_scheduler": {"scheduler": s}} for o, s in zip((a, b), schedulers, strict=True)
        ),
    ],
)
def test_e1_several_are_lists_in_the_order_given(configure: Any) -> None:
    made: list[Any] = []

    def configured(a: Any, b: Any) -> Any:
        made.extend([one(a), one(b)])
        return configure(a, b, made)

    module = Pair(configure=configured)
    train(module, 1)
    optimizers = module.optimizers()
    assert isinstance(optimizers, list) and [o.param_groups[0]["params"] for o in optimizers] == [[module.a], [module.b]]
    assert all(isinstance(optimizer, LightningOptimizer) for optimizer in optimizers)
    assert [type(optimizer) for optimizer in module.optimizers(use_pl_optimizer=False)] == [SGD, SGD]
    schedulers = module.lr_schedulers()
    assert isinstance(schedulers, list) and schedulers == made


def test_e1_the_same_wrapper_is_given_every_time() -> None:
    seen: list[Any] = []

    def step(module: Any, batch: Any, batch_idx: int) -> None:
        seen.append([id(optimizer) for optimizer in module.optimizers()])

    train(Pair(step), 3)
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize(
    "optimizer", [lambda w: LBFGS([w], lr=0.5, max_iter=3), lambda w: Adam([w], lr=0.1)], ids=["lbfgs", "adam"]
)
def test_e1_step_with_a_closure(optimizer: Any) -> None:
    def quadratic(w: Any, x: Any) -> Any:
        return ((w - x) ** 2 + w**4).sum()

    returned: list[float] = []

    class WithClosure(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            opt = self.optimizers()

            def closure() -> Any:
                loss = quadratic(self.w, batch)
                opt.zero_grad()
                self.manual_backward(loss)
                return loss

            returned.append(opt.step(closure=closure).item())

    module = WithClosure()
    module.configure = lambda _: optimizer(module.w)
    recorder = Recorder("after_optimizer_step", "before_backward", "before_optimizer_step", "after_update")
    trainer = train(module, 3, recorder)

    w = nn.Parameter(torch.zeros(1))
    opt = optimizer(w)
    expected: list[float] = []
    evaluations = 0
    for x in batches(3):

        def closure(x: Any = x) -> Any:
            nonlocal evaluations
            evaluations += 1
            loss = quadratic(w, x)
            opt.zero_grad()
            backward(loss)
            return loss

        expected.append(opt.step(closure).item())
    assert torch.equal(module.w, w) and returned == expected and trainer.global_step == 3
    assert recorder.count("before_backward") == recorder.count("before_optimizer_step") == evaluations
    assert recorder.count("after_optimizer_step") == recorder.count("after_update") == 3


def test_e1_an_optimizer_that_never_runs_its_closure_is_an_error() -> None:
    class NeverEvaluates(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step()

    class WithClosure(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().step(closure=lambda: self.loss(batch))

    module = WithClosure()
    module.configure = lambda _: NeverEvaluates([module.w], lr=1.0)
    with pytest.raises(MisconfigurationError, match=r"(?s)NeverEvaluates.*closure"):
        train(module, 1)


def test_e1_manual_backward_passes_its_arguments_on() -> None:
    class Twice(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            opt = self.optimizers()
            opt.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss, retain_graph=True)
            self.manual_backward(loss, torch.tensor(2.0))
            opt.step()

    module = Twice()
    train(module, 2)
    assert module.updates == [3.0, 6.0]


def test_e1_manual_backward_calls_the_modules_backward() -> None:
    class Own(Manual):
        def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
            super().backward(loss * 2, *args, **kwargs)

    module = Own()
    train(module, 2)
    assert module.updates == [2.0, 4.0]


def test_e1_manual_backward_of_no_tensor_is_an_error() -> None:
    class Wrong(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(1.5)  # type: ignore[arg-type]

    with pytest.raises(MisconfigurationError, match=r"1\.5"):
        train(Wrong(), 1)


@pytest.mark.parametrize("returned", [None, "loss", {"loss": "loss", "extra": 1}, {"extra": 1}])
def test_e1_training_step_may_return_something_or_nothing(returned: Any) -> None:
    class Returning(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            loss = self.loss(batch).detach()
            if isinstance(returned, dict):
                return {key: loss if value == "loss" else value for key, value in returned.items()}
            return loss if returned == "loss" else None

    module = Returning()
    recorder = Recorder("train_batch_end")
    train(module, 2, recorder)
    assert module.updates == [1.0, 2.0]
    outputs = [event.outputs for event in recorder.events]
    if returned is None:
        assert outputs == [None, None]
    elif isinstance(returned, dict):
        assert all(output["extra"] == 1 for output in outputs)
    if returned is not None and returned != {"extra": 1}:
        assert [event.loss.item() for event in recorder.events] == [-1.0, -6.0]


@pytest.mark.parametrize("interval", ["step", "epoch", "batch"])
def test_e1_schedulers_step_only_by_the_user(interval: str) -> None:
    class Stepping(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            if (batch_idx + 1) % 2 == 0:
                self.lr_schedulers().step()

    def configure(sgd: Any) -> Any:
        return [sgd], [{"scheduler": LambdaLR(sgd, lambda n: 0.5**n), "interval": interval, "frequency": 3}]

    module = Stepping(configure=configure)
    train(module, 5, LRSchedulerStepping())
    assert module.rates == [1.0, 1.0, 0.5, 0.5, 0.25]


# ------------------------------------------------------------------ E2: events


EVENTS = (
    *("before_forward", "after_forward", "before_zero_grad", "after_zero_grad", "before_backward", "after_backward"),
    *("optimizer_step", "reduce_gradients", "unscale_gradients", "gradients_ready", "before_optimizer_step"),
    *("before_gradient_clipping", "after_gradient_clipping", "after_optimizer_step", "after_update", "train_batch_end"),
)


def test_e2_the_same_events_come_from_the_calls_of_the_module() -> None:
    automatic, manual = Recorder(*EVENTS), Recorder(*EVENTS)
    train(Probe(), 3, GradientClipping(1.0), automatic)
    train(Manual(), 3, GradientClipping(1.0), manual)
    assert sorted(manual.names) == sorted(automatic.names)
    batch = [
        "before_forward",
        *("before_zero_grad", "after_zero_grad", "before_backward", "after_backward"),
        *("optimizer_step", "reduce_gradients", "unscale_gradients", "gradients_ready", "before_optimizer_step"),
        *("before_gradient_clipping", "after_gradient_clipping", "after_optimizer_step"),
        *("after_forward", "after_update", "train_batch_end"),
    ]
    assert manual.names == batch * 3


def test_e2_the_events_carry_the_optimizer_and_the_loss() -> None:
    def step(module: Any, batch: Any, batch_idx: int) -> None:
        first, second = module.optimizers()
        first.zero_grad()
        second.zero_grad()
        module.manual_backward(module.loss(batch))
        second.step()
        first.step()

    module = Pair(step)
    names = [
        name for name in EVENTS if "optimizer" in name or "zero" in name or "gradients_ready" in name or "clipping" in name
    ]
    recorder = Recorder(*names, "before_backward")
    train(module, 1, recorder, GradientClipping(100.0))
    first, second = module.optimizers()
    for name in names:
        order = [first, second] if "zero" in name else [second, first]
        assert [event.optimizer for event in recorder.of(name)] == order, name
    (backward,) = recorder.of("before_backward")
    assert backward.raw_loss.item() == 0.0 and backward.raw_loss is backward.loss


def test_e2_a_veto_works() -> None:
    module = Manual()
    recorder = Recorder("optimizer_step_skipped", "after_optimizer_step", "after_update")
    veto = On(before_optimizer_step=lambda trainer, event: event.skip("no") if trainer.batch_idx == 1 else None)
    trainer = train(module, 3, veto, recorder)
    assert module.updates == [1.0, 3.0] and trainer.global_step == 2
    updated = ["after_optimizer_step", "after_update"]
    assert recorder.names == [*updated, "optimizer_step_skipped", *updated]


@pytest.mark.parametrize("clipping_first", [False, True])
def test_e2_loss_scaling_and_clipping_work(clipping_first: bool) -> None:
    module = Manual(width=4)
    callbacks = [GradientClipping(1.0, "value"), MixedPrecision("fp16", scaler=GradScaler("cpu", init_scale=1024.0))]
    train(module, [0.5, 3.0], *(callbacks if clipping_first else reversed(callbacks)))
    assert module.updates == [[0.5] * 4, [1.0] * 4]


def test_e2_a_second_step_with_the_same_gradients_gets_the_gradient_events_once() -> None:
    class Twice(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(opt, gradient_clip_val=100.0)
            self.clip_gradients(opt, gradient_clip_val=100.0)
            opt.step()

    recorder = Recorder("reduce_gradients", "unscale_gradients", "gradients_ready")
    module = Twice()
    train(module, 2, recorder)
    assert recorder.names == ["reduce_gradients", "unscale_gradients", "gradients_ready"] * 2
    assert module.updates == [1.0, 2.0]


# ------------------------------------------------------------------ E3: toggling


class Toggling(LightningModule):
    """Two optimizers over ``a``, ``b``, with a parameter ``shared`` by both, ``frozen`` ones, and a ``free`` one."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.automatic_optimization = False
        for name in ("a", "b", "shared", "frozen_a", "frozen_b", "free", "frozen_free"):
            setattr(self, name, nn.Parameter(torch.zeros(1), requires_grad=not name.startswith("frozen")))
        self.body = body

    def flags(self) -> dict[str, bool]:
        return {name: parameter.requires_grad for name, parameter in self.named_parameters()}

    def needing(self) -> set[str]:
        return {name for name, flag in self.flags().items() if flag}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.body(self, *self.optimizers())

    def configure_optimizers(self) -> Any:
        parameters = dict(self.named_parameters())
        names = ("a", "shared", "frozen_a"), ("b", "shared", "frozen_b")
        return tuple(SGD([parameters[name] for name in group], lr=1.0) for group in names)


ALL = {"a", "b", "shared", "free"}


def toggling(body: Callable[..., Any]) -> Toggling:
    """Run one batch, and check that all flags are as they were before it."""
    module = Toggling(body)
    before = module.flags()
    train(module, 1)
    assert module.flags() == before
    return module


def test_e3_toggle_and_untoggle() -> None:
    def body(module: Any, first: Any, second: Any) -> None:
        assert module.needing() == ALL
        module.toggle_optimizer(first)
        assert module.needing() == {"a", "shared", "free"}, "frozen ones stay frozen, those of no optimizer are left alone"
        module.untoggle_optimizer(first)
        assert module.needing() == ALL
        module.toggle_optimizer(second)
        assert module.needing() == {"b", "shared", "free"}
        module.untoggle_optimizer(second)
        assert module.needing() == ALL

    toggling(body)


Toggler = Callable[[Any, Any], AbstractContextManager[None]]
TOGGLERS: list[Toggler] = [
    lambda module, optimizer: module.toggled_optimizer(optimizer),
    lambda module, optimizer: module.toggled_optimizer(optimizer.optimizer),
    lambda module, optimizer: optimizer.toggle_model(),
    lambda module, optimizer: optimizer.toggle_model(sync_grad=True),
    lambda module, optimizer: optimizer.toggle_model(sync_grad=False),
]
IDS = ["toggled_optimizer", "of-the-wrapped", "toggle_model", "toggle_model-sync", "toggle_model-no-sync"]
toggler = pytest.mark.parametrize("toggled", TOGGLERS, ids=IDS)


@toggler
def test_e3_with_blocks(toggled: Toggler) -> None:
    def body(module: Any, first: Any, second: Any) -> None:
        with toggled(module, first):
            assert module.needing() == {"a", "shared", "free"}
        assert module.needing() == ALL
        with toggled(module, second):
            assert module.needing() == {"b", "shared", "free"}
        assert module.needing() == ALL

    toggling(body)


@toggler
def test_e3_within_a_nested_toggle_the_flags_are_the_users(toggled: Toggler) -> None:
    def body(module: Any, first: Any, second: Any) -> None:
        with toggled(module, first):
            with toggled(module, second):
                assert module.needing() == {"b", "shared", "free"}
                with toggled(module, first):
                    assert module.needing() == {"a", "shared", "free"}
                assert module.needing() == {"b", "shared", "free"}
            assert module.needing() == {"a", "shared", "free"}, "leaving it restores exactly"
        assert module.needing() == ALL

    toggling(body)


@toggler
def test_e3_three_optimizers_nested(toggled: Toggler) -> None:
    class Three(Toggling):
        def configure_optimizers(self) -> Any:
            parameters = dict(self.named_parameters())
            return *super().configure_optimizers(), SGD([parameters[name] for name in ("free", "frozen_free")], lr=1.0)

    def body(module: Any, first: Any, second: Any, third: Any) -> None:
        with toggled(module, first), toggled(module, second):
            with toggled(module, third):
                assert module.needing() == {"free"}
            assert module.needing() == {"b", "shared"}
        assert module.needing() == ALL

    module = Three(body)
    train(module, 1)
    assert module.needing() == ALL


@toggler
def test_e3_an_optimizer_may_be_toggled_twice(toggled: Toggler) -> None:
    def body(module: Any, first: Any, second: Any) -> None:
        with toggled(module, first):
            with toggled(module, first):
                assert module.needing() == {"a", "shared", "free"}
            assert module.needing() == {"a", "shared", "free"}

    toggling(body)


@toggler
def test_e3_an_exception_restores_too(toggled: Toggler) -> None:
    def body(module: Any, first: Any, second: Any) -> None:
        with pytest.raises(ZeroDivisionError), toggled(module, first), toggled(module, second):
            raise ZeroDivisionError
        assert module.needing() == ALL

    toggling(body)


@toggler
def test_e3_an_exception_that_ends_the_run_restores_too(toggled: Toggler) -> None:
    def body(module: Any, first: Any, second: Any) -> None:
        with toggled(module, first):
            raise ZeroDivisionError

    module = Toggling(body)
    before = module.flags()
    with pytest.raises(ZeroDivisionError):
        train(module, 1)
    assert module.flags() == before


def test_e3_a_toggle_that_was_left_open_ends_with_the_run() -> None:
    toggling(lambda module, first, second: module.toggle_optimizer(first))


def test_e3_a_flag_that_the_user_changed_later_is_restored_as_it_was_at_the_toggle() -> None:
    def body(module: Any, first: Any, second: Any) -> None:
        module.a.requires_grad_(False)
        module.frozen_b.requires_grad_(True)
        with module.toggled_optimizer(first):
            assert module.needing() == {"shared", "free"}
            with module.toggled_optimizer(second):
                assert module.needing() == {"b", "shared", "frozen_b", "free"}
        assert module.needing() == {"b", "shared", "frozen_b", "free"}
        module.a.requires_grad_(True)
        module.frozen_b.requires_grad_(False)

    toggling(body)


def test_e3_untoggling_in_the_wrong_order_is_an_error() -> None:
    def body(module: Any, first: Any, second: Any) -> None:
        module.toggle_optimizer(first)
        module.toggle_optimizer(second)
        with pytest.raises(MisconfigurationError, match="toggled after it"):
            module.untoggle_optimizer(first)
        module.untoggle_optimizer(second)
        module.untoggle_optimizer(first)
        assert module.needing() == ALL

    toggling(body)


def test_e3_untoggling_an_optimizer_that_is_not_toggled_does_nothing() -> None:
    def body(module: Any, first: Any, second: Any) -> None:
        module.untoggle_optimizer(first)
        with module.toggled_optimizer(first):
            module.untoggle_optimizer(second)
            assert module.needing() == {"a", "shared", "free"}

    toggling(body)


def test_e3_gradients_reach_the_toggled_optimizer_only() -> None:
    def step(module: Any, batch: Any, batch_idx: int) -> None:
        first, second = module.optimizers()
        for optimizer in (first, second):
            other = module.b if optimizer is first else module.a
            other.grad = torch.tensor([0.5])
            with optimizer.toggle_model():
                optimizer.zero_grad()
                module.manual_backward(module.loss(batch))
                optimizer.step()
            assert other.grad.item() == 0.5, "backward did not add to it"

    module = Pair(step)
    train(module, 2)
    assert (module.a.item(), module.b.item()) == (-3.0, -30.0)


# ------------------------------------------------------------------ E4: combinations that are refused


def test_e4_manual_backward_in_automatic_mode_is_an_error() -> None:
    class Wrong(Probe):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.manual_backward(self.loss(batch))

    with pytest.raises(MisconfigurationError, match=r"(?s)manual_backward.*automatic_optimization = False"):
        train(Wrong(), 1)


@pytest.mark.parametrize("windows", [1, 2, lambda trainer: 2])
def test_e4_gradient_accumulation_attached_to_a_manual_module_is_an_error(windows: Any) -> None:
    module = Manual()
    with pytest.raises(MisconfigurationError, match=r"(?s)GradientAccumulation.*Manual.*manual"):
        train(module, 2, GradientAccumulation(windows))
    assert module.updates == []


@pytest.mark.parametrize("interval", ["step", "epoch", "batch", "validation"])
def test_e4_lr_scheduler_stepping_does_nothing(interval: str) -> None:
    class Validating(Manual):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            return None

    def configure(sgd: Any) -> Any:
        return [sgd], [{"scheduler": StepLR(sgd, 1), "interval": interval}]

    module = Validating(configure=configure)
    recorder = Recorder("before_lr_scheduler_step")
    train(module, 2, LRSchedulerStepping(), recorder, val=1, max_epochs=2)
    assert module.rates == [1.0] * 4 and recorder.names == [] and module.lr_schedulers().last_epoch == 0


def test_e4_without_lr_scheduler_stepping_a_manual_module_is_not_warned() -> None:
    module = Manual(configure=lambda sgd: ([sgd], [StepLR(sgd, 1)]))
    train(module, 2)  # a warning would be an error
    assert module.rates == [1.0, 1.0]


# ------------------------------------------------------------------ properties


@settings(derandomize=True, max_examples=40, deadline=None, database=None)
@given(
    every_a=st.integers(1, 4),
    every_b=st.integers(1, 4),
    length=st.integers(1, 7),
    epochs=st.integers(1, 3),
    limit=st.none() | st.integers(1, 7),
    validate=st.booleans(),
)
def test_e_property_frequencies_equal_the_hand_written_loop(
    every_a: int, every_b: int, length: int, epochs: int, limit: int | None, validate: bool
) -> None:
    """Each optimizer accumulates over its own number of batches."""

    def step(module: Any, batch: Any, batch_idx: int) -> None:
        module.manual_backward(module.loss(batch))
        for optimizer, every in zip(module.optimizers(), (every_a, every_b), strict=True):
            if (batch_idx + 1) % every == 0:
                optimizer.step()
                optimizer.zero_grad()

    class Validating(Pair):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(batch)

    module = Validating(step)
    options: dict[str, Any] = {"val": 1, "val_check_interval": 1} if validate else {}
    trainer = train(module, length, max_epochs=epochs, limit_train_batches=limit, **options)

    other = Pair()
    optimizers = other.configure_optimizers()
    used = min(length, limit or length)
    updates = 0
    for _ in range(epochs):
        for index in range(used):
            backward(other.loss(torch.tensor(index + 1.0)))
            due = [optimizer for optimizer, n in zip(optimizers, (every_a, every_b), strict=True) if (index + 1) % n == 0]
            for optimizer in due:
                optimizer.step()
                optimizer.zero_grad()
            updates += bool(due)
    assert torch.equal(module.a, other.a) and torch.equal(module.b, other.b)
    assert trainer.global_step == updates
    assert trainer.estimated_stepping_batches == epochs * used
