"""Runs of several processes that are killed: the kinds of runs, and one process of a run.

The processes join over a store that the test holds, as torchrun's agent does, and a restart reads another part of it.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from eventtrain import Trainer
from eventtrain.callbacks import (
    ExponentialMovingAverage,
    FullyShardedDataParallel,
    GradientAccumulation,
    GradientClipping,
    JSONLinesLogger,
    LearningRateMonitor,
    LRSchedulerStepping,
    ModelCheckpoint,
    TensorBoardLogger,
)
from eventtrain.callbacks.distributed.distributed_data_parallel import DistributedDataParallel
from tests.chaos.places import Places
from tests.resuming import Model

TIMEOUT = 20.0
"""Seconds that an exchange waits for a process that has died; a broken connection ends it at once."""
PER_PROCESS = 16
"""The samples of each process in an epoch, in batches of two."""


def keeping() -> list[Any]:
    return [
        ModelCheckpoint("newest", every_n_steps=1),
        ModelCheckpoint("best", monitor="val", save_top_k=2, every_n_steps=2),
    ]


def replicated() -> list[Any]:
    return [DistributedDataParallel(timeout=TIMEOUT), ExponentialMovingAverage(0.9), *keeping()]


def in_background() -> list[Any]:
    return [DistributedDataParallel(timeout=TIMEOUT), ModelCheckpoint(every_n_steps=1, in_background=True, save_top_k=2)]


def sharded() -> list[Any]:
    return [FullyShardedDataParallel(timeout=TIMEOUT), *keeping()]


KINDS: dict[str, tuple[int, Callable[[], list[Any]]]] = {
    "two processes": (2, replicated),
    "two processes, checkpoints in the background": (2, in_background),
    "four processes": (4, replicated),
    "two processes, sharded": (2, sharded),
    "four processes, sharded": (4, sharded),
}
"""The number of processes of each kind of run, and its callbacks."""


# ------------------------------------------------------------------ one process


def whole(value: Any) -> Any:
    """Return a copy of nested values in which sharded tensors are gathered, as all processes have to do at once."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: whole(each) for key, each in value.items()}
    return [whole(each) for each in value] if isinstance(value, (list, tuple)) else value


def make_trainer(name: str, root: Path) -> tuple[Trainer, JSONLinesLogger, TensorBoardLogger]:
    logger, board = JSONLinesLogger(log_every_n_steps=1), TensorBoardLogger(log_every_n_steps=1)
    others = [GradientAccumulation(2), GradientClipping(0.5), LRSchedulerStepping(), LearningRateMonitor(), logger, board]
    trainer = Trainer(
        max_epochs=2,
        val_check_interval=4,
        num_sanity_val_steps=0,
        callbacks=[*others, *KINDS[name][1]()],
        default_callbacks=False,
        device="cpu",
        default_root_dir=root,
        seed=3,
    )
    return trainer, logger, board


def samples(name: str) -> Any:
    return torch.randn(PER_PROCESS * KINDS[name][0], 3, generator=torch.Generator().manual_seed(2))


def train(name: str, root: Path, rank: int, port: int, start: int, at: int | None) -> None:
    """Be one process of a run, which goes to its end and writes ``final-RANK.pt`` and ``places-RANK.json``; or die at a place.

    Args:
        name: The kind.
        root: The folder of the run.
        rank: The rank of the process.
        port: The port of the store.
        start: The number of starts before.
        at: The number of the place; None for none.
    """
    sys.stderr = open(root / f"errors-{start}-{rank}.txt", "w")  # noqa: SIM115
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(KINDS[name][0]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(start),
    }
    places = Places(at)
    torch.manual_seed(7)
    random.seed(7)
    numpy.random.seed(7)
    trainer, logger, board = make_trainer(name, root)
    data = samples(name)
    places.count_file_operations()
    places.count_events(trainer)
    trainer.fit(Model(), DataLoader(data, 2, shuffle=True), DataLoader(data, 4), ckpt_path="last")
    places.counts = False
    final = {
        "draws": [torch.rand(2), random.random(), float(numpy.random.random())],
        # The buffers of other processes than the first do not count: torch overwrites them with those of the first.
        "state_dict": whole(trainer.module.state_dict() if rank == 0 else dict(trainer.module.named_parameters())),
        "optimizers": [whole(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "metrics": {key: torch.as_tensor(value) for key, value in trainer.callback_metrics.items()},
        "steps": trainer.global_step,
        "reason": trainer.stop_reason,
        "log": str(logger.run_path) if rank == 0 else None,
        "board": str(board.run_dir) if rank == 0 else None,
    }
    torch.save(final, root / ("final.pt" if rank == 0 else f"final-{rank}.pt"))
    (root / f"places-{rank}.json").write_text(json.dumps(places.kinds))
    dist.barrier()


def read(name: str, root: Path, paths: list[Path], result: Path) -> None:
    """Be one process that reads the weights of checkpoints, sharded or not, and writes them to a file."""
    sys.stderr = open(root / "errors-reading.txt", "w")  # noqa: SIM115
    weights = []
    for path in paths:
        callbacks = [FullyShardedDataParallel()] if "sharded" in name else []
        trainer = Trainer(callbacks=callbacks, default_callbacks=False, device="cpu", default_root_dir=root)
        module = Model()
        trainer.validate(module, DataLoader(samples(name), 4), ckpt_path=path)
        weights.append(whole(module.state_dict()))
    torch.save(weights, result)
