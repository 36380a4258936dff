"""ModelCheckpoint: its schedule, the files that it keeps, and no checkpoint is lost if something goes wrong."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eventtrain import Callback, LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import GradientAccumulation, LRSchedulerStepping, ModelCheckpoint
from eventtrain.callbacks.checkpointing.folder import file_name
from eventtrain.checkpoint import storage
from tests.kit import new_trainer
from tests.resuming import Model, assert_same_run, run

BATCHES = list(torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0)))


class Scored(LightningModule):
    """Trains a little, and logs the given scores, one for each validation."""

    layer: torch.nn.Linear

    def __init__(self, scores: list[float] | None = None, name: str = "val/loss") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)
        self.scores = iter(scores or [])
        self.name = name

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if (score := next(self.scores, None)) is not None:
            self.log(self.name, score)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def fit(tmp_path: Path, *callbacks: Any, module: Any = None, validates: bool = True, **options: Any) -> Trainer:
    """Train three epochs of five batches, unless the options say otherwise."""
    trainer = new_trainer(*callbacks, **{"max_epochs": 3, "default_root_dir": tmp_path, **options})
    trainer.fit(module or Scored(), BATCHES, BATCHES[:1] if validates else None)
    return trainer


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())


def steps(tmp_path: Path) -> list[int]:
    """Return the updates after which the named files were written."""
    return sorted(
        int(name.split("step=")[1].split("-")[0].removesuffix(".ckpt")) for name in names(tmp_path) if name.startswith("e")
    )


def state(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


# ------------------------------------------------------------------ the schedule


@pytest.mark.parametrize(
    ("options", "trainer_options", "expected"),
    [
        ({}, {}, [5, 10, 15]),
        ({}, {"val_check_interval": 2}, [2, 4, 5, 7, 9, 10, 12, 14, 15]),
        ({"every_n_steps": 4}, {}, [4, 8, 12, 15]),  # and at the end of the run
        ({"every_n_epochs": 2}, {}, [10, 15]),
        ({"every_n_steps": 4, "every_n_epochs": 1}, {}, [4, 5, 8, 10, 12, 15]),
        ({"every_n_steps": 100}, {"max_steps": 7}, [7]),  # within an epoch
        ({"every_n_steps": 100}, {"min_epochs": 1, "max_epochs": 1}, [5]),
    ],
)
def test_a_checkpoint_is_written_by_schedule_and_at_the_end_of_the_run(
    tmp_path: Path, options: Any, trainer_options: Any, expected: list[int]
) -> None:
    fit(tmp_path, ModelCheckpoint(save_top_k=-1, **options), **trainer_options)
    assert steps(tmp_path) == expected
    assert os.path.samefile(
        tmp_path / "checkpoints/last.ckpt", max((tmp_path / "checkpoints").glob("e*"), key=os.path.getmtime)
    )


def test_every_n_steps_counts_updates_and_not_batches(tmp_path: Path) -> None:
    saved: list[tuple[int, int]] = []
    trainer = Trainer(
        callbacks=[GradientAccumulation(2), ModelCheckpoint(every_n_steps=2, save_top_k=-1)],
        default_callbacks=False,
        device="cpu",
        max_epochs=2,
        default_root_dir=tmp_path,
    )
    trainer.signals.checkpoint_saved.connect(lambda t, event: saved.append((t.batch_idx, t.global_step)))
    trainer.fit(Scored(), BATCHES)
    assert saved == [(3, 2), (1, 4), (4, 6)]


def test_every_n_minutes_counts_from_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    class Clock(Callback):
        def on_train_batch_end(self, trainer: Trainer, event: Any) -> None:
            nonlocal now
            now += 25.0

    fit(tmp_path, Clock(), ModelCheckpoint(every_n_minutes=1, save_top_k=-1))
    assert steps(tmp_path) == [3, 6, 9, 12, 15]


def test_a_run_that_is_stopped_ends_with_a_checkpoint(tmp_path: Path) -> None:
    class Stops(Callback):
        def on_train_batch_end(self, trainer: Trainer, event: Any) -> None:
            if trainer.current_epoch == 1 and event.batch_idx == 2:
                trainer.stop("enough")

    fit(tmp_path, Stops(), ModelCheckpoint(every_n_steps=100))
    assert steps(tmp_path) == [8]
    shutil.rmtree(tmp_path / "checkpoints")
    fit(tmp_path, Stops(), ModelCheckpoint(every_n_steps=100), min_epochs=3)  # the request has to wait
    assert steps(tmp_path) == [15]


def test_another_schedule_and_other_names_are_a_method_each(tmp_path: Path) -> None:
    class Doubling(ModelCheckpoint):
        def is_due(self, trainer: Trainer, event: Any) -> bool:
            return trainer.global_step in (1, 2, 4, 8)

        def file_name_values(self, trainer: Trainer) -> dict[str, Any]:
            return {**super().file_name_values(trainer), "rate": trainer.optimizers[0].param_groups[0]["lr"]}

    fit(tmp_path, Doubling(save_top_k=-1, filename="{step}-{rate:.2f}"))
    assert [name for name in names(tmp_path) if "=" in name] == [f"step={n}-rate=0.01.ckpt" for n in (1, 2, 4, 8)]


def test_a_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(save_on_exception=True), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ the files that it keeps


def test_the_best_and_the_last_are_kept(tmp_path: Path) -> None:
    callback = ModelCheckpoint(monitor="val/loss", save_top_k=2, filename="{epoch}-{val/loss:.2f}")
    scores = [0.5, 0.3, float("nan"), 0.4, 0.3]
    fit(tmp_path, callback, module=Scored(scores), max_epochs=5)
    assert names(tmp_path) == ["epoch=1-val_loss=0.30.ckpt", "epoch=4-val_loss=0.30.ckpt", "last.ckpt", "previous.ckpt"]
    assert callback.kept == pytest.approx({"epoch=1-val_loss=0.30.ckpt": 0.3, "epoch=4-val_loss=0.30.ckpt": 0.3})
    assert Path(callback.best_model_path).name == "epoch=1-val_loss=0.30.ckpt", "the first of two equal ones"
    assert callback.best_model_score == pytest.approx(0.3)
    assert Path(callback.last_model_path).name == "last.ckpt"


@pytest.mark.parametrize(("mode", "best"), [("min", [1]), ("max", [0])])
def test_the_mode_says_which_is_the_best(tmp_path: Path, mode: Any, best: list[int]) -> None:
    callback = ModelCheckpoint(monitor="val/loss", mode=mode, save_last=False)
    fit(tmp_path, callback, module=Scored([3.0, 1.0, 2.0]))
    assert names(tmp_path) == [f"epoch={epoch}-step={5 * epoch + 5}.ckpt" for epoch in best]


def test_without_a_metric_the_newest_are_kept(tmp_path: Path) -> None:
    callback = ModelCheckpoint(save_top_k=2)
    fit(tmp_path, callback)
    assert names(tmp_path) == ["epoch=1-step=10.ckpt", "epoch=2-step=15.ckpt", "last.ckpt", "previous.ckpt"]
    assert Path(callback.best_model_path).name == "epoch=2-step=15.ckpt"
    # A file with two names takes its space once.
    assert len({path.stat().st_ino for path in (tmp_path / "checkpoints").iterdir()}) == 2


def test_with_save_top_k_of_zero_only_the_last_is_kept(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(save_top_k=0))
    assert names(tmp_path) == ["last.ckpt", "previous.ckpt"]
    assert [state(tmp_path / "checkpoints" / name)["global_step"] for name in names(tmp_path)] == [15, 10]


def test_a_checkpoint_without_a_new_value_is_not_ranked(tmp_path: Path) -> None:
    """The validation after step 5 scores the weights of step 5, and no others."""
    callback = ModelCheckpoint(monitor="val/loss", every_n_steps=2, save_top_k=-1)
    fit(tmp_path, callback, module=Scored([3.0, 1.0]), max_epochs=1, val_check_interval=5)
    assert callback.kept == {"epoch=0-step=5.ckpt": 3.0}
    assert names(tmp_path) == ["epoch=0-step=5.ckpt", "last.ckpt", "previous.ckpt"]


def test_metrics_of_an_epoch_that_the_run_leaves_are_not_ranked(tmp_path: Path) -> None:
    """They are logged after the last safe point, at which another listener has asked the run to stop."""

    class Logs(Scored):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

    class Stops(Callback):
        def on_take_checkpoint(self, trainer: Trainer, event: Any) -> None:
            if trainer.global_step == 7:
                trainer.stop("enough")

    callback = ModelCheckpoint(monitor="loss", save_top_k=-1)
    trainer = fit(tmp_path, callback, Stops(), module=Logs(), validates=False)
    assert trainer.global_step == 7
    assert list(callback.kept) == ["epoch=0-step=5.ckpt"]
    assert state(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 7


def test_a_metric_that_is_never_logged_gives_one_warning(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning,
        match=r"monitor='val_loss'\): no metric 'val_loss' was logged; .* \['val/loss'\]\. Did you mean 'val/loss'",
    ) as said:
        fit(tmp_path, ModelCheckpoint(monitor="val_loss"), module=Scored([1.0, 2.0, 3.0]))
    assert len(said) == 1
    assert str(said[0].message).endswith("Until then only the last checkpoint is kept.")
    assert names(tmp_path) == ["last.ckpt", "previous.ckpt"], "no checkpoint is lost"


@pytest.mark.parametrize("validates", [False, True])
def test_a_metric_is_not_missing_before_the_stage_that_logs_it_is_over(tmp_path: Path, validates: bool) -> None:
    class Logs(Scored):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if not validates:
                self.log("val/loss", loss, on_step=False, on_epoch=True)
            return loss

    callback = ModelCheckpoint(monitor="val/loss", every_n_steps=2)
    fit(tmp_path, callback, module=Logs([3.0, 2.0, 1.0] if validates else None), validates=validates)  # without a warning
    assert list(callback.kept) == ["epoch=2-step=15.ckpt"]


def test_a_metric_that_a_complete_run_never_logged_is_missing(tmp_path: Path) -> None:
    """Also if the run had no validation that might have logged it."""
    with pytest.warns(UserWarning, match="no metric 'val/loss' was logged"):
        fit(tmp_path, ModelCheckpoint(monitor="val/loss"), max_epochs=1, check_val_every_n_epoch=2)


def test_names_are_made_from_a_template() -> None:
    values = {"epoch": 3, "step": 17, "val/acc": torch.tensor(0.5), "loss": 2}
    assert file_name("{epoch}-{val/acc:.2f}", values) == "epoch=3-val_acc=0.50.ckpt"
    assert file_name("run-{step:05d}-{gone:.1f}", values) == "run-step=00017-gone=nan.ckpt"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "lowest"}, r"ModelCheckpoint\(mode='lowest'\): give 'min' or 'max'"),
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"every_n_epochs": 1.5}, "every_n_epochs"),
        ({"every_n_minutes": 0}, r"ModelCheckpoint\(every_n_minutes=0\): give a finite number above 0"),
        ({"save_top_k": -2}, "save_top_k"),
        ({"save_top_k": 0, "save_last": False}, "keeps no file"),
        ({"on_error": "ignore"}, r"ModelCheckpoint\(on_error='ignore'\): give 'raise' or 'warn'"),
        ({"filename": "a/{epoch}"}, "a slash is not allowed"),
        ({"filename": "{}"}, "fields need names"),
        ({"filename": "{epoch"}, "such as '{epoch}"),
        ({"filename": "{epoch:.2x}"}, "such as '{epoch}"),
        ({"filename": "last"}, r"ModelCheckpoint\(filename='last'\): give a text other than 'last'"),
        ({"filename": ""}, r"ModelCheckpoint\(filename=''\): give a text"),
    ],
)
def test_arguments_that_are_not_valid_are_refused(options: Any, message: str) -> None:
    with pytest.raises(MisconfigurationError, match=message):
        ModelCheckpoint(**options)


# ------------------------------------------------------------------ resuming


def build_in(root: Path, *, in_background: bool = False, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        checkpoint = ModelCheckpoint(monitor="val", save_top_k=2, in_background=in_background)
        callbacks = [GradientAccumulation(2), LRSchedulerStepping(), checkpoint]
        arguments = {"max_epochs": 3, "val_check_interval": 2, "default_root_dir": root, **options}
        return Model(), BATCHES, BATCHES[:2], callbacks, arguments

    return build


def contents(root: Path) -> dict[str, Any]:
    return {path.name: state(path)["progress"] for path in sorted((root / "checkpoints").iterdir())}


class CopiesFolder:
    """Copies the files that a kill after each safe point would leave, and one after training."""

    def __init__(self, root: Path, tmp_path: Path) -> None:
        self.root, self.tmp_path = root, tmp_path
        self.copies: list[Path] = []

    def on_take_checkpoint(self, trainer: Trainer, event: Any) -> None:
        trainer.callback(ModelCheckpoint).wait(trainer)
        self.copies.append(self.tmp_path / f"copy {len(self.copies)}")
        shutil.copytree(self.root, self.copies[-1])


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in background"])
def test_a_resumed_run_keeps_the_files_of_the_run_before(tmp_path: Path, in_background: bool) -> None:
    root = tmp_path / "straight"
    copies = CopiesFolder(root, tmp_path)
    straight = run(build_in(root, in_background=in_background), copies)
    kept = straight.callback(ModelCheckpoint).kept
    assert len(copies.copies) == 15
    for copy in copies.copies:
        # Nothing is written at the first safe point: that is a fresh start.
        resumed = run(build_in(copy, in_background=in_background), ckpt_path="last" if copy != copies.copies[0] else None)
        assert_same_run(resumed, straight, copy.name)
        assert contents(copy) == contents(root), copy.name
        assert resumed.callback(ModelCheckpoint).kept == kept


def test_last_without_a_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint()
    trainer = Trainer(callbacks=[checkpoint], default_callbacks=False, device="cpu", max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(Scored(), BATCHES, ckpt_path="last")
    assert trainer.global_step == 5


def test_best_is_found_in_this_process_and_in_a_new_one(tmp_path: Path) -> None:
    scores = [0.5, 0.3, 0.4]
    callback = ModelCheckpoint(monitor="val/loss", save_top_k=2)
    trainer = fit(tmp_path, callback, module=(module := Scored(scores)))
    best = state(tmp_path / "checkpoints" / "epoch=1-step=10.ckpt")["state_dict"]["layer.weight"]
    assert not torch.equal(module.layer.weight, best)
    trainer.validate(module, BATCHES, ckpt_path="best")
    assert torch.equal(module.layer.weight, best)

    other, again = Scored(), ModelCheckpoint(monitor="val/loss", save_top_k=2)
    trainer = Trainer(callbacks=[again], default_callbacks=False, device="cpu", max_epochs=1, default_root_dir=tmp_path)
    trainer.validate(other, BATCHES, ckpt_path="best")
    assert torch.equal(other.layer.weight, best)


def test_files_that_a_kill_left_behind_are_deleted(tmp_path: Path) -> None:
    root = tmp_path / "run"

    class KilledAsItDeletes(Exception):
        pass

    def killed(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".ckpt":
            raise KilledAsItDeletes
        os.remove(self) if self.exists() else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KilledAsItDeletes):
            fit(root, ModelCheckpoint(save_top_k=1))
    (root / "checkpoints" / ".epoch=7-step=8.ckpt.tmp").write_bytes(b"half a checkp")
    assert steps(root) == [5, 10], "the older one is deleted only after"
    trainer = Trainer(
        callbacks=[ModelCheckpoint(save_top_k=1)], default_callbacks=False, device="cpu", max_epochs=3, default_root_dir=root
    )
    at_start: list[list[str]] = []
    trainer.signals.train_start.connect(lambda t, event: at_start.append(names(root)))
    trainer.fit(Scored(), BATCHES, BATCHES[:1], ckpt_path="last")
    assert at_start == [["epoch=1-step=10.ckpt", "last.ckpt", "previous.ckpt"]]
    assert trainer.global_step == 15


def test_two_callbacks_that_would_delete_each_others_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationError, match="Give each of them another dirpath"):
        fit(tmp_path, ModelCheckpoint(), ModelCheckpoint(monitor="val/loss"))
    fit(tmp_path, ModelCheckpoint("a"), ModelCheckpoint("b", monitor="val/loss"), module=Scored([1.0, 2.0, 3.0]))


# ------------------------------------------------------------------ damage


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)


def test_a_run_resumes_from_the_file_before_a_damaged_one(tmp_path: Path) -> None:
    straight = run(build_in(tmp_path / "straight"))
    run(build_in(tmp_path, max_epochs=2))
    damage(tmp_path / "checkpoints" / "last.ckpt")
    with pytest.warns(UserWarning, match=r"passed over a checkpoint: .*\.ckpt is no checkpoint .*damaged") as said:
        resumed = run(build_in(tmp_path), ckpt_path="last")
    assert len(said) == 1
    assert_same_run(resumed, straight, "resumed from the one before")


def test_a_run_trains_nothing_if_all_files_are_damaged(tmp_path: Path) -> None:
    run(build_in(tmp_path, max_epochs=1))
    for path in {path.stat().st_ino: path for path in (tmp_path / "checkpoints").iterdir()}.values():
        damage(path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    with (
        pytest.warns(UserWarning, match="passed over a checkpoint"),
        pytest.raises(MisconfigurationError, match=r"None of the .* checkpoints can be read"),
    ):
        run(build_in(tmp_path), ckpt_path="last")
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


# ------------------------------------------------------------------ faults in the file system


def fails(code: int) -> Callable[..., Any]:
    def failing(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return failing


def write_part(content: Any, file: Any) -> None:
    file.write(b"PK half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# The function that fails as a checkpoint is written.
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "opening it": (storage, "open", fails(errno.EACCES)),
    "writing it": (torch, "save", write_part),
    "getting it on disk": (os, "fsync", fails(errno.EIO)),
    "renaming it": (os, "replace", fails(errno.EXDEV)),
}


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in background"])
@pytest.mark.parametrize("on_error", ["raise", "warn"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_earlier_checkpoints_intact(tmp_path: Path, fault: str, on_error: Any, in_background: bool) -> None:
    """For each function that may fail: every earlier checkpoint is intact, and the run raises or continues."""
    owner, function, failing = FAULTS[fault]
    callback = ModelCheckpoint(every_n_steps=2, save_top_k=-1, on_error=on_error, in_background=in_background)
    before: dict[str, bytes] = {}
    patch = pytest.MonkeyPatch()

    class Breaks(Callback):
        """Makes the checkpoint of step 4 fail, and no other."""

        def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
            if trainer.global_step == 3:
                callback.wait(trainer)
                before.update({path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()})
                patch.setattr(owner, function, failing, raising=False)
            if trainer.global_step == 4:
                try:
                    callback.wait(trainer)
                finally:
                    patch.undo()

    try:
        if on_error == "raise":
            with pytest.raises(OSError, match=r"could not write .*step=4\.ckpt.* are intact: \['last\.ckpt'\]") as caught:
                fit(tmp_path, Breaks(), callback)
            assert caught.value.errno == caught.value.__cause__.errno  # type: ignore[union-attr]
        else:
            with pytest.warns(UserWarning, match=r"could not write .*step=4\.ckpt"):
                fit(tmp_path, Breaks(), callback)
    finally:
        patch.undo()
    assert len(before) == 2
    for name, content in before.items():
        if name == "last.ckpt" and on_error == "warn":
            continue  # the next one took its place
        assert (tmp_path / "checkpoints" / name).read_bytes() == content
    assert not [name for name in names(tmp_path) if name.startswith(".")], "no half of a file is left"
    for path in (tmp_path / "checkpoints").iterdir():
        storage.read(path)
    assert steps(tmp_path) == ([2] if on_error == "raise" else [2, 6, 8, 10, 12, 14, 15])
    assert [int(name.split("=")[-1].removesuffix(".ckpt")) for name in callback.kept] == steps(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 192 KB."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "none", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in background"])
def test_a_full_disk_leaves_earlier_checkpoints_intact(small_disk: Path, in_background: bool) -> None:
    callback = ModelCheckpoint(every_n_steps=2, save_top_k=-1, in_background=in_background)
    with pytest.raises(OSError, match="could not write") as caught:
        fit(small_disk, callback, max_epochs=100)
    assert caught.value.errno == errno.ENOSPC
    assert callback.kept
    for name in [*callback.kept, "last.ckpt"]:
        storage.read(small_disk / "checkpoints" / name)
    assert not [name for name in names(small_disk) if name.startswith(".")]
    # The run continues once there is space.
    for name in list(callback.kept)[:-1]:
        (small_disk / "checkpoints" / name).unlink()
    trainer = Trainer(
        callbacks=[ModelCheckpoint(every_n_steps=2)],
        default_callbacks=False,
        device="cpu",
        max_epochs=20,
        default_root_dir=small_disk,
    )
    trainer.fit(Scored(), BATCHES, ckpt_path="last")
    assert trainer.global_step == 100


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    module = Scored()
    before = module.layer.weight.clone()
    with pytest.raises(MisconfigurationError, match=r"dirpath='file/x'\): nothing can be written there"):
        fit(tmp_path, ModelCheckpoint("file/x"), module=module)
    assert torch.equal(module.layer.weight, before)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="a superuser may write anywhere")
def test_a_read_only_folder_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir(mode=0o500)
    with pytest.raises(MisconfigurationError, match="nothing can be written there"):
        fit(tmp_path, ModelCheckpoint())


def test_a_folder_that_becomes_read_only_leaves_earlier_checkpoints_intact(tmp_path: Path) -> None:
    """In the process of another user, because a superuser may write anywhere."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import os, pathlib, sys
