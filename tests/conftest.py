"""Settings of all tests: one thread, for speed and for bits that do not depend on the machine."""

from __future__ import annotations

import gc
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fsspec import filesystem  # type: ignore[import-untyped]

# Fixtures of modules come before the one below.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Hide the objects of all imported modules from the garbage collector, which would visit them in each full collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _plain_torch() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test in its own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def store() -> Iterator[str]:
    """Return a folder of fsspec's store in memory that only this test uses."""
    folder = f"memory://{uuid.uuid4().hex}"
    yield folder
    memory = filesystem("memory")
    if memory.exists(folder):
        memory.rm(folder, recursive=True)
