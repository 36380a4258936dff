"""What people log: the same source in both frameworks gives the same names, values and errors."""

from __future__ import annotations

import dataclasses
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, Dataset

from eventtrain import LightningModule, Trainer
from tests.conformance.frameworks import lightning
from tests.kit import Logged

VALUES = ([1.0, 2.0], [3.0, 4.0], [5.0])
"""Batches of 2, 2 and 1 samples, whose means are 1.5, 3.5 and 5."""

Named = namedtuple("Named", ("names", "x"))


@dataclasses.dataclass
class Sample:
    names: list[str]
    x: torch.Tensor


class Iterated:
    """A batch that can be iterated."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __iter__(self) -> Any:
        return iter((["name"] * len(self.x), self.x))


class Listed(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def loader(items: list[Any]) -> DataLoader[Any]:
    return DataLoader(Listed(items), batch_size=None, collate_fn=lambda item: item)


def module(base: Any, hooks: dict[str, Callable[..., Any]], **attributes: Any) -> Any:
    """Return a module of either framework whose hooks are these functions."""

    class Module(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))
            for name, make in attributes.items():
                setattr(self, name, make())

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.w.sum()

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.w], lr=1.0)

    return type("Module", (Module,), hooks)()


def numbers(metrics: Any) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


@dataclasses.dataclass
class Both:
    """A trainer of each framework, which run the same source.

    Attributes:
        written: What loggers got: here, and there.
    """

    epochs: int = 1

    def __post_init__(self) -> None:
        self.written: tuple[list[Any], list[Any]] = ([], [])
        self.logged = Logged()
        self.here = Trainer(
            max_epochs=self.epochs, device="cpu", default_callbacks=False, num_sanity_val_steps=0, callbacks=[self.logged]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.there = lightning.Trainer(
                max_epochs=self.epochs, accelerator="cpu", logger=recorder(self.written[1]), enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1,
            )  # fmt: skip

    def run(self, stage: str, hooks: dict[str, Any], *data: Any, **attributes: Any) -> tuple[Any, Any]:
        """Run a stage in both; return the results, or the metrics after a fit."""
        results = []
        for made, run in self.runs(stage, hooks, **attributes):
            result = run(made, *data)
            results.append(numbers(made.trainer.callback_metrics) if stage == "fit" else result)
        return results[0], results[1]

    def runs(self, stage: str, hooks: dict[str, Any], **attributes: Any) -> Iterator[tuple[Any, Callable[..., Any]]]:
        """Yield the module and the trainer's method of each framework."""
        yield module(LightningModule, hooks, **attributes), getattr(self.here, stage)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield module(lightning.LightningModule, hooks, **attributes), getattr(self.there, stage)


def recorder(into: list[Any]) -> Any:
    """Return a logger of Lightning that records the values and their step."""

    class Recording(lightning.loggers.logger.DummyLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if values := {name: float(value) for name, value in metrics.items() if name != "epoch"}:
                into.append((step, values))

    return Recording()


def log_mean(self: Any, batch: Any, batch_idx: int) -> None:
    self.log("value", torch.tensor(VALUES[batch_idx]).mean())


FORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "names first": lambda x: (["name"] * len(x), x),
    "a mapping": lambda x: {"text": ["name"] * len(x), "x": x},
    "a mapping in a mapping": lambda x: {"meta": {"name": ["name"] * len(x)}, "x": x},
    "a dataclass": lambda x: Sample(["name"] * len(x), x),
    "a named tuple": lambda x: Named(["name"] * len(x), x),
    "an iterable object": Iterated,
}


@pytest.mark.parametrize("form", FORMS)
def test_means_are_weighted_alike(form: str) -> None:
    data = loader([FORMS[form](torch.tensor(values)) for values in VALUES])
    here, there = Both().run("test", {"test_step": log_mean}, data)
    assert here == there == [{"value": 3.0}]


def test_a_batch_of_unknown_size_is_an_error_in_both() -> None:
    both = Both()
    for made, run in both.runs("test", {"test_step": log_mean}):
        with pytest.raises(Exception, match=r"batch_size"):
            run(made, loader([object()]))


def test_a_batch_of_none_is_one_sample_in_both() -> None:
    here, there = Both().run("test", {"test_step": log_mean}, loader([None, None]))
    assert here == there == [{"value": 2.5}]


@pytest.mark.parametrize("both_flags", [True, False])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_values_of_evaluation_steps_have_the_same_names_and_places(stage: str, both_flags: bool) -> None:
    """The x of the first batch is 1 here, 0 there."""
    both = Both()
    hook = "validation_step" if stage == "validate" else "test_step"

    def step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("value", batch.mean(), on_step=True, on_epoch=both_flags)

    here, there = both.run(stage, {hook: step}, loader([torch.ones(1), torch.zeros(1), torch.ones(1)]))
    assert here == there == ([{"value_epoch": pytest.approx(2 / 3)}] if both_flags else [{}])
    ours = [(x - 1, values) for _, scope, x, values in both.logged.entries if scope == "step"]
    name = "value_step" if both_flags else "value"
    assert ours == [entry for entry in both.written[1] if name in entry[1]]
    assert ours == [(i, {name: x}) for i, x in enumerate((1.0, 0.0, 1.0))]


