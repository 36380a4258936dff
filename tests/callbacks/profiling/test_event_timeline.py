"""What the timeline says is what ran: exact times by a clock that the tests move, and the page as a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eventtrain import Callback, LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import EventTimeline, GradientAccumulation, GradientClipping, LRSchedulerStepping
from eventtrain.callbacks.profiling.timeline import CATEGORIES, CATEGORY_OF, SPANS, json_in_html
from eventtrain.distributed import SingleProcess
from eventtrain.events import EVENTS

US = 1_000  # nanoseconds
MS = 1_000_000
BATCHES = [torch.full((2, 1), float(x)) for x in (1, 2, 3, 4, 5, 6)]


class Clock:
    """Time that passes where a test lets it pass, and nowhere else."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class Model(LightningModule):
    """Forward takes 3 ms, backward 5 ms, a validation step 1 ms."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(1, 1)
        self.clock = clock

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.clock.now += 3 * MS
        return self.layer(batch).square().mean()

    def backward(self, loss: Tensor) -> None:
        self.clock.now += 5 * MS
        loss.backward()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.clock.now += 1 * MS
        self.log("val_loss", self.layer(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Manual(Model):
    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Listens(Callback):
    """Takes 20 us at one event, and 7 us more in a listener of the same name elsewhere."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_before_backward(self, trainer: Trainer, event: Any) -> None:
        self.clock.now += 20 * US

    def on_after_update(self, trainer: Trainer, event: Any) -> None:
        self.clock.now += 7 * US


@pytest.fixture
def clock() -> Clock:
    return Clock()


def fit(
    tmp_path: Path, clock: Clock, *callbacks: Any, model: Model | None = None, options: Any = None, **timeline: Any
) -> EventTimeline:
    """Trains an epoch of six batches with a timeline of step 1; returns the timeline."""
    recorded = EventTimeline(**{"steps": 1, "clock": clock, **timeline})
    trainer_of(tmp_path, recorded, *callbacks, **(options or {})).fit(model or Model(clock), BATCHES)
    return recorded


def trainer_of(tmp_path: Path, *callbacks: Any, **options: Any) -> Trainer:
    options = {"max_epochs": 1, "device": "cpu", "default_callbacks": False, "default_root_dir": tmp_path, **options}
    return Trainer(callbacks=list(callbacks), **options)


def fails(tmp_path: Path, timeline: EventTimeline, model: Model, *callbacks: Any, error: Any = RuntimeError) -> Trainer:
    trainer = trainer_of(tmp_path, timeline, *callbacks)
    with pytest.raises(error, match="at the worst moment"):
        trainer.fit(model, BATCHES)
    return trainer


# ------------------------------------------------------------------ reading the files


def written(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "timelines").glob("*"))


def trace(tmp_path: Path, number: int = 0) -> dict[str, Any]:
    content = (tmp_path / "timelines" / f"timeline-{number}.json").read_text(encoding="utf-8")
    result: dict[str, Any] = json.loads(content, parse_constant=refuse)
    check_nesting(result)
    return result


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def check_nesting(trace: dict[str, Any]) -> None:
    """Of one thread's events in the order of the file, each begins after those before it, and lies in the last of them
    that has not ended: what viewers draw by."""
    threads: dict[int, list[int]] = {}
    before = 0
    for event in trace["traceEvents"]:
        if event["ph"] != "X":
            assert event["ph"] == "M" and event["args"]
            continue
        start, took = round(event["ts"] * 1000), round(event["dur"] * 1000)
        ends = threads.setdefault(event["tid"], [])
        assert took >= 0 and (not ends or start >= before), event
        while ends and ends[-1] < start + took and ends[-1] <= start:
            ends.pop()
        assert not ends or start + took <= ends[-1], event
        ends.append(start + took)
        before = start


def calls(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["tid"] == 2]


def names(trace: dict[str, Any], kind: str = "event") -> list[str]:
    return [event["name"] for event in calls(trace) if event["args"]["kind"] == kind]


def windows(trace: dict[str, Any]) -> list[tuple[str, float, float]]:
    return [(e["name"], e["ts"], e["dur"]) for e in trace["traceEvents"] if e["ph"] == "X" and e["tid"] == 1]


def embedded(tmp_path: Path, number: int = 0) -> dict[str, Any]:
    """The data in a page, found and read as a browser does."""
    page = (tmp_path / "timelines" / f"timeline-{number}.html").read_text(encoding="utf-8")
    (data,) = [text for kind, text in Document(page).scripts if kind == "application/json"]
    content: dict[str, Any] = json.loads(data, parse_constant=refuse)
    return content


def drawn(tmp_path: Path, number: int = 0) -> str:
    """What was recorded, a line each: an event begins with a dot, a listener with an angle, and ends with its us."""
    sign = {"span": "", "event": ". ", "listener": "> "}
    return "".join(
        f"{'  ' * depth}{sign[kind]}{name} {(end - start) // US}\n"
        for kind, name, _, depth, start, end, *_ in embedded(tmp_path, number)["records"]
    )


def cuts(tmp_path: Path, number: int = 0) -> dict[str, tuple[str, bool]]:
    """What is said of the records that did not begin or end by themselves, and whether an error ended them."""
    return {name: (cut, failed) for _, name, *_, cut, failed in embedded(tmp_path, number)["records"] if cut or failed}


