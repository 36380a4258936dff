"""Train a network in a run that cannot be lost: if you kill it and start it again, it still ends with the same weights.

The last line is a fingerprint of the trained weights. It is the same if the run was stopped by Ctrl-C, ``kill``, ``kill -9`` or
a power failure, any number of times, and if it was never stopped::

    python examples/resume.py                # stop it, start it, stop it, start it
    tensorboard --logdir runs

TensorBoard shows one curve, with each step once.
"""

import argparse
import hashlib
import random
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from eventtrain import LightningModule, Trainer, seed_everything
from eventtrain.callbacks import (
    EarlyStopping,
    ExponentialMovingAverage,
    GradientAccumulation,
    ModelCheckpoint,
    Preemption,
    TensorBoardLogger,
)


class ShiftedDigits(Dataset):
    """Pictures of digits. A picture is shifted by at most ``shift`` pixels each time it is loaded."""

    def __init__(self, shift: int) -> None:
        digits = load_digits()
        self.images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        self.labels = torch.tensor(digits.target)
        self.shift = shift

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        by = [random.randint(-self.shift, self.shift) for _ in range(2)]
        return self.images[index].roll(by, dims=(1, 2)), self.labels[index]


class Classifier(LightningModule):
    """A small network with dropout: its weights differ if a resumed run draws other random numbers."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 256), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Dropout(0.3), nn.Linear(256, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("loss/train", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        accuracy = (self.net(images).argmax(1) == labels).float().mean()
        self.log("accuracy/val", accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    """Start the run, or resume it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", default="runs")
    args = parser.parse_args()

    seed_everything(args.seed)
    torch.set_num_threads(1)
    training, validation = ShiftedDigits(shift=1), ShiftedDigits(shift=0)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0)).tolist()
    train = DataLoader(Subset(training, order[:1400]), batch_size=32, shuffle=True, num_workers=2, persistent_workers=True)
    val = DataLoader(Subset(validation, order[1400:]), batch_size=256)

    averages = ExponentialMovingAverage(0.99)
    trainer = Trainer(
        max_epochs=args.epochs,
        callbacks=[
            GradientAccumulation(2),
            averages,
            EarlyStopping("accuracy/val", mode="max", patience=30),
            TensorBoardLogger(args.log_dir, name="resume", log_every_n_steps=10),
            # A checkpoint every second, and the best of them. If a signal comes, Preemption has one written too.
            ModelCheckpoint(
                Path(args.log_dir) / "resume" / "checkpoints", every_n_minutes=1 / 60, monitor="accuracy/val", mode="max"
            ),
            Preemption(),
        ],
    )

    @trainer.signals.train_start.connect
    def print_progress(trainer: Trainer, event: object) -> None:
        print(f"resumes at update {trainer.global_step}" if trainer.global_step else "starts", flush=True)

    model = Classifier()
    trainer.fit(model, train, val, ckpt_path="last")
    averages.copy_into(model)

    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    print(f"Look at the run: tensorboard --logdir {args.log_dir}")
    print(f"weights {hashlib.sha256(weights).hexdigest()[:16]}")


if __name__ == "__main__":
    main()
