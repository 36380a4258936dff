"""Validate, test and predict outside a fit: their arguments, and the trainer's."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from eventtrain import MisconfigurationError, Trainer
from tests.kit import Line, ModuleOf, On, Recorder, new_trainer, train

STAGES = ("validate", "test", "predict")
BATCHES = [torch.ones(2, 1)] * 3


class Modes(Line):
    """Records in which mode its steps run."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[tuple[bool, bool]] = []

    def evaluate(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return self.layer(batch)  # type: ignore[no-any-return]

    validation_step = test_step = predict_step = evaluate  # type: ignore[assignment]


# ------------------------------------------------------------------ inference_mode


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_inference_mode_is_an_argument_of_the_trainer(stage: str, inference_mode: bool) -> None:
    model = Modes()
    getattr(new_trainer(inference_mode=inference_mode), stage)(model, BATCHES)
    assert set(model.modes) == {(inference_mode, False)}


@pytest.mark.parametrize("stage", STAGES)
def test_without_inference_mode_a_step_may_turn_gradients_on(stage: str) -> None:
    class Adversarial(Line):
        def evaluate(self, batch: Tensor, batch_idx: int) -> Any:
            with torch.enable_grad():
                x = batch.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(self(x).sum(), x)
            return gradient

        validation_step = test_step = predict_step = evaluate

    model = Adversarial()
    results = getattr(new_trainer(inference_mode=False), stage)(model, BATCHES)
    if stage == "predict":
        assert torch.equal(results[0], model.layer.weight.expand(2, 1))
        assert not results[0].is_inference()
    else:
        assert results == [{}]
    assert model.layer.weight.grad is None


def test_a_validation_within_a_fit_is_never_in_inference_mode() -> None:
    for inference_mode in (True, False):
        model = Modes()
        train(model, BATCHES, val=BATCHES, inference_mode=inference_mode)
        assert set(model.modes) == {(False, False)}


@pytest.mark.parametrize("value", ["no", None, 2])
def test_inference_mode_is_true_or_false(value: Any) -> None:
    with pytest.raises(MisconfigurationError, match=r"Trainer\(inference_mode=.*\): give True or False"):
        new_trainer(inference_mode=value)


# ------------------------------------------------------------------ return_predictions


@pytest.mark.parametrize("loaders", [1, 2])
def test_predict_returns_none_if_it_is_not_to_return_predictions(loaders: int) -> None:
    seen = Recorder("predict_batch_end")
    data = [torch.utils.data.DataLoader(torch.ones(3, 1))] * loaders  # type: ignore[arg-type, var-annotated]
    assert new_trainer(seen).predict(Line(), data, return_predictions=False) is None
    assert [event.outputs.shape for event in seen.events] == [(1, 1)] * 3 * loaders


def test_predictions_that_are_not_returned_are_not_held() -> None:
    alive: list[int] = []
    outputs: list[weakref.ref[Tensor]] = []

    class Predicts(Line):
        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            gc.collect()
            alive.append(sum(output() is not None for output in outputs))
            output = super().predict_step(batch, batch_idx)
            outputs.append(weakref.ref(output))
            return output

    new_trainer().predict(Predicts(), BATCHES, return_predictions=False)
    assert max(alive) <= 1
    assert len(new_trainer().predict(Predicts(), BATCHES)) == 3


# ------------------------------------------------------------------ no max_epochs


@pytest.mark.parametrize("stage", STAGES)
def test_a_trainer_without_a_length_evaluates(stage: str) -> None:
    trainer = Trainer(device="cpu", default_callbacks=False)
    getattr(trainer, stage)(Line(), BATCHES)
    assert trainer.max_epochs is None and "no limit" in trainer.describe()


@pytest.mark.parametrize("arguments", [{}, {"max_steps": -1}, {"min_epochs": 2}])
def test_only_fit_asks_for_a_length_before_anything_else(arguments: dict[str, Any]) -> None:
    trainer = Trainer(device="cpu", default_callbacks=False, **arguments)
    module = ModuleOf(prepare_data=lambda: pytest.fail("it has begun"))
    with pytest.raises(MisconfigurationError, match=r"The run has no end: give Trainer\(max_epochs=\.\.\.\)"):
        trainer.fit(module, BATCHES)
    assert trainer.stage is None


def test_a_trial_run_has_a_length() -> None:
    trainer = Trainer(device="cpu", default_callbacks=False, fast_dev_run=2)
    trainer.fit(Line(), BATCHES)
    assert trainer.global_step == 2


# ------------------------------------------------------------------ val_check_interval without validation


@pytest.mark.parametrize("limit", [0, 0.0])
@pytest.mark.parametrize("interval", [100, 0.5])
def test_the_interval_is_not_checked_if_nothing_is_validated(limit: float, interval: float) -> None:
    class Endless:
        def __iter__(self) -> Any:
            return iter(BATCHES)

    data: Any = BATCHES if interval == 100 else Endless()
    trainer = train(Line(), data, val=BATCHES, limit_val_batches=limit, val_check_interval=interval)
    assert trainer.global_step == 3 and not trainer.validates


def test_the_interval_is_checked_if_something_is_validated() -> None:
    with pytest.raises(MisconfigurationError, match="val_check_interval=100 is longer than the epoch, which has 3 batches"):
        train(Line(), BATCHES, val=BATCHES, val_check_interval=100)


# ------------------------------------------------------------------ on_exception


@pytest.mark.parametrize("stage", ["fit", *STAGES])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_the_modules_on_exception_gets_the_exception(stage: str, kind: type[BaseException]) -> None:
    error = kind("in the step")

    def fails(*args: Any) -> Any:
        raise error

    steps = dict.fromkeys(("training_step", "validation_step", "test_step", "predict_step"), fails)
    caught: list[BaseException] = []
    module = ModuleOf(**steps, on_exception=lambda exception: caught.append(exception))
    events = Recorder("exception")
    with pytest.raises(kind, match="in the step"):
        getattr(new_trainer(events), stage)(module, BATCHES)
    assert caught == [error] == [event.exception for event in events.events]


def test_an_on_exception_without_an_argument_is_called_and_one_that_fails_hides_nothing() -> None:
    calls: list[str] = []

    def fails(*args: Any) -> Any:
        raise RuntimeError("first")

    def on_exception() -> None:
        calls.append("called")
        raise ValueError("second")

    with pytest.raises(RuntimeError, match="first") as caught:
        train(ModuleOf(training_step=fails, on_exception=on_exception), 1, On(fit_end=lambda trainer, event: None))
    assert calls == ["called"] and any("second" in note for note in caught.value.__notes__)
