"""The number of samples in a batch of any form, which weights the means over an epoch."""

from __future__ import annotations

import warnings
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from eventtrain import MisconfigurationError
from eventtrain.callbacks import EarlyStopping, LRSchedulerStepping, TensorBoardLogger
from eventtrain.metrics.batch_size import batch_sizes
from tests.kit import NoLength, Probe, numbers, recording_plateau, train

VALUES = ([1.0, 2.0], [3.0, 4.0], [5.0])
"""Batches of 2, 2 and 1 samples, whose means are 1.5, 3.5 and 5."""

Named = namedtuple("Named", ("names", "x"))


@dataclass
class Sample:
    names: list[str]
    x: Any


class Unpacked:
    """A batch that can only be iterated."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __iter__(self) -> Iterator[Any]:
        yield names(self.x)
        yield self.x


class Sized:
    """A batch that only has a length."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)


class Indexed(Sized):
    """A batch that gives its samples one by one."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.x)


class Fields(Sized):
    """A batch that gives its fields one by one, and has as its length their number."""

    def __init__(self, x: Any) -> None:
        super().__init__((names(x), x))
        self.tensor = x

    def __iter__(self) -> Iterator[Any]:
        return iter(self.x)


class Graphs:
    """A batch of graphs, whose tensors are as long as all nodes together; iterated by names and tensors."""

    def __init__(self, x: Tensor) -> None:
        self.num_graphs = len(x)
        self.nodes = torch.zeros(5 * len(x), 1)

    def __iter__(self) -> Iterator[Any]:
        yield "nodes", self.nodes

    def __len__(self) -> int:
        return 1


class Opaque:
    """A batch, or a part of one, of which nothing is known."""


def names(x: Any) -> list[str]:
    return ["name"] * len(x)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "names, then a tensor": lambda x: (names(x), x),
    "a tuple of names, then a tensor": lambda x: [tuple(names(x)), x],
    "a mapping whose first value is a list": lambda x: {"text": names(x), "x": x},
    "a mapping in a mapping": lambda x: {"meta": {"name": names(x)}, "x": x},
    "a dataclass": lambda x: Sample(names(x), x),
    "a named tuple": lambda x: Named(names(x), x),
    "an iterable object": Unpacked,
    "an object with a length": Sized,
    "an object that gives its samples": lambda x: Indexed(x[:, None].expand(-1, 3)),
    "an object that gives its fields": Fields,
    "an object with a tensor": lambda x: SimpleNamespace(name="name", x=x),
    "an iterable object in a tuple": lambda x: ("train", Unpacked(x)),
    "an object with a length in a mapping": lambda x: {"batch": Sized(x)},
    "a scalar tensor first": lambda x: (torch.tensor(7.0), x),
    "a number first": lambda x: (7, x),
    "None first": lambda x: (None, x),
    "an unknown object first": lambda x: (Opaque(), x),
    "a mapping that is no dict": lambda x: UserDict({"ids": x}),
    "an array": lambda x: x.numpy(),
    "an array behind names": lambda x: {"text": names(x), "x": x.numpy()},
    "an array of strings": lambda x: np.array(names(x)),
    "a packed sequence": lambda x: pack_sequence([torch.zeros(3)] * len(x)),
    "graphs": Graphs,
    "graphs and their labels": lambda x: (Graphs(x), x),
    "a list of strings": names,
    "a mapping of lists": lambda x: {"text": names(x), "label": [0] * len(x)},
    "lists of lists in a mapping": lambda x: {"ids": [[1, 2, 3] for _ in x]},
    "two lists": lambda x: (names(x), [0.5] * len(x)),
    "a list of samples without a tensor": lambda x: [{"text": "name", "label": 1} for _ in x],
    "a list of tuples": lambda x: [("name", 1) for _ in x],
    "a list of unknown objects": lambda x: [Opaque() for _ in x],
    "a range": lambda x: range(len(x)),
}


class Logs(Probe):
    """Logs the mean of each batch, whatever the batch looks like."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("train", sum(VALUES[batch_idx]) / len(VALUES[batch_idx]), on_step=False, on_epoch=True)
        return self.w.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", sum(VALUES[batch_idx]) / len(VALUES[batch_idx]))


def loader(form: str) -> NoLength:
    return NoLength([FORMS[form](torch.tensor(values)) for values in VALUES])  # a list might be several loaders


@pytest.mark.parametrize("form", FORMS)
def test_epoch_means_are_weighted_by_the_number_of_samples(form: str) -> None:
    trainer = train(Logs(), loader(form), val=loader(form))
    assert numbers(trainer.callback_metrics) == {"train": 3.0, "val": 3.0}


@pytest.mark.parametrize(
    "batch",
    [torch.tensor(1.0), (torch.tensor(1.0), torch.tensor(2.0)), {"x": torch.tensor(1.0)}, 3, ("name", 3), np.float32(2), None],
)
def test_a_batch_of_scalars_or_of_nothing_is_one_sample(batch: Any) -> None:
    assert batch_sizes(batch) == [1]


