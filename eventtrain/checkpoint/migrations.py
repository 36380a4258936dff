"""Checkpoints of older schemas, brought to the current one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eventtrain.errors import MisconfigurationError
from eventtrain.version import __version__

SCHEMA_VERSION = 3


def migrated(checkpoint: dict[str, Any], path: Any) -> dict[str, Any]:
    """Return a checkpoint in the current schema.

    Args:
        checkpoint: A checkpoint of any schema from 1 on.
        path: Its file, for the error.

    Raises:
        MisconfigurationError: If its schema is unknown, such as a later one.
    """
    version = checkpoint.get("schema_version")
    while version != SCHEMA_VERSION:
        if version not in MIGRATIONS:
            lightning = checkpoint.get("pytorch-lightning_version")
            writer = f"was written by Lightning {lightning}" if lightning else f"has schema version {version!r}"
            raise MisconfigurationError(
                f"{path} {writer}; this eventtrain {__version__} resumes runs from the schema versions 1 to {SCHEMA_VERSION}, "
                "which trainer.save_checkpoint writes. Load only the weights by load_from_checkpoint, or by ckpt_path of "
                "validate, test and predict."
            )
        checkpoint = MIGRATIONS[version](checkpoint)
        version = checkpoint["schema_version"]
    return checkpoint


def _from_1(old: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had neither generators nor a position in the data: exact at an epoch's end if nothing is random."""
    window = {"open": False, "contributions": 0, "weight": None, "weight_reference": old["weight_reference"], "gradients": {}}
    progress = old["progress"] | {"validated_at": old["progress"]["total_batch_idx"]}
    absent = {"metrics": None, "rng": None, "data": None, "num_steps": [old["global_step"]] * len(old["optimizer_states"])}
    return {**old, **absent, "window": window, "progress": progress, "schema_version": 2}


def _from_2(old: dict[str, Any]) -> dict[str, Any]:
    """Version 2 had no flags, and nothing by which optimizers are compared."""
    absent: dict[str, Any] = {"ranks": [], "epoch_reason": None, "stop_reason": None, "requires_grad": {}, "training": {}}
    return {**absent, **old, "classes": {}, "parameter_groups": None, "schema_version": 3}


MIGRATIONS: dict[Any, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1, 2: _from_2}
