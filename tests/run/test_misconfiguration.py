"""Trainers and runs that are refused, each beside the nearest form that trains."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch.optim import SGD

from eventtrain import Trainer, seed_everything
from eventtrain.callbacks import GradientClipping, Timer
from tests.kit import ModuleOf, On
from tests.misconfigurations import (
    BATCHES,
    Case,
    Data,
    Stream,
    after_fit,
    before_fit,
    check_refusal,
    check_remedy,
    evaluates,
    fit,
    hooked,
)

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def estimating(**arguments: Any) -> Trainer:
    model = ModuleOf()

    def configure() -> Any:
        assert model.trainer.estimated_stepping_batches
        return SGD([model.w], lr=0.1)

    model.configure_optimizers = configure  # type: ignore[method-assign]
    return fit(model, data=Stream(4), **arguments)


def predicts() -> ModuleOf:
    return ModuleOf(predict_step=lambda batch, batch_idx: None)


CASES: dict[str, Case] = {
    # ---------------------------------------------------------------- the trainer's arguments
    "a run without an end": Case(
        lambda: fit(max_epochs=None), ("no end", r"max_epochs=", r"max_steps="), lambda: fit(max_epochs=None, max_steps=3)
    ),
    **{
        f"{name}={value!r}": Case(
            lambda name=name, value=value: fit(**{name: value}),  # type: ignore[misc]
            (rf"{name}={re.escape(repr(value))}", "whole number"),
            lambda name=name, right=right: fit(**{name: right}),  # type: ignore[misc]
        )
        for name, value, right in (
            ("max_epochs", -2, 2),
            ("max_epochs", 1.5, 1),
            ("max_epochs", "3", 3),
            ("max_epochs", True, 1),
            ("max_steps", -2, 2),
            ("max_steps", 2.5, 2),
            ("min_epochs", -1, 1),
            ("min_steps", 0.5, 1),
            ("num_sanity_val_steps", -2, -1),
            ("num_sanity_val_steps", 1.5, 1),
            ("fast_dev_run", -1, 1),
            ("fast_dev_run", 1.5, 1),
            ("fast_dev_run", "yes", True),
            ("check_val_every_n_epoch", 0, 1),
            ("check_val_every_n_epoch", 0.5, 1),
            ("limit_train_batches", -1, 1),
            ("limit_train_batches", 1.5, 0.5),
            ("limit_train_batches", "2", 2),
            ("limit_train_batches", True, 1),
            ("limit_val_batches", -0.5, 0.5),
            ("limit_test_batches", 2.0, 2),
            ("limit_predict_batches", -1, 0),
        )
    },
    "a limit below one batch": Case(
        lambda: fit(limit_train_batches=0.1),
        (r"limit_train_batches=0\.1", "4 batches", "less than one", r"0\.25"),
        lambda: fit(limit_train_batches=0.25),
    ),
    "a fraction of a loader without a length": Case(
        lambda: fit(data=Stream(4), limit_train_batches=0.5),
        (r"limit_train_batches=0\.5", "length is unknown", "whole number"),
        lambda: fit(data=Stream(4), limit_train_batches=2),
    ),
    "an interval longer than the epoch": Case(
        lambda: fit(val_check_interval=5),
        ("val_check_interval=5", "4 batches", "check_val_every_n_epoch=None"),
        lambda: fit(val_check_interval=5, check_val_every_n_epoch=None),
    ),
    "an interval of 0": Case(
        lambda: fit(val_check_interval=0), ("val_check_interval=0", "limit_val_batches=0"), lambda: fit(limit_val_batches=0)
    ),
    "an interval that is a fraction of an unknown length": Case(
        lambda: fit(data=Stream(4), val_check_interval=0.5),
        (r"val_check_interval=0\.5", "length is unknown", "number of batches"),
        lambda: fit(data=Stream(4), val_check_interval=2),
    ),
    "an interval of the run that is no number of batches": Case(
        lambda: fit(check_val_every_n_epoch=None),
        ("check_val_every_n_epoch=None", "val_check_interval", "None"),
        lambda: fit(check_val_every_n_epoch=None, val_check_interval=3),
    ),
    **{
        f"device={device!r}": Case(
            lambda device=device: fit(device=device),  # type: ignore[misc]
            (re.escape(f"device={device!r}"), "cpu|'auto'"),
            lambda: fit(device="cpu"),
        )
        for device in ("gpu", "tpu", "cuda:99", "cpu:x", 2.5, None)
    },
    "a bad seed": Case(lambda: fit(seed=-1), ("seed", "-1", "whole number"), lambda: fit(seed=1)),
    "seed_everything of a string": Case(
        lambda: seed_everything("1"),  # type: ignore[arg-type]
        ("seed", "'1'", "whole number"),
        lambda: fit(seed=seed_everything(1)),
    ),
    # ---------------------------------------------------------------- modules and hooks
    "no module": Case(
        lambda: Trainer(max_epochs=1, device="cpu", default_callbacks=False).validate(dataloaders=BATCHES),
        ("no module yet", "fit first"),
        lambda: after_fit(lambda trainer, module: trainer.validate(dataloaders=BATCHES), evaluates()),
    ),
    "a trainer's module without one": Case(
        lambda: before_fit(lambda trainer: trainer.module),
        ("no module yet", "fit"),
        lambda: after_fit(lambda trainer, module: trainer.module),
    ),
    "a run within a run": Case(
        lambda: hooked(on_train_start=lambda self: self.trainer.fit(ModuleOf(), BATCHES)),
        ("running fit", "another trainer"),
        lambda: hooked(on_train_start=lambda self: fit() and None),
    ),
    # ---------------------------------------------------------------- loaders
    "an estimate of an unknown length": Case(
        lambda: estimating(),
        ("estimated_stepping_batches", "length", r"Trainer\(max_steps=\.\.\.\)"),
        lambda: estimating(max_steps=3),
    ),
    # ---------------------------------------------------------------- stages and checkpoints
    "validate without a validation_step": Case(
        lambda: after_fit(lambda trainer, module: trainer.validate(module, BATCHES)),
        ("ModuleOf has no validation_step", "Define it"),
        lambda: after_fit(lambda trainer, module: trainer.validate(module, BATCHES), evaluates()),
    ),
    "test without a test_step": Case(
        lambda: after_fit(lambda trainer, module: trainer.test(module, BATCHES)),
        ("ModuleOf has no test_step", "Define it"),
        lambda: after_fit(lambda trainer, module: trainer.validate(module, BATCHES), evaluates()),
    ),
    # ---------------------------------------------------------------- data
    **{
        name: Case(wrong, message, right)
        for name, wrong, message, right in (
            (
                "a datamodule and a validation loader",
                lambda: fit(evaluates(), data=Data(), val=BATCHES),
                (r"fit\(val_dataloaders=list\)", "either loaders or a datamodule", r"fit\(model, datamodule="),
                lambda: fit(evaluates(), data=BATCHES, val=BATCHES),
            ),
            (
                "a training loader and a datamodule",
                lambda: fit(datamodule=Data()),
                (r"fit\(train_dataloaders=list\)", "either loaders or a datamodule", "datamodule="),
                lambda: fit(data=None, datamodule=Data()),
            ),
            (
                "a datamodule in two places",
                lambda: fit(data=Data(), datamodule=Data()),
                (r"fit\(train_dataloaders=Data\)", "not both"),
                lambda: fit(data=Data()),
            ),
            (
                "a datamodule in the place of the model",
                lambda: fit(Data(), data=ModuleOf()),
                (r"fit\(Data, \.\.\.\)", "the model comes first", r"fit\(model, datamodule\)"),
                lambda: fit(ModuleOf(), data=Data()),
            ),
            (
                "loaders in the place of the model",
                lambda: fit(BATCHES, data=ModuleOf()),
                (r"fit\(list, \.\.\.\)", "the model comes first", r"fit\(model, loader\)"),
                lambda: fit(ModuleOf(), data=BATCHES),
            ),
            (
                "a datamodule alone for a test",
                lambda: after_fit(
                    lambda trainer, module: trainer.test(Data())  # type: ignore[arg-type]
                ),
                (r"test\(Data, \.\.\.\)", "the model comes first"),
                lambda: fit(data=Data()),
            ),
            (
                "the class of a datamodule in the place of loaders",
                lambda: fit(data=Data),
                ("Data is a class", r"Data\(\.\.\.\)"),
                lambda: fit(data=Data()),
            ),
            (
                "a dataset as a datamodule",
                lambda: after_fit(lambda trainer, module: trainer.predict(module, datamodule=Stream(2))),
                (r"predict\(datamodule=Stream\)", "predict_dataloader", r"dataloaders=\.\.\."),
                lambda: after_fit(lambda trainer, module: trainer.predict(module, Stream(2)), predicts()),
            ),
        )
    },
    # ---------------------------------------------------------------- attributes of the trainer
    **{
        f"trainer.{name} = {value!r}": Case(
            lambda name=name, value=value: before_fit(lambda trainer: setattr(trainer, name, value)),  # type: ignore[misc]
            (rf"trainer\.{name} = {re.escape(repr(value))} would change nothing", remedy),
            right,
        )
        for name, value, remedy, right in (
            ("max_epochs", 3, r"Trainer\(max_epochs=", lambda: fit(max_epochs=3)),
            ("limit_val_batches", 0, r"Trainer\(limit_val_batches=", lambda: fit(limit_val_batches=0)),
            ("default_callbacks", True, r"Trainer\(default_callbacks=", lambda: fit(default_callbacks=False)),
            ("current_epoch", 3, "read-only", lambda: after_fit(lambda trainer, module: trainer.current_epoch)),
            ("optimizers", [], "configure_optimizers", lambda: after_fit(lambda trainer, module: trainer.optimizers)),
            ("max_time", "00:01", r"Timer\('00:01'\)", lambda: fit(None, Timer("00:01:00"))),
            ("gradient_clip_val", 0.5, r"GradientClipping\(0\.5\)", lambda: fit(None, GradientClipping(0.5))),
            ("should_stp", True, "Did you mean 'should_stop'", lambda: after_fit(lambda trainer, module: trainer.should_stop)),
            ("my_value", 1, "a subclass of Trainer", lambda: fit()),
        )
    },
    "a callback inserted before others": Case(
        lambda: fit(None, On(train_start=lambda trainer, event: trainer.callbacks.insert(0, GradientClipping(1.0)))),
        ("trainer.callbacks", "in the order in which they were attached", r"Trainer\(callbacks=\[\.\.\.\]\)"),
        lambda: fit(None, On(train_start=lambda trainer, event: trainer.callbacks.append(GradientClipping(1.0)))),
    ),
    "inference_mode='no'": Case(
        lambda: fit(inference_mode="no"),
        (r"Trainer\(inference_mode='no'\)", "True or False"),
        lambda: fit(inference_mode=False),
    ),
    "validate without data": Case(
        lambda: after_fit(lambda trainer, module: trainer.validate(module), evaluates()),
        ("nothing to validate on", "dataloaders=", "val_dataloader"),
        lambda: after_fit(lambda trainer, module: trainer.validate(module, BATCHES), evaluates()),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_refusal_names_the_mistake_and_the_remedy(case: str) -> None:
    check_refusal(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_correct_form_trains(case: str) -> None:
    check_remedy(CASES[case])
