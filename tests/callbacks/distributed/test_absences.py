"""A batch without a loss, in all or in some processes whose layers are sharded: nobody waits forever."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from eventtrain import MisconfigurationError
from eventtrain.callbacks.distributed.absences import Absences
from eventtrain.callbacks.distributed.notices import Notices
from tests.callbacks.distributed.launch import HERE, result, start
from tests.resuming import equal

SCRIPT = HERE / "absent.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["late", "early"])
def test_a_batch_without_a_loss_in_one_process_ends_the_run_in_all(tmp_path: Path, kind: str) -> None:
    start(SCRIPT, tmp_path, kind, options=("--max-restarts", "0"))
    for rank in range(2):
        ended = result(tmp_path, rank)
        _, message, seconds = ended["one"]
        assert "rank 1 has no loss in batch 1 of the run" in message
        assert "return {'loss': 0 * loss, 'weight': 0}" in message
        assert seconds < 30  # of a timeout of 60
        if kind == "late":  # a batch without a loss in all processes is no part of its window, however it came to that
            ends = [ended[name] for name in ("late", "early", "skipped")]
            assert all(error is None for _, error, _ in ends)
            assert equal(ends[1][0], ends[2][0])


# ------------------------------------------------------------------ two processes as two threads


def two(store: HashStore) -> list[Absences]:
    every = [Notices(store, rank, 2, timedelta(seconds=20)) for rank in range(2)]
    absences = [Absences(notices) for notices in every]
    for notices in every:
        notices.open()
    return absences


def outcomes(*actions: Any) -> list[str | None]:
    """Call functions in threads of their own; return their errors."""
    errors: list[str | None] = [None] * len(actions)

    def call(index: int) -> None:
        try:
            actions[index]()
        except MisconfigurationError as error:
            errors[index] = str(error)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return errors


@pytest.mark.parametrize("layers", [0, 2])
def test_processes_that_all_have_no_loss_go_on(layers: int) -> None:
    first, second = two(HashStore())

    def absent(absences: Absences) -> None:
        for batch in range(3):
            absences.begin(batch)
            for _ in range(layers):
                absences.enter_layer()
            absences.wait()
            assert absences.has_settled

    assert outcomes(lambda: absent(first), lambda: absent(second)) == [None, None]


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("how", ["a loss", "more layers"])
def test_a_process_without_a_loss_is_named_in_both(is_first: bool, how: str) -> None:
    first, second = two(HashStore())
    is_there, is_told = threading.Event(), threading.Event()

    def absent() -> None:
        second.begin(4)
        second.enter_layer()
        if not is_first:
            assert is_there.wait(10)
        threading.Timer(0.2, is_told.set).start()
        second.wait()

    def present() -> None:
        first.begin(4)
        if is_first:
            assert is_told.wait(10)
        first.enter_layer()
        first.bring_loss() if how == "a loss" else first.enter_layer()
        is_there.set()
        assert is_told.wait(10)  # in an exchange of torch, as it were
        while first.problem is None:
            pass
        with first.explaining():
            raise RuntimeError("connection closed by peer")

    errors = outcomes(present, absent)
    assert all(error and "rank 1 has no loss in batch 4 of the run" in error for error in errors)


def test_other_errors_stay_as_they_are() -> None:
    first, second = two(HashStore())
    with pytest.raises(RuntimeError, match="of another kind"), first.explaining():
        raise RuntimeError("of another kind")
    assert second.problem is None
