"""Read the sharded tensors of earlier versions: a folder that ``torch.distributed.checkpoint`` wrote, beside the checkpoint.

The index of such a folder is a pickle, which may run code when it is unpickled. Here nothing is unpickled: its instructions
are read one by one, and only those that make plain values are followed. Of classes and functions only the names are read.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eventtrain.callbacks.distributed.sharded_tensors import Box, StoredTensor, check_boxes
from eventtrain.checkpoint import storage
from eventtrain.errors import MisconfigurationError
from eventtrain.paths import AnyPath

INDEX = "torch.distributed.checkpoint.metadata."
STORAGE = "torch.distributed.checkpoint.filesystem._StorageInfo"
PARTS = (
    "Metadata TensorStorageMetadata BytesStorageMetadata TensorProperties ChunkStorageMetadata MetadataIndex StorageMeta "
    "_MEM_FORMAT_ENCODING"
)
KNOWN = {
    *(INDEX + name for name in PARTS.split()),
    STORAGE,
    "torch.Size",
    "torch.serialization._get_layout",
    *(f"{module}.{name}Path" for module in ("pathlib", "pathlib._local") for name in ("Posix", "Windows", "PurePosix")),
    *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}
"""The names of the classes, functions and types that an index consists of."""
FILE = re.compile(r"__\d+_\d+\.distcp")


def tensors(index: dict[str, Any], path: AnyPath, root: AnyPath) -> Iterator[StoredTensor]:
    """Yield the sharded tensors of a checkpoint of an earlier version.

    Args:
        index: The checkpoint's value ``"shards"``.
        path: The checkpoint's file.
        root: The directory of the trainer.

    Raises:
        MisconfigurationError: If there is no such folder.
        ValueError: If the index is not of the known shape.
    """
    name, places = index["name"], index["tensors"]
    if type(name) is not str or Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"the name of their folder is {name!r}, and may not be a path")
    # Nothing is read from elsewhere: the path that the checkpoint names is not ours.
    around = [path.parent / "shards", path.parent / "checkpoints" / "shards", root / "checkpoints" / "shards"]
    candidates = [each / name for each in around if isinstance(each, Path)]
    folder = next((each for each in candidates if each.is_dir()), None)
    if folder is None:
        places_tried = " nor in ".join(str(each) for each in dict.fromkeys(candidates))
        raise MisconfigurationError(
            f"The sharded tensors of the checkpoint {path} are neither in {places_tried}. An earlier version wrote them to a "
            f"folder named {name}. Copy that folder to the first of these places."
        )
    described, stored = read_index((folder / ".metadata").read_bytes())
    for key, tensor in described.items():
        if key in places:
            place, dim = places[key]
            yield stored_tensor(folder, tensor, stored, tuple(place), None, dim)
        elif gradient := re.fullmatch(r"(\d+)\.(.+)", key):
            yield stored_tensor(folder, tensor, stored, (gradient[2],), int(gradient[1]), None)
    if missing := places.keys() - described.keys():
        raise ValueError(f"the index of {folder} lacks the tensor {min(missing)!r}")


@dataclass(frozen=True)
class Described:
    """A tensor as an index describes it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]


Stored = dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]
"""For the key and offsets of each part: its file, and the place and number of its bytes."""


def stored_tensor(
    folder: Path, described: Described, stored: Stored, place: tuple[Any, ...], owner: int | None, dim: int | None
) -> StoredTensor:
    """Return a tensor whose parts can be read from a folder."""
    check_boxes(described.shape, described.boxes)
    parts: list[tuple[Box, Callable[[Box], Tensor]]] = []
    for box in described.boxes:
        file, offset, length = stored[described.key, box.offsets]
        if box.count * described.dtype.itemsize > length:
            raise ValueError(f"{described.key!r} has a part of shape {box.sizes} in {length} bytes")
        parts.append((box, partial(read_part, folder / file, offset, length, box, described.dtype)))
    return StoredTensor(place, owner, dim, described.shape, described.dtype, parts)


def read_part(file: Path, offset: int, length: int, box: Box, dtype: torch.dtype, common: Box) -> Tensor:
    """Read a part of a tensor, and return a part of that.

    Raises:
        ValueError: If the file holds something else at this place, or is a link.
    """
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with open(handle, "rb") as opened:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or offset + length > status.st_size:
            raise ValueError(f"{file.name} is no file of at least {offset + length} bytes")
        opened.seek(offset)
        content = io.BytesIO(opened.read(length))
    storage.verify_checksums(content)
    tensor = torch.load(content, map_location="cpu", weights_only=True)
    if type(tensor) is not Tensor or tensor.dtype != dtype or tuple(tensor.shape) != box.sizes:
        raise ValueError(f"{file.name} does not hold the part of shape {box.sizes} that its index names at byte {offset}")
    return common.of(tensor, box)


# ------------------------------------------------------------------ the index, without unpickling it


class Name(str):
    """The name of a class, function or type in an index."""


