"""``training_step``, ``zero_grad`` and ``backward`` as one object, in the form that optimizers take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

from eventtrain.errors import MisconfigurationError, StepSkipped
from eventtrain.events import AfterBackward, AfterForward, BeforeBackward, BeforeForward, Stage

if TYPE_CHECKING:
    from eventtrain.core.signals import SignalTable
    from eventtrain.core.state import BatchState
    from eventtrain.core.stepping import Stepping


def forward(
    signals: SignalTable, stage: Stage, step: Callable[..., Any], args: tuple[Any, ...], *, closes_window: bool = False
) -> Any:
    """Runs a module's step inside of its phase.

    Args:
        signals: Where ``before_forward`` is published.
        stage: ``"train"``, ``"validation"``, ``"test"`` or ``"predict"``.
        step: The module's method.
        args: What it is called with; begins with the batch, then its index where the step takes one.
        closes_window: See :class:`~eventtrain.events.BeforeForward`.

    Returns:
        What the step returned.
    """
    if not signals.before_forward.listeners:
        return step(*args)
    with (phase := BeforeForward(stage, args[0], args[1] if len(args) > 1 else 0, closes_window)):
        signals.before_forward.publish(phase)
        return phase.call(step, *args)


def backward(
    signals: SignalTable,
    call: Callable[..., Any],
    raw_loss: Tensor,
    loss: Tensor,
    *args: Any,
    evaluation: int = 1,
    **kwargs: Any,
) -> None:
    """Run backward in its phase.

    Args:
        signals: The signals on which ``before_backward`` and ``after_backward`` are published.
        call: The backward, called as ``call(loss, *args, **kwargs)``.
        raw_loss: The loss that the module returned.
        loss: The loss that backward runs on; listeners may replace it.
        *args: Passed on to ``call``.
        evaluation: The number of this evaluation of the closure in its batch.
        **kwargs: Passed on to ``call``.
    """
    if signals.before_backward.listeners:
        with (phase := BeforeBackward(raw_loss, loss, evaluation)):
            signals.before_backward.publish(phase)
            call(phase.loss, *args, **kwargs)
    else:
        call(loss, *args, **kwargs)
    if signals.after_backward.listeners:
        signals.after_backward.publish(AfterBackward(raw_loss))


class Closure:
    """Evaluates the loss of the batch at hand and its gradients.

    The one object of a run that is handed to ``optimizer.step(closure)``, or called alone in a batch that
    only accumulates. Publishes forward, zero_grad and backward, and where the batch closes a window the
    gradient events.

    Args:
        signals: Where events are published.
        batch: The batch at hand.
        stepping: The optimizer's part in the run.
        training_step: Called as ``training_step(batch, batch_idx)``.
        takes_index: Whether it is given ``batch_idx``.
        backward_hook: The module's overridden ``backward``, or None for ``loss.backward()``.
        zero_grad_hook: Called as ``hook(batch_idx, optimizer)``: the module's overridden
            ``optimizer_zero_grad``; None for ``optimizer.zero_grad()``.
    """

    # One object per run in place of one per batch: 3 % of a small step.
    __slots__ = ("_backward", "_zero_grad_hook", "batch", "signals", "stepping", "takes_index", "training_step")

    def __init__(
        self,
        signals: SignalTable,
        batch: BatchState,
        stepping: Stepping,
        training_step: Callable[..., Any],
        *,
        takes_index: bool = True,
        backward_hook: Callable[..., Any] | None = None,
        zero_grad_hook: Callable[..., Any] | None = None,
    ) -> None:
        self.signals = signals
        self.batch = batch
        self.stepping = stepping
        self.training_step = training_step
        self.takes_index = takes_index
        self._backward = backward_hook or Tensor.backward
        self._zero_grad_hook = zero_grad_hook

    def __call__(self) -> Tensor | None:
        """Evaluates.

        Returns:
            The raw loss; None for a batch without one.

        Raises:
            MisconfigurationError: ``training_step`` returned something else, or an evaluation was
                repeated in a window that holds other batches' gradients.
        """
        state, signals = self.batch, self.signals
        plan = state.plan
        state.evaluations += 1
        if state.evaluations > 1 and not plan.zero_grad:
            raise MisconfigurationError(
                f"{type(self.stepping.wrapped).__name__} evaluated the closure a second time in an accumulation window "
                "of several batches, which would count this batch's gradients twice. Train such optimizers without "
                "GradientAccumulation, on larger batches."
            )
        loss = weight = None
        if not state.skipped:
            if signals.before_forward.listeners:
                args = (state.batch, state.batch_idx) if self.takes_index else (state.batch,)
                outputs = forward(signals, "train", self.training_step, args, closes_window=plan.step)
            elif self.takes_index:
                outputs = self.training_step(state.batch, state.batch_idx)
            else:
                outputs = self.training_step(state.batch)
            if isinstance(outputs, Tensor) and outputs.ndim == 0 and outputs.requires_grad:
                loss = outputs  # the usual loss: a call less
            else:
                loss, weight = parse_outputs(outputs)
            if signals.after_forward.listeners:
                event = AfterForward("train", state.batch, state.batch_idx, outputs, loss)
                signals.after_forward.publish(event)
                outputs, loss = event.outputs, event.loss
            state.outputs = outputs
            state.loss = loss
            if state.processes is not None and plan.step and state.processes.any(loss is None):
                raise MisconfigurationError(
                    f"training_step returned no loss on a rank in batch {state.batch_idx}, which closes a window: the "
                    "other ranks would wait for its gradients. Return a loss of zero with 'weight': 0 there."
                )
        if plan.zero_grad:
            state.contributions = 0
            if self._zero_grad_hook is None:
                self.stepping.zero_grad()
            else:
                self.stepping.zero_grad_by(self._zero_grad_hook, state.batch_idx, self.stepping.optimizer)
        if loss is not None:
            if weight is None and state.weight is None:
                state.contributions += 1
            else:
                state.contribute(weight)
            scaled = loss
            if weight is not None and plan.weighted:
                scaled = weighted(loss, weight, state)
            elif plan.loss_scale != 1.0:
                divisor = whole_divisor(plan.loss_scale)
                scaled = loss / divisor if divisor else loss * plan.loss_scale
            if signals.before_backward.listeners or signals.after_backward.listeners:
                backward(signals, self._backward, loss, scaled, evaluation=state.evaluations)
            else:
                self._backward(scaled)
        if plan.step:
            if state.contributions:
                if not self.stepping.ready:
                    self.stepping.complete_gradients()
            elif self.stepping.is_raw:
                raise StepSkipped("no loss")  # nobody but the loop can stop a plain torch step
        return loss


def parse_outputs(outputs: Any) -> tuple[Tensor | None, Tensor | float | None]:
    """What ``training_step`` returned, taken apart.

    Args:
        outputs: A scalar tensor, a mapping with ``"loss"`` and perhaps ``"weight"``, or None.

    Returns:
        The loss and the weight, None where there is none.

    Raises:
        MisconfigurationError: It is anything else, or the loss is not a scalar that needs gradients.
    """
    loss, weight = outputs, None
    if not isinstance(outputs, Tensor):
        if outputs is None:
            return None, None
        if not isinstance(outputs, Mapping):
            raise MisconfigurationError(
                f"training_step returned {outputs!r} ({type(outputs).__name__}). Return the loss as a scalar tensor, a "
                "mapping with the key 'loss', or None for a batch without a loss."
            )
        if "loss" not in outputs:
            raise MisconfigurationError(
                f"training_step returned a mapping with the keys {sorted(map(str, outputs))} and no 'loss'. Put the loss "
                "under 'loss', or return None for a batch without one."
            )
        loss, weight = outputs["loss"], outputs.get("weight")
        if weight is not None:
            check_weight(weight)
        if loss is None:
            return None, None
        if not isinstance(loss, Tensor):
            raise MisconfigurationError(
                f"training_step returned {loss!r} ({type(loss).__name__}) under 'loss'. It has to be a scalar tensor."
            )
    if loss.numel() != 1:
        raise MisconfigurationError(
            f"training_step returned a loss of shape {tuple(loss.shape)}. It has to be a scalar: take its mean or sum."
        )
    if not loss.requires_grad:
        raise MisconfigurationError(
            "training_step returned a loss that needs no gradient. Either no trainable parameter took part in it, or it "
            "was detached; return None for a batch without a loss."
        )
    return loss, weight


def check_weight(weight: Any) -> None:
    """Refuses a batch's weight that is no number.

    Raises:
        MisconfigurationError: It is not.
    """
    if isinstance(weight, Tensor):
        if weight.numel() == 1:
            return
        found = f"a tensor of shape {tuple(weight.shape)}"
    elif isinstance(weight, (int, float)):
        return
    else:
        found = f"{weight!r} ({type(weight).__name__})"
    raise MisconfigurationError(
        f"training_step returned {found} under 'weight'. It has to be a number or a scalar tensor: the batch's samples or "
        "tokens, for example their sum."
    )


def weighted(loss: Tensor, weight: Tensor | float, state: BatchState) -> Tensor:
    """The loss that backward runs on in a weighted window.

    Args:
        loss: The raw loss.
        weight: The batch's weight.
        state: The batch at hand; its plan holds ``loss_scale``, which is 1 / N in a window of N batches.

    Returns:
        ``loss * weight / (N * w_ref)``.
    """
    scale, reference = state.plan.loss_scale, state.weight_reference
    assert reference is not None
    return loss * weight / ((whole_divisor(scale) or 1.0 / scale) * reference)


@lru_cache(maxsize=64)  # asked for in every batch, with the same few numbers
def whole_divisor(loss_scale: float) -> int:
    """The whole number N of which a loss scale is 1 / N; 0 where there is none.

    A product with a rounded 1/3 differs from a division by 3 in the last bit.
    """
    divisor = round(1.0 / loss_scale) if loss_scale else 0
    return divisor if divisor >= 1 and 1.0 / divisor == loss_scale else 0
