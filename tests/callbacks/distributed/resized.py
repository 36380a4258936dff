"""Begin an epoch in one number of processes, and end it in another; save the samples that each process trained.

``PYTHONPATH=. python tests/callbacks/distributed/resized.py FOLDER``
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, WeightedRandomSampler
from torchmetrics import CatMetric, MeanMetric, Metric

from eventtrain import LightningModule, MisconfigurationError
from eventtrain.callbacks import GradientAccumulation
from tests.callbacks.distributed.forks import in_processes
from tests.callbacks.distributed.parts import new_trainer

COUNTS = (1, 2, 4)
RESIZES = [(before, now) for before, now in itertools.product(COUNTS, COUNTS) if before != now]
SAMPLES = 8
"""The samples of a batch of all processes together."""
PLACE = (1, 3)
"""The epoch and the batch after which checkpoints are written."""


class Ids(Dataset[int]):
    """The numbers from zero."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __getitem__(self, index: int) -> int:
        return int(index)

    def __len__(self) -> int:
        return self.count


def load(count: int, **options: Any) -> DataLoader[int]:
    """Return a loader whose batches hold eight samples in all processes together."""
    return DataLoader(Ids(count), SAMPLES // world_size(), **{"shuffle": True, **options})


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def sampled(count: int) -> DataLoader[int]:
    sampler: Any = DistributedSampler(Ids(count), world_size(), int(os.environ["RANK"]), seed=3)
    return load(count, shuffle=False, sampler=sampler)


KINDS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: load(96),
    "in order": lambda: load(96, shuffle=False),
    "generator": lambda: load(96, generator=torch.Generator().manual_seed(5)),
    "accumulated": lambda: load(96),
    "sampler": lambda: sampled(96),
    "sampler if several": lambda: load(96) if world_size() == 1 else sampled(96),
    "left out": lambda: load(90, drop_last=True),
    "padded": lambda: load(95),
    "padded samplers": lambda: sampled(93),
    "workers": lambda: load(96, num_workers=1, persistent_workers=True),
    "several": lambda: {"a": load(96), "b": [load(40)]},
    "several in turn": lambda: load_in_turn(),
}


def load_in_turn() -> Any:
    from eventtrain import CombinedLoader

    return CombinedLoader([load(16), load(48), load(32)], "sequential")


class Seen(LightningModule):
    """A module that remembers its samples, by epoch and batch, and logs them in several ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(1, 1)
        self.mean, self.all = MeanMetric(), CatMetric()
        self.seen: list[tuple[int, int, list[Any]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        parts = [batch["a"], *batch["b"]] if isinstance(batch, dict) else [batch]
        self.seen.append((self.current_epoch, batch_idx, [part.tolist() for part in parts]))
        x = torch.cat(parts).float().reshape(-1, 1)
        self.log("sum", x.sum(), on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("average", x.mean(), on_step=False, on_epoch=True)
        self.mean(x)
        self.log("metric", self.mean, on_step=False, on_epoch=True)
        self.all(x)
        return (self.net(x / 100) - x / 50).square().mean()

    def on_train_epoch_end(self) -> None:
        self.all.reset()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(kind: str, ckpt_path: Any = None, saves: dict[int, Path] | None = None, make: Any = None, module: Any = None) -> Any:
    """Train two epochs; save checkpoints after some batches of the second."""
    module = module or Seen()
    trainer = new_trainer(GradientAccumulation(2 if kind == "accumulated" else 1))

    def save(trainer: Any, event: Any) -> None:
        if trainer.current_epoch == PLACE[0] and trainer.batch_idx in (saves or {}):
            trainer.save_checkpoint((saves or {})[trainer.batch_idx])

    trainer.signals.safe_point.connect(save)
    trainer.fit(module, (make or KINDS[kind])(), ckpt_path=ckpt_path)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    weights = nn.utils.parameters_to_vector(module.net.parameters()).detach()
    return {"seen": module.seen, "logged": logged, "weights": weights, "updates": trainer.global_step}


def begin(folder: Path) -> Any:
    """Run without an interruption."""
    last = world_size()
    return {
        kind: run(kind, None, {3: folder / f"{kind} {last}.ckpt", 11: folder / f"{kind} end {last}.ckpt"}) for kind in KINDS
    }


def end(folder: Path, before: int) -> Any:
    """Resume the runs of another number of processes; write a checkpoint two batches later."""
    results = {}
    for kind in KINDS:
        later = folder / f"{kind} {before} {world_size()}.ckpt"
        results[kind] = run(kind, folder / f"{kind} {before}.ckpt", {5: later})
    return results


def end_again(folder: Path, before: int, between: int) -> Any:
    """Resume the runs of yet another number of processes, or the same, which another had resumed before."""
    return {kind: run(kind, folder / f"{kind} {before} {between}.ckpt") for kind in KINDS}


class Last(Metric):
    """A metric object that cannot add another's updates."""

    full_state_update = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("last", torch.tensor(0.0), dist_reduce_fx="max")

    def update(self, value: Any) -> None:
        self.last = value.float().max()

    def compute(self) -> Any:
        return self.last


class Unmerged(Seen):
    """A module with such an object."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Any = Last()


class Blocks(DistributedSampler[int]):
    """A sampler that gives each process a part of the data in one piece."""

    def __iter__(self) -> Any:
        return iter(range(self.rank * self.num_samples, (self.rank + 1) * self.num_samples))


def blocks() -> Any:
    return load(96, shuffle=False, sampler=Blocks(Ids(96), world_size(), int(os.environ["RANK"])))


def drawn() -> Any:
    return load(96, shuffle=False, sampler=WeightedRandomSampler([1.0] * 96, 96))


REFUSED: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {
    "the batch size": (lambda: load(96), lambda: DataLoader(Ids(96), 7, shuffle=True), 2),
    "a batch size of several": (KINDS["several"], lambda: {"a": load(96), "b": [DataLoader(Ids(40), 3)]}, 2),
    "a sampler": (blocks, blocks, 2),
    "a sampler that draws": (drawn, drawn, 2),
    "other data": (lambda: load(96), lambda: load(88), 2),
    "a metric object": (lambda: load(96), lambda: load(96), 2),
}


def begin_refused(folder: Path) -> None:
    for name, (first, _, count) in REFUSED.items():
        if name != "a sampler that draws" or count == 1:
            module = Unmerged() if name == "a metric object" else Seen()
            run(name, None, {3: folder / f"{name}.ckpt"}, first, module)


def end_refused(folder: Path) -> dict[str, str]:
    messages = {}
    for name, (_, second, _) in REFUSED.items():
        if (folder / f"{name}.ckpt").exists():
            module = Unmerged() if name == "a metric object" else Seen()
            try:
                run(name, folder / f"{name}.ckpt", None, second, module)
            except MisconfigurationError as error:
                messages[name] = str(error)
            assert module.seen == []
    return messages


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    results: dict[Any, Any] = {"begun": {count: in_processes(count, begin, folder, folder) for count in COUNTS}}
    for before, now in RESIZES:
        results[before, now] = in_processes(now, end, folder, folder, before)
    for before, now, last in ((2, 1, 1), (1, 2, 2), (2, 4, 1), (4, 1, 2)):
        results[before, now, last] = in_processes(last, end_again, folder, folder, before, now)
    in_processes(2, begin_refused, folder, folder)
    results["refused"] = in_processes(1, end_refused, folder, folder)
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main()
