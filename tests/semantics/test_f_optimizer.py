"""F. LightningOptimizer: it stands for the wrapped optimizer, and notices steps that bypass it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import defaultdict
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR

from eventtrain import LightningModule, LightningOptimizer, MisconfigurationError
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping, MixedPrecision
from tests.kit import On, Probe, Recorder, train
from tests.reference import backward


def wrapped(lr: float = 1.0, momentum: float = 0.9) -> tuple[nn.Parameter, SGD, LightningOptimizer]:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = SGD([parameter], lr=lr, momentum=momentum)
    return parameter, optimizer, LightningOptimizer(optimizer)


# ------------------------------------------------------------------ F1: it is the wrapped optimizer


def test_f1_is_an_optimizer() -> None:
    _, optimizer, wrapper = wrapped()
    assert isinstance(wrapper, Optimizer)
    assert wrapper.optimizer is optimizer


def test_f1_reads_reach_the_wrapped_optimizer() -> None:
    _, optimizer, wrapper = wrapped()
    optimizer.note = "mine"  # type: ignore[attr-defined]
    assert wrapper.param_groups is optimizer.param_groups
    assert wrapper.state is optimizer.state
    assert wrapper.defaults is optimizer.defaults
    assert wrapper.note == "mine"
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = wrapper.nothing_of_the_kind


def test_f1_writes_reach_the_wrapped_optimizer() -> None:
    _, optimizer, wrapper = wrapped()
    groups, state, defaults = [dict(optimizer.param_groups[0], lr=0.5)], defaultdict(int, {torch.ones(1): 1}), {"lr": 3.0}
    wrapper.param_groups, wrapper.state, wrapper.defaults = groups, state, defaults
    wrapper.note = "mine"
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    assert optimizer.defaults is defaults
    assert optimizer.note == "mine"  # type: ignore[attr-defined]
    del wrapper.note
    assert not hasattr(optimizer, "note")


def test_f1_only_step_is_written_to_the_wrapper() -> None:
    """Schedulers patch ``step`` of the object that they were built on."""
    parameter, optimizer, wrapper = wrapped()
    wrapper.step = lambda *args, **kwargs: "patched"  # type: ignore[method-assign]
    assert wrapper.step() == "patched"
    assert "step" not in vars(optimizer)
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert parameter.tolist() == [-1.0, -1.0]
    del wrapper.step
    wrapper.step()
    assert parameter.tolist() != [-1.0, -1.0]


def test_f1_state_dict_and_load_state_dict_are_the_wrapped_ones() -> None:
    parameter, optimizer, wrapper = wrapped()
    parameter.grad = torch.ones(2)
    optimizer.step()
    state = wrapper.state_dict()
    assert torch.equal(state["state"][0]["momentum_buffer"], torch.ones(2))
    other_parameter, other, other_wrapper = wrapped(lr=7.0)
    other_wrapper.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 1.0
    assert torch.equal(other.state[other_parameter]["momentum_buffer"], torch.ones(2))


def test_f1_zero_grad_is_the_wrapped_one() -> None:
    parameter, _, wrapper = wrapped()
    parameter.grad = torch.ones(2)
    wrapper.zero_grad(set_to_none=False)
    assert parameter.grad.tolist() == [0.0, 0.0]
    wrapper.zero_grad()
    assert parameter.grad is None


def test_f1_add_param_group_is_the_wrapped_one_and_parameters_are_never_cached() -> None:
    parameter, optimizer, wrapper = wrapped()
    assert list(wrapper.parameters()) == [parameter]
    later = nn.Parameter(torch.zeros(1))
    wrapper.add_param_group({"params": [later], "lr": 0.5})
    assert len(optimizer.param_groups) == 2
    assert [id(p) for p in wrapper.parameters()] == [id(parameter), id(later)]


def test_f1_a_parameter_added_during_the_run_is_clipped() -> None:
    class Unfreezing(Probe):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Parameter(torch.zeros(()))

        def loss(self, x: torch.Tensor) -> torch.Tensor:
            return (3.0 * self.w + 4.0 * self.late).sum()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                self.optimizers().add_param_group({"params": [self.late]})

    module = Unfreezing()
    recorder = Recorder("after_gradient_clipping")
    train(module, 2, GradientClipping(1.0), recorder)
    assert [event.total_norm.item() for event in recorder.events] == [3.0, 5.0]
    # Its gradient of the first batch is still there, because zero_grad did not know of it.
    assert module.late.item() == pytest.approx(-0.8)


HOOKS = {
    "register_step_pre_hook": lambda optimizer: optimizer.step(),
    "register_step_post_hook": lambda optimizer: optimizer.step(),
    "register_state_dict_pre_hook": lambda optimizer: optimizer.state_dict(),
    "register_state_dict_post_hook": lambda optimizer: optimizer.state_dict(),
    "register_load_state_dict_pre_hook": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "register_load_state_dict_post_hook": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
}


@pytest.mark.parametrize("register", HOOKS)
def test_f1_hooks_are_registered_with_the_wrapped_optimizer(register: str) -> None:
    parameter, optimizer, wrapper = wrapped()
    parameter.grad = torch.ones(2)
    calls: list[Any] = []
    handle = getattr(wrapper, register)(lambda caller, *_: calls.append(caller))
    HOOKS[register](optimizer)
    HOOKS[register](wrapper)
    assert [caller is optimizer for caller in calls] == [True, True]
    handle.remove()
    HOOKS[register](wrapper)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "register",
    [
        "register_state_dict_pre_hook",
        "register_state_dict_post_hook",
        "register_load_state_dict_pre_hook",
        "register_load_state_dict_post_hook",
    ],
)
def test_f1_hooks_may_be_prepended(register: str) -> None:
    _, optimizer, wrapper = wrapped()
    calls: list[str] = []
    getattr(wrapper, register)(lambda *_: calls.append("first"))
    getattr(wrapper, register)(lambda *_: calls.append("prepended"), prepend=True)
    HOOKS[register](optimizer)
    assert calls == ["prepended", "first"]


SCHEDULERS: dict[str, Any] = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda n: 0.5**n),
    "one_cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=1.0, total_steps=6),
    "warm_restarts": lambda optimizer: CosineAnnealingWarmRestarts(optimizer, T_0=2),
    "sequential": lambda optimizer: SequentialLR(
        optimizer, [LambdaLR(optimizer, lambda n: 0.1), LambdaLR(optimizer, lambda n: 0.5**n)], milestones=[2]
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_f1_a_scheduler_built_on_the_wrapper_works(kind: str) -> None:
    """Without torch's warnings: a warning is an error in these tests."""

    def rates(optimizer: Any, parameter: nn.Parameter) -> list[float]:
        scheduler = SCHEDULERS[kind](optimizer)
        result = []
        for _ in range(5):
            parameter.grad = torch.ones(2)
            optimizer.step()
            scheduler.step()
            result.append(optimizer.param_groups[0]["lr"])
        return result

    parameter, optimizer, _ = wrapped()
    expected = rates(optimizer, parameter)
    parameter, _, wrapper = wrapped()
    assert rates(wrapper, parameter) == expected


