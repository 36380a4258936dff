"""G. Counting: steps, the estimate of them, the end of a run by ``max_steps``, limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, IterableDataset

from eventtrain import LightningModule, LightningOptimizer, MisconfigurationError, Trainer
from eventtrain.callbacks import GradientAccumulation, LRSchedulerStepping, MixedPrecision
from tests.kit import NoLength, On, Probe, Recorder, batches, new_trainer, train

# ------------------------------------------------------------------ G1: global_step


class TwoOptimizers(LightningModule):
    """A generator and a discriminator, each a number, whose steps the test chooses."""

    def __init__(self, steps: Callable[[int], tuple[bool, bool]] = lambda batch_idx: (True, True)) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.g = nn.Parameter(torch.zeros(()))
        self.d = nn.Parameter(torch.zeros(()))
        self.steps = steps

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        for optimizer, parameter, step in zip(self.optimizers(), (self.g, self.d), self.steps(batch_idx), strict=True):
            if step:
                optimizer.zero_grad()
                self.manual_backward(parameter * batch)
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return SGD([self.g], lr=1.0), SGD([self.d], lr=1.0)


def test_g1_two_steps_in_a_batch_count_once() -> None:
    """Lightning: twice, so that ``max_steps=5`` takes six steps in three batches."""
    updates = Recorder("after_update")
    trainer = train(TwoOptimizers(), 8, updates, max_steps=5)
    assert trainer.global_step == 5
    assert [optimizer.num_steps for optimizer in trainer.optimizers] == [5, 5]
    assert [event.global_step for event in updates.events] == [1, 2, 3, 4, 5]
    assert trainer.total_batch_idx + 1 == 5


def test_g1_batches_in_which_nothing_updated_do_not_count() -> None:
    """G steps in batches 0, 2, 4; D in batches 0, 3."""
    updates = Recorder("after_update")
    trainer = train(TwoOptimizers(lambda i: (i % 2 == 0, i % 3 == 0)), 6, updates)
    assert [optimizer.num_steps for optimizer in trainer.optimizers] == [3, 2]
    assert trainer.global_step == 4  # batches 0, 2, 3, 4
    assert updates.count("after_update") == 4


def test_g1_steps_taken_several_times_in_a_batch_count_each_in_num_steps() -> None:
    class Critic(TwoOptimizers):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            for _ in range(5):
                super().training_step(batch, batch_idx)

    trainer = train(Critic(lambda i: (True, False)), 3)
    assert [optimizer.num_steps for optimizer in trainer.optimizers] == [15, 0]
    assert trainer.global_step == 3


def test_g1_a_window_counts_once() -> None:
    trainer = train(Probe(), 6, GradientAccumulation(2), max_epochs=2)
    assert trainer.global_step == trainer.optimizers[0].num_steps == 6


def test_g1_it_is_counted_between_the_optimizer_step_hook_and_after_update() -> None:
    counts: list[tuple[str, int]] = []

    class Module(Probe):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            counts.append(("hook begins", self.trainer.global_step))
            optimizer.step(closure=optimizer_closure)
            counts.append(("hook ends", self.trainer.global_step))

        def on_after_optimizer_step(self, event: Any) -> None:
            counts.append(("after_optimizer_step", self.global_step))

        def on_after_update(self, event: Any) -> None:
            counts.append(("after_update", self.global_step))
            assert event.global_step == self.global_step

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            counts.append(("lr_scheduler_step", self.global_step))
            scheduler.step()

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            counts.append(("train_batch_end", self.global_step))

    def configure(sgd: Any) -> Any:
        scheduler = torch.optim.lr_scheduler.LambdaLR(sgd, lambda n: 1.0)
        return [sgd], [{"scheduler": scheduler, "interval": "step"}]

    train(Module(configure=configure), 2, LRSchedulerStepping())
    expected = []
    for step in range(2):
        expected += [("hook begins", step), ("after_optimizer_step", step), ("hook ends", step)]
        expected += [("lr_scheduler_step", step + 1), ("after_update", step + 1), ("train_batch_end", step + 1)]
    assert counts == expected


def test_g1_a_warm_up_in_the_hook_sees_the_old_value() -> None:
    """The recipe: the first update has 1/4 of the rate, the fourth has all of it."""

    class WarmUp(Probe):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)
            for group in optimizer.param_groups:
                group["lr"] = min(1.0, (self.trainer.global_step + 2) / 4)

    module = WarmUp(lr=0.25)
    train(module, 5)
    assert module.rates == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_g1_each_fit_counts_anew() -> None:
    module = Probe()
    trainer = new_trainer(max_epochs=1)
    for _ in range(2):
        trainer.fit(module, batches(3))
        assert trainer.global_step == trainer.optimizers[0].num_steps == 3


def test_g1_num_steps_counts_one_run_of_a_wrapper_that_is_returned_again() -> None:
    class Keeps(Probe):
        wrapper: Any = None

        def configure_optimizers(self) -> Any:
            self.wrapper = self.wrapper or LightningOptimizer(SGD([self.w], lr=1.0))
            return self.wrapper

    module = Keeps()
    trainer = new_trainer(max_epochs=1)
    for _ in range(2):
        trainer.fit(module, batches(3))
        assert module.wrapper.num_steps == trainer.global_step == 3


# ------------------------------------------------------------------ G2: estimated_stepping_batches


class Asking(Probe):
    """Asks for the estimate in ``configure_optimizers``, as schedulers do."""

    estimate: int

    def configure_optimizers(self) -> Any:
        self.estimate = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


windows = st.integers(1, 7)
schedules = st.dictionaries(st.integers(1, 9), windows, max_size=3).flatmap(
    lambda later: windows.map(lambda first: {0: first, **later})
)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(
    schedule=schedules,
    unit=st.sampled_from(["epoch", "step", "batch"]),
    remainder=st.sampled_from(["step", "drop", "carry"]),
    length=st.integers(1, 9),
    epochs=st.integers(0, 4),
    limit=st.one_of(st.none(), st.integers(1, 10)),
    max_steps=st.one_of(st.none(), st.integers(1, 12)),
)
def test_g2_the_estimate_equals_the_updates(
    schedule: dict[int, int], unit: Any, remainder: Any, length: int, epochs: int, limit: int | None, max_steps: int | None
) -> None:
    used = length if limit is None else min(length, limit)
    if remainder == "drop":  # a window longer than the epoch is an error there
        schedule = {start: min(size, used) for start, size in schedule.items()}
    accumulation = GradientAccumulation(schedule, unit=unit, remainder=remainder)
    accumulation._warned = True  # of short epochs
    updates = Recorder("after_update")
    module = Asking()
    trainer = train(module, length, accumulation, updates, max_epochs=epochs, max_steps=max_steps, limit_train_batches=limit)
    assert module.estimate == updates.count("after_update") == len(module.updates) == trainer.global_step
    assert trainer.estimated_stepping_batches == module.estimate


def test_g2_the_sum_over_epochs() -> None:
    """Schedule {0: 4, 1: 2, 2: 1} over six batches: 2 + 3 + 6. Lightning: 18."""
    module = Asking()
    trainer = train(module, 6, GradientAccumulation({0: 4, 1: 2, 2: 1}), max_epochs=3)
    assert module.estimate == 11
    assert trainer.global_step == 11


def test_g2_no_epochs_are_no_steps() -> None:
    """Lightning: 7."""
    module = Asking()
    trainer = train(module, 7, max_epochs=0)
    assert module.estimate == 0
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_epochs": 3}, 18),
        ({"max_epochs": 3, "max_steps": 7}, 7),
        ({"max_epochs": 3, "max_steps": 100}, 18),
        ({"max_steps": 20}, 20),
        ({"max_epochs": -1, "max_steps": 8}, 8),
        ({"max_epochs": 3, "limit_train_batches": 4}, 12),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 9),
        ({"max_epochs": 3, "limit_train_batches": 0}, 0),
        ({"max_epochs": 3, "limit_train_batches": 1.0}, 18),
        ({"max_epochs": 5, "fast_dev_run": 2}, 2),
    ],
)
def test_g2_limits_and_max_steps_count(arguments: dict[str, Any], expected: int) -> None:
    module = Asking()
    trainer = train(module, 6, **arguments)
    assert module.estimate == expected
    assert trainer.global_step == expected


def test_g2_skips_make_it_an_upper_bound_that_one_cycle_never_overruns() -> None:
    def configure(sgd: Any) -> Any:
        cycle = OneCycleLR(sgd, max_lr=1.0, total_steps=module.trainer.estimated_stepping_batches)
        return [sgd], [{"scheduler": cycle, "interval": "step"}]

    module = Asking(configure=configure, nothing_for=[3.0])
    trainer = train(module, 5, LRSchedulerStepping(), max_epochs=2)
    assert module.estimate == 10
    assert trainer.global_step == 8
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 8


def test_g2_one_cycle_ends_with_the_run() -> None:
    def configure(sgd: Any) -> Any:
        cycle = OneCycleLR(sgd, max_lr=1.0, total_steps=module.trainer.estimated_stepping_batches)
        return [sgd], [{"scheduler": cycle, "interval": "step"}]

    module = Asking(configure=configure)
    trainer = train(module, 5, GradientAccumulation(2), LRSchedulerStepping(), max_epochs=2)
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.last_epoch == scheduler.total_steps == trainer.global_step == 6


def test_g2_in_manual_mode_it_is_the_batches() -> None:
    class Asks(TwoOptimizers):
        def configure_optimizers(self) -> Any:
            self.estimate = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    module = Asks()
    trainer = train(module, 4, max_epochs=3)
    assert module.estimate == trainer.global_step == 12


def test_g2_after_a_resume_it_is_the_whole_runs(tmp_path: Any) -> None:
    path = tmp_path / "checkpoint.pt"
    schedule = {0: 4, 1: 2, 2: 1}
    save = On(train_epoch_start=lambda t, e: t.save_checkpoint(path) if e.epoch == 1 else None)
    train(Asking(), 6, GradientAccumulation(schedule), save, max_epochs=3)
    module = Asking()
    trainer = new_trainer(GradientAccumulation(schedule), max_epochs=3)
    trainer.fit(module, batches(6), ckpt_path=path)
    assert len(module.updates) == 9  # of 11: two lie before the checkpoint
    assert module.estimate == 11
    assert trainer.estimated_stepping_batches == 11
    assert trainer.global_step == 11


class Stream(IterableDataset[torch.Tensor]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(batches(self.n))


class Guess(Stream):
    """An iterable data set that says a length, which workers and filters make a guess."""

    def __len__(self) -> int:
        return 99


UNSIZED: dict[str, Callable[[], Any]] = {
    "iterable": lambda: NoLength(batches(6)),
    "iterable data set": lambda: DataLoader(Stream(6), batch_size=None),
    "iterable data set that guesses": lambda: DataLoader(Guess(6), batch_size=None),
}


@pytest.mark.parametrize("loader", UNSIZED)
def test_g2_a_loader_of_unknown_length_needs_max_steps(loader: str) -> None:
    with pytest.raises(MisconfigurationError, match=r"estimated_stepping_batches.*length.*Trainer\(max_steps=\.\.\.\)"):
        train(Asking(), UNSIZED[loader](), max_epochs=2)
    module = Asking()
    trainer = train(module, UNSIZED[loader](), max_epochs=2, max_steps=9)
    assert module.estimate == 9
    assert trainer.global_step == 9


@pytest.mark.parametrize("loader", UNSIZED)
def test_g2_a_limit_bounds_a_loader_of_unknown_length(loader: str) -> None:
    module = Asking()
    trainer = train(module, UNSIZED[loader](), max_epochs=2, limit_train_batches=4)
    assert module.estimate == trainer.global_step == 8


def test_g2_a_run_without_a_last_epoch_needs_max_steps() -> None:
    with pytest.raises(MisconfigurationError, match=r"estimated_stepping_batches.*max_steps"):
        train(Asking(), 3, max_epochs=-1)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    change=st.integers(0, 8),
    before=windows,
    after=windows,
    counter=st.sampled_from(["current_epoch", "global_step", "batch_idx", "total_batch_idx"]),
    remainder=st.sampled_from(["step", "carry"]),
    length=st.integers(1, 7),
    epochs=st.integers(1, 3),
    by_override=st.booleans(),
)
def test_g2_a_policy_is_simulated(
    change: int, before: int, after: int, counter: str, remainder: Any, length: int, epochs: int, by_override: bool
) -> None:
    def policy(trainer: Any) -> int:
        return before if getattr(trainer, counter) < change else after

    class Override(GradientAccumulation):
        def batches_per_step(self, trainer: Any) -> int:
            return policy(trainer)

    accumulation = Override(1, remainder=remainder) if by_override else GradientAccumulation(policy, remainder=remainder)
    accumulation._warned = True  # of short epochs
    module = Asking()
    trainer = train(module, length, accumulation, max_epochs=epochs)
    assert module.estimate == trainer.global_step == len(module.updates)


def test_g2_the_override_of_the_guide_is_simulated() -> None:
    class Warmup(GradientAccumulation):
        def batches_per_step(self, trainer: Any) -> int:
            return 1 if trainer.global_step < 3 else 4

    module = Asking()
    trainer = train(module, 10, Warmup(1), max_epochs=1)
    assert module.estimate == trainer.global_step == 5  # 1, 1, 1, 4, 3
    assert module.updates == [1.0, 2.0, 3.0, 5.5, 9.0]


def test_g2_a_policy_that_reads_more_is_an_error_that_names_it() -> None:
    class Greedy(GradientAccumulation):
        def batches_per_step(self, trainer: Any) -> int:
            return 2 if trainer.callback_metrics else 1

    with pytest.raises(MisconfigurationError, match=r"Greedy\.batches_per_step reads trainer\.callback_metrics.*max_steps"):
        train(Asking(), 4, Greedy(1))
    train(Probe(), 4, Greedy(1))  # if nothing asks for the estimate, it may


@pytest.mark.parametrize("name", ["current_epoch", "global_step", "batch_idx", "total_batch_idx", "note"])
def test_g2_the_view_is_read_only(name: str) -> None:
    class Writes(GradientAccumulation):
        def batches_per_step(self, trainer: Any) -> int:
            if not isinstance(trainer, Trainer):
                setattr(trainer, name, 0)
            return 1

    with pytest.raises(MisconfigurationError, match=rf"Writes\.batches_per_step writes trainer\.{name}"):
        train(Asking(), 4, Writes(1))


def test_g2_the_simulation_leaves_no_trace() -> None:
    """Asked for in the middle of windows, again and again, it changes nothing."""
    module = Asking()
    ask = On(train_batch_end=lambda trainer, event: trainer.estimated_stepping_batches)
    train(module, 5, GradientAccumulation({0: 2, 1: 3}), ask, max_epochs=2)
    assert module.updates == [1.5, 3.5, 5.0, 2.0, 4.5]


def test_g2_it_never_iterates_the_loader() -> None:
    class Counting:
        passes = 0

        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[torch.Tensor]:
            self.passes += 1
            return iter(batches(3))

    loader = Counting()
    at_setup: list[int] = []

    class Module(Asking):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            at_setup.append(loader.passes)
            return optimizer

    train(Module(), loader, GradientAccumulation(2), max_epochs=2)
    assert at_setup == [0]
    assert loader.passes == 2


# ------------------------------------------------------------------ G3: max_steps within an epoch


class Validating(Probe):
    """Keeps the global step at which each validation ran."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.validated_at: list[int] = []

    def on_validation_start(self) -> None:
        self.validated_at.append(self.trainer.global_step)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", batch)


