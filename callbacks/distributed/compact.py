"""Send values between processes as plain numbers: their form, such as the names of logged values, travels only once."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEY = 16
"""The bytes that a message begins with: they identify the form of its numbers."""
MOST = 4096
"""The number of forms that are remembered."""
FLOATS = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


class Number(NamedTuple):
    """The place of a number in a form.

    Attributes:
        kind: ``"float"``, or the type of a scalar tensor.
    """

    kind: str


class NotPlainError(Exception):
    """A value is made of other things than numbers, texts, lists, tuples and dicts."""


class Forms:
    """The forms of values that all processes know.

    Each process knows the same forms, because all take part in each exchange.

    Example:
        >>> forms = Forms()
        >>> sent = []
        >>> def gather(content):
        ...     sent.append(len(content))
        ...     return [content]
        >>> [forms.exchange({"loss": torch.tensor(loss)}, gather)[0]["loss"].item() for loss in (0.5, 0.25)]
        [0.5, 0.25]
        >>> sent[0], len(sent), sent[2]  # the first value, its form, the second value
        (24, 3, 24)
    """

    def __init__(self) -> None:
        self._known: dict[bytes, Any] = {}

    def exchange(self, value: Any, gather: Callable[[bytes], list[bytes]]) -> list[Any]:
        """Return the values of all processes, with their tensors on the CPU.

        Args:
            value: The value of this process.
            gather: Returns the contents of all processes, by rank.
        """
        numbers: list[float] = []
        try:
            form = split(value, numbers)
            key = hashlib.blake2b(repr(form).encode(), digest_size=KEY).digest()
        except NotPlainError:
            form, key, numbers = value, bytes(KEY), []  # a key that no process ever knows
        contents = gather(key + struct.pack(f"<{len(numbers)}d", *numbers))
        keys = [content[:KEY] for content in contents]
        if all(each in self._known for each in keys):
            forms = [self._known[each] for each in keys]
        else:
            forms = [from_bytes(each) for each in gather(to_bytes(form))]
            if len(self._known) > MOST:
                self._known.clear()
            self._known.update((each, known) for each, known in zip(keys, forms, strict=True) if any(each))
        return [joined(form, content[KEY:]) for form, content in zip(forms, contents, strict=True)]


def split(value: Any, numbers: list[float]) -> Any:
    """Return the form of a value, and add its numbers to a list. Whole numbers belong to the form.

    Raises:
        NotPlainError: If the value has no such form.
    """
    if isinstance(value, Tensor) and value.ndim == 0 and str(value.dtype) in FLOATS:
        numbers.append(value.item())
        return Number(str(value.dtype))
    if type(value) is float:
        numbers.append(value)
        return Number("float")
    if type(value) is dict:
        return {split(key, numbers): split(each, numbers) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(split(each, numbers) for each in value)
    if type(value) in (str, int, bool, type(None)):
        return value
    raise NotPlainError


def joined(form: Any, content: bytes) -> Any:
    """Return the value of a form, with numbers in their places."""
    numbers = iter(struct.unpack(f"<{len(content) // 8}d", content))

    def fill(part: Any) -> Any:
        if isinstance(part, Number):
            number = next(numbers)
            return number if part.kind == "float" else torch.tensor(number, dtype=FLOATS[part.kind])
        if type(part) is dict:
            return {fill(key): fill(each) for key, each in part.items()}
        return type(part)(map(fill, part)) if type(part) in (list, tuple) else part

    return fill(form)


def to_bytes(value: Any) -> bytes:
    """Return a value in torch's format, whose tensors can be read on another device."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def from_bytes(content: bytes) -> Any:
    """Return the value that :func:`to_bytes` wrote, with its tensors on the CPU.

    It may hold any object, because it comes from a process of the same run.
    """
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