def test_f1_a_plateau_scheduler_built_on_the_wrapper_works() -> None:
    _, optimizer, wrapper = wrapped()
    scheduler = ReduceLROnPlateau(wrapper, patience=0, factor=0.5)
    for _ in range(2):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_f1_a_scheduler_that_steps_before_the_wrapper_warns_as_torch_does() -> None:
    _, _, wrapper = wrapped()
    scheduler = LambdaLR(wrapper, lambda n: 0.5**n)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step\(\)"):
        scheduler.step()


def test_f1_a_scheduler_built_on_a_wrapper_steps_in_a_run() -> None:
    def configure(sgd: Optimizer) -> Any:
        wrapper = LightningOptimizer(sgd)
        return {"optimizer": wrapper, "lr_scheduler": {"scheduler": LambdaLR(wrapper, lambda n: 0.5**n), "interval": "step"}}

    module = Probe(configure=configure)
    trainer = train(module, 3, LRSchedulerStepping())
    assert module.rates == [1.0, 0.5, 0.25]
    assert trainer.optimizers[0].optimizer is module.sgd
    assert trainer.optimizers[0].num_steps == trainer.global_step == 3


def test_f1_deepcopy_wraps_a_copy() -> None:
    parameter, optimizer, wrapper = wrapped()
    parameter.grad = torch.ones(2)
    wrapper.step()
    duplicate = copy.deepcopy(wrapper)
    assert isinstance(duplicate, LightningOptimizer)
    assert type(duplicate.optimizer) is SGD
    assert duplicate.optimizer is not optimizer
    (copied,) = duplicate.parameters()
    assert copied is not parameter
    copied.grad = torch.ones(2)
    duplicate.step()
    assert parameter.tolist() == [-1.0, -1.0]
    assert torch.equal(copied, torch.full((2,), -2.9))  # momentum was copied: 1 + 0.9 * 1 more


