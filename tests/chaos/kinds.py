"""The kinds of runs that are killed at each of their places: ways of optimizing, and ways of keeping checkpoints."""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader

from eventtrain import LightningDataModule, Trainer
from eventtrain.callbacks import (
    EarlyStopping,
    ExponentialMovingAverage,
    GradientAccumulation,
    GradientClipping,
    GradientNormMonitor,
    JSONLinesLogger,
    LearningRateMonitor,
    LRSchedulerStepping,
    MixedPrecision,
    ModelCheckpoint,
    TensorBoardLogger,
    TerminateOnNaN,
)
from eventtrain.callbacks.checkpointing import model_checkpoint
from tests.chaos.places import Places
from tests.checkpoint.test_resume_modes import BATCHES, GAN, Data, Measured, Quasi, Skipping, TwoLoaders, Weighted, shuffled
from tests.resuming import Model

Parts = tuple[Any, list[Any], dict[str, Any]]
"""A module, callbacks, and arguments of the trainer and of ``fit``."""

KINDS: dict[str, Callable[[], Parts]] = {}


def kind(build: Callable[[], Parts]) -> Callable[[], Parts]:
    """Add a kind of run under the name of its function."""
    KINDS[build.__name__] = build
    return build


def optimizing(module: Callable[[], Any], *callbacks: Callable[[], Any], **options: Any) -> Callable[[], Parts]:
    """Return a builder of a run that is about optimizing; its checkpoints are kept by step."""
    return lambda: (module(), [*(make() for make in callbacks), ModelCheckpoint(every_n_steps=2)], options)


def keeping(*callbacks: Callable[[], Any], module: Callable[[], Any] = Model, **options: Any) -> Callable[[], Parts]:
    """Return a builder of a run that is about keeping checkpoints."""
    return lambda: (module(), [LRSchedulerStepping(), *(make() for make in callbacks)], options)


# ------------------------------------------------------------------ optimizing


def scaled(scale: float = 2.0**10, growth: int = 2) -> MixedPrecision:
    return MixedPrecision("fp16", scaler=torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth))


for remainder in ("step", "drop", "carry"):
    for normalize in ("window", "fixed"):
        KINDS[f"windows of 3, {remainder}, {normalize}"] = optimizing(
            Model,
            lambda remainder=remainder, normalize=normalize: GradientAccumulation(3, remainder=remainder, normalize=normalize),  # type: ignore[misc]
            LRSchedulerStepping,
        )
KINDS |= {
    "a schedule of windows": optimizing(
        Model, lambda: GradientAccumulation({0: 1, 4: 3, 8: 2}, unit="batch"), LRSchedulerStepping
    ),
    "weighted windows": optimizing(Weighted, lambda: GradientAccumulation(3, remainder="carry"), LRSchedulerStepping),
    "fp16": optimizing(
        Model, lambda: GradientAccumulation(2), scaled, lambda: GradientClipping(0.5), LRSchedulerStepping, max_epochs=3
    ),
    "fp16, overflowing": optimizing(Model, lambda: scaled(2.0**126), LRSchedulerStepping),
    "bf16": optimizing(Model, lambda: MixedPrecision("bf16"), LRSchedulerStepping),
    "LBFGS": optimizing(Quasi, LRSchedulerStepping),
    "skipped batches and short epochs": optimizing(Model, lambda: GradientAccumulation(2), Skipping, LRSchedulerStepping),
    "everything that keeps state": optimizing(
        Model,
        lambda: GradientAccumulation(2),
        lambda: ExponentialMovingAverage(0.9),
        lambda: EarlyStopping("val", patience=2, min_delta=10.0),
        TerminateOnNaN,
        LRSchedulerStepping,
        GradientNormMonitor,
        LearningRateMonitor,
        max_epochs=9,
    ),
    "manual": optimizing(GAN),
    "manual, accumulated": optimizing(lambda: GAN(2)),
    "manual, fp16": optimizing(GAN, lambda: scaled(2.0**16, 3)),
    "metric objects": optimizing(Measured, LRSchedulerStepping),
    "a data module": optimizing(TwoLoaders, LRSchedulerStepping, val_check_interval=2, data=Data),
}

# ------------------------------------------------------------------ keeping checkpoints


class Scores(Model):
    """Logs as ``score`` a number for each validation: 5, 1, 4, 3, and again."""

    def on_validation_epoch_end(self) -> None:
        self.log("score", float((5, 1, 4, 3)[self.trainer.progress.validations % 4]))


def every_minute() -> ModelCheckpoint:
    """Return a callback for which each batch takes 20 seconds."""
    clock = Clock()
    vars(model_checkpoint)["time"] = clock
    return clock.checkpoint


