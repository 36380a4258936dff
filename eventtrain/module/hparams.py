"""``save_hyperparameters()`` and ``hparams``."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

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
            raise AttributeError(f"There is no hyperparameter {name!r}; there are {sorted(self)}.") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class HyperparametersMixin:
    """Saves the arguments of an object's constructor, so that checkpoints and loggers know them."""

    def save_hyperparameters(
        self, *args: Any, ignore: str | Iterable[str] | None = None, logger: bool = True, frame: FrameType | None = None
    ) -> None:
        """Save the arguments of the calling ``__init__`` in :attr:`hparams`.

        Args:
            *args: The names of the arguments to save, all of them if no name is given; or one mapping, namespace or
                dataclass object that holds the values.
            ignore: Names to leave out.
            logger: Whether loggers get them.
            frame: The frame of the ``__init__``; None for the caller's.

        Raises:
            MisconfigurationError: If the ``__init__`` has no argument of a given name.

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
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        if len(args) == 1 and not isinstance(args[0], str):
            values = _as_mapping(args[0])
        else:
            values = _init_arguments(self, frame)
            for name in args:
                if name not in values:
                    raise MisconfigurationError(
                        f"save_hyperparameters({name!r}): {type(self).__name__}.__init__ has no such argument; it has "
                        f"{sorted(values)}."
                    )
            if args:
                values = {name: values[name] for name in args}
        self.hparams.update({name: value for name, value in values.items() if name not in ignored})
        object.__setattr__(self, "_hparams_initial", copy.deepcopy(AttributeDict(self.hparams)))
        object.__setattr__(self, "_log_hyperparams", logger)

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
        return copy.deepcopy(initial)


def _as_mapping(values: Any) -> dict[str, Any]:
    if isinstance(values, Mapping):
        return dict(values)
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        return {declared.name: getattr(values, declared.name) for declared in dataclasses.fields(values)}
    if hasattr(values, "__dict__"):
        return dict(vars(values))
    raise MisconfigurationError(
        f"save_hyperparameters got {values!r} ({type(values).__name__}). Give names of arguments, or one mapping, namespace "
        "or dataclass object."
    )


def _init_arguments(instance: Any, frame: FrameType | None) -> dict[str, Any]:
    """Return the arguments of the ``__init__`` of a frame, and of the ``__init__`` of subclasses that called it."""
    collected: dict[str, Any] = {}
    while frame is not None and frame.f_code.co_name == "__init__":
        names, _varargs, keywords, values = inspect.getargvalues(frame)
        if not names or values.get(names[0]) is not instance:
            break
        arguments = {name: values[name] for name in names[1:]}
        if keywords:
            arguments.update(values[keywords])
        # Those of a subclass come later and win: the object was built with them.
        collected.update(arguments)
        frame = frame.f_back
    return {name: value for name, value in collected.items() if not name.startswith("__")}
