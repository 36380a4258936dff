"""What torch's profiler records of a run: that it is bounded, that the phases are in it, and that nothing is left."""

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

from eventtrain import Callback, LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping, TensorBoardLogger
from eventtrain.callbacks.profiling.profiler import Profiler
from eventtrain.callbacks.profiling.torch_profiler import Cycle, TorchProfiler


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch).mean())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.layer(batch)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def batches(number: int) -> list[Tensor]:
    return [torch.ones(2, 4)] * number


def trainer_of(profiler: TorchProfiler, root: Path, *callbacks: Any, **options: Any) -> Trainer:
    options = {"max_epochs": 1, "default_callbacks": False, "device": "cpu", "num_sanity_val_steps": 0, **options}
    return Trainer(callbacks=[profiler, *callbacks, LRSchedulerStepping()], default_root_dir=root, **options)


def quiet(**options: Any) -> TorchProfiler:
    return TorchProfiler(**{"print_summary": False, **options})


def ranges(trace: Path) -> Counter[str]:
    """The named ranges of a trace, and how often each is there."""
    events = json.loads(trace.read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation" and event["ph"] == "X"]
    return Counter(name for name in names if name.startswith(("eventtrain/", "ProfilerStep#")))


def steps(trace: Path) -> int:
    return sum(name.startswith("ProfilerStep#") for name in ranges(trace))


def assert_nothing_is_left(trainer: Trainer, profiler: TorchProfiler) -> None:
    assert not torch.autograd._profiler_enabled()
    assert [signal.name for signal in trainer.signals if signal._observers] == []
    assert [signal.name for signal in trainer.signals if profiler.count in signal.attached()] == []


# ------------------------------------------------------------------ what is in the trace


def test_the_phases_and_the_callbacks_are_named_ranges(tmp_path: Path) -> None:
    profiler = quiet(wait=2, warmup=2, active=4)
    trainer = trainer_of(profiler, tmp_path, GradientAccumulation(2), GradientClipping(1.0))
    trainer.fit(Model(), batches(20))
    (trace,) = profiler.traces
    found = ranges(trace)
    assert trace.parent == tmp_path / "profiles"
    assert steps(trace) == 4
    assert {name: count for name, count in found.items() if name.startswith("eventtrain/") and "callback" not in name} == {
        "eventtrain/fetch": 4,
        "eventtrain/transfer": 4,
        "eventtrain/forward": 4,
        "eventtrain/backward": 4,
        "eventtrain/zero_grad": 2,
        "eventtrain/update": 2,
        "eventtrain/clipping": 2,
        "eventtrain/scheduler": 2,
    }
    assert found["eventtrain/callback/GradientClipping.on_before_gradient_clipping"] == 2
    assert found["eventtrain/callback/LRSchedulerStepping.on_after_update"] == 2
    assert not [name for name in found if "TorchProfiler" in name]
    assert_nothing_is_left(trainer, profiler)


def test_operators_lie_inside_of_their_phase(tmp_path: Path) -> None:
    profiler = quiet(wait=1, warmup=1, active=2)
    trainer_of(profiler, tmp_path).fit(Model(), batches(8))
    events = json.loads(profiler.traces[0].read_text())["traceEvents"]
    forwards = [event for event in events if event["name"] == "eventtrain/forward"]
    linears = [event for event in events if event["name"] == "aten::linear"]
    assert len(forwards) == len(linears) == 2
    for forward, linear in zip(forwards, linears, strict=True):
        assert forward["ts"] <= linear["ts"] and linear["ts"] + linear["dur"] <= forward["ts"] + forward["dur"]


def test_a_validation_is_a_range_with_its_own_phases_inside(tmp_path: Path) -> None:
    profiler = quiet(wait=0, warmup=1, active=3)
    trainer = trainer_of(profiler, tmp_path, val_check_interval=2)
    trainer.fit(Model(), batches(8), batches(5))
    found = ranges(profiler.traces[0])
    assert found["eventtrain/validation"] == 2  # of batches 2 and 4
    assert found["eventtrain/forward"] == 3 + 2 * 5
    assert found["eventtrain/fetch"] == 3 + 2 * 5


def test_manual_optimization_is_in_it_too(tmp_path: Path) -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(self.layer(batch).mean())
                optimizer.step()

    profiler = quiet(wait=0, warmup=1, active=3)
    trainer_of(profiler, tmp_path).fit(Manual(), batches(8))
    found = ranges(profiler.traces[0])
    assert {name: found[f"eventtrain/{name}"] for name in ("forward", "zero_grad", "backward", "update")} == {
        "forward": 3,
        "zero_grad": 6,
        "backward": 6,
        "update": 6,
    }


def test_a_veto_ends_the_ranges_that_it_leaves(tmp_path: Path) -> None:
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
    """Also that of a clipping that clips nothing, whose end never comes, and those that an error leaves."""
    entered: list[str] = []
    left: list[str] = []

    class Recorded(torch.profiler.record_function):
        def __enter__(self) -> Any:
            entered.append(self.name)
            return super().__enter__()

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
def test_evaluations_are_recorded_by_themselves(stage: str, tmp_path: Path) -> None:
    profiler = quiet(wait=1, warmup=1, active=3)
    trainer = trainer_of(profiler, tmp_path)
    getattr(trainer, stage)(Model(), batches(20))
    (trace,) = profiler.traces
    assert trace.name.startswith(f"{stage}.")
    assert steps(trace) == 3
    assert ranges(trace)["eventtrain/forward"] == 3
    assert_nothing_is_left(trainer, profiler)


# ------------------------------------------------------------------ it is bounded


class Looks(Callback):
    """Says in each batch whether the profiler is at work, and whether anything is observed."""

    def __init__(self) -> None:
        self.at_work: list[bool] = []

    def on_after_update(self, trainer: Trainer, event: Any) -> None:
        enabled = torch.autograd._profiler_enabled()
        observed = bool(trainer.signals.after_update._observers)
        # While it warms up torch has prepared its tracing and not begun it.
        assert observed or not enabled
        self.at_work.append(observed)


def test_so_many_batches_wait_warm_up_and_are_recorded_and_the_others_cost_nothing(tmp_path: Path) -> None:
    looks = Looks()
    profiler = quiet(wait=3, warmup=2, active=4)
    trainer = trainer_of(profiler, tmp_path, looks)
    trainer.fit(Model(), batches(50))
    assert looks.at_work == [False] * 3 + [True] * 6 + [False] * 41
    assert_nothing_is_left(trainer, profiler)


def test_after_its_last_batch_no_listener_of_batches_is_left(tmp_path: Path) -> None:
    profiler = quiet(wait=3, warmup=2, active=4)
    left: list[int] = []

    class Counts(Callback):
        def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
            left.append(sum(signal.attached().count(profiler.count) for signal in trainer.signals))

    trainer_of(profiler, tmp_path, Counts()).fit(Model(), batches(20))
    assert left == [1] * 3 + [0] * 17


def test_by_default_it_is_bounded(tmp_path: Path) -> None:
    looks = Looks()
    profiler = quiet()
    trainer_of(profiler, tmp_path, looks).fit(Model(), batches(200))
    assert sum(looks.at_work) == 3 + 8
    (trace,) = profiler.traces
    assert steps(trace) == 8
    assert trace.stat().st_size < 1_000_000


def test_cycles_repeat_with_a_trace_each(tmp_path: Path) -> None:
    looks = Looks()
    profiler = quiet(wait=2, warmup=1, active=2, repeat=3)
    trainer_of(profiler, tmp_path, looks).fit(Model(), batches(30))
    assert looks.at_work == ([False] * 2 + [True] * 3) * 3 + [False] * 15
    assert [steps(trace) for trace in profiler.traces] == [2, 2, 2]
    assert len(set(profiler.traces)) == 3


def test_without_a_wait_it_begins_with_the_first_batch(tmp_path: Path) -> None:
    looks = Looks()
    profiler = quiet(wait=0, warmup=0, active=2, repeat=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer_of(profiler, tmp_path, looks).fit(Model(), batches(10))
    assert looks.at_work == [True] * 4 + [False] * 6
    assert [steps(trace) for trace in profiler.traces] == [2, 2]


# ------------------------------------------------------------------ short runs


@pytest.mark.parametrize(
    ("run", "expected"),
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
def test_a_short_run_gives_up_its_wait_first(run: int | None, expected: tuple[int, int, int]) -> None:
    cycle = Cycle(5, 3, 8).within(run)
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


def test_updates_that_end_the_run_count_too(tmp_path: Path) -> None:
    profiler = quiet()
    trainer_of(profiler, tmp_path, max_epochs=None, max_steps=4).fit(Model(), batches(100))
    assert steps(profiler.traces[0]) == 3


class Unsized:
    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[Tensor]:
        return iter(batches(self.number))


def test_a_run_of_unknown_length_that_ends_while_it_records_keeps_what_there_is(tmp_path: Path) -> None:
    profiler = quiet(wait=2, warmup=2, active=8)
    trainer = trainer_of(profiler, tmp_path)
    trainer.fit(Model(), Unsized(7))
    (trace,) = profiler.traces
    assert ranges(trace)["eventtrain/forward"] == 3
    assert "3 batches were recorded of 8 that were to be." in profiler.summary()
    assert_nothing_is_left(trainer, profiler)


@pytest.mark.parametrize("number", [1, 3])
def test_one_that_ends_before_it_records_says_so(number: int, tmp_path: Path, capsys: Any) -> None:
    """While it waits, and while it warms up."""
    profiler = TorchProfiler(wait=2, warmup=2, active=8)
    trainer = trainer_of(profiler, tmp_path)
    trainer.fit(Model(), Unsized(number))
    assert profiler.traces == []
    assert "TorchProfiler: nothing was recorded" in capsys.readouterr().out
    assert_nothing_is_left(trainer, profiler)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(("at", "recorded"), [(1, None), (3, None), (6, 2)])
def test_an_error_ends_it_and_keeps_what_was_recorded(at: int, recorded: int | None, tmp_path: Path, capsys: Any) -> None:
    """While it waits, warms up, and records."""

    class Failing(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
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
        assert json.loads(profiler.traces[0].read_text())["traceEvents"]
    # The next run is a new one.
    trainer.fit(Model(), batches(20))
    assert [steps(trace) for trace in profiler.traces] == [8]


def test_an_interrupt_ends_it(tmp_path: Path) -> None:
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


def test_another_profiler_at_work_is_an_error_that_says_so(tmp_path: Path) -> None:
    profiler = quiet(wait=1)
    trainer = trainer_of(profiler, tmp_path)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as other,
        pytest.raises(MisconfigurationError, match="another torch profiler is at work"),
    ):
        trainer.fit(Model(), batches(20))
    assert [event for event in other.key_averages() if event.key == "aten::linear"], "the other one goes on"
    assert_nothing_is_left(trainer, profiler)
    trainer.fit(Model(), batches(20))
    assert len(profiler.traces) == 1


def test_two_of_them_are_refused() -> None:
    with pytest.raises(MisconfigurationError, match="both have the role 'torch_profiler'"):
        Trainer(max_epochs=1, callbacks=[TorchProfiler(), TorchProfiler()], device="cpu")


@pytest.mark.parametrize(
    "argument", [{"wait": -1}, {"warmup": -1}, {"active": 0}, {"repeat": 0}, {"row_limit": 0}, {"wait": 1.5}]
)
def test_what_makes_no_sense_is_refused(argument: dict[str, Any]) -> None:
    (name,) = argument
    with pytest.raises(MisconfigurationError, match=rf"TorchProfiler\({name}=.*whole number from"):
        TorchProfiler(**argument)


def test_a_directory_that_cannot_be_made_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = trainer_of(quiet(dirpath="file/traces"), tmp_path)
    with pytest.raises(MisconfigurationError, match=r"TorchProfiler cannot write to .*Give a dirpath"):
        trainer.fit(Model(), batches(3))
    assert trainer.global_step == 0


# ------------------------------------------------------------------ where it goes, and what is printed


def test_traces_lie_beside_the_scalars_of_tensorboard(tmp_path: Path) -> None:
    logger, profiler = TensorBoardLogger("runs"), quiet()
    trainer_of(profiler, tmp_path, logger).fit(Model(), batches(20))
    (trace,) = profiler.traces
    assert trace.parent == Path(logger.run_dir)
    assert re.fullmatch(r".+\.\d+\.pt\.trace\.json", trace.name), "the names that its plugin reads"


def test_a_directory_can_be_given(tmp_path: Path) -> None:
    for given, expected in (("mine", tmp_path / "mine"), (tmp_path / "elsewhere", tmp_path / "elsewhere")):
        profiler = quiet(dirpath=given)
        trainer_of(profiler, tmp_path, TensorBoardLogger("runs")).fit(Model(), batches(20))
        assert profiler.traces[0].parent == expected


def test_a_fast_dev_run_writes_nothing(tmp_path: Path, capsys: Any) -> None:
    profiler = TorchProfiler()
    trainer = trainer_of(profiler, tmp_path, TensorBoardLogger("runs"), max_epochs=None, fast_dev_run=4)
    trainer.fit(Model(), batches(20), batches(2))
    assert list(tmp_path.iterdir()) == []
    assert "3 batches were recorded" in capsys.readouterr().out


def test_other_ranks_record_nothing(tmp_path: Path) -> None:
    profiler = TorchProfiler()
    trainer = trainer_of(profiler, tmp_path)
    trainer.processes.global_rank = 1  # type: ignore[misc]
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
    trace = json.loads(profiler.traces[0].read_text())
    assert (trace["record_shapes"], trace["profile_memory"], trace["with_stack"]) == (1, 1, 1)
    (linear, *_) = [event for event in trace["traceEvents"] if event["name"] == "aten::linear"]
    assert linear["args"]["Input Dims"][0] == [2, 4]
    assert "nn.Module: Linear_0" in {event["name"] for event in trace["traceEvents"]}
    assert "CPU Mem" in profiler.summary()


# ------------------------------------------------------------------ beside others


def test_it_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_of(quiet(repeat=2), tmp_path)
        trainer.fit(Model(), batches(60), batches(2))
        trainer.test(Model(), batches(40))
    assert [str(warning.message) for warning in caught] == []


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    def run(*callbacks: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        model = Model()
        trainer = Trainer(
            max_epochs=2,
            callbacks=[*callbacks, LRSchedulerStepping()],
            default_callbacks=False,
            device="cpu",
            default_root_dir=tmp_path,
        )
        trainer.fit(model, [torch.randn(2, 4) for _ in range(20)], batches(2))
        return nn.utils.parameters_to_vector(model.parameters()).detach(), torch.get_rng_state()

    plain, profiled = run(), run(quiet())
    assert torch.equal(plain[0], profiled[0]) and torch.equal(plain[1], profiled[1])


@pytest.mark.parametrize("first", [True, False])
def test_it_shares_a_run_with_the_profiler_and_a_trace(first: bool, tmp_path: Path) -> None:
    both = [Profiler(print_summary=False, first=3, every=2, layers=True), quiet(wait=2, warmup=1, active=4)]
    if not first:
        both.reverse()
    trainer = Trainer(
        max_epochs=2,
        callbacks=[*both, LRSchedulerStepping()],
        default_callbacks=False,
        device="cpu",
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
    )
    with trainer.signals.trace() as trace:
        trainer.fit(Model(), batches(20), batches(2))
    assert trace.names().count("before_forward") == 2 * 22
    profiler = trainer.callback(TorchProfiler)
    assert ranges(profiler.traces[0])["eventtrain/forward"] == 4
    assert trainer.callback(Profiler).times.steps.observed > 10
    assert_nothing_is_left(trainer, profiler)


def test_muted_signals_break_nothing(tmp_path: Path) -> None:
    profiler = quiet(wait=2, warmup=1, active=4)
    trainer = trainer_of(profiler, tmp_path)
    with trainer.signals.safe_point.muted():
        trainer.fit(Model(), batches(20))
    assert profiler.traces == [], "it counts by the signal that is muted"
    assert_nothing_is_left(trainer, profiler)
    trainer.fit(Model(), batches(20))
    assert len(profiler.traces) == 1


def test_runs_in_a_row_have_traces_of_their_own(tmp_path: Path) -> None:
    profiler = quiet()
    trainer = trainer_of(profiler, tmp_path)
    trainer.fit(Model(), batches(20))
    (first,) = profiler.traces
    trainer.fit(Model(), batches(20))
    (second,) = profiler.traces
    assert first != second and first.exists() and second.exists()
    trainer.validate(Model(), batches(20))
    assert profiler.traces[0].name.startswith("validate")
