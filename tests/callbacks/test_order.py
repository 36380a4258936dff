"""The order of attachment does not matter to the checkpoints: the events of the safe point give the order."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eventtrain import Callback, Trainer, events
from eventtrain.callbacks import EarlyStopping, ExponentialMovingAverage, ModelCheckpoint, Preemption, Timer
from tests.kit import Line, new_trainer
from tests.resuming import equal

BATCHES = [torch.full((2, 1), float(x)) for x in (1, 2, 3, 4, 5)]


class Counter(Callback):
    """A user's callback, with state that changes at each safe point."""

    def __init__(self) -> None:
        self.count = 0

    def on_safe_point(self, trainer: Trainer, event: events.SafePoint) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class SendsSignal(Callback):
    """Sends SIGUSR1 in a batch, by its number in the run."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_start(self, trainer: Trainer, event: events.TrainBatchStart) -> None:
        if trainer.total_batch_idx + 1 == self.number:
            signal.raise_signal(signal.SIGUSR1)


class Clock(Callback):
    """A clock that each training batch advances by a second."""

    now = 0.0

    def on_after_forward(self, trainer: Trainer, event: events.AfterForward) -> None:
        self.now += event.stage == "train"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("eventtrain.callbacks.stopping.timer.monotonic", lambda: clock.now)
    return clock


class Written:
    """Counts the checkpoints that are written, by the number of updates."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}

    def on_checkpoint_saved(self, trainer: Trainer, event: events.CheckpointSaved) -> None:
        self.counts[trainer.global_step] = self.counts.get(trainer.global_step, 0) + 1


def trained(folder: Path, *callbacks: Any, ends_by: type[BaseException] | None = None, **options: Any) -> dict[int, int]:
    """Train three epochs of five batches, with a validation; return how many checkpoints were written after each update."""
    torch.manual_seed(0)
    module, written = Line(), Written()
    arguments = {"max_epochs": 3, "seed": 7, "default_root_dir": folder, **options}
    trainer = new_trainer(*callbacks, written, **arguments)
    if ends_by is None:
        trainer.fit(module, BATCHES, BATCHES[:1])
    else:
        with pytest.raises(ends_by):
            trainer.fit(module, BATCHES, BATCHES[:1])
    return written.counts


def files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the content of each file of a run by its path, without the time of writing."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = {str(path.relative_to(folder)): torch.load(path, weights_only=True) for path in paths}
    for content in contents.values():
        del content["written_at"]
    return contents


def assert_same_files(folder: Path, other: Path) -> None:
    """Compare the names and the contents of two folders, tensors bit for bit."""
    contents, others = files(folder), files(other)
    assert contents.keys() == others.keys()
    for name, content in contents.items():
        assert content.keys() == others[name].keys()
        for key in content:
            assert equal(content[key], others[name][key]), f"{name}: {key}"


Runs = list[tuple[Path, dict[int, int]]]


def in_both_orders(tmp_path: Path, make: Callable[[], list[Any]], *first: Any, **arguments: Any) -> Runs:
    """Train with the callbacks of ``make`` in their order and in reverse, after those of ``first``.

    Returns:
        For each run its folder, and how many checkpoints were written after each update.
    """
    runs = []
    for name, step in (("as listed", 1), ("reversed", -1)):
        callbacks = make()[::step]
        runs.append((tmp_path / name, trained(tmp_path / name, *first, *callbacks, **arguments)))
    return runs


def check_one_checkpoint_at_the_end(runs: Runs, *, at: int, names: set[str]) -> None:
    """Check that both orders wrote the same files, exactly one of them at the end of the run."""
    (folder, written), (other, written_by_other) = runs
    assert written == written_by_other
    assert max(written) == at and written[at] == 1
    assert set(files(folder)) == {f"checkpoints/{name}" for name in names}
    assert files(folder)["checkpoints/last.ckpt"]["global_step"] == at
    assert_same_files(folder, other)


# A run that ends within its second epoch, and at the end of that epoch: with a schedule that is due there, and one that is not.
SCHEDULES = [
    (7, {"every_n_steps": 7}, {"epoch=1-step=7.ckpt", "last.ckpt"}),
    (7, {"every_n_steps": 4}, {"epoch=0-step=4.ckpt", "last.ckpt", "previous.ckpt"}),
    (10, {"every_n_steps": 5}, {"epoch=1-step=10.ckpt", "last.ckpt", "previous.ckpt"}),
    (10, {"every_n_steps": 4}, {"epoch=1-step=8.ckpt", "last.ckpt", "previous.ckpt"}),
]


