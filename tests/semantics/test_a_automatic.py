"""A. Automatic optimization: the closure, the hook, and batches without a loss."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from eventtrain import LightningOptimizer, MisconfigurationError
from eventtrain.callbacks import GradientAccumulation, LRSchedulerStepping, MixedPrecision, ProgressBar
from tests.kit import NoLength, On, Probe, Recorder, batches, gradient, new_trainer, train
from tests.reference import backward
from tests.semantics.modules import Regression, Stepping, assert_same_training, regression_data

# ------------------------------------------------------------------ A1: the closure


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: AdamW(parameters, lr=0.01),
        lambda parameters: AdamW(parameters, lr=0.01, foreach=True),
    ],
    ids=["sgd", "adamw", "adamw-foreach"],
)
def test_a1_equals_the_loop_of_the_guide(make_optimizer: Any) -> None:
    module = Regression(make_optimizer)
    model = copy.deepcopy(module)
    trainer = new_trainer(max_epochs=3)
    trainer.fit(module, regression_data(4))

    optimizer = make_optimizer(model.parameters())
    for _ in range(3):
        for batch in regression_data(4):

            def closure(batch: Any = batch) -> torch.Tensor:
                loss = model.loss(batch)
                optimizer.zero_grad()
                backward(loss)
                return loss

            optimizer.step(closure)
    assert_same_training(module, trainer.optimizers[0], model, optimizer)
    assert trainer.global_step == 12


class ClosureWatcher(SGD):
    """An SGD that records the closures of its steps and their results."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.closures: list[Any] = []
        self.results: list[Any] = []

    def step(self, closure: Any = None) -> Any:
        self.closures.append(closure)

        def noting() -> Any:
            self.results.append(closure())
            return self.results[-1]

        return super().step(noting)


def test_a1_the_optimizer_gets_the_closure_and_the_closure_returns_the_loss() -> None:
    module = Probe()
    watcher = ClosureWatcher([module.w], lr=1.0)
    module.configure = lambda _: watcher
    module.w.data.fill_(1.0)
    train(module, 3)
    assert len(watcher.closures) == 3 and all(callable(closure) for closure in watcher.closures)
    assert [loss.item() for loss in watcher.results] == [1.0, 0.0, -6.0]  # w = 1, 0, -2


def test_a1_the_order_is_training_step_then_zero_grad_then_backward() -> None:
    steps: list[str] = []

    class Ordered(Probe):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            steps.append("training_step")
            if batch_idx == 1:
                assert self.w.grad is not None, "zero_grad came before training_step"
            return super().training_step(batch, batch_idx)

        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: LightningOptimizer) -> None:
            steps.append("zero_grad")
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

        def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            steps.append("backward")
            assert self.w.grad is None, "zero_grad has not come before backward"
            super().backward(loss, *args, **kwargs)

    module = Ordered()
    train(module, 2)
    assert steps == ["training_step", "zero_grad", "backward"] * 2
    assert module.updates == [1.0, 2.0]


def test_a1_batches_that_only_accumulate_call_the_closure_without_a_step() -> None:
    names = (
        "optimizer_step",
        "before_forward",
        "before_zero_grad",
        "before_backward",
        "gradients_ready",
        "before_optimizer_step",
    )
    recorder = Recorder("train_batch_start", *names)
    train(Probe(), 2, GradientAccumulation(2), recorder)
    assert recorder.names == [
        "train_batch_start",  # accumulates: no step and no gradient event
        *("before_forward", "before_zero_grad", "before_backward"),
        "train_batch_start",  # closes: no zero_grad
        *("optimizer_step", "before_forward", "before_backward", "gradients_ready", "before_optimizer_step"),
    ]


def test_a1_without_any_listener_it_is_the_same() -> None:
    module = Probe()
    trainer = train(module, 3)
    assert not any(signal.listeners for signal in trainer.signals)
    assert (module.seen, module.updates, module.w.item()) == ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], -6.0)


