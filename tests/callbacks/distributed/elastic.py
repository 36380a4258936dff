"""Train in each of several processes, of which one kills itself once: torchrun starts all of them again, and they resume.

``PYTHONPATH=. torchrun --nproc-per-node 2 --max-restarts 1 tests/callbacks/distributed/elastic.py FOLDER``
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from eventtrain import Callback
from eventtrain.callbacks import ModelCheckpoint
from tests.callbacks.distributed.parts import Model, resumable, state


class AtEachBatch(ModelCheckpoint):
    """A callback that writes a checkpoint at each safe point."""

    def is_due(self, trainer: Any, event: Any) -> bool:
        return True


class Dying(Callback):
    """A callback that kills one process in the second batch of the second epoch, in an open window."""

    def on_after_forward(self, trainer: Any, event: Any) -> None:
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and trainer.total_batch_idx == 6 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Train, from the last checkpoint if there is one."""
    folder, module = Path(sys.argv[1]), Model()
    trainer, batches = resumable(AtEachBatch(folder / "checkpoints"), Dying())
    trained: list[int] = []
    trainer.signals.train_batch_end.connect(lambda trainer, event: trained.append(trainer.total_batch_idx), weak=False)
    torch.rand(int(os.environ["RANK"]))
    trainer.fit(module, batches, ckpt_path="last")
    torch.save({"state": state(module, trainer.optimizers), "trained": trained}, folder / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    main()
