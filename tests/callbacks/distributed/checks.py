"""Train in many ways, in each of several processes, and save the results, which the tests compare.

``PYTHONPATH=. torchrun --nproc-per-node 2 tests/callbacks/distributed/checks.py FOLDER [NAME ...]``
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as Wrapper
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import MeanMetric

from eventtrain import LightningModule, MisconfigurationError
from eventtrain.callbacks import (
    EarlyStopping,
    ExponentialMovingAverage,
    GradientAccumulation,
    GradientClipping,
    LearningRateMonitor,
    MixedPrecision,
    Preemption,
)
from eventtrain.callbacks.distributed.distributed_data_parallel import DistributedDataParallel
from tests.callbacks.distributed.parts import (
    SEED,
    TIMEOUT,
    Counting,
    Model,
    Weighted,
    data,
    loader,
    new_trainer,
    resumable,
    state,
    train_own_steps,
    weighted_batches,
)

CHECKS: dict[str, Callable[[Path], Any]] = {}


def check(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    CHECKS[function.__name__] = function
    return function


@check
def automatic(folder: Path) -> Any:
    rates = []
    counting, module = Counting(), Model()
    trainer = new_trainer(counting, GradientAccumulation(3), GradientClipping(0.5), LearningRateMonitor(), max_epochs=3)
    trainer.signals.metrics_logged.connect(lambda trainer, event: rates.append(dict(event.metrics)), weak=False)
    trainer.fit(module, loader(samples=19))
    ours = state(module, trainer.optimizers), [each["lr-AdamW"] for each in rates if "lr-AdamW" in each]

    torch.manual_seed(SEED)
    module = Model()
    torch.manual_seed(SEED)
    wrapper = Wrapper(module.net)
    sampler: DistributedSampler[Any] = DistributedSampler(data(19), shuffle=True, seed=SEED)
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
            torch.autograd.backward(loss / 3)
            if closes:
                if index % 3 != 2:
                    for parameter in module.parameters():
                        assert parameter.grad is not None
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
        "updates": trainer.global_step,
        "estimated": trainer.estimated_stepping_batches,
        "batches": len(batches),
    }


@check
def weighted(folder: Path) -> Any:
    module = Weighted()
    processes = DistributedDataParallel(shares_data=False, timeout=TIMEOUT)
    trainer = new_trainer(processes, GradientAccumulation(3), max_epochs=1)
    trainer.fit(module, weighted_batches()[dist.get_rank() :: 2])
    return state(module)["module"]


class Gan(LightningModule):
    """A module with two optimizers. One layer is only used on the last rank, and one on no rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED + dist.get_rank())  # all processes have to begin with rank zero's
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
        fake: Tensor = self.generator(torch.randn(len(real), 3))
        return fake + self.sometimes(fake) if dist.get_rank() else fake

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
    trainer = new_trainer()
    trainer.fit(module, loader())
    ours = state(module, trainer.optimizers)

    module = Gan()
    torch.manual_seed(SEED)
    for parameter in module.parameters():
        dist.broadcast(parameter.detach(), 0)
    sampler: DistributedSampler[Any] = DistributedSampler(data(), shuffle=True, seed=SEED)
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
            torch.autograd.backward(module.critic_loss(real, module.fake(real)))
            average(module.critic.parameters())
            for_critic.step()
            for_generator.zero_grad()
            torch.autograd.backward(module.generator_loss(module.fake(real)))
            average([*module.generator.parameters(), *module.sometimes.parameters()])
            torch.nn.utils.clip_grad_norm_([*module.generator.parameters(), *module.sometimes.parameters()], 0.1)
            for_generator.step()
    return {"ours": ours, "by hand": state(module, optimizers)}


class Logging(LightningModule):
    """A module that logs another value on each rank: for three batches 0, 1, 2 on rank zero and 10, 11, 12 on rank one."""

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
        # It gets better on rank zero, but worse on average.
        self.log("val", self.current_epoch * (-1.0 if self.global_rank == 0 else 3.0))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val"}}


@check
def logged(folder: Path) -> Any:
    module, stopping = Logging(), EarlyStopping("val", patience=3)
    trainer = new_trainer(stopping, max_epochs=20)
    values: list[Any] = []
    trainer.signals.metrics_logged.connect(lambda trainer, event: values.append(plain(event.metrics)), weak=False)
    trainer.fit(module, loader(12), loader(12, shuffle=False))
    return {"values": values, "epochs": trainer.current_epoch, "lr": trainer.optimizers[0].param_groups[0]["lr"]}


def plain(values: Any) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


