"""Small programs of the kinds that people write. Both frameworks run the same source, and end with the same bits."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

import eventtrain
from eventtrain import callbacks as ours

from .frameworks import lightning

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice


class Framework:
    """One of the two frameworks, with the words that differ."""

    def __init__(self, name: str) -> None:
        self.here = name == "eventtrain"
        module: Any = eventtrain if self.here else lightning
        self.LightningModule: Any = module.LightningModule
        self.LightningDataModule: Any = module.LightningDataModule

    def trainer(
        self, epochs: int = 2, *, accumulate: int = 1, clip: float | None = None, patience: int | None = None, **options: Any
    ) -> Any:
        options = {"max_epochs": epochs, "num_sanity_val_steps": 0, **options}
        if self.here:
            attached: list[Any] = [ours.LRSchedulerStepping()]
            attached += [ours.GradientAccumulation(accumulate, normalize="fixed")] if accumulate > 1 else []
            attached += [ours.GradientClipping(clip)] if clip is not None else []
            attached += [ours.EarlyStopping("val_loss", patience=patience)] if patience is not None else []
            return eventtrain.Trainer(callbacks=attached, default_callbacks=False, device="cpu", **options)
        stopping: list[Any] = [] if patience is None else [lightning.callbacks.EarlyStopping("val_loss", patience=patience)]
        return lightning.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
            callbacks=stopping,
            **options,
        )


class Items(Dataset[Any]):
    """A data set of ready items."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


Program = Callable[[Framework], tuple[Any, Any]]
"""Trains in a framework, and returns the module and the trainer."""


def normal(*shape: int, seed: int = 5) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(program: Program, name: str) -> tuple[dict[str, Tensor], dict[str, float], list[Any], int]:
    torch.manual_seed(1)
    module, trainer = program(Framework(name))
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return module.state_dict(), metrics, list(getattr(module, "journal", [])), trainer.current_epoch


# ------------------------------------------------------------------ the programs


def text_classification(lib: Framework) -> Any:
    """Batches are dicts that hold texts too; accuracy by torchmetrics; hyperparameters."""

    class Classifier(lib.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, words: int = 30, width: int = 8, lr: float = 0.05) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.embedding = nn.EmbeddingBag(words, width)
            self.head = nn.Linear(width, 3)
            self.accuracy = torchmetrics.classification.MulticlassAccuracy(3, average="micro")

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.head(self.embedding(tokens))
            return logits

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.cross_entropy(self(batch["tokens"]), batch["label"])
            self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=len(batch["label"]))
            return {"loss": loss, "texts": batch["text"]}

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            logits = self(batch["tokens"])
            self.accuracy(logits, batch["label"])
            self.log("val_accuracy", self.accuracy, on_epoch=True, batch_size=len(batch["label"]))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)

    tokens = torch.randint(0, 30, (22, 6), generator=torch.Generator().manual_seed(2))
    items = [{"text": f"text {i}", "tokens": tokens[i], "label": tokens[i].sum() % 3} for i in range(22)]
    trainer = lib.trainer(3)
    train = DataLoader(Items(items[:16]), 5, shuffle=True, generator=torch.Generator().manual_seed(8))
    trainer.fit(module := Classifier(), train, DataLoader(Items(items[16:]), 4))
    return module, trainer


