"""A timeline shows the events, listeners and phases of the chosen steps, nested and timed as they ran."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eventtrain import Callback, Trainer
from eventtrain.callbacks import EventTimeline, GradientAccumulation, GradientClipping, LRSchedulerStepping
from eventtrain.callbacks.profiling.timeline import CATEGORIES, CATEGORY_OF, SPANS
from eventtrain.events import EVENTS
from tests.callbacks.profiling.timelines import (
    BATCHES,
    MS,
    STEP_OF_TWO_BATCHES,
    Clock,
    Listens,
    Manual,
    Model,
    calls,
    cuts,
    details,
    drawn,
    embedded,
    fails,
    fit,
    names,
    trace,
    trainer_of,
    windows,
    written,
)

# ------------------------------------------------------------------ the recording


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
    # The end of the first epoch was recorded, and the beginning of the second.
    assert cuts(tmp_path) == {"epoch 0": ("began before the recording", False), "epoch 1": ("the recording ended", False)}
    assert windows(trace(tmp_path)) == [("global_step 5", 0.0, 8000.0), ("global_step 6", 8000.0, 8000.0)]


class Saves(Callback):
    """Writes a checkpoint after each batch, which takes 2 ms."""

    def __init__(self, clock: Clock, path: Path) -> None:
        self.clock, self.path = clock, path

    def on_take_checkpoint(self, trainer: Trainer, event: Any) -> None:
        trainer.save_checkpoint(self.path / f"{trainer.global_step}.ckpt")

    def on_save_checkpoint(self, trainer: Trainer, event: Any) -> None:
        self.clock.now += 2 * MS


def test_validation_and_checkpoint_belong_to_the_step_that_they_follow(tmp_path: Path, clock: Clock) -> None:
    timeline = EventTimeline(steps=1, clock=clock)
    # Attached after the timeline, so that it writes after the timeline has decided on the next step.
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
    assert "  . safe_point 0\n    > EventTimeline.on_safe_point 0\n  . request_stop 0\n" in recorded
    assert "  . take_checkpoint 2000\n    > Saves.on_take_checkpoint 2000\n      checkpoint 2000\n" in recorded
    inside = ["      checkpoint 2000", "        . save_checkpoint 2000", "          > Saves.on_save_checkpoint 2000"]
    inside += ["        . checkpoint_gathered 0", "        . checkpoint_saved 0"]
    assert "\n".join(inside) in recorded
    assert details(tmp_path, "checkpoint_saved") == {"path": str(tmp_path / "2.ckpt")}


def test_a_scheduler_step_lies_in_the_listener_that_steps_it(tmp_path: Path, clock: Clock) -> None:
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


def test_a_span_without_a_counterpart_ends_with_its_last_event(tmp_path: Path, clock: Clock) -> None:
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
    decided = "        . before_gradient_clipping 0\n        . clipping_decided 0\n      . after_optimizer_step 0\n"
    assert drawn(tmp_path).count(f"      clipping 0\n{decided}") == 2
    assert cuts(tmp_path) == {}


def test_the_details_are_the_payload_after_the_listeners(tmp_path: Path, clock: Clock) -> None:
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


class NoReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "a value was read out of a tensor"
        return func(*args, **(kwargs or {}))


def test_no_tensor_is_read_and_no_weight_changed(tmp_path: Path, clock: Clock) -> None:
    class Weighted(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "weight": torch.tensor(2.0), "batch": batch}

    models = [Weighted(clock), Weighted(clock)]
    with NoReads():  # type: ignore[no-untyped-call]
        fit(tmp_path, clock, GradientAccumulation(2), GradientClipping(1.0), steps=range(3), model=models[0])
    assert len(windows(trace(tmp_path))) == 3
    trainer_of(tmp_path, GradientAccumulation(2), GradientClipping(1.0)).fit(models[1], BATCHES)
    assert torch.equal(models[0].layer.weight, models[1].layer.weight)
    with pytest.raises(AssertionError, match="read out"), NoReads():  # type: ignore[no-untyped-call]
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
    assert {name: CATEGORY_OF[name] for name in ("gradients_final", "clipping_decided", "request_stop", "run_interrupted")} == {
        "gradients_final": "optimizer",
        "clipping_decided": "optimizer",
        "request_stop": "loop",
        "run_interrupted": "loop",
    }
    assert {name for name, category in CATEGORY_OF.items() if category == "checkpoint"} == {
        *("find_checkpoint", "checkpoint_read", "load_checkpoint", "take_checkpoint"),
        *("save_checkpoint", "checkpoint_gathered", "checkpoint_saved"),
    }
    for opening, span in SPANS.items():
        assert {opening, *span.closed_by} <= EVENTS.keys()
        assert len({CATEGORY_OF[name] for name in (opening, *span.closed_by)}) == 1
        assert not span.number or span.number in EVENTS[opening].__dataclass_fields__


# ------------------------------------------------------------------ the chosen steps


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


def test_is_due_can_be_overridden(tmp_path: Path, clock: Clock) -> None:
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


def test_only_the_chosen_steps_are_observed(tmp_path: Path, clock: Clock) -> None:
    seen: dict[int, bool] = {}

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
            seen[trainer.global_step] = bool(trainer.signals.reduce_gradients.listeners)  # which has no other listener

        def on_train_end(self, trainer: Trainer, event: Any) -> None:
            seen[-1] = bool(trainer.signals.reduce_gradients.listeners)

    fit(tmp_path, clock, Looks(), steps={2, 3, 5})
    assert seen == {0: False, 1: False, 2: True, 3: True, 4: False, 5: True, -1: False}


def test_a_pause_between_steps_is_part_of_neither(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, clock, steps={1, 4})
    assert windows(trace(tmp_path)) == [("global_step 1", 0.0, 8000.0), ("global_step 4", 24000.0, 8000.0)]
    assert embedded(tmp_path)["segments"] == [[0, 8 * MS], [24 * MS, 32 * MS]]


def test_an_evaluation_is_recorded_from_its_start(tmp_path: Path, clock: Clock) -> None:
    timeline = EventTimeline(evaluation_batches=2, clock=clock)
    trainer = trainer_of(tmp_path, timeline)
    trainer.validate(Model(clock), BATCHES)
    recorded = trace(tmp_path)
    assert names(recorded)[:4] == ["prepare_loader", "validation_start", "validation_epoch_start", "before_batch_fetch"]
    assert [name for name in names(recorded, "span") if "batch " in name] == [
        *("batch fetch", "validation batch 0", "batch fetch", "validation batch 1")
    ]
    assert cuts(tmp_path) == {"validation": ("the recording ended", False)}
    assert embedded(tmp_path)["stage"] == "validate"
    trainer.validate(Model(clock), BATCHES[:1])
    assert cuts(tmp_path, 1) == {}
    assert names(trace(tmp_path, 1))[-2:] == ["metrics_logged", "validation_end"]


def test_max_events_bounds_the_recording_and_the_files_say_so(tmp_path: Path, clock: Clock) -> None:
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


def test_the_records_that_an_error_ended_are_written_and_marked(tmp_path: Path, clock: Clock) -> None:
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


def test_an_interrupt_ends_the_open_records(tmp_path: Path, clock: Clock) -> None:
    fails(tmp_path, EventTimeline(steps=1, clock=clock), Model(clock), Fails(KeyboardInterrupt), error=KeyboardInterrupt)
    marked = cuts(tmp_path)
    assert marked["before_backward"] == marked["Fails.on_before_backward"] == ("KeyboardInterrupt", True)
    assert names(trace(tmp_path))[-1] == "exception"


def test_an_error_that_is_handled_around_the_run_marks_no_record(tmp_path: Path, clock: Clock) -> None:
    try:
        raise ValueError("handled around the run")
    except ValueError:
        fit(tmp_path, clock, Listens(clock))
    assert cuts(tmp_path) == {"epoch 0": ("began before the recording; the recording ended", False)}


def test_a_phase_that_a_handled_error_leaves_ends_with_the_phase_around_it(tmp_path: Path, clock: Clock) -> None:
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
    # The error leaves the first batch without an update, so that the next batch belongs to the same step.
    batch = [line for line in drawn(tmp_path).splitlines() if re.match(r" *(batch \d|forward|backward|\. after_f)", line)]
    assert batch == [
        *("  batch 1 4000", "    forward 4000", "      backward 1000", "        . after_forward 0"),
        *("  batch 2 8000", "    forward 8000", "      backward 5000", "      . after_forward 0"),
    ]
    assert cuts(tmp_path)["backward"] == ("no after_backward came", False)
    assert cuts(tmp_path).keys() == {"epoch 0", "backward"}


def test_an_error_after_the_chosen_steps_is_noted(tmp_path: Path, clock: Clock) -> None:
    fails(tmp_path, EventTimeline(steps=0, clock=clock), Model(clock), Fails())
    assert cuts(tmp_path).keys() == {"epoch 0"}
    assert embedded(tmp_path)["notes"] == ["The run was ended by RuntimeError: at the worst moment"]


def test_after_an_error_before_the_chosen_steps_there_is_no_warning(tmp_path: Path, clock: Clock) -> None:
    fails(tmp_path, EventTimeline(steps=5, clock=clock), Model(clock), Fails())  # no warning
    assert written(tmp_path) == []
