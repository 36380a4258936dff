"""The attributes of a module may be given in its class, as properties, or as None for "none"."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from eventtrain import LightningDataModule, LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import LRSchedulerStepping, ModelSummary, TensorBoardLogger
from tests.kit import Line, ModuleOf, Probe, batches, new_trainer, rows, train


class ManualSteps(Probe):
    """Steps by itself, as a module in manual optimization does; its mode is left to subclasses."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.w = nn.Parameter(torch.zeros(1))
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(batch.item())
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def configure_optimizers(self) -> SGD:
        return SGD([self.w], lr=1.0)


class ByClassAttribute(ManualSteps):
    automatic_optimization = False


class ByInheritedAttribute(ByClassAttribute):
    pass


class ByProperty(ManualSteps):
    @property
    def automatic_optimization(self) -> bool:  # type: ignore[override]
        return False


class ByPropertyWithSetter(ManualSteps):
    def __init__(self) -> None:
        super().__init__()
        self.mode = "automatic"
        self.automatic_optimization = False

    @property
    def automatic_optimization(self) -> bool:
        return self.mode == "automatic"

    @automatic_optimization.setter
    def automatic_optimization(self, automatic: bool) -> None:
        self.mode = "automatic" if automatic else "manual"


class BeforeTheConstructor(ManualSteps):
    def __init__(self) -> None:
        self.automatic_optimization = False
        super().__init__()


MANUAL = [ByClassAttribute, ByInheritedAttribute, ByProperty, ByPropertyWithSetter, BeforeTheConstructor]


@pytest.mark.parametrize("kind", MANUAL)
def test_manual_optimization_may_be_declared_in_the_class_as_a_property_or_early(kind: type[ManualSteps]) -> None:
    module = kind()
    trainer = train(module, 3)
    assert module.w.item() == -6.0
    assert trainer.global_step == 3
    assert module.automatic_optimization is False


def test_an_object_may_differ_from_its_class() -> None:
    module = ByClassAttribute()
    module.automatic_optimization = True
    with pytest.raises(MisconfigurationError, match="manual_backward was called in automatic optimization"):
        train(module, 3)
    assert ByClassAttribute().automatic_optimization is False


class ExampleInClass(Line):
    example_input_array = torch.ones(2, 1)


class ExampleAsProperty(Line):
    @property
    def example_input_array(self) -> Tensor:
        return torch.ones(2, self.layer.in_features)


