"""``training_step``, ``zero_grad`` and ``backward`` as one object, in the form that optimizers take."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from eventtrain.errors import MisconfigurationError, StepSkipped
from eventtrain.events import AfterBackward, AfterForward, BeforeBackward, BeforeForward, Stage

if TYPE_CHECKING:
    from eventtrain.core.signals import SignalTable
    from eventtrain.core.state import BatchState
    from eventtrain.core.stepping import Stepping


def forward(
    signals: SignalTable, stage: Stage, step: Callable[..., Any], args: tuple[Any, ...], *, closes_window: bool = False
) -> Any:
    """Run a module's step in its phase.

    Args:
        signals: The signals on which ``before_forward`` is published.
        stage: ``"train"``, ``"validation"``, ``"test"`` or ``"predict"``.
        step: The module's method.
        args: Its arguments: the batch, then its index if the step takes one, and so on.
        closes_window: See :class:`~eventtrain.events.BeforeForward`.

    Returns:
        The value that the step returned.
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


@dataclass(slots=True, eq=False)
class Closure:
    """Evaluates the loss of the current batch and its gradients.

    The one object of a run that is handed to ``optimizer.step(closure)``, or called without a step in a batch that only
    accumulates. It publishes forward, zero_grad and backward, and the gradient events if the batch closes a window.

    Args:
        signals: The signals on which events are published.
        batch: The current batch.
        stepping: The optimizer's steps in the run.
        training_step: Called as ``training_step(batch, batch_idx)``.
        takes_index: Whether ``training_step`` takes ``batch_idx``.
        backward_hook: The module's overridden ``backward``; ``loss.backward()`` by default.
        zero_grad_hook: Called as ``hook(batch_idx, optimizer)``: the module's overridden ``optimizer_zero_grad``; None for
            ``optimizer.zero_grad()``.

    Example:
        >>> import torch
        >>> from eventtrain import LightningModule, Trainer
        >>> class Line(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(1, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return self.layer(batch).mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        ...     def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        ...         print(type(optimizer_closure).__name__)
        ...         optimizer.step(closure=optimizer_closure)
        >>> Trainer(max_epochs=1, device="cpu", default_callbacks=False).fit(Line(), [torch.ones(2, 1)])
        Closure
    """

    # One object per run instead of one per batch, with slots: 3 % of a small step.
    signals: SignalTable
    batch: BatchState
    stepping: Stepping
    training_step: Callable[..., Any]
    takes_index: bool = field(default=True, kw_only=True)
    backward_hook: Callable[..., Any] = field(default=Tensor.backward, kw_only=True)
    zero_grad_hook: Callable[..., Any] | None = field(default=None, kw_only=True)
    _zero_grad: Callable[[], None] = field(init=False)

    def __post_init__(self) -> None:
        batch, stepping, hook = self.batch, self.stepping, self.zero_grad_hook
        self._zero_grad = stepping.zero_grad
        if hook is not None:
            self._zero_grad = lambda: stepping.zero_grad_by(hook, batch.batch_idx, stepping.optimizer)

    def __call__(self) -> Tensor | None:
        """Evaluate the current batch and return its raw loss; None for a batch without one.

        Raises:
            MisconfigurationError: If ``training_step`` returned neither, or the optimizer repeats it in a longer window.
        """
        batch, plan, signals, stepping = self.batch, self.batch.plan, self.signals, self.stepping
        batch.evaluations += 1
        if batch.evaluations > 1 and not plan.zero_grad:
            raise repeated_evaluation(stepping.wrapped)
        loss = weight = None
        # A step in training_step or a hook is one of the user's own, and no part of the step whose closure this is.
        depth, stepping.depth, batch.closing = stepping.depth, 0, False
        if not batch.skipped:
            args = (batch.batch, batch.batch_idx) if self.takes_index else (batch.batch,)
            if signals.before_forward.listeners:
                outputs = forward(signals, "train", self.training_step, args, closes_window=plan.step)
            else:
                outputs = self.training_step(*args)
            if isinstance(outputs, Tensor) and outputs.ndim == 0 and outputs.requires_grad:
                loss = outputs  # the usual loss: a call less
            else:
                loss, weight = parse_outputs(outputs, stepping.wrapped)
            if signals.after_forward.listeners:
                outputs, loss = after_forward(signals, "train", args[0], batch.batch_idx, outputs, loss)
            batch.outputs, batch.loss = outputs, loss
        if plan.zero_grad:
            batch.contributions = batch.missing = 0
            self._zero_grad()
        batch.had_loss |= loss is not None
        if loss is None:
            batch.missing += 1
        elif weight is None and batch.weight is None:
            batch.contributions += 1
        else:
            batch.contribute(weight)
        if plan.step and batch.processes is not None:
            batch.processes.begin_reduction(*batch.contributed)
        if loss is not None:
            scaled = loss
            if weight is not None and plan.weighted:
                scaled = weighted(loss, weight, batch)
            elif plan.loss_scale != 1.0:
                divisor = whole_divisor(plan.loss_scale)
                scaled = loss / divisor if divisor else loss * plan.loss_scale
            if signals.before_backward.listeners or signals.after_backward.listeners:
                backward(signals, self.backward_hook, loss, scaled, evaluation=batch.evaluations)
            else:
                self.backward_hook(scaled)
        stepping.depth, batch.closing = depth, plan.step
        if plan.step and not stepping.ready and (batch.contributions or batch.processes is not None):
            stepping.complete_gradients()
        if plan.step and not batch.contributions and stepping.is_raw:
            raise StepSkipped("no loss")  # only the loop can stop a plain torch step
        return loss


