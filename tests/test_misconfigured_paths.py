"""Paths that are refused, each beside the nearest form that trains."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from eventtrain import Trainer
from eventtrain.callbacks import (
    EventTimeline,
    ExponentialMovingAverage,
    FullyShardedDataParallel,
    JSONLinesLogger,
    ModelCheckpoint,
    TensorBoardLogger,
    TorchProfiler,
)
from eventtrain.callbacks.distributed.sharded_checkpoint import refuse_remote_places
from tests.kit import Line, ModuleOf
from tests.misconfigurations import Case, after_fit, check_refusal, check_remedy, fit

pytestmark = pytest.mark.usefixtures("in_tmp_path")

PATH = "text or a pathlib.Path"
PROTOCOLS = "local path.*s3://.*gs://"


def saved(name: str = "a.ckpt") -> str:
    """Write a checkpoint of `ModuleOf`, and return its name."""
    fit().save_checkpoint(name)
    return name


def averaged() -> str:
    """Write a checkpoint that holds averages of `ModuleOf`, and return its name."""
    fit(None, ExponentialMovingAverage(0.5)).save_checkpoint("averaged.ckpt")
    return "averaged.ckpt"


def evaluated(verb: str, ckpt_path: Any) -> Trainer:
    """Fit a line, evaluate it with weights of a checkpoint, and return the trainer."""
    data = [torch.ones(2, 1)]
    trainer = fit(Line(), data=data)
    trainer.save_checkpoint("line.ckpt")
    getattr(trainer, verb)(Line(), data, ckpt_path=ckpt_path)
    return trainer


def file(name: str = "taken") -> str:
    Path(name).write_text("a file")
    return name


def folder(name: str = "folder") -> str:
    Path(name).mkdir()
    return name


def resumed(ckpt_path: Any) -> Trainer:
    return fit(ckpt_path=ckpt_path, max_epochs=2)


def loaded(path: Any) -> Trainer:
    return fit(ModuleOf.load_from_checkpoint(path))


def with_averages(path: Any) -> Trainer:
    ExponentialMovingAverage.load_into(model := ModuleOf(), path)
    return fit(model)


def saved_as(path: Any) -> Trainer:
    return after_fit(lambda trainer, module: trainer.save_checkpoint(path))


def sharded(*callbacks: Any, root: str = ".") -> Trainer:
    refuse_remote_places(Trainer(max_epochs=1, callbacks=[FullyShardedDataParallel(), *callbacks], default_root_dir=root))
    return fit()


CASES: dict[str, Case] = {
    "a root with an unknown protocol": Case(
        lambda: fit(default_root_dir="zz://runs"),
        (r"Trainer\(default_root_dir='zz://runs'\)", "'zz' is not one of fsspec's protocols", PROTOCOLS),
        lambda: fit(default_root_dir="memory://runs"),
    ),
    "a root whose package is not installed": Case(
        lambda: fit(default_root_dir="s3://bucket/runs"),
        (r"Trainer\(default_root_dir='s3://bucket/runs'\)", "cannot use s3://", "Install s3fs", "pip install s3fs"),
        lambda: fit(default_root_dir="runs"),
    ),
    "a root that pathlib has changed": Case(
        lambda: fit(default_root_dir=Path("s3://bucket/runs")),
        (r"Trainer\(default_root_dir=PosixPath\('s3:/bucket/runs'\)\)", "drops one", "Give the text 's3://bucket/runs'"),
        lambda: fit(default_root_dir=Path("runs")),
    ),
    "no root": Case(
        lambda: fit(default_root_dir=None), (r"Trainer\(default_root_dir=None\)", PATH), lambda: fit(default_root_dir=".")
    ),
    "a protocol in capitals": Case(
        lambda: fit(None, ModelCheckpoint("MEMORY://runs")),
        (r"ModelCheckpoint\(dirpath='MEMORY://runs'\)", "'MEMORY' is not one", "Did you mean 'memory'"),
        lambda: fit(None, ModelCheckpoint("memory://capitals")),
    ),
    "a chain of protocols": Case(
        lambda: fit(None, ModelCheckpoint("simplecache::memory://runs")),
        (r"ModelCheckpoint\(dirpath='simplecache::memory://runs'\)", "not one", "single protocol"),
        lambda: fit(None, ModelCheckpoint("memory://chain")),
    ),
    "a folder in bytes": Case(
        lambda: fit(None, ModelCheckpoint(b"runs")),  # type: ignore[arg-type]
        (r"ModelCheckpoint\(dirpath=b'runs'\)", PATH),
        lambda: fit(None, ModelCheckpoint("runs")),
    ),
    "the home of nobody": Case(
        lambda: fit(None, ModelCheckpoint("~nobody-of-this-name/runs")),
        (r"ModelCheckpoint\(dirpath='~nobody-of-this-name/runs'\)", "home directory", "whole path"),
        lambda: fit(None, ModelCheckpoint(Path.cwd() / "runs")),
    ),
    "a store that only reads": Case(
        lambda: fit(None, ModelCheckpoint("data://runs")),
        (r"ModelCheckpoint\(dirpath='data://runs'\)", "nothing can be written there", "another directory"),
        lambda: fit(None, ModelCheckpoint("memory://writes")),
    ),
    "one folder for two, by its whole path": Case(
        lambda: fit(
            None, ModelCheckpoint(), ModelCheckpoint(Path.cwd() / "checkpoints", every_n_steps=1), default_root_dir=Path.cwd()
        ),
        ("Two ModelCheckpoints write to", "another dirpath"),
        lambda: fit(None, ModelCheckpoint(), ModelCheckpoint("others", every_n_steps=1)),
    ),
    "a protocol within a path": Case(
        lambda: fit(None, TensorBoardLogger("runs/memory://boards")),
        (r"TensorBoardLogger\(log_dir='runs/memory://boards'\)", "'runs/memory' is not one", "memory"),
        lambda: fit(None, TensorBoardLogger("memory://boards")),
    ),
    "a board's folder that pathlib has changed": Case(
        lambda: fit(None, TensorBoardLogger(Path("gs://bucket"))),
        (r"TensorBoardLogger\(log_dir=", "Give the text 'gs://bucket'"),
        lambda: fit(None, TensorBoardLogger(Path("boards"))),
    ),
    "a file for a board's folder": Case(
        lambda: fit(None, TensorBoardLogger(file())),
        ("TensorBoardLogger cannot write to", "taken", "Give a log_dir"),
        lambda: fit(None, TensorBoardLogger("boards")),
    ),
    "a number for a file of lines": Case(
        lambda: fit(None, JSONLinesLogger(1)),  # type: ignore[arg-type]
        (r"JSONLinesLogger\(path=1\)", PATH),
        lambda: fit(None, JSONLinesLogger("1.jsonl")),
    ),
    "a folder for a file of lines": Case(
        lambda: fit(None, JSONLinesLogger(folder())),
        ("JSONLinesLogger cannot write to folder", "directory", "Give a path"),
        lambda: fit(None, JSONLinesLogger("a/metrics.jsonl")),
    ),
    "lines in a store whose package is not installed": Case(
        lambda: fit(None, JSONLinesLogger("gs://bucket/metrics.jsonl")),
        (r"JSONLinesLogger\(path='gs://bucket/metrics.jsonl'\)", "gcsfs", PROTOCOLS),
        lambda: fit(None, JSONLinesLogger("memory://lines/metrics.jsonl")),
    ),
    "a list for a timeline's folder": Case(
        lambda: fit(None, EventTimeline(dirpath=["timelines"])),  # type: ignore[arg-type]
        (r"EventTimeline\(dirpath=\['timelines'\]\)", PATH),
        lambda: fit(None, EventTimeline(dirpath="timelines", steps=0)),
    ),
    "a file for a timeline's folder": Case(
        lambda: fit(None, EventTimeline(dirpath=file())),
        (r"EventTimeline\(dirpath='taken'\)", "cannot be written to", "another directory"),
        lambda: fit(None, EventTimeline(dirpath="timelines", steps=0)),
    ),
    "a trace's folder with a misspelt protocol": Case(
        lambda: fit(None, TorchProfiler("memry://traces")),
        (r"TorchProfiler\(dirpath='memry://traces'\)", "Did you mean 'memory'"),
        lambda: fit(None, TorchProfiler("memory://traces", print_summary=False)),
    ),
    "nothing to save to": Case(
        lambda: saved_as(None), (r"Trainer.save_checkpoint\(path=None\)", PATH), lambda: saved_as("a.ckpt")
    ),
    "a checkpoint saved under an unknown protocol": Case(
        lambda: saved_as("hdfss://a.ckpt"),
        (r"Trainer.save_checkpoint\(path='hdfss://a.ckpt'\)", "Did you mean 'hdfs'"),
        lambda: saved_as("memory://a.ckpt"),
    ),
    "a path with a null character": Case(
        lambda: saved_as("a\0.ckpt"), (r"save_checkpoint\(path='a\\x00.ckpt'\)", PATH), lambda: saved_as("a.ckpt")
    ),
    "an open file to load": Case(
        lambda: loaded(io.BytesIO()),
        (r"ModuleOf.load_from_checkpoint\(checkpoint_path=<_io.BytesIO", PATH),
        lambda: loaded(saved()),
    ),
    "a state dict to load": Case(
        lambda: loaded(ModuleOf().state_dict()),
        (r"ModuleOf.load_from_checkpoint\(checkpoint_path=OrderedDict", PATH),
        lambda: loaded(saved()),
    ),
    "True for a checkpoint": Case(lambda: resumed(True), (r"Trainer.fit\(ckpt_path=True\)", PATH), lambda: resumed(saved())),
    "the content of a checkpoint": Case(
        lambda: resumed({"state_dict": {}}), (r"Trainer.fit\(ckpt_path={'state_dict'", PATH), lambda: resumed(saved())
    ),
    "a folder of checkpoints": Case(
        lambda: resumed(folder("checkpoints")), ("checkpoints is a folder", "ckpt_path='last'"), lambda: resumed(saved())
    ),
    "an empty path": Case(
        lambda: evaluated("validate", ""),
        ("is a folder", "Give a file in it"),
        lambda: evaluated("validate", "line.ckpt"),
    ),
    "a number for a checkpoint to test": Case(
        lambda: evaluated("test", 1), (r"Trainer.test\(ckpt_path=1\)", PATH), lambda: evaluated("test", "line.ckpt")
    ),
    "a checkpoint to predict with that pathlib has changed": Case(
        lambda: evaluated("predict", Path("memory://line.ckpt")),
        (r"Trainer.predict\(ckpt_path=PosixPath\('memory:/line.ckpt'\)\)", "Give the text 'memory://line.ckpt'"),
        lambda: evaluated("predict", Path("line.ckpt")),
    ),
    "averages in a dict": Case(
        lambda: with_averages({}), (r"ExponentialMovingAverage.load_into\(path={}\)", PATH), lambda: with_averages(averaged())
    ),
    "sharded checkpoints in a store": Case(
        lambda: sharded(root="memory://runs"),
        (r"Trainer\(default_root_dir='memory://runs'\)", "FullyShardedDataParallel", "all processes see"),
        lambda: sharded(root="runs"),
    ),
    "checkpoints that name sharded tensors in a store": Case(
        lambda: sharded(ModelCheckpoint("memory://runs")),
        (r"ModelCheckpoint\(dirpath='memory://runs'\)", "FullyShardedDataParallel", "all processes see"),
        lambda: sharded(ModelCheckpoint("runs")),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_refusal_names_the_mistake_and_the_remedy(case: str) -> None:
    check_refusal(CASES[case])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:The checkpoint holds state")
def test_the_nearest_correct_form_trains(case: str) -> None:
    check_remedy(CASES[case])


def test_there_are_many_cases() -> None:
    assert len(CASES) >= 25
