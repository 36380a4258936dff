"""The per-rank state of a checkpoint: each process has one, also if another number of processes resumes the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eventtrain.checkpoint.rng import rng_state
from eventtrain.data.limits import known_length
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
    if state.loop is not None and loaders is not None:
        first = state.limits.first_epoch_batches
        data = loaders.state_dict(position is not None) | {"position": position, "first_epoch_batches": first}
    return {
        "window": {
            "open": batch.window_open,
            "contributions": batch.contributions,
            "weight": batch.weight,
            "weight_reference": batch.weight_reference,
            # In manual optimization only the module knows whether a window is open.
            "gradients": gradients(trainer) if batch.window_open or not batch.automatic else {},
        },
        "metrics": state.fit_metrics.state_dict(trainer.module),
        "rng": rng_state(),
        "data": data,
    }


def gradients(trainer: Trainer) -> dict[str, Any]:
    """Return the gradients that the module's parameters hold, by the parameters' names."""
    parameters = trainer.module.named_parameters()
    return {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}


def state_of_rank(checkpoint: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """Return a checkpoint with this process's values for :data:`PER_RANK`.

    Args:
        checkpoint: The checkpoint, in the current schema.
        trainer: The trainer that resumes it.

    Raises:
        MisconfigurationError: If another number of processes wrote it, at a place from which these cannot continue.
    """
    states = [{key: checkpoint[key] for key in PER_RANK}, *checkpoint["ranks"]]
    if len(states) == trainer.processes.data.world_size:
        return {**checkpoint, **states[trainer.processes.data.global_rank]}
    return {**checkpoint, **divided_anew(checkpoint, states, trainer)}


def divided_anew(checkpoint: dict[str, Any], states: list[dict[str, Any]], trainer: Trainer) -> dict[str, Any]:
    """Return the values for one of another number of processes: the data from where the others left them, and their metrics.

    Args:
        checkpoint: The checkpoint.
        states: The per-rank states of the processes that wrote it.
        trainer: The trainer that resumes it.

    Raises:
        MisconfigurationError: If they were in an accumulation window, or have not done a whole number of these processes'
            batches.
    """
    before, now, rank = len(states), trainer.processes.data.world_size, trainer.processes.data.global_rank
    advice = f"Resume with {before} processes, or from a checkpoint of an epoch's end."
    if any(state["window"]["open"] for state in states):
        raise MisconfigurationError(
            f"The checkpoint was written by {before} processes in an open accumulation window, whose gradients {now} processes "
            f"cannot share. {advice}"
        )
    rank_state = dict(states[min(rank, before - 1)])
    if rank_state["data"] is None or rank_state["data"]["position"] is None:
        return rank_state
    position = dict(rank_state["data"]["position"])
    if position["state"] is not None:
        raise MisconfigurationError(
            f"The checkpoint was written by {before} processes in an epoch, at positions that their loaders keep, and {now} "
            f"processes cannot share those. {advice}"
        )
    batches, rest = divmod(position["batches"] * before, now)
    if rest:
        raise MisconfigurationError(
            f"The checkpoint was written after {position['batches']} batches on each of {before} processes, which is no whole "
            f"number of batches on each of {now}. {advice}"
        )
    done = checkpoint["progress"]["total_batch_idx"] + 1 - position["batches"]
    assert trainer.run_state.loaders is not None
    (loader,) = trainer.run_state.loaders.of("train")
    position |= {"batches": batches, "length": known_length(loader)}
    rank_state["data"] = rank_state["data"] | {"position": position}
    entries = [entry for state in states for entry in state["metrics"]["entries"]]
    # They are summed over all processes in the end, so one process may have them all.
    rank_state["metrics"] = rank_state["metrics"] | {"entries": entries if rank == 0 else []}
    progress = checkpoint["progress"] | {"batch_idx": batches - 1, "total_batch_idx": done + batches - 1}
    return rank_state | {"progress": progress}
