"""A run's state goes to a file and comes back: at the end of an epoch, and safely."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eventtrain import Callback, LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import GradientAccumulation, LRSchedulerStepping, MixedPrecision
from eventtrain.checkpoint import storage
from tests.kit import new_trainer

BATCHES = list(torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)))


class Model(LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))
        self.epochs: list[int] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append(self.current_epoch)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class SaveAtEpochEnd(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_safe_point(self, trainer: Trainer, event: Any) -> None:
        if event.epoch_end and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


def trainer(*callbacks: Any, epochs: int) -> Trainer:
    standard = [GradientAccumulation(2), MixedPrecision("fp16"), LRSchedulerStepping()]
    return new_trainer(*standard, *callbacks, max_epochs=epochs)


def test_a_checkpoint_of_an_epochs_last_safe_point_resumes_with_the_next_epoch(tmp_path: Path) -> None:
    straight, resumed = Model(), Model()
    trainer(SaveAtEpochEnd(tmp_path / "a.ckpt"), epochs=4).fit(straight, BATCHES)
    second = trainer(epochs=4)
    second.fit(resumed, BATCHES, ckpt_path=tmp_path / "a.ckpt")
    assert resumed.epochs == [2, 3]
    assert (second.current_epoch, second.global_step) == (4, straight.trainer.global_step)
    for mine, expected in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, expected)
    assert second.optimizers[0].state_dict()["param_groups"] == straight.trainer.optimizers[0].state_dict()["param_groups"]


def test_the_old_file_stays_whole_if_the_new_one_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(epochs=1)
    run.fit(Model(), BATCHES)
    path = tmp_path / "a.ckpt"
    run.save_checkpoint(path)
    before = path.read_bytes()
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space left"):
                run.save_checkpoint(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_state_that_could_not_be_read_back_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    class Stateful(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"where": [Path("x")]}

    run = trainer(Stateful(), epochs=1)
    run.fit(Model(), BATCHES)
    with pytest.raises(MisconfigurationError, match=r"checkpoint\['callbacks'\]\[.*Stateful'\]\['where'\]\[0\] is a pathlib"):
        run.save_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"state_dict": {}, "extra": Exploit()}, tmp_path / "bad.ckpt")
    with pytest.raises(MisconfigurationError, match=r"bad\.ckpt is no checkpoint that can be read safely") as caught:
        storage.read(tmp_path / "bad.ckpt")
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"no archive", None], ids=["empty", "text", "truncated"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "damaged.ckpt"
    if content is None:
        run = trainer(epochs=1)
        run.fit(Model(), BATCHES)
        run.save_checkpoint(path)
        content = path.read_bytes()[:-200]
    path.write_bytes(content)
    with pytest.raises(MisconfigurationError, match=r"damaged\.ckpt is no checkpoint that can be read safely"):
        trainer(epochs=1).fit(Model(), BATCHES, ckpt_path=path)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(MisconfigurationError, match=r"other\.pt is no checkpoint"):
        Model.load_from_checkpoint(tmp_path / "other.pt")


def test_another_number_of_optimizers_is_refused(tmp_path: Path) -> None:
    run = trainer(epochs=1)
    run.fit(Model(), BATCHES)
    run.save_checkpoint(tmp_path / "a.ckpt")

    class Without(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    with pytest.raises(MisconfigurationError, match="1 lr_schedulers and configure_optimizers returned 0"):
        trainer(epochs=2).fit(Without(), BATCHES, ckpt_path=tmp_path / "a.ckpt")


def test_the_loss_scale_survives_a_callback_that_has_not_run_yet() -> None:
    callback = MixedPrecision("fp16")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    state = {"scaler": scaler.state_dict(), "overflows": 2}
    callback.load_state_dict(state)
    assert callback.state_dict() == state
