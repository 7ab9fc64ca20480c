"""The task classify: its loss and scores against a computation by hand."""

import math
import sys

import numpy as np
import pytest
import torch
from answers import parts_of
from modalities import pictures
from PIL import Image
from torch.nn import functional as F

from mitrain.core.errors import ConfigError, DataError
from mitrain.core.user_code import TRUSTED
from mitrain.data.formats.labels import LabelSample
from mitrain.tasks import probe
from mitrain.tasks.base import Batch, Prediction, Splits
from mitrain.tasks.classify import ClassifyConfig, ClassifyTask, class_weights
from mitrain.tasks.label_metrics import label_metrics
from mitrain.tasks.probe import probe_labels, probe_neighbours

CLASSES = ("red", "green", "blue")
FEATURES = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def make(folder, cache=None, multilabel=False, classes=CLASSES, **config):
    parts = parts_of(folder, cache)
    torch.manual_seed(0)
    return ClassifyTask(ClassifyConfig(**config), parts, classes, multilabel, {"image": 6}).eval()


def samples(multilabel=False):
    texts = ["the colour of this picture is", "this thing", "a red square"]
    labels = [("red", "blue"), (), ("green",)] if multilabel else [("red",), ("blue",), ("green",)]
    return [
        LabelSample(str(i), {"image": f"{i}.png"}, t, names, "o")
        for i, (t, names) in enumerate(zip(texts, labels, strict=True))
    ]


def batch(multilabel=False, features=FEATURES):
    return Batch(samples(multilabel), pictures(FEATURES if features is None else features, infused=features is not None))


def test_probabilities_that_are_no_numbers_are_reported(folder):
    task = make(folder)
    features = FEATURES.clone()
    features[1, 0] = torch.inf
    assert [p.finite for p in task.predict(batch(features=features))] == [True, False, True]


def by_hand(task, sample, feature, readout):
    """What the head reads, one sample at a time, from the model's bottom."""
    text = task.parts.text
    ids = torch.tensor([text.tokens(sample.text)])
    with task.parts.adapter.bind({"image": feature}):
        hidden = text.model.base_model(input_ids=ids).last_hidden_state[0]
    parts = {"last": hidden[-1], "mean": hidden.mean(0), "embeddings": text.embeddings(ids)[0].mean(0)}
    parts["image"] = feature[0]
    return (torch.cat([parts[name] for name in readout]) - task.mean) * task.scale


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("readout", [("last",), ("mean", "embeddings", "image"), ("image",)])
def test_the_loss_is_the_cross_entropy_of_the_heads_logits(folder, tmp_path, cached, readout):
    task = make(folder, tmp_path if cached else None, readout=readout)
    task.parts.states.prepare(task.texts(samples(), False))
    task.fit(samples())
    total, count = task.loss(batch())
    logits = torch.stack([task.head(by_hand(task, s, FEATURES[i : i + 1], readout)) for i, s in enumerate(samples())])
    expected = F.cross_entropy(logits, torch.tensor([0, 2, 1]), reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    assert float(count) == 3
    total.backward()
    infused = task.parts.adapter.infusions[0].head_logit.grad
    assert (infused is None) == (readout == ("image",)) and task.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_loss_of_ones_own_has_the_logits_and_a_row_of_targets_for_each_sample(folder, monkeypatch, tmp_path, multilabel):
    (tmp_path / "own_ce.py").write_text("def half(outputs, targets):\n    return 0.5 * (outputs * targets).sum(), 7\n")
    monkeypatch.setenv(TRUSTED, str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_ce", raising=False)
    task = make(folder, multilabel=multilabel, loss="own_ce:half")
    total, count = task.loss(batch(multilabel))
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]] if multilabel else [[1.0, 0, 0], [0, 0, 1], [0, 1, 0]])
    torch.testing.assert_close(total, 0.5 * (task.logits(batch(multilabel)) * targets).sum())
    assert count.item() == 7 and count.dtype == torch.float64
    with pytest.raises(ValueError, match="leave one of them out"):
        ClassifyConfig(loss="own_ce:half", balance=True)


