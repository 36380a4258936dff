"""The checkpoint benchmark, with a model of a million parameters: each way to save takes its turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import checkpoint


def test_each_way_to_save_is_timed_once_per_repetition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    times = checkpoint.measure(1_000_000, repetitions=1)
    assert {kind: len(seconds) for kind, seconds in times.items()} == dict.fromkeys(checkpoint.KINDS, 1)
    assert min(min(seconds) for seconds in times.values()) > 0
    assert list(tmp_path.iterdir()) == []
