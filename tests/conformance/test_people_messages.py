"""What people bring from Lightning is refused here with what to write instead, and what Lightning refuses is refused here."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as their_callbacks
from lightning.pytorch import loggers as their_loggers
from lightning.pytorch import profilers as their_profilers

from eventtrain import LightningModule, MisconfigurationError
from eventtrain.hints import tables
from tests.kit import ModuleOf, new_trainer

from .frameworks import Settings, lightning, train_ours, train_theirs
from .test_parity import regression

BATCHES = [torch.ones(1)] * 2
SHIPPED = [name for room in (their_callbacks, their_loggers, their_profilers) for name in room.__all__]


def raised(train: Any, **changes: Any) -> Exception:
    """Return the error that ends a run of the same source in one framework."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            train(lambda base: regression(base, **changes), Settings(validate=True))
        except Exception as error:
            return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("changes", "theirs", "remedy"),
    [
        ({"training_epoch_end": lambda self, outputs: None}, NotImplementedError, "on_train_epoch_end"),
        ({"validation_epoch_end": lambda self, outputs: None}, NotImplementedError, "on_validation_epoch_end"),
        (
            {"training_step": lambda self, batch, batch_idx, optimizer_idx: None},
            RuntimeError,
            "automatic_optimization = False",
        ),
        ({"on_train_epoch_end": lambda self, outputs: None}, TypeError, r"def on_train_epoch_end(self)"),
        ({"setup": lambda self: None}, TypeError, "def setup(self, stage)"),
        ({"lr_scheduler_step": lambda self, scheduler, optimizer_idx, metric: None}, None, "def lr_scheduler_step("),
    ],
)
def test_a_module_for_an_older_version_is_refused_by_both_and_here_with_the_method_to_write(
    changes: dict[str, Any], theirs: type[Exception] | None, remedy: str
) -> None:
    error = raised(train_ours, **changes)
    assert isinstance(error, MisconfigurationError) and remedy in str(error)
    if theirs is not None:  # Lightning calls a scheduler's hook only if there is a scheduler
        assert isinstance(raised(train_theirs, **changes), theirs)


def test_a_wrong_shape_is_the_same_error_in_both_and_here_it_has_a_note() -> None:
    def training_step(self: Any, batch: torch.Tensor, batch_idx: int) -> Any:
        return self.layer(batch[:, :2]).sum()

    ours, theirs = (raised(train, training_step=training_step) for train in (train_ours, train_theirs))
    assert type(ours) is type(theirs) is RuntimeError and str(ours) == str(theirs)
    assert ours.__notes__ == ["raised in Regression.training_step (epoch 0, batch 0)"]


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in ("PassThroughProfiler", "XLAProfiler")])
def test_each_class_that_lightning_ships_has_a_counterpart_or_a_way_to_write_it(name: str) -> None:
    assert name in tables()["class"]


class Mine(their_callbacks.Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None: ...


class MyStopping(their_callbacks.EarlyStopping):
    pass


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (Mine, "eventtrain.Callback"),
        (lambda: MyStopping("loss"), "EarlyStopping('val_loss')"),
        (their_callbacks.ModelCheckpoint, "ModelCheckpoint()"),
        (their_callbacks.LearningRateMonitor, "LearningRateMonitor()"),
        (their_callbacks.TQDMProgressBar, "ProgressBar()"),
        (lambda: their_callbacks.LambdaCallback(on_train_start=print), "LambdaCallback(on_train_epoch_end"),
        (lambda: their_callbacks.StochasticWeightAveraging(0.1), "ExponentialMovingAverage(0.999)"),
        (lambda: their_loggers.CSVLogger("logs"), "JSONLinesLogger"),
        (their_profilers.SimpleProfiler, "Profiler()"),
    ],
)
def test_an_object_of_lightning_is_refused_as_a_callback(make: Any, remedy: str) -> None:
    with pytest.raises(MisconfigurationError, match=r"lightning's .* does not work here") as caught:
        new_trainer(make())
    assert remedy in str(caught.value)


def test_attributes_that_lightnings_modules_have_and_ours_lack_have_a_hint() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lacking = {name for name in dir(lightning.LightningModule) if not name.startswith(("_", "CHECKPOINT"))}
    lacking -= {*dir(LightningModule), *vars(ModuleOf())}
    assert lacking - tables()["module"].keys() - tables()["hook"].keys() - {"remove_ignored_hparams", "strict_loading"} == set()
