"""Between logging steps nothing waits for the device: the loop reads no value out of a tensor.

There are three ways to look, and each sees things that the others cannot:

- On the CPU, :class:`Watch` sees every operator that reads a value out or copies between devices while the host waits, and
  every method of a tensor that does so without an operator (``cpu()``, ``numpy()``, ``tolist()``).
- On the meta device there are no values, so reading one raises.
- On a GPU, torch itself raises if the host waits.

Only fp16 may read, once per optimizer step: ``torch.amp.GradScaler.step`` asks whether the gradients are finite, because
torch decides on the host whether to step.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from eventtrain import LightningModule, Trainer
from eventtrain.callbacks import (
    GradientAccumulation,
    GradientClipping,
    LRSchedulerStepping,
    MixedPrecision,
    ProgressBar,
    TensorBoardLogger,
)
from tests.kit import new_trainer
from tests.reference import backward

BATCHES = list(torch.randn(24, 4, 3, generator=torch.Generator().manual_seed(0)))
EVERY = 4  # updates from one logging step to the next

# ------------------------------------------------------------------ the watch

# Operators that read a value, or make a shape of values.
OPERATORS = {
    "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "repeat_interleave",
}  # fmt: skip
# Methods that read without an operator if the tensor is on the host already.
METHODS = {
    "item", "tolist", "numpy", "cpu", "__array__", "__dlpack__", "__repr__", "__bool__", "__float__", "__int__", "__index__",
}  # fmt: skip
TORCH = str(Path(torch.__file__).parent)


class Read(NamedTuple):
    """One read-out.

    Attributes:
        step: The run's ``global_step`` at the time.
        how: The operator, or the tensor's method.
        by_scaler: ``torch.amp.GradScaler`` did it.
    """

    step: int
    how: str
    by_scaler: bool


class Watch:
    """Records each read-out within a ``with`` block."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.reads: list[Read] = []
        self._modes = (_Methods(self), _Operators(self))

    def note(self, how: str) -> None:
        self.reads.append(Read(self.trainer.global_step, how, called_from("grad_scaler.py")))

    def __enter__(self) -> Watch:
        for mode in self._modes:
            mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*(error or (None, None, None)))  # type: ignore[no-untyped-call]

    @property
    def steps(self) -> list[int]:
        return sorted({read.step for read in self.reads})


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split("::")[1].split(".")[0]
        if name in OPERATORS or operator_waits(name, args, kwargs):
            self.watch.note(name)
        return func(*args, **kwargs)


def operator_waits(name: str, args: Any, kwargs: Any) -> bool:
    """Return whether the host waits for a copy to another device, or for the number of values that a mask selects."""
    if name == "_to_copy":
        target = kwargs.get("device")
        return target is not None and target.type != args[0].device.type and not kwargs.get("non_blocking")
    if name == "copy_":
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        return waits and args[0].device.type != args[1].device.type
    return name == "index" and any(index is not None and index.dtype is torch.bool for index in args[1])


class _Methods(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in METHODS or method_waits(name, args, kwargs):
            self.watch.note(name)
        return func(*args, **kwargs)


def method_waits(name: str, args: Any, kwargs: Any) -> bool:
    """Return whether the host would wait for a tensor of a GPU that moves to it, or becomes a number of another tensor."""
    if name == "to":
        devices = [each for each in (*args, kwargs.get("device")) if isinstance(each, (str, torch.device))]
        waits = not kwargs.get("non_blocking", any(each is True for each in args))
        # torch's own code moves tensors to each other's devices, which here is the CPU.
        by_torch = sys._getframe(2).f_code.co_filename.startswith(TORCH)
        return waits and not by_torch and any(torch.device(each).type == "cpu" for each in devices)
    if name in ("tensor", "as_tensor"):
        return isinstance(args[0], (list, tuple)) and any(isinstance(each, Tensor) for each in args[0])
    return False


def called_from(file: str) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(file):
            return True
        frame = frame.f_back
    return False


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": Tensor.item,
    "float": float,
    "int": int,
    "bool": bool,
    "complex": complex,
    "not": lambda v: not v,
    "comparison": lambda v: 1 if v > 0 else 2,
    "index": lambda v: [1, 2][v.long()],
    "range": lambda v: range(v.long()),
    "in": lambda v: 1.0 in v,
    "tolist": Tensor.tolist,
    "numpy": Tensor.numpy,
    "asarray": np.asarray,
    "NumPy number": np.float32,
    "dlpack": np.from_dlpack,
    "cpu": Tensor.cpu,
    "to host": lambda v: v.to("cpu"),
    "to host, by name": lambda v: v.to(device=torch.device("cpu")),
    "to another device": lambda v: v.to("meta"),
    "copy from another device": lambda v: torch.empty((), device="meta").copy_(v),
    "str": str,
    "format": lambda v: f"{v:.3f}",
    "nonzero": lambda v: torch.nonzero(v.reshape(1)),
    "mask": lambda v: v.reshape(1)[v.reshape(1) > 0],
    "masked_select": lambda v: torch.masked_select(v, v > 0),
    "unique": torch.unique,
    "equal": lambda v: torch.equal(v, v + 1),
    "allclose": lambda v: torch.allclose(v, v),
    "new tensor": lambda v: torch.tensor([v, v]),
}