def test_an_empty_batch_weighs_nothing() -> None:
    assert batch_sizes(torch.zeros(0, 3)) == [0]
    trainer = train(Logs(), [torch.ones(2), torch.ones(2), torch.ones(0)])
    assert numbers(trainer.callback_metrics) == {"train": 2.5}


def test_ragged_tensors_have_as_many_samples_as_sequences() -> None:
    jagged = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=torch.jagged)
    assert batch_sizes(("name", jagged)) == [2]


@pytest.mark.parametrize("batch", [Opaque(), (None, Opaque()), {}, {"x": None}, iter([torch.ones(2)])])
def test_an_unknown_size_is_an_error_that_says_how_to_give_it(batch: Any) -> None:
    match = r"The batch is a \w+, whose number of samples is unknown.*Logs\.training_step.*'train'.*batch_size="
    with pytest.raises(MisconfigurationError, match=match):
        train(Logs(), NoLength([batch]))


def test_an_unknown_size_is_no_error_if_it_is_not_needed() -> None:
    class Module(Probe):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("step", 1.0)
            self.log("given", 2.0 + batch_idx, on_step=False, on_epoch=True, batch_size=1 + 2 * batch_idx)
            self.log("largest", 3.0, on_step=False, on_epoch=True, reduce_fx="max")
            return self.w.sum()

        def on_train_epoch_end(self) -> None:
            self.log("end", 4.0)

    trainer = train(Module(), [Opaque(), Opaque()])
    assert numbers(trainer.callback_metrics) == {"step": 1.0, "given": 2.75, "largest": 3.0, "end": 4.0}


def test_parts_of_different_sizes_are_one_warning_in_a_run() -> None:
    batches = [{"x": torch.ones(2, 4), "edges": torch.ones(7)} for _ in range(3)]
    with pytest.warns(UserWarning, match="sizes") as caught:
        trainer = train(Logs(), batches, val=batches, max_epochs=2)
    (warning,) = [str(each.message) for each in caught]
    assert warning.startswith("Parts of the batch have the sizes [2, 7]: means take the first.")
    assert "Logs.training_step: self.log('train', ..., batch_size=...)" in warning
    assert numbers(trainer.callback_metrics) == pytest.approx({"train": 10 / 3, "val": 10 / 3})


def test_parts_of_different_sizes_are_no_warning_if_the_size_is_given() -> None:
    class Module(Probe):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("value", batch[0].mean(), on_epoch=True, batch_size=3)
            return self.w.sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(Module(), [(torch.ones(2), torch.ones(7))])


@pytest.mark.parametrize("size", [torch.tensor(3), torch.tensor([3.0]), 3.0, np.int64(3)])
def test_a_given_size_may_be_any_number(size: Any) -> None:
    class Module(Probe):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("value", float(batch_idx), on_step=False, on_epoch=True, batch_size=size if batch_idx else 1)
            return self.w.sum()

    assert numbers(train(Module(), 2).callback_metrics) == {"value": 0.75}


@pytest.mark.parametrize("size", ["3", -1, [3], torch.ones(2)])
def test_a_given_size_that_is_no_number_of_samples_is_an_error(size: Any) -> None:
    class Module(Probe):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("value", batch, on_step=False, on_epoch=True, batch_size=size)
            return self.loss(batch)

    with pytest.raises(MisconfigurationError, match=r"self\.log\('value', .*batch_size=.*number of samples.*len\(batch\)"):
        train(Module(), 1)


def test_the_size_is_found_once_a_batch() -> None:
    class Counted(dict[str, Any]):
        reads = 0

        def values(self) -> Any:
            Counted.reads += 1
            return super().values()

    class Module(Probe):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            for name in ("a", "b", "c"):
                self.log(name, 1.0, on_step=False, on_epoch=True)
            return self.w.sum()

        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            return batch

    train(Module(), NoLength([Counted(x=torch.ones(2)) for _ in range(3)]))
    assert Counted.reads == 3


# ------------------------------------------------------------------ who uses it


def test_schedulers_and_early_stopping_see_the_weighted_mean() -> None:
    seen: list[float] = []
    configure = recording_plateau("val", seen)
    stopping = EarlyStopping("val", patience=9)
    form = "names, then a tensor"
    train(Logs(configure=configure), loader(form), stopping, LRSchedulerStepping(), val=loader(form))
    assert seen == [3.0]
    assert stopping.value == 3.0


@pytest.mark.parametrize("form", ["names, then a tensor", "a dataclass", "graphs", "a list of strings"])
def test_the_x_axis_of_samples_counts_them(form: str, tmp_path: Path) -> None:
    class Module(Probe):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("value", float(batch_idx))
            return self.w.sum()

    logger = TensorBoardLogger(tmp_path, log_every_n_steps=1, x_axis="samples")
    train(Module(), loader(form), logger)
    events = EventAccumulator(str(logger.run_dir)).Reload().Scalars("value")
    assert [event.step for event in events] == [2, 4, 5]


def test_the_x_axis_of_samples_needs_sizes(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationError, match=r'samples is unknown.*TensorBoardLogger\(x_axis="batches"\)'):
        train(Logs(), [Opaque()], TensorBoardLogger(tmp_path, x_axis="samples"))
