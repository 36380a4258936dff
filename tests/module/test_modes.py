"""The modes of a module around an evaluation, and at the start of a fit."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eventtrain import LightningModule
from tests.kit import ModuleOf, On, new_trainer, train

STAGES = ("validation", "test", "predict")
DATA = [torch.arange(4.0).reshape(4, 1) + k for k in range(3)]


class Normed(LightningModule):
    """Has a batch norm that trains, and a dropout that was put into evaluation mode by hand before the fit."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.head = nn.Linear(1, 1)
        self.frozen = nn.Linear(1, 1).requires_grad_(False).eval()
        self.seen: list[tuple[bool, bool]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.head(self.norm(batch)).square().mean()  # type: ignore[no-any-return]

    def evaluate(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append((self.training, self.norm.training))
        self.norm(batch)

    validation_step = test_step = predict_step = evaluate

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=0.1)

    def flags(self) -> list[bool]:
        return [self.training, self.norm.training, self.head.training, self.frozen.training]


def evaluated(module: Any, stage: str) -> None:
    if stage == "validation":
        train(module, DATA, val=DATA, max_epochs=2)
    else:
        getattr(new_trainer(), stage)(module, DATA)


def overriding(base: type, hooks: dict[str, Any]) -> Any:
    return type("Overriding", (base,), hooks)()


@pytest.mark.parametrize("mode", ["eval", "train", "both"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_mode_hook_overridden_with_super_switches_as_without_it(stage: str, mode: str) -> None:
    calls: list[str] = []

    def hook(name: str) -> Any:
        def method(self: Any) -> None:
            getattr(super(type(self), self), name)()
            calls.append(name)

        return method

    names = [f"on_{stage}_model_{each}" for each in ("eval", "train") if mode in (each, "both")]
    torch.manual_seed(0)
    module = overriding(Normed, {name: hook(name) for name in names})
    plain = Normed()
    plain.load_state_dict(module.state_dict())
    evaluated(module, stage)
    evaluated(plain, stage)
    assert calls == names * (2 if stage == "validation" else 1)
    assert set(module.seen) == {(False, False)}
    assert module.flags() == [True, True, True, False]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


@pytest.mark.parametrize("stage", STAGES)
def test_an_eval_hook_without_super_does_not_switch(stage: str) -> None:
    module = overriding(Normed, {f"on_{stage}_model_eval": lambda self: self.head.eval()})
    evaluated(module, stage)
    assert set(module.seen) == {(True, True)}
    assert module.norm.num_batches_tracked == (3 if stage != "validation" else 12)  # in each batch of each stage
    assert module.flags() == [True, True, True, False]


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_a_train_hook_without_super_does_not_switch_back(stage: str) -> None:
    module = overriding(Normed, {f"on_{stage}_model_train": lambda self: None})
    evaluated(module, stage)
    assert module.flags() == [False] * 4


def test_mode_hooks_that_were_assigned_to_the_module_are_called() -> None:
    module = Normed()
    calls: list[str] = []
    module.on_test_model_eval = lambda: calls.append("eval")  # type: ignore[method-assign]
    module.on_test_model_train = lambda: calls.append("train")  # type: ignore[method-assign]
    evaluated(module, "test")
    assert calls == ["eval", "train"]


def test_modes_come_back_after_an_error_in_the_switch_and_in_the_step() -> None:
    def fails(self: Any) -> None:
        self.eval()
        raise RuntimeError("in the hook")

    module = overriding(Normed, {"on_test_model_eval": fails})
    with pytest.raises(RuntimeError, match="in the hook"):
        evaluated(module, "test")
    assert module.flags() == [True, True, True, False]


def test_an_evaluation_within_another_of_the_same_module_leaves_the_outer_one_in_its_mode() -> None:
    class Nested(Normed):
        def on_test_epoch_start(self) -> None:
            new_trainer().predict(self, DATA)

    module = Nested()
    trainer = new_trainer()
    trainer.test(module, DATA)
    assert set(module.seen) == {(False, False)} and module.flags() == [True, True, True, False]


def test_a_module_can_be_copied_in_an_evaluation() -> None:
    copies: list[Normed] = []
    module = Normed()
    new_trainer(On(test_epoch_start=lambda trainer, event: copies.append(copy.deepcopy(trainer.module)))).test(module, DATA)
    new_trainer().test(copies[0], DATA)
    assert copies[0].training is False  # as it was when it was copied
    assert copies[0].modules is not module.modules


def test_the_hooks_of_lightning_do_the_work_of_their_names_outside_an_evaluation() -> None:
    module = Normed()
    for stage in STAGES:
        getattr(module, f"on_{stage}_model_eval")()
        assert module.flags() == [False] * 4
        getattr(module, f"on_{stage}_model_train")()
        assert module.flags() == [True] * 4


def test_gradients_are_zeroed_before_a_validation_by_super() -> None:
    class Zeroes(ModuleOf):
        def on_validation_model_zero_grad(self) -> None:
            assert self.w.grad is not None
            super().on_validation_model_zero_grad()
            assert self.w.grad is None

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            assert self.w.grad is None

    train(Zeroes(), 2, val=2)


# ------------------------------------------------------------------ evaluation mode before a fit


class Backbone(ModuleOf):
    """Has a backbone of two layers, a norm and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.BatchNorm1d(1), nn.ReLU()))
        self.norm = nn.BatchNorm1d(1)
        self.drop = nn.Dropout()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda module: module.eval(), r"^The module is in evaluation mode .*: Backbone\."),
        (lambda module: module.backbone.eval(), r"\(backbone\)"),
        (lambda module: (module.backbone[0].eval(), module.backbone[1].eval()), r"\(backbone\.0, backbone\.1\)"),
        (lambda module: module.backbone[1].eval(), r"\(backbone\.1\)"),
        (lambda module: module.backbone[0].eval(), r"\(backbone\.0\)"),
    ],
)
def test_a_module_in_evaluation_mode_before_fit_is_warned_about_once(change: Any, names: str) -> None:
    module = Backbone()
    change(module)
    with pytest.warns(UserWarning, match=names) as caught:
        train(module, 3, val=2, max_epochs=2)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "freeze",
    [
        lambda module: None,
        lambda module: module.norm.eval(),
        lambda module: module.drop.eval(),
        lambda module: module.backbone.requires_grad_(False).eval(),
        lambda module: [each.eval() for each in module.modules() if isinstance(each, nn.BatchNorm1d)],
    ],
)
def test_a_part_that_is_frozen_on_purpose_is_not_warned_about(freeze: Any) -> None:
    module = Backbone()
    freeze(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(module, 3)


def test_a_part_that_a_hook_of_the_fit_freezes_is_not_warned_about_and_an_evaluation_needs_no_mode() -> None:
    module = Backbone()
    module.on_train_start = lambda: module.backbone.eval()  # type: ignore[method-assign, assignment]
    train(module, 3)
    assert not module.backbone.training
    module.eval()
    assert new_trainer().predict(ModuleOf(predict_step=lambda batch, batch_idx: 1).eval(), [0]) == [1]
