"""The content of a checkpoint: the state of a run, collected from a trainer and restored to one."""

from __future__ import annotations

import dataclasses
import platform
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eventtrain._torch import mark_stepped
from eventtrain.callback import has_state, state_key
from eventtrain.checkpoint import storage
from eventtrain.checkpoint.find import say
from eventtrain.checkpoint.migrations import SCHEMA_VERSION, migrated
from eventtrain.checkpoint.optimizers import class_names, parameter_groups, restore_optimizers
from eventtrain.checkpoint.ranks import state_of_rank, state_of_this_rank
from eventtrain.checkpoint.rng import isolated_rng, set_rng_state
from eventtrain.checkpoint.shape import believing, check_shape
from eventtrain.checkpoint.weights import load_weights
from eventtrain.core.loop import Resumption
from eventtrain.errors import MisconfigurationError
from eventtrain.events import CheckpointGathered, CheckpointRead, LoadCheckpoint, SaveCheckpoint
from eventtrain.metrics.entry import on_device
from eventtrain.module.hparams import HyperparametersMixin
from eventtrain.module.modes import flags, restore_flags
from eventtrain.module.saved_hparams import packed
from eventtrain.version import __version__

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer


def gather(trainer: Trainer) -> dict[str, Any]:
    """Return the state of a run as it is written, with the additions of listeners.

    Args:
        trainer: The trainer, in a run or after one.
    """
    checkpoint = state_of(trainer)
    trainer.signals.save_checkpoint.publish(SaveCheckpoint(checkpoint))
    if trainer.stage is None:  # hooks are connected in runs only
        call_hooks(trainer, checkpoint)
    trainer.signals.checkpoint_gathered.publish(CheckpointGathered(checkpoint))
    trainer.run_state.sequence = checkpoint["sequence"]
    return checkpoint


def call_hooks(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let datamodule and module add to a checkpoint, by ``on_save_checkpoint``."""
    for part in (trainer.datamodule, trainer.module):
        if (hook := getattr(part, "on_save_checkpoint", None)) is not None:
            hook(checkpoint)


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Return the state of a run. Its keys are the schema, which ``docs/resume.md`` describes:

    - ``schema_version``, ``versions`` of the software, ``written_at`` in seconds since 1970; ``sequence``, a number that is
      larger than that of each checkpoint before, which a listener of ``save_checkpoint`` may raise;
    - ``hyper_parameters`` of the module, ``hparams_name`` and ``hparams_type``, and, if there is a datamodule, these three of
      it, with names that begin with ``datamodule_``;
    - ``state_dict`` of the module; ``requires_grad`` of its parameters and ``training`` of its submodules, by name;
    - ``optimizer_states`` and ``lr_schedulers``, lists in the order of ``configure_optimizers``, and their ``classes``;
      ``parameter_groups`` of the optimizers by name, as ``configured`` and as ``current``; ``num_steps``, each optimizer's
      count;
    - ``progress``, the counters; ``epoch`` and ``global_step``, copies of two of them under Lightning's names;
    - ``window``, the current accumulation window, with the gradients that are held;
    - ``metrics``, the values that were logged, and the unfinished epoch's reductions;
    - ``rng``, the generators; ``data``, the position in the training data and the loaders' own generators;
      ``epoch_reason``, why the epoch was about to end, if it was; ``stop_reason``, why the run was, once ``min_epochs`` and
      ``min_steps`` allow it;
    - ``ranks``, for each process but the first, its own ``window``, ``metrics``, ``rng`` and ``data``;
    - ``callbacks``, each callback's state by its key; ``datamodule``.

    Args:
        trainer: The trainer, in a run or after one.
    """
    state, module = trainer.run_state, trainer.module
    # First, because torch then frees the whole weights that a sharded module may have gathered, with their gradients.
    weights = module.state_dict()
    stop, rank_state = state.stop, state_of_this_rank(trainer)
    in_epoch = rank_state["data"] is not None and rank_state["data"]["position"] is not None
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": {"eventtrain": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "written_at": time.time(),
        "sequence": state.sequence + 1,
        **packed(module),
        "state_dict": weights,
        **flags(module),
        "optimizer_states": [optimizer.state_dict() for optimizer in state.optimizers],
        "lr_schedulers": [config.state_dict() for config in state.lr_scheduler_configs],
        "classes": class_names(state),
        "parameter_groups": {
            "configured": state.configured_groups,
            "current": parameter_groups(module, state.optimizers),
        },
        "num_steps": [optimizer.num_steps for optimizer in state.optimizers],
        "progress": dataclasses.asdict(state.progress),
        "epoch": state.progress.current_epoch,
        "global_step": state.progress.global_step,
        **rank_state,
        "ranks": trainer.processes.data.gather(rank_state)[1:],
        "epoch_reason": stop.epoch_reason if in_epoch else None,
        # A request to stop that min_epochs or min_steps hold off; one that holds now was made for this process.
        "stop_reason": None if stop.force or trainer.is_ending else stop.reason,
        "callbacks": {state_key(each): each.state_dict() for each in trainer.callbacks if has_state(each)},
        "datamodule": trainer.datamodule.state_dict() if hasattr(trainer.datamodule, "state_dict") else {},
        **(packed(trainer.datamodule) if isinstance(trainer.datamodule, HyperparametersMixin) else {}),
    }


