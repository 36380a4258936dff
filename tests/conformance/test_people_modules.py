"""Class attributes, modules within modules, batches and hyperparameters: the same source in both frameworks."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections import OrderedDict, defaultdict
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import eventtrain
from eventtrain.data.device import move_to_device

from .frameworks import Settings, assert_same, lightning, train_ours, train_theirs
from .test_parity import regression

BASES = [eventtrain.LightningModule, lightning.LightningModule]


def manual_step(self: Any, batch: torch.Tensor, batch_idx: int) -> None:
    optimizer = self.optimizers()
    optimizer.zero_grad()
    loss = self.loss(batch)
    self.manual_backward(loss)
    optimizer.step()
    self.log("loss", loss)


# ------------------------------------------------------------------ class attributes and None


def test_a_property_declares_manual_optimization() -> None:
    manual = property(lambda self: False)
    assert_same(lambda base: regression(base, automatic_optimization=manual, training_step=manual_step), Settings())


def test_an_example_input_as_a_property() -> None:
    example = property(lambda self: torch.ones(1, 3))
    outcome = assert_same(lambda base: regression(base, example_input_array=example), Settings())
    assert outcome.module.example_input_array.shape == (1, 3)


@pytest.mark.parametrize("name", ["val_dataloader", "test_dataloader", "predict_dataloader"])
def test_a_loader_that_is_none(name: str) -> None:
    def make(base: type) -> Any:
        module = regression(base)
        setattr(module, name, None)
        return module

    assert_same(make, Settings(validate=True))


# ------------------------------------------------------------------ modules within modules


def test_a_child_knows_the_run() -> None:
    def make(base: Any) -> Any:
        class Child(base):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 1)
                self.seen: list[Any] = []

            def forward(self, batch: torch.Tensor) -> torch.Tensor:
                self.seen.append((self.current_epoch, self.global_step, str(self.device)))
                output: torch.Tensor = self.layer(batch)
                return output

            def on_train_start(self) -> None:
                raise AssertionError("hooks are those of the outer module")

        def step(self: Any, batch: torch.Tensor, batch_idx: int) -> Any:
            loss = self.layer(batch).pow(2).mean()
            self.journal = self.layer.seen
            return loss

        module = regression(base, training_step=step)
        torch.manual_seed(3)
        module.layer = Child()
        return module

    assert len(assert_same(make, Settings()).journal) == 12  # a child's self.log is an error in Lightning


def test_without_a_trainer_there_is_no_logger() -> None:
    for base in BASES:
        module: Any = base()
        assert module.logger is None and module.loggers == []
        assert (module.current_epoch, module.global_step) == (0, 0)


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize(
    "batch",
    [
        defaultdict(list, x=[torch.ones(1)]),
        OrderedDict(x=torch.ones(1)),
        (torch.ones(1), "name"),
        pack_sequence([torch.ones(2, 1), torch.ones(1, 1)]),
        [{"x": torch.ones(1), "n": 3}],
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_batches_move_alike(batch: Any) -> None:
    meta = torch.device("meta")
    mine, theirs = move_to_device(batch, meta), lightning.LightningModule().transfer_batch_to_device(batch, meta, 0)
    assert type(mine) is type(theirs) and repr(mine) == repr(theirs)


def test_a_true_half_module_is_like_lightnings_plugin() -> None:
    here = train_ours(lambda base: regression(base).bfloat16(), Settings())
    there = train_theirs(regression, Settings(options={"precision": "bf16-true"}))
    for mine, theirs in zip(here.parameters, there.parameters, strict=True):
        assert mine.dtype is theirs.dtype is torch.bfloat16
        assert torch.equal(mine, theirs)


# ------------------------------------------------------------------ hyperparameters


def hparams_of(base: Any) -> list[dict[Any, Any]]:
    """Return the hyperparameters of several classes, each with other arguments."""
    results: list[dict[Any, Any]] = []

    class All(base):  # type: ignore[misc]
        def __init__(self, width: int, lr: float = 0.1, **options: Any) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Names(base):  # type: ignore[misc]
        def __init__(self, width: int, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters("lr")

    class Ignores(All):
        def __init__(self, width: int, net: Any, depth: int = 2) -> None:
            super().__init__(width)
            self.save_hyperparameters(ignore="net")

    class Holds(base):  # type: ignore[misc]
        def __init__(self, hparams: Any) -> None:
            super().__init__()
            self.save_hyperparameters(hparams)

    for module in (All(3, bias=True), Names(3), Ignores(3, None), Holds({"a": 1}), Holds(Namespace(a=1)), Holds({})):
        results.append(dict(module.hparams))
    return results


def test_the_same_hyperparameters_are_saved() -> None:
    ours, theirs = map(hparams_of, BASES)
    assert ours == theirs


def built(kind: Any, hparams: Any, base: type) -> Any:
    return kind(hparams)


@pytest.mark.parametrize("hparams", [{"width": 3}, Namespace(width=3)], ids=["dict", "namespace"])
def test_one_object_of_hyperparameters_loads_again(hparams: Any, tmp_path: Any) -> None:
    def make(base: Any) -> Any:
        class Holds(base):  # type: ignore[misc]
            def __init__(self, hparams: Any) -> None:
                super().__init__()
                self.save_hyperparameters(hparams)
                self.layer = nn.Linear(3, self.hparams.width)

            def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
                return self.layer(batch).pow(2).mean()

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        return Holds

    loaded = []
    for base, train in zip(BASES, (train_ours, train_theirs), strict=True):
        kind = make(base)
        outcome = train(partial(built, kind, hparams), Settings(epochs=1))
        path = tmp_path / f"{train.__name__}.ckpt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome.trainer.save_checkpoint(path)
            loaded.append(kind.load_from_checkpoint(path, **({} if base is BASES[0] else {"weights_only": False})))
            overridden = kind.load_from_checkpoint(path, strict=False, weights_only=False, hparams=type(hparams)(width=3))
        assert overridden.layer.out_features == 3
        assert torch.equal(loaded[-1].layer.weight, outcome.module.layer.weight)
    assert dict(loaded[0].hparams) == dict(loaded[1].hparams) == {"width": 3}


def test_the_checkpoint_has_lightnings_keys() -> None:
    for name in ("KEY", "NAME", "TYPE"):
        for ours, theirs in (
            (eventtrain.LightningModule, lightning.LightningModule),
            (eventtrain.LightningDataModule, lightning.LightningDataModule),
        ):
            attribute = f"CHECKPOINT_HYPER_PARAMS_{name}"
            assert getattr(ours, attribute) == getattr(theirs, attribute)
