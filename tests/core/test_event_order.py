"""The order of events: the list that a run publishes equals one that was written by hand from the design."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping
from eventtrain.describe import event_of
from eventtrain.events import (
    EVENTS,
    LOOP_MAP,
    Event,
    FindCheckpoint,
    MetricsLogged,
    RequestStop,
    TakeCheckpoint,
    evaluation_map,
)
from tests.kit import Line, new_trainer, rows

# ------------------------------------------------------------------ the pieces of the expected lists

FETCH = ["before_batch_fetch", "after_batch_fetch"]
FORWARD = ["before_forward", "after_forward"]
ZERO_GRAD = ["before_zero_grad", "after_zero_grad"]
BACKWARD = ["before_backward", "after_backward"]
GRADIENTS = ["reduce_gradients", "unscale_gradients", "gradients_ready", "gradients_final"]
NO_CLIPPING = ["before_gradient_clipping", "clipping_decided"]  # the policies are asked, and there is none
CLIPPING = [*NO_CLIPPING, "after_gradient_clipping"]
SAFE_POINT = ["safe_point", "request_stop", "take_checkpoint"]

ENTER = ["join_processes", "setup", "prepare_loader"]
ENTER_FIT = [*ENTER, "fit_start"]
LEAVE_FIT = ["train_end", "fit_end", "teardown"]
END_OF_EPOCH = ["train_epoch_end", "metrics_logged:train:epoch"]


def evaluation(stage: str, batches: int, *, logs: bool = True) -> list[str]:
    """Return the events of a pass of evaluation over one loader."""
    batch = [*FETCH, f"{stage}_batch_start", *FORWARD, f"{stage}_batch_end"]
    metrics = [f"metrics_logged:{stage}:epoch"] if logs else []
    return [f"{stage}_start", f"{stage}_epoch_start", *(batch * batches), f"{stage}_epoch_end", *metrics, f"{stage}_end"]


def stepping_batch(*, zero_grad: bool = True, clipping: list[str] = NO_CLIPPING, last: bool = False) -> list[str]:
    """Return the events of a batch that updates, up to its metrics."""
    return [
        *FETCH,
        "train_batch_start",
        "optimizer_step",
        *FORWARD,
        *(ZERO_GRAD if zero_grad else []),
        *BACKWARD,
        *GRADIENTS,
        "before_optimizer_step",
        *clipping,
        "after_optimizer_step",
        "after_update",
        *(["train_data_end"] if last else []),
        "train_batch_end",
        "metrics_logged:train:step",
    ]


def accumulating_batch() -> list[str]:
    """Return the events of a batch that opens a window and closes none, up to its end."""
    return [*FETCH, "train_batch_start", *FORWARD, *ZERO_GRAD, *BACKWARD, "train_batch_end"]


# ------------------------------------------------------------------ the modules and trainers that publish them

BATCHES = rows(4)


class TwoOptimizers(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer, layer in zip(self.optimizers(), (self.first, self.second), strict=True):
            optimizer.zero_grad()
            self.manual_backward(F.mse_loss(layer(batch), batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.first, self.second)]


class Scheduled(Line):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = self.trainer.estimated_stepping_batches
        return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps)


class Keeper(Callback):
    """Interrupts the run at each epoch's end, and writes its checkpoint to one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_request_stop(self, trainer: Trainer, event: RequestStop) -> None:
        if event.epoch_end:
            trainer.interrupt("the epoch is over")

    def on_take_checkpoint(self, trainer: Trainer, event: TakeCheckpoint) -> None:
        if event.reason is not None:
            trainer.save_checkpoint(self.path)
            event.path = str(self.path)

    def on_find_checkpoint(self, trainer: Trainer, event: FindCheckpoint) -> None:
        event.offer(self.path)


def recorded(trainer: Trainer, run: Callable[[], Any]) -> list[str]:
    """Return the events of a run: ``metrics_logged`` with its stage and scope, ``prepare_loader`` once."""
    with trainer.signals.trace() as trace:
        run()
    return together(traced.name + scope(traced.event) for traced in trace)


def scope(event: Event) -> str:
    return f":{event.stage}:{event.scope}" if isinstance(event, MetricsLogged) else ""


def together(names: Iterable[str]) -> list[str]:
    result: list[str] = []
    for name in names:
        if name != "prepare_loader" or name not in result:
            result.append(name)
    return result


def without_scopes(names: list[str]) -> list[str]:
    return [name.partition(":")[0] for name in names]


# ------------------------------------------------------------------ the golden sequences


def test_automatic_optimization() -> None:
    trainer = new_trainer()
    assert recorded(trainer, lambda: trainer.fit(Line(), BATCHES[:2])) == [
        *ENTER_FIT,
        "train_start",
        "train_epoch_start",
        *stepping_batch(),
        *SAFE_POINT,
        *stepping_batch(last=True),
        *END_OF_EPOCH,
        *SAFE_POINT,
        *LEAVE_FIT,
    ]


