"""The hooks in which a module logs: their defaults, and one name in several of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from eventtrain import MisconfigurationError
from tests.kit import FakeProcesses, Logged, On, Probe, batches, new_trainer, numbers, train


class Module(Probe):
    """Has a step for each stage."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    def test_step(self, batch: Tensor, batch_idx: int) -> None: ...


def module(hook: str, log: Callable[..., Any], base: type = Module) -> Any:
    """Return a module whose hook logs and then does its work, if it has one."""

    def logging(self: Any, *args: Any, **kwargs: Any) -> Any:
        log(self)
        inherited = getattr(super(made, self), hook, None)
        return inherited(*args, **kwargs) if inherited is not None else None

    made: Any = type("Hooked", (base,), {hook: logging})
    return made()


# Lightning's table of hooks: whether a value is kept on the step or on the epoch if neither flag is given.
IN_TRAINING_STEPS = (
    "on_train_batch_start", "training_step", "on_before_zero_grad", "optimizer_zero_grad", "on_before_backward", "backward",
    "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step", "on_train_batch_end",
)  # fmt: skip
IN_EVALUATION_STEPS = ("on_{}_batch_start", "{}_step", "on_{}_batch_end")
ON_THE_EPOCH = ("on_{}_start", "on_{}_epoch_start", "on_{}_epoch_end")


@pytest.mark.parametrize("hook", IN_TRAINING_STEPS)
def test_hooks_of_a_training_batch_log_on_the_step(hook: str) -> None:
    written = Logged()
    train(module(hook, lambda self: self.log("value", 1.0)), 1, written)
    assert written.entries == [("train", "step", 1, {"value": 1.0})]


@pytest.mark.parametrize("hook", IN_TRAINING_STEPS)
def test_they_may_log_on_the_epoch_too(hook: str) -> None:
    written = Logged()
    log = lambda self: self.log("value", float(self.trainer.batch_idx), on_step=False, on_epoch=True)  # noqa: E731
    train(module(hook, log), 3, written)
    assert written.entries == [("train", "epoch", 3, {"value": 1.0})]


@pytest.mark.parametrize("stage", ["validation", "test"])
@pytest.mark.parametrize("pattern", IN_EVALUATION_STEPS)
def test_hooks_of_an_evaluation_batch_log_on_the_epoch(stage: str, pattern: str) -> None:
    written = Logged()
    made = module(pattern.format(stage), lambda self: self.log("value", 1.0))
    run = "validate" if stage == "validation" else stage
    assert getattr(new_trainer(written), run)(made, batches(2)) == [{"value": 1.0}]
    assert written.entries == [(stage, "epoch", 0, {"value": 1.0})]


@pytest.mark.parametrize("stage", ["train", "validation", "test"])
@pytest.mark.parametrize("pattern", ON_THE_EPOCH)
def test_hooks_around_an_epoch_log_on_the_epoch(stage: str, pattern: str) -> None:
    written = Logged()
    made = module(pattern.format(stage), lambda self: self.log("value", 1.0))
    if stage == "test":
        new_trainer(written).test(made, batches(2))
    else:
        train(made, 2, written, val=1)
    assert written.entries == [(stage, "epoch", 0 if stage == "test" else 2, {"value": 1.0})]


@pytest.mark.parametrize("stage", ["train", "validation", "test"])
@pytest.mark.parametrize("pattern", ON_THE_EPOCH)
def test_in_them_on_step_is_an_error(stage: str, pattern: str) -> None:
    made = module(pattern.format(stage), lambda self: self.log("value", 1.0, on_step=True))
    with pytest.raises(MisconfigurationError, match=r"self\.log\('value', \.\.\., on_step=True\).*belongs to no step"):
        train(made, 1, val=1) if stage != "test" else new_trainer().test(made, batches(1))


def test_a_value_of_the_runs_start_belongs_to_the_first_epoch() -> None:
    written = Logged()
    train(module("on_train_start", lambda self: self.log("value", 5.0)), 1, written, max_epochs=2)
    assert written.of("value") == [(1, 5.0)]


def test_a_value_of_a_validations_start_belongs_to_that_validation() -> None:
    written = Logged()
    log = lambda self: self.log("value", float(self.current_epoch))  # noqa: E731
    train(module("on_validation_start", log), 1, written, val=1, max_epochs=2, num_sanity_val_steps=1)
    assert written.of("value") == [(1, 0.0), (2, 1.0)]


@pytest.mark.parametrize(
    "hook",
    [
        "on_fit_start", "on_fit_end", "on_train_end", "on_validation_end", "on_test_end", "on_predict_start", "on_predict_end",
        "on_predict_epoch_start", "on_predict_epoch_end", "on_predict_batch_start", "on_predict_batch_end", "predict_step",
    ],
)  # fmt: skip
def test_hooks_that_belong_to_no_epoch_are_an_error(hook: str) -> None:
    class Predicts(Module):
        def predict_step(self, batch: Tensor, batch_idx: int) -> None: ...

    made = module(hook, lambda self: self.log("value", 1.0), Predicts)
    trainer = new_trainer()
    run: Any = trainer.predict if "predict" in hook else trainer.test if "test" in hook else trainer.fit
    arguments = [batches(1)] * (2 if run == trainer.fit else 1)
    with pytest.raises(MisconfigurationError, match=r"self\.log\('value', \.\.\.\) was called in .* from on_train_start to"):
        run(made, *arguments)


def test_the_end_of_a_run_without_an_epoch_belongs_to_none() -> None:
    with pytest.raises(MisconfigurationError, match=r"on_train_end|Hooked"):
        train(module("on_train_end", lambda self: self.log("value", 1.0)), 1, max_epochs=0)


