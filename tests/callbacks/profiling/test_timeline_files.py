"""The files of a timeline: their names, when they are written, and the trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eventtrain import Callback, MisconfigurationError, Trainer
from eventtrain.callbacks import EventTimeline
from eventtrain.distributed import SingleProcess
from tests.callbacks.profiling.timelines import (
    BATCHES,
    MS,
    Clock,
    Model,
    calls,
    check_nesting,
    drawn,
    embedded,
    fit,
    trace,
    trainer_of,
    windows,
    written,
)
from tests.kit import local

# ------------------------------------------------------------------ files


def test_each_run_has_separate_files(tmp_path: Path, clock: Clock) -> None:
    trainer = trainer_of(tmp_path, EventTimeline(clock=clock))
    (tmp_path / "timelines").mkdir()
    (tmp_path / "timelines" / "timeline-7.json").touch()
    for _ in range(2):
        trainer.fit(Model(clock), BATCHES)
    trainer.validate(Model(clock), BATCHES)
    pairs = [name for number in (10, 8, 9) for name in (f"timeline-{number}.html", f"timeline-{number}.json")]
    assert written(tmp_path) == [*pairs[:2], "timeline-7.json", *pairs[2:]]
    assert [embedded(tmp_path, number)["stage"] for number in (8, 9, 10)] == ["fit", "fit", "validate"]
    assert drawn(tmp_path, 8) == drawn(tmp_path, 9)


def test_a_run_that_fails_before_its_setup_keeps_the_files_of_the_last_one(tmp_path: Path, clock: Clock) -> None:
    class Unbuilt(Model):
        def setup(self, stage: str) -> None:
            raise RuntimeError("at the worst moment")

    trainer = trainer_of(tmp_path, EventTimeline(clock=clock))
    trainer.fit(Model(clock), BATCHES)
    before = trace(tmp_path)
    with pytest.raises(RuntimeError, match="worst moment"):
        trainer.fit(Unbuilt(clock), BATCHES)
    assert trace(tmp_path) == before and before["otherData"]["notes"] == []
    assert len(written(tmp_path)) == 2


def test_write_can_be_called_in_a_run_and_the_files_are_replaced_at_its_end(tmp_path: Path, clock: Clock) -> None:
    timeline = EventTimeline(steps=range(4), dirpath="elsewhere", clock=clock)
    seen: list[Any] = []

    class Asks(Callback):
        def on_before_backward(self, trainer: Trainer, event: Any) -> None:
            if trainer.global_step == 1:
                clock.now += 1 * MS
                page, trace = timeline.write()
                seen.extend([page, trace, json.loads(local(trace).read_text())])

    trainer_of(tmp_path, timeline, Asks()).fit(Model(clock), BATCHES)
    page, file, early = seen
    assert (page, file) == (tmp_path / "elsewhere" / "timeline-0.html", tmp_path / "elsewhere" / "timeline-0.json")
    check_nesting(early)
    assert calls(early)[-1]["name"] == "Asks.on_before_backward"
    assert calls(early)[-1]["args"]["cut"] == "under way when this was written"
    assert (calls(early)[-1]["ts"], calls(early)[-1]["dur"]) == (11000.0, 1000.0)
    final = json.loads(file.read_text())
    check_nesting(final)
    assert len(windows(final)) == 4
    assert not any("under way" in event["args"].get("cut", "") for event in calls(final))
    before = file.read_bytes()
    assert timeline.write() == (page, file)
    assert file.read_bytes() == before


def test_there_is_nothing_to_write_before_a_chosen_step() -> None:
    with pytest.raises(MisconfigurationError, match="recorded nothing yet"):
        EventTimeline().write()


def test_a_directory_that_cannot_be_written_to_is_found_before_training(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "timelines").write_text("a file")
    module = Model(clock)
    with pytest.raises(MisconfigurationError, match=r"EventTimeline\(dirpath='timelines'\) cannot be written to"):
        trainer_of(tmp_path, EventTimeline()).fit(module, BATCHES)
    assert clock.now == 0


def test_a_directory_that_is_removed_in_the_run_is_a_warning(tmp_path: Path, clock: Clock) -> None:
    class Loses(Callback):
        def on_train_end(self, trainer: Trainer, event: Any) -> None:
            (tmp_path / "timelines").rmdir()

    timeline = EventTimeline(clock=clock)
    trainer = trainer_of(tmp_path, timeline, Loses())
    with pytest.warns(UserWarning, match="EventTimeline could not write its files") as warned:
        trainer.fit(Model(clock), BATCHES)
    assert len(warned) == 1
    assert trainer.global_step == 6
    (tmp_path / "timelines").mkdir()
    timeline.write()  # the recording is not lost
    assert len(windows(trace(tmp_path))) == 3


def test_steps_that_the_run_does_not_take_are_a_warning(tmp_path: Path, clock: Clock) -> None:
    with pytest.warns(UserWarning, match=r"steps=range\(6, 9\)\) recorded nothing: .* from 0 to 6"):
        fit(tmp_path, clock, steps=range(6, 9))
    assert written(tmp_path) == []


def test_a_fast_dev_run_records_nothing(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, clock, steps=0, options={"fast_dev_run": True})
    assert not (tmp_path / "timelines").exists()


def test_other_ranks_record_nothing(tmp_path: Path, clock: Clock) -> None:
    class SecondRank(SingleProcess):
        global_rank = 1

    class Joins(Callback):
        def on_join_processes(self, trainer: Trainer, event: Any) -> None:
            event.processes = SecondRank()

    timeline = EventTimeline(clock=clock)
    trainer = trainer_of(tmp_path, timeline, Joins())
    trainer.fit(Model(clock), BATCHES)
    assert not (tmp_path / "timelines").exists()
    with pytest.raises(MisconfigurationError, match="on ranks other than zero"):
        timeline.write()


@pytest.mark.parametrize("steps", [-1, [], range(0), range(-2, 3), {True}, 1.5, ["1"], [[1]]])
def test_steps_that_are_no_whole_numbers_from_0_are_refused(steps: Any) -> None:
    with pytest.raises(MisconfigurationError, match=r"EventTimeline\(steps="):
        EventTimeline(steps=steps)


@pytest.mark.parametrize("options", [{"max_events": 0}, {"evaluation_batches": True}])
def test_a_limit_that_is_not_a_whole_number_from_1_is_refused(options: Any) -> None:
    with pytest.raises(MisconfigurationError, match=rf"EventTimeline\({next(iter(options))}=.*whole number from 1"):
        EventTimeline(**options)


# ------------------------------------------------------------------ the trace


def test_the_trace_names_its_tracks(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, clock)
    content = trace(tmp_path)
    assert content["displayTimeUnit"] == "ms"
    tracks = [
        (e["name"], e["pid"], e["tid"], e["args"]) for e in content["traceEvents"] if e["ph"] == "M" and "name" in e["args"]
    ]
    assert tracks == [
        ("process_name", 0, 0, {"name": "Model.fit"}),
        ("thread_name", 0, 1, {"name": "global_step"}),
        ("thread_name", 0, 2, {"name": "events"}),
    ]
    backward = next(event for event in calls(content) if event["name"] == "backward")
    assert backward == {
        "ph": "X",
        "name": "backward",
        "cat": "backward",
        "pid": 0,
        "tid": 2,
        "ts": 3000.0,
        "dur": 5000.0,
        "args": {"kind": "span", "evaluation": 1},
    }
