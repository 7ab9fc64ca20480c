"""Ranks in retrieval: how far down the right thing stands, both ways, and what that is worth.

An image's captions are all right for it, and so is the same text of another image: relevance is equality of texts.
Ties count against the right thing, so that a model that gives all the same score finds nothing.

Shapes: M files, N texts, c rows at a time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mitrain.core.errors import DataError

CHUNK = 256  # rows of the similarity matrix that exist at a time
DEPTHS = (1, 5, 10)
WAYS = ("i2t", "t2i")


def ways_between(one: str, other: str) -> tuple[str, str]:
    """The names of both ways of retrieval; those between images and texts are the field's."""
    return WAYS if (one, other) == ("image", "text") else (f"{one}_to_{other}", f"{other}_to_{one}")


def arrows(one: str, other: str) -> tuple[str, str]:
    """The same in a table's head."""
    return ("i→t", "t→i") if (one, other) == ("image", "text") else (f"{one}→{other}", f"{other}→{one}")


class Gallery:
    """The files and texts of a split, and which belong together; of two files the partner's stands for the text.

    ``files``: M names in order of appearance; ``texts``: N texts, one a sample; ``of_sample``: (N,) each sample's file;
    ``first``: (M,) each file's first sample; ``codes``: (N,) equal where texts are; ``owned``: each file's codes.
    """

    def __init__(self, files: Sequence[str], texts: Sequence[str], ways: Sequence[str] = WAYS):
        self.ways = tuple(ways)
        numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        self.texts = list(texts)
        self.codes = np.array([numbers[text] for text in texts])
        places: dict[str, list[int]] = {}
        for sample, file in enumerate(files):
            places.setdefault(file, []).append(sample)
        self.files = list(places)
        numbers = {file: i for i, file in enumerate(self.files)}
        self.of_sample = np.array([numbers[file] for file in files])
        self.first = np.array([samples[0] for samples in places.values()])
        self.owned = [sorted({int(self.codes[s]) for s in samples}) for samples in places.values()]

    def relevant(self, rows: slice) -> np.ndarray:
        """(c, N) bool: which texts are right for the files ``rows``."""
        member = np.zeros((len(self.owned[rows]), self.codes.max() + 1), dtype=bool)
        for row, codes in enumerate(self.owned[rows]):
            member[row, codes] = True
        return member[:, self.codes]

    def depths(self) -> list[str]:
        return [f"{name}_r{k}" for name in self.ways for k in DEPTHS]

    def decided(self) -> list[str]:
        """The recalls that cannot be wrong: even the last place is among the first k."""
        count, total = np.bincount(self.codes), len(self.codes)
        holders = np.bincount([code for codes in self.owned for code in codes], minlength=len(count))
        last = (
            1 + max(total - int(count[codes].sum()) for codes in self.owned),
            1 + len(self.files) - int(holders[self.codes].min()),
        )
        return [f"{name}_r{k}" for name, place in zip(self.ways, last, strict=True) for k in DEPTHS if place <= k]

    def caution(self, split: str) -> list[str]:
        """A line about the recalls that cannot be wrong, if any; DataError where none could be."""
        decided = self.decided()
        if len(decided) == len(self.depths()):
            raise DataError(
                f"{split}: {len(self.files)} file(s) and {len(set(self.texts))} different text(s) leave nothing that a"
                " ranking could get wrong: give more"
            )
        things = f"{len(self.files)} files and {len(self.texts)} texts"
        line = f"{split}: {', '.join(decided)} cannot be wrong among {things} and are left out of recall_mean"
        return [line] if decided else []


def best_ranks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """(c,) the rank, from 1, of the best relevant thing of each row of ``scores`` and ``relevant`` (c, n)."""
    best = np.where(relevant, scores, -np.inf).max(1, keepdims=True)
    return 1 + ((scores >= best) & ~relevant).sum(1)


