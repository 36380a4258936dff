"""Checkpoints that are refused, each beside the nearest form that trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eventtrain import Callback, Trainer
from tests.misconfigurations import Case, check_refusal, check_remedy, fit

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
}


@pytest.mark.parametrize("case", CASES)
def test_the_refusal_names_the_mistake_and_the_remedy(case: str) -> None:
    check_refusal(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_correct_form_trains(case: str) -> None:
    check_remedy(CASES[case])
