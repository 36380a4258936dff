"""The shape of a checkpoint of the current schema: a file is input, and an error names it and the key that is wrong."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from eventtrain.errors import MisconfigurationError, escaped, printable

REMEDY = "The file was changed, or another program wrote it: resume another checkpoint, or load only the weights."


class Fields:
    """A dict with certain keys, and perhaps others.

    Args:
        optional: The keys that older files may lack, with their shapes.
        **required: The others.
    """

    def __init__(self, optional: Mapping[str, Any] | None = None, **required: Any) -> None:
        self.required, self.optional = required, optional or {}


class By:
    """A dict of any keys.

    Args:
        values: The shape of its values.
        keys: The type of its keys; None for any.
    """

    def __init__(self, values: Any, keys: Any = str) -> None:
        self.values, self.keys = values, keys


NUMBER = (float, torch.Tensor)
VALUES = By(NUMBER)
WINDOW = Fields(
    open=bool, contributions=float, weight=(None, *NUMBER), weight_reference=(None, *NUMBER), gradients=By(torch.Tensor)
)
ENTRY = Fields(name=str, suffix=str, options=[object], on_step=bool, on_epoch=bool, total=(None, torch.Tensor), weight=NUMBER)
METRICS = Fields(
    {"evaluated": int},
    entries=[ENTRY],
    metric_objects=dict,
    callback_metrics=VALUES,
    progress_bar_metrics=VALUES,
    logged_metrics=VALUES,
    fresh=VALUES,
    renewals=By(int),
)
RNG = Fields(python=(list, tuple), torch=torch.Tensor)
MARK = (None, Fields(rng=RNG, generators=(list, dict)))
POSITION = Fields(batches=int, length=(None, int), has_ended=bool, began=MARK, before_ahead=MARK, state=object)
DATA = Fields(
    {"first_epoch_batches": (None, int)},
    seed=(None, int),
    passes=By((int, list)),
    loader=object,
    generators=By(list),
    position=(None, POSITION),
)
OF_A_RANK: dict[str, Any] = {"window": WINDOW, "metrics": (None, METRICS), "rng": (None, RNG), "data": (None, DATA)}
PROGRESS = Fields(
    {"epoch_is_over": bool},
    **dict.fromkeys(("current_epoch", "global_step", "batch_idx", "total_batch_idx", "validations", "validated_at"), int),
)
CHECKPOINT = Fields(
    {"datamodule": object, "sequence": int},
    state_dict=dict,
    requires_grad=By(bool),
    training=By(bool),
    optimizer_states=[dict],
    lr_schedulers=[(None, dict)],
    classes=By([str]),
    parameter_groups=(None, Fields(configured=[[[(None, str)]]], current=[[[(None, str)]]])),
    num_steps=[int],
    progress=PROGRESS,
    ranks=[Fields(**OF_A_RANK)],
    epoch_reason=(None, str),
    stop_reason=(None, str),
    callbacks=dict,
    **OF_A_RANK,
)


def check_shape(checkpoint: Mapping[str, Any], path: Any) -> None:
    """Check the types of the values of a checkpoint that a run uses later.

    Args:
        checkpoint: The checkpoint, in the current schema.
        path: Its file, for the error.

    Raises:
        MisconfigurationError: If a value is missing or has another type.

    Example:
        >>> check_shape({"state_dict": []}, "last.ckpt")
        Traceback (most recent call last):
        eventtrain.errors.MisconfigurationError: last.ckpt: 'state_dict' is a list, and has to be a dict. The file was ...
    """
    if (problem := mismatch(checkpoint, CHECKPOINT, "")) is not None:
        raise MisconfigurationError(f"{path}: {problem}. {REMEDY}")


def mismatch(value: Any, shape: Any, where: str) -> str | None:
    """Return how a value differs from a shape; None if it does not.

    Args:
        value: The value.
        shape: A type, None, a :class:`Fields`, a :class:`By`, a list with the shape of items, or a tuple of alternatives.
        where: The place of the value in the checkpoint.
    """
    if isinstance(shape, tuple):
        problems = [mismatch(value, each, where) for each in shape]
        if None in problems:
            return None
        inner = [each for each in problems if each is not None and not each.startswith(f"{where} is ")]
        return (inner or [f"{where} is {article(value)}, and has to be a {' or '.join(map(named, shape))}"])[0]
    if shape is object:
        return None
    if not is_of(value, kind_of(shape)):
        return f"{where} is {article(value)}, and has to be a {named(shape)}"
    for key, each, part in parts(value, shape):
        place = f"{where}[{key!r}]" if where else repr(key)
        if each is MISSING:
            return f"{place} is missing"
        if isinstance(shape, By) and not isinstance(key, shape.keys):
            return f"{where} holds the key {short(key)}, and has to hold names"
        if (problem := mismatch(each, part, place)) is not None:
            return problem
    return None


MISSING = object()


def parts(value: Any, shape: Any) -> Generator[tuple[Any, Any, Any], None, None]:
    """Yield the keys of a value, the values at them, and their shapes."""
    if isinstance(shape, Fields):
        yield from ((key, value.get(key, MISSING), part) for key, part in shape.required.items())
        yield from ((key, value[key], part) for key, part in shape.optional.items() if key in value)
    elif isinstance(shape, By):
        yield from ((key, each, shape.values) for key, each in value.items())
    elif isinstance(shape, list):
        yield from ((index, each, shape[0]) for index, each in enumerate(value))


def kind_of(shape: Any) -> Any:
    """Return the type of the values of a shape."""
    return dict if isinstance(shape, (Fields, By)) else list if isinstance(shape, list) else shape


def named(shape: Any) -> str:
    """Return a shape for an error."""
    return str(getattr(kind_of(shape), "__name__", shape))


@contextmanager
def believing(path: Any, key: str) -> Generator[None, None, None]:
    """Let an error of a ``with`` block that uses a part of a checkpoint name the file and the part.

    Args:
        path: The file.
        key: The part.

    Raises:
        MisconfigurationError: If the block raises anything but a ``MisconfigurationError`` that names the file.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MisconfigurationError) and str(path) in str(error):
            raise
        what = f"{key}: {error}" if isinstance(error, MisconfigurationError) else f"{key} cannot be used ({described(error)})."
        raise MisconfigurationError(f"{path}: {what} {REMEDY}") from escaped(error)


def described(error: Exception) -> str:
    """Return an error's class and the first line of its message."""
    return printable(f"{type(error).__name__}: {error}".partition("\n")[0])


def is_of(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type, see :func:`field`."""
    if kind is None or isinstance(value, bool):
        return value is None if kind is None else kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def article(value: Any) -> str:
    """Return a value's type for an error."""
    return "None" if value is None else f"a {type(value).__name__}"


def short(value: Any) -> str:
    """Return the beginning of a value's ``repr``."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
