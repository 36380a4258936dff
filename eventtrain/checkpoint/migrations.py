"""Checkpoints of older schemas, brought to the current one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eventtrain.errors import MisconfigurationError
from eventtrain.version import __version__

SCHEMA_VERSION = 2


def migrated(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint in the current schema.

    Args:
        checkpoint: A checkpoint of any schema from 1 on.

    Raises:
        MisconfigurationError: If its schema is unknown, such as a later one.
    """
    version = checkpoint.get("schema_version")
    while version != SCHEMA_VERSION:
        if version not in MIGRATIONS:
            raise MisconfigurationError(
                f"The checkpoint has schema version {version!r}; this eventtrain {__version__} reads 1 to {SCHEMA_VERSION}. A "
                "run is resumed only from a file that trainer.save_checkpoint wrote; load the weights of another file by "
                "load_from_checkpoint, or by validate, test and predict."
            )
        checkpoint = MIGRATIONS[version](checkpoint)
        version = checkpoint["schema_version"]
    return checkpoint


def _from_1(old: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had neither generators nor a position in the data: exact at an epoch's end if nothing is random."""
    window = {"open": False, "contributions": 0, "weight": None, "weight_reference": old["weight_reference"], "gradients": {}}
    steps = [old["global_step"]] * len(old["optimizer_states"])
    progress = old["progress"] | {"validated_at": old["progress"]["total_batch_idx"]}
    absent: dict[str, Any] = {"ranks": [], "stop_reason": None, "metrics": None, "rng": None, "data": None, "versions": {}}
    return {**old, **absent, "window": window, "num_steps": steps, "progress": progress, "schema_version": 2}


MIGRATIONS: dict[Any, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}
