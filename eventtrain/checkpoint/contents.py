"""What a checkpoint holds, gathered from a trainer and given back to one."""

from __future__ import annotations

import dataclasses
import platform
import time
import warnings
from typing import TYPE_CHECKING, Any

import torch

from eventtrain.callback import has_state, state_key
from eventtrain.checkpoint import ranks as shares
from eventtrain.checkpoint.rng import set_rng_state
from eventtrain.core.loop import Resumption
from eventtrain.errors import MisconfigurationError
from eventtrain.events import CheckpointGathered, CheckpointRead, LoadCheckpoint, SaveCheckpoint
from eventtrain.metrics.entry import on_device
from eventtrain.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from eventtrain.trainer import Trainer

SCHEMA_VERSION = 2


def gather(trainer: Trainer) -> dict[str, Any]:
    """The state of a run, as it is written; listeners of ``save_checkpoint`` may have added to it.

    Args:
        trainer: The trainer, in a run or after one.
    """
    checkpoint = state_of(trainer)
    trainer.signals.save_checkpoint.publish(SaveCheckpoint(checkpoint))
    trainer.signals.checkpoint_gathered.publish(CheckpointGathered(checkpoint))
    return checkpoint


def state_of(trainer: Trainer) -> dict[str, Any]:
    """The state of a run. Its keys are the schema, which ``docs/resume.md`` describes:

    - ``schema_version``, ``versions`` of what wrote it, ``written_at`` in seconds since 1970, ``hyper_parameters``;
    - ``state_dict`` of the module; ``optimizer_states`` and ``lr_schedulers``, lists in the order of
      ``configure_optimizers``; ``num_steps``, each optimizer's count;
    - ``progress``, the counters; ``epoch`` and ``global_step``, copies of two of them under Lightning's names;
    - ``window``, the accumulation window at hand, with the gradients that are held;
    - ``metrics``, what was logged, and the unfinished epoch's reductions;
    - ``rng``, the generators; ``data``, the position in the training data and the loaders' own generators;
      ``epoch_reason``, why the epoch was about to end, if it was; ``stop_reason``, why the run was, as soon as it may;
    - ``ranks``, of each process but the first what it has of its own: its ``window``, ``metrics``, ``rng`` and ``data``;
    - ``callbacks``, each callback's state by its key; ``datamodule``.

    Args:
        trainer: The trainer, in a run or after one.
    """
    module, stop, mine = trainer.module, trainer.stop_request, shares.own_share(trainer)
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": {"eventtrain": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "written_at": time.time(),
        "hyper_parameters": dict(module.hparams),
        "state_dict": module.state_dict(),
        "optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "num_steps": [optimizer.num_steps for optimizer in trainer.optimizers],
        "progress": dataclasses.asdict(trainer.progress),
        "epoch": trainer.progress.current_epoch,
        "global_step": trainer.progress.global_step,
        **mine,
        "ranks": trainer.processes.gather(mine)[1:],
        "epoch_reason": None if mine["data"] is None or mine["data"]["position"] is None else stop.epoch_reason,
        # A request to stop that min_epochs or min_steps hold off; one that holds now was made for this process.
        "stop_reason": None if stop.force or trainer.is_ending else stop.reason,
        "callbacks": {state_key(each): each.state_dict() for each in trainer.callbacks if has_state(each)},
        "datamodule": trainer.datamodule.state_dict() if trainer.datamodule is not None else {},
    }


