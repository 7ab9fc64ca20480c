"""BLIP (arXiv 2201.12086): a text and an image encoder in one checkpoint, with cross-attention between them.

Its retrieval model is what Aurora was made for: as `model.llm` a BLIP checkpoint gives its text encoder, as
`model.encoders` its image encoder. The maps that its own retrieval reads them with come along, see `maps_of`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import BlipForImageTextRetrieval, BlipTextModel, BlipVisionModel, PretrainedConfig, PreTrainedModel

from mitrain.models import loading

Part = Literal["text_encoder", "vision_model"]
PARTS = {"blip_text_model": BlipTextModel, "blip_vision_model": BlipVisionModel}


def is_blip(config: PretrainedConfig) -> bool:
    """Whether it describes the two encoders together, or (a shape without weights) one of them."""
    return config.model_type == "blip" or config.model_type in PARTS


def load(source: str | Path, part: Part, dtype: torch.dtype) -> PreTrainedModel:
    """One encoder of the checkpoint ``source``."""
    options = {"config": loading.read_config(source, "BLIP model"), "dtype": dtype}
    model = loading.load_model(
        BlipForImageTextRetrieval, source, "BLIP model", lambda name: name.startswith(f"{part}."), **options
    )
    encoder = getattr(model, part)
    if part == "text_encoder":
        encoder.retrieval_maps = own_maps(model)  # a plain dictionary: no part of the encoder's state
    return encoder


def own_maps(whole: BlipForImageTextRetrieval) -> dict[str, tuple[Tensor, Tensor]]:
    """(weight, bias) of ``image`` (d, c) and ``text`` (d, D), the projections into BLIP's common space, and of ``match``
    (1, D): how much its matching head's logit of a right pair exceeds that of a wrong one.

    {} for a checkpoint of another task, which lacks them (and they come as zeros).
    """
    linear = {"image": whole.vision_proj, "text": whole.text_proj, "match": whole.itm_head}
    maps = {name: (module.weight.detach(), module.bias.detach()) for name, module in linear.items()}
    if not all(weight.any() for weight, _ in maps.values()):
        return {}
    weight, bias = maps["match"]
    return {**maps, "match": (weight[1:] - weight[:1], bias[1:] - bias[:1])}


def maps_of(model: nn.Module) -> Mapping[str, tuple[Tensor, Tensor]]:
    """`own_maps` of the checkpoint that a text encoder was loaded from; {} where it had none."""
    return getattr(model, "retrieval_maps", {})


def empty(config: PretrainedConfig, part: Part) -> PreTrainedModel:
    """The same without weights."""
    with torch.device("meta"), loading.quiet():
        if config.model_type in PARTS:
            return PARTS[config.model_type](config)
        return getattr(BlipForImageTextRetrieval(config), part)
