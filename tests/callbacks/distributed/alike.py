"""Decide, evaluate, prepare data and end epochs in two processes; save what each of them saw.

``PYTHONPATH=. python tests/callbacks/distributed/alike.py FOLDER``
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from eventtrain import LightningModule
from eventtrain.callbacks import EarlyStopping, ModelCheckpoint
from tests.callbacks.distributed.forks import in_processes
from tests.callbacks.distributed.parts import new_trainer

CHECKS: dict[str, Callable[[Path], Any]] = {}


def check(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    CHECKS[function.__name__] = function
    return function


class Drifting(LightningModule):
    """A module that logs values on step which get better on rank zero, and worse on average.

    Args:
        interval: The interval of its plateau scheduler.
        only_on: The rank that logs; None for both.
    """

    def __init__(self, interval: str = "epoch", only_on: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(1, 1)
        self.interval, self.only_on = interval, only_on

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.only_on in (None, self.global_rank):
            self.log("loss", self.trainer.total_batch_idx * (-1.0 if self.global_rank == 0 else 3.0))
        return self.net(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.current_epoch * (-1.0 if self.global_rank == 0 else 3.0), on_step=True, on_epoch=False)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        plateau = ReduceLROnPlateau(optimizer, patience=0)
        monitor = "val" if self.interval == "validation" else "loss"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": monitor, "interval": self.interval},
        }


def xs(count: int) -> Any:
    return [torch.ones(2, 1)] * count


def own(*callbacks: Any, **options: Any) -> Any:
    """Return a trainer whose processes load their own shares."""
    from eventtrain.callbacks.distributed.distributed_data_parallel import DistributedDataParallel

    timeout = options.pop("timeout", 60)
    return new_trainer(DistributedDataParallel(shares_data=False, timeout=timeout), *callbacks, **options)


@check
def schedules(folder: Path) -> Any:
    results = {}
    for interval in ("epoch", "step", "batch", "validation"):
        for only_on in (None, 0, 1):
            trainer = own(max_epochs=3)
            trainer.fit(Drifting(interval, only_on), xs(2), xs(1))
            results[interval, only_on] = trainer.optimizers[0].param_groups[0]["lr"]
    return results


@check
def stopping(folder: Path) -> Any:
    results = {}
    for monitor in ("loss", "val"):
        for only_on in (None, 1):
            stopping = EarlyStopping(monitor, patience=2)
            trainer = own(stopping, max_epochs=9)
            trainer.fit(Drifting(only_on=only_on), xs(2), xs(1))
            results[monitor, only_on] = (trainer.current_epoch, stopping.best, stopping.wait_count, trainer.stop_reason)
    return results


@check
def checkpoints(folder: Path) -> Any:
    name = "{epoch}-{loss:.1f}"
    keeping = ModelCheckpoint(folder / "kept", monitor="loss", save_top_k=2, filename=name)
    trainer = own(keeping, max_epochs=3)
    trainer.fit(Drifting(), xs(2))
    return {"scores": keeping._top.scores, "files": sorted(path.name for path in (folder / "kept").iterdir())}


class Preparing(Drifting):
    """A module that takes its time to prepare data, and may fail."""

    def __init__(self, folder: Path, seconds: float, fails: bool = False) -> None:
        super().__init__()
        self.folder, self.seconds, self.fails = folder, seconds, fails

    def prepare_data(self) -> None:
        time.sleep(self.seconds)
        with (self.folder / "prepared.txt").open("a") as file:
            file.write(f"{dist.get_rank()}\n")
        if self.fails:
            raise OSError("no space left")

    def setup(self, stage: str) -> None:
        assert (self.folder / "prepared.txt").exists()


@check
def prepared(folder: Path) -> Any:
    own(max_epochs=1).fit(Preparing(folder, 0.3), xs(1))
    lines = (folder / "prepared.txt").read_text().split()
    try:
        own(max_epochs=1).fit(Preparing(folder, 0.0, fails=True), xs(1))
    except Exception as error:
        return lines, f"{type(error).__name__}: {error}"
    return lines, "no error"


def run_all(folder: Path, names: list[str]) -> Any:
    return {name: CHECKS[name](folder) for name in names}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    results = in_processes(2, run_all, folder, folder, names or list(CHECKS))
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main()
