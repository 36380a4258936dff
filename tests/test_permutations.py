"""Callbacks may be attached in any order: the bits are the same."""

from __future__ import annotations

from itertools import permutations
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping, MixedPrecision
from tests.kit import gradient, train

BATCHES = [torch.tensor([[x, x + 1.0], [x - 1.0, 2.0]]) for x in (1.0, 2.0, -1.0, 0.5, 3.0)]
Precision = Literal["bf16", "fp16"]
INITIAL = torch.tensor([[0.3, -0.2]])


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(INITIAL.clone())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = F.linear(batch, self.weight).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def weight_of(trainer: Trainer) -> Tensor:
    return next(trainer.module.parameters())


class Logger(Callback):
    """Reads, as loggers do, values, rates, and the norm of the true gradients."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def on_before_optimizer_step(self, trainer: Trainer, event: Any) -> None:
        self.lines.append(gradient(weight_of(trainer)).norm().item())

    def on_after_optimizer_step(self, trainer: Trainer, event: Any) -> None:
        self.lines.append(event.optimizer.param_groups[0]["lr"])

    def on_optimizer_step_skipped(self, trainer: Trainer, event: Any) -> None:
        self.lines.append(event.reason)

    def on_metrics_logged(self, trainer: Trainer, event: Any) -> None:
        self.lines.append((event.scope, event.step, {name: float(value) for name, value in event.metrics.items()}))


class Average(Callback):
    """An exponential moving average of the weights."""

    def __init__(self) -> None:
        self.average = INITIAL.clone()

    def on_after_update(self, trainer: Trainer, event: Any) -> None:
        self.average.lerp_(weight_of(trainer).detach(), 0.5)


def callbacks(precision: Precision) -> dict[str, Any]:
    # A scale at which the first of three windows overflows.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, backoff_factor=2.0**-6) if precision == "fp16" else None
    return {
        "accumulation": GradientAccumulation(2),
        "precision": MixedPrecision(precision, scaler=scaler),
        "clipping": GradientClipping(0.05),
        "scheduler": LRSchedulerStepping(),
        "logger": Logger(),
        "average": Average(),
    }


def trained(precision: Precision, order: tuple[str, ...]) -> tuple[list[float], list[float], list[Any]]:
    """Return the weights, their average and the logged lines, as plain numbers."""
    made = callbacks(precision)
    module = Module()
    train(module, BATCHES, *(made[name] for name in order))
    return module.weight.flatten().tolist(), made["average"].average.flatten().tolist(), made["logger"].lines


NAMES = tuple(callbacks("bf16"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_order_of_attachment_gives_the_same_bits(precision: Precision) -> None:
    # As text, because the norm of gradients that overflowed is not equal to itself; floats are written exactly.
    expected = repr(trained(precision, NAMES))
    different = [order for order in permutations(NAMES) if repr(trained(precision, order)) != expected]
    assert different == []


@pytest.mark.parametrize("left_out", ["accumulation", "precision", "clipping", "scheduler"])
@pytest.mark.filterwarnings("ignore:Module.configure_optimizers returned schedulers and nothing attached steps them")
def test_each_of_them_matters(left_out: str) -> None:
    """If it did not, equal bits would show nothing."""
    without = (*(name for name in NAMES if name != left_out),)
    assert trained("bf16", without)[0] != trained("bf16", NAMES)[0]


def test_fp16_skips_a_step_in_these_runs() -> None:
    lines = trained("fp16", NAMES)[2]
    assert lines.count("overflow") == 1
    assert [line for line in lines if isinstance(line, tuple) and line[0] == "step"]
