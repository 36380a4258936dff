"""A module's steps as a run calls them: compiled if the trainer was given ``torch.compile(module)``."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import MethodType
from typing import Any, TypeAlias

import torch

from eventtrain._torch import compiled_parts, is_compiled_function, is_compiled_in_place
from eventtrain.core.optimizer import LightningOptimizer
from eventtrain.module.module import LightningModule
from eventtrain.module.overriding import method_of

Model: TypeAlias = LightningModule | Callable[..., Any]
"""A module, or the result of ``torch.compile(module)``, which type checkers know as a callable."""

STEPS = ("training_step", "validation_step", "test_step", "predict_step")

# The methods by which a step calls its trainer. If they were traced, a step would be compiled again for each name that is
# logged, and an optimizer's update would become a graph, whose results differ in some bits.
MODULE_CALLS = (
    "log", "log_dict", "print", "optimizers", "lr_schedulers", "manual_backward", "clip_gradients",
    "toggle_optimizer", "untoggle_optimizer", "toggled_optimizer",
)  # fmt: skip
OPTIMIZER_CALLS = ("step", "zero_grad")


class ModuleSteps:
    """The steps of one module.

    A step that is compiled, by this class or by the module, is traced up to its calls of the trainer. These run between
    two graphs, as they do in other modules.

    Args:
        model: The model that the user gave to the trainer.

    Attributes:
        module: The module; for the result of ``torch.compile(module)`` the original one.
    """

    def __init__(self, model: Any) -> None:
        self.module: Any = model
        self._compile: Callable[..., Any] | None = None
        self._untraced: ExitStack | None = None
        if (parts := compiled_parts(model)) is not None:
            self.module, self._compile = parts

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """Return a step, ready to be called."""
        step = method_of(self.module, name, LightningModule)
        return step if self._compile is None else self._compile(step)

    @contextmanager
    def calling_the_trainer(self) -> Generator[None, None, None]:
        """Keep the trainer's methods out of the graphs of compiled steps, for one run."""
        if not self._are_compiled():
            yield
            return
        try:
            with ExitStack() as self._untraced:
                for part in self.module.modules():
                    if isinstance(part, LightningModule):
                        self._untraced.enter_context(untraced(part, MODULE_CALLS))
                yield
        finally:
            self._untraced = None

    def keep_out_of_graphs(self, optimizer: LightningOptimizer) -> None:
        """Keep the methods of an optimizer out of the graphs too, for steps that call it."""
        if self._untraced is not None:
            self._untraced.enter_context(untraced(optimizer, OPTIMIZER_CALLS))

    def _are_compiled(self) -> bool:
        if self._compile is not None or is_compiled_in_place(self.module):
            return True
        return any(is_compiled_function(getattr(self.module, name)) for name in STEPS)


@contextmanager
def untraced(owner: Any, calls: tuple[str, ...]) -> Generator[None, None, None]:
    """Keep an object's methods, and everything that they call, out of graphs during a ``with`` block.

    Args:
        owner: The object.
        calls: The methods' names.
    """
    # On the object and not on its class, because a call of a disabled function costs a microsecond.
    attributes = owner.__dict__
    before = {name: attributes[name] for name in calls if name in attributes}
    for name in calls:
        method = getattr(owner, name)
        if isinstance(method, MethodType):  # anything else is a replacement that the user assigned
            attributes[name] = MethodType(outside_graphs(method.__func__), owner)
    try:
        yield
    finally:
        for name in calls:
            attributes.pop(name, None)
        attributes.update(before)


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that a graph does not contain. Called from elsewhere it is as it was: steps that it calls, as an
    optimizer calls its closure, are compiled."""
    disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (disabled if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call
