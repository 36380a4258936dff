"""Checkpoints that several processes write together, and files that pretend to be some.

The script ``shard_files.py`` runs once in two processes and saves its results.
"""

from __future__ import annotations

import copy
import io
import os
import pathlib
import pickle
import pickletools
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.state_dict_saver import save

from eventtrain import MisconfigurationError
from eventtrain.callbacks import FullyShardedDataParallel
from eventtrain.callbacks.distributed.earlier_shards import read_index, read_values
from eventtrain.callbacks.distributed.sharded_checkpoint import KEY, index_of, layout, put_back
from eventtrain.callbacks.distributed.sharded_tensors import Box, check_boxes
from eventtrain.callbacks.distributed.whole_checkpoint import make_whole
from eventtrain.checkpoint import storage
from eventtrain.checkpoint.weights import load_weights
from tests.callbacks.distributed.launch import HERE, result, start
from tests.callbacks.distributed.shard_files import QUICK
from tests.kit import Line, new_trainer, rows
from tests.resuming import equal

SCRIPT = HERE / "shard_files.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of the quick checks, on rank zero and on rank one."""
    folder = tmp_path_factory.mktemp("shards")
    start(SCRIPT, folder, *QUICK)
    return [result(folder, rank) for rank in range(2)]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of the other checks."""
    folder = tmp_path_factory.mktemp("errors")
    start(SCRIPT, folder)
    return [result(folder, rank) | {"error_in_one": result(folder, f"error-{rank}")} for rank in range(2)]


# ------------------------------------------------------------------ in two processes


@pytest.mark.slow
def test_a_copy_of_the_file_is_a_whole_checkpoint_after_the_run_went_on(results: list[Any]) -> None:
    for rank in results:
        copied = rank["copied"]
        assert copied["step"] == 4
        assert equal(copied["straight"], copied["resumed"])


@pytest.mark.slow
def test_a_save_opens_no_other_checkpoint(results: list[Any]) -> None:
    for rank in results:
        opened = [path for path in rank["copied"]["opened"] if path.endswith((".ckpt", ".tmp"))]
        assert len(opened) >= 10
        assert [path for path in opened if not Path(path).name.startswith(".")] == []


@pytest.mark.slow
def test_the_files_of_a_run_are_its_checkpoints_and_nothing_else(results: list[Any]) -> None:
    kept = [f"checkpoints/epoch=1-step={step}.ckpt" for step in (10, 7, 8, 9)]
    for rank in results:
        assert rank["copied"]["files"] == [*kept, "checkpoints/last.ckpt", "checkpoints/previous.ckpt"]


@pytest.mark.slow
def test_a_damaged_shard_is_named_and_passed_over_in_all_processes(results: list[Any]) -> None:
    first, second = (rank["damaged"] for rank in results)
    assert first == second
    assert len(first) == 10
    for number, warned in enumerate(first[:8]):  # a bit in the bytes of one process, and of the other
        assert len(warned) == 1
        assert "last.ckpt is no checkpoint that can be read safely: it is damaged" in warned[0]
        assert f"archive/shards/{number % 2} has another checksum" in warned[0]
    truncated, of_another_checkpoint = first[8:]
    assert "last.ckpt is no checkpoint" in truncated[0]
    assert "shards/1 has another checksum" in of_another_checkpoint[0]


@pytest.mark.slow
def test_training_goes_on_while_shards_are_written_and_the_file_appears_when_all_are(results: list[Any]) -> None:
    for rank in results:
        background = rank["background"]
        assert background["seen"] == [(number, number > 4) for number in range(1, 11)]
        assert equal(background["ours"], background["undisturbed"])
        assert equal(background["resumed"], background["undisturbed"])
        assert "checkpoints/previous.ckpt" in background["files"]


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_of_one_process_is_a_warning_of_all(errors: list[Any], failing: int, in_background: bool) -> None:
    first, second = (rank["full_disk"][0][failing, in_background] for rank in errors)
    assert first["warned"] == second["warned"]
    (warned,) = first["warned"]
    assert "could not write" in warned and "epoch=1-step=6.ckpt: OSError: [Errno 28]" in warned
    assert ("rank 1 failed" in warned) == (failing == 1)
    for rank in (first, second):
        assert equal(rank["same"], rank["undisturbed"])
        ((files, kept, step),) = rank["at 8"]
        assert step == 4  # the file before is still there
        names = ("epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt", "last.ckpt", "previous.ckpt")
        # The hidden file is the run's claim to the folder.
        assert files == [".checkpoints.run", *(f"checkpoints/{name}" for name in names)]
        assert in_background or list(kept) == ["epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt"]
        names = ("epoch=1-step=10.ckpt", "epoch=1-step=8.ckpt", "last.ckpt", "previous.ckpt")
        assert rank["files"] == [f"checkpoints/{name}" for name in names]


@pytest.mark.slow
def test_a_full_disk_of_one_process_ends_the_run_in_all(errors: list[Any]) -> None:
    for rank in errors:
        _, messages, left, exists = rank["full_disk"]
        assert [number for number, _ in messages] == [28, 28]
        assert "rank 1 failed at the writing of a checkpoint: OSError: [Errno 28] No space left" in messages[0][1]
        assert left == [] and not exists


@pytest.mark.slow
def test_a_value_that_no_file_can_hold_ends_all_processes(errors: list[Any]) -> None:
    (first, by_hand), (second, _) = (rank["refused_content"] for rank in errors)
    assert first[1] == "MisconfigurationError" and "checkpoint['mine'] is a builtins.object" in first[2]
    assert second[1] == "OSError" and "rank 0 failed at the beginning of a checkpoint: MisconfigurationError" in second[2]
    assert "Call trainer.save_checkpoint(path) in all processes" in by_hand[2]


@pytest.mark.slow
def test_writing_may_take_longer_than_an_exchange(errors: list[Any]) -> None:
    for rank in errors:
        values, seconds = rank["slow"]
        assert values == [0, 1] and seconds > 3.9  # the timeout was two seconds


@pytest.mark.slow
def test_an_error_in_all_processes_leaves_a_checkpoint_of_the_last_safe_point(errors: list[Any]) -> None:
    for rank in errors:
        error = rank["error_in_all"]
        assert error["raised"][0] == "ArithmeticError" and "and afterwards" not in error["raised"][1]
        assert error["step"] == 7
        assert equal(error["undisturbed"], error["resumed"])


@pytest.mark.slow
def test_an_error_in_one_process_leaves_the_checkpoints_before(errors: list[Any]) -> None:
    (first, files), (second, _) = (rank["error_in_one"] for rank in errors)
    assert files == ["checkpoints/epoch=0-step=5.ckpt", "checkpoints/last.ckpt"]
    assert second[0] == "ArithmeticError" and "waited 0:00:01 for the others at the checkpoint of a run" in second[1]
    assert first[0] in ("ExchangeError", "RuntimeError")  # it waited for the other one in the step


# ------------------------------------------------------------------ files that pretend


def new_file(folder: Path) -> tuple[dict[str, Any], Path]:
    """Write a checkpoint as two processes do, of which each holds one half of a tensor of four rows."""
    halves = [torch.arange(6.0).reshape(2, 3), torch.arange(6.0, 12.0).reshape(2, 3)]
    place = ("state_dict", "weight")
    records = [(24, [(place, None, 0, [4, 3], torch.float32, [rank, 0, [2 * rank, 0], [2, 3]])]) for rank in range(2)]
    content: dict[str, Any] = {"state_dict": {"weight": None}, "window": {"gradients": {}}, "ranks": [], KEY: index_of(records)}
    path = folder / "mine.ckpt"
    storage.write(content, path)
    with open(path, "r+b") as file, zipfile.ZipFile(file, "a") as archive:
        headers, end = layout("archive", [24, 24], archive.start_dir)
        for (info, _), half in zip(headers, halves, strict=True):
            info.CRC = zlib.crc32(half.numpy().tobytes())
            file.seek(info.header_offset)
            file.write(info.FileHeader(zip64=True) + half.numpy().tobytes())
            archive.filelist.append(info)
        archive.start_dir = end
        archive.writestr("archive/shards/complete", b"")
    return storage.read(path), path


def test_a_list_that_fits_is_read(tmp_path: Path) -> None:
    content, path = new_file(tmp_path)
    put_back(content, path, nn.Module(), 0, tmp_path)
    assert torch.equal(content["state_dict"]["weight"], torch.arange(12.0).reshape(4, 3))
    assert KEY not in content


def changed(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(index: dict[str, Any]) -> None:
        target: Any = index
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = to

    return change


def twice(index: dict[str, Any]) -> None:
    index["tensors"].append(copy.deepcopy(index["tensors"][0]))


CRAFTED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a later format": (changed("format", to=2), "of a later version"),
    "a size that is too large": (changed("tensors", 0, "shape", to=[2**62, 2**62]), "not all of a tensor"),
    "a huge part": (changed("tensors", 0, "parts", 0, 3, to=[2**62, 3]), "is not in it"),
    "a huge tensor of huge parts": (
        lambda index: index["tensors"][0].update(shape=[2**60, 3], parts=[[0, 0, [0, 0], [2**60, 3]]]),
        "share bytes, or one ends after them",
    ),
    "a part that is negative": (changed("tensors", 0, "parts", 0, 2, to=[-2, 0]), "a number is wrong"),
    "a part that overlaps": (changed("tensors", 0, "parts", 1, 2, to=[1, 0]), "overlap"),
    "a part that is missing": (lambda index: index["tensors"][0]["parts"].pop(), "not all of a tensor"),
    "bytes that are used twice": (changed("tensors", 0, "parts", 1, 0, to=0), "share bytes"),
    "bytes after the end": (changed("tensors", 0, "parts", 1, 1, to=8), "ends after them"),
    "a tensor that is listed twice": (twice, "share bytes"),
    "a larger type": (changed("tensors", 0, "dtype", to=torch.float64), "share bytes, or one ends"),
    "no type": (changed("tensors", 0, "dtype", to="float32"), "no place or no type"),
    "a process that did not write": (changed("tensors", 0, "parts", 1, 0, to=7), "in the bytes of rank 7, of 2"),
    "another size of an entry": (changed("sizes", to=[24, 48]), "the bytes of rank 1 have another size"),
    "an entry that is missing": (changed("sizes", to=[24, 24, 24]), "the bytes of rank 2 are missing"),
    "a place that is not there": (changed("tensors", 0, "place", to=["optimizer_states", 0, "x"]), "KeyError"),
    "a place that is empty": (changed("tensors", 0, "place", to=[]), "no place"),
    "a flag for a number": (changed("tensors", 0, "parts", 1, 1, to=True), "a number is wrong"),
    "no list at all": (lambda index: index.pop("tensors"), "KeyError"),
    "another dimension": (changed("tensors", 0, "dim", to="0"), "wrong dimension"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_list_is_refused(tmp_path: Path, name: str) -> None:
    content, path = new_file(tmp_path)
    change, message = CRAFTED[name]
    change(content[KEY])
    with pytest.raises(
        MisconfigurationError, match=r"The sharded tensors of the checkpoint \S+mine.ckpt cannot be read: .*" + message
    ):
        put_back(content, path, nn.Module(), 0, tmp_path)


def test_parts_have_to_make_up_the_tensor() -> None:
    quarters = [Box((row, column), (2, 3)) for row in (0, 2) for column in (0, 3)]
    check_boxes((4, 6), quarters)
    check_boxes((), [Box((), ())])
    check_boxes((0, 3), [])
    for boxes in ([*quarters[:3], quarters[0]], quarters[:3], [Box((0, 0), (4, 4)), Box((0, 2), (4, 2))], [Box((0,), (24,))]):
        with pytest.raises(ValueError, match=r"part"):
            check_boxes((4, 6), boxes)


def test_sharded_tensors_need_the_callback_or_a_file_with_whole_tensors(tmp_path: Path) -> None:
    module = nn.Linear(3, 4, bias=False)
    _, path = new_file(tmp_path)
    with pytest.raises(MisconfigurationError, match=r"whole_checkpoint FILE NEW_FILE"):
        load_weights(module, storage.read(path), path)
    make_whole(path, tmp_path / "whole.ckpt")
    load_weights(module, storage.read(tmp_path / "whole.ckpt"), tmp_path / "whole.ckpt")
    assert torch.equal(module.weight.data, torch.arange(12.0).reshape(4, 3))
    with pytest.raises(MisconfigurationError, match="Its tensors are whole already"):
        make_whole(tmp_path / "whole.ckpt", tmp_path / "again.ckpt")


# ------------------------------------------------------------------ folders of earlier versions


def earlier(folder: Path, name: str = "step=1-abc") -> tuple[dict[str, Any], Path]:
    """Write a checkpoint as earlier versions did: the tensors in a folder, and a file that names it."""
    tensors = {"state_dict": {"weight": torch.arange(12.0).reshape(4, 3)}, "optimizer_states.0.state.0.exp_avg": torch.ones(2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(
            {**tensors, "0.gradient": torch.full((3,), 7.0)},
            storage_writer=filesystem.FileSystemWriter(folder / "shards" / name),
        )
    places = {
        "state_dict.weight": [["state_dict", "weight"], 0],
        "optimizer_states.0.state.0.exp_avg": [["optimizer_states", 0, "state", 0, "exp_avg"], 0],
    }
    content = {
        "state_dict": {"weight": None},
        "optimizer_states": [{"state": {0: {"exp_avg": None}}}],
        "window": {"gradients": {}},
        "ranks": [],
        KEY: {"name": name, "root": "/nowhere", "tensors": places},
    }
    storage.write(content, folder / "last.ckpt")
    return content, folder / "last.ckpt"


def test_a_folder_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    content, path = earlier(tmp_path)
    more = put_back(content, path, nn.Module(), 0, tmp_path / "elsewhere")
    assert torch.equal(content["state_dict"]["weight"], torch.arange(12.0).reshape(4, 3))
    assert torch.equal(content["optimizer_states"][0]["state"][0]["exp_avg"], torch.ones(2))
    assert torch.equal(more["gradient"], torch.full((3,), 7.0))
    make_whole(path, tmp_path / "whole.ckpt")
    assert torch.equal(storage.read(tmp_path / "whole.ckpt")["state_dict"]["weight"], torch.arange(12.0).reshape(4, 3))


@pytest.mark.parametrize("name", ["../shards/step=1-abc", "/tmp", "..", ".", "", "a/b", 3])
def test_the_name_of_a_folder_is_no_path(tmp_path: Path, name: Any) -> None:
    content, path = earlier(tmp_path)
    content[KEY]["name"] = name
    with pytest.raises(MisconfigurationError, match="may not be a path"):
        put_back(content, path, nn.Module(), 0, tmp_path)


def test_no_folder_is_read_that_only_the_checkpoint_names(tmp_path: Path) -> None:
    content, path = earlier(tmp_path / "theirs")
    content[KEY]["root"] = str(tmp_path / "theirs" / "shards")
    storage.write(content, tmp_path / "mine" / "last.ckpt")
    with pytest.raises(
        MisconfigurationError, match=r"neither in .*mine.shards.step=1-abc nor in .* Copy that folder to the first"
    ):
        put_back(content, tmp_path / "mine" / "last.ckpt", nn.Module(), 0, tmp_path / "run")


class Harmful:
    """An object that runs code if it is unpickled without care."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


