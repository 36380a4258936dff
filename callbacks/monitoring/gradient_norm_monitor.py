"""Logs the norms of gradients, and how often they are clipped."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from eventtrain.callback import Callback
from eventtrain.checks import check_whole_number
from eventtrain.core.optimizer import LightningOptimizer, numbered
from eventtrain.errors import MisconfigurationError
from eventtrain.events import (
    AfterGradientClipping,
    AfterOptimizerStep,
    BeforeGradientClipping,
    FitStart,
    GradientsReady,
    Teardown,
)
from eventtrain.module.module import LightningModule
from eventtrain.trainer import Trainer


class GradientNormMonitor(Callback):
    """Logs the norm of the true gradients (complete, unscaled, normalised) before they are clipped, and how often they are.

    Adds to what the update hands to loggers, at ``after_optimizer_step``; loggers write it at their cadence, and no value is
    read before. A skipped step logs nothing, nor does one that is taken on ``optimizer.optimizer`` directly. Where the
    gradients are clipped by this norm, it is the one that ``after_gradient_clipping`` carries and costs nothing; else it is
    computed, in one pass over the gradients. For the length of a fit the monitor is the last listener of ``gradients_ready``
    and ``before_gradient_clipping``, because gradients and clipping policies are final then. A module that clips for itself
    in ``on_before_optimizer_step`` leaves nothing to be measured: then there is the norm that it clipped by, if any.

    Emits, with the optimizer's class behind the first part where a run has several optimizers (``grad_norm-Adam``; ``-SGD-0``,
    ``-SGD-1`` where classes are alike):

    - ``grad_norm``: the norm of all of the optimizer's gradients together;
    - ``grad_norm_clipped_fraction``: of the last ``window`` updates that were clipped by norm, the fraction whose norm was
      above the threshold. Every update counts, those too that are not written: with ``window`` at the loggers' cadence,
      each written value covers the updates since the one before;
    - ``grad_norm/<module path>`` with ``per_layer``: of each submodule with parameters of its own, the norm of their
      gradients; the root's bears its class's name.

    Override :meth:`is_due` for another cadence.

    Args:
        norm_type: The order p of the norm; may be infinite.
        per_layer: Whether to log the norm of each submodule too. May be set during the run.
        every_n_steps: Updates between two that norms are taken of. With a multiple of the loggers' cadence nothing is
            computed that is not written.
        window: Updates that the clipped fraction is taken over.

    Raises:
        MisconfigurationError: An order that is not positive, a cadence or a window under 1.
    """

    def __init__(self, *, norm_type: float = 2.0, per_layer: bool = False, every_n_steps: int = 1, window: int = 50) -> None:
        if isinstance(norm_type, bool) or not isinstance(norm_type, (int, float)) or not norm_type > 0:
            raise MisconfigurationError(f"GradientNormMonitor(norm_type={norm_type!r}): it has to be a positive number.")
        self.norm_type = float(norm_type)
        self.per_layer = per_layer
        self.every_n_steps = check_whole_number(every_n_steps, "GradientNormMonitor", "every_n_steps", least=1)
        self.window = check_whole_number(window, "GradientNormMonitor", "window", least=1)
        self._norms: dict[LightningOptimizer, OptimizerNorms] = {}

    def is_due(self, global_step: int) -> bool:
        """The policy: whether norms are logged of an update.

        Args:
            global_step: The count of updates, the one at hand included.
        """
        return global_step % self.every_n_steps == 0

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        names = numbered(type(optimizer.optimizer).__name__ for optimizer in trainer.optimizers)
        for optimizer, name in zip(trainer.optimizers, names, strict=True):
            suffix = f"-{name}" if len(names) > 1 else ""
            fraction = ClippedFraction(self.window, trainer.device)
            self._norms[optimizer] = OptimizerNorms(optimizer, trainer.module, suffix, self.norm_type, fraction)
        trainer.signals.gradients_ready.connect(self.begin)
        trainer.signals.before_gradient_clipping.connect(self.measure)

    def begin(self, trainer: Trainer, event: GradientsReady) -> None:
        """Connected to ``gradients_ready``: the gradients are the true ones now."""
        norms = self._norms[event.optimizer]
        norms.begin(self.is_due(trainer.progress.global_step + 1))  # the update is counted after its events
        run = event.optimizer.run
        assert run is not None
        # Outside of a step somebody asks for them to clip them, by whatever it may be: now or never.
        if norms.due and not run.stepping and not run.is_raw:
            norms.measure(self.per_layer)

    def measure(self, trainer: Trainer, event: BeforeGradientClipping) -> None:
        """Connected to ``before_gradient_clipping``: policies have written what is going to happen."""
        norms = self._norms[event.optimizer]
        if norms.due and not norms.measured and not norms.clipped:
            run = event.optimizer.run
            assert run is not None
            by_norm = event.gradient_clip_val is not None and event.gradient_clip_algorithm in (None, "norm")
            # The module's own hook may clip as it likes.
            is_free = by_norm and event.norm_type == self.norm_type and run.clip_hook is None
            norms.measure(self.per_layer, total=not is_free)

    def on_after_gradient_clipping(self, trainer: Trainer, event: AfterGradientClipping) -> None:
        self._norms[event.optimizer].clip(event)

    def on_after_optimizer_step(self, trainer: Trainer, event: AfterOptimizerStep) -> None:
        self._norms[event.optimizer].log(trainer.metrics.fresh)  # what log_on_step adds to, without its call and mapping

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        trainer.signals.gradients_ready.disconnect(self.begin)
        trainer.signals.before_gradient_clipping.disconnect(self.measure)
        self._norms.clear()


class OptimizerNorms:
    """The norms of one optimizer's gradients in the update at hand. Nothing here reads a value.

    Args:
        optimizer: The optimizer.
        module: The module whose submodules are the layers.
        suffix: What is added to ``grad_norm`` in names.
        norm_type: The order p of the norm.
        fraction: Takes note of clippings.

    Attributes:
        due: Norms are to be logged.
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
        self._groups = 0  # whose parameters were sorted into layers
        self.begin(False)

    def begin(self, due: bool) -> None:
        """Forgets the last gradients, which may have led to no update."""
        self.due = due
        self.measured = self.clipped = False
        self._total: Tensor | None = None
        self._clipping: AfterGradientClipping | None = None
        self._layer_norms: dict[str, Tensor] = {}

    def measure(self, per_layer: bool, *, total: bool = True) -> None:
        """Takes the norms of the gradients as they are.

        Args:
            per_layer: Whether to take those of layers.
            total: Whether to take that of all gradients together.
        """
        self.measured = True
        if total:
            self._total = norm(self.optimizer.parameters(), self.norm_type)
        if per_layer:
            self._layer_norms = {name: norm(own, self.norm_type) for name, own in self.layers().items()}

    def clip(self, event: AfterGradientClipping) -> None:
        """Takes note of a clipping; of the first by norm, where there are several."""
        if self._clipping is None and event.total_norm is not None:
            self._clipping = event
            if self._total is None and not self.clipped and event.norm_type == self.norm_type:
                self._total = event.total_norm
        self.clipped = True

    def log(self, values: dict[str, Any]) -> None:
        """Adds what is known of an update that has been made.

        Args:
            values: What is added to.
        """
        if self._clipping is not None:
            assert self._clipping.total_norm is not None
            self.fraction.add(self._clipping.total_norm, self._clipping.gradient_clip_val)
        if not self.due:
            return
        if self._total is not None:
            values[self._name] = self._total
        if self._clipping is not None:
            values[self._fraction_name] = self.fraction  # computed by those who write it
        values.update(self._layer_norms)

    def layers(self) -> dict[str, list[Tensor]]:
        """The optimizer's parameters by the submodule whose own they are, under the names that their norms have."""
        groups = self.optimizer.optimizer.param_groups
        if len(groups) != self._groups:  # at first, and after add_param_group
            self._groups = len(groups)
            held = {id(parameter) for parameter in self.optimizer.parameters()}
            self._layers = {}
            for path, part in self.module.named_modules():
                own = [parameter for parameter in part.parameters(recurse=False) if id(parameter) in held]
                if own:
                    self._layers[f"{self._name}/{path or type(part).__name__}"] = own
        return self._layers


