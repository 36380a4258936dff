"""The base class of callbacks, and the checks when one is attached."""

from __future__ import annotations

import copyreg
import dis
import inspect
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, SupportsIndex, TypeVar

from eventtrain.core.signals import EventSignal, Signals, check_listener
from eventtrain.errors import MisconfigurationError
from eventtrain.events import EVENTS
from eventtrain.hints import explained, hint, tables
from eventtrain.module.hooks import CallbackHooks

F = TypeVar("F", bound=Callable[..., Any])
LIBRARIES = ("lightning", "lightning_fabric", "pytorch_lightning", "lightning_utilities", "transformers", "keras", "composer")
"""The libraries whose callbacks and loggers people bring."""


def on_demand(handler: F) -> F:
    """Mark a handler that is called only in runs that ask for it, by ``trainer.listen(self.on_...)``.

    The handler is connected like any other, in the order of attachment, and ``trainer.describe()`` shows it. It is idle until
    the run asks for it, and costs nothing then: if no other listener is there, the event is not even built. Every run begins
    with it idle.

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
        ...         print("batch", event.batch_idx)
        >>> trainer = Trainer(max_epochs=1, callbacks=[PrintBatches(True)], device="cpu", default_callbacks=False)
        >>> trainer.fit(Line(), [torch.ones(4, 1)])
        batch 0
    """
    handler._on_demand = True  # type: ignore[attr-defined]
    return handler


def decides_alike(handler: F) -> F:
    """Mark a listener of ``before_optimizer_step`` that decides alike in all processes, because it decides by reduced gradients
    or by values that are the same everywhere. Then several processes do not have to agree on its vetoes in each step.

    Args:
        handler: A callback's ``on_before_optimizer_step`` method, or a function that is connected to the event.

    Returns:
        The same function.

    Example:
        >>> class SkipEveryThird(Callback):
        ...     @decides_alike
        ...     def on_before_optimizer_step(self, trainer, event):
        ...         if trainer.total_batch_idx % 3 == 2:
        ...             event.skip("each third")
        >>> trainer = Trainer(max_epochs=1, callbacks=SkipEveryThird(), device="cpu", default_callbacks=False)
        >>> trainer.fit(Line(), [torch.ones(4, 1)] * 3)
        >>> trainer.global_step
        2
    """
    handler.decides_alike = True  # type: ignore[attr-defined]
    return handler


def is_on_demand(handler: Any) -> bool:
    """Return whether a handler is marked by :func:`on_demand`, itself or the method of a base class that it overrides."""
    kind = type(getattr(handler, "__self__", None))
    methods = [vars(base).get(getattr(handler, "__name__", "")) for base in kind.__mro__]
    return any(getattr(method, "_on_demand", False) is True for method in [handler, *methods])


class Callback(CallbackHooks):
    """Listens to the events for which it has ``on_<event>(self, trainer, event)`` methods.

    Any object with such methods can be attached; this class adds state that goes into checkpoints.

    Attributes:
        role: A role that one callback of a trainer can have, such as ``"precision"``; None for any number of them.

    Example:
        >>> class CountUpdates(Callback):
        ...     updates = 0
        ...     def on_after_update(self, trainer, event):
        ...         self.updates += 1
        ...     def state_dict(self):
        ...         return {"updates": self.updates}
        ...     def load_state_dict(self, state):
        ...         self.updates = state["updates"]
        >>> counter = CountUpdates()
        >>> Trainer(max_epochs=2, callbacks=[counter], device="cpu", default_callbacks=False).fit(Line(), [torch.ones(4, 1)])
        >>> counter.updates
        2
    """

    role: str | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.startswith("eventtrain.callbacks.") and "__init__" in vars(cls):
            cls.__init__ = explained(cls.__init__)  # type: ignore[method-assign]

    @property
    def state_key(self) -> str:
        """The name of this callback's state in a checkpoint: unique in a trainer, the same in all runs."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps: tensors, numbers, strings, lists and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned.

        Args:
            state: The state.
        """


