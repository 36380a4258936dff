"""Values that no file can hold are found before training, and all that adds to a checkpoint is called for each of them."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eventtrain import Callback, LightningDataModule, MisconfigurationError
from eventtrain.callbacks import ModelCheckpoint
from tests.kit import Line, On, Recorder, new_trainer, rows


class Config:
    """A value that no file can hold."""


class OfModule(Line):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = Config()


class InWeights(Line):
    def get_extra_state(self) -> Any:
        return {"config": Config()}

    def set_extra_state(self, state: Any) -> None:
        pass


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return rows(2)


class OfData(Data):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["data_config"] = {"inner": [Config()]}


class OfDataState(Data):
    def state_dict(self) -> dict[str, Any]:
        return {"config": Config()}


class OfState(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"config": Config()}


class OfCallback(Callback):
    def on_save_checkpoint(self, trainer: Any, event: Any) -> None:
        event.checkpoint["state_dict"]["config"] = Config()


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any], list[Callable[[], Any]], str]] = {
    "module": (OfModule, Data, [], r"checkpoint\['config'\] is a .*Config"),
    "extra state": (InWeights, Data, [], r"checkpoint\['state_dict'\]\['_extra_state'\]\['config'\] is a .*Config"),
    "datamodule": (Line, OfData, [], r"checkpoint\['data_config'\]\['inner'\]\[0\] is a .*Config"),
    "state of a datamodule": (Line, OfDataState, [], r"checkpoint\['datamodule'\]\['config'\] is a .*Config"),
    "callback": (Line, Data, [OfCallback], r"checkpoint\['state_dict'\]\['config'\] is a .*Config"),
    "state of a callback": (Line, Data, [OfState], r"checkpoint\['callbacks'\]\['OfState'\]\['config'\] is a .*Config"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_value_that_no_file_can_hold_is_refused_before_the_first_batch(tmp_path: Path, case: str) -> None:
    module, data, callbacks, message = CASES[case]
    batches = Recorder("train_batch_start")
    trainer = new_trainer(ModelCheckpoint(), batches, *[each() for each in callbacks], default_root_dir=tmp_path)
    with pytest.raises(MisconfigurationError, match=message):
        trainer.fit(module(), datamodule=data())
    assert not batches.events


@pytest.mark.parametrize("case", ["module", "datamodule", "callback"])
def test_it_is_a_warning_if_nothing_keeps_checkpoints(case: str) -> None:
    module, data, callbacks, message = CASES[case]
    trainer = new_trainer(*[each() for each in callbacks])
    with pytest.warns(UserWarning, match=f"No checkpoint of this run can be saved: {message}"):
        trainer.fit(module(), datamodule=data())
    assert trainer.global_step == 2


@pytest.mark.parametrize("case", ["state of a datamodule", "state of a callback", "extra state"])
def test_a_run_that_saves_nothing_and_adds_nothing_is_not_checked(case: str) -> None:
    module, data, callbacks, _ = CASES[case]
    new_trainer(*[each() for each in callbacks]).fit(module(), datamodule=data())


def test_a_trial_run_keeps_nothing_so_it_is_not_checked(tmp_path: Path) -> None:
    new_trainer(ModelCheckpoint(), fast_dev_run=1, default_root_dir=tmp_path).fit(OfModule(), rows(1))


def test_a_hook_that_needs_training_first_is_named_in_a_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Needs(Line):
        def on_train_start(self) -> None:
            self.best = 1.0

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["best"] = self.best

    trainer = new_trainer(ModelCheckpoint(), default_root_dir=tmp_path)
    trainer.fit(Needs(), rows(1))
    assert re.search("on_save_checkpoint was tried before training, and raised AttributeError: .*best", caplog.text)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["best"] == 1.0


def test_the_trial_draws_no_random_number_that_training_would() -> None:
    class Draws(Line):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["noise"] = [random.random(), torch.rand(3)]

    drawn = []
    for module in (Draws(), Line()):
        torch.manual_seed(0)
        random.seed(0)
        new_trainer().fit(module, rows(1))
        drawn.append((random.random(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


def test_a_lazy_module_is_tried_before_it_has_weights(tmp_path: Path) -> None:
    class Lazy(Line):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LazyLinear(1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that lazy modules are new
        new_trainer(ModelCheckpoint(), default_root_dir=tmp_path).fit(Lazy(), rows(1))


# ------------------------------------------------------------------ additions after the run


def test_module_and_datamodule_add_to_a_checkpoint_that_is_saved_after_the_run(tmp_path: Path) -> None:
    class Adds(Line):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["module"] = checkpoint["data"] + 1

    class DataAdds(Data):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["data"] = checkpoint["callback"] + 1

    calls: list[int] = []

    def add(trainer: Any, event: Any) -> None:
        calls.append(1)
        event.checkpoint["callback"] = 1

    trainer = new_trainer(On(save_checkpoint=add))
    trainer.fit(Adds(), datamodule=DataAdds())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    content = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert [content[key] for key in ("callback", "data", "module")] == [1, 2, 3]
    assert len(calls) == 2, "once before training, and once for the file"
