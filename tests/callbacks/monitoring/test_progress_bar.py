"""ProgressBar shows a bar in a terminal, and lines in a log file."""

from __future__ import annotations

import io
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from eventtrain import Callback, LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import ProgressBar
from eventtrain.callbacks.monitoring import progress_bar as module_of_the_bar
from eventtrain.distributed import SingleProcess
from tests.kit import On, new_trainer, train

BATCHES = list(torch.ones(5, 2, 2))


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("shown", float(batch_idx), prog_bar=True)
        self.log("hidden", 1.0)
        return self.layer(batch).mean() * 0 + 0.125

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", 0.25, prog_bar=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        return None

    def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
        return batch

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Unsized:
    """A loader without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(BATCHES)


def loader(batches: int) -> DataLoader[Any]:
    return DataLoader(BATCHES[:batches], batch_size=None)  # type: ignore[arg-type]


class Terminal(io.StringIO):
    """The text that a terminal gets; :attr:`screen` has the lines that it shows."""

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        """Return the lines on the screen, without blank lines at its end."""
        lines, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[A|[\r\n]|[^\r\n\x1b]+", self.getvalue()):
            if part == "\x1b[A":
                row -= 1
                assert row >= 0, "the cursor left the screen"
            elif part == "\n":
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            elif part == "\r":
                column = 0
            else:
                line = lines[row].ljust(column)
                lines[row] = line[:column] + part + line[column + len(part) :]
                column += len(part)
        shown = [line.rstrip() for line in lines]
        while shown and not shown[-1]:
            shown.pop()
        return shown

    @property
    def cursor_is_on_a_blank_line(self) -> bool:
        after = re.split(r"[\r\n]", self.getvalue().replace("\x1b[A", ""))[-1]
        return not after.strip()


class Clock:
    """A clock that stands still until a test moves it, used instead of the module ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module_of_the_bar, "time", clock)
    return clock


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, bar: ProgressBar, run: Any = None, **options: Any) -> str:
    """Run a fit, or ``run(trainer)`` if it is given, and return the text that the stream got."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "200")
    callbacks = [bar, *options.pop("callbacks", [])]
    trainer = new_trainer(*callbacks, **{"max_epochs": 2, "num_sanity_val_steps": 2, **options})
    (run or (lambda trainer: trainer.fit(Model(), BATCHES, BATCHES[:2])))(trainer)
    return stream.getvalue()


class Drawn(ProgressBar):
    """Record the batches at which it reads values."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.at: list[int] = []

    def metrics(self, trainer: Any, loss: Any) -> dict[str, float]:
        self.at.append(trainer.batch_idx)
        return super().metrics(trainer, loss)


# ------------------------------------------------------------------ bars


def test_a_terminal_gets_a_bar_per_epoch_with_loss_metrics_and_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal(), ProgressBar(interval=0.0))
    final = [line for line in re.split(r"[\r\n]", text) if "5/5" in line]
    assert any("epoch 1/2: 100%" in line for line in final) and any("epoch 2/2: 100%" in line for line in final)
    assert "loss=0.125" in final[-1] and "shown=4" in final[-1] and "val_loss=0.25" in final[-1]
    assert re.search(r"\d+(\.\d+)?it/s", final[-1])
    assert "hidden" not in text


def test_each_epoch_begins_at_zero_and_counts_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal(), ProgressBar(interval=0.0))
    for epoch in ("epoch 1/2", "epoch 2/2"):
        counts = [int(count) for count in re.findall(rf"{epoch}: [^/]* (\d)/5 \[", text)]
        assert sorted(set(counts)) == [0, 1, 2, 3, 4, 5] and counts == sorted(counts)


def test_validation_has_a_separate_bar_below(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal(), ProgressBar(interval=0.0), num_sanity_val_steps=0)
    assert "validation: 100%" in text and "2/2" in text


def test_a_line_per_epoch_stays_on_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    shown(monkeypatch, stream, ProgressBar(interval=0.0))
    assert [line[:15] for line in stream.screen] == ["epoch 1/2: 100%", "epoch 2/2: 100%"]
    assert stream.cursor_is_on_a_blank_line