def has_state(callback: Any) -> bool:
    """Return whether a callback keeps anything in checkpoints."""
    method = getattr(type(callback), "state_dict", None)
    return method is not None and method is not Callback.state_dict


def state_key(callback: Any) -> str:
    """Return a callback's key in a checkpoint; the class's name for an object that is not a :class:`Callback`."""
    return str(getattr(callback, "state_key", type(callback).__qualname__))


def handlers(callback: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the events that a callback handles, as pairs of signal name and bound method.

    Raises:
        MisconfigurationError: If a method's name begins with ``on_`` and names no event, or the method does not take
            ``(trainer, event)``.
    """
    name = type(callback).__name__
    for attribute in dir(callback):
        if not attribute.startswith("on_") or not callable(method := getattr(callback, attribute)):
            continue
        event_name = attribute.removeprefix("on_")
        if event_name not in EVENTS:
            remedy = hint("callback", attribute, [f"on_{known}" for known in EVENTS])
            message = f"{name}.{attribute} names no event. {remedy}".rstrip()
            raise MisconfigurationError(f"{message} Rename the method: those that begin with 'on_' are listeners.")
        if getattr(method, "__func__", None) is getattr(CallbackHooks, attribute):
            continue  # not overridden
        check_listener(method, event_name, named=f"{name}.{attribute}")
        yield event_name, method


def check_class(callback: Any) -> None:
    """Check that a callback is written for eventtrain, and that its base classes were initialized.

    Raises:
        MisconfigurationError: If it belongs to another library, a method would listen but for its name, or an ``__init__`` does
            not call that of its base class.
    """
    kind = type(callback)
    for base in kind.__mro__:
        library = base.__module__.partition(".")[0]
        if library in LIBRARIES and not isinstance(callback, Callback) and (remedy := tables()["class"].get(base.__name__)):
            raise MisconfigurationError(f"{kind.__name__}: {library}'s {base.__name__} does not work here. {remedy}")
    for event_name in EVENTS:
        if not inspect.isfunction(method := getattr(kind, event_name, None)):
            continue
        signature = inspect.signature(method)
        takes_any = any(each.kind is each.VAR_POSITIONAL for each in signature.parameters.values())
        if takes_any or {"stage", "pl_module", "event"} & signature.parameters.keys():
            raise MisconfigurationError(
                f"{kind.__name__}.{event_name}{signature} is never called. "
                f"Write `def on_{event_name}(self, trainer, event)`; the module is `trainer.module`."
            )
    for base in kind.__mro__[1:]:
        code = getattr(inspect.unwrap(vars(base).get("__init__", object.__init__)), "__code__", None)
        steps = list(dis.get_instructions(code)) if code else []
        attributes = [
            step.argval
            for loaded, step in pairwise(steps)
            if step.opname == "STORE_ATTR" and loaded.argrepr.split(", ")[-1] == "self"
        ]
        if attributes and not any(hasattr(callback, attribute) for attribute in attributes):
            raise MisconfigurationError(
                f"{kind.__name__}.__init__ does not call `super().__init__(...)`, which sets the attributes of {base.__name__}."
            )


def check_together(callback: Any, attached: list[Any]) -> None:
    """Check that a callback can share a run with the attached ones.

    Raises:
        MisconfigurationError: If it is attached already, or has the role or the state key of another.
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
    key = getattr(type(callback), "state_key", None)
    is_named = key is not None and key is not Callback.state_key
    return is_named or has_state(callback)


def listed(callbacks: Any) -> list[Any]:
    """Return callbacks as a list: those of an iterable, one alone, or none for None."""
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, Iterable) and not isinstance(callbacks, str) else [callbacks]


