"""H2. Loss scaling with several optimizers in one step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.functional import mse_loss
from torch.optim import Adam

from eventtrain import LightningModule
from eventtrain.callbacks import MixedPrecision
from tests.kit import Recorder, train
from tests.reference import backward
from tests.semantics.precision import INF, Pair, assert_same, autocast, data, eager_scaler, run_pair, small_scaler

# ------------------------------------------------------------------ H2: several optimizers


def test_h2_two_optimizers_whose_backwards_come_first() -> None:
    """Lightning: the second is unscaled by the scale after the first's update, 1.0 becomes 0.5."""

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        d.zero_grad()
        module.manual_backward(module.g * x)
        module.manual_backward(module.d * x)
        g.step()
        d.step()

    module, trainer, scales = run_pair(step, 3, eager_scaler())
    assert module.g_updates == module.d_updates == [1.0, 2.0, 3.0]
    assert scales == [16.0, 32.0, 64.0]  # one update for each batch, as in the documentation
    assert trainer.global_step == 3
    assert [optimizer.num_steps for optimizer in trainer.optimizers] == [3, 3]


def test_h2_one_of_two_overflows() -> None:
    """Only its step is skipped, and the scale backs off once, as in the documentation."""

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        d.zero_grad()
        module.manual_backward(module.g * (INF if batch_idx == 1 else x))
        module.manual_backward(module.d * x)
        g.step()
        d.step()

    module, trainer, scales = run_pair(step, 3, eager_scaler())
    assert module.g_updates == [1.0, 3.0]
    assert module.d_updates == [1.0, 2.0, 3.0]
    assert scales == [16.0, 8.0, 16.0]
    assert trainer.global_step == 3
    assert [optimizer.num_steps for optimizer in trainer.optimizers] == [2, 3]


def test_h2_both_overflow_and_nothing_is_counted() -> None:
    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        d.zero_grad()
        module.manual_backward((module.g + module.d) * x)
        g.step()
        d.step()

    module, trainer, scales = run_pair(step, [1.0, INF, 3.0], eager_scaler())
    assert module.g_updates == module.d_updates == [1.0, 3.0]
    assert scales == [16.0, 8.0, 16.0]
    assert trainer.global_step == 2


