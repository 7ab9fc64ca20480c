"""Multiply-accumulates by arithmetic against torch's own counter, and the paper's headline numbers."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, LlamaConfig, LlamaModel

from mitrain.compare.counts import llm_macs, vit_macs
from mitrain.core.errors import ConfigError

LLAMA2_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 80,
}


def test_headline_compute():
    """0.470 T with 43 tokens, as the paper says. It gives no accounting: this comes out with the head at no position (MiT
    pools). Its 4.28 T with 576 visual tokens prepended have the head at every position, and no attention scores."""
    clip, patches = vit_macs(CLIP_L_336)
    maps = 8 * 768 * (4 * 4096 + 11008)  # four of attention and one of the feed-forward part in each of eight layers
    assert round(maps / 8 / 1e9, 3) == 0.021
    assert (round(clip / 1e12, 3), patches) == (0.191, 576)
    assert round((clip + llm_macs(LLAMA2_7B, 43) + maps) / 1e12, 3) == 0.470
    tokens = 43 + 576
    scores = 32 * 4096 * tokens * (tokens + 1)
    assert round((clip + llm_macs(LLAMA2_7B, tokens) - scores + tokens * 32000 * 4096) / 1e12, 2) == 4.28


@pytest.mark.parametrize("more", [{}, {"head_dim": 12, "num_key_value_heads": 1}])
def test_an_llms_equal_torchs_counter(more):
    """On the meta device torch counts dense attention: T² pairs where causal attention has T (T + 1) / 2."""
    tokens, batch = 11, 2
    with torch.device("meta"):
        model = LlamaModel(LlamaConfig(**TINY | more, vocab_size=50))
        ids = torch.zeros(batch, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    hidden = 3 * 6 * more.get("head_dim", 8)
    dense, causal = 2 * tokens**2 * hidden, tokens * (tokens + 1) * hidden
    assert counter.get_total_flops() == 2 * batch * (llm_macs(TINY | more, tokens) - causal + dense)


def test_a_vision_transformers_equal_torchs_counter():
    options = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    config = CLIPVisionConfig(**options, intermediate_size=40, projection_dim=10)
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(config)
        pixels = torch.zeros(1, 3, 56, 56)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=pixels)
    found, patches = vit_macs(config.to_dict())
    assert counter.get_total_flops() == 2 * found and patches == 16
    assert vit_macs({"vision_config": config.to_dict()}, 56) == (found, 16)
    assert vit_macs(config.to_dict(), 28)[0] < found


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: llm_macs(TINY | {"num_hidden_layers": None}, 4), "num_hidden_layers=None"),
        (lambda: llm_macs(TINY | {"head_dim": "many"}, 4), "head_dim='many'"),
        (lambda: llm_macs(TINY | {"intermediate_size": 0}, 4), "intermediate_size=0"),
        (lambda: vit_macs({"model_type": "resnet"}), "'resnet' is no vision transformer"),
    ],
)
def test_impossible_values_are_refused(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
