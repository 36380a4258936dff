"""Loggers and profilers that write to a store which fsspec reaches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec import filesystem  # type: ignore[import-untyped]
from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]

from eventtrain import MisconfigurationError
from eventtrain.callbacks import EventTimeline, JSONLinesLogger, LRSchedulerStepping, TensorBoardLogger, TorchProfiler
from eventtrain.callbacks.loggers import run_files
from eventtrain.paths import check_path
from tests.callbacks.loggers.logged import Model, fit, numbered, points, run
from tests.kit import Line, On, new_trainer, train

memory = filesystem("memory")
DATA = [torch.full((2, 1), float(x)) for x in (1, 2, 3)]
pytestmark = pytest.mark.usefixtures("in_tmp_path")


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in memory.cat_file(path).decode().splitlines()]


def logger() -> JSONLinesLogger:
    return JSONLinesLogger(log_every_n_steps=1)


def root_of(store: str) -> Any:
    return check_path(store, "test", "root")


def test_lines_in_a_store_are_those_on_a_disk(store: str, tmp_path: Path) -> None:
    for root in (store, str(tmp_path)):
        torch.manual_seed(0)
        train(Line(on_step=True), DATA, logger(), default_root_dir=root, val=DATA)
    there = [{**line, "time": 0} for line in lines(f"{store}/metrics.jsonl")]
    here = [{**json.loads(line), "time": 0} for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert there == here and len(here) == 4


def test_a_second_run_in_a_store_gets_a_file_of_its_own(store: str) -> None:
    first, second = logger(), logger()
    for each in (first, second):
        train(Line(on_step=True), DATA, each, default_root_dir=store)
    assert (str(first.run_path), str(second.run_path)) == (f"{store}/metrics.jsonl", f"{store}/metrics-1.jsonl")


def test_a_run_that_resumes_in_a_store_has_each_step_once(store: str) -> None:
    root = root_of(store)
    run(root, Model(), DATA2, logger(), LRSchedulerStepping(), fails_at=6)
    assert [line["step"] for line in lines(f"{store}/metrics.jsonl") if line["scope"] == "step"] == [1, 2, 3, 4, 5]
    run(root, Model(), DATA2, logger(), LRSchedulerStepping(), ckpt_path=f"{store}/epoch_0.ckpt")
    steps = [line["step"] for line in lines(f"{store}/metrics.jsonl") if line["scope"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


DATA2 = [torch.full((2, 2), float(x)) for x in (1, 2, 3, 4)]


def test_event_files_in_a_store_hold_each_step_once_after_a_resume(store: str) -> None:
    root = root_of(store)
    _, first, _ = fit(root, fails_at=6)
    board, second, _ = fit(root, ckpt_path=f"{store}/epoch_0.ckpt")
    assert str(board.run_dir) == f"{store}/runs/Model/version_0"
    assert points(board, "loss") == numbered([*first.losses[:4], *second.losses])


def test_runs_in_a_store_get_directories_of_their_own(store: str) -> None:
    boards = [fit(root_of(store))[0] for _ in range(2)]
    assert [str(board.run_dir) for board in boards] == [f"{store}/runs/Model/version_{n}" for n in range(2)]


def test_a_file_goes_to_the_store_at_checkpoints_and_now_and_then(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    put = MemoryFileSystem.put_file

    def count(self: Any, local: str, remote: str, **options: Any) -> Any:
        if remote.endswith(".jsonl"):
            sent.append(Path(local).read_bytes().count(b"\n"))
        return put(self, local, remote, **options)

    def save(trainer: Any, event: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(f"{store}/a.ckpt")

    monkeypatch.setattr(MemoryFileSystem, "put_file", count)
    train(Line(on_step=True), DATA, logger(), On(take_checkpoint=save), default_root_dir=store)
    assert [count for count in sent if count] == [2, 3]  # with the checkpoint and at the end
    sent.clear()
    monkeypatch.setattr(run_files, "SEND_INTERVAL", -1.0)
    train(Line(on_step=True), DATA, logger(), default_root_dir=store)
    assert [count for count in sent if count] == [1, 2, 3, 3]


def test_a_store_that_fails_later_costs_a_warning_and_not_the_run(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("no credentials")

    def patch(trainer: Any, event: Any) -> None:
        monkeypatch.setattr(MemoryFileSystem, "put_file", fail)

    with pytest.warns(UserWarning, match="JSONLinesLogger has stopped writing: memory://.*no credentials"):
        trainer = train(Line(on_step=True), DATA, logger(), On(train_end=patch), default_root_dir=store)
    assert trainer.global_step == 3


@pytest.mark.parametrize("kind", [JSONLinesLogger, TensorBoardLogger])
def test_a_store_that_cannot_be_written_to_is_refused_before_training(
    store: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("no credentials")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", fail)
    with pytest.raises(MisconfigurationError, match=f"{kind.__name__} cannot write to .*no credentials"):
        new_trainer(kind(), default_root_dir=store).fit(Line(), DATA)


def test_profilers_write_their_files_to_a_store(store: str) -> None:
    profiler = TorchProfiler(wait=0, warmup=0, active=2, print_summary=False)
    train(Line(), DATA * 3, EventTimeline(), profiler, default_root_dir=store)
    page, trace = (memory.cat_file(f"{store}/timelines/timeline-0.{kind}") for kind in ("html", "json"))
    assert page.startswith(b"<!") and json.loads(trace)
    assert profiler.traces == root_of(f"{store}/profiles").glob("*")
    assert json.loads(memory.cat_file(str(profiler.traces[0])))["traceEvents"]


def test_the_traces_are_beside_the_board_in_a_store(store: str) -> None:
    profiler = TorchProfiler(wait=0, warmup=0, active=2, print_summary=False)
    train(Line(), DATA * 3, board := TensorBoardLogger(), profiler, default_root_dir=store)
    assert [path.parent for path in profiler.traces] == [board.run_dir]