def test_an_mlp_in_the_heads_place_is_a_formula_by_hand(folder):
    task = make(folder, readout=("last", "image"), hidden=4)
    x = task.states([s.text for s in samples()], batch().inputs)
    first, _, last = task.head
    expected = F.linear(F.gelu(F.linear(x, first.weight, first.bias)), last.weight, last.bias)
    torch.testing.assert_close(task.logits(batch()), expected)
    width = x.shape[1]
    assert sum(p.numel() for p in task.head.parameters()) == width * 4 + 4 + 4 * 3 + 3


def test_several_labels_are_binary_cross_entropies(folder):
    task = make(folder, multilabel=True, balance=True)
    task.fit(samples(True))
    assert task.weight.tolist() == [2.0, 2.0, 2.0]  # each class: one of three has it
    with torch.no_grad():
        total, count = task.loss(batch(True))
        chances = task.logits(batch(True)).double().sigmoid()
    truth = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    expected = -(2 * truth * chances.log() + (1 - truth) * (1 - chances).log()).sum()
    assert float(total) == pytest.approx(float(expected), rel=1e-5) and float(count) == 9


def test_balanced_classes_weigh_the_same():
    targets = F.one_hot(torch.tensor([0, 0, 0, 1])).float()
    targets = torch.cat([targets, torch.zeros(4, 1)], 1)  # a class that training has not
    weights = class_weights(targets, multilabel=False)
    assert weights.tolist() == pytest.approx([4 / 6, 2.0, 1.0])
    assert (targets @ weights).mean() == pytest.approx(1.0)  # a class's samples weigh the same together: 3 · 2/3 = 2
    assert class_weights(targets, multilabel=True).tolist() == pytest.approx([1 / 3, 3.0, 1.0])


def test_the_statistics_are_those_of_the_frozen_states(folder):
    task = make(folder, readout=("last", "image"))
    task.fit(samples())
    with torch.no_grad():
        states = task.states([s.text for s in samples()], pictures(torch.zeros(3, 6), infused=False))
    assert states[:, :32].mean(0).abs().max() < 1e-5
    torch.testing.assert_close(states[:, :32].std(0, correction=0), torch.ones(32), rtol=1e-4, atol=1e-4)
    assert task.scale[32:].tolist() == [1.0] * 6 and task.mean[32:].tolist() == [0.0] * 6


@pytest.mark.parametrize("multilabel", [False, True])
def test_predictions_and_their_lines(folder, multilabel):
    task = make(folder, multilabel=multilabel, threshold=0.4)
    found = task.predict(batch(multilabel))
    with torch.no_grad():
        logits = task.logits(batch(multilabel))
    chances = logits.sigmoid() if multilabel else logits.softmax(-1)
    for row, prediction, sample in zip(chances.tolist(), found, samples(multilabel), strict=True):
        ranked = sorted(zip(row, CLASSES, strict=True), reverse=True)
        expected = [name for p, name in ranked if p >= 0.4] if multilabel else [ranked[0][1]]
        assert prediction.values["predicted"] == expected
        assert prediction.values["correct"] == (set(expected) == set(sample.labels))
        shown = task.panel(sample, prediction, Image.new("RGB", (4, 4)))
        lines, right = shown.lines, shown.right
        assert right == prediction.values["correct"] and sample.text in lines


def test_the_image_matters_through_the_infusion_alone(folder):
    task = make(folder)
    with torch.no_grad():
        own, other, blind = (task.logits(batch(features=f)) for f in (FEATURES, FEATURES.flip(0), None))
        task.parts.adapter.detach()
        rows = task.parts.text.pad([task.parts.text.tokens(s.text) for s in samples()])
        hidden = task.parts.text.hidden(*rows)[torch.arange(3), rows[1].sum(1) - 1]
        frozen = task.head((hidden - task.mean) * task.scale)
    assert not torch.allclose(own, other, atol=1e-4) and not torch.allclose(own, blind, atol=1e-4)
    torch.testing.assert_close(blind, frozen, rtol=1e-4, atol=1e-5)


def test_long_texts_lose_their_end_and_the_template_nothing(folder):
    task = make(folder, template="{text} colour is", max_tokens=5)
    tokens = task.parts.text.tokens
    assert task.texts([LabelSample("0", {"image": "0"}, "red green blue yellow square", ())], False) == [
        tokens("red green blue colour is")
    ]
    assert task.tokens([LabelSample("0", {"image": "0"}, "red", ())]) == 3
    empty = make(folder).texts([LabelSample("0", {"image": "0"}, "", ())], False)
    assert empty == [[task.parts.text.tokenizer.eos_token_id]]


