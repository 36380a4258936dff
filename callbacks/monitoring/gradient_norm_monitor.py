"""Log the norms of gradients, and how often they are clipped."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from eventtrain.callback import Callback
from eventtrain.callbacks.monitoring.numbered import numbered
from eventtrain.checks import check_number, check_whole_number
from eventtrain.core.clipping import total_norm
from eventtrain.core.optimizer import LightningOptimizer
from eventtrain.events import (
    AfterGradientClipping,
    AfterOptimizerStep,
    ClippingDecided,
    FitStart,
    GradientsFinal,
    Teardown,
)
from eventtrain.module.module import LightningModule
from eventtrain.trainer import Trainer


class GradientNormMonitor(Callback):
    """Log the norm of the true gradients (complete, unscaled, normalised) before they are clipped, and how often they are
    clipped.

    Listens to ``gradients_final``, ``clipping_decided``, ``after_gradient_clipping`` and ``after_optimizer_step``, and at the
    last of them adds the values to those of the update by ``trainer.log_on_step``. Loggers write them at their cadence, and
    no value is read earlier. Also listens to ``fit_start`` and ``teardown``. Nothing is logged for a skipped step, nor for a
    step of ``optimizer.optimizer``.

    If the gradients are clipped by the norm that is logged, the monitor takes the one that ``after_gradient_clipping``
    carries, which costs nothing. Otherwise it computes the norm in one pass over the gradients. A module that clips in its
    ``on_before_optimizer_step`` leaves no true gradients to measure: then the monitor logs the norm that the module clipped
    by, if there is one.

    Emits, with the optimizer's class after the first part if the run has several optimizers (``grad_norm-Adam``; or
    ``grad_norm-SGD-0``, ``grad_norm-SGD-1`` if they have the same class):

    - ``grad_norm``: the norm of all of the optimizer's gradients together;
    - ``grad_norm_clipped_fraction``: among the last ``window`` updates that were clipped by norm, the fraction whose norm was
      above the threshold. Every update counts, also between two values that a logger writes: if ``window`` equals the
      logger's cadence, each written value covers the updates since the one before;
    - ``grad_norm/<module path>`` with ``per_layer``: for each submodule that holds parameters directly, the norm of their
      gradients. The root module is listed under the name of its class.

    Override :meth:`is_due` for another cadence.

    Args:
        norm_type: The order p of the norm; it may be infinite.
        per_layer: Whether to log the norm of each submodule too. You may change the attribute during the run.
        every_n_steps: Updates between two whose norms are logged. With a multiple of the loggers' cadence, no norm is
            computed in vain.
        window: The number of updates that the clipped fraction covers.

    Raises:
        MisconfigurationError: If the order is not positive, or the cadence or the window is below 1.

    Example:
        >>> from eventtrain import Trainer
        >>> from eventtrain.callbacks import GradientClipping, GradientNormMonitor
        >>> monitor = GradientNormMonitor(per_layer=True, window=50)
        >>> trainer = Trainer(max_epochs=1, callbacks=[GradientClipping(1.0), monitor])
        >>> trainer.callback(GradientNormMonitor).norm_type
        2.0
    """

    def __init__(self, *, norm_type: float = 2.0, per_layer: bool = False, every_n_steps: int = 1, window: int = 50) -> None:
        self.norm_type = check_number(norm_type, "GradientNormMonitor", "norm_type", above=0, finite=False)
        self.per_layer = per_layer
        self.every_n_steps = check_whole_number(every_n_steps, "GradientNormMonitor", "every_n_steps", least=1)
        self.window = check_whole_number(window, "GradientNormMonitor", "window", least=1)
        self._norms: dict[LightningOptimizer, OptimizerNorms] = {}

    def is_due(self, global_step: int) -> bool:
        """Decide whether the norms of an update are logged: a policy to override.

        Args:
            global_step: The count of updates, including the current one.

        Returns:
            True if they are logged.
        """
        return global_step % self.every_n_steps == 0

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        names = numbered(type(optimizer.optimizer).__name__ for optimizer in trainer.optimizers)
        for optimizer, name in zip(trainer.optimizers, names, strict=True):
            suffix = f"-{name}" if len(names) > 1 else ""
            fraction = ClippedFraction(self.window, trainer.device)
            self._norms[optimizer] = OptimizerNorms(optimizer, trainer.module, suffix, self.norm_type, fraction)

    def on_gradients_final(self, trainer: Trainer, event: GradientsFinal) -> None:
        norms = self._norms[event.optimizer]
        norms.begin(self.is_due(trainer.global_step + 1))  # the update is counted after its events
        # If no step asked for the gradients, the module is about to clip them in its way: this is the last chance.
        if norms.due and not event.in_step:
            norms.measure(self.per_layer)

    def on_clipping_decided(self, trainer: Trainer, event: ClippingDecided) -> None:
        norms = self._norms[event.optimizer]
        if norms.due and not norms.measured and not norms.clipped:
            by_norm = event.gradient_clip_val is not None and event.gradient_clip_algorithm in (None, "norm")
            # The module's own hook may clip differently.
            is_free = by_norm and event.norm_type == self.norm_type and not event.by_module
            norms.measure(self.per_layer, total=not is_free)

    def on_after_gradient_clipping(self, trainer: Trainer, event: AfterGradientClipping) -> None:
        self._norms[event.optimizer].note_clipping(event)

    def on_after_optimizer_step(self, trainer: Trainer, event: AfterOptimizerStep) -> None:
        values = self._norms[event.optimizer].finish()
        if values:
            trainer.log_on_step(values)

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        self._norms.clear()


class OptimizerNorms:
    """The norms of one optimizer's gradients in the current update. No method reads a value from the device.

    Args:
        optimizer: The optimizer.
        module: The module whose submodules are the layers.
        suffix: The text after ``grad_norm`` in names.
        norm_type: The order p of the norm.
        fraction: Is told of each clipping by norm.

    Attributes:
        due: The norms are to be logged.
        measured: The gradients were measured.
        clipped: The gradients were clipped.
    """

    def __init__(
        self, optimizer: LightningOptimizer, module: LightningModule, suffix: str, norm_type: float, fraction: ClippedFraction
    ) -> None:
        self.optimizer = optimizer
        self.module = module
        self.norm_type = norm_type
        self.fraction = fraction
        self._name = f"grad_norm{suffix}"
        self._fraction_name = f"grad_norm_clipped_fraction{suffix}"
        self._layers: dict[str, list[Tensor]] = {}
        self._groups = 0  # the number of parameter groups that were sorted into layers
        self.begin(False)

    def begin(self, due: bool) -> None:
        """Forget the last gradients, which may have led to no update.

        Args:
            due: Whether the norms of the new gradients are to be logged.
        """
        self.due = due
        self.measured = self.clipped = False
        self._total: Tensor | None = None
        self._clipping: AfterGradientClipping | None = None
        self._layer_norms: dict[str, Tensor] = {}

    def measure(self, per_layer: bool, *, total: bool = True) -> None:
        """Compute norms of the gradients as they are now.

        Args:
            per_layer: Whether to compute the norm of each layer.
            total: Whether to compute the norm of all gradients together.
        """
        self.measured = True
        if total:
            self._total = norm(self.optimizer.parameters(), self.norm_type)
        if per_layer:
            self._layer_norms = {name: norm(parameters, self.norm_type) for name, parameters in self.layers().items()}

    def note_clipping(self, event: AfterGradientClipping) -> None:
        """Take note of a clipping. If there are several, the first one by norm counts."""
        if self._clipping is None and event.total_norm is not None:
            self._clipping = event
            if self._total is None and not self.clipped and event.norm_type == self.norm_type:
                self._total = event.total_norm
        self.clipped = True

    def finish(self) -> dict[str, Any]:
        """Count the update that has been made, and return the values to log for it."""
        if self._clipping is not None:
            assert self._clipping.total_norm is not None
            self.fraction.add(self._clipping.total_norm, self._clipping.gradient_clip_val)
        if not self.due:
            return {}
        values: dict[str, Any] = {}
        if self._total is not None:
            values[self._name] = self._total
        if self._clipping is not None:
            values[self._fraction_name] = self.fraction  # computed by the loggers that write it
        values.update(self._layer_norms)
        return values

    def layers(self) -> dict[str, list[Tensor]]:
        """Return the optimizer's parameters by the submodule that holds them, under the names that their norms have."""
        groups = self.optimizer.optimizer.param_groups
        if len(groups) != self._groups:  # at first, and after add_param_group
            self._groups = len(groups)
            optimized = {id(parameter) for parameter in self.optimizer.parameters()}
            self._layers = {}
            for path, part in self.module.named_modules():
                parameters = [parameter for parameter in part.parameters(recurse=False) if id(parameter) in optimized]
                if parameters:
                    self._layers[f"{self._name}/{path or type(part).__name__}"] = parameters
        return self._layers


