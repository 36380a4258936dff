"""D. Learning rate schedulers: forms, intervals, and the moments at which they step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

from eventtrain import MisconfigurationError, Trainer
from eventtrain.callbacks import (
    GradientAccumulation,
    LearningRateMonitor,
    LRSchedulerStepping,
    MixedPrecision,
    TensorBoardLogger,
)
from tests.kit import On, Probe, Recorder, batches, new_trainer, train
from tests.reference import backward
from tests.semantics.schedules import Halving, Logging, Metered, metered, metrics_given, scheduled, steps

# ------------------------------------------------------------------ D1: the results of configure_optimizers


FORMS: dict[str, tuple[Callable[[Any, Any], Any], int]] = {
    "list-of-optimizers": (lambda sgd, scheduler: [sgd], 0),
    "tuple-of-optimizers": (lambda sgd, scheduler: (sgd,), 0),
    "optimizer": (lambda sgd, scheduler: sgd, 0),
    "two-lists": (lambda sgd, scheduler: ([sgd], [scheduler]), 1),
    "list-of-two-lists": (lambda sgd, scheduler: [[sgd], [scheduler]], 1),
    "two-lists-of-two": (lambda sgd, scheduler: ([sgd], [scheduler, Halving(sgd)]), 2),
    "two-lists-with-config": (lambda sgd, scheduler: ([sgd], [{"scheduler": scheduler, "interval": "step"}]), 1),
    "pair": (lambda sgd, scheduler: (sgd, scheduler), 1),
    "pair-with-config": (lambda sgd, scheduler: (sgd, {"scheduler": scheduler}), 1),
    "dict-without-scheduler": (lambda sgd, scheduler: {"optimizer": sgd}, 0),
    "dict": (lambda sgd, scheduler: {"optimizer": sgd, "lr_scheduler": scheduler}, 1),
    "dict-with-config": (lambda sgd, scheduler: {"optimizer": sgd, "lr_scheduler": {"scheduler": scheduler}}, 1),
    "dict-with-monitor": (lambda sgd, scheduler: {"optimizer": sgd, "lr_scheduler": scheduler, "monitor": "x"}, 1),
    "list-of-dicts": (lambda sgd, scheduler: [{"optimizer": sgd, "lr_scheduler": scheduler}], 1),
    "tuple-of-dicts": (lambda sgd, scheduler: ({"optimizer": sgd, "lr_scheduler": {"scheduler": scheduler}},), 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_d1_every_form(form: str) -> None:
    make, count = FORMS[form]
    made: list[Any] = []

    def configure(sgd: Any) -> Any:
        made.append(ReduceLROnPlateau(sgd) if form == "dict-with-monitor" else Halving(sgd))
        return make(sgd, made[0])

    module = Logging(configure=configure)
    trainer = train(module, 2, LRSchedulerStepping())
    assert [optimizer.optimizer for optimizer in trainer.optimizers] == [module.sgd]
    configs = trainer.lr_scheduler_configs
    assert len(configs) == count and (not configs or configs[0].scheduler is made[0])
    assert all(steps(trainer, index) == (2 if form == "two-lists-with-config" else 1) for index in range(count))
    assert module.updates == [1.0, 2.0]


def test_d1_the_last_example_of_the_guide() -> None:
    def configure(sgd: Any) -> Any:
        total = module.trainer.estimated_stepping_batches
        scheduler = OneCycleLR(sgd, max_lr=1e-3, total_steps=total)
        return sgd, scheduler

    module = Probe(configure=configure)
    with pytest.warns(UserWarning, match="OneCycleLR"):  # D7
        trainer = train(module, 4, LRSchedulerStepping())
    assert trainer.lr_scheduler_configs[0].scheduler.total_steps == 4 and len(module.updates) == 4


def test_d1_several_optimizers_and_dicts_are_for_manual_mode() -> None:
    other = nn.Parameter(torch.zeros(1))

    def configure(sgd: Any) -> Any:
        second = SGD([other], lr=0.5)
        return [{"optimizer": sgd, "lr_scheduler": Halving(sgd)}, {"optimizer": second, "lr_scheduler": Halving(second)}]

    class Manual(Probe):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    trainer = train(Manual(configure=configure, automatic=False), 1)
    assert [config.optimizer for config in trainer.lr_scheduler_configs] == [o.optimizer for o in trainer.optimizers]


@pytest.mark.parametrize(
    ("make", "wrong", "nearest"),
    [
        (lambda sgd, s: {"optimizer": sgd, "lr_schedulers": s}, "lr_schedulers", "lr_scheduler"),
        (lambda sgd, s: {"optimiser": sgd}, "optimiser", "optimizer"),
        (lambda sgd, s: [{"optimizer": sgd, "monitr": "x"}], "monitr", "monitor"),
        (lambda sgd, s: {"optimizer": sgd, "lr_scheduler": {"scheduler": s, "intervall": "step"}}, "intervall", "interval"),
        (lambda sgd, s: ([sgd], [{"scheduler": s, "freqency": 2}]), "freqency", "frequency"),
        (
            lambda sgd, s: {"optimizer": sgd, "lr_scheduler": {"scheduler": s, "reduce_on_plato": 1}},
            "plato",
            "reduce_on_plateau",
        ),
    ],
)
def test_d1_an_unknown_key_is_an_error_with_the_nearest_valid_one(make: Any, wrong: str, nearest: str) -> None:
    with pytest.raises(MisconfigurationError, match=f"(?s){wrong}.*Did you mean '{nearest}'"):
        train(Probe(configure=lambda sgd: make(sgd, Halving(sgd))), 1, LRSchedulerStepping())


def test_d1_one_optimizer_twice_is_an_error() -> None:
    with pytest.raises(MisconfigurationError, match="twice"):
        train(Probe(configure=lambda sgd: [sgd, sgd], automatic=False), 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda sgd: "sgd",
        lambda sgd: 3,
        lambda sgd: [sgd, "scheduler"],
        lambda sgd: {"lr_scheduler": Halving(sgd)},
        lambda sgd: ([sgd], [object()]),
        lambda sgd: ([sgd], [{"interval": "step"}]),
        lambda sgd: [sgd, sgd],
        lambda sgd: {"optimizer": sgd, "lr_scheduler": [Halving(sgd)]},
        lambda sgd: {"optimizer": Halving(sgd)},
    ],
)
def test_d1_anything_else_is_an_error(make: Any) -> None:
    with pytest.raises(MisconfigurationError, match=r"configure_optimizers|scheduler config"):
        train(Probe(configure=make), 1)


# ------------------------------------------------------------------ D2: a scheduler's config


def config_of(**config: Any) -> Any:
    return train(Logging(configure=scheduled(**config)), 1, LRSchedulerStepping()).lr_scheduler_configs[0]


def test_d2_the_defaults() -> None:
    config = config_of()
    assert (config.interval, config.frequency, config.monitor, config.strict, config.name) == ("epoch", 1, None, True, None)
    assert config.reduce_on_plateau is False


def test_d2_all_the_keys() -> None:
    keys = {"interval": "step", "frequency": 3, "strict": False, "name": "mine", "monitor": "x", "reduce_on_plateau": True}
    config = config_of(scheduler=Metered, **keys)
    assert {name: getattr(config, name) for name in keys} == keys


def test_d2_reduce_on_plateau_is_set_by_the_type() -> None:
    assert config_of(scheduler=ReduceLROnPlateau, monitor="x").reduce_on_plateau is True
    assert config_of(scheduler=Halving, monitor="x", interval="validation").reduce_on_plateau is False


@pytest.mark.parametrize("outer", [True, False], ids=["in-the-dict", "in-the-config"])
def test_d2_monitor_may_stand_in_the_dict_or_in_the_config(outer: bool) -> None:
    def configure(sgd: Any) -> Any:
        config: Any = {"scheduler": ReduceLROnPlateau(sgd)}
        if outer:
            return {"optimizer": sgd, "lr_scheduler": config, "monitor": "mean"}
        return {"optimizer": sgd, "lr_scheduler": {**config, "monitor": "mean"}}

    trainer = train(Logging(configure=configure), 2, LRSchedulerStepping(), max_epochs=2)
    assert trainer.lr_scheduler_configs[0].monitor == "mean" and steps(trainer) == 2


@pytest.mark.parametrize("interval", ["steps", "epochs", "train", None])
def test_d2_an_unknown_interval_is_an_error_that_lists_them(interval: Any) -> None:
    with pytest.raises(MisconfigurationError, match=r"epoch.*step.*batch.*validation"):
        config_of(interval=interval)


@pytest.mark.parametrize("frequency", [0, -1, 1.5, "2", True])
def test_d2_a_bad_frequency_is_an_error(frequency: Any) -> None:
    with pytest.raises(MisconfigurationError, match="frequency"):
        config_of(frequency=frequency)


def test_d2_interval_epoch_is_the_runs_epochs() -> None:
    module = Probe(configure=scheduled(frequency=2))
    trainer = train(module, 2, LRSchedulerStepping(), max_epochs=5)
    assert module.rates == [1.0] * 4 + [0.5] * 4 + [0.25] * 2 and steps(trainer) == 2


def test_d2_interval_batch_is_the_runs_batches() -> None:
    module = Probe(configure=scheduled(interval="batch", frequency=2))
    trainer = train(module, 3, LRSchedulerStepping(), max_epochs=3)
    assert module.rates == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625] and steps(trainer) == 4


def test_d2_interval_batch_counts_batches_that_only_accumulate() -> None:
    module = Probe(configure=scheduled(interval="batch", frequency=2))
    trainer = train(module, 8, GradientAccumulation(2), LRSchedulerStepping())
    assert module.rates == [1.0, 0.5, 0.25, 0.125] and steps(trainer) == 4


def test_d2_interval_validation_is_the_runs_validations() -> None:
    module = Logging(configure=scheduled(interval="validation", frequency=2))
    options = {"val": 1, "val_check_interval": 2, "max_epochs": 2, "num_sanity_val_steps": 2}
    trainer = train(module, 6, LRSchedulerStepping(), **options)
    # Validations after the batches 2, 4, 6 of each epoch; the sanity check is none of them.
    assert module.rates == [1.0] * 4 + [0.5] * 4 + [0.25] * 4 and steps(trainer) == 3


def test_d2_trainer_validate_steps_nothing() -> None:
    module = Logging(configure=scheduled(interval="validation"))
    trainer = train(module, 3, LRSchedulerStepping(), val=1, val_check_interval=2)
    assert steps(trainer) == 1
    trainer.validate(module, batches(1))
    assert steps(trainer) == 1


def test_d2_a_sanity_check_steps_nothing_after_a_resume_either(tmp_path: Any) -> None:
    def save(trainer: Any, event: Any) -> None:
        trainer.save_checkpoint(tmp_path / "run.ckpt")

    options = {"val_check_interval": 2, "num_sanity_val_steps": 1}
    stepping = LRSchedulerStepping()
    train(Logging(configure=scheduled(interval="validation")), 3, stepping, On(safe_point=save), val=1, **options)
    recorder = Recorder("train_batch_start", "before_lr_scheduler_step")
    trainer = new_trainer(LRSchedulerStepping(), recorder, max_epochs=2, **options)
    module = Logging(configure=scheduled(interval="validation"))
    trainer.fit(module, batches(3), batches(1), ckpt_path=tmp_path / "run.ckpt")
    assert recorder.names[0] == "train_batch_start", "an update since the last validation does not count here"


def test_d2_several_schedulers_have_separate_intervals() -> None:
    def configure(sgd: Any) -> Any:
        def counting() -> Any:
            return LambdaLR(sgd, lambda count: 1.0)

        return [sgd], [
            {"scheduler": counting(), "interval": "step"},
            {"scheduler": counting(), "interval": "step", "frequency": 3},
            {"scheduler": counting(), "interval": "epoch"},
            {"scheduler": counting(), "interval": "batch"},
            {"scheduler": counting(), "interval": "validation"},
        ]

    module = Logging(configure=configure)
    trainer = train(module, 5, LRSchedulerStepping(), val=1, max_epochs=2)
    assert [steps(trainer, index) for index in range(5)] == [10, 3, 2, 10, 2]


def test_d2_the_stepping_is_a_policy_that_may_be_overridden() -> None:
    class OnlyFirst(LRSchedulerStepping):
        def is_due(self, config: Any, count: int) -> bool:
            return count == 1 and super().is_due(config, count)

    module = Probe(configure=scheduled(interval="step"))
    trainer = train(module, 4, OnlyFirst())
    assert module.rates == [1.0, 0.5, 0.5, 0.5] and steps(trainer) == 1


# ------------------------------------------------------------------ D3: optimizer steps over the whole run


def test_d3_accumulation_two_frequency_two_six_batches() -> None:
    trainer = train(Probe(configure=scheduled(interval="step", frequency=2)), 6, GradientAccumulation(2), LRSchedulerStepping())
    assert trainer.global_step == 3 and steps(trainer) == 1


def test_d3_frequency_three_three_epochs_of_five_batches() -> None:
    module = Probe(configure=scheduled(interval="step", frequency=3))
    trainer = train(module, 5, LRSchedulerStepping(), max_epochs=3)
    assert trainer.global_step == 15 and steps(trainer) == 5
    assert module.rates == [0.5 ** (step // 3) for step in range(15)]


@settings(derandomize=True, max_examples=60, deadline=None, database=None)
@given(
    frequency=st.integers(1, 7),
    window=st.integers(1, 4),
    remainder=st.sampled_from(["step", "drop", "carry"]),
    length=st.integers(4, 9),
    epochs=st.integers(1, 4),
    max_steps=st.none() | st.integers(1, 12),
    nothing=st.sets(st.integers(1, 9), max_size=4),
    vetoed=st.sets(st.integers(0, 20), max_size=5),
    stop_at=st.none() | st.integers(0, 20),
)
def test_d3_property_scheduler_steps_are_global_step_over_frequency(
    frequency: int,
    window: int,
    remainder: Any,
    length: int,
    epochs: int,
    max_steps: int | None,
    nothing: set[int],
    vetoed: set[int],
    stop_at: int | None,
) -> None:
    def veto(trainer: Any, event: Any) -> None:
        if trainer.total_batch_idx in vetoed:
            event.skip("test")

    def stop(trainer: Any, event: Any) -> None:
        if trainer.total_batch_idx == stop_at:
            trainer.stop("test")

    module = Probe(configure=scheduled(interval="step", frequency=frequency), nothing_for=map(float, nothing))
    trainer = train(
        module,
        length,
        LRSchedulerStepping(),
        GradientAccumulation(window, remainder=remainder),
        On(before_optimizer_step=veto, train_batch_end=stop),
        max_epochs=epochs,
        max_steps=max_steps,
    )
    assert trainer.global_step == len(module.updates) <= trainer.estimated_stepping_batches
    assert steps(trainer) == trainer.global_step // frequency
    assert module.rates == [0.5 ** (step // frequency) for step in range(trainer.global_step)]


# ------------------------------------------------------------------ D4: only after a real update


def stepping_by_updates(**options: Any) -> Probe:
    return Probe(configure=scheduled(interval="step"), **options)


def check_counts(trainer: Any, module: Probe, updates: int) -> None:
    assert steps(trainer) == trainer.global_step == len(module.updates) == updates


def test_d4_under_an_overflow() -> None:
    class Overflowing(Probe):
        def loss(self, x: torch.Tensor) -> torch.Tensor:
            return super().loss(x) * (float("inf") if x.item() in (2.0, 3.0) else 1.0)

    module = Overflowing(configure=scheduled(interval="step"))
    precision = MixedPrecision("fp16", scaler=GradScaler("cpu", init_scale=1024.0))
    trainer = train(module, 5, precision, LRSchedulerStepping())
    check_counts(trainer, module, 3)
    assert module.rates == [1.0, 0.5, 0.25]


def test_d4_under_a_veto() -> None:
    module = stepping_by_updates()
    veto = On(before_optimizer_step=lambda trainer, event: event.skip("no") if trainer.batch_idx in (0, 3) else None)
    trainer = train(module, 5, LRSchedulerStepping(), veto)
    check_counts(trainer, module, 3)
    assert module.rates == [1.0, 0.5, 0.25]


def test_d4_under_a_none_loss() -> None:
    module = stepping_by_updates(nothing_for={1.0, 4.0})
    trainer = train(module, 5, LRSchedulerStepping())
    check_counts(trainer, module, 3)


def test_d4_under_an_optimizer_step_that_skips() -> None:
    class EveryOther(Probe):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    module = EveryOther(configure=scheduled(interval="step"))
    trainer = train(module, 5, LRSchedulerStepping())
    check_counts(trainer, module, 2)


def test_d4_a_step_of_the_wrapped_optimizer_is_a_real_update() -> None:
    class Wrapped(Probe):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.optimizer.step(optimizer_closure)

    module = Wrapped(configure=scheduled(interval="step"))
    trainer = train(module, 5, LRSchedulerStepping())
    check_counts(trainer, module, 5)


@pytest.mark.parametrize("frequency", [1, 2])
def test_d4_a_skipped_update_does_not_repeat_a_step(frequency: int) -> None:
    module = Probe(configure=scheduled(interval="step", frequency=frequency), nothing_for={3.0, 4.0})
    trainer = train(module, 5, LRSchedulerStepping())
    assert trainer.global_step == 3 and steps(trainer) == 3 // frequency


def test_d4_an_epoch_without_an_update_steps_no_epoch_scheduler() -> None:
    module = Probe(configure=scheduled(interval="epoch"))
    veto = On(before_optimizer_step=lambda trainer, event: event.skip("no") if trainer.current_epoch in (0, 2) else None)
    trainer = train(module, 2, LRSchedulerStepping(), veto, max_epochs=4)
    assert steps(trainer) == 2 and module.rates == [1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize("interval", ["step", "epoch", "batch", "validation"])
def test_d4_nothing_steps_before_the_first_update(interval: str) -> None:
    """torch warns of a scheduler that steps before its optimizer, and here that is an error."""
    module = Logging(configure=scheduled(interval=interval), nothing_for={1.0, 2.0})
    with pytest.warns(UserWarning, match="Nothing was trained in epoch"):
        trainer = train(module, 2, LRSchedulerStepping(), val=1, max_epochs=2)
    assert steps(trainer) == 0


@pytest.mark.parametrize("interval", ["step", "epoch", "batch", "validation"])
def test_d4_nothing_steps_before_the_first_window_is_closed(interval: str) -> None:
    module = Logging(configure=scheduled(interval=interval))
    options = {"val": 1, "val_check_interval": 1}
    train(module, 3, GradientAccumulation(3), LRSchedulerStepping(), **options)
    assert module.rates == [1.0]


# ------------------------------------------------------------------ D6: mistakes


def test_d6_plateau_without_monitor_is_an_error() -> None:
    module = Probe(configure=scheduled(ReduceLROnPlateau))
    with pytest.raises(MisconfigurationError, match=r"(?s)ReduceLROnPlateau.*'monitor'"):
        train(module, 1, LRSchedulerStepping())
    assert module.updates == []


def test_d6_any_scheduler_that_takes_a_metric_needs_a_monitor() -> None:
    with pytest.raises(MisconfigurationError, match=r"(?s)Metered.*'monitor'"):
        train(Probe(configure=metered()), 1, LRSchedulerStepping())


@pytest.mark.parametrize("automatic", [True, False])
def test_d6_a_scheduler_of_an_optimizer_that_was_not_returned_is_an_error(automatic: bool) -> None:
    other = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    module = Probe(configure=lambda sgd: ([sgd], [Halving(other)]), automatic=automatic)
    with pytest.raises(MisconfigurationError, match=r"(?s)Halving.*did not return"):
        train(module, 1, LRSchedulerStepping())


class Timm:
    """A scheduler of timm's kind: its ``step`` wants the epoch."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.epochs: list[int] = []

    def step(self, epoch: int, metric: Any = None) -> None:
        self.epochs.append(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.5 ** (epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None


def test_d6_a_scheduler_without_torchs_api_needs_the_hook() -> None:
    module = Probe(configure=scheduled(Timm))
    with pytest.raises(MisconfigurationError, match=r"(?s)Timm.*lr_scheduler_step"):
        train(module, 1, LRSchedulerStepping())
    assert module.updates == [], "at setup"


def test_d6_the_timm_example_of_the_guide() -> None:
    class Guide(Probe):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            self.scheduler = Timm(optimizer)
            return [optimizer], [{"scheduler": self.scheduler, "interval": "epoch"}]

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step(epoch=self.current_epoch)  # timm's scheduler need the epoch value

    module = Guide()
    train(module, 2, LRSchedulerStepping(), max_epochs=3)
    assert module.scheduler.epochs == [0, 1, 2] and module.rates == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


class Unrelated:
    """Not a torch scheduler, without an optimizer; but it has the three methods."""

    def __init__(self) -> None:
        self.count = 0

    def step(self) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_d6_anything_with_the_three_methods_is_accepted() -> None:
    scheduler = Unrelated()
    train(Probe(configure=lambda sgd: ([sgd], [{"scheduler": scheduler, "interval": "step"}])), 3, LRSchedulerStepping())
    assert scheduler.count == 3


@pytest.mark.parametrize("missing", ["step", "state_dict", "load_state_dict"])
def test_d6_without_one_of_the_three_it_is_an_error(missing: str) -> None:
    methods = {"step": lambda self: None, "state_dict": lambda self: {}, "load_state_dict": lambda self, state: None}
    methods.pop(missing)
    scheduler = type("Lacking", (), methods)()
    with pytest.raises(MisconfigurationError, match=rf"(?s)Lacking.*'{missing}'"):
        train(Probe(configure=lambda sgd: ([sgd], [scheduler])), 1, LRSchedulerStepping())


# ------------------------------------------------------------------ D7: OneCycleLR


def one_cycle(total: int, **config: Any) -> Any:
    return scheduled(lambda sgd: OneCycleLR(sgd, max_lr=1.0, total_steps=total), **config)


def test_d7_one_cycle_by_epochs_with_a_step_count_warns() -> None:
    with pytest.warns(UserWarning, match=r"(?s)total_steps=8.*'interval': 'step'"):
        train(Probe(configure=one_cycle(8)), 4, LRSchedulerStepping(), max_epochs=2)


@pytest.mark.parametrize(
    ("total", "config"), [(8, {"interval": "step"}), (2, {}), (2, {"interval": "epoch"})], ids=["step", "epochs", "epoch"]
)
def test_d7_otherwise_it_does_not_warn(total: int, config: Any) -> None:
    module = Probe(configure=one_cycle(total, **config))
    trainer = train(module, 4, LRSchedulerStepping(), max_epochs=2)  # a warning would be an error
    assert steps(trainer) == (8 if total == 8 else 2)


def test_d7_another_scheduler_does_not_warn() -> None:
    train(Probe(configure=scheduled(lambda sgd: StepLR(sgd, 100))), 4, LRSchedulerStepping(), max_epochs=2)


# ------------------------------------------------------------------ D8: the module's hook


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"interval": "step"}, [None, None, None, None]),
        ({"interval": "epoch"}, [None, None]),
        ({"interval": "batch"}, [None, None, None, None]),
        ({"interval": "validation"}, [None, None]),
        ({"interval": "epoch", "monitor": "mean", "scheduler": Metered}, [1.5, 1.5]),
        ({"interval": "step", "monitor": "x", "scheduler": Metered}, [1.0, 2.0, 1.0, 2.0]),
        ({"interval": "validation", "monitor": "val", "scheduler": Metered}, [1.0, 1.0]),
        ({"interval": "epoch", "monitor": "mean", "scheduler": ReduceLROnPlateau}, [1.5, 1.5]),
        ({"interval": "epoch", "monitor": "mean", "scheduler": Halving, "reduce_on_plateau": True}, [1.5, 1.5]),
        ({"interval": "epoch", "monitor": "mean", "scheduler": Halving}, [None, None]),
    ],
)
def test_d8_the_hook_does_every_step(config: Any, expected: Any) -> None:
    class Hooked(Logging):
        steps: list[Any] = []

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            assert scheduler is self.lr_schedulers()
            self.steps.append(metric if metric is None else float(metric))

    module = Hooked(configure=scheduled(**config))
    trainer = train(module, 2, LRSchedulerStepping(), val=1, max_epochs=2)
    assert module.steps == expected
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert not (scheduler.metrics if isinstance(scheduler, Metered) else scheduler.last_epoch), "nothing steps beside it"


