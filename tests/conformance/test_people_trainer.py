"""How people drive a trainer: by both frameworks, from the same source."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import eventtrain
from tests.conformance.frameworks import lightning

FRAMEWORKS = {"ours": eventtrain, "theirs": lightning}


def trainer_of(framework: str, **arguments: Any) -> Any:
    if framework == "ours":
        return eventtrain.Trainer(device="cpu", default_callbacks=False, **{"num_sanity_val_steps": 0, **arguments})
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(accelerator="cpu", **{**quiet, "num_sanity_val_steps": 0, **arguments})


def loader(count: int) -> Any:
    generator = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(torch.randn(4 * count, 2, generator=generator)), batch_size=4)


def model_of(base: type, **methods: Any) -> Any:
    """Return a module with a batch norm, that records its stages, and that has these methods."""

    def __init__(self: Any) -> None:
        super(type(self), self).__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.BatchNorm1d(2), nn.Linear(2, 1)
        self.journal = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        self.journal.append("train")
        return self.head(self.norm(batch[0])).square().mean()  # type: ignore[no-any-return]

    def evaluate(self: Any, batch: Any, batch_idx: int) -> Tensor:
        self.journal.append(["train", "eval"][not self.training])
        return self.head(self.norm(batch[0]))  # type: ignore[no-any-return]

    def configure_optimizers(self: Any) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    steps = {"training_step": training_step, "configure_optimizers": configure_optimizers}
    steps |= dict.fromkeys(("validation_step", "test_step", "predict_step"), evaluate)
    return type("Model", (base,), {"__init__": __init__, **steps, **methods})()


def both(run: Callable[[str, Any], Any], **methods: Any) -> tuple[Any, Any]:
    """Run a function for each framework; compare its results, the journals and all state, and return both modules."""
    modules, results = [], []
    for name, framework in FRAMEWORKS.items():
        module = model_of(framework.LightningModule, **methods)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(run(name, module))
        modules.append(module)
    ours, theirs = modules
    assert ours.journal == theirs.journal
    assert results[0] == results[1]
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    return ours, theirs


# ------------------------------------------------------------------ modes


def calling_super(name: str) -> Any:
    def hook(self: Any) -> None:
        getattr(super(type(self), self), name)()
        self.journal.append(name)

    return hook


def switching_by_hand(name: str) -> Any:
    def hook(self: Any) -> None:
        self.norm.eval() if name.endswith("eval") else self.norm.train()
        self.journal.append(name)

    return hook


@pytest.mark.parametrize("make", [calling_super, switching_by_hand, lambda name: lambda self: None])
@pytest.mark.parametrize("modes", [("eval",), ("train",), ("eval", "train")])
def test_mode_hooks_of_validation_and_test(make: Any, modes: tuple[str, ...]) -> None:
    hooks = {name: make(name) for stage in ("validation", "test") for name in (f"on_{stage}_model_{mode}" for mode in modes)}

    def run(framework: str, module: Any) -> list[bool]:
        trainer = trainer_of(framework, max_epochs=2)
        trainer.fit(module, loader(3), loader(2))
        trainer.test(module, loader(2), verbose=False) if framework == "theirs" else trainer.test(module, loader(2))
        return [part.training for part in module.modules()]

    both(run, **hooks)


@pytest.mark.parametrize("make", [calling_super, switching_by_hand])
def test_the_mode_hook_of_prediction(make: Any) -> None:
    def run(framework: str, module: Any) -> list[bool]:
        trainer_of(framework, max_epochs=1).predict(module, loader(2))
        return [part.training for part in module.modules()]

    both(run, on_predict_model_eval=make("on_predict_model_eval"))


@pytest.mark.parametrize(("part", "warned"), [("model", True), ("head", True), (None, False)])
def test_a_module_in_evaluation_mode_before_fit_is_warned_about(part: str | None, warned: bool) -> None:
    for name, framework in FRAMEWORKS.items():
        module = model_of(framework.LightningModule)
        if part is not None:
            (module if part == "model" else module.head).eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer_of(name, max_epochs=1).fit(module, loader(2))
        modes = [
            each for each in caught if "eval mode at the start" in str(each.message) or "is in evaluation" in str(each.message)
        ]
        assert len(modes) == warned


# ------------------------------------------------------------------ data


def data_of(base: type) -> Any:
    class Data(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Any] = []

        def prepare_data(self) -> None:
            self.calls.append("prepare_data")

        def setup(self, stage: str) -> None:
            self.calls.append(("setup", stage))

        def train_dataloader(self) -> Any:
            return loader(3)

        def val_dataloader(self) -> Any:
            return loader(2)

        def test_dataloader(self) -> Any:
            return loader(1)

        predict_dataloader = test_dataloader

        def teardown(self, stage: str) -> None:
            self.calls.append(("teardown", stage))

    return Data()


@pytest.mark.parametrize("base_of_ours", [eventtrain.LightningDataModule, lightning.LightningDataModule, object])
def test_datamodules_by_position(base_of_ours: type) -> None:
    def run(framework: str, module: Any) -> Any:
        data = data_of(base_of_ours if framework == "ours" else lightning.LightningDataModule)
        trainer = trainer_of(framework, max_epochs=2)
        trainer.fit(module, data)
        trainer.validate(module, data)
        trainer.test(module, data)
        outputs = trainer.predict(module, data)
        assert trainer.datamodule is data
        return data.calls, [output.tolist() for output in outputs], trainer.global_step

    both(run)


@pytest.mark.parametrize("base_of_ours", [lightning.LightningDataModule, object])
def test_a_datamodule_with_only_a_training_loader(base_of_ours: type) -> None:
    def run(framework: str, module: Any) -> Any:
        base = base_of_ours if framework == "ours" else lightning.LightningDataModule
        data = type("Data", (base,), {"train_dataloader": lambda self: loader(3)})()
        trainer = trainer_of(framework, max_epochs=2)
        trainer.fit(module, data)
        return trainer.global_step

    both(run)


def test_lightnings_datamodule_of_datasets_runs_here() -> None:
    def run(framework: str, module: Any) -> Any:
        dataset = loader(3).dataset
        data = lightning.LightningDataModule.from_datasets(dataset, dataset, predict_dataset=dataset, batch_size=6)
        trainer = trainer_of(framework, max_epochs=1)
        torch.manual_seed(1)
        trainer.fit(module, data)
        return trainer.global_step, len(trainer.predict(module, data))

    both(run)


@pytest.mark.parametrize(
    "call",
    [
        lambda trainer, module, data: trainer.fit(module, loader(1), datamodule=data),
        lambda trainer, module, data: trainer.fit(module, val_dataloaders=loader(1), datamodule=data),
        lambda trainer, module, data: trainer.fit(module, data, loader(1)),
        lambda trainer, module, data: trainer.test(module, loader(1), datamodule=data),
        lambda trainer, module, data: trainer.fit(data, module),
        lambda trainer, module, data: trainer.fit(datamodule=data),
    ],
)
def test_both_refuse_data_in_two_ways_and_a_missing_model(call: Any) -> None:
    for name, framework in FRAMEWORKS.items():
        module, data = model_of(framework.LightningModule), data_of(framework.LightningDataModule)
        trainer = trainer_of(name, max_epochs=1)
        with pytest.raises((TypeError, eventtrain.MisconfigurationError, MisconfigurationException)):
            call(trainer, module, data)
        assert module.journal == []


# ------------------------------------------------------------------ requests to stop


@pytest.mark.parametrize("limits", [{}, {"min_steps": 4}, {"min_epochs": 2}])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_validation_end"])
def test_should_stop_is_set_by_the_module(hook: str, limits: dict[str, Any]) -> None:
    def stop(self: Any, *args: Any) -> None:
        self.trainer.should_stop = True

    def run(framework: str, module: Any) -> int:
        trainer = trainer_of(framework, max_epochs=5, **limits)
        trainer.fit(module, loader(3))
        return int(trainer.global_step)

    both(run, **{hook: stop})


# ------------------------------------------------------------------ callbacks


def test_configure_callbacks_replaces_callbacks_of_the_same_class() -> None:
    def run(framework: str, module: Any) -> Any:
        kinds = {"ours": eventtrain.Callback, "theirs": lightning.Callback}
        journal: list[str] = []

        def note(self: Any, *args: Any, **kwargs: Any) -> None:
            journal.append(self.name)

        def named(kind: type, name: str) -> Any:
            callback = kind()
            callback.name = name
            return callback

        base = type("Base", (kinds[framework],), {"on_train_start": note})
        other = type("Other", (kinds[framework],), {"on_train_start": note})
        derived = type("Derived", (base,), {})
        module.configure_callbacks = lambda: [named(derived, "the module's"), named(base, "the module's base")]
        theirs = [named(base, "replaced"), named(other, "other"), named(base, "replaced too")]
        trainer = trainer_of(framework, max_epochs=1, callbacks=theirs)
        trainer.fit(module, loader(1))
        return journal

    both(run)


def test_a_callback_appended_in_setup_listens() -> None:
    def run(framework: str, module: Any) -> int:
        kinds = {"ours": eventtrain.Callback, "theirs": lightning.Callback}
        calls: list[int] = []
        kind = type("Late", (kinds[framework],), {"on_train_batch_end": lambda self, *args, **kwargs: calls.append(1)})
        module.setup = lambda stage: module.trainer.callbacks.append(kind())
        trainer_of(framework, max_epochs=2).fit(module, loader(3))
        return len(calls)

    both(run)


# ------------------------------------------------------------------ evaluation


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_without_inference_mode_gradients_can_be_turned_on(stage: str) -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.head(x).sum(), x)
        self.journal.append(gradient.tolist())
        return gradient

    def run(framework: str, module: Any) -> None:
        getattr(trainer_of(framework, max_epochs=1, inference_mode=False), stage)(module, loader(2))

    both(run, validation_step=step, test_step=step, predict_step=step)


@pytest.mark.parametrize("returned", [True, False])
def test_predictions_are_returned_if_they_are_asked_for(returned: bool) -> None:
    def run(framework: str, module: Any) -> Any:
        outputs = trainer_of(framework, max_epochs=1).predict(module, loader(2), return_predictions=returned)
        return None if outputs is None else [output.tolist() for output in outputs]

    both(run)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_evaluation_needs_no_length(stage: str) -> None:
    both(lambda framework, module: getattr(trainer_of(framework), stage)(module, loader(2)) and None)


def test_the_interval_of_validation_does_not_matter_without_validation() -> None:
    def run(framework: str, module: Any) -> int:
        trainer = trainer_of(framework, max_epochs=1, limit_val_batches=0, val_check_interval=2)
        trainer.fit(module, loader(3), loader(1))
        return int(trainer.global_step)

    both(run)


def test_on_exception_of_a_datamodule_gets_the_exception() -> None:
    def fails(self: Any, batch: Any, batch_idx: int) -> None:
        raise RuntimeError("no")

    def run(framework: str, module: Any) -> list[str]:
        base = FRAMEWORKS[framework].LightningDataModule
        caught: list[str] = []
        hooks = {
            "train_dataloader": lambda self: loader(1),
            "on_exception": lambda self, exception: caught.append(str(exception)),
        }
        with pytest.raises(RuntimeError, match="no"):
            trainer_of(framework, max_epochs=1).fit(module, datamodule=type("Data", (base,), hooks)())
        return caught

    both(run, training_step=fails)
