"""What a long run keeps: resident memory and live tensors over 100,000 batches with the standard callbacks.

Four batches make an update, so that there are 25,000 of those. Memory is sampled every 5,000 batches, and a straight line
is fitted through the samples that follow the warm-up::

    python -m benchmarks.memory                    # about a minute
    python -m benchmarks.memory --batches 400000
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.overhead import pin, quiet
from benchmarks.report import environment, save
from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping, ProgressBar, TensorBoardLogger
from eventtrain.events import FitStart, SafePoint

ACCUMULATE = 4
EVERY = 5_000
"""Batches between two samples. The first sample ends the warm-up."""


@dataclass
class Sample:
    """What a run held at a time.

    Attributes:
        batches: Batches by then.
        resident: Resident memory of the process, in bytes.
        tensors: Live tensors in it.
    """

    batches: int
    resident: int
    tensors: int


class Module(LightningModule):
    """A small network, so that what a trainer keeps is not lost beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The batch's loss, which is logged on step and on epoch."""
        x, y = batch
        loss = F.mse_loss(self.network(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """SGD, and one cycle over the run's updates."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Batches:
    """The same few batches until there were so many."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        generator = torch.Generator().manual_seed(1)
        self.few = [(torch.randn(16, 16, generator=generator), torch.randn(16, 1, generator=generator)) for _ in range(32)]

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(itertools.cycle(self.few), self.batches)


class Census(Callback):
    """Looks at the process every so many batches.

    Args:
        every: How many.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.samples: list[Sample] = []
        self.process = psutil.Process()

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        """Looks once for nothing: what looking needs is then there in all samples."""
        self.look(0)

    def on_safe_point(self, trainer: Trainer, event: SafePoint) -> None:
        """Takes a sample where one is due."""
        batches = trainer.total_batch_idx + 1
        if batches % self.every == 0 and not event.epoch_end:
            self.samples.append(self.look(batches))

    def look(self, batches: int) -> Sample:
        """What the process holds."""
        gc.collect()
        tensors = sum(issubclass(type(each), Tensor) for each in gc.get_objects())
        return Sample(batches, self.process.memory_info().rss, tensors)


def train(batches: int, every: int) -> list[Sample]:
    """Trains with the standard callbacks; returns what it saw."""
    census = Census(every)
    with tempfile.TemporaryDirectory() as folder, quiet():
        callbacks = [
            GradientAccumulation(ACCUMULATE),
            GradientClipping(1.0),
            LRSchedulerStepping(),
            TensorBoardLogger(Path(folder)),
            ProgressBar(),
            census,
        ]
        trainer = Trainer(max_epochs=1, callbacks=callbacks, default_callbacks=False, device="cpu")
        trainer.fit(Module(), Batches(batches + 1))  # one more, because the epoch's end is no time to look
    return census.samples


def growth(samples: list[Sample]) -> float:
    """Bytes of resident memory per batch, fitted over all samples."""
    return statistics.linear_regression([s.batches for s in samples], [s.resident for s in samples]).slope


def table(samples: list[Sample], took: float) -> str:
    """The samples as a Markdown table."""
    lines = ["| batches | updates | resident, MiB | since the warm-up, KiB | live tensors |", "|---|---|---|---|---|"]
    first = samples[0]
    for sample in samples:
        lines.append(
            f"| {sample.batches:,} | {sample.batches // ACCUMULATE:,} | {sample.resident / 2**20:.1f} | "
            f"{(sample.resident - first.resident) / 2**10:+,.0f} | {sample.tensors} |"
        )
    tensors = sorted({sample.tensors for sample in samples})
    lines += [
        "",
        f"Growth after the warm-up: {growth(samples):+.2f} bytes per batch, where one tensor kept per batch would be "
        f"hundreds. Live tensors: {' or '.join(map(str, tensors))}. The run took {took:.0f} s.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=EVERY, help="batches between samples; at least three have to fit")
    parser.add_argument("--save", action="store_true", help="rewrite docs/performance.md and its JSON")
    options = parser.parse_args(arguments)
    if options.batches < 3 * options.every:
        parser.error(f"--batches {options.batches} and --every {options.every} give fewer than three samples")

    torch.set_num_threads(1)
    facts = environment() | {"pinned core": pin(), "batches": options.batches}
    print(", ".join(f"{name}: {value}" for name, value in facts.items()), file=sys.stderr)
    start = time.perf_counter()
    samples = train(options.batches, options.every)
    text = table(samples, time.perf_counter() - start)
    print(f"\n{text}")
    if options.save:
        save("memory", text, facts, [asdict(sample) for sample in samples])


if __name__ == "__main__":
    main()
