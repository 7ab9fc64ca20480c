"""Near-duplicates: pictures that are one another scaled, mirrored or touched up, and groups that must share a split.

Shapes: N pictures, F numbers of a fingerprint.
"""

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from PIL import Image

SIDE = 16  # pixels of a fingerprint's side
NEAR = 0.97  # correlation of two fingerprints
ROWS = 1024  # compared at a time


def fingerprint(image: Image.Image) -> np.ndarray:
    """(F,) float32 of length 1: the picture in 16 x 16 colours, less their mean; zeros for a plain one."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    values = np.asarray(small, dtype=np.float32).ravel()
    values = values - values.mean()
    return values / max(float(np.linalg.norm(values)), 1.0)


def near_pairs(prints: np.ndarray, others: np.ndarray | None = None, near: float = NEAR) -> list[tuple[int, int]]:
    """Pairs (i, j) of near-duplicates: i from ``prints`` (N, F), j from ``others`` (M, F), or i < j of one array."""
    there = prints if others is None else others
    found = set()
    for start in range(0, len(prints), ROWS):
        rows = prints[start : start + ROWS]
        # as they are, and mirrored
        for view in (rows, rows.reshape(-1, SIDE, SIDE, 3)[:, :, ::-1].reshape(len(rows), -1)):
            i, j = np.nonzero(view @ there.T >= near)
            found.update(zip((start + i).tolist(), j.tolist(), strict=True))
    return sorted((i, j) for i, j in found if others is not None or i < j)


def merged(count: int, pairs: Iterable[tuple[int, int]], *keys: Sequence[Hashable]) -> list[int]:
    """The group (its first member) of each of ``count`` things: what a pair joins, or an equal key that is not empty."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(i: int, j: int) -> None:
        a, b = root(i), root(j)
        parent[max(a, b)] = min(a, b)

    for i, j in pairs:
        join(i, j)
    for labels in keys:
        first: dict[Hashable, int] = {}
        for i, label in enumerate(labels):
            if label:
                join(first.setdefault(label, i), i)
    return [root(i) for i in range(count)]
