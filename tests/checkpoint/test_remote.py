"""Checkpoints in a store that fsspec reaches: the same guarantees, except those that only a disk can give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec import filesystem, register_implementation  # type: ignore[import-untyped]
from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]

from eventtrain import LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import FullyShardedDataParallel, LRSchedulerStepping, ModelCheckpoint
from eventtrain.callbacks.distributed.sharded_checkpoint import refuse_remote_places
from eventtrain.checkpoint import storage
from eventtrain.paths import RemotePath, check_path
from tests.kit import Line, On, Recorder, new_trainer, train
from tests.resuming import Model

memory = filesystem("memory")
pytestmark = pytest.mark.usefixtures("in_tmp_path")


class WithoutCopies(MemoryFileSystem):  # type: ignore[misc]
    """A store that can rename and cannot copy, such as an SFTP server."""

    protocol = "renames"
    store: Any = {}
    pseudo_dirs: Any = [""]

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        data = self.cat_file(path1)
        self.rm_file(path1)
        self.pipe_file(path2, data)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        raise NotImplementedError


register_implementation("renames", WithoutCopies)


def names(folder: str) -> set[str]:
    """Return the names of a remote folder's files."""
    path = check_path(folder, "test", "folder")
    return {each.name for each in path.glob("*")}


def data(count: int = 5) -> list[torch.Tensor]:
    return list(torch.randn(count, 4, 3, generator=torch.Generator().manual_seed(1)))


def fit(root: Any, *callbacks: Any, epochs: int = 3, ckpt_path: Any = None, stop_at: int | None = None) -> Trainer:
    """Train the model that draws from all generators; interrupt it after an update."""

    def interrupt(trainer: Trainer, event: Any) -> None:
        if trainer.global_step == stop_at:
            trainer.interrupt("the test wants it")

    torch.manual_seed(7)
    trainer = new_trainer(
        *callbacks, LRSchedulerStepping(), On(request_stop=interrupt), max_epochs=epochs, default_root_dir=root, seed=3
    )
    trainer.fit(Model(), data(), data(2), ckpt_path=ckpt_path)
    return trainer


def same(one: LightningModule, other: LightningModule) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("protocol", ["memory", "renames"])
def test_the_last_checkpoint_of_a_store_resumes_with_the_same_bits(store: str, protocol: str, in_background: bool) -> None:
    root = store.replace("memory", protocol)
    straight = fit(Path("straight"))

    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(every_n_steps=2, monitor="val", save_top_k=2, in_background=in_background)

    fit(root, keep(), stop_at=8)
    assert {"last.ckpt", "previous.ckpt"} <= names(f"{root}/checkpoints")
    assert same(fit(root, keep(), ckpt_path="last").module, straight.module)
    assert sorted(Path().glob("*")) == []  # nothing was written to a folder named like the protocol


def test_files_of_a_store_are_kept_and_deleted_as_on_a_disk(store: str, tmp_path: Path) -> None:
    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(monitor="val", save_top_k=2, filename="{epoch}-{val:.6f}")

    here, there = fit(tmp_path / "here", keep(), epochs=5), fit(store, keep(), epochs=5)
    assert names(f"{store}/checkpoints") == {path.name for path in (tmp_path / "here" / "checkpoints").iterdir()}
    mine, theirs = here.callback(ModelCheckpoint), there.callback(ModelCheckpoint)
    assert mine.kept == theirs.kept and len(theirs.kept) == 2
    assert theirs.best_model_path == f"{store}/checkpoints/{Path(mine.best_model_path).name}"
    assert theirs.last_model_path == f"{store}/checkpoints/last.ckpt"
    assert mine.best_model_score == theirs.best_model_score
    best = storage.read(theirs.best_model_path)["state_dict"]
    assert all(torch.equal(value, best[name]) for name, value in storage.read(mine.best_model_path)["state_dict"].items())


def test_the_best_checkpoint_of_a_store_is_found_by_another_trainer(store: str) -> None:
    model = train(
        Line(), [torch.ones(2, 1)], ModelCheckpoint(monitor="val_loss"), val=[torch.ones(2, 1)], default_root_dir=store
    )
    again = new_trainer(ModelCheckpoint(monitor="val_loss"), default_root_dir=store)
    again.validate(loaded := Line(), [torch.ones(2, 1)], ckpt_path="best")
    assert same(loaded, model.module)


def test_a_damaged_checkpoint_of_a_store_is_named_and_passed_over(store: str) -> None:
    fit(store, ModelCheckpoint(every_n_steps=2, save_top_k=0), stop_at=8)
    memory.pipe_file(f"{store}/checkpoints/last.ckpt", b"damaged")
    with pytest.warns(UserWarning, match=r"passed over a checkpoint: memory://.*last\.ckpt is no checkpoint"):
        again = fit(store, ModelCheckpoint(every_n_steps=2, save_top_k=0), ckpt_path="last")
    assert same(again.module, fit(Path("straight")).module)


def test_checkpoints_of_a_store_are_ordered_by_the_time_in_them(store: str) -> None:
    for name in ("b", "a", "c"):
        train(Line(), [torch.ones(2, 1)]).save_checkpoint(f"{store}/checkpoints/{name}.ckpt")
    for name in ("c", "b"):  # a copy is newer than its content
        memory.pipe_file(f"{store}/checkpoints/{name}.ckpt", memory.cat_file(f"{store}/checkpoints/{name}.ckpt"))
    paths = check_path(f"{store}/checkpoints", "test", "folder").glob("*")
    assert [path.name for path in sorted(paths, key=storage.written_at)] == ["b.ckpt", "a.ckpt", "c.ckpt"]


