"""The one table of events.

Every event of a run is a class in this file, in the order in which a run publishes them. The class says when it is published,
which fields it has, and which of them a listener may write. Signals, hook names, type stubs, the loop map and the event table
in the documentation are derived from it.

An event's signal has the class's name in snake case (``TrainBatchStart`` -> ``train_batch_start``), and a callback's method is
``on_`` + that name. A :class:`Phase` is an event that spans work: a context manager that a listener enters there is left when
the work ends.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from importlib.resources import files
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, SupportsFloat, TypeVar, dataclass_transform

from eventtrain.errors import MisconfigurationError
from eventtrain.hints import tables

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from eventtrain.core.optimizer import LightningOptimizer
    from eventtrain.distributed import Processes
    from eventtrain.optim.lr_scheduler import LRSchedulerConfig
    from eventtrain.paths import AnyPath

T = TypeVar("T")
Stage = Literal["train", "validation", "test", "predict"]


def _writable(default: Any = MISSING) -> Any:
    """Return a field that a listener may write; the core reads it back after the event."""
    return field(default=default, metadata={"writable": True})


@dataclass_transform(field_specifiers=(field,))
class EventType(type):
    """Makes each event a slotted dataclass of its annotated fields."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **names: Any) -> Any:
        """Make the class. Arguments after its bases are names for it, see :class:`Event`."""
        made: Any = super().__new__(cls, name, bases, names | namespace)
        if "__slots__" in namespace:
            return made  # to add the slots, dataclass makes the class once more, by this function
        made = dataclass(slots=True)(made)
        protect(made)
        return made


def protect(event_type: Any) -> None:
    """Refuse writes to the fields that are not writable. Their values have private names, and ``__init__`` writes those.

    No function in Python is called for it: events are made as fast as without it, and a getter in C reads the fields.
    """
    private = {each.name: f"_{each.name}" for each in fields(event_type) if not each.metadata.get("writable")}
    for name, private_name in private.items():
        setattr(event_type, private_name, vars(event_type)[name])
        setattr(event_type, name, property(attrgetter(private_name), partial(refuse, name=name)))
    code = event_type.__init__.__code__
    event_type.__init__.__code__ = code.replace(co_names=tuple(private.get(name, name) for name in code.co_names))
    event_type.__slots__ = tuple(private.get(name, name) for name in event_type.__slots__)  # for copies


def refuse(event: Event, value: Any, *, name: str) -> None:
    """Refuse to write a field of an event.

    Args:
        event: The event.
        value: The value that a listener writes.
        name: The field's name.

    Raises:
        MisconfigurationError: Always. The message says what to write instead.
    """
    raise MisconfigurationError(
        f"event.{name} = {reprlib.repr(value)} at {signal_name(type(event))} would change nothing: a listener only reads "
        f"this field. {tables()['event'].get(name, '')}".rstrip()
    )


class Event(metaclass=EventType):
    """The base class of events. A subclass gives these names as arguments, after its base.

    Attributes:
        signal_name: The name of the signal, if it is not the class's name in snake case.
        module_hook: The name of the module's hook, if it is not ``on_`` + the signal's name.
        module_arguments: The fields that the module's hook is called with, in the order of
            Lightning's signature; None if Lightning has no such hook: then the module's
            ``on_...(self, event)`` gets the event.
    """

    __slots__ = ()
    signal_name: ClassVar[str] = ""
    module_hook: ClassVar[str] = ""
    module_arguments: ClassVar[tuple[str, ...] | None] = None


class Phase(Event):
    """An event that spans work: context managers that are entered here are left, in reverse order, when the work ends.

    Example:
        >>> class DetectAnomalies(Callback):
        ...     def on_before_backward(self, trainer, event):
        ...         event.enter(torch.autograd.detect_anomaly(check_nan=True))
    """

    __slots__ = ("_entered",)

    def enter(self, context_manager: AbstractContextManager[T]) -> T:
        """Enter a context manager for as long as the phase lasts.

        Args:
            context_manager: Autocast, a profiler's range, ``no_sync``, ... It is left when the phase
                ends, by an error too; those entered later are left earlier.

        Returns:
            The value of the context manager's ``__enter__``.
        """
        if not hasattr(self, "_entered"):
            self._entered = ExitStack()
        return self._entered.enter_context(context_manager)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.__exit__(*error) if hasattr(self, "_entered") else None


