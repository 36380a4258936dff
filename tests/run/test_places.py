"""If an error ends a run, it carries a note of the stage, the epoch and the batch, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from eventtrain import Callback, MisconfigurationError
from eventtrain.hints import tables
from tests.kit import ModuleOf, new_trainer

BATCHES = [torch.ones(1)] * 3


def notes_of(error: type[BaseException], run: Callable[[], Any]) -> list[str]:
    with pytest.raises(error) as caught:
        run()
    return getattr(caught.value, "__notes__", [])


class Model(ModuleOf):
    """Fails with a wrong shape if it gets to a batch of a stage, or to a hook."""

    def __init__(self, stage: str, epoch: int = 0, batch_idx: int = 0) -> None:
        super().__init__()
        self.fails = (stage, epoch, batch_idx)

    def fail_at(self, stage: str, batch_idx: int) -> None:
        if self.fails == (stage, self.current_epoch, batch_idx):
            torch.ones(2, 3) @ torch.ones(2, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.fail_at("train", batch_idx)
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.fail_at("validation", batch_idx + 10 * dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.fail_at("test", batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.fail_at("predict", batch_idx)

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        self.fail_at("backward", self.trainer.batch_idx)
        loss.backward()

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.fail_at("hook", batch_idx)


class Samples(Dataset[Any]):
    """Samples of which the third cannot be read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        if index == 2:
            raise KeyError("no such sample")
        return torch.ones(1)


def test_a_wrong_shape_in_training_step_keeps_torchs_error_and_notes_epoch_and_batch() -> None:
    model = Model("train", 1, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        new_trainer(max_epochs=2).fit(model, BATCHES)
    assert caught.value.__notes__ == ["raised in Model.training_step (epoch 1, batch 2)"]


def test_an_error_in_validation_notes_its_own_batch_and_loader() -> None:
    loaders: list[Any] = [DataLoader(BATCHES, batch_size=None) for _ in range(2)]  # type: ignore[arg-type]
    notes = notes_of(RuntimeError, lambda: new_trainer().fit(Model("validation", 0, 11), BATCHES, loaders))
    assert notes == ["raised in Model.validation_step (epoch 0, batch 1, loader 1)"]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_error_in_an_evaluation_outside_a_fit_notes_its_batch(stage: str) -> None:
    step = {"validate": "validation"}.get(stage, stage)
    notes = notes_of(RuntimeError, lambda: getattr(new_trainer(), stage)(Model(step, 0, 1), BATCHES))
    assert notes == [f"raised in Model.{step}_step (batch 1, loader 0)"]


def test_an_error_in_backward_notes_the_loop() -> None:
    notes = notes_of(RuntimeError, lambda: new_trainer().fit(Model("backward", 0, 1), BATCHES))
    assert notes == ["raised in the train loop (epoch 0, batch 1)"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_data_set_notes_the_loader_and_the_batch(workers: int) -> None:
    loader = DataLoader(Samples(), num_workers=workers)
    assert notes_of(KeyError, lambda: new_trainer().fit(ModuleOf(), loader)) == [
        "raised in the train loader (epoch 0, batch 2)"
    ]


def test_an_error_in_a_data_set_of_an_evaluation_notes_the_loader() -> None:
    notes = notes_of(KeyError, lambda: new_trainer().test(Model("never"), DataLoader(Samples())))
    assert notes == ["raised in the test loader (batch 2, loader 0)"]


def test_an_error_in_a_hook_of_an_evaluation_notes_the_evaluations_batch() -> None:
    notes = notes_of(RuntimeError, lambda: new_trainer().fit(Model("hook", 0, 1), BATCHES, BATCHES))
    (note,) = [note for note in notes if "raised" in note]
    assert note == "raised by Model.on_validation_batch_end at the event 'validation_batch_end' (epoch 0, batch 1)"


def test_an_error_of_a_callback_is_noted_once() -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Any, event: Any) -> None:
            raise ValueError

    notes = notes_of(ValueError, lambda: new_trainer(Fails()).fit(ModuleOf(), BATCHES))
    assert notes == ["raised by Fails.on_train_batch_end at the event 'train_batch_end' (epoch 0, batch 0)"]


def test_an_error_of_a_run_within_a_run_is_noted_once() -> None:
    def training_step(batch: Any, batch_idx: int) -> None:
        new_trainer().fit(Model("train", 0, 1), BATCHES)

    notes = notes_of(RuntimeError, lambda: new_trainer().fit(ModuleOf(training_step=training_step), BATCHES))
    assert notes == ["raised in Model.training_step (epoch 0, batch 1)"]


def test_the_place_of_a_misconfiguration_is_noted_too() -> None:
    model = ModuleOf(training_step=lambda batch, batch_idx: "loss" if batch_idx else None)
    notes = notes_of(MisconfigurationError, lambda: new_trainer().fit(model, BATCHES))
    assert notes == ["raised in the train loop (epoch 0, batch 1)"]


def test_an_error_before_the_first_batch_has_no_place() -> None:
    def setup(stage: str) -> None:
        raise ValueError

    assert notes_of(ValueError, lambda: new_trainer().fit(ModuleOf(setup=setup), BATCHES)) == []


def test_listeners_of_exception_see_the_note() -> None:
    seen: list[Any] = []

    class Reports(Callback):
        def on_exception(self, trainer: Any, event: Any) -> None:
            seen.extend(event.exception.__notes__)

    notes_of(RuntimeError, lambda: new_trainer(Reports()).fit(Model("train"), BATCHES))
    assert seen == ["raised in Model.training_step (epoch 0, batch 0)"]


@pytest.mark.parametrize(
    ("name", "remedy"), [("all_gather", "gather_for_all"), ("on_gpu", "device.type"), ("fabric", "trainer")]
)
def test_an_attribute_of_other_modules_notes_what_to_write(name: str, remedy: str) -> None:
    model = ModuleOf()
    model.training_step = lambda batch, batch_idx: getattr(model, name)  # type: ignore[method-assign]
    notes = notes_of(AttributeError, lambda: new_trainer().fit(model, BATCHES))
    assert notes[0] == f"ModuleOf has no attribute {name!r}. {tables()['module'][name]}" and len(notes) == 2


def test_an_attribute_that_no_module_has_gets_no_hint() -> None:
    model = ModuleOf()
    model.training_step = lambda batch, batch_idx: model.no_such_thing  # type: ignore[method-assign]
    assert len(notes_of(AttributeError, lambda: new_trainer().fit(model, BATCHES))) == 1


def test_an_error_that_a_listener_of_exception_raises_from_the_first_takes_its_place() -> None:
    def explain(trainer: Any, event: Any) -> None:
        raise RuntimeError("the disk is full") from event.exception

    def interfere(trainer: Any, event: Any) -> None:
        raise KeyError("another")

    def fail(trainer: Any, event: Any) -> None:
        raise ValueError("wrong")

    for listener, expected in ((explain, RuntimeError), (interfere, ValueError)):
        trainer = new_trainer()
        trainer.signals.train_start.connect(fail, weak=False)
        trainer.signals.exception.connect(listener, weak=False)
        with pytest.raises(expected) as error:
            trainer.fit(Model("none"), BATCHES)
        if listener is explain:
            assert isinstance(error.value.__cause__, ValueError)
        else:
            assert any("and afterwards: KeyError: 'another'" in note for note in error.value.__notes__)
