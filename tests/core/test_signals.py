"""Signals: blinker's interface, the order of listeners, idle and weak ones, and observers."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from typing import Any

import blinker
import pytest

from eventtrain import Callback, MisconfigurationError, Trainer
from eventtrain.callbacks import GradientClipping
from eventtrain.core.signals import EventSignal, Observer, Signals
from eventtrain.events import AfterUpdate, TrainStart
from tests.kit import Line, new_trainer, rows

BATCHES = rows(3)


# ------------------------------------------------------------------ blinker's interface


def test_an_unknown_signal_suggests_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"no event 'after_backwards'\. Did you mean 'after_backward'\?"):
        _ = new_trainer().signals.after_backwards


def test_signals_cannot_be_sent_between_trainers() -> None:
    first, second = new_trainer(), new_trainer()
    seen: list[Any] = []
    first.signals.after_update.connect(lambda trainer, event: seen.append(trainer))
    second.fit(Line(), BATCHES)
    assert seen == []
    first.fit(Line(), BATCHES[:1])
    assert seen == [first]


def steps_seen(connect: Callable[[EventSignal, Callable[..., Any]], Any]) -> list[int]:
    """Return the global steps that a listener gets if it is connected by `connect`."""
    trainer = new_trainer()
    seen: list[int] = []

    def listener(sender: Trainer, event: Any) -> None:
        assert sender is trainer
        seen.append(event.global_step)

    connect(trainer.signals.after_update, listener)
    trainer.fit(Line(), BATCHES)
    return seen


def test_signals_are_signals_of_blinker() -> None:
    assert isinstance(new_trainer().signals.after_update, blinker.Signal)


def test_connect_returns_the_listener_so_that_it_decorates() -> None:
    trainer = new_trainer()
    seen: list[int] = []

    @trainer.signals.after_update.connect
    def listener(sender: Trainer, event: Any) -> None:
        seen.append(event.global_step)

    assert callable(listener)
    trainer.fit(Line(), BATCHES)
    assert seen == [1, 2, 3]


def test_connect_via_decorates_for_one_sender() -> None:
    trainer, other = new_trainer(), new_trainer()
    seen: list[str] = []

    @trainer.signals.after_update.connect_via(trainer)
    def mine(sender: Trainer, event: Any) -> None:
        seen.append("mine")

    @trainer.signals.after_update.connect_via(other)
    def others(sender: Trainer, event: Any) -> None:
        seen.append("another's")

    trainer.fit(Line(), BATCHES[:1])
    assert seen == ["mine"]


def test_a_disconnected_listener_is_not_called() -> None:
    def connect(signal: EventSignal, listener: Callable[..., Any]) -> None:
        signal.connect(listener)
        signal.disconnect(listener)
        assert signal.listeners == ()

    assert steps_seen(connect) == []


def test_disconnecting_a_listener_that_is_not_connected_does_nothing() -> None:
    assert steps_seen(lambda signal, listener: signal.disconnect(listener)) == []


def test_connecting_twice_calls_once() -> None:
    def connect(signal: EventSignal, listener: Callable[..., Any]) -> None:
        signal.connect(listener)
        signal.connect(listener)

    assert steps_seen(connect) == [1, 2, 3]


def test_connected_to_connects_for_the_length_of_a_with_block() -> None:
    trainer = new_trainer()
    seen: list[int] = []

    def listener(sender: Trainer, event: Any) -> None:
        seen.append(event.global_step)

    with trainer.signals.after_update.connected_to(listener):
        trainer.fit(Line(), BATCHES[:2])
    trainer.fit(Line(), BATCHES)
    assert seen == [1, 2]


def test_a_muted_signal_is_silent_until_the_with_block_ends() -> None:
    trainer = new_trainer()
    seen: list[int] = []
    trainer.signals.after_update.connect(lambda _, event: seen.append(event.global_step))
    with trainer.signals.after_update.muted():
        trainer.fit(Line(), BATCHES)
    assert seen == []
    trainer.fit(Line(), BATCHES[:1])
    assert seen == [1]


def test_a_listener_connected_to_a_muted_signal_is_called_afterwards() -> None:
    trainer = new_trainer()
    seen: list[int] = []
    with trainer.signals.after_update.muted():
        trainer.signals.after_update.connect(lambda _, event: seen.append(event.global_step))
        trainer.fit(Line(), BATCHES)
    trainer.fit(Line(), BATCHES[:1])
    assert seen == [1]


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def count_up(self, trainer: Any, event: Any) -> None:
        self.count += 1


def test_a_connection_keeps_its_listener_alive() -> None:
    trainer = new_trainer()
    seen: list[int] = []

    class Listener:
        def notice(self, sender: Trainer, event: Any) -> None:
            seen.append(event.global_step)

    trainer.signals.after_update.connect(Listener().notice)
    gc.collect()
    trainer.fit(Line(), BATCHES[:1])
    assert seen == [1]


def test_a_weak_connection_ends_with_its_listener_and_leaves_the_others() -> None:
    trainer = new_trainer()
    weak, strong = Counter(), Counter()
    trainer.signals.after_update.connect(weak.count_up, weak=True)
    trainer.signals.after_update.connect(strong.count_up)
    trainer.fit(Line(), BATCHES)
    assert (weak.count, strong.count) == (3, 3)
    del weak
    gc.collect()
    trainer.fit(Line(), BATCHES)
    assert strong.count == 6
    assert len(trainer.signals.after_update.attached()) == 1


def test_a_connection_is_checked_like_a_callbacks_handler() -> None:
    signal = new_trainer().signals.after_update
    with pytest.raises(MisconfigurationError, match=re.escape("cannot be called as (trainer, event=event)")):
        signal.connect(lambda trainer: None)
    with pytest.raises(MisconfigurationError, match="cannot be called"):
        signal.connect("not a function")  # type: ignore[type-var]
    assert signal.listeners == ()


# ------------------------------------------------------------------ order


def test_listeners_are_called_in_the_order_of_their_connection() -> None:
    trainer = new_trainer()
    order: list[int] = []

    def appending(number: int) -> Callable[..., None]:
        return lambda _, event: order.append(number)

    listeners = [appending(number) for number in range(20)]
    for listener in listeners:
        trainer.signals.after_update.connect(listener)
    trainer.signals.after_update.disconnect(listeners[3])
    trainer.signals.after_update.connect(listeners[3])
    trainer.fit(Line(), BATCHES[:1])
    assert order == [0, 1, 2, *range(4, 20), 3]


def order_of(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return the order in which two listeners are called that are connected with these arguments."""
    trainer = new_trainer()
    order: list[str] = []

    def earlier(_: Any, event: Any) -> None:
        order.append("earlier")

    def later(_: Any, event: Any) -> None:
        order.append("later")

    signal = trainer.signals.after_update
    for listener, kind in ((earlier, first), (later, second)):
        options: dict[str, Any] = {key: trainer if value == "trainer" else value for key, value in kind.items()}
        signal.connect(listener, **options)
    trainer.fit(Line(), BATCHES[:1])
    return order


