"""Several processes that train together: the seam over ``torch.distributed``, and each one's share of the data."""

from __future__ import annotations

import atexit
import copy
import io
import os
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler, SequentialSampler

from eventtrain.data.resumable import describe_loader, has_plain_sampler
from eventtrain.distributed import Processes, Reduction
from eventtrain.errors import MisconfigurationError
from eventtrain.events import Stage

T = TypeVar("T")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process that it starts."""
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
OPERATIONS = {"mean": dist.ReduceOp.SUM, "sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


class TorchProcesses:
    """This process's view of the others in torch's default process group.

    Flags and objects go over a group of their own where the default one is for GPUs, so that no GPU is waited for.

    Args:
        local_rank: This process's index on its machine.
        timeout: How long an exchange waits for the others; None for torch's own.
    """

    def __init__(self, local_rank: int, timeout: timedelta | None = None) -> None:
        self.world_size, self.global_rank, self.local_rank = dist.get_world_size(), dist.get_rank(), local_rank
        # None is the default group, in all of torch's calls.
        self._control = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timeout)

    def reduce(self, value: Tensor, reduction: Reduction) -> Tensor:
        """A new tensor: the value combined over all ranks."""
        combined = value.detach().clone()
        dist.all_reduce(combined, OPERATIONS[reduction], self._group_of(combined))
        return combined / self.world_size if reduction == "mean" else combined

    def any(self, flag: bool) -> bool:
        """Whether the flag holds on any rank."""
        return bool(self.reduce(torch.tensor(flag, dtype=torch.uint8), "max"))

    def any_of(self, flags: list[bool]) -> list[bool]:
        """Whether each flag holds on any rank."""
        return [bool(flag) for flag in self.reduce(torch.tensor(flags, dtype=torch.uint8), "max").tolist()]

    def broadcast(self, value: T) -> T:
        """Rank zero's value, on all ranks; tensors come on the CPU."""
        received: list[Any] = [packed(value) if self.global_rank == 0 else None]
        dist.broadcast_object_list(received, 0, self._control)
        return value if self.global_rank == 0 else unpacked(received[0])

    def gather(self, value: T) -> list[T]:
        """All ranks' values, on rank zero; tensors come on the CPU."""
        received: list[Any] | None = [None] * self.world_size if self.global_rank == 0 else None
        dist.gather_object(packed(value), received, 0, self._control)
        return [unpacked(each) for each in received or ()]

    def gather_for_all(self, value: T) -> list[T]:
        """All ranks' values, on all ranks; tensors come on the CPU."""
        received: list[Any] = [None] * self.world_size
        dist.all_gather_object(received, packed(value), self._control)
        return [unpacked(each) for each in received]

    def barrier(self) -> None:
        """Waits until every rank is here, without waiting for a GPU."""
        dist.barrier(self._control)

    def overwrite(self, tensors: Iterable[Tensor]) -> None:
        """Gives tensors rank zero's values, in place.

        Args:
            tensors: The same ones on all ranks, such as a module's buffers.
        """
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0, self._group_of(tensor))

    def average(self, tensors: list[Tensor], most: int = 2**23) -> None:
        """Gives tensors their mean over all ranks, in place.

        Args:
            tensors: The same ones on all ranks, such as gradients. Those of a kind are sent together.
            most: How many numbers are copied, to be sent at once; a larger tensor goes alone.
        """
        buckets: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            kind = (tensor.dtype, tensor.device)
            bucket = buckets.setdefault(kind, [])
            if bucket and sum(each.numel() for each in bucket) + tensor.numel() > most:
                self._average_together(bucket)
                bucket.clear()
            bucket.append(tensor)
        for bucket in buckets.values():
            self._average_together(bucket)

    def _average_together(self, bucket: list[Tensor]) -> None:
        # Made smaller before they are added up, as torch does, so that the sum does not overflow.
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket]).mul_(1 / self.world_size)
        dist.all_reduce(flat, group=self._group_of(flat))
        parts = torch.split(flat, [tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._control if tensor.device.type == "cpu" else None


def packed(value: Any) -> bytes:
    """A value on its way to another process. By torch's format, whose tensors can be read on another device."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked(content: bytes) -> Any:
    """What :func:`packed` was given, its tensors on the CPU. From this run's own processes, so anything is read."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)


# ------------------------------------------------------------------ joining


def check_timeout(timeout: timedelta | float | None, named: str) -> timedelta | None:
    """A time-out as torch takes it.

    Args:
        timeout: A ``timedelta``, seconds, or None for torch's own.
        named: Whose argument it is, for the message.

    Raises:
        MisconfigurationError: It is no time.
    """
    if isinstance(timeout, (timedelta, type(None))):
        return timeout
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout <= 0:
        raise MisconfigurationError(
            f"{named}(timeout={timeout!r}): it has to be a positive number of seconds, a timedelta, or None for torch's own."
        )
    return timedelta(seconds=timeout)


def join(device: torch.device, timeout: timedelta | None = None) -> TorchProcesses | None:
    """Joins the processes that torchrun started, or those of the process group that there is already.

    Args:
        device: What the trainer was given.
        timeout: How long an exchange waits for the others; None for torch's own.

    Returns:
        This process's view of the others; None where it is alone.

    Raises:
        MisconfigurationError: The environment tells of other processes, and not all that is needed to join them; or there
            is no GPU for this one.
    """
    there_already = dist.is_available() and dist.is_initialized()
    if not there_already and os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    missing = [] if there_already else [name for name in ENVIRONMENT if not os.environ.get(name)]
    if missing:
        raise MisconfigurationError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that there are other processes, and "
            f"{', '.join(missing)} is not set in the environment. Start with `torchrun --nproc-per-node ...`, which sets "
            "all of it; or unset WORLD_SIZE for a run in one process."
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    own = own_device(device, local_rank)  # before the group: NCCL takes the process's GPU
    if not there_already:
        store, rank, world_size = next(rendezvous("env://"))
        dist.init_process_group(BACKENDS[own.type], store=fresh(store), rank=rank, world_size=world_size, timeout=timeout)
        atexit.register(leave)
    return TorchProcesses(local_rank, timeout)


def own_device(device: torch.device, local_rank: int) -> torch.device:
    """The device of a process: of several GPUs that it sees the one with its index on its machine.

    Args:
        device: What the trainer was given.
        local_rank: The process's index.

    Raises:
        MisconfigurationError: There is none for it.
    """
    if device.type not in BACKENDS:
        raise MisconfigurationError(
            f"Several processes train on CPUs and CUDA devices; the trainer's device is {str(device)!r}. Write "
            "Trainer(device='cpu'), or start one process."
        )
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    if local_rank >= count > 1:
        raise MisconfigurationError(
            f"This process has LOCAL_RANK={local_rank}, and torch sees {count} CUDA devices. Start "
            f"`torchrun --nproc-per-node {count}`."
        )
    own = torch.device("cuda", local_rank if count > 1 else 0)  # a process that is shown one GPU alone has that one
    torch.cuda.set_device(own)
    return own


def fresh(store: Store) -> Store:
    """The part of torchrun's store that processes have to themselves which it has started anew.

    The store is the same as before, and torch would read the dead processes' addresses in it. Of several machines each
    counts its restarts for itself, so there torchrun has to be told to make another store, see ``docs/scaling.md``.

    Args:
        store: The store that all of them see.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return PrefixStore(f"restart_{restarts}", store) if alone else store


def leave() -> None:
    """Leaves the process group, where it is there still, as the process ends."""
    if dist.is_initialized():
        dist.destroy_process_group()
    # Gloo's threads let go of the last exchange's tensors, for which they need the interpreter: they would end the process
    # by an abort where it is gone. Asleep, this thread leaves it to them.
    time.sleep(0.02)


# ------------------------------------------------------------------ data


class EveryNth(Sampler[int]):
    """The indices of a data set that are this process's to evaluate: none is another's too, so that none counts twice.

    Args:
        length: The data set's length.
        first: The process's index.
        step: The number of processes.
    """

    def __init__(self, length: int, first: int, step: int) -> None:
        self.indices = range(first, length, step)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def shared_out(loader: Any, stage: Stage, processes: Processes) -> Any:
    """A loader that reads this process's share, in place of one that reads everything.

    Args:
        loader: The loader. Never changed; one whose sampler knows of several processes stays as it is.
        stage: For training the share is torch's ``DistributedSampler``'s, shuffled if the loader's sampler shuffles; else
            it is every n-th sample, without repetition.
        processes: Those that share the data; all of them have to ask.

    Raises:
        MisconfigurationError: Nobody but the user can know how it is to be shared.
    """
    if any(hasattr(sampler, name) for sampler in samplers(loader) for name in ("set_epoch", "num_replicas")):
        return loader
    sampler = plain_sampler(loader)
    if sampler is None:
        raise MisconfigurationError(
            f"Nobody but you can give each process its share of the {stage} loader ({describe_loader(loader)}"
            f"{describe_sampler(loader)}). Give a DataLoader(..., sampler=DistributedSampler(dataset)), or attach "
            "the callback with shares_data=False and have each process load its own share."
        )
    own: Sampler[Any]
    if stage == "train":
        shuffles = isinstance(sampler, RandomSampler)
        generator = getattr(sampler, "generator", None)
        seed = torch.initial_seed() if generator is None else generator.initial_seed()
        own = DistributedSampler(
            loader.dataset,
            processes.world_size,
            processes.global_rank,
            shuffle=shuffles,
            seed=processes.broadcast(seed) % 2**32,  # an epoch's number is added to it
            drop_last=getattr(loader.batch_sampler, "drop_last", False),
        )
    else:
        own = EveryNth(len(loader.dataset), processes.global_rank, processes.world_size)
    batches = loader.batch_sampler
    return with_sampler(loader, own, batches and BatchSampler(own, batches.batch_size, batches.drop_last))


def with_sampler(loader: DataLoader[Any], sampler: Sampler[Any], batch_sampler: Any) -> DataLoader[Any]:
    """A shallow copy of a loader with other samplers.

    Args:
        loader: The loader.
        sampler: What gives indices.
        batch_sampler: What makes batches of them; None where the loader makes none.
    """
    copied = copy.copy(loader)
    # Not by setattr, which a DataLoader refuses once it is built.
    for name, value in {"sampler": sampler, "batch_sampler": batch_sampler, "_iterator": None}.items():
        object.__setattr__(copied, name, value)
    return copied


def samplers(loader: Any) -> list[Any]:
    """What gives a loader its indices, the loader itself included, which may do it for itself."""
    batches = getattr(loader, "batch_sampler", None)
    found = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    return [each for each in found if each is not None]


def shuffling_seed(loader: Any) -> int | None:
    """What a loader's ``DistributedSampler`` shuffles by; None where it has none."""
    return next((each.seed for each in samplers(loader) if hasattr(each, "seed")), None)


def shuffle_by(loader: Any, seed: int | None) -> None:
    """Has a loader's ``DistributedSampler`` shuffle by a seed; None leaves it as it is."""
    for sampler in samplers(loader):
        if seed is not None and hasattr(sampler, "seed"):
            sampler.seed = seed


def plain_sampler(loader: Any) -> Any:
    """A loader's sampler where it is known to give each sample once, in order or shuffled; else None."""
    if not isinstance(loader, DataLoader) or not has_plain_sampler(loader):
        return None
    batches = loader.batch_sampler
    if batches is not None and type(batches) is not BatchSampler:
        return None
    sampler = loader.sampler if batches is None else batches.sampler
    if type(sampler) is SequentialSampler:
        return sampler
    once = type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return sampler if once else None


def describe_sampler(loader: Any) -> str:
    """What gives a loader its indices, for messages."""
    return "".join(f", {type(each).__name__}" for each in samplers(loader)[1:])
