"""Logs what a run takes of its machine, sampled in a thread of its own."""

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
from eventtrain.errors import MisconfigurationError
from eventtrain.events import Event, ExceptionRaised, Setup, Teardown
from eventtrain.trainer import Trainer

PATIENCE = 5.0  # seconds that the end of a run waits for the last sample
SHORTEST = 0.1  # seconds over which a rate means something: CPU time is counted in hundredths

# Where samples are handed to loggers in each kind of run: at the ends of batches, and at the end.
MOMENTS = {
    "fit": ("safe_point", "validation_batch_end"),
    "validate": ("validation_batch_end",),
    "test": ("test_batch_end",),
    "predict": ("predict_batch_end",),
}
ENDS = {"fit": "fit_end", "validate": "validation_end", "test": "test_end", "predict": "predict_end"}


class SystemMonitor(Callback):
    """Logs processor, memory, disk, network and GPU, on rank zero, in every stage.

    A daemon thread samples from ``setup`` on: at the start, every ``interval`` seconds, and at the end, however short the
    run. The training thread only hands to loggers, which write it at once, what was sampled meanwhile: at ``safe_point`` or
    the end of an evaluation's batch, and the rest at the run's end (``fit_end``, ``validation_end``, ``test_end``,
    ``predict_end`` or ``exception``), which waits for the last sample. For the length of a run it is connected to those of
    its kind. ``teardown`` ends the thread in any case. An error in it is a warning, and the run goes on unwatched. What the
    machine does not offer is left out. Override :meth:`sampler` to sample something else.

    Emits, each under ``system/``, rates since the sample before:

    - ``cpu_percent``: of the machine, 100 where all its cores are busy;
    - ``process_cpu_percent``: of the process, 100 for each core that it keeps busy;
    - ``process_rss_bytes``: its resident memory; pages that processes share count once for each;
    - ``process_threads``, ``process_open_files`` (file descriptors; handles on Windows): how many it has;
    - ``child_processes``: how many children it has, and theirs. DataLoader workers are such, and the four values above
      include them all;
    - ``memory_available_bytes``: of the machine, what can be had without swapping;
    - ``disk_read_bytes_per_second``, ``disk_write_bytes_per_second``, ``network_receive_bytes_per_second``,
      ``network_send_bytes_per_second``: of the machine;
    - where the trainer's device is a GPU, ``gpu_memory_allocated_bytes`` and ``gpu_memory_reserved_bytes``: by this
      process's tensors and by torch for them; and where NVML can be had (the package ``nvidia-ml-py``),
      ``gpu_memory_used_bytes`` by all processes, ``gpu_utilisation_percent`` and ``gpu_temperature_celsius``.

    Args:
        interval: Seconds between two samples.

    Raises:
        MisconfigurationError: An interval that is not positive.
    """

    def __init__(self, interval: float = 5.0) -> None:
        if isinstance(interval, bool) or not isinstance(interval, (int, float)) or not interval > 0:
            raise MisconfigurationError(f"SystemMonitor(interval={interval!r}): it has to be a positive number of seconds.")
        self.interval = float(interval)
        self._thread: SamplingThread | None = None
        self._reports: deque[dict[str, float] | Exception] = deque()

    def sampler(self, trainer: Trainer) -> Sampler:
        """The policy: what samples. Its ``sample`` and ``close`` are called in the thread."""
        return Sampler(trainer.device)

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        if not trainer.is_global_zero:
            return
        for moment in MOMENTS[event.stage]:
            trainer.signals[moment].connect(self.write)
        trainer.signals[ENDS[event.stage]].connect(self.finish)
        thread = SamplingThread(self.sampler(trainer), self.interval)
        self._thread, self._reports = thread, thread.reports
        thread.start()

    def write(self, trainer: Trainer, event: Event) -> None:
        """Connected to what ends a batch: hands over what was sampled meanwhile."""
        if self._reports and not trainer.sanity_checking:
            self._write(trainer)

    def finish(self, trainer: Trainer, event: Event) -> None:
        """Connected to what ends the run: hands over everything up to the last sample, which is taken now."""
        self._stop()
        self._write(trainer)

    def on_exception(self, trainer: Trainer, event: ExceptionRaised) -> None:
        self.finish(trainer, event)

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        for moment in MOMENTS[event.stage]:
            trainer.signals[moment].disconnect(self.write)
        trainer.signals[ENDS[event.stage]].disconnect(self.finish)
        self._stop()  # and write nothing: loggers are closing their files
        self._reports = deque()

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
                    f"SystemMonitor has stopped, and the run goes on unwatched: {type(report).__name__}: {report}", stacklevel=2
                )
            else:
                trainer.log_now(report)


