"""The attention function that transformers calls: the definition of infused attention, over transformers' own backends."""

import pytest
import torch
from mitrain_kernels.infused_attention import infused_attention_reference
from tiny import features, tiny
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mitrain.core.errors import ModelError
from mitrain.methods.mit.attention import Infusion, LayerMaps, infused_forward
from mitrain.methods.mit.condition import make_condition

B, H, G, D, T, M = 3, 4, 2, 8, 7, 2


def arguments(gate, valid, **changes):
    """Random inputs of one attention call of a Llama layer, and the infusion that goes with it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, heads, T, D, generator=generator, dtype=torch.float64) for heads in (H, G, G))
    k_mul, v_mul, v_add, k_add = (torch.randn(M, B, H, D, generator=generator, dtype=torch.float64) for _ in range(4))
    values = {
        "k_mul": k_mul,
        "v_mul": v_mul,
        "v_add": v_add,
        "k_add": k_add,
        "head_logit": torch.randn(M, H, generator=generator, dtype=torch.float64),
        "present": torch.tensor([[True, True, False], [True, False, True]]),
        "base": 1,
    }
    maps = LayerMaps(**{**values, **changes})
    condition = make_condition({"image": features(B)}, {"image": 6})
    infusion = Infusion(maps, gate, condition, padding=valid, cache=None, layer_idx=1, depth=4)
    return (q, k, v), maps, infusion


def mask_for(base, valid):
    seen = valid[:, None, None, :] & torch.ones(T, T, dtype=torch.bool).tril()
    return seen if base == "sdpa" else torch.where(seen, 0.0, torch.finfo(torch.float32).min).to(torch.float64)


@pytest.mark.parametrize("gate", ["sequence", "prefix", "token", "head", "none"])
@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("base_value", [0, 1])
def test_it_is_the_definition(gate, base, base_value):
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[0, :3] = valid[1, 5:] = False
    (q, k, v), maps, infusion = arguments(gate, valid, base=base_value)
    module = tiny().model.layers[1].self_attn
    output, _ = infused_forward(base, module, q, k, v, mask_for(base, valid), infusion=infusion, scaling=D**-0.5)
    expected = infused_attention_reference(q, k, v, **maps._asdict() | {"key_padding": valid, "gate": gate})
    difference = (output.transpose(1, 2) - expected).abs()
    if base == "sdpa":
        assert difference.max() < 1e-11
        assert torch.equal(output[0, :3], torch.zeros(3, H, D, dtype=torch.float64))  # these queries see no key
    else:
        # transformers' eager softmax is float32: scores of up to 50 lose 50 · 2⁻²⁴, outputs of up to 30 that share of
        # themselves; and where there is nothing to see it gives the mean of all values
        assert difference.transpose(1, 2)[valid].max() < 1e-4
    assert infusion.used


def test_without_an_infusion_it_is_the_backend_itself():
    module, (q, k, v) = tiny().model.layers[1].self_attn, arguments("prefix", None)[0]
    plain, _ = infused_forward("sdpa", module, q, k, v, None, scaling=D**-0.5)
    assert torch.equal(plain, sdpa_attention_forward(module, q, k, v, None, scaling=D**-0.5)[0])


@pytest.mark.parametrize(
    ("options", "changes", "match"),
    [
        ({"dropout": 0.1}, {}, "layer 1 drops attention probabilities"),
        ({"s_aux": torch.zeros(H)}, {}, "layer 1 uses attention sinks"),
        ({"softcap": 5.0}, {}, "layer 1 caps its attention scores, under which k_add does not fold"),
        ({}, {"v_add": torch.zeros(M, B, H, D // 2)}, "layer 1 attends with .* but was announced as"),
        ({}, {"v_add": torch.zeros(M, B + 1, H, D)}, "layer 1 attends with .* but was announced as"),
    ],
)
def test_what_would_make_it_wrong_is_refused(options, changes, match):
    (q, k, v), _, infusion = arguments("prefix", None, **changes)
    with pytest.raises(ModelError, match=match):
        infused_forward("eager", tiny().model.layers[1].self_attn, q, k, v, None, infusion=infusion, **options)
