"""Splits that hold out whole groups: what shares an object, a text or nearly a picture stays together."""

from collections import Counter
from collections.abc import Sequence
from random import Random

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}


def split_groups(groups: Sequence[int], seed: str, shares: dict[str, float] = SHARES) -> list[str]:
    """The split of each thing, the same for all of a group: large groups first, each to where most room is left."""
    sizes = Counter(groups)
    left = {split: share * len(groups) for split, share in shares.items()}
    order = sorted(sizes)
    Random(seed).shuffle(order)
    chosen: dict[int, str] = {}
    for group in sorted(order, key=lambda group: -sizes[group]):
        split = max(left, key=lambda split: left[split] / shares[split])
        left[split] -= sizes[group]
        chosen[group] = split
    return [chosen[group] for group in groups]
