"""The loop: epochs that are ended early, and steps with a wrong form."""

from __future__ import annotations

from typing import Any

import pytest

from eventtrain import MisconfigurationError, Trainer
from tests.kit import Line, new_trainer, rows

BATCHES = rows(4)


def end_after_two_batches(trainer: Trainer, event: Any) -> None:
    if trainer.current_epoch == 0 and trainer.batch_idx == 1:
        trainer.end_epoch("enough")


@pytest.mark.parametrize("event", ["train_batch_start", "after_update", "train_batch_end", "safe_point"])
@pytest.mark.parametrize("interval", [None, 2], ids=["at the end", "every second batch"])
def test_an_epoch_that_is_asked_to_end_is_validated_once(event: str, interval: int | None) -> None:
    trainer = new_trainer(max_epochs=2, val_check_interval=interval)
    trainer.signals[event].connect(end_after_two_batches)
    with trainer.signals.trace() as trace:
        trainer.fit(Line(), BATCHES, BATCHES[:1])
    names = trace.names()
    first = names[: names.index("train_epoch_end")]
    assert first.count("train_batch_end") == 2, "the current batch is finished"
    assert first.count("validation_end") == 1
    assert "train_data_end" not in first, "nothing that counts epochs steps"
    assert trainer.current_epoch == 2 and trainer.global_step == 6


@pytest.mark.parametrize("name", ["training_step", "validation_step"])
@pytest.mark.parametrize("takes", [0, 4])
def test_a_step_with_a_wrong_form_is_refused_before_training(name: str, takes: int) -> None:
    def step(self: Any, a: Any, b: Any, c: Any, d: Any) -> Any: ...

    def bare(self: Any) -> Any: ...

    model = type("Odd", (Line,), {name: step if takes else bare})()
    trainer = new_trainer(num_sanity_val_steps=2)
    with pytest.raises(MisconfigurationError, match=r"does not fit. Write `def .*\(self, batch, batch_idx"):
        trainer.fit(model, BATCHES, BATCHES[:1])
    assert trainer.global_step == 0
