"""Frozen image encoders: preprocessing, pooled features, levels, refusals."""

import json
import shutil

import numpy as np
import pytest
import torch
from folders import vision_folder
from PIL import Image
from tiny_encoders import tiny_encoder
from transformers import (
    AlignConfig,
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
)

from mitrain.core.errors import ConfigError, ModelError
from mitrain.models import ImageConfig, ImageEncoder, loading
from mitrain.models.digests import frozen_digest
from mitrain.models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel
from mitrain.models.encoders import image as module
from mitrain.models.encoders.image import VIEWS, Preprocess, augment, pad_square


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return vision_folder(tmp_path_factory.mktemp("vision") / "dinov2")


def images(count: int = 3) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (30, 40, 3), np.uint8)) for _ in range(count)]


def encoder(folder, **settings) -> ImageEncoder:
    return ImageEncoder(ImageConfig(name=str(folder), **settings), folder)


def test_dinov2_gives_its_cls_by_default(dinov2):
    found = encoder(dinov2)
    out = found.encode(images())
    pixels = torch.stack([found.preprocess(i) for i in images()])
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2)(pixel_values=pixels).pooler_output
    assert found.width == 24
    torch.testing.assert_close(out["pooled"], expected)


@pytest.mark.parametrize(("pool", "width"), [("cls", 24), ("mean", 24), ("cls+mean", 48)])
def test_an_inner_layer_is_read_before_the_last_norm(dinov2, pool, width):
    found = encoder(dinov2, layer=2, pool=pool)
    pixels = torch.stack([found.preprocess(i) for i in images()])
    with torch.no_grad():
        states = Dinov2Model.from_pretrained(dinov2)(pixel_values=pixels, output_hidden_states=True).hidden_states[2]
    parts = {"cls": states[:, 0], "mean": states[:, 1:].mean(1)}
    expected = torch.cat([parts[p] for p in pool.split("+")], -1)
    out = found.encode(images())["pooled"]
    assert out.shape == (3, width) and found.width == width
    torch.testing.assert_close(out, expected)
    assert len(found.model.encoder.layer) == 2  # what is not read does not run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    def folder(name: str):
        path = tmp_path_factory.mktemp(name)
        tiny_encoder(name, image_size=16).save_pretrained(path)
        return path

    return folder


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2_with_registers", "siglip_vision_model"])
def test_the_tokens_before_the_patches_are_counted(saved, name):
    found = encoder(saved(name), size=16, levels=[2])
    assert found.encode(images(1))["levels"].shape[2] == found.prefix_tokens + found.grid**2


@pytest.mark.parametrize("settings", [{"pool": "cls"}, {"pool": "cls+mean"}, {"layer": 2}])
def test_the_first_patch_is_not_taken_for_a_cls_token(saved, settings):
    folder = saved("siglip_vision_model")
    with pytest.raises(ConfigError, match="has no CLS token: give pool=mean"):
        encoder(folder, size=16, **settings)
    assert encoder(folder, size=16, layer=2, pool="mean").encode(images())["pooled"].shape == (3, 32)


def test_levels_are_hidden_states_with_their_prefix(dinov2):
    found = encoder(dinov2, levels=[3, 1], pool="cls", layer=3)
    out = found.encode(images())["levels"]
    pixels = torch.stack([found.preprocess(i) for i in images()])
    with torch.no_grad():
        hidden = Dinov2Model.from_pretrained(dinov2)(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert out.shape == (3, 2, found.prefix_tokens + found.grid**2, found.level_width)
    torch.testing.assert_close(out[:, 0], hidden[3])
    torch.testing.assert_close(out[:, 1], hidden[1])


def test_clip_gives_its_projected_feature(tmp_path):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=10,
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(tmp_path / "clip")
    found = encoder(tmp_path / "clip")
    pixels = torch.stack([found.preprocess(i) for i in images()])
    with torch.no_grad():
        expected = model(pixel_values=pixels).image_embeds
    assert found.width == 10
    torch.testing.assert_close(found.encode(images())["pooled"], expected)
    assert found.preprocess.mean[0] == pytest.approx(0.4815, abs=1e-4)


def test_the_image_encoder_of_a_model_of_texts_and_pictures_is_read(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    seen, read = shape | {"image_size": 28, "patch_size": 14}, shape | {"vocab_size": 9, "max_position_embeddings": 8}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=read, vision_config=seen)).eval()
    model.save_pretrained(tmp_path)
    found = encoder(tmp_path)
    pixels = torch.stack([found.preprocess(i) for i in images()])
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(found.encode(images())["pooled"], expected)
    config = AlignConfig().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="holds more than an image encoder .align."):
        encoder(tmp_path)


def test_an_encoder_of_other_channels_is_refused(tmp_path):
    tiny_encoder("vit", image_size=16, num_channels=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="takes pictures of 1 channels, not of three"):
        encoder(tmp_path, size=16)


