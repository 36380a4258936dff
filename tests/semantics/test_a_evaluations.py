"""A5. Automatic optimization with optimizers that evaluate their closure several times, as LBFGS does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import LBFGS, SGD

from eventtrain import MisconfigurationError
from eventtrain.callbacks import GradientAccumulation, GradientClipping, MixedPrecision
from tests.kit import On, Probe, Recorder, batches, train
from tests.reference import backward
from tests.semantics.modules import Stepping, assert_same_training

# ------------------------------------------------------------------ A5: several evaluations


def quadratic(module: Probe) -> Probe:
    """Makes the probe's loss one that LBFGS has something to do with."""
    module.loss = lambda x: ((module.w - 3.0) ** 2 * x + module.w**4).sum()  # type: ignore[method-assign]
    return module


def lbfgs(module: Probe, **options: Any) -> Probe:
    """Gives the probe an LBFGS."""
    module.configure = lambda _: module.watch(LBFGS([module.w], **{"lr": 0.5, "max_iter": 4, **options}))
    return module


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_a5_lbfgs_equals_the_hand_written_loop(line_search: str | None) -> None:
    module = lbfgs(quadratic(Probe(width=2)), line_search_fn=line_search)
    trainer = train(module, 3, max_epochs=2)

    model = quadratic(Probe(width=2))
    optimizer = LBFGS([model.w], lr=0.5, max_iter=4, line_search_fn=line_search)
    evaluations = 0
    for x in batches(3) * 2:

        def closure(x: Any = x) -> torch.Tensor:
            nonlocal evaluations
            evaluations += 1
            loss = model.loss(x)
            optimizer.zero_grad()
            backward(loss)
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
    assert_same_training(module, trainer.optimizers[0], model, optimizer)
    assert len(module.seen) == evaluations > 6
    assert trainer.global_step == 6 and trainer.optimizers[0].num_steps == 6


PER_STEP = ("optimizer_step", "after_optimizer_step", "after_update")
PER_EVALUATION = (
    *("before_forward", "after_forward", "before_zero_grad", "after_zero_grad", "before_backward", "after_backward"),
    *("reduce_gradients", "unscale_gradients", "gradients_ready"),
    *("before_optimizer_step", "before_gradient_clipping", "after_gradient_clipping"),
)


