"""Write logged values as lines of JSON."""

from __future__ import annotations

import json
import math
import os
import re
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

from eventtrain.callback import Callback
from eventtrain.callbacks.claims import Claim, Extents, is_over
from eventtrain.callbacks.loggers.run_files import (
    RunFile,
    copy_beginning,
    new_file,
    own_place,
    portable,
    refusing_bad_places,
    warn_of_other_place,
)
from eventtrain.callbacks.saved_state import field, whole
from eventtrain.checks import check_whole_number
from eventtrain.events import CheckpointSaved, FitEnd, FitStart, MetricsLogged, RunInterrupted, Setup, Teardown
from eventtrain.paths import AnyPath, check_path
from eventtrain.trainer import Trainer

OWNER = "JSONLinesLogger"


class JSONLinesLogger(Callback):
    """Write metrics to a new file for each run, one JSON object per line: for ``tail -f``, ``jq``, and
    ``pandas.read_json(path, lines=True)``.

    Listens to ``metrics_logged``, ``setup``, ``fit_start``, ``fit_end``, ``checkpoint_saved``, ``run_interrupted`` and
    ``teardown``. A line holds ``time`` (seconds since 1970), ``stage``, ``scope``, ``step`` and ``epoch``, then each value
    under its name. A value whose name is one of these five is written as ``logged/<name>``. For values that a validation or
    test logs on step, which are all written, ``step`` is the count of evaluation batches. JSON has no numbers that are not
    finite: they are the strings ``"nan"``, ``"inf"`` and ``"-inf"``, which ``float`` accepts. A line is written as a whole, so
    that a reader never sees half of one. Override :meth:`is_due` for another cadence.

    A run that resumes the newest checkpoint of a run continues in its file if it still exists, and cuts off everything that
    was written after the checkpoint, so that each step is there once. A run that begins at an older checkpoint leaves this
    file as it is, and continues a copy of its lines up to the checkpoint. Until a run has ended without a stop, a hidden file
    beside its own, ``.<name>.run``, says which run writes there; while it does, another one gets an error. A file that cannot
    be written to is an error before training. If it vanishes or the disk fills up later, there is one warning, and the run
    continues without the logger.

    Args:
        path: The file; relative to the trainer's ``default_root_dir``. If it exists, the run's file is
            ``<stem>-<n><suffix>``, with the first free number.
        log_every_n_steps: Updates between two lines of values that training logged on step.

    Attributes:
        run_path: The file of the current run, or of the last one. It is None before the first ``fit_start``, in a
            ``fast_dev_run``, and on other ranks than zero, because they write no file.

    Raises:
        MisconfigurationError: If the cadence is below 1; at ``fit_start``, if the file cannot be written to.

    Example:
        >>> from eventtrain import Trainer
        >>> from eventtrain.callbacks import JSONLinesLogger
        >>> class PowersOfTwo(JSONLinesLogger):
        ...     def is_due(self, global_step):
        ...         return global_step.bit_count() == 1
        >>> trainer = Trainer(max_epochs=1, callbacks=[PowersOfTwo("metrics.jsonl")])
    """

    def __init__(self, path: str | os.PathLike[str] = "metrics.jsonl", *, log_every_n_steps: int = 50) -> None:
        self.path = check_path(path, OWNER, "path")
        self.log_every_n_steps = check_whole_number(log_every_n_steps, OWNER, "log_every_n_steps", least=1)
        self.run_path: AnyPath | None = None
        self._position = 0  # the length in bytes of this run's part of the file at run_path
        self._claim: Claim | None = None  # on the file at run_path
        self._resumed: tuple[AnyPath, Any] | None = None  # the file of the checkpoint's run, and its identity
        self._is_complete = self._is_interrupted = False  # the run of the file has ended as it should; it was interrupted
        self._extents = Extents(self.state_key, itemgetter("position"))
        self._root: AnyPath = Path(".")
        self._file: RunFile | None = None

    def is_due(self, global_step: int) -> bool:
        """Decide whether values that were logged on step are written: a policy to override.

        Args:
            global_step: The count of updates, including the current one.

        Returns:
            True if they are written.
        """
        return global_step % self.log_every_n_steps == 0

    @property
    def state_key(self) -> str:
        return f"JSONLinesLogger({self.path})"

    # ------------------------------------------------------------------ events

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        self._root = trainer.root
        if event.stage == "fit":
            self.run_path, self._position = None, 0  # a checkpoint may bring other ones before fit_start
            self._claim = self._resumed = None
            self._is_complete = self._is_interrupted = False
        elif event.stage != "predict":
            self._is_complete |= self.run_path is None
            self._open(trainer)  # an evaluation after a fit continues in the fit's file

    def on_fit_start(self, trainer: Trainer, event: FitStart) -> None:
        self._open(trainer)

    def on_metrics_logged(self, trainer: Trainer, event: MetricsLogged) -> None:
        if event.scope == "step" and event.stage == "train" and not self.is_due(event.step):
            return
        if self._file is None or not event.metrics:
            return
        record: dict[str, Any] = {"time": time.time(), "stage": event.stage, "scope": event.scope, "step": event.step}
        record["epoch"] = trainer.current_epoch
        record |= {f"logged/{name}" if name in record else name: number(value) for name, value in event.metrics.items()}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush(now=False)
        self._position = self._file.position

    def on_checkpoint_saved(self, trainer: Trainer, event: CheckpointSaved) -> None:
        position = self._extents.in_checkpoint(event.path)
        if self._claim is not None and self._file is not None and self._file.works and position is not None:
            self._claim.note(max(position, self._claim.saved or 0))

    def on_run_interrupted(self, trainer: Trainer, event: RunInterrupted) -> None:
        self._is_interrupted, self._is_complete = True, False

    def on_fit_end(self, trainer: Trainer, event: FitEnd) -> None:
        self._is_complete = not self._is_interrupted and is_over(trainer, self._claim)

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._claim is not None:
            self._claim.release(remove=self._is_complete)

    def _open(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            with refusing_bad_places(OWNER, "path"):
                if self.run_path is None:
                    self._choose(trainer.root / self.path)
                assert self.run_path is not None and self._claim is not None
                self._claim.take()
                try:
                    self._file = RunFile(self.run_path, OWNER, self._position)
                except BaseException:
                    self._claim.release()
                    raise

    def _choose(self, path: AnyPath) -> None:
        """Choose the file of the run: a new one, that of the checkpoint's run, or one that begins with a copy of its lines."""
        before, run = self._resumed or (None, None)
        copied, position = None, self._position
        if before is not None and before.is_file():
            claim = claim_on(before)
            # Older versions left no claim: then only a file that would not be shortened is continued.
            is_newest = (claim.saved or 0) <= position if claim.exists else before.stat().st_size <= position
            if is_newest and (claim.run == run or not claim.exists):
                self.run_path, self._claim = before, claim
                return
            copied = before if claim.run == run or not claim.exists else None  # the name may be another run's by now
        self.run_path = new_file(path)
        self._claim = claim_on(self.run_path)
        self._claim.begin()
        if copied is None:
            self._position = 0
        else:
            copy_beginning(copied, self.run_path, position)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        if self._file is not None:
            self._file.flush()  # a run that resumes here does not write these lines again
        self._extents.add(self._position)
        run = None if self._claim is None else self._claim.run
        return {"path": portable(self.run_path, self._root), "position": self._position, "run": run}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        path, run = field(state, "path", str, None), field(state, "run", str, None, default=None)  # older states have no run
        self._position = whole(state, "position")
        if path is None:
            return
        place = self._root / self.path
        name = re.compile(rf"{re.escape(Path(place.name).stem)}(-\d+)?{re.escape(Path(place.name).suffix)}")
        if (before := own_place(self._root, path, place.parent, name)) is None:
            warn_of_other_place(OWNER, path, place.parent)
        else:
            self._resumed = before, run


def claim_on(path: AnyPath) -> Claim:
    """Return a claim on a file of lines."""
    return Claim(path.with_name(f".{path.name}.run"), path, OWNER, "path")


def number(value: Any) -> float | str:
    """Return a number or scalar tensor as a number for JSON, or as its name if it is not finite."""
    value = float(value)
    return value if math.isfinite(value) else str(value)
