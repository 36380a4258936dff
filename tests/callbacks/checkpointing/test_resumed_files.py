"""The files of ModelCheckpoint after kills, errors, clocks that go wrong and forks: those of a run that went through."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec import filesystem  # type: ignore[import-untyped]
from torch import Tensor

from eventtrain import Callback, MisconfigurationError, Trainer
from eventtrain.callbacks import LRSchedulerStepping, ModelCheckpoint, claims
from eventtrain.callbacks.checkpointing.folder import CheckpointFolder
from eventtrain.callbacks.checkpointing.staging import Staging
from eventtrain.checkpoint import storage
from tests.chaos.harness import checkpoints
from tests.chaos.places import Places
from tests.kit import Line, On, new_trainer
from tests.resuming import Model, assert_same, assert_same_run

BATCHES = list(torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(0)))


class Scored(Model):
    """Logs the score of each validation: 5, 1, 4 and 3 after the steps 3, 6, 9 and 12, and so on."""

    def on_validation_epoch_end(self) -> None:
        self.log("score", float((5, 1, 4, 3)[self.trainer.progress.validations % 4]))


def new_run(root: Path, *callbacks: Any, **options: Any) -> Trainer:
    torch.manual_seed(5)
    validation = {"check_val_every_n_epoch": None, "val_check_interval": 3}
    return new_trainer(
        LRSchedulerStepping(), *callbacks, **{"max_epochs": 3, "default_root_dir": root, "seed": 3, **validation, **options}
    )


def fit(root: Path, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> Trainer:
    trainer = new_run(root, *callbacks, **options)
    trainer.fit(Scored(), BATCHES, BATCHES[:1], ckpt_path=ckpt_path)
    return trainer


def steps_of(folder: Path) -> dict[str, int]:
    """Return the step of each file in a folder."""
    return {path.name: storage.read(path)["global_step"] for path in sorted(folder.glob("*.ckpt"))}


# ------------------------------------------------------------------ kills


class Killed(BaseException):
    """Ends a run as if it were killed: no listener writes a file after it."""


def fit_killed(root: Path, at: int | None, *callbacks: Any, **options: Any) -> list[str]:
    """Run until an operation on a file of a checkpoint; return the operations."""

    def kill(kind: str) -> None:
        if len(places.kinds) == at:
            raise Killed

    places = Places(before=kill, within=".ckpt")
    try:
        places.count_file_operations()
        fit(root, *callbacks, **options)
    except Killed:
        pass
    finally:
        places.stop()
    return places.kinds


def ways_of_keeping() -> dict[str, Callable[[], list[ModelCheckpoint]]]:
    def newest() -> ModelCheckpoint:
        return ModelCheckpoint("newest", every_n_steps=1)

    def best(**options: Any) -> ModelCheckpoint:
        return ModelCheckpoint("best", monitor="score", every_n_steps=3, **options)

    return {
        "one": lambda: [newest()],
        "the best": lambda: [best(save_top_k=2)],
        "only the last": lambda: [ModelCheckpoint("newest", every_n_steps=1, save_top_k=0)],
        "no last": lambda: [ModelCheckpoint("newest", every_n_steps=1, save_last=False)],
        "two": lambda: [newest(), best()],
        "two, the other way round": lambda: [best(), newest()],
    }


@pytest.mark.parametrize("way", ways_of_keeping())
@pytest.mark.parametrize(
    ("links", "every"),
    [(True, 6), pytest.param(True, 1, marks=pytest.mark.slow), pytest.param(False, 1, marks=pytest.mark.slow)],
    ids=["some", "all", "without links"],
)
def test_the_files_of_a_resumed_run_are_those_of_one_that_was_not_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, links: bool, every: int
) -> None:
    """Killed at operations of the last step, after which nothing is left to train."""
    keep = ways_of_keeping()[way]
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    straight = tmp_path / "straight"
    operations = fit_killed(straight, None, *keep())
    expected = checkpoints(straight)
    changes = [number for number, kind in enumerate(operations, 1) if kind in ("rename", "link", "unlink", "fsync")]
    for at in changes[-14::every]:
        root = tmp_path / "killed"
        shutil.rmtree(root, ignore_errors=True)
        fit_killed(root, at, *keep())
        fit(root, *keep(), ckpt_path="last")
        assert_same(checkpoints(root), expected, f"killed at {at}, {operations[at - 1]}")


def refuse(*_: Any) -> None:
    raise OSError("this file system has no links")


def test_last_is_the_newest_even_if_nothing_is_left_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between a checkpoint's own name and ``last.ckpt``."""
    link, linked = CheckpointFolder.link, list[str]()

    def kill(folder: CheckpointFolder, path: Any, name: str) -> None:
        linked.append(name)
        if len(linked) == 6:
            raise Killed
        link(folder, path, name)

    monkeypatch.setattr(CheckpointFolder, "link", kill)
    with pytest.raises(Killed):
        fit(tmp_path, ModelCheckpoint(every_n_steps=2))
    monkeypatch.setattr(CheckpointFolder, "link", link)
    assert steps_of(tmp_path / "checkpoints") == {
        "epoch=2-step=10.ckpt": 10,
        "epoch=2-step=12.ckpt": 12,
        "last.ckpt": 10,
        "previous.ckpt": 8,
    }
    fit(tmp_path, ModelCheckpoint(every_n_steps=2), ckpt_path="last")
    assert steps_of(tmp_path / "checkpoints") == {"epoch=2-step=12.ckpt": 12, "last.ckpt": 12, "previous.ckpt": 10}


