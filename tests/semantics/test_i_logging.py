"""I. Logging: the values that ``self.log`` keeps, their names, and who gets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.aggregation import MaxMetric
from torchmetrics.classification import BinaryAccuracy

from eventtrain import MisconfigurationError, Trainer
from tests.kit import FakeProcesses, Logged, On, Probe, Recorder, batches, gradient, new_trainer, numbers, train

THREE = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([5.0])]
"""Batches sized 2, 2, 1, whose means are 1.5, 3.5, 5."""


class Logs(Probe):
    """Calls a function of ``(module, batch, batch_idx)`` in each training step, and one in each evaluation step."""

    def __init__(self, training: Any = None, evaluation: Any = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.training_logs = training
        self.evaluation_logs = evaluation

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.training_logs is not None:
            self.training_logs(self, batch, batch_idx)
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.evaluation_logs is not None:
            self.evaluation_logs(self, batch, batch_idx)

    test_step = validation_step


def logs(name: str = "value", value: Callable[[Tensor], Any] = lambda x: x.mean(), **options: Any) -> Callable[..., None]:
    return lambda module, batch, batch_idx: module.log(name, value(batch), **options)


# ------------------------------------------------------------------ I1: options


def test_i1_in_training_the_default_is_the_step() -> None:
    written = Logged()
    trainer = train(Logs(logs()), 3, written)
    assert written.entries == [("train", "step", i, {"value": float(i)}) for i in (1, 2, 3)]
    assert numbers(trainer.callback_metrics) == {"value": 3.0}


def test_i1_in_evaluation_the_default_is_the_epoch() -> None:
    written = Logged()
    trainer = train(Logs(evaluation=logs()), 1, written, val=3)
    assert written.entries == [("validation", "epoch", 1, {"value": 2.0})]
    assert numbers(trainer.callback_metrics) == {"value": 2.0}
    assert new_trainer().test(Logs(evaluation=logs()), batches(3)) == [{"value": 2.0}]


def test_i1_in_training_on_the_epoch() -> None:
    written = Logged()
    trainer = train(Logs(logs(on_step=False, on_epoch=True)), 3, written, max_epochs=2)
    assert written.entries == [("train", "epoch", 3, {"value": 2.0}), ("train", "epoch", 6, {"value": 2.0})]
    assert numbers(trainer.callback_metrics) == {"value": 2.0}


def test_i1_in_evaluation_on_the_step() -> None:
    seen: list[Any] = []
    look = On(validation_batch_end=lambda trainer, event: seen.append(numbers(trainer.callback_metrics)))
    trainer = train(Logs(evaluation=logs(on_step=True, on_epoch=False)), 1, look, val=3)
    assert seen == [{"value": 1.0}, {"value": 2.0}, {"value": 3.0}]
    assert numbers(trainer.callback_metrics) == {"value": 3.0}


def test_i1_with_both_there_are_three_names() -> None:
    written, seen = Logged(), []
    look = On(train_batch_end=lambda trainer, event: seen.append(numbers(trainer.callback_metrics)))
    trainer = train(Logs(logs(on_epoch=True)), 3, written, look)
    assert written.entries == [
        *[("train", "step", i, {"value_step": float(i)}) for i in (1, 2, 3)],
        ("train", "epoch", 3, {"value_epoch": 2.0}),
    ]
    assert seen == [{"value": float(i), "value_step": float(i)} for i in (1, 2, 3)]
    assert numbers(trainer.callback_metrics) == {"value": 2.0, "value_step": 3.0, "value_epoch": 2.0}


def test_i1_prog_bar() -> None:
    def both(module: Any, batch: Tensor, batch_idx: int) -> None:
        module.log("shown", batch, prog_bar=True)
        module.log("hidden", batch)
        module.log("both", batch, prog_bar=True, on_epoch=True)

    trainer = train(Logs(both), 3)
    assert numbers(trainer.progress_bar_metrics) == {"shown": 3.0, "both_step": 3.0, "both_epoch": 2.0}


def test_i1_logger() -> None:
    def both(module: Any, batch: Tensor, batch_idx: int) -> None:
        module.log("kept", batch, logger=False)
        module.log("kept_too", batch, logger=False, on_step=False, on_epoch=True)
        module.log("written", batch)

    written = Logged()
    trainer = train(Logs(both), 2, written)
    assert written.entries == [("train", "step", i, {"written": float(i)}) for i in (1, 2)]
    assert numbers(trainer.callback_metrics) == {"kept": 2.0, "kept_too": 1.5, "written": 2.0}
    assert numbers(trainer.logged_metrics) == {"written": 2.0}


@pytest.mark.parametrize(("reduce_fx", "expected"), [("mean", 3.0), ("min", 1.5), ("max", 5.0), ("sum", 10.0)])
def test_i1_reduce_fx(reduce_fx: str, expected: float) -> None:
    options: dict[str, Any] = {"on_epoch": True, "reduce_fx": reduce_fx}
    trainer = train(Logs(logs(**options), logs("val", **options)), THREE, val=THREE)
    assert numbers(trainer.callback_metrics)["value_epoch"] == expected
    assert numbers(trainer.callback_metrics)["val"] == expected


def test_i1_another_reduce_fx_is_an_error_that_lists_them() -> None:
    with pytest.raises(MisconfigurationError, match=r"'value'.*reduce_fx='median'.*mean.*min.*max.*sum"):
        train(Logs(logs(reduce_fx="median")), 1)


def test_i1_batch_size() -> None:
    trainer = train(Logs(logs(on_step=False, on_epoch=True, batch_size=1)), THREE)
    assert numbers(trainer.callback_metrics)["value"] == pytest.approx(10.0 / 3)


@pytest.mark.parametrize("sync", [False, True])
def test_i1_sync_dist(sync: bool) -> None:
    def total_plus_two(value: Any) -> list[Any]:
        return [value, [entry | {"total": entry["total"] + 2.0} for entry in value] if isinstance(value, list) else value]

    trainer = new_trainer()
    trainer.processes = processes = FakeProcesses(reduce=lambda value, reduction: value + 2.0, gather=total_plus_two)
    trainer.fit(Logs(logs(sync_dist=sync, reduce_fx="max", on_epoch=True)), batches(2))
    # An epoch's value is always over all processes, so that all decide alike; a step's only with sync_dist.
    step = 4.0 if sync else 2.0
    assert numbers(trainer.callback_metrics) == {"value": 4.0, "value_step": step, "value_epoch": 4.0}
    reduced = [(value.item(), reduction) for value, reduction in processes.reduced]
    assert reduced == ([(1.0, "max"), (2.0, "max")] if sync else [])


def test_i1_a_synchronised_mean_is_weighted_over_all_processes() -> None:
    def with_the_other(value: Any) -> list[Any]:
        """The other process has seen twice as much, of twice the value."""
        if not isinstance(value, list):
            return [value, value]
        return [value, [entry | {"total": 4 * entry["total"], "weight": 2 * entry["weight"]} for entry in value]]

    trainer = new_trainer()
    trainer.processes = FakeProcesses(gather=with_the_other)
    trainer.fit(Logs(logs(on_step=False, on_epoch=True)), THREE)
    assert numbers(trainer.callback_metrics) == pytest.approx({"value": 3.0 * 5 / 3})


def test_i1_a_process_without_a_batch_has_the_others_values() -> None:
    def with_the_other(value: Any) -> list[Any]:
        if not isinstance(value, list):
            return [value, value]
        theirs = {"name": "theirs", "suffix": "", "on_step": False, "on_epoch": True, "total": torch.tensor(6.0), "weight": 2}
        return [value, [{**theirs, "options": [False, True, False, True, "mean", False]}]]

    trainer = new_trainer()
    trainer.processes = FakeProcesses(gather=with_the_other)
    trainer.fit(Logs(logs(on_step=False, on_epoch=True)), THREE)
    assert numbers(trainer.callback_metrics) == {"value": 3.0, "theirs": 3.0}


def test_i1_log_dict() -> None:
    def both(module: Any, batch: Tensor, batch_idx: int) -> None:
        module.log_dict({"a": batch, "b": 2 * batch}, prog_bar=True, on_epoch=True)

    trainer = train(Logs(both), 3)
    expected = {"a": 2.0, "a_step": 3.0, "a_epoch": 2.0, "b": 4.0, "b_step": 6.0, "b_epoch": 4.0}
    assert numbers(trainer.callback_metrics) == expected
    assert numbers(trainer.progress_bar_metrics).keys() == {"a_step", "a_epoch", "b_step", "b_epoch"}


@pytest.mark.parametrize("value", [2, 2.0, True, torch.tensor(2), torch.tensor([[2.0]]), torch.tensor(2.0).numpy()])
def test_i1_numbers_and_scalar_tensors_are_logged(value: Any) -> None:
    trainer = train(Logs(logs(value=lambda x: value, on_epoch=True)), 2)
    for logged in trainer.callback_metrics.values():
        assert logged.ndim == 0
        assert logged.item() == float(value)


def test_i1_hooks_of_the_epoch_log_on_the_epoch() -> None:
    class Module(Logs):
        def on_train_epoch_start(self) -> None:
            self.log("start", 1.0)

        def on_train_epoch_end(self) -> None:
            self.log("end", 2.0)

        def on_validation_epoch_end(self) -> None:
            self.log("val_end", 3.0)

    written = Logged()
    train(Module(), 2, written, val=1)
    assert written.of_scope("epoch") == [{"val_end": 3.0}, {"start": 1.0, "end": 2.0}]
    assert written.of_scope("step") == []


def test_i1_hooks_of_a_batch_log_on_the_step() -> None:
    class Module(Logs):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.log("start", batch)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.log("gradient", gradient(self.w).abs().max())

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("end", batch)

    written = Logged()
    train(Module(), 2, written)
    assert written.of_scope("step") == [{"start": x, "gradient": x, "end": x} for x in (1.0, 2.0)]


def test_i1_values_of_a_batch_without_an_update_go_out_with_the_next() -> None:
    written = Logged()
    module = Logs(logs())
    veto = On(before_optimizer_step=lambda t, e: e.skip("mine") if t.batch_idx == 0 else None)
    train(module, 3, veto, written)
    assert written.entries == [("train", "step", 1, {"value": 2.0}), ("train", "step", 2, {"value": 3.0})]


def test_i1_without_a_trainer_a_value_goes_nowhere() -> None:
    with pytest.warns(UserWarning, match=r"Logs\.log\('value'.*without a trainer"):
        Logs().log("value", 1.0)


# ------------------------------------------------------------------ I2: means


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x, x], lambda x: {"x": x}, lambda x: ("id", {"x": [x]})])
def test_i2_epoch_means_are_weighted_by_batch_size(wrap: Any) -> None:
    """Means 1.5, 3.5, 5 of batches sized 2, 2, 1: 3.0, and not 3.33."""

    class Module(Logs):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("train", THREE[batch_idx].mean(), on_step=False, on_epoch=True)
            return self.w.sum()

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val", THREE[batch_idx].mean())

    loader = [wrap(x) for x in THREE]
    trainer = train(Module(), loader, val=loader)
    assert numbers(trainer.callback_metrics) == {"train": 3.0, "val": 3.0}


def test_i2_each_epoch_begins_anew() -> None:
    written = Logged()
    module = Logs(lambda module, x, i: module.log("value", x * (module.current_epoch + 1), on_step=False, on_epoch=True))
    train(module, 3, written, max_epochs=2)
    assert written.of_scope("epoch") == [{"value": 2.0}, {"value": 4.0}]


def test_i2_values_are_detached() -> None:
    module = Logs(lambda module, x, i: module.log("value", module.loss(x), on_epoch=True))
    trainer = train(module, 2)
    assert trainer.callback_metrics.keys() == {"value", "value_step", "value_epoch"}
    for value in trainer.callback_metrics.values():
        assert not value.requires_grad
        assert value.grad_fn is None


def test_i2_a_value_is_read_at_the_time_of_the_log() -> None:
    """The weight itself: the update that follows changes it in place."""

    def log_weight(module: Any, batch: Tensor, batch_idx: int) -> None:
        module.log("weight", module.w)
        module.log("extreme", module.w, on_step=False, on_epoch=True, reduce_fx="max")
        module.log("mean", module.w, on_step=False, on_epoch=True)

    written = Logged()
    train(Logs(log_weight), 3, written)  # w: 0, -1, -3, then -6
    assert written.of_scope("step") == [{"weight": 0.0}, {"weight": -1.0}, {"weight": -3.0}]
    assert written.of_scope("epoch") == [{"extreme": 0.0, "mean": pytest.approx(-4.0 / 3)}]


@pytest.mark.parametrize("view", [lambda w: w[0], lambda w: w.view(()), lambda w: w.data, lambda w: w.detach()[0]])
def test_i2_a_view_of_a_weight_is_read_at_the_time_of_the_log_too(view: Callable[[Tensor], Tensor]) -> None:
    written = Logged()
    train(Logs(lambda module, x, i: module.log("weight", view(module.w))), 3, written)
    assert written.of_scope("step") == [{"weight": 0.0}, {"weight": -1.0}, {"weight": -3.0}]


def test_i2_values_stay_on_their_device() -> None:
    """On the device "meta", a transfer or a read-out would be an error."""
    devices: list[Any] = []
    look = On(train_batch_end=lambda t, e: devices.append(t.callback_metrics["value"].device.type))
    module = Logs(lambda module, x, i: module.log("value", torch.zeros((), device="meta"), on_epoch=True))
    trainer = train(module, 3, look)
    assert devices == ["meta"] * 3
    assert {value.device.type for value in trainer.callback_metrics.values()} == {"meta"}


@pytest.mark.parametrize("reduce_fx", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_i2_sums_are_in_float32_or_wider(dtype: torch.dtype, reduce_fx: Any) -> None:
    """In fp16 and bf16 a sum of ones stops at 2048 and 256; here of 7 s, 400 times."""
    options = {"on_step": False, "on_epoch": True, "reduce_fx": reduce_fx}
    trainer = train(Logs(logs(value=lambda x: torch.tensor(7, dtype=dtype), **options)), [1.0] * 400)
    value = trainer.callback_metrics["value"]
    assert value.dtype == (torch.float32 if dtype.is_floating_point else torch.float64)
    assert value.item() == (7.0 if reduce_fx == "mean" else 2800.0)


def test_i2_sums_of_float64_stay_float64() -> None:
    tiny = 1.0 + 2.0**-40
    trainer = train(Logs(logs(value=lambda x: torch.tensor(tiny, dtype=torch.float64), on_step=False, on_epoch=True)), 4)
    assert trainer.callback_metrics["value"].dtype == torch.float64
    assert trainer.callback_metrics["value"].item() == tiny


@pytest.mark.parametrize("reduce_fx", ["mean", "sum", "min", "max"])
def test_i2_the_logged_tensor_is_not_changed_by_the_reduction(reduce_fx: str) -> None:
    """Neither a plain value nor a loss, which backward has yet to use."""
    values = [torch.ones(()) for _ in range(3)]
    losses: list[Tensor] = []

    def log_both(module: Any, batch: Tensor, batch_idx: int) -> None:
        losses.append(module.loss(batch))
        module.log("value", values[batch_idx], on_step=False, on_epoch=True, reduce_fx=reduce_fx)
        module.log("loss", losses[-1], on_epoch=True, reduce_fx=reduce_fx)

    train(Logs(log_both), 3)
    assert [value.item() for value in values] == [1.0, 1.0, 1.0]
    assert [loss.item() for loss in losses] == [0.0, -2.0, -9.0]


# ------------------------------------------------------------------ I3: torchmetrics


class Metered(Logs):
    """Counts the calls of its metric."""

    def __init__(self, *, on_step: bool, on_epoch: bool, forward: bool = True) -> None:
        super().__init__()
        self.mean = MeanMetric()
        self.options: dict[str, Any] = {"on_step": on_step, "on_epoch": on_epoch}
        self.call_forward = forward
        self.resets: list[int] = []
        reset = self.mean.reset

        def counting() -> None:
            self.resets.append(self.trainer.total_batch_idx)
            reset()

        self.mean.reset = counting  # type: ignore[method-assign]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        (self.mean if self.call_forward else self.mean.update)(batch)
        self.log("mean", self.mean, **self.options)
        return self.loss(batch)


def test_i3_on_the_epoch_it_is_computed_and_reset_at_its_end() -> None:
    written = Logged()
    module = Metered(on_step=False, on_epoch=True, forward=False)
    trainer = train(module, 3, written, max_epochs=2)
    assert written.entries == [("train", "epoch", 3, {"mean": 2.0}), ("train", "epoch", 6, {"mean": 2.0})]
    assert module.resets == [2, 5]
    assert numbers(trainer.callback_metrics) == {"mean": 2.0}


def test_i3_a_metrics_weights_are_kept() -> None:
    """The metric knows how to reduce; a mean of the steps' means would be 3.33."""

    class Module(Logs):
        def __init__(self) -> None:
            super().__init__()
            self.metric = MeanMetric()

        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.metric.update(batch)
            self.log("mean", self.metric)

    trainer = train(Module(), 1, val=THREE)
    assert numbers(trainer.callback_metrics) == {"mean": 3.0}


