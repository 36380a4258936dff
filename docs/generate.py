"""Write the files that are derived from the event table: the stub of the hooks, the loop maps and the table of events.

``python docs/generate.py`` rewrites them in a checkout. With ``--check`` it writes nothing, names the files that are stale,
and fails if there are any.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from pathlib import Path

from eventtrain.describe import maps
from eventtrain.events import EVENTS, Event, Phase, TrainBatchStart, module_hook
from eventtrain.module.hooks import MODULE_ONLY_HOOKS

ROOT = Path(__file__).resolve().parent.parent

STUB_HEADER = """\
# Written by `python docs/generate.py` from eventtrain/events.py. Do not edit.
from typing import Any

from torch import Tensor

from eventtrain import events
from eventtrain.core.optimizer import LightningOptimizer
from eventtrain.trainer import Trainer

MODULE_ONLY_HOOKS: tuple[str, ...]

"""
ARGUMENT_TYPES = {
    "batch_idx": "int",
    "dataloader_idx": "int = 0",
    "optimizer": "LightningOptimizer",
    "loss": "Tensor",
    "checkpoint": "dict[str, Any]",
    "stage": "str",
    "exception": "BaseException",
}


def stub() -> str:
    """Return the text of ``hooks.pyi``."""
    lines = ["class CallbackHooks:"]
    for name, event_type in EVENTS.items():
        lines += _method(f"on_{name}", f"trainer: Trainer, event: events.{event_type.__name__}", "None", event_type)
    lines += ["", "class ModuleHooks:"]
    for event_type in EVENTS.values():
        fields = event_type.module_arguments
        if fields is None:
            arguments = f"event: events.{event_type.__name__}"
        else:
            names = [name.removeprefix("raw_") for name in fields]
            arguments = ", ".join(f"{name}: {ARGUMENT_TYPES.get(name, 'Any')}" for name in names)
        returned = "int | None" if event_type is TrainBatchStart else "None"
        lines += _method(module_hook(event_type), arguments, returned, event_type)
    lines += [f"    def {hook}(self) -> None: ..." for hook in MODULE_ONLY_HOOKS if not hook.endswith("_transfer")]
    return STUB_HEADER + "\n".join(lines) + "\n"


def _method(name: str, arguments: str, returned: str, event_type: type[Event]) -> list[str]:
    parameters = f"self, {arguments}" if arguments else "self"
    return [f"    def {name}({parameters}) -> {returned}:", f'        """{first_sentence(event_type)}"""']


def first_sentence(event_type: type[Event]) -> str:
    """Return the docstring of an event up to its fields, on one line."""
    text = inspect.cleandoc(event_type.__doc__ or "").split("\n\nAttributes:")[0]
    return " ".join(text.split())


def event_table() -> str:
    """Return the Markdown table of all events. A field that a listener may write has an asterisk."""
    lines = ["| signal | event | when | fields |", "|---|---|---|---|"]
    for name, event_type in EVENTS.items():
        described = " (phase)" if issubclass(event_type, Phase) else ""
        fields = [
            f"`{declared.name}`{'*' if declared.metadata.get('writable') else ''}"
            for declared in dataclasses.fields(event_type)
        ]
        when = re.sub(r":class:`~?([\w.]+)`", r"`\1`", first_sentence(event_type)).replace("``", "`").replace("|", "\\|")
        lines.append(f"| `{name}`{described} | `{event_type.__name__}` | {when} | {', '.join(fields)} |")
    return "\n".join(lines)


def loop_map(*titles: str) -> str:
    """Return the loop maps with these titles as Markdown blocks."""
    return "\n\n".join(f"```text\n{text.rstrip()}\n```" for title, text in maps() if title in titles)


def replaced(text: str, marker: str, content: str) -> str:
    """Return a document with a new text between the two comments of a marker.

    Args:
        text: The document.
        marker: The name in the comments.
        content: The new text.

    Raises:
        ValueError: If the document has no such block.
    """
    begin, end = f"<!-- generated: {marker} -->", f"<!-- end: {marker} -->"
    if begin not in text or end not in text:
        raise ValueError(f"there is no block {marker!r}")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


def generated(root: Path = ROOT) -> dict[Path, str]:
    """Return each derived file of a checkout, with the text that it should have."""
    readme, docs = root / "README.md", root / "docs" / "events.md"
    events_page = replaced(docs.read_text(), "event table", event_table())
    return {
        root / "eventtrain" / "module" / "hooks.pyi": stub(),
        readme: replaced(readme.read_text(), "loop map", loop_map("fit")),
        docs: replaced(events_page, "loop maps", loop_map("fit", "validation", "test", "predict")),
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or check them, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python docs/generate.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, name stale files, and fail if there are any")
    check = parser.parse_args(arguments).check
    stale = [path for path, text in generated().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)} is stale: run python docs/generate.py", file=sys.stderr)
        else:
            path.write_text(generated()[path])
            print(f"wrote {path.relative_to(ROOT)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
