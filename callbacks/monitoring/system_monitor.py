"""Log how much of its machine a run uses, sampled in a separate thread."""

from __future__ import annotations

import importlib
import threading
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

import torch

from eventtrain.callback import Callback
from eventtrain.checkpoint.storage import first_line
from eventtrain.checks import check_number
from eventtrain.events import (
    ExceptionRaised,
    FitEnd,
    PredictBatchEnd,
    PredictEnd,
    SafePoint,
    Setup,
    Teardown,
    TestBatchEnd,
    TestEnd,
    ValidationBatchEnd,
    ValidationEnd,
)
from eventtrain.trainer import Trainer

PATIENCE = 5.0  # seconds that the end of a run waits for the last sample
SHORTEST = 0.1  # seconds that a rate needs to mean something: CPU time is counted in hundredths


class SystemMonitor(Callback):
    """Log the use of processor, memory, disk, network and GPU, on rank zero, in every stage.

    A daemon thread samples from ``setup`` on: at the start, every ``interval`` seconds, and at the end, however short the
    run is. The training thread only hands the samples to loggers, which write them at once: new samples at ``safe_point``,
    ``validation_batch_end``, ``test_batch_end`` and ``predict_batch_end``, and the rest at the end of the run (``fit_end``,
    ``validation_end``, ``test_end``, ``predict_end`` or ``exception``), which waits for the last sample. ``teardown`` always
    ends the thread. If the thread fails, there is a warning, and the run continues without samples. Values that the machine
    does not offer are left out. Override :meth:`sampler` to sample something else.

    Emits, each under ``system/``, with rates since the sample before:

    - ``cpu_percent``: of the machine, 100 if all its cores are busy;
    - ``process_cpu_percent``: of the process, 100 for each core that it keeps busy;
    - ``process_rss_bytes``: its resident memory; pages that processes share count once for each;
    - ``process_threads``, ``process_open_files`` (file descriptors; handles on Windows): how many it has;
    - ``child_processes``: the number of its children and their children. DataLoader workers are among them, and the four
      values above include them all;
    - ``memory_available_bytes``: of the machine, the memory that is available without swapping;
    - ``disk_read_bytes_per_second``, ``disk_write_bytes_per_second``, ``network_receive_bytes_per_second``,
      ``network_send_bytes_per_second``: of the machine;
    - if the trainer's device is a GPU, ``gpu_memory_allocated_bytes`` and ``gpu_memory_reserved_bytes``: by the tensors of
      this process, and by torch for them; and if NVML is available (the package ``nvidia-ml-py``),
      ``gpu_memory_used_bytes`` by all processes, ``gpu_utilisation_percent`` and ``gpu_temperature_celsius``.

    Args:
        interval: Seconds between two samples; it may be infinite.

    Raises:
        MisconfigurationError: If the interval is not positive.

    Example:
        >>> from eventtrain import Trainer
        >>> from eventtrain.callbacks import JSONLinesLogger, SystemMonitor
        >>> trainer = Trainer(max_epochs=1, callbacks=[SystemMonitor(interval=10), JSONLinesLogger()])
        >>> trainer.callback(SystemMonitor).interval
        10.0
    """

    def __init__(self, interval: float = 5.0) -> None:
        self.interval = check_number(interval, "SystemMonitor", "interval", above=0, finite=False, unit="seconds")
        self._thread: SamplingThread | None = None
        self._reports: deque[dict[str, float] | Exception] = deque()

    def sampler(self, trainer: Trainer) -> Sampler:
        """Return the object that samples: a policy to override.

        Args:
            trainer: The trainer.

        Returns:
            An object with ``sample()`` and ``close()``, which are called in the thread.
        """
        return Sampler(trainer.device)

    # ------------------------------------------------------------------ the start and the end of a run

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        if trainer.is_global_zero:
            thread = SamplingThread(self.sampler(trainer), self.interval)
            self._thread, self._reports = thread, thread.reports
            thread.start()

    def on_fit_end(self, trainer: Trainer, event: FitEnd) -> None:
        self._finish(trainer)

    def on_validation_end(self, trainer: Trainer, event: ValidationEnd) -> None:
        if trainer.stage == "validate":
            self._finish(trainer)

    def on_test_end(self, trainer: Trainer, event: TestEnd) -> None:
        self._finish(trainer)

    def on_predict_end(self, trainer: Trainer, event: PredictEnd) -> None:
        self._finish(trainer)

    def on_exception(self, trainer: Trainer, event: ExceptionRaised) -> None:
        self._finish(trainer)

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        self._stop()  # and write nothing: loggers are closing their files
        self._reports = deque()

    # ------------------------------------------------------------------ the end of a batch

    def on_safe_point(self, trainer: Trainer, event: SafePoint) -> None:
        if self._reports:
            self._write(trainer)

    def on_validation_batch_end(self, trainer: Trainer, event: ValidationBatchEnd) -> None:
        if self._reports and not trainer.sanity_checking:
            self._write(trainer)

    def on_test_batch_end(self, trainer: Trainer, event: TestBatchEnd) -> None:
        if self._reports:
            self._write(trainer)

    def on_predict_batch_end(self, trainer: Trainer, event: PredictBatchEnd) -> None:
        if self._reports:
            self._write(trainer)

    # ------------------------------------------------------------------ samples

    def _finish(self, trainer: Trainer) -> None:
        """Hand over everything up to the last sample, which is taken now."""
        self._stop()
        self._write(trainer)

    def _stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None and not thread.finish(PATIENCE):
            warnings.warn(
                f"SystemMonitor: the last sample took more than {PATIENCE:g} seconds. The run ends without it.", stacklevel=2
            )

    def _write(self, trainer: Trainer) -> None:
        while self._reports:
            report = self._reports.popleft()
            if isinstance(report, Exception):
                warnings.warn(
                    f"SystemMonitor has stopped, and the run continues without it: {first_line(report)}",
                    stacklevel=2,
                )
            else:
                trainer.log_now(report)