def test_i3_on_the_step_it_is_the_value_of_the_batch() -> None:
    written = Logged()
    trainer = train(Metered(on_step=True, on_epoch=True), 3, written)
    assert written.of_scope("step") == [{"mean_step": float(i)} for i in (1, 2, 3)]
    assert written.of_scope("epoch") == [{"mean_epoch": 2.0}]
    assert numbers(trainer.callback_metrics) == {"mean": 2.0, "mean_step": 3.0, "mean_epoch": 2.0}


def test_i3_a_sanity_check_leaves_nothing_in_it() -> None:
    class Module(Logs):
        def __init__(self) -> None:
            super().__init__()
            self.largest = MaxMetric()

        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.largest.update(batch if not self.trainer.sanity_checking else batch + 100.0)
            self.log("largest", self.largest)

    trainer = train(Module(), 1, val=3, num_sanity_val_steps=2)
    assert numbers(trainer.callback_metrics) == {"largest": 3.0}


def test_i3_an_evaluation_that_raised_leaves_nothing_in_it() -> None:
    class Module(Logs):
        fails = True

        def __init__(self) -> None:
            super().__init__()
            self.largest = MaxMetric()

        def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.largest.update(batch + 100.0 if self.fails else batch)
            self.log("largest", self.largest)
            if self.fails:
                raise RuntimeError("mine")

    module, trainer = Module(), new_trainer()
    with pytest.raises(RuntimeError, match="mine"):
        trainer.test(module, batches(2))
    module.fails = False
    assert trainer.test(module, batches(2)) == [{"largest": 2.0}]


