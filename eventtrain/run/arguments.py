"""The trainer's arguments, checked before anything runs."""

from __future__ import annotations

import inspect
import reprlib
from dataclasses import dataclass
from typing import Any

from eventtrain.checks import check_option, check_whole_number
from eventtrain.core.state import RunLimits
from eventtrain.data.device import resolve_device
from eventtrain.data.limits import Limit, check_limit, limit_name
from eventtrain.errors import MisconfigurationError
from eventtrain.events import Stage
from eventtrain.hints import hint, tables
from eventtrain.module.module import LightningModule


@dataclass(slots=True)
class RunArguments:
    """The arguments of a trainer that shape its runs; see :class:`~eventtrain.Trainer`.

    Raises:
        MisconfigurationError: If an argument cannot be right.
    """

    max_epochs: int | None
    min_epochs: int | None
    max_steps: int | None
    min_steps: int | None
    batch_limits: dict[Stage, Limit]
    val_check_interval: Limit
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: int
    fast_dev_run: int
    read_ahead: bool
    inference_mode: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.fast_dev_run, bool):
            check_whole_number(self.fast_dev_run, "Trainer", "fast_dev_run")
        self.fast_dev_run = int(self.fast_dev_run)
        for argument, least in (("max_epochs", -1), ("max_steps", -1), ("min_epochs", 0), ("min_steps", 0)):
            if (value := getattr(self, argument)) is not None:
                check_whole_number(value, "Trainer", argument, least=least)
        for stage, limit in self.batch_limits.items():
            check_limit(limit, limit_name(stage))
        check_interval(self.val_check_interval, self.check_val_every_n_epoch)
        check_option(self.read_ahead, "Trainer", "read_ahead", (True, False))
        check_whole_number(self.num_sanity_val_steps, "Trainer", "num_sanity_val_steps", least=-1)
        check_option(self.inference_mode, "Trainer", "inference_mode", (True, False))
        if self.fast_dev_run:
            self.max_epochs, self.max_steps, self.min_epochs, self.min_steps = 1, None, None, None
            self.batch_limits = dict.fromkeys(self.batch_limits, self.fast_dev_run)
            self.val_check_interval, self.check_val_every_n_epoch, self.num_sanity_val_steps = None, 1, 0

    def limits(self) -> RunLimits:
        """Return the limits of a fit whose training loader is not known yet."""
        return RunLimits(
            max_epochs=None if self.max_epochs == -1 else self.max_epochs,
            max_steps=None if self.max_steps == -1 else self.max_steps,
            min_epochs=self.min_epochs or 0,
            min_steps=self.min_steps or 0,
            check_val_every_n_epoch=self.check_val_every_n_epoch,
        )

    def check_end(self) -> None:
        """Check that a fit would end.

        Raises:
            MisconfigurationError: If neither ``max_epochs`` nor ``max_steps`` is set.
        """
        if self.max_epochs is None and self.max_steps in (None, -1):
            raise MisconfigurationError(
                "The run has no end: give Trainer(max_epochs=...) or Trainer(max_steps=...); max_epochs=-1 for a run that only "
                "a callback stops."
            )


def check_interval(interval: Limit, every_n_epoch: int | None) -> None:
    """Check ``val_check_interval`` and ``check_val_every_n_epoch``.

    Raises:
        MisconfigurationError: If there is no such interval.
    """
    if every_n_epoch is not None:
        check_whole_number(every_n_epoch, "Trainer", "check_val_every_n_epoch", least=1)
    elif not isinstance(interval, int):
        raise MisconfigurationError(
            f"check_val_every_n_epoch=None counts the batches of the run, so val_check_interval has to be their number; it is "
            f"{interval!r}."
        )
    check_limit(interval, "val_check_interval")
    if interval is not None and interval == 0:
        raise MisconfigurationError("val_check_interval=0: for no validation give limit_val_batches=0.")


def validation_interval(interval: Limit, batches: int | None, *, across_epochs: bool) -> int | None:
    """Return the batches between two validations; None for one at the epoch's end.

    Args:
        interval: ``val_check_interval``.
        batches: Batches per epoch; None if unknown.
        across_epochs: The interval counts the run's batches.

    Raises:
        MisconfigurationError: If the interval is longer than the epoch, or a fraction of an unknown length.
    """
    if interval is None or (isinstance(interval, float) and interval == 1.0):
        return None
    if isinstance(interval, float):
        if batches is None:
            raise MisconfigurationError(
                f"val_check_interval={interval!r} is a fraction of an epoch whose length is unknown. Give a number of batches."
            )
        return max(1, int(batches * interval))
    if batches is not None and interval > batches and not across_epochs:
        raise MisconfigurationError(
            f"val_check_interval={interval} is longer than the epoch, which has {batches} batches, so nothing would ever be "
            "validated. Give at most that, or check_val_every_n_epoch=None to count the batches of the run."
        )
    return interval


def check_module(module: Any) -> LightningModule:
    """Return a value if it is a module.

    Raises:
        MisconfigurationError: If it is anything else.
    """
    if isinstance(module, LightningModule):
        if "training" not in vars(module):
            raise MisconfigurationError(f"{type(module).__name__}.__init__ does not call `super().__init__()`. Do it first.")
        return module
    if module is None:
        raise MisconfigurationError("There is no module yet: give one to this call, or call fit first.")
    if isinstance(module, type):
        raise MisconfigurationError(f"{module.__name__} is a class. Give an object of it: {module.__name__}(...).")
    kind = type(module)
    if any(base.__name__ == "LightningModule" for base in kind.__mro__):
        raise MisconfigurationError(
            f"{kind.__name__} derives from {kind.__module__.partition('.')[0]}'s LightningModule. Change the import: "
            "`from eventtrain import LightningModule`."
        )
    raise MisconfigurationError(f"The model is a {kind.__name__}. It has to derive from eventtrain.LightningModule.")


def checked_attribute(trainer: Any, name: str, value: Any) -> Any:
    """Return the value of an attribute of a trainer that is being set, if setting it has an effect.

    Args:
        trainer: The trainer.
        name: The attribute's name.
        value: The value that the user wrote.

    Raises:
        MisconfigurationError: If it is read-only, an argument, or unknown. A subclass may have others of its own.
    """
    kind, attributes = type(trainer), vars(trainer)
    if name == "callbacks" and name in attributes:
        trainer.callbacks.become(value)
        return trainer.callbacks
    if "_run" not in attributes:  # the trainer is being made
        return value
    if name == "device":
        return resolve_device(value)
    member = getattr(kind, name, None)
    arguments = inspect.signature(kind.__mro__[-2]).parameters
    read_only = isinstance(member, property) and member.fset is None
    if not read_only and (hasattr(kind, name) or name in attributes or name.startswith("_")):
        return value
    if name in arguments:
        remedy = f"Give Trainer({name}=...)."
    elif read_only and name not in tables()["Trainer"]:
        remedy = "It is read-only, because the run writes it."
    elif not read_only and len(kind.__mro__) > 2:
        return value
    else:
        known = [other for other in (*attributes, *dir(kind), *arguments) if not other.startswith("_")]
        remedy = hint("Trainer", name, known, value=value)
        remedy = remedy or "Keep values of your own in the module, a callback, or a subclass of Trainer."
    raise MisconfigurationError(f"trainer.{name} = {reprlib.repr(value)} would change nothing. {remedy}")