def test_g3_max_steps_within_an_epoch_stops_there_and_validates() -> None:
    module = Validating()
    trainer = train(module, 5, val=2, max_epochs=4, max_steps=7)
    assert trainer.global_step == 7
    assert trainer.total_batch_idx + 1 == 7
    assert trainer.current_epoch == 1  # the second is not complete
    assert module.validated_at == [5, 7]


def test_g3_only_if_it_was_due_at_the_epochs_end() -> None:
    module = Validating()
    train(module, 5, val=2, max_epochs=4, max_steps=7, check_val_every_n_epoch=3)
    assert module.validated_at == []


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (2, [2]),  # batches 2 and 4 of 5: none at the end
        (5, [3]),
        (1.0, [3]),
    ],
)
def test_g3_with_an_interval(interval: Any, expected: list[int]) -> None:
    module = Validating()
    train(module, 5, val=2, max_epochs=4, max_steps=3, val_check_interval=interval)
    assert module.validated_at == expected


def test_g3_at_the_epochs_end_there_is_one_validation() -> None:
    module = Validating()
    trainer = train(module, 5, val=2, max_epochs=4, max_steps=5)
    assert module.validated_at == [5]
    assert trainer.current_epoch == 1


def test_g3_the_epoch_schedulers_do_not_step() -> None:
    def configure(sgd: Any) -> Any:
        return [sgd], [torch.optim.lr_scheduler.LambdaLR(sgd, lambda n: 0.5**n)]

    module = Validating(configure=configure)
    trainer = train(module, 5, LRSchedulerStepping(), val=1, max_epochs=4, max_steps=7)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 1