def repeated_evaluation(optimizer: Optimizer) -> MisconfigurationError:
    """Return the error for an optimizer that evaluates its closure twice in a window of several batches."""
    return MisconfigurationError(
        f"{type(optimizer).__name__} evaluated the closure a second time in an accumulation window of several batches, which "
        "would count this batch's gradients twice. Train such optimizers without GradientAccumulation, on larger batches."
    )


def after_forward(signals: SignalTable, *fields: Any) -> tuple[Any, Tensor | None]:
    """Publish that a module's step has returned; return its outputs and its loss, which listeners may have replaced.

    Args:
        signals: The signals on which ``after_forward`` is published.
        *fields: The fields of :class:`~eventtrain.events.AfterForward`.
    """
    event = AfterForward(*fields)
    signals.after_forward.publish(event)
    return event.outputs, event.loss


def parse_outputs(outputs: Any, optimizer: Optimizer | None = None) -> tuple[Tensor | None, Tensor | float | None]:
    """Take the value of ``training_step`` apart.

    Args:
        outputs: A scalar tensor, a mapping with ``"loss"`` and perhaps ``"weight"``, or None.
        optimizer: The optimizer whose ``step`` is asking, for messages.

    Returns:
        The loss and the weight, each None if there is none.

    Raises:
        MisconfigurationError: If the value is anything else, or the loss is not a scalar that needs gradients.
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
        check_grad_mode(optimizer)
        raise MisconfigurationError(
            "training_step returned a loss that needs no gradient. Either no trainable parameter took part in it, or it "
            "was detached; return None for a batch without a loss."
        )
    return loss, weight


def check_grad_mode(optimizer: Optimizer | None = None) -> None:
    """Check, if a loss needs no gradient, that gradients are on.

    Args:
        optimizer: The optimizer whose ``step`` is asking for the loss, if it is known.

    Raises:
        MisconfigurationError: If they are off.
    """
    if not torch.is_grad_enabled():
        step = "The optimizer's step" if optimizer is None else f"{type(optimizer).__name__}.step"
        raise MisconfigurationError(
            f"The loss has no gradient, because gradients are off. {step} has to run its closure with gradients: write `with "
            "torch.enable_grad(): loss = closure()` there, as torch's optimizers do."
        )


def never_returns_a_value(function: Callable[..., Any]) -> bool:
    """Return whether each ``return`` of a function returns None; False if it has no Python code to tell."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    instructions = [] if code is None else list(dis.get_instructions(code))
    returns = [(before, each) for before, each in pairwise(instructions) if each.opname.startswith("RETURN_")]
    # A return that is jumped to has several values. Else the instruction before it makes the value, if it does not itself.
    makers = [each if "CONST" in each.opname else before for before, each in returns if not each.is_jump_target]
    nothing = [maker for maker in makers if "CONST" in maker.opname and maker.argval is None]
    return 0 < len(nothing) == len(returns)


def check_weight(weight: Any) -> None:
    """Check a batch's weight.

    Raises:
        MisconfigurationError: If it is neither a number nor a tensor of one element.
    """
    if isinstance(weight, Tensor):
        if weight.numel() == 1:
            return
        value = f"a tensor of shape {tuple(weight.shape)}"
    elif isinstance(weight, (int, float)):
        return
    else:
        value = f"{weight!r} ({type(weight).__name__})"
    raise MisconfigurationError(
        f"training_step returned {value} under 'weight'. It has to be a number or a scalar tensor: the batch's samples or "
        "tokens, for example their sum."
    )


def weighted(loss: Tensor, weight: Tensor | float, batch: BatchState) -> Tensor:
    """Return the loss that backward runs on in a weighted window.

    Args:
        loss: The raw loss.
        weight: The batch's weight.
        batch: The current batch; its plan holds ``loss_scale``, which is 1 / N in a window of N batches.

    Returns:
        ``loss * weight / (N * w_ref)``.
    """
    scale, reference = batch.plan.loss_scale, batch.weight_reference
    assert reference is not None
    return loss * weight / ((whole_divisor(scale) or 1.0 / scale) * reference)


@lru_cache(maxsize=64)  # every batch asks, with the same few numbers
def whole_divisor(loss_scale: float) -> int:
    """Return the whole number N if a loss scale is 1 / N, else 0.

    A product with a rounded 1/3 differs from a division by 3 in the last bit.
    """
    divisor = round(1.0 / loss_scale) if loss_scale else 0
    return divisor if divisor >= 1 and 1.0 / divisor == loss_scale else 0
