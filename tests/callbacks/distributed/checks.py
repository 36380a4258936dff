"""Runs in each of several processes: trains in many ways, and saves what came out for the test to compare.

``torchrun --nproc-per-node 2 tests/callbacks/distributed/checks.py FOLDER [NAME ...]``
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parts import SEED, TIMEOUT, Counting, Model, data, loader, resumable, state, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as Wrapper
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import MeanMetric

from eventtrain import LightningModule, MisconfigurationError
from eventtrain.callbacks import (
    EarlyStopping,
    GradientAccumulation,
    GradientClipping,
    LearningRateMonitor,
    MixedPrecision,
    Preemption,
)
from eventtrain.callbacks.distributed.distributed_data_parallel import DistributedDataParallel

CHECKS: dict[str, Callable[[Path], Any]] = {}


def check(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    CHECKS[function.__name__] = function
    return function


@check
def automatic(folder: Path) -> Any:
    rates = []
    counting, module = Counting(), Model()
    run = trainer(counting, GradientAccumulation(3), GradientClipping(0.5), LearningRateMonitor(), max_epochs=3)
    run.signals.metrics_logged.connect(lambda trainer, event: rates.append(dict(event.metrics)), weak=False)
    run.fit(module, loader(samples=19))
    ours = state(module, run.optimizers), [each["lr-AdamW"] for each in rates if "lr-AdamW" in each]

    torch.manual_seed(SEED)
    module = Model()
    torch.manual_seed(SEED)
    wrapper = Wrapper(module.net)
    sampler = DistributedSampler(data(19), shuffle=True, seed=SEED)
    batches = DataLoader(data(19), 2, sampler=sampler)
    (optimizer,), (config,) = module.configure_optimizers()
    lrs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for index, (x, y) in enumerate(batches):
            opens, closes = index % 3 == 0, index % 3 == 2 or index == len(batches) - 1
            wrapper.require_backward_grad_sync = closes
            loss = F.mse_loss(wrapper(x), y)
            if opens:
                optimizer.zero_grad()
            (loss / 3).backward()
            if closes:
                if index % 3 != 2:
                    for parameter in module.parameters():
                        parameter.grad.mul_(3 / (index % 3 + 1))
                torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
                lrs.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                config["scheduler"].step()
    by_hand = state(module, [optimizer]), lrs
    return {
        "ours": ours,
        "by hand": by_hand,
        "all-reduces": counting.reduced,
        "updates": run.global_step,
        "estimated": run.estimated_stepping_batches,
        "batches": len(batches),
    }


class Weighted(LightningModule):
    """The mean loss of each batch counts by the batch's weight, which is its third part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.net = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, weight = batch
        return {"loss": F.mse_loss(self.net(x), y), "weight": weight}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def weighted_batches() -> list[Any]:
    """Sixteen batches of one to five samples, of which each weighs as much as the batch has samples."""
    xs, ys = data(100).tensors
    sizes = [1 + (5 * index) % 7 for index in range(16)]
    starts = [sum(sizes[:index]) for index in range(16)]
    return [(xs[at : at + size], ys[at : at + size], float(size)) for at, size in zip(starts, sizes, strict=True)]


@check
def weighted(folder: Path) -> Any:
    module = Weighted()
    processes = DistributedDataParallel(shares_data=False, timeout=TIMEOUT)
    run = trainer(processes, GradientAccumulation(3), max_epochs=1)
    run.fit(module, weighted_batches()[dist.get_rank() :: 2])
    return state(module)["module"]


