"""The order of events, written by hand from the design: list equality with what a run publishes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping
from eventtrain.describe import event_of
from eventtrain.events import EVENTS, LOOP_MAP, FindCheckpoint, KeepCheckpoint, SafePoint, evaluation_map

# ------------------------------------------------------------------ the pieces of the expected lists

FETCH = ["before_batch_fetch", "after_batch_fetch"]
FORWARD = ["before_forward", "after_forward"]
ZERO_GRAD = ["before_zero_grad", "after_zero_grad"]
BACKWARD = ["before_backward", "after_backward"]
GRADIENTS = ["reduce_gradients", "unscale_gradients", "gradients_ready"]
CLIPPING = ["before_gradient_clipping", "after_gradient_clipping"]
NO_CLIPPING = ["before_gradient_clipping"]  # the policies are asked, and there is none

ENTER = ["join_processes", "setup", "prepare_loader"]
ENTER_FIT = [*ENTER, "fit_start"]
LEAVE_FIT = ["train_end", "fit_end", "teardown"]
END_OF_EPOCH = ["train_epoch_end", "metrics_logged:train:epoch"]


def evaluation(stage: str, batches: int, *, logs: bool = True) -> list[str]:
    """A pass of evaluation over one loader."""
    batch = [*FETCH, f"{stage}_batch_start", *FORWARD, f"{stage}_batch_end"]
    metrics = [f"metrics_logged:{stage}:epoch"] if logs else []
    return [f"{stage}_start", f"{stage}_epoch_start", *(batch * batches), f"{stage}_epoch_end", *metrics, f"{stage}_end"]


def stepping_batch(*, zero_grad: bool = True, clipping: list[str] = NO_CLIPPING, last: bool = False) -> list[str]:
    """A batch that updates, up to its metrics."""
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
    """A batch that opens a window and closes none, up to its end."""
    return [*FETCH, "train_batch_start", *FORWARD, *ZERO_GRAD, *BACKWARD, "train_batch_end"]


# ------------------------------------------------------------------ what is run

BATCHES = [torch.full((2, 1), float(x)) for x in (1, 2, 3, 4)]


class Automatic(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch).mean())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.layer(batch).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


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


class Scheduled(Automatic):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = self.trainer.estimated_stepping_batches
        return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps)


class Keeper(Callback):
    """Keeps one checkpoint, and asks for it at each epoch's end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_safe_point(self, trainer: Trainer, event: SafePoint) -> None:
        if event.epoch_end:
            trainer.keep_checkpoint("the epoch is over")

    def on_keep_checkpoint(self, trainer: Trainer, event: KeepCheckpoint) -> None:
        trainer.save_checkpoint(self.path)
        event.path = str(self.path)

    def on_find_checkpoint(self, trainer: Trainer, event: FindCheckpoint) -> None:
        event.offer(self.path)


def trainer_with(*callbacks: Any, **options: Any) -> Trainer:
    return Trainer(callbacks=callbacks, default_callbacks=False, device="cpu", **{"max_epochs": 1, **options})


def recorded(trainer: Trainer, run: Callable[[], Any]) -> list[str]:
    """What a run publishes; ``metrics_logged`` with its stage and scope, the first of the loaders that are prepared."""
    with trainer.signals.trace() as trace:
        run()
    return together(
        f"{traced.name}:{traced.event.stage}:{traced.event.scope}" if traced.name == "metrics_logged" else traced.name
        for traced in trace
    )


