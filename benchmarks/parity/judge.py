"""Losses beside their references, bytes beside their limit: what makes a cell red.

A loss agrees with that of the single-process, unsharded run of the same precision to `EXACT`, or, where rounding depends
on the order of sums, to the spread of unsharded runs that differ in that order alone: |x − y| ≤ t √2 s, with s the standard
deviation of their m losses and t the two-sided quantile `CONFIDENCE` of Student's distribution of m − 1 degrees. (Largest −
smallest of them would be exceeded by a run like them with a chance of 2 / (m + 1).) Losses that are equal, as those of two
ways to cut a batch that add in the same order, count once. At stage 3 a rank holds at most `SLACK` times its share of
payload and scales. Peers are measured, not judged.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import t

from benchmarks.parity.cells import EXACT, NOISY, OURS, Cell, from_dict

Row = dict[str, Any]
SLACK = 1.05
CONFIDENCE = 0.99
FEWEST = 5
"""Different losses below which the spread is not known."""


def judged(rows: Sequence[Row]) -> list[Row]:
    """``rows`` with ``reference_loss``, ``relative_difference``, ``tolerance``, ``limit_bytes_per_rank`` and ``ok``.

    ``ok`` is None where nothing is judged; a cell of ours that failed, or has no reference, is not ok.
    """
    losses = {from_dict(row): row["loss"] for row in rows if "error" not in row}
    return [{**row, **verdict(row, losses)} for row in rows]


def verdict(row: Row, losses: dict[Cell, float]) -> Row:
    cell = from_dict(row)
    judging = cell.who == OURS
    reference = losses.get(cell.reference)
    difference = None if reference is None or "error" in row else abs(row["loss"] - reference) / abs(reference)
    tolerance = (spread(cell, losses) if cell.precision in NOISY else EXACT) if judging else None
    limit = SLACK * row["whole_frozen_bytes"] / row["ranks"] if judging and cell.zero == 3 and "error" not in row else None
    agrees = difference is not None and tolerance is not None and difference <= tolerance
    fits = limit is None or row["resident_frozen_bytes_per_rank"] <= limit
    return {
        "reference_loss": reference,
        "relative_difference": difference,
        "tolerance": tolerance,
        "limit_bytes_per_rank": limit,
        "ok": agrees and fits if judging else None,
    }


def spread(cell: Cell, losses: dict[Cell, float]) -> float | None:
    """What two unsharded runs of the cell's precision differ by, relative to the reference; see above."""
    found = {loss for c, loss in losses.items() if (c.who, c.precision, c.zero) == (cell.who, cell.precision, 0)}
    if len(found) < FEWEST or cell.reference not in losses:
        return None
    quantile = t.ppf((1 + CONFIDENCE) / 2, len(found) - 1)
    return float(quantile * math.sqrt(2) * statistics.stdev(found) / abs(losses[cell.reference]))


def faults(rows: Sequence[Row]) -> list[str]:
    """One line for each cell of ours that is not ok."""
    return [f"{from_dict(row).name}: {why(row)}" for row in rows if row["ok"] is False]


def why(row: Row) -> str:
    if "error" in row:
        return row["error"]
    difference, tolerance, limit = (row[key] for key in ("relative_difference", "tolerance", "limit_bytes_per_rank"))
    reasons = []
    if difference is None or tolerance is None:
        reasons.append("its loss has nothing to be compared with")
    elif difference > tolerance:
        reasons.append(f"its loss is off by {difference:.1e}, and {tolerance:.1e} is allowed")
    if limit is not None and row["resident_frozen_bytes_per_rank"] > limit:
        reasons.append(f"a rank holds {row['resident_frozen_bytes_per_rank']} bytes, and {limit:.0f} are allowed")
    return ", ".join(reasons)