def test_i3_a_collection_in_log_dict() -> None:
    class Module(Logs):
        def __init__(self) -> None:
            super().__init__()
            self.metrics = MetricCollection({"mean": MeanMetric(), "max": MaxMetric()})

        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.metrics.update(batch)
            self.log_dict(self.metrics)

    trainer = train(Module(), 1, val=3)
    assert numbers(trainer.callback_metrics) == {"mean": 2.0, "max": 3.0}


def test_i3_an_accuracy_over_two_epochs_of_training_and_validation() -> None:
    class Module(Logs):
        def __init__(self) -> None:
            super().__init__()
            self.train_accuracy, self.val_accuracy = BinaryAccuracy(), BinaryAccuracy()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.train_accuracy(batch > 2.0, torch.ones(1))
            self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
            return self.loss(batch)

        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.val_accuracy(batch > 1.0, torch.ones(1))
            self.log("val_accuracy", self.val_accuracy)

    written = Logged()
    train(Module(), [x.view(1) for x in batches(4)], written, val=[x.view(1) for x in batches(4)], max_epochs=2)
    assert written.of_scope("epoch") == [{"val_accuracy": 0.75}, {"train_accuracy": 0.5}] * 2


# ------------------------------------------------------------------ I4: values that cannot be logged

VALUES: dict[str, tuple[Any, str]] = {
    "not a scalar": (torch.ones(3), r"shape \(3,\).*mean"),
    "empty": (torch.ones(0), r"shape \(0,\)"),
    "a string": ("high", r"'high' \(str\)"),
    "None": (None, r"None \(NoneType\)"),
    "a list": ([1.0], r"\[1\.0\] \(list\)"),
    "a mapping": ({"a": 1.0}, r"log_dict"),
    "complex": (1j, r"1j \(complex\)"),
}


