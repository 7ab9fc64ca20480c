"""Cost arithmetic against real modules on the meta device, torch's own counters, and the paper's headline numbers."""

import pytest
import torch
import torch.nn.functional as F
from closed_forms import film_decoder_parameters, mit_layer_macs, mit_layer_parameters
from mitrain_kernels.infused_attention import infused_attention
from saved import saved_bytes
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

import mitrain
from mitrain.core.errors import ConfigError
from mitrain.models.costs import (
    LlmShape,
    Memory,
    Split,
    VitShape,
    activation_bytes,
    frozen_bytes,
    largest_batch,
    training_memory,
)

LLAMA2_7B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
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
    "vocab_size": 50,
}


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_headline_parameters():
    llm, clip = LlmShape.from_config(LLAMA2_7B), VitShape.from_config(CLIP_L_336)
    per_layer = mit_layer_parameters([768], llm, maps=4)
    assert per_layer == 4 * (768 * 4096 + 4096) + (768 * 11008 + 11008) + 32 == 21_064_480
    assert llm.parameters == 6_738_415_616
    assert llm.parameters - llm.head == 6_607_343_616
    assert clip.parameters == 304_293_888
    decoder = film_decoder_parameters([1024] * 3, 4096)
    assert decoder == 1_620_642
    trainable = 8 * per_layer + decoder
    assert round(trainable / 1e6, 1) == 170.1
    assert round(100 * trainable / (llm.parameters - llm.head + clip.parameters), 2) == 2.46


def test_headline_compute():
    """0.470 T with 43 tokens; 4.28 T when 576 visual tokens are prepended.

    The paper gives no accounting. These figures come out with the head at no position (MiT pools), and for the
    baseline at every position with the language model's attention scores left out; with them it is 4.33 T.
    """
    llm, clip = LlmShape.from_config(LLAMA2_7B), VitShape.from_config(CLIP_L_336)
    maps = 8 * mit_layer_macs([768], llm, maps=4)
    assert round(maps / 8 / 1e9, 3) == 0.021
    assert round(clip.macs() / 1e12, 3) == 0.191
    assert round(llm.layers * llm.linear_per_layer / 1e9, 3) == 6.476
    for attention in (False, True):
        assert round((clip.macs() + llm.macs(43, attention=attention) + maps) / 1e12, 3) == 0.470
    assert round((clip.macs() + llm.macs(43 + 576, 43 + 576, attention=False)) / 1e12, 2) == 4.28
    assert round((clip.macs() + llm.macs(43 + 576, 43 + 576)) / 1e12, 2) == 4.33


@pytest.mark.parametrize(("tied", "bias"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("head_dim", "kv"), [(None, 6), (None, 3), (12, 1)])
def test_llm_parameters_equal_the_real_model(tied, bias, head_dim, kv):
    options = {"tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias, "num_key_value_heads": kv}
    config = LlamaConfig(**(TINY | options | ({"head_dim": head_dim} if head_dim else {})))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shape = LlmShape.from_config(config.to_dict())
    assert shape.parameters == count(model)
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    linear = sum(m.weight.numel() for m in linears)
    assert shape.split() == Split(linear, sum(m.out_features for m in linears), count(model) - linear)


@pytest.mark.parametrize("side", [28, 56])
def test_vit_parameters_equal_the_real_models(side):
    common = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": side, "patch_size": 14}
    clip = CLIPVisionConfig(**common, intermediate_size=40, projection_dim=10)
    dino = Dinov2Config(**common, mlp_ratio=3)
    with torch.device("meta"):
        models = [CLIPVisionModelWithProjection(clip), Dinov2Model(dino)]
    for config, model in zip((clip, dino), models, strict=True):
        assert VitShape.from_config(config.to_dict()).parameters == count(model)
    assert VitShape.from_config({"vision_config": clip.to_dict()}) == VitShape.from_config(clip.to_dict())


def test_dinov2_small_parameters():
    config = {"model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12, "image_size": 518, "patch_size": 14}
    assert VitShape.from_config(config).parameters == 22_056_576


def test_llm_macs_equal_torchs_flop_counter():
    """On the meta device torch counts dense attention: T² pairs where causal attention has T (T + 1) / 2."""
    tokens, batch = 11, 2
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**TINY))
        ids = torch.zeros(batch, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, logits_to_keep=4)
    shape = LlmShape.from_config(TINY)
    dense = shape.layers * 2 * tokens**2 * shape.heads * shape.head_dim
    assert counter.get_total_flops() == 2 * batch * (shape.macs(tokens, 4, attention=False) + dense)
    causal = shape.layers * tokens * (tokens + 1) * shape.heads * shape.head_dim
    assert shape.macs(tokens) == shape.macs(tokens, attention=False) + causal


def test_vit_macs_equal_torchs_flop_counter():
    options = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    config = CLIPVisionConfig(**options, intermediate_size=40, projection_dim=10)
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(config)
        pixels = torch.zeros(1, 3, 56, 56)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=pixels)
    shape = VitShape.from_config(config.to_dict())
    assert counter.get_total_flops() == 2 * shape.macs()
    assert shape.macs(28) < shape.macs(56) == shape.macs()


