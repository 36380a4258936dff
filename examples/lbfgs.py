"""Fit a curve with LBFGS, an optimizer that evaluates its closure several times in a step.

Automatic optimization needs no options for this. The optimizer gets the closure, and each evaluation calls ``training_step``,
zeroes the gradients and runs backward, as in plain PyTorch::

    python examples/lbfgs.py
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from eventtrain import LightningModule, Trainer, seed_everything


class Curve(LightningModule):
    """A function of one variable, as a network with one hidden layer.

    Args:
        width: The size of the hidden layer.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))
        self.evaluations = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        self.evaluations += 1
        loss = F.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def on_train_epoch_end(self) -> None:
        loss = self.trainer.callback_metrics["loss"]  # of the last evaluation in the step
        self.print(f"step {self.global_step:2d}, after {self.evaluations:3d} evaluations: loss {loss:.2e}")


def main() -> None:
    """Fit the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    seed_everything(args.seed)
    x = torch.linspace(-2, 2, 200).unsqueeze(1)
    y = torch.sin(3 * x) + x / 2
    # Each batch holds all data, because LBFGS estimates the curvature of one function.
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))

    trainer = Trainer(max_steps=args.steps, default_callbacks=False)  # no progress bar: the module prints
    trainer.fit(Curve(), loader)
    print(f"final loss {trainer.callback_metrics['loss']:.2e}")


if __name__ == "__main__":
    main()
