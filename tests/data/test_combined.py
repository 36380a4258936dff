"""Several loaders that are read as one: in training, in evaluations, by hand, and in resumed runs."""

from __future__ import annotations

from collections import deque, namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader as LightningsCombinedLoader
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]

from eventtrain import CombinedLoader, LightningDataModule, MisconfigurationError
from eventtrain.callbacks import GradientAccumulation, LRSchedulerStepping
from eventtrain.callbacks.distributed.data_parallel import DataParallel
from tests.kit import FakeProcesses, Line, ModuleOf, NoLength, On, batches, new_trainer, train
from tests.resuming import Model, check_all_safe_points

MODES = ["min_size", "max_size", "max_size_cycle", "sequential"]
STATEFUL = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated", "ignore:Parts of the batch have the sizes")
Pair = namedtuple("Pair", ["a", "b"])


class Reader(ModuleOf):
    """Collects the batches of each stage, as plain values."""

    def __init__(self) -> None:
        super().__init__(validation_step=self.evaluate, test_step=self.evaluate, predict_step=self.evaluate)
        self.read: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert batch_idx == len(self.read) or self.trainer.current_epoch > 0
        self.read.append(plain(batch))
        return self.w.sum()

    def evaluate(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.read.append((plain(batch), batch_idx, dataloader_idx))
        return plain(batch)


def losing(use: Any) -> ModuleOf:
    """Return a module that gives its batches to a function, and returns a loss if that returns."""
    module = ModuleOf()

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        use(batch)
        return module.w.sum()

    module.training_step = training_step  # type: ignore[method-assign]
    return module


def plain(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(plain, batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map(plain, batch))
    return batch.item() if isinstance(batch, Tensor) else batch


def loader(*numbers: float) -> DataLoader[Any]:
    return DataLoader(torch.tensor(numbers, dtype=torch.float32), batch_size=None)  # type: ignore[arg-type]


def read(data: Any, **arguments: Any) -> list[Any]:
    module = Reader()
    train(module, data, **arguments)
    return module.read


# ---------------------------------------------------------------- forms


def test_a_dict_of_loaders_gives_dicts_until_the_longest_ends() -> None:
    expected = [{"a": 1, "b": 4}, {"a": 2, "b": 5}, {"a": 3, "b": 4}]
    assert read({"a": loader(1, 2, 3), "b": loader(4, 5)}) == expected
    assert read({"a": batches(3), "b": batches([4, 5])}) == expected  # a dict is never iterated by its keys


def test_lists_and_nested_forms() -> None:
    a, b = loader(1, 2), loader(3)
    assert read([a, b]) == [[1, 3], [2, 3]]
    assert read((a, b)) == [(1, 3), (2, 3)]
    assert read(Pair(a, b)) == [Pair(1, 3), Pair(2, 3)]
    assert read({"x": [a, b], "y": {"z": b}}) == [{"x": [1, 3], "y": {"z": 3}}, {"x": [2, 3], "y": {"z": 3}}]
    assert read([{"x": a}, [a, b]]) == [[{"x": 1}, [1, 3]], [{"x": 2}, [2, 3]]]
    assert read({"x": [torch.tensor(1.0), torch.tensor(2.0)], "y": b}) == [{"x": 1, "y": 3}, {"x": 2, "y": 3}]


@pytest.mark.parametrize("wrap", [lambda a: [a], lambda a: (a,), lambda a: [[a]]])
def test_a_list_of_one_loader_is_this_loader(wrap: Any) -> None:
    assert read(wrap(loader(1, 2))) == [1, 2]
    assert read(wrap(NoLength(batches(2)))) == [1, 2]
    module = Reader()
    train(module, 1, val=wrap(loader(5)), limit_train_batches=0)
    new_trainer().validate(module, wrap(loader(5)))
    assert module.read == [(5, 0, 0)]


class Graph:
    """A batch that can be iterated, and moved to a device."""

    def __iter__(self) -> Iterator[str]:
        return iter("xy")

    def to(self, device: Any) -> Graph:
        return self


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2, 1),
        [torch.ones(1), torch.ones(1)],
        (torch.ones(1), torch.ones(1)),
        {"x": torch.ones(1), "names": ["a", "b"]},
        numpy.ones(2),
        "a text",
        b"bytes",
        {1, 2},
        Graph(),
        [[1, 2], [3]],
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_list_of_batches_is_one_loader(batch: Any, count: int) -> None:
    seen: list[Any] = []
    module = losing(seen.append)
    module.test_step = lambda batch, batch_idx: seen.append(batch)  # type: ignore[method-assign, misc]
    train(module, [batch] * count)
    new_trainer().test(module, [batch] * count)
    assert len(seen) == 2 * count and all(type(each) is type(batch) for each in seen)


def test_loaders_from_hooks_and_datamodules() -> None:
    several = {"a": loader(1, 2), "b": loader(3)}

    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return several

    module = Reader()
    module.train_dataloader = lambda: several  # type: ignore[method-assign]
    new_trainer().fit(module)
    other = Reader()
    new_trainer().fit(other, datamodule=Data())
    assert module.read == other.read == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]


