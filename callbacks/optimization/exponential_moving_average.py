"""An exponential moving average of the weights, for evaluation."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import get_ema_multi_avg_fn

from eventtrain._torch import tensors_of
from eventtrain.callback import Callback
from eventtrain.callbacks.saved_state import items
from eventtrain.checkpoint import storage
from eventtrain.checkpoint.weights import load_weights
from eventtrain.checks import check_number, check_option
from eventtrain.errors import MisconfigurationError
from eventtrain.events import AfterUpdate, LoadCheckpoint, SaveCheckpoint, Setup, Teardown, ValidationStart
from eventtrain.paths import check_path
from eventtrain.trainer import Trainer


class ExponentialMovingAverage(Callback):
    """Averages the weights over a run's updates, and lets evaluation use the averages.

    Listens to ``after_update``, which follows only real updates: ``average = decay * average + (1 - decay) * weight``, with
    the bits of :class:`torch.optim.swa_utils.AveragedModel`. The averages start as the weights after the first update. The
    averages of weights under 32 bits are kept in float32. A lazy module that has not run by then is not averaged. A step
    reads nothing from the device.

    If the module that was trained is validated, tested or used for predictions, during a fit or after it, the averages are
    copied into it at ``validation_start``, ``test_start`` and ``predict_start``. The raw weights come back when that phase
    ends, even by an error or an interruption. During the phase there are three copies of the weights. Each tensor stays the
    object that optimizers and compiled code know. A fit ends with the raw weights; :meth:`copy_into` replaces them.

    A checkpoint has the raw weights as ``state_dict``, even if it is written during an evaluation (``save_checkpoint``), and
    the averages as this callback's state. An evaluation with ``ckpt_path`` uses the averages in the file
    (``load_checkpoint``), and :meth:`load_into` loads them without a trainer. Also listens to ``setup`` and ``teardown``.
    Emits no metrics. Override :meth:`decay_at` for a schedule, and :meth:`is_averaged` to leave weights out.

    Args:
        decay: The part of the average that stays at an update, from 0 to 1.
        warmup: Limit the decay of update n to ``(1 + n) / (10 + n)``, so that early averages follow the weights closely.
        buffers: With ``"average"`` evaluation uses the averages of floating buffers, such as BatchNorm's statistics, and with
            ``"copy"`` the raw buffers. Integer buffers, and masks (buffers that hold infinities or NaNs when the averages
            start), are always used as they are.

    Raises:
        MisconfigurationError: If the decay is not from 0 to 1, or an option is unknown.

    Attributes:
        averages: The averages by the names of parameters and buffers; empty before the first update.

    Example:
        >>> from eventtrain import Trainer
        >>> class StartLate(ExponentialMovingAverage):
        ...     def decay_at(self, trainer):
        ...         return 0.0 if trainer.global_step < 100 else self.decay
        >>> ema = StartLate(0.99)
        >>> trainer = Trainer(max_epochs=1, callbacks=[ema])
        >>> ema.decay_at(trainer), ema.averages
        (0.0, {})
    """

    role = "weight_averaging"  # with two of them, evaluation would use the averages of one only

    def __init__(self, decay: float = 0.999, *, warmup: bool = False, buffers: Literal["average", "copy"] = "average") -> None:
        check_number(decay, "ExponentialMovingAverage", "decay", least=0, most=1)
        self.decay = decay
        self.warmup = warmup
        self.buffers = check_option(buffers, "ExponentialMovingAverage", "buffers", ("average", "copy"))
        self.averages: dict[str, Tensor] = {}
        self._module: nn.Module | None = None  # the module that was averaged
        # Dicts of submodules, and keys in them: other code may put another tensor there.
        self._places: list[tuple[dict[str, Tensor | None], str]] = []
        self._raw: list[tuple[Tensor, Tensor]] = []  # during an evaluation: tensors, and their values before it

    def decay_at(self, trainer: Trainer) -> float:
        """Return the decay of the current update: a policy, which a subclass may override.

        Args:
            trainer: The trainer; its ``global_step`` counts the update already.

        Returns:
            A number from 0 to 1.
        """
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + trainer.global_step) / (10 + trainer.global_step))

    def is_averaged(self, name: str, tensor: Tensor) -> bool:
        """Return whether a parameter or a floating buffer is averaged: a policy, which a subclass may override.

        Called when the averages start. Evaluation uses all other tensors as they are. ``return tensor.requires_grad`` saves
        memory if few parameters are trained.

        Args:
            name: The tensor's name in the module.
            tensor: The parameter or buffer.
        """
        # The average of an infinity with itself is NaN.
        return isinstance(tensor, nn.Parameter) or (self.buffers == "average" and bool(tensor.isfinite().all()))

    # ------------------------------------------------------------------ training

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        if event.stage == "fit":
            self.averages, self._module = {}, trainer.module

    def on_after_update(self, trainer: Trainer, event: AfterUpdate) -> None:
        if not self._places:
            self._begin(trainer.module)
        averages = list(self.averages.values())
        weights: list[Any] = [holder[key] for holder, key in self._places]
        weights = [w if w.dtype is a.dtype else w.to(a.dtype) for w, a in zip(weights, averages, strict=True)]
        update = get_ema_multi_avg_fn(self.decay_at(trainer))  # type: ignore[no-untyped-call]
        update(averages, weights, None)

    def _begin(self, module: nn.Module) -> None:
        """Start the averages, or continue those of a checkpoint."""
        if not self.averages:
            for name, tensor in named_tensors(module).items():
                if (tensor.is_floating_point() or tensor.is_complex()) and self.is_averaged(name, tensor):
                    dtype = torch.float32 if tensor.itemsize < 4 else tensor.dtype
                    self.averages[name] = tensor.detach().to(dtype, copy=True)
        for name, tensor in matching(module, self.averages).items():
            self.averages[name] = self.averages[name].to(tensor.device)
            path, _, key = name.rpartition(".")
            self._places.append((tensors_of(module.get_submodule(path), key), key))

    # ------------------------------------------------------------------ evaluation

    def on_validation_start(self, trainer: Trainer, event: ValidationStart) -> None:
        if self.averages and trainer.module is self._module:
            event.enter(self._swapped_into(trainer.module))

    on_test_start = on_predict_start = on_validation_start

    @contextmanager
    def _swapped_into(self, module: nn.Module) -> Generator[None, None, None]:
        self._raw = [(tensor, tensor.detach().clone()) for tensor in matching(module, self.averages).values()]
        try:
            copy_averages(self.averages, module)
            yield
        finally:
            self._put_back()

    def _put_back(self) -> None:
        with torch.no_grad():
            for tensor, raw in self._raw:
                tensor.copy_(raw)
        self._raw = []

    def copy_into(self, module: nn.Module) -> None:
        """Replace a module's weights by the averages.

        Args:
            module: The module that was trained, or one that was built like it.

        Raises:
            MisconfigurationError: If there are no averages, or the module has no tensors with their names and shapes.
        """
        copy_averages(self.averages, module)

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        self._put_back()  # if an interrupt came while weights were put back
        self._places.clear()

    # ------------------------------------------------------------------ checkpoints

    @classmethod
    def load_into(cls, module: nn.Module, path: str | os.PathLike[str]) -> None:
        """Load a checkpoint for inference: the averages, and the raw values of tensors that were not averaged.

        Args:
            module: A module that was built like the one that was trained.
            path: The file.

        Raises:
            MisconfigurationError: If the file cannot be read, or has no averages of such a module.
        """
        content = storage.read(check_path(path, f"{cls.__name__}.load_into", "path"))
        states = content.get("callbacks", {})
        if cls.__qualname__ not in states:
            raise MisconfigurationError(
                f"{path} has no averages of {cls.__qualname__}, only the state of {sorted(states)}. Call load_into "
                "of the class that was attached, or load the raw weights with load_from_checkpoint."
            )
        load_weights(module, content, path)
        copy_averages(states[cls.__qualname__]["averages"], module)

    def on_load_checkpoint(self, trainer: Trainer, event: LoadCheckpoint) -> None:
        if trainer.stage != "fit":  # only the module is restored, with weights that were not averaged here
            self.load_state_dict(event.checkpoint.get("callbacks", {}).get(self.state_key, {"averages": {}}))
            self._module = trainer.module

    def on_save_checkpoint(self, trainer: Trainer, event: SaveCheckpoint) -> None:
        if not self._raw:
            return
        raw, state = {id(tensor): value for tensor, value in self._raw}, event.checkpoint["state_dict"]
        named = trainer.module.state_dict(keep_vars=True)
        state.update({name: raw[id(named[name])] for name in state if name in named and id(named[name]) in raw})

    def state_dict(self) -> dict[str, Any]:
        return {"averages": dict(self.averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        averages = items(state, "averages", lambda name, average: isinstance(average, Tensor), "a tensor for each name")
        self.averages = {name: average.clone() for name, average in averages.items()}


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and buffers by name; a shared tensor only has its first name.

    Those of lazy modules that no forward has initialized yet are left out.
    """
    module.state_dict(keep_vars=True)  # torch then frees the whole weights that a sharded module may have gathered
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if not is_lazy(tensor)}


def matching(module: nn.Module, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a module that have averages, by name.

    Args:
        module: The module.
        averages: The averages by name.

    Raises:
        MisconfigurationError: If there are no averages, or the module does not have all of those tensors.
    """
    if not averages:
        raise MisconfigurationError(
            "ExponentialMovingAverage has no averages yet: they start at the first update of a fit. Call fit before."
        )
    tensors = named_tensors(module)
    missing = [name for name, value in averages.items() if name not in tensors or tensors[name].shape != value.shape]
    if missing:
        raise MisconfigurationError(
            f"ExponentialMovingAverage: {type(module).__name__} has no tensors with the names and shapes of the averages "
            f"{missing}. Give the module that was trained, or one that was built like it."
        )
    return {name: tensors[name] for name in averages}


def copy_averages(averages: Mapping[str, Tensor], module: nn.Module) -> None:
    """Copy averages into the tensors of a module that have their names; see :func:`matching`."""
    with torch.no_grad():
        for name, tensor in matching(module, averages).items():
            tensor.copy_(averages[name])
