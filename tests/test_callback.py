"""What is refused when something is attached, what errors say, and what they leave behind."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from typing import Any

import blinker
import pytest
import torch
from torch import Tensor

from eventtrain import Callback, LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import GradientClipping, MixedPrecision
from eventtrain.core.signals import EventSignal

BATCHES = [torch.full((2, 1), float(x)) for x in (1, 2, 3)]


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_with(*callbacks: Any, **options: Any) -> Trainer:
    return Trainer(callbacks=callbacks, default_callbacks=False, device="cpu", **{"max_epochs": 1, **options})


def connections(trainer: Trainer) -> dict[str, list[Any]]:
    return {signal.name: signal.attached() for signal in trainer.signals if signal.attached()}


def refused(*callbacks: Any) -> str:
    """The message with which a trainer refuses its callbacks."""
    with pytest.raises(MisconfigurationError) as caught:
        trainer_with(*callbacks)
    return str(caught.value)


# ------------------------------------------------------------------ callbacks that are refused


def test_a_misspelt_event_suggests_the_nearest() -> None:
    class Typo:
        def on_train_batch_ended(self, trainer: Any, event: Any) -> None: ...

    message = refused(Typo())
    assert "Typo.on_train_batch_ended names no event" in message
    assert "Did you mean 'on_train_batch_end'?" in message
    assert "Rename the method" in message


def test_a_handler_without_the_event_is_told_the_form() -> None:
    class NoEvent:
        def on_train_start(self, trainer: Any) -> None: ...

    message = refused(NoEvent())
    assert "NoEvent.on_train_start" in message
    assert "cannot be called as (trainer, event=event)" in message
    assert "Write 'def on_train_start(self, trainer, event): ...'" in message


def test_a_handler_written_for_lightning_is_told_where_the_module_is() -> None:
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


def test_callbacks_of_one_class_with_keys_of_their_own_are_welcome() -> None:
    class Named(Counting):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        @property
        def state_key(self) -> str:
            return self.name

    callbacks = [Named("first"), Named("second")]
    trainer_with(*callbacks).fit(Module(), BATCHES)
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

    class BringsIt(Module):
        def configure_callbacks(self) -> Any:
            return [HalfRight()]

    trainer = trainer_with()
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
    trainer_with(callback).fit(Module(), BATCHES)
    assert callback.seen == 3


# ------------------------------------------------------------------ module hooks that are refused


def refused_module(hooks: dict[str, Callable[..., Any]]) -> str:
    """The message with which fit refuses a module with these hooks; no connection is left."""
    module = type("Hooked", (Module,), hooks)()
    trainer = trainer_with()
    with pytest.raises(MisconfigurationError) as caught:
        trainer.fit(module, BATCHES)
    assert connections(trainer) == {}
    return str(caught.value)


def test_a_nearly_right_module_hook_suggests_the_right_one() -> None:
    message = refused_module({"on_train_epoch_ends": lambda self: None})
    assert "Hooked.on_train_epoch_ends is no hook" in message
    assert "Did you mean 'on_train_epoch_end'?" in message


def test_a_nearly_right_hook_in_a_base_class_is_found_as_well() -> None:
    class Base(Module):
        def on_train_epoch_ends(self) -> None: ...

    class Derived(Base): ...

    with pytest.raises(MisconfigurationError, match="Did you mean 'on_train_epoch_end'"):
        trainer_with().fit(Derived(), BATCHES)


def test_other_methods_of_the_module_may_begin_with_on() -> None:
    class Own(Module):
        called = False

        def on_something_of_my_own(self) -> None:
            self.called = True

    module = Own()
    trainer_with().fit(module, BATCHES)
    assert not module.called


def test_a_module_hook_with_other_arguments_is_told_its_signature() -> None:
    message = refused_module({"on_before_optimizer_step": lambda self, optimizer, optimizer_idx: None})
    assert "Hooked.on_before_optimizer_step" in message
    assert "Write `def on_before_optimizer_step(self, optimizer):`" in message


def test_a_module_hook_without_a_counterpart_in_lightning_is_given_the_event() -> None:
    message = refused_module({"on_after_update": lambda self: None})
    assert "Write `def on_after_update(self, event):`" in message


def test_module_hooks_come_after_callbacks_and_leave_with_the_run() -> None:
    order: list[str] = []

    class Hooked(Module):
        def on_train_start(self) -> None:
            order.append("module")

    class Attached:
        def on_train_start(self, trainer: Any, event: Any) -> None:
            order.append("callback")

    class Brought:
        def on_train_start(self, trainer: Any, event: Any) -> None:
            order.append("brought by the module")

    Hooked.configure_callbacks = lambda self: [Brought()]
    trainer = trainer_with(Attached())
    attached = connections(trainer)
    module = Hooked()
    trainer.fit(module, BATCHES)
    trainer.fit(module, BATCHES)
    assert order == ["callback", "brought by the module", "module"] * 2
    assert connections(trainer) == attached
    assert len(trainer.callbacks) == 1


# ------------------------------------------------------------------ errors in callbacks


class Failing(Callback):
    """Raises once, in the given batch of the given epoch."""

    def __init__(self, epoch: int = 1, batch_idx: int = 2) -> None:
        self.at: tuple[int, int] | None = (epoch, batch_idx)

    def on_before_backward(self, trainer: Trainer, event: Any) -> None:
        if (trainer.current_epoch, trainer.batch_idx) == self.at:
            self.at = None
            raise KeyError("the callback's own")


def test_an_error_keeps_its_type_and_says_where_it_came_from() -> None:
    with pytest.raises(KeyError, match="the callback's own") as caught:
        trainer_with(Failing(), max_epochs=3).fit(Module(), BATCHES)
    (note,) = caught.value.__notes__
    assert "Failing.on_before_backward" in note
    assert "'before_backward'" in note
    assert "epoch 1" in note
    assert "batch 2" in note


def test_the_note_names_the_callback_while_a_trace_records() -> None:
    trainer = trainer_with(Failing(0, 0))
    with trainer.signals.trace(), pytest.raises(KeyError) as caught:
        trainer.fit(Module(), BATCHES)
    (note,) = caught.value.__notes__
    assert "Failing.on_before_backward" in note


def test_an_error_in_a_module_hook_names_the_module() -> None:
    class Hooked(Module):
        def on_train_start(self) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        trainer_with().fit(Hooked(), BATCHES)
    assert "Hooked.on_train_start" in caught.value.__notes__[0]


def test_an_error_reaches_the_user_though_teardown_raises_too_and_everyone_is_torn_down() -> None:
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
        trainer_with(Good("first"), Bad(), Failing(0, 0), Good("last")).fit(Module(), BATCHES)
    assert torn_down == ["first", "last"]
    assert any("OSError: disk full" in note for note in caught.value.__notes__)


def test_an_error_in_teardown_alone_is_raised_once_everyone_is_torn_down() -> None:
    torn_down: list[str] = []

    class Bad:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def on_teardown(self, trainer: Any, event: Any) -> None:
            torn_down.append(type(self.error).__name__)
            raise self.error

    with pytest.raises(OSError, match="first"):
        trainer_with(Bad(OSError("first")), Bad(ValueError("second"))).fit(Module(), BATCHES)
    assert torn_down == ["OSError", "ValueError"]


class FailsInForward(Module):
    """Raises in its second batch, inside of every phase that a batch has."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 1:
            assert torch.is_autocast_enabled("cpu")
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None: ...


