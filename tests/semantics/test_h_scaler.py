"""H4, H5. Loss scaling: other steps than the optimizer's, and the scaler's state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Optimizer

from eventtrain import MisconfigurationError
from eventtrain.callbacks import GradientAccumulation, GradientClipping, MixedPrecision
from tests.kit import On, Probe, Recorder, batches, new_trainer, train
from tests.semantics.precision import (
    FUSED,
    INF,
    Net,
    Pair,
    Scales,
    assert_same,
    by_hand,
    data,
    eager_scaler,
    run_pair,
    small_scaler,
)

# ------------------------------------------------------------------ H4: other steps


@FUSED
def test_h4_closure_then_step_in_the_hook_trains(fused: bool) -> None:
    """Lightning: never updates."""

    class Own(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer_closure()
            optimizer.step()

    def make(parameters: Any) -> Optimizer:
        return Adam(parameters, lr=0.05, fused=fused)

    scaler, batches_ = small_scaler(), data(7, bad=(2,))
    module = Own(make)
    trainer = train(module, batches_, GradientClipping(0.1), MixedPrecision("fp16", scaler=scaler))
    clip = lambda parameters: clip_grad_norm_(parameters, 0.1)  # noqa: E731
    expected, optimizer, other, _, steps = by_hand(make, batches_, clip=clip)
    assert_same(module, trainer.optimizers[0], expected, optimizer)
    assert scaler.state_dict() == other.state_dict()
    assert trainer.global_step == trainer.optimizers[0].num_steps == steps == 6


def test_h4_a_hook_that_steps_every_other_batch_trains() -> None:
    class Own(Probe):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer_closure()
            if batch_idx % 2 == 1:
                optimizer.step()

    scaler, module = eager_scaler(), Own()
    trainer = train(module, 4, MixedPrecision("fp16", scaler=scaler))
    assert module.updates == [2.0, 4.0]
    assert trainer.global_step == 2


def test_h4_an_optimizer_without_gradients_is_skipped_under_a_scaler() -> None:
    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.zero_grad()
        d.zero_grad()
        module.manual_backward(module.g * x)
        d.step()
        g.step()

    skipped = Recorder("optimizer_step_skipped")
    module, trainer, scales = run_pair(step, 3, eager_scaler(), skipped)
    assert module.g_updates == [1.0, 2.0, 3.0]
    assert [(event.reason, event.optimizer is trainer.optimizers[1]) for event in skipped.events] == [
        ("no gradients", True)
    ] * 3
    assert [optimizer.num_steps for optimizer in trainer.optimizers] == [3, 0]
    assert scales == [16.0, 32.0, 64.0]


def test_h4_a_batch_in_which_no_optimizer_has_gradients_counts_nothing() -> None:
    def step(module: Pair, g: Any, d: Any, x: Tensor, batch_idx: int) -> None:
        g.step()
        d.step()

    module, trainer, scales = run_pair(step, 2, eager_scaler())
    assert trainer.global_step == 0
    assert scales == [8.0, 8.0]


class Apart(Probe):
    """The optimizer's parameter takes no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.zeros(()))

    def configure_optimizers(self) -> Any:
        return SGD([self.other], lr=1.0)


def test_h4_an_automatic_optimizer_without_gradients_is_skipped_under_a_scaler() -> None:
    skipped = Recorder("optimizer_step_skipped")
    trainer = train(Apart(), 2, MixedPrecision("fp16"), skipped)
    assert [event.reason for event in skipped.events] == ["no gradients", "no gradients"]
    assert trainer.global_step == 0


@pytest.mark.parametrize("callbacks", [(), ("bf16",)], ids=["float32", "bf16"])
def test_h4_without_a_scaler_the_step_is_left_to_torch(callbacks: tuple[Any, ...]) -> None:
    skipped = Recorder("optimizer_step_skipped", "after_optimizer_step")
    trainer = train(Apart(), 2, *map(MixedPrecision, callbacks), skipped)
    assert skipped.names == ["after_optimizer_step"] * 2
    assert trainer.global_step == trainer.optimizers[0].num_steps == 2


