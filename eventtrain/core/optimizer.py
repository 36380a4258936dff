"""The optimizer that modules and callbacks see. It knows no event: in a run, a :class:`Stepper` does its steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from eventtrain.core.clipping import clip_gradients
from eventtrain.errors import MisconfigurationError


class Stepper(Protocol):
    """The object that steps an optimizer in a run, with everything around it.

    Attributes:
        num_steps: Updates of the wrapped optimizer in this run.
        zeroing: The module's ``optimizer_zero_grad`` is running, so that its call of ``zero_grad`` is the plain one.
    """

    num_steps: int
    zeroing: bool

    def step(self, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> Any:
        """Step the wrapped optimizer; return the value of its ``step``, or of the closure if the step was skipped."""

    def step_by(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call another method of the wrapped optimizer that steps."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients."""

    def clip_gradients(self, value: float, algorithm: str, norm_type: float | None = None) -> Tensor | None:
        """Complete the gradients and clip them; return their total norm before."""

    def toggled(self) -> AbstractContextManager[None]:
        """Let only this optimizer's parameters get gradients, for the length of a ``with`` block."""


class LightningOptimizer(Optimizer):
    """Wraps an optimizer so that its zeroing and stepping take part in a run.

    It *is* a ``torch.optim.Optimizer``, and an instance of the wrapped optimizer's class: ``param_groups``, ``state``,
    ``defaults`` and the wrapped optimizer's own attributes are read and written through it, and a scheduler may be built on
    it. A step taken on :attr:`optimizer` directly is a plain torch step: no veto, no clipping. A method whose name begins
    or ends with ``step``, such as SAM's ``second_step``, gets complete and clipped gradients in a run, and counts if it
    updates.

    Args:
        optimizer: The optimizer to wrap.

    Attributes:
        optimizer: The wrapped optimizer.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> wrapper = LightningOptimizer(torch.optim.SGD([weight], lr=0.5))
        >>> wrapper.param_groups[0]["lr"]
        0.5
        >>> isinstance(wrapper, torch.optim.SGD), type(wrapper.optimizer).__name__
        (True, 'SGD')
    """

    optimizer: Optimizer
    _num_steps: int
    _stepper: Stepper | None

    def __init__(self, optimizer: Optimizer) -> None:
        # Not Optimizer.__init__, whose attributes could drift from the wrapped optimizer's.
        write = object.__setattr__
        write(self, "optimizer", optimizer)
        write(self, "_num_steps", 0)
        write(self, "_stepper", None)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Update the parameters once their gradients are complete, unscaled, and clipped.

        Args:
            closure: A function that evaluates the loss and its gradients, and returns the loss. It is handed to the wrapped
                optimizer, which may evaluate it often, or after it has moved the weights.
            **kwargs: Passed on to the wrapped optimizer's ``step``.

        Returns:
            The value of the wrapped optimizer's ``step``; if the step was skipped, the value of the closure.

        Raises:
            MisconfigurationError: If the closure cannot be called, was never called, or a listener vetoed a later evaluation.

        Example:
            >>> weight = torch.nn.Parameter(torch.ones(1))
            >>> optimizer = LightningOptimizer(torch.optim.SGD([weight], lr=0.5))
            >>> weight.grad = torch.ones(1)
            >>> optimizer.step()
            >>> weight.item()
            0.5
        """
        if closure is not None and not callable(closure):
            raise MisconfigurationError(
                f"{type(self.optimizer).__name__}.step was given {closure!r} as its closure, which cannot be called. "
                "Give a function of no arguments that returns the loss, or nothing."
            )
        if self._stepper is not None:
            return self._stepper.step(closure, kwargs)
        return self.optimizer.step(**kwargs) if closure is None else self.optimizer.step(closure, **kwargs)

    def clip_gradients(
        self, gradient_clip_val: float | None, gradient_clip_algorithm: str | None = None, norm_type: float | None = None
    ) -> Tensor | None:
        """Clip the gradients of this optimizer's parameters in place. In a run, complete and unscale them first.

        Args:
            gradient_clip_val: The threshold, a positive number; None clips nothing.
            gradient_clip_algorithm: ``"norm"`` (the default), by :func:`torch.nn.utils.clip_grad_norm_`, or ``"value"``, by
                :func:`torch.nn.utils.clip_grad_value_`.
            norm_type: The order p of the norm; 2 if None.

        Returns:
            The total norm before clipping, a scalar tensor on the gradients' device; None if nothing was clipped or the
            algorithm is ``"value"``.

        Raises:
            MisconfigurationError: If the threshold is not a positive number, or the algorithm is unknown.
        """
        if gradient_clip_val is None:
            return None
        algorithm = gradient_clip_algorithm or "norm"
        if self._stepper is not None:
            return self._stepper.clip_gradients(gradient_clip_val, algorithm, norm_type)
        return clip_gradients(self.optimizer, gradient_clip_val, algorithm, norm_type or 2.0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients of the wrapped optimizer's parameters.

        Args:
            set_to_none: Whether to drop the gradients rather than to fill them with zeros.
        """
        if self._stepper is None or self._stepper.zeroing:
            self.optimizer.zero_grad(set_to_none)
        else:
            self._stepper.zero_grad(set_to_none)

    def toggle_model(self, sync_grad: bool = True) -> AbstractContextManager[None]:
        """Let only this optimizer's parameters get gradients, for the length of a ``with`` block.

        Args:
            sync_grad: Accepted for modules written for Lightning. Manual optimization averages gradients over processes once,
                when the optimizer steps, so there is nothing to turn off.

        Raises:
            MisconfigurationError: If the optimizer takes part in no run.
        """
        if self._stepper is None:
            raise MisconfigurationError("toggle_model needs a running trainer: call it in training_step.")
        return self._stepper.toggled()

    def parameters(self) -> Iterator[Tensor]:
        """Yield the wrapped optimizer's parameters, read anew at each call, so that ``add_param_group`` counts."""
        for group in self.optimizer.param_groups:
            yield from group["params"]

    @property
    def num_steps(self) -> int:
        """How often the wrapped optimizer has updated in the current run, or in the last; direct steps included."""
        return self._num_steps if self._stepper is None else self._stepper.num_steps

    def join(self, stepper: Stepper) -> None:
        """Let an object do this optimizer's steps until :meth:`leave`. For the core.

        Args:
            stepper: The object.
        """
        object.__setattr__(self, "_stepper", stepper)

    def leave(self) -> None:
        """End :meth:`join`: the optimizer then steps like the wrapped one."""
        object.__setattr__(self, "_num_steps", self.num_steps)
        object.__setattr__(self, "_stepper", None)

    # ------------------------------------------------------------------ being the wrapped optimizer

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        return type(self.optimizer)

    def __getattr__(self, name: str) -> Any:
        if name in ("optimizer", "_stepper", "_num_steps"):  # the wrapper is being unpickled or copied
            raise AttributeError(name)
        value = getattr(self.optimizer, name)
        if self._stepper is not None and (name.startswith("step") or name.endswith("step")) and callable(value):
            return partial(self._stepper.step_by, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Schedulers patch `step` on the object that they were built on; everything else belongs to the wrapped optimizer.
        if name == "step":
            object.__setattr__(self, name, value)
        else:
            setattr(self.optimizer, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"LightningOptimizer({self.optimizer!r})"

    # A copy wraps a copy, and takes part in no run.

    def __deepcopy__(self, memo: dict[int, Any]) -> LightningOptimizer:
        return LightningOptimizer(copy.deepcopy(self.optimizer, memo))

    def __copy__(self) -> LightningOptimizer:
        return LightningOptimizer(self.optimizer)

    def __reduce_ex__(self, protocol: Any) -> tuple[type[LightningOptimizer], tuple[Optimizer]]:
        return LightningOptimizer, (self.optimizer,)


def _of_wrapped(name: str) -> Callable[..., Any]:
    """Return a method of the wrapper that calls the wrapped optimizer's."""

    def method(self: LightningOptimizer, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.optimizer, name)(*args, **kwargs)

    method.__name__ = name
    return method


# torch.optim.Optimizer defines these, so that __getattr__ does not see them.
for _name in (
    *("state_dict", "load_state_dict", "add_param_group", "register_step_pre_hook", "register_step_post_hook"),
    *("register_state_dict_pre_hook", "register_state_dict_post_hook"),
    *("register_load_state_dict_pre_hook", "register_load_state_dict_post_hook"),
):
    setattr(LightningOptimizer, _name, _of_wrapped(_name))


def evaluates_often(optimizer: Optimizer) -> bool:
    """Return whether an optimizer is known to evaluate its closure more than once a step."""
    return isinstance(optimizer, torch.optim.LBFGS)
