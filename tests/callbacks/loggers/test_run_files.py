"""Loggers share files that continue at a position, new places for each run, and a description of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from eventtrain import LightningModule
from eventtrain.callbacks.loggers import run_files
from tests.kit import local


def test_new_files_are_numbered(tmp_path: Path) -> None:
    made = [run_files.new_file(tmp_path / "deep" / "name.tar.gz").name for _ in range(3)]
    assert made == ["name.tar.gz", "name.tar-1.gz", "name.tar-2.gz"]


@pytest.mark.parametrize(("position", "left"), [(None, b"abcdef+"), (0, b"+"), (4, b"abcd+"), (99, b"abcdef+")])
def test_a_run_file_continues_at_a_position(tmp_path: Path, position: int | None, left: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abcdef")
    file = run_files.RunFile(path, "test", position)
    assert file.position == len(left) - 1
    file.write(b"+")
    file.close()
    file.close()
    assert path.read_bytes() == left and file.position == len(left)


def test_a_path_below_the_root_is_kept_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_files.portable(tmp_path / "a" / "b", Path()) == "a/b"
    assert run_files.portable(Path("a/b"), Path("a")) == "b"
    assert run_files.portable(Path("a"), tmp_path / "elsewhere") == (tmp_path / "a").as_posix()
    assert run_files.portable(None, Path()) is None


def test_runs_that_begin_at_once_do_not_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes the first free number after it was looked up."""
    looked_up = run_files.next_version

    def look_up(parent: Path) -> Path:
        directory = local(looked_up(parent))
        if directory.name == "version_0":
            directory.mkdir()
        return directory

    monkeypatch.setattr(run_files, "next_version", look_up)
    assert run_files.new_version(tmp_path / "parent") == tmp_path / "parent" / "version_1"


def test_a_table_escapes_its_separators() -> None:
    assert run_files.table({"name": "a|b\nc"}).splitlines()[-1] == r"| name | a\|b c |"


def test_a_very_long_module_is_shortened() -> None:
    class Long(LightningModule):
        def __repr__(self) -> str:
            return "x" * 50_000

    text = run_files.module_text(Long())
    assert len(text) < 21_000 and text.endswith("... and 30000 characters more")
