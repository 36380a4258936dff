"""Checkpoint files: contents that are refused, damage that is noticed, and code that is never run."""

from __future__ import annotations

import collections
import datetime
import enum
import os
import pickle
import struct
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from eventtrain import MisconfigurationError
from eventtrain.callbacks.checkpointing.staging import Staging
from eventtrain.checkpoint import storage
from tests.resuming import assert_same

CONTENT: dict[str, Any] = {
    "state_dict": {"weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)},
    "numbers": [1, 2.5, float("inf"), 1 + 2j, True, None],
    "texts": ("a", b"b", bytearray(b"c")),
    "kinds": {torch.float16, torch.float32},
    "ordered": collections.OrderedDict(a=1),
    "counted": collections.Counter([3, 3]),
    "shape": torch.Size([2]),
    "device": torch.device("cpu"),
    "sparse": torch.eye(2).to_sparse(),
}


def test_accepted_values_come_back(tmp_path: Path) -> None:
    content = {name: value for name, value in CONTENT.items() if name != "sparse"}
    storage.write(content, tmp_path / "a.ckpt")
    assert_same(storage.read(tmp_path / "a.ckpt"), content, "content")


REFUSED = {
    "NumPy array": (numpy.ones(2), "numpy.ndarray"),
    "path": (Path("x"), "pathlib."),
    "timedelta": (datetime.timedelta(1), "datetime.timedelta"),
    "frozenset": (frozenset([1]), "builtins.frozenset"),
    "defaultdict": (collections.defaultdict(int), "collections.defaultdict"),
    "function": (print, "builtins.builtin_function_or_method"),
    "class": (int, "builtins.type"),
    "range": (range(3), "builtins.range"),
    "subclass": (torch.nn.ParameterList([torch.ones(1)]), "ParameterList"),
}


@pytest.mark.parametrize(("value", "kind"), REFUSED.values(), ids=REFUSED)
def test_refused_values_could_not_be_read_back(tmp_path: Path, value: Any, kind: str) -> None:
    with pytest.raises(MisconfigurationError, match="Convert it to tensors") as caught:
        storage.write({"state_dict": {}, "callbacks": {"Mine": {"at": [value]}}}, tmp_path / "a.ckpt")
    assert "checkpoint['callbacks']['Mine']['at'][0] is a " in str(caught.value)
    assert kind in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    torch.save(value, tmp_path / "bare.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "bare.pt", weights_only=True)


def test_numbers_of_other_kinds_become_python_numbers(tmp_path: Path) -> None:
    class Stage(enum.IntEnum):
        SECOND = 2

    values = {"lr": numpy.float64(0.5), "count": numpy.int64(3), "flag": numpy.bool_(True), "stage": Stage.SECOND}
    storage.write({"state_dict": {}, "values": [values]}, tmp_path / "a.ckpt")
    (read,) = storage.read(tmp_path / "a.ckpt")["values"]
    assert read == {"lr": 0.5, "count": 3, "flag": True, "stage": 2}
    assert [type(value) for value in read.values()] == [float, int, bool, int]


def test_the_versions_in_a_state_dict_are_kept(tmp_path: Path) -> None:
    """A module needs them to know whether to convert the state that it loads."""
    layer = torch.nn.BatchNorm1d(2)
    state = layer.state_dict()
    assert state._metadata[""]["version"] == 2  # type: ignore[attr-defined]
    for content in ({"state_dict": state}, Staging().copy({"state_dict": state})):
        storage.write(content, tmp_path / "a.ckpt")
        assert storage.read(tmp_path / "a.ckpt")["state_dict"]._metadata == state._metadata  # type: ignore[attr-defined]


def test_attributes_of_a_tensor_are_checked_too(tmp_path: Path) -> None:
    tensor = torch.ones(1)
    tensor.note = Path("x")  # type: ignore[attr-defined]
    with pytest.raises(MisconfigurationError, match=r"vars\(checkpoint\['state_dict'\]\['w'\]\)\['note'\] is a pathlib"):
        storage.write({"state_dict": {"w": tensor}}, tmp_path / "a.ckpt")


# ------------------------------------------------------------------ files that were not written by us


def pickled_call(function: Any, *args: Any) -> bytes:
    class Exploit:
        def __reduce__(self) -> Any:
            return function, args

    return pickle.dumps(Exploit(), protocol=2)


def opcodes(module: str, name: str, argument: str) -> bytes:
    """Return a pickle that imports a module and calls one of its functions."""
    return f"c{module}\n{name}\n".encode() + b"(X" + struct.pack("<I", len(argument)) + argument.encode() + b"tR."


@pytest.mark.parametrize("where", ["the whole", "a value", "a key"])
@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "bare pickle"])
def test_a_malicious_file_runs_nothing_and_imports_nothing(tmp_path: Path, where: str, legacy: bool) -> None:
    marker, module = tmp_path / "pwned", tmp_path / "evil_module.py"
    module.write_text(f"open({str(marker)!r}, 'w').close()\ndef run(x): pass\n")
    path = tmp_path / "bad.ckpt"
    call = opcodes("evil_module", "run", "x")[:-1]
    payload = {
        "the whole": b"\x80\x02" + call + b".",
        "a value": b"\x80\x02}X\x0a\x00\x00\x00state_dict" + call + b"s.",
        "a key": b"\x80\x02}" + call + b"X\x01\x00\x00\x00vs.",
    }[where]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        patch.delitem(sys.modules, "evil_module", raising=False)
        if legacy:
            path.write_bytes(payload)
        else:
            torch.save({"state_dict": {}}, path)
            with zipfile.ZipFile(path) as archive:
                parts = {name: archive.read(name) for name in archive.namelist()}
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in parts.items():
                    archive.writestr(name, payload if name.endswith("data.pkl") else content)
        pickle.loads(payload)  # the payload is a real one: this ran it
        assert marker.exists()
        marker.unlink()
        sys.modules.pop("evil_module")
        with pytest.raises(MisconfigurationError, match=r"bad\.ckpt is no checkpoint that can be read safely"):
            storage.read(path)
        assert "evil_module" not in sys.modules
    assert not marker.exists()


