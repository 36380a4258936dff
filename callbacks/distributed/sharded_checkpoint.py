"""Tensors that several processes hold in parts: how a checkpoint keeps them, and how another number of processes gets them."""

from __future__ import annotations

import os
import pathlib
import pickle
import shutil
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, zeros

from eventtrain.callbacks.checkpointing.folder import SUFFIX
from eventtrain.callbacks.distributed.processes import TorchProcesses
from eventtrain.checkpoint.storage import first_line
from eventtrain.distributed import Processes
from eventtrain.errors import MisconfigurationError

KEY = "shards"
"""What the rest of a checkpoint says of its sharded tensors; and the folder that they are written to."""
OWNER = "checkpoint"
"""The file, beside the sharded tensors, that names the checkpoint that they belong to."""
Place = tuple[Any, ...]  # keys and indices, from the outside in
T = TypeVar("T")


class Shards:
    """A folder of sharded tensors, one folder in it for each checkpoint. One run at a time writes there.

    Args:
        root: The folder.
        processes: Those that hold the tensors.
    """

    def __init__(self, root: Path, processes: Processes) -> None:
        self.root = root
        self.processes = processes
        self._used: set[str] = set()  # in this run: written, or read

    def take_out(self, content: dict[str, Any], more: Mapping[str, Tensor]) -> None:
        """Writes the sharded tensors of a checkpoint, whole on disk when this returns, and takes them out of it.

        Args:
            content: The checkpoint, changed in place; containers in it stay as they are.
            more: Tensors of this process alone, by names that no other process uses.

        Raises:
            OSError: They could not be written.
        """
        found: dict[Place, DTensor] = {}
        for key in content:
            content[key] = replaced(content[key], (key,), lambda path, tensor: note(found, path, tensor))
        name = self.processes.broadcast(f"step={content['global_step']}-{uuid.uuid4().hex[:12]}")
        self._used.add(name)
        written: dict[str, Any] = {"state_dict": {}, **more}
        if self.processes.global_rank == 0:  # so that what torch's converter makes of it is a file of weights like others
            written["hyper_parameters"] = content["hyper_parameters"]
            written["state_dict"] = {key: value for key, value in content["state_dict"].items() if value is not None}
        for path, tensor in found.items():
            if path[0] == "state_dict":
                written["state_dict"][path[1]] = tensor
            else:
                written[joined(path)] = tensor
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save(written, storage_writer=filesystem.FileSystemWriter(folder, sync_files=True))
        except CheckpointException as error:  # of any process; all get it
            if self.processes.global_rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(f"The sharded tensors could not be written to {folder}: {reason(error)}") from error
        for directory in (folder, self.root) if self.processes.global_rank == 0 else ():
            bring_to_disk(directory)
        places = {joined(path): [list(path), shard_dim(tensor)] for path, tensor in found.items()}
        content[KEY] = {"name": name, "root": os.fspath(self.root.absolute()), "tensors": places}

    def put_back(self, content: dict[str, Any], module: nn.Module) -> dict[str, Tensor]:
        """Puts sharded tensors into a checkpoint that was read, this process's part of them or, where it is alone, all.

        Args:
            content: The checkpoint, changed in place.
            module: The module, sharded.

        Returns:
            What this process gave as ``more`` when they were written.

        Raises:
            MisconfigurationError: They are not there, or are damaged.
        """
        kept = content.pop(KEY)
        folder = next((root / kept["name"] for root in (self.root, Path(kept["root"])) if (root / kept["name"]).is_dir()), None)
        if folder is None:
            raise MisconfigurationError(
                f"The checkpoint's sharded tensors are neither in {self.root / kept['name']} nor in {kept['root']}. Copy that "
                "folder along with the file."
            )
        self._used.add(folder.name)
        reader = SafeReader(folder)
        own = f"{self.processes.global_rank}."
        try:
            known: dict[str, Any] = reader.read_metadata().state_dict_metadata
            placing = Placing(module)
            read: dict[str, Tensor] = {}
            for key, (path, dim) in kept["tensors"].items():
                about = known[key]
                read[key] = placing.template(path, dim, about.size, about.properties.dtype)
            mine = {key: empty(about) for key, about in known.items() if key.startswith(own)}
            alone = self.processes.world_size == 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that one process is alone
                load({**read, **mine}, storage_reader=reader, no_dist=alone)
        except (Exception, CheckpointException) as error:  # what a damaged file makes of its reader is anything
            problem = f"The checkpoint's sharded tensors in {folder} cannot be read: {reason(error)}."
            raise MisconfigurationError(f"{problem} Give another checkpoint.") from error
        for key, (path, _) in kept["tensors"].items():
            owner = content
            for part in path[:-1]:
                owner = owner[part]
            owner[path[-1]] = read[key]
        for share in content["ranks"]:
            share["window"]["gradients"] = content["window"]["gradients"]
        return {key.removeprefix(own): tensor for key, tensor in mine.items()}

    def clear(self, saved: Path) -> None:
        """Removes what no checkpoint refers to any more, once one is on disk.

        Args:
            saved: The checkpoint's file. Others beside it may have gone.
        """
        if not self.root.is_dir():
            return
        folder_of_files = saved.absolute().parent
        referred = {referred_by(path) for path in {saved, *folder_of_files.glob(f"*{SUFFIX}")}}
        for folder in [each for each in self.root.iterdir() if each.is_dir()]:
            owner = Path(text) if (text := owner_of(folder)) else None
            if folder.name in referred:
                if owner is None:
                    (folder / OWNER).write_text(os.fspath(saved.absolute()))
            elif owner is not None:
                # The file itself may have another suffix.
                if owner.parent == folder_of_files and referred_by(owner) != folder.name:
                    shutil.rmtree(folder, ignore_errors=True)
            elif folder.name not in self._used and folder.name not in self._referred_anywhere():
                # Of a run that was killed before its checkpoint was whole.
                shutil.rmtree(folder, ignore_errors=True)

    def _referred_anywhere(self) -> set[str | None]:
        """The folders that files under the trainer's ``default_root_dir`` refer to."""
        return {referred_by(path) for path in self.root.parent.parent.rglob(f"*{SUFFIX}")}


