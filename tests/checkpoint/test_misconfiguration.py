"""Checkpoints that are refused, each beside the nearest form that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiplicativeLR, StepLR

from eventtrain import Callback, LightningDataModule, Trainer
from eventtrain.callbacks import LRSchedulerStepping, ModelCheckpoint
from tests.kit import ModuleOf
from tests.misconfigurations import BATCHES, Case, check_refusal, check_remedy, fit

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def resumed(content: Any) -> Trainer:
    torch.save(content, "resumed.pt")
    return fit(ckpt_path="resumed.pt")


def at_start() -> Any:
    """Return a checkpoint that was written before the first batch."""

    class Saves(Callback):
        def on_train_start(self, trainer: Any, event: Any) -> None:
            trainer.save_checkpoint("start.pt")

    fit(None, Saves())
    return torch.load("start.pt", weights_only=True)


class Two(ModuleOf):
    """Two parameters, and a function that makes optimizers and schedulers of them."""

    def __init__(self, configure: Callable[[Any], Any], extra: int = 0) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(1))
        self.configure = configure
        for index in range(extra):
            setattr(self, f"extra{index}", nn.Parameter(torch.zeros(1)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) + (self.v * batch).sum()

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def both(kind: Any, **options: Any) -> Callable[[Any], Any]:
    return lambda module: kind([module.w, module.v], lr=0.1, **options)


def scheduled(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def configure(module: Any) -> Any:
        optimizer = SGD([module.w, module.v], lr=0.1)
        return [optimizer], [make(optimizer)]

    return configure


def groups(*names: str, kind: Any = SGD) -> Callable[[Any], Any]:
    """Return a function that makes an optimizer with these groups, such as ``"w"`` or ``"wv"``."""
    return lambda module: kind([{"params": [getattr(module, name) for name in group]} for group in names], lr=0.1)


def manually(configure: Callable[[Any], Any]) -> Any:
    def training_step(batch: Any, batch_idx: int) -> None:
        module.manual_backward(module.loss(batch))
        for optimizer in module.optimizers() if isinstance(module.optimizers(), list) else [module.optimizers()]:
            optimizer.step()

    module = Two(configure)
    module.automatic_optimization = False
    module.training_step = training_step  # type: ignore[method-assign]
    return module


def switched(before: Any, after: Any, edit: Callable[[Any], Any] = lambda content: content) -> Trainer:
    """Save a checkpoint in a run of one module, and resume it with another one.

    Args:
        before: The module that writes it, or its ``configure_optimizers``.
        after: The same for the module that resumes it.
        edit: Changes the checkpoint.
    """

    class Saves(Callback):
        def on_take_checkpoint(self, trainer: Any, event: Any) -> None:
            if trainer.total_batch_idx == 0:
                trainer.save_checkpoint("start.pt")

    modules = [module if isinstance(module, ModuleOf) else Two(module) for module in (before, after)]
    fit(modules[0], Saves(), LRSchedulerStepping())
    torch.save(edit(torch.load("start.pt", weights_only=True)), "resumed.pt")
    return fit(modules[1], LRSchedulerStepping(), ckpt_path="resumed.pt")


def same(configure: Callable[[Any], Any], edit: Callable[[Any], Any] = lambda content: content) -> Trainer:
    """Resume a checkpoint with the configure_optimizers that wrote it."""
    return switched(configure, configure, edit)


def second_schema(content: Any) -> Any:
    return {**content, "schema_version": 2}


def half(step: int) -> float:
    return 0.5


def without_functions(content: Any) -> Any:
    del content["lr_schedulers"][0]["lr_lambdas"]
    return content


def with_two_functions(content: Any) -> Any:
    content["lr_schedulers"][0]["lr_lambdas"].append(None)
    return content


class AddsGroup(Two):
    """Adds a group that is not one of its parameters."""

    def on_train_start(self) -> None:
        self.optimizers().add_param_group({"params": [torch.zeros(1, requires_grad=True)]})


def kept(module: Any = None, *callbacks: Any, **options: Any) -> Trainer:
    return fit(module, ModelCheckpoint(), *callbacks, **options)


def adds(key: str, value: Any) -> Any:
    def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[key] = value

    return type("Adds", (ModuleOf,), {"on_save_checkpoint": on_save_checkpoint})()


def data_adds(value: Any) -> Any:
    def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["split"] = value

    methods = {"on_save_checkpoint": on_save_checkpoint, "train_dataloader": lambda self: BATCHES}
    return type("Data", (LightningDataModule,), methods)()


class Remembers(Callback):
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}


class Point:
    """A class of a user."""


def with_weights(edit: Callable[[dict[str, Any]], Any]) -> Trainer:
    content = at_start()
    return resumed({**content, "state_dict": edit(content["state_dict"])})


CASES: dict[str, Case] = {
    "ckpt_path='last' with nothing that keeps checkpoints": Case(
        lambda: fit(ckpt_path="last"), ("ckpt_path='last'", "keeps checkpoints", "path"), lambda: resumed(at_start())
    ),
    "a file that is no checkpoint": Case(
        lambda: resumed({"weights": 1}), (r"resumed\.pt", "no checkpoint", "state_dict"), lambda: resumed(at_start())
    ),
    "a checkpoint of another version": Case(
        lambda: resumed({**at_start(), "schema_version": 99}), ("schema version 99", "version"), lambda: resumed(at_start())
    ),
    "a checkpoint of other optimizers": Case(
        lambda: resumed({**at_start(), "optimizer_states": []}),
        ("0 optimizer_states", "returned 1", "load_from_checkpoint"),
        lambda: resumed(at_start()),
    ),
    # optimizers
    "Adam's state for an SGD": Case(
        lambda: switched(both(Adam), both(SGD)),
        (r"resumed\.pt holds optimizer_states of Adam", "returned SGD", "load_from_checkpoint"),
        lambda: switched(both(Adam), both(Adam)),
    ),
    "an SGD's state for Adam": Case(
        lambda: switched(both(SGD), both(Adam)),
        ("optimizer_states of SGD", "returned Adam"),
        lambda: switched(both(SGD), both(SGD)),
    ),
    "Adam's state for AdamW, which would decay the weights as Adam does": Case(
        lambda: switched(both(Adam), both(AdamW)), ("of Adam, .* returned AdamW",), lambda: switched(both(AdamW), both(AdamW))
    ),
    "the state of an SGD of the second schema for Adam": Case(
        lambda: switched(both(SGD), both(Adam), second_schema),
        ("another optimizer than Adam", "'betas'"),
        lambda: switched(both(SGD), both(SGD), second_schema),
    ),
    "the state of RMSprop of the second schema for an SGD": Case(
        lambda: switched(both(RMSprop), both(SGD), second_schema),
        ("another optimizer than SGD", "'dampening'"),
        lambda: switched(both(SGD), both(SGD, momentum=0.9), second_schema),
    ),
    "two optimizers in another order": Case(
        lambda: switched(
            manually(lambda module: [SGD([module.w], lr=0.1), Adam([module.v])]),
            manually(lambda module: [Adam([module.v]), SGD([module.w], lr=0.1)]),
        ),
        ("of SGD, Adam, .* returned Adam, SGD",),
        lambda: switched(
            manually(lambda module: [SGD([module.w], lr=0.1), Adam([module.v])]),
            manually(lambda module: [SGD([module.w], lr=0.1), Adam([module.v])]),
        ),
    ),
    "one optimizer instead of two": Case(
        lambda: switched(manually(lambda module: [SGD([module.w], lr=0.1), SGD([module.v], lr=0.1)]), manually(groups("wv"))),
        ("2 optimizer_states and configure_optimizers returned 1",),
        lambda: switched(manually(groups("wv")), manually(groups("wv"))),
    ),
    # parameter groups
    "two groups for a state of one": Case(
        lambda: switched(groups("wv"), groups("w", "v")),
        (r"sizes \[2\]", r"sizes \[1, 1\], or another order"),
        lambda: switched(groups("w", "v"), groups("w", "v")),
    ),
    "one group for a state of two": Case(
        lambda: switched(groups("w", "v"), groups("wv")), (r"\[1, 1\]", r"\[2\]"), lambda: switched(groups("wv"), groups("wv"))
    ),
    "more parameters than the state has": Case(
        lambda: switched(groups("w"), groups("wv")), ("only here 'v'",), lambda: switched(groups("w"), groups("w"))
    ),
    "fewer parameters than the state has": Case(
        lambda: switched(groups("wv"), groups("w")), ("only there 'v'",), lambda: switched(groups("wv"), groups("wv"))
    ),
    "other parameters than the state has": Case(
        lambda: switched(groups("w"), groups("v")),
        ("only there 'w', only here 'v'",),
        lambda: switched(groups("v"), groups("v")),
    ),
    "groups in another order": Case(
        lambda: switched(groups("w", "v"), groups("v", "w")),
        ("another order",),
        lambda: switched(groups("v", "w"), groups("v", "w")),
    ),
    "parameters in another order": Case(
        lambda: switched(groups("wv", kind=Adam), groups("vw", kind=Adam)),
        ("the state of Adam", "another order"),
        lambda: switched(groups("vw", kind=Adam), groups("vw", kind=Adam)),
    ),
    "another number of groups for a state of the second schema": Case(
        lambda: switched(groups("wv"), groups("w", "v"), second_schema),
        (r"resumed\.pt holds a state that does not fit SGD \(ValueError: .*number of parameter groups",),
        lambda: switched(groups("wv"), groups("wv"), second_schema),
    ),
    "a group that was added with a tensor of no module": Case(
        lambda: switched(AddsGroup(both(SGD)), Two(both(SGD))),
        ("parameter groups with None", "Two has no such parameters"),
        lambda: switched(both(SGD), both(SGD)),
    ),
    # schedulers
    "another scheduler": Case(
        lambda: switched(
            scheduled(lambda optimizer: StepLR(optimizer, 2)), scheduled(lambda optimizer: CosineAnnealingLR(optimizer, 9))
        ),
        ("lr_schedulers of StepLR", "returned CosineAnnealingLR"),
        lambda: same(scheduled(lambda optimizer: CosineAnnealingLR(optimizer, 9))),
    ),
    "no scheduler for a state of one": Case(
        lambda: switched(scheduled(lambda optimizer: StepLR(optimizer, 2)), both(SGD)),
        ("1 lr_schedulers and configure_optimizers returned 0",),
        lambda: same(scheduled(lambda optimizer: StepLR(optimizer, 2))),
    ),
    "a scheduler whose state is of another form": Case(
        lambda: same(scheduled(lambda optimizer: LambdaLR(optimizer, half)), without_functions),
        ("a state that does not fit LambdaLR", "KeyError: 'lr_lambdas'"),
        lambda: same(scheduled(lambda optimizer: LambdaLR(optimizer, half))),
    ),
    "functions that the run added to a scheduler of which they cannot be known": Case(
        lambda: same(scheduled(lambda optimizer: MultiplicativeLR(optimizer, half)), with_two_functions),
        ("a MultiplicativeLR to which the run added functions", "on_load_checkpoint"),
        lambda: same(scheduled(lambda optimizer: MultiplicativeLR(optimizer, half))),
    ),
    # weights and files
    "weights of another shape": Case(
        lambda: with_weights(lambda weights: {"w": torch.zeros(3)}),
        (
            r"resumed\.pt is a checkpoint of another module than ModuleOf",
            r"'w' has the shape \(3,\) in it and \(1,\)",
            "hyperparameters",
        ),
        lambda: with_weights(lambda weights: weights),
    ),
    "weights that lack one": Case(
        lambda: with_weights(lambda weights: {}), ("lacks 'w'", "strict_loading = False"), lambda: with_weights(dict)
    ),
    "more weights than the module has": Case(
        lambda: with_weights(lambda weights: {**weights, "v": torch.zeros(1)}),
        ("has 'v', which the module does not have", "strict_loading = False"),
        lambda: with_weights(dict),
    ),
    "weights with a prefix": Case(
        lambda: with_weights(lambda weights: {"model.w": weights["w"]}),
        ("begin with 'model\\.'", "on_load_checkpoint"),
        lambda: with_weights(dict),
    ),
    "a bare state_dict": Case(
        lambda: resumed(ModuleOf().state_dict()),
        ("bare state_dict", "'w'", r"module\.load_state_dict"),
        lambda: resumed(at_start()),
    ),
    "weights under another key": Case(
        lambda: resumed({"model": ModuleOf().state_dict()}),
        ("only 'model'", "{'state_dict': ...}"),
        lambda: resumed(at_start()),
    ),
    "a file that holds a class of a user": Case(
        lambda: resumed({**at_start(), "point": Point()}),
        (r"holds a tests\.checkpoint\.test_misconfiguration\.Point", "no code", "weights_only=False"),
        lambda: resumed(at_start()),
    ),
    "a checkpoint of Lightning": Case(
        lambda: resumed({"state_dict": ModuleOf().state_dict(), "pytorch-lightning_version": "2.6.6"}),
        (r"resumed\.pt was written by Lightning 2\.6\.6", "load_from_checkpoint"),
        lambda: resumed(at_start()),
    ),
    "a folder": Case(lambda: (at_start(), fit(ckpt_path="."))[1], ("is a folder", "'start.pt'"), lambda: resumed(at_start())),
    # values that no file can hold
    "an object that on_save_checkpoint adds": Case(
        lambda: kept(adds("point", Point())),
        (r"checkpoint\['point'\] is a .*Point", "Convert it"),
        lambda: kept(adds("point", [1])),
    ),
    "a function that on_save_checkpoint adds": Case(
        lambda: kept(adds("name", {"of": [len]})),
        (r"checkpoint\['name'\]\['of'\]\[0\] is a builtins\.builtin",),
        lambda: kept(adds("name", {"of": ["len"]})),
    ),
    "an object that on_save_checkpoint of a datamodule adds": Case(
        lambda: kept(datamodule=data_adds(Point()), data=None),
        (r"checkpoint\['split'\] is a .*Point",),
        lambda: kept(datamodule=data_adds({"train": 0.8}), data=None),
    ),
    "an object in the state of a callback": Case(
        lambda: kept(None, Remembers(Point())),
        (r"checkpoint\['callbacks'\]\['Remembers'\]\['value'\] is a .*Point",),
        lambda: kept(None, Remembers(1)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_refusal_names_the_mistake_and_the_remedy(case: str) -> None:
    check_refusal(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_correct_form_trains(case: str) -> None:
    check_remedy(CASES[case])
