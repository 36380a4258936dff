"""What a module is made of: its parts, their parameters, and what they take."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from eventtrain.callback import Callback
from eventtrain.checkpoint.rng import isolated_rng
from eventtrain.data.device import move_to_device
from eventtrain.errors import MisconfigurationError
from eventtrain.events import FitStart
from eventtrain.module.modes import restore_modes
from eventtrain.trainer import Trainer

ITSELF = "(itself)"
"""The name of the row of what the module holds without a part around it."""
WRAPPED = "_orig_mod"
"""What ``torch.compile`` calls the module inside of the one that it returns."""
MB = 1_000_000


class ModelSummary(Callback):
    """Prints at the start of a fit what the module is made of: a row per part, with its parameters, how many of them
    are trained, and what they take; then the totals, in which what several parts share counts once.

    Listens to ``fit_start``, where the module is on its device and wrapped. Where the module has an
    ``example_input_array``, the sizes of each part's inputs and outputs are found by a forward, which leaves module
    and random numbers as they were. Override :meth:`summary` for a summary of something else.

    Args:
        max_depth: How deep parts of parts are shown: 1 for the module's own parts, 0 for the totals alone, -1 for all.

    Raises:
        MisconfigurationError: ``max_depth`` is no whole number from -1.
    """

    def __init__(self, *, max_depth: int = 1) -> None:
        self.max_depth = check_depth(max_depth, "ModelSummary")

    def summary(self, trainer: Trainer) -> Summary:
        """The policy: what is printed."""
        module = trainer.module
        example = move_to_device(module.example_input_array, trainer.device)
        return summarize(module, self.max_depth, example_input=example)

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        summary = self.summary(trainer)  # on every rank: the forward of a module that is sharded needs them all
        trainer.print(summary)


# ------------------------------------------------------------------ what a summary holds


@dataclass(slots=True)
class Counts:
    """What parameters and buffers amount to. Each tensor counts once, however many modules hold it.

    Attributes:
        parameters: Elements of the parameters.
        trainable: Those of them that require a gradient.
        buffers: Elements of the buffers.
        parameter_bytes: What the parameters take.
        gradient_bytes: What their gradients will take, in the parameters' own type.
        buffer_bytes: What the buffers take.
        uninitialized: Parameters and buffers of lazy modules that have no size yet; they are not in the other counts.
    """

    parameters: int = 0
    trainable: int = 0
    buffers: int = 0
    parameter_bytes: int = 0
    gradient_bytes: int = 0
    buffer_bytes: int = 0
    uninitialized: int = 0

    @property
    def frozen(self) -> int:
        """Elements of the parameters that require no gradient."""
        return self.parameters - self.trainable


@dataclass(slots=True)
class Row:
    """One part of a module.

    Attributes:
        name: Its name in the module, such as ``"net.0"``.
        kind: Its class.
        counts: What it holds, the parts of it included.
        shares: Whether it holds a parameter that is also somewhere else in the module.
        sizes: Those of its first inputs and of its first outputs; None where it was not run.
    """

    name: str
    kind: str
    counts: Counts
    shares: bool = False
    sizes: tuple[str, str] | None = None


@dataclass(slots=True)
class Summary:
    """What a module is made of; ``str`` of it is a table.

    Attributes:
        kind: The module's class.
        total: What it holds.
        rows: Its parts, each before its own parts.
        sizes: Those of its inputs and outputs; None where it was not run.
    """

    kind: str
    total: Counts
    rows: list[Row] = field(default_factory=list)
    sizes: tuple[str, str] | None = None

    def __str__(self) -> str:
        head = self.kind if self.sizes is None else f"{self.kind}: {self.sizes[0]} -> {self.sizes[1]}"
        return "\n".join([head, *(table(self.rows) if self.rows else []), *notes(self)])


# ------------------------------------------------------------------ making one


def summarize(module: nn.Module, max_depth: int = 1, *, example_input: Any = None) -> Summary:
    """What a module is made of.

    Args:
        module: The module. Modules that ``torch.compile`` returned stand for those inside of them.
        max_depth: How deep parts of parts are shown: 1 for the module's own parts, 0 for the totals alone, -1 for all.
        example_input: What to call the module with to find the sizes of inputs and outputs: a tensor, a tuple of
            arguments, or a dict of keyword arguments. Not used where a lazy module would be initialized by it.

    Raises:
        MisconfigurationError: ``max_depth`` is no whole number from -1.
        Exception: What the module raised for the example, with a note.
    """
    check_depth(max_depth, "summarize")
    names: dict[int, list[str]] = {}  # under which a parameter can be found
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain(name))
    parts = {name: part for name, part in named_parts(module) if max_depth == -1 or name.count(".") < max_depth}
    summary = Summary(kind_of(module), count(module.parameters(), module.buffers()))
    own = unwrapped(module)
    alone = count(own.parameters(recurse=False), own.buffers(recurse=False))
    if max_depth and alone != Counts():
        shares = any(len(names[id(each)]) > 1 for each in own.parameters(recurse=False))
        summary.rows.append(Row(ITSELF, summary.kind, alone, shares))
    for name, part in parts.items():
        inside = f"{name}."
        shares = any(not other.startswith(inside) for each in part.parameters() for other in names[id(each)])
        summary.rows.append(Row(name, kind_of(part), count(part.parameters(), part.buffers()), shares))
    if example_input is not None and not summary.total.uninitialized:
        sizes = measured(module, {"": module, **parts}, example_input)
        summary.sizes = sizes.get("")
        for row in summary.rows:
            row.sizes = sizes.get(row.name)
    return summary


def count(parameters: Iterable[Tensor], buffers: Iterable[Tensor]) -> Counts:
    """Counts tensors, of which none comes twice."""
    counts = Counts()
    for parameter in parameters:
        if is_lazy(parameter):
            counts.uninitialized += 1
            continue
        elements, size = parameter.numel(), parameter.numel() * parameter.element_size()
        counts.parameters += elements
        counts.parameter_bytes += size
        if parameter.requires_grad:
            counts.trainable += elements
            counts.gradient_bytes += size
    for buffer in buffers:
        if is_lazy(buffer):
            counts.uninitialized += 1
            continue
        counts.buffers += buffer.numel()
        counts.buffer_bytes += buffer.numel() * buffer.element_size()
    return counts


def named_parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a module and their parts, by name; one that is there under two names comes twice."""
    for name, part in module.named_modules(remove_duplicate=False):
        if name and name.rpartition(".")[2] != WRAPPED:
            yield plain(name), part


