"""The traces of torch's profiler are bounded and hold the phases, and after them nothing is observed."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eventtrain import Callback, MisconfigurationError, Trainer
from eventtrain._torch import is_profiling
from eventtrain.callbacks import (
    GradientAccumulation,
    GradientClipping,
    LRSchedulerStepping,
    Profiler,
    TensorBoardLogger,
    TorchProfiler,
)
from eventtrain.callbacks.profiling.torch_profiler import Cycle
from eventtrain.distributed import SingleProcess
from eventtrain.paths import AnyPath
from tests.kit import Line, local, new_trainer


class Model(Line):
    """Learns with a scheduler."""

    def __init__(self) -> None:
        super().__init__(4, 1)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self(batch)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def batches(number: int) -> list[Tensor]:
    return [torch.ones(2, 4)] * number


def trainer_of(profiler: TorchProfiler, root: Path, *callbacks: Any, **options: Any) -> Trainer:
    return new_trainer(profiler, *callbacks, LRSchedulerStepping(), default_root_dir=root, **options)


def quiet(**options: Any) -> TorchProfiler:
    return TorchProfiler(**{"print_summary": False, **options})


def events_of(trace: AnyPath) -> list[dict[str, Any]]:
    """Return the events of a trace."""
    events: list[dict[str, Any]] = json.loads(local(trace).read_text())["traceEvents"]
    return events


def ranges(trace: AnyPath) -> Counter[str]:
    """Return how often each named range is in a trace."""
    events = events_of(trace)
    names = [event["name"] for event in events if event.get("cat") == "user_annotation" and event["ph"] == "X"]
    return Counter(name for name in names if name.startswith(("eventtrain/", "ProfilerStep#")))


def steps(trace: AnyPath) -> int:
    return sum(name.startswith("ProfilerStep#") for name in ranges(trace))


def counting(trainer: Trainer, profiler: TorchProfiler) -> list[str]:
    """Return the signals that call the profiler at the end of a batch."""
    handlers = {
        "safe_point": profiler.on_safe_point,
        "validation_batch_end": profiler.on_validation_batch_end,
        "test_batch_end": profiler.on_test_batch_end,
        "predict_batch_end": profiler.on_predict_batch_end,
    }
    for name, handler in handlers.items():
        assert handler in trainer.signals[name].attached()
    reached = {name: [getattr(each, "listener", each) for each in trainer.signals[name].listeners] for name in handlers}
    return [name for name, handler in handlers.items() if handler in reached[name]]


def assert_nothing_is_left(trainer: Trainer, profiler: TorchProfiler) -> None:
    assert not is_profiling()
    assert [signal.name for signal in trainer.signals if signal._observers] == []
    assert counting(trainer, profiler) == []


# ------------------------------------------------------------------ the trace


def test_the_phases_and_the_callbacks_are_named_ranges(tmp_path: Path) -> None:
    profiler = quiet(wait=2, warmup=2, active=4)
    trainer = trainer_of(profiler, tmp_path, GradientAccumulation(2), GradientClipping(1.0))
    trainer.fit(Model(), batches(20))
    (trace,) = profiler.traces
    counts = ranges(trace)
    assert trace.parent == tmp_path / "profiles"
    assert steps(trace) == 4
    assert {name: count for name, count in counts.items() if name.startswith("eventtrain/") and "callback" not in name} == {
        "eventtrain/fetch": 4,
        "eventtrain/transfer": 4,
        "eventtrain/forward": 4,
        "eventtrain/backward": 4,
        "eventtrain/zero_grad": 2,
        "eventtrain/update": 2,
        "eventtrain/clipping": 2,
        "eventtrain/scheduler": 2,
    }
    assert counts["eventtrain/callback/GradientClipping.on_before_gradient_clipping"] == 2
    assert counts["eventtrain/callback/LRSchedulerStepping.on_after_update"] == 2
    assert not [name for name in counts if "TorchProfiler" in name]
    assert_nothing_is_left(trainer, profiler)


def test_operators_lie_in_their_phase(tmp_path: Path) -> None:
    profiler = quiet(wait=1, warmup=1, active=2)
    trainer_of(profiler, tmp_path).fit(Model(), batches(8))
    events = events_of(profiler.traces[0])
    forwards = [event for event in events if event["name"] == "eventtrain/forward"]
    linears = [event for event in events if event["name"] == "aten::linear"]
    assert len(forwards) == len(linears) == 2
    for forward, linear in zip(forwards, linears, strict=True):
        assert forward["ts"] <= linear["ts"] and linear["ts"] + linear["dur"] <= forward["ts"] + forward["dur"]


def test_a_validation_is_a_range_that_holds_its_phases(tmp_path: Path) -> None:
    profiler = quiet(wait=0, warmup=1, active=3)
    trainer = trainer_of(profiler, tmp_path, val_check_interval=2)
    trainer.fit(Model(), batches(8), batches(5))
    counts = ranges(profiler.traces[0])
    assert counts["eventtrain/validation"] == 2  # of batches 2 and 4
    assert counts["eventtrain/forward"] == 3 + 2 * 5
    assert counts["eventtrain/fetch"] == 3 + 2 * 5


def test_a_batch_ends_after_its_checkpoint(tmp_path: Path) -> None:
    class Saves(Callback):
        def on_take_checkpoint(self, trainer: Trainer, event: Any) -> None:
            trainer.save_checkpoint(tmp_path / "run.ckpt")

        def on_request_stop(self, trainer: Trainer, event: Any) -> None:
            if trainer.batch_idx == 2:
                trainer.keep_checkpoint("a test")  # publishes take_checkpoint too, and does not end a batch

    profiler = quiet(wait=1, warmup=1, active=3)
    trainer_of(profiler, tmp_path, Saves()).fit(Model(), batches(8))
    events = [event for event in events_of(profiler.traces[0]) if event["ph"] == "X"]
    forwards, checkpoints = (
        sorted(event["ts"] for event in events if event["name"] == name)
        for name in ("eventtrain/forward", "eventtrain/callback/Saves.on_take_checkpoint")
    )
    assert steps(profiler.traces[0]) == len(forwards) == 3
    assert len(checkpoints) == 3 + 1
    assert forwards[0] < checkpoints[0] < checkpoints[1] < forwards[1] < checkpoints[2] < forwards[2] < checkpoints[3]


def test_the_phases_of_manual_optimization_are_ranges(tmp_path: Path) -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(self.layer(batch).mean())
                optimizer.step()

    profiler = quiet(wait=0, warmup=1, active=3)
    trainer_of(profiler, tmp_path).fit(Manual(), batches(8))
    counts = ranges(profiler.traces[0])
    assert {name: counts[f"eventtrain/{name}"] for name in ("forward", "zero_grad", "backward", "update")} == {
        "forward": 3,
        "zero_grad": 6,
        "backward": 6,
        "update": 6,
    }


def test_a_veto_ends_the_open_ranges(tmp_path: Path) -> None:
    class Veto(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, event: Any) -> None:
            event.skip("a test")

    profiler = quiet(wait=0, warmup=1, active=3)
    trainer = trainer_of(profiler, tmp_path, Veto())
    trainer.fit(Model(), batches(8))
    assert ranges(profiler.traces[0])["eventtrain/update"] == 3
    assert_nothing_is_left(trainer, profiler)


@pytest.mark.parametrize("fails", [False, True])
def test_every_range_that_is_entered_is_left(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the range of a clipping that does not clip, whose end never comes, and the ranges that an error leaves."""
    entered: list[str] = []
    left: list[str] = []

    class Recorded(torch.profiler.record_function):
        def __enter__(self) -> Any:
            entered.append(self.name)
            return super().__enter__()  # type: ignore[no-untyped-call]

        def __exit__(self, *error: Any) -> None:
            left.append(self.name)
            super().__exit__(*error)

    class Fails(Callback):
        def on_before_backward(self, trainer: Trainer, event: Any) -> None:
            if fails and trainer.batch_idx == 3:
                raise ValueError("in the middle")

    monkeypatch.setattr(torch.profiler, "record_function", Recorded)
    trainer = trainer_of(quiet(wait=0, warmup=1, active=4), tmp_path, GradientClipping(None), Fails())
    with pytest.raises(ValueError, match="in the middle") if fails else contextlib.nullcontext():
        trainer.fit(Model(), batches(8))
    assert Counter(entered) == Counter(left)
    assert entered.count("eventtrain/clipping") == (3 if fails else 5)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_evaluation_is_recorded(stage: str, tmp_path: Path) -> None:
    profiler = quiet(wait=1, warmup=1, active=3)
    trainer = trainer_of(profiler, tmp_path)
    getattr(trainer, stage)(Model(), batches(20))
    (trace,) = profiler.traces
    assert trace.name.startswith(f"{stage}.")
    assert steps(trace) == 3
    assert ranges(trace)["eventtrain/forward"] == 3
    assert_nothing_is_left(trainer, profiler)


