"""Exchanges between processes, seen from outside: delay them, and count them.

Two instruments that know nothing of eventtrain. :class:`Latency` makes the exchanges that Python code asks for slower, as a
network would. :class:`Census` counts all exchanges, those of torch's C++ code among them.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import Store
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "gather",
    "irecv",
    "isend",
    "monitored_barrier",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
)
"""The functions of :mod:`torch.distributed` that exchange tensors. Those for objects, such as ``broadcast_object_list``, call
these, some of them twice."""
REQUESTS = ("add", "append", "check", "compare_set", "delete_key", "get", "multi_get", "multi_set", "set", "wait")
"""The methods of a store that send a request to it and wait for the answer."""


class Patches:
    """Functions that stand in for others until :meth:`remove`."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, function: Any) -> None:
        """Replace a function, or a method of a class.

        Args:
            owner: The module or the class.
            name: The name.
            function: The replacement.
        """
        self._originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, function)

    def remove(self) -> None:
        """Put the originals back."""
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)


class Late:
    """The handle of an asynchronous exchange, which is not complete before a moment.

    Args:
        work: Torch's handle.
        moment: The moment, on the clock of :func:`time.perf_counter`.
    """

    def __init__(self, work: Any, moment: float) -> None:
        self._work, self._moment = work, moment

    def wait(self, *args: Any) -> Any:
        """Wait until the exchange is complete and the moment has come."""
        result = self._work.wait(*args)
        time.sleep(max(0.0, self._moment - time.perf_counter()))
        return result

    def is_completed(self) -> bool:
        """Return whether the exchange is complete and the moment has come."""
        return bool(self._work.is_completed()) and time.perf_counter() >= self._moment

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class Latency:
    """A context that makes the exchanges slower that Python code asks for: the control exchanges.

    It delays each call of a function in :data:`COLLECTIVES`, and each request to a store, in :data:`REQUESTS`. The call begins
    at once, and its completion is late: a call that blocks returns later by the latency, and an asynchronous one is complete
    when the latency has passed since it began, so work that is done in the meantime hides it. A request delays only the thread
    that makes it. The reduction of gradients by torch's ``DistributedDataParallel`` is not delayed, because its C++ code begins
    it; so the same latency costs a hand-written loop nothing.

    Attributes:
        seconds: The latency. It may be set at any time.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._patches = Patches()

    def __enter__(self) -> Latency:
        for name in COLLECTIVES:
            late = self._late(getattr(distributed_c10d, name))
            self._patches.put(distributed_c10d, name, late)  # torch's own functions for objects read it there
            self._patches.put(dist, name, late)
        for name in REQUESTS:
            self._patches.put(Store, name, self._late(getattr(Store, name)))
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.remove()

    def _late(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def late(*args: Any, **kwargs: Any) -> Any:
            if not (seconds := self.seconds):
                return function(*args, **kwargs)
            moment = time.perf_counter() + seconds
            result = function(*args, **kwargs)
            if isinstance(result, dist.Work):
                return Late(result, moment)
            time.sleep(seconds)
            return result

        return late


class Census(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that counts the exchanges which this thread begins: those of Python code, and of torch's wrappers.

    Torch runs a backward on CPUs in the thread that asks for it, so the reductions of gradients are counted too. Requests to a
    store are counted in all threads; torch's C++ code makes some that are not seen.

    Attributes:
        collectives: The number of exchanges by name, such as ``allreduce``.
        bytes: The bytes of the tensors that this process gave to them, by name.
        requests: The number of requests to a store by the thread that made them, ``main`` or ``other``, and by name.
        marks: The labels of :meth:`mark`, each with the counts at that time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collectives: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.requests: Counter[tuple[str, str]] = Counter()
        self.marks: list[tuple[str, Counter[str]]] = []
        self._patches = Patches()

    def __enter__(self) -> Any:
        for name in REQUESTS:
            self._patches.put(Store, name, self._counting(name, getattr(Store, name)))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._patches.remove()
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it calls this again with the tensors that it consists of
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.__name__.partition(".")[0].strip("_").replace("all_reduce", "allreduce")
            if name not in ("wait_tensor", "wrap_tensor_autograd"):  # they exchange nothing
                self.collectives[name] += 1
                self.bytes[name] += sent_bytes(name, args)
        return func(*args, **(kwargs or {}))

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counting(*args: Any, **kwargs: Any) -> Any:
            thread = "main" if threading.current_thread() is threading.main_thread() else "other"
            self.requests[thread, name] += 1
            return function(*args, **kwargs)

        return counting

    def counts(self) -> Counter[str]:
        """Return the exchanges so far: collectives, ``... bytes`` of each, and ``store`` for requests of the main thread."""
        counts = self.collectives + Counter({f"{name} bytes": size for name, size in self.bytes.items()})
        if requests := sum(number for (thread, _), number in self.requests.items() if thread == "main"):
            counts["store"] = requests
        return counts

    def mark(self, label: str) -> None:
        """Keep the counts of this moment under a label."""
        self.marks.append((label, self.counts()))

    def between(self, first: str, second: str) -> list[Counter[str]]:
        """Return the exchanges between each mark with one label, and the next mark if it has the other label."""
        pairs = itertools.pairwise(self.marks)
        return [after - before for (label, before), (following, after) in pairs if (label, following) == (first, second)]


def sent_bytes(name: str, args: Any) -> int:
    """Return the bytes of the tensors that a process gives to an exchange.

    Args:
        name: The name of the exchange.
        args: The arguments of torch's operator. If it has an output and an input, the output comes first.
    """
    values = args[1] if name in ("allgather", "allgather_base", "gather", "reduce_scatter", "reduce_scatter_base") else args[0]
    return sum(each.numel() * each.element_size() for each in flat(values))


def flat(values: Any) -> list[Tensor]:
    """Return the tensors in nested lists."""
    if isinstance(values, Tensor):
        return [values]
    return [tensor for value in values for tensor in flat(value)] if isinstance(values, (list, tuple)) else []


def written() -> tuple[int, int]:
    """Return the bytes that this process has written to files and to other processes, and the number of writes.

    The system counts them. Gloo writes each message by one call; requests to a store are not counted.
    """
    with open("/proc/self/io") as file:
        figures = dict(line.split(": ") for line in file.read().splitlines())
    return int(figures["wchar"]), int(figures["syscw"])


def processor() -> int:
    """Pin this process to a core of its own, if there are enough, and return it; -1 if the system cannot pin processes."""
    if not hasattr(os, "sched_setaffinity"):
        return -1
    cores = sorted(os.sched_getaffinity(0))
    core = cores[dist.get_rank() % len(cores)]
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    return core
