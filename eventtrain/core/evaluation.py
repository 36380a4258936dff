"""The loop over evaluation data: validation, test and prediction."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from eventtrain import events
from eventtrain.checkpoint.rng import isolated_rng
from eventtrain.core.closure import forward
from eventtrain.core.signals import SignalTable
from eventtrain.core.state import Progress
from eventtrain.data.batches import END, Batches
from eventtrain.distributed import Processes
from eventtrain.errors import EvaluationInterrupted, MisconfigurationError
from eventtrain.events import AfterForward, MetricsLogged
from eventtrain.metrics.metrics import Metrics
from eventtrain.module.module import LightningModule, overridden

EvaluationStage = Literal["validation", "test", "predict"]


class EvaluationLoop:
    """Runs a module over the loaders of one stage.

    Args:
        stage: ``"validation"``, ``"test"`` or ``"predict"``.
        signals: Where events are published.
        module: The module.
        step: Its step for the stage.
        metrics: What is logged.
        progress: The run's counters.
        open_loaders: Begins a pass over each loader, when it is its turn.
        within_fit: Whether training goes on afterwards: then without ``inference_mode``, whose tensors
            training could not use, and without touching training's random numbers.
        is_interrupted: Asked before each batch inside of a fit: whether the evaluation is to be left.
        processes: The processes that ask each other; None in a run of one.
    """

    def __init__(
        self,
        stage: EvaluationStage,
        *,
        signals: SignalTable,
        module: LightningModule,
        step: Callable[..., Any],
        metrics: Metrics,
        progress: Progress,
        open_loaders: list[Callable[[], Batches]],
        within_fit: bool,
        is_interrupted: Callable[[], bool],
        processes: Processes | None,
    ) -> None:
        self.stage = stage
        self.signals = signals
        self.module = module
        self.metrics = metrics
        self.progress = progress
        self.open_loaders = open_loaders
        self.within_fit = within_fit
        self.is_interrupted = is_interrupted
        self.processes = processes
        self.step = step
        self.arguments = step_arguments(step, len(open_loaders))
        # The stage's own event classes, in the order in which they come.
        prefix = stage.capitalize()
        self._events = {
            name: getattr(events, prefix + name)
            for name in ("Start", "EpochStart", "BatchStart", "BatchEnd", "EpochEnd", "End")
        }

    def run(self, *, silent: bool = False) -> list[list[Any]]:
        """Evaluates.

        Args:
            silent: Whether what is logged is forgotten: a sanity check.

        Returns:
            What the steps returned, per loader, for prediction; else empty lists.

        Raises:
            EvaluationInterrupted: It was left between two batches; nothing of it was published as logged.
        """
        keeps_tensors = self.within_fit or has_special_parameters(self.module)
        no_grad: AbstractContextManager[Any] = torch.no_grad() if keeps_tensors else torch.inference_mode()
        with isolated_rng() if self.within_fit else nullcontext(), no_grad, self.evaluation_mode():
            self.metrics.silent = silent
            self.metrics.begin_stage(self.stage)
            try:
                return self._run(silent)
            finally:
                self.metrics.enter(self.stage, None)
                self.metrics.suffix = ""
                self.metrics.silent = False

    def _run(self, silent: bool) -> list[list[Any]]:
        self.metrics.enter(self.stage, None)
        with self._events["Start"]() as phase:
            self.signals[f"{self.stage}_start"].publish(phase)
            self.metrics.enter(self.stage, "epoch")
            self._publish("epoch_start", "EpochStart")
            outputs: list[list[Any]] = []
            for index, opened in enumerate(self.open_loaders):
                with closing(opened()) as batches:
                    outputs.append(self.run_loader(index, batches))
            self.metrics.enter(self.stage, "epoch")
            self.metrics.show_epoch()
            self._publish("epoch_end", "EpochEnd")
            self.metrics.enter(self.stage, None)
            values = self.metrics.end_epoch()
            if not silent and self.stage != "predict":
                event = MetricsLogged(self.stage, "epoch", self.progress.global_step, values)
                self.signals.metrics_logged.publish(event)
            self._publish("end", "End")
        return outputs

    def run_loader(self, dataloader_idx: int, batches: Batches) -> list[Any]:
        """Evaluates one loader; returns what the steps returned, for prediction."""
        signals, metrics = self.signals, self.metrics
        several = len(self.open_loaders) > 1
        metrics.suffix = f"/dataloader_idx_{dataloader_idx}" if several else ""
        start, end = signals[f"{self.stage}_batch_start"], signals[f"{self.stage}_batch_end"]
        kept: list[Any] = []
        batch_idx = 0
        processes = self.processes if self.within_fit else None
        while True:
            if self.within_fit and self.is_interrupted():
                raise EvaluationInterrupted
            is_left = (batch := batches.fetch()) is not END
            if not (is_left if processes is None else processes.any(is_left)):
                break
            if not is_left:
                continue  # other processes have a batch more, and ask each time whether the run is interrupted
            metrics.batch, metrics.moment = batch, "batch"
            if start.listeners:
                start.publish(self._events["BatchStart"](batch, batch_idx, dataloader_idx))
            args = (batch, batch_idx, dataloader_idx)[: self.arguments]
            outputs = forward(signals, self.stage, self.step, args)
            if signals.after_forward.listeners:
                event = AfterForward(self.stage, batch, batch_idx, outputs, None)
                signals.after_forward.publish(event)
                outputs = event.outputs
            if end.listeners:
                end.publish(self._events["BatchEnd"](outputs, batch, batch_idx, dataloader_idx))
            if self.stage == "predict":
                kept.append(outputs)
            batch_idx += 1
        metrics.suffix = ""
        return kept

    @contextmanager
    def evaluation_mode(self) -> Generator[None, None, None]:
        """Puts the module into evaluation mode, and each submodule back into its own, also after an error."""
        module = self.module
        training = {part: part.training for part in module.modules()}
        try:
            self._switch("model_eval", module.eval)
            yield
        finally:
            restore(training)
            self._switch("model_train", None)

    def _switch(self, hook: str, otherwise: Callable[[], Any] | None) -> None:
        """Calls the module's own mode switch where it has one."""
        name = f"on_{self.stage}_{hook}"
        if overridden(self.module, name, LightningModule):
            getattr(self.module, name)()
        elif otherwise is not None:
            otherwise()

    def _publish(self, suffix: str, event: str) -> None:
        self.signals[f"{self.stage}_{suffix}"].publish(self._events[event]())


