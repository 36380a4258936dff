"""Batches of classes that people write move to a device, without a call of their constructors."""

from __future__ import annotations

import argparse
import types
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from eventtrain import LightningModule, MisconfigurationError
from eventtrain.data.device import move_to_device
from tests.kit import Line, new_trainer

META = torch.device("meta")
X = torch.ones(2)


class Groups(defaultdict[str, list[Tensor]]):
    def __init__(self) -> None:
        super().__init__(list)


class Graph(dict[str, Any]):
    """A dict whose constructor takes other things than its items, with an attribute beside them."""

    def __init__(self, nodes: Tensor, *, name: str) -> None:
        super().__init__(nodes=nodes)
        self.name = name
        self.degrees = nodes.clone()
        self.nodes = self["nodes"]


class Attributes(dict[str, Any]):
    """The dict that is its own ``__dict__``."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__ = self


class Sealed(dict[str, Any]):
    """A dict that refuses writes."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("sealed")


class Mirrored(OrderedDict[str, Any]):
    """Holds each item as an attribute too, as the outputs of transformers do."""

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self["first"] = first

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Words(Counter[str]):
    def __init__(self, text: str) -> None:
        super().__init__(text.split())


class Named(list[Tensor]):
    def __init__(self, name: str, *tensors: Tensor) -> None:
        super().__init__(tensors)
        self.name = name
        self.mask = X.bool()


class Pair(tuple[Tensor, Tensor]):
    def __new__(cls, left: Tensor, right: Tensor) -> Pair:
        pair = super().__new__(cls, (left, right))
        pair.note = "made"
        return pair

    note: str


Point = namedtuple("Point", ["x", "label"])


class Shifted(Point):
    def __new__(cls, x: Tensor) -> Shifted:
        return super().__new__(cls, x + 1, "shifted")


class Stack(deque[Tensor]):
    def __init__(self, size: int) -> None:
        super().__init__([X], size)


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    scale: InitVar[float]
    doubled: Tensor = field(init=False)
    unset: Tensor = field(init=False, repr=False)

    def __post_init__(self, scale: float) -> None:
        object.__setattr__(self, "doubled", self.x * scale)

    @cached_property
    def total(self) -> Tensor:
        return self.x.sum()


@dataclass(frozen=True, slots=True)
class Slotted:
    x: Tensor
    name: str = "slotted"


@dataclass
class Inherited(Graph):
    """A dataclass that is a dict."""

    def __init__(self, nodes: Tensor) -> None:
        super().__init__(nodes, name="both")


@attrs.frozen
class Attrs:
    x: Tensor
    ys: list[Tensor] = attrs.field(kw_only=True)
    name: str = "attrs"


@attrs.define(slots=False)
class AttrsWithDict:
    x: Tensor


class Encoding(UserDict[str, Any]):
    """A mapping with ``to``, as tokenizers of transformers return it."""

    def __init__(self, data: dict[str, Any], n_sequences: int) -> None:
        super().__init__(data)
        self.n_sequences = n_sequences

    def to(self, device: Any, *, non_blocking: bool = False) -> Encoding:
        self.data = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in self.data.items()}
        return self


class ByName:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, dtype: Any = None, device: Any = None) -> ByName:
        assert dtype is None
        return ByName(self.x.to(device))


class ByKeywordOnly(ByName):
    def to(self, *, device: Any) -> ByName:  # type: ignore[override]
        return ByKeywordOnly(self.x.to(device))


class InPlace(ByName):
    def to(self, device: Any) -> None:  # type: ignore[override]
        self.x = self.x.to(device)


@dataclass
class Exports:
    """Its ``to`` has nothing to do with devices."""

    x: Tensor

    def to(self, path: str, format: str) -> None:
        raise AssertionError("this is not a move")


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, its items and its attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PackedSequence):
        yield value.data
    elif not isinstance(value, (str, type, types.FunctionType, np.ndarray)):
        parts = list(value.values()) if isinstance(value, Mapping) else list(value) if hasattr(value, "__iter__") else []
        names = getattr(value, "__slots__", ())
        parts += [getattr(value, name) for name in names if hasattr(value, name) and name != "__weakref__"]
        for part in [*parts, *(vars(value).values() if hasattr(value, "__dict__") and vars(value) is not value else ())]:
            yield from tensors(part)


def groups() -> Groups:
    made = Groups()
    made["a"].append(X)
    return made


