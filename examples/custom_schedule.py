"""Write new schedules by overriding the policy of a callback, and by a scheduler whose ``step`` takes other arguments.

Accumulation begins after a warm-up, the clipping threshold falls from epoch to epoch, and the learning rate follows a scheduler
with ``step(epoch, metric)``, which torch's schedulers do not have::

    python examples/custom_schedule.py
"""

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from eventtrain import LightningModule, Trainer, events, seed_everything
from eventtrain.callbacks import GradientAccumulation, GradientClipping


class Warmup(GradientAccumulation):
    """Accumulates only after the first 100 updates, because many updates help more than smooth ones at first."""

    def batches_per_step(self, trainer: Trainer) -> int:
        return 1 if trainer.global_step < 100 else super().batches_per_step(trainer)


class Tightening(GradientClipping):
    """Lowers the threshold by a fifth in each epoch."""

    def threshold(self, trainer: Trainer) -> float:
        return super().threshold(trainer) * 0.8**trainer.current_epoch


class Patience:
    """Halves the learning rate if the metric has not fallen by a tenth. Its ``step`` takes the arguments of another library.

    Args:
        optimizer: The optimizer.
        first_epoch: The first epoch in which it may change the learning rate.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, first_epoch: int) -> None:
        self.optimizer = optimizer
        self.first_epoch = first_epoch
        self.best = float("inf")

    def step(self, epoch: int, metric: float) -> None:
        """Halve the learning rate if the metric of an epoch is not good enough."""
        if epoch >= self.first_epoch and metric > 0.9 * self.best:
            for group in self.optimizer.param_groups:
                group["lr"] /= 2
        self.best = min(self.best, metric)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that a checkpoint kept."""
        self.best = state["best"]


class Regression(LightningModule):
    """A linear model, which is fitted to noisy data."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(16, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.mse_loss(self.net(x), y))

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        # If a scheduler monitors a metric, its step waits until the metrics of the epoch are final.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": Patience(optimizer, 2), "monitor": "val_loss"}}

    def lr_scheduler_step(self, scheduler: Patience, metric: Tensor) -> None:
        scheduler.step(self.current_epoch, float(metric))


def main() -> None:
    """Train, and print the schedules of each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    seed_everything(args.seed)
    x = torch.randn(1200, 16)
    y = x @ torch.randn(16, 1) + 0.1 * torch.randn(1200, 1)
    train, val = TensorDataset(x[:1000], y[:1000]), TensorDataset(x[1000:], y[1000:])

    warmup, tightening = Warmup(4), Tightening(1.0)
    trainer = Trainer(max_epochs=args.epochs, callbacks=[warmup, tightening])

    # A function can listen too, without a class.
    @trainer.signals.train_epoch_end.connect
    def report(trainer: Trainer, event: events.TrainEpochEnd) -> None:
        trainer.print(
            f"epoch {event.epoch}: step {trainer.global_step:3d}, val_loss {trainer.callback_metrics['val_loss']:.4f}, "
            f"{warmup.batches_per_step(trainer)} batches per step, clipped at {tightening.threshold(trainer):.2f}, "
            f"learning rate {trainer.optimizers[0].param_groups[0]['lr']:.4f}"
        )

    trainer.fit(Regression(), DataLoader(train, batch_size=20, shuffle=True), DataLoader(val, batch_size=200))
    print(f"final val_loss {trainer.callback_metrics['val_loss']:.4f}")


if __name__ == "__main__":
    main()
