"""D5. Learning rate schedulers that step at the end of an epoch, and schedulers that monitor a metric."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from eventtrain import MisconfigurationError
from eventtrain.callbacks import (
    LRSchedulerStepping,
)
from tests.kit import On, Probe, Recorder, train
from tests.semantics.schedules import Logging, metered, metrics_given, steps

# ------------------------------------------------------------------ D5: the end of an epoch


D5_EVENTS = (
    *("after_optimizer_step", "after_update", "train_data_end", "before_lr_scheduler_step", "train_batch_end"),
    *("validation_start", "validation_end", "train_epoch_end", "metrics_logged", "safe_point"),
)


def every_interval(sgd: Any) -> Any:
    """Schedulers with all intervals, and two that monitor."""
    configs = [{"scheduler": LambdaLR(sgd, lambda n: 1.0), "interval": i, "name": i} for i in ("epoch", "step", "validation")]
    plateaus = [{"scheduler": ReduceLROnPlateau(sgd), "monitor": monitor, "name": monitor} for monitor in ("mean", "val")]
    return [sgd], [*plateaus, *configs]


@pytest.mark.parametrize("stepping_first", [True, False])
def test_d5_the_order_at_the_last_batch_of_an_epoch(stepping_first: bool) -> None:
    told: list[str] = []

    def tell(name: str) -> Any:
        def listener(trainer: Any, event: Any) -> None:
            detail = ""
            if name == "before_lr_scheduler_step":
                detail = event.config.name
            elif name == "metrics_logged":
                detail = f"{event.stage} {event.scope}"
            elif name == "safe_point":
                detail = f"epoch_end={event.epoch_end}"
            told.append(f"{name} {detail}".strip())

        return listener

    watch = On(**{name: tell(name) for name in D5_EVENTS})
    stepping = LRSchedulerStepping()
    train(Logging(configure=every_interval), 2, *([stepping, watch] if stepping_first else [watch, stepping]), val=1)
    told = [line for line in told if not line.startswith(("after_update", "train_data_end", "validation_end"))]
    assert told == [
        "after_optimizer_step",
        "before_lr_scheduler_step step",
        "train_batch_end",
        "metrics_logged train step",
        "safe_point epoch_end=False",
        # the last batch
        "after_optimizer_step",
        "before_lr_scheduler_step step",
        "before_lr_scheduler_step epoch",
        "train_batch_end",
        "metrics_logged train step",
        "validation_start",
        "metrics_logged validation epoch",
        "before_lr_scheduler_step validation",
        "train_epoch_end",
        *(
            ["before_lr_scheduler_step mean", "before_lr_scheduler_step val", "metrics_logged train epoch"]
            if stepping_first
            else ["metrics_logged train epoch", "before_lr_scheduler_step mean", "before_lr_scheduler_step val"]
        ),
        "safe_point epoch_end=True",
    ]


def test_d5_a_checkpoint_at_the_epochs_end_has_them_all(tmp_path: Any) -> None:
    def save(trainer: Any, event: Any) -> None:
        if event.epoch_end:
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    train(Logging(configure=every_interval), 3, LRSchedulerStepping(), On(safe_point=save), val=1, max_epochs=2)
    states = torch.load(tmp_path / "run.ckpt", weights_only=True)["lr_schedulers"]
    assert [state["last_epoch"] for state in states] == [2, 2, 2, 6, 2]  # mean, val, epoch, step, validation


@pytest.mark.parametrize("how", ["max_steps", "train_batch_start", "after_update", "train_batch_end"])
def test_d5_a_run_stopped_within_an_epoch_steps_no_epoch_scheduler(how: str) -> None:
    recorder = Recorder("train_epoch_end", "train_data_end")

    def stop(trainer: Any, event: Any) -> None:
        if trainer.total_batch_idx == 4:
            trainer.stop("test")

    module = Logging(configure=every_interval)
    options: Any = {"max_steps": 5} if how == "max_steps" else {"max_epochs": 3}
    trainer = train(
        module, 3, LRSchedulerStepping(), recorder, *([On(**{how: stop})] if how != "max_steps" else []), val=1, **options
    )
    assert trainer.global_step == 5 and trainer.current_epoch == 1, "the epoch is not counted"
    assert recorder.names == ["train_data_end", "train_epoch_end", "train_epoch_end"]
    assert [steps(trainer, index) for index in (0, 2, 3)] == [1, 1, 5]  # mean, epoch, step


@pytest.mark.parametrize("how", ["max_steps", "stop"])
def test_d5_a_run_that_stops_at_the_last_batch_completes_its_epoch(how: str) -> None:
    stop = On(train_batch_end=lambda trainer, event: trainer.stop("test") if trainer.total_batch_idx == 5 else None)
    module = Logging(configure=every_interval)
    options: Any = {"max_steps": 6} if how == "max_steps" else {"max_epochs": 3}
    trainer = train(module, 3, LRSchedulerStepping(), *([stop] if how == "stop" else []), val=1, **options)
    assert trainer.global_step == 6 and trainer.current_epoch == 2
    assert [steps(trainer, index) for index in (0, 2, 3)] == [2, 2, 6]


@pytest.mark.parametrize("event", ["train_batch_start", "after_update", "train_batch_end"])
def test_d5_an_epoch_that_was_ended_early_steps_no_epoch_scheduler(event: str) -> None:
    end = On(**{event: lambda trainer, event: trainer.end_epoch("test") if trainer.total_batch_idx == 1 else None})
    module = Logging(configure=every_interval)
    trainer = train(module, 3, LRSchedulerStepping(), end, val=1, max_epochs=2)
    assert trainer.current_epoch == 2 and trainer.global_step == 5
    assert [steps(trainer, index) for index in (0, 2, 3)] == [1, 1, 5]


def test_d5_a_monitored_scheduler_gets_the_epochs_final_value() -> None:
    trainer = train(Logging(configure=metered(monitor="mean")), [1.0, 2.0, 6.0], LRSchedulerStepping(), max_epochs=2)
    assert metrics_given(trainer) == [3.0, 3.0]


def test_d5_a_monitored_scheduler_gets_the_value_of_the_epochs_end() -> None:
    class Late(Probe):
        def on_train_epoch_end(self) -> None:
            self.log("late", 10.0 + self.current_epoch)

    trainer = train(Late(configure=metered(monitor="late")), 2, LRSchedulerStepping(), max_epochs=2)
    assert metrics_given(trainer) == [10.0, 11.0]


def test_d5_a_monitored_scheduler_gets_the_validation_of_its_epoch() -> None:
    class Counting(Probe):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", float(self.current_epoch))

    trainer = train(Counting(configure=metered(monitor="val")), 2, LRSchedulerStepping(), val=1, max_epochs=3)
    assert metrics_given(trainer) == [0.0, 1.0, 2.0]


def test_d5_a_monitored_scheduler_waits_while_its_metric_has_not_been_renewed() -> None:
    class Counting(Probe):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", float(self.current_epoch))

    module = Counting(configure=metered(monitor="val"))
    trainer = train(module, 2, LRSchedulerStepping(), val=1, max_epochs=5, check_val_every_n_epoch=2)
    assert metrics_given(trainer) == [1.0, 3.0], "no error in epoch 0, nothing twice in epochs 2 and 4"


def test_d5_a_sanity_check_renews_nothing() -> None:
    module = Logging(configure=metered(monitor="val"))
    options = {"val": [5.0], "max_epochs": 3, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 1}
    trainer = train(module, 2, LRSchedulerStepping(), **options)
    assert metrics_given(trainer) == [5.0]


def test_d5_a_monitored_scheduler_by_steps_uses_each_value_once() -> None:
    class Sparse(Probe):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx % 2 == 0:
                self.log("sparse", batch)
            return super().training_step(batch, batch_idx)

    trainer = train(Sparse(configure=metered(monitor="sparse", interval="step")), 5, LRSchedulerStepping())
    assert metrics_given(trainer) == [1.0, 3.0, 5.0]


def test_d5_a_monitored_scheduler_by_validations() -> None:
    class Counting(Probe):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", float(len(self.seen)))

    module = Counting(configure=metered(monitor="val", interval="validation"))
    trainer = train(module, 6, LRSchedulerStepping(), val=1, val_check_interval=2)
    assert metrics_given(trainer) == [2.0, 4.0, 6.0]


ABSENT = [
    ({"monitor": "absent"}, {}),
    ({"monitor": "absent"}, {"val": 1}),
    ({"monitor": "absent"}, {"val": 1, "check_val_every_n_epoch": 2}),
    ({"monitor": "absent", "interval": "step"}, {}),
    ({"monitor": "absent", "interval": "step"}, {"val": 1}),
    ({"monitor": "absent", "interval": "batch"}, {}),
    ({"monitor": "absent", "interval": "validation"}, {"val": 1}),
    ({"monitor": "absent", "interval": "validation"}, {"val": 1, "val_check_interval": 1}),
]


@pytest.mark.parametrize(("config", "options"), ABSENT)
def test_d5_an_absent_metric_is_an_error_that_lists_the_metrics(config: Any, options: Any) -> None:
    module = Logging(configure=metered(**config))
    with pytest.raises(MisconfigurationError, match=r"(?s)'absent'.*'mean'.*'x'|(?s:.*'absent'.*\['val', 'x'\])") as caught:
        train(module, 2, LRSchedulerStepping(), max_epochs=3, **options)
    assert "val" not in options or "'val'" in str(caught.value)


@pytest.mark.parametrize(("config", "options"), ABSENT)
def test_d5_without_strict_an_absent_metric_is_a_warning(config: Any, options: Any) -> None:
    module = Logging(configure=metered(strict=False, **config))
    with pytest.warns(UserWarning, match=r"'absent'.*'x'"):
        trainer = train(module, 2, LRSchedulerStepping(), max_epochs=3, **options)
    assert metrics_given(trainer) == [] and len(module.updates) == 6


def test_d5_the_warning_comes_after_the_stage_that_should_have_logged_it() -> None:
    """Silent in epochs 0 (no validation yet); then the validation has been there."""
    module = Logging(configure=metered(monitor="absent"))
    with pytest.raises(MisconfigurationError):
        train(module, 2, LRSchedulerStepping(), val=1, max_epochs=4, check_val_every_n_epoch=2)
    assert len(module.updates) == 4, "two epochs"
