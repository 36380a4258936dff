"""What TensorBoard shows is what the run logged: event files read back, and its server asked."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from eventtrain import Callback, LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import (
    GradientAccumulation,
    GradientClipping,
    LRSchedulerStepping,
    TensorBoardLogger,
)
from eventtrain.callbacks.loggers import run_files as runs
from eventtrain.callbacks.loggers import tensorboard_logger

BATCHES = [torch.full((size, 2), float(i + 1)) for i, size in enumerate((4, 4, 4, 2))]
EVERYTHING = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}


class Model(LightningModule):
    def __init__(self, optimizers: int = 1, rate: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.rate = rate
        self.layers = nn.ModuleList(nn.Linear(2, 1) for _ in range(optimizers))
        self.automatic_optimization = optimizers == 1
        self.kept: list[float] = []

    def forward(self, batch: Tensor) -> Tensor:
        return torch.cat([layer(batch) for layer in self.layers])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = sum(layer(batch).pow(2).mean() for layer in self.layers)
        self.kept.append(float(loss.detach()))
        self.log("loss", loss)
        self.log("size", float(len(batch)), on_step=False, on_epoch=True, reduce_fx="sum")
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", batch.mean())

    def configure_optimizers(self) -> Any:
        if not self.automatic_optimization:
            return [torch.optim.SGD(layer.parameters(), lr=self.rate / (i + 1)) for i, layer in enumerate(self.layers)]
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Crash(RuntimeError):
    pass


def fit(
    root: Path,
    *callbacks: Any,
    model: Model | None = None,
    fails_at: int | None = None,
    saves: bool = True,
    **options: Any,
) -> Any:
    """A fit in which each epoch leaves a checkpoint ``epoch_<n>.ckpt`` in the root."""
    logger = TensorBoardLogger(**{"log_every_n_steps": 1, **options.pop("logger", {})})
    ckpt_path = options.pop("ckpt_path", None)
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, **options}
    callbacks = (logger, *callbacks, LRSchedulerStepping())
    trainer = Trainer(device="cpu", default_callbacks=False, callbacks=callbacks, default_root_dir=root, **options)
    model = model or Model()

    def fail(trainer: Trainer, event: Any) -> None:
        if event.global_step == fails_at:
            raise Crash("at the worst moment")

    def save(trainer: Trainer, event: Any) -> None:
        if event.epoch_end and saves and not trainer.fast_dev_run:
            trainer.save_checkpoint(root / f"epoch_{trainer.current_epoch}.ckpt")

    trainer.signals.after_update.connect(fail)
    trainer.signals.safe_point.connect(save)
    if fails_at is None:
        trainer.fit(model, BATCHES, BATCHES[:1], ckpt_path=ckpt_path)
    else:
        with pytest.raises(Crash):
            trainer.fit(model, BATCHES, BATCHES[:1], ckpt_path=ckpt_path)
    return logger, model, trainer


def read(logger: TensorBoardLogger) -> Any:
    # TensorBoard reads the files of a directory one after the other, in the order of their names.
    return EventAccumulator(str(logger.run_dir), size_guidance=EVERYTHING).Reload()


def points(logger: TensorBoardLogger, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(logger).Scalars(tag)]


def texts(logger: TensorBoardLogger, tag: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in read(logger).Tensors(f"{tag}/text_summary")]


def single(value: float) -> float:
    return float(torch.tensor(value))  # event files hold float32


def numbered(values: list[float]) -> list[tuple[int, float]]:
    return [(step, single(value)) for step, value in enumerate(values, 1)]


# ------------------------------------------------------------------ scalars


def test_every_step_has_its_loss(tmp_path: Path) -> None:
    logger, model, _ = fit(tmp_path)
    assert points(logger, "loss") == numbered(model.kept) and len(model.kept) == 8


def test_every_epoch_has_its_values(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path)
    assert points(logger, "size") == [(4, 14.0), (8, 14.0)]
    assert points(logger, "val") == [(4, 1.0), (8, 1.0)]
    assert points(logger, "epoch") == [(4, 0.0), (8, 1.0)]


def test_what_other_callbacks_log_is_written(tmp_path: Path) -> None:
    class Monitors:
        def on_after_update(self, trainer: Trainer, event: Any) -> None:
            trainer.log_on_step({"on step": event.global_step * 10})
            if event.global_step == 3:
                trainer.log_now({"now": torch.tensor(7.0)})

    logger, _, _ = fit(tmp_path, Monitors(), logger={"log_every_n_steps": 4})
    assert points(logger, "on step") == [(4, 40.0), (8, 80.0)]
    assert points(logger, "now") == [(3, 7.0)], "whatever the cadence"


def test_steps_are_updates_and_written_at_the_cadence(tmp_path: Path) -> None:
    logger, model, _ = fit(tmp_path, GradientAccumulation(2), logger={"log_every_n_steps": 2}, max_epochs=3)
    # The value of an update is that of the batch that closed its window: the fourth, eighth and twelfth batch.
    assert points(logger, "loss") == [(2, single(model.kept[3])), (4, single(model.kept[7])), (6, single(model.kept[11]))]


def test_the_cadence_can_be_overridden(tmp_path: Path) -> None:
    class PowersOfTwo(TensorBoardLogger):
        def is_due(self, global_step: int) -> bool:
            return global_step.bit_count() == 1

    logger = PowersOfTwo(tmp_path)
    Trainer(max_epochs=2, device="cpu", default_callbacks=False, callbacks=[logger, LRSchedulerStepping()]).fit(
        Model(), BATCHES
    )
    assert [step for step, _ in points(logger, "loss")] == [1, 2, 4, 8]


# ------------------------------------------------------------------ the x-axis


@pytest.mark.parametrize(("axis", "expected"), [("batches", [2, 4, 6, 8]), ("samples", [8, 14, 22, 28])])
def test_the_x_axis_can_be_chosen(tmp_path: Path, axis: str, expected: list[int]) -> None:
    logger, _, trainer = fit(tmp_path, GradientAccumulation(2), logger={"x_axis": axis})
    assert [x for x, _ in points(logger, "loss")] == expected
    assert [x for x, _ in points(logger, "val")] == expected[1::2]
    assert logger.count_samples not in trainer.signals.train_batch_start.attached(), "counted in this run alone"


class Clock:
    """A clock of the logger's own, which each batch advances by 0.75 s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(tensorboard_logger, "time", SimpleNamespace(monotonic=lambda: self.now))

    def on_train_batch_end(self, trainer: Trainer, event: Any) -> None:
        self.now += 0.75


