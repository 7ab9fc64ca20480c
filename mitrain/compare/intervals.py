"""95 % intervals of scores and of their differences: a paired bootstrap over test samples and seeds.

A row keeps what each test sample counted (`kept`). Two methods that were scored on the same samples are compared sample by
sample and seed by seed, so that what makes a sample hard for both is no part of the difference's interval. Samples of one
object or file (the pictures of a concept, the sentences about a picture) are drawn together: they are hard or easy together,
and drawn one by one they would pass for more evidence than they are (Davison and Hinkley 1997, section 3.8).
"""

import base64
import binascii
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mitrain.core.config import digest

Row = Mapping[str, Any]
DRAWS = 2000
ROWS = 100  # draws that exist at a time
CLOSE = 1e-6  # of a mean of float32 to the metric


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval. ``least``: half its width, the smallest effect that is told from none."""

    value: float
    low: float
    high: float

    @property
    def least(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Outcomes:
    """What each of N test samples counts in a score, by seed; ``ids`` names the samples, ``groups`` has the number of each
    one's group, from 0 (None: each is its own)."""

    ids: str
    by_seed: Mapping[Any, np.ndarray]
    groups: np.ndarray | None = None

    def __sub__(self, other: "Outcomes") -> "Outcomes | None":
        """Seed by seed and sample by sample; None where the two sides share no seed, or are of other samples."""
        shared = [seed for seed in self.by_seed if seed in other.by_seed]
        if not shared or self.ids != other.ids:
            return None
        groups = other.groups if self.groups is None else self.groups
        return Outcomes(self.ids, {seed: self.by_seed[seed] - other.by_seed[seed] for seed in shared}, groups)

    @property
    def estimate(self) -> Estimate:
        """Percentiles of the mean over groups of samples and seeds that are drawn with replacement, from a fixed seed.

        Of S seeds S - 1 are drawn, and so of the groups, for which the variance has no bias (Rao and Wu 1988); a single one
        is kept.
        """
        numbers = np.stack(list(self.by_seed.values()))
        members = np.arange(numbers.shape[1]) if self.groups is None else self.groups
        sums, sizes = np.stack([np.bincount(members, one) for one in numbers]), np.bincount(members)
        (seeds, groups), random = sums.shape, np.random.default_rng(0)
        drawn, size = max(1, seeds - 1), (ROWS, max(1, groups - 1))
        means = []
        for _ in range(DRAWS // ROWS):
            weights = random.multinomial(drawn, np.full(seeds, 1 / seeds), ROWS) / drawn
            picked = random.integers(groups, size=size)
            means.append(np.take_along_axis(weights @ sums, picked, 1).sum(1) / sizes[picked].sum(1))
        low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
        return Estimate(float(numbers.mean()), float(low), float(high))


def kept(
    ids: Sequence[str], numbers: Sequence[float] | None, value: float, groups: Sequence[int] = ()
) -> dict[str, str] | None:
    """What a row keeps of its samples, or None where there are no ``numbers`` whose mean is the metric's ``value``.

    ``groups``: names the group of each, where some share one. One of all tells nothing of others: none is kept then.
    """
    if numbers is None:
        return None
    each = np.array(numbers, dtype="<f4")
    if not abs(float(each.mean(dtype=np.float64)) - value) < CLOSE:
        return None
    found = {"ids": digest(list(ids)), "each": packed(each)}
    return found | ({"groups": packed(numbered(groups))} if 1 < len({*groups}) < len(groups) else {})


def numbered(groups: Sequence[int] | np.ndarray) -> np.ndarray:
    """From 0, each number once at least."""
    return np.unique(np.array(groups), return_inverse=True)[1].astype("<u4")


def packed(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode()


def unpacked(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), kind)


def outcomes_of(rows: Sequence[Row], control: str = "") -> Outcomes | None:
    """Of the rows of one method, one per seed, as the samples are or under a negative ``control``; None where one of the
    rows has kept none, or they are of other samples."""
    held = [row.get("control_outcomes") if control else row for row in rows]
    found = [part.get(control or "outcomes") if isinstance(part, Mapping) else None for part in held]
    if not found or not all(isinstance(part, Mapping) and {"ids", "each"} <= part.keys() for part in found):
        return None
    try:
        each = [unpacked(part["each"], "<f4").astype(float) for part in found]
        own = [row.get("outcomes") for row in rows]  # the samples of a control are the same
        joined = next((part["groups"] for part in own if isinstance(part, Mapping) and "groups" in part), None)
        groups = None if joined is None else numbered(unpacked(joined, "<u4"))
    except (ValueError, TypeError, binascii.Error, zlib.error):
        return None
    if len({part["ids"] for part in found}) > 1 or len({len(one) for one in each}) > 1 or not len(each[0]):
        return None
    if groups is not None and len(groups) != len(each[0]):
        return None
    return Outcomes(found[0]["ids"], {row["seed"]: one for row, one in zip(rows, each, strict=True)}, groups)