KINDS: list[dict[str, Any]] = [{}, {"weak": True}, {"sender": "trainer"}]


@pytest.mark.parametrize("second", KINDS, ids=str)
@pytest.mark.parametrize("first", KINDS, ids=str)
def test_the_order_holds_between_connections_of_all_kinds(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert order_of(first, second) == ["earlier", "later"]


def test_a_listener_connected_during_an_event_is_called_from_the_next_one_on() -> None:
    trainer = new_trainer()
    seen: list[int] = []

    def late(_: Any, event: Any) -> None:
        seen.append(event.global_step)

    trainer.signals.after_update.connect(lambda t, event: t.signals.after_update.connect(late))
    trainer.fit(Line(), BATCHES)
    assert seen == [2, 3]


def test_a_listener_disconnected_during_an_event_is_called_in_it_for_the_last_time() -> None:
    trainer = new_trainer()
    seen: list[int] = []

    def early(t: Trainer, event: Any) -> None:
        t.signals.after_update.disconnect(late)

    def late(_: Any, event: Any) -> None:
        seen.append(event.global_step)

    trainer.signals.after_update.connect(early)
    trainer.signals.after_update.connect(late)
    trainer.fit(Line(), BATCHES)
    assert seen == [1]


# ------------------------------------------------------------------ idle listeners


class Log:
    """Listeners that write their names, and the signal `after_update` that calls them.

    Attributes:
        signal: The signal.
        calls: The names of the listeners that were called, since the last look.
    """

    def __init__(self) -> None:
        self.signal = Signals(self).after_update
        self.calls: list[str] = []

    def connect(self, name: str, **options: Any) -> Callable[..., None]:
        """Connect a new listener and return it."""

        def listener(sender: Any, event: AfterUpdate) -> None:
            self.calls.append(name)

        self.signal.connect(listener, **options)
        return listener

    def publish(self) -> list[str]:
        """Publish an event and return the names of the listeners that it reached."""
        self.calls = []
        self.signal.publish(AfterUpdate(1))
        return self.calls


def test_an_idle_listener_stays_connected_and_is_not_called() -> None:
    log = Log()
    listener = log.connect("only")
    log.signal.idle(listener)
    assert log.publish() == []
    assert log.signal.listeners == (), "no event is built for it"
    assert log.signal.attached() == [listener]


def test_a_woken_listener_is_called_in_its_old_place() -> None:
    log = Log()
    log.connect("first")
    second = log.connect("second")
    log.connect("third")
    log.signal.idle(second)
    assert log.publish() == ["first", "third"]
    log.signal.wake(second)
    assert log.publish() == ["first", "second", "third"]


def test_to_idle_or_wake_a_listener_twice_is_the_same_as_once() -> None:
    log = Log()
    listener = log.connect("only")
    log.signal.wake(listener)
    assert log.publish() == ["only"]
    log.signal.idle(listener)
    log.signal.idle(listener)
    log.signal.wake(listener)
    assert log.publish() == ["only"]


def test_a_listener_that_is_woken_during_an_event_is_called_from_the_next_one_on() -> None:
    log = Log()
    listeners: list[Callable[..., None]] = []
    log.signal.connect(lambda sender, event: log.signal.wake(*listeners))
    late = log.connect("late")
    listeners.append(late)
    log.signal.idle(late)
    assert log.publish() == []
    assert log.publish() == ["late"]


def test_a_listener_that_goes_idle_during_an_event_is_called_in_it_for_the_last_time() -> None:
    log = Log()
    listeners: list[Callable[..., None]] = []
    log.signal.connect(lambda sender, event: log.signal.idle(*listeners))
    listeners.append(log.connect("late"))
    assert log.publish() == ["late"]
    assert log.publish() == []


def test_a_listener_that_was_idle_when_it_was_disconnected_is_called_once_it_is_connected_again() -> None:
    log = Log()
    listener = log.connect("only")
    log.signal.idle(listener)
    log.signal.disconnect(listener)
    log.signal.connect(listener)
    assert log.publish() == ["only"]


def test_a_listener_that_is_woken_while_its_signal_is_muted_is_called_afterwards() -> None:
    log = Log()
    listener = log.connect("only")
    log.signal.idle(listener)
    with log.signal.muted():
        log.signal.wake(listener)
        assert log.publish() == []
    assert log.publish() == ["only"]


def test_an_idle_listener_stays_idle_beside_a_weak_one() -> None:
    log = Log()
    idle = log.connect("idle")
    log.signal.idle(idle)
    weak = log.connect("weak", weak=True)
    assert log.publish() == ["weak"]
    log.signal.wake(idle)
    assert log.publish() == ["idle", "weak"]
    del weak
    gc.collect()
    assert log.publish() == ["idle"]


def test_an_idle_listener_is_not_observed() -> None:
    log = Log()
    idle, _ = log.connect("idle"), log.connect("awake")
    log.signal.idle(idle)
    watch = Watch()
    log.signal.observe((watch,))
    assert log.publish() == ["awake"]
    assert [line for line in watch.lines if line.startswith("listener")] == ["listener begins", "listener ends"]


# ------------------------------------------------------------------ errors in listeners


def fail(sender: Any, event: Any) -> None:
    raise KeyError("a listener's")


def test_an_error_keeps_the_event_from_the_later_listeners() -> None:
    log = Log()
    log.connect("before")
    log.signal.connect(fail)
    log.connect("after")
    with pytest.raises(KeyError) as caught:
        log.publish()
    assert log.calls == ["before"]
    assert caught.value.__notes__ == ["raised by fail at the event 'after_update'"]


def test_publish_to_all_reaches_every_listener_and_raises_the_first_error() -> None:
    log = Log()
    log.connect("before")
    log.signal.connect(fail)

    @log.signal.connect
    def fail_too(sender: Any, event: Any) -> None:
        raise ValueError("a later one's")

    log.connect("after")
    with pytest.raises(KeyError, match="a listener's"):
        log.signal.publish_to_all(AfterUpdate(1))
    assert log.calls == ["before", "after"]


# ------------------------------------------------------------------ observers, traces, descriptions


class Watch(Observer):
    """Writes a line for each call."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def event_begins(self, name: str, event: Any) -> None:
        self.lines.append(f"{name} begins")

    def event_ends(self, name: str, event: Any) -> None:
        self.lines.append(f"{name} ends")

    def listener_begins(self, listener: Callable[..., Any]) -> None:
        self.lines.append("listener begins")

    def listener_ends(self, listener: Callable[..., Any]) -> None:
        self.lines.append("listener ends")


def test_an_observer_sees_events_without_listeners_until_it_is_taken_off() -> None:
    signals, watch = Signals(None), Watch()
    signals.observe(watch)
    signals.after_update.publish(AfterUpdate(1))
    assert watch.lines == ["after_update begins", "after_update ends"]
    signals.unobserve(watch)
    assert signals.after_update.listeners == ()
    signals.unobserve(watch)  # once more does nothing


def test_an_observer_sees_events_within_events() -> None:
    signals, watch = Signals(None), Watch()
    signals.after_update.connect(lambda sender, event: signals.train_start.publish(TrainStart()))
    signals.observe(watch)
    signals.after_update.publish(AfterUpdate(1))
    inner = ["train_start begins", "train_start ends"]
    assert watch.lines == ["after_update begins", "listener begins", *inner, "listener ends", "after_update ends"]


def test_an_observer_sees_the_end_of_a_listener_and_an_event_that_fail() -> None:
    signals, watch = Signals(None), Watch()
    signals.after_update.connect(fail)
    signals.observe(watch)
    with pytest.raises(KeyError):
        signals.after_update.publish(AfterUpdate(1))
    assert watch.lines == ["after_update begins", "listener begins", "listener ends", "after_update ends"]


def test_several_observers_see_the_same_calls() -> None:
    signals, first, second = Signals(None), Watch(), Watch()
    signals.after_update.connect(lambda sender, event: None)
    signals.observe(first)
    signals.observe(second)
    signals.after_update.publish(AfterUpdate(1))
    assert first.lines == second.lines and len(first.lines) == 4
    signals.unobserve(first)
    signals.after_update.publish(AfterUpdate(1))
    assert (len(first.lines), len(second.lines)) == (4, 8)


def test_describe_lists_listeners_at_their_event_in_order() -> None:
    class First(Callback):
        def on_after_update(self, trainer: Trainer, event: Any) -> None: ...

    trainer = new_trainer(First(), GradientClipping(1.0))

    @trainer.signals.after_update.connect
    def report(sender: Trainer, event: Any) -> None: ...

    lines = [line.lstrip("│├└─ ") for line in trainer.describe().splitlines()]
    place = next(index for index, line in enumerate(lines) if line.startswith("after_update "))
    assert lines[place + 1] == "-> First.on_after_update"
    assert lines[place + 2].startswith("-> ") and lines[place + 2].endswith("report")
    assert "-> GradientClipping.on_before_gradient_clipping" in lines


def test_a_trace_names_events_and_listeners_and_leaves_nothing_behind() -> None:
    trainer = new_trainer(GradientClipping(1.0))
    before = {signal.name: signal.listeners for signal in trainer.signals}
    with trainer.signals.trace() as trace:
        trainer.fit(Line(), BATCHES[:1])
    asked = next(traced for traced in trace if traced.name == "before_gradient_clipping")
    assert [call.listener for call in asked.calls] == ["GradientClipping.on_before_gradient_clipping"]
    assert {signal.name: signal.listeners for signal in trainer.signals} == before
