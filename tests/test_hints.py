"""The hints of error messages name arguments, attributes, events and classes that exist."""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.utils.prune

import eventtrain
from eventtrain import LightningDataModule, LightningModule, Trainer, callbacks
from eventtrain.events import EVENTS, module_hook
from eventtrain.hints import hint, tables
from eventtrain.run.hook_connections import LIKE_A_HOOK
from tests.kit import ModuleOf

CLASSES: dict[str, Any] = {"Trainer": Trainer, **{name: getattr(callbacks, name) for name in callbacks.__all__}}
PARTS = (LightningModule, LightningDataModule)
HINTS = [(table, name, text) for table, hints in tables().items() for name, text in hints.items()]
CODE = [(table, name, code) for table, name, text in HINTS for code in re.findall("`([^`]+)`", text)]


class Logging(ModuleOf):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def test_step(self, batch: Any, batch_idx: int) -> None: ...

    def predict_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([self.w], lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def tree_of(code: str) -> ast.AST:
    if code.startswith(("def ", "class ")):
        code = f"{code}: ..."
    if code.startswith("@"):
        code = f"{code}\ndef function(trainer, event): ..."
    return ast.parse(code.replace("{value}", "1"))


def described() -> Iterator[tuple[str, ast.AST]]:
    for table, name, code in CODE:
        if not code.startswith("--"):  # an option of torchrun
            yield f"[{table}] {name}: `{code}`", tree_of(code)


def test_every_hint_is_a_sentence() -> None:
    for table, name, text in HINTS:
        if table not in ("instead", "loader"):
            assert text[0].isupper() or text[0] == "`" or text.startswith("torchrun"), (table, name)
            assert text.endswith("."), (table, name)


def test_hints_call_classes_and_methods_with_arguments_that_exist() -> None:
    wrong = []
    for where, tree in described():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            function: Any = None
            if isinstance(node.func, ast.Name) and node.func.id in CLASSES:
                function = CLASSES[node.func.id]
            elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                owner = {"trainer": Trainer, "self": LightningModule}.get(node.func.value.id)
                function = None if owner is None else getattr(owner, node.func.attr, None)
                if owner is not None and function is None:
                    wrong.append(where)
            if function is not None:
                positional = [None] * (len(node.args) + (not isinstance(function, type)))
                try:
                    inspect.signature(function).bind_partial(*positional, **{str(k.arg): None for k in node.keywords})
                except TypeError as error:
                    wrong.append(f"{where}: {error}")
    assert wrong == []


def test_hints_define_methods_that_are_called_with_these_arguments() -> None:
    wrong = []
    hooks = {module_hook(event): event.module_arguments for event in EVENTS.values()}
    for where, tree in described():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name == "function":
                continue
            arguments = tuple(argument.arg for argument in node.args.args[1:])
            if arguments == ("trainer", "event"):
                right = node.name.removeprefix("on_") in EVENTS
            elif node.name in hooks:
                fields = hooks[node.name]
                right = arguments == (("event",) if fields is None else fields)
            elif node.name.endswith("_step") and not node.name.startswith("lr_"):
                right = arguments == ("batch", "batch_idx") and hasattr(LightningModule, node.name)
            else:
                method = next(getattr(part, node.name) for part in PARTS if hasattr(part, node.name))
                right = arguments == tuple(inspect.signature(method).parameters)[1:]
            if not right:
                wrong.append(where)
    assert wrong == []


def test_hints_name_attributes_of_torch_and_of_the_package_that_exist() -> None:
    wrong = []
    for where, tree in described():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.", "eventtrain.", "LightningModule.")):
                value: Any = {"torch": torch, "eventtrain": eventtrain, "LightningModule": LightningModule}
                for part in ast.unparse(node).split("."):
                    value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
                if value is None:
                    wrong.append(where)
    assert wrong == []


def test_hints_for_attributes_of_a_trainer_can_be_run(in_tmp_path: None) -> None:
    names = ("ModelCheckpoint", "EarlyStopping", "ProgressBar", "MixedPrecision", "GradientAccumulation", "GradientClipping")
    arguments = {"EarlyStopping": ["loss"], "MixedPrecision": ["bf16"], "ModelCheckpoint": ["checkpoints"]}
    attached = [CLASSES[name](*arguments.get(name, [])) for name in (*names, "TensorBoardLogger", "Profiler", "Preemption")]
    trainer = Trainer(max_epochs=1, callbacks=attached, device="cpu")
    model = Logging()
    loader = [torch.ones(1)]
    trainer.fit(model, loader)
    namespace = {**CLASSES, "trainer": trainer, "model": model, "loader": loader, "self": model, "value": 1}
    done = 0
    for table, name, code in CODE:
        if table == "trainer" and code.startswith("trainer."):
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "trainer.* does nothing, because no fit is running")
                    eval(code, {**namespace, "function": lambda trainer, event: None})
            except Exception as error:
                raise AssertionError(f"{name}: {code}") from error
            done += 1
    trainer.callback(callbacks.TensorBoardLogger).writer.close()
    assert done > 80


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict", "save_checkpoint"])
def test_no_hint_is_for_an_argument_of_a_stage_that_exists(stage: str) -> None:
    assert not tables()[f"Trainer.{stage}"].keys() & inspect.signature(getattr(Trainer, stage)).parameters.keys()


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_no_hint_is_for_an_argument_that_exists(name: str) -> None:
    assert not tables().get(name, {}).keys() & inspect.signature(CLASSES[name]).parameters.keys()


def test_no_hint_is_for_an_attribute_a_hook_or_a_handler_that_exists() -> None:
    of_trainer = {*dir(Trainer), *vars(Trainer(max_epochs=1, device="cpu", default_callbacks=False))}
    assert not tables()["trainer"].keys() & of_trainer
    of_module = {*dir(LightningModule), *vars(LightningModule())}
    assert not tables()["module"].keys() & of_module
    for table in ("hook", "instead", "loader"):
        assert not tables()[table].keys() & {*of_module, *dir(LightningDataModule)}
    assert {*tables()["instead"].values(), *tables()["loader"].values()} <= of_module
    assert not tables()["callback"].keys() & {f"on_{name}" for name in EVENTS}


def test_all_hooks_that_nobody_calls_are_looked_up() -> None:
    assert all(LIKE_A_HOOK.match(name) for table in ("hook", "instead") for name in tables()[table])


def test_a_hint_shows_the_value_if_it_is_short() -> None:
    assert hint("Trainer", "accumulate_grad_batches", value=4) == "Attach `GradientAccumulation(4)` in `callbacks=[...]`."
    assert hint("Trainer", "accumulate_grad_batches", value=list(range(99))).startswith("Attach `GradientAccumulation(...)`")
    assert hint("Trainer", "accumulate_grad_batches").startswith("Attach `GradientAccumulation(...)`")


def test_a_name_without_a_hint_is_compared_with_the_names_that_exist_and_those_that_have_one() -> None:
    assert hint("Trainer", "max_epoch", ["max_epochs"]) == "Did you mean 'max_epochs'?"
    assert hint("Trainer", "max_tiime", ["max_epochs"], value=1).startswith("Did you mean 'max_time'? Attach `Timer(1)`")
    assert hint("Trainer", "zzz", ["max_epochs"]) == ""
    assert hint("no such table", "zzz") == ""
