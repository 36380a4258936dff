"""Logs the learning rates that updates used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from eventtrain.callback import Callback
from eventtrain.core.optimizer import LightningOptimizer, numbered
from eventtrain.events import AfterOptimizerStep, Teardown
from eventtrain.trainer import Trainer


class LearningRateMonitor(Callback):
    """Logs the learning rate of each parameter group, as the update used it, in automatic and in manual optimization.

    Listens to ``after_optimizer_step``, which comes before schedulers step, and adds to what the update hands to loggers,
    which write it at their cadence. A step that was skipped logs nothing, and neither does one that is taken on
    ``optimizer.optimizer`` directly, which publishes no event.

    Emits, for an optimizer of the class ``SGD``:

    - ``lr-SGD``; ``lr-SGD-0``, ``lr-SGD-1``, ... where a run has several of the class;
    - ``lr-SGD/group_0``, ``lr-SGD/group_1``, ... where it has several parameter groups, and ``lr-SGD/<name>`` for a group
      that has a ``"name"``; names that several groups have are numbered like the classes;
    - the same with ``-momentum`` (the group's ``momentum``, or the first of its ``betas``) and ``-weight_decay``, where
      those are asked for and the optimizer has them.

    Args:
        momentum: Whether to log momentum.
        weight_decay: Whether to log weight decay.
    """

    def __init__(self, *, momentum: bool = False, weight_decay: bool = False) -> None:
        self.momentum = momentum
        self.weight_decay = weight_decay
        # What is logged of each parameter group of an optimizer, as pairs of name and key: names are made once.
        self._logged: dict[LightningOptimizer, list[list[tuple[str, str]]]] = {}

    def on_after_optimizer_step(self, trainer: Trainer, event: AfterOptimizerStep) -> None:
        optimizer = event.optimizer
        groups = optimizer.optimizer.param_groups  # on the wrapped one: the wrapper's look-up is slower
        logged = self._logged.get(optimizer)
        if logged is None or len(logged) != len(groups):  # add_param_group was called
            logged = self._logged[optimizer] = list(self._names(optimizer, trainer.optimizers))
        fresh: dict[str, Any] = trainer.metrics.fresh  # what log_on_step adds to, without its call and mapping
        for group, entries in zip(groups, logged, strict=True):
            for name, key in entries:
                value = group[key]
                if key == "betas":
                    value = value[0]
                # A scheduler changes the rate of a capturable optimizer in place.
                fresh[name] = value.detach().clone() if isinstance(value, Tensor) else value

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        self._logged.clear()

    def _names(self, optimizer: LightningOptimizer, optimizers: list[LightningOptimizer]) -> Iterator[list[tuple[str, str]]]:
        """What is logged of each parameter group, as pairs of name and key."""
        kinds = numbered(type(each.optimizer).__name__ for each in optimizers)
        kind = next(name for name, each in zip(kinds, optimizers, strict=True) if each is optimizer)
        groups = optimizer.optimizer.param_groups
        ends = numbered(f"/{group.get('name', f'group_{i}')}" for i, group in enumerate(groups)) if len(groups) > 1 else [""]
        for group, end in zip(groups, ends, strict=True):
            keys = {"lr": ""}
            if self.momentum:
                keys["momentum" if "momentum" in group else "betas"] = "-momentum"
            if self.weight_decay:
                keys["weight_decay"] = "-weight_decay"
            # Some optimizers find their own rate, and have None.
            yield [(f"lr-{kind}{end}{suffix}", key) for key, suffix in keys.items() if group.get(key) is not None]
