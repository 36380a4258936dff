"""Count the exchanges of each batch in two processes, in each mode of a run, and save the counts of each process."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.exchanges import Census
from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import (
    EarlyStopping,
    ExponentialMovingAverage,
    FullyShardedDataParallel,
    GradientAccumulation,
    GradientClipping,
    GradientNormMonitor,
    JSONLinesLogger,
    LearningRateMonitor,
    LRSchedulerStepping,
    MixedPrecision,
    ModelCheckpoint,
    Preemption,
    ProgressBar,
    TensorBoardLogger,
    TerminateOnNaN,
    Timer,
)
from eventtrain.callbacks.distributed.distributed_data_parallel import DistributedDataParallel

WIDTH, LAYERS = 8, 2
WINDOW = 3
BATCHES, EVALUATED = 5 * WINDOW, 5
AHEAD = 2
"""How many batches a loader without a length is read ahead."""
FIRST = 2 * WINDOW
"""The first batch that counts: before it, torch's wrapper and its averages get ready."""


class Marked(Dataset[Tensor]):
    """Batches, each of which leaves a mark in a census when it is fetched."""

    def __init__(self, length: int, label: str, census: Census) -> None:
        self.length, self.label, self.census = length, label, census

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        self.census.mark(self.label)
        return torch.full((2, WIDTH), 0.1 * index)


class Endless:
    """A loader without a length."""

    def __init__(self, data: Marked) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.data.__getitem__, range(self.data.length))


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])

    def loss(self, batch: Tensor) -> Any:
        return self.layers(batch).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Weighted(Model):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"loss": self.loss(batch), "weight": 1.0 + batch_idx + self.global_rank}


class Manual(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Listening(Callback):
    """Listens to the events that could ask the other processes: each batch's beginning and end, and each safe point."""

    def on_train_batch_start(self, trainer: Trainer, event: Any) -> None: ...

    def on_train_batch_end(self, trainer: Trainer, event: Any) -> None: ...

    def on_safe_point(self, trainer: Trainer, event: Any) -> None: ...

    def on_request_stop(self, trainer: Trainer, event: Any) -> None: ...

    def on_validation_batch_end(self, trainer: Trainer, event: Any) -> None: ...


class Around(Callback):
    """Leaves marks around each evaluation."""

    def __init__(self, census: Census) -> None:
        self.census = census

    def on_validation_start(self, trainer: Trainer, event: Any) -> None:
        self.census.mark("begin")

    def on_validation_end(self, trainer: Trainer, event: Any) -> None:
        self.census.mark("end")


Mode = tuple[Callable[[], LightningModule], Callable[[Path], list[Any]]]


def usual(folder: Path) -> list[Any]:
    return [
        GradientClipping(1.0),
        LRSchedulerStepping(),
        LearningRateMonitor(),
        GradientNormMonitor(),
        TensorBoardLogger(folder / "board"),
        JSONLinesLogger(folder / "metrics.jsonl"),
        ProgressBar(),
        EarlyStopping("val_loss"),
        ExponentialMovingAverage(0.9),
        ModelCheckpoint(folder / "checkpoints", every_n_minutes=600),
        Timer(36_000),
        Preemption(),
        TerminateOnNaN(),
    ]


def fp16() -> MixedPrecision:
    return MixedPrecision("fp16", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8))


