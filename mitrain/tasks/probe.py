"""What scikit-learn makes of the frozen models' vectors: linear probes, ridge regression, nearest neighbours.

A score says something only beside them. What they are regularised by is chosen on val, as everything else is.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from mitrain.tasks.ranks import Gallery, both_ways, rank_metrics

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

RIDGES = (0.1, 1.0, 10.0, 100.0)
LEFT_OUT_RIDGES = tuple(10.0 ** (power / 2) for power in range(-2, 7))
NEIGHBOURS = (1, 3, 5, 10, 20)
STRENGTHS = tuple(10.0**power for power in (-3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))
PATIENCE = 2  # strengths in a row that are worse than one before end the search
Predict = Callable[[np.ndarray], np.ndarray]


def probe_answers(
    features: Callable[[Sequence[Any]], Tensor], train: Sequence[Any], val: Sequence[Any], samples: Sequence[Any]
) -> tuple[dict[str, str], dict[str, float]]:
    """The answers to ``samples`` by their ids, and the inverse regularisation chosen for each prompt.

    ``features`` maps samples to (B, e). A prompt that training asked fewer than two different answers to, or none of those
    that are right on val (as names of objects held out), is answered with its commonest training answer, or with nothing.
    """
    said, chosen = {}, {}
    for prompt in sorted({s.prompt for s in samples}):
        parts = [[s for s in part if s.prompt == prompt] for part in (train, val, samples)]
        answers, strength = answers_for_prompt(features, *parts)
        chosen[prompt] = strength
        said |= {s.id: str(answer) for s, answer in zip(parts[2], answers, strict=True)}
    return said, chosen


def answers_for_prompt(
    features: Any, train: Sequence[Any], val: Sequence[Any], samples: Sequence[Any]
) -> tuple[list[str], float]:
    labels = [s.answer for s in train]
    if len(set(labels)) < 2 or unseen(train, val):  # nothing that could be chosen or right
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


def unseen(train: Sequence[Any], val: Sequence[Any]) -> bool:
    """Whether no answer that is right on val is one of training's."""
    return bool(val) and not {s.answer for s in val} & {s.answer for s in train}


def chosen_by_ridge(
    features: Callable[[Sequence[Any]], Tensor],
    vectors: Callable[[Sequence[str]], np.ndarray],
    offered: Callable[[Any], Sequence[str]],
    train: Sequence[Any],
    val: Sequence[Any],
    samples: Sequence[Any],
) -> dict[str, str]:
    """To each sample of a prompt whose answers are `unseen` by training, by its id, the one ``offered`` whose vector has the
    largest cosine with what a ridge regression makes of the features.

    ``features`` maps samples to (B, e), ``vectors`` texts to (n, D), whose mean over the training answers is taken off. The
    strength is chosen on val. A sample that is offered nothing is left out.
    """
    said = {}
    for prompt in sorted({s.prompt for s in samples}):
        taught, seen, asked = ([s for s in part if s.prompt == prompt] for part in (train, val, samples))
        seen, asked = ([s for s in part if offered(s)] for part in (seen, asked))
        if len({s.answer for s in taught}) < 2 or not unseen(taught, seen) or not asked:
            continue
        texts = sorted({s.answer for s in taught} | {text for s in [*seen, *asked] for text in offered(s)})
        vector_of = dict(zip(texts, vectors(texts), strict=True))
        y = np.stack([vector_of[s.answer] for s in taught])
        unit_of = {text: unit((vector - y.mean(0))[None])[0] for text, vector in vector_of.items()}
        (x, *later), fits = [features(part).numpy() for part in (taught, seen, asked)], []
        for strength in RIDGES:
            predict = ridge_fit(x, y - y.mean(0), strength)
            pairs = zip(later, (seen, asked), strict=True)
            answers = [nearest(predict(found), part, offered, unit_of) for found, part in pairs]
            fits.append((np.mean([a == s.answer for a, s in zip(answers[0], seen, strict=True)]), answers[1]))
        best = max(fits, key=lambda pair: pair[0])[1]
        said |= {s.id: answer for s, answer in zip(asked, best, strict=True)}
    return said