class Evaluated(Model):
    """A module that remembers the samples that it is evaluated on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []
        self.metric = MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0].reshape(-1, 3)  # a single sample if the loader makes no batches
        self.seen += x[:, 0].tolist()
        self.log("samples", float(len(x)), reduce_fx="sum")
        self.log("mean", x[:, 0].mean())
        self.metric(x[:, 0])
        self.log("metric", self.metric)
        self.log("statistics", self.net[1].get_buffer("running_mean").mean())

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch[0][:, 0]


@check
def evaluation(folder: Path) -> Any:
    module = Evaluated()
    trainer = new_trainer(max_epochs=1)
    statistics: list[Any] = []

    def copy_statistics(trainer: Any, event: Any) -> None:
        statistics.append(state(module.net[1])["module"])

    trainer.signals.validation_epoch_start.connect(copy_statistics)
    trainer.fit(module, loader(), loader(7, shuffle=False))  # batches of 2, 2 on rank zero and of 2, 1 on the other
    within_fit, seen = plain(trainer.callback_metrics), module.seen
    module.seen = []
    (validated,) = trainer.validate(module, loader(9))  # three batches on rank zero, two on the other
    (tested,) = trainer.test(module, loader(5, batch_size=None))
    predicted = trainer.predict(module, loader(9))
    return {
        "within fit": within_fit, "seen": seen, "statistics": statistics, "validated": validated, "tested": tested,
        "seen later": module.seen, "predicted": torch.cat(predicted).tolist(),
    }  # fmt: skip


class Averaged(Model):
    """A module that logs its loss and statistics in evaluation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.mse_loss(self.net(batch[0]), batch[1]))
        self.log("statistics", self.net[1].get_buffer("running_mean").mean())

    test_step = validation_step


@check
def averaged(folder: Path) -> Any:
    """Evaluate the averages of weights and statistics, with the callback attached before and after the one that averages."""
    results = []
    for comes_first in (True, False):
        averages, processes = ExponentialMovingAverage(0.9), DistributedDataParallel(timeout=TIMEOUT)
        module = Averaged()
        trainer = new_trainer(*([processes, averages] if comes_first else [averages, processes]))
        trainer.fit(module, loader(), loader(8, shuffle=False))
        within_fit = plain(trainer.callback_metrics)
        statistics = averages.averages["net.1.running_mean"].mean()
        results.append([within_fit, *trainer.test(module, loader(8, shuffle=False)), float(statistics)])
    return results


@check
def resumed(folder: Path) -> Any:
    return resumptions(folder, "resume", Model)


def resumptions(folder: Path, name: str, make: Callable[[], Any]) -> Any:
    """Resume the run of a module from each of its safe points."""
    rank = dist.get_rank()
    paths: list[Path] = []

    def save(trainer: Any, event: Any) -> None:
        paths.append(folder / f"{name}-{len(paths)}-rank-{rank}.ckpt")
        trainer.save_checkpoint(paths[-1])

    module = make()
    trainer, batches = resumable()
    trainer.signals.safe_point.connect(save)
    torch.rand(rank)  # from here on each rank draws other numbers
    trainer.fit(module, batches)
    undisturbed, results = state(module, trainer.optimizers), []
    for path in paths:
        module = make()
        trainer, batches = resumable()
        torch.manual_seed(99 + rank)
        trainer.fit(module, batches, ckpt_path=path)
        results.append(state(module, trainer.optimizers))
    return {"undisturbed": undisturbed, "resumed": results, "written": [path.exists() for path in paths]}


