"""Optimizers as people write them: torch's step hooks do not see the steps of most of them."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer


class Lookahead(Optimizer):
    """Holds an optimizer, shares its groups and state, and leaves out ``Optimizer.__init__``."""

    def __init__(self, optimizer: Optimizer, k: int = 2, alpha: float = 0.5) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.state = optimizer.state
        self.defaults = optimizer.defaults
        self.k, self.alpha, self.count = k, alpha, 0
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for slows, group in zip(self.slow, self.param_groups, strict=True):
                for slow, fast in zip(slows, group["params"], strict=True):
                    slow.add_(fast - slow, alpha=self.alpha)
                    fast.copy_(slow)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()


class EmptyHooks(Lookahead):
    """Makes the dicts of hooks by hand, which then nobody calls."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self._optimizer_step_pre_hooks: Any = OrderedDict()
        self._optimizer_step_post_hooks: Any = OrderedDict()


class Initialized(Lookahead):
    """Calls ``Optimizer.__init__`` too, so that its own hooks fire, and those of the optimizer that it holds."""

    def __init__(self, optimizer: Optimizer) -> None:
        Optimizer.__init__(self, optimizer.param_groups, optimizer.defaults)
        super().__init__(optimizer)


class SharedDict(Lookahead):
    """Takes over all attributes of the optimizer that it holds, its hooks among them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.__dict__.update(optimizer.__dict__)
        super().__init__(optimizer)


class Forwarding(Lookahead):
    """Reads whatever it lacks from the optimizer that it holds."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)


class Handwritten(SGD):
    """Overrides ``step`` and does not call ``super().step()``."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return descend(self, closure)


class Calling(SGD):
    """Calls ``super().step()``, so that hooks fire twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def descend(optimizer: Optimizer, closure: Any = None) -> Any:
    """Step as SGD does."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.data.add_(parameter.grad, alpha=-group["lr"])
    return loss


def with_method(optimizer: Optimizer) -> Optimizer:
    """Replace ``step`` on the object by a method that never calls the original."""
    optimizer.step = types.MethodType(descend, optimizer)  # type: ignore[method-assign]
    return optimizer


def with_function(optimizer: Optimizer) -> Optimizer:
    """Replace ``step`` on the object by a function that never calls the original."""
    optimizer.step = lambda closure=None: descend(optimizer, closure)  # type: ignore[method-assign]
    return optimizer


def with_partial(optimizer: Optimizer) -> Optimizer:
    """Replace ``step`` on the object by one that calls the original."""
    optimizer.step = functools.partial(optimizer.step)  # type: ignore[assignment]
    return optimizer


def with_decorator(optimizer: Optimizer) -> Optimizer:
    """Replace ``step`` on the object by a decorated one."""
    step = optimizer.step

    @functools.wraps(step)
    def decorated(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    optimizer.step = decorated  # type: ignore[method-assign]
    return optimizer


MAKERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.5),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.5),
    "lookahead": lambda parameters: Lookahead(SGD(parameters, lr=0.5, momentum=0.9)),
    "empty hooks": lambda parameters: EmptyHooks(SGD(parameters, lr=0.5)),
    "initialized": lambda parameters: Initialized(SGD(parameters, lr=0.5)),
    "shared dict": lambda parameters: SharedDict(SGD(parameters, lr=0.5)),
    "forwarding": lambda parameters: Forwarding(SGD(parameters, lr=0.5)),
    "lookahead twice": lambda parameters: Lookahead(Lookahead(SGD(parameters, lr=0.5)), k=3),
    "handwritten": lambda parameters: Handwritten(parameters, lr=0.5),
    "calling": lambda parameters: Calling(parameters, lr=0.5),
    "a method on the object": lambda parameters: with_method(SGD(parameters, lr=0.5)),
    "a function on the object": lambda parameters: with_function(SGD(parameters, lr=0.5)),
    "a partial on the object": lambda parameters: with_partial(SGD(parameters, lr=0.5)),
    "a decorator on the object": lambda parameters: with_decorator(SGD(parameters, lr=0.5)),
    "a method on a lookahead": lambda parameters: with_method(Lookahead(SGD(parameters, lr=0.5))),
}


class SAM(Optimizer):
    """Steps by two methods: the first climbs, the second goes back and steps an optimizer that it holds."""

    def __init__(self, params: Any, base: Any = SGD, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        for parameter in self.touched():
            assert parameter.grad is not None
            self.state[parameter]["before"] = parameter.detach().clone()
            parameter.add_(parameter.grad / parameter.grad.norm(), alpha=self.param_groups[0]["rho"])
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for parameter in self.touched():
            parameter.copy_(self.state[parameter]["before"])
        self.descend()
        if zero_grad:
            self.zero_grad()

    def descend(self) -> None:
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        closure = torch.enable_grad()(closure)
        loss = closure()
        self.first_step(zero_grad=True)
        closure()
        self.second_step()
        return loss

    def touched(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]


class BareSAM(SAM):
    """Holds no optimizer: its second step is written out."""

    def __init__(self, params: Any, rho: float = 0.05, **options: Any) -> None:
        Optimizer.__init__(self, params, {"rho": rho, **options})

    def descend(self) -> None:
        descend(self)