def test_f1_pickle_round_trips() -> None:
    parameter, _, wrapper = wrapped(lr=0.25)
    parameter.grad = torch.ones(2)
    wrapper.step()
    restored = pickle.loads(pickle.dumps(wrapper))
    assert isinstance(restored, LightningOptimizer)
    assert type(restored.optimizer) is SGD
    assert restored.param_groups[0]["lr"] == 0.25
    (copied,) = restored.parameters()
    assert torch.equal(restored.state[copied]["momentum_buffer"], torch.ones(2))


def test_f1_copies_of_an_optimizer_in_a_run_take_no_part_in_it() -> None:
    class Copying(Probe):
        def on_after_backward(self) -> None:
            for duplicate in (copy.deepcopy(self.optimizers()), pickle.loads(pickle.dumps(self.optimizers()))):
                duplicate.step()

    module = Copying()
    recorder = Recorder("after_optimizer_step")
    trainer = train(module, 3, recorder)
    assert module.w.item() == -6.0
    assert recorder.count("after_optimizer_step") == trainer.optimizers[0].num_steps == 3


class Holder(LightningModule):
    """Picklable, and with a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        return self.layer(batch.view(1, 1)).sum()

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_f1_copies_of_a_module_leave_the_trainer_behind(duplicate: Any) -> None:
    module = Holder()
    copies: list[Holder] = []
    trainer = train(module, 2, On(train_batch_end=lambda trainer, event: copies.append(duplicate(trainer.module))))
    for copied in copies:
        assert copied.layer is not module.layer
        with pytest.raises(MisconfigurationError, match="Holder is not attached to a trainer"):
            _ = copied.trainer
    assert torch.equal(copies[-1].layer.weight, module.layer.weight)
    assert module.trainer is trainer
    train(copies[-1], 2)


# ------------------------------------------------------------------ F2: a step on the wrapped optimizer


class Raw(Probe):
    """Steps the wrapped optimizer with the closure, as the seed guide's example does."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer = optimizer.optimizer
        optimizer.step(closure=optimizer_closure)


def test_f2_a_raw_step_knows_no_veto_and_no_clipping() -> None:
    recorder = Recorder("before_optimizer_step", "before_gradient_clipping", "after_optimizer_step", "optimizer_step_skipped")
    veto = On(before_optimizer_step=lambda trainer, event: event.skip("never"))
    module = Raw()
    train(module, 3, GradientClipping(0.5), veto, recorder)
    assert module.updates == [1.0, 2.0, 3.0]
    assert recorder.names == []


def test_f2_a_raw_step_is_clipped_and_vetoed_through_the_wrapper() -> None:
    """The nearest other form, so that the test above shows something."""
    module = Probe()
    train(module, 3, GradientClipping(0.5))
    assert module.updates == pytest.approx([0.5, 0.5, 0.5], abs=1e-5)


def test_f2_a_raw_step_has_normalised_gradients() -> None:
    """x = 1..5, N = 2: means over the batches that are in the window, 1.5, 3.5, 5."""
    module = Raw()
    trainer = train(module, 5, GradientAccumulation(2))
    assert module.updates == [1.5, 3.5, 5.0]
    assert module.w.item() == -10.0
    assert trainer.optimizers[0].num_steps == trainer.global_step == 3


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_f2_a_raw_step_has_unscaled_gradients_in_fp16(fused: bool) -> None:
    """Lightning: -80 in place of -10, for a loss scale of 8."""

    class Fused(Raw):
        def configure_optimizers(self) -> Any:
            return self.watch(SGD([self.w], lr=1.0, fused=fused))

    module = Fused()
    scaler = GradScaler("cpu", init_scale=8.0)
    train(module, 5, GradientAccumulation(2), MixedPrecision("fp16", scaler=scaler))
    assert module.updates == [1.5, 3.5, 5.0]
    assert module.w.item() == -10.0


