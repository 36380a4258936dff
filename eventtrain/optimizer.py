"""The optimizer that modules and callbacks see."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from eventtrain.errors import MisconfigurationError, StepSkipped
from eventtrain.events import (
    AfterGradientClipping,
    AfterOptimizerStep,
    AfterZeroGrad,
    BeforeGradientClipping,
    BeforeOptimizerStep,
    BeforeZeroGrad,
    GradientsReady,
    OptimizerStep,
    OptimizerStepSkipped,
    ReduceGradients,
    UnscaleGradients,
)

if TYPE_CHECKING:
    from eventtrain.module import LightningModule
    from eventtrain.signals import Signals
    from eventtrain.state import BatchState

CLIP_ALGORITHMS = ("norm", "value")


class _Run:
    """What an optimizer needs while it takes part in a run.

    A slotted object beside the wrapper, because every write to the wrapper goes through a Python-level
    ``__setattr__``: 3 % of a small step.

    Attributes:
        ready: The gradient events have come for the gradients at hand: one flag, cleared by
            ``zero_grad``, by ``step`` and by each evaluation of a closure, never by a backward.
        stepping: The wrapper's ``step`` is under way.
        depth: Steps of the wrapped optimizer under way; 2 where a subclass calls ``super().step()``.
        evaluations: How often ``step`` has evaluated its closure.
        zeroing: A zero_grad phase is open.
    """

    __slots__ = (
        "batch", "clip_hook", "closure", "depth", "evaluate", "evaluations", "handles", "module",
        "norm_type", "ready", "result", "signals", "stepping", "zeroing",
    )  # fmt: skip

    def __init__(self, signals: Signals, batch: BatchState, module: LightningModule, clip_hook: Any) -> None:
        self.signals = signals
        self.batch = batch
        self.module = module
        self.clip_hook = clip_hook
        self.ready = self.stepping = self.zeroing = False
        self.depth = self.evaluations = 0
        self.closure: Callable[[], Any] | None = None
        self.evaluate: Callable[[], Any]
        self.result: Any = None
        self.norm_type = 2.0
        self.handles: list[Any] = []


class LightningOptimizer(Optimizer):
    """Wraps an optimizer so that its zeroing and stepping publish events.

    It *is* a ``torch.optim.Optimizer``: ``param_groups``, ``state``, ``defaults`` and the wrapped optimizer's
    own attributes are read and written through it, and a scheduler may be built on it. What steps is
    :attr:`optimizer`; stepping that one directly is a plain torch step: no veto, no clipping.

    Args:
        optimizer: The optimizer to wrap.

    Attributes:
        optimizer: The wrapped optimizer.
        num_steps: How often the wrapped optimizer has updated in this run, direct steps included.
    """

    optimizer: Optimizer
    num_steps: int
    _run: _Run | None

    def __init__(self, optimizer: Optimizer) -> None:
        # Not Optimizer.__init__: there is nothing of its own here that could drift from the wrapped one.
        write = object.__setattr__
        write(self, "optimizer", optimizer)
        write(self, "num_steps", 0)
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
                skip_reason = self._update(run, closure, kwargs)
        else:
            skip_reason = self._update(run, closure, kwargs)
        if skip_reason is None:
            if signals.after_optimizer_step.listeners:
                signals.after_optimizer_step.publish(AfterOptimizerStep(self))
        elif signals.optimizer_step_skipped.listeners:
            signals.optimizer_step_skipped.publish(OptimizerStepSkipped(self, skip_reason))
        result, run.result = run.result, None
        return result

    def _update(self, run: _Run, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> str | None:
        """Steps the wrapped optimizer; returns why it was skipped, None where it was not."""
        run.stepping = True
        run.evaluations = 0
        try:
            if closure is None:
                self._finish_gradients(run)
                run.result = self.optimizer.step(**kwargs)
            else:
                run.closure = closure
                run.result = self.optimizer.step(run.evaluate, **kwargs)
                if run.evaluations == 0 and not run.batch.automatic:  # else the loop says it, and names the hook
                    raise MisconfigurationError(
                        f"{type(self.optimizer).__name__}.step did not run the closure that it was given, so there "
                        "were no gradients. An optimizer has to call it: `loss = closure()` under `torch.enable_grad()`."
                    )
        except StepSkipped as skip:
            return skip.reason
        finally:
            run.stepping = run.ready = False
            run.depth = run.evaluations = 0
            run.closure = None
        return None

    def _evaluate(self) -> Any:
        """The closure that the wrapped optimizer gets: the given one, and what makes gradients final."""
        run = self._run
        assert run is not None and run.closure is not None
        run.evaluations += 1
        run.ready = False
        run.result = loss = run.closure()
        self._finish_gradients(run)
        return loss

    def _finish_gradients(self, run: _Run) -> None:
        """Completes the gradients, lets listeners veto, and clips."""
        signals = run.signals
        if run.batch.automatic and run.batch.contributions == 0:
            self._skip(run, "no loss")
        if not run.ready:
            self.complete_gradients()
        reason: str | None = None
        if signals.before_optimizer_step.listeners:
            event = BeforeOptimizerStep(self, max(run.evaluations, 1))
            signals.before_optimizer_step.publish(event)
            reason = event.skip_reason
        if run.batch.any_rank is not None and run.batch.any_rank(reason is not None):
            reason = reason or "another rank's veto"
        if reason is not None:
            self._skip(run, reason)
        if signals.before_gradient_clipping.listeners or run.clip_hook is not None:
            self._clip(run)

    def _skip(self, run: _Run, reason: str) -> None:
        if run.evaluations > 1:
            raise MisconfigurationError(
                f"The step of {type(self.optimizer).__name__} was vetoed ({reason}) at evaluation {run.evaluations} of its "
                "closure, when its weights have already moved. Veto at the first evaluation only."
            )
        raise StepSkipped(reason)

    def complete_gradients(self) -> None:
        """Publishes the three gradient events, once for the gradients at hand: after it they are the true
        ones. Part of a step; harmless to ask for twice."""
        run = self._run
        if run is None or run.ready:
            return
        run.ready = True
        signals, batch = run.signals, run.batch
        if signals.reduce_gradients.listeners:
            signals.reduce_gradients.publish(ReduceGradients(self))
        if signals.unscale_gradients.listeners:
            can_skip = run.stepping or run.depth == 0
            signals.unscale_gradients.publish(UnscaleGradients(self, max(run.evaluations, 1), can_skip))
        if signals.gradients_ready.listeners:
            if batch.automatic:
                ready = GradientsReady(self, batch.contributions, batch.weight, batch.weight_reference)
            else:
                ready = GradientsReady(self, None, None, None)
            signals.gradients_ready.publish(ready)

    def _clip(self, run: _Run) -> None:
        """Asks the policies, and clips by what they wrote."""
        event = BeforeGradientClipping(self)
        run.signals.before_gradient_clipping.publish(event)
        if run.clip_hook is not None and run.batch.automatic:
            run.norm_type = event.norm_type
            try:
                run.clip_hook(self, event.gradient_clip_val, event.gradient_clip_algorithm)
            finally:
                run.norm_type = 2.0
        else:
            self.clip_gradients(event.gradient_clip_val, event.gradient_clip_algorithm, event.norm_type)

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
        check_clip_val(gradient_clip_val, "gradient_clip_val")
        algorithm = check_clip_algorithm(gradient_clip_algorithm or "norm")
        self.complete_gradients()
        run = self._run
        parameters = list(self.parameters())
        total_norm: Tensor | None = None
        norm_type = norm_type or (run.norm_type if run is not None else 2.0)
        if algorithm == "norm":
            total_norm = clip_grad_norm_(parameters, gradient_clip_val, norm_type=norm_type)
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
            return
        run.ready = False
        signals = run.signals
        if signals.before_zero_grad.listeners:
            with BeforeZeroGrad(self) as phase:
                signals.before_zero_grad.publish(phase)
                self.optimizer.zero_grad(set_to_none)
        else:
            self.optimizer.zero_grad(set_to_none)
        if signals.after_zero_grad.listeners:
            signals.after_zero_grad.publish(AfterZeroGrad(self))

    def zero_grad_by(self, hook: Callable[..., Any], *args: Any) -> None:
        """Zeroes by a module's ``optimizer_zero_grad``, with the same events around it.

        Args:
            hook: The overridden hook.
            *args: What it is called with.
        """
        run = self._run
        assert run is not None
        run.ready = False
        run.zeroing = True
        try:
            with BeforeZeroGrad(self) as phase:
                run.signals.before_zero_grad.publish(phase)
                hook(*args)
        finally:
            run.zeroing = False
        run.signals.after_zero_grad.publish(AfterZeroGrad(self))

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

    def join_run(self, signals: Signals, batch: BatchState, module: LightningModule, clip_hook: Any) -> None:
        """Connects the optimizer to a run.

        Args:
            signals: Where its events are published.
            batch: The batch at hand.
            module: The module, for toggling.
            clip_hook: The module's overridden ``configure_gradient_clipping``, or None.
        """
        run = _Run(signals, batch, module, clip_hook)
        run.evaluate = self._evaluate
        object.__setattr__(self, "_run", run)
        object.__setattr__(self, "num_steps", 0)

        def begin(*_: Any) -> None:
            run.depth += 1

        def finish(*_: Any) -> None:
            run.depth -= 1
            if run.depth <= 0:
                run.depth = 0
                object.__setattr__(self, "num_steps", self.num_steps + 1)
                batch.updated = True

        # torch's own hooks, so that a step on the wrapped optimizer is counted too.
        run.handles = [
            self.optimizer.register_step_pre_hook(begin),
            self.optimizer.register_step_post_hook(finish),
        ]

    def leave_run(self) -> None:
        """Disconnects the optimizer from its run; it then steps like the wrapped one."""
        if self._run is not None:
            for handle in self._run.handles:
                handle.remove()
        object.__setattr__(self, "_run", None)

    @property
    def raw_step_in_progress(self) -> bool:
        """Whether the wrapped optimizer is stepping without the wrapper."""
        run = self._run
        return run is not None and run.depth > 0 and not run.stepping

    def abandon_step(self, reason: str) -> None:
        """Publishes that a step of the wrapped optimizer was left before it updated anything."""
        run = self._run
        if run is not None:
            run.depth = 0
            run.signals.optimizer_step_skipped.publish(OptimizerStepSkipped(self, reason))

    # ------------------------------------------------------------------ being the wrapped optimizer

    def __getattr__(self, name: str) -> Any:
        if name in ("optimizer", "_run", "num_steps"):  # being unpickled or copied
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
