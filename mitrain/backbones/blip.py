"""BLIP (arXiv 2201.12086): a text and an image encoder in one checkpoint, with cross-attention between them.

Its retrieval model is what Aurora was made for: as `model.llm` a BLIP checkpoint gives its text encoder, as
`model.vision` its image encoder.
"""

from pathlib import Path
from typing import Literal

import torch
from transformers import (
    BlipForImageTextRetrieval,
    BlipTextModel,
    BlipVisionModel,
    PretrainedConfig,
    PreTrainedModel,
)

from mitrain import hf

Part = Literal["text_encoder", "vision_model"]
PARTS = {"blip_text_model": BlipTextModel, "blip_vision_model": BlipVisionModel}


def is_blip(config: PretrainedConfig) -> bool:
    """Whether it describes the two encoders together, or (a shape without weights) one of them."""
    return config.model_type == "blip" or config.model_type in PARTS


def load(source: str | Path, part: Part, dtype: torch.dtype) -> PreTrainedModel:
    """One encoder of the checkpoint ``source``."""
    options = {"config": hf.read_config(source, "BLIP model"), "dtype": dtype}
    model = hf.load_model(
        BlipForImageTextRetrieval, source, "BLIP model", lambda name: name.startswith(f"{part}."), **options
    )
    return getattr(model, part)


def empty(config: PretrainedConfig, part: Part) -> PreTrainedModel:
    """The same without weights."""
    with torch.device("meta"), hf.quiet():
        if config.model_type in PARTS:
            return PARTS[config.model_type](config)
        return getattr(BlipForImageTextRetrieval(config), part)