def test_wall_time_counts_whole_seconds_and_goes_on_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    options: dict[str, Any] = {"logger": {"x_axis": "wall_time"}}
    logger, _, _ = fit(tmp_path, clock, fails_at=6, **options)
    assert [x for x, _ in points(logger, "loss")] == [0, 1, 2, 3, 3]
    clock.now += 1000  # the machine was down
    logger, _, _ = fit(tmp_path, clock, ckpt_path=tmp_path / "epoch_0.ckpt", **options)
    # The checkpoint was written at second 3.0. The fifth update's first value is of the same second, and gone.
    assert [x for x, _ in points(logger, "loss")] == [0, 1, 2, 3, 3, 4, 5, 6]


def test_with_several_optimizers_a_batch_is_one_step(tmp_path: Path) -> None:
    logger, model, _ = fit(tmp_path, model=Model(optimizers=2), max_epochs=1)
    assert points(logger, "loss") == numbered(model.kept)


def test_values_on_the_x_axis_never_fall(tmp_path: Path) -> None:
    """Also where an evaluation of another trainer, whose counters are at zero, goes on in the directory."""
    logger, model, _ = fit(tmp_path)
    other = Trainer(device="cpu", max_epochs=1, default_callbacks=False, callbacks=[logger], default_root_dir=tmp_path)
    other.validate(model, BATCHES[1:2])
    assert points(logger, "val") == [(4, 1.0), (8, 1.0), (8, 2.0)]
    accumulated = read(logger)
    for tag in accumulated.Tags()["scalars"]:
        assert all(a.step <= b.step for a, b in pairwise(accumulated.Scalars(tag)))


# ------------------------------------------------------------------ a run's directory


def test_each_run_has_a_directory_of_its_own(tmp_path: Path) -> None:
    directories = [fit(tmp_path, max_epochs=1)[0].run_dir for _ in range(2)]
    assert directories == [tmp_path / "runs" / "Model" / f"version_{i}" for i in range(2)]
    logger, _, _ = fit(tmp_path, max_epochs=1, logger={"log_dir": "logs", "name": "named"})
    assert logger.run_dir == tmp_path / "logs" / "named" / "version_0"


