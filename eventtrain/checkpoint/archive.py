"""Verify the archive that a checkpoint is, before torch reads it."""

from __future__ import annotations

import zipfile
from typing import BinaryIO

from eventtrain.checkpoint.weights import some

SHARDS = "/shards/"
"""The names of a file's entries that hold the tensors of several processes begin with the archive's name and this."""
TWICE = "two of its entries have one name"


def verify_checksums(file: BinaryIO, share: tuple[int, int] = (0, 1)) -> None:
    """Read a file and compare the checksum of each of its parts; :func:`torch.load` does not do it for tensors.

    Args:
        file: The file.
        share: As in :func:`~eventtrain.checkpoint.storage.read`.

    Raises:
        ValueError: If a part is damaged.
    """
    if file.read(4) == b"PK\3\4":  # else it is in an older format, or no checkpoint: torch.load will tell
        with zipfile.ZipFile(file) as parts:
            entries = parts.infolist()
            shards = [each for each in entries if SHARDS in each.filename]
            parts.filelist = [each for each in entries if SHARDS not in each.filename] + shards[share[0] :: share[1]]
            damaged = parts.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} has another checksum than when it was written")
        # torch reads nothing for an entry that is marked as a folder, and the memory of its tensor stays as it was.
        marked = [each.filename for each in entries if each.flag_bits & ~0x808 or each.external_attr & 0xFFFF]
        if marked or len({each.filename.lower() for each in entries}) < len(entries):
            raise ValueError(f"the entries {some(marked)} have attributes that torch does not write" if marked else TWICE)
    file.seek(0)
