"""The loop over evaluation data: validation, test and prediction."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any, Literal

from eventtrain import events
from eventtrain.core.closure import after_forward, forward
from eventtrain.core.interfaces import END, Batches, LoggedValues
from eventtrain.core.signals import SignalTable
from eventtrain.core.state import Progress
from eventtrain.distributed import Processes
from eventtrain.errors import EvaluationInterrupted, MisconfigurationError
from eventtrain.events import MetricsLogged

EvaluationStage = Literal["validation", "test", "predict"]


@dataclass(kw_only=True, eq=False)
class EvaluationLoop:
    """Runs a module's step over the loaders of one stage, once.

    Args:
        stage: ``"validation"``, ``"test"`` or ``"predict"``.
        signals: The signals on which events are published.
        step: The module's step for the stage.
        metrics: The values that the module logs.
        progress: The counters of the fit.
        open_loaders: For each loader, a function that begins a pass over it.
        context: Returns the context that the whole evaluation runs in: evaluation mode, and no gradients.
        is_interrupted: Asked before each batch: whether the evaluation is to be left. None outside a fit.
        processes: The processes that ask each other, once, whether one has left it; None outside a fit.
        warns_if_empty: Whether a loader without a batch is warned about.
        keep_outputs: Whether the values that the step returns are kept, for prediction.
    """

    stage: EvaluationStage
    signals: SignalTable
    step: Callable[..., Any]
    metrics: LoggedValues
    progress: Progress
    open_loaders: Sequence[Callable[[], Batches]]
    context: Callable[[], AbstractContextManager[Any]]
    is_interrupted: Callable[[], bool] | None
    processes: Processes | None
    warns_if_empty: bool
    keep_outputs: bool = False

    def __post_init__(self) -> None:
        self.num_arguments = step_arguments(self.step, len(self.open_loaders))
        # The stage's own event classes, in the order in which they come.
        names = ("Start", "EpochStart", "BatchStart", "BatchEnd", "EpochEnd", "End")
        self._events = {name: getattr(events, self.stage.capitalize() + name) for name in names}
        self.number = self.metrics.evaluated
        self.held: list[MetricsLogged] = []

    def evaluate(self, *, silent: bool = False) -> list[list[Any]]:
        """Evaluate the loaders, from the first to the last.

        Args:
            silent: Whether logged values are dropped, as in a sanity check.

        Returns:
            The values that the steps returned if they are kept, a list per loader; else empty lists.

        Raises:
            EvaluationInterrupted: If the evaluation was left between two batches; nothing of it was published as logged.
        """
        self.metrics.enter(self.stage, None)
        with self.context():
            self.metrics.silent = silent
            self.metrics.begin_stage(self.stage)
            try:
                return self.evaluate_loaders(silent)
            finally:
                self.metrics.enter(self.stage, None)
                self.metrics.suffix = ""
                self.metrics.silent = False

    def evaluate_loaders(self, silent: bool) -> list[list[Any]]:
        """Publish the events of the stage around its loaders; return the outputs of each."""
        self.metrics.enter(self.stage, "start")
        with self._events["Start"]() as phase:
            self.signals[f"{self.stage}_start"].publish(phase)
            self._publish("epoch_start", "EpochStart")
            outputs: list[list[Any]] = []
            left = False
            try:
                for index, open_loader in enumerate(self.open_loaders):
                    with closing(open_loader()) as batches:
                        outputs.append(self.evaluate_loader(index, batches))
            except EvaluationInterrupted:
                left = True
            if left if self.processes is None else self.processes.any(left):
                raise EvaluationInterrupted
            self.metrics.enter(self.stage, "epoch")
            self.metrics.show_epoch()
            self._publish("epoch_end", "EpochEnd")
            self.metrics.enter(self.stage, None)
            values = self.metrics.end_epoch()
            if not silent and self.stage != "predict":
                self.metrics.evaluated = self.number
                for event in self.held:
                    self.signals.metrics_logged.publish(event)
                event = MetricsLogged(self.stage, "epoch", self.progress.global_step, values)
                self.signals.metrics_logged.publish(event)
            self._publish("end", "End")
        return outputs

    def evaluate_loader(self, dataloader_idx: int, batches: Batches) -> list[Any]:
        """Evaluate the batches of one loader; return the outputs if they are kept."""
        signals, metrics = self.signals, self.metrics
        metrics.suffix = f"/dataloader_idx_{dataloader_idx}" if len(self.open_loaders) > 1 else ""
        start, end = signals[f"{self.stage}_batch_start"], signals[f"{self.stage}_batch_end"]
        predictions: list[Any] = []
        batch_idx = 0
        while True:
            if self.is_interrupted is not None and self.is_interrupted():
                raise EvaluationInterrupted
            if (batch := batches.fetch()) is END:
                break
            metrics.batch, metrics.batch_size, metrics.scope = batch, None, "batch"
            if start.listeners:
                start.publish(self._events["BatchStart"](batch, batch_idx, dataloader_idx))
            args = (batch, batch_idx, dataloader_idx)[: self.num_arguments]
            outputs = forward(signals, self.stage, self.step, args)
            if signals.after_forward.listeners:
                outputs, _ = after_forward(signals, self.stage, batch, batch_idx, outputs, None)
            if end.listeners:
                end.publish(self._events["BatchEnd"](outputs, batch, batch_idx, dataloader_idx))
            self.number += 1
            if self.keep_outputs:
                predictions.append(outputs)
            elif metrics.fresh:
                logged = MetricsLogged(self.stage, "step", self.number, metrics.take_fresh())
                if self.is_interrupted is None:
                    signals.metrics_logged.publish(logged)
                else:  # in a fit they wait for the end, because an interrupted evaluation is repeated
                    self.held.append(logged)
            batch_idx += 1
        if batch_idx == 0 and self.warns_if_empty and not isinstance(batches.loader, (list, tuple)):  # written as empty
            warnings.warn(
                f"The {self.stage} loader ({type(batches.loader).__name__}) gave no batch. {batches.why_empty()}", stacklevel=2
            )
        batches.finish()
        metrics.suffix = ""
        return predictions

    def _publish(self, suffix: str, event: str) -> None:
        self.signals[f"{self.stage}_{suffix}"].publish(self._events[event]())


def step_arguments(step: Callable[..., Any], loaders: int, *, most: int = 3) -> int:
    """Return how many of ``(batch, batch_idx, dataloader_idx)`` a step is given: the last only with several loaders.

    Args:
        step: The module's method.
        loaders: How many loaders the stage has.
        most: How many arguments there are to give: 2 for ``training_step``.

    Raises:
        MisconfigurationError: If the step takes no argument, or needs more of them.
    """
    wanted = 3 if loaders > 1 else 2
    parameters = list(inspect.signature(step).parameters.values())
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return wanted
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    # A third argument without a default is needed whatever the number of loaders.
    needed = sum(parameter.default is parameter.empty for parameter in positional)
    if not positional or needed > most:
        name = getattr(step, "__name__", "the step")
        form = ", ".join(("self", "batch", "batch_idx", "dataloader_idx=0")[: most + 1])
        raise MisconfigurationError(f"{name}{inspect.signature(step)} does not fit. Write `def {name}({form}):`.")
    return min(len(positional), max(wanted, needed), most)
