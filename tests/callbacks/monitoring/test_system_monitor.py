"""SystemMonitor samples the machine beside the run, and never outlives the run."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch.utils.data import DataLoader, Dataset

from eventtrain import MisconfigurationError, Trainer
from eventtrain.callbacks import TensorBoardLogger
from eventtrain.callbacks.monitoring import system_monitor as implementation
from eventtrain.callbacks.monitoring.system_monitor import Gpu, Sampler, SamplingThread, SystemMonitor, rates
from tests.kit import FakeProcesses, Line, On, new_trainer

LONG = 1e9  # seconds: no sample between the first and the last
WAIT = 60.0  # seconds that a test waits for another thread before it fails


BATCHES = list(torch.ones(3, 1, 1))


class Counts:
    """A sampler that counts its samples and returns the count."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.samples = 0
        self.closed = 0
        self.fails_at = fails_at
        self.threads: set[threading.Thread] = set()

    def sample(self) -> dict[str, float]:
        self.threads.add(threading.current_thread())
        self.samples += 1
        if self.samples == self.fails_at:
            raise OSError("the sensor is gone")
        return {"sample": float(self.samples)}

    def close(self) -> None:
        self.closed += 1


class Monitor(SystemMonitor):
    def __init__(self, counts: Any, interval: float = LONG) -> None:
        super().__init__(interval)
        self.counts = counts

    def sampler(self, trainer: Trainer) -> Any:
        return self.counts


Written = list[tuple[str, Any]]


def trainer_of(monitor: SystemMonitor, *callbacks: Any, **options: Any) -> tuple[Trainer, Written]:
    """Return a trainer, and the list of the stages and values that loggers will get."""
    written: Written = []

    def note(trainer: Trainer, event: Any) -> None:
        if event.scope == "monitor":
            assert threading.current_thread() is threading.main_thread()
            written.append((event.stage, dict(event.metrics)))

    return new_trainer(monitor, *callbacks, On(metrics_logged=note), **options), written


def connections(trainer: Trainer) -> dict[str, Any]:
    return {signal.name: (signal.attached(), signal.listeners) for signal in trainer.signals}


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    left = [thread for thread in threading.enumerate() if isinstance(thread, SamplingThread)]
    assert left == []


# ------------------------------------------------------------------ in a run

RUNS: dict[str, Callable[[Trainer], Any]] = {
    "train": lambda trainer: trainer.fit(Line(), BATCHES),
    "validation": lambda trainer: trainer.validate(Line(), BATCHES),
    "test": lambda trainer: trainer.test(Line(), BATCHES),
    "predict": lambda trainer: trainer.predict(Line(), BATCHES),
}


@pytest.mark.parametrize("stage", RUNS)
def test_there_is_a_sample_at_the_start_and_one_at_the_end_of_every_kind_of_run(stage: str) -> None:
    counts = Counts()
    trainer, written = trainer_of(Monitor(counts))
    before = connections(trainer)
    RUNS[stage](trainer)
    assert [values for _, values in written] == [{"sample": 1.0}, {"sample": 2.0}]
    assert counts.closed == 1
    assert threading.main_thread() not in counts.threads and len(counts.threads) == 1
    assert connections(trainer) == before


def test_the_next_run_has_new_samples() -> None:
    counts = Counts()
    trainer, written = trainer_of(Monitor(counts))
    for run in RUNS.values():
        run(trainer)
    assert [values["sample"] for _, values in written] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert len(counts.threads) == 4


def test_a_run_without_a_batch_has_both_samples() -> None:
    trainer, written = trainer_of(Monitor(Counts()), max_epochs=0)
    RUNS["train"](trainer)
    assert [values["sample"] for _, values in written] == [1.0, 2.0]


