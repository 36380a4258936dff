"""What all tests share: one thread, for speed and for bits that do not depend on the machine."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _plain_torch() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
