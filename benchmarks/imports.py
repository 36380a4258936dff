"""What importing costs: seconds that each package adds to ``import torch``, in fresh interpreters, interleaved.

Each interpreter imports torch first and then the package, and both are timed, so that the ratio of the two belongs to
one process::

    python -m benchmarks.imports                   # some minutes: the peers take seconds each
    python -m benchmarks.imports --only --repetitions 20        # eventtrain alone
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec

from benchmarks.overhead import pin
from benchmarks.report import environment, save
from docs.generate import ROOT

OURS = ("`import eventtrain`", "the same, and each of its callbacks")
IMPORTS = {
    "nothing": "pass",
    OURS[0]: "import eventtrain",
    OURS[1]: "import eventtrain, eventtrain.callbacks as c; [getattr(c, name) for name in c.__all__]",
    "`import lightning.pytorch`": "import lightning.pytorch",
    "`import ignite.engine, ignite.handlers`": "import ignite.engine, ignite.handlers",
    "`from accelerate import Accelerator`": "from accelerate import Accelerator",
    "`from transformers import Trainer`": "from transformers import Trainer",
}
"""What is imported after torch, by its name in the table."""

DISTRIBUTIONS = {
    "lightning": "lightning",
    "ignite": "pytorch-ignite",
    "accelerate": "accelerate",
    "transformers": "transformers",
}
"""The distribution that each peer's package comes from."""

MOST = 0.15
"""Seconds that eventtrain may add."""

PROGRAM = """
import time
start = time.perf_counter()
import torch
between = time.perf_counter()
{statement}
end = time.perf_counter()
print([between - start, end - between])
"""


@dataclass
class Result:
    """One package's times.

    Attributes:
        name: What was imported.
        torch: Seconds of ``import torch``, of each repetition.
        added: Seconds of what came after it.
    """

    name: str
    torch: list[float] = field(default_factory=list)
    added: list[float] = field(default_factory=list)


def package(name: str) -> str:
    """The package that an entry of the table imports; empty where it imports none."""
    words = IMPORTS[name].replace(",", " ").replace(".", " ").split()
    return words[1] if len(words) > 1 else ""


def once(name: str) -> tuple[float, float]:
    """Imports in a fresh interpreter; returns the seconds of torch and of what came after it."""
    program = PROGRAM.format(statement=IMPORTS[name])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    torch_took, added = json.loads(done.stdout.splitlines()[-1])
    return torch_took, added


def compare(names: list[str], repetitions: int) -> list[Result]:
    """Imports each so many times, in turn."""
    results = [Result(name) for name in names]
    for name in names:
        once(name)  # compiles what has no bytecode yet, and reads all files once
    for repetition in range(repetitions):
        at = repetition % len(results)
        for result in results[at:] + results[:at]:
            torch_took, added = once(result.name)
            result.torch.append(torch_took)
            result.added.append(added)
    return results


def table(results: list[Result], missing: list[str]) -> str:
    """The results as a Markdown table."""
    by_itself = [seconds for result in results for seconds in result.torch]
    lines = [
        "| imported after torch | version | seconds added, minimum | median |",
        "|---|---|---|---|",
        f"| (`import torch` itself) | | {min(by_itself):.2f} | {statistics.median(by_itself):.2f} |",
    ]
    for result in results:
        distribution = DISTRIBUTIONS.get(package(result.name))
        version = importlib.metadata.version(distribution) if distribution else ""
        lines.append(f"| {result.name} | {version} | {min(result.added):.3f} | {statistics.median(result.added):.3f} |")
    ours = max(min(result.added) for result in results if result.name in OURS)
    lines += ["", f"eventtrain adds {ours:.3f} s, {'within' if ours <= MOST else 'over'} the {MOST} s aimed for."]
    if missing:
        lines += ["", f"Not installed, so not measured: {', '.join(missing)}."]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=DISTRIBUTIONS, help="the peers to measure, if not all")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="rewrite docs/performance.md and its JSON")
    options = parser.parse_args(arguments)

    facts = environment() | {"pinned core": pin(), "repetitions": options.repetitions}
    print(", ".join(f"{name}: {value}" for name, value in facts.items()), file=sys.stderr)
    peers = DISTRIBUTIONS if options.only is None else options.only
    chosen = [name for name in IMPORTS if package(name) in ("", "eventtrain", *peers)]
    missing = sorted({package(name) for name in chosen if package(name) and find_spec(package(name)) is None})
    results = compare([name for name in chosen if package(name) not in missing], options.repetitions)
    text = table(results, missing)
    print(f"\n{text}")
    if options.save:
        save("imports", text, facts, [asdict(result) for result in results])


if __name__ == "__main__":
    main()
