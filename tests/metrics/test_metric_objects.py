"""Metric objects: when they are reset, one object for several places, and objects of several values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection, MinMaxMetric
from torchmetrics.aggregation import MaxMetric
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy
from torchmetrics.wrappers import ClasswiseWrapper

from eventtrain import MisconfigurationError
from tests.kit import Logged, NoLength, On, Probe, batches, new_trainer, numbers, train


class Metered(Probe):
    """Updates a metric in each step and logs it.

    Args:
        metric: The metric object.
        stages: The stages that log it.
        fails_at: The batch of value ``x`` at which ``training_step`` raises, after the update.
        logs_first: Whether it is logged before that.
        **options: The options of ``self.log``.
    """

    def __init__(
        self,
        metric: Any = None,
        stages: tuple[str, ...] = ("train",),
        fails_at: float | None = None,
        logs_first: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.metric = MeanMetric() if metric is None else metric
        self.stages, self.fails_at, self.logs_first, self.options = stages, fails_at, logs_first, options

    def measure(self, stage: str, x: Tensor) -> None:
        if stage not in self.stages:
            return
        self.metric.update(x)
        fails = x == self.fails_at
        if self.logs_first or not fails:
            self.log("mean", self.metric, **self.options)
        if fails:
            raise RuntimeError("mine")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.measure("train", batch)
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.measure("val", batch)

    def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.measure("test", batch)


EPOCH: dict[str, Any] = {"on_step": False, "on_epoch": True}
STEP: dict[str, Any] = {"on_step": True, "on_epoch": False}


# ------------------------------------------------------------------ when it is reset


@pytest.mark.parametrize("options", [STEP, EPOCH, {"on_step": True, "on_epoch": True}])
def test_each_epoch_begins_anew_however_the_object_is_logged(options: dict[str, Any]) -> None:
    """Values 1 and 3 in two epochs: 1 and 3, and not 1 and 2."""
    written = Logged()

    class Module(Metered):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(1.0 + 2 * self.current_epoch + 0 * batch, batch_idx)

    train(Module(**options), 1, written, max_epochs=2)
    expected = [1.0, 3.0] if len(written.entries) == 2 else [1.0, 1.0, 3.0, 3.0]
    assert [value for _, _, _, values in written.entries for value in values.values()] == expected


def test_a_list_state_does_not_grow_over_epochs() -> None:
    sizes: list[int] = []

    class Module(Probe):
        def __init__(self) -> None:
            super().__init__()
            self.median = Median()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.median.update(batch)
            self.log("median", self.median, on_step=True)
            sizes.append(len(self.median.values))
            return self.loss(batch)

    train(Module(), 3, max_epochs=3)
    assert sizes == [1, 2, 3] * 3


class Median(Metric):
    """A metric that keeps all values."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[])
        self.values: list[Tensor]

    def update(self, x: Tensor) -> None:
        self.values.append(x)

    def compute(self) -> Any:
        return torch.stack(self.values).median()


def test_in_validation_and_test_too() -> None:
    seen: list[Any] = []
    module = Metered(stages=("val", "test"), **STEP)
    look = On(validation_batch_end=lambda trainer, event: seen.append(trainer.callback_metrics.get("mean")))
    trainer = train(module, 2, look, val=[1.0, 3.0], val_check_interval=1, num_sanity_val_steps=2)
    assert seen == [None, None, *[1.0, 2.0] * 2]  # first those of the sanity check
    assert trainer.test(module, batches([5.0])) == [{}]
    assert numbers(trainer.callback_metrics) == {"mean": 5.0}


def test_an_epoch_that_does_not_log_the_object_has_no_value_and_resets_it() -> None:
    written = Logged()

    class Module(Probe):
        def __init__(self) -> None:
            super().__init__()
            self.mean = MeanMetric()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.mean.update(batch + self.current_epoch)
            if self.current_epoch != 1:
                self.log("mean", self.mean, **EPOCH)
            return self.loss(batch)

    train(Module(), 1, written, max_epochs=3)
    assert written.of("mean") == [(1, 1.0), (3, 3.0)]


def test_an_object_that_is_never_logged_is_left_alone() -> None:
    class Module(Probe):
        def __init__(self) -> None:
            super().__init__()
            self.largest = MaxMetric()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.largest.update(batch)
            return self.loss(batch)

    module = Module()
    train(module, [7.0], max_epochs=2)
    train(module, [3.0])
    assert module.largest.compute() == 7.0


