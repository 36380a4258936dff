"""Functions as a callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eventtrain import LightningModule, MisconfigurationError, Trainer
from eventtrain.callback import detach
from eventtrain.callbacks.lambda_callback import LambdaCallback
from eventtrain.checkpoint.contents import gather

BATCHES = [torch.ones(2, 1), torch.zeros(2, 1)]


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_with(*callbacks: Any) -> Trainer:
    return Trainer(max_epochs=2, device="cpu", default_callbacks=False, callbacks=callbacks)


def test_functions_are_called_with_trainer_and_event() -> None:
    seen: list[Any] = []
    callback = LambdaCallback(
        on_train_epoch_end=lambda trainer, event: seen.append((trainer, event.epoch)),
        on_after_update=lambda trainer, event: seen.append(event.global_step),
    )
    trainer = trainer_with(callback)
    trainer.fit(Module(), BATCHES)
    assert seen == [1, 2, (trainer, 0), 3, 4, (trainer, 1)]


def test_several_can_be_attached_with_the_same_function_too_and_each_is_detached_by_itself() -> None:
    seen: list[int] = []

    def note(trainer: Trainer, event: Any) -> None:
        seen.append(event.global_step)

    first, second = LambdaCallback(on_after_update=note), LambdaCallback(on_after_update=note)
    trainer = trainer_with(first, second)
    trainer.fit(Module(), BATCHES[:1])
    assert seen == [1, 1, 2, 2]
    detach(first, trainer.signals, trainer.callbacks)
    assert len(trainer.signals.after_update.attached()) == 1
    trainer.fit(Module(), BATCHES[:1])
    assert seen == [1, 1, 2, 2, 1, 2]
    detach(second, trainer.signals, trainer.callbacks)
    assert trainer.signals.after_update.attached() == [] and trainer.callbacks == []


def test_whatever_can_be_called_like_a_listener_will_do() -> None:
    class Counter:
        calls = 0

        def __call__(self, trainer: Trainer, event: Any) -> None:
            self.calls += 1

        def method(self, *args: Any, **kwargs: Any) -> None:
            self.calls += 10

    counter = Counter()
    callback = LambdaCallback(on_after_update=counter, on_train_end=counter.method, on_fit_end=lambda *_, event: None)
    trainer_with(callback).fit(Module(), BATCHES)
    assert counter.calls == 14


def test_it_keeps_no_state() -> None:
    trainer = trainer_with(*[LambdaCallback(on_fit_end=lambda trainer, event: None) for _ in range(2)])
    trainer.fit(Module(), BATCHES)
    assert gather(trainer)["callbacks"] == {}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("on_train_epochend", "Did you mean 'on_train_epoch_end'?"),
        ("train_epoch_end", "Did you mean 'on_train_epoch_end'?"),
        ("on_zzz", "eventtrain.events lists them all."),
    ],
)
def test_a_name_that_is_no_events_is_refused_with_the_nearest(name: str, hint: str) -> None:
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
def test_what_cannot_be_called_like_a_listener_is_refused(handler: Any, message: str) -> None:
    with pytest.raises(MisconfigurationError, match=message):
        LambdaCallback(on_fit_end=handler)


def test_without_a_handler_it_is_refused() -> None:
    with pytest.raises(MisconfigurationError, match="listens to nothing"):
        LambdaCallback()


def test_an_error_says_which_function_it_came_from() -> None:
    def fails(trainer: Trainer, event: Any) -> None:
        raise ValueError("no")

    handlers = {"on_fit_end": lambda trainer, event: 1 / 0}
    line = handlers["on_fit_end"].__code__.co_firstlineno
    with pytest.raises(ZeroDivisionError) as raised:
        trainer_with(LambdaCallback(**handlers)).fit(Module(), BATCHES)
    note = f"raised by LambdaCallback(on_fit_end=<lambda> at {Path(__file__).name}:{line}) at the event 'fit_end'"
    assert raised.value.__notes__[0].startswith(note)

    with pytest.raises(ValueError, match="no") as failed:
        trainer_with(LambdaCallback(on_after_update=fails)).fit(Module(), BATCHES)
    (note,) = failed.value.__notes__
    assert note.startswith("raised by LambdaCallback(on_after_update=") and "fails) at the event 'after_update'" in note


def test_the_function_that_was_given_is_left_as_it_is() -> None:
    def report(trainer: Trainer, event: Any) -> None: ...

    LambdaCallback(on_fit_end=report)
    assert vars(report) == {}