class SamplingThread(threading.Thread):
    """Sample until :meth:`finish`. A daemon: it never keeps a process alive.

    Args:
        sampler: The object that samples.
        interval: Seconds between two samples.

    Attributes:
        reports: The samples that were not written yet, the oldest first. If the sampler raised an error, it is the last one.
    """

    def __init__(self, sampler: Sampler, interval: float) -> None:
        super().__init__(name="eventtrain.SystemMonitor", daemon=True)
        self.reports: deque[dict[str, float] | Exception] = deque()
        self._sampler = sampler
        self._interval = min(interval, threading.TIMEOUT_MAX)  # infinite: only at the start and at the end
        self._finishing = threading.Event()

    def run(self) -> None:
        """Sample at once, then at the interval, then once more."""
        try:
            with closing(self._sampler) as sampler:
                self.reports.append(sampler.sample())
                while not self._finishing.wait(self._interval):
                    self.reports.append(sampler.sample())
                self.reports.append(sampler.sample())
        except Exception as error:
            self.reports.append(error)

    def finish(self, patience: float) -> bool:
        """Ask for the last sample and wait for it.

        Args:
            patience: The longest time to wait, in seconds.

        Returns:
            Whether the thread has ended.
        """
        self._finishing.set()
        self.join(patience)
        return not self.is_alive()