class WaitsForSamples:
    """Hold up the first batch until a number of samples has been taken; fail if they do not come."""

    def __init__(self, counts: Counts, samples: int) -> None:
        self.counts, self.samples = counts, samples

    def wait(self) -> None:
        ticks = threading.Event()
        for _ in range(int(WAIT * 1000)):
            if self.counts.samples > self.samples:  # the last one that is waited for has been reported
                return
            ticks.wait(0.001)
        raise AssertionError("no samples came")

    def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
        if event.batch_idx == 0:
            self.wait()


def test_new_samples_are_written_at_the_end_of_a_batch() -> None:
    counts = Counts()
    monitor = Monitor(counts, interval=0.001)
    at_second_batch: list[int] = []

    def look(trainer: Trainer, event: Any) -> None:
        if event.batch_idx == 1:
            at_second_batch.append(len(written))

    trainer, written = trainer_of(monitor, WaitsForSamples(counts, 3), On(train_batch_start=look))
    RUNS["train"](trainer)
    assert at_second_batch[0] >= 3
    samples = [values["sample"] for _, values in written]
    assert samples == [float(i) for i in range(1, counts.samples + 1)], "each once, in order"


@pytest.mark.parametrize("stage", ["validation", "test", "predict"])
def test_evaluations_write_at_the_end_of_a_batch_too(stage: str) -> None:
    counts = Counts()
    during: list[int] = []

    def wait(trainer: Trainer, event: Any) -> None:
        if event.batch_idx == 0:
            WaitsForSamples(counts, 1).wait()
        else:
            during.append(len(written))

    trainer, written = trainer_of(Monitor(counts, interval=0.001), On(**{f"{stage}_batch_start": wait}))
    RUNS[stage](trainer)
    assert during[0] >= 1 and {at for at, _ in written} == {stage}


def test_a_sanity_check_logs_nothing() -> None:
    counts = Counts()
    during: list[int] = []

    def look(trainer: Trainer, event: Any) -> None:
        if trainer.sanity_checking:
            WaitsForSamples(counts, 1).wait()
            during.append(len(written))

    monitor = Monitor(counts, interval=0.001)
    trainer, written = trainer_of(monitor, On(validation_batch_start=look), num_sanity_val_steps=2)
    trainer.fit(Line(), BATCHES, BATCHES)
    assert during == [0, 0]
    assert [values["sample"] for _, values in written][:2] == [1.0, 2.0]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_run_that_fails_has_its_last_sample(error: type[BaseException]) -> None:
    counts = Counts()
    trainer, written = trainer_of(Monitor(counts), On(after_update=refuse(error())))
    before = connections(trainer)
    with pytest.raises(error):
        RUNS["train"](trainer)
    assert [values["sample"] for _, values in written] == [1.0, 2.0] and counts.closed == 1
    assert connections(trainer) == before


def test_a_run_that_fails_in_setup_leaves_no_thread() -> None:
    trainer, written = trainer_of(Monitor(Counts()), On(setup=refuse(RuntimeError("at once"))))
    with pytest.raises(RuntimeError, match="at once"):
        RUNS["train"](trainer)
    assert [values["sample"] for _, values in written] == [1.0, 2.0]


@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_error_in_the_thread_is_one_warning_and_the_run_continues(fails_at: int) -> None:
    counts = Counts(fails_at)
    trainer, written = trainer_of(Monitor(counts), max_epochs=2)
    message = "SystemMonitor has stopped, and the run continues without it: OSError: the sensor is gone"
    with pytest.warns(UserWarning, match=message) as caught:
        RUNS["train"](trainer)
    assert len(caught) == 1 and trainer.global_step == 6
    assert len(written) == fails_at - 1 and counts.closed == 1


