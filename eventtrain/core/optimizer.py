"""The optimizer that modules and callbacks see."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from eventtrain.core.stepping import Stepping
from eventtrain.errors import MisconfigurationError
from eventtrain.events import AfterGradientClipping, AfterOptimizerStep, OptimizerStep, OptimizerStepSkipped

if TYPE_CHECKING:
    from eventtrain.core.signals import SignalTable
    from eventtrain.core.state import BatchState
    from eventtrain.module.module import LightningModule

CLIP_ALGORITHMS = ("norm", "value")


class LightningOptimizer(Optimizer):
    """Wraps an optimizer so that its zeroing and stepping publish events.

    It *is* a ``torch.optim.Optimizer``: ``param_groups``, ``state``, ``defaults`` and the wrapped optimizer's
    own attributes are read and written through it, and a scheduler may be built on it. What steps is
    :attr:`optimizer`; stepping that one directly is a plain torch step: no veto, no clipping.

    Args:
        optimizer: The optimizer to wrap.

    Attributes:
        optimizer: The wrapped optimizer.
    """

    optimizer: Optimizer
    _num_steps: int
    _run: Stepping | None

    def __init__(self, optimizer: Optimizer) -> None:
        # Not Optimizer.__init__: there is nothing of its own here that could drift from the wrapped one.
        write = object.__setattr__
        write(self, "optimizer", optimizer)
        write(self, "_num_steps", 0)
        write(self, "_run", None)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Updates the parameters once their gradients are complete, unscaled, and clipped.

        Args:
            closure: Evaluates the loss and its gradients, and returns the loss. It is handed to the
                wrapped optimizer, which may evaluate it often, or after it has moved the weights.
            **kwargs: Passed on to the wrapped optimizer's ``step``.

        Returns:
            What the wrapped optimizer's ``step`` returned; where the step was skipped, what the closure
            returned.

        Raises:
            MisconfigurationError: The closure cannot be called, was never called, or a listener vetoed a
                later evaluation of it.
        """
        if closure is not None and not callable(closure):
            raise MisconfigurationError(
                f"{type(self.optimizer).__name__}.step was given {closure!r} as its closure, which cannot be called. "
                "Give a function of no arguments that returns the loss, or nothing."
            )
        run = self._run
        if run is None:
            return self.optimizer.step(**kwargs) if closure is None else self.optimizer.step(closure, **kwargs)
        signals = run.signals
        if signals.optimizer_step.listeners:
            with OptimizerStep(self) as phase:
                signals.optimizer_step.publish(phase)
                skip_reason = run.update(closure, kwargs)
        else:
            skip_reason = run.update(closure, kwargs)
        if skip_reason is None:
            if signals.after_optimizer_step.listeners:
                signals.after_optimizer_step.publish(AfterOptimizerStep(self))
        elif signals.optimizer_step_skipped.listeners:
            signals.optimizer_step_skipped.publish(OptimizerStepSkipped(self, skip_reason))
        result, run.result = run.result, None
        return result

    def clip_gradients(
        self, gradient_clip_val: float | None, gradient_clip_algorithm: str | None = None, norm_type: float | None = None
    ) -> Tensor | None:
        """Clips the gradients of this optimizer's parameters in place, completing them first.

        Args:
            gradient_clip_val: The threshold, a positive number; None clips nothing.
            gradient_clip_algorithm: ``"norm"`` (the default), by
                :func:`torch.nn.utils.clip_grad_norm_`, or ``"value"``, by
                :func:`torch.nn.utils.clip_grad_value_`.
            norm_type: The order p of the norm; 2 where None.

        Returns:
            The total norm before clipping, a scalar tensor on the gradients' device; None where nothing
            was clipped or the algorithm is ``"value"``.

        Raises:
            MisconfigurationError: The threshold is not a positive number, or the algorithm is unknown.
        """
        if gradient_clip_val is None:
            return None
        algorithm = gradient_clip_algorithm or "norm"
        if type(gradient_clip_val) is not float or not gradient_clip_val > 0 or algorithm not in CLIP_ALGORITHMS:
            check_clip_val(gradient_clip_val, "gradient_clip_val")
            check_clip_algorithm(algorithm)
        run = self._run
        if run is not None and not run.ready:
            run.complete_gradients()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        total_norm: Tensor | None = None
        norm_type = norm_type or (run.norm_type if run is not None else 2.0)
        if algorithm == "norm":
            total_norm = clip_grad_norm_(parameters, gradient_clip_val, norm_type=norm_type)
            if hasattr(total_norm, "full_tensor"):  # of gradients that several processes hold in parts
                total_norm = total_norm.full_tensor()
        else:
            clip_grad_value_(parameters, gradient_clip_val)
        if run is not None and run.signals.after_gradient_clipping.listeners:
            event = AfterGradientClipping(self, gradient_clip_val, algorithm, norm_type, total_norm)
            run.signals.after_gradient_clipping.publish(event)
        return total_norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the gradients of the wrapped optimizer's parameters.

        Args:
            set_to_none: Whether to drop the gradients rather than to fill them with zeros.
        """
        run = self._run
        if run is None or run.zeroing:
            self.optimizer.zero_grad(set_to_none)
        else:
            run.zero_grad(set_to_none)

    def toggle_model(self, sync_grad: bool = True) -> AbstractContextManager[None]:
        """Makes this optimizer's parameters the only ones that get gradients, inside of a ``with`` block.

        Args:
            sync_grad: Accepted for modules written for Lightning. Manual optimization synchronises
                gradients between ranks once, where the optimizer steps, so there is nothing to turn off.

        Raises:
            MisconfigurationError: The optimizer takes part in no run.
        """
        run = self._run
        if run is None:
            raise MisconfigurationError("toggle_model needs a running trainer: call it in training_step.")
        return run.module.toggled_optimizer(self)

    def parameters(self) -> Iterator[Tensor]:
        """The wrapped optimizer's parameters, read anew each time, so that ``add_param_group`` counts."""
        for group in self.optimizer.param_groups:
            yield from group["params"]

    # ------------------------------------------------------------------ taking part in a run

    def join_run(self, signals: SignalTable, batch: BatchState, module: LightningModule, clip_hook: Any) -> None:
        """Connects the optimizer to a run.

        Args:
            signals: Where its events are published.
            batch: The batch at hand.
            module: The module, for toggling.
            clip_hook: The module's overridden ``configure_gradient_clipping``, or None.
        """
        object.__setattr__(self, "_run", Stepping(self, signals, batch, module, clip_hook))

    def leave_run(self) -> None:
        """Disconnects the optimizer from its run; it then steps like the wrapped one."""
        if self._run is not None:
            self._run.disconnect()
            object.__setattr__(self, "_num_steps", self._run.num_steps)
        object.__setattr__(self, "_run", None)

    @property
    def run(self) -> Stepping | None:
        """The optimizer's part in the run at hand; None outside of one."""
        return self._run

    @property
    def num_steps(self) -> int:
        """How often the wrapped optimizer has updated in the run at hand, or in the last; direct steps included."""
        return self._num_steps if self._run is None else self._run.num_steps

    # ------------------------------------------------------------------ being the wrapped optimizer

    def __getattr__(self, name: str) -> Any:
        if name in ("optimizer", "_run", "_num_steps"):  # being unpickled or copied
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Schedulers patch `step` on whatever they were built on; everything else belongs to the wrapped one.
        if name == "step":
            object.__setattr__(self, name, value)
        else:
            setattr(self.optimizer, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self.optimizer, name)

    # torch.optim.Optimizer defines these, so that __getattr__ does not see them.

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def register_step_pre_hook(self, hook: Any) -> Any:
        return self.optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        return self.optimizer.register_step_post_hook(hook)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.optimizer.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.optimizer.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.optimizer.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.optimizer.register_load_state_dict_post_hook(hook, prepend)

    def __repr__(self) -> str:
        return f"LightningOptimizer({self.optimizer!r})"

    # A copy wraps a copy, and takes part in no run.

    def __deepcopy__(self, memo: dict[int, Any]) -> LightningOptimizer:
        return LightningOptimizer(copy.deepcopy(self.optimizer, memo))

    def __copy__(self) -> LightningOptimizer:
        return LightningOptimizer(self.optimizer)

    def __reduce_ex__(self, protocol: Any) -> tuple[type[LightningOptimizer], tuple[Optimizer]]:
        return LightningOptimizer, (self.optimizer,)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        LightningOptimizer.__init__(self, state["optimizer"])


