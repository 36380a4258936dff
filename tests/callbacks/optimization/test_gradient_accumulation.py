"""GradientAccumulation: windows that continue in the next epoch, and windows of a wrong size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eventtrain import MisconfigurationError
from eventtrain.callbacks import GradientAccumulation
from tests.kit import On, Probe, batches, new_trainer, train


class SecondIsEmpty:
    """A loader whose second epoch has no batch."""

    def __init__(self) -> None:
        self.epochs = 0

    def __iter__(self) -> Any:
        self.epochs += 1
        return iter([] if self.epochs == 2 else batches(3))


def test_a_carried_window_continues_after_an_epoch_without_batches() -> None:
    module = Probe()
    with pytest.warns(UserWarning, match="gave no batch in epoch 1"):
        train(module, SecondIsEmpty(), GradientAccumulation(2, remainder="carry"), max_epochs=3)
    assert module.updates == [1.5, (3.0 + 1.0) / 2, (2.0 + 3.0) / 2]


class EndsEarly(Probe):
    """Ends its first epoch before a batch is trained, and validates.

    Args:
        end_at: The index of that batch.
    """

    def __init__(self, end_at: int) -> None:
        super().__init__()
        self.end_at = end_at

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 0 and batch_idx == self.end_at else None

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


@pytest.mark.parametrize("end_at", [0, 1, 2])
def test_a_carried_window_resumes_if_the_validation_of_an_epoch_that_ended_early_was_interrupted(
    tmp_path: Path, end_at: int
) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "default_root_dir": tmp_path}
    straight, interrupted, resumed = EndsEarly(end_at), EndsEarly(end_at), EndsEarly(end_at)
    accumulation = GradientAccumulation(2, remainder="carry")
    train(straight, 4, accumulation, val=2, **options)
    assert straight.updates == {0: [1.5, 3.5], 1: [1.0, 2.5], 2: [1.5, 1.5, 3.5]}[end_at]

    interrupt = On(validation_start=lambda trainer, event: trainer.interrupt("the machine stops"))
    train(interrupted, 4, GradientAccumulation(2, remainder="carry"), interrupt, val=2, **options)
    assert len(interrupted.seen) == end_at
    resumption = GradientAccumulation(2, remainder="carry")
    path = tmp_path / "checkpoints" / "interrupted.ckpt"
    new_trainer(resumption, **options).fit(resumed, batches(4), batches(2), ckpt_path=path)
    assert interrupted.updates + resumed.updates == straight.updates
    assert resumption.state_dict() == accumulation.state_dict()


def test_state_of_an_older_version_is_loaded() -> None:
    accumulation = GradientAccumulation(4)
    accumulation.load_state_dict({"position": 3, "window": 4})
    assert accumulation.state_dict() == {"position": 3, "window": 4, "position_before": 3, "batch_idx": -1}


@pytest.mark.parametrize("size", [0, 2.0, "4", None])
def test_a_policy_that_returns_a_wrong_size_is_named(size: Any) -> None:
    class Mine(GradientAccumulation):
        def batches_per_step(self, trainer: Any) -> int:
            return size  # type: ignore[no-any-return]

    with pytest.raises(MisconfigurationError, match=r"^The window of Mine\(batches=.*\): give a whole number from 1\."):
        train(Probe(), 3, Mine())