def details(tmp_path: Path, record: str, number: int = 0) -> dict[str, Any]:
    """The details of the first record of a name."""
    return next(each[6] for each in embedded(tmp_path, number)["records"] if each[1] == record)


class Document(HTMLParser):
    """A page, taken apart.

    Attributes:
        elements: Its elements in order, as pairs of tag and attributes.
        scripts: Its scripts, as pairs of type and text.
        rows: The table's rows: attributes, and the text of each cell.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.rows: list[tuple[dict[str, str | None], list[str]]] = []
        self.title = ""
        self._within = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag in ("script", "title", "td"):
            self._within = tag
        if tag == "script":
            self.scripts.append((attributes.get("type"), ""))
        elif tag == "tr":
            self.rows.append((attributes, []))
        elif tag == "td":
            self.rows[-1][1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._within:
            self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        elif self._within == "title":
            self.title += data
        elif self._within == "td":
            self.rows[-1][1][-1] += data


# ------------------------------------------------------------------ what is recorded

STEP_OF_TWO_BATCHES = """\
epoch 0 16047
  batch fetch 0
    . before_batch_fetch 0
    . after_batch_fetch 0
  batch 2 8020
    . train_batch_start 0
      > GradientAccumulation.on_train_batch_start 0
    forward 3000
      . before_forward 0
      . after_forward 0
    zero_grad 0
      . before_zero_grad 0
      . after_zero_grad 0
    backward 5020
      . before_backward 20
        > Listens.on_before_backward 20
      . after_backward 0
    . train_batch_end 0
  . safe_point 0
    > EventTimeline.on_safe_point 0
  batch fetch 0
    . before_batch_fetch 0
    . after_batch_fetch 0
  batch 3 8027
    . train_batch_start 0
      > GradientAccumulation.on_train_batch_start 0
    optimizer step 8020
      . optimizer_step 0
      forward 3000
        . before_forward 0
        . after_forward 0
      backward 5020
        . before_backward 20
          > Listens.on_before_backward 20
        . after_backward 0
      . reduce_gradients 0
      . unscale_gradients 0
      . gradients_ready 0
        > GradientAccumulation.on_gradients_ready 0
      . before_optimizer_step 0
      clipping 0
        . before_gradient_clipping 0
          > GradientClipping.on_before_gradient_clipping 0
        . after_gradient_clipping 0
      . after_optimizer_step 0
    . after_update 7
      > Listens.on_after_update 7
    . train_batch_end 0
  . metrics_logged 0
  . safe_point 0
    > EventTimeline.on_safe_point 0
"""


def test_a_step_is_recorded_whole_in_order_nested_and_timed(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, clock, GradientAccumulation(2), GradientClipping(1.0), Listens(clock))
    assert drawn(tmp_path) == STEP_OF_TWO_BATCHES
    assert windows(trace(tmp_path)) == [("global_step 1", 0.0, 16047.0)]
    assert cuts(tmp_path) == {"epoch 0": ("began before the recording; the recording ended", False)}


def test_manual_optimization_lies_in_its_forward(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, clock, model=Manual(clock))
    spans = [line for line in drawn(tmp_path).splitlines() if line.lstrip()[0] not in ".>"]
    assert spans == [
        "epoch 0 8000",
        "  batch fetch 0",
        "  batch 1 8000",
        "    forward 8000",
        "      zero_grad 0",
        "      backward 5000",
        "      optimizer step 0",
        "        clipping 0",
    ]


def test_the_epochs_of_several_steps_hold_their_batches(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, clock, steps=range(5, 7), options={"max_epochs": 2})
    outermost = [line for line in drawn(tmp_path).splitlines() if re.match(r" {0,2}(epoch|batch \d)", line)]
    assert outermost == ["epoch 0 8000", "  batch 5 8000", "epoch 1 8000", "  batch 0 8000"]
    # The second was seen to begin, and not to end; of the first it is the other way round.
    assert cuts(tmp_path) == {"epoch 0": ("began before the recording", False), "epoch 1": ("the recording ended", False)}
    assert windows(trace(tmp_path)) == [("global_step 5", 0.0, 8000.0), ("global_step 6", 8000.0, 8000.0)]


class Saves(Callback):
    """Writes a checkpoint at each safe point, which takes 2 ms."""

    def __init__(self, clock: Clock, path: Path) -> None:
        self.clock, self.path = clock, path

    def on_safe_point(self, trainer: Trainer, event: Any) -> None:
        trainer.save_checkpoint(self.path / f"{trainer.global_step}.ckpt")

    def on_save_checkpoint(self, trainer: Trainer, event: Any) -> None:
        self.clock.now += 2 * MS


def test_validation_and_checkpoint_belong_to_the_step_that_they_follow(tmp_path: Path, clock: Clock) -> None:
    timeline = EventTimeline(steps=1, clock=clock)
    # Behind the timeline, so that it writes when the timeline has already said what is due.
    trainer = trainer_of(tmp_path, timeline, Saves(clock, tmp_path), val_check_interval=1, num_sanity_val_steps=0)
    trainer.fit(Model(clock), BATCHES, BATCHES[:1])
    spans = [line for line in drawn(tmp_path).splitlines() if re.match(r" *(batch|validation|checkpoint) ", line)]
    assert spans == [
        "  batch fetch 0",
        "  batch 1 8000",
        "  validation 1000",
        "    batch fetch 0",
        "    validation batch 0 1000",
        "      checkpoint 2000",
    ]
    recorded = drawn(tmp_path)
    assert "  . safe_point 2000\n    > EventTimeline.on_safe_point 0\n    > Saves.on_safe_point 2000\n" in recorded
    assert recorded.index("> Saves.on_safe_point") < recorded.index("checkpoint 2000")
    assert details(tmp_path, "checkpoint_saved") == {"path": str(tmp_path / "2.ckpt")}


def test_a_scheduler_steps_inside_of_the_listener_that_steps_it(tmp_path: Path, clock: Clock) -> None:
    class Scheduled(Model):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    fit(tmp_path, clock, LRSchedulerStepping(), model=Scheduled(clock))
    expected = """\
    . after_update 0
      > LRSchedulerStepping.on_after_update 0
        scheduler step 0
          . before_lr_scheduler_step 0
          . after_lr_scheduler_step 0
    . train_batch_end 0
