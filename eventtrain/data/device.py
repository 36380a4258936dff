"""The device of a run, and the transfer of a batch to it."""

from __future__ import annotations

import dataclasses
import inspect
from argparse import Namespace
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from eventtrain.errors import MisconfigurationError

PLAIN = (str, bytes, bytearray, memoryview, range, int, float, type, type(None))
"""The types of values that hold no tensors."""

BUILT_IN = (OrderedDict, dict, list, deque, tuple)
"""The collections whose subclasses are rebuilt without their own ``__init__``."""

RECORDS = (UserDict, UserList, SimpleNamespace, Namespace)
"""The classes, besides dataclasses and those of attrs, whose objects consist of their attributes."""


def move_to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch to a device.

    Args:
        batch: A tensor, an object with ``to(device)``, or mappings, sequences, dataclasses and attrs classes of them.
        device: The device.

    Returns:
        The moved batch, of the same class; the same object if everything was there already.

    Raises:
        MisconfigurationError: If a mapping or sequence of a user's class cannot be built from its items.

    Example:
        >>> move_to_device({"x": torch.ones(2), "name": "a"}, torch.device("meta"))
        {'x': tensor(..., device='meta', size=(2,)), 'name': 'a'}
    """
    if isinstance(batch, Tensor):
        # Copies from a device are not ordered with the host's reads, so only copies to one may overlap.
        return batch if batch.device == device else batch.to(device, non_blocking=device.type != "cpu")
    kind: Any = type(batch)
    argument = _device_argument(kind)
    if kind is list or kind is tuple or kind is dict or (argument is not None and isinstance(batch, Mapping)):
        for item in batch if kind is list or kind is tuple else batch.values():
            if not isinstance(item, Tensor) or item.device != device:
                break
        else:
            return batch  # the usual batch, already there: no recursion, 1 us less
    if argument is not None:
        moved = batch.to(device) if argument == "first" else batch.to(device=device)
        return batch if moved is None else moved  # without a result it moved itself
    return _mapped(batch, partial(move_to_device, device=device))


def cast_floats(batch: Any, dtype: torch.dtype) -> Any:
    """Convert the floating-point tensors of a batch to a type.

    Args:
        batch: A tensor, or collections and records of tensors, as for :func:`move_to_device`.
        dtype: The type.

    Returns:
        The converted batch; the same object if it had the type already.

    Example:
        >>> cast_floats([torch.ones(1), torch.arange(1)], torch.float16)
        [tensor([1.], dtype=torch.float16), tensor([0])]
    """
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    return _mapped(batch, partial(cast_floats, dtype=dtype))


def transfer_to(module: nn.Module, device: torch.device, move: Callable[[Any], Any] | None = None) -> Callable[[Any], Any]:
    """Return a function that transfers a batch to a module's device, and to its type if the module is not float32.

    Args:
        module: The module. If all its parameters are float16, bfloat16 or float64, floating-point tensors get that type.
        device: The device.
        move: The function that moves the batch; None for :func:`move_to_device`.
    """
    transfer = move or partial(move_to_device, device=device)
    types = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    dtype = types.pop() if len(types) == 1 else None
    if dtype not in (torch.float16, torch.bfloat16, torch.float64):
        return transfer
    return lambda batch: cast_floats(transfer(batch), dtype)


@lru_cache(maxsize=256)
def _device_argument(kind: type) -> str | None:
    """Return how ``to`` of a class takes a device: by ``"name"``, as the ``"first"`` argument, or None for not at all."""
    to = getattr(kind, "to", None)
    if not callable(to):
        return None
    try:
        signature = inspect.signature(to)
        signature.bind(None, device=None) if "device" in signature.parameters else signature.bind(None, None)
    except TypeError:
        return None  # it does something else
    except ValueError:  # a function in C
        return "first"
    return "name" if "device" in signature.parameters else "first"


def _mapped(batch: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the parts of a collection or record, and rebuild it if one of them changes."""
    if isinstance(batch, PLAIN):
        return batch
    built_in, of_items = isinstance(batch, BUILT_IN), isinstance(batch, (Mapping, Sequence))
    attrs = hasattr(type(batch), "__attrs_attrs__")
    record = not built_in and (dataclasses.is_dataclass(batch) or attrs or isinstance(batch, RECORDS))
    if not (record or of_items):
        return batch
    items = [] if record else list(batch.values() if isinstance(batch, Mapping) else batch)
    attributes = _attributes(batch) if built_in or record else {}
    parts = [*items, *attributes.values()]
    new = {id(part): function(part) for part in parts}
    if all(new[id(part)] is part for part in parts):
        return batch
    items = [new[id(item)] for item in items]
    attributes = {name: new[id(value)] for name, value in attributes.items()}
    return _rebuilt(batch, dict(zip(batch, items, strict=False)) if isinstance(batch, Mapping) else items, attributes)


def _attributes(batch: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots too."""
    if getattr(batch, "__dict__", None) is batch:
        return {"__dict__": None}
    state = object.__getstate__(batch)
    plain, slots = state if isinstance(state, tuple) else (state, None)
    factory = {"default_factory": batch.default_factory} if isinstance(batch, defaultdict) else {}
    return {**(plain or {}), **(slots or {}), **factory}


def _rebuilt(batch: Any, items: Any, attributes: Mapping[str, Any]) -> Any:
    """Return an object like a collection or record with other items and attributes."""
    kind: Any = type(batch)
    base: Any = next((base for base in BUILT_IN if isinstance(batch, base)), None)
    if hasattr(kind, "n_sequence_fields") or not (base or attributes):  # a named tuple in C, or a user's own collection
        try:
            return kind(items)
        except TypeError as error:
            raise MisconfigurationError(
                f"A batch holds a {kind.__name__}, which {kind.__name__}(items) does not build anew with tensors on another "
                f"device: {error}. Give it a method `to(self, device)`, or override transfer_batch_to_device."
            ) from error
    copied = tuple.__new__(kind, items) if base is tuple else kind.__new__(kind)
    for name, value in attributes.items():
        object.__setattr__(copied, name, copied if name == "__dict__" else value)  # a dict may be its own __dict__
    if base not in (tuple, None):
        base.__init__(copied, items, *([batch.maxlen] if base is deque else []))
    return copied


def resolve_device(device: Any) -> torch.device:
    """Return the device of a run.

    Args:
        device: ``"auto"`` for CUDA, else MPS, else the CPU; or a value that :class:`torch.device` takes.

    Raises:
        MisconfigurationError: If there is no such device.
    """
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    elif device == "gpu":
        raise MisconfigurationError("device='gpu': write 'cuda', 'mps', or 'auto' for whichever there is.")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise MisconfigurationError(
            f"device={device!r} is not a device. Write 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'."
        ) from error
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = resolved.index if resolved.index is not None else (torch.cuda.current_device() if count else 0)
        if index >= count:
            raise MisconfigurationError(f"device={device!r}: torch sees {count} CUDA devices. Write 'auto' or 'cpu'.")
        return torch.device("cuda", index)
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise MisconfigurationError("device='mps': torch sees no Apple GPU. Write 'auto' or 'cpu'.")
    return torch.device("mps", 0) if resolved.type == "mps" else resolved
