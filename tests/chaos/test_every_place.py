"""Runs that are killed at each of their places and resumed leave the files, the logs and the bits of a run that went through.

If ``make chaos`` runs them, they kill at every place. If the test suite does, at a sample that is always the same.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.chaos.harness import Tally, every_place, kill_at, run_through, sample_of_pairs, sample_of_places
from tests.chaos.kinds import KINDS

EVERYWHERE = "CHAOS_KILLS" in os.environ  # make chaos
WRITES = int(os.environ.get("CHAOS_WRITES", "1"))  # one in so many of the writes of a file
SAMPLE = 3  # of each kind of run, in the test suite: with one more, and a pair, some 190 kills in a minute

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")]


def report(tally: Tally, name: str) -> None:
    print(f"{name}: {tally.kills} kills, {tally.resumed} of them left other files and were resumed")
    assert not tally.failures, f"{len(tally.failures)} of {tally.kills}:\n" + "\n".join(tally.failures[:12])
    assert tally.kills > 0


@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_is_killed_anywhere_leaves_the_files_of_one_that_was_not(tmp_path: Path, name: str) -> None:
    kinds = run_through(name, tmp_path / "straight")
    places = every_place(kinds, WRITES) if EVERYWHERE else sample_of_places(kinds, SAMPLE, seed=len(name))
    report(kill_at(name, tmp_path, places, tmp_path / "straight"), name)


@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_is_killed_twice_leaves_the_files_of_one_that_was_not(tmp_path: Path, name: str) -> None:
    kinds = run_through(name, tmp_path / "straight")
    pairs = sample_of_pairs(kinds, 60 if EVERYWHERE else 1, seed=len(name))
    report(kill_at(name, tmp_path, pairs, tmp_path / "straight"), name)