def test_g3_max_steps_counts_updates_and_not_batches() -> None:
    module = Probe()
    trainer = train(module, 10, GradientAccumulation(3), max_epochs=1, max_steps=2)
    assert module.updates == [2.0, 5.0]
    assert trainer.total_batch_idx + 1 == 6


# ------------------------------------------------------------------ G4: limits and intervals


class AllStages(Validating):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.evaluated: list[float] = []

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.evaluated.append(batch.item())

    test_step = validation_step

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> float:
        self.evaluated.append(batch.item())
        return batch.item()


LIMITS = [(None, 8), (3, 3), (20, 8), (0.5, 4), (0.2, 1), (1.0, 8), (1, 1)]


@pytest.mark.parametrize(("limit", "expected"), LIMITS)
def test_g4_limits_of_training(limit: Any, expected: int) -> None:
    module = Probe()
    trainer = train(module, 8, limit_train_batches=limit, max_epochs=2)
    assert trainer.total_batch_idx + 1 == 2 * expected
    assert module.seen == [float(x) for x in range(1, expected + 1)] * 2


@pytest.mark.parametrize(("limit", "expected"), LIMITS)
@pytest.mark.parametrize("stage", ["val", "test", "predict"])
def test_g4_limits_of_evaluation(stage: str, limit: Any, expected: int) -> None:
    module = AllStages()
    trainer = new_trainer(**{f"limit_{stage}_batches": limit})
    getattr(trainer, "validate" if stage == "val" else stage)(module, batches(8))
    assert len(module.evaluated) == expected


