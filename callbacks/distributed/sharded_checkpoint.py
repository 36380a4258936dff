"""The folders of sharded tensors: how the processes of a run write them, and how another number of processes reads them."""

from __future__ import annotations

import os
import pathlib
import pickle
import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from eventtrain._torch import index_parts
from eventtrain.callbacks.distributed.sharded_tensors import (
    Place,
    Placement,
    collect_shard,
    dotted,
    map_tensors,
    shard_dim,
)
from eventtrain.checkpoint.storage import first_line, without_tensors
from eventtrain.distributed import Processes
from eventtrain.errors import MisconfigurationError
from eventtrain.paths import AnyPath, RemotePath, check_path
from eventtrain.trainer import Trainer

KEY = "shards"
"""The key of a checkpoint under which it names its sharded tensors; also the name of the folder that holds them."""
OWNER = "checkpoint"
"""The name of the file, beside the sharded tensors, that names the checkpoint that they belong to."""
CHECKPOINTS = "*.ckpt"
"""The pattern of files that are searched for references to sharded tensors."""


class Shards:
    """A folder that holds one folder of sharded tensors for each checkpoint. Only one run at a time may write there.

    Args:
        root: The folder.
        processes: The processes that hold the tensors.

    Attributes:
        used: The names of the folders that this run has written or read.
    """

    def __init__(self, root: AnyPath, processes: Processes) -> None:
        self.root: Any = root
        self.processes = processes
        self.used: set[str] = set()

    def take_out(self, content: dict[str, Any], more: Mapping[str, Tensor]) -> None:
        """Move the sharded tensors of a checkpoint to a new folder. They are on disk when this returns.

        Args:
            content: The checkpoint, changed in place; containers in it stay as they are.
            more: Tensors that only this process holds, by names that no other process uses.

        Raises:
            OSError: If they cannot be written.
        """
        shards: dict[Place, DTensor] = {}
        for key in content:
            content[key] = map_tensors(content[key], (key,), lambda place, tensor: collect_shard(shards, place, tensor))
        name = self.processes.broadcast(f"step={content['global_step']}-{uuid.uuid4().hex[:12]}")
        self.used.add(name)
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            written = {**self._like_a_file_of_weights(content, shards), **more}
            save(written, storage_writer=filesystem.FileSystemWriter(folder, sync_files=True))
        except CheckpointException as error:  # an error of one process reaches all of them
            if self.processes.global_rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(f"The sharded tensors could not be written to {folder}: {reason(error)}") from error
        for directory in (folder, self.root) if self.processes.global_rank == 0 else ():
            bring_to_disk(directory)
        places = {dotted(place): [list(place), shard_dim(tensor)] for place, tensor in shards.items()}
        content[KEY] = {"name": name, "root": os.fspath(self.root.absolute()), "tensors": places}

    def _like_a_file_of_weights(self, content: dict[str, Any], shards: dict[Place, DTensor]) -> dict[str, Any]:
        """Return the tensors to write, in a form that torch's converter turns into an ordinary file of weights."""
        written: dict[str, Any] = {"state_dict": {}}
        if self.processes.global_rank == 0:
            written |= {key: content[key] for key in ("hyper_parameters", "hparams_name", "hparams_type") if key in content}
            written["state_dict"] = {key: value for key, value in content["state_dict"].items() if value is not None}
        for place, tensor in shards.items():
            if place[0] == "state_dict":
                written["state_dict"][place[1]] = tensor
            else:
                written[dotted(place)] = tensor
        return written

    def put_back(self, content: dict[str, Any], module: nn.Module) -> dict[str, Tensor]:
        """Put sharded tensors back into a checkpoint: this process's parts, or whole tensors if it is the only process.

        Args:
            content: The checkpoint, changed in place.
            module: The module, sharded.

        Returns:
            The tensors that this process gave as ``more`` when the checkpoint was written.

        Raises:
            MisconfigurationError: If the sharded tensors are missing or damaged.
        """
        index = content.pop(KEY)
        name, places = index["name"], index["tensors"]
        folder = next((root / name for root in (self.root, Path(index["root"])) if (root / name).is_dir()), None)
        if folder is None:
            raise MisconfigurationError(
                f"The checkpoint's sharded tensors are neither in {self.root / name} nor in {index['root']}. Copy that "
                "folder along with the file."
            )
        self.used.add(folder.name)
        try:
            tensors, more = self._read(folder, places, Placement(module, content.get("parameter_groups")))
        except (Exception, CheckpointException) as error:  # a damaged file can make its reader raise anything
            problem = f"The checkpoint's sharded tensors in {folder} cannot be read: {reason(error)}."
            raise MisconfigurationError(f"{problem} Give another checkpoint.") from error
        for key, (place, _) in places.items():
            container = content
            for part in place[:-1]:
                container = container[part]
            container[place[-1]] = tensors[key]
        for state in content["ranks"]:
            state["window"]["gradients"] = content["window"]["gradients"]
        return more

    def _read(self, folder: Path, places: dict[str, Any], placement: Placement) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Read from a folder the tensors that ``places`` names, and the tensors that only this process gave."""
        reader = SafeReader(folder)
        descriptions: dict[str, Any] = reader.read_metadata().state_dict_metadata
        tensors: dict[str, Tensor] = {}
        for key, (place, dim) in places.items():
            description = descriptions[key]
            tensors[key] = placement.allocate(place, dim, description.size, description.properties.dtype)
        prefix = f"{self.processes.global_rank}."
        more = {
            key: torch.empty(description.size, dtype=description.properties.dtype)
            for key, description in descriptions.items()
            if key.startswith(prefix)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns if there is only one process
            load({**tensors, **more}, storage_reader=reader, no_dist=self.processes.world_size == 1)
        return tensors, {key.removeprefix(prefix): tensor for key, tensor in more.items()}

    def clear(self, saved: AnyPath) -> None:
        """Remove folders that no checkpoint refers to any more.

        Args:
            saved: The file of a checkpoint that was just written. Others beside it may have been removed.
        """
        if not self.root.is_dir():
            return
        folder_of_files: Any = saved.absolute().parent
        referred = {referred_by(path) for path in {saved, *folder_of_files.glob(CHECKPOINTS)}}
        for folder in [each for each in self.root.iterdir() if each.is_dir()]:
            owner = check_path(text, "FullyShardedDataParallel", OWNER) if (text := owner_of(folder)) else None
            if folder.name in referred:
                if owner is None:
                    (folder / OWNER).write_text(str(saved.absolute()))
            elif owner is not None:
                # The owner may have another suffix, so it was not among the files above.
                if owner.parent == folder_of_files and referred_by(owner) != folder.name:
                    shutil.rmtree(folder, ignore_errors=True)
            elif folder.name not in self.used and folder.name not in self._referred_anywhere():
                # From a run that was killed before its checkpoint was complete.
                shutil.rmtree(folder, ignore_errors=True)

    def _referred_anywhere(self) -> set[str | None]:
        """Return the folders that files under the trainer's ``default_root_dir`` refer to."""
        return {referred_by(path) for path in self.root.parent.parent.rglob(CHECKPOINTS)}


