"""The paths that users give: one function for all of them, local, remote or wrong."""

from __future__ import annotations

import copy
import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec import filesystem, register_implementation  # type: ignore[import-untyped]
from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]

from eventtrain import MisconfigurationError, Trainer
from eventtrain.callbacks import (
    EventTimeline,
    ExponentialMovingAverage,
    JSONLinesLogger,
    ModelCheckpoint,
    TensorBoardLogger,
    TorchProfiler,
)
from eventtrain.paths import RemotePath, check_path
from tests.kit import Line, On, new_trainer, train

DATA = [torch.ones(2, 1)] * 3


# ------------------------------------------------------------------ which paths there are


def test_a_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert check_path("~/runs", "F", "path") == check_path(Path("~/runs"), "F", "path") == Path("/home/ada/runs")
    assert check_path("file://~/runs", "F", "path") == Path("/home/ada/runs")
    assert check_path("runs/~", "F", "path") == Path("runs/~")


@pytest.mark.parametrize("local", ["runs", "C:\\runs", "C:/runs", "c://runs", "runs:1", "a:b/c", "./x:/y", "epoch=1::2"])
def test_other_local_paths_stay_as_they_are(local: str) -> None:
    assert check_path(local, "F", "path") == Path(local)
    assert check_path(Path("runs"), "F", "path") == Path("runs")


@pytest.mark.parametrize("protocol", ["file", "local"])
def test_the_protocols_of_local_files_are_local(protocol: str, tmp_path: Path) -> None:
    assert check_path(f"{protocol}://{tmp_path}", "F", "path") == tmp_path


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("zz://runs", r"F\(path='zz://runs'\): 'zz' is not one of fsspec's protocols.*s3fs.*gcsfs"),
        ("S3://bucket", r"'S3' is not one.*Did you mean 's3'\?"),
        ("gcp://bucket", r"'gcp' is not one.*Did you mean 'gcs'\?|'gcp' is not one"),
        ("zip://a::s3://b/c.zip", r"'zip' is not one.*single protocol"),
        ("simplecache::memory://b", r"'simplecache::memory' is not one.*single protocol"),
        ("runs/s3://bucket", r"'runs/s3' is not one"),
        ("s3://bucket/runs", r"fsspec cannot use s3://: ImportError: Install s3fs"),
        ("gs://bucket/runs", r"fsspec cannot use gs://: ImportError: .*gcsfs"),
        ("dbfs://runs", r"fsspec cannot use dbfs://: TypeError: .*'instance' and 'token'"),
        (Path("s3://bucket/runs"), r"pathlib.Path drops one of them. Give the text 's3://bucket/runs'"),
        (Path("zz://runs"), r"Give the text 'zz://runs'"),
        (Path("file:///data/runs"), r"Give the text 'file:///data/runs'"),
        ("memory:/runs", r"Give the text 'memory://runs'"),
        ("~nobody-of-this-name/runs", r"F\(path='~nobody.*home directory.*whole path"),
        (3, r"F\(path=3\): give a path as a text or a pathlib.Path"),
        (True, r"F\(path=True\): give a path"),
        (None, r"F\(path=None\): give a path"),
        (b"runs", r"F\(path=b'runs'\): give a path"),
        ("ru\0ns", r"give a path as a text"),
        (["runs"], r"F\(path=\['runs'\]\): give a path"),
    ],
)
def test_other_values_are_refused_and_the_message_names_the_argument(value: Any, message: str) -> None:
    with pytest.raises(MisconfigurationError, match=message):
        check_path(value, "F", "path")


def test_a_protocol_that_the_user_has_registered_is_known() -> None:
    class Mine(MemoryFileSystem):  # type: ignore[misc]
        protocol = "mine"

    register_implementation("mine", Mine)
    assert str(check_path("mine://runs/", "F", "path")) == "mine://runs"


# ------------------------------------------------------------------ every argument

ARGUMENTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "Trainer(default_root_dir)": (lambda path: new_trainer(default_root_dir=path), r"Trainer\(default_root_dir="),
    "ModelCheckpoint(dirpath)": (ModelCheckpoint, r"ModelCheckpoint\(dirpath="),
    "TensorBoardLogger(log_dir)": (TensorBoardLogger, r"TensorBoardLogger\(log_dir="),
    "JSONLinesLogger(path)": (JSONLinesLogger, r"JSONLinesLogger\(path="),
    "EventTimeline(dirpath)": (lambda path: EventTimeline(dirpath=path), r"EventTimeline\(dirpath="),
    "TorchProfiler(dirpath)": (TorchProfiler, r"TorchProfiler\(dirpath="),
    "save_checkpoint(path)": (lambda path: train(Line(), DATA).save_checkpoint(path), r"save_checkpoint\(path="),
    "load_from_checkpoint(path)": (Line.load_from_checkpoint, r"Line.load_from_checkpoint\(checkpoint_path="),
    "load_into(path)": (
        lambda path: ExponentialMovingAverage.load_into(Line(), path),
        r"ExponentialMovingAverage.load_into\(path=",
    ),
    "fit(ckpt_path)": (lambda path: new_trainer().fit(Line(), DATA, ckpt_path=path), r"Trainer.fit\(ckpt_path="),
    "validate(ckpt_path)": (
        lambda path: new_trainer().validate(Line(), DATA, ckpt_path=path),
        r"Trainer.validate\(ckpt_path=",
    ),
    "test(ckpt_path)": (lambda path: new_trainer().test(Line(), DATA, ckpt_path=path), r"Trainer.test\(ckpt_path="),
    "predict(ckpt_path)": (lambda path: new_trainer().predict(Line(), DATA, ckpt_path=path), r"Trainer.predict\(ckpt_path="),
}


@pytest.mark.usefixtures("in_tmp_path")
@pytest.mark.parametrize("value", ["zz://runs/x", "s3://bucket/x", Path("s3://bucket/x"), 7], ids=str)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_every_argument_refuses_what_it_cannot_use_and_makes_no_folder(argument: str, value: Any) -> None:
    use, name = ARGUMENTS[argument]
    with pytest.raises(MisconfigurationError, match=name):
        use(value)
    assert os.listdir() == []


@pytest.mark.usefixtures("in_tmp_path")
def test_every_argument_expands_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    callbacks = [
        ModelCheckpoint("~/checkpoints"),
        TensorBoardLogger("~/boards"),
        JSONLinesLogger("~/metrics.jsonl"),
        EventTimeline(dirpath="~/timelines"),
        TorchProfiler("~/traces", wait=0, warmup=0, print_summary=False),
    ]
    trainer = train(Line(on_epoch=True), DATA, *callbacks, ExponentialMovingAverage(0.5), default_root_dir="~/root")
    trainer.save_checkpoint("~/saved.ckpt")
    trainer.keep_checkpoint("to look at it")
    assert {path.name for path in home.iterdir()} == {
        *("checkpoints", "boards", "metrics.jsonl", "timelines", "traces", "saved.ckpt")
    }
    assert not (tmp_path / "~").exists() and os.listdir() == ["home"]
    ExponentialMovingAverage.load_into(Line(), "~/saved.ckpt")
    assert torch.equal(Line.load_from_checkpoint("~/saved.ckpt").layer.weight, trainer.module.get_parameter("layer.weight"))
    for verb in ("validate", "test", "predict"):
        getattr(new_trainer(), verb)(Line(), DATA, ckpt_path="~/saved.ckpt")
    train(Line(), DATA).save_checkpoint("~/bare.ckpt")
    new_trainer(max_epochs=2).fit(Line(), DATA, ckpt_path="~/bare.ckpt")


@pytest.mark.usefixtures("in_tmp_path")
def test_an_interrupted_run_is_found_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = train(Line(), DATA, default_root_dir="~").keep_checkpoint("to look at it")
    assert path == str(tmp_path / "home" / "checkpoints" / "interrupted.ckpt")
    again = new_trainer(max_epochs=2, default_root_dir="~")
    again.fit(Line(), DATA, ckpt_path="last")
    assert again.global_step == 6


def test_a_default_root_dir_that_is_set_later_counts(store: str) -> None:
    trainer = train(Line(), DATA)
    trainer.default_root_dir = store
    assert trainer.keep_checkpoint("to look at it") == f"{store}/checkpoints/interrupted.ckpt"