def test_a1_training_step_may_leave_out_the_index() -> None:
    class NoIndex(Probe):
        def training_step(self, batch: Any) -> Any:  # type: ignore[override]
            return self.loss(batch)

    module = NoIndex()
    train(module, 3)
    assert module.updates == [1.0, 2.0, 3.0]


# ------------------------------------------------------------------ A2: the results of training_step


class Returning(Probe):
    """Returns the result of a function of the loss."""

    def __init__(self, make: Any, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.make = make

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.make(self.loss(batch))


@pytest.mark.parametrize(
    "make",
    [
        lambda loss: loss,
        lambda loss: {"loss": loss},
        lambda loss: MappingProxyType({"loss": loss}),
        lambda loss: loss.reshape(1),
    ],
    ids=["tensor", "dict", "another-mapping", "one-element"],
)
def test_a2_a_tensor_or_a_mapping_with_loss(make: Any) -> None:
    module = Returning(make)
    train(module, 3)
    assert module.updates == [1.0, 2.0, 3.0]


def test_a2_other_keys_of_a_mapping_reach_train_batch_end() -> None:
    module = Returning(lambda loss: {"loss": loss, "predictions": loss * 10, "name": "cat"})
    module.w.data.fill_(1.0)
    recorder = Recorder("train_batch_end")
    train(module, 2, recorder)
    first, second = (event.outputs for event in recorder.events)
    assert first["predictions"].item() == 10.0 and second["predictions"].item() == 0.0
    assert first["name"] == "cat" and first["loss"].item() == 1.0
    assert not first["predictions"].requires_grad and not first["loss"].requires_grad, "the graph outlives the batch"


@pytest.mark.parametrize("make", [lambda loss: None, lambda loss: {"loss": None}], ids=["none", "loss-none"])
def test_a2_none_is_a_batch_without_a_loss(make: Any) -> None:
    module = Returning(make)
    with pytest.warns(UserWarning, match="Nothing was trained in epoch 0"):
        trainer = train(module, 3)
    assert module.updates == [] and trainer.global_step == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda loss: {"prediction": 1, "target": 2}, ["prediction", "target", "'loss'"]),
        (lambda loss: 0.25, ["0.25", "float"]),
        (lambda loss: "fine", ["'fine'", "str"]),
        (lambda loss: (loss, 1), ["tuple"]),
        (lambda loss: {"loss": 0.5}, ["0.5", "float", "'loss'"]),
        (lambda loss: loss.expand(3), ["(3,)", "scalar"]),
        (lambda loss: loss.detach(), ["gradient"]),
    ],
    ids=["mapping-without-loss", "float", "string", "tuple", "float-loss", "vector", "detached"],
)
def test_a2_anything_else_is_an_error_that_names_the_result(make: Any, said: list[str]) -> None:
    with pytest.raises(MisconfigurationError) as caught:
        train(Returning(make), 1)
    for part in ["training_step", *said]:
        assert part in str(caught.value)


# ------------------------------------------------------------------ A3: the optimizer_step hook


def test_a3_the_hook_is_called_for_every_stepping_batch_with_its_arguments() -> None:
    calls: list[Any] = []

    def how(module: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        calls.append((epoch, batch_idx))
        assert isinstance(optimizer, LightningOptimizer) and optimizer is module.optimizers()
        assert optimizer.optimizer is module.sgd
        optimizer.step(closure=closure)

    module = Stepping(how)
    train(module, 5, GradientAccumulation(2), max_epochs=2)
    assert calls == [(0, 1), (0, 3), (0, 4), (1, 1), (1, 3), (1, 4)]
    assert module.updates == [1.5, 3.5, 5.0] * 2


def test_a3_the_arguments_may_be_taken_by_name() -> None:
    class ByName(Probe):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)

    module = ByName()
    train(module, 3)
    assert module.updates == [1.0, 2.0, 3.0]


