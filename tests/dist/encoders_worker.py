"""What the ranks of test_encoders_in_shards.py do."""

import json
from pathlib import Path

import numpy as np
import torch

from mitrain.core import dist
from mitrain.data.audio import Sound
from mitrain.data.video import Video
from mitrain.models import loading
from mitrain.models.encoders import AudioConfig, Encoder, EncoderConfig, VideoConfig, encoder_of
from mitrain.training.engine import OptimizerConfig, ZeroConfig
from mitrain.training.engine.zero import gather_as_needed, sharding
from PIL import Image

LENGTHS = ((800, 1600, 2400, 30_000), (800,))
"""Samples of the clips of each rank: the first has more, and of more lengths."""
FACTS = {"digest": "", "where": "", "stored_size": (1, 1)}


def clip(length: int) -> Sound:
    samples = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    return Sound(samples=samples, rate=16_000, **FACTS)


def shown(length: int) -> Video:
    frames = tuple(Image.new("RGB", (28, 28), (length % 255, n, 0)) for n in (0, 200))
    return Video(frames=frames, times=(0, 1), **FACTS)


def encoded(config: EncoderConfig, samples: list, sharded: bool) -> tuple[Encoder, torch.Tensor]:
    zero = ZeroConfig(stage=3 if sharded else 0)
    found = encoder_of(config, config.name, shard=sharding(zero, OptimizerConfig()))
    if sharded:
        gather_as_needed({"encoder": found.model}, zero)
    return found, found.encode(samples)["pooled"]


def compare(out: str, *folders: str) -> None:
    with dist.process_group():
        own = LENGTHS[dist.rank()]
        said = {}
        for folder in folders:
            video = Path(folder).name == "dinov2"
            config = VideoConfig(name=folder, frames=2) if video else AudioConfig(name=folder)
            samples = [shown(n) if video else clip(n) for n in own]
            found, pooled = encoded(config, samples, sharded=True)
            _, plain = encoded(config, samples, sharded=False)
            held = loading.holds_shards(found)
            said[Path(folder).name] = {"sharded": held, "off": float((pooled - plain).abs().max()), "rows": len(pooled)}
        Path(out, f"{dist.rank()}.json").write_text(json.dumps(said))