# ------------------------------------------------------------------------------------ a run begins


class JoinProcesses(Event):
    """A run begins, and nothing of its module is built yet. The place to join a process group, and to choose this
    process's device.

    Attributes:
        stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        device: The device of the module and its batches.
        processes: This process's view of the others.

    Example:
        >>> class OnTheCpu(Callback):
        ...     def on_join_processes(self, trainer, event):
        ...         event.device = torch.device("cpu")
    """

    stage: str
    device: torch.device = _writable()
    processes: Processes = _writable()


class Setup(Event):
    """The module is built (its ``setup`` and ``configure_model`` have run) and on its device; loaders
    and optimizers do not exist yet. The place to wrap or shard the module.

    Attributes:
        stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
    """

    stage: str


class FindCheckpoint(Event):
    """``ckpt_path="last"`` or ``"best"`` was given: the callbacks that keep checkpoints offer theirs.

    Attributes:
        which: ``"last"`` or ``"best"``.
        paths: The answers; a damaged file is passed over. Of ``"last"`` the newest is tried first, of ``"best"`` the first.
            None if no listener keeps checkpoints.
        is_best_of_fit: Whether the first answer is the best file of the trainer's last fit by a metric: the one that a test
            without a module takes.

    Example:
        >>> class FromTheArchive(Callback):
        ...     def on_find_checkpoint(self, trainer, event):
        ...         event.offer(*sorted(pathlib.Path("archive").glob("*.ckpt")))
    """

    which: Literal["last", "best"]
    paths: list[AnyPath] | None = _writable(None)
    is_best_of_fit: bool = _writable(False)

    def offer(self, *paths: AnyPath) -> None:
        """Add answers.

        Args:
            *paths: The files, none if there is none yet.
        """
        self.paths = [*(self.paths or ()), *paths]


class CheckpointRead(Event):
    """A checkpoint has been read from its file. If a listener of ``checkpoint_gathered`` moved a part of it elsewhere, this is
    the place to put that part back. The module exists, loaders and optimizers do not.

    Attributes:
        checkpoint: The checkpoint's content. A listener may change it in place.
        path: Its file.
    """

    checkpoint: dict[str, Any]
    path: AnyPath


class LoadCheckpoint(Event, module_arguments=("checkpoint",)):
    """A checkpoint is complete, and nothing is restored from it yet: loaders and optimizers do not exist. A module may
    take its shape from it here.

    Attributes:
        checkpoint: The checkpoint's content. A listener may read or change it in place.
    """

    checkpoint: dict[str, Any]


class PrepareLoader(Event):
    """A run is about to use a loader for the first time. The place to let it read this process's share.

    Attributes:
        stage: ``"train"``, ``"validation"``, ``"test"`` or ``"predict"``.
        dataloader_idx: Its index among those of the stage; several that are read as one are counted each.
        loader: The loader. A listener may replace it.

    Example:
        >>> class OnlyFirstBatches(Callback):
        ...     def on_prepare_loader(self, trainer, event):
        ...         event.loader = list(itertools.islice(event.loader, 2))
        >>> trainer = Trainer(max_epochs=1, callbacks=OnlyFirstBatches(), device="cpu", default_callbacks=False)
        >>> trainer.fit(Line(), [torch.ones(4, 1)] * 5)
        >>> trainer.global_step
        2
    """

    stage: Stage
    dataloader_idx: int
    loader: Any = _writable()


