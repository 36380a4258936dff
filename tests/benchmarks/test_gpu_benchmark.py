"""The GPU benchmark, in tiny sizes on the CPU: everything in it that needs no GPU, and with one the rest.

Times are never compared.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gpu, report

CPU = torch.device("cpu")
TINY = gpu.SETTINGS["small"].tiny()  # not compiled
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda:0", marks=needs_gpu)]


@pytest.fixture(scope="module", autouse=True)
def _few_objects() -> Iterator[None]:
    """Exempt imported objects from the garbage collection before each run, which saves seconds."""
    importlib.import_module("lightning.pytorch")
    gc.freeze()
    yield
    gc.unfreeze()


def rows(text: str) -> dict[str, dict[str, list[str]]]:
    """Return the cells of each contestant's line in each model's table, by model and contestant."""
    tables: dict[str, dict[str, list[str]]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in gpu.SETTINGS and len(cells) == 7:
            table = tables.setdefault(cells[0], {})
        elif cells[0] in gpu.CONTESTANTS:
            table[cells[0]] = cells[1:]
    return tables


# ------------------------------------------------------------------ the program


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_all_contestants_train_to_equal_parameters_and_the_figures_are_kept(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, path = tmp_path / "performance.md", tmp_path / "performance.json"
    page.write_text("before\n<!-- generated: gpu -->\nold\n<!-- end: gpu -->\nafter\n")
    monkeypatch.setattr(gpu, "save", functools.partial(report.save, page=page, path=path))
    monkeypatch.setattr(gpu, "CLIP", 0.01)  # so that the gradients of tiny networks are clipped
    gpu.main(["--device", device, "--tiny", "--models", "gpt2", "small", "--repetitions", "1", "--save"])
    printed = capsys.readouterr()
    tables = rows(printed.out)
    assert list(tables) == ["gpt2", "small"]
    for table in tables.values():
        assert list(table) == list(gpu.CONTESTANTS)
        assert {name: cells[-1] for name, cells in table.items()} == dict.fromkeys(gpu.CONTESTANTS, "equal")
        assert table[gpu.BASELINE][2:4] == ["1.0000", "1.0000"]
    assert "compiled (eager)" in printed.out and "not compiled" in printed.out
    assert ("device: cpu" in printed.err) == (device == "cpu")

    saved = json.loads(path.read_text())["gpu"]
    assert saved["measured on"]["repetitions"] == 1
    for name, table in tables.items():
        results = saved["figures"][name]["results"]
        tokens = saved["figures"][name]["setting"]["batches"] * 2 * 8  # a tiny batch is 2 sequences of 8 tokens
        for result in results:
            ((seconds,), (baseline,)) = result["seconds"], results[0]["seconds"]
            assert seconds > 0 and result["ratios"] == [baseline / seconds]
            assert table[result["name"]][1] == f"{tokens / seconds:.0f}"
            assert (result["peak_memory"] is not None) == (device == "cuda")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert rows(text) == tables


def test_without_a_gpu_it_names_the_options_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"torch sees no CUDA device.*--device cpu --tiny"):
        gpu.main([])


def test_the_check_of_waiting_is_refused_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--tiny", "--check-syncs"])
    assert "--check-syncs needs a GPU" in capsys.readouterr().err


def test_lightning_takes_part_only_if_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: None if name == "lightning" else find_spec(name, *at))
    monkeypatch.setattr(gpu, "compare", lambda _, names, *rest: [gpu.Result(name, True, 0.0, [1.0], [1.0]) for name in names])
    gpu.main(["--device", "cpu", "--tiny", "--models", "small", "--only", "eventtrain", "Lightning"])
    printed = capsys.readouterr()
    assert list(rows(printed.out)["small"]) == ["hand-tuned", "hand-tuned, again", "eventtrain"]
    assert "Lightning is not installed" in printed.err


def test_repetitions_are_interleaved_in_a_rotating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, int]] = []
    names = ["hand-tuned", "hand-tuned, again", "eventtrain"]

    def contestant(name: str) -> Any:
        def train(setting: gpu.Setting, loader: gpu.Prefetcher, device: torch.device) -> nn.Module:
            trained.append((name, len(list(loader))))
            return gpu.make_network(setting, device)

        return train

    for name in names:
        monkeypatch.setitem(gpu.CONTESTANTS, name, contestant(name))
    results = gpu.compare(TINY, names, 2, CPU)
    one, two, three = names
    assert [name for name, _ in trained] == [one, one, two, three, one, two, three, two, three, one]
    # Batches of the comparison, then of the timed runs: one warms up, three are measured, one stops the clock.
    assert [count for _, count in trained] == [gpu.COMPARED] * 4 + [5] * 6
    for result in results:
        assert result.ratios == [base / seconds for base, seconds in zip(results[0].seconds, result.seconds, strict=True)]


def test_a_contestant_that_does_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_training(setting: gpu.Setting, loader: gpu.Prefetcher, device: torch.device) -> nn.Module:
        for _ in loader:
            pass
        return gpu.make_network(setting, device)

    monkeypatch.setitem(gpu.CONTESTANTS, "eventtrain", without_training)
    results = gpu.compare(TINY, ["hand-tuned", "eventtrain"], 1, CPU)
    assert [result.equal for result in results] == [True, False]
    assert rows(gpu.table("small", TINY, results))["small"]["eventtrain"][-1].startswith("differ by")
    assert not torch.are_deterministic_algorithms_enabled()


# ------------------------------------------------------------------ network and batches


def test_the_decoder_has_the_size_of_gpt2_small_and_ties_its_weights() -> None:
    with torch.device("meta"):
        network = gpu.Decoder(gpu.SETTINGS["gpt2"])
    # 12 blocks: attention 4 * 768^2, perceptron 8 * 768^2, 13 * 768 of biases and norms; the last norm has 2 * 768.
    expected = (50304 + 1024) * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert sum(each.numel() for each in network.parameters()) == expected == 124_475_904
    assert network.head.weight is network.embedding.weight


def test_no_token_sees_later_ones() -> None:
    network = gpu.make_network(TINY, CPU)
    ((tokens, following),) = gpu.make_batches(TINY, CPU, 1)
    ignored = following.clone()
    ignored[:, 4:] = -100  # cross_entropy's ignore_index, so that only the first four predictions have a loss
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % TINY.vocabulary
    assert torch.equal(network(tokens, ignored), network(changed, ignored))
    assert not torch.equal(network(tokens, following), network(changed, following))


@pytest.mark.parametrize("device", DEVICES)
def test_the_prefetcher_hands_out_the_same_batches_in_order(device: str) -> None:
    at = torch.device(device)
    batches = gpu.make_batches(TINY, at, gpu.DISTINCT + 2)
    assert batches[0] is batches[gpu.DISTINCT] and not torch.equal(batches[0][0], batches[1][0])
    loader = gpu.Prefetcher(batches, at)
    assert len(loader) == len(batches)
    for _ in range(2):
        handed_out = list(loader)
        assert all(tensor.device == at for batch in handed_out for tensor in batch)
        for batch, expected in zip(handed_out, batches, strict=True):
            assert [tensor.tolist() for tensor in batch] == [tensor.tolist() for tensor in expected]


class NotedStream:
    def __init__(self, name: str, notes: list[Any]) -> None:
        self.name = name
        self.notes = notes

    def wait_stream(self, other: NotedStream) -> None:
        self.notes.append(f"{self.name} waits for {other.name}")

    def __enter__(self) -> None:
        self.notes.append(f"copy on {self.name}")

    def __exit__(self, *error: Any) -> None: ...


class NotedDevice:
    """Stands in for ``torch.cuda``, and records the calls."""

    def __init__(self, notes: list[Any]) -> None:
        self.notes = notes

    def synchronize(self, device: torch.device) -> None:
        self.notes.append("synchronize")

    def Stream(self) -> NotedStream:
        return NotedStream("side", self.notes)

    def current_stream(self) -> NotedStream:
        return NotedStream("main", self.notes)

    def stream(self, stream: NotedStream) -> NotedStream:
        return stream


def test_each_batch_is_copied_during_the_one_before_and_the_host_waits_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[Any] = []
    monkeypatch.setattr(torch, "get_device_module", lambda device: NotedDevice(notes))
    loader = gpu.Prefetcher(gpu.make_batches(TINY, CPU, 4), CPU, stretch=(1, 3))
    for index, _ in enumerate(loader):
        notes.append(index)
        assert (loader.seconds > 0) == (index == 3)
    copy = ["side waits for main", "copy on side"]
    ready = "main waits for side"
    first = [*copy, ready, *copy, 0]
    others = [ready, *copy, "synchronize", 1, ready, *copy, 2, ready, "synchronize", 3]
    assert notes == first + others


# ------------------------------------------------------------------ waiting for the device


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises when a tensor is read, on the CPU, as ``torch.cuda.set_sync_debug_mode`` does on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modes: list[str] = []

    def set_sync_debug_mode(self, mode: str) -> None:
        self.modes.append(mode)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.modes and self.modes[-1] == "error" and func.name().startswith("aten::_local_scalar_dense"):
            raise RuntimeError("called a synchronizing operation")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    with Watch() as watching:
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", watching.set_sync_debug_mode)
        yield watching


def test_eventtrain_does_not_wait_between_steps_that_log(watch: Watch) -> None:
    assert gpu.check_syncs(TINY, CPU) == 36  # two batches in each of the steps 11 to 19 and 21 to 29
    in_run = watch.modes[2:]  # the first two try whether reading is refused at all
    warm_up, checked, logs = ["default"] * 20, ["error"] * 18, ["default"] * 2
    assert in_run[:60] == [*warm_up, *checked, *logs, *checked, *logs]
    assert set(in_run[60:]) == {"default"}


@pytest.mark.parametrize("at", [25, 59])
def test_a_step_that_waits_is_reported(at: int, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batch 25, of step 13; not in the last, whose step logs."""

    class Careless(gpu.LoggingModule):
        def training_step(self, batch: gpu.Batch, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == at:
                loss.item()
            return loss

    monkeypatch.setattr(gpu, "LoggingModule", Careless)
    if at == 59:
        gpu.check_syncs(TINY, CPU)
    else:
        with pytest.raises(RuntimeError, match="called a synchronizing operation"):
            gpu.check_syncs(TINY, CPU)
    assert watch.modes[-1] == "default"


def test_a_check_that_would_see_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    with pytest.raises(RuntimeError, match="the check would see nothing"):
        gpu.check_syncs(TINY, CPU)


@needs_gpu
def test_eventtrain_does_not_wait_for_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--check-syncs", "--tiny"])
    assert capsys.readouterr().out.count("did not wait for the device in 36 batches") == len(gpu.SETTINGS)
