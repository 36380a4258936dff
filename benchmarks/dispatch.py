"""Measure the cost of an event by its number of listeners, a phase, ``self.log``, and a batch that only accumulates.

Each is timed as the loop does it, with the guard and the payload. Repetitions are interleaved, and the least time of all
repetitions counts, less the time of an empty loop::

    python -m benchmarks.dispatch
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import blinker
import torch
from torch import Tensor, nn

from benchmarks.contestants.ours import Module
from benchmarks.overhead import pin
from benchmarks.report import environment, save
from benchmarks.work import Batches, Setting, make_loss, make_model, make_optimizer, parameters
from eventtrain import Callback, Trainer
from eventtrain.callbacks import GradientAccumulation
from eventtrain.events import AfterBackward, BeforeBackward

LISTENERS = (0, 1, 5, 20, 100)
MOST_WITHOUT_LISTENERS = 0.05
"""The microseconds that an event without listeners may cost."""
MOST_PER_LISTENER = 0.5
"""The microseconds that each listener after the first may cost."""
ACCUMULATING = Setting("accumulating", 400, accumulate=4)

Turns = Callable[[int], None]
"""A function that does one thing a number of times."""


# ------------------------------------------------------------------ timing


def seconds(turns: Turns, times: int) -> float:
    """Return the seconds that a number of turns take."""
    start = time.perf_counter()
    turns(times)
    return time.perf_counter() - start


def microseconds(ways: dict[str, Turns], empty: Turns, repetitions: int) -> dict[str, float]:
    """Return the least time of one turn in each way, less the time of an empty turn.

    Args:
        ways: The functions that are compared, by name.
        empty: The same loop with an empty body.
        repetitions: How often each is timed, in turn.
    """
    compared = {"": empty, **ways}
    times = {name: max(int(2e-3 / (seconds(turns, 100) / 100)), 10) for name, turns in compared.items()}
    least = dict.fromkeys(compared, float("inf"))
    with without_collection():
        for _ in range(repetitions):
            for name, turns in compared.items():
                least[name] = min(least[name], seconds(turns, times[name]) / times[name])
    return {name: max(least[name] - least[""], 0.0) * 1e6 for name in ways}


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Turn the garbage collector off, so that it interrupts no turn."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def nothing(times: int) -> None:
    """Run the loop of a turn with an empty body."""
    for _ in range(times):
        pass


# ------------------------------------------------------------------ events


class Listener(Callback):
    """Listens to two events, and does nothing."""

    def on_after_backward(self, trainer: Trainer, event: AfterBackward) -> None:
        """Do nothing."""

    def on_before_backward(self, trainer: Trainer, event: BeforeBackward) -> None:
        """Enter nothing."""


class Entering(Callback):
    """Enters a context manager that does nothing."""

    context: Any = contextlib.nullcontext()

    def on_before_backward(self, trainer: Trainer, event: BeforeBackward) -> None:
        """Enter the context manager."""
        event.enter(self.context)


def trainer_with(*callbacks: Any) -> Trainer:
    """Return a trainer with these callbacks and no others."""
    return Trainer(max_epochs=1, callbacks=callbacks, default_callbacks=False, device="cpu")


def publishing(listeners: int) -> Turns:
    """Return turns that publish an event as the loop does."""
    signals, loss = trainer_with(*(Listener() for _ in range(listeners))).signals.table, torch.ones(())

    def turns(times: int) -> None:
        for _ in range(times):
            if signals.after_backward.listeners:
                signals.after_backward.publish(AfterBackward(loss))

    return turns


def sending(listeners: int) -> Turns:
    """Return turns that use ``send`` of blinker, behind the guard that its documentation recommends."""
    signals, sender, loss = SimpleNamespace(after_backward=blinker.Signal()), object(), torch.ones(())
    for _ in range(listeners):
        signals.after_backward.connect(Listener().on_after_backward, weak=False)

    def turns(times: int) -> None:
        for _ in range(times):
            if signals.after_backward.receivers:
                signals.after_backward.send(sender, event=AfterBackward(loss))

    return turns


def spanning(*callbacks: Any) -> Turns:
    """Return turns that open an empty phase as the loop does."""
    signals, loss = trainer_with(*callbacks).signals.table, torch.ones(())

    def turns(times: int) -> None:
        for _ in range(times):
            if signals.before_backward.listeners:
                with BeforeBackward(loss, loss) as phase:
                    signals.before_backward.publish(phase)

    return turns


def slope(costs: dict[int, float], listeners: tuple[int, ...]) -> float:
    """Return the microseconds that one more listener costs, fitted over these numbers of listeners."""
    return statistics.linear_regression(listeners, [costs[count] for count in listeners]).slope


def measure_events(repetitions: int) -> dict[str, dict[int, float]]:
    """Return the microseconds by number of listeners, for eventtrain's signals and for ``send`` of blinker."""
    kinds = {"an event": publishing, "blinker's `Signal.send`": sending}
    ways = {f"{kind} {count}": make(count) for kind, make in kinds.items() for count in LISTENERS}
    times = microseconds(ways, nothing, repetitions)
    return {kind: {count: times[f"{kind} {count}"] for count in LISTENERS} for kind in kinds}


