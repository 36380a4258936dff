"""One fit, validate, test or predict, from setup to teardown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from eventtrain.callback import Callback, listed, make_idle
from eventtrain.checkpoint.rng import seed_everything
from eventtrain.checkpoint.storage import first_line
from eventtrain.core.evaluation import EvaluationLoop, EvaluationStage
from eventtrain.core.loop import TrainLoop
from eventtrain.core.state import RunStage
from eventtrain.data.batches import LoaderPass
from eventtrain.errors import MisconfigurationError
from eventtrain.events import ExceptionRaised, JoinProcesses, Setup, Stage, Teardown
from eventtrain.hints import tables
from eventtrain.metrics.torchmetrics import unused_metrics
from eventtrain.module.datamodule import DataHooks
from eventtrain.module.module import LightningModule
from eventtrain.module.overriding import method_of, overridden
from eventtrain.run.arguments import check_module
from eventtrain.run.compiled import ModuleSteps
from eventtrain.run.hook_connections import connect_hooks, misnamed_loader
from eventtrain.run.loaders import LOADER_HOOKS, RunLoaders, data_of_call
from eventtrain.run.state import RunState

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer


LEFT_METRICS = "_left_metrics"


class Run(ABC):
    """The life of one run: it attaches the module's hooks, joins other processes, builds the module, runs, and tears down.

    The trainer makes it at the start of ``fit``, ``validate``, ``test`` or ``predict`` and drops it at the end.

    Args:
        trainer: The trainer.
        state: The state that the run writes.
        stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        model: The module, compiled or not; None for the module of the last run.
        datamodule: The datamodule, or None.
        dataloaders: The loaders that the call was given, by stage.

    Attributes:
        sanity_checking: The validation before training is running.
        loaders: The loaders of the run; they exist once it has joined the other processes.
        is_interrupted: Asked before each batch of an evaluation: whether it is to be left. None outside a fit.

    Raises:
        MisconfigurationError: If the model is not a module, or the data is given in a wrong way.
    """

    loaders: RunLoaders
    is_interrupted: Callable[[], bool] | None = None

    def __init__(
        self, trainer: Trainer, state: RunState, stage: RunStage, model: Any, datamodule: Any, dataloaders: dict[Stage, Any]
    ) -> None:
        self.trainer = trainer
        self.state = state
        self.stage: RunStage = stage
        self.signals = trainer.signals.table
        self.sanity_checking = False
        self.dataloaders, datamodule = data_of_call(stage, model, dataloaders, datamodule)
        steps = state.steps if model is None else ModuleSteps(model)
        self.module = check_module(None if steps is None else steps.module)
        assert steps is not None
        self.steps = steps
        state.module, state.steps, state.datamodule = self.module, steps, datamodule
        self._hooks = ExitStack()
        self._module_callbacks: list[Any] = []
        self._unused_metrics: list[Any] = []
        self._replaced_callbacks: list[tuple[int, Any]] = []
        # A fit of another trainer may be running, which validates its module by this one.
        self._outer, self._toggles = vars(self.module).get("_trainer"), 0

    @abstractmethod
    def body(self) -> None:
        """Do the work of the run, between setup and teardown."""

    @abstractmethod
    def evaluating(self) -> AbstractContextManager[None]:
        """Return the context that an evaluation runs in."""

    def execute(self) -> None:
        """Run from setup to teardown. ``exception`` and ``teardown`` reach every listener; the first error is raised."""
        if self.trainer.seed is not None:
            seed_everything(self.trainer.seed)
        first: BaseException | None = None
        try:
            self._attach()
            self._join_processes()
            self._build()
            with self.steps.calling_the_trainer():
                self.body()
        except BaseException as error:
            first = error
            if isinstance(error, Exception):
                add_notes(error, self.trainer, self.module)
            self._after_error(first, partial(self.signals.exception.publish_to_all, ExceptionRaised(error)))
            raise
        finally:
            # The next run of the module resets the metric objects that this one logged or, if it failed, was to log.
            left = self.state.metrics.objects() + (self._unused_metrics if first else [])
            self.module.__dict__.setdefault(LEFT_METRICS, []).extend(left)
            self._after_error(first, self._tear_down)

    # ------------------------------------------------------------------ setup

    def _attach(self) -> None:
        """Attach the module's callbacks, then connect the hooks: they come after all callbacks, because they come last."""
        trainer, module, datamodule = self.trainer, self.module, self.state.datamodule
        self._attach_to(trainer)
        self._toggles = len(module._toggle_stack())
        self._attach_callbacks(listed(method_of(module, "configure_callbacks", LightningModule)()))
        for part in (datamodule, module):
            if part is not None:
                connect_hooks(part, trainer.signals, self._hooks)

    def _attach_to(self, trainer: Trainer) -> None:
        self.module.attach_trainer(trainer)
        if self.state.datamodule is not None:
            with suppress(AttributeError):  # an object with slots, or a frozen one, does without it
                self.state.datamodule.trainer = trainer

    def _attach_callbacks(self, callbacks: list[Any]) -> None:
        """Attach the module's callbacks for the run. A callback of the same class, or of a base of it, rests meanwhile."""
        attached, signals = self.trainer.callbacks, self.trainer.signals
        for index, other in reversed(list(enumerate(attached))):
            replaces = isinstance(other, Callback) and type(other) is not Callback
            if replaces and any(isinstance(callback, type(other)) for callback in callbacks):
                make_idle(other, signals, replaced=True)
                list.pop(attached, index)
                self._replaced_callbacks.append((index, other))
        for callback in callbacks:
            attached.append(callback)
            self._module_callbacks.append(callback)

    def _join_processes(self) -> None:
        """Join the other processes of the run, if there are any."""
        trainer = self.trainer
        event = JoinProcesses(self.stage, trainer.device, trainer.processes)
        self.signals.join_processes.publish(event)
        trainer.device = event.device
        trainer.processes = event.processes
        self.state.metrics.processes = event.processes.data
        self.state.metrics.device = event.device

    def _build(self) -> None:
        """Build the module, move it to its device, and let callbacks wrap it."""
        trainer, module, datamodule = self.trainer, self.module, self.state.datamodule
        self.loaders = RunLoaders(
            self.dataloaders, module, datamodule, trainer.arguments, self.signals, trainer.device, trainer.processes
        )
        parts = [part for part in (datamodule, module) if part is not None]
        for part in parts:
            if overridden(part, "prepare_data", DataHooks):
                self._prepare_data(part)
        for part in parts:
            method_of(part, "setup", DataHooks)(self.stage)
        method_of(module, "configure_model", LightningModule)()
        module.attach_trainer(trainer)  # to the modules that these hooks made, too
        module.to(trainer.device)
        for metric in module.__dict__.pop(LEFT_METRICS, ()):
            metric.reset()
        self._unused_metrics = unused_metrics(module)
        self.signals.setup.publish(Setup(self.stage))

    def _prepare_data(self, part: Any) -> None:
        """Prepare data in one process of each machine, or in the first of all; if it raises, all end."""
        processes = self.trainer.processes
        per_node = getattr(part, "prepare_data_per_node", True)
        failure: BaseException | None = None
        if (processes.local_rank if per_node else processes.global_rank) == 0:
            try:
                method_of(part, "prepare_data", DataHooks)()
            except BaseException as error:
                failure = error
        problems = processes.gather_for_all(failure and f"on rank {processes.global_rank}: {first_line(failure)}")
        if failure is not None:
            raise failure
        if any(problems):
            raise MisconfigurationError(f"{type(part).__name__}.prepare_data has failed {next(filter(None, problems))}")

    # ------------------------------------------------------------------ evaluation

    def evaluation_loop(self, stage: EvaluationStage, most: int | None = None) -> EvaluationLoop:
        """Return a loop over the loaders of a stage.

        Args:
            stage: The stage.
            most: Batches of each loader at most; None for the stage's own limit.
        """
        lengths = self.loaders.lengths(stage, most=most)
        self.state.num_evaluation_batches = None if None in lengths else sum(length or 0 for length in lengths)
        return EvaluationLoop(
            stage=stage,
            signals=self.signals,
            step=self.steps[f"{stage}_step"],
            metrics=self.state.metrics,
            progress=self.state.progress,
            open_loaders=self.loaders.passes(stage, most=most, number=self.state.progress.total_batch_idx + 1),
            context=self.evaluating,
            is_interrupted=self.is_interrupted,
            processes=None if self.is_interrupted is None else self.trainer.processes,
            warns_if_empty=self.trainer.world_size == 1 and self.trainer.arguments.batch_limits[stage] != 0,
        )

    def misnamed_loader(self, stage: Stage) -> str:
        """Return a sentence about an attribute that may be meant as a stage's loader; empty if there is none."""
        parts = [part for part in (self.state.datamodule, self.module) if part is not None]
        return misnamed_loader(LOADER_HOOKS[stage], *parts)

    # ------------------------------------------------------------------ teardown

    def _tear_down(self) -> None:
        trainer, outer, self._outer = self.trainer, self._outer, None
        try:
            self.module.untoggle_all(self._toggles)
            self.signals.teardown.publish_to_all(Teardown(self.stage))
        finally:
            self._hooks.close()
            left = [each for each in trainer.callbacks if not any(each is brought for brought in self._module_callbacks)]
            trainer.callbacks.become(left)
            for index, callback in reversed(self._replaced_callbacks):
                list.insert(trainer.callbacks, index, callback)
            for callback in trainer.callbacks:
                make_idle(callback, trainer.signals)
            self.release()
            self.state.metrics.enter("train", None)
            if outer is not None and outer.stage is not None:
                self._attach_to(outer)

    def release(self) -> None:
        """Let go of the loaders' workers."""
        if hasattr(self, "loaders"):
            self.loaders.release()

    def _after_error(self, first: BaseException | None, action: Callable[[], None]) -> None:
        """Do something that has to be done after an error too. If it raises, its error becomes a note of the first, or replaces
        it if it was raised from it."""
        try:
            action()
        except BaseException as later:
            if first is None or later.__cause__ is first:
                raise
            first.add_note(f"and afterwards: {type(later).__name__}: {later}")


