"""Measure the time that eventtrain adds to a batch in two processes, beside a hand-written loop.

Two processes train over gloo, each on one core. The hand-written loop uses torch's ``DistributedDataParallel``, its
``no_sync`` and a ``DistributedSampler``; eventtrain gets a plain loader and ``DistributedDataParallel()``. Both train in the
same processes and take turns: eventtrain's data set runs a block of the hand-written loop before each block of its own. A time
is divided by the mean of the hand-written blocks before and after it, and the table shows the median of these ratios over all
rounds, with the ratio of the hand-written blocks to each other, which is the noise. In the end parameters are compared.

Some blocks run with a latency in every control exchange: see :class:`benchmarks.exchanges.Latency`, which delays each
collective that Python code asks a process group for, and each request to a store, but not the reduction of gradients, which
torch's wrapper begins in C++::

    python -m benchmarks.distributed            # about five minutes
    python -m benchmarks.distributed --quick    # half a minute, with more noise
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as TorchDistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from benchmarks.exchanges import Latency, processor
from benchmarks.overhead import quiet
from benchmarks.report import environment, save
from eventtrain import LightningModule, Trainer
from eventtrain.callbacks import (
    DistributedDataParallel,
    GradientAccumulation,
    GradientClipping,
    LearningRateMonitor,
    LRSchedulerStepping,
    ModelCheckpoint,
    Preemption,
    ProgressBar,
    TensorBoardLogger,
    TerminateOnNaN,
    Timer,
)

LATENCIES = (0.0, 0.001, 0.004)
WARM_UP = 2
"""The number of blocks of each loop that are not measured."""
CLIP, LOG_EVERY = 0.25, 50
MOST_RATIO, MOST_ADDED, MOST_SHARE, MOST_LATENCY = 1.03, 25.0, 0.05, 300.0
"""The aims: the ratio of long steps; the microseconds, and the share of the step, added to a short one; and the microseconds
that a latency of 4 ms adds to a step of 5 ms."""


@dataclass(frozen=True)
class Size:
    """A network, and a number of batches in a block that takes some 50 ms.

    Attributes:
        width: The features of each layer.
        depth: The number of hidden layers.
        samples: The samples of a batch.
        block: The batches in a block.
    """

    width: int
    depth: int
    samples: int
    block: int


LONGEST = 3600.0
"""The longest time that the processes of a benchmark may take, in seconds."""
SIZES = {"1 ms": Size(16, 1, 16, 40), "5 ms": Size(128, 4, 128, 12), "20 ms": Size(256, 4, 256, 4)}


@dataclass(frozen=True)
class Setting:
    """What both loops do.

    Attributes:
        size: A key of :data:`SIZES`.
        accumulate: The number of batches per update; 0 for evaluation.
        usual: Whether eventtrain has the usual callbacks and the hand-written loop does their work; else both are bare.
    """

    size: str
    accumulate: int
    usual: bool

    @property
    def evaluates(self) -> bool:
        """Whether batches are evaluated."""
        return self.accumulate == 0


@dataclass
class Result:
    """The times of a setting, of the slower process in each block, in microseconds per batch.

    Attributes:
        setting: The setting.
        equal: Whether both loops end with the same bits in all processes.
        by_hand: The hand-written loop: one block more than eventtrain has.
        ours: eventtrain's blocks. The latency changes from block to block, in the order of :data:`LATENCIES`.
    """

    setting: Setting
    equal: bool
    by_hand: list[float]
    ours: list[float] = field(default_factory=list)

    def around(self) -> list[float]:
        """Return for each block of eventtrain the mean of the hand-written blocks before and after it."""
        return [(before + after) / 2 for before, after in itertools.pairwise(self.by_hand)]

    def ratio(self, latency: float) -> float:
        """Return the median of eventtrain's times over those of the hand-written loop."""
        return statistics.median(mine / theirs for mine, theirs in self._pairs(latency))

    def added(self, latency: float) -> float:
        """Return the median of the microseconds that eventtrain adds to a batch."""
        return statistics.median(mine - theirs for mine, theirs in self._pairs(latency))

    def beyond_share(self) -> float:
        """Return the microseconds that eventtrain adds to a batch beyond the share that a short step may take longer."""
        return self.added(0.0) - MOST_SHARE * statistics.median(self.by_hand)

    def late(self) -> float:
        """Return the microseconds that the longest latency adds to a batch."""
        return self.added(LATENCIES[-1]) - self.added(0.0)

    def noise(self) -> float:
        """Return the median of hand-written blocks over their neighbours, which differs from 1 by chance."""
        blocks = self.by_hand
        return statistics.median(2 * mine / (a + b) for a, mine, b in zip(blocks, blocks[1:], blocks[2:], strict=False))

    def _pairs(self, latency: float) -> list[tuple[float, float]]:
        at = LATENCIES.index(latency)
        return list(zip(self.ours, self.around(), strict=True))[at :: len(LATENCIES)]


