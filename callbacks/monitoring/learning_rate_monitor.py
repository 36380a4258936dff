"""Log the learning rates that updates used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from eventtrain.callback import Callback
from eventtrain.callbacks.monitoring.numbered import numbered
from eventtrain.core.optimizer import LightningOptimizer
from eventtrain.events import AfterOptimizerStep, Teardown
from eventtrain.optim.lr_scheduler import LRSchedulerConfig
from eventtrain.trainer import Trainer


class LearningRateMonitor(Callback):
    """Log the learning rate of each parameter group, as the update used it, in automatic and in manual optimization.

    Listens to ``after_optimizer_step``, which comes before schedulers step, and adds the rates to the values of the update
    by ``trainer.log_on_step``. Loggers write them at their cadence. Nothing is logged for a skipped step, nor for a step of
    ``optimizer.optimizer``, because no event is published for it. Also listens to ``teardown``.

    Emits, for an optimizer of the class ``SGD``:

    - ``lr-SGD``; or ``lr-SGD-0``, ``lr-SGD-1``, ... if the run has several optimizers of the class;
    - the ``name`` of a scheduler's config in place of ``lr-SGD``, for the optimizer whose rates it sets;
    - ``lr-SGD/group_0``, ``lr-SGD/group_1``, ... if it has several parameter groups, and ``lr-SGD/<name>`` for a group
      that has a ``"name"``; names that several groups have are numbered like the classes;
    - the same with ``-momentum`` (the group's ``momentum``, or the first of its ``betas``) and ``-weight_decay``, if you ask
      for them and the optimizer has them.

    Args:
        momentum: Whether to log momentum.
        weight_decay: Whether to log weight decay.

    Example:
        >>> from eventtrain import Trainer
        >>> from eventtrain.callbacks import LearningRateMonitor
        >>> trainer = Trainer(max_epochs=1, callbacks=[LearningRateMonitor(momentum=True)])
        >>> trainer.callback(LearningRateMonitor).momentum
        True
    """

    def __init__(self, *, momentum: bool = False, weight_decay: bool = False) -> None:
        self.momentum = momentum
        self.weight_decay = weight_decay
        # For each parameter group of an optimizer, the names to log under and the group's keys: names are made once.
        self._entries: dict[LightningOptimizer, list[list[tuple[str, str]]]] = {}

    def on_after_optimizer_step(self, trainer: Trainer, event: AfterOptimizerStep) -> None:
        optimizer = event.optimizer
        groups = optimizer.optimizer.param_groups  # on the wrapped one: the wrapper's look-up is slower
        entries = self._entries.get(optimizer)
        if entries is None or len(entries) != len(groups):  # add_param_group was called
            entries = self._entries[optimizer] = list(self._names(optimizer, trainer))
        values: dict[str, Any] = {}
        for group, names in zip(groups, entries, strict=True):
            for name, key in names:
                value = group[key]
                if key == "betas":
                    value = value[0]
                # A scheduler changes the rate of a capturable optimizer in place.
                values[name] = value.detach().clone() if isinstance(value, Tensor) else value
        trainer.log_on_step(values)

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        self._entries.clear()

    def _names(self, optimizer: LightningOptimizer, trainer: Trainer) -> Iterator[list[tuple[str, str]]]:
        """Yield for each parameter group the pairs of a name to log under and the group's key."""
        curves = numbered(curve(each, trainer.lr_scheduler_configs) for each in trainer.optimizers)
        name = next(name for name, each in zip(curves, trainer.optimizers, strict=True) if each is optimizer)
        groups = optimizer.optimizer.param_groups
        ends = numbered(f"/{group.get('name', f'group_{i}')}" for i, group in enumerate(groups)) if len(groups) > 1 else [""]
        for group, end in zip(groups, ends, strict=True):
            keys = {"lr": ""}
            if self.momentum:
                keys["momentum" if "momentum" in group else "betas"] = "-momentum"
            if self.weight_decay:
                keys["weight_decay"] = "-weight_decay"
            # Some optimizers choose their rate themselves, and have None.
            yield [(f"{name}{end}{suffix}", key) for key, suffix in keys.items() if group.get(key) is not None]


def curve(optimizer: LightningOptimizer, configs: list[LRSchedulerConfig]) -> str:
    """Return the name of an optimizer's curve: the name in a scheduler's config, or one made from the optimizer's class."""
    names = [each.name for each in configs if each.name and each.sets_rates_of(optimizer)]
    return names[0] if names else f"lr-{type(optimizer.optimizer).__name__}"
