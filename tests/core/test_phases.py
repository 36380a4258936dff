"""The seams at which distributed wrappers, autocast and profilers come in: the phases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import GradientAccumulation
from eventtrain.events import EVENTS, Phase
from tests.kit import Line, new_trainer, rows

BATCHES = rows(5)


class Noting(Line):
    """Records the steps that run."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.steps: list[str] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.steps.append("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.steps.append("validation_step")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.steps.append("test_step")

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps.append("predict_step")
        return super().predict_step(batch, batch_idx)


class FakeWrapper(Callback):
    """Stands for a distributed wrapper: calls the steps itself, and synchronises in the batch that closes a window."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, tuple[Any, ...]]] = []
        self.backwards: list[str] = []
        self.synchronises = True

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.synchronises = False
        yield
        self.synchronises = True

    def call(self, step: Callable[..., Any], *args: Any) -> Any:
        self.calls.append((step.__name__, "sync" if self.synchronises else "no sync", args))
        return step(*args)

    def on_before_forward(self, trainer: Trainer, event: Any) -> None:
        event.call = self.call
        if not event.closes_window:
            event.enter(self.no_sync())

    def steps(self) -> list[str]:
        return [name for name, _, _ in self.calls]


# ------------------------------------------------------------------ the needs of a distributed wrapper


@pytest.mark.parametrize(
    ("remainder", "expected"),
    [
        ("step", ["no sync", "sync", "no sync", "sync", "sync"]),  # the short last window is closed
        ("drop", ["no sync", "sync", "no sync", "sync", "no sync"]),
    ],
)
def test_gradients_are_synchronised_once_a_window(remainder: Any, expected: list[str]) -> None:
    wrapper = FakeWrapper()
    trainer = new_trainer(GradientAccumulation(2, remainder=remainder), wrapper)
    trainer.fit(Noting(), BATCHES)
    assert [synchronised for _, synchronised, _ in wrapper.calls] == expected
    assert expected.count("sync") == trainer.global_step


def test_the_wrapper_may_be_attached_before_accumulation() -> None:
    wrapper = FakeWrapper()
    new_trainer(wrapper, GradientAccumulation(2)).fit(Noting(), BATCHES)
    assert [synchronised for _, synchronised, _ in wrapper.calls] == ["no sync", "sync", "no sync", "sync", "sync"]


def test_without_accumulation_every_batch_is_synchronised() -> None:
    wrapper = FakeWrapper()
    new_trainer(wrapper).fit(Noting(), BATCHES)
    assert [synchronised for _, synchronised, _ in wrapper.calls] == ["sync"] * 5


def test_training_and_validation_steps_run_through_the_wrapper() -> None:
    wrapper, module = FakeWrapper(), Noting()
    new_trainer(wrapper, max_epochs=2, num_sanity_val_steps=2).fit(module, BATCHES, BATCHES[:3])
    sanity, epoch = ["validation_step"] * 2, ["training_step"] * 5 + ["validation_step"] * 3
    assert wrapper.steps() == module.steps == sanity + epoch + epoch


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_steps_run_through_the_wrapper_without_synchronising(stage: str) -> None:
    wrapper, module = FakeWrapper(), Noting()
    getattr(new_trainer(wrapper), stage)(module, BATCHES)
    step = {"validate": "validation_step"}.get(stage, f"{stage}_step")
    assert wrapper.steps() == module.steps == [step] * 5
    assert {synchronised for _, synchronised, _ in wrapper.calls} == {"no sync"}


def test_manual_training_steps_run_through_the_wrapper_without_synchronising() -> None:
    wrapper, module = FakeWrapper(), Noting(automatic=False)
    new_trainer(wrapper).fit(module, BATCHES)
    assert wrapper.steps() == module.steps == ["training_step"] * 5
    assert {synchronised for _, synchronised, _ in wrapper.calls} == {"no sync"}


def test_the_wrapper_gets_the_steps_arguments_and_returns_the_loss() -> None:
    class Doubling(FakeWrapper):
        def call(self, step: Callable[..., Any], *args: Any) -> Any:
            return 2 * super().call(step, *args)

    wrapper, module = Doubling(), Noting()
    losses: list[float] = []
    trainer = new_trainer(wrapper)
    trainer.signals.after_forward.connect(lambda _, event: losses.append(event.loss.item()))
    torch.nn.init.ones_(module.layer.weight)
    torch.nn.init.zeros_(module.layer.bias)
    trainer.fit(module, BATCHES[:1])
    (_, _, (batch, batch_idx)) = wrapper.calls[0]
    assert torch.equal(batch, BATCHES[0])
    assert batch_idx == 0
    assert losses == [2.0]


def test_a_skipped_batch_runs_no_step() -> None:
    wrapper = FakeWrapper()
    trainer = new_trainer(wrapper)
    trainer.signals.train_batch_start.connect(lambda _, event: event.skip_batch() if event.batch_idx == 1 else None)
    trainer.fit(Noting(), BATCHES)
    assert len(wrapper.calls) == 4


# ------------------------------------------------------------------ phases


PHASES = [name for name, event_type in EVENTS.items() if issubclass(event_type, Phase)]
# The verb of the run that has this phase; all other phases are part of a fit.
EVALUATIONS = {"validation_start": "validate", "test_start": "test", "predict_start": "predict"}


def run_through(phase: str, trainer: Trainer, module: LightningModule, batches: list[Tensor]) -> None:
    getattr(trainer, EVALUATIONS.get(phase, "fit"))(module, batches)


@contextmanager
def noting(notes: list[str], name: str) -> Iterator[None]:
    notes.append(f"enter {name}")
    try:
        yield
    finally:
        notes.append(f"leave {name}")


def enters(notes: list[str], name: str) -> Callable[..., None]:
    def listener(trainer: Trainer, event: Any) -> None:
        event.enter(noting(notes, name))

    return listener


@pytest.mark.parametrize("phase", PHASES)
def test_contexts_are_left_in_reverse_order(phase: str) -> None:
    notes: list[str] = []
    trainer = new_trainer()
    for name in ("first", "second"):
        trainer.signals[phase].connect(enters(notes, name))
    run_through(phase, trainer, Noting(), BATCHES[:2])
    assert notes == ["enter first", "enter second", "leave second", "leave first"] * (1 if phase in EVALUATIONS else 2)


def test_phases_nest_as_the_loop_map_shows() -> None:
    notes: list[str] = []
    trainer = new_trainer()
    for phase in PHASES:
        trainer.signals[phase].connect(enters(notes, phase))
    trainer.fit(Noting(), BATCHES[:1])
    assert notes == [
        "enter before_batch_fetch",
        "leave before_batch_fetch",
        "enter optimizer_step",
        "enter before_forward",
        "leave before_forward",
        "enter before_zero_grad",
        "leave before_zero_grad",
        "enter before_backward",
        "leave before_backward",
        "leave optimizer_step",
    ]


def test_a_phase_is_over_before_its_counterpart_is_published() -> None:
    notes: list[str] = []
    trainer = new_trainer()
    for phase in ("batch_fetch", "forward", "zero_grad", "backward"):
        trainer.signals[f"before_{phase}"].connect(enters(notes, phase))
        trainer.signals[f"after_{phase}"].connect(lambda _, event, phase=phase: notes.append(f"after {phase}"))
    trainer.fit(Noting(), BATCHES[:1])
    assert notes == [
        *["enter batch_fetch", "leave batch_fetch", "after batch_fetch"],
        *["enter forward", "leave forward", "after forward"],
        *["enter zero_grad", "leave zero_grad", "after zero_grad"],
        *["enter backward", "leave backward", "after backward"],
    ]


class FailsIn(Noting):
    """Fails in one phase."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.fail_in("validation_start")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.fail_in("test_start")

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.fail_in("predict_start")
        return batch

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase

    def fail_in(self, phase: str) -> None:
        if phase == self.phase:
            raise RuntimeError(phase)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        self.fail_in("before_batch_fetch")
        return batch

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.fail_in("before_forward")
        return super().training_step(batch, batch_idx)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.fail_in("before_zero_grad")

    def backward(self, loss: Tensor) -> None:
        self.fail_in("before_backward")
        loss.backward()  # type: ignore[no-untyped-call]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.fail_in("optimizer_step")


