"""The optimizers and schedulers of a checkpoint: their classes, their parameter groups, and their states."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from eventtrain.checkpoint.storage import first_line
from eventtrain.checkpoint.weights import some
from eventtrain.errors import MisconfigurationError, escaped

if TYPE_CHECKING:
    from eventtrain.run.state import RunState

Groups = list[list[str | None]]
"""The parameters of each group of an optimizer by name; None for a tensor that is no parameter of the module."""


def parameter_groups(module: nn.Module, optimizers: Iterable[Optimizer]) -> list[Groups]:
    """Return the parameter groups of optimizers, by the names of the parameters.

    Args:
        module: The module.
        optimizers: Its optimizers.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [[[names.get(each) for each in group["params"]] for group in optimizer.param_groups] for optimizer in optimizers]


def class_names(state: RunState) -> dict[str, list[str]]:
    """Return the classes of a run's optimizers and schedulers, by the keys of a checkpoint that hold their states."""
    return {
        "optimizer_states": [type(optimizer.optimizer).__name__ for optimizer in state.optimizers],
        "lr_schedulers": [type(config.scheduler).__name__ for config in state.lr_scheduler_configs],
    }


def restore_optimizers(state: RunState, checkpoint: Mapping[str, Any], path: Any) -> None:
    """Give the optimizers and schedulers of a run their parameter groups and their states.

    Args:
        state: The state of the run, whose module has its weights.
        checkpoint: The checkpoint, in the current schema.
        path: Its file, for errors.

    Raises:
        MisconfigurationError: If the checkpoint is of other optimizers or schedulers.
    """
    assert state.module is not None
    for key, names in class_names(state).items():
        if len(checkpoint[key]) != len(names):
            raise _other(path, f"{len(checkpoint[key])} {key} and configure_optimizers returned {len(names)}")
        if (before := checkpoint["classes"].get(key, names)) != names:
            raise _other(path, f"{key} of {', '.join(before)}, and configure_optimizers returned {', '.join(names)}")
    optimizers = [wrapper.optimizer for wrapper in state.optimizers]
    if (groups := checkpoint["parameter_groups"]) is not None:
        for index, optimizer in enumerate(optimizers):
            configured, saved = groups["configured"][index], groups["current"][index]
            options = checkpoint["optimizer_states"][index].get("param_groups")
            rebuild_groups(optimizer, state.module, configured, saved, options, path)
        state.configured_groups = groups["configured"]
    for optimizer, saved in zip(optimizers, checkpoint["optimizer_states"], strict=True):
        needed = [name for name in getattr(optimizer, "defaults", ()) if name in optimizer.param_groups[0]]
        load_state(optimizer, saved, path)
        if lost := [name for name in needed if name not in optimizer.param_groups[0]]:  # older schemas do not name the class
            raise _other(path, f"the state of another optimizer than {type(optimizer).__name__}: it lacks {some(lost)}")
    for config, saved in zip(state.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True):
        if saved is None:
            continue  # a scheduler without a state
        functions = extend_functions(config.scheduler, saved)
        load_state(config.scheduler, saved, path)
        if functions and not rates_agree(config.scheduler):
            raise _other(
                path,
                f"a {type(config.scheduler).__name__} to which the run added functions, and a file holds no functions: add "
                "them in configure_optimizers, which on_load_checkpoint can tell that they are needed",
            )


def load_state(part: Any, saved: Any, path: Any) -> None:
    """Load the state of an optimizer or a scheduler.

    Raises:
        MisconfigurationError: If the state does not fit.
    """
    try:
        part.load_state_dict(saved)
    except Exception as error:
        raise _other(path, f"a state that does not fit {type(part).__name__} ({first_line(error)})") from escaped(error)


def _other(path: Any, difference: str) -> MisconfigurationError:
    return MisconfigurationError(
        f"{path} holds {difference}. Resume with the configure_optimizers that wrote it, or load only the weights with "
        "load_from_checkpoint."
    )


# ------------------------------------------------------------------ parameter groups that a run changed


