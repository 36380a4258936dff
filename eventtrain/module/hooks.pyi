# Written by `python docs/generate.py` from eventtrain/events.py. Do not edit.
from typing import Any

from torch import Tensor

from eventtrain import events
from eventtrain.core.optimizer import LightningOptimizer
from eventtrain.trainer import Trainer

MODULE_ONLY_HOOKS: tuple[str, ...]

class CallbackHooks:
    def on_join_processes(self, trainer: Trainer, event: events.JoinProcesses) -> None:
        """A run begins, and nothing of its module is built yet. The place to join a process group, and to choose this process's device."""
    def on_setup(self, trainer: Trainer, event: events.Setup) -> None:
        """The module is built (its ``setup`` and ``configure_model`` have run) and on its device; loaders and optimizers do not exist yet. The place to wrap or shard the module."""
    def on_find_checkpoint(self, trainer: Trainer, event: events.FindCheckpoint) -> None:
        """``ckpt_path="last"`` or ``"best"`` was given: the callbacks that keep checkpoints offer theirs."""
    def on_checkpoint_read(self, trainer: Trainer, event: events.CheckpointRead) -> None:
        """A checkpoint has been read from its file. If a listener of ``checkpoint_gathered`` moved a part of it elsewhere, this is the place to put that part back. The module exists, loaders and optimizers do not."""
    def on_load_checkpoint(self, trainer: Trainer, event: events.LoadCheckpoint) -> None:
        """A checkpoint is complete, and nothing is restored from it yet: loaders and optimizers do not exist. A module may take its shape from it here."""
    def on_prepare_loader(self, trainer: Trainer, event: events.PrepareLoader) -> None:
        """A run is about to use a loader for the first time. The place to let it read this process's share."""
    def on_estimate_stepping_batches(self, trainer: Trainer, event: events.EstimateSteppingBatches) -> None:
        """Asks how many batches of the whole run will update something; published whenever ``trainer.estimated_stepping_batches`` is read, for the first time from ``configure_optimizers``."""
    def on_fit_start(self, trainer: Trainer, event: events.FitStart) -> None:
        """``fit`` begins: module, loaders, optimizers and schedulers exist. The place for checks that need them."""
    def on_train_start(self, trainer: Trainer, event: events.TrainStart) -> None:
        """Training begins, after the sanity check."""
    def on_train_epoch_start(self, trainer: Trainer, event: events.TrainEpochStart) -> None:
        """An epoch of training begins, or continues after the batch at which a checkpoint was written."""
    def on_before_batch_fetch(self, trainer: Trainer, event: events.BeforeBatchFetch) -> None:
        """The next batch is about to be waited for and moved to the device. All stages."""
    def on_after_batch_fetch(self, trainer: Trainer, event: events.AfterBatchFetch) -> None:
        """The batch is on its device: augment it here. All stages."""
    def on_train_batch_start(self, trainer: Trainer, event: events.TrainBatchStart) -> None:
        """A batch is about to be trained: the gate, at which accumulation writes the plan."""
    def on_optimizer_step(self, trainer: Trainer, event: events.OptimizerStep) -> None:
        """An optimizer is about to step. The closure runs in this phase, because torch's optimizers evaluate it in ``step``."""
    def on_before_forward(self, trainer: Trainer, event: events.BeforeForward) -> None:
        """The module's step (``training_step``, ``validation_step``, ...) is about to run. All stages. In manual optimization the whole ``training_step``, backward included, runs inside."""
    def on_after_forward(self, trainer: Trainer, event: events.AfterForward) -> None:
        """The module's step has returned. All stages."""
    def on_before_zero_grad(self, trainer: Trainer, event: events.BeforeZeroGrad) -> None:
        """An optimizer's gradients are about to be zeroed."""
    def on_after_zero_grad(self, trainer: Trainer, event: events.AfterZeroGrad) -> None:
        """An optimizer's gradients have been zeroed."""
    def on_before_backward(self, trainer: Trainer, event: events.BeforeBackward) -> None:
        """Backward is about to run."""
    def on_after_backward(self, trainer: Trainer, event: events.AfterBackward) -> None:
        """Backward has run: gradients were added to."""
    def on_reduce_gradients(self, trainer: Trainer, event: events.ReduceGradients) -> None:
        """The window is complete: average gradients over processes if backward has not done it."""
    def on_unscale_gradients(self, trainer: Trainer, event: events.UnscaleGradients) -> None:
        """Loss scaling is to be taken off the gradients."""
    def on_gradients_ready(self, trainer: Trainer, event: events.GradientsReady) -> None:
        """Gradients are complete and unscaled: normalise those of short or weighted windows. After this event they are the true gradients."""
    def on_gradients_final(self, trainer: Trainer, event: events.GradientsFinal) -> None:
        """The gradients are the true ones: complete, unscaled and normalised. Read them here; only clipping changes them now."""
    def on_before_optimizer_step(self, trainer: Trainer, event: events.BeforeOptimizerStep) -> None:
        """The optimizer is about to update, at each evaluation of its closure. Gradients are the true ones, unclipped. A listener may veto the step. Several processes agree on a veto by one exchange for each step, unless all listeners decide alike in all processes: mark such a listener with :func:`~eventtrain.decides_alike`."""
    def on_before_gradient_clipping(self, trainer: Trainer, event: events.BeforeGradientClipping) -> None:
        """Gradients may be clipped now: policies write the three fields."""
    def on_clipping_decided(self, trainer: Trainer, event: events.ClippingDecided) -> None:
        """The policies have written how gradients are clipped, and nothing is clipped yet: the last place to measure them."""
    def on_after_gradient_clipping(self, trainer: Trainer, event: events.AfterGradientClipping) -> None:
        """Gradients were clipped."""
    def on_after_optimizer_step(self, trainer: Trainer, event: events.AfterOptimizerStep) -> None:
        """The optimizer has updated its parameters."""
    def on_optimizer_step_skipped(self, trainer: Trainer, event: events.OptimizerStepSkipped) -> None:
        """The optimizer has not updated its parameters."""
    def on_after_update(self, trainer: Trainer, event: events.AfterUpdate) -> None:
        """A batch's optimization is over, something was updated, and ``global_step`` has just been counted: the place of everything that happens every n steps. Once per value of ``global_step``."""
    def on_train_data_end(self, trainer: Trainer, event: events.TrainDataEnd) -> None:
        """The epoch's last batch has been optimized. Not published for an epoch that was ended early."""
    def on_before_lr_scheduler_step(self, trainer: Trainer, event: events.BeforeLRSchedulerStep) -> None:
        """A learning rate scheduler is about to step."""
    def on_after_lr_scheduler_step(self, trainer: Trainer, event: events.AfterLRSchedulerStep) -> None:
        """A learning rate scheduler has stepped."""
    def on_train_batch_end(self, trainer: Trainer, event: events.TrainBatchEnd) -> None:
        """A batch has been trained."""
    def on_validation_start(self, trainer: Trainer, event: events.ValidationStart) -> None:
        """A validation begins; the module is in evaluation mode. A context manager that is entered here is left after ``validation_end``, also if an error or an interruption ends the validation without that event."""
    def on_validation_epoch_start(self, trainer: Trainer, event: events.ValidationEpochStart) -> None:
        """The pass over the validation loaders begins."""
    def on_validation_batch_start(self, trainer: Trainer, event: events.ValidationBatchStart) -> None:
        """A validation batch is about to run."""
    def on_validation_batch_end(self, trainer: Trainer, event: events.ValidationBatchEnd) -> None:
        """A validation batch has run."""
    def on_validation_epoch_end(self, trainer: Trainer, event: events.ValidationEpochEnd) -> None:
        """The pass over the validation loaders is over; the module may still log here."""
    def on_validation_end(self, trainer: Trainer, event: events.ValidationEnd) -> None:
        """A validation is over and its metrics are final."""
    def on_test_start(self, trainer: Trainer, event: events.TestStart) -> None:
        """A test begins; the module is in evaluation mode. A phase, as for validation."""
    def on_test_epoch_start(self, trainer: Trainer, event: events.TestEpochStart) -> None:
        """The pass over the test loaders begins."""
    def on_test_batch_start(self, trainer: Trainer, event: events.TestBatchStart) -> None:
        """A test batch is about to run; fields as in :class:`ValidationBatchStart`."""
    def on_test_batch_end(self, trainer: Trainer, event: events.TestBatchEnd) -> None:
        """A test batch has run; fields as in :class:`ValidationBatchEnd`."""
    def on_test_epoch_end(self, trainer: Trainer, event: events.TestEpochEnd) -> None:
        """The pass over the test loaders is over; the module may still log here."""
    def on_test_end(self, trainer: Trainer, event: events.TestEnd) -> None:
        """A test is over and its metrics are final."""
    def on_predict_start(self, trainer: Trainer, event: events.PredictStart) -> None:
        """Prediction begins; the module is in evaluation mode. A phase, as for validation."""
    def on_predict_epoch_start(self, trainer: Trainer, event: events.PredictEpochStart) -> None:
        """The pass over the prediction loaders begins."""
    def on_predict_batch_start(self, trainer: Trainer, event: events.PredictBatchStart) -> None:
        """A prediction batch is about to run; fields as in :class:`ValidationBatchStart`."""
    def on_predict_batch_end(self, trainer: Trainer, event: events.PredictBatchEnd) -> None:
        """A prediction batch has run; fields as in :class:`ValidationBatchEnd`."""
    def on_predict_epoch_end(self, trainer: Trainer, event: events.PredictEpochEnd) -> None:
        """The pass over the prediction loaders is over."""
    def on_predict_end(self, trainer: Trainer, event: events.PredictEnd) -> None:
        """Prediction is over."""
    def on_train_epoch_end(self, trainer: Trainer, event: events.TrainEpochEnd) -> None:
        """An epoch of training is over, its validation included; the module may still log here."""
    def on_metrics_logged(self, trainer: Trainer, event: events.MetricsLogged) -> None:
        """Values are final and ready to be written. With scope ``"step"`` after the ``train_batch_end`` of a batch that updated, and for each evaluation batch that logged on step: after its end, but in a fit after the last batch, because an interrupted validation is repeated. With scope ``"epoch"`` once an epoch of training, or a pass of evaluation, is over; with scope ``"monitor"`` whenever a callback calls ``trainer.log_now``."""
    def on_safe_point(self, trainer: Trainer, event: events.SafePoint) -> None:
        """Nothing is under way: the last place where the state of the run may change before a checkpoint. Published after each batch; after an epoch's last batch, once the epoch's own events are over."""
    def on_request_stop(self, trainer: Trainer, event: events.RequestStop) -> None:
        """The place to end a run at this safe point: call ``trainer.stop(reason)``, or ``trainer.interrupt(reason)`` for a run that is to be resumed. Listeners change nothing else."""
    def on_take_checkpoint(self, trainer: Trainer, event: events.TakeCheckpoint) -> None:
        """The state of the run is final at this safe point: the place to write a checkpoint. Published at each safe point, after ``request_stop``; before ``train_end`` if the run was asked to stop after its last safe point; and whenever ``trainer.keep_checkpoint`` is called."""
    def on_run_interrupted(self, trainer: Trainer, event: events.RunInterrupted) -> None:
        """The run was interrupted by ``trainer.interrupt``, and its state is on disk. ``fit`` returns after this event, unless a listener leaves it by an exception, such as ``SystemExit``."""
    def on_save_checkpoint(self, trainer: Trainer, event: events.SaveCheckpoint) -> None:
        """The state of the run was collected for a checkpoint: add to it, or change it."""
    def on_checkpoint_gathered(self, trainer: Trainer, event: events.CheckpointGathered) -> None:
        """The content of a checkpoint is complete and about to be written. The place to move a part of it elsewhere, such as the shards of weights; ``checkpoint_read`` is the place to put it back."""
    def on_checkpoint_saved(self, trainer: Trainer, event: events.CheckpointSaved) -> None:
        """A checkpoint is on disk under its final name."""
    def on_train_end(self, trainer: Trainer, event: events.TrainEnd) -> None:
        """Training is over."""
    def on_fit_end(self, trainer: Trainer, event: events.FitEnd) -> None:
        """``fit`` is over, without an error."""
    def on_exception(self, trainer: Trainer, event: events.ExceptionRaised) -> None:
        """The run is ending by an error. Reaches every listener, even if one of them raises. An error that a listener raises from this one, ``raise RuntimeError(...) from event.exception``, takes its place."""
    def on_teardown(self, trainer: Trainer, event: events.Teardown) -> None:
        """The run is over, by an error or not: release resources. Reaches every listener, even if one of them raises."""

