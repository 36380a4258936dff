"""Hyperparameters and loaded checkpoints that are refused, and methods that are None, each beside the form that trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eventtrain import LightningDataModule, LightningModule, Trainer
from eventtrain.callbacks import DistributedDataParallel
from tests.kit import ModuleOf
from tests.misconfigurations import BATCHES, Case, Data, Manual, evaluates, fit, steps


class Saves(ModuleOf):
    """Saves its two arguments, or what a function says."""

    def __init__(self, width: Any = 1, depth: Any = 2, *, save: Callable[[Any], None] | None = None) -> None:
        super().__init__()
        if save is None:
            self.save_hyperparameters("width", "depth")
        else:
            save(self)
        self.built_with = (width, depth)


class Needs(ModuleOf):
    """Saves one of the arguments that it needs."""

    def __init__(self, width: int, net: Any) -> None:
        super().__init__()
        self.save_hyperparameters("width")


class Holds(ModuleOf):
    """Saves an object that it makes of the one that it is given, or that one."""

    def __init__(self, hparams: Any, copied: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters(dict(hparams) if copied else hparams)


class Batches(LightningDataModule):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="size" if size == 3 else None)

    def train_dataloader(self) -> Any:
        return BATCHES


@dataclass
class Config:
    width: int = 1


def saves(*names: Any, **options: Any) -> Trainer:
    return fit(Saves(save=lambda model: model.save_hyperparameters(*names, **options)))


def loaded(model: Any = None, **arguments: Any) -> Trainer:
    """Train a module, load it again from its checkpoint, and train that."""
    model = Saves() if model is None else model
    fit(model).save_checkpoint("m.ckpt")
    return fit(type(model).load_from_checkpoint("m.ckpt", **arguments))


def loaded_data(size: int, /, **arguments: Any) -> Trainer:
    fit(data=None, datamodule=Batches(size)).save_checkpoint("m.ckpt")
    return fit(data=None, datamodule=Batches.load_from_checkpoint("m.ckpt", **arguments))


def with_file(name: str, text: str) -> Trainer:
    Path(name).write_text(text)
    return loaded(hparams_file=name)


def trusting(trusts: bool | None) -> Trainer:
    torch.save({"state_dict": ModuleOf().state_dict(), "hyper_parameters": {"width": Config()}}, "m.ckpt")
    return fit(Saves.load_from_checkpoint("m.ckpt", weights_only=trusts))


def without(name: str, run: Callable[[Any], Trainer]) -> Trainer:
    return run(type("Without", (ModuleOf,), {name: None})())


def evaluate(verb: str, model: Any) -> Any:
    return getattr(fit(), verb)(model, BATCHES)


class Outer(ModuleOf):
    """Optimizes through a module within it."""

    automatic_optimization = False

    def __init__(self, automatic: bool) -> None:
        super().__init__()
        self.automatic_optimization = automatic
        self.child = LightningModule()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.child.optimizers()
        optimizer.zero_grad()
        self.child.manual_backward(self.loss(batch))
        optimizer.step()


def initialized(layer: Any) -> Trainer:
    DistributedDataParallel().check_initialized(nn.Sequential(layer))
    return fit()


CASES: dict[str, Case] = {
    # ---------------------------------------------------------------- save_hyperparameters
    "one unknown name among several": Case(
        lambda: saves("width", "heads"),
        (r"save_hyperparameters\('heads'\)", r"Saves\.__init__", r"\['depth', 'save', 'width'\]"),
        lambda: saves("width", "depth"),
    ),
    "a number as hyperparameters": Case(
        lambda: saves(5), (r"got 5 \(int\)", "names of arguments"), lambda: saves({"width": 5})
    ),
    "a list as hyperparameters": Case(lambda: saves([1]), (r"got \[1\] \(list\)", "mapping"), lambda: saves({"width": [1]})),
    "two objects of hyperparameters": Case(
        lambda: saves({"a": 1}, {"b": 2}),
        (r"save_hyperparameters\(\{'a': 1\}\)", "no such argument"),
        lambda: saves({"a": 1, "b": 2}),
    ),
    "a name beside an object": Case(
        lambda: saves("width", Config()), (r"save_hyperparameters\(Config", "no such argument"), lambda: saves(Config())
    ),
    "a dataclass instead of an object of it": Case(
        lambda: saves(Config), (r"got <class .*Config'>", "dataclass object"), lambda: saves(Config())
    ),
    # ---------------------------------------------------------------- load_from_checkpoint
    "a misspelt override": Case(
        lambda: loaded(widht=3),
        (r"Saves\.load_from_checkpoint\(widht=\.\.\.\)", "no such argument", "Did you mean 'width'"),
        lambda: loaded(width=3),
    ),
    "an unknown override": Case(
        lambda: loaded(optimizer="adam"), (r"optimizer=\.\.\.", "It has width, depth, save"), lambda: loaded(depth=3)
    ),
    "an argument that was not saved": Case(
        lambda: loaded(Needs(3, "net")),
        (
            r"Needs\.__init__ needs net",
            r"\['width'\]",
            r"load_from_checkpoint\(path, net=\.\.\.\)",
            r"save_hyperparameters\(\)",
        ),
        lambda: loaded(Needs(3, "net"), net="net"),
    ),
    "an object that is not the argument": Case(
        lambda: loaded(Holds({"width": 3}, copied=True)),
        (r"Holds\.__init__ needs hparams", r"\['width'\]"),
        lambda: loaded(Holds({"width": 3})),
    ),
    "load_from_checkpoint of an object": Case(
        lambda: Saves().load_from_checkpoint("m.ckpt"),
        ("load_from_checkpoint builds a new object and leaves this Saves as it is", r"model = Saves\.load_from_checkpoint"),
        loaded,
    ),
    "load_from_checkpoint of a datamodule's object": Case(
        lambda: Batches(1).load_from_checkpoint("m.ckpt"),
        ("leaves this Batches as it is", r"Batches\.load_from_checkpoint"),
        lambda: loaded_data(1),
    ),
    "a misspelt override of a datamodule": Case(
        lambda: loaded_data(1, sise=2),
        (r"Batches\.load_from_checkpoint\(sise=\.\.\.\)", "Did you mean 'size'"),
        lambda: loaded_data(1, size=2),
    ),
    "an argument of a datamodule that was ignored": Case(
        lambda: loaded_data(3),
        (r"Batches\.__init__ needs size", r"Batches\.load_from_checkpoint\(path, size="),
        lambda: loaded_data(3, size=1),
    ),
    "a checkpoint that holds code": Case(
        lambda: trusting(None), (r"m\.ckpt is no checkpoint that can be read safely", "plain values"), lambda: trusting(False)
    ),
    "weights of another module in spite of strict_loading": Case(
        lambda: loaded(ModuleOf(strict_loading=False, more=nn.Linear(1, 1)), strict=True),
        ("more", "ModuleOf"),
        lambda: loaded(ModuleOf(strict_loading=False, more=nn.Linear(1, 1)), strict=False),
    ),
    # ---------------------------------------------------------------- hparams_file
    "a file of hyperparameters of another format": Case(
        lambda: with_file("h.toml", "width = 3"),
        (r"hparams_file='h\.toml'", r"\.yaml, \.yml or \.json", "mapping"),
        lambda: with_file("h.yaml", "width: 3"),
    ),
    "a list in a file of hyperparameters": Case(
        lambda: with_file("h.yaml", "- 3"),
        (r"hparams_file='h\.yaml'", "holds a mapping"),
        lambda: with_file("h.yml", "width: 3"),
    ),
    "a file of hyperparameters that is no JSON": Case(
        lambda: with_file("h.json", "{width: 3}"),
        (r"hparams_file='h\.json' cannot be read: JSONDecodeError",),
        lambda: with_file("h.json", '{"width": 3}'),
    ),
    "a file of hyperparameters that is no YAML": Case(
        lambda: with_file("h.yaml", "width: ["),
        (r"hparams_file='h\.yaml' cannot be read: ParserError",),
        lambda: with_file("h.yaml", "width: []"),
    ),
    "an object in a YAML file": Case(
        lambda: with_file("h.yaml", "width: !!python/object:os.system {}"),
        (r"h\.yaml' cannot be read: ConstructorError",),
        lambda: with_file("h.yaml", "width: {}"),
    ),
    "a number as the file of hyperparameters": Case(
        lambda: loaded(hparams_file=3), (r"load_from_checkpoint\(hparams_file=3\)", "path"), lambda: with_file("h.json", "{}")
    ),
    # ---------------------------------------------------------------- None for a method
    "training_step = None": Case(lambda: without("training_step", fit), ("Without has no training_step", "Define it"), fit),
    "configure_optimizers = None": Case(
        lambda: without("configure_optimizers", fit), ("Without has no configure_optimizers", "return an optimizer"), fit
    ),
    "train_dataloader = None": Case(
        lambda: fit(data=None, datamodule=type("Empty", (Data,), {"train_dataloader": None})()),
        ("nothing to train on", "train_dataloader"),
        lambda: fit(data=None, datamodule=Data()),
    ),
    **{
        f"{stage}_step = None": Case(
            partial(without, f"{stage}_step", partial(evaluate, verb)),
            (f"Without has no {stage}_step",),
            lambda: fit(evaluates(), val=BATCHES),
        )
        for stage, verb in (("validation", "validate"), ("test", "test"))
    },
    # ---------------------------------------------------------------- modules within modules
    "a child that runs backward in an automatic run": Case(
        lambda: fit(Outer(automatic=True)),
        (r"LightningModule\.manual_backward", "automatic optimization", r"self\.automatic_optimization = False"),
        lambda: fit(Outer(automatic=False)),
    ),
    "a child without a trainer": Case(
        lambda: Outer(automatic=False).child.optimizers(),
        ("LightningModule is not attached to a trainer", "fit"),
        lambda: fit(Manual(steps)),
    ),
    "lazy weights in several processes": Case(
        lambda: initialized(nn.LazyLinear(1)),
        (r"DistributedDataParallel: 0\.weight of Sequential is not initialized", "configure_model"),
        lambda: initialized(nn.Linear(1, 1)),
    ),
}
