"""If people use names of other trainers, for attributes or for loaders, messages say how to write them here."""

from __future__ import annotations

import copy
import inspect
import pickle
import types
import warnings
from typing import Any

import pytest
import torch

from eventtrain import Callback, MisconfigurationError, Trainer
from eventtrain.callbacks import EarlyStopping
from eventtrain.hints import tables
from tests.conformance.frameworks import lightning
from tests.kit import ModuleOf, new_trainer
from tests.misconfigurations import BATCHES, Data, evaluates, fit

LIGHTNINGS_ARGUMENTS = sorted(
    inspect.signature(lightning.Trainer).parameters.keys() - inspect.signature(Trainer).parameters.keys()
)


@pytest.mark.parametrize("argument", LIGHTNINGS_ARGUMENTS)
def test_each_argument_of_lightnings_trainer_that_is_missing_here_gets_a_hint_of_its_own(argument: str) -> None:
    with pytest.raises(MisconfigurationError, match=rf"^Trainer\({argument}=True\): there is no such argument\. ") as caught:
        Trainer(**{argument: True})  # type: ignore[arg-type]
    assert "Did you mean" not in str(caught.value) and "The arguments are" not in str(caught.value)


def attributes_of_lightnings_trainer() -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    here = {*dir(Trainer), *vars(new_trainer())}
    return sorted(name for name in {*dir(type(theirs)), *vars(theirs)} - here if not name.startswith("_"))


def test_each_public_attribute_of_lightnings_trainer_that_is_missing_here_gets_a_hint() -> None:
    assert set(attributes_of_lightnings_trainer()) - tables()["trainer"].keys() == set()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("lightning_module", "trainer.module"),
        ("model", "trainer.module"),
        ("train_dataloader", "num_training_batches"),
        ("val_dataloaders", "num_evaluation_batches"),
        ("checkpoint_callback", "trainer.callback(ModelCheckpoint)"),
        ("early_stopping_callback", "trainer.callback(EarlyStopping)"),
        ("strategy", "trainer.processes"),
        ("log_dir", "run_dir"),
        ("fit_loop", "trainer.progress"),
        ("curent_epoch", "Did you mean 'current_epoch'"),
        ("lightning_modul", "Did you mean 'lightning_module'"),
    ],
)
def test_an_attribute_that_a_trainer_lacks_says_what_to_write(name: str, remedy: str) -> None:
    trainer = new_trainer()
    with pytest.raises(AttributeError) as caught:
        getattr(trainer, name)
    assert str(caught.value).startswith(f"Trainer has no attribute {name!r}. ") and remedy in str(caught.value)
    assert not hasattr(trainer, name) and getattr(trainer, name, 3) == 3


def test_an_attribute_of_nobody_has_the_plain_message() -> None:
    with pytest.raises(AttributeError, match=r"^Trainer has no attribute 'zzz'\.$"):
        new_trainer().zzz  # type: ignore[attr-defined]  # noqa: B018


def test_a_subclass_is_named_and_its_attributes_are_suggested() -> None:
    class Mine(Trainer):
        rate = 0.1

    with pytest.raises(AttributeError, match=r"^Mine has no attribute 'rates'\. Did you mean 'rate'\?$"):
        Mine(max_epochs=1, device="cpu").rates  # type: ignore[attr-defined]  # noqa: B018


def test_an_attribute_error_in_a_property_is_not_hidden() -> None:
    class Mine(Trainer):
        @property
        def broken(self) -> Any:
            return torch.no_such_thing  # type: ignore[attr-defined]

    with pytest.raises(AttributeError, match="no_such_thing"):
        Mine(max_epochs=1, device="cpu").broken  # noqa: B018


def test_a_trainer_that_is_not_built_yet_can_be_asked_for_attributes() -> None:
    assert not hasattr(Trainer.__new__(Trainer), "run_state")


def test_the_signatures_are_those_of_the_methods() -> None:
    assert next(iter(inspect.signature(Trainer).parameters)) == "max_epochs"
    assert list(inspect.signature(EarlyStopping).parameters)[:2] == ["monitor", "mode"]
    assert list(inspect.signature(Trainer.fit).parameters)[:3] == ["self", "model", "train_dataloaders"]


