"""A run that is sent a signal saves, ends with the signal's status, and goes on as if nothing had happened."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from eventtrain import Callback, MisconfigurationError, Trainer, events
from eventtrain.callbacks import GradientAccumulation, LRSchedulerStepping, ModelCheckpoint
from eventtrain.callbacks.stopping.preemption import ECHO, Preemption
from eventtrain.distributed import SingleProcess
from tests.resuming import Build, Model, assert_same_run, run

ROOT = Path(__file__).resolve().parents[3]
SIGNALS = ["SIGTERM", "SIGINT", "SIGUSR1"]
KEPT = Path("checkpoints") / "interrupted.ckpt"


@pytest.fixture(autouse=True)
def handled() -> Iterator[list[int]]:
    """What the process's own handler of SIGUSR1 got: a signal that nobody takes ends no test. An interrupt is not ignored,
    as it is where a shell starts the tests in the background."""
    got: list[int] = []
    usr1 = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield got
    signal.signal(signal.SIGUSR1, usr1)
    signal.signal(signal.SIGINT, interrupt)


# ------------------------------------------------------------------ a script, in processes of its own

SCRIPT = '''
import signal
import sys
import time

import torch
from torch.utils.data import DataLoader, Dataset

from eventtrain import Trainer, seed_everything
from eventtrain.callbacks import GradientAccumulation, LRSchedulerStepping
from eventtrain.callbacks.stopping.preemption import Preemption
from tests.resuming import Model


class Samples(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.full((3,), float(index)) + torch.randn(3)


class Waits(Model):
    """Waits for a signal in a batch of the second epoch or in its validation, or for several, or not at all."""

    where = ""

    def training_step(self, batch, batch_idx):
        if self.where in ("train", "ever") and self.trainer.current_epoch == 1 and batch_idx == 1:
            self.wait()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if self.where == "validation" and self.trainer.current_epoch == 1:
            self.wait()
        super().validation_step(batch, batch_idx)

    def wait(self):
        print("ready", flush=True)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (self.where == "ever" or self.trainer.callback(Preemption).received is None):
            time.sleep(0.005)


def fit(folder, where="", workers=0, ckpt_path=None):
    torch.set_num_threads(1)
    seed_everything(7)
    module = Waits()
    module.where = where
    options = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    loader = DataLoader(Samples(), batch_size=4, shuffle=True, **options)
    callbacks = [Preemption(), GradientAccumulation(2), LRSchedulerStepping()]
    options = {"default_callbacks": False, "device": "cpu", "default_root_dir": folder}
    trainer = Trainer(max_epochs=3, callbacks=callbacks, **options)
    trainer.fit(module, loader, DataLoader(Samples(), batch_size=10), ckpt_path=ckpt_path)
    return trainer


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start what runs in the background without it
    fit(sys.argv[1], sys.argv[2], int(sys.argv[3]), ckpt_path="last")
'''


@pytest.fixture
def script(tmp_path: Path) -> Any:
    """The script as a module, and in a file beside what it writes."""
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    spec = importlib.util.spec_from_file_location("preempted_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the script, and waits until it is where it wants to be sent a signal."""
    started: list[subprocess.Popen[str]] = []

    def start(where: str, workers: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, str(tmp_path / "train.py"), str(tmp_path), where, str(workers)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """How a process has ended, and what it said."""
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def assert_goes_on(script: Any, folder: Path, workers: int = 0) -> None:
    """Fits again, and compares with a run that never stopped."""
    assert (folder / KEPT).exists()
    resumed = script.fit(folder, workers=workers, ckpt_path="last")
    straight = script.fit(folder / "straight", workers=workers)
    assert len(resumed.module.inputs) < len(straight.module.inputs)
    assert_same_run(resumed, straight, "resumed")


@pytest.mark.parametrize(("name", "where"), [("SIGTERM", "train"), ("SIGINT", "validation"), ("SIGUSR1", "validation")])
def test_a_process_saves_and_ends_with_the_signals_status(
    script: Any, start: Callable[..., subprocess.Popen[str]], tmp_path: Path, name: str, where: str
) -> None:
    number = getattr(signal, name)
    process = start(where)
    process.send_signal(number)
    status, said = ended(process)
    # Of an interrupt that nobody catches Python dies by the signal itself.
    assert status == (-number if name == "SIGINT" else 128 + number), said
    assert f"{name}: the run saves at the next safe point and ends; a second one ends it at once" in said
    assert f"kept in {tmp_path / KEPT}" in said
    assert_goes_on(script, tmp_path)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("name", SIGNALS)
def test_workers_that_get_the_signal_too_do_not_fail_the_run(
    script: Any, start: Callable[..., subprocess.Popen[str]], tmp_path: Path, name: str
) -> None:
    number = getattr(signal, name)
    process = start("train", workers=2)
    os.killpg(process.pid, number)  # as a terminal does, and many a launcher
    status, said = ended(process)
    assert status == (-number if name == "SIGINT" else 128 + number), said
    assert "RuntimeError" not in said and said.count("the run saves") == 1
    assert_goes_on(script, tmp_path, workers=2)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("follows", [True, False], ids=["the trainer next", "they alone"])
def test_a_signal_may_reach_workers_first(
    script: Any, start: Callable[..., subprocess.Popen[str]], tmp_path: Path, follows: bool
) -> None:
    process = start("train", workers=2)
    for worker in psutil.Process(process.pid).children():
        worker.terminate()
    if follows:
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
    status, said = ended(process)
    if follows:
        assert status == 128 + signal.SIGTERM, said
        assert_goes_on(script, tmp_path, workers=2)
    else:
        assert status == 1
        assert "is killed by signal: Terminated" in said


def test_a_second_signal_ends_a_process_at_once(
    script: Any, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start("ever")
    process.send_signal(signal.SIGUSR1)
    assert process.stderr is not None
    while "SIGUSR1" not in process.stderr.readline():
        pass
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == -signal.SIGTERM
    assert not (tmp_path / KEPT).exists()


# ------------------------------------------------------------------ a signal at each moment


class Sends(Callback):
    """Sends a signal when an event comes for the n-th time, and counts how often it came."""

    def __init__(self, event: str, nth: int = 1, number: int = signal.SIGUSR1) -> None:
        self.nth, self.number = nth, number
        self.count = 0
        setattr(self, f"on_{event}", self.send)

    def send(self, trainer: Trainer, event: Any) -> None:
        self.count += 1
        if self.count == self.nth:
            signal.raise_signal(self.number)


def build(folder: Path, *callbacks: Any, **options: Any) -> Build:
    """Three epochs of five batches, in windows of two, with a validation of two batches after the third of each."""

    def build() -> Any:
        values = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
        loader: Any = DataLoader(values, batch_size=4, shuffle=True)  # type: ignore[arg-type]
        given = {"max_epochs": 3, "val_check_interval": 3, "default_root_dir": folder, **options}
        return Model(), loader, [values[:4], values[4:8]], [GradientAccumulation(2), LRSchedulerStepping(), *callbacks], given

    return build


def preempted(folder: Path, *callbacks: Any, **options: Any) -> BaseException:
    """How a run ends."""
    with pytest.raises(BaseException) as raised:
        run(build(folder, *callbacks, **options))
    return raised.value


MOMENTS = [
    ("train_epoch_start", 2),
    ("before_batch_fetch", 9),
    ("train_batch_start", 8),
    ("before_backward", 8),
    ("after_update", 1),
    ("train_batch_end", 5),
    ("validation_start", 3),
    ("validation_batch_end", 4),
    ("validation_batch_end", 5),
    ("validation_end", 3),
    ("train_epoch_end", 1),
    ("safe_point", 4),
    ("safe_point", 5),
    ("train_end", 1),
    ("fit_end", 1),
]


@pytest.mark.parametrize("first", [False, True], ids=["sent after", "sent before"])
@pytest.mark.parametrize(("event", "nth"), MOMENTS)
def test_whenever_a_signal_comes_the_run_goes_on_exactly(tmp_path: Path, event: str, nth: int, first: bool) -> None:
    sends, preemption = Sends(event, nth), Preemption()
    error = preempted(tmp_path, *((sends, preemption) if first else (preemption, sends)))
    if (event, first) != ("fit_end", False):
        resumed = run(build(tmp_path, Preemption()), ckpt_path="last")
        assert_same_run(resumed, run(build(tmp_path)), event)
    assert isinstance(error, SystemExit) and error.code == 128 + signal.SIGUSR1
    assert preemption.received == signal.SIGUSR1


@pytest.mark.parametrize(("event", "nth"), [("fit_start", 1), ("validation_batch_end", 1), ("train_start", 1)])
def test_before_training_there_is_nothing_to_save(tmp_path: Path, event: str, nth: int) -> None:
    begun = Sends("train_batch_start", 99)
    module_first = Sends(event, nth)
    error = preempted(
        tmp_path, *((module_first, Preemption()) if event == "train_start" else (Preemption(), module_first)), begun
    )
    assert isinstance(error, SystemExit) and begun.count == 0
    assert not (tmp_path / KEPT).exists()


@pytest.mark.parametrize("event", ["fit_end", "teardown"])
def test_a_signal_after_the_last_look_is_not_lost(tmp_path: Path, event: str) -> None:
    first = event == "teardown"
    sends, preemption = Sends(event, 1), Preemption()
    error = preempted(tmp_path, *((sends, preemption) if first else (preemption, sends)))
    assert isinstance(error, SystemExit) and error.code == 128 + signal.SIGUSR1


def test_a_validation_that_was_left_runs_again(tmp_path: Path) -> None:
    batches = Sends("validation_batch_end", 4)  # one in the sanity check, two in the first validation
    preempted(tmp_path, Preemption(), batches)
    assert batches.count == 4
    again, validations, epochs = Sends("validation_batch_end", 99), Sends("validation_end", 99), Sends("train_epoch_start", 99)
    resumed = run(build(tmp_path, again, validations, epochs), ckpt_path="last")
    # In each of three epochs there is one, of which one had been completed.
    assert (again.count, validations.count, epochs.count) == (4, 2, 2)
    assert resumed.progress.validations == 3


def test_the_first_job_of_a_run_begins_it(tmp_path: Path) -> None:
    assert run(build(tmp_path, Preemption()), ckpt_path="last").current_epoch == 3
    with pytest.raises(MisconfigurationError, match="nothing attached keeps checkpoints"):
        run(build(tmp_path, Preemption()), ckpt_path="best")


class CountsSafePoints(Callback):
    count = 0

    def on_safe_point(self, trainer: Trainer, event: events.SafePoint) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("first", [False, True])
def test_the_checkpoint_has_what_others_do_at_the_safe_point(tmp_path: Path, first: bool) -> None:
    counts, preemption = CountsSafePoints(), Preemption()
    preempted(tmp_path, *((preemption, counts) if first else (counts, preemption)), Sends("train_batch_start", 7))
    assert torch.load(tmp_path / KEPT, weights_only=True)["callbacks"]["CountsSafePoints"] == {"count": 7}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("nth", [2, 7, 10])
def test_a_callback_that_keeps_checkpoints_keeps_this_one(tmp_path: Path, nth: int, first: bool) -> None:
    (tmp_path / KEPT).parent.mkdir()
    (tmp_path / KEPT).write_text("older, and of another run")

    def both() -> list[Any]:
        checkpoints = ModelCheckpoint("models", save_top_k=2)
        return [Preemption(), checkpoints] if first else [checkpoints, Preemption()]

    preempted(tmp_path, *both(), Sends("train_batch_start", nth))
    assert (tmp_path / "models" / "last.ckpt").exists() and (tmp_path / KEPT).read_text().startswith("older")
    resumed = run(build(tmp_path, *both()), ckpt_path="last")
    straight = run(build(tmp_path / "straight", *both()))
    assert_same_run(resumed, straight, "resumed")


def test_an_interrupt_is_one(tmp_path: Path) -> None:
    assert isinstance(preempted(tmp_path, Preemption(), Sends("train_batch_start", 7, signal.SIGINT)), KeyboardInterrupt)
    assert (tmp_path / KEPT).exists()


def test_no_minimum_holds_it_off(tmp_path: Path) -> None:
    sends = Sends("train_batch_start", 2)
    preempted(tmp_path, Preemption(), sends, min_epochs=3)
    assert sends.count == 2


def test_an_end_of_ones_own_is_one_method(tmp_path: Path) -> None:
    class Returns(Preemption):
        def end_run(self, trainer: Trainer, signum: int) -> None:
            assert signum == signal.SIGUSR1

    sends = Sends("train_batch_start", 2)
    trainer = run(build(tmp_path, Returns(), sends))
    assert trainer.stop_request.reason == "Preemption: SIGUSR1" and sends.count == 2 and (tmp_path / KEPT).exists()


def test_a_fast_dev_run_keeps_nothing(tmp_path: Path) -> None:
    assert isinstance(preempted(tmp_path, Preemption(), Sends("train_batch_start"), fast_dev_run=2), SystemExit)
    assert not (tmp_path / KEPT).exists()


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    assert isinstance(preempted(tmp_path, Preemption(), Sends("train_batch_start")), FileExistsError)


def test_it_says_what_happens_past_the_buffers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    preempted(tmp_path, Preemption(), Sends("train_batch_start", 7))
    assert capfd.readouterr().err.split("\n\n") == [
        "\nSIGUSR1: the run saves at the next safe point and ends; a second one ends it at once",
        f"Preemption: SIGUSR1: the run is kept in {tmp_path / KEPT}\n",
    ]


# ------------------------------------------------------------------ the second signal


class SendsTwice(Sends):
    """Sends one signal and then another in the same batch."""

    second: int = signal.SIGUSR1

    def send(self, trainer: Trainer, event: Any) -> None:
        super().send(trainer, event)
        if self.count == self.nth:
            signal.raise_signal(self.second)


class Interrupts(SendsTwice):
    second = signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_second_signal_ends_it_in_the_batch(tmp_path: Path, number: int) -> None:
    ends = Sends("train_batch_end", 99)
    error = preempted(tmp_path, Preemption(), ends, Interrupts("train_batch_start", 7, number))
    assert isinstance(error, KeyboardInterrupt) and ends.count == 6
    assert not any("afterwards" in note for note in error.__notes__), "it has ended by the second, not by both"
    assert not (tmp_path / KEPT).exists()


def test_a_second_signal_finds_the_earlier_handlers(
    tmp_path: Path, handled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventtrain.callbacks.stopping.preemption.ECHO", -1.0)
    sends = SendsTwice("train_batch_start", 7)
    run(build(tmp_path, Preemption(), sends))
    assert handled == [signal.SIGUSR1] and sends.count == 15, "the handler lets the run go on, and so it does"


def test_an_echo_is_not_a_second_signal(tmp_path: Path, handled: list[int]) -> None:
    assert ECHO > 0
    error = preempted(tmp_path, Preemption(), SendsTwice("train_batch_start", 7))
    assert isinstance(error, SystemExit) and handled == [] and (tmp_path / KEPT).exists()


# ------------------------------------------------------------------ handlers come and go


def handlers() -> list[Any]:
    return [signal.getsignal(getattr(signal, name)) for name in (*SIGNALS, "SIGCHLD")]


class Fails:
    def on_after_update(self, trainer: Trainer, event: events.AfterUpdate) -> None:
        raise RuntimeError("at the worst moment")


@pytest.mark.parametrize("ends", ["well", "by an error", "by a signal", "by an error after a signal"])
def test_earlier_handlers_are_given_back(tmp_path: Path, handled: list[int], ends: str) -> None:
    before, during = handlers(), []
    preemption = Preemption()

    class Looks:
        def on_train_start(self, trainer: Trainer, event: events.TrainStart) -> None:
            during.extend(handlers())

    more: list[Any] = [Looks()]
    if "signal" in ends:
        more.append(Sends("train_batch_start", 2))
    if "error" in ends:
        more.append(Fails())
    if ends == "well":
        assert run(build(tmp_path, preemption, *more)).signals.safe_point.attached() == []
    else:
        error = preempted(tmp_path, preemption, *more)
        assert isinstance(error, RuntimeError if "error" in ends else SystemExit)
        assert any("afterwards: SystemExit" in note for note in error.__notes__) == (ends == "by an error after a signal")
    assert len(set(during[:3])) == 1 and during[0] not in before
    assert handlers() == before
    signal.raise_signal(signal.SIGUSR1)
    assert handled == [signal.SIGUSR1]


def test_a_handler_that_somebody_installs_during_the_run_stays(tmp_path: Path, handled: list[int]) -> None:
    def other(number: int, frame: Any) -> None: ...

    class Installs:
        def on_train_start(self, trainer: Trainer, event: events.TrainStart) -> None:
            signal.signal(signal.SIGUSR1, other)

    run(build(tmp_path, Preemption(), Installs()))
    assert signal.getsignal(signal.SIGUSR1) is other


def test_what_the_process_ignores_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run(build(tmp_path, Preemption(), Sends("train_batch_start", 1, signal.SIGINT)))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_evaluations_by_themselves_are_ended_as_ever(tmp_path: Path, handled: list[int]) -> None:
    trainer = run(build(tmp_path, Preemption()))
    sends = Sends("validation_batch_start", 1)
    trainer.signals.validation_batch_start.connect(sends.send)
    trainer.validate(dataloaders=[torch.ones(4, 3)] * 2)
    assert handled == [signal.SIGUSR1] and sends.count == 2


def test_only_those_that_were_asked_for(tmp_path: Path, handled: list[int]) -> None:
    preemption = Preemption(["SIGUSR2", signal.SIGTERM])
    assert preemption.signals == (signal.SIGUSR2, signal.SIGTERM)
    run(build(tmp_path, preemption, Sends("train_batch_start")))
    assert handled == [signal.SIGUSR1]


def test_a_second_fit_begins_without_the_first_ones_signal(tmp_path: Path) -> None:
    preemption, sends = Preemption(), Sends("train_batch_start", 7)
    module, loader, _, callbacks, options = build(tmp_path, preemption, sends)()
    del options["val_check_interval"]
    trainer = Trainer(callbacks=callbacks, default_callbacks=False, device="cpu", **options)
    with pytest.raises(SystemExit):
        trainer.fit(module, loader)
    trainer.fit(module, loader, ckpt_path="last")
    assert trainer.current_epoch == 3 and preemption.received is None


def test_another_thread_is_told_that_it_gets_none(tmp_path: Path, handled: list[int]) -> None:
    before = handlers()
    trainers: list[Trainer] = []

    def fit() -> None:
        trainers.append(run(build(tmp_path, Preemption())))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=fit)
        thread.start()
        thread.join()
    assert [str(each.message) for each in caught if "Preemption" in str(each.message)] == [
        "Preemption: signals can't be handled in a thread other than the main one, so that they end this run without a "
        "checkpoint. Call fit in the main thread."
    ]
    assert trainers[0].current_epoch == 3 and handlers() == before


# ------------------------------------------------------------------ several processes


class Ranks(Callback, SingleProcess):
    """One of two processes, of which the other has got a signal at the safe point of a batch. Notes what it was asked, and
    whether there was a checkpoint by then."""

    world_size = 2

    def __init__(self, folder: Path, signalled_at: int | None = None) -> None:
        self.kept, self.signalled_at = folder / KEPT, signalled_at
        self.asked: list[tuple[bool, bool]] = []
        self.signalled = False

    def on_safe_point(self, trainer: Trainer, event: events.SafePoint) -> None:
        self.signalled = trainer.total_batch_idx == self.signalled_at

    def any(self, flag: bool) -> bool:
        self.asked.append((flag, self.kept.exists()))
        return flag or self.signalled


def train_as(ranks: Ranks, folder: Path, *callbacks: Any) -> None:
    module, loader, _, given, options = build(folder, ranks, *callbacks)()
    del options["val_check_interval"]
    trainer = Trainer(callbacks=given, default_callbacks=False, device="cpu", **options)
    trainer.processes = ranks
    trainer.fit(module, loader)


def test_processes_ask_each_other_at_each_safe_point(tmp_path: Path) -> None:
    ranks, without = Ranks(tmp_path), Ranks(tmp_path)
    train_as(without, tmp_path)
    train_as(ranks, tmp_path, Preemption())
    assert len(ranks.asked) - len(without.asked) == 17, "before training, at each batch, and after training"


@pytest.mark.parametrize("own", [False, True], ids=["another's", "its own"])
def test_processes_end_together_once_the_checkpoint_is_there(tmp_path: Path, own: bool) -> None:
    ranks = Ranks(tmp_path, signalled_at=None if own else 6)
    with pytest.raises(SystemExit) as ended:
        train_as(ranks, tmp_path, Preemption(), *([Sends("train_batch_start", 7)] if own else []))
    assert ended.value.code == 128 + (signal.SIGUSR1 if own else signal.SIGTERM)
    assert ranks.asked[-2:] == [(own, False), (False, True)], "the last question comes after the file"


def test_the_others_are_not_left_waiting_where_the_checkpoint_fails(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(FileExistsError):
        train_as(ranks, tmp_path, Preemption(), Sends("train_batch_start", 7))
    assert [flag for flag, _ in ranks.asked[-2:]] == [True, False]


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize("signals", [[], ["SIGKILL"], ["SIGCHLD"], ["SIGTREM"], [0], "SIGUSR3"])
def test_what_cannot_be_right_is_refused(signals: Any) -> None:
    with pytest.raises(MisconfigurationError, match=r"Preemption\(signals="):
        Preemption(signals)


def test_a_misspelt_name_is_set_right() -> None:
    with pytest.raises(MisconfigurationError, match=r"'SIGTREM'\. Did you mean 'SIGTERM'"):
        Preemption(["SIGTREM"])
