"""Gradient accumulation: several batches for one update."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NoReturn

from torch import Tensor

from eventtrain.callback import Callback
from eventtrain.callbacks.optimization.schedule import Schedule
from eventtrain.checks import check_option, check_whole_number
from eventtrain.core.optimizer import evaluates_often
from eventtrain.core.state import nonzero
from eventtrain.errors import MisconfigurationError
from eventtrain.events import (
    EstimateSteppingBatches,
    FitStart,
    GradientsReady,
    TrainBatchStart,
    TrainDataEnd,
    TrainEpochEnd,
    TrainEpochStart,
)
from eventtrain.trainer import Trainer

Unit = Literal["epoch", "step", "batch"]
COUNTERS = {"epoch": "current_epoch", "step": "global_step", "batch": "total_batch_idx"}


class GradientAccumulation(Callback):
    """Lets several batches contribute to one update: an accumulation window.

    Listens to ``train_batch_start``, and writes ``plan.step``, ``plan.zero_grad``, ``plan.loss_scale`` and
    ``plan.weighted``; to ``gradients_ready``, and rescales the gradients of short or weighted windows; to
    ``estimate_stepping_batches``, which it answers; and to ``fit_start``, ``train_epoch_start``, ``train_data_end`` and
    ``train_epoch_end``. Emits no metrics. Override :meth:`batches_per_step` for another schedule.

    Args:
        batches: Batches per window: a number; a schedule such as ``{0: 8, 4: 4, 8: 1}``, whose values hold from their keys
            on; or a function of the trainer. A new value holds from the start of the next window.
        unit: The count that the keys of the schedule refer to: ``"epoch"``, ``"step"`` (updates) or ``"batch"``, each
            counted over the whole run.
        normalize: With ``"window"`` the gradient is the mean over the batches that were really in the window, weighted by
            the ``"weight"`` that ``training_step`` may return. With ``"fixed"`` it is the sum divided by ``batches``,
            even if the window was shorter.
        remainder: If batches are left at the end of an epoch, ``"step"`` closes a short window, ``"drop"`` discards their
            gradients, and ``"carry"`` continues the window in the next epoch.

    Raises:
        MisconfigurationError: If a window has less than one batch, the schedule does not start at 0, or an option is
            unknown; when training starts, if the module optimizes manually or its optimizer evaluates closures
            several times; when an epoch ends, if a short window should have been closed and the loader's last batch was not
            known, see ``Trainer(read_ahead=False)``.

    Example:
        >>> from eventtrain import Trainer
        >>> class Warmup(GradientAccumulation):
        ...     def batches_per_step(self, trainer):
        ...         return 1 if trainer.global_step < 2 else 4
        >>> trainer = Trainer(max_epochs=1, callbacks=[Warmup()])
        >>> trainer.callback(GradientAccumulation).count_windows(batches=10, epochs=1)  # of 1, 1, 4 and 4 batches
        4
    """

    role = "gradient_accumulation"

    def __init__(
        self,
        batches: int | Mapping[int, int] | Callable[[Any], int] = 1,
        *,
        unit: Unit = "epoch",
        normalize: Literal["window", "fixed"] = "window",
        remainder: Literal["step", "drop", "carry"] = "step",
    ) -> None:
        self.unit = check_option(unit, "GradientAccumulation", "unit", tuple(COUNTERS))
        self.normalize = check_option(normalize, "GradientAccumulation", "normalize", ("window", "fixed"))
        self.remainder = check_option(remainder, "GradientAccumulation", "remainder", ("step", "drop", "carry"))
        check = partial(check_whole_number, owner="GradientAccumulation", argument="batches", least=1)
        self._function: Callable[[Any], int] | None = None
        self._schedule: Schedule[int] | None = None
        self._constant = 1
        if callable(batches):
            self._function = batches
        elif isinstance(batches, Mapping):
            self._schedule = Schedule(batches, "GradientAccumulation", check)
        else:
            self._constant = check(batches)
        self._window = 1
        self._loss_scale = 1.0
        # Batches of the open window, after the last batch that started and before it.
        self._position = self._position_before = 0
        self._batch_idx = -1  # of the last batch of the epoch that started
        self._warned = False

    def batches_per_step(self, trainer: Any) -> int:
        """Return the number of batches in the window that starts now: the policy, which a subclass may override.

        Args:
            trainer: The trainer; for ``estimated_stepping_batches`` a view of it that has only ``current_epoch``,
                ``global_step``, ``batch_idx`` and ``total_batch_idx``.

        Returns:
            A whole number from 1.
        """
        if self._function is not None:
            return self._function(trainer)
        return self._constant if self._schedule is None else self._schedule.at(getattr(trainer, COUNTERS[self.unit]))

    # ------------------------------------------------------------------ events

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        name = type(self).__name__
        if not trainer.module.automatic_optimization:
            raise MisconfigurationError(
                f"{name} is attached and {type(trainer.module).__name__} optimizes manually. Remove it, and accumulate in "
                "training_step: divide the loss by N, and call step and zero_grad if (batch_idx + 1) % N == 0."
            )
        for optimizer in trainer.optimizers:
            if max(self._known_sizes(None), default=1) > 1 and evaluates_often(optimizer):
                raise MisconfigurationError(
                    f"{type(optimizer.optimizer).__name__} evaluates its closure several times a step, which a window of "
                    f"several batches cannot repeat. Remove {name}, and use larger batches."
                )
        sizes, length = self._known_sizes(trainer.max_epochs), trainer.num_training_batches
        if length and self.unit == "epoch" and max(sizes, default=1) > length:
            self._on_short_epoch(length, max(sizes))
        if trainer.total_batch_idx < 0:
            self._position, self._batch_idx = 0, -1

    def on_train_epoch_start(self, trainer: Trainer, event: TrainEpochStart) -> None:
        if self.remainder != "carry" and not event.batches_done:
            self._position = 0

    def on_train_batch_start(self, trainer: Trainer, event: TrainBatchStart) -> None:
        self._batch_idx = event.batch_idx
        plan = event.plan
        position = self._position_before = self._position
        if position == 0:
            window = self.batches_per_step(trainer)
            if window != self._window:
                self._check(window)
                self._window = window
                self._loss_scale = 1.0 / window
        plan.zero_grad = position == 0
        position += 1
        plan.step = position >= self._window or (event.is_last_batch and self.remainder == "step")
        plan.loss_scale = self._loss_scale
        plan.weighted = self.normalize == "window"
        if event.is_last_batch and position == event.batch_idx + 1 < self._window and self.remainder != "carry":
            self._on_short_epoch(event.batch_idx + 1, self._window)
        self._position = 0 if plan.step else position

    def on_train_data_end(self, trainer: Trainer, event: TrainDataEnd) -> None:
        if self.remainder == "step" and self._position > 0:
            raise MisconfigurationError(
                f"{type(self).__name__}(remainder='step'): epoch {event.epoch} ended after {self._position} of "
                f"{self._window} batches of a window, and with read_ahead=False its last batch was not known to be the last. "
                "Use remainder='carry' or 'drop', give limit_train_batches as a whole number of windows, or read ahead."
            )

    def on_train_epoch_end(self, trainer: Trainer, event: TrainEpochEnd) -> None:
        # A batch that ended its epoch before it was trained is not in the window that continues. The loop has taken
        # batch_idx back by one for it.
        if self.remainder == "carry" and trainer.batch_idx < self._batch_idx:
            self._position = self._position_before
        self._batch_idx = -1

    def on_gradients_ready(self, trainer: Trainer, event: GradientsReady) -> None:
        if self.normalize != "window" or event.batches is None:
            return
        factor: Any
        if event.weight is not None:
            reference: Any = event.weight_reference
            # Weights that sum to 0 make gradients of 0, which stay 0 with any factor.
            factor = self._window * reference / nonzero(event.weight)
        elif isinstance(event.batches, Tensor) or event.batches != self._window:
            factor = self._window / event.batches
        else:
            return
        for parameter in event.optimizer.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def on_estimate_stepping_batches(self, trainer: Trainer, event: EstimateSteppingBatches) -> None:
        if event.batches_per_epoch is None or event.max_epochs is None:
            return
        event.stepping_batches = self.count_windows(event.batches_per_epoch, event.max_epochs, event.max_steps)

    # ------------------------------------------------------------------ plain logic

    def count_windows(self, batches: int, epochs: int, max_steps: int | None = None) -> int:
        """Return the number of windows that a run closes.

        Args:
            batches: Batches per epoch.
            epochs: Epochs.
            max_steps: Stop counting at this number; None for no limit.

        Returns:
            The number of windows, at most ``max_steps``.

        Raises:
            MisconfigurationError: If the policy reads more of the trainer than a simulation has, or writes to it.
        """
        counters = dict.fromkeys(("current_epoch", "global_step", "batch_idx", "total_batch_idx"), 0)
        view = SimulatedRun(f"{type(self).__name__}.batches_per_step", counters)
        position = window = 0
        for epoch in range(epochs):
            counters["current_epoch"] = epoch
            position = position if self.remainder == "carry" else 0
            done = 0
            while done < batches:
                if position == 0:
                    counters["batch_idx"], counters["total_batch_idx"] = done, epoch * batches + done
                    window = self.batches_per_step(view)
                    self._check(window)
                taken = min(window - position, batches - done)
                done += taken
                position += taken
                if position == window or (done == batches and self.remainder == "step"):
                    counters["global_step"] += 1
                    position = 0
                if max_steps is not None and counters["global_step"] >= max_steps:
                    return max_steps
        return counters["global_step"]

    def _known_sizes(self, max_epochs: int | None) -> list[int]:
        """Return the windows that a run can have, if the policy is the constructor's number or schedule; else none."""
        if self._function is not None or type(self).batches_per_step is not GradientAccumulation.batches_per_step:
            return []
        if self._schedule is None:
            return [self._constant] if max_epochs != 0 or self.unit != "epoch" else []
        all_count = self.unit != "epoch" or max_epochs is None
        pairs = zip(self._schedule.starts, self._schedule.values, strict=True)
        return [size for start, size in pairs if all_count or start < (max_epochs or 0)]

    def _check(self, batches: Any) -> None:
        """Raise an error if the policy did not return a whole number from 1."""
        check_whole_number(batches, f"The window of {type(self).__name__}", "batches", least=1)

    def _on_short_epoch(self, length: int, window: int) -> None:
        """Warn once that an epoch is shorter than a window; raise an error if it would never update."""
        message = f"{type(self).__name__}: an epoch has {length} batches and a window {window}"
        if self.remainder == "drop":
            raise MisconfigurationError(
                f"{message}, so that remainder='drop' would never update. Use remainder='step' or 'carry', or shorter windows."
            )
        if not self._warned and self.remainder == "step":
            self._warned = True
            warnings.warn(f"{message}: each epoch is one short window. With remainder='carry' windows continue.", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self._position,
            "window": self._window,
            # A validation may be interrupted between a batch that ended its epoch and the epoch's end.
            "position_before": self._position_before,
            "batch_idx": self._batch_idx,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position, self._window = state["position"], state["window"]
        self._position_before = state.get("position_before", self._position)  # older checkpoints do not have these two
        self._batch_idx = state.get("batch_idx", -1)
        self._loss_scale = 1.0 / self._window


class SimulatedRun:
    """The part of a trainer that a policy may read while ``estimated_stepping_batches`` is computed.

    Args:
        policy: The policy's name, for messages.
        counters: The counters by name; the simulation changes them.
    """

    __slots__ = ("_counters", "_policy")
    _policy: str
    _counters: dict[str, int]

    def __init__(self, policy: str, counters: dict[str, int]) -> None:
        object.__setattr__(self, "_policy", policy)
        object.__setattr__(self, "_counters", counters)

    def __getattr__(self, name: str) -> int:
        if name in self._counters:
            return self._counters[name]
        raise MisconfigurationError(
            f"{self._policy} reads trainer.{name}, which estimated_stepping_batches cannot know beforehand. Read only "
            f"{', '.join(self._counters)}; or give the scheduler your own total_steps instead of estimated_stepping_batches, "
            "and Trainer(max_steps=...)."
        )

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise MisconfigurationError(
            f"{self._policy} writes trainer.{name}. While estimated_stepping_batches is computed there is no run to write to. "
            "Compute the answer from the counters, and keep other values in the policy's object."
        )
