"""LambdaCallback: a callback made of functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eventtrain import MisconfigurationError, Trainer
from eventtrain.callbacks import LambdaCallback
from eventtrain.checkpoint.contents import gather
from tests.kit import Line, train

BATCHES = [torch.ones(2, 1), torch.zeros(2, 1)]


def test_functions_are_called_with_trainer_and_event() -> None:
    seen: list[Any] = []
    callback = LambdaCallback(
        on_train_epoch_end=lambda trainer, event: seen.append((trainer, event.epoch)),
        on_after_update=lambda trainer, event: seen.append(event.global_step),
    )
    trainer = train(Line(), BATCHES, callback, max_epochs=2)
    assert seen == [1, 2, (trainer, 0), 3, 4, (trainer, 1)]


def test_several_callbacks_with_the_same_function_are_attached_and_detached_independently() -> None:
    seen: list[int] = []

    def note(trainer: Trainer, event: Any) -> None:
        seen.append(event.global_step)

    first, second = LambdaCallback(on_after_update=note), LambdaCallback(on_after_update=note)
    trainer = train(Line(), BATCHES[:1], first, second, max_epochs=2)
    assert seen == [1, 1, 2, 2]
    trainer.callbacks.remove(first)
    assert len(trainer.signals.after_update.attached()) == 1
    trainer.fit(Line(), BATCHES[:1])
    assert seen == [1, 1, 2, 2, 1, 2]
    trainer.callbacks.remove(second)
    assert trainer.signals.after_update.attached() == [] and trainer.callbacks == []


def test_any_object_that_can_be_called_like_a_listener_is_accepted() -> None:
    class Counter:
        calls = 0

        def __call__(self, trainer: Trainer, event: Any) -> None:
            self.calls += 1

        def method(self, *args: Any, **kwargs: Any) -> None:
            self.calls += 10

    counter = Counter()
    callback = LambdaCallback(on_after_update=counter, on_train_end=counter.method, on_fit_end=lambda *_, event: None)
    train(Line(), BATCHES, callback, max_epochs=2)
    assert counter.calls == 14


def test_a_checkpoint_has_no_state_of_it() -> None:
    trainer = train(Line(), BATCHES, *[LambdaCallback(on_fit_end=lambda trainer, event: None) for _ in range(2)])
    assert gather(trainer)["callbacks"] == {}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("on_train_epochend", "Did you mean 'on_train_epoch_end'?"),
        ("train_epoch_end", "Did you mean 'on_train_epoch_end'?"),
        ("on_zzz", "eventtrain.events lists them all."),
    ],
)
def test_a_name_without_an_event_is_an_error_that_suggests_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(MisconfigurationError) as raised:
        LambdaCallback(**{name: lambda trainer, event: None})
    assert str(raised.value) == f"LambdaCallback({name}=...) names no event. {hint}"


async def coroutine(trainer: Trainer, event: Any) -> None: ...


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (lambda trainer: None, r"LambdaCallback\(on_fit_end=<lambda> at test_lambda_callback\.py:\d+\)\(trainer\) cannot be"),
        (lambda trainer, pl_module: None, r"written for Lightning"),
        (lambda trainer, e: None, r"cannot be called as \(trainer, event=event\)"),
        (3, r"cannot be called"),
        (None, r"cannot be called"),
        (coroutine, r"LambdaCallback\(on_fit_end=coroutine\) is a coroutine function"),
    ],
)
def test_an_object_that_cannot_be_called_like_a_listener_is_an_error(handler: Any, message: str) -> None:
    with pytest.raises(MisconfigurationError, match=message):
        LambdaCallback(on_fit_end=handler)


def test_a_callback_without_functions_is_an_error() -> None:
    with pytest.raises(MisconfigurationError, match="listens to nothing"):
        LambdaCallback()


def test_an_error_in_a_function_names_the_function() -> None:
    def fails(trainer: Trainer, event: Any) -> None:
        raise ValueError("no")

    handlers = {"on_fit_end": lambda trainer, event: 1 / 0}
    line = handlers["on_fit_end"].__code__.co_firstlineno
    with pytest.raises(ZeroDivisionError) as raised:
        train(Line(), BATCHES, LambdaCallback(**handlers))
    note = f"raised by LambdaCallback(on_fit_end=<lambda> at {Path(__file__).name}:{line}) at the event 'fit_end'"
    assert raised.value.__notes__[0].startswith(note)

    with pytest.raises(ValueError, match="no") as failed:
        train(Line(), BATCHES, LambdaCallback(on_after_update=fails))
    (note,) = failed.value.__notes__
    assert note.startswith("raised by LambdaCallback(on_after_update=") and "fails) at the event 'after_update'" in note


def test_the_function_itself_is_not_changed() -> None:
    def report(trainer: Trainer, event: Any) -> None: ...

    LambdaCallback(on_fit_end=report)
    assert vars(report) == {}
