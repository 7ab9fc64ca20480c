"""The feed-forward infusion: which blocks the fused operator serves, and that it leaves no other trace."""

import pytest
import torch
import torch.nn.functional as F
from tiny import NAMES, features, scramble, text, tiny
from torch import nn
from transformers import LlamaConfig, Phi3Config, Phi3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import mitrain
from mitrain import MiTConfig
from mitrain.methods.mit import ffn
from mitrain.methods.mit.ffn import InfusedFeedForward, infuse, is_swiglu

FUSED = ("llama", "qwen2", "qwen3", "mistral")
CONFIG = MiTConfig(modalities={"image": 6}, layers=[2, 3])


def block_of(kind=LlamaMLP, **changes):
    torch.manual_seed(0)
    return kind(LlamaConfig(hidden_size=32, intermediate_size=48, **changes)).requires_grad_(False)


# Which blocks are served


@pytest.mark.parametrize("name", NAMES)
def test_silu_gated_blocks_are_fused_and_the_others_keep_their_code(name):
    model = tiny(name)
    mitrain.attach(model, CONFIG)
    layers = model.get_decoder().layers
    assert [isinstance(layer.mlp, InfusedFeedForward) for layer in layers] == [False, False] + [name in FUSED] * 2


class Scaled(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(2 * self.gate_proj(x)) * self.up_proj(x))


class Clamped(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7.0) * self.up_proj(x))


class Normed(LlamaMLP):
    def forward(self, x):
        return self.down_proj(F.rms_norm(self.act_fn(self.gate_proj(x)) * self.up_proj(x), (48,)))


@pytest.mark.parametrize("kind", [Scaled, Clamped, Normed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_the_same_names_that_compute_something_else(kind, dtype):
    assert is_swiglu(block_of().to(dtype), dtype) and not is_swiglu(block_of(kind).to(dtype), dtype)


def test_blocks_without_weights_are_told_by_their_operators():
    with torch.device("meta"):
        assert is_swiglu(block_of(), torch.float32)
        assert not any(is_swiglu(block_of(kind), torch.float32) for kind in (Scaled, Clamped, Normed))


def test_blocks_that_cannot_be_tried():
    assert not is_swiglu(block_of(hidden_act="gelu"), torch.float32)
    assert not is_swiglu(nn.Sequential(nn.Linear(3, 3)), torch.float32)
    patched = block_of()
    patched.forward = patched.forward
    assert not is_swiglu(patched, torch.float32)


def test_a_fused_gate_up_projection_keeps_its_block():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**sizes, vocab_size=67, pad_token_id=0)).eval()
    frozen = model(**text()).logits
    mit = mitrain.attach(model, CONFIG)
    assert type(model.model.layers[3].mlp).__name__ == "Phi3MLP"
    with mit.bind({"image": features()}):
        assert torch.equal(model(**text()).logits, frozen)
        scramble(mit)
        assert not torch.equal(model(**text()).logits, frozen)


# What it computes


def results(model, mit, inputs, dtype):
    mit.zero_grad()
    logits = model(**inputs, infused={"image": features(dtype=dtype)}).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in mit.named_parameters()}


@pytest.mark.parametrize("name", FUSED)
def test_fused_equals_hooked(name, monkeypatch):
    both = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(ffn, "is_swiglu", lambda *_: False)
        model = tiny(name, torch.float64)
        mit = mitrain.attach(model, CONFIG)
        scramble(mit)
        assert isinstance(model.model.layers[3].mlp, InfusedFeedForward) == fused
        both.append(results(model, mit, text(padding="left"), torch.float64))
    (logits, gradients), (expected, others) = both
    # norms round to float32 in these models: a bit that flips there moves the logits by some 1e-6
    assert (logits - expected).abs().max() < 1e-5
    for parameter, gradient in gradients.items():
        assert (gradient - others[parameter]).abs().max() < 1e-5 * others[parameter].abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_identity_is_exact_in_every_type(dtype):
    model, inputs = tiny("llama", dtype), text(padding="left")
    frozen = model(**inputs).logits
    mit = mitrain.attach(model, CONFIG)
    assert isinstance(model.model.layers[3].mlp, InfusedFeedForward)
    with mit.bind({"image": features()}):
        assert torch.equal(model(**inputs).logits, frozen)