class Sampler:
    """Measure how much of its machine a process uses: current levels, and rates since the sample before.

    The first sample has no rates. Neither has a sample that follows another one so closely that they would mean nothing.

    Args:
        device: The device of the run.
        clock: Returns seconds.
    """

    def __init__(self, device: torch.device, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._psutil: Any = importlib.import_module("psutil")  # imported only if it is used
        self._process = self._psutil.Process()
        self._gpu = Gpu(device) if device.type == "cuda" else None
        self._clock = clock
        self._since: float | None = None
        self._before: dict[str, float] = {}

    def sample(self) -> dict[str, float]:
        """Take a sample: return numbers by name, as :class:`SystemMonitor` lists them."""
        now = self._clock()
        levels = self._processes()
        totals = self._machine()
        totals["process_cpu_percent"] = levels.pop("process_cpu_percent")
        levels["memory_available_bytes"] = self._psutil.virtual_memory().available
        if self._gpu is not None:
            levels |= self._gpu.read()
        elapsed = 0.0 if self._since is None else now - self._since
        if self._since is None or elapsed >= SHORTEST:
            busy = self._psutil.cpu_percent()  # since it was last called
            if self._since is not None:
                levels["cpu_percent"] = busy
                levels |= rates(self._before, totals, elapsed)
            self._since, self._before = now, totals
        return {f"system/{name}": float(value) for name, value in levels.items()}

    def close(self) -> None:
        """Release the GPU library, if it was opened."""
        if self._gpu is not None:
            self._gpu.close()

    def _processes(self) -> dict[str, float]:
        """Return sums over the process and its children."""
        try:
            children = self._process.children(recursive=True)
        except self._psutil.Error:
            children = []
        sums: dict[str, float] = defaultdict(float, child_processes=len(children))
        for process in (self._process, *children):
            with process.oneshot():
                for name, read in OF_A_PROCESS.items():
                    with suppress(self._psutil.Error):  # it has just ended, or belongs to another user
                        sums[name] += read(process)
        return sums

    def _machine(self) -> dict[str, float]:
        """Return the counters that the machine has."""
        totals: dict[str, float] = {}
        # With nowrap a lock is taken, and a DataLoader worker that is forked meanwhile would inherit it locked.
        if (disk := self._counters(self._psutil.disk_io_counters)) is not None:
            totals |= {"disk_read_bytes_per_second": disk.read_bytes, "disk_write_bytes_per_second": disk.write_bytes}
        if (network := self._counters(self._psutil.net_io_counters)) is not None:
            totals["network_receive_bytes_per_second"] = network.bytes_recv
            totals["network_send_bytes_per_second"] = network.bytes_sent
        return totals

    def _counters(self, read: Callable[..., Any]) -> Any:
        try:
            return read(nowrap=False)
        except (NotImplementedError, OSError):  # a container may hide them
            return None


def rates(before: dict[str, float], after: dict[str, float], elapsed: float) -> dict[str, float]:
    """Return how fast counters rose, per second. A counter that is new, or fell because it was reset, has no rate."""
    risen = {name: after[name] - old for name, old in before.items() if name in after and after[name] >= old}
    return {name: rise / elapsed for name, rise in risen.items()}


def processor_time(process: Any) -> float:
    """Return 100 times the processor time of a process in seconds, including the children that it has waited for.

    The time of a child passes to its parent when the child ends, so the sum over living processes does not fall.
    """
    times = process.cpu_times()
    return 100.0 * float(times.user + times.system + times.children_user + times.children_system)


# Processor time is a counter, and its rate is logged. The others are levels.
OF_A_PROCESS: dict[str, Callable[[Any], float]] = {
    "process_cpu_percent": processor_time,
    "process_rss_bytes": lambda process: process.memory_info().rss,
    "process_threads": lambda process: process.num_threads(),
    "process_open_files": lambda process: process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
}


class Gpu:
    """Read the numbers of one CUDA device, from torch, and from NVML if it is available.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._nvml: Any = None
        self._handle: Any = None
        self._is_open = False

    def read(self) -> dict[str, float]:
        """Return the numbers that the device has, by name."""
        if not self._is_open:
            self._is_open = True
            self._open()
        values: dict[str, float] = {
            "gpu_memory_allocated_bytes": torch.cuda.memory_allocated(self._device),
            "gpu_memory_reserved_bytes": torch.cuda.memory_reserved(self._device),
        }
        nvml, handle = self._nvml, self._handle
        if handle is None:
            return values
        readings: dict[str, Callable[[], float]] = {
            "gpu_memory_used_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
            "gpu_utilisation_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "gpu_temperature_celsius": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        }
        for name, read in readings.items():
            with suppress(nvml.NVMLError):  # virtual devices lack some
                values[name] = read()
        return values

    def _open(self) -> None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return
        with suppress(nvml.NVMLError):  # without NVIDIA's driver, or on a slice of a device, torch's numbers have to do
            nvml.nvmlInit()
            self._nvml = nvml
            # By name, because NVML also counts devices that CUDA_VISIBLE_DEVICES hides.
            self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(self._device).uuid}")

    def close(self) -> None:
        """Release NVML."""
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
