"""Tiny random encoders of every family whose layers are run one by one, and small inputs for them."""

from functools import partial

import torch
from tiny import COMMON, VOCABULARY
from torch import Tensor
from transformers import (
    AutoModel,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    WhisperConfig,
    WhisperModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZE, PATCH, FRAMES = 8, 4, 7
LAYERS = {name: COMMON[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
SHAPE = {**LAYERS, "intermediate_size": 48, "initializer_range": 0.3}
TOKENS = {**SHAPE, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
PIXELS = {**SHAPE, "image_size": SIZE, "patch_size": PATCH}
TEXTS: dict[str, dict] = {
    "bert": TOKENS,
    "roberta": TOKENS,
    "xlm-roberta": TOKENS,
    "camembert": TOKENS,
    "electra": {**TOKENS, "embedding_size": 12},
    "distilbert": {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCABULARY},
    "blip_text_model": {**TOKENS, "encoder_hidden_size": 32, "is_decoder": False},
    "modernbert": {
        **TOKENS,
        "local_attention": 4,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
IMAGES: dict[str, dict] = {
    "vit": PIXELS,
    "deit": PIXELS,
    "dinov2": {**PIXELS, "layerscale_value": 0.7},
    "dinov2_with_registers": {**PIXELS, "num_register_tokens": 2},
    "clip_vision_model": {**PIXELS, "projection_dim": 6},
    "siglip_vision_model": PIXELS,
    "blip_vision_model": PIXELS,
}
RAW = {**SHAPE, "conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (80, 2), "num_conv_pos_embeddings": 6}
SOUNDS: dict[str, dict] = {
    "whisper": {},
    "wav2vec2": {**RAW, "num_conv_pos_embedding_groups": 2},
    "hubert": {**RAW, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
    "audio-spectrogram-transformer": {**SHAPE, "num_mel_bins": 8, "max_length": 24, "patch_size": 4},
}
NOT_AUTO = {
    "clip_vision_model": (CLIPVisionModel, CLIPVisionConfig),
    "siglip_vision_model": (SiglipVisionModel, SiglipVisionConfig),
    "blip_vision_model": (BlipVisionModel, BlipVisionConfig),
    "blip_text_model": (partial(BlipTextModel, add_pooling_layer=False), BlipTextConfig),
}
WHISPER = {
    **{"d_model": 32, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 5},
    **{"decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "max_source_positions": FRAMES},
    **{"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "init_std": 0.3},
    **{"decoder_start_token_id": 1},
}


def tiny_encoder(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A text, image or (whisper) sound encoder of depth 4 and width 32 with random weights, in eval mode."""
    torch.manual_seed(seed)
    if name == "whisper":
        return WhisperModel(WhisperConfig(**{**WHISPER, **changes})).encoder.to(dtype).eval()
    kind, settings = NOT_AUTO[name] if name in NOT_AUTO else (AutoModel.from_config, CONFIG_MAPPING[name])
    model = kind(settings(**{**TEXTS, **IMAGES, **SOUNDS}[name] | changes))
    with torch.no_grad():  # norms that differ from the identity, so that one left out or doubled shows
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def pixels(rows: int = 3, seed: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(rows, 3, SIZE, SIZE, generator=generator, dtype=dtype)}


def sound(rows: int = 3, seed: int = 5, dtype: torch.dtype = torch.float32, name: str = "whisper") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"whisper": (WHISPER["num_mel_bins"], 2 * FRAMES), "audio-spectrogram-transformer": (24, 8)}
    clips = torch.randn(rows, *shapes.get(name, (1600,)), generator=generator, dtype=dtype)
    return {"input_features" if name == "whisper" else "input_values": clips}