# ------------------------------------------------------------------ bounds


class Looks(Callback):
    """Notes in each batch whether it is observed."""

    def __init__(self) -> None:
        self.at_work: list[bool] = []

    def on_after_update(self, trainer: Trainer, event: Any) -> None:
        enabled = is_profiling()
        observed = bool(trainer.signals.after_update._observers)
        # In a warm-up torch has prepared its tracing and not begun it.
        assert observed or not enabled
        self.at_work.append(observed)


def test_the_batches_of_a_cycle_are_traced_and_no_other(tmp_path: Path) -> None:
    looks = Looks()
    profiler = quiet(wait=3, warmup=2, active=4)
    trainer = trainer_of(profiler, tmp_path, looks)
    trainer.fit(Model(), batches(50))
    assert looks.at_work == [False] * 3 + [True] * 6 + [False] * 41
    assert_nothing_is_left(trainer, profiler)


def test_the_listener_of_batches_is_idle_while_and_after_they_are_traced(tmp_path: Path) -> None:
    profiler = quiet(wait=3, warmup=2, active=4)
    left: list[list[str]] = []

    class Counts(Callback):
        def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
            left.append(counting(trainer, profiler))

    trainer_of(profiler, tmp_path, Counts()).fit(Model(), batches(20))
    assert left == [["safe_point"]] * 3 + [[]] * 17