def test_hooks_of_a_batch_see_the_whole() -> None:
    module = Reader()
    moved: list[Any] = []
    module.on_before_batch_transfer = lambda batch, dataloader_idx: moved.append(plain(batch)) or batch  # type: ignore
    train(module, {"a": loader(1), "b": loader(2)})
    assert moved == [{"a": 1, "b": 2}]


# ---------------------------------------------------------------- modes


SHORT_AND_LONG = [(2, 5), (5, 2), (3, 3), (1, 4), (4, 2, 3)]


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.parametrize("lengths", SHORT_AND_LONG)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("known", [True, False])
def test_iterated_by_hand_it_gives_what_lightning_s_gives(mode: Any, lengths: Any, known: bool) -> None:
    def make(kind: Any) -> Any:
        lists = [[f"{index}{x}" for x in range(length)] for index, length in enumerate(lengths)]
        return kind({name: each if known else NoLength(each) for name, each in zip("abc", lists, strict=False)}, mode)

    here, there = make(CombinedLoader), make(LightningsCombinedLoader)
    assert list(here) == list(there)
    assert list(here) == list(there)
    if known:
        assert len(here) == len(there)
    else:
        with pytest.raises(TypeError, match="each of its loaders"):
            len(here)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [[1, 4], [2, 5]]),
        ("max_size", [[1, 4], [2, 5], [3, None]]),
        ("max_size_cycle", [[1, 4], [2, 5], [3, 4]]),
        ("sequential", [1, 2, 3, 4, 5]),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_training_reads_each_mode(mode: str, expected: Any, known: bool) -> None:
    loaders = [loader(1, 2, 3), loader(4, 5)] if known else [NoLength(batches(3)), NoLength(batches([4, 5]))]
    combined = CombinedLoader(loaders, mode)
    last: list[bool] = []
    watch = On(train_batch_end=lambda trainer, event: last.append(trainer.is_last_batch))
    module = Reader()
    trainer = train(module, combined, watch, max_epochs=2)
    assert module.read == 2 * expected
    assert last == 2 * [index == len(expected) - 1 for index in range(len(expected))]
    assert trainer.num_training_batches == (len(expected) if known else None)
    assert combined.flattened == loaders == combined.iterables


@pytest.mark.parametrize(
    ("mode", "limit", "expected"),
    [
        ("max_size_cycle", 2, [[1, 5], [2, 6]]),
        ("max_size_cycle", 0.75, [[1, 5], [2, 6], [3, 5]]),
        ("min_size", 0.5, [[1, 5]]),
        ("max_size", 0.75, [[1, 5], [2, 6], [3, None]]),
        ("sequential", 5, [1, 2, 3, 4, 5]),
        ("sequential", 0.5, [1, 2, 3]),
    ],
)
def test_limits(mode: str, limit: Any, expected: Any) -> None:
    assert read(CombinedLoader([loader(1, 2, 3, 4), loader(5, 6)], mode), limit_train_batches=limit) == expected


def test_a_growing_loader_among_several() -> None:
    class Growing:
        size = 1

        def __len__(self) -> int:
            return self.size

        def __iter__(self) -> Iterator[Tensor]:
            yield from batches(self.size)
            self.size += 1

    expected = [{"a": 1, "b": 7}, {"a": 1, "b": 7}, {"a": 2, "b": 7}, {"a": 1, "b": 7}, {"a": 2, "b": 7}, {"a": 3, "b": 7}]
    assert read({"a": Growing(), "b": loader(7)}, max_epochs=3) == expected


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_closes_the_last_window(mode: str) -> None:
    combined = CombinedLoader([loader(1, 2, 3), loader(4, 5)], mode)
    trainer = train(Reader(), combined, GradientAccumulation(2), max_epochs=2)
    assert trainer.global_step == 2 * -(-len(combined) // 2) == trainer.estimated_stepping_batches


class Both(Line):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self(batch["long"]).square().mean() + self(batch["short"]).square().mean()) * torch.rand(())


def by_hand(loaders: dict[str, Any], epochs: int) -> Tensor:
    """Train a line by a plain loop over the longer loader, in which the shorter one starts anew."""
    module = Line(3)
    optimizer = SGD(module.parameters(), lr=0.1)
    for _ in range(epochs):
        long, short = iter(loaders["long"]), iter(loaders["short"])
        for x in long:
            if (y := next(short, None)) is None:
                short = iter(loaders["short"])
                y = next(short)
            optimizer.zero_grad()
            ((module(x).square().mean() + module(y).square().mean()) * torch.rand(())).backward()
            optimizer.step()
    return module.layer.weight


