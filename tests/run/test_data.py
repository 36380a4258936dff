"""Where a call takes its data from: loaders or a datamodule, by position or by name, of any class."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from eventtrain import LightningDataModule, MisconfigurationError, Trainer
from tests.kit import Line, new_trainer

STAGES = ("validate", "test", "predict")


def loader(*values: float) -> Any:
    return DataLoader([torch.tensor([float(value)]) for value in values], batch_size=None)  # type: ignore[arg-type]


class Loaders:
    """The loaders of all stages, with 4, 3, 2 and 1 batches."""

    def train_dataloader(self) -> Any:
        return loader(1, 2, 3, 4)

    def val_dataloader(self) -> Any:
        return loader(1, 2, 3)

    def test_dataloader(self) -> Any:
        return loader(1, 2)

    def predict_dataloader(self) -> Any:
        return loader(1)


class Ours(Loaders, LightningDataModule):
    """Derives from the class of this library."""


def namespace() -> Any:
    """Return an object whose loaders' methods were assigned to it."""
    return SimpleNamespace(**{name: getattr(Loaders(), name) for name in dir(Loaders) if name.endswith("_dataloader")})


class Slotted(Loaders):
    """Has no place for the trainer."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)


@dataclass(frozen=True)
class Frozen(Loaders):
    """Refuses new attributes."""


KINDS = [Ours, Loaders, namespace, Slotted, Frozen]


class Counts(Line):
    """Counts the batches of each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = dict.fromkeys(("train", "validation", "test", "predict"), 0)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.counts["train"] += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.counts["validation"] += 1

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.counts["test"] += 1

    def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.counts["predict"] += 1
        return super().predict_step(batch, batch_idx)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_name", [False, True])
def test_a_datamodule_by_position_or_name_gives_the_loaders_of_each_stage(kind: Any, by_name: bool) -> None:
    model, data = Counts(), kind()
    trainer = new_trainer()
    for stage in ("fit", *STAGES):
        run = getattr(trainer, stage)
        run(model, datamodule=data) if by_name else run(model, data)
        assert trainer.datamodule is data
    assert model.counts == {"train": 4, "validation": 6, "test": 2, "predict": 1}


class OnlyTrain:
    """Has nothing but the training loader."""

    def train_dataloader(self) -> Any:
        return loader(1, 2)


class OnlyTrainOurs(OnlyTrain, LightningDataModule):
    """The same, as the library's class."""


@pytest.mark.parametrize("kind", [OnlyTrain, OnlyTrainOurs])
def test_loaders_that_a_datamodule_does_not_have_are_none(kind: Any, in_tmp_path: None) -> None:
    model, trainer = Counts(), new_trainer(max_epochs=2)
    trainer.fit(model, kind())
    assert model.counts == {"train": 4, "validation": 0, "test": 0, "predict": 0}
    trainer.save_checkpoint("a.ckpt")
    resumed = new_trainer(max_epochs=3)
    resumed.fit(model, kind(), ckpt_path="a.ckpt")
    assert resumed.global_step == 6
    with pytest.raises(MisconfigurationError, match="There is nothing to test on"):
        trainer.test(model, kind())


def test_loaders_that_a_datamodule_does_not_have_come_from_the_module() -> None:
    class WithVal(Counts):
        def val_dataloader(self) -> Any:
            return loader(1, 2, 3)

    model = WithVal()
    new_trainer().fit(model, OnlyTrain())
    assert model.counts["validation"] == 3


