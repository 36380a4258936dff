"""Trains in each of several processes, one of which kills itself once: torchrun starts all anew, and they go on.

``torchrun --nproc-per-node 2 --max-restarts 1 tests/callbacks/distributed/elastic.py FOLDER``
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parts import Model, resumable, state

from eventtrain import Callback
from eventtrain.callbacks import ModelCheckpoint


class AtEachBatch(ModelCheckpoint):
    """Writes a checkpoint at each safe point."""

    def is_due(self, trainer: Any, event: Any) -> bool:
        return True


class Dying(Callback):
    """Dies in the second batch of the second epoch, after the first of a window of three."""

    def on_after_forward(self, trainer: Any, event: Any) -> None:
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and trainer.total_batch_idx == 6 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Trains, from the last checkpoint if there is one."""
    folder, module = Path(sys.argv[1]), Model()
    run, batches = resumable(AtEachBatch(folder / "checkpoints"), Dying())
    trained: list[int] = []
    run.signals.train_batch_end.connect(lambda trainer, event: trained.append(trainer.total_batch_idx), weak=False)
    torch.rand(int(os.environ["RANK"]))
    run.fit(module, batches, ckpt_path="last")
    torch.save({"state": state(module, run.optimizers), "trained": trained}, folder / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    main()