class Clock(SimpleNamespace):
    """The module ``time``, of a run whose batches take 20 seconds each."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.checkpoint = EveryMinute(self, every_n_minutes=1)

    def monotonic(self) -> float:
        return 0.0 if self.trainer is None else 20.0 * self.trainer.total_batch_idx


class EveryMinute(ModelCheckpoint):
    def __init__(self, clock: Clock, **options: Any) -> None:
        self.clock = clock
        super().__init__(**options)

    def on_setup(self, trainer: Trainer, event: Any) -> None:
        self.clock.trainer = trainer
        super().on_setup(trainer, event)


TWELVE: dict[str, Any] = {
    "module": Scores,
    "check_val_every_n_epoch": None,
    "val_check_interval": 3,
    "max_steps": 12,
    "max_epochs": None,
}
"""The arguments of a run of 12 steps, whose scores of the steps 3, 6, 9 and 12 are 5, 1, 4 and 3."""
TWO = (
    lambda: ModelCheckpoint("newest", every_n_steps=1),
    lambda: ModelCheckpoint("best", monitor="score", save_top_k=1, every_n_steps=3),
)

KINDS |= {
    "the default": keeping(ModelCheckpoint),
    "every step and two": keeping(*TWO, **TWELVE),
    "two, the other way round": keeping(*TWO[::-1], **TWELVE),
    "three, and one in background": keeping(
        *TWO,
        lambda: ModelCheckpoint("third", every_n_epochs=1, save_top_k=-1, in_background=True),
        **TWELVE,
    ),
    "the best two": keeping(
        lambda: ModelCheckpoint(monitor="score", save_top_k=2, mode="max"), module=Scores, val_check_interval=2
    ),
    "the best two by step": keeping(
        lambda: ModelCheckpoint(monitor="score", save_top_k=2, every_n_steps=2), module=Scores, val_check_interval=2
    ),
    "all": keeping(lambda: ModelCheckpoint(save_top_k=-1, every_n_steps=3, save_last=False)),
    "only the last": keeping(lambda: ModelCheckpoint(save_top_k=0, every_n_steps=2)),
    "one name for many": keeping(
        lambda: ModelCheckpoint(filename="{epoch}", monitor="score", every_n_steps=1), module=Scores, val_check_interval=2
    ),
    "in background": keeping(lambda: ModelCheckpoint(in_background=True, every_n_steps=1, save_top_k=2)),
    "in background, the best": keeping(
        lambda: ModelCheckpoint(in_background=True, monitor="score", save_top_k=2), module=Scores, val_check_interval=2
    ),
    "save_on_exception": keeping(lambda: ModelCheckpoint(save_on_exception=True, every_n_steps=3)),
    "every_n_minutes": keeping(every_minute),
}

# ------------------------------------------------------------------ the process


def fit(name: str, root: Path, prepare: Callable[[Trainer], None] = lambda trainer: None) -> dict[str, Any]:
    """Run a kind of run in this process to its end.

    Args:
        name: The kind.
        root: Its folder.
        prepare: Called with the trainer right before the fit.

    Returns:
        The final state, as far as two equal runs have it in common, and the places of the logs.
    """
    torch.manual_seed(7)
    random.seed(7)
    numpy.random.seed(7)
    module, callbacks, options = KINDS[name]()
    options = {"max_epochs": 2, "val_check_interval": 3, "default_root_dir": root, "seed": 3, **options}
    data: type[LightningDataModule] | None = options.pop("data", None)
    logger, board = JSONLinesLogger(log_every_n_steps=1), TensorBoardLogger(log_every_n_steps=1)
    callbacks = [*callbacks, logger, board]
    trainer = Trainer(callbacks=callbacks, device="cpu", default_callbacks=False, num_sanity_val_steps=1, **options)
    loaders: Any = (None, None, data()) if data else (shuffled(), DataLoader(torch.cat(BATCHES[:2]), 4, shuffle=True), None)  # type: ignore[arg-type]
    prepare(trainer)
    train_loader, val_loader, datamodule = loaders
    trainer.fit(module, train_loader, val_loader, datamodule, ckpt_path="last")
    keepers = [each for each in trainer.callbacks if isinstance(each, ModelCheckpoint)]
    return {
        "draws": [torch.rand(2), random.random(), float(numpy.random.random())],
        "state_dict": trainer.module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "metrics": {key: torch.as_tensor(value) for key, value in trainer.callback_metrics.items()},
        "steps": trainer.global_step,
        "kept": [each.kept for each in keepers],
        "best": [Path(each.best_model_path).name for each in keepers],
        "reason": trainer.stop_reason,
        "log": str(logger.run_path),
        "board": str(board.run_dir),
    }


def train(name: str, root: Path, at: int | None) -> None:
    """Be a process that runs a kind of run to its end and writes ``final.pt`` and ``places.json``; or that dies at a place.

    Args:
        name: The kind.
        root: Its folder.
        at: The number of the place; None for none.
    """
    os.chdir(root)
    places = Places(at)
    # A clock that counts its readings, and one number of the process: so equal runs leave equal files.
    ticks = itertools.count(1_700_000_000)
    time.time, os.getpid = lambda: float(next(ticks)), lambda: 1000

    def prepare(trainer: Trainer) -> None:
        places.count_file_operations()
        places.count_events(trainer)

    final = fit(name, root, prepare)
    places.counts = False
    torch.save(final, root / "final.pt")
    (root / "places.json").write_text(json.dumps(places.kinds))