def plain(name: str) -> str:
    """A name without what ``torch.compile`` put into it."""
    return ".".join(piece for piece in name.split(".") if piece != WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of what ``torch.compile`` returned; any other is itself."""
    return dict(module.named_children()).get(WRAPPED, module)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` returned the module, or its own ``compile`` was called."""
    return unwrapped(module) is not module or getattr(module, "_compiled_call_impl", None) is not None


def kind_of(module: nn.Module) -> str:
    """A module's class, for people."""
    return type(unwrapped(module)).__name__ + (" (compiled)" if is_compiled(module) else "")


# ------------------------------------------------------------------ the sizes of inputs and outputs


def measured(module: nn.Module, parts: Mapping[str, nn.Module], example: Any) -> dict[str, tuple[str, str]]:
    """The sizes of the first inputs and outputs of each part that a forward runs, by the part's name."""
    sizes: dict[str, tuple[str, str]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            sizes.setdefault(name, (size_of([args, kwargs]), size_of(output)))

        return hook

    args = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
    kwargs = example if isinstance(example, dict) else {}
    try:
        with ExitStack() as stack:
            for name, part in parts.items():
                if not isinstance(part, torch.jit.ScriptModule):  # which takes no hooks
                    handle = unwrapped(part).register_forward_hook(note(name), with_kwargs=True)
                    stack.callback(handle.remove)
            buffers = stack.enter_context(untouched(module))
            torch.func.functional_call(module, buffers, args, kwargs)
    except Exception as error:
        error.add_note(
            f"raised by a forward of {kind_of(module)} with its example input, which finds the sizes for a summary. "
            "Leave example_input_array None for a summary without them."
        )
        raise
    return sizes


@contextmanager
def untouched(module: nn.Module) -> Generator[dict[str, Tensor], None, None]:
    """Puts a module into evaluation mode without gradients and compilation, and leaves it and the generators of random
    numbers as they were, also after an error.

    Yields:
        Copies of the buffers, for the forward to change in their place.
    """
    training = {part: part.training for part in module.modules()}
    compiled = any(is_compiled(part) for part in module.modules())
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    try:
        with isolated_rng(), torch.no_grad(), eager:
            module.eval()
            yield {name: buffer.clone() for name, buffer in module.named_buffers()}
    finally:
        restore_modes(training)


def size_of(value: Any) -> str:
    """The shapes of the tensors in something: ``"[8, 1, 28, 28]"``, ``"[8, 3], [8]"``; empty where it holds none."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(size_of, value)))
    return ""


# ------------------------------------------------------------------ as text


def table(rows: list[Row]) -> list[str]:
    """Lines with a column for each thing that is known of the parts."""
    columns: list[tuple[str, list[str]]] = [
        ("name", [row.name for row in rows]),
        ("type", [row.kind for row in rows]),
        ("parameters", [known(row.counts.parameters, row) + "*" * row.shares for row in rows]),
        ("trainable", [known(row.counts.trainable, row) for row in rows]),
        ("buffers", [f"{row.counts.buffers:,}" for row in rows]),
        ("MB", [megabytes(row.counts.parameter_bytes + row.counts.buffer_bytes) for row in rows]),
    ]
    if any(row.sizes for row in rows):
        sizes = [row.sizes or ("", "") for row in rows]
        columns += [("in", [size[0] for size in sizes]), ("out", [size[1] for size in sizes])]
    aligned = []
    for title, cells in columns:
        width = max(map(len, [title, *cells]))
        right = title not in ("name", "type", "in", "out")
        lines = [title, "-" * width, *cells]
        aligned.append([line.rjust(width) if right else line.ljust(width) for line in lines])
    return ["  ".join(line).rstrip() for line in zip(*aligned, strict=True)]


def known(elements: int, row: Row) -> str:
    """A number of elements, with a question mark where a lazy module will add some."""
    if not row.counts.uninitialized:
        return f"{elements:,}"
    return f"{elements:,} + ?" if elements else "?"


def notes(summary: Summary) -> Iterator[str]:
    """The totals, and what the signs in the table mean."""
    total = summary.total
    yield f"{total.parameters:,} parameters, {total.trainable:,} trainable and {total.frozen:,} frozen"
    yield (
        f"{megabytes(total.parameter_bytes)} MB of parameters, {megabytes(total.gradient_bytes)} MB of their gradients, "
        f"{megabytes(total.buffer_bytes)} MB of buffers; the optimizer's state and activations come on top"
    )
    if any(row.shares for row in summary.rows):
        yield "*: shared with another part; the totals count it once"
    if total.uninitialized:
        yield f"?: lazy modules; {total.uninitialized} tensors get their sizes at the first forward and are not counted"


def megabytes(size: int) -> str:
    """A number of bytes in millions."""
    return f"{size / MB:,.3f}"


def check_depth(max_depth: Any, named: str) -> int:
    """Refuses what is no depth.

    Raises:
        MisconfigurationError: It is no whole number from -1.
    """
    if isinstance(max_depth, bool) or not isinstance(max_depth, int) or max_depth < -1:
        raise MisconfigurationError(f"{named}(max_depth={max_depth!r}): it has to be a whole number from 0, or -1 for all.")
    return max_depth
