"""What the trainer is given, checked: the errors come before anything runs."""

from __future__ import annotations

from typing import Any

from eventtrain.checks import check_whole_number
from eventtrain.data.limits import Limit, check_limit
from eventtrain.errors import MisconfigurationError
from eventtrain.events import Stage
from eventtrain.module.datamodule import LightningDataModule
from eventtrain.module.module import LightningModule


def limit_name(stage: Stage) -> str:
    """The argument of :class:`Trainer` that limits a stage."""
    return f"limit_{'val' if stage == 'validation' else stage}_batches"


def val_interval(interval: Limit, batches: int | None, *, across_epochs: bool) -> int | None:
    """Batches between two validations; None for one at the epoch's end.

    Args:
        interval: ``val_check_interval``.
        batches: Batches per epoch, None where unknown.
        across_epochs: The interval counts the run's batches.

    Raises:
        MisconfigurationError: The interval is longer than the epoch, or a fraction of an unknown length.
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
    """Refuses what is no module.

    Raises:
        MisconfigurationError: It is not.
    """
    if isinstance(module, LightningModule):
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


def check_datamodule(datamodule: Any) -> LightningDataModule | None:
    """Refuses what is no datamodule.

    Raises:
        MisconfigurationError: It is not.
    """
    if datamodule is None or isinstance(datamodule, LightningDataModule):
        return datamodule
    raise MisconfigurationError(
        f"datamodule is a {type(datamodule).__name__}. It has to derive from eventtrain.LightningDataModule; loaders are given "
        "as train_dataloaders=... and val_dataloaders=...."
    )


def check_interval(interval: Limit, every_n_epoch: int | None) -> Limit:
    """Refuses what is no interval of validations.

    Raises:
        MisconfigurationError: It is not.
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
    return interval


def check_extent(max_epochs: Any, max_steps: Any, min_epochs: Any, min_steps: Any, fast_dev_run: bool) -> None:
    """Refuses a run without an end, or with an impossible one.

    Raises:
        MisconfigurationError: It is such.
    """
    if max_epochs is None and max_steps in (None, -1) and not fast_dev_run:
        raise MisconfigurationError(
            "The run has no end: give Trainer(max_epochs=...) or Trainer(max_steps=...); max_epochs=-1 for a run that only a "
            "callback stops."
        )
    for named, value, least in (
        ("max_epochs", max_epochs, -1),
        ("max_steps", max_steps, -1),
        ("min_epochs", min_epochs, 0),
        ("min_steps", min_steps, 0),
    ):
        if value is not None:
            check_whole_number(value, "Trainer", named, least=least)
