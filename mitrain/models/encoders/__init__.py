"""Frozen encoders, by the kind of input that they take: each makes one vector of a sample."""

from pathlib import Path

import torch

from mitrain.models.encoders.arrays import ArrayConfig, ArrayEncoder
from mitrain.models.encoders.audio import AudioConfig, AudioEncoder
from mitrain.models.encoders.base import Encoder
from mitrain.models.encoders.config import EncoderConfig
from mitrain.models.encoders.image import ImageConfig, ImageEncoder
from mitrain.models.encoders.text import TextEncoder, TextEncoderConfig
from mitrain.models.encoders.video import VideoConfig, VideoEncoder
from mitrain.models.stream import Shard

ENCODERS: dict[str, tuple[type[EncoderConfig], type[Encoder]]] = {
    "image": (ImageConfig, ImageEncoder),
    "audio": (AudioConfig, AudioEncoder),
    "video": (VideoConfig, VideoEncoder),
    "text": (TextEncoderConfig, TextEncoder),
    "features": (ArrayConfig, ArrayEncoder),
}
"""What an encoder ``takes`` → its section, its class."""


def encoder_of(
    config: EncoderConfig,
    folder: str | Path | None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    shard: Shard | None = None,
) -> Encoder:
    """The encoder that ``config`` describes, its weights from ``folder`` (none: from where its name leads)."""
    return ENCODERS[config.takes][1](config, folder, dtype, device, shard)
