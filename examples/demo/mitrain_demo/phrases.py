"""Expressions of many kinds for a composed scene: by name, by category, by place, by exclusion; and about a second picture.

Each is kept only where it holds without doubt. Those about a reference picture never name what it shows.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import dist

import numpy as np

from mitrain_demo.compose import Shown, Thing

APART = 45  # pixels between centres from which one is said to be left of, or above, another
NEARER = 0.7  # of the second nearest's distance: what is called the nearest is no further than that
PLACES = {"on the left": (0, 1), "on the right": (0, -1), "at the top": (1, 1), "at the bottom": (1, -1)}
EXTREMES = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}
SAME = {
    "name": ("the same thing",),
    "horizontal": ("the same thing on the left", "the same thing on the right"),
    "vertical": ("the same thing at the top", "the same thing at the bottom"),
    "size": ("the bigger one of the same thing", "the smaller one of the same thing"),
}


@dataclass(frozen=True)
class Phrase:
    """``targets``: the places in the scene's list of what it means; ``reference``: what the second picture shows."""

    text: str
    kind: str
    targets: tuple[int, ...]
    reference: Thing | None = None


def ordered(shown: Sequence[Shown], twins: Sequence[int]) -> list[int]:
    """Two copies in the order of their relation: left, top or bigger first."""
    keys = {"horizontal": lambda i: shown[i].centre[0], "vertical": lambda i: shown[i].centre[1]}
    return sorted(twins, key=keys.get(shown[twins[0]].twin, lambda i: -np.count_nonzero(shown[i].solid)))


def first_along(shown: Sequence[Shown], among: Sequence[int], axis: int, sign: int) -> int | None:
    """Which of ``among`` comes first along an axis, if no other is near."""
    order = sorted(among, key=lambda i: sign * shown[i].centre[axis])
    gap = abs(shown[order[0]].centre[axis] - shown[order[1]].centre[axis])
    return order[0] if gap >= APART else None


def of_categories(shown: Sequence[Shown]) -> dict[str, list[int]]:
    places = defaultdict(list)
    for i, one in enumerate(shown):
        places[one.thing.category].append(i)
    return places


def texts_alone(shown: Sequence[Shown]) -> Iterator[Phrase]:
    """The ten kinds of expressions that name or describe what they mean."""
    for i, one in enumerate(shown):
        kind = {"": "name", "size": "size"}.get(one.twin, "place")
        yield Phrase(one.expression, kind, (i,))
    yield from by_category(shown)
    yield from by_keyword(shown)
    for word, (axis, sign) in EXTREMES.items():
        if (i := first_along(shown, range(len(shown)), axis, sign)) is not None:
            yield Phrase(f"the {word} thing", "extreme", (i,))
    for i, one in enumerate(shown):
        away = sorted((dist(one.centre, other.centre), j) for j, other in enumerate(shown) if j != i)
        if not one.twin and away[0][0] <= NEARER * away[1][0]:
            yield Phrase(f"the thing nearest to the {one.thing.name}", "nearest", (away[0][1],))


def by_category(shown: Sequence[Shown]) -> Iterator[Phrase]:
    places = of_categories(shown)
    for category, among in places.items():
        things = {shown[i].thing.name for i in among}
        if category and len(among) == 1:
            yield Phrase(f"the {category}", "category", (among[0],))
        if category and len(among) == len(things) == 2:
            for where, (axis, sign) in PLACES.items():
                if (i := first_along(shown, among, axis, sign)) is not None:
                    yield Phrase(f"the {category} {where}", "category and place", (i,))
            for i, j in (among, among[::-1]):
                yield Phrase(f"the {category} that is not the {shown[j].thing.name}", "other", (i,))
        if category and len(among) == 3 and len(shown) == 4:
            (odd,) = set(range(4)) - set(among)
            yield Phrase("the odd one out", "odd", (odd,))


def by_keyword(shown: Sequence[Shown]) -> Iterator[Phrase]:
    counts = Counter(word for name, words in {(o.thing.name, o.thing.words) for o in shown} for word in set(words))
    named = " ".join(one.thing.name for one in shown).split()
    for i, one in enumerate(shown):
        for word in one.thing.words:
            if not one.twin and counts[word] == 1 and not set(word.split()) & {*named, one.thing.category}:
                yield Phrase(f"something about {word}", "keyword", (i,))


def about_references(shown: Sequence[Shown], others: dict[str, list[Thing]]) -> Iterator[Phrase]:
    """Expressions about a second picture; ``others``: things of each category, for pictures of what is not in the scene."""
    everything = set(range(len(shown)))
    for i, one in enumerate(shown):
        if not one.twin:
            yield Phrase(SAME["name"][0], "same", (i,), one.thing)
            yield Phrase("everything but this", "all but", tuple(sorted(everything - {i})), one.thing)
    if twins := [i for i, one in enumerate(shown) if one.twin]:
        kind = {"size": "same, size"}.get(shown[twins[0]].twin, "same, place")
        for i, text in zip(ordered(shown, twins), SAME[shown[twins[0]].twin], strict=True):
            yield Phrase(text, kind, (i,), shown[i].thing)
        yield Phrase("both of these", "both", tuple(twins), shown[twins[0]].thing)
    for category, among in of_categories(shown).items():
        if category and len(among) == len({shown[i].thing.name for i in among}) == 2:
            for i, j in (among, among[::-1]):
                yield Phrase("another thing of this kind", "another", (i,), shown[j].thing)
        if category and len(among) == 1:
            for thing in others.get(category, ())[:1]:
                yield Phrase("a thing of this kind", "kind", (among[0],), thing)


class Balance:
    """Picks of each scene's phrases those whose kinds came up least, by their ``shares`` (1 where none is given)."""

    def __init__(self, shares: dict[str, float]):
        self.shares, self.counts = shares, Counter()

    def pick(self, phrases: Sequence[Phrase], count: int) -> list[Phrase]:
        left, picked = list(phrases), []
        while left and len(picked) < count:
            best = min(left, key=lambda phrase: self.counts[phrase.kind] / self.shares.get(phrase.kind, 1))
            self.counts[best.kind] += 1
            picked.append(best)
            left.remove(best)
        return picked
