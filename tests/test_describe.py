"""The tree that ``trainer.describe()`` prints."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import GradientClipping, LRSchedulerStepping, ProgressBar
from eventtrain.callbacks.lambda_callback import LambdaCallback
from eventtrain.core.signals import Observer
from eventtrain.describe import describe, maps, overview


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def on_train_epoch_end(self) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Ends(Callback):
    def on_train_epoch_end(self, trainer: Trainer, event: Any) -> None: ...


BATCHES = [torch.ones(2, 1)]


def trainer_with(*callbacks: Any, **options: Any) -> Trainer:
    return Trainer(**{"max_epochs": 1, "device": "cpu", "default_callbacks": False, "callbacks": callbacks, **options})


def in_the_run(trainer: Trainer, look: Callable[[], str]) -> str:
    """What one sees while the trainer trains a module."""
    seen: list[str] = []
    trainer.signals.fit_start.connect(lambda trainer, event: seen.append(look()))
    trainer.fit(Module(), BATCHES)
    return seen[0]


def test_without_listeners_it_is_the_loop_map_drawn_as_a_tree() -> None:
    title, *lines = describe(trainer_with().signals).splitlines()
    assert title == "fit"
    # A level takes four characters in both; the tree has a root, which the map has not.
    plain = [re.sub(r"[│├└─]", " ", line)[4:] for line in lines]
    (expected,) = [text for title, text in maps() if title == "fit"]
    assert plain == expected.splitlines()


def test_listeners_stand_below_their_event_in_the_order_in_which_they_are_called() -> None:
    trainer = trainer_with(Ends(), LambdaCallback(on_train_epoch_end=print_nothing))

    @trainer.signals.train_epoch_end.connect
    def report(sender: Trainer, event: Any) -> None: ...

    lines = in_the_run(trainer, lambda: describe(trainer.signals)).splitlines()
    place = lines.index("│       ├── if this was the last batch:")
    assert [line.replace(report.__qualname__, "report") for line in lines[place + 1 : place + 7]] == [
        "│       │   ├── train_epoch_end",
        "│       │   │   ├── -> Ends.on_train_epoch_end",
        "│       │   │   ├── -> LambdaCallback(on_train_epoch_end=print_nothing)",
        "│       │   │   ├── -> report",
        "│       │   │   └── -> Module.on_train_epoch_end",
        '│       │   └── metrics_logged                  scope="epoch"',
    ]


def print_nothing(trainer: Trainer, event: Any) -> None: ...


def test_the_cores_own_work_comes_after_an_events_listeners() -> None:
    lines = [line.strip("│├└─ ") for line in describe(trainer_with(GradientClipping(1.0)).signals).splitlines()]
    place = lines.index("before_gradient_clipping")
    assert lines[place + 1 : place + 3] == [
        "-> GradientClipping.on_before_gradient_clipping",
        "clip_grad_norm_() or clip_grad_value_()",
    ]


def test_only_what_has_a_listener() -> None:
    trainer = trainer_with(Ends(), GradientClipping(1.0))
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
    assert describe(trainer_with().signals, all_events=False) == "fit"


def test_a_stage_is_shown_where_something_listens_to_it() -> None:
    class Tests(Callback):
        def on_test_end(self, trainer: Trainer, event: Any) -> None: ...

        def on_before_forward(self, trainer: Trainer, event: Any) -> None: ...

    whole = describe(trainer_with(Tests()).signals)
    assert [line for line in whole.splitlines() if line in ("fit", "validation", "test", "predict")] == ["fit", "test"]
    assert describe(trainer_with(Tests()).signals, all_events=False).split("\n\n")[1].splitlines() == [
        "test",
        "├── for batch in test_dataloader:",
        "│   └── before_forward",
        "│       └── -> Tests.on_before_forward",
        "└── test_end",
        "    └── -> Tests.on_test_end",
    ]


def test_muted_signals_and_weak_connections_are_marked() -> None:
    trainer = trainer_with(Ends())

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
    trainer, ends = trainer_with(), Ends()
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
def test_the_first_line_says_what_the_trainer_is_set_to_do(options: dict[str, Any], line: str) -> None:
    assert overview(trainer_with(**options)).splitlines() == [line, "callbacks: none"]


def test_callbacks_and_observers_in_order() -> None:
    trainer = trainer_with(GradientClipping(1.0), LRSchedulerStepping(), ProgressBar())
    seen = in_the_run(trainer, lambda: overview(trainer))
    assert seen == "Trainer: max_epochs=1, on cpu, module Module\ncallbacks: GradientClipping, LRSchedulerStepping, ProgressBar"

    class Watch(Observer): ...

    trainer.signals.observe(Watch())
    with trainer.signals.trace():
        assert overview(trainer).splitlines()[2:] == ["observers: Watch, Trace"]


def test_an_observer_is_no_listener() -> None:
    trainer = trainer_with(Ends())
    before = describe(trainer.signals)
    with trainer.signals.trace():
        assert describe(trainer.signals) == before


def test_a_listener_on_demand_is_shown_before_the_run_and_during_it() -> None:
    def listeners() -> list[str]:
        lines = (line.strip("│├└─ ") for line in describe(trainer.signals).splitlines())
        return [line for line in lines if line.startswith("-> ProgressBar.")]

    trainer = trainer_with(ProgressBar(line_interval=1e9))
    assert "-> ProgressBar.on_train_batch_end (on demand)" in listeners()
    before = listeners()
    trainer.signals.after_forward.connect(lambda trainer, event: seen.append(listeners()))
    seen: list[list[str]] = []
    trainer.fit(Module(), BATCHES)
    assert seen == [before]
