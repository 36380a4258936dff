"""EarlyStopping: it counts only new values, and a resumed run stops at the same place as an uninterrupted one."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from eventtrain import Callback, LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import GradientAccumulation, LRSchedulerStepping
from eventtrain.callbacks.stopping.early_stopping import EarlyStopping
from tests import resuming
from tests.callbacks.stopping.common import TwoProcesses
from tests.kit import new_trainer

BATCHES = [torch.ones(2, 1)] * 3


class Model(LightningModule):
    """Logs the given values: one at each of its validations, or one in each of its training epochs."""

    def __init__(self, validation: list[float] | None = None, training: list[float] | None = None, **options: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.validation, self.training_values, self.options = validation, training, options

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.training_values is not None:
            self.log("metric", self.training_values[self.current_epoch], **self.options)
        return self.layer(batch).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if self.validation is not None:
            self.log("metric", self.validation[self.trainer.progress.validations])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(module: LightningModule, *callbacks: Any, **options: Any) -> Trainer:
    trainer = new_trainer(*callbacks, **{"max_epochs": 9, **options})
    trainer.fit(module, BATCHES, BATCHES[:1])
    return trainer


# ------------------------------------------------------------------ the end


@pytest.mark.parametrize(
    ("values", "options", "looks", "best"),
    [
        ([5, 4, 3, 2, 1], {}, 5, 1),
        ([3, 3, 3, 3, 0], {}, 4, 3),
        ([3, 4, 5, 2, 3, 3, 3, 0], {}, 7, 2),
        ([3, 4, 0], {"patience": 1}, 2, 3),
        ([3, 4, 5, 5, 5, 0], {"mode": "max"}, 6, 5),
        ([3, 2, 1, 9, 9], {"mode": "max", "patience": 2}, 3, 3),
        # An improvement has to exceed min_delta, and is measured from the best value.
        ([4, 3.5, 3, 2.5, 2, 1], {"min_delta": 0.5, "patience": 1}, 2, 4),
        ([4, 3.75, 3.25, 3, 2.75, 1], {"min_delta": 0.5, "patience": 2}, 5, 3.25),
        ([1, 1.5, 2, 3], {"mode": "max", "min_delta": 0.5, "patience": 1}, 2, 1),
        # If NaN does not end the run, it is worse than any value.
        ([3, math.nan, 4, 2, 1], {"check_finite": False, "patience": 3}, 5, 1),
        ([3, math.nan, math.inf, 0], {"check_finite": False, "patience": 2}, 3, 3),
    ],
)
def test_a_run_stops_if_its_patience_is_over(values: list[float], options: dict[str, Any], looks: int, best: float) -> None:
    stopping = EarlyStopping("metric", **options)
    trainer = fit(Model(values), stopping, max_epochs=len(values))
    assert trainer.current_epoch == looks
    assert stopping.best == best and isinstance(stopping.best, float)
    stopped = looks < len(values) or stopping.wait_count >= stopping.patience
    expected = f"EarlyStopping: metric, at best {best:g}, has not improved in {stopping.patience} looks"
    assert trainer.stop_reason == (expected if stopped else None)


@pytest.mark.parametrize(
    ("values", "options", "looks", "why"),
    [
        ([0.5, 0.9, 1], {"mode": "max", "threshold": 0.9}, 2, "at best 0.9, has reached the threshold 0.9 with 0.9"),
        ([2, 1.5, 1, 0], {"threshold": 1.25}, 3, "at best 1, has reached the threshold 1.25 with 1"),
        ([2, 3, 4, 4.5, 0], {"divergence_threshold": 4, "patience": 9}, 4, "beyond the divergence threshold 4 with 4.5"),
        ([-2, -3, -4, -5, 0], {"mode": "max", "divergence_threshold": -4, "patience": 9}, 4, "threshold -4 with -5"),
        ([2, math.nan, 1], {}, 2, "at best 2, is nan"),
        ([2, -math.inf, 1], {}, 2, "is -inf"),
    ],
)
def test_a_run_stops_at_its_threshold_if_it_diverges_and_if_a_value_is_not_finite(
    values: list[float], options: dict[str, Any], looks: int, why: str
) -> None:
    trainer = fit(Model(values), EarlyStopping("metric", **options))
    assert trainer.current_epoch == looks
    assert why in (trainer.stop_reason or "")


def test_another_policy_is_one_method() -> None:
    class Plateau(EarlyStopping):
        def reason_to_stop(self, trainer: Trainer, value: float) -> str | None:
            return f"at {value}" if trainer.current_epoch == 1 else super().reason_to_stop(trainer, value)

    trainer = fit(Model([3, 2, 1]), Plateau("metric"))
    assert (trainer.current_epoch, trainer.stop_reason) == (2, "EarlyStopping: at 2.0")


def test_a_request_waits_for_min_epochs_and_stands() -> None:
    stopping = EarlyStopping("metric", patience=1)
    trainer = fit(Model([3, 4, 2, 1, 0]), stopping, min_epochs=4)
    assert trainer.current_epoch == 4
    assert (stopping.best, stopping.wait_count, stopping.value) == (3, 1, 4)


def test_a_run_stops_within_an_epoch_after_a_validation_there() -> None:
    trainer = fit(Model([1, 2, 3, 4, 5]), EarlyStopping("metric", patience=1), val_check_interval=2)
    assert (trainer.current_epoch, trainer.global_step) == (1, 3 + 2)


# ------------------------------------------------------------------ the values that count


class Looks(EarlyStopping):
    def __init__(self, **options: Any) -> None:
        super().__init__("metric", **{"patience": 99, **options})
        self.looks: list[tuple[int, float]] = []

    def reason_to_stop(self, trainer: Trainer, value: float) -> str | None:
        self.looks.append((trainer.global_step, value))
        return None


@pytest.mark.parametrize(
    "options", [{"on_step": True}, {"on_step": True, "on_epoch": True}, {"on_step": False, "on_epoch": True}], ids=str
)
def test_it_looks_at_a_metric_of_training_once_an_epoch(options: dict[str, Any]) -> None:
    looks = Looks()
    fit(Model(training=[3, 2], **options), looks, max_epochs=2, val_check_interval=2)
    assert looks.looks == [(3, 3), (6, 2)]


def test_an_incomplete_epoch_does_not_count() -> None:
    class Ends(Callback):
        def on_train_batch_end(self, trainer: Trainer, event: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.end_epoch("enough")

    looks = Looks()
    fit(Model(training=[3, 2, 1]), looks, Ends(), max_steps=5)
    assert looks.looks == [(4, 2)]


def test_it_looks_at_a_metric_of_validation_only_after_each_validation() -> None:
    looks = Looks()
    fit(Model([3, 2, 1, 0]), looks, max_epochs=4, check_val_every_n_epoch=2)
    assert looks.looks == [(6, 3), (12, 2)]


def test_a_name_that_both_stages_log_belongs_to_the_validation() -> None:
    looks = Looks()
    fit(Model([3, 2, 1, 0], [30, 20], on_step=False, on_epoch=True), looks, max_epochs=2)
    assert looks.looks == [(3, 3), (6, 2)]


def test_neither_the_sanity_check_nor_other_stages_nor_a_fast_dev_run_count() -> None:
    looks = Looks()
    trainer = fit(Model([3, 2]), looks, max_epochs=1, num_sanity_val_steps=1)
    assert looks.looks == [(3, 3)]
    trainer.validate(Model([5, 5]), BATCHES[:1])
    assert looks.looks == [(3, 3)] and looks.wait_count == 0
    fit(Model([3]), fast := Looks(), fast_dev_run=True, num_sanity_val_steps=2)
    assert fast.looks == []


def test_a_second_fit_starts_without_the_state_of_the_first() -> None:
    stopping = EarlyStopping("metric", patience=1)
    trainer = fit(Model([3, 4]), stopping)
    assert trainer.stop_reason
    trainer.fit(Model([9, 8, 8]), BATCHES, BATCHES[:1])
    assert (trainer.current_epoch, stopping.best) == (3, 8)


def test_only_a_look_reads_from_the_device() -> None:
    class Counts(TorchDispatchMode):  # type: ignore[no-untyped-call]
        reads = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.reads += "_local_scalar_dense" in str(func)
            return func(*args, **(kwargs or {}))

    with Counts() as without:  # type: ignore[no-untyped-call]
        fit(Model(training=[3, 2]), max_epochs=2)
    with Counts() as counts:  # type: ignore[no-untyped-call]
        fit(Model(training=[3, 2]), EarlyStopping("metric"), max_epochs=2)
    assert counts.reads - without.reads == 2


def test_processes_stop_together() -> None:
    class Other(TwoProcesses):
        """The other process has a reason at its fifth look; it asks for the first time at ``fit_start``."""

        def __init__(self) -> None:
            super().__init__()
            self.world_size = 1  # so that only EarlyStopping asks

        def any(self, flag: bool) -> bool:
            return super().any(flag) or self.exchanges > 5

    trainer = new_trainer(EarlyStopping("metric"), max_epochs=9)
    trainer.processes = Other()
    trainer.fit(Model(training=list(range(9, 0, -1))), BATCHES)
    assert trainer.current_epoch == 5
    assert trainer.stop_reason == "EarlyStopping: metric, in another process"


# ------------------------------------------------------------------ a missing metric


def test_a_missing_metric_is_one_warning_and_the_run_continues() -> None:
    with pytest.warns(
        UserWarning, match=r"EarlyStopping\(monitor='metrics'\): no metric 'metrics' was logged; there are \['metric'\]. Did"
    ) as said:
        trainer = fit(Model([3, 2, 1]), EarlyStopping("metrics"), max_epochs=3)
    assert len(said) == 1 and str(said[0].message).endswith("Did you mean 'metric'?")
    assert trainer.current_epoch == 3


def test_with_strict_a_missing_metric_is_an_error() -> None:
    with pytest.raises(
        MisconfigurationError, match=r"there are \[\]. Log it with self.log\('accuracy'.*strict=False"
    ) as caught:
        fit(Model(), EarlyStopping("accuracy", strict=True))
    assert "EarlyStopping" in str(caught.value)


def test_a_metric_is_not_missing_before_the_stage_that_may_log_it() -> None:
    trainer = fit(Model([3, 2]), EarlyStopping("metric", strict=True), max_epochs=4, check_val_every_n_epoch=2)
    assert trainer.current_epoch == 4


def test_it_looks_at_a_metric_that_comes_later_from_then_on() -> None:
    class Later(Model):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            if self.current_epoch >= 2:
                super().validation_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="no metric 'metric' was logged"):
        trainer = fit(Later([0, 0, 3, 4, 5]), EarlyStopping("metric", patience=1))
    assert trainer.current_epoch == 4


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize(("monitor", "validations"), [("both_epoch", None), ("val", None), ("loss", 2), ("val", 2)])
@pytest.mark.parametrize("window", [1, 3])
def test_a_run_resumes_from_any_safe_point(tmp_path: Path, window: int, monitor: str, validations: int | None) -> None:
    def build() -> Any:
        data = torch.randn(20, 3, generator=torch.Generator().manual_seed(2))
        loader: Any = DataLoader(data, batch_size=4, shuffle=True)  # type: ignore[arg-type]
        stopping = EarlyStopping(monitor, min_delta=100.0, patience=2)
        callbacks = [GradientAccumulation(window, remainder="carry"), LRSchedulerStepping(), stopping]
        return resuming.Model(), loader, [torch.ones(4, 3)], callbacks, {"max_epochs": 5, "val_check_interval": validations}

    # The first look is an improvement, and the third stops: in the third epoch, or after the second batch of the second.
    assert resuming.check_all_safe_points(build, tmp_path) == (7 if monitor == "val" and validations else 15)


class Seldom(Model):
    """Training logs the name only in even epochs."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.current_epoch % 2 == 0:
            self.log("metric", float(self.current_epoch), on_step=False, on_epoch=True)
        return self.layer(batch).sum()


