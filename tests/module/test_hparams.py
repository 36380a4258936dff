"""Hyperparameters are saved from the arguments of ``__init__``, or from an object that holds them."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import pytest

from eventtrain import LightningModule
from eventtrain.errors import MisconfigurationError


@dataclass
class Options:
    width: int = 3
    lr: float = 0.1


@pytest.mark.parametrize("values", [{"width": 3, "lr": 0.1}, Options(), Namespace(width=3, lr=0.1)])
def test_one_object_that_holds_them(values: Any) -> None:
    module = LightningModule()
    module.save_hyperparameters(values, ignore="lr")
    assert module.hparams == {"width": 3}


def test_an_object_that_holds_none_is_refused() -> None:
    with pytest.raises(MisconfigurationError, match=r"save_hyperparameters got 5 \(int\)"):
        LightningModule().save_hyperparameters(5)


def test_keyword_arguments_and_those_of_a_subclass_are_among_them() -> None:
    class Base(LightningModule):
        def __init__(self, width: int, **options: Any) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Wider(Base):
        def __init__(self, width: int, factor: int) -> None:
            super().__init__(width * factor, bias=False)

    assert Base(3, bias=True).hparams == {"width": 3, "bias": True}
    assert Wider(3, 2).hparams == {"width": 3, "factor": 2, "bias": False}
