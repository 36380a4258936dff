"""Batches of any structure move to a device; the device ``meta`` stands in for a GPU."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from eventtrain.data.device import move_to_device

META = torch.device("meta")


class Pair(NamedTuple):
    x: Tensor
    name: str


@dataclass
class Sample:
    x: Tensor
    name: str
    size: int = field(init=False, default=1)


class Moves:
    """Has a method ``to``, as a batch of a library for graphs has."""

    def __init__(self, device: Any = "cpu") -> None:
        self.device = torch.device(device)

    def to(self, device: Any) -> Moves:
        return Moves(device)


class MovingMapping(UserDict[str, Tensor]):
    """A mapping that other arguments build than its fields, so that it has to move by its ``to``."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x=x)

    def to(self, device: Any) -> MovingMapping:
        return MovingMapping(self["x"].to(device))


def devices(batch: Any) -> set[str]:
    """Return the types of the devices of a batch's tensors."""
    if isinstance(batch, (Tensor, Moves)):
        return {batch.device.type}
    if isinstance(batch, Sample):
        return devices(batch.x)
    parts = batch.values() if hasattr(batch, "values") else batch if isinstance(batch, (list, tuple)) else ()
    return set().union(*map(devices, parts))


X = torch.ones(2)
BATCHES: dict[str, Any] = {
    "tensor": X,
    "list": [X, X],
    "tuple": (X, "name"),
    "nested": [X, {"x": (X, 3)}, None],
    "dict": {"x": X, "name": "name"},
    "mapping": OrderedDict(x=X),
    "mapping that moves": MovingMapping(X),
    "named tuple": Pair(X, "name"),
    "dataclass": Sample(X, "name"),
    "object that moves": Moves(),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_all_tensors_move_and_the_structure_stays(kind: str) -> None:
    moved = move_to_device(BATCHES[kind], META)
    assert type(moved) is type(BATCHES[kind])
    assert devices(moved) == {"meta"}
    assert devices(BATCHES[kind]) == {"cpu"}


@pytest.mark.parametrize("kind", ["tensor", "list", "tuple", "nested", "dict", "mapping", "mapping that moves"])
def test_a_batch_that_is_there_is_not_copied(kind: str) -> None:
    assert move_to_device(BATCHES[kind], torch.device("cpu")) is BATCHES[kind]


@pytest.mark.parametrize("batch", ["name", b"bytes", 3, 0.5, None, object(), Sample])
def test_other_values_stay_as_they_are(batch: Any) -> None:
    assert move_to_device(batch, META) is batch
