"""E5. Manual optimization: the recipes of the guide equal hand-written loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from eventtrain import LightningModule
from eventtrain.callbacks import LRSchedulerStepping
from tests.kit import NoLength, batches, train
from tests.reference import backward
from tests.semantics.modules import Manual, Pair

# ------------------------------------------------------------------ E5: the recipes of the guide


def test_e5_optimizers_at_different_frequencies() -> None:
    def step(module: Any, batch: Any, batch_idx: int) -> None:
        every, other = module.optimizers()
        every.zero_grad()
        other.zero_grad()
        module.manual_backward(module.loss(batch))
        every.step()
        if batch_idx % 2 == 0:
            other.step()

    module = Pair(step)
    trainer = train(module, 5)
    assert (module.a.item(), module.b.item()) == (-15.0, -90.0)
    assert [optimizer.num_steps for optimizer in module.optimizers()] == [5, 3] and trainer.global_step == 5


def test_e5_accumulation_by_hand() -> None:
    class ByHand(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            N = 2
            opt = self.optimizers()
            loss = self.loss(batch) / N
            self.manual_backward(loss)
            if (batch_idx + 1) % N == 0:
                opt.step()
                opt.zero_grad()

    module = ByHand()
    trainer = train(module, 6)
    assert module.updates == [1.5, 3.5, 5.5] and trainer.global_step == 3


def test_e5_is_last_batch_steps_a_scheduler_at_every_other_epochs_end() -> None:
    class Stepping(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            if self.trainer.is_last_batch and (self.trainer.current_epoch + 1) % 2 == 0:
                self.lr_schedulers().step()

    module = Stepping(configure=lambda sgd: ([sgd], [LambdaLR(sgd, lambda n: 0.5**n)]))
    train(module, 2, max_epochs=4)
    assert module.rates == [1.0] * 4 + [0.5] * 4


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("sized", [True, False])
def test_e5_is_last_batch_with_every_kind_of_loader(sized: bool, limit: int | None) -> None:
    flags: list[bool] = []

    class Flagged(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            flags.append(self.trainer.is_last_batch)

    train(Flagged(), 3 if sized else NoLength(batches(3)), limit_train_batches=limit)
    assert flags == [False] * ((limit or 3) - 1) + [True]


@pytest.mark.parametrize("options", [{"on_step": False, "on_epoch": True}, {"on_step": True, "on_epoch": True}, {}])
@pytest.mark.parametrize("monitor", [False, True], ids=["no-monitor", "monitor"])
def test_e5_a_plateau_stepped_with_the_epochs_metric(monitor: bool, options: Any) -> None:
    """As in the guide: no ``monitor`` is needed, because the config's keys are ignored."""
    stepped_with: list[float] = []

    class Plateau(ReduceLROnPlateau):
        def step(self, metrics: Any, *args: Any) -> None:  # type: ignore[override]
            stepped_with.append(float(metrics))
            super().step(metrics, *args)

    class Monitored(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            self.log("loss", batch + 10.0 * self.current_epoch, **options)

        def on_train_epoch_end(self) -> None:
            self.lr_schedulers().step(self.trainer.callback_metrics["loss"])

    def configure(sgd: Any) -> Any:
        scheduler = Plateau(sgd, patience=0, factor=0.5)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"} if monitor else scheduler}

    module = Monitored(configure=configure)
    train(module, 3, LRSchedulerStepping(), max_epochs=3)
    last_or_mean = 2.0 if options.get("on_epoch") else 3.0
    assert stepped_with == [last_or_mean, last_or_mean + 10.0, last_or_mean + 20.0]
    assert module.rates == [1.0] * 6 + [0.5] * 3


def test_e5_a_gan() -> None:
    """The guide's: discriminator first, then generator, each with an optimizer, logged together."""

    class GAN(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.G, self.D = nn.Linear(2, 2), nn.Linear(2, 1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            g_opt, d_opt = self.optimizers()
            noise = torch.full_like(batch, 0.5)
            score = nn.functional.binary_cross_entropy_with_logits
            real, fake = torch.ones(len(batch), 1), torch.zeros(len(batch), 1)
            d_loss = score(self.D(batch), real) + score(self.D(self.G(noise).detach()), fake)
            d_opt.zero_grad()
            self.manual_backward(d_loss)
            d_opt.step()
            g_loss = score(self.D(self.G(noise)), real)
            g_opt.zero_grad()
            self.manual_backward(g_loss)
            g_opt.step()
            self.log_dict({"g_loss": g_loss, "d_loss": d_loss}, prog_bar=True)

        def configure_optimizers(self) -> Any:
            return Adam(self.G.parameters(), lr=0.01), Adam(self.D.parameters(), lr=0.01)

    data = list(torch.randn(4, 8, 2, generator=torch.Generator().manual_seed(3)))
    torch.manual_seed(4)
    module = GAN()
    torch.manual_seed(4)
    other = GAN()
    trainer = train(module, data, max_epochs=2)

    g_opt, d_opt = other.configure_optimizers()
    score = nn.functional.binary_cross_entropy_with_logits
    for batch in data * 2:
        noise = torch.full_like(batch, 0.5)
        real, fake = torch.ones(8, 1), torch.zeros(8, 1)
        d_loss = score(other.D(batch), real) + score(other.D(other.G(noise).detach()), fake)
        d_opt.zero_grad()
        backward(d_loss)
        d_opt.step()
        g_loss = score(other.D(other.G(noise)), real)
        g_opt.zero_grad()
        backward(g_loss)
        g_opt.step()
    for value, expected in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(value, expected)
    assert torch.equal(trainer.callback_metrics["g_loss"], g_loss.detach())
    assert torch.equal(trainer.callback_metrics["d_loss"], d_loss.detach())
    assert trainer.global_step == 8


def test_e5_stepping_an_optimizer_that_the_module_made() -> None:
    class Own(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            wrapped = self.optimizers().optimizer
            wrapped.zero_grad()
            self.manual_backward(self.loss(batch))
            wrapped.step()

    module = Own()
    trainer = train(module, 3)
    assert module.updates == [1.0, 2.0, 3.0] and trainer.global_step == 3
