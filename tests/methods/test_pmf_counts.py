"""PMF's parameters on the paper's own backbones, counted without weights."""

import pytest
from closed_forms import pmf_parameters
from transformers import AutoModel, BertConfig, PreTrainedModel, ViTConfig

from mitrain.methods.pmf.pmf import PMF, PMFConfig
from mitrain.models import loading

CLASSES = 101  # of UPMC Food-101
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def backbones(**sizes: int) -> dict[str, PreTrainedModel]:
    """bert-*-uncased and vit-*-patch16-224."""
    return {
        "text": loading.empty_model(AutoModel, BertConfig(**sizes)),
        "encoder": loading.empty_model(AutoModel, ViTConfig(**sizes)),
    }


@pytest.fixture(scope="module")
def base():
    return backbones()


def trained(models, config):
    adapter = PMF(config)
    adapter.attach(models)
    found = sum(p.numel() for p in adapter.parameters())
    assert {p.device.type for p in adapter.parameters()} == {"meta"}
    adapter.detach()
    return found


def heads(width):
    return 2 * (width * CLASSES + CLASSES)


# L_f · [6 · M · 768 prompts + two maps 768 → 384 → 768], in millions with the task's two heads, as published
@pytest.mark.parametrize(("layers", "millions"), [(1, 1.36), (2, 2.56), (3, 3.76), (4, 4.96), (5, 6.16), (12, 14.56)])
def test_base_encoders(base, layers, millions):
    config = PMFConfig(fusion_layers=layers)
    expected = layers * (6 * 4 * 768 + 2 * (768 * 384 + 384 + 384 * 768 + 768))
    assert trained(base, config) == pmf_parameters(config, 768, 768) == expected
    assert round((expected + heads(768)) / 1e6, 2) == millions


def test_the_share_of_all_parameters(base):
    sizes = [loading.count_parameters(model) for model in base.values()]
    assert [round(size / 1e6, 2) for size in sizes] == [109.48, 86.39]
    shares = {}
    for layers in (1, 2, 3, 4, 5, 12):
        own = pmf_parameters(PMFConfig(fusion_layers=layers), 768, 768) + heads(768)
        shares[layers] = round(100 * own / (own + sum(sizes)), 2)
    assert shares == {1: 0.69, 2: 1.29, 3: 1.88, 4: 2.47, 5: 3.05, 12: 6.92}


def test_large_encoders():
    config = PMFConfig()
    expected = 2 * (6 * 4 * 1024 + 2 * (1024 * 512 + 512 + 512 * 1024 + 1024))
    assert trained(backbones(**LARGE), config) == pmf_parameters(config, 1024, 1024) == expected
    assert round((expected + heads(1024)) / 1e6, 2) == 4.46


SETTINGS = [
    {"query_prompts": 1, "query_context": 0, "fusion_context": 0},
    {"query_prompts": 16, "query_context": 2, "fusion_context": 5, "map_width": 100},
    {"map": "linear"},
    {"query_prompts": 0, "fusion_context": 3},
    {"direction": "text-to-encoder", "fusion_context": 3},
    {"direction": "encoder-to-text", "map": "linear", "query_context": 1},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_arithmetic_counts_what_is_made(base, settings):
    """Also where the widths differ: BERT-base beside a ViT of width 384."""
    config, small = (
        PMFConfig(**settings),
        {**base, "encoder": loading.empty_model(AutoModel, ViTConfig(hidden_size=384))},
    )
    assert trained(base, config) == pmf_parameters(config, 768, 768)
    assert trained(small, config) == pmf_parameters(config, 768, 384)
