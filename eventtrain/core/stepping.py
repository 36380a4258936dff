"""One optimizer's part in a run: what it publishes while it zeroes, completes gradients, clips and steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from eventtrain.errors import MisconfigurationError, StepSkipped
from eventtrain.events import (
    AfterZeroGrad,
    BeforeGradientClipping,
    BeforeOptimizerStep,
    BeforeZeroGrad,
    ClippingDecided,
    GradientsFinal,
    GradientsReady,
    OptimizerStepSkipped,
    ReduceGradients,
    UnscaleGradients,
)

if TYPE_CHECKING:
    from eventtrain.core.optimizer import LightningOptimizer
    from eventtrain.core.signals import SignalTable
    from eventtrain.core.state import BatchState
    from eventtrain.module.module import LightningModule


class Stepping:
    """What a :class:`~eventtrain.LightningOptimizer` does in a run.

    An object beside the wrapper and slotted, because whatever is read from or written to the wrapper goes through its
    ``__getattr__`` and ``__setattr__``: 3 % of a small step.

    Args:
        optimizer: The wrapper.
        signals: Where its events are published.
        batch: The batch at hand.
        module: The module, for toggling.
        clip_hook: The module's overridden ``configure_gradient_clipping``, or None.

    Attributes:
        ready: The gradient events have come for the gradients at hand: one flag, cleared by
            ``zero_grad``, by ``step`` and by each evaluation of a closure, never by a backward.
        stepping: The wrapper's ``step`` is under way.
        depth: Steps of the wrapped optimizer under way; 2 where a subclass calls ``super().step()``.
        evaluations: How often the step at hand has evaluated its closure.
        num_steps: Updates of the wrapped optimizer.
        zeroing: A zero_grad phase is open.
        result: What the step at hand is going to return.
        norm_type: The order of the norm that a policy wrote, while the module's hook clips.
    """

    __slots__ = (
        "_closure", "_evaluate", "_handles", "batch", "clip_hook", "depth", "evaluations", "module", "norm_type",
        "num_steps", "optimizer", "ready", "result", "signals", "stepping", "wrapped", "zeroing",
    )  # fmt: skip

    def __init__(
        self,
        optimizer: LightningOptimizer,
        signals: SignalTable,
        batch: BatchState,
        module: LightningModule,
        clip_hook: Callable[..., Any] | None,
    ) -> None:
        self.optimizer = optimizer
        self.wrapped: Optimizer = optimizer.optimizer
        self.signals = signals
        self.batch = batch
        self.module = module
        self.clip_hook = clip_hook
        self.ready = self.stepping = self.zeroing = False
        self.depth = self.evaluations = self.num_steps = 0
        self.result: Any = None
        self.norm_type = 2.0
        self._closure: Callable[[], Any] | None = None
        self._evaluate = self.evaluate  # bound once
        # torch's own hooks, so that a step on the wrapped optimizer is counted too.
        self._handles = [
            self.wrapped.register_step_pre_hook(self._begin),
            self.wrapped.register_step_post_hook(self._finish),
        ]

    def disconnect(self) -> None:
        """Lets the wrapped optimizer go."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.depth += 1

    def _finish(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.depth -= 1
        if self.depth <= 0:
            self.depth = 0
            self.num_steps += 1
            self.batch.updated = True

    # ------------------------------------------------------------------ stepping

    def update(self, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> str | None:
        """Steps the wrapped optimizer.

        Args:
            closure: What its ``step`` was given; None where it was given nothing.
            kwargs: Passed on to the wrapped optimizer's ``step``.

        Returns:
            Why the step was skipped; None where it was not.

        Raises:
            MisconfigurationError: The closure was never called, or a later evaluation of it was vetoed.
        """
        self.stepping = True
        self.evaluations = 0
        self._closure = closure
        try:
            if closure is None:
                self.evaluate()
                self.result = self.wrapped.step(**kwargs)
            else:
                self.result = self.wrapped.step(self._evaluate, **kwargs)
                if self.evaluations == 0 and not self.batch.automatic:  # else the loop says it, and names the hook
                    raise MisconfigurationError(
                        f"{type(self.wrapped).__name__}.step did not run the closure that it was given, so there "
                        "were no gradients. An optimizer has to call it: `loss = closure()` under `torch.enable_grad()`."
                    )
        except StepSkipped as skip:
            return skip.reason
        finally:
            self.stepping = self.ready = False
            self.depth = self.evaluations = 0
            self._closure = None
        return None

    def evaluate(self) -> Any:
        """The closure that the wrapped optimizer gets: runs the given one, if any, completes the gradients, lets
        listeners veto, and clips. One function, because every step calls it."""
        signals, batch = self.signals, self.batch
        if self._closure is not None:
            self.evaluations += 1
            self.ready = False
            self.result = self._closure()
        if batch.automatic and batch.contributions == 0:
            self._skip("no loss")
        if not self.ready:
            self.complete_gradients()
        reason: str | None = None
        if signals.before_optimizer_step.listeners:
            event = BeforeOptimizerStep(self.optimizer, max(self.evaluations, 1))
            signals.before_optimizer_step.publish(event)
            reason = event.skip_reason
        if batch.processes is not None and batch.processes.any(reason is not None):
            reason = reason or "another rank's veto"
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
        """Publishes that a step of the wrapped optimizer was left before it updated anything."""
        self.depth = 0
        self.signals.optimizer_step_skipped.publish(OptimizerStepSkipped(self.optimizer, reason))

    # ------------------------------------------------------------------ gradients

    def complete_gradients(self) -> None:
        """Publishes the three gradient events: after it the gradients are the true ones. To be asked for where
        ``ready`` does not hold."""
        self.ready = True
        signals, batch = self.signals, self.batch
        if signals.reduce_gradients.listeners:
            signals.reduce_gradients.publish(ReduceGradients(self.optimizer, batch.automatic and batch.skipped))
        if signals.unscale_gradients.listeners:
            can_skip = self.stepping or self.depth == 0
            signals.unscale_gradients.publish(UnscaleGradients(self.optimizer, max(self.evaluations, 1), can_skip))
        if signals.gradients_ready.listeners:
            if batch.automatic:
                ready = GradientsReady(self.optimizer, batch.contributions, batch.weight, batch.weight_reference)
            else:
                ready = GradientsReady(self.optimizer, None, None, None)
            signals.gradients_ready.publish(ready)
        if signals.gradients_final.listeners:
            signals.gradients_final.publish(GradientsFinal(self.optimizer, self.stepping or self.depth > 0))

    def _clip(self) -> None:
        """Asks the policies, and clips by what they wrote."""
        event = BeforeGradientClipping(self.optimizer)
        self.signals.before_gradient_clipping.publish(event)
        by_module = self.clip_hook is not None
        if self.signals.clipping_decided.listeners:
            value, algorithm = event.gradient_clip_val, event.gradient_clip_algorithm
            decided = ClippingDecided(self.optimizer, value, algorithm, event.norm_type, by_module)
            self.signals.clipping_decided.publish(decided)
        if self.clip_hook is not None:
            self.norm_type = event.norm_type
            try:
                self.clip_hook(self.optimizer, event.gradient_clip_val, event.gradient_clip_algorithm)
            finally:
                self.norm_type = 2.0
        else:
            self.optimizer.clip_gradients(event.gradient_clip_val, event.gradient_clip_algorithm, event.norm_type)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the gradients of the wrapped optimizer's parameters.

        Args:
            set_to_none: Whether to drop the gradients rather than to fill them with zeros.
        """
        self.ready = False
        signals = self.signals
        if signals.before_zero_grad.listeners:
            with BeforeZeroGrad(self.optimizer) as phase:
                signals.before_zero_grad.publish(phase)
                self.wrapped.zero_grad(set_to_none)
        else:
            self.wrapped.zero_grad(set_to_none)
        if signals.after_zero_grad.listeners:
            signals.after_zero_grad.publish(AfterZeroGrad(self.optimizer))

    def zero_grad_by(self, hook: Callable[..., Any], *args: Any) -> None:
        """Zeroes by a module's ``optimizer_zero_grad``, with the same events around it.

        Args:
            hook: The overridden hook.
            *args: What it is called with.
        """
        self.ready = False
        self.zeroing = True
        try:
            with BeforeZeroGrad(self.optimizer) as phase:
                self.signals.before_zero_grad.publish(phase)
                hook(*args)
        finally:
            self.zeroing = False
        self.signals.after_zero_grad.publish(AfterZeroGrad(self.optimizer))