def test_d8_the_default_steps_with_the_metric_if_there_is_one() -> None:
    class Super(Logging):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            super().lr_scheduler_step(scheduler, metric)

    trainer = train(Super(configure=metered(monitor="mean")), 2, LRSchedulerStepping())
    assert metrics_given(trainer) == [1.5]
    assert steps(train(Super(configure=scheduled()), 2, LRSchedulerStepping())) == 1


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_d8_a_scheduler_that_takes_no_metric_is_not_given_the_monitored_one(interval: str) -> None:
    """A ``monitor`` beside a StepLR is common, in dicts that other code makes; its ``step(epoch)`` is another thing."""

    def configure(sgd: Any) -> Any:
        config = {"scheduler": ExponentialLR(sgd, 0.5), "interval": interval}
        return {"optimizer": sgd, "lr_scheduler": config, "monitor": "x"}

    module = Logging(configure=configure)
    trainer = train(module, 2, LRSchedulerStepping(), max_epochs=2)
    assert steps(trainer) == (2 if interval == "epoch" else 4)
    assert module.rates == ([1.0, 1.0, 0.5, 0.5] if interval == "epoch" else [1.0, 0.5, 0.25, 0.125])


def test_d8_a_listener_may_write_the_metric() -> None:
    def write(trainer: Any, event: Any) -> None:
        event.metric = event.metric * 2

    trainer = train(Logging(configure=metered(monitor="mean")), 2, LRSchedulerStepping(), On(before_lr_scheduler_step=write))
    assert metrics_given(trainer) == [3.0]


