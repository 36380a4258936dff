"""JSONLinesLogger writes each logged record once, as a whole line of valid JSON."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eventtrain import MisconfigurationError, Trainer
from eventtrain.callbacks.loggers.json_lines_logger import JSONLinesLogger, number
from tests.callbacks.loggers.logged import run
from tests.kit import Line, On, new_trainer

BATCHES = [torch.full((2, 1), float(x)) for x in (1, 2, 3, 4)]


class Model(Line):
    """Records its losses, and logs the mean of each validation batch."""

    def __init__(self) -> None:
        super().__init__(lr=0.01, on_step=True, on_epoch=True)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", batch.mean())


def fit(root: Path, *callbacks: Any, logger: JSONLinesLogger | None = None, **options: Any) -> Any:
    """Train with a JSONLinesLogger, which writes every step if none is given; return it, the module and the trainer."""
    logger = logger or JSONLinesLogger(log_every_n_steps=1)
    torch.manual_seed(0)
    model = Model()
    return logger, model, run(root, model, BATCHES, logger, *callbacks, **options)


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


def test_there_is_a_line_for_each_logged_record(tmp_path: Path) -> None:
    before = time.time()
    logger, model, _ = fit(tmp_path, max_epochs=1)
    assert logger.run_path == tmp_path / "metrics.jsonl"
    train = {"stage": "train", "epoch": 0}
    means = {"loss_epoch": pytest.approx(sum(model.losses) / 4)}
    assert untimed(logger.run_path) == [
        *({**train, "scope": "step", "step": i, "loss_step": loss} for i, loss in enumerate(model.losses, 1)),
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


def test_values_that_other_callbacks_log_are_written_under_free_names(tmp_path: Path) -> None:
    def log(trainer: Trainer, event: Any) -> None:
        trainer.log_now({"step": torch.tensor(7), "bad": float("nan"), "worse": torch.tensor(-torch.inf)})

    logger, _, _ = fit(tmp_path, On(train_start=log))
    expected = {"stage": "train", "scope": "monitor", "step": 0, "epoch": 0, "logged/step": 7.0, "bad": "nan", "worse": "-inf"}
    assert untimed(logger.run_path)[0] == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.1, torch.tensor(1e-40), 2**60])
def test_numbers_come_back(value: Any) -> None:
    back = float(json.loads(json.dumps(number(value), allow_nan=False)))
    assert back == float(value) or (back != back and value != value)


def test_each_line_is_written_at_once_and_as_a_whole(tmp_path: Path) -> None:
    """``tail -f`` sees whole lines between any two batches."""
    seen: list[int] = []
    reader = On(train_batch_start=lambda trainer, event: seen.append(len(lines(trainer.callbacks[0].run_path))))
    fit(tmp_path, reader, max_epochs=1)
    assert seen == [0, 1, 2, 3]


# ------------------------------------------------------------------ one file for each run


def test_each_run_has_a_new_file(tmp_path: Path) -> None:
    logger, _, trainer = fit(tmp_path)
    first = logger.run_path.read_bytes()
    trainer.fit(Model(), BATCHES)
    assert logger.run_path.name == "metrics-1.jsonl"
    assert fit(tmp_path)[0].run_path.name == "metrics-2.jsonl"
    assert (tmp_path / "metrics.jsonl").read_bytes() == first


def test_an_evaluation_continues_the_file_of_the_fit_or_has_a_new_one(tmp_path: Path) -> None:
    logger, model, trainer = fit(tmp_path, max_epochs=1)
    before = untimed(logger.run_path)
    trainer.validate(model, BATCHES[1:2])
    added = {"stage": "validation", "scope": "epoch", "step": 4, "epoch": 1, "val": 2.0}
    assert untimed(tmp_path / "metrics.jsonl") == [*before, added]
    other = JSONLinesLogger()
    new_trainer(other, default_root_dir=tmp_path).validate(Model(), BATCHES[:1])
    assert other.run_path == tmp_path / "metrics-1.jsonl" and lines(other.run_path)[0]["val"] == 1.0


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


def test_a_run_can_be_resumed_in_a_tree_that_was_moved(tmp_path: Path) -> None:
    fit(tmp_path / "here", fails_at=7)
    shutil.move(tmp_path / "here", tmp_path / "there")
    logger, _, _ = fit(tmp_path / "there", ckpt_path=tmp_path / "there" / "epoch_0.ckpt")
    assert steps(tmp_path / "there" / "metrics.jsonl") == list(range(1, 9))
    assert not (tmp_path / "here").exists() and logger.run_path.parent == tmp_path / "there"


def test_a_resumed_run_begins_a_new_file_if_the_old_one_is_gone(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path, fails_at=7)
    logger.run_path.unlink()
    logger, _, _ = fit(tmp_path, ckpt_path=tmp_path / "epoch_0.ckpt")
    assert steps(logger.run_path) == [5, 6, 7, 8]


def test_a_file_shorter_than_at_the_checkpoint_is_continued_at_its_end(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path, fails_at=7)
    first = logger.run_path.read_text().splitlines(keepends=True)[0]
    logger.run_path.write_text(first)
    logger, _, _ = fit(tmp_path, ckpt_path=tmp_path / "epoch_0.ckpt")
    assert steps(logger.run_path) == [1, 5, 6, 7, 8]


# ------------------------------------------------------------------ failures


def test_a_full_disk_costs_one_warning_and_leaves_whole_lines(tmp_path: Path) -> None:
    """The disk is full in the middle of a line. A limit on the size of files stands in for it, so that no mount is needed."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "metrics.jsonl"

    limits = On(
        train_start=lambda trainer, event: resource.setrlimit(resource.RLIMIT_FSIZE, (250, before[1])),
        train_end=lambda trainer, event: resource.setrlimit(resource.RLIMIT_FSIZE, before),
    )
    logger = JSONLinesLogger(path, log_every_n_steps=1)
    trainer = new_trainer(logger, limits, max_epochs=5)
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
    assert [line["step"] for line in written] == [1, 2, 20], "the torn line is cut off before the next one"
    assert [line["loss_step"] for line in written[:2]] == model.losses[:2]


def test_a_file_that_vanishes_costs_one_warning(tmp_path: Path) -> None:
    remove = On(train_epoch_start=lambda trainer, event: (tmp_path / "metrics.jsonl").unlink(missing_ok=True))
    with pytest.warns(UserWarning, match="JSONLinesLogger has stopped writing: .* The run continues") as caught:
        _, _, trainer = fit(tmp_path, remove)
    assert len(caught) == 1 and trainer.global_step == 8
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_file_that_cannot_be_made_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    logger = JSONLinesLogger(tmp_path / "file" / "metrics.jsonl")
    trainer = new_trainer(logger)
    model = Model()
    for stage in (trainer.fit, trainer.validate):
        with pytest.raises(MisconfigurationError, match=r"JSONLinesLogger cannot write to .* Give a path that can be"):
            stage(model, BATCHES)
    assert model.losses == []


def test_an_error_leaves_the_logged_lines_and_no_open_file(tmp_path: Path) -> None:
    logger, model, _ = fit(tmp_path, fails_at=3)
    assert [line["loss_step"] for line in lines(logger.run_path)] == model.losses[:2]
    assert logger._file is None


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path, fast_dev_run=2)
    assert logger.run_path is None and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cadence", [0, 1.5, True])
def test_a_bad_cadence_is_refused(cadence: Any) -> None:
    with pytest.raises(MisconfigurationError, match=r"JSONLinesLogger\(log_every_n_steps="):
        JSONLinesLogger(log_every_n_steps=cadence)
