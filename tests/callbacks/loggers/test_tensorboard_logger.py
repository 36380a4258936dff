"""TensorBoardLogger writes each logged value once, to a directory for each run: event files are read back."""

from __future__ import annotations

import os
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eventtrain import MisconfigurationError, Trainer
from eventtrain.callbacks import GradientAccumulation, LRSchedulerStepping, TensorBoardLogger
from eventtrain.callbacks.loggers import tensorboard_logger
from tests.callbacks.loggers.logged import BATCHES, Drawn, Model, fit, numbered, points, read, single
from tests.kit import On, local, new_trainer

# ------------------------------------------------------------------ scalars


def test_every_step_has_its_loss(tmp_path: Path) -> None:
    logger, model, _ = fit(tmp_path)
    assert points(logger, "loss") == numbered(model.losses) and len(model.losses) == 8


def test_every_epoch_has_its_values(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path)
    assert points(logger, "size") == [(4, 14.0), (8, 14.0)]
    assert points(logger, "val") == [(4, 1.0), (8, 1.0)]
    assert points(logger, "epoch") == [(4, 0.0), (8, 1.0)]


def test_values_that_other_callbacks_log_are_written(tmp_path: Path) -> None:
    def log(trainer: Trainer, event: Any) -> None:
        trainer.log_on_step({"on step": event.global_step * 10})
        if event.global_step == 3:
            trainer.log_now({"now": torch.tensor(7.0)})

    logger, _, _ = fit(tmp_path, On(after_update=log), logger={"log_every_n_steps": 4})
    assert points(logger, "on step") == [(4, 40.0), (8, 80.0)]
    assert points(logger, "now") == [(3, 7.0)], "at any cadence"


def test_updates_are_written_at_the_cadence(tmp_path: Path) -> None:
    logger, model, _ = fit(tmp_path, GradientAccumulation(2), logger={"log_every_n_steps": 2}, max_epochs=3)
    # The value of an update is the one of the batch that closed its window: of the fourth, eighth and twelfth batch.
    assert points(logger, "loss") == [(2, single(model.losses[3])), (4, single(model.losses[7])), (6, single(model.losses[11]))]


def test_the_cadence_can_be_overridden(tmp_path: Path) -> None:
    class PowersOfTwo(TensorBoardLogger):
        def is_due(self, global_step: int) -> bool:
            return global_step.bit_count() == 1

    logger = PowersOfTwo(tmp_path)
    new_trainer(logger, LRSchedulerStepping(), max_epochs=2).fit(Model(), BATCHES)
    assert [step for step, _ in points(logger, "loss")] == [1, 2, 4, 8]


# ------------------------------------------------------------------ the x-axis


@pytest.mark.parametrize(("axis", "expected"), [("batches", [2, 4, 6, 8]), ("samples", [8, 14, 22, 28])])
def test_the_x_axis_can_be_chosen(tmp_path: Path, axis: str, expected: list[int]) -> None:
    logger, _, trainer = fit(tmp_path, GradientAccumulation(2), logger={"x_axis": axis})
    assert [x for x, _ in points(logger, "loss")] == expected
    assert [x for x, _ in points(logger, "val")] == expected[1::2]
    assert logger.on_train_batch_start not in trainer.signals.train_batch_start.listeners, "idle after the run"