class EstimateSteppingBatches(Event):
    """Asks how many batches of the whole run will update something; published whenever
    ``trainer.estimated_stepping_batches`` is read, for the first time from ``configure_optimizers``.

    Attributes:
        batches_per_epoch: Training batches of the run's first epoch in this process, limits applied;
            None if the loader has no length.
        max_epochs: Epochs of the whole run; None if only ``max_steps`` ends it.
        max_steps: Updates at most; None for no limit. The core caps the answer by it.
        stepping_batches: The answer. None if no listener accumulates: then every batch updates.

    Example:
        >>> class EveryOtherBatch(Callback):
        ...     def on_train_batch_start(self, trainer, event):
        ...         event.plan.step = event.batch_idx % 2 == 1
        ...     def on_estimate_stepping_batches(self, trainer, event):
        ...         event.stepping_batches = event.max_epochs * (event.batches_per_epoch // 2)
    """

    batches_per_epoch: int | None
    max_epochs: int | None
    max_steps: int | None
    stepping_batches: int | None = _writable(None)


class FitStart(Event, module_arguments=()):
    """``fit`` begins: module, loaders, optimizers and schedulers exist. The place for checks that
    need them."""


# ------------------------------------------------------------------------------------ training


class TrainStart(Event, module_arguments=()):
    """Training begins, after the sanity check."""


class TrainEpochStart(Event, module_arguments=()):
    """An epoch of training begins, or continues after the batch at which a checkpoint was written.

    Attributes:
        epoch: The epoch's index, from 0.
        batches_done: Batches of it that were trained before the checkpoint; 0 if the epoch begins.
    """

    epoch: int
    batches_done: int = 0


class BeforeBatchFetch(Phase):
    """The next batch is about to be waited for and moved to the device. All stages.

    Attributes:
        stage: ``"train"``, ``"validation"``, ``"test"`` or ``"predict"``.
        transfer: How the batch that the loader gives is moved to its device: ``transfer(batch)``. A listener may put
            its own here, around the one that it finds.

    Example:
        >>> class InDoublePrecision(Callback):
        ...     def on_before_batch_fetch(self, trainer, event):
        ...         move = event.transfer
        ...         event.transfer = lambda batch: move(batch).double()
    """

    stage: Stage
    transfer: Callable[[Any], Any] = _writable()


class AfterBatchFetch(Event):
    """The batch is on its device: augment it here. All stages.

    Attributes:
        stage: ``"train"``, ``"validation"``, ``"test"`` or ``"predict"``.
        batch: The batch, as the loader and the module's transfer hooks made it.

    Example:
        >>> class AddNoise(Callback):
        ...     def on_after_batch_fetch(self, trainer, event):
        ...         if event.stage == "train":
        ...             event.batch = event.batch + 0.1 * torch.randn_like(event.batch)
    """

    stage: Stage
    batch: Any = _writable()


@dataclass(slots=True)
class Plan:
    """The effect of a batch on the accumulation window that it belongs to.

    Attributes:
        step: The batch closes its window: gradients are completed and the optimizer steps.
        zero_grad: The batch opens its window: gradients are zeroed before its backward.
        loss_scale: Backward runs on the loss times this number. If it is one over a whole number N,
            backward runs on ``loss / N``, whose bits are those of a hand-written loop.
        weighted: A listener normalises gradients by the weights that ``training_step`` returned, so
            that backward runs on ``loss * weight / (N * w_ref)``; ``w_ref`` is the run's first weight.
    """

    step: bool = True
    zero_grad: bool = True
    loss_scale: float = 1.0
    weighted: bool = False


class TrainBatchStart(Event, module_arguments=("batch", "batch_idx")):
    """A batch is about to be trained: the gate, at which accumulation writes the plan.

    Attributes:
        batch: The batch.
        batch_idx: Its index in the epoch, from 0.
        is_last_batch: The batch is the epoch's last.
        plan: The batch's effect on its window. The core reads it after the event.
        skipped: :meth:`skip_batch` was called.

    Example:
        >>> class SkipEmptyBatches(Callback):
        ...     def on_train_batch_start(self, trainer, event):
        ...         if event.batch.abs().sum() == 0:
        ...             event.skip_batch()
        >>> trainer = Trainer(max_epochs=1, callbacks=SkipEmptyBatches(), device="cpu", default_callbacks=False)
        >>> trainer.fit(Line(), [torch.ones(4, 1), torch.zeros(4, 1)])
        >>> trainer.global_step
        1
    """

    batch: Any
    batch_idx: int
    is_last_batch: bool
    plan: Plan = _writable()
    skipped: bool = False
    ends_epoch: bool = False

    def skip_batch(self) -> None:
        """Make this a batch without a loss: no forward, no backward. Its plan still holds, so a window that it closes is
        closed. Other processes train their batch."""
        self._skipped = True

    def end_epoch(self) -> None:
        """End the training epoch before this batch. Nothing steps for it; validation still runs. If only some of several
        processes ask, the batch is trained, and the epoch ends after it."""
        self._ends_epoch = True


