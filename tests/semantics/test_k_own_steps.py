"""K4. A step that the user's own code takes in automatic optimization is a step: it updates, clips, publishes and counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, SGD, Adam

from eventtrain import LightningModule
from eventtrain.callbacks import EventTimeline, GradientAccumulation, GradientClipping, MixedPrecision, Profiler
from tests.kit import ModuleOf, On, Probe, Recorder, batches, new_trainer, train


class Own(Probe):
    """Zeroes, runs backward and steps by itself in each training step.

    Args:
        returns: Whether the step also returns its loss.
        raw: Whether it steps the wrapped optimizer.
        steps: The number of own steps in each batch.
        **options: As for the probe.
    """

    def __init__(self, *, returns: bool = False, raw: bool = False, steps: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.returns, self.raw, self.steps = returns, raw, steps

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        for _ in range(self.steps):
            step(self, batch, raw=self.raw)
        return self.loss(batch) if self.returns else None


def step(module: Any, batch: Tensor, *, raw: bool = False) -> None:
    optimizer = module.optimizers(use_pl_optimizer=not raw)
    optimizer.zero_grad()
    module.loss(batch).backward()
    optimizer.step()


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("returns", "weight", "steps"), [(False, -6.0, 3), (True, -12.0, 6)])
def test_k4_a_step_of_ones_own_steps(returns: bool, weight: float, steps: int, raw: bool) -> None:
    updates = Recorder("after_update")
    module = Own(returns=returns, raw=raw)
    trainer = train(module, 3, updates)
    assert module.w.item() == weight
    assert trainer.global_step == updates.count("after_update") == 3
    assert trainer.optimizers[0].num_steps == len(module.updates) == steps


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("steps", [2, 5])
def test_k4_several_steps_of_a_batch_count_once(steps: int, raw: bool) -> None:
    module = Own(steps=steps, raw=raw)
    trainer = train(module, 3)
    assert module.w.item() == -6.0 * steps
    assert (trainer.global_step, trainer.optimizers[0].num_steps) == (3, 3 * steps)


def test_k4_it_publishes_the_events_of_a_step() -> None:
    names = ("optimizer_step", "before_zero_grad", "before_optimizer_step", "gradients_ready", "after_optimizer_step")
    recorder = Recorder(*names, "optimizer_step_skipped", "after_update")
    train(Own(), 1, recorder)
    own = ["optimizer_step", "gradients_ready", "before_optimizer_step", "after_optimizer_step"]
    assert recorder.names == [
        *("optimizer_step", "before_zero_grad"),  # the loop's step begins, and then training_step zeroes
        *own,
        *("before_zero_grad", "optimizer_step_skipped", "after_update"),
    ]
    assert recorder.of("gradients_ready")[0].batches is None
    assert recorder.of("optimizer_step_skipped")[0].reason == "no loss"


HOOKS: dict[str, Callable[..., int]] = {
    "on_fit_start": lambda: 1,
    "on_train_start": lambda: 1,
    "on_train_epoch_start": lambda: 2,
    "on_train_batch_start": lambda: 6,
    "on_train_batch_end": lambda: 6,
    "on_train_epoch_end": lambda: 2,
    "on_train_end": lambda: 1,
}


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
def test_k4_a_step_in_any_hook_steps_and_counts(hook: str, raw: bool) -> None:
    calls = HOOKS[hook]()
    module = Probe()
    setattr(module, hook, lambda *args: step(module, torch.tensor(10.0), raw=raw))
    updates, steps = Recorder("after_update"), Recorder("after_optimizer_step")
    trainer = train(module, 3, updates, steps, max_epochs=2)
    assert module.w.item() == -12.0 - 10.0 * calls
    assert trainer.optimizers[0].num_steps == 6 + calls
    assert steps.count("after_optimizer_step") == 6 + (0 if raw else calls)
    in_batches = "batch" in hook
    assert trainer.global_step == updates.count("after_update") == 6 + (0 if in_batches else calls)


@pytest.mark.parametrize("hook", ["on_after_backward", "on_before_zero_grad", "on_before_backward"])
def test_k4_a_step_in_a_hook_of_the_loops_own_step_steps(hook: str) -> None:
    """As a loop does that steps there with the gradients of the moment."""
    module = Probe()
    inside: list[int] = []

    def own(*args: Any) -> None:
        if not inside and module.w.grad is not None:
            inside.append(1)
            module.optimizers().step()
            inside.clear()

    setattr(module, hook, own)
    trainer = train(module, 3)
    expected = {"on_after_backward": -12.0, "on_before_zero_grad": -9.0, "on_before_backward": -6.0}  # zeroed before backward
    assert module.w.item() == expected[hook]
    assert trainer.global_step == 3


def test_k4_it_is_clipped() -> None:
    module = Own()
    train(module, [1, 20, 3], GradientClipping(2.0))
    assert [round(update, 4) for update in module.updates] == [1.0, 2.0, 2.0]


def test_k4_it_can_be_vetoed() -> None:
    skips = Recorder("optimizer_step_skipped")
    module = Own()
    veto = On(before_optimizer_step=lambda trainer, event: event.skip("mine") if trainer.batch_idx == 1 else None)
    trainer = train(module, 3, veto, skips)
    assert module.w.item() == -4.0 and trainer.global_step == 2
    assert [event.reason for event in skips.events] == ["no loss", "mine", "no loss", "no loss"]


def test_k4_the_state_of_the_optimizer_is_that_of_a_plain_loop() -> None:
    module = Own(returns=True, configure=lambda sgd: Adam(sgd.param_groups[0]["params"], lr=0.1))
    trainer = train(module, 4)
    w = nn.Parameter(torch.zeros(1))
    optimizer = Adam([w], lr=0.1)
    for x in batches(4):
        for _ in range(2):
            optimizer.zero_grad()
            (w * x).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert torch.equal(module.w, w)
    (ours,), (theirs,) = trainer.optimizers[0].state.values(), optimizer.state.values()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_k4_a_closure_of_ones_own() -> None:
    """LBFGS in the step, on ten evaluations of a closure that the loop knows nothing of."""

    class Inner(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([3.0, -2.0]))

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = (self.w * batch).cosh().sum()
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            optimizer.step(closure)

        def configure_optimizers(self) -> Any:
            return LBFGS([self.w], max_iter=10)

    module = Inner()
    trainer = train(module, 2)
    w = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = LBFGS([w], max_iter=10)
    for x in batches(2):

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = (w * x).cosh().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
    assert torch.equal(module.w, w)
    assert trainer.global_step == trainer.optimizers[0].num_steps == 2


@pytest.mark.parametrize("hook", ["closure first", "step in the hook"])
def test_k4_a_module_with_optimizer_step_of_its_own(hook: str) -> None:
    class Hooked(Own):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if hook == "closure first":
                optimizer_closure()
                optimizer.step()
            else:
                optimizer.step(closure=optimizer_closure)

    module = Hooked(returns=True)
    trainer = train(module, 3)
    assert module.w.item() == -12.0
    assert (trainer.global_step, trainer.optimizers[0].num_steps) == (3, 6)


@pytest.mark.parametrize("normalize", ["window", "fixed"])
def test_k4_a_step_in_an_open_window_takes_the_gradients_as_they_are(normalize: Any) -> None:
    """Windows of two over x = 1, 2, 3: the own step after batch 0 takes 1 / 2, and the window goes on with it."""
    module = Probe()

    def own(outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            module.optimizers().step()

    module.on_train_batch_end = own  # type: ignore[method-assign]
    trainer = train(module, 4, GradientAccumulation(2, normalize=normalize))
    assert module.updates == [0.5, 1.5, 3.5]
    assert trainer.global_step == 3  # batches 0, 1 and 3


def test_k4_a_step_in_the_batch_that_opens_a_window_is_not_normalised() -> None:
    """A window of two that the epoch cuts short: the loop's mean is over one batch, and the own step's gradient is plain."""
    module = Own(returns=True)
    train(module, 3, GradientAccumulation(2))
    # Batch 1 zeroes and steps with 2, which is still held when the window's half of 2 is added, as in a plain loop.
    assert module.updates == [1.0, 2.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize("hook", ["on_after_backward", "on_before_backward"])
def test_k4_a_step_in_a_hook_of_backward_takes_the_windows_gradients_as_they_are(hook: str) -> None:
    """A window of two that the epoch cuts short: only the loop's step takes the mean over one batch."""
    module = Probe()
    setattr(module, hook, lambda *args: module.optimizers().step() if module.trainer.batch_idx == 2 else None)
    train(module, [1, 2, 4], GradientAccumulation(2))
    assert module.updates == [1.5, 2.0 if hook == "on_after_backward" else None, 4.0]