class SamplingThread(threading.Thread):
    """Samples until it is told to finish. A daemon: it never keeps a process alive.

    Args:
        sampler: What samples.
        interval: Seconds between two samples.

    Attributes:
        reports: The samples that nobody has taken yet, the oldest first; after an error, that error as the last.
    """

    def __init__(self, sampler: Sampler, interval: float) -> None:
        super().__init__(name="eventtrain.SystemMonitor", daemon=True)
        self.reports: deque[dict[str, float] | Exception] = deque()
        self._sampler = sampler
        self._interval = min(interval, threading.TIMEOUT_MAX)  # infinite: at the start and at the end alone
        self._finishing = threading.Event()

    def run(self) -> None:
        """Samples at once, then at the interval, then once more."""
        try:
            with closing(self._sampler) as sampler:
                self.reports.append(sampler.sample())
                while not self._finishing.wait(self._interval):
                    self.reports.append(sampler.sample())
                self.reports.append(sampler.sample())
        except Exception as error:
            self.reports.append(error)

    def finish(self, patience: float) -> bool:
        """Asks for the last sample and waits for it.

        Args:
            patience: For so many seconds at most.

        Returns:
            Whether the thread has ended.
        """
        self._finishing.set()
        self.join(patience)
        return not self.is_alive()


class Sampler:
    """What a process takes of its machine: levels as they are, and rates since the sample before.

    The first sample has no rates, nor has one that follows another so closely that they would mean nothing.

    Args:
        device: The device that the run is on.
        clock: Gives seconds.
    """

    def __init__(self, device: torch.device, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._psutil: Any = importlib.import_module("psutil")  # when used
        self._process = self._psutil.Process()
        self._gpu = Gpu(device) if device.type == "cuda" else None
        self._clock = clock
        self._since: float | None = None
        self._before: dict[str, float] = {}

    def sample(self) -> dict[str, float]:
        """Takes a sample: numbers by name, as :class:`SystemMonitor` lists them."""
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
        """Releases what sampling holds."""
        if self._gpu is not None:
            self._gpu.close()

    def _processes(self) -> dict[str, float]:
        """Sums over the process and its children."""
        try:
            children = self._process.children(recursive=True)
        except self._psutil.Error:
            children = []
        sums: dict[str, float] = defaultdict(float, child_processes=len(children))
        for process in (self._process, *children):
            with process.oneshot():
                for name, read in OF_A_PROCESS.items():
                    with suppress(self._psutil.Error):  # it has just ended, or belongs to somebody else
                        sums[name] += read(process)
        return sums

    def _machine(self) -> dict[str, float]:
        """The machine's counters, those that it has."""
        totals: dict[str, float] = {}
        # Without nowrap no lock is taken, which a DataLoader worker forked meanwhile would inherit locked.
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
    """How fast counters rose, per second. One that is new, or that fell because it was reset, has no rate."""
    risen = {name: after[name] - old for name, old in before.items() if name in after and after[name] >= old}
    return {name: rise / elapsed for name, rise in risen.items()}


def processor_time(process: Any) -> float:
    """100 times the seconds of a process and of those children that it has waited for: a child's pass over to its parent
    when it ends, so that the sum over living processes does not fall."""
    times = process.cpu_times()
    return 100.0 * float(times.user + times.system + times.children_user + times.children_system)


# Processor time is a counter, of which the rate is logged; the others are levels.
OF_A_PROCESS: dict[str, Callable[[Any], float]] = {
    "process_cpu_percent": processor_time,
    "process_rss_bytes": lambda process: process.memory_info().rss,
    "process_threads": lambda process: process.num_threads(),
    "process_open_files": lambda process: process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
}


class Gpu:
    """One CUDA device: what torch says of it, and where it can be had what NVML says.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._nvml: Any = None
        self._handle: Any = None
        self._is_open = False

    def read(self) -> dict[str, float]:
        """Numbers by name, those that the device has."""
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
        with suppress(nvml.NVMLError):  # no driver of NVIDIA's, or a slice of a device: then torch's numbers have to do
            nvml.nvmlInit()
            self._nvml = nvml
            # By its own name: NVML counts devices that CUDA_VISIBLE_DEVICES hides.
            self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(self._device).uuid}")

    def close(self) -> None:
        """Lets NVML go."""
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