def test_accumulation_clipping_and_validation() -> None:
    trainer = new_trainer(GradientAccumulation(2), GradientClipping(0.1), num_sanity_val_steps=2)
    expected = [
        *ENTER_FIT,
        *evaluation("validation", 2, logs=False),  # the sanity check
        "train_start",
        "train_epoch_start",
        *accumulating_batch(),
        *SAFE_POINT,
        *stepping_batch(zero_grad=False, clipping=CLIPPING),
        *SAFE_POINT,
        *accumulating_batch(),
        *SAFE_POINT,
        *stepping_batch(zero_grad=False, clipping=CLIPPING, last=True),
        *evaluation("validation", 3),
        *END_OF_EPOCH,
        *SAFE_POINT,
        *LEAVE_FIT,
    ]
    assert recorded(trainer, lambda: trainer.fit(Line(), BATCHES, BATCHES[:3])) == expected


def test_a_validation_within_an_epoch_comes_before_the_safe_point_of_its_batch() -> None:
    trainer = new_trainer(val_check_interval=1)
    assert recorded(trainer, lambda: trainer.fit(Line(), BATCHES[:2], BATCHES[:1])) == [
        *ENTER_FIT,
        "train_start",
        "train_epoch_start",
        *stepping_batch(),
        *evaluation("validation", 1),
        *SAFE_POINT,
        *stepping_batch(last=True),
        *evaluation("validation", 1),
        *END_OF_EPOCH,
        *SAFE_POINT,
        *LEAVE_FIT,
    ]


def test_manual_optimization_of_two_optimizers() -> None:
    one_optimizer = [
        *ZERO_GRAD,
        *BACKWARD,
        "optimizer_step",
        *GRADIENTS,
        "before_optimizer_step",
        *NO_CLIPPING,
        "after_optimizer_step",
    ]
    batch = [
        *FETCH,
        "train_batch_start",
        "before_forward",  # the whole training_step is the forward
        *one_optimizer,
        *one_optimizer,
        "after_forward",
        "after_update",  # once, however many optimizers there are
    ]
    trainer = new_trainer()
    assert recorded(trainer, lambda: trainer.fit(TwoOptimizers(), BATCHES[:2])) == [
        *ENTER_FIT,
        "train_start",
        "train_epoch_start",
        *batch,
        "train_batch_end",
        "metrics_logged:train:step",
        *SAFE_POINT,
        *batch,
        "train_data_end",
        "train_batch_end",
        "metrics_logged:train:step",
        *END_OF_EPOCH,
        *SAFE_POINT,
        *LEAVE_FIT,
    ]


def test_a_second_epoch_repeats_the_first() -> None:
    epoch = ["train_epoch_start", *stepping_batch(last=True), *END_OF_EPOCH, *SAFE_POINT]
    trainer = new_trainer(max_epochs=2)
    assert recorded(trainer, lambda: trainer.fit(Line(), BATCHES[:1])) == [
        *ENTER_FIT,
        "train_start",
        *epoch,
        *epoch,
        *LEAVE_FIT,
    ]


def test_a_vetoed_step_is_neither_clipped_nor_counted() -> None:
    trainer = new_trainer(GradientClipping(0.1))
    trainer.signals.before_optimizer_step.connect(lambda _, event: event.skip("a whim"))
    assert recorded(trainer, lambda: trainer.fit(Line(), BATCHES[:1])) == [
        *ENTER_FIT,
        "train_start",
        "train_epoch_start",
        *FETCH,
        "train_batch_start",
        "optimizer_step",
        *FORWARD,
        *ZERO_GRAD,
        *BACKWARD,
        *GRADIENTS,
        "before_optimizer_step",
        "optimizer_step_skipped",
        "train_data_end",
        "train_batch_end",
        *END_OF_EPOCH,
        *SAFE_POINT,
        *LEAVE_FIT,
    ]


def test_schedulers_step_after_the_update_or_after_the_data() -> None:
    scheduler_steps = ["before_lr_scheduler_step", "after_lr_scheduler_step"]

    class ByStepAndByEpoch(Line):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            by_step, by_epoch = (torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(2))
            return [optimizer], [{"scheduler": by_step, "interval": "step"}, by_epoch]

    update = [*FETCH, "train_batch_start", "optimizer_step", *FORWARD, *ZERO_GRAD, *BACKWARD, *GRADIENTS]
    update += ["before_optimizer_step", *NO_CLIPPING, "after_optimizer_step", "after_update", *scheduler_steps]
    end_of_batch = ["train_batch_end", "metrics_logged:train:step"]
    trainer = new_trainer(LRSchedulerStepping())
    assert recorded(trainer, lambda: trainer.fit(ByStepAndByEpoch(), BATCHES[:2])) == [
        *ENTER_FIT,
        "train_start",
        "train_epoch_start",
        *update,
        *end_of_batch,
        *SAFE_POINT,
        *update,
        "train_data_end",
        *scheduler_steps,
        *end_of_batch,
        *END_OF_EPOCH,
        *SAFE_POINT,
        *LEAVE_FIT,
    ]


