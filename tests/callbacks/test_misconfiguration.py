"""Arguments of shipped callbacks that are refused, each beside the nearest form that trains."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from eventtrain import Trainer
from eventtrain.callbacks import (
    EarlyStopping,
    ExponentialMovingAverage,
    GradientAccumulation,
    GradientClipping,
    JSONLinesLogger,
    LearningRateMonitor,
    LRSchedulerStepping,
    MixedPrecision,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    TensorBoardLogger,
    Timer,
)
from tests.kit import ModuleOf
from tests.misconfigurations import Case, check_refusal, check_remedy, fit, manual, steps

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def returns_with(callback: Any, value: Callable[[ModuleOf, Tensor], Any]) -> Trainer:
    model = ModuleOf()
    model.training_step = lambda batch, batch_idx: value(model, batch)  # type: ignore[method-assign]
    return fit(model, callback)


def args_of(kind: type) -> list[Any]:
    """Return the arguments that a callback cannot be made without."""
    needed: dict[type, list[Any]] = {EarlyStopping: ["loss"], Timer: [60.0], MixedPrecision: ["bf16"]}
    return needed.get(kind, [])


CASES: dict[str, Case] = {
    # ---------------------------------------------------------------- accumulation
    **{
        f"accumulation of {batches!r}": Case(
            lambda batches=batches: fit(None, GradientAccumulation(batches)),  # type: ignore[misc]
            ("GradientAccumulation", "whole number from 1", re.escape(repr(batches))),
            lambda: fit(None, GradientAccumulation(2)),
        )
        for batches in (0, -1, 1.5, "2", None, True)
    },
    "accumulation by a schedule that does not start at 0": Case(
        lambda: fit(None, GradientAccumulation({4: 2})),
        ("GradientAccumulation", "starts at 4", "Add the key 0"),
        lambda: fit(None, GradientAccumulation({0: 1, 4: 2})),
    ),
    "accumulation by an empty schedule": Case(
        lambda: fit(None, GradientAccumulation({})),
        ("GradientAccumulation", "empty", r"\{0: value\}"),
        lambda: fit(None, GradientAccumulation({0: 2})),
    ),
    "accumulation by a schedule with a value of 0": Case(
        lambda: fit(None, GradientAccumulation({0: 2, 4: 0})),
        ("GradientAccumulation", "whole number from 1", "batches=0"),
        lambda: fit(None, GradientAccumulation({0: 2, 4: 1})),
    ),
    "accumulation by a schedule with a key that is no count": Case(
        lambda: fit(None, GradientAccumulation({0: 2, "4": 1})),  # type: ignore[dict-item]
        ("GradientAccumulation", "key='4'", "whole number from 0"),
        lambda: fit(None, GradientAccumulation({0: 2, 4: 1})),
    ),
    "accumulation by a function that returns 0": Case(
        lambda: fit(None, GradientAccumulation(lambda trainer: 0)),
        ("GradientAccumulation", "whole number from 1", "batches=0"),
        lambda: fit(None, GradientAccumulation(lambda trainer: 2)),
    ),
    "accumulation in an unknown unit": Case(
        lambda: fit(None, GradientAccumulation(2, unit="epochs")),  # type: ignore[arg-type]
        ("GradientAccumulation", "unit='epochs'", "epoch", "step", "batch"),
        lambda: fit(None, GradientAccumulation(2, unit="epoch")),
    ),
    "accumulation with an unknown normalization": Case(
        lambda: fit(None, GradientAccumulation(2, normalize="mean")),  # type: ignore[arg-type]
        ("GradientAccumulation", "normalize='mean'", "window", "fixed"),
        lambda: fit(None, GradientAccumulation(2, normalize="fixed")),
    ),
    "accumulation with an unknown remainder": Case(
        lambda: fit(None, GradientAccumulation(2, remainder="keep")),  # type: ignore[arg-type]
        ("GradientAccumulation", "remainder='keep'", "step", "drop", "carry"),
        lambda: fit(None, GradientAccumulation(2, remainder="carry")),
    ),
    "accumulation that drops whole epochs": Case(
        lambda: fit(None, GradientAccumulation(9, remainder="drop")),
        ("GradientAccumulation", "4 batches", "window 9", "'step' or 'carry'"),
        lambda: fit(None, GradientAccumulation(4, remainder="drop")),
    ),
    "accumulation in manual mode": Case(
        lambda: manual(steps, GradientAccumulation(2)),
        ("GradientAccumulation", "Manual", "manually", r"\(batch_idx \+ 1\) % N == 0"),
        lambda: manual(steps),
    ),
    # ---------------------------------------------------------------- clipping
    **{
        f"clipping by {value!r}": Case(
            lambda value=value: fit(None, GradientClipping(value)),  # type: ignore[misc]
            ("gradient_clip_val", "positive number, or None", re.escape(repr(value))),
            lambda: fit(None, GradientClipping(1.0)),
        )
        for value in (0, 0.0, -1.0, float("nan"), "1.0", True)
    },
    "clipping by a schedule that does not start at 0": Case(
        lambda: fit(None, GradientClipping({5: 2.0})),
        ("GradientClipping", "starts at 5", "Add the key 0"),
        lambda: fit(None, GradientClipping({0: None, 5: 2.0})),
    ),
    "clipping by a function that returns 0": Case(
        lambda: fit(None, GradientClipping(lambda trainer: 0.0)),
        ("gradient_clip_val", "positive number, or None", r"0\.0"),
        lambda: fit(None, GradientClipping(lambda trainer: None)),
    ),
    "an unknown clipping algorithm": Case(
        lambda: fit(None, GradientClipping(1.0, "l2")),
        ("gradient_clip_algorithm", "'norm' or 'value'", "'l2'"),
        lambda: fit(None, GradientClipping(1.0, "norm")),
    ),
    "a norm of order 0": Case(
        lambda: fit(None, GradientClipping(1.0, norm_type=0)),
        ("GradientClipping", "norm_type=0", "number above 0"),
        lambda: fit(None, GradientClipping(1.0, norm_type=float("inf"))),
    ),
    # ---------------------------------------------------------------- precision
    "an unknown precision": Case(
        lambda: fit(None, MixedPrecision("16-mixed")),  # type: ignore[arg-type]
        ("MixedPrecision", "'16-mixed'", "bf16", "fp16"),
        lambda: fit(None, MixedPrecision("fp16")),
    ),
    "a scaler that is none": Case(
        lambda: fit(None, MixedPrecision("fp16", scaler=1024.0)),  # type: ignore[arg-type]
        ("MixedPrecision", "scaler", r"1024\.0", "GradScaler"),
        lambda: fit(None, MixedPrecision("fp16", scaler=GradScaler("cpu", init_scale=1024.0))),
    ),
    "no overflow allowed": Case(
        lambda: fit(None, MixedPrecision("fp16", max_consecutive_overflows=0)),
        ("MixedPrecision", "max_consecutive_overflows=0", "whole number from 1"),
        lambda: fit(None, MixedPrecision("fp16", max_consecutive_overflows=1)),
    ),
    "a scaler for bf16": Case(
        lambda: fit(None, MixedPrecision("bf16", scaler=GradScaler("cpu"))),
        ("MixedPrecision", "'bf16'", "not scaled"),
        lambda: fit(None, MixedPrecision("fp16", scaler=GradScaler("cpu"))),
    ),
    "overflows without end": Case(
        lambda: returns_with(MixedPrecision("fp16", max_consecutive_overflows=2), lambda model, x: model.loss(x / 0)),
        ("2 steps in a row", "bf16", "max_consecutive_overflows"),
        lambda: returns_with(MixedPrecision("fp16"), lambda model, x: model.loss(x)),
    ),
    # ---------------------------------------------------------------- loggers
    "an unknown x-axis": Case(
        lambda: TensorBoardLogger(x_axis="time"),  # type: ignore[arg-type]
        ("TensorBoardLogger", "x_axis='time'", "wall_time"),
        fit,
    ),
    "a cadence of 0": Case(
        lambda: TensorBoardLogger(log_every_n_steps=0), ("TensorBoardLogger", "log_every_n_steps=0", "from 1"), fit
    ),
}


CASES |= {
    # ---------------------------------------------------------------- arguments that others have
    **{
        f"{kind.__name__}({', '.join(arguments)})": Case(
            lambda kind=kind, arguments=arguments: kind(*args_of(kind), **arguments),  # type: ignore[misc]
            (rf"{kind.__name__}\({next(iter(arguments))}=", "there is no such argument", message),
            right,
        )
        for kind, arguments, message, right in (
            (EarlyStopping, {"verbose": True}, r"trainer\.stop_reason", fit),
            (EarlyStopping, {"stopping_threshold": 0.1}, r"EarlyStopping\('val_loss', threshold=0\.1\)", fit),
            (EarlyStopping, {"check_on_train_epoch_end": True}, "Leave it out", fit),
            (EarlyStopping, {"patients": 3}, "Did you mean 'patience'", fit),
            (
                ModelCheckpoint,
                {"every_n_train_steps": 2},
                r"ModelCheckpoint\(every_n_steps=2\)",
                lambda: fit(None, ModelCheckpoint(every_n_steps=2)),
            ),
            (ModelCheckpoint, {"save_weights_only": True}, "load_from_checkpoint", lambda: fit(None, ModelCheckpoint())),
            (ModelCheckpoint, {"period": 1}, r"every_n_epochs=1", lambda: fit(None, ModelCheckpoint(every_n_epochs=1))),
            (
                ModelCheckpoint,
                {"auto_insert_metric_name": False},
                "filename=",
                lambda: fit(None, ModelCheckpoint(filename="{epoch}-{step}")),
            ),
            (ModelCheckpoint, {"verbose": True}, "on_checkpoint_saved", lambda: fit(None, ModelCheckpoint())),
            (LearningRateMonitor, {"logging_interval": "step"}, "log_every_n_steps", lambda: fit(None, LearningRateMonitor())),
            (
                LearningRateMonitor,
                {"log_momentum": True},
                r"LearningRateMonitor\(momentum=True\)",
                lambda: fit(None, LearningRateMonitor(momentum=True)),
            ),
            (
                TensorBoardLogger,
                {"save_dir": "logs"},
                r"TensorBoardLogger\('logs'\)",
                lambda: fit(None, TensorBoardLogger("logs")),
            ),
            (
                TensorBoardLogger,
                {"save_dir": "logs", "version": 3},
                r"\n.*TensorBoardLogger\(name=3\)",
                lambda: fit(None, TensorBoardLogger("logs", name="3")),
            ),
            (
                JSONLinesLogger,
                {"save_dir": "logs"},
                r"JSONLinesLogger\('metrics\.jsonl'\)",
                lambda: fit(None, JSONLinesLogger()),
            ),
            (Timer, {"interval": "step"}, "after each batch", lambda: fit(None, Timer(60.0))),
            (
                GradientAccumulation,
                {"scheduling": {0: 2}},
                r"GradientAccumulation\(\{0: 2\}\)",
                lambda: fit(None, GradientAccumulation({0: 2})),
            ),
            (GradientClipping, {"max_norm": 1.0}, r"GradientClipping\(1\.0\)", lambda: fit(None, GradientClipping(1.0))),
            (ProgressBar, {"refresh_rate": 20}, r"ProgressBar\(interval=0\.1\)", lambda: fit(None, ProgressBar(interval=0.1))),
            (ModelSummary, {"depth": 2}, r"ModelSummary\(max_depth=2\)", lambda: fit(None, ModelSummary(max_depth=2))),
            (
                ExponentialMovingAverage,
                {"swa_lrs": 0.1},
                r"ExponentialMovingAverage\(0\.999\)",
                lambda: fit(None, ExponentialMovingAverage(0.999)),
            ),
            (MixedPrecision, {"dtype": "bfloat16"}, r"MixedPrecision\('bf16'\)", lambda: fit(None, MixedPrecision("bf16"))),
        )
    },
    "nothing to monitor": Case(
        lambda: EarlyStopping(),  # type: ignore[call-arg]
        (r"EarlyStopping\(\): missing a required argument: 'monitor'", "The arguments are monitor, mode"),
        fit,
    ),
    "an interval by position": Case(
        lambda: LearningRateMonitor("step"),  # type: ignore[call-arg, arg-type]
        (r"LearningRateMonitor\('step'\): too many positional arguments", "The arguments are momentum, weight_decay"),
        lambda: fit(None, LearningRateMonitor()),
    ),
    "an argument for a callback that takes none": Case(
        lambda: LRSchedulerStepping(interval="step"),  # type: ignore[call-arg]
        (r"LRSchedulerStepping\(interval='step'\): there is no such argument", "It takes none"),
        lambda: fit(None, LRSchedulerStepping()),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_refusal_names_the_mistake_and_the_remedy(case: str) -> None:
    check_refusal(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_correct_form_trains(case: str) -> None:
    check_remedy(CASES[case])
