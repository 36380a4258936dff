"""Train modules in four processes on a mesh of 2 x 2, in each of them, and save the results, which the tests compare.

``PYTHONPATH=. torchrun --nproc-per-node 4 tests/callbacks/distributed/meshed.py FOLDER [NAME ...]``
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import SumMetric

from eventtrain import LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import (
    ActivationCheckpointing,
    ExponentialMovingAverage,
    GradientAccumulation,
    GradientClipping,
    GradientNormMonitor,
    LRSchedulerStepping,
)
from eventtrain.callbacks.distributed.fully_sharded_data_parallel import FullyShardedDataParallel
from tests.callbacks.distributed.parts import SEED, TIMEOUT, data, loader
from tests.callbacks.distributed.sharded import plain, whole

RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
CHECKS: dict[str, Callable[[Path], Any]] = {}


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    CHECKS[function.__name__] = function
    return function


class Block(nn.Module):
    """A residual block of two layers that tensor parallelism divides between them, and a norm."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 6)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.out(torch.tanh(self.into(self.norm(x)))), self.dropout, self.training)


class Model(LightningModule):
    """A module with weights in blocks, in other layers and directly. Two weights of each block have the same shape."""

    def __init__(self, dropout: float = 0.0, weight: bool = False) -> None:
        super().__init__()
        torch.manual_seed(SEED + RANK)  # all processes have to begin with rank zero's
        self.head = nn.Linear(3, 6)
        self.blocks = nn.ModuleList([Block(dropout), Block(dropout)])
        self.tail = nn.Linear(6, 1)
        self.gain = nn.Parameter(torch.ones(1))
        self.weight, self.total = weight, SumMetric()
        self.seen: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.seen.append(x[:, 0].tolist())
        loss = F.mse_loss(self.out(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
        self.total.update(float(len(x)))
        self.log("total", self.total, on_step=False, on_epoch=True)
        self.log("samples", float(len(x)), on_step=False, on_epoch=True, reduce_fx="sum")
        return {"loss": loss, "weight": float(1 + batch_idx)} if self.weight else loss

    def out(self, x: Tensor) -> Tensor:
        x = self.head(x)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.tail(x)
        return y * self.gain

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val", F.mse_loss(self.out(batch[0]), batch[1]), batch_size=len(batch[0]))
        self.log("val_samples", float(len(batch[0])), reduce_fx="sum")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=50)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


PLAN = {"into": ColwiseParallel(), "out": RowwiseParallel()}


class Layers(FullyShardedDataParallel):
    """Divides the layers of each block along the mesh's last dimension."""

    def shard(self, module: Any, mesh: DeviceMesh | None = None) -> None:
        assert mesh is not None
        for block in module.blocks:
            parallelize_module(block, mesh["tensor"], PLAN)
        super().shard(module, mesh)


def processes_of(kind: str) -> FullyShardedDataParallel:
    options: dict[str, Any] = {"units": (Block,), "timeout": TIMEOUT}
    if WORLD_SIZE != 4:
        return FullyShardedDataParallel(**options)
    if kind == "hybrid":
        return FullyShardedDataParallel(mesh=(2, 2), mesh_dim_names=("replicate", "shard"), **options)
    if kind == "tensor":
        return Layers(mesh=(2, 2), mesh_dim_names=("shard", "tensor"), **options)
    return FullyShardedDataParallel(**options)


def new_trainer(kind: str, *callbacks: Any, processes: Any = None, **options: Any) -> Trainer:
    torch.manual_seed(SEED)
    options = {"max_epochs": 2, "device": "cpu", "num_sanity_val_steps": 0, **options}
    attached = [processes or processes_of(kind), *callbacks, LRSchedulerStepping()]
    return Trainer(callbacks=attached, default_callbacks=False, **options)


def state(module: nn.Module, optimizers: Any = ()) -> dict[str, Any]:
    optimizer_states = whole([each.state_dict() for each in optimizers])
    return {"module": whole(dict(module.state_dict())), "optimizers": optimizer_states}


SHARES = {"hybrid": 4, "tensor": 2}
"""The number of processes that see different batches."""


@check
def trained(folder: Path) -> Any:
    """Train on each mesh, with short windows, clipping, averages, logging and validation."""
    results = {}
    for kind, shares in SHARES.items():
        for weight in (False, True):
            module = Model(weight=weight)
            norms: list[float] = []
            trainer = new_trainer(
                kind, GradientAccumulation(2), GradientClipping(0.5), GradientNormMonitor(), ExponentialMovingAverage(0.9)
            )
            trainer.signals.metrics_logged.connect(
                lambda trainer, event, norms=norms: norms.extend(
                    float(event.metrics["grad_norm"]) for _ in range("grad_norm" in event.metrics)
                ),
                weak=False,
            )
            trainer.fit(module, loader(6 * shares, shuffle=False), loader(8, shuffle=False))
            results[f"{kind} {weight}"] = {
                "ours": state(module, trainer.optimizers),
                "averages": whole(trainer.callback(ExponentialMovingAverage).averages),
                "metrics": plain(trainer.callback_metrics),
                "norms": norms,
                "seen": module.seen,
                "share": (trainer.processes.data.global_rank, trainer.processes.data.world_size),
                "replicated": whole({name: local(each) for name, each in module.named_parameters() if "head" in name}),
            }
    return results


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def by_hand(shares: int, weight: bool) -> dict[str, Any]:
    """Train in one process over the samples of all, as the callbacks do it in several."""
    torch.manual_seed(SEED)
    module = Model()
    averages = {name: each.detach().clone() for name, each in module.named_parameters()}
    (optimizer,), (config,) = module.configure_optimizers()
    xs, ys = data(6 * shares).tensors
    norms: list[float] = []
    losses: list[float] = []
    first = True
    for _ in range(2):
        losses.clear()
        for index in range(3):
            if index % 2 == 0:
                optimizer.zero_grad()
            of_window = (0, 1) if index < 2 else (2,)
            weights = {each: float(1 + each) if weight else 1.0 for each in of_window}
            total = sum(weights.values())
            for rank in range(shares):
                rows = torch.arange(rank, 6 * shares, shares)[2 * index : 2 * index + 2]
                loss = F.mse_loss(module.out(xs[rows]), ys[rows])
                losses.append(float(loss.detach()))
                torch.autograd.backward(loss * weights[index] / total / shares)
            if index == of_window[-1]:
                norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)))
                optimizer.step()
                config["scheduler"].step()
                for name, each in module.named_parameters():
                    averages[name] = each.detach().clone() if first else averages[name].lerp(each.detach(), 0.1)
                first = False
    return {
        "ours": state(module, [optimizer]),
        "averages": averages,
        "norms": norms,
        "loss": sum(losses) / len(losses),
        "val": float(F.mse_loss(averaged(averages).out(data(8).tensors[0]), data(8).tensors[1]).detach()),
    }


