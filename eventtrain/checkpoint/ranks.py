"""The per-rank state of a checkpoint: each process has one, also if another number of processes resumes the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eventtrain.checkpoint.rng import rng_state
from eventtrain.errors import MisconfigurationError

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer

PER_RANK = ("window", "metrics", "rng", "data")
"""The keys of a checkpoint that each process has a value for. The first process's values are in the checkpoint itself."""


def state_of_this_rank(trainer: Trainer) -> dict[str, Any]:
    """Return this process's values for :data:`PER_RANK`.

    Args:
        trainer: The trainer, in a run or after one.
    """
    state = trainer.run_state
    batch, batches, loaders = state.batch, None if state.loop is None else state.loop.batches, state.loaders
    position = None if batches is None else batches.position()
    data = None
    # In manual optimization only the module knows whether a window is open.
    parameters = trainer.module.named_parameters() if batch.window_open or not batch.automatic else ()
    if state.loop is not None and loaders is not None:
        first = state.limits.first_epoch_batches
        data = loaders.state_dict(position is not None) | {"position": position, "first_epoch_batches": first}
    return {
        "window": {
            "open": batch.window_open,
            "contributions": batch.contributions,
            "missing": batch.missing,
            "weight": batch.weight,
            "weight_reference": batch.weight_reference,
            "gradients": {name: each.grad for name, each in parameters if each.grad is not None},
        },
        "metrics": state.fit_metrics.state_dict(trainer.module),
        "rng": rng_state(),
        "data": data,
    }


def state_of_rank(checkpoint: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """Return a checkpoint with this process's values for :data:`PER_RANK`.

    Args:
        checkpoint: The checkpoint, in the current schema.
        trainer: The trainer that resumes it.

    Raises:
        MisconfigurationError: If another number of processes wrote it in an epoch or a window, and no callback has a method
            ``divide_checkpoint``.
    """
    states = [{key: checkpoint[key] for key in PER_RANK}, *checkpoint["ranks"]]
    before, now = len(states), trainer.processes.data.world_size
    state = states[min(trainer.processes.data.global_rank, before - 1)]
    in_epoch = state["data"] is not None and state["data"]["position"] is not None
    if before != now and (in_epoch or state["window"]["open"]):
        divide = next((each.divide_checkpoint for each in trainer.callbacks if hasattr(each, "divide_checkpoint")), None)
        if divide is None:
            raise MisconfigurationError(
                f"The checkpoint was written by {before} processes in an epoch, and no callback divides the rest of it between "
                f"{now}. Attach DistributedDataParallel(), resume with {before} processes, or from a checkpoint of an epoch's "
                "end."
            )
        state = divide(trainer, checkpoint, states)
    return {**checkpoint, **state}
