"""A terminal that breaks costs one warning and not the run, and a name in a file cannot give it orders."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eventtrain import LightningModule, MisconfigurationError
from eventtrain.callbacks import ModelCheckpoint, ModelSummary, Profiler, ProgressBar, TorchProfiler
from eventtrain.checkpoint import storage
from eventtrain.checkpoint.find import say
from eventtrain.errors import printable
from tests.kit import Line, On, new_trainer

BATCHES = [torch.ones(2, 1)] * 4
EVIL = "loss\x1b]0;owned\x07\x1b[2J\r\n\u202e"


class Broken(io.StringIO):
    """A stream that fails from the n-th write on.

    Args:
        error: The error.
        writes: The writes that succeed.
        terminal: Whether it is a terminal.
    """

    def __init__(self, error: Exception, writes: int = 0, *, terminal: bool = False) -> None:
        super().__init__()
        self.error, self.writes, self.terminal = error, writes, terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.writes -= 1
        if self.writes < 0:
            raise self.error
        return super().write(text)


ERRORS = {
    "a reader that left": BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
    "a terminal that is gone": OSError(errno.EIO, "Input/output error"),
    "a closed file": ValueError("I/O operation on closed file"),
    "a character": UnicodeEncodeError("ascii", "\u00fc", 0, 1, "ordinal not in range(128)"),
}


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("shown", float(batch_idx), prog_bar=True)
        return self.layer(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", 1.0)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", 1.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("terminal", [False, True], ids=["lines", "bars"])
@pytest.mark.parametrize("writes", [0, 1, 3, 6])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_broken_output_silences_the_bar_with_one_warning(
    error: Exception, writes: int, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Broken(error, writes, terminal=terminal))
    bar = ProgressBar(interval=0, line_interval=0)
    trainer = new_trainer(bar, max_epochs=3, num_sanity_val_steps=1)
    model = Model()
    with pytest.warns(UserWarning, match="ProgressBar prints nothing more, because its output is broken") as caught:
        trainer.fit(model, BATCHES, BATCHES)
    assert len(caught) == 1 and trainer.global_step == 12 and bar._shown == {}
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    trainer.test(model, BATCHES)
    assert "test: 4/4" in stream.getvalue(), "another run has another output"


def test_a_file_that_was_closed_silences_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    trainer = new_trainer(ProgressBar())
    with pytest.warns(UserWarning, match="ProgressBar prints nothing more"):
        trainer.fit(Model(), BATCHES)
    assert trainer.global_step == 4


def test_an_error_of_the_users_own_metrics_is_no_broken_output() -> None:
    class Mistaken(ProgressBar):
        def metrics(self, trainer: Any, loss: Any) -> Any:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        new_trainer(Mistaken(interval=0)).fit(Model(), BATCHES)


def test_printing_goes_on_if_only_the_bar_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tell(trainer: Any, event: Any) -> None:
        trainer.print("batch", event.batch_idx)

    stream = Broken(BrokenPipeError(errno.EPIPE, "Broken pipe"), 4, terminal=True)
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.warns(UserWarning, match="ProgressBar prints nothing more"):
        new_trainer(ProgressBar(interval=0), On(train_batch_end=tell)).fit(Model(), BATCHES)
    assert capsys.readouterr().out.splitlines() == [f"batch {index}" for index in range(4)]


PRINTERS: dict[str, Any] = {
    "ModelSummary": ModelSummary,
    "Profiler": lambda: Profiler(print_summary=True),
    "TorchProfiler": lambda: TorchProfiler(wait=0, warmup=0, active=1),
}


@pytest.mark.parametrize("name", PRINTERS)
def test_a_broken_output_costs_a_callback_that_prints_one_warning(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer = new_trainer(PRINTERS[name](), default_root_dir=tmp_path)
    for error in ERRORS.values():
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch.setattr(sys, "stdout", Broken(error))
            trainer.fit(Model(), BATCHES)
        assert [str(each.message).partition(",")[0] for each in caught if name in str(each.message)] == [
            f"{name} prints nothing more"
        ]
        assert trainer.global_step == 4


PROGRAM = """
import sys, torch
from eventtrain import Trainer
from eventtrain.callbacks import ProgressBar, ModelSummary, JSONLinesLogger
from tests.kit import Line
trainer = Trainer(max_epochs=3, device="cpu", default_root_dir=sys.argv[1],
                  callbacks=[ModelSummary(), ProgressBar(line_interval=0), JSONLinesLogger()])