def test_without_leave_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    shown(monkeypatch, stream, ProgressBar(interval=0.0, leave=False))
    assert "5/5" in stream.getvalue() and stream.screen == []


def test_the_sanity_check_has_a_bar_that_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    text = shown(monkeypatch, stream, ProgressBar(interval=0.0), limit_val_batches=0)
    assert "sanity" not in text
    text = shown(monkeypatch, stream, ProgressBar(interval=0.0))
    assert "sanity check: 100%|##########| 2/2" in text
    assert not any("sanity" in line for line in stream.screen)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_evaluation_has_a_bar_that_stays(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    shown(monkeypatch, stream, ProgressBar(interval=0.0), lambda trainer: getattr(trainer, stage)(Model(), BATCHES))
    (line,) = stream.screen
    assert line.startswith(f"{'validation' if stage == 'validate' else stage}: 100%") and " 5/5 [" in line


def test_several_validation_loaders_share_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    shown(monkeypatch, stream, ProgressBar(interval=0.0), lambda t: t.validate(Model(), [loader(2), loader(3)]))
    assert len(stream.screen) == 1 and "validation: 100%|##########| 5/5 [" in stream.screen[0]
    shown(monkeypatch, stream, ProgressBar(interval=0.0), lambda t: t.validate(Model(), [loader(2), Unsized()]))
    assert len(stream.screen) == 2 and "validation: 7it [" in stream.screen[1]


def test_a_loader_without_a_length_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    shown(monkeypatch, stream, ProgressBar(interval=0.0), lambda trainer: trainer.fit(Model(), Unsized(), Unsized()))
    assert re.search(r"epoch 1/2: 5it", stream.getvalue()) and "validation: 5it" in stream.getvalue()
    assert [line[:14] for line in stream.screen] == ["epoch 1/2: 5it", "epoch 2/2: 5it"]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("terminal", [True, False])
def test_an_evaluation_over_a_loader_without_a_length_is_counted(
    stage: str, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    text = shown(monkeypatch, stream, ProgressBar(interval=0.0), lambda t: getattr(t, stage)(Model(), Unsized()))
    title = "validation" if stage == "validate" else stage
    assert f"{title}: 5it [" in text if terminal else re.fullmatch(rf"{title}: 5 batches, [\d.]+ it/s\n", text)


def test_the_loss_is_read_at_a_redraw_and_not_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = Drawn(interval=1e9)
    shown(monkeypatch, Terminal(), bar, max_epochs=1)
    assert bar.at == [0, 4], "at the first batch and at the epoch's end"


# ------------------------------------------------------------------ a validation during an epoch


class Screens(Callback):
    """Record the screen at some events."""

    def __init__(self, stream: Terminal) -> None:
        self.stream = stream
        self.during: list[list[str]] = []
        self.after: list[list[str]] = []
        self.next_batch: list[list[str]] = []

    def on_validation_batch_end(self, trainer: Any, event: Any) -> None:
        self.during.append(self.stream.screen)

    def on_validation_end(self, trainer: Any, event: Any) -> None:
        self.after.append(self.stream.screen)

    def on_safe_point(self, trainer: Any, event: Any) -> None:
        if self.after and not event.epoch_end:
            self.next_batch.append(self.stream.screen)


@pytest.mark.parametrize("interval", [0.0, 1e9])
def test_a_validation_during_an_epoch_has_a_line_below_the_training_bar(
    interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any cadence, the training bar shows the batches trained so far, and the line below disappears afterwards."""
    stream = Terminal()
    pictures = Screens(stream)
    options: dict[str, Any] = {"val_check_interval": 3, "num_sanity_val_steps": 0, "max_epochs": 1}
    shown(monkeypatch, stream, ProgressBar(interval=interval), callbacks=[pictures], **options)
    assert len(pictures.during) == 2 and len(pictures.after) == 1
    for picture in pictures.during:
        assert " 3/5 [" in picture[0] and picture[1].startswith("validation:") and len(picture) == 2
    assert len(pictures.after[0]) == 1 and " 3/5 [" in pictures.after[0][0]
    assert len(pictures.next_batch[-1]) == 1
    assert (" 4/5 [" if interval == 0.0 else " 3/5 [") in pictures.next_batch[-1][0]
    assert len(stream.screen) == 1 and "epoch 1/1: 100%" in stream.screen[0] and "val_loss=0.25" in stream.screen[0]


def test_the_throughput_of_a_bar_leaves_out_validation(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    stream = Terminal()
    options: dict[str, Any] = {"val_check_interval": 2, "num_sanity_val_steps": 0, "max_epochs": 1}
    shown(monkeypatch, stream, ProgressBar(), lambda t: t.fit(Slow(clock), BATCHES, BATCHES), **options)
    (line,) = stream.screen
    assert "5/5 [00:05<00:00,  1.00it/s" in line


# ------------------------------------------------------------------ lines


def test_a_log_file_gets_lines_without_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, io.StringIO(), ProgressBar(line_interval=1e9))
    lines = text.splitlines()
    assert len(lines) == 2 and all(character.isprintable() or character == "\n" for character in text)
    assert re.fullmatch(r"epoch 1/2: 5/5 batches, [\d.]+ it/s, loss=0.125, shown=4, val_loss=0.25", lines[0])


def test_a_log_file_of_a_loader_without_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, io.StringIO(), ProgressBar(line_interval=1e9), lambda t: t.fit(Model(), Unsized()))
    assert [line.split(",")[0] for line in text.splitlines()] == ["epoch 1/2: 5 batches", "epoch 2/2: 5 batches"]


class Slow(Model):
    """Each of its steps takes a second."""

    def __init__(self, clock: Clock, *, step: float = 1.0) -> None:
        super().__init__()
        self.clock = clock
        self.step = step

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.clock.now += self.step
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.clock.now += self.step
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.clock.now += self.step


def test_a_long_evaluation_prints_a_line_now_and_then(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = BATCHES * 2
    text = shown(monkeypatch, io.StringIO(), ProgressBar(line_interval=2.5), lambda t: t.test(Slow(clock), batches))
    assert text.splitlines() == [
        "test: 3/10 batches, 1.0 it/s",
        "test: 6/10 batches, 1.0 it/s",
        "test: 9/10 batches, 1.0 it/s",
        "test: 10/10 batches, 1.0 it/s",
    ]


def test_a_last_line_is_not_printed_twice(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, io.StringIO(), ProgressBar(line_interval=2.5), lambda t: t.test(Slow(clock), BATCHES[:3]))
    assert text == "test: 3/3 batches, 1.0 it/s\n"


def test_a_long_validation_during_a_fit_prints_lines_only_at_the_cadence(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(trainer: Trainer) -> None:
        trainer.fit(Slow(clock), BATCHES, BATCHES[:4])

    text = shown(monkeypatch, io.StringIO(), ProgressBar(line_interval=3.0), run, max_epochs=1, num_sanity_val_steps=0)
    assert text.splitlines() == [
        "epoch 1/1: 3/5 batches, 1.0 it/s, loss=0.125, shown=2",
        "validation: 3/4 batches, 1.0 it/s",
        "epoch 1/1: 5/5 batches, 1.0 it/s, loss=0.125, shown=4, val_loss=0.25",  # the throughput of training
    ]


# ------------------------------------------------------------------ the cadence


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "pipe"])
def test_a_batch_that_takes_longer_than_the_interval_is_drawn(
    stream: io.StringIO, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = Drawn(interval=0.5, line_interval=0.5)
    shown(monkeypatch, stream, bar, lambda trainer: trainer.fit(Slow(clock), BATCHES), max_epochs=1)
    assert bar.at == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "pipe"])
def test_every_batch_is_drawn_without_an_interval(stream: io.StringIO, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = Drawn(interval=0, line_interval=0)
    shown(monkeypatch, stream, bar, lambda trainer: trainer.fit(Slow(clock, step=0.0), BATCHES), max_epochs=1)
    assert bar.at == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "pipe"])
def test_fast_batches_are_drawn_at_the_interval(stream: io.StringIO, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = Drawn(interval=1.0, line_interval=1.0)
    model = Slow(clock, step=0.125)
    shown(monkeypatch, stream, bar, lambda trainer: trainer.fit(model, BATCHES * 5), max_epochs=1)
    first = [0, 8, 16, 24, 24] if isinstance(stream, Terminal) else [7, 15, 23, 24]
    assert bar.at == first


def test_a_run_that_becomes_slow_is_drawn_by_its_new_speed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slower(Slow):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.step = 0.01 if batch_idx < 15 else 10.0
            return super().training_step(batch, batch_idx)

    bar = Drawn(interval=1.0)
    shown(monkeypatch, Terminal(), bar, lambda trainer: trainer.fit(Slower(clock), BATCHES * 4), max_epochs=1)
    assert bar.at == [0, 16, 17, 18, 19, 19]  # the duration of batch 15 was not known before it


def test_an_evaluation_that_becomes_slow_is_drawn_at_each_batch(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slower(Slow):
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.step = 0.01 if batch_idx < 40 else 10.0
            super().test_step(batch, batch_idx)

    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    text = shown(monkeypatch, Terminal(), ProgressBar(interval=0.095), lambda t: t.test(Slower(clock), BATCHES * 9))
    counts = [int(count) for count in re.findall(r" (\d+)/45 \[", text)]
    assert counts == [0, 10, 20, 30, 40, 41, 42, 43, 44, 45, 45]


def test_a_validation_between_two_batches_does_not_draw_the_next_too_early(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Validating(Slow):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.step = 0.01
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.step = 0.5
            super().validation_step(batch, batch_idx)

    bar = Drawn(interval=1.0)
    options: dict[str, Any] = {"max_epochs": 1, "val_check_interval": 2, "num_sanity_val_steps": 0}
    shown(monkeypatch, Terminal(), bar, lambda t: t.fit(Validating(clock), BATCHES, BATCHES[:1]), **options)
    assert bar.at == [0, 4, 4]  # batch 2 ends after 0.53 seconds


# ------------------------------------------------------------------ the ends of an epoch


def last_line(monkeypatch: pytest.MonkeyPatch, module: Model, data: Any = BATCHES, **options: Any) -> str:
    """Return the first epoch's line without its throughput. Only the line at the epoch's end is due."""
    text = shown(
        monkeypatch, io.StringIO(), ProgressBar(line_interval=1e9), lambda trainer: trainer.fit(module, data), **options
    )
    return re.sub(r" batches, \S+ it/s", "", text.splitlines()[0])


def in_third_batch(event: str, action: Callable[[Trainer, Any], Any]) -> On:
    """Return a callback that does something at an event of the batch with index 2."""
    return On(**{event: lambda trainer, event: action(trainer, event) if trainer.batch_idx == 2 else None})


ENDS: dict[str, tuple[str, Callable[[Trainer, Any], Any], int]] = {
    "stop in a batch": ("after_update", lambda trainer, event: trainer.stop("enough"), 3),
    "stop at a safe point": ("safe_point", lambda trainer, event: trainer.stop("enough"), 3),
    "end_epoch in a batch": ("after_update", lambda trainer, event: trainer.end_epoch("enough"), 3),
    "end_epoch at a safe point": ("safe_point", lambda trainer, event: trainer.end_epoch("enough"), 3),
    "end_epoch at the gate": ("train_batch_start", lambda trainer, event: event.end_epoch(), 2),
    "skip_batch": ("train_batch_start", lambda trainer, event: event.skip_batch(), 5),
}


@pytest.mark.parametrize("way", ENDS)
@pytest.mark.parametrize("terminal", [True, False])
def test_the_last_count_is_right_however_an_epoch_ends(way: str, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    event, action, count = ENDS[way]
    stream: Any = Terminal() if terminal else io.StringIO()
    bar = ProgressBar(interval=1e9, line_interval=1e9)
    text = shown(
        monkeypatch, stream, bar, lambda t: t.fit(Model(), BATCHES), callbacks=[in_third_batch(event, action)], max_epochs=1
    )
    if terminal:
        assert len(stream.screen) == 1 and f" {count}/5 [" in stream.screen[0]
    else:
        assert re.match(rf"epoch 1/1: {count}/5 batches, ", text) and len(text.splitlines()) == 1


def test_a_module_may_end_the_epoch_before_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ending(Model):
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    text = shown(monkeypatch, io.StringIO(), ProgressBar(line_interval=1e9), lambda t: t.fit(Ending(), BATCHES))
    assert [line.split(",")[0] for line in text.splitlines()] == ["epoch 1/2: 3/5 batches", "epoch 2/2: 3/5 batches"]


def test_max_steps_may_end_the_run_in_the_middle_of_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert last_line(monkeypatch, Model(), max_steps=2, max_epochs=None).startswith("epoch 1: 2/5")


def test_a_loader_without_a_batch_is_counted_as_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    used_up = iter(BATCHES)
    with pytest.warns(UserWarning, match="gave no batch"):
        text = shown(monkeypatch, io.StringIO(), ProgressBar(line_interval=1e9), lambda t: t.fit(Model(), used_up))
    assert [line.split(",")[0] for line in text.splitlines()] == ["epoch 1/2: 5 batches", "epoch 2/2: 0 batches"]


def test_manual_optimization_shows_the_loss_of_the_last_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = self.layer(batch).mean()
            self.manual_backward(loss)
            optimizer.step()
            return {"loss": loss.detach() * 0 + batch_idx}

    assert last_line(monkeypatch, Manual()) == "epoch 1/2: 5/5, loss=4"


def test_a_run_without_optimizer_and_loss_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    with pytest.warns(UserWarning, match="optimizer"):
        assert last_line(monkeypatch, Idle()) == "epoch 1/2: 5/5"


def test_without_max_epochs_the_title_has_no_total(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, io.StringIO(), ProgressBar(), lambda t: t.fit(Model(), BATCHES), max_epochs=-1, max_steps=10)
    assert [line.split(",")[0] for line in text.splitlines()] == ["epoch 1: 5/5 batches", "epoch 2: 5/5 batches"]


def resumed(monkeypatch: pytest.MonkeyPatch, folder: Path, stream: io.StringIO, bar: ProgressBar, module: Model) -> str:
    """Resume a run from a checkpoint after three batches of its first epoch; return the text that the stream got."""
    path = folder / "third_batch.ckpt"

    def save(trainer: Trainer, event: Any) -> None:
        if not path.exists() and trainer.total_batch_idx == 2:
            trainer.save_checkpoint(path)

    train(Model(), BATCHES, On(take_checkpoint=save), max_epochs=2)
    monkeypatch.setattr(sys, "stderr", stream)
    new_trainer(bar, max_epochs=2).fit(module, BATCHES, ckpt_path=path)
    return stream.getvalue()


def test_a_resumed_epoch_begins_at_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    text = resumed(monkeypatch, tmp_path, stream, ProgressBar(interval=0.0), Model())
    counts = [int(count) for count in re.findall(r"epoch 1/2: [^/]* (\d)/5 \[", text)]
    assert counts[0] == 3 and sorted(set(counts)) == [3, 4, 5]
    assert [line[:15] for line in stream.screen] == ["epoch 1/2: 100%", "epoch 2/2: 100%"]
    assert "epoch 2/2:   0%|          | 0/5" in text


def test_the_throughput_of_a_resumed_epoch_counts_only_its_batches(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = resumed(monkeypatch, tmp_path, io.StringIO(), ProgressBar(line_interval=1e9), Slow(clock))
    assert [", ".join(line.split(", ")[:2]) for line in text.splitlines()] == [
        "epoch 1/2: 5/5 batches, 1.0 it/s",
        "epoch 2/2: 5/5 batches, 1.0 it/s",
    ]


def test_a_log_file_has_one_line_for_an_epoch_with_a_slow_last_batch(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowAtLast(Slow):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.step = 100.0 if batch_idx == 4 else 0.01
            return super().training_step(batch, batch_idx) * 0 + batch_idx

    bar = ProgressBar(line_interval=10.0)
    text = shown(monkeypatch, io.StringIO(), bar, lambda t: t.fit(SlowAtLast(clock), BATCHES), max_epochs=1)
    assert re.fullmatch(r"epoch 1/1: 5/5 batches, [\d.]+ it/s, loss=4, shown=4\n", text)


# ------------------------------------------------------------------ the output


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "pipe"])
def test_other_ranks_show_nothing_and_read_nothing(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Other(SingleProcess):
        world_size, global_rank, local_rank = 2, 1, 1

    listeners: list[Any] = []

    def look(trainer: Trainer, event: Any) -> None:
        listeners.extend(trainer.signals.train_batch_end.listeners)

    class Printing(Model):
        def on_train_epoch_end(self) -> None:
            self.print("printed")

    def run(trainer: Trainer) -> None:
        trainer.processes = Other()
        trainer.fit(Printing(), BATCHES, BATCHES[:2])
        trainer.test(Printing(), BATCHES)

    bar = Drawn(interval=0.0, line_interval=0.0)
    assert shown(monkeypatch, stream, bar, run, callbacks=[On(safe_point=look, after_update=look, train_data_end=look)]) == ""
    assert capsys.readouterr().out == ""
    assert bar.at == [] and listeners == []


def test_a_process_without_a_console_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    trainer = train(Model(), BATCHES, ProgressBar(interval=0.0, line_interval=0.0), val=BATCHES, num_sanity_val_steps=2)
    assert trainer.global_step == 5


def notebook(monkeypatch: pytest.MonkeyPatch, *, widgets: bool) -> None:
    class ZMQInteractiveShell: ...

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=ZMQInteractiveShell))
    monkeypatch.setattr(module_of_the_bar, "find_spec", lambda name: object() if widgets and name == "ipywidgets" else None)


def test_a_notebook_without_widgets_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook(monkeypatch, widgets=False)
    text = shown(monkeypatch, io.StringIO(), ProgressBar(line_interval=1e9))
    assert len(text.splitlines()) == 2 and "\r" not in text


def test_a_notebook_with_widgets_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook(monkeypatch, widgets=True)
    text = shown(monkeypatch, io.StringIO(), ProgressBar(interval=0.0))
    assert "epoch 2/2: 100%|##########| 5/5" in text


def test_an_interactive_shell_that_is_not_a_notebook_is_like_any_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert len(shown(monkeypatch, io.StringIO(), ProgressBar(line_interval=1e9)).splitlines()) == 2


# ------------------------------------------------------------------ beside other output


def test_print_goes_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Printing(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if batch_idx == 2:
                self.print("half", "of", "it", sep="-")
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            self.print("epoch", self.current_epoch, "is over")

    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    shown(monkeypatch, stream, ProgressBar(interval=0.0), lambda trainer: trainer.fit(Printing(), BATCHES))
    assert [line[:15] for line in stream.screen] == [
        "half-of-it",
        "epoch 0 is over",
        "epoch 1/2: 100%",
        "half-of-it",
        "epoch 1 is over",
        "epoch 2/2: 100%",
    ]


def test_print_above_two_bars_and_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = io.StringIO()

    class Printing(Model):
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.print("a validation batch")
            self.print("for the file", file=elsewhere)

    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)

    def run(trainer: Trainer) -> None:
        trainer.fit(Printing(), BATCHES, BATCHES[:2])

    shown(monkeypatch, stream, ProgressBar(interval=0.0), run, max_epochs=1, num_sanity_val_steps=0)
    assert [line[:18] for line in stream.screen] == ["a validation batch", "a validation batch", "epoch 1/1: 100%|##"]
    assert elsewhere.getvalue() == "for the file\n" * 2


def test_a_bar_of_the_user_around_several_fits_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()

    def run(trainer: Trainer) -> None:
        with tqdm(total=3, desc="folds", file=stream, mininterval=0.0) as folds:
            for _ in range(3):
                trainer.fit(Model(), BATCHES, BATCHES[:2])
                folds.update()

    shown(monkeypatch, stream, ProgressBar(interval=0.0, leave=False), run)
    (line,) = stream.screen
    assert line.startswith("folds: 100%|##########| 3/3")


def test_two_fits_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(trainer: Trainer) -> None:
        for _ in range(2):
            trainer.fit(Model(), BATCHES, BATCHES[:2])
        trainer.test(Model(), BATCHES)

    stream = Terminal()
    shown(monkeypatch, stream, ProgressBar(interval=0.0), run)
    titles = ["epoch 1/2", "epoch 2/2", "epoch 1/2", "epoch 2/2", "test"]
    assert [line.split(":")[0] for line in stream.screen] == titles
    assert all(" 5/5 [" in line for line in stream.screen)


def test_it_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tqdm, "monitor", None)  # a bar of another test may have started tqdm's monitor
    module_of_the_bar.bar_class.cache_clear()
    before = threading.active_count()
    shown(monkeypatch, Terminal(), ProgressBar(interval=0.0))
    assert threading.active_count() == before


# ------------------------------------------------------------------ errors


class Failing(Model):
    """Fail in a step of a stage."""

    def __init__(self, stage: str, error: type[BaseException]) -> None:
        super().__init__()
        self.stage, self.error = stage, error

    def fail(self, stage: str) -> None:
        if stage == self.stage:
            raise self.error("no")

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if batch_idx == 2:
            self.fail("train")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.fail("validation")

    def on_train_epoch_end(self) -> None:
        self.fail("end")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(("stage", "count"), [("train", 2), ("validation", 5), ("end", 5)])
def test_an_error_leaves_the_cursor_on_a_blank_line(
    stage: str, count: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, bar = Terminal(), ProgressBar(interval=0.0)

    def run(trainer: Trainer) -> None:
        with pytest.raises(error, match="no"):
            trainer.fit(Failing(stage, error), BATCHES, BATCHES[:2])
        assert trainer.signals.train_batch_end.listeners == ()

    shown(monkeypatch, stream, bar, run, num_sanity_val_steps=0)
    assert len(stream.screen) == 1 and stream.screen[0].startswith("epoch 1/2:") and f" {count}/5 [" in stream.screen[0]
    assert stream.cursor_is_on_a_blank_line
    assert stream.getvalue().endswith("\n")


def test_after_an_error_in_a_validation_the_log_file_has_the_count_of_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(trainer: Trainer) -> None:
        with pytest.raises(ValueError, match="no"):
            trainer.fit(Failing("validation", ValueError), BATCHES, BATCHES[:2])

    bar = ProgressBar(line_interval=1e9, leave=False)
    text = shown(monkeypatch, io.StringIO(), bar, run, num_sanity_val_steps=0)
    assert re.fullmatch(r"epoch 1/2: 5/5 batches, [\d.]+ it/s\n", text)


def test_a_run_after_an_error_begins_with_new_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(trainer: Trainer) -> None:
        with pytest.raises(ValueError, match="no"):
            trainer.fit(Failing("train", ValueError), BATCHES)
        trainer.fit(Model(), BATCHES)

    stream = Terminal()
    shown(monkeypatch, stream, ProgressBar(interval=0.0), run)
    assert [re.findall(r" (\d)/5 ", line) for line in stream.screen] == [["2"], ["5"], ["5"]]


@pytest.mark.parametrize("argument", ["interval", "line_interval"])
@pytest.mark.parametrize("value", [-1, float("nan"), "1", True, None])
def test_an_interval_is_a_number_of_seconds(argument: str, value: Any) -> None:
    with pytest.raises(MisconfigurationError, match=rf"ProgressBar\({argument}="):
        ProgressBar(**{argument: value})
