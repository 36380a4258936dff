"""Preemption: a signal ends a run with a checkpoint and the signal's status, and the resumed run gives the same bits."""

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

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from eventtrain import Callback, MisconfigurationError, Trainer, events
from eventtrain.callbacks import ModelCheckpoint
from eventtrain.callbacks.distributed.data_parallel import DataParallel
from eventtrain.callbacks.stopping.preemption import ECHO, Preemption
from tests.callbacks.stopping.common import INTERRUPTED, CountsSafePoints, TwoProcesses, build, train_as
from tests.resuming import assert_same_run, run

ROOT = Path(__file__).resolve().parents[3]
SIGNALS = ["SIGTERM", "SIGINT", "SIGUSR1"]


@pytest.fixture(autouse=True)
def handled() -> Iterator[list[int]]:
    """The signals that the process's own handler of SIGUSR1 gets, so that none ends the tests. SIGINT raises
    KeyboardInterrupt, also if a shell has started the tests in the background, where it is ignored."""
    got: list[int] = []
    usr1 = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield got
    signal.signal(signal.SIGUSR1, usr1)
    signal.signal(signal.SIGINT, interrupt)


# ------------------------------------------------------------------ a script in separate processes

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
    """Waits for a signal in a batch of the second epoch or in its validation, or for several signals, or not at all."""

    waits_in = ""

    def training_step(self, batch, batch_idx):
        if self.waits_in in ("train", "always") and self.trainer.current_epoch == 1 and batch_idx == 1:
            self.wait()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if self.waits_in == "validation" and self.trainer.current_epoch == 1:
            self.wait()
        super().validation_step(batch, batch_idx)

    def wait(self):
        print("ready", flush=True)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (self.waits_in == "always" or self.trainer.callback(Preemption).received is None):
            time.sleep(0.005)


def fit(folder, waits_in="", workers=0, ckpt_path=None):
    torch.set_num_threads(1)
    seed_everything(7)
    module = Waits()
    module.waits_in = waits_in
    options = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    loader = DataLoader(Samples(), batch_size=4, shuffle=True, **options)
    callbacks = [Preemption(), GradientAccumulation(2), LRSchedulerStepping()]
    options = {"default_callbacks": False, "device": "cpu", "default_root_dir": folder}
    trainer = Trainer(max_epochs=3, callbacks=callbacks, **options)
    trainer.fit(module, loader, DataLoader(Samples(), batch_size=10), ckpt_path=ckpt_path)
    return trainer


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored in the background
    fit(sys.argv[1], sys.argv[2], int(sys.argv[3]), ckpt_path="last")
