"""Connect the hooks that a module overrides, with Lightning's arguments if Lightning has the hook."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from difflib import get_close_matches
from typing import Any

from eventtrain.core.signals import Signals
from eventtrain.errors import MisconfigurationError, nearest
from eventtrain.events import EVENTS, Event, TrainBatchStart, TrainEpochStart, module_hook
from eventtrain.hints import hint, misfit, tables
from eventtrain.module.datamodule import DataHooks, LightningDataModule
from eventtrain.module.hooks import MODULE_ONLY_HOOKS
from eventtrain.module.module import LightningModule
from eventtrain.module.overriding import overridden

HOOKS = {module_hook(event_type): name for name, event_type in EVENTS.items()}
"""The signal's name by the module hook's name."""

CALLED = (
    *("prepare_data", "setup", "configure_model", "configure_optimizers", "configure_gradient_clipping"),
    *("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"),
    *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"),
    *("backward", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step"),
)
"""The methods of modules and datamodules that are no steps and no events."""

LIKE_A_HOOK = re.compile(r"on_|configure_|tbptt_|\w+_(step|end|dict|queue)$")
"""Names that are looked up in the hints. They are read only for such names, because that takes some milliseconds."""


def connect_hooks(part: Any, signals: Signals, connected: ExitStack) -> None:
    """Connect the hooks that a module or datamodule overrides to a trainer's signals.

    Args:
        part: The module or datamodule.
        signals: The trainer's signals.
        connected: Removes the connections when it is closed.

    Raises:
        MisconfigurationError: If a method is named almost like a hook, or if a hook takes other arguments.
    """
    check_names(part)
    check_signatures(part)
    for hook_name, signal_name in HOOKS.items():
        if overridden(part, hook_name, LightningModule, LightningDataModule):
            listener = signals[signal_name].connect(adapted(part, hook_name, EVENTS[signal_name]))
            connected.callback(signals[signal_name].disconnect, listener)


def check_names(part: Any) -> None:
    """Check that no method of a module or datamodule is named almost like a hook, or like one of older versions; other names
    are allowed.

    Raises:
        MisconfigurationError: If a method is.
    """
    owner, known = type(part).__name__, [*HOOKS, *MODULE_ONLY_HOOKS]
    library = {attribute for base in (LightningModule, LightningDataModule) for attribute in dir(base)}
    attributes = {name: getattr(type(part), name, None) for name in dir(type(part))} | getattr(part, "__dict__", {})
    for name, value in attributes.items():
        if name in library or not callable(value) or not LIKE_A_HOOK.match(name):
            continue
        if name in tables()["hook"]:
            raise MisconfigurationError(f"{owner}.{name} is never called. {hint('hook', name)}")
        instead = tables()["instead"].get(name, "")
        if hasattr(LightningModule, instead) and not overridden(part, instead, LightningModule, LightningDataModule):
            raise MisconfigurationError(f"{owner}.{name} is never called. Rename it to {instead}.")
        if name.startswith("on_") and name not in known:
            suggestion = nearest(name, known)
            close = suggestion and abs(len(suggestion.split("'")[1]) - len(name)) <= 2
            if close:
                raise MisconfigurationError(f"{owner}.{name} is no hook. {suggestion}")


def misnamed_loader(hook: str, *parts: Any) -> str:
    """Return a sentence about an attribute that is named almost like a method for loaders; empty if there is none.

    Args:
        hook: The method's name, such as ``"val_dataloader"``.
        *parts: The module and the datamodule.
    """
    library = {*dir(LightningModule), *dir(LightningDataModule)}
    for part in parts:
        for name in sorted({*dir(type(part)), *getattr(part, "__dict__", {})} - library):
            if tables()["loader"].get(name) == hook or get_close_matches(name, [hook], cutoff=0.85):
                return f"{type(part).__name__}.{name} is never called. Rename it to {hook}."
    return ""


def check_signatures(part: Any) -> None:
    """Check that the methods that a module or datamodule overrides take the arguments that they are called with.

    Raises:
        MisconfigurationError: If one does not.
    """
    step = getattr(part, "training_step", None)
    if callable(step) and "optimizer_idx" in inspect.signature(step).parameters:
        raise misfit(step, "training_step", ("batch", "batch_idx"), f"{type(part).__name__}.")
    for name in CALLED:
        method = getattr(part, name, None)
        if not callable(method) or not overridden(part, name, LightningModule, LightningDataModule, DataHooks):
            continue
        parameters = list(inspect.signature(getattr(LightningModule, name)).parameters.values())[1:]
        arguments = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        if not takes(method, arguments):
            raise misfit(method, name, arguments, f"{type(part).__name__}.")


def takes(method: Callable[..., Any], arguments: Iterable[str]) -> bool:
    """Return whether a method can be called with these positional arguments. One with ``optimizer_idx`` would take another
    argument for it."""
    try:
        signature = inspect.signature(method)
        signature.bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return "optimizer_idx" not in signature.parameters


def adapted(module: Any, hook_name: str, event_type: type[Event]) -> Callable[..., None]:
    """Return a listener that calls a module's hook with the arguments of its Lightning signature.

    Args:
        module: The module.
        hook_name: The hook's name.
        event_type: The event that it listens to.

    Raises:
        MisconfigurationError: If the hook needs more arguments than the event gives.
    """
    hook = getattr(module, hook_name)
    described = f"{type(module).__name__}.{hook_name}"
    fields = event_type.module_arguments
    if fields is not None:
        fields = fields[: _positional(hook, len(fields))]
    if not takes(hook, ("event",) if fields is None else fields):
        expected = ("event",) if fields is None else event_type.module_arguments or ()
        raise misfit(hook, hook_name, [name.replace("raw_loss", "loss") for name in expected], f"{type(module).__name__}.")
    listener = _listener(hook, event_type, fields)
    listener.described = described  # type: ignore[attr-defined]
    listener.decides_alike = fields is not None  # type: ignore[attr-defined]  # without the event it can veto nothing
    return listener


def _listener(hook: Callable[..., Any], event_type: type[Event], fields: tuple[str, ...] | None) -> Callable[..., None]:
    """Return a listener that calls a hook with the event, or with fields of it.

    Args:
        hook: The hook.
        event_type: The event.
        fields: The fields; None for the event itself.
    """
    if fields is None:

        def listener(trainer: Any, event: Any) -> None:
            hook(event)

    elif event_type is TrainEpochStart:

        def listener(trainer: Any, event: Any) -> None:
            if not event.batches_done:  # the hook of a resumed epoch was called when the epoch began
                hook()

    elif event_type is TrainBatchStart:

        def listener(trainer: Any, event: Any) -> None:
            if hook(*[getattr(event, field) for field in fields]) == -1:
                event.end_epoch()

    elif not fields:

        def listener(trainer: Any, event: Any) -> None:
            hook()

    else:

        def listener(trainer: Any, event: Any) -> None:
            hook(*[getattr(event, field) for field in fields])

    return listener


def _positional(hook: Callable[..., Any], most: int) -> int:
    """Return how many positional arguments a hook takes, at most ``most``."""
    count = 0
    for parameter in inspect.signature(hook).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            return most
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            count += 1
    return min(count, most)
