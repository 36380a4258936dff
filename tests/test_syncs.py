"""Between logging steps nothing waits for the device: no value is read out of a tensor in the loop.

On the CPU a dispatch mode sees every read-out (``item()``, ``float(tensor)``, ``bool(tensor)``, an index by a tensor)
as the operator ``aten::_local_scalar_dense`` or ``aten::is_nonzero``, and every copy to another device or type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
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

READ_OUTS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")
BATCHES = list(torch.randn(24, 4, 3, generator=torch.Generator().manual_seed(0)))


class Watch(TorchDispatchMode):
    """Notes the step at which a value is read out."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.trainer = trainer
        self.at: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in READ_OUTS:
            self.at.append(self.trainer.global_step)
        return func(*args, **(kwargs or {}))


class Automatic(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def loss(self, batch: Any) -> Any:
        loss = self.layer(batch).float().pow(2).mean()
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
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


CASES = {
    "automatic": (Automatic, []),
    "accumulating": (Automatic, [lambda: GradientAccumulation(2)]),
    "a short window": (Automatic, [lambda: GradientAccumulation(5)]),
    "weighted": (Weighted, [lambda: GradientAccumulation(2)]),
    "manual": (Manual, []),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_read_out_between_logging_steps(case: str, precision: str, tmp_path: Path) -> None:
    kind, extra = CASES[case]
    every = 4
    callbacks: list[Any] = [make() for make in extra]
    callbacks += [MixedPrecision("bf16")] if precision == "bf16" else []
    callbacks += [GradientClipping(1.0), LRSchedulerStepping(), ProgressBar(line_interval=1e9)]
    callbacks += [TensorBoardLogger(tmp_path, log_every_n_steps=every)]
    trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False, callbacks=callbacks)
    watch = Watch(trainer)
    # From the first batch to the last: the epoch's own end may log.
    trainer.signals.train_epoch_start.connect(lambda trainer, event: watch.__enter__())
    trainer.signals.train_epoch_end.connect(lambda trainer, event: watch.__exit__(None, None, None))
    trainer.fit(kind(), BATCHES)
    logged = [step for step in range(1, trainer.global_step + 1) if step % every == 0]
    assert logged and sorted(set(watch.at)) == logged, "each logging step reads, and no other"


def test_the_watch_sees_every_way_of_reading() -> None:
    trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False)
    value = torch.ones(())
    for read in (torch.Tensor.item, float, bool, int, lambda v: [1, 2][v.long()], lambda v: torch.nonzero(v.reshape(1))):
        with Watch(trainer) as watch:
            read(value)
        assert watch.at, read
