"""The loop's requests: an epoch that is asked to end, wherever the request comes from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from eventtrain import LightningModule, MisconfigurationError, Trainer

BATCHES = list(torch.ones(4, 2, 2))


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def end_after_two_batches(trainer: Trainer, event: Any) -> None:
    if trainer.current_epoch == 0 and trainer.batch_idx == 1:
        trainer.end_epoch("enough")


@pytest.mark.parametrize("event", ["train_batch_start", "after_update", "train_batch_end", "safe_point"])
@pytest.mark.parametrize("interval", [None, 2], ids=["at the end", "every second batch"])
def test_an_epoch_that_is_asked_to_end_is_validated_once(event: str, interval: int | None) -> None:
    trainer = Trainer(max_epochs=2, device="cpu", default_callbacks=False, num_sanity_val_steps=0, val_check_interval=interval)
    trainer.signals[event].connect(end_after_two_batches)
    with trainer.signals.trace() as trace:
        trainer.fit(Model(), BATCHES, BATCHES[:1])
    names = trace.names()
    first = names[: names.index("train_epoch_end")]
    assert first.count("train_batch_end") == 2, "the batch at hand is finished"
    assert first.count("validation_end") == 1
    assert "train_data_end" not in first, "nothing that counts epochs steps"
    assert trainer.current_epoch == 2 and trainer.global_step == 6


@pytest.mark.parametrize("name", ["training_step", "validation_step"])
@pytest.mark.parametrize("takes", [0, 4])
def test_a_step_that_cannot_be_called_is_told_its_form_before_training(name: str, takes: int) -> None:
    def step(self: Any, a: Any, b: Any, c: Any, d: Any) -> Any: ...

    def bare(self: Any) -> Any: ...

    model = type("Odd", (Model,), {name: step if takes else bare})()
    trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False)
    with pytest.raises(MisconfigurationError, match=r"does not fit. Write `def .*\(self, batch, batch_idx"):
        trainer.fit(model, BATCHES, BATCHES[:1])
    assert trainer.global_step == 0
