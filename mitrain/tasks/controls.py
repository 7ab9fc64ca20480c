"""Negative controls: which other sample's files, text or expression each sample is given instead of its own.

Pure functions from lists to indices, deterministic from a seed. What a control could not satisfy is counted in
`Pairing.clashes`, never hidden.

Up to `EXACT` samples a donor is drawn among all that fit. Above, where that would take hours, among the `TRIED` or more that
are drawn first: by the same rule, in a time that grows with the number of samples and not with its square.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mitrain.core.errors import DataError

EXACT, TRIED = 4096, 64


@dataclass(frozen=True)
class Pairing:
    """Sample i takes from sample ``index[i]``; ``clashes`` counts the samples for which a wish was not met."""

    index: list[int]
    clashes: dict[str, int]


def other_files(
    files: Sequence[Hashable],
    objects: Sequence[Hashable],
    answers: Sequence[Hashable] | None = None,
    seed: int = 0,
    what: str = "file",
) -> Pairing:
    """A permutation in which every sample gets another file, if possible of another object and with another answer.

    Serves all tasks: for referring expressions ``files`` are the scenes and ``objects`` the targets' names; where texts
    are exchanged (``what``, as messages call it) they stand for the files. Being a permutation, it leaves the set's
    files as they are and breaks only their link to the text. Of the labels the first count most.

    DataError where one file belongs to more than half of the samples, so that no such permutation exists.
    """
    wishes = {"file": files, "object": objects} | ({} if answers is None else {"answer": answers})
    codes = np.stack([label_codes(labels) for labels in wishes.values()])
    rng = np.random.default_rng(seed)
    order = improve_by_swaps(rng.permutation(len(files)), codes, rng)
    clashes = dict(zip(wishes, (codes == codes[:, order]).sum(axis=1).tolist(), strict=True))
    if clashes.pop("file"):
        raise DataError(
            f"the other-{what} control is impossible: one {what} makes up more than half of the {len(files)} samples; "
            "evaluate more samples"
        )
    return Pairing(order.tolist(), clashes)


def label_codes(labels: Sequence[Hashable]) -> np.ndarray:
    """(n,) integers that are equal where the labels are."""
    numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.array([numbers[label] for label in labels], dtype=np.int64)


def improve_by_swaps(order: np.ndarray, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exchange donors between two samples as long as that meets more wishes, earlier rows of ``codes`` first.

    Every exchange lowers the total cost, so this ends. The first wish ends fully met whenever no label of it fills
    more than half of the samples: if i and its donor share label A, some j outside A has a donor outside A.
    A pass over more than `EXACT` samples compares each with so many others that it takes n × `TRIED` comparisons.
    Sample i takes from order[i]; its wish w is met where codes[w, i] != codes[w, order[i]].
    """
    order, count = order.copy(), len(order)
    price = 3 ** np.arange(len(codes))[::-1]  # an exchange changes two samples: a wish outweighs twice all later ones
    cost = price @ (codes == codes[:, order])
    least = price @ [max(0, 2 * np.bincount(row).max(initial=0) - count) for row in codes]  # no permutation costs less

    def improve(i: int, others: np.ndarray | slice) -> bool:
        to_i = price @ (codes[:, [i]] == codes[:, order[others]])
        to_others = price @ (codes[:, others] == codes[:, [order[i]]])
        gain = cost[others] + cost[i] - to_i - to_others
        if gain.max() <= 0:
            return False
        k = rng.choice(np.flatnonzero(gain == gain.max()))
        j = k if isinstance(others, slice) else others[k]
        order[[i, j]] = order[[j, i]]
        cost[i], cost[j] = to_i[k], to_others[k]
        return True

    improved = True
    while improved and cost.sum() > least:
        improved, unmet = False, np.flatnonzero(cost)
        tried = count if count <= EXACT else count * TRIED // max(1, len(unmet))
        for i in unmet:
            improved |= improve(i, slice(None) if tried >= count else rng.integers(count, size=tried))
    if count > EXACT and 2 * np.bincount(codes[0]).max() <= count:
        for i in np.flatnonzero(cost >= price[0]):  # whose exchange is too rare to be drawn; no other sample's harms them
            improve(i, slice(None))
    return order


def other_expressions(
    expressions: Sequence[str],
    names: Sequence[str],
    scenes: Sequence[Hashable],
    present: Mapping[Hashable, Collection[str]] | None = None,
    seed: int = 0,
) -> Pairing:
    """For every sample an expression from another scene that names no object of this one, drawn at random.

    An expression names an object when the object is its target or when the object's name stands in it as whole words;
    a target without a name ("") can't be ruled out and is drawn only as a last resort. ``present``: all objects' names
    per scene, where more is known than the targets' names. The clashes "named" are the samples for which every expression
    of another scene names one of their objects.
    """
    targets = [plain_words(name) for name in names]
    inside = objects_by_scene(targets, scenes, present or {})
    named = objects_named(expressions, targets, set().union(*inside.values()))
    own: dict[Hashable, list[int]] = defaultdict(list)
    for i, scene in enumerate(scenes):
        own[scene].append(i)
    naming: dict[str, list[int]] = defaultdict(list)
    for j, names in enumerate(named):
        for name in names:
            naming[name].append(j)
    rng, count = np.random.default_rng(seed), len(targets)

    @lru_cache(256)  # each is as long as there are samples
    def allowed_of_all(here: frozenset[str]) -> np.ndarray:
        allowed = np.ones(count, dtype=bool)
        allowed[[j for name in here for j in naming.get(name, ())]] = False
        return np.flatnonzero(allowed)

    index, clashes = np.zeros(count, dtype=np.int64), 0
    for scene, names_here in inside.items():
        if len(own[scene]) == count:
            raise DataError(f"all samples are of the scene {scene!r}: the other-expression control needs two scenes")
        here = frozenset(names_here | {""})  # none of this scene is allowed: its targets are named here
        drawn = () if count <= EXACT else rng.integers(count, size=TRIED).tolist()
        pool: Sequence[int] | np.ndarray = [j for j in drawn if named[j].isdisjoint(here)]
        if not len(pool):
            pool = allowed_of_all(here)
        if not len(pool):
            clashes += len(own[scene])
            pool = [j for j in range(count) if scenes[j] != scene]
        index[own[scene]] = rng.choice(pool, len(own[scene]))
    return Pairing(index.tolist(), {"named": clashes})


def plain_words(text: str) -> str:
    """Lower case, with everything but letters and digits turned into single spaces."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def objects_by_scene(
    targets: Sequence[str], scenes: Sequence[Hashable], present: Mapping[Hashable, Collection[str]]
) -> dict[Hashable, set[str]]:
    inside = {scene: {plain_words(name) for name in present.get(scene, ())} for scene in dict.fromkeys(scenes)}
    for target, scene in zip(targets, scenes, strict=True):
        inside[scene].add(target)
    return inside


def objects_named(expressions: Sequence[str], targets: Sequence[str], objects: Collection[str]) -> list[set[str]]:
    """For each expression its target, and which of the ``objects`` stand in it as whole words."""
    lengths = sorted({len(name.split()) for name in objects} - {0})
    named = []
    for text, target in zip(expressions, targets, strict=True):
        words = plain_words(text).split()
        parts = {" ".join(words[i : i + n]) for n in lengths for i in range(len(words) - n + 1)}
        named.append(parts.intersection(objects) | {target})
    return named
