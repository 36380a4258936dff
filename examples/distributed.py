"""Classify handwritten digits in several processes, which share each batch.

If you start the program with torchrun, it trains in the processes that torchrun starts; with plain Python, it trains in one::

    torchrun --nproc-per-node 2 examples/distributed.py
    python examples/distributed.py
    tensorboard --logdir runs

``--batch-size`` is the size of a batch of all processes together, so that the learning rate suits any number of them.
docs/scaling.md explains the start on several machines and the effects of the number of processes.
"""

import argparse
import os

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from eventtrain import LightningModule, Trainer, seed_everything
from eventtrain.callbacks import DistributedDataParallel, GradientAccumulation, GradientClipping, TensorBoardLogger


class DigitClassifier(LightningModule):
    """A small convolutional network. It is the same for any number of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 10),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.evaluate(batch, "train")

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: list[Tensor], stage: str) -> Tensor:
        """Log the loss and the accuracy of a batch, and return the loss. The values of an epoch count all processes."""
        images, labels = batch
        logits = self.net(images)
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        self.log(f"loss/{stage}", loss, on_step=False, on_epoch=True)
        self.log(f"accuracy/{stage}", accuracy, prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.0004)
        # Each process trains on its share of the batches, and the trainer counts them.
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.01, total_steps=self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loaders(batch_size: int) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Return loaders for training, validation and the test, of all the data. The callback splits it between processes."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # pixels have values from 0 to 16
    dataset = TensorDataset(images, torch.tensor(digits.target))
    train, val, test = random_split(dataset, [0.7, 0.1, 0.2], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size, shuffle=True), DataLoader(val, 64), DataLoader(test, 64)


def main() -> None:
    """Train, then test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", default="runs")
    args = parser.parse_args()

    seed_everything(args.seed)
    torch.set_num_threads(1)  # if a network is this small, more threads would wait for each other
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    train, val, test = loaders(args.batch_size // processes)
    trainer = Trainer(
        max_epochs=args.epochs,
        callbacks=[
            DistributedDataParallel(),
            GradientAccumulation({0: 1, 5: 2}),  # gradients are exchanged once per window
            GradientClipping(1.0),
            TensorBoardLogger(args.log_dir, name="distributed", log_every_n_steps=10),  # only the first process writes
        ],
    )
    model = DigitClassifier()
    trainer.fit(model, train, val)
    (metrics,) = trainer.test(model, test)

    if trainer.is_global_zero:
        print(f"Look at the run: tensorboard --logdir {args.log_dir}")
        print(f"processes {trainer.world_size}, updates {trainer.global_step}")
        print(f"test accuracy {metrics['accuracy/test']:.3f}")


if __name__ == "__main__":
    main()
