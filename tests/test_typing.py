"""Type checkers know the hooks, and check those of a user's callbacks and modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

USER_CODE = """\
from typing import Any
from eventtrain import Callback, LightningModule, Trainer, events
from eventtrain.callbacks import GradientAccumulation

class Good(Callback):
    def on_train_batch_start(self, trainer: Trainer, event: events.TrainBatchStart) -> None:
        event.plan.loss_scale = 0.5

class GoodModule(LightningModule):
    def on_train_epoch_end(self) -> None: ...
    def training_step(self, batch: Any, batch_idx: int) -> Any: ...

class Warmup(GradientAccumulation):
    def batches_per_step(self, trainer: Any) -> int:
        return 1 if trainer.global_step < 100 else 8

def wrap(trainer: Trainer, event: events.BeforeForward) -> None:
    event.call = lambda step, *args: step(*args)

trainer = Trainer(max_epochs=1, callbacks=[Good(), Warmup(1)])
trainer.signals.before_forward.connect(wrap)

class BadCallback(Callback):
    def on_train_batch_start(self, trainer: Trainer, event: events.TrainBatchEnd) -> None: ...

class BadModule(LightningModule):
    def on_train_epoch_end(self, outputs: Any) -> None: ...

def misspelt(trainer: Trainer, event: events.BeforeForward) -> None:
    event.runs

unknown_argument = Trainer(max_epochs=1, gpus=1)

unknown_stage_argument = trainer.validate(train_dataloader=[])

unknown_callback_argument = GradientAccumulation(steps=2)

unknown_attribute = trainer.lightning_module
"""


@pytest.mark.slow
def test_a_wrong_signature_is_found_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER_CODE)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "user.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    reported = [(int(line.split(":")[1]), line.rsplit("[", 1)[1].rstrip("]")) for line in errors]
    expected = [("class BadCallback", 1, "override"), ("class BadModule", 1, "override"), ("def misspelt", 1, "attr-defined")]
    expected += [(f"unknown_{what}argument", 0, "call-arg") for what in ("", "stage_", "callback_")]
    expected += [("unknown_attribute", 0, "attr-defined")]
    lines = USER_CODE.splitlines()
    starts = [next(i for i, line in enumerate(lines, 1) if line.startswith(begin)) for begin, _, _ in expected]
    assert reported == [(start + after, kind) for start, (_, after, kind) in zip(starts, expected, strict=True)], done.stdout
