"""A process that fails, is killed, leaves or is late: the others end with an error that names it and the exchange."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.callbacks.distributed.launch import HERE, ROOT, run_in_time, start

WRONG = "ValueError: the numbers are wrong"
CALL_IT = "All processes have to call it: not under `if trainer.is_global_zero:`"

FAILS: dict[str, tuple[int, str, str]] = {
    "training_step": (1, rf"{WRONG} \(raised in Net.training_step \(epoch 0, batch 2\)\)", ""),
    "callback": (1, WRONG, ""),
    "loader": (1, r"ValueError: sample 5 is damaged \(raised in the train loader \(epoch 0, batch 2\)\)", ""),
    "worker": (1, "ValueError: sample 5 is damaged", ""),
    "validation": (1, rf"{WRONG} \(raised in Net.validation_step \(epoch 0, batch 2, loader 0\)\)", ""),
    "backward": (1, WRONG, "the reduction of gradients in the backward"),
    "exit": (1, "SystemExit: 3", ""),
    "interrupt": (1, "KeyboardInterrupt", ""),
    "fsdp": (1, WRONG, "gathering the weights of a unit"),
    "caught": (1, WRONG, ""),
}
"""By case the rank that fails, its error as the other one tells it, and the exchange in which that one waits."""

GONE = {"kill": (1, ""), "kill_zero": (0, ""), "fsdp_kill": (1, "gathering the weights of a unit")}

ALONE = {
    "save": r"Trainer.save_checkpoint\(\), called by save \(failing.py, line \d+\)",
    "save_at_the_end": r"Trainer.save_checkpoint\(\), called by save \(failing.py, line \d+\)",
    "save_after_the_fit": r"Trainer.save_checkpoint\(\), called by save \(failing.py, line \d+\)",
    "barrier": r"trainer.processes.barrier\(\), called by <lambda> \(failing.py, line \d+\)",
    "barrier_at_the_end": r"trainer.processes.barrier\(\), called by <lambda> \(failing.py, line \d+\)",
    "log": r"LightningModule.log\(\), called by log \(failing.py, line \d+\)",
    "test": r"the beginning of Trainer.test\(\), called by <lambda>",
    "validate": r"the beginning of Trainer.validate\(\), called by <lambda>",
    "fit": r"the beginning of Trainer.fit\(\), called by <lambda>",
    "ended": r"the beginning of Trainer.test\(\), called by after_the_fit",
}
"""Exchanges that only rank zero begins."""

LATE = {"late": "", "late_in_an_exchange": r"Trainer.save_checkpoint\(\), called by save"}
PATIENT = ("slow_checkpoint", "slow_save", "slow_prepare")
LONGEST = 300.0  # seconds
FAST = ("training_step", "backward", "kill", "fsdp", "save", "log", "ended", "slow_checkpoint")
"""The cases that are not slow: one of each kind."""


def cases(names: Any) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


class Groups:
    """The results of the groups of two processes, each of which ran one case.

    Args:
        folder: The folder of the results.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: set[str] = set()

    def of(self, case: str) -> tuple[list[str], list[float]]:
        """Return the errors of both ranks in a case, and the seconds after which each ended. Starts it with its likes."""
        if case not in self.started:
            names = (
                FAST
                if case in FAST
                else (*FAILS, *GONE, *ALONE, *LATE, *PATIENT, "after_the_fit", "alone", "checkpoint", "shapes")
            )
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            new = [name for name in names if name not in self.started]
            code, _, text = run_in_time([sys.executable, HERE / "failing.py", self.folder, *new], environment, LONGEST)
            late = [name for name in new if not all((self.folder / f"{name}-{rank}.status").exists() for rank in range(2))]
            logs = "\n".join(self.log(name, rank) for name in late for rank in range(2))
            assert code == 0 and not late, f"{late} did not end in {LONGEST} s:\n{logs}\n{text}"
            self.started.update(new)
        texts = []
        for rank in range(2):
            path = self.folder / f"{case}-{rank}.txt"
            texts.append(path.read_text() if path.exists() else "0\nkilled")
            # A process that is aborted while it ends hides its error.
            assert (self.folder / f"{case}-{rank}.status").read_text() in ("0", "1", "3", "-9"), self.log(case, rank)
        return [text.partition("\n")[2] for text in texts], [float(text.partition("\n")[0]) for text in texts]

    def log(self, case: str, rank: int) -> str:
        path = self.folder / f"{case}-{rank}.log"
        return f"{path.name}: {path.read_text()[-3000:] if path.exists() else 'not begun'}"


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Groups:
    return Groups(tmp_path_factory.mktemp("failures"))