"""
    assert expected in drawn(tmp_path)
    assert details(tmp_path, "scheduler step") == {"scheduler": "StepLR", "learning_rates": [0.005]}
    assert details(tmp_path, "after_lr_scheduler_step") == {"scheduler": "StepLR", "learning_rates": [0.0025]}


def test_what_has_no_counterpart_spans_nothing(tmp_path: Path, clock: Clock) -> None:
    class Ends(Callback):
        def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
            if event.batch_idx == 2:
                event.end_epoch()

    timeline = EventTimeline(steps=range(3), clock=clock)
    trainer = trainer_of(tmp_path, timeline, Ends(), num_sanity_val_steps=0)
    trainer.fit(Model(clock), BATCHES, BATCHES[:1])
    spans = [line for line in drawn(tmp_path).splitlines() if re.match(r" *(batch \d|validation \d|clipping)", line)]
    stepping = ["  batch 0 8000", "      clipping 0", "  batch 1 8000", "      clipping 0"]
    assert spans == [*stepping, "  batch 2 0", "  validation 1000"]
    assert cuts(tmp_path) == {}


def test_the_details_are_what_listeners_left_in_the_payload(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, clock, GradientAccumulation(2), GradientClipping(0.5, norm_type=float("inf")))
    plan = {"batch_idx": 2, "step": False, "zero_grad": True, "loss_scale": 0.5}
    assert details(tmp_path, "batch 2") == plan
    clipping = {"optimizer": "SGD", "gradient_clip_val": 0.5, "gradient_clip_algorithm": "norm", "norm_type": "inf"}
    assert details(tmp_path, "clipping") == clipping  # JSON has no infinity
    assert details(tmp_path, "gradients_ready") == {"optimizer": "SGD", "batches": 2}
    assert details(tmp_path, "metrics_logged") == {
        "stage": "train",
        "scope": "step",
        "step": 2,
        "metrics": "",
        "epoch_complete": True,
    }
    event = next(event for event in calls(trace(tmp_path)) if event["name"] == "clipping")
    assert event["args"] == {"kind": "span", **clipping}
    assert event["cat"] == "optimizer"


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "a value was read out of a tensor"
        return func(*args, **(kwargs or {}))


def test_no_tensor_is_read_and_no_weight_changed(tmp_path: Path, clock: Clock) -> None:
    class Weighted(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "weight": torch.tensor(2.0), "kept": batch}

    models = [Weighted(clock), Weighted(clock)]
    with NoReads():
        fit(tmp_path, clock, GradientAccumulation(2), GradientClipping(1.0), steps=range(3), model=models[0])
    assert len(windows(trace(tmp_path))) == 3
    trainer_of(tmp_path, GradientAccumulation(2), GradientClipping(1.0)).fit(models[1], BATCHES)
    assert torch.equal(models[0].layer.weight, models[1].layer.weight)
    with pytest.raises(AssertionError, match="read out"), NoReads():
        float(torch.ones(()))


def test_another_threads_events_are_not_mixed_in(tmp_path: Path, clock: Clock) -> None:
    class Elsewhere(Callback):
        def on_before_backward(self, trainer: Trainer, event: Any) -> None:
            thread = threading.Thread(target=trainer.log_now, args=({"monitored": 1.0},))
            thread.start()
            thread.join()

        def on_metrics_logged(self, trainer: Trainer, event: Any) -> None:
            pass

    fit(tmp_path, clock, Elsewhere())
    assert names(trace(tmp_path)).count("metrics_logged") == 1  # the step's
    assert cuts(tmp_path).keys() == {"epoch 0"}


def test_every_event_has_a_category_and_spans_are_made_of_events() -> None:
    assert CATEGORY_OF.keys() == EVENTS.keys()
    assert set(CATEGORY_OF.values()) == CATEGORIES.keys() - {"callbacks"}
    for opening, span in SPANS.items():
        assert {opening, *span.closed_by} <= EVENTS.keys()
        assert len({CATEGORY_OF[name] for name in (opening, *span.closed_by)}) == 1
        assert not span.number or span.number in EVENTS[opening].__dataclass_fields__  # type: ignore[attr-defined]


# ------------------------------------------------------------------ which steps


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(None, [2, 3, 4]), (0, [0]), ({4, 1}, [1, 4]), ([5, 5], [5]), (range(0, 100, 4), [0, 4]), (range(3, 10**9), [3, 4, 5])],
)
def test_steps_are_values_of_global_step(tmp_path: Path, clock: Clock, steps: Any, expected: list[int]) -> None:
    fit(tmp_path, clock, steps=steps)
    assert [name for name, _, _ in windows(trace(tmp_path))] == [f"global_step {step}" for step in expected]
    assert names(trace(tmp_path), "span").count("forward") == len(expected)


def test_the_warm_up_is_counted_from_where_a_run_resumes(tmp_path: Path, clock: Clock) -> None:
    first = trainer_of(tmp_path)
    first.fit(Model(clock), BATCHES)
    first.save_checkpoint(tmp_path / "run.ckpt")
    timeline = EventTimeline(clock=clock)
    trainer_of(tmp_path, timeline, max_epochs=2).fit(Model(clock), BATCHES, ckpt_path=tmp_path / "run.ckpt")
    assert [name for name, _, _ in windows(trace(tmp_path))] == ["global_step 8", "global_step 9", "global_step 10"]


def test_the_choice_is_one_method(tmp_path: Path, clock: Clock) -> None:
    class EveryOther(EventTimeline):
        def is_due(self, global_step: int) -> bool:
            return global_step % 2 == 1

    trainer_of(tmp_path, EveryOther(clock=clock)).fit(Model(clock), BATCHES)
    assert [name for name, _, _ in windows(trace(tmp_path))] == ["global_step 1", "global_step 3", "global_step 5"]


def test_windows_whose_updates_are_skipped_belong_to_the_same_step(tmp_path: Path, clock: Clock) -> None:
    class Vetoes(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, event: Any) -> None:
            if trainer.batch_idx in (1, 2):
                event.skip("not now")

    fit(tmp_path, clock, Vetoes())
    assert names(trace(tmp_path)).count("optimizer_step_skipped") == 2
    assert names(trace(tmp_path)).count("after_optimizer_step") == 1
    assert windows(trace(tmp_path)) == [("global_step 1", 0.0, 24000.0)]
    assert details(tmp_path, "optimizer_step_skipped") == {"optimizer": "SGD", "reason": "not now"}


def test_nothing_is_observed_but_the_chosen_steps(tmp_path: Path, clock: Clock) -> None:
    seen: dict[int, bool] = {}

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
            seen[trainer.global_step] = bool(trainer.signals.reduce_gradients.listeners)  # nobody else listens

        def on_train_end(self, trainer: Trainer, event: Any) -> None:
            seen[-1] = bool(trainer.signals.reduce_gradients.listeners)

    fit(tmp_path, clock, Looks(), steps={2, 3, 5})
    assert seen == {0: False, 1: False, 2: True, 3: True, 4: False, 5: True, -1: False}


def test_a_pause_between_steps_is_no_part_of_either(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, clock, steps={1, 4})
    assert windows(trace(tmp_path)) == [("global_step 1", 0.0, 8000.0), ("global_step 4", 24000.0, 8000.0)]
    assert embedded(tmp_path)["segments"] == [[0, 8 * MS], [24 * MS, 32 * MS]]


def test_a_run_that_only_evaluates_is_recorded_from_its_start(tmp_path: Path, clock: Clock) -> None:
    timeline = EventTimeline(evaluation_batches=2, clock=clock)
    trainer = trainer_of(tmp_path, timeline)
    trainer.validate(Model(clock), BATCHES)
    found = trace(tmp_path)
    assert names(found)[:4] == ["prepare_loader", "validation_start", "validation_epoch_start", "before_batch_fetch"]
    assert [name for name in names(found, "span") if "batch " in name] == [
        *("batch fetch", "validation batch 0", "batch fetch", "validation batch 1")
    ]
    assert cuts(tmp_path) == {"validation": ("the recording ended", False)}
    assert embedded(tmp_path)["stage"] == "validate"
    trainer.validate(Model(clock), BATCHES[:1])
    assert cuts(tmp_path, 1) == {}
    assert names(trace(tmp_path, 1))[-2:] == ["metrics_logged", "validation_end"]


def test_the_memory_is_bounded_and_the_files_say_so(tmp_path: Path, clock: Clock) -> None:
    timeline = fit(tmp_path, clock, steps=range(6), max_events=30)
    data = embedded(tmp_path)
    assert len(data["records"]) == 30
    (note,) = data["notes"]
    assert "max_events=30" in note and "EventTimeline(max_events=300)" in note
    assert trace(tmp_path)["otherData"]["notes"] == [note]
    assert all(cut == "max_events=30 was reached" for cut, _ in cuts(tmp_path).values())
    assert timeline.steps == range(6)


def test_a_recording_that_is_full_between_two_steps_ends_with_the_first(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, clock)
    fit(tmp_path, clock, steps={1, 4}, max_events=len(embedded(tmp_path)["records"]))
    assert drawn(tmp_path, 1) == drawn(tmp_path)
    assert windows(trace(tmp_path, 1)) == windows(trace(tmp_path)) == [("global_step 1", 0.0, 8000.0)]
    assert "Truncated" in embedded(tmp_path, 1)["notes"][0]


# ------------------------------------------------------------------ errors


class Fails(Callback):
    def __init__(self, error: type[BaseException] = RuntimeError) -> None:
        self.error = error

    def on_before_backward(self, trainer: Trainer, event: Any) -> None:
        if trainer.global_step == 1:
            raise self.error("at the worst moment")


def test_what_an_error_ended_is_written_and_marked(tmp_path: Path, clock: Clock) -> None:
    class Cleans(Callback):
        def on_exception(self, trainer: Trainer, event: Any) -> None:
            clock.now += 4 * MS

    trainer = fails(tmp_path, EventTimeline(steps=range(9), clock=clock), Model(clock), Fails(), Cleans())
    by_error = ("RuntimeError", True)
    expected = dict.fromkeys(["epoch 0", "batch 1", "optimizer step", "backward", "before_backward"], by_error)
    assert cuts(tmp_path) == {**expected, "Fails.on_before_backward": by_error}
    assert drawn(tmp_path).endswith(
        """\
        backward 0
        . before_backward 0
          > Fails.on_before_backward 0
