"""The benchmarks keep their word: every contestant does the same work, and ratios compare times of one repetition."""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch.utils.data import DataLoader

from benchmarks import overhead, work
from benchmarks.contestants import REGISTRY, TAKES_PART, contestant
from benchmarks.overhead import BASELINE, CLOSURE
from benchmarks.report import save
from benchmarks.work import LOG_EVERY, SETTINGS, Batches, Setting, parameters

ACCUMULATE = SETTINGS["standard"].accumulate
MODULES = {"Ignite": "ignite", "Accelerate": "accelerate", "HF Trainer": "transformers"}
WARNINGS = {
    "Lightning": [
        # Lightning looks into each batch by a class that torch has renamed.
        pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
    ],
    "Ignite": [
        # Ignite imports torch.distributed.optim, parts of which torch itself still scripts.
        pytest.mark.filterwarnings("ignore:`torch.jit.(script|interface)` is deprecated:DeprecationWarning")
    ],
}


def entered(*setting_names: str) -> list[Any]:
    """Return every contestant but the baseline, in each of these settings that it takes part in."""
    return [
        pytest.param(name, setting, id=f"{name}: {setting}", marks=WARNINGS.get(name.partition(",")[0], []))
        for name in REGISTRY
        for setting in TAKES_PART[name]
        if name != BASELINE and setting in setting_names
    ]


@dataclass
class Outcome:
    """The results of a contestant's run: parameters, and the losses and rates of its event files."""

    parameters: torch.Tensor
    losses: set[float]
    rates: set[float]


@functools.cache
def outcome(name: str, setting_name: str) -> Outcome:
    """Return the results of a short run; in the standard setting it ends with the first update that is written."""
    if name in MODULES:
        pytest.importorskip(MODULES[name])
    setting = SETTINGS[setting_name]
    setting = replace(setting, warm_up=ACCUMULATE, batches=(LOG_EVERY - 2) * ACCUMULATE if setting.extras else 1)
    train = contestant(name)
    with tempfile.TemporaryDirectory() as folder:
        network = train(setting, Batches(setting), Path(folder))
        return Outcome(parameters(network), *written(Path(folder)))


def written(folder: Path) -> tuple[set[float], set[float]]:
    """Return the losses and the rates in a folder's event files."""
    losses, rates = set(), set()
    for file in folder.rglob("events.out.tfevents.*"):
        accumulator = EventAccumulator(str(file)).Reload()
        for tag in accumulator.Tags()["scalars"]:
            values = {event.value for event in accumulator.Scalars(tag)}
            if tag.rpartition("/")[2] == "loss":
                losses |= values
            elif tag.startswith("lr") or tag.endswith("learning_rate"):
                rates |= values
    return losses, rates


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_run_is_made_of_whole_windows_and_begins_to_be_measured_at_one(setting: Setting) -> None:
    assert len(Batches(setting)) == setting.total_batches == setting.total_steps * setting.accumulate
    assert setting.warm_up % setting.accumulate == setting.batches % setting.accumulate == 0


@pytest.mark.parametrize(("name", "setting_name"), entered(*SETTINGS))
def test_a_contestant_ends_with_the_parameters_of_the_hand_written_loop(name: str, setting_name: str) -> None:
    expected = outcome(BASELINE, setting_name).parameters
    assert not torch.equal(expected, parameters(work.make_model(SETTINGS[setting_name])))
    assert torch.equal(outcome(name, setting_name).parameters, expected)


@pytest.mark.parametrize(("name", "setting_name"), entered("standard"))
def test_a_contestant_writes_the_loss_and_the_rate_that_the_hand_written_loop_writes(name: str, setting_name: str) -> None:
    expected, actual = outcome(BASELINE, setting_name), outcome(name, setting_name)
    assert actual.rates == expected.rates
    assert len(actual.rates) == len(actual.losses) == len(expected.losses) == 1
    # The Trainer of transformers writes the mean of all losses since the last time.
    assert (actual.losses == expected.losses) is (name != "HF Trainer")


HOW_BATCHES_ARE_TAKEN = {"as a loader": iter, "as a data set": lambda batches: DataLoader(batches, batch_size=None)}