class AttachedCallbacks(list[Any]):
    """The callbacks of a trainer, in the order in which they are called: to add one attaches it, to remove one detaches it.

    Args:
        signals: The trainer's signals.

    Example:
        >>> class PrintLoss(Callback):
        ...     def on_train_batch_end(self, trainer, event):
        ...         print("loss", event.loss.item())
        >>> trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False)
        >>> trainer.callbacks.append(PrintLoss())
        >>> len(trainer.signals.train_batch_end.listeners)
        1
        >>> trainer.callbacks.clear()
        >>> len(trainer.signals.train_batch_end.listeners)
        0
    """

    def __init__(self, signals: Signals) -> None:
        super().__init__()
        self.signals = signals

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # Not by append, as other lists: the signals' own copies are connected to the callbacks already.
        return copyreg.__newobj__, (type(self),), (self.signals, list(self))  # type: ignore[attr-defined]

    def __setstate__(self, state: tuple[Signals, list[Any]]) -> None:
        self.signals, callbacks = state
        super().extend(callbacks)

    def become(self, callbacks: Any) -> None:
        """Detach the callbacks that are not among these, and attach those that are new.

        Args:
            callbacks: The callbacks of before, in their order, as far as they stay, and then new ones. One alone may be given
                without a list; None for none.

        Raises:
            MisconfigurationError: If they have another order, or if one cannot be attached.
        """
        wanted = listed(callbacks)
        staying = [each for each in self if any(each is other for other in wanted)]
        if any(one is not other for one, other in zip(staying, wanted, strict=False)):
            raise MisconfigurationError(
                "trainer.callbacks: callbacks are called in the order in which they were attached, and a new one comes last. "
                "Append it, or give Trainer(callbacks=[...]) in the order that you want."
            )
        for callback in self:
            if not any(callback is other for other in staying):
                for event_name, method in handlers(callback):
                    self.signals[event_name].disconnect(method)
        super().__setitem__(slice(None), staying)
        for callback in wanted[len(staying) :]:
            self._attach(callback)

    def signal_of(self, handler: Any) -> EventSignal:
        """Return the signal that calls a handler on demand.

        Args:
            handler: A method of an attached callback.

        Raises:
            MisconfigurationError: If it is not marked :func:`on_demand`, or its callback is not attached.
        """
        name = getattr(handler, "__name__", repr(handler))
        signal: EventSignal | None = getattr(self.signals.table, name.removeprefix("on_"), None)
        if signal is None or not is_on_demand(handler) or handler not in signal.attached():
            raise MisconfigurationError(
                f"trainer.listen({name}): give a method on_<event> of an attached callback that is marked with @on_demand."
            )
        return signal

    def _attach(self, callback: Any) -> None:
        """Connect a callback's handlers; all of its checks come before the first connection."""
        check_together(callback, self)
        check_class(callback)
        handled = list(handlers(callback))
        if not handled and not isinstance(callback, Callback):
            raise MisconfigurationError(
                f"{callback!r} ({type(callback).__name__}) was given as a callback and listens to nothing. A callback has "
                "methods on_<event>(self, trainer, event); a function is connected by "
                "trainer.signals.<event>.connect(function)."
            )
        for event_name, method in handled:
            self.signals[event_name].connect(method)
            if is_on_demand(method):
                self.signals[event_name].idle(method)
        super().append(callback)


def _changing(name: str) -> Callable[..., Any]:
    """Return a list's method that attaches and detaches what it adds and removes."""

    def change(callbacks: AttachedCallbacks, *args: Any, **kwargs: Any) -> Any:
        changed = list(callbacks)
        result = getattr(changed, name)(*args, **kwargs)
        callbacks.become(changed)
        return callbacks if result is changed else result

    return change


for _name in (
    *("append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse"),
    *("__iadd__", "__imul__", "__setitem__", "__delitem__"),
):
    setattr(AttachedCallbacks, _name, _changing(_name))


def make_idle(callback: Any, signals: Signals, *, replaced: bool = False) -> None:
    """Make a callback's handlers idle that are marked by :func:`on_demand`: a run is over. Wake the others.

    Args:
        callback: An attached callback.
        signals: The trainer's signals.
        replaced: Whether all handlers become idle, because another callback takes its place.
    """
    for event_name, method in handlers(callback):
        if replaced or is_on_demand(method):
            signals[event_name].idle(method)
        else:
            signals[event_name].wake(method)
