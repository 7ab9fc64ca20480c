"""Tiny random pairs of a text model and an image encoder, and one batch for them."""

import torch
from modalities import pictures
from tiny import COMMON, text, tiny
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    BlipConfig,
    BlipForImageTextRetrieval,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
)

from mitrain.methods.aurora.aurora import Aurora
from mitrain.methods.aurora.config import AuroraConfig
from mitrain.models.batch import ModalityInputs, TextBatch
from mitrain.models.frozen import trunk_states

WIDTH, DEPTH = 16, 3
SMALL = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
PIXELS = {"image_size": 8, "patch_size": 4}
WORDS = {**{k: COMMON[k] for k in ("vocab_size", "max_position_embeddings", "initializer_range")}, **SMALL}


def dinov2(dtype: torch.dtype, width: int = WIDTH) -> PreTrainedModel:
    torch.manual_seed(4)
    size = {**SMALL, "hidden_size": width}
    config = Dinov2Config(**size, **PIXELS, initializer_range=0.3, mlp_ratio=4, layerscale_value=0.7)
    return Dinov2Model(config).to(dtype).eval()


def bert(dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(5)
    return BertModel(BertConfig(**WORDS, intermediate_size=4 * WIDTH), add_pooling_layer=False).to(dtype).eval()


def blip(dtype: torch.dtype) -> BlipForImageTextRetrieval:
    torch.manual_seed(6)
    words = {**WORDS, "intermediate_size": 4 * WIDTH, "encoder_hidden_size": WIDTH, "pad_token_id": 0}
    words["bos_token_id"] = words["vocab_size"] - 2  # [DEC], and behind it [ENC], as BLIP has them
    seen = {**SMALL, **PIXELS, "intermediate_size": 4 * WIDTH, "initializer_range": 0.3}
    config = BlipConfig(text_config=words, vision_config=seen, image_text_hidden_size=8)
    return BlipForImageTextRetrieval(config).to(dtype).eval()


def pair(kind: str = "bert", dtype: torch.dtype = torch.float64) -> dict[str, PreTrainedModel]:
    """``bert`` with DINOv2 of its width, ``llama`` with a narrower one, or the two halves of a ``blip``."""
    if kind == "blip":
        model = blip(dtype)
        return {"text": model.text_encoder, "encoder": model.vision_model}
    if kind == "llama":
        return {"text": tiny("llama", dtype), "encoder": dinov2(dtype)}
    return {"text": bert(dtype), "encoder": dinov2(dtype)}


def pixels(rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(7), dtype=dtype)


def batch(
    backbones: dict[str, PreTrainedModel], rows: int = 3, padding: str | None = "right"
) -> tuple[TextBatch, ModalityInputs]:
    """Texts of 9 tokens, two of them shorter, and pictures by what enters the image encoder's layers."""
    dtype = backbones["encoder"].dtype
    given = text(rows, 9, padding)
    states = trunk_states(backbones["encoder"], 0, pixel_values=pixels(rows, dtype))
    return TextBatch(given["input_ids"], given["attention_mask"]), pictures(torch.zeros(rows, 2, dtype=dtype), states)


def aurora(backbones: dict[str, PreTrainedModel], seed: int = 0, **settings: object) -> Aurora:
    """An attached Aurora of rank 3 with no dropout, unless ``settings`` say otherwise."""
    torch.manual_seed(seed)
    adapter = Aurora(AuroraConfig(**{"rank": 3, "dropout": 0.0, **settings}))
    return adapter.attach(backbones)
