"""What the progress bar shows: in a terminal a bar, in a log file lines."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest
import torch
from torch import nn

from eventtrain import LightningModule, Trainer
from eventtrain.callbacks import ProgressBar

BATCHES = list(torch.ones(5, 2, 2))


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("shown", float(batch_idx), prog_bar=True)
        self.log("hidden", 1.0)
        return self.layer(batch).mean() * 0 + 0.125

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 0.25, prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, bar: ProgressBar, run: Any = None, **options: Any) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "200")
    trainer = Trainer(device="cpu", callbacks=[bar], **{"max_epochs": 2, **options})
    (run or (lambda trainer: trainer.fit(Model(), BATCHES, BATCHES[:2])))(trainer)
    return stream.getvalue()


def test_a_terminal_gets_a_bar_per_epoch_with_loss_metrics_and_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal(), ProgressBar(interval=0.0))
    final = [line for line in re.split(r"[\r\n]", text) if "5/5" in line]
    assert any("epoch 1/2: 100%" in line for line in final) and any("epoch 2/2: 100%" in line for line in final)
    assert "loss=0.125" in final[-1] and "shown=4" in final[-1] and "val_loss=0.25" in final[-1]
    assert re.search(r"\d+(\.\d+)?it/s", final[-1])
    assert "hidden" not in text


def test_validation_has_a_bar_of_its_own_below(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal(), ProgressBar(interval=0.0), num_sanity_val_steps=0)
    assert "validation: 100%" in text and "2/2" in text


def test_the_test_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal(), ProgressBar(interval=0.0), lambda trainer: trainer.test(Model(), BATCHES))
    assert "test: 100%" in text and "5/5" in text


def test_a_log_file_gets_lines_without_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, io.StringIO(), ProgressBar(line_interval=1e9))
    lines = text.splitlines()
    assert len(lines) == 2 and all(character.isprintable() or character == "\n" for character in text)
    assert re.fullmatch(r"epoch 1/2: 5/5 batches, [\d.]+ it/s, loss=0.125, shown=4, val_loss=0.25", lines[0])


def test_a_loader_without_a_length_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsized:
        def __iter__(self) -> Any:
            return iter(BATCHES)

    text = shown(monkeypatch, Terminal(), ProgressBar(interval=0.0), lambda trainer: trainer.fit(Model(), Unsized()))
    assert re.search(r"epoch 1/2: 5it", text)


def test_an_evaluation_over_a_loader_without_a_length_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsized:
        def __iter__(self) -> Any:
            return iter(BATCHES)

    bar = ProgressBar(interval=0.0)
    assert "test: 5it" in shown(monkeypatch, Terminal(), bar, lambda trainer: trainer.test(Model(), Unsized()))


def test_the_loss_is_read_at_a_redraw_and_not_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    class Counting(ProgressBar):
        def metrics(self, trainer: Any, loss: Any) -> dict[str, float]:
            reads.append(loss)
            return super().metrics(trainer, loss)

    shown(monkeypatch, Terminal(), Counting(interval=1e9), max_epochs=1)
    assert len(reads) == 2, "at the first batch and at the epoch's end"


def test_print_goes_above_the_bar(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Printing(Model):
        def on_train_epoch_end(self) -> None:
            self.print("epoch", self.current_epoch, "is over")

    shown(monkeypatch, Terminal(), ProgressBar(), lambda trainer: trainer.fit(Printing(), BATCHES))
    assert "epoch 0 is over\nepoch 1 is over\n" in capsys.readouterr().out


def test_an_error_leaves_the_terminal_on_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise ValueError("no")
            return super().training_step(batch, batch_idx)

    stream = Terminal()
    with pytest.raises(ValueError, match="no"):
        shown(monkeypatch, stream, ProgressBar(interval=0.0), lambda trainer: trainer.fit(Failing(), BATCHES))
    assert stream.getvalue().endswith("\n")