def test_a_sensor_that_hangs_does_not_hold_up_the_end_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "PATIENCE", 0.01)
    released = threading.Event()

    class Hangs(Counts):
        def sample(self) -> dict[str, float]:
            released.wait()
            return super().sample()

    monitor = Monitor(Hangs())
    trainer, written = trainer_of(monitor)
    with pytest.warns(UserWarning, match=r"the last sample took more than 0.01 seconds. The run ends without it."):
        RUNS["train"](trainer)
    assert written == []
    with pytest.warns(UserWarning, match="the last sample"):
        RUNS["train"](trainer)  # nor the next run
    released.set()
    for thread in threading.enumerate():
        if isinstance(thread, SamplingThread):
            thread.join(WAIT)

    class FailsBeforeSetup(Line):
        def setup(self, stage: str) -> None:
            raise RuntimeError("before the monitor begins")

    with pytest.raises(RuntimeError, match="before the monitor begins"):
        trainer.fit(FailsBeforeSetup(), BATCHES)
    assert written == [], "a sample that comes after its run is dropped"


def test_other_ranks_than_zero_are_not_sampled() -> None:
    counts = Counts()
    trainer, written = trainer_of(Monitor(counts))
    trainer.processes = FakeProcesses(2, 1)
    RUNS["train"](trainer)
    assert counts.samples == 0 and written == []


def test_loggers_write_the_samples_at_any_cadence(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, log_every_n_steps=1000)
    trainer, _ = trainer_of(Monitor(Counts()), logger)
    RUNS["train"](trainer)
    events = EventAccumulator(str(logger.run_dir)).Reload().Scalars("sample")
    assert [event.value for event in events] == [1.0, 2.0] and events[-1].step == 3


def test_an_interval_may_be_infinite() -> None:
    trainer, written = trainer_of(Monitor(Counts(), interval=math.inf))
    RUNS["train"](trainer)
    assert len(written) == 2


@pytest.mark.parametrize("interval", [0, -1.0, True, math.nan, "5"])
def test_an_interval_has_to_be_positive(interval: Any) -> None:
    with pytest.raises(MisconfigurationError, match=r"SystemMonitor\(interval=.*\): give a number above 0, in seconds\."):
        SystemMonitor(interval)


# ------------------------------------------------------------------ the real thing

LEVELS = {
    "system/process_rss_bytes", "system/process_threads", "system/process_open_files", "system/child_processes",
    "system/memory_available_bytes",
}  # fmt: skip


def test_a_run_is_sampled() -> None:
    trainer, written = trainer_of(SystemMonitor())
    RUNS["train"](trainer)
    first, last = (values for _, values in written)
    assert first.keys() >= LEVELS and last.keys() >= LEVELS
    for values in (first, last):
        assert all(type(value) is float for value in values.values())
        assert 1e6 < values["system/process_rss_bytes"] < psutil.virtual_memory().total
        assert 1e6 < values["system/memory_available_bytes"] < psutil.virtual_memory().total
        assert values["system/process_threads"] >= 2 and values["system/process_open_files"] >= 1
    assert "system/cpu_percent" not in first, "there is no sample before it"


def test_rates_are_taken_over_the_time_since_the_last_sample() -> None:
    now = 0.0
    sampler = Sampler(torch.device("cpu"), clock=lambda: now)
    assert "system/process_cpu_percent" not in sampler.sample()
    began = sum(os.times()[:2])
    while sum(os.times()[:2]) - began < 0.2:
        pass
    now = 2.0
    sample = sampler.sample()
    assert 5.0 <= sample["system/process_cpu_percent"] < 1000.0, "a fifth of a second of work in two"
    assert 0.0 <= sample["system/cpu_percent"] <= 100.0
    now += 0.05
    assert "system/cpu_percent" not in sampler.sample(), "too soon after the last"
    sampler.close()


class Processes(Dataset[Any]):
    """Each item waits until the process that loads it has been sampled."""

    def __init__(self, sampled: Any) -> None:
        self.sampled = sampled

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        assert self.sampled.wait(WAIT)
        return torch.ones(1)


