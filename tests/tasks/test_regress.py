"""The task regress: its loss, predictions and baselines against a computation by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from answers import parts_of
from modalities import pictures
from PIL import Image
from tiny import scramble

from mitrain import methods
from mitrain.core.errors import DataError
from mitrain.data.formats.targets import TargetSample
from mitrain.data.hidden_states import TextStates
from mitrain.methods.peft import LoRAConfig
from mitrain.models import TextBackbone
from mitrain.tasks import base
from mitrain.tasks.base import Batch, Parts, Splits
from mitrain.tasks.probe import probe_numbers, standardised
from mitrain.tasks.readout import frozen_states
from mitrain.tasks.regress import RegressConfig, RegressTask

FEATURES = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
TEXTS, TARGETS = ["the colour of this picture is", "this thing", "a red square"], (-3.0, 2.5, 2.0)


def make(folder, **config):
    parts = parts_of(folder)
    torch.manual_seed(0)
    return RegressTask(RegressConfig(**config), parts, {"image": 6}).eval()


def samples():
    return [
        TargetSample(str(i), {"image": f"{i}.png"}, t, y, "o") for i, (t, y) in enumerate(zip(TEXTS, TARGETS, strict=True))
    ]


def batch():
    return Batch(samples(), pictures(FEATURES))


@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [
        ("l1", lambda d: abs(d)),
        ("mse", lambda d: d * d),
        ("huber", lambda d: 0.5 * d * d if abs(d) < 1 else abs(d) - 0.5),
    ],
)
def test_the_loss_is_that_of_the_standardised_numbers(folder, loss, by_hand):
    task = make(folder, loss=loss)
    task.fit(samples())
    said = [p.vector for p in task.predict(batch())]
    total, count = task.loss(batch())
    expected = sum(by_hand((y - t) / np.std(TARGETS)) for y, t in zip(said, TARGETS, strict=True))
    assert total.item() == pytest.approx(expected, rel=1e-5) and count.item() == 3
    total.backward()
    assert task.head.weight.grad.abs().sum() > 0 and task.parts.adapter.infusions[0].head_logit.grad is not None


def test_a_head_of_zeros_says_the_mean_of_training(folder):
    task = make(folder)
    task.fit([replace(s, target=1e9 + s.target) for s in samples()])  # exact also far from zero
    torch.nn.init.zeros_(task.head.weight), torch.nn.init.zeros_(task.head.bias)
    assert [p.values["predicted"] for p in task.predict(batch())] == [1e9 + np.mean(TARGETS)] * 3
    again = make(folder)
    again.load_state_dict(task.state_dict())  # as a checkpoint holds it
    assert again.predict(batch())[0].vector == 1e9 + np.mean(TARGETS)


def test_scores_follow_the_range_of_training(folder):
    task = make(folder)
    task.fit(samples())
    found = task.score(samples(), task.predict(batch()))
    errors = [abs(p.vector - s.target) for p, s in zip(task.predict(batch()), samples(), strict=True)]
    assert found["mae"] == pytest.approx(np.mean(errors)) and "acc7" in found and "acc2_positive" in found
    task.fit([replace(s, target=10 * s.target) for s in samples()])
    assert task.score(samples(), task.predict(batch())).keys() == {"mae", "pearson", "spearman", "r2", "samples"}


def test_numbers_that_are_none_are_reported(folder):
    task = make(folder)
    task.fit(samples())
    features = FEATURES.clone()
    features[1, 0] = torch.inf
    found = task.predict(Batch(samples(), pictures(features)))
    assert [p.finite for p in found] == [True, False, True]


def test_equal_targets_are_refused_in_training_and_told_of_a_split(folder):
    same = [replace(s, target=0.5) for s in samples()]
    with pytest.raises(DataError, match=r"every training sample has the target 0\.5"):
        make(folder).fit(same)
    (line,) = base.cautions(RegressTask, same, "val")
    assert line.startswith("val: every sample has the target '0.5'")
    assert base.cautions(RegressTask, samples(), "val") == []


def test_ridge_regression_learns_what_the_features_say():
    random = np.random.default_rng(0)
    features = random.normal(size=(90, 3))
    targets = features @ np.array([1.0, -2.0, 0.0]) + 3
    parts = [features[:40], features[40:60], features[60:]]
    found = probe_numbers(parts, [targets[:40], targets[40:60]])
    assert np.abs(found - targets[60:]).max() < 0.05
    blind = probe_numbers([parts[0], parts[1][:0], parts[2]], [targets[:40], targets[:0]])
    assert 0.05 < np.abs(blind - targets[60:]).max() < 0.5  # without val a strength of 1


def test_baselines_are_scored_as_predictions_are(folder):
    task = make(folder)
    task.fit(samples())
    table = {s.id: FEATURES[int(s.id)] for s in samples()}
    splits = Splits(
        samples()[:2], lambda: (samples(), samples()), samples, lambda part: torch.stack([table[s.id] for s in part]), 0
    )
    found = task.baselines(splits)
    assert found["training mean"]["mae"] == pytest.approx((3.5 + 2.0) / 2)  # the mean is 0.5
    assert found["training median"]["mae"] == pytest.approx((5.0 + 0.5) / 2)  # the median is 2
    assert found["training mean"]["pearson"] is None
    assert found["ridge regression on the same features"]["mae"] < 0.5
    assert found["ridge regression on the frozen text states"]["mae"] < 0.5
    assert found["ridge regression on text and features together"]["mae"] < 0.5
    assert found["nearest neighbours on the same features"]["mae"] == pytest.approx(0.0, abs=1e-6)  # the very samples


def test_a_ridge_on_texts_reads_the_frozen_model_and_is_left_out_where_all_texts_are_one(folder):
    task = make(folder)
    lora = methods.build(LoRAConfig(), {"image": 6})
    rows = [[3, 5, 4], [6, 7], [3, 5, 4]]
    text = TextBackbone.load(folder, torch.float32)
    plain = [text.model.base_model(torch.tensor([row])).last_hidden_state[0].mean(0) for row in rows]
    lora.attach({"text": text.model})
    scramble(lora)
    states = frozen_states(Parts(text, lora, TextStates(text, 0, None)), rows)
    np.testing.assert_allclose(states, torch.stack(plain).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(standardised([states, states[:1]])[0].mean(0)).max() < 1e-6
    same = [replace(s, text="this thing") for s in samples()]
    splits = Splits(same, lambda: (same, same), samples, lambda part: FEATURES[: len(part)], 0)
    assert not any("text states" in name for name in task.baselines(splits))


def test_what_inspection_and_figures_show(folder):
    task = make(folder)
    task.fit(samples())
    described = task.describe(samples())
    assert described["targets"] == {"least": -3.0, "mean": 0.5, "greatest": 2.5, "std": 2.4833}
    assert task.caption(samples()[1]) == "this thing -> 2.5"
    shown = task.panel(samples()[1], task.predict(batch())[1], Image.new("RGB", (4, 4)))
    assert shown.lines[1:] == ["truth: 2.5", "this thing"] and shown.right is None
