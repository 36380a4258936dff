"""``save_hyperparameters()`` and ``hparams``."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from argparse import Namespace
from collections.abc import Iterable, Mapping
from types import FrameType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import nn

from eventtrain.errors import MisconfigurationError


class AttributeDict(dict[str, Any]):
    """A dict whose string keys are attributes too.

    Example:
        >>> AttributeDict(width=3).width
        3
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"There is no hyperparameter {name!r}; there are {list(self)}.") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


if TYPE_CHECKING:
    of_class = classmethod
else:

    class of_class(classmethod):
        """A class method that refuses to be called on an object, which it would not change."""

        def __get__(self, instance, owner=None):
            """Return the bound method."""
            if instance is None:
                return super().__get__(instance, owner)
            kind, name = type(instance).__name__, self.__func__.__name__

            def refuse(*args: Any, **kwargs: Any) -> None:
                raise MisconfigurationError(
                    f"{name} builds a new object and leaves this {kind} as it is. Call it on the class, and use the result: "
                    f"model = {kind}.{name}(...)."
                )

            return refuse


class HyperparametersMixin:
    """Saves the arguments of an object's constructor, so that checkpoints and loggers know them.

    Attributes:
        CHECKPOINT_HYPER_PARAMS_KEY: The key of the values in a checkpoint.
        CHECKPOINT_HYPER_PARAMS_NAME: The key of the name of the argument that held them all, if one did.
        CHECKPOINT_HYPER_PARAMS_TYPE: The key of the notes of their types.
    """

    CHECKPOINT_HYPER_PARAMS_KEY = "hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "hparams_type"

    def save_hyperparameters(
        self, *args: Any, ignore: str | Iterable[str] | None = None, logger: bool = True, frame: FrameType | None = None
    ) -> None:
        """Save the arguments of the calling ``__init__`` in :attr:`hparams`.

        Args:
            *args: The names of the arguments to save, all of them if no name is given; or one mapping, namespace or
                dataclass object that holds the values.
            ignore: Names to leave out, also in the calls of other classes of the object that do not give the name.
            logger: Whether loggers get them.
            frame: The frame of the ``__init__``; None for the caller's.

        Raises:
            MisconfigurationError: If the ``__init__`` has no argument of a given name, or several objects are given.

        Example:
            >>> from eventtrain import LightningModule
            >>> class Model(LightningModule):
            ...     def __init__(self, width, lr=0.1):
            ...         super().__init__()
            ...         self.save_hyperparameters()
            >>> Model(3).hparams
            {'width': 3, 'lr': 0.1}
        """
        if frame is None:
            current = inspect.currentframe()
            frame = current.f_back if current is not None else None
        values = _init_arguments(self, frame)
        holder, kind, by_name = self.__dict__.get("_hparams_object", (None, None, []))
        if len(args) == 1 and not isinstance(args[0], str):
            holder = next((name for name, value in values.items() if value is args[0]), None)
            values = {} if args[0] is None else fields_of(args[0])
            kind = kind_of(args[0]) or (None if isinstance(args[0], dict | None) else "namespace")
        else:
            for name in args:
                if not isinstance(name, str) or name not in values:
                    raise MisconfigurationError(
                        f"save_hyperparameters({name!r}): {type(self).__name__}.__init__ has no such argument; it has "
                        f"{sorted(values)}."
                    )
            values = {name: values[name] for name in args or values if name != holder or name in args}
            by_name = [*by_name, *values]
        ignored: set[str] = self.__dict__.setdefault("_hparams_ignored", set())
        ignored -= {name for name in args if isinstance(name, str)}
        ignored |= {ignore} if isinstance(ignore, str) else set(ignore or ())
        self.hparams.update(values)
        for name in ignored:
            self.hparams.pop(name, None)
        self.__dict__["_hparams_object"] = (holder, kind, by_name)
        self.__dict__["_hparams_initial"] = _copied(self.hparams)
        self.__dict__["_log_hyperparams"] = logger

    @property
    def hparams(self) -> AttributeDict:
        """The saved hyperparameters, also as attributes.

        Example:
            >>> from eventtrain import LightningModule
            >>> module = LightningModule()
            >>> module.save_hyperparameters({"width": 3})
            >>> module.hparams.width
            3
        """
        saved: AttributeDict = self.__dict__.setdefault("_hparams", AttributeDict())
        return saved

    @property
    def logs_hparams(self) -> bool:
        """Whether loggers write :attr:`hparams`: there are some, and ``logger=False`` was not given.

        Example:
            >>> from eventtrain import LightningModule
            >>> module = LightningModule()
            >>> module.save_hyperparameters({"width": 3}, logger=False)
            >>> module.logs_hparams
            False
        """
        return bool(self.hparams) and bool(self.__dict__.get("_log_hyperparams", True))

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of the hyperparameters as they were when they were saved.

        Example:
            >>> from eventtrain import LightningModule
            >>> module = LightningModule()
            >>> module.save_hyperparameters({"width": 3})
            >>> module.hparams.width = 4
            >>> module.hparams_initial
            {'width': 3}
        """
        initial: AttributeDict = self.__dict__.get("_hparams_initial", AttributeDict())
        return _copied(initial)


def fields_of(values: Any) -> dict[str, Any]:
    """Return the values that an object holds, by name.

    Args:
        values: A mapping, a namespace, an object of a dataclass, a named tuple, or another object with attributes.

    Raises:
        MisconfigurationError: If it is anything else.
    """
    if isinstance(values, Mapping):
        return dict(values.items())
    if isinstance(values, tuple) and (names := getattr(values, "__match_args__", ())):  # a named tuple's fields
        return dict(zip(names, values, strict=True))
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        return {each.name: getattr(values, each.name) for each in dataclasses.fields(values) if hasattr(values, each.name)}
    if hasattr(values, "__dict__") and not isinstance(values, type):
        return dict(vars(values))
    raise MisconfigurationError(
        f"save_hyperparameters got {values!r} ({type(values).__name__}). Give names of arguments, or one mapping, namespace "
        "or dataclass object."
    )


def kind_of(value: Any) -> str | None:
    """Return a note of the type of an object that consists of named values; None for a dict, and for anything else."""
    if isinstance(value, Mapping):
        return None if type(value) is dict else "mapping"
    if isinstance(value, (Namespace, SimpleNamespace)):
        return "namespace"
    if isinstance(value, type) or not hasattr(value, "__match_args__" if isinstance(value, tuple) else "__dataclass_fields__"):
        return None
    return f"record {type(value).__module__}:{type(value).__qualname__}"


def _copied(values: Mapping[str, Any]) -> AttributeDict:
    """Return a deep copy, in which values that cannot be copied are the same objects."""
    copies = AttributeDict()
    for name, value in values.items():
        try:
            copies[name] = value if isinstance(value, nn.Module) else copy.deepcopy(value)
        except Exception:  # each kind of object has its own: a lock, a generator, an open file
            copies[name] = value
    return copies


def _init_arguments(instance: Any, frame: FrameType | None) -> dict[str, Any]:
    """Return the arguments of the calls of an object's ``__init__`` that a frame is in, those of subclasses too."""
    collected: dict[str, Any] = {}
    own_call = True
    while frame is not None:
        if frame.f_code.co_name == "__init__":
            names, positional, keywords, values = inspect.getargvalues(frame)
            if names and values.get(names[0]) is instance:
                # A subclass may only pass on its positional arguments.
                more = [positional] if own_call and positional and values[positional] else []
                # Those of a subclass come later and win: the object was built with them.
                collected.update({name: values[name] for name in [*names[1:], *more] if name in values})
                collected.update(values[keywords] if keywords else {})
                own_call = False
        frame = frame.f_back
    return collected
