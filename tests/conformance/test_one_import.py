"""One changed import: the demos that Lightning installs, and modules as its users write them, train unchanged."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import eventtrain
from eventtrain.callbacks import LRSchedulerStepping, TensorBoardLogger

from .frameworks import lightning

DEMOS = Path(lightning.__file__).parent / "demos"
PACKAGES = {
    "lightning.pytorch.core.optimizer": "eventtrain",
    "lightning.pytorch.core": "eventtrain",
    "lightning.pytorch": "eventtrain",
}


class Text(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A stand-in for the data set that the demos download: token sequences, each predicting itself one further."""

    def __init__(self, block_size: int = 6, download: bool = False) -> None:
        self.tokens = torch.arange(60) % 11
        self.block_size = block_size
        self.vocab_size = 11

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        window = self.tokens[index : index + self.block_size + 1]
        return window[:-1], window[1:]


def demo(name: str, *, here: bool) -> SimpleNamespace:
    """Return the names of a demo, whose source differs only in the import of the framework."""
    source = (DEMOS / f"{name}.py").read_text()
    if here:
        for package, ours in PACKAGES.items():
            source = source.replace(f"from {package} import", f"from {ours} import")
    names: dict[str, Any] = {"__name__": f"demo_{name}"}
    exec(compile(source, name, "exec"), names)
    if "WikiText2" in names:
        names["WikiText2"] = Text
    return SimpleNamespace(**{key: names[key] for key in names if not key.startswith("__")}, source=source, names=names)


def trainer(*, here: bool, **options: Any) -> Any:
    options.setdefault("max_epochs", 1)
    options.setdefault("num_sanity_val_steps", 0)
    if here:
        return eventtrain.Trainer(device="cpu", default_callbacks=False, callbacks=[LRSchedulerStepping()], **options)
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def trained(name: str, build: Any, *, here: bool, **options: Any) -> Any:
    module_of_demos = demo(name, here=here)
    torch.manual_seed(2)
    module, data = build(module_of_demos)
    with warnings.catch_warnings():
        if not here:
            warnings.simplefilter("ignore")  # Lightning's advice
        trainer(here=here, **options).fit(module, datamodule=data)
    return module


def assert_both_train_alike(name: str, build: Any, **options: Any) -> None:
    here, there = (trained(name, build, here=side, **options) for side in (True, False))
    before = build(demo(name, here=True))[0]
    for mine, theirs in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert any(not torch.equal(a, b) for a, b in zip(here.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("model", ["BoringModel", "ManualOptimBoringModel"])
@pytest.mark.parametrize("data", [None, "BoringDataModule", "BoringDataModuleNoLen"])
def test_the_boring_demos(model: str, data: str | None) -> None:
    def build(demos: Any) -> Any:
        return getattr(demos, model)(), getattr(demos, data)() if data else None

    # If validation draws from the global generator, Lightning's training gets other numbers.
    draws = data == "BoringDataModuleNoLen"
    assert_both_train_alike("boring_classes", build, limit_train_batches=20, limit_val_batches=0 if draws else 5, max_epochs=2)


def test_the_transformer_demo() -> None:
    assert_both_train_alike(
        "transformer", lambda demos: (demos.LightningTransformer(vocab_size=11), None), limit_train_batches=5
    )


def test_the_lstm_demo() -> None:
    # It imports the data set from the other demo by Lightning's path.
    assert_both_train_alike("lstm", lambda demos: (demos.LightningLSTM(vocab_size=11), None), limit_train_batches=2)


# ------------------------------------------------------------------ modules as people write them


class Autoencoder(eventtrain.LightningModule):
    def __init__(self, width: int = 8, rates: tuple[float, float] = (0.01, 0.1), *, name: str = "auto") -> None:
        super().__init__()
        self.save_hyperparameters(ignore="rates")
        self.encoder = nn.Linear(4, width)
        self.decoder = nn.Linear(width, 4)
        self.rates = rates

    def forward(self, x: torch.Tensor) -> Any:
        return self.decoder(torch.relu(self.encoder(x)))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.mse_loss(self(batch), batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch), batch), prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.rates[0])
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def data() -> list[torch.Tensor]:
    return list(torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1)))