def critic(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
    for i in range(5):
        d.zero_grad()
        module.manual_backward(module.d * (x + i))
        d.step()
    g.zero_grad()
    module.manual_backward(module.g * x)
    g.step()


def test_h2_five_critic_steps_a_batch() -> None:
    """The scale changes between them, when the critic is zeroed again; each is unscaled by the scale of its backward."""
    module, trainer, scales = run_pair(critic, 2, eager_scaler())
    assert module.d_updates == [1.0, 2.0, 3.0, 4.0, 5.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert module.g_updates == [1.0, 2.0]
    assert scales == [8.0 * 2**5, 8.0 * 2**10]  # an update for each critic step, as written by hand
    assert [optimizer.num_steps for optimizer in trainer.optimizers] == [2, 10]
    assert trainer.global_step == 2


def test_h2_critic_steps_while_another_holds_scaled_gradients() -> None:
    """The generator's backward came first, so the scale is kept until it steps."""
    scales_within: list[float] = []

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        module.manual_backward(module.g * x)
        for i in range(3):
            d.zero_grad()
            module.manual_backward(module.d * (x + i))
            d.step()
            scales_within.append(scaler.get_scale())
        g.step()

    scaler = eager_scaler()
    module, _, scales = run_pair(step, 2, scaler)
    assert module.d_updates == [1.0, 2.0, 3.0, 2.0, 3.0, 4.0]
    assert module.g_updates == [1.0, 2.0]
    assert scales_within == [8.0, 8.0, 8.0, 16.0, 16.0, 16.0]
    assert scales == [16.0, 32.0]


def test_h2_an_overflow_while_the_scale_is_kept_still_backs_off_later() -> None:
    """The second of three critic steps overflows, the third does not."""

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        module.manual_backward(module.g * x)
        for factor in (1.0, INF, 3.0):
            d.zero_grad()
            module.manual_backward(module.d * factor)
            d.step()
        g.step()

    skipped = Recorder("optimizer_step_skipped")
    module, trainer, scales = run_pair(step, 2, eager_scaler(), skipped)
    assert module.d_updates == [1.0, 3.0, 1.0, 3.0]
    assert module.g_updates == [1.0, 2.0]
    assert scales == [4.0, 2.0]
    assert [event.reason for event in skipped.events] == ["overflow", "overflow"]
    assert [optimizer.num_steps for optimizer in trainer.optimizers] == [2, 4]


@pytest.mark.parametrize("zeroes_first", [False, True], ids=["zero after step", "zero before backward"])
def test_h2_a_discriminator_accumulating_by_hand_beside_a_generator_that_steps(zeroes_first: bool) -> None:
    """D = -5 on the probe: means 1.5 and 3.5; G steps on each of 1, 2, 3, 4."""

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        module.manual_backward(module.g * x)
        g.step()
        if zeroes_first and batch_idx % 2 == 0:
            d.zero_grad()
        module.manual_backward(module.d * x / 2)
        held.append(scaler.get_scale())
        if (batch_idx + 1) % 2 == 0:
            d.step()
            if not zeroes_first:
                d.zero_grad()

    held: list[float] = []
    scaler = eager_scaler()
    module, trainer, _ = run_pair(step, 4, scaler)
    assert module.d.item() == -5.0
    assert module.d_updates == [1.5, 3.5]
    assert module.g.item() == -10.0
    assert module.g_updates == [1.0, 2.0, 3.0, 4.0]
    assert held == [8.0, 8.0, 16.0, 16.0]  # the scale stays as long as D holds scaled gradients
    assert trainer.global_step == 4


def test_h2_an_overflow_beside_an_open_window_backs_off_once_it_is_closed() -> None:
    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        module.manual_backward(module.g * (INF if batch_idx == 0 else x))
        g.step()
        module.manual_backward(module.d * x / 2)
        held.append(scaler.get_scale())
        if (batch_idx + 1) % 2 == 0:
            d.step()
            d.zero_grad()

    held: list[float] = []
    scaler = eager_scaler()
    module, _, _ = run_pair(step, 4, scaler)
    assert module.g_updates == [2.0, 3.0, 4.0]
    assert module.d_updates == [1.5, 3.5]
    assert held == [8.0, 8.0, 4.0, 4.0]


def test_h2_an_optimizer_that_steps_rarely_does_not_hold_the_scale() -> None:
    """Gradients that it has stepped with, and not zeroed yet, are not scaled: another's overflow backs off."""

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        if batch_idx % 8 == 0:
            g.zero_grad()
            module.manual_backward(module.g)
            g.step()
        d.zero_grad()
        module.manual_backward(module.d * 4.0)  # overflows until the scale has backed off to 2 ** 125
        d.step()

    scaler = GradScaler("cpu", init_scale=2.0**127)
    module, trainer, scales = run_pair(step, 8, scaler)
    assert module.g_updates == [1.0]
    assert module.d_updates == [4.0] * 6
    assert scales == [2.0**126] + [2.0**125] * 7
    assert [optimizer.num_steps for optimizer in trainer.optimizers] == [1, 6]


def test_h2_an_optimizer_stepped_again_without_zeroing_keeps_the_scale() -> None:
    """Gradients that pile up from one backward to the next, which torch's scaler would refuse."""

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        module.manual_backward(module.g * x)
        g.step()
        d.zero_grad()
        module.manual_backward(module.d * x)
        d.step()
        g.zero_grad()
        module.manual_backward(module.g * x)
        g.step()

    module, _, _ = run_pair(step, 3, eager_scaler())
    assert module.g_updates == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    assert module.d_updates == [1.0, 2.0, 3.0]


def test_h2_gradients_that_were_zeroed_do_not_hold_the_scale() -> None:
    """G's backward of the first batch is thrown away, and G does nothing afterwards."""

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        if batch_idx == 0:
            module.manual_backward(module.g * x)
            g.zero_grad()
        d.zero_grad()
        module.manual_backward(module.d * x)
        d.step()

    module, _, scales = run_pair(step, 3, eager_scaler())
    assert module.d_updates == [1.0, 2.0, 3.0]
    assert scales == [16.0, 32.0, 64.0]


def test_h2_a_backward_through_the_other_model_does_not_harm_it() -> None:
    """The usual GAN that does not detach: D's loss leaves scaled gradients in G, which G zeroes next."""

    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        module.manual_backward(module.g * x)
        g.step()
        d.zero_grad()
        module.manual_backward(module.d * x + module.g * 100.0)
        d.step()

    module, _, _ = run_pair(step, 4, eager_scaler())
    assert module.g_updates == module.d_updates == [1.0, 2.0, 3.0, 4.0]


def test_h2_gan_equals_the_hand_written_loop() -> None:
    """Two small networks, discriminator first, an overflow, growth and backoff."""

    class Gan(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.automatic_optimization = False
            self.generator = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
            self.discriminator = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

        def d_loss(self, x: Tensor) -> Tensor:
            real, fake = self.discriminator(x), self.discriminator(self.generator(x.flip(0)).detach())
            return mse_loss(real, torch.ones(5, 1)) + mse_loss(fake, torch.zeros(5, 1))

        def g_loss(self, x: Tensor) -> Tensor:
            return mse_loss(self.discriminator(self.generator(x.flip(0))), torch.ones(5, 1))

        def training_step(self, batch: Any, batch_idx: int) -> None:
            g, d = self.optimizers()
            d_loss = self.d_loss(batch[0])
            d.zero_grad()
            self.manual_backward(d_loss)
            g.zero_grad()
            with self.toggled_optimizer(g):
                self.manual_backward(self.g_loss(batch[0]))
            d.step()
            g.step()

        def configure_optimizers(self) -> Any:
            return [Adam(net.parameters(), lr=0.02) for net in (self.generator, self.discriminator)]

    batches_, scaler, module = data(8, bad=(3,)), small_scaler(), Gan()
    trainer = train(module, batches_, MixedPrecision("fp16", scaler=scaler))

    expected, other = Gan(), small_scaler()
    g, d = expected.configure_optimizers()
    for x, _ in batches_:
        with autocast():
            d_loss = expected.d_loss(x)
        d.zero_grad()
        backward(other.scale(d_loss))
        g.zero_grad()
        expected.discriminator.requires_grad_(False)
        with autocast():
            g_loss = expected.g_loss(x)
        backward(other.scale(g_loss))
        expected.discriminator.requires_grad_(True)
        other.step(d)
        other.step(g)
        other.update()
    assert_same(module, trainer.optimizers[0], expected, g)
    assert_same(module, trainer.optimizers[1], expected, d)
    assert scaler.state_dict() == other.state_dict()
    assert trainer.global_step == 7