def test_mit_layer_with_grouped_heads_and_two_modalities():
    """Every map has the width of the query heads, 6 · 12 = 72, though hidden is 48 and keys are 36 wide."""
    llm = LlmShape.from_config(TINY | {"head_dim": 12})
    assert mit_layer_parameters([5, 7], llm) == (6 + 8) * (3 * 72 + 80) + 2 * 6
    assert mit_layer_parameters([5], llm, maps=4, ffn=False) == 6 * 4 * 72 + 6
    assert mit_layer_macs([5, 7], llm) == 12 * (3 * 72 + 80)
    assert mit_layer_macs([5], llm, maps=4, ffn=False) == 5 * 4 * 72


def test_frozen_bytes_by_hand():
    split = Split(linear=6400, rows=100, other=1000)
    assert frozen_bytes(split, "fp32") == 4 * 7400
    assert frozen_bytes(split, "bf16", world=4, stage=2) == 2 * 7400
    assert frozen_bytes(split, "bf16", world=4, stage=3) == 3700
    assert frozen_bytes(split, "int8") == 6400 + 400 + 2000
    assert frozen_bytes(split, "int8", other="fp32", world=2, stage=3) == (6400 + 400 + 4000) // 2
    assert frozen_bytes(split, "nf4") == 3200 + 2000 + 400
    assert frozen_bytes(split, "nf4", world=2, stage=3) == (3200 + 2000 + 400) // 2


@pytest.mark.parametrize(
    ("stage", "expected"),
    [(0, (400, 400, 800)), (1, (400, 400, 400)), (2, (400, 400, 400)), (3, (400, 400, 400))],
)
def test_training_memory_by_stage(stage, expected):
    found = training_memory(100, frozen=11, stage=stage, world=3)
    assert (found.weights, found.gradients, found.optimizer) == expected
    assert found.total == 11 + sum(expected)


def test_half_precision_training_keeps_a_master_copy():
    assert training_memory(100, precision="bf16") == Memory(frozen=0, weights=200, gradients=200, optimizer=1200)


def test_optimizer_bytes_equal_torchs_adamw():
    weight = torch.nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    moments = [s for s in optimizer.state[weight].values() if s.numel() > 1]
    assert training_memory(1000).optimizer == sum(s.nbytes for s in moments)


