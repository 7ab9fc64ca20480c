"""The linear probe: what a classifier on the very features that are infused can say, without a language model.

Multinomial logistic regression (scikit-learn) on the training images' features, one per prompt; its regularisation is
chosen on val, as everything else is.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

STRENGTHS = tuple(10.0**power for power in (-3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))


def probe_accuracy(
    features: Callable[[Sequence[Any]], Tensor], train: Sequence[Any], val: Sequence[Any], samples: Sequence[Any]
) -> dict[str, Any]:
    """Accuracy on ``samples``.

    ``features`` maps samples to (B, e). A prompt that training asked fewer than two different answers to is answered
    with its commonest training answer, or with nothing.
    """
    hits, chosen = 0, {}
    for prompt in sorted({s.prompt for s in samples}):
        parts = [[s for s in part if s.prompt == prompt] for part in (train, val, samples)]
        answers, strength = answers_for_prompt(features, *parts)
        chosen[prompt] = strength
        hits += sum(a == s.answer for a, s in zip(answers, parts[2], strict=True))
    return {"accuracy": hits / len(samples), "samples": len(samples), "inverse_regularisation": chosen}


def answers_for_prompt(
    features: Any, train: Sequence[Any], val: Sequence[Any], samples: Sequence[Any]
) -> tuple[list[str], float]:
    labels = [s.answer for s in train]
    if len(set(labels)) < 2:
        usual = Counter(labels).most_common(1)[0][0] if labels else ""
        return [usual] * len(samples), 0.0
    x, asked = features(train).numpy(), features(samples).numpy()
    fitted = {strength: fit(x, labels, strength) for strength in STRENGTHS}
    if val:
        seen, truth = features(val).numpy(), np.array([s.answer for s in val])
        strength = max(STRENGTHS, key=lambda c: ((fitted[c].predict(seen) == truth).mean(), -c))
    else:
        strength = 1.0
    return list(fitted[strength].predict(asked)), strength


def fit(x: np.ndarray, labels: Sequence[str], strength: float) -> "LogisticRegression":
    from sklearn.exceptions import ConvergenceWarning  # a second to import, for floors alone
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=500).fit(x, labels)
