"""Measures the time of a run, by phase, callback and layer."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from eventtrain.callback import Callback
from eventtrain.callbacks.profiling.sampling import Sampling
from eventtrain.callbacks.profiling.self_times import Clock, DeviceTimes, LayerTimes, SelfTimes, cuda_times
from eventtrain.callbacks.profiling.spans import CHECKPOINT
from eventtrain.callbacks.profiling.time_tables import RunTimes, UnitTimes, evaluation_text
from eventtrain.callbacks.terminal import show
from eventtrain.checks import check_whole_number
from eventtrain.events import (
    CheckpointSaved,
    Event,
    FitEnd,
    PredictStart,
    SafePoint,
    SaveCheckpoint,
    Setup,
    TakeCheckpoint,
    Teardown,
    TestStart,
    TrainDataEnd,
    TrainEnd,
    TrainStart,
    ValidationEpochEnd,
    ValidationStart,
)
from eventtrain.trainer import Trainer

FIRST_EVALUATIONS = 2  # whose batches are observed, before one in ``every``


class Profiler(Callback):
    """Measures the time of the loop's phases, of each callback, of validations and checkpoints, and of layers if asked.

    All times are self times: time that is spent in a phase or callback within another counts for the inner one only.
    ``fetch`` is the wait for the loader, ``transfer`` the move to the device, ``open loader`` the start of an iteration over
    the loader, ``other`` the loop's work between them. A step is a batch, and it ends with the events of its safe point. Means
    are over all batches, so that they add up; p50 and p95 are of the batches in which a row occurs, exact to 4.4 %.

    Training is sampled in whole accumulation windows: the first ones, and then one here and there, at random distances so
    that nothing periodic can hide. Each represents the windows since the one before. The time between two epochs, from
    ``train_data_end`` to the first batch of the next epoch, is always observed. So are the durations of each validation and
    of writing each checkpoint. The batches of validations are observed in the first two and in some later ones. Memory does
    not grow with the run. The time that the measurement itself takes is in no row; the table states it.

    On a CUDA device the sampled windows are also timed on its stream, by events that are read once the device has reached
    them: no batch waits for them. The times of the table are the host's; the device's times are in a separate table.

    Prints its table when a run is over, and logs ``time/<phase>_ms``, ``time/callback/<name>_ms``, ``time/step_ms``,
    ``time/data_wait`` (the fraction of the step that is spent waiting for the loader), ``time/validation_ms``,
    ``time/checkpoint_ms`` and on CUDA ``time/device/<phase>_ms``. Each value is the mean since it was logged last.

    Listens to ``safe_point``, ``train_data_end``, the start and end of training and of each evaluation,
    ``save_checkpoint``, ``checkpoint_saved``, ``setup``, ``fit_end`` and ``teardown``; observes all signals in the batches
    that it samples. Override :meth:`device_times` to measure on devices other than CUDA's.

    Args:
        every: The mean distance between two windows that are observed, after the first ones.
        first: The number of windows that are observed from the start.
        layers: Whether to time the forward of each submodule in the sampled windows: True for all of them, a number for that
            many levels. This needs hooks, which exist only in these windows and never in an evaluation. A compiled or
            scripted submodule is one layer, or none if hooks do not reach it. A compiled function that calls layers is
            compiled twice: with their hooks, which do nothing in it, and without.
        print_summary: Whether the table is printed when a run is over.
        log_every_n_steps: The number of updates between two times that scalars are logged, besides the end of each epoch;
            None for the ends of epochs only.
        clock: Returns the time in seconds.

    Attributes:
        times: The measurements of the current run, or of the last one.

    Raises:
        MisconfigurationError: If a number is not a whole number from 1.

    Example:
        >>> from eventtrain import Trainer
        >>> from eventtrain.callbacks import Profiler
        >>> trainer = Trainer(max_epochs=1, callbacks=[Profiler(every=50, layers=2)])
        >>> trainer.callback(Profiler).summary()
        'Profiler: nothing has been measured yet.'
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
        self.every = check_whole_number(every, "Profiler", "every", least=1)
        self.first = check_whole_number(first, "Profiler", "first", least=1)
        if not isinstance(layers, bool):
            check_whole_number(layers, "Profiler", "layers", least=1)
        if log_every_n_steps is not None:
            check_whole_number(log_every_n_steps, "Profiler", "log_every_n_steps", least=1)
        self.layers = layers
        self.print_summary = print_summary
        self.log_every_n_steps = log_every_n_steps
        self.clock = clock
        self._trainer: Trainer | None = None
        self._begin_statistics()
        self._release()

    def _begin_statistics(self) -> None:
        """Begin the statistics of a fit."""
        self.times = RunTimes()
        self._sampling = Sampling(self.first, self.every)
        self._sampled_evaluations = Sampling(FIRST_EVALUATIONS, self.every)
        self._until_evaluation = 1
        self._weight, self._next_weight = 1, 0  # of the current window and of the next; 0 if it is not observed
        self._gap = self._until = self._sampling.draw()
        self._next_log = self.log_every_n_steps or 0

    def _release(self) -> None:
        """Release everything that belongs to a run that is over."""
        self._trainer = None
        self._watched: SelfTimes | None = None
        self._training: SelfTimes | None = None
        self._layer_times: LayerTimes | None = None
        self._in_turn = self._fresh = self._complete = False
        self._evaluation: SelfTimes | None = None
        self._evaluation_began: float | None = None
        self._checkpoint_began: float | None = None

    # ------------------------------------------------------------------ training

    def on_setup(self, trainer: Trainer, event: Setup) -> None:
        self._trainer = trainer
        if event.stage == "fit":
            self._begin_statistics()
        else:
            self.times.evaluations.pop(event.stage, None)

    def on_train_start(self, trainer: Trainer, event: TrainStart) -> None:
        self._training = SelfTimes(self.clock, self.device_times(trainer))
        self._training.before["before_batch_fetch"] = self._before_batch
        self._training.call_after_batches(self._after_batch)
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
        # The next window is observed. It represents the windows since the last one that was.
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
        """Observe the time before an epoch's first batch."""
        self._in_turn = True
        self._watch_training()

    def _before_batch(self) -> None:
        """Begin a batch that is about to be fetched, while training is observed."""
        if self._in_turn:
            self._count()
            self._in_turn = False
            self._watch_training()
        elif self._fresh:
            assert self._training is not None
            self._training.start()  # the rest of the last batch, which was not observed, is not part of this one
            if self._layer_times is not None:
                self._layer_times.times.start()
        self._fresh = False

    def _after_batch(self, event: TakeCheckpoint) -> None:
        """End a batch, while training is observed."""
        if not self._in_turn:
            self._count()
        if not event.window_open:
            self._enter_window()

    def _enter_window(self) -> None:
        self._weight, self._next_weight = self._next_weight, 0
        self._watch_training()

    def _count(self) -> None:
        """Add the times of a batch, or of the time between two epochs, to the others."""
        training, layers = self._training, self._layer_times
        assert training is not None
        times = training.take()
        times.pop(CHECKPOINT, None)  # each one is measured, not only the sampled ones
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
        """Observe training, if this part of it is to be observed."""
        self._watch(self._training if self._weight or self._in_turn else None, go_on=go_on)
        if self._layer_times is not None:
            if self._weight and not self._in_turn:
                self._layer_times.attach()
            else:
                self._layer_times.detach()

    def _watch(self, times: SelfTimes | None, *, go_on: bool = False) -> None:
        """Observe with this observer and no other, with none if it is None.

        Args:
            times: The observer.
            go_on: Whether it continues its unit of work; otherwise it begins a new one.
        """
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
            # So that its last listeners are part of it, also the listeners that are attached after this one.
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
        """Return whether the batches of the validation that begins are observed."""
        self._until_evaluation -= 1
        sampled = self._until_evaluation == 0
        if sampled:
            self._until_evaluation = self._sampled_evaluations.draw()
        return sampled

    def _observed_evaluation(self, trainer: Trainer, table: UnitTimes) -> SelfTimes:
        """Return an observer that measures an evaluation batch by batch. The time before the first batch counts with the first,
        the time after the last with the last."""
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

    # ------------------------------------------------------------------ the results

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
            text = self.summary() if evaluated is None else evaluation_text(event.stage, evaluated)
            show(trainer, text, "Profiler")

    def _log(self, trainer: Trainer) -> None:
        """Log the means since the last call, without observing it."""
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
        """Return a measurement on the run's device: the policy to override for devices other than CUDA's.

        Args:
            trainer: The trainer.

        Returns:
            The measurement; None if only the host's time is measured.
        """
        return cuda_times(trainer.device) if trainer.device.type == "cuda" else None

    def summary(self) -> str:
        """Return the measurements of the current run, or of the last one: tables, and sentences about slow parts."""
        return self.times.summary()


def read_device(times: SelfTimes, into: UnitTimes, *, wait: bool = False) -> None:
    """Add the units of work that a device has finished.

    Args:
        times: The measurement with the device.
        into: The table that they are added to.
        wait: Whether to wait for the device.
    """
    if times.device is not None:
        for unit, weight in times.device.read(wait=wait):
            into.add(unit, weight)