def test_hyperparameters_reach_the_checkpoint_and_come_back(tmp_path: Path) -> None:
    fitted = Autoencoder(width=5, name="five")
    run = trainer(here=True, max_epochs=2)
    run.fit(fitted, data(), data()[:2])
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Autoencoder.load_from_checkpoint(tmp_path / "model.ckpt")
    assert dict(loaded.hparams) == {"width": 5, "name": "five"} and loaded.hparams.width == 5
    loaded.hparams.width = 6
    assert loaded.hparams_initial.width == 5, "as it was built"
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), fitted.parameters(), strict=True))
    renamed = Autoencoder.load_from_checkpoint(tmp_path / "model.ckpt", name="other", rates=(1.0, 1.0))
    assert renamed.hparams.name == "other" and renamed.rates == (1.0, 1.0)


def test_hyperparameters_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    logger = TensorBoardLogger(tmp_path)
    run = eventtrain.Trainer(max_epochs=1, device="cpu", callbacks=[logger], num_sanity_val_steps=0)
    run.fit(Autoencoder(width=5, name="five"), data(), data()[:2])
    accumulator = EventAccumulator(str(logger.run_dir)).Reload()
    content = accumulator.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"width" in content and b"five" in content


def test_a_run_resumes_from_a_checkpoint_of_an_epochs_end(tmp_path: Path) -> None:
    straight = Autoencoder()
    halves = Autoencoder()
    halves.load_state_dict(straight.state_dict())
    trainer(here=True, max_epochs=4).fit(straight, data(), data()[:2])
    first = trainer(here=True, max_epochs=2)
    first.fit(halves, data(), data()[:2])
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Autoencoder()
    second = trainer(here=True, max_epochs=4)
    second.fit(resumed, data(), data()[:2], ckpt_path=tmp_path / "half.ckpt")
    assert second.global_step == 24 and second.current_epoch == 4
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_transformer_with_warm_up_in_optimizer_step() -> None:
    class Model(eventtrain.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.embed, self.encoder, self.head = nn.Embedding(11, 8), nn.TransformerEncoder(layer, 1), nn.Linear(8, 11)
            self.losses: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            tokens, targets = batch
            logits = self.head(self.encoder(self.embed(tokens)))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            self.losses.append(float(loss.detach()))
            return loss

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)
            for group in optimizer.param_groups:
                group["lr"] = min(1.0, (self.trainer.global_step + 1) / 10) * 0.05

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.005)

    model = Model()
    trainer(here=True, max_epochs=10).fit(model, torch.utils.data.DataLoader(Text(), batch_size=8, shuffle=True))
    assert model.losses[-1] < 0.8 * model.losses[0]
    assert model.trainer.optimizers[0].param_groups[0]["lr"] == 0.05


def test_a_plateau_run_lowers_the_rate_if_the_metric_stays() -> None:
    class Stuck(Autoencoder):
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("val_loss", torch.tensor(1.0))

    model = Stuck()
    trainer(here=True, max_epochs=3).fit(model, data(), data()[:2])
    # The first value is the best so far; the next two each exceed a patience of 0.
    assert model.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.1**2)


def test_schedulers_of_timm() -> None:
    """Skipped if timm cannot be imported, because its torchvision does not load beside every build of torch."""
    timm = pytest.importorskip("timm.scheduler", exc_type=Exception)  # type: ignore[arg-type]

    class Model(Autoencoder):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [{"scheduler": timm.TanhLRScheduler(optimizer, t_initial=4), "interval": "epoch"}]

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step(epoch=self.current_epoch)

    model = Model()
    trainer(here=True, max_epochs=3).fit(model, data())
    assert model.trainer.optimizers[0].param_groups[0]["lr"] < 0.1
