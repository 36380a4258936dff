"""Every way of optimizing, stopped at each of its safe points and resumed, ends with the bits of a run that went through.

And a run stopped at a random batch, of a random configuration.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import BinaryF1Score, BinaryPrecision, BinaryRecall

from eventtrain import Callback, LightningDataModule, LightningModule, Trainer
from eventtrain.callbacks import (
    EarlyStopping,
    ExponentialMovingAverage,
    GradientAccumulation,
    GradientClipping,
    GradientNormMonitor,
    JSONLinesLogger,
    LearningRateMonitor,
    LRSchedulerStepping,
    MixedPrecision,
    ModelCheckpoint,
    TerminateOnNaN,
)
from tests.kit import new_trainer
from tests.resuming import KeepAll, Model, Record, assert_same, assert_same_run, check_all_safe_points, draws, run

BATCHES = list(torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0)))


def shuffled() -> DataLoader[Any]:
    return DataLoader(torch.cat(BATCHES), batch_size=4, shuffle=True)  # type: ignore[arg-type]


def check(tmp_path: Path, module: Callable[[], Any], *callbacks: Callable[[], Any], every: int = 1, **options: Any) -> int:
    """Check all safe points of three epochs of a module, with callbacks that are built anew for each run."""

    def build() -> Any:
        arguments = {"max_epochs": 3, "val_check_interval": 3, **options}
        return module(), shuffled(), BATCHES[:2], [build() for build in callbacks], arguments

    return check_all_safe_points(build, tmp_path, every=every)


# ------------------------------------------------------------------ automatic optimization


@pytest.mark.parametrize("remainder", ["step", "drop", "carry"])
@pytest.mark.parametrize("normalize", ["window", "fixed"])
def test_windows_and_their_remainders(tmp_path: Path, remainder: Any, normalize: Any) -> None:
    check(tmp_path, Model, lambda: GradientAccumulation(3, remainder=remainder, normalize=normalize), LRSchedulerStepping)


def test_a_schedule_of_windows(tmp_path: Path) -> None:
    check(tmp_path, Model, lambda: GradientAccumulation({0: 1, 4: 3, 8: 2}, unit="batch"), LRSchedulerStepping)


class Weighted(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "weight": batch[:, 0].abs().sum() + batch_idx}


def test_weighted_windows(tmp_path: Path) -> None:
    check(tmp_path, Weighted, lambda: GradientAccumulation(3, remainder="carry"), LRSchedulerStepping)


@pytest.mark.parametrize("overflows", [False, True], ids=["scale kept", "overflowing"])
def test_loss_scaling_within_a_window(tmp_path: Path, overflows: bool) -> None:
    scale = 2.0**126 if overflows else 2.0**10

    def precision() -> MixedPrecision:
        return MixedPrecision("fp16", scaler=torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2))

    check(
        tmp_path,
        Model,
        lambda: GradientAccumulation(2),
        precision,
        lambda: GradientClipping(0.5),
        LRSchedulerStepping,
        max_epochs=4,
    )


def test_bf16(tmp_path: Path) -> None:
    check(tmp_path, Model, lambda: MixedPrecision("bf16"), LRSchedulerStepping, every=2)


class Quasi(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def test_an_optimizer_that_evaluates_its_closure_often(tmp_path: Path) -> None:
    check(tmp_path, Quasi, LRSchedulerStepping, every=2)


class Skipping(Callback):
    """Skips a batch and ends an epoch early."""

    def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
        if event.batch_idx == 1:
            event.skip_batch()
        if event.batch_idx == 4 and trainer.current_epoch == 0:
            event.end_epoch()

    def on_train_batch_end(self, trainer: Trainer, event: Any) -> None:
        if trainer.current_epoch == 1 and event.batch_idx == 2:
            trainer.end_epoch("a test")


@pytest.mark.filterwarnings("ignore:.*accumulat")
def test_skipped_batches_and_short_epochs(tmp_path: Path) -> None:
    check(tmp_path, Model, lambda: GradientAccumulation(2), Skipping, LRSchedulerStepping)


def test_everything_that_keeps_state(tmp_path: Path) -> None:
    def stopping() -> EarlyStopping:
        return EarlyStopping("val", patience=2, min_delta=10.0)

    callbacks = [lambda: GradientAccumulation(2), lambda: ExponentialMovingAverage(0.9), stopping, TerminateOnNaN]
    assert check(tmp_path, Model, *callbacks, LRSchedulerStepping, GradientNormMonitor, LearningRateMonitor, max_epochs=9) < 20


# ------------------------------------------------------------------ manual optimization


class GAN(LightningModule):
    """Two optimizers, toggled; the generator's gradients are accumulated over two batches."""

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulate = accumulate
        generator = torch.Generator().manual_seed(0)
        self.generator, self.discriminator = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        noise = torch.randn(len(batch), 2)
        with first.toggle_model(sync_grad=(batch_idx + 1) % self.accumulate == 0):
            loss = -self.discriminator(self.generator(noise)).mean() / self.accumulate
            self.log("g", loss, on_step=True, on_epoch=True)
            self.manual_backward(loss)
            if (batch_idx + 1) % self.accumulate == 0:
                first.step()
                first.zero_grad()
        self.toggle_optimizer(second)
        second.zero_grad()
        loss = (self.discriminator(batch) - self.discriminator(self.generator(noise).detach())).pow(2).mean()
        self.log("d", loss)
        self.manual_backward(loss)
        self.clip_gradients(second, 1.0, "norm")
        second.step()
        self.untoggle_optimizer(second)
        self.lr_schedulers()[1].step()
        if self.trainer.is_last_batch:
            self.lr_schedulers()[0].step()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.discriminator(batch).mean())

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.generator, self.discriminator)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(each, 2, 0.7) for each in optimizers]


