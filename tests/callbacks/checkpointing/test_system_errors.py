"""ModelCheckpoint and errors of the system: each operation on a file of the folder fails once, in the middle of a run."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from eventtrain import Callback, MisconfigurationError, Trainer
from eventtrain.callbacks import ModelCheckpoint
from eventtrain.checkpoint import storage
from tests.chaos.harness import checkpoints
from tests.chaos.places import Places
from tests.kit import Line, batches, new_trainer
from tests.resuming import assert_same

ERRORS = [errno.EMFILE, errno.EIO, errno.ENOSPC, errno.ESTALE, errno.EACCES]
OnError = Literal["raise", "warn"]


class Scored(Line):
    """Logs 3, 1, 2, 4 as ``score``, so that some checkpoints are kept, some deleted and some neither."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("score", float((3, 1, 2, 4)[batch_idx]))
        return super().training_step(batch.reshape(1, 1), batch_idx)


class FailsOnce(Callback):
    """Makes one operation on the files of a folder fail, from the beginning of training to its end.

    Args:
        folder: The folder.
        at: The number of the operation; None for none.
        code: The error's number.
    """

    def __init__(self, folder: Path, at: int | None, code: int) -> None:
        self.at, self.code = at, code
        self.places = Places(before=self.fail, within=str(folder), reads=True)

    def fail(self, kind: str) -> None:
        if len(self.places.kinds) == self.at:
            raise OSError(self.code, os.strerror(self.code))

    def on_train_start(self, trainer: Trainer, event: Any) -> None:
        self.places.count_file_operations()

    def on_train_end(self, trainer: Trainer, event: Any) -> None:
        self.places.stop()

    on_exception = on_train_end


def fit(root: Path, on_error: OnError, *callbacks: Any, ckpt_path: str | None = None) -> Trainer:
    torch.manual_seed(0)
    checkpoint = ModelCheckpoint(every_n_steps=1, monitor="score", save_top_k=2, on_error=on_error)
    trainer = new_trainer(*callbacks, checkpoint, default_root_dir=root)
    trainer.fit(Scored(), batches(4), ckpt_path=ckpt_path)
    return trainer


def check(root: Path, straight: Path, weights: Any, on_error: OnError, at: int, code: int) -> bool:
    """Let one operation fail; return True if somebody heard of it."""
    shutil.rmtree(root, ignore_errors=True)
    name = f"operation {at}, {errno.errorcode[code]}, on_error={on_error!r}"
    failing = FailsOnce(root, at, code)
    raised = None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            trainer = fit(root, on_error, failing)
        except OSError as error:
            raised = error
        finally:
            failing.places.stop()
    assert failing.places.kinds[at - 1 :], f"{name}: there were fewer operations"
    kind = failing.places.kinds[at - 1]
    messages = [str(each.message) for each in said]
    if on_error == "warn":
        assert raised is None, f"{name} ({kind}): {raised!r}"
        assert_same(trainer.module.state_dict(), weights, name)
        assert len(messages) <= 1, f"{name} ({kind}): {messages}"
    else:
        assert not messages, f"{name} ({kind}): {messages}"
        messages = [] if raised is None else [str(raised)]
        assert raised is None or raised.errno == code
    for message in messages:
        assert message.removeprefix(f"[Errno {code}] ").startswith("ModelCheckpoint could not "), message
        assert str(root / "checkpoints") in message
    for path in (root / "checkpoints").glob("*.ckpt"):
        storage.read(path)
    assert not list((root / "checkpoints").glob(".*")), f"{name} ({kind}): half a file is left"
    if on_error == "raise" and raised is not None:
        trainer = fit(root, on_error, ckpt_path="last")
        assert_same(trainer.module.state_dict(), weights, name)
        assert_same(checkpoints(root), checkpoints(straight), f"{name} ({kind})")
    return bool(messages)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, int]:
    """A run without an error: its folder, its weights, and its number of operations."""
    root = tmp_path_factory.mktemp("straight")
    counting = FailsOnce(root, None, 0)
    trainer = fit(root, "raise", counting)
    return root, trainer.module.state_dict(), len(counting.places.kinds)


def test_any_operation_may_fail_once(tmp_path: Path, straight: tuple[Path, Any, int]) -> None:
    """Each operation with one of the errors, and in one of the two modes."""
    root, weights, count = straight
    modes: tuple[OnError, ...] = ("raise", "warn")
    assert count > 200
    # Of the many writes of a file, some.
    heard = [check(tmp_path / "run", root, weights, modes[at % 2], at, ERRORS[at % 5]) for at in range(1, count + 1, 19)]
    assert sum(heard) > len(heard) // 2


@pytest.mark.slow
@pytest.mark.parametrize("on_error", ["raise", "warn"])
@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_every_operation_may_fail_once(tmp_path: Path, straight: tuple[Path, Any, int], on_error: OnError, code: int) -> None:
    root, weights, count = straight
    for at in range(1, count + 1):
        check(tmp_path / "run", root, weights, on_error, at, code)


@pytest.mark.parametrize("kind", ["list", "stat", "open"])
def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path: Path, kind: str) -> None:
    """Else the run would begin anew, or from an older checkpoint than the newest."""
    fit(tmp_path, "warn")

    def fail(reached: str) -> None:
        if reached == kind:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "checkpoints"))

    places = Places(before=fail, within="checkpoints", reads=True)
    places.count_file_operations()
    try:
        with pytest.raises(MisconfigurationError, match=r"ModelCheckpoint\(dirpath='checkpoints'\): its checkpoints cannot"):
            fit(tmp_path, "warn", ckpt_path="last")
    finally:
        places.stop()


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in background"])
def test_a_folder_that_is_deleted_during_the_run_is_made_again(tmp_path: Path, in_background: bool) -> None:
    checkpoint = ModelCheckpoint(every_n_steps=1, in_background=in_background)

    class Deletes(Callback):
        def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
            checkpoint.wait(trainer)
            if event.batch_idx == 2:
                shutil.rmtree(tmp_path / "checkpoints")

    new_trainer(Deletes(), checkpoint, default_root_dir=tmp_path).fit(Scored(), batches(4))
    names = ["epoch=0-step=4.ckpt", "last.ckpt", "previous.ckpt"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == names
    assert [storage.read(tmp_path / "checkpoints" / name)["global_step"] for name in names] == [4, 4, 3]