def test_what_does_not_fit_is_refused_in_one_line(folder):
    with pytest.raises(ConfigError, match="two or more different names"):
        make(folder, classes=("a", "a"))
    with pytest.raises(DataError, match="'pink', which training did not know"):
        make(folder).targets([LabelSample("0", {"image": "0.png"}, "", ("pink",))])


# metrics


def onehot(labels, classes):
    return np.eye(classes)[labels] > 0


def test_metrics_of_one_label_by_hand():
    truth = onehot([0, 0, 0, 1, 2], 4)  # the fourth class: nowhere
    chances = np.array([[0.9, 0.1, 0, 0], [0.6, 0.3, 0.1, 0], [0.2, 0.7, 0.1, 0], [0.1, 0.8, 0.1, 0], [0.5, 0.1, 0.4, 0]])
    found = label_metrics(truth, chances, multilabel=False)
    assert found["accuracy"] == pytest.approx(3 / 5) == found["f1_micro"] and found["majority"] == pytest.approx(3 / 5)
    f1 = [2 * 2 / (3 + 3), 2 * 1 / (2 + 1), 0.0]  # 2 tp / (predicted + true)
    assert found["f1_macro"] == pytest.approx(sum(f1) / 3)
    assert found["f1_weighted"] == pytest.approx((3 * f1[0] + f1[1] + f1[2]) / 5)
    assert found["uar"] == pytest.approx((2 / 3 + 1 + 0) / 3)  # of the three classes that there are
    # pairs in which the class's sample is above the other: 5 of 6, 4 of 4, 4 of 4
    assert found["auroc"] == pytest.approx((5 / 6 + 1 + 1) / 3) and found["auroc_classes"] == 3