@pytest.mark.parametrize("case", VALUES)
def test_i4_a_bad_value_is_an_error_that_names_the_hook(case: str) -> None:
    value, message = VALUES[case]
    with pytest.raises(MisconfigurationError, match=rf"self\.log\('value'.*{message}") as caught:
        train(Logs(lambda module, x, i: module.log("value", value)), 1)
    assert "Logs.training_step" in str(caught.value)
    with pytest.raises(MisconfigurationError, match=rf"self\.log\('value'.*{message}") as caught:
        new_trainer().test(Logs(evaluation=lambda module, x, i: module.log("value", value)), batches(1))
    assert "Logs.validation_step" in str(caught.value)  # which test_step is another name of


def test_i4_both_flags_off_is_an_error_that_names_the_hook() -> None:
    with pytest.raises(MisconfigurationError, match=r"self\.log\('value'.*neither on_step nor on_epoch") as caught:
        train(Logs(logs(on_step=False)), 1)
    assert "Logs.training_step" in str(caught.value)
    with pytest.raises(MisconfigurationError, match=r"self\.log\('value'.*neither on_step nor on_epoch"):
        new_trainer().test(Logs(evaluation=logs(on_epoch=False)), batches(1))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prog_bar": True}, "prog_bar=True after prog_bar=False"),
        ({"logger": False}, "logger=False after logger=True"),
        ({"on_epoch": True}, "on_epoch=True after on_epoch=None"),
        ({"reduce_fx": "max"}, "reduce_fx='max' after reduce_fx='mean'"),
        ({"sync_dist": True}, "sync_dist=True after sync_dist=False"),
    ],
)
def test_i4_one_name_with_different_options_is_an_error_that_names_the_hook(changed: Any, message: str) -> None:
    def twice(module: Any, batch: Tensor, batch_idx: int) -> None:
        module.log("value", batch)
        module.log("value", batch, **changed)

    with pytest.raises(MisconfigurationError, match=rf"self\.log\('value', \.\.\.\) in Logs\.training_step.*{message}"):
        train(Logs(twice), 1)


