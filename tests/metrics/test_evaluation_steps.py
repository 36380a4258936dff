"""Values that validation and test log on each step, and the metrics of an evaluation beside those of the fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor, nn
from torchmetrics import MeanMetric

from eventtrain import Trainer
from eventtrain.callbacks import EarlyStopping, GradientAccumulation, JSONLinesLogger, TensorBoardLogger
from tests.kit import Logged, NoLength, On, Probe, Recorder, batches, new_trainer, numbers, train


class Logs(Probe):
    """Logs the value of each evaluation batch.

    Args:
        **options: The options of ``self.log`` in evaluation.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"on_step": True, "on_epoch": False} | options

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("train", batch)
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("value", batch.mean(), **self.options)

    test_step = validation_step


def steps(written: Logged, stage: str) -> list[tuple[int, dict[str, float]]]:
    return [(x, values) for its_stage, scope, x, values in written.entries if (its_stage, scope) == (stage, "step")]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_each_value_reaches_the_loggers_at_its_batch(stage: str) -> None:
    written = Logged()
    trainer = new_trainer(written)
    assert getattr(trainer, stage)(Logs(), batches(10)) == [{}]
    name = "validation" if stage == "validate" else "test"
    assert written.entries == [(name, "step", x, {"value": float(x)}) for x in range(1, 11)]
    assert numbers(trainer.logged_metrics) == {"value": 10.0}


def test_validations_of_a_fit_count_their_batches_on() -> None:
    written = Logged()
    train(Logs(), 2, written, val=3, max_epochs=2, num_sanity_val_steps=2)
    assert steps(written, "validation") == [(x, {"value": float((x - 1) % 3 + 1)}) for x in range(1, 7)]


def test_with_both_flags_there_are_two_names_for_loggers() -> None:
    written = Logged()
    train(Logs(on_epoch=True), 1, written, val=2)
    assert steps(written, "validation") == [(1, {"value_step": 1.0}), (2, {"value_step": 2.0})]
    assert written.of_scope("epoch") == [{"value_epoch": 1.5}]


def test_several_loaders_share_the_count_of_the_stage() -> None:
    written = Logged()
    new_trainer(written).test(Logs(), [NoLength(batches(2)), NoLength(batches(1))])
    assert steps(written, "test") == [
        (1, {"value/dataloader_idx_0": 1.0}),
        (2, {"value/dataloader_idx_0": 2.0}),
        (3, {"value/dataloader_idx_1": 1.0}),
    ]


def test_nothing_of_them_comes_with_the_next_training_step() -> None:
    written = Logged()
    # The window stays open over the validation, so values of training wait too.
    train(Logs(), 4, GradientAccumulation(2), written, val=2, val_check_interval=1)
    assert steps(written, "train") == [(1, {"train": 2.0}), (2, {"train": 4.0})]
    assert [values for _, values in steps(written, "validation")] == [{"value": 1.0}, {"value": 2.0}] * 4


def test_without_a_logger_flag_loggers_get_nothing() -> None:
    written = Logged()
    trainer = train(Logs(logger=False), 1, written, val=2)
    assert steps(written, "validation") == []
    assert float(trainer.callback_metrics["value"]) == 2.0


def test_a_value_is_published_with_its_batch_outside_a_fit() -> None:
    order = Recorder("test_batch_end", "metrics_logged")
    new_trainer(order).test(Logs(), batches(2))
    assert order.names == ["test_batch_end", "metrics_logged"] * 2 + ["metrics_logged"]


def test_a_callback_may_add_values_to_the_step_of_an_evaluation() -> None:
    written = Logged()
    add = On(test_batch_end=lambda trainer, event: trainer.log_on_step({"index": event.batch_idx}))
    new_trainer(add, written).test(Logs(), batches(2))
    assert steps(written, "test") == [(1, {"value": 1.0, "index": 0.0}), (2, {"value": 2.0, "index": 1.0})]


def test_a_sanity_check_publishes_none() -> None:
    written = Logged()
    train(Logs(), 1, written, val=3, limit_val_batches=1, num_sanity_val_steps=3)
    assert steps(written, "validation") == [(1, {"value": 1.0})]