class ModuleHooks:
    def on_join_processes(self, event: events.JoinProcesses) -> None:
        """A run begins, and nothing of its module is built yet. The place to join a process group, and to choose this process's device."""
    def on_setup(self, event: events.Setup) -> None:
        """The module is built (its ``setup`` and ``configure_model`` have run) and on its device; loaders and optimizers do not exist yet. The place to wrap or shard the module."""
    def on_find_checkpoint(self, event: events.FindCheckpoint) -> None:
        """``ckpt_path="last"`` or ``"best"`` was given: the callbacks that keep checkpoints offer theirs."""
    def on_checkpoint_read(self, event: events.CheckpointRead) -> None:
        """A checkpoint has been read from its file. If a listener of ``checkpoint_gathered`` moved a part of it elsewhere, this is the place to put that part back. The module exists, loaders and optimizers do not."""
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is complete, and nothing is restored from it yet: loaders and optimizers do not exist. A module may take its shape from it here."""
    def on_prepare_loader(self, event: events.PrepareLoader) -> None:
        """A run is about to use a loader for the first time. The place to let it read this process's share."""
    def on_estimate_stepping_batches(self, event: events.EstimateSteppingBatches) -> None:
        """Asks how many batches of the whole run will update something; published whenever ``trainer.estimated_stepping_batches`` is read, for the first time from ``configure_optimizers``."""
    def on_fit_start(self) -> None:
        """``fit`` begins: module, loaders, optimizers and schedulers exist. The place for checks that need them."""
    def on_train_start(self) -> None:
        """Training begins, after the sanity check."""
    def on_train_epoch_start(self) -> None:
        """An epoch of training begins, or continues after the batch at which a checkpoint was written."""
    def on_before_batch_fetch(self, event: events.BeforeBatchFetch) -> None:
        """The next batch is about to be waited for and moved to the device. All stages."""
    def on_after_batch_fetch(self, event: events.AfterBatchFetch) -> None:
        """The batch is on its device: augment it here. All stages."""
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """A batch is about to be trained: the gate, at which accumulation writes the plan."""
    def on_optimizer_step(self, event: events.OptimizerStep) -> None:
        """An optimizer is about to step. The closure runs in this phase, because torch's optimizers evaluate it in ``step``."""
    def on_before_forward(self, event: events.BeforeForward) -> None:
        """The module's step (``training_step``, ``validation_step``, ...) is about to run. All stages. In manual optimization the whole ``training_step``, backward included, runs inside."""
    def on_after_forward(self, event: events.AfterForward) -> None:
        """The module's step has returned. All stages."""
    def on_before_zero_grad(self, optimizer: LightningOptimizer) -> None:
        """An optimizer's gradients are about to be zeroed."""
    def on_after_zero_grad(self, event: events.AfterZeroGrad) -> None:
        """An optimizer's gradients have been zeroed."""
    def on_before_backward(self, loss: Tensor) -> None:
        """Backward is about to run."""
    def on_after_backward(self) -> None:
        """Backward has run: gradients were added to."""
    def on_reduce_gradients(self, event: events.ReduceGradients) -> None:
        """The window is complete: average gradients over processes if backward has not done it."""
    def on_unscale_gradients(self, event: events.UnscaleGradients) -> None:
        """Loss scaling is to be taken off the gradients."""
    def on_gradients_ready(self, event: events.GradientsReady) -> None:
        """Gradients are complete and unscaled: normalise those of short or weighted windows. After this event they are the true gradients."""
    def on_gradients_final(self, event: events.GradientsFinal) -> None:
        """The gradients are the true ones: complete, unscaled and normalised. Read them here; only clipping changes them now."""
    def on_before_optimizer_step(self, optimizer: LightningOptimizer) -> None:
        """The optimizer is about to update, at each evaluation of its closure. Gradients are the true ones, unclipped. A listener may veto the step. Several processes agree on a veto by one exchange for each step, unless all listeners decide alike in all processes: mark such a listener with :func:`~eventtrain.decides_alike`."""
    def on_before_gradient_clipping(self, event: events.BeforeGradientClipping) -> None:
        """Gradients may be clipped now: policies write the three fields."""
    def on_clipping_decided(self, event: events.ClippingDecided) -> None:
        """The policies have written how gradients are clipped, and nothing is clipped yet: the last place to measure them."""
    def on_after_gradient_clipping(self, event: events.AfterGradientClipping) -> None:
        """Gradients were clipped."""
    def on_after_optimizer_step(self, event: events.AfterOptimizerStep) -> None:
        """The optimizer has updated its parameters."""
    def on_optimizer_step_skipped(self, event: events.OptimizerStepSkipped) -> None:
        """The optimizer has not updated its parameters."""
    def on_after_update(self, event: events.AfterUpdate) -> None:
        """A batch's optimization is over, something was updated, and ``global_step`` has just been counted: the place of everything that happens every n steps. Once per value of ``global_step``."""
    def on_train_data_end(self, event: events.TrainDataEnd) -> None:
        """The epoch's last batch has been optimized. Not published for an epoch that was ended early."""
    def on_before_lr_scheduler_step(self, event: events.BeforeLRSchedulerStep) -> None:
        """A learning rate scheduler is about to step."""
    def on_after_lr_scheduler_step(self, event: events.AfterLRSchedulerStep) -> None:
        """A learning rate scheduler has stepped."""
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A batch has been trained."""
    def on_validation_start(self) -> None:
        """A validation begins; the module is in evaluation mode. A context manager that is entered here is left after ``validation_end``, also if an error or an interruption ends the validation without that event."""
    def on_validation_epoch_start(self) -> None:
        """The pass over the validation loaders begins."""
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A validation batch is about to run."""
    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A validation batch has run."""
    def on_validation_epoch_end(self) -> None:
        """The pass over the validation loaders is over; the module may still log here."""
    def on_validation_end(self) -> None:
        """A validation is over and its metrics are final."""
    def on_test_start(self) -> None:
        """A test begins; the module is in evaluation mode. A phase, as for validation."""
    def on_test_epoch_start(self) -> None:
        """The pass over the test loaders begins."""
    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A test batch is about to run; fields as in :class:`ValidationBatchStart`."""
    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A test batch has run; fields as in :class:`ValidationBatchEnd`."""
    def on_test_epoch_end(self) -> None:
        """The pass over the test loaders is over; the module may still log here."""
    def on_test_end(self) -> None:
        """A test is over and its metrics are final."""
    def on_predict_start(self) -> None:
        """Prediction begins; the module is in evaluation mode. A phase, as for validation."""
    def on_predict_epoch_start(self) -> None:
        """The pass over the prediction loaders begins."""
    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A prediction batch is about to run; fields as in :class:`ValidationBatchStart`."""
    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A prediction batch has run; fields as in :class:`ValidationBatchEnd`."""
    def on_predict_epoch_end(self) -> None:
        """The pass over the prediction loaders is over."""
    def on_predict_end(self) -> None:
        """Prediction is over."""
    def on_train_epoch_end(self) -> None:
        """An epoch of training is over, its validation included; the module may still log here."""
    def on_metrics_logged(self, event: events.MetricsLogged) -> None:
        """Values are final and ready to be written. With scope ``"step"`` after the ``train_batch_end`` of a batch that updated, and for each evaluation batch that logged on step: after its end, but in a fit after the last batch, because an interrupted validation is repeated. With scope ``"epoch"`` once an epoch of training, or a pass of evaluation, is over; with scope ``"monitor"`` whenever a callback calls ``trainer.log_now``."""
    def on_safe_point(self, event: events.SafePoint) -> None:
        """Nothing is under way: the last place where the state of the run may change before a checkpoint. Published after each batch; after an epoch's last batch, once the epoch's own events are over."""
    def on_request_stop(self, event: events.RequestStop) -> None:
        """The place to end a run at this safe point: call ``trainer.stop(reason)``, or ``trainer.interrupt(reason)`` for a run that is to be resumed. Listeners change nothing else."""
    def on_take_checkpoint(self, event: events.TakeCheckpoint) -> None:
        """The state of the run is final at this safe point: the place to write a checkpoint. Published at each safe point, after ``request_stop``; before ``train_end`` if the run was asked to stop after its last safe point; and whenever ``trainer.keep_checkpoint`` is called."""
    def on_run_interrupted(self, event: events.RunInterrupted) -> None:
        """The run was interrupted by ``trainer.interrupt``, and its state is on disk. ``fit`` returns after this event, unless a listener leaves it by an exception, such as ``SystemExit``."""
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The state of the run was collected for a checkpoint: add to it, or change it."""
    def on_checkpoint_gathered(self, event: events.CheckpointGathered) -> None:
        """The content of a checkpoint is complete and about to be written. The place to move a part of it elsewhere, such as the shards of weights; ``checkpoint_read`` is the place to put it back."""
    def on_checkpoint_saved(self, event: events.CheckpointSaved) -> None:
        """A checkpoint is on disk under its final name."""
    def on_train_end(self) -> None:
        """Training is over."""
    def on_fit_end(self) -> None:
        """``fit`` is over, without an error."""
    def on_exception(self, exception: BaseException) -> None:
        """The run is ending by an error. Reaches every listener, even if one of them raises. An error that a listener raises from this one, ``raise RuntimeError(...) from event.exception``, takes its place."""
    def teardown(self, stage: str) -> None:
        """The run is over, by an error or not: release resources. Reaches every listener, even if one of them raises."""
    def on_validation_model_zero_grad(self) -> None: ...
    def on_validation_model_eval(self) -> None: ...
    def on_validation_model_train(self) -> None: ...
    def on_test_model_eval(self) -> None: ...
    def on_test_model_train(self) -> None: ...
    def on_predict_model_eval(self) -> None: ...
    def on_predict_model_train(self) -> None: ...
