"""Statistics of measured times, in bounded memory, and the tables that are printed of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from eventtrain.callbacks.profiling.spans import FETCH, MOST_LABELS, OBSERVING, OPEN_LOADER, OVERFLOW, Kind, Label

MOST_ROWS = 30  # in a printed table
NEGLIGIBLE = 0.0005  # a fraction that is printed as 0.0 %
MUCH = 0.2  # the fraction of a step from which waiting for the loader makes it the bottleneck

PER_OCTAVE = 8
QUANTILE_ERROR = 2 ** (1 / (2 * PER_OCTAVE)) - 1  # 4.4 %
"""The largest relative error of a :class:`Distribution`'s quantiles."""
SHORTEST, LONGEST = -30 * PER_OCTAVE, 20 * PER_OCTAVE  # a nanosecond, twelve days


class Distribution:
    """Collects a count, a sum, and a histogram on a logarithmic scale, in bounded memory.

    Attributes:
        count: The number of values that were added, by weight.
        total: Their sum, by weight.
    """

    __slots__ = ("_buckets", "_least", "_most", "count", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self._least, self._most = math.inf, 0.0
        self._buckets: dict[int, int] = {}

    def add(self, value: float, weight: int = 1) -> None:
        """Add a value.

        Args:
            value: Seconds, zero or more.
            weight: The number of values that it represents.
        """
        self.count += weight
        self.total += weight * value
        self._least, self._most = min(self._least, value), max(self._most, value)
        bucket = max(SHORTEST, min(round(PER_OCTAVE * math.log2(value)), LONGEST)) if value > 0 else SHORTEST
        self._buckets[bucket] = self._buckets.get(bucket, 0) + weight

    @property
    def mean(self) -> float:
        """The mean; 0 if there are no values."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, fraction: float) -> float:
        """Return a quantile, to within :data:`QUANTILE_ERROR`; 0 if there are no values.

        Args:
            fraction: The fraction of all values that are not above the result.
        """
        reached, wanted = 0, fraction * self.count
        for bucket in sorted(self._buckets):
            reached += self._buckets[bucket]
            if reached >= wanted:
                return max(self._least, min(2 ** (bucket / PER_OCTAVE), self._most))
        return 0.0


class UnitTimes:
    """Collects the times of many units of work of one kind, such as training batches.

    Attributes:
        units: The number of units, by weight.
        observed: The number of units that were measured.
        rows: The times of each label, one for each unit in which it occurred. Labels beyond ``MOST_LABELS`` share a row.
        whole: The time of each unit: the sum of its labels.
        observing: The time in each unit that the measurement itself took; part of no row.
    """

    def __init__(self) -> None:
        self.units = self.observed = 0
        self.rows: dict[Label, Distribution] = {}
        self.whole = Distribution()
        self.observing = Distribution()

    def add(self, times: Mapping[Label, float], weight: int = 1) -> None:
        """Add a unit.

        Args:
            times: The seconds of each label.
            weight: The number of units that it represents.
        """
        self.units += weight
        self.observed += 1
        whole = 0.0
        for label, seconds in times.items():
            if label is OBSERVING:
                self.observing.add(seconds, weight)
                continue
            whole += seconds
            row = self.rows.get(label)
            if row is None:
                full = len(self.rows) >= MOST_LABELS
                row = self.rows.setdefault(OVERFLOW if full else label, Distribution())
            row.add(seconds, weight)
        self.whole.add(whole, weight)

    def mean(self, label: Label) -> float:
        """Return the seconds that a label takes per unit. Units without it count as zero."""
        row = self.rows.get(label)
        return row.total / self.units if row is not None and self.units else 0.0

    def share(self, label: Label) -> float:
        """Return the fraction of all units' time that a label takes, from 0 to 1."""
        row = self.rows.get(label)
        return row.total / self.whole.total if row is not None and self.whole.total else 0.0

    def slowest(self, kind: Kind) -> Label | None:
        """Return the label of a kind that takes the most time; None if there is none."""
        of_kind = (label for label in self.rows if label.kind == kind)
        return max(of_kind, key=lambda label: self.rows[label].total, default=None)


class RunTimes:
    """Holds all measurements of a run.

    Attributes:
        steps: Training batches.
        device_steps: The same on an accelerator's stream; empty if there is no accelerator.
        layer_steps: Training batches by the forward of the layers, on the accelerator's stream if there is one.
        turns: The times between two epochs: from the last batch of one to the first batch of the next.
        evaluations: Batches of evaluations, by name: ``"validation"`` for those within a fit, ``"validate"``, ``"test"``
            and ``"predict"``.
        validations: The duration of each validation within the fit.
        checkpoints: The duration of writing each checkpoint.
    """

    def __init__(self) -> None:
        self.steps = UnitTimes()
        self.device_steps = UnitTimes()
        self.layer_steps = UnitTimes()
        self.turns = UnitTimes()
        self.evaluations: dict[str, UnitTimes] = {}
        self.validations = Distribution()
        self.checkpoints = Distribution()
        self._logged: dict[str, tuple[float, float]] = {}

    @property
    def waiting(self) -> float:
        """The fraction of the step that is spent waiting for the loader, from 0 to 1. If there is a device, this is a
        fraction of its time: it may be busy while the host waits."""
        return self._bounding.share(FETCH)

    @property
    def _bounding(self) -> UnitTimes:
        return self.device_steps if self.device_steps.units else self.steps

    def fresh_scalars(self) -> dict[str, float]:
        """Return the means since the last call, by name. A name without new values is left out."""
        values: dict[str, float] = {}
        for name, amount, count in self._totals():
            amount_before, count_before = self._logged.get(name, (0.0, 0.0))
            if count > count_before:
                values[name] = (amount - amount_before) / (count - count_before)
                self._logged[name] = (amount, count)
        return values

    def _totals(self) -> Iterator[tuple[str, float, float]]:
        """Yield the name of each scalar, its sum so far, and the number that the sum is divided by."""
        for prefix, table in (("time", self.steps), ("time/device", self.device_steps)):
            for label, row in table.rows.items():
                name = re.sub(r"[^\w./-]", "_", label.name)  # the characters that TensorBoard accepts
                yield f"{prefix}/{'callback/' * (label.kind == 'callback')}{name}_ms", row.total * 1e3, table.units
            yield f"{prefix}/step_ms", table.whole.total * 1e3, table.units
        if FETCH in self._bounding.rows:
            yield "time/data_wait", self._bounding.rows[FETCH].total, self._bounding.whole.total
        yield "time/validation_ms", self.validations.total * 1e3, self.validations.count
        yield "time/checkpoint_ms", self.checkpoints.total * 1e3, self.checkpoints.count

    def summary(self) -> str:
        """Return the tables, and a sentence about each slow thing."""
        blocks = list(self._training_text()) if self.steps.units else []
        blocks += [evaluation_text(name, table) for name, table in self.evaluations.items() if table.units]
        return "\n".join(blocks) if blocks else "Profiler: nothing has been measured yet."

    def _training_text(self) -> Iterator[str]:
        steps, turns, besides = self.steps, self.turns, {"validation": self.validations, "checkpoint": self.checkpoints}
        run_time = steps.whole.total + turns.whole.total + sum(row.total for row in besides.values())
        yield (
            f"Profiler: {steps.observed} batches were observed, and stand for {steps.units}. Observing took "
            f"{duration(steps.observing.mean)} of each, which is in no row."
        )
        yield unit_text("a step, by itself", steps, "the step")
        if self.device_steps.units:
            yield unit_text("a step, on the device", self.device_steps, "the step")
        if self.layer_steps.units:
            yield unit_text("a step, by the forward of its layers", self.layer_steps, "the step")
        yield "\n" + wait_text(self.waiting)
        yield from slowest_text("callback", steps, "the step")
        yield from slowest_text("layer", self.layer_steps, "the step")
        once = {label.name: row for label, row in largest(turns, run_time)}
        once |= {name: row for name, row in besides.items() if row.count}
        yield occasions_text("beside the steps", once, run_time, "the run")
        yield from slowest_text("callback", turns, "the time between two epochs")
        opening = turns.rows.get(OPEN_LOADER, Distribution()).total
        if run_time and opening >= MUCH * run_time:
            yield (
                f"Opening the loader takes {percent(opening / run_time)} of the run. Have its workers wait for the next epoch: "
                "DataLoader(..., persistent_workers=True)."
            )


# ------------------------------------------------------------------ text


def heading(title: str, of: str, last: str) -> str:
    """Return the first line of a table."""
    return f"\n{title:<44}{'mean':>10}{'p50':>10}{'p95':>10}{'of ' + of:>13}{last:>11}"


def line(name: str, values: Distribution, mean: float, whole: float, last: str) -> str:
    """Return a row of a table."""
    share = values.total / whole if whole else 0.0
    times = (mean, values.quantile(0.5), values.quantile(0.95))
    return f"{name:<44}{''.join(f'{duration(t):>10}' for t in times)}{percent(share, 1):>13}{last:>11}"


def unit_text(title: str, table: UnitTimes, of: str) -> str:
    """Return the table of units of work that repeat, such as steps. The means of the rows add up to the mean of a unit.

    Args:
        title: The text of its first line.
        table: The times.
        of: The name of a unit.
    """
    whole = table.whole.total
    lines = [heading(title, of, "in")]
    for label, row in largest(table, whole):
        lines.append(line(label.name, row, table.mean(label), whole, percent(row.count / table.units)))
    lines.append(line("all", table.whole, table.whole.mean, whole, f"{table.units}"))
    return "\n".join(lines)


def occasions_text(title: str, rows: Mapping[str, Distribution], whole: float, of: str) -> str:
    """Return the table of things that occur now and then. The mean of a row is the mean of its occurrences.

    Args:
        title: The text of its first line.
        rows: The rows, by name.
        whole: The time that shares refer to, in seconds.
        of: The name of that time.
    """
    sorted_rows = sorted(rows.items(), key=lambda item: -item[1].total)
    lines = [line(name, row, row.mean, whole, f"{row.count}") for name, row in sorted_rows]
    return "\n".join([heading(title, of, "times"), *lines])


def largest(table: UnitTimes, whole: float, kind: Kind | None = None) -> list[tuple[Label, Distribution]]:
    """Return the rows that are not negligible, the largest first.

    Args:
        table: The times.
        whole: The time that they are parts of, in seconds.
        kind: The kind of rows; None for all.
    """
    rows = [(label, row) for label, row in table.rows.items() if kind in (None, label.kind)]
    rows.sort(key=lambda item: -item[1].total)
    return [(label, row) for label, row in rows[:MOST_ROWS] if row.total >= NEGLIGIBLE * whole]


def evaluation_text(name: str, table: UnitTimes) -> str:
    """Return the table of an evaluation's batches."""
    parts = [unit_text(f"a batch of {name}, by itself", table, "the batch")]
    return "\n".join([*parts, *slowest_text("callback", table, f"the batch of {name}")])


def wait_text(share: float) -> str:
    """Return a sentence about the wait for the loader."""
    if share < MUCH:
        return f"Waiting for data: {percent(share)} of the step."
    return (
        f"The loader is the bottleneck: {percent(share)} of the step is spent waiting for it. Raise num_workers, or "
        "have the data set do less per item."
    )


def slowest_text(kind: Kind, table: UnitTimes, of: str) -> Iterator[str]:
    """Yield a sentence that names the slowest of a kind, if there is any."""
    label = table.slowest(kind)
    if label is not None:
        share, mean = percent(table.share(label)), duration(table.rows[label].mean)
        yield f"The slowest {kind} is {label.name}: {share} of {of}, {mean} where it runs."


def duration(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def percent(share: float, digits: int = 0) -> str:
    """Return a fraction as a percentage."""
    return f"{100 * share:.{digits}f} %"