def gan(lib: Framework) -> Any:
    """Two optimizers by hand, which are toggled; the discriminator steps more often than the generator."""

    class GAN(lib.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
            self.discriminator = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(), nn.Linear(8, 1))

        def training_step(self, batch: Any, batch_idx: int) -> None:
            (real,) = batch
            first, second = self.optimizers()
            noise = torch.randn(len(real), 2)
            self.toggle_optimizer(first)
            lost = self.discriminator(self.generator(noise).detach()).sigmoid().mean()
            loss = lost - self.discriminator(real).sigmoid().mean()
            first.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(first, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            first.step()
            self.untoggle_optimizer(first)
            self.log("d_loss", loss, on_epoch=True)
            if batch_idx % 2:
                self.toggle_optimizer(second)
                loss = -self.discriminator(self.generator(noise)).sigmoid().mean()
                second.zero_grad()
                self.manual_backward(loss)
                second.step()
                self.untoggle_optimizer(second)
                self.log_dict({"g_loss": loss}, prog_bar=True)

        def on_train_epoch_end(self) -> None:
            for scheduler in self.lr_schedulers():
                scheduler.step()

        def configure_optimizers(self) -> Any:
            first = torch.optim.Adam(self.discriminator.parameters(), 0.01, betas=(0.5, 0.9))
            second = torch.optim.Adam(self.generator.parameters(), 0.01)
            schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (first, second)]
            return [first, second], schedulers

    trainer = lib.trainer(2)
    trainer.fit(module := GAN(), DataLoader(TensorDataset(normal(20, 3)), 4, shuffle=True))
    return module, trainer


def autoencoder(lib: Framework) -> Any:
    """A data module, a plateau scheduler that monitors the validation, and outputs that are collected by hand."""

    class Data(lib.LightningDataModule):  # type: ignore[misc, name-defined]
        def setup(self, stage: str) -> None:
            self.parts = normal(18, 6), normal(7, 6, seed=6)

        def train_dataloader(self) -> Any:
            return DataLoader(self.parts[0], 4, shuffle=True, generator=torch.Generator().manual_seed(8))

        def val_dataloader(self) -> Any:
            return DataLoader(self.parts[1], 4)

    class AutoEncoder(lib.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 2), nn.Linear(2, 6)
            self.error = torchmetrics.MeanSquaredError()
            self.outputs: list[Tensor] = []
            self.journal: list[Any] = []

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.journal.append(self.optimizers().param_groups[0]["lr"])
            loss = F.mse_loss(self.decoder(torch.tanh(self.encoder(batch))), batch)
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
            output = self.decoder(torch.tanh(self.encoder(batch)))
            self.error.update(output, batch)
            self.outputs.append(output)
            self.log("val_loss", F.l1_loss(output, batch))

        def on_validation_epoch_end(self) -> None:
            self.log("val_error", self.error.compute())
            self.error.reset()
            self.log("val_spread", torch.cat(self.outputs).std())
            self.outputs.clear()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5, factor=0.3)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_error"}}

    trainer = lib.trainer(4)
    trainer.fit(module := AutoEncoder(), datamodule=Data())
    return module, trainer


def recurrent(lib: Framework) -> Any:
    """An LSTM over packed sequences, which the collate function makes; gradients are clipped."""

    class Recurrent(lib.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 1)

        def training_step(self, batch: tuple[PackedSequence, Tensor], batch_idx: int) -> Any:
            sequences, targets = batch
            _, (hidden, _) = self.lstm(sequences)
            loss = F.mse_loss(self.head(hidden[-1]).squeeze(1), targets)
            self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(targets))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.RMSprop(self.parameters(), lr=0.01)

    def collate(items: list[Tensor]) -> Any:
        return pack_sequence(items, enforce_sorted=False), torch.stack([item.sum() for item in items])

    items = [normal(2 + i % 4, 3, seed=i) for i in range(14)]
    trainer = lib.trainer(2, clip=0.3)
    trainer.fit(module := Recurrent(), DataLoader(Items(items), 4, collate_fn=collate))
    return module, trainer