DDP: dict[str, Mode] = {
    "bare": (Model, lambda folder: []),
    "default callbacks": (Model, lambda folder: [LRSchedulerStepping(), ProgressBar()]),
    "usual callbacks": (Model, usual),
    "a listener to each event of a batch": (Model, lambda folder: [Listening()]),
    "accumulation": (Model, lambda folder: [GradientAccumulation(WINDOW)]),
    "accumulation and usual callbacks": (Model, lambda folder: [GradientAccumulation(WINDOW), *usual(folder)]),
    "weighted": (Weighted, lambda folder: [GradientAccumulation(WINDOW)]),
    "bf16": (Model, lambda folder: [MixedPrecision("bf16")]),
    "fp16": (Model, lambda folder: [fp16()]),
    "fp16, accumulation and clipping": (
        Model,
        lambda folder: [fp16(), GradientAccumulation(WINDOW), GradientClipping(1.0)],
    ),
    "clipping by norm": (Model, lambda folder: [GradientClipping(1.0)]),
    "clipping by value": (Model, lambda folder: [GradientClipping(0.1, "value")]),
    "manual optimization": (Manual, lambda folder: []),
    "loader without a length": (Model, lambda folder: []),
    "loader without a length, accumulation": (Model, lambda folder: [GradientAccumulation(WINDOW)]),
}
FSDP: dict[str, Mode] = {
    "FSDP": (Model, lambda folder: []),
    "FSDP, accumulation": (Model, lambda folder: [GradientAccumulation(WINDOW)]),
    "FSDP, clipping by norm": (Model, lambda folder: [GradientClipping(1.0)]),
    "FSDP, usual callbacks": (Model, lambda folder: [GradientAccumulation(WINDOW), *usual(folder)]),
}


def count(name: str, folder: Path) -> dict[str, list[Counter[str]]]:
    """Return the exchanges of batches that accumulate, of batches that close a window, of evaluation batches, and of all else
    in an evaluation."""
    census = Census()
    build, callbacks = (DDP | FSDP)[name]
    engine: Any = FullyShardedDataParallel if name in FSDP else DistributedDataParallel
    attached = callbacks(folder)
    world, is_endless = dist.get_world_size(), "without a length" in name
    trainer = Trainer(
        max_epochs=1,
        callbacks=[engine(timeout=60.0, shares_data=not is_endless), *attached, Around(census)],
        default_callbacks=False,
        device="cpu",
        default_root_dir=folder,
        num_sanity_val_steps=0,
    )
    loaders: list[Any] = [
        DataLoader(Marked(length * world, label, census), batch_size=None)
        for length, label in ((BATCHES, "training"), (EVALUATED, "evaluation"))
    ]
    if is_endless:  # rank one's share is longer
        loaders[0] = Endless(Marked(BATCHES + 2 * dist.get_rank(), "training", census))
    with census:
        trainer.fit(build(), *loaders)
    batches = census.between("training", "training")[AHEAD if is_endless else 0 :]  # a mark is left when a batch is read
    window = WINDOW if any(isinstance(each, GradientAccumulation) for each in attached) else 1
    return {
        "accumulating": [batches[index] for index in range(FIRST, len(batches)) if (index + 1) % window],
        "closing": [batches[index] for index in range(FIRST, len(batches)) if not (index + 1) % window],
        "evaluation batch": census.between("evaluation", "evaluation"),
        "evaluation": census.between("begin", "evaluation") + census.between("evaluation", "end"),
    }


def by_hand(window: int) -> dict[str, list[Counter[str]]]:
    """Return the exchanges of a hand-written loop."""
    census, module = Census(), Model()
    wrapper = nn.parallel.DistributedDataParallel(module.layers)
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=0.01)
    with census:
        for index in range(BATCHES):
            census.mark("training")
            closes = (index + 1) % window == 0
            with contextlib.nullcontext() if closes else wrapper.no_sync():
                wrapper(torch.ones(2, WIDTH)).square().mean().backward()
            if closes:
                optimizer.step()
                optimizer.zero_grad()
    batches = census.between("training", "training")
    return {
        "accumulating": [batches[index] for index in range(FIRST, len(batches)) if (index + 1) % window],
        "closing": [batches[index] for index in range(FIRST, len(batches)) if not (index + 1) % window],
    }


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Discard what bars print."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    counts: dict[str, Any] = {f"by hand, {window}": by_hand(window) for window in (1, WINDOW)}
    with silent():
        for number, name in enumerate(DDP | FSDP):
            counts[name] = count(name, root / str(number))
    (root / f"{dist.get_rank()}.json").write_text(json.dumps(counts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