@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("lengths", [(20, 12), (20, 3), (8, 8)])
def test_parameters_are_those_of_the_plain_loop(lengths: tuple[int, int], generator: bool) -> None:
    def loaders() -> dict[str, Any]:
        source = torch.Generator().manual_seed(5)
        long, short = (torch.randn(length, 3, generator=source) for length in lengths)
        draws = torch.Generator().manual_seed(1) if generator else None
        options: dict[str, Any] = {"batch_size": 4, "shuffle": True, "generator": draws}
        return {"long": DataLoader(long, **options), "short": DataLoader(short, **options)}  # type: ignore[arg-type]

    torch.manual_seed(0)
    expected = by_hand(loaders(), 3)
    torch.manual_seed(0)
    module = Both(3)
    train(module, loaders(), max_epochs=3)
    assert torch.equal(module.layer.weight, expected)


# ---------------------------------------------------------------- evaluations


@pytest.mark.parametrize("form", [lambda a, b: [a, b], lambda a, b: {"a": a, "b": b}, lambda a, b: {"x": [a], "y": {"b": b}}])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluations_read_one_loader_after_the_other(stage: str, form: Any) -> None:
    module = Reader()
    trainer = new_trainer()
    outputs = getattr(trainer, stage)(module, form(loader(1, 2), loader(3)))
    assert module.read == [(1, 0, 0), (2, 1, 0), (3, 0, 1)]
    expected: Any = [[1, 2], [3]] if stage == "predict" else [{}, {}]
    assert outputs == expected


def test_metrics_of_a_dict_of_loaders_have_its_indices() -> None:
    results = new_trainer().validate(Line(), {"a": [torch.zeros(2, 1)], "b": [torch.zeros(2, 1)]})
    assert [list(each) for each in results] == [["val_loss/dataloader_idx_0"], ["val_loss/dataloader_idx_1"]]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [([1, 3], 0, 0)]),
        ("max_size", [([1, 3], 0, 0), ([2, None], 1, 0)]),
        ("max_size_cycle", [([1, 3], 0, 0), ([2, 3], 1, 0)]),
        ("sequential", [(1, 0, 0), (2, 1, 0), (3, 0, 1)]),
    ],
)
def test_evaluations_read_a_combined_loader_by_its_mode(mode: str, expected: Any) -> None:
    module = Reader()
    new_trainer().test(module, CombinedLoader([loader(1, 2), loader(3)], mode))
    assert module.read == expected


def test_limits_of_evaluations_are_for_each_loader() -> None:
    module = Reader()
    new_trainer(limit_test_batches=1).test(module, {"a": loader(1, 2), "b": loader(3, 4)})
    assert [batch for batch, *_ in module.read] == [1, 3]


# ---------------------------------------------------------------- resuming


class Rows(Dataset[Tensor]):
    """Rows of random numbers, each with a number that is drawn when it is read."""

    def __init__(self, count: int) -> None:
        self.rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index] + 0.01 * torch.rand(())