@pytest.mark.parametrize("kind", [ExampleInClass, ExampleAsProperty])
def test_the_example_input_may_be_a_class_attribute_or_a_property(
    kind: type[Line], tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(kind(), rows(2), logger, ModelSummary())
    assert "[2, 1]" in capsys.readouterr().out


# ------------------------------------------------------------------ None for "none"


class Everything(Line):
    """Defines every step, loader and hook whose absence means something; each of them fails if it is called."""

    def fail(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("this method was replaced by None")

    on_train_start = on_fit_start = on_train_batch_end = setup = teardown = prepare_data = configure_model = fail
    configure_callbacks = val_dataloader = test_dataloader = predict_dataloader = validation_step = fail
    optimizer_step = optimizer_zero_grad = backward = configure_gradient_clipping = lr_scheduler_step = fail
    on_before_batch_transfer = transfer_batch_to_device = on_after_batch_transfer = fail
    on_validation_model_eval = on_validation_model_train = on_validation_model_zero_grad = fail
    on_save_checkpoint = on_load_checkpoint = fail


NAMES = [name for name, value in vars(Everything).items() if value is Everything.fail and name != "fail"]


def scheduled(optimizer: Any) -> Any:
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def without_hooks(in_class: bool) -> Any:
    if in_class:
        return type("Emptied", (Everything,), dict.fromkeys(NAMES))(configure=scheduled)
    module = Everything(configure=scheduled)
    for name in NAMES:
        setattr(module, name, None)
    return module


@pytest.mark.parametrize("in_class", [True, False], ids=["in the class", "on the object"])
def test_a_hook_that_is_none_is_no_hook(in_class: bool) -> None:
    torch.manual_seed(0)
    plain = Line(configure=scheduled)
    emptied = without_hooks(in_class)
    emptied.load_state_dict(plain.state_dict())
    for module in (plain, emptied):
        train(module, rows(3), LRSchedulerStepping(), max_epochs=2)
    assert torch.equal(plain.layer.weight, emptied.layer.weight)
    assert emptied.on_train_start is None


@pytest.mark.parametrize("stage", ["validation", "test", "predict"])
def test_mode_hooks_that_are_none_leave_the_work_to_the_trainer(stage: str) -> None:
    seen: list[bool] = []

    def record(batch: Tensor, batch_idx: int) -> None:
        seen.append(module.training)

    module = ModuleOf(**{f"{stage}_step": record})
    for name in ("eval", "train"):
        setattr(module, f"on_{stage}_model_{name}", None)
    if stage == "validation":
        new_trainer(num_sanity_val_steps=0).fit(module, rows(1), rows(2))
    else:
        getattr(new_trainer(), stage)(module, rows(2))
    assert seen == [False, False] and module.training


@pytest.mark.parametrize("in_class", [True, False], ids=["in the class", "on the object"])
def test_a_loader_that_is_none_is_no_loader(in_class: bool) -> None:
    module = without_hooks(in_class)
    trainer = train(module, rows(2), LRSchedulerStepping())
    assert trainer.global_step == 2
    module.test_step = lambda batch, batch_idx: None
    with pytest.raises(MisconfigurationError, match="nothing to test on"):
        trainer.test(module)


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return rows(3)

    def val_dataloader(self) -> Any:
        return rows(1)


@pytest.mark.parametrize("where", ["object", "class"])
def test_a_datamodule_whose_loader_is_none_leaves_it_to_the_module(where: str) -> None:
    kind: Any = type("NoValidation", (Data,), {"val_dataloader": None, "setup": None}) if where == "class" else Data
    data = kind()
    if where == "object":
        data.val_dataloader = data.setup = data.prepare_data = data.teardown = None
    module = Line()
    validated: list[Tensor] = []
    module.validation_step = lambda batch, batch_idx: validated.append(batch)  # type: ignore[method-assign]
    new_trainer().fit(module, datamodule=data)
    assert not validated
    module.val_dataloader = lambda: rows(2)  # type: ignore[method-assign]
    new_trainer().fit(module, datamodule=data)
    assert len(validated) == 2


def test_predict_step_that_is_none_calls_the_module() -> None:
    module = Line()
    module.predict_step = None  # type: ignore[method-assign, assignment]
    (output,) = new_trainer().predict(module, rows(1))
    assert torch.equal(output, module(rows(1)[0]))


@pytest.mark.parametrize(
    ("name", "run", "message"),
    [
        ("training_step", lambda trainer, module: trainer.fit(module, batches(2)), "has no training_step"),
        ("configure_optimizers", lambda trainer, module: trainer.fit(module, batches(2)), "has no configure_optimizers"),
        ("test_step", lambda trainer, module: trainer.test(module, batches(2)), "has no test_step"),
        ("validation_step", lambda trainer, module: trainer.validate(module, batches(2)), "has no validation_step"),
    ],
)
@pytest.mark.parametrize("in_class", [True, False], ids=["in the class", "on the object"])
def test_a_step_that_is_none_is_missing(name: str, run: Callable[[Trainer, Any], Any], message: str, in_class: bool) -> None:
    kind: Any = type("Without", (ModuleOf,), {name: None}) if in_class else ModuleOf
    module = kind()
    if not in_class:
        setattr(module, name, None)
    with pytest.raises(MisconfigurationError, match=message):
        run(new_trainer(), module)


def test_manual_optimization_without_configure_optimizers_trains_nothing() -> None:
    module = ModuleOf(configure_optimizers=None, automatic_optimization=False)
    assert train(module, 2).global_step == 0


# ------------------------------------------------------------------ logger


def test_a_module_without_a_trainer_has_no_logger() -> None:
    assert LightningModule().logger is None
    assert LightningModule().loggers == []
    trained = Line()
    logger = TensorBoardLogger("unused")
    trainer = new_trainer(logger, fast_dev_run=True)
    trainer.fit(trained, rows(1))
    assert trained.logger is logger and trained.loggers == [logger]
    trained.trainer = None
    assert trained.logger is None
