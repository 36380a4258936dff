"""Callbacks may be attached in any order: the bits are the same."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eventtrain import Callback, LightningModule, Trainer
from eventtrain import callbacks as shipped
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping, MixedPrecision
from tests.kit import gradient, train
from tests.resuming import equal
from tests.together import PARALLEL, Witness, fit, new_trainer_of_all, outcome

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


def different(precision: Precision, orders: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the orders that give other bits than the first one."""
    # As text, because the norm of gradients that overflowed is not equal to itself; floats are written exactly.
    expected = repr(trained(precision, NAMES))
    return [order for order in orders if repr(trained(precision, order)) != expected]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_some_orders_of_attachment_give_the_same_bits(precision: Precision) -> None:
    assert different(precision, Random(precision).sample([*permutations(NAMES)], 40)) == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_order_of_attachment_gives_the_same_bits(precision: Precision) -> None:
    assert different(precision, permutations(NAMES)) == []


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


# ------------------------------------------------------------------ all shipped callbacks


def of_all(folder: Path, parallel: str, ending: str, order: Random | None = None) -> tuple[dict[str, Any], list[str]]:
    """Train with all shipped callbacks; return the outcome, and the callbacks' names in the order of attachment."""
    witness = Witness(interrupts=ending == "signal")
    trainer = new_trainer_of_all(folder, parallel, witness, order)
    if ending == "signal":
        with pytest.raises(SystemExit):
            fit(trainer)
    else:
        fit(trainer)
    return outcome(trainer, witness), [type(callback).__name__ for callback in trainer.callbacks]


def check_orders(tmp_path: Path, parallel: str, ending: str, orders: int) -> None:
    """Compare runs in random orders with the one in alphabetical order: everything that they leave, bit for bit."""
    expected, alphabetical = of_all(tmp_path / "alphabetical", parallel, ending)
    random = Random(f"{parallel}, {ending}")
    tried = {tuple(alphabetical)}
    for number in range(orders):
        result, order = of_all(tmp_path / str(number), parallel, ending, random)
        tried.add(tuple(order))
        different = [key for key in expected | result if not equal(result.get(key), expected.get(key))]
        assert different == [], f"order {number}, {order}"
    assert len(tried) == orders + 1


@pytest.mark.parametrize("ending", ["early stopping", "signal"])
@pytest.mark.parametrize("parallel", PARALLEL)
def test_some_orders_of_all_shipped_callbacks_give_the_same_run(tmp_path: Path, parallel: str, ending: str) -> None:
    check_orders(tmp_path, parallel, ending, 10)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["early stopping", "signal"])
@pytest.mark.parametrize("parallel", PARALLEL)
def test_fifty_orders_for_each_ending_give_the_same_run(tmp_path: Path, parallel: str, ending: str) -> None:
    check_orders(tmp_path, parallel, ending, 50)


def test_the_run_of_all_shipped_callbacks_gives_each_of_them_work(tmp_path: Path) -> None:
    result, names = of_all(tmp_path, PARALLEL[0], "early stopping")
    assert {*names[:-1], PARALLEL[1]} == set(shipped.__all__)
    progress, reason, updates = result["counters"]
    assert (progress.global_step, updates) == (5, 5)  # of six windows: the gradients of the first overflow
    assert reason.startswith("EarlyStopping")
    hidden = [name for name in result["files"] if "/." in f"/{name}"]
    assert hidden == [".metrics.jsonl.run", "runs/Model/version_0/.run"], "which a run that was stopped keeps, to be resumed"
    assert [name for name in result["files"] if name not in hidden] == [
        "checkpoints/epoch=0-step=2.ckpt",
        "checkpoints/epoch=1-step=5.ckpt",
        "checkpoints/last.ckpt",
        "checkpoints/previous.ckpt",
        "metrics.jsonl",
        "runs/Model/version_0/events.out.tfevents",
        "runs/Model/version_0/fit.pt.trace.json",
        "timelines/timeline-0.html",
        "timelines/timeline-0.json",
    ]
    saved = result["last.ckpt"]
    average = saved["callbacks"]["ExponentialMovingAverage"]["averages"]["net.1.weight"]
    assert not torch.equal(average, saved["state_dict"]["net.1.weight"])
    assert saved["callbacks"]["MixedPrecision"]["scaler"]["scale"] < 2.0**20
    assert {"grad_norm", "lr-SGD", "loss_step"} <= result["logged_metrics"].keys()
    assert {"gradients/net.1.weight", "parameters/net.1.weight"} <= result["TensorBoard"]["histograms"].keys()


def test_a_signal_interrupts_the_run_of_all_shipped_callbacks(tmp_path: Path) -> None:
    result, _ = of_all(tmp_path, PARALLEL[0], "signal")
    progress, reason, _ = result["counters"]
    assert (progress.current_epoch, progress.batch_idx, reason) == (1, 1, "Preemption: SIGTERM")
    assert result["last.ckpt"]["global_step"] == progress.global_step


def test_both_callbacks_for_several_processes_change_nothing_in_one(tmp_path: Path) -> None:
    results = [of_all(tmp_path / parallel, parallel, "early stopping")[0] for parallel in PARALLEL]
    for result in results:
        for content in result.values():
            if isinstance(content, dict) and "callbacks" in content:  # a checkpoint: their state is in it
                assert len([content["callbacks"].pop(name) for name in PARALLEL if name in content["callbacks"]]) == 1
    assert equal(*results)
