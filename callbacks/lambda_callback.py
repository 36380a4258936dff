"""Functions as a callback."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from eventtrain.callback import Callback
from eventtrain.core.signals import check_listener, describe_listener
from eventtrain.errors import MisconfigurationError, nearest
from eventtrain.events import EVENTS


class LambdaCallback(Callback):
    """A callback made of functions, one for each event that it is to listen to.

    Any number of them can be attached. They keep no state::

        LambdaCallback(on_train_epoch_end=lambda trainer, event: print(event.epoch, trainer.callback_metrics))

    Args:
        **handlers: By the name of a callback's method, ``on_<event>``: what is called as ``(trainer, event=event)``.

    Raises:
        MisconfigurationError: There is no handler, a name is no event's, or a handler cannot be called like that.
    """

    def __init__(self, **handlers: Callable[..., Any]) -> None:
        if not handlers:
            raise MisconfigurationError(
                "LambdaCallback() listens to nothing. Give it functions by the names of a callback's methods: "
                "LambdaCallback(on_train_epoch_end=lambda trainer, event: ...)."
            )
        for name, handler in handlers.items():
            setattr(self, name, checked(name, handler))


def checked(name: str, handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler as a listener that says in error notes and ``describe()`` which it is.

    Args:
        name: What it was given as.
        handler: The function.

    Raises:
        MisconfigurationError: The name is not ``on_`` and an event's, or the function does not take ``(trainer, event)``.
    """
    event_name = name.removeprefix("on_")
    if not name.startswith("on_") or event_name not in EVENTS:
        known = [f"on_{event}" for event in EVENTS]
        hint = nearest(name, known, otherwise="eventtrain.events lists them all.")
        raise MisconfigurationError(f"LambdaCallback({name}=...) names no event. {hint}")
    described = f"LambdaCallback({name}={describe_function(handler)})"
    check_listener(handler, event_name, named=described)
    listener = partial(handler)  # of this callback alone: the function itself may be given to others too
    listener.described = described  # type: ignore[attr-defined]
    return listener


def describe_function(function: Any) -> str:
    """A function's name; for one without, where it is written."""
    code = getattr(function, "__code__", None)
    if code is not None and code.co_name == "<lambda>":
        return f"<lambda> at {Path(code.co_filename).name}:{code.co_firstlineno}"
    return describe_listener(function)