def test_encoders_of_stages(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ResNetModel(config).save_pretrained(tmp_path / "resnet")
    found = encoder(tmp_path / "resnet", size=32)
    assert found.encode(images())["pooled"].shape == (3, found.width) == (3, 16)
    config = ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    ConvNextModel(config).save_pretrained(tmp_path / "convnext")
    with pytest.raises(ModelError, match=r"cannot take pictures of 28 × 28 .*: give another size"):
        encoder(tmp_path / "convnext", size=28).encode(images())


@pytest.mark.parametrize("at", ["folder", "id in the cache", "processor_config.json"])
def test_pictures_are_normalised_as_the_checkpoint_says(dinov2, tmp_path, monkeypatch, caplog, at):
    commit = tmp_path / "models--owner--seer" / "snapshots" / "c0"
    shutil.copytree(dinov2, commit)
    (tmp_path / "models--owner--seer" / "refs").mkdir()
    (tmp_path / "models--owner--seer" / "refs" / "main").write_text("c0")
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    if at == "processor_config.json":
        (commit / at).write_text(json.dumps({"image_processor": values}))
    else:
        (commit / "preprocessor_config.json").write_text(json.dumps(values))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = "owner/seer" if at == "id in the cache" else str(commit)
    found = ImageEncoder(ImageConfig(name=name), None).preprocess
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) and not caplog.text


def test_pixels_that_are_not_normalised_stay_as_they_are(dinov2, tmp_path):
    shutil.copytree(dinov2, tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false, "image_mean": [0.5, 0.5, 0.5]}')
    pixels = encoder(tmp_path).preprocess(Image.new("RGB", (28, 28), (51, 102, 255)))
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([0.2, 0.4, 1.0]))
    for wrong in ('{"rescale_factor": 1}', '{"do_rescale": false}', '{"do_normalize": false, "rescale_factor": 1}'):
        (tmp_path / "preprocessor_config.json").write_text(wrong)
        with pytest.raises(ModelError, match="does not scale pixels to 0 … 1"):
            encoder(tmp_path)


@pytest.mark.parametrize(("name", "mean", "said"), [("siglip_vision_model", 0.5, False), ("vit", 0.485, True)])
def test_a_guess_of_the_normalisation_is_said(saved, caplog, name, mean, said):
    assert encoder(saved(name), size=16).preprocess.mean[0] == mean
    assert ("has no preprocessor_config.json" in caplog.text) == said


def test_frozen_and_without_gradients(dinov2):
    found = encoder(dinov2)
    assert not found.model.training and not any(p.requires_grad for p in found.model.parameters())
    assert not found.encode(images())["pooled"].requires_grad


RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24], depths=[1, 1, 1], layer_type="basic")
LITE = EfficientNetLiteConfig(stem_channels=8, hidden_size=24, stages=((1, 3, 1, 1, 8), (2, 5, 2, 6, 16), (1, 3, 1, 6, 24)))


def convolutional(config, folder):
    torch.manual_seed(0)
    model = (ResNetModel if isinstance(config, ResNetConfig) else EfficientNetLiteModel)(config).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    return model


@pytest.mark.parametrize(("config", "layer", "width"), [(RESNET, 2, 16), (LITE, 3, 16), (LITE, 1, 8)])
def test_an_inner_layer_of_a_convolutional_encoder_is_the_mean_of_its_feature_map(tmp_path, config, layer, width):
    model = convolutional(config, tmp_path)
    found = encoder(tmp_path, size=64, layer=layer)
    pixels = torch.stack([found.preprocess(i) for i in images()])
    with torch.no_grad():
        expected = model(pixel_values=pixels, output_hidden_states=True).hidden_states[layer].mean((2, 3))
    assert found.width == width
    torch.testing.assert_close(found.encode(images())["pooled"], expected)
    if config is LITE:
        assert len(found.model.blocks) == layer  # what is not read does not run


@pytest.mark.parametrize(("config", "layer"), [(RESNET, None), (LITE, None), (LITE, 1)])
def test_the_places_of_a_feature_map_are_tokens(tmp_path, config, layer):
    model = convolutional(config, tmp_path)
    found = encoder(tmp_path, size=64, layer=layer)
    pixels = torch.stack([found.preprocess(i) for i in images()])
    with torch.no_grad():
        out = model(pixel_values=pixels, output_hidden_states=True)
        expected = out.hidden_states[layer] if layer else out.last_hidden_state
    tokens = found.entering(0, images())
    assert found.feature_map and tokens.shape == (3, found.tokens, found.width)
    side = expected.shape[-1]
    torch.testing.assert_close(tokens[:, 1 * side + 2], expected[:, :, 1, 2])
    torch.testing.assert_close(tokens.mean(1), found.encode(images())["pooled"])
    assert not encoder(tmp_path, size=64, layer=2).feature_map or config is LITE


