"""What cannot be infused is refused in one line, and the model is left as it was."""

import pytest
import torch
import transformers
from tiny import COMMON, GROUPED, features, scramble, text, tiny
from torch import nn
from transformers import AutoModelForCausalLM

import mitrain
from mitrain import MiTConfig
from mitrain.core.errors import ModelError
from mitrain.methods.mit.mit import MiT

SMALL = {**GROUPED, "num_hidden_layers": 2}


def build(config, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **options).eval()


def snapshot(model):
    return (
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        model.config._attn_implementation,
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    )


def refused(model, match, **settings):
    before = snapshot(model) if isinstance(model, nn.Module) and hasattr(model, "config") else None
    with pytest.raises(ModelError, match=match) as error:
        mitrain.attach(model, MiTConfig(**{"modalities": {"image": 6}, "layers": "all", **settings}))
    assert "\n" not in str(error.value)
    assert before is None or snapshot(model) == before


# At attach


def test_mixture_of_experts_feed_forwards():
    model = build(transformers.MixtralConfig(**SMALL, num_local_experts=2))
    refused(model, "layer 0 of MixtralModel has a mixture-of-experts feed-forward: set adapter.ffn=false")
    frozen = model(**text()).logits
    mit = mitrain.attach(model, MiTConfig(modalities={"image": 6}, layers="all", ffn=False))
    scramble(mit)
    assert not torch.equal(model(**text(), infused={"image": features()}).logits, frozen)


def test_attention_sinks():
    config = transformers.GptOssConfig(**SMALL, num_local_experts=2, head_dim=8, sliding_window=4)
    refused(build(config, attn_implementation="eager"), "uses attention sinks", ffn=False)


def test_latent_attention():
    config = transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=16,
        n_routed_experts=2,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
        first_k_dense_replace=2,
    )
    refused(build(config), "different widths .latent attention.")


def test_score_caps_need_eager_attention_and_no_k_add():
    capped = tiny("gemma3", attn_logit_softcapping=5.0)
    refused(capped, "caps its attention scores: load it with attn_implementation='eager'")
    refused(tiny("gemma2"), "caps its attention scores, where k_add does not fold", k_add=True)
    mitrain.attach(tiny("gemma2"), MiTConfig(modalities={"image": 6}, gate="token", k_add=True))


def test_other_attention_backends():
    refused(tiny("llama", attn_implementation="flex_attention"), "runs on the attention 'flex_attention': .*sdpa, eager")


def test_encoder_decoders_and_other_things():
    small = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 32}
    refused(transformers.T5ForConditionalGeneration(transformers.T5Config(**small)), "is an encoder-decoder")
    refused(nn.Linear(2, 2), "cannot attach to Linear")
    refused(
        transformers.ResNetModel(transformers.ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8)),
        "no list of",
    )


def test_layers_without_softmax_attention():
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=32, state_size=4)
    refused(transformers.MambaForCausalLM(config), "no softmax attention")


def test_an_unknown_feed_forward():
    model = tiny()
    model.model.layers[3].mlp = nn.Sequential(nn.Linear(32, 32))
    refused(model, "layer 3 of LlamaModel has no last feed-forward projection by a known name")


def test_an_attention_that_ignores_the_interface():
    class Own(nn.Module):
        head_dim, layer_idx = 8, 3

        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    class Strict(Own):
        def forward(self, hidden_states, attention_mask=None):
            return hidden_states, None

    model = tiny()
    model.model.layers[3].self_attn = Strict()
    refused(model, "does not use Hugging Face's attention interface")
    model.model.layers[3].self_attn = Own()
    mitrain.attach(model, MiTConfig(modalities={"image": 6}, layers=[3]))
    model(**text())
    with pytest.raises(ModelError, match="Own does not use Hugging Face's attention interface"):
        model(**text(), infused={"image": features()})


def test_a_model_of_before_the_interface():
    config = transformers.MptConfig(d_model=16, n_heads=2, n_layers=2, vocab_size=32, max_seq_len=32)
    refused(build(config), "attention interface|no softmax attention")


def test_two_adapters_on_one_model_and_one_on_two():
    model = tiny()
    mit = mitrain.attach(model, MiTConfig(modalities={"image": 6}))
    refused(model, "has a mit adapter .or attribute. already: detach it first")
    with pytest.raises(ModelError, match="attached already: call detach"):
        mit.attach({"text": tiny()})
    mit.detach()
    with pytest.raises(ModelError, match="made for a model of other widths or depth"):
        mit.attach({"text": tiny("qwen3")})
    mit.attach({"text": model})
    assert model.mit is mit


