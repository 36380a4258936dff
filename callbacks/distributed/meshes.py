"""Meshes of processes: along some dimensions the data are divided, along others only the tensors of a layer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from eventtrain._torch import is_metric
from eventtrain.callbacks.distributed.sharded_tensors import ShardedProcesses, map_tensors
from eventtrain.distributed import Reduction
from eventtrain.errors import MisconfigurationError

T = TypeVar("T")
REPLICATE = ("replicate", "dp_replicate")
"""Names of the dimension along which parts of weights are repeated."""
SHARD = ("shard", "dp_shard", "dp", "fsdp")
"""Names of the dimension along which weights are divided."""
TENSOR = ("tensor", "tp")
"""Names of the dimension along which layers are divided; its processes see the same batches."""
EXAMPLE = "mesh=(2, 4), mesh_dim_names=('replicate', 'shard')"


class Mesh:
    """The shape of a mesh, checked: it becomes a :class:`DeviceMesh` once the process group exists.

    Args:
        mesh: The sizes of the dimensions, a mesh that exists already, or None for one dimension over all processes.
        names: The names of the dimensions; None if the mesh has them, or has only one.

    Raises:
        MisconfigurationError: If sizes and names do not say along which dimensions weights, data and layers are divided.
    """

    def __init__(self, mesh: DeviceMesh | Sequence[int] | None, names: Sequence[str] | None) -> None:
        self.made = mesh if isinstance(mesh, DeviceMesh) else None
        self.sizes = self._sizes(mesh, names)
        own = self.made.mesh_dim_names if self.made is not None else None
        self.names = self._names(mesh, names if names is not None else own)
        self.replicate = next((each for each in self.names if each in REPLICATE), None)
        self.tensor = next((each for each in self.names if each in TENSOR), None)

    @staticmethod
    def _sizes(mesh: Any, names: Any) -> tuple[int, ...] | None:
        if isinstance(mesh, DeviceMesh):
            return tuple(mesh.shape)
        if mesh is None:
            if names is not None:
                raise MisconfigurationError(
                    f"FullyShardedDataParallel(mesh_dim_names={names!r}): a mesh needs sizes too, such as {EXAMPLE}."
                )
            return None
        if isinstance(mesh, str) or not isinstance(mesh, Sequence) or not all(type(each) is int and each > 0 for each in mesh):
            raise MisconfigurationError(
                f"FullyShardedDataParallel(mesh={mesh!r}): give the size of each dimension, such as {EXAMPLE}, or a DeviceMesh."
            )
        return tuple(mesh)

    def _names(self, mesh: Any, names: Any) -> tuple[str, ...]:
        count = 1 if self.sizes is None else len(self.sizes)
        if names is None and count == 1:
            return ("shard",)
        problem = f"FullyShardedDataParallel(mesh={mesh!r}, mesh_dim_names={names!r}):"
        if names is None or isinstance(names, str) or len(names) != count:
            raise MisconfigurationError(f"{problem} name each of the {count} dimensions, such as {EXAMPLE}.")
        roles = [next((role for role in (REPLICATE, SHARD, TENSOR) if name in role), None) for name in names]
        if count == 1 and roles == [None]:
            return tuple(names)  # one dimension is the one along which weights and data are divided
        if None in roles:
            unknown = names[roles.index(None)]
            raise MisconfigurationError(
                f"{problem} eventtrain does not know whether data are divided along {unknown!r}. Name the dimensions "
                "'replicate' and 'shard', whose processes see different batches, and 'tensor', whose processes see the same."
            )
        if len(set(roles)) != len(roles) or SHARD not in roles:
            raise MisconfigurationError(
                f"{problem} one dimension has to be 'shard', and there may be one 'replicate' and one 'tensor'. For tensor "
                "parallelism alone write mesh=(1, 4), mesh_dim_names=('shard', 'tensor')."
            )
        if roles != sorted(roles, key=(REPLICATE, SHARD, TENSOR).index):
            raise MisconfigurationError(
                f"{problem} write the dimensions in the order 'replicate', 'shard', 'tensor', so that the processes of one "
                "tensor-parallel group are next to each other."
            )
        return tuple(names)

    def make(self, device: torch.device) -> DeviceMesh:
        """Return the mesh of the processes that have joined.

        Args:
            device: The device of this process.

        Raises:
            MisconfigurationError: If there are more processes than the mesh has places, or fewer.
        """
        if self.made is None:
            sizes = self.sizes or (dist.get_world_size(),)
            if math.prod(sizes) != dist.get_world_size():
                raise MisconfigurationError(
                    f"FullyShardedDataParallel(mesh={sizes!r}) has places for {math.prod(sizes)} processes, and there are "
                    f"{dist.get_world_size()}. Start `torchrun --nproc-per-node {math.prod(sizes)}`, or change the sizes."
                )
            self.made = init_device_mesh(device.type, sizes, mesh_dim_names=self.names)
        elif self.made.size() != dist.get_world_size():
            raise MisconfigurationError(
                f"FullyShardedDataParallel(mesh={self.made!r}) holds {self.made.size()} of {dist.get_world_size()} processes. "
                "Give a mesh of all."
            )
        return self.made

    def layers(self) -> DeviceMesh | None:
        """Return the mesh of the processes that divide layers between them; None if none do."""
        return None if self.made is None or self.tensor is None else self.made[self.tensor]

    def sizes_by_role(self) -> dict[str, int]:
        """Return the size of each dimension, by its name."""
        assert self.made is not None
        return dict(zip(self.names, self.made.shape, strict=True))

    def divide_metrics(self, module: nn.Module) -> None:
        """Have torchmetrics objects add up what the processes of different data have seen, if others see the same."""
        if self.made is None or self.tensor is None:
            return
        groups = [dist.new_group(ranks) for ranks in self.groups()[0]]  # all processes make all groups
        for metric in filter(is_metric, module.modules()):
            if getattr(metric, "process_group", None) is None:
                vars(metric)["process_group"] = groups[self.made.get_local_rank(self.tensor)]

    def check_window(self, content: dict[str, Any], processes: Any) -> None:
        """Check that these processes can hold the gradients of a checkpoint, if its window is open.

        Args:
            content: The checkpoint.
            processes: The processes; None if there is only one.

        Raises:
            MisconfigurationError: If other processes divided layers between them, or these do.
        """
        before, now = content.get("mesh"), {} if processes is None else self.sizes_by_role()
        tensor_before, tensor_now = ({each: sizes[each] for each in sizes if each in TENSOR} for sizes in (before or {}, now))
        if content["window"]["open"] and list(tensor_before.values()) != list(tensor_now.values()):
            raise MisconfigurationError(
                f"The checkpoint was written in an open accumulation window by processes in the mesh {before}, and "
                f"those in the mesh {now} cannot share the gradients of its layers. Resume with that mesh, or from a "
                "checkpoint between two windows."
            )

    def groups(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return the ranks of the processes that see different batches, and of those that see the same, group by group."""
        assert self.made is not None
        ranks: Tensor = self.made.mesh.reshape(-1, self.made.shape[-1] if self.tensor else 1)
        return ranks.T.tolist(), ranks.tolist()