@pytest.mark.parametrize("how", READS)
def test_the_watch_sees_every_way_of_reading(how: str) -> None:
    trainer = new_trainer()
    value = torch.ones(())
    with Watch(trainer) as watch:
        READS[how](value)
    assert watch.reads


def test_the_watch_sees_nothing_else() -> None:
    trainer = new_trainer()
    value = torch.ones(2, requires_grad=True)
    with Watch(trainer) as watch:
        (value.detach() + 1).to(torch.float64).clone()
        backward(value.sum())
        assert value.grad is not None
        value.grad.mul_(torch.tensor(0.5))
        torch.where(value > 0, value, 1.0)
        value.to("cpu", non_blocking=True)
        value.detach().to("meta", non_blocking=True)
        torch.nn.utils.clip_grad_norm_([value], 1.0)
        _ = value.shape, value.dtype, value.device, value is None, len(value), value.numel()
    assert watch.reads == []


# ------------------------------------------------------------------ the modules


class Automatic(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def loss(self, batch: Any) -> Any:
        loss = self.layer(batch).float().pow(2).mean()
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log_dict({"number": 1.5, "weight": self.layer.weight[0, 0]}, on_epoch=True, batch_size=2)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        total = self.trainer.estimated_stepping_batches
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total), "interval": "step"}]


class Weighted(Automatic):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss(batch), "weight": (batch > 0).sum()}


class Manual(Automatic):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        with self.toggled_optimizer(optimizer):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
        self.lr_schedulers().step()


class TwoOptimizers(Manual):
    """A critic that steps in each batch, and a generator that accumulates over two."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(3, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for_generator, for_critic = self.optimizers()
        with self.toggled_optimizer(for_critic):
            for_critic.zero_grad()
            self.manual_backward(self.loss(self.generator(batch).detach()))
            self.clip_gradients(for_critic, 1.0, "value")
            for_critic.step()
        with self.toggled_optimizer(for_generator):
            if batch_idx % 2 == 0:
                for_generator.zero_grad()
            self.manual_backward(self.loss(self.generator(batch)) / 2)
            if batch_idx % 2:
                for_generator.step()
                self.lr_schedulers()[0].step()
        self.lr_schedulers()[1].step()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in (self.generator, self.layer)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]


Case = tuple[type[LightningModule], Callable[[], list[Any]]]
CASES: dict[str, Case] = {
    "automatic": (Automatic, list),
    "accumulating": (Automatic, lambda: [GradientAccumulation(2)]),
    "a short window": (Automatic, lambda: [GradientAccumulation(5)]),
    "weighted": (Weighted, lambda: [GradientAccumulation(2)]),
    "manual": (Manual, list),
    "two optimizers": (TwoOptimizers, list),
}


def trainer_of(case: str, precision: str, folder: Path, *, device: str = "cpu", every: int = EVERY) -> Trainer:
    """Return a trainer with the standard callbacks and those of a case."""
    callbacks = CASES[case][1]()
    if precision != "fp32":
        callbacks += [MixedPrecision("bf16" if precision == "bf16" else "fp16")]
    callbacks += [GradientClipping(1.0), LRSchedulerStepping(), ProgressBar(line_interval=1e9)]
    callbacks += [TensorBoardLogger(folder, log_every_n_steps=every)]
    return new_trainer(*callbacks, device=device)


# ------------------------------------------------------------------ on the CPU, watched


@pytest.mark.filterwarnings("ignore:Detected call of")  # a manual module steps its scheduler after an overflow too
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_read_out_between_logging_steps(case: str, precision: str, tmp_path: Path) -> None:
    trainer = trainer_of(case, precision, tmp_path)
    watch = Watch(trainer)
    steps: Counter[int] = Counter()

    def count(trainer: Trainer, event: Any) -> None:
        steps[trainer.global_step] += 1

    # From the first batch to the last: the end of the epoch may log.
    trainer.signals.train_epoch_start.connect(lambda trainer, event: watch.__enter__())
    trainer.signals.train_epoch_end.connect(lambda trainer, event: watch.__exit__())
    trainer.signals.after_optimizer_step.connect(count)
    trainer.signals.optimizer_step_skipped.connect(count)
    trainer.fit(CASES[case][0](), BATCHES)
    logged = [step for step in range(1, trainer.global_step + 1) if step % EVERY == 0]
    by_scaler = [read for read in watch.reads if read.by_scaler]
    watch.reads = [read for read in watch.reads if not read.by_scaler]
    assert logged and watch.steps == logged, "each logging step reads, and no other"
    # The update is counted after it, so the scaler reads at n for step n + 1.
    asked = Counter(read.step for read in by_scaler if read.how == "_local_scalar_dense")
    assert asked == (steps if precision == "fp16" else Counter()), "the scaler asks once per optimizer step"


# ------------------------------------------------------------------ on the meta device, which has no values


class Done(Exception):
    """Ends a run before its epoch's end, which logs."""


