"""The tensors of several processes in one checkpoint: how they write them together, and how any number of processes reads them.

A checkpoint is one file. The archive that ``torch.save`` writes is followed by one entry for each process, with the bytes of
the tensors that it holds. The value ``"shards"`` of the checkpoint lists them: plain values that are checked before they are
used. The archive has a checksum of each entry.
"""

from __future__ import annotations

import errno
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from eventtrain.callbacks.distributed import earlier_shards
from eventtrain.callbacks.distributed.processes import TorchProcesses
from eventtrain.callbacks.distributed.sharded_tensors import (
    Box,
    Place,
    Placement,
    StoredTensor,
    box_of,
    check_boxes,
    collect_shard,
    is_written_here,
    map_tensors,
    shard_dim,
)
from eventtrain.callbacks.distributed.shared_writing import Writers
from eventtrain.checkpoint import storage
from eventtrain.checkpoint.archive import SHARDS
from eventtrain.errors import MisconfigurationError
from eventtrain.paths import AnyPath, RemotePath
from eventtrain.trainer import Trainer

KEY = "shards"
"""The key of a checkpoint under which it lists its sharded tensors."""
PAGE = 4096
"""Each process's bytes begin and end in pages of their own, so that no page of the file is written on two machines."""
ALIGNMENT = 64
"""The bytes of a tensor begin at a multiple of this."""


class ShardedPart(storage.Part):
    """The sharded tensors of a checkpoint, of which each process writes those that it holds.

    Args:
        tensors: The tensors that this process writes, in order.
        index: The list of all tensors, in the first process; None in the others.
        moment: The place in the run, which has to be the same in all processes.
        writers: The processes.
    """

    def __init__(self, tensors: list[Tensor], index: dict[str, Any] | None, moment: Any, writers: Writers) -> None:
        self.tensors, self.index, self.moment, self.writers = tensors, index, moment, writers
        self._others_wait = True

    def copied(self, copy: Callable[[Tensor], Tensor]) -> ShardedPart:
        return ShardedPart([copy(tensor) for tensor in self.tensors], self.index, self.moment, self.writers)

    def __reduce__(self) -> Any:
        raise MisconfigurationError(
            "trainer.collect_checkpoint() does not hold the other processes' tensors, so torch.save cannot write its result. "
            "Call trainer.save_checkpoint(path) in all processes."
        )

    def meet(self) -> None:
        self.writers.meet("the checkpoint of a run that an error ends")

    def write(self, content: Mapping[str, Any], path: Any, before: Any) -> None:
        if path is None:
            self._write_together(None, [])
        else:
            try:
                whole = storage.loadable({**content, KEY: self.index})
                with storage.renamed_to(path, before) as temporary, storage.writing(temporary) as file:
                    storage.save(whole, file)
                    file.flush()
                    self._append(temporary)
            except BaseException as error:
                if self._others_wait:
                    with suppress(OSError):  # the others are gone; this error is the first one
                        self.writers.exchange("the beginning of a checkpoint", problem=error)
                raise
        self.writers.exchange("the end of a checkpoint")

    def _append(self, path: AnyPath) -> None:
        assert self.index is not None
        if isinstance(path, RemotePath) or not os.path.exists(path):
            raise MisconfigurationError("FullyShardedDataParallel writes a checkpoint to a disk that all processes see.")
        with open(path, "r+b") as file, zipfile.ZipFile(file, "a") as archive:
            root = archive.namelist()[0].partition("/")[0]
            # The list of entries is written anew behind them. The first one goes, so that no cut file passes for a whole one.
            before = file.seek(0, os.SEEK_END) - archive.start_dir
            file.seek(archive.start_dir)
            file.write(bytes(before))
            file.flush()
            headers, end = layout(root, self.index["sizes"], archive.start_dir)
            checksums = self._write_together(os.path.abspath(path), [start for _, start in headers])
            for (info, start), checksum in zip(headers, checksums, strict=True):
                info.CRC = checksum
                file.seek(info.header_offset)
                file.write(info.FileHeader(zip64=True))
                assert file.tell() == start
                archive.filelist.append(info)
                archive.NameToInfo[info.filename] = info
            archive.start_dir = end
            archive.writestr(f"{root}{SHARDS}complete", b"")  # with this, the list of entries is written anew

    def _write_together(self, path: str | None, starts: list[int]) -> list[int]:
        """Write this process's tensors; return the checksums of all processes."""
        try:
            moments = self.writers.exchange("the beginning of a checkpoint", (self.moment, path, starts))
            _, path, starts = moments[0]
            if any(moment != self.moment for moment, *_ in moments):
                raise OSError(
                    errno.EIO, f"the processes hold the states of different batches: {[each for each, *_ in moments]}"
                )
            assert path is not None
            return self.writers.work("the writing of a checkpoint", partial(self._write, path, starts[self.writers.rank]))
        except BaseException:
            self._others_wait = False
            raise

    def _write(self, path: str, start: int) -> int:
        checksum = 0
        with open(path, "r+b", opener=storage_opener) as file:
            file.seek(start)
            for tensor in self.tensors:
                data = memoryview(bytes_of(tensor))
                gap = bytes(aligned(file.tell() - start, ALIGNMENT) - (file.tell() - start))
                for piece in (gap, data):
                    checksum = zlib.crc32(piece, checksum)
                    file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        return checksum


