"""examples/mit_minimal.py is what mitrain computes: one layer in float64, outputs and every gradient; and it trains."""

import runpy
from types import SimpleNamespace

import pytest
import torch
from source_tree import ROOT
from tiny import WIDTH, features, scramble, text, tiny

import mitrain

minimal = SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "mit_minimal.py")))
NAMES = ("k_mul", "k_add", "v_mul", "v_add", "ffn")


@pytest.fixture
def model():
    """One LLaMA layer; transformers rounds norms and rotary tables to float32 even here, which these do not."""
    model = tiny(dtype=torch.float64, num_hidden_layers=1)
    layer = model.model.layers[0]
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.forward = lambda x, norm=norm: minimal.norm(x, norm.weight)
        norm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(7))
    model.model.rotary_emb.forward = rotary_tables
    return model


def rotary_tables(x, position_ids):
    angles = position_ids[..., None] / 10_000 ** (torch.arange(4, dtype=x.dtype) / 4)
    return angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)


@pytest.mark.parametrize("base", [0, 1])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("gate", ["sequence", "prefix", "token"])
def test_the_minimal_layer_is_the_real_one(model, gate, padding, base):
    settings = {"modalities": {"image": 6}, "layers": [0], "gate": gate, "base": base, "k_add": True}
    mit = mitrain.attach(model, mitrain.MiTConfig(**settings))
    scramble(mit)
    maps = minimal.Maps(6, heads=4, width=8, ffn=48).double()
    real = {**mit.infused["0"].maps["image"].state_dict(), "head_logit": mit.infused["0"].head_logit[0]}
    maps.load_state_dict(real)
    x, image = torch.randn(3, 9, WIDTH, dtype=torch.float64), features(dtype=torch.float64)
    mask, upstream = text(padding=padding)["attention_mask"], torch.randn(3, 9, WIDTH, dtype=torch.float64)
    seen = []
    model.model.layers[0].register_forward_hook(lambda layer, args, output: seen.append(output))
    theirs = x.clone().requires_grad_()
    with mit.bind({"image": image}):
        model.model(inputs_embeds=theirs, attention_mask=mask)
    (seen[0] * upstream).sum().backward()

    ours = x.clone().requires_grad_()
    weights = dict(model.model.layers[0].named_parameters())
    out = minimal.infused_layer(ours, weights, maps, image, mask.bool(), kind=gate, base=base)
    (out * upstream).sum().backward()
    pairs = [(out, seen[0]), (ours.grad, theirs.grad), (maps.head_logit.grad, mit.infused["0"].head_logit.grad[0])]
    for name in NAMES:
        mine, other = getattr(maps, name), getattr(mit.infused["0"].maps["image"], name)
        pairs += [(mine.weight.grad, other.weight.grad), (mine.bias.grad, other.bias.grad)]
        assert (other.weight.grad.abs().max() > 1e-3) == (name != "k_add" or gate == "token")  # softmax cancels k_add
    for mine, other in pairs:
        assert (mine - other).abs().max() <= 1e-12 * max(1, other.abs().max())


def test_the_minimal_layer_starts_as_the_frozen_one(model):
    x, mask = torch.randn(3, 9, WIDTH, dtype=torch.float64), torch.ones(3, 9, dtype=torch.bool)
    weights = dict(model.model.layers[0].named_parameters())
    maps = minimal.Maps(6, heads=4, width=8, ffn=48).double()
    out = minimal.infused_layer(x, weights, maps, features(dtype=torch.float64), mask)
    seen = []
    model.model.layers[0].register_forward_hook(lambda layer, args, output: seen.append(output))
    model.model(inputs_embeds=x)
    assert (out - seen[0]).abs().max() <= 1e-12


def test_the_minimal_layer_trains(capsys):
    losses = minimal.main(steps=60)
    assert losses[-1] < losses[0] / 20 and "the layer's own weights did not change" in capsys.readouterr().out
