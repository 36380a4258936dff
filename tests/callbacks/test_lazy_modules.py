"""A lazy module trains with every callback as without one, also if a part of it never runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from eventtrain import LightningModule, MisconfigurationError
from eventtrain.callbacks import (
    DistributedDataParallel,
    ExponentialMovingAverage,
    GradientAccumulation,
    GradientClipping,
    GradientNormMonitor,
    ModelSummary,
    TensorBoardLogger,
    TerminateOnNaN,
)
from eventtrain.callbacks.loggers.run_files import module_text
from eventtrain.callbacks.stopping.terminate_on_nan import non_finite
from tests.kit import train

pytestmark = pytest.mark.usefixtures("in_tmp_path")


class Lazy(LightningModule):
    """Lazy layers, of which one runs from the second epoch on and one never does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.LazyLinear(1))
        self.late = nn.LazyLinear(1)
        self.unused = nn.LazyBatchNorm1d()
        self.example_input_array = torch.ones(4, 2)

    def forward(self, x: Tensor) -> Any:
        output = self.layers(x)
        return output if self.current_epoch == 0 else self.late(output)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch).square().mean()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self(batch).square().mean())

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.1)


def trained(*callbacks: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    module = Lazy()
    data = list(torch.randn(3, 4, 2))
    train(module, data, *callbacks, val=data[:1], max_epochs=2)
    return {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("unused")}


OBSERVERS: dict[str, Callable[[], Any]] = {
    "TensorBoardLogger": TensorBoardLogger,
    "its histograms": lambda: TensorBoardLogger(histograms=1),
    "ModelSummary": ModelSummary,
    "GradientNormMonitor": lambda: GradientNormMonitor(per_layer=True),
    "ExponentialMovingAverage": lambda: ExponentialMovingAverage(0.9),
    "GradientAccumulation": lambda: GradientAccumulation(1),
    "GradientClipping": lambda: GradientClipping(1000.0),
    "TerminateOnNaN": lambda: TerminateOnNaN(every_n_batches=1),
}


@pytest.mark.parametrize("name", OBSERVERS)
def test_a_callback_that_only_watches_leaves_the_bits_of_a_lazy_module(name: str) -> None:
    expected, weights = trained(), trained(OBSERVERS[name]())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[each], expected[each]) for each in expected)


def test_the_graph_of_a_lazy_module_is_not_drawn_and_its_weights_are_not_either() -> None:
    expected = trained()
    with pytest.warns(UserWarning, match=r"No graph of Lazy is logged: it has lazy modules.*configure_model"):
        weights = trained(TensorBoardLogger(log_graph=True))
    assert all(torch.equal(weights[each], expected[each]) for each in expected)


def test_the_graph_of_a_lazy_module_that_has_run_is_drawn() -> None:
    class Ready(Lazy):
        def configure_model(self) -> None:
            self.layers(torch.ones(4, 2))
            del self.late, self.unused

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(Ready(), list(torch.randn(1, 4, 2)), TensorBoardLogger(log_graph=True))


def test_the_number_of_parameters_tells_of_lazy_ones() -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.LazyLinear(1))
    head = module_text(module).splitlines()[0]  # type: ignore[arg-type]
    assert head.startswith("2 parameters, 2 of them trained; 2 tensors of lazy modules")
    assert "lazy" not in module_text(nn.Linear(1, 1)).splitlines()[0]  # type: ignore[arg-type]


def test_the_averages_are_those_of_layers_that_have_run() -> None:
    average = ExponentialMovingAverage(0.5)
    weights = trained(average)
    assert "layers.0.weight" in average.averages
    assert not any(name.startswith(("late", "unused")) for name in average.averages)
    assert not torch.equal(average.averages["layers.0.weight"], weights["layers.0.weight"])


def test_values_that_are_not_finite_are_found_beside_lazy_ones() -> None:
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.LazyBatchNorm1d())
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))
    assert non_finite(module) == ["0.weight (1 of 1 values)"]


def test_processes_cannot_share_weights_that_are_not_there() -> None:
    callback = DistributedDataParallel()
    with pytest.raises(MisconfigurationError, match=r"DistributedDataParallel: 1\.weight of Sequential.*configure_model"):
        callback.check_initialized(nn.Sequential(nn.Linear(1, 1), nn.LazyLinear(1)))
    callback._processes = SimpleNamespace()  # type: ignore[assignment]
    trainer: Any = SimpleNamespace(module=Lazy())
    event: Any = SimpleNamespace(stage="fit")
    with pytest.raises(MisconfigurationError, match=r"layers\.0\.weight of Lazy"):
        callback.on_setup(trainer, event)


def test_files_are_written(tmp_path: Path) -> None:
    trained(TensorBoardLogger(tmp_path / "runs", histograms=1))
    assert list(tmp_path.glob("runs/Lazy/version_0/events*"))