def check_clip_val(value: Any, named: str) -> None:
    """Refuses a clipping threshold that is not a positive number.

    Raises:
        MisconfigurationError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or value <= 0:
        raise MisconfigurationError(f"{named} has to be a positive number, or None for no clipping; it is {value!r}.")


def check_clip_algorithm(algorithm: Any) -> str:
    """Refuses an unknown clipping algorithm.

    Returns:
        The algorithm.

    Raises:
        MisconfigurationError: It is unknown.
    """
    if algorithm not in CLIP_ALGORITHMS:
        known = " or ".join(repr(name) for name in CLIP_ALGORITHMS)
        raise MisconfigurationError(f"gradient_clip_algorithm has to be {known}; it is {algorithm!r}.")
    return str(algorithm)


def has_gradients(optimizer: Optimizer) -> bool:
    """Whether any parameter of an optimizer holds a gradient."""
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def evaluates_often(optimizer: Optimizer) -> bool:
    """Whether an optimizer is known to evaluate its closure more than once a step."""
    wrapped = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
    return isinstance(wrapped, torch.optim.LBFGS)


def numbered(names: Iterable[str]) -> list[str]:
    """Numbers the names that occur several times: ``a, b, a`` becomes ``a-0, b, a-1``."""
    names = list(names)
    total, seen = Counter(names), Counter[str]()
    result = []
    for name in names:
        result.append(f"{name}-{seen[name]}" if total[name] > 1 else name)
        seen[name] += 1
    return result