class OptimizerStep(Phase):
    """An optimizer is about to step. The closure runs in this phase, because torch's optimizers evaluate it in ``step``.

    Attributes:
        optimizer: The optimizer.
    """

    optimizer: LightningOptimizer


def call_step(step: Callable[..., Any], *args: Any) -> Any:
    """Call a module's step without a wrapper: the default of :attr:`BeforeForward.call`."""
    return step(*args)


class BeforeForward(Phase):
    """The module's step (``training_step``, ``validation_step``, ...) is about to run. All stages.
    In manual optimization the whole ``training_step``, backward included, runs inside.

    Attributes:
        stage: ``"train"``, ``"validation"``, ``"test"`` or ``"predict"``.
        batch: The batch.
        batch_idx: Its index.
        closes_window: The batch's backward completes gradients: the one that a distributed wrapper
            has to synchronise in. False in manual optimization.
        call: How the step is called: ``call(step, *args)``. A distributed wrapper puts its own here.

    Example:
        >>> class Deterministic(Callback):
        ...     def on_before_forward(self, trainer, event):
        ...         call = event.call
        ...         event.call = lambda step, *args: call(torch.compiler.disable(step), *args)
    """

    stage: Stage
    batch: Any
    batch_idx: int
    closes_window: bool
    call: Callable[..., Any] = _writable(call_step)


class AfterForward(Event):
    """The module's step has returned. All stages.

    Attributes:
        stage: ``"train"``, ``"validation"``, ``"test"`` or ``"predict"``.
        batch: The batch.
        batch_idx: Its index.
        outputs: The value that the step returned.
        loss: The raw loss, a scalar tensor with its graph; None if the batch has none, and in the
            other stages.

    Example:
        >>> class WeightDecayInTheLoss(Callback):
        ...     def on_after_forward(self, trainer, event):
        ...         if event.loss is not None:
        ...             event.loss = event.loss + 0.01 * sum(p.square().sum() for p in trainer.module.parameters())
    """

    stage: Stage
    batch: Any
    batch_idx: int
    outputs: Any = _writable()
    loss: Tensor | None = _writable()


class BeforeZeroGrad(Phase, module_arguments=("optimizer",)):
    """An optimizer's gradients are about to be zeroed.

    Attributes:
        optimizer: The optimizer.
    """

    optimizer: LightningOptimizer


class AfterZeroGrad(Event):
    """An optimizer's gradients have been zeroed.

    Attributes:
        optimizer: The optimizer.
    """

    optimizer: LightningOptimizer


class BeforeBackward(Phase, module_arguments=("raw_loss",)):
    """Backward is about to run.

    Attributes:
        raw_loss: The loss as the module returned it, a scalar tensor that no window and no loss
            scale has changed.
        loss: The loss that backward runs on.
        evaluation: The number of this evaluation of the closure in its batch, from 1; 1 in manual optimization.

    Example:
        >>> class HalfTheGradients(Callback):
        ...     def on_before_backward(self, trainer, event):
        ...         event.loss = 0.5 * event.loss
    """

    raw_loss: Tensor
    loss: Tensor = _writable()
    evaluation: int = 1


class AfterBackward(Event, module_arguments=()):
    """Backward has run: gradients were added to.

    Attributes:
        raw_loss: The loss as the module returned it.
    """

    raw_loss: Tensor


class ReduceGradients(Event):
    """The window is complete: average gradients over processes if backward has not done it.

    Attributes:
        optimizer: The optimizer.
        skipped: Backward has not averaged them: the batch that closes the window has no loss in this process, or the user's own
            code steps.
        own_step: The user's own code steps, so that all processes average now. Else other processes may average in their
            backward.
    """

    optimizer: LightningOptimizer
    skipped: bool = False
    own_step: bool = False