def several_tasks(lib: Framework) -> Any:
    """Two heads, two losses in a named tuple, learned weights of the losses, parameter groups, a warm-up by step."""
    Batch = namedtuple("Batch", "x y label")

    class Tasks(lib.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.heads = nn.Linear(4, 6), nn.ModuleDict({"value": nn.Linear(6, 1), "label": nn.Linear(6, 2)})
            self.weights = nn.Parameter(torch.zeros(2))

        def losses(self, batch: Any) -> dict[str, Tensor]:
            hidden = torch.relu(self.body(batch.x))
            value = F.mse_loss(self.heads["value"](hidden).squeeze(1), batch.y)
            return {"value": value, "label": F.cross_entropy(self.heads["label"](hidden), batch.label)}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            losses = self.losses(batch)
            self.log_dict({f"train/{name}": loss for name, loss in losses.items()}, on_step=False, on_epoch=True)
            return sum(torch.exp(-w) * loss + w for w, loss in zip(self.weights, losses.values(), strict=True))

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log_dict({f"val/{name}": loss for name, loss in self.losses(batch).items()})

        def configure_optimizers(self) -> Any:
            groups: list[Any] = [
                {"params": [self.weights], "lr": 0.1},
                {"params": [*self.body.parameters(), *self.heads.parameters()]},
            ]
            optimizer = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1)
            warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}

    x = normal(15, 4)
    items = [Batch(row, row.sum(), (row.sum() > 0).long()) for row in x]
    loaders = [DataLoader(Items(items[8:12]), 2), DataLoader(Items(items[12:]), 2)]
    trainer = lib.trainer(3)
    trainer.fit(module := Tasks(), DataLoader(Items(items[:8]), 3, drop_last=True), loaders)
    return module, trainer


def accumulated(lib: Framework) -> Any:
    """Accumulation and clipping together, and a cosine schedule over the steps of the run."""

    class Accumulated(lib.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))
            self.journal: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return F.mse_loss(self.net(x), y)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            gradients = [p.grad.norm() for p in self.parameters() if p.grad is not None]
            self.journal.append((self.global_step, float(torch.stack(gradients).norm())))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.NAdam(self.parameters(), lr=0.05)
            total = self.trainer.estimated_stepping_batches
            self.journal.append(total)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
            return [optimizer], [{"scheduler": cosine, "interval": "step", "name": "cosine"}]

    x = normal(26, 3)
    trainer = lib.trainer(3, accumulate=2, clip=0.2)
    trainer.fit(module := Accumulated(), DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4, shuffle=True))
    return module, trainer


def stopped_early(lib: Framework) -> Any:
    """A validation loss that no longer falls ends the run."""

    class Stopped(lib.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return self.layer(batch).square().mean()

        def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("val_loss", (self.layer(batch) - 0.1).abs().mean(), prog_bar=True)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.3)

    trainer = lib.trainer(50, patience=2)
    trainer.fit(module := Stopped(), DataLoader(normal(12, 2), 4), DataLoader(normal(5, 2, seed=9), 2))
    return module, trainer


def transfer(lib: Framework) -> Any:
    """A frozen backbone in eval mode, which is unfrozen in a later epoch; then a test."""

    class Transfer(lib.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
            self.head = nn.Linear(6, 2)
            self.backbone.requires_grad_(False)
            self.accuracy = torchmetrics.classification.MulticlassAccuracy(2)
            self.journal: list[Any] = []

        def on_train_epoch_start(self) -> None:
            if self.current_epoch < 2:
                self.backbone.eval()
            else:
                self.backbone.train().requires_grad_(True)
            self.journal.append([part.training for part in self.modules()])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return F.cross_entropy(self.head(self.backbone(x)), y)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.accuracy(self.head(self.backbone(x)), y)
            self.log("test_accuracy", self.accuracy)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)

    x = normal(14, 4)
    data = TensorDataset(x, (x.sum(1) > 0).long())
    trainer = lib.trainer(4)
    trainer.fit(module := Transfer(), DataLoader(data, 4))
    trainer.test(module, DataLoader(data, 3))
    return module, trainer


def line_search(lib: Framework) -> Any:
    """LBFGS evaluates the step many times."""

    class LineSearch(lib.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)
            self.evaluations = 0
            self.journal: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.evaluations += 1
            loss = (self.layer(batch) - batch.prod(1, keepdim=True)).square().mean()
            self.log("loss", loss)
            return loss

        def on_train_epoch_end(self) -> None:
            self.journal.append((self.evaluations, self.global_step, float(self.trainer.callback_metrics["loss"])))

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=5, line_search_fn="strong_wolfe")

    trainer = lib.trainer(3)
    trainer.fit(module := LineSearch(), DataLoader(normal(10, 3), 5))
    return module, trainer


