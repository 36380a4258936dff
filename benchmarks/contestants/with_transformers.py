"""The contestant HF Trainer: the Trainer of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from benchmarks.work import CLIP, LOG_EVERY, Batches, Setting, make_loss, make_model, make_optimizer, make_scheduler


class Model(nn.Module):
    """The network of a setting in the form that the Trainer expects: if it gets ``labels``, it returns the loss first."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.network = make_model(setting)
        self.loss_function = make_loss(setting)

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the predictions."""
        predicted = self.network(inputs)
        return self.loss_function(predicted, labels), predicted


class InOrder(Trainer):
    """A Trainer that does not shuffle or split the batches."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of the batches, with the names of the model's arguments."""
        return DataLoader(
            self.train_dataset, batch_size=None, collate_fn=lambda batch: {"inputs": batch[0], "labels": batch[1]}
        )


def train(setting: Setting, batches: Batches, folder: Path) -> nn.Module:
    """use_cpu=True, save_strategy="no", SGD through optimizers=, the batches from get_train_dataloader() in a
    DataLoader(batch_size=None). Bare: max_grad_norm=0.0, which clips nothing but still computes the norm; a constant rate,
    whose scheduler is still stepped; no logging, no bar. Standard: gradient_accumulation_steps=4, max_grad_norm=0.25,
    TensorBoard every 50 updates, which gets the mean loss since the last time, and its bar, which advances once an update.
    In both, it looks for NaN in each loss, its default."""
    model = Model(setting)
    optimizer = make_optimizer(model)
    arguments: dict[str, Any] = {
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if setting.extras:
        arguments = {
            "max_grad_norm": CLIP,
            "gradient_accumulation_steps": setting.accumulate,
            "logging_steps": LOG_EVERY,
            "report_to": "tensorboard",
            "disable_tqdm": False,
        }
    trainer = InOrder(
        model,
        TrainingArguments(
            str(folder),
            use_cpu=True,
            per_device_train_batch_size=1,
            num_train_epochs=1,
            save_strategy="no",
            **arguments,
        ),
        train_dataset=batches,
        optimizers=(optimizer, make_scheduler(setting, optimizer) if setting.extras else None),
    )
    trainer.train()
    return model.network