def test_f2_gradients_that_overflow_under_a_raw_step_raise() -> None:
    module = Raw()
    with pytest.raises(MisconfigurationError, match=r"overflowed.*wrapped SGD.*LightningOptimizer"):
        train(module, [1.0, float("inf")], MixedPrecision("fp16", scaler=GradScaler("cpu", init_scale=8.0)))
    assert module.w.item() == -1.0


def test_f2_nonfinite_gradients_without_loss_scaling_go_to_torch() -> None:
    module = Raw()
    train(module, [1.0, float("inf")])
    assert module.updates == [1.0, float("inf")]


def test_f2_a_raw_step_is_counted() -> None:
    updates = Recorder("after_update")
    trainer = train(Raw(), 3, updates)
    assert [event.global_step for event in updates.events] == [1, 2, 3]
    assert trainer.optimizers[0].num_steps == 3


def test_f2_a_raw_step_after_the_closure_is_counted() -> None:
    class Later(Probe):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer_closure()
            if batch_idx % 2 == 0:
                optimizer.optimizer.step()

    module = Later()
    trainer = train(module, 4)
    assert module.updates == [1.0, 3.0]
    assert trainer.global_step == trainer.optimizers[0].num_steps == 2


def test_f2_a_raw_step_in_manual_mode_is_counted() -> None:
    class Manual(Probe):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.optimizer.step()

    module = Manual(automatic=False)
    trainer = train(module, 3)
    assert module.w.item() == -6.0
    assert trainer.global_step == trainer.optimizers[0].num_steps == 3