class Gan(LightningModule):
    """Two optimizers. One part takes part on the last rank alone, one nowhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED + dist.get_rank())  # all are to begin with rank zero's
        self.generator, self.critic = nn.Linear(3, 3), nn.Linear(3, 1)
        self.sometimes, self.never = nn.Linear(3, 3), nn.Linear(3, 3)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, _ = batch
        for_generator, for_critic = self.optimizers()
        self.toggle_optimizer(for_critic)
        for_critic.zero_grad()
        self.manual_backward(self.critic_loss(real, self.fake(real)))
        for_critic.step()
        self.untoggle_optimizer(for_critic)
        self.toggle_optimizer(for_generator)
        for_generator.zero_grad()
        self.manual_backward(self.generator_loss(self.fake(real)))
        self.clip_gradients(for_generator, 0.1)
        for_generator.step()
        self.untoggle_optimizer(for_generator)

    def fake(self, real: Tensor) -> Tensor:
        made = self.generator(torch.randn(len(real), 3))
        return made + self.sometimes(made) if dist.get_rank() else made

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(self.critic(fake.detach()) - self.critic(real).mean()).mean()

    def generator_loss(self, fake: Tensor) -> Tensor:
        return F.softplus(-self.critic(fake)).mean()

    def configure_optimizers(self) -> Any:
        generating = [*self.generator.parameters(), *self.sometimes.parameters(), *self.never.parameters()]
        return [torch.optim.AdamW(part, lr=0.05) for part in (generating, self.critic.parameters())]


@check
def manual(folder: Path) -> Any:
    module = Gan()
    run = trainer()
    run.fit(module, loader())
    ours = state(module, run.optimizers)

    module = Gan()
    torch.manual_seed(SEED)
    for parameter in module.parameters():
        dist.broadcast(parameter.detach(), 0)
    sampler = DistributedSampler(data(), shuffle=True, seed=SEED)
    batches = DataLoader(data(), 2, sampler=sampler)
    for_generator, for_critic = optimizers = module.configure_optimizers()

    def average(parameters: Any) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2

    for epoch in range(2):
        sampler.set_epoch(epoch)
        for real, _ in batches:
            for_critic.zero_grad()
            module.critic_loss(real, module.fake(real)).backward()
            average(module.critic.parameters())
            for_critic.step()
            for_generator.zero_grad()
            module.generator_loss(module.fake(real)).backward()
            average([*module.generator.parameters(), *module.sometimes.parameters()])
            torch.nn.utils.clip_grad_norm_([*module.generator.parameters(), *module.sometimes.parameters()], 0.1)
            for_generator.step()
    return {"ours": ours, "by hand": state(module, optimizers)}


class Logging(LightningModule):
    """Logs what differs between ranks: of three batches with values 0, 1, 2 on rank zero and 10, 11, 12 on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        value = float(batch_idx + 10 * self.global_rank)
        size = 1 + 2 * self.global_rank
        self.log("own", value)
        self.log("mean", value, sync_dist=True)
        self.log("max", value, sync_dist=True, reduce_fx="max", on_epoch=True, batch_size=size)
        self.log("epoch", value, on_step=False, on_epoch=True, batch_size=size)
        self.log("sum", value, on_step=False, on_epoch=True, reduce_fx="sum")
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        # Gets better on rank zero, and worse on average.
        self.log("val", self.current_epoch * (-1.0 if self.global_rank == 0 else 3.0))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val"}}


@check
def logged(folder: Path) -> Any:
    module, stopping = Logging(), EarlyStopping("val", patience=3)
    run = trainer(stopping, max_epochs=20)
    values: list[Any] = []
    run.signals.metrics_logged.connect(lambda trainer, event: values.append(plain(event.metrics)), weak=False)
    run.fit(module, loader(12), loader(12, shuffle=False))
    return {"values": values, "epochs": run.current_epoch, "lr": run.optimizers[0].param_groups[0]["lr"]}


def plain(values: Any) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


class Evaluated(Model):
    """Keeps what it is evaluated on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []
        self.metric = MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0].reshape(-1, 3)  # a sample alone where the loader makes no batches
        self.seen += x[:, 0].tolist()
        self.log("samples", float(len(x)), reduce_fx="sum")
        self.log("mean", x[:, 0].mean())
        self.metric(x[:, 0])
        self.log("metric", self.metric)
        self.log("statistics", self.net[1].running_mean.mean())

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch[0][:, 0]


@check
def evaluation(folder: Path) -> Any:
    module = Evaluated()
    run = trainer(max_epochs=1)
    statistics: list[Any] = []
    run.signals.validation_start.connect(lambda trainer, event: statistics.append(state(module.net[1])["module"]), weak=False)
    run.fit(module, loader(), loader(7, shuffle=False))  # batches of 2, 2 on rank zero and of 2, 1 on the other
    within_fit, seen = plain(run.callback_metrics), module.seen
    module.seen = []
    (validated,) = run.validate(module, loader(9))  # three batches on rank zero, two on the other
    (tested,) = run.test(module, loader(5, batch_size=None))
    predicted = run.predict(module, loader(9))
    return {
        "within fit": within_fit, "seen": seen, "statistics": statistics, "validated": validated, "tested": tested,
        "seen later": module.seen, "predicted": torch.cat(predicted).tolist(),
    }  # fmt: skip


@check
def resumed(folder: Path) -> Any:
    rank, kept = dist.get_rank(), []

    def keep(trainer: Any, event: Any) -> None:
        kept.append(folder / f"resume-{len(kept)}-rank-{rank}.ckpt")
        trainer.save_checkpoint(kept[-1])

    module = Model()
    run, batches = resumable()
    run.signals.safe_point.connect(keep)
    torch.rand(rank)  # from here on each rank draws its own
    run.fit(module, batches)
    undisturbed, results = state(module, run.optimizers), []
    for path in kept:
        module = Model()
        run, batches = resumable()
        torch.manual_seed(99 + rank)
        run.fit(module, batches, ckpt_path=path)
        results.append(state(module, run.optimizers))
    return {"undisturbed": undisturbed, "resumed": results, "written": [path.exists() for path in kept]}


@check
def overflow(folder: Path) -> Any:
    class Overflowing(Weighted):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            factor = 1e5 if batch_idx == 1 and self.global_rank == 1 else 1.0
            return self.net(batch[0]).pow(2).mean() * factor

    module = Overflowing()
    skipped: list[str] = []
    run = trainer(MixedPrecision("fp16", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0)), max_epochs=1)
    run.signals.optimizer_step_skipped.connect(lambda trainer, event: skipped.append(event.reason), weak=False)
    run.fit(module, loader(12))
    scale = run.callback(MixedPrecision).scaler.get_scale()
    return {"state": state(module)["module"], "skipped": skipped, "scale": scale, "updates": run.global_step}


class Endless:
    """Batches of a loader without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


