"""Ask for the end, leave out losses and count exchanges, in each of several processes; the tests compare the results.

``PYTHONPATH=. torchrun --nproc-per-node 2 tests/callbacks/distributed/agreements.py FOLDER [few]``
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import Store
from torch.nn.parallel import DistributedDataParallel as Wrapper

from eventtrain import Callback, LightningModule, Trainer, decides_alike, events
from eventtrain.callbacks import (
    EarlyStopping,
    GradientAccumulation,
    GradientClipping,
    MixedPrecision,
    ModelCheckpoint,
    Preemption,
    TerminateOnNaN,
    Timer,
)
from eventtrain.callbacks.distributed import processes
from eventtrain.callbacks.distributed.distributed_data_parallel import DistributedDataParallel
from tests.callbacks.distributed.parts import SEED, TIMEOUT
from tests.kit import On

RANK = 0

# ------------------------------------------------------------------ requests

PLACES = (
    "fit_start", "train_start", "train_epoch_start", "train_batch_start", "before_forward", "before_backward",
    "before_optimizer_step", "after_update", "train_batch_end", "validation_start", "validation_batch_end", "validation_end",
    "safe_point", "request_stop", "take_checkpoint", "train_epoch_end",
)  # fmt: skip
"""The events at which a process asks for the end."""

ENDS = ("train_epoch_start", "train_batch_start", "train_batch_end", "validation_end", "safe_point", "train_epoch_end")
REQUESTS = [*((place, "stop") for place in PLACES), *((place, "end_epoch") for place in ENDS)]


class Small(LightningModule):
    """A module with dropout and buffers, which leaves out the losses of some batches.

    Args:
        nothing: The batches of the run without a loss, as ``(rank, index)``.
        weights: Whether each batch has a weight, its number plus one.
    """

    def __init__(self, nothing: Any = (), weights: bool = False) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.nothing, self.weights = nothing, weights

    def loss(self, batch: Any) -> Any:
        return self.net(batch).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        index, loss = self.trainer.total_batch_idx, self.loss(batch)
        if (RANK, index) in self.nothing:
            return None
        return {"loss": loss, "weight": float(index % 3 + 1 + RANK)} if self.weights else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def shares(batches: int = 8, size: int = 4) -> Any:
    """Return the batches of all ranks, by batch and rank."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return torch.randn(batches, ranks, size, 3, generator=torch.Generator().manual_seed(1))


def trainer_of(*callbacks: Any, **options: Any) -> Trainer:
    options = {"max_epochs": 1, "num_sanity_val_steps": 0, "device": "cpu", "default_callbacks": False, **options}
    distribution = DistributedDataParallel(shares_data=False, timeout=TIMEOUT)
    return Trainer(callbacks=[distribution, *callbacks], **options)


def asked_at(folder: Path, place: str, ask: str, askers: str, window: int = 1) -> Any:
    """Ask for the end at the fourth time that an event comes, or the first if it comes once or twice; return the end."""
    count = 0
    first = place in ("fit_start", "train_start", "train_epoch_start", "train_epoch_end")

    def request(trainer: Any, event: Any) -> None:
        nonlocal count
        count += 1
        if count == (1 if first else 4) and (askers == "all" or RANK == 1):
            if ask == "gate":
                event.end_epoch()
            else:
                getattr(trainer, ask)("enough")

    trainer = trainer_of(
        On(**{place: request}), GradientAccumulation(window), max_epochs=2, val_check_interval=2, default_root_dir=folder
    )
    validation = [torch.zeros(4, 3)] * 2 if "validation" in place else None
    trainer.fit(Small(), list(shares()[:, 0]), validation)
    return trainer.total_batch_idx, trainer.current_epoch, trainer.global_step, trainer.stop_reason is not None


OTHERS = (("train_batch_start", "gate"), ("train_batch_end", "interrupt"), ("safe_point", "interrupt"))
FEW = (("train_batch_end", "stop"), ("safe_point", "stop"), ("train_epoch_start", "end_epoch"), ("train_batch_start", "gate"))


def requests(folder: Path, askers: str, cases: Any = (*REQUESTS, *OTHERS)) -> Any:
    results: dict[Any, Any] = {(place, ask): asked_at(folder, place, ask, askers) for place, ask in cases}
    results["window"] = asked_at(folder, "train_batch_end", "stop", askers, window=4)
    return results


# ------------------------------------------------------------------ batches without a loss

