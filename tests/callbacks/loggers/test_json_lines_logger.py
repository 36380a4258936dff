"""The lines are what the run logged: each whole, each step once, valid JSON."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eventtrain import LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks.loggers import run_files as runs
from eventtrain.callbacks.loggers.json_lines_logger import JSONLinesLogger, number

BATCHES = [torch.full((2, 1), float(x)) for x in (1, 2, 3, 4)]


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(1, 1)
        self.kept: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.kept.append(float(loss.detach()))
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", batch.mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Crash(RuntimeError):
    pass


def fit(
    root: Path, *callbacks: Any, fails_at: int | None = None, logger: Any = None, ckpt_path: Any = None, **options: Any
) -> Any:
    """A fit in which each epoch leaves a checkpoint ``epoch_<n>.ckpt`` in the root."""
    logger = logger or JSONLinesLogger(log_every_n_steps=1)
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, **options}
    trainer = Trainer(device="cpu", default_callbacks=False, callbacks=[logger, *callbacks], default_root_dir=root, **options)
    model = Model()

    def fail(trainer: Trainer, event: Any) -> None:
        if event.global_step == fails_at:
            raise Crash("at the worst moment")

    def save(trainer: Trainer, event: Any) -> None:
        if event.epoch_end and not trainer.fast_dev_run:
            trainer.save_checkpoint(root / f"epoch_{trainer.current_epoch}.ckpt")

    trainer.signals.after_update.connect(fail)
    trainer.signals.safe_point.connect(save)
    if fails_at is None:
        trainer.fit(model, BATCHES, BATCHES[:1], ckpt_path=ckpt_path)
    else:
        with pytest.raises(Crash):
            trainer.fit(model, BATCHES, BATCHES[:1], ckpt_path=ckpt_path)
    return logger, model, trainer


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse_constant) for line in text.splitlines()]


def untimed(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "time"} for line in lines(path)]


def steps(path: Path) -> list[int]:
    return [line["step"] for line in lines(path) if line["scope"] == "step"]


def test_the_lines_are_what_the_run_logged(tmp_path: Path) -> None:
    before = time.time()
    logger, model, _ = fit(tmp_path, max_epochs=1)
    assert logger.run_path == tmp_path / "metrics.jsonl"
    train = {"stage": "train", "epoch": 0}
    means = {"loss_epoch": pytest.approx(sum(model.kept) / 4)}
    assert untimed(logger.run_path) == [
        *({**train, "scope": "step", "step": i, "loss_step": loss} for i, loss in enumerate(model.kept, 1)),
        {"stage": "validation", "scope": "epoch", "step": 4, "epoch": 0, "val": 1.0},
        {**train, "scope": "epoch", "step": 4, **means},
    ]
    times = [line["time"] for line in lines(logger.run_path)]
    assert times == sorted(times) and before <= times[0] and times[-1] <= time.time()


def test_steps_are_written_at_the_cadence(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path, logger=JSONLinesLogger("a/b.jsonl", log_every_n_steps=3))
    assert logger.run_path == tmp_path / "a" / "b.jsonl"
    assert steps(logger.run_path) == [3, 6]
    assert sum(line["scope"] == "epoch" for line in lines(logger.run_path)) == 4


def test_the_cadence_can_be_overridden(tmp_path: Path) -> None:
    class PowersOfTwo(JSONLinesLogger):
        def is_due(self, global_step: int) -> bool:
            return global_step.bit_count() == 1

    logger, _, _ = fit(tmp_path, logger=PowersOfTwo())
    assert steps(logger.run_path) == [1, 2, 4, 8]


def test_what_other_callbacks_log_is_written_under_its_name_or_one_that_is_free(tmp_path: Path) -> None:
    class Monitors:
        def on_train_start(self, trainer: Trainer, event: Any) -> None:
            trainer.log_now({"step": torch.tensor(7), "bad": float("nan"), "worse": torch.tensor(-torch.inf)})

    logger, _, _ = fit(tmp_path, Monitors())
    expected = {"stage": "train", "scope": "monitor", "step": 0, "epoch": 0, "logged/step": 7.0, "bad": "nan", "worse": "-inf"}
    assert untimed(logger.run_path)[0] == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.1, torch.tensor(1e-40), 2**60])
def test_numbers_come_back(value: Any) -> None:
    back = float(json.loads(json.dumps(number(value), allow_nan=False)))
    assert back == float(value) or (back != back and value != value)


def test_each_line_is_there_as_a_whole_when_it_is_logged(tmp_path: Path) -> None:
    """What ``tail -f`` sees, between any two batches."""
    seen: list[int] = []
    reader = SimpleNamespace(
        on_train_batch_start=lambda trainer, event: seen.append(len(lines(trainer.callbacks[0].run_path))),
    )
    fit(tmp_path, reader, max_epochs=1)
    assert seen == [0, 1, 2, 3]


# ------------------------------------------------------------------ one file a run


def test_each_run_has_a_file_of_its_own(tmp_path: Path) -> None:
    logger, _, trainer = fit(tmp_path)
    first = logger.run_path.read_bytes()
    trainer.fit(Model(), BATCHES)
    assert logger.run_path.name == "metrics-1.jsonl"
    assert fit(tmp_path)[0].run_path.name == "metrics-2.jsonl"
    assert (tmp_path / "metrics.jsonl").read_bytes() == first


def test_an_evaluation_goes_on_in_the_fits_file_or_has_one_of_its_own(tmp_path: Path) -> None:
    logger, model, trainer = fit(tmp_path, max_epochs=1)
    before = untimed(logger.run_path)
    trainer.validate(model, BATCHES[1:2])
    added = {"stage": "validation", "scope": "epoch", "step": 4, "epoch": 1, "val": 2.0}
    assert untimed(tmp_path / "metrics.jsonl") == [*before, added]
    alone = JSONLinesLogger()
    Trainer(max_epochs=1, device="cpu", default_callbacks=False, callbacks=[alone], default_root_dir=tmp_path).validate(
        Model(), BATCHES[:1]
    )
    assert alone.run_path == tmp_path / "metrics-1.jsonl" and lines(alone.run_path)[0]["val"] == 1.0


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    whole, _, _ = fit(tmp_path / "whole", max_epochs=3)
    root = tmp_path / "crashed"
    before, _, _ = fit(root, fails_at=7, max_epochs=3)
    assert steps(before.run_path) == [1, 2, 3, 4, 5, 6]
    again, _, _ = fit(root, fails_at=11, max_epochs=3, ckpt_path=root / "epoch_0.ckpt")
    assert steps(again.run_path) == list(range(1, 11))
    after, _, _ = fit(root, max_epochs=3, ckpt_path=root / "epoch_1.ckpt")
    assert after.run_path == before.run_path == root / "metrics.jsonl"
    assert untimed(after.run_path) == untimed(whole.run_path)


def test_a_tree_that_was_moved_is_gone_on_with(tmp_path: Path) -> None:
    fit(tmp_path / "here", fails_at=7)
    shutil.move(tmp_path / "here", tmp_path / "there")
    logger, _, _ = fit(tmp_path / "there", ckpt_path=tmp_path / "there" / "epoch_0.ckpt")
    assert steps(tmp_path / "there" / "metrics.jsonl") == list(range(1, 9))
    assert not (tmp_path / "here").exists() and logger.run_path.parent == tmp_path / "there"


def test_a_file_that_has_gone_is_begun_anew(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path, fails_at=7)
    logger.run_path.unlink()
    logger, _, _ = fit(tmp_path, ckpt_path=tmp_path / "epoch_0.ckpt")
    assert steps(logger.run_path) == [5, 6, 7, 8]


def test_a_file_shorter_than_the_checkpoint_says_is_gone_on_with_at_its_end(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path, fails_at=7)
    first = logger.run_path.read_text().splitlines(keepends=True)[0]
    logger.run_path.write_text(first)
    logger, _, _ = fit(tmp_path, ckpt_path=tmp_path / "epoch_0.ckpt")
    assert steps(logger.run_path) == [1, 5, 6, 7, 8]


# ------------------------------------------------------------------ what goes wrong


def test_a_full_disk_costs_one_warning_and_leaves_whole_lines(tmp_path: Path) -> None:
    """The disk is full in the middle of a line: of a file whose size is limited, so that nobody has to mount anything."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "metrics.jsonl"

    class Limits:
        def on_train_start(self, trainer: Trainer, event: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (250, before[1]))

        def on_train_end(self, trainer: Trainer, event: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    logger = JSONLinesLogger(path, log_every_n_steps=1)
    trainer = Trainer(max_epochs=5, device="cpu", default_callbacks=False, callbacks=[logger, Limits()])
    model = Model()
    try:
        with pytest.warns(UserWarning, match=r"JSONLinesLogger has stopped writing: .*metrics\.jsonl") as caught:
            trainer.fit(model, BATCHES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(caught) == 1 and trainer.global_step == 20
    assert path.stat().st_size == 250 and not path.read_text().endswith("\n")

    trainer.validate(model, BATCHES[:1])
    written = lines(path)
    assert [line["step"] for line in written] == [1, 2, 20], "what was torn is gone before the next line comes"
    assert [line["loss_step"] for line in written[:2]] == model.kept[:2]


def test_a_file_that_vanishes_costs_one_warning(tmp_path: Path) -> None:
    class Removes:
        def on_train_epoch_start(self, trainer: Trainer, event: Any) -> None:
            (tmp_path / "metrics.jsonl").unlink(missing_ok=True)

    with pytest.warns(UserWarning, match="JSONLinesLogger has stopped writing: .* The run goes on") as caught:
        _, _, trainer = fit(tmp_path, Removes())
    assert len(caught) == 1 and trainer.global_step == 8
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_file_that_cannot_be_made_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    logger = JSONLinesLogger(tmp_path / "file" / "metrics.jsonl")
    trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False, callbacks=[logger])
    model = Model()
    for run in (trainer.fit, trainer.validate):
        with pytest.raises(MisconfigurationError, match=r"JSONLinesLogger cannot write to .* Give a path that can be"):
            run(model, BATCHES)
    assert model.kept == []


def test_an_error_leaves_what_was_logged_and_no_open_file(tmp_path: Path) -> None:
    logger, model, _ = fit(tmp_path, fails_at=3)
    assert [line["loss_step"] for line in lines(logger.run_path)] == model.kept[:2]
    assert logger._file is None


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path, fast_dev_run=2)
    assert logger.run_path is None and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cadence", [0, 1.5, True])
