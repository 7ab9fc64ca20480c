"""The segment task: read-outs, standardisation, loss and predictions."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from exported import make_config, make_world
from modalities import pictures
from tiny import scramble

from mitrain import methods
from mitrain.core.errors import ConfigError
from mitrain.data.formats.refcoco import ReferSample
from mitrain.data.hidden_states import TextStates
from mitrain.data.loader import Draw
from mitrain.methods.mit.mit import MiTConfig
from mitrain.models import TextBackbone
from mitrain.tasks.base import Batch, Parts, Prediction
from mitrain.tasks.segment import SegmentConfig, SegmentTask
from mitrain.training.build import build

GRID, PATCH, WIDTHS = 2, 14, [8, 8]
SETTINGS = {"dim": 8, "heads": 2, "ffn": 16, "loss_size": 16}


def make(folder, method=None, **config):
    torch.manual_seed(0)
    text = TextBackbone.load(folder, torch.float32)
    adapter = methods.build(method or MiTConfig(layers=[1, 2]), {"image": 6})
    adapter.attach({"text": text.model})
    parts = Parts(text, adapter, TextStates(text, adapter.attachment.first_layers["text"], None))
    return SegmentTask(SegmentConfig(**{**SETTINGS, **config}), parts, WIDTHS, GRID, PATCH, 1)


def samples():
    polygons = [[[0, 0, 10, 0, 10, 8, 0, 8]], [[4, 4, 20, 4, 20, 18, 4, 18]], [[0, 10, 24, 10, 24, 20, 0, 20]]]
    texts = ["the red square", "the blue thing on the left", "a square"]
    return [
        ReferSample(str(i), {"image": f"{i}.png"}, t, (20, 24), p, "o")
        for i, (t, p) in enumerate(zip(texts, polygons, strict=True))
    ]


def batch(features=True):
    generator = torch.Generator().manual_seed(3)
    levels = [torch.randn(3, 1 + GRID**2, w, generator=generator) for w in WIDTHS]
    return Batch(samples(), pictures(torch.randn(3, 6, generator=generator)) if features else None, levels)


@pytest.mark.parametrize("readout", [["last"], ["mean"], ["embeddings"], ["last", "mean", "embeddings"]])
def test_read_outs_ignore_padding_and_are_what_they_say(folder, readout):
    task = make(folder, readout=readout)
    found = task.condition([s.expression for s in samples()], None)
    text = task.parts.text
    for i, sample in enumerate(samples()):
        ids = torch.tensor([text.tokens(sample.expression)])
        with torch.no_grad():
            hidden = text.model.model(input_ids=ids).last_hidden_state[0]
        parts = {"last": hidden[-1], "mean": hidden.mean(0), "embeddings": text.embeddings(ids)[0].mean(0)}
        torch.testing.assert_close(found[i], torch.cat([parts[name] for name in readout]), rtol=1e-4, atol=1e-5)


def test_a_mask_of_what_is_no_number_is_reported(folder):
    task, own = make(folder), batch()
    assert [p.finite for p in task.predict(own)] == [True] * 3
    own.levels[0][1, 2, 0] = torch.nan
    assert [p.finite for p in task.predict(own)] == [True, False, True]


def test_fit_standardises_the_frozen_read_outs(folder):
    task = make(folder, readout=["last", "mean"])
    task.fit(samples())
    found = task.condition([s.expression for s in samples()], None)
    torch.testing.assert_close(found.mean(0), torch.zeros(64), atol=1e-4, rtol=0)
    assert {"mean", "scale"} <= set(task.state_dict())


@pytest.mark.parametrize(
    ("decoder", "loss"), [("film", "ce"), ("film", "bce+dice"), ("unet", "focal"), ("ground", "bce+dice")]
)
def test_loss_trains_decoder_and_infusion(folder, decoder, loss):
    task = make(folder, decoder=decoder, loss=loss, unet_width=8)
    scramble(task.parts.adapter, spread=0.1)
    total, count = task.loss(batch())
    (total / count).backward()
    assert torch.isfinite(total) and float(count) > 0
    trained = [*task.parameters(), *task.parts.adapter.parameters()]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    assert sum(float(p.grad.abs().sum()) for p in task.parts.adapter.parameters()) > 0


@pytest.mark.parametrize("chosen", [{"film": "every", "coords": True}, {"decoder": "ground"}])
def test_a_few_steps_fit_three_masks(folder, chosen):
    task = make(folder, loss="bce+dice", dim=16, **chosen)
    task.fit(samples())
    optimizer = torch.optim.AdamW([*task.parameters(), *task.parts.adapter.parameters()], lr=1e-2)
    task.train()
    for _ in range(60):
        optimizer.zero_grad()
        total, count = task.loss(batch())
        (total / count).backward()
        optimizer.step()
    task.eval()
    predictions = task.predict(batch())
    metrics = task.score(samples(), predictions)
    assert metrics["samples"] == 3 and metrics["oiou"] > 0.6
    assert predictions[0].mask.shape == (20, 24) and predictions[0].mask.dtype == np.bool_


def test_late_fusion_conditions_by_the_vector_itself(folder):
    text = TextBackbone.load(folder, torch.float32)
    adapter = methods.build(adapters_none(), {"image": 6})
    adapter.attach({"text": text.model})
    parts = Parts(text, adapter, TextStates(text, adapter.attachment.first_layers["text"], None))
    task = SegmentTask(SegmentConfig(**SETTINGS, readout=["last", "image"]), parts, WIDTHS, GRID, PATCH, 1, {"image": 6})
    own = batch()
    found = task.condition([s.expression for s in own.samples], own.inputs)
    assert found.shape == (3, 32 + 6) and torch.equal(found[:, 32:], own.inputs.features["image"])
    with pytest.raises(ConfigError, match=r"readout='sound' is neither"):
        make(folder, readout=["sound"])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("built"))


@pytest.mark.parametrize(("name", "readout"), [("uniadapter", ["image"]), ("gated-xattn", ["image"]), ("mope", ["joint"])])
def test_read_outs_that_need_files_are_standardised_over_samples(world, name, readout):
    config = make_config(world, "segment", {"name": name})
    task = config.task.model_copy(update={"readout": ("mean", *readout)})
    model = build(config.model_copy(update={"task": task, "cache": False}))
    files = sorted((world / "data").rglob("*.png"))[:3]
    shown = [replace(s, inputs={"image": f.name}) for s, f in zip(samples(), files, strict=True)]
    features = model.features(files[0].parent, cached=False)
    see = lambda part: model.evaluation_batch(part, [s.inputs for s in part], features)  # noqa: E731
    model.train(False)
    model.task.fit(shown, see)
    with torch.no_grad():
        found = model.task.condition([s.expression for s in shown], see(shown).inputs)
    torch.testing.assert_close(found.mean(0), torch.zeros(found.shape[1]), atol=1e-3, rtol=0)
    assert found.shape[1] > model.text.width and found.std(0, correction=0)[model.text.width :].max() > 0.9


def test_modality_dropout_leaves_the_picture_that_masks_are_decoded_from(world):
    config = make_config(world, "segment")
    image = config.model.encoders["image"]
    both = {"image": image, "reference": image.model_copy(update={"input": "reference", "levels": ()})}
    changed = {
        "model": config.model.model_copy(update={"encoders": both}),
        "train": config.train.model_copy(update={"modality_dropout": 0.5}),
    }
    model = build(config.model_copy(update=changed), empty=True)
    sample = replace(samples()[0], inputs={"image": "a.png", "reference": "b.png"})
    kept = [set(model._dropped(Draw(sample, 0, Random(seed)))) for seed in range(50)]
    assert all("image" in names for names in kept) and 10 < sum("reference" in names for names in kept) < 40


def test_scores_are_told_by_kind(folder):
    task = make(folder)
    kinds = [replace(s, kind=kind) for s, kind in zip(samples(), ("name", "name", "place"), strict=True)]
    whole = [Prediction(s.id, s.inputs, {}, s.mask()) for s in kinds]
    whole[1].mask = ~whole[1].mask
    inside = [int(s.mask().sum()) for s in kinds]
    scores = task.score(kinds, whole)
    assert scores["oiou/place"] == 1 and scores["oiou/name"] == pytest.approx(inside[0] / (inside[0] + 20 * 24))
    assert not any(key.startswith("oiou/") for key in task.score(samples(), whole))


def test_levels_are_needed_and_read_outs(folder):
    text = TextBackbone.load(folder, torch.float32)
    with pytest.raises(ConfigError, match="levels"):
        SegmentTask(SegmentConfig(), Parts(text, None, None), [], GRID, PATCH, 1)
    with pytest.raises(ConfigError, match=r"readout is empty"):
        make(folder, readout=[])


def test_a_bag_of_embeddings_needs_no_language_model(folder, monkeypatch):
    task = make(folder, adapters_none(), readout=["embeddings"])
    monkeypatch.setattr(TextBackbone, "hidden", lambda *_: pytest.fail("the language model ran"))
    assert task.texts(samples(), True) == []
    assert task.condition(["the red square"], None).shape == (1, 32)


def adapters_none():
    from mitrain.methods.none import NoneConfig

    return NoneConfig()