def test_an_error_leaves_no_connection_no_autocast_and_no_torch_hook_behind() -> None:
    trainer = trainer_with(MixedPrecision("bf16"))
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
    expected = Module()
    trainer_with(MixedPrecision("bf16")).fit(expected, BATCHES)

    trainer = trainer_with(MixedPrecision("bf16"))
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(FailsInForward(), BATCHES)
    torch.manual_seed(0)
    module = Module()
    trainer.fit(module, BATCHES)
    assert torch.equal(module.layer.weight, expected.layer.weight)
    assert trainer.global_step == 3
    assert trainer.current_epoch == 1


def test_a_fit_inside_of_a_fit_is_refused_and_the_outer_one_goes_on() -> None:
    class Inner(Callback):
        def on_train_start(self, trainer: Trainer, event: Any) -> None:
            with pytest.raises(MisconfigurationError, match="The trainer is running fit"):
                trainer.validate(Module(), BATCHES)

    trainer = trainer_with(Inner())
    trainer.fit(Module(), BATCHES)
    assert trainer.global_step == 3


# ------------------------------------------------------------------ signals


def test_an_unknown_signal_suggests_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"no event 'after_backwards'\. Did you mean 'after_backward'\?"):
        _ = trainer_with().signals.after_backwards


def test_signals_cannot_be_sent_between_trainers() -> None:
    first, second = trainer_with(), trainer_with()
    seen: list[Any] = []
    first.signals.after_update.connect(lambda trainer, event: seen.append(trainer))
    second.fit(Module(), BATCHES)
    assert seen == []
    first.fit(Module(), BATCHES[:1])
    assert seen == [first]


