"""Train sharded modules, in each of several processes, and save the results, which the tests compare.

``PYTHONPATH=. torchrun --nproc-per-node 2 tests/callbacks/distributed/sharded.py FOLDER [NAME ...]``
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from eventtrain import LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import (
    ExponentialMovingAverage,
    GradientAccumulation,
    GradientClipping,
    GradientNormMonitor,
    LRSchedulerStepping,
    MixedPrecision,
    ModelCheckpoint,
)
from eventtrain.callbacks.distributed.distributed_data_parallel import DistributedDataParallel
from eventtrain.callbacks.distributed.fully_sharded_data_parallel import FullyShardedDataParallel
from tests.callbacks.distributed.parts import SEED, TIMEOUT, data, loader, train_own_steps

RANK = int(os.environ.get("RANK", "0"))
CHECKS: dict[str, Callable[[Path], Any]] = {}


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    CHECKS[function.__name__] = function
    return function


class Block(nn.Module):
    """A residual block. The number of processes does not divide its width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(7), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(torch.tanh(self.linear(self.norm(x))), 0.2, self.training)


class Model(LightningModule):
    """A module with weights in blocks, in other layers and directly; with a buffer and a schedule, but without a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(SEED + RANK)  # all processes have to begin with rank zero's
        self.head = nn.Linear(3, 7)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.tail = nn.Linear(7, 1)
        self.gain = nn.Parameter(torch.ones(1))
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.seen += len(x)
        loss = F.mse_loss(self.out(x), y)
        self.log("loss", loss, on_epoch=True, batch_size=len(x))
        return loss

    def out(self, x: Tensor) -> Tensor:
        x = self.head(x)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.tail(x)
        return y * self.gain

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val", F.mse_loss(self.out(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.out(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=50)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def new_trainer(*callbacks: Any, processes: Any = None, **options: Any) -> Trainer:
    torch.manual_seed(SEED)
    if not any(isinstance(each, FullyShardedDataParallel) for each in callbacks):
        callbacks = (processes or FullyShardedDataParallel(units=(Block,), timeout=TIMEOUT), *callbacks)
    options = {"max_epochs": 2, "device": "cpu", "num_sanity_val_steps": 0, **options}
    return Trainer(callbacks=[*callbacks, LRSchedulerStepping()], default_callbacks=False, **options)


def whole(value: Any) -> Any:
    """Return a copy of nested values with whole tensors."""
    if isinstance(value, DTensor):
        return value.full_tensor().clone()
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, (list, tuple)) else copy.deepcopy(value)


def state(module: nn.Module, optimizers: Any = ()) -> dict[str, Any]:
    """Return a copy of the weights, buffers and optimizer states, with whole tensors."""
    optimizer_states = whole([each.state_dict() for each in optimizers])
    return {"module": whole(dict(module.state_dict())), "optimizers": optimizer_states}


def sharded_by_hand(module: nn.Module, units: list[nn.Module]) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for tensor in [*module.parameters(), *module.buffers()]:
        dist.broadcast(tensor.detach(), 0)
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


class Stepping(nn.Module):
    """A module whose forward is the model's, because ``fully_shard`` only knows forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def forward(self, x: Tensor) -> Tensor:
        return self.model.out(x)


class Calls:
    """A context that counts calls of an exchange: reduce-scatter, or all-gather."""

    def __init__(self, exchange: str = "reduce_scatter") -> None:
        self.name = f"{exchange}_single"
        self.count = 0
        self.original = getattr(dist, self.name)

    def __enter__(self) -> Calls:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return self.original(*args, **kwargs)

        setattr(dist, self.name, counted)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(dist, self.name, self.original)


