"""Count the batches and the weights that all processes contribute to an accumulation window, without an exchange if all of its
batches have a loss and no weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eventtrain.callbacks.distributed.notices import Notices
from eventtrain.distributed import Weight


class Windows:
    """The windows of a run, which all processes close in the same batches.

    A process with a batch without a loss tells its count in a notice, and waits until all have heard it, before it takes part
    in the reduction of the gradients. The reduction ends in no process before all take part, so each process knows the count
    when its backward is over. Once all processes have weights, they are added up by one exchange after the reduction.

    On devices whose reduction does not wait for the host, one vector of counts and weights is reduced on the device instead,
    and is only read on the host by a process without a loss.

    Both exchanges come after the gradients': before them, a process whose closing batch was skipped has not yet taken part in
    the exchange of buffers that the forward of the others begins with.

    Args:
        notices: The notices of the run.
        device: The device of that vector; None if the host waits for the reduction of the gradients.
    """

    def __init__(self, notices: Notices, device: torch.device | None) -> None:
        self._notices, self._device = notices, device
        self._number = 0  # of windows so far
        self._has_losses = self._all_have_weights = False
        # By window and rank, from notices; guarded by their lock.
        self._counts: dict[int, dict[int, tuple[int, bool]]] = {}
        self._weights: dict[int, dict[int, float | None]] = {}
        notices.on("count", self._on_count)
        notices.on("weight", self._on_weight)

    def begin(self, count: int, missing: int, weight: Weight) -> None:
        """Tell the others what they have to know, before this process takes part in the reduction of a window.

        Args:
            count: The batches that this process contributes.
            missing: The batches of this process that had no loss.
            weight: The sum of their weights in this process; None if they have none.
        """
        self._number += 1
        self._has_losses = self._has_losses or count > 0
        if missing and self._device is None:
            content = [self._number, count, self._has_losses]
            number = self._notices.post("count", content, acknowledged=True)
            self._notices.wait_until_heard(number, f"the gradients of window {self._number}")

    def end(self, count: int, missing: int, weight: Weight) -> tuple[Tensor | float, Weight]:
        """Return the mean count and the mean weight of all processes, after the reduction.

        Args:
            count: The batches that this process contributes.
            missing: The batches of this process that had no loss.
            weight: The sum of their weights in this process; None if they have none.
        """
        size = self._notices.world_size
        if self._device is not None:
            vector = torch.tensor([count, 0.0, weight is not None], device=self._device)
            if weight is not None:
                vector[1] = weight
            dist.all_reduce(vector)
            mean = vector / size
            has_weights = weight is not None if count else mean[2].item() > 0
            return mean[0] if count else mean[0].item(), mean[1] if has_weights else None
        with self._notices.changed:
            told = self._counts.pop(self._number, {})
        batches = count + missing
        total = sum(told[rank][0] if rank in told else batches for rank in range(size))
        mean_weight = self._mean_weight(weight, all(has_losses for _, has_losses in told.values()))
        return total // size if total % size == 0 else total / size, mean_weight

    def _mean_weight(self, weight: Weight, all_know: bool) -> Weight:
        """Return the mean of the weights.

        Args:
            weight: The weight of this process.
            all_know: Whether each process has had a loss, so that it knows whether there are weights.
        """
        size = self._notices.world_size
        if not all_know and not self._all_have_weights:
            number = self._number
            self._notices.post("weight", [number, None if weight is None else float(weight)])
            with self._notices.changed:
                exchange = f"the weights of window {number}"
                told = self._notices.wait_for(lambda: self._complete(number), exchange, lambda: self._silent(number))
                del self._weights[number]
            weights = [each for each in told.values() if each is not None]
            self._all_have_weights = bool(weights)
            return sum(weights) / size if weights else None
        if weight is None and not self._all_have_weights:
            return None
        self._all_have_weights = True
        total = as_tensor(weight)
        dist.all_reduce(total)
        return total / size

    def _complete(self, number: int) -> dict[int, float | None]:
        told = self._weights.get(number, {})
        return told if len(told) == self._notices.world_size else {}

    def _silent(self, number: int) -> str:
        told = self._weights.get(number, {})
        return "nothing from rank " + ", ".join(str(rank) for rank in range(self._notices.world_size) if rank not in told)

    def _on_count(self, rank: int, content: Any) -> None:
        number, count, has_losses = content
        self._counts.setdefault(number, {})[rank] = count, has_losses

    def _on_weight(self, rank: int, content: Any) -> None:
        number, weight = content
        self._weights.setdefault(number, {})[rank] = weight


def as_tensor(weight: Weight) -> Tensor:
    """Return a copy of a weight as a tensor on the CPU, with all of its digits; 0 for None."""
    return torch.as_tensor(0.0 if weight is None else weight, dtype=torch.float64, device="cpu").detach().clone()