def steps_seen(connect: Callable[[EventSignal, Callable[..., Any]], Any]) -> list[int]:
    """The global steps that a listener gets when it is connected in some way."""
    trainer = trainer_with()
    seen: list[int] = []

    def listener(sender: Trainer, event: Any) -> None:
        assert sender is trainer
        seen.append(event.global_step)

    connect(trainer.signals.after_update, listener)
    trainer.fit(Module(), BATCHES)
    return seen


def test_signals_are_blinkers_own() -> None:
    assert isinstance(trainer_with().signals.after_update, blinker.Signal)


def test_connect_returns_the_listener_so_that_it_decorates() -> None:
    trainer = trainer_with()
    seen: list[int] = []

    @trainer.signals.after_update.connect
    def listener(sender: Trainer, event: Any) -> None:
        seen.append(event.global_step)

    assert callable(listener)
    trainer.fit(Module(), BATCHES)
    assert seen == [1, 2, 3]


def test_connect_via_decorates_for_one_sender() -> None:
    trainer, other = trainer_with(), trainer_with()
    seen: list[str] = []

    @trainer.signals.after_update.connect_via(trainer)
    def own(sender: Trainer, event: Any) -> None:
        seen.append("own")

    @trainer.signals.after_update.connect_via(other)
    def others(sender: Trainer, event: Any) -> None:
        seen.append("another's")

    trainer.fit(Module(), BATCHES[:1])
    assert seen == ["own"]


def test_a_disconnected_listener_is_not_called() -> None:
    def connect(signal: EventSignal, listener: Callable[..., Any]) -> None:
        signal.connect(listener)
        signal.disconnect(listener)
        assert signal.listeners == ()

    assert steps_seen(connect) == []


def test_disconnecting_what_is_not_connected_does_nothing() -> None:
    assert steps_seen(lambda signal, listener: signal.disconnect(listener)) == []


def test_connecting_twice_calls_once() -> None:
    def connect(signal: EventSignal, listener: Callable[..., Any]) -> None:
        signal.connect(listener)
        signal.connect(listener)

    assert steps_seen(connect) == [1, 2, 3]


def test_connected_to_connects_for_the_length_of_a_with_block() -> None:
    trainer = trainer_with()
    seen: list[int] = []

    def listener(sender: Trainer, event: Any) -> None:
        seen.append(event.global_step)

    with trainer.signals.after_update.connected_to(listener):
        trainer.fit(Module(), BATCHES[:2])
    trainer.fit(Module(), BATCHES)
    assert seen == [1, 2]


def test_a_muted_signal_reaches_nobody_until_the_with_block_ends() -> None:
    trainer = trainer_with()
    seen: list[int] = []
    trainer.signals.after_update.connect(lambda _, event: seen.append(event.global_step))
    with trainer.signals.after_update.muted():
        trainer.fit(Module(), BATCHES)
    assert seen == []
    trainer.fit(Module(), BATCHES[:1])
    assert seen == [1]


def test_what_is_connected_while_muted_is_heard_afterwards() -> None:
    trainer = trainer_with()
    seen: list[int] = []
    with trainer.signals.after_update.muted():
        trainer.signals.after_update.connect(lambda _, event: seen.append(event.global_step))
        trainer.fit(Module(), BATCHES)
    trainer.fit(Module(), BATCHES[:1])
    assert seen == [1]


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def count_up(self, trainer: Any, event: Any) -> None:
        self.count += 1


def test_a_connection_keeps_its_listener_alive() -> None:
    trainer = trainer_with()
    seen: list[int] = []

    class Listener:
        def notice(self, sender: Trainer, event: Any) -> None:
            seen.append(event.global_step)

    trainer.signals.after_update.connect(Listener().notice)
    gc.collect()
    trainer.fit(Module(), BATCHES[:1])
    assert seen == [1]