BATCHES: dict[str, Any] = {
    "packed sequence": lambda: pack_sequence([torch.ones(3, 1), torch.ones(2, 1)]),
    "defaultdict": lambda: defaultdict(list, x=[X]),
    "defaultdict subclass": groups,
    "ordered dict": lambda: OrderedDict(x=X, y=X),
    "dict with attributes": lambda: Graph(X, name="graph"),
    "dict that is its __dict__": lambda: Attributes(x=X, size=3),
    "dict that refuses writes": lambda: Sealed(x=X),
    "dict that mirrors its items": lambda: Mirrored(X),
    "counter of tensors": lambda: Counter({"x": X}),
    "list subclass": lambda: Named("list", X, X),
    "tuple subclass": lambda: Pair(X, X),
    "named tuple with a constructor": lambda: Shifted(X),
    "result of torch.max": lambda: torch.ones(2, 2).max(0),
    "deque": lambda: deque([X, X], maxlen=2),
    "deque subclass": lambda: Stack(1),
    "user dict": lambda: UserDict(x=X),
    "user list": lambda: UserList([X]),
    "frozen dataclass": lambda: Frozen(X, 2.0),
    "slotted dataclass": lambda: Slotted(X),
    "dict that is a dataclass": lambda: Inherited(X),
    "attrs": lambda: Attrs(X, ys=[X]),
    "attrs without slots": lambda: AttrsWithDict(X),
    "namespace": lambda: types.SimpleNamespace(x=X, name="namespace"),
    "argparse": lambda: argparse.Namespace(x=X, name="namespace"),
    "encoding": lambda: Encoding({"ids": X, "text": "words"}, 1),
    "to(dtype, device)": lambda: ByName(X),
    "to(*, device)": lambda: ByKeywordOnly(X),
    "to that returns nothing": lambda: InPlace(X),
    "to of another kind": lambda: Exports(X),
    "nested": lambda: {"rows": [Graph(X, name="inner"), (Slotted(X), None)], "n": 3},
}


@pytest.mark.parametrize("kind", BATCHES)
def test_every_tensor_moves_and_the_class_stays(kind: str) -> None:
    batch = BATCHES[kind]()
    number = len(list(tensors(batch)))
    moved = move_to_device(batch, META)
    assert type(moved) is type(batch)
    assert number and [tensor.device.type for tensor in tensors(moved)] == ["meta"] * number
    if kind not in ("encoding", "to that returns nothing"):  # these move themselves in place
        assert all(tensor.device.type == "cpu" for tensor in tensors(batch)), "the original stays where it is"


@pytest.mark.parametrize("kind", [kind for kind in BATCHES if not kind.startswith("to(")])
def test_a_batch_that_is_there_is_the_same_object(kind: str) -> None:
    batch = BATCHES[kind]()
    assert move_to_device(batch, torch.device("cpu")) is batch


def test_the_rest_of_an_object_is_kept() -> None:
    graph = move_to_device(Graph(X, name="graph"), META)
    assert graph.name == "graph" and list(graph) == ["nodes"]
    assert graph.nodes is graph["nodes"], "an attribute that is an item stays one"
    mirrored = move_to_device(Mirrored(X), META)
    assert mirrored.first is mirrored["first"]
    attributes = move_to_device(Attributes(x=X, size=3), META)
    attributes["new"] = 1
    assert attributes.x is attributes["x"] and attributes.new == 1 and attributes.size == 3
    assert move_to_device(groups(), META)["unknown"] == []
    assert move_to_device(deque([X], maxlen=1), META).maxlen == 1
    assert move_to_device(Named("list", X), META).name == "list"
    assert move_to_device(Pair(X, X), META).note == "made"
    assert move_to_device(Shifted(X), META).label == "shifted"
    packed = move_to_device(pack_sequence([torch.ones(3, 1), torch.ones(2, 1)]), META)
    assert packed.batch_sizes.tolist() == [2, 2, 1]
    ordered = OrderedDict(b=X, a=X)
    ordered.move_to_end("b")
    assert list(move_to_device(ordered, META)) == ["a", "b"]


def test_a_frozen_dataclass_keeps_its_fields_and_what_it_has_computed() -> None:
    sample = Frozen(X, 2.0)
    assert sample.total == 2
    moved = move_to_device(sample, META)
    assert moved.doubled.device.type == moved.total.device.type == "meta"
    assert not hasattr(moved, "unset")


@pytest.mark.parametrize(
    "batch",
    [
        np.ones(2), Words("a b a"), {"a", "b"}, range(3), bytearray(b"x"), torch.Size([1]), Slotted, [1, "a", None],
        {"name": "a"}, object(), torch.float32, Counter("ab"), frozenset(), (),
    ],
)  # fmt: skip
def test_a_batch_without_tensors_is_the_same_object(batch: Any) -> None:
    assert move_to_device(batch, META) is batch