def test_i4_on_step_between_steps_is_an_error() -> None:
    class Module(Logs):
        def on_train_epoch_end(self) -> None:
            self.log("value", 1.0, on_step=True)

    with pytest.raises(MisconfigurationError, match=r"self\.log\('value'.*Module\.on_train_epoch_end.*no step"):
        train(Module(), 1)


def test_i4_one_name_in_several_stages_may_have_other_options() -> None:
    trainer = train(Logs(logs(on_epoch=True), logs()), 2, val=3)
    assert numbers(trainer.callback_metrics)["value_epoch"] == 1.5


MEANINGLESS = (
    "prepare_data", "configure_model", "configure_optimizers", "on_fit_start", "on_train_end", "on_fit_end",
    "on_validation_end",
)  # fmt: skip


@pytest.mark.parametrize("hook", MEANINGLESS)
def test_i4_a_hook_in_which_it_means_nothing_is_an_error_that_names_it(hook: str) -> None:
    class Module(Logs):
        pass

    def log(self: Any) -> Any:
        self.log("value", 1.0)
        return super(Module, self).configure_optimizers()

    log.__name__ = log.__qualname__ = hook
    log.__code__ = log.__code__.replace(co_name=hook)
    setattr(Module, hook, log)
    with pytest.raises(MisconfigurationError, match=rf"self\.log\('value', \.\.\.\) was called in Module\.{hook}, where"):
        train(Module(), 1, val=1)