@check
def automatic(folder: Path) -> Any:
    norms: list[Any] = []
    module = Model()
    trainer = new_trainer(GradientAccumulation(3), GradientClipping(0.5), GradientNormMonitor(per_layer=True), max_epochs=3)
    trainer.signals.metrics_logged.connect(
        lambda trainer, event: norms.append({k: float(v) for k, v in event.metrics.items()}), weak=False
    )
    with Calls() as scatters:
        trainer.fit(module, loader(samples=19))
    ours = state(module, trainer.optimizers)

    torch.manual_seed(SEED)
    forward = Stepping()
    model = forward.model
    by_hand: Any = sharded_by_hand(forward, [*model.blocks])
    torch.manual_seed(SEED)
    sampler: DistributedSampler[Any] = DistributedSampler(data(19), shuffle=True, seed=SEED)
    batches = DataLoader(data(19), 2, sampler=sampler)
    (optimizer,), (config,) = model.configure_optimizers()
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for index, (x, y) in enumerate(batches):
            opens, closes = index % 3 == 0, index % 3 == 2 or index == len(batches) - 1
            by_hand.set_requires_gradient_sync(closes)
            model.seen += len(x)
            loss = F.mse_loss(by_hand(x), y)
            if opens:
                optimizer.zero_grad()
            torch.autograd.backward(loss / 3)
            if closes:
                if index % 3 != 2:
                    for parameter in model.parameters():
                        assert parameter.grad is not None
                        parameter.grad.mul_(3 / (index % 3 + 1))
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                assert isinstance(norm, DTensor)
                expected.append(float(norm.full_tensor()))
                optimizer.step()
                config["scheduler"].step()
    parts = sum(parameter.to_local().numel() for parameter in module.parameters() if isinstance(parameter, DTensor))
    return {
        "ours": ours,
        "by hand": state(model, [optimizer]),
        "scatters": scatters.count,
        "updates": trainer.global_step,
        "norms": [each["grad_norm"] for each in norms if "grad_norm" in each],
        "layers": [each for each in norms if "grad_norm" in each],
        "expected norms": expected,
        "numbers": (parts, sum(parameter.numel() for parameter in module.parameters())),
    }


# ------------------------------------------------------------------ manual optimization


class Gan(LightningModule):
    """A module with two optimizers. Its parts are called directly: twice before a backward, and for two backwards a batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED + RANK)
        self.generator = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
        self.critic = nn.Linear(3, 1)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, _ = batch
        for_generator, for_critic = self.optimizers()
        self.toggle_optimizer(for_critic)
        for_critic.zero_grad()
        self.manual_backward(self.critic_loss(real))
        for_critic.step()
        self.untoggle_optimizer(for_critic)
        self.toggle_optimizer(for_generator)
        if batch_idx % 2 == 0:  # gradients of two batches
            for_generator.zero_grad()
        self.manual_backward(self.generator_loss(real))
        if batch_idx % 2 == 1:
            self.clip_gradients(for_generator, 0.1)
            for_generator.step()
        self.untoggle_optimizer(for_generator)

    def critic_loss(self, real: Tensor) -> Tensor:
        fake = self.generator(torch.randn(len(real), 3))
        return F.softplus(self.critic(fake.detach()) - self.critic(real).mean()).mean()

    def generator_loss(self, real: Tensor) -> Tensor:
        return F.softplus(-self.critic(self.generator(torch.randn(len(real), 3)))).mean()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(part.parameters(), lr=0.05) for part in (self.generator, self.critic)]


@check
def manual(folder: Path) -> Any:
    module = Gan()
    trainer = new_trainer(processes=FullyShardedDataParallel(timeout=TIMEOUT))
    trainer.fit(module, loader())
    ours = state(module, trainer.optimizers)

    # Not sharded: gradients are averaged by hand.
    module = Gan()
    for parameter in module.parameters():
        dist.broadcast(parameter.detach(), 0)
    torch.manual_seed(SEED)
    sampler: DistributedSampler[Any] = DistributedSampler(data(), shuffle=True, seed=SEED)
    batches = DataLoader(data(), 2, sampler=sampler)
    for_generator, for_critic = optimizers = module.configure_optimizers()

    def backward(loss: Tensor, part: nn.Module) -> None:
        parameters = list(part.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            dist.all_reduce(gradient)
            parameter.grad = gradient / 2 if parameter.grad is None else parameter.grad + gradient / 2

    for epoch in range(2):
        sampler.set_epoch(epoch)
        for index, (real, _) in enumerate(batches):
            for_critic.zero_grad()
            backward(module.critic_loss(real), module.critic)
            for_critic.step()
            if index % 2 == 0:
                for_generator.zero_grad()
            backward(module.generator_loss(real), module.generator)
            if index % 2 == 1:
                torch.nn.utils.clip_grad_norm_(module.generator.parameters(), 0.1)
                for_generator.step()
    return {"ours": ours, "by hand": state(module, optimizers)}


# ------------------------------------------------------------------ checkpoints


class Finetuned(Model):
    """Trains its last block from the second epoch on, in a parameter group of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.blocks[1].requires_grad_(True)
            self.optimizers().add_param_group({"params": self.blocks[1].parameters(), "lr": 0.001})

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([parameter for parameter in self.parameters() if parameter.requires_grad], lr=0.01)


