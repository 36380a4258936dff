"""Seed the random number generators, save and restore their states, and isolate draws from them."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from eventtrain.errors import MisconfigurationError
from eventtrain.hints import explained


@explained
def seed_everything(seed: int) -> int:
    """Seed the generators of Python, NumPy and torch, on all devices.

    Args:
        seed: A whole number from 0 to 2**32 - 1, the range of NumPy.

    Returns:
        The seed.

    Raises:
        MisconfigurationError: If the seed is anything else.

    Example:
        >>> seed_everything(7)
        7
        >>> first = torch.rand(2)
        >>> _ = seed_everything(7)
        >>> torch.equal(torch.rand(2), first)
        True
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise MisconfigurationError(f"A seed is a whole number from 0 to {2**32 - 1}; it is {seed!r}.")
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    return seed


def rng_state() -> dict[str, Any]:
    """Return the states of the generators of Python, NumPy and torch, as values that a checkpoint can hold.

    Returns:
        The states by name: ``python``; ``torch``, of the CPU; ``cuda``, one for each GPU, and ``mps``, if they are in use;
        ``numpy``, if it is imported.
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": (version, torch.tensor(words), gauss), "torch": torch.get_rng_state()}
    if cuda_in_use():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    if "numpy" in sys.modules:
        name, key, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (name, torch.tensor(key.tolist()), *rest)
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the states of the generators.

    Args:
        state: The result of :func:`rng_state`. If it has more GPUs than there are now, those of the first are used.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        for index, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state, index)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    if "numpy" in state:
        import numpy

        name, key, *rest = state["numpy"]
        numpy.random.set_state((name, numpy.array(key.tolist(), dtype=numpy.uint32), *rest))


def seed_process(*parts: Any) -> None:
    """Seed the generators of this process for one piece of work, such as a batch in a data loading worker.

    Args:
        *parts: Numbers and strings that identify the work; different parts give different seeds.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=24).digest()
    random.seed(digest)
    # Only the generator of the CPU: a worker does not use a GPU.
    torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    if "numpy" in sys.modules:
        words = [int.from_bytes(digest[at : at + 4], "little") for at in range(8, 24, 4)]
        sys.modules["numpy"].random.seed(words)


@contextmanager
def isolated_rng() -> Generator[None, None, None]:
    """Restore the states of all generators at the end of a ``with`` block, also after an error."""
    python_state = random.getstate()
    numpy_random = sys.modules["numpy"].random if "numpy" in sys.modules else None
    numpy_state = numpy_random.get_state() if numpy_random else None
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda_in_use() else ()):
            yield
    finally:
        random.setstate(python_state)
        if numpy_random:
            numpy_random.set_state(numpy_state)


def cuda_in_use() -> bool:
    """Return whether the generator of a GPU may have drawn.

    A GPU that was not used has no state to save, and asking for the state would initialise it.
    """
    return torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
