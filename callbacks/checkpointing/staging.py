"""Copy the state of a run into the host's memory, from which a thread can write it while training continues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eventtrain.checkpoint.storage import Part


class Staging:
    """Copies checkpoints into memory that it reuses for the next one, because allocating takes longer than copying.

    A copy is valid until the next one. Tensors that share memory, such as tied weights or views, share it in the copy.
    Tensors on a GPU are copied into page-locked memory, all of them before it waits for the first.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, int, bool], Tensor] = {}  # by number, size in bytes, page-locked or not
        self._copied: dict[tuple[torch.device, int, int], Tensor] = {}  # by device, address and size of the source

    def copy(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of a checkpoint that shares no tensor and no container with the run.

        Args:
            content: The checkpoint: tensors and plain values in dicts, lists, tuples and sets.

        Returns:
            The copy, with tensors on the CPU.
        """
        self._copied.clear()
        copied: dict[str, Any] = self._copy(dict(content))
        for device in {device for device, *_ in self._copied if device.type != "cpu"}:
            torch.cuda.synchronize(device)
        used = {id(buffer) for buffer in self._copied.values()}
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if id(buffer) in used}
        return copied

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach())
        if isinstance(value, Part):
            return value.copied(self._copy_tensor)
        if isinstance(value, Mapping):
            copied = type(value)({self._copy(key): self._copy(item) for key, item in value.items()})  # type: ignore[call-arg]
            if type(value) is not dict:
                vars(copied).update(vars(value))
            return copied
        if type(value) in (list, tuple, set):
            return type(value)(self._copy(item) for item in value)
        return value  # immutable

    def _copy_tensor(self, tensor: Tensor) -> Tensor:
        plain = tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        if not plain or tensor.device.type not in ("cpu", "cuda"):
            return tensor.to("cpu", copy=True)
        storage = tensor.untyped_storage()
        source = (tensor.device, storage.data_ptr(), storage.nbytes())
        buffer = self._copied.get(source)
        if buffer is None:
            buffer = self._copied[source] = self._buffer(storage.nbytes(), page_locked=tensor.is_cuda)
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            buffer.copy_(whole, non_blocking=True)
        copied = torch.empty(0, dtype=tensor.dtype)
        return copied.set_(buffer.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())

    def _buffer(self, size: int, *, page_locked: bool) -> Tensor:
        key = (len(self._copied), size, page_locked)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(size, dtype=torch.uint8, pin_memory=page_locked)
        return self._buffers[key]