def storage_opener(path: str, flags: int) -> int:
    """Open a file that another process has made; fail if it is a symbolic link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def bytes_of(tensor: Tensor) -> Any:
    """Return the bytes of a tensor, in the order of its elements, in the host's memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def aligned(number: int, multiple: int) -> int:
    """Return the next multiple of a number."""
    return -(-number // multiple) * multiple


def layout(root: str, sizes: list[int], end: int) -> tuple[list[tuple[zipfile.ZipInfo, int]], int]:
    """Return for each process the header of its entry and the place of its first byte; and the end of the last entry.

    Args:
        root: The archive's name, with which the names of all entries begin.
        sizes: The number of bytes of each process.
        end: The end of the entries before.
    """
    headers = []
    for rank, size in enumerate(sizes):
        info = zipfile.ZipInfo(f"{root}{SHARDS}{rank}")
        info.file_size = info.compress_size = size
        info.CRC = 0  # until it is known
        start = aligned(end, PAGE) + PAGE
        info.header_offset = start - len(info.FileHeader(zip64=True))
        headers.append((info, start))
        end = start + size
    return headers, end


# ------------------------------------------------------------------ taking tensors out of a checkpoint


def take_out(
    content: dict[str, Any], more: dict[str, Tensor], processes: TorchProcesses, writers: Writers, moment: Any
) -> None:
    """Replace the sharded tensors of a checkpoint by None, and add a part to it that writes them.

    Args:
        content: The checkpoint, changed in place; containers in it stay as they are.
        more: Tensors that only this process holds, by name.
        processes: The processes that hold the tensors.
        writers: The same processes, to write a file.
        moment: The place in the run.
    """
    shards: dict[Place, DTensor] = {}
    for key in content:
        content[key] = map_tensors(content[key], (key,), lambda place, tensor: collect_shard(shards, place, tensor))
    tensors, records, size = [], [], 0
    rank = processes.global_rank
    everything: list[tuple[Place, int | None, Tensor]] = [(place, None, tensor) for place, tensor in shards.items()]
    everything += [((name,), rank, tensor) for name, tensor in more.items()]
    for place, owner, tensor in everything:
        box, part = box_of(tensor), None
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if box.count and (not isinstance(tensor, DTensor) or is_written_here(tensor, place)):
            offset = aligned(size, ALIGNMENT)
            size = offset + local.numel() * local.element_size()
            part = [rank, offset, list(box.offsets), list(box.sizes)]
            tensors.append(local.detach())
        dim = shard_dim(tensor) if isinstance(tensor, DTensor) else None
        records.append((place, owner, dim, list(tensor.shape), tensor.dtype, part))
    gathered = processes.gather((size, records))
    content[KEY] = ShardedPart(tensors, index_of(gathered) if rank == 0 else None, moment, writers)


def index_of(gathered: list[tuple[int, list[Any]]]) -> dict[str, Any]:
    """Return the list of all tensors, from the sizes and records of each process."""
    tensors: dict[Any, dict[str, Any]] = {}
    for _, records in gathered:
        for place, owner, dim, shape, dtype, part in records:
            entry = {"place": list(place), "owner": owner, "dim": dim, "shape": shape, "dtype": dtype, "parts": []}
            entry = tensors.setdefault((place, owner), entry)
            if part is not None:
                entry["parts"].append(part)
    return {"format": 1, "sizes": [size for size, _ in gathered], "tensors": list(tensors.values())}


# ------------------------------------------------------------------ putting them back


def put_back(content: dict[str, Any], path: AnyPath, module: nn.Module, rank: int, root: AnyPath) -> dict[str, Tensor]:
    """Put sharded tensors back into a checkpoint: this process's parts, or whole tensors if the module is not sharded.

    Args:
        content: The checkpoint, changed in place.
        path: Its file.
        module: The module.
        rank: The index of this process.
        root: The directory of the trainer, in which earlier versions kept the tensors.

    Returns:
        The tensors that this process gave as ``more`` when the checkpoint was written.

    Raises:
        MisconfigurationError: If the sharded tensors are missing or damaged.
    """
    index, placement, more = content.pop(KEY), Placement(module, content.get("parameter_groups")), dict[str, Tensor]()
    try:
        with storage.reading(path) as file:
            for each in earlier_shards.tensors(index, path, root) if "name" in index else stored_tensors(index, file):
                if each.owner is None:
                    tensor = placement.allocate(each.place, each.dim, each.shape, each.dtype)
                    each.read_into(tensor)
                    container = content
                    for part in each.place[:-1]:
                        container = container[part]
                    container[each.place[-1]] = tensor
                elif each.owner == rank:
                    more[each.place[-1]] = tensor = torch.zeros(each.shape, dtype=each.dtype)
                    each.read_into(tensor)
        for state in content["ranks"]:
            state["window"]["gradients"] = content["window"]["gradients"]
    except MisconfigurationError:
        raise
    except Exception as error:  # a file that was made by others can make its reader raise anything
        problem = f"The sharded tensors of the checkpoint {path} cannot be read: {storage.first_line(error)}."
        raise MisconfigurationError(f"{problem} Give another checkpoint.") from error
    return more


def stored_tensors(index: Any, file: BinaryIO) -> list[StoredTensor]:
    """Return the tensors that a checkpoint lists. The list is plain data from a file, which anybody may have written.

    Args:
        index: The checkpoint's value ``"shards"``.
        file: The checkpoint's file, opened.

    Raises:
        ValueError: If the list is not of the known shape, or does not fit the bytes in the file.
    """
    check(type(index) is dict and index.get("format") == 1, "their list is of a later version, or damaged")
    sizes, tensors = numbers(index["sizes"]), []
    starts = starts_of_entries(file, sizes)
    used: list[tuple[int, int, int]] = []
    for entry in index["tensors"]:
        place, owner, dim, dtype = entry["place"], entry["owner"], entry["dim"], entry["dtype"]
        check(type(place) is list and place != [] and type(dtype) is torch.dtype, "a tensor has no place or no type")
        check(all(value is None or type(value) is int for value in (owner, dim)), "a tensor has a wrong dimension")
        shape, parts = tuple(numbers(entry["shape"])), list[tuple[Box, Callable[[Box], Tensor]]]()
        for rank, offset, *bounds in entry["parts"]:
            offsets, extent = (tuple(numbers(each)) for each in bounds)
            box = Box(offsets, extent)
            rank, offset = numbers([rank, offset])
            check(rank < len(sizes), f"a tensor is in the bytes of rank {rank}, of {len(sizes)}")
            used.append((rank, offset, offset + box.count * dtype.itemsize))
            parts.append((box, partial(read_rows, file, starts[rank] + offset, box, dtype)))
        check_boxes(shape, [box for box, _ in parts])
        tensors.append(StoredTensor(tuple(place), owner, dim, shape, dtype, parts))
    ends = dict.fromkeys(range(len(sizes)), 0)
    for rank, begin, end in sorted(used):
        check(ends[rank] <= begin and end <= sizes[rank], "two tensors share bytes, or one ends after them")
        ends[rank] = end
    return tensors


def check(is_so: bool, problem: str) -> None:
    """Raise an error if something is not so.

    Raises:
        ValueError: If it is not.
    """
    if not is_so:
        raise ValueError(problem)


def numbers(values: Any) -> list[int]:
    """Return a list of whole numbers that are not negative.

    Raises:
        ValueError: If it is anything else.
    """
    check(type(values) is list and all(type(each) is int and each >= 0 for each in values), "a number is wrong in their list")
    return list(values)


def starts_of_entries(file: BinaryIO, sizes: list[int]) -> list[int]:
    """Return the place of the first byte of each process.

    Raises:
        ValueError: If an entry is missing, or has another size.
    """
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    starts, end = [], file.seek(0, os.SEEK_END)
    for rank, size in enumerate(sizes):
        info = entries.get(f"{SHARDS}{rank}".removeprefix("/"))
        check(info is not None and info.compress_type == zipfile.ZIP_STORED, f"the bytes of rank {rank} are missing")
        assert info is not None
        file.seek(info.header_offset + 26)
        start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        check(info.file_size == size and start + size <= end, f"the bytes of rank {rank} have another size")
        starts.append(start)
    return starts


def read_rows(file: BinaryIO, start: int, box: Box, dtype: torch.dtype, common: Box) -> Tensor:
    """Read a part of a tensor, and return a part of that. Only its rows are read.

    Args:
        file: The file.
        start: The place of the first byte.
        box: The part that was written.
        dtype: The type.
        common: The part to return.
    """
    rows = box
    if box.sizes:
        rows = Box((common.offsets[0], *box.offsets[1:]), (common.sizes[0], *box.sizes[1:]))
        start += (common.offsets[0] - box.offsets[0]) * (box.count // box.sizes[0]) * dtype.itemsize
    file.seek(start)
    data = bytearray(file.read(rows.count * dtype.itemsize))
    return common.of(torch.frombuffer(data, dtype=dtype).reshape(rows.sizes), rows)


def refuse_remote_places(trainer: Trainer) -> None:
    """Refuse a remote place for checkpoints, because all processes write to one file.

    Raises:
        MisconfigurationError: If the trainer's directory, or that of a callback that writes checkpoints, is remote.
    """
    keeping = [callback for callback in trainer.callbacks if hasattr(callback, "on_take_checkpoint")]
    places = {f"{type(each).__name__}(dirpath=": getattr(each, "dirpath", None) for each in keeping}
    for argument, place in {"Trainer(default_root_dir=": trainer.root, **places}.items():
        if isinstance(place, RemotePath):
            raise MisconfigurationError(
                f"{argument}{str(place)!r}): FullyShardedDataParallel writes each process's tensors to one file. Give a folder "
                "that all processes see, and copy the file to the store afterwards."
            )