def test_k4_clipping_by_hand_after_backward_sees_the_windows_mean() -> None:
    module = Probe()
    norms: list[float] = []

    def clip() -> None:
        if module.trainer.is_last_batch:
            norms.append(module.clip_gradients(module.optimizers(), 3.0).item())  # type: ignore[union-attr]

    module.on_after_backward = clip  # type: ignore[method-assign]
    train(module, [1, 2, 4], GradientAccumulation(2))
    assert norms == [4.0]
    assert [round(update, 4) for update in module.updates] == [1.5, 3.0]


def test_k4_under_loss_scaling_a_step_of_ones_own_takes_its_unscaled_gradient() -> None:
    module = Own(returns=True)
    trainer = train(module, 3, MixedPrecision("fp16", scaler=GradScaler(device="cpu", init_scale=1024.0)))
    assert module.updates == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    assert trainer.global_step == 3


def test_k4_with_torch_compile_the_bits_are_the_same() -> None:
    module = Own(returns=True)
    module.training_step = torch.compile(module.training_step, backend="eager")  # type: ignore[method-assign]
    trainer = train(module, 3)
    assert module.w.item() == -12.0
    assert trainer.global_step == 3


@pytest.mark.usefixtures("in_tmp_path")
@pytest.mark.parametrize("callback", [EventTimeline, Profiler])
def test_k4_timelines_and_profilers_take_a_step_in_a_step(callback: Any) -> None:
    module = Own(returns=True)
    train(module, 3, callback())
    assert module.w.item() == -12.0


def test_k4_a_run_is_resumed_after_steps_of_ones_own(in_tmp_path: Any) -> None:
    def make() -> Any:
        module = ModuleOf()
        module.configure_optimizers = lambda: SGD([module.w], lr=0.1, momentum=0.9)  # type: ignore[method-assign]
        module.on_train_epoch_end = lambda: step(module, torch.tensor(5.0))  # type: ignore[method-assign]
        return module

    whole, first, second = make(), make(), make()
    trainer = train(whole, 3, max_epochs=3)
    save = On(take_checkpoint=lambda trainer, event: event.epoch_end and trainer.save_checkpoint("own.ckpt"))
    train(first, 3, save, max_epochs=1)
    resumed = new_trainer(max_epochs=3)
    resumed.fit(second, batches(3), ckpt_path="own.ckpt")
    assert torch.equal(whole.w, second.w)
    assert resumed.global_step == trainer.global_step == 12
    assert resumed.optimizers[0].num_steps == 12
