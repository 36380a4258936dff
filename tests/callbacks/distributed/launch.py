"""Start a script in several processes, as the tests of this room do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
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
        The printed lines. If the processes do not end in time, the test fails with these.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *options]
    command = [sys.executable, *(torchrun if processes > 1 else []), *map(str, arguments)]
    code, printed, errors = run_in_time(command, environment, timeout)
    if code is None:
        pytest.fail(f"{' '.join(map(str, arguments))} did not end in {timeout} s:\n{printed[-2000:]}\n{errors[-8000:]}")
    assert code == 0, errors[-8000:]
    return printed


def run_in_time(command: list[Any], environment: dict[str, str], timeout: float) -> tuple[int | None, str, str]:
    """Run a program, and end it and the processes that it has started if it takes too long.

    Args:
        command: The program and its arguments.
        environment: The variables of its environment.
        timeout: The longest time that it may take, in seconds.

    Returns:
        Its exit code, or None if it has taken too long; what it has printed; its errors.
    """
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            printed, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return None, *process.communicate(timeout=20)
    return process.returncode, printed, errors


def result(folder: Path, name: Any) -> Any:
    """Return the results that a process saved: the file of a rank, or ``"single"``."""
    return torch.load(folder / f"{name}.pt", weights_only=False)
