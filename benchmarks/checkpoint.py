"""Measure the cost of a checkpoint of a model with 100 million parameters and its AdamW state, beside plain ``torch.save``.

All ways take turns in one run, at one safe point after another, and save the same content:

- ``torch.save`` over the last file: if the process crashes, no file is left;
- ``torch.save`` to a new file, after which the file before the last is deleted;
- the same with ``fsync``, without which the file may be lost if the machine loses power;
- ``ModelCheckpoint``, which does all this and more;
- ``ModelCheckpoint(in_background=True)``, of which the time is measured that the loop waits.

The commands::

    python -m benchmarks.checkpoint                # two minutes; needs 5 GB of memory and 12 GB of disk
    python -m benchmarks.checkpoint --parameters 10_000_000
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.overhead import quiet
from benchmarks.report import environment, save
from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import ModelCheckpoint
from eventtrain.checkpoint import contents as checkpoint
from eventtrain.events import SafePoint, TakeCheckpoint

WIDTH = 1000  # a layer with this number of inputs and outputs has a million parameters
OVER, NEW, SYNCED = "torch.save over the last file", "torch.save, a new file", "torch.save, a new file, fsync"
OURS, BACKGROUND = "ModelCheckpoint", "ModelCheckpoint(in_background=True)"
KINDS = (OVER, NEW, SYNCED, OURS, BACKGROUND)


class Module(LightningModule):
    """A number of layers, which all get a gradient and AdamW state.

    Args:
        parameters: The number of parameters; whole millions.
    """

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(parameters // WIDTH**2))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        """Return a loss that each layer computes from the batch, so that the step is short beside its checkpoint."""
        return torch.stack([layer(batch).mean() for layer in self.layers]).sum()

    def configure_optimizers(self) -> Any:
        """Return AdamW, whose state is two values for each parameter."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Turns(Callback):
    """Takes the turns that save by hand, and keeps the times of all turns.

    Args:
        folder: The folder of the files.
        repetitions: The number of measured turns of each kind, after one that is not measured.
    """

    def __init__(self, folder: Path, repetitions: int) -> None:
        self.folder = folder
        self.repetitions = repetitions
        self.times: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def kind(self, trainer: Trainer) -> str:
        """Return the kind whose turn it is."""
        return KINDS[trainer.global_step % len(KINDS)]

    def timed(self, kind: str, action: Callable[[], None]) -> None:
        """Add the time of an action to the times of a kind. The disk is idle before."""
        os.sync()
        begun = time.perf_counter()
        action()
        self.times[kind].append(time.perf_counter() - begun)

    def on_safe_point(self, trainer: Trainer, event: SafePoint) -> None:
        """Save by hand if it is the turn of such a kind."""
        kind = self.kind(trainer)
        if kind not in (OVER, NEW, SYNCED):
            return
        content, number = checkpoint.state_of(trainer), len(self.times[kind])
        name = f"{KINDS.index(kind)}-{{}}.pt"

        def by_hand() -> None:
            path = self.folder / name.format(0 if kind == OVER else number)
            torch.save(content, path)
            if kind == SYNCED:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            if kind != OVER:
                (self.folder / name.format(number - 2)).unlink(missing_ok=True)

        self.timed(kind, by_hand)


class Timed(ModelCheckpoint):
    """A ModelCheckpoint that takes its turn.

    Args:
        turns: The callback that knows whose turn it is.
        mine: The kind of this one.
        **options: The arguments of ModelCheckpoint.
    """

    def __init__(self, turns: Turns, mine: str, **options: Any) -> None:
        super().__init__(turns.folder / mine, filename=f"{{step}}-{KINDS.index(mine)}", save_top_k=0, **options)
        self.turns, self.mine = turns, mine

    @property
    def state_key(self) -> str:
        """The kind, because two of these have the same schedule."""
        return f"Timed({self.mine})"

    def is_due(self, trainer: Trainer, event: TakeCheckpoint) -> bool:
        """Return whether it is the turn of this kind."""
        return self.turns.kind(trainer) == self.mine

    def on_take_checkpoint(self, trainer: Trainer, event: TakeCheckpoint) -> None:
        """Measure the time until the loop continues, in the turns of this kind."""
        if self.is_due(trainer, event):
            super_ = super().on_take_checkpoint
            self.turns.timed(self.mine, lambda: super_(trainer, event))
            self.wait(trainer)  # so that the next turn shares the disk with no other


def measure(parameters: int, repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of each turn, by kind."""
    with tempfile.TemporaryDirectory(dir=".") as name, quiet():
        turns = Turns(Path(name), repetitions)
        callbacks = [turns, Timed(turns, OURS), Timed(turns, BACKGROUND, in_background=True)]
        steps = len(KINDS) * (repetitions + 1)
        trainer = Trainer(max_steps=steps, callbacks=callbacks, default_callbacks=False, device="cpu", default_root_dir=name)
        trainer.fit(Module(parameters), [torch.randn(1, WIDTH)] * (steps + 1))
    return {kind: times[1:] for kind, times in turns.times.items()}  # the first allocates


def table(times: dict[str, list[float]]) -> str:
    """Return the minima and medians as a Markdown table."""
    least = {kind: min(values) for kind, values in times.items()}
    lines = [
        "| | seconds, minimum | median | over a new file | and fsync | over ModelCheckpoint |",
        "|---|---|---|---|---|---|",
    ]
    for kind, values in times.items():
        ratios = [f"{least[kind] / least[other]:.3f}" for other in (NEW, SYNCED, OURS)]
        lines.append(f"| {kind} | {least[kind]:.3f} | {statistics.median(values):.3f} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="rewrite docs/performance.md and its JSON")
    options = parser.parse_args(arguments)
    facts = environment() | {"parameters": options.parameters, "repetitions": options.repetitions}
    print(", ".join(f"{name}: {value}" for name, value in facts.items()), file=sys.stderr)
    times = measure(options.parameters, options.repetitions)
    text = table(times)
    print(f"\n{text}")
    if options.save:
        save("checkpoint", text, facts, times)


if __name__ == "__main__":
    main()
