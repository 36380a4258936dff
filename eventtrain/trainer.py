"""The trainer: it wires the parts together and leaves the work to them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from eventtrain.callback import attach, detach, is_on_demand, make_idle
from eventtrain.checkpoint import contents as checkpoints
from eventtrain.checkpoint import storage
from eventtrain.checkpoint.rng import seed_everything
from eventtrain.checks import check_whole_number
from eventtrain.core.closure import Closure
from eventtrain.core.evaluation import EvaluationLoop, EvaluationStage, step_arguments
from eventtrain.core.loop import Extent, TrainLoop
from eventtrain.core.optimizer import LightningOptimizer
from eventtrain.core.signals import EventSignal, Signals
from eventtrain.core.state import BatchState, Progress, RunStage, StopRequest
from eventtrain.data.device import resolve_device
from eventtrain.data.limits import Limit, check_limit, check_train_loader
from eventtrain.describe import describe, overview
from eventtrain.distributed import SingleProcess
from eventtrain.errors import EvaluationInterrupted, MisconfigurationError
from eventtrain.events import (
    AfterLRSchedulerStep,
    BeforeLRSchedulerStep,
    CheckpointRead,
    CheckpointSaved,
    ExceptionRaised,
    FindCheckpoint,
    FitEnd,
    FitStart,
    JoinProcesses,
    LoadCheckpoint,
    MetricsLogged,
    Setup,
    Stage,
    TakeCheckpoint,
    Teardown,
)
from eventtrain.metrics.metrics import Metrics
from eventtrain.module.datamodule import LightningDataModule
from eventtrain.module.module import LightningModule
from eventtrain.module.overriding import overridden_method as own
from eventtrain.optim.configure import configure_optimizers, warn_of_idle_schedulers
from eventtrain.optim.lr_scheduler import LRSchedulerConfig
from eventtrain.run.arguments import (
    check_datamodule,
    check_extent,
    check_interval,
    check_module,
    limit_name,
    val_interval,
)
from eventtrain.run.compiled import Model, Steps
from eventtrain.run.hook_connections import ConnectedHooks
from eventtrain.run.loaders import LOADER_HOOKS, DataSources
from eventtrain.run.view import RunView

T = TypeVar("T")


class Trainer(RunView):
    """Trains, validates, tests and predicts with a module, and publishes everything that happens.

    Each ``fit`` is a new run, with counters from zero, unless it resumes a checkpoint.

    Args:
        max_epochs: Epochs of training; -1 for no limit. This or ``max_steps`` has to be given.
        min_epochs: :meth:`stop` waits until so many epochs are complete.
        max_steps: Updates of the whole run; None or -1 for no limit.
        min_steps: :meth:`stop` waits until there were so many updates.
        callbacks: Objects with ``on_<event>(self, trainer, event)`` methods, attached in this order.
        default_callbacks: Whether ``LRSchedulerStepping`` and ``ProgressBar`` are attached after them, each
            unless one of its kind was given.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, or a ``torch.device``.
        limit_train_batches: Batches of each training epoch, as a number or a fraction; None for all.
        limit_val_batches: The same for validation, per loader; 0 for no validation.
        limit_test_batches: The same for the test.
        limit_predict_batches: The same for prediction.
        val_check_interval: Batches between validations, or a fraction of the epoch; None: at its end.
        check_val_every_n_epoch: Validate in every so many epochs; None: ``val_check_interval`` counts the
            batches of the run.
        num_sanity_val_steps: Validation batches to run before training, -1 for all; nothing of it is logged.
        fast_dev_run: So many batches of each stage and one epoch, without loggers' files, checkpoints and
            early stopping; True for one batch.
        seed: Given to :func:`~eventtrain.seed_everything` at the start of each run; None leaves the generators. Weights
            that a module draws in ``__init__`` come before: seed by hand for those, or draw in ``configure_model``.
        default_root_dir: Where callbacks write that are given no directory of their own.

    Raises:
        MisconfigurationError: An argument cannot be right, or a callback cannot be attached.
    """

    def __init__(
        self,
        *,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int | None = None,
        min_steps: int | None = None,
        callbacks: Iterable[Any] | Any = (),
        default_callbacks: bool = True,
        device: Any = "auto",
        limit_train_batches: Limit = None,
        limit_val_batches: Limit = None,
        limit_test_batches: Limit = None,
        limit_predict_batches: Limit = None,
        val_check_interval: Limit = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int = 2,
        fast_dev_run: bool | int = False,
        seed: int | None = None,
        default_root_dir: str | os.PathLike[str] = ".",
    ) -> None:
        check_extent(max_epochs, max_steps, min_epochs, min_steps, bool(fast_dev_run))
        self.fast_dev_run = int(
            fast_dev_run if isinstance(fast_dev_run, bool) else check_whole_number(fast_dev_run, "Trainer", "fast_dev_run")
        )
        self.limits: dict[Stage, Limit] = {
            "train": limit_train_batches,
            "validation": limit_val_batches,
            "test": limit_test_batches,
            "predict": limit_predict_batches,
        }
        for stage, limit in self.limits.items():
            check_limit(limit, limit_name(stage))
        self.val_check_interval = check_interval(val_check_interval, check_val_every_n_epoch)
        self.num_sanity_val_steps = check_whole_number(num_sanity_val_steps, "Trainer", "num_sanity_val_steps", least=-1)
        self.extent = Extent(
            max_epochs=None if max_epochs == -1 else max_epochs,
            max_steps=None if max_steps == -1 else max_steps,
            min_epochs=min_epochs or 0,
            min_steps=min_steps or 0,
            check_val_every_n_epoch=check_val_every_n_epoch,
        )
        if self.fast_dev_run:
            self._shorten(self.fast_dev_run)
        self.seed = seed
        self.default_root_dir = os.fspath(default_root_dir)
        self.device = resolve_device(device)
        self.processes = SingleProcess()
        self.signals = Signals(self)
        self.callbacks: list[Any] = []
        self.optimizers: list[LightningOptimizer] = []
        self.lr_scheduler_configs: list[LRSchedulerConfig] = []
        self.datamodule: LightningDataModule | None = None
        self.sanity_checking = False
        self.stage: RunStage | None = None
        self.num_evaluation_batches: int | None = None  # of the evaluation at hand, over all of its loaders
        self._module: LightningModule | None = None
        self._steps = Steps(None)
        self._loop: TrainLoop | None = None
        self._data: Any = None  # a run's DataSources
        self._begin_counting()
        given = list(callbacks) if isinstance(callbacks, Iterable) and not isinstance(callbacks, str) else [callbacks]
        for callback in given + (self._default_callbacks(given) if default_callbacks else []):
            attach(callback, self.signals, self.callbacks)

    # ------------------------------------------------------------------ the four stages

    def fit(
        self,
        model: Model,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> None:
        """Trains a module.

        Args:
            model: The module; or ``torch.compile(module)``, whose steps are then called compiled.
            train_dataloaders: The training loader; the module's or datamodule's where None.
            val_dataloaders: A validation loader, or a list of them; the module's or datamodule's where None.
            datamodule: Brings the loaders.
            ckpt_path: A checkpoint to resume from, exactly where it was written at a safe point: its path; ``"last"``, the
                newest whole one of those that an attached callback keeps, or a fresh start where there is none yet;
                ``"best"``, by the callback's monitored metric.

        Raises:
            MisconfigurationError: Something was put together in a way that cannot work. Checked before
                training wherever it can be known.
        """
        given: dict[Stage, Any] = {"train": train_dataloaders, "validation": val_dataloaders}
        self._begin_counting()
        self._run("fit", model, datamodule, given, partial(self._fit, ckpt_path))

    def validate(
        self,
        model: Model | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        datamodule: LightningDataModule | None = None,
    ) -> list[dict[str, float]]:
        """Validates a module.

        Args:
            model: The module, compiled or not; the one of the last run where None.
            dataloaders: A loader or a list of them; the module's or datamodule's where None.
            ckpt_path: A checkpoint whose weights are loaded first.
            datamodule: Brings the loaders.

        Returns:
            The epoch's metrics, one dict per loader.
        """
        return self._evaluate("validate", "validation", model, dataloaders, ckpt_path, datamodule)[0]

    def test(
        self,
        model: Model | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        datamodule: LightningDataModule | None = None,
    ) -> list[dict[str, float]]:
        """Tests a module; arguments and result as for :meth:`validate`."""
        return self._evaluate("test", "test", model, dataloaders, ckpt_path, datamodule)[0]

    def predict(
        self,
        model: Model | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        datamodule: LightningDataModule | None = None,
    ) -> list[Any]:
        """Predicts with a module; arguments as for :meth:`validate`.

        Returns:
            What ``predict_step`` returned for each batch; with several loaders, a list of such lists.
        """
        outputs = self._evaluate("predict", "predict", model, dataloaders, ckpt_path, datamodule)[1]
        return outputs[0] if len(outputs) == 1 else outputs

    # ------------------------------------------------------------------ verbs

    def stop(self, reason: str, *, force: bool = False, at_once: bool = False, by_all: bool = False) -> None:
        """Ends the run after the batch at hand. Of several processes one may ask: all end, at the latest after the next batch.

        Args:
            reason: Why, in a few words.
            force: Also before ``min_epochs`` and ``min_steps``, which hold off other requests.
            at_once: Also out of an evaluation, which is left at its next batch as if it had not begun; a run that is
                resumed from the safe point after it evaluates anew. Implies ``force``. May be called by a signal handler.
            by_all: All processes ask at this place, having agreed on it: they end here.
        """
        request = self.stop_request
        if request.reason is None or force or at_once:
            request.reason = reason
        request.force |= force or at_once
        request.at_once |= at_once
        request.is_agreed |= by_all

    def end_epoch(self, reason: str) -> None:
        """Ends the training epoch after the batch at hand. Validation still runs; nothing that counts
        epochs steps for it.

        Args:
            reason: Why, in a few words.
        """
        self.stop_request.epoch_reason = reason

    def log_on_step(self, values: Mapping[str, Any]) -> None:
        """Adds values to those that the update at hand hands to loggers, which write them at their cadence. For
        callbacks; a module has ``self.log``.

        Args:
            values: By name numbers, scalar tensors, or what else ``float()`` takes; it is called where they are written.
        """
        self.metrics.fresh.update(values)

    def log_now(self, values: Mapping[str, Any]) -> None:
        """Hands values to loggers at once, whatever their cadence. For callbacks that have one of their own.

        Args:
            values: Numbers or scalar tensors by name.
        """
        self.metrics.logged_metrics.update(values)
        event = MetricsLogged(self.metrics.stage, "monitor", self.global_step, dict(values))
        self.signals.metrics_logged.publish(event)

    def step_lr_scheduler(self, config: LRSchedulerConfig, metric: Any = None) -> None:
        """Steps a scheduler through the module's ``lr_scheduler_step``, with the events around it.

        Args:
            config: One of :attr:`lr_scheduler_configs`.
            metric: What the scheduler monitors; None where it monitors nothing.
        """
        signals = self.signals.table
        if signals.before_lr_scheduler_step.listeners:
            event = BeforeLRSchedulerStep(config, config.learning_rates(), metric)
            signals.before_lr_scheduler_step.publish(event)
            metric = event.metric
        assert self._module is not None
        self._module.lr_scheduler_step(config.scheduler, metric)
        if signals.after_lr_scheduler_step.listeners:
            signals.after_lr_scheduler_step.publish(AfterLRSchedulerStep(config, config.learning_rates()))

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Writes the run's state to a file.

        Args:
            path: The file. One that is there already is replaced once the new one is whole on disk.

        Raises:
            MisconfigurationError: Something in the state could not be read back.
        """
        content = checkpoints.gather(self)
        if self.is_global_zero:
            storage.write(content, path)
            self.signals.checkpoint_saved.publish(CheckpointSaved(os.fspath(path)))

    def keep_checkpoint(self, reason: str) -> str | None:
        """Has a checkpoint written because the run is about to end early: by those that keep checkpoints, or where nobody
        does as ``checkpoints/interrupted.ckpt`` under ``default_root_dir``. ``fit(ckpt_path="last")`` finds it. Exact when
        called at a safe point.

        Args:
            reason: Why, in a few words.

        Returns:
            The file; None in a ``fast_dev_run``, which keeps nothing.
        """
        if self.fast_dev_run:
            return None
        event = TakeCheckpoint(self.progress.epoch_is_over, self.batch.window_open, reason)
        try:
            self.signals.take_checkpoint.publish(event)
            if event.path is None:
                event.path = os.fspath(self._kept_by_nobody)
                self.save_checkpoint(event.path)
        finally:
            # The first process that ends has its launcher end the others: not before all have written.
            self.processes.barrier()
        return event.path

    def interrupt(self, reason: str) -> None:
        """Interrupt the fit at its next safe point: write a checkpoint there and return from ``fit``, so that
        ``fit(ckpt_path="last")`` resumes the run. A validation is left at its next batch, and repeated by the resumed run.
        Does not wait for ``min_epochs`` and ``min_steps``. If one of several processes asks, all are interrupted; a listener
        of ``request_stop`` has to be attached in all of them.

        A signal handler may call it.

        Args:
            reason: Why, in a few words.
        """
        self.stop_request.interruption = reason
        self.stop_request.at_once = True

    def listen(self, handler: Callable[..., Any]) -> None:
        """Have a handler that is marked ``@on_demand`` called from the next event on, until the run ends or
        :meth:`stop_listening`.

        Args:
            handler: A method of an attached callback, such as ``self.on_train_batch_end``.

        Raises:
            MisconfigurationError: If the handler is not marked, or its callback is not attached.
        """
        self._signal_of(handler).wake(handler)

    def stop_listening(self, handler: Callable[..., Any]) -> None:
        """Undo :meth:`listen`.

        Args:
            handler: The method that was given to :meth:`listen`.

        Raises:
            MisconfigurationError: If the handler is not marked, or its callback is not attached.
        """
        self._signal_of(handler).idle(handler)

    def times_logged(self, name: str) -> int:
        """Return how often a metric in :attr:`callback_metrics` got a new value in this run. A listener that acts on new
        values compares it with the count that it saw last.

        Args:
            name: The metric's name.
        """
        return self.metrics.update_counts.get(name, 0)

    def _signal_of(self, handler: Callable[..., Any]) -> EventSignal:
        name = getattr(handler, "__name__", repr(handler))
        signal = getattr(self.signals.table, name.removeprefix("on_"), None)
        if signal is None or not is_on_demand(handler) or handler not in signal.attached():
            raise MisconfigurationError(
                f"trainer.listen({name}): give a method on_<event> of an attached callback that is marked with @on_demand."
            )
        return signal  # type: ignore[no-any-return]

    def describe(self, *, all_events: bool = True) -> str:
        """The loop as a tree, with what is attached at each event in the order in which it is called.

        Args:
            all_events: Whether events that nobody listens to, and the core's own work, are shown too.
        """
        return f"{overview(self)}\n\n{describe(self.signals, all_events=all_events)}"

    def callback(self, kind: type[T]) -> T:
        """The attached callback of a class.

        Args:
            kind: The class.

        Raises:
            MisconfigurationError: None is attached.
        """
        for callback in self.callbacks:
            if isinstance(callback, kind):
                return callback
        attached = [type(callback).__name__ for callback in self.callbacks]
        raise MisconfigurationError(f"No {kind.__name__} is attached; there are {attached}. Give it in callbacks=[...].")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints on rank zero, above a progress bar where there is one."""
        if not self.is_global_zero:
            return
        above_bar = next((callback.print for callback in self.callbacks if hasattr(callback, "print")), print)
        above_bar(*args, **kwargs)

    # ------------------------------------------------------------------ wiring

    def _run(self, stage: RunStage, model: Any, datamodule: Any, given: dict[Stage, Any], body: Callable[[], T]) -> T:
        """A run from attaching to teardown; ``exception`` and ``teardown`` reach everyone, the first error is
        the one that is raised."""
        if self.stage is not None:
            raise MisconfigurationError(f"The trainer is running {self.stage}. Use another trainer for a run inside of it.")
        steps = self._steps if model is None else Steps(model)
        module = check_module(steps.module)
        if self.seed is not None:
            seed_everything(self.seed)
        connections: list[ConnectedHooks] = []
        brought: list[Any] = []
        self.stage, self._module, self.datamodule = stage, module, check_datamodule(datamodule)
        self._steps = steps
        first: BaseException | None = None
        try:
            self._attach(module, connections, brought)
            self._join(stage)
            self._data = DataSources(
                given, module, self.datamodule, self.limits, self.signals.table, self.device, self.processes
            )
            self._build(module, stage)
            with steps.calling_the_trainer():
                return body()
        except BaseException as error:
            first = error
            self._even_so(first, partial(self.signals.exception.publish_to_all, ExceptionRaised(error)))
            raise
        finally:
            self._even_so(first, partial(self._tear_down, module, stage, connections, brought))

    def _attach(self, module: LightningModule, connections: list[ConnectedHooks], brought: list[Any]) -> None:
        module.trainer = self
        if self.datamodule is not None:
            self.datamodule.trainer = self
        extra = module.configure_callbacks()
        for callback in extra if isinstance(extra, Iterable) else [extra]:
            attach(callback, self.signals, self.callbacks)
            brought.append(callback)
        # Module hooks come after all callbacks', because they are connected last.
        for part in (self.datamodule, module):
            if part is not None:
                connections.append(ConnectedHooks(part, self.signals))

    def _join(self, stage: RunStage) -> None:
        """Joins the other processes of the run, where there are any."""
        event = JoinProcesses(stage, self.device, self.processes)
        self.signals.join_processes.publish(event)
        self.device = event.device
        self.processes = self.metrics.processes = event.processes
        self.metrics.device = self.device

    def _build(self, module: LightningModule, stage: RunStage) -> None:
        """Builds the module, moves it to its device, and lets callbacks wrap it."""
        sources: list[Any] = [part for part in (self.datamodule, module) if part is not None]
        for source in sources:
            source.prepare_data()
        for source in sources:
            source.setup(stage)
        module.configure_model()
        module.to(self.device)
        self.signals.setup.publish(Setup(stage))

    def _tear_down(
        self, module: LightningModule, stage: RunStage, connections: list[ConnectedHooks], brought: list[Any]
    ) -> None:
        try:
            module.untoggle_all()
            self.signals.teardown.publish_to_all(Teardown(stage))
        finally:
            for connection in connections:
                connection.disconnect()
            for callback in brought:
                detach(callback, self.signals, self.callbacks)
            for callback in self.callbacks:
                make_idle(callback, self.signals)
            for optimizer in self.optimizers:
                optimizer.leave_run()
            if self._loop is not None and self._loop.batches is not None:
                self._loop.batches.close()
            if self._data is not None:
                self._data.release()
            self.metrics.enter("train", None)
            self.sanity_checking = False
            self.stage = None

    def _even_so(self, first: BaseException | None, action: Callable[[], None]) -> None:
        """Does something that has to be done after an error; an error of its own becomes a note of the first."""
        try:
            action()
        except BaseException as later:
            if first is None:
                raise
            first.add_note(f"and afterwards: {type(later).__name__}: {later}")

    def _fit(self, ckpt_path: Any) -> None:
        module, signals = self.module, self.signals
        if own(module, "training_step") is None:
            module.training_step()  # says what to define
        # First, so that a module may take its shape from a checkpoint, and a datamodule its split.
        checkpoint = None if ckpt_path is None else self._read_checkpoint(ckpt_path)
        if checkpoint is not None:
            checkpoint = checkpoints.announce(self, checkpoint)
        loader = self._data.loader("train")
        check_train_loader(loader)
        self._measure(loader)
        self._configure_optimizers(module)
        validation = self._validation(module)
        self._loop = loop = self._train_loop(module, loader, validation)
        if checkpoint is not None:
            checkpoints.restore(self, checkpoint)
        with torch.enable_grad():
            signals.fit_start.publish(FitStart())
            # A resumed run had its check when it began.
            if validation is not None and self.num_sanity_val_steps and checkpoint is None:
                self._sanity_check(module)
            if self.extent.batches_per_epoch != 0:
                loop.run()
        signals.fit_end.publish(FitEnd())

    def _measure(self, loader: Any) -> None:
        """Fits the run's extent to the training loader's length."""
        extent = self.extent
        extent.batches_per_epoch = self._data.length("train", loader)
        extent.val_check_interval = val_interval(
            self.val_check_interval, extent.batches_per_epoch, across_epochs=extent.check_val_every_n_epoch is None
        )

    def _configure_optimizers(self, module: LightningModule) -> None:
        configuration = configure_optimizers(module)
        automatic = module.automatic_optimization
        if automatic and configuration.schedulers:
            warn_of_idle_schedulers(module, self.callbacks)
        self.lr_scheduler_configs = configuration.schedulers
        self.optimizers = configuration.optimizers
        alone = self.processes.world_size == 1
        self.batch = BatchState(automatic=automatic, processes=None if alone else self.processes)
        clip_hook = own(module, "configure_gradient_clipping") if automatic else None
        for optimizer in self.optimizers:
            optimizer.join_run(self.signals.table, self.batch, module, clip_hook)
            if not automatic:
                self._steps.stepping(optimizer)

    def _train_loop(self, module: LightningModule, loader: Any, validation: Callable[[], Any] | None) -> TrainLoop:
        automatic = module.automatic_optimization
        optimizer = self.optimizers[0] if automatic and self.optimizers else None
        training_step = self._steps["training_step"]
        takes_index = step_arguments(training_step, 1, most=2) > 1
        closure = None
        if optimizer is not None:
            assert optimizer.run is not None
            closure = Closure(
                self.signals.table,
                self.batch,
                optimizer.run,
                training_step,
                takes_index=takes_index,
                backward_hook=own(module, "backward"),
                zero_grad_hook=self._zero_grad_hook(module),
            )
        return TrainLoop(
            signals=self.signals.table,
            progress=self.progress,
            batch=self.batch,
            stop=self.stop_request,
            metrics=self.metrics,
            extent=self.extent,
            open_epoch=partial(self._data.open, "train", loader, self.extent.batches_per_epoch),
            data_state=self._data.state_dict,
            training_step=training_step,
            takes_index=takes_index,
            closure=closure,
            optimizer=optimizer,
            optimizer_step=own(module, "optimizer_step"),
            validate=validation,
            keep_checkpoint=self.keep_checkpoint,
        )

    def _zero_grad_hook(self, module: LightningModule) -> Callable[..., Any] | None:
        hook = own(module, "optimizer_zero_grad")
        if hook is None:
            return None
        return lambda batch_idx, optimizer: hook(self.current_epoch, batch_idx, optimizer)

    def _validation(self, module: LightningModule) -> Callable[[], Any] | None:
        """What runs a validation inside of fit; None where there is nothing to validate."""
        if self.limits["validation"] == 0 or not self._data.passes("validation"):
            return None
        if own(module, "validation_step") is None:
            warnings.warn(
                f"{type(module).__name__} has validation loaders and no validation_step: nothing is validated.", stacklevel=2
            )
            return None
        zero_grad = own(module, "on_validation_model_zero_grad")

        def validate() -> None:
            # Lightning zeroes all gradients here; only a module that asks for it does, and never in an open window.
            if zero_grad is not None and not self.batch.window_open:
                zero_grad()
            self._evaluation_loop(module, "validation", within_fit=True).run()

        return validate

    def _sanity_check(self, module: LightningModule) -> None:
        self.sanity_checking = True
        try:
            most = None if self.num_sanity_val_steps == -1 else self.num_sanity_val_steps
            self._evaluation_loop(module, "validation", within_fit=True, most=most).run(silent=True)
        except EvaluationInterrupted:
            pass  # nothing was trained yet: the loop sees the request to stop
        finally:
            self.sanity_checking = False

    def _evaluate(
        self, run: RunStage, stage: EvaluationStage, model: Any, dataloaders: Any, ckpt_path: Any, datamodule: Any
    ) -> tuple[list[dict[str, float]], list[list[Any]]]:
        def body() -> tuple[list[dict[str, float]], list[list[Any]]]:
            module = self.module
            # predict_step alone has a default that does something.
            if stage != "predict" and own(module, f"{stage}_step") is None:
                raise MisconfigurationError(f"{type(module).__name__} has no {stage}_step. Define it to {run} the module.")
            passes = self._data.passes(stage)
            if not passes:
                raise MisconfigurationError(
                    f"There is nothing to {run} on. Give {run}(model, dataloaders=...), a datamodule, or define "
                    f"{LOADER_HOOKS[stage]} in the module."
                )
            if ckpt_path is not None and (checkpoint := self._read_checkpoint(ckpt_path)) is not None:
                self.signals.checkpoint_read.publish(CheckpointRead(checkpoint))
                self.signals.load_checkpoint.publish(LoadCheckpoint(checkpoint))
                module.load_state_dict(checkpoint["state_dict"])
            outputs = self._evaluation_loop(module, stage, within_fit=False).run()
            return self.metrics.results(stage, len(passes)), outputs

        return self._run(run, model, datamodule, {stage: dataloaders}, body)

    def _evaluation_loop(
        self, module: LightningModule, stage: EvaluationStage, *, within_fit: bool, most: int | None = None
    ) -> EvaluationLoop:
        lengths = self._data.lengths(stage, most=most)
        self.num_evaluation_batches = None if None in lengths else sum(length or 0 for length in lengths)
        return EvaluationLoop(
            stage,
            signals=self.signals.table,
            module=module,
            step=self._steps[f"{stage}_step"],
            metrics=self.metrics,
            progress=self.progress,
            open_loaders=self._data.passes(stage, most=most, number=self.progress.total_batch_idx + 1),
            within_fit=within_fit,
            is_interrupted=self._is_interrupted,
            processes=self.processes if self.world_size > 1 else None,
        )

    def _is_interrupted(self) -> bool:
        """Whether an evaluation is to be left: on all ranks, where one is asked to."""
        return self.processes.any(self.stop_request.at_once)

    @property
    def _kept_by_nobody(self) -> Path:
        """Where an interrupted run is kept that no callback keeps checkpoints of."""
        return Path(self.default_root_dir) / "checkpoints" / "interrupted.ckpt"

    def _read_checkpoint(self, given: Any) -> dict[str, Any] | None:
        """The checkpoint that ``ckpt_path`` means; None for a fresh start, where there is none yet."""
        found: tuple[Any, Any] = (None, None)
        failure: BaseException | None = None
        if self.is_global_zero:
            try:
                found = self._find_checkpoint(given)
            except BaseException as error:
                failure = error
        # One process finds it and says where, so that all go on from the same.
        path, reason = self.processes.broadcast((found[0], None if failure is None else storage.first_line(failure)))
        if failure is not None:
            raise failure
        if reason is not None:
            raise MisconfigurationError(f"Rank zero found no checkpoint. {reason}")
        return found[1] if path is None or self.is_global_zero else storage.read(path)

    def _find_checkpoint(self, given: Any) -> tuple[Any, dict[str, Any] | None]:
        """A checkpoint's path and content; None twice for a fresh start."""
        if given not in ("last", "best"):
            return given, storage.read(given)
        event = FindCheckpoint(given)
        self.signals.find_checkpoint.publish(event)
        if not event.paths and given == "last" and self._kept_by_nobody.exists():
            event.offer(self._kept_by_nobody)
        if event.paths is None:
            raise MisconfigurationError(
                f"ckpt_path={given!r}: nothing attached keeps checkpoints. Attach a ModelCheckpoint, or give the path of a "
                "file that trainer.save_checkpoint wrote."
            )
        if not event.paths and (given == "best" or self.stage != "fit"):
            raise MisconfigurationError(f"ckpt_path={given!r}: there is no checkpoint yet. Give the path of one, or None.")
        if given == "last":
            event.paths.sort(key=storage.written_at, reverse=True)  # of several listeners
        return storage.read_first(event.paths)

    def _shorten(self, batches: int) -> None:
        """Makes this a ``fast_dev_run``."""
        self.limits = dict.fromkeys(self.limits, batches)
        self.val_check_interval = None
        self.num_sanity_val_steps = 0
        self.extent = Extent(max_epochs=1)

    def _begin_counting(self) -> None:
        self.progress = Progress()
        self.stop_request = StopRequest()
        self.batch = BatchState()
        self.metrics = Metrics(self.processes)

    def _default_callbacks(self, given: list[Any]) -> list[Any]:
        # The one place where the core knows callbacks, and late: they import the core.
        from eventtrain.callbacks import LRSchedulerStepping, ProgressBar

        return [kind() for kind in (LRSchedulerStepping, ProgressBar) if not any(isinstance(each, kind) for each in given)]