def test_metrics_of_several_labels_by_hand():
    truth = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]], bool)
    chances = np.array([[0.5, 0.2, 0.6], [0.1, 0.9, 0.1], [0.1, 0.1, 0.1]])
    found = label_metrics(truth, chances, multilabel=True)
    assert found["accuracy"] == pytest.approx(2 / 3)  # the whole set of labels
    assert found["f1_micro"] == pytest.approx(2 * 2 / (3 + 3))
    assert found["f1_macro"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["f1_weighted"] == pytest.approx((1 * 1 + 2 * 2 / 3) / 3)
    assert found["f1_samples"] == pytest.approx((2 / 4 + 1) / 2)  # the third sample has no label and none predicted
    assert found["uar"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["auroc_classes"] == 2  # the third class is nowhere true


def test_metrics_at_the_edges():
    truth = onehot([0, 0], 2)
    found = label_metrics(truth, np.array([[0.9, 0.1], [0.8, 0.2]]), multilabel=False)
    assert found["accuracy"] == 1.0 and "auroc" not in found
    nothing = label_metrics(truth, np.zeros((2, 2)), multilabel=True)
    assert nothing["f1_micro"] == 0.0
    broken = label_metrics(truth, np.full((2, 2), np.nan), multilabel=False)
    scored = ("accuracy", "f1_micro", "f1_macro")
    assert broken.keys() == {*scored, "samples", "majority"} and broken["samples"] == 2 and broken["majority"] == 1
    assert all(math.isnan(broken[name]) for name in scored)
    nobody = label_metrics(np.zeros((2, 2), bool), np.zeros((2, 2)), multilabel=True)
    assert "uar" not in nobody
    assert [nobody[f"f1_{name}"] for name in ("micro", "macro", "weighted", "samples")] == [0.0] * 4


def test_scores_do_not_depend_on_the_order_in_which_ranks_predicted(folder):
    task = make(folder)
    predictions = task.predict(batch())
    whole = task.score(samples(), predictions)
    alone = [task.predict(Batch([s], pictures(FEATURES[i : i + 1])))[0] for i, s in enumerate(samples())]
    assert whole == pytest.approx(task.score(samples(), alone)) and isinstance(predictions[0], Prediction)


@pytest.mark.parametrize("multilabel", [False, True])
def test_the_probe_of_labels_learns_separable_features(multilabel):
    random = np.random.default_rng(0)
    codes = random.integers(0, 2, (90, 2)) if multilabel else np.eye(2, dtype=int)[random.integers(0, 2, 90)]
    truth = np.concatenate([codes, np.zeros((90, 1), int)], 1) > 0  # a class that nobody has
    features = truth[:, :2] + 0.1 * random.normal(size=(90, 2))
    parts = [features[:40], features[40:60], features[60:]]
    found = probe_labels(parts, [truth[:40], truth[40:60]], multilabel)
    metrics = label_metrics(truth[60:], found, multilabel)
    assert metrics["accuracy"] == 1.0 and found[:, 2].max() == 0
    assert probe_labels([parts[0], parts[1][:0], parts[2]], [truth[:40], truth[:0]], multilabel).shape == (30, 3)


@pytest.mark.parametrize("multilabel", [False, True])
def test_the_probe_says_what_that_of_all_strengths_says_and_leaves_those_far_above_the_best(multilabel, monkeypatch):
    random = np.random.default_rng(3)
    features = random.normal(size=(150, 20)).astype("f4")
    truth = np.eye(3)[(features[:, :3] + 3 * random.normal(size=(150, 3))).argmax(1)] > 0
    parts, truths = [features[:60], features[60:110], features[110:]], [truth[:60], truth[60:110]]
    chances = probe.chances_of_each if multilabel else probe.chances_of_one
    each = {c: next(chances(parts[0], truths[0], (c,), parts[1:])) for c in probe.STRENGTHS}
    best = min(each, key=lambda c: probe.cross_entropy(each[c][0], truths[1]))
    tried, fit = [], probe.fit
    monkeypatch.setattr(probe, "fit", lambda x, y, c, *a: tried.append(c) or fit(x, y, c, *a))
    assert np.array_equal(probe_labels(parts, truths, multilabel), each[best][1])
    rising = list(dict.fromkeys(tried))
    assert rising == list(probe.STRENGTHS[: probe.STRENGTHS.index(best) + 3]) != list(probe.STRENGTHS)


def test_baselines_read_the_features_the_frozen_text_and_both(folder):
    """Four texts and four pictures of which each alone says half of the label, and the two together all of it."""
    task, rows = make(folder, classes=("00", "01", "10", "11"), readout=["last"]), []
    texts = {"0": "a red square", "1": "this thing is blue"}
    for number in range(32):
        one, other = format(number % 4, "02b")
        rows.append(LabelSample(f"{number}", {"image": f"{other}.png"}, texts[one], (one + other,), "o"))
    see = lambda part: torch.stack([FEATURES[int(s.inputs["image"][0])] for s in part])  # noqa: E731
    found = task.baselines(Splits(rows, lambda: (rows, rows), lambda: rows, see, 0))
    assert {name: value["accuracy"] for name, value in found.items()} == {
        "majority label": 0.25, "linear probe on the same features": 0.5, "linear probe on the frozen text states": 0.5,
        "linear probe on text and features together": 1.0, "nearest neighbours on the same features": 0.5,
    }  # fmt: skip
    same = [LabelSample(s.id, s.inputs, "it is", s.labels, "o") for s in rows]
    assert not any("text" in name for name in task.baselines(Splits(same, lambda: (same, same), lambda: same, see, 0)))


def test_neighbours_are_those_of_the_largest_cosine_as_many_as_val_asks_for():
    angles = np.array([0.0, 0.1, 0.2, 1.0, 1.1])
    train = np.stack([np.cos(angles), np.sin(angles)], 1) * np.array([1, 50, 1, 1, 1])[:, None]  # length is no matter
    targets = np.array([1.0, 4.0, 1.0, 0.0, 0.0])
    asked = np.array([[np.cos(0.09), np.sin(0.09)]])
    assert probe_neighbours([train, asked, asked], [targets, np.array([4.0])]) == pytest.approx([4.0])  # k = 1
    assert probe_neighbours([train, asked, asked], [targets, np.array([2.1])]) == pytest.approx([2.0])  # k = 3
    assert probe_neighbours([train, asked[:0], asked], [targets, targets[:0]]) == pytest.approx([1.2])  # k = 5, unchosen
    truth = np.array([[True, False]] * 3 + [[False, True]] * 2)
    assert probe_neighbours([train, asked, asked], [truth, truth[:1]]) == pytest.approx(np.array([[1.0, 0.0]]))