NOTHING: dict[str, Any] = {
    "first of the run": [(0, 0)],
    "on rank one": [(1, 0), (1, 5)],
    "accumulating": [(1, 2)],
    "closing": [(0, 3), (1, 7)],
    "a whole window": [(1, 4), (1, 5), (1, 6), (1, 7)],
    "all": [(rank, index) for rank in range(4) for index in range(8)],
    "all in one window": [(rank, index) for rank in range(4) for index in range(4)],
    "many": [(0, 0), (1, 1), (0, 2), (1, 4), (0, 5), (1, 5), (1, 7)],
}
LOSSES = [*itertools.product(NOTHING, (1, 4), (False,)), *((name, 4, True) for name in NOTHING), ("many", 1, True)]
SKIPS = {"skip_batch": "train_batch_start", "after_forward": "after_forward"}


def by_hand(nothing: Any, window: int, weights: bool) -> Any:
    """Train with torch's wrapper; processes without a loss run zeros backward; gradients are rescaled by contributors."""
    module = Small()
    wrapper = Wrapper(module.net)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    contributed = torch.zeros(())
    for index, batch in enumerate(shares()[:, RANK]):
        closes = index % window == window - 1
        if index % window == 0:
            optimizer.zero_grad()
            contributed = torch.zeros(())
        wrapper.require_backward_grad_sync = closes
        loss = wrapper(batch).square().mean()
        weight = 0.0 if (RANK, index) in nothing else float(index % 3 + 1 + RANK) if weights else 1.0
        contributed = contributed + weight
        if weight or closes:
            (loss * (weight / window)).backward()
        if closes:
            dist.all_reduce(contributed)
            if contributed > 0:
                for parameter in module.parameters():
                    assert parameter.grad is not None
                    parameter.grad.mul_(window * dist.get_world_size() / contributed)
                optimizer.step()
    return vector(module)


def vector(module: Any) -> Any:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def without_losses(folder: Path, cases: Any = LOSSES) -> Any:
    results = {}
    for name, window, weights in cases:
        nothing = NOTHING[name]
        module = Small(nothing, weights)
        trainer = trainer_of(*([GradientAccumulation(window)] if window > 1 or weights else []))
        trainer.fit(module, list(shares()[:, RANK]))
        results[name, window, weights] = vector(module), by_hand(nothing, window, weights), trainer.global_step
    for (way, place), window, weights in itertools.product(SKIPS.items(), (1, 4), (False, True)):
        nothing = NOTHING["many"]

        def leave_out(trainer: Any, event: Any, nothing: Any = nothing, way: str = way) -> None:
            if (RANK, trainer.total_batch_idx) in nothing:
                if way == "skip_batch":
                    event.skip_batch()
                else:
                    event.loss = None

        module = Small(weights=weights)
        trainer_of(On(**{place: leave_out}), GradientAccumulation(window)).fit(module, list(shares()[:, RANK]))
        results[way, window, weights] = vector(module), by_hand(nothing, window, weights), 0
    return results


def on_device(folder: Path, cases: Any = LOSSES) -> Any:
    """Reduce the counts as on devices whose reduction the host does not wait for, instead of telling them in notices."""
    room: Any = processes
    original = room.Windows
    try:
        room.Windows = lambda notices, device: original(notices, torch.device("cpu"))
        return without_losses(folder, cases)
    finally:
        room.Windows = original


# ------------------------------------------------------------------ checkpoints by the clock


def minutes(folder: Path) -> Any:
    """Write a checkpoint by a clock that is past its time in the third batch, in one process or in all; return when."""

    class Noting(ModelCheckpoint):
        def is_due(self, trainer: Any, event: Any) -> bool:
            due = super().is_due(trainer, event)
            if due:
                noted.append((trainer.total_batch_idx, trainer.is_ending))
            return due

        def on_train_batch_end(self, trainer: Any, event: Any) -> None:
            if trainer.total_batch_idx == 2 and RANK in ranks:
                self._time -= 60

    results = {}
    for ranks, window in itertools.product(((0,), (1,), range(4)), (1, 4)):
        noted: list[Any] = []
        place = folder / f"minutes {ranks} {window}"
        trainer_of(Noting(place, every_n_minutes=1), GradientAccumulation(window)).fit(Small(), list(shares()[:, RANK]))
        dist.barrier()
        results[len(ranks), min(ranks), window] = noted, sorted(path.name for path in place.glob("*.ckpt"))
    return results


# ------------------------------------------------------------------ manual optimization


