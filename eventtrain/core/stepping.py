"""One optimizer's steps in a run, with the events around them: zeroing, gradients, veto, clipping, update."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from eventtrain import events
from eventtrain.core.clipping import clip_gradients
from eventtrain.errors import MisconfigurationError, StepSkipped

if TYPE_CHECKING:
    from eventtrain.core.optimizer import LightningOptimizer
    from eventtrain.core.signals import SignalTable
    from eventtrain.core.state import BatchState
    from eventtrain.events import Plan


@dataclass(slots=True, eq=False)
class Stepping:
    """Steps one optimizer in a run and publishes its events: the :class:`~eventtrain.core.optimizer.Stepper` of its wrapper.

    It is an object beside the wrapper, and slotted, because every attribute of the wrapper is read and written through
    ``__getattr__`` and ``__setattr__``: 3 % of a small step.

    Args:
        optimizer: The wrapper.
        signals: The signals on which its events are published.
        batch: The current batch.
        toggle: The module's ``toggled_optimizer``.
        clip_hook: The module's overridden ``configure_gradient_clipping`` in automatic optimization, or None.
        version: Returns a number that changes with each in-place write to a tensor.

    Attributes:
        ready: The gradient events were published for the current gradients. Cleared by ``zero_grad``, by ``step`` and by each
            evaluation of a closure, never by a backward.
        stepping: The wrapper's ``step`` is under way.
        own: It is the user's own, and not the loop's for a window.
        depth: Steps of the wrapped optimizer under way; 2 if a subclass calls ``super().step()``.
        evaluations: How often the current step has evaluated its closure.
        num_steps: Updates of the wrapped optimizer.
        zeroing: A zero_grad phase is open.
        result: The value that the current step is going to return.
        norm_type: The order of the norm that a policy wrote, while the module's hook clips.
    """

    optimizer: LightningOptimizer
    signals: SignalTable
    batch: BatchState
    toggle: Callable[[LightningOptimizer], AbstractContextManager[None]]
    clip_hook: Callable[..., Any] | None
    version: Callable[[Tensor], int]
    ready: bool = False
    stepping: bool = False
    own: bool = False
    zeroing: bool = False
    depth: int = 0
    evaluations: int = 0
    num_steps: int = 0
    result: Any = None
    norm_type: float = 2.0
    wrapped: Optimizer = field(init=False)
    _closure: Callable[[], Any] | None = None
    _evaluate: Callable[[], Any] = field(init=False)
    _held: list[Optimizer] = field(init=False)
    _unwatch: list[Callable[[], None]] = field(init=False)

    def __post_init__(self) -> None:
        self.wrapped = self.optimizer.optimizer
        self._evaluate = self.evaluate  # bound once
        # A step on the wrapped optimizer is counted too, and one of the optimizer that SAM or Lookahead holds.
        self._held = [each for each in vars(self.wrapped).values() if isinstance(each, Optimizer)]
        self._unwatch = [watch_steps(each, self._begin, self._finish) for each in (self.wrapped, *self._held)]

    def disconnect(self) -> None:
        """Leave the wrapped optimizer as it was."""
        for unwatch in self._unwatch:
            unwatch()

    def _begin(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.depth += 1

    def _finish(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.depth -= 1
        if self.depth <= 0:
            self.depth = 0
            self.num_steps += 1
            self.batch.updated = True
            if not (self.stepping or self.batch.under_way):
                self.batch.count_update()

    # ------------------------------------------------------------------ stepping

    def step(self, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> Any:
        """Step the wrapped optimizer in its phase, and publish whether it updated.

        Args:
            closure: The closure that ``step`` of the wrapper was given, or None.
            kwargs: Passed on to the wrapped optimizer's ``step``.

        Returns:
            The value of the wrapped optimizer's ``step``; if the step was skipped, the value of the closure.

        Raises:
            MisconfigurationError: If the closure was never called, or a later evaluation of it was vetoed.
        """
        signals, batch, steps = self.signals, self.batch, self.num_steps
        skip_reason: str | None = None
        # Of the step whose closure this one is in.
        outer = self.stepping, self.own, self.evaluations, self._closure, self.result
        phase = events.OptimizerStep(self.optimizer) if signals.optimizer_step.listeners else None
        try:
            if phase is not None:
                signals.optimizer_step.publish(phase)
            self.stepping, self.own, self.evaluations, self._closure = True, not batch.closing, 0, closure
            if closure is None:
                self.evaluate()
                self.result = self.wrapped.step(**kwargs)
            else:
                self.result = self.wrapped.step(self._evaluate, **kwargs)
                if self.evaluations == 0 and self.own:  # else the loop raises, and names the hook
                    raise MisconfigurationError(
                        f"{type(self.wrapped).__name__}.step did not run the closure that it was given, so there were no "
                        "gradients. An optimizer has to call it: `loss = closure()` under `torch.enable_grad()`."
                    )
        except StepSkipped as skip:
            skip_reason = skip.reason
        finally:
            self.ready, self.depth, result = False, 0, self.result
            self.stepping, self.own, self.evaluations, self._closure, self.result = outer
            if phase is not None:
                phase.__exit__(*sys.exc_info())
        if skip_reason is None:
            if self.num_steps == steps:  # its step was replaced during the run, so that nobody watched it
                self.num_steps += 1
                batch.updated = True
            if signals.after_optimizer_step.listeners:
                signals.after_optimizer_step.publish(events.AfterOptimizerStep(self.optimizer))
            if not batch.under_way:
                batch.count_update()
        else:
            self.abandon(skip_reason)
        return result

    def step_by(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call another method that steps, such as SAM's ``second_step``, on complete and clipped gradients.

        It counts if it runs a step of an optimizer that the wrapped one holds; without such an optimizer, if weights move.

        Args:
            method: The method of the wrapped optimizer.
            *args: Its arguments.
            **kwargs: Its keyword arguments.
        """
        self.own = not self.batch.closing
        if not self.ready:
            self.depth = 1  # it cannot be skipped
            self.complete_gradients()
            self.depth = 0
        self._clip()
        steps, before = self.num_steps, list(map(self.version, self.optimizer.parameters()))
        self.stepping = True
        try:
            result = method(*args, **kwargs)
        finally:
            self.stepping = self.own = self.ready = False
        if not self._held and before != list(map(self.version, self.optimizer.parameters())):
            self.num_steps, self.batch.updated = steps + 1, True
        if self.num_steps > steps:
            self.signals.after_optimizer_step.publish(events.AfterOptimizerStep(self.optimizer))
            if not self.batch.under_way:
                self.batch.count_update()
        return result

    def evaluate(self) -> Any:
        """Run the closure, if there is one, complete the gradients, let listeners veto, and clip.

        This is the closure that the wrapped optimizer gets. It is one function, because every step calls it.
        """
        signals, batch = self.signals, self.batch
        if self._closure is not None:
            self.evaluations += 1
            self.ready = False
            self.result = self._closure()
        if not self.own and batch.contributions == 0:  # in no process: the closure has completed the gradients
            self._skip("no loss")
        if not self.ready:
            self.complete_gradients()
        reason: str | None = None
        if signals.before_optimizer_step.listeners:
            event = events.BeforeOptimizerStep(self.optimizer, max(self.evaluations, 1))
            signals.before_optimizer_step.publish(event)
            reason = event.skip_reason
        if batch.agrees_on_vetoes and batch.processes is not None and batch.processes.any(reason is not None):
            reason = reason or "another process's veto"
        if reason is not None:
            self._skip(reason)
        if signals.before_gradient_clipping.listeners or signals.clipping_decided.listeners or self.clip_hook is not None:
            self._clip()
        return self.result

    def _skip(self, reason: str) -> None:
        if self.evaluations > 1:
            raise MisconfigurationError(
                f"The step of {type(self.wrapped).__name__} was vetoed ({reason}) at evaluation {self.evaluations} of its "
                "closure, when its weights have already moved. Veto at the first evaluation only."
            )
        raise StepSkipped(reason)

    @property
    def is_raw(self) -> bool:
        """Whether the wrapped optimizer is stepping without the wrapper."""
        return self.depth > 0 and not self.stepping

    def abandon(self, reason: str) -> None:
        """Publish that a step of the wrapped optimizer was left before it updated anything."""
        self.depth = 0
        self.batch.skip_reason = reason
        self.signals.optimizer_step_skipped.publish(events.OptimizerStepSkipped(self.optimizer, reason))

    # ------------------------------------------------------------------ gradients

    def complete_gradients(self) -> None:
        """Publish the gradient events, after which the gradients are the true ones. Call it only if not ``ready``."""
        self.ready = True
        signals, batch = self.signals, self.batch
        of_window = batch.automatic and not self.own
        if signals.reduce_gradients.listeners:
            skipped = batch.automatic and (batch.loss is None or not of_window)
            signals.reduce_gradients.publish(events.ReduceGradients(self.optimizer, skipped, not of_window))
        mean = batch.contributions
        if of_window and batch.processes is not None:
            mean, batch.weight = batch.processes.end_reduction(*batch.contributed)
            batch.contributions = batch.contributions or mean
            if not batch.contributions:
                return
            self._average(batch.plan, mean)
        if signals.unscale_gradients.listeners:
            can_skip = self.stepping or self.depth == 0
            signals.unscale_gradients.publish(events.UnscaleGradients(self.optimizer, max(self.evaluations, 1), can_skip))
        if signals.gradients_ready.listeners:
            if of_window:
                ready = events.GradientsReady(self.optimizer, mean, batch.weight, batch.weight_reference)
            else:
                ready = events.GradientsReady(self.optimizer, None, None, None)
            signals.gradients_ready.publish(ready)
        if signals.gradients_final.listeners:
            signals.gradients_final.publish(events.GradientsFinal(self.optimizer, self.stepping or self.depth > 0))

    def _average(self, plan: Plan, contributions: Any) -> None:
        """Take the mean over the processes with a loss, in a window of one batch that no listener normalises."""
        is_normalized = plan.weighted or plan.loss_scale != 1.0 or not plan.zero_grad
        if not is_normalized and (isinstance(contributions, Tensor) or contributions != 1):
            for parameter in self.optimizer.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(contributions)

    def _clip(self) -> None:
        """Ask the policies, and clip by the values that they wrote."""
        signals = self.signals
        event = events.BeforeGradientClipping(self.optimizer)
        signals.before_gradient_clipping.publish(event)
        value, algorithm, norm_type = event.gradient_clip_val, event.gradient_clip_algorithm, event.norm_type
        if signals.clipping_decided.listeners:
            decided = events.ClippingDecided(self.optimizer, value, algorithm, norm_type, self.clip_hook is not None)
            signals.clipping_decided.publish(decided)
        if self.clip_hook is not None:
            self.norm_type = norm_type
            try:
                self.clip_hook(self.optimizer, value, algorithm)
            finally:
                self.norm_type = 2.0
        elif value is not None:
            self.clip_gradients(value, algorithm or "norm", norm_type)

    def clip_gradients(self, value: float, algorithm: str, norm_type: float | None = None) -> Tensor | None:
        """Complete the gradients, clip them, and publish the clipping.

        Args:
            value: The threshold, a positive number.
            algorithm: ``"norm"`` or ``"value"``.
            norm_type: The order p of the norm; that of the policies if None.

        Returns:
            The total norm before clipping, a scalar tensor; None for ``"value"``.
        """
        if not self.ready:
            self.complete_gradients()
        norm_type = norm_type or self.norm_type
        total_norm = clip_gradients(self.wrapped, value, algorithm, norm_type)
        if self.signals.after_gradient_clipping.listeners:
            event = events.AfterGradientClipping(self.optimizer, value, algorithm, norm_type, total_norm)
            self.signals.after_gradient_clipping.publish(event)
        return total_norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients of the wrapped optimizer's parameters.

        Args:
            set_to_none: Whether to drop the gradients rather than to fill them with zeros.
        """
        self.ready = False
        signals = self.signals
        if signals.before_zero_grad.listeners:
            with events.BeforeZeroGrad(self.optimizer) as phase:
                signals.before_zero_grad.publish(phase)
                self.wrapped.zero_grad(set_to_none)
        else:
            self.wrapped.zero_grad(set_to_none)
        if signals.after_zero_grad.listeners:
            signals.after_zero_grad.publish(events.AfterZeroGrad(self.optimizer))

    def zero_grad_by(self, hook: Callable[..., Any], *args: Any) -> None:
        """Zero the gradients by a module's ``optimizer_zero_grad``, with the same events around it.

        Args:
            hook: The overridden hook.
            *args: Its arguments.
        """
        self.ready = False
        self.zeroing = True
        try:
            with events.BeforeZeroGrad(self.optimizer) as phase:
                self.signals.before_zero_grad.publish(phase)
                hook(*args)
        finally:
            self.zeroing = False
        self.signals.after_zero_grad.publish(events.AfterZeroGrad(self.optimizer))

    def toggled(self) -> AbstractContextManager[None]:
        """Let only this optimizer's parameters get gradients, for the length of a ``with`` block."""
        return self.toggle(self.optimizer)