def try_out(trainer: Trainer) -> None:
    """Collect a checkpoint before training, so that a value that no file can hold is found now, and not at the first save.

    Callbacks, datamodule and module add to it by ``on_save_checkpoint``, and no event is published. If one of them raises, the
    additions stay unchecked, and a log says so: it may need values of the training.

    Args:
        trainer: The trainer, in a fit that is about to train.

    Raises:
        MisconfigurationError: If there is such a value. It is a warning if nothing listens to ``take_checkpoint``.
    """
    signals = trainer.signals.table
    if trainer.fast_dev_run or not (signals.take_checkpoint.listeners or signals.save_checkpoint.listeners):
        return
    with isolated_rng():
        checkpoint = state_of(trainer)
        try:
            for callback in trainer.callbacks:
                if hasattr(callback, "on_save_checkpoint"):
                    callback.on_save_checkpoint(trainer, event=SaveCheckpoint(checkpoint))
            call_hooks(trainer, checkpoint)
        except Exception as error:
            say(
                f"on_save_checkpoint was tried before training, and raised {storage.first_line(error)}. So it is not known "
                "whether a file can hold the values that it adds."
            )
            return
    # Without tensors: those of a lazy module do not exist yet, and will when they are written.
    others = {name: value for name, value in checkpoint["state_dict"].items() if not isinstance(value, Tensor)}
    try:
        storage.loadable({**checkpoint, "state_dict": others})
    except MisconfigurationError as error:
        if signals.take_checkpoint.listeners:
            raise
        warnings.warn(f"No checkpoint of this run can be saved: {error}", stacklevel=2)


def announce(trainer: Trainer, checkpoint: dict[str, Any], path: Any) -> dict[str, Any]:
    """Let listeners, and the datamodule, see a checkpoint before loaders and optimizers are made.

    Args:
        trainer: The trainer that resumes it.
        checkpoint: The checkpoint, of any schema.
        path: Its file, for errors.

    Returns:
        The checkpoint in the current schema.

    Raises:
        MisconfigurationError: If its schema is unknown.
    """
    trainer.signals.checkpoint_read.publish(CheckpointRead(checkpoint, path))
    trainer.signals.load_checkpoint.publish(LoadCheckpoint(checkpoint))
    with believing(path, f"the schema version {checkpoint.get('schema_version')!r}"):
        checkpoint = migrated(checkpoint, path)
    check_shape(checkpoint, path)
    if hasattr(trainer.datamodule, "load_state_dict"):
        trainer.datamodule.load_state_dict(checkpoint["datamodule"])
    return checkpoint


