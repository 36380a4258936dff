"""The same module source, trained by eventtrain and by Lightning."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import eventtrain
from eventtrain import callbacks as ours

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Lightning's own imports
    from lightning import pytorch
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

lightning = pytorch
ModuleFactory = Callable[[type], Any]


@dataclass
class Settings:
    """The settings of both trainers, named like neither's arguments."""

    epochs: int = 2
    max_steps: int | None = None
    accumulate: int | dict[int, int] = 1
    clip: tuple[float, str] | None = None
    precision: str | None = None
    validate: bool = False
    sanity_steps: int = 0
    limit_train_batches: int | float | None = None
    val_check_interval: int | float | None = None
    check_val_every_n_epoch: int = 1
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """The results of a run."""

    parameters: list[torch.Tensor]
    metrics: dict[str, float]
    journal: list[Any]
    trainer: Any
    module: Any


def batches(count: int = 6, size: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return list(torch.randn(count, size, 3, generator=generator))


def train_ours(make: ModuleFactory, settings: Settings, data: Any = None, val: Any = None) -> Outcome:
    attached: list[Any] = [ours.LRSchedulerStepping()]
    if settings.accumulate != 1:
        attached.append(ours.GradientAccumulation(settings.accumulate, normalize="fixed"))  # Lightning divides by N always
    if settings.clip is not None:
        attached.append(ours.GradientClipping(*settings.clip))
    if settings.precision is not None:
        attached.append(ours.MixedPrecision(settings.precision))  # type: ignore[arg-type]
    trainer = eventtrain.Trainer(
        max_epochs=settings.epochs,
        max_steps=settings.max_steps,
        callbacks=attached,
        default_callbacks=False,
        device="cpu",
        num_sanity_val_steps=settings.sanity_steps,
        limit_train_batches=settings.limit_train_batches,
        val_check_interval=settings.val_check_interval,
        check_val_every_n_epoch=settings.check_val_every_n_epoch,
    )
    return _train(make(eventtrain.LightningModule), trainer, settings, data, val)


def train_theirs(make: ModuleFactory, settings: Settings, data: Any = None, val: Any = None) -> Outcome:
    extra: list[Any] = []
    options = dict(settings.options)
    if isinstance(settings.accumulate, dict):
        extra.append(GradientAccumulationScheduler(settings.accumulate))
    else:
        options["accumulate_grad_batches"] = settings.accumulate
    if settings.clip is not None:
        options["gradient_clip_val"], options["gradient_clip_algorithm"] = settings.clip
    if settings.precision is not None:
        options["precision"] = {"bf16": "bf16-mixed", "fp16": "16-mixed"}[settings.precision]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers, loggers and so on
        trainer = lightning.Trainer(
            max_epochs=settings.epochs,
            max_steps=-1 if settings.max_steps is None else settings.max_steps,
            callbacks=extra,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=settings.sanity_steps,
            limit_train_batches=settings.limit_train_batches,
            val_check_interval=settings.val_check_interval,
            check_val_every_n_epoch=settings.check_val_every_n_epoch,
            **options,
        )
        return _train(make(lightning.LightningModule), trainer, settings, data, val)


def _train(module: Any, trainer: Any, settings: Settings, data: Any, val: Any) -> Outcome:
    torch.manual_seed(1)
    # Lightning wants loaders that are not lists: a list is several loaders to it.
    loader = torch.utils.data.DataLoader(_Listed(batches() if data is None else data), batch_size=None)
    val_loader = torch.utils.data.DataLoader(_Listed(batches(3) if val is None else val), batch_size=None)
    trainer.fit(module, loader, val_loader if settings.validate else None)
    return Outcome(
        [parameter.detach().clone() for parameter in module.parameters()],
        {name: float(value) for name, value in trainer.callback_metrics.items()},
        list(getattr(module, "journal", [])),
        trainer,
        module,
    )


class _Listed(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return copy.deepcopy(self.items[index])


def assert_same(make: ModuleFactory, settings: Settings, data: Any = None, val: Any = None) -> Outcome:
    """Train by both, and compare parameters, metrics and the journals of the modules."""
    here, there = train_ours(make, settings, data, val), train_theirs(make, settings, data, val)
    assert here.journal == there.journal
    assert here.metrics == there.metrics
    assert len(here.parameters) == len(there.parameters)
    for mine, theirs in zip(here.parameters, there.parameters, strict=True):
        assert torch.equal(mine, theirs)
    return here
