"""TerminateOnNaN: the first bad loss ends the run, steps do not wait for the device, and no checkpoint is written of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eventtrain import Callback, LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import GradientAccumulation, MixedPrecision
from eventtrain.callbacks.stopping.terminate_on_nan import NonFiniteLossError, TerminateOnNaN, non_finite
from eventtrain.distributed import Place
from eventtrain.events import SaveCheckpoint
from tests.callbacks.stopping.common import TwoProcesses
from tests.kit import new_trainer

GOOD = torch.ones(2, 1)
BAD = torch.tensor([[1.0], [math.nan]])


class Model(LightningModule):
    """A batch with NaN gives a loss of NaN, and after its step parameters of NaN."""

    net: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(1, 1)
        self.idle = nn.Parameter(torch.zeros(2))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.net(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch).sum())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OnAccelerator(TerminateOnNaN):
    """Looks at losses together, as it does on an accelerator."""

    def on_fit_start(self, trainer: Trainer, event: Any) -> None:
        super().on_fit_start(trainer, event)
        assert self._at_once
        self._at_once = False


def batches(*bad: int, of: int = 7) -> list[Tensor]:
    return [BAD if index in bad else GOOD for index in range(of)]


def trainer_of(*callbacks: Any, **options: Any) -> Trainer:
    return new_trainer(*callbacks, **{"max_epochs": 2, **options})


# ------------------------------------------------------------------ the end and the message


def test_on_the_cpu_the_run_ends_before_the_backward() -> None:
    module, oracle = Model(), Model()
    trainer = trainer_of(TerminateOnNaN())
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.fit(module, batches(3, 5))
    text = str(caught.value)
    assert text.startswith(
        "TerminateOnNaN: the loss in batch 3 of epoch 0, after 3 updates, is nan. All parameters are finite:"
    )
    assert "TerminateOnNaN(every_n_batches=1)" in text and isinstance(caught.value, (MisconfigurationError, FloatingPointError))
    optimizer = oracle.configure_optimizers()
    for _ in range(3):
        optimizer.zero_grad()
        oracle.training_step(GOOD, 0).backward()
        optimizer.step()
    assert trainer.global_step == 3
    assert all(torch.equal(mine, expected) for mine, expected in zip(module.parameters(), oracle.parameters(), strict=True))


@pytest.mark.parametrize(
    ("every", "bad", "batches_run", "batch", "epoch"),
    [
        (4, (2, 3), 4, 2, 0),
        (4, (3,), 4, 3, 0),
        (4, (4,), 7, 4, 0),  # the epoch's end
        (50, (0,), 7, 0, 0),
        (5, (8,), 10, 1, 1),  # counted over the run
    ],
)
def test_on_an_accelerator_it_looks_at_losses_together_and_names_the_first_bad_one(
    every: int, bad: tuple[int, ...], batches_run: int, batch: int, epoch: int
) -> None:
    class BadAt(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return super().training_step(BAD if self.trainer.total_batch_idx in bad else GOOD, batch_idx)

    trainer = trainer_of(OnAccelerator(every_n_batches=every))
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.fit(BadAt(), batches())
    assert trainer.total_batch_idx + 1 == batches_run
    assert f"the loss in batch {batch} of epoch {epoch}, after {bad[0]} updates, is nan" in str(caught.value)
    assert "Not finite by now: net.weight (1 of 1 values), net.bias (1 of 1 values). Try" in str(caught.value)


def test_it_looks_at_each_loss_once() -> None:
    class Counts(OnAccelerator):
        def ends_run(self, loss: float) -> bool:
            looked_at.append(loss)
            return super().ends_run(loss)

    looked_at: list[float] = []
    trainer_of(Counts(every_n_batches=3)).fit(Model(), batches())
    assert len(set(looked_at)) == len(looked_at) == 14


def test_steps_read_nothing_from_the_device() -> None:
    """Reading a value on the meta device is an error."""
    trainer = trainer_of(TerminateOnNaN(every_n_batches=5), device="meta")
    with pytest.raises(NotImplementedError, match="meta") as caught:
        trainer.fit(Model(), batches())
    assert trainer.global_step == 5 and any("on_safe_point" in note for note in caught.value.__notes__)


def test_with_a_look_in_each_batch_the_run_ends_before_the_backward_on_any_device() -> None:
    trainer = trainer_of(TerminateOnNaN(every_n_batches=1), device="meta")
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        trainer.fit(Model(), batches())
    assert trainer.global_step == 0


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("kind", [TerminateOnNaN, OnAccelerator])
def test_infinities_end_the_run_too(kind: type[TerminateOnNaN], value: float) -> None:
    class Infinite(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + (value if batch_idx == 2 else 0.0)

    with pytest.raises(NonFiniteLossError, match=f"batch 2 of epoch 0, after 2 updates, is {value}. All parameters are finite"):
        trainer_of(kind()).fit(Infinite(), batches())


def test_the_message_counts_further_parameters_and_leaves_masks_out() -> None:
    class Many(Model):
        parts: nn.ModuleList
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(1, 2, bias=False) for _ in range(9))
            self.register_buffer("mask", torch.tensor([-math.inf, 0.0]))
            self.register_buffer("seen", torch.tensor([0.0, 1.0]))
            self.register_buffer("count", torch.tensor(0))

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if batch_idx == 1:
                with torch.no_grad():
                    self.seen[0] = math.nan
                    for number, parameter in enumerate(self.parts.parameters()):
                        parameter[0, 0] = math.inf if number % 2 else math.nan
            return super().training_step(batch, batch_idx) + sum(part(batch).sum() for part in self.parts)

    with pytest.raises(NonFiniteLossError) as caught:
        trainer_of(TerminateOnNaN()).fit(Many(), batches())
    named = str(caught.value).partition("Not finite by now: ")[2].partition(". Try")[0]
    assert named == ", ".join(f"parts.{n}.weight (1 of 2 values)" for n in range(8)) + " and 2 more"
    module = Many()
    module.training_step(GOOD, 1)
    with torch.no_grad():
        list(module.parts.parameters())[1].zero_()
    assert non_finite(module)[-2:] == ["parts.8.weight (1 of 2 values)", "seen (1 of 2 values)"]
    assert "mask" not in " ".join(non_finite(module)) and len(non_finite(module)) == 9


# ------------------------------------------------------------------ the losses that count


@pytest.mark.parametrize("kind", [TerminateOnNaN, OnAccelerator])
def test_overflowing_gradients_and_losses_of_validation_do_not_end_the_run(kind: type[TerminateOnNaN]) -> None:
    overflows: list[str] = []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-20)
    trainer = trainer_of(kind(every_n_batches=3), MixedPrecision("fp16", scaler=scaler))
    trainer.signals.optimizer_step_skipped.connect(lambda trainer, event: overflows.append(event.reason))
    trainer.fit(Model(), batches(), [BAD])
    assert set(overflows) == {"overflow"}
    assert trainer.current_epoch == 2 and math.isnan(trainer.callback_metrics["val_loss"])


@pytest.mark.parametrize("kind", [TerminateOnNaN, OnAccelerator])
def test_it_looks_at_the_raw_loss_and_another_policy_is_one_method(kind: type[TerminateOnNaN]) -> None:
    class Rises(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return self.net(batch).sum() * 0 + float(batch_idx)

    class Above(kind):  # type: ignore[misc, valid-type]
        def ends_run(self, loss: float) -> bool:
            return loss > 4

    with pytest.raises(NonFiniteLossError, match=r"in batch 5 of epoch 0, after 1 updates, is 5.0"):
        trainer_of(Above(), GradientAccumulation(4)).fit(Rises(), batches())


@pytest.mark.parametrize("kind", [TerminateOnNaN, OnAccelerator])
def test_in_manual_optimization_the_message_names_the_backward(kind: type[TerminateOnNaN]) -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for backward in range(3):
                optimizer.zero_grad()
                scale = math.inf if (batch_idx, backward) == (2, 1) else 1.0
                loss: Any = self.net(batch * scale).square()
                if backward == 0:  # a loss for each sample, of another type
                    self.manual_backward(loss.double(), torch.ones_like(loss).double())
                else:
                    self.manual_backward(loss.mean())
                optimizer.step()

    with pytest.raises(
        NonFiniteLossError, match=r"the loss of backward 2 in batch 2 of epoch 0, after 2 updates, is (nan|inf)"
    ):
        trainer_of(kind()).fit(Manual(), batches())


@pytest.mark.parametrize("kind", [TerminateOnNaN, OnAccelerator])
def test_losses_of_an_optimizers_trials_may_be_bad(kind: type[TerminateOnNaN]) -> None:
    class Trial(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            closure()
            return super().step(closure)

    class Tries(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            evaluations[batch_idx] = evaluations.get(batch_idx, 0) + 1
            return super().training_step(batch, batch_idx) * (math.inf if evaluations[batch_idx] == 2 else 1.0)

        def configure_optimizers(self) -> Any:
            return Trial(self.parameters(), lr=0.1)

    evaluations: dict[int, int] = {}
    trainer = trainer_of(kind(), max_epochs=1)
    trainer.fit(Tries(), batches())
    assert trainer.global_step == 7 and set(evaluations.values()) == {3}


def test_it_reads_the_value_of_a_loss_that_is_overwritten_later() -> None:
    class Overwrites(Callback):
        def on_train_batch_end(self, trainer: Trainer, event: Any) -> None:
            event.loss.fill_(math.nan)

    trainer = trainer_of(OnAccelerator(every_n_batches=2), Overwrites())
    trainer.fit(Model(), batches())
    assert trainer.current_epoch == 2


# ------------------------------------------------------------------ checkpoints and processes


class Saves(Callback):
    """Saves a checkpoint at each safe point, and one after an error."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_safe_point(self, trainer: Trainer, event: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.total_batch_idx}.ckpt")

    def on_exception(self, trainer: Trainer, event: Any) -> None:
        trainer.save_checkpoint(self.folder / "left.ckpt")


