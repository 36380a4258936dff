"""Measure the time that a trainer adds to a step of the hand-written loop, for eventtrain and other trainers, on one core.

Repetitions are interleaved. In each repetition, every contestant trains once, in a rotating order, and its time is divided by
the time of the hand-written loop in the same repetition. The table shows the median of these paired ratios, the minimum of all
times, and the ratio of the hand-written loop to itself, which is the noise. Before timing, final parameters are compared::

    python -m benchmarks.overhead                          # all settings and contestants, about ten minutes
    python -m benchmarks.overhead --settings bare --only eventtrain --repetitions 100
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import logging
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.contestants import REGISTRY, TAKES_PART, contestant, described
from benchmarks.report import environment, save
from benchmarks.work import SETTINGS, Batches, Setting, parameters

BASELINE, CLOSURE = "hand-written", "hand-written step(closure)"


@dataclass
class Result:
    """The times of one contestant in one setting.

    Attributes:
        name: The contestant.
        switched_on: The options that it ran with.
        equal: Whether its final parameters equal those of the hand-written loop, bit for bit.
        difference: The largest difference between them.
        microseconds: The time per batch, in each repetition.
        ratios: This time over the time of the hand-written loop in the same repetition.
        closure_ratios: This time over the time of the hand-written loop with ``step(closure)``.
    """

    name: str
    switched_on: str
    equal: bool
    difference: float
    microseconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    closure_ratios: list[float] = field(default_factory=list)


class Terminal(io.TextIOWrapper):
    """A terminal without a reader: bars draw, and writing costs almost nothing."""

    def __init__(self) -> None:
        super().__init__(open(os.devnull, "wb"), encoding="utf-8", write_through=True)  # noqa: SIM115

    def isatty(self) -> bool:
        """Return True, so that the bar of every contestant draws."""
        return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard bars, logs and warnings."""
    with contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.NOTSET)
        logging.disable(logging.WARNING)
        terminal = stack.enter_context(Terminal())
        stack.enter_context(contextlib.redirect_stderr(terminal))
        stack.enter_context(contextlib.redirect_stdout(terminal))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def run(name: str, setting: Setting) -> tuple[float, torch.Tensor]:
    """Let a contestant train, and return its microseconds per batch and its final parameters."""
    batches = Batches(setting)
    train = contestant(name)
    gc.collect()
    with tempfile.TemporaryDirectory() as folder, quiet():
        model = train(setting, batches, Path(folder))
    return batches.seconds / setting.batches * 1e6, parameters(model)


def compare(setting: Setting, names: list[str], repetitions: int) -> list[Result]:
    """Let the contestants of a setting train in turn, and return their times."""
    _, expected = run(BASELINE, setting)
    results = []
    for name in names:
        ended_with = run(name, setting)[1]
        difference = (ended_with - expected).abs().max().item()
        results.append(Result(name, described(name), torch.equal(ended_with, expected), difference))
    for repetition in range(repetitions):
        at = repetition % len(results)
        times = {result.name: run(result.name, setting)[0] for result in results[at:] + results[:at]}
        for result in results:
            result.microseconds.append(times[result.name])
            result.ratios.append(times[result.name] / times[BASELINE])
            if CLOSURE in times:
                result.closure_ratios.append(times[result.name] / times[CLOSURE])
    return results


def table(setting: Setting, results: list[Result]) -> str:
    """Return the results as a Markdown table."""
    baseline = min(results[0].microseconds)
    closure = any(result.closure_ratios for result in results)
    lines = [
        f"| {setting.name} | us per batch, minimum | ratio of minima | median of paired ratios |"
        + (" over `step(closure)` |" if closure else "")
        + " added us, median | parameters |",
        "|---|---|---|---|" + ("---|" if closure else "") + "---|---|",
    ]
    for result in results:
        least = min(result.microseconds)
        added = statistics.median(
            mine - theirs for mine, theirs in zip(result.microseconds, results[0].microseconds, strict=True)
        )
        same = "equal" if result.equal else f"differ by {result.difference:.1g}"
        over_closure = f" {statistics.median(result.closure_ratios):.3f} |" if result.closure_ratios else ""
        lines.append(
            f"| {result.name} | {least:.1f} | {least / baseline:.3f} | {statistics.median(result.ratios):.3f} |"
            f"{over_closure} {added:+.1f} | {same} |"
        )
    return "\n".join(lines)


def pin() -> int:
    """Pin this process to the last core, which interrupts use least, and return it; -1 if the system cannot pin processes."""
    if not hasattr(os, "sched_setaffinity"):
        return -1
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--only", nargs="+", choices=REGISTRY, help="contestants beside the hand-written loops")
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--save", action="store_true", help="rewrite docs/performance.md and its JSON")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    core = pin()
    facts = environment() | {"pinned core": core, "repetitions": options.repetitions}
    print(", ".join(f"{name}: {value}" for name, value in facts.items()), file=sys.stderr)
    for chosen in options.settings:
        setting = SETTINGS[chosen]
        names = [
            name
            for name in REGISTRY
            if chosen in TAKES_PART[name] and (options.only is None or name in options.only or name.startswith(BASELINE))
        ]
        results = compare(setting, names, options.repetitions)
        text = table(setting, results)
        print(f"\n{text}", flush=True)
        if options.save:
            switched = "\n".join(f"- {result.name}: {result.switched_on}" for result in results)
            save(f"overhead: {chosen}", f"{text}\n\n{switched}", facts, [asdict(result) for result in results])


if __name__ == "__main__":
    main()