@pytest.mark.parametrize("case", CASES)
def test_a_run_needs_no_values(case: str, tmp_path: Path) -> None:
    trainer = trainer_of(case, "fp32", tmp_path, device="meta", every=1000)

    def stop(trainer: Trainer, event: Any) -> None:
        if trainer.batch_idx == len(BATCHES) - 2:
            raise Done

    trainer.signals.safe_point.connect(stop)
    with pytest.raises(Done):
        trainer.fit(CASES[case][0](), BATCHES)
    assert trainer.global_step >= len(BATCHES) // 5 - 1
    assert {parameter.device.type for parameter in trainer.module.parameters()} == {"meta"}


@pytest.mark.parametrize("how", ["item", "float", "bool", "tolist", "numpy", "cpu", "to host", "index", "nonzero"])
def test_the_meta_device_has_no_values(how: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, TypeError), match="meta"):
        READS[how](torch.ones((), device="meta"))


# ------------------------------------------------------------------ on a GPU, by torch


@pytest.fixture
def raises_on_waiting() -> Iterator[Callable[[bool], None]]:
    """Return a switch: whether torch raises if the host waits for the GPU."""

    def switch(on: bool) -> None:
        torch.cuda.set_sync_debug_mode("error" if on else "default")

    yield switch
    switch(False)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # fp16 asks once per step, as torch has it
@pytest.mark.parametrize("case", CASES)
def test_the_host_does_not_wait_for_the_gpu_between_logging_steps(
    case: str, precision: str, tmp_path: Path, raises_on_waiting: Callable[[bool], None]
) -> None:
    trainer = trainer_of(case, precision, tmp_path, device="cuda")
    # After the first batch, which sets up libraries; not in the logging steps, which read.
    trainer.signals.safe_point.connect(lambda trainer, event: raises_on_waiting(not event.epoch_end))
    trainer.signals.after_update.connect(lambda trainer, event: raises_on_waiting(event.global_step % EVERY != 0))
    trainer.signals.train_epoch_end.connect(lambda trainer, event: raises_on_waiting(False))
    trainer.fit(CASES[case][0](), [batch.pin_memory() for batch in BATCHES])
    assert trainer.global_step >= 2 * EVERY or case == "a short window"


@needs_cuda
def test_torch_raises_if_the_host_waits(raises_on_waiting: Callable[[bool], None]) -> None:
    value = torch.ones((), device="cuda")
    raises_on_waiting(True)
    for how in ("item", "float", "bool", "tolist", "cpu", "to host", "nonzero"):
        with pytest.raises(RuntimeError, match="synchroniz"):
            READS[how](value)