. exception 4000
  > EventTimeline.on_exception 0
  > Cleans.on_exception 4000
"""[2:]
    )
    assert embedded(tmp_path)["notes"] == ["The run was ended by RuntimeError: at the worst moment"]
    assert not trainer.signals.reduce_gradients.listeners
    failed = [event for event in calls(trace(tmp_path)) if event["args"].get("cut") == "RuntimeError"]
    assert len(failed) == 6


def test_an_interrupt_ends_what_was_under_way(tmp_path: Path, clock: Clock) -> None:
    fails(tmp_path, EventTimeline(steps=1, clock=clock), Model(clock), Fails(KeyboardInterrupt), error=KeyboardInterrupt)
    marked = cuts(tmp_path)
    assert marked["before_backward"] == marked["Fails.on_before_backward"] == ("KeyboardInterrupt", True)
    assert names(trace(tmp_path))[-1] == "exception"


def test_an_error_inside_of_an_except_block_is_told_from_the_one_outside(tmp_path: Path, clock: Clock) -> None:
    try:
        raise ValueError("handled while the run goes on")
    except ValueError:
        fit(tmp_path, clock, Listens(clock))
    assert cuts(tmp_path) == {"epoch 0": ("began before the recording; the recording ended", False)}


def test_an_error_that_the_module_handles_ends_its_phase_with_the_next_around_it(tmp_path: Path, clock: Clock) -> None:
    class Retries(Manual):
        def backward(self, loss: Tensor) -> None:
            if self.trainer.batch_idx == 1:
                raise MemoryError
            super().backward(loss)

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            try:
                super().training_step(batch, batch_idx)
            except MemoryError:
                self.clock.now += 1 * MS

    fit(tmp_path, clock, model=Retries(clock))
    # Two tries: the error leaves the first batch without an update, so that the next is of the same step.
    batch = [line for line in drawn(tmp_path).splitlines() if re.match(r" *(batch \d|forward|backward|\. after_f)", line)]
    assert batch == [
        *("  batch 1 4000", "    forward 4000", "      backward 1000", "        . after_forward 0"),
        *("  batch 2 8000", "    forward 8000", "      backward 5000", "      . after_forward 0"),
    ]
    assert cuts(tmp_path)["backward"] == ("no after_backward came", False)
    assert cuts(tmp_path).keys() == {"epoch 0", "backward"}


def test_an_error_outside_of_the_chosen_steps_is_noted(tmp_path: Path, clock: Clock) -> None:
    fails(tmp_path, EventTimeline(steps=0, clock=clock), Model(clock), Fails())
    assert cuts(tmp_path).keys() == {"epoch 0"}
    assert embedded(tmp_path)["notes"] == ["The run was ended by RuntimeError: at the worst moment"]


def test_an_error_before_the_chosen_steps_is_not_blamed_on_the_choice(tmp_path: Path, clock: Clock) -> None:
    fails(tmp_path, EventTimeline(steps=5, clock=clock), Model(clock), Fails())  # no warning
    assert written(tmp_path) == []


# ------------------------------------------------------------------ files


def test_each_run_has_files_of_its_own(tmp_path: Path, clock: Clock) -> None:
    trainer = trainer_of(tmp_path, EventTimeline(clock=clock))
    (tmp_path / "timelines").mkdir()
    (tmp_path / "timelines" / "timeline-7.json").touch()
    for _ in range(2):
        trainer.fit(Model(clock), BATCHES)
    trainer.validate(Model(clock), BATCHES)
    runs = [name for number in (10, 8, 9) for name in (f"timeline-{number}.html", f"timeline-{number}.json")]
    assert written(tmp_path) == [*runs[:2], "timeline-7.json", *runs[2:]]
    assert [embedded(tmp_path, number)["stage"] for number in (8, 9, 10)] == ["fit", "fit", "validate"]
    assert drawn(tmp_path, 8) == drawn(tmp_path, 9)


def test_a_run_that_fails_before_its_setup_leaves_the_last_ones_files_alone(tmp_path: Path, clock: Clock) -> None:
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


def test_it_is_written_when_asked_and_again_when_the_run_ends(tmp_path: Path, clock: Clock) -> None:
    timeline = EventTimeline(steps=range(4), dirpath="elsewhere", clock=clock)
    seen: list[Any] = []

    class Asks(Callback):
        def on_before_backward(self, trainer: Trainer, event: Any) -> None:
            if trainer.global_step == 1:
                clock.now += 1 * MS
                page, trace = timeline.write()
                seen.extend([page, trace, json.loads(trace.read_text())])

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


def test_a_directory_that_is_lost_on_the_way_costs_a_warning(tmp_path: Path, clock: Clock) -> None:
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
    timeline.write()  # nothing of it is lost
    assert len(windows(trace(tmp_path))) == 3


def test_a_choice_that_no_step_fits_is_a_warning(tmp_path: Path, clock: Clock) -> None:
    with pytest.warns(UserWarning, match=r"steps=range\(6, 9\)\) recorded nothing: .* from 0 to 6"):
        fit(tmp_path, clock, steps=range(6, 9))
    assert written(tmp_path) == []


def test_a_dry_run_records_nothing(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, clock, steps=0, options={"fast_dev_run": True})
    assert not (tmp_path / "timelines").exists()


def test_other_ranks_record_nothing(tmp_path: Path, clock: Clock) -> None:
    class Second(SingleProcess):
        global_rank = 1

    timeline = EventTimeline(clock=clock)
    trainer = trainer_of(tmp_path, timeline)
    trainer.processes = Second()
    trainer.fit(Model(clock), BATCHES)
    assert not (tmp_path / "timelines").exists()
    with pytest.raises(MisconfigurationError, match="on other ranks than zero"):
        timeline.write()


@pytest.mark.parametrize("steps", [-1, [], range(0), range(-2, 3), {True}, 1.5, ["1"], [[1]]])
def test_steps_that_no_run_takes_are_refused(steps: Any) -> None:
    with pytest.raises(MisconfigurationError, match=r"EventTimeline\(steps="):
        EventTimeline(steps=steps)


@pytest.mark.parametrize("options", [{"max_events": 0}, {"evaluation_batches": True}])
def test_bad_options_are_refused(options: Any) -> None:
    with pytest.raises(MisconfigurationError, match=rf"EventTimeline\({next(iter(options))}="):
        EventTimeline(**options)


# ------------------------------------------------------------------ the trace


def test_the_trace_names_its_tracks(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, clock)
    found = trace(tmp_path)
    assert found["displayTimeUnit"] == "ms"
    tracks = [
        (e["name"], e["pid"], e["tid"], e["args"]) for e in found["traceEvents"] if e["ph"] == "M" and "name" in e["args"]
    ]
    assert tracks == [
        ("process_name", 0, 0, {"name": "Model.fit"}),
        ("thread_name", 0, 1, {"name": "global_step"}),
        ("thread_name", 0, 2, {"name": "events"}),
    ]
    backward = next(event for event in calls(found) if event["name"] == "backward")
    assert backward == {
        "ph": "X",
        "name": "backward",
        "cat": "backward",
        "pid": 0,
        "tid": 2,
        "ts": 3000.0,
        "dur": 5000.0,
        "args": {"kind": "span"},
    }


# ------------------------------------------------------------------ the page


@given(st.text(alphabet=st.characters() | st.sampled_from("<>&'\"/\\!-\u2028\u2029\ud800"), max_size=20))
def test_data_in_the_page_is_data_whatever_it_holds(name: str) -> None:
    text = json_in_html({name: [name]})
    assert json.loads(text) == {name: [name]}
    assert not set(text) & set("<>&") and text.isascii()


def test_the_page_asks_for_nothing_outside_of_itself(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, clock)
    page = (tmp_path / "timelines" / "timeline-0.html").read_text(encoding="utf-8")
    document = Document(page)
    assert not [(tag, attributes) for tag, attributes in document.elements if attributes.keys() & {"src", "href", "srcset"}]
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|WebSocket|import\(", page)
    (policy,) = [a["content"] for tag, a in document.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and "default-src 'none'" in policy


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

Browse = Callable[..., Document]


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Browse:
    """Opens a page in a real browser without a window, does something in it, and returns what the page has become."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser to open the page in: none of {', '.join(BROWSERS)} is on the PATH")

    def opened(page: Path, script: str = "", edit: Callable[[str], str] = str) -> Document:
        text = edit(page.read_text(encoding="utf-8"))
        copy = page.with_suffix(".opened.html")
        copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
        for _ in range(3):  # a browser that starts for the first time may give up on a page before its script has run
            profile = tmp_path_factory.mktemp("profile")
            done = subprocess.run(
                [
                    *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
                    *(
                        "--disable-background-networking",
                        "--disable-component-update",
                        "--disable-sync",
                        "--disable-dev-shm-usage",
                    ),
                    *(f"--user-data-dir={profile}", "--window-size=1200,900", "--virtual-time-budget=2000", "--dump-dom"),
                    copy.as_uri(),
                ],
                capture_output=True,
                text=True,
                encoding="utf-8",
                timeout=120,
            )
            assert done.returncode == 0 and "</html>" in done.stdout, done.stderr
            if 'class="bar ' in done.stdout:
                break
        return Document(done.stdout)

    return opened