# ------------------------------------------------------------------ the work


def make_network(size: Size) -> nn.Module:
    """Return a network, with the same weights at each call."""
    torch.manual_seed(0)
    layers = [each for _ in range(size.depth) for each in (nn.Linear(size.width, size.width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(size.width, 1))


def make_scheduler(optimizer: Any) -> torch.optim.lr_scheduler.LRScheduler:
    """Return one cycle over more updates than any run has."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=1_000_000, cycle_momentum=False)


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Batches ``(inputs, targets)``, of which there are only a few different ones.

    Args:
        size: The size of the work.
        length: The number of batches.
        before_each: Called before a batch is handed out.
    """

    def __init__(self, size: Size, length: int, before_each: Callable[[], None] = lambda: None) -> None:
        generator = torch.Generator().manual_seed(1)
        few = [torch.randn(32, size.samples, width, generator=generator) for width in (size.width, 1)]
        self.few = list(zip(*few, strict=True))
        self.length, self.before_each = length, before_each

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.before_each()
        return self.few[index % len(self.few)]


class Module(LightningModule):
    """The network with the steps that a trainer calls.

    Args:
        size: The size of the work.
        logs: Whether the training loss is logged.
    """

    def __init__(self, size: Size, logs: bool) -> None:
        super().__init__()
        self.network, self.logs = make_network(size), logs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        loss = F.mse_loss(self.network(x), y)
        if self.logs:
            self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss of a batch for the epoch."""
        x, y = batch
        self.log("val_loss", F.mse_loss(self.network(x), y), batch_size=len(x))

    def configure_optimizers(self) -> Any:
        """Return SGD, the cheapest optimizer, and a cycle of rates if the loss is logged."""
        optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01)
        if not self.logs:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make_scheduler(optimizer), "interval": "step"}}


# ------------------------------------------------------------------ the hand-written loops


def train_by_hand(setting: Setting, network: nn.Module, data: DataLoader[Any], folder: Path) -> Iterator[None]:
    """Train by hand, and pause after each batch."""
    wrapper = TorchDistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    usual = UsualWork(optimizer, folder, len(data)) if setting.usual else None
    network.train()
    for index, (x, y) in enumerate(data):
        closes = (index + 1) % setting.accumulate == 0
        with contextlib.nullcontext() if closes else wrapper.no_sync():
            loss = F.mse_loss(wrapper(x), y)
            if index % setting.accumulate == 0:
                optimizer.zero_grad()
            torch.autograd.backward(loss if setting.accumulate == 1 else loss / setting.accumulate)
        if closes:
            if usual is not None:
                nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
            if usual is not None:
                usual.after_update(loss)
        if usual is not None:
            usual.after_batch()
        yield


class UsualWork:
    """The work of the usual callbacks, by hand: a schedule, event files and a bar.

    Args:
        optimizer: The optimizer.
        folder: The folder of the event files.
        batches: The length of the bar.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, folder: Path, batches: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.optimizer, self.scheduler, self.steps = optimizer, make_scheduler(optimizer), 0
        first = dist.get_rank() == 0
        self.writer, self.bar = SummaryWriter(str(folder)) if first else None, tqdm(total=batches, disable=not first)

    def after_update(self, loss: Tensor) -> None:
        """Write loss and rate every 50 updates, and step the schedule."""
        self.steps += 1
        if self.writer is not None and self.steps % LOG_EVERY == 0:
            value = loss.item()
            self.writer.add_scalar("loss", value, self.steps)
            self.writer.add_scalar("lr", self.optimizer.param_groups[0]["lr"], self.steps)
            self.bar.set_postfix(loss=value)
        self.scheduler.step()

    def after_batch(self) -> None:
        """Move the bar."""
        self.bar.update()


def evaluate_by_hand(network: nn.Module, data: DataLoader[Any], total: Tensor) -> Iterator[None]:
    """Evaluate by hand, and pause after each batch; the sums of losses and samples are added to ``total``."""
    for x, y in data:
        network.eval()
        with torch.no_grad():
            total[0] += F.mse_loss(network(x), y) * len(x)
            total[1] += len(x)
        yield


# ------------------------------------------------------------------ taking turns


class Turns:
    """Lets two loops take turns in one process, in blocks.

    Args:
        by_hand: Makes the hand-written loop, which pauses after each batch.
        block: The number of batches in a block.
        rounds: The number of measured blocks of eventtrain with each latency.
        latency: The latency of exchanges.
    """

    def __init__(self, by_hand: Callable[[], Iterator[None]], block: int, rounds: int, latency: Latency) -> None:
        self._make, self.block, self.latency = by_hand, block, latency
        self.order = [0.0] * WARM_UP + list(LATENCIES) * rounds
        self.by_hand: list[float] = []
        self.ours: list[float] = []
        self._loop: Iterator[None] | None = None
        self._handed_out = 0
        self._began = 0.0

    @property
    def batches(self) -> int:
        """The batches of each loop: in the end eventtrain trains a block that is not measured, so that both do the same."""
        return self.block * (len(self.order) + 1)

    def before_batch(self) -> None:
        """Run a block of the hand-written loop if eventtrain's block is over."""
        if self._handed_out % self.block == 0 and len(self.by_hand) <= len(self.order):
            self._switch()
        self._handed_out += 1

    def _switch(self) -> None:
        if self._handed_out:
            self.ours.append(time.perf_counter() - self._began)
        self.latency.seconds = 0.0
        if self._loop is None:
            self._loop = self._make()
        dist.barrier()
        began = time.perf_counter()
        for _ in itertools.islice(self._loop, self.block):
            pass
        self.by_hand.append(time.perf_counter() - began)
        dist.barrier()
        if len(self.ours) < len(self.order):
            self.latency.seconds = self.order[len(self.ours)]
        self._began = time.perf_counter()

    def result(self, setting: Setting, equal: bool) -> Result:
        """Return the times of the slower process, without the warm-up."""
        times = torch.tensor([self.by_hand[WARM_UP:], [*self.ours[WARM_UP:], 0.0]], dtype=torch.float64)
        verdict = torch.tensor(equal, dtype=torch.uint8)
        dist.all_reduce(times, dist.ReduceOp.MAX)
        dist.all_reduce(verdict, dist.ReduceOp.MIN)
        per_batch = (times * 1e6 / self.block).tolist()
        return Result(setting, bool(verdict), per_batch[0], per_batch[1][:-1])


def usual_callbacks(setting: Setting, folder: Path) -> list[Any]:
    """Return the usual callbacks; those that could ask the other processes in each batch are among them."""
    return [
        GradientClipping(CLIP),
        LRSchedulerStepping(),
        LearningRateMonitor(),
        TensorBoardLogger(folder, log_every_n_steps=LOG_EVERY),
        ProgressBar(),
        ModelCheckpoint(folder, every_n_minutes=600),
        Timer(36_000),
        Preemption(),
        TerminateOnNaN(),
    ]


def measure(setting: Setting, rounds: int, latency: Latency, folder: Path) -> Result:
    """Let both loops take turns in this process, as all processes do at once, and return the times."""
    size, distribution = SIZES[setting.size], DistributedDataParallel()
    network, total = make_network(size), torch.zeros(2)

    def by_hand() -> Iterator[None]:
        seed = distribution.state_dict()["seeds"][0]
        length = turns.batches * dist.get_world_size()
        sampler: Any = DistributedSampler(Batches(size, length), shuffle=not setting.evaluates, seed=seed)
        loader = DataLoader(Batches(size, length), batch_size=None, sampler=sampler)
        if setting.evaluates:
            return evaluate_by_hand(network, loader, total)
        return train_by_hand(setting, network, loader, folder / "by_hand")

    turns = Turns(by_hand, size.block, rounds, latency)
    timed = Batches(size, turns.batches * dist.get_world_size(), turns.before_batch)
    few = DataLoader(Batches(size, dist.get_world_size()), batch_size=None, shuffle=True)
    callbacks = [distribution, *(usual_callbacks(setting, folder / "ours") if setting.usual else [])]
    if setting.accumulate > 1:
        callbacks.append(GradientAccumulation(setting.accumulate))
    module = Module(size, setting.usual)
    trainer = Trainer(
        max_epochs=1,
        callbacks=callbacks,
        default_callbacks=False,
        device="cpu",
        default_root_dir=folder,
        num_sanity_val_steps=0,
        seed=3,
    )
    with quiet():
        if setting.evaluates:
            trainer.fit(module, few, DataLoader(timed, batch_size=None))
        else:
            trainer.fit(module, DataLoader(timed, batch_size=None, shuffle=True))
    latency.seconds = 0.0
    if setting.evaluates:  # the hand-written loop has evaluated other weights
        dist.all_reduce(total)
        equal = int(total[1]) == timed.length * size.samples and "val_loss" in trainer.callback_metrics
    else:
        pairs = zip(module.network.parameters(), network.parameters(), strict=True)
        equal = all(torch.equal(mine, theirs) for mine, theirs in pairs)
    return turns.result(setting, equal)


# ------------------------------------------------------------------ the report


def table(results: list[Result], title: str) -> str:
    """Return the results as a Markdown table."""
    evaluates = results[0].setting.evaluates
    names = [f"{1e3 * latency:.0f} ms" for latency in LATENCIES]
    lines = [
        f"| {title} | {'' if evaluates else 'window | '}callbacks | by hand, us | by hand, again |"
        f" {' | '.join(f'ratio, {name}' for name in names)} | added us | added by {names[-1]}, us |"
        + ("" if evaluates else " parameters |"),
    ]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    for result in results:
        setting = result.setting
        cells = [
            setting.size,
            *([] if evaluates else [str(setting.accumulate)]),
            "usual" if setting.usual else "bare",
            f"{statistics.median(result.by_hand):.0f}",
            f"{result.noise():.3f}",
            *(f"{result.ratio(latency):.3f}" for latency in LATENCIES),
            f"{result.added(0.0):+.0f}",
            f"{result.late():+.0f}",
            *([] if evaluates else ["equal" if result.equal else "differ"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def aims(results: list[Result]) -> str:
    """Return a list of the aims: the worst setting of each, and whether it is reached."""
    lines = []
    for usual, rows in ((False, "bare"), (True, "usual callbacks")):
        chosen = [result for result in results if result.setting.usual == usual]
        long = [(each.ratio(0.0), each) for each in chosen if each.setting.size != "1 ms"]
        short = [(each.beyond_share(), each) for each in chosen if each.setting.size == "1 ms"]
        late = [(each.late(), each) for each in chosen if each.setting.size == "5 ms"]
        for aim, most, values in (
            (f"long steps: a ratio of at most {MOST_RATIO}", MOST_RATIO, long),
            (f"1 ms: beyond {MOST_SHARE:.0%}, at most {MOST_ADDED:.0f} us", MOST_ADDED, short),
            (f"5 ms: a latency of 4 ms adds at most {MOST_LATENCY:.0f} us", MOST_LATENCY, late),
        ):
            if values:
                value, worst = max(values, key=lambda each: each[0])
                missed = sum(each > most for each, _ in values)
                verdict = f"missed in {missed} of {len(values)}" if missed else "reached"
                lines.append(f"- {rows}, {aim}: {verdict}; the worst is {value:.4g} ({name_of(worst)}).")
    return "\n".join(lines)


def name_of(result: Result) -> str:
    """Return a short name of a result's setting."""
    setting = result.setting
    kind = "evaluation" if setting.evaluates else f"a window of {setting.accumulate}"
    return f"{setting.size}, {kind}"


def report(results: list[Result]) -> str:
    """Return both tables and the aims."""
    training = [result for result in results if not result.setting.evaluates]
    evaluation = [result for result in results if result.setting.evaluates]
    parts = [table(training, "training")] if training else []
    parts += [table(evaluation, "evaluation")] if evaluation else []
    return "\n\n".join([*parts, aims(results)])


# ------------------------------------------------------------------ two processes


def work(options: argparse.Namespace) -> None:
    """Measure in one of the processes, and let the first one write the results to a file."""
    dist.init_process_group("gloo")
    processor()
    settings = [
        Setting(size, accumulate, usual)
        for size in options.sizes
        for accumulate in options.windows
        for usual in ((False, True) if options.rows == "both" else (options.rows == "usual",))
    ]
    results = []
    with Latency() as latency, tempfile.TemporaryDirectory() as name:
        for number, setting in enumerate(settings):
            folder = Path(name) / str(number)
            results.append(measure(setting, options.rounds, latency, folder))
            if dist.get_rank() == 0:
                print(f"{setting}: {results[-1].ratio(0.0):.3f}", file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        Path(options.results).write_text(json.dumps([asdict(result) for result in results]))
    dist.destroy_process_group()


def start(module: str, arguments: list[str], processes: int) -> None:
    """Run a module in several processes, under torchrun.

    Args:
        module: The name of the module.
        arguments: Its arguments.
        processes: The number of processes.

    Raises:
        subprocess.TimeoutExpired: If they take longer than :data:`LONGEST`.
        subprocess.CalledProcessError: If one fails.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, "-W", "ignore", *torchrun, "-m", module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(command, env=environment) as process:
        try:
            code = process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes
            raise
    if code != 0:
        raise subprocess.CalledProcessError(code, command)


def main(arguments: list[str] | None = None) -> None:
    """Measure in two processes, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--windows", nargs="+", type=int, default=[1, 4, 0], help="batches per update; 0 for evaluation")
    parser.add_argument("--rows", choices=("both", "bare", "usual"), default="both")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="measure a few rounds")
    parser.add_argument("--save", action="store_true", help="rewrite docs/performance.md and its JSON")
    parser.add_argument("--results", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = 4
    if options.results is not None:
        return work(options)

    torch.set_num_threads(1)
    facts = environment() | {"processes": 2, "rounds": options.rounds}
    print(", ".join(f"{name}: {value}" for name, value in facts.items()), file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        start("benchmarks.distributed", [*(sys.argv[1:] if arguments is None else arguments), "--results", str(path)], 2)
        figures = json.loads(path.read_text())
    results = [Result(**{**each, "setting": Setting(**each["setting"])}) for each in figures]
    text = report(results)
    print(f"\n{text}")
    if options.save:
        save("distributed", text, facts, figures)
    return None


if __name__ == "__main__":
    main()
