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
    """A dict whose string keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"There is no hyperparameter {name!r}; there are {sorted(self)}.") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class HyperparametersMixin:
    """Keeps what an object was built with, so that checkpoints and loggers know it."""

    def save_hyperparameters(
        self, *args: Any, ignore: str | Iterable[str] | None = None, logger: bool = True, frame: FrameType | None = None
    ) -> None:
        """Keeps the arguments of the calling ``__init__`` in :attr:`hparams`.

        Args:
            *args: The names of the arguments to keep, all where none is named; or one mapping, namespace or
                dataclass object that holds them.
            ignore: Names to leave out.
            logger: Whether loggers get them.
            frame: The frame of the ``__init__``; the caller's where None.

        Raises:
            MisconfigurationError: A name is no argument of the ``__init__``.
        """
        if frame is None:
            current = inspect.currentframe()
            frame = current.f_back if current is not None else None
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        if len(args) == 1 and not isinstance(args[0], str):
            given = _as_mapping(args[0])
        else:
            given = _init_arguments(self, frame)
            for name in args:
                if name not in given:
                    raise MisconfigurationError(
                        f"save_hyperparameters({name!r}): {type(self).__name__}.__init__ has no such argument; it has "
                        f"{sorted(given)}."
                    )
            if args:
                given = {name: given[name] for name in args}
        kept = {name: value for name, value in given.items() if name not in ignored}
        self.hparams.update(kept)
        object.__setattr__(self, "_hparams_initial", copy.deepcopy(AttributeDict(self.hparams)))
        object.__setattr__(self, "_log_hyperparams", logger)

    @property
    def hparams(self) -> AttributeDict:
        """The kept hyperparameters, also as attributes."""
        kept: AttributeDict = self.__dict__.setdefault("_hparams", AttributeDict())
        return kept

    @property
    def logs_hparams(self) -> bool:
        """Whether loggers write :attr:`hparams`: there are some, and ``logger=False`` was not given."""
        return bool(self.hparams) and bool(self.__dict__.get("_log_hyperparams", True))

    @property
    def hparams_initial(self) -> AttributeDict:
        """The hyperparameters as they were when they were kept."""
        kept: AttributeDict = self.__dict__.get("_hparams_initial", AttributeDict())
        return copy.deepcopy(kept)


def _as_mapping(given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        return {declared.name: getattr(given, declared.name) for declared in dataclasses.fields(given)}
    if hasattr(given, "__dict__"):
        return dict(vars(given))
    raise MisconfigurationError(
        f"save_hyperparameters got {given!r} ({type(given).__name__}). Give names of arguments, or one mapping, namespace or "
        "dataclass object."
    )


def _init_arguments(instance: Any, frame: FrameType | None) -> dict[str, Any]:
    """The arguments of the ``__init__`` of a frame, and of the subclasses' that called it."""
    collected: dict[str, Any] = {}
    while frame is not None and frame.f_code.co_name == "__init__":
        names, _varargs, keywords, values = inspect.getargvalues(frame)
        if not names or values.get(names[0]) is not instance:
            break
        own = {name: values[name] for name in names[1:]}
        if keywords:
            own.update(values[keywords])
        # A subclass's arguments are further out, and are what the object was built with.
        collected.update(own)
        frame = frame.f_back
    return {name: value for name, value in collected.items() if not name.startswith("__")}
