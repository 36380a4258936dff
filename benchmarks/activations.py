"""Measures the memory of activations with and without ActivationCheckpointing, as the number of blocks grows.

``PYTHONPATH=. python benchmarks/activations.py`` prints a table: the bytes that autograd holds between forward and backward,
which are exact, and the growth of the process's resident memory. Each row is measured in processes of its own.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor, nn

from eventtrain import LightningModule, Trainer
from eventtrain.callbacks import ActivationCheckpointing

TOKENS, WIDTH = 8192, 128
BLOCKS = (2, 4, 8, 16)
MIB = 2**20


class Block(nn.Module):
    """The feed-forward block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y: Tensor = x + nn.functional.dropout(self.out(nn.functional.gelu(self.into(self.norm(x)))), 0.1)
        return y


class Model(LightningModule):
    """Blocks in a row. It counts the bytes that are held for the backward.

    Args:
        blocks: How many.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
        self.held = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return a loss, and count the bytes that its backward needs."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.parameters()}
        sizes: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        # The inputs of blocks whose activations are computed again are held by torch's checkpoint, and packed by no hook.
        hooks = [block.register_forward_pre_hook(lambda block, inputs: (count(inputs[0]), None)[1]) for block in self.blocks]
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss: Tensor = self.blocks(batch).square().mean()
        for hook in hooks:
            hook.remove()
        self.held = sum(sizes.values())
        return loss

    def configure_optimizers(self) -> Any:
        """Return an optimizer without a state."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def measure(blocks: int, checkpoints: bool) -> dict[str, float]:
    """Train a step; return the bytes that were held in it, and the growth of the peak of the resident memory.

    Args:
        blocks: The number of blocks.
        checkpoints: Whether their activations are computed again.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = Model(blocks)
    peaks: list[float] = []
    callbacks = [ActivationCheckpointing([Block])] if checkpoints else []
    trainer = Trainer(max_epochs=1, device="cpu", callbacks=callbacks, default_callbacks=False)
    trainer.signals.train_batch_end.connect(lambda trainer, event: peaks.append(peak()), weak=False)
    trainer.fit(module, [torch.randn(1, WIDTH), torch.randn(TOKENS, WIDTH)])  # the first step imports what is imported late
    return {"held": module.held, "resident": peaks[1] - peaks[0]}


def peak() -> float:
    """Return the most memory that this process has had so far, in bytes."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Print the table."""
    print(f"{TOKENS} tokens of width {WIDTH}, torch {torch.__version__}; MiB, without the callback and with it\n")
    print("| blocks | held | held with it | resident | resident with it |\n|---:|---:|---:|---:|---:|")
    for blocks in BLOCKS:
        rows = []
        for checkpoints in (False, True):
            command = [sys.executable, __file__, str(blocks), str(int(checkpoints))]
            # Else the C library keeps parts of freed tensors, and the resident memory shows its holes.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
            printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            rows.append(json.loads(printed))
        cells = [f"{row[key] / MIB:.0f}" for key in ("held", "resident") for row in rows]
        print(f"| {blocks} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(int(sys.argv[1]), sys.argv[2] == "1")))
    else:
        main()