@pytest.mark.parametrize("base", [object, LightningDataModule])
def test_the_hooks_of_any_datamodule_are_called_in_order(base: type, in_tmp_path: None) -> None:
    class Data(Loaders, base):  # type: ignore[misc]
        trainer: Any = None

        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Any] = []

        def prepare_data(self) -> None:
            self.calls.append("prepare_data")

        def setup(self, stage: str) -> None:
            self.calls.append(("setup", stage, self.trainer.max_epochs))

        def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            self.calls.append(batch.item())
            return batch

        def on_train_epoch_end(self) -> None:
            self.calls.append("on_train_epoch_end")

        def on_exception(self, exception: BaseException) -> None:
            self.calls.append(exception)

        def state_dict(self) -> dict[str, Any]:
            return {"calls": len(self.calls)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.calls.append(("load", state_dict))

        def teardown(self, stage: str) -> None:
            self.calls.append(("teardown", stage))

    data, trainer = Data(), new_trainer(limit_train_batches=2, limit_val_batches=0)
    trainer.fit(Line(), data)
    calls = ["prepare_data", ("setup", "fit", 1), 1.0, 2.0, "on_train_epoch_end", ("teardown", "fit")]
    assert data.calls == calls
    trainer.save_checkpoint("a.ckpt")
    again = Data()
    new_trainer(limit_val_batches=0).fit(Line(), again, ckpt_path="a.ckpt")
    assert again.calls == ["prepare_data", ("setup", "fit", 1), ("load", {"calls": 6}), ("teardown", "fit")]
    error = RuntimeError("no")

    class Fails(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise error

    failing = Data()
    with pytest.raises(RuntimeError, match="no"):
        new_trainer(limit_val_batches=0).fit(Fails(), failing)
    assert failing.calls[-2:] == [error, ("teardown", "fit")]


@pytest.mark.parametrize("how", ["class", "object"])
def test_the_module_is_not_taken_for_a_datamodule(how: str) -> None:
    class WithLoaders(Loaders, Counts):
        """A module with loaders of its own."""

    model: Any = WithLoaders()
    if how == "object":
        model = Counts()
        model.train_dataloader = Loaders().train_dataloader
    trainer = new_trainer()
    trainer.fit(model)
    trainer.fit(model, loader(1))
    assert model.counts["train"] == 5


CONFLICTS: dict[str, tuple[Any, str]] = {
    "a datamodule and a loader by position": (
        lambda trainer: trainer.fit(Line(), Ours(), loader(1)),
        r"fit\(val_dataloaders=DataLoader\): give either loaders or a datamodule",
    ),
    "a loader and a datamodule by position": (
        lambda trainer: trainer.fit(Line(), loader(1), Ours()),
        r"fit\(val_dataloaders=Ours\): give either loaders or a datamodule",
    ),
    "loaders beside a datamodule": (
        lambda trainer: trainer.fit(Line(), loader(1), datamodule=Ours()),
        r"fit\(train_dataloaders=DataLoader\): give either",
    ),
    "a validation loader beside a datamodule": (
        lambda trainer: trainer.fit(Line(), val_dataloaders=loader(1), datamodule=Loaders()),
        r"fit\(val_dataloaders=DataLoader\): give either",
    ),
    "two datamodules": (
        lambda trainer: trainer.fit(Line(), Ours(), datamodule=Ours()),
        r"fit\(train_dataloaders=Ours\): give either",
    ),
    "two datamodules for a test": (
        lambda trainer: trainer.test(Line(), Loaders(), datamodule=Ours()),
        r"test\(dataloaders=Loaders\): give either",
    ),
    "loaders beside a datamodule for a test": (
        lambda trainer: trainer.test(Line(), loader(1), datamodule=Ours()),
        r"test\(dataloaders=DataLoader\): give either",
    ),
    "the order swapped": (
        lambda trainer: trainer.fit(Ours(), Line()),
        r"fit\(Ours, \.\.\.\): the model comes first.*datamodule",
    ),
    "the order of model and loader swapped": (
        lambda trainer: trainer.fit(loader(1), Line()),
        r"fit\(DataLoader, \.\.\.\): the model comes first.*fit\(model, loader\)",
    ),
    "a plain datamodule without a model": (
        lambda trainer: trainer.predict(Loaders()),
        r"predict\(Loaders, \.\.\.\): the model comes first",
    ),
    "a loader as a datamodule": (
        lambda trainer: trainer.fit(Line(), datamodule=loader(1)),
        r"fit\(datamodule=DataLoader\): give a LightningDataModule.*train_dataloaders=\.\.\. and val_dataloaders=",
    ),
    "a loader as the datamodule of a test": (
        lambda trainer: trainer.test(Line(), datamodule=loader(1)),
        r"test\(datamodule=DataLoader\): give .* Loaders are given as dataloaders=",
    ),
    "the class of a datamodule": (lambda trainer: trainer.fit(Line(), datamodule=Ours), r"Ours is a class.*Ours\(\.\.\.\)"),
    "the class of a datamodule by position": (lambda trainer: trainer.fit(Line(), Ours), r"Ours is a class.*Ours\(\.\.\.\)"),
    "a module as a datamodule": (
        lambda trainer: trainer.fit(Line(), datamodule=Line()),
        r"fit\(datamodule=Line\): give a LightningDataModule",
    ),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_data_given_in_two_ways_or_in_a_wrong_place_is_refused(case: str) -> None:
    wrong, message = CONFLICTS[case]
    trainer = new_trainer()
    with pytest.raises(MisconfigurationError, match=message):
        wrong(trainer)
    assert trainer.datamodule is None and trainer.run_state.module is None


def test_fit_without_a_model_is_refused() -> None:
    with pytest.raises(MisconfigurationError, match="missing a required argument: 'model'"):
        Trainer(max_epochs=1, device="cpu").fit(datamodule=Ours())  # type: ignore[call-arg]
