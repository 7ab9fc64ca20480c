"""How right predictions are class by class, and which classes they take for which.

Shapes: N samples, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_CLASSES = 200  # of a confusion matrix
MOST_DIFFERENT = 50  # different ones that are read as classes


def per_class(names: Sequence[str], truth: np.ndarray, predicted: np.ndarray) -> dict[str, dict[str, Any]]:
    """Precision, recall, F1 and ``support`` (samples that have it) of each class that the truth or a prediction has.

    None where one is undefined: the precision of a class never predicted, the recall of one that no sample has.
    """
    both, asked, said = (truth & predicted).sum(0), truth.sum(0), predicted.sum(0)
    return {
        names[c]: {
            "precision": share(both[c], said[c]),
            "recall": share(both[c], asked[c]),
            "f1": share(2 * both[c], asked[c] + said[c]),
            "support": int(asked[c]),
        }
        for c in np.flatnonzero(asked + said)
    }


def share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def confusion(names: Sequence[str], truth: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """``counts[i][j]``: samples of class i that are taken for class j, of the classes that occur. One-hot (N, C) bool."""
    there = np.flatnonzero(truth.any(0) | predicted.any(0))
    counts = truth[:, there].T.astype(int) @ predicted[:, there].astype(int)
    return {"classes": [names[c] for c in there], "counts": counts.tolist()}


def of_labels(names: Sequence[str], truth: np.ndarray, predicted: np.ndarray, one: bool) -> dict[str, Any]:
    """Both; the confusion where a sample has ``one`` class, and there are not too many."""
    found = {"per_class": per_class(names, truth, predicted)}
    small = len(found["per_class"]) <= MOST_CLASSES
    return found | ({"confusion": confusion(names, truth, predicted)} if one and small else {})


def of_answers(truth: Sequence[str], said: Sequence[str]) -> dict[str, Any]:
    """The same of answers as classes; nothing where there are too many different ones to be some."""
    names = sorted({*truth, *said})
    if len(names) > MOST_DIFFERENT:
        return {}
    number = {name: i for i, name in enumerate(names)}
    one_hot = np.eye(len(names), dtype=bool)
    return of_labels(names, *(one_hot[[number[text] for text in part]] for part in (truth, said)), one=True)
