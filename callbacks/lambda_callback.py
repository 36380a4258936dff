"""A callback made of functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from eventtrain.callback import Callback
from eventtrain.core.signals import check_listener, describe_listener
from eventtrain.errors import MisconfigurationError
from eventtrain.events import EVENTS
from eventtrain.hints import hint


class LambdaCallback(Callback):
    """Calls functions at events: for a callback that needs no class.

    Listens to the events that it has functions for. Any number of these callbacks can be attached. They have no state, and
    emit only the metrics that their functions log.

    Args:
        **handlers: The functions, each by the name of a callback's method, ``on_<event>``. A function is called as
            ``function(trainer, event=event)``.

    Raises:
        MisconfigurationError: If there is no function, a name does not name an event, or a function cannot be called with
            these arguments.

    Example:
        >>> from eventtrain import Trainer
        >>> report = LambdaCallback(on_train_epoch_end=lambda trainer, event: print(event.epoch, trainer.callback_metrics))
        >>> trainer = Trainer(max_epochs=1, callbacks=[report])
        >>> "LambdaCallback(on_train_epoch_end=<lambda> at" in trainer.describe()
        True
    """

    def __init__(self, **handlers: Callable[..., Any]) -> None:
        if not handlers:
            raise MisconfigurationError(
                "LambdaCallback() listens to nothing. Give functions by the names of a callback's methods: "
                "LambdaCallback(on_train_epoch_end=lambda trainer, event: ...)."
            )
        for name, handler in handlers.items():
            setattr(self, name, checked(name, handler))


def checked(name: str, handler: Callable[..., Any]) -> Callable[..., Any]:
    """Return a listener that calls a function, and that error notes and ``describe()`` name after it.

    Args:
        name: The argument's name, ``on_<event>``.
        handler: The function.

    Raises:
        MisconfigurationError: If the name is not ``on_`` and the name of an event, or the function does not take
            ``(trainer, event)``.
    """
    event_name = name.removeprefix("on_")
    if not name.startswith("on_") or event_name not in EVENTS:
        known = [f"on_{event}" for event in EVENTS]
        remedy = hint("callback", name, known) or "eventtrain.events lists them all."
        raise MisconfigurationError(f"LambdaCallback({name}=...) names no event. {remedy}")
    described = f"LambdaCallback({name}={describe_function(handler)})"
    check_listener(handler, event_name, named=described)
    listener = partial(handler)  # an object for this callback only: others may have the same function
    listener.described = described  # type: ignore[attr-defined]
    return listener


def describe_function(function: Any) -> str:
    """Return a function's name; for a lambda, its file and line."""
    code = getattr(function, "__code__", None)
    if code is not None and code.co_name == "<lambda>":
        return f"<lambda> at {Path(code.co_filename).name}:{code.co_firstlineno}"
    return describe_listener(function)