def resumable(kind: str, root: Path, max_epochs: int = 2) -> tuple[Any, Trainer, Any]:
    """Return a module, a trainer for epochs of five batches, and their loader."""
    arguments: dict[str, Any] = {"max_epochs": max_epochs, "default_root_dir": root}
    if kind == "manual":
        trainer = new_trainer(processes=FullyShardedDataParallel(timeout=TIMEOUT), **arguments)
        return Gan(), trainer, loader(20)
    options: dict[str, Any] = {}
    if kind == "mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    processes = FullyShardedDataParallel(units=(Block,), timeout=TIMEOUT, **options)
    averages = ExponentialMovingAverage(0.9)
    trainer = new_trainer(GradientAccumulation(3), GradientClipping(0.5), averages, processes=processes, **arguments)
    return Finetuned() if kind == "finetuned" else Model(), trainer, loader(20)


def outcome(module: Any, trainer: Trainer) -> Any:
    averages = [each.averages for each in trainer.callbacks if isinstance(each, ExponentialMovingAverage)]
    return {**state(module, trainer.optimizers), "averages": whole(averages)}


POINTS: dict[str, Any] = {"automatic": (0, 4, 6), "mixed": (1,), "manual": (4,), "finetuned": (6,)}
"""The batches after which a run is resumed: in a window, and at the end of an epoch."""


@check
def resumed(folder: Path, points_of: dict[str, Any] = POINTS) -> Any:
    results = {}
    for kind, points in points_of.items():
        written: list[Path] = []
        module, trainer, batches = resumable(kind, folder / kind)

        def save(trainer: Any, event: Any, written: list[Path] = written, kind: str = kind) -> None:
            written.append(folder / kind / f"{len(written)}.ckpt")
            trainer.save_checkpoint(written[-1])
            if event.epoch_end and trainer.current_epoch == 0:
                torch.save(outcome(trainer.module, trainer), folder / kind / f"epoch-{RANK}.pt")

        trainer.signals.safe_point.connect(save)
        torch.rand(RANK)  # from here on each rank draws other numbers
        trainer.fit(module, batches)
        undisturbed, resumptions = outcome(module, trainer), []
        for point in points:
            module, trainer, batches = resumable(kind, folder / kind)
            torch.manual_seed(99 + RANK)
            trainer.fit(module, batches, ckpt_path=written[point])
            resumptions.append(outcome(module, trainer))
        results[kind] = {"undisturbed": undisturbed, "resumed": resumptions}
    return results


@check
def checkpointed(folder: Path) -> Any:
    """Resume a run from its last checkpoint, and list the files before and after."""

    def fit(max_epochs: int) -> tuple[Any, Trainer]:
        module = Model()
        checkpointing = ModelCheckpoint(every_n_steps=2, save_top_k=1)
        trainer = new_trainer(checkpointing, max_epochs=max_epochs, default_root_dir=root)
        trainer.fit(module, loader(20), ckpt_path="last")
        return module, trainer

    root = folder / "checkpointed"
    fit(1)
    dist.barrier()
    first = names(root)
    dist.barrier()
    module, resumed = fit(2)
    resumed_state = state(module, resumed.optimizers)
    dist.barrier()
    second = names(root)
    root = folder / "undisturbed"
    module, undisturbed = fit(2)
    return {"first": first, "second": second, "resumed": resumed_state, "undisturbed": state(module, undisturbed.optimizers)}


def names(root: Path) -> Any:
    """Return the names of the files under a folder."""
    return sorted(path.name for path in root.rglob("*"))


@check
def from_whole(folder: Path) -> Any:
    """Resume a run that does not shard as a run that shards: between two epochs, and in an open window."""
    results = {}

    class Whole(DistributedDataParallel):
        state_key = "processes"  # so that both callbacks shuffle by the same seed

    class Sharded(FullyShardedDataParallel):
        state_key = "processes"

    for name, batches_done in (("epoch", 5), ("window", 2)):
        path = folder / f"whole-{name}.ckpt"

        def save(trainer: Any, event: Any, path: Path = path, batches_done: int = batches_done) -> None:
            if trainer.total_batch_idx + 1 == batches_done:
                trainer.save_checkpoint(path)

        ends: list[Any] = []
        for processes in (Whole(timeout=TIMEOUT), Sharded(timeout=TIMEOUT)):
            module = Model()
            trainer = new_trainer(GradientAccumulation(3), ExponentialMovingAverage(0.9), processes=processes)
            trainer.signals.safe_point.connect(save)
            trainer.fit(module, loader(20), ckpt_path=None if not ends else path)
            ends.append(outcome(module, trainer))
        results[name] = ends
    return results


