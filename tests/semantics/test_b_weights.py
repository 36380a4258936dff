"""B4. Gradient accumulation with weights: the mean over a window's samples, batches or tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from eventtrain import MisconfigurationError
from eventtrain.callbacks import GradientAccumulation
from tests.kit import FakeProcesses, On, Recorder, gradient, new_trainer, train
from tests.reference import backward
from tests.resuming import assert_same
from tests.semantics.modules import Regression, Weighted, regression_data, weighted

# ------------------------------------------------------------------ B4: weights


TWO_WINDOWS = ((1.0, 1), (2.0, 3), (3.0, 6), (5.0, 2))


@pytest.mark.parametrize("make", [int, float, torch.tensor], ids=["int", "float", "tensor"])
def test_b4_the_gradient_is_the_weighted_mean(make: Any) -> None:
    module = Weighted()
    train(module, weighted(*((x, make(weight)) for x, weight in TWO_WINDOWS)), GradientAccumulation(2))
    assert module.updates == [1.75, 3.5]  # (1 + 6) / 4, (18 + 10) / 8


def test_b4_a_short_window() -> None:
    module = Weighted()
    train(module, weighted((1.0, 2), (2.0, 2), (3.0, 4)), GradientAccumulation(2))
    assert module.updates == [1.5, 3.0]


def test_b4_windows_of_one_batch() -> None:
    module = Weighted()
    train(module, weighted((1.0, 2), (2.0, 8), (3.0, 4)), GradientAccumulation(1))
    assert module.updates == [1.0, 2.0, 3.0]


def test_b4_without_accumulation_a_weight_changes_nothing() -> None:
    module = Weighted()
    train(module, weighted((1.0, 2), (2.0, 8), (3.0, 4)))
    assert module.updates == [1.0, 2.0, 3.0]


def test_b4_fixed_does_not_weight() -> None:
    module = Weighted()
    train(module, weighted(*TWO_WINDOWS), GradientAccumulation(2, normalize="fixed"))
    assert module.updates == [1.5, 4.0]


def test_b4_a_batch_without_a_loss_has_no_weight() -> None:
    class Missing(Weighted):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch[0].item() == 2.0 else super().training_step(batch, batch_idx)

    module = Missing()
    train(module, weighted((1.0, 1), (2.0, 3), (3.0, 3)), GradientAccumulation(3))
    assert module.updates == [2.5]  # (1 + 9) / 4


def test_b4_a_weight_of_zero_contributes_nothing() -> None:
    module = Weighted()
    train(module, weighted((1.0, 4), (2.0, 0), (3.0, 0), (5.0, 2)), GradientAccumulation(2))
    assert module.updates == [1.0, 5.0]


@pytest.mark.parametrize("make", [int, float, torch.tensor], ids=["int", "float", "tensor"])
def test_b4_the_first_weight_of_the_run_may_be_zero(make: Any) -> None:
    module = Weighted()
    train(module, weighted((1.0, make(0)), (2.0, make(1)), (3.0, make(1)), (5.0, make(1))), GradientAccumulation(2))
    assert module.updates == [2.0, 4.0]


@pytest.mark.parametrize("make", [int, float, torch.tensor], ids=["int", "float", "tensor"])
def test_b4_a_window_whose_weights_are_all_zero_has_no_gradient(make: Any) -> None:
    module = Weighted()
    train(module, weighted((1.0, make(4)), (2.0, make(0)), (3.0, make(0))), GradientAccumulation(1))
    assert module.updates == [1.0, 0.0, 0.0]


def test_b4_the_arithmetic_is_that_of_the_rule() -> None:
    weights = [3.0, 7.0, 1.0, 5.0, 11.0, 2.0, 13.0]
    module = Regression()
    model = copy.deepcopy(module)
    data = regression_data(7, weights)
    train(module, data, GradientAccumulation(3), max_epochs=2)

    optimizer = AdamW(model.parameters(), lr=0.01)
    reference = weights[0]
    for _ in range(2):
        for start in range(0, 7, 3):
            inside = data[start : start + 3]
            optimizer.zero_grad()
            for batch in inside:
                backward(model.loss(batch) * batch[2] / (3 * reference))
            for parameter in model.parameters():
                gradient(parameter).mul_(3 * reference / sum(batch[2] for batch in inside))
            optimizer.step()
    assert_same(dict(module.state_dict()), dict(model.state_dict()), "module")


def test_b4_backward_runs_on_the_loss_in_the_unit_of_the_first_weight() -> None:
    module = Weighted(lr=0.0)
    module.w.data.fill_(1.0)
    recorder = Recorder("before_backward", "gradients_ready")
    train(module, weighted((1.0, 1000.0), (2.0, 3000.0), (3.0, 500.0)), GradientAccumulation(2), recorder)
    losses = [
        event.loss.item() for name, event in zip(recorder.names, recorder.events, strict=True) if name == "before_backward"
    ]
    assert losses == [0.5, 3.0, 0.75], "as large as an unweighted loss: loss * w / (N * 1000)"
    ready = [event for name, event in zip(recorder.names, recorder.events, strict=True) if name == "gradients_ready"]
    assert [(event.weight, event.weight_reference, event.batches) for event in ready] == [
        (4000.0, 1000.0, 2),
        (500.0, 1000.0, 1),
    ]


def test_b4_weights_that_are_tensors_stay_tensors() -> None:
    recorder = Recorder("gradients_ready")
    pairs = weighted((1.0, torch.tensor(2.0)), (2.0, torch.tensor(6.0)))
    train(Weighted(), pairs, GradientAccumulation(2), recorder)
    (event,) = recorder.events
    assert isinstance(event.weight, torch.Tensor) and event.weight.item() == 8.0
    assert isinstance(event.weight_reference, torch.Tensor) and event.weight_reference.item() == 2.0


@pytest.mark.parametrize("make", [float, torch.tensor], ids=["float", "tensor"])
def test_b4_the_first_weight_is_kept_in_checkpoints(make: Any, tmp_path: Any) -> None:
    module = Weighted()
    policy = GradientAccumulation(2)
    train(
        module,
        weighted((1.0, make(4.0)), (2.0, make(8.0))),
        policy,
        On(safe_point=lambda trainer, event: trainer.save_checkpoint(tmp_path / "run.ckpt") if event.epoch_end else None),
    )
    resumed = Weighted()
    references: list[float] = []
    note = On(gradients_ready=lambda trainer, event: references.append(float(event.weight_reference)))
    trainer = new_trainer(GradientAccumulation(2), note, max_epochs=2)
    trainer.fit(resumed, weighted((1.0, make(16.0)), (2.0, make(16.0))), ckpt_path=tmp_path / "run.ckpt")
    assert set(references) == {4.0} and set(resumed.updates) == {1.5}


@pytest.mark.parametrize("make", [float, torch.tensor], ids=["float", "tensor"])
def test_b4_weights_are_summed_across_processes(make: Any) -> None:
    """The other process has the gradients 7 and 9 with the weights 4 and 2, in a window of two batches."""

    class Weighing(FakeProcesses):
        def end_reduction(self, batches: int, missing: int, weight: Any) -> tuple[int, Any]:
            reductions.append((batches, missing, float(weight)))
            return batches, (weight + 6.0) / 2

    def average(trainer: Any, event: Any) -> None:
        parameter = trainer.module.w  # as an all-reduce with a mean does with the other process's gradients
        theirs = (7.0 * 4.0 + 9.0 * 2.0) / (2 * 1.0)
        parameter.grad.add_(theirs).div_(2)

    module = Weighted()
    trainer = new_trainer(GradientAccumulation(2), On(reduce_gradients=average))
    trainer.processes = processes = Weighing()
    reductions: list[Any] = []
    trainer.fit(module, weighted((1.0, make(1.0)), (2.0, make(3.0))))
    assert module.updates == [pytest.approx((1 * 1 + 2 * 3 + 7 * 4 + 9 * 2) / (1 + 3 + 4 + 2))]
    assert reductions == [(2, 0, 4.0)] and processes.reduced == []


@pytest.mark.parametrize("missing", [1.0, 2.0])
def test_b4_some_batches_of_a_window_without_a_weight_are_an_error(missing: float) -> None:
    class Partly(Weighted):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            returned = super().training_step(batch, batch_idx)
            return returned["loss"] if batch[0].item() == missing else returned

    with pytest.raises(MisconfigurationError, match="weight"):
        train(Partly(), weighted((1.0, 1), (2.0, 3)), GradientAccumulation(2))
