"""Long runs do not grow, and nothing outlives its trainer."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping, MixedPrecision, TensorBoardLogger
from tests.kit import Line, new_trainer

WARM_UP = 2_000


class Scheduled(Line):
    """A module of the usual kind: it logs on the step and the epoch, and steps a schedule with each update."""

    def __init__(self) -> None:
        super().__init__(4, on_step=True, on_epoch=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.001)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class SameBatch:
    """Yields one batch many times, so that many batches need no memory."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        batch = torch.ones(2, 4)
        for _ in range(self.batches):
            yield batch


def live() -> tuple[int, int]:
    """Return the number of objects that the garbage collector knows, and of tensors among them."""
    gc.collect()
    objects = gc.get_objects()
    return len(objects), sum(issubclass(type(each), Tensor) for each in objects)


class Census(Callback):
    """Counts live objects after a warm-up, and at the end of an epoch of that many batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.objects: list[int] = []
        self.tensors: list[int] = []
        self.allocated: list[int] = []

    def on_safe_point(self, trainer: Trainer, event: Any) -> None:
        if trainer.batch_idx == WARM_UP // 2:
            tracemalloc.start()
        elif trainer.batch_idx in (WARM_UP, self.batches - 2):
            objects, tensors = live()
            self.objects.append(objects)
            self.tensors.append(tensors)
            self.allocated.append(tracemalloc.get_traced_memory()[0])


@pytest.mark.parametrize("batches", [8_000, pytest.param(16_000, marks=pytest.mark.slow)])
def test_thousands_of_batches_of_the_standard_set_do_not_grow(tmp_path: Path, batches: int) -> None:
    census = Census(batches)
    standard = [
        GradientAccumulation(4),
        GradientClipping(1.0),
        LRSchedulerStepping(),
        TensorBoardLogger(tmp_path, log_every_n_steps=50),
    ]
    trainer = new_trainer(*standard, census)
    try:
        trainer.fit(Scheduled(), SameBatch(batches))
    finally:
        tracemalloc.stop()
    assert trainer.global_step == batches // 4
    (objects_before, objects), (tensors_before, tensors) = census.objects, census.tensors
    assert objects - objects_before <= 50
    assert tensors - tensors_before <= 2
    # Eight bytes a batch, a pointer in a list, would be more than this.
    allocated_before, allocated = census.allocated
    assert allocated - allocated_before < 4 * (batches - WARM_UP)


def test_many_epochs_and_validations_do_not_grow() -> None:
    counts: list[tuple[int, int]] = []
    trainer = new_trainer(LRSchedulerStepping(), max_epochs=60, num_sanity_val_steps=2)
    trainer.signals.train_epoch_start.connect(lambda _, event: counts.append(live()) if event.epoch in (20, 59) else None)
    trainer.fit(Scheduled(), SameBatch(3), SameBatch(2))
    (objects_before, tensors_before), (objects, tensors) = counts
    assert objects - objects_before <= 20
    assert tensors - tensors_before <= 2


def test_many_fits_of_one_trainer_do_not_grow() -> None:
    callbacks = [GradientAccumulation(2), MixedPrecision("fp16"), LRSchedulerStepping()]
    trainer = new_trainer(*callbacks, num_sanity_val_steps=2)
    counts: list[tuple[int, int]] = []
    for fit in range(30):
        trainer.fit(Scheduled(), SameBatch(3), SameBatch(2))
        if fit in (10, 29):
            counts.append(live())
    (objects_before, tensors_before), (objects, tensors) = counts
    assert objects - objects_before <= 20
    assert tensors - tensors_before <= 2


# ------------------------------------------------------------------ nothing outlives its trainer


class Hooked(Scheduled):
    def on_train_epoch_end(self) -> None: ...


def fitted(tmp_path: Path) -> tuple[Trainer, LightningModule, list[Any]]:
    callbacks = [
        GradientAccumulation(2),
        GradientClipping(1.0),
        MixedPrecision("bf16"),
        LRSchedulerStepping(),
        TensorBoardLogger(tmp_path),
    ]
    module = Hooked()
    trainer = Trainer(max_epochs=1, callbacks=callbacks, device="cpu")
    trainer.fit(module, SameBatch(3), SameBatch(2))
    trainer.validate(module, SameBatch(2))
    return trainer, module, callbacks


def failed(tmp_path: Path) -> tuple[Trainer, LightningModule, list[Any]]:
    class Failing(Callback):
        def on_after_update(self, trainer: Trainer, event: Any) -> None:
            raise ValueError("in the middle")

    callbacks = [Failing(), GradientClipping(1.0), TensorBoardLogger(tmp_path)]
    module = Hooked()
    trainer = Trainer(max_epochs=1, callbacks=callbacks, device="cpu")
    with pytest.raises(ValueError, match="in the middle"):
        trainer.fit(module, SameBatch(3))
    return trainer, module, callbacks


@pytest.mark.parametrize("run", [fitted, failed])
def test_a_trainer_that_goes_out_of_scope_is_collected(
    run: Callable[[Path], tuple[Trainer, LightningModule, list[Any]]], tmp_path: Path
) -> None:
    trainer, module, callbacks = run(tmp_path)
    optimizers = list(trainer.optimizers)
    alive = {type(each).__name__: weakref.ref(each) for each in (trainer, module, *callbacks, *optimizers)}
    del trainer, module, callbacks, optimizers
    gc.collect()
    assert [name for name, reference in alive.items() if reference() is not None] == []


def test_a_module_that_is_kept_can_train_with_another_trainer(tmp_path: Path) -> None:
    """It then holds the first trainer no longer."""
    trainer, module, callbacks = fitted(tmp_path)
    first = weakref.ref(trainer)
    del trainer, callbacks
    Trainer(max_epochs=1, device="cpu").fit(module, SameBatch(3))
    gc.collect()
    assert first() is None


def test_the_graph_of_a_batch_does_not_outlive_it() -> None:
    graphs: list[weakref.ref[Any]] = []
    alive: list[int] = []
    trainer = new_trainer(LRSchedulerStepping())
    trainer.signals.after_forward.connect(lambda _, event: graphs.append(weakref.ref(event.loss)))

    @trainer.signals.safe_point.connect
    def count(sender: Trainer, event: Any) -> None:
        alive.append(sum(graph() is not None for graph in graphs))

    trainer.fit(Scheduled(), SameBatch(4))
    assert len(graphs) == 4
    assert alive == [0, 0, 0, 0]