def test_a_bad_cadence_is_refused(cadence: Any) -> None:
    with pytest.raises(MisconfigurationError, match=r"JSONLinesLogger\(log_every_n_steps="):
        JSONLinesLogger(log_every_n_steps=cadence)


# ------------------------------------------------------------------ the files beneath


def test_new_files_are_numbered(tmp_path: Path) -> None:
    made = [runs.new_file(tmp_path / "deep" / "name.tar.gz").name for _ in range(3)]
    assert made == ["name.tar.gz", "name.tar-1.gz", "name.tar-2.gz"]


@pytest.mark.parametrize(("position", "left"), [(None, b"abcdef+"), (0, b"+"), (4, b"abcd+"), (99, b"abcdef+")])
def test_a_run_file_goes_on_at_a_position(tmp_path: Path, position: int | None, left: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abcdef")
    file = runs.RunFile(path, "test", position)
    assert file.position == len(left) - 1
    file.write(b"+")
    file.close()
    file.close()
    assert path.read_bytes() == left and file.position == len(left)


def test_a_path_is_kept_relative_to_the_root_it_lies_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs.portable(tmp_path / "a" / "b", ".") == "a/b"
    assert runs.portable(Path("a/b"), "a") == "b"
    assert runs.portable(Path("a"), str(tmp_path / "elsewhere")) == (tmp_path / "a").as_posix()
    assert runs.portable(None, ".") is None
