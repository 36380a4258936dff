"""Random number generators: seeding them, and keeping them apart."""

from __future__ import annotations

import random
import sys
from collections.abc import Generator
from contextlib import contextmanager

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


@contextmanager
def isolated_rng() -> Generator[None, None, None]:
    """Leaves all generators as it found them, whatever the ``with`` block draws, also after an error."""
    python_state = random.getstate()
    numpy_random = sys.modules["numpy"].random if "numpy" in sys.modules else None
    numpy_state = numpy_random.get_state() if numpy_random else None
    try:
        # Devices that nobody used have no state to keep, and asking would initialise them.
        in_use = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if in_use else ()):
            yield
    finally:
        random.setstate(python_state)
        if numpy_random:
            numpy_random.set_state(numpy_state)