@pytest.mark.parametrize(("at", "schedule", "names"), SCHEDULES)
def test_timer_and_model_checkpoint(tmp_path: Path, clock: Clock, at: int, schedule: Any, names: set[str]) -> None:
    def make() -> list[Any]:
        clock.now = 0.0
        return [Timer(at), ModelCheckpoint(**schedule)]

    runs = in_both_orders(tmp_path, make, clock)
    check_one_checkpoint_at_the_end(runs, at=at, names=names)


@pytest.mark.parametrize(("at", "schedule", "names"), SCHEDULES)
def test_preemption_and_model_checkpoint(tmp_path: Path, at: int, schedule: Any, names: set[str]) -> None:
    def make() -> list[Any]:
        return [Preemption(["SIGUSR1"]), ModelCheckpoint(**schedule)]

    runs = in_both_orders(tmp_path, make, SendsSignal(at), ends_by=SystemExit)
    check_one_checkpoint_at_the_end(runs, at=at, names=names)


@pytest.mark.parametrize(
    ("at", "schedule", "names"),
    [
        (4, {"every_n_steps": 4}, {"epoch=0-step=4.ckpt", "last.ckpt"}),
        (4, {"every_n_steps": 3}, {"epoch=0-step=4.ckpt", "last.ckpt", "previous.ckpt"}),
        (10, {"every_n_steps": 5}, {"epoch=1-step=10.ckpt", "last.ckpt", "previous.ckpt"}),
        (10, {"every_n_steps": 4}, {"epoch=1-step=10.ckpt", "last.ckpt", "previous.ckpt"}),
    ],
)
def test_early_stopping_and_model_checkpoint(tmp_path: Path, at: int, schedule: Any, names: set[str]) -> None:
    """The second look stops the run; a checkpoint is always due at the end of a run that is not interrupted."""

    def make() -> list[Any]:
        return [EarlyStopping("val_loss", patience=1, min_delta=1000.0), ModelCheckpoint(**schedule)]

    runs = in_both_orders(tmp_path, make, val_check_interval=2 if at == 4 else None)
    check_one_checkpoint_at_the_end(runs, at=at, names=names)


@pytest.mark.parametrize("every", [5, 4])
def test_exponential_moving_average_and_model_checkpoint(tmp_path: Path, every: int) -> None:
    def make() -> list[Any]:
        return [ExponentialMovingAverage(0.9), ModelCheckpoint(every_n_steps=every, monitor="val_loss", save_top_k=2)]

    runs = in_both_orders(tmp_path, make)
    names = {"last.ckpt", "previous.ckpt", "epoch=2-step=15.ckpt", *(["epoch=1-step=10.ckpt"] if every == 5 else [])}
    check_one_checkpoint_at_the_end(runs, at=15, names=names)
    content = files(runs[0][0])["checkpoints/last.ckpt"]
    average = content["callbacks"]["ExponentialMovingAverage"]["averages"]["layer.weight"]
    assert not torch.equal(average, content["state_dict"]["layer.weight"])


def test_every_order_of_four_callbacks_writes_the_same_files(tmp_path: Path, clock: Clock) -> None:
    expected: Path | None = None
    for number, order in enumerate(itertools.permutations(range(4))):
        clock.now = 0.0
        callbacks = [Timer(7), ModelCheckpoint(every_n_steps=4), ExponentialMovingAverage(0.9), Counter()]
        folder = tmp_path / str(number)
        written = trained(folder, clock, *(callbacks[index] for index in order))
        assert written == {4: 1, 7: 1}
        if expected is None:
            expected = folder
        assert_same_files(folder, expected)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("ending", ["complete", "timer", "signal"])
def test_a_counter_is_saved_with_its_new_value_at_any_place(tmp_path: Path, clock: Clock, place: int, ending: str) -> None:
    callbacks: list[Any] = [
        Timer(7 if ending == "timer" else 1000),
        ModelCheckpoint(every_n_steps=1, save_top_k=-1),
        ExponentialMovingAverage(0.9),
    ]
    callbacks.insert(place, Counter())
    if ending == "signal":
        callbacks = [Preemption(["SIGUSR1"]), SendsSignal(7), *callbacks]
    trained(tmp_path, clock, *callbacks, ends_by=SystemExit if ending == "signal" else None)
    contents = files(tmp_path)
    assert len(contents) == (15 if ending == "complete" else 7) + 2
    for name, content in contents.items():
        assert content["callbacks"]["Counter"] == {"count": content["global_step"]}, name