def test_i4_setup_and_teardown_too() -> None:
    class Setup(Logs):
        def setup(self, stage: str) -> None:
            self.log("value", 1.0)

    class Teardown(Logs):
        def teardown(self, stage: str) -> None:
            self.log("value", 1.0)

    with pytest.raises(MisconfigurationError, match=r"was called in Setup\.setup, where"):
        train(Setup(), 1)
    with pytest.raises(MisconfigurationError, match=r"was called in Teardown\.teardown, where"):
        train(Teardown(), 1)


def test_i4_prediction_logs_nothing() -> None:
    class Module(Logs):
        def predict_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("value", 1.0)

    with pytest.raises(MisconfigurationError, match=r"self\.log\('value'.*Module\.predict_step"):
        new_trainer().predict(Module(), batches(1))


def test_i4_a_name_that_is_no_string_is_an_error() -> None:
    with pytest.raises(MisconfigurationError, match=r"name.*string.*3"):
        train(Logs(lambda module, x, i: module.log(3, x)), 1)


# ------------------------------------------------------------------ I5: several evaluation loaders


def test_i5_several_loaders_have_separate_names() -> None:
    written = Logged()
    module = Logs(evaluation=logs())
    trainer = train(module, 1, written, val=[LoaderOf(2), LoaderOf(4)])
    expected = {"value/dataloader_idx_0": 1.5, "value/dataloader_idx_1": 2.5}
    assert written.of_scope("epoch") == [expected]
    assert numbers(trainer.callback_metrics) == expected
    results = new_trainer().test(module, [LoaderOf(2), LoaderOf(4)])
    assert results == [{"value/dataloader_idx_0": 1.5}, {"value/dataloader_idx_1": 2.5}]