def test_an_interrupted_validation_publishes_its_values_once(in_tmp_path: None) -> None:
    """A resumed run repeats the validation: the values of the batches before the interruption are not there twice."""

    def interrupt(trainer: Any, event: Any) -> None:
        if event.batch_idx == 1:
            trainer.interrupt("mine")

    first, second = Logged(), Logged()
    file = JSONLinesLogger("values.jsonl", log_every_n_steps=1)
    train(Logs(), 2, On(validation_batch_end=interrupt), first, file, val=3, val_check_interval=1)
    assert steps(first, "validation") == []
    file = JSONLinesLogger("values.jsonl", log_every_n_steps=1)
    trainer = new_trainer(second, file, val_check_interval=1)
    trainer.fit(Logs(), batches(2), batches(3), ckpt_path="last")
    assert [x for x, _ in steps(second, "validation")] == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line) for line in Path("values.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "validation"] == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_counts_on(in_tmp_path: None) -> None:
    written = Logged()
    train(Logs(), 1, On(take_checkpoint=lambda trainer, event: trainer.save_checkpoint("one.ckpt")), val=3)
    trainer = new_trainer(written, max_epochs=2)
    trainer.fit(Logs(), batches(1), batches(3), ckpt_path="one.ckpt")
    assert [x for x, _ in steps(written, "validation")] == [4, 5, 6]


def test_early_stopping_looks_once_a_validation() -> None:
    looks: list[float] = []

    class Watching(EarlyStopping):
        def reason_to_stop(self, trainer: Trainer, value: float) -> str | None:
            looks.append(value)
            return None

    train(Logs(), 1, Watching("value"), val=3, max_epochs=2)
    assert looks == [3.0, 3.0]


# ------------------------------------------------------------------ loggers


def scalars(logger: TensorBoardLogger, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(logger.run_dir), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.parametrize("x_axis", ["global_step", "samples"])
def test_tensorboard_draws_each_value_at_the_count_of_batches(x_axis: Any, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, log_every_n_steps=50, x_axis=x_axis)
    trainer = train(Logs(on_epoch=True), 2, logger, val=3, max_epochs=2)
    assert scalars(logger, "value_step") == [(x, float((x - 1) % 3 + 1)) for x in range(1, 7)]
    assert [step for step, _ in scalars(logger, "value_epoch")] == [2, 4]
    trainer.test(Logs(), batches(2))
    assert scalars(logger, "value") == [(1, 1.0), (2, 2.0)]


def test_tensorboard_keeps_them_when_a_run_is_resumed(tmp_path: Path) -> None:
    """The count of batches is beyond the step at which the resumed run has TensorBoard drop what comes later."""
    checkpoint = str(tmp_path / "one.ckpt")
    save = On(take_checkpoint=lambda trainer, event: trainer.save_checkpoint(checkpoint))
    train(Logs(), 1, TensorBoardLogger(tmp_path), save, val=5)
    logger = TensorBoardLogger(tmp_path)
    trainer = new_trainer(logger, max_epochs=2)
    trainer.fit(Logs(), batches(1), batches(5), ckpt_path=checkpoint)
    assert [step for step, _ in scalars(logger, "value")] == list(range(1, 11))


def test_json_lines_have_each_value(tmp_path: Path) -> None:
    logger = JSONLinesLogger(tmp_path / "values.jsonl", log_every_n_steps=50)
    new_trainer(logger).test(Logs(), batches(3))
    lines = [json.loads(line) for line in (tmp_path / "values.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["scope"], line["step"], line["value"]) for line in lines] == [
        ("test", "step", x, float(x)) for x in (1, 2, 3)
    ]


# ------------------------------------------------------------------ the metrics of an evaluation


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_the_metrics_of_a_fit_are_not_those_of_a_later_evaluation(stage: str) -> None:
    class Module(Logs):
        def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("test", batch, prog_bar=True)

    trainer = train(Module(on_step=False, on_epoch=True), 2, val=3)
    assert numbers(trainer.callback_metrics) == {"train": 2.0, "value": 2.0}
    expected = {"value": 4.0} if stage == "validate" else {"test": 4.0}
    assert getattr(trainer, stage)(Module(on_step=False, on_epoch=True), batches([4.0])) == [expected]
    assert numbers(trainer.callback_metrics) == numbers(trainer.logged_metrics) == expected
    assert trainer.times_logged(next(iter(expected))) == 1
    assert trainer.times_logged("train") == 0


def test_a_prediction_has_no_metrics() -> None:
    class Module(Logs):
        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return batch

    trainer = train(Module(), 2, val=3)
    trainer.predict(Module(), batches(2))
    assert trainer.callback_metrics == trainer.logged_metrics == trainer.progress_bar_metrics == {}


def test_a_checkpoint_after_an_evaluation_has_the_metrics_of_the_fit(in_tmp_path: None) -> None:
    trainer = train(Logs(), 2, val=3)
    trainer.test(Logs(), batches([9.0]))
    metrics = trainer.collect_checkpoint()["metrics"]
    assert numbers(metrics["callback_metrics"]) == {"train": 2.0, "value": 3.0}
    assert metrics["renewals"] == {"train": 2, "value": 3}


# ------------------------------------------------------------------ each loader's results


def test_each_loader_has_its_own_names_in_its_own_dict() -> None:
    class Module(Probe):
        def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int) -> None:
            self.log(f"of_{dataloader_idx}", batch, add_dataloader_idx=False)
            self.log("shared", batch, add_dataloader_idx=False)
            self.log("each", batch)
            self.log("each", 10 * batch, add_dataloader_idx=False, reduce_fx="max")
            if dataloader_idx:
                self.log("later", batch, add_dataloader_idx=False)

        def on_test_epoch_end(self) -> None:
            self.log("end", 7.0)

    loaders = [NoLength(batches([x])) for x in (1.0, 2.0, 6.0)]
    written = Logged()
    trainer = new_trainer(written)
    first, second, third = trainer.test(Module(), loaders)
    assert first == {"of_0": 1.0, "shared": 1.0, "each": 10.0, "each/dataloader_idx_0": 1.0, "end": 7.0}
    assert second == {"of_1": 2.0, "shared": 2.0, "each": 20.0, "each/dataloader_idx_1": 2.0, "later": 2.0, "end": 7.0}
    assert third == {"of_2": 6.0, "shared": 6.0, "each": 60.0, "each/dataloader_idx_2": 6.0, "later": 6.0, "end": 7.0}
    # There is one value of a name for loggers and callbacks.
    for values in (numbers(trainer.callback_metrics), written.of_scope("epoch")[0]):
        assert [values[name] for name in ("shared", "each", "later", "of_1")] == [3.0, 60.0, 4.0, 2.0]


def test_metric_objects_of_one_name_are_each_loaders_own() -> None:
    class Module(Probe):
        def __init__(self) -> None:
            super().__init__()
            self.means = nn.ModuleList([MeanMetric(), MeanMetric()])

        def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int) -> None:
            mean: Any = self.means[dataloader_idx]
            mean.update(batch)
            self.log("mean", mean, add_dataloader_idx=False)

    loaders = [NoLength(batches([1.0, 2.0])), NoLength(batches([5.0]))]
    assert new_trainer().test(Module(), loaders) == [{"mean": 1.5}, {"mean": 5.0}]


def test_a_name_that_looks_like_a_loaders_is_a_name() -> None:
    class Module(Probe):
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("a/dataloader_idx_7", batch)

    assert new_trainer().test(Module(), batches([2.0])) == [{"a/dataloader_idx_7": 2.0}]


def test_values_of_a_second_test_are_its_own() -> None:
    class Module(Probe):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log(self.name, torch.mean(batch))

    trainer = new_trainer()
    assert trainer.test(Module("a"), batches([1.0])) == [{"a": 1.0}]
    assert trainer.test(Module("b"), batches([2.0])) == [{"b": 2.0}]