@pytest.mark.parametrize("logs_first", [True, False])
@pytest.mark.parametrize("same_trainer", [True, False])
@pytest.mark.parametrize("options", [STEP, EPOCH])
def test_a_fit_after_one_that_failed_in_an_epoch_begins_with_an_empty_object(
    options: dict[str, Any], same_trainer: bool, logs_first: bool
) -> None:
    """100 before the error, then 1 and 2: 1.5, and not 34.33."""
    module, trainer = Metered(fails_at=100.0, logs_first=logs_first, **options), new_trainer()
    with pytest.raises(RuntimeError, match="mine"):
        trainer.fit(module, batches([100.0]))
    assert module.metric.compute() == 100.0  # to look at after the error
    trainer = trainer if same_trainer else new_trainer()
    trainer.fit(module, batches([1.0, 2.0]))
    assert numbers(trainer.callback_metrics) == {"mean": 1.5}


def test_other_runs_between_do_not_change_that() -> None:
    module, trainer = Metered(fails_at=100.0, stages=("train", "val"), **EPOCH), new_trainer()
    for run in (trainer.fit, trainer.validate):
        with pytest.raises(RuntimeError, match="mine"):
            run(module, batches([100.0]))
        trainer.fit(Metered(**EPOCH), batches(2))
        trainer.test(Metered(stages=("test",)), batches(2))
        assert trainer.validate(module, batches([1.0, 2.0])) == [{"mean": 1.5}]


def test_an_object_with_values_from_before_the_run_that_failed_keeps_them_if_it_is_not_logged() -> None:
    class Module(Probe):
        def __init__(self) -> None:
            super().__init__()
            self.largest = MaxMetric()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise RuntimeError("mine")

    module = Module()
    module.largest.update(9.0)
    with pytest.raises(RuntimeError, match="mine"):
        train(module, 1)
    module.training_step = lambda batch, batch_idx: module.loss(batch)  # type: ignore[method-assign]
    train(module, 1)
    assert module.largest.compute() == 9.0


def test_a_validation_that_was_interrupted_leaves_nothing_in_it(in_tmp_path: None) -> None:
    def interrupt(trainer: Any, event: Any) -> None:
        if trainer.total_batch_idx == 0 and event.batch[0] == 100.0:
            trainer.interrupt("mine")

    module = Metered(stages=("val",))
    trainer = new_trainer(On(validation_batch_end=interrupt))
    trainer.fit(module, rows_of(2.0), rows_of(100.0, 5.0))
    assert module.metric.compute() == 100.0
    trainer = train(module, rows_of(2.0), val=rows_of(1.0, 2.0))
    assert numbers(trainer.callback_metrics) == {"mean": 1.5}


def rows_of(*xs: float) -> list[Tensor]:
    return [torch.full((1,), x) for x in xs]


# ------------------------------------------------------------------ one object in several places


def test_one_object_for_two_loaders_is_one_warning() -> None:
    loaders = [NoLength(batches([1.0])), NoLength(batches([3.0]))]
    with pytest.warns(UserWarning, match="same MeanMetric") as caught:
        (first, second) = new_trainer().validate(Metered(stages=("val",)), loaders)
    (message,) = [str(each.message) for each in caught]
    assert "self.log('mean/dataloader_idx_1', ...) in Metered.measure" in message
    assert "logged as 'mean/dataloader_idx_0' in validation" in message
    assert "a metric object of its own" in message
    assert (first, second) == ({"mean/dataloader_idx_0": 2.0}, {"mean/dataloader_idx_1": 2.0})


def test_one_object_for_training_and_validation_is_one_warning() -> None:
    with pytest.warns(UserWarning, match="same MeanMetric is logged as 'mean' in train") as caught:
        train(Metered(stages=("train", "val"), **STEP), 2, val=2, max_epochs=3)
    assert len(caught) == 1


