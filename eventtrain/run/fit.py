"""One fit: it makes loaders, optimizers and the training loop, resumes a checkpoint, and trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eventtrain._torch import version
from eventtrain.checkpoint import contents
from eventtrain.checkpoint.find import read_checkpoint
from eventtrain.checkpoint.optimizers import parameter_groups
from eventtrain.checkpoint.rng import isolated_rng
from eventtrain.core.closure import Closure
from eventtrain.core.evaluation import step_arguments
from eventtrain.core.loop import TrainLoop
from eventtrain.core.state import BatchState, StopRequest
from eventtrain.core.stepping import Stepping
from eventtrain.errors import EvaluationInterrupted, MisconfigurationError
from eventtrain.events import FitEnd, FitStart, Stage
from eventtrain.module.modes import evaluation_mode, warn_of_evaluation_mode
from eventtrain.module.module import LightningModule
from eventtrain.module.overriding import overridden_method
from eventtrain.optim.configure import configure_optimizers, warn_of_idle_schedulers
from eventtrain.run.arguments import validation_interval
from eventtrain.run.run import Run
from eventtrain.run.state import RunState

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer

NO_LOADER = "give fit(model, train_dataloaders=...), a datamodule, or define train_dataloader in the module."


class Fit(Run):
    """One fit.

    Args:
        trainer: The trainer.
        state: The state that the run writes.
        model: The module, compiled or not.
        datamodule: The datamodule, or None.
        dataloaders: The loaders that ``fit`` was given, by stage.
        ckpt_path: The checkpoint to resume, see :meth:`eventtrain.Trainer.fit`.
    """

    def __init__(
        self, trainer: Trainer, state: RunState, model: Any, datamodule: Any, dataloaders: dict[Stage, Any], ckpt_path: Any
    ) -> None:
        trainer.arguments.check_end()
        super().__init__(trainer, state, "fit", model, datamodule, dataloaders)
        state.fitted = self.module
        self.ckpt_path = ckpt_path

    def body(self) -> None:
        """Fit the module."""
        trainer, module, signals, state = self.trainer, self.module, self.signals, self.state
        if overridden_method(module, "training_step") is None:
            LightningModule.training_step(module)  # raises, and says what to define
        # First, so that a module may take its shape from a checkpoint, and a datamodule its split.
        path, checkpoint = read_checkpoint(trainer, self.ckpt_path)
        if checkpoint is not None:
            checkpoint = contents.announce(trainer, checkpoint, path)
        state.loaders = self.loaders
        if not self.loaders.of("train"):
            raise MisconfigurationError(f"There is nothing to train on: {self.misnamed_loader('train') or NO_LOADER}")
        limits = state.limits
        limits.first_epoch_batches = self._measure()
        if checkpoint is not None and checkpoint["data"] and len(checkpoint["ranks"]) + 1 == trainer.processes.data.world_size:
            limits.first_epoch_batches = checkpoint["data"].get("first_epoch_batches", limits.first_epoch_batches)
        self._configure_optimizers()
        validate = self._validation()
        state.loop = loop = self._train_loop(validate)
        warn_of_evaluation_mode(module)
        if checkpoint is not None:
            contents.restore(trainer, checkpoint, path)
        with torch.enable_grad():
            signals.fit_start.publish(FitStart())
            # A resumed run had its check when it began.
            if validate is not None and trainer.arguments.num_sanity_val_steps and checkpoint is None:
                self._sanity_check()
            contents.try_out(trainer)
            try:
                if trainer.arguments.batch_limits["train"] != 0:
                    loop.train()
            finally:  # workers go before callbacks give back the signals that they have taken over
                if loop.batches is not None:
                    loop.batches.close()
        signals.fit_end.publish(FitEnd())

    def release(self) -> None:
        """Let go of the optimizers and the loaders."""
        for optimizer, stepping in zip(self.state.optimizers, self.state.steppings, strict=True):
            stepping.disconnect()
            optimizer.leave()
        super().release()

    # ------------------------------------------------------------------ what the loop is made of

    def _measure(self) -> int | None:
        """Fit the limits to the training loader, whose length may differ in each epoch; return the epoch's batches."""
        limits, arguments, (loader,) = self.state.limits, self.trainer.arguments, self.loaders.of("train")
        limits.batches_per_epoch = batches = self.loaders.length("train", loader)
        if arguments.batch_limits["validation"] != 0:
            # A later epoch may be too short for a validation in it.
            across_epochs = limits.check_val_every_n_epoch is None or self.state.loop is not None
            limits.val_check_interval = validation_interval(arguments.val_check_interval, batches, across_epochs=across_epochs)
        if limits.is_estimated and batches != limits.first_epoch_batches:
            limits.is_estimated = False  # once is enough
            warnings.warn(
                f"Epoch {self.state.progress.current_epoch} has {batches} training batches, and "
                f"trainer.estimated_stepping_batches was computed from {limits.first_epoch_batches}, as in the first epoch. "
                "A schedule that was built from it ends too early or too late: give it your own number of steps, or "
                "Trainer(max_steps=...).",
                stacklevel=2,
            )
        return batches

    def _configure_optimizers(self) -> None:
        trainer, module, state = self.trainer, self.module, self.state
        optimizers, state.lr_scheduler_configs = configure_optimizers(module)
        automatic = module.automatic_optimization
        if automatic and state.lr_scheduler_configs:
            warn_of_idle_schedulers(module, trainer.callbacks)
        state.configured_groups = parameter_groups(module, optimizers)
        state.batch = BatchState(automatic=automatic)
        if trainer.world_size > 1:  # weights are measured in 1, because processes may have their first in different batches
            state.batch.processes, state.batch.weight_reference, state.stop = trainer.processes, 1.0, StopRequest()
        clip_hook = overridden_method(module, "configure_gradient_clipping") if automatic else None
        for optimizer in optimizers:
            stepping = Stepping(optimizer, self.signals, state.batch, module.toggled_optimizer, clip_hook, version)
            optimizer.join(stepping)
            state.optimizers.append(optimizer)
            state.steppings.append(stepping)
            self.steps.keep_out_of_graphs(optimizer)

    def _train_loop(self, validate: Callable[[], Any] | None) -> TrainLoop:
        module, state, (loader,) = self.module, self.state, self.loaders.of("train")
        training_step, zero_grad = self.steps["training_step"], overridden_method(module, "optimizer_zero_grad")
        takes_index = step_arguments(training_step, 1, most=2) > 1
        closure = None
        if module.automatic_optimization and state.steppings:
            closure = Closure(
                self.signals,
                state.batch,
                state.steppings[0],
                training_step,
                takes_index=takes_index,
                backward_hook=overridden_method(module, "backward") or Tensor.backward,
                zero_grad_hook=zero_grad and (lambda *args: zero_grad(state.progress.current_epoch, *args)),
            )
        return TrainLoop(
            signals=self.signals,
            progress=state.progress,
            batch=state.batch,
            stop=state.stop,
            mine=state.stop_request,
            metrics=state.metrics,
            limits=state.limits,
            open_epoch=partial(self.loaders.open, "train", loader, self._measure),
            training_step=training_step,
            takes_index=takes_index,
            closure=closure,
            optimizer_step=overridden_method(module, "optimizer_step"),
            validate=validate,
            keep_checkpoint=self.trainer.keep_checkpoint,
        )

    # ------------------------------------------------------------------ validation

    def _validation(self) -> Callable[[], Any] | None:
        """Return a function that runs a validation; None if there is nothing to validate."""
        module, batch = self.module, self.state.batch
        if self.trainer.arguments.batch_limits["validation"] == 0:
            return None
        if not self.loaders.lengths("validation"):
            if overridden_method(module, "validation_step") and (misnamed := self.misnamed_loader("validation")):
                warnings.warn(f"Nothing is validated: {misnamed}", stacklevel=2)
            return None
        if overridden_method(module, "validation_step") is None:
            warnings.warn(
                f"{type(module).__name__} has validation loaders and no validation_step: nothing is validated.", stacklevel=2
            )
            return None
        zero_grad = overridden_method(module, "on_validation_model_zero_grad")

        def validate() -> None:
            # Lightning zeroes all gradients here. Only a module that asks for it does, and never in an open window.
            if zero_grad is not None and not batch.window_open:
                zero_grad()
            self.evaluation_loop("validation").evaluate()

        return validate

    @contextmanager
    def evaluating(self) -> Generator[None, None, None]:
        """The context of a validation: without gradients, without a trace in training's random numbers and modes.

        Not ``inference_mode``, whose tensors training could not use.
        """
        with isolated_rng(), torch.no_grad(), evaluation_mode(self.module, "validation"):
            yield

    def _sanity_check(self) -> None:
        self.sanity_checking = True
        try:
            steps = self.trainer.arguments.num_sanity_val_steps
            self.evaluation_loop("validation", None if steps == -1 else steps).evaluate(silent=True)
        except EvaluationInterrupted:
            pass  # nothing was trained yet: the loop sees the request to stop
        finally:
            self.sanity_checking = False

    def is_interrupted(self) -> bool:
        """Return whether an evaluation is to be left, because this process is asked to or has heard that another one is."""
        processes, request = self.trainer.processes, self.state.stop_request
        if processes.evaluates_together:
            self.state.stop.take_up(request, processes, "batch_end", False)
            request = self.state.stop
        is_asked = request.at_once or request.interruption is not None
        if is_asked and not processes.is_called_off:
            processes.call_off()
        return is_asked or processes.is_called_off
