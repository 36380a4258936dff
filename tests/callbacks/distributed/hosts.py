"""Train on one of two hosts, which lose a process and then the link between them.

``python hosts.py FOLDER KIND``, under torchrun on each host. What happens is told by files in the folder.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import (
    DistributedDataParallel,
    FullyShardedDataParallel,
    GradientAccumulation,
    GradientClipping,
    ModelCheckpoint,
)
from tests.callbacks.distributed.parts import SEED, loader

TIMEOUT = 5.0
KILL_AT, CUT_AT = 3, 7
"""The batches of the run in which a process kills itself, and in which the link is cut."""


class Deep(LightningModule):
    """A module with dropout and an optimizer that has a state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.first, self.dropout, self.last = nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.mse_loss(self.last(self.dropout(torch.tanh(self.first(x)))), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class AtEachBatch(ModelCheckpoint):
    """A callback that writes a checkpoint at each safe point."""

    def is_due(self, trainer: Any, event: Any) -> bool:
        return True


class Disturbed(Callback):
    """A callback that kills a process once, and once has the link cut, if files of those names are in the folder.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_before_forward(self, trainer: Any, event: Any) -> None:
        if trainer.total_batch_idx == KILL_AT and trainer.global_rank == 1 and take(self.folder / "kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.total_batch_idx == CUT_AT and trainer.global_rank == 0 and take(self.folder / "cut"):
            while not (self.folder / "down").exists():
                time.sleep(0.01)


def take(path: Path) -> bool:
    """Rename a file that says that something is to happen; return whether there was one."""
    try:
        path.rename(path.with_suffix(".taken"))
    except FileNotFoundError:
        return False
    return True


def main() -> None:
    """Train, from the last checkpoint if there is one; save the weights, or the error."""
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    kind: Any = FullyShardedDataParallel if sys.argv[2] == "fsdp" else DistributedDataParallel
    module = Deep()
    trainer = Trainer(
        max_epochs=2,
        device="cpu",
        default_root_dir=folder,
        default_callbacks=False,
        callbacks=[
            kind(timeout=TIMEOUT),
            GradientAccumulation(2),
            GradientClipping(0.5),
            AtEachBatch("checkpoints"),
            Disturbed(folder),
        ],
    )
    trained: list[int] = []
    trainer.signals.train_batch_end.connect(lambda trainer, event: trained.append(trainer.total_batch_idx), weak=False)
    torch.rand(int(rank))
    try:
        trainer.fit(module, loader(20), ckpt_path="last")
    except BaseException as error:
        (folder / f"error-{rank}-{time.time()}.txt").write_text(f"{type(error).__name__}: {error}")
        raise
    weights = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in module.state_dict().items()
    }
    torch.save({"weights": weights, "trained": trained}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main()
