"""Loaders that are refused, each beside the nearest form that trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from eventtrain import CombinedLoader, Trainer
from eventtrain.callbacks import GradientAccumulation
from tests.kit import ModuleOf
from tests.misconfigurations import BATCHES, Case, Data, Stream, after_fit, check_refusal, check_remedy, evaluates, fit

pytestmark = pytest.mark.usefixtures("in_tmp_path")


LOADER = DataLoader(torch.ones(4, 1), batch_size=1)  # type: ignore[arg-type, var-annotated]
EMPTY_FORMS: list[Any] = [{}, [], (), {"a": {}}]
EMPTY = DataLoader(torch.ones(3, 1), batch_size=4, drop_last=True)  # type: ignore[arg-type, var-annotated]


def fit_any(data: Any, **arguments: Any) -> Trainer:
    """Train a module on batches of any form."""
    model = ModuleOf()
    model.training_step = lambda batch, batch_idx: model.w.sum()  # type: ignore[method-assign]
    return fit(model, data=data, **arguments)


def with_test_step() -> Any:
    return evaluates(test_step=lambda self, batch, batch_idx, dataloader_idx=0: None)


CASES: dict[str, Case] = {
    "no loader": Case(
        lambda: fit(data=None), ("nothing to train on", "train_dataloaders=", "train_dataloader"), lambda: fit(data=BATCHES)
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
    # ---------------------------------------------------------------- several loaders
    "an unknown mode": Case(
        lambda: fit_any(CombinedLoader([LOADER, LOADER], "min-size")),
        (r"CombinedLoader\(mode='min-size'\)", "Did you mean 'min_size'"),
        lambda: fit_any(CombinedLoader([LOADER, LOADER], "min_size")),
    ),
    "a mode that is None": Case(
        lambda: fit_any(CombinedLoader([LOADER, LOADER], None)),  # type: ignore[arg-type]
        ("CombinedLoader", "mode=None", "'sequential'"),
        lambda: fit_any(CombinedLoader([LOADER, LOADER])),
    ),
    **{
        f"{none!r} combined": Case(
            lambda none=none: fit_any(CombinedLoader(none)),  # type: ignore[misc]
            ("CombinedLoader", "no loader", "at least one"),
            lambda: fit_any(CombinedLoader([LOADER])),
        )
        for none in EMPTY_FORMS
    },
    "a dict without loaders": Case(
        lambda: fit_any({}), ("CombinedLoader", "no loader", "at least one"), lambda: fit_any({"a": LOADER})
    ),
    "a combination of combinations": Case(
        lambda: fit_any(CombinedLoader({"a": CombinedLoader([LOADER, LOADER]), "b": LOADER})),
        ("One of several loaders is a CombinedLoader", "dict or list of its loaders"),
        lambda: fit_any(CombinedLoader({"a": [LOADER, LOADER], "b": LOADER})),
    ),
    "a combination in a list for a test": Case(
        lambda: Trainer(max_epochs=1, device="cpu").test(with_test_step(), [CombinedLoader([LOADER]), LOADER]),
        ("One of several loaders is a CombinedLoader", "dict or list of its loaders"),
        lambda: after_fit(lambda trainer, module: trainer.test(module, [LOADER, LOADER]), with_test_step()),
    ),
    "a dict with None": Case(
        lambda: fit_any({"a": LOADER, "b": None}),
        ("training loader 1 of several", r"None \(NoneType\)", "DataLoader"),
        lambda: fit_any({"a": LOADER, "b": LOADER}),
    ),
    "a dict with a number": Case(
        lambda: fit_any({"a": 5, "b": LOADER}),
        ("training loader 0 of several", r"5 \(int\)", "cannot be iterated"),
        lambda: fit_any({"a": [5], "b": LOADER}),
    ),
    "a batch in the place of a loader": Case(
        lambda: fit_any({"x": torch.ones(4, 1), "y": torch.ones(4, 1)}),
        ("One of several loaders is a Tensor", r"give \[batch\]", "DataLoaders"),
        lambda: fit_any([{"x": torch.ones(4, 1), "y": torch.ones(4, 1)}]),
    ),
    "a validation batch in the place of a loader": Case(
        lambda: fit(evaluates(), val={"x": torch.ones(4, 1)}),
        ("One of several loaders is a Tensor", r"give \[batch\]"),
        lambda: fit(evaluates(), val=[{"x": torch.ones(4, 1)}]),
    ),
    "a list of a loader and a batch": Case(
        lambda: fit_any([LOADER, torch.ones(4, 1)]),
        ("list of loaders holds a Tensor", r"\{'a': loader, 'b': \[batch, batch\]\}"),
        lambda: fit_any({"a": LOADER, "b": [torch.ones(4, 1)]}),
    ),
    "a list of a loader and a list of batches": Case(
        lambda: fit_any([LOADER, BATCHES]),
        ("list of loaders holds a list", "dict of loaders", "CombinedLoader"),
        lambda: fit_any(CombinedLoader([LOADER, BATCHES])),
    ),
    "a list of a loader and None for validation": Case(
        lambda: fit(evaluates(), val=[LOADER, None]),
        ("list of loaders holds a NoneType", "dict of loaders"),
        lambda: fit(evaluates(), val=[LOADER, LOADER]),
    ),
    "an empty loader that is to start anew": Case(
        lambda: fit_any({"a": LOADER, "b": EMPTY}),
        ("max_size_cycle", "DataLoader gave no batch", "another mode"),
        lambda: fit_any(CombinedLoader({"a": LOADER, "b": EMPTY}, "max_size")),
    ),
    "an iterator that is to start anew": Case(
        lambda: fit_any({"a": LOADER, "b": iter(BATCHES[:2])}),
        ("list_iterator gave no batch", "that can be iterated again"),
        lambda: fit_any({"a": LOADER, "b": BATCHES[:2]}),
    ),
    "a fraction of several loaders without a length": Case(
        lambda: fit_any({"a": LOADER, "b": Stream(2)}, limit_train_batches=0.5),
        (r"limit_train_batches=0\.5", "length is unknown", "whole number"),
        lambda: fit_any({"a": LOADER, "b": Stream(2)}, limit_train_batches=2),
    ),
    "a combination with a wrong length": Case(
        lambda: fit_any({"a": Stream(2, says=5), "b": Stream(1, says=1)}),
        ("says that it has 5 batches and ended after 2", "__len__"),
        lambda: fit_any({"a": Stream(2, says=2), "b": Stream(1, says=1)}),
    ),
    "a combination with a longer loader than it says": Case(
        lambda: fit_any({"a": Stream(3, says=2), "b": Stream(1, says=1)}),
        ("says that it has 2 batches and has more", "__len__"),
        lambda: fit_any({"a": Stream(3, says=3), "b": Stream(1, says=1)}),
    ),
    # ---------------------------------------------------------------- lengths
    "a validation loader longer than its length": Case(
        lambda: fit(evaluates(), val=Stream(3, says=2)),
        ("Stream", "2 batches and has more", "limit_val_batches=2"),
        lambda: fit(evaluates(), val=Stream(3, says=3)),
    ),
    "dropped samples that only updates would end": Case(
        lambda: fit_any(EMPTY, max_epochs=None, max_steps=3),
        ("gave no batch in epoch 0", "3 samples", "batch_size=4", "drop_last=False"),
        lambda: fit_any(LOADER, max_epochs=None, max_steps=3),
    ),
    "an empty list that only updates would end": Case(
        lambda: fit_any([], max_epochs=-1),
        ("gave no batch in epoch 0", "length is 0"),
        lambda: fit_any(BATCHES, max_epochs=None, max_steps=1),
    ),
    "a read_ahead that is no flag": Case(
        lambda: fit(read_ahead="no"), (r"Trainer\(read_ahead='no'\)", "True or False"), lambda: fit(read_ahead=False)
    ),
    "a short window that was not known": Case(
        lambda: fit(None, GradientAccumulation(3), data=Stream(4), read_ahead=False),
        ("GradientAccumulation", "1 of 3 batches", "read_ahead=False", "remainder='carry'"),
        lambda: fit(None, GradientAccumulation(3, remainder="carry"), data=Stream(4), read_ahead=False),
    ),
    "a policy's short window that was not known": Case(
        lambda: fit(None, GradientAccumulation(lambda trainer: 3), data=Stream(4), read_ahead=False),
        ("1 of 3 batches", "limit_train_batches"),
        lambda: fit(None, GradientAccumulation(3), data=Stream(4), read_ahead=False, limit_train_batches=3),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_refusal_names_the_mistake_and_the_remedy(case: str) -> None:
    check_refusal(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_correct_form_trains(case: str) -> None:
    check_remedy(CASES[case])
