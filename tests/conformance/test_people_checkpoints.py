"""What people write around checkpoints, run by both frameworks: tests of the best weights, strict loading, frozen layers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eventtrain
from eventtrain import callbacks as ours

from .frameworks import lightning


def tuned(base: type) -> Any:
    """Return a module whose metric is best after the second of three epochs, and whose test tells its weight."""

    class Tuned(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.layer = nn.Linear(1, 1)
            self.part = nn.Linear(1, 1).requires_grad_(False)
            self.without_part = False

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            return (self.layer(batch) - self.part(batch)).pow(2).mean()

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("score", torch.tensor([3.0, 1.0, 2.0][self.current_epoch]))

        def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("weight", self.layer.weight.sum())

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if self.without_part:
                for name in ("part.weight", "part.bias"):
                    checkpoint["state_dict"].pop(name, None)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.layer.parameters(), lr=0.05, momentum=0.9)

    return Tuned()


BATCHES = list(torch.randn(4, 2, 1, generator=torch.Generator().manual_seed(0)))


def loader() -> Any:
    return torch.utils.data.DataLoader(BATCHES, batch_size=None)  # type: ignore[arg-type]


def our_trainer(folder: Path, *, monitor: str | None = "score") -> Any:
    kept = ours.ModelCheckpoint(folder / "ours", monitor=monitor)
    return eventtrain.Trainer(
        max_epochs=3, callbacks=[kept], default_callbacks=False, device="cpu", num_sanity_val_steps=0, default_root_dir=folder
    )


def their_trainer(folder: Path, *, monitor: str | None = "score") -> Any:
    kept = lightning.callbacks.ModelCheckpoint(folder / "theirs", monitor=monitor, save_last=True)
    return lightning.Trainer(
        max_epochs=3,
        callbacks=[kept],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )


PAIRS = [
    pytest.param(our_trainer, eventtrain.LightningModule, id="eventtrain"),
    pytest.param(their_trainer, lightning.LightningModule, id="lightning"),
]
quiet = pytest.mark.filterwarnings("ignore")  # Lightning's advice


@quiet
@pytest.mark.parametrize(("make", "base"), PAIRS)
def test_a_test_without_a_module_takes_the_best_weights(tmp_path: Path, make: Any, base: type) -> None:
    trainer, module = make(tmp_path), tuned(base)
    trainer.fit(module, loader(), loader())
    last = module.layer.weight.item()
    assert trainer.test(module, loader(), verbose=False)[0] if make is their_trainer else trainer.test(module, loader())
    assert module.layer.weight.item() == last, "a module that is given keeps its weights"
    [best] = trainer.test(dataloaders=loader())
    path = (
        trainer.checkpoint_callback.best_model_path
        if make is their_trainer
        else trainer.callback(ours.ModelCheckpoint).best_model_path
    )
    content = torch.load(path, weights_only=True)
    assert best["weight"] == pytest.approx(content["state_dict"]["layer.weight"].item())
    assert best["weight"] != pytest.approx(last)
    assert module.layer.weight.item() == content["state_dict"]["layer.weight"].item(), "and has them afterwards"


@quiet
@pytest.mark.parametrize(("make", "base"), PAIRS)
def test_strict_loading_of_the_module_counts_for_resuming_and_testing(tmp_path: Path, make: Any, base: type) -> None:
    trainer, module = make(tmp_path), tuned(base)
    module.without_part = True
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    for strict in (True, False):
        for stage in ("fit", "test"):
            other = tuned(base)
            other.strict_loading = strict
            call = getattr(make(tmp_path), stage)
            if strict:
                with pytest.raises((eventtrain.MisconfigurationError, RuntimeError), match=r"part\.weight"):
                    call(other, loader(), ckpt_path=tmp_path / "part.ckpt")
            else:
                call(other, loader(), ckpt_path=tmp_path / "part.ckpt")
                assert torch.equal(other.layer.weight, module.layer.weight)


def test_a_checkpoint_of_lightning_gives_its_weights_to_eventtrain(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = their_trainer(tmp_path)
        theirs = tuned(lightning.LightningModule)
        trainer.fit(theirs, loader(), loader())
        trainer.save_checkpoint(tmp_path / "lightning.ckpt")
    mine = tuned(eventtrain.LightningModule)
    [metrics] = our_trainer(tmp_path).test(mine, loader(), ckpt_path=tmp_path / "lightning.ckpt")
    assert metrics["weight"] == pytest.approx(theirs.layer.weight.item())
    with pytest.raises(eventtrain.MisconfigurationError, match=r"was written by Lightning 2\."):
        our_trainer(tmp_path).fit(mine, loader(), ckpt_path=tmp_path / "lightning.ckpt")
