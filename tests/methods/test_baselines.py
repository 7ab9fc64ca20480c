"""What users would pick instead: LoRA, IA³, prompt and prefix tuning, visual tokens, full fine-tuning, by hand."""

import logging

import pytest
import torch
from attached import attached, bert, close, dino, inputs, made, pixels, whole
from modalities import pictures
from tiny import scramble, tiny
from transformers import AutoConfig, AutoModelForCausalLM

from mitrain.core.errors import ConfigError, ModelError
from mitrain.methods.peft import within_layer
from mitrain.models.batch import TextBatch
from mitrain.models.frozen import trunk_states
from mitrain.models.quant.replace import quantise
from mitrain.training import schema
from mitrain.training.build import build


def test_lora_is_a_low_rank_update_and_merges():
    adapter, model, image = attached("lora", {"where": "both", "rank": 2, "alpha": 6})
    words, picture = inputs(adapter, model, image)
    with torch.no_grad():
        close(adapter.encode(words, picture).text, whole(tiny("llama", torch.float64), words))  # B = 0 at first
        scramble(adapter)
        found = adapter.encode(words, picture)
        by_hand = {"text": tiny("llama", torch.float64), "image": dino()}
        for key, a in adapter.weights.items():
            if "/lora_A/" in key:
                side, *path = key.split("/lora_A/")[0].split("/")
                b = adapter.weights[key.replace("/lora_A/", "/lora_B/")]
                by_hand[side].get_submodule(".".join(path)).weight += 6 / 2 * b @ a
        close(found.text, whole(by_hand["text"], words))
        states = trunk_states(by_hand["image"], 3, pixel_values=pixels())
        close(found.vectors["image"], by_hand["image"].layernorm(states)[:, 0])
        adapter.merge()
        close(whole(model, words), found.text)
    text_parameters, image_parameters = 4 * 2 * ((32 + 32) + (32 + 16)), 3 * 2 * 2 * (24 + 24)
    assert sum(p.numel() for p in adapter.parameters()) == text_parameters + image_parameters


def test_ia3_multiplies_keys_values_and_what_enters_the_last_projection():
    adapter, model, image = attached("ia3", {"where": "text"})
    words, _ = inputs(adapter, model, image)
    scramble(adapter)
    with torch.no_grad():
        by_hand = tiny("llama", torch.float64)
        for key, factor in adapter.weights.items():
            weight = by_hand.get_submodule(".".join(key.split("/ia3_l")[0].split("/")[1:])).weight
            weight *= factor  # (out, 1) scales what comes out, (1, in) what enters
        close(adapter.encode(words, None).text, whole(by_hand, words))
    kinds = {within_layer(key.replace("/", ".")).split(".")[1] for key in adapter.weights}
    assert kinds == {"k_proj", "v_proj", "down_proj"}


@pytest.mark.parametrize("make", [lambda: tiny("llama", torch.float64), bert])
def test_prompts_are_embeddings_before_the_text(make):
    adapter, model, image = attached("prompt", {"tokens": 3}, make())
    scramble(adapter)
    words, picture = inputs(adapter, model, image)
    with torch.no_grad():
        vectors = next(adapter.parameters()).expand(3, -1, -1)
        embedded = torch.cat([vectors, model.get_input_embeddings()(words.ids)], 1)
        mask = torch.cat([torch.ones(3, 3, dtype=torch.long), words.mask], 1)
        expected = make().base_model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state[:, 3:]
        close(adapter.encode(words, picture).text, expected)