def is_resource_tracker(process: psutil.Process) -> bool:
    """Return whether a process is Python's resource tracker, which ends with its parent."""
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def test_dataloader_workers_count() -> None:
    gc.collect()
    # Workers of other tests that are collected as garbage take five seconds to end.
    left_behind = [child for child in psutil.Process().children() if not is_resource_tracker(child)]
    psutil.wait_procs(left_behind, timeout=10)
    context = torch.multiprocessing.get_context()
    sampled = context.Event()
    taken: list[dict[str, float]] = []
    beyond: dict[str, float] = {}  # the largest differences to the values of the process without its children
    me = psutil.Process()
    left = {child.pid for child in me.children(recursive=True)}

    class Watches(Sampler):
        def sample(self) -> dict[str, float]:
            sample = super().sample()
            taken.append(sample)
            if {child.pid for child in me.children(recursive=True)} - left:
                alone = {"process_rss_bytes": me.memory_info().rss, "process_threads": me.num_threads()}
                alone |= {"process_open_files": me.num_fds(), "child_processes": 0}
                for name, value in alone.items():
                    beyond[name] = max(beyond.get(name, 0), sample[f"system/{name}"] - value)
                if all(value > 0 for value in beyond.values()):
                    sampled.set()
            return sample

    class Watched(SystemMonitor):
        def sampler(self, trainer: Trainer) -> Sampler:
            return Watches(trainer.device)

    trainer, written = trainer_of(Watched(interval=0.01))
    with warnings.catch_warnings():
        # Newer Pythons warn of a deadlock at every fork in a process with threads, and torch starts threads.
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
        trainer.fit(Line(), DataLoader(Processes(sampled), num_workers=1))
    assert beyond.keys() == {"process_rss_bytes", "process_threads", "process_open_files", "child_processes"}
    assert min(beyond.values()) > 0
    assert [values for _, values in written] == taken


# ------------------------------------------------------------------ how processes end

SCRIPT = """
    import sys, torch
    from eventtrain import Callback, LightningModule, Trainer
    from eventtrain.callbacks.monitoring.system_monitor import SystemMonitor

    class Model(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
        def training_step(self, batch, batch_idx):
            {step}
            return self.layer(batch).sum()
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    {before}
    trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False, callbacks=[SystemMonitor(0.01)])
    trainer.fit(Model(), torch.ones(2, 1, 1))
    print("done", flush=True)
"""


def script(step: str = "", before: str = "") -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(SCRIPT).format(step=step or "pass", before=before)]


