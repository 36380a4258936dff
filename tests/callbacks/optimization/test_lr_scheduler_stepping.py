"""LRSchedulerStepping: the events that it listens to, and its state in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from eventtrain import MisconfigurationError, Trainer
from eventtrain.callbacks import LRSchedulerStepping
from tests.kit import On, Probe, batches, new_trainer, train


class Logging(Probe):
    """Logs ``mean`` by epoch, and has the scheduler that it is built with.

    Args:
        monitors: Whether the scheduler monitors ``mean``.
        **config: The rest of the scheduler's config.
    """

    def __init__(self, *, monitors: bool = False, **config: Any) -> None:
        def configure(sgd: Any) -> Any:
            if monitors:
                scheduler = {"scheduler": ReduceLROnPlateau(sgd, patience=0, factor=0.5), "monitor": "mean"}
            else:
                scheduler = {"scheduler": StepLR(sgd, 1, gamma=0.5)}
            return {"optimizer": sgd, "lr_scheduler": scheduler | config}

        super().__init__(configure=configure)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("mean", 1.0, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def calls(module: Logging, stepping: LRSchedulerStepping) -> set[str]:
    """Return the events whose listeners of the callback were called during a run."""
    trainer = new_trainer(stepping, max_epochs=2)
    with trainer.signals.trace() as trace:
        trainer.fit(module, batches(2))
    return {event.name for event in trace for call in event.calls if call.listener.startswith("LRSchedulerStepping.")}


ALWAYS = {"setup", "fit_start", "after_update", "train_data_end"}


@pytest.mark.parametrize(
    ("module", "more"),
    [
        (Logging(interval="step"), set()),
        (Logging(interval="epoch"), set()),
        (Logging(interval="batch"), {"train_batch_end"}),
        (Logging(monitors=True), {"metrics_logged"}),
        (Logging(monitors=True, interval="batch"), {"train_batch_end"}),
        (Logging(monitors=True, interval="step"), set()),
        (Logging(interval="batch", monitor="mean"), {"train_batch_end"}),
    ],
)
def test_it_listens_to_batches_and_metrics_only_if_a_scheduler_needs_them(module: Logging, more: set[str]) -> None:
    stepping = LRSchedulerStepping()
    assert calls(module, stepping) == ALWAYS | more
    assert calls(Logging(interval="step"), stepping) == ALWAYS, "the next run needs neither"


def test_describe_shows_the_listeners_that_some_runs_need() -> None:
    trainer = new_trainer(LRSchedulerStepping())
    before = trainer.describe()
    assert "LRSchedulerStepping.on_train_batch_end" in before and "LRSchedulerStepping.on_metrics_logged" in before
    during: list[str] = []
    trainer.signals.train_batch_start.connect(lambda trainer, event: during.append(trainer.describe()))
    trainer.fit(Logging(interval="step"), batches(1))
    assert all("LRSchedulerStepping.on_metrics_logged" in text for text in during) and during


def test_a_missing_metric_is_an_error_that_names_scheduler_and_metric_and_says_how_to_make_it_a_warning() -> None:
    message = (
        r"^ReduceLROnPlateau\(monitor='means'\): no metric 'means' was logged; there are \['mean'\]\. "
        r"Did you mean 'mean'\? 'strict': False makes this a warning\."
    )
    with pytest.raises(MisconfigurationError, match=message):
        train(Logging(monitors=True, monitor="means"), 2, LRSchedulerStepping())


def test_a_missing_metric_is_one_warning_in_a_run_without_strict() -> None:
    with pytest.warns(UserWarning, match=r"^ReduceLROnPlateau\(monitor='means'\): no metric 'means' was logged") as warned:
        train(Logging(monitors=True, monitor="means", strict=False), 2, LRSchedulerStepping(), max_epochs=3)
    assert len(warned) == 1


def test_state_has_the_last_update_and_the_count_of_the_monitored_metric(tmp_path: Path) -> None:
    stepping = LRSchedulerStepping()
    train(Logging(monitors=True), 3, stepping, max_epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    expected = {"last_update": {0: 6}, "seen": {0: 2}}
    assert stepping.state_dict() == expected
    resumed = LRSchedulerStepping()
    at_fit_start: list[Any] = []
    look = On(fit_start=lambda trainer, event: at_fit_start.append(resumed.state_dict()))
    for callbacks in ((resumed, look), (look, resumed)):
        trainer = new_trainer(*callbacks, max_epochs=3)
        trainer.fit(Logging(monitors=True), batches(3), ckpt_path=tmp_path / "a.ckpt")
        assert at_fit_start.pop() == expected
        assert resumed.state_dict() == {"last_update": {0: 9}, "seen": {0: 3}}


def test_state_of_an_older_version_is_loaded() -> None:
    stepping = LRSchedulerStepping()
    stepping.load_state_dict({"last_update": {0: 6}})
    assert stepping.state_dict() == {"last_update": {0: 6}, "seen": {}}


def test_a_run_forgets_the_last_updates_of_an_earlier_fit(tmp_path: Path) -> None:
    """A checkpoint without the callback's state, at the step at which the scheduler of the earlier fit stepped last."""
    train(Logging(interval="step"), 3, On(safe_point=save_at(2, tmp_path / "a.ckpt")), manual_stepping())
    trainer = train(Logging(interval="step"), 3, LRSchedulerStepping())
    module = Logging(interval="step")
    trainer.fit(module, batches(3), ckpt_path=tmp_path / "a.ckpt")
    assert trainer.global_step == 3
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 1
    assert module.sgd.param_groups[0]["lr"] == pytest.approx(0.5)


def save_at(step: int, path: Path) -> Any:
    def save(trainer: Trainer, event: Any) -> None:
        if trainer.global_step == step:
            trainer.save_checkpoint(path)

    return save


def manual_stepping() -> Any:
    """Return a callback that takes the role of LRSchedulerStepping and steps nothing."""

    class Nothing(On):
        role = "lr_scheduler_stepping"

    return Nothing(fit_end=lambda trainer, event: None)
