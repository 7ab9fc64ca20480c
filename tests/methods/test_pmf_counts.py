"""PMF's parameters on the paper's own backbones, counted without weights."""

import pytest
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
    assert trained(base, config) == expected
    assert round((expected + heads(768)) / 1e6, 2) == millions


def test_the_share_of_all_parameters(base):
    sizes = [loading.count_parameters(model) for model in base.values()]
    assert [round(size / 1e6, 2) for size in sizes] == [109.48, 86.39]
    shares = {}
    for layers in (1, 2, 3, 4, 5, 12):
        own = trained(base, PMFConfig(fusion_layers=layers)) + heads(768)
        shares[layers] = round(100 * own / (own + sum(sizes)), 2)
    assert shares == {1: 0.69, 2: 1.29, 3: 1.88, 4: 2.47, 5: 3.05, 12: 6.92}


def test_large_encoders():
    config = PMFConfig()
    expected = 2 * (6 * 4 * 1024 + 2 * (1024 * 512 + 512 + 512 * 1024 + 1024))
    assert trained(backbones(**LARGE), config) == expected
    assert round((expected + heads(1024)) / 1e6, 2) == 4.46


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"map": "linear"}, 12 * (768 + 384) + 2 * 768 * 384 + 768 + 384),
        ({"query_prompts": 0, "fusion_context": 3}, 3 * (768 + 384)),
        ({"direction": "encoder-to-text", "map_width": 100}, 8 * 384 + 4 * 768 + (384 + 768 + 1) * 100 + 768),
    ],
)
def test_encoders_of_different_widths(base, settings, expected):
    small = {**base, "encoder": loading.empty_model(AutoModel, ViTConfig(hidden_size=384))}
    assert trained(small, PMFConfig(**settings)) == 2 * expected
