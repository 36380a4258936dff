"""Gradient accumulation: several batches for one update."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn

import torch

from eventtrain.callback import Callback
from eventtrain.callbacks.optimization.schedule import Schedule
from eventtrain.core.optimizer import evaluates_often
from eventtrain.core.state import nonzero
from eventtrain.errors import MisconfigurationError
from eventtrain.events import EstimateSteppingBatches, FitStart, GradientsReady, TrainBatchStart, TrainEpochEnd, TrainEpochStart
from eventtrain.trainer import Trainer

Unit = Literal["epoch", "step", "batch"]
COUNTERS = {"epoch": "current_epoch", "step": "global_step", "batch": "total_batch_idx"}


class GradientAccumulation(Callback):
    """Lets several batches contribute to one update: an accumulation window.

    Listens to ``train_batch_start``, where it writes ``plan.step``, ``plan.zero_grad``, ``plan.loss_scale`` and
    ``plan.weighted``; to ``gradients_ready``, where it rescales the gradients of short or weighted windows; and to
    ``estimate_stepping_batches``, which it answers. Override :meth:`batches_per_step` for a schedule of your own.

    Args:
        batches: Batches per window: a number; a schedule such as ``{0: 8, 4: 4, 8: 1}``, whose keys are counts
            from which on the values hold; or a function of the trainer. It changes only at a window's start.
        unit: What the schedule's keys count: ``"epoch"``, ``"step"`` (updates) or ``"batch"``, all of the run.
        normalize: ``"window"``: the gradient is the mean over the batches that were really in the window,
            weighted by the ``"weight"`` that ``training_step`` may return. ``"fixed"``: the sum divided by
            ``batches`` however short the window was.
        remainder: What becomes of the batches that are left at an epoch's end: ``"step"`` closes a short window,
            ``"drop"`` discards their gradients, ``"carry"`` goes on with the window in the next epoch.

    Raises:
        MisconfigurationError: A value under 1, a schedule that does not start at 0, an unknown option.
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
        check_option(unit, "unit", tuple(COUNTERS))
        check_option(normalize, "normalize", ("window", "fixed"))
        check_option(remainder, "remainder", ("step", "drop", "carry"))
        self.unit = unit
        self.normalize = normalize
        self.remainder = remainder
        self._function: Callable[[Any], int] | None = None
        self._schedule: Schedule[int] | None = None
        if callable(batches):
            self._function = batches
        else:
            given = batches if isinstance(batches, Mapping) else {0: batches}
            self._schedule = Schedule(given, "GradientAccumulation(batches)", self._check)
        self._window = 1
        self._loss_scale = 1.0
        self._position = self._position_before = 0
        self._warned = False

    def batches_per_step(self, trainer: Any) -> int:
        """The policy: how many batches the window that begins now takes.

        Args:
            trainer: The trainer; where ``estimated_stepping_batches`` is asked for, a view of it that has
                ``current_epoch``, ``global_step``, ``batch_idx`` and ``total_batch_idx`` alone.
        """
        if self._function is not None:
            return self._function(trainer)
        assert self._schedule is not None
        return self._schedule.at(getattr(trainer, COUNTERS[self.unit]))

    # ------------------------------------------------------------------ events

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        name = type(self).__name__
        if not trainer.module.automatic_optimization:
            raise MisconfigurationError(
                f"{name} is attached and {type(trainer.module).__name__} optimizes manually. Remove it, and accumulate in "
                "training_step: divide the loss by N, step and zero_grad where (batch_idx + 1) % N == 0."
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
        self._position = 0 if trainer.total_batch_idx < 0 else self._position

    def on_train_epoch_start(self, trainer: Trainer, event: TrainEpochStart) -> None:
        if self.remainder != "carry" and not event.batches_done:
            self._position = 0

    def on_train_batch_start(self, trainer: Trainer, event: TrainBatchStart) -> None:
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

    def on_train_epoch_end(self, trainer: Trainer, event: TrainEpochEnd) -> None:
        # A batch that ended its epoch before it was trained is not in the window that goes on.
        if self.remainder == "carry" and not trainer.batch.evaluations:
            self._position = self._position_before

    def on_gradients_ready(self, trainer: Trainer, event: GradientsReady) -> None:
        if self.normalize != "window" or event.batches is None:
            return
        factor: Any
        if event.weight is not None:
            world = trainer.processes
            weight = event.weight
            if world.world_size > 1:
                weight = world.reduce(torch.as_tensor(weight, device=trainer.device), "sum")
            reference: Any = event.weight_reference
            # Weights that sum to 0 make gradients of 0, which any factor leaves alone.
            factor = self._window * reference * world.world_size / nonzero(weight)
        elif event.batches != self._window:
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
        """How many windows a run closes.

        Args:
            batches: Batches per epoch.
            epochs: Epochs.
            max_steps: Where to stop counting; None for no limit.

        Raises:
            MisconfigurationError: The policy reads more of the trainer than a simulation has.
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
        """The windows that a run can have, where the policy is the constructor's schedule; else none."""
        if self._schedule is None or type(self).batches_per_step is not GradientAccumulation.batches_per_step:
            return []
        reached = self.unit != "epoch" or max_epochs is None
        pairs = zip(self._schedule.starts, self._schedule.values, strict=True)
        return [size for start, size in pairs if reached or start < (max_epochs or 0)]

    def _check(self, batches: Any) -> None:
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
            raise MisconfigurationError(
                f"{type(self).__name__}: batches per window have to be a whole number from 1; got {batches!r}."
            )

    def _on_short_epoch(self, length: int, window: int) -> None:
        message = f"{type(self).__name__}: an epoch has {length} batches and a window {window}"
        if self.remainder == "drop":
            raise MisconfigurationError(
                f"{message}, so that remainder='drop' would never update. Use remainder='step' or 'carry', or shorter windows."
            )
        if not self._warned and self.remainder == "step":
            self._warned = True
            warnings.warn(f"{message}: each epoch is one short window. remainder='carry' lets windows go on.", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position, "window": self._window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position = self._position_before = state["position"]
        self._window = state["window"]
        self._loss_scale = 1.0 / self._window


class SimulatedRun:
    """The part of a trainer that a policy may read while ``estimated_stepping_batches`` is computed.

    Args:
        asking: The policy's name, for messages.
        counters: The counters by name, which the simulation goes on writing.
    """

    __slots__ = ("_asking", "_counters")
    _asking: str
    _counters: dict[str, int]

    def __init__(self, asking: str, counters: dict[str, int]) -> None:
        object.__setattr__(self, "_asking", asking)
        object.__setattr__(self, "_counters", counters)

    def __getattr__(self, name: str) -> int:
        if name in self._counters:
            return self._counters[name]
        raise MisconfigurationError(
            f"{self._asking} reads trainer.{name}, which estimated_stepping_batches cannot know beforehand. Read "
            f"{', '.join(self._counters)}; or do without estimated_stepping_batches: give the scheduler your own total_steps "
            "and Trainer(max_steps=...)."
        )

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise MisconfigurationError(
            f"{self._asking} writes trainer.{name}. While estimated_stepping_batches is computed there is no run to write to: "
            "keep what the policy remembers elsewhere, and derive its answer from the counters."
        )


def check_option(value: Any, named: str, known: tuple[str, ...]) -> None:
    """Refuses an unknown option.

    Raises:
        MisconfigurationError: It is not among the known.
    """
    if value not in known:
        raise MisconfigurationError(f"GradientAccumulation({named}={value!r}): it has to be one of {list(known)}.")
