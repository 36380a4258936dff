"""Load the weights of a checkpoint into a module, and tell how they differ if they do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from eventtrain.errors import MisconfigurationError, escaped


def load_weights(module: nn.Module, content: Mapping[str, Any], path: Any, strict: bool | None = None) -> None:
    """Load the weights of a checkpoint into a module.

    Args:
        module: The module.
        content: The checkpoint.
        path: Its file, for the error.
        strict: Whether the names of the weights have to be those of the module; None for the module's ``strict_loading``.

    Raises:
        MisconfigurationError: If the weights are of another module.

    Example:
        >>> from torch import nn
        >>> load_weights(nn.Linear(1, 1), {"state_dict": nn.Linear(1, 1, bias=False).state_dict()}, "line.ckpt")
        Traceback (most recent call last):
        eventtrain.errors.MisconfigurationError: line.ckpt is a checkpoint of another module than Linear. It lacks 'bias'. ...
    """
    weights = content["state_dict"]
    if "shards" in content:  # put back by the callback that shards the module
        advice = "python -m eventtrain.callbacks.distributed.whole_checkpoint FILE NEW_FILE writes a file with whole tensors"
        raise MisconfigurationError(
            f"{path} is of several processes. Attach FullyShardedDataParallel, or convert it: {advice}."
        )
    strict = getattr(module, "strict_loading", True) if strict is None else strict
    options = {} if strict else {"strict": False}  # a module may override load_state_dict(self, state_dict)
    try:
        module.load_state_dict(weights, **options)
    except (RuntimeError, TypeError, AttributeError) as error:
        problems = " ".join(differences(module, weights, strict))
        if not problems and type(module).load_state_dict is not nn.Module.load_state_dict:
            raise  # an error of the module's own
        raise MisconfigurationError(
            f"{path} is a checkpoint of another module than {type(module).__name__}. "
            f"{problems or f'Its weights cannot be loaded: {error}'} Give the module that wrote it, built with the same "
            "hyperparameters, or another file."
        ) from escaped(error)


def differences(module: nn.Module, weights: Mapping[str, Any], strict: bool) -> list[str]:
    """Return in sentences how weights differ from those of a module.

    Args:
        module: The module.
        weights: The weights by name.
        strict: Whether weights that one of the two lacks count.
    """
    expected = module.state_dict()
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    problems = []
    if strict and missing:
        problems.append(f"It lacks {some(missing)}.")
    if strict and unexpected:
        problems.append(f"It has {some(unexpected)}, which the module does not have.")
    prefixes = {name.removesuffix(end) for name in unexpected[:1] for end in missing if name.endswith(end)}
    if prefix := next((each for each in prefixes if {each + name for name in expected} == set(weights)), None):
        problems.append(f"Its names begin with {prefix!r}: remove that from the keys of its state_dict in on_load_checkpoint.")
    elif problems:
        problems.append("Set self.strict_loading = False in __init__ to load only the weights that both have.")
    for name in expected:
        here, there = expected[name], weights.get(name)
        if isinstance(here, Tensor) and isinstance(there, Tensor) and not is_lazy(here) and here.shape != there.shape:
            problems.append(f"{name!r} has the shape {tuple(there.shape)} in it and {tuple(here.shape)} in the module.")
    return problems


def kind_of(content: Any) -> str:
    """Return in sentences what a file without weights under ``"state_dict"`` holds, and how to use it."""
    if not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__} and no 'state_dict'. Give a file that trainer.save_checkpoint wrote."
    if any(isinstance(value, Tensor) for value in content.values()):
        return (
            f"it is a bare state_dict, with the keys {some(content)}. Load it by "
            "`module.load_state_dict(torch.load(path, weights_only=True))`, or write it to a file as {'state_dict': ...}."
        )
    return f"it holds no 'state_dict', only {some(content)}. Write its weights to a file as {{'state_dict': ...}}."


def some(names: Iterable[Any], most: int = 4) -> str:
    """Return the first names of a collection as a text, and the number of the others."""
    names = list(names)
    others = f" and {len(names) - most} others" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + others