def bars(document: Document) -> list[dict[str, Any]]:
    """The bars of the chart: which record, and where, in pixels."""
    found = []
    for tag, attributes in document.elements:
        if tag == "div" and (attributes.get("class") or "").startswith("bar "):
            style = dict(part.strip().split(": ") for part in (attributes["style"] or "").split(";") if part.strip())
            place = {name: float(style[name].removesuffix("px")) for name in ("left", "width", "top")}
            found.append({"index": int(attributes["data-index"] or ""), "class": attributes["class"], **place})
    return found


def table(document: Document) -> list[tuple[dict[str, str | None], list[str]]]:
    return [(attributes, cells) for attributes, cells in document.rows if "data-index" in attributes]


def body(document: Document) -> dict[str, str | None]:
    return next(attributes for tag, attributes in document.elements if tag == "body")


def chart(document: Document) -> tuple[int, int]:
    """What the chart shows, in nanoseconds."""
    (shown,) = [attributes for _, attributes in document.elements if attributes.get("id") == "chart"]
    return int(shown["data-from"] or ""), int(shown["data-to"] or "")


# Opening the page takes a second or two, so tests share what they can: the page of the step that is written out above.


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clock = Clock()
    timeline = fit(tmp_path_factory.mktemp("run"), clock, GradientAccumulation(2), GradientClipping(1.0), Listens(clock))
    return timeline.write()[0]