def events_table(measured: dict[str, dict[int, float]]) -> str:
    """Return the table of events, with the cost of one more listener."""
    heads = ["us, by number of listeners", *map(str, LISTENERS), "one more, from 1 to 20", "one more, from 20 to 100"]
    lines = [row(heads), row(["---"] * len(heads))]
    for kind, costs in measured.items():
        slopes = [slope(costs, (1, 5, 20)), slope(costs, (20, 100))]
        lines.append(row([kind, *(f"{costs[count]:.3f}" for count in LISTENERS), *(f"{each:.3f}" for each in slopes)]))
    ours = measured["an event"]
    silent, each = ours[0], max(slope(ours, (1, 5, 20)), slope(ours, (20, 100)))
    lines += [
        "",
        f"Without listeners: {silent:.3f} us, {verdict(silent, MOST_WITHOUT_LISTENERS)}. Each listener beyond the first: "
        f"{each:.3f} us, {verdict(each, MOST_PER_LISTENER)}.",
    ]
    return "\n".join(lines)


def verdict(cost: float, most: float) -> str:
    """Return whether a cost is within its target, in words."""
    return f"within the {most} us aimed for" if cost <= most else f"over the {most} us aimed for"


def row(cells: list[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def measure_phases(repetitions: int) -> dict[str, float]:
    """Return the microseconds of a phase, by its listeners."""
    ways = {
        "no listener": spanning(),
        "a listener that enters nothing": spanning(Listener()),
        "a listener that enters a context manager": spanning(Entering()),
        "two that enter one": spanning(Entering(), Entering()),
    }
    return microseconds(ways, nothing, repetitions)


# ------------------------------------------------------------------ self.log


class LoggingModule(Module):
    """Times ``self.log`` in a training step, because it needs the metrics and the batch of a run.

    Attributes:
        least: The least microseconds of each way.
    """

    calls = 100

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.least: dict[str, float] = {}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Log the loss of a batch in every way, and return it."""
        loss = super().training_step(batch, batch_idx)
        for name, call in self.ways(loss).items():
            start = time.perf_counter()
            for _ in range(self.calls):
                call()
            took = (time.perf_counter() - start) / self.calls * 1e6
            self.least[name] = min(self.least.get(name, took), took)
        return loss

    def ways(self, loss: Tensor) -> dict[str, Callable[[], Any]]:
        """Return the calls that are compared, by name; under the empty name, an empty call."""
        three = {"three a": loss, "three b": loss, "three c": loss}
        return {
            "": lambda: None,
            "`loss.detach()`, for comparison": loss.detach,
            "`on_step=True`, the default": lambda: self.log("step", loss),
            "`on_epoch=True`": lambda: self.log("epoch", loss, on_step=False, on_epoch=True),
            "`on_step=True, on_epoch=True`": lambda: self.log("both", loss, on_step=True, on_epoch=True),
            "`on_epoch=True, batch_size=16`": lambda: self.log("sized", loss, on_step=False, on_epoch=True, batch_size=16),
            '`on_epoch=True, reduce_fx="max"`': lambda: self.log("most", loss, on_step=False, on_epoch=True, reduce_fx="max"),
            "`prog_bar=True`": lambda: self.log("shown", loss, prog_bar=True),
            "a Python float": lambda: self.log("number", 0.5),
            "`log_dict` of three": lambda: self.log_dict(three),
        }


def measure_logging(repetitions: int) -> dict[str, float]:
    """Return the microseconds of a call of ``self.log``, measured in a fit with ``repetitions`` batches."""
    setting = Setting("logging", repetitions)
    module = LoggingModule(setting)
    with without_collection():
        trainer_with().fit(module, Batches(setting))
    empty = module.least.pop("")
    return {name: took - empty for name, took in module.least.items()}


# ------------------------------------------------------------------ a batch that accumulates


def accumulate_by_hand(batches: Batches) -> nn.Module:
    """Train with a hand-written loop."""
    model, loss_function = make_model(ACCUMULATING), make_loss(ACCUMULATING)
    optimizer = make_optimizer(model)
    model.train()
    for index, (x, y) in enumerate(batches):
        loss = loss_function(model(x), y)
        if index % ACCUMULATING.accumulate == 0:
            optimizer.zero_grad()
        (loss / ACCUMULATING.accumulate).backward()
        if (index + 1) % ACCUMULATING.accumulate == 0:
            optimizer.step()
    return model


def accumulate(batches: Batches) -> nn.Module:
    """Train with a trainer and one callback."""
    module = Module(ACCUMULATING)
    trainer_with(GradientAccumulation(ACCUMULATING.accumulate)).fit(module, batches)
    return module.network


def measure_accumulation(repetitions: int) -> dict[str, list[float]]:
    """Return the microseconds per batch in each repetition, by hand and by a trainer.

    Raises:
        RuntimeError: If the two ended with different parameters.
    """
    ways = {"by hand": accumulate_by_hand, "`GradientAccumulation(4)`": accumulate}
    ended = [parameters(train(Batches(ACCUMULATING))) for train in ways.values()]
    if not torch.equal(*ended):
        raise RuntimeError("the two ways of accumulating ended with different parameters")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions):
        for name in list(ways)[:: -1 if repetition % 2 else 1]:
            batches = Batches(ACCUMULATING)
            with without_collection():
                ways[name](batches)
            times[name].append(batches.seconds / ACCUMULATING.batches * 1e6)
    return times


def accumulation_table(measured: dict[str, list[float]]) -> str:
    """Return the table of the cost of a batch in a window of four."""
    by_hand, ours = measured.values()
    added = statistics.median(mine - theirs for mine, theirs in zip(ours, by_hand, strict=True))
    lines = [row(["four batches per update", "us per batch, minimum"]), row(["---", "---"])]
    lines += [row([name, f"{min(times):.1f}"]) for name, times in measured.items()]
    lines.append(row(["added: minima, and median of pairs", f"{min(ours) - min(by_hand):+.1f}, {added:+.1f}"]))
    return "\n".join(lines)


# ------------------------------------------------------------------ the program


def two_columns(head: str, costs: dict[str, float]) -> str:
    """Return a table of microseconds by name."""
    return "\n".join([row([head, "us"]), row(["---", "---"]), *(row([name, f"{cost:.2f}"]) for name, cost in costs.items())])


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200, help="of each way; for accumulation, a fifth of this number")
    parser.add_argument("--save", action="store_true", help="rewrite docs/performance.md and its JSON")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    facts = environment() | {"pinned core": pin(), "repetitions": options.repetitions}
    print(", ".join(f"{name}: {value}" for name, value in facts.items()), file=sys.stderr)
    events = measure_events(options.repetitions)
    phases = measure_phases(options.repetitions)
    logging = measure_logging(options.repetitions)
    accumulation = measure_accumulation(max(options.repetitions // 5, 1))
    text = "\n\n".join(
        (
            events_table(events),
            two_columns("a phase around nothing", phases),
            two_columns("a call of `self.log`", logging),
            accumulation_table(accumulation),
        )
    )
    print(f"\n{text}")
    if options.save:
        figures = {"events": events, "phases": phases, "logging": logging, "accumulation": accumulation}
        save("dispatch", text, facts, figures)


if __name__ == "__main__":
    main()
