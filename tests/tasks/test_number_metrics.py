"""Metrics of numbers against torchmetrics, scikit-learn and what is counted by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, r2_score
from torchmetrics.functional import mean_absolute_error, pearson_corrcoef, spearman_corrcoef

from mitrain.tasks.number_metrics import number_metrics

FULL = (-3.0, 3.0)


def drawn(seed, samples=200):
    random = np.random.default_rng(seed)
    truth = np.round(random.uniform(-3, 3, samples) * 5) / 5  # zeros, halves and ties among them
    return truth, np.round((truth + random.normal(size=samples)) * 10) / 10


@pytest.mark.parametrize("seed", range(3))
def test_error_and_correlations_are_those_of_torchmetrics(seed):
    truth, predicted = drawn(seed)
    found = number_metrics(truth, predicted, (0, 100))
    one, other = torch.from_numpy(predicted), torch.from_numpy(truth)
    expected = {
        "mae": mean_absolute_error(one, other),
        "pearson": pearson_corrcoef(one, other),
        "spearman": spearman_corrcoef(one, other),
    }
    assert {name: found[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()})
    assert found["r2"] == pytest.approx(r2_score(truth, predicted)) and found["samples"] == 200


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_sentiment_are_counted_as_the_papers_count(seed):
    truth, predicted = drawn(seed)
    found = number_metrics(truth, predicted, FULL)
    for classes, most in ((7, 3), (5, 2)):
        kept = [(min(max(t, -most), most), min(max(p, -most), most)) for t, p in zip(truth, predicted, strict=True)]
        assert found[f"acc{classes}"] == sum(round(t) == round(p) for t, p in kept) / 200  # Python rounds halves to even
    signs = [(t >= 0, p >= 0) for t, p in zip(truth, predicted, strict=True)]
    aside = [(t > 0, p > 0) for t, p in zip(truth, predicted, strict=True) if t != 0]
    assert 0 < len(aside) < 200
    for name, pairs in (("non_negative", signs), ("positive", aside)):
        assert found[f"acc2_{name}"] == sum(t == p for t, p in pairs) / len(pairs)
        assert found[f"f1_{name}"] == pytest.approx(f1_score(*zip(*pairs, strict=True), average="weighted"))


def test_halves_go_to_the_even_number_and_what_lies_outside_to_the_border():
    truth, predicted = np.array([0.0, 2.0, 2.0, -3.0, 3.0]), np.array([0.5, 1.5, 2.5, -9.0, 2.4])
    assert number_metrics(truth, predicted, FULL)["acc7"] == 4 / 5
    assert number_metrics(truth, predicted, FULL)["acc5"] == 1.0  # 3 and 2.4 are both 2


def test_zeros_count_as_no_negative_and_are_left_out_of_the_other_convention():
    found = number_metrics(np.array([0.0, 0.0, 1.0, -1.0]), np.array([-0.1, 0.1, 0.0, -2.0]), FULL)
    assert found["acc2_non_negative"] == 3 / 4 and found["acc2_positive"] == 1 / 2


def test_ranges_without_classes_or_signs_have_no_such_score():
    truth, predicted = np.array([0.5, -0.5, 1.0]), np.array([0.0, 0.1, 1.0])
    plain = {"mae", "pearson", "spearman", "r2", "samples"}
    signs = {"acc2_non_negative", "f1_non_negative", "acc2_positive", "f1_positive"}
    assert number_metrics(truth, predicted, FULL).keys() == plain | signs | {"acc7", "acc5"}
    assert number_metrics(truth, predicted, (-1, 1)).keys() == plain | signs  # as SIMS has them
    for scale in ((0, 3), (-4, 4), (-3, 3.5), (-3, 0), (1, 5)):
        assert number_metrics(truth, predicted, scale).keys() == plain


def test_what_is_undefined_is_none():
    truth, same = np.array([0.1, 0.1, 0.1]), np.array([1.0, 2.0, 3.0])
    assert number_metrics(truth, same, (0, 1)) == {
        "mae": pytest.approx(1.9), "pearson": None, "spearman": None, "r2": None, "samples": 3,
    }  # fmt: skip
    found = number_metrics(same, truth, (0, 1))
    assert found["pearson"] is None and found["spearman"] is None and found["r2"] == pytest.approx(1 - 12.83 / 2)
    zeros = number_metrics(np.zeros(2), np.ones(2), FULL)
    assert zeros["acc2_positive"] is None and zeros["f1_positive"] is None and zeros["acc2_non_negative"] == 1.0
