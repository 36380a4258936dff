"""The order in which torch's wrapper sends gradients, which decides about the last bits of their sums.

Torch sends gradients in buckets. In the first reduction they are in the order of the parameters, and after it in the order in
which gradients arrived. With three or more processes the order in which numbers are added depends on the place in a bucket. So
a resumed run needs the order of the run before, from its first reduction on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Arrivals:
    """The order in which gradients arrive in the first reduction of a wrapper.

    Args:
        wrapper: The wrapper. It has not reduced gradients yet.
        parameters: The parameters that it reduces.

    Attributes:
        order: The indices of the parameters in the order of arrival; complete after the first reduction.
    """

    def __init__(self, wrapper: DistributedDataParallel, parameters: Sequence[nn.Parameter]) -> None:
        self.wrapper, self.parameters = wrapper, parameters
        self.order: list[int] = []
        self._reduces = False
        self._hooks: list[Any] = []
        if rearranges(wrapper):
            numbers: dict[Tensor, int] = {parameter: index for index, parameter in enumerate(parameters)}

            def arrive(parameter: Tensor) -> None:
                self._arrive(numbers[parameter])

            self._hooks = [each.register_post_accumulate_grad_hook(arrive) for each in parameters]  # type: ignore[no-untyped-call]

    @property
    def is_open(self) -> bool:
        """Whether the first reduction is still to come."""
        return bool(self._hooks)

    def begin(self, reduces: bool) -> None:
        """Begin a batch.

        Args:
            reduces: Whether its backward reduces gradients.
        """
        self._reduces = reduces
        self.order.clear()

    def _arrive(self, index: int) -> None:
        if self._reduces:
            self.order.append(index)
            if len(self.order) == len(self.parameters):
                self.stop()

    def stop(self) -> None:
        """Listen to arrivals no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def complete_order(self) -> list[int] | None:
        """The order of arrival; None before the first reduction, and if torch never rearranges gradients."""
        return None if self.is_open or not self.order else self.order

    def repeat(self, order: Sequence[int]) -> None:
        """Let gradients arrive in an order, so that the wrapper rearranges them before its next reduction.

        All processes have to call it. It sends zeros once; gradients stay as they are.

        Args:
            order: The indices of all parameters.
        """
        if not self.is_open:
            return
        self.begin(reduces=True)
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        ordered = [self.parameters[index] for index in order]
        with torch.enable_grad():
            zeros = self.wrapper(lambda: [nothing_of(parameter) for parameter in ordered])
            for zero in zeros:
                zero.backward()
            with self.wrapper.no_sync():  # torch rearranges at the beginning of a forward, by the gradients that there are
                self.wrapper(lambda: zeros)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient


def nothing_of(parameter: Tensor) -> Tensor:
    """Return a zero whose gradient by a parameter is zero."""
    return parameter.reshape(-1)[:0].sum()


def rearranges(wrapper: DistributedDataParallel) -> bool:
    """Return whether a wrapper rearranges gradients after its first reduction, in a way that can be repeated.

    With two processes it does not matter, because ``a + b`` has the bits of ``b + a``.
    """
    is_sparse = any(getattr(module, "sparse", False) for module in wrapper.modules())
    few = torch.distributed.get_world_size(wrapper.process_group) < 3
    return not (few or is_sparse or wrapper.find_unused_parameters or wrapper.static_graph)