def add_notes(error: Exception, trainer: Trainer, module: LightningModule) -> None:
    """Add notes to an error that ends a run: the stage, epoch and batch, unless a note names the listener that raised it; and
    what to write instead of an attribute that modules have elsewhere. It costs nothing while there is no error.

    Args:
        error: The error.
        trainer: The trainer.
        module: The module of the run.
    """
    if isinstance(error, AttributeError) and isinstance(error.obj, LightningModule):
        remedy = tables()["module"].get(str(error.name))
        if remedy is not None:
            error.add_note(f"{type(error.obj).__name__} has no attribute {error.name!r}. {remedy}")
    frames = {frame.f_code: frame for frame, _ in walk_tb(error.__traceback__)}
    evaluation = frames.get(EvaluationLoop.evaluate_loader.__code__)
    if hasattr(error, "_eventtrain_noted") or (evaluation is None and TrainLoop.train_epoch.__code__ not in frames):
        return
    is_loading = LoaderPass.fetch.__code__ in frames
    if evaluation is None:
        stage, batch_idx = "train", trainer.batch_idx + is_loading
    else:
        stage, batch_idx = evaluation.f_locals["self"].stage, evaluation.f_locals["batch_idx"]
    step = "training_step" if stage == "train" else f"{stage}_step"
    place = f"the {stage} loop"
    if is_loading:
        place = f"the {stage} loader"
    elif getattr(getattr(module, step), "__code__", None) in frames:
        place = f"{type(module).__name__}.{step}"
    epoch = f"epoch {trainer.current_epoch}, " if trainer.stage == "fit" else ""
    loader = "" if evaluation is None else f", loader {evaluation.f_locals['dataloader_idx']}"
    error.add_note(f"raised in {place} ({epoch}batch {batch_idx}{loader})")
    error._eventtrain_noted = True  # type: ignore[attr-defined]
