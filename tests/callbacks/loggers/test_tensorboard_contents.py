"""TensorBoardLogger writes hyperparameters, texts, graphs, pictures and histograms: event files are read back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.plugins.hparams.metadata import (  # type: ignore[import-untyped]
    parse_session_start_info_plugin_data,
)
from torch import Tensor

from eventtrain import Trainer
from eventtrain.callbacks import GradientClipping, TensorBoardLogger
from eventtrain.callbacks.loggers import event_files, tensorboard_logger
from tests.callbacks.loggers.logged import Drawn, Model, fit, histograms, read, summary, texts
from tests.kit import On

# ------------------------------------------------------------------ hyperparameters and texts


def test_the_hyperparameters_are_written_with_the_run(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path, max_epochs=1)
    assert b"optimizers" in read(logger).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert len(list((tmp_path / "runs" / "Model").iterdir())) == 1, "no second run beside it"


def test_hyperparameters_of_any_kind_are_converted_for_the_page() -> None:
    hparams = {"flag": True, "number": 3, "nan": float("nan"), "name": "x", "nested": {"a": 0.5, "b": [1, 2]}, "none": None}
    (value,) = event_files.session_start(hparams).value
    shown = parse_session_start_info_plugin_data(value.metadata.plugin_data.content).hparams
    assert {name: getattr(v, v.WhichOneof("kind")) for name, v in shown.items()} == {
        "flag": True, "number": 3.0, "nan": "nan", "name": "x", "nested/a": 0.5, "nested/b": "[1, 2]", "none": "None",
    }  # fmt: skip


def test_environment_configuration_and_module_are_written(tmp_path: Path) -> None:
    clipping = GradientClipping(0.5)
    logger, model, _ = fit(tmp_path, clipping, max_epochs=1, seed=3)
    (environment,), (configuration,), (module,) = (
        texts(logger, f"run/{part}") for part in ("environment", "configuration", "module")
    )
    assert f"| torch | {torch.__version__} |" in environment and "| device | cpu |" in environment
    assert "| max_epochs | 1 |" in configuration and "| seed | 3 |" in configuration
    assert "| callback 2 | GradientClipping(gradient_clip_algorithm='norm', norm_type=2.0) |" in configuration
    assert "| optimizer 1 | SGD ( Parameter Group 0 " in configuration and "ExponentialLR per step" in configuration
    assert module.startswith("3 parameters, 3 of them trained\n\n    Model(\n      (layers)")


# ------------------------------------------------------------------ graph and pictures


def test_the_graph_is_drawn_and_leaves_no_trace(tmp_path: Path) -> None:
    drawn, plain = Drawn(), Drawn()
    fit(tmp_path, model=plain, max_epochs=1, seed=1)
    left = torch.rand(1), random.random()
    logger, _, _ = fit(tmp_path, model=drawn, max_epochs=1, seed=1, logger={"log_graph": True})
    assert (torch.rand(1), random.random()) == left
    assert drawn.training_modes == plain.training_modes and not drawn.training_modes["frozen"]
    mean = drawn.norm.running_mean
    assert mean is not None and torch.equal(mean, torch.zeros(2))
    nodes = {node.name for node in read(logger).Graph().node}
    assert any("BatchNorm1d[norm]" in name for name in nodes) and any("Linear" in name for name in nodes)


def test_the_graph_is_drawn_once_in_a_resumed_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"logger": {"log_graph": True}}
    fit(tmp_path, model=Drawn(), fails_at=7, **options)
    logger, _, _ = fit(tmp_path, model=Drawn(), ckpt_path=tmp_path / "epoch_0.ckpt", **options)
    assert read(logger).Tags()["graph"] and "more than one graph" not in caplog.text


def test_a_graph_that_cannot_be_drawn_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Model):
        def forward(self, batch: Tensor) -> Tensor:
            raise RuntimeError("not today")

    broken = Broken()
    with pytest.warns(UserWarning, match=r"No graph of Broken .* no example input\. Set self\.example_input_array"):
        fit(tmp_path, model=broken, max_epochs=1, logger={"log_graph": True})
    broken.example_input_array = torch.rand(3, 2)
    with pytest.warns(UserWarning, match="No graph of Broken .* cannot be traced: RuntimeError: not today"):
        fit(tmp_path, model=broken, max_epochs=1, logger={"log_graph": True})
    assert broken.training and capsys.readouterr().out == ""


def test_the_writer_takes_pictures_and_text(tmp_path: Path) -> None:
    class Draws(Model):
        def on_train_epoch_end(self) -> None:
            self.logger.experiment.add_image("picture", torch.zeros(1, 4, 4), self.global_step)
            self.trainer.callback(TensorBoardLogger).writer.add_text("text", "hello", self.global_step)

    logger, _, _ = fit(tmp_path, model=Draws())
    assert [image.step for image in read(logger).Images("picture")] == [4, 8]
    assert texts(logger, "text") == ["hello", "hello"]


# ------------------------------------------------------------------ histograms


def first_weight(trainer: Trainer) -> Tensor:
    return dict(trainer.module.named_parameters())["layers.0.weight"]


class Gradients:
    """Records the gradients before each update, and the weights after it."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.weights: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, event: Any) -> None:
        gradient = first_weight(trainer).grad
        assert gradient is not None
        self.before.append(gradient.clone())

    def on_after_update(self, trainer: Trainer, event: Any) -> None:
        self.weights.append(first_weight(trainer).detach().clone())