def units(module: nn.Module, kinds: tuple[type[nn.Module], ...] | None) -> list[nn.Module]:
    """The submodules that are sharded each by itself, inner ones first; not those that share weights with others.

    Args:
        module: The module.
        kinds: Their classes; None for the module's children.
    """
    inner = list(module.modules())[1:]
    found = children(module) if kinds is None else [part for part in inner if isinstance(part, kinds)]
    users = Counter(own for part in module.modules() for own in set(part.parameters(recurse=False)))
    chosen = []
    for part in found:
        inside = Counter(own for each in part.modules() for own in set(each.parameters(recurse=False)))
        if inside and all(users[own] == count for own, count in inside.items()):
            chosen.append(part)
    return chosen[::-1]


def children(module: nn.Module) -> list[nn.Module]:
    """A module's children, and those of its lists and dicts of modules, which have no forward of their own."""
    found: list[nn.Module] = []
    for child in module.children():
        found += children(child) if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
    return found


class ShardedProcesses(TorchProcesses):
    """Processes that hold tensors in parts: what one sends to another by itself comes without its parts, as None."""

    def gather(self, value: T) -> list[T]:
        """All ranks' values, on rank zero."""
        return super().gather(without_parts(value))

    def gather_for_all(self, value: T) -> list[T]:
        """All ranks' values, on all ranks."""
        return super().gather_for_all(without_parts(value))


class Placing:
    """How this run's processes hold a module's parameters.

    Args:
        module: The module, sharded or not.
    """

    def __init__(self, module: nn.Module) -> None:
        self.named = {name: each for name, each in module.named_parameters() if isinstance(each, DTensor)}
        self.shapes = {tuple(each.shape): each for each in self.named.values()}

    def like(self, path: Any, shape: Any) -> DTensor | None:
        """The parameter whose parts a tensor's are like: the one that it is named after, or one of its shape; None where
        there is none.

        Args:
            path: The tensor's place in the checkpoint.
            shape: Its shape.
        """
        named = self.named.get(path[-1])
        return named if named is not None and named.shape == shape else self.shapes.get(tuple(shape))

    def template(self, path: Any, dim: int | None, shape: Any, dtype: torch.dtype) -> Tensor:
        """A tensor to read another into.

        Args:
            path: The other's place in the checkpoint.
            dim: The dimension that it was in parts along; None where each process had it whole.
            shape: Its shape.
            dtype: Its type.
        """
        like = self.like(path, shape)
        if like is not None:
            return zeros(*shape, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)
        if dim is None or not self.named:
            return torch.empty(shape, dtype=dtype)
        other = next(iter(self.named.values()))
        placements = [Shard(dim) if each.is_shard() else each for each in other.placements]
        return zeros(*shape, dtype=dtype, device_mesh=other.device_mesh, placements=placements)

    def distribute(self, content: dict[str, Any]) -> None:
        """Gives this process its part of what a run that does not shard has written.

        Args:
            content: The checkpoint, changed in place.
        """
        for key in ("state_dict", "optimizer_states", "window", "callbacks"):
            if key in content:
                content[key] = replaced(content[key], (key,), self._part)

    def _part(self, path: Place, tensor: Tensor) -> Tensor:
        like = self.like(path, tensor.shape) if path[0] == "optimizer_states" else self.named.get(path[-1])
        return tensor if like is None or like.shape != tensor.shape else part_of(tensor, like)


def part_of(tensor: Tensor, like: Tensor) -> DTensor:
    """A tensor that all processes hold, in parts like another's; nothing is sent."""
    assert isinstance(like, DTensor)
    whole = tensor.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def replaced(value: Any, path: Place, by: Callable[[Place, Tensor], Any]) -> Any:
    """A copy of nested containers in which each tensor is replaced; the containers themselves stay as they are.

    Args:
        value: Tensors and plain values in dicts, lists and tuples.
        path: Where it is: keys and indices.
        by: Called with a tensor's path and the tensor.
    """
    if isinstance(value, Tensor):
        return by(path, value)
    if isinstance(value, dict):
        copied = type(value)({key: replaced(item, (*path, key), by) for key, item in value.items()})
        if type(value) is not dict:
            vars(copied).update(vars(value))
        return copied
    if type(value) in (list, tuple):
        return type(value)(replaced(item, (*path, index), by) for index, item in enumerate(value))
    return value


