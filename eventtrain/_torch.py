"""Every use of a private name of torch or torchmetrics, each with its reason and the public way that is missing.

A private name may change with any release. This file gathers them, so that a new release of torch is checked in one
place; ``tests/test_private_names.py`` finds a private name in any other file. Nothing heavy is imported when the file
loads: ``torch._dynamo``, ``torch.distributed`` and torchmetrics are imported, or recognised, when they are needed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.utils.tensorboard import SummaryWriter

# ------------------------------------------------------------------ tensors

is_view: Callable[[Tensor], bool] = Tensor._is_view
"""Return whether a tensor is a view of another one.

A view of a weight changes when the weight is updated in place, so its value has to be copied to keep it. Missing: a
public query; sharing of storage can be compared, but not without the other tensor. This is torch's own method and not
a function around it, because ``self.log`` calls it in each batch.
"""

version: Callable[[Tensor], int] = attrgetter("_version")
"""Return a number that changes with each in-place write to a tensor.

It tells whether a gradient was added to since the last look, without a copy or a synchronisation with the GPU. Missing:
a public counter.
"""

# ------------------------------------------------------------------ modules


def tensors_of(module: nn.Module, name: str) -> dict[str, Tensor | None]:
    """Return the dict in which a module holds one of its parameters or buffers.

    Tensors of many layers are read again and again from there, without the search of ``nn.Module.__getattr__``, and the
    answer stays right if the entry is replaced. Missing: public access to the two dicts.

    Args:
        module: The module that holds the tensor itself, not through a submodule.
        name: The tensor's name in that module.
    """
    holder: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    return holder


COMPILED_NAME = "_orig_mod"
"""The name under which the module that ``torch.compile(module)`` returns holds the original.

It is part of the names of parameters, and has to be taken out of them to compare a compiled module with its original.
Missing: a public name, or ``named_parameters`` without it.
"""


def original_module(module: nn.Module) -> nn.Module:
    """Return the original of a module that ``torch.compile(module)`` returned; any other module is returned as it is.

    Missing: a public attribute of the compiled module.
    """
    return dict(module.named_children()).get(COMPILED_NAME, module)


def is_compiled_in_place(module: nn.Module) -> bool:
    """Return whether ``module.compile()`` was called. Missing: a public query."""
    return getattr(module, "_compiled_call_impl", None) is not None


def is_compiled_function(function: Callable[..., Any]) -> bool:
    """Return whether ``torch.compile`` made a function. Missing: a public query."""
    return hasattr(function, "_torchdynamo_orig_callable")


def compiled_parts(model: Any) -> tuple[nn.Module, Callable[..., Any]] | None:
    """Take apart a result of ``torch.compile(module)``.

    The steps of a module are methods beside ``forward``, and have to be compiled with the options that the user gave.
    Missing: a public way to read the options, or to compile another function with them.

    Args:
        model: Anything.

    Returns:
        The original module, and a function that compiles another function with the same options; None if
        ``torch.compile`` did not make the model.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled yet, and importing it takes a second
        return None
    from torch._dynamo import OptimizedModule

    if not isinstance(model, OptimizedModule):
        return None
    return model._orig_mod, model.dynamo_ctx


# ------------------------------------------------------------------ optimizers and profilers


def mark_stepped(optimizer: Optimizer, stepped: bool) -> None:
    """Tell an optimizer whether it has ever stepped.

    Schedulers warn if they step before their optimizer does. In a resumed run the optimizer's first step was in another
    process. Missing: a public way to say so; ``load_state_dict`` does not.
    """
    optimizer._opt_called = stepped  # type: ignore[attr-defined]


def is_profiling() -> bool:
    """Return whether a torch profiler records in this thread.

    A second one would fail in the middle of a run. Missing: a public query.
    """
    return bool(torch.autograd._profiler_enabled())  # type: ignore[attr-defined]


# ------------------------------------------------------------------ TensorBoard


