"""The trainer: it wires the parts together and leaves the work to them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch

from eventtrain import checkpoint as checkpoints
from eventtrain import configure, storage
from eventtrain.callback import attach, detach
from eventtrain.closure import Closure
from eventtrain.configure import LRSchedulerConfig
from eventtrain.data import (
    Batches,
    Limit,
    as_loaders,
    check_limit,
    check_train_loader,
    known_length,
    limited_length,
    resolve_device,
)
from eventtrain.describe import describe
from eventtrain.distributed import SingleProcess
from eventtrain.errors import MisconfigurationError
from eventtrain.evaluation import EvaluationLoop, EvaluationStage, step_arguments
from eventtrain.events import (
    AfterLRSchedulerStep,
    BeforeLRSchedulerStep,
    CheckpointSaved,
    EstimateSteppingBatches,
    ExceptionRaised,
    FitEnd,
    FitStart,
    Setup,
    Stage,
    Teardown,
)
from eventtrain.loop import Extent, TrainLoop
from eventtrain.metrics import Metrics
from eventtrain.module import DataHooks, LightningDataModule, LightningModule, overridden
from eventtrain.module_hooks import ConnectedHooks
from eventtrain.optimizer import LightningOptimizer
from eventtrain.rng import seed_everything
from eventtrain.signals import Signals
from eventtrain.state import BatchState, Progress, RunStage, StopRequest

T = TypeVar("T")
LOADER_HOOKS: dict[Stage, str] = {
    "train": "train_dataloader",
    "validation": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}


class Trainer:
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
        seed: Given to :func:`~eventtrain.seed_everything` at the start of each run; None leaves the generators.
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
        self.fast_dev_run = check_count(int(fast_dev_run), "fast_dev_run", least=0)
        self.limits: dict[Stage, Limit] = {
            "train": limit_train_batches,
            "validation": limit_val_batches,
            "test": limit_test_batches,
            "predict": limit_predict_batches,
        }
        for stage, limit in self.limits.items():
            check_limit(limit, limit_name(stage))
        self.val_check_interval = check_interval(val_check_interval, check_val_every_n_epoch)
        self.num_sanity_val_steps = check_count(num_sanity_val_steps, "num_sanity_val_steps", least=-1)
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
        self.distributed = SingleProcess()
        self.signals = Signals(self)
        self.callbacks: list[Any] = []
        self.optimizers: list[LightningOptimizer] = []
        self.lr_scheduler_configs: list[LRSchedulerConfig] = []
        self.datamodule: LightningDataModule | None = None
        self.sanity_checking = False
        self.stage: RunStage | None = None
        self._module: LightningModule | None = None
        self._loop: TrainLoop | None = None
        self._begin_counting()
        given = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
        for callback in given + (self._default_callbacks(given) if default_callbacks else []):
            attach(callback, self.signals, self.callbacks)

    # ------------------------------------------------------------------ the four stages

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> None:
        """Trains a module.

        Args:
            model: The module.
            train_dataloaders: The training loader; the module's or datamodule's where None.
            val_dataloaders: A validation loader, or a list of them; the module's or datamodule's where None.
            datamodule: Brings the loaders.
            ckpt_path: A checkpoint to resume from, at the start of the epoch that it was written in.

        Raises:
            MisconfigurationError: Something was put together in a way that cannot work. Checked before
                training wherever it can be known.
        """
        given: dict[Stage, Any] = {"train": train_dataloaders, "validation": val_dataloaders}
        self._begin_counting()
        self._run("fit", model, datamodule, given, partial(self._fit, ckpt_path))

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        datamodule: LightningDataModule | None = None,
    ) -> list[dict[str, float]]:
        """Validates a module.

        Args:
            model: The module; the one of the last run where None.
            dataloaders: A loader or a list of them; the module's or datamodule's where None.
            ckpt_path: A checkpoint whose weights are loaded first.
            datamodule: Brings the loaders.

        Returns:
            The epoch's metrics, one dict per loader.
        """
        return self._evaluate("validate", "validation", model, dataloaders, ckpt_path, datamodule)[0]

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        datamodule: LightningDataModule | None = None,
    ) -> list[dict[str, float]]:
        """Tests a module; arguments and result as for :meth:`validate`."""
        return self._evaluate("test", "test", model, dataloaders, ckpt_path, datamodule)[0]

    def predict(
        self,
        model: LightningModule | None = None,
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

    def stop(self, reason: str, *, force: bool = False) -> None:
        """Ends the run after the batch at hand.

        Args:
            reason: Why, in a few words.
            force: Also before ``min_epochs`` and ``min_steps``, which hold off other requests.
        """
        if self.stop_request.reason is None or force:
            self.stop_request.reason = reason
        self.stop_request.force |= force

    def end_epoch(self, reason: str) -> None:
        """Ends the training epoch after the batch at hand. Validation still runs; nothing that counts
        epochs steps for it.

        Args:
            reason: Why, in a few words.
        """
        self.stop_request.epoch_reason = reason

    def step_lr_scheduler(self, config: LRSchedulerConfig, metric: Any = None) -> None:
        """Steps a scheduler through the module's ``lr_scheduler_step``, with the events around it.

        Args:
            config: One of :attr:`lr_scheduler_configs`.
            metric: What the scheduler monitors; None where it monitors nothing.
        """
        signals = self.signals
        if signals.before_lr_scheduler_step.listeners:
            event = BeforeLRSchedulerStep(config, config.learning_rates(), metric)
            signals.before_lr_scheduler_step.publish(event)
            metric = event.metric
        self.module.lr_scheduler_step(config.scheduler, metric)
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

    def describe(self) -> str:
        """The loop map with what is attached at each event, in order."""
        return describe(self.signals)

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

    # ------------------------------------------------------------------ what the run is

    @property
    def module(self) -> LightningModule:
        """The module of the run at hand, or of the last.

        Raises:
            MisconfigurationError: There was none yet.
        """
        if self._module is None:
            raise MisconfigurationError("The trainer has no module yet: call fit, validate, test or predict with one.")
        return self._module

    @property
    def current_epoch(self) -> int:
        """Epochs of training completed, which is the index of the one at hand."""
        return self.progress.current_epoch

    @property
    def global_step(self) -> int:
        """Batches of the run in which at least one optimizer updated."""
        return self.progress.global_step

    @property
    def batch_idx(self) -> int:
        """The index in its epoch of the training batch at hand."""
        return self.progress.batch_idx

    @property
    def total_batch_idx(self) -> int:
        """The index in the run of the training batch at hand."""
        return self.progress.total_batch_idx

    @property
    def max_epochs(self) -> int | None:
        """Epochs of training; None for no limit."""
        return self.extent.max_epochs

    @property
    def max_steps(self) -> int | None:
        """Updates of the run; None for no limit."""
        return self.extent.max_steps

    @property
    def num_training_batches(self) -> int | None:
        """Training batches per epoch on this rank, limits counted; None where the loader has no length."""
        return self.extent.batches_per_epoch

    @property
    def is_last_batch(self) -> bool:
        """Whether the training batch at hand is its epoch's last."""
        return self._loop is not None and self._loop.is_last_batch

    @property
    def validates(self) -> bool:
        """Whether the run at hand has something to validate on."""
        return self._loop is not None and self._loop.validate is not None

    @property
    def estimated_stepping_batches(self) -> int:
        """How many batches of the whole run will update something, if none is skipped and nothing stops it.

        Raises:
            MisconfigurationError: The training loader has no length and ``max_steps`` is not given.
        """
        extent = self.extent
        event = EstimateSteppingBatches(extent.batches_per_epoch, extent.max_epochs, extent.max_steps)
        if extent.max_epochs is None or extent.batches_per_epoch is None:
            if extent.max_steps is not None:
                return extent.max_steps
            raise MisconfigurationError(
                "estimated_stepping_batches cannot be known: the run has neither max_steps nor both max_epochs and a training "
                "loader with a length. Give Trainer(max_steps=...), or limit_train_batches as a whole number."
            )
        self.signals.estimate_stepping_batches.publish(event)
        batches = event.stepping_batches
        if batches is None:
            batches = extent.max_epochs * extent.batches_per_epoch
        return batches if extent.max_steps is None else min(batches, extent.max_steps)

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """The latest value of every logged name, as scalar tensors."""
        return self.metrics.callback_metrics

    @property
    def logged_metrics(self) -> dict[str, Any]:
        """The latest values that went to loggers."""
        return {**self.metrics.logged_metrics, **self.metrics.fresh}

    @property
    def progress_bar_metrics(self) -> dict[str, Any]:
        """The latest values that were logged with ``prog_bar=True``."""
        return self.metrics.progress_bar_metrics

    @property
    def loggers(self) -> list[Any]:
        """The attached callbacks that have an ``experiment``."""
        return [callback for callback in self.callbacks if hasattr(type(callback), "experiment")]

    @property
    def logger(self) -> Any:
        """The first of :attr:`loggers`; None where there is none."""
        return next(iter(self.loggers), None)

    @property
    def should_stop(self) -> bool:
        """Whether :meth:`stop` was called in this run."""
        return self.stop_request.reason is not None

    @property
    def world_size(self) -> int:
        """The number of processes that train together."""
        return self.distributed.world_size

    @property
    def global_rank(self) -> int:
        """This process's index among them."""
        return self.distributed.global_rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.distributed.global_rank == 0

    # ------------------------------------------------------------------ wiring

    def _run(self, stage: RunStage, model: Any, datamodule: Any, given: dict[Stage, Any], body: Callable[[], T]) -> T:
        """A run from attaching to teardown; ``exception`` and ``teardown`` reach everyone, the first error is
        the one that is raised."""
        if self.stage is not None:
            raise MisconfigurationError(f"The trainer is running {self.stage}. Use another trainer for a run inside of it.")
        module = check_module(model if model is not None else self._module)
        connections: list[ConnectedHooks] = []
        brought: list[Any] = []
        self.stage, self._module, self.datamodule = stage, module, check_datamodule(datamodule)
        self._given = given
        first: BaseException | None = None
        try:
            self._attach(module, connections, brought)
            self._build(module, stage)
            return body()
        except BaseException as error:
            first = error
            self._even_so(first, partial(self.signals.exception.publish_to_all, ExceptionRaised(error)))
            raise
        finally:
            self._even_so(first, partial(self._tear_down, module, stage, connections, brought))

    def _attach(self, module: LightningModule, connections: list[ConnectedHooks], brought: list[Any]) -> None:
        if self.seed is not None:
            seed_everything(self.seed)
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
            for optimizer in self.optimizers:
                optimizer.leave_run()
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
        if not overridden(module, "training_step", LightningModule):
            module.training_step()  # says what to define
        loader = self._loaders("train")
        check_train_loader(loader)
        self._measure(loader)
        self._configure_optimizers(module)
        validation = self._validation(module)
        self._loop = loop = self._train_loop(module, loader, validation)
        if ckpt_path is not None:
            checkpoints.restore(self, storage.read(self._checkpoint_path(ckpt_path)), training=True)
        with torch.enable_grad():
            signals.fit_start.publish(FitStart())
            if validation is not None and self.num_sanity_val_steps and not self.fast_dev_run:
                self._sanity_check(module)
            if self.extent.batches_per_epoch != 0:
                loop.run()
        signals.fit_end.publish(FitEnd())

    def _measure(self, loader: Any) -> None:
        """Fits limits and intervals to the training loader's length."""
        extent = self.extent
        extent.batches_per_epoch = limited_length(known_length(loader), self.limits["train"], limit_name("train"))
        extent.val_check_interval = val_interval(
            self.val_check_interval, extent.batches_per_epoch, across_epochs=extent.check_val_every_n_epoch is None
        )

    def _configure_optimizers(self, module: LightningModule) -> None:
        automatic = module.automatic_optimization
        name = type(module).__name__
        if automatic and not overridden(module, "configure_optimizers", LightningModule):
            raise MisconfigurationError(f"{name} has no configure_optimizers. Define it, and return an optimizer.")
        configuration = configure.parse_configuration(module.configure_optimizers())
        if automatic and len(configuration.optimizers) > 1:
            raise MisconfigurationError(
                f"{name}.configure_optimizers returned {len(configuration.optimizers)} optimizers; automatic optimization "
                "steps one. Use manual optimization: set self.automatic_optimization = False in __init__ and step them in "
                "training_step."
            )
        if automatic and not configuration.optimizers:
            warnings.warn(
                f"{name}.configure_optimizers returned no optimizer: the run computes losses and updates nothing.", stacklevel=2
            )
        for config in configuration.schedulers if automatic else ():
            self._check_scheduler(module, config)
        self.lr_scheduler_configs = configuration.schedulers
        self.optimizers = [LightningOptimizer(optimizer) for optimizer in configuration.optimizers]
        self.batch = BatchState(automatic=automatic)
        clips = automatic and overridden(module, "configure_gradient_clipping", LightningModule)
        for optimizer in self.optimizers:
            optimizer.join_run(self.signals, self.batch, module, module.configure_gradient_clipping if clips else None)
        if (
            automatic
            and configuration.schedulers
            and not any(getattr(callback, "role", None) == "lr_scheduler_stepping" for callback in self.callbacks)
        ):
            warnings.warn(
                f"{name}.configure_optimizers returned schedulers and nothing attached steps them. Attach "
                "LRSchedulerStepping(), or leave default_callbacks on.",
                stacklevel=2,
            )

    def _check_scheduler(self, module: LightningModule, config: LRSchedulerConfig) -> None:
        if not configure.has_torch_api(config) and not overridden(module, "lr_scheduler_step", LightningModule):
            kind = type(config.scheduler).__name__
            raise MisconfigurationError(
                f"{kind}.step does not have torch's form, step() or step(metric). Override "
                f"`lr_scheduler_step(self, scheduler, metric)` in {type(module).__name__} and call it there as it wants to be."
            )

    def _train_loop(self, module: LightningModule, loader: Any, validation: Callable[[], Any] | None) -> TrainLoop:
        automatic = module.automatic_optimization
        optimizer = self.optimizers[0] if automatic and self.optimizers else None
        takes_index = step_arguments(module.training_step, 1) > 1
        closure = None
        if optimizer is not None:
            closure = Closure(
                self.signals,
                self.batch,
                optimizer,
                module.training_step,
                takes_index=takes_index,
                backward_hook=own(module, "backward"),
                zero_grad_hook=self._zero_grad_hook(module),
            )
        return TrainLoop(
            signals=self.signals,
            progress=self.progress,
            batch=self.batch,
            stop=self.stop_request,
            metrics=self.metrics,
            extent=self.extent,
            open_epoch=partial(self._open, "train", loader, self.extent.batches_per_epoch, 0),
            training_step=module.training_step,
            takes_index=takes_index,
            closure=closure,
            optimizer=optimizer,
            optimizer_step=own(module, "optimizer_step"),
            validate=validation,
        )

    def _zero_grad_hook(self, module: LightningModule) -> Callable[..., Any] | None:
        hook = own(module, "optimizer_zero_grad")
        if hook is None:
            return None
        return lambda batch_idx, optimizer: hook(self.current_epoch, batch_idx, optimizer)

    def _validation(self, module: LightningModule) -> Callable[[], Any] | None:
        """What runs a validation inside of fit; None where there is nothing to validate."""
        loaders = as_loaders(self._loaders("validation"))
        if not loaders or self.limits["validation"] == 0:
            return None
        if not overridden(module, "validation_step", LightningModule):
            warnings.warn(
                f"{type(module).__name__} has validation loaders and no validation_step: nothing is validated.", stacklevel=2
            )
            return None
        for loader in loaders:  # a bad limit is an error before training
            limited_length(known_length(loader), self.limits["validation"], limit_name("validation"))
        zero_grad = own(module, "on_validation_model_zero_grad")

        def validate() -> None:
            loop = self._loop
            if zero_grad is not None and loop is not None and not loop.window_open():
                zero_grad()
            self._evaluation_loop(module, "validation", loaders, within_fit=True).run()

        return validate

    def _sanity_check(self, module: LightningModule) -> None:
        self.sanity_checking = True
        try:
            loaders = as_loaders(self._loaders("validation"))
            most = None if self.num_sanity_val_steps == -1 else self.num_sanity_val_steps
            self._evaluation_loop(module, "validation", loaders, within_fit=True, most=most).run(silent=True)
        finally:
            self.sanity_checking = False

    def _evaluate(
        self, run: RunStage, stage: EvaluationStage, model: Any, dataloaders: Any, ckpt_path: Any, datamodule: Any
    ) -> tuple[list[dict[str, float]], list[list[Any]]]:
        def body() -> tuple[list[dict[str, float]], list[list[Any]]]:
            module = self.module
            # predict_step alone has a default that does something.
            if stage != "predict" and not overridden(module, f"{stage}_step", LightningModule):
                raise MisconfigurationError(f"{type(module).__name__} has no {stage}_step. Define it to {run} the module.")
            loaders = as_loaders(self._loaders(stage))
            if not loaders:
                raise MisconfigurationError(
                    f"There is nothing to {run} on. Give {run}(model, dataloaders=...), a datamodule, or define "
                    f"{LOADER_HOOKS[stage]} in the module."
                )
            if ckpt_path is not None:
                checkpoints.restore(self, storage.read(self._checkpoint_path(ckpt_path)), training=False)
            outputs = self._evaluation_loop(module, stage, loaders, within_fit=False).run()
            return self.metrics.results(stage, len(loaders)), outputs

        return self._run(run, model, datamodule, {stage: dataloaders}, body)

    def _evaluation_loop(
        self, module: LightningModule, stage: EvaluationStage, loaders: list[Any], *, within_fit: bool, most: int | None = None
    ) -> EvaluationLoop:
        opened: list[Callable[[], Batches]] = []
        for index, loader in enumerate(loaders):
            limit = limited_length(known_length(loader), self.limits[stage], limit_name(stage))
            limit = limit if most is None else min(most, limit if limit is not None else most)
            opened.append(partial(self._open, stage, loader, limit, index))
        return EvaluationLoop(
            stage,
            signals=self.signals,
            module=module,
            metrics=self.metrics,
            progress=self.progress,
            open_loaders=opened,
            within_fit=within_fit,
        )

    def _loaders(self, stage: Stage) -> Any:
        """The loaders of a stage: those given to the call, else the datamodule's, else the module's."""
        given = self._given.get(stage)
        if given is not None:
            return given
        hook = LOADER_HOOKS[stage]
        for source in (self.datamodule, self.module):
            if source is not None and overridden(source, hook, DataHooks, LightningModule, LightningDataModule):
                return getattr(source, hook)()
        return None

    def _open(self, stage: Stage, loader: Any, limit: int | None, dataloader_idx: int) -> Batches:
        return Batches(loader, limit, stage, self.signals, self._transfer(dataloader_idx))

    def _transfer(self, dataloader_idx: int) -> Callable[[Any], Any]:
        """What moves a batch to the device: the datamodule's hooks where it has them, else the module's."""
        parts = (self.datamodule, self.module)

        def source(hook: str) -> Any:
            owner = next((p for p in parts if p is not None and overridden(p, hook, DataHooks)), self.module)
            return getattr(owner, hook)

        before, move, after = map(source, ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"))
        if all(getattr(hook, "__func__", None) in vars(DataHooks).values() for hook in (before, move, after)):
            from eventtrain.data import move_to_device

            return partial(move_to_device, device=self.device)
        return lambda batch: after(move(before(batch, dataloader_idx), self.device, dataloader_idx), dataloader_idx)

    def _checkpoint_path(self, given: Any) -> Any:
        """The file that ``ckpt_path`` means."""
        if given in ("last", "best"):
            for callback in self.callbacks:
                if hasattr(callback, "checkpoint_path"):
                    return callback.checkpoint_path(given)
            raise MisconfigurationError(f"ckpt_path={given!r} needs a callback that keeps checkpoints. Give a file's path.")
        return given

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
        self.metrics = Metrics(self.distributed)

    def _default_callbacks(self, given: list[Any]) -> list[Any]:
        # The one place where the core knows callbacks, and late: they import the core.
        from eventtrain.callbacks import LRSchedulerStepping, ProgressBar

        return [kind() for kind in (LRSchedulerStepping, ProgressBar) if not any(isinstance(each, kind) for each in given)]


def own(module: LightningModule, name: str) -> Callable[..., Any] | None:
    """A module's method where it is overridden, else None."""
    return getattr(module, name) if overridden(module, name, LightningModule) else None


def limit_name(stage: Stage) -> str:
    """The argument of :class:`Trainer` that limits a stage."""
    return f"limit_{'val' if stage == 'validation' else stage}_batches"


def val_interval(interval: Limit, batches: int | None, *, across_epochs: bool) -> int | None:
    """Batches between two validations; None for one at the epoch's end.

    Args:
        interval: ``val_check_interval``.
        batches: Batches per epoch, None where unknown.
        across_epochs: The interval counts the run's batches.

    Raises:
        MisconfigurationError: The interval is longer than the epoch, or a fraction of an unknown length.
    """
    if interval is None or (isinstance(interval, float) and interval == 1.0):
        return None
    if isinstance(interval, float):
        if batches is None:
            raise MisconfigurationError(
                f"val_check_interval={interval!r} is a fraction of an epoch whose length is unknown. Give a number of batches."
            )
        return max(1, int(batches * interval))
    if batches is not None and interval > batches and not across_epochs:
        raise MisconfigurationError(
            f"val_check_interval={interval} is longer than the epoch, which has {batches} batches, so nothing would ever be "
            "validated. Give at most that, or check_val_every_n_epoch=None to count the batches of the run."
        )
    return interval


def check_module(module: Any) -> LightningModule:
    """Refuses what is no module.

    Raises:
        MisconfigurationError: It is not.
    """
    if isinstance(module, LightningModule):
        return module
    if module is None:
        raise MisconfigurationError("There is no module yet: give one to this call, or call fit first.")
    kind = type(module)
    if any(base.__name__ == "LightningModule" for base in kind.__mro__):
        raise MisconfigurationError(
            f"{kind.__name__} derives from {kind.__module__.partition('.')[0]}'s LightningModule. Change the import: "
            "`from eventtrain import LightningModule`."
        )
    raise MisconfigurationError(f"The model is a {kind.__name__}. It has to derive from eventtrain.LightningModule.")


def check_datamodule(datamodule: Any) -> LightningDataModule | None:
    """Refuses what is no datamodule.

    Raises:
        MisconfigurationError: It is not.
    """
    if datamodule is None or isinstance(datamodule, LightningDataModule):
        return datamodule
    raise MisconfigurationError(
        f"datamodule is a {type(datamodule).__name__}. It has to derive from eventtrain.LightningDataModule; loaders are given "
        "as train_dataloaders=... and val_dataloaders=...."
    )


def check_count(value: Any, named: str, *, least: int) -> int:
    """Refuses what is no whole number from ``least``.

    Raises:
        MisconfigurationError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise MisconfigurationError(f"{named}={value!r}: it has to be a whole number from {least}.")
    return value


def check_interval(interval: Limit, every_n_epoch: int | None) -> Limit:
    """Refuses what is no interval of validations.

    Raises:
        MisconfigurationError: It is not.
    """
    if every_n_epoch is not None:
        check_count(every_n_epoch, "check_val_every_n_epoch", least=1)
    elif not isinstance(interval, int):
        raise MisconfigurationError(
            f"check_val_every_n_epoch=None counts the batches of the run, so val_check_interval has to be their number; it is "
            f"{interval!r}."
        )
    check_limit(interval, "val_check_interval")
    if interval is not None and interval == 0:
        raise MisconfigurationError("val_check_interval=0: for no validation give limit_val_batches=0.")
    return interval


def check_extent(max_epochs: Any, max_steps: Any, min_epochs: Any, min_steps: Any, fast_dev_run: bool) -> None:
    """Refuses a run without an end, or with an impossible one.

    Raises:
        MisconfigurationError: It is such.
    """
    if max_epochs is None and max_steps in (None, -1) and not fast_dev_run:
        raise MisconfigurationError(
            "The run has no end: give Trainer(max_epochs=...) or Trainer(max_steps=...); max_epochs=-1 for a run that only a "
            "callback stops."
        )
    for named, value, least in (
        ("max_epochs", max_epochs, -1),
        ("max_steps", max_steps, -1),
        ("min_epochs", min_epochs, 0),
        ("min_steps", min_steps, 0),
    ):
        if value is not None:
            check_count(value, named, least=least)
