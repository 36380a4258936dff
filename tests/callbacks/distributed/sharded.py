"""Runs in each of several processes: trains modules that they hold in parts, and saves what came out for the test to compare.

``torchrun --nproc-per-node 2 tests/callbacks/distributed/sharded.py FOLDER [NAME ...]``
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
from parts import SEED, TIMEOUT, data, loader
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

RANK = int(os.environ.get("RANK", "0"))
CHECKS: dict[str, Callable[[Path], Any]] = {}


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    CHECKS[function.__name__] = function
    return function


class Block(nn.Module):
    """A residual block; its width is no multiple of the number of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(7), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(torch.tanh(self.linear(self.norm(x))), 0.2, self.training)


class Model(LightningModule):
    """Weights in blocks, outside of them, and of its own; a buffer; a schedule. Its step calls no forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(SEED + RANK)  # all are to begin with rank zero's
        self.head = nn.Linear(3, 7)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.tail = nn.Linear(7, 1)
        self.gain = nn.Parameter(torch.ones(1))
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
        return self.tail(x) * self.gain

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val", F.mse_loss(self.out(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.out(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=50)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def trainer(*callbacks: Any, processes: Any = None, **options: Any) -> Trainer:
    torch.manual_seed(SEED)
    if not any(isinstance(each, FullyShardedDataParallel) for each in callbacks):
        callbacks = (processes or FullyShardedDataParallel(units=(Block,), timeout=TIMEOUT), *callbacks)
    options = {"max_epochs": 2, "device": "cpu", "num_sanity_val_steps": 0, **options}
    return Trainer(callbacks=[*callbacks, LRSchedulerStepping()], default_callbacks=False, **options)


def whole(value: Any) -> Any:
    """A copy of nested values with all tensors whole."""
    if isinstance(value, DTensor):
        return value.full_tensor().clone()
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, (list, tuple)) else copy.deepcopy(value)


def state(module: nn.Module, optimizers: Any = ()) -> dict[str, Any]:
    """Weights, buffers and optimizer states, as they are now."""
    return whole({"module": dict(module.state_dict()), "optimizers": [each.state_dict() for each in optimizers]})


def sharded_by_hand(module: nn.Module, units: list[nn.Module]) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for tensor in [*module.parameters(), *module.buffers()]:
        dist.broadcast(tensor.detach(), 0)
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


class Stepping(nn.Module):
    """What fully_shard knows of the model: a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def forward(self, x: Tensor) -> Tensor:
        return self.model.out(x)


class ReduceScatters:
    """Counts."""

    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"

    def __init__(self) -> None:
        self.count = 0
        self.original = getattr(dist, self.name)

    def __enter__(self) -> ReduceScatters:
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
    run = trainer(GradientAccumulation(3), GradientClipping(0.5), GradientNormMonitor(per_layer=True), max_epochs=3)
    run.signals.metrics_logged.connect(
        lambda trainer, event: norms.append({k: float(v) for k, v in event.metrics.items()}), weak=False
    )
    with ReduceScatters() as scatters:
        run.fit(module, loader(samples=19))
    ours = state(module, run.optimizers)

    torch.manual_seed(SEED)
    by_hand = Stepping()
    model = by_hand.model
    sharded_by_hand(by_hand, [*model.blocks])
    torch.manual_seed(SEED)
    sampler = DistributedSampler(data(19), shuffle=True, seed=SEED)
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
            (loss / 3).backward()
            if closes:
                if index % 3 != 2:
                    for parameter in model.parameters():
                        parameter.grad.mul_(3 / (index % 3 + 1))
                expected.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).full_tensor()))
                optimizer.step()
                config["scheduler"].step()
    parts = sum(parameter.to_local().numel() for parameter in module.parameters())
    return {
        "ours": ours,
        "by hand": state(model, [optimizer]),
        "scatters": scatters.count,
        "updates": run.global_step,
        "norms": [each["grad_norm"] for each in norms if "grad_norm" in each],
        "layers": [each for each in norms if "grad_norm" in each],
        "expected norms": expected,
        "numbers": (parts, sum(parameter.numel() for parameter in module.parameters())),
    }


# ------------------------------------------------------------------ manual optimization


