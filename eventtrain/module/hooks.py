"""The hooks that callbacks and modules may override, made from the event table.

At run time the hook of an event is a method that does nothing and is never connected. ``hooks.pyi`` next to this file, which
``python docs/generate.py`` writes, gives their signatures to editors and type checkers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eventtrain.events import EVENTS, module_hook
from eventtrain.module.modes import leave_evaluation

MODULE_ONLY_HOOKS = (
    *("on_before_batch_transfer", "on_after_batch_transfer", "on_validation_model_zero_grad"),
    *(f"on_{stage}_model_{mode}" for stage in ("validation", "test", "predict") for mode in ("eval", "train")),
)
"""Lightning's module hooks that the core calls, and that are not events."""

SWITCHES: dict[str, Callable[[Any], Any]] = {
    "zero_grad": lambda module: module.zero_grad(),
    "eval": lambda module: module.eval(),
    "train": leave_evaluation,
}
"""The work of those hooks with ``model_`` in their names, by the end of the name."""


def _hook(name: str, doc: str, work: Callable[[Any], Any] = lambda module: None) -> Callable[..., None]:
    def hook(self: Any, *args: Any, **kwargs: Any) -> None:
        work(self)

    hook.__name__ = name
    hook.__doc__ = doc
    return hook


class CallbackHooks:
    """One ``on_<event>(self, trainer, event)`` per event."""


class ModuleHooks:
    """One hook per event, with Lightning's name and arguments if Lightning has the hook."""


for _name, _event_type in EVENTS.items():
    setattr(CallbackHooks, f"on_{_name}", _hook(f"on_{_name}", _event_type.__doc__ or ""))
    setattr(ModuleHooks, module_hook(_event_type), _hook(module_hook(_event_type), _event_type.__doc__ or ""))

for _name in MODULE_ONLY_HOOKS:
    if not _name.endswith("_transfer"):  # these return the batch and are defined with the loaders
        _work = SWITCHES[_name.rpartition("model_")[2]]
        setattr(ModuleHooks, _name, _hook(_name, "Zero gradients, or switch the mode, around an evaluation.", _work))