@pytest.mark.parametrize(("values", "every"), [(None, 1), ([0.0, 1.0, 2.0, 3.0], 2)], ids=["training", "both"])
def test_a_resumed_run_knows_which_values_are_new(tmp_path: Path, values: Any, every: int) -> None:
    def build() -> Any:
        options = {"max_epochs": 4, "check_val_every_n_epoch": every}
        return Seldom(values), BATCHES, BATCHES[:1], [EarlyStopping("metric", patience=9)], options

    assert resuming.check_all_safe_points(build, tmp_path) == 12


def stopped(path: Path, **options: Any) -> Trainer:
    class Keeps(Callback):
        def on_safe_point(self, trainer: Trainer, event: Any) -> None:
            trainer.save_checkpoint(path)

    return fit(Model([3, 4, 5, 6, 7, 8, 9, 9, 9]), EarlyStopping("metric", patience=2), Keeps(), **options)


@pytest.mark.parametrize("validations", [None, 2])
def test_a_run_that_was_killed_after_its_request_does_not_train_again(tmp_path: Path, validations: int | None) -> None:
    first = stopped(tmp_path / "a.ckpt", val_check_interval=validations)
    stopping = EarlyStopping("metric", patience=2)
    trainer = new_trainer(stopping, max_epochs=9, val_check_interval=validations)
    trainer.fit(Model([3, 4, 5, 6]), BATCHES, BATCHES[:1], ckpt_path=tmp_path / "a.ckpt")
    assert trainer.stop_reason == first.stop_reason
    assert trainer.progress == first.progress
    assert (stopping.best, stopping.wait_count, stopping.value) == (3, 2, 5)


