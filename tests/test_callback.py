"""Callbacks: refused ones, listeners on demand, and the errors that callbacks raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eventtrain import Callback, MisconfigurationError, Trainer
from eventtrain.callback import on_demand
from eventtrain.callbacks import GradientClipping, MixedPrecision
from eventtrain.events import FitStart, TrainBatchEnd, TrainBatchStart
from tests.kit import Line, On, connections, new_trainer, rows

BATCHES = rows(3)


def refused(*callbacks: Any) -> str:
    """Return the message with which a trainer refuses these callbacks."""
    with pytest.raises(MisconfigurationError) as caught:
        new_trainer(*callbacks)
    return str(caught.value)


# ------------------------------------------------------------------ callbacks that are refused


def test_a_misspelt_event_suggests_the_nearest() -> None:
    class Typo:
        def on_train_batch_ended(self, trainer: Any, event: Any) -> None: ...

    message = refused(Typo())
    assert "Typo.on_train_batch_ended names no event" in message
    assert "Did you mean 'on_train_batch_end'?" in message
    assert "Rename the method" in message


def test_the_refusal_of_a_handler_without_the_event_shows_the_right_form() -> None:
    class NoEvent:
        def on_train_start(self, trainer: Any) -> None: ...

    message = refused(NoEvent())
    assert "NoEvent.on_train_start" in message
    assert "cannot be called as (trainer, event=event)" in message
    assert "Write 'def on_train_start(self, trainer, event): ...'" in message


def test_the_refusal_of_a_handler_for_lightning_says_how_to_get_the_module() -> None:
    class ForLightning:
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None: ...

    message = refused(ForLightning())
    assert "written for Lightning" in message
    assert "trainer.module" in message
    assert "def on_train_batch_end(self, trainer, event): ..." in message


def test_lightnings_two_argument_signature_is_refused_too() -> None:
    class ForLightning:
        def on_train_start(self, trainer: Any, pl_module: Any) -> None: ...

    message = refused(ForLightning())
    assert "written for Lightning" in message
    assert "def on_train_start(self, trainer, event): ..." in message


def test_a_coroutine_is_refused() -> None:
    class Coroutine:
        async def on_train_start(self, trainer: Any, event: Any) -> None: ...

    assert "Coroutine.on_train_start is a coroutine function" in refused(Coroutine())


def test_two_callbacks_of_one_role_are_refused() -> None:
    message = refused(MixedPrecision("bf16"), MixedPrecision("fp16"))
    assert "MixedPrecision and MixedPrecision both have the role 'precision'" in message
    assert "Keep one of them" in message


class Counting(Callback):
    def __init__(self) -> None:
        self.count = 0

    def on_after_update(self, trainer: Trainer, event: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}


def test_one_state_key_twice_is_refused() -> None:
    message = refused(Counting(), Counting())
    assert "both keep state under the key 'Counting'" in message
    assert "Override `state_key`" in message


def test_callbacks_of_one_class_with_different_keys_may_be_attached() -> None:
    class Named(Counting):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        @property
        def state_key(self) -> str:
            return self.name

    callbacks = [Named("first"), Named("second")]
    new_trainer(*callbacks).fit(Line(), BATCHES)
    assert [callback.count for callback in callbacks] == [3, 3]


def test_the_same_object_twice_is_refused() -> None:
    callback = GradientClipping(1.0)
    assert "This GradientClipping is attached twice" in refused(callback, callback)


def test_a_class_in_place_of_an_object_is_refused() -> None:
    message = refused(MixedPrecision)
    assert "MixedPrecision is a class" in message
    assert "MixedPrecision(...)" in message


def test_a_callback_that_is_refused_is_not_half_attached() -> None:
    class HalfRight:
        def on_after_update(self, trainer: Any, event: Any) -> None: ...

        def on_train_start(self, trainer: Any) -> None: ...

    class BringsIt(Line):
        def configure_callbacks(self) -> Any:
            return [HalfRight()]

    trainer = new_trainer()
    with pytest.raises(MisconfigurationError, match="HalfRight"):
        trainer.fit(BringsIt(), BATCHES)
    assert connections(trainer) == {}
    assert trainer.callbacks == []


def test_any_object_with_handlers_is_a_callback() -> None:
    class PlainObject:
        seen = 0

        def on_after_update(self, trainer: Any, event: Any) -> None:
            self.seen += 1

    callback = PlainObject()
    new_trainer(callback).fit(Line(), BATCHES)
    assert callback.seen == 3


# ------------------------------------------------------------------ module hooks that are refused


def refused_module(hooks: dict[str, Callable[..., Any]]) -> str:
    """Return the message with which fit refuses a module with these hooks, and check that no connection is left."""
    module = type("Hooked", (Line,), hooks)()
    trainer = new_trainer()
    with pytest.raises(MisconfigurationError) as caught:
        trainer.fit(module, BATCHES)
    assert connections(trainer) == {}
    return str(caught.value)


def test_a_nearly_right_module_hook_suggests_the_right_one() -> None:
    message = refused_module({"on_train_epoch_ends": lambda self: None})
    assert "Hooked.on_train_epoch_ends is no hook" in message
    assert "Did you mean 'on_train_epoch_end'?" in message


def test_a_nearly_right_hook_in_a_base_class_is_found_as_well() -> None:
    class Base(Line):
        def on_train_epoch_ends(self) -> None: ...

    class Derived(Base): ...

    with pytest.raises(MisconfigurationError, match="Did you mean 'on_train_epoch_end'"):
        new_trainer().fit(Derived(), BATCHES)


def test_other_methods_of_the_module_may_begin_with_on() -> None:
    class Own(Line):
        called = False

        def on_something_of_my_own(self) -> None:
            self.called = True

    module = Own()
    new_trainer().fit(module, BATCHES)
    assert not module.called


def test_the_refusal_of_a_module_hook_with_other_arguments_shows_its_signature() -> None:
    message = refused_module({"on_before_optimizer_step": lambda self, optimizer, optimizer_idx: None})
    assert "Hooked.on_before_optimizer_step" in message
    assert "Write `def on_before_optimizer_step(self, optimizer):`" in message


def test_a_module_hook_without_a_counterpart_in_lightning_gets_the_event() -> None:
    message = refused_module({"on_after_update": lambda self: None})
    assert "Write `def on_after_update(self, event):`" in message


def test_module_hooks_come_after_callbacks_and_leave_with_the_run() -> None:
    order: list[str] = []

    class Attached:
        def on_train_start(self, trainer: Any, event: Any) -> None:
            order.append("callback")

    class Brought:
        def on_train_start(self, trainer: Any, event: Any) -> None:
            order.append("brought by the module")

    class Hooked(Line):
        def on_train_start(self) -> None:
            order.append("module")

        def configure_callbacks(self) -> list[Any]:
            return [Brought()]

    trainer = new_trainer(Attached())
    attached = connections(trainer)
    module = Hooked()
    trainer.fit(module, BATCHES)
    trainer.fit(module, BATCHES)
    assert order == ["callback", "brought by the module", "module"] * 2
    assert connections(trainer) == attached
    assert len(trainer.callbacks) == 1


# ------------------------------------------------------------------ listeners on demand


class Counts(Callback):
    """Counts batches in the runs that its function says, from the first batch or a later one.

    Args:
        asks: Takes the trainer, at each batch's start, and returns whether to listen.
    """

    def __init__(self, asks: Callable[[Trainer], bool]) -> None:
        self.asks = asks
        self.batches: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: Trainer, event: TrainBatchStart) -> None:
        if self.asks(trainer):
            trainer.listen(self.on_train_batch_end)
        else:
            trainer.stop_listening(self.on_train_batch_end)

    @on_demand
    def on_train_batch_end(self, trainer: Trainer, event: TrainBatchEnd) -> None:
        self.batches.append((trainer.current_epoch, event.batch_idx))

    def not_a_listener(self) -> None: ...


def test_a_listener_on_demand_is_called_while_it_is_asked_for() -> None:
    counts = Counts(lambda trainer: trainer.batch_idx == 1)
    new_trainer(counts, max_epochs=2).fit(Line(), BATCHES)
    assert counts.batches == [(0, 1), (1, 1)]


def test_a_listener_on_demand_costs_no_event_until_it_is_asked_for() -> None:
    trainer = new_trainer(Counts(lambda trainer: False))
    assert [listener.__name__ for listener in trainer.signals.train_batch_end.attached()] == ["on_train_batch_end"]
    assert trainer.signals.train_batch_end.listeners == ()
    trainer.fit(Line(), BATCHES)
    assert trainer.signals.train_batch_end.listeners == ()


def test_a_listener_on_demand_is_called_in_the_order_of_attachment() -> None:
    order: list[str] = []
    counts = Counts(lambda trainer: True)
    trainer = new_trainer(
        On(train_batch_end=lambda trainer, event: order.append(f"before: {len(counts.batches)}")),
        counts,
        On(train_batch_end=lambda trainer, event: order.append(f"after: {len(counts.batches)}")),
    )
    trainer.fit(Line(), BATCHES[:2])
    assert order == ["before: 0", "after: 1", "before: 1", "after: 2"]


def test_every_run_begins_with_all_listeners_on_demand_idle() -> None:
    class Once(Callback):
        """Asks at the start of its first run."""

        runs = 0
        batches = 0

        def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
            self.runs += 1
            if self.runs == 1:
                trainer.listen(self.on_train_batch_end)

        @on_demand
        def on_train_batch_end(self, trainer: Trainer, event: TrainBatchEnd) -> None:
            self.batches += 1

    once = Once()
    trainer = new_trainer(once)
    trainer.fit(Line(), BATCHES)
    assert trainer.signals.train_batch_end.listeners == ()
    trainer.fit(Line(), BATCHES)
    assert (once.runs, once.batches) == (2, 3)


def test_a_run_that_fails_leaves_listeners_on_demand_idle() -> None:
    counts = Counts(lambda trainer: True)
    trainer = new_trainer(counts, Failing(0, 1))
    with pytest.raises(KeyError):
        trainer.fit(Line(), BATCHES)
    assert counts.batches == [(0, 0)]
    assert trainer.signals.train_batch_end.listeners == ()


def test_a_listener_on_demand_may_be_asked_for_twice() -> None:
    counts = Counts(lambda trainer: True)
    new_trainer(counts).fit(Line(), BATCHES)
    assert counts.batches == [(0, 0), (0, 1), (0, 2)]


def test_an_override_inherits_the_mark() -> None:
    class Overrides(Counts):
        def on_train_batch_end(self, trainer: Trainer, event: TrainBatchEnd) -> None:
            super().on_train_batch_end(trainer, event)

    counts = Overrides(lambda trainer: trainer.batch_idx == 1)
    trainer = new_trainer(counts)
    assert trainer.signals.train_batch_end.listeners == ()
    trainer.fit(Line(), BATCHES)
    assert counts.batches == [(0, 1)]


LISTEN = r"give a method on_<event> of an attached callback that is marked with @on_demand"


@pytest.mark.parametrize("verb", ["listen", "stop_listening"])
@pytest.mark.parametrize(
    ("handler", "name"),
    [
        (lambda counts: counts.on_train_batch_start, "on_train_batch_start"),  # is not marked
        (lambda counts: counts.not_a_listener, "not_a_listener"),
        (lambda counts: Counts(lambda trainer: True).on_train_batch_end, "on_train_batch_end"),  # of another object
        (lambda counts: 5, "5"),
    ],
)
def test_to_ask_for_anything_else_is_an_error(verb: str, handler: Callable[[Counts], Any], name: str) -> None:
    counts = Counts(lambda trainer: True)
    trainer = new_trainer(counts)
    with pytest.raises(MisconfigurationError, match=rf"trainer.listen\({name}\): {LISTEN}"):
        getattr(trainer, verb)(handler(counts))
    assert trainer.signals.train_batch_end.listeners == ()


# ------------------------------------------------------------------ errors in callbacks


class Failing(Callback):
    """Raises once, in one batch of one epoch."""

    def __init__(self, epoch: int = 1, batch_idx: int = 2) -> None:
        self.at: tuple[int, int] | None = (epoch, batch_idx)

    def on_before_backward(self, trainer: Trainer, event: Any) -> None:
        if (trainer.current_epoch, trainer.batch_idx) == self.at:
            self.at = None
            raise KeyError("the callback's own")


def test_an_error_keeps_its_type_and_names_its_callback_and_batch() -> None:
    with pytest.raises(KeyError, match="the callback's own") as caught:
        new_trainer(Failing(), max_epochs=3).fit(Line(), BATCHES)
    (note,) = caught.value.__notes__
    assert "Failing.on_before_backward" in note
    assert "'before_backward'" in note
    assert "epoch 1" in note
    assert "batch 2" in note


def test_the_note_names_the_callback_while_a_trace_records() -> None:
    trainer = new_trainer(Failing(0, 0))
    with trainer.signals.trace(), pytest.raises(KeyError) as caught:
        trainer.fit(Line(), BATCHES)
    (note,) = caught.value.__notes__
    assert "Failing.on_before_backward" in note


def test_an_error_in_a_module_hook_names_the_module() -> None:
    class Hooked(Line):
        def on_train_start(self) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        new_trainer().fit(Hooked(), BATCHES)
    assert "Hooked.on_train_start" in caught.value.__notes__[0]


def test_the_first_error_is_raised_although_teardown_raises_too_and_every_callback_is_torn_down() -> None:
    torn_down: list[str] = []

    class Good:
        def __init__(self, name: str) -> None:
            self.name = name

        def on_teardown(self, trainer: Any, event: Any) -> None:
            torn_down.append(self.name)

    class Bad:
        def on_teardown(self, trainer: Any, event: Any) -> None:
            raise OSError("disk full")

    with pytest.raises(KeyError, match="the callback's own") as caught:
        new_trainer(Good("first"), Bad(), Failing(0, 0), Good("last")).fit(Line(), BATCHES)
    assert torn_down == ["first", "last"]
    assert any("OSError: disk full" in note for note in caught.value.__notes__)


def test_an_error_in_teardown_is_raised_once_every_callback_is_torn_down() -> None:
    torn_down: list[str] = []

    class Bad:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def on_teardown(self, trainer: Any, event: Any) -> None:
            torn_down.append(type(self.error).__name__)
            raise self.error

    with pytest.raises(OSError, match="first"):
        new_trainer(Bad(OSError("first")), Bad(ValueError("second"))).fit(Line(), BATCHES)
    assert torn_down == ["OSError", "ValueError"]


class FailsInForward(Line):
    """Raises in its second batch, in the innermost phase of the forward."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if batch_idx == 1:
            assert torch.is_autocast_enabled("cpu")
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None: ...


def test_an_error_leaves_no_connection_no_autocast_and_no_torch_hook_behind() -> None:
    trainer = new_trainer(MixedPrecision("bf16"))
    before = connections(trainer)
    module = FailsInForward()
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(module, BATCHES)
    assert connections(trainer) == before
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_trainer_can_be_used_again_after_an_error() -> None:
    torch.manual_seed(0)
    expected = Line()
    new_trainer(MixedPrecision("bf16")).fit(expected, BATCHES)

    trainer = new_trainer(MixedPrecision("bf16"))
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(FailsInForward(), BATCHES)
    torch.manual_seed(0)
    module = Line()
    trainer.fit(module, BATCHES)
    assert torch.equal(module.layer.weight, expected.layer.weight)
    assert trainer.global_step == 3
    assert trainer.current_epoch == 1


def test_a_run_within_a_fit_is_refused_and_the_fit_continues() -> None:
    class Inner(Callback):
        def on_train_start(self, trainer: Trainer, event: Any) -> None:
            with pytest.raises(MisconfigurationError, match="The trainer is running fit"):
                trainer.validate(Line(), BATCHES)

    trainer = new_trainer(Inner())
    trainer.fit(Line(), BATCHES)
    assert trainer.global_step == 3
