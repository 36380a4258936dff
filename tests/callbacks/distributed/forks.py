"""Run functions in groups of processes that are forked from one, so that torch is imported once for all of them."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GROUP_TIMEOUT = timedelta(seconds=60)
LIMIT = 150.0
"""The longest time that a group may take, in seconds: longer than its exchanges wait, so that their errors are seen."""


def in_processes(count: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Run a function in each of several processes, which form a process group, and return its results by rank.

    This process must not have used threads or other groups before: a fork keeps neither.

    Args:
        count: The number of processes; a single one forms no group.
        function: The function.
        folder: An empty place for the results and the rendezvous.
        *arguments: Its arguments.
    """
    meeting = folder / f"meeting-{len(list(folder.glob('meeting-*')))}"
    meeting.mkdir()
    children = []
    for rank in range(count):
        if (child := os.fork()) == 0:
            os._exit(_run(rank, count, function, meeting, arguments))
        children.append(child)
    codes = wait(children, LIMIT)
    assert not any(codes), f"{function.__name__} of {arguments} ended with {codes} in {count} processes"
    return [torch.load(meeting / f"{rank}.pt", weights_only=False) for rank in range(count)]


def wait(children: list[int], seconds: float) -> list[int]:
    """Wait for processes, and end those that take too long; return their exit codes.

    Args:
        children: The processes.
        seconds: The longest time to wait.
    """
    deadline = time.monotonic() + seconds
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children]


def _run(rank: int, count: int, function: Callable[..., Any], meeting: Path, arguments: Any) -> int:
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
        if count > 1:
            address = f"file://{meeting / 'store'}"
            dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count, timeout=GROUP_TIMEOUT)
        torch.save(function(*arguments), meeting / f"{rank}.pt")
        if count > 1:
            dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
