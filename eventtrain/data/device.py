"""The device of a run, and the transfer of a batch to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from eventtrain.errors import MisconfigurationError


def move_to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch to a device.

    Args:
        batch: A tensor, an object with ``to``, or mappings, lists, tuples and dataclasses of them.
        device: The device.

    Returns:
        The moved batch; the same object if everything was there already.
    """
    if isinstance(batch, Tensor):
        # Copies from a device are not ordered with the host's reads, so only copies to one may overlap.
        return batch if batch.device == device else batch.to(device, non_blocking=device.type != "cpu")
    kind = type(batch)
    if kind is list or kind is tuple:
        for item in batch:
            if not isinstance(item, Tensor) or item.device != device:
                break
        else:
            return batch  # the usual batch, already there: no recursion, 1 us less
        moved = [move_to_device(item, device) for item in batch]
        unchanged = all(new is old for new, old in zip(moved, batch, strict=True))
        return batch if unchanged else kind(moved)
    if isinstance(batch, (str, bytes, int, float, type(None))):
        return batch
    if isinstance(batch, Mapping):
        fields = {key: move_to_device(value, device) for key, value in batch.items()}
        if all(fields[key] is value for key, value in batch.items()):
            return batch
        return fields if kind is dict else _rebuilt(batch, device, lambda: kind(fields))
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return kind(*(move_to_device(item, device) for item in batch))
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [declared.name for declared in dataclasses.fields(batch) if declared.init]
        return dataclasses.replace(batch, **{name: move_to_device(getattr(batch, name), device) for name in names})
    return batch


def _rebuilt(batch: Any, device: torch.device, rebuild: Callable[[], Any]) -> Any:
    """Move a mapping of a user's class by its ``to`` if it has one, else rebuild it."""
    return batch.to(device) if callable(getattr(batch, "to", None)) else rebuild()


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