class Sum(Model):
    """Trains on all that a batch holds."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        held = list(batch.values()) if isinstance(batch, dict) else batch if isinstance(batch, list) else [batch]
        return super().training_step(torch.cat([each for each in held if each is not None]), batch_idx)


def shuffled(count: int, **options: Any) -> Any:
    return DataLoader(Rows(count), 4, shuffle=True, **options)


def sharing(kind: Any) -> Any:
    draws = torch.Generator().manual_seed(3)
    return {"a": kind(Rows(18), 4, shuffle=True, generator=draws), "b": kind(Rows(8), 4, shuffle=True, generator=draws)}


@STATEFUL
@pytest.mark.parametrize(
    "make",
    [
        lambda: {"a": shuffled(18), "b": shuffled(8)},
        lambda: [shuffled(8), shuffled(18)],
        lambda: sharing(DataLoader),
        lambda: sharing(StatefulDataLoader),
        lambda: {"a": StatefulDataLoader(Rows(18), 4, shuffle=True), "b": StatefulDataLoader(Rows(4), 4, shuffle=True)},
        lambda: {"a": shuffled(18), "b": [torch.ones(2, 3), torch.ones(3, 3)]},
        lambda: CombinedLoader([shuffled(18), shuffled(8)], "min_size"),
        lambda: CombinedLoader([shuffled(18), shuffled(8)], "max_size"),
        lambda: CombinedLoader([shuffled(12), shuffled(8)], "sequential"),
        lambda: CombinedLoader([StatefulDataLoader(Rows(12), 4, shuffle=True), shuffled(8)], "sequential"),
        lambda: CombinedLoader([StatefulDataLoader(Rows(8), 4, shuffle=True), shuffled(16)], "max_size"),
    ],
    ids=[
        "dict",
        "list",
        "shared",
        "stateful shared",
        "stateful",
        "lists",
        "min",
        "max",
        "one by one",
        "stateful one",
        "stateful max",
    ],
)
def test_a_run_over_several_loaders_resumes_at_each_safe_point(tmp_path: Path, make: Any) -> None:
    def build() -> Any:
        return Sum(), make(), shuffled(4), [GradientAccumulation(2), LRSchedulerStepping()], {"max_epochs": 2}

    check_all_safe_points(build, tmp_path)


@pytest.mark.filterwarnings("ignore:.*keeps no position", "ignore:Parts of the batch have the sizes")
def test_a_run_over_several_loaders_without_a_length_resumes(tmp_path: Path) -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            yield from Rows(8).rows

    def build() -> Any:
        return Sum(), {"a": shuffled(14), "b": DataLoader(Stream(), 4)}, None, [LRSchedulerStepping()], {"max_epochs": 2}

    assert check_all_safe_points(build, tmp_path) == 8


@STATEFUL
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_of_several_loaders_are_seeded_for_each_batch(tmp_path: Path, persistent: bool) -> None:
    def build() -> Any:
        loaders = {name: shuffled(n, num_workers=1, persistent_workers=persistent) for name, n in (("a", 12), ("b", 4))}
        return Sum(), loaders, None, [LRSchedulerStepping()], {"max_epochs": 2}

    check_all_safe_points(build, tmp_path, every=3)


def test_worker_seeds_differ_between_loaders_and_passes() -> None:
    drawn: list[list[float]] = []
    module = losing(lambda batch: drawn.append([float(each) for each in batch]))
    train(module, [DataLoader(Draws(4), None, num_workers=1), DataLoader(Draws(2), None, num_workers=1)])
    flat = [x for pair in drawn for x in pair]
    assert len(drawn) == 4 and len(set(flat)) == 8


class Draws(Dataset[Tensor]):
    """Samples that are drawn when they are read."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(())


def test_resuming_with_another_number_of_loaders_is_refused(tmp_path: Path) -> None:
    trainer = new_trainer(max_epochs=1)
    trainer.fit(Both(3), {"long": shuffled(8), "short": shuffled(4)})
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    three = {"long": shuffled(8), "short": shuffled(4), "more": shuffled(4)}
    with pytest.raises(MisconfigurationError, match="position in 2 training loaders, and the run has 3"):
        new_trainer(max_epochs=2).fit(Both(3), three, ckpt_path=str(tmp_path / "two.ckpt"))


# ---------------------------------------------------------------- listeners


def test_each_loader_is_prepared_by_itself_and_none_is_changed() -> None:
    prepared: list[Any] = []

    def first_only(trainer: Any, event: Any) -> None:
        prepared.append((event.stage, event.dataloader_idx))
        event.loader = list(event.loader)[:1]

    combined = CombinedLoader({"a": loader(1, 2), "b": loader(3, 4)}, "min_size")
    module = Reader()
    train(module, combined, On(prepare_loader=first_only), val=[loader(5), loader(6)])
    assert prepared == [("train", 0), ("train", 1), ("validation", 0), ("validation", 1)]
    assert module.read[0] == {"a": 1, "b": 3}
    assert len(combined) == 2


def test_each_process_reads_its_share_of_each_loader() -> None:
    def trained(loaders: Any) -> tuple[list[Any], DataParallel]:
        parallel = DataParallel(shares_data=True, timeout=None)
        parallel._processes = FakeProcesses(2, 1)  # type: ignore[assignment]
        module = Reader()
        keep = On(train_end=lambda trainer, event: states.append(parallel.state_dict()))
        train(module, loaders, parallel, keep, max_epochs=2)
        return module.read, parallel

    states: list[Any] = []
    read, parallel = trained({"a": loader(1, 2, 3, 4), "b": loader(5, 6)})
    assert read == 2 * [{"a": 2, "b": 6}, {"a": 4, "b": 6}]
    assert [type(seed) for seed in states[0]["seeds"]] == [int, int]
    parallel.load_state_dict({"seed": None})  # of an older checkpoint


def test_samplers_of_all_loaders_are_told_the_epoch() -> None:
    class Told(torch.utils.data.SequentialSampler):
        def __init__(self, source: Any) -> None:
            super().__init__(source)
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    samplers = [Told(range(2)), Told(range(3))]
    loaders = [DataLoader(Rows(3), None, sampler=sampler) for sampler in samplers]
    train(losing(type), loaders, max_epochs=2)
    assert [sampler.epochs for sampler in samplers] == [[0, 1], [0, 1]]


def test_a_deque_of_batches_is_a_loader_among_others() -> None:
    assert read({"a": deque(batches(2)), "b": loader(3)}) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]