@check
def unequal(folder: Path) -> Any:
    results = []
    for kind in (list, Endless):
        module = Weighted()
        counting = Counting(shares_data=False)
        run = trainer(counting, GradientAccumulation(2))
        run.fit(module, kind(weighted_batches()[: 5 + 2 * dist.get_rank()]))
        results.append({"state": state(module)["module"], "updates": run.global_step, "all-reduces": counting.reduced})
    return results


@check
def skipped(folder: Path) -> Any:
    """The batch that closes the window is skipped: by rank one alone, so by all."""
    module = Weighted()
    run = trainer(DistributedDataParallel(shares_data=False, timeout=TIMEOUT), GradientAccumulation(2), max_epochs=1)

    def skip(trainer: Any, event: Any) -> None:
        if event.batch_idx == 1 and trainer.global_rank == 1:
            event.skip_batch()

    run.signals.train_batch_start.connect(skip)
    run.fit(module, weighted_batches()[dist.get_rank() : 4 : 2])
    return state(module)["module"]


@check
def thawed(folder: Path) -> Any:
    """A layer is frozen until the second epoch, and rank one begins with other weights."""

    class Thawing(Model):
        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch > 0)

    module = Thawing()
    module.net[0].requires_grad_(False)
    with torch.no_grad():
        module.net[0].weight.add_(dist.get_rank())
    run = trainer()
    firsts: list[Any] = []
    run.signals.train_epoch_end.connect(lambda trainer, event: firsts.append(module.net[0].weight.detach().clone()), weak=False)
    run.fit(module, loader())
    wrapper = run.callback(DistributedDataParallel)._wrapper
    return {"weights": [each.detach() for each in module.net.parameters()], "firsts": firsts, "released": wrapper is None}


@check
def refused(folder: Path) -> Any:
    """What would have the processes wait for each other, or go apart."""

    class LineSearching(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    messages = []

    class Sparse(Model):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 2, sparse=True)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.table(torch.tensor([0])).sum())
            self.optimizers().step()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.table.parameters(), lr=0.1)

    pairs = ((LineSearching(), loader()), (Model(), [next(iter(loader()))]), (Sparse(), loader()))
    for module, batches in pairs:
        try:
            trainer().fit(module, batches)
        except MisconfigurationError as error:
            messages.append(str(error))
    return messages


@check
def preempted(folder: Path) -> Any:
    """A signal comes to rank one alone."""

    def signal_myself(trainer: Any, event: Any) -> None:
        if trainer.global_rank == 1 and event.batch_idx == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    run = trainer(Preemption(("SIGUSR1",)), default_root_dir=folder)
    run.signals.after_forward.connect(signal_myself)
    with contextlib.suppress(SystemExit):  # which is how it ends
        run.fit(Model(), loader())
    return {"batches": run.total_batch_idx, "kept": (folder / "checkpoints" / "interrupted.ckpt").exists()}


@check
def stopped(folder: Path) -> Any:
    """Rank one alone has had enough."""
    results = []
    for ask in ("stop", "end_epoch", "gate"):

        def after(trainer: Any, event: Any, ask: str = ask) -> None:
            if trainer.global_rank == 1 and (trainer.current_epoch, event.batch_idx) == (1, 2) and ask != "gate":
                getattr(trainer, ask)("one rank has had enough")

        def before(trainer: Any, event: Any, ask: str = ask) -> None:
            if trainer.global_rank == 1 and (trainer.current_epoch, event.batch_idx) == (1, 3) and ask == "gate":
                event.end_epoch()

        run = trainer(max_epochs=3)
        run.signals.train_batch_end.connect(after)
        run.signals.train_batch_start.connect(before)
        run.fit(Model(), loader())
        results.append((run.current_epoch, run.global_step))
    return results


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    results = {name: CHECKS[name](folder) for name in names or CHECKS}
    torch.save(results, folder / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    main()