def watch_steps(optimizer: Optimizer, begin: Callable[..., None], finish: Callable[..., None]) -> Callable[[], None]:
    """Have functions called before and after each step of an optimizer.

    torch's hooks do that. They do not fire if the class leaves out ``Optimizer.__init__``, nor if ``step`` was replaced on the
    object: such a step is replaced once more.

    Args:
        optimizer: The optimizer.
        begin: Called as torch's hooks are, with the optimizer and the arguments of ``step``.
        finish: The same.

    Returns:
        A function that ends it.
    """
    step: Any = optimizer.step
    if getattr(step, "hooked", False):  # torch marks a step that calls hooks, and schedulers keep the mark
        hooks = ExitStack()
        hooks.callback(optimizer.register_step_pre_hook(begin).remove)
        hooks.callback(optimizer.register_step_post_hook(finish).remove)
        return hooks.close

    @wraps(getattr(step, "__func__", step))
    def watched(_: Any, *args: Any, **kwargs: Any) -> Any:
        begin(optimizer, args, kwargs)
        result = step(*args, **kwargs)
        finish(optimizer, args, kwargs)
        return result

    attributes = vars(optimizer)
    before = {name: value for name, value in attributes.items() if name == "step"}
    attributes["step"] = replacement = MethodType(watched, optimizer)

    def unwatch() -> None:
        if attributes.get("step") is replacement:
            del attributes["step"]
            attributes.update(before)

    return unwatch