def distillation(lib: Framework) -> Any:
    """A teacher that no optimizer trains, an average of weights as a buffer, hooks on both sides of a batch."""

    class Distilled(lib.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.student = nn.Linear(3, 2).requires_grad_(False), nn.Linear(3, 2)
            self.register_buffer("average", torch.zeros(2, 3))
            self.journal: list[Any] = []

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.journal.append(("start", batch_idx, self.global_step))

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            with torch.no_grad():
                target = self.teacher(batch).softmax(1)
            return F.kl_div(self.student(batch).log_softmax(1), target, reduction="batchmean")

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.average.lerp_(self.student.weight.detach(), 0.1)
            self.journal.append(("end", batch_idx, self.global_step))

        def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
            return self.student(batch).argmax(1)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.student.parameters(), lr=0.1)

    trainer = lib.trainer(2)
    trainer.fit(module := Distilled(), DataLoader(normal(9, 3), 4))
    module.journal.append([part.tolist() for part in trainer.predict(module, DataLoader(normal(5, 3), 2))])
    return module, trainer


def contrastive(lib: Framework) -> Any:
    """Nested batches that `on_after_batch_transfer` changes, and windows by hand that end with the epoch."""

    class Contrastive(lib.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.tower = nn.Linear(4, 3)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {**batch, "views": [view + 0.1 * torch.randn_like(view) for view in batch["views"]]}

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = (F.normalize(self.tower(view)) for view in batch["views"])
            loss = F.cross_entropy(first @ second.T / 0.5, torch.arange(len(first))) / 2
            self.manual_backward(loss)
            self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(first))
            if (batch_idx + 1) % 2 == 0 or self.trainer.is_last_batch:
                optimizer = self.optimizers()
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adagrad(self.parameters(), lr=0.1)

    x = normal(20, 4)
    items = [{"views": [row, row * 2], "id": f"row {i}"} for i, row in enumerate(x)]
    trainer = lib.trainer(2)
    trainer.fit(module := Contrastive(), DataLoader(Items(items), 4))
    return module, trainer


def validated_often(lib: Framework) -> Any:
    """Validation in the middle of epochs, limits, and values that are logged everywhere."""

    class Often(lib.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
            self.journal: list[Any] = []

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = self.net(batch).square().mean()
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.log("most", loss, on_step=False, on_epoch=True, reduce_fx="max")
            return loss

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val_loss", self.net(batch).square().mean(), on_epoch=True)

        def on_validation_epoch_end(self) -> None:
            self.journal.append((self.global_step, float(self.trainer.callback_metrics["val_loss"])))

        def on_train_epoch_end(self) -> None:
            self.log("epochs", float(self.current_epoch))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lib.trainer(2, val_check_interval=2, limit_train_batches=5, limit_val_batches=1)
    trainer.fit(module := Often(), DataLoader(normal(24, 2), 4), DataLoader(normal(8, 2), 4))
    return module, trainer


PROGRAMS: list[Program] = [
    text_classification,
    gan,
    autoencoder,
    recurrent,
    several_tasks,
    accumulated,
    stopped_early,
    transfer,
    line_search,
    distillation,
    contrastive,
    validated_often,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_both_frameworks_end_with_the_same_bits(program: Program) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, metrics, journal, epoch = run(program, "eventtrain")
        their_state, their_metrics, their_journal, their_epoch = run(program, "lightning")
    assert state.keys() == their_state.keys()
    assert [name for name in state if not torch.equal(state[name], their_state[name])] == []
    assert journal == their_journal
    assert epoch == their_epoch
    assert metrics == pytest.approx(their_metrics, rel=1e-6)  # means of epochs are added up in another order
