"""Runs that train nothing say so: a forgotten loss, epochs without an update, runs that would never end."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from eventtrain import LightningModule, MisconfigurationError
from eventtrain.callbacks import GradientAccumulation, MixedPrecision
from eventtrain.core.closure import never_returns_a_value
from tests.kit import ModuleOf, NoLength, On, Probe, batches, new_trainer, train

FORGOTTEN = "training_step returned None in the first batch"
NOTHING = "Nothing was trained in epoch"


class Forgets(ModuleOf):
    """Computes the loss, logs it, and forgets to return it."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.log("loss", loss)


class Manual(Probe):
    """Steps in the batches that a function chooses."""

    def __init__(self, steps: Callable[[int], bool]) -> None:
        super().__init__(automatic=False)
        self.steps = steps

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        if self.steps(self.trainer.total_batch_idx):
            optimizer.step()
            optimizer.zero_grad()


def said(run: Callable[[], Any]) -> list[str]:
    """Return the warnings of a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught]


# ------------------------------------------------------------------ a forgotten loss


def test_a_forgotten_loss_is_warned_of_at_the_first_batch_and_then_for_each_epoch() -> None:
    messages = said(lambda: train(Forgets(), 3, max_epochs=2))
    assert len(messages) == 3
    assert messages[0].startswith(FORGOTTEN) and "return loss" in messages[0]
    for epoch, message in enumerate(messages[1:]):
        assert message.startswith(f"{NOTHING} {epoch}: none of its batches had a loss")


def test_the_first_warning_comes_in_the_first_batch() -> None:
    seen: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=FORGOTTEN):
            train(Forgets(), 3, On(train_batch_start=lambda trainer, event: seen.append(event.batch_idx)))
    assert seen == [0]


def test_a_forgotten_loss_under_accumulation_is_warned_of_at_the_first_batch() -> None:
    messages = said(lambda: train(Forgets(), 4, GradientAccumulation(2)))
    assert [message[:20] for message in messages] == [FORGOTTEN[:20], f"{NOTHING} 0"[:20]]


def test_a_step_that_returns_none_on_purpose_is_not_warned_of() -> None:
    assert said(lambda: train(Probe(nothing_for={1.0, 3.0}), 4)) == []


def test_an_epoch_without_a_loss_is_warned_of_even_if_others_had_some() -> None:
    class Second(Probe):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return None if self.current_epoch == 1 else self.loss(batch)

    messages = said(lambda: train(Second(), 2, max_epochs=3))
    assert [message[: len(NOTHING) + 2] for message in messages] == [f"{NOTHING} 1"]


def test_manual_optimization_returns_none_in_silence() -> None:
    assert said(lambda: train(Manual(lambda n: True), 3)) == []
    assert said(lambda: train(Manual(lambda n: False), 3)) == []


def test_a_step_of_ones_own_is_no_forgotten_loss() -> None:
    class Own(ModuleOf):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.loss(batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    assert said(lambda: train(Own(), 3)) == []


def test_a_resumed_run_does_not_warn_of_the_rest_of_an_epoch(in_tmp_path: Any) -> None:
    """The checkpoint is written after the only batch of the epoch that has a loss."""
    save = On(take_checkpoint=lambda trainer, event: trainer.batch_idx == 0 and trainer.save_checkpoint("mid.ckpt"))
    train(Probe(nothing_for={2.0, 3.0}), 3, save)
    resumed = new_trainer(max_epochs=1)
    assert said(lambda: resumed.fit(Probe(nothing_for={2.0, 3.0}), batches(3), ckpt_path="mid.ckpt")) == []
    assert resumed.global_step == 1


def no_return(batch: Any) -> None:
    batch + 1


def bare_return(batch: Any) -> None:
    if batch:
        return
    batch + 1


def one_value(batch: Any) -> Any:
    if batch:
        return None
    return batch


def expression(batch: Any) -> Any:
    return batch if batch else None


def constant(batch: Any) -> Any:
    return 0.5


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (no_return, True),
        (bare_return, True),
        (lambda batch: None, True),
        (Forgets().training_step, True),
        (one_value, False),
        (expression, False),
        (constant, False),
        (lambda batch: print(batch), False),
        (len, False),
        (torch.nn.Linear(1, 1), False),
    ],
)
def test_a_function_that_never_returns_a_value_is_told_by_its_code(function: Any, expected: bool) -> None:
    assert never_returns_a_value(function) is expected


# ------------------------------------------------------------------ runs that would never end


def skips_all(trainer: Any, event: Any) -> None:
    event.skip_batch()


def vetoes_all(trainer: Any, event: Any) -> None:
    event.skip("not today")


def ends_all(trainer: Any, event: Any) -> None:
    event.end_epoch()


def no_optimizer() -> LightningModule:
    module = ModuleOf()
    module.configure_optimizers = lambda: None  # type: ignore[method-assign]
    return module


ENDLESS: dict[str, tuple[Callable[[], LightningModule], tuple[Any, ...], str]] = {
    "forgotten loss": (Forgets, (), "none of its batches had a loss"),
    "None": (lambda: Probe(nothing_for={1.0, 2.0, 3.0}), (), "none of its batches had a loss"),
    "None in windows": (
        lambda: Probe(nothing_for={1.0, 2.0, 3.0}),
        (GradientAccumulation(2),),
        "none of its batches had a loss",
    ),
    "None in windows that carry over": (
        lambda: Probe(nothing_for={1.0, 2.0, 3.0}),
        (GradientAccumulation(2, remainder="carry"),),
        " 1: none of its batches had a loss",
    ),
    "all batches skipped": (Probe, (On(train_batch_start=skips_all),), "none of its batches had a loss"),
    "all steps vetoed": (Probe, (On(before_optimizer_step=vetoes_all),), r"its steps were skipped \(not today\)"),
    "all vetoed in manual optimization": (
        lambda: Manual(lambda n: True),
        (On(before_optimizer_step=vetoes_all),),
        r"its steps were skipped \(not today\)",
    ),
    "manual, without a step": (lambda: Manual(lambda n: False), (), "no optimizer was stepped"),
    "no optimizer": (no_optimizer, (), "no optimizer was stepped"),
}


@pytest.mark.filterwarnings("ignore:Nothing was trained", f"ignore:{FORGOTTEN}", "ignore:.*returned no optimizer")
@pytest.mark.parametrize("kind", ENDLESS)
def test_an_epoch_without_an_update_ends_a_run_that_only_max_steps_would_end(kind: str) -> None:
    make, callbacks, message = ENDLESS[kind]
    with pytest.raises(MisconfigurationError, match=rf"{NOTHING}.*{message}.*max_steps=2.*max_epochs="):
        train(make(), 3, *callbacks, max_steps=2)


@pytest.mark.filterwarnings("ignore:Nothing was trained", f"ignore:{FORGOTTEN}", "ignore:.*returned no optimizer")
@pytest.mark.parametrize("kind", ENDLESS)
def test_with_max_epochs_the_run_ends_there(kind: str) -> None:
    make, callbacks, _ = ENDLESS[kind]
    trainer = train(make(), 3, *callbacks, max_steps=2, max_epochs=3)
    assert (trainer.current_epoch, trainer.global_step) == (3, 0)


def test_epochs_that_are_ended_before_their_first_batch_end_the_run_too() -> None:
    with pytest.raises(MisconfigurationError, match=r"epoch 0: it was ended \(a listener of train_batch_start\)"):
        train(Probe(), 3, On(train_batch_start=ends_all), max_steps=2)


def test_a_loader_without_batches_ends_the_run_too() -> None:
    with pytest.raises(MisconfigurationError, match="NoLength"):
        train(Probe(), NoLength([]), max_steps=2)


def test_a_window_that_is_open_at_the_end_of_an_epoch_may_step_in_the_next() -> None:
    module = Probe()
    trainer = train(module, 2, GradientAccumulation(5, remainder="carry"), max_steps=2)
    assert (trainer.global_step, trainer.current_epoch) == (2, 5)


def test_epochs_that_overflow_are_left_to_loss_scaling() -> None:
    """The scale is halved until the gradient fits: eight epochs of one batch."""

    class Float16Scale(Probe):
        def loss(self, x: Tensor) -> Tensor:
            return super().loss(x) * 1e30

    scaler = GradScaler(device="cpu", init_scale=2.0**36)
    trainer = train(Float16Scale(lr=1e-30), [1], MixedPrecision("fp16", scaler=scaler), max_steps=1)
    assert trainer.global_step == 1 and trainer.current_epoch > 3


def test_a_run_that_is_stopped_ends_as_asked() -> None:
    def stop(trainer: Any, event: Any) -> None:
        trainer.stop("enough")

    trainer = train(Manual(lambda n: False), 3, On(train_epoch_end=stop), max_steps=2)
    assert trainer.stop_reason == "enough"


def test_the_rest_of_an_epoch_after_a_checkpoint_needs_no_update(in_tmp_path: Any) -> None:
    """In the whole epoch there was one, before the checkpoint."""
    save = On(take_checkpoint=lambda trainer, event: trainer.batch_idx == 0 and trainer.save_checkpoint("mid.ckpt"))
    train(Manual(lambda n: n % 3 == 0), 3, save, max_epochs=1)
    resumed = new_trainer(max_steps=2)
    resumed.fit(Manual(lambda n: n % 3 == 0), batches(3), ckpt_path="mid.ckpt")
    assert resumed.global_step == 2


def test_a_step_at_the_epochs_end_is_an_update_of_the_epoch() -> None:
    module = Manual(lambda n: False)

    def step() -> None:
        module.optimizers().step()
        module.optimizers().zero_grad()

    module.on_train_epoch_end = step  # type: ignore[method-assign]
    trainer = train(module, 3, max_steps=2)
    assert (module.w.item(), trainer.current_epoch) == (-12.0, 2)


def test_no_limit_at_all_is_no_error() -> None:
    def stop(trainer: Any, event: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.stop("enough")

    assert train(Manual(lambda n: False), 2, On(train_epoch_end=stop), max_epochs=-1).current_epoch == 2