def test_one_object_for_validation_and_test_is_no_warning() -> None:
    module = Metered(stages=("val", "test"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = train(module, 1, val=2, max_epochs=2)
        assert trainer.validate(module, batches([5.0])) == [{"mean": 5.0}]
        assert trainer.test(module, batches([7.0])) == [{"mean": 7.0}]


def test_one_object_under_two_names_is_no_warning() -> None:
    class Module(Metered):
        def measure(self, stage: str, x: Tensor) -> None:
            super().measure(stage, x)
            self.log("again", self.metric, **EPOCH)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = train(Module(**EPOCH), 3)
    assert numbers(trainer.callback_metrics) == {"mean": 2.0, "again": 2.0}


def test_one_object_for_all_loaders_under_one_name_is_one_warning() -> None:
    loaders = [NoLength(batches([x])) for x in (1.0, 3.0, 5.0)]
    module = Metered(stages=("val",), add_dataloader_idx=False)
    with pytest.warns(UserWarning, match="same MeanMetric is logged as 'mean' in validation") as caught:
        assert new_trainer().validate(module, loaders) == [{"mean": 3.0}] * 3
    assert len(caught) == 1


# ------------------------------------------------------------------ objects of several values


class Extremes(Median):
    """A metric of two values by name."""

    def compute(self) -> Any:
        values = torch.stack(self.values)
        return {"low": values.min(), "high": values.max()}


class Several(Probe):
    """Logs a metric by a function of itself and the metric."""

    def __init__(self, metric: Any, log: Callable[[Any, Any], None], *, forward: bool = False) -> None:
        super().__init__()
        self.metric = metric
        self.call = log
        self.calls_forward = forward

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        (self.metric if self.calls_forward else self.metric.update)(batch)
        self.call(self, self.metric)
        return self.loss(batch)


def per_class() -> Any:
    return MulticlassAccuracy(num_classes=3, average=None)


class Classes(Several):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        target = torch.tensor([0, 1, 2, 2])
        (self.metric if self.calls_forward else self.metric.update)(torch.tensor([0, 1, 2, 0]), target)
        self.call(self, self.metric)
        return self.loss(batch)


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("on_step", [True, False])
@pytest.mark.parametrize(
    ("metric", "module", "shown"),
    [
        (Extremes, Several, r"Extremes\.compute gives a dict"),
        (per_class, Classes, r"MulticlassAccuracy\.compute gives a tensor of shape \(3,\)"),
        (lambda: ClasswiseWrapper(per_class()), Classes, r"ClasswiseWrapper\.compute gives a dict"),
    ],
)
def test_log_refuses_an_object_of_several_values(
    metric: Callable[[], Any], module: Any, shown: str, on_step: bool, forward: bool
) -> None:
    log = lambda module, metric: module.log("value", metric, on_step=on_step, on_epoch=not on_step)  # noqa: E731
    with pytest.raises(MisconfigurationError, match=rf"self\.log\('value', \.\.\.\): {shown}\..*self\.log_dict"):
        train(module(metric(), log, forward=forward), 1)


def test_log_refuses_a_collection_at_once() -> None:
    collection = MetricCollection({"mean": MeanMetric()})
    match = r"self\.log\('value', \.\.\.\) in Several\.training_step got a mapping \(MetricCollection\): use self\.log_dict"
    with pytest.raises(MisconfigurationError, match=match):
        train(Several(collection, lambda module, metric: module.log("value", metric, **EPOCH)), 1)


def test_a_result_of_one_element_or_a_python_number_is_one_value() -> None:
    class Odd(Extremes):
        def compute(self) -> Any:
            return 0.1 if len(self.values) > 1 else torch.stack(self.values)

    written = Logged()
    train(Several(Odd(), lambda module, metric: module.log("odd", metric, on_epoch=True)), [3.0, 4.0], written)
    assert written.of_scope("step") == [{"odd_step": 3.0}, {"odd_step": 0.1}]
    assert written.of_scope("epoch") == [{"odd_epoch": 0.1}]


@pytest.mark.parametrize("forward", [True, False])
def test_log_dict_takes_an_object_of_several_values(forward: bool) -> None:
    written = Logged()
    module = Several(Extremes(), lambda module, metric: module.log_dict(metric, **EPOCH), forward=forward)
    trainer = train(module, 3, written, max_epochs=2)
    assert written.entries == [("train", "epoch", step, {"low": 1.0, "high": 3.0}) for step in (3, 6)]
    assert numbers(trainer.callback_metrics) == {"low": 1.0, "high": 3.0}


def test_log_dict_takes_its_values_on_the_step_too() -> None:
    written = Logged()
    module = Several(Extremes(), lambda module, metric: module.log_dict(metric, on_epoch=True, prog_bar=True), forward=True)
    trainer = train(module, 2, written)
    assert written.of_scope("step") == [{"low_step": x, "high_step": x} for x in (1.0, 2.0)]
    assert written.of_scope("epoch") == [{"low_epoch": 1.0, "high_epoch": 2.0}]
    assert trainer.progress_bar_metrics.keys() == {"low_step", "high_step", "low_epoch", "high_epoch"}


def test_log_dict_takes_wrappers() -> None:
    metric = MinMaxMetric(MeanMetric())
    trainer = train(Several(metric, lambda module, metric: module.log_dict(metric, **EPOCH)), 3)
    assert numbers(trainer.callback_metrics) == {"raw": 2.0, "min": 2.0, "max": 2.0}
    trainer = train(Classes(ClasswiseWrapper(per_class()), lambda module, metric: module.log_dict(metric, **EPOCH)), 3)
    accuracies = {"multiclassaccuracy_0": 1.0, "multiclassaccuracy_1": 1.0, "multiclassaccuracy_2": 0.5}
    assert numbers(trainer.callback_metrics) == accuracies


def test_log_dict_takes_collections_whose_metrics_share_states() -> None:
    collection = MetricCollection({"a": BinaryAccuracy(), "b": BinaryAccuracy()}, prefix="train_")

    class Module(Several):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.metric.update(torch.tensor([1.0, 0.0]), torch.tensor([1, batch_idx % 2]))
            self.log_dict(self.metric, **EPOCH)
            return self.loss(batch)

    written = Logged()
    train(Module(collection, lambda module, metric: None), 2, written, max_epochs=2)
    assert written.of_scope("epoch") == [{"train_a": 0.75, "train_b": 0.75}] * 2


def test_log_dict_refuses_an_object_of_one_value_and_one_without_names() -> None:
    match = r"self\.log_dict\(\.\.\.\): MeanMetric\.compute gives a tensor .*Log one value by self\.log\(name, metric\)"
    with pytest.raises(MisconfigurationError, match=match):
        train(Several(MeanMetric(), lambda module, metric: module.log_dict(metric)), 1)
    match = r"self\.log_dict\(\.\.\.\): MulticlassAccuracy\.compute .*\(3,\)\..*give others names: self\.log_dict\(\{"
    with pytest.raises(MisconfigurationError, match=match):
        train(Classes(per_class(), lambda module, metric: module.log_dict(metric)), 1)


def test_log_dict_of_an_object_without_a_trainer_goes_nowhere() -> None:
    with pytest.warns(UserWarning, match="without a trainer"):
        Probe().log_dict(Extremes())


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_that_is_resumed_in_an_epoch_has_the_values_of_the_whole_epoch(after: int, in_tmp_path: None) -> None:
    def module() -> Several:
        def log(module: Any, metric: Any) -> None:
            module.log_dict(metric, **EPOCH)

        return Several(Extremes(), log)

    def save(trainer: Any, event: Any) -> None:
        if trainer.global_step == after:
            trainer.save_checkpoint("middle.ckpt")

    whole = train(module(), [2.0, 3.0, 1.0], On(take_checkpoint=save))
    resumed = new_trainer()
    resumed.fit(module(), batches([2.0, 3.0, 1.0]), ckpt_path="middle.ckpt")
    assert numbers(resumed.callback_metrics) == numbers(whole.callback_metrics) == {"low": 1.0, "high": 3.0}


@pytest.mark.parametrize("forward", [True, False])
def test_a_collection_may_hold_objects_of_several_values(forward: bool) -> None:
    collection = MetricCollection({"classes": ClasswiseWrapper(per_class()), "all": MulticlassAccuracy(num_classes=3)})
    log = lambda module, metric: module.log_dict(metric, **EPOCH)  # noqa: E731
    trainer = train(Classes(collection, log, forward=forward), 2)
    expected = {"multiclassaccuracy_0": 1.0, "multiclassaccuracy_1": 1.0, "multiclassaccuracy_2": 0.5, "all": 5 / 6}
    assert numbers(trainer.callback_metrics) == pytest.approx(expected)


def test_two_objects_of_several_values_are_logged_beside_each_other() -> None:
    class Module(Several):
        def __init__(self) -> None:
            super().__init__(Extremes(), lambda module, metric: module.log_dict(metric, **EPOCH))
            self.other = MinMaxMetric(MeanMetric())

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.other.update(batch)
            self.log_dict(self.other, **EPOCH)
            return super().training_step(batch, batch_idx)

    assert numbers(train(Module(), 3).callback_metrics) == {"raw": 2.0, "min": 2.0, "max": 2.0, "low": 1.0, "high": 3.0}


def test_each_evaluation_loader_has_its_values_of_an_object() -> None:
    class Module(Probe):
        def __init__(self) -> None:
            super().__init__()
            self.metrics = torch.nn.ModuleList([Extremes(), Extremes()])

        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int) -> None:
            metric = self.metrics[dataloader_idx]
            metric(batch)
            self.log_dict(metric, on_step=True, on_epoch=True)  # type: ignore[arg-type]

    loaders = [NoLength(batches([1.0, 3.0])), NoLength(batches([2.0]))]
    trainer = new_trainer()
    assert trainer.validate(Module(), loaders) == [
        {"low_epoch/dataloader_idx_0": 1.0, "high_epoch/dataloader_idx_0": 3.0},
        {"low_epoch/dataloader_idx_1": 2.0, "high_epoch/dataloader_idx_1": 2.0},
    ]
    assert trainer.callback_metrics["high/dataloader_idx_0"] == trainer.callback_metrics["high_step/dataloader_idx_0"] == 3.0