def test_one_cycle_is_recorded_by_default(tmp_path: Path) -> None:
    looks = Looks()
    profiler = quiet()
    trainer_of(profiler, tmp_path, looks).fit(Model(), batches(200))
    assert sum(looks.at_work) == 3 + 8
    (trace,) = profiler.traces
    assert steps(trace) == 8
    assert trace.stat().st_size < 1_000_000


def test_each_cycle_has_a_trace(tmp_path: Path) -> None:
    looks = Looks()
    profiler = quiet(wait=2, warmup=1, active=2, repeat=3)
    trainer_of(profiler, tmp_path, looks).fit(Model(), batches(30))
    assert looks.at_work == ([False] * 2 + [True] * 3) * 3 + [False] * 15
    assert [steps(trace) for trace in profiler.traces] == [2, 2, 2]
    assert len(set(profiler.traces)) == 3


def test_without_a_wait_the_tracing_begins_with_the_first_batch(tmp_path: Path) -> None:
    looks = Looks()
    profiler = quiet(wait=0, warmup=0, active=2, repeat=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer_of(profiler, tmp_path, looks).fit(Model(), batches(10))
    assert looks.at_work == [True] * 4 + [False] * 6
    assert [steps(trace) for trace in profiler.traces] == [2, 2]


# ------------------------------------------------------------------ short runs


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (None, (5, 3, 8)),
        (100, (5, 3, 8)),
        (16, (5, 3, 8)),
        (14, (3, 3, 8)),
        (11, (0, 3, 8)),
        (10, (0, 2, 8)),
        (9, (0, 1, 8)),
        (8, (0, 1, 7)),
        (2, (0, 1, 1)),
        (1, (0, 0, 1)),
        (0, (0, 0, 1)),
    ],
)
def test_a_short_run_shortens_the_wait_first(length: int | None, expected: tuple[int, int, int]) -> None:
    cycle = Cycle(5, 3, 8).within(length)
    assert (cycle.wait, cycle.warmup, cycle.active) == expected