# ------------------------------------------------------------------ one name in several hooks


class Twice(Module):
    """Logs ``"value"`` in its steps and at the end of the epoch.

    Args:
        **options: The options in the steps.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("value", batch, **self.options)
        return self.loss(batch)

    def on_train_epoch_end(self) -> None:
        self.log("value", 10.0)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", batch)

    def on_validation_epoch_end(self) -> None:
        self.log("val", 20.0)


def test_a_name_may_be_logged_in_the_step_and_at_the_epochs_end() -> None:
    written = Logged()
    trainer = train(Twice(), 2, written)
    assert written.of_scope("step") == [{"value": 1.0}, {"value": 2.0}]
    assert written.of_scope("epoch") == [{"value": 10.0}]
    assert numbers(trainer.callback_metrics) == {"value": 10.0}


def test_with_both_flags_in_the_step_there_are_three_names() -> None:
    written = Logged()
    trainer = train(Twice(on_epoch=True), 2, written)
    assert written.of_scope("epoch") == [{"value_epoch": 1.5, "value": 10.0}]
    assert numbers(trainer.callback_metrics) == {"value": 10.0, "value_step": 2.0, "value_epoch": 1.5}


def test_the_epochs_end_replaces_the_mean_of_the_steps() -> None:
    """It is no part of the mean, with whatever options."""
    trainer = train(Twice(on_step=False, on_epoch=True, reduce_fx="max"), 2, val=2, max_epochs=2)
    assert numbers(trainer.callback_metrics) == {"value": 10.0, "val": 20.0}
    assert new_trainer().validate(Twice(), batches(3)) == [{"val": 20.0}]


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start"])
def test_the_steps_replace_a_value_of_the_start(hook: str) -> None:
    written = Logged()

    class Starts(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if self.current_epoch or hook == "on_train_start":
                self.log("value", batch, on_step=False, on_epoch=True)
            return self.loss(batch)

    train(module(hook, lambda self: self.log("value", 7.0), Starts), 3, written, max_epochs=2)
    first = 2.0 if hook == "on_train_start" else 7.0
    assert written.of("value") == [(3, first), (6, 2.0)]


def test_calls_in_one_hook_are_reduced() -> None:
    def log(self: Any) -> None:
        for x in (1.0, 2.0, 6.0):
            self.log("mean", x)
            self.log("largest", x, reduce_fx="max")

    trainer = train(module("on_train_epoch_end", log), 1)
    assert numbers(trainer.callback_metrics) == {"mean": 3.0, "largest": 6.0}


def test_the_order_does_not_depend_on_the_epoch_that_logs_first() -> None:
    """The epoch's end logs from the first epoch on, the steps from the second."""
    written = Logged()

    class Later(Twice):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) if self.current_epoch else self.loss(batch)

    train(Later(on_step=False, on_epoch=True), 2, written, max_epochs=2)
    assert written.of("value") == [(2, 10.0), (4, 10.0)]


def test_over_several_processes_too() -> None:
    trainer = new_trainer()
    trainer.processes = FakeProcesses()
    trainer.fit(Twice(on_step=False, on_epoch=True), batches(2))
    assert numbers(trainer.callback_metrics) == {"value": 10.0}


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_that_is_resumed_in_the_epoch_keeps_them_apart(after: int, in_tmp_path: None) -> None:
    def save(trainer: Any, event: Any) -> None:
        if trainer.global_step == after:
            trainer.save_checkpoint("middle.ckpt")

    def make() -> Any:
        made = module("on_train_epoch_start", lambda self: self.log("start", 3.0), Twice)
        made.options = {"on_epoch": True}
        return made

    written, again = Logged(), Logged()
    train(make(), 3, On(take_checkpoint=save), written)
    new_trainer(again).fit(make(), batches(3), ckpt_path="middle.ckpt")
    assert again.of_scope("epoch") == written.of_scope("epoch") == [{"start": 3.0, "value_epoch": 2.0, "value": 10.0}]


# ------------------------------------------------------------------ arguments


def log_once(*args: Any, world_size: int = 1, rank: int = 0, **options: Any) -> Any:
    trainer = new_trainer()
    if world_size > 1:
        trainer.processes = FakeProcesses(world_size, rank)
    trainer.fit(module("on_train_batch_start", lambda self: self.log("value", *args, **options)), batches(1))
    return trainer


def test_words_that_need_no_answer_are_accepted() -> None:
    trainer = log_once(torch.ones(1, requires_grad=True), enable_graph=True, metric_attribute="whatever", sync_dist_group=None)
    assert numbers(trainer.callback_metrics) == {"value": 1.0}
    assert not trainer.callback_metrics["value"].requires_grad


def test_a_group_of_processes_is_an_error() -> None:
    with pytest.raises(
        MisconfigurationError, match=r"self\.log\('value', \.\.\., sync_dist_group=\.\.\.\).*without sync_dist_group"
    ):
        log_once(1.0, sync_dist_group=object())


def test_rank_zero_only_waits_for_no_other_process() -> None:
    trainer = log_once(1.0, rank_zero_only=True, sync_dist=True, world_size=2)
    assert trainer.processes.reduced == []
    assert numbers(trainer.callback_metrics) == {"value": 1.0}
    trainer = log_once(1.0, rank_zero_only=True, sync_dist=True, world_size=2, rank=1)
    assert trainer.callback_metrics == {}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_metric_object_on_rank_zero_only_is_an_error_in_all_processes(rank: int) -> None:
    with pytest.raises(
        MisconfigurationError, match=r"self\.log\('value', MeanMetric, rank_zero_only=True\).*Leave rank_zero_only"
    ):
        log_once(MeanMetric(), rank_zero_only=True, world_size=2, rank=rank)