@pytest.mark.parametrize(("stage", "run"), [("validation", "validate"), ("test", "test")])
def test_evaluation(stage: str, run: str) -> None:
    trainer = new_trainer()
    assert recorded(trainer, lambda: getattr(trainer, run)(Line(), BATCHES[:2])) == [
        *ENTER,
        *evaluation(stage, 2),
        "teardown",
    ]


def test_prediction_logs_nothing() -> None:
    trainer = new_trainer()
    assert recorded(trainer, lambda: trainer.predict(Line(), BATCHES[:2])) == [
        *ENTER,
        *evaluation("predict", 2, logs=False),
        "teardown",
    ]


# ------------------------------------------------------------------ ends before the end


class Witness(Callback):
    """Records the events of a run's end that reach it."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_exception(self, trainer: Trainer, event: Any) -> None:
        self.seen.append(f"exception: {event.exception}")

    def on_teardown(self, trainer: Trainer, event: Any) -> None:
        self.seen.append("teardown")


class RaisesEverywhere(Callback):
    state_key = "RaisesEverywhere"

    def on_after_backward(self, trainer: Trainer, event: Any) -> None:
        if trainer.batch_idx == 1:
            raise ValueError("in after_backward")

    def on_exception(self, trainer: Trainer, event: Any) -> None:
        raise OSError("in exception")

    def on_teardown(self, trainer: Trainer, event: Any) -> None:
        raise OSError("in teardown")


def test_an_exception_in_a_callback_ends_the_run_at_once_and_reaches_everyone() -> None:
    before, after = Witness(), Witness()
    trainer = new_trainer(before, RaisesEverywhere(), after)
    seen: list[str] = []

    def run() -> None:
        with pytest.raises(ValueError, match="in after_backward"):
            trainer.fit(Line(), BATCHES[:2])

    for signal in trainer.signals:  # a trace would stop at the error in `exception`
        signal.connect(lambda _, event, name=signal.name: seen.append(name))
    run()
    assert without_scopes(together(seen)) == without_scopes(
        [
            *ENTER_FIT,
            "train_start",
            "train_epoch_start",
            *stepping_batch(),
            *SAFE_POINT,
            *FETCH,
            "train_batch_start",
            "optimizer_step",
            *FORWARD,
            *ZERO_GRAD,
            "before_backward",  # only callbacks before the one that raised got after_backward
            "exception",
            "teardown",
        ]
    )
    assert before.seen == after.seen == ["exception: in after_backward", "teardown"]


def test_a_stop_within_an_epoch_winds_it_down_after_the_safe_point() -> None:
    completeness: list[bool] = []
    trainer = new_trainer()
    trainer.signals.train_batch_end.connect(lambda t, event: t.stop("enough") if event.batch_idx == 1 else None)
    trainer.signals.metrics_logged.connect(
        lambda _, event: completeness.append(event.epoch_complete) if event.scope == "epoch" else None
    )
    assert recorded(trainer, lambda: trainer.fit(Line(), BATCHES)) == [
        *ENTER_FIT,
        "train_start",
        "train_epoch_start",
        *stepping_batch(),
        *SAFE_POINT,
        *stepping_batch(),
        *SAFE_POINT,
        *END_OF_EPOCH,
        *LEAVE_FIT,
    ]
    assert completeness == [False]
    assert trainer.current_epoch == 0


def test_a_request_to_stop_after_the_last_safe_point_takes_one_more_checkpoint() -> None:
    trainer = new_trainer(max_steps=1)
    trainer.signals.train_epoch_end.connect(lambda t, event: t.stop("enough"))
    assert recorded(trainer, lambda: trainer.fit(Line(), BATCHES)) == [
        *ENTER_FIT,
        "train_start",
        "train_epoch_start",
        *stepping_batch(),
        *SAFE_POINT,
        *END_OF_EPOCH,
        "take_checkpoint",
        *LEAVE_FIT,
    ]


def test_an_epoch_that_is_ended_early_still_validates_and_is_counted() -> None:
    completeness: list[bool] = []
    trainer = new_trainer()
    trainer.signals.train_batch_end.connect(lambda t, event: t.end_epoch("enough") if event.batch_idx == 1 else None)
    trainer.signals.metrics_logged.connect(
        lambda _, event: completeness.append(event.epoch_complete) if event.scope == "epoch" else None
    )
    assert recorded(trainer, lambda: trainer.fit(Line(), BATCHES, BATCHES[:1])) == [
        *ENTER_FIT,
        "train_start",
        "train_epoch_start",
        *stepping_batch(),
        *SAFE_POINT,
        *stepping_batch(),
        *evaluation("validation", 1),
        *END_OF_EPOCH,
        *SAFE_POINT,
        *LEAVE_FIT,
    ]
    assert completeness == [True, False]  # the validation's is whole, the training's is not
    assert trainer.current_epoch == 1


def test_an_interruption_takes_a_checkpoint_at_the_safe_point_and_ends_the_run(tmp_path: Path) -> None:
    trainer = new_trainer(default_root_dir=tmp_path)
    trainer.signals.after_update.connect(lambda t, event: t.interrupt("a signal") if event.global_step == 2 else None)
    interrupted: list[Any] = []
    trainer.signals.run_interrupted.connect(lambda _, event: interrupted.append((event.reason, event.path)))
    assert recorded(trainer, lambda: trainer.fit(Line(), BATCHES)) == [
        *ENTER_FIT,
        "train_start",
        "train_epoch_start",
        *stepping_batch(),
        *SAFE_POINT,
        *stepping_batch(),
        *SAFE_POINT,
        "save_checkpoint",
        "checkpoint_gathered",
        "checkpoint_saved",
        "run_interrupted",
        *END_OF_EPOCH,
        *LEAVE_FIT,
    ]
    assert interrupted == [("a signal", str(tmp_path / "checkpoints" / "interrupted.ckpt"))]
    assert trainer.stop_reason == "a signal"


# ------------------------------------------------------------------ the loop map


def map_events(text: str) -> list[str]:
    return [name for line in text.splitlines() if (name := event_of(line))]


def resumed_epoch(tmp_path: Path) -> list[str]:
    """Return the events of a resumed epoch of one batch, at whose end the run is interrupted: every event of fit except
    `optimizer_step_skipped` and `exception`, which take the place of others."""
    callbacks = (GradientClipping(0.1), LRSchedulerStepping(), Keeper(tmp_path / "checkpoint.pt"))
    new_trainer(*callbacks).fit(Scheduled(), BATCHES[:1])
    trainer = new_trainer(*callbacks, max_epochs=2)
    run = recorded(trainer, lambda: trainer.fit(Scheduled(), BATCHES[:1], BATCHES[:1], ckpt_path="last"))
    return without_scopes(run)


def without_validations(names: list[str]) -> list[str]:
    """Return the events with each validation as one line, as in the loop map of fit, and without the sanity check."""
    result: list[str] = []
    in_validation = False
    for name in names:
        if name == "validation_start":
            in_validation = True
            if "train_start" in result:
                result.append(name)
        if not in_validation:
            result.append(name)
        if name == "validation_end":
            in_validation = False
    return result


def test_the_loop_map_is_the_order_of_a_recorded_run(tmp_path: Path) -> None:
    excluded = {"optimizer_step_skipped", "exception"}  # in place of after_optimizer_step and of fit_end
    expected = [name for name in map_events(LOOP_MAP) if name not in excluded]
    assert without_validations(resumed_epoch(tmp_path)) == expected


def test_the_loop_map_lists_every_event_of_fit() -> None:
    evaluation_only = {name for name in EVENTS if name.startswith(("validation_", "test_", "predict_"))}
    assert set(map_events(LOOP_MAP)) - {"validation_start"} == set(EVENTS) - evaluation_only


@pytest.mark.parametrize(("stage", "run"), [("validation", "validate"), ("test", "test"), ("predict", "predict")])
def test_the_maps_of_evaluation_are_the_order_of_recorded_runs(stage: str, run: str) -> None:
    trainer = new_trainer()
    names = without_scopes(recorded(trainer, lambda: getattr(trainer, run)(Line(), BATCHES[:1])))
    assert names == [*ENTER, *map_events(evaluation_map(stage)), "teardown"]


def test_every_event_of_the_table_fires(tmp_path: Path) -> None:
    fired = set(resumed_epoch(tmp_path))
    trainer = new_trainer()
    for run in (trainer.validate, trainer.test, trainer.predict):
        fired.update(without_scopes(recorded(trainer, partial(run, Line(), BATCHES[:1]))))
    trainer.signals.before_optimizer_step.connect(lambda _, event: event.skip("a whim"))
    trainer.signals.train_end.connect(lambda _, event: 1 / 0)

    def failing_run() -> None:
        with pytest.raises(ZeroDivisionError):
            trainer.fit(Line(), BATCHES[:1])

    fired.update(without_scopes(recorded(trainer, failing_run)))
    assert sorted(EVENTS.keys() - fired) == []
