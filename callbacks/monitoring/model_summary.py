"""Summarize a module: its parts, their parameters, and their memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from eventtrain._torch import COMPILED_NAME, is_compiled_in_place, original_module
from eventtrain.callback import Callback
from eventtrain.callbacks.terminal import show
from eventtrain.checkpoint.rng import isolated_rng
from eventtrain.checks import check_whole_number
from eventtrain.data.device import transfer_to
from eventtrain.events import FitStart
from eventtrain.module.modes import restore_modes
from eventtrain.trainer import Trainer

ITSELF = "(itself)"
"""The name of the row for the parameters and buffers that the module holds directly."""
MB = 1_000_000


class ModelSummary(Callback):
    """Print a table of the module at the start of a fit: a row for each part, with its parameters, how many of them are
    trained, and their memory; then the totals, in which parameters that several parts share count once.

    Listens to ``fit_start``, when the module is on its device and wrapped. If the module has an ``example_input_array``, one
    forward finds the sizes of each part's inputs and outputs. It leaves the module and the random numbers as they were.
    Prints with ``trainer.print``, emits no metrics. Override :meth:`summary` for a summary of something else.

    Args:
        max_depth: How deep parts of parts are shown: 1 for the module's direct parts, 0 for only the totals, -1 for all.

    Raises:
        MisconfigurationError: If ``max_depth`` is not a whole number from -1.

    Example:
        >>> from eventtrain import Trainer
        >>> from eventtrain.callbacks import ModelSummary
        >>> trainer = Trainer(max_epochs=1, callbacks=[ModelSummary(max_depth=2)])
        >>> trainer.callback(ModelSummary).max_depth
        2
    """

    def __init__(self, *, max_depth: int = 1) -> None:
        self.max_depth = check_whole_number(max_depth, "ModelSummary", "max_depth", least=-1)

    def summary(self, trainer: Trainer) -> Summary:
        """Return the summary to print: a policy to override.

        Args:
            trainer: The trainer, whose ``module`` is ready to train.

        Returns:
            The summary; any object whose ``str`` is the text to print.
        """
        module = trainer.module
        example = transfer_to(module, trainer.device)(module.example_input_array)
        return summarize(module, self.max_depth, example_input=example)

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        summary = self.summary(trainer)  # on every rank, because the forward of a sharded module needs them all
        show(trainer, summary, "ModelSummary")


# ------------------------------------------------------------------ the parts of a summary


@dataclass(slots=True)
class Counts:
    """The size of parameters and buffers. Each tensor counts once, even if several modules hold it.

    Attributes:
        parameters: Elements of the parameters.
        trainable: Elements of the parameters that require a gradient.
        buffers: Elements of the buffers.
        parameter_bytes: The memory of the parameters.
        gradient_bytes: The memory that their gradients will need, in the type of the parameters.
        buffer_bytes: The memory of the buffers.
        uninitialized: Parameters and buffers of lazy modules that have no size yet. They are not in the other counts.
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
        """The elements of the parameters that require no gradient."""
        return self.parameters - self.trainable


@dataclass(slots=True)
class Row:
    """One part of a module.

    Attributes:
        name: Its name in the module, such as ``"net.0"``.
        kind: Its class.
        counts: The size of its parameters and buffers, including its parts.
        shares: Whether it holds a parameter that another part of the module holds too.
        sizes: The sizes of its first inputs and of its first outputs; None if it was not run.
    """

    name: str
    kind: str
    counts: Counts
    shares: bool = False
    sizes: tuple[str, str] | None = None


@dataclass(slots=True)
class Summary:
    """The parts of a module; ``str`` of it is a table.

    Attributes:
        kind: The module's class.
        total: The size of its parameters and buffers.
        rows: Its parts, each followed by the parts in it.
        sizes: The sizes of its inputs and outputs; None if it was not run.
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
    """Summarize a module.

    Args:
        module: The module. A module that ``torch.compile`` returned is shown as the original one.
        max_depth: How deep parts of parts are shown: 1 for the module's direct parts, 0 for only the totals, -1 for all.
        example_input: The argument of one call of the module that finds the sizes of inputs and outputs: a tensor, a tuple of
            arguments, or a dict of keyword arguments. It is not used if it would initialize a lazy module.

    Returns:
        The summary.

    Raises:
        MisconfigurationError: If ``max_depth`` is not a whole number from -1.
        Exception: If the module fails with the example; a note names the summary as the source of the error.

    Example:
        >>> from torch import nn
        >>> print(summarize(nn.Sequential(nn.Linear(2, 3), nn.ReLU())))
        Sequential
        name  type    parameters  trainable  buffers     MB
        ...
        9 parameters, 9 trainable and 0 frozen
        ...
    """
    check_whole_number(max_depth, "summarize", "max_depth", least=-1)
    names: dict[int, list[str]] = {}  # the names of each parameter, by its id
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain(name))
    parts = {name: part for name, part in named_parts(module) if max_depth == -1 or name.count(".") < max_depth}
    summary = Summary(kind_of(module), count(module.parameters(), module.buffers()))
    original = original_module(module)
    direct = count(original.parameters(recurse=False), original.buffers(recurse=False))
    if max_depth and direct != Counts():
        shares = any(len(names[id(each)]) > 1 for each in original.parameters(recurse=False))
        summary.rows.append(Row(ITSELF, summary.kind, direct, shares))
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
    """Count tensors. None of them may come twice."""
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
    """Yield the parts of a module and their parts, with their names. A part with two names comes twice."""
    for name, part in module.named_modules(remove_duplicate=False):
        if name and name.rpartition(".")[2] != COMPILED_NAME:
            yield plain(name), part


def plain(name: str) -> str:
    """Return a name without the pieces that ``torch.compile`` put into it."""
    return ".".join(piece for piece in name.split(".") if piece != COMPILED_NAME)


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``torch.compile`` returned the module, or its ``compile`` method was called."""
    return original_module(module) is not module or is_compiled_in_place(module)


def kind_of(module: nn.Module) -> str:
    """Return the name of a module's class, for people."""
    return type(original_module(module)).__name__ + (" (compiled)" if is_compiled(module) else "")


# ------------------------------------------------------------------ the sizes of inputs and outputs


def measured(module: nn.Module, parts: Mapping[str, nn.Module], example: Any) -> dict[str, tuple[str, str]]:
    """Return the sizes of the first inputs and outputs of each part that a forward runs, by the part's name."""
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
                if not isinstance(part, torch.jit.ScriptModule):  # it takes no hooks
                    handle = original_module(part).register_forward_hook(note(name), with_kwargs=True)
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
    """Put a module into evaluation mode without gradients and compilation, and leave it and the generators of random
    numbers as they were, also after an error.

    Yields:
        Copies of the buffers. The forward changes them in place of the buffers.
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
    """Return the shapes of the tensors in a value: ``"[8, 1, 28, 28]"``, ``"[8, 3], [8]"``; empty if it holds none."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(size_of, value)))
    return ""


# ------------------------------------------------------------------ as text


def table(rows: list[Row]) -> list[str]:
    """Return the lines of a table with a row for each part."""
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
    """Return a number of elements as text, with a question mark if a lazy module will add some."""
    if not row.counts.uninitialized:
        return f"{elements:,}"
    return f"{elements:,} + ?" if elements else "?"


def notes(summary: Summary) -> Iterator[str]:
    """Yield lines with the totals, and the meaning of the signs in the table."""
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
    """Return a number of bytes as text, in millions."""
    return f"{size / MB:,.3f}"