def restore(training: dict[nn.Module, bool]) -> None:
    """Gives each submodule back its own ``training`` flag: a frozen layer stays in evaluation mode."""
    for part, flag in training.items():
        part.training = flag


def has_special_parameters(module: nn.Module) -> bool:
    """Return whether a module has parameters of a subclass of ``Tensor``, such as sharded ones. They may fail in inference
    mode, or afterwards."""
    return any(type(parameter) not in (torch.Tensor, nn.Parameter) for parameter in module.parameters())


def step_arguments(step: Callable[..., Any], loaders: int, *, most: int = 3) -> int:
    """How many of ``(batch, batch_idx, dataloader_idx)`` a step is given: the last only with several loaders.

    Args:
        step: The module's method.
        loaders: How many loaders the stage has.
        most: How many arguments there are to give: 2 for ``training_step``.

    Raises:
        MisconfigurationError: The step takes no argument, or needs more of them.
    """
    wanted = 3 if loaders > 1 else 2
    parameters = list(inspect.signature(step).parameters.values())
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return wanted
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    # A third argument without a default is wanted whatever the number of loaders.
    needed = sum(parameter.default is parameter.empty for parameter in positional)
    if not positional or needed > most:
        name = getattr(step, "__name__", "the step")
        form = ", ".join(("self", "batch", "batch_idx", "dataloader_idx=0")[: most + 1])
        raise MisconfigurationError(f"{name}{inspect.signature(step)} does not fit. Write `def {name}({form}):`.")
    return min(len(positional), max(wanted, needed), most)