'''


@pytest.fixture
def script(tmp_path: Path) -> Any:
    """The script as a module; its file lies in the folder of the run."""
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    spec = importlib.util.spec_from_file_location("preempted_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the script, and waits until it waits for a signal."""
    started: list[subprocess.Popen[str]] = []

    def start(waits_in: str, workers: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, str(tmp_path / "train.py"), str(tmp_path), waits_in, str(workers)]
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
    """Wait for the end of a process; return its status and its standard error."""
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def assert_resumes(script: Any, folder: Path, workers: int = 0) -> None:
    """Resume the run, and compare it with a run that never stopped."""
    assert (folder / INTERRUPTED).exists()
    resumed = script.fit(folder, workers=workers, ckpt_path="last")
    straight = script.fit(folder / "straight", workers=workers)
    assert len(resumed.module.inputs) < len(straight.module.inputs)
    assert_same_run(resumed, straight, "resumed")


@pytest.mark.parametrize(("name", "waits_in"), [("SIGTERM", "train"), ("SIGINT", "validation"), ("SIGUSR1", "validation")])
def test_a_process_ends_with_a_checkpoint_and_the_signals_status(
    script: Any, start: Callable[..., subprocess.Popen[str]], tmp_path: Path, name: str, waits_in: str
) -> None:
    number = getattr(signal, name)
    process = start(waits_in)
    process.send_signal(number)
    status, said = ended(process)
    # Python ends by the signal itself if no code catches KeyboardInterrupt.
    assert status == (-number if name == "SIGINT" else 128 + number), said
    assert f"{name}: the run ends with a checkpoint at the next safe point; a second signal ends it at once" in said
    assert f"Preemption: {name}: the checkpoint is {tmp_path / INTERRUPTED}" in said
    assert_resumes(script, tmp_path)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("name", SIGNALS)
def test_workers_that_get_the_signal_too_do_not_make_the_run_fail(
    script: Any, start: Callable[..., subprocess.Popen[str]], tmp_path: Path, name: str
) -> None:
    number = getattr(signal, name)
    process = start("train", workers=2)
    os.killpg(process.pid, number)  # like a terminal and some launchers
    status, said = ended(process)
    assert status == (-number if name == "SIGINT" else 128 + number), said
    assert "RuntimeError" not in said and said.count("the run ends with a checkpoint") == 1
    assert_resumes(script, tmp_path, workers=2)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("follows", [True, False], ids=["then the trainer", "only workers"])
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
        assert_resumes(script, tmp_path, workers=2)
    else:
        assert status == 1
        assert "is killed by signal: Terminated" in said


def test_a_second_signal_ends_a_process_at_once(
    script: Any, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start("always")
    process.send_signal(signal.SIGUSR1)
    assert process.stderr is not None
    while "SIGUSR1" not in process.stderr.readline():
        pass
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == -signal.SIGTERM
    assert not (tmp_path / INTERRUPTED).exists()


# ------------------------------------------------------------------ a signal at each moment


class Sends(Callback):
    """Sends a signal when an event comes for the n-th time, and counts the events."""

    def __init__(self, event: str, nth: int = 1, number: int = signal.SIGUSR1) -> None:
        self.nth, self.number = nth, number
        self.count = 0
        setattr(self, f"on_{event}", self.send)

    def send(self, trainer: Trainer, event: Any) -> None:
        self.count += 1
        if self.count == self.nth:
            signal.raise_signal(self.number)


def preempted(folder: Path, *callbacks: Any, **options: Any) -> BaseException:
    """Train, and return the exception that ends the run."""
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
def test_a_run_resumes_exactly_after_a_signal_at_any_moment(tmp_path: Path, event: str, nth: int, first: bool) -> None:
    sends, preemption = Sends(event, nth), Preemption()
    error = preempted(tmp_path, *((sends, preemption) if first else (preemption, sends)))
    if (event, first) != ("fit_end", False):
        resumed = run(build(tmp_path, Preemption()), ckpt_path="last")
        assert_same_run(resumed, run(build(tmp_path)), event)
    assert isinstance(error, SystemExit) and error.code == 128 + signal.SIGUSR1
    assert preemption.received == signal.SIGUSR1


@pytest.mark.parametrize(("event", "nth"), [("fit_start", 1), ("validation_batch_end", 1), ("train_start", 1)])
def test_a_signal_before_training_leaves_no_checkpoint(tmp_path: Path, event: str, nth: int) -> None:
    begun = Sends("train_batch_start", 99)
    sends, preemption = Sends(event, nth), Preemption()
    error = preempted(tmp_path, *((sends, preemption) if event == "train_start" else (preemption, sends)), begun)
    assert isinstance(error, SystemExit) and begun.count == 0
    assert not (tmp_path / INTERRUPTED).exists()


@pytest.mark.parametrize("event", ["fit_end", "teardown"])
def test_a_signal_at_the_end_of_a_fit_is_not_lost(tmp_path: Path, event: str) -> None:
    first = event == "teardown"
    sends, preemption = Sends(event, 1), Preemption()
    error = preempted(tmp_path, *((sends, preemption) if first else (preemption, sends)))
    assert isinstance(error, SystemExit) and error.code == 128 + signal.SIGUSR1


def test_a_validation_that_was_left_is_repeated(tmp_path: Path) -> None:
    batches = Sends("validation_batch_end", 4)  # one in the sanity check, two in the first validation
    preempted(tmp_path, Preemption(), batches)
    assert batches.count == 4
    again, validations, epochs = Sends("validation_batch_end", 99), Sends("validation_end", 99), Sends("train_epoch_start", 99)
    resumed = run(build(tmp_path, again, validations, epochs), ckpt_path="last")
    # Each of the three epochs has one validation, and one of them was complete.
    assert (again.count, validations.count, epochs.count) == (4, 2, 2)
    assert resumed.progress.validations == 3


def test_the_first_job_of_a_run_starts_without_a_checkpoint(tmp_path: Path) -> None:
    assert run(build(tmp_path, Preemption()), ckpt_path="last").current_epoch == 3
    with pytest.raises(MisconfigurationError, match="nothing attached keeps checkpoints"):
        run(build(tmp_path, Preemption()), ckpt_path="best")


@pytest.mark.parametrize("first", [False, True])
def test_the_checkpoint_holds_what_other_callbacks_change_at_the_safe_point(tmp_path: Path, first: bool) -> None:
    counts, preemption = CountsSafePoints(), Preemption()
    preempted(tmp_path, *((preemption, counts) if first else (counts, preemption)), Sends("train_batch_start", 7))
    assert torch.load(tmp_path / INTERRUPTED, weights_only=True)["callbacks"]["CountsSafePoints"] == {"count": 7}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("nth", [2, 7, 10])
def test_a_callback_that_keeps_checkpoints_writes_this_one(tmp_path: Path, nth: int, first: bool) -> None:
    (tmp_path / INTERRUPTED).parent.mkdir()
    (tmp_path / INTERRUPTED).write_text("older, from another run")

    def both() -> list[Any]:
        checkpoints = ModelCheckpoint("models", save_top_k=2)
        return [Preemption(), checkpoints] if first else [checkpoints, Preemption()]

    preempted(tmp_path, *both(), Sends("train_batch_start", nth))
    assert (tmp_path / "models" / "last.ckpt").exists() and (tmp_path / INTERRUPTED).read_text().startswith("older")
    resumed = run(build(tmp_path, *both()), ckpt_path="last")
    straight = run(build(tmp_path / "straight", *both()))
    assert_same_run(resumed, straight, "resumed")


def test_sigint_raises_keyboard_interrupt(tmp_path: Path) -> None:
    assert isinstance(preempted(tmp_path, Preemption(), Sends("train_batch_start", 7, signal.SIGINT)), KeyboardInterrupt)
    assert (tmp_path / INTERRUPTED).exists()


def test_no_minimum_holds_the_end_off(tmp_path: Path) -> None:
    sends = Sends("train_batch_start", 2)
    preempted(tmp_path, Preemption(), sends, min_epochs=3)
    assert sends.count == 2


def test_another_policy_is_one_method(tmp_path: Path) -> None:
    class Returns(Preemption):
        def end_run(self, trainer: Trainer, signum: int) -> None:
            assert signum == signal.SIGUSR1

    sends = Sends("train_batch_start", 2)
    trainer = run(build(tmp_path, Returns(), sends))
    assert trainer.stop_reason == "Preemption: SIGUSR1" and sends.count == 2 and (tmp_path / INTERRUPTED).exists()


def test_a_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    assert isinstance(preempted(tmp_path, Preemption(), Sends("train_batch_start"), fast_dev_run=2), SystemExit)
    assert not (tmp_path / INTERRUPTED).exists()


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    assert isinstance(preempted(tmp_path, Preemption(), Sends("train_batch_start")), FileExistsError)


def test_messages_go_past_the_buffers_of_python(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    preempted(tmp_path, Preemption(), Sends("train_batch_start", 7))
    assert capfd.readouterr().err.split("\n\n") == [
        "\nSIGUSR1: the run ends with a checkpoint at the next safe point; a second signal ends it at once",
        f"Preemption: SIGUSR1: the checkpoint is {tmp_path / INTERRUPTED}\n",
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
def test_a_second_signal_ends_the_run_in_the_batch(tmp_path: Path, number: int) -> None:
    ends = Sends("train_batch_end", 99)
    error = preempted(tmp_path, Preemption(), ends, Interrupts("train_batch_start", 7, number))
    assert isinstance(error, KeyboardInterrupt) and ends.count == 6
    assert not any("afterwards" in note for note in error.__notes__), "the second signal has ended it, not both"
    assert not (tmp_path / INTERRUPTED).exists()


def test_a_second_signal_goes_to_the_earlier_handler(
    tmp_path: Path, handled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventtrain.callbacks.stopping.preemption.ECHO", -1.0)
    sends = SendsTwice("train_batch_start", 7)
    trainer = run(build(tmp_path, Preemption(), sends))
    assert handled == [signal.SIGUSR1] and sends.count == 15, "the handler lets the run continue"
    assert trainer.stop_reason is None and trainer.progress.validations == 3
    assert not (tmp_path / INTERRUPTED).exists()


@pytest.mark.parametrize("first", [False, True])
def test_a_second_signal_during_the_checkpoint_does_not_end_the_run_as_if_it_were_complete(
    tmp_path: Path, handled: list[int], monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    monkeypatch.setattr("eventtrain.callbacks.stopping.preemption.ECHO", -1.0)
    callbacks = [Preemption(), Sends("checkpoint_saved")]
    error = preempted(tmp_path, *(callbacks if first else callbacks[::-1]), Sends("train_batch_start", 7))
    assert isinstance(error, SystemExit) and error.code == 128 + signal.SIGUSR1
    assert handled == [signal.SIGUSR1] and (tmp_path / INTERRUPTED).exists()


def test_an_echo_is_not_a_second_signal(tmp_path: Path, handled: list[int]) -> None:
    assert ECHO > 0
    error = preempted(tmp_path, Preemption(), SendsTwice("train_batch_start", 7))
    assert isinstance(error, SystemExit) and handled == [] and (tmp_path / INTERRUPTED).exists()


# ------------------------------------------------------------------ earlier handlers


def handlers() -> list[Any]:
    return [signal.getsignal(getattr(signal, name)) for name in (*SIGNALS, "SIGCHLD")]


class Fails:
    def on_after_update(self, trainer: Trainer, event: events.AfterUpdate) -> None:
        raise RuntimeError("at the worst moment")


@pytest.mark.parametrize("ends", ["normally", "by an error", "by a signal", "by an error after a signal"])
def test_earlier_handlers_are_put_back(tmp_path: Path, handled: list[int], ends: str) -> None:
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
    if ends == "normally":
        run(build(tmp_path, preemption, *more))
    else:
        error = preempted(tmp_path, preemption, *more)
        assert isinstance(error, RuntimeError if "error" in ends else SystemExit)
        assert any("afterwards: SystemExit" in note for note in error.__notes__) == (ends == "by an error after a signal")
    assert len(set(during[:3])) == 1 and during[0] not in before
    assert handlers() == before
    signal.raise_signal(signal.SIGUSR1)
    assert handled == [signal.SIGUSR1]


def test_a_handler_that_is_installed_during_the_run_stays(tmp_path: Path, handled: list[int]) -> None:
    def other(number: int, frame: Any) -> None: ...

    class Installs:
        def on_train_start(self, trainer: Trainer, event: events.TrainStart) -> None:
            signal.signal(signal.SIGUSR1, other)

    run(build(tmp_path, Preemption(), Installs()))
    assert signal.getsignal(signal.SIGUSR1) is other


def test_a_signal_that_the_process_ignores_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run(build(tmp_path, Preemption(), Sends("train_batch_start", 1, signal.SIGINT)))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_separate_validation_leaves_signals_to_the_earlier_handler(tmp_path: Path, handled: list[int]) -> None:
    trainer = run(build(tmp_path, Preemption()))
    sends = Sends("validation_batch_start", 1)
    trainer.signals.validation_batch_start.connect(sends.send)
    trainer.validate(dataloaders=[torch.ones(4, 3)] * 2)
    assert handled == [signal.SIGUSR1] and sends.count == 2


def test_other_signals_stay_with_the_earlier_handler(tmp_path: Path, handled: list[int]) -> None:
    preemption = Preemption(["SIGUSR2", signal.SIGTERM])
    assert preemption.signals == (signal.SIGUSR2, signal.SIGTERM)
    run(build(tmp_path, preemption, Sends("train_batch_start")))
    assert handled == [signal.SIGUSR1]


def test_a_second_fit_forgets_the_signal_of_the_first(tmp_path: Path) -> None:
    preemption, sends = Preemption(), Sends("train_batch_start", 7)
    module, loader, _, callbacks, options = build(tmp_path, preemption, sends)()
    del options["val_check_interval"]
    trainer = Trainer(callbacks=callbacks, default_callbacks=False, device="cpu", **options)
    with pytest.raises(SystemExit):
        trainer.fit(module, loader)
    trainer.fit(module, loader, ckpt_path="last")
    assert trainer.current_epoch == 3 and preemption.received is None


def test_a_fit_in_another_thread_warns_that_it_gets_no_signals(tmp_path: Path, handled: list[int]) -> None:
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
        "Preemption: Python delivers signals to the main thread only, and fit runs in another one. A signal ends this run "
        "without a checkpoint. Call fit in the main thread."
    ]
    assert trainers[0].current_epoch == 3 and handlers() == before


# ------------------------------------------------------------------ several processes


class Processes(TwoProcesses):
    """Notes the last exchanges, and whether there was a checkpoint by then."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / INTERRUPTED
        self.notes: list[tuple[str, bool]] = []

    def any(self, flag: bool) -> bool:
        self.notes.append(("yes" if flag else "no", self.path.exists()))
        return super().any(flag)

    def barrier(self) -> None:
        self.notes.append(("barrier", self.path.exists()))


class OtherIsSignalled(Callback):
    """The other process gets a signal in the seventh batch."""

    def __init__(self, processes: TwoProcesses) -> None:
        self.processes = processes

    def on_train_batch_start(self, trainer: Trainer, event: events.TrainBatchStart) -> None:
        if trainer.total_batch_idx == 6:
            self.processes.request.interruption = "Preemption: SIGTERM"

    def on_take_checkpoint(self, trainer: Trainer, event: events.TakeCheckpoint) -> None:
        self.processes.flag = event.reason is not None  # the next question is which process got a signal


def test_processes_exchange_nothing_more_per_batch(tmp_path: Path) -> None:
    processes, without = TwoProcesses(), TwoProcesses()
    train_as(without, tmp_path)
    train_as(processes, tmp_path, Preemption())
    assert processes.exchanges - without.exchanges == 2, "before training, and after training"


@pytest.mark.parametrize("is_own", [False, True], ids=["another's signal", "this process's signal"])
def test_processes_end_together_once_the_checkpoint_is_written(tmp_path: Path, is_own: bool) -> None:
    processes = Processes(tmp_path)
    signalled = Sends("train_batch_start", 7) if is_own else OtherIsSignalled(processes)
    with pytest.raises(SystemExit) as ended:
        train_as(processes, tmp_path, Preemption(), signalled)
    assert ended.value.code == 128 + (signal.SIGUSR1 if is_own else signal.SIGTERM)
    assert processes.notes[-2:] == [("barrier", True), ("yes" if is_own else "no", True)]
    assert torch.load(tmp_path / INTERRUPTED, weights_only=True)["progress"]["total_batch_idx"] == 6


def test_a_signal_after_the_exchange_of_a_batch_ends_all_at_the_next_safe_point(tmp_path: Path) -> None:
    """A signal at ``safe_point`` comes too late for the others to know of it there."""
    processes = Processes(tmp_path)
    with pytest.raises(SystemExit):
        train_as(processes, tmp_path, Preemption(), Sends("safe_point", 7))
    assert torch.load(tmp_path / INTERRUPTED, weights_only=True)["progress"]["total_batch_idx"] == 7


def test_the_others_are_not_left_waiting_if_writing_the_checkpoint_fails(tmp_path: Path) -> None:
    processes, parallel = Processes(tmp_path), DataParallel(False, None)
    parallel._processes = processes  # type: ignore[assignment]
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(FileExistsError) as raised:
        train_as(processes, tmp_path, parallel, Preemption(), Sends("train_batch_start", 7))
    assert processes.errors[0] is raised.value, "the others are told, and wait for it in no exchange"
    assert not any(name == "barrier" for name, _ in processes.notes)


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize("signals", [[], ["SIGKILL"], ["SIGCHLD"], ["SIGTREM"], [0], "SIGUSR3"])
def test_signals_that_cannot_end_a_run_are_refused(signals: Any) -> None:
    with pytest.raises(MisconfigurationError, match=r"Preemption\(signals="):
        Preemption(signals)


def test_a_misspelt_name_is_corrected() -> None:
    with pytest.raises(MisconfigurationError, match=r"'SIGTREM'\. Did you mean 'SIGTERM'"):
        Preemption(["SIGTREM"])
