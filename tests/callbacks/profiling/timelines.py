"""Runs whose time a test controls, and readers of the two files that a timeline writes."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import EventTimeline
from tests.kit import new_trainer

US = 1_000  # nanoseconds
MS = 1_000_000
BATCHES = [torch.full((2, 1), float(x)) for x in (1, 2, 3, 4, 5, 6)]


class Clock:
    """Stands still unless a test moves it; in nanoseconds."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class Model(LightningModule):
    """Takes 3 ms for a forward, 5 ms for a backward, and 1 ms for a validation step."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(1, 1)
        self.clock = clock

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.clock.now += 3 * MS
        return self.layer(batch).square().mean()

    def backward(self, loss: Tensor) -> None:
        self.clock.now += 5 * MS
        torch.autograd.backward(loss)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.clock.now += 1 * MS
        self.log("val_loss", self.layer(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Manual(Model):
    """Steps by hand."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Listens(Callback):
    """Takes 20 us at one event, and 7 us at another."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_before_backward(self, trainer: Trainer, event: Any) -> None:
        self.clock.now += 20 * US

    def on_after_update(self, trainer: Trainer, event: Any) -> None:
        self.clock.now += 7 * US


def fit(
    tmp_path: Path, clock: Clock, *callbacks: Any, model: Model | None = None, options: Any = None, **timeline: Any
) -> EventTimeline:
    """Train an epoch of six batches with a timeline of step 1, and return the timeline."""
    recorded = EventTimeline(**{"steps": 1, "clock": clock, **timeline})
    trainer_of(tmp_path, recorded, *callbacks, **(options or {})).fit(model or Model(clock), BATCHES)
    return recorded


def trainer_of(tmp_path: Path, *callbacks: Any, **options: Any) -> Trainer:
    """Return a trainer that writes to a folder."""
    return new_trainer(*callbacks, default_root_dir=tmp_path, **options)


def fails(tmp_path: Path, timeline: EventTimeline, model: Model, *callbacks: Any, error: Any = RuntimeError) -> Trainer:
    """Train a run that fails, and return its trainer."""
    trainer = trainer_of(tmp_path, timeline, *callbacks)
    with pytest.raises(error, match="at the worst moment"):
        trainer.fit(model, BATCHES)
    return trainer


def written(tmp_path: Path) -> list[str]:
    """Return the names of the files."""
    return sorted(path.name for path in (tmp_path / "timelines").glob("*"))


def trace(tmp_path: Path, number: int = 0) -> dict[str, Any]:
    """Return a trace, after a check of its nesting."""
    content = (tmp_path / "timelines" / f"timeline-{number}.json").read_text(encoding="utf-8")
    result: dict[str, Any] = json.loads(content, parse_constant=refuse)
    check_nesting(result)
    return result


def refuse(constant: str) -> None:
    """Raise an error, which the reader of JSON calls if it meets a constant such as Infinity."""
    raise AssertionError(f"{constant} is no JSON")


def check_nesting(trace: dict[str, Any]) -> None:
    """Raise an error if a viewer could not draw a trace. The events of a thread, in the order of the file, begin one after the
    other. Each lies within the last one that has not ended."""
    threads: dict[int, list[int]] = {}
    before = 0
    for event in trace["traceEvents"]:
        if event["ph"] != "X":
            assert event["ph"] == "M" and event["args"]
            continue
        start, took = round(event["ts"] * 1000), round(event["dur"] * 1000)
        ends = threads.setdefault(event["tid"], [])
        assert took >= 0 and (not ends or start >= before), event
        while ends and ends[-1] < start + took and ends[-1] <= start:
            ends.pop()
        assert not ends or start + took <= ends[-1], event
        ends.append(start + took)
        before = start


def calls(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the events, listeners and spans of a trace."""
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["tid"] == 2]


def names(trace: dict[str, Any], kind: str = "event") -> list[str]:
    """Return the names of one kind of them."""
    return [event["name"] for event in calls(trace) if event["args"]["kind"] == kind]


