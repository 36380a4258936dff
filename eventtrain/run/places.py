"""Say where in a run an error was raised, after the fact: it costs nothing while there is no error."""

from __future__ import annotations

from traceback import walk_tb
from typing import TYPE_CHECKING

from eventtrain.core.evaluation import EvaluationLoop
from eventtrain.core.loop import TrainLoop
from eventtrain.data.batches import LoaderPass
from eventtrain.hints import tables
from eventtrain.module.module import LightningModule

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer


def add_notes(error: Exception, trainer: Trainer, module: LightningModule) -> None:
    """Add notes to an error that ends a run: the stage, epoch and batch, unless a note names the listener that raised it; and
    what to write instead of an attribute that modules have elsewhere.

    Args:
        error: The error.
        trainer: The trainer.
        module: The module of the run.
    """
    if isinstance(error, AttributeError) and isinstance(error.obj, LightningModule):
        remedy = tables()["module"].get(str(error.name))
        if remedy is not None:
            error.add_note(f"{type(error.obj).__name__} has no attribute {error.name!r}. {remedy}")
    frames = {frame.f_code: frame for frame, _ in walk_tb(error.__traceback__)}
    evaluation = frames.get(EvaluationLoop.evaluate_loader.__code__)
    if hasattr(error, "_eventtrain_noted") or (evaluation is None and TrainLoop.train_epoch.__code__ not in frames):
        return
    is_loading = LoaderPass.fetch.__code__ in frames
    if evaluation is None:
        stage, batch_idx = "train", trainer.batch_idx + is_loading
    else:
        stage, batch_idx = evaluation.f_locals["self"].stage, evaluation.f_locals["batch_idx"]
    step = "training_step" if stage == "train" else f"{stage}_step"
    place = f"the {stage} loop"
    if is_loading:
        place = f"the {stage} loader"
    elif getattr(getattr(module, step), "__code__", None) in frames:
        place = f"{type(module).__name__}.{step}"
    epoch = f"epoch {trainer.current_epoch}, " if trainer.stage == "fit" else ""
    loader = "" if evaluation is None else f", loader {evaluation.f_locals['dataloader_idx']}"
    error.add_note(f"raised in {place} ({epoch}batch {batch_idx}{loader})")
    error._eventtrain_noted = True  # type: ignore[attr-defined]