def index_with(folder: Path, change: Callable[[Metadata], Any]) -> None:
    """Change the index of a folder with torch's own classes."""
    path = folder / "shards" / "step=1-abc" / ".metadata"
    index = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(index) or index))


def stored(index: Metadata, **values: Any) -> None:
    """Change the place of the first part."""
    vars(index.storage_data[MetadataIndex("state_dict.weight", [0, 0])]).update(values)


def described(index: Metadata, **values: Any) -> None:
    vars(index.state_dict_metadata["state_dict.weight"]).update(values)


def as_bytes(index: Metadata) -> None:
    index.state_dict_metadata["state_dict.weight"] = BytesStorageMetadata()
    info = index.storage_data[MetadataIndex("state_dict.weight", [0, 0])]
    index.storage_data[MetadataIndex("state_dict.weight")] = info


INDEXES: dict[str, tuple[Callable[[Metadata], Any], str]] = {
    "an object with code": (lambda index: Harmful(), r"the index names \w+.mkdir"),
    "code in a tensor's place": (lambda index: vars(index)["state_dict_metadata"].update(x=Harmful()), "mkdir"),
    "a function": (lambda index: os.getcwd, "getcwd"),
    "a class": (lambda index: Metadata, "no Metadata where one belongs"),
    "a number": (lambda index: 3, "no Metadata where one belongs"),
    "a tensor as bytes": (as_bytes, "lacks the tensor 'state_dict.weight'"),
    "another file": (lambda index: stored(index, relative_path="../../x"), "in a file '../../x'"),
    "an absolute path": (lambda index: stored(index, relative_path="/etc/passwd"), "in a file '/etc/passwd'"),
    "a file that is not there": (lambda index: stored(index, relative_path="__9_9.distcp"), "FileNotFoundError"),
    "an offset after the end": (lambda index: stored(index, offset=10**12), "is no file of at least"),
    "another tensor's bytes": (lambda index: stored(index, offset=0, length=1200), "(File is not a zip|archive)"),
    "a huge length": (lambda index: stored(index, length=2**62), "is no file of at least"),
    "a small length": (lambda index: stored(index, length=4), "in 4 bytes"),
    "a transformation": (lambda index: stored(index, transform_descriptors=["zstd"]), "twice, or in a file"),
    "a huge tensor": (lambda index: described(index, size=torch.Size([2**40, 3])), "not all of a tensor"),
    "no parts": (lambda index: described(index, chunks=[]), "not all of a tensor"),
    "a wrong type": (
        lambda index: described(index, properties=TensorProperties(torch.int32)),
        "does not hold the part",
    ),
}