def windows(trace: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return the windows of a trace: name, beginning and duration in microseconds."""
    return [(e["name"], e["ts"], e["dur"]) for e in trace["traceEvents"] if e["ph"] == "X" and e["tid"] == 1]


def embedded(tmp_path: Path, number: int = 0) -> dict[str, Any]:
    """Return the data in a page, read as a browser reads it."""
    page = (tmp_path / "timelines" / f"timeline-{number}.html").read_text(encoding="utf-8")
    (data,) = [text for kind, text in Document(page).scripts if kind == "application/json"]
    content: dict[str, Any] = json.loads(data, parse_constant=refuse)
    return content


def drawn(tmp_path: Path, number: int = 0) -> str:
    """Return the records, one in each line: a dot stands before an event, an angle before a listener, the us at the end."""
    sign = {"span": "", "event": ". ", "listener": "> "}
    return "".join(
        f"{'  ' * depth}{sign[kind]}{name} {(end - start) // US}\n"
        for kind, name, _, depth, start, end, *_ in embedded(tmp_path, number)["records"]
    )


def cuts(tmp_path: Path, number: int = 0) -> dict[str, tuple[str, bool]]:
    """Return the reasons of records without a recorded beginning or end, and whether an error ended them."""
    return {name: (cut, failed) for _, name, *_, cut, failed in embedded(tmp_path, number)["records"] if cut or failed}


def details(tmp_path: Path, record: str, number: int = 0) -> dict[str, Any]:
    """Return the details of the first record with a name."""
    return next(each[6] for each in embedded(tmp_path, number)["records"] if each[1] == record)


class Document(HTMLParser):
    """Parses a page.

    Attributes:
        elements: Its elements in order, as pairs of tag and attributes.
        scripts: Its scripts, as pairs of type and text.
        rows: The table's rows: attributes, and the text of each cell.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.rows: list[tuple[dict[str, str | None], list[str]]] = []
        self.title = ""
        self._within = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag in ("script", "title", "td"):
            self._within = tag
        if tag == "script":
            self.scripts.append((attributes.get("type"), ""))
        elif tag == "tr":
            self.rows.append((attributes, []))
        elif tag == "td":
            self.rows[-1][1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._within:
            self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        elif self._within == "title":
            self.title += data
        elif self._within == "td":
            self.rows[-1][1][-1] += data


STEP_OF_TWO_BATCHES = """\
epoch 0 16047
  batch fetch 0
    . before_batch_fetch 0
    . after_batch_fetch 0
  batch 2 8020
    . train_batch_start 0
      > GradientAccumulation.on_train_batch_start 0
    forward 3000
      . before_forward 0
      . after_forward 0
    zero_grad 0
      . before_zero_grad 0
      . after_zero_grad 0
    backward 5020
      . before_backward 20
        > Listens.on_before_backward 20
      . after_backward 0
    . train_batch_end 0
  . safe_point 0
    > EventTimeline.on_safe_point 0
  . request_stop 0
  . take_checkpoint 0
  batch fetch 0
    . before_batch_fetch 0
    . after_batch_fetch 0
  batch 3 8027
    . train_batch_start 0
      > GradientAccumulation.on_train_batch_start 0
    optimizer step 8020
      . optimizer_step 0
      forward 3000
        . before_forward 0
        . after_forward 0
      backward 5020
        . before_backward 20
          > Listens.on_before_backward 20
        . after_backward 0
      . reduce_gradients 0
      . unscale_gradients 0
      . gradients_ready 0
        > GradientAccumulation.on_gradients_ready 0
      . gradients_final 0
      . before_optimizer_step 0
      clipping 0
        . before_gradient_clipping 0
          > GradientClipping.on_before_gradient_clipping 0
        . clipping_decided 0
        . after_gradient_clipping 0
      . after_optimizer_step 0
    . after_update 7
      > Listens.on_after_update 7
    . train_batch_end 0
  . metrics_logged 0
  . safe_point 0
    > EventTimeline.on_safe_point 0
  . request_stop 0
  . take_checkpoint 0
"""