class ClippedFraction:
    """Of the last updates that were clipped by norm, the fraction whose norm was above the threshold.

    Loggers are given this object and compute by ``float(fraction)`` where they write: an update keeps its norm and
    nothing more, since a single comparison on the device would cost more than all else that the monitor does.

    Args:
        window: How many updates.
        device: Where norms are compared.
    """

    def __init__(self, window: int, device: torch.device) -> None:
        self.device = device
        self._kept: deque[tuple[Tensor, float]] = deque(maxlen=window)

    def add(self, total_norm: Tensor, threshold: float) -> None:
        """Counts an update.

        Args:
            total_norm: The norm, a scalar tensor.
            threshold: What it was clipped to.
        """
        self._kept.append((total_norm, threshold))

    def value(self) -> Tensor:
        """The fraction, a scalar tensor; nan where no update was clipped by norm."""
        # The norm of an optimizer without a single gradient is on the host.
        above = [norm.to(self.device, non_blocking=True) > threshold for norm, threshold in self._kept]
        return torch.stack(above).float().mean() if above else torch.tensor(math.nan)

    def __float__(self) -> float:
        """The fraction; waits for the device."""
        return float(self.value())


def norm(parameters: Iterable[Tensor], norm_type: float) -> Tensor:
    """The norm of all gradients of some parameters together; 0 where there are none."""
    # Of sparse gradients the values, once those of one place are added up.
    gradients = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in parameters if p.grad is not None]
    total: Tensor = get_total_norm(gradients, norm_type)
    if hasattr(total, "full_tensor"):  # of gradients that several processes hold in parts
        total = total.full_tensor()
    return total
