"""BLIP (arXiv 2201.12086): a text and an image encoder in one checkpoint, with cross-attention between them.

Its retrieval model is what Aurora was made for: as `model.llm` a BLIP checkpoint gives its text encoder, as
`model.vision` its image encoder.
"""

from pathlib import Path
from typing import Literal

import torch
from transformers import BlipForImageTextRetrieval, PretrainedConfig, PreTrainedModel

from mitrain import hf

Part = Literal["text_encoder", "vision_model"]


def is_blip(config: PretrainedConfig) -> bool:
    return config.model_type == "blip"


def load(source: str | Path, part: Part, dtype: torch.dtype) -> PreTrainedModel:
    """One encoder of the checkpoint ``source``."""
    options = {"dtype": dtype, "use_safetensors": True}
    return getattr(hf.load(BlipForImageTextRetrieval, source, "BLIP model", **options), part)


def empty(config: PretrainedConfig, part: Part) -> PreTrainedModel:
    """The same without weights."""
    with torch.device("meta"), hf.quiet():
        return getattr(BlipForImageTextRetrieval(config), part)