def test_runs_that_begin_at_once_do_not_share_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes the first free number after it was looked up."""
    looked_up = runs.next_version

    def look_up(parent: Path) -> Path:
        found = looked_up(parent)
        if found.name == "version_0":
            found.mkdir()
        return found

    monkeypatch.setattr(runs, "next_version", look_up)
    assert runs.new_version(tmp_path / "parent") == tmp_path / "parent" / "version_1"


def test_a_second_fit_is_another_run_and_an_evaluation_goes_on_in_the_last(tmp_path: Path) -> None:
    logger, model, trainer = fit(tmp_path, max_epochs=1)
    first = logger.run_dir
    trainer.validate(model, BATCHES[1:2])
    assert logger.run_dir == first and points(logger, "val") == [(4, 1.0), (4, 2.0)]
    trainer.fit(model, BATCHES)
    assert logger.run_dir.name == "version_1"


def test_an_evaluation_alone_is_a_run(tmp_path: Path) -> None:
    logger = TensorBoardLogger()
    trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False, callbacks=[logger], default_root_dir=tmp_path)
    trainer.validate(Model(), BATCHES)
    assert points(logger, "val") == [(0, pytest.approx(32 / 14))]


def test_event_files_are_read_in_the_order_in_which_they_were_begun(tmp_path: Path) -> None:
    """Within one second, and where the clock of the machine before was ahead."""
    (tmp_path / f"events.out.tfevents.{int(time.time()) + 3600}.elsewhere.1").touch()
    names = [set(tmp_path.iterdir())]
    for _ in range(11):
        runs.EventFile(tmp_path, "test").close()
        names.append(set(tmp_path.iterdir()))
    begun = [path for before, after in pairwise(names) for path in after - before]
    assert len(begun) == 11 and sorted(tmp_path.iterdir())[1:] == begun


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
    assert [value for _, value in points(after, "loss")] == [single(loss) for loss in model.kept]
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
    """Not even by a trainer whose counters are at zero."""
    fit(tmp_path, fails_at=7)
    logger, model, _ = fit(tmp_path, ckpt_path=tmp_path / "epoch_0.ckpt")
    other = Trainer(device="cpu", max_epochs=1, default_callbacks=False, callbacks=[logger], default_root_dir=tmp_path)
    other.validate(model, BATCHES[1:2])
    assert points(logger, "val") == [(4, 1.0), (8, 1.0), (8, 2.0)]


def test_a_tree_that_was_moved_is_gone_on_with(tmp_path: Path) -> None:
    fit(tmp_path / "here", fails_at=7)
    shutil.move(tmp_path / "here", tmp_path / "there")
    logger, _, _ = fit(tmp_path / "there", ckpt_path=tmp_path / "there" / "epoch_0.ckpt")
    assert logger.run_dir == tmp_path / "there" / "runs" / "Model" / "version_0"
    assert [step for step, _ in points(logger, "loss")] == list(range(1, 9))
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("options", [{"resume": "new"}, {"x_axis": "batches"}])
def test_a_resumed_run_can_begin_a_directory(tmp_path: Path, options: dict[str, Any]) -> None:
    before, _, _ = fit(tmp_path, fails_at=7)
    logger, _, _ = fit(tmp_path, ckpt_path=tmp_path / "epoch_0.ckpt", logger=options)
    assert logger.run_dir.name == "version_1"
    assert [step for step, _ in points(logger, "loss")] == [5, 6, 7, 8]
    assert len(points(before, "loss")) == 6, "what was there stays"


def test_a_resumed_run_begins_a_directory_where_the_old_one_has_gone(tmp_path: Path) -> None:
    before, _, _ = fit(tmp_path, fails_at=7)
    before.run_dir.rename(tmp_path / "kept")
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


# ------------------------------------------------------------------ hyperparameters, text, graph, pictures


def test_the_hyperparameters_are_written_with_the_run(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path, max_epochs=1)
    assert b"optimizers" in read(logger).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert len(list((tmp_path / "runs" / "Model").iterdir())) == 1, "no run of their own beside it"


def test_hyperparameters_of_any_kind_become_what_the_page_can_show() -> None:
    from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

    given = {"flag": True, "number": 3, "nan": float("nan"), "name": "x", "nested": {"a": 0.5, "b": [1, 2]}, "none": None}
    (value,) = runs.session_start(given).value
    kept = parse_session_start_info_plugin_data(value.metadata.plugin_data.content).hparams
    assert {name: getattr(v, v.WhichOneof("kind")) for name, v in kept.items()} == {
        "flag": True, "number": 3.0, "nan": "nan", "name": "x", "nested/a": 0.5, "nested/b": "[1, 2]", "none": "None",
    }  # fmt: skip


def test_the_run_says_what_it_is(tmp_path: Path) -> None:
    clipping = GradientClipping(0.5)
    logger, model, _ = fit(tmp_path, clipping, max_epochs=1, seed=3)
    (environment,), (configuration,), (module,) = (
        texts(logger, f"run/{part}") for part in ("environment", "configuration", "module")
    )
    assert f"| torch | {torch.__version__} |" in environment and "| device | cpu |" in environment
    assert "| max_epochs | 1 |" in configuration and "| seed | 3 |" in configuration
    assert "| callback 2 | GradientClipping(gradient_clip_algorithm='norm', norm_type=2.0) |" in configuration
    assert "| optimizer 1 | SGD ( Parameter Group 0 " in configuration and "ExponentialLR per step" in configuration
    assert module.startswith("3 parameters, 3 of them trained\n\n    Model(\n      (layers)")


def test_a_table_keeps_what_would_end_its_cells() -> None:
    assert runs.table({"name": "a|b\nc"}).splitlines()[-1] == r"| name | a\|b c |"


def test_a_very_long_module_is_shortened() -> None:
    class Long(LightningModule):
        def __repr__(self) -> str:
            return "x" * 50_000

    text = runs.module_text(Long())
    assert len(text) < 21_000 and text.endswith("... and 30000 characters more")


class Drawn(Model):
    """Its parts tell what tracing did to them: a frozen layer in evaluation mode, a moving average, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.frozen = nn.Dropout().eval()
        self.dropout = nn.Dropout()
        self.example_input_array = torch.rand(3, 2)
        self.training_modes: dict[str, bool] = {}

    def forward(self, batch: Tensor) -> Tensor:
        random.random()
        torch.rand(1)
        return self.dropout(self.layers[0](self.norm(batch)))

    def on_train_start(self) -> None:
        self.training_modes = {name: part.training for name, part in self.named_modules()}


