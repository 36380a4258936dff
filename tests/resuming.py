"""The helpers that tests of resuming share: a run with a checkpoint of each safe point, and the comparison of a resumed run
with the run that was never interrupted."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import JSONLinesLogger
from eventtrain.events import AfterLRSchedulerStep, MetricsLogged, SafePoint


class Model(LightningModule):
    """Draws from every generator, logs in every way, and steps a schedule."""

    def __init__(self, lr: float = 0.05, steps: int = 200) -> None:
        super().__init__()
        self.lr, self.steps = lr, steps
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.inputs: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.inputs.append(batch.detach().clone())
        noise = random.random() + numpy.random.random()
        loss = (self.net(batch) + 0.01 * noise).pow(2).mean()
        self.log("loss", loss, prog_bar=True)
        self.log("both", loss * 2, on_step=True, on_epoch=True)
        self.log("least", loss, on_step=False, on_epoch=True, reduce_fx=torch.min)
        if batch_idx == 0:
            self.log("first", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.net(batch).pow(2).mean() + torch.rand(()) * 0.01)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.steps)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}, {"scheduler": plateau, "monitor": "both"}]


class KeepAll(Callback):
    """Writes a checkpoint at each safe point, and remembers how much was recorded until then."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder, self.record = folder, record
        self.kept: list[tuple[Path, int, int]] = []

    def on_safe_point(self, trainer: Trainer, event: SafePoint) -> None:
        path = self.folder / f"{len(self.kept)}.ckpt"
        trainer.save_checkpoint(path)
        self.kept.append((path, len(self.record.logged), len(self.record.rates)))


class Record(Callback):
    """Records the values that a run logs, and its learning rates."""

    def __init__(self) -> None:
        self.logged: list[tuple[Any, ...]] = []
        self.rates: list[list[float]] = []

    def on_metrics_logged(self, trainer: Trainer, event: MetricsLogged) -> None:
        values = {name: float(value) for name, value in event.metrics.items()}
        self.logged.append((event.stage, event.scope, event.step, trainer.current_epoch, values))

    def on_after_lr_scheduler_step(self, trainer: Trainer, event: AfterLRSchedulerStep) -> None:
        self.rates.append(list(event.learning_rates))


Build = Callable[[], tuple[Any, Any, Any, list[Any], dict[str, Any]]]
"""Makes module, training loader, validation loader, callbacks, and the trainer's other arguments: anew for each run."""


def run(build: Build, *more: Any, ckpt_path: Any = None) -> Trainer:
    """Train a module, with all that ``build`` makes for it, from generators in a known state."""
    torch.manual_seed(7)
    random.seed(7)
    numpy.random.seed(7)
    module, train, val, callbacks, options = build()
    datamodule = options.pop("datamodule", None)
    trainer = Trainer(
        callbacks=[*callbacks, *more], device="cpu", **{"default_callbacks": False, "num_sanity_val_steps": 1, **options}
    )
    if ckpt_path is not None:  # a resumed run must not depend on the state of its process
        torch.manual_seed(99)
        random.seed(99)
        numpy.random.seed(99)
    trainer.fit(module, train, val, datamodule, ckpt_path=ckpt_path)
    return trainer


def check_all_safe_points(build: Build, folder: Path, *, every: int = 1) -> int:
    """Resume a run from each of its safe points, and compare each resumed run with the run itself.

    Args:
        build: Makes the parts of the run.
        folder: The folder of the checkpoints.
        every: Resume from one in ``every`` safe points.

    Returns:
        The number of safe points.
    """
    record = Record()
    keep = KeepAll(folder, record)
    straight = run(build, record, keep)
    after = draws()
    assert keep.kept
    for path, logged, rates in keep.kept[::every]:
        again = Record()
        resumed = run(build, again, ckpt_path=path)
        assert_same(draws(), after, f"{path.name}: generators")
        assert record.logged[logged:] == again.logged, path.name
        assert record.rates[rates:] == again.rates, path.name
        assert_same_run(resumed, straight, path.name)
    return len(keep.kept)


def assert_same_run(resumed: Trainer, straight: Trainer, name: str) -> None:
    """Compare parameters, buffers, optimizers, schedulers, counters, callbacks and metrics, bit for bit."""
    assert_same(resumed.module.state_dict(), straight.module.state_dict(), f"{name}: module")
    for mine, expected in zip(resumed.optimizers, straight.optimizers, strict=True):
        assert_same(mine.state_dict(), expected.state_dict(), f"{name}: optimizer")
        assert mine.num_steps == expected.num_steps
    for config, expected_config in zip(resumed.lr_scheduler_configs, straight.lr_scheduler_configs, strict=True):
        assert_same(config.scheduler.state_dict(), expected_config.scheduler.state_dict(), f"{name}: scheduler")
    assert resumed.progress == straight.progress, name
    assert_same(dict(resumed.callback_metrics), dict(straight.callback_metrics), f"{name}: callback_metrics")
    for mine, expected in zip(resumed.callbacks, straight.callbacks, strict=False):
        # A log's position depends on how many digits the time of day has.
        if isinstance(mine, Callback) and not isinstance(mine, (Record, KeepAll, JSONLinesLogger)):
            assert_same(mine.state_dict(), expected.state_dict(), f"{name}: {type(mine).__name__}")


def draws() -> list[Any]:
    """Return the next draw of each of the process's generators."""
    return [torch.rand(2), random.random(), float(numpy.random.random())]


def assert_same(mine: Any, expected: Any, name: str) -> None:
    """Compare nested values, tensors bit for bit; NaN equals itself."""
    assert type(mine) is type(expected), f"{name}: {mine!r} and {expected!r}"
    if isinstance(mine, Tensor):
        assert mine.shape == expected.shape and mine.dtype == expected.dtype, f"{name}: {mine} and {expected}"
        same = (mine == expected) | (mine.isnan() & expected.isnan())
        assert bool(same.all()), f"{name}: {mine} and {expected}"
    elif isinstance(mine, dict):
        assert list(mine) == list(expected), f"{name}: {list(mine)} and {list(expected)}"
        for key in mine:
            assert_same(mine[key], expected[key], f"{name}[{key!r}]")
    elif isinstance(mine, (list, tuple)):
        assert len(mine) == len(expected), name
        for index, pair in enumerate(zip(mine, expected, strict=True)):
            assert_same(*pair, f"{name}[{index}]")
    else:
        assert mine == expected or (mine != mine and expected != expected), f"{name}: {mine!r} and {expected!r}"


def equal(one: Any, other: Any) -> bool:
    """Return whether two nested values are the same, bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)