@pytest.mark.parametrize("take", HOW_BATCHES_ARE_TAKEN.values(), ids=HOW_BATCHES_ARE_TAKEN)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_clock_runs_from_the_first_measured_batch_until_the_one_after_the_last(
    take: Callable[[Batches], Iterable[Any]], accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting("bare", batches=8, accumulate=accumulate)
    batches = Batches(setting)
    moments = []
    trained_on = 0

    def clock() -> float:
        moments.append(trained_on)
        return 10.0 * trained_on

    monkeypatch.setattr(time, "perf_counter", clock)
    for _ in take(batches):
        trained_on += 1
    assert trained_on == setting.total_batches
    assert moments == [setting.warm_up, setting.warm_up + 8]
    assert batches.seconds == 80.0


def test_every_run_gets_the_same_batches() -> None:
    first, second = Batches(SETTINGS["bare"]), Batches(SETTINGS["bare"])
    for (x, y), (other_x, other_y) in zip(first, DataLoader(second, batch_size=None), strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)


class Runs:
    """Stands in for ``overhead.run``: a machine that gets twice as slow with each repetition."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, speeds: dict[str, float], wrong: str = "") -> None:
        self.speeds, self.wrong = speeds, wrong
        self.names: list[str] = []
        monkeypatch.setattr(overhead, "run", self)
        monkeypatch.setattr(overhead, "described", lambda name: f"all of {name}")

    def __call__(self, name: str, setting: Setting) -> tuple[float, torch.Tensor]:
        repetition = len(self.repetitions) - 1
        self.names.append(name)
        return self.speeds[name] * 2.0**repetition, torch.tensor([1.0, 2.0 + (name == self.wrong) / 4])

    @property
    def repetitions(self) -> list[list[str]]:
        """The contestants of each repetition, after the baseline and the comparison of parameters."""
        timed, size = self.names[1 + len(self.speeds) :], len(self.speeds)
        return [timed[at : at + size] for at in range(0, len(timed) + 1, size)]


def test_each_repetition_begins_with_another_contestant(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, {BASELINE: 8.0, "a": 12.0, "b": 20.0})
    overhead.compare(SETTINGS["bare"], [BASELINE, "a", "b"], repetitions=4)
    assert runs.names[:4] == [BASELINE, BASELINE, "a", "b"]
    assert runs.repetitions == [[BASELINE, "a", "b"], ["a", "b", BASELINE], ["b", BASELINE, "a"], [BASELINE, "a", "b"], []]


def test_a_time_is_divided_by_the_hand_written_loops_of_the_same_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {BASELINE: 8.0, CLOSURE: 10.0, "a": 12.0}
    Runs(monkeypatch, speeds)
    results = overhead.compare(SETTINGS["bare"], list(speeds), repetitions=3)
    assert [result.name for result in results] == list(speeds)
    assert [result.microseconds for result in results] == [[8.0, 16.0, 32.0], [10.0, 20.0, 40.0], [12.0, 24.0, 48.0]]
    assert [result.ratios for result in results] == [[1.0] * 3, [1.25] * 3, [1.5] * 3]
    assert [result.closure_ratios for result in results] == [[0.8] * 3, [1.0] * 3, [1.2] * 3]


def test_a_comparison_says_whose_parameters_differ_and_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    Runs(monkeypatch, {BASELINE: 8.0, "a": 8.0, "b": 8.0}, wrong="b")
    results = overhead.compare(SETTINGS["bare"], [BASELINE, "a", "b"], repetitions=1)
    assert [(result.equal, result.difference) for result in results] == [(True, 0.0), (True, 0.0), (False, 0.25)]
    assert [result.switched_on for result in results] == [f"all of {name}" for name in (BASELINE, "a", "b")]
    assert all(result.closure_ratios == [] for result in results)


PAGE = """# Figures

<!-- generated: one -->
old
<!-- end: one -->
Prose about `<!-- end: -->`.
<!-- generated: two -->
kept
<!-- end: two -->
"""


def test_saving_rewrites_its_block_and_its_figures_and_nothing_else(tmp_path: Path) -> None:
    page, path = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text(PAGE)
    save("two", "kept", {"torch": "2"}, [2.5], page, path)
    save("one", "old", {"torch": "1"}, [1.5], page, path)
    before, figures = page.read_text(), json.loads(path.read_text())
    save("one", "| new |", {"torch": "3", "core": 1}, [0.5], page, path)
    assert page.read_text() == before.replace("old\n\n*torch 1*", "| new |\n\n*torch 3, core 1*") != before
    assert before == PAGE.replace("old", "old\n\n*torch 1*").replace("kept", "kept\n\n*torch 2*")
    assert figures["two"] == {"measured on": {"torch": "2"}, "figures": [2.5]}
    expected = figures | {"one": {"measured on": {"torch": "3", "core": 1}, "figures": [0.5]}}
    assert json.loads(path.read_text()) == expected != figures


def test_saving_under_an_unknown_name_changes_nothing(tmp_path: Path) -> None:
    page, path = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text(PAGE)
    with pytest.raises(ValueError, match="no block 'three'"):
        save("three", "| new |", {}, [], page, path)
    assert page.read_text() == PAGE
    assert not path.exists()