class ClippedFraction:
    """Among the last updates that were clipped by norm, the fraction whose norm was above the threshold.

    Loggers are given this object and compute by ``float(fraction)`` when they write it. An update only stores its norm,
    because even one comparison on the device would cost more than all other work of the monitor.

    Args:
        window: The number of updates.
        device: The device to compare norms on.
    """

    def __init__(self, window: int, device: torch.device) -> None:
        self.device = device
        self._clippings: deque[tuple[Tensor, float]] = deque(maxlen=window)

    def add(self, total_norm: Tensor, threshold: float) -> None:
        """Count an update.

        Args:
            total_norm: The norm, a scalar tensor.
            threshold: The norm that the gradients were clipped to.
        """
        self._clippings.append((total_norm, threshold))

    def value(self) -> Tensor:
        """Return the fraction, a scalar tensor; NaN if no update was clipped by norm."""
        # The norm of an optimizer without a single gradient is on the host.
        above = [norm.to(self.device, non_blocking=True) > threshold for norm, threshold in self._clippings]
        return torch.stack(above).float().mean() if above else torch.tensor(math.nan)

    def __float__(self) -> float:
        """Return the fraction; this waits for the device."""
        return float(self.value())


def norm(parameters: Iterable[Tensor], norm_type: float) -> Tensor:
    """Return the norm of all gradients of some parameters together; 0 if there are none."""
    # For sparse gradients, the values after those of one place are added up.
    gradients = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in parameters if p.grad is not None]
    return total_norm(gradients, norm_type)
