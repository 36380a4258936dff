"""Connect the hooks that a module overrides, with Lightning's arguments if Lightning has the hook."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from eventtrain.core.signals import Signals
from eventtrain.errors import MisconfigurationError, nearest
from eventtrain.events import EVENTS, Event, TrainBatchStart, TrainEpochStart, module_hook
from eventtrain.module.datamodule import LightningDataModule
from eventtrain.module.hooks import MODULE_ONLY_HOOKS
from eventtrain.module.module import LightningModule
from eventtrain.module.overriding import overridden

HOOKS = {module_hook(event_type): name for name, event_type in EVENTS.items()}
"""The signal's name by the module hook's name."""


class ConnectedHooks:
    """The connections of one module (and its datamodule) to a trainer's signals.

    Args:
        module: The module, or datamodule, whose hooks are connected.
        signals: The trainer's signals.

    Raises:
        MisconfigurationError: If a method is named almost like a hook, or if a hook takes other arguments.
    """

    def __init__(self, module: LightningModule | LightningDataModule, signals: Signals) -> None:
        check_names(module)
        self._signals = signals
        self._connected: list[tuple[str, Callable[..., Any]]] = []
        for hook_name, signal_name in HOOKS.items():
            if overridden(module, hook_name, LightningModule, LightningDataModule):
                listener = adapted(module, hook_name, EVENTS[signal_name])
                signals[signal_name].connect(listener)
                self._connected.append((signal_name, listener))

    def disconnect(self) -> None:
        """Remove the connections."""
        for signal_name, listener in self._connected:
            self._signals[signal_name].disconnect(listener)
        self._connected.clear()


def check_names(module: Any) -> None:
    """Check that no method of a module is named almost like a hook; other names with ``on_`` are allowed.

    Raises:
        MisconfigurationError: If a method is.
    """
    known = [*HOOKS, *MODULE_ONLY_HOOKS]
    library = {attribute for base in (LightningModule, LightningDataModule) for attribute in dir(base)}
    for attribute in dir(type(module)):
        value = getattr(type(module), attribute, None)
        if attribute in library:
            continue
        if attribute.startswith("on_") and attribute not in known and callable(value):
            hint = nearest(attribute, known)
            close = hint and abs(len(hint.split("'")[1]) - len(attribute)) <= 2
            if close:
                raise MisconfigurationError(f"{type(module).__name__}.{attribute} is no hook. {hint}")


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
    arguments = ("event",) if fields is None else fields
    try:
        inspect.signature(hook).bind(*arguments)
    except TypeError:
        expected = ", ".join(("self", *(("event",) if fields is None else event_type.module_arguments or ())))
        expected = expected.replace("raw_loss", "loss")
        raise MisconfigurationError(
            f"{described}{inspect.signature(hook)} does not fit. Write `def {hook_name}({expected}):`."
        ) from None
    listener = _listener(hook, event_type, fields)
    listener.described = described  # type: ignore[attr-defined]
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
