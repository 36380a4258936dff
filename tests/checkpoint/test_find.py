"""``ckpt_path`` leads to one checkpoint in all processes, or to an error that says why there is none."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from eventtrain import Trainer
from eventtrain.callbacks import ExponentialMovingAverage, ModelCheckpoint
from eventtrain.errors import MisconfigurationError
from tests.kit import FakeProcesses, Line, On, batches, new_trainer, rows


@pytest.mark.parametrize("which", ["best", "last"])
def test_an_evaluation_needs_a_checkpoint_that_exists(tmp_path: Path, which: str) -> None:
    trainer = new_trainer(ModelCheckpoint(monitor="val_loss"), default_root_dir=tmp_path)
    with pytest.raises(MisconfigurationError, match=f"ckpt_path='{which}': there is no checkpoint yet"):
        trainer.validate(Line(), batches(1), ckpt_path=which)


def test_the_error_of_the_first_process_ends_the_others_too(tmp_path: Path) -> None:
    trainer = new_trainer(default_root_dir=tmp_path)
    trainer.processes = FakeProcesses(global_rank=1, broadcast=lambda value: ("gone.ckpt", "There is no file gone.ckpt."))
    with pytest.raises(MisconfigurationError, match=r"The first process found no checkpoint. There is no file gone.ckpt."):
        trainer.fit(Line(), batches(1), ckpt_path="gone.ckpt")


# ------------------------------------------------------------------ an evaluation without a module


class Ranked(Line):
    """Logs a metric that is best after the second epoch, and tests its own weight."""

    scores = (3.0, 1.0, 2.0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", self.scores[min(self.current_epoch, 2)])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("weight", self.layer.weight.sum())


def fitted(folder: Path, *callbacks: Any, **arguments: Any) -> tuple[Trainer, dict[int, float]]:
    """Fit a module for three epochs, and return the trainer and the weight after each epoch."""
    weights: dict[int, float] = {}
    remember = On(train_epoch_end=lambda trainer, event: weights.update({event.epoch: trainer.module.layer.weight.item()}))
    trainer = new_trainer(remember, *callbacks, default_root_dir=folder, **{"max_epochs": 3, **arguments})
    trainer.fit(Ranked(), rows(2), rows(1))
    return trainer, weights


def weight_in_test(trainer: Trainer, model: Any = None, **arguments: Any) -> float:
    return trainer.test(model, dataloaders=rows(1), **arguments)[0]["weight"]


def test_a_test_without_a_module_takes_the_best_checkpoint_and_says_which(tmp_path: Path, caplog: Any) -> None:
    trainer, weights = fitted(tmp_path, ModelCheckpoint(monitor="score"))
    assert weight_in_test(trainer, trainer.module) == pytest.approx(weights[2])
    assert not caplog.messages
    assert weight_in_test(trainer) == pytest.approx(weights[1])
    best = trainer.callback(ModelCheckpoint).best_model_path
    assert [best in message and "trainer.test" in message for message in caplog.messages] == [True]
    # As in Lightning, the module has these weights afterwards.
    assert trainer.module.layer.weight.item() == pytest.approx(weights[1])  # type: ignore[union-attr, operator]


def test_without_a_log_it_is_printed(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    trainer, _ = fitted(tmp_path, ModelCheckpoint(monitor="score"))
    trainer.test(dataloaders=rows(1))
    assert "epoch=1-step=4.ckpt" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_so_do_a_validation_and_a_prediction(tmp_path: Path, stage: str) -> None:
    trainer, weights = fitted(tmp_path, ModelCheckpoint(monitor="score"))
    getattr(trainer, stage)(dataloaders=rows(1))
    assert trainer.module.layer.weight.item() == pytest.approx(weights[1])  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    "callbacks",
    [[], [ModelCheckpoint()], [ModelCheckpoint(monitor="never", save_top_k=0)]],
    ids=["nothing keeps checkpoints", "no metric", "no best"],
)
def test_without_a_monitored_metric_the_weights_stay(tmp_path: Path, callbacks: list[Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*'never'")
        trainer, weights = fitted(tmp_path, *callbacks)
    assert weight_in_test(trainer) == pytest.approx(weights[2])


def test_of_several_the_first_that_monitors_a_metric_decides(tmp_path: Path) -> None:
    last, best, worst = (
        ModelCheckpoint("a"),
        ModelCheckpoint("b", monitor="score"),
        ModelCheckpoint("c", monitor="score", mode="max"),
    )
    trainer, weights = fitted(tmp_path, last, best, worst)
    assert weight_in_test(trainer) == weight_in_test(trainer, ckpt_path="best") == pytest.approx(weights[1])
    trainer, weights = fitted(tmp_path / "other", ModelCheckpoint("c", monitor="score", mode="max"), ModelCheckpoint("a"), best)
    assert weight_in_test(trainer) == pytest.approx(weights[0])


def test_files_of_an_earlier_process_are_not_the_best_of_this_fit(tmp_path: Path) -> None:
    fitted(tmp_path, ModelCheckpoint(monitor="score"))
    trainer = new_trainer(ModelCheckpoint(monitor="score"), default_root_dir=tmp_path)
    module = Ranked()
    weight = module.layer.weight.item()
    assert weight_in_test(trainer, module) == weight_in_test(trainer) == pytest.approx(weight), "there was no fit"
    with pytest.warns(UserWarning, match="no metric 'score' was logged"):  # without a validation
        trainer.fit(module, rows(1))
    weight = module.layer.weight.item()
    assert weight_in_test(trainer) == pytest.approx(weight)


def test_another_module_than_the_fitted_one_keeps_its_weights(tmp_path: Path) -> None:
    trainer, _ = fitted(tmp_path, ModelCheckpoint(monitor="score"))
    other = Ranked()
    assert weight_in_test(trainer, other) == weight_in_test(trainer) == pytest.approx(other.layer.weight.item())


def test_a_trial_run_keeps_nothing_so_the_weights_stay(tmp_path: Path) -> None:
    trainer, weights = fitted(tmp_path, ModelCheckpoint(monitor="score"), fast_dev_run=1)
    assert weight_in_test(trainer) == pytest.approx(weights[0])


def test_best_files_that_are_gone_are_an_error(tmp_path: Path) -> None:
    trainer, _ = fitted(tmp_path, ModelCheckpoint(monitor="score"))
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(MisconfigurationError, match=r"trainer.test\(\) takes .* and it is gone. .*trainer.test\(model\)"):
        weight_in_test(trainer)


def test_the_averages_are_those_of_the_best_checkpoint(tmp_path: Path) -> None:
    trainer, _ = fitted(tmp_path, ModelCheckpoint(monitor="score"), ExponentialMovingAverage(0.5))
    content = torch.load(trainer.callback(ModelCheckpoint).best_model_path, weights_only=True)
    averages = content["callbacks"]["ExponentialMovingAverage"]["averages"]
    assert weight_in_test(trainer) == pytest.approx(averages["layer.weight"].item())