class Clock:
    """A clock for the logger. Each batch advances it by 0.75 s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(tensorboard_logger, "time", SimpleNamespace(monotonic=lambda: self.now))

    def on_train_batch_end(self, trainer: Trainer, event: Any) -> None:
        self.now += 0.75


def test_wall_time_counts_whole_seconds_and_continues_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    options: dict[str, Any] = {"logger": {"x_axis": "wall_time"}}
    logger, _, _ = fit(tmp_path, clock, fails_at=6, **options)
    assert [x for x, _ in points(logger, "loss")] == [0, 1, 2, 3, 3]
    clock.now += 1000  # the machine was down
    logger, _, _ = fit(tmp_path, clock, ckpt_path=tmp_path / "epoch_0.ckpt", **options)
    # The checkpoint was written at second 3.0. The first value of the fifth update has the same second, and is cut off.
    assert [x for x, _ in points(logger, "loss")] == [0, 1, 2, 3, 3, 4, 5, 6]


def test_with_several_optimizers_a_batch_is_one_step(tmp_path: Path) -> None:
    logger, model, _ = fit(tmp_path, model=Model(optimizers=2), max_epochs=1)
    assert points(logger, "loss") == numbered(model.losses)


def test_values_on_the_x_axis_never_fall(tmp_path: Path) -> None:
    """Even if a trainer whose counters are at zero evaluates into the directory."""
    logger, model, _ = fit(tmp_path)
    new_trainer(logger, default_root_dir=tmp_path).validate(model, BATCHES[1:2])
    assert points(logger, "val") == [(4, 1.0), (8, 1.0), (8, 2.0)]
    accumulated = read(logger)
    for tag in accumulated.Tags()["scalars"]:
        assert all(a.step <= b.step for a, b in pairwise(accumulated.Scalars(tag)))


# ------------------------------------------------------------------ the directory of a run


def test_each_run_has_a_new_directory(tmp_path: Path) -> None:
    directories = [fit(tmp_path, max_epochs=1)[0].run_dir for _ in range(2)]
    assert directories == [tmp_path / "runs" / "Model" / f"version_{i}" for i in range(2)]
    logger, _, _ = fit(tmp_path, max_epochs=1, logger={"log_dir": "logs", "name": "named"})
    assert logger.run_dir == tmp_path / "logs" / "named" / "version_0"


def test_a_second_fit_is_another_run_and_an_evaluation_continues_the_last_one(tmp_path: Path) -> None:
    logger, model, trainer = fit(tmp_path, max_epochs=1)
    first = logger.run_dir
    trainer.validate(model, BATCHES[1:2])
    assert logger.run_dir == first and points(logger, "val") == [(4, 1.0), (4, 2.0)]
    trainer.fit(model, BATCHES)
    assert logger.run_dir.name == "version_1"


def test_an_evaluation_without_a_fit_is_a_run(tmp_path: Path) -> None:
    logger = TensorBoardLogger()
    new_trainer(logger, default_root_dir=tmp_path).validate(Model(), BATCHES)
    ((step, mean),) = points(logger, "val")
    assert step == 0 and mean == pytest.approx(32 / 14)


def test_a_program_may_change_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    logger = TensorBoardLogger(log_every_n_steps=1)
    wander = On(train_start=lambda trainer, event: os.chdir(tmp_path / "elsewhere"))
    new_trainer(logger, wander, LRSchedulerStepping(), max_epochs=2).fit(Model(), BATCHES)
    os.chdir(tmp_path)
    assert len(points(logger, "loss")) == 8


# ------------------------------------------------------------------ resume


@pytest.mark.parametrize("axis", ["global_step", "batches", "samples"])
def test_a_resumed_run_has_each_step_once(tmp_path: Path, axis: str) -> None:
    options: dict[str, Any] = {"logger": {"x_axis": axis, "histograms": 1}, "max_epochs": 3}
    whole, model, _ = fit(tmp_path / "whole", **options)

    root = tmp_path / "crashed"
    before, _, _ = fit(root, fails_at=7, **options)
    assert len(points(before, "loss")) == 6
    after, _, _ = fit(root, ckpt_path=root / "epoch_0.ckpt", **options)
    assert after.run_dir == before.run_dir
    for tag in ("loss", "size", "val", "epoch"):
        assert points(after, tag) == points(whole, tag)
    assert [value for _, value in points(after, "loss")] == [single(loss) for loss in model.losses]
    (name, *_) = read(whole).Tags()["histograms"]
    steps = [event.step for event in read(whole).Histograms(name)]
    assert [event.step for event in read(after).Histograms(name)] == steps and len(steps) == 12


def test_a_run_can_be_resumed_twice(tmp_path: Path) -> None:
    whole, _, _ = fit(tmp_path / "whole", max_epochs=3)
    root = tmp_path / "crashed"
    fit(root, fails_at=7, max_epochs=3)
    fit(root, fails_at=11, max_epochs=3, ckpt_path=root / "epoch_0.ckpt")
    logger, _, _ = fit(root, max_epochs=3, ckpt_path=root / "epoch_1.ckpt")
    assert points(logger, "loss") == points(whole, "loss")
    assert logger.run_dir.name == "version_0"


def test_an_evaluation_after_a_resumed_fit_purges_nothing(tmp_path: Path) -> None:
    """Not even if the counters of the trainer are at zero."""
    fit(tmp_path, fails_at=7)
    logger, model, _ = fit(tmp_path, ckpt_path=tmp_path / "epoch_0.ckpt")
    new_trainer(logger, default_root_dir=tmp_path).validate(model, BATCHES[1:2])
    assert points(logger, "val") == [(4, 1.0), (8, 1.0), (8, 2.0)]


def test_a_run_can_be_resumed_in_a_tree_that_was_moved(tmp_path: Path) -> None:
    fit(tmp_path / "here", fails_at=7)
    shutil.move(tmp_path / "here", tmp_path / "there")
    logger, _, _ = fit(tmp_path / "there", ckpt_path=tmp_path / "there" / "epoch_0.ckpt")
    assert logger.run_dir == tmp_path / "there" / "runs" / "Model" / "version_0"
    assert [step for step, _ in points(logger, "loss")] == list(range(1, 9))
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("options", [{"resume": "new"}, {"x_axis": "batches"}])
def test_a_resumed_run_can_begin_a_new_directory(tmp_path: Path, options: dict[str, Any]) -> None:
    before, _, _ = fit(tmp_path, fails_at=7)
    logger, _, _ = fit(tmp_path, ckpt_path=tmp_path / "epoch_0.ckpt", logger=options)
    assert logger.run_dir.name == "version_1"
    assert [step for step, _ in points(logger, "loss")] == [5, 6, 7, 8]
    assert len(points(before, "loss")) == 6, "the old values stay"


def test_a_resumed_run_begins_a_new_directory_if_the_old_one_is_gone(tmp_path: Path) -> None:
    before, _, _ = fit(tmp_path, fails_at=7)
    local(before.run_dir).rename(tmp_path / "moved")
    logger, _, _ = fit(tmp_path, ckpt_path=tmp_path / "epoch_0.ckpt")
    assert [step for step, _ in points(logger, "loss")] == [5, 6, 7, 8]


def test_a_writer_used_before_the_checkpoint_was_read_is_replaced(tmp_path: Path) -> None:
    class Eager(Model):
        def configure_optimizers(self) -> Any:
            self.trainer.callback(TensorBoardLogger).writer.add_text("early", "bird")
            return super().configure_optimizers()

    before, _, _ = fit(tmp_path, fails_at=7)
    logger, _, _ = fit(tmp_path, model=Eager(), ckpt_path=tmp_path / "epoch_0.ckpt")
    assert logger.run_dir == before.run_dir
    assert [step for step, _ in points(logger, "loss")] == list(range(1, 9))


def test_values_after_the_checkpoint_are_cut_off_even_at_its_step(tmp_path: Path) -> None:
    """Validations in an open window share a step with earlier values, and a run that was killed twice leaves two files."""

    def save(trainer: Trainer, event: Any) -> None:
        if trainer.total_batch_idx == 1:
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    def kill(trainer: Trainer, event: Any) -> None:
        if trainer.total_batch_idx == 4:
            raise RuntimeError("killed")

    class Logs(Model):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("batch", float(self.trainer.total_batch_idx))

    def run(*more: Any, ckpt_path: Any = None) -> TensorBoardLogger:
        logger = TensorBoardLogger(tmp_path / "runs", log_every_n_steps=1)
        trainer = new_trainer(GradientAccumulation(4), LRSchedulerStepping(), logger, *more, val_check_interval=1)
        trainer.fit(Logs(), BATCHES[:1] * 8, BATCHES[:1], ckpt_path=ckpt_path)
        return logger

    with pytest.raises(RuntimeError, match="killed"):
        run(On(take_checkpoint=save), On(train_batch_start=kill))
    with pytest.raises(RuntimeError, match="killed"):
        run(On(train_batch_start=kill), ckpt_path=tmp_path / "a.ckpt")
    assert [value for _, value in points(run(ckpt_path=tmp_path / "a.ckpt"), "batch")] == [float(n) for n in range(8)]


# ------------------------------------------------------------------ dry runs and bad arguments


def test_a_dry_run_writes_nothing_and_takes_everything(tmp_path: Path) -> None:
    class Draws(Drawn):
        def on_train_epoch_end(self) -> None:
            self.logger.experiment.add_image("picture", torch.zeros(1, 4, 4), 0)

    logger, _, _ = fit(tmp_path, model=Draws(), fast_dev_run=2, logger={"histograms": 1, "log_graph": True})
    assert not logger.run_dir.exists() and list(tmp_path.iterdir()) == []


def test_there_is_no_writer_before_a_run() -> None:
    for attribute in ("writer", "run_dir"):
        with pytest.raises(MisconfigurationError, match="no run has begun"):
            getattr(TensorBoardLogger(), attribute)


@pytest.mark.parametrize(
    "options",
    [
        {"x_axis": "epochs"},
        {"log_every_n_steps": 0},
        {"log_every_n_steps": 1.5},
        {"histograms": 0},
        {"histograms": True},
        {"resume": "old"},
    ],
)
def test_bad_options_are_refused(options: Any) -> None:
    with pytest.raises(MisconfigurationError, match=f"TensorBoardLogger\\({next(iter(options))}="):
        TensorBoardLogger(**options)