@FUSED
@pytest.mark.parametrize("kind", [SGD, Adam, AdamW], ids=["SGD", "Adam", "AdamW"])
def test_h4_fused_optimizers_with_clipping(kind: Any, fused: bool) -> None:
    """Four gradients of 3.0 under the scale 1024, norm 1.0: 0.5 each."""

    class Module(Probe):
        def configure_optimizers(self) -> Any:
            return self.watch(kind([self.w], lr=1.0, fused=fused))

    module = Module(width=4)
    norms = Recorder("after_gradient_clipping")
    train(module, [3.0], GradientClipping(1.0), MixedPrecision("fp16", scaler=small_scaler(init_scale=1024.0)), norms)
    assert torch.tensor(module.updates[0]).allclose(torch.full((4,), 0.5))
    assert norms.events[0].total_norm.item() == 6.0


@pytest.mark.parametrize(("algorithm", "expected"), [("norm", 0.5), ("value", 1.0)])
@FUSED
def test_h4_clip_gradients_in_manual_mode(algorithm: str, expected: float, fused: bool) -> None:
    """Unscales first, once: the step that follows does not divide again. Lightning: 0.0039."""
    norms: list[Any] = []

    class Module(Probe):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            norms.append(self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm=algorithm))
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return self.watch(SGD([self.w], lr=1.0, fused=fused))

    module, scaler = Module(width=4, automatic=False), small_scaler(init_scale=1024.0)
    trainer = train(module, [3.0, INF, 3.0], MixedPrecision("fp16", scaler=scaler))
    assert len(module.updates) == 2
    for update in module.updates:
        assert torch.tensor(update).allclose(torch.full((4,), expected))
    if algorithm == "norm":
        assert norms[0].item() == norms[2].item() == 6.0
    else:
        assert norms[0] is None
    assert trainer.global_step == 2
    assert scaler.get_scale() == 512.0