@pytest.mark.parametrize("zero", [0, 0.0])
def test_g4_a_limit_of_zero_is_none(zero: Any) -> None:
    module = AllStages()
    trainer = train(module, 4, val=4, limit_val_batches=zero, num_sanity_val_steps=2)
    assert module.evaluated == []
    assert trainer.global_step == 4
    module = AllStages()
    trainer = train(module, 4, val=4, limit_train_batches=zero)
    assert module.seen == []
    assert trainer.global_step == 0


@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("name", ["limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"])
@pytest.mark.parametrize("value", [-1, 1.5, -0.1, True, "3", float("nan")])
def test_g4_bad_limits_are_errors_whenever_given(name: str, value: Any, validates: bool) -> None:
    with pytest.raises(MisconfigurationError, match=rf"{name}=.*whole number of batches, a fraction"):
        train(AllStages() if validates else Probe(), 4, val=4 if validates else None, **{name: value})


@pytest.mark.parametrize("stage", ["train", "val"])
def test_g4_a_fraction_below_one_batch_is_an_error(stage: str) -> None:
    with pytest.raises(MisconfigurationError, match=rf"limit_{stage}_batches=0.1 of 4 batches is less than one.*0.25"):
        train(AllStages(), 4, val=4, **{f"limit_{stage}_batches": 0.1})


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_g4_a_fraction_below_one_batch_is_an_error_in_evaluation(stage: str) -> None:
    with pytest.raises(MisconfigurationError, match=rf"limit_{stage}_batches=0.1 of 4 batches is less than one"):
        getattr(new_trainer(**{f"limit_{stage}_batches": 0.1}), stage)(AllStages(), batches(4))


