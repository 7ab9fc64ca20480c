"""Scores of captions against several references, as the COCO caption evaluation defines them (Chen et al. 2015).

BLEU-4 (Papineni et al. 2002) of the whole set with the nearest reference's length, ROUGE-L (Lin 2004) with β = 1.2, and
CIDEr-D (Vedantam et al. 2015) with document frequencies from the references. Tests hold them to the reference
implementation's numbers. Its tokenizer, a Java program, is stood in for by `tokens`, which parts everyday English alike.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

ORDERS = (1, 2, 3, 4)
BETA, SIGMA = 1.2, 6.0
WORD = re.compile(r"\d+(?:[.,:/]\d+)+|\w+(?:[-./'@]\w+)*|\.\.+|--+|[^\w\s]")
CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))$")
APART = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me", "lemme": "lem me"}
LEFT_OUT = frozenset("'\"`.?!,:;-–—…“”‘")  # a run of periods or hyphens is left out, too

Tokens = list[str]
Counts = Counter[tuple[str, ...]]


def tokens(text: str) -> Tokens:
    """Words in lower case, as the Penn Treebank parts them: ``n't`` and ``'s`` stand alone, hyphenated words stay whole,
    punctuation is left out; brackets and signs as $ and % are words."""
    found: Tokens = []
    for word in WORD.findall(text.lower().replace("’", "'")):
        parts = APART.get(word) or CONTRACTION.sub(r" \1", word)
        found += [part for part in parts.split() if not set(part) <= LEFT_OUT]
    return found


def caption_metrics(said: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr-D (up to 10), BLEU-4 and ROUGE-L (up to 1) of one caption ``said`` of each image with its references."""
    own, theirs = [tokens(text) for text in said], [[tokens(text) for text in texts] for texts in references]
    return {
        "cider": float(np.mean(ciders(own, theirs))),
        "bleu4": bleu4(own, theirs),
        "rouge_l": float(np.mean([rouge_l(one, several) for one, several in zip(own, theirs, strict=True)])),
    }


def grams(words: Tokens) -> list[Counts]:
    """How often each n-gram stands in ``words``, for every order."""
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in ORDERS]


def bleu4(said: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """exp(min(0, 1 − r / c)) · (Π p_n)^(1/4), p_n the clipped precision of n-grams, c and r the lengths of what is said and
    of each image's reference of the nearest length (the shorter of two)."""
    right, count, length, reference_length = np.zeros(4), np.zeros(4), 0, 0
    for words, several in zip(said, references, strict=True):
        most = [Counter() for _ in ORDERS]
        for reference in several:
            most = [one | other for one, other in zip(most, grams(reference), strict=True)]
        own = grams(words)
        right += [(one & limit).total() for one, limit in zip(own, most, strict=True)]
        count += [one.total() for one in own]
        length += len(words)
        reference_length += min((abs(len(reference) - len(words)), len(reference)) for reference in several)[1]
    precision = math.exp(np.log((right + 1e-15) / (count + 1e-9)).mean())  # as the reference implementation avoids zeros
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    return precision * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)


def rouge_l(words: Tokens, references: Sequence[Tokens]) -> float:
    """(1 + β²) P R / (R + β² P), P and R the greatest shares of the common subsequence among the references."""
    common = [longest_common(words, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(words)
    recall = max(c / len(r) for c, r in zip(common, references, strict=True) if r)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(one: Tokens, other: Tokens) -> int:
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for (upper_left, above), there in zip(pairwise(before), other, strict=True):
            row.append(upper_left + 1 if word == there else max(above, row[-1]))
    return row[-1]


def ciders(said: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """CIDEr-D of each image: ten times the mean over orders and references of the clipped cosine of tf-idf vectors, times
    exp(−d² / 2σ²), d the difference of lengths; idf = log(images / images whose references have the n-gram)."""
    theirs = [[grams(reference) for reference in several] for several in references]
    documents: Counts = Counter()
    for several in theirs:
        documents.update({gram for reference in several for order in reference for gram in order})
    idf = {gram: math.log(len(said) / count) for gram, count in documents.items()}
    unseen = math.log(len(said))
    weigh = lambda orders: [{g: c * idf.get(g, unseen) for g, c in order.items()} for order in orders]  # noqa: E731
    scores = []
    for words, several in zip(said, theirs, strict=True):
        own, others = weigh(grams(words)), [(weigh(reference), reference[1].total()) for reference in several]
        bigrams = max(0, len(words) - 1)  # the reference implementation measures length in bigrams
        near = [closeness(own, other, bigrams - length) for other, length in others]
        scores.append(10 * float(np.mean(near)))
    return scores


def closeness(own: list[dict], other: list[dict], difference: int) -> float:
    """Mean over the orders of Σ min(own, other) · other / (‖own‖ ‖other‖), less where lengths differ."""
    values = []
    for one, two in zip(own, other, strict=True):
        norm = math.hypot(*one.values()) * math.hypot(*two.values())
        values.append(sum(min(v, two[g]) * two[g] for g, v in one.items() if g in two) / norm if norm else 0.0)
    return float(np.mean(values)) * math.exp(-(difference**2) / (2 * SIGMA**2))
