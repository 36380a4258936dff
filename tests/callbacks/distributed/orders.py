"""Train in three processes, resume each checkpoint of the run, and save whether all ends are the same, bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from eventtrain import Callback
from eventtrain.callbacks import GradientAccumulation
from eventtrain.callbacks.distributed.distributed_data_parallel import DistributedDataParallel
from tests.callbacks.distributed.parts import Model, loader, new_trainer, state
from tests.resuming import equal


class KeepAll(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder, self.paths = folder, list[Path]()

    def on_safe_point(self, trainer: Any, event: Any) -> None:
        self.paths.append(self.folder / f"{len(self.paths)}.ckpt")
        trainer.save_checkpoint(self.paths[-1])


class Thawing(Callback):
    """Freezes the last layer in the first epoch, so that the second has a new wrapper."""

    def on_train_epoch_start(self, trainer: Any, event: Any) -> None:
        trainer.module.net[-1].requires_grad_(trainer.current_epoch > 0)


def train(path: Path | None, *callbacks: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    trainer = new_trainer(DistributedDataParallel(timeout=60, **options), GradientAccumulation(2), *callbacks)
    module = Model()
    trainer.fit(module, loader(30), ckpt_path=path)
    # Torch overwrites the buffers of other processes with those of the first.
    weights = state(module) if dist.get_rank() == 0 else dict(module.named_parameters())
    return weights, state(nn.Module(), trainer.optimizers)


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, list[bool]] = {}
    modes: dict[str, tuple[list[type[Callback]], dict[str, Any]]] = {
        "plain": ([], {}),
        "a new wrapper": ([Thawing], {}),
        "find_unused_parameters": ([], {"find_unused_parameters": True}),
        "views": ([], {"gradient_as_bucket_view": True}),
        "small buckets": ([], {"bucket_cap_mb": 1e-4}),
    }
    for name, (callbacks, options) in modes.items():
        (root / name).mkdir(exist_ok=True)
        keep = KeepAll(root / name)
        straight = train(None, keep, *(make() for make in callbacks), **options)
        results[name] = [equal(train(path, *(make() for make in callbacks), **options), straight) for path in keep.paths]
    (root / f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