@pytest.mark.parametrize("missing", ["previous", "last"])
def test_a_name_that_is_missing_is_no_obstacle(tmp_path: Path, missing: str) -> None:
    fit(tmp_path / "straight", ModelCheckpoint(every_n_steps=2))
    fit(tmp_path, ModelCheckpoint(every_n_steps=2), max_epochs=2)
    (tmp_path / "checkpoints" / f"{missing}.ckpt").unlink()
    fit(tmp_path, ModelCheckpoint(every_n_steps=2), ckpt_path="last")
    assert_same(steps_of(tmp_path / "checkpoints"), steps_of(tmp_path / "straight" / "checkpoints"), "steps")


def test_a_damaged_last_does_not_become_the_previous(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(every_n_steps=2), max_epochs=2)
    folder = tmp_path / "checkpoints"
    raw = bytearray((folder / "last.ckpt").read_bytes())
    raw[len(raw) // 2] ^= 255
    (folder / "last.ckpt").write_bytes(raw)
    with pytest.warns(UserWarning, match="passed over a checkpoint"):
        fit(tmp_path, ModelCheckpoint(every_n_steps=2), max_epochs=2, ckpt_path="last")
    assert steps_of(folder) == {"epoch=1-step=8.ckpt": 8, "last.ckpt": 8, "previous.ckpt": 6}


# ------------------------------------------------------------------ there is a last.ckpt at every moment


def test_there_is_a_last_checkpoint_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    steps: list[int] = []

    def check(kind: str) -> None:
        if kind not in ("write", "create") and (steps or last.exists()):
            places.counts = False
            steps.append(storage.read(last)["global_step"])
            places.counts = True

    for links in (True, False):
        steps.clear()
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        if not links:
            monkeypatch.setattr(Path, "hardlink_to", refuse)
        places = Places(before=check, within=".ckpt")
        places.count_file_operations()
        try:
            fit(tmp_path, ModelCheckpoint(every_n_steps=1, save_top_k=0), max_epochs=1)
            fit(tmp_path, ModelCheckpoint(every_n_steps=1), max_epochs=1)
        finally:
            places.stop()
        assert len(steps) > 40 and set(steps) == {1, 2, 3, 4}


def test_there_is_a_last_checkpoint_in_a_store_at_every_moment(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = filesystem("memory")
    seen: list[bool] = []

    def checked(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(f"/{store.removeprefix('memory://')}/checkpoints/last.ckpt" in memory.store)
            return method(self, *args, **kwargs)

        return call

    for name in ("cp_file", "rm_file", "put_file", "pipe_file", "rm", "exists", "isfile"):
        monkeypatch.setattr(type(memory), name, checked(getattr(type(memory), name)))
    trainer = new_trainer(ModelCheckpoint(every_n_steps=1), default_root_dir=store)
    trainer.fit(Line(), [torch.ones(2, 1)] * 5)
    first = seen.index(True)
    assert all(seen[first:]) and len(seen) - first > 20


def test_a_reader_that_opens_last_again_and_again_never_fails(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "while not os.path.exists('last.ckpt'): time.sleep(0.001)\n"
        "count = 0\n"
        "while not os.path.exists('done'):\n"
        "    assert open('last.ckpt', 'rb').read(2) == b'PK'\n"
        "    count += 1\n"
        "print(count)\n"
    )
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    reader = subprocess.Popen([sys.executable, "-c", script], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        fit(tmp_path, ModelCheckpoint(every_n_steps=1), max_epochs=10)
    finally:
        (folder / "done").touch()
    output, error = reader.communicate(timeout=60)
    assert reader.returncode == 0, error.decode()
    assert int(output) > 100


# ------------------------------------------------------------------ the order of files


def test_a_clock_that_is_set_back_does_not_change_which_checkpoint_is_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a run, and between two runs."""
    straight = fit(tmp_path / "straight", ModelCheckpoint(every_n_steps=2, save_top_k=-1))
    now = time.time()

    class SetsClockBack(Callback):
        def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
            if trainer.global_step == 6:
                monkeypatch.setattr(time, "time", lambda: now - 10_000)

    fit(tmp_path, ModelCheckpoint(every_n_steps=2, save_top_k=-1, save_last=False), SetsClockBack(), max_epochs=2)
    monkeypatch.setattr(time, "time", lambda: now - 20_000)
    checkpoint = ModelCheckpoint(every_n_steps=2, save_top_k=-1, save_last=False)
    resumed_at: list[int] = []

    class Notes(Callback):
        def on_fit_start(self, trainer: Trainer, event: Any) -> None:
            resumed_at.append(trainer.global_step)

    resumed = fit(tmp_path, checkpoint, Notes(), ckpt_path="last")
    assert resumed_at == [8]
    assert Path(checkpoint.last_model_path).name == "epoch=2-step=12.ckpt"
    assert_same(resumed.module.state_dict(), straight.module.state_dict(), "weights")


def test_dates_of_files_do_not_matter(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(every_n_steps=2, save_top_k=-1, save_last=False))
    folder = tmp_path / "checkpoints"
    for number, path in enumerate(sorted(folder.iterdir(), key=lambda path: int(path.stem.split("=")[-1]))):
        os.utime(path, (1000 - number, 1000 - number))
    checkpoint = ModelCheckpoint(every_n_steps=2)
    assert fit(tmp_path, checkpoint, ckpt_path="last").global_step == 12
    assert checkpoint.last_model_path.endswith("step=12.ckpt")


def test_a_backup_that_is_put_back_is_older_than_the_files_that_came_after_it(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(every_n_steps=2), max_epochs=2)
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "backup")
    fit(tmp_path, ModelCheckpoint(every_n_steps=2), ckpt_path="last")
    shutil.copytree(tmp_path / "backup", tmp_path / "checkpoints", dirs_exist_ok=True)
    checkpoint = ModelCheckpoint(every_n_steps=2)
    fit(tmp_path, checkpoint, ckpt_path="last")
    assert checkpoint.last_model_path.endswith(("step=12.ckpt", "last.ckpt"))
    assert steps_of(tmp_path / "checkpoints")["last.ckpt"] == 12, "its older file was replaced"


@pytest.mark.parametrize("clock", [0, -10_000])
def test_after_a_fork_from_an_older_checkpoint_its_own_files_are_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: int
) -> None:
    fit(tmp_path, ModelCheckpoint(every_n_steps=2, save_top_k=-1))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + clock)
    folder = tmp_path / "checkpoints"
    fork = fit(
        tmp_path,
        ModelCheckpoint(every_n_steps=2, save_top_k=-1, filename="fork-{step}"),
        ckpt_path=folder / "epoch=1-step=6.ckpt",
        max_epochs=2,
    )
    assert fork.global_step == 8
    assert steps_of(folder)["last.ckpt"] == 8 and steps_of(folder)["epoch=2-step=12.ckpt"] == 12
    again = ModelCheckpoint(every_n_steps=2, save_top_k=-1, filename="fork-{step}")
    resumed = fit(tmp_path, again, ckpt_path="last", max_epochs=2)
    assert resumed.global_step == 8
    assert_same_run(resumed, fork, "the fork is resumed, not the run that it left")


def test_a_run_that_begins_anew_has_the_newest_files_even_if_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path, ModelCheckpoint(every_n_steps=2, save_top_k=-1))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 10_000)
    fit(tmp_path, ModelCheckpoint(every_n_steps=2, save_top_k=-1, filename="new-{step}"), max_epochs=1)
    checkpoint = ModelCheckpoint(every_n_steps=2, save_top_k=-1, filename="new-{step}")
    assert fit(tmp_path, checkpoint, ckpt_path="last", max_epochs=1).global_step == 4


def test_files_of_a_version_without_numbers_are_ordered_by_their_time_and_older(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(every_n_steps=2, save_top_k=-1, save_last=False), max_epochs=2)
    folder = tmp_path / "checkpoints"
    for number, step in enumerate((2, 6, 4, 8)):
        (path,) = folder.glob(f"*step={step}.ckpt")
        content = storage.read(path)
        del content["sequence"]
        content["written_at"] = 2e9 + number  # later than now
        torch.save(content, path)
    fit(
        tmp_path,
        ModelCheckpoint(every_n_steps=2, save_top_k=-1, save_last=False),
        max_epochs=2,
        ckpt_path=next(folder.glob("*=4.ckpt")),
    )
    ordered = [storage.read(path)["global_step"] for path in CheckpointFolder(folder).newest()]
    assert ordered == [8, 6, 4, 2]
    for path in folder.glob("*.ckpt"):
        content = storage.read(path)
        content.pop("sequence", None)
        content["written_at"] = -content["global_step"]
        torch.save(content, path)
    ordered = [storage.read(path)["global_step"] for path in CheckpointFolder(folder).newest()]
    assert ordered == [2, 4, 6, 8]


# ------------------------------------------------------------------ save_on_exception


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_a_copy_that_is_not_complete_is_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """The memory is used up at each tensor of the copy of step 6: the copy of step 5 is the newest checkpoint."""
    straight = fit(tmp_path / "straight", ModelCheckpoint(every_n_steps=4))
    copy_tensor = Staging._copy_tensor
    count = 0

    class FailsAt(Callback):
        def __init__(self, tensor: int) -> None:
            self.tensor = tensor

        def on_take_checkpoint(self, trainer: Trainer, event: Any) -> None:
            nonlocal count
            count = 0 if trainer.global_step == 6 else -1000

        def copy(self, staging: Staging, tensor: Tensor) -> Tensor:
            nonlocal count
            count += 1
            if count == self.tensor:
                raise MemoryError
            return copy_tensor(staging, tensor)

    for tensor in itertools.count(1, every):
        root = tmp_path / str(tensor)
        fails = FailsAt(tensor)
        monkeypatch.setattr(Staging, "_copy_tensor", lambda staging, value, fails=fails: fails.copy(staging, value))
        with contextlib.suppress(MemoryError):
            fit(root, fails, ModelCheckpoint(every_n_steps=4, save_on_exception=True))
            break
        monkeypatch.setattr(Staging, "_copy_tensor", copy_tensor)
        assert storage.read(root / "checkpoints" / "last.ckpt")["global_step"] == 5
        resumed = fit(root, ModelCheckpoint(every_n_steps=4), ckpt_path="last")
        assert_same_run(resumed, straight, f"resumed after an error at tensor {tensor}")
    assert tensor > 20  # is the first that no copy reached


def test_an_error_after_a_checkpoint_does_not_write_it_again(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
            if trainer.global_step == 8:
                raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        fit(tmp_path, Fails(), ModelCheckpoint(every_n_steps=4, save_on_exception=True))
    assert steps_of(tmp_path / "checkpoints") == {"epoch=1-step=8.ckpt": 8, "last.ckpt": 8, "previous.ckpt": 4}


# ------------------------------------------------------------------ names in a checkpoint


@pytest.mark.parametrize("key", ["kept", "surplus", "names"])
@pytest.mark.parametrize("name", ["../victim.ckpt", "victim", "a/b.ckpt", 3])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, key: str, name: Any) -> None:
    fit(tmp_path, ModelCheckpoint(every_n_steps=4), max_epochs=1)
    (tmp_path / "victim.ckpt").write_text("a file of somebody else")
    for path in (tmp_path / "checkpoints").iterdir():
        content = storage.read(path)
        state = next(state for key, state in content["callbacks"].items() if key.startswith("ModelCheckpoint"))
        state[key] = {name: None} if key == "kept" else [name]
        torch.save(content, path)
    with pytest.raises(MisconfigurationError, match="which is not the name of a"):
        fit(tmp_path, ModelCheckpoint(every_n_steps=4), ckpt_path="last")
    assert (tmp_path / "victim.ckpt").read_text() == "a file of somebody else"


def test_one_run_at_a_time_writes_the_last_checkpoint_of_a_folder(tmp_path: Path) -> None:
    """Two would overwrite each other's. Folders of other names, and runs one after another, are no conflict."""
    (tmp_path / "link").symlink_to(tmp_path)
    messages: list[str] = []

    def another(trainer: Trainer, event: Any) -> None:
        if messages:
            return
        for root, save_last in ((tmp_path, True), (tmp_path / "link", True), (tmp_path, False)):
            try:
                fit(root, ModelCheckpoint("kept", filename="other-{step}", save_last=save_last))
                messages.append("trained")
            except MisconfigurationError as error:
                messages.append(str(error))
        fit(tmp_path, ModelCheckpoint("elsewhere"))

    fit(tmp_path, ModelCheckpoint("kept"), On(train_epoch_start=another))
    assert messages[2] == "trained"
    for message in messages[:2]:
        assert f"another trainer in this process, {os.getpid()}, since" in message and "give another dirpath" in message
    assert not list(tmp_path.glob(".*"))
    fit(tmp_path, ModelCheckpoint("kept"))


HOLDS = """
import sys, time
from pathlib import Path
from eventtrain.callbacks.checkpointing.folder import CheckpointFolder
folder = CheckpointFolder(Path(sys.argv[1], "kept"))
folder.prepare(claims=True)
print("holds", flush=True)
time.sleep(60)
"""


def test_a_folder_of_another_process_is_refused_until_that_is_gone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "holds\n"
        with pytest.raises(MisconfigurationError, match=rf"that of the process {process.pid} on .*, since"):
            fit(tmp_path, ModelCheckpoint("kept"))
        process.kill()
        fit(tmp_path, ModelCheckpoint("kept"))  # at once


def test_a_place_without_a_hidden_file_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise PermissionError(13, "the parent is not ours")

    monkeypatch.setattr(claims, "opened", fail)
    fit(tmp_path, ModelCheckpoint("kept"))
    assert (tmp_path / "kept" / "last.ckpt").is_file()
