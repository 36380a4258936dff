"""Draw handwritten digits by manual optimization, with two optimizers that step at different frequencies.

A generator learns to draw pictures that a discriminator cannot tell from the 1,797 pictures of 8x8 pixels in scikit-learn. The
module calls zero_grad, backward and step: for the discriminator in each batch, for the generator in every second batch. It
writes its drawings into TensorBoard, on the page Images::

    python examples/gan.py
    tensorboard --logdir runs
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from eventtrain import LightningModule, Trainer, seed_everything
from eventtrain.callbacks import LearningRateMonitor, TensorBoardLogger


class DigitGAN(LightningModule):
    """Two small networks that play against each other.

    Args:
        latent_size: The length of the noise vector from which a picture is drawn.
        generator_every: The number of batches from one step of the generator to the next.
        draw_every: The number of epochs from one picture in TensorBoard to the next.
    """

    def __init__(self, latent_size: int = 32, generator_every: int = 2, draw_every: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(latent_size, 256),
            nn.BatchNorm1d(256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.BatchNorm1d(256),
            nn.ReLU(),
            nn.Linear(256, 64),
            nn.Sigmoid(),
            nn.Unflatten(1, (1, 8, 8)),
        )
        self.discriminator = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 256),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),  # there are few pictures, which it could learn by heart
            nn.Linear(256, 256),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(256, 1),
        )
        # The same noise each time, so that you can watch each picture change.
        self.register_buffer("sample_noise", torch.randn(64, latent_size))

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (real,) = batch
        generator_optimizer, discriminator_optimizer = self.optimizers()
        noise = torch.randn(len(real), self.hparams.latent_size, device=self.device)

        # If an optimizer is toggled, the parameters of the other network need no gradients, so none are computed.
        with self.toggled_optimizer(discriminator_optimizer):
            loss = (self.judge(real, 0.9) + self.judge(self(noise).detach(), 0.0)) / 2  # 0.9, so that it is never quite sure
            discriminator_optimizer.zero_grad()
            self.manual_backward(loss)
            discriminator_optimizer.step()
            self.log("discriminator_loss", loss, prog_bar=True, on_step=False, on_epoch=True)

        if (batch_idx + 1) % self.hparams.generator_every == 0:
            with self.toggled_optimizer(generator_optimizer):
                loss = self.judge(self(noise), 1.0)
                generator_optimizer.zero_grad()
                self.manual_backward(loss)
                generator_optimizer.step()
                self.log("generator_loss", loss, prog_bar=True, on_step=False, on_epoch=True)

    def judge(self, images: Tensor, target: float) -> Tensor:
        """Return the loss of the discriminator's verdict on pictures. The target is 1 if they are real, else 0."""
        verdict = self.discriminator(images)
        return F.binary_cross_entropy_with_logits(verdict, torch.full_like(verdict, target))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.999)),
            torch.optim.Adam(self.discriminator.parameters(), lr=5e-4, betas=(0.5, 0.999)),
        ]

    def on_train_epoch_end(self) -> None:
        if (self.current_epoch + 1) % self.hparams.draw_every == 0:
            self.eval()
            with torch.no_grad():
                drawn = self(self.sample_noise)
            self.train()
            self.logger.experiment.add_image("digits", grid(drawn), self.global_step)


def grid(images: Tensor, columns: int = 8, border: int = 1, zoom: int = 4) -> Tensor:
    """Return one picture that shows all pictures in rows.

    Args:
        images: Shape (N, C, H, W); N is a multiple of ``columns``.
        columns: The number of pictures in a row.
        border: The number of black pixels to the right of each picture and below it.
        zoom: The factor by which each picture is enlarged.

    Returns:
        Shape (C, rows * (H + border) * zoom, columns * (W + border) * zoom).
    """
    images = F.pad(images, (0, border, 0, border))
    rows = images.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)  # (C, rows, H, columns, W)
    picture = rows.flatten(3, 4).flatten(1, 2)
    return picture.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)


def main() -> None:
    """Train both networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", default="runs")
    args = parser.parse_args()

    seed_everything(args.seed)  # before the model is built, so that its initial weights are the same too
    torch.set_num_threads(1)  # if networks are this small, more threads would wait for each other
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16  # pixels have values from 0 to 16
    loader = DataLoader(TensorDataset(images), batch_size=32, shuffle=True, drop_last=True)

    trainer = Trainer(max_epochs=args.epochs, callbacks=[LearningRateMonitor(), TensorBoardLogger(args.log_dir, name="gan")])
    trainer.fit(DigitGAN(draw_every=min(10, args.epochs)), loader)

    losses = trainer.callback_metrics
    print(f"See its drawings: tensorboard --logdir {args.log_dir}")
    print(f"final losses: discriminator {losses['discriminator_loss']:.3f}, generator {losses['generator_loss']:.3f}")


if __name__ == "__main__":
    main()
