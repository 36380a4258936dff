"""Event files are buffered, complete after an error, and survive full disks and vanished directories."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from eventtrain import MisconfigurationError, Trainer
from eventtrain.callbacks import TensorBoardLogger
from eventtrain.callbacks.loggers import event_files
from tests.callbacks.loggers.logged import BATCHES, Model, fit, numbered, points, read
from tests.kit import On, new_trainer

# ------------------------------------------------------------------ buffers and the order of files


def test_event_files_are_read_in_the_order_of_their_beginnings(tmp_path: Path) -> None:
    """Even if they begin within one second, or the clock of an earlier machine was ahead."""
    (tmp_path / f"events.out.tfevents.{int(time.time()) + 3600}.elsewhere.1").touch()
    names = [set(tmp_path.iterdir())]
    for _ in range(11):
        event_files.EventFile(tmp_path, "test").close()
        names.append(set(tmp_path.iterdir()))
    begun = [path for before, after in pairwise(names) for path in after - before]
    assert len(begun) == 11 and sorted(tmp_path.iterdir())[1:] == begun


def test_values_are_buffered_and_written_after_each_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_files, "FLUSH_INTERVAL", 1e9)
    seen: list[list[int]] = []

    def look(trainer: Trainer, event: Any) -> None:
        written = read(trainer.callback(TensorBoardLogger))
        seen.append([e.step for e in written.Scalars("loss")] if "loss" in written.Tags()["scalars"] else [])

    fit(tmp_path, On(train_batch_start=look))
    assert seen == [[]] * 4 + [[1, 2, 3, 4]] * 4


def test_a_long_epoch_is_flushed_at_the_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_files, "FLUSH_INTERVAL", -1.0)  # any flush was longer ago
    seen: list[int] = []
    fit(tmp_path, On(safe_point=lambda trainer, event: seen.append(len(points(trainer.callbacks[0], "loss")))))
    assert seen == list(range(1, 9))


def test_values_logged_before_an_error_are_on_disk(tmp_path: Path) -> None:
    logger, model, _ = fit(tmp_path, fails_at=3)
    assert points(logger, "loss") == numbered(model.losses[:2])


def test_no_thread_and_no_open_file_is_left_behind(tmp_path: Path) -> None:
    during: list[set[threading.Thread]] = []
    before = set(threading.enumerate())
    callback = On(train_start=lambda trainer, event: during.append(set(threading.enumerate())))
    for fails_at in (None, 3):
        logger, _, _ = fit(tmp_path, callback, fails_at=fails_at)
        assert logger._writer is None
    assert during == [before, before] and set(threading.enumerate()) == before


# ------------------------------------------------------------------ full disks and vanished directories


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; skip the test if none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = sys.platform == "linux" and shutil.which("mount") is not None
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def continues_with_one_warning(tmp_path: Path, log_dir: Path, strike: Callable[[], object]) -> tuple[TensorBoardLogger, Model]:
    """Train forty epochs; let a disaster strike at the start of the second one."""
    disaster = On(train_epoch_start=lambda trainer, event: strike() if event.epoch == 1 else None)
    with pytest.warns(UserWarning, match="TensorBoardLogger") as caught:
        logger, model, trainer = fit(tmp_path, disaster, max_epochs=40, logger={"log_dir": log_dir}, saves=False)
    assert trainer.global_step == 160
    (warning,) = (str(warning.message) for warning in caught)
    assert warning.startswith(f"TensorBoardLogger has stopped writing: {logger.run_dir}/events.out.tfevents.")
    assert "The run continues" in warning
    return logger, model


def test_a_full_disk_costs_one_warning(tmp_path: Path, small_disk: Path) -> None:
    def fill() -> None:
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        assert shutil.disk_usage(small_disk).free == 0

    logger, model = continues_with_one_warning(tmp_path, small_disk, fill)
    written = points(logger, "loss")
    assert 4 <= len(written) < 160
    assert written == numbered(model.losses[: len(written)])

    (small_disk / "filler").unlink()
    logger, model, _ = fit(tmp_path, logger={"log_dir": small_disk})
    assert points(logger, "loss") == numbered(model.losses), "the next run writes"


def test_a_limit_on_files_costs_one_warning(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    log_dir = tmp_path / "logs"

    def limit() -> None:
        (file,) = log_dir.glob("Model/version_0/events*")
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 100, before[1]))

    try:
        logger, model = continues_with_one_warning(tmp_path, log_dir, limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    written = points(logger, "loss")
    assert 4 <= len(written) <= 6 and written == numbered(model.losses[: len(written)])


def test_a_directory_that_vanishes_costs_one_warning(tmp_path: Path) -> None:
    log_dir = tmp_path / "logs"
    continues_with_one_warning(tmp_path, log_dir, lambda: shutil.rmtree(log_dir))
    assert not log_dir.exists()


def test_pictures_for_a_vanished_directory_do_not_end_the_run(tmp_path: Path) -> None:
    class Draws(Model):
        def on_train_epoch_end(self) -> None:
            shutil.rmtree(tmp_path / "runs", ignore_errors=True)
            writer = self.trainer.callback(TensorBoardLogger).writer
            writer.flush()
            writer.add_image("picture", torch.zeros(1, 4, 4), self.global_step)
            writer.flush()

    with pytest.warns(UserWarning, match="has stopped writing") as caught:
        fit(tmp_path, model=Draws())
    assert len(caught) == 1


# ------------------------------------------------------------------ directories that cannot be written to


def bad_place(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file" / "runs"


def test_a_directory_that_cannot_be_made_is_an_error_before_training(tmp_path: Path) -> None:
    model, log_dir = Model(), bad_place(tmp_path)
    with pytest.raises(MisconfigurationError, match=r"TensorBoardLogger cannot write to .*file.* Give a log_dir that can be"):
        fit(tmp_path, model=model, logger={"log_dir": log_dir})
    assert model.losses == []
    trainer = new_trainer(TensorBoardLogger(log_dir))
    with pytest.raises(MisconfigurationError, match="cannot write to"):
        trainer.validate(model, BATCHES)


def test_a_read_only_disk_is_an_error_before_training(tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(MisconfigurationError, match=r"cannot write to .*: Read-only file system"):
        fit(tmp_path, logger={"log_dir": small_disk})