class Counted(Model):
    """A module whose buffer differs between ranks, and which logs it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.seen += RANK
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        super().validation_step(batch, batch_idx)
        self.log("seen", self.seen)


@check
def order(folder: Path) -> Any:
    """Attach the callback before and after a callback that reads checkpoints and changes the weights for evaluation."""
    results = []
    for comes_first in (True, False):
        root = folder / f"order-{comes_first}"
        ends, metrics = [], []
        for resumes in (False, True):
            averages, processes = ExponentialMovingAverage(0.9), FullyShardedDataParallel(units=(Block,), timeout=TIMEOUT)
            callbacks = [processes, averages] if comes_first else [averages, processes]
            trainer = new_trainer(*callbacks, GradientAccumulation(3), default_root_dir=root)

            def save(trainer: Any, event: Any, root: Path = root) -> None:
                if trainer.total_batch_idx in (4, 6):
                    trainer.save_checkpoint(root / f"{trainer.total_batch_idx}.ckpt")

            trainer.signals.safe_point.connect(save)
            module = Counted()
            trainer.fit(module, loader(20), loader(7, shuffle=False), ckpt_path=root / "6.ckpt" if resumes else None)
            metrics.append(plain(trainer.callback_metrics))
            ends.append(outcome(module, trainer))
        metrics += trainer.validate(module, loader(7, shuffle=False))
        metrics += trainer.validate(Counted(), loader(7, shuffle=False), ckpt_path=root / "4.ckpt")
        results.append({"ends": ends, "metrics": metrics})
    return results


def plain(values: Any) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


# ------------------------------------------------------------------ windows that end in another way


@check
def windows(folder: Path) -> Any:
    """Compare both callbacks in windows that are never closed, whose last batch is skipped or has no loss, or whose batches
    have weights."""

    class Weighted(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": F.mse_loss(self.out(batch[0]), batch[1]), "weight": float(1 + batch_idx + 3 * RANK)}

    class Absent(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if kind == "early" and batch_idx == 2:
                return None
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in {"late": (2,), "nothing": (0, 1, 2)}.get(kind, ()) else loss

    results = {}
    for kind in ("drop", "skip", "weights", "early", "late", "nothing"):
        ends = []
        for processes in (DistributedDataParallel(timeout=TIMEOUT), FullyShardedDataParallel(timeout=TIMEOUT)):
            module = Weighted() if kind == "weights" else Absent()
            trainer = new_trainer(GradientAccumulation(3, remainder="drop"), processes=processes)

            def skip(trainer: Any, event: Any, kind: str = kind) -> None:
                if kind == "skip" and event.batch_idx == 2:
                    event.skip_batch()

            trainer.signals.train_batch_start.connect(skip)
            trainer.fit(module, loader(20))
            ends.append(state(module, trainer.optimizers))
        results[kind] = ends
    return results


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "backward": {"reshard_after_backward": False},
    "both": {"reshard_after_backward": False, "reshard_after_forward": False},
}


@check
def gathered(folder: Path) -> Any:
    """Count the all-gathers of two windows of four batches; validate and save in a window, and resume there."""
    results = {}
    for kind, options in OPTIONS.items():
        ends: list[Any] = []
        counts: list[int] = []
        for path in (None, folder / f"gathered-{kind}.ckpt"):
            module = Model()
            processes = FullyShardedDataParallel(units=(Block,), timeout=TIMEOUT, **options)
            trainer = new_trainer(
                GradientAccumulation(4), ExponentialMovingAverage(0.5), processes=processes, max_epochs=1, val_check_interval=6
            )

            def save(trainer: Any, event: Any, kind: str = kind) -> None:
                if trainer.total_batch_idx in (1, 5):
                    trainer.save_checkpoint(folder / f"gathered-{kind}.ckpt")

            trainer.signals.safe_point.connect(save)
            trainer.fit(module, loader(32), loader(4, shuffle=False), ckpt_path=path)
            ends.append((outcome(module, trainer), plain(trainer.callback_metrics)))
        module = Model()
        trainer = new_trainer(
            GradientAccumulation(4),
            processes=FullyShardedDataParallel(units=(Block,), timeout=TIMEOUT, **options),
            max_epochs=1,
        )
        with Calls("all_gather") as calls:
            trainer.signals.safe_point.connect(
                lambda trainer, event, calls=calls, counts=counts: counts.append(calls.count), weak=False
            )
            trainer.fit(module, loader(32))
        results[kind] = {"ends": ends, "counts": counts}
    return results


@check
def own_steps(folder: Path) -> Any:
    """Step in ``training_step``; return the weights and those by hand."""
    pairs = train_own_steps(FullyShardedDataParallel(shares_data=False, timeout=TIMEOUT))
    return [[whole(dict(each.named_parameters())) for each in pair] for pair in pairs]


# ------------------------------------------------------------------ evaluation


class Evaluated(Model):
    """A module that remembers the samples that it is evaluated on."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.samples.append(batch[0][:, 0].clone())
        super().validation_step(batch, batch_idx)

    test_step = validation_step