def without_parts(value: T) -> T:
    """A copy of nested values in which tensors that are held in parts are None."""
    copied: T = replaced(value, (), lambda path, tensor: note({}, path, tensor))
    return copied


def note(found: dict[Place, DTensor], path: Place, tensor: Tensor) -> Tensor | None:
    """Notes a tensor that is held in parts, and gives what stays in its place: None. Of others the tensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    if any(isinstance(each, Partial) for each in tensor.placements):
        tensor = tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
    if all(each.is_replicate() for each in tensor.placements):
        return tensor.to_local()
    found[path] = tensor
    return None


def shard_dim(tensor: DTensor) -> int | None:
    """The dimension that a tensor is in parts along."""
    return next((each.dim for each in tensor.placements if isinstance(each, Shard)), None)


def joined(path: Place) -> str:
    """A tensor's name beside others': its path with dots."""
    return ".".join(map(str, path))


def empty(about: Any) -> Tensor:
    """A tensor to read another into, of which this is known."""
    return torch.empty(about.size, dtype=about.properties.dtype)


def referred_by(path: Path) -> str | None:
    """The folder that a checkpoint's sharded tensors are in; None where there is none, or the file cannot be read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return str(content[KEY]["name"])
    except Exception:
        return None


def reason(error: BaseException) -> str:
    """Why tensors could not be written or read, in a line: of several processes what the first says."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return first_line(next((failure for failure, _ in failures.values()), error))


def owner_of(folder: Path) -> str:
    """The checkpoint's file that a folder of sharded tensors belongs to; empty before that is on disk."""
    return (folder / OWNER).read_text() if (folder / OWNER).exists() else ""


def bring_to_disk(directory: Path) -> None:
    """Has a directory's entries on disk when it returns."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(directory, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class SafeReader(filesystem.FileSystemReader):
    """Reads what :func:`torch.distributed.checkpoint.save` wrote. Code in a file is refused, never run: tensors are read by
    ``torch.load(weights_only=True)``, and of the index nothing is made but its own classes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """Reads the index."""
        with open(Path(self.path) / ".metadata", "rb") as file:
            found: metadata.Metadata = SafeUnpickler(file).load()
        assert found.storage_meta is not None
        found.storage_meta.load_id = self.load_id
        return found


class SafeUnpickler(pickle.Unpickler):
    """Makes what the index of sharded tensors consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may name."""
        if module == metadata.__name__ and isinstance(made := vars(metadata).get(name), type) and made.__module__ == module:
            return made
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")


KNOWN: dict[tuple[str, str], Any] = {
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{("pathlib", name): pathlib.PurePath for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")},
}


# ------------------------------------------------------------------ gradients that are not reduced yet
#
# While a window is open torch keeps the sum of its gradients, whole and each process its own, where nobody but itself looks.


def sharded_parts(module: nn.Module) -> list[FSDPModule]:
    """The submodules that are sharded, the module itself included."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def reshard(module: nn.Module) -> None:
    """Frees the weights that torch has gathered and would keep for a backward."""
    for part in sharded_parts(module):
        part.reshard()


def kept_by_torch(module: nn.Module) -> Iterator[Any]:
    """What torch keeps of each sharded parameter."""
    for part in sharded_parts(module):
        state: Any = part._get_fsdp_state()
        # One of them before torch 2.10.
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else filter(None, [state._fsdp_param_group])
        for group in groups:
            yield from group.fsdp_params


def held_gradients(module: nn.Module) -> dict[str, Tensor]:
    """This process's sums of the gradients in an open window, by the parameters' names. Not between forward and backward."""
    reshard(module)
    names = {parameter: name for name, parameter in module.named_parameters()}
    held = {}
    for kept in kept_by_torch(module):
        gradient = kept.unsharded_accumulated_grad
        if gradient is None and hasattr(kept, "_unsharded_param"):
            gradient = kept._unsharded_param.grad
        if gradient is not None:
            held[names[kept.sharded_param]] = gradient
    return held


def hold_gradients(module: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """Has a window go on from such sums, and drops what there is. Not between forward and backward.

    Args:
        module: The module, sharded.
        gradients: The sums by the parameters' names.
    """
    drop_gradients(module)
    reshard(module)
    names = {parameter: name for name, parameter in module.named_parameters()}
    for kept in kept_by_torch(module):
        gradient = gradients.get(names[kept.sharded_param])
        if gradient is not None:
            kept.unsharded_accumulated_grad = gradient.to(kept.sharded_param.device)


def drop_gradients(module: nn.Module) -> None:
    """Drops the gradients of a window that was never closed."""
    for kept in kept_by_torch(module):
        kept.unsharded_accumulated_grad = None
        if hasattr(kept, "_unsharded_param"):
            kept._unsharded_param.grad = None
