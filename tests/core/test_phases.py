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

BATCHES = [torch.full((2, 1), float(x)) for x in (1, 2, 3, 4, 5)]


class Module(LightningModule):
    """Notes each step that runs, and what it runs inside of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.steps: list[str] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps.append("training_step")
        return self.layer(batch).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.steps.append("validation_step")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.steps.append("test_step")

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps.append("predict_step")
        return self.layer(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class FakeWrapper(Callback):
    """What a distributed wrapper does: calls the steps itself, and synchronises in the batch that closes a window."""

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


def trainer_with(*callbacks: Any, **options: Any) -> Trainer:
    return Trainer(callbacks=callbacks, default_callbacks=False, device="cpu", **{"max_epochs": 1, **options})


# ------------------------------------------------------------------ what a distributed wrapper needs


@pytest.mark.parametrize(
    ("remainder", "expected"),
    [
        ("step", ["no sync", "sync", "no sync", "sync", "sync"]),  # the short last window is closed
        ("drop", ["no sync", "sync", "no sync", "sync", "no sync"]),
    ],
)
def test_gradients_are_synchronised_once_a_window(remainder: Any, expected: list[str]) -> None:
    wrapper = FakeWrapper()
    trainer = trainer_with(GradientAccumulation(2, remainder=remainder), wrapper)
    trainer.fit(Module(), BATCHES)
    assert [synchronised for _, synchronised, _ in wrapper.calls] == expected
    assert expected.count("sync") == trainer.global_step


def test_the_wrapper_may_be_attached_before_accumulation() -> None:
    wrapper = FakeWrapper()
    trainer_with(wrapper, GradientAccumulation(2)).fit(Module(), BATCHES)
    assert [synchronised for _, synchronised, _ in wrapper.calls] == ["no sync", "sync", "no sync", "sync", "sync"]


def test_without_accumulation_every_batch_is_synchronised() -> None:
    wrapper = FakeWrapper()
    trainer_with(wrapper).fit(Module(), BATCHES)
    assert [synchronised for _, synchronised, _ in wrapper.calls] == ["sync"] * 5


def test_training_and_validation_steps_run_through_the_wrapper() -> None:
    wrapper, module = FakeWrapper(), Module()
    trainer_with(wrapper, max_epochs=2).fit(module, BATCHES, BATCHES[:3])
    sanity, epoch = ["validation_step"] * 2, ["training_step"] * 5 + ["validation_step"] * 3
    assert wrapper.steps() == module.steps == sanity + epoch + epoch


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_steps_run_through_the_wrapper_without_synchronising(stage: str) -> None:
    wrapper, module = FakeWrapper(), Module()
    getattr(trainer_with(wrapper), stage)(module, BATCHES)
    step = {"validate": "validation_step"}.get(stage, f"{stage}_step")
    assert wrapper.steps() == module.steps == [step] * 5
    assert {synchronised for _, synchronised, _ in wrapper.calls} == {"no sync"}


def test_manual_training_steps_run_through_the_wrapper_without_synchronising() -> None:
    wrapper, module = FakeWrapper(), Manual()
    trainer_with(wrapper).fit(module, BATCHES)
    assert wrapper.steps() == module.steps == ["training_step"] * 5
    assert {synchronised for _, synchronised, _ in wrapper.calls} == {"no sync"}


def test_the_wrapper_is_given_what_the_step_is_given_and_returns_what_it_returns() -> None:
    class Doubling(FakeWrapper):
        def call(self, step: Callable[..., Any], *args: Any) -> Any:
            return 2 * super().call(step, *args)

    wrapper, module = Doubling(), Module()
    losses: list[float] = []
    trainer = trainer_with(wrapper)
    trainer.signals.after_forward.connect(lambda _, event: losses.append(event.loss.item()))
    torch.nn.init.ones_(module.layer.weight)
    torch.nn.init.zeros_(module.layer.bias)
    trainer.fit(module, BATCHES[:1])
    (_, _, (batch, batch_idx)) = wrapper.calls[0]
    assert torch.equal(batch, BATCHES[0])
    assert batch_idx == 0
    assert losses == [2.0]


def test_a_batch_of_skipped_training_runs_nothing() -> None:
    wrapper = FakeWrapper()
    trainer = trainer_with(wrapper)
    trainer.signals.train_batch_start.connect(lambda _, event: event.skip_batch() if event.batch_idx == 1 else None)
    trainer.fit(Module(), BATCHES)
    assert len(wrapper.calls) == 4


# ------------------------------------------------------------------ phases


PHASES = [name for name, event_type in EVENTS.items() if issubclass(event_type, Phase)]
# The run that has one phase of a whole evaluation; those of a batch are looked at in a fit.
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
def test_what_is_entered_is_left_in_reverse_order(phase: str) -> None:
    notes: list[str] = []
    trainer = trainer_with()
    for name in ("first", "second"):
        trainer.signals[phase].connect(enters(notes, name))
    run_through(phase, trainer, Module(), BATCHES[:2])
    assert notes == ["enter first", "enter second", "leave second", "leave first"] * (1 if phase in EVALUATIONS else 2)


def test_phases_nest_as_the_loop_map_shows() -> None:
    notes: list[str] = []
    trainer = trainer_with()
    for phase in PHASES:
        trainer.signals[phase].connect(enters(notes, phase))
    trainer.fit(Module(), BATCHES[:1])
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
    trainer = trainer_with()
    for phase in ("batch_fetch", "forward", "zero_grad", "backward"):
        trainer.signals[f"before_{phase}"].connect(enters(notes, phase))
        trainer.signals[f"after_{phase}"].connect(lambda _, event, phase=phase: notes.append(f"after {phase}"))
    trainer.fit(Module(), BATCHES[:1])
    assert notes == [
        *["enter batch_fetch", "leave batch_fetch", "after batch_fetch"],
        *["enter forward", "leave forward", "after forward"],
        *["enter zero_grad", "leave zero_grad", "after zero_grad"],
        *["enter backward", "leave backward", "after backward"],
    ]


class FailsWhere(Module):
    """Fails inside of one phase."""

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

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.fail_in("before_forward")
        return super().training_step(batch, batch_idx)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.fail_in("before_zero_grad")

    def backward(self, loss: Tensor) -> None:
        self.fail_in("before_backward")
        loss.backward()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.fail_in("optimizer_step")


@pytest.mark.parametrize("phase", PHASES)
def test_an_error_in_the_work_leaves_what_was_entered(phase: str) -> None:
    notes: list[str] = []
    trainer = trainer_with()
    for name in ("first", "second"):
        trainer.signals[phase].connect(enters(notes, name))
    with pytest.raises(RuntimeError, match=phase):
        run_through(phase, trainer, FailsWhere(phase), BATCHES)
    assert notes == ["enter first", "enter second", "leave second", "leave first"]


@pytest.mark.parametrize("phase", PHASES)
def test_an_error_in_a_later_listener_of_the_same_event_leaves_what_was_entered(phase: str) -> None:
    notes: list[str] = []
    trainer = trainer_with()

    def fail(sender: Trainer, event: Any) -> None:
        raise ValueError(phase)

    trainer.signals[phase].connect(enters(notes, "first"))
    trainer.signals[phase].connect(enters(notes, "second"))
    trainer.signals[phase].connect(fail)
    module = Module()
    with pytest.raises(ValueError, match=phase):
        run_through(phase, trainer, module, BATCHES)
    assert notes == ["enter first", "enter second", "leave second", "leave first"]
    assert len(module.steps) == (1 if phase in ("before_zero_grad", "before_backward") else 0)


@pytest.mark.parametrize("phase", EVALUATIONS)
def test_an_evaluation_is_left_after_its_end_is_published(phase: str) -> None:
    """So that whoever listens to the end finds what the evaluation ran in, such as averaged weights."""
    notes: list[str] = []
    trainer = trainer_with()
    trainer.signals[phase].connect(enters(notes, "evaluation"))
    trainer.signals[phase.replace("start", "end")].connect(lambda _, event: notes.append("end"))
    run_through(phase, trainer, Module(), BATCHES[:2])
    assert notes == ["enter evaluation", "end", "leave evaluation"]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_error_in_evaluation_leaves_what_was_entered(stage: str) -> None:
    notes: list[str] = []
    trainer = trainer_with()
    trainer.signals.before_forward.connect(enters(notes, "forward"))

    @trainer.signals.before_forward.connect
    def fail(sender: Trainer, event: Any) -> None:
        raise ValueError(event.stage)

    with pytest.raises(ValueError):
        getattr(trainer, stage)(Module(), BATCHES)
    assert notes == ["enter forward", "leave forward"]


def test_enter_gives_back_what_the_context_manager_gives() -> None:
    given: list[Any] = []

    @contextmanager
    def gives() -> Iterator[str]:
        yield "a value"

    trainer = trainer_with()
    trainer.signals.before_forward.connect(lambda _, event: given.append(event.enter(gives())))
    trainer.fit(Module(), BATCHES[:1])
    assert given == ["a value"]


def test_a_vetoed_step_leaves_its_phase() -> None:
    notes: list[str] = []
    trainer = trainer_with()
    trainer.signals.optimizer_step.connect(enters(notes, "step"))
    trainer.signals.before_optimizer_step.connect(lambda _, event: event.skip("a whim"))
    trainer.signals.optimizer_step_skipped.connect(lambda _, event: notes.append(event.reason))
    trainer.fit(Module(), BATCHES[:1])
    assert notes == ["enter step", "leave step", "a whim"]
