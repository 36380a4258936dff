"""Random number generators: seeding them, keeping their states, and keeping them apart."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from eventtrain.errors import MisconfigurationError


def seed_everything(seed: int) -> int:
    """Seeds Python's, NumPy's and torch's generators, on all devices.

    Args:
        seed: From 0 to 2**32 - 1, the range of NumPy's.

    Returns:
        The seed.

    Raises:
        MisconfigurationError: The seed is no such number.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise MisconfigurationError(f"A seed is a whole number from 0 to {2**32 - 1}; it is {seed!r}.")
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    return seed


def rng_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, in values that a checkpoint gives back.

    Returns:
        ``python``; ``torch``, the CPU's; ``cuda``, one for each GPU, and ``mps``, where they are in use; ``numpy``, where
        it is imported.
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
    """Puts the generators into states that :func:`rng_state` gave.

    Args:
        state: The states. Of more GPUs than there are now, the first ones' are used.
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
    """Seeds this process's generators from what identifies a piece of work: a data loading worker's, for a batch.

    Args:
        *parts: Numbers and strings; other parts, another seed.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=24).digest()
    random.seed(digest)
    # The CPU's generator alone: a worker has no business with a GPU's.
    torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    if "numpy" in sys.modules:
        words = [int.from_bytes(digest[at : at + 4], "little") for at in range(8, 24, 4)]
        sys.modules["numpy"].random.seed(words)


@contextmanager
def isolated_rng() -> Generator[None, None, None]:
    """Leaves all generators as it found them, whatever the ``with`` block draws, also after an error."""
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
    """Whether a GPU's generator may have drawn: those that nobody used have no state to keep, and asking for it would
    initialise them."""
    return torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
