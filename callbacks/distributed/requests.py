"""Agree on requests that some processes make, such as to stop, on the same batch in all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from eventtrain.callbacks.distributed.notices import SOON, Notices, within


class Tick(NamedTuple):
    """A place in a run at which a process asks for things, and acts on requests. All processes pass the same ticks.

    Attributes:
        era: How often all processes have met so far.
        batch: Batches since then.
        place: Ticks since the end of the last batch.
    """

    era: int
    batch: int
    place: int


class Requests:
    """The requests of all processes, as one of them knows them.

    A process passes a tick without an exchange, unless it asks for something there or has heard that another one does. If one
    asks at a tick, each process answers once: at that tick, whether it asks for the same; or, if it has passed the tick, how
    far it is, and it waits for the decision at its next tick. Who answers last decides by all answers: a request of all
    processes holds at its tick; another one holds at the end of the next batch, or of the first one that no process has passed.
    Since the batches' gradients keep processes in step, the latter only happens while an accumulation window is open.

    Args:
        notices: The notices of the run.

    Attributes:
        is_called_off: A process has left the current evaluation, until all processes meet.
    """

    def __init__(self, notices: Notices) -> None:
        self._notices = notices
        self._changed = notices.changed  # guards all that follows
        self._passed = Tick(0, 0, 0)
        self._open: set[Tick] = set()  # ticks at which some process asks, not decided yet
        self._answered: set[Tick] = set()  # ticks that this process has answered for
        self._announced: set[str] = set()  # requests of this process that do not hold yet
        self._due: dict[str, Tick] = {}  # by request the tick at which it holds
        self.is_called_off = False
        notices.on("ask", self._on_ask)
        notices.on("decide", self._on_decide)
        notices.on("call_off", self._on_call_off)

    @property
    def passed(self) -> Tick:
        """The last tick that this process has passed."""
        return self._passed

    def pass_tick(self, flags: list[bool], *, ends_batch: bool, name: str = "") -> list[bool]:
        """Pass a tick; wait only if a process asks for something.

        Args:
            flags: For each request, whether this process makes it.
            ends_batch: Whether the tick ends a batch.
            name: Who asks, so that flags of the same place in the list are different requests.

        Returns:
            For each request, whether it holds from here on in all processes. It is true once.
        """
        with self._changed:
            era, batch, place = self._passed
            tick = Tick(era, batch + 1, 0) if ends_batch else Tick(era, batch, place + 1)
            if not (self._open or self._due or True in flags):
                self._passed = tick
                return flags
            self._wait_for_decisions(before=tick)
            requests = [f"{name}/{index}" for index in range(len(flags))]
            holding = self._take_due(tick, requests)
            known = self._announced | holding | self._due.keys()
            new = [each for each, flag in zip(requests, flags, strict=True) if flag and each not in known]
            if new or tick in self._open:
                self._answer_here(tick, new)
                holding |= self._take_due(tick, requests)
            self._passed = tick
        return [each in holding for each in requests]

    def meet(self) -> None:
        """Begin a new era, because all processes have met and know of all requests."""
        with self._changed:
            era = self._passed.era + 1
            self._passed = Tick(era, 0, 0)
            self._open = {tick for tick in self._open if tick.era >= era}
            self._answered.clear()
            self._announced.clear()
            self._due = {request: tick for request, tick in self._due.items() if tick.era >= era}
            self.is_called_off = False

    def call_off(self) -> None:
        """Tell the others that this process leaves the current evaluation."""
        self._notices.post("call_off", self._passed.era)

    # ------------------------------------------------------------------ asking and answering; all of it is guarded

    def _answer_here(self, tick: Tick, new: list[str]) -> None:
        """Answer at a tick, and wait for the decision."""
        self._announced.update(new)
        must_ask = tick not in self._open
        self._open.add(tick)
        self._answered.add(tick)
        self._changed.release()  # the thread may have to decide
        try:
            if must_ask:
                self._notices.post("ask", tick)
            self._notices.in_time(lambda: self._answer(tick, new, tick.batch))
        finally:
            self._changed.acquire()
        self._wait_for_decisions(before=Tick(tick.era, tick.batch, tick.place + 1))

    def _answer(self, tick: Tick, requests: Iterable[str], batch: int) -> None:
        """Answer for this process; decide if all others have answered before."""
        notices, key = self._notices, f"{tick.era}.{tick.batch}.{tick.place}"
        store, size = notices.store, notices.world_size
        store.set(f"answer/{key}/{notices.rank}", json.dumps([list(requests), batch]))
        if store.add(f"answers/{key}", 1) == size:
            answers = [json.loads(store.get(f"answer/{key}/{rank}")) for rank in range(size)]
            later = Tick(tick.era, 1 + max(batch for _, batch in answers), 0)
            asked = {request: sum(request in each for each, _ in answers) for asks, _ in answers for request in asks}
            decision = [[request, tick if count == size else later] for request, count in asked.items()]
            notices.post("decide", [tick, decision])

    def _wait_for_decisions(self, before: Tick) -> None:
        """Wait until nothing is open that was asked before a tick."""

        def missing() -> str:
            keys = {rank: f"answer/{key}/{rank}" for key in names for rank in range(self._notices.world_size)}
            store = self._notices.store
            silent = within(SOON, lambda: [str(rank) for rank, key in keys.items() if not store.check([key])])
            if silent is None:
                return "the store of the process group does not answer"
            return f"no answer from rank {', '.join(silent) or 'zero'}"

        if any(tick < before for tick in self._open):
            names = [f"{tick.era}.{tick.batch}.{tick.place}" for tick in sorted(self._open) if tick < before]
            exchange = f"the requests after batch {before.batch}"
            self._notices.wait_for(lambda: all(tick >= before for tick in self._open), exchange, missing)

    def _take_due(self, tick: Tick, requests: list[str]) -> set[str]:
        """Return those of the requests that hold by a tick, and forget them."""
        due = {each for each in requests if each in self._due and self._due[each] <= tick}
        for each in due:
            del self._due[each]
        self._announced -= due
        return due

    # ------------------------------------------------------------------ notices, in their thread

    def _on_ask(self, rank: int, content: list[int]) -> None:
        tick = Tick(*content)
        if tick in self._answered or tick.era < self._passed.era:
            return
        self._open.add(tick)
        if tick <= self._passed:
            self._answered.add(tick)
            self._answer(tick, (), self._passed.batch)

    def _on_decide(self, rank: int, content: Any) -> None:
        tick, decisions = Tick(*content[0]), content[1]
        self._open.discard(tick)
        for request, place in decisions:
            at = Tick(*place)
            if at.era >= self._passed.era:
                self._due[request] = min(at, self._due.get(request, at))

    def _on_call_off(self, rank: int, era: int) -> None:
        self.is_called_off |= era == self._passed.era