@dataclass(eq=False)
class Record:
    """An object as an index describes it: the name of its class, the arguments, and its state."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


MARK = object()
CONSTANTS: dict[str, Callable[[], Any]] = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
CONSTANTS |= {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
COUNTS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
"""The instructions that make a constant, and those that make a tuple of the last values."""


def read_values(content: bytes) -> Any:
    """Return the value that a pickle describes, with a :class:`Record` for each object.

    Raises:
        ValueError: If it has an instruction that no index has, or names a class that is not part of one.
    """
    stack: list[Any] = []
    memo: list[Any] = []

    def popped() -> list[Any]:
        position = len(stack) - 1 - stack[::-1].index(MARK)
        values = stack[position + 1 :]
        del stack[position:]
        return values

    for code, argument, _ in pickletools.genops(content):
        name = code.name
        if name in ("SHORT_BINUNICODE", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"):
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name in COUNTS:
            stack[-COUNTS[name] :] = [tuple(stack[-COUNTS[name] :])]
        elif name == "TUPLE":
            stack.append(tuple(popped()))
        elif name == "MARK":
            stack.append(MARK)
        elif name == "MEMOIZE":
            memo.append(stack[-1])
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument or 0])
        elif name in ("APPEND", "APPENDS"):
            values = popped() if name == "APPENDS" else [stack.pop()]
            extend(stack[-1], values)
        elif name in ("SETITEM", "SETITEMS"):
            values = popped() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            update(stack[-1], values)
        elif name == "STACK_GLOBAL":
            stack[-2:] = [known(*stack[-2:])]
        elif name in ("NEWOBJ", "REDUCE"):
            stack[-2:] = [made(*stack[-2:])]
        elif name == "BUILD":
            build(stack[-2], stack.pop())
        elif name == "STOP":
            (value,) = stack
            return value
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"the index has the instruction {name}, which is not part of an index")
    raise ValueError("the index has no end")


def extend(target: Any, values: list[Any]) -> None:
    """Add values to a list."""
    if type(target) is not list:
        raise ValueError("the index adds values to something that is no list")
    target.extend(values)


def update(target: Any, values: list[Any]) -> None:
    """Add keys and values, one after the other, to a dict."""
    if type(target) is not dict or len(values) % 2:
        raise ValueError("the index adds items to something that is no dict")
    for key, value in zip(values[::2], values[1::2], strict=True):
        if type(key) not in (str, Record) or key in target:
            raise ValueError("the index has a key twice, or one that is no text")
        target[key] = value


def known(module: Any, name: Any) -> Name:
    """Return the name of a class, function or type.

    Raises:
        ValueError: If it is not part of an index.
    """
    if f"{module}.{name}" not in KNOWN:
        raise ValueError(f"the index names {module}.{name}")
    return Name(f"{module}.{name}")


def made(name: Any, arguments: Any) -> Record:
    """Return the record of an object that a class or function would make."""
    if type(name) is not Name or type(arguments) is not tuple:
        raise ValueError("the index calls something that is no class")
    return Record(name, arguments)


def build(record: Any, state: Any) -> None:
    """Give a record its state."""
    if type(record) is not Record or record.state is not None or type(state) not in (dict, tuple):
        raise ValueError("the index sets attributes of something that is no object of an index")
    record.state = state


# ------------------------------------------------------------------ the known shape


def read_index(content: bytes) -> tuple[dict[str, Described], Stored]:
    """Return the tensors that an index describes, and the places of their parts. Values that are no tensors are left out.

    Raises:
        ValueError: If the index is not of the known shape.
    """
    index = fields(read_values(content), INDEX + "Metadata")
    described = {}
    for key, value in items(index["state_dict_metadata"]):
        if not (type(value) is Record and value.name == INDEX + "BytesStorageMetadata"):
            described[text(key)] = describe(text(key), fields(value, INDEX + "TensorStorageMetadata"))
    stored: Stored = {}
    for key, value in items(index["storage_data"]):
        place, info = fields(key, INDEX + "MetadataIndex"), fields(value, STORAGE)
        if place.get("offset") is None:  # of a value that is no tensor
            continue
        where = text(place["fqn"]), size(place["offset"])
        file = text(info["relative_path"])
        if where in stored or FILE.fullmatch(file) is None or info.get("transform_descriptors"):
            raise ValueError(f"the index names a part of {where[0]!r} twice, or in a file {file!r} that torch would not write")
        stored[where] = file, whole(info["offset"]), whole(info["length"])
    return described, stored


def describe(key: str, value: dict[str, Any]) -> Described:
    """Return a tensor as the index describes it."""
    properties = value["properties"]
    if type(properties) is not Record or type(properties.state) is not tuple or type(properties.state[0]) is not Name:
        raise ValueError(f"the index has no type for {key!r}")
    dtype = getattr(torch, properties.state[0].removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or type(value["chunks"]) is not list:
        raise ValueError(f"the index has no type, or no parts, for {key!r}")
    boxes = []
    for chunk in value["chunks"]:
        chunk = fields(chunk, INDEX + "ChunkStorageMetadata")
        boxes.append(Box(size(chunk["offsets"]), size(chunk["sizes"])))
    return Described(key, size(value["size"]), dtype, tuple(box for box in boxes if box.count))


def fields(value: Any, name: str) -> dict[str, Any]:
    """Return the attributes of an object of a class.

    Raises:
        ValueError: If it is of another class.
    """
    if type(value) is not Record or value.name != name or type(value.state) is not dict:
        raise ValueError(f"the index has no {name.rpartition('.')[2]} where one belongs")
    return value.state


def items(value: Any) -> Any:
    """Return the items of a dict."""
    if type(value) is not dict:
        raise ValueError("the index has no dict where one belongs")
    return value.items()


def text(value: Any) -> str:
    """Return a value that is a text."""
    if type(value) is not str:
        raise ValueError("the index has no text where one belongs")
    return value


def whole(value: Any) -> int:
    """Return a value that is a whole number, and not negative."""
    if type(value) is not int or value < 0:
        raise ValueError("the index has no whole number where one belongs")
    return value


def size(value: Any) -> tuple[int, ...]:
    """Return the numbers of a shape or of offsets."""
    if type(value) is not Record or value.name != "torch.Size" or len(value.arguments) != 1:
        raise ValueError("the index has no shape where one belongs")
    (numbers,) = value.arguments
    if type(numbers) not in (tuple, list):
        raise ValueError("the index has no shape where one belongs")
    return tuple(whole(number) for number in numbers)
