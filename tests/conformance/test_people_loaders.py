"""Several loaders in training and evaluations: eventtrain reads the batches that Lightning reads, in the same order."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import eventtrain
from eventtrain.callbacks import LRSchedulerStepping

from .frameworks import lightning

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


def reader(base: type) -> Any:
    """Return a module that trains on all tensors of a batch, and writes each batch into a journal."""

    class Reader(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.layer = torch.nn.Linear(1, 1)
            self.journal: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.journal.append(("train", batch_idx, plain(batch)))
            return sum(self.layer(each).square().mean() for each in tensors(batch))

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.journal.append(("validation", batch_idx, dataloader_idx, plain(batch)))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
            total = self.trainer.estimated_stepping_batches
            return [optimizer], [
                {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=total), "interval": "step"}
            ]

    return Reader()


def tensors(batch: Any) -> list[torch.Tensor]:
    if isinstance(batch, (dict, list, tuple)):
        return [each for part in (batch.values() if isinstance(batch, dict) else batch) for each in tensors(part)]
    return [] if batch is None else [batch]


def plain(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [plain(each) for each in batch]
    return None if batch is None else batch.tolist()


def numbers(*values: float) -> Any:
    data: Any = torch.tensor([[float(value)] for value in values])
    return DataLoader(data, batch_size=2, shuffle=len(values) > 4)


def assert_same(make: Callable[[Any], Any], val: Any = None, **options: Any) -> list[Any]:
    """Fit by both, on loaders that `make` returns for the framework's CombinedLoader; return the journal."""
    modules = []
    for name, framework in (("ours", eventtrain), ("theirs", lightning)):
        combined = eventtrain.CombinedLoader if name == "ours" else lightning.utilities.CombinedLoader
        quiet: dict[str, Any] = {"device": "cpu", "callbacks": LRSchedulerStepping(), "default_callbacks": False}
        if name == "theirs":
            switches = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
            quiet = {"accelerator": "cpu", **dict.fromkeys(switches, False)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice
            module = reader(framework.LightningModule)
            torch.manual_seed(1)
            trainer: Any = framework.Trainer(max_epochs=2, num_sanity_val_steps=0, **quiet, **options)
            trainer.fit(module, make(combined), val and val(combined))
        modules.append(module)
    here, there = modules
    assert here.journal == there.journal
    assert torch.equal(here.layer.weight, there.layer.weight)
    assert here.journal
    journal: list[Any] = here.journal
    return journal


FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "dict": lambda a, b: {"a": a, "b": b},
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "nested": lambda a, b: {"x": [a, b], "y": {"z": b}},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [(6, 3), (3, 6), (4, 4)])
def test_several_training_loaders(form: str, lengths: tuple[int, int]) -> None:
    assert_same(lambda _: FORMS[form](*(numbers(*range(1, length + 1)) for length in lengths)))


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize("limit", [None, 2, 0.5])
def test_modes_and_limits_in_training(mode: str, limit: Any) -> None:
    def make(combined: Any) -> Any:
        return combined({"a": numbers(1, 2, 3, 4), "b": numbers(5, 6, 7, 8, 9, 10, 11, 12)}, mode)

    assert_same(make, limit_train_batches=limit)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("limit", [None, 1, 0.5])
def test_several_validation_loaders(form: str, limit: Any) -> None:
    def val(_: Any) -> Any:
        return FORMS[form](numbers(1, 2, 3, 4), numbers(5, 6, 7, 8))

    assert_same(lambda _: numbers(1, 2), val, limit_val_batches=limit)


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle", "sequential"])
def test_modes_in_validation(mode: str) -> None:
    assert_same(lambda _: numbers(1, 2), lambda combined: combined([numbers(1, 2, 3, 4), numbers(5, 6)], mode))


def test_accumulation_is_independent_of_the_form() -> None:
    journal = assert_same(lambda _: {"a": numbers(1, 2, 3, 4), "b": numbers(5, 6)}, max_steps=3)
    assert len(journal) == 3