def test_h4_manual_closures_under_a_scaler() -> None:
    class Module(Probe):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                loss = self.loss(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

    module = Module(automatic=False)
    trainer = train(module, [1.0, INF, 3.0], MixedPrecision("fp16", scaler=eager_scaler()))
    assert module.updates == [1.0, 3.0]
    assert trainer.global_step == 2


# ------------------------------------------------------------------ H5: the scaler's state


def test_h5_the_scalers_state_is_in_the_checkpoint(tmp_path: Any) -> None:
    path = tmp_path / "checkpoint.pt"
    scaler = small_scaler()
    save = On(train_epoch_start=lambda t, e: t.save_checkpoint(path) if e.epoch == 1 else None)
    kept: list[Any] = []
    look = On(save_checkpoint=lambda t, e: kept.append((e.checkpoint["callbacks"], scaler.state_dict())))
    batches_ = data(5, bad=(1,))
    module = Net()
    whole = train(module, batches_, MixedPrecision("fp16", scaler=scaler), save, look, max_epochs=3)
    callbacks, at_the_time = kept[-1]  # not the trial before training
    assert at_the_time["scale"] == 64.0
    assert at_the_time["_growth_tracker"] == 1
    assert callbacks["MixedPrecision"]["scaler"] == at_the_time

    resumed, other = Net(), small_scaler(init_scale=2.0)
    trainer = new_trainer(MixedPrecision("fp16", scaler=other), max_epochs=3)
    trainer.fit(resumed, batches_, ckpt_path=path)
    assert other.state_dict() == scaler.state_dict()
    assert_same(resumed, trainer.optimizers[0], module, whole.optimizers[0])
    assert trainer.global_step == whole.global_step == 12


def test_h5_the_default_scalers_state_is_in_the_checkpoint(tmp_path: Any) -> None:
    path = tmp_path / "checkpoint.pt"
    save = On(train_epoch_start=lambda t, e: t.save_checkpoint(path) if e.epoch == 1 else None)
    train(Probe(), [INF, INF, 1.0], MixedPrecision("fp16"), save, max_epochs=2)
    precision = MixedPrecision("fp16")
    trainer = new_trainer(precision, max_epochs=1)
    trainer.fit(Probe(), batches(1), ckpt_path=path)
    assert precision.scaler is not None
    assert precision.scaler.get_scale() == 65536.0 / 4


def test_h5_overflows_in_a_row_are_in_the_checkpoint(tmp_path: Any) -> None:
    path = tmp_path / "checkpoint.pt"
    save = On(train_epoch_start=lambda t, e: t.save_checkpoint(path) if e.epoch == 1 else None)
    train(Probe(), [1.0, INF, INF], MixedPrecision("fp16"), save, max_epochs=2)
    with pytest.raises(MisconfigurationError, match="3 steps in a row"):
        new_trainer(MixedPrecision("fp16", max_consecutive_overflows=3), max_epochs=2).fit(
            Probe(), batches([INF]), ckpt_path=path
        )


def test_h5_bf16_uses_no_scaler() -> None:
    losses: list[tuple[float, float]] = []
    look = On(before_backward=lambda t, e: losses.append((e.loss.item(), e.raw_loss.item())))
    precision, module = MixedPrecision("bf16"), Probe()
    recorder = Recorder("optimizer_step_skipped")
    train(module, [1.0, 2.0, INF], precision, look, recorder)
    assert precision.scaler is None
    assert losses == [(0.0, 0.0), (-2.0, -2.0), (-INF, -INF)]
    assert module.updates == [1.0, 2.0, INF]
    assert recorder.names == []
    with pytest.raises(MisconfigurationError, match=r"MixedPrecision\('bf16', scaler=\.\.\.\)"):
        MixedPrecision("bf16", scaler=GradScaler("cpu"))


class Raw(Probe):
    """Steps the wrapped optimizer."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.optimizer.step(closure=optimizer_closure)


@pytest.mark.parametrize("kind", [Probe, Raw])
@pytest.mark.parametrize(
    ("nothing_for", "expected"),
    [([2.0], [1.0, 3.5]), ([1.0], [2.0, 3.5]), ([1.0, 2.0], [3.5]), ([4.0], [1.5, 3.0])],
)
def test_h5_a_none_loss_in_the_closing_batch_keeps_the_windows_gradients(
    nothing_for: list[float], expected: list[float], kind: Any
) -> None:
    module, scaler = kind(nothing_for=nothing_for), eager_scaler()
    trainer = train(module, 4, GradientAccumulation(2), MixedPrecision("fp16", scaler=scaler))
    assert module.updates == expected
    assert trainer.global_step == len(expected)
    assert scaler.get_scale() == 8.0 * 2 ** len(expected)


def test_h5_a_dropped_window_does_not_hold_the_scale_for_ever() -> None:
    """Three batches, N = 2: the last, scaled batch of each epoch is discarded."""
    module, scaler = Probe(), eager_scaler()
    scales = Scales(scaler)
    train(module, 3, GradientAccumulation(2, remainder="drop"), MixedPrecision("fp16", scaler=scaler), scales, max_epochs=3)
    assert module.updates == [1.5, 1.5, 1.5]
    assert scales.values == [8.0, 16.0, 16.0, 16.0, 32.0, 32.0, 32.0, 64.0, 64.0]


def test_h5_carried_windows_are_unscaled_by_the_scale_they_were_scaled_with() -> None:
    module, scaler = Probe(), eager_scaler()
    train(module, 3, GradientAccumulation(2, remainder="carry"), MixedPrecision("fp16", scaler=scaler), max_epochs=2)
    assert module.updates == [1.5, 2.0, 2.5]
    assert scaler.get_scale() == 64.0


def test_h2_a_second_run_of_the_same_callback_begins_anew() -> None:
    """The state of an unfinished run does not bind the next."""
    scaler = eager_scaler()
    precision = MixedPrecision("fp16", scaler=scaler)
    trainer = new_trainer(precision, GradientAccumulation(4, remainder="drop"), max_epochs=1)
    stop = On(train_batch_end=lambda trainer, event: trainer.stop("enough") if event.batch_idx == 1 else None)
    with_stop = new_trainer(precision, GradientAccumulation(4), stop)
    with_stop.fit(Probe(), batches(5))
    module = Probe()
    trainer.fit(module, batches(4))
    assert module.updates == [2.5]
    assert scaler.get_scale() == 16.0


def test_h2_scaled_gradients_on_top_of_unscaled_ones_are_an_error() -> None:
    """Their sum means nothing: 1, 2.06, 3.06 in place of 1, 3, 6 if it is not refused."""

    class NeverZeroed(Probe):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            self.optimizers().step()

    with pytest.raises(MisconfigurationError, match=r"(?s)SGD.*unscaled already.*zero_grad"):
        train(NeverZeroed(), 2, MixedPrecision("fp16", scaler=GradScaler("cpu", init_scale=16.0)))


def test_h2_gradients_dropped_by_the_module_are_not_mistaken_for_unscaled_ones() -> None:
    class ZeroedByTheModule(Probe):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.zero_grad()
            self.manual_backward(self.loss(batch))
            self.optimizers().step()

    module = ZeroedByTheModule()
    train(module, 3, MixedPrecision("fp16", scaler=GradScaler("cpu", init_scale=16.0)))
    assert module.w.item() == -6.0
