"""A training process is killed again and again, at the worst moments too, and ends with the bits of one that never was.

``make chaos`` kills 200 times; the test suite 25 times.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from eventtrain.checkpoint import storage
from tests.chaos.train import RENAMING, TRAINING, VALIDATING, WINDOW, WRITING
from tests.resuming import assert_same

SCRIPT = Path(__file__).with_name("train.py")
KILLS = int(os.environ.get("CHAOS_KILLS", "25"))
PHASES = {WINDOW: "an open window", VALIDATING: "a validation", WRITING: "a write", RENAMING: "before a rename"}
EPOCHS = 8 + 3 * KILLS // 4  # long enough for this many kills
LONGEST = 600.0  # seconds that a process may take
MOST_BATCHES = 12  # that a process trains before it is killed: more than there are between two checkpoints


class Process:
    """A training process, and the phase that it reports.

    Args:
        root: Its directory.
        in_background: Whether its checkpoints are written in the background.
    """

    def __init__(self, root: Path, *, in_background: bool) -> None:
        marks = root / "marks"
        marks.write_bytes(bytes(8))
        with open(marks, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8)
        command: list[str | Path] = [sys.executable, SCRIPT, root, str(EPOCHS), "--marks", marks]
        self.output = root / f"output-{time.monotonic_ns()}.txt"  # one each: workers of a killed process write to the end
        self._log = open(self.output, "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, *["--in-background"] * in_background], stdout=self._log, stderr=self._log, start_new_session=True
        )

    @property
    def phase(self) -> int:
        return self._memory[0]

    @property
    def batches(self) -> int:
        return int.from_bytes(self._memory[1:5], "little")

    def _is_in(self, phase: int | None) -> bool:
        return self.phase in (PHASES if phase is None else (phase,))

    def kill_at(self, phase: int | None, batches: int, delay: float) -> int | None:
        """Kill the process.

        Args:
            phase: The phase to kill it in; None for any of them.
            batches: The number of batches that it trains before.
            delay: Seconds between the start of the phase and the kill.

        Returns:
            The phase that it was killed in; None if it had ended before.
        """
        self._memory[6] = batches
        self._memory[5] = phase or 0
        deadline = time.monotonic() + LONGEST
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                self.process.kill()
                pytest.fail(f"the process did not end in {LONGEST} s: {self.output.read_text()[-3000:]}")
            if self.batches >= batches and self._is_in(phase):
                time.sleep(delay)
                # It is stopped first, because the phase may be over by now.
                self.process.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                if self._is_in(phase):
                    break
                self.process.send_signal(signal.SIGCONT)
            time.sleep(0.001)
        self.process.kill()
        status = self.process.wait()
        self._log.close()
        return self.phase if status == -signal.SIGKILL else None


def logged(path: str) -> list[dict[str, Any]]:
    """Return a log's lines, without the time of day."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def scalars(directory: str) -> dict[str, list[tuple[int, float]]]:
    """Return the values of each tag that TensorBoard shows of a run, in order."""
    events = EventAccumulator(directory, size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    straight, chaos = tmp_path / "straight", tmp_path / "chaos"
    straight.mkdir()
    chaos.mkdir()
    undisturbed = subprocess.Popen([sys.executable, SCRIPT, straight, str(EPOCHS)])
    rng = random.Random(KILLS)
    killed_in = Counter[int]()
    wanted: list[int | None] = [None, *PHASES]
    while killed_in.total() < KILLS:
        number = killed_in.total()
        process = Process(chaos, in_background=number % 2 == 1)
        at = process.kill_at(wanted[number % len(wanted)], rng.randrange(MOST_BATCHES), rng.choice([0.0, 0.003 * rng.random()]))
        ended = f"ended without a kill after {number} kills with status {process.process.returncode}"
        assert at is not None, f"{ended}: {process.output.read_text()[-3000:]}"
        process.output.unlink()
        killed_in[at] += 1
        for path in (chaos / "checkpoints").glob("*.ckpt"):
            storage.read(path)  # is whole
    command: list[str | Path] = [sys.executable, SCRIPT, chaos, str(EPOCHS)]
    last = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST)
    assert last.returncode == 0, last.stderr
    assert undisturbed.wait(LONGEST) == 0

    print({PHASES.get(phase, "training"): count for phase, count in killed_in.items()})
    for phase, description in PHASES.items():
        assert killed_in[phase] >= max(1, KILLS // 25), f"too few kills hit {description}: {killed_in}"
    assert killed_in.keys() <= {TRAINING, *PHASES}

    mine, expected = (torch.load(root / "final.pt", weights_only=True) for root in (chaos, straight))
    assert expected["reason"].startswith("EarlyStopping"), "so that its count mattered"
    mine_scalars, expected_scalars = scalars(mine.pop("board")), scalars(expected.pop("board"))
    mine_log, expected_log = logged(mine.pop("log")), logged(expected.pop("log"))
    assert_same(mine, expected, "final")
    assert mine_log == expected_log
    steps = [line["step"] for line in mine_log if line["scope"] == "step"]
    assert steps == sorted(set(steps)), "each step once"
    assert len(steps) > 2 * MOST_BATCHES
    assert mine_scalars == expected_scalars