def test_a_saved_checkpoint_of_a_store_is_loaded_by_every_verb(store: str) -> None:
    saved = Recorder("checkpoint_saved")
    trainer = train(Line(), [torch.ones(2, 1)], saved)
    trainer.save_checkpoint(path := f"{store}/deep/line.ckpt")
    trainer.save_checkpoint(path)
    assert [event.path for event in saved.events] == [path, path] and names(f"{store}/deep") == {"line.ckpt"}
    assert same(Line.load_from_checkpoint(path), trainer.module)
    for verb in ("validate", "test", "predict"):
        getattr(new_trainer(), verb)(loaded := Line(), [torch.ones(2, 1)], ckpt_path=path)
        assert same(loaded, trainer.module)
    again, straight = new_trainer(max_epochs=2), train(line := Line(), [torch.ones(2, 1)])
    torch.manual_seed(0)
    line.load_state_dict(trainer.module.state_dict())
    straight.fit(line, [torch.ones(2, 1)])
    again.fit(Line(), [torch.ones(2, 1)], ckpt_path=path)
    assert same(again.module, line)


def test_a_run_that_is_interrupted_without_a_model_checkpoint_leaves_its_state_in_the_store(store: str) -> None:
    fit(store, stop_at=7)
    assert names(f"{store}/checkpoints") == {"interrupted.ckpt"}
    assert same(fit(store, ckpt_path="last").module, fit(Path("straight")).module)


def test_a_checkpoint_that_is_not_there_is_named(store: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        new_trainer().fit(Line(), [torch.ones(2, 1)], ckpt_path=f"{store}/none.ckpt")
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        Line.load_from_checkpoint(f"{store}/none.ckpt")


# ------------------------------------------------------------------ faults


def breaks(monkeypatch: pytest.MonkeyPatch, method: str, error: Exception) -> Any:
    """Return a callback after whose second update a method of the store fails, for one checkpoint."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    def patch(trainer: Trainer, event: Any) -> None:
        if trainer.global_step == 3:
            monkeypatch.setattr(MemoryFileSystem, method, fail)
        if trainer.global_step == 4:
            monkeypatch.undo()

    return On(train_batch_start=patch)


@pytest.mark.parametrize("error", [ValueError("no credentials"), PermissionError(13, "denied"), ConnectionError("gone")])
@pytest.mark.parametrize("method", ["put_file", "mv", "makedirs"])
def test_a_store_that_fails_leaves_the_earlier_checkpoints(
    store: str, monkeypatch: pytest.MonkeyPatch, method: str, error: Exception
) -> None:
    checkpoint = ModelCheckpoint(every_n_steps=2, save_top_k=-1, on_error="warn")
    text = str(error).removeprefix("[Errno 13] ")
    with pytest.warns(UserWarning, match=rf"could not write memory://.*step=4\.ckpt.*{text}.*intact: \['last\.ckpt'"):
        fit(store, checkpoint, breaks(monkeypatch, method, error), epochs=1)
    whole = names(f"{store}/checkpoints")
    assert "epoch=0-step=2.ckpt" in whole and "epoch=0-step=4.ckpt" not in whole
    assert not [name for name in whole if name.endswith(storage.TEMPORARY)]
    for name in whole:
        storage.read(f"{store}/checkpoints/{name}")


def test_a_store_that_fails_ends_the_run_unless_told_otherwise(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attached = [ModelCheckpoint(every_n_steps=2), breaks(monkeypatch, "put_file", ValueError("no credentials"))]
    with pytest.raises(OSError, match=r"could not write memory://.*ValueError: no credentials"):
        fit(store, *attached)


def test_a_store_that_cannot_be_written_to_is_refused_before_training(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("no credentials")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", fail)
    batches = Recorder("train_batch_start")
    with pytest.raises(MisconfigurationError, match=r"ModelCheckpoint\(dirpath='memory://.*written there.*no credentials"):
        fit(store, ModelCheckpoint(f"{store}/a"), batches)
    assert batches.events == []


def test_what_a_killed_run_left_in_the_store_is_removed(store: str) -> None:
    memory.pipe_file(f"{store}/checkpoints/.last.ckpt.tmp", b"half")
    fit(store, ModelCheckpoint(), epochs=1)
    assert names(f"{store}/checkpoints") == {"last.ckpt", "epoch=0-step=5.ckpt"}


# ------------------------------------------------------------------ sharded checkpoints


def test_sharded_checkpoints_in_a_store_are_refused(store: str) -> None:
    sharded = FullyShardedDataParallel()
    with pytest.raises(MisconfigurationError, match=r"Trainer\(default_root_dir='memory://.*each process's tensors"):
        refuse_remote_places(new_trainer(sharded, default_root_dir=store))
    with pytest.raises(MisconfigurationError, match=r"ModelCheckpoint\(dirpath='memory://.*each process's tensors"):
        refuse_remote_places(new_trainer(FullyShardedDataParallel(), ModelCheckpoint(store)))
    refuse_remote_places(new_trainer(FullyShardedDataParallel(), ModelCheckpoint("checkpoints")))


def test_a_remote_path_is_passed_through_storage(store: str) -> None:
    path = RemotePath(f"{store}/x.ckpt")
    storage.write({"state_dict": {}, "epoch": 3}, path)
    assert storage.read(path)["epoch"] == 3
