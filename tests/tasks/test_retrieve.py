"""Retrieval: ranks by hand, the losses of one process on several ranks, the matching head."""

import numpy as np
import pytest
import torch
from answers import parts_of
from modalities import pictures
from PIL import Image
from sklearn.linear_model import Ridge
from tiny import scramble
from torch.nn import functional as F

from mitrain import methods
from mitrain.core import dist
from mitrain.core.errors import DataError, UserError
from mitrain.data.formats.captions import CaptionSample
from mitrain.data.hidden_states import TextStates
from mitrain.methods.none import NoneConfig
from mitrain.methods.peft import LoRAConfig
from mitrain.models import TextBackbone
from mitrain.tasks import probe, ranks
from mitrain.tasks.base import Batch, Parts
from mitrain.tasks.contrast import Everyone
from mitrain.tasks.momentum import MomentumQueue
from mitrain.tasks.ranks import Gallery, both_ways, chance, rank_metrics, reranked
from mitrain.tasks.retrieve import RetrieveConfig, RetrieveTask

FEATURES = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
TEXTS = ["a red square", "this thing", "green on blue", "yellow", "a red square", "the bottom"]
IMAGES = ["0", "1", "2", "2", "3", "4"]  # image 2 has two captions; images 0 and 3 share one text


def samples():
    return [
        CaptionSample(str(i), {"image": f"{a}.png"}, t, f"o{a}") for i, (a, t) in enumerate(zip(IMAGES, TEXTS, strict=True))
    ]


def keys():
    return [(s.inputs["image"], s.text) for s in samples()]


def features():
    return FEATURES[[int(a) for a in IMAGES]]


def batch(rows=slice(None), blind=False):
    own = features()[rows]
    return Batch(samples()[rows], pictures(own, infused=not blind))


def make(folder, **config):
    parts = parts_of(folder, width=5)
    torch.manual_seed(0)
    task = RetrieveTask(RetrieveConfig(dim=8, **config), parts, {"image": 5}).eval()
    task.fit(samples())
    return task


def test_the_states_that_a_baseline_reads_are_those_of_the_model_without_what_was_trained(folder):
    text = TextBackbone.load(folder, torch.float32)
    lora = methods.build(LoRAConfig(), {"image": 5})
    lora.attach({"text": text.model})
    task = RetrieveTask(RetrieveConfig(dim=8, matching=0), Parts(text, lora, TextStates(text, 0, None)), {"image": 5}).eval()
    before = task.frozen_states(TEXTS)
    scramble(lora)
    assert not torch.equal(torch.from_numpy(before), task.states(TEXTS, None).double())
    assert np.array_equal(task.frozen_states(TEXTS), before)


@pytest.mark.parametrize("dim", [2, 32, 48])
def test_maps_that_start_from_a_ridge_regression_say_what_it_says(folder, monkeypatch, dim):
    """In all directions of the text's states (32; the rest of 48 stays empty) its cosines, in two most of what it says."""
    monkeypatch.setattr(probe, "LEFT_OUT_RIDGES", (2.0,))
    text = TextBackbone.load(folder, torch.float32)
    none = methods.build(NoneConfig(), {"image": 5})
    none.attach({"text": text.model})
    parts = Parts(text, none, TextStates(text, 0, None))
    task = RetrieveTask(RetrieveConfig(dim=dim, matching=0, readout=["mean"], start="ridge"), parts, {"image": 5}).eval()
    task.fit(samples(), lambda some: batch(slice(len(some))))
    with torch.no_grad():
        states, files = task.states(TEXTS, None).double().numpy(), features().double().numpy()
        said = Ridge(alpha=2.0).fit(files, states).predict(files)
        found = task.file_vectors(batch().inputs) @ task.partner_vectors(TEXTS).T
    if dim < states.shape[1]:
        most = np.linalg.svd(said - said.mean(0))[2][:dim]
        said, states = said @ most.T, states @ most.T
    expected = (said / np.linalg.norm(said, axis=1, keepdims=True)) @ (
        states / np.linalg.norm(states, axis=1, keepdims=True)
    ).T
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