class Finetuned(Model):
    """Trains its first layer from the second epoch on, in a parameter group of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[0].requires_grad_(True)
            self.optimizers().add_param_group({"params": self.net[0].parameters(), "lr": 0.001})

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([parameter for parameter in self.parameters() if parameter.requires_grad], lr=0.01)


@check
def finetuned(folder: Path) -> Any:
    return resumptions(folder, "finetuned", Finetuned)


@check
def overflow(folder: Path) -> Any:
    class Overflowing(Weighted):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            factor = 1e5 if batch_idx == 1 and self.global_rank == 1 else 1.0
            return self.net(batch[0]).pow(2).mean() * factor

    module, scaler = Overflowing(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    skipped: list[str] = []
    trainer = new_trainer(MixedPrecision("fp16", scaler=scaler), max_epochs=1)
    trainer.signals.optimizer_step_skipped.connect(lambda trainer, event: skipped.append(event.reason), weak=False)
    trainer.fit(module, loader(12))
    return {"state": state(module)["module"], "skipped": skipped, "scale": scaler.get_scale(), "updates": trainer.global_step}


class Endless:
    """A loader without a length."""

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
        trainer = new_trainer(counting, GradientAccumulation(2))
        trainer.fit(module, kind(weighted_batches()[: 5 + 2 * dist.get_rank()]))
        results.append({"state": state(module)["module"], "updates": trainer.global_step, "all-reduces": counting.reduced})
    return results


@check
def skipped(folder: Path) -> Any:
    """Skip the batch that closes the window: only rank one does so."""
    module = Weighted()
    trainer = new_trainer(DistributedDataParallel(shares_data=False, timeout=TIMEOUT), GradientAccumulation(2), max_epochs=1)

    def skip(trainer: Any, event: Any) -> None:
        if event.batch_idx == 1 and trainer.global_rank == 1:
            event.skip_batch()

    trainer.signals.train_batch_start.connect(skip)
    trainer.fit(module, weighted_batches()[dist.get_rank() : 4 : 2])
    return state(module)["module"]


@check
def thawed(folder: Path) -> Any:
    """Freeze a layer until the second epoch, and begin with other weights on rank one."""

    class Thawing(Model):
        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch > 0)

    module = Thawing()
    module.net[0].requires_grad_(False)
    with torch.no_grad():
        module.net[0].get_parameter("weight").add_(dist.get_rank())
    trainer = new_trainer()
    firsts: list[Any] = []

    def copy_first_layer(trainer: Any, event: Any) -> None:
        firsts.append(module.net[0].get_parameter("weight").detach().clone())

    trainer.signals.train_epoch_end.connect(copy_first_layer)
    trainer.fit(module, loader())
    wrapper = trainer.callback(DistributedDataParallel)._wrapper
    return {"weights": [each.detach() for each in module.net.parameters()], "firsts": firsts, "released": wrapper is None}


class Changing(LightningModule):
    """A module that freezes or thaws a layer at some place in the second batch.

    Args:
        freezes: Whether it freezes the layer.
        place: ``"before"`` the step, in the ``"step"``, or ``"after"`` it.
    """

    def __init__(self, freezes: bool, place: str) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.changed, self.last = nn.Linear(3, 4), nn.Linear(4, 1)
        self.changed.requires_grad_(freezes)
        self.freezes, self.place = freezes, place

    def change(self, place: str, batch_idx: int) -> None:
        if (place, batch_idx) == (self.place, 1):
            self.changed.requires_grad_(not self.freezes)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.change("before", batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.change("step", batch_idx)
        return self.last(self.changed(batch)).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.change("after", batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@check
def changed(folder: Path) -> Any:
    """Freeze or thaw a layer within an epoch, with windows of one to three batches; return the weights and those by hand."""
    xs = data(40).tensors[0].reshape(5, 2, 4, 3)  # by batch and rank
    results = []
    for freezes, place, size in itertools.product((False, True), ("before", "step", "after"), (1, 2, 3)):
        module, by_hand = Changing(freezes, place), Changing(freezes, place)
        callbacks = DistributedDataParallel(shares_data=False, timeout=TIMEOUT), GradientAccumulation(size)
        new_trainer(*callbacks, max_epochs=1).fit(module, list(xs[:, dist.get_rank()]))
        optimizer = by_hand.configure_optimizers()
        for index, (first, second) in enumerate(xs):
            by_hand.on_train_batch_start(first, index)
            losses = by_hand.training_step(first, index) + by_hand.training_step(second, index)
            (losses / 2 / min(size, 5 - index // size * size)).backward()
            by_hand.on_train_batch_end(None, first, index)
            if (index + 1) % size == 0 or index == 4:
                optimizer.step()
                optimizer.zero_grad()
        results.append([nn.utils.parameters_to_vector(each.parameters()).detach() for each in (module, by_hand)])
    return results


@check
def own_steps(folder: Path) -> Any:
    """Step in ``training_step``; return the weights and those by hand."""
    trained = train_own_steps(DistributedDataParallel(shares_data=False, timeout=TIMEOUT))
    return [[nn.utils.parameters_to_vector(each.parameters()).detach() for each in pair] for pair in trained]


@check
def refused(folder: Path) -> Any:
    """Collect the errors for runs in which the processes would wait for each other forever, or have different weights."""

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
            new_trainer().fit(module, batches)
        except MisconfigurationError as error:
            messages.append(str(error))
    return messages


@check
def preempted(folder: Path) -> Any:
    """Send a signal to rank one."""

    def signal_myself(trainer: Any, event: Any) -> None:
        if trainer.global_rank == 1 and event.batch_idx == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    trainer = new_trainer(Preemption(("SIGUSR1",)), default_root_dir=folder)
    trainer.signals.after_forward.connect(signal_myself)
    with contextlib.suppress(SystemExit):  # by which Preemption ends the process
        trainer.fit(Model(), loader())
    return {"batches": trainer.total_batch_idx, "saved": (folder / "checkpoints" / "interrupted.ckpt").exists()}


@check
def stopped(folder: Path) -> Any:
    """Have only rank one ask for the end."""
    results = []
    for ask in ("stop", "end_epoch", "gate"):

        def after(trainer: Any, event: Any, ask: str = ask) -> None:
            if trainer.global_rank == 1 and (trainer.current_epoch, event.batch_idx) == (1, 2) and ask != "gate":
                getattr(trainer, ask)("one rank asks for it")

        def before(trainer: Any, event: Any, ask: str = ask) -> None:
            if trainer.global_rank == 1 and (trainer.current_epoch, event.batch_idx) == (1, 3) and ask == "gate":
                event.end_epoch()

        trainer = new_trainer(max_epochs=3)
        trainer.signals.train_batch_end.connect(after)
        trainer.signals.train_batch_start.connect(before)
        trainer.fit(Model(), loader())
        results.append((trainer.current_epoch, trainer.global_step))
    return results


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    results = {name: CHECKS[name](folder) for name in names or CHECKS}
    torch.save(results, folder / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    main()
