"""Measure the resident memory and the live tensors of a run of 100,000 batches with the standard callbacks.

Four batches make an update, so there are 25,000 updates. Memory is sampled every 5,000 batches, and a straight line is fitted
through the samples after the warm-up::

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
"""The number of batches between two samples. The first sample ends the warm-up."""


@dataclass
class Sample:
    """The memory of the process at one time.

    Attributes:
        batches: The number of batches before it.
        resident: The resident memory in bytes.
        tensors: The number of live tensors.
    """

    batches: int
    resident: int
    tensors: int


class Module(LightningModule):
    """A small network, so that memory which a trainer keeps is easy to see."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Log the loss of a batch on step and on epoch, and return it."""
        x, y = batch
        loss = F.mse_loss(self.network(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return SGD, and one cycle over the updates of the run."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Batches:
    """A loader that repeats a few batches.

    Args:
        batches: Its length.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        generator = torch.Generator().manual_seed(1)
        self.few = [(torch.randn(16, 16, generator=generator), torch.randn(16, 1, generator=generator)) for _ in range(32)]

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(itertools.cycle(self.few), self.batches)


class Census(Callback):
    """Samples the memory of the process.

    Args:
        every: The number of batches between two samples.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.samples: list[Sample] = []
        self.process = psutil.Process()

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        """Take a sample and discard it, so that the memory which sampling needs is in all samples."""
        self.look(0)

    def on_safe_point(self, trainer: Trainer, event: SafePoint) -> None:
        """Take a sample if one is due."""
        batches = trainer.total_batch_idx + 1
        if batches % self.every == 0 and not event.epoch_end:
            self.samples.append(self.look(batches))

    def look(self, batches: int) -> Sample:
        """Return a sample."""
        gc.collect()
        tensors = sum(issubclass(type(each), Tensor) for each in gc.get_objects())
        return Sample(batches, self.process.memory_info().rss, tensors)


def train(batches: int, every: int) -> list[Sample]:
    """Train with the standard callbacks, and return the samples."""
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
        trainer.fit(Module(), Batches(batches + 1))  # one more, because no sample is taken at the end of the epoch
    return census.samples


def growth(samples: list[Sample]) -> float:
    """Return the bytes of resident memory that each batch adds, fitted over all samples."""
    return statistics.linear_regression([s.batches for s in samples], [s.resident for s in samples]).slope


def table(samples: list[Sample], took: float) -> str:
    """Return the samples as a Markdown table."""
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
        f"Growth after the warm-up: {growth(samples):+.2f} bytes per batch; one tensor kept per batch would add "
        f"hundreds. Live tensors: {' or '.join(map(str, tensors))}. The run took {took:.0f} s.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=EVERY, help="batches between samples; a run needs at least three samples")
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
