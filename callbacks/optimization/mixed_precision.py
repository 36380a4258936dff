"""Mixed precision: autocast, and loss scaling for fp16."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from eventtrain._torch import version
from eventtrain.callback import Callback
from eventtrain.checks import check_option, check_whole_number
from eventtrain.core.optimizer import LightningOptimizer, evaluates_often
from eventtrain.errors import MisconfigurationError
from eventtrain.events import (
    AfterBackward,
    AfterOptimizerStep,
    AfterZeroGrad,
    BeforeBackward,
    BeforeForward,
    BeforeOptimizerStep,
    FitStart,
    Setup,
    TrainBatchEnd,
    UnscaleGradients,
)
from eventtrain.trainer import Trainer

HOLDINGS = ("scaled", "plain", "mixed")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteGradientError(MisconfigurationError, FloatingPointError):
    """Gradients have infinities or NaNs.

    It is raised if the step cannot be skipped, or if too many steps were skipped in a row.
    """


class MixedPrecision(Callback):
    """Runs forward in lower precision; parameters, gradients and updates stay in float32.

    Listens to ``before_forward``, and enters :class:`torch.autocast` there. For fp16 it also scales the loss at
    ``before_backward``, takes the scale off at ``unscale_gradients``, vetoes a step whose gradients overflowed at
    ``before_optimizer_step`` (reason ``"overflow"``), and updates the scale at ``after_zero_grad`` and
    ``train_batch_end``, once no optimizer holds gradients that were scaled with it. Also listens to ``setup``,
    ``fit_start``, ``after_backward`` and ``after_optimizer_step``. Emits no metrics. Override :meth:`autocast` to choose
    how forward runs.

    Args:
        precision: ``"bf16"``, without loss scaling, or ``"fp16"``, with it.
        scaler: The loss scaler for fp16; None for a ``torch.amp.GradScaler`` with its defaults. Each fit begins with the state
            that it has now, unless it resumes a checkpoint.
        max_consecutive_overflows: The number of overflows in a row at which the run ends with an error.

    Raises:
        MisconfigurationError: If the precision is unknown, or a scaler is given for bf16; when training starts, if an
            optimizer evaluates its closure several times and the precision is fp16.
        NonFiniteGradientError: During the run, after too many overflows in a row, or after one in a step that cannot be
            skipped.

    Example:
        >>> from eventtrain import Trainer
        >>> class OnlyWhenTraining(MixedPrecision):
        ...     def on_before_forward(self, trainer, event):
        ...         if event.stage == "train":
        ...             super().on_before_forward(trainer, event)
        >>> Trainer(max_epochs=1, callbacks=[OnlyWhenTraining("bf16")]).callback(MixedPrecision).precision
        'bf16'
    """

    role = "precision"

    def __init__(
        self,
        precision: Literal["bf16", "fp16"],
        *,
        scaler: GradScaler | None = None,
        max_consecutive_overflows: int = 100,
    ) -> None:
        check_option(precision, "MixedPrecision", "precision", tuple(DTYPES))
        if precision == "bf16" and scaler is not None:
            raise MisconfigurationError(
                "MixedPrecision('bf16', scaler=...): bf16 has the range of float32 and is not scaled. Leave the scaler out."
            )
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise MisconfigurationError(f"MixedPrecision(scaler={scaler!r}): give a torch.amp.GradScaler, or None.")
        check_whole_number(max_consecutive_overflows, "MixedPrecision", "max_consecutive_overflows", least=1)
        self.precision = precision
        self.scaler = scaler
        self.max_consecutive_overflows = max_consecutive_overflows
        self._is_given = scaler is not None
        self._fresh = {} if scaler is None else scaler.state_dict()  # each fit begins with it
        self._autocast: torch.autocast | None = None
        self._manual = False
        self._overflows = 0
        self._loaded: dict[str, Any] = {"scaler": self._fresh, "overflows": 0}
        self._optimizers: list[LightningOptimizer] = []
        # Optimizers that hold scaled gradients; the scale may change only while there are none.
        self._scaled: set[LightningOptimizer] = set()
        # Optimizers whose gradients were unscaled and not zeroed since; and the ones of these to which scaled gradients were
        # added as well.
        self._plain: set[LightningOptimizer] = set()
        self._mixed: set[LightningOptimizer] = set()
        # The versions of the other optimizers' gradients before the current backward.
        self._held: dict[LightningOptimizer, list[Any]] = {}
        # Gradients that were unscaled and not stepped yet, and all that were unscaled since the last update of the scale.
        self._unscaled: dict[LightningOptimizer, UnscaledGradients] = {}
        self._since_update: list[UnscaledGradients] = []

    def autocast(self, trainer: Trainer) -> torch.autocast:
        """Return the autocast that each forward runs in: the policy, which a subclass may override.

        Args:
            trainer: The trainer.
        """
        return torch.autocast(trainer.device.type, dtype=DTYPES[self.precision])

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        self._autocast = self.autocast(trainer)
        if event.stage == "fit":
            self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        """Forget the fit before this one, whose last scale and open window are not this one's."""
        if self._since_update and self.scaler is not None:
            self.scaler.update()  # it keeps what it has unscaled until then
        for holdings in (self._scaled, self._plain, self._mixed, self._unscaled, self._held, self._since_update):
            holdings.clear()
        self._overflows, self._optimizers = 0, []
        self._loaded = {"scaler": self._fresh, "overflows": 0}
        if self.precision == "fp16" and not self._is_given:
            self.scaler = GradScaler(device=trainer.device.type)
        elif self.scaler is not None and self._fresh:  # a disabled scaler has no state
            self.scaler.load_state_dict(self._fresh)

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        self._manual = not trainer.module.automatic_optimization
        self._optimizers = trainer.optimizers
        self._hold_again(trainer.device)
        for optimizer in trainer.optimizers:
            if self.scaler is not None and evaluates_often(optimizer):
                raise MisconfigurationError(
                    f"{type(optimizer.optimizer).__name__} evaluates its closure several times a step, and an overflow can "
                    "only skip a step before its first evaluation. Use MixedPrecision('bf16'), which needs no loss scaling."
                )

    def on_before_forward(self, trainer: Trainer, event: BeforeForward) -> None:
        assert self._autocast is not None
        event.enter(self._autocast)

    def on_before_backward(self, trainer: Trainer, event: BeforeBackward) -> None:
        if self._manual:  # backward runs within training_step, and autocast is on there
            event.enter(torch.autocast(trainer.device.type, enabled=False))
        if self.scaler is not None:
            event.loss = self.scaler.scale(event.loss)
            self._held = {each: versions(each) for each in trainer.optimizers if each not in self._scaled}

    def on_after_backward(self, trainer: Trainer, event: AfterBackward) -> None:
        for optimizer, held in self._held.items():
            if versions(optimizer) == held:
                continue  # this backward did not touch them: they were unscaled and stepped with before, for example
            self._scaled.add(optimizer)
            if optimizer in self._plain and any(version is not None for version in held):
                self._mixed.add(optimizer)
        self._held.clear()
        self._forget_casts()

    def on_after_optimizer_step(self, trainer: Trainer, event: AfterOptimizerStep) -> None:
        self._forget_casts()

    def on_unscale_gradients(self, trainer: Trainer, event: UnscaleGradients) -> None:
        optimizer = event.optimizer
        if self.scaler is None or optimizer not in self._scaled:
            return
        if event.evaluation > 1:
            raise MisconfigurationError(
                f"{type(optimizer.optimizer).__name__} evaluated its closure a second time under loss scaling, when its "
                "weights have moved and an overflow can no longer skip the step. Use MixedPrecision('bf16')."
            )
        if optimizer in self._mixed:
            raise MisconfigurationError(
                f"A backward added scaled gradients to those of {type(optimizer.optimizer).__name__} that were unscaled "
                "already, by a step or by clip_gradients. Call zero_grad before it, or clip once, right before the step."
            )
        self._plain.add(optimizer)
        gradients = UnscaledGradients(optimizer)
        self.scaler.unscale_(gradients)  # type: ignore[arg-type]
        self._scaled.discard(optimizer)
        self._unscaled[optimizer] = gradients
        self._since_update.append(gradients)
        if not event.can_skip and not self._finite(optimizer):
            raise NonFiniteGradientError(
                f"Gradients overflowed in a step on the wrapped {type(optimizer.optimizer).__name__}, which cannot be skipped. "
                "Call step on the LightningOptimizer rather than on its `.optimizer`."
            )

    def on_before_optimizer_step(self, trainer: Trainer, event: BeforeOptimizerStep) -> None:
        if self.scaler is None:
            return
        if not has_gradients(event.optimizer):
            event.skip("no gradients")
        elif event.optimizer in self._unscaled:
            if self._finite(event.optimizer):
                self._overflows = 0
            else:
                self._count_overflow()
                event.skip("overflow")

    def on_after_zero_grad(self, trainer: Trainer, event: AfterZeroGrad) -> None:
        for optimizers in (self._scaled, self._plain, self._mixed):
            optimizers.discard(event.optimizer)
        self._unscaled.pop(event.optimizer, None)
        if any(gradients.optimizer is event.optimizer for gradients in self._since_update):
            self._update_scale()  # its next unscaling would otherwise be a second one under one scale

    def on_train_batch_end(self, trainer: Trainer, event: TrainBatchEnd) -> None:
        self._update_scale()

    def _forget_casts(self) -> None:
        """Clear autocast's copies of weights in manual optimization: there the forward's autocast stays on while weights
        change, even by steps that publish no event, and would use the old copies."""
        if self._manual:
            torch.clear_autocast_cache()

    def _finite(self, optimizer: LightningOptimizer) -> bool:
        """Return whether an optimizer's unscaled gradients are finite, by one host synchronisation, which is torch's."""
        assert self.scaler is not None
        gradients = self._unscaled.pop(optimizer)
        gradients.asked = True
        return bool(self.scaler.step(gradients))  # type: ignore[arg-type]

    def _update_scale(self) -> None:
        if self._since_update and not self._scaled:
            assert self.scaler is not None
            self.scaler.update()
            self._since_update.clear()

    def _count_overflow(self) -> None:
        self._overflows += 1
        if self._overflows >= self.max_consecutive_overflows:
            raise NonFiniteGradientError(
                f"{self._overflows} steps in a row overflowed in fp16, so the loss itself is likely infinite or NaN. Use "
                "MixedPrecision('bf16'), a smaller learning rate, or a larger max_consecutive_overflows."
            )

    def state_dict(self) -> dict[str, Any]:
        if not self._optimizers:
            return dict(self._loaded)
        scaler = self.scaler.state_dict() if self.scaler is not None else self._loaded["scaler"]
        # A checkpoint may be written while a window is open: optimizers are named by their places in configure_optimizers.
        holdings = zip(HOLDINGS, (self._scaled, self._plain, self._mixed), strict=True)
        places = {name: [at for at, each in enumerate(self._optimizers) if each in holders] for name, holders in holdings}
        waiting = [
            (self._optimizers.index(each.optimizer), each.overflowed(), self._unscaled.get(each.optimizer) is each)
            for each in self._since_update
        ]
        return {"scaler": scaler, "overflows": self._overflows, **places, "awaiting_update": waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state  # before fit_start there may be no scaler yet, and there are no optimizers
        self._optimizers = []
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self._overflows = state["overflows"]

    def _hold_again(self, device: torch.device) -> None:
        """Restore which optimizers held scaled and unscaled gradients when the checkpoint was written."""
        for name, optimizers in zip(HOLDINGS, (self._scaled, self._plain, self._mixed), strict=True):
            optimizers.update(self._optimizers[at] for at in self._loaded.get(name, ()))
        for at, overflowed, unstepped in self._loaded.get("awaiting_update", ()):
            assert self.scaler is not None
            self.scaler.scale(torch.zeros((), device=device))  # the scaler builds its scale at the first use
            gradients = UnscaledGradients(self._optimizers[at])
            gradients.unscale_again(self.scaler, overflowed, device)
            self._since_update.append(gradients)
            if unstepped:
                self._unscaled[gradients.optimizer] = gradients


def versions(optimizer: LightningOptimizer) -> list[Any]:
    """Return a list that changes when a backward adds to any of an optimizer's gradients."""
    return [None if p.grad is None else (id(p.grad), version(p.grad)) for p in optimizer.parameters()]


class UnscaledGradients:
    """The gradients of one optimizer in one window, in the form of an optimizer that ``GradScaler`` accepts.

    The scaler keeps its records by object, and refuses a second ``unscale_`` of one object before its ``update``. With one
    object per window, an optimizer that steps twice under one scale needs no special case, the scaler remembers all
    overflows since its last update, and the scaler does not run the real step with its closure.

    Args:
        optimizer: The optimizer that holds them.
    """

    def __init__(self, optimizer: LightningOptimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.asked = self._finite = False

    def step(self) -> bool:
        """Note that every gradient is finite: only then does ``GradScaler.step`` call this method."""
        self._finite = True
        return True

    def overflowed(self) -> bool:
        """Return whether a gradient is not finite: by the scaler's answer, or by the gradients if it was not asked yet."""
        if self.asked:
            return not self._finite
        gradients = (parameter.grad for parameter in self.optimizer.parameters() if parameter.grad is not None)
        return not all(bool(gradient.isfinite().all()) for gradient in gradients)

    def unscale_again(self, scaler: GradScaler, overflowed: bool, device: torch.device) -> None:
        """Give a new scaler the record that an old one made when it unscaled these gradients.

        Args:
            scaler: The new scaler.
            overflowed: Whether a gradient was not finite.
            device: The device of the gradients.
        """
        witness = torch.zeros((), device=device)
        witness.grad = torch.full_like(witness, torch.inf if overflowed else 0.0)
        self.param_groups, param_groups = [{"params": [witness]}], self.param_groups
        scaler.unscale_(self)  # type: ignore[arg-type]
        self.param_groups = param_groups


def has_gradients(optimizer: Optimizer) -> bool:
    """Return whether any parameter of an optimizer holds a gradient."""
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
