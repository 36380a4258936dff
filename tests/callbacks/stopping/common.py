"""The helpers that the tests of Timer and Preemption share: a run that can be resumed, a counter, and a second process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from eventtrain import Callback, Trainer, events
from eventtrain.callbacks import GradientAccumulation, LRSchedulerStepping
from eventtrain.core.state import StopRequest
from eventtrain.distributed import Place, SingleProcess
from tests.kit import FakeProcesses
from tests.resuming import Build, Model

INTERRUPTED = Path("checkpoints") / "interrupted.ckpt"


def build(folder: Path, *callbacks: Any, **options: Any) -> Build:
    """Three epochs of five batches, in windows of two, with a validation of two batches after the third batch of each."""

    def build() -> Any:
        values = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
        loader: Any = DataLoader(values, batch_size=4, shuffle=True)  # type: ignore[arg-type]
        arguments = {"max_epochs": 3, "val_check_interval": 3, "default_root_dir": folder, **options}
        standard = [GradientAccumulation(2), LRSchedulerStepping()]
        return Model(), loader, [values[:4], values[4:8]], [*standard, *callbacks], arguments

    return build


class CountsSafePoints(Callback):
    """State that changes at each safe point."""

    count = 0

    def on_safe_point(self, trainer: Trainer, event: events.SafePoint) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class TwoProcesses(FakeProcesses):
    """This process, and another one that answers as a test tells it.

    Attributes:
        request: The requests that the other process makes. If only one of the two makes a request, it holds at the end of the
            next batch, or when they meet.
        flag: The other process's answer to other questions.
        exchanges: The number of exchanges so far.
    """

    def __init__(self) -> None:
        super().__init__(reduce=lambda value, reduction: value)
        self.request = StopRequest()
        self.flag = False
        self.exchanges = 0
        self.pending = [False] * 6

    def any(self, flag: bool) -> bool:
        self.exchanges += 1
        return flag or self.flag

    def agree(self, flags: list[bool], place: Place, name: str = "") -> list[bool]:
        if name:
            return flags
        self.exchanges += place == "meeting"
        other = Flags()
        StopRequest().take_up(self.request, other, place, False)
        pairs = list(zip(flags, other.flags, strict=True))
        holding = [all(pair) or (place != "in_between" and pending) for pair, pending in zip(pairs, self.pending, strict=True)]
        if place == "meeting":
            holding = [any(pair) for pair in pairs]
        self.pending = [any(pair) and not holds for pair, holds in zip(pairs, holding, strict=True)]
        return holding


class Flags(SingleProcess):
    """Notes the flags of one exchange."""

    def agree(self, flags: list[bool], place: Place, name: str = "") -> list[bool]:
        self.flags = list(flags)
        return [False] * len(flags)


def train_as(processes: TwoProcesses, folder: Path, *callbacks: Any) -> Trainer:
    """Train as one of two processes, without validation.

    Args:
        processes: The processes.
        folder: The folder of the run.
        *callbacks: The callbacks to attach.

    Returns:
        The trainer.
    """
    module, loader, _, attached, options = build(folder, *callbacks)()
    del options["val_check_interval"]
    trainer = Trainer(callbacks=attached, default_callbacks=False, device="cpu", **options)
    trainer.processes = processes
    trainer.fit(module, loader)
    return trainer