def test_the_factor_is_not_rounded_to_the_models_type():
    block, x = block_of().to(torch.bfloat16), torch.randn(2, 5, 32, dtype=torch.bfloat16)
    factor = 1 + 2.0**-8 * torch.ones(2, 48)  # half an ulp of bfloat16
    hidden = F.silu(block.gate_proj(x)) * block.up_proj(x)
    expected = block.down_proj((hidden.float() * factor[:, None]).to(torch.bfloat16))
    assert torch.equal(InfusedFeedForward(block, lambda: factor)(x), expected)
    assert not torch.equal(expected, block(x))


@pytest.mark.parametrize("shape", [(3, 4, 32), (12, 32), (3, 1, 32)])
@pytest.mark.parametrize("fused", [True, False])
def test_rows_may_be_flat(shape, fused):
    layer = nn.Module()
    layer.mlp = block_of(hidden_act="silu" if fused else "gelu")
    x, factor = torch.randn(shape), torch.randn(3, 48)
    block = layer.mlp
    hidden = block.act_fn(block.gate_proj(x)) * block.up_proj(x)
    expected = block.down_proj(hidden * factor.repeat_interleave(x[..., 0].numel() // 3, 0).view(hidden.shape))
    undo = infuse(layer, block.down_proj, lambda: factor, torch.float32)
    assert isinstance(layer.mlp, InfusedFeedForward) == fused
    assert torch.equal(layer.mlp(x), expected)
    undo()
    assert layer.mlp is block and torch.equal(block(x), block.down_proj(hidden))


def test_less_is_kept_for_backward(monkeypatch):
    sizes = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(ffn, "is_swiglu", lambda *_: False)
        model, saved = tiny(), []
        mitrain.attach(model, CONFIG)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x.numel()) or x, lambda x: x):
            model(**text(), infused={"image": features()})
        sizes.append(sum(saved))
    # SiLU(gate), and the product before the factor, of 3 × 9 tokens in 2 layers
    assert sizes[0] <= sizes[1] - 2 * 2 * (3 * 9 * 48)


# What it leaves alone


def test_names_hooks_and_blocks_stay():
    model, calls = tiny(), []
    layer = model.model.layers[3]
    block, names = layer.mlp, list(model.state_dict())
    block.register_forward_hook(lambda *_: calls.append("block"))
    block.up_proj.register_forward_hook(lambda *_: calls.append("up"))
    mit = mitrain.attach(model, CONFIG)
    calls.clear()
    wrapped = layer.mlp
    assert [n for n in model.state_dict() if not n.startswith("mit.")] == names
    assert wrapped.act_fn is block.act_fn and wrapped.hidden_size == block.hidden_size
    late = wrapped.register_forward_hook(lambda *_: calls.append("late"))
    model(**text(), infused={"image": features()})
    model(**text())
    assert calls == ["up", "block", "late"] * 2
    mit.detach()
    assert layer.mlp is block and list(model.state_dict()) == names
    late.remove()
    calls.clear()
    model(**text())
    assert calls == ["up", "block"]


def test_an_attach_that_fails_puts_the_blocks_back(monkeypatch):
    model = tiny()
    blocks = [layer.mlp for layer in model.model.layers]

    def fail(*_):
        raise RuntimeError("stop")

    monkeypatch.setattr(mitrain.methods.mit.mit.MiT, "set_checkpointing", fail)
    with pytest.raises(RuntimeError, match="stop"):
        mitrain.attach(model, CONFIG)
    assert [layer.mlp for layer in model.model.layers] == blocks
