"""Gradient clipping: a threshold policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from eventtrain.callback import Callback
from eventtrain.callbacks.optimization.schedule import Schedule
from eventtrain.core.optimizer import check_clip_algorithm, check_clip_val
from eventtrain.errors import MisconfigurationError
from eventtrain.events import BeforeGradientClipping
from eventtrain.trainer import Trainer


class GradientClipping(Callback):
    """Clips gradients before each update, in automatic and in manual optimization.

    Listens to ``before_gradient_clipping``, where it writes the threshold, the algorithm and the norm's type. The
    core clips: gradients are complete, unscaled and normalised by then. Override :meth:`threshold` for a schedule
    of your own.

    Args:
        gradient_clip_val: The threshold: a positive number; a schedule by epoch such as ``{0: 1.0, 5: 2.0}``; a
            function of the trainer; None for no clipping now.
        gradient_clip_algorithm: ``"norm"``: the norm of all of an optimizer's gradients together
            (:func:`torch.nn.utils.clip_grad_norm_`); ``"value"``: each element
            (:func:`torch.nn.utils.clip_grad_value_`).
        norm_type: The order p of the norm; may be infinite.

    Raises:
        MisconfigurationError: A threshold that is not positive, an unknown algorithm, a bad schedule.
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
        if isinstance(norm_type, bool) or not isinstance(norm_type, (int, float)) or not norm_type > 0:
            raise MisconfigurationError(f"GradientClipping(norm_type={norm_type!r}): it has to be a positive number.")
        self.norm_type = float(norm_type)
        self._function: Callable[[Any], float | None] | None = None
        self._schedule: Schedule[float | None] | None = None
        if callable(gradient_clip_val):
            self._function = gradient_clip_val
        else:
            given = gradient_clip_val if isinstance(gradient_clip_val, Mapping) else {0: gradient_clip_val}
            self._schedule = Schedule(given, "GradientClipping(gradient_clip_val)", check_threshold)

    def threshold(self, trainer: Trainer) -> float | None:
        """The policy: the threshold of the update at hand; None for no clipping."""
        if self._function is not None:
            return self._function(trainer)
        assert self._schedule is not None
        return self._schedule.at(trainer.progress.current_epoch)

    def on_before_gradient_clipping(self, trainer: Trainer, event: BeforeGradientClipping) -> None:
        event.gradient_clip_val = self.threshold(trainer)
        event.gradient_clip_algorithm = self.gradient_clip_algorithm
        event.norm_type = self.norm_type


def check_threshold(value: Any) -> None:
    """Refuses a threshold that is neither None nor a positive number.

    Raises:
        MisconfigurationError: It is such.
    """
    if value is not None:
        check_clip_val(value, "GradientClipping(gradient_clip_val)")
