"""One run at a time writes to a log, an older checkpoint shortens none, and no checkpoint leads to another file."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from eventtrain import MisconfigurationError
from eventtrain.callbacks import JSONLinesLogger, LRSchedulerStepping, ModelCheckpoint, TensorBoardLogger, claims
from eventtrain.callbacks.claims import Claim
from eventtrain.callbacks.loggers import event_files, run_files
from eventtrain.checkpoint import storage
from tests.callbacks.loggers.logged import BATCHES, Crash, Model, points, run
from tests.kit import FakeProcesses, On, local, new_trainer

ROOT = str(Path(__file__).resolve().parents[3])


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "PATIENCE", 0.1)


def both() -> tuple[JSONLinesLogger, TensorBoardLogger]:
    return JSONLinesLogger(log_every_n_steps=1), TensorBoardLogger(log_every_n_steps=1)


def fit(root: Path, **options: Any) -> tuple[JSONLinesLogger, TensorBoardLogger]:
    lines, board = both()
    run(root, Model(), BATCHES, lines, board, LRSchedulerStepping(), **options)
    return lines, board


def file_of(logger: JSONLinesLogger) -> Path:
    assert logger.run_path is not None
    return local(logger.run_path)


def content_of(folder: Path) -> dict[str, bytes]:
    """Return the content of each file below a folder but for the facts about runs."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".run" and path.name != ".run")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.suffix != ".ckpt"}


def steps(lines: JSONLinesLogger, board: TensorBoardLogger) -> tuple[list[int], list[int]]:
    records = [json.loads(line) for line in file_of(lines).read_text().splitlines()]
    return [each["step"] for each in records if each["scope"] == "step"], [step for step, _ in points(board, "loss")]


# ------------------------------------------------------------------ an older checkpoint


@pytest.mark.parametrize("fails_at", [None, 11], ids=["of a run that ended", "of a run that failed"])
def test_a_run_that_begins_at_an_older_checkpoint_leaves_the_log_as_it_is(tmp_path: Path, fails_at: int | None) -> None:
    first = fit(tmp_path, fails_at=fails_at, max_epochs=3)
    before = content_of(tmp_path)
    lines, board = fit(tmp_path, max_epochs=5, ckpt_path=tmp_path / "epoch_0.ckpt", fails_at=18)
    assert {name: data for name, data in content_of(tmp_path).items() if name in before} == before
    assert file_of(lines).name == "metrics-1.jsonl" and board.run_dir.name == "version_1"
    assert steps(lines, board) == (list(range(1, 18)), list(range(1, 18)))
    assert len(steps(*first)[0]) == len(steps(*first)[1]) == (12 if fails_at is None else 10)
    # The new run can be resumed in its own log, and the old one in its own.
    again = fit(tmp_path, max_epochs=5, ckpt_path=tmp_path / "epoch_3.ckpt")
    assert (again[0].run_path, again[1].run_dir) == (lines.run_path, board.run_dir)
    assert steps(*again)[0] == steps(*again)[1] == list(range(1, 21))


def test_a_second_fork_gets_a_log_of_its_own(tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=3)
    for number in (1, 2):
        lines, board = fit(tmp_path, max_epochs=3, ckpt_path=tmp_path / "epoch_0.ckpt", saves=False)
        assert file_of(lines).name == f"metrics-{number}.jsonl" and board.run_dir.name == f"version_{number}"
        assert steps(lines, board)[0] == list(range(1, 13))


def test_a_fork_can_begin_while_the_first_run_goes_on(tmp_path: Path) -> None:
    done: list[Any] = []

    def fork(trainer: Any, event: Any) -> None:
        if trainer.global_step == 10 and not done:
            done.append(fit(tmp_path, ckpt_path=tmp_path / "epoch_0.ckpt", max_epochs=2, saves=False))

    lines, board = both()
    run(tmp_path, Model(), BATCHES, lines, board, LRSchedulerStepping(), On(after_update=fork), max_epochs=3)
    assert steps(lines, board) == (list(range(1, 13)), list(range(1, 13)))
    assert steps(*done[0]) == (list(range(1, 9)), list(range(1, 9)))