def announce(trainer: Trainer, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Lets listeners, and the datamodule, see a checkpoint before loaders and optimizers are made.

    Args:
        trainer: The trainer that goes on from it.
        checkpoint: What :func:`gather` gave, of any schema.

    Returns:
        The checkpoint in today's schema.

    Raises:
        MisconfigurationError: It has a schema that is not known.
    """
    trainer.signals.checkpoint_read.publish(CheckpointRead(checkpoint))
    trainer.signals.load_checkpoint.publish(LoadCheckpoint(checkpoint))
    checkpoint = migrated(checkpoint)
    if trainer.datamodule is not None:
        trainer.datamodule.load_state_dict(checkpoint["datamodule"])
    return checkpoint


def restore(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Gives a trainer the state of a run.

    Args:
        trainer: The trainer, whose module, loaders, optimizers and schedulers exist.
        checkpoint: What :func:`announce` gave.

    Raises:
        MisconfigurationError: The checkpoint has another number of optimizers or schedulers, or was written by another
            number of processes in a place where these cannot go on.
    """
    checkpoint = shares.share_of(checkpoint, trainer)
    trainer.module.load_state_dict(checkpoint["state_dict"])
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for what, parts in (("optimizer_states", trainer.optimizers), ("lr_schedulers", schedulers)):
        states = checkpoint[what]
        if len(states) != len(parts):
            raise MisconfigurationError(
                f"The checkpoint holds {len(states)} {what} and configure_optimizers returned {len(parts)}. Resume with the "
                "module that wrote it, or load the weights alone with load_from_checkpoint."
            )
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    for optimizer, steps in zip(trainer.optimizers, checkpoint["num_steps"], strict=True):
        assert optimizer.run is not None
        optimizer.run.num_steps = steps
        # torch's schedulers look for it, and warn of their first step before the optimizer's: that was in another process.
        optimizer.optimizer._opt_called = steps > 0  # type: ignore[attr-defined]
    for name, value in checkpoint["progress"].items():
        setattr(trainer.progress, name, value)
    if trainer.progress.epoch_is_over:
        trainer.progress.count_epoch()  # written at the epoch's last safe point: it is not to be trained again
    trainer.stop_request.reason = checkpoint["stop_reason"]
    restore_window(trainer, checkpoint["window"])
    if checkpoint["metrics"] is not None:
        trainer.metrics.load_state_dict(checkpoint["metrics"], trainer.module, trainer.device)
    for callback in trainer.callbacks:
        if has_state(callback) and state_key(callback) in checkpoint["callbacks"]:
            callback.load_state_dict(checkpoint["callbacks"][state_key(callback)])
    attached = {state_key(callback) for callback in trainer.callbacks}
    if left := [key for key, state in checkpoint["callbacks"].items() if state and key not in attached]:
        warnings.warn(
            f"The checkpoint holds state of {left}, which no attached callback takes up. Attach them, or go on without.",
            stacklevel=2,
        )
    restore_position(trainer, checkpoint)


def restore_window(trainer: Trainer, window: dict[str, Any]) -> None:
    """Opens the accumulation window again that the checkpoint was written in."""
    batch = trainer.batch
    batch.window_open = window["open"]
    batch.contributions = window["contributions"]
    batch.weight = on_device(window["weight"], trainer.device)
    batch.weight_reference = on_device(window["weight_reference"], trainer.device)
    for name, parameter in trainer.module.named_parameters():
        # None where there is none: a run before may have left one.
        parameter.grad = on_device(window["gradients"].get(name), trainer.device)


def restore_position(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Has the loop go on at the checkpoint's batch, with the checkpoint's random numbers."""
    data, sources, loop = checkpoint["data"], trainer._data, trainer._loop
    assert loop is not None
    if data is None:  # of a version that kept no position: an epoch begins anew
        return
    sources.load_state_dict(data)

    def put_generators_back() -> None:
        set_rng_state(checkpoint["rng"])
        sources.put_generators_back(data)

    loop.resumption = Resumption(data["position"], checkpoint["epoch_reason"], put_generators_back)


# ------------------------------------------------------------------ older schemas


def migrated(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint in today's schema.

    Args:
        checkpoint: Of any schema from 1 on.

    Raises:
        MisconfigurationError: It has a schema that is not known, such as a later one.
    """
    version = checkpoint.get("schema_version")
    while version != SCHEMA_VERSION:
        if version not in MIGRATIONS:
            raise MisconfigurationError(
                f"The checkpoint has schema version {version!r}; this eventtrain {__version__} reads 1 to {SCHEMA_VERSION}. A "
                "run goes on only from a file that trainer.save_checkpoint wrote; the weights alone of another are loaded by "
                "load_from_checkpoint, or by validate, test and predict."
            )
        checkpoint = MIGRATIONS[version](checkpoint)
        version = checkpoint["schema_version"]
    return checkpoint


def _from_1(old: dict[str, Any]) -> dict[str, Any]:
    """Version 1 knew neither generators nor a position in the data: exact at the end of an epoch where nothing is random."""
    window = {"open": False, "contributions": 0, "weight": None, "weight_reference": old["weight_reference"], "gradients": {}}
    steps = [old["global_step"]] * len(old["optimizer_states"])
    progress = old["progress"] | {"validated_at": old["progress"]["total_batch_idx"]}
    added = {
        "ranks": [],
        "stop_reason": None,
        "window": window,
        "num_steps": steps,
        "progress": progress,
        "metrics": None,
        "rng": None,
        "data": None,
    }
    return {**old, **added, "schema_version": 2, "versions": {}}


MIGRATIONS: dict[Any, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}