@pytest.mark.parametrize(("layer", "words"), [(4, "has 3 layers, not a layer 4: give one of 1..3")])
def test_a_layer_that_a_convolutional_encoder_has_not_is_one_line(tmp_path, layer, words):
    convolutional(RESNET, tmp_path)
    with pytest.raises(ConfigError, match=words):
        encoder(tmp_path, size=64, layer=layer)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"levels": [9]}, "has 3 layers, not a layer 9"),
        ({"size": 30}, "no multiple of its patch 14: give 28"),
    ],
)
def test_what_does_not_fit_is_one_line(dinov2, settings, words):
    with pytest.raises(ConfigError, match=words):
        encoder(dinov2, **settings)


def test_a_folder_that_is_no_model_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dinov2", "auto_map": {"AutoModel": "evil.Model"}}')
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ModelError, match="cannot load the image encoder") as error:
        encoder(tmp_path)
    assert "\n" not in str(error.value)


def test_views_are_deterministic_and_differ():
    image = images(1)[0]
    views = [np.asarray(augment(image, view).resize((28, 28))) for view in range(VIEWS)]
    again = [np.asarray(augment(image, view).resize((28, 28))) for view in range(VIEWS)]
    for i in range(VIEWS):
        np.testing.assert_array_equal(views[i], again[i])
        assert all((views[i] != views[j]).any() for j in range(i))
    np.testing.assert_array_equal(np.asarray(augment(image, 1)), np.asarray(image)[:, ::-1])


def test_padding_keeps_the_picture_and_its_shape():
    image = images(1)[0]
    padded = np.asarray(pad_square(image))
    assert padded.shape == (40, 40, 3) and (padded[:5] == 255).all()
    np.testing.assert_array_equal(padded[5:35], np.asarray(image))


@pytest.mark.parametrize("resize", ["squash", "pad"])
@pytest.mark.parametrize("size", [(40_000, 1), (1, 100_000)])
def test_what_is_made_of_a_thin_picture_is_bounded(monkeypatch, size, resize):
    image, made, new, scale = Image.new("RGB", size, "red"), [], Image.new, Image.Image.resize

    def resized(self, shape, *rest):
        made.append(shape[0] * self.height)  # PIL scales the width of all rows first
        return scale(self, shape, *rest)

    monkeypatch.setattr(Image, "new", lambda mode, shape, *rest: made.append(shape[0] * shape[1]) or new(mode, shape, *rest))
    monkeypatch.setattr(Image.Image, "resize", resized)
    monkeypatch.setattr(module, "LONGEST", 512)
    preprocess = Preprocess(28, (0.0,) * 3, (1.0,) * 3, resize)
    for view in range(VIEWS):
        pixels = preprocess(image, view)
        padded = resize == "pad" or view // 2 == 1
        assert pixels.shape == (3, 28, 28) and (pixels[0] == 1).all()
        assert pixels[1].mean() > 0.9 if padded else (pixels[1] == 0).all()
    assert max(made) <= 512**2


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_the_bound_changes_no_ordinary_picture(resize):
    """Features of earlier versions stay what they were: padded whole, then scaled."""
    image = images(1)[0].resize((900, 301))
    preprocess = Preprocess(56, (0.0,) * 3, (1.0,) * 3, resize)
    for view in range(VIEWS):
        plain = augment(image, view)
        if resize == "pad":
            canvas = Image.new("RGB", (max(plain.size),) * 2, "white")
            canvas.paste(plain, ((canvas.width - plain.width) // 2, (canvas.height - plain.height) // 2))
            plain = canvas
        expected = np.asarray(plain.resize((56, 56), Image.Resampling.BICUBIC), np.float32) / 255
        assert np.array_equal(preprocess(image, view).numpy(), expected.transpose(2, 0, 1))


def test_the_digest_names_the_weights(dinov2):
    one, two = encoder(dinov2), encoder(dinov2)
    assert frozen_digest(one.model) == frozen_digest(two.model)
    with torch.no_grad():
        next(two.model.parameters()).view(-1)[0] += 1e-3
    assert frozen_digest(one.model) != frozen_digest(two.model)
    assert encoder(dinov2, size=42).identity() != one.identity()


def test_no_hub_is_asked_for_a_name_that_is_not_here(monkeypatch):
    asked = []
    monkeypatch.setattr("httpx.Client.send", lambda *given, **more: asked.append(given) or 1 / 0)
    monkeypatch.setattr("socket.getaddrinfo", lambda *given, **more: asked.append(given) or 1 / 0)
    for factory, source in ((AutoModel, "no-such/model"), (AutoConfig, "nosuchmodel")):
        with pytest.raises(ModelError, match="cannot load"):
            loading.load(factory, source, "image encoder")
    with pytest.raises(ModelError, match="cannot load"):
        loading.read_config("no-such/model", "image encoder")
    assert not asked
