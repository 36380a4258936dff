"""All shipped callbacks in one run that gives each of them work, for the tests of their order."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor, nn

from eventtrain import Callback, LightningModule, Trainer, callbacks, events
from tests.kit import new_trainer, numbers, rows

PARALLEL = ("DistributedDataParallel", "FullyShardedDataParallel")
"""A trainer can have one of these two."""

MEASURED = ("time/", "system/")
"""The beginnings of the names of metrics that differ between two equal runs."""


class Model(LightningModule):
    """Has buffers, logs in each way, and has schedules of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"depth": 1})
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        noisy = batch + torch.rand_like(batch)
        loss: Tensor = self.net(noisy).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        by_step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        by_metric = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return [optimizer], [{"scheduler": by_step, "interval": "step"}, {"scheduler": by_metric, "monitor": "val_loss"}]


def shipped(parallel: str, count: Callable[..., Any]) -> dict[str, Any]:
    """Build each shipped callback, so that it acts in the run of :func:`fit`.

    Args:
        parallel: Which of :data:`PARALLEL` is among them. In one process it changes nothing.
        count: The function that LambdaCallback calls after each update.

    Returns:
        The callbacks by the names of their classes, in alphabetical order.
    """
    # At this scale the gradients of the first update overflow.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, backoff_factor=2.0**-10)
    arguments: dict[str, dict[str, Any]] = {
        "EarlyStopping": {"monitor": "val_loss", "patience": 1, "min_delta": 1e6},  # after the second validation
        "EventTimeline": {"steps": {1}},
        "ExponentialMovingAverage": {"decay": 0.5},
        "GradientAccumulation": {"batches": 2},
        "GradientClipping": {"gradient_clip_val": 0.1},
        "GradientNormMonitor": {"per_layer": True, "window": 2},
        "JSONLinesLogger": {"log_every_n_steps": 1},
        "LambdaCallback": {"on_after_update": count},
        "LearningRateMonitor": {"momentum": True, "weight_decay": True},
        "MixedPrecision": {"precision": "fp16", "scaler": scaler},
        "ModelCheckpoint": {"every_n_steps": 2, "monitor": "val_loss", "save_top_k": 2},
        "Preemption": {"signals": ["SIGTERM"]},
        "Profiler": {"every": 2, "first": 1, "layers": True, "log_every_n_steps": 1},
        "SystemMonitor": {"interval": 3600.0},
        "TensorBoardLogger": {"log_every_n_steps": 1, "histograms": 2, "x_axis": "samples"},
        "TerminateOnNaN": {"every_n_batches": 1},
        "Timer": {"max_time": 3600},
        "TorchProfiler": {"wait": 1, "warmup": 1, "active": 1},
    }
    names = [name for name in callbacks.__all__ if name not in PARALLEL or name == parallel]
    return {name: getattr(callbacks, name)(**arguments.get(name, {})) for name in names}


# ------------------------------------------------------------------ a run and its outcome


class Witness(Callback):
    """Records the values that loggers get, without those of :data:`MEASURED`; counts the updates; sends a signal.

    Args:
        interrupts: Whether to send SIGTERM in the second batch of the second epoch.

    Attributes:
        entries: ``(stage, scope, step, metrics)`` of each ``metrics_logged``, as plain numbers.
        updates: How often :meth:`count` was called.
    """

    def __init__(self, interrupts: bool) -> None:
        self.interrupts = interrupts
        self.entries: list[tuple[str, str, int, dict[str, float]]] = []
        self.updates = 0

    def count(self, trainer: Trainer, event: events.AfterUpdate) -> None:
        """Count an update: the function for LambdaCallback."""
        self.updates += 1

    def on_metrics_logged(self, trainer: Trainer, event: events.MetricsLogged) -> None:
        if metrics := repeatable(event.metrics):
            self.entries.append((event.stage, event.scope, event.step, metrics))

    def on_train_batch_start(self, trainer: Trainer, event: events.TrainBatchStart) -> None:
        if self.interrupts and (trainer.current_epoch, trainer.batch_idx) == (1, 1):
            signal.raise_signal(signal.SIGTERM)


