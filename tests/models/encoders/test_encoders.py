"""What every encoder owes to those who store features: a blank sample, undecoded samples, equal rounds in shards."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import VideoMAEConfig, Wav2Vec2Config

from mitrain.core import dist
from mitrain.data.arrays import Array
from mitrain.data.audio import AudioLimits, Sound
from mitrain.data.video import Video, VideoLimits
from mitrain.models import loading
from mitrain.models.encoders import ENCODERS, ArrayConfig, AudioConfig, Encoder, VideoConfig, encoder_of

SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
RAW = {"conv_dim": [8, 8], "conv_kernel": [10, 8], "conv_stride": [5, 64], "num_conv_pos_embeddings": 2}
FACTS = {"digest": "", "where": "", "stored_size": (1, 1)}
SAMPLES = {
    "audio": [Sound(samples=np.ones(n, np.float32), rate=16_000, **FACTS) for n in (800, 1600, 800)],
    "features": [Array(values=np.full((2, 3), n, np.float32), **FACTS) for n in range(3)],
    "video": [Video(frames=(Image.new("RGB", (28, 28), c),) * 2, times=(0, 1), **FACTS) for c in ("red", "blue", "red")],
}


def made(takes: str) -> Encoder:
    """An encoder with random weights, in place of those that a shape has not."""
    raw = Wav2Vec2Config(**SHAPE, **RAW, num_conv_pos_embedding_groups=1).to_dict()
    frames = VideoMAEConfig(**SHAPE, image_size=28, patch_size=14, num_frames=2).to_dict()
    config = {
        "audio": lambda: AudioConfig(name="x", shape=raw),
        "features": lambda: ArrayConfig(width=3),
        "video": lambda: VideoConfig(name="x", shape=frames),
    }[takes]()
    found = encoder_of(config, None)
    torch.manual_seed(0)
    found.model.to_empty(device="cpu")
    for tensor in found.model.state_dict().values():
        tensor.normal_(0, 0.1) if tensor.is_floating_point() else tensor.zero_()
    return found


@pytest.mark.parametrize("takes", SAMPLES)
def test_samples_may_be_given_as_they_are_or_preprocessed(takes):
    found, samples = made(takes), SAMPLES[takes]
    pooled = found.encode(samples)["pooled"]
    assert pooled.shape == (3, found.width) and isinstance(found, ENCODERS[takes][1])
    torch.testing.assert_close(found.encode([found.preprocess(sample) for sample in samples])["pooled"], pooled)
    assert found.encode([found.blank()])["pooled"].shape == (1, found.width)
    assert samples[0].content() is samples[0]


@pytest.mark.parametrize(("takes", "own", "others"), [("audio", 2, 5), ("video", 1, 3)])
def test_with_weights_in_shards_every_rank_runs_the_model_equally_often(monkeypatch, takes, own, others):
    found, runs = made(takes), []
    expected = found.encode(SAMPLES[takes])["pooled"]
    found.model.register_forward_pre_hook(lambda *_: runs.append(1))
    found.encode(SAMPLES[takes])
    assert len(runs) == own
    monkeypatch.setattr(loading, "holds_shards", lambda module: True)
    monkeypatch.setattr(dist, "gather", lambda mine: [mine, others])  # a rank with more clips, of more lengths
    torch.testing.assert_close(found.encode(SAMPLES[takes])["pooled"], expected)
    assert len(runs) == own + others


def test_a_module_without_weights_holds_no_shards():
    assert not loading.holds_shards(made("features"))


def test_what_is_known_of_a_file_is_held_to_its_limits():
    sound = Sound(samples=np.ones(1, np.float32), rate=1, digest="", where="", stored_size=(16_001, 16_000))
    assert AudioLimits(seconds=2).admits(sound) and not AudioLimits(seconds=1).admits(sound)
    assert not AudioLimits(rate=8000).admits(sound)
    video = Video(frames=(), times=(), digest="", where="", stored_size=(100, 2500))
    assert VideoLimits(pixels=100, seconds=3).admits(video)
    assert not VideoLimits(pixels=99).admits(video) and not VideoLimits(seconds=2).admits(video)
