"""Write a checkpoint of several processes anew, with whole tensors, as one process writes it.

``python -m eventtrain.callbacks.distributed.whole_checkpoint FILE NEW_FILE``
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from eventtrain.callbacks.distributed.sharded_checkpoint import KEY, put_back
from eventtrain.checkpoint import storage
from eventtrain.errors import MisconfigurationError
from eventtrain.paths import AnyPath, check_path


def make_whole(path: AnyPath, new: AnyPath) -> None:
    """Write a checkpoint anew, with whole tensors. It can be read without the callback that shards them.

    Args:
        path: The checkpoint.
        new: The new file.

    Raises:
        MisconfigurationError: If the checkpoint cannot be read, or holds no sharded tensors.
        OSError: If the file cannot be written.
    """
    content = storage.read(path)
    if KEY not in content:
        raise MisconfigurationError(f"{path} holds no sharded tensors. Its tensors are whole already.")
    # A process of another rank than any that wrote: gradients that one process holds in an open window are left out.
    put_back(content, path, nn.Module(), rank=-1, root=Path(str(path)).parent)
    storage.write(content, new)


def main() -> None:
    """Read the command line, and write the file."""
    parser = argparse.ArgumentParser(description="Write a checkpoint of several processes anew, with whole tensors.")
    parser.add_argument("file", help="the checkpoint")
    parser.add_argument("new_file", help="the file to write")
    arguments = parser.parse_args()
    make_whole(*(check_path(each, "whole_checkpoint", "file") for each in (arguments.file, arguments.new_file)))


if __name__ == "__main__":
    main()