trainer.fit(Line(on_epoch=True, on_step=False), [torch.ones(2, 1)] * 200)
open(sys.argv[1] + "/done", "w").write(str(trainer.global_step))
"""


@pytest.mark.parametrize("command", ["2>&1 | head -c 1", "2>&1 | true", "2>/dev/full >/dev/full", "2>&- >&-"])
def test_a_run_outlives_its_terminal(command: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PROGRAM)
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run(
        f"{sys.executable} {tmp_path / 'train.py'} {tmp_path} {command}",
        shell=True,
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.DEVNULL,
        timeout=120,
    )
    assert (tmp_path / "done").read_text() == "600"


# ------------------------------------------------------------------ names that give orders to a terminal


def orders(text: str) -> list[str]:
    """Return the characters of a text that a terminal does not simply show."""
    return [each for each in text if not each.isprintable() and each not in "\n\t"]


@pytest.mark.parametrize("text", ["plain", "caf\u00e9 \u7b11 \u2192", "a b", ""])
def test_plain_text_stays(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    "code", [0x00, 0x07, 0x08, 0x0A, 0x0D, 0x1B, 0x7F, 0x85, 0x9B, 0x202E, 0x2028, 0x2066, 0xDC80, 0xE0001]
)
def test_each_control_character_is_escaped(code: int) -> None:
    shown = printable(f"a{chr(code)}b")
    assert orders(shown) == [] and "\n" not in shown and shown[0] + shown[-1] == "ab" and shown.count("\\") == 1
    assert orders(str(MisconfigurationError(f"a{chr(code)}b"))) == []


def test_metrics_and_layers_cannot_give_orders(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Evil(Model):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(EVIL, type(EVIL, (nn.Linear,), {})(1, 1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log(EVIL, 1.0, prog_bar=True)
            return self.layer(batch).mean()

    new_trainer(ProgressBar(line_interval=0), ModelSummary(), Profiler(print_summary=True)).fit(Evil(), BATCHES)
    out, err = capsys.readouterr()
    assert "loss\\x1b" in out and "loss\\x1b" in err
    assert orders(out) == [] and orders(err) == []
    assert "owned" in err and not any(line.startswith("\\u202e") for line in err.splitlines()), "a name makes no line"


def test_a_checkpoint_cannot_give_orders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / f"{EVIL.strip()}.ckpt"
    model = Line()
    trainer = new_trainer(default_root_dir=tmp_path)
    trainer.fit(model, BATCHES)
    content = trainer.collect_checkpoint()
    content["callbacks"][EVIL] = {"a": 1}
    content["classes"] = {"optimizer_states": [EVIL]}
    content["state_dict"] = {EVIL: torch.ones(1)}
    storage.write(content, path)
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for attempt in (
            lambda: new_trainer(default_root_dir=tmp_path).fit(Line(), BATCHES, ckpt_path=path),
            lambda: new_trainer(default_root_dir=tmp_path).test(Line(), BATCHES, ckpt_path=path),
            lambda: new_trainer(ModelCheckpoint(tmp_path), default_root_dir=tmp_path).fit(Line(), BATCHES, ckpt_path="last"),
            lambda: storage.read(tmp_path),
        ):
            with pytest.raises(MisconfigurationError) as raised:
                attempt()
            error: BaseException | None = raised.value
            while error is not None:
                messages.append(str(error))
                error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    with caplog.at_level(logging.INFO, "eventtrain"):
        say(f"takes {EVIL}")
    messages += [*(str(each.message) for each in caught), *caplog.messages]
    assert any("\\x1b" in message for message in messages)
    assert [message for message in messages if orders(message)] == []