def test_with_more_patience_a_stopped_run_continues(tmp_path: Path) -> None:
    assert stopped(tmp_path / "a.ckpt").current_epoch == 3
    stopping = EarlyStopping("metric", patience=4)
    trainer = new_trainer(stopping, max_epochs=9)
    trainer.fit(Model([3, 4, 5, 6, 7, 8]), BATCHES, BATCHES[:1], ckpt_path=tmp_path / "a.ckpt")
    assert trainer.current_epoch == 5


def test_two_may_watch_two_metrics_and_either_stops() -> None:
    class Two(Model):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("other", float(self.current_epoch))

    trainer = fit(Two([3, 2, 1, 0]), EarlyStopping("metric"), EarlyStopping("other", patience=2), max_epochs=4)
    assert trainer.current_epoch == 3
    assert [callback.state_key for callback in trainer.callbacks] == ["EarlyStopping(metric, min)", "EarlyStopping(other, min)"]
    with pytest.raises(MisconfigurationError, match=r"both keep state under the key 'EarlyStopping\(a, min\)'"):
        Trainer(max_epochs=1, callbacks=[EarlyStopping("a"), EarlyStopping("a", patience=9)], device="cpu")


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"monitor": ""}, r"EarlyStopping\(monitor=''\): give the name of a metric"),
        ({"monitor": None}, r"EarlyStopping\(monitor=None\)"),
        ({"mode": "least"}, r"EarlyStopping\(mode='least'\): give 'min' or 'max'"),
        ({"patience": 0}, r"EarlyStopping\(patience=0\): give a whole number from 1"),
        ({"patience": 1.5}, "patience=1.5"),
        ({"min_delta": -0.1}, r"EarlyStopping\(min_delta=-0.1\): give a finite number from 0"),
        ({"min_delta": None}, "min_delta=None"),
        ({"threshold": "1"}, r"EarlyStopping\(threshold='1'\): give a finite number"),
        ({"threshold": True}, "threshold=True"),
        ({"divergence_threshold": math.inf}, r"EarlyStopping\(divergence_threshold=inf\)"),
    ],
)
def test_arguments_that_are_not_valid_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationError, match=message):
        EarlyStopping(**{"monitor": "metric", **arguments})


def test_a_normal_run_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(Model([3, 4, 5, 6]), EarlyStopping("metric", strict=True))
