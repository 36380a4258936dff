"""Activation checkpointing: layers whose activations are computed again in the backward, and not held."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from eventtrain.callback import Callback
from eventtrain.errors import MisconfigurationError
from eventtrain.events import Setup, Teardown
from eventtrain.hints import check_arguments
from eventtrain.trainer import Trainer


class ActivationCheckpointing(Callback):
    """Computes the activations of some submodules again in the backward, so that only their inputs are held until then.

    Memory grows by one input for each of them, and not by all tensors in them, at the price of a second forward. Gradients
    have the same bits as without the callback: random numbers, autocast and buffers are as in the first forward, and buffers
    such as the statistics of batch norm change once.

    Listens to ``setup``, and lets :func:`torch.utils.checkpoint.checkpoint` call the ``forward`` of each of the submodules in
    a fit; ``teardown`` gives it back. The modules and the names of their weights stay as they are, so checkpoints can be read
    with the callback and without it. It works in one process, and with both callbacks for several processes, attached in any
    order. Emits no metrics; reads nothing from the device. Override :meth:`is_checkpointed` for another choice.

    Args:
        units: The classes of the submodules, such as ``(Block,)``.
        **options: Options of :func:`torch.utils.checkpoint.checkpoint`: ``preserve_rng_state``, ``determinism_check``,
            ``context_fn`` for selective checkpointing, ... .

    Raises:
        MisconfigurationError: If the units are not classes of modules; in a fit, if no submodule is of these classes.

    Example:
        >>> from torch import nn
        >>> from eventtrain import Trainer
        >>> from eventtrain.callbacks import ActivationCheckpointing
        >>> class EverySecond(ActivationCheckpointing):
        ...     def is_checkpointed(self, name, module):
        ...         return super().is_checkpointed(name, module) and int(name.split(".")[-1]) % 2 == 0
        >>> checkpointing = EverySecond([nn.TransformerEncoderLayer])
        >>> layer = nn.TransformerEncoderLayer(4, 2)
        >>> checkpointing.is_checkpointed("layers.2", layer), checkpointing.is_checkpointed("layers.3", layer)
        (True, False)
    """

    def __init__(self, units: Sequence[type[nn.Module]], **options: Any) -> None:
        if not isinstance(units, Sequence) or not units or not all(isinstance(each, type) for each in units):
            raise MisconfigurationError(
                f"ActivationCheckpointing(units={units!r}): give classes of modules, such as [nn.TransformerEncoderLayer]."
            )
        if wrong := [each for each in units if not issubclass(each, nn.Module)]:
            raise MisconfigurationError(f"ActivationCheckpointing(units={units!r}): {wrong[0].__name__} is no nn.Module.")
        self.units = tuple(units)
        parameters = inspect.signature(checkpoint).parameters.values()
        known = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY or each.default is not each.empty]
        check_arguments("ActivationCheckpointing", options, ["units", *(name for name in known if name != "use_reentrant")])
        self.options = options
        self._replaced: list[tuple[nn.Module, Any]] = []

    def is_checkpointed(self, name: str, module: nn.Module) -> bool:
        """Return whether the activations of a submodule are computed again: the policy, which a subclass may override.

        Args:
            name: The submodule's name in the module.
            module: The submodule.
        """
        return isinstance(module, self.units)

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        if event.stage != "fit":
            return
        chosen = [each for name, each in trainer.module.named_modules() if name and self.is_checkpointed(name, each)]
        if not chosen:
            names = ", ".join(unit.__name__ for unit in self.units)
            raise MisconfigurationError(
                f"ActivationCheckpointing(units=({names})): {type(trainer.module).__name__} has no such submodules. Its "
                f"children are {sorted({type(each).__name__ for each in trainer.module.children()})}."
            )
        for module in chosen:
            # In place of a wrapper, which would change the names of the weights and the classes of the submodules.
            self._replaced.append((module, vars(module).get("forward")))
            module.forward = partial(recomputed, module, module.forward, self.options)

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        for module, before in reversed(self._replaced):
            del module.forward
            if before is not None:
                module.forward = before
        self._replaced.clear()


def recomputed(module: nn.Module, forward: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Call a forward whose activations are computed again in the backward.

    Args:
        module: The module of the forward.
        forward: Its own forward.
        options: Options of torch's ``checkpoint``.
        *args: The arguments of the forward.
        **kwargs: Its keyword arguments.
    """
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if any(True for _ in module.buffers()):
        before = [(part, name, buffer.clone()) for part, name, buffer in buffers(module)]
        options = {**options, "context_fn": partial(contexts, module, before, options.get("context_fn", noop_context_fn))}
    return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)


def buffers(module: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """Return the buffers of a module, each with the submodule that holds it and its name there."""
    return [(part, name, buffer) for part in module.modules() for name, buffer in part.named_buffers(recurse=False)]


def contexts(
    module: nn.Module,
    before: list[tuple[nn.Module, str, torch.Tensor]],
    context_fn: Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]],
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of the first forward and of the second, in which buffers are what they were before the first.

    Args:
        module: The module.
        before: Copies of its buffers from before the first forward.
        context_fn: The contexts that the user has given.
    """
    first, second = context_fn()
    return first, with_buffers(module, before, second)


@contextmanager
def with_buffers(
    module: nn.Module, before: list[tuple[nn.Module, str, torch.Tensor]], inner: AbstractContextManager[Any]
) -> Generator[None, None, None]:
    """Put other buffers into a module for the length of a ``with`` block. Its own stay as they are."""
    current = buffers(module)
    with ExitStack() as stack:
        for part, name, buffer in before:
            setattr(part, name, buffer.clone())
        for part, name, buffer in current:
            stack.callback(setattr, part, name, buffer)
        stack.enter_context(inner)
        yield