class Nested(SGD):
    """Steps by its base class's step: torch's hooks fire for both."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("raw", [False, True], ids=["wrapper", "raw"])
def test_f2_a_step_that_calls_super_is_counted_once(raw: bool) -> None:
    class Module(Raw if raw else Probe):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return Nested([self.w], lr=1.0)

    module = Module()
    fired: list[int] = []
    updates = Recorder("after_update")
    listen = On(fit_start=lambda t, e: t.optimizers[0].register_step_post_hook(lambda *_: fired.append(t.global_step)))
    trainer = train(module, 3, updates, listen)
    assert len(fired) == 6  # torch's hooks came twice
    assert trainer.optimizers[0].num_steps == trainer.global_step == updates.count("after_update") == 3
    assert module.w.item() == -6.0


def test_f2_a_raw_step_of_a_batch_without_a_loss_is_left() -> None:
    module = Raw(nothing_for=[2.0])
    trainer = train(module, 3)
    assert module.updates == [1.0, 3.0]
    assert trainer.optimizers[0].num_steps == trainer.global_step == 2


@pytest.mark.parametrize("make", [SGD, AdamW], ids=["SGD", "AdamW"])
def test_f2_a_fused_step_that_overflows_counts_no_update(make: Any) -> None:
    """A fused optimizer's hooks fire on an overflow too, if torch's own scaler steps it."""

    class Module(Probe):
        def configure_optimizers(self) -> Any:
            return self.watch(make([self.w], lr=1.0, fused=True))

    module = Module()
    skipped = Recorder("optimizer_step_skipped")
    trainer = train(module, [1.0, float("inf"), 3.0], MixedPrecision("fp16", scaler=GradScaler("cpu", init_scale=8.0)), skipped)
    assert module.updates == [1.0, 3.0]
    assert trainer.global_step == trainer.optimizers[0].num_steps == 2
    assert [event.reason for event in skipped.events] == ["overflow"]


def test_f2_after_the_run_the_hooks_are_gone() -> None:
    module = Probe()
    trainer = train(module, 2)
    module.w.grad = torch.ones(1)
    module.sgd.step()
    assert trainer.optimizers[0].num_steps == 2
    assert trainer.global_step == 2


# ------------------------------------------------------------------ F3: closures


@pytest.mark.parametrize("closure", [1.0, torch.ones(()), "closure"], ids=["number", "loss", "string"])
def test_f3_a_closure_that_cannot_be_called_is_an_error(closure: Any) -> None:
    parameter, _, wrapper = wrapped()
    parameter.grad = torch.ones(2)
    with pytest.raises(MisconfigurationError, match=r"SGD\.step was given .* as its closure, which cannot be called"):
        wrapper.step(closure)
    assert parameter.tolist() == [0.0, 0.0]
    wrapper.step(lambda: torch.ones(()))
    assert parameter.tolist() == [-1.0, -1.0]


def test_f3_a_closure_that_cannot_be_called_is_an_error_in_a_run() -> None:
    class Wrong(Probe):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure())

    with pytest.raises(MisconfigurationError, match=r"SGD\.step was given .* as its closure"):
        train(Wrong(), 1)


def test_f3_the_closures_result_is_returned() -> None:
    results: list[Any] = []

    class Keeping(Probe):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            results.append(optimizer.step(closure=optimizer_closure).item())

    module = Keeping()
    train(module, 3)
    assert results == [0.0, -2.0, -9.0]  # the raw losses: 0 * 1, -1 * 2, -3 * 3


def test_f3_the_closures_result_is_returned_if_the_step_was_skipped() -> None:
    results: list[Any] = []

    class Keeping(Probe):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            results.append(optimizer.step(closure=optimizer_closure))

    module = Keeping(nothing_for=[3.0])
    veto = On(before_optimizer_step=lambda trainer, event: event.skip("mine") if trainer.batch_idx == 1 else None)
    train(module, 3, veto)
    assert [None if result is None else result.item() for result in results] == [0.0, -2.0, None]


def test_f3_keyword_arguments_reach_the_wrapped_step() -> None:
    class Takes(SGD):
        def step(self, closure: Any = None, *, note: str = "") -> Any:
            self.noted = note
            return super().step(closure)

    parameter = nn.Parameter(torch.zeros(1))
    optimizer = Takes([parameter], lr=1.0)
    parameter.grad = torch.ones(1)
    LightningOptimizer(optimizer).step(note="mine")
    assert optimizer.noted == "mine"


def test_f1_lbfgs_and_adam_are_wrapped_alike() -> None:
    """State that is lazily made, and a step that needs its closure."""
    for make in (Adam, LBFGS):
        parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
        plain, wrapper = make([parameters[0]], lr=0.1), LightningOptimizer(make([parameters[1]], lr=0.1))

        def closure(parameter: nn.Parameter, optimizer: Any) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (parameter**4).sum()
            backward(loss)
            return loss

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plain.step(partial(closure, parameters[0], plain))  # type: ignore[no-untyped-call]
            wrapper.step(partial(closure, parameters[1], wrapper))
        assert torch.equal(parameters[0], parameters[1])


# ------------------------------------------------------------------ it is an instance of the wrapped optimizer's class


class MyAdam(Adam):
    pass


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW, LBFGS, MyAdam])
def test_f1_it_is_an_instance_of_the_wrapped_optimizers_class(kind: Any) -> None:
    wrapper = LightningOptimizer(kind([nn.Parameter(torch.zeros(1))], lr=0.1))
    for each in (wrapper, copy.copy(wrapper), copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        assert isinstance(each, kind) and isinstance(each, Optimizer) and isinstance(each, LightningOptimizer)
        assert type(each) is LightningOptimizer and type(each.optimizer) is kind
        assert each.__class__ is kind
    assert not isinstance(wrapper, torch.optim.RMSprop)
    assert isinstance(wrapper, Adam) == issubclass(kind, Adam)
    assert repr(wrapper).startswith(f"LightningOptimizer({kind.__name__}")


def test_f1_it_is_one_in_a_run() -> None:
    seen: list[bool] = []

    class Asks(Probe):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            seen.append(isinstance(self.optimizers(), SGD) and not isinstance(self.optimizers(), Adam))

    train(Asks(), 2)
    assert seen == [True, True]


def test_f1_grad_scaler_steps_the_wrapper() -> None:
    """As a loop does that brings its own scaler: an overflow is skipped, and does not count."""

    class Scales(Probe):
        scaler = GradScaler(device="cpu", init_scale=4.0)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.scaler.scale(self.loss(batch)))
            self.scaler.step(optimizer)
            self.scaler.update()

    module = Scales(automatic=False)
    trainer = train(module, [torch.tensor(x) for x in (1.0, torch.inf, 3.0)])
    assert module.w.item() == -4.0
    assert trainer.global_step == trainer.optimizers[0].num_steps == 2
