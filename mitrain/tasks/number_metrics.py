"""Metrics of predicted numbers, and those of sentiment as the papers on CMU-MOSI and MOSEI define them.

Shapes: N samples.
"""

from typing import Any

import numpy as np

STRONGEST = 3.0  # of a sentiment, either way


def number_metrics(truth: np.ndarray, predicted: np.ndarray, scale: tuple[float, float]) -> dict[str, Any]:
    """Mean absolute error, Pearson's and Spearman's correlation, R², and the scores of sentiment where they mean something.

    A correlation with what is constant, and R² of equal truths, are undefined: None. ``scale``: the least and the
    greatest target of training. From −3 to 3, with numbers on either side of zero, `sign_scores` are added; with −2 and 2
    reached, `class_scores`.
    """
    error, spread = predicted - truth, truth - truth.mean()
    values = {
        "mae": float(np.abs(error).mean()),
        "pearson": pearson(truth, predicted),
        "spearman": pearson(ranks(truth), ranks(predicted)),
        "r2": float(1 - (error**2).sum() / (spread**2).sum()) if np.ptp(truth) else None,
    }
    low, high = scale
    if -STRONGEST <= low < 0 < high <= STRONGEST:
        values |= sign_scores(truth, predicted)
        if low <= -2 and high >= 2:
            values |= class_scores(truth, predicted)
    return values | {"samples": len(truth)}


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else None


def ranks(x: np.ndarray) -> np.ndarray:
    """(N,): the place of each number; equal ones share the mean of theirs."""
    _, places, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def class_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """acc-7 and acc-5: the share of samples whose truth and prediction, clipped to [−3, 3] or [−2, 2], round to the same
    whole number, halves to the even one.

    So in the evaluation of MulT (Tsai et al. 2019, arXiv:1906.00295, after Zadeh et al. 2018) and of MMSA
    (Mao et al. 2022, arXiv:2203.12441).
    """
    shares = {}
    for classes, most in ((7, 3), (5, 2)):
        one, other = (np.round(np.clip(x, -most, most)) for x in (truth, predicted))
        shares[f"acc{classes}"] = float((one == other).mean())
    return shares


def sign_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float | None]:
    """acc-2 and F1 in both conventions of MMSA: ``non_negative``, ≥ 0 against < 0 over all samples (Zadeh et al. 2018);
    ``positive``, > 0 against ≤ 0 over the samples whose truth is not zero (Tsai et al. 2019), None where there is none.

    F1 is the mean of both classes', weighted by how many samples have them in truth.
    """
    from sklearn.metrics import f1_score  # a second to import

    aside = truth != 0
    sides = {"non_negative": (truth >= 0, predicted >= 0), "positive": (truth[aside] > 0, predicted[aside] > 0)}
    values: dict[str, float | None] = {}
    for name, (one, other) in sides.items():
        values[f"acc2_{name}"] = float((one == other).mean()) if len(one) else None
        f1 = f1_score(one, other, average="weighted", zero_division=0.0) if len(one) else None
        values[f"f1_{name}"] = f1 if f1 is None else float(f1)
    return values