def test_the_graph_is_drawn_and_leaves_no_trace(tmp_path: Path) -> None:
    drawn, plain = Drawn(), Drawn()
    fit(tmp_path, model=plain, max_epochs=1, seed=1)
    left = torch.rand(1), random.random()
    logger, _, _ = fit(tmp_path, model=drawn, max_epochs=1, seed=1, logger={"log_graph": True})
    assert (torch.rand(1), random.random()) == left
    assert drawn.training_modes == plain.training_modes and not drawn.training_modes["frozen"]
    assert torch.equal(drawn.norm.running_mean, torch.zeros(2))
    nodes = {node.name for node in read(logger).Graph().node}
    assert any("BatchNorm1d[norm]" in name for name in nodes) and any("Linear" in name for name in nodes)


def test_the_graph_is_drawn_once_in_a_resumed_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"logger": {"log_graph": True}}
    fit(tmp_path, model=Drawn(), fails_at=7, **options)
    logger, _, _ = fit(tmp_path, model=Drawn(), ckpt_path=tmp_path / "epoch_0.ckpt", **options)
    assert read(logger).Tags()["graph"] and "more than one graph" not in caplog.text


def test_no_graph_is_worth_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Model):
        def forward(self, batch: Tensor) -> Tensor:
            raise RuntimeError("not today")

    broken = Broken()
    with pytest.warns(UserWarning, match=r"No graph of Broken .* no example input\. Set self\.example_input_array"):
        fit(tmp_path, model=broken, max_epochs=1, logger={"log_graph": True})
    broken.example_input_array = torch.rand(3, 2)
    with pytest.warns(UserWarning, match="No graph of Broken .* could not be traced: RuntimeError: not today"):
        fit(tmp_path, model=broken, max_epochs=1, logger={"log_graph": True})
    assert broken.training and capsys.readouterr().out == ""