@pytest.mark.parametrize("kind", [TerminateOnNaN, OnAccelerator])
@pytest.mark.parametrize("saves_first", [True, False])
def test_no_checkpoint_is_written_after_a_bad_loss(tmp_path: Path, saves_first: bool, kind: Any) -> None:
    callbacks = [Saves(tmp_path), kind(every_n_batches=5)]
    trainer = trainer_of(*callbacks if saves_first else callbacks[::-1])
    with pytest.raises(NonFiniteLossError, match="batch 3 of epoch 0") as caught:
        trainer.fit(Model(), batches(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.ckpt", "1.ckpt", "2.ckpt"]
    assert any("and afterwards: NonFiniteLossError" in note for note in caught.value.__notes__)
    with pytest.raises(NonFiniteLossError, match="batch 3 of epoch 0"):
        save(trainer)  # after the run
    trainer.fit(Model(), batches(), ckpt_path=tmp_path / "2.ckpt")
    assert trainer.current_epoch == 2
    assert (tmp_path / "13.ckpt").exists()


def save(trainer: Trainer) -> None:
    trainer.signals.save_checkpoint.publish(SaveCheckpoint({}))


def test_losses_of_an_interrupted_run_matter_to_its_checkpoint_and_to_no_other_run() -> None:
    class Interrupts(Callback):
        def on_train_batch_end(self, trainer: Trainer, event: Any) -> None:
            if trainer.batch_idx == 4:
                raise KeyboardInterrupt

    trainer = trainer_of(OnAccelerator(), Interrupts())
    for bad, saved in (((3,), False), ((), True), ((3,), False)):
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(Model(), batches(*bad))
        if saved:
            save(trainer)
    with pytest.raises(NonFiniteLossError, match="batch 3 of epoch 0"):
        save(trainer)


class OtherIsBad(TwoProcesses):
    """The other process meets a bad loss before an update, and says so at its next look."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after
        self.trainer: Trainer | None = None

    def agree(self, flags: list[bool], place: Place, name: str = "") -> list[bool]:
        if self.trainer is not None and self.trainer.global_step == self.after and place == "in_between":
            self.request.reason = "a loss is not finite"
        return super().agree(flags, place, name)

    def any(self, flag: bool) -> bool:
        return super().any(flag) or self.request.reason is not None


@pytest.mark.parametrize(
    ("bad_after", "bad", "message"),
    [(4, (), "a loss of another process is not finite"), (99, (2,), "the loss in batch 2 of epoch 0")],
    ids=["another's loss", "this process's loss"],
)
def test_processes_end_together(bad_after: int, bad: tuple[int, ...], message: str) -> None:
    trainer = trainer_of(TerminateOnNaN(every_n_batches=4))
    trainer.processes = processes = OtherIsBad(bad_after)
    processes.trainer = trainer
    with pytest.raises(NonFiniteLossError, match=f"TerminateOnNaN: {message}"):
        trainer.fit(Model(), batches(*bad))
    assert trainer.global_step == 5, "all look after the next batch"


@pytest.mark.parametrize("every", [0, -1, 1.5, True, None])
def test_other_numbers_of_batches_are_refused(every: Any) -> None:
    with pytest.raises(MisconfigurationError, match=r"TerminateOnNaN\(every_n_batches=.*\): give a whole number from 1"):
        TerminateOnNaN(every_n_batches=every)
