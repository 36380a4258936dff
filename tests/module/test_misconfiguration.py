"""Modules, hooks and hyperparameters that are refused, each beside the nearest form that trains."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from tests.kit import ModuleOf
from tests.misconfigurations import (
    BATCHES,
    Case,
    Data,
    after_fit,
    check_refusal,
    check_remedy,
    evaluates,
    fit,
    hooked,
    manual,
    returns,
    steps,
)
from tests.module.misconfigured_hparams import CASES as HPARAMS

pytestmark = pytest.mark.usefixtures("in_tmp_path")


class Hyper(ModuleOf):
    def __init__(self, width: Any, keep: Any = ()) -> None:
        super().__init__()
        self.save_hyperparameters(*keep)


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


class NeverBuilt(ModuleOf):
    def __init__(self) -> None:
        self.rate = 0.1


def method(name: str, *parameters: str) -> dict[str, Any]:
    """Return a method with these parameters, by its name."""
    namespace: dict[str, Any] = {}
    exec(f"def {name}({', '.join(('self', *parameters))}): return None", namespace)
    return {name: namespace[name]}


def data_with(**methods: Any) -> Any:
    return type("WithMethods", (Data,), methods)()


def step_of(*parameters: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(f"def training_step({', '.join(('self', *parameters))}): return self.loss(batch)", namespace)
    return {"training_step": namespace["training_step"]}


CASES |= {
    # ---------------------------------------------------------------- hooks that nobody calls
    **{
        f"a module's {name}": Case(
            lambda name=name, parameters=parameters: hooked(**method(name, *parameters)),  # type: ignore[misc]
            (rf"Hooked\.{name} is never called", message),
            right,
        )
        for name, parameters, message, right in (
            (
                "training_epoch_end",
                ["outputs"],
                r"def on_train_epoch_end\(self\)",
                lambda: hooked(**method("on_train_epoch_end")),
            ),
            ("validation_epoch_end", ["outputs"], r"def on_validation_epoch_end\(self\)", fit),
            ("test_epoch_end", ["outputs"], r"def on_test_epoch_end\(self\)", fit),
            ("training_step_end", ["outputs"], "training_step", lambda: hooked(**step_of("batch"))),
            ("validation_step_end", ["outputs"], "validation_step", fit),
            ("on_epoch_start", [], "on_train_epoch_start", lambda: hooked(**method("on_train_epoch_start"))),
            ("on_epoch_end", [], "on_train_epoch_end", lambda: hooked(**method("on_train_epoch_end"))),
            (
                "on_batch_start",
                ["batch"],
                r"on_train_batch_start\(self, batch, batch_idx\)",
                lambda: hooked(**method("on_train_batch_start", "batch", "batch_idx")),
            ),
            ("on_batch_end", [], r"on_train_batch_end\(self, outputs, batch", fit),
            ("on_sanity_check_start", [], r"self\.trainer\.sanity_checking", fit),
            ("on_pretrain_routine_start", [], "on_fit_start", lambda: hooked(**method("on_fit_start"))),
            ("on_train_dataloader", [], "on_prepare_loader", lambda: hooked(**method("on_prepare_loader", "event"))),
            ("tbptt_split_batch", ["batch", "split_size"], "automatic_optimization = False", fit),
            ("get_progress_bar_dict", [], "prog_bar=True", fit),
            ("configure_sharded_model", [], r"configure_model\(self\)", lambda: hooked(**method("configure_model"))),
            ("valid_step", ["batch", "batch_idx"], "Rename it to validation_step", lambda: fit(evaluates())),
            ("val_step", ["batch", "batch_idx"], "Rename it to validation_step", lambda: fit(evaluates(val_step=print))),
            ("testing_step", ["batch"], "Rename it to test_step", lambda: hooked(**method("test_step", "batch"))),
        )
    },
    "a step that was assigned to the object": Case(
        lambda: fit(ModuleOf(validation_epoch_end=lambda outputs: None)),
        (r"ModuleOf\.validation_epoch_end is never called", "on_validation_epoch_end"),
        lambda: fit(ModuleOf(on_validation_epoch_end=lambda: None)),
    ),
    "a datamodule's hook that nobody calls": Case(
        lambda: fit(data=None, datamodule=data_with(on_train_dataloader=lambda self: None)),
        (r"WithMethods\.on_train_dataloader is never called", r"train_dataloader\(self\)"),
        lambda: fit(data=None, datamodule=data_with()),
    ),
    "a misspelt training loader": Case(
        lambda: fit(type("Loads", (ModuleOf,), {"train_dataloaders": lambda self: BATCHES})(), data=None),
        (r"Loads\.train_dataloaders is never called", "Rename it to train_dataloader"),
        lambda: fit(type("Loads", (ModuleOf,), {"train_dataloader": lambda self: BATCHES})(), data=None),
    ),
    "a misspelt validation loader of a datamodule": Case(
        lambda: after_fit(
            lambda trainer, module: trainer.validate(module, datamodule=data_with(valid_loader=BATCHES)), evaluates()
        ),
        ("nothing to validate on", r"WithMethods\.valid_loader is never called", "Rename it to val_dataloader"),
        lambda: after_fit(
            lambda trainer, module: trainer.validate(module, datamodule=data_with(val_dataloader=lambda self: BATCHES)),
            evaluates(),
        ),
    ),
    # ---------------------------------------------------------------- signatures of older versions
    **{
        f"{name}({', '.join(parameters)})": Case(
            lambda name=name, parameters=parameters: hooked(**method(name, *parameters)),  # type: ignore[misc]
            (rf"Hooked\.{name}\(.*does not fit\. Write `def {name}\({form}\):`", message),
            right,
        )
        for name, parameters, form, message, right in (
            (
                "optimizer_step",
                ["epoch", "batch_idx", "optimizer", "optimizer_idx", "optimizer_closure", "on_tpu", "using_lbfgs"],
                "self, epoch, batch_idx, optimizer, optimizer_closure",
                "automatic_optimization = False",
                fit,
            ),
            (
                "optimizer_step",
                ["epoch", "batch_idx", "optimizer", "optimizer_idx", "optimizer_closure=None"],
                "self, epoch, batch_idx, optimizer, optimizer_closure",
                "stepped by hand",
                fit,
            ),
            (
                "lr_scheduler_step",
                ["scheduler", "optimizer_idx", "metric"],
                "self, scheduler, metric",
                "stepped by hand",
                lambda: hooked(**method("lr_scheduler_step", "scheduler", "metric")),
            ),
            (
                "configure_gradient_clipping",
                ["optimizer", "optimizer_idx", "gradient_clip_val", "gradient_clip_algorithm"],
                "self, optimizer, gradient_clip_val, gradient_clip_algorithm",
                "stepped by hand",
                lambda: hooked(**method("configure_gradient_clipping", "optimizer", "value", "algorithm")),
            ),
            ("backward", ["loss", "optimizer", "optimizer_idx"], "self, loss", "stepped by hand", fit),
            ("optimizer_zero_grad", ["optimizer"], "self, epoch, batch_idx, optimizer", "", fit),
            ("setup", [], "self, stage", "", lambda: hooked(**method("setup", "stage=None"))),
            ("prepare_data", ["stage"], "self", "", lambda: hooked(**method("prepare_data"))),
            (
                "configure_optimizers",
                ["lr"],
                "self",
                "",
                lambda: manual(lambda model, optimizer, batch: steps(model, optimizer, batch)),
            ),
            ("transfer_batch_to_device", ["batch", "device"], "self, batch, device, dataloader_idx", "", fit),
            ("on_train_epoch_end", ["outputs"], "self", "list of the module", lambda: hooked(**method("on_train_epoch_end"))),
            ("on_validation_epoch_end", ["outputs"], "self", "list of the module", fit),
            ("on_train_batch_start", ["batch", "batch_idx", "unused"], "self, batch, batch_idx", "Leave it out", fit),
            ("on_train_start", ["trainer", "pl_module"], "self", r"The trainer is `self\.trainer`\. The module is `self`", fit),
            ("on_before_optimizer_step", ["optimizer", "optimizer_idx"], "self, optimizer", "stepped by hand", fit),
        )
    },
    "a training_step with optimizer_idx": Case(
        lambda: hooked(**step_of("batch", "batch_idx", "optimizer_idx")),
        (r"Hooked\.training_step\(.*Write `def training_step\(self, batch, batch_idx\):`", r"self\.optimizers\(\)"),
        lambda: hooked(**step_of("batch", "batch_idx")),
    ),
    "a training_step with an optional optimizer_idx": Case(
        lambda: hooked(**step_of("batch", "batch_idx", "optimizer_idx=None")),
        (r"Hooked\.training_step\(", "automatic_optimization = False"),
        lambda: hooked(**step_of("batch")),
    ),
    "a datamodule's setup without a stage": Case(
        lambda: fit(data=None, datamodule=data_with(**method("setup"))),
        (r"WithMethods\.setup\(\) does not fit", r"def setup\(self, stage\):"),
        lambda: fit(data=None, datamodule=data_with(**method("setup", "stage"))),
    ),
    "a datamodule's loader with an argument": Case(
        lambda: fit(data=None, datamodule=data_with(**method("train_dataloader", "epoch"))),
        (r"WithMethods\.train_dataloader\(epoch\) does not fit", r"def train_dataloader\(self\):"),
        lambda: fit(data=None, datamodule=data_with()),
    ),
    "a module whose __init__ does not call super": Case(
        lambda: fit(NeverBuilt()), (r"NeverBuilt\.__init__ does not call `super\(\)\.__init__\(\)`",), fit
    ),
    **HPARAMS,
}


@pytest.mark.parametrize("case", CASES)
def test_the_refusal_names_the_mistake_and_the_remedy(case: str) -> None:
    check_refusal(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_correct_form_trains(case: str) -> None:
    check_remedy(CASES[case])
