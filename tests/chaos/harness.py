"""Kill training processes at each of their places, resume them, and compare all that is left with a run that went through.

Each process is forked from one that has imported torch and started no thread, so a kill takes a twentieth of a second and not
five. ``launch`` starts any function in such a process: a run of one process here, or one rank of several.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from tests.chaos.kinds import train
from tests.resuming import assert_same

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.chaos.warm"])
TIMEOUT = 60.0  # seconds that a process may take


@dataclass
class Ended:
    """How a process ended.

    Attributes:
        exit_code: Its exit code; minus the signal if one ended it.
    """

    exit_code: int

    @property
    def killed(self) -> bool:
        """Whether it was killed."""
        return self.exit_code == -signal.SIGKILL


def launch(function: Callable[..., Any], *args: Any) -> Any:
    """Start a function in a new process, which has imported torch.

    Args:
        function: A function at the top of a module.
        *args: Its arguments, which can be pickled. One that kills itself makes :class:`~tests.chaos.places.Places` of one.

    Returns:
        The process; see :func:`wait`.
    """
    process = SERVER.Process(target=function, args=args)
    process.start()
    return process


def wait(*processes: Any) -> list[Ended]:
    """Wait for processes. If one takes too long, it is killed, and if one was, there is an error."""
    ends = []
    for process in processes:
        process.join(TIMEOUT)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        ends.append(Ended(process.exitcode))
        process.close()
        assert not late, f"a process took longer than {TIMEOUT:.0f} s"
    return ends


# ------------------------------------------------------------------ comparison


def content_of(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint without the parts that differ between two equal runs: times, and lengths of logs."""
    content: dict[str, Any] = torch.load(path, weights_only=True)
    for name in ("written_at", "sequence"):
        content.pop(name, None)
    for key in [key for key in content["callbacks"] if "Logger" in key]:
        del content["callbacks"][key]
    return content


def checkpoints(root: Path) -> dict[str, Any]:
    """Return the content of each checkpoint under a folder, by its path; and other files in folders of checkpoints."""
    folders = {path.parent for path in root.rglob("*.ckpt*")}
    files = sorted(path for folder in folders for path in folder.iterdir() if path.is_file())
    return {str(path.relative_to(root)): content_of(path) if path.suffix == ".ckpt" else None for path in files}


def logged(path: str) -> list[dict[str, Any]]:
    """Return a log's lines, without the time of day."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def scalars(directory: str) -> dict[str, list[tuple[int, float]]]:
    """Return the values of each tag that TensorBoard shows of a run, in order."""
    events = EventAccumulator(directory, size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_same_outcome(root: Path, expected: Path, name: str) -> None:
    """Compare the final state, the checkpoint files and the logs of two runs, bit for bit.

    Args:
        root: The folder of the run that was killed, with its ``final.pt``.
        expected: That of the run that was not.
        name: A description of the run, for the message.
    """
    mine, other = (torch.load(each / "final.pt", weights_only=True) for each in (root, expected))
    logs = [(final.pop("log"), final.pop("board")) for final in (mine, other)]
    assert_same(mine, other, f"{name}: final")
    files, wanted = checkpoints(root), checkpoints(expected)
    assert sorted(files) == sorted(wanted), f"{name}: {sorted(files)} are left, and {sorted(wanted)} were expected"
    assert_same(files, wanted, f"{name}: files")
    (lines, board), (expected_lines, expected_board) = logs
    if lines is not None:
        assert logged(lines) == logged(expected_lines), f"{name}: lines of the log"
    if board is not None:
        assert scalars(board) == scalars(expected_board), f"{name}: TensorBoard"


# ------------------------------------------------------------------ kills


@dataclass
class Tally:
    """How often runs were killed and resumed.

    Attributes:
        kills: The processes that were killed.
        resumed: Those of them that left other files than any before, so that they were resumed.
        failures: The differences, one text for each place.
    """

    kills: int = 0
    resumed: int = 0
    failures: list[str] = field(default_factory=list)


def state_of_files(root: Path) -> str:
    """Return a digest of all files under a folder: of their names, links and contents.

    If a file is a temporary one, its content does not count, because the next run only removes it.
    """
    digest = hashlib.sha256()
    numbers: dict[int, int] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.name.endswith(".tmp"):
            name = re.sub(r"[^/]*$", ".tmp", name)
        elif path.is_file():
            name += f" {numbers.setdefault(path.stat().st_ino, len(numbers))} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        digest.update(f"{name}\n".encode())
    return digest.hexdigest()


def run_through(name: str, root: Path) -> list[str]:
    """Run a kind of run without a kill; return the kinds of its places."""
    root.mkdir(parents=True)
    (end,) = wait(launch(train, name, root, None))
    assert end.exit_code == 0, f"{name}: a run without a kill ended with {end}"
    kinds: list[str] = json.loads((root / "places.json").read_text())
    return kinds


def kill_at(name: str, folder: Path, places: Iterable[tuple[int, ...]], straight: Path) -> Tally:
    """Kill runs of a kind, resume them, and compare them with one that went through.

    Args:
        name: The kind.
        folder: A folder for the runs.
        places: For each run the places at which it is killed, one after the other: the first process, the process that resumes
            it, and so on. A place that a process does not reach is passed over.
        straight: The folder of the run that went through.
    """
    tally, seen = Tally(), set[str]()
    root = folder / "killed"
    for ats in places:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        ends: list[Ended] = []
        for at in ats:
            ends += wait(launch(train, name, root, at))
            if not ends[-1].killed:
                break
        tally.kills += sum(end.killed for end in ends)
        described = f"{name}, killed at {', '.join(map(str, ats))}"
        if ends[-1].exit_code not in (0, -signal.SIGKILL):
            tally.failures.append(f"{described}: a process ended with {ends[-1]}")
            continue
        state = state_of_files(root)
        if state in seen:
            continue
        seen.add(state)
        if ends[-1].killed:
            tally.resumed += 1
            ends += wait(launch(train, name, root, None))
        if ends[-1].exit_code != 0:
            tally.failures.append(f"{described}: the resumed process ended with {ends[-1]}")
            continue
        try:
            assert_same_outcome(root, straight, described)
        except AssertionError as error:
            tally.failures.append(str(error).partition("\n")[0][:600])
    return tally


def every_place(kinds: list[str], writes: int = 1) -> list[tuple[int, ...]]:
    """Return all places of a run, with one in so many of the writes of each file."""
    count = 0
    places: list[tuple[int, ...]] = []
    for number, kind in enumerate(kinds, 1):
        count = count + 1 if kind == "write" else 0
        if kind != "write" or count % writes == 1 % writes:
            places.append((number,))
    return places


def sample_of_places(kinds: list[str], size: int, seed: int) -> list[tuple[int, ...]]:
    """Return some places of a run, most of them at operations that change names, and always the same."""
    rng = random.Random(seed)
    names = [number for number, kind in enumerate(kinds, 1) if kind in ("rename", "link", "unlink", "fsync", "create")]
    return [(number,) for number in sorted({*rng.sample(names, min(size, len(names))), rng.randrange(len(kinds)) + 1})]


def sample_of_pairs(kinds: list[str], size: int, seed: int) -> list[tuple[int, ...]]:
    """Return pairs of places: of a process, and of the process that resumes it; always the same."""
    rng = random.Random(seed)
    return [(rng.randrange(len(kinds)) + 1, rng.randrange(len(kinds)) + 1) for _ in range(size)]
