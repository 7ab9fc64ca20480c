"""Ranks, masks and labels against torchmetrics, where both count alike: no ties, no sample whose masks are both empty,
no class that nobody has."""

import itertools

import numpy as np
import pytest
import torch
from torchmetrics.classification import BinaryF1Score, BinaryJaccardIndex, MulticlassF1Score, MulticlassRecall
from torchmetrics.retrieval import RetrievalHitRate

from mitrain.tasks.label_metrics import label_metrics
from mitrain.tasks.masks import MaskMetrics
from mitrain.tasks.ranks import DEPTHS, Gallery, both_ways, chance, hit, rank_metrics


def hit_rate(scores, right, depth):
    """``scores`` and ``right`` (queries, things)."""
    rows = torch.arange(len(scores)).repeat_interleave(scores.shape[1])
    return float(RetrievalHitRate(top_k=depth)(torch.tensor(scores).flatten(), torch.tensor(right).flatten(), indexes=rows))


@pytest.mark.parametrize("seed", range(6))
def test_recall_both_ways(seed):
    """Images have one to five captions, and some captions stand under several images."""
    rng = np.random.default_rng(seed)
    images = [f"{i}" for i in range(23) for _ in range(rng.integers(1, 6))]
    texts = [f"text {rng.integers(0, 40)}" for _ in images]
    pairs, vectors = set(zip(images, texts, strict=True)), {text: rng.normal(size=8) for text in texts}
    gallery = Gallery(images, texts)
    pictures, said = rng.normal(size=(23, 8)), np.stack([vectors[text] for text in texts])
    right = np.array([[(image, text) in pairs for text in texts] for image in gallery.files])
    own = rank_metrics(*both_ways(gallery, pictures, said))
    for depth in DEPTHS:
        assert own[f"i2t_r{depth}"] == pytest.approx(hit_rate(pictures @ said.T, right, depth), abs=1e-6)
        assert own[f"t2i_r{depth}"] == pytest.approx(hit_rate(said @ pictures.T, right.T, depth), abs=1e-6)


def test_what_chance_finds_is_counted_over_all_draws():
    for count in range(1, 7):
        for right in range(1, count + 1):
            for depth in range(1, 9):
                draws = list(itertools.combinations(range(count), min(depth, count)))
                assert hit(right, count, depth) == pytest.approx(np.mean([min(d) < right for d in draws]), abs=1e-12)


def test_chance_by_hand():
    """Twelve pictures, of which two share one of the eleven texts: twelve captions to find, each of them right for one
    picture or for two."""
    found = chance(Gallery([f"{i}" for i in range(12)], ["x", "x", *(f"t{i}" for i in range(10))]))
    for way in ("i2t", "t2i"):
        for depth in DEPTHS:
            two = 1 - (12 - depth) * (11 - depth) / (12 * 11)
            assert found[f"{way}_r{depth}"] == pytest.approx((10 * depth / 12 + 2 * two) / 12)
        assert found[f"{way}_mean_rank"] == pytest.approx((10 * 13 / 2 + 2 * 13 / 3) / 12)
    assert found["recall_mean"] == pytest.approx(np.mean([found[f"i2t_r{depth}"] for depth in DEPTHS]))
    assert set(found) == {f"{w}_{m}" for w in ("i2t", "t2i") for m in ("r1", "r5", "r10", "mean_rank")} | {"recall_mean"}


@pytest.mark.parametrize("seed", range(4))
def test_masks(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(5, 40, size=(9, 2))
    truths = [rng.random(tuple(size)) < 0.4 for size in sizes]
    masks = [truth ^ (rng.random(truth.shape) < 0.2 * rng.random()) for truth in truths]
    own = MaskMetrics()
    own.update(masks, truths)
    values, pairs = own.compute(), [(torch.tensor(m), torch.tensor(t)) for m, t in zip(masks, truths, strict=True)]
    overall, each = BinaryJaccardIndex(), [float(BinaryJaccardIndex()(m.int(), t.int())) for m, t in pairs]
    for mask, truth in pairs:
        overall.update(mask.int().flatten(), truth.int().flatten())
    assert values["oiou"] == pytest.approx(float(overall.compute()), abs=1e-6)
    assert values["miou"] == pytest.approx(np.mean(each), abs=1e-6)
    assert values["dice"] == pytest.approx(np.mean([float(BinaryF1Score()(m.int(), t.int())) for m, t in pairs]), abs=1e-6)
    for threshold, share in values["precision"].items():
        assert share == np.mean(np.round(each, 5) >= float(threshold))


@pytest.mark.parametrize("seed", range(3))
def test_labels(seed):
    rng = np.random.default_rng(seed)
    labels, chances = np.concatenate([np.arange(5), rng.integers(0, 3, 40)]), rng.dirichlet(np.ones(5), 45)
    own = label_metrics(np.eye(5)[labels] > 0, chances, multilabel=False)
    for name, metric in (
        ("uar", MulticlassRecall(5, average="macro")),
        ("f1_weighted", MulticlassF1Score(5, average="weighted")),
        ("f1_macro", MulticlassF1Score(5, average="macro")),
    ):
        assert own[name] == pytest.approx(float(metric(torch.tensor(chances), torch.tensor(labels))), abs=1e-6)