class Gan(LightningModule):
    """Two optimizers, toggled; its parts are called by themselves, twice before a backward, and in two backwards a batch."""

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
    run = trainer(processes=FullyShardedDataParallel(timeout=TIMEOUT))
    run.fit(module, loader())
    ours = state(module, run.optimizers)

    # Not sharded: gradients are averaged by hand.
    module = Gan()
    for parameter in module.parameters():
        dist.broadcast(parameter.detach(), 0)
    torch.manual_seed(SEED)
    sampler = DistributedSampler(data(), shuffle=True, seed=SEED)
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


def resumable(kind: str, root: Path) -> tuple[Any, Trainer, Any]:
    """A module, a trainer and a loader of two epochs of five batches."""
    if kind == "manual":
        run = trainer(processes=FullyShardedDataParallel(timeout=TIMEOUT), default_root_dir=root)
        return Gan(), run, loader(20)
    options: dict[str, Any] = {}
    if kind == "mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    processes = FullyShardedDataParallel(units=(Block,), timeout=TIMEOUT, **options)
    averages = ExponentialMovingAverage(0.9)
    run = trainer(GradientAccumulation(3), GradientClipping(0.5), averages, processes=processes, default_root_dir=root)
    return Model(), run, loader(20)


def outcome(module: Any, run: Trainer) -> Any:
    averages = [each.averages for each in run.callbacks if isinstance(each, ExponentialMovingAverage)]
    return {**state(module, run.optimizers), "averages": whole(averages)}


POINTS: dict[str, Any] = {"automatic": (0, 4, 6), "mixed": (1,), "manual": (4,)}
"""After which batches a run is resumed: in a window, and at the end of an epoch."""


@check
def resumed(folder: Path, points_of: dict[str, Any] = POINTS) -> Any:
    results = {}
    for kind, points in points_of.items():
        written: list[Path] = []
        module, run, batches = resumable(kind, folder / kind)

        def keep(trainer: Any, event: Any, written: list[Path] = written, kind: str = kind) -> None:
            written.append(folder / kind / f"{len(written)}.ckpt")
            trainer.save_checkpoint(written[-1])
            if event.epoch_end and trainer.current_epoch == 0:
                torch.save(outcome(trainer.module, trainer), folder / kind / f"epoch-{RANK}.pt")

        run.signals.safe_point.connect(keep)
        torch.rand(RANK)  # from here on each rank draws its own
        run.fit(module, batches)
        undisturbed, resumptions = outcome(module, run), []
        for point in points:
            module, run, batches = resumable(kind, folder / kind)
            torch.manual_seed(99 + RANK)
            run.fit(module, batches, ckpt_path=written[point])
            resumptions.append(outcome(module, run))
        results[kind] = {"undisturbed": undisturbed, "resumed": resumptions}
    return results


@check
def kept(folder: Path) -> Any:
    """What a ModelCheckpoint keeps, in a run that goes on from it."""

    def run(max_epochs: int, **options: Any) -> tuple[Any, Trainer]:
        module = Model()
        keeping = ModelCheckpoint(every_n_steps=2, save_top_k=1)
        run = trainer(keeping, max_epochs=max_epochs, default_root_dir=root, **options)
        run.fit(module, loader(20), ckpt_path="last")
        return module, run

    root = folder / "kept"
    run(1)
    dist.barrier()
    first = names(root)
    dist.barrier()
    orphan = root / "checkpoints" / "shards" / "step=1-of-a-run-that-was-killed"
    if RANK == 0:
        orphan.mkdir()
    module, resumed = run(2)
    resumed_state = state(module, resumed.optimizers)
    dist.barrier()
    second = names(root)
    root = folder / "undisturbed"
    module, undisturbed = run(2)
    return {"first": first, "second": second, "resumed": resumed_state, "undisturbed": state(module, undisturbed.optimizers)}


def names(root: Path) -> Any:
    """The folders of sharded tensors, and those that checkpoints refer to."""
    files = (root / "checkpoints").glob("*.ckpt")
    referred = {torch.load(file, weights_only=True)["shards"]["name"] for file in files}
    return {each.name for each in (root / "checkpoints" / "shards").iterdir()}, referred


