"""What a checkpoint holds, gathered from a trainer and given back to one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from eventtrain.callback import has_state, state_key
from eventtrain.errors import MisconfigurationError
from eventtrain.events import LoadCheckpoint, SaveCheckpoint

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer

SCHEMA_VERSION = 1


def gather(trainer: Trainer) -> dict[str, Any]:
    """The state of a run, as it is written.

    The keys: ``schema_version``; ``state_dict`` of the module; ``optimizer_states`` and ``lr_schedulers``, lists in
    the order of ``configure_optimizers``; ``progress``, the counters; ``epoch`` and ``global_step``, copies of two of
    them under Lightning's names; ``callbacks``, each callback's state by its key; ``datamodule``; ``weight_reference``;
    ``hyper_parameters``.

    Args:
        trainer: The trainer, in a run or after one.
    """
    module = trainer.module
    checkpoint: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "state_dict": dict(module.state_dict()),
        "optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "progress": dataclasses.asdict(trainer.progress),
        "epoch": trainer.progress.current_epoch,
        "global_step": trainer.progress.global_step,
        "callbacks": {state_key(each): each.state_dict() for each in trainer.callbacks if has_state(each)},
        "datamodule": trainer.datamodule.state_dict() if trainer.datamodule is not None else {},
        "weight_reference": trainer.batch.weight_reference,
        "hyper_parameters": dict(module.hparams),
    }
    trainer.signals.save_checkpoint.publish(SaveCheckpoint(checkpoint))
    return checkpoint


def restore(trainer: Trainer, checkpoint: dict[str, Any], *, training: bool) -> None:
    """Gives a trainer the state of a run.

    Args:
        trainer: The trainer, whose module, optimizers and schedulers exist.
        checkpoint: What :func:`gather` gave.
        training: Whether training goes on: else the module alone is restored.

    Raises:
        MisconfigurationError: The checkpoint has another schema, or another number of optimizers or
            schedulers.
    """
    trainer.signals.load_checkpoint.publish(LoadCheckpoint(checkpoint))
    version = checkpoint.get("schema_version")
    if version != SCHEMA_VERSION and (training or version is not None):
        raise MisconfigurationError(f"The checkpoint has schema version {version!r}; this is version {SCHEMA_VERSION}.")
    trainer.module.load_state_dict(checkpoint["state_dict"])
    if not training:
        return
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
    for name, value in checkpoint["progress"].items():
        setattr(trainer.progress, name, value)
    if trainer.progress.epoch_is_over:
        trainer.progress.count_epoch()  # written at the epoch's last safe point: it is not to be trained again
    trainer.batch.weight_reference = checkpoint["weight_reference"]
    if trainer.datamodule is not None:
        trainer.datamodule.load_state_dict(checkpoint["datamodule"])
    for callback in trainer.callbacks:
        if has_state(callback) and state_key(callback) in checkpoint["callbacks"]:
            callback.load_state_dict(checkpoint["callbacks"][state_key(callback)])
