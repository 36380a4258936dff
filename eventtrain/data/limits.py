"""The lengths of loaders, and the limits that users set on them."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from eventtrain.errors import MisconfigurationError
from eventtrain.events import Stage

Limit = int | float | None


def known_length(loader: Any) -> int | None:
    """Return the number of batches of a loader; None if it has no length or only guesses it."""
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        return None
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def samples_per_batch(loader: Any) -> int | None:
    """Return the number of samples in a whole batch of a loader; None if the loader does not say."""
    return getattr(loader.batch_sampler, "batch_size", 1) if isinstance(loader, DataLoader) else None


def check_limit(limit: Limit, named: str) -> None:
    """Check the value of an argument that limits batches.

    Args:
        limit: The value that the user wrote.
        named: The argument's name.

    Raises:
        MisconfigurationError: If it is neither None, a number of batches from 0, nor a fraction from 0 to 1.
    """
    if limit is None:
        return
    number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
    if not number or limit < 0 or (isinstance(limit, float) and not limit <= 1):
        raise MisconfigurationError(
            f"{named}={limit!r}: it has to be a whole number of batches, a fraction from 0.0 to 1.0, or None for all."
        )


def limit_name(stage: Stage) -> str:
    """Return the argument of the trainer that limits a stage."""
    return f"limit_{'val' if stage == 'validation' else stage}_batches"


def limited_length(length: int | None, limit: Limit, named: str) -> int | None:
    """Return the number of batches to use.

    Args:
        length: The loader's length; None if it is unknown.
        limit: A number of batches, a fraction, or None for all.
        named: The limit's name, for messages.

    Returns:
        The number; None for all batches of a loader whose length is unknown.

    Raises:
        MisconfigurationError: If the limit is a fraction and the length is unknown, or if the fraction is less than one
            batch.
    """
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return length
    if isinstance(limit, int):
        return limit if length is None else min(limit, length)
    if limit == 0.0 or length == 0:
        return 0
    if length is None:
        raise MisconfigurationError(
            f"{named}={limit!r} is a fraction of a loader whose length is unknown. Give a whole number of batches."
        )
    batches = int(length * limit)
    if batches < 1:
        raise MisconfigurationError(
            f"{named}={limit!r} of {length} batches is less than one. Give at least {1 / length:.3g}, or a whole "
            "number of batches."
        )
    return batches
