"""The tree that ``trainer.describe()`` prints."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from eventtrain import Callback, Trainer
from eventtrain.callback import on_demand
from eventtrain.callbacks import GradientClipping, LRSchedulerStepping, ProgressBar
from eventtrain.callbacks.lambda_callback import LambdaCallback
from eventtrain.core.signals import Observer
from eventtrain.describe import describe, maps, overview
from eventtrain.events import AfterForward, ClippingDecided
from tests.kit import Line, new_trainer, rows


class Hooked(Line):
    def on_train_epoch_end(self) -> None: ...


class Ends(Callback):
    def on_train_epoch_end(self, trainer: Trainer, event: Any) -> None: ...


BATCHES = rows([1])


def in_the_run(trainer: Trainer, look: Callable[[], str]) -> str:
    """Return the text that `look` sees at the start of a fit."""
    seen: list[str] = []
    trainer.signals.fit_start.connect(lambda trainer, event: seen.append(look()))
    trainer.fit(Hooked(), BATCHES)
    return seen[0]


def test_without_listeners_it_is_the_loop_map_drawn_as_a_tree() -> None:
    title, *lines = describe(new_trainer().signals).splitlines()
    assert title == "fit"
    # A level takes four characters in both; the tree has a root, which the map has not.
    plain = [re.sub(r"[│├└─]", " ", line)[4:] for line in lines]
    (expected,) = [text for title, text in maps() if title == "fit"]
    assert plain == expected.splitlines()


def test_listeners_stand_below_their_event_in_the_order_in_which_they_are_called() -> None:
    trainer = new_trainer(Ends(), LambdaCallback(on_train_epoch_end=print_nothing))

    @trainer.signals.train_epoch_end.connect
    def report(sender: Trainer, event: Any) -> None: ...

    lines = in_the_run(trainer, lambda: describe(trainer.signals)).splitlines()
    place = lines.index("│       ├── if this was the last batch:")
    assert [line.replace(report.__qualname__, "report") for line in lines[place + 1 : place + 7]] == [
        "│       │   ├── train_epoch_end",
        "│       │   │   ├── -> Ends.on_train_epoch_end",
        "│       │   │   ├── -> LambdaCallback(on_train_epoch_end=print_nothing)",
        "│       │   │   ├── -> report",
        "│       │   │   └── -> Hooked.on_train_epoch_end",
        '│       │   └── metrics_logged                  scope="epoch"',
    ]


def print_nothing(trainer: Trainer, event: Any) -> None: ...


def test_the_work_of_the_core_comes_after_an_events_listeners() -> None:
    class Reads(Callback):
        def on_clipping_decided(self, trainer: Trainer, event: ClippingDecided) -> None: ...

    lines = [line.strip("│├└─ ") for line in describe(new_trainer(GradientClipping(1.0), Reads()).signals).splitlines()]
    place = lines.index("before_gradient_clipping")
    assert lines[place + 1 : place + 5] == [
        "-> GradientClipping.on_before_gradient_clipping",
        "clipping_decided",
        "-> Reads.on_clipping_decided",
        "clip_grad_norm_() or clip_grad_value_()",
    ]


def test_events_without_listeners_may_be_left_out() -> None:
    trainer = new_trainer(Ends(), GradientClipping(1.0))
    assert describe(trainer.signals, all_events=False).splitlines() == [
        "fit",
        "└── for epoch in epochs:",
        "    └── for batch in train_dataloader:",
        "        ├── optimizer_step                      optimizer.step(closure); a batch that only accumulates: closure()",
        "        │   └── before_gradient_clipping",
        "        │       └── -> GradientClipping.on_before_gradient_clipping",
        "        └── if this was the last batch:",
        "            └── train_epoch_end",
        "                └── -> Ends.on_train_epoch_end",
    ]
    assert describe(new_trainer().signals, all_events=False) == "fit"


def test_a_stage_is_shown_if_something_listens_to_it() -> None:
    class Tests(Callback):
        def on_test_end(self, trainer: Trainer, event: Any) -> None: ...

        def on_before_forward(self, trainer: Trainer, event: Any) -> None: ...

    whole = describe(new_trainer(Tests()).signals)
    assert [line for line in whole.splitlines() if line in ("fit", "validation", "test", "predict")] == ["fit", "test"]
    assert describe(new_trainer(Tests()).signals, all_events=False).split("\n\n")[1].splitlines() == [
        "test",
        "├── for batch in test_dataloader:",
        "│   └── before_forward",
        "│       └── -> Tests.on_before_forward",
        "└── test_end",
        "    └── -> Tests.on_test_end",
    ]


def test_muted_signals_and_weak_connections_are_marked() -> None:
    trainer = new_trainer(Ends())

    def weakly(sender: Trainer, event: Any) -> None: ...

    weakly.__qualname__ = "weakly"
    trainer.signals.train_epoch_end.connect(weakly, weak=True)
    assert "-> Ends.on_train_epoch_end\n" in describe(trainer.signals)
    assert "-> weakly (weak)\n" in describe(trainer.signals)
    with trainer.signals.train_epoch_end.muted():
        assert "-> Ends.on_train_epoch_end (muted)\n" in describe(trainer.signals)
        assert "-> weakly (weak) (muted)\n" in describe(trainer.signals)
    del weakly
    assert "weakly" not in describe(trainer.signals)


def test_a_weakly_held_method_is_marked() -> None:
    trainer, ends = new_trainer(), Ends()
    trainer.signals.train_end.connect(ends.on_train_epoch_end, weak=True)
    assert "-> Ends.on_train_epoch_end (weak)\n" in describe(trainer.signals)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"max_epochs": 3}, "Trainer: max_epochs=3, on cpu, no module yet"),
        ({"max_epochs": 3, "max_steps": 10}, "Trainer: max_epochs=3, max_steps=10, on cpu, no module yet"),
        ({"max_epochs": -1}, "Trainer: no limit, on cpu, no module yet"),
    ],
)
def test_the_first_line_shows_the_trainers_settings(options: dict[str, Any], line: str) -> None:
    assert overview(new_trainer(**options)).splitlines() == [line, "callbacks: none"]


def test_callbacks_and_observers_in_order() -> None:
    trainer = new_trainer(GradientClipping(1.0), LRSchedulerStepping(), ProgressBar())
    seen = in_the_run(trainer, lambda: overview(trainer))
    assert seen == "Trainer: max_epochs=1, on cpu, module Hooked\ncallbacks: GradientClipping, LRSchedulerStepping, ProgressBar"

    class Watch(Observer): ...

    trainer.signals.observe(Watch())
    with trainer.signals.trace():
        assert overview(trainer).splitlines()[2:] == ["observers: Watch, Trace"]


def test_an_observer_is_no_listener() -> None:
    trainer = new_trainer(Ends())
    before = describe(trainer.signals)
    with trainer.signals.trace():
        assert describe(trainer.signals) == before


def test_a_listener_on_demand_is_shown_and_marked_before_the_run_and_during_it() -> None:
    class Waits(Callback):
        def on_train_start(self, trainer: Trainer, event: Any) -> None:
            trainer.listen(self.on_after_forward)

        @on_demand
        def on_after_forward(self, trainer: Trainer, event: AfterForward) -> None:
            seen.append(describe(trainer.signals))

    seen: list[str] = []
    trainer = new_trainer(Waits())
    before = describe(trainer.signals)
    assert "-> Waits.on_after_forward (on demand)\n" in before
    trainer.fit(Line(), BATCHES)
    assert seen == [before]