def both_ways(gallery: Gallery, files: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of each file's best text (M,) and of each text's best file (N,), from vectors (M, d) and (N, d)."""
    towards_text = np.empty(len(files), dtype=np.int64)
    best = np.full(len(texts), -np.inf)
    for rows in chunks(len(files)):
        scores, right = files[rows] @ texts.T, gallery.relevant(rows)
        towards_text[rows] = best_ranks(scores, right)
        best = np.maximum(best, np.where(right, scores, -np.inf).max(0))
    above = np.zeros(len(texts), dtype=np.int64)
    for rows in chunks(len(files)):
        above += ((files[rows] @ texts.T >= best) & ~gallery.relevant(rows)).sum(0)
    return towards_text, 1 + above


def chunks(count: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def reranked(ranks: np.ndarray, relevant: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(c,) ranks after each row's best k candidates are put in the order of new ``scores`` (c, k).

    Rows whose right thing is not among their candidates keep their rank. ``ranks`` (c,): before; ``relevant`` (c, k)
    bool: which candidates are right.
    """
    return np.where(relevant.any(1), best_ranks(scores, relevant), np.maximum(ranks, scores.shape[1] + 1))


def rank_metrics(
    towards_text: np.ndarray, towards_file: np.ndarray, decided: Sequence[str] = (), ways: Sequence[str] = WAYS
) -> dict[str, Any]:
    """Recall at 1, 5 and 10 (fractions of 1), median and mean rank, of file → text and of text → file, as ``ways`` names
    them.

    ``decided``: recalls that cannot be wrong; they are None, and no part of the mean.
    """
    values: dict[str, Any] = {}
    for name, ranks in zip(ways, (towards_text, towards_file), strict=True):
        values |= {f"{name}_r{k}": float((ranks <= k).mean()) for k in DEPTHS}
        values |= {f"{name}_median_rank": float(np.median(ranks)), f"{name}_mean_rank": float(ranks.mean())}
    return with_mean(values, decided)


def with_mean(values: dict[str, Any], decided: Sequence[str]) -> dict[str, Any]:
    """``values`` with the mean of the recalls that can be wrong; DataError where none can."""
    values = values | dict.fromkeys(decided)
    ends = tuple(f"_r{k}" for k in DEPTHS)
    recalls = [value for name, value in values.items() if name.endswith(ends) and value is not None]
    if not recalls:
        raise DataError("no ranking of so few things could be wrong: score more of them")
    return {"recall_mean": float(np.mean(recalls)), **values}


def recall_shares(
    gallery: Gallery, towards_text: np.ndarray, towards_file: np.ndarray, decided: Sequence[str]
) -> list[float]:
    """(N,) what each sample counts in the mean recall, which is their mean; a file's part is its captions' in equal
    parts."""
    place = gallery.of_sample
    part = len(gallery.texts) / (len(gallery.files) * np.bincount(place))[place]
    sides = (towards_text[place], part), (towards_file, 1.0)
    hits = [
        (ranks <= k) * weight
        for name, (ranks, weight) in zip(gallery.ways, sides, strict=True)
        for k in DEPTHS
        if f"{name}_r{k}" not in decided
    ]
    return np.mean(hits, 0).tolist()


def chance(gallery: Gallery) -> dict[str, Any]:
    """What a random order reaches in the mean: with r of n right, 1 - C(n-r, k) / C(n, k) and (n + 1) / (r + 1)."""
    count, total = np.bincount(gallery.codes), len(gallery.codes)
    right_texts = np.array([count[codes].sum() for codes in gallery.owned])
    holders = np.bincount([code for codes in gallery.owned for code in codes], minlength=len(count))
    right_files = holders[gallery.codes]
    values: dict[str, Any] = {}
    sides = (right_texts, total), (right_files, len(gallery.files))
    for name, (right, n) in zip(gallery.ways, sides, strict=True):
        values |= {f"{name}_r{k}": float(np.mean([hit(int(r), n, k) for r in right])) for k in DEPTHS}
        values[f"{name}_mean_rank"] = float(np.mean([(n + 1) / (r + 1) for r in right]))
    return with_mean(values, gallery.decided())


def hit(right: int, count: int, depth: int) -> float:
    """The chance that ``depth`` draws without return from ``count`` things hold one of the ``right`` ones."""
    miss = 1.0
    for i in range(min(depth, count)):
        miss *= max(0, count - right - i) / (count - i)
    return 1 - miss