@pytest.mark.parametrize("phase", PHASES)
def test_an_error_in_the_work_leaves_all_contexts(phase: str) -> None:
    notes: list[str] = []
    trainer = new_trainer()
    for name in ("first", "second"):
        trainer.signals[phase].connect(enters(notes, name))
    with pytest.raises(RuntimeError, match=phase):
        run_through(phase, trainer, FailsIn(phase), BATCHES)
    assert notes == ["enter first", "enter second", "leave second", "leave first"]


@pytest.mark.parametrize("phase", PHASES)
def test_an_error_in_a_later_listener_of_the_same_event_leaves_all_contexts(phase: str) -> None:
    notes: list[str] = []
    trainer = new_trainer()

    def fail(sender: Trainer, event: Any) -> None:
        raise ValueError(phase)

    trainer.signals[phase].connect(enters(notes, "first"))
    trainer.signals[phase].connect(enters(notes, "second"))
    trainer.signals[phase].connect(fail)
    module = Noting()
    with pytest.raises(ValueError, match=phase):
        run_through(phase, trainer, module, BATCHES)
    assert notes == ["enter first", "enter second", "leave second", "leave first"]
    assert len(module.steps) == (1 if phase in ("before_zero_grad", "before_backward") else 0)


@pytest.mark.parametrize("phase", EVALUATIONS)
def test_an_evaluation_is_left_after_its_end_is_published(phase: str) -> None:
    """Listeners of the end still see the evaluation's context, such as averaged weights."""
    notes: list[str] = []
    trainer = new_trainer()
    trainer.signals[phase].connect(enters(notes, "evaluation"))
    trainer.signals[phase.replace("start", "end")].connect(lambda _, event: notes.append("end"))
    run_through(phase, trainer, Noting(), BATCHES[:2])
    assert notes == ["enter evaluation", "end", "leave evaluation"]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_error_in_evaluation_leaves_all_contexts(stage: str) -> None:
    notes: list[str] = []
    trainer = new_trainer()
    trainer.signals.before_forward.connect(enters(notes, "forward"))

    @trainer.signals.before_forward.connect
    def fail(sender: Trainer, event: Any) -> None:
        raise ValueError(event.stage)

    with pytest.raises(ValueError):
        getattr(trainer, stage)(Noting(), BATCHES)
    assert notes == ["enter forward", "leave forward"]


def test_enter_returns_the_result_of_the_context_manager() -> None:
    values: list[Any] = []

    @contextmanager
    def gives() -> Iterator[str]:
        yield "a value"

    trainer = new_trainer()
    trainer.signals.before_forward.connect(lambda _, event: values.append(event.enter(gives())))
    trainer.fit(Noting(), BATCHES[:1])
    assert values == ["a value"]


def test_a_vetoed_step_leaves_its_phase() -> None:
    notes: list[str] = []
    trainer = new_trainer()
    trainer.signals.optimizer_step.connect(enters(notes, "step"))
    trainer.signals.before_optimizer_step.connect(lambda _, event: event.skip("a whim"))
    trainer.signals.optimizer_step_skipped.connect(lambda _, event: notes.append(event.reason))
    trainer.fit(Noting(), BATCHES[:1])
    assert notes == ["enter step", "leave step", "a whim"]