def refuse_remote_places(trainer: Trainer) -> None:
    """Refuse a remote place for checkpoints, because torch writes sharded tensors to a folder.

    Raises:
        MisconfigurationError: If the trainer's directory, or that of a callback that writes checkpoints, is remote.
    """
    keeping = [callback for callback in trainer.callbacks if hasattr(callback, "on_take_checkpoint")]
    places = {f"{type(each).__name__}(dirpath=": getattr(each, "dirpath", None) for each in keeping}
    for argument, place in {"Trainer(default_root_dir=": trainer.root, **places}.items():
        if isinstance(place, RemotePath):
            raise MisconfigurationError(
                f"{argument}{str(place)!r}): FullyShardedDataParallel writes each process's tensors to a folder. Give one that "
                "all processes see, and copy it to the store afterwards."
            )


def referred_by(path: AnyPath) -> str | None:
    """Return the name of the folder that holds a checkpoint's sharded tensors; None if the file names none, or is damaged."""
    try:
        return str(without_tensors(path)[KEY]["name"])
    except Exception:
        return None


def reason(error: BaseException) -> str:
    """Return in one line why tensors could not be written or read: the first of several processes' errors."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return first_line(next((failure for failure, _ in failures.values()), error))


def owner_of(folder: Path) -> str:
    """Return the checkpoint's file that a folder of sharded tensors belongs to; empty before that file is on disk."""
    return (folder / OWNER).read_text() if (folder / OWNER).exists() else ""


def bring_to_disk(directory: Path) -> None:
    """Wait until a directory's entries are on disk."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(directory, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ------------------------------------------------------------------ reading without running code


class SafeReader(filesystem.FileSystemReader):
    """Read tensors that :func:`torch.distributed.checkpoint.save` wrote, without running code that a file may hold.

    Tensors are read by ``torch.load(weights_only=True)``, and the index may only name the classes that it consists of.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """Read the index."""
        with open(Path(self.path) / ".metadata", "rb") as file:
            index: metadata.Metadata = SafeUnpickler(file).load()
        assert index.storage_meta is not None
        index.storage_meta.load_id = self.load_id
        return index


class SafeUnpickler(pickle.Unpickler):
    """Read the index of sharded tensors, and refuse any class or function that is not part of such an index."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class or function that the index names.

        Raises:
            UnpicklingError: If it is not part of an index.
        """
        if module == metadata.__name__ and isinstance(made := vars(metadata).get(name), type) and made.__module__ == module:
            return made
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")


KNOWN: dict[tuple[str, str], Any] = {
    **index_parts(),
    **{("pathlib", name): pathlib.PurePath for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")},
}