@check
def evaluation(folder: Path) -> Any:
    """Train with and without a validation, in the fit and before it."""
    ends, metrics = [], []
    for validates in (False, True):
        module = Evaluated()
        trainer = new_trainer(ExponentialMovingAverage(0.9), num_sanity_val_steps=2)
        if validates:
            metrics += trainer.validate(module, loader(7, shuffle=False))
            predicted = torch.cat(trainer.predict(module, loader(7, shuffle=False)))
        torch.manual_seed(SEED)
        trainer.fit(module, loader(20), loader(7, shuffle=False) if validates else None)
        ends.append(outcome(module, trainer))
    metrics += trainer.test(module, loader(7, shuffle=False))
    trainer.callback(ExponentialMovingAverage).copy_into(module)
    by_hand = [F.mse_loss(evaluated(module, x), y) for x, y in share(7)]
    return {
        "ends": ends,
        "metrics": metrics,
        "seen": [each.tolist() for each in module.samples],
        "predicted": predicted,
        "test by hand": by_hand,
    }


@check
def interrupted(folder: Path) -> Any:
    """Interrupt a run in the validation of its fifth batch, in one process or in both, and resume it."""
    results = {}
    for ranks in ((), (0,), (1,), (0, 1)):
        root = folder / f"interrupted by {ranks}"

        def act(trainer: Any, event: Any, ranks: Any = ranks) -> None:
            if event.batch_idx == 2 and RANK in ranks:
                trainer.interrupt("enough")

        modules = []
        for path in (None, root / "checkpoints" / "interrupted.ckpt") if ranks else (None,):
            module = Evaluated()
            trainer = new_trainer(ExponentialMovingAverage(0.9), max_epochs=1, default_root_dir=root)
            if path is None:
                trainer.signals.validation_batch_start.connect(act)
            trainer.fit(module, loader(20), loader(32, shuffle=False), ckpt_path=path)
            modules.append(module)
        end = outcome(module, trainer), plain(trainer.callback_metrics)
        results[ranks] = {"left": len(modules[0].samples), "end": end}
    return results


def share(samples: int) -> Any:
    """Return this rank's batches of two, as many as the other rank has."""
    sampler: DistributedSampler[Any] = DistributedSampler(data(samples), shuffle=False)
    return DataLoader(data(samples), 2, sampler=sampler)


def evaluated(module: Any, x: Tensor) -> Tensor:
    plain = Model().eval()
    plain.load_state_dict(whole(dict(module.state_dict())))
    with torch.no_grad():
        y: Tensor = plain.out(x)
    return y


# ------------------------------------------------------------------ other models