@pytest.mark.parametrize("options", [{"in_background": True}, {"save_on_exception": True}, {}])
def test_the_newest_checkpoint_continues_the_log_however_it_was_written(tmp_path: Path, options: dict[str, Any]) -> None:
    for attempt in range(2):
        lines, board = both()

        def fail(trainer: Any, event: Any, attempt: int = attempt) -> None:
            if event.global_step == 7 + 3 * attempt:
                raise Crash

        checkpoint = ModelCheckpoint(every_n_steps=2, save_top_k=-1, **options)
        other = ModelCheckpoint("other", every_n_steps=3)
        callbacks = (lines, board, LRSchedulerStepping(), checkpoint, other, On(after_update=fail))
        with pytest.raises(Crash):
            new_trainer(*callbacks, max_epochs=3, default_root_dir=tmp_path).fit(Model(), BATCHES, ckpt_path="last")
    lines, board = both()
    checkpoints = (ModelCheckpoint(every_n_steps=2, save_top_k=-1, **options), ModelCheckpoint("other", every_n_steps=3))
    trainer = new_trainer(lines, board, LRSchedulerStepping(), *checkpoints, max_epochs=3, default_root_dir=tmp_path)
    trainer.fit(Model(), BATCHES, ckpt_path="last")
    assert file_of(lines).name == "metrics.jsonl" and board.run_dir.name == "version_0"
    assert steps(lines, board) == (list(range(1, 13)), list(range(1, 13)))


@pytest.mark.parametrize("at", [6, 8], ids=["in an epoch", "at its end"])
def test_the_newest_checkpoint_of_a_run_that_was_stopped_continues_its_log(tmp_path: Path, at: int) -> None:
    def stop(trainer: Any, event: Any) -> None:
        if trainer.global_step == at:
            trainer.keep_checkpoint("a test")
            trainer.stop("a test")

    for more in ((On(safe_point=stop),), ()):
        lines, board = both()
        checkpoint = ModelCheckpoint()
        trainer = new_trainer(lines, board, LRSchedulerStepping(), checkpoint, *more, max_epochs=3, default_root_dir=tmp_path)
        trainer.fit(Model(), BATCHES, ckpt_path="last")
        assert file_of(lines).name == "metrics.jsonl" and board.run_dir.name == "version_0"
    assert steps(lines, board) == (list(range(1, 13)), list(range(1, 13)))


def test_the_hidden_file_is_there_until_a_run_has_ended_as_it_should(tmp_path: Path) -> None:
    def interrupt(trainer: Any, event: Any) -> None:
        trainer.interrupt("to look at it")

    names = []
    for name, more, fails_at in (("whole", (), None), ("failed", (), 3), ("interrupted", (On(request_stop=interrupt),), None)):
        lines = JSONLinesLogger(log_every_n_steps=1)
        run(tmp_path / name, Model(), BATCHES, lines, LRSchedulerStepping(), *more, fails_at=fails_at)
        names.append([path.name for path in (tmp_path / name).glob(".*")])
    assert names == [[], [".metrics.jsonl.run"], [".metrics.jsonl.run"]]


@pytest.mark.parametrize("damage", ["removed", "empty", "torn", "of another program"])
def test_without_the_facts_a_log_is_never_shortened(tmp_path: Path, damage: str) -> None:
    """So it is for the logs of older versions."""
    fit(tmp_path, fails_at=7)
    for path in [*tmp_path.glob(".*.run"), *tmp_path.rglob(".run")]:
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes({"empty": b"", "torn": path.read_bytes()[:20], "of another program": b"[1]\n"}[damage])
    before = content_of(tmp_path)
    lines, board = fit(tmp_path, ckpt_path=tmp_path / "epoch_0.ckpt")
    assert {name: data for name, data in content_of(tmp_path).items() if name in before} == before
    assert steps(lines, board) == (list(range(1, 9)), list(range(1, 9)))


# ------------------------------------------------------------------ places that a file names

NAMES = ["victim.jsonl", "/{root}/victim.jsonl", "../victim.jsonl", "sub/metrics.jsonl", "..", "a\0b", "link.jsonl", ""]


def crafted(root: Path, **changes: Any) -> Path:
    content = storage.read(root / "epoch_0.ckpt")
    for state in content["callbacks"].values():
        state.update({name: value for name, value in changes.items() if name in state})
    storage.write(content, root / "crafted.ckpt")
    return root / "crafted.ckpt"


