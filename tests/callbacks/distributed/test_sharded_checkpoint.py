"""The folders of sharded tensors: when they are removed, and how they are read without running code."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import Metadata

from eventtrain.callbacks.distributed.sharded_checkpoint import OWNER, SafeUnpickler, Shards
from eventtrain.checkpoint import storage
from eventtrain.distributed import SingleProcess


def new_folder(root: Path, name: str, owner: Path | None = None) -> Path:
    """Make a folder of sharded tensors."""
    (root / name).mkdir(parents=True)
    if owner is not None:
        (root / name / OWNER).write_text(str(owner))
    return root / name


def test_only_folders_that_no_file_refers_to_are_removed(tmp_path: Path) -> None:
    root, files, other = tmp_path / "checkpoints" / "shards", tmp_path / "files", tmp_path / "other"
    saved, exported = files / "last.ckpt", files / "exported.pt"
    for path, name in ((saved, "last"), (files / "kept.ckpt", "kept"), (exported, "exported"), (other / "a.ckpt", "unowned")):
        storage.write({"state_dict": {}, "shards": {"name": name}}, path)
    (files / "damaged.ckpt").write_bytes(b"nothing")
    stay = [new_folder(root, "last"), new_folder(root, "kept", saved), new_folder(root, "exported", exported)]
    stay += [new_folder(root, "another's", other / "last.ckpt"), new_folder(root, "unowned"), new_folder(root, "being written")]
    go = [new_folder(root, "surplus", saved), new_folder(root, "of a killed run")]
    shards = Shards(root, SingleProcess())
    shards.used.add("being written")
    shards.clear(saved)
    assert [folder.name for folder in stay if not folder.exists()] == []
    assert [folder.name for folder in go if folder.exists()] == []
    assert (stay[0] / OWNER).read_text() == str(saved)


class Harmful:
    """An object that runs code if it is unpickled without care."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize(
    "content", [Harmful(), os.getcwd, subprocess.Popen, Metadata], ids=["Harmful", "getcwd", "Popen", "Metadata"]
)
def test_an_index_is_read_without_running_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "index").write_bytes(pickle.dumps(content))
    with open("index", "rb") as file:
        if content is Metadata:
            assert SafeUnpickler(file).load() is Metadata
        else:
            with pytest.raises(pickle.UnpicklingError, match="it names"):
                SafeUnpickler(file).load()
    assert not Path("harmed").exists()


@pytest.mark.parametrize("name", ["os.mkdir", "dataclass", "io.open"])
def test_an_index_names_nothing_that_its_module_merely_imports(name: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match="it names"):
        SafeUnpickler(io.BytesIO()).find_class("torch.distributed.checkpoint.metadata", name)