# If the first steps overflow, the module steps its schedule before its optimizer.
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
def test_manual_optimization(tmp_path: Path, accumulate: int, fp16: bool) -> None:
    precision = [lambda: MixedPrecision("fp16", scaler=torch.amp.GradScaler("cpu", growth_interval=3))] if fp16 else []
    check(tmp_path, lambda: GAN(accumulate), *precision)


def test_a_run_without_optimizers(tmp_path: Path) -> None:
    class Counts(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.sum: Tensor
            self.register_buffer("sum", torch.zeros(3))

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.sum += batch.sum(0) + torch.rand(3)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val", self.sum.sum())

        def configure_optimizers(self) -> None:
            return None

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*configure_optimizers")
        check(tmp_path, Counts)


# ------------------------------------------------------------------ metrics, data modules


class Measured(Model):
    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()
        # Precision and recall are one group, whose common state is computed once.
        self.scores = MetricCollection([BinaryPrecision(), BinaryRecall(), BinaryF1Score()], prefix="train/")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.mean(loss.detach())
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        output = self.net(batch).squeeze(1).sigmoid().detach()
        self.scores.update(output, (batch[:, 0] > 0).int())
        self.log_dict(self.scores, on_step=False, on_epoch=True)
        return loss


def test_metric_objects(tmp_path: Path) -> None:
    check(tmp_path, Measured, LRSchedulerStepping)


class Data(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.used = 0

    def train_dataloader(self) -> Any:
        return DataLoader(torch.cat(BATCHES), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(2))  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return [DataLoader(torch.cat(BATCHES), batch_size=5, shuffle=True), DataLoader(torch.cat(BATCHES), 9)]  # type: ignore[arg-type]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert self.trainer is not None
        self.used += self.trainer.training
        return batch + 0.01 * self.used

    def state_dict(self) -> dict[str, Any]:
        return {"used": self.used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.used = state["used"]


class TwoLoaders(Model):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


def test_a_data_module_and_several_validation_loaders(tmp_path: Path) -> None:
    def build() -> Any:
        arguments = {"max_epochs": 2, "val_check_interval": 2, "datamodule": Data()}
        return TwoLoaders(), None, None, [LRSchedulerStepping()], arguments

    check_all_safe_points(build, tmp_path)


# ------------------------------------------------------------------ validations that are interrupted


class Interrupts(Callback):
    """Stops the run at once in a batch of one of its validations, and keeps a checkpoint at the safe point after it."""

    def __init__(self, validation: int, path: Path) -> None:
        self.validation, self.path = validation, path

    def on_validation_batch_end(self, trainer: Trainer, event: Any) -> None:
        if not trainer.sanity_checking and trainer.progress.validations == self.validation and event.batch_idx == 1:
            trainer.stop("a test", at_once=True)

    def on_safe_point(self, trainer: Trainer, event: Any) -> None:
        if trainer.should_stop:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("options", "validations"),
    [
        ({"val_check_interval": 2}, 6),  # within an epoch
        ({}, 3),  # at its end
        ({"max_steps": 4}, 2),  # at the end of the run
        ({"val_check_interval": 4, "check_val_every_n_epoch": None}, 3),
    ],
    ids=["within", "at the end", "at the last step", "across epochs"],
)
def test_an_interrupted_validation_runs_again(tmp_path: Path, options: Any, validations: int) -> None:
    def build() -> Any:
        callbacks = [
            GradientAccumulation(2),
            ExponentialMovingAverage(0.5),
            EarlyStopping("val", patience=99),
            LRSchedulerStepping(),
        ]
        return Model(), shuffled(), DataLoader(torch.cat(BATCHES), 4, shuffle=True), callbacks, {"max_epochs": 3, **options}  # type: ignore[arg-type]

    record = Record()
    straight = run(build, record)
    after = draws()
    assert straight.progress.validations == validations
    for validation in range(validations):
        path = tmp_path / f"{validation}.ckpt"
        first, second = Record(), Record()
        interrupted = run(build, first, Interrupts(validation, path))
        assert interrupted.progress.validations == validation
        assert all(stage != "validation" or scope == "epoch" for stage, scope, *_ in first.logged)
        resumed = run(build, second, ckpt_path=path)
        assert_same(draws(), after, f"validation {validation}: generators")
        assert_same_run(resumed, straight, f"validation {validation}")
        validated = [line for line in record.logged if line[0] == "validation"]
        assert [line for line in first.logged + second.logged if line[0] == "validation"] == validated


def test_a_checkpoint_after_an_error_within_an_epoch(tmp_path: Path) -> None:
    """The state after an error in a batch is no safe point, but users may want to look at it."""

    class Fails(Callback):
        def on_before_backward(self, trainer: Trainer, event: Any) -> None:
            if trainer.total_batch_idx == 7:
                raise RuntimeError("a bug")

    trainer = new_trainer(Fails(), LRSchedulerStepping(), max_epochs=2)
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.fit(Plain(), shuffled())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert torch.load(tmp_path / "after.ckpt", weights_only=True)["data"]["passes"] == {"train/0": 1}


# ------------------------------------------------------------------ other versions


@pytest.mark.parametrize("schema", [1, 2])
def test_a_checkpoint_of_an_earlier_schema(schema: int, tmp_path: Path) -> None:
    """The first held enough for a resume at an epoch's end, if nothing is random."""

    def build() -> Any:
        return Plain(), BATCHES, None, [GradientAccumulation(2), LRSchedulerStepping()], {"max_epochs": 3}

    keep = KeepAll(tmp_path, Record())
    straight = run(build, keep)
    content = torch.load(keep.kept[9][0], weights_only=True)  # the second epoch's end
    first_schema = {
        "schema_version": 1,
        "eventtrain_version": "0.1.0",
        "progress": {name: value for name, value in content["progress"].items() if name != "validated_at"},
        "weight_reference": content["window"]["weight_reference"],
        **{name: content[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")},
        **{name: content[name] for name in ("hyper_parameters", "callbacks", "datamodule")},
    }
    later = ("requires_grad", "training", "classes", "parameter_groups", "sequence", "ranks", "epoch_reason", "stop_reason")
    second_schema = {name: value for name, value in content.items() if name not in later} | {"schema_version": 2}
    torch.save(first_schema if schema == 1 else second_schema, tmp_path / "old.ckpt")
    resumed = run(build, ckpt_path=tmp_path / "old.ckpt")
    for mine, expected in zip(resumed.module.parameters(), straight.module.parameters(), strict=True):
        assert torch.equal(mine, expected)
    assert resumed.progress.global_step == straight.progress.global_step


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).pow(2).mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


# ------------------------------------------------------------------ any configuration, any batch


class StopsAt(Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_safe_point(self, trainer: Trainer, event: Any) -> None:
        if trainer.progress.total_batch_idx == self.batch:
            trainer.keep_checkpoint("a test")
            trainer.stop("a test", force=True)


CONFIGURATIONS = st.fixed_dictionaries(
    {
        "accumulate": st.integers(1, 3),
        "remainder": st.sampled_from(["step", "drop", "carry"]),
        "precision": st.sampled_from([None, "bf16", "fp16"]),
        "average": st.booleans(),
        "clip": st.booleans(),
        "stopping": st.booleans(),
        "weighted": st.booleans(),
        "batch_size": st.integers(2, 6),
        "shuffle": st.booleans(),
        "drop_last": st.booleans(),
        "in_background": st.booleans(),
        "val_check_interval": st.sampled_from([None, 2, 0.5]),
        "limit_train_batches": st.sampled_from([1.0, 3]),
        "max_steps": st.sampled_from([None, 5]),
    }
)


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(CONFIGURATIONS, st.integers(0, 20), st.integers(0, 20))
def test_property_stop_and_resume_equal_a_run_that_went_through(drawn: dict[str, Any], first: int, second: int) -> None:
    """Stopped twice."""
    with tempfile.TemporaryDirectory() as folder:
        check_stops(drawn, sorted((first, second)), Path(folder))


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(CONFIGURATIONS, st.integers(0, 20), st.integers(0, 20))
def test_property_many_configurations(drawn: dict[str, Any], first: int, second: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_stops(drawn, sorted((first, second)), Path(folder))


def check_stops(drawn: dict[str, Any], stops: list[int], folder: Path) -> None:
    """Compares a run that is stopped after batches of these numbers, and resumed, with one that is not."""

    def build(root: Path) -> Any:
        callbacks: list[Any] = [
            GradientAccumulation(drawn["accumulate"], remainder=drawn["remainder"]),
            LRSchedulerStepping(),
            JSONLinesLogger(log_every_n_steps=1),
            ModelCheckpoint(monitor="val", in_background=drawn["in_background"]),
        ]
        if drawn["precision"]:
            callbacks.append(MixedPrecision(drawn["precision"]))
        if drawn["average"]:
            callbacks.append(ExponentialMovingAverage(0.8))
        if drawn["clip"]:
            callbacks.append(GradientClipping(0.5))
        if drawn["stopping"]:
            callbacks.append(EarlyStopping("val", patience=2, min_delta=0.05))
        data = torch.randn(20, 3, generator=torch.Generator().manual_seed(4))
        loader: DataLoader[Any] = DataLoader(data, drawn["batch_size"], shuffle=drawn["shuffle"], drop_last=drawn["drop_last"])  # type: ignore[arg-type]
        options = {name: drawn[name] for name in ("val_check_interval", "limit_train_batches", "max_steps")}
        arguments = {"max_epochs": 3, "default_root_dir": root, **options}
        return (Weighted() if drawn["weighted"] else Model()), loader, BATCHES[:2], callbacks, arguments

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*val_check_interval")
        straight = run(lambda: build(folder / "straight"))
        after = draws()
        resumed: Trainer | None = None
        for stop in [*stops, None]:
            more = [] if stop is None else [StopsAt(stop)]
            resumed = run(lambda: build(folder / "stopped"), *more, ckpt_path=None if resumed is None else "last")
    assert resumed is not None
    assert_same_run(resumed, straight, str(drawn))
    assert torch.equal(draws()[0], after[0])
    lines = [(folder / name / "metrics.jsonl").read_text().splitlines() for name in ("straight", "stopped")]
    assert [line.partition(", ")[2] for line in lines[0]] == [line.partition(", ")[2] for line in lines[1]]