class UnscaleGradients(Event):
    """Loss scaling is to be taken off the gradients.

    Attributes:
        optimizer: The optimizer.
        evaluation: The number of the evaluation of the closure that made them, from 1.
        can_skip: A step that follows can still be vetoed. False if the raw optimizer is stepping:
            then gradients that must not be used have to be an error.
    """

    optimizer: LightningOptimizer
    evaluation: int
    can_skip: bool


class GradientsReady(Event):
    """Gradients are complete and unscaled: normalise those of short or weighted windows. After this event they
    are the true gradients.

    Attributes:
        optimizer: The optimizer.
        batches: The window's batches that had a loss, a mean over the processes; None in manual optimization.
        weight: The sum of their weights, a mean over the processes; None if they have none.
        weight_reference: The unit that backward measured weights in: the run's first weight, or 1 with several processes.
    """

    optimizer: LightningOptimizer
    batches: Tensor | float | None
    weight: Tensor | float | None
    weight_reference: Tensor | float | None


class GradientsFinal(Event):
    """The gradients are the true ones: complete, unscaled and normalised. Read them here; only clipping changes them now.

    Attributes:
        optimizer: The optimizer.
        in_step: A step has asked for them. False if the module asks for them outside a step, to clip them.
    """

    optimizer: LightningOptimizer
    in_step: bool


class BeforeOptimizerStep(Event, module_arguments=("optimizer",)):
    """The optimizer is about to update, at each evaluation of its closure. Gradients are the true ones,
    unclipped. A listener may veto the step.

    Several processes agree on a veto by one exchange for each step, unless all listeners decide alike in all processes: mark
    such a listener with :func:`~eventtrain.decides_alike`.

    Attributes:
        optimizer: The optimizer.
        evaluation: The number of the evaluation of the closure that this follows, from 1; 1 without a closure.
        skip_reason: Why the step was vetoed; None if it was not.
    """

    optimizer: LightningOptimizer
    evaluation: int
    skip_reason: str | None = None

    def skip(self, reason: str) -> None:
        """Veto the step: nothing is updated, and ``optimizer_step_skipped`` has the reason.

        Args:
            reason: Why, in a few words. At a second evaluation of a closure a veto is an error,
                because the weights have moved by then. The first veto's reason counts.
        """
        if self.skip_reason is None:
            self._skip_reason = reason


class BeforeGradientClipping(Event):
    """Gradients may be clipped now: policies write the three fields.

    Attributes:
        optimizer: The optimizer.
        gradient_clip_val: The threshold, a positive number; None for no clipping.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``; None means ``"norm"``.
        norm_type: The order p of the norm for ``"norm"``.

    Example:
        >>> class ClipHarderLater(Callback):
        ...     def on_before_gradient_clipping(self, trainer, event):
        ...         event.gradient_clip_val = 1.0 if trainer.current_epoch < 5 else 0.1
    """

    optimizer: LightningOptimizer
    gradient_clip_val: float | None = _writable(None)
    gradient_clip_algorithm: str | None = _writable(None)
    norm_type: float = _writable(2.0)


class ClippingDecided(Event):
    """The policies have written how gradients are clipped, and nothing is clipped yet: the last place to measure them.

    Attributes:
        optimizer: The optimizer.
        gradient_clip_val: The threshold; None for no clipping.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``; None means ``"norm"``.
        norm_type: The order p of the norm for ``"norm"``.
        by_module: The module's own ``configure_gradient_clipping`` clips, by these values or others.
    """

    optimizer: LightningOptimizer
    gradient_clip_val: float | None
    gradient_clip_algorithm: str | None
    norm_type: float
    by_module: bool


class AfterGradientClipping(Event):
    """Gradients were clipped.

    Attributes:
        optimizer: The optimizer.
        gradient_clip_val: The threshold that was used.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        norm_type: The order p of the norm.
        total_norm: The norm of all of the optimizer's gradients before clipping, a scalar tensor on
            their device, never synchronised; None for ``"value"``.
    """

    optimizer: LightningOptimizer
    gradient_clip_val: float
    gradient_clip_algorithm: str
    norm_type: float
    total_norm: Tensor | None


