"""The schedulers and modules that tests of learning rate schedulers share."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from tests.kit import Probe


class Halving(LambdaLR):
    """Halves the rate at each step; ``last_epoch`` counts them."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, lambda count: 0.5**count)


def scheduled(scheduler: Any = Halving, **config: Any) -> Any:
    """Return a ``configure`` for the probe: its SGD with one scheduler."""
    return lambda sgd: {"optimizer": sgd, "lr_scheduler": {"scheduler": scheduler(sgd), **config}}


def steps(trainer: Any, index: int = 0) -> int:
    """Return how often a scheduler has stepped."""
    count: int = trainer.lr_scheduler_configs[index].scheduler.last_epoch
    return count


class Logging(Probe):
    """Logs ``x`` on step, ``mean`` on epoch, and in validation ``val``."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("x", batch)
        self.log("mean", batch, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", batch)


class Metered:
    """A scheduler that records its metrics. Not one of torch's, but with the same methods."""

    def __init__(self, optimizer: Any = None) -> None:
        self.metrics: list[float] = []

    def step(self, metric: Any) -> None:
        self.metrics.append(float(metric))

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.metrics = state["metrics"]


def metered(**config: Any) -> Any:
    return scheduled(Metered, reduce_on_plateau=True, **config)


def metrics_given(trainer: Any) -> list[float]:
    metrics: list[float] = trainer.lr_scheduler_configs[0].scheduler.metrics
    return metrics
