"""One pass over a loader, batch by batch: limits, events, and the position in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from eventtrain.checkpoint.rng import rng_state, set_rng_state
from eventtrain.core.interfaces import END
from eventtrain.data.generators import generator_states, set_generator_states
from eventtrain.data.limits import known_length
from eventtrain.data.resumable import ResumableLoader, describe_loader
from eventtrain.errors import MisconfigurationError
from eventtrain.events import AfterBatchFetch, BeforeBatchFetch, Stage

if TYPE_CHECKING:
    from eventtrain.core.signals import SignalTable


class LoaderPass:
    """One pass over a loader.

    A loader with a length is read as a ``for`` loop reads it. A loader without a length is read one batch ahead, because
    accumulation and schedules have to know the last batch when they see it. Other loaders are not read ahead, because
    that would change the order of random draws.

    Args:
        source: The loader.
        number: The number of the pass, for the seeds of the loader's workers.
        limit: The number of batches to read at most; None for all.
        stage: The stage, for the events.
        signals: The signals for ``before_batch_fetch`` and ``after_batch_fetch``.
        transfer: A function that moves a batch to its device.
        position: The result of :meth:`position` in the run that wrote a checkpoint, to continue its pass. The caller sets
            all generators to the states of the checkpoint afterwards.
        agree: A function that returns whether a flag is set in any process; None if there is one process. With it, passes
            over loaders without a length end together.

    Attributes:
        length: The loader's length; None if it is unknown.
        is_last: Whether the batch that was fetched last is the last of the pass.
    """

    def __init__(
        self,
        source: ResumableLoader,
        number: int,
        limit: int | None,
        stage: Stage,
        signals: SignalTable,
        transfer: Callable[[Any], Any],
        position: Mapping[str, Any] | None = None,
        agree: Callable[[bool], bool] | None = None,
    ) -> None:
        self.loader = source.loader
        self.length = known_length(self.loader)
        self.is_last = False
        self._source = source
        self._end = self.length if limit is None else limit
        self._stage = stage
        self._signals = signals
        self._transfer = transfer
        self._fetched = 0
        self._agree = agree
        # The states from which a resumed pass begins, and reads ahead: kept if a checkpoint may need them.
        self._began: Mapping[str, Any] | None = self._mark() if stage == "train" else None
        self._before_ahead: dict[str, Any] | None = None
        self._iterator: Iterator[Any] = iter(())
        if position is not None:
            self._continue(number, position)
        elif limit != 0:
            self._iterator = source.begin(number)
        self._ahead: Any = self._next_ahead() if self.length is None and limit != 0 else None
        if position is not None:
            self.is_last = self._fetched == self._end or self._ahead is END
        if self.length is None:
            self._read = self._read_ahead
        elif self._iterator is self.loader:
            self._read = self._read_or_refuse
        else:
            # A loader that ends before its length is an error. A chain, because its `next` is no Python call. It calls
            # `iter` again, which would be another pass if the loader is its own iterator.
            self._read = chain(self._iterator, self._too_short()).__next__

    def fetch(self) -> Any:
        """Return the next batch on its device, or :data:`END`.

        Raises:
            MisconfigurationError: If a loader ended before its length.
        """
        if self._fetched == self._end or self._ahead is END:
            return END
        self._fetched += 1
        signals = self._signals
        if signals.before_batch_fetch.listeners:
            with BeforeBatchFetch(self._stage, self._transfer) as phase:
                signals.before_batch_fetch.publish(phase)
                batch = self._read()
                batch = phase.transfer(batch)
        else:
            batch = self._transfer(self._read())
        self.is_last = self._fetched == self._end or self._ahead is END
        if signals.after_batch_fetch.listeners:
            event = AfterBatchFetch(self._stage, batch)
            signals.after_batch_fetch.publish(event)
            batch = event.batch
        return batch

    def _read_or_refuse(self) -> Any:
        batch = self._next()
        return next(self._too_short()) if batch is END else batch

    def _read_ahead(self) -> Any:
        """Return the batch that was read ahead, after reading the next one."""
        batch = self._ahead
        self._ahead = END if self._fetched == self._end else self._next_ahead()
        return batch

    def _next_ahead(self) -> Any:
        if self._began is not None and self._source.is_exact:
            state = self.loader.state_dict() if self._source.is_stateful else None
            self._before_ahead = self._mark() | {"state": state}
        return self._next()

    def _next(self) -> Any:
        batch = next(self._iterator, END)
        if self._agree is not None and self.length is None and self._agree(batch is END):
            return END  # all processes end when one has no batch left
        return batch

    def finish(self) -> None:
        """End a pass that was read in full as a ``for`` loop ends it: ask for one more batch.

        A shuffling sampler draws from its generator then. Without it the order of the next epoch would differ from a
        hand-written loop.

        Raises:
            MisconfigurationError: If the loader has more batches than its length says.
        """
        if self.length is None or self._fetched != self.length:
            return
        if self._next() is not END:
            raise MisconfigurationError(
                f"{type(self.loader).__name__} says that it has {self.length} batches and has more. Correct its __len__, or "
                f"set limit_{self._stage}_batches={self.length}."
            )

    # ------------------------------------------------------------------ position

    def position(self) -> dict[str, Any]:
        """Return the position of the batch that was fetched last, as values that a checkpoint can hold. For training only."""
        state = None
        if self._source.is_stateful:
            state = self.loader.state_dict() if self._before_ahead is None else self._before_ahead["state"]
        return {
            "batches": self._fetched,
            "length": self.length,
            "began": self._began,
            "before_ahead": self._before_ahead,
            "state": state,
        }

    def close(self) -> None:
        """Release the loader's workers; the position stays.

        They end here and not when garbage is collected, because a queue may then be closed before the request to end is
        in it, and each worker waits for its time-out of 5 s.
        """
        self._iterator = iter(())
        self._read = self._iterator.__next__

    def _mark(self) -> dict[str, Any]:
        """Return the states of the generators from which the pass draws."""
        return {"rng": rng_state(), "generators": generator_states(self.loader)}

    def _put_back(self, mark: Mapping[str, Any]) -> None:
        set_rng_state(mark["rng"])
        set_generator_states(self.loader, mark["generators"])

    def _continue(self, number: int, position: Mapping[str, Any]) -> None:
        """Begin the pass after the batches that are done."""
        self._fetched = position["batches"]
        if self.length != position["length"]:
            warnings.warn(
                f"The checkpoint was written after {self._fetched} of {position['length']} batches of an epoch; the training "
                f"loader ({describe_loader(self.loader)}) has {self.length} now. The run continues with the next batch, which "
                "cannot be exact: resume with the data and the batch size that the run had.",
                stacklevel=2,
            )
        if self._end is not None:
            self._end = max(self._end, self._fetched)
        self._began = position["began"]
        self._put_back(position["began"])
        self._iterator = self._source.begin_at(number, self._fetched, position["state"])
        if position["before_ahead"] is not None:
            self._put_back(position["before_ahead"])

    def _too_short(self) -> Iterator[Any]:
        yield from ()
        raise MisconfigurationError(
            f"{type(self.loader).__name__} says that it has {self.length} batches and ended after {self._fetched - 1}. Correct "
            "its __len__, or leave it out: loaders without a length are read one batch ahead."
        )