def test_transformers_own_checkpointing():
    model = tiny()
    mitrain.attach(model, MiTConfig(modalities={"image": 6}))
    model.activation_checkpointing_enable()
    with pytest.raises(ModelError, match=r"own activation checkpointing undoes the frozen trunk: use mit.set_checkpointing"):
        model(**text(), infused={"image": features()})


def test_merging():
    mit = mitrain.attach(tiny(), MiTConfig(modalities={"image": 6}))
    with pytest.raises(ModelError, match="mit depends on each sample's features and cannot be merged"):
        mit.merge()


# At the call


@pytest.fixture
def infused():
    model = tiny()
    mit = mitrain.attach(model, MiTConfig(modalities={"image": 6}, layers=[2, 3]))
    scramble(mit)
    return model, mit


def call_refused(model, match, **inputs):
    model(**inputs)  # the frozen model takes it
    with pytest.raises(ModelError, match=match) as error:
        model(**inputs, infused={"image": features(len(inputs["input_ids"]))})
    assert "\n" not in str(error.value)


def test_packed_sequences(infused):
    ids = text()["input_ids"]
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(3, -1)
    call_refused(infused[0], "packed sequences", input_ids=ids, position_ids=packed)
    call_refused(infused[0], "packed sequences", input_ids=ids, cu_seq_lens_q=torch.tensor([0, 4, 9]))
    consecutive = torch.arange(9)[None].expand(3, -1)
    infused[0](input_ids=ids, position_ids=consecutive, infused={"image": features()})


def test_masks_that_are_not_two_dimensional(infused):
    ids = text()["input_ids"]
    whole = torch.ones(3, 1, 9, 9, dtype=torch.bool).tril()
    call_refused(infused[0], r"attention mask as \(batch, tokens\)", input_ids=ids, attention_mask=whole)


def test_the_mask_may_be_positional(infused):
    model, mit = infused
    inputs = text(padding="left")
    with mit.bind({"image": features()}):
        named = model(**inputs).logits
        assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"]).logits, named)
        assert torch.equal(
            model(
                inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]), attention_mask=inputs["attention_mask"]
            ).logits,
            named,
        )
        assert not torch.equal(model(inputs["input_ids"]).logits, named)


def test_dropout_of_attention_probabilities():
    model = tiny("llama", attention_dropout=0.5)
    mitrain.attach(model, MiTConfig(modalities={"image": 6}, layers=[3]))
    model.train()
    model(**text(), infused={"image": features()})  # frozen layers stay in eval mode
    model.model.layers[3].self_attn.train()
    with pytest.raises(ModelError, match="layer 3 drops attention probabilities"):
        model(**text(), infused={"image": features()})


def test_heads_of_another_shape_than_announced(infused):
    model, mit = infused
    mit.infused["3"].shape = type(mit.infused["3"].shape)(heads=2, head_dim=16, ffn=48)
    mit.infused["3"].head_logit = nn.Parameter(torch.ones(1, 2))
    with pytest.raises(ModelError, match=r"layer 3 attends with .* but was announced as"):
        model(**text(), infused={"image": features()})


# Further architectures that the same names reach


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3", "falcon"])
def test_other_decoders(family):
    config = {
        "gpt2": lambda: transformers.GPT2Config(**{k: v for k, v in COMMON.items() if k != "intermediate_size"}),
        "opt": lambda: transformers.OPTConfig(
            **{k: v for k, v in COMMON.items() if k != "intermediate_size"},
            ffn_dim=48,
            word_embed_proj_dim=32,
            do_layer_norm_before=True,
        ),
        "phi3": lambda: transformers.Phi3Config(**GROUPED),
        "falcon": lambda: transformers.FalconConfig(**{k: v for k, v in COMMON.items() if k != "intermediate_size"}),
    }[family]()
    model, inputs = build(config), text(padding="left")
    if family == "falcon":
        return refused(model, "attention interface")
    frozen = model(**inputs).logits
    mit = mitrain.attach(model, MiTConfig(modalities={"image": 6}, layers="last half"))
    assert isinstance(mit, MiT)
    assert torch.equal(model(**inputs, infused={"image": features()}).logits, frozen)
    scramble(mit)
    with mit.bind({"image": features()}):
        greedy = [model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*greedy)
    assert not torch.equal(model(**inputs, infused={"image": features()}).logits, frozen)
    return None
