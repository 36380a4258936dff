"""A run that goes on from any of its safe points ends with the bits of the run that was never interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping, MixedPrecision
from tests.resuming import Model, check_all_safe_points


class Samples(Dataset[Any]):
    """Samples with an augmentation that draws; counts what is loaded."""

    def __init__(self, length: int = 20) -> None:
        self.values = torch.randn(length, 3, generator=torch.Generator().manual_seed(1))
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.loaded.append(index)
        return self.values[index] + 0.1 * torch.randn(3)


@pytest.mark.parametrize("val_check_interval", [None, 2], ids=["at the end", "inside"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
def test_every_safe_point_of_a_run(tmp_path: Path, shuffle: bool, accumulate: int, val_check_interval: int | None) -> None:
    def build() -> Any:
        loader = DataLoader(Samples(), batch_size=4, shuffle=shuffle)
        callbacks = [GradientAccumulation(accumulate), GradientClipping(1.0), LRSchedulerStepping()]
        return (
            Model(),
            loader,
            DataLoader(Samples(8), batch_size=4),
            callbacks,
            {"max_epochs": 3, "val_check_interval": val_check_interval},
        )

    # A batch each, but the epoch's last is the epoch's own.
    assert check_all_safe_points(build, tmp_path) == 15