def test_the_writer_takes_pictures_and_text(tmp_path: Path) -> None:
    class Draws(Model):
        def on_train_epoch_end(self) -> None:
            self.logger.experiment.add_image("picture", torch.zeros(1, 4, 4), self.global_step)
            self.trainer.callback(TensorBoardLogger).writer.add_text("text", "hello", self.global_step)

    logger, _, _ = fit(tmp_path, model=Draws())
    assert [image.step for image in read(logger).Images("picture")] == [4, 8]
    assert texts(logger, "text") == ["hello", "hello"]


# ------------------------------------------------------------------ histograms


class Gradients:
    """The gradients of each update as they were, and the weights after it."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.weights: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, event: Any) -> None:
        self.gradients.append(trainer.module.layers[0].weight.grad.clone())

    def on_after_update(self, trainer: Trainer, event: Any) -> None:
        self.weights.append(trainer.module.layers[0].weight.detach().clone())


def summary(values: Tensor) -> tuple[float, float, int, float]:
    doubles = values.double()
    return float(doubles.min()), float(doubles.max()), doubles.numel(), pytest.approx(float(doubles.sum()))


def histograms(logger: TensorBoardLogger, tag: str) -> dict[int, tuple[float, float, int, float]]:
    found = {event.step: event.histogram_value for event in read(logger).Histograms(tag)}
    return {step: (value.min, value.max, int(value.num), value.sum) for step, value in found.items()}


def test_histograms_hold_the_weights_and_the_true_gradients(tmp_path: Path) -> None:
    kept = Gradients()
    logger, _, trainer = fit(tmp_path, kept, GradientClipping(1e-3), logger={"histograms": 3})
    assert histograms(logger, "gradients/layers.0.weight") == {step: summary(kept.gradients[step - 1]) for step in (3, 6)}
    assert histograms(logger, "parameters/layers.0.weight") == {step: summary(kept.weights[step - 1]) for step in (3, 6)}
    assert float(kept.gradients[2].abs().max()) > 1e-2, "far over what clipping left"
    tags = {f"{kind}/layers.0.{name}" for kind in ("parameters", "gradients") for name in ("weight", "bias")}
    assert set(read(logger).Tags()["histograms"]) == tags
    assert logger.keep_gradients not in trainer.signals.before_optimizer_step.attached()
    assert logger.write_histograms not in trainer.signals.after_update.attached()


def test_nothing_listens_for_histograms_that_nobody_asked_for(tmp_path: Path) -> None:
    class Listens:
        def on_train_start(self, trainer: Trainer, event: Any) -> None:
            assert trainer.signals.before_optimizer_step.listeners == ()

    fit(tmp_path, Listens(), max_epochs=1)


def test_a_vetoed_update_has_no_histogram_and_the_next_has_its_own(tmp_path: Path) -> None:
    class Vetoes(Gradients):
        def on_before_optimizer_step(self, trainer: Trainer, event: Any) -> None:
            super().on_before_optimizer_step(trainer, event)
            if trainer.batch_idx == 1:
                event.skip("not this one")

    kept = Vetoes()
    logger, _, _ = fit(tmp_path, kept, max_epochs=1, logger={"histograms": 2})
    assert histograms(logger, "gradients/layers.0.weight") == {2: summary(kept.gradients[2])}, "the third batch's"


def test_histograms_of_several_optimizers(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path, model=Model(optimizers=2), max_epochs=1, logger={"histograms": 2})
    for layer in (0, 1):
        assert list(histograms(logger, f"gradients/layers.{layer}.weight")) == [2, 4]


def test_an_optimizer_that_did_not_step_has_no_histogram_of_gradients(tmp_path: Path) -> None:
    class Alternates(Model):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for index, optimizer in enumerate(self.optimizers()):
                if index == 0 or batch_idx < 2:
                    optimizer.zero_grad()
                    self.manual_backward(self.layers[index](batch).pow(2).mean())
                    optimizer.step()

    logger, _, _ = fit(tmp_path, model=Alternates(optimizers=2), max_epochs=1, logger={"histograms": 2})
    steps = {layer: list(histograms(logger, f"gradients/layers.{layer}.weight")) for layer in (0, 1)}
    assert steps == {0: [2, 4], 1: [2]}


def test_histograms_leave_out_what_is_not_finite() -> None:
    values = torch.tensor([1.0, float("inf"), float("nan"), -2.0], dtype=torch.float16)
    assert torch.equal(tensorboard_logger.finite_values(values), torch.tensor([1.0, -2.0]))
    assert tensorboard_logger.finite_values(torch.full((2,), float("nan"))).numel() == 0
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([2.0, 3.0]), (4,), check_invariants=True)
    assert torch.equal(tensorboard_logger.finite_values(sparse), torch.tensor([5.0]))


# ------------------------------------------------------------------ buffers, and what goes wrong with files


def test_values_are_held_back_and_on_disk_after_each_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "FLUSH_INTERVAL", 1e9)
    seen: list[list[int]] = []

    class Reads:
        def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
            written = read(trainer.callback(TensorBoardLogger))
            seen.append([e.step for e in written.Scalars("loss")] if "loss" in written.Tags()["scalars"] else [])

    fit(tmp_path, Reads())
    assert seen == [[]] * 4 + [[1, 2, 3, 4]] * 4


def test_a_long_epoch_is_flushed_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "FLUSH_INTERVAL", -1.0)  # it has always been longer ago
    seen: list[int] = []
    fit(tmp_path, SimpleNamespace(on_safe_point=lambda trainer, event: seen.append(len(points(trainer.callbacks[0], "loss")))))
    assert seen == list(range(1, 9))


def test_what_was_logged_before_an_error_is_on_disk(tmp_path: Path) -> None:
    logger, model, _ = fit(tmp_path, fails_at=3)
    assert points(logger, "loss") == numbered(model.kept[:2])


def test_no_thread_and_no_open_file_is_left_behind(tmp_path: Path) -> None:
    during: list[set[threading.Thread]] = []
    before = set(threading.enumerate())
    callback = SimpleNamespace(on_train_start=lambda trainer, event: during.append(set(threading.enumerate())))
    for fails_at in (None, 3):
        logger, _, _ = fit(tmp_path, callback, fails_at=fails_at)
        assert logger._writer is None
    assert during == [before, before] and set(threading.enumerate()) == before


class Disaster:
    """Strikes when the second epoch begins."""

    def __init__(self, strike: Callable[[], object]) -> None:
        self.strike = strike

    def on_train_epoch_start(self, trainer: Trainer, event: Any) -> None:
        if event.epoch == 1:
            self.strike()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = sys.platform == "linux" and shutil.which("mount") is not None
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def goes_on_with_one_warning(tmp_path: Path, log_dir: Path, strike: Callable[[], object]) -> tuple[TensorBoardLogger, Model]:
    options: dict[str, Any] = {"max_epochs": 40, "logger": {"log_dir": log_dir}, "saves": False}
    with pytest.warns(UserWarning, match="TensorBoardLogger") as caught:
        logger, model, trainer = fit(tmp_path, Disaster(strike), **options)
    assert trainer.global_step == 160
    (warning,) = (str(warning.message) for warning in caught)
    assert warning.startswith(f"TensorBoardLogger has stopped writing: {logger.run_dir}/events.out.tfevents.")
    assert "The run goes on" in warning
    return logger, model


def test_a_full_disk_costs_one_warning(tmp_path: Path, small_disk: Path) -> None:
    def fill() -> None:
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        assert shutil.disk_usage(small_disk).free == 0

    logger, model = goes_on_with_one_warning(tmp_path, small_disk, fill)
    written = points(logger, "loss")
    assert 4 <= len(written) < 160
    assert written == numbered(model.kept[: len(written)])

    (small_disk / "filler").unlink()
    logger, model, _ = fit(tmp_path, logger={"log_dir": small_disk})
    assert points(logger, "loss") == numbered(model.kept), "the next run writes"


def test_a_limit_on_files_costs_one_warning(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    log_dir = tmp_path / "logs"

    def limit() -> None:
        (file,) = log_dir.glob("Model/version_0/events*")
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 100, before[1]))

    try:
        logger, model = goes_on_with_one_warning(tmp_path, log_dir, limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    written = points(logger, "loss")
    assert 4 <= len(written) <= 6 and written == numbered(model.kept[: len(written)])


def test_a_directory_that_vanishes_costs_one_warning(tmp_path: Path) -> None:
    log_dir = tmp_path / "logs"
    goes_on_with_one_warning(tmp_path, log_dir, lambda: shutil.rmtree(log_dir))
    assert not log_dir.exists()


def test_pictures_for_a_vanished_directory_do_not_end_the_run(tmp_path: Path) -> None:
    class Draws(Model):
        def on_train_epoch_end(self) -> None:
            shutil.rmtree(tmp_path / "runs", ignore_errors=True)
            writer = self.trainer.callback(TensorBoardLogger).writer
            writer.flush()
            writer.add_image("picture", torch.zeros(1, 4, 4), self.global_step)
            writer.flush()

    with pytest.warns(UserWarning, match="has stopped writing") as caught:
        fit(tmp_path, model=Draws())
    assert len(caught) == 1


def bad_place(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file" / "runs"


def test_a_directory_that_cannot_be_made_is_an_error_before_training(tmp_path: Path) -> None:
    model, log_dir = Model(), bad_place(tmp_path)
    with pytest.raises(MisconfigurationError, match=r"TensorBoardLogger cannot write to .*file.* Give a log_dir that can be"):
        fit(tmp_path, model=model, logger={"log_dir": log_dir})
    assert model.kept == []
    trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False, callbacks=[TensorBoardLogger(log_dir)])
    with pytest.raises(MisconfigurationError, match="cannot write to"):
        trainer.validate(model, BATCHES)


def test_a_read_only_disk_is_an_error_before_training(tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(MisconfigurationError, match=r"cannot write to .*: Read-only file system"):
        fit(tmp_path, logger={"log_dir": small_disk})


def test_a_program_may_change_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    logger = TensorBoardLogger(log_every_n_steps=1)
    wanders = SimpleNamespace(on_train_start=lambda trainer, event: os.chdir(tmp_path / "elsewhere"))
    trainer = Trainer(max_epochs=2, device="cpu", default_callbacks=False, callbacks=[logger, wanders, LRSchedulerStepping()])
    trainer.fit(Model(), BATCHES)
    os.chdir(tmp_path)
    assert len(points(logger, "loss")) == 8


# ------------------------------------------------------------------ dry runs and bad arguments


def test_a_dry_run_writes_nothing_and_takes_everything(tmp_path: Path) -> None:
    class Draws(Drawn):
        def on_train_epoch_end(self) -> None:
            self.logger.experiment.add_image("picture", torch.zeros(1, 4, 4), 0)

    logger, _, _ = fit(tmp_path, model=Draws(), fast_dev_run=2, logger={"histograms": 1, "log_graph": True})
    assert not logger.run_dir.exists() and list(tmp_path.iterdir()) == []


def test_the_writer_is_there_once_a_run_has_begun() -> None:
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


# ------------------------------------------------------------------ TensorBoard's server


class Pictures(Drawn):
    def on_train_epoch_end(self) -> None:
        self.trainer.callback(TensorBoardLogger).writer.add_image("picture", torch.zeros(1, 4, 4), self.global_step)


class Shown:
    """Two runs of other hyperparameters, the second resumed after a crash, and a server of the directory above them."""

    def __init__(self, root: Path) -> None:
        options: dict[str, Any] = {"logger": {"log_graph": True, "histograms": 2}}
        self.first = fit(root, model=Pictures(), **options)
        fit(root, model=Pictures(), fails_at=7, **options)
        resumed = Pictures()
        resumed.rate = resumed.hparams["rate"] = 0.002
        self.second = fit(root, model=resumed, ckpt_path=root / "epoch_0.ckpt", **options)
        self.loggers = {"version_0": self.first[0], "version_1": self.second[0]}
        self.address = ""

    def ask(self, path: str, content: Any = None, **query: Any) -> Any:
        url = f"{self.address}data/plugin/{path}?{urllib.parse.urlencode(query)}"
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what TensorBoard's server imports
        from tensorboard import program

        servers: list[Any] = []

        def serve(application: Any, flags: Any) -> Any:
            servers.append(program.WerkzeugServer(application, flags))
            return servers[0]

        root = tmp_path_factory.mktemp("shown")
        shown = Shown(root)
        board = program.TensorBoard(server_class=serve)
        # All is read before the server starts, so that nothing here waits.
        once = ["--load_fast=false", "--reload_task=blocking", "--reload_interval=0"]
        board.configure(
            argv=["tensorboard", "--logdir", str(root / "runs" / "Pictures"), "--host=127.0.0.1", "--port=0", *once]
        )
        shown.address = board.launch()
    yield shown
    servers[0].shutdown()
    servers[0].server_close()


def test_the_server_shows_the_scalars_of_all_runs_side_by_side(shown: Shown) -> None:
    tags = shown.ask("scalars/tags")
    assert tags.keys() == shown.loggers.keys()
    for run, logger in shown.loggers.items():
        for tag in tags[run]:
            served = [(step, value) for _, step, value in shown.ask("scalars/scalars", run=run, tag=tag)]
            assert served == points(logger, tag)
        assert set(tags[run]) == {"loss", "size", "val", "epoch"}
    assert [step for _, step, _ in shown.ask("scalars/scalars", run="version_1", tag="loss")] == list(range(1, 9))
    assert [value for _, _, value in shown.ask("scalars/scalars", run="version_0", tag="loss")] == [
        single(loss) for loss in shown.first[1].kept
    ]


def test_the_server_shows_hyperparameters_beside_metrics(shown: Shown) -> None:
    experiment = shown.ask("hparams/experiment", {"experimentName": "", "includeMetrics": True})
    assert {info["name"] for info in experiment["hparamInfos"]} == {"optimizers", "rate"}
    columns = {info["name"]["tag"] for info in experiment["metricInfos"]}
    assert columns == set(shown.ask("scalars/tags")["version_0"])

    statuses = [f"STATUS_{status}" for status in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
    question = {"experimentName": "", "allowedStatuses": statuses, "colParams": [], "startIndex": 0, "sliceSize": 10}
    groups = {group["name"]: group for group in shown.ask("hparams/session_groups", question)["sessionGroups"]}
    assert groups["version_0"]["hparams"] == {"optimizers": 1.0, "rate": 0.01}
    for run, logger in shown.loggers.items():
        values = {each["name"]["tag"]: (each["trainingStep"], each["value"]) for each in groups[run]["metricValues"]}
        assert values == {tag: points(logger, tag)[-1] for tag in columns}
        assert [session["status"] for session in groups[run]["sessions"]] == ["STATUS_SUCCESS"]


def test_the_server_shows_histograms_pictures_graph_and_text(shown: Shown) -> None:
    for run, logger in shown.loggers.items():
        tags = shown.ask("histograms/tags")[run]
        assert {"parameters/layers.0.weight", "gradients/layers.0.weight"} <= set(tags)
        served = shown.ask("histograms/histograms", run=run, tag="gradients/layers.0.weight")
        assert [step for _, step, _ in served] == list(histograms(logger, "gradients/layers.0.weight")) == [2, 4, 6, 8]
        assert list(shown.ask("images/tags")[run]) == ["picture"]
        assert [image["step"] for image in shown.ask("images/images", run=run, tag="picture", sample=0)] == [4, 8]
        assert shown.ask("graphs/info")[run]["run_graph"]
        parts = [f"run/{part}/text_summary" for part in ("environment", "configuration", "module")]
        assert sorted(shown.ask("text/tags")[run]) == sorted(parts)
        (first, *_) = shown.ask("text/text", run=run, tag=parts[1])
        assert "<table>" in first["text"] and "max_epochs" in first["text"]


def test_what_came_after_the_checkpoint_at_the_same_step_is_cut_off(tmp_path: Path) -> None:
    """Validations in an open window are of one step with what came before; and a run that was killed twice left two files."""

    class Saves(Callback):
        def on_safe_point(self, trainer: Trainer, event: Any) -> None:
            if trainer.total_batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    class Killed(Callback):
        def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
            if trainer.total_batch_idx == 4:
                raise RuntimeError("killed")

    class Logs(Model):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("batch", float(self.trainer.total_batch_idx))

    def run(*more: Any, ckpt_path: Any = None) -> TensorBoardLogger:
        logger = TensorBoardLogger(tmp_path / "runs", log_every_n_steps=1)
        trainer = Trainer(
            max_epochs=1, callbacks=[GradientAccumulation(4), LRSchedulerStepping(), logger, *more],
            default_callbacks=False, device="cpu", val_check_interval=1, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(Logs(), BATCHES[:1] * 8, BATCHES[:1], ckpt_path=ckpt_path)
        return logger

    with pytest.raises(RuntimeError, match="killed"):
        run(Saves(), Killed())
    with pytest.raises(RuntimeError, match="killed"):
        run(Killed(), ckpt_path=tmp_path / "a.ckpt")
    assert [value for _, value in points(run(ckpt_path=tmp_path / "a.ckpt"), "batch")] == [float(n) for n in range(8)]
