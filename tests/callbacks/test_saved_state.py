"""A callback's state in a file is input: names are names, numbers are numbers, and nothing else is believed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from eventtrain import MisconfigurationError
from eventtrain.callbacks import LRSchedulerStepping, ModelCheckpoint
from eventtrain.callbacks.checkpointing.folder import PREVIOUS, CheckpointFolder
from eventtrain.callbacks.saved_state import field, file_names, is_name, items, whole
from eventtrain.checkpoint import storage
from tests.kit import Line, new_trainer

BATCHES = [torch.ones(2, 1)] * 4
KEY = "ModelCheckpoint(None, min, (None, None, None))"
PATHS = [
    "../victim.ckpt",
    "/{root}/victim.ckpt",
    "sub/victim.ckpt",
    "..",
    ".",
    "",
    "a\0.ckpt",
    "C:\\victim.ckpt",
    "..\\victim.ckpt",
]
OTHERS = ["victim.txt", "last.ckpt", "previous.ckpt", ".ckpt", "victim.ckpt/", 3, None, b"victim.ckpt"]


@pytest.mark.parametrize("name", [*PATHS, *OTHERS])
@pytest.mark.parametrize("key", ["surplus", "kept"])
def test_a_checkpoint_deletes_no_file_that_it_names(tmp_path: Path, key: str, name: Any) -> None:
    root = tmp_path / "root"
    new_trainer(ModelCheckpoint(), default_root_dir=root).fit(Line(), BATCHES)
    if isinstance(name, str):
        name = name.format(root=root)
    victims = [
        tmp_path / "victim.ckpt",
        root / "victim.ckpt",
        root / "checkpoints" / "victim.txt",
        root / "sub" / "victim.ckpt",
    ]
    victims += [root / "checkpoints" / "sub" / "victim.ckpt"]
    for victim in victims:
        victim.parent.mkdir(parents=True, exist_ok=True)
        victim.write_text("precious")
    path = root / "checkpoints" / "last.ckpt"
    content = storage.read(path)
    content["callbacks"][KEY][key] = [name] if key == "surplus" else {name: 1.0}
    storage.write(content, path)
    before = sorted(each for each in tmp_path.rglob("*"))
    trainer = new_trainer(ModelCheckpoint(save_top_k=1), default_root_dir=root, max_epochs=3)
    with pytest.raises(MisconfigurationError) as caught:
        trainer.fit(Line(), BATCHES, ckpt_path=path)
    assert f"{path}: 'callbacks'[{KEY!r}]: {key!r} " in str(caught.value)
    assert sorted(each for each in tmp_path.rglob("*")) == before
    assert all(victim.read_text() == "precious" for victim in victims)


def test_a_link_in_the_folder_is_deleted_and_not_its_target(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    folder = CheckpointFolder(tmp_path / "folder")
    folder.path.mkdir()
    os.symlink(target, tmp_path / "folder" / "old.ckpt")
    assert folder.delete(["old.ckpt"]) == {}
    assert target.read_text() == "precious" and list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize(
    "name", [".last.ckpt.tmp", ".epoch=0-step=4.ckpt.tmp", "last.ckpt", "previous.ckpt", "epoch=0-step=4.ckpt"]
)
def test_a_planted_link_is_never_written_through(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / name).symlink_to(victim)
    trainer = new_trainer(ModelCheckpoint(), default_root_dir=tmp_path, max_epochs=2)
    trainer.fit(Line(), BATCHES)
    trainer.save_checkpoint(tmp_path / "checkpoints" / name)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "checkpoints" / "last.ckpt").is_symlink()


def test_half_written_files_of_killed_processes_go_and_others_stay(tmp_path: Path) -> None:
    left = [".last.ckpt.tmp", ".last.ckpt.0123456789abcdef.tmp", ".epoch=1-step=2.ckpt.0123456789abcdef.tmp"]
    others = [".notes.tmp", "a.tmp", ".last.ckpt.backup.tmp", ".last.ckpt.0123456789ABCDEF.tmp", ".last.ckpt.0123.tmp"]
    for name in [*left, *others]:
        (tmp_path / name).write_text("half")
    CheckpointFolder(tmp_path).prepare(claims=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_the_next_writer_of_a_file_deletes_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".a[b].ckpt.0123456789abcdef.tmp").write_text("half")
    (tmp_path / ".ab.ckpt.0123456789abcdef.tmp").write_text("of another file")
    storage.write({"state_dict": {}}, tmp_path / "a[b].ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ab.ckpt.0123456789abcdef.tmp", "a[b].ckpt"]


def test_no_link_can_be_planted_under_a_temporary_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by somebody who knows it."""
    victim = tmp_path / "victim"
    victim.write_text("precious")

    def plant(target: Path) -> Path:
        path = tmp_path / "known.tmp"
        path.symlink_to(victim)
        return path

    monkeypatch.setattr(storage, "temporary_name", plant)
    with pytest.raises(FileExistsError):
        storage.write({"state_dict": {}}, tmp_path / "a.ckpt")
    assert victim.read_text() == "precious" and not (tmp_path / "a.ckpt").exists()


def test_names_that_a_run_writes_are_accepted(tmp_path: Path) -> None:
    for filename in ("{epoch}-{step}", "{step}.{val_loss:.2f}", "caf\u00e9 {step}", "a b {epoch}"):
        folder = tmp_path / filename.partition("{")[0].strip() if not filename.startswith("{") else tmp_path / "x"
        for epochs in (1, 2):
            checkpoint = ModelCheckpoint(folder, filename=filename, save_top_k=-1)
            trainer = new_trainer(checkpoint, LRSchedulerStepping(), default_root_dir=tmp_path, max_epochs=epochs)
            trainer.fit(Line(), BATCHES, BATCHES, ckpt_path="last")
        assert len(checkpoint.kept) == 2, "those of the first run are known"
        for path in folder.iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: field([], "a", int), "the state is a list, and has to be a dict"),
        (lambda: field({}, "a", int), "it lacks 'a'"),
        (lambda: field({"a": True}, "a", int), "'a' is a bool, and has to be a int"),
        (lambda: field({"a": None}, "a", float, str), "'a' is None, and has to be a float or str"),
        (lambda: whole({"a": -1}, "a"), "'a' is -1, and has to be a whole number from 0"),
        (
            lambda: items({"a": {"b": "c"}}, "a", lambda key, value: False, "numbers"),
            "'a' holds 'b': 'c', and has to hold numbers",
        ),
        (lambda: file_names("abc", "a", ".*", "a name"), "'a' is a str, and has to hold names of files"),
        (lambda: file_names(["b"], "a", "c", "a name"), "'a' names 'b', which is not a name. Nothing was changed"),
    ],
)
def test_what_does_not_fit_is_named(read: Any, message: str) -> None:
    with pytest.raises(MisconfigurationError, match=message):
        read()


@pytest.mark.parametrize("name", ["a", "a.ckpt", ".a", "a b", "caf\u00e9", "a\nb", "-a"])
def test_a_name_is_a_name(name: str) -> None:
    assert is_name(name) and name != PREVIOUS
