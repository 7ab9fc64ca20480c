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


def split_classes(groups: Sequence[int], classes: Sequence[str], seed: str) -> list[str]:
    """`split_groups` of each class by itself, so that every class is shared out; a group is of its first thing's class."""
    of_class: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        of_class.setdefault(classes[group], []).append(i)
    chosen = [""] * len(groups)
    for name, things in of_class.items():
        splits = split_groups([groups[i] for i in things], f"{seed} {name}")
        for i, split in zip(things, splits, strict=True):
            chosen[i] = split
    return chosen