@pytest.mark.parametrize(
    ("interval", "expected"),
    [(None, [8]), (1.0, [8]), (0.25, [2, 4, 6, 8]), (0.5, [4, 8]), (3, [3, 6]), (8, [8]), (1, [*range(1, 9)])],
)
def test_g4_val_check_interval(interval: Any, expected: list[int]) -> None:
    module = Validating()
    train(module, 8, val=1, val_check_interval=interval)
    assert module.validated_at == expected


def test_g4_an_interval_over_the_runs_batches() -> None:
    module = Validating()
    train(module, 4, val=1, max_epochs=3, val_check_interval=5, check_val_every_n_epoch=None)
    assert module.validated_at == [5, 10]


@pytest.mark.parametrize("validates", [False, True])
def test_g4_an_interval_longer_than_the_epoch_is_an_error(validates: bool) -> None:
    """Whether or not anything validates."""
    with pytest.raises(MisconfigurationError, match=r"val_check_interval=9 is longer than the epoch, which has 8 batches"):
        train(Validating() if validates else Probe(), 8, val=1 if validates else None, val_check_interval=9)
    with pytest.raises(MisconfigurationError, match=r"val_check_interval=5 is longer than the epoch, which has 4 batches"):
        train(Probe(), 8, limit_train_batches=4, val_check_interval=5)


@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("interval", [0, -1, 1.5, 0.0, "2", True])
def test_g4_bad_intervals_are_errors_whenever_given(interval: Any, validates: bool) -> None:
    with pytest.raises(MisconfigurationError, match=r"val_check_interval="):
        train(Validating() if validates else Probe(), 8, val=1 if validates else None, val_check_interval=interval)


def test_g4_a_fractional_interval_below_one_batch_is_every_batch() -> None:
    module = Validating()
    train(module, 4, val=1, val_check_interval=0.1)
    assert module.validated_at == [1, 2, 3, 4]


@pytest.mark.parametrize("validates", [False, True])
def test_g4_a_fractional_interval_of_an_unknown_length_is_an_error(validates: bool) -> None:
    module = Validating() if validates else Probe()
    with pytest.raises(
        MisconfigurationError, match=r"val_check_interval=0\.5 is a fraction of an epoch whose length is unknown"
    ):
        train(module, NoLength(batches(4)), val=1 if validates else None, val_check_interval=0.5)


def test_g1_an_overflow_counts_nothing() -> None:
    trainer = train(Probe(), [1.0, float("inf"), 3.0], MixedPrecision("fp16"))
    assert trainer.global_step == trainer.optimizers[0].num_steps == 2