class Shares:
    """The processes of different data, if others work on the same batches: those of one group, as one of them sees them.

    Everything is an exchange of all processes, in which one of each group counts.

    Args:
        whole: All processes.
        groups: The ranks of each group. Each process is in one of them.
    """

    def __init__(self, whole: ShardedProcesses, groups: list[list[int]]) -> None:
        self.whole, self.copies = whole, len(groups)
        self.ranks = next(ranks for ranks in groups if whole.global_rank in ranks)
        self.world_size, self.global_rank = len(self.ranks), self.ranks.index(whole.global_rank)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)  # flags and values of one process are the same for all

    def reduce(self, value: Tensor, reduction: Reduction) -> Tensor:
        """Combine a tensor of every process of different data; return the result on all of them."""
        combined = self.whole.reduce(value, reduction)
        return combined / self.copies if reduction == "sum" else combined

    def gather(self, value: T) -> list[T]:
        """Return the values of the processes of different data on rank zero, and an empty list on the others."""
        values = self.whole.gather(value)
        return [values[rank] for rank in self.ranks] if values else []

    def gather_for_all(self, value: T) -> list[T]:
        """Return the values of the processes of different data, on each of them."""
        values = self.whole.gather_for_all(value)
        return [values[rank] for rank in self.ranks]


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the dimensions of a mesh along which the data are divided, as ``fully_shard`` takes them.

    Args:
        mesh: The mesh, whose dimensions are named.
    """
    names = tuple(name for name in mesh.mesh_dim_names or () if name not in TENSOR)
    return mesh if len(names) in (0, mesh.ndim) else mesh[names]


def check_parallelized(module: nn.Module, name: str) -> None:
    """Check that some layer is divided along the tensor-parallel dimension of a mesh.

    Args:
        module: The module, sharded.
        name: The name of that dimension.

    Raises:
        MisconfigurationError: If none is: all processes along it would do the same work.
    """
    meshes = [each.device_mesh for each in module.parameters() if isinstance(each, DTensor)]
    if not any(name in (mesh.mesh_dim_names or ()) for mesh in meshes):
        raise MisconfigurationError(
            f"FullyShardedDataParallel: no layer of {type(module).__name__.removeprefix('FSDP')} is divided along {name!r}, so "
            "the processes along it would all do the same work. Override shard(self, module, mesh): call torch's "
            f"parallelize_module(layer, mesh[{name!r}], plan), then super().shard(module, mesh)."
        )


def check_alike(processes: ShardedProcesses, groups: list[list[int]], batch: Any, device: torch.device) -> None:
    """Check that the processes of a tensor-parallel group train on the same batch, and draw the same random numbers.

    Args:
        processes: All processes, which have to call this.
        groups: The ranks of each tensor-parallel group.
        batch: The batch of this process.
        device: Its device.

    Raises:
        MisconfigurationError: In all processes, if any group differs.
    """
    random = [torch.get_rng_state()]
    if device.type == "cuda":
        random.append(torch.cuda.get_rng_state(device))
    digests = processes.gather_for_all((digest(batch), digest(random)))
    for ranks in groups:
        for index, text in enumerate(
            (
                "train on different batches. Give each of them the batches of `trainer.processes.data.global_rank`, its place "
                "among the `trainer.processes.data.world_size` processes that share the data",
                "draw different random numbers, so dropout would differ between parts of one layer. Seed them alike, by "
                "`trainer.processes.data.global_rank` in place of `trainer.global_rank`",
            )
        ):
            if len({digests[rank][index] for rank in ranks}) > 1:
                raise MisconfigurationError(f"The processes {ranks} divide the same layers between them, and {text}.")


def digest(value: Any) -> str:
    """Return a number for the tensors in nested values, by which processes compare them."""
    result = hashlib.sha256()

    def add(place: Any, tensor: Tensor) -> None:
        if not tensor.is_sparse and not isinstance(tensor, DTensor):
            result.update(repr((place, tensor.dtype, tuple(tensor.shape))).encode())
            result.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    map_tensors(value, (), add)
    return result.hexdigest()
