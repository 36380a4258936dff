"""Loaders, limits, the transfer to the device, and reading batches one by one."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from eventtrain.checkpoint.rng import rng_state, set_rng_state
from eventtrain.data.resumable import Source, describe_loader, generator_states, set_generator_states
from eventtrain.errors import MisconfigurationError
from eventtrain.events import AfterBatchFetch, BeforeBatchFetch, Stage

if TYPE_CHECKING:
    from eventtrain.core.signals import SignalTable

Limit = int | float | None


class _End:
    """What is fetched where there is no batch left."""

    def __repr__(self) -> str:
        return "END"


END = _End()


def known_length(loader: Any) -> int | None:
    """The number of batches of a loader; None where it has no length or only guesses it."""
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        return None
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def check_limit(limit: Limit, named: str) -> None:
    """Refuses what is no limit.

    Raises:
        MisconfigurationError: It is neither None, a number of batches from 0, nor a fraction from 0 to 1.
    """
    if limit is None:
        return
    number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
    if not number or limit < 0 or (isinstance(limit, float) and not limit <= 1):
        raise MisconfigurationError(
            f"{named}={limit!r}: it has to be a whole number of batches, a fraction from 0.0 to 1.0, or None for all."
        )


def limited_length(length: int | None, limit: Limit, named: str) -> int | None:
    """The number of batches to use.

    Args:
        length: The loader's length, None where it is unknown.
        limit: A number of batches, a fraction, or None for all.
        named: The limit's name, for messages.

    Returns:
        The number; None for all of a loader whose length is unknown.

    Raises:
        MisconfigurationError: A fraction of an unknown length, or one that makes less than one batch.
    """
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return length
    if isinstance(limit, int):
        return limit if length is None else min(limit, length)
    if limit == 0.0:
        return 0
    if length is None:
        raise MisconfigurationError(
            f"{named}={limit!r} is a fraction of a loader whose length is unknown. Give a whole number of batches."
        )
    batches = int(length * limit)
    if batches < 1:
        raise MisconfigurationError(
            f"{named}={limit!r} of {length} batches is less than one. Give at least {1 / max(length, 1):.3g}, or a whole "
            "number of batches."
        )
    return batches


def as_loaders(given: Any) -> list[Any]:
    """Several loaders as a list: a list or tuple of loaders is several, anything else is one.

    A list of batches is one loader; what makes a list one of loaders is that each item is iterable and
    neither a tensor, a mapping, nor a sequence.
    """
    if given is None:
        return []
    if isinstance(given, (list, tuple)) and given and all(_is_loader(item) for item in given):
        return list(given)
    return [given]


def _is_loader(item: Any) -> bool:
    return isinstance(item, Iterable) and not isinstance(item, (Tensor, Mapping, list, tuple, str))


def check_train_loader(loader: Any) -> None:
    """Refuses what cannot be trained on.

    Raises:
        MisconfigurationError: It is missing, several, or not iterable.
    """
    if loader is None:
        raise MisconfigurationError(
            "There is nothing to train on. Give fit(model, train_dataloaders=...), a datamodule, or define train_dataloader "
            "in the module."
        )
    if len(as_loaders(loader)) > 1:
        raise MisconfigurationError(
            "fit was given several training loaders; it trains on one. Combine the data sets, for example with "
            "torch.utils.data.ConcatDataset."
        )
    if not isinstance(loader, Iterable):
        raise MisconfigurationError(
            f"The training loader is {loader!r} ({type(loader).__name__}), which cannot be iterated. Give a DataLoader."
        )


class Batches:
    """One pass over a loader.

    Sized loaders are read as a ``for`` loop reads them. Those without a length are read one batch ahead,
    because accumulation and schedules have to know the last batch when they see it; nowhere else, because
    looking ahead would change the order of random draws.

    Args:
        source: The loader.
        number: The pass's number, for the seeds of the loader's workers.
        limit: The number of batches to read at most; None for all.
        stage: For the events.
        signals: Where ``before_batch_fetch`` and ``after_batch_fetch`` are published.
        transfer: Moves a batch to its device.
        position: What :meth:`position` gave, where a pass goes on that a checkpoint was written in. All generators are
            to be put into the checkpoint's states then.
        agree: Whether a flag holds in any process that trains; None where there is one. Those without a length end together.

    Attributes:
        is_last: The batch that was fetched last is the last of the pass.
    """

    def __init__(
        self,
        source: Source,
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
        # What a resumed pass begins from, and what it reads ahead from: kept where a checkpoint may ask for it.
        self._began: Mapping[str, Any] | None = self._mark() if stage == "train" else None
        self._before_ahead: dict[str, Any] | None = None
        self._iterator: Iterator[Any] = iter(())
        if position is not None:
            self._go_on(number, position)
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
            # Past the end of a sized loader lies an error. A chain, because its `next` is no Python call. It asks for an
            # iterator again, which to a loader that is its own would be another pass.
            self._read = chain(self._iterator, self._too_short()).__next__

    def fetch(self) -> Any:
        """The next batch on its device, or :data:`END`.

        Raises:
            MisconfigurationError: A sized loader ended before its length.
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
        """The batch that was read ahead, after reading another."""
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
            return END  # where one process has none left all end
        return batch

    def finish(self) -> None:
        """Ends a sized pass that was read in full as a ``for`` loop ends it: by asking once more.

        A shuffling sampler draws from its generator then, so that the next epoch's order would differ from
        that of a hand-written loop.

        Raises:
            MisconfigurationError: The loader has more batches than its length says.
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
        """Where in the pass the batch lies that was fetched last, in values that a checkpoint gives back. For training."""
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
        """Lets the loader's workers go; the position stays. They are waited for here, where no one waits for garbage to be
        collected, at which a queue may be closed before the word to end is in it: then each waits for its time-out of 5 s."""
        self._iterator = iter(())
        self._read = self._iterator.__next__

    def _mark(self) -> dict[str, Any]:
        """The states of the generators that the pass draws from."""
        return {"rng": rng_state(), "generators": generator_states(self.loader)}

    def _put_back(self, mark: Mapping[str, Any]) -> None:
        set_rng_state(mark["rng"])
        set_generator_states(self.loader, mark["generators"])

    def _go_on(self, number: int, position: Mapping[str, Any]) -> None:
        """Begins the pass after the batches that are done."""
        self._fetched = position["batches"]
        if self.length != position["length"]:
            warnings.warn(
                f"The checkpoint was written after {self._fetched} of {position['length']} batches of an epoch; the training "
                f"loader ({describe_loader(self.loader)}) has {self.length} now. The run goes on with the next, which cannot "
                "be exact: resume with the data and the batch size that the run had.",
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


def move_to_device(batch: Any, device: torch.device) -> Any:
    """Moves the tensors of a batch to a device.

    Args:
        batch: A tensor, an object with ``to``, or mappings, lists, tuples and dataclasses of them.
        device: The device.

    Returns:
        The moved batch; the same object where everything was there already.
    """
    if isinstance(batch, Tensor):
        # Copies from a device are not ordered with the host's reads, so only copies to one may overlap.
        return batch if batch.device == device else batch.to(device, non_blocking=device.type != "cpu")
    kind = type(batch)
    if kind is list or kind is tuple:
        for item in batch:
            if not isinstance(item, Tensor) or item.device != device:
                break
        else:
            return batch  # the usual batch, already there: no recursion, 1 us less
        moved = [move_to_device(item, device) for item in batch]
        unchanged = all(new is old for new, old in zip(moved, batch, strict=True))
        return batch if unchanged else kind(moved)
    if isinstance(batch, (str, bytes, int, float, type(None))):
        return batch
    if isinstance(batch, Mapping):
        fields = {key: move_to_device(value, device) for key, value in batch.items()}
        if all(fields[key] is value for key, value in batch.items()):
            return batch
        return fields if kind is dict else _rebuilt(batch, device, lambda: kind(fields))
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return kind(*(move_to_device(item, device) for item in batch))
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [declared.name for declared in dataclasses.fields(batch) if declared.init]
        return dataclasses.replace(batch, **{name: move_to_device(getattr(batch, name), device) for name in names})
    return batch


def _rebuilt(batch: Any, device: torch.device, rebuild: Callable[[], Any]) -> Any:
    """A mapping of a class of its own: by its own ``to`` where it has one."""
    return batch.to(device) if callable(getattr(batch, "to", None)) else rebuild()


def resolve_device(device: Any) -> torch.device:
    """The device of a run.

    Args:
        device: ``"auto"`` for CUDA, else MPS, else the CPU; or what :class:`torch.device` takes.

    Raises:
        MisconfigurationError: There is no such device.
    """
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    elif device == "gpu":
        raise MisconfigurationError("device='gpu': write 'cuda', 'mps', or 'auto' for whichever there is.")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise MisconfigurationError(
            f"device={device!r} is no device. Write 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'."
        ) from error
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = resolved.index if resolved.index is not None else (torch.cuda.current_device() if count else 0)
        if index >= count:
            raise MisconfigurationError(f"device={device!r}: torch sees {count} CUDA devices. Write 'auto' or 'cpu'.")
        return torch.device("cuda", index)
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise MisconfigurationError("device='mps': torch sees no Apple GPU. Write 'auto' or 'cpu'.")
    return torch.device("mps", 0) if resolved.type == "mps" else resolved
