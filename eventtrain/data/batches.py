"""One pass over a loader, batch by batch: limits, events, and the position in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from types import GeneratorType
from typing import TYPE_CHECKING, Any

from eventtrain.core.interfaces import END
from eventtrain.data.combined import loaders_in
from eventtrain.data.generators import mark, put_back
from eventtrain.data.limits import known_length, limit_name
from eventtrain.data.resumable import ResumableCombination, ResumableLoader, describe_loader
from eventtrain.errors import MisconfigurationError
from eventtrain.events import AfterBatchFetch, BeforeBatchFetch, Stage

if TYPE_CHECKING:
    from eventtrain.core.signals import SignalTable


@dataclass(eq=False)
class LoaderPass:
    """One pass over a loader.

    A loader with a length is read as a ``for`` loop reads it. A training loader without a length is read one batch ahead,
    because accumulation and schedules have to know the last batch when they see it; in several processes two batches ahead, so
    that nobody waits to hear whether all have another. Other loaders are not read ahead, because that would change the order of
    random draws.

    The length is that of this pass: it is measured after ``iter(loader)``, and if that made a Python generator, after the
    first batch, because its code has only run then.

    Args:
        source: The loader.
        number: The number of the pass, for the seeds of the loader's workers.
        measure: Returns how many batches of the pass are used at most; None for all of a loader without a length.
        stage: The stage, for the events.
        signals: The signals for ``before_batch_fetch`` and ``after_batch_fetch``.
        transfer: A function that moves a batch to its device.
        begins_at: The result of :meth:`position` in the run that wrote a checkpoint, to continue its pass; None for a new pass.
            The caller sets all generators to the states of the checkpoint afterwards.
        together: Has passes over loaders without a length end together, see
            :meth:`~eventtrain.distributed.Processes.read_together`.
        reads_ahead: Whether a loader without a length is read ahead. If not, its last batch is not known to be the last.

    Attributes:
        length: The loader's length; None if it is unknown.
        is_last: Whether the batch that was fetched last is the last of the pass.
    """

    source: ResumableLoader | ResumableCombination
    number: int
    measure: Callable[[], int | None]
    stage: Stage
    signals: SignalTable
    transfer: Callable[[Any], Any]
    begins_at: Mapping[str, Any] | None
    together: Callable[[Callable[[], Any], bool], Callable[[], Any]]
    reads_ahead: bool

    def __post_init__(self) -> None:
        self.loader = self.source.loader
        self._fetched = 0
        # The states from which a resumed pass begins, and reads ahead: kept if a checkpoint may need them.
        self._began: Mapping[str, Any] | None = mark(self.loader) if self.stage == "train" else None
        self._marks: list[Mapping[str, Any]] = []  # before each batch that was read ahead
        self._again: list[Mapping[str, Any]] = []  # those of a checkpoint
        self._ahead: Any = None
        if self.begins_at is None:
            self._iterator = self.source.begin(self.number)
            self._measure()
        else:
            self._continue(self.begins_at)
        if self.length is None:
            self._iterator = islice(self._iterator, None if self._end is None else self._end - self._fetched)
            read = self._read_on if self.reads_ahead else partial(next, self._iterator, END)
            self._read = self._next = self.together(read, self.reads_ahead)
            if self.reads_ahead:
                self._read = self._read_ahead
                self._ahead = END if self._ahead is END else self._next()
        elif self._iterator is self.loader:
            self._read = self._read_or_refuse
        elif isinstance(self._iterator, GeneratorType) and self._fetched == 0:
            self._read = self._read_first
        else:
            self._read = self._rest()
        self.is_last = self._fetched == self._end or self._ahead is END

    def fetch(self) -> Any:
        """Return the next batch on its device, or :data:`END`.

        Raises:
            MisconfigurationError: If a loader ended before its length.
        """
        if self._fetched == self._end or self._ahead is END:
            return END
        self._fetched += 1
        signals = self.signals
        if signals.before_batch_fetch.listeners:
            with BeforeBatchFetch(self.stage, self.transfer) as phase:
                signals.before_batch_fetch.publish(phase)
                if (batch := self._read()) is not END:
                    batch = phase.transfer(batch)
        elif (batch := self._read()) is not END:
            batch = self.transfer(batch)
        if batch is END:  # the batch before was the last, which was not known
            self._fetched -= 1
            self._ahead, self.is_last = END, True
            return END
        self.is_last = self._fetched == self._end or self._ahead is END
        if signals.after_batch_fetch.listeners:
            event = AfterBatchFetch(self.stage, batch)
            signals.after_batch_fetch.publish(event)
            batch = event.batch
        return batch

    def _measure(self) -> None:
        self.length = known_length(self.loader)
        self._end = self.measure()

    def _rest(self) -> Callable[[], Any]:
        # A loader that ends before its length is an error. A chain, because its `next` is no Python call. It calls `iter`
        # again, which would be another pass if the loader is its own iterator.
        return chain(self._iterator, self._too_short()).__next__

    def _read_first(self) -> Any:
        batch = next(self._iterator, END)
        self._measure()
        self._read = self._rest()
        return self._read() if batch is END and self.length != 0 else batch

    def _read_or_refuse(self) -> Any:
        batch = next(self._iterator, END)
        return next(self._too_short()) if batch is END else batch

    def _read_ahead(self) -> Any:
        """Return the batch that was read ahead, after reading on."""
        batch = self._ahead
        del self._marks[:1]
        self._ahead = self._next()
        return batch

    def _read_on(self) -> Any:
        if self._again:
            put_back(self.loader, self._again.pop(0))
        if self.source.is_exact:
            self._marks.append(mark(self.loader) | {"state": self.source.state()})
        return next(self._iterator, END)

    def finish(self) -> None:
        """End a pass that was read in full as a ``for`` loop ends it: ask for one more batch.

        A shuffling sampler draws from its generator then. Without it the order of the next epoch would differ from a
        hand-written loop.

        Raises:
            MisconfigurationError: If the loader has more batches than its length says.
        """
        if self.length is None or self._fetched != self.length:
            return
        if next(self._iterator, END) is not END:
            raise MisconfigurationError(
                f"{type(self.loader).__name__} says that it has {self.length} batches and has more. Correct its __len__, or "
                f"set {limit_name(self.stage)}={self.length}."
            )

    def why_empty(self) -> str:
        """Return why the pass may have no batch, and what to write."""
        loader = next((each for each in loaders_in(self.loader) if known_length(each) == 0), None)
        if loader is None:
            return "Is it an iterator that is used up? Give a loader that can be iterated anew."
        if getattr(loader, "drop_last", False) and (samples := len(loader.dataset)):
            return (
                f"Its data set has {samples} samples, fewer than batch_size={loader.batch_size}, and drop_last=True drops "
                "them. Give a smaller batch_size, or drop_last=False."
            )
        return "It has no data: its length is 0."

    # ------------------------------------------------------------------ position

    def position(self) -> dict[str, Any]:
        """Return the position of the batch that was fetched last, as values that a checkpoint can hold. For training only."""
        return {
            "batches": self._fetched,
            "length": self.length,
            "has_ended": self._ahead is END and not self._marks,
            "began": self._began,
            "before_ahead": list(self._marks),
            "state": self._marks[0]["state"] if self._marks else self.source.state(),
        }

    def close(self) -> None:
        """Release the loader's workers; the position stays.

        They end here and not when garbage is collected, because a queue may then be closed before the request to end is
        in it, and each worker waits for its time-out of 5 s.
        """
        self._iterator = iter(())
        self._read = self._iterator.__next__
        self.source.close()

    def _continue(self, position: Mapping[str, Any]) -> None:
        """Begin the pass after the batches that are done."""
        self._fetched = position["batches"]
        self._began = position["began"]
        put_back(self.loader, position["began"])
        self._iterator = self.source.begin_at(self.number, self._fetched, position["state"])
        self._measure()
        if self.length != position["length"]:
            warnings.warn(
                f"The checkpoint was written after {self._fetched} of {position['length']} batches of an epoch; the training "
                f"loader ({describe_loader(self.loader)}) has {self.length} now. The run continues with the next batch, which "
                "cannot be exact: resume with the data and the batch size that the run had.",
                stacklevel=2,
            )
        if self._end is not None:
            self._end = max(self._end, self._fetched)
        before_ahead = position["before_ahead"] or []  # in older checkpoints only the first, or None
        self._again = list(before_ahead) if isinstance(before_ahead, list) else [before_ahead]
        self._ahead = END if position.get("has_ended") else None  # older checkpoints do not say

    def _too_short(self) -> Iterator[Any]:
        yield from ()
        raise MisconfigurationError(
            f"{type(self.loader).__name__} says that it has {self.length} batches and ended after {self._fetched - 1}. Correct "
            "its __len__, or leave it out: loaders without a length are read one batch ahead."
        )