def nearest(
    predicted: np.ndarray, samples: Sequence[Any], offered: Callable[[Any], Sequence[str]], unit_of: Mapping[str, np.ndarray]
) -> list[str]:
    """Of each sample the text offered with the largest cosine with what is ``predicted`` (n, D)."""
    pairs = zip(predicted, map(offered, samples), strict=True)
    return [texts[int(np.argmax(np.stack([unit_of[text] for text in texts]) @ wanted))] for wanted, texts in pairs]


def fit(
    x: np.ndarray, labels: Sequence[Any], strength: float, before: "LogisticRegression | None" = None
) -> "LogisticRegression":
    """A logistic regression, which goes on ``before`` where there is one."""
    from sklearn.exceptions import ConvergenceWarning  # a second to import, for baselines alone
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = before or LogisticRegression(max_iter=500, warm_start=True)
        return model.set_params(C=strength).fit(x, labels)


def ridge_fit(x: np.ndarray, y: np.ndarray, strength: float) -> Predict:
    """The prediction of a ridge regression from ``x`` (n, e) to ``y`` (n, D) or (n,)."""
    from sklearn.linear_model import Ridge

    return Ridge(alpha=strength).fit(x, y).predict


def leading(x: np.ndarray, y: np.ndarray, groups: Sequence[str], most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight (D, e) and bias (D,) of the ridge regression from ``x`` (n, e) to ``y`` (n, D), of the strength that is best
    for ``groups`` left out, and at most ``most`` orthonormal directions (m, D) in which its predictions differ most."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, GroupKFold

    found, folds = Ridge(), min(5, len(set(groups)))
    if folds > 1:
        grid = {"alpha": LEFT_OUT_RIDGES}
        search = GridSearchCV(found, grid, cv=GroupKFold(folds), scoring="neg_mean_squared_error")
        found = search.fit(x, y, groups=groups).best_estimator_
    said = found.fit(x, y).predict(x)
    if most >= y.shape[1]:
        return found.coef_, found.intercept_, np.eye(y.shape[1])
    spread = (said - said.mean(0)).T @ (said - said.mean(0))
    return found.coef_, found.intercept_, np.linalg.eigh(spread)[1].T[: -most - 1 : -1].copy()


def neighbours_fit(x: np.ndarray, y: np.ndarray, count: int) -> Predict:
    """The mean ``y`` (n, D) or (n,) of the ``count`` rows of ``x`` (n, e) with the largest cosine."""
    from sklearn.neighbors import KNeighborsRegressor

    return KNeighborsRegressor(min(count, len(x)), metric="cosine").fit(x, y).predict


def retrieved(
    features: Sequence[np.ndarray], states: Sequence[np.ndarray], galleries: Sequence[Gallery]
) -> dict[str, dict[str, Any]]:
    """Retrieval metrics of the last part by a ridge regression and by nearest neighbours, each chosen on the second part.

    The parts are the training, validation and asked samples; features (n, e), states (n, D).
    """
    fits = {"ridge regression": (ridge_fit, RIDGES), "nearest neighbours": (neighbours_fit, NEIGHBOURS)}
    later = features[1:], states[1:], galleries[1:]
    return {
        name: _best_ranks([fit(features[0], states[0], choice) for choice in choices], *later)
        for name, (fit, choices) in fits.items()
    }


def _best_ranks(fitted: Sequence[Predict], *parts: Sequence[Any]) -> dict[str, Any]:
    best = None
    for predict in fitted:
        val, ranks = (
            rank_metrics(*both_ways(gallery, unit(predict(x[gallery.first])), unit(y)), gallery.decided(), gallery.ways)
            for x, y, gallery in zip(*parts, strict=True)
        )
        if best is None or val["recall_mean"] > best[0]:
            best = (val["recall_mean"], ranks)
    return best[1]


def probe_numbers(features: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> np.ndarray:
    """(samples,) numbers of the ridge regression that is nearest to validation's targets.

    The features are of the training, validation and asked samples, the targets of the first two.
    """
    return _nearest(features, targets, {c: partial(ridge_fit, strength=c) for c in RIDGES}, 1.0, power=1)


def probe_neighbours(features: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> np.ndarray:
    """(samples, …) means of the nearest training samples' targets, of so many that the squared error on validation is least.

    Targets are (n,) numbers or (n, C) bool, of which the means are probabilities.
    """
    fits = {count: partial(neighbours_fit, count=count) for count in NEIGHBOURS}
    return _nearest(features, [part.astype(float) for part in targets], fits, 5, power=2)


def _nearest(
    features: Sequence[np.ndarray], targets: Sequence[np.ndarray], fits: Mapping[float, Any], usual: float, power: int
) -> np.ndarray:
    """What the best of ``fits`` on validation says, the ``usual`` one where there is none."""
    train, val, asked = features
    if not len(val):
        return fits[usual](train, targets[0])(asked)
    fitted = [fit(train, targets[0]) for fit in fits.values()]
    return min(fitted, key=lambda predict: (np.abs(predict(val) - targets[1]) ** power).mean())(asked)


def standardised(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Rows (n, e) of several parts, each column of mean 0 and variance 1 over the first; 0 where it is constant there."""
    mean, std = parts[0].mean(0), parts[0].std(0)
    return [(part - mean) / np.where(std > 1e-6, std, np.inf) for part in parts]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)


def probe_labels(features: Sequence[np.ndarray], truths: Sequence[np.ndarray], multilabel: bool) -> np.ndarray:
    """(samples, C) probabilities of a multinomial logistic regression, or of one for each class where labels are several.

    The regularisation with the least cross-entropy over the classes on validation is taken; weaker ones are tried until
    `PATIENCE` in a row are worse. A class that all or no training samples have keeps its share.
    """
    train, val, asked = features
    chances = chances_of_each if multilabel else chances_of_one
    best, chosen, worse = np.inf, 1.0, 0
    seen = (seen for (seen,) in chances(train, truths[0], STRENGTHS, (val,))) if len(val) else ()
    for strength, guess in zip(STRENGTHS, seen, strict=False):
        loss = cross_entropy(guess, truths[1])
        if loss < best:
            best, chosen, worse = loss, strength, 0
        elif (worse := worse + 1) == PATIENCE:
            break
    return next(chances(train, truths[0], (chosen,), (asked,)))[0]  # anew: a fit that went on from another is not the same


def cross_entropy(chances: np.ndarray, truth: np.ndarray) -> float:
    seen = np.clip(chances, 1e-7, 1 - 1e-7)
    return float(-np.where(truth, np.log(seen), np.log1p(-seen)).mean())


Tables = Iterator[list[np.ndarray]]


def chances_of_one(x: np.ndarray, truth: np.ndarray, strengths: Sequence[float], asked: Sequence[np.ndarray]) -> Tables:
    """Of each of the rising ``strengths`` a table for each of ``asked``; a fit goes on from the one before."""
    labels = truth.argmax(1)
    if len(set(labels)) < 2:
        yield [np.tile(truth[:1].astype(float), (len(rows), 1)) for rows in asked]
        return
    model = None
    for strength in strengths:
        model = fit(x, labels, strength, model)
        tables = [np.zeros((len(rows), truth.shape[1])) for rows in asked]
        for chances, rows in zip(tables, asked, strict=True):
            if len(rows):
                chances[:, model.classes_] = model.predict_proba(rows)
        yield tables


def chances_of_each(x: np.ndarray, truth: np.ndarray, strengths: Sequence[float], asked: Sequence[np.ndarray]) -> Tables:
    """As `chances_of_one`, by a regression for each class."""
    models: dict[int, LogisticRegression] = {}
    for strength in strengths:
        tables = [np.tile(truth.mean(0), (len(rows), 1)) for rows in asked]
        for c in np.flatnonzero(truth.any(0) & ~truth.all(0)):
            models[c] = fit(x, truth[:, c], strength, models.get(c))
            for chances, rows in zip(tables, asked, strict=True):
                if len(rows):
                    chances[:, c] = models[c].predict_proba(rows)[:, 1]
        yield tables