def together(names: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for name in names:
        if name != "prepare_loader" or name not in kept:
            kept.append(name)
    return kept


def plain(names: list[str]) -> list[str]:
    return [name.partition(":")[0] for name in names]


# ------------------------------------------------------------------ the golden sequences


def test_automatic_optimization() -> None:
    trainer = trainer_with()
    assert recorded(trainer, lambda: trainer.fit(Automatic(), BATCHES[:2])) == [
        *ENTER_FIT,
        "train_start",
        "train_epoch_start",
        *stepping_batch(),
        "safe_point",
        *stepping_batch(last=True),
        *END_OF_EPOCH,
        "safe_point",
        *LEAVE_FIT,
    ]


def test_accumulation_clipping_and_validation() -> None:
    trainer = trainer_with(GradientAccumulation(2), GradientClipping(0.1))
    expected = [
        *ENTER_FIT,
        *evaluation("validation", 2, logs=False),  # the sanity check
        "train_start",
        "train_epoch_start",
        *accumulating_batch(),
        "safe_point",
        *stepping_batch(zero_grad=False, clipping=CLIPPING),
        "safe_point",
        *accumulating_batch(),
        "safe_point",
        *stepping_batch(zero_grad=False, clipping=CLIPPING, last=True),
        *evaluation("validation", 3),
        *END_OF_EPOCH,
        "safe_point",
        *LEAVE_FIT,
    ]
    assert recorded(trainer, lambda: trainer.fit(Automatic(), BATCHES, BATCHES[:3])) == expected


def test_validation_inside_of_an_epoch_comes_before_the_safe_point_of_its_batch() -> None:
    trainer = trainer_with(val_check_interval=1, num_sanity_val_steps=0)
    assert recorded(trainer, lambda: trainer.fit(Automatic(), BATCHES[:2], BATCHES[:1])) == [
        *ENTER_FIT,
        "train_start",
        "train_epoch_start",
        *stepping_batch(),
        *evaluation("validation", 1),
        "safe_point",
        *stepping_batch(last=True),
        *evaluation("validation", 1),
        *END_OF_EPOCH,
        "safe_point",
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
        "after_update",  # once, whatever the number of optimizers
    ]
    trainer = trainer_with()
    assert recorded(trainer, lambda: trainer.fit(TwoOptimizers(), BATCHES[:2])) == [
        *ENTER_FIT,
        "train_start",
        "train_epoch_start",
        *batch,
        "train_batch_end",
        "metrics_logged:train:step",
        "safe_point",
        *batch,
        "train_data_end",
        "train_batch_end",
        "metrics_logged:train:step",
        *END_OF_EPOCH,
        "safe_point",
        *LEAVE_FIT,
    ]


def test_a_second_epoch_repeats_the_first() -> None:
    epoch = ["train_epoch_start", *stepping_batch(last=True), *END_OF_EPOCH, "safe_point"]
    trainer = trainer_with(max_epochs=2)
    assert recorded(trainer, lambda: trainer.fit(Automatic(), BATCHES[:1])) == [
        *ENTER_FIT,
        "train_start",
        *epoch,
        *epoch,
        *LEAVE_FIT,
    ]


def test_a_vetoed_step_is_neither_clipped_nor_counted() -> None:
    trainer = trainer_with(GradientClipping(0.1))
    trainer.signals.before_optimizer_step.connect(lambda _, event: event.skip("a whim"))
    assert recorded(trainer, lambda: trainer.fit(Automatic(), BATCHES[:1])) == [
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
        "safe_point",
        *LEAVE_FIT,
    ]


def test_schedulers_step_after_the_update_or_after_the_data() -> None:
    scheduler_steps = ["before_lr_scheduler_step", "after_lr_scheduler_step"]

    class ByStepAndByEpoch(Automatic):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            by_step, by_epoch = (torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(2))
            return [optimizer], [{"scheduler": by_step, "interval": "step"}, by_epoch]

    update = [*FETCH, "train_batch_start", "optimizer_step", *FORWARD, *ZERO_GRAD, *BACKWARD, *GRADIENTS]
    update += ["before_optimizer_step", *NO_CLIPPING, "after_optimizer_step", "after_update", *scheduler_steps]
    end_of_batch = ["train_batch_end", "metrics_logged:train:step"]
    trainer = trainer_with(LRSchedulerStepping())
    assert recorded(trainer, lambda: trainer.fit(ByStepAndByEpoch(), BATCHES[:2])) == [
        *ENTER_FIT,
        "train_start",
        "train_epoch_start",
        *update,
        *end_of_batch,
        "safe_point",
        *update,
        "train_data_end",
        *scheduler_steps,
        *end_of_batch,
        *END_OF_EPOCH,
        "safe_point",
        *LEAVE_FIT,
    ]


@pytest.mark.parametrize(("stage", "run"), [("validation", "validate"), ("test", "test")])
def test_evaluation(stage: str, run: str) -> None:
    trainer = trainer_with()
    assert recorded(trainer, lambda: getattr(trainer, run)(Automatic(), BATCHES[:2])) == [
        *ENTER,
        *evaluation(stage, 2),
        "teardown",
    ]


def test_prediction_logs_nothing() -> None:
    class Predicting(Automatic):
        def forward(self, batch: Tensor) -> Tensor:
            return self.layer(batch)

    trainer = trainer_with()
    assert recorded(trainer, lambda: trainer.predict(Predicting(), BATCHES[:2])) == [
        *ENTER,
        *evaluation("predict", 2, logs=False),
        "teardown",
    ]


# ------------------------------------------------------------------ ends before the end


class Witness(Callback):
    """Notes what reaches it of a run's end."""

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
    trainer = trainer_with(before, RaisesEverywhere(), after)
    seen: list[str] = []

    def run() -> None:
        with pytest.raises(ValueError, match="in after_backward"):
            trainer.fit(Automatic(), BATCHES[:2])

    for signal in trainer.signals:  # a trace would stop at the error inside of `exception`
        signal.connect(lambda _, event, name=signal.name: seen.append(name))
    run()
    assert plain(together(seen)) == plain(
        [
            *ENTER_FIT,
            "train_start",
            "train_epoch_start",
            *stepping_batch(),
            "safe_point",
            *FETCH,
            "train_batch_start",
            "optimizer_step",
            *FORWARD,
            *ZERO_GRAD,
            "before_backward",  # after_backward reached those that are attached before the one that raised
            "exception",
            "teardown",
        ]
    )
    assert before.seen == after.seen == ["exception: in after_backward", "teardown"]


def test_a_stop_inside_of_an_epoch_winds_it_down_after_the_safe_point() -> None:
    completeness: list[bool] = []
    trainer = trainer_with()
    trainer.signals.train_batch_end.connect(lambda t, event: t.stop("enough") if event.batch_idx == 1 else None)
    trainer.signals.metrics_logged.connect(
        lambda _, event: completeness.append(event.epoch_complete) if event.scope == "epoch" else None
    )
    assert recorded(trainer, lambda: trainer.fit(Automatic(), BATCHES)) == [
        *ENTER_FIT,
        "train_start",
        "train_epoch_start",
        *stepping_batch(),
        "safe_point",
        *stepping_batch(),
        "safe_point",
        *END_OF_EPOCH,
        *LEAVE_FIT,
    ]
    assert completeness == [False]
    assert trainer.current_epoch == 0


def test_an_end_of_the_epoch_asked_for_still_validates_and_counts_the_epoch() -> None:
    completeness: list[bool] = []
    trainer = trainer_with(num_sanity_val_steps=0)
    trainer.signals.train_batch_end.connect(lambda t, event: t.end_epoch("enough") if event.batch_idx == 1 else None)
    trainer.signals.metrics_logged.connect(
        lambda _, event: completeness.append(event.epoch_complete) if event.scope == "epoch" else None
    )
    assert recorded(trainer, lambda: trainer.fit(Automatic(), BATCHES, BATCHES[:1])) == [
        *ENTER_FIT,
        "train_start",
        "train_epoch_start",
        *stepping_batch(),
        "safe_point",
        *stepping_batch(),
        *evaluation("validation", 1),
        *END_OF_EPOCH,
        "safe_point",
        *LEAVE_FIT,
    ]
    assert completeness == [True, False]  # the validation's is whole, the training's is not
    assert trainer.current_epoch == 1


# ------------------------------------------------------------------ the loop map


def map_events(text: str) -> list[str]:
    return [name for line in text.splitlines() if (name := event_of(line))]


def resumed_epoch(tmp_path: Any) -> list[str]:
    """An epoch of one batch in which every event of fit comes that does not exclude another."""
    callbacks = (GradientClipping(0.1), LRSchedulerStepping(), Keeper(tmp_path / "checkpoint.pt"))
    trainer_with(*callbacks).fit(Scheduled(), BATCHES[:1])
    trainer = trainer_with(*callbacks, max_epochs=2)
    run = recorded(trainer, lambda: trainer.fit(Scheduled(), BATCHES[:1], BATCHES[:1], ckpt_path="last"))
    return plain(run)


def without_validations(names: list[str]) -> list[str]:
    """Each validation as the one line that it has in the loop map of fit; the sanity check left out."""
    kept: list[str] = []
    inside = False
    for name in names:
        if name == "validation_start":
            inside = True
            if "train_start" in kept:
                kept.append(name)
        if not inside:
            kept.append(name)
        if name == "validation_end":
            inside = False
    return kept


def test_the_loop_map_is_the_order_of_a_recorded_run(tmp_path: Any) -> None:
    excluded = {"optimizer_step_skipped", "exception"}  # in place of after_optimizer_step and of fit_end
    expected = [name for name in map_events(LOOP_MAP) if name not in excluded]
    assert without_validations(resumed_epoch(tmp_path)) == expected


def test_the_loop_map_lists_every_event_of_fit() -> None:
    evaluation_only = {name for name in EVENTS if name.startswith(("validation_", "test_", "predict_"))}
    assert set(map_events(LOOP_MAP)) - {"validation_start"} == set(EVENTS) - evaluation_only


@pytest.mark.parametrize(("stage", "run"), [("validation", "validate"), ("test", "test"), ("predict", "predict")])
def test_the_maps_of_evaluation_are_the_order_of_recorded_runs(stage: str, run: str) -> None:
    class Evaluating(Automatic):
        def forward(self, batch: Tensor) -> Tensor:
            return self.layer(batch)

    trainer = trainer_with()
    names = plain(recorded(trainer, lambda: getattr(trainer, run)(Evaluating(), BATCHES[:1])))
    assert names == [*ENTER, *map_events(evaluation_map(stage)), "teardown"]


def test_every_event_of_the_table_fires(tmp_path: Any) -> None:
    class Evaluating(Scheduled):
        def forward(self, batch: Tensor) -> Tensor:
            return self.layer(batch)

    fired = set(resumed_epoch(tmp_path))
    trainer = trainer_with()
    for run in (trainer.validate, trainer.test, trainer.predict):
        fired.update(plain(recorded(trainer, lambda run=run: run(Evaluating(), BATCHES[:1]))))
    trainer.signals.before_optimizer_step.connect(lambda _, event: event.skip("a whim"))
    trainer.signals.train_end.connect(lambda _, event: 1 / 0)

    def failing_run() -> None:
        with pytest.raises(ZeroDivisionError):
            trainer.fit(Automatic(), BATCHES[:1])

    fired.update(plain(recorded(trainer, failing_run)))
    assert sorted(EVENTS.keys() - fired) == []