@pytest.mark.parametrize("number", [1, 2, 3, 7, 12])
def test_a_run_that_is_shorter_than_the_cycle_has_a_trace(number: int, tmp_path: Path) -> None:
    profiler = quiet()
    trainer = trainer_of(profiler, tmp_path)
    trainer.fit(Model(), batches(number))
    assert steps(profiler.traces[0]) == min(8, max(number - 1, 1))
    assert_nothing_is_left(trainer, profiler)
    if number < 9:
        assert f"{max(number - 1, 1)} batches were recorded of 8 that were to be." in profiler.summary()


def test_a_limit_of_updates_shortens_the_cycle(tmp_path: Path) -> None:
    profiler = quiet()
    trainer_of(profiler, tmp_path, max_epochs=None, max_steps=4).fit(Model(), batches(100))
    assert steps(profiler.traces[0]) == 3


class Unsized:
    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[Tensor]:
        return iter(batches(self.number))


def test_a_run_that_ends_while_it_is_recorded_has_a_trace(tmp_path: Path) -> None:
    profiler = quiet(wait=2, warmup=2, active=8)
    trainer = trainer_of(profiler, tmp_path)
    trainer.fit(Model(), Unsized(7))
    (trace,) = profiler.traces
    assert ranges(trace)["eventtrain/forward"] == 3
    assert "3 batches were recorded of 8 that were to be." in profiler.summary()
    assert_nothing_is_left(trainer, profiler)


@pytest.mark.parametrize("number", [1, 3])
def test_a_run_that_ends_in_the_wait_or_the_warm_up_prints_that_nothing_was_recorded(
    number: int, tmp_path: Path, capsys: Any
) -> None:
    profiler = TorchProfiler(wait=2, warmup=2, active=8)
    trainer = trainer_of(profiler, tmp_path)
    trainer.fit(Model(), Unsized(number))
    assert profiler.traces == []
    assert "TorchProfiler: nothing was recorded" in capsys.readouterr().out
    assert_nothing_is_left(trainer, profiler)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(("at", "recorded"), [(1, None), (3, None), (6, 2)])
def test_an_error_ends_the_tracing_and_leaves_a_trace(at: int, recorded: int | None, tmp_path: Path, capsys: Any) -> None:
    """In the wait, in the warm-up, and in the recording."""

    class Failing(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if batch_idx == at:
                raise ValueError("in the middle")
            return super().training_step(batch, batch_idx)

    profiler = TorchProfiler(wait=2, warmup=2, active=8)
    trainer = trainer_of(profiler, tmp_path)
    with pytest.raises(ValueError, match="in the middle") as raised:
        trainer.fit(Failing(), Unsized(20))
    assert not [note for note in getattr(raised.value, "__notes__", []) if "afterwards" in note]
    assert_nothing_is_left(trainer, profiler)
    assert capsys.readouterr().out == ""
    if recorded is None:
        assert profiler.traces == []
    else:
        assert f"{recorded} batches were recorded" in profiler.summary()
        assert events_of(profiler.traces[0])
    # The next run begins anew.
    trainer.fit(Model(), batches(20))
    assert [steps(trace) for trace in profiler.traces] == [8]


def test_an_interrupt_ends_the_tracing(tmp_path: Path) -> None:
    class Interrupts(Callback):
        def on_after_update(self, trainer: Trainer, event: Any) -> None:
            if trainer.batch_idx == 5:
                raise KeyboardInterrupt

    profiler = quiet(wait=1, warmup=1, active=8)
    trainer = trainer_of(profiler, tmp_path, Interrupts())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(Model(), batches(20))
    assert_nothing_is_left(trainer, profiler)
    assert len(profiler.traces) == 1


def test_another_active_torch_profiler_is_an_error(tmp_path: Path) -> None:
    profiler = quiet(wait=1)
    trainer = trainer_of(profiler, tmp_path)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as other,
        pytest.raises(MisconfigurationError, match="another torch profiler is active"),
    ):
        trainer.fit(Model(), batches(20))
    assert [event for event in other.key_averages() if event.key == "aten::linear"], "the other one continues"
    assert_nothing_is_left(trainer, profiler)
    trainer.fit(Model(), batches(20))
    assert len(profiler.traces) == 1