@pytest.mark.parametrize("case", cases(FAILS))
def test_the_others_say_which_rank_failed_with_which_error_and_where_they_waited(groups: Groups, case: str) -> None:
    rank, error, exchange = FAILS[case]
    errors, seconds = groups.of(case)
    other = 1 - rank
    where = re.escape(exchange) or r"\S.*"
    assert re.match(
        rf"ExchangeError: Rank {rank} has failed with {error}.* Rank {other} waited for it in {where}", errors[other]
    )
    assert "ExchangeError" not in errors[rank]
    assert seconds[other] < 45  # not after the timeout, of 60 seconds


@pytest.mark.parametrize("case", cases(GONE))
def test_the_others_say_which_rank_is_gone(groups: Groups, case: str) -> None:
    rank, exchange = GONE[case]
    errors, seconds = groups.of(case)
    assert errors[rank] == "killed"
    assert errors[1 - rank].startswith(f"ExchangeError: Rank {rank} is gone: no error was reported and no answer comes")
    assert f"Rank {1 - rank} waited in {exchange}" in errors[1 - rank]
    assert seconds[1 - rank] < 45


@pytest.mark.parametrize("case", cases(ALONE))
def test_an_exchange_that_not_all_take_part_in_ends_soon_with_an_error_that_says_so(groups: Groups, case: str) -> None:
    errors, seconds = groups.of(case)
    assert re.search(ALONE[case], errors[0]) and CALL_IT in errors[0] and "rank 1" in errors[0].lower()
    assert seconds[0] < 45
    if errors[1] != "no error":  # it was still in its run
        assert re.search(ALONE[case], errors[1])


@pytest.mark.parametrize("case", cases(["after_the_fit"]))
def test_an_error_of_a_rank_between_two_runs_is_named_by_the_next_run_of_the_others(groups: Groups, case: str) -> None:
    errors, _ = groups.of(case)
    assert f"Rank 1 has ended its program with {WRONG}. Rank 0 waited for it in the beginning of Trainer.test()" in errors[0]


@pytest.mark.parametrize("case", cases(["shapes"]))
def test_values_that_do_not_fit_together_are_an_error_of_all_ranks(groups: Groups, case: str) -> None:
    errors, _ = groups.of(case)
    for rank, error in enumerate(errors):
        assert re.search(rf"rank {rank} in trainer.processes.reduce.*\(reduce sum torch.float32 \[{rank + 1}\], number", error)


@pytest.mark.parametrize("case", cases(["checkpoint"]))
def test_a_checkpoint_that_cannot_be_written_is_an_error_of_all_ranks(groups: Groups, case: str) -> None:
    errors, _ = groups.of(case)
    assert all("No space left on device" in error and "gloo" not in error for error in errors)


@pytest.mark.parametrize("case", cases(["alone"]))
def test_a_rank_that_never_joins_is_named(groups: Groups, case: str) -> None:
    errors, _ = groups.of(case)
    assert (
        errors[0].startswith("ExchangeError: Rank 1 is missing: rank 0 has waited 2 s for the 2 processes")
        and CALL_IT in errors[0]
    )


@pytest.mark.parametrize("case", cases(LATE))
def test_after_the_timeout_the_error_names_the_exchange_the_rank_and_its_place(groups: Groups, case: str) -> None:
    errors, _ = groups.of(case)
    late = r"rank 0 has waited 2 s for rank 1: it is in be_late \(failing.py, line \d+\) \(epoch \d, batch \d\)"
    assert re.match(rf"ExchangeError: {LATE[case]}.*: {late}", errors[0])
    assert errors[1].startswith("ExchangeError: Rank 0 has failed with ExchangeError: ")


@pytest.mark.parametrize("case", cases(PATIENT))
def test_a_checkpoint_or_a_preparation_that_takes_longer_than_the_timeout_ends_no_run(groups: Groups, case: str) -> None:
    errors, seconds = groups.of(case)
    assert errors == ["no error", "no error"]
    assert min(seconds) > 4  # the timeout is two seconds, and the write takes five


@pytest.mark.slow
def test_torchrun_reports_the_error_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as error:
        start(HERE / "failing.py", tmp_path, "training_step")
    _, _, first = str(error.value).partition("Root Cause (first observed failure)")
    assert "rank      : 1 " in first and WRONG in first
    assert "raised in Net.training_step (epoch 0, batch 2)" in first
