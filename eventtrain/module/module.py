"""What the user subclasses: the module, and the datamodule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from itertools import chain
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eventtrain.checkpoint import storage
from eventtrain.core.closure import backward
from eventtrain.core.optimizer import LightningOptimizer
from eventtrain.data.device import move_to_device
from eventtrain.errors import MisconfigurationError
from eventtrain.module.hooks import ModuleHooks
from eventtrain.module.hparams import HyperparametersMixin

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer

Self = TypeVar("Self", bound="LightningModule")


class DataHooks:
    """The methods that modules and datamodules share: loaders, and the transfer of batches."""

    def prepare_data(self) -> None:
        """Downloads and the like: called once, before :meth:`setup`."""

    def setup(self, stage: str) -> None:
        """Builds what depends on data or stage.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        """

    def train_dataloader(self) -> Any:
        """The training loader; None where it is given to ``fit``."""

    def val_dataloader(self) -> Any:
        """The validation loader, or a list of them."""

    def test_dataloader(self) -> Any:
        """The test loader, or a list of them."""

    def predict_dataloader(self) -> Any:
        """The prediction loader, or a list of them."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Changes a batch before it is moved; returns it."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves a batch; returns it."""
        return move_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Changes a batch after it was moved; returns it."""
        return batch


class LightningDataModule(DataHooks, HyperparametersMixin):
    """The loaders' half of a module.

    Attributes:
        trainer: The trainer that runs it, None outside of a run.
    """

    trainer: Trainer | None = None

    def teardown(self, stage: str) -> None:
        """Releases what :meth:`setup` acquired."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the datamodule."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""


class LightningModule(DataHooks, ModuleHooks, HyperparametersMixin, nn.Module):
    """A model with its steps, its optimizers, and whatever hooks it overrides.

    Attributes:
        automatic_optimization: Whether the trainer zeroes, runs backward and steps. Set it to False in
            ``__init__`` for manual optimization.
        example_input_array: An input of ``forward``, for loggers that draw the graph.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization: bool = True
        self.example_input_array: Any = None

    # ------------------------------------------------------------------ what the run is

    @property
    def trainer(self) -> Trainer:
        """The trainer that runs the module, or ran it last.

        Raises:
            MisconfigurationError: None has yet.
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
        # Past nn.Module's registration: a trainer is no part of the model.
        self.__dict__["_trainer"] = trainer

    @property
    def current_epoch(self) -> int:
        """The index of the epoch at hand, from 0; 0 without a trainer."""
        trainer = self.__dict__.get("_trainer")
        return trainer.current_epoch if trainer is not None else 0

    @property
    def global_step(self) -> int:
        """Batches of the run in which something was updated; 0 without a trainer."""
        trainer = self.__dict__.get("_trainer")
        return trainer.global_step if trainer is not None else 0

    @property
    def global_rank(self) -> int:
        """This process's index among all; 0 without a trainer."""
        trainer = self.__dict__.get("_trainer")
        return trainer.global_rank if trainer is not None else 0

    @property
    def local_rank(self) -> int:
        """This process's index on its machine; 0 without a trainer."""
        trainer = self.__dict__.get("_trainer")
        return trainer.processes.local_rank if trainer is not None else 0

    @property
    def device(self) -> torch.device:
        """Where the parameters are; for a module without any, the CPU."""
        first = next(chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters; for a module without any, torch's default."""
        first = next(self.parameters(), None)
        return torch.get_default_dtype() if first is None else first.dtype

    @property
    def logger(self) -> Any:
        """The first attached logger, whose ``experiment`` is its writer; None where there is none."""
        return next(iter(self.trainer.loggers), None)

    @property
    def loggers(self) -> list[Any]:
        """All attached loggers."""
        return self.trainer.loggers

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints on rank zero, above a progress bar where there is one."""
        trainer = self.__dict__.get("_trainer")
        (print if trainer is None else trainer.print)(*args, **kwargs)

    # ------------------------------------------------------------------ what a module defines

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the loss of a batch.

        Called as ``training_step(batch, batch_idx)``.

        Returns:
            The loss, a scalar tensor; a mapping with ``"loss"`` and perhaps ``"weight"``; or None for a
            batch without a loss. In manual optimization, anything of these or nothing.
        """
        raise MisconfigurationError(f"{type(self).__name__} has no training_step(self, batch, batch_idx). Define it.")

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates a validation batch: ``validation_step(batch, batch_idx, dataloader_idx=0)``."""

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates a test batch: ``test_step(batch, batch_idx, dataloader_idx=0)``."""

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts on a batch: ``predict_step(batch, batch_idx, dataloader_idx=0)``. By default ``self(batch)``."""
        return self(args[0])

    def configure_optimizers(self) -> Any:
        """Returns optimizers and schedulers; for the forms see :data:`eventtrain.optim.lr_scheduler.FORMS`.

        None trains nothing, with a warning. Automatic optimization has to have it defined.
        """

    def configure_callbacks(self) -> Any:
        """Callbacks that the module brings, attached after the trainer's for the length of the run."""
        return []

    def configure_model(self) -> None:
        """Builds large layers, once per run, after :meth:`setup`."""

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: LightningOptimizer, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Steps the optimizer, in automatic optimization, in each batch that closes a window.

        Args:
            epoch: The epoch's index.
            batch_idx: The batch's index in the epoch.
            optimizer: The optimizer; ``optimizer.optimizer`` is the wrapped one.
            optimizer_closure: Runs ``training_step``, ``zero_grad`` and ``backward``. An override has to
                run it, by ``optimizer.step(closure=optimizer_closure)`` or by a call.
        """
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: LightningOptimizer) -> None:
        """Zeroes the gradients, in automatic optimization, in each batch that opens a window."""
        optimizer.zero_grad()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Runs backward.

        Args:
            loss: The loss, scaled for the window and the precision.
            *args: What ``manual_backward`` was given.
            **kwargs: What ``manual_backward`` was given.
        """
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Steps a scheduler. Override it for schedulers whose ``step`` is not torch's.

        Args:
            scheduler: The scheduler.
            metric: The monitored value; None where the scheduler monitors nothing.
        """
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def configure_gradient_clipping(
        self,
        optimizer: LightningOptimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips, in automatic optimization, before each update, clipping callbacks attached or not.

        Args:
            optimizer: The optimizer.
            gradient_clip_val: The threshold that a policy wrote; None where there is none.
            gradient_clip_algorithm: ``"norm"`` or ``"value"``; None where there is no policy.
        """
        self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm)

    # ------------------------------------------------------------------ what a module calls

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The run's optimizer, or the list of them where there are several.

        Args:
            use_pl_optimizer: Whether they come wrapped; the wrapped ones themselves where False.
        """
        given: list[Any] = list(self.trainer.optimizers)
        if not use_pl_optimizer:
            given = [optimizer.optimizer for optimizer in given]
        return given[0] if len(given) == 1 else given

    def lr_schedulers(self) -> Any:
        """The run's scheduler, or the list of them where there are several; None where there is none."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if not schedulers:
            return None
        return schedulers[0] if len(schedulers) == 1 else schedulers

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Runs backward in manual optimization, with the events around it.

        Args:
            loss: The loss, a scalar tensor.
            *args: Passed on to ``backward``.
            **kwargs: Passed on to ``backward``.

        Raises:
            MisconfigurationError: The module optimizes automatically, or the loss is no tensor.
        """
        if self.automatic_optimization:
            raise MisconfigurationError(
                f"{type(self).__name__}.manual_backward was called in automatic optimization, where the trainer runs backward. "
                "Return the loss from training_step, or set self.automatic_optimization = False in __init__."
            )
        if not isinstance(loss, Tensor):
            raise MisconfigurationError(f"manual_backward takes the loss, a scalar tensor; it was given {loss!r}.")
        backward(self.trainer.signals, self.backward, loss, loss, *args, **kwargs)

    def clip_gradients(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> Tensor | None:
        """Clips the gradients of an optimizer's parameters in place; under loss scaling, unscaled first.

        Args:
            optimizer: One of the run's optimizers, wrapped or not.
            gradient_clip_val: The threshold, a positive number; None clips nothing.
            gradient_clip_algorithm: ``"norm"`` (where None) or ``"value"``.

        Returns:
            The total norm before clipping, a scalar tensor; None where nothing was clipped by norm.

        Raises:
            MisconfigurationError: The threshold is not positive, or the algorithm is unknown.
        """
        return self._in_run(optimizer).clip_gradients(gradient_clip_val, gradient_clip_algorithm)

    def toggle_optimizer(self, optimizer: Optimizer) -> None:
        """Makes an optimizer's parameters the only ones of all optimizers that need gradients, until
        :meth:`untoggle_optimizer`. Those that the user froze stay frozen.

        Args:
            optimizer: One of the run's optimizers.
        """
        chosen = self._in_run(optimizer)
        toggles = self._toggle_stack()
        if not any(chosen is other for other in self.trainer.optimizers):
            raise MisconfigurationError(
                f"toggle_optimizer was given a {type(chosen.optimizer).__name__} that configure_optimizers did not return. "
                "Give one of self.optimizers()."
            )
        flags = {p: p.requires_grad for other in self.trainer.optimizers for p in other.parameters()}
        users_own = toggles[0][1] if toggles else flags
        toggles.append((chosen, flags))
        for parameter in flags:
            parameter.requires_grad_(False)
        for parameter in chosen.parameters():
            parameter.requires_grad_(users_own.get(parameter, flags[parameter]))

    def untoggle_optimizer(self, optimizer: Optimizer) -> None:
        """Restores the flags as the matching :meth:`toggle_optimizer` found them; without one, does nothing.

        Args:
            optimizer: The optimizer that was toggled last.

        Raises:
            MisconfigurationError: Another optimizer was toggled since.
        """
        toggles, chosen = self._toggle_stack(), self._in_run(optimizer)
        if not any(toggled is chosen for toggled, _ in toggles):
            return
        last, flags = toggles[-1]
        if last is not chosen:
            raise MisconfigurationError(
                f"untoggle_optimizer({type(chosen.optimizer).__name__}): {type(last.optimizer).__name__} was toggled after it. "
                "Untoggle that one first, or use `with self.toggled_optimizer(opt):`."
            )
        toggles.pop()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer) -> Generator[None, None, None]:
        """:meth:`toggle_optimizer` for the length of a ``with`` block, also where it raises."""
        depth = len(self._toggle_stack())
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_all(depth)

    def untoggle_all(self, depth: int = 0) -> None:
        """Restores the flags of every toggle that is open beyond a depth."""
        toggles = self._toggle_stack()
        while len(toggles) > depth:
            for parameter, flag in toggles.pop()[1].items():
                parameter.requires_grad_(flag)

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Logs a value.

        Args:
            name: Its name.
            value: A number, a scalar tensor, or a torchmetrics object.
            prog_bar: Whether the progress bar shows it.
            logger: Whether loggers get it; None: they do.
            on_step: Whether each step's value is kept; None: in training steps.
            on_epoch: Whether the epoch's reduction is kept; None: everywhere else. It takes in each evaluation of a
                closure, of which LBFGS has several in a batch. With both, the values are
                called ``name_step`` and ``name_epoch``, and callbacks see the latest as ``name``.
            reduce_fx: ``"mean"`` (weighted by batch size), ``"min"``, ``"max"``, ``"sum"``, or torch's function of
                that name.
            enable_graph: Lightning's; values are always detached here.
            sync_dist: Whether the value of a step is reduced over ranks; that of an epoch always is.
            sync_dist_group: Lightning's; all ranks take part here.
            add_dataloader_idx: With several evaluation loaders, whether ``/dataloader_idx_i`` is appended.
            batch_size: The weight in the mean; None: the first dimension of the batch's first tensor.
            metric_attribute: Lightning's; a torchmetrics object is known by itself here.
            rank_zero_only: Whether ranks other than zero leave it out.

        Raises:
            MisconfigurationError: The value is no scalar; the name is logged with other options; or the
                hook is one in which a value belongs to no step and no epoch.
        """
        trainer = self.__dict__.get("_trainer")
        if trainer is None:
            warnings.warn(f"{type(self).__name__}.log({name!r}, ...) without a trainer: the value goes nowhere.", stacklevel=2)
            return
        if rank_zero_only and not trainer.is_global_zero:
            return
        trainer.metrics.log(
            name, value, prog_bar, logger is not False, on_step, on_epoch, reduce_fx, sync_dist, batch_size, add_dataloader_idx
        )

    def log_dict(self, dictionary: Mapping[str, Any], **options: Any) -> None:
        """Logs several values with the same options.

        Args:
            dictionary: The values by name.
            **options: As for :meth:`log`.
        """
        if not hasattr(dictionary, "items"):  # a collection of torchmetrics is no Mapping
            raise MisconfigurationError(f"self.log_dict takes a mapping of names to values; it was given {_short(dictionary)}.")
        for name, value in dictionary.items():
            self.log(name, value, **options)

    def freeze(self) -> None:
        """Turns off the gradients of all parameters, and training mode."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.eval()

    def unfreeze(self) -> None:
        """Turns on the gradients of all parameters, and training mode."""
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        self.train()

    @classmethod
    def load_from_checkpoint(
        cls: type[Self],
        checkpoint_path: str | PathLike[str],
        map_location: Any = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Builds a module from a checkpoint, with the hyperparameters that it kept.

        Args:
            checkpoint_path: The file.
            map_location: Where tensors go, as in :func:`torch.load`; the CPU where None.
            strict: Whether the keys of the state dict have to match.
            **kwargs: Arguments of ``__init__`` that replace or complete the kept ones.

        Returns:
            The module, in training mode.
        """
        content = storage.read(checkpoint_path, map_location=map_location)
        arguments = storage.init_arguments(cls, {**content.get("hyper_parameters", {}), **kwargs})
        module = cls(**arguments)
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"], strict=strict)
        return module

    # ------------------------------------------------------------------ what stays behind

    def _in_run(self, optimizer: Optimizer) -> LightningOptimizer:
        """The run's wrapper of an optimizer; a wrapper outside of the run where it has none."""
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
                found: LightningOptimizer = wrapper
                return found
        return LightningOptimizer(optimizer)

    def _toggle_stack(self) -> list[tuple[LightningOptimizer, dict[Tensor, bool]]]:
        stack: list[tuple[LightningOptimizer, dict[Tensor, bool]]] = self.__dict__.setdefault("_toggles", [])
        return stack

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a module does not take its trainer along; nor, as torch has it, what module.compile() made, which would
        # go on computing with the original's weights.
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {name: value for name, value in state.items() if name not in ("_trainer", "_toggles")}


def _short(value: Any) -> str:
    """A value for a message: itself where that is short, else its type."""
    text = repr(value)
    return f"{text} ({type(value).__name__})" if len(text) < 40 else f"a {type(value).__name__}"


def overridden(instance: Any, name: str, *bases: type) -> bool:
    """Whether an object has its own version of a method of one of its bases.

    Args:
        instance: The object.
        name: The method's name.
        *bases: Where the default version may stand.
    """
    if name in getattr(instance, "__dict__", {}):
        return True
    own = getattr(type(instance), name, None)
    return own is not None and all(own is not getattr(base, name, None) for base in bases)
