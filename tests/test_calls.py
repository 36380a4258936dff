"""The cost of a step in Python-level calls, which are exact, unlike time. They may shrink and not grow."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import eventtrain
from eventtrain import LightningModule, Trainer
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping, ProgressBar, TensorBoardLogger

# Per batch, or per window of four: calls of functions of eventtrain, and of all functions in Python, torch's among
# them. Lower them when they shrink.
COMMITTED: dict[str, tuple[int, int | None]] = {
    "bare": (12, 94),
    "bare, with self.log": (14, 97),
    "standard, a window of 4": (72, None),  # TensorBoard's writer waits for its thread now and then
    "validation": (3, 4),
}
# The second figure belongs to one version of torch, the one of constraints.txt.
TORCH = "2.13"

Counts = dict[str, dict[str, float]]
"""The calls of each function, for each kind of round."""

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = "elsewhere"
PACKAGE = Path(eventtrain.__file__).resolve().parent
FOLDERS = tuple(str(folder) for folder in (PACKAGE, (PACKAGE / "callbacks").resolve(), PACKAGE / "callbacks"))


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Logging(Module):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


class Standard(Logging):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=1000)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def bare(module: LightningModule, batches: int) -> Callable[[], None]:
    trainer = Trainer(max_epochs=1, default_callbacks=False, device="cpu")
    data = [torch.ones(2, 1)] * batches
    return lambda: trainer.fit(module, data)


def standard(folder: Path, batches: int) -> Callable[[], None]:
    callbacks = [
        GradientAccumulation(4),
        GradientClipping(1.0),
        LRSchedulerStepping(),
        TensorBoardLogger(folder),
        ProgressBar(interval=1e9, line_interval=1e9),
    ]
    trainer = Trainer(max_epochs=1, callbacks=callbacks, default_callbacks=False, device="cpu")
    module, data = Standard(), [torch.ones(2, 1)] * batches
    return lambda: trainer.fit(module, data)


def validating(batches: int) -> Callable[[], Any]:
    trainer = Trainer(max_epochs=1, default_callbacks=False, device="cpu")
    module, data = Module(), [torch.ones(2, 1)] * batches
    return lambda: trainer.validate(module, data)


def calls(run: Callable[[], Any]) -> dict[str, int]:
    """Return how often each function in Python is called: ``"file:name"`` for eventtrain's, ``"elsewhere"`` for all others."""
    called: Counter[tuple[str, str]] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            called[frame.f_code.co_filename, frame.f_code.co_qualname] += 1

    gc.disable()  # a finalizer that happens to run is no part of a step
    previous = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(previous)
        gc.enable()
    counts: Counter[str] = Counter()
    for (file, function), number in called.items():
        counts[f"{Path(file).name}:{function}" if file.startswith(FOLDERS) else ELSEWHERE] += number
    return counts


def per_round(make: Callable[[int], Callable[[], Any]], batches: int) -> dict[str, float]:
    """Return the calls of one more round of ``batches`` batches; calls that come once in a run cancel out."""
    calls(make(batches))  # so that imports, which come once in a process, are not counted
    few, many = calls(make(2 * batches)), calls(make(12 * batches))
    difference = {name: (count - few.get(name, 0)) / 10 for name, count in many.items()}
    return {name: count for name, count in difference.items() if count}


def measure(folder: Path) -> Counts:
    """Return the calls of a round of each kind; event files go to a folder."""
    return {
        "bare": per_round(lambda batches: bare(Module(), batches), 1),
        "bare, with self.log": per_round(lambda batches: bare(Logging(), batches), 1),
        "standard, a window of 4": per_round(lambda batches: standard(folder / str(batches), batches), 4),
        "validation": per_round(validating, 1),
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Counts:
    """Return the result of :func:`measure` in a new process: once a process has compiled a module, torch calls more."""
    folder = tmp_path_factory.mktemp("calls")
    subprocess.run([sys.executable, "-W", "error", "-m", "tests.test_calls", folder], cwd=ROOT, check=True)
    counts: Counts = json.loads((folder / "counts.json").read_text())
    return counts


def check(kind: str, measured: Counts) -> None:
    counts = measured[kind]
    total = sum(counts.values())
    ours = total - counts[ELSEWHERE]
    most_ours, most = COMMITTED[kind]
    uneven = {name: count for name, count in counts.items() if not count.is_integer()}
    assert most is None or not uneven, f"not the same in each round: {uneven}"
    assert ours > 0
    table = "\n".join(f"  {count:4.0f}  {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
    assert ours <= most_ours, f"{kind}: {ours:.0f} calls of eventtrain's functions; {most_ours} committed\n{table}"
    if most is not None and torch.__version__.startswith(TORCH):
        assert total <= most, f"{kind}: {total:.0f} calls in all; {most} committed\n{table}"


@pytest.mark.parametrize("kind", COMMITTED)
def test_a_round_makes_no_more_calls_than_committed(measured: Counts, kind: str) -> None:
    check(kind, measured)


def test_an_event_without_listeners_calls_nothing(measured: Counts) -> None:
    assert not [name for name in measured["bare"] if name.startswith(("signals.py", "events.py"))]


if __name__ == "__main__":
    torch.set_num_threads(1)
    (Path(sys.argv[1]) / "counts.json").write_text(json.dumps(measure(Path(sys.argv[1]))))