def test_a_subclass_may_have_arguments_of_its_own_and_passes_others_on() -> None:
    class Mine(Trainer):
        def __init__(self, rate: float, **options: Any) -> None:
            super().__init__(**options)
            self.rate = rate

    assert Mine(0.1, max_epochs=1, device="cpu").rate == 0.1
    with pytest.raises(MisconfigurationError, match=r"^Trainer\(gpus=1\): there is no such argument"):
        Mine(0.1, max_epochs=1, gpus=1)
    with pytest.raises(TypeError, match="rate"):
        Mine()  # type: ignore[call-arg]


def test_shipped_callbacks_can_be_copied_and_pickled() -> None:
    stopping = EarlyStopping("loss", patience=7)
    assert copy.deepcopy(stopping).patience == pickle.loads(pickle.dumps(stopping)).patience == 7


# ------------------------------------------------------------------ validation loaders that nobody reads


def data_with(**methods: Any) -> Any:
    return type("Digits", (Data,), methods)()


@pytest.mark.parametrize(
    "name", ["valid_dataloader", "validation_dataloader", "val_dataloaders", "val_loader", "valloader", "vall_dataloader"]
)
def test_a_misspelt_validation_loader_is_warned_about(name: str) -> None:
    with pytest.warns(
        UserWarning, match=rf"Nothing is validated: Digits\.{name} is never called\. Rename it to val_dataloader"
    ):
        fit(evaluates(), data=None, datamodule=data_with(**{name: lambda self: BATCHES}))


def test_a_misspelt_validation_loader_of_a_module_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"Evaluates\.valid_dataloader is never called"):
        fit(evaluates(valid_dataloader=lambda self: BATCHES))


@pytest.mark.parametrize(
    ("model", "datamodule", "options"),
    [
        (ModuleOf, data_with(valid_dataloader=lambda self: BATCHES), {}),  # nothing to validate with
        (evaluates, data_with(valid_dataloader=lambda self: BATCHES), {"limit_val_batches": 0}),
        (evaluates, data_with(valid_loader=lambda self: BATCHES, val_dataloader=lambda self: self.valid_loader()), {}),
        (evaluates, data_with(train_dataloader_for_tuning=lambda self: BATCHES, valid_data=BATCHES), {}),
        (evaluates, None, {"data": BATCHES}),
    ],
)
def test_helpers_of_ones_own_are_not_warned_about(model: Any, datamodule: Any, options: dict[str, Any]) -> None:
    fit(model(), **{"data": None, "datamodule": datamodule, **options})  # warnings are errors here


def test_helpers_with_names_of_steps_are_allowed_beside_the_steps() -> None:
    class Shared(ModuleOf):
        def train_step(self, batch: Any) -> Any:
            return self.loss(batch)

        def val_step(self, batch: Any) -> None: ...

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.train_step(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.val_step(batch)

    assert fit(Shared(), val=BATCHES).global_step == 4


def test_a_callback_may_have_helpers_that_are_named_like_events() -> None:
    class Saves:
        done = 0

        def setup(self) -> None:
            self.done += 1

        def save_checkpoint(self, trainer: Any, path: str) -> None:
            self.done += 1

        def on_fit_end(self, trainer: Any, event: Any) -> None:
            self.setup()
            self.save_checkpoint(trainer, "")

    saves = Saves()
    fit(None, saves)
    assert saves.done == 2


@pytest.mark.parametrize("name", ["setup", "teardown"])
def test_a_callbacks_setup_that_takes_any_arguments_is_refused_too(name: str) -> None:
    callback: Any = type("TakesAny", (Callback,), {name: lambda self, *args, **kwargs: None})()
    with pytest.raises(MisconfigurationError, match=rf"TakesAny\.{name}\(.*never called\. Write `def on_{name}\("):
        new_trainer(callback)


class Quiet(Callback):
    """Sets an attribute of another object in its constructor, and none of its own."""

    def __init__(self, options: Any) -> None:
        options.verbose = False


class Silent(Quiet):
    def __init__(self) -> None:
        super().__init__(types.SimpleNamespace())


def test_a_base_class_may_set_attributes_of_other_objects_only() -> None:
    new_trainer(Silent()).fit(ModuleOf(), BATCHES)


def test_a_builtin_without_a_signature_may_stand_for_a_method() -> None:
    assert fit(ModuleOf(prepare_data=dict)).global_step == 4