def test_a_prefix_is_keys_and_values_and_needs_a_causal_model():
    adapter, model, image = attached("prefix", {"tokens": 3})
    words, picture = inputs(adapter, model, image)
    with torch.no_grad():
        plain = whole(tiny("llama", torch.float64), words)
        found = adapter.encode(words, picture)
    assert found.text.shape == plain.shape and not torch.allclose(found.text, plain, atol=1e-3)
    heads = 2 * model.config.num_key_value_heads * (model.config.hidden_size // model.config.num_attention_heads)
    assert sum(p.numel() for p in adapter.parameters()) == 3 * model.config.num_hidden_layers * heads
    with pytest.raises(ModelError, match=r"prefix tuning needs .* take adapter.name=prompt"):
        attached("prefix", {}, bert())


def test_visual_tokens_are_projected_averages_of_patches_before_the_text():
    adapter, model, image = attached("visual-prefix", {"tokens": 4})
    scramble(adapter)
    words, picture = inputs(adapter, model, image)
    with torch.no_grad():
        patches = image(pixel_values=pixels()).last_hidden_state[:, 1:].view(3, 2, 2, 2, 2, 24)  # rows of 4 as 2 × 2
        visual = adapter.projector(patches.mean((2, 4)).flatten(1, 2))
        embedded = torch.cat([visual, model.get_input_embeddings()(words.ids)], 1)
        mask = torch.cat([torch.ones(3, 4, dtype=torch.long), words.mask], 1)
        expected = tiny("llama", torch.float64).base_model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        close(adapter.encode(words, picture).text, expected[:, 4:])
        blind = adapter.encode(words, pictures(picture.feature, picture.states, picture.depth, infused=False))
        close(blind.text, whole(model, words))
    assert sum(p.numel() for p in adapter.parameters()) == 24 * 32 + 32 + 32 * 32 + 32
    with pytest.raises(ConfigError, match=r"adapter.tokens=25: the picture has 16 patches: give at most as many"):
        wrong, *rest = attached("visual-prefix", {"tokens": 25})
        wrong.encode(*inputs(wrong, *rest))


def test_visual_tokens_stand_in_the_cache_that_generation_goes_on_from():
    """Prompts of several lengths, padded on the left, beside whole passes over embeddings put together by hand."""
    adapter, model, image = attached("visual-prefix", {"tokens": 4, "lora_rank": 2})
    scramble(adapter)
    words, picture = inputs(adapter, model, image, padding="left")
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    with torch.no_grad(), adapter.conditioned(picture):
        said = model.generate(input_ids=words.ids, attention_mask=words.mask, **options)
        whole_passes = model.generate(input_ids=words.ids, attention_mask=words.mask, use_cache=False, **options)
        visual, _ = adapter._seen
    with torch.no_grad(), adapter.conditioned(None):
        blind = model.generate(input_ids=words.ids, attention_mask=words.mask, **options)
        for row, (ids, mask) in enumerate(zip(words.ids, words.mask, strict=True)):
            text = ids[mask.bool()]
            for _ in range(5):
                embedded = torch.cat([visual[row], model.get_input_embeddings()(text)])[None]
                text = torch.cat([text, model(inputs_embeds=embedded).logits[0, -1].argmax()[None]])
            assert said[row, -5:].tolist() == text[-5:].tolist()
    assert torch.equal(said, whole_passes) and not torch.equal(said, blind)


@pytest.mark.parametrize("tokens", [2, 15])
def test_visual_tokens_that_are_no_square_are_refused_before_anything_is_loaded(tokens):
    with pytest.raises(ConfigError, match=rf"{tokens} is no square number: give 1, 4, 9, 16, … or null"):
        made("visual-prefix", {"tokens": tokens})


@pytest.mark.parametrize("name", ["prompt", "visual-prefix"])
def test_more_positions_than_the_model_has_are_refused_in_one_line(name):
    adapter, model, image = attached(name, {"tokens": 4}, bert())  # with 64 positions
    _, picture = inputs(adapter, model, image)
    long = torch.full((3, 61), 7)
    adapter.encode(TextBatch(long[:, :60], torch.ones_like(long)[:, :60]), picture)
    with pytest.raises(ModelError, match="4 vectors before a text of 61 tokens exceed the 64 positions of BertModel"):
        adapter.encode(TextBatch(long, torch.ones_like(long)), picture)
    with pytest.raises(ModelError, match="64 vectors before a text of 1 tokens exceed the 64 positions"):
        attached("prompt", {"tokens": 64}, bert())


def test_more_layers_than_there_are_cannot_be_trained():
    with pytest.raises(ConfigError, match="adapter.layers=4, but the encoder model has 3 layers"):
        attached("full", {"layers": 4})


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_method_that_the_language_head_does_not_see_cannot_answer(name):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    values = {
        "model": {
            "llm": "none",
            "llm_shape": {"model_type": "llama", **sizes, "vocab_size": 64},
            "encoders": {"image": {"name": "none", "shape": dino().config.to_dict()}},
        },
        "adapter": {"name": name},
        "task": {"name": "answer"},
        "data": {"name": "records", "root": "none"},
    }
    with pytest.raises(ConfigError, match=f"the method '{name}' does not work through the language head"):
        build(schema.from_dict(values), empty=True)


@pytest.mark.parametrize("layers", [None, 1])
def test_full_fine_tuning_trains_the_models_and_can_step_aside(layers):
    adapter, model, image = attached("full", {"layers": layers})
    words, picture = inputs(adapter, model, image)
    with torch.no_grad():
        frozen = adapter.encode(words, picture)
        scramble(adapter)
        changed = adapter.encode(words, picture)
        with adapter.disabled():
            close(adapter.encode(words, picture).text, frozen.text)
        close(adapter.encode(words, picture).text, changed.text)
    assert not torch.allclose(changed.text, frozen.text) and not torch.allclose(
        changed.vectors["image"], frozen.vectors["image"]
    )
    inside = [n for n, _ in model.base_model.named_parameters() if layers is None or n.startswith(("layers.3.", "norm"))]
    assert sorted(k for k in adapter.weights if k.startswith("text/")) == sorted(
        "text/model/" + n.replace(".", "/") for n in inside if not n.startswith("full.")
    )
    with torch.no_grad():
        adapter.merge()
        close(whole(model, words), changed.text)


def fused(kind):
    """A tiny decoder whose queries, keys and values come from one projection, in float64."""
    shape = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "pad_token_id": 0,
             "initializer_range": 0.3}  # fmt: skip
    more = {"gpt2": {"n_positions": 64}, "phi3": {"num_key_value_heads": 2, "intermediate_size": 48},
            "gpt_neox": {"intermediate_size": 48}}[kind]  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **more), dtype=torch.float64).eval()