def test_a_weak_connection_ends_with_its_listener_and_leaves_the_others() -> None:
    trainer = trainer_with()
    weak, strong = Counter(), Counter()
    trainer.signals.after_update.connect(weak.count_up, weak=True)
    trainer.signals.after_update.connect(strong.count_up)
    trainer.fit(Module(), BATCHES)
    assert (weak.count, strong.count) == (3, 3)
    del weak
    gc.collect()
    trainer.fit(Module(), BATCHES)
    assert strong.count == 6
    assert len(trainer.signals.after_update.attached()) == 1


def test_a_connection_is_checked_like_a_callbacks_handler() -> None:
    signal = trainer_with().signals.after_update
    with pytest.raises(MisconfigurationError, match=re.escape("cannot be called as (trainer, event=event)")):
        signal.connect(lambda trainer: None)
    with pytest.raises(MisconfigurationError, match="cannot be called"):
        signal.connect("not a function")
    assert signal.listeners == ()


# ------------------------------------------------------------------ order


def test_listeners_are_called_in_the_order_of_their_connection() -> None:
    trainer = trainer_with()
    order: list[int] = []
    listeners = [lambda _, event, number=number: order.append(number) for number in range(20)]
    for listener in listeners:
        trainer.signals.after_update.connect(listener)
    trainer.signals.after_update.disconnect(listeners[3])
    trainer.signals.after_update.connect(listeners[3])
    trainer.fit(Module(), BATCHES[:1])
    assert order == [0, 1, 2, *range(4, 20), 3]


def order_of(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """In which order two listeners are called, connected with these arguments."""
    trainer = trainer_with()
    order: list[str] = []

    def earlier(_: Any, event: Any) -> None:
        order.append("earlier")

    def later(_: Any, event: Any) -> None:
        order.append("later")

    signal = trainer.signals.after_update
    signal.connect(earlier, **{key: trainer if value == "trainer" else value for key, value in first.items()})
    signal.connect(later, **{key: trainer if value == "trainer" else value for key, value in second.items()})
    trainer.fit(Module(), BATCHES[:1])
    return order


KINDS: list[dict[str, Any]] = [{}, {"weak": True}, {"sender": "trainer"}]


@pytest.mark.parametrize("second", KINDS, ids=str)
@pytest.mark.parametrize("first", KINDS, ids=str)
def test_the_order_holds_between_connections_of_all_kinds(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert order_of(first, second) == ["earlier", "later"]


def test_who_connects_during_an_event_is_called_from_the_next_one_on() -> None:
    trainer = trainer_with()
    seen: list[int] = []

    def late(_: Any, event: Any) -> None:
        seen.append(event.global_step)

    trainer.signals.after_update.connect(lambda t, event: t.signals.after_update.connect(late))
    trainer.fit(Module(), BATCHES)
    assert seen == [2, 3]


def test_who_is_disconnected_during_an_event_is_called_in_it_for_the_last_time() -> None:
    trainer = trainer_with()
    seen: list[int] = []

    def early(t: Trainer, event: Any) -> None:
        t.signals.after_update.disconnect(late)

    def late(_: Any, event: Any) -> None:
        seen.append(event.global_step)

    trainer.signals.after_update.connect(early)
    trainer.signals.after_update.connect(late)
    trainer.fit(Module(), BATCHES)
    assert seen == [1]


# ------------------------------------------------------------------ what can be seen


def test_describe_lists_listeners_at_their_event_in_order() -> None:
    class First(Callback):
        def on_after_update(self, trainer: Trainer, event: Any) -> None: ...

    trainer = trainer_with(First(), GradientClipping(1.0))

    @trainer.signals.after_update.connect
    def report(sender: Trainer, event: Any) -> None: ...

    lines = [line.lstrip("│├└─ ") for line in trainer.describe().splitlines()]
    place = next(index for index, line in enumerate(lines) if line.startswith("after_update "))
    assert lines[place + 1] == "-> First.on_after_update"
    assert lines[place + 2].startswith("-> ") and lines[place + 2].endswith("report")
    assert "-> GradientClipping.on_before_gradient_clipping" in lines


def test_a_trace_names_events_and_listeners_and_leaves_nothing_behind() -> None:
    trainer = trainer_with(GradientClipping(1.0))
    before = {signal.name: signal.listeners for signal in trainer.signals}
    with trainer.signals.trace() as trace:
        trainer.fit(Module(), BATCHES[:1])
    asked = next(traced for traced in trace if traced.name == "before_gradient_clipping")
    assert [call.listener for call in asked.calls] == ["GradientClipping.on_before_gradient_clipping"]
    assert {signal.name: signal.listeners for signal in trainer.signals} == before