def summary_writer(directory: object, open_events: Callable[[int | None], Any], purge_step: int | None = None) -> SummaryWriter:
    """Return a ``SummaryWriter`` whose events go to another event writer than TensorBoard's.

    TensorBoard's event writer writes in a thread, which a full disk ends. Missing: an argument for the event writer.

    Args:
        directory: The directory of the run.
        open_events: Opens the event writer. Its argument is the purge step at the first call, and None later, if the writer
            is used again after it was closed.
        purge_step: The step from which readers drop older values; None if they are to keep all.
    """
    from torch.utils.tensorboard import SummaryWriter  # imported late, because it takes seconds
    from torch.utils.tensorboard.writer import FileWriter

    class RunWriter(SummaryWriter):
        file_writer: Any
        all_writers: Any

        def _get_file_writer(self) -> Any:
            if self.file_writer is None:
                self.file_writer = FileWriter.__new__(FileWriter)  # its __init__ would open TensorBoard's event writer
                self.file_writer.event_writer = open_events(self.purge_step)
                self.all_writers = {str(directory): self.file_writer}
                self.purge_step = None
            return self.file_writer

    return RunWriter(str(directory), purge_step=purge_step)


# ------------------------------------------------------------------ loaders


def has_running_workers(loader: DataLoader[Any]) -> bool:
    """Return whether a loader with persistent workers has started them.

    Such a loader draws the seed of its workers only when it starts them. Missing: a public query.
    """
    return loader._iterator is not None


def copy_loader(loader: DataLoader[Any], **attributes: Any) -> DataLoader[Any]:
    """Return a shallow copy of a loader with other samplers, and with no workers yet.

    Building a new loader instead would lose what a subclass adds. Missing: a public copy with replacements;
    ``DataLoader.__setattr__`` refuses new samplers after the constructor, so the attributes are written past it.

    Args:
        loader: The loader, which stays as it is.
        **attributes: The attributes to replace: ``sampler`` and ``batch_sampler``.
    """
    copied = copy.copy(loader)
    for name, value in {**attributes, "_iterator": None}.items():
        object.__setattr__(copied, name, value)
    return copied


# ------------------------------------------------------------------ sharded modules and their checkpoints


def fsdp_parameters(part: FSDPModule) -> Iterator[Any]:
    """Yield torch's record of each parameter that a sharded module manages.

    A record has ``sharded_param``, the parameter as the module lists it. Gradients of an open accumulation window are
    held in the records alone: see :func:`held_gradient`. Missing: public access to unreduced gradients.
    """
    state: Any = part._get_fsdp_state()
    for group in state._fsdp_param_groups:
        yield from group.fsdp_params


def held_gradient(record: Any) -> Tensor | None:
    """Return this process's sum of a parameter's gradients in an open window, if there is one.

    Args:
        record: One of :func:`fsdp_parameters`.
    """
    gradient: Tensor | None = record.unsharded_accumulated_grad
    if gradient is None and hasattr(record, "_unsharded_param"):
        gradient = record._unsharded_param.grad
    return gradient


def hold_gradient(record: Any, gradient: Tensor | None) -> None:
    """Replace this process's sum of a parameter's gradients.

    Args:
        record: One of :func:`fsdp_parameters`.
        gradient: The sum, of the whole parameter; None for no gradient.
    """
    record.unsharded_accumulated_grad = None if gradient is None else gradient.to(record.sharded_param.device)
    if hasattr(record, "_unsharded_param"):
        record._unsharded_param.grad = None


# ------------------------------------------------------------------ torchmetrics, which the library does not import


def is_metric(part: Any) -> bool:
    """Return whether an object is a torchmetrics metric, without importing torchmetrics."""
    return all(hasattr(part, name) for name in ("_defaults", "_update_count", "compute", "update"))


def metric_state(metric: Any) -> dict[str, Any]:
    """Return the values that a metric has accumulated, and how many updates made them.

    Missing: ``state_dict`` leaves the values out unless each state was declared persistent, and never has the count.
    """
    return {"states": {name: getattr(metric, name) for name in metric._defaults}, "updates": metric._update_count}


def set_metric_state(metric: Any, state: Mapping[str, Any]) -> None:
    """Give a metric a state that :func:`metric_state` returned, and drop the result that it computed before."""
    for name, value in state["states"].items():
        moved = [each.to(metric.device) for each in value] if isinstance(value, list) else value.to(metric.device)
        setattr(metric, name, moved)
    metric._update_count = state["updates"]
    metric._computed = None


def value_on_batch(metric: Any) -> Any:
    """Return the value that the last call of a metric computed for its batch; None if there was no call.

    Missing: the call returns the value, and only its caller has it.
    """
    return getattr(metric, "_forward_cache", None)
