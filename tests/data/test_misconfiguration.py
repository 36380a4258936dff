"""Loaders that are refused, each beside the nearest form that trains."""

from __future__ import annotations

import pytest

from eventtrain import Trainer
from tests.misconfigurations import BATCHES, Case, Data, Stream, after_fit, check_refusal, check_remedy, evaluates, fit

pytestmark = pytest.mark.usefixtures("in_tmp_path")


CASES: dict[str, Case] = {
    "no loader": Case(
        lambda: fit(data=None), ("nothing to train on", "train_dataloaders=", "train_dataloader"), lambda: fit(data=BATCHES)
    ),
    "several training loaders": Case(
        lambda: fit(data=[Stream(2), Stream(2)]), ("several training loaders", "ConcatDataset"), lambda: fit(data=Stream(2))
    ),
    "a loader that cannot be iterated": Case(
        lambda: fit(data=5), ("training loader", r"5 \(int\)", "DataLoader"), lambda: fit(data=BATCHES)
    ),
    "a datamodule in the place of the validation loader": Case(
        lambda: fit(evaluates(), val=Data()),
        (r"fit\(val_dataloaders=Data\)", "either loaders or a datamodule", "datamodule="),
        lambda: fit(data=Data()),
    ),
    "a validation loader that cannot be iterated": Case(
        lambda: fit(evaluates(), val=5), ("validation", "5", "iterated|DataLoader"), lambda: fit(evaluates(), val=BATCHES)
    ),
    "a test loader that cannot be iterated": Case(
        lambda: Trainer(max_epochs=1, device="cpu").test(evaluates(test_step=lambda self, batch, i: None), 5),
        ("test", "5", "iterated|DataLoader"),
        lambda: after_fit(
            lambda trainer, module: trainer.test(module, BATCHES), evaluates(test_step=lambda self, batch, i: None)
        ),
    ),
    "a loader shorter than its length": Case(
        lambda: fit(data=Stream(2, says=3)),
        ("Stream", "3 batches", "ended after 2", "__len__"),
        lambda: fit(data=Stream(2, says=2)),
    ),
    "a loader longer than its length": Case(
        lambda: fit(data=Stream(3, says=2)), ("Stream", "2 batches", "has more", "__len__"), lambda: fit(data=Stream(3, says=3))
    ),
    "a loader without batches and without an end": Case(
        lambda: fit(data=Stream(0), max_epochs=None, max_steps=3),
        ("Stream", "no batch in epoch 0", "iterated anew"),
        lambda: fit(data=Stream(2), max_epochs=None, max_steps=3),
    ),
    "an iterator that is used up": Case(
        lambda: fit(data=iter(BATCHES), max_epochs=None, max_steps=9),
        ("list_iterator", "no batch in epoch 1", "used up"),
        lambda: fit(data=BATCHES, max_epochs=None, max_steps=9),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_refusal_names_the_mistake_and_the_remedy(case: str) -> None:
    check_refusal(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_correct_form_trains(case: str) -> None:
    check_remedy(CASES[case])