class Tied(LightningModule):
    """A module with two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.into, self.middle, self.out = nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(3, 5)
        self.out.weight = self.into.weight

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.out(self.middle(self.into(batch[0]))).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@check
def tied(folder: Path) -> Any:
    ends = []
    for processes in (DistributedDataParallel(timeout=TIMEOUT), FullyShardedDataParallel(timeout=TIMEOUT)):
        module = Tied()
        new_trainer(processes=processes).fit(module, loader())
        ends.append(state(module)["module"])
    return {"ends": ends, "apart": [name for name, part in module.named_children() if isinstance(part, FSDPModule)]}


@check
def failed(folder: Path) -> Any:
    """Train the same module again after an error in a forward, in an open window."""

    class Failing(Model):
        fails = True

        def out(self, x: Tensor) -> Tensor:
            x = self.head(x)
            for index, block in enumerate(self.blocks):
                if self.fails and index == 1 and self.seen > 2:
                    raise ArithmeticError("in the second batch")
                x = block(x)
            y: Tensor = self.tail(x)
            return y * self.gain

    ends = []
    for fails in (True, False):
        module = Failing()
        module.fails = fails
        trainer = new_trainer(GradientAccumulation(3))
        if fails:
            try:
                trainer.fit(module, loader(20))
            except ArithmeticError:
                module.fails, module.seen = False, torch.zeros(())
        torch.manual_seed(SEED)
        trainer.fit(module, loader(20))
        ends.append(state(module))
    return ends


@check
def norms(folder: Path) -> Any:
    """Clip gradients in both processes, and in one process over the samples of both."""
    results = []
    for order in (1.0, 2.0, float("inf")):
        totals: list[float] = []
        module = Tied()
        clipping = GradientClipping(0.1, norm_type=order)
        trainer = new_trainer(clipping, processes=FullyShardedDataParallel(timeout=TIMEOUT), max_epochs=1)
        trainer.signals.after_gradient_clipping.connect(
            lambda trainer, event, totals=totals: totals.append(float(event.total_norm)), weak=False
        )
        trainer.fit(module, loader(4, shuffle=False))
        alone = Tied()
        xs = data(4).tensors[0]
        alone.training_step([xs], 0).backward()
        expected = float(torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1, order))
        torch.optim.SGD(alone.parameters(), lr=0.1).step()
        results.append((totals, expected, state(module)["module"], state(alone)["module"]))
    return results


@check
def refused(folder: Path) -> Any:
    class LineSearching(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    messages = []
    for module, callbacks in (
        (LineSearching(), ()),
        (Model(), (MixedPrecision("fp16"),)),
    ):
        try:
            new_trainer(*callbacks, default_root_dir=folder / "refused").fit(module, loader())
        except MisconfigurationError as error:
            messages.append(str(error))
    return messages


# ------------------------------------------------------------------ checks that their tests start by name


def elsewhere(folder: Path) -> Any:
    """Resume, in another number of processes, the runs of two: at the end of an epoch, and train the next."""
    results: dict[str, Any] = {}
    for kind in POINTS:
        path = folder / kind / "4.ckpt"
        for epochs in (1, 2):
            module, trainer, batches = resumable(kind, folder / kind, epochs)
            trainer.fit(module, batches, ckpt_path=path)
            results[f"{kind} {epochs}"] = outcome(module, trainer)
    module, trainer, batches = resumable("automatic", folder / "another folder")
    results["validated"] = trainer.validate(module, batches, ckpt_path=folder / "automatic" / "4.ckpt")
    trainer.callback(ExponentialMovingAverage).copy_into(module)
    results["validated by hand"] = torch.stack([F.mse_loss(evaluated(module, x), y) for x, y in batches]).mean()
    results["refused"] = []
    for path in (folder / "automatic" / "0.ckpt", folder / "gone.ckpt", folder / "damaged.ckpt"):
        if path.exists():
            module, trainer, batches = resumable("automatic", folder / "automatic")
            try:
                trainer.fit(module, batches, ckpt_path=path)
            except MisconfigurationError as error:
                results["refused"].append(str(error))
    if (folder / "converted.ckpt").exists():
        results["converted"] = state(Model.load_from_checkpoint(folder / "converted.ckpt"))["module"]
    return results


def everywhere(folder: Path) -> Any:
    """Resume after each batch."""
    return resumed(folder / "everywhere", dict.fromkeys(POINTS, range(10)))


def hybrid(folder: Path) -> Any:
    """Train four processes, of which two hold the same parts."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    ends = []
    for path in (None, folder / "hybrid.ckpt"):
        module = Model()
        processes = FullyShardedDataParallel(mesh=mesh, timeout=TIMEOUT)
        trainer = new_trainer(GradientAccumulation(2), processes=processes, default_root_dir=folder)

        def save(trainer: Any, event: Any) -> None:
            if trainer.total_batch_idx == 2:
                trainer.save_checkpoint(folder / "hybrid.ckpt")

        trainer.signals.safe_point.connect(save)
        trainer.fit(module, loader(40), ckpt_path=path)
        ends.append(state(module, trainer.optimizers))
    return ends


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    results = {name: globals()[name](folder) for name in names or CHECKS}
    torch.save(results, folder / f"{dist.get_rank() if dist.is_initialized() else 'single'}.pt")


if __name__ == "__main__":
    main()