def test_validations_of_a_fit_count_their_batches_on_in_both() -> None:
    both = Both(epochs=2)

    def step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("value", batch.mean(), on_step=True, on_epoch=False)

    data = loader([torch.ones(1), torch.zeros(1)])
    both.run("fit", {"validation_step": step}, loader([torch.ones(1)]), data)
    ours = [(x - 1, values) for stage, scope, x, values in both.logged.entries if (stage, scope) == ("validation", "step")]
    assert ours == both.written[1] == [(i, {"value": float(i % 2 == 0)}) for i in range(4)]


@pytest.mark.parametrize("stage", ["train", "validation"])
@pytest.mark.parametrize("pattern", ["on_{}_start", "on_{}_epoch_start", "on_{}_epoch_end"])
def test_hooks_around_an_epoch_log_alike(stage: str, pattern: str) -> None:
    hooks = {pattern.format(stage): lambda self: self.log("value", torch.tensor(2.0))}
    here, there = Both(epochs=2).run("fit", hooks, loader([torch.ones(1)]), loader([torch.ones(1)]))
    assert here == there == {"value": 2.0}


@pytest.mark.parametrize("options", [{}, {"on_epoch": True}, {"on_step": False, "on_epoch": True}])
def test_one_name_in_the_step_and_at_the_epochs_end(options: dict[str, Any]) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.log("value", batch.mean(), **options)
        return self.w.sum()

    def on_validation_epoch_end(self: Any) -> None:
        self.log("val", torch.tensor(20.0))

    hooks = {
        "training_step": training_step,
        "on_train_epoch_end": lambda self: self.log("value", torch.tensor(10.0)),
        "validation_step": lambda self, batch, batch_idx: self.log("val", batch.mean()),
        "on_validation_epoch_end": on_validation_epoch_end,
    }
    data = loader([torch.full((2,), 1.0), torch.full((2,), 2.0)])
    here, there = Both().run("fit", hooks, data, data)
    assert here == there
    assert here["value"] == 10.0
    assert here["val"] == 20.0


def test_each_loader_has_its_own_names_in_both() -> None:
    def test_step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        self.log(f"of_{dataloader_idx}", batch.mean(), add_dataloader_idx=False)

    data = [loader([torch.full((2,), x)]) for x in (1.0, 2.0)]
    here, there = Both().run("test", {"test_step": test_step}, data)
    assert here == there == [{"of_0": 1.0}, {"of_1": 2.0}]


def test_the_metrics_of_a_fit_are_not_those_of_a_later_test_in_both() -> None:
    both = Both()

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.log("train", batch.mean())
        return self.w.sum()

    hooks = {"training_step": training_step, "test_step": lambda self, batch, batch_idx: self.log("test", batch.mean())}
    data = loader([torch.ones(2)])
    here, there = both.run("fit", hooks, data)
    assert here == there == {"train": 1.0}
    both.run("test", hooks, data)
    assert numbers(both.here.callback_metrics) == numbers(both.there.callback_metrics) == {"test": 1.0}


@pytest.mark.parametrize("options", [{"on_step": True}, {"on_step": False, "on_epoch": True}, {"on_epoch": True}])
def test_metric_objects_begin_each_epoch_anew_in_both(options: dict[str, Any]) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.mean(batch + 2.0 * self.current_epoch)
        self.log("mean", self.mean, **options)
        return self.w.sum()

    def on_train_epoch_start(self: Any) -> None:
        assert self.mean.update_count == 0

    hooks = {"training_step": training_step, "on_train_epoch_start": on_train_epoch_start}
    data = loader([torch.tensor([1.0])])
    here, there = Both(epochs=2).run("fit", hooks, data, mean=torchmetrics.MeanMetric)
    assert here == there
    assert set(here.values()) == {3.0}


def test_collections_in_log_dict_are_alike() -> None:
    def make() -> Any:
        return torchmetrics.MetricCollection({"a": torchmetrics.MeanMetric(), "b": torchmetrics.SumMetric()}, prefix="t_")

    def test_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.metrics.update(batch)
        self.log_dict(self.metrics)

    here, there = Both().run("test", {"test_step": test_step}, loader([torch.ones(2), torch.ones(1)]), metrics=make)
    assert here == there == [{"t_a": 1.0, "t_b": 3.0}]


def test_a_metric_object_of_several_values_is_an_error_in_both() -> None:
    def test_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.metric.update(batch)
        self.log("value", self.metric)

    def make() -> Any:
        return torchmetrics.MinMaxMetric(torchmetrics.MeanMetric())

    for made, run in Both().runs("test", {"test_step": test_step}, metric=make):
        with pytest.raises(Exception, match="value"):
            run(made, loader([torch.ones(2)]))


def test_numbers_have_64_bits_here_and_32_there() -> None:
    here, there = Both().run("test", {"test_step": lambda self, b, i: self.log("value", 67128463.0)}, loader([torch.ones(1)]))
    assert here == [{"value": 67128463.0}]
    assert there == [{"value": 67128464.0}]