def test_histograms_hold_the_weights_and_the_true_gradients(tmp_path: Path) -> None:
    gradients = Gradients()
    logger, _, trainer = fit(tmp_path, gradients, GradientClipping(1e-3), logger={"histograms": 3})
    assert histograms(logger, "gradients/layers.0.weight") == {step: summary(gradients.before[step - 1]) for step in (3, 6)}
    assert histograms(logger, "parameters/layers.0.weight") == {step: summary(gradients.weights[step - 1]) for step in (3, 6)}
    assert float(gradients.before[2].abs().max()) > 1e-2, "far above the clipped ones"
    tags = {f"{kind}/layers.0.{name}" for kind in ("parameters", "gradients") for name in ("weight", "bias")}
    assert set(read(logger).Tags()["histograms"]) == tags
    assert logger.on_before_optimizer_step not in trainer.signals.before_optimizer_step.listeners
    assert logger.on_after_update not in trainer.signals.after_update.listeners


def test_without_histograms_nothing_listens_for_them(tmp_path: Path) -> None:
    during: list[Any] = []
    look = On(train_start=lambda trainer, event: during.append(trainer.signals.before_optimizer_step.listeners))
    fit(tmp_path, look, max_epochs=1)
    assert during == [()]


def test_a_vetoed_update_has_no_histogram_and_the_next_one_has_its_gradients(tmp_path: Path) -> None:
    class Vetoes(Gradients):
        def on_before_optimizer_step(self, trainer: Trainer, event: Any) -> None:
            super().on_before_optimizer_step(trainer, event)
            if trainer.batch_idx == 1:
                event.skip("not this one")

    gradients = Vetoes()
    logger, _, _ = fit(tmp_path, gradients, max_epochs=1, logger={"histograms": 2})
    assert histograms(logger, "gradients/layers.0.weight") == {2: summary(gradients.before[2])}, (
        "the gradients of the third batch"
    )


def test_several_optimizers_have_histograms(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path, model=Model(optimizers=2), max_epochs=1, logger={"histograms": 2})
    for layer in (0, 1):
        assert list(histograms(logger, f"gradients/layers.{layer}.weight")) == [2, 4]


def test_an_optimizer_that_did_not_step_has_no_histogram_of_gradients(tmp_path: Path) -> None:
    class Alternates(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            for index, optimizer in enumerate(self.optimizers()):
                if index == 0 or batch_idx < 2:
                    optimizer.zero_grad()
                    self.manual_backward(self.layers[index](batch).pow(2).mean())
                    optimizer.step()

    logger, _, _ = fit(tmp_path, model=Alternates(optimizers=2), max_epochs=1, logger={"histograms": 2})
    steps = {layer: list(histograms(logger, f"gradients/layers.{layer}.weight")) for layer in (0, 1)}
    assert steps == {0: [2, 4], 1: [2]}


def test_histograms_leave_out_values_that_are_not_finite() -> None:
    values = torch.tensor([1.0, float("inf"), float("nan"), -2.0], dtype=torch.float16)
    assert torch.equal(tensorboard_logger.finite_values(values), torch.tensor([1.0, -2.0]))
    assert tensorboard_logger.finite_values(torch.full((2,), float("nan"))).numel() == 0
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([2.0, 3.0]), (4,), check_invariants=True)
    assert torch.equal(tensorboard_logger.finite_values(sparse), torch.tensor([5.0]))
