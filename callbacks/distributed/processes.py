"""Exchanges with the other processes over ``torch.distributed``, and how a process joins and leaves them."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllreduceOptions, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from eventtrain.callbacks.distributed.compact import Forms, from_bytes, to_bytes
from eventtrain.callbacks.distributed.exchanges import (
    ADVICE,
    GIVEN_UP,
    INLINE,
    LONG,
    Exchanges,
    is_of_an_exchange,
    raised_in,
    ranks_in_words,
)
from eventtrain.callbacks.distributed.notices import SOON, ExchangeError, Notices, clone, open_notices, within
from eventtrain.callbacks.distributed.reading import ReadTogether
from eventtrain.callbacks.distributed.requests import Requests
from eventtrain.callbacks.distributed.windows import Windows
from eventtrain.checks import check_number
from eventtrain.distributed import Place, Reduction, Weight
from eventtrain.errors import MisconfigurationError

T = TypeVar("T")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The variables by which torchrun tells each process about the others."""
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
COMBINATIONS: dict[Reduction, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": torch.add,
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}
OPERATIONS = {"mean": dist.ReduceOp.SUM, "sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


class TorchProcesses:
    """The processes of torch's default process group, as one of them sees them: see :class:`eventtrain.distributed.Processes`.

    If the default group is for GPUs, flags and objects go over a second group, so that they wait for no GPU.

    Args:
        local_rank: The index of this process on its machine.
        timeout: How long an exchange waits for the other processes; None for torch's default.
    """

    def __init__(self, local_rank: int, timeout: timedelta | None = None) -> None:
        self.world_size, self.global_rank, self.local_rank = dist.get_world_size(), dist.get_rank(), local_rank
        self._timeout = timeout or dist.default_pg_timeout
        self.notices: Notices | None = None
        self._requests: Requests | None = None
        self._forms = Forms()
        self._windows: Windows | None = None
        self._questions: Any = None  # a group of gloo, once it is needed
        # None is the default group, in all of torch's calls.
        self._control = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
        self.exchanges = Exchanges(self.global_rank, self.world_size, self._timeout, clone(group_store()))
        atexit.register(self._depart)

    @property
    def data(self) -> Any:
        """The processes whose data differ, as this one sees them: all."""
        return self

    def begin_run(self, place: Callable[[], str] = str) -> None:
        """Begin to hear the notices of a run, which all processes begin.

        Args:
            place: Returns the place in the run, for errors.
        """
        self.notices = open_notices(group_store(), self.global_rank, self.world_size, self._timeout)
        self._requests = requests = Requests(self.notices)
        waits = dist.get_backend() == "gloo"  # for a reduction of gradients
        self._windows = Windows(self.notices, None if waits else torch.device("cuda", torch.cuda.current_device()))
        self.exchanges.begin_run(self.notices, place, lambda: list(requests.passed))
        self.notices.open()
        self.barrier()

    def end_run(self, error: BaseException | None = None) -> None:
        """End the notices of the run, if this process still hears them.

        Args:
            error: The error by which this process leaves the run, for the others.
        """
        if self.notices is not None and error is not None:
            self.notices.fail(error)
        elif self.notices is not None:
            self.notices.close()

    def explain(self, error: BaseException) -> ExchangeError | None:
        """Return an error that says which process has failed, if an error says only that an exchange with it has.

        Args:
            error: The error.
        """
        if isinstance(error, ExchangeError) or not is_of_an_exchange(error):
            return None
        explanation = self.exchanges.explanation(raised_in(error.__traceback__), error)
        for note in getattr(error, "__notes__", ()):
            explanation.add_note(note)
        return explanation

    def _depart(self) -> None:
        error = getattr(sys, "last_value", None)  # the error by which the program ends
        if error is not None and not isinstance(error, ExchangeError):
            record(error)
        self.exchanges.depart(error)

    def agree(self, flags: list[bool], place: Place, name: str = "") -> list[bool]:
        """Return for each flag whether all processes act on it at this place; without an exchange if none is set anywhere."""
        assert self._requests is not None
        if place == "meeting":
            met = self.reduce(torch.tensor(flags, dtype=torch.uint8), "max").tolist()
            self._requests.meet()
            return [bool(flag) for flag in met]
        return self._requests.pass_tick(flags, ends_batch=place == "batch_end", name=name)

    @property
    def evaluates_together(self) -> bool:
        """Whether each forward of an evaluation waits for all processes."""
        return False

    @property
    def is_called_off(self) -> bool:
        """Whether a process has left the current evaluation, as far as this one has heard."""
        return self._requests is not None and self._requests.is_called_off

    def call_off(self) -> None:
        """Tell the others that this process leaves the current evaluation."""
        assert self._requests is not None
        self._requests.call_off()

    def begin_reduction(self, batches: int, missing: int, weight: Weight) -> None:
        """Tell the others how much this process contributes to its window, if they do not know."""
        assert self._windows is not None
        self._windows.begin(batches, missing, weight)

    def end_reduction(self, batches: int, missing: int, weight: Weight) -> tuple[Tensor | float, Weight]:
        """Return the mean number of batches and the mean weight that the processes have contributed to the window."""
        assert self._windows is not None
        return self._windows.end(batches, missing, weight)

    def reduce(self, value: Tensor, reduction: Reduction) -> Tensor:
        """Combine a tensor of every process; return the result, a new tensor, on all of them."""
        value = value.detach()
        if value.device.type != "cpu":
            combined = value.clone()
            dist.all_reduce(combined, OPERATIONS[reduction])
        else:
            combined = self._reduce_on_cpu(value, reduction)
        return combined / self.world_size if reduction == "mean" else combined

    def _reduce_on_cpu(self, value: Tensor, reduction: Reduction) -> Tensor:
        content = value.contiguous().reshape(-1).view(torch.uint8) if value.numel() else value.new_empty(0, dtype=torch.uint8)
        is_short = content.numel() <= INLINE
        kind = f"reduce {reduction} {value.dtype} {list(value.shape)}"
        contents, _ = self.exchanges.share(kind, bytes(content.tolist()) if is_short else b"", self._gloo)
        if not is_short:
            combined = value.clone(memory_format=torch.contiguous_format)
            self._wait(dist.all_reduce(combined, OPERATIONS[reduction], self._control, async_op=True), combined)
            return combined
        tensors = [torch.frombuffer(bytearray(each), dtype=value.dtype).view(value.shape) for each in contents if each]
        return functools.reduce(COMBINATIONS[reduction], tensors) if tensors else value.clone()

    def any(self, flag: bool) -> bool:
        """Return whether the flag holds in any process."""
        return bool(self.reduce(torch.tensor(flag, dtype=torch.uint8), "max"))

    def begin_any(self, flag: bool) -> Callable[[], bool]:
        """Begin to ask whether a flag holds in any process; return a function that waits for the answer.

        The questions have a group of their own, so that their order among other exchanges does not matter.
        """
        if self._questions is None:
            self.barrier()  # it says so if another process asks nothing
            self._questions = dist.new_group(backend="gloo", timeout=self._timeout)
        held = torch.tensor([flag], dtype=torch.uint8)
        options = AllreduceOptions()
        options.reduceOp, options.timeout, options.asyncOp = dist.ReduceOp(dist.ReduceOp.MAX), LONG, True
        work = self._questions.allreduce([held], options)

        def answer() -> bool:
            self.exchanges.wait(work)
            return bool(held)

        return answer

    def read_together(self, read: Callable[[], T], ahead: bool) -> Callable[[], T]:
        """Return a function that reads the next batch as long as all processes have one, see :class:`ReadTogether`."""
        return ReadTogether(read, self.begin_any, ahead=ahead)

    def broadcast(self, value: T) -> T:
        """Return the value of rank zero; tensors arrive on the CPU."""
        content = to_bytes(value) if self.global_rank == 0 else b""
        contents, lengths = self.exchanges.share("broadcast", content, self._gloo)
        if lengths[0] > INLINE:
            tensor = padded(content, lengths[0])
            self._wait(dist.broadcast(tensor, 0, self._control, async_op=True), tensor)
            contents = [tensor.numpy().tobytes()]
        return value if self.global_rank == 0 else from_bytes(contents[0])

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks on rank zero, and an empty list on the others; tensors arrive on the CPU."""
        return [from_bytes(each) for each in self._gather("gather", to_bytes(value), for_all=False)]

    def gather_for_all(self, value: T) -> list[T]:
        """Return the values of all ranks, on every rank; tensors arrive on the CPU."""
        return self._forms.exchange(value, lambda content: self._gather("gather_for_all", content, for_all=True))

    def _gather(self, kind: str, content: bytes, *, for_all: bool) -> list[bytes]:
        contents, lengths = self.exchanges.share(kind, content, self._gloo)
        receives = for_all or self.global_rank == 0
        if max(lengths) > INLINE:
            sent = padded(content, max(lengths))
            received = [torch.empty_like(sent) for _ in lengths] if receives else None
            if for_all:
                self._wait(dist.all_gather(received, sent, self._control, async_op=True), sent)
            else:
                self._wait(dist.gather(sent, received, 0, self._control, async_op=True), sent)
            contents = [each[:size].numpy().tobytes() for each, size in zip(received or (), lengths, strict=False)]
        return contents if receives else []

    def barrier(self) -> None:
        """Wait until every process has come here, but for no GPU."""
        self.exchanges.share("barrier", b"", self._gloo)

    def _wait(self, work: Any, tensor: Tensor) -> None:
        """Wait for an operation on a tensor; on the CPU, look after the other processes meanwhile."""
        if tensor.device.type == "cpu":
            self.exchanges.wait(work)
        else:
            work.wait()

    @property
    def _gloo(self) -> Any:
        return self._control or dist.group.WORLD

    def overwrite(self, tensors: Iterable[Tensor]) -> None:
        """Copy rank zero's values into tensors, in place.

        Args:
            tensors: The same tensors on all ranks, such as a module's buffers.
        """
        for tensor in tensors:
            self._wait(dist.broadcast(tensor.detach(), 0, self._group_of(tensor), async_op=True), tensor)

    def average(self, tensors: list[Tensor], most: int = 2**23) -> None:
        """Replace each tensor by its mean over all ranks, in place.

        Args:
            tensors: The same tensors on all ranks, such as gradients. Tensors of one type and device are sent together.
            most: How many numbers are copied and sent at once; a larger tensor is sent separately.
        """
        buckets: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            bucket = buckets.setdefault((tensor.dtype, tensor.device), [])
            if bucket and sum(each.numel() for each in bucket) + tensor.numel() > most:
                self._average_together(bucket)
                bucket.clear()
            bucket.append(tensor)
        for bucket in buckets.values():
            self._average_together(bucket)

    def _average_together(self, bucket: list[Tensor]) -> None:
        # Divided before they are added up, as torch does, so that the sum does not overflow.
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket]).mul_(1 / self.world_size)
        self._wait(dist.all_reduce(flat, group=self._group_of(flat), async_op=True), flat)
        parts = torch.split(flat, [tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._control if tensor.device.type == "cpu" else None


def padded(content: bytes, size: int) -> Tensor:
    """Return bytes as a tensor of a given size."""
    return torch.frombuffer(bytearray(content.ljust(size, b"\0")), dtype=torch.uint8)


# ------------------------------------------------------------------ joining and leaving


def check_timeout(timeout: timedelta | float | None, owner: str) -> timedelta | None:
    """Return a timeout in the form that torch takes.

    Args:
        timeout: A ``timedelta``, seconds, or None for torch's default.
        owner: The class that takes it, for the message.

    Raises:
        MisconfigurationError: If it is anything else.
    """
    if isinstance(timeout, (timedelta, type(None))):
        return timeout
    unit = "seconds; or a timedelta; or None for torch's default"
    return timedelta(seconds=check_number(timeout, owner, "timeout", above=0, unit=unit))


def join(
    device: torch.device, timeout: timedelta | None = None, processes_type: type[TorchProcesses] = TorchProcesses
) -> TorchProcesses | None:
    """Join the processes that torchrun started, or those of the process group that exists already.

    Args:
        device: The trainer's device.
        timeout: How long an exchange waits for the other processes; None for torch's default.
        processes_type: The class of the result.

    Returns:
        The processes, as this one sees them; None if there is only this one.

    Raises:
        MisconfigurationError: If the environment announces other processes and lacks a variable that is needed to join them,
            or if there is no GPU for this process.
    """
    exists_already = dist.is_available() and dist.is_initialized()
    if not exists_already and os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    missing = [] if exists_already else [name for name in ENVIRONMENT if not os.environ.get(name)]
    if missing:
        raise MisconfigurationError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that there are other processes, but "
            f"{', '.join(missing)} is not set in the environment. Start with `torchrun --nproc-per-node ...`, which sets "
            "all of it; or unset WORLD_SIZE for a run in one process."
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = device_of_process(device, local_rank)  # before the group is made: NCCL takes the current GPU
    if not exists_already:
        init_process_group(BACKENDS[chosen.type], timeout)
        atexit.register(leave)
    return processes_type(local_rank, timeout)


def init_process_group(backend: str, timeout: timedelta | None) -> None:
    """Make the process group of this start.

    Args:
        backend: ``"gloo"`` or ``"nccl"``.
        timeout: How long to wait for the other processes; None for torch's default.

    Raises:
        ExchangeError: If they do not come in time.
    """
    store, rank, world_size = next(rendezvous("env://"))
    store = store_of_this_start(store)
    store.set(f"joined/{rank}", "")
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except RuntimeError as error:
        missing = within(SOON, lambda: [each for each in range(world_size) if not store.check([f"joined/{each}"])])
        if not missing:
            raise
        waited = (timeout or dist.default_pg_timeout).total_seconds()
        raise ExchangeError(
            f"{ranks_in_words(missing)} missing: rank {rank} has waited {waited:g} s for the {world_size} processes that were "
            f"started to begin a run. {ADVICE}"
        ) from error


def device_of_process(device: torch.device, local_rank: int) -> torch.device:
    """Return the device of a process: if it sees several GPUs, the one with its index on the machine.

    Args:
        device: The trainer's device.
        local_rank: The index of the process on its machine.

    Raises:
        MisconfigurationError: If there is no such GPU, or torch has no exchange for the kind of device.
    """
    if device.type not in BACKENDS:
        raise MisconfigurationError(
            f"Several processes train on CPUs or CUDA devices, but the trainer's device is {str(device)!r}. Write "
            "Trainer(device='cpu'), or start one process."
        )
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    if local_rank >= count > 1:
        raise MisconfigurationError(
            f"This process has LOCAL_RANK={local_rank}, but torch sees {count} CUDA devices. Start "
            f"`torchrun --nproc-per-node {count}`."
        )
    chosen = torch.device("cuda", local_rank if count > 1 else 0)  # a process that sees only one GPU takes that one
    torch.cuda.set_device(chosen)
    return chosen


def store_of_this_start(store: Store) -> Store:
    """Return the part of torchrun's store that belongs to its latest start of the processes.

    torchrun keeps the store if it starts the processes again, so torch would read addresses of dead processes there. Each of
    several machines counts its restarts separately; there torchrun has to make a new store, see ``docs/scaling.md``.

    Args:
        store: The store that all processes see.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    is_one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return PrefixStore(f"restart_{restarts}", store) if is_one_machine else store


def record(error: BaseException) -> None:
    """Write an error to the file that torchrun reads a process's error from, unless there is one already."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not os.path.exists(path):
        # It takes long to load, and is not needed otherwise.
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        try:
            raise error  # the handler takes the traceback from the current exception
        except BaseException:
            get_error_handler().record_exception(error)


def group_store() -> Store:
    """Return the store of the default process group."""
    group = dist.group.WORLD
    assert group is not None
    return group.get_group_store()


def hold(group: Any) -> None:
    """Refer to a group until the process has ended."""
    threading.Event().wait()


def leave() -> None:
    """Leave the process group, if it still exists, because the process ends."""
    if GIVEN_UP:  # to destroy the group would wait for them, and they do not end
        threading.Thread(target=hold, args=(dist.group.WORLD,), daemon=True).start()
    elif dist.is_initialized():
        dist.destroy_process_group()
    # Gloo's threads release the tensors of the last exchange, for which they need the interpreter: if it is gone, they abort
    # the process. This thread sleeps so that they can finish.
    time.sleep(0.02)