@pytest.fixture(scope="module")
def opened(page: Path, browse: Browse) -> Document:
    return browse(page)


def test_a_browser_lists_what_ran_in_order_and_nested(opened: Document) -> None:
    expected: list[list[str]] = []
    for line in STEP_OF_TWO_BATCHES.splitlines():
        depth, text = str((len(line) - len(line.lstrip())) // 2), line.strip()
        name, _, took = text.lstrip(".> ").rpartition(" ")
        if text.startswith("> "):
            expected[-1][-1] += name + shown(took)
        else:
            expected.append([depth, name, shown(took), ""])
    rows = [[attributes["data-depth"], cells[3], cells[1], cells[4]] for attributes, cells in table(opened)]
    assert rows == expected
    assert opened.title == "Event timeline"


def shown(us: str) -> str:
    """A duration as the page shows it, with three digits."""
    value = float(us)
    if value == 0:
        return "0"
    return f"{value:#.3g} µs".replace(". ", " ") if value < 1000 else f"{value / 1000:#.3g} ms"


def test_a_browser_draws_what_ran_where_and_as_long_as_it_ran(page: Path, opened: Document) -> None:
    data = embedded(page.parent.parent)["records"]
    drawn = {bar["index"]: bar for bar in bars(opened)}
    scale = drawn[0]["width"] / (16.047 * MS)  # the epoch fills the width
    assert drawn[0]["left"] == 0 and drawn[0]["width"] > 1000
    lasting = [index for index, record in enumerate(data) if record[5] - record[4] >= MS]
    assert [data[index][1] for index in lasting] == [
        *("epoch 0", "batch 2", "forward", "backward", "batch 3", "optimizer step", "forward", "backward")
    ]
    for index in lasting:
        _, _, _, depth, start, end, *_ = data[index]
        bar = drawn[index]
        assert bar["left"] == pytest.approx(start * scale, abs=1.5)
        assert bar["width"] == pytest.approx((end - start) * scale, abs=2.5)
        assert bar["top"] - drawn[0]["top"] == 22 * depth
    for index, bar in drawn.items():
        assert bar["width"] >= 2  # what took no time can be seen too
        assert data[index][0] in bar["class"].split()
    assert [attributes["title"] for _, attributes in opened.elements if attributes.get("class") == "window"] == [
        "global_step 1: 16.0 ms"
    ]


LOOK_EVERYWHERE = """
const texts = [];
for (const record of records) {
  fill(record);
  choose(record, "keys");
  texts.push($("tip").textContent);
}
document.body.dataset.texts = JSON.stringify(texts);
"""

COUNT_REQUESTS = """
setTimeout(() => { document.body.dataset.requests = performance.getEntriesByType("resource").length; }, 500);
"""


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine: its address, and what was asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{serving.server_port}", asked
        finally:
            serving.shutdown()
            thread.join()


def test_names_are_text_and_nothing_is_fetched(
    tmp_path: Path, clock: Clock, browse: Browse, server: tuple[str, list[str]]
) -> None:
    address, asked = server
    by_image = "<img src=x onerror=\"document.title='broken'\">"
    by_script = "</script><script>document.title='broken'</script>"
    by_request = f"--><b id=bold>&amp;\u2028'\"<img src={address}/pixel><link rel=stylesheet href={address}/style>"
    hostile = [by_image, by_script, by_request]

    def handler(self: Any, trainer: Trainer, event: Any) -> None:
        if trainer.global_step == 2:
            raise RuntimeError(by_image)

    class Vetoes(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, event: Any) -> None:
            if trainer.batch_idx == 1:
                event.skip(by_image)

    listeners = [type(name, (Callback,), {"on_before_backward": handler})() for name in hostile]
    module = type(by_script, (Model,), {})(clock)
    timeline = EventTimeline(steps={1, 2}, clock=clock)
    with pytest.raises(RuntimeError, match="img"):
        trainer_of(tmp_path, timeline, Vetoes(), *listeners).fit(module, BATCHES)
    document = browse(timeline.write()[0], LOOK_EVERYWHERE + COUNT_REQUESTS)

    assert document.title == "Event timeline"
    assert [kind for kind, _ in document.scripts] == ["application/json", None, None]  # the data, the page's and the test's
    assert not [tag for tag, attributes in document.elements if tag in ("img", "link") or attributes.get("id") == "bold"]
    assert asked == []
    assert body(document)["data-requests"] == "0"

    cells = [cell for _, row in table(document) for cell in row]
    assert any(all(f"{name}.handler" in cell for name in hostile) for cell in cells)
    assert any("reason" in cell and by_image in cell for cell in cells)
    texts = json.loads(body(document)["data-texts"] or "")
    for name in hostile:
        assert any(text.startswith(f"{name}.handler") for text in texts)


def test_the_pages_policy_forbids_what_would_fetch(page: Path, browse: Browse, server: tuple[str, list[str]]) -> None:
    address, asked = server
    element = f"<header><img src={address}/pixel><link rel=stylesheet href={address}/style>"

    def with_element(text: str) -> str:
        return text.replace("<header>", element)

    def without_policy(text: str) -> str:
        return re.sub("<meta http-equiv[^>]*>", "", with_element(text))

    browse(page, edit=with_element)
    assert asked == []
    document = browse(page, COUNT_REQUESTS, without_policy)  # so that what counts requests is seen to count
    assert sorted(asked) == ["/pixel", "/style"]
    assert body(document)["data-requests"] == "2"


USE = """
const press = (on, key) => on.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const selected = () => document.querySelector("tr[aria-selected]");
const visible = () => [...rows.children].filter((row) => !row.hidden).map((row) => row.querySelector(".name").textContent);
const bright = () => [...document.querySelectorAll(".bar:not(.dim)")].map((bar) => records[bar.dataset.index].name);
const results = {views: [], filtered: {}};

for (const keys of KEYS_PRESSED) {
  press(chart, "Escape");
  press(chart, "0");
  for (const key of keys) press(chart, key);
  draw();
  results.views.push([Number(chart.dataset.from), Number(chart.dataset.to)]);
}

press(chart, "Escape");
for (let i = 0; i < 5; i++) press(chart, "ArrowDown");
results.tip = $("tip").textContent;
results.chosen = selected().querySelector(".name").textContent;
press(selected(), "ArrowDown");
results.next = selected().querySelector(".name").textContent;
results.focused = document.activeElement === selected();
draw();
results.outlined = [...document.querySelectorAll(".bar.chosen")].map((bar) => records[bar.dataset.index].name);

for (const words of WORDS_SEARCHED) {
  $("search").value = words;
  $("search").dispatchEvent(new Event("input"));
  draw();
  results.filtered[words] = {rows: visible(), bars: [...new Set(bright())], none: !$("none").hidden};
}
press($("search"), "Escape");
results.cleared = visible().length;
$("heard").click();
results.heard = visible();
$("heard").click();
document.querySelector("[data-category=forward]").click();
results.without_forward = visible();
document.body.dataset.results = JSON.stringify(results);
"""


def test_the_page_is_used_by_keys_and_searched(page: Path, browse: Browse) -> None:
    whole = [0, 16_047_000]
    first_batch = [0, 8_661_600]  # 8.02 ms, and 4 % of it on either side
    views: list[tuple[list[str], list[int]]] = [
        ([], whole),
        (["+"], [3_209_400, 12_837_600]),
        (["+", "ArrowLeft"], [1_765_170, 11_393_370]),
        (["+", "ArrowRight", "-"], whole),
        (["+", "+", "+", "0"], whole),
        (["ArrowDown"] * 5 + ["Enter"], first_batch),
        (["ArrowDown"] * 6 + ["ArrowUp", "Enter"], first_batch),
    ]
    searches = {
        "LISTENS. back": ["before_backward", "before_backward"],  # by their listener
        "gradient_clip_val 1": ["clipping", "after_gradient_clipping"],  # by what they carry
        "nothing like it": [],
    }
    script = USE.replace("KEYS_PRESSED", json.dumps([keys for keys, _ in views]))
    results = json.loads(body(browse(page, script.replace("WORDS_SEARCHED", json.dumps([*searches]))))["data-results"] or "")

    assert results["views"] == [view for _, view in views]
    assert results["tip"].startswith("batch 2loop8.02 ms · own time 0 · at 0batch_idx: 2")
    assert (results["chosen"], results["next"], results["outlined"]) == ("batch 2", "train_batch_start", ["train_batch_start"])
    assert results["focused"]

    assert {words: found["rows"] for words, found in results["filtered"].items()} == searches
    assert set(results["filtered"]["LISTENS. back"]["bars"]) == {"before_backward", "Listens.on_before_backward"}
    assert [found["none"] for found in results["filtered"].values()] == [False, False, True]
    everything = [line for line in STEP_OF_TWO_BATCHES.splitlines() if ">" not in line]
    assert results["cleared"] == len(everything)
    assert "train_batch_start" in results["heard"] and "after_forward" not in results["heard"]
    assert results["without_forward"] == [
        re.sub(r" *(\. )?(.*) \d+", r"\2", line) for line in everything if "forward" not in line
    ]


def test_pauses_notes_and_own_times_are_shown(tmp_path: Path, clock: Clock, browse: Browse) -> None:
    timeline = EventTimeline(steps={0, 3}, clock=clock, max_events=60)
    trainer_of(tmp_path, timeline, Listens(clock)).fit(Model(clock), BATCHES)
    document = browse(timeline.write()[0])
    titles = [a["title"] for _, a in document.elements if a.get("class") in ("pause", "window")]
    assert titles == ["16.1 ms not recorded", "global_step 0: 8.03 ms", "global_step 3: 8.03 ms"]
    assert [a for tag, a in document.elements if a.get("class") == "note"]
    (batch,) = [cells for _, cells in table(document) if cells[3] == "batch 0"]
    assert batch[1:3] == ["8.03 ms", "0"]
