"""The trainer: its arguments, the four stages, and the verbs and properties that callbacks and users have."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from eventtrain import events
from eventtrain.callback import AttachedCallbacks, listed
from eventtrain.checkpoint import contents, storage
from eventtrain.checkpoint.find import interrupted_path
from eventtrain.core.optimizer import LightningOptimizer
from eventtrain.core.signals import Signals
from eventtrain.core.state import Progress, RunLimits, RunStage, StopRequest
from eventtrain.data.device import resolve_device
from eventtrain.data.limits import Limit
from eventtrain.describe import describe, overview
from eventtrain.distributed import Processes, SingleProcess
from eventtrain.errors import MisconfigurationError
from eventtrain.hints import MissingAttribute, explained
from eventtrain.metrics.metrics import Metrics
from eventtrain.module.module import LightningModule
from eventtrain.optim.lr_scheduler import LRSchedulerConfig
from eventtrain.paths import AnyPath, StrPath, check_path
from eventtrain.run.arguments import RunArguments, checked_attribute
from eventtrain.run.compiled import Model, ModuleSteps
from eventtrain.run.evaluate import Evaluation
from eventtrain.run.fit import Fit
from eventtrain.run.run import Run
from eventtrain.run.state import RunState, stepping_batches

T = TypeVar("T")
R = TypeVar("R", bound=Run)


class Trainer:
    """Trains, validates, tests and predicts with a module, and publishes everything that happens.

    Each ``fit`` is a new run, with counters from zero, unless it resumes a checkpoint.

    Args:
        max_epochs: Epochs of training; -1 for no limit. A fit needs this or ``max_steps``.
        min_epochs: :meth:`stop` waits until this many epochs are complete.
        max_steps: Updates of the whole run; None or -1 for no limit.
        min_steps: :meth:`stop` waits until there were this many updates.
        callbacks: Objects with ``on_<event>(self, trainer, event)`` methods, attached in this order.
        default_callbacks: Whether ``LRSchedulerStepping`` and ``ProgressBar`` are attached after them, each unless one of its
            kind is among them.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, or a ``torch.device``.
        limit_train_batches: Batches of each training epoch, as a number or a fraction; None for all.
        limit_val_batches: The same for validation, per loader; 0 for no validation.
        limit_test_batches: The same for the test.
        limit_predict_batches: The same for prediction.
        val_check_interval: Batches between validations, or a fraction of the epoch; None to validate at its end.
        check_val_every_n_epoch: Epochs between two that validate; None if ``val_check_interval`` counts the batches of the run.
        num_sanity_val_steps: Validation batches to run before training, -1 for all; nothing of it is logged.
        fast_dev_run: The number of batches of each stage in a trial run of one epoch, without loggers' files, checkpoints and
            early stopping; True for one batch.
        read_ahead: Whether a training loader without a length is read ahead, so that the last batch is known.
            False for batches that depend on the last update, such as those of a replay buffer: ``docs/resume.md``.
        inference_mode: Whether validate, test and predict run in ``torch.inference_mode``. False for ``torch.no_grad``, in
            which a step may turn gradients on again, and whose tensors training can use.
        seed: Given to :func:`~eventtrain.seed_everything` at the start of each run; None leaves the generators. Weights that a
            module draws in ``__init__`` come before: seed by hand for those, or draw in ``configure_model``.
        default_root_dir: The directory of callbacks that have no directory of their own, local or with a protocol of fsspec,
            such as ``"s3://bucket/runs"``.

    Attributes:
        signals: One signal per event.
        callbacks: The attached callbacks, in order. To append one attaches it, and to remove one detaches it.
        device: The device of the module and its batches.
        processes: This process's view of the others that train with it.
        arguments: The arguments that shape runs, checked.
        seed: See the argument.
        default_root_dir: See the argument.

    Raises:
        MisconfigurationError: If an argument cannot be right, or a callback cannot be attached.

    Example:
        >>> class Line(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(1, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return self.layer(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> trainer = Trainer(max_epochs=2, device="cpu", default_callbacks=False)
        >>> trainer.fit(Line(), [torch.ones(4, 1)] * 3)
        >>> trainer.global_step
        6
    """

    @explained
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
        read_ahead: bool = True,
        inference_mode: bool = True,
        seed: int | None = None,
        default_root_dir: StrPath = ".",
    ) -> None:
        self.arguments = RunArguments(
            *(max_epochs, min_epochs, max_steps, min_steps),
            batch_limits={
                "train": limit_train_batches,
                "validation": limit_val_batches,
                "test": limit_test_batches,
                "predict": limit_predict_batches,
            },
            val_check_interval=val_check_interval,
            check_val_every_n_epoch=check_val_every_n_epoch,
            num_sanity_val_steps=num_sanity_val_steps,
            fast_dev_run=fast_dev_run,
            read_ahead=read_ahead,
            inference_mode=inference_mode,
        )
        self.seed = seed
        self.default_root_dir = str(check_path(default_root_dir, "Trainer", "default_root_dir"))
        self.device = resolve_device(device)
        self.processes: Processes = SingleProcess()
        self.signals = Signals(self)
        self.callbacks = AttachedCallbacks(self.signals)
        self.run_state = self._new_state()
        self._run: Run | None = None  # the current one
        self._attach(callbacks, default_callbacks)

    if not TYPE_CHECKING:  # type checkers would allow any name

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, checked_attribute(self, name, value))

        def __getattr__(self, name: str) -> Any:
            # Reached only if there is no such attribute, or a property raised AttributeError.
            if name.startswith("__") or hasattr(type(self), name):
                return object.__getattribute__(self, name)
            raise MissingAttribute(name=name, obj=self)

    def _attach(self, callbacks: Any, default_callbacks: bool) -> None:
        chosen = listed(callbacks)
        if default_callbacks:
            # The one place at which the library knows callbacks, and late, because they import the library.
            from eventtrain.callbacks import LRSchedulerStepping, ProgressBar

            kinds = (LRSchedulerStepping, ProgressBar)
            chosen += [kind() for kind in kinds if not any(isinstance(callback, kind) for callback in chosen)]
        self.callbacks.extend(chosen)

    # ------------------------------------------------------------------ the four stages

    @explained
    def fit(
        self,
        model: Model,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: StrPath | None = None,
    ) -> None:
        """Train a module.

        Args:
            model: The module; or ``torch.compile(module)``, whose steps are then called compiled.
            train_dataloaders: The training loader; if None, the module's or datamodule's. A dict or list of loaders, nested in
                any way, gives batches of this form, until the longest ends; a :class:`~eventtrain.CombinedLoader` combines
                them in other ways. A list of batches is one loader, and so is a list of one loader. A datamodule may stand here
                too.
            val_dataloaders: A validation loader, or a dict or list of them, which are read one after the other; if None, the
                module's or datamodule's.
            datamodule: An object that has the loaders: a ``LightningDataModule``, or any other with their methods.
            ckpt_path: A checkpoint to resume, exactly from the safe point at which it was written: its path; ``"last"``, the
                newest whole one that an attached callback keeps, or a fresh start if there is none yet; ``"best"``, the best by
                the callback's monitored metric.

        Raises:
            MisconfigurationError: If something was put together in a way that cannot work; before training, if it can be known
                then.

        Example:
            >>> trainer = Trainer(max_steps=5, device="cpu", default_callbacks=False)
            >>> trainer.fit(Line(), [torch.ones(4, 1)] * 3)
            >>> trainer.global_step, trainer.current_epoch
            (5, 1)
        """
        loaders: dict[Any, Any] = {"train": train_dataloaders, "validation": val_dataloaders}
        self._execute(lambda: Fit(self, self._new_state(self.run_state.steps), model, datamodule, loaders, ckpt_path))

    @explained
    def validate(
        self, model: Model | None = None, dataloaders: Any = None, ckpt_path: StrPath | None = None, datamodule: Any = None
    ) -> list[dict[str, float]]:
        """Validate a module.

        Args:
            model: The module, compiled or not, whose weights are used as they are. If None, the one of the last run; if that
                was a fit that kept the best checkpoint by a metric, its weights are loaded first, as in Lightning.
            dataloaders: A loader, or a dict or list of them, or a datamodule; if None, the module's or datamodule's.
            ckpt_path: A checkpoint whose weights are loaded first, as for :meth:`fit`; None for none, but see ``model``.
            datamodule: An object that has the loaders.

        Returns:
            The epoch's metrics, one dict per loader.

        Raises:
            MisconfigurationError: If there is no module, no loader, or no ``validation_step``.

        Example:
            >>> trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False)
            >>> metrics = trainer.validate(Line(), [torch.zeros(4, 1)])
            >>> list(metrics[0])
            ['val_loss']
        """
        return self._evaluate("validate", model, dataloaders, ckpt_path, datamodule).results

    @explained
    def test(
        self, model: Model | None = None, dataloaders: Any = None, ckpt_path: StrPath | None = None, datamodule: Any = None
    ) -> list[dict[str, float]]:
        """Test a module. Arguments, result and errors are those of :meth:`validate`, with ``test_step``.

        Example:
            >>> trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False)
            >>> metrics = trainer.test(Line(), torch.utils.data.DataLoader(torch.zeros(8, 1), batch_size=4))
            >>> list(metrics[0])
            ['test_loss']
        """
        return self._evaluate("test", model, dataloaders, ckpt_path, datamodule).results

    @explained
    def predict(
        self,
        model: Model | None = None,
        dataloaders: Any = None,
        ckpt_path: StrPath | None = None,
        datamodule: Any = None,
        return_predictions: bool = True,
    ) -> Any:
        """Predict with a module. The other arguments and errors are those of :meth:`validate`, with ``predict_step``.

        Args:
            return_predictions: Whether the values of ``predict_step`` are kept and returned. False for a step or a callback
                that writes them, if together they are too large.

        Returns:
            The value of ``predict_step`` for each batch; with several loaders, a list of such lists. None if they are not
            returned.

        Example:
            >>> trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False)
            >>> [output.shape for output in trainer.predict(Line(), [torch.ones(4, 1)] * 2)]
            [torch.Size([4, 1]), torch.Size([4, 1])]
        """
        outputs = self._evaluate("predict", model, dataloaders, ckpt_path, datamodule, keeps=return_predictions).outputs
        return (outputs[0] if len(outputs) == 1 else outputs) if return_predictions else None

    def _evaluate(self, stage: RunStage, *call: Any, keeps: bool = True) -> Evaluation:
        return self._execute(lambda: Evaluation(self, stage, keeps, *call))

    def _execute(self, make: Callable[[], R]) -> R:
        if self._run is not None:
            raise MisconfigurationError(f"The trainer is running {self._run.stage}. Use another trainer for a run in a run.")
        run = make()
        self._run, self.run_state = run, run.state
        try:
            run.execute()
        finally:
            self._run = None
        return run

    def _new_state(self, steps: ModuleSteps | None = None) -> RunState:
        return RunState(self.arguments.limits(), Metrics(self.processes.data), steps=steps)

    # ------------------------------------------------------------------ verbs

    def stop(self, reason: str, *, force: bool = False, at_once: bool = False, by_all: bool = False) -> None:
        """End the run after the current batch. If only some of several processes ask, all end after the next batch; within an
        accumulation window, at the latest after the batch that closes it.

        Args:
            reason: Why, in a few words; :attr:`stop_reason` tells it.
            force: Stop before ``min_epochs`` and ``min_steps`` too, which hold off other requests.
            at_once: Leave an evaluation at its next batch too, as if it had not begun: a run that is resumed from the safe
                point after it evaluates anew. Implies ``force``. A signal handler may ask for it.
            by_all: All processes ask at this place, having agreed on it, so they need not agree again.

        Example:
            >>> class StopAfterThree(Callback):
            ...     def on_after_update(self, trainer, event):
            ...         if event.global_step == 3:
            ...             trainer.stop("three updates are enough")
            >>> trainer = Trainer(max_epochs=9, callbacks=StopAfterThree(), device="cpu", default_callbacks=False)
            >>> trainer.fit(Line(), [torch.ones(4, 1)])
            >>> trainer.global_step, trainer.stop_reason
            (3, 'three updates are enough')
        """
        request = self._request(f"stop({reason!r})")
        if request.reason is None or force or at_once:
            request.reason = reason
        request.force |= force or at_once
        request.at_once |= at_once
        if by_all and request is self.run_state.stop_request:
            self.run_state.stop.reason, self.run_state.stop.force = request.reason, request.force

    def interrupt(self, reason: str | None) -> None:
        """Interrupt the fit at its next safe point: write a checkpoint there and return from ``fit``, so that
        ``fit(ckpt_path="last")`` resumes the run.

        A validation is left at its next batch, and repeated by the resumed run. The request does not wait for ``min_epochs``
        and ``min_steps``. If one of several processes asks, all are interrupted, as late as by :meth:`stop`. A signal handler
        may call it.

        Args:
            reason: Why, in a few words. None withdraws the request, unless other processes know of it already.

        Example:
            >>> class InterruptAfterTwo(Callback):
            ...     def on_request_stop(self, trainer, event):
            ...         if trainer.global_step == 2:
            ...             trainer.interrupt("the machine is needed")
            >>> trainer = Trainer(max_epochs=9, callbacks=InterruptAfterTwo(), device="cpu", default_callbacks=False)
            >>> trainer.fit(Line(), [torch.ones(4, 1)] * 3)  # writes checkpoints/interrupted.ckpt
            >>> trainer.global_step
            2
        """
        request = self._request(f"interrupt({reason!r})")
        request.interruption = reason

    def end_epoch(self, reason: str) -> None:
        """End the training epoch after the current batch. Validation still runs; nothing that counts epochs steps for it. If
        only some of several processes ask, it ends as late as by :meth:`stop`.

        Args:
            reason: Why, in a few words.

        Example:
            >>> class OneBatchEach(Callback):
            ...     def on_train_batch_end(self, trainer, event):
            ...         trainer.end_epoch("one batch is enough")
            >>> trainer = Trainer(max_epochs=2, callbacks=OneBatchEach(), device="cpu", default_callbacks=False)
            >>> trainer.fit(Line(), [torch.ones(4, 1)] * 10)
            >>> trainer.global_step
            2
        """
        self._request(f"end_epoch({reason!r})").epoch_reason = reason

    def _request(self, verb: str) -> StopRequest:
        """Return the request of the current fit; outside a fit one that nobody reads, with a warning."""
        if self.stage == "fit":
            return self.run_state.stop_request
        warnings.warn(f"trainer.{verb} does nothing, because no fit is running. Call it in a callback.", stacklevel=3)
        return StopRequest()

    def listen(self, handler: Callable[..., Any]) -> None:
        """Have a handler that is marked :func:`~eventtrain.on_demand` called from the next event on, until the run ends or
        :meth:`stop_listening`.

        Args:
            handler: A method of an attached callback, such as ``self.on_train_batch_end``.

        Raises:
            MisconfigurationError: If the handler is not marked, or its callback is not attached.

        Example:
            >>> class CountBatches(Callback):
            ...     batches = 0
            ...     def on_fit_start(self, trainer, event):
            ...         trainer.listen(self.on_train_batch_end)
            ...     @on_demand
            ...     def on_train_batch_end(self, trainer, event):
            ...         self.batches += 1
            >>> counter = CountBatches()
            >>> trainer = Trainer(max_epochs=1, callbacks=counter, device="cpu", default_callbacks=False)
            >>> trainer.fit(Line(), [torch.ones(4, 1)] * 3)
            >>> counter.batches
            3
        """
        self.callbacks.signal_of(handler).wake(handler)

    def stop_listening(self, handler: Callable[..., Any]) -> None:
        """Undo :meth:`listen`.

        Args:
            handler: The method that was given to :meth:`listen`.

        Raises:
            MisconfigurationError: If the handler is not marked, or its callback is not attached.

        Example:
            >>> class FirstBatch(Callback):
            ...     def on_fit_start(self, trainer, event):
            ...         trainer.listen(self.on_train_batch_end)
            ...     @on_demand
            ...     def on_train_batch_end(self, trainer, event):
            ...         print("batch", event.batch_idx)
            ...         trainer.stop_listening(self.on_train_batch_end)
            >>> trainer = Trainer(max_epochs=1, callbacks=FirstBatch(), device="cpu", default_callbacks=False)
            >>> trainer.fit(Line(), [torch.ones(4, 1)] * 3)
            batch 0
        """
        self.callbacks.signal_of(handler).idle(handler)

    def times_logged(self, name: str) -> int:
        """Return how often a metric in :attr:`callback_metrics` got a new value in this run. A listener that acts on new values
        compares it with the count that it saw last.

        Args:
            name: The metric's name.

        Example:
            >>> trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False)
            >>> trainer.fit(Line(), [torch.ones(4, 1)] * 3)
            >>> trainer.times_logged("loss")
            3
        """
        return self.run_state.metrics.update_counts.get(name, 0)

    def log_on_step(self, values: Mapping[str, Any]) -> None:
        """Add values to those that the current update hands to loggers, which write them at their cadence; in validation and
        test, to those of the current batch. For callbacks; a module has ``self.log``.

        Args:
            values: By name, numbers, scalar tensors, or anything that ``float()`` takes; it is called when they are written.

        Example:
            >>> class LogBatchIndex(Callback):
            ...     def on_after_optimizer_step(self, trainer, event):
            ...         trainer.log_on_step({"batch_idx": trainer.batch_idx})
            >>> trainer = Trainer(max_epochs=1, callbacks=LogBatchIndex(), device="cpu", default_callbacks=False)
            >>> trainer.fit(Line(), [torch.ones(4, 1)] * 3)
            >>> trainer.logged_metrics["batch_idx"]
            2
        """
        self.run_state.metrics.fresh.update(values)

    def log_now(self, values: Mapping[str, Any]) -> None:
        """Hand values to loggers at once, whatever their cadence. For callbacks that have a cadence of their own.

        Args:
            values: Numbers or scalar tensors by name.

        Example:
            >>> class LogEpoch(Callback):
            ...     def on_train_epoch_end(self, trainer, event):
            ...         trainer.log_now({"epochs_seen": event.epoch + 1})
            >>> trainer = Trainer(max_epochs=2, callbacks=LogEpoch(), device="cpu", default_callbacks=False)
            >>> trainer.fit(Line(), [torch.ones(4, 1)])
            >>> trainer.logged_metrics["epochs_seen"]
            2
        """
        metrics = self.run_state.metrics
        metrics.logged_metrics.update(values)
        self.signals.metrics_logged.publish(events.MetricsLogged(metrics.stage, "monitor", self.global_step, dict(values)))

    def step_lr_scheduler(self, config: LRSchedulerConfig, metric: Any = None) -> None:
        """Step a scheduler through the module's ``lr_scheduler_step``, with the events around it.

        Args:
            config: One of :attr:`lr_scheduler_configs`.
            metric: The value that the scheduler monitors; None if it monitors nothing.

        Example:
            >>> class StepEveryUpdate(Callback):
            ...     role = "lr_scheduler_stepping"
            ...     def on_after_update(self, trainer, event):
            ...         for config in trainer.lr_scheduler_configs:
            ...             trainer.step_lr_scheduler(config)
            >>> trainer = Trainer(max_epochs=1, callbacks=StepEveryUpdate(), device="cpu", default_callbacks=False)
        """
        signals = self.signals.table
        if signals.before_lr_scheduler_step.listeners:
            event = events.BeforeLRSchedulerStep(config, config.learning_rates(), metric)
            signals.before_lr_scheduler_step.publish(event)
            metric = event.metric
        module: Any = self.run_state.module
        (module.lr_scheduler_step or LightningModule().lr_scheduler_step)(config.scheduler, metric)
        if signals.after_lr_scheduler_step.listeners:
            signals.after_lr_scheduler_step.publish(events.AfterLRSchedulerStep(config, config.learning_rates()))

    def collect_checkpoint(self, *, publish: bool = True) -> dict[str, Any]:
        """Collect the state of the run, as :meth:`save_checkpoint` writes it. In several processes all have to call it, and
        the first has the whole.

        Args:
            publish: Whether ``save_checkpoint`` and ``checkpoint_gathered`` are published, so that listeners add to it.

        Returns:
            The checkpoint; ``docs/resume.md`` describes its keys. Its tensors are those of the run, not copies.

        Example:
            >>> trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False)
            >>> trainer.fit(Line(), [torch.ones(4, 1)])
            >>> trainer.collect_checkpoint()["global_step"]
            1
        """
        return contents.gather(self) if publish else contents.state_of(self)

    @explained
    def save_checkpoint(self, path: StrPath) -> None:
        """Write the run's state to a file. In several processes all have to call it.

        Args:
            path: The file. If it exists, it is replaced once the new one is whole on disk.

        Raises:
            MisconfigurationError: If something in the state could not be read back.

        Example:
            >>> trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False)
            >>> trainer.fit(Line(), [torch.ones(4, 1)])
            >>> trainer.save_checkpoint("line.ckpt")
            >>> sorted(torch.load("line.ckpt", weights_only=True)["state_dict"])
            ['layer.bias', 'layer.weight']
        """
        target = check_path(path, "Trainer.save_checkpoint", "path")
        storage.write(self.collect_checkpoint(), target if self.is_global_zero else None)
        if self.is_global_zero:
            self.signals.checkpoint_saved.publish(events.CheckpointSaved(str(target)))
        self.processes.barrier()  # the others wait here, as long as it takes

    def keep_checkpoint(self, reason: str) -> str | None:
        """Have a checkpoint written because the run is about to end early: by the listeners of ``take_checkpoint``, or, if none
        writes one, as ``checkpoints/interrupted.ckpt`` under ``default_root_dir``. ``fit(ckpt_path="last")`` finds it. Exact if
        called at a safe point.

        Args:
            reason: Why, in a few words.

        Returns:
            The file; None in a ``fast_dev_run``, which writes none.

        Example:
            >>> trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False)
            >>> trainer.fit(Line(), [torch.ones(4, 1)])
            >>> trainer.keep_checkpoint("to look at it")
            'checkpoints/interrupted.ckpt'
        """
        if self.fast_dev_run:
            return None
        event = events.TakeCheckpoint(self.progress.epoch_is_over, self.window_open, reason)
        self.signals.take_checkpoint.publish(event)
        if event.path is None:
            event.path = str(interrupted_path(self))
            self.save_checkpoint(event.path)
        # The first process that ends has its launcher end the others: not before all have written.
        self.processes.barrier()
        return event.path

    def describe(self, *, all_events: bool = True) -> str:
        """Return the loop as a tree, with the listeners of each event in the order in which they are called.

        Args:
            all_events: Whether to show events without a listener, and the core's own work.

        Example:
            >>> trainer = Trainer(max_epochs=1, device="cpu")
            >>> print(trainer.describe(all_events=False))
            Trainer: max_epochs=1, on cpu, no module yet
            callbacks: LRSchedulerStepping, ProgressBar
            ...
        """
        return f"{overview(self)}\n\n{describe(self.signals, all_events=all_events)}"

    def callback(self, kind: type[T]) -> T:
        """Return the attached callback of a class.

        Args:
            kind: The class.

        Raises:
            MisconfigurationError: If none is attached.

        Example:
            >>> class Nothing(Callback): ...
            >>> trainer = Trainer(max_epochs=1, callbacks=Nothing(), device="cpu")
            >>> type(trainer.callback(Nothing)).__name__
            'Nothing'
        """
        for callback in self.callbacks:
            if isinstance(callback, kind):
                return callback
        attached = [type(callback).__name__ for callback in self.callbacks]
        raise MisconfigurationError(f"No {kind.__name__} is attached; there are {attached}. Give it in callbacks=[...].")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print in the first process, above a progress bar if there is one.

        Args:
            *args: The arguments of :func:`print`.
            **kwargs: Its keyword arguments.

        Example:
            >>> Trainer(max_epochs=1, device="cpu", default_callbacks=False).print("epoch", 1)
            epoch 1
        """
        if not self.is_global_zero:
            return
        above_bar = next((callback.print for callback in self.callbacks if hasattr(callback, "print")), print)
        above_bar(*args, **kwargs)

    # ------------------------------------------------------------------ the run

    @property
    def module(self) -> LightningModule:
        """The module of the current run, or of the last one.

        Raises:
            MisconfigurationError: If there was none yet.
        """
        if self.run_state.module is None:
            raise MisconfigurationError("The trainer has no module yet: call fit, validate, test or predict with one.")
        return self.run_state.module

    @property
    def datamodule(self) -> Any:
        """The datamodule of the current run, or of the last one; None if it has none."""
        return self.run_state.datamodule

    @property
    def optimizers(self) -> list[LightningOptimizer]:
        """The optimizers of the current fit, or of the last one."""
        return self.run_state.optimizers

    @property
    def lr_scheduler_configs(self) -> list[LRSchedulerConfig]:
        """The schedulers of the current fit, or of the last one, and when they step."""
        return self.run_state.lr_scheduler_configs

    @property
    def root(self) -> AnyPath:
        """The directory ``default_root_dir``: a ``pathlib.Path``, or the path of a remote store, with the same methods."""
        return check_path(self.default_root_dir, "Trainer", "default_root_dir")

    @property
    def stage(self) -> RunStage | None:
        """``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``; None between runs."""
        return None if self._run is None else self._run.stage

    @property
    def training(self) -> bool:
        """Whether training batches are being run, as opposed to a validation in a fit."""
        return self.stage == "fit" and self.run_state.metrics.stage == "train"

    @property
    def validating(self) -> bool:
        """Whether a validation is being run, in a fit or outside one."""
        return self.stage is not None and self.run_state.metrics.stage == "validation"

    @property
    def testing(self) -> bool:
        """Whether a test is being run."""
        return self.stage == "test"

    @property
    def predicting(self) -> bool:
        """Whether predictions are being made."""
        return self.stage == "predict"

    @property
    def sanity_checking(self) -> bool:
        """Whether the validation before training is being run."""
        return self._run is not None and self._run.sanity_checking

    @property
    def validates(self) -> bool:
        """Whether the current fit has something to validate on."""
        return self.run_state.loop is not None and self.run_state.loop.validate is not None

    @property
    def fast_dev_run(self) -> int:
        """The number of batches of each stage in a trial run; 0 in others."""
        return self.arguments.fast_dev_run

    # ------------------------------------------------------------------ counters and limits

    @property
    def progress(self) -> Progress:
        """The counters of the current fit, or of the last one. Read them; only the loop writes them."""
        return self.run_state.progress

    @property
    def current_epoch(self) -> int:
        """Epochs of training completed, which is the index of the current one."""
        return self.run_state.progress.current_epoch

    @property
    def global_step(self) -> int:
        """Batches of the run in which at least one optimizer updated."""
        return self.run_state.progress.global_step

    @property
    def batch_idx(self) -> int:
        """The index of the current training batch in its epoch."""
        return self.run_state.progress.batch_idx

    @property
    def total_batch_idx(self) -> int:
        """The index of the current training batch in the run."""
        return self.run_state.progress.total_batch_idx

    @property
    def is_last_batch(self) -> bool:
        """Whether the current training batch is its epoch's last."""
        return self.run_state.loop is not None and self.run_state.loop.is_last_batch

    @property
    def window_open(self) -> bool:
        """Whether gradients of an unfinished accumulation window are held."""
        return self.run_state.batch.window_open

    @property
    def max_epochs(self) -> int | None:
        """Epochs of training; None for no limit."""
        return self.run_state.limits.max_epochs

    @property
    def max_steps(self) -> int | None:
        """Updates of the run; None for no limit."""
        return self.run_state.limits.max_steps

    @property
    def limits(self) -> RunLimits:
        """How long the current fit is, or the last one, and when it validates. Read it; only the run writes it."""
        return self.run_state.limits

    @property
    def num_training_batches(self) -> int | None:
        """Batches of the current training epoch in this process, limits applied; None if the loader has no length."""
        return self.run_state.limits.batches_per_epoch

    @property
    def num_evaluation_batches(self) -> int | None:
        """Batches of the current evaluation, over all of its loaders; None if unknown."""
        return self.run_state.num_evaluation_batches

    @property
    def estimated_stepping_batches(self) -> int:
        """How many batches of the whole run will update something, if none is skipped and nothing stops it.

        Each epoch is taken to be as long as the run's first. If a later one is not, a warning says so.

        Raises:
            MisconfigurationError: If the training loader has no length and ``max_steps`` is not set.
        """
        return stepping_batches(self.run_state.limits, self.signals.table)

    @property
    def should_stop(self) -> bool:
        """Whether :meth:`stop` was called in this run. To set it to True stops the run; to False withdraws the request, unless
        other processes know of it already."""
        return self.run_state.stop_request.reason is not None

    @should_stop.setter
    def should_stop(self, should_stop: bool) -> None:
        if should_stop:
            self.stop("trainer.should_stop = True")
        elif (request := self.run_state.stop_request) is self.run_state.stop or self.run_state.stop.reason is None:
            request.reason, request.force, request.at_once = None, False, False

    @property
    def stop_reason(self) -> str | None:
        """Why the current run, or the last one, was asked to stop; None if it was not."""
        return self.run_state.stop_request.reason

    @property
    def is_ending(self) -> bool:
        """Whether the run ends at the current safe point: it is complete, or was asked to stop."""
        loop = self.run_state.loop
        return loop is not None and (loop.is_complete() or loop.is_stopping())

    # ------------------------------------------------------------------ metrics, loggers, processes

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """The latest value of every logged name, as scalar tensors."""
        return self.run_state.metrics.callback_metrics

    @property
    def logged_metrics(self) -> dict[str, Any]:
        """The latest values that went to loggers."""
        return {**self.run_state.metrics.logged_metrics, **self.run_state.metrics.fresh}

    @property
    def progress_bar_metrics(self) -> dict[str, Any]:
        """The latest values that were logged with ``prog_bar=True``."""
        return self.run_state.metrics.progress_bar_metrics

    @property
    def loggers(self) -> list[Any]:
        """The attached callbacks that have an ``experiment``."""
        return [callback for callback in self.callbacks if hasattr(type(callback), "experiment")]

    @property
    def logger(self) -> Any:
        """The first of :attr:`loggers`; None if there is none."""
        return next(iter(self.loggers), None)

    @property
    def world_size(self) -> int:
        """The number of processes that train together."""
        return self.processes.world_size

    @property
    def global_rank(self) -> int:
        """This process's index among them."""
        return self.processes.global_rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.processes.global_rank == 0
