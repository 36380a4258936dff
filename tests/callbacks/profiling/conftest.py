"""The clock of the timeline's tests."""

from __future__ import annotations

import pytest

from tests.callbacks.profiling.timelines import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()
