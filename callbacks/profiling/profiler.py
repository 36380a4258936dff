"""Where a run's time goes, by phase, callback and layer."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from eventtrain.callback import Callback
from eventtrain.callbacks.profiling.spans import CHECKPOINT, Clock, DeviceTimes, LayerTimes, Sampling, SelfTimes, cuda_times
from eventtrain.callbacks.profiling.time_tables import RunTimes, UnitTimes, evaluation_text
from eventtrain.errors import MisconfigurationError
from eventtrain.events import (
    CheckpointSaved,
    Event,
    FitEnd,
    PredictStart,
    SafePoint,
    SaveCheckpoint,
    Setup,
    Teardown,
    TestStart,
    TrainDataEnd,
    TrainEnd,
    TrainStart,
    ValidationEpochEnd,
    ValidationStart,
)
from eventtrain.trainer import Trainer

FIRST_EVALUATIONS = 2  # are observed inside as well, then one in ``every``


class Profiler(Callback):
    """Says where the time goes: the loop's phases, each callback, validations, checkpoints and, if asked, layers.

    All times are self times: what is spent in a phase or callback inside of another is counted there alone. ``fetch``
    is the wait for the loader, ``transfer`` the way to the device, ``open loader`` what it costs to begin iterating,
    ``other`` the loop's own. A step is a batch. Means are over all batches, so that they add up; p50 and p95 are of
    those batches in which a row occurs, exact to 4.4 %.

    Training is sampled: whole accumulation windows, the first ones and then one here and there, at random distances so
    that nothing periodic can hide; each stands for those since the last. What comes once an epoch, from
    ``train_data_end`` to the next epoch's first batch, is always observed, and so is how long each validation and the
    writing of each checkpoint takes; the inside of validations is in the first two and in some later ones. Memory does
    not grow with the run. What the observing takes is in no row; the table states it.

    On a CUDA device the sampled windows are also timed on its stream, by events that are read once they have come
    about: no batch waits for them. The table's times are the host's; what the device spent stands in a table of its own.

    Prints its table when a run is over, and logs ``time/<phase>_ms``, ``time/callback/<name>_ms``, ``time/step_ms``,
    ``time/data_wait`` (the fraction of the step spent waiting for the loader), ``time/validation_ms``,
    ``time/checkpoint_ms`` and on CUDA ``time/device/<phase>_ms``: each the mean since it was logged last.

    Listens to ``safe_point``, ``train_data_end``, the start and end of training and of each evaluation,
    ``save_checkpoint``, ``checkpoint_saved``, ``setup``, ``fit_end`` and ``teardown``; observes everything where it
    samples.

    Args:
        every: After the first ones, one of so many windows is observed on average.
        first: Windows that are observed from the start.
        layers: Whether to time the forward of each submodule in the sampled windows: True for all, a number for so
            many levels. By hooks, which are there only then and never in an evaluation. What is compiled or scripted is
            one layer or, where hooks do not reach, none; a compiled function that calls layers is compiled twice, with
            their hooks, which do nothing in it, and without.
        print_summary: Whether the table is printed when a run is over.
        log_every_n_steps: Updates between two times that scalars are logged, besides the end of each epoch; None for
            the ends of epochs alone.
        clock: Gives the time in seconds.

    Raises:
        MisconfigurationError: A number is no whole number from 1.
    """

    role = "profiler"

    def __init__(
        self,
        *,
        every: int = 20,
        first: int = 20,
        layers: bool | int = False,
        print_summary: bool = True,
        log_every_n_steps: int | None = 500,
        clock: Clock = time.perf_counter,
    ) -> None:
        for name, value in {"every": every, "first": first, "layers": layers, "log_every_n_steps": log_every_n_steps}.items():
            switch = name == "layers" and isinstance(value, bool)
            if not switch and not (name == "log_every_n_steps" and value is None):
                check_count(name, value)
        self.every = every
        self.first = first
        self.layers = layers
        self.print_summary = print_summary
        self.log_every_n_steps = log_every_n_steps
        self.clock = clock
        self._trainer: Trainer | None = None
        self._begin_statistics()
        self._release()

    def _begin_statistics(self) -> None:
        """Begins the statistics of a fit."""
        self.times = RunTimes()
        self._sampling = Sampling(self.first, self.every)
        self._sampled_evaluations = Sampling(FIRST_EVALUATIONS, self.every)
        self._until_evaluation = 1
        self._weight, self._next_weight = 1, 0  # of the window at hand and of the next: 0 where it is not observed
        self._gap = self._until = self._sampling.draw()
        self._next_log = self.log_every_n_steps or 0

    def _release(self) -> None:
        """Holds on to nothing of a run that is over."""
        self._trainer = None
        self._watched: SelfTimes | None = None
        self._training: SelfTimes | None = None
        self._layer_times: LayerTimes | None = None
        self._in_turn = self._fresh = self._complete = False
        self._evaluation: SelfTimes | None = None
        self._evaluation_began: float | None = None
        self._checkpoint_began: float | None = None

    # ------------------------------------------------------------------ which batches are observed

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        self._trainer = trainer
        if event.stage == "fit":
            self._begin_statistics()
        else:
            self.times.evaluations.pop(event.stage, None)

    def on_train_start(self, trainer: Trainer, event: TrainStart) -> None:
        self._training = SelfTimes(self.clock, self.device_times(trainer))
        self._training.before["before_batch_fetch"] = self._before_batch
        self._training.after["safe_point"] = self._after_batch
        if self.layers:
            times = SelfTimes(self.clock, self.device_times(trainer))
            self._layer_times = LayerTimes(trainer.module, None if self.layers is True else self.layers, times)
        self._next_log += trainer.global_step
        self._begin_turn()

    def on_safe_point(self, trainer: Trainer, event: SafePoint) -> None:
        if event.epoch_end:
            self._log(trainer)
        if event.window_open:
            return
        self._until -= 1
        if self._until:
            return
        # The next window is observed, and stands for those since the last one that was.
        self._next_weight = self._gap
        self._gap = self._until = self._sampling.draw()
        if self.log_every_n_steps is not None and trainer.global_step >= self._next_log:
            self._log(trainer)
        if self._watched is None:
            self._enter_window()

    def on_train_data_end(self, trainer: Trainer, event: TrainDataEnd) -> None:
        if self._watched is not None:
            self._count()
        self._begin_turn()

    def on_train_end(self, trainer: Trainer, event: TrainEnd) -> None:
        if self._in_turn:
            self._count()
        self._in_turn, self._weight = False, 0
        self._watch_training()
        if self._training is not None:
            read_device(self._training, self.times.device_steps, wait=True)
        if self._layer_times is not None:
            read_device(self._layer_times.times, self.times.layer_steps, wait=True)
        self._log(trainer)

    def _begin_turn(self) -> None:
        """What comes before an epoch's first batch is always observed."""
        self._in_turn = True
        self._watch_training()

    def _before_batch(self) -> None:
        """Observed: a batch is about to be fetched."""
        if self._in_turn:
            self._count()
            self._in_turn = False
            self._watch_training()
        elif self._fresh:
            assert self._training is not None
            self._training.start()  # what was left of the last batch, unobserved, is no part of this one
            if self._layer_times is not None:
                self._layer_times.times.start()
        self._fresh = False

    def _after_batch(self, event: SafePoint) -> None:
        """Observed: a batch's safe point is over."""
        if not self._in_turn:
            self._count()
        if not event.window_open:
            self._enter_window()

    def _enter_window(self) -> None:
        self._weight, self._next_weight = self._next_weight, 0
        self._watch_training()

    def _count(self) -> None:
        """Adds the times of a batch, or of what comes once an epoch, to the others."""
        training, layers = self._training, self._layer_times
        assert training is not None
        times = training.take()
        times.pop(CHECKPOINT, None)  # each is measured, not only those that are sampled
        if self._in_turn:
            self.times.turns.add(times)
            if training.device is not None:
                training.device.start()
            return
        self.times.steps.add(times, self._weight)
        if training.device is not None:
            training.device.cut(self._weight)
            read_device(training, self.times.device_steps)
        if layers is not None:
            times = layers.times.take()
            if layers.times.device is None:
                self.times.layer_steps.add(times, self._weight)
            else:
                layers.times.device.cut(self._weight)
                read_device(layers.times, self.times.layer_steps)

    def _watch_training(self, *, go_on: bool = False) -> None:
        """Observes training, where it is to be observed now."""
        self._watch(self._training if self._weight or self._in_turn else None, go_on=go_on)
        if self._layer_times is not None:
            if self._weight and not self._in_turn:
                self._layer_times.attach()
            else:
                self._layer_times.detach()

    def _watch(self, times: SelfTimes | None, *, go_on: bool = False) -> None:
        """Observes by this observer and no other, by none where None; it begins a new unit of work, or goes on with one."""
        if times is self._watched or self._trainer is None:
            return
        if self._watched is not None:
            self._trainer.signals.unobserve(self._watched)
        self._watched = times
        if times is not None:
            self._trainer.signals.observe(times)
            (times.go_on if go_on else times.start)()
            self._fresh = not go_on

    # ------------------------------------------------------------------ evaluations and checkpoints

    def on_validation_start(self, trainer: Trainer, event: ValidationStart) -> None:
        if not trainer.sanity_checking:
            self._begin_evaluation(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, event: ValidationEpochEnd) -> None:
        if self._evaluation_began is not None and self._evaluation is None:
            # So that its last listeners are part of it, those behind this one too.
            self._evaluation = self._observed_evaluation(trainer, UnitTimes())
            self._watch(self._evaluation)

    def on_test_start(self, trainer: Trainer, event: TestStart) -> None:
        self._begin_evaluation(trainer)

    def on_predict_start(self, trainer: Trainer, event: PredictStart) -> None:
        self._begin_evaluation(trainer)

    def _begin_evaluation(self, trainer: Trainer) -> None:
        if self._watched is not None:
            self._watched.suspend()
        if self._layer_times is not None:
            self._layer_times.detach()  # a hook may change which kernel an evaluation uses
        name = "validation" if trainer.stage == "fit" else str(trainer.stage)
        if trainer.stage != "fit" or self._samples_evaluation():
            self._evaluation = self._observed_evaluation(trainer, self.times.evaluations.setdefault(name, UnitTimes()))
        self._watch(self._evaluation)
        self._evaluation_began = self.clock()

    def _samples_evaluation(self) -> bool:
        """Whether the inside of the validation that begins is observed."""
        self._until_evaluation -= 1
        sampled = self._until_evaluation == 0
        if sampled:
            self._until_evaluation = self._sampled_evaluations.draw()
        return sampled

    def _observed_evaluation(self, trainer: Trainer, table: UnitTimes) -> SelfTimes:
        """What observes an evaluation, batch by batch; what comes before the first and after the last counts with them."""
        stage = "validation" if trainer.stage in ("fit", "validate") else str(trainer.stage)
        times = SelfTimes(self.clock)
        has_batch = False

        def before_batch() -> None:
            nonlocal has_batch
            if has_batch:
                table.add(times.take())
            has_batch = True

        def after_evaluation(event: Event) -> None:
            if has_batch:
                table.add(times.take())
            self._end_evaluation(trainer)

        times.before["before_batch_fetch"] = before_batch
        times.after[f"{stage}_end"] = after_evaluation
        return times

    def _end_evaluation(self, trainer: Trainer) -> None:
        assert self._evaluation_began is not None
        if trainer.stage == "fit":
            self.times.validations.add(self.clock() - self._evaluation_began)
        self._evaluation = self._evaluation_began = None
        self._complete = trainer.stage != "fit"
        self._watch_training(go_on=True)

    def on_save_checkpoint(self, trainer: Trainer, event: SaveCheckpoint) -> None:
        self._checkpoint_began = self.clock()

    def on_checkpoint_saved(self, trainer: Trainer, event: CheckpointSaved) -> None:
        if self._checkpoint_began is not None and trainer.stage == "fit":
            self.times.checkpoints.add(self.clock() - self._checkpoint_began)
        self._checkpoint_began = None

    # ------------------------------------------------------------------ what comes of it

    def on_fit_end(self, trainer: Trainer, event: FitEnd) -> None:
        self._complete = True

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        self._watch(None)
        if self._layer_times is not None:
            self._layer_times.detach()
        complete = self._complete
        self._release()
        if complete and self.print_summary:
            evaluated = self.times.evaluations.get(event.stage)
            trainer.print(self.summary() if evaluated is None else evaluation_text(event.stage, evaluated))

    def _log(self, trainer: Trainer) -> None:
        """Logs the means since this was last done, unobserved."""
        self._next_log = trainer.global_step + (self.log_every_n_steps or 0)
        values = self.times.fresh_scalars()
        if values:
            with self._unobserved():
                trainer.log_now(values)

    @contextmanager
    def _unobserved(self) -> Generator[None, None, None]:
        watched = self._watched
        if watched is not None:
            watched.suspend()
        self._watch(None)
        try:
            yield
        finally:
            self._watch(watched, go_on=True)

    def device_times(self, trainer: Trainer) -> DeviceTimes | None:
        """What measures on the run's device; None where the host's time is all there is. Override for devices other than
        CUDA's."""
        return cuda_times(trainer.device) if trainer.device.type == "cuda" else None

    def summary(self) -> str:
        """What was measured so far in the run at hand, or in the last: tables, and sentences about what is slow."""
        return self.times.summary()


def read_device(times: SelfTimes, into: UnitTimes, *, wait: bool = False) -> None:
    """Adds what a device is through with."""
    if times.device is not None:
        for unit, weight in times.device.read(wait=wait):
            into.add(unit, weight)


def check_count(name: str, value: object) -> None:
    """Refuses what is no whole number from 1.

    Raises:
        MisconfigurationError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MisconfigurationError(f"Profiler({name}={value!r}): it has to be a whole number from 1.")
