"""Metrics of classification, from scikit-learn.

Shapes: N samples, C classes.
"""

import warnings
from typing import Any

import numpy as np

AVERAGES = ("micro", "macro", "weighted")


def label_metrics(truth: np.ndarray, chances: np.ndarray, multilabel: bool, threshold: float = 0.5) -> dict[str, Any]:
    """Accuracy, F1, unweighted average recall and AUROC as fractions of 1.

    One label: accuracy, and F1 of the most probable class (micro F1 is the accuracy). Several: a class is predicted
    where its probability is ``threshold`` or more; accuracy is that of whole label sets. ``uar`` is the mean recall of the
    classes that some samples have (of one label: the balanced accuracy), left out where there is none. ``auroc`` is
    the mean over the ``auroc_classes`` classes that some samples have and others lack, and left out where there is none.
    Classes that neither the truth nor a prediction has are no part of an average. Probabilities that are not finite score
    NaN. ``truth`` (N, C) bool has one true class in a row where ``multilabel`` is false.
    """
    from sklearn.metrics import accuracy_score  # a second to import

    counts = {"samples": len(truth), "majority": float(truth.mean(0).max())}
    if not np.isfinite(chances).all():
        return dict.fromkeys(("accuracy", "f1_micro", "f1_macro"), float("nan")) | counts
    if multilabel:
        predicted, true = chances >= threshold, truth
    else:
        predicted, true = chances.argmax(1), truth.argmax(1)
    values = {"accuracy": float(accuracy_score(true, predicted)), **f1_scores(true, predicted, multilabel)}
    return values | unweighted_recall(truth, true, predicted) | areas(truth, chances) | counts


def f1_scores(truth: np.ndarray, predicted: np.ndarray, multilabel: bool) -> dict[str, float]:
    from sklearn.exceptions import UndefinedMetricWarning
    from sklearn.metrics import f1_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        averages = (*AVERAGES, "samples") if multilabel else AVERAGES
        values = {f"f1_{a}": float(f1_score(truth, predicted, average=a, zero_division=np.nan)) for a in averages}
    return {name: value if np.isfinite(value) else 0.0 for name, value in values.items()}


def unweighted_recall(truth: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """``truth`` (N, C) says which classes there are; the others are as scikit-learn takes them."""
    from sklearn.metrics import recall_score

    there = np.flatnonzero(truth.any(0))
    return {"uar": float(recall_score(true, predicted, labels=there, average="macro"))} if len(there) else {}


def areas(truth: np.ndarray, chances: np.ndarray) -> dict[str, float | int]:
    """Mean area under the ROC curve of one class against the rest."""
    from sklearn.metrics import roc_auc_score

    defined = np.flatnonzero(truth.any(0) & ~truth.all(0))
    if not len(defined):
        return {}
    values = [float(roc_auc_score(truth[:, c], chances[:, c])) for c in defined]
    return {"auroc": float(np.mean(values)), "auroc_classes": len(defined)}