def averaged(weights: dict[str, Tensor]) -> Model:
    module = Model().eval()
    module.load_state_dict(weights)
    return module


# ------------------------------------------------------------------ checkpoints


POINTS = (0, 1, 2, 4)
"""Batches after which runs are resumed, of three in an epoch: in a window, between two, and at the end of an epoch."""


def resumable(kind: str, root: Path, max_epochs: int = 2, *more: Any) -> tuple[Model, Trainer, DataLoader[Any]]:
    shares = SHARES.get(kind, 4)
    callbacks = GradientAccumulation(2), GradientClipping(0.5), ExponentialMovingAverage(0.9)
    module = Model(dropout=0.2)
    trainer = new_trainer(kind, *callbacks, *more, max_epochs=max_epochs, default_root_dir=root)  # seeds the dropout
    return module, trainer, loader(6 * shares)


def outcome(module: Model, trainer: Trainer) -> Any:
    return {**state(module, trainer.optimizers), "averages": whole(trainer.callback(ExponentialMovingAverage).averages)}


@check
def resumed(folder: Path) -> Any:
    """Resume runs with dropout on each mesh, from several batches."""
    results = {}
    for kind in SHARES:
        module, trainer, batches = resumable(kind, folder / kind)

        def save(trainer: Any, event: Any, kind: str = kind) -> None:
            trainer.save_checkpoint(folder / kind / f"{trainer.total_batch_idx}.ckpt")
            if trainer.total_batch_idx == 2:
                torch.save(outcome(trainer.module, trainer), folder / kind / f"epoch-{RANK}.pt")

        trainer.signals.safe_point.connect(save)
        trainer.fit(module, batches)
        undisturbed, resumptions = outcome(module, trainer), []
        for point in POINTS:
            module, trainer, batches = resumable(kind, folder / kind)
            torch.manual_seed(99)
            trainer.fit(module, batches, ckpt_path=folder / kind / f"{point}.ckpt")
            resumptions.append(outcome(module, trainer))
        recomputed = []
        for path in (None, folder / kind / "0.ckpt"):
            module, trainer, batches = resumable(kind, folder / kind, 2, ActivationCheckpointing([Block]))
            trainer.fit(module, batches, ckpt_path=path)
            recomputed.append(outcome(module, trainer))
        results[kind] = {"undisturbed": undisturbed, "resumed": resumptions, "recomputed": recomputed}
    return results


@check
def exchanged(folder: Path) -> Any:
    """Resume a run of each mesh on the other: at the end of an epoch, and in a window, which is an error."""
    results: dict[str, Any] = {}
    for kind, other in (("hybrid", "tensor"), ("tensor", "hybrid"), ("tensor", "flat")):
        module, trainer, batches = resumable(other, folder / other, max_epochs=1)
        trainer.fit(module, batches, ckpt_path=folder / kind / "2.ckpt")
        results[f"{kind} to {other}"] = outcome(module, trainer)
        module, trainer, batches = resumable(other, folder / other)
        results[f"{kind} to {other}, in a window"] = refusal(trainer, module, batches, ckpt_path=folder / kind / "0.ckpt")
    return results