def test_a5_events_once_per_step_or_once_per_evaluation() -> None:
    hook_calls: list[int] = []

    def hook(module: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        hook_calls.append(batch_idx)
        optimizer.step(closure)

    module = lbfgs(quadratic(Stepping(hook)))
    recorder = Recorder(*PER_STEP, *PER_EVALUATION)
    train(module, 3, GradientClipping(0.5), recorder)
    evaluations = len(module.seen)
    assert evaluations > 6 and hook_calls == [0, 1, 2]
    assert {name: recorder.count(name) for name in PER_STEP} == dict.fromkeys(PER_STEP, 3)
    assert {name: recorder.count(name) for name in PER_EVALUATION} == dict.fromkeys(PER_EVALUATION, evaluations)
    indices = [
        event.evaluation for name, event in zip(recorder.names, recorder.events, strict=True) if name == PER_EVALUATION[9]
    ]
    assert [index for index in indices if index == 1] == [1] * 3 and max(indices) > 1


def test_a5_each_evaluation_is_clipped() -> None:
    norms: list[float] = []

    class Clipped(LBFGS):
        def step(self, closure: Any = None) -> Any:
            def noting() -> Any:
                loss = closure()
                norms.append(self.param_groups[0]["params"][0].grad.norm().item())
                return loss

            return super().step(noting)  # type: ignore[no-untyped-call]

    module = quadratic(Probe())
    module.configure = lambda _: Clipped([module.w], lr=0.01, max_iter=4)
    train(module, 2, GradientClipping(0.5))
    assert len(norms) > 2 and norms == pytest.approx([0.5] * len(norms), abs=1e-5)


@pytest.mark.parametrize("windows", [2, {0: 1, 5: 2}], ids=["number", "schedule"])
def test_a5_lbfgs_with_accumulation_is_refused_at_setup(windows: Any) -> None:
    module = lbfgs(quadratic(Probe()))
    with pytest.raises(MisconfigurationError, match="LBFGS"):
        train(module, 4, GradientAccumulation(windows), max_epochs=6)
    assert module.seen == [], "refused at setup"


def test_a5_lbfgs_with_windows_of_one_batch_trains() -> None:
    expected, module = lbfgs(quadratic(Probe())), lbfgs(quadratic(Probe()))
    train(expected, 3)
    train(module, 3, GradientAccumulation({0: 1}))
    assert torch.equal(module.w, expected.w)


def test_a5_lbfgs_with_loss_scaling_is_refused_at_setup() -> None:
    module = lbfgs(quadratic(Probe()))
    with pytest.raises(MisconfigurationError, match="LBFGS"):
        train(module, 4, MixedPrecision("fp16"))
    assert module.seen == [], "refused at setup"


class Twice(SGD):
    """Evaluates its closure twice in each step, and moves the weights in between."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        super().step()
        with torch.enable_grad():
            loss = closure()
        super().step()
        return loss


def twice(module: Probe) -> Probe:
    module.configure = lambda _: Twice([module.w], lr=0.1)
    return module


def test_a5_another_optimizer_that_evaluates_twice_trains() -> None:
    module = twice(quadratic(Probe()))
    recorder = Recorder("after_optimizer_step", "after_update", "before_optimizer_step")
    train(module, 2, recorder)

    model = quadratic(Probe())
    optimizer = Twice([model.w], lr=0.1)
    for x in batches(2):

        def closure(x: Any = x) -> torch.Tensor:
            loss = model.loss(x)
            optimizer.zero_grad()
            backward(loss)
            return loss

        optimizer.step(closure)
    assert torch.equal(module.w, model.w)
    assert recorder.names == ["before_optimizer_step", "before_optimizer_step", "after_optimizer_step", "after_update"] * 2


@pytest.mark.parametrize("raw", [False, True], ids=["wrapper", "wrapped"])
@pytest.mark.parametrize(
    "policy",
    [
        lambda: GradientAccumulation(2),
        lambda: GradientAccumulation(lambda trainer: 2),
    ],
    ids=["number", "function"],
)
def test_a5_a_second_evaluation_in_a_window_is_an_error_for_every_class(policy: Any, raw: bool) -> None:
    module = twice(Stepping(lambda m, e, b, optimizer, closure: (optimizer.optimizer if raw else optimizer).step(closure)))
    with pytest.raises(MisconfigurationError, match=r"(?s)Twice.*second time.*accumulation"):
        train(module, 4, policy())


def test_a5_lbfgs_in_a_window_that_a_function_asks_for_is_an_error_when_it_happens() -> None:
    module = lbfgs(quadratic(Probe()))
    with pytest.raises(MisconfigurationError, match=r"(?s)LBFGS.*second time.*accumulation"):
        train(module, 4, GradientAccumulation(lambda trainer: 1 if trainer.global_step < 1 else 2))
    assert len(module.updates) == 1, "the window of one batch trained"


def test_a5_a_second_evaluation_under_loss_scaling_is_an_error_for_every_class() -> None:
    module = twice(quadratic(Probe()))
    with pytest.raises(MisconfigurationError, match=r"(?s)Twice.*second time.*loss scaling"):
        train(module, 4, MixedPrecision("fp16"))
    assert len(module.seen) == 2, "when it happens"


def test_a5_a_veto_at_the_first_evaluation_updates_nothing() -> None:
    module = lbfgs(quadratic(Probe()))
    recorder = Recorder("optimizer_step_skipped", "after_optimizer_step", "after_update")
    trainer = train(module, 2, On(before_optimizer_step=lambda trainer, event: event.skip("not now")), recorder)
    assert module.w.item() == 0.0 and trainer.global_step == 0 and len(module.seen) == 2
    assert recorder.names == ["optimizer_step_skipped"] * 2
    assert [event.reason for event in recorder.events] == ["not now"] * 2


def test_a5_a_veto_at_a_later_evaluation_is_an_error() -> None:
    def veto(trainer: Any, event: Any) -> None:
        if event.evaluation == 2:
            event.skip("too late")

    with pytest.raises(MisconfigurationError, match=r"(?s)LBFGS.*too late.*evaluation 2"):
        train(lbfgs(quadratic(Probe())), 2, On(before_optimizer_step=veto))


def test_a5_a_loss_that_vanishes_at_a_later_evaluation_is_an_error() -> None:
    class Vanishing(Probe):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if len(self.seen) != 2 else None

    with pytest.raises(MisconfigurationError, match=r"(?s)LBFGS.*no loss"):
        train(lbfgs(quadratic(Vanishing())), 2)
