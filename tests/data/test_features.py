"""Cached features equal uncached ones; statistics; bad images are skipped within a budget."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from folders import colour_records, llm_folder, vision_folder
from modalities import Pictures
from PIL import Image

from mitrain.core.errors import DataError
from mitrain.data.features import FeatureConfig, FeatureNorm
from mitrain.data.formats.labels import LabelSample
from mitrain.data.formats.refcoco import ReferSample
from mitrain.data.hidden_states import TextStates
from mitrain.data.samples import BadSamples
from mitrain.models import ImageConfig, ImageEncoder, TextBackbone

IMAGES = [f"images/{i}.png" for i in range(6)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("features")
    folder = vision_folder(path / "vision")
    encoders = [
        ImageEncoder(ImageConfig(name=str(folder), levels=[3, 1], layer=3, pool="cls+mean"), folder),
        ImageEncoder(ImageConfig(name=str(folder), resize="pad"), folder),
    ]
    text = TextBackbone.load(llm_folder(path / "llm"), torch.float32)
    return encoders, text, colour_records(path / "data", train=8, val=4)


def features(world, cache, bad=None):
    return Pictures(world[0], world[2], cache, 10**6, bad)


def test_cached_equals_uncached(world, tmp_path):
    plain, cached = features(world, None), features(world, tmp_path)
    assert plain.prepare(IMAGES, 2) == 0
    assert cached.prepare(IMAGES, 2) == 2 * 2 * len(IMAGES)
    views = [0, 1, 0, 1, 1, 0]
    torch.testing.assert_close(cached.pooled(IMAGES, views), plain.pooled(IMAGES, views))
    for one, two in zip(cached.levels(IMAGES), plain.levels(IMAGES), strict=True):
        torch.testing.assert_close(one, two, rtol=2e-3, atol=2e-3)  # kept in 16 bits
        assert one.shape == (6, 5, 24)
    assert cached.pooled(IMAGES).shape == (6, cached.width) and cached.width == 48 + 24


def test_each_image_is_encoded_once(world, tmp_path, monkeypatch):
    features(world, tmp_path).prepare(IMAGES)
    again = features(world, tmp_path)
    monkeypatch.setattr(ImageEncoder, "encode", lambda *_: pytest.fail("encoded again"))
    assert again.prepare(IMAGES) == 0
    again.pooled(IMAGES)


def test_of_any_number_of_pictures_a_few_are_encoded_at_a_time(world, monkeypatch):
    monkeypatch.setattr("mitrain.data.features.ENCODE_BATCH", 4)
    found, counts, encode = features(world, None), [], ImageEncoder.encode
    whole = found.pooled(IMAGES)
    monkeypatch.setattr(ImageEncoder, "encode", lambda self, *a: counts.append(len(a[0])) or encode(self, *a))
    samples = [LabelSample(image, {"image": image}, "", ()) for image in IMAGES]
    mean, std = found.all.moments(samples)["image"]
    assert torch.equal(mean, whole.double().mean(0)) and torch.equal(std, whole.double().std(0, correction=0))
    assert counts == [4, 2, 4, 2]


def test_statistics_are_read_back_for_the_same_files_and_taken_of_others(world, tmp_path, monkeypatch):
    """To the last bit; a damaged record of them is not believed, and in parts they are the same but for rounding."""
    samples = [LabelSample(image, {"image": image}, "", ()) for image in IMAGES]
    whole, part = (features(world, tmp_path).all.moments(own)["image"] for own in (samples, samples[:4]))
    assert not torch.equal(whole[0], part[0])
    records = sorted((tmp_path / "statistics").iterdir())
    assert len(records) == 2
    with monkeypatch.context() as patch:
        patch.setattr("mitrain.data.features.Features._of_part", lambda *_: pytest.fail("read again"))
        again = features(world, tmp_path).all.moments(samples)["image"]
    assert all(map(torch.equal, again, whole))
    for record in records:
        record.write_text(record.read_text().replace("0.", "1.", 1))
    assert all(map(torch.equal, features(world, tmp_path).all.moments(samples)["image"], whole))
    monkeypatch.setattr("mitrain.data.features.AT_ONCE", 2)
    in_parts = features(world, None).all.moments(samples)["image"]
    torch.testing.assert_close(in_parts[0], whole[0])
    torch.testing.assert_close(in_parts[1], whole[1])


def test_statistics_are_those_of_a_picture_that_was_replaced_and_of_the_encoders_that_there_are(world, tmp_path):
    root = shutil.copytree(world[2], tmp_path / "data")
    samples = [LabelSample(image, {"image": image}, "", ()) for image in IMAGES]
    moments = lambda encoders, cache: Pictures(encoders, root, cache).all.moments(samples)["image"]  # noqa: E731
    first = moments(world[0], tmp_path / "cache")
    Image.new("RGB", (9, 7), (250, 3, 99)).save(root / IMAGES[0])
    for encoders in (world[0], world[0][:1], world[0][1:]):
        assert all(map(torch.equal, moments(encoders, tmp_path / "cache"), moments(encoders, None)))
    assert not torch.equal(moments(world[0], tmp_path / "cache")[0], first[0])


def test_averaging_views(world, tmp_path):
    found = features(world, tmp_path)
    mean = (found.pooled(IMAGES, [0] * 6) + found.pooled(IMAGES, [1] * 6)) / 2
    torch.testing.assert_close(found.averaged(IMAGES, 2), mean)


def test_a_bad_image_is_named_and_counted_then_stops(world, caplog):
    (world[2] / "images" / "broken.png").write_bytes(b"not a picture")
    found = features(world, None, BadSamples(1))
    assert found.usable(["images/0.png", "images/broken.png"]) == [True, False]
    assert "broken.png" in caplog.text
    with pytest.raises(DataError, match=r"gone\.png"):
        found.usable(["images/gone.png"])


def test_a_broken_mask_is_named_and_counted_then_stops(world, caplog):
    found = features(world, None, BadSamples(1, 1.0))
    whole, torn = ([[2, 1, 8, 1, 8, 5]], {"size": [20, 24], "counts": [3]})
    samples = [
        ReferSample(f"s{i}", {"image": IMAGES[i]}, "x", (20, 24), mask) for i, mask in enumerate((whole, torn, whole))
    ]
    assert found.readable(samples) == [samples[0], samples[2]]
    assert "skipped s1 (1 of at most 1): its segmentation is broken" in caplog.text
    with pytest.raises(DataError, match="more than data.bad_samples=1: s1 .*; s3 "):
        found.readable([replace(samples[1], id="s3")])


def test_a_split_of_which_too_much_is_missing_is_refused(world):
    samples = [ReferSample(f"s{i}", {"image": f"images/gone{i}.png"}, "x", (20, 24), [[2, 1, 8, 1, 8, 5]]) for i in range(2)]
    samples += [ReferSample("s9", {"image": IMAGES[0]}, "x", (20, 24), [[2, 1, 8, 1, 8, 5]])]
    with pytest.raises(DataError, match=r"2 of 3 samples cannot be used.*bad_share=0.1: images/gone0\.png"):
        features(world, None, BadSamples(20)).readable(samples)


def test_a_picture_that_is_not_what_was_annotated_is_a_bad_sample(world, caplog):
    folder = world[2] / "images"
    image, exif = Image.new("RGB", (40, 30), "red"), Image.Exif()
    image.paste("blue", (0, 0, 20, 30))
    exif[0x0112] = 6
    image.save(folder / "turned.png", exif=exif)
    image.save(folder / "upright.png")
    image.resize((20, 15)).save(folder / "half.png")
    image.crop((0, 0, 40, 20)).save(folder / "other.png")
    names = ["turned", "upright", "half", "other"]
    samples = [ReferSample(name, {"image": f"images/{name}.png"}, "x", (30, 40), [[2, 1, 8, 1, 8, 5]]) for name in names]
    found = features(world, None, BadSamples(1, 0.5))
    assert found.readable(samples) == samples[:3]
    assert "other.png' in" in caplog.text and "40 x 20 pixels, its annotation is made for 40 x 30" in caplog.text
    assert "1 pictures are read as it is stored" in caplog.text and "as a scaled copy" in caplog.text
    assert found.content("images/turned.png").tobytes() == image.tobytes()  # not turned: so its mask lies
    assert torch.equal(*found.pooled(["images/turned.png", "images/upright.png"]))
    assert found.key("images/turned.png") != features(world, None).key("images/turned.png")


@pytest.mark.parametrize("cached", [True, False])
def test_a_picture_replaced_after_it_was_named_is_refused_and_not_stored(world, tmp_path, cached):
    path = world[2] / "images" / "shifty.png"
    Image.new("RGB", (20, 20), "red").save(path)
    found = features(world, tmp_path if cached else None)
    old = found.key("images/shifty.png")
    Image.new("RGB", (20, 20), "blue").save(path)
    with pytest.raises(DataError, match=r"shifty\.png' in .* was replaced while it was being used"):
        found.prepare(["images/shifty.png"])
        found.pooled(["images/shifty.png"])
    again = features(world, tmp_path)
    assert again.prepare(["images/shifty.png"]) == 2 and again.key("images/shifty.png") != old
    assert not any(f"{old}/0" in store for encoding in again.features for store in [encoding.store])


def test_a_picture_is_read_once_for_its_name_and_its_pixels(world, monkeypatch):
    """What lies there when the file is opened a second time could be another picture."""
    opened = []
    monkeypatch.setattr("mitrain.data.contents.read_whole", lambda path, *_: opened.append(path) or path.read_bytes())
    found = features(world, None)
    found.key(IMAGES[0])
    assert len(opened) == 1
    found.content(IMAGES[0])
    assert len(opened) == 2


def test_damaged_features_are_noticed_in_mid_run(world, tmp_path, caplog):
    found, plain = features(world, tmp_path), features(world, None)
    found.prepare(IMAGES)
    for path in tmp_path.glob("images/*/*/*.npy"):
        rows = np.load(path)
        np.save(path, np.roll(rows, 1, axis=0))
    torch.testing.assert_close(found.pooled(IMAGES), plain.pooled(IMAGES))
    assert len(caplog.records) == 2  # one segment of each encoder
    assert features(world, tmp_path).prepare(IMAGES) == 2 * len(IMAGES)


def test_text_states_equal_the_trunk(world, tmp_path):
    text = world[1]
    rows = [text.tokens(t) for t in ("the picture shows a square", "red", "the colour of this picture is red")]
    cached, plain = TextStates(text, 2, tmp_path), TextStates(text, 2, None)
    assert cached.prepare(rows) == 3 and TextStates(text, 2, tmp_path).prepare(rows) == 0
    assert plain.prepare(rows) == 0 and plain.batch(rows) is None
    ids, mask = text.pad(rows)
    with torch.no_grad():
        whole = text.hidden(ids, mask)
        part = text.hidden(ids, mask, cached.batch(rows), 2)
    shown = mask.bool()
    torch.testing.assert_close(part[shown], whole[shown], rtol=1e-4, atol=1e-5)


def test_standardised_features_have_the_asked_norm():
    x = torch.randn(500, 64) * torch.rand(64) * 9 + 3
    norm = FeatureNorm({"image": 64}, FeatureConfig(norm=4.0))
    norm.fit({"image": (x.double().mean(0), x.double().std(0, correction=0))})
    out = norm(x)
    torch.testing.assert_close(out.mean(0), torch.zeros(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.square().sum(1).mean(), torch.tensor(16.0), rtol=1e-3, atol=0)
    assert set(norm.state_dict()) == {"mean", "scale"}


def test_l2_and_none():
    x = torch.randn(5, 8)
    torch.testing.assert_close(
        FeatureNorm({"image": 8}, FeatureConfig(normalize="l2", norm=2.0))(x).norm(dim=1), torch.full((5,), 2.0)
    )
    assert torch.equal(FeatureNorm({"image": 8}, FeatureConfig(normalize="none"))(x), x)


def test_noise_follows_its_generator():
    norm, x = FeatureNorm({"image": 8}, FeatureConfig(noise=0.5, dropout=0.25)), torch.ones(4, 8)
    one = norm.disturb(x, torch.Generator().manual_seed(1))
    assert torch.equal(one, norm.disturb(x, torch.Generator().manual_seed(1)))
    assert not torch.equal(one, norm.disturb(x, torch.Generator().manual_seed(2)))
    assert (one == 0).any() and torch.equal(FeatureNorm({"image": 8}, FeatureConfig()).disturb(x, torch.Generator()), x)
