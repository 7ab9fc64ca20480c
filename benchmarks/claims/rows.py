"""Result rows as claims read them. What is missing, failed or no number raises `Missing`: its claim is not tested then."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student

from mitrain.compare.intervals import Estimate, Outcomes, outcomes_of

Row = Mapping[str, Any]


class Missing(Exception):
    """What a claim needs is not among the rows; the message says what."""


class Rows:
    """The rows of the studies of a claim; ``read`` are those that were asked for."""

    def __init__(self, rows: Sequence[Row]):
        self.rows, self.read = list(rows), list[Row]()

    def of(self, method: str, axis: str | None = None, at: Any = None, *, task: str | None = None) -> list[Row]:
        """The rows of a method, one per seed, at a point of an axis or at none."""
        wanted = f"method={method}" + (f", task={task}" if task else "") + (f", {axis}={at}" if axis else "")
        return self._chosen(method, axis, task, wanted, lambda row: axis is None or row["at"] == at)

    def along(self, axis: str, method: str, *, task: str | None = None) -> list[list[Row]]:
        """The same for every point of an axis, in the order in which the points come."""
        points: dict[str, list[Row]] = {}
        for row in self._chosen(method, axis, task, f"method={method}, over={axis}", lambda row: True):
            points.setdefault(repr(row["at"]), []).append(row)
        return list(points.values())

    def _chosen(self, method: str, axis: str | None, task: str | None, wanted: str, here: Any) -> list[Row]:
        found = [row for row in self.rows if (row["method"], row["axis"]) == (method, axis) and here(row)]
        found = [row for row in found if task in (None, row["task"])]
        if not found:
            raise Missing(f"no row with {wanted}")
        tasks = {row["task"] for row in found}
        if len(tasks) > 1:  # their mean would be of nothing
            raise ValueError(f"{wanted} means rows of several tasks ({', '.join(sorted(tasks))}): add task=")
        self.read += [row for row in found if not any(row is known for known in self.read)]
        return found


def number(row: Row, name: str) -> float:
    """The number ``name`` of a row: one of its fields, or a.b for one within a field."""
    cell = f"{row['task']} {row['method']}" + (f" {row['axis']}={row['at']}" if row["axis"] else "")
    cell += "" if row["seed"] is None else f" seed {row['seed']}"
    if row["status"] != "ok":
        raise Missing(f"{cell}: {row['status']}" + (f" ({row['reason']})" if row.get("reason") else ""))
    found: Any = row
    for part in name.split(".", 1):
        found = found.get(part) if isinstance(found, Mapping) else None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise Missing(f"{cell}: no number {name!r}")
    return float(found)


def mean(rows: Sequence[Row], name: str) -> float:
    """Over the seeds."""
    return statistics.fmean(number(row, name) for row in rows)


@dataclass(frozen=True)
class Seeds:
    """A number for each seed, and what every test sample counted in it, where the rows have kept that; else the variance
    that all seeds share because they are of the same test samples."""

    numbers: Mapping[Any, float]
    variance: float = 0.0
    outcomes: Outcomes | None = None

    def __sub__(self, other: "Seeds") -> "Seeds":
        """Seed by seed, as the same seed means the same samples in the same order, and sample by sample. Where a side has
        kept no sample's outcome the samples' variances add up, as if the two sides were of different samples: the interval
        is then too wide rather than too narrow."""
        if self.numbers.keys() != other.numbers.keys():
            raise Missing("the two sides of a difference have other seeds than one another")
        numbers = {seed: value - other.numbers[seed] for seed, value in self.numbers.items()}
        paired = self.outcomes - other.outcomes if self.outcomes and other.outcomes else None
        return Seeds(numbers, self.variance + other.variance, paired)

    @property
    def estimate(self) -> Estimate:
        """By bootstrap (`Outcomes.estimate`); without outcomes Student's t over the seeds, and the normal distribution over
        the samples."""
        several = list(self.numbers.values())
        if len(several) < 2:
            raise Missing("one seed has no spread")
        if self.outcomes:
            return self.outcomes.estimate
        centre, error = statistics.fmean(several), statistics.stdev(several) / math.sqrt(len(several))
        half = math.hypot(float(student.ppf(0.975, len(several) - 1)) * error, 1.96 * math.sqrt(self.variance))
        return Estimate(centre, centre - half, centre + half)


def scores(rows: Sequence[Row], name: str = "value") -> Seeds:
    """The share ``name`` of right samples, for each seed; its variance over n samples is p (1 - p) / n."""
    found = numbers(rows, name)
    centre, metrics = statistics.fmean(found.numbers.values()), rows[0].get("metrics")
    count = metrics.get("samples") if isinstance(metrics, Mapping) else None
    part, _, control = name.partition(".")
    kept = outcomes_of(rows, control) if part in ("value", "controls") else None
    return Seeds(found.numbers, max(0.0, centre * (1 - centre)) / count if count else 0.0, kept)


def numbers(rows: Sequence[Row], name: str) -> Seeds:
    """The number ``name`` of each seed's row, where it is no share of samples."""
    return Seeds({row["seed"]: number(row, name) for row in rows})


def difference(one: Sequence[Row], other: Sequence[Row]) -> Estimate:
    """Of two methods' scores."""
    return (scores(one) - scores(other)).estimate


def series(points: Sequence[Sequence[Row]], name: str) -> list[float]:
    """The mean at each point of an axis."""
    return [mean(rows, name) for rows in points]


def fit(x: Sequence[float], y: Sequence[float]) -> float:
    """R² of the least-squares line through points."""
    if len(set(x)) < 2:
        raise Missing("a line needs two points")
    return statistics.correlation(x, y) ** 2 if len(set(y)) > 1 else 1.0


def rises(y: Sequence[float]) -> bool:
    """From each point to the next."""
    if len(y) < 2:
        raise Missing("a trend needs two points")
    return all(a < b for a, b in zip(y, y[1:], strict=False))
