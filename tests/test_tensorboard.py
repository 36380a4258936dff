"""What TensorBoard shows is what the run logged: event files read back."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from eventtrain import LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import GradientAccumulation, LRSchedulerStepping, TensorBoardLogger

BATCHES = [torch.full((size, 2), float(i + 1)) for i, size in enumerate((4, 4, 4, 2))]


class Model(LightningModule):
    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(2, 1) for _ in range(optimizers))
        self.automatic_optimization = optimizers == 1
        self.kept: list[tuple[float, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = sum(layer(batch).pow(2).mean() for layer in self.layers)
        self.kept.append((float(loss.detach()), self.trainer.optimizers[0].param_groups[0]["lr"]))
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
            return [torch.optim.SGD(layer.parameters(), lr=0.01 / (i + 1)) for i, layer in enumerate(self.layers)]
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def fit(tmp_path: Path, *callbacks: Any, model: Model | None = None, fails_at: int | None = None, **options: Any) -> Any:
    logger = TensorBoardLogger(tmp_path / "runs", **{"log_every_n_steps": 1, **options.pop("logger", {})})
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, **options}
    stepping = LRSchedulerStepping()
    trainer = Trainer(device="cpu", default_callbacks=False, callbacks=[logger, *callbacks, stepping], **options)
    model = model or Model()

    def fail(trainer: Trainer, event: Any) -> None:
        if event.global_step == fails_at:
            raise RuntimeError("at the worst moment")

    trainer.signals.after_update.connect(fail)
    if fails_at is None:
        trainer.fit(model, BATCHES, BATCHES[:1])
    else:
        with pytest.raises(RuntimeError, match="worst moment"):
            trainer.fit(model, BATCHES, BATCHES[:1])
    return logger, model, trainer


def scalars(logger: TensorBoardLogger, tag: str) -> dict[int, float]:
    accumulator = EventAccumulator(str(logger.run_dir)).Reload()
    return {event.step: event.value for event in accumulator.Scalars(tag)}


def single(value: float) -> float:
    return float(torch.tensor(value))  # event files hold float32


def test_every_step_has_its_loss_and_the_rate_that_it_used(tmp_path: Path) -> None:
    logger, model, _ = fit(tmp_path)
    assert scalars(logger, "loss") == {step: single(loss) for step, (loss, _) in enumerate(model.kept, 1)}
    assert scalars(logger, "lr-SGD") == {step: single(rate) for step, (_, rate) in enumerate(model.kept, 1)}


def test_every_epoch_has_its_values(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path)
    assert scalars(logger, "size") == {4: 14.0, 8: 14.0}
    assert scalars(logger, "val") == {4: 1.0, 8: 1.0}
    assert scalars(logger, "epoch") == {4: 0.0, 8: 1.0}


def test_steps_are_updates_and_written_at_the_cadence(tmp_path: Path) -> None:
    logger, model, _ = fit(tmp_path, GradientAccumulation(2), logger={"log_every_n_steps": 2}, max_epochs=3)
    # The value of an update is that of the batch that closed its window: the fourth, eighth and twelfth batch.
    assert scalars(logger, "loss") == {2: single(model.kept[3][0]), 4: single(model.kept[7][0]), 6: single(model.kept[11][0])}
    assert list(scalars(logger, "lr-SGD")) == [2, 4, 6]


@pytest.mark.parametrize(("axis", "expected"), [("batches", [2, 4, 6, 8]), ("samples", [8, 14, 22, 28])])
def test_the_x_axis_can_be_chosen(tmp_path: Path, axis: str, expected: list[int]) -> None:
    logger, _, trainer = fit(tmp_path, GradientAccumulation(2), logger={"x_axis": axis})
    assert list(scalars(logger, "loss")) == expected
    assert logger.count_samples not in trainer.signals.train_batch_start.attached(), "counted in this run alone"


def test_wall_time_as_the_x_axis_never_falls(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path, logger={"x_axis": "wall_time"})
    events = EventAccumulator(str(logger.run_dir)).Reload().Scalars("loss")
    assert len(events) == 8 and all(a.step <= b.step < 60 for a, b in pairwise(events))


def test_several_optimizers_of_a_kind_are_numbered(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path, model=Model(optimizers=2), max_epochs=1)
    assert set(scalars(logger, "lr-SGD-0").values()) == {single(0.01)}
    assert set(scalars(logger, "lr-SGD-1").values()) == {single(0.005)}
    assert list(scalars(logger, "loss")) == [1, 2, 3, 4], "a batch counts once"


def test_each_run_has_a_directory_of_its_own(tmp_path: Path) -> None:
    directories = [fit(tmp_path, max_epochs=1)[0].run_dir for _ in range(2)]
    assert directories == [tmp_path / "runs" / "Model" / f"version_{i}" for i in range(2)]
    assert fit(tmp_path, max_epochs=1, logger={"name": "named"})[0].run_dir == tmp_path / "runs" / "named" / "version_0"


def test_a_second_fit_is_another_run_and_an_evaluation_goes_on_in_the_last(tmp_path: Path) -> None:
    logger, model, trainer = fit(tmp_path, max_epochs=1)
    first = logger.run_dir
    trainer.validate(model, BATCHES[1:2])
    assert logger.run_dir == first and [event.value for event in _events(logger, "val")] == [1.0, 2.0]
    trainer.fit(model, BATCHES)
    assert logger.run_dir.name == "version_1"


def _events(logger: TensorBoardLogger, tag: str) -> list[Any]:
    # TensorBoard reads the files of a directory one after the other, in the order in which they were begun.
    return EventAccumulator(str(logger.run_dir)).Reload().Scalars(tag)


def test_the_hyperparameters_are_written_with_the_run(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path, max_epochs=1)
    accumulator = EventAccumulator(str(logger.run_dir)).Reload()
    assert b"optimizers" in accumulator.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert len(list((tmp_path / "runs" / "Model").iterdir())) == 1, "no run of their own beside it"


def test_the_writer_takes_pictures_and_text(tmp_path: Path) -> None:
    class Draws(Model):
        def on_train_epoch_end(self) -> None:
            self.logger.experiment.add_image("picture", torch.zeros(1, 4, 4), self.global_step)
            self.trainer.callback(TensorBoardLogger).writer.add_text("text", "hello", self.global_step)

    logger, _, _ = fit(tmp_path, model=Draws())
    accumulator = EventAccumulator(str(logger.run_dir)).Reload()
    assert [image.step for image in accumulator.Images("picture")] == [4, 8]
    assert "text/text_summary" in accumulator.Tags()["tensors"]


def test_what_was_logged_before_an_error_is_on_disk(tmp_path: Path) -> None:
    logger, model, _ = fit(tmp_path, fails_at=3)
    assert scalars(logger, "loss") == {step: single(loss) for step, (loss, _) in enumerate(model.kept[:2], 1)}


def test_a_dry_run_writes_nothing_and_takes_everything(tmp_path: Path) -> None:
    class Draws(Model):
        def on_train_epoch_end(self) -> None:
            self.logger.experiment.add_image("picture", torch.zeros(1, 4, 4), 0)

    fit(tmp_path, model=Draws(), fast_dev_run=2)
    assert not (tmp_path / "runs").exists()


def test_the_writer_is_there_once_a_run_has_begun() -> None:
    with pytest.raises(MisconfigurationError, match="no run has begun"):
        _ = TensorBoardLogger().writer


@pytest.mark.parametrize("options", [{"x_axis": "epochs"}, {"log_every_n_steps": 0}, {"log_every_n_steps": 1.5}])
def test_bad_options_are_refused(options: Any) -> None:
    with pytest.raises(MisconfigurationError, match=f"TensorBoardLogger\\({next(iter(options))}="):
        TensorBoardLogger(**options)
