"""Classify handwritten digits. One page shows the callbacks that most runs need.

The data are the 1,797 pictures of 8x8 pixels that come with scikit-learn. The run has mixed precision, gradient accumulation
and clipping that change with the epoch, a learning rate that follows the number of updates, validation, a test, and
TensorBoard::

    python examples/digits.py
    tensorboard --logdir runs
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from eventtrain import LightningModule, Trainer, seed_everything
from eventtrain.callbacks import (
    GradientAccumulation,
    GradientClipping,
    LearningRateMonitor,
    MixedPrecision,
    TensorBoardLogger,
)


class DigitClassifier(LightningModule):
    """A small convolutional network.

    Args:
        channels: The number of channels of the first layer; the second layer has twice as many.
        dropout: The fraction of features that is dropped before the last layer.
        max_lr: The highest learning rate of the cycle.
    """

    def __init__(self, channels: int = 32, dropout: float = 0.3, max_lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * channels * 4 * 4, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.evaluate(batch, "train")

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: list[Tensor], stage: str) -> Tensor:
        """Log the loss and the accuracy of a batch, and return the loss."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        self.log(f"loss/{stage}", loss)
        self.log(f"accuracy/{stage}", accuracy, prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.max_lr / 25)
        # If gradients are accumulated, there are fewer updates than batches; the trainer knows their number.
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.hparams.max_lr, total_steps=self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loaders(batch_size: int) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Return loaders for training, validation and the test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # pixels have values from 0 to 16
    dataset = TensorDataset(images, torch.tensor(digits.target))
    # The split has a fixed seed, so that runs with another --seed train on the same pictures.
    train, val, test = random_split(dataset, [0.7, 0.1, 0.2], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size, shuffle=True), DataLoader(val, 256), DataLoader(test, 256)


def main() -> None:
    """Train, then test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", default="runs")
    args = parser.parse_args()

    seed_everything(args.seed)  # before the model is built, so that its initial weights are the same too
    torch.set_num_threads(1)  # if a network is this small, more threads would wait for each other
    train, val, test = loaders(args.batch_size)
    trainer = Trainer(
        max_epochs=args.epochs,
        callbacks=[
            MixedPrecision("bf16"),
            GradientAccumulation({0: 1, 10: 2}),  # from epoch 10 on: fewer updates, less noise
            GradientClipping({0: 2.0, 5: 1.0}),  # lower before the learning rate reaches its peak
            LearningRateMonitor(),
            TensorBoardLogger(args.log_dir, name="digits", log_every_n_steps=10),
        ],
    )
    model = DigitClassifier()
    trainer.fit(model, train, val)
    (metrics,) = trainer.test(model, test)

    print(f"Look at the run: tensorboard --logdir {args.log_dir}")
    print(f"test accuracy {metrics['accuracy/test']:.3f}")


if __name__ == "__main__":
    main()