@pytest.mark.parametrize("name", INDEXES)
def test_a_crafted_index_runs_no_code_and_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    content, path = earlier(tmp_path)
    change, message = INDEXES[name]
    index_with(tmp_path, change)
    with pytest.raises(MisconfigurationError, match=f"cannot be read: .*{message}"):
        put_back(content, path, nn.Module(), 0, tmp_path)
    assert not Path("harmed").exists()


def test_bytes_are_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, path = earlier(tmp_path)
    harmful = io.BytesIO()
    torch.save(Harmful(), harmful)
    data = tmp_path / "shards" / "step=1-abc" / "__0_0.distcp"
    data.write_bytes(harmful.getvalue())
    index_with(tmp_path, lambda index: stored(index, offset=0, length=len(harmful.getvalue())))
    with pytest.raises(MisconfigurationError, match="cannot be read"):
        put_back(content, path, nn.Module(), 0, tmp_path)
    assert not Path("harmed").exists()


def name_of(module: str, name: str) -> bytes:
    return b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93"


def instructions(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


STATE = b"}\x8c\x05posixN s".replace(b" ", b"")
PICKLES = {
    "attributes of a class": (name_of("pathlib", "PosixPath") + STATE + b"b", "sets attributes of something that is no object"),
    "attributes twice": (name_of("torch", "Size") + b")R" + STATE + b"b" + STATE + b"b", "sets attributes"),
    "a call of a result": (name_of("torch", "Size") + b")R)R", "calls something that is no class"),
    "a call with a list": (name_of("torch", "Size") + b"]R", "calls something that is no class"),
    "another module's name": (name_of("torch", "load"), "the index names torch.load"),
    "a name with a dot": (name_of("torch.distributed.checkpoint.metadata", "os.mkdir"), "os.mkdir"),
    "an instruction with a name": (b"cos\nmkdir\n", "GLOBAL"),
    "an instance": (b"(ios\nmkdir\n", "INST"),
    "an extension": (b"\x82\x01", "EXT1"),
    "a persistent value": (b"]Q", "BINPERSID"),
    "a huge number in the memo": (b"]r\xff\xff\xff\x7f", "LONG_BINPUT"),
    "a value that the memo does not have": (b"j\xff\xff\xff\x7f", "list index"),
    "a key twice": (b"}\x8c\x01aN\x8c\x01aN".replace(b"}", b"}(") + b"u", "a key twice"),
    "a key that is a list": (b"}]Ns", "no text"),
    "items of a list": (b"]\x8c\x01aNs", "no dict"),
    "values of a dict": (b"}Na", "no list"),
    "an odd number of items": (b"}(Nu", "no dict"),
    "no mark": (b"}u", "not in list"),
    "bytes": (b"C\x01x", "SHORT_BINBYTES"),
    "a huge text": (b"X\xff\xff\xff\x7fabc", "expected"),
    "no end": (b"N", "values to unpack|exhausted|no end"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_instructions_that_no_index_has_are_refused(name: str) -> None:
    before = dict(vars(pathlib.PosixPath)), dict(vars(torch.Size))
    content, message = PICKLES[name]
    ending = b"" if name == "no end" else b"."
    with pytest.raises((ValueError, IndexError), match=message):
        read_values(b"\x80\x04" + content + ending)
    assert (dict(vars(pathlib.PosixPath)), dict(vars(torch.Size))) == before


def test_an_index_may_hold_itself_without_harm() -> None:
    values = read_values(instructions(b"]\x94h\x00a"))
    assert values[0] is values
    with pytest.raises(ValueError, match="no Metadata"):
        read_index(instructions(b"]\x94h\x00a"))


def test_all_instructions_of_an_index_are_known(tmp_path: Path) -> None:
    earlier(tmp_path)
    content = (tmp_path / "shards" / "step=1-abc" / ".metadata").read_bytes()
    for protocol in (4, 5):
        written = pickle.dumps(pickle.loads(content), protocol)
        assert {code.name for code, _, _ in pickletools.genops(written)}
        described_tensors, places = read_index(written)
        assert described_tensors["state_dict.weight"].shape == (4, 3)
        assert len(places) == 3


def test_a_link_in_the_place_of_a_shard_is_refused(tmp_path: Path) -> None:
    content, path = earlier(tmp_path)
    data = tmp_path / "shards" / "step=1-abc" / "__0_0.distcp"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MisconfigurationError, match="cannot be read: OSError"):
        put_back(content, path, nn.Module(), 0, tmp_path)
    data.unlink()
    os.mkfifo(data)
    content, path = storage.read(path), path
    with pytest.raises(MisconfigurationError, match="is no file of at least"):
        put_back(content, path, nn.Module(), 0, tmp_path)


def test_a_flipped_bit_in_a_folder_of_an_earlier_version_is_found(tmp_path: Path) -> None:
    content, path = earlier(tmp_path)
    data = tmp_path / "shards" / "step=1-abc" / "__0_0.distcp"
    good = data.read_bytes()
    position = good.index(torch.arange(12.0).numpy().tobytes()) + 5
    data.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
    with pytest.raises(MisconfigurationError, match="has another checksum"):
        put_back(content, path, nn.Module(), 0, tmp_path)


def test_a_run_resumes_from_no_folder_that_a_plain_checkpoint_names(tmp_path: Path) -> None:
    """A checkpoint of a run in one process, with a list of sharded tensors added: an error, and nothing is deleted."""
    trainer = new_trainer(FullyShardedDataParallel(), default_root_dir=tmp_path, max_epochs=1)
    trainer.fit(Line(), rows(2))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    content = storage.read(tmp_path / "plain.ckpt")
    theirs = tmp_path / "theirs"
    (theirs / "shards").mkdir(parents=True)
    content[KEY] = {"name": "shards", "root": str(theirs), "tensors": {}}
    storage.write(content, tmp_path / "crafted.ckpt")
    again = new_trainer(FullyShardedDataParallel(), default_root_dir=tmp_path, max_epochs=2)
    with pytest.raises(MisconfigurationError, match=re.escape("An earlier version wrote them to a folder named shards")):
        again.fit(Line(), rows(2), ckpt_path=tmp_path / "crafted.ckpt")
    assert (theirs / "shards").is_dir()
