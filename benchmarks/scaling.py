"""Count the exchanges, messages and bytes of a run in two and in four processes, and compute those of more.

A small run is counted in each phase: the start, a batch that accumulates, a batch that closes its window, an evaluation batch,
the rest of an evaluation, and a checkpoint; with ``DistributedDataParallel()`` and with ``FullyShardedDataParallel()``.
:class:`benchmarks.exchanges.Census` counts the exchanges, and the system counts the bytes that gloo writes. Formulas have to
give the same figures for two and for four processes; then they give those of 8, 256 and 4,096::

    python -m benchmarks.scaling          # half a minute
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.distributed import start
from benchmarks.exchanges import Census, written
from benchmarks.overhead import quiet
from benchmarks.report import environment, save
from docs.generate import ROOT
from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import DistributedDataParallel, FullyShardedDataParallel, GradientAccumulation

COUNTED, COMPUTED = (2, 3, 4), (8, 256, 4096)
WIDTH, BLOCKS = 516, 8
WINDOW, UPDATES, EVALUATED = 2, 6, 4
MEASURED = range(2, UPDATES, UPDATES - 3)
"""The updates after which the system's count is read."""
PRIMITIVE = 48_000
"""The bytes that each process gives to a single exchange."""
SETTLE = 0.05
"""Seconds after which gloo's threads have sent the last confirmations of an exchange."""
HEADER = 48
"""The bytes that gloo adds to each message."""
PHASES = ("start", "accumulating batch", "closing batch", "evaluation batch", "evaluation", "checkpoint")
ENGINES = {"DDP": DistributedDataParallel, "FSDP": FullyShardedDataParallel}


# ------------------------------------------------------------------ formulas: what the busiest process sends or receives

Traffic = tuple[float, float]
"""Bytes and messages."""


def ring(rounds: int, passed: float, processes: int) -> Traffic:
    """Return the traffic of an exchange that passes parts around a ring, each in two segments that are announced and confirmed.

    Args:
        rounds: How often the ring is passed: 2 for a reduction, 1 for a gathering.
        passed: The bytes that a process passes on to the next one.
        processes: The number of processes.
    """
    messages = 6 * rounds * (processes - 1)
    return passed + HEADER * messages, messages


def all_reduce(size: float, processes: int) -> Traffic:
    """Return the traffic of gloo's all-reduce, and of its reduce-scatter, which sends as much.

    Args:
        size: The bytes of the whole tensor.
        processes: The number of processes.
    """
    return ring(2, 2 * (processes - 1) / processes * size, processes)


def all_gather(size: float, processes: int) -> Traffic:
    """Return the traffic of gloo's all-gather.

    Args:
        size: The bytes of each process's part.
        processes: The number of processes.
    """
    return ring(1, (processes - 1) * size, processes)


def star(size: float, processes: int) -> Traffic:
    """Return the traffic of the first process in gloo's gather and scatter: each other process talks to it alone.

    Args:
        size: The bytes of each process's part.
        processes: The number of processes.
    """
    return (processes - 1) * (size + 2 * HEADER), 2 * (processes - 1)


def broadcast(size: float, processes: int) -> Traffic:
    """Return the traffic of the first process in gloo's broadcast, along a binary tree.

    Args:
        size: The bytes of the tensor.
        processes: The number of processes.
    """
    rounds = math.ceil(math.log2(processes))
    return rounds * (size + 2 * HEADER), 2 * rounds


def barrier(size: float, processes: int) -> Traffic:
    """Return the traffic of gloo's barrier, which takes rounds of three messages without content."""
    messages = 3 * math.ceil(math.log2(processes))
    return messages * HEADER, messages


FORMULAS: dict[str, Callable[[float, int], Traffic]] = {
    "allreduce": all_reduce,
    "reduce_scatter": all_reduce,
    "reduce_scatter_base": all_reduce,
    "allgather": all_gather,
    "allgather_base": all_gather,
    "gather": star,
    "scatter": star,
    "broadcast": broadcast,
    "barrier": barrier,
}


