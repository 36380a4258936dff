"""One validate, test or predict outside a fit."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from eventtrain.checkpoint.find import read_checkpoint
from eventtrain.checkpoint.weights import load_weights
from eventtrain.core.evaluation import EvaluationStage
from eventtrain.core.state import RunStage
from eventtrain.errors import MisconfigurationError
from eventtrain.events import CheckpointRead, LoadCheckpoint
from eventtrain.metrics.metrics import Metrics
from eventtrain.module.modes import evaluation_mode
from eventtrain.module.overriding import overridden_method
from eventtrain.run.loaders import LOADER_HOOKS
from eventtrain.run.run import Run

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer

STAGES: dict[RunStage, EvaluationStage] = {"validate": "validation", "test": "test", "predict": "predict"}


class Evaluation(Run):
    """One validate, test or predict, which continues the state of the last run.

    Args:
        trainer: The trainer.
        stage: ``"validate"``, ``"test"`` or ``"predict"``.
        keeps: For predict, whether the values that the step returns are kept.
        model: The module, compiled or not; None for the module of the last run.
        dataloaders: The loader or loaders that the call was given.
        ckpt_path: A checkpoint whose weights are loaded first. None for the weights as they are; without a model after a fit,
            for the best checkpoint if the fit monitored a metric.
        datamodule: The datamodule, or None.

    Attributes:
        results: The epoch's metrics, one dict per loader.
        outputs: For predict, the values that the step returned, one list per loader.
    """

    def __init__(
        self, trainer: Trainer, stage: RunStage, keeps: bool, model: Any, dataloaders: Any, ckpt_path: Any, datamodule: Any
    ) -> None:
        self.evaluated: EvaluationStage = STAGES[stage]
        super().__init__(trainer, trainer.run_state, stage, model, datamodule, {self.evaluated: dataloaders})
        self.state.metrics = Metrics(trainer.processes.data)
        self.ckpt_path, self.keeps = ckpt_path, keeps
        self.continues_fit = model is None and self.module is self.state.fitted
        self.results: list[dict[str, float]] = []
        self.outputs: list[list[Any]] = []

    def body(self) -> None:
        """Evaluate the module."""
        module, stage = self.module, self.evaluated
        # predict_step is the one step that has a default which does something.
        if stage != "predict" and overridden_method(module, f"{stage}_step") is None:
            raise MisconfigurationError(f"{type(module).__name__} has no {stage}_step. Define it to {self.stage} the module.")
        passes = self.loaders.passes(stage)
        if not passes:
            raise MisconfigurationError(
                f"There is nothing to {self.stage} on. Give {self.stage}(model, dataloaders=...), a datamodule, or define "
                f"{LOADER_HOOKS[stage]} in the module. {self.misnamed_loader(stage)}".rstrip()
            )
        path, checkpoint = read_checkpoint(self.trainer, self.ckpt_path, best_of_fit=self.continues_fit)
        if checkpoint is not None:
            self.signals.checkpoint_read.publish(CheckpointRead(checkpoint, path))
            self.signals.load_checkpoint.publish(LoadCheckpoint(checkpoint))
            load_weights(module, checkpoint, path)
        loop = self.evaluation_loop(stage)
        loop.keep_outputs = stage == "predict" and self.keeps
        self.outputs = loop.evaluate()
        self.results = self.state.metrics.results(len(passes))

    @contextmanager
    def evaluating(self) -> Generator[None, None, None]:
        """The context of an evaluation outside a fit: without gradients, and if it may be in inference mode, also without the
        data that makes them possible."""
        # Parameters of a subclass of Tensor, such as sharded ones, may fail in inference mode, or afterwards.
        is_special = any(type(parameter) not in (torch.Tensor, nn.Parameter) for parameter in self.module.parameters())
        inference = self.trainer.arguments.inference_mode and not is_special
        no_grad = torch.inference_mode() if inference else torch.no_grad()
        with no_grad, evaluation_mode(self.module, self.evaluated):
            yield