@check
def from_whole(folder: Path) -> Any:
    """A run that does not shard goes on as one that does: between two epochs, and in an open window."""
    results = {}
    for name, batches_done in (("epoch", 5), ("window", 2)):
        path = folder / f"whole-{name}.ckpt"

        def keep(trainer: Any, event: Any, path: Path = path, batches_done: int = batches_done) -> None:
            if trainer.total_batch_idx + 1 == batches_done:
                trainer.save_checkpoint(path)

        ends = []
        for processes in (DistributedDataParallel(timeout=TIMEOUT), FullyShardedDataParallel(timeout=TIMEOUT)):
            module = Model()
            run = trainer(GradientAccumulation(3), ExponentialMovingAverage(0.9), processes=processes)
            run.callback(type(processes)).__class__.state_key = "processes"  # one goes on with what the other shuffled by
            run.signals.safe_point.connect(keep)
            run.fit(module, loader(20), ckpt_path=None if not ends else path)
            ends.append(outcome(module, run))
        results[name] = ends
    return results


# ------------------------------------------------------------------ windows that end in another way


@check
def windows(folder: Path) -> Any:
    """One that is never closed, one whose last batch is skipped, one of batches with weights, as with the other wrapper."""

    class Weighted(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": F.mse_loss(self.out(batch[0]), batch[1]), "weight": float(1 + batch_idx + 3 * RANK)}

    results = {}
    for kind in ("drop", "skip", "weights"):
        ends = []
        for processes in (DistributedDataParallel(timeout=TIMEOUT), FullyShardedDataParallel(timeout=TIMEOUT)):
            module = Weighted() if kind == "weights" else Model()
            run = trainer(GradientAccumulation(3, remainder="drop"), processes=processes)

            def skip(trainer: Any, event: Any, kind: str = kind) -> None:
                if kind == "skip" and event.batch_idx == 2 and trainer.global_rank == 1:
                    event.skip_batch()

            run.signals.train_batch_start.connect(skip)
            run.fit(module, loader(20))
            ends.append(state(module, run.optimizers))
        results[kind] = ends
    return results


# ------------------------------------------------------------------ evaluation


class Evaluated(Model):
    """Keeps what it is evaluated on."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.kept.append(batch[0][:, 0].clone())
        super().validation_step(batch, batch_idx)

    test_step = validation_step


@check
def evaluation(folder: Path) -> Any:
    """Validation, in a fit and before it, leaves training as it is."""
    ends, metrics = [], []
    for validates in (False, True):
        module = Evaluated()
        module.kept = []
        run = trainer(ExponentialMovingAverage(0.9), num_sanity_val_steps=2)
        if validates:
            metrics += run.validate(module, loader(7, shuffle=False))
            predicted = torch.cat(run.predict(module, loader(7, shuffle=False)))
        torch.manual_seed(SEED)
        run.fit(module, loader(20), loader(7, shuffle=False) if validates else None)
        ends.append(outcome(module, run))
    metrics += run.test(module, loader(7, shuffle=False))
    run.callback(ExponentialMovingAverage).copy_into(module)
    by_hand = [F.mse_loss(evaluated(module, x), y) for x, y in share(7)]
    return {
        "ends": ends,
        "metrics": metrics,
        "seen": [each.tolist() for each in module.kept],
        "predicted": predicted,
        "test by hand": by_hand,
    }


def share(samples: int) -> Any:
    """This rank's batches of two, in as many as the other's."""
    sampler = DistributedSampler(data(samples), shuffle=False)
    return DataLoader(data(samples), 2, sampler=sampler)


def evaluated(module: Any, x: Tensor) -> Tensor:
    plain = Model().eval()
    plain.load_state_dict(whole(dict(module.state_dict())))
    with torch.no_grad():
        return plain.out(x)


# ------------------------------------------------------------------ other models


class Tied(LightningModule):
    """Two layers share a weight."""

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
        trainer(processes=processes).fit(module, loader())
        ends.append(state(module)["module"])
    return {"ends": ends, "apart": [name for name, part in module.named_children() if isinstance(part, FSDPModule)]}


@check
def failed(folder: Path) -> Any:
    """After an error in the middle of a forward, and of a window, the same module can be trained."""

    class Failing(Model):
        fails = True

        def out(self, x: Tensor) -> Tensor:
            x = self.head(x)
            for index, block in enumerate(self.blocks):
                if self.fails and index == 1 and self.seen > 2:
                    raise ArithmeticError("in the second batch")
                x = block(x)
            return self.tail(x) * self.gain

    ends = []
    for fails in (True, False):
        module = Failing()
        module.fails = fails
        run = trainer(GradientAccumulation(3))
        if fails:
            try:
                run.fit(module, loader(20))
            except ArithmeticError:
                module.fails, module.seen = False, torch.zeros(())
        torch.manual_seed(SEED)
        run.fit(module, loader(20))
        ends.append(state(module))
    return ends


@check
def norms(folder: Path) -> Any:
    """The norm of all gradients together, before clipping, is that of one process over the samples of both."""
    results = []
    for order in (1.0, 2.0, float("inf")):
        totals: list[float] = []
        module = Tied()
        clipping = GradientClipping(0.1, norm_type=order)
        run = trainer(clipping, processes=FullyShardedDataParallel(timeout=TIMEOUT), max_epochs=1)
        run.signals.after_gradient_clipping.connect(
            lambda trainer, event, totals=totals: totals.append(float(event.total_norm)), weak=False
        )
        run.fit(module, loader(4, shuffle=False))
        alone = Tied()
        xs = data(4).tensors[0]
        alone.training_step([xs], 0).backward()
        results.append((totals, float(torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1, order)), state(module)["module"]))
        torch.optim.SGD(alone.parameters(), lr=0.1).step()
        results[-1] += (state(alone)["module"],)
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
        (Model(), (ModelCheckpoint(save_on_exception=True),)),
        (Model(), (ExponentialMovingAverage(), FullyShardedDataParallel())),
    ):
        try:
            trainer(*callbacks, default_root_dir=folder / "refused").fit(module, loader())
        except MisconfigurationError as error:
            messages.append(str(error))
    return messages


# ------------------------------------------------------------------ another number of processes, not among the others


def elsewhere(folder: Path) -> Any:
    """Goes on from what two processes wrote: at the end of an epoch, with what they had there, and trains the next."""
    results: dict[str, Any] = {}
    for kind in POINTS:
        path = folder / kind / "4.ckpt"
        for epochs in (1, 2):
            module, run, batches = resumable(kind, folder / kind)
            run.extent.max_epochs = epochs
            run.fit(module, batches, ckpt_path=path)
            results[f"{kind} {epochs}"] = outcome(module, run)
    module, run, batches = resumable("automatic", folder / "another folder")
    results["validated"] = run.validate(module, batches, ckpt_path=folder / "automatic" / "4.ckpt")
    run.callback(ExponentialMovingAverage).copy_into(module)
    results["validated by hand"] = torch.stack([F.mse_loss(evaluated(module, x), y) for x, y in batches]).mean()
    results["refused"] = []
    for path in (folder / "automatic" / "0.ckpt", folder / "gone.ckpt", folder / "damaged.ckpt"):
        if path.exists():
            module, run, batches = resumable("automatic", folder / "automatic")
            try:
                run.fit(module, batches, ckpt_path=path)
            except MisconfigurationError as error:
                results["refused"].append(str(error))
    if (folder / "converted.ckpt").exists():
        results["converted"] = state(Model.load_from_checkpoint(folder / "converted.ckpt"))["module"]
    return results


def everywhere(folder: Path) -> Any:
    """Resumes after each batch."""
    return resumed(folder / "everywhere", dict.fromkeys(POINTS, range(10)))


def hybrid(folder: Path) -> Any:
    """Parts that several processes have alike."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    ends = []
    for path in (None, folder / "hybrid.ckpt"):
        module = Model()
        processes = FullyShardedDataParallel(mesh=mesh, timeout=TIMEOUT)
        run = trainer(GradientAccumulation(2), processes=processes, default_root_dir=folder)

        def keep(trainer: Any, event: Any) -> None:
            if trainer.total_batch_idx == 2:
                trainer.save_checkpoint(folder / "hybrid.ckpt")

        run.signals.safe_point.connect(keep)
        run.fit(module, loader(40), ckpt_path=path)
        ends.append(state(module, run.optimizers))
    return ends


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    results = {name: globals()[name](folder) for name in names or CHECKS}
    torch.save(results, folder / f"{dist.get_rank() if dist.is_initialized() else 'alone'}.pt")


if __name__ == "__main__":
    main()