@pytest.mark.parametrize("function", [eval, exec, getattr, os.system, open])
def test_a_pickle_that_calls_a_known_function_is_refused(tmp_path: Path, function: Any) -> None:
    path = tmp_path / "bad.ckpt"
    path.write_bytes(pickled_call(function, f"open({str(tmp_path / 'pwned')!r}, 'w')"))
    with pytest.raises(MisconfigurationError, match=r"bad\.ckpt is no checkpoint"):
        storage.read(path)
    assert [each.name for each in tmp_path.iterdir()] == ["bad.ckpt"]


# ------------------------------------------------------------------ damaged files


def outcome(path: Path, expected: dict[str, Any]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wonders at a pickle protocol that a flipped bit made
        try:
            content = storage.read(path)
        except MisconfigurationError as error:
            return "named" if str(path) in str(error) else "damaged, but which?"
    assert_same(content, expected, "content")
    return "whole"


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    content = {"state_dict": {"weight": torch.arange(12.0)}, "epoch": 3}
    storage.write(content, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt", content


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_noticed_or_harmless(small: tuple[Path, dict[str, Any]], every: int) -> None:
    path, content = small
    raw = path.read_bytes()
    outcomes = collections.Counter[str]()
    places = range(0, len(raw), every)
    for at in places:
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        outcomes[outcome(path, content)] += 1
    assert outcomes["named"] > 300 // every  # harmless is the padding that aligns tensors
    assert outcomes["named"] + outcomes["whole"] == len(places)


def test_a_flipped_bit_in_a_tensor_is_noticed(small: tuple[Path, dict[str, Any]]) -> None:
    path, content = small
    raw = path.read_bytes()
    values = content["state_dict"]["weight"].numpy().tobytes()
    begin = raw.index(values)
    for at in range(begin, begin + len(values)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 16]) + raw[at + 1 :])
        with pytest.raises(MisconfigurationError, match="another checksum than when it was written"):
            storage.read(path)


