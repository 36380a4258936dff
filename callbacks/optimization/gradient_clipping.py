"""Gradient clipping: a policy that chooses the threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from eventtrain.callback import Callback
from eventtrain.callbacks.optimization.schedule import Schedule
from eventtrain.checks import check_number
from eventtrain.core.clipping import check_clip_algorithm, check_clip_val
from eventtrain.events import BeforeGradientClipping
from eventtrain.trainer import Trainer


class GradientClipping(Callback):
    """Clips gradients before each update, in automatic and in manual optimization.

    Listens to ``before_gradient_clipping``, and writes its ``gradient_clip_val``, ``gradient_clip_algorithm`` and
    ``norm_type``. The core clips: gradients are complete, unscaled and normalised by then. Emits no metrics. Override
    :meth:`threshold` for another schedule.

    Args:
        gradient_clip_val: The threshold: a positive number; a schedule by epoch such as ``{0: 1.0, 5: 2.0}``; a
            function of the trainer; None for no clipping now.
        gradient_clip_algorithm: ``"norm"`` limits the norm of all gradients of an optimizer together
            (:func:`torch.nn.utils.clip_grad_norm_`), ``"value"`` limits each element
            (:func:`torch.nn.utils.clip_grad_value_`).
        norm_type: The order p of the norm, above 0; it may be infinite.

    Raises:
        MisconfigurationError: If a threshold is not positive, the algorithm is unknown, the order of the norm is not above
            0, or the schedule does not start at 0.

    Example:
        >>> from eventtrain import Trainer
        >>> class ClipHarderLater(GradientClipping):
        ...     def threshold(self, trainer):
        ...         return 1.0 if trainer.current_epoch < 5 else 0.1
        >>> trainer = Trainer(max_epochs=10, callbacks=[ClipHarderLater()])
        >>> trainer.callback(GradientClipping).threshold(trainer)
        1.0
    """

    role = "gradient_clipping"

    def __init__(
        self,
        gradient_clip_val: float | Mapping[int, float | None] | Callable[[Any], float | None] | None = None,
        gradient_clip_algorithm: str = "norm",
        *,
        norm_type: float = 2.0,
    ) -> None:
        self.gradient_clip_algorithm = check_clip_algorithm(gradient_clip_algorithm)
        self.norm_type = check_number(norm_type, "GradientClipping", "norm_type", above=0, finite=False)
        self._function: Callable[[Any], float | None] | None = None
        self._schedule: Schedule[float | None] | None = None
        self._constant: float | None = None
        if callable(gradient_clip_val):
            self._function = gradient_clip_val
        elif isinstance(gradient_clip_val, Mapping):
            self._schedule = Schedule(gradient_clip_val, "GradientClipping", check_threshold)
        else:
            check_threshold(gradient_clip_val)
            self._constant = gradient_clip_val

    def threshold(self, trainer: Trainer) -> float | None:
        """Return the threshold of the current update: the policy, which a subclass may override.

        Args:
            trainer: The trainer.

        Returns:
            A positive number, or None for no clipping.
        """
        if self._function is not None:
            return self._function(trainer)
        return self._constant if self._schedule is None else self._schedule.at(trainer.current_epoch)

    def on_before_gradient_clipping(self, trainer: Trainer, event: BeforeGradientClipping) -> None:
        event.gradient_clip_val = self.threshold(trainer)
        event.gradient_clip_algorithm = self.gradient_clip_algorithm
        event.norm_type = self.norm_type


def check_threshold(value: Any) -> None:
    """Raise an error if a value is neither None nor a positive number.

    Args:
        value: The value.

    Raises:
        MisconfigurationError: If it is anything else.
    """
    if value is not None:
        check_clip_val(value, "GradientClipping(gradient_clip_val)")