# ------------------------------------------------------------------ D9: logged rates


class Kept(TensorBoardLogger):
    """Keeps the values in place of writing them."""

    written: list[tuple[int, float]]

    def log_scalars(self, scalars: Any, x: int) -> None:
        self.written.extend((x, value) for name, value in scalars.items() if name.startswith("lr-"))


@pytest.mark.parametrize("interval", ["step", "batch"])
@pytest.mark.parametrize("logger_first", [True, False])
@pytest.mark.parametrize("window", [1, 2])
def test_d9_logged_rates_are_the_rates_of_the_step(tmp_path: Any, logger_first: bool, interval: str, window: int) -> None:
    frequency = window if interval == "batch" else 1
    module = Probe(configure=scheduled(interval=interval, frequency=frequency))
    logger = Kept(tmp_path, log_every_n_steps=1)
    logger.written = []
    callbacks: list[Any] = [logger, LearningRateMonitor(), LRSchedulerStepping()]
    train(module, 4, GradientAccumulation(window), *(callbacks if logger_first else reversed(callbacks)), max_epochs=2)
    assert logger.written == list(enumerate(module.rates, start=1))
    assert module.rates == [0.5**count for count in range(8 // window)]


def test_d9_the_event_carries_the_rate_that_was_used_and_the_new_one() -> None:
    recorder = Recorder("before_lr_scheduler_step", "after_lr_scheduler_step")
    module = Probe(configure=scheduled(interval="step"))
    train(module, 3, LRSchedulerStepping(), recorder)
    assert [event.learning_rates for event in recorder.of("before_lr_scheduler_step")] == [[rate] for rate in module.rates]
    assert [event.learning_rates for event in recorder.of("after_lr_scheduler_step")] == [[0.5], [0.25], [0.125]]


# ------------------------------------------------------------------ D10: nothing that steps


def test_d10_schedulers_and_nothing_that_steps_them_warns() -> None:
    module = Probe(configure=scheduled(interval="step"))
    with pytest.warns(UserWarning, match="LRSchedulerStepping") as caught:
        trainer = train(module, 3)
    assert len(caught) == 1 and steps(trainer) == 0 and module.rates == [1.0] * 3


def test_d10_without_schedulers_there_is_no_warning() -> None:
    train(Probe(), 3)


def test_d10_a_subclass_steps_them_too() -> None:
    class Own(LRSchedulerStepping):
        pass

    assert steps(train(Probe(configure=scheduled(interval="step")), 3, Own())) == 3


def test_d10_one_that_the_module_brings_counts() -> None:
    class Bringing(Probe):
        def configure_callbacks(self) -> Any:
            return [LRSchedulerStepping()]

    assert steps(train(Bringing(configure=scheduled(interval="step")), 3)) == 3


def test_d10_it_is_attached_by_default() -> None:
    trainer = Trainer(max_epochs=1, device="cpu", num_sanity_val_steps=0)
    trainer.fit(Probe(configure=scheduled(interval="step")), batches(3))
    assert steps(trainer) == 3
    given_one = Trainer(max_epochs=1, device="cpu", callbacks=[LRSchedulerStepping()])
    assert sum(isinstance(callback, LRSchedulerStepping) for callback in given_one.callbacks) == 1


# ------------------------------------------------------------------ whole runs


@settings(derandomize=True, max_examples=60, deadline=None, database=None)
@given(
    interval=st.sampled_from(["step", "epoch"]),
    frequency=st.integers(1, 4),
    window=st.integers(1, 3),
    length=st.integers(3, 6),
    epochs=st.integers(1, 4),
    limit=st.none() | st.integers(3, 6),
    max_steps=st.none() | st.integers(1, 12),
)
def test_d_property_rates_equal_the_hand_written_loop(
    interval: str, frequency: int, window: int, length: int, epochs: int, limit: int | None, max_steps: int | None
) -> None:
    def make(optimizer: Any) -> Any:
        return ExponentialLR(optimizer, 0.9)

    module = Probe(lr=0.1, configure=scheduled(make, interval=interval, frequency=frequency))
    trainer = new_trainer(
        GradientAccumulation(window), LRSchedulerStepping(), max_epochs=epochs, max_steps=max_steps, limit_train_batches=limit
    )
    trainer.fit(module, batches(length))

    w = nn.Parameter(torch.zeros(1))
    optimizer = SGD([w], lr=0.1)
    scheduler = make(optimizer)
    used = min(length, limit or length)
    updates = 0
    for epoch in range(epochs):
        for start in range(1, used + 1, window):
            if updates == max_steps:
                break
            inside = range(start, min(start + window, used + 1))
            optimizer.zero_grad()
            for x in inside:
                backward((w * float(x)).sum() / window)
            if len(inside) != window:
                w.grad.mul_(window / len(inside))  # type: ignore[union-attr]
            optimizer.step()
            updates += 1
            if interval == "step" and updates % frequency == 0:
                scheduler.step()
            if interval == "epoch" and inside[-1] == used and (epoch + 1) % frequency == 0:
                scheduler.step()
    assert torch.equal(module.w, w) and trainer.global_step == updates
    assert module.sgd.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert module.sgd.state_dict() == optimizer.state_dict()


@settings(derandomize=True, max_examples=30, deadline=None, database=None)
@given(window=st.integers(1, 4), length=st.integers(1, 6), epochs=st.integers(1, 3), max_steps=st.none() | st.integers(1, 8))
def test_d_property_one_cycle_over_the_estimated_steps_ends_exactly(
    window: int, length: int, epochs: int, max_steps: int | None
) -> None:
    def configure(sgd: Any) -> Any:
        scheduler = OneCycleLR(sgd, max_lr=1.0, total_steps=module.trainer.estimated_stepping_batches)
        return [sgd], [{"scheduler": scheduler, "interval": "step"}]

    module = Probe(configure=configure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an epoch shorter than the window
        trainer = train(
            module, length, GradientAccumulation(window), LRSchedulerStepping(), max_epochs=epochs, max_steps=max_steps
        )
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.last_epoch == scheduler.total_steps == trainer.global_step