class AfterOptimizerStep(Event):
    """The optimizer has updated its parameters.

    Attributes:
        optimizer: The optimizer.
    """

    optimizer: LightningOptimizer


class OptimizerStepSkipped(Event):
    """The optimizer has not updated its parameters.

    Attributes:
        optimizer: The optimizer.
        reason: ``"no loss"``, ``"no gradients"``, ``"overflow"``, or a veto's reason.
    """

    optimizer: LightningOptimizer
    reason: str


class AfterUpdate(Event):
    """A batch's optimization is over, something was updated, and ``global_step`` has just been counted:
    the place of everything that happens every n steps. Once per value of ``global_step``.

    Attributes:
        global_step: Batches of the run in which at least one optimizer updated, this one included.
    """

    global_step: int


class TrainDataEnd(Event):
    """The epoch's last batch has been optimized. Not published for an epoch that was ended early.

    Attributes:
        epoch: The epoch's index.
    """

    epoch: int


class BeforeLRSchedulerStep(Event, signal_name="before_lr_scheduler_step"):
    """A learning rate scheduler is about to step.

    Attributes:
        config: The scheduler and when it steps.
        learning_rates: The rate of each parameter group, as the last update used it.
        metric: The monitored value that the scheduler is given; None if it monitors nothing.

    Example:
        >>> class SmoothMetric(Callback):
        ...     def on_before_lr_scheduler_step(self, trainer, event):
        ...         if event.metric is not None:
        ...             event.metric = round(float(event.metric), 2)
    """

    config: LRSchedulerConfig
    learning_rates: list[float]
    metric: Tensor | float | None = _writable(None)


class AfterLRSchedulerStep(Event, signal_name="after_lr_scheduler_step"):
    """A learning rate scheduler has stepped.

    Attributes:
        config: The scheduler and when it steps.
        learning_rates: The new rate of each parameter group.
    """

    config: LRSchedulerConfig
    learning_rates: list[float]


class TrainBatchEnd(Event, module_arguments=("outputs", "batch", "batch_idx")):
    """A batch has been trained.

    Attributes:
        outputs: The value of ``training_step``: a mapping with ``"loss"`` and its other keys,
            detached; None for a batch without a loss.
        batch: The batch.
        batch_idx: Its index in the epoch.
        loss: The raw loss, detached, before any scaling; None if there was none.
    """

    outputs: Any
    batch: Any
    batch_idx: int
    loss: Tensor | None


# ------------------------------------------------------------------------------------ evaluation


class ValidationStart(Phase, module_arguments=()):
    """A validation begins; the module is in evaluation mode. A context manager that is entered here is left after
    ``validation_end``, also if an error or an interruption ends the validation without that event."""


class ValidationEpochStart(Event, module_arguments=()):
    """The pass over the validation loaders begins."""


class ValidationBatchStart(Event, module_arguments=("batch", "batch_idx", "dataloader_idx")):
    """A validation batch is about to run.

    Attributes:
        batch: The batch.
        batch_idx: Its index in its loader.
        dataloader_idx: The loader's index.
    """

    batch: Any
    batch_idx: int
    dataloader_idx: int = 0


class ValidationBatchEnd(Event, module_arguments=("outputs", "batch", "batch_idx", "dataloader_idx")):
    """A validation batch has run.

    Attributes:
        outputs: The value that ``validation_step`` returned.
        batch: The batch.
        batch_idx: Its index in its loader.
        dataloader_idx: The loader's index.
    """

    outputs: Any
    batch: Any
    batch_idx: int
    dataloader_idx: int = 0


class ValidationEpochEnd(Event, module_arguments=()):
    """The pass over the validation loaders is over; the module may still log here."""


class ValidationEnd(Event, module_arguments=()):
    """A validation is over and its metrics are final."""


class TestStart(ValidationStart):
    """A test begins; the module is in evaluation mode. A phase, as for validation."""


