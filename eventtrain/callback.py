"""What a callback is, and what is checked when one is attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from eventtrain.core.signals import Signals, check_listener
from eventtrain.errors import MisconfigurationError, nearest
from eventtrain.events import EVENTS
from eventtrain.module.hooks import CallbackHooks

F = TypeVar("F", bound=Callable[..., Any])


def on_demand(handler: F) -> F:
    """Mark a handler that is called only in runs that ask for it, by ``trainer.listen(self.on_...)``.

    The handler is connected like any other, in the order of attachment, and ``trainer.describe()`` shows it. While nobody
    asks for it, it is idle and costs nothing: not even its event is built. Every run begins with it idle.

    Args:
        handler: A callback's ``on_<event>`` method.

    Returns:
        The same method.

    Example:
        >>> class PrintBatches(Callback):
        ...     def __init__(self, verbose):
        ...         self.verbose = verbose
        ...     def on_fit_start(self, trainer, event):
        ...         if self.verbose:
        ...             trainer.listen(self.on_train_batch_end)
        ...     @on_demand
        ...     def on_train_batch_end(self, trainer, event):
        ...         print(event.batch_idx)
    """
    handler._on_demand = True  # type: ignore[attr-defined]
    return handler


def is_on_demand(handler: Any) -> bool:
    """Return whether a handler is marked by :func:`on_demand`."""
    return getattr(handler, "_on_demand", False) is True


class Callback(CallbackHooks):
    """Listens to the events that it has ``on_<event>(self, trainer, event)`` methods for.

    Any object with such methods can be attached; this class adds state that goes into checkpoints.

    Attributes:
        role: What at most one callback of a trainer can be, such as ``"precision"``; None for any number.
    """

    role: str | None = None

    @property
    def state_key(self) -> str:
        """The name of this callback's state in a checkpoint: unique in a trainer, stable across runs."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback: tensors, numbers, strings, lists, dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave.

        Args:
            state: The kept state.
        """


def has_state(callback: Any) -> bool:
    """Whether a callback keeps anything in checkpoints."""
    own = getattr(type(callback), "state_dict", None)
    return own is not None and own is not Callback.state_dict


def state_key(callback: Any) -> str:
    """A callback's key in a checkpoint; the class's name for objects that are no :class:`Callback`."""
    return str(getattr(callback, "state_key", type(callback).__qualname__))


def handlers(callback: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The events that a callback handles, as pairs of signal name and bound method.

    Raises:
        MisconfigurationError: A method's name begins with ``on_`` and names no event, or the method does
            not take ``(trainer, event)``.
    """
    name = type(callback).__name__
    for attribute in dir(callback):
        if not attribute.startswith("on_") or not callable(method := getattr(callback, attribute)):
            continue
        event_name = attribute.removeprefix("on_")
        if event_name not in EVENTS:
            hint = nearest(attribute, [f"on_{known}" for known in EVENTS])
            message = f"{name}.{attribute} names no event. {hint}".rstrip()
            raise MisconfigurationError(f"{message} Rename the method: those that begin with 'on_' are listeners.")
        if getattr(method, "__func__", None) is getattr(CallbackHooks, attribute):
            continue  # not overridden
        check_listener(method, event_name, named=f"{name}.{attribute}")
        yield event_name, method


def check_together(callback: Any, attached: list[Any]) -> None:
    """Refuses a callback that cannot share a run with those that are attached.

    Raises:
        MisconfigurationError: It is attached already, has the role of another, or the state key of one.
    """
    name = type(callback).__name__
    if isinstance(callback, type):
        raise MisconfigurationError(f"{callback.__name__} is a class. Attach an object: {callback.__name__}(...).")
    for other in attached:
        if other is callback:
            raise MisconfigurationError(f"This {name} is attached twice. Give it once in callbacks=[...].")
        role = getattr(callback, "role", None)
        if role is not None and role == getattr(other, "role", None):
            raise MisconfigurationError(
                f"{type(other).__name__} and {name} both have the role {role!r}, which one callback of a "
                "trainer can have. Keep one of them."
            )
        if _claims_key(callback) and _claims_key(other) and state_key(callback) == state_key(other):
            raise MisconfigurationError(
                f"{type(other).__name__} and {name} both keep state under the key {state_key(callback)!r}. "
                f"Override `state_key` in one of them, for example with what it was built with."
            )


def _claims_key(callback: Any) -> bool:
    own = getattr(type(callback), "state_key", None)
    named = own is not None and own is not Callback.state_key
    return named or has_state(callback)


def attach(callback: Any, signals: Signals, attached: list[Any]) -> None:
    """Connects a callback's handlers; all of its checks come before the first connection.

    Args:
        callback: The callback.
        signals: The trainer's signals.
        attached: The callbacks attached so far; this one is appended.

    Raises:
        MisconfigurationError: See :func:`handlers` and :func:`check_together`.
    """
    check_together(callback, attached)
    handled = list(handlers(callback))
    if not handled and not isinstance(callback, Callback):
        raise MisconfigurationError(
            f"{callback!r} ({type(callback).__name__}) was given as a callback and listens to nothing. A callback has methods "
            "on_<event>(self, trainer, event); a function is connected by trainer.signals.<event>.connect(function)."
        )
    for event_name, method in handled:
        signals[event_name].connect(method)
        if is_on_demand(method):
            signals[event_name].idle(method)
    attached.append(callback)


def make_idle(callback: Any, signals: Signals) -> None:
    """Make a callback's handlers idle that are marked by :func:`on_demand`: a run is over.

    Args:
        callback: An attached callback.
        signals: The trainer's signals.
    """
    for event_name, method in handlers(callback):
        if is_on_demand(method):
            signals[event_name].idle(method)


def detach(callback: Any, signals: Signals, attached: list[Any]) -> None:
    """Undoes :func:`attach`.

    Args:
        callback: An attached callback.
        signals: The trainer's signals.
        attached: The attached callbacks; this one is removed.
    """
    for event_name, method in list(handlers(callback)):
        signals[event_name].disconnect(method)
    attached[:] = [other for other in attached if other is not callback]
