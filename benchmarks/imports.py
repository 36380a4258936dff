"""Measure the seconds that each package adds to ``import torch``, in new interpreters, interleaved.

Each interpreter imports torch first and then the package. Both are timed, so that their ratio belongs to one process::

    python -m benchmarks.imports                   # some minutes, because the other trainers take seconds each
    python -m benchmarks.imports --only --repetitions 20        # only eventtrain
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
"""The statement that is run after ``import torch``, by its name in the table."""

DISTRIBUTIONS = {
    "lightning": "lightning",
    "ignite": "pytorch-ignite",
    "accelerate": "accelerate",
    "transformers": "transformers",
}
"""The distribution of each other trainer's package."""

MOST = 0.15
"""The seconds that eventtrain may add."""

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
    """The times of one package.

    Attributes:
        name: The name in the table.
        torch: The seconds of ``import torch``, in each repetition.
        added: The seconds of the import after it.
    """

    name: str
    torch: list[float] = field(default_factory=list)
    added: list[float] = field(default_factory=list)


def package(name: str) -> str:
    """Return the package that an entry of the table imports; an empty string if it imports none."""
    words = IMPORTS[name].replace(",", " ").replace(".", " ").split()
    return words[1] if len(words) > 1 else ""


def once(name: str) -> tuple[float, float]:
    """Import in a new interpreter, and return the seconds of torch and of the import after it."""
    program = PROGRAM.format(statement=IMPORTS[name])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    torch_took, added = json.loads(done.stdout.splitlines()[-1])
    return torch_took, added


def compare(names: list[str], repetitions: int) -> list[Result]:
    """Import each package ``repetitions`` times, in turn."""
    results = [Result(name) for name in names]
    for name in names:
        once(name)  # writes missing bytecode, and reads all files once
    for repetition in range(repetitions):
        at = repetition % len(results)
        for result in results[at:] + results[:at]:
            torch_took, added = once(result.name)
            result.torch.append(torch_took)
            result.added.append(added)
    return results


def table(results: list[Result], missing: list[str]) -> str:
    """Return the results as a Markdown table."""
    torch_times = [seconds for result in results for seconds in result.torch]
    lines = [
        "| imported after torch | version | seconds added, minimum | median |",
        "|---|---|---|---|",
        f"| (`import torch` itself) | | {min(torch_times):.2f} | {statistics.median(torch_times):.2f} |",
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
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=DISTRIBUTIONS, help="the other trainers to measure, if not all")
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