def test_a_process_that_exits_during_a_run_exits() -> None:
    result = subprocess.run(script("sys.exit(3)"), capture_output=True, text=True, timeout=WAIT, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (3, "", "")


def test_a_process_that_is_killed_is_gone() -> None:
    step = "print('training', flush=True); sys.stdin.read()"
    with subprocess.Popen(script(step), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "training\n"
        process.terminate()
        assert process.wait(WAIT) != 0


def test_a_thread_that_hangs_in_a_sample_does_not_keep_the_process() -> None:
    before = "import threading; forever = threading.Event(); SystemMonitor.sampler = lambda self, trainer: Hangs()\n"
    before += "class Hangs:\n    def sample(self): forever.wait()\n    def close(self): pass\n"
    before += "import eventtrain.callbacks.monitoring.system_monitor as m; m.PATIENCE = 0.01"
    result = subprocess.run(script(before=before), capture_output=True, text=True, timeout=WAIT, check=False)
    assert (result.returncode, result.stdout) == (0, "done\n")
    assert "the last sample took more than" in result.stderr


# ------------------------------------------------------------------ machines that lack something


class Denied(Exception):
    """The base of the fake library's errors."""


class FakeProcess:
    def __init__(self, memory: int = 100, seconds: float = 1.0, children: Any = (), **methods: Any) -> None:
        self.memory, self.seconds, self.family = memory, seconds, children
        for name, method in methods.items():
            setattr(self, name, method)

    def children(self, recursive: bool) -> list[Any]:
        assert recursive
        if isinstance(self.family, Exception):
            raise self.family
        return list(self.family)

    def oneshot(self) -> Any:
        return warnings.catch_warnings()  # any context manager

    def cpu_times(self) -> Any:
        return SimpleNamespace(user=self.seconds, system=0.0, children_user=0.0, children_system=0.0)

    def memory_info(self) -> Any:
        return SimpleNamespace(rss=self.memory)

    def num_threads(self) -> int:
        return 3


def refuse(error: BaseException) -> Callable[..., Any]:
    def method(*args: Any, **kwargs: Any) -> Any:
        raise error

    return method


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A psutil whose numbers a test sets."""
    process = FakeProcess(num_fds=lambda: 7)
    fake: Any = SimpleNamespace(
        Error=Denied,
        process=process,
        Process=lambda: fake.process,
        virtual_memory=lambda: SimpleNamespace(available=5000),
        cpu_percent=lambda: 25.0,
        disk=SimpleNamespace(read_bytes=0, write_bytes=0),
        network=SimpleNamespace(bytes_recv=0, bytes_sent=0),
        disk_io_counters=lambda nowrap: fake.disk,
        net_io_counters=lambda nowrap: fake.network,
        now=100.0,
    )
    monkeypatch.setitem(sys.modules, "psutil", fake)
    return fake


def sampled(machine: Any, device: str = "cpu") -> Callable[[], dict[str, float]]:
    sampler = Sampler(torch.device(device), clock=lambda: machine.now)
    return lambda: {name.removeprefix("system/"): value for name, value in sampler.sample().items()}


MINIMUM = {
    "child_processes": 0.0, "process_rss_bytes": 100.0, "process_threads": 3.0, "process_open_files": 7.0,
    "memory_available_bytes": 5000.0,
}  # fmt: skip


def test_values_have_the_units_in_their_names(machine: Any) -> None:
    sample = sampled(machine)
    assert sample() == MINIMUM
    machine.now += 4.0
    machine.process.seconds += 6.0
    machine.disk = SimpleNamespace(read_bytes=400, write_bytes=80)
    machine.network = SimpleNamespace(bytes_recv=4000, bytes_sent=800)
    assert sample() == {
        **MINIMUM,
        "cpu_percent": 25.0,
        "process_cpu_percent": 150.0,
        "disk_read_bytes_per_second": 100.0,
        "disk_write_bytes_per_second": 20.0,
        "network_receive_bytes_per_second": 1000.0,
        "network_send_bytes_per_second": 200.0,
    }


def test_a_sample_that_comes_too_soon_leaves_its_time_to_the_next_one(machine: Any) -> None:
    sample = sampled(machine)
    sample()
    machine.now += 0.05
    machine.process.seconds += 0.05
    assert sample() == MINIMUM
    machine.now += 0.15
    machine.process.seconds += 0.05
    assert sample()["process_cpu_percent"] == pytest.approx(50.0)


def test_children_that_vanish_or_belong_to_another_user_are_counted_as_far_as_possible(machine: Any) -> None:
    vanished = FakeProcess(memory_info=refuse(Denied()), cpu_times=refuse(Denied()), num_threads=refuse(Denied()))
    vanished.num_fds = refuse(Denied())  # type: ignore[attr-defined]
    foreign = FakeProcess(memory=20, num_fds=refuse(Denied()))
    machine.process.family = (FakeProcess(memory=10, num_fds=lambda: 4), vanished, foreign)
    sample = sampled(machine)
    assert sample() == {
        **MINIMUM, "child_processes": 3.0, "process_rss_bytes": 130.0, "process_threads": 9.0, "process_open_files": 11.0,
    }  # fmt: skip


def test_without_a_list_of_children_the_process_is_sampled(machine: Any) -> None:
    machine.process.family = Denied()
    assert sampled(machine)() == MINIMUM


def test_the_time_of_a_worker_that_ended_is_not_counted_twice(machine: Any) -> None:
    worker = FakeProcess(seconds=5.0, num_fds=lambda: 1)
    machine.process.family = [worker]
    sample = sampled(machine)
    sample()
    worker.seconds += 1.0
    machine.now += 1.0
    assert sample()["process_cpu_percent"] == 100.0
    machine.process.family = []
    machine.process.cpu_times = lambda: SimpleNamespace(user=1.0, system=0.0, children_user=6.0, children_system=0.0)
    machine.now += 1.0
    assert sample()["process_cpu_percent"] == 0.0


def test_handles_are_counted_if_there_are_no_descriptors(machine: Any) -> None:
    machine.process = FakeProcess(num_handles=lambda: 9)
    assert sampled(machine)()["process_open_files"] == 9.0


@pytest.mark.parametrize("missing", [lambda nowrap: None, refuse(NotImplementedError()), refuse(FileNotFoundError())])
def test_counters_that_the_machine_does_not_have_are_left_out(machine: Any, missing: Any) -> None:
    machine.disk_io_counters = machine.net_io_counters = missing
    sample = sampled(machine)
    sample()
    machine.now += 1.0
    assert sample() == {**MINIMUM, "cpu_percent": 25.0, "process_cpu_percent": 0.0}


def test_a_counter_without_a_past_has_no_rate() -> None:
    assert rates({"same": 1.0, "reset": 5.0, "gone": 1.0}, {"same": 3.0, "reset": 4.0, "new": 9.0}, 2.0) == {"same": 1.0}


# ------------------------------------------------------------------ GPU


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pynvml whose numbers a test sets, and a GPU for torch."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 + device.index)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 + device.index)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"uuid-of-{device.index}"))

    class NVMLError(Exception):
        """The base of NVML's errors."""

    def handle_of(uuid: str) -> str:
        assert threading.current_thread() is threading.main_thread() or fake.opened == 1
        return f"handle of {uuid}"

    def temperature(handle: str, sensor: int) -> int:
        assert (handle, sensor) == ("handle of GPU-uuid-of-1", 0)
        return 61

    def opened() -> None:
        fake.opened += 1

    def closed() -> None:
        fake.opened -= 1

    fake = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        opened=0,
        nvmlInit=opened,
        nvmlShutdown=closed,
        nvmlDeviceGetHandleByUUID=handle_of,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=3000),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=87, memory=5),
        nvmlDeviceGetTemperature=temperature,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


