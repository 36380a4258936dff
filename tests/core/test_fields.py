"""Fields of events: those with an asterisk in the table may be written, the others are only read."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from eventtrain import Callback, MisconfigurationError, Trainer, events
from eventtrain.callbacks import GradientClipping
from eventtrain.events import EVENTS, Plan
from tests.kit import ModuleOf, On, new_trainer, train
from tests.misconfigurations import Case, check_refusal, check_remedy, fit

FIELDS = [
    (name, field.name, bool(field.metadata.get("writable")))
    for name, event_type in EVENTS.items()
    for field in dataclasses.fields(event_type)
]


def made(name: str) -> Any:
    """Return an event whose fields have strings as values."""
    return EVENTS[name](*[field.name for field in dataclasses.fields(EVENTS[name])])


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, field, writable in FIELDS if not writable])
def test_writing_a_field_without_an_asterisk_is_an_error_that_names_event_and_field(name: str, field: str) -> None:
    event = made(name)
    with pytest.raises(MisconfigurationError, match=rf"^event\.{field} = 5 at {name} would change nothing"):
        setattr(event, field, 5)
    assert getattr(event, field) == field


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, field, writable in FIELDS if writable])
def test_a_field_with_an_asterisk_is_written(name: str, field: str) -> None:
    event = made(name)
    setattr(event, field, 5)
    assert getattr(event, field) == 5


@pytest.mark.parametrize(
    ("name", "write", "remedy"),
    [
        ("train_batch_start", lambda event: setattr(event, "batch", torch.ones(1)), "`event.batch` at `after_batch_fetch`"),
        ("train_batch_end", lambda event: setattr(event, "loss", 0), "`event.loss` at `after_forward`"),
        ("train_batch_end", lambda event: setattr(event, "outputs", {}), "`event.outputs` at `after_forward`"),
        ("before_backward", lambda event: setattr(event, "raw_loss", 0), "`event.loss` at `before_backward`"),
        ("before_forward", lambda event: setattr(event, "batch", 0), "`event.batch` at `after_batch_fetch`"),
        ("train_batch_start", lambda event: setattr(event, "skipped", True), r"`event\.skip_batch\(\)`"),
        ("train_epoch_start", lambda event: setattr(event, "epoch", 3), r"The loop counts it.*trainer\.end_epoch"),
        ("train_epoch_start", lambda event: setattr(event, "batches_done", 3), r"only reads this field\.\n"),
        ("train_batch_start", lambda event: setattr(event, "ends_epoch", True), r"`event\.end_epoch\(\)`"),
        ("before_optimizer_step", lambda event: setattr(event, "skip_reason", "bad"), r"`event\.skip\('reason'\)`"),
        ("clipping_decided", lambda event: setattr(event, "norm_type", 1.0), "at `before_gradient_clipping`"),
    ],
)
def test_the_error_says_what_to_write_instead(name: str, write: Any, remedy: str) -> None:
    trainer = new_trainer(On(**{name: lambda trainer, event: write(event)}))
    with pytest.raises(MisconfigurationError, match=remedy) as caught:
        trainer.fit(ModuleOf(), [torch.ones(1)])
    assert any(f"at the event '{name}'" in note for note in caught.value.__notes__)


def test_a_write_in_a_later_batch_and_by_a_function_is_an_error_too() -> None:
    def augment(event: Any) -> None:
        event.batch *= 2  # in place, and then it writes the field

    class Augment(Callback):
        def on_train_batch_start(self, trainer: Trainer, event: events.TrainBatchStart) -> None:
            if event.batch_idx == 3:
                augment(event)

    trainer = new_trainer(Augment())
    with pytest.raises(MisconfigurationError, match="at train_batch_start"):
        trainer.fit(ModuleOf(), [torch.ones(1)] * 5)
    assert trainer.batch_idx == 3


def test_a_module_that_gets_the_event_cannot_write_it_either() -> None:
    def on_gradients_ready(event: Any) -> None:
        event.batches = 1

    with pytest.raises(MisconfigurationError, match=r"event\.batches = 1 at gradients_ready"):
        train(ModuleOf(on_gradients_ready=on_gradients_ready), 1)


def test_the_content_of_a_field_may_be_changed() -> None:
    def double(trainer: Any, event: Any) -> None:
        event.batch.mul_(2)
        event.plan.loss_scale = 0.5

    module = ModuleOf()
    train(module, [1.0], On(train_batch_start=double))
    assert module.w.item() == pytest.approx(-0.1)


def test_a_veto_a_skipped_batch_and_an_ended_epoch_are_seen_in_their_fields() -> None:
    event = events.TrainBatchStart(None, 0, False, Plan())
    event.skip_batch()
    event.end_epoch()
    veto = events.BeforeOptimizerStep(made("before_optimizer_step").optimizer, 1)
    veto.skip("first")
    veto.skip("second")
    assert (event.skipped, event.ends_epoch, veto.skip_reason) == (True, True, "first")


@pytest.mark.parametrize("name", EVENTS)
def test_an_event_is_still_a_dataclass_that_can_be_copied_and_replaced(name: str) -> None:
    event = made(name)
    fields = [field.name for field in dataclasses.fields(event)]
    assert repr(event).startswith(f"{type(event).__name__}(") and all(f"{field}='{field}'" in repr(event) for field in fields)
    for other in (copy.copy(event), copy.deepcopy(event), pickle.loads(pickle.dumps(event)), dataclasses.replace(event)):
        assert other == event and type(other) is type(event)
    for field in fields:
        assert getattr(dataclasses.replace(event, **{field: 9}), field) == 9
    assert not hasattr(event, "__dict__")


def test_an_attribute_that_no_field_has_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'bathc'"):
        made("train_batch_start").bathc = 1


# ------------------------------------------------------------------ each beside the form that trains


def writes(signal: str, field: str, value: Any = None) -> Trainer:
    """Train with a callback that writes a field of an event."""
    return fit(None, GradientClipping(1.0), On(**{signal: lambda trainer, event: setattr(event, field, value)}))


def uses(signal: str, use: Callable[[Any], Any]) -> Trainer:
    """Train two epochs with a callback that does something with an event, once in an epoch."""

    def once(trainer: Trainer, event: Any) -> None:
        if trainer.batch_idx == 1:
            use(event)

    return fit(None, GradientClipping(1.0), On(**{signal: once}), max_epochs=2)


def doubles(field: str) -> Callable[[Any], None]:
    return lambda event: setattr(event, field, getattr(event, field) * 2)


# The event, the field, the remedy in the message, and the event and function of the right form.
WRITES: list[tuple[str, str, str, str, Callable[[Any], Any]]] = [
    ("train_batch_start", "batch", "`event.batch` at `after_batch_fetch`", "after_batch_fetch", doubles("batch")),
    ("before_forward", "batch", "`event.batch` at `after_batch_fetch`", "after_batch_fetch", doubles("batch")),
    ("train_batch_start", "skipped", r"event\.skip_batch\(\)", "train_batch_start", lambda event: event.skip_batch()),
    ("train_batch_start", "ends_epoch", r"event\.end_epoch\(\)", "train_batch_start", lambda event: event.end_epoch()),
    ("before_backward", "raw_loss", "`event.loss` at `before_backward`", "before_backward", doubles("loss")),
    ("train_batch_end", "loss", "`event.loss` at `after_forward`", "after_forward", doubles("loss")),
    ("train_batch_end", "outputs", "`event.outputs` at `after_forward`", "after_forward", doubles("outputs")),
    (
        "before_optimizer_step",
        "skip_reason",
        r"event\.skip\('reason'\)",
        "before_optimizer_step",
        lambda event: event.skip("no"),
    ),
    ("clipping_decided", "norm_type", "`event.norm_type` at", "before_gradient_clipping", doubles("norm_type")),
    (
        "optimizer_step",
        "optimizer",
        r"event\.optimizer\.param_groups",
        "optimizer_step",
        lambda event: event.optimizer.param_groups,
    ),
]

CASES: dict[str, Case] = {
    **{
        f"event.{field} written at {signal}": Case(
            lambda signal=signal, field=field: writes(signal, field),  # type: ignore[misc]
            (rf"event\.{field} = None at {signal} would change nothing", remedy),
            lambda right=right, use=use: uses(right, use),  # type: ignore[misc]
        )
        for signal, field, remedy, right, use in WRITES
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_refusal_names_the_mistake_and_the_remedy(case: str) -> None:
    check_refusal(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_correct_form_trains(case: str) -> None:
    check_remedy(CASES[case])