sys.path.insert(0, {os.getcwd()!r})
from tests.callbacks.checkpointing.test_model_checkpoint import *
os.chdir({str(tmp_path)!r})  # another user may not be allowed to reach it by its name
fit(pathlib.Path("first"), ModelCheckpoint())  # imports all modules, for the same reason
root = pathlib.Path("run")
root.mkdir()
if os.geteuid() == 0:
    os.chown(".", 65534, 65534), os.chown(root, 65534, 65534)
    os.setuid(65534)
class Closes(Callback):
    def on_train_epoch_start(self, trainer, event):
        if event.epoch == 1:
            (root / "checkpoints").chmod(0o500)
try:
    fit(root, Closes(), ModelCheckpoint())
except OSError as error:
    print(error)
(root / "checkpoints").chmod(0o700)
print(names(root), storage.read(root / "checkpoints" / "last.ckpt")["global_step"])
"""
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": "/tmp"},
    )
    assert "could not write" in done.stdout, done.stderr
    assert "Permission denied" in done.stdout
    assert "['epoch=0-step=5.ckpt', 'last.ckpt'] 5" in done.stdout


def test_a_file_system_without_hard_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", fails(errno.EPERM))
    fit(tmp_path, ModelCheckpoint())
    assert names(tmp_path) == ["epoch=2-step=15.ckpt", "last.ckpt", "previous.ckpt"]
    assert storage.read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 15
    assert storage.read(tmp_path / "checkpoints" / "previous.ckpt")["global_step"] == 10


def test_state_that_could_not_be_read_back_is_refused_before_training(tmp_path: Path) -> None:
    class Keeps(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"where": [tmp_path]}

    with pytest.raises(MisconfigurationError, match=r"checkpoint\['callbacks'\]\['.*Keeps'\]\['where'\]\[0\] is a pathlib"):
        fit(tmp_path, Keeps(), ModelCheckpoint())
    assert not (tmp_path / "checkpoints").exists()


# ------------------------------------------------------------------ in a thread


def test_the_run_continues_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_save, save = threading.Event(), torch.save
    threads: list[str] = []

    def slow(content: Any, file: Any) -> None:
        threads.append(threading.current_thread().name)
        assert may_save.wait(60)
        save(content, file)

    class Weights(Callback):
        def __init__(self) -> None:
            self.at: dict[int, Any] = {}

        def on_safe_point(self, trainer: Trainer, event: Any) -> None:
            assert isinstance(trainer.module, Scored)
            self.at[trainer.global_step] = trainer.module.layer.weight.detach().clone()
            if trainer.global_step == 3:
                may_save.set()

    monkeypatch.setattr(torch, "save", slow)
    saved: list[tuple[int, str]] = []
    weights = Weights()

    class OfSteps1And4(ModelCheckpoint):
        """If each step had a file, the run would wait for the one of step 1 at step 2."""

        def is_due(self, trainer: Trainer, event: Any) -> bool:
            return trainer.global_step in (1, 4)

    trainer = new_trainer(OfSteps1And4(save_top_k=-1, in_background=True), weights, max_steps=5, default_root_dir=tmp_path)
    trainer.signals.checkpoint_saved.connect(lambda t, event: saved.append((t.global_step, Path(event.path).name)))
    trainer.fit(Scored(), BATCHES)
    assert all(name.startswith("checkpoint") for name in threads)
    assert steps(tmp_path) == [1, 4]
    for step in (1, 4):
        content = state(tmp_path / "checkpoints" / f"epoch=0-step={step}.ckpt")
        assert torch.equal(content["state_dict"]["layer.weight"], weights.at[step]), "the weights of the step"
        assert content["global_step"] == step
    assert [name for _, name in saved] == ["epoch=0-step=1.ckpt", "epoch=0-step=4.ckpt"]
    assert saved[0][0] >= 3, "published once it is on disk"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_keep_checkpoint_waits_for_the_file(tmp_path: Path) -> None:
    paths: list[str | None] = []

    class Interrupts(Callback):
        def on_safe_point(self, trainer: Trainer, event: Any) -> None:
            if trainer.global_step == 7:
                paths.append(trainer.keep_checkpoint("a test"))
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, ModelCheckpoint(save_last=False, in_background=True), Interrupts())
    assert paths == [os.fspath(tmp_path / "checkpoints" / "last.ckpt")]
    assert storage.read(paths[0] or "")["global_step"] == 7


# ------------------------------------------------------------------ errors


def test_a_run_that_an_error_ends_leaves_its_last_safe_point(tmp_path: Path) -> None:
    straight = run(build_in(tmp_path / "straight"))

    class Fails(Callback):
        def on_before_backward(self, trainer: Trainer, event: Any) -> None:
            if trainer.current_epoch == 1 and trainer.batch_idx == 3:
                raise RuntimeError("a bug")

    callbacks = [
        GradientAccumulation(2),
        LRSchedulerStepping(),
        ModelCheckpoint(monitor="val", save_top_k=2, save_on_exception=True),
    ]
    arguments = {"max_epochs": 3, "val_check_interval": 2, "default_root_dir": tmp_path}
    with pytest.raises(RuntimeError, match="a bug"):
        run(lambda: (Model(), BATCHES, BATCHES[:2], callbacks, arguments), Fails())
    progress = storage.read(tmp_path / "checkpoints" / "last.ckpt")["progress"]
    assert (progress["current_epoch"], progress["batch_idx"]) == (1, 2)
    assert_same_run(run(build_in(tmp_path), ckpt_path="last"), straight, "resumed after an error")