BY_TORCH = {"gpu_memory_allocated_bytes": 11, "gpu_memory_reserved_bytes": 21}
BY_NVML = {"gpu_memory_used_bytes": 3000, "gpu_utilisation_percent": 87, "gpu_temperature_celsius": 61}


def read_twice() -> dict[str, float]:
    gpu = Gpu(torch.device("cuda", 1))
    first = gpu.read()
    assert gpu.read() == first
    gpu.close()
    return first


def test_a_gpu_is_sampled_by_nvml(nvml: Any) -> None:
    assert read_twice() == {**BY_TORCH, **BY_NVML}
    assert nvml.opened == 0, "NVML is released as often as it was opened"


def test_without_nvml_there_are_the_numbers_of_torch(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it is an ImportError
    assert read_twice() == BY_TORCH


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_without_a_driver_or_device_for_nvml_there_are_the_numbers_of_torch(nvml: Any, function: str) -> None:
    setattr(nvml, function, refuse(nvml.NVMLError()))
    assert read_twice() == BY_TORCH
    assert nvml.opened == 0


def test_values_that_a_device_does_not_measure_are_left_out(nvml: Any) -> None:
    nvml.nvmlDeviceGetUtilizationRates = refuse(nvml.NVMLError())
    expected = {**BY_TORCH, **BY_NVML}
    del expected["gpu_utilisation_percent"]
    assert read_twice() == expected


def test_a_sample_has_the_numbers_of_the_gpu(nvml: Any, machine: Any) -> None:
    sample = sampled(machine, "cuda:1")()
    assert sample == {**MINIMUM, **BY_TORCH, **BY_NVML}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_run_on_a_gpu_is_sampled() -> None:
    trainer, written = trainer_of(SystemMonitor(), device="cuda")
    RUNS["train"](trainer)
    assert all(values["system/gpu_memory_reserved_bytes"] > 0 for _, values in written)