def llama_saved_bytes(layers: int, dtype: torch.dtype, batch: int, tokens: int) -> int:
    model = LlamaModel(LlamaConfig(**(TINY | {"num_hidden_layers": layers}))).to(dtype).requires_grad_(False)
    embedded = torch.randn(batch, tokens, 48, dtype=dtype).requires_grad_()
    run = lambda: model(inputs_embeds=embedded, use_cache=False).last_hidden_state  # noqa: E731
    return saved_bytes(run, [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_plain_layer_activations_equal_what_autograd_saves(dtype, precision):
    batch, tokens = 2, 24
    one_layer = llama_saved_bytes(2, dtype, batch, tokens) - llama_saved_bytes(1, dtype, batch, tokens)
    llm = LlmShape.from_config(TINY)
    assert one_layer == batch * activation_bytes(llm, tokens, above=1, infused=0, precision=precision)


def test_infused_activations_equal_what_the_operators_save():
    """Beside plain attention: two scalars per token and head, one per key/value head, and a count per token.

    The fused feed-forward keeps two activations where the plain one keeps three.
    """
    tokens, shapes = 24, ((6, 8), (3, 8), (3, 8))
    q, k, v = (torch.randn(1, heads, tokens, width).requires_grad_() for heads, width in shapes)
    maps = [torch.randn(1, 1, 6, 8).requires_grad_() for _ in range(3)] + [torch.randn(1, 6).requires_grad_()]
    plain = saved_bytes(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), [])
    infused = saved_bytes(lambda: infused_attention(q, k, v, *maps), maps)
    llm = LlmShape.from_config(TINY)
    gates = 4 * tokens * (2 * 6 + 3)
    assert infused - plain == gates + 4 * tokens
    with_mit, without = (activation_bytes(llm, tokens, above=1, infused=n) for n in (1, 0))
    assert with_mit - without == gates - 4 * tokens * llm.ffn


@pytest.mark.parametrize("gate", ["prefix", "sequence"])
def test_infused_model_activations_are_estimated_within_a_tenth(gate):
    """What is left out (a count per token; with ``sequence`` the gates have no rows) is small at common shapes."""
    batch, tokens, shape = 2, 40, TINY | {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
    model = LlamaModel(LlamaConfig(**shape))
    mit = mitrain.attach(model, mitrain.MiTConfig(modalities={"image": 16}, layers=[1, 3], gate=gate))
    ids, feature = torch.randint(50, (batch, tokens)), torch.randn(batch, 16)

    def run() -> torch.Tensor:
        with mit.bind({"image": feature}):
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state

    actual = saved_bytes(run, [*model.parameters(), *model.buffers(), *mit.parameters(), feature])
    estimate = batch * activation_bytes(LlmShape.from_config(shape), tokens, above=3, infused=2)
    assert abs(estimate / actual - 1) < 0.1


def test_activations_add_over_layers_and_checkpoints_keep_inputs():
    llm = LlmShape.from_config(TINY)
    plain, infused = (activation_bytes(llm, 10, above=1, infused=n) for n in (0, 1))
    assert activation_bytes(llm, 10, above=3, infused=2) == plain + 2 * infused
    inputs = 3 * 10 * 48 * 4
    assert activation_bytes(llm, 10, above=3, infused=2, checkpointed=True) == inputs + infused
    assert activation_bytes(llm, 10, above=3, infused=0, checkpointed=True) == inputs + plain
    assert activation_bytes(llm, 10, above=0, infused=0, checkpointed=True) == 0
    assert activation_bytes(llm, 10, above=0, infused=0, precision="bf16", logit_tokens=3) == 3 * 50 * 10


def test_largest_batch_fills_the_budget():
    assert largest_batch(budget=1000, fixed=100, per_sample=90) == 10
    assert largest_batch(budget=999, fixed=100, per_sample=90) == 9
    assert largest_batch(budget=99, fixed=100, per_sample=90) == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LlmShape.from_config({"hidden_size": 4, "num_attention_heads": 2}), "num_hidden_layers=None"),
        (lambda: LlmShape.from_config(TINY | {"vocab_size": "many"}), "vocab_size='many'"),
        (lambda: LlmShape.from_config(TINY | {"intermediate_size": 0}), "intermediate_size=0"),
        (lambda: VitShape.from_config({"model_type": "resnet"}), "'resnet' is no vision transformer"),
        (lambda: frozen_bytes(Split(1, 1, 1), "int3"), "precision 'int3'"),
        (lambda: training_memory(1, precision="int8"), "precision 'int8'"),
        (lambda: training_memory(1, stage=4), "ZeRO stage 4"),
        (lambda: training_memory(1, stage=3, world=0), "world=0"),
        (lambda: activation_bytes(LlmShape.from_config(TINY), 8, above=4, infused=1), "do not fit into 3: "),
        (lambda: largest_batch(1, 1, 0), "per_sample=0"),
    ],
)
def test_impossible_values_are_refused(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
