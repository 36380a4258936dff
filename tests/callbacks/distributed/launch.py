"""Start a script in several processes, as the tests of this room do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def start(*arguments: Any, options: tuple[str, ...] = (), processes: int = 2, timeout: float = 240) -> str:
    """Start a script under torchrun, or in one plain process, and wait until it ends.

    Args:
        *arguments: The script and its arguments.
        options: Options of torchrun.
        processes: The number of processes.
        timeout: The longest time to wait, in seconds.

    Returns:
        The printed lines.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *options]
    command = [sys.executable, *(torchrun if processes > 1 else []), *map(str, arguments)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            printed, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes
            raise
    assert process.returncode == 0, errors[-8000:]
    return printed


def result(folder: Path, name: Any) -> Any:
    """Return the results that a process saved: the file of a rank, or ``"single"``."""
    return torch.load(folder / f"{name}.pt", weights_only=False)