def restore(trainer: Trainer, checkpoint: dict[str, Any], path: Any) -> None:
    """Give a trainer the state of a run.

    Args:
        trainer: The trainer, whose module, loaders, optimizers and schedulers exist.
        checkpoint: The checkpoint that :func:`announce` returned.
        path: Its file, for errors.

    Raises:
        MisconfigurationError: If the checkpoint is of another module, or of other optimizers or schedulers; or another number
            of processes wrote it, at a place from which these cannot continue.
    """
    state = trainer.run_state
    checkpoint = state_of_rank(checkpoint, trainer)
    load_weights(trainer.module, checkpoint, path)
    with believing(path, "the state of the optimizers"):
        restore_optimizers(state, checkpoint, path)
        for stepping, steps in zip(state.steppings, checkpoint["num_steps"], strict=True):
            stepping.num_steps = steps
            # Else torch's schedulers warn of a step before the optimizer's first: that was in another process.
            mark_stepped(stepping.wrapped, steps > 0)
    restore_flags(trainer.module, checkpoint)
    state.sequence = checkpoint.get("sequence", 0)
    for name in dataclasses.asdict(state.progress).keys() & checkpoint["progress"].keys():
        setattr(state.progress, name, checkpoint["progress"][name])
    if state.progress.epoch_is_over:
        state.progress.count_epoch()  # written at the epoch's last safe point: it is not to be trained again
    state.stop.reason = state.stop_request.reason = checkpoint["stop_reason"]
    with believing(path, "'window'"):
        restore_window(trainer, checkpoint["window"])
    if checkpoint["metrics"] is not None:
        with believing(path, "'metrics'"):
            state.metrics.load_state_dict(checkpoint["metrics"], trainer.module, trainer.device)
    for callback in trainer.callbacks:
        if has_state(callback) and (key := state_key(callback)) in checkpoint["callbacks"]:
            with believing(path, f"'callbacks'[{key!r}]"):
                callback.load_state_dict(checkpoint["callbacks"][key])
    warn_of_left_states(trainer, checkpoint["callbacks"])
    with believing(path, "'data'"):
        restore_position(trainer, checkpoint, partial(believing, path, "'rng' and 'data'"))


def restore_window(trainer: Trainer, window: dict[str, Any]) -> None:
    """Open the accumulation window again that the checkpoint was written in."""
    batch = trainer.run_state.batch
    batch.window_open = window["open"]
    batch.contributions, batch.missing = window["contributions"], window.get("missing", 0)
    batch.weight = on_device(window["weight"], trainer.device)
    if batch.processes is None or window["weight_reference"] is not None:
        batch.weight_reference = on_device(window["weight_reference"], trainer.device)
    for name, parameter in trainer.module.named_parameters():
        # None if there is none: an earlier run may have left one.
        parameter.grad = on_device(window["gradients"].get(name), trainer.device)


def warn_of_left_states(trainer: Trainer, states: dict[str, Any]) -> None:
    """Warn of states that no attached callback takes up."""
    attached = {state_key(callback) for callback in trainer.callbacks}
    if left := [key for key, state in states.items() if state and key not in attached]:
        warnings.warn(
            f"The checkpoint holds state of {left}, which no attached callback takes up. Attach them, or go on without.",
            stacklevel=2,
        )


def restore_position(trainer: Trainer, checkpoint: dict[str, Any], believing: Callable[[], Any]) -> None:
    """Have the loop continue at the checkpoint's batch, with the checkpoint's random numbers and the module's flags."""
    data, loaders, loop = checkpoint["data"], trainer.run_state.loaders, trainer.run_state.loop
    assert loop is not None and loaders is not None
    if data is None:  # of a version that kept no position: an epoch begins anew
        return
    loaders.load_state_dict(data)

    def restore_last() -> None:
        with believing():
            set_rng_state(checkpoint["rng"])
            loaders.restore_generators(data)
        restore_flags(trainer.module, checkpoint)  # hooks such as on_train_start may freeze layers as they did at first

    loop.resumption = Resumption(data["position"], checkpoint["epoch_reason"], restore_last)
