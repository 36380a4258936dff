"""Train from loaders without a length, in two and in four processes; save what each of them saw.

``PYTHONPATH=. python tests/callbacks/distributed/streams.py FOLDER [quick]``
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from eventtrain import LightningModule
from eventtrain.callbacks import GradientAccumulation
from eventtrain.callbacks.distributed.distributed_data_parallel import DistributedDataParallel
from tests.callbacks.distributed.forks import in_processes
from tests.callbacks.distributed.parts import new_trainer, state

SHARES = ((1, 7, 3, 5), (4, 2, 6, 2), (3, 3, 3, 3), (6, 6, 5, 9))
"""The batches of each rank in each epoch; two processes take the first two."""
MODES: dict[str, dict[str, Any]] = {
    "usual": {},
    "a limit": {"limit_train_batches": 3},
    "read_ahead=False": {"read_ahead": False},
    "several loaders": {},
}
KINDS = ("batches of a sampler", "a stateful stream", "workers", "several loaders")
QUICK = 1
"""How many of the kinds are resumed in the quick half of the tests."""


class Model(LightningModule):
    """A module that draws random numbers, and notes its batches: the epoch, the index, and whether it is the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(), nn.Linear(4, 1))
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append((self.current_epoch, batch_idx, self.trainer.is_last_batch))
        return self.net(batch["a"] if isinstance(batch, dict) else batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stream:
    """A loader without a length that draws its batches and keeps its position.

    Args:
        lengths: Its batches in each epoch.
    """

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.epoch, self.at = lengths, 0, 0
        self.reads: list[int] = []

    def __iter__(self) -> Iterator[Tensor]:
        self.reads.append(self.at)
        while self.at < self.lengths[self.epoch]:
            self.at += 1
            self.reads[-1] = self.at
            yield torch.rand(2, 1)
        self.at = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.at = epoch, 0

    @property
    def sampler(self) -> Stream:
        """Itself: the run tells a sampler the epoch."""
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at, self.epoch = state["at"], state["epoch"]


class Drawing(Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(1)


class Batches:
    """A sampler of batches that has no length, and draws them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.count):
            yield torch.randint(9, (2,)).tolist()


def new_loader(kind: str, lengths: list[int]) -> Any:
    if kind == "a stateful stream":
        return Stream(lengths)
    if kind == "several loaders":
        return {"a": Stream(lengths), "b": Stream([2] * len(lengths))}
    sampler: Any = Batches(lengths[0])
    return DataLoader(Drawing(), batch_sampler=sampler, num_workers=int(kind == "workers"))


def ends() -> Any:
    """Train epochs of different lengths in each mode."""
    rank, results = dist.get_rank(), {}
    lengths = [shares[rank] for shares in SHARES]
    for name, options in MODES.items():
        module = Model()
        remainder: Any = "carry" if name == "read_ahead=False" else "step"
        stream = Stream(lengths)
        loader = {"a": stream, "b": [torch.ones(2, 1)] * 2} if name == "several loaders" else stream
        engine = DistributedDataParallel(shares_data=False, timeout=60.0)
        trainer = new_trainer(engine, GradientAccumulation(2, remainder=remainder), max_epochs=len(SHARES), **options)
        trainer.fit(module, loader)
        results[name] = {
            "seen": module.seen,
            "state": state(module)["module"],
            "updates": trainer.global_step,
            "reads": stream.reads,
        }
    return results


def resumes(folder: Path, kinds: tuple[str, ...]) -> Any:
    """Write a checkpoint at each safe point of a run, and resume each of them."""
    rank, results = dist.get_rank(), {}
    lengths = [(5, 4)[rank], (3, 4)[rank]]
    for number, kind in enumerate(kinds):
        paths: list[Path] = []

        def save(trainer: Any, event: Any, number: int = number, paths: list[Path] = paths) -> None:
            paths.append(folder / f"{number}-{len(paths)}-of-{rank}.ckpt")
            trainer.save_checkpoint(paths[-1])

        def trainer_and_module() -> Any:
            engine = DistributedDataParallel(shares_data=False, timeout=60.0)
            return new_trainer(engine, GradientAccumulation(3), default_root_dir=folder), Model()

        trainer, module = trainer_and_module()
        trainer.signals.safe_point.connect(save)
        torch.rand(rank)  # from here on each rank draws other numbers
        trainer.fit(module, new_loader(kind, lengths))
        undisturbed, resumed = (module.seen, state(module, trainer.optimizers)), []
        for path in paths:
            trainer, module = trainer_and_module()
            torch.manual_seed(99 + rank)
            trainer.fit(module, new_loader(kind, lengths), ckpt_path=path)
            resumed.append((module.seen, state(module, trainer.optimizers)))
        results[kind] = {"undisturbed": undisturbed, "resumed": resumed}
    return results


def main() -> None:
    folder, quick = Path(sys.argv[1]), sys.argv[2:] == ["quick"]
    torch.set_num_threads(1)
    kinds = KINDS[:QUICK] if quick else KINDS[QUICK:]
    saved = {"ends": in_processes(2 if quick else 4, ends, folder), "resumes": in_processes(2, resumes, folder, folder, kinds)}
    torch.save(saved, folder / "results.pt")


if __name__ == "__main__":
    main()
