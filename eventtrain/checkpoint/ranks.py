"""What a checkpoint keeps of each process by itself, and how processes of another number share it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eventtrain.checkpoint.rng import rng_state
from eventtrain.data.limits import known_length
from eventtrain.errors import MisconfigurationError

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer

OWN = ("window", "metrics", "rng", "data")
"""The keys of a checkpoint that each process has a value of its own for; rank zero's are in the checkpoint itself."""


def own_share(trainer: Trainer) -> dict[str, Any]:
    """This process's values for :data:`OWN`.

    Args:
        trainer: The trainer, in a run or after one.
    """
    batch, loop = trainer.batch, trainer._loop
    position = None if loop is None or loop.batches is None else loop.batches.position()
    return {
        "window": {
            "open": batch.window_open,
            "contributions": batch.contributions,
            "weight": batch.weight,
            "weight_reference": batch.weight_reference,
            # In manual optimization nobody knows whether a window is open but the module.
            "gradients": gradients(trainer) if batch.window_open or not batch.automatic else {},
        },
        "metrics": trainer.metrics.state_dict(trainer.module),
        "rng": rng_state(),
        "data": None if loop is None else loop.data_state(position is not None) | {"position": position},
    }


def gradients(trainer: Trainer) -> dict[str, Any]:
    """The gradients that the module's parameters hold, by the parameters' names."""
    named = trainer.module.named_parameters()
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def share_of(checkpoint: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """A checkpoint with this process's values for :data:`OWN`.

    Args:
        checkpoint: The checkpoint, in today's schema.
        trainer: The trainer that goes on from it.

    Raises:
        MisconfigurationError: It was written by another number of processes, in a place where these cannot go on.
    """
    shares = [{key: checkpoint[key] for key in OWN}, *checkpoint["ranks"]]
    rank, world_size = trainer.global_rank, trainer.world_size
    if len(shares) == world_size:
        return {**checkpoint, **shares[rank]}
    return {**checkpoint, **shared_anew(checkpoint, shares, trainer)}


def shared_anew(checkpoint: dict[str, Any], shares: list[dict[str, Any]], trainer: Trainer) -> dict[str, Any]:
    """What one of another number of processes takes up: the data where the others left them, and their logged values.

    Args:
        checkpoint: The checkpoint.
        shares: What each of the processes had that wrote it.
        trainer: The trainer that goes on from it.

    Raises:
        MisconfigurationError: They were in an accumulation window, or have done no whole number of these processes' batches.
    """
    before, now = len(shares), trainer.world_size
    advice = f"Resume with {before} processes, or from a checkpoint of an epoch's end."
    if any(share["window"]["open"] for share in shares):
        raise MisconfigurationError(
            f"The checkpoint was written by {before} processes in an open accumulation window, whose gradients {now} processes "
            f"cannot share. {advice}"
        )
    mine = dict(shares[min(trainer.global_rank, before - 1)])
    if mine["data"] is None or mine["data"]["position"] is None:
        return mine
    position = dict(mine["data"]["position"])
    batches, rest = divmod(position["batches"] * before, now)
    if rest:
        raise MisconfigurationError(
            f"The checkpoint was written after {position['batches']} batches on each of {before} processes, which is no whole "
            f"number of batches on each of {now}. {advice}"
        )
    done = checkpoint["progress"]["total_batch_idx"] + 1 - position["batches"]
    position |= {"batches": batches, "length": known_length(trainer._data.loader("train"))}
    mine["data"] = mine["data"] | {"position": position}
    entries = [entry for share in shares for entry in share["metrics"]["entries"]]
    # Summed over all processes in the end, so one may have it all.
    mine["metrics"] = mine["metrics"] | {"entries": entries if trainer.global_rank == 0 else []}
    progress = checkpoint["progress"] | {"batch_idx": batches - 1, "total_batch_idx": done + batches - 1}
    return mine | {"progress": progress}
