"""Result rows as claims read them. What is missing, failed or no number raises `Missing` and so leaves its claim open."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

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


def spread(rows: Sequence[Row], name: str) -> float:
    """Standard deviation over the seeds."""
    if len(rows) < 2:
        raise Missing("one seed has no spread")
    return statistics.stdev(number(row, name) for row in rows)


def series(points: Sequence[Sequence[Row]], name: str) -> list[float]:
    """The mean at each point of an axis."""
    return [mean(rows, name) for rows in points]


def noise(one: Sequence[Row], other: Sequence[Row], name: str) -> float:
    """√(s₁²/n + s₂²/n): the standard error of a difference of means over the same seeds."""
    if {row["seed"] for row in one} != {row["seed"] for row in other}:
        raise Missing(f"{one[0]['method']} and {other[0]['method']} have other seeds than one another")
    return math.sqrt((spread(one, name) ** 2 + spread(other, name) ** 2) / len(one))


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