def test_two_checkpoint_callbacks_of_one_folder_are_refused_however_it_is_written(store: str, tmp_path: Path) -> None:
    for root, other in ((store, f"{store}/checkpoints"), (str(tmp_path), str(tmp_path / "checkpoints"))):
        with pytest.raises(MisconfigurationError, match="Two ModelCheckpoints write to"):
            train(Line(), DATA, ModelCheckpoint(), ModelCheckpoint(other, every_n_steps=1), default_root_dir=root)


# ------------------------------------------------------------------ remote paths


def test_remote_paths_join_like_those_of_pathlib() -> None:
    root = RemotePath("memory://runs/digits")
    assert str(root / "a" / "b.ckpt") == "memory://runs/digits/a/b.ckpt"
    assert str(root / Path("../a")) == "memory://runs/a"
    assert root / "/data" == Path("/data") and root / RemotePath("memory://b") == RemotePath("memory://b")
    assert Path("/data") / root == root
    assert (root.name, str(root.parent), str(root.with_name("b"))) == ("digits", "memory://runs", "memory://runs/b")
    assert str(RemotePath("memory://a.ckpt").with_name("b.ckpt")) == "memory://b.ckpt"
    with pytest.raises(TypeError):
        open(root)  # type: ignore[call-overload]  # noqa: SIM115


def test_remote_paths_are_values() -> None:
    path = RemotePath("memory://runs")
    assert copy.deepcopy(path) == pickle.loads(pickle.dumps(path)) == path
    assert len({path, RemotePath("memory://runs")}) == 1


def test_the_files_of_a_remote_folder(store: str, tmp_path: Path) -> None:
    folder = RemotePath(store) / "a"
    assert isinstance(folder, RemotePath)
    assert not folder.exists() and folder.glob("*") == []
    (tmp_path / "text").write_text("text")
    first, second = folder.with_name("a") / "1.ckpt", folder / "2.ckpt"
    assert isinstance(first, RemotePath) and isinstance(second, RemotePath)
    first.put(str(tmp_path / "text"))
    second.hardlink_to(first)
    (folder / "3.txt").touch()
    assert folder.is_dir() and first.is_file() and folder.glob("*.ckpt") == [first, second]
    assert first.stat().st_size == 4 and first.stat().st_mtime > 1e9
    second.replace(folder / "3.txt")
    assert folder.glob("*") == [first, folder / "3.txt"]
    with pytest.raises(FileExistsError, match=r"1\.ckpt"):
        first.touch(exist_ok=False)
    first.unlink()
    first.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        first.unlink()


def test_an_error_of_a_store_is_an_os_error_that_names_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("no credentials")

    monkeypatch.setattr(MemoryFileSystem, "modified", fail)
    with pytest.raises(OSError, match="no credentials") as caught:
        RemotePath("memory://a").stat()
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, "memory://a")


def test_a_trainer_prints_its_remote_root() -> None:
    assert Trainer(max_epochs=1, default_root_dir="memory://runs/").default_root_dir == "memory://runs"


@pytest.mark.usefixtures("in_tmp_path")
def test_a_listener_may_offer_checkpoints_as_texts(store: str) -> None:
    train(Line(), DATA).save_checkpoint("old.ckpt")
    newer = train(Line(), DATA, max_epochs=2)
    newer.save_checkpoint(f"{store}/new.ckpt")
    offers = On(find_checkpoint=lambda trainer, event: event.offer("old.ckpt", f"{store}/new.ckpt"))
    trainer = new_trainer(offers, max_epochs=3)
    starts: list[int] = []
    trainer.signals.train_start.connect(lambda trainer, event: starts.append(trainer.global_step))
    trainer.fit(Line(), DATA, ckpt_path="last")
    assert starts == [newer.global_step] == [6]
    wrong = On(find_checkpoint=lambda trainer, event: event.offer("zz://new.ckpt"))
    with pytest.raises(MisconfigurationError, match=r"FindCheckpoint.offer\(paths='zz://new.ckpt'\)"):
        new_trainer(wrong).fit(Line(), DATA, ckpt_path="last")


def test_hyperparameters_are_read_from_a_store(store: str) -> None:
    memory = filesystem("memory")
    memory.pipe_file(f"{store}/hparams.json", b'{"inputs": 3}')
    train(Line(3), [torch.ones(2, 3)]).save_checkpoint(f"{store}/line.ckpt")
    loaded = Line.load_from_checkpoint(f"{store}/line.ckpt", hparams_file=f"{store}/hparams.json")
    assert loaded.layer.in_features == 3
