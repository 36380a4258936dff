"""Modules, hooks and hyperparameters that are refused, each beside the nearest form that trains."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from eventtrain import Trainer
from tests.kit import ModuleOf
from tests.misconfigurations import (
    BATCHES,
    Case,
    Data,
    after_fit,
    check_refusal,
    check_remedy,
    fit,
    hooked,
    manual,
    returns,
    steps,
)

pytestmark = pytest.mark.usefixtures("in_tmp_path")


class Hyper(ModuleOf):
    def __init__(self, width: Any, keep: Any = ()) -> None:
        super().__init__()
        self.save_hyperparameters(*keep)


def saved(model: Any, tmp: str = "checkpoint.pt") -> Trainer:
    return after_fit(lambda trainer, module: trainer.save_checkpoint(tmp), model)


CASES: dict[str, Case] = {
    # ---------------------------------------------------------------- modules and hooks
    "a plain module": Case(lambda: fit(nn.Linear(1, 1)), ("Linear", r"eventtrain\.LightningModule"), fit),
    "a module's class": Case(lambda: fit(ModuleOf), ("ModuleOf", r"class|ModuleOf\("), lambda: fit(ModuleOf())),
    "a module of another library": Case(
        lambda: fit(type("LightningModule", (nn.Module,), {"__module__": "lightning.pytorch"})()),
        ("LightningModule", "lightning", "from eventtrain import LightningModule"),
        fit,
    ),
    "a datamodule that is none": Case(
        lambda: fit(data=None, datamodule=BATCHES),
        ("datamodule", "list", r"LightningDataModule", "train_dataloaders="),
        lambda: fit(data=None, datamodule=Data()),
    ),
    "a module's hook with other arguments": Case(
        lambda: hooked(on_train_batch_end=lambda self, trainer, outputs, batch, batch_idx: None),
        (r"Hooked\.on_train_batch_end", r"def on_train_batch_end\(self, outputs, batch, batch_idx\):"),
        lambda: hooked(on_train_batch_end=lambda self, outputs, batch, batch_idx: None),
    ),
    "a module's misspelled hook": Case(
        lambda: hooked(on_train_epoch_ends=lambda self: None),
        (r"Hooked\.on_train_epoch_ends", "no hook", "Did you mean 'on_train_epoch_end'"),
        lambda: hooked(on_train_epoch_end=lambda self: None),
    ),
    "a trainer's property without a trainer": Case(
        lambda: ModuleOf().trainer,
        ("ModuleOf is not attached to a trainer", "fit"),
        lambda: after_fit(lambda t, module: module.trainer),
    ),
    "optimizers without a trainer": Case(
        lambda: ModuleOf().optimizers(),
        ("ModuleOf is not attached", "fit"),
        lambda: after_fit(lambda t, module: module.optimizers()),
    ),
    # ---------------------------------------------------------------- calls in the wrong mode
    "manual_backward in automatic mode": Case(
        lambda: returns(lambda model, x: model.manual_backward(model.loss(x))),
        (r"ModuleOf\.manual_backward", "automatic optimization", r"self\.automatic_optimization = False"),
        lambda: manual(steps),
    ),
    "manual_backward of a number": Case(
        lambda: manual(lambda model, optimizer, x: model.manual_backward(3.0)),
        ("manual_backward", r"3\.0", "scalar tensor"),
        lambda: manual(steps),
    ),
    # ---------------------------------------------------------------- stages and checkpoints
    "a hyperparameter that is no argument": Case(
        lambda: Hyper(3, keep=("depth",)), ("'depth'", r"Hyper\.__init__", "width"), lambda: fit(Hyper(3, keep=("width",)))
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_refusal_names_the_mistake_and_the_remedy(case: str) -> None:
    check_refusal(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_correct_form_trains(case: str) -> None:
    check_remedy(CASES[case])
