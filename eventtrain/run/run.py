"""One fit, validate, test or predict, from setup to teardown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from eventtrain.callback import attach, detach, make_idle
from eventtrain.checkpoint.rng import seed_everything
from eventtrain.core.evaluation import EvaluationLoop, EvaluationStage
from eventtrain.core.state import RunStage
from eventtrain.events import ExceptionRaised, JoinProcesses, Setup, Stage, Teardown
from eventtrain.run.arguments import check_datamodule, check_module
from eventtrain.run.compiled import ModuleSteps
from eventtrain.run.hook_connections import ConnectedHooks
from eventtrain.run.loaders import RunLoaders
from eventtrain.run.state import RunState

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer


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

    Raises:
        MisconfigurationError: If the model is not a module, or the datamodule is not one.
    """

    loaders: RunLoaders

    def __init__(
        self, trainer: Trainer, state: RunState, stage: RunStage, model: Any, datamodule: Any, dataloaders: dict[Stage, Any]
    ) -> None:
        self.trainer = trainer
        self.state = state
        self.stage: RunStage = stage
        self.signals = trainer.signals.table
        self.sanity_checking = False
        self.dataloaders = dataloaders
        steps = state.steps if model is None else ModuleSteps(model)
        self.module = check_module(None if steps is None else steps.module)
        assert steps is not None
        self.steps = steps
        state.module, state.steps, state.datamodule = self.module, steps, check_datamodule(datamodule)
        self._hooks: list[ConnectedHooks] = []
        self._module_callbacks: list[Any] = []

    @abstractmethod
    def body(self) -> None:
        """Do the work of the run, between setup and teardown."""

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
            self._after_error(first, partial(self.signals.exception.publish_to_all, ExceptionRaised(error)))
            raise
        finally:
            self._after_error(first, self._tear_down)

    # ------------------------------------------------------------------ setup

    def _attach(self) -> None:
        """Attach the module's callbacks, then connect the hooks: they come after all callbacks, because they come last."""
        trainer, module, datamodule = self.trainer, self.module, self.state.datamodule
        module.trainer = trainer
        if datamodule is not None:
            datamodule.trainer = trainer
        callbacks = module.configure_callbacks()
        for callback in callbacks if isinstance(callbacks, Iterable) else [callbacks]:
            attach(callback, trainer.signals, trainer.callbacks)
            self._module_callbacks.append(callback)
        for part in (datamodule, module):
            if part is not None:
                self._hooks.append(ConnectedHooks(part, trainer.signals))

    def _join_processes(self) -> None:
        """Join the other processes of the run, if there are any."""
        trainer = self.trainer
        event = JoinProcesses(self.stage, trainer.device, trainer.processes)
        self.signals.join_processes.publish(event)
        trainer.device = event.device
        trainer.processes = self.state.metrics.processes = event.processes
        self.state.metrics.device = event.device

    def _build(self) -> None:
        """Build the module, move it to its device, and let callbacks wrap it."""
        trainer, module, datamodule = self.trainer, self.module, self.state.datamodule
        self.loaders = RunLoaders(
            self.dataloaders,
            module,
            datamodule,
            trainer.arguments.batch_limits,
            self.signals,
            trainer.device,
            trainer.processes,
            trainer.arguments.read_ahead,
        )
        parts: list[Any] = [part for part in (datamodule, module) if part is not None]
        for part in parts:
            part.prepare_data()
        for part in parts:
            part.setup(self.stage)
        module.configure_model()
        module.to(trainer.device)
        self.signals.setup.publish(Setup(self.stage))

    # ------------------------------------------------------------------ evaluation

    def evaluation_loop(
        self,
        stage: EvaluationStage,
        *,
        context: Callable[[], AbstractContextManager[Any]],
        is_interrupted: Callable[[], bool] | None = None,
        most: int | None = None,
    ) -> EvaluationLoop:
        """Return a loop over the loaders of a stage.

        Args:
            stage: The stage.
            context: Returns the context that the evaluation runs in.
            is_interrupted: Whether the evaluation is to be left; None outside a fit.
            most: Batches of each loader at most; None for the stage's own limit.
        """
        lengths = self.loaders.lengths(stage, most=most)
        self.state.num_evaluation_batches = None if None in lengths else sum(length or 0 for length in lengths)
        several_processes = self.trainer.world_size > 1 and is_interrupted is not None
        return EvaluationLoop(
            stage=stage,
            signals=self.signals,
            step=self.steps[f"{stage}_step"],
            metrics=self.state.metrics,
            progress=self.state.progress,
            open_loaders=self.loaders.passes(stage, most=most, number=self.state.progress.total_batch_idx + 1),
            context=context,
            is_interrupted=is_interrupted,
            processes=self.trainer.processes if several_processes else None,
        )

    # ------------------------------------------------------------------ teardown

    def _tear_down(self) -> None:
        trainer, state = self.trainer, self.state
        try:
            self.module.untoggle_all()
            self.signals.teardown.publish_to_all(Teardown(self.stage))
        finally:
            for hooks in self._hooks:
                hooks.disconnect()
            for callback in self._module_callbacks:
                detach(callback, trainer.signals, trainer.callbacks)
            for callback in trainer.callbacks:
                make_idle(callback, trainer.signals)
            self.release()
            state.metrics.enter("train", None)

    def release(self) -> None:
        """Let go of the loaders' workers."""
        if hasattr(self, "loaders"):
            self.loaders.release()

    def _after_error(self, first: BaseException | None, action: Callable[[], None]) -> None:
        """Do something that has to be done after an error too; an error of its own becomes a note of the first."""
        try:
            action()
        except BaseException as later:
            if first is None:
                raise
            first.add_note(f"and afterwards: {type(later).__name__}: {later}")