class Columns(MutableMapping[str, Tensor]):
    """A mapping of a user's own, over a dict that it holds."""

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        self.columns = dict(columns)

    def __getitem__(self, key: str) -> Tensor:
        return self.columns[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.columns[key] = value

    def __delitem__(self, key: str) -> None:
        del self.columns[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


class Rows(Sequence[Tensor]):
    def __init__(self, rows: Sequence[Tensor]) -> None:
        self.rows = list(rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


@pytest.mark.parametrize(
    "batch",
    [Columns({"x": X}), Rows([X, X]), types.MappingProxyType({"x": X}), ChainMap({"x": X}, {"y": X})],
    ids=lambda batch: type(batch).__name__,
)
def test_a_collection_of_ones_own_is_built_from_its_items(batch: Any) -> None:
    moved = move_to_device(batch, META)
    assert type(moved) is type(batch)
    values = list(moved.values()) if isinstance(moved, Mapping) else list(moved)
    assert {value.device.type for value in values} == {"meta"}
    assert {value.device.type for value in (batch.values() if isinstance(batch, Mapping) else batch)} == {"cpu"}


class TwoArguments(Columns):
    def __init__(self, columns: Mapping[str, Tensor], name: str) -> None:
        super().__init__(columns)


def test_a_collection_that_cannot_be_built_is_refused_by_name() -> None:
    with pytest.raises(MisconfigurationError, match=r"TwoArguments.*'name'.*to\(self, device\).*transfer_batch_to_device"):
        move_to_device([TwoArguments({"x": X}, "a")], META)


# ------------------------------------------------------------------ the type of the module

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Takes(Line):
    """Notes the types of the batches that its steps get."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[Any] = []

    def note(self, batch: Any) -> Tensor:
        self.types.append([tensor.dtype for tensor in tensors(batch)])
        output: Tensor = self(next(tensors(batch)))
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.note(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note(batch)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.note(batch)


SAMPLES = [{"x": torch.ones(2, 1), "label": torch.tensor([1]), "mask": torch.tensor([True]), "rows": [torch.zeros(1)]}]


@pytest.mark.parametrize("name", HALVES)
def test_a_module_that_is_not_float32_gets_batches_of_its_type(name: str) -> None:
    dtype = HALVES[name]
    module = Takes().to(dtype)
    new_trainer().fit(module, SAMPLES, SAMPLES)
    for stage in ("validate", "test", "predict"):
        getattr(new_trainer(), stage)(module, SAMPLES)
    assert module.types == [[dtype, torch.int64, torch.bool, dtype]] * 5
    assert next(tensors(SAMPLES)).dtype is torch.float32


def test_a_float32_module_and_one_of_several_types_get_batches_as_they_are() -> None:
    doubles = [{"x": torch.ones(2, 1), "y": torch.ones(1, dtype=torch.float64), "z": torch.ones(1, dtype=torch.float16)}]
    expected = [[torch.float32, torch.float64, torch.float16]]
    plain, mixed = Takes(), Takes()
    mixed.other = nn.Linear(1, 1).half()
    for module in (plain, mixed):
        new_trainer().fit(module, doubles)
        assert module.types == expected


def test_a_module_that_is_cast_in_setup_counts_and_hooks_may_make_floats() -> None:
    class Images(Takes):
        def setup(self, stage: str) -> None:
            self.bfloat16()

        def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            return batch.float() / 255

    module = Images()
    new_trainer().predict(module, [torch.full((2, 1), 255, dtype=torch.uint8)])
    assert module.types == [[torch.bfloat16]]


def test_a_packed_sequence_is_cast_too() -> None:
    class Recurrent(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(1, 1).double()

        def predict_step(self, batch: PackedSequence, batch_idx: int) -> Any:
            return self.layer(batch)[1].dtype

    packed = pack_sequence([torch.ones(3, 1), torch.ones(2, 1)])
    assert new_trainer().predict(Recurrent(), [packed]) == [torch.float64]


def test_a_float16_module_trains_as_a_loop_written_by_hand_does() -> None:
    torch.manual_seed(0)
    data = list(torch.randn(4, 8, 1))
    module, by_hand = Line().bfloat16(), Line().bfloat16()
    by_hand.load_state_dict(module.state_dict())
    new_trainer(max_epochs=2).fit(module, data)
    optimizer = by_hand.configure_optimizers()
    for batch in data * 2:
        optimizer.zero_grad()
        by_hand(batch.bfloat16()).square().mean().backward()
        optimizer.step()
    assert torch.equal(module.layer.weight, by_hand.layer.weight)