class TestEpochStart(ValidationEpochStart):
    """The pass over the test loaders begins."""


class TestBatchStart(ValidationBatchStart):
    """A test batch is about to run; fields as in :class:`ValidationBatchStart`."""


class TestBatchEnd(ValidationBatchEnd):
    """A test batch has run; fields as in :class:`ValidationBatchEnd`."""


class TestEpochEnd(ValidationEpochEnd):
    """The pass over the test loaders is over; the module may still log here."""


class TestEnd(ValidationEnd):
    """A test is over and its metrics are final."""


class PredictStart(ValidationStart):
    """Prediction begins; the module is in evaluation mode. A phase, as for validation."""


class PredictEpochStart(ValidationEpochStart):
    """The pass over the prediction loaders begins."""


class PredictBatchStart(ValidationBatchStart):
    """A prediction batch is about to run; fields as in :class:`ValidationBatchStart`."""


class PredictBatchEnd(ValidationBatchEnd):
    """A prediction batch has run; fields as in :class:`ValidationBatchEnd`."""


class PredictEpochEnd(ValidationEpochEnd):
    """The pass over the prediction loaders is over."""


class PredictEnd(ValidationEnd):
    """Prediction is over."""


# ------------------------------------------------------------------------------------ an epoch ends


class TrainEpochEnd(Event, module_arguments=()):
    """An epoch of training is over, its validation included; the module may still log here.

    Attributes:
        epoch: The epoch's index.
    """

    epoch: int


class MetricsLogged(Event):
    """Values are final and ready to be written. With scope ``"step"`` after the ``train_batch_end`` of a
    batch that updated, and for each evaluation batch that logged on step: after its end, but in a fit after the
    last batch, because an interrupted validation is repeated. With scope ``"epoch"`` once an epoch of training, or a
    pass of evaluation, is over; with scope ``"monitor"`` whenever a callback calls ``trainer.log_now``.

    Attributes:
        stage: ``"train"``, ``"validation"``, ``"test"`` or ``"predict"``.
        scope: ``"step"``, of which loggers write a part in training; ``"epoch"`` or ``"monitor"``, of which they write all.
        step: ``global_step``; for a step of an evaluation the number of evaluation batches in the run so far.
        metrics: The values that were logged with ``logger=True``, by name: scalar tensors on their device,
            numbers, or anything that ``float()`` takes. Read them during the event.
        epoch_complete: The data of the epoch was used to its end. False for an epoch that was ended
            early or in which the run stopped: nothing that counts epochs steps for it.
    """

    stage: Stage
    scope: Literal["step", "epoch", "monitor"]
    step: int
    metrics: Mapping[str, SupportsFloat]
    epoch_complete: bool = True


class SafePoint(Event):
    """Nothing is under way: the last place where the state of the run may change before a checkpoint. Published after each
    batch; after an epoch's last batch, once the epoch's own events are over.

    Attributes:
        epoch_end: The epoch is complete. ``current_epoch`` is counted after ``take_checkpoint``.
        window_open: Gradients of an unfinished accumulation window are held.
    """

    epoch_end: bool
    window_open: bool


class RequestStop(Event):
    """The place to end a run at this safe point: call ``trainer.stop(reason)``, or ``trainer.interrupt(reason)`` for a run
    that is to be resumed. Listeners change nothing else.

    Attributes:
        epoch_end: The epoch is complete.
        window_open: Gradients of an unfinished accumulation window are held.
    """

    epoch_end: bool
    window_open: bool