FUSED = {"gpt2": "c_attn", "phi3": "qkv_proj", "gpt_neox": "query_key_value"}
LAST = {"gpt2": "mlp.c_proj", "phi3": "mlp.down_proj", "gpt_neox": "mlp.dense_4h_to_h"}


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_fused_projection_is_changed_whole_and_said(kind, method, caplog):
    with caplog.at_level(logging.WARNING):
        adapter, model, image = attached(method, {"rank": 2, "alpha": 6} if method == "lora" else {}, fused(kind))
    assert "at once" in caplog.text and FUSED[kind] in caplog.text
    changed = {within_layer(key.replace("/", ".")).split(".lora")[0].split(".ia3")[0] for key in adapter.weights}
    assert {path.rpartition(".")[2] for path in changed if "mlp" not in path} == {FUSED[kind]}
    assert method == "lora" or {path for path in changed if "mlp" in path} == {LAST[kind]}
    words, picture = inputs(adapter, model, image)
    with torch.no_grad():
        close(adapter.encode(words, picture).text, whole(fused(kind), words))
        scramble(adapter)
        found, by_hand = adapter.encode(words, picture), fused(kind)
        turned = (lambda w: w.t()) if kind == "gpt2" else (lambda w: w)  # Conv1D holds (in, out)
        for key, a in adapter.weights.items():
            path = ".".join(key.split("/lora_A")[0].split("/ia3_l")[0].split("/")[1:])
            if "/lora_A/" in key:
                weight = by_hand.get_submodule(path).weight
                weight += turned(3 * adapter.weights[key.replace("/lora_A/", "/lora_B/")] @ a)
            elif "/ia3_l" in key:
                place = by_hand.get_submodule(path)
                place.weight *= turned(a)
                if a.shape[1] == 1 and place.bias is not None:  # what comes out is scaled, bias and all
                    place.bias *= a[:, 0]
        close(found.text, whole(by_hand, words))
        adapter.merge()
        close(whole(model, words), found.text)


def test_matrices_of_another_kind_are_named_by_quantising():
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel cannot be held in low bits, .* matrices are Conv1D\): set"):
        quantise(fused("gpt2").requires_grad_(False), "int8")
    with pytest.raises(ModelError, match=r"none of its layers' matrices is frozen\): .* or freeze it first"):
        quantise(tiny("llama"), "int8")


def test_quantised_projections_are_refused_in_one_line():
    model = tiny("llama").requires_grad_(False)
    quantise(model, "int8")
    with pytest.raises(ModelError, match=r"lora needs float projections, .* set model.quantize=none"):
        attached("lora", {}, model)
    assert not hasattr(model, "lora")


def test_aurora_steps_aside_too():
    adapter, model, image = attached("aurora", {"rank": 4, "dropout": 0.0}, bert())
    scramble(adapter)
    words, _ = inputs(adapter, model, image)
    with torch.no_grad():
        changed = whole(model, words)
        with adapter.disabled():
            close(whole(model, words), whole(bert(), words))
        close(whole(model, words), changed)
    assert not torch.allclose(changed, whole(bert(), words), atol=1e-3)