@pytest.mark.parametrize("name", [*NAMES, "metrics-7.jsonl", "runs/Model/version_7", "runs/version_0", "runs"])
def test_a_checkpoint_names_no_other_place(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    fit(root, fails_at=7)
    victims = [tmp_path / "victim.jsonl", root / "victim.jsonl", root / "sub" / "metrics.jsonl", root / "train.py"]
    victims += [root / "metrics-7.jsonl", root / "runs" / "version_0" / "events.out.tfevents.1.a", tmp_path / "target"]
    victims += [root / "runs" / "Model" / "version_7" / "events.out.tfevents.1.a"]
    for victim in victims:
        victim.parent.mkdir(parents=True, exist_ok=True)
        victim.write_text("precious\n" * 100)
    (root / "link.jsonl").symlink_to(tmp_path / "target")
    before = content_of(tmp_path)
    name = name.format(root=root)
    path = crafted(root, path=name, run_dir=name, position=0, event_files={})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lines, board = fit(root, ckpt_path=path)
    assert {name: data for name, data in content_of(tmp_path).items() if name in before} == before
    assert steps(lines, board) == ([5, 6, 7, 8], [5, 6, 7, 8]), "a new log"
    told = [str(each.message) for each in caught if "is not a place of this logger" in str(each.message)]
    assert len(told) == 2 - (name in ("metrics-7.jsonl", "runs/Model/version_7")) or not told


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_link_in_place_of_a_log_is_not_followed(tmp_path: Path, kind: str) -> None:
    fit(tmp_path, fails_at=7)
    target = tmp_path / "target"
    if kind == "file":
        (tmp_path / "metrics.jsonl").rename(target)
        (tmp_path / "metrics.jsonl").symlink_to(target)
    else:
        (tmp_path / "runs" / "Model" / "version_0").rename(target)
        (tmp_path / "runs" / "Model" / "version_0").symlink_to(target)
    before = content_of(tmp_path)
    with pytest.warns(UserWarning, match="is not a place of this logger"):
        fit(tmp_path, ckpt_path=tmp_path / "epoch_0.ckpt")
    after = content_of(tmp_path)
    assert all(after[name] == before[name] for name in before if name.startswith("target"))


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".metrics.jsonl.run").symlink_to(victim)
    with pytest.raises(MisconfigurationError, match="JSONLinesLogger cannot write to"):
        fit(tmp_path)
    assert victim.read_text() == "precious"
    for name in ("metrics.jsonl", "metrics-1.jsonl"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(victim)
    lines, _ = fit(tmp_path)
    assert victim.read_text() == "precious" and file_of(lines).name == "metrics-2.jsonl"
    with pytest.raises(OSError, match="symbolic link"):
        run_files.RunFile(tmp_path / "metrics.jsonl", "test")


def test_logs_elsewhere_are_continued_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative or absolute, below the root or not, through a link to another disk."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for place in ("logs/deep", str(tmp_path / "absolute"), "../beside", "../link"):
        for fails_at, path in ((7, None), (None, tmp_path / "root" / "epoch_0.ckpt")):
            lines = JSONLinesLogger(f"{place}/metrics.jsonl", log_every_n_steps=1)
            board = TensorBoardLogger(f"{place}/runs", name="a/b", log_every_n_steps=1)
            options: dict[str, Any] = {"fails_at": fails_at, "ckpt_path": path}
            run(tmp_path / "root", Model(), BATCHES, lines, board, LRSchedulerStepping(), **options)
        assert file_of(lines).name == "metrics.jsonl" and board.run_dir.name == "version_0"
        assert steps(lines, board) == (list(range(1, 9)), list(range(1, 9)))


# ------------------------------------------------------------------ two runs at once


@pytest.mark.filterwarnings("ignore:The checkpoint holds state of")
@pytest.mark.parametrize("index", [0, 1])
def test_two_trainers_of_a_process_cannot_share_a_log(tmp_path: Path, index: int) -> None:
    fit(tmp_path, fails_at=7)
    errors = []

    def intrude(trainer: Any, event: Any) -> None:
        with pytest.raises(MisconfigurationError) as caught:
            run(tmp_path, Model(), BATCHES, both()[index], LRSchedulerStepping(), ckpt_path=tmp_path / "epoch_0.ckpt")
        errors.append(str(caught.value))

    logger = both()[index]
    options: dict[str, Any] = {"ckpt_path": tmp_path / "epoch_0.ckpt", "saves": False}
    run(tmp_path, Model(), BATCHES, logger, LRSchedulerStepping(), On(train_start=intrude), **options)
    place = ("path", "log_dir")[index]
    assert len(errors) == 1 and f"another run writes there, that of another trainer in this process, {os.getpid()}" in errors[0]
    assert f"give another {place}." in errors[0]
    run(tmp_path, Model(), BATCHES, both()[index], LRSchedulerStepping(), **options)  # the lock ends with the run


HOLDER = """
import os, sys, time
from pathlib import Path
from eventtrain.callbacks.claims import Claim
claim = Claim(Path(sys.argv[1]), Path("log"), "JSONLinesLogger", "path")
claim.take()
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


def test_another_process_is_named_and_its_lock_ends_with_it_even_if_a_child_lives_on(tmp_path: Path) -> None:
    path = tmp_path / ".log.run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], env={**os.environ, "PYTHONPATH": ROOT}, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        claim = Claim(path, tmp_path / "log", "JSONLinesLogger", "path")
        with pytest.raises(MisconfigurationError) as caught:
            claim.take()
        named = f"that of the process {holder.pid} on {socket.gethostname()}, since 20"
        assert named in str(caught.value) and str(tmp_path / "log") in str(caught.value)
        started = time.monotonic()
        holder.send_signal(signal.SIGKILL)
        claim.take()  # at once, without a wait for the kernel: taking tries for a while
        assert time.monotonic() - started < 5
        assert json.loads(path.read_text())["pid"] == os.getpid()
        claim.release()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
        os.kill(child, signal.SIGKILL)


def begin(arguments: tuple[str, int]) -> str:
    parent, _ = arguments
    directory = run_files.new_version(Path(parent))
    claim = Claim(directory / ".run", directory, "TensorBoardLogger", "log_dir")
    claim.take()
    lines = run_files.new_file(Path(parent, "metrics.jsonl"))
    other = Claim(lines.with_name(f".{lines.name}.run"), lines, "JSONLinesLogger", "path")
    other.take()
    time.sleep(0.2)
    return f"{directory.name} {lines.name}"


def test_a_sweep_of_processes_that_begin_at_once_get_places_of_their_own(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(8) as pool:
        places = pool.map(begin, [(str(tmp_path), number) for number in range(24)], chunksize=1)
    assert len({place.split()[0] for place in places}) == len({place.split()[1] for place in places}) == 24


def test_a_disk_without_locks_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    lines, board = fit(tmp_path)
    assert steps(lines, board)[0] == list(range(1, 9))


def test_only_the_first_process_claims_a_log(tmp_path: Path) -> None:
    lines, board = both()
    trainer = new_trainer(lines, board, LRSchedulerStepping(), default_root_dir=tmp_path)
    trainer.processes = FakeProcesses(2, 1)
    trainer.fit(Model(), BATCHES)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ a directory that cannot be read


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_directory_that_cannot_be_read_at_a_checkpoint_costs_one_warning(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = event_files.event_files
    broken: list[bool] = []

    def fail(directory: Any) -> Any:
        if broken:
            raise OSError(number, os.strerror(number), str(directory))
        return read(directory)

    monkeypatch.setattr(event_files, "event_files", fail)
    lines, board = both()
    begin, end = (
        On(**{event: action})
        for event, action in (
            ("train_start", lambda trainer, event: broken.append(True)),
            ("train_end", lambda trainer, event: broken.clear()),
        )
    )
    with pytest.warns(UserWarning, match=r"TensorBoardLogger cannot read .*version_0.*Error: ") as caught:
        run(tmp_path, Model(), BATCHES, begin, end, lines, board, LRSchedulerStepping(), fails_at=7, max_epochs=3)
    broken.clear()
    assert len(caught) == 1
    lines, board = fit(tmp_path, ckpt_path=tmp_path / "epoch_0.ckpt")
    assert steps(lines, board)[0] == list(range(1, 9))
    assert sorted(set(steps(lines, board)[1])) == list(range(1, 9))


def test_a_state_of_the_first_versions_names_no_directory_and_no_run(tmp_path: Path) -> None:
    logger = TensorBoardLogger()
    logger.load_state_dict({"samples": 8, "seconds": 2.5})
    logger.load_state_dict({"samples": 8, "seconds": 2.5, "run_dir": None, "x_axis": "global_step"})
    assert (logger.state_dict()["samples"], logger.state_dict()["run_dir"]) == (8, None)
