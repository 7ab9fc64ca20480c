"""Negative controls: which other sample's files, text or expression each sample is given instead of its own.

Pure functions from lists to indices, deterministic from a seed. What a control could not satisfy is counted in
`Pairing.clashes`, never hidden.
"""

import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mitrain.core.errors import DataError


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
    files as they are and breaks only their link to the text.

    Args:
        files, objects, answers: one label per sample, in falling importance; answers are optional.

    Returns:
        clashes has the keys "object" and, with answers, "answer".

    Raises:
        DataError: one file belongs to more than half of the samples, so that no such permutation exists.
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

    Args:
        order: (n,) permutation; sample i takes from order[i].
        codes: (wishes, n) label codes; wish w of sample i is met where codes[w, i] != codes[w, order[i]].
    """
    order = order.copy()
    price = 3 ** np.arange(len(codes))[::-1]  # an exchange changes two samples: a wish outweighs twice all later ones
    cost = price @ (codes == codes[:, order])
    improved = True
    while improved:
        improved = False
        for i in np.flatnonzero(cost):
            to_i = price @ (codes[:, [i]] == codes[:, order])
            to_others = price @ (codes == codes[:, [order[i]]])
            gain = cost + cost[i] - to_i - to_others
            if gain.max() > 0:
                j = rng.choice(np.flatnonzero(gain == gain.max()))
                order[[i, j]] = order[[j, i]]
                cost[i], cost[j] = to_i[j], to_others[j]
                improved = True
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
    a target without a name can't be ruled out and is drawn only as a last resort.

    Args:
        expressions, names, scenes: per sample the text, its target's name ("" if unknown) and the scene's id.
        present: all objects' names per scene, where more is known than the targets' names.

    Returns:
        clashes["named"] counts samples for which every expression of another scene names one of its objects.

    Raises:
        DataError: all samples are of one scene.
    """
    texts = [f" {plain_words(text)} " for text in expressions]
    targets = [plain_words(name) for name in names]
    inside = objects_by_scene(targets, scenes, present or {})
    codes, rng = label_codes(scenes), np.random.default_rng(seed)
    cache: dict[str, np.ndarray] = {}
    index, clashes = np.zeros(len(texts), dtype=np.int64), 0
    for code, (scene, names_here) in enumerate(inside.items()):
        here = codes == code
        if here.all():
            raise DataError(f"all samples are of the scene {scene!r}: the other-expression control needs two scenes")
        allowed = ~names_any(names_here | {""}, texts, targets, cache)  # none of this scene: its targets are named here
        clashes += 0 if allowed.any() else int(here.sum())
        pool = np.flatnonzero(allowed if allowed.any() else ~here)
        index[here] = rng.choice(pool, here.sum())
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


def names_any(names: set[str], texts: list[str], targets: list[str], cache: dict[str, np.ndarray]) -> np.ndarray:
    """(n,) bool: which expressions have one of ``names`` as their target or among their words."""
    for name in names - cache.keys():
        words = f" {name} "
        pairs = zip(texts, targets, strict=True)
        cache[name] = np.array([target == name or (name != "" and words in text) for text, target in pairs])
    return np.logical_or.reduce([cache[name] for name in sorted(names)])
