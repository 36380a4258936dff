"""The base class of a user's model: its steps, and the methods that they call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eventtrain.checkpoint.storage import read as read_checkpoint
from eventtrain.checkpoint.weights import load_weights
from eventtrain.core.closure import backward, check_grad_mode
from eventtrain.core.optimizer import LightningOptimizer
from eventtrain.errors import MisconfigurationError
from eventtrain.metrics.torchmetrics import LoggableMetric, is_loggable_metric, named_values
from eventtrain.module.datamodule import DataHooks
from eventtrain.module.hooks import ModuleHooks
from eventtrain.module.hparams import HyperparametersMixin, of_class
from eventtrain.module.saved_hparams import build
from eventtrain.paths import StrPath, check_path

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer

Self = TypeVar("Self", bound="LightningModule")


class LightningModule(DataHooks, ModuleHooks, HyperparametersMixin, nn.Module):
    """A model with its steps and its optimizers, and with any hooks that it overrides.

    Define ``training_step`` and ``configure_optimizers`` at least. The constructor passes its arguments on, so that a class
    may derive from a torch module too, as in the example.

    A hook, step or loader that is set to None counts as not defined.

    Attributes:
        automatic_optimization: Whether the trainer zeroes the gradients, runs backward and steps. Set it to False for manual
            optimization: in the class, in ``__init__``, or as a property.
        example_input_array: An input of ``forward``, for loggers that draw the graph.
        strict_loading: Whether a checkpoint has to have exactly the weights of the module. If it is False, weights that one of
            them lacks are passed over.

    Example:
        >>> from eventtrain import Trainer
        >>> class Line(LightningModule, nn.Linear):
        ...     def training_step(self, batch, batch_idx):
        ...         return self(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> trainer = Trainer(max_epochs=3, default_callbacks=False, device="cpu")
        >>> trainer.fit(Line(1, 1), [torch.ones(2, 1)])
        >>> trainer.global_step
        3
    """

    automatic_optimization: bool = True
    example_input_array: Any = None
    strict_loading: bool = True

    # ------------------------------------------------------------------ the current run

    @property
    def trainer(self) -> Trainer:
        """The trainer of the current run, or of the last one.

        Raises:
            MisconfigurationError: If no trainer has run the module yet.

        Example:
            >>> from eventtrain import Trainer
            >>> class Show(LightningModule):
            ...     def predict_step(self, batch, batch_idx):
            ...         return self.trainer.stage
            >>> Trainer(max_epochs=1, default_callbacks=False, device="cpu").predict(Show(), [0])
            ['predict']
        """
        trainer = self.__dict__.get("_trainer")
        if trainer is None:
            raise MisconfigurationError(
                f"{type(self).__name__} is not attached to a trainer: `self.trainer` is there once fit, validate, test or "
                "predict has been called."
            )
        attached: Trainer = trainer
        return attached

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self.attach_trainer(trainer)

    def attach_trainer(self, trainer: Trainer | None) -> None:
        """Give a trainer to the module and to each module within it that is a LightningModule.

        Args:
            trainer: The trainer; None for none.

        Example:
            >>> from eventtrain import Trainer
            >>> parent = LightningModule()
            >>> parent.child = LightningModule()
            >>> trainer = Trainer(max_epochs=1, default_callbacks=False, device="cpu")
            >>> parent.attach_trainer(trainer)
            >>> parent.child.trainer is trainer
            True
        """
        for part in self.modules():
            if isinstance(part, LightningModule):
                # Not by nn.Module.__setattr__: a trainer is no part of the model.
                part.__dict__["_trainer"] = trainer

    @property
    def current_epoch(self) -> int:
        """The index of the current epoch, from 0; 0 without a trainer.

        Example:
            >>> LightningModule().current_epoch
            0
        """
        trainer = self.__dict__.get("_trainer")
        return trainer.current_epoch if trainer is not None else 0

    @property
    def global_step(self) -> int:
        """The number of batches of the run in which a parameter was updated; 0 without a trainer.

        Example:
            >>> LightningModule().global_step
            0
        """
        trainer = self.__dict__.get("_trainer")
        return trainer.global_step if trainer is not None else 0

    @property
    def global_rank(self) -> int:
        """The index of this process among all processes of the run; 0 without a trainer.

        Example:
            >>> LightningModule().global_rank
            0
        """
        trainer = self.__dict__.get("_trainer")
        return trainer.global_rank if trainer is not None else 0

    @property
    def local_rank(self) -> int:
        """The index of this process on its machine; 0 without a trainer.

        Example:
            >>> LightningModule().local_rank
            0
        """
        trainer = self.__dict__.get("_trainer")
        return trainer.processes.local_rank if trainer is not None else 0

    @property
    def device(self) -> torch.device:
        """The device of the parameters; for a module without parameters and buffers the trainer's, or the CPU.

        Example:
            >>> LightningModule().device
            device(type='cpu')
        """
        holder = next(chain(self.parameters(), self.buffers()), self.__dict__.get("_trainer"))
        return torch.device("cpu") if holder is None else holder.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters; torch's default for a module without parameters.

        Example:
            >>> LightningModule().dtype
            torch.float32
        """
        first = next(self.parameters(), None)
        return torch.get_default_dtype() if first is None else first.dtype

    @property
    def logger(self) -> Any:
        """The first attached logger, whose ``experiment`` is its writer; None if there is none, or no trainer.

        Example:
            >>> from eventtrain import Trainer
            >>> class Show(LightningModule):
            ...     def predict_step(self, batch, batch_idx):
            ...         return self.logger
            >>> Trainer(max_epochs=1, default_callbacks=False, device="cpu").predict(Show(), [0])
            [None]
        """
        return next(iter(self.loggers), None)

    @property
    def loggers(self) -> list[Any]:
        """All attached loggers; none without a trainer.

        Example:
            >>> from eventtrain import Trainer
            >>> class Show(LightningModule):
            ...     def predict_step(self, batch, batch_idx):
            ...         return self.loggers
            >>> Trainer(max_epochs=1, default_callbacks=False, device="cpu").predict(Show(), [0])
            [[]]
        """
        trainer = self.__dict__.get("_trainer")
        return trainer.loggers if trainer is not None else []

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank zero; above the progress bar if there is one.

        Args:
            *args: As for Python's ``print``.
            **kwargs: As for Python's ``print``.

        Example:
            >>> LightningModule().print("ready", 1)
            ready 1
        """
        trainer = self.__dict__.get("_trainer")
        (print if trainer is None else trainer.print)(*args, **kwargs)

    # ------------------------------------------------------------------ methods to define

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of a batch.

        It is called as ``training_step(batch, batch_idx)``.

        Returns:
            The loss, a scalar tensor; a mapping with ``"loss"`` and perhaps ``"weight"``; or None for a batch without a loss.
            In manual optimization the result is not used for updates.

        Example:
            >>> class Model(LightningModule):
            ...     def training_step(self, batch, batch_idx):
            ...         return batch.square().mean()
            >>> Model().training_step(torch.tensor([1.0, 3.0]), 0)
            tensor(5.)
        """
        raise MisconfigurationError(f"{type(self).__name__} has no training_step(self, batch, batch_idx). Define it.")

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a validation batch: ``validation_step(batch, batch_idx, dataloader_idx=0)``.

        Example:
            >>> from eventtrain import Trainer
            >>> class Model(LightningModule):
            ...     def validation_step(self, batch, batch_idx):
            ...         self.log("val_mean", batch.mean())
            >>> Trainer(max_epochs=1, default_callbacks=False, device="cpu").validate(Model(), [torch.ones(2)])
            [{'val_mean': 1.0}]
        """

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a test batch: ``test_step(batch, batch_idx, dataloader_idx=0)``.

        Example:
            >>> from eventtrain import Trainer
            >>> class Model(LightningModule):
            ...     def test_step(self, batch, batch_idx):
            ...         self.log("test_mean", batch.mean())
            >>> Trainer(max_epochs=1, default_callbacks=False, device="cpu").test(Model(), [torch.ones(2)])
            [{'test_mean': 1.0}]
        """

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predict on a batch: ``predict_step(batch, batch_idx, dataloader_idx=0)``. By default ``self(batch)``.

        Example:
            >>> from eventtrain import Trainer
            >>> class Model(LightningModule):
            ...     def predict_step(self, batch, batch_idx):
            ...         return batch.argmax()
            >>> Trainer(max_epochs=1, default_callbacks=False, device="cpu").predict(Model(), [torch.tensor([1, 3, 2])])
            [tensor(1)]
        """
        return self(args[0])

    def configure_optimizers(self) -> Any:
        """Return the optimizers and schedulers, in one of the forms of :data:`eventtrain.optim.configure.FORMS`.

        None trains nothing, with a warning. In automatic optimization the method must be defined.

        Example:
            >>> class Model(LightningModule, nn.Linear):
            ...     def configure_optimizers(self):
            ...         optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            ...         return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)]
            >>> optimizers, schedulers = Model(1, 1).configure_optimizers()
        """

    def configure_callbacks(self) -> Any:
        """Return callbacks that belong to the module. They are attached after the trainer's, for one run.

        Example:
            >>> from eventtrain.callbacks import EarlyStopping
            >>> class Model(LightningModule):
            ...     def configure_callbacks(self):
            ...         return [EarlyStopping(monitor="val_loss")]
            >>> len(Model().configure_callbacks())
            1
        """
        return []

    def configure_model(self) -> None:
        """Build large layers, once per run, after :meth:`setup`.

        Example:
            >>> class Model(LightningModule):
            ...     layer = None
            ...     def configure_model(self):
            ...         if self.layer is None:  # it stays for the next run
            ...             self.layer = nn.Linear(1000, 1000)
            >>> Model().configure_model()
        """

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: LightningOptimizer, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step the optimizer, in automatic optimization, in each batch that closes a window.

        Args:
            epoch: The epoch's index.
            batch_idx: The batch's index in the epoch.
            optimizer: The optimizer; ``optimizer.optimizer`` is the wrapped one.
            optimizer_closure: A function that runs ``training_step``, ``zero_grad`` and ``backward``. An override has to run
                it, by ``optimizer.step(closure=optimizer_closure)`` or by a call.

        Example:
            >>> class WarmUp(LightningModule):
            ...     def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            ...         optimizer.param_groups[0]["lr"] = 0.5 * min(1, (self.global_step + 1) / 100)
            ...         optimizer.step(closure=optimizer_closure)
            >>> optimizer = torch.optim.SGD([torch.zeros(1)])
            >>> WarmUp().optimizer_step(0, 0, optimizer)
            >>> optimizer.param_groups[0]["lr"]
            0.005
        """
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: LightningOptimizer) -> None:
        """Zero the gradients, in automatic optimization, in each batch that opens a window.

        Args:
            epoch: The epoch's index.
            batch_idx: The batch's index in the epoch.
            optimizer: The optimizer.

        Example:
            >>> class Model(LightningModule):
            ...     def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            ...         optimizer.zero_grad(set_to_none=False)
            >>> weight = nn.Parameter(torch.ones(1))
            >>> weight.grad = torch.ones(1)
            >>> Model().optimizer_zero_grad(0, 0, torch.optim.SGD([weight]))
            >>> weight.grad
            tensor([0.])
        """
        optimizer.zero_grad()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run backward.

        Args:
            loss: The loss, scaled for the window and the precision.
            *args: The arguments of ``manual_backward``.
            **kwargs: The arguments of ``manual_backward``.

        Example:
            >>> weight = nn.Parameter(torch.ones(1))
            >>> LightningModule().backward(2 * weight.sum())
            >>> weight.grad
            tensor([2.])
        """
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a scheduler. Override it for schedulers whose ``step`` differs from torch's.

        Args:
            scheduler: The scheduler.
            metric: The monitored value; None if the scheduler monitors nothing.

        Example:
            >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
            >>> scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            >>> for metric in (0.5, 0.7):
            ...     LightningModule().lr_scheduler_step(scheduler, metric)
            >>> optimizer.param_groups[0]["lr"]
            0.1
        """
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def configure_gradient_clipping(
        self, optimizer: LightningOptimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients, in automatic optimization, before each update, with or without a clipping callback.

        Args:
            optimizer: The optimizer.
            gradient_clip_val: The threshold that a callback set; None if there is none.
            gradient_clip_algorithm: ``"norm"`` or ``"value"``; None if no callback set it.

        Example:
            >>> class Model(LightningModule):
            ...     def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            ...         self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="value")
            >>> weight = nn.Parameter(torch.ones(1))
            >>> weight.grad = torch.tensor([3.0])
            >>> Model().configure_gradient_clipping(torch.optim.SGD([weight]))
            >>> weight.grad
            tensor([0.5000])
        """
        self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm)

    # ------------------------------------------------------------------ methods to call

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Return the run's optimizer, or a list if there are several.

        Args:
            use_pl_optimizer: Whether the result has the wrappers; False for the wrapped optimizers.

        Example:
            >>> from eventtrain import Trainer
            >>> class Line(LightningModule, nn.Linear):
            ...     def training_step(self, batch, batch_idx):
            ...         print(self.optimizers().param_groups[0]["lr"])
            ...         return self(batch).mean()
            ...     def configure_optimizers(self):
            ...         return torch.optim.SGD(self.parameters(), lr=0.1)
            >>> Trainer(max_epochs=1, default_callbacks=False, device="cpu").fit(Line(1, 1), [torch.ones(2, 1)])
            0.1
        """
        optimizers: list[Any] = list(self.trainer.optimizers)
        if not use_pl_optimizer:
            optimizers = [optimizer.optimizer for optimizer in optimizers]
        return optimizers[0] if len(optimizers) == 1 else optimizers

    def lr_schedulers(self) -> Any:
        """Return the run's scheduler, or a list if there are several; None if there is none.

        Example:
            >>> from eventtrain import Trainer
            >>> class Line(LightningModule, nn.Linear):
            ...     def training_step(self, batch, batch_idx):
            ...         print(self.lr_schedulers())
            ...         return self(batch).mean()
            ...     def configure_optimizers(self):
            ...         return torch.optim.SGD(self.parameters(), lr=0.1)
            >>> Trainer(max_epochs=1, default_callbacks=False, device="cpu").fit(Line(1, 1), [torch.ones(2, 1)])
            None
        """
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs] or [None]
        return schedulers[0] if len(schedulers) == 1 else schedulers

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run backward in manual optimization, with the events around it.

        Args:
            loss: The loss, a scalar tensor.
            *args: Passed on to ``backward``.
            **kwargs: Passed on to ``backward``.

        Raises:
            MisconfigurationError: If the module optimizes automatically, if the loss is not a tensor, or if gradients are off.

        Example:
            >>> from eventtrain import Trainer
            >>> class Line(LightningModule, nn.Linear):
            ...     def training_step(self, batch, batch_idx):
            ...         self.manual_backward(self(batch).mean())
            ...         print(self.bias.grad)
            ...     def configure_optimizers(self):
            ...         return torch.optim.SGD(self.parameters(), lr=0.1)
            >>> line = Line(1, 1)
            >>> line.automatic_optimization = False
            >>> Trainer(max_epochs=1, default_callbacks=False, device="cpu").fit(line, [torch.ones(2, 1)])
            tensor([1.])
        """
        module = self.trainer.module  # a module within it has the mode of the run
        if module.automatic_optimization:
            raise MisconfigurationError(
                f"{type(self).__name__}.manual_backward was called in automatic optimization, where the trainer runs backward. "
                "Return the loss from training_step, or set self.automatic_optimization = False in __init__."
            )
        if not isinstance(loss, Tensor):
            raise MisconfigurationError(f"manual_backward takes the loss, a scalar tensor; it was given {loss!r}.")
        if not loss.requires_grad:
            check_grad_mode()
        backward(self.trainer.signals, module.backward, loss, loss, *args, **kwargs)

    def clip_gradients(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> Tensor | None:
        """Clip the gradients of an optimizer's parameters in place; with loss scaling they are unscaled first.

        Args:
            optimizer: One of the run's optimizers, wrapped or not.
            gradient_clip_val: The threshold, a positive number; None clips nothing.
            gradient_clip_algorithm: ``"norm"`` or ``"value"``; None for ``"norm"``.

        Returns:
            The total norm before clipping, a scalar tensor; None if nothing was clipped by norm.

        Raises:
            MisconfigurationError: If the threshold is not positive, or if the algorithm is unknown.

        Example:
            >>> weight = nn.Parameter(torch.zeros(2))
            >>> weight.grad = torch.tensor([3.0, 4.0])
            >>> LightningModule().clip_gradients(torch.optim.SGD([weight]), gradient_clip_val=1.0)
            tensor(5.)
            >>> weight.grad
            tensor([0.6000, 0.8000])
        """
        return self._in_run(optimizer).clip_gradients(gradient_clip_val, gradient_clip_algorithm)

    def toggle_optimizer(self, optimizer: Optimizer) -> None:
        """Let only one optimizer's parameters require gradients, until :meth:`untoggle_optimizer`.

        It changes the parameters of all optimizers of the run. Parameters that the user froze stay frozen.

        Args:
            optimizer: One of the run's optimizers.

        Raises:
            MisconfigurationError: If ``configure_optimizers`` did not return the optimizer.

        Example:
            >>> from eventtrain import Trainer
            >>> class Line(LightningModule, nn.Linear):
            ...     def training_step(self, batch, batch_idx):
            ...         of_weight, of_bias = self.optimizers()
            ...         self.toggle_optimizer(of_weight)
            ...         print(self.weight.requires_grad, self.bias.requires_grad)
            ...     def configure_optimizers(self):
            ...         return [torch.optim.SGD([parameter]) for parameter in (self.weight, self.bias)]
            >>> line = Line(1, 1)
            >>> line.automatic_optimization = False
            >>> Trainer(max_epochs=1, default_callbacks=False, device="cpu").fit(line, [torch.ones(2, 1)])
            True False
        """
        chosen = self._in_run(optimizer)
        toggles = self._toggle_stack()
        if not any(chosen is other for other in self.trainer.optimizers):
            raise MisconfigurationError(
                f"toggle_optimizer was given a {type(chosen.optimizer).__name__} that configure_optimizers did not return. "
                "Give one of self.optimizers()."
            )
        flags = {p: p.requires_grad for other in self.trainer.optimizers for p in other.parameters()}
        flags_of_user = toggles[0][1] if toggles else flags
        toggles.append((chosen, flags))
        for parameter in flags:
            parameter.requires_grad_(False)
        for parameter in chosen.parameters():
            parameter.requires_grad_(flags_of_user.get(parameter, flags[parameter]))

    def untoggle_optimizer(self, optimizer: Optimizer) -> None:
        """Restore the flags from before the matching :meth:`toggle_optimizer`; without one, do nothing.

        Args:
            optimizer: The optimizer that was toggled last.

        Raises:
            MisconfigurationError: If another optimizer was toggled since.

        Example:
            >>> from eventtrain import Trainer
            >>> class Line(LightningModule, nn.Linear):
            ...     def training_step(self, batch, batch_idx):
            ...         of_weight, of_bias = self.optimizers()
            ...         self.toggle_optimizer(of_weight)
            ...         self.untoggle_optimizer(of_weight)
            ...         print(self.weight.requires_grad, self.bias.requires_grad)
            ...     def configure_optimizers(self):
            ...         return [torch.optim.SGD([parameter]) for parameter in (self.weight, self.bias)]
            >>> line = Line(1, 1)
            >>> line.automatic_optimization = False
            >>> Trainer(max_epochs=1, default_callbacks=False, device="cpu").fit(line, [torch.ones(2, 1)])
            True True
        """
        toggles, chosen = self._toggle_stack(), self._in_run(optimizer)
        if not any(toggled is chosen for toggled, _ in toggles):
            return
        last, _ = toggles[-1]
        if last is not chosen:
            raise MisconfigurationError(
                f"untoggle_optimizer({type(chosen.optimizer).__name__}): {type(last.optimizer).__name__} was toggled after it. "
                "Untoggle that one first, or use `with self.toggled_optimizer(opt):`."
            )
        self.untoggle_all(len(toggles) - 1)

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer) -> Generator[None, None, None]:
        """Call :meth:`toggle_optimizer`, and restore the flags at the end of a ``with`` block, also after an error.

        Args:
            optimizer: One of the run's optimizers.

        Example:
            >>> from eventtrain import Trainer
            >>> class Line(LightningModule, nn.Linear):
            ...     def training_step(self, batch, batch_idx):
            ...         of_weight, of_bias = self.optimizers()
            ...         with self.toggled_optimizer(of_weight):
            ...             print(self.weight.requires_grad, self.bias.requires_grad)
            ...     def configure_optimizers(self):
            ...         return [torch.optim.SGD([parameter]) for parameter in (self.weight, self.bias)]
            >>> line = Line(1, 1)
            >>> line.automatic_optimization = False
            >>> Trainer(max_epochs=1, default_callbacks=False, device="cpu").fit(line, [torch.ones(2, 1)])
            True False
        """
        depth = len(self._toggle_stack())
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_all(depth)

    def untoggle_all(self, depth: int = 0) -> None:
        """Restore the flags of every optimizer that is toggled beyond a depth.

        Args:
            depth: The number of toggles that stay.

        Example:
            >>> LightningModule().untoggle_all()
        """
        toggles = self._toggle_stack()
        while len(toggles) > depth:
            for parameter, flag in toggles.pop()[1].items():
                parameter.requires_grad_(flag)

    def log(
        self, name: str, value: Any, prog_bar: bool = False, logger: bool | None = None,
        on_step: bool | None = None, on_epoch: bool | None = None, reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False, sync_dist: bool = False, sync_dist_group: Any = None, add_dataloader_idx: bool = True,
        batch_size: int | None = None, metric_attribute: str | None = None, rank_zero_only: bool = False,
    ) -> None:  # fmt: skip
        """Log a value.

        Args:
            name: The name of the value.
            value: A number, a scalar tensor, or a torchmetrics object.
            prog_bar: Whether the progress bar shows it.
            logger: Whether loggers get it; None for yes.
            on_step: Whether each step's value is kept; None: in training steps.
            on_epoch: Whether the epoch's reduction is kept, over each evaluation of a closure; None: everywhere else. With
                both, the values are called ``name_step`` and ``name_epoch``, and callbacks see the latest as ``name``.
            reduce_fx: ``"mean"`` (weighted by batch size), ``"min"``, ``"max"``, ``"sum"``, or torch's function of that name.
            sync_dist: Whether the value of a step is reduced over ranks; the value of an epoch always is.
            add_dataloader_idx: Whether ``/dataloader_idx_i`` is appended if there are several evaluation loaders. Without it,
                callbacks and loggers get one value for all loaders, and each dict of the results has its loader's own.
            batch_size: The weight in the mean; None for the first dimension of the first tensor anywhere in the batch, or, if
                there is none, the length of its lists.
            rank_zero_only: Whether ranks other than zero leave it out. The epoch's value is that of rank zero on all ranks.
            sync_dist_group: None: values are reduced over all ranks, and a group is an error.
            enable_graph, metric_attribute: Accepted for modules written for Lightning. Values are logged without their graph,
                as they are there, and a metric object needs no name.

        Raises:
            MisconfigurationError: If the value is not a scalar, if the name is logged with other options in the same place, if
                the hook belongs to no step and no epoch, or if the size of the batch is needed and unknown.

        Example:
            >>> from eventtrain import Trainer
            >>> class Model(LightningModule):
            ...     def test_step(self, batch, batch_idx):
            ...         self.log("mean", batch.mean())
            >>> Trainer(max_epochs=1, default_callbacks=False, device="cpu").test(Model(), [torch.ones(2), torch.zeros(2)])
            [{'mean': 0.5}]
        """
        trainer = self.__dict__.get("_trainer")
        if trainer is None:
            warnings.warn(f"{type(self).__name__}.log({name!r}, ...) without a trainer: the value is lost.", stacklevel=2)
            return
        metrics = trainer.run_state.metrics
        if rank_zero_only or sync_dist_group is not None:
            metrics.check_processes(name, value, sync_dist_group)
            if rank_zero_only and not trainer.is_global_zero:
                return
            sync_dist = sync_dist and not rank_zero_only  # the other processes would not take part
        options = (prog_bar, logger is not False, on_step, on_epoch, reduce_fx, sync_dist)
        metrics.log(name, value, options, batch_size, add_dataloader_idx)

    def log_dict(self, dictionary: Mapping[str, Any] | LoggableMetric, **options: Any) -> None:
        """Log several values with the same options.

        Args:
            dictionary: The values by name; a collection of metric objects; or a metric object whose ``compute`` gives a
                mapping.
            **options: As for :meth:`log`.

        Raises:
            MisconfigurationError: If ``dictionary`` is nothing of this kind.

        Example:
            >>> from eventtrain import Trainer
            >>> class Model(LightningModule):
            ...     def test_step(self, batch, batch_idx):
            ...         self.log_dict({"low": batch.min(), "high": batch.max()})
            >>> Trainer(max_epochs=1, default_callbacks=False, device="cpu").test(Model(), [torch.tensor([0.0, 1.0])])
            [{'low': 0.0, 'high': 1.0}]
        """
        values: Any = named_values(dictionary) if is_loggable_metric(dictionary) else dictionary
        if not hasattr(values, "items"):
            raise MisconfigurationError(f"self.log_dict takes a mapping of names to values; it was given {_short(values)}.")
        for name, value in values.items():
            self.log(name, value, **options)

    def freeze(self) -> None:
        """Turn off the gradients of all parameters, and training mode.

        Example:
            >>> class Line(LightningModule, nn.Linear): ...
            >>> line = Line(1, 1)
            >>> line.freeze()
            >>> line.weight.requires_grad, line.training
            (False, False)
        """
        self.requires_grad_(False)
        self.eval()

    def unfreeze(self) -> None:
        """Turn on the gradients of all parameters, and training mode.

        Example:
            >>> class Line(LightningModule, nn.Linear): ...
            >>> line = Line(1, 1)
            >>> line.freeze()
            >>> line.unfreeze()
            >>> line.weight.requires_grad, line.training
            (True, True)
        """
        self.requires_grad_(True)
        self.train()

    @of_class
    def load_from_checkpoint(
        cls: type[Self],
        checkpoint_path: StrPath,
        map_location: Any = None,
        hparams_file: StrPath | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build a module from a checkpoint, with the hyperparameters that it holds. Call it on the class.

        Args:
            checkpoint_path: The file.
            map_location: The device of the tensors and of the module, as in :func:`torch.load`; None for the CPU.
            hparams_file: A ``.yaml`` or ``.json`` file of hyperparameters to use instead of those of the checkpoint.
            strict: Whether the file has to have exactly the weights of the module; None for its ``strict_loading``.
            weights_only: False reads a file that holds more than tensors and plain values, and runs code in it: only for
                files that you trust.
            **kwargs: Arguments of ``__init__`` that replace or complete the saved ones.

        Returns:
            The module, in training mode.

        Raises:
            OSError: If the file cannot be opened.
            MisconfigurationError: If the file is not a checkpoint, is damaged, or has the weights of another module; or if
                ``__init__`` needs an argument that the checkpoint does not hold, or takes no such argument.

        Example:
            >>> import tempfile
            >>> class Line(LightningModule, nn.Linear): ...
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     torch.save({"state_dict": Line(1, 1).state_dict()}, f"{folder}/line.ckpt")
            ...     loaded = Line.load_from_checkpoint(f"{folder}/line.ckpt", in_features=1, out_features=1)
            >>> loaded.training
            True
        """
        path = check_path(checkpoint_path, f"{cls.__name__}.load_from_checkpoint", "checkpoint_path")
        content = read_checkpoint(path, map_location, weights_only=weights_only is not False)
        module: Self = build(cls, content, hparams_file, kwargs)
        for hook, arguments in (("configure_model", ()), ("on_load_checkpoint", (content,))):
            if getattr(module, hook) is not None:
                getattr(module, hook)(*arguments)
        weights = content["state_dict"].values()
        module.to(next((value.device for value in weights if isinstance(value, Tensor)), None))
        load_weights(module, content, checkpoint_path, strict)
        return module

    # ------------------------------------------------------------------ internals

    def _in_run(self, optimizer: Optimizer) -> LightningOptimizer:
        """Return the run's wrapper of an optimizer; a wrapper that takes part in no run if the run has none."""
        if isinstance(optimizer, LightningOptimizer):
            return optimizer
        if not isinstance(optimizer, Optimizer):
            raise MisconfigurationError(
                f"{type(self).__name__} was given {_short(optimizer)} where an optimizer is expected. Give one of "
                "self.optimizers()."
            )
        trainer = self.__dict__.get("_trainer")
        for wrapper in trainer.optimizers if trainer is not None else ():
            if wrapper.optimizer is optimizer:
                match: LightningOptimizer = wrapper
                return match
        return LightningOptimizer(optimizer)

    def _toggle_stack(self) -> list[tuple[LightningOptimizer, dict[Tensor, bool]]]:
        trainer = self.__dict__.get("_trainer")
        owner = self if trainer is None else trainer.module  # which may be a module around this one
        stack: list[tuple[LightningOptimizer, dict[Tensor, bool]]] = owner.__dict__.setdefault("_toggles", [])
        return stack

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a module leaves its trainer behind. As torch does, it also drops the result of module.compile(), which
        # would compute with the weights of the original.
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {name: value for name, value in state.items() if name not in ("_trainer", "_toggles")}


def _short(value: Any) -> str:
    """Return the text of a value for a message; its type if the text is long."""
    text = repr(value)
    return f"{text} ({type(value).__name__})" if len(text) < 40 else f"a {type(value).__name__}"