@pytest.mark.slow
def test_no_bit_of_a_file_gives_another_tensor_without_an_error(small: tuple[Path, dict[str, Any]]) -> None:
    path, content = small
    raw = path.read_bytes()
    for at in range(len(raw)):
        for bit in range(8):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
            assert outcome(path, content) in ("named", "whole")


@pytest.mark.parametrize("bit", range(16))
def test_an_entry_that_is_marked_as_a_folder_is_refused(small: tuple[Path, dict[str, Any]], bit: int) -> None:
    """torch then reads nothing, and returns memory that nobody has written."""
    path, _ = small
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"PK\x01\x02", 0, raw.rindex(b"/data/0"))
    raw[entry + 38 + bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    with pytest.raises(MisconfigurationError, match="have attributes that torch does not write"):
        storage.read(path)


def test_two_entries_of_one_name_are_refused(small: tuple[Path, dict[str, Any]]) -> None:
    path, _ = small
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(next(name for name in archive.namelist() if name.endswith("/data/0")).upper(), bytes(48))
    with pytest.raises(MisconfigurationError, match="two of its entries have one name"):
        storage.read(path)


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_truncated_file_is_noticed(small: tuple[Path, dict[str, Any]], every: int) -> None:
    path, content = small
    raw = path.read_bytes()
    for length in range(0, len(raw), every):
        path.write_bytes(raw[:length])
        assert outcome(path, content) == "named"


@pytest.mark.parametrize("size", [10_000, 100_000, 300_000])
def test_a_truncated_file_counts_as_the_newest_so_that_it_is_passed_over(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.ckpt"
    storage.write({"state_dict": {"w": torch.ones(size // 4)}, "sequence": 3, "progress": {"total_batch_idx": 1}}, path)
    raw = path.read_bytes()
    assert storage.written_at(path)[0] == 3
    for length in range(0, len(raw), len(raw) // 20):
        path.write_bytes(raw[:length])
        assert storage.written_at(path)[0] == float("inf")


def test_checksums_are_written_even_if_the_user_has_turned_them_off(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        storage.write({"state_dict": {"w": torch.ones(3)}}, tmp_path / "a.ckpt")
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(storage.read(tmp_path / "a.ckpt")["state_dict"]["w"], torch.ones(3))


def test_a_file_that_is_not_there_is_another_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        storage.read(tmp_path / "none.ckpt")


# ------------------------------------------------------------------ copies


def test_a_snapshot_does_not_change_with_its_source() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    content = {
        **CONTENT,
        "tied": [weight, weight],
        "view": weight.t()[1:],
        "whole": weight.flatten(),
        "nothing": torch.empty(0),
        "scalar": torch.tensor(2),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    snapshot = Staging()
    copied = snapshot.copy(content)
    for name, value in content.items():
        if name not in ("sparse", "parameter"):
            assert_same(copied[name], value, name)
    assert torch.equal(copied["sparse"].to_dense(), torch.eye(2))
    assert torch.equal(copied["parameter"], torch.ones(2))
    assert type(copied["parameter"]) is torch.Tensor
    expected = weight.clone()
    weight.fill_(7)
    content["numbers"].append(3)
    assert torch.equal(copied["tied"][0], expected)
    assert torch.equal(copied["view"], expected.t()[1:])
    assert len(copied["numbers"]) == len(content["numbers"]) - 1
    content["numbers"].pop()
    addresses = {copied[name].untyped_storage().data_ptr() for name in ("view", "whole")}
    assert addresses == {copied["tied"][0].untyped_storage().data_ptr()} == {copied["tied"][1].untyped_storage().data_ptr()}


def test_a_snapshot_uses_its_memory_again() -> None:
    snapshot = Staging()
    weight = torch.ones(1000)
    first = snapshot.copy({"w": weight})["w"].data_ptr()
    weight.fill_(2)
    again = snapshot.copy({"w": weight})["w"]
    assert again.data_ptr() == first
    assert torch.equal(again, weight)
    bigger = torch.full((2000,), 3.0)
    assert torch.equal(snapshot.copy({"w": bigger})["w"], bigger)
    assert len(snapshot._buffers) == 1, "a buffer that is not used any more is freed"
