"""How a process joins the others, and which device it gets."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from eventtrain import MisconfigurationError
from eventtrain.callbacks import DistributedDataParallel, FullyShardedDataParallel
from eventtrain.callbacks.distributed.processes import ENVIRONMENT, TorchProcesses, device_of_process, join
from tests.kit import FakeProcesses


def test_joining_needs_every_variable_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert join(torch.device("cpu")) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(MisconfigurationError, match=r"LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set.*torchrun"):
        join(torch.device("cpu"))


def test_each_process_has_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of_process(torch.device("cuda", 0), 1) == torch.device("cuda", 1) == chosen[0]
    with pytest.raises(MisconfigurationError, match=r"LOCAL_RANK=2, but torch sees 2 CUDA devices.*--nproc-per-node 2"):
        device_of_process(torch.device("cuda", 0), 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # it only sees its own
    assert device_of_process(torch.device("cuda", 0), 3) == torch.device("cuda", 0)
    with pytest.raises(MisconfigurationError, match="the trainer's device is 'mps'"):
        device_of_process(torch.device("mps"), 0)


@pytest.mark.parametrize("kind", [DistributedDataParallel, FullyShardedDataParallel])
@pytest.mark.parametrize("timeout", [0, -1.0, True, "10", float("inf"), float("nan")])
def test_a_timeout_has_to_be_a_time(kind: Any, timeout: Any) -> None:
    message = re.escape(f"{kind.__name__}(timeout={timeout!r}): give a finite number above 0, in seconds; or a timedelta")
    with pytest.raises(MisconfigurationError, match=message):
        kind(timeout=timeout)


def test_the_tests_fake_has_all_methods_of_the_processes() -> None:
    """So that it can take their place, and a new method breaks no other test."""
    names = {name for name in dir(TorchProcesses) if not name.startswith("_")}
    assert names <= set(dir(FakeProcesses()))