class LoaderOf:
    """A loader that is no list, of which several are several loaders."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Any:
        return iter(batches(self.n))


def test_i5_with_both_the_loader_comes_last() -> None:
    """As in Lightning: ``value_epoch/dataloader_idx_0``."""
    trainer = train(Logs(evaluation=logs(on_step=True, on_epoch=True)), 1, val=[LoaderOf(2), LoaderOf(4)])
    assert numbers(trainer.callback_metrics) == {
        "value/dataloader_idx_0": 1.5, "value_step/dataloader_idx_0": 2.0, "value_epoch/dataloader_idx_0": 1.5,
        "value/dataloader_idx_1": 2.5, "value_step/dataloader_idx_1": 4.0, "value_epoch/dataloader_idx_1": 2.5,
    }  # fmt: skip


def test_i5_a_single_loader_has_no_suffix_and_it_can_be_left_out() -> None:
    module = Logs(evaluation=logs())
    assert new_trainer().validate(module, [LoaderOf(2)]) == [{"value": 1.5}]
    both = Logs(evaluation=logs(add_dataloader_idx=False))
    assert new_trainer().validate(both, [LoaderOf(1), LoaderOf(2)]) == [{"value": 1.0}, {"value": 1.5}]


def test_i5_hooks_of_the_epoch_have_no_suffix() -> None:
    class Module(Logs):
        def on_validation_epoch_end(self) -> None:
            self.log("all", 1.0)

    trainer = train(Module(), 1, val=[LoaderOf(1), LoaderOf(1)])
    assert numbers(trainer.callback_metrics) == {"all": 1.0}


def test_i1_metrics_of_each_fit_begin_anew() -> None:
    trainer: Trainer = new_trainer()
    trainer.fit(Logs(logs("first")), batches(1))
    trainer.fit(Logs(logs("second")), batches(1))
    assert numbers(trainer.callback_metrics) == {"second": 1.0}


def test_i1_step_metrics_come_after_the_batch_end_and_the_update() -> None:
    recorder = Recorder("after_update", "train_batch_end", "metrics_logged")
    train(Logs(logs()), 1, recorder)
    assert recorder.names == ["after_update", "train_batch_end", "metrics_logged", "metrics_logged"]
