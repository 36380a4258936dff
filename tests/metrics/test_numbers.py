"""Numbers keep the precision that they are logged with, wherever they go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer  # type: ignore[import-untyped]
from tensorboard.util import tensor_util  # type: ignore[import-untyped]
from torch import Tensor

from eventtrain.callbacks import EarlyStopping, JSONLinesLogger, LRSchedulerStepping, TensorBoardLogger
from eventtrain.metrics.entry import Entry, on_device
from tests.kit import FakeProcesses, Logged, On, Probe, batches, new_trainer, numbers, recording_plateau, train

BIG = 67128463.0
"""A whole number that has no float32: the nearest one is 67128464."""


class Logs(Probe):
    """Logs ``values``, one each step, in all stages."""

    def __init__(self, *values: Any, configure: Any = None, **options: Any) -> None:
        super().__init__(configure=configure)
        self.values = values
        self.options: dict[str, Any] = {"on_step": True, "on_epoch": True} | options

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("value", self.values[batch_idx], **self.options)
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.values[batch_idx])

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test", self.values[batch_idx])


EXACT: dict[str, Any] = {
    "a float": BIG,
    "an int": int(BIG),
    "a NumPy float": np.float64(BIG),
    "a NumPy int": np.int64(BIG),
    "a NumPy array of one": np.array([BIG]),
    "a tensor of float64": torch.tensor(BIG, dtype=torch.float64),
    "a tensor of int64": torch.tensor(int(BIG)),
    "a small fraction": 0.1,
    "more than float32 can hold": 1e300,
    "less than float32 can hold": 1e-300,
}


@pytest.mark.parametrize("case", EXACT)
def test_a_value_is_exact_on_step_and_epoch_and_in_results(case: str) -> None:
    value = EXACT[case]
    expected = float(value.item() if hasattr(value, "item") else value)
    written = Logged()
    trainer = train(Logs(value, value), 2, written, val=2)
    assert numbers(trainer.callback_metrics) == dict.fromkeys(("value", "value_step", "value_epoch", "val"), expected)
    assert {x for _, _, _, values in written.entries for x in values.values()} == {expected}
    assert trainer.test(Logs(value), batches(1)) == [{"test": expected}]


@pytest.mark.parametrize("reduce_fx", ["mean", "min", "max", "sum"])
def test_reductions_are_in_float64(reduce_fx: str) -> None:
    values = [BIG, BIG + 2, BIG + 4]
    expected = {"mean": BIG + 2, "min": BIG, "max": BIG + 4, "sum": 3 * BIG + 6}[reduce_fx]
    trainer = train(Logs(*values, reduce_fx=reduce_fx, on_step=False), 3)
    assert numbers(trainer.callback_metrics) == {"value": expected}


def test_a_value_that_is_wider_than_those_before_it_is_not_narrowed() -> None:
    """A tensor first, then a number: the sum becomes float64."""
    trainer = train(Logs(torch.tensor(1.0), BIG, reduce_fx="sum", on_step=False), 2)
    assert numbers(trainer.callback_metrics) == {"value": BIG + 1}


def test_float32_stays_float32() -> None:
    """As torch and Lightning reduce it."""
    values = [torch.tensor(x) for x in (0.1, 0.2, 0.7)]
    trainer = train(Logs(*values, on_step=False), 3)
    assert trainer.callback_metrics["value"].dtype == torch.float32
    assert torch.equal(trainer.callback_metrics["value"], ((values[0] + values[1]) + values[2]) / 3)


def test_the_type_of_numbers_does_not_depend_on_torchs_default() -> None:
    torch.set_default_dtype(torch.float16)
    try:
        trainer = train(Logs(BIG), [torch.ones(1, dtype=torch.float16)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert numbers(trainer.callback_metrics)["value"] == BIG


def test_a_number_is_exact_after_a_resume_in_the_epoch(in_tmp_path: None) -> None:
    save = On(take_checkpoint=lambda trainer, event: trainer.global_step == 2 and trainer.save_checkpoint("two.ckpt"))
    whole = train(Logs(BIG, BIG + 2, BIG + 4), 3, save)
    resumed = new_trainer()
    resumed.fit(Logs(BIG, BIG + 2, BIG + 4), batches(3), ckpt_path="two.ckpt")
    assert numbers(resumed.callback_metrics) == numbers(whole.callback_metrics)
    assert numbers(resumed.callback_metrics)["value_epoch"] == BIG + 2


def test_a_number_is_exact_over_several_processes() -> None:
    trainer = new_trainer()
    trainer.processes = FakeProcesses()
    trainer.fit(Logs(BIG, BIG + 2, sync_dist=True), batches(2))
    assert numbers(trainer.callback_metrics) == {"value": BIG + 1, "value_step": BIG + 2, "value_epoch": BIG + 1}


def test_callbacks_and_schedulers_see_the_number() -> None:
    seen: list[float] = []
    configure = recording_plateau("val", seen)
    stopping = EarlyStopping("val", patience=9)
    train(Logs(0.1, configure=configure), 1, stopping, LRSchedulerStepping(), val=1)
    assert seen == [0.1]
    assert stopping.best == 0.1


def test_a_device_without_float64_gets_no_float64() -> None:
    """Such a value was logged as a number, which is on the CPU; a sum of whole numbers there is in float32."""
    device = torch.device("mps")
    value = torch.tensor(BIG, dtype=torch.float64)
    assert on_device(value, device) is value
    entry = Entry("value", "", (False, True, False, True, "sum", False), on_step=False, on_epoch=True)
    state = entry.state_dict() | {"total": value}
    assert Entry.of(state, device).total is value


# ------------------------------------------------------------------ files


def test_json_lines_have_the_number(tmp_path: Path) -> None:
    logger = JSONLinesLogger(tmp_path / "values.jsonl", log_every_n_steps=1)
    train(Logs(BIG, BIG + 2), 2, logger)
    lines = [json.loads(line) for line in (tmp_path / "values.jsonl").read_text().splitlines()]
    assert [line.get("value_step") or line["value_epoch"] for line in lines] == [BIG, BIG + 2, BIG + 1]


def test_tensorboard_shows_the_number(tmp_path: Path) -> None:
    """Read as TensorBoard's server reads it. Values that 32 bits hold are in TensorBoard's own form, as ever."""
    values = [1.0, 0.1, BIG, 2.0**30, BIG + 2, float("inf"), -BIG]
    logger = TensorBoardLogger(tmp_path, log_every_n_steps=1)
    train(Logs(*values, on_epoch=False), len(values), logger)
    events = EventMultiplexer({"run": str(logger.run_dir)}).Reload().Tensors("run", "value")
    shown = [tensor_util.make_ndarray(event.tensor_proto).item() for event in events]
    assert shown == [1.0, np.float32(0.1), BIG, 2.0**30, BIG + 2, float("inf"), -BIG]
    assert [event.step for event in events] == list(range(1, len(values) + 1))


@pytest.mark.parametrize("reduce_fx", ["mean", "min", "max", "sum"])
def test_a_number_and_a_tensor_of_another_device_may_have_one_name(reduce_fx: str) -> None:
    """The reduction moves to the device of the tensor, in whichever order they come. "meta" stands for it here."""
    for values in ((1.0, torch.zeros((), device="meta")), (torch.zeros((), device="meta"), 1.0)):
        trainer = train(Logs(*values, reduce_fx=reduce_fx, on_step=False), 2)
        assert trainer.callback_metrics["value"].device.type == "meta"