def test_two_torch_profilers_are_refused() -> None:
    with pytest.raises(MisconfigurationError, match="both have the role 'torch_profiler'"):
        new_trainer(TorchProfiler(), TorchProfiler())


@pytest.mark.parametrize(
    "argument", [{"wait": -1}, {"warmup": -1}, {"active": 0}, {"repeat": 0}, {"row_limit": 0}, {"wait": 1.5}]
)
def test_a_number_that_is_too_small_is_refused(argument: dict[str, Any]) -> None:
    (name,) = argument
    with pytest.raises(MisconfigurationError, match=rf"TorchProfiler\({name}=.*whole number from"):
        TorchProfiler(**argument)


def test_a_directory_that_cannot_be_made_is_an_error_before_the_first_batch(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = trainer_of(quiet(dirpath="file/traces"), tmp_path)
    with pytest.raises(MisconfigurationError, match=r"TorchProfiler cannot write to .*Give a dirpath"):
        trainer.fit(Model(), batches(3))
    assert trainer.global_step == 0


# ------------------------------------------------------------------ files and the table


def test_traces_lie_beside_the_scalars_of_tensorboard(tmp_path: Path) -> None:
    logger, profiler = TensorBoardLogger("runs"), quiet()
    trainer_of(profiler, tmp_path, logger).fit(Model(), batches(20))
    (trace,) = profiler.traces
    assert trace.parent == logger.run_dir
    assert re.fullmatch(r".+\.\d+\.pt\.trace\.json", trace.name), "the form that its plugin reads"


def test_traces_are_written_to_dirpath(tmp_path: Path) -> None:
    for dirpath, expected in (("mine", tmp_path / "mine"), (tmp_path / "elsewhere", tmp_path / "elsewhere")):
        profiler = quiet(dirpath=dirpath)
        trainer_of(profiler, tmp_path, TensorBoardLogger("runs")).fit(Model(), batches(20))
        assert profiler.traces[0].parent == expected


def test_a_fast_dev_run_writes_nothing(tmp_path: Path, capsys: Any) -> None:
    profiler = TorchProfiler()
    trainer = trainer_of(profiler, tmp_path, TensorBoardLogger("runs"), max_epochs=None, fast_dev_run=4)
    trainer.fit(Model(), batches(20), batches(2))
    assert list(tmp_path.iterdir()) == []
    assert "3 batches were recorded" in capsys.readouterr().out


def test_other_ranks_record_nothing(tmp_path: Path) -> None:
    class SecondRank(SingleProcess):
        global_rank = 1

    class Joins(Callback):
        def on_join_processes(self, trainer: Trainer, event: Any) -> None:
            event.processes = SecondRank()

    profiler = TorchProfiler()
    trainer = trainer_of(profiler, tmp_path, Joins())
    trainer.fit(Model(), batches(20))
    assert profiler.traces == [] and list(tmp_path.iterdir()) == []


def test_the_table_is_printed_and_can_be_sorted(tmp_path: Path, capsys: Any) -> None:
    profiler = TorchProfiler(row_limit=5)
    trainer_of(profiler, tmp_path).fit(Model(), batches(20))
    text = capsys.readouterr().out
    assert text == profiler.summary() + "\n"
    assert text.startswith("TorchProfiler: 8 batches were recorded.\n")
    assert f"trace: {profiler.traces[0]}" in text
    longer = profiler.summary(sort_by="count", row_limit=100)
    assert "eventtrain/backward" in longer and "aten::linear" in longer
    assert longer.count("\n") > text.count("\n")


def test_options_reach_torch(tmp_path: Path) -> None:
    profiler = quiet(record_shapes=True, profile_memory=True, with_stack=True, with_flops=True)
    trainer_of(profiler, tmp_path).fit(Model(), batches(20))
    trace = json.loads(local(profiler.traces[0]).read_text())
    assert (trace["record_shapes"], trace["profile_memory"], trace["with_stack"]) == (1, 1, 1)
    (linear, *_) = [event for event in trace["traceEvents"] if event["name"] == "aten::linear"]
    assert linear["args"]["Input Dims"][0] == [2, 4]
    assert "nn.Module: Linear_0" in {event["name"] for event in trace["traceEvents"]}
    assert "CPU Mem" in profiler.summary()


# ------------------------------------------------------------------ together with others


def test_no_warning_is_given(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_of(quiet(repeat=2), tmp_path)
        trainer.fit(Model(), batches(60), batches(2))
        trainer.test(Model(), batches(40))
    assert [str(warning.message) for warning in caught] == []


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    def trained(*callbacks: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        model = Model()
        options: Any = {"max_epochs": 2, "default_root_dir": tmp_path, "num_sanity_val_steps": 2}
        trainer = new_trainer(*callbacks, LRSchedulerStepping(), **options)
        trainer.fit(model, [torch.randn(2, 4) for _ in range(20)], batches(2))
        return nn.utils.parameters_to_vector(model.parameters()).detach(), torch.get_rng_state()

    plain, profiled = trained(), trained(quiet())
    assert torch.equal(plain[0], profiled[0]) and torch.equal(plain[1], profiled[1])


@pytest.mark.parametrize("first", [True, False])
def test_both_profilers_and_a_trace_share_a_run(first: bool, tmp_path: Path) -> None:
    both: list[Any] = [Profiler(print_summary=False, first=3, every=2, layers=True), quiet(wait=2, warmup=1, active=4)]
    if not first:
        both.reverse()
    trainer = new_trainer(*both, LRSchedulerStepping(), max_epochs=2, default_root_dir=tmp_path)
    with trainer.signals.trace() as trace:
        trainer.fit(Model(), batches(20), batches(2))
    assert trace.names().count("before_forward") == 2 * 22
    profiler = trainer.callback(TorchProfiler)
    assert ranges(profiler.traces[0])["eventtrain/forward"] == 4
    assert trainer.callback(Profiler).times.steps.observed > 10
    assert_nothing_is_left(trainer, profiler)


def test_with_a_muted_safe_point_nothing_is_recorded(tmp_path: Path) -> None:
    profiler = quiet(wait=2, warmup=1, active=4)
    trainer = trainer_of(profiler, tmp_path)
    with trainer.signals.safe_point.muted():
        trainer.fit(Model(), batches(20))
    assert profiler.traces == [], "the muted signal counts the batches"
    assert_nothing_is_left(trainer, profiler)
    trainer.fit(Model(), batches(20))
    assert len(profiler.traces) == 1


def test_each_run_has_separate_traces(tmp_path: Path) -> None:
    profiler = quiet()
    trainer = trainer_of(profiler, tmp_path)
    trainer.fit(Model(), batches(20))
    (first,) = profiler.traces
    trainer.fit(Model(), batches(20))
    (second,) = profiler.traces
    assert first != second and first.exists() and second.exists()
    trainer.validate(Model(), batches(20))
    assert profiler.traces[0].name.startswith("validate")