def traffic(counts: Mapping[str, float], processes: int) -> Traffic:
    """Return the bytes and messages of the busiest process for all exchanges of a phase.

    Args:
        counts: The exchanges, and the bytes that a process gives to them, as :class:`benchmarks.exchanges.Census` counts them.
        processes: The number of processes.
    """
    total, messages = 0.0, 0.0
    for name, number in counts.items():
        if name in FORMULAS:
            moved, sent = FORMULAS[name](counts.get(f"{name} bytes", 0) / number, processes)
            total, messages = total + number * moved, messages + number * sent
    return total, messages


def extrapolated(counted: Mapping[int, Mapping[str, float]], processes: int) -> dict[str, float]:
    """Return the exchanges of a phase for another number of processes.

    The number of exchanges does not depend on the number of processes. Of sharded weights, each process gives its part. Other
    sizes stay as they are, or grow with each process by as much as between the counted numbers of processes.

    Args:
        counted: The exchanges for two numbers of processes, as :func:`traffic` takes them.
        processes: The number of processes.
    """
    few, many = sorted(counted)
    result: dict[str, float] = {}
    for name in sorted(counted[few].keys() | counted[many].keys()):
        first, second = (counted[each].get(name, 0) for each in (few, many))
        if name == "allgather_base bytes":
            result[name] = first * few / processes
        elif second - first < first / 20:  # the lengths of pickled values differ by a few bytes
            result[name] = first
        else:
            result[name] = first + (second - first) / (many - few) * (processes - few)
    return result