class Alternating(LightningModule):
    """A module whose layers get gradients in some processes only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.automatic_optimization = False
        self.layers = nn.ModuleList(nn.Linear(3, 1) for _ in range(4))
        self.exchanges: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        used = (0, 1) if RANK == 0 else (1, 2)
        self.manual_backward(sum(self.layers[index](batch).square().mean() for index in used))
        before = Count.collectives
        optimizer.step()
        self.exchanges.append(Count.collectives - before)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def manual(folder: Path) -> Any:
    module = Alternating()
    with Count():
        trainer_of().fit(module, list(shares(3)[:, RANK]))
    has_gradient = [layer.get_parameter("weight").grad is not None for layer in module.layers]
    other = Alternating()
    optimizer = other.configure_optimizers()
    for both in shares(3):
        optimizer.zero_grad()
        for rank, batch in enumerate(both):
            used = (0, 1) if rank == 0 else (1, 2)
            (sum(other.layers[index](batch).square().mean() for index in used) / 2).backward()
        optimizer.step()
    return vector(module), vector(other), has_gradient, module.exchanges


# ------------------------------------------------------------------ exchanges


class Count:
    """Counts collectives and calls of the store while it is entered.

    Attributes:
        collectives: The collectives of :mod:`torch.distributed` so far; those of torch's wrapper are made in C++, and not seen.
        stored: The calls of stores that send something.
    """

    collectives = 0
    stored = 0
    NAMES = (
        "all_reduce", "broadcast", "all_gather", "all_gather_object", "gather_object", "broadcast_object_list", "barrier",
        "reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "send", "recv", "isend", "irecv", "monitored_barrier",
    )  # fmt: skip

    def __enter__(self) -> Count:
        self.replaced = {name: getattr(dist, name) for name in self.NAMES}
        for name, function in self.replaced.items():
            setattr(dist, name, self.counting(function, "collectives"))
        self.of_store: Any = {name: getattr(Store, name) for name in ("set", "add", "get", "check", "compare_set")}
        prefix: Any = dist.distributed_c10d.PrefixStore
        for name in self.of_store:
            setattr(prefix, name, self.counting(self.of_store[name], "stored"))
        return self

    def counting(self, function: Callable[..., Any], counter: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            setattr(Count, counter, getattr(Count, counter) + 1)
            return function(*args, **kwargs)

        return call

    def __exit__(self, *error: object) -> None:
        for name, function in self.replaced.items():
            setattr(dist, name, function)
        prefix: Any = dist.distributed_c10d.PrefixStore
        for name in self.of_store:
            delattr(prefix, name)


class ClipOrSkip(Callback):
    """A policy that vetoes a step by its reduced gradients."""

    @decides_alike
    def on_before_optimizer_step(self, trainer: Trainer, event: events.BeforeOptimizerStep) -> None:
        norms = [parameter.grad.norm() for parameter in event.optimizer.parameters() if parameter.grad is not None]
        if torch.stack(norms).norm() > 1e6:
            event.skip("too large")


def exchanges(folder: Path) -> Any:
    """Return for several sets of callbacks how many exchanges there are from one batch's start to the next, in an epoch."""
    sets: dict[str, list[Any]] = {
        "none": [],
        "accumulation": [GradientAccumulation(4)],
        "typical": [
            Timer(3600), Preemption(), ModelCheckpoint(folder / "typical", every_n_minutes=60), EarlyStopping("val"),
            GradientAccumulation(2), GradientClipping(1.0), MixedPrecision("bf16"), TerminateOnNaN(every_n_batches=2),
            ClipOrSkip(),
        ],
        "fp16": [MixedPrecision("fp16", scaler=torch.amp.GradScaler("cpu", init_scale=64.0)), GradientAccumulation(2)],
    }  # fmt: skip
    results = {}
    for name, callbacks in sets.items():
        seen: list[tuple[int, int]] = []

        def note(trainer: Any, event: Any, seen: Any = seen) -> None:
            seen.append((Count.collectives, Count.stored))

        defaults = name == "typical"
        trainer = trainer_of(On(train_batch_start=note), *callbacks, default_callbacks=defaults, default_root_dir=folder / name)
        with Count():
            trainer.fit(Small(), list(shares(12)[:, RANK]))
        results[name] = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(seen)]
    return results


def main() -> None:
    global RANK
    folder = Path(sys.argv[1])
    trainer_of().fit(Small(), [torch.zeros(4, 3)])  # joins the others
    RANK = dist.get_rank()
    if sys.argv[2:] == ["few"]:
        results = {"one": requests(folder, "one", FEW), "all": requests(folder, "all", FEW)}
        few = [("many", 1, False), ("many", 4, True)]
        results |= {"without losses": without_losses(folder, few), "on the device": on_device(folder, few)}
        results |= {"manual": manual(folder), "exchanges": exchanges(folder), "minutes": minutes(folder)}
    else:
        results = {askers: requests(folder, askers) for askers in ("one", "all")}
        results |= {"without losses": without_losses(folder), "on the device": on_device(folder)}
    torch.save(results, folder / f"{RANK}.pt")


if __name__ == "__main__":
    main()