def refusal(trainer: Trainer, module: Any, batches: Any, **options: Any) -> str | None:
    try:
        trainer.fit(module, batches, **options)
    except MisconfigurationError as error:
        return str(error)
    return None


# ------------------------------------------------------------------ partial gradients


class InParts(LightningModule):
    """A module whose norm sees half of the samples in each process of a group, so that its gradients are summands."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.norm, self.into, self.out = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        y: Any = self.out(torch.tanh(self.into(self.norm(batch))))
        return y.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class DividedSamples(FullyShardedDataParallel):
    """Divides samples in the norm, and layers elsewhere."""

    def shard(self, module: Any, mesh: DeviceMesh | None = None) -> None:
        assert mesh is not None
        plan = {
            "norm": SequenceParallel(sequence_dim=0),
            "into": ColwiseParallel(input_layouts=Shard(0)),
            "out": RowwiseParallel(),
        }
        parallelize_module(module, mesh["tensor"], plan)
        super().shard(module, mesh)


@check
def in_parts(folder: Path) -> Any:
    ends = []
    xs = torch.randn(4, 2, 6, 4, generator=torch.Generator().manual_seed(1))  # by batch and share
    for point in (None, 0, 1):
        module = InParts()
        processes = DividedSamples(
            units=(), mesh=(2, 2), mesh_dim_names=("shard", "tensor"), shares_data=False, timeout=TIMEOUT
        )
        trainer = new_trainer("tensor", GradientAccumulation(4), processes=processes, max_epochs=1, default_root_dir=folder)

        def save(trainer: Any, event: Any) -> None:
            trainer.save_checkpoint(folder / f"parts-{trainer.total_batch_idx}.ckpt")

        if point is None:
            trainer.signals.safe_point.connect(save)
        path = None if point is None else folder / f"parts-{point}.ckpt"
        trainer.fit(module, list(xs[:, RANK // 2]), ckpt_path=path)
        ends.append(state(module)["module"])
    alone = InParts()
    optimizer = alone.configure_optimizers()
    for batches in xs:
        for batch in batches:
            (alone.training_step(batch, 0) / 8).backward()
    optimizer.step()
    return {"ends": ends, "by hand": state(alone)["module"]}


# ------------------------------------------------------------------ refusals


@check
def refused(folder: Path) -> Any:
    """Runs that would train wrongly, or not at all; all processes have to raise."""
    on_mesh: dict[str, Any] = {"mesh": (2, 2), "mesh_dim_names": ("shard", "tensor"), "units": (Block,), "timeout": TIMEOUT}

    class Unfinished(FullyShardedDataParallel):
        def shard(self, module: Any) -> None:  # type: ignore[override]
            fully_shard(module.head, mesh=self.mesh)

    class Seeded(Model):
        def on_fit_start(self) -> None:
            torch.manual_seed(self.global_rank)

    own_batches = [[torch.full((2, 3), float(RANK)), torch.ones(2, 1)]]
    return {
        "same work": refusal(new_trainer("", processes=FullyShardedDataParallel(**on_mesh)), Model(), loader()),
        "sizes": refusal(new_trainer("", processes=FullyShardedDataParallel(mesh=(3,))), Model(), loader()),
        "unfinished": refusal(new_trainer("", processes=Unfinished(timeout=TIMEOUT)), Model(), loader()),
        "batches": refusal(new_trainer("", processes=Layers(shares_data=False, **on_mesh)), Model(), own_batches),
        "random": refusal(new_trainer("", processes=Layers(**on_mesh)), Seeded(), loader()),
    }


@check
def old_override(folder: Path) -> Any:
    """Shard by an override that takes no mesh, and by a mesh that exists already."""

    class Old(FullyShardedDataParallel):
        def shard(self, module: Any) -> None:  # type: ignore[override]
            super().shard(module)

    ends = []
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    for processes in (Old(units=(Block,), timeout=TIMEOUT), FullyShardedDataParallel(mesh=mesh, timeout=TIMEOUT)):
        module = Model()
        new_trainer("", processes=processes).fit(module, loader(24))
        ends.append((state(module)["module"], cast(DTensor, module.head.weight).placements))
    return ends


# ------------------------------------------------------------------ in another number of processes


def elsewhere(folder: Path) -> Any:
    """Resume, in another number of processes, the runs of four at the end of an epoch; and train on."""
    results: dict[str, Any] = {}
    for kind in SHARES:
        for epochs in (1, 2):
            module, trainer, batches = resumable("flat", folder / kind, epochs)
            trainer.fit(module, batches, ckpt_path=folder / kind / "2.ckpt")
            results[f"{kind} {epochs}"] = outcome(module, trainer)
    return results


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    results = {name: globals()[name](folder) for name in names or CHECKS}
    torch.save(results, folder / f"{dist.get_rank() if dist.is_initialized() else 'single'}.pt")


if __name__ == "__main__":
    main()