def test_a3_the_default_steps_with_the_closure() -> None:
    calls: list[Any] = []

    class Default(Probe):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            class Watched:
                def step(self, *args: Any, **kwargs: Any) -> None:
                    calls.append((args, kwargs))
                    optimizer.step(*args, **kwargs)

            super().optimizer_step(epoch, batch_idx, Watched(), optimizer_closure)  # type: ignore[arg-type]
            assert calls[-1] == ((), {"closure": optimizer_closure})

    module = Default()
    train(module, 3)
    assert module.updates == [1.0, 2.0, 3.0] and len(calls) == 3


def test_a3_an_override_may_step_every_other_batch() -> None:
    def how(module: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        if batch_idx % 2 == 0:
            optimizer.step(closure=closure)
        else:
            closure()

    module = Stepping(how)
    trainer = train(module, 5)
    assert (module.updates, module.seen, trainer.global_step) == ([1.0, 3.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0], 3)


def test_a3_an_override_may_warm_up_the_rate() -> None:
    def how(module: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        optimizer.step(closure=closure)
        for group in optimizer.param_groups:
            group["lr"] = min(1.0, (module.trainer.global_step + 1) / 4)

    module = Stepping(how, lr=0.0)
    train(module, 6)
    assert module.rates == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_a3_an_override_may_use_the_wrapped_optimizer() -> None:
    def how(module: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        optimizer = optimizer.optimizer
        assert type(optimizer) is SGD
        optimizer.step(closure=closure)

    module = Stepping(how)
    trainer = train(module, 5, GradientAccumulation(2))
    assert module.updates == [1.5, 3.5, 5.0] and trainer.global_step == 3


def test_a3_the_closure_returns_the_loss_to_an_override() -> None:
    losses: list[Any] = []

    def how(module: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        losses.append(closure())
        optimizer.step()

    module = Stepping(how)
    train(module, 3)
    assert [loss.item() for loss in losses] == [0.0, -2.0, -9.0] and module.updates == [1.0, 2.0, 3.0]


def test_a3_a_closure_without_a_step_is_allowed() -> None:
    module = Stepping(lambda module, epoch, batch_idx, optimizer, closure: closure())
    trainer = train(module, 3)
    assert module.seen == [1.0, 2.0, 3.0] and module.updates == [] and trainer.global_step == 0
    assert module.w.grad is not None and gradient(module.w).item() == 3.0


@pytest.mark.parametrize("callbacks", [(), (GradientAccumulation(2),)], ids=["alone", "accumulating"])
@pytest.mark.parametrize(
    "how",
    [
        lambda module, epoch, batch_idx, optimizer, closure: None,
        lambda module, epoch, batch_idx, optimizer, closure: optimizer.optimizer.step(),
    ],
    ids=["nothing", "step-without-closure"],
)
def test_a3_an_override_that_never_runs_the_closure_is_an_error(how: Any, callbacks: Any) -> None:
    with pytest.raises(MisconfigurationError, match=r"(?s)optimizer_step.*closure.*SGD"):
        train(Stepping(how), 2, *callbacks)


def test_a3_a_step_without_closure_that_would_use_old_gradients_is_an_error() -> None:
    with pytest.raises(MisconfigurationError, match=r"(?s)optimizer_step.*closure.*SGD"):
        train(Stepping(lambda module, epoch, batch_idx, optimizer, closure: optimizer.step()), 2)


class NeverEvaluates(SGD):
    """Steps without its closure."""

    def step(self, closure: Any = None) -> Any:
        return super().step()


@pytest.mark.parametrize("override", [False, True], ids=["no-override", "override"])
def test_a3_an_optimizer_that_never_runs_the_closure_is_an_error(override: bool) -> None:
    module = Probe() if not override else Stepping(lambda m, e, b, optimizer, closure: optimizer.optimizer.step(closure))
    module.configure = lambda _: NeverEvaluates([module.w], lr=1.0)
    with pytest.raises(MisconfigurationError, match=r"(?s)NeverEvaluates.*closure|closure.*NeverEvaluates"):
        train(module, 1)


# ------------------------------------------------------------------ A4: how many optimizers


def test_a4_two_optimizers_are_an_error_that_says_manual_optimization() -> None:
    module = Probe(configure=lambda sgd: [sgd, SGD([nn.Parameter(torch.zeros(1))], lr=1.0)])
    with pytest.raises(MisconfigurationError, match="manual optimization"):
        train(module, 2)
    assert module.seen == []


@pytest.mark.parametrize("returned", [None, []], ids=["none", "empty-list"])
def test_a4_a_run_without_an_optimizer_continues_with_a_warning(returned: Any) -> None:
    module = Probe(configure=lambda sgd: returned)
    recorder = Recorder("train_batch_end", "after_update", "train_epoch_end")
    with pytest.warns(UserWarning, match="no optimizer"):
        trainer = train(module, 3, recorder, LRSchedulerStepping(), max_epochs=2)
    assert module.seen == [1.0, 2.0, 3.0] * 2
    assert module.w.item() == 0.0 and module.w.grad is None
    assert trainer.global_step == 0 and trainer.current_epoch == 2
    assert (recorder.count("train_batch_end"), recorder.count("after_update"), recorder.count("train_epoch_end")) == (6, 0, 2)


# ------------------------------------------------------------------ A6: batches without a loss


def counting(sgd: Any) -> Any:
    """Return the optimizer with a scheduler that steps with each update."""
    return {"optimizer": sgd, "lr_scheduler": {"scheduler": LambdaLR(sgd, lambda step: 1.0), "interval": "step"}}


def scheduler_steps(trainer: Any) -> int:
    count: int = trainer.lr_scheduler_configs[0].scheduler.last_epoch
    return count


@pytest.mark.parametrize("stepping", [None, lambda m, e, b, o, closure: o.step(closure)], ids=["default", "override"])
def test_a6_a_batch_without_a_loss_does_not_step(stepping: Any) -> None:
    options: dict[str, Any] = {"nothing_for": {2.0}, "configure": counting}
    module = Probe(**options) if stepping is None else Stepping(stepping, **options)
    recorder = Recorder("before_backward", "optimizer_step_skipped", "after_optimizer_step", "after_update")
    trainer = train(module, 3, recorder, LRSchedulerStepping())
    updated = ["before_backward", "after_optimizer_step", "after_update"]
    assert recorder.names == [*updated, "optimizer_step_skipped", *updated]
    assert recorder.events[3].reason == "no loss"
    assert module.updates == [1.0, 3.0] and module.seen == [1.0, 2.0, 3.0]
    assert trainer.global_step == scheduler_steps(trainer) == 2


def test_a6_the_mean_of_a_window_counts_contributors_only() -> None:
    module = Probe(nothing_for={2.0})
    train(module, 4, GradientAccumulation(2))
    assert module.updates == [1.0, 3.5]


def test_a6_a_fixed_divisor_stays_fixed() -> None:
    module = Probe(nothing_for={2.0})
    train(module, 4, GradientAccumulation(2, normalize="fixed"))
    assert module.updates == [0.5, 3.5]


def test_a6_a_window_in_which_the_first_batch_has_no_loss() -> None:
    module = Probe(nothing_for={3.0})
    train(module, 4, GradientAccumulation(2))
    assert module.updates == [1.5, 4.0], "the batch without a loss opened its window: the old gradients are gone"


def test_a6_a_window_without_any_loss_does_not_step() -> None:
    module = Probe(nothing_for={3.0, 4.0}, configure=counting)
    recorder = Recorder("optimizer_step_skipped")
    trainer = train(module, 6, GradientAccumulation(2), recorder, LRSchedulerStepping())
    assert module.updates == [1.5, 5.5]
    assert [event.reason for event in recorder.events] == ["no loss"]
    assert trainer.global_step == scheduler_steps(trainer) == 2


def test_a6_momentum_does_not_move_the_weights_in_a_batch_without_a_loss() -> None:
    module = Probe(nothing_for={2.0})
    module.configure = lambda _: SGD([module.w], lr=1.0, momentum=1.0)
    train(module, 2)
    assert module.w.item() == -1.0


@pytest.mark.parametrize(
    "how",
    [
        lambda m, e, b, optimizer, closure: (closure(), optimizer.step()),
        lambda m, e, b, optimizer, closure: optimizer.optimizer.step(closure),
    ],
    ids=["closure-then-step", "wrapped"],
)
def test_a6_a_batch_without_a_loss_does_not_step_in_an_override_either(how: Any) -> None:
    module = Stepping(how, nothing_for={2.0}, configure=counting)
    trainer = train(module, 3, LRSchedulerStepping())
    assert module.updates == [1.0, 3.0]
    assert trainer.global_step == scheduler_steps(trainer) == 2


def test_a6_a_step_of_the_wrapped_optimizer_that_was_skipped_is_announced_too() -> None:
    module = Stepping(lambda m, e, b, optimizer, closure: optimizer.optimizer.step(closure), nothing_for={2.0})
    recorder = Recorder("optimizer_step_skipped")
    train(module, 3, recorder)
    assert [event.reason for event in recorder.events] == ["no loss"]


# ------------------------------------------------------------------ A7: the raw loss


@pytest.mark.parametrize(
    "callbacks",
    [(), (GradientAccumulation(4),), (MixedPrecision("fp16"),), (GradientAccumulation(4), MixedPrecision("fp16"))],
    ids=["plain", "window", "scale", "window-and-scale"],
)
def test_a7_every_listener_sees_the_raw_loss(callbacks: Any) -> None:
    callbacks = copy.deepcopy(callbacks)
    shown: list[float] = []

    class Bar(ProgressBar):
        def metrics(self, trainer: Any, loss: Any) -> dict[str, float]:
            shown.extend([] if loss is None else [float(loss)])
            return super().metrics(trainer, loss)

    class Logging(Probe):
        hook: list[float] = []
        closure: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

        def on_before_backward(self, loss: torch.Tensor) -> None:
            self.hook.append(loss.item())

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(lambda: self.closure.append(optimizer_closure().item()))

    module = Logging(lr=0.0)
    module.w.data.fill_(2.0)
    recorder = Recorder("after_forward", "before_backward", "after_backward", "train_batch_end")
    logged: list[float] = []

    def keep(trainer: Any, event: Any) -> None:
        if event.scope == "step":
            logged.append(event.metrics["loss"].item())

    train(module, 4, *callbacks, recorder, On(metrics_logged=keep), Bar(interval=0.0, line_interval=0.0))
    raw = [2.0, 4.0, 6.0, 8.0]
    seen: dict[str, list[Any]] = {name: [] for name in recorder.names}
    for name, event in zip(recorder.names, recorder.events, strict=True):
        seen[name].append(event)
    assert [event.loss.item() for event in seen["after_forward"]] == raw
    assert [event.raw_loss.item() for event in seen["before_backward"]] == raw
    assert [event.raw_loss.item() for event in seen["after_backward"]] == raw
    assert [event.loss.item() for event in seen["train_batch_end"]] == raw
    assert [event.outputs["loss"].item() for event in seen["train_batch_end"]] == raw
    assert module.hook == raw
    windows = any(isinstance(callback, GradientAccumulation) for callback in callbacks)
    assert module.closure == ([8.0] if windows else raw)
    assert logged == ([8.0] if windows else raw)
    assert shown[:4] == raw and set(shown) == set(raw)


# ------------------------------------------------------------------ A8: skipped batches


def skip(*xs: float) -> On:
    return On(train_batch_start=lambda trainer, event: event.skip_batch() if event.batch.item() in xs else None)


@pytest.mark.parametrize("skip_first", [False, True], ids=["accumulation-first", "skip-first"])
def test_a8_a_skipped_batch_that_closes_a_window_closes_it(skip_first: bool) -> None:
    module = Probe()
    callbacks = [GradientAccumulation(2), skip(2.0)]
    trainer = train(module, 4, *(reversed(callbacks) if skip_first else callbacks))
    assert module.updates == [1.0, 3.5]
    assert module.seen == [1.0, 3.0, 4.0] and trainer.global_step == 2


def test_a8_a_skipped_batch_that_opens_a_window_opens_it() -> None:
    module = Probe()
    train(module, 4, GradientAccumulation(2), skip(3.0))
    assert module.updates == [1.5, 4.0]


def test_a8_a_skipped_batch_is_a_batch_without_a_loss() -> None:
    module = Probe(configure=counting)
    recorder = Recorder("before_forward", "before_backward", "optimizer_step_skipped", "train_batch_end")
    trainer = train(module, 2, skip(1.0), recorder, LRSchedulerStepping())
    skipped, end = recorder.events[:2]
    assert recorder.names[:2] == ["optimizer_step_skipped", "train_batch_end"]
    assert skipped.reason == "no loss" and end.loss is None and end.outputs is None
    assert recorder.names[2:] == ["before_forward", "before_backward", "train_batch_end"]
    assert trainer.global_step == scheduler_steps(trainer) == 1


def test_a8_a_window_of_skipped_batches_does_not_step() -> None:
    module = Probe()
    trainer = train(module, 4, GradientAccumulation(2), skip(1.0, 2.0))
    assert module.updates == [3.5] and trainer.global_step == 1


def test_a8_a_skipped_batch_in_manual_optimization() -> None:
    class Manual(Probe):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    module = Manual(automatic=False)
    train(module, 3, skip(2.0))
    assert module.updates == [1.0, 3.0]


# ------------------------------------------------------------------ A9: StopIteration


def exhausted(*_: Any, **__: Any) -> Any:
    return next(iter(()))


STOPPING_EVENTS = (
    *("train_epoch_start", "before_batch_fetch", "after_batch_fetch", "train_batch_start", "optimizer_step", "before_forward"),
    *("before_zero_grad", "before_backward", "gradients_ready", "before_optimizer_step", "after_update", "train_batch_end"),
    *("validation_batch_start", "train_epoch_end", "safe_point"),
)


@pytest.mark.parametrize("loader", [3, NoLength(batches(3))], ids=["sized", "unsized"])
@pytest.mark.parametrize("event", STOPPING_EVENTS)
def test_a9_stop_iteration_in_a_callback_is_an_error(event: str, loader: Any) -> None:
    class Validating(Probe):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            return None

    with pytest.raises(StopIteration):
        train(Validating(), loader, On(**{event: exhausted}), val=1)


@pytest.mark.parametrize("loader", [3, NoLength(batches(3))], ids=["sized", "unsized"])
@pytest.mark.parametrize(
    "hook",
    [
        *("training_step", "validation_step", "backward", "optimizer_step", "configure_optimizers", "on_train_batch_start"),
        *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"),
        *("on_train_epoch_end", "configure_gradient_clipping"),
    ],
)
def test_a9_stop_iteration_in_a_hook_of_the_module_is_an_error(hook: str, loader: Any) -> None:
    body: dict[str, Callable[..., Any]] = {hook: lambda self, *args, **kwargs: exhausted()}
    if hook == "on_train_epoch_end":
        body = {hook: lambda self: exhausted()}
    if hook == "on_train_batch_start":
        body = {hook: lambda self, batch, batch_idx: exhausted()}
    if hook != "validation_step":
        body["validation_step"] = lambda self, batch, batch_idx: None
    with pytest.raises(StopIteration):
        train(type("Stopping", (Probe,), body)(), loader, val=1)


def test_a9_stop_iteration_of_the_loader_ends_the_epoch() -> None:
    module = Probe()
    trainer = train(module, NoLength(batches(3)), max_epochs=2)
    assert module.updates == [1.0, 2.0, 3.0] * 2 and trainer.current_epoch == 2


def test_a9_a_stop_iteration_in_a_sized_loader_is_an_error() -> None:
    class Short(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(batches(2))

    with pytest.raises(MisconfigurationError, match=re.escape("says that it has 3 batches and ended after 2")):
        train(Probe(), Short(batches(3)))
