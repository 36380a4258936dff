"""A module's steps as a run calls them: compiled, where the trainer was given ``torch.compile(module)``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, TypeAlias

import torch

from eventtrain.core.optimizer import LightningOptimizer
from eventtrain.module.module import LightningModule

Model: TypeAlias = LightningModule | Callable[..., Any]
"""A module, or what ``torch.compile`` made of one, which type checkers know as a callable."""

STEPS = ("training_step", "validation_step", "test_step", "predict_step")

# What a step calls of its trainer. Traced, it would be compiled anew for each name that is logged, and an optimizer's
# update would become a graph, of other bits than its own.
MODULE_CALLS = (
    "log", "log_dict", "print", "optimizers", "lr_schedulers", "manual_backward", "clip_gradients",
    "toggle_optimizer", "untoggle_optimizer", "toggled_optimizer",
)  # fmt: skip
OPTIMIZER_CALLS = ("step", "zero_grad")


class Steps:
    """The steps of one module.

    A step that is compiled, by this class or by the module itself, is traced up to its calls of the trainer: these run
    as they do in other modules, between two graphs.

    Args:
        model: What the trainer was given.

    Attributes:
        module: The module itself, if it is one.
    """

    def __init__(self, model: Any) -> None:
        self.module: Any = model
        self._compile: Callable[..., Any] | None = None
        self._untraced: ExitStack | None = None
        if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
            return
        from torch._dynamo import OptimizedModule

        if isinstance(model, OptimizedModule):
            # What torch.compile made, with its options; called on a function it compiles that.
            self.module, self._compile = model._orig_mod, model.dynamo_ctx

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """A step to call, by its name."""
        step: Callable[..., Any] = getattr(self.module, name)
        return step if self._compile is None else self._compile(step)

    @contextmanager
    def calling_the_trainer(self) -> Generator[None, None, None]:
        """Keeps what compiled steps call of the trainer out of their graphs, for the length of a run."""
        if not self._are_compiled():
            yield
            return
        try:
            with ExitStack() as self._untraced:
                self._untraced.enter_context(untraced(self.module, MODULE_CALLS))
                yield
        finally:
            self._untraced = None

    def stepping(self, optimizer: LightningOptimizer) -> None:
        """Does the same for an optimizer that steps call, as they do in manual optimization."""
        if self._untraced is not None:
            self._untraced.enter_context(untraced(optimizer, OPTIMIZER_CALLS))

    def _are_compiled(self) -> bool:
        if self._compile is not None or self.module._compiled_call_impl is not None:
            return True
        return any(hasattr(getattr(self.module, name), "_torchdynamo_orig_callable") for name in STEPS)


@contextmanager
def untraced(owner: Any, calls: tuple[str, ...]) -> Generator[None, None, None]:
    """Keeps calls of an object's methods, and all that they call, out of graphs inside of a ``with`` block.

    Args:
        owner: The object.
        calls: The methods' names.
    """
    # On the object and not on its class: a call of what `disable` returns costs a microsecond.
    attributes = owner.__dict__
    before = {name: attributes[name] for name in calls if name in attributes}
    for name in calls:
        method = getattr(owner, name)
        if isinstance(method, MethodType):  # anything else is a stand-in that somebody put there
            disabled = torch.compiler.disable(method.__func__)  # type: ignore[no-untyped-call]
            attributes[name] = MethodType(disabled, owner)
    try:
        yield
    finally:
        for name in calls:
            attributes.pop(name, None)
        attributes.update(before)
