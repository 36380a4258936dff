"""An exponential moving average of the weights, which evaluation uses."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from eventtrain.callback import Callback
from eventtrain.checkpoint import storage
from eventtrain.errors import MisconfigurationError
from eventtrain.events import AfterUpdate, LoadCheckpoint, SaveCheckpoint, Setup, Teardown, ValidationStart
from eventtrain.trainer import Trainer


class ExponentialMovingAverage(Callback):
    """Averages the weights over a run's updates, and lets evaluation use the averages.

    Listens to ``after_update``, which follows real updates alone: ``average = decay * average + (1 - decay) * weight``, with
    the bits of :class:`torch.optim.swa_utils.AveragedModel`. The averages begin as the weights after the first update. Those
    of weights under 32 bits are kept in float32. Nothing is read from the device in a step.

    Validation, test and prediction of the module that was trained use the averages, inside of a fit and after it: they are
    copied into the module at ``validation_start``, ``test_start`` and ``predict_start``, and the raw weights come back when
    that phase ends, also by an error or an interruption. Meanwhile there are three copies of the weights. Each tensor stays
    the one that optimizers and compiled code know. A fit ends with the raw weights; :meth:`copy_into` replaces them.

    A checkpoint holds raw weights as ``state_dict``, also one that is written in an evaluation (``save_checkpoint``), and the
    averages as this callback's state. An evaluation with ``ckpt_path`` uses the file's averages (``load_checkpoint``), and
    :meth:`load_into` loads them without a trainer. Also listens to ``setup`` and ``teardown``. Emits nothing. Override
    :meth:`decay_at` for a schedule, and :meth:`is_averaged` to leave weights out.

    Args:
        decay: How much of the average stays at an update, from 0 to 1.
        warmup: Whether the decay of the n-th update is at most ``(1 + n) / (10 + n)``, so that early averages follow closely.
        buffers: What evaluation uses of floating buffers such as BatchNorm's statistics: their ``"average"``, or, with
            ``"copy"``, the raw ones. Integer buffers, and those that hold infinities or NaNs when the averages begin (masks),
            are always used as they are.

    Raises:
        MisconfigurationError: A decay outside of 0 to 1, or an unknown option.

    Attributes:
        averages: The averages by the names of parameters and buffers; empty before the first update.
    """

    role = "weight_averaging"  # of two the later would evaluate, and the other be forgotten

    def __init__(self, decay: float = 0.999, *, warmup: bool = False, buffers: Literal["average", "copy"] = "average") -> None:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
            raise MisconfigurationError(f"ExponentialMovingAverage(decay={decay!r}): it has to be a number from 0 to 1.")
        if buffers not in ("average", "copy"):
            raise MisconfigurationError(f"ExponentialMovingAverage(buffers={buffers!r}): it has to be 'average' or 'copy'.")
        self.decay = decay
        self.warmup = warmup
        self.buffers = buffers
        self.averages: dict[str, Tensor] = {}
        self._module: nn.Module | None = None  # whose averages they are
        # Where the module keeps what is averaged, as a submodule's dict and a key: code may put another tensor there.
        self._places: list[tuple[dict[str, Any], str]] = []
        self._raw: list[tuple[Tensor, Tensor]] = []  # in an evaluation: tensors, and what they held before it

    def decay_at(self, trainer: Trainer) -> float:
        """The policy: the decay of the update that ``trainer.global_step`` has just counted."""
        updates = trainer.progress.global_step
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    def is_averaged(self, name: str, tensor: Tensor) -> bool:
        """The policy: whether a parameter or a floating buffer is averaged; else it is used as it is.

        Asked when the averages begin. ``return tensor.requires_grad`` saves memory where few parameters are trained.

        Args:
            name: Its name.
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
        tensors = [owner[key] for owner, key in self._places]
        weights = [t if t.dtype is a.dtype else t.to(a.dtype) for t, a in zip(tensors, averages, strict=True)]
        update = get_ema_multi_avg_fn(self.decay_at(trainer))  # type: ignore[no-untyped-call]
        update(averages, weights, None)

    def _begin(self, module: nn.Module) -> None:
        """Begins the averages, or goes on with those of a checkpoint."""
        if not self.averages:
            for name, tensor in named_tensors(module).items():
                if (tensor.is_floating_point() or tensor.is_complex()) and self.is_averaged(name, tensor):
                    dtype = torch.float32 if tensor.itemsize < 4 else tensor.dtype
                    self.averages[name] = tensor.detach().to(dtype, copy=True)
        for name, tensor in matching(module, self.averages).items():
            self.averages[name] = self.averages[name].to(tensor.device)
            path, _, key = name.rpartition(".")
            owner = module.get_submodule(path)
            self._places.append((owner._parameters if key in owner._parameters else owner._buffers, key))

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
        """Replaces a module's weights by the averages.

        Args:
            module: The module that was trained, or one like it.

        Raises:
            MisconfigurationError: There are no averages, or the module has no tensors of their names and shapes.
        """
        copy_averages(self.averages, module)

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        self._put_back()  # where an interrupt came while weights were put back
        self._places.clear()

    # ------------------------------------------------------------------ checkpoints

    @classmethod
    def load_into(cls, module: nn.Module, path: str | os.PathLike[str]) -> None:
        """Loads a checkpoint for inference: its averages, and what was not averaged as it was.

        Args:
            module: A module like the one that was trained.
            path: The file.

        Raises:
            MisconfigurationError: The file cannot be read, or holds no averages of such a module.
        """
        content = storage.read(path)
        states = content.get("callbacks", {})
        if cls.__qualname__ not in states:
            raise MisconfigurationError(
                f"{os.fspath(path)} holds no averages of {cls.__qualname__}; there is the state of {sorted(states)}. Call "
                "load_into of the class that was attached, or load the raw weights with load_from_checkpoint."
            )
        module.load_state_dict(content["state_dict"])
        copy_averages(states[cls.__qualname__]["averages"], module)

    def on_load_checkpoint(self, trainer: Trainer, event: LoadCheckpoint) -> None:
        if trainer.stage != "fit":  # then the module alone is restored, with weights that are not those averaged here
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
        self.averages = {name: average.clone() for name, average in state["averages"].items()}


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers by name; what is shared has its first name alone."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def matching(module: nn.Module, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a module that averages are of, by name.

    Raises:
        MisconfigurationError: There are no averages, or the module has not all of those tensors.
    """
    if not averages:
        raise MisconfigurationError("ExponentialMovingAverage has no averages: they begin with the first update of a fit.")
    tensors = named_tensors(module)
    missing = [name for name, value in averages.items() if name not in tensors or tensors[name].shape != value.shape]
    if missing:
        raise MisconfigurationError(
            f"ExponentialMovingAverage: {type(module).__name__} has no tensors of the names and shapes that were averaged as "
            f"{missing}. Give the module that was trained, or one that was built like it."
        )
    return {name: tensors[name] for name in averages}


def copy_averages(averages: Mapping[str, Tensor], module: nn.Module) -> None:
    """Copies averages into the tensors that they are of; see :func:`matching`."""
    with torch.no_grad():
        for name, tensor in matching(module, averages).items():
            tensor.copy_(averages[name])