def repeatable(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as plain numbers, without those of :data:`MEASURED`."""
    return numbers({name: value for name, value in metrics.items() if not name.startswith(MEASURED)})


def new_trainer_of_all(folder: Path, parallel: str, witness: Witness, order: Random | None = None) -> Trainer:
    """Return a trainer with all shipped callbacks, for three epochs of five batches.

    Args:
        folder: The run's directory.
        parallel: See :func:`shipped`.
        witness: The last callback.
        order: Shuffles the callbacks; None for the alphabetical order.
    """
    attached = list(shipped(parallel, witness.count).values())
    if order is not None:
        order.shuffle(attached)
    return new_trainer(*attached, witness, max_epochs=3, seed=7, default_root_dir=folder, num_sanity_val_steps=1)


def fit(trainer: Trainer) -> None:
    """Train :class:`Model` with a validation at the end of each epoch. EarlyStopping ends the run after the second epoch."""
    trainer.fit(Model(), rows(5, width=2), rows(2, width=2))


def outcome(trainer: Trainer, witness: Witness) -> dict[str, Any]:
    """Return everything that a run produced, without measured values.

    Returns:
        Nested dicts and lists of tensors and plain values: the weights, the counters, the values that went to loggers, the
        latest values, the names of the files, and the contents of checkpoints and of loggers' files.
    """
    folder = Path(trainer.default_root_dir)
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {
        "weights": dict(trainer.module.state_dict()),
        "counters": (trainer.progress, trainer.stop_reason, witness.updates),
        "logged": witness.entries,
        "logged_metrics": repeatable(trainer.logged_metrics),
        "callback_metrics": repeatable(trainer.callback_metrics),
        "progress_bar_metrics": repeatable(trainer.progress_bar_metrics),
        "files": sorted(unstamped(path.as_posix()) for path in files),
        "metrics.jsonl": list(lines(folder / "metrics.jsonl")),
        "TensorBoard": board(folder / "runs/Model/version_0"),
        **{path.name: checkpoint(folder / path) for path in files if path.suffix == ".ckpt"},
    }


def unstamped(path: str) -> str:
    """Return a path without the time of its writing, the host and the process."""
    path = re.sub(r"tfevents\..*", "tfevents", path)
    return re.sub(r"\.\d+\.pt\.trace", ".pt.trace", path)


def checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's content without measured values, and without the lengths of files that hold some."""
    content: dict[str, Any] = torch.load(path, weights_only=True)
    del content["written_at"]
    for name, key in (
        ("JSONLinesLogger(metrics.jsonl)", "position"),
        ("JSONLinesLogger(metrics.jsonl)", "run"),
        ("TensorBoardLogger(runs, None)", "run"),
        ("TensorBoardLogger(runs, None)", "event_files"),
        ("TensorBoardLogger(runs, None)", "seconds"),
        ("Timer", "elapsed"),
    ):
        del content["callbacks"][name][key]
    return dict(without_measured(content))


def without_measured(value: Any) -> Any:
    """Return nested values without the entries of dicts that :data:`MEASURED` names."""
    if isinstance(value, dict):
        entries = {key: without_measured(each) for key, each in value.items()}
        return {key: each for key, each in entries.items() if not str(key).startswith(MEASURED)}
    return [without_measured(each) for each in value] if isinstance(value, (list, tuple)) else value


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of JSONLinesLogger's file that hold other values than measured ones, without those."""
    for line in path.read_text().splitlines():
        record = without_measured(json.loads(line))
        del record["time"]
        if record.keys() - {"stage", "scope", "step", "epoch"}:
            yield record


def board(directory: Path) -> dict[str, Any]:
    """Return the scalars and histograms of TensorBoard's files by tag, with their steps."""
    read = EventAccumulator(str(directory), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    tags = {kind: [tag for tag in read.Tags()[kind] if not tag.startswith(MEASURED)] for kind in ("scalars", "histograms")}
    scalars = {tag: [(point.step, point.value) for point in read.Scalars(tag)] for tag in tags["scalars"]}
    pictures = {tag: [(point.step, point.histogram_value) for point in read.Histograms(tag)] for tag in tags["histograms"]}
    return {"scalars": scalars, "histograms": pictures}