def rebuild_groups(optimizer: Optimizer, module: nn.Module, configured: Groups, saved: Groups, options: Any, path: Any) -> None:
    """Give an optimizer the parameter groups that it had at a checkpoint, if the run changed them after configure_optimizers.

    Args:
        optimizer: The optimizer, as configure_optimizers returns it now.
        module: The module.
        configured: The groups that configure_optimizers gave it in the run that wrote the checkpoint.
        saved: Its groups at the checkpoint.
        options: Its ``param_groups`` in the checkpoint, with the options of each group.
        path: The checkpoint's file, for errors.

    Raises:
        MisconfigurationError: If configure_optimizers gives it other groups now, or the module lacks a parameter of a group.
    """
    [current] = parameter_groups(module, [optimizer])
    if current == saved:
        return
    parameters: dict[str | None, Tensor] = dict(module.named_parameters())
    before, after = ({name for group in groups for name in group} for groups in (configured, saved))
    # The run added the others. If the module has trained before, or has new layers since on_load_checkpoint, they are here too.
    comparable = [[name for name in group if name in before or name not in after] for group in current]
    if [group for group in comparable if group] != [group for group in configured if group]:
        if [*map(len, current)] == [*map(len, saved)] and not before <= {None, *parameters}:
            return  # on_load_checkpoint has renamed the weights: their order counts
        raise _other(path, _difference(type(optimizer).__name__, current, configured))
    changed = [index for index, names in enumerate(saved) if current[index : index + 1] != [names]]
    if lost := [name for index in changed for name in saved[index] if name not in parameters]:
        raise _other(path, f"parameter groups with {some(lost)}, and {type(module).__name__} has no such parameters")
    del optimizer.param_groups[len(saved) :]
    for index in changed:
        tensors = [parameters[name] for name in saved[index]]
        if index < len(current):
            optimizer.param_groups[index]["params"] = tensors
        else:
            optimizer.add_param_group({**options[index], "params": tensors})
    accept_again(optimizer, [optimizer.param_groups[index]["params"] for index in changed])


def accept_again(optimizer: Optimizer, groups: list[list[Tensor]]) -> None:
    """Let each of some groups be added once more without effect: hooks such as ``on_train_start`` run again in a resumed run.

    Args:
        optimizer: The optimizer, which has these groups.
        groups: The parameters of each group.
    """
    add, pending = optimizer.add_param_group, [{*group} for group in groups]

    def add_param_group(param_group: dict[str, Any]) -> None:
        params = param_group["params"]
        params = param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
        tensors = {each[1] if isinstance(each, tuple) else each for each in params}
        if tensors in pending:
            pending.remove(tensors)
            if any(tensors == {*group["params"]} for group in optimizer.param_groups):
                return
        add(param_group)

    optimizer.add_param_group = add_param_group  # type: ignore[method-assign]


def _difference(name: str, now: Groups, then: Groups) -> str:
    """Return in words how the parameter groups of an optimizer differ from those that it was configured with."""
    here, there = ([each for group in groups for each in group] for groups in (now, then))
    gone, new = ([each for each in one if each not in other] for one, other in ((there, here), (here, there)))
    more = f", only there {some(gone)}" * bool(gone) + f", only here {some(new)}" * bool(new)
    sizes = [[len(group) for group in groups] for groups in (then, now)]
    return (
        f"the state of {name} with parameter groups of the sizes {sizes[0]}; configure_optimizers returned sizes {sizes[1]}"
        f"{more or ', or another order'}"
    )


# ------------------------------------------------------------------ functions of schedulers


def extend_functions(scheduler: Any, saved: Any) -> bool:
    """Give a scheduler that has a function for each group the functions of groups that the run added: copies of its last one.

    Args:
        scheduler: The scheduler.
        saved: Its state.

    Returns:
        Whether there were such groups.
    """
    functions: list[Any] = getattr(scheduler, "lr_lambdas", [])
    count = len(saved["lr_lambdas"]) - len(functions) if functions and "lr_lambdas" in saved else 0
    for _ in range(count):
        functions.append(copy.deepcopy(functions[-1]))  # torch puts the state of a callable object into it
    return count > 0


def rates_agree(scheduler: Any) -> bool:
    """Return whether a scheduler's functions give the rates that it set last."""
    return isinstance(scheduler, LambdaLR) and all(
        rate == base * function(scheduler.last_epoch)
        for rate, base, function in zip(scheduler.get_last_lr(), scheduler.base_lrs, scheduler.lr_lambdas, strict=False)
    )