def test_the_strength_is_chosen_on_objects_left_out():
    """Rows come in equal pairs: with a row's twin at hand the weakest is best, for objects never seen the strongest."""
    made = np.random.default_rng(0)
    x, y = (np.repeat(made.normal(size=(12, width)), 2, 0) for width in (30, 4))
    pairs = [str(i // 2) for i in range(24)]
    strong, weak = (np.abs(probe.leading(x, y, groups, 4)[0]).sum() for groups in (pairs, [str(i) for i in range(24)]))
    assert strong < 0.2 * weak


# ranks


def by_hand(images, texts):
    """Ranks by sorting, ties against the right thing."""
    similarity = images @ texts.T
    right = np.array([[any(IMAGES[s] == a and TEXTS[s] == t for s in range(6)) for t in TEXTS] for a in "01234"])
    to_text, to_image = [], []
    for row, ok in zip(similarity, right, strict=True):
        to_text.append(1 + sum(s >= max(row[ok]) for s in row[~ok]))
    for column, ok in zip(similarity.T, right.T, strict=True):
        to_image.append(1 + sum(s >= max(column[ok]) for s in column[~ok]))
    return to_text, to_image


@pytest.mark.parametrize("chunk", [1, 2, 256])
def test_ranks_of_several_captions_and_of_shared_texts(monkeypatch, chunk):
    monkeypatch.setattr(ranks, "CHUNK", chunk)
    gallery = Gallery([s.inputs["image"] for s in samples()], [s.text for s in samples()])
    assert gallery.files == ["0.png", "1.png", "2.png", "3.png", "4.png"] and gallery.first.tolist() == [0, 1, 2, 4, 5]
    for seed in range(20):
        random = np.random.default_rng(seed)
        images, texts = random.integers(-2, 3, (5, 2)).astype(float), random.integers(-2, 3, (6, 2)).astype(float)
        texts[4] = texts[0]  # the same text
        found = both_ways(gallery, images, texts)
        assert [f.tolist() for f in found] == list(by_hand(images, texts))
        assert [f.dtype for f in found] == [np.int64] * 2


def test_equal_scores_find_nothing():
    gallery = Gallery([s.inputs["image"] for s in samples()], [s.text for s in samples()])
    to_text, to_image = both_ways(gallery, np.ones((5, 2)), np.ones((6, 2)))
    assert to_text.tolist() == [5, 6, 5, 5, 6]  # N less the image's right texts, and one
    assert to_image.tolist() == [4, 5, 5, 5, 4, 5]


def test_recall_median_and_mean():
    found = rank_metrics(np.array([1, 2, 6, 11]), np.array([1, 1, 5]))
    assert (found["i2t_r1"], found["i2t_r5"], found["i2t_r10"]) == (0.25, 0.5, 0.75)
    assert (found["t2i_r1"], found["t2i_r5"], found["t2i_r10"]) == (pytest.approx(2 / 3), 1.0, 1.0)
    assert (found["i2t_median_rank"], found["i2t_mean_rank"]) == (4.0, 5.0)
    assert found["recall_mean"] == pytest.approx((0.25 + 0.5 + 0.75 + 2 / 3 + 1 + 1) / 6)


def test_what_each_sample_counts_has_the_mean_recall_as_its_mean():
    gallery, random = (
        Gallery([s.inputs["image"] for s in samples()], [s.text for s in samples()]),
        np.random.default_rng(1),
    )
    images, texts = random.normal(size=(5, 2)), random.normal(size=(6, 2))
    texts[4] = texts[0]
    found = both_ways(gallery, images, texts)
    for decided in ([], gallery.decided()):
        shares = ranks.recall_shares(gallery, *found, decided)
        assert len(shares) == 6 and np.mean(shares) == pytest.approx(rank_metrics(*found, decided)["recall_mean"])
    assert 0 < np.mean(shares) < 1


def test_chance_is_what_random_orders_reach():
    gallery = Gallery([s.inputs["image"] for s in samples()], [s.text for s in samples()])
    expected, random = chance(gallery), np.random.default_rng(0)
    draws = []
    for _ in range(2000):
        right = gallery.relevant(slice(0, 5))[:, random.permutation(6)]
        draws.append([(1 + right.argmax(1)).mean(), right[:, 0].mean()])
    mean, recall = np.mean(draws, 0)
    assert mean == pytest.approx(expected["i2t_mean_rank"], abs=0.1)  # spread of the mean of 2000: about 0.01
    assert recall == pytest.approx(expected["i2t_r1"], abs=0.02)
    assert gallery.decided() == ["i2t_r10", "t2i_r5", "t2i_r10"]
    assert [name for name, value in expected.items() if value is None] == gallery.decided()
    assert expected["recall_mean"] == pytest.approx(np.mean([expected[n] for n in ("i2t_r1", "i2t_r5", "t2i_r1")]))


def test_a_recall_that_cannot_be_wrong_is_none_and_no_part_of_the_mean():
    worst = rank_metrics(np.full(5, 6), np.full(6, 5), ["i2t_r10", "t2i_r5", "t2i_r10"])
    assert worst["recall_mean"] == 0 and worst["i2t_r5"] == 0 and worst["t2i_r5"] is worst["i2t_r10"] is None
    assert Gallery([str(i) for i in range(11)], [f"t{i}" for i in range(11)]).decided() == []
    assert Gallery([str(i) for i in range(10)], [f"t{i}" for i in range(10)]).decided() == ["i2t_r10", "t2i_r10"]
    for images, texts in (["a", "a"], ["x", "y"]), (["a", "b"], ["x", "x"]):
        gallery = Gallery(images, texts)
        assert gallery.decided() == gallery.depths()
    with pytest.raises(DataError, match="^no ranking of so few things could be wrong: score more of them$"):
        rank_metrics(np.ones(1), np.ones(2), gallery.depths())


def test_reranking_orders_the_candidates_alone():
    right = np.array([[False, True], [False, False], [True, False]])
    scores = np.array([[0.1, 0.2], [5.0, 6.0], [1.0, 1.0]])
    assert reranked(np.array([2, 7, 1]), right, scores).tolist() == [1, 7, 2]
    assert reranked(np.array([2, 1, 1]), right, scores).tolist() == [1, 3, 2]  # below all candidates, at the least


# the task


def test_the_contrast_is_a_cross_entropy_over_right_partners(folder):
    task = make(folder, matching=0.0)
    total, count = task.loss(batch())
    with torch.no_grad():
        images, texts = task.file_vectors(pictures(features())), task.partner_vectors(TEXTS)
        logits = task.sharpness() * images @ texts.T
    right = torch.tensor([[float(IMAGES[i] == IMAGES[j] or TEXTS[i] == TEXTS[j]) for j in range(6)] for i in range(6)])
    right = right / right.sum(1, keepdim=True)
    expected = 0.5 * (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) * 6
    assert float(total.detach()) == pytest.approx(float(expected), rel=1e-5) and float(count) == 6
    each_ranks_rows_and_gradients_are_those_of_the_definition()


def each_ranks_rows_and_gradients_are_those_of_the_definition():
    """A rank's loss is that of its own rows, its gradient that of the whole batch by its own vectors and, by the
    sharpness, of its own rows; pictures travel only where they are matched."""
    images, words = F.normalize(FEATURES.double(), dim=-1), F.normalize(FEATURES.double().roll(2, 0), dim=-1)
    right = torch.tensor([[IMAGES[i] == IMAGES[j] or TEXTS[i] == TEXTS[j] for j in range(6)] for i in range(6)])
    right = right / right.sum(1, keepdim=True, dtype=torch.float64)
    whole = [x.clone().requires_grad_() for x in (images, words, torch.tensor(5.0, dtype=torch.float64))]
    logits = whole[2] * whole[0] @ whole[1].T
    rows = sum(F.cross_entropy(x, right, reduction="none") for x in (logits, logits.T)) / 2
    by_vectors = torch.autograd.grad(rows.sum(), whole[:2], retain_graph=True)
    shares = [slice(0, 2), slice(2, 6)]
    for rank, share in enumerate(shares):
        sent = [(images[s], words[s], None, [(x.inputs["image"], x.text) for x in samples()[s]]) for s in shares]
        own = [x.detach().clone().requires_grad_() for x in (images[share], words[share], whole[2])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "rank", lambda rank=rank: rank)
            patch.setattr(dist, "gather", lambda value, sent=sent: sent if value[2] is None else None)
            everyone = Everyone(own[0], own[1], batch(share), keys()[share], False)
        loss = everyone.contrast(own[2])
        loss.backward()
        (by_sharpness,) = torch.autograd.grad(rows[share].sum(), whole[2:], retain_graph=True)
        torch.testing.assert_close(loss, rows[share].sum())
        for found, expected in zip(own, (by_vectors[0][share], by_vectors[1][share], by_sharpness), strict=True):
            torch.testing.assert_close(found.grad, expected)
        assert everyone.inputs is None and everyone.texts == TEXTS and everyone.count == share.stop - share.start


def gradients(task):
    found = {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}
    found |= {f"adapter.{n}": p.grad.clone() for n, p in task.parts.adapter.named_parameters() if p.grad is not None}
    task.zero_grad()
    task.parts.adapter.zero_grad()
    return found


def test_ranks_together_have_the_loss_and_the_gradient_of_one_process(folder, monkeypatch):
    task = make(folder)
    torch.nn.init.normal_(task.match.weight, std=0.1)
    total, count = task.loss(batch())
    total.backward()
    expected = gradients(task)
    shares = [slice(0, 2), slice(2, 6)]
    seen = []
    with torch.no_grad():  # what each rank would gather
        for share in shares:
            part = batch(share)
            keys = [(s.inputs["image"], s.text) for s in part.samples]
            words = task.partner_vectors([text for _, text in keys])
            seen.append((task.file_vectors(part.inputs), words, part.inputs, keys))
    totals, grads = [], {}
    for rank, share in enumerate(shares):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(dist, "gather", lambda value: seen)
        loss, own = task.loss(batch(share))
        loss.backward()
        totals.append((float(loss.detach()), float(own)))
        for name, grad in gradients(task).items():
            grads[name] = grads.get(name, 0) + grad
    assert sum(t for t, _ in totals) == pytest.approx(float(total.detach()), rel=1e-5)
    assert sum(c for _, c in totals) == float(count)
    assert grads.keys() == expected.keys() and "log_scale" in grads
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5)


def test_a_queue_begins_as_the_contrast_of_the_batch_and_then_remembers(folder):
    plain, task = make(folder, matching=0.0), make(folder, matching=0.0, queue=8, distil=0.0, momentum=0.5).train()
    task.parts.adapter.load_state_dict(plain.parts.adapter.state_dict())
    task.load_state_dict(plain.state_dict(), strict=False)
    task.slow.load_state_dict(MomentumQueue(8, 8, trained_of(task)).state_dict())
    first, count = task.loss(batch())
    assert float(first.detach()) == pytest.approx(float(plain.loss(batch())[0].detach()), rel=1e-5) and float(count) == 6
    first.backward()
    assert all(p.grad is not None for p in (task.log_scale, *task.file_map.parameters(), *task.partner_map.parameters()))
    assert task.slow.filled == 6
    again, _ = task.loss(batch(slice(0, 2)))
    assert (
        float(again.detach()) > float(plain.loss(batch(slice(0, 2)))[0].detach()) * 1.05
    )  # more wrong partners to tell apart
    assert task.slow.filled == 8 and "slow.images" in task.state_dict()


def trained_of(task):
    return {"adapter": task.parts.adapter, "file_map": task.file_map, "partner_map": task.partner_map}


def test_the_hardest_partner_is_wrong_and_the_most_similar():
    images, texts = F.normalize(FEATURES, dim=-1), F.normalize(FEATURES.roll(1, 0), dim=-1)
    texts[0] = texts[4] = images[0]  # one text, most similar to the first image: it is never its wrong partner
    everyone = Everyone(images, texts, batch(), keys(), True)
    text, image, known = everyone.hardest()
    for i in range(6):
        wrong = [j for j in range(6) if IMAGES[i] != IMAGES[j] and TEXTS[i] != TEXTS[j]]
        assert int(text[i]) in wrong and int(image[i]) in wrong
        assert float(images[i] @ texts[text[i]]) == pytest.approx(max(float(images[i] @ texts[j]) for j in wrong))
        assert float(images[image[i]] @ texts[i]) == pytest.approx(max(float(images[j] @ texts[i]) for j in wrong))
    assert known.tolist() == [1.0] * 6 and known.dtype == images.dtype
    alone = Everyone(
        images[2:4], texts[2:4], batch(slice(2, 4)), keys()[2:4], True
    )  # two captions of one image: nothing is wrong
    assert alone.hardest()[2].tolist() == [0.0, 0.0]


def test_the_matching_head_reads_the_infused_text(folder):
    task = make(folder)
    torch.nn.init.normal_(task.match.weight)
    with torch.no_grad():
        shown = (
            pictures(features()),
            pictures(features().flip(0)),
            pictures(features(), infused=False),
        )
        own, other, blind = (task.match_values(TEXTS, picture) for picture in shown)
    assert not torch.allclose(own, other, atol=1e-3) and not torch.allclose(own, blind, atol=1e-3)
    loss, _ = task.loss(batch())
    loss.backward()
    assert task.parts.adapter.infusions[0].head_logit.grad.abs().sum() > 0


def test_at_first_reranking_changes_nothing_and_later_it_does(folder):
    task = make(folder, rerank=4)
    first = task.score(samples(), task.predict(batch()))
    assert {k: first[k] for k in first["before_reranking"]} == first["before_reranking"]
    torch.nn.init.normal_(task.match.weight, std=5.0)
    predictions = task.predict(batch())
    later = task.score(samples(), predictions)
    assert later["before_reranking"] == first["before_reranking"]
    assert later["t2i_mean_rank"] != first["t2i_mean_rank"]
    for sample, prediction in zip(samples(), predictions, strict=True):
        shown = task.panel(sample, prediction, Image.new("RGB", (4, 4)))
        lines, right = shown.lines, shown.right
        assert lines[0] == sample.text and right == (prediction.values["rank_of_image"] == 1)
    blind = task.score(samples(), task.predict(batch(blind=True)))
    assert blind["before_reranking"] == first["before_reranking"] and blind["samples"] == 6 and blind["images"] == 5


def test_weights_that_diverged_are_reported(folder):
    task = make(folder)
    torch.nn.init.constant_(task.file_map.weight, float("nan"))
    found = task.predict(batch())
    assert np.isnan(task.score(samples(), found)["recall_mean"]) and not any(p.finite for p in found)
    assert all(p.finite for p in make(folder).predict(batch()))


def test_a_matching_head_that_diverged_is_no_perfect_rank(folder):
    task = make(folder, rerank=3)
    torch.nn.init.constant_(task.match.weight, float("nan"))
    with pytest.raises(UserError, match=r"33 of 33 samples are scored with numbers that are not finite .*'0\.png'"):
        task.score(samples(), task.predict(batch()))