def primitives(size: int) -> dict[str, Callable[[], object]]:
    """Return an exchange of each kind, by the name that a census gives it.

    Args:
        size: The bytes of the tensor that each process gives to it; a multiple of 4 for each process.
    """
    processes, first = dist.get_world_size(), dist.get_rank() == 0
    part = torch.zeros(size // 4)
    return {
        "allreduce": lambda: dist.all_reduce(part),
        "reduce_scatter_base": lambda: dist.reduce_scatter_tensor(torch.zeros(len(part) // processes), part),
        "allgather": lambda: dist.all_gather([torch.zeros_like(part) for _ in range(processes)], part),
        "allgather_base": lambda: dist.all_gather_into_tensor(torch.zeros(processes * len(part)), part),
        "gather": lambda: dist.gather(part, [torch.zeros_like(part) for _ in range(processes)] if first else None),
        "scatter": lambda: dist.scatter(torch.zeros_like(part), [part.clone() for _ in range(processes)] if first else None),
        "broadcast": lambda: dist.broadcast(part, 0),
        "barrier": lambda: dist.barrier(),
    }


# ------------------------------------------------------------------ the counted run


class Module(LightningModule):
    """A number of square layers without biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS)])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return a loss."""
        loss: Tensor = self.layers(batch).square().mean()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log a loss for the epoch."""
        self.log("val_loss", self.layers(batch).square().mean())

    def configure_optimizers(self) -> Any:
        """Return AdamW, whose state is two values for each parameter."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Batches(Dataset[Tensor]):
    """Equal batches that leave a mark in a census.

    Args:
        length: The number of batches of all processes.
        label: The label of the marks.
        census: The census.
    """

    def __init__(self, length: int, label: str, census: Census) -> None:
        self.length, self.label, self.census = length, label, census

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        self.census.mark(self.label)
        return torch.ones(2, WIDTH)


class Probe(Callback):
    """Marks the start of training and each evaluation, and saves a checkpoint after the last batch but one.

    Args:
        census: The census.
        folder: The folder of the checkpoint.
    """

    def __init__(self, census: Census, folder: Path) -> None:
        self.census, self.folder = census, folder
        self.sent: list[tuple[int, int]] = []

    def on_train_start(self, trainer: Trainer, event: Any) -> None:
        """Mark the start, and read the system's count."""
        self.census.mark("started")

    def on_safe_point(self, trainer: Trainer, event: Any) -> None:
        """Read the system's count before and after the measured updates, and save a checkpoint after them."""
        if trainer.window_open or event.epoch_end or trainer.global_step not in MEASURED:
            return
        if trainer.global_step == MEASURED.start:
            dist.barrier()
        time.sleep(SETTLE)
        self.sent.append(written())
        if trainer.global_step == MEASURED[-1]:
            self.census.mark("before checkpoint")
            trainer.save_checkpoint(self.folder / "one.ckpt")
            self.census.mark("checkpoint")

    def on_validation_start(self, trainer: Trainer, event: Any) -> None:
        """Mark it."""
        self.census.mark("evaluation")

    def on_validation_end(self, trainer: Trainer, event: Any) -> None:
        """Mark it."""
        self.census.mark("evaluated")


def count(engine: str, folder: Path) -> dict[str, Any]:
    """Train with one of the callbacks in this process, as all processes do at once, and return the counts of each phase."""
    census, processes = Census(), dist.get_world_size()
    probe = Probe(census, folder)
    train = DataLoader(Batches(WINDOW * UPDATES * processes, "batch", census), batch_size=None)
    evaluated = DataLoader(Batches(EVALUATED * processes, "evaluation batch", census), batch_size=None)
    trainer = Trainer(
        max_epochs=1,
        callbacks=[ENGINES[engine](), GradientAccumulation(WINDOW), probe],
        default_callbacks=False,
        device="cpu",
        default_root_dir=folder,
        num_sanity_val_steps=0,
    )
    with quiet(), census:
        census.mark("begin")
        trainer.fit(Module(), train, evaluated)
    batches = census.between("batch", "batch")
    first = dict(reversed(census.marks))
    evaluation_batch = census.between("evaluation batch", "evaluation batch")[-1]
    evaluation = first["evaluated"] - first["evaluation"]
    evaluation.subtract({name: EVALUATED * number for name, number in evaluation_batch.items()})
    before, after = probe.sent
    return {
        "start": census.between("begin", "started")[0],
        "accumulating batch": batches[WINDOW * 3],
        "closing batch": batches[WINDOW * 3 + 1],
        "evaluation batch": evaluation_batch,
        "evaluation": +evaluation,
        "checkpoint": census.between("before checkpoint", "checkpoint")[0],
        "sent per update": [(there - here) / (UPDATES - 3) for here, there in zip(before, after, strict=True)],
        "files": {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()},
    }


def count_primitives() -> dict[str, list[list[int]]]:
    """Return the bytes and messages that each process sends in an exchange of each kind."""
    counts = {}
    for name, exchange in primitives(PRIMITIVE).items():
        exchange()
        dist.barrier()
        time.sleep(SETTLE)
        before = written()
        exchange()
        time.sleep(SETTLE)
        mine = [after - first for first, after in zip(before, written(), strict=True)]
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, mine)
        counts[name] = everybody
    return counts


def work(path: Path, begun: float) -> None:
    """Count in one of the processes, and let the first one write the figures to a file."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    figures: dict[str, Any] = {"seconds to join": time.time() - begun}
    torch.set_num_threads(1)
    figures["primitives"] = count_primitives()
    with tempfile.TemporaryDirectory() as name:
        shared = [name]
        dist.broadcast_object_list(shared)
        for engine in ENGINES:
            folder = Path(shared[0]) / engine
            folder.mkdir(exist_ok=True)
            figures[engine] = count(engine, folder)
            dist.barrier()
    figures["connections"] = sockets()
    if dist.get_rank() == 0:
        path.write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def sockets() -> int:
    """Return the number of connections that this process holds to others over TCP."""
    connections = psutil.Process().net_connections("tcp")
    return sum(each.status == psutil.CONN_ESTABLISHED for each in connections)


def counted(processes: int) -> dict[str, Any]:
    """Return the figures of a run in a number of processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        start("benchmarks.scaling", ["--figures", str(path), "--begun", str(time.time())], processes)
        figures: dict[str, Any] = json.loads(path.read_text())
    return figures


# ------------------------------------------------------------------ the report


def table(figures: Mapping[int, Any], engine: str) -> str:
    """Return the traffic of each phase as a Markdown table.

    Args:
        figures: The counted figures, by the number of processes.
        engine: A key of :data:`ENGINES`.
    """
    numbers = (*COUNTED, *COMPUTED)
    lines = [f"| {engine} | exchanges | {' | '.join(f'{number:,} processes' for number in numbers)} |"]
    lines.append("|" + "---|" * (len(numbers) + 2))
    for phase in PHASES:
        known = {number: figures[number][engine][phase] for number in COUNTED}
        kinds = ", ".join(f"{number} {name}" for name, number in known[COUNTED[0]].items() if "bytes" not in name) or "none"
        cells = []
        for number in numbers:
            counts = known[number] if number in known else extrapolated(first_and_last(known), number)
            moved, messages = traffic(counts, number)
            cells.append(f"{messages:,.0f}, {in_units(moved)}" if messages else "0")
        lines.append(f"| {phase} | {kinds} | {' | '.join(cells)} |")
    sizes = {number: {name: sum_of(figures[number][engine]["files"], name) for name in ("", ".ckpt")} for number in COUNTED}
    for title, name in (("bytes on the disk", ""), ("of them in the checkpoint's own file", ".ckpt")):
        known = {number: {"size": sizes[number][name]} for number in COUNTED}
        cells = [
            in_units((known[number] if number in known else extrapolated(first_and_last(known), number))["size"])
            for number in numbers
        ]
        lines.append(f"| {title} | | {' | '.join(cells)} |")
    return "\n".join(lines)


def first_and_last(known: Mapping[int, Any]) -> dict[int, Any]:
    """Return the figures of the fewest and of the most processes that were counted."""
    return {number: known[number] for number in (min(known), max(known))}


def sum_of(files: Mapping[str, int], ending: str) -> int:
    """Return the bytes of the files whose name has an ending."""
    return sum(size for name, size in files.items() if name.endswith(ending))


def in_units(size: float) -> str:
    """Return a number of bytes for people."""
    power = min(3, int(math.log10(max(1.0, size)) / 3))
    return f"{size / 1000**power:.4g} {('B', 'kB', 'MB', 'GB')[power]}"


def report(figures: Mapping[int, Any]) -> str:
    """Return the tables, and the costs of a start."""
    starts = ["| a start | " + " | ".join(f"{number} processes" for number in COUNTED) + " |", "|---|" + "---|" * len(COUNTED)]
    seconds = " | ".join(f"{figures[number]['seconds to join']:.1f} s" for number in COUNTED)
    starts.append(f"| from torchrun's start until all have joined | {seconds} |")
    connections = " | ".join(str(figures[number]["connections"]) for number in COUNTED)
    starts.append(f"| TCP connections of the first process | {connections} |")
    return "\n\n".join([*(table(figures, engine) for engine in ENGINES), "\n".join(starts)])


def main(arguments: list[str] | None = None) -> None:
    """Count, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="rewrite docs/scaling.md, and the JSON of all figures")
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.figures is not None:
        return work(options.figures, options.begun)
    facts = environment() | {"parameters": BLOCKS * WIDTH**2}
    print(", ".join(f"{name}: {value}" for name, value in facts.items()), file=sys.stderr)
    figures = {processes: counted(processes) for processes in COUNTED}
    text = report(figures)
    print(f"\n{text}")
    if options.save:
        save("scaling", text, facts, figures, page=ROOT / "docs" / "scaling.md")
    return None


if __name__ == "__main__":
    main()
