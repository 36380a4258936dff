"""Train sharded modules of which one process has no loss in a batch, and save the errors.

``PYTHONPATH=. torchrun --nproc-per-node 2 tests/callbacks/distributed/absent.py FOLDER late|early``
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from eventtrain import MisconfigurationError
from eventtrain.callbacks import GradientAccumulation
from eventtrain.callbacks.distributed.fully_sharded_data_parallel import FullyShardedDataParallel
from eventtrain.callbacks.distributed.notices import ExchangeError
from tests.callbacks.distributed.parts import TIMEOUT, loader
from tests.callbacks.distributed.sharded import RANK, Block, Model, new_trainer, state


class Absent(Model):
    """A module without a loss in some batches.

    Args:
        late: The batches in which it returns None after its layers were called.
        early: The batches in which it returns None before.
        processes: The ranks that do so.
    """

    def __init__(self, late: Collection[int] = (), early: Collection[int] = (), processes: Collection[int] = (0, 1)) -> None:
        super().__init__()
        self.late, self.early, self.processes = late, early, processes

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx in self.early and RANK in self.processes:
            return None
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in self.late and RANK in self.processes else loss


def fit(module: Absent, size: int, skips: Collection[int] = ()) -> tuple[Any, str | None, float]:
    """Train an epoch of five batches; return the weights, the error, and the seconds that it took."""
    trainer = new_trainer(
        GradientAccumulation(size), processes=FullyShardedDataParallel(units=(Block,), timeout=TIMEOUT), max_epochs=1
    )

    def skip(trainer: Any, event: Any) -> None:
        if event.batch_idx in skips and RANK in module.processes:
            event.skip_batch()

    trainer.signals.train_batch_start.connect(skip)
    begun = time.monotonic()
    try:
        trainer.fit(module, loader(20))
    except (MisconfigurationError, ExchangeError) as error:
        return None, str(error), time.monotonic() - begun
    return state(module, trainer.optimizers), None, time.monotonic() - begun


ALL: dict[str, dict[str, Any]] = {"late": {"late": [0, 3]}, "early": {"early": [0, 3]}, "skipped": {}}
"""Batches that only accumulate, without a loss in any process."""


def main() -> None:
    """Train with batches that have a loss in no process; then one that has none in rank one, which ends the run."""
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    results: dict[str, Any] = {}
    if kind == "late":
        for name, options in ALL.items():
            results[name] = fit(Absent(**options), 3, skips=[] if options else [0, 3])
    results["one"] = fit(Absent(**{kind: [1]}, processes=[1]), 3)
    torch.save(results, folder / f"{RANK}.pt")


if __name__ == "__main__":
    main()
