"""Frozen encoders of video: features are the model's own, the same alone and in any batch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import video
from folders import vision_folder
from PIL import Image
from transformers import AutoModel, VideoMAEConfig, VideoMAEModel, VivitConfig, VivitModel

from mitrain.core.errors import ConfigError, ModelError
from mitrain.data.video import Video, read_video
from mitrain.models import ImageConfig, ImageEncoder
from mitrain.models.encoders import VideoConfig, VideoEncoder, encoder_of

SHAPE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
SHAPE |= {"image_size": 28, "num_frames": 4, "initializer_range": 0.3}
MODELS = {
    "videomae": (VideoMAEModel, VideoMAEConfig(**SHAPE, patch_size=14, tubelet_size=2, use_mean_pooling=False)),
    "vivit": (VivitModel, VivitConfig(**SHAPE, tubelet_size=[2, 14, 14])),
}
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            if name == "dinov2":
                vision_folder(folders[name])
            else:
                model, config = MODELS[name]
                model(config).save_pretrained(folders[name])
        return folders[name]

    return folder


def encoder(folder, **settings) -> VideoEncoder:
    return encoder_of(VideoConfig(name=str(folder), **settings), folder)


def shown(count: int = 4, seed: int = 0) -> Video:
    generator = np.random.default_rng(seed)
    frames = [Image.fromarray(generator.integers(0, 255, (28, 28, 3), np.uint8)) for _ in range(count)]
    return Video(digest="", stored_size=(1, 1), where="'a.mkv'", frames=tuple(frames), times=tuple(range(count)))


def features(found: VideoEncoder, videos: list[Video], view: int = 0) -> torch.Tensor:
    return found.encode([found.preprocess(v, view) for v in videos], [view] * len(videos))["pooled"]


def states(folder: Path, pixels: torch.Tensor, layer: int | None = None) -> torch.Tensor:
    """(T, D): what transformers makes of the frames (N, 3, S, S) of one video."""
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(pixel_values=pixels[None], output_hidden_states=True)
    return (out.last_hidden_state if layer is None else out.hidden_states[layer])[0]


@pytest.mark.parametrize(("name", "pool"), [("videomae", "auto"), ("vivit", "auto"), ("vivit", "mean+std")])
def test_features_are_what_transformers_gives(saved, name, pool):
    found = encoder(saved(name), pool=pool)
    hidden = states(saved(name), found.preprocess(shown()))
    if pool == "mean+std":
        expected = torch.cat([hidden[1:].mean(0), hidden[1:].std(0, correction=0)])
    else:
        expected = hidden[0] if name == "vivit" else hidden.mean(0)
    assert (found.frames, found.width, found.depth, found.family) == (4, len(expected), 3, name)
    torch.testing.assert_close(features(found, [shown()])[0], expected, atol=2e-6, rtol=1e-5)


def test_pixels_are_normalised_as_each_family_was_trained(saved, tmp_path):
    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in shown().frames])).permute(0, 3, 1, 2) / 255
    mean, std = IMAGENET[..., None, None]
    torch.testing.assert_close(encoder(saved("videomae")).preprocess(shown()), (pixels - mean) / std)
    halves = ((pixels * 255 / 127.5 - 1) - 0.5) / 0.5
    torch.testing.assert_close(encoder(saved("vivit")).preprocess(shown()), halves, atol=1e-5, rtol=1e-5)
    MODELS["vivit"][0](MODELS["vivit"][1]).save_pretrained(tmp_path)
    own = {"rescale_factor": 1 / 127.5, "offset": True, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    expected = ((pixels * 255 / 127.5 - 1) - 0.1) / 0.2
    torch.testing.assert_close(encoder(tmp_path).preprocess(shown()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["auto", "mean"])
def test_an_image_encoder_reads_the_frames_one_by_one(saved, pool):
    found = encoder(saved("dinov2"), frames=5, pool=pool, image_pool="cls+mean", layer=2)
    config = ImageConfig(name=str(saved("dinov2")), pool="cls+mean", layer=2)
    frames = ImageEncoder(config, saved("dinov2")).encode(shown(5).frames)["pooled"]
    parts = [frames.mean(0), frames.std(0, correction=0)][: 1 if pool == "mean" else 2]
    assert found.width == 48 * len(parts) and found.family == "dinov2"
    torch.testing.assert_close(features(found, [shown(5)])[0], torch.cat(parts), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["videomae", "vivit", "dinov2"])
def test_a_feature_is_the_same_alone_and_in_any_batch(saved, monkeypatch, name):
    monkeypatch.setattr("mitrain.models.encoders.video.TOGETHER", 8)
    found, videos = encoder(saved(name), frames=4), [shown(seed=seed) for seed in range(3)]
    alone = torch.cat([features(found, [one]) for one in videos])
    rounding = 16 * torch.finfo(torch.float32).eps * float(alone.abs().max())
    torch.testing.assert_close(features(found, videos), alone, atol=rounding, rtol=0)
    torch.testing.assert_close(features(found, videos[::-1]), alone.flip(0), atol=rounding, rtol=0)
    assert (features(found, videos, view=1) - alone).abs().max() > 1e-3 and found.views == 6


@pytest.mark.parametrize("name", ["videomae", "vivit"])
@pytest.mark.parametrize("layer", [1, 3])
def test_an_inner_layer_is_read_before_the_last_norm(saved, name, layer):
    found = encoder(saved(name), layer=layer)
    model, seen = AutoModel.from_pretrained(saved(name)).eval(), []
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3]
    lists[0][layer - 1].register_forward_hook(lambda _, inputs, out: seen.append(out if torch.is_tensor(out) else out[0]))
    with torch.no_grad():
        model(pixel_values=found.preprocess(shown())[None])
    expected = seen[0][0, 0] if name == "vivit" else seen[0][0].mean(0)
    torch.testing.assert_close(features(found, [shown()])[0], expected, atol=2e-6, rtol=1e-5)


def test_from_a_file_to_its_feature(saved, tmp_path):
    (tmp_path / "a.mkv").write_bytes(video())
    found = encoder(saved("videomae"))
    pooled = features(found, [read_video(tmp_path, "a.mkv", found.frames)])
    assert pooled.shape == (1, 24) and pooled.isfinite().all()


def test_what_does_not_fit_is_one_line(saved):
    for settings, words in (
        ({"frames": 8}, "was made for frames=4, not 8"),
        ({"size": 56}, "was made for size=28, not 56"),
        ({"layer": 4}, "has 3 layers, not a layer 4"),
        ({"image_pool": "cls"}, "image_pool is for image encoders"),
    ):
        with pytest.raises(ConfigError, match=words):
            encoder(saved("videomae"), **settings)
    with pytest.raises(ModelError, match="takes 4 frames, not 5"):
        encoder(saved("vivit")).preprocess(shown(5))


def test_the_identity_changes_with_what_is_computed(saved):
    found = encoder(saved("dinov2"))
    assert found.identity() == encoder(saved("dinov2")).identity() and json.dumps([found.identity(), found.base()])
    for changes in ({"frames": 9}, {"pool": "mean"}, {"image_pool": "mean"}, {"resize": "pad"}, {"layer": 2}):
        assert encoder(saved("dinov2"), **changes).identity() != found.identity()


@pytest.mark.parametrize("name", MODELS)
def test_without_weights_its_sizes_are_known(name):
    shape = {"model_type": name, **SHAPE, **({"patch_size": 14} if name == "videomae" else {})}
    found = VideoEncoder(VideoConfig(name="x", shape=shape), None)
    assert (found.width, found.frames) == (24, 4) and next(found.parameters()).is_meta