class TakeCheckpoint(Event):
    """The state of the run is final at this safe point: the place to write a checkpoint. Published at each safe point, after
    ``request_stop``; before ``train_end`` if the run was asked to stop after its last safe point; and whenever
    ``trainer.keep_checkpoint`` is called.

    Attributes:
        epoch_end: The epoch is complete.
        window_open: Gradients of an unfinished accumulation window are held.
        reason: Why the run is interrupted; None if it is not. If there is a reason, a listener that keeps checkpoints writes
            one now, unless it holds this very state already.
        path: The file that holds this state; written by the listeners if there is a reason.

    Example:
        >>> class KeepEachEpoch(Callback):
        ...     def on_take_checkpoint(self, trainer, event):
        ...         if event.epoch_end:
        ...             trainer.save_checkpoint(f"epoch-{trainer.current_epoch}.ckpt")
        >>> trainer = Trainer(max_epochs=2, callbacks=KeepEachEpoch(), device="cpu", default_callbacks=False)
        >>> trainer.fit(Line(), [torch.ones(4, 1)])
        >>> sorted(path.name for path in pathlib.Path().glob("*.ckpt"))
        ['epoch-0.ckpt', 'epoch-1.ckpt']
    """

    epoch_end: bool
    window_open: bool
    reason: str | None = None
    path: str | None = _writable(None)


class RunInterrupted(Event):
    """The run was interrupted by ``trainer.interrupt``, and its state is on disk. ``fit`` returns after this event, unless a
    listener leaves it by an exception, such as ``SystemExit``.

    Attributes:
        reason: Why.
        path: The file that ``fit(ckpt_path="last")`` resumes; None in a ``fast_dev_run``, which writes none.
    """

    reason: str
    path: str | None


class SaveCheckpoint(Event, module_arguments=("checkpoint",)):
    """The state of the run was collected for a checkpoint: add to it, or change it.

    Attributes:
        checkpoint: The checkpoint's content. A listener may add to it or change it in place.
    """

    checkpoint: dict[str, Any]


class CheckpointGathered(Event):
    """The content of a checkpoint is complete and about to be written. The place to move a part of it elsewhere, such as the
    shards of weights; ``checkpoint_read`` is the place to put it back.

    Attributes:
        checkpoint: The checkpoint's content. A listener may change it in place.
    """

    checkpoint: dict[str, Any]


class CheckpointSaved(Event):
    """A checkpoint is on disk under its final name.

    Attributes:
        path: The file.
    """

    path: str


# ------------------------------------------------------------------------------------ a run ends


class TrainEnd(Event, module_arguments=()):
    """Training is over."""


class FitEnd(Event, module_arguments=()):
    """``fit`` is over, without an error."""


class ExceptionRaised(Event, signal_name="exception", module_arguments=("exception",)):
    """The run is ending by an error. Reaches every listener, even if one of them raises. An error that a listener raises
    from this one, ``raise RuntimeError(...) from event.exception``, takes its place.

    Attributes:
        exception: The error that ``fit`` (``validate``, ``test``, ``predict``) is about to raise.
    """

    exception: BaseException


class Teardown(Event, module_hook="teardown", module_arguments=("stage",)):
    """The run is over, by an error or not: release resources. Reaches every listener, even if one of them raises.

    Attributes:
        stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
    """

    stage: str


def signal_name(event_type: type[Event]) -> str:
    """Return the name of an event's signal: ``TrainBatchStart`` -> ``"train_batch_start"``."""
    return event_type.signal_name or re.sub(r"(?<!^)(?=[A-Z])", "_", event_type.__name__).lower()


def module_hook(event_type: type[Event]) -> str:
    """Return the name of the module's hook for an event: ``on_`` + the signal's name, but for ``teardown``."""
    return event_type.module_hook or f"on_{signal_name(event_type)}"


EVENTS: dict[str, type[Event]] = {
    signal_name(declared): declared
    for declared in tuple(globals().values())
    if isinstance(declared, type) and issubclass(declared, Event) and declared not in (Event, Phase)
}
"""Every event by its signal's name, in loop order."""

LOOP_MAP = files("eventtrain").joinpath("loop_map.txt").read_text(encoding="utf-8")
"""The loop, line by line. A line that begins with a signal's name is an event."""


def evaluation_map(stage: str) -> str:
    """Return the loop map of ``"validation"``, ``"test"`` or ``"predict"``, which logs nothing."""
    template = files("eventtrain").joinpath("evaluation_map.txt").read_text(encoding="utf-8")
    lines = template.format(stage=stage).splitlines(keepends=True)
    return "".join(line for line in lines if stage != "predict" or not line.startswith("metrics_logged"))
