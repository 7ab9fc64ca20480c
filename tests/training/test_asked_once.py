"""What is asked of a model once, before training: whether its layers can be replayed, whether it speaks with a cache."""

import logging
from dataclasses import replace

import pytest
import torch
from folders import llm_folder
from modalities import pictures
from tiny import NAMES, tiny
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mitrain import methods
from mitrain.core.errors import ModelError
from mitrain.data.formats.records import AnswerSample
from mitrain.data.hidden_states import TextStates
from mitrain.methods.mit.mit import MiTConfig
from mitrain.models import TextBackbone, frozen
from mitrain.tasks import generation
from mitrain.tasks.answer import AnswerConfig, AnswerTask
from mitrain.tasks.base import Batch, Parts

COMMON = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.3,
}  # fmt: skip
STRANGE = {  # layers that read more than what the layer below hands them
    "narrow embedding": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "embeddings per layer": (
        "gemma4_text",
        {"num_key_value_heads": 1, "num_global_key_value_heads": 1, "head_dim": 8, "global_head_dim": 16,
         "sliding_window": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 67,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "several streams": (
        "gemma3n_text",
        {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4, "num_kv_shared_layers": 1,
         "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4, "vocab_size_per_layer_input": 67,
         "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2},
    ),
    "convolutions": ("lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"] * 2}),
}  # fmt: skip
FEATURES = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
SAMPLES = [
    AnswerSample(str(i), {"image": "i.png"}, p, "red", ("red", "blue")) for i, p in enumerate(["this thing is", "is this"])
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(llm_folder(tmp_path_factory.mktemp("asked") / "llm"))


def strange(name, tokenizer):
    kind, values = STRANGE[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**COMMON, **values})).eval()
    return TextBackbone(model, tokenizer)


def task_on(text, cache=None, layers="last half", **settings):
    adapter = methods.build(MiTConfig(layers=layers, **settings), {"image": 6})
    adapter.attach({"text": text.model})
    states = TextStates(text, adapter.attachment.first_layers["text"], cache, disabled=adapter.disabled)
    return AnswerTask(AnswerConfig(max_new_tokens=4), Parts(text, adapter, states))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders_that_hand_on_states_alone_are_replayed(name, dtype, tokenizer):
    text = TextBackbone(tiny(name, dtype), tokenizer)
    assert all(text.replays(depth) for depth in (1, 3, 4))


@pytest.mark.parametrize("name", ["narrow embedding", "embeddings per layer", "several streams"])
def test_what_cannot_be_replayed_runs_from_the_bottom_and_says_so(name, tokenizer, tmp_path, caplog):
    losses = []
    for cache in (None, tmp_path):
        task = task_on(strange(name, tokenizer), cache)
        with caplog.at_level(logging.WARNING):
            assert task.parts.states.prepare(task.texts(SAMPLES, True)) == 0
        losses.append(task.loss(Batch(SAMPLES, pictures(FEATURES)))[0])
    assert torch.equal(*losses)
    assert [r.getMessage() for r in caplog.records if "cannot go on from" in r.getMessage()] != []


def test_padding_that_is_embedded_as_zeros_leaves_a_gradient(tokenizer):
    """What sees nothing but zeros stays zero, and Gemma 3n scales what enters and leaves its layers by its own size."""
    losses, gradients = [], []
    samples = [replace(SAMPLES[0], prompt=" ".join([SAMPLES[0].prompt] * 3)), SAMPLES[1]]  # by more than the window
    for rows in (samples[:1], samples[1:], samples):
        task = task_on(strange("several streams", tokenizer))
        assert not task.parts.text.model.get_input_embeddings().weight[tokenizer.pad_token_id].any()
        loss = task.loss(Batch(rows, pictures(FEATURES[[samples.index(s) for s in rows]])))[0]
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in task.parts.adapter.parameters() if p.grad is not None]))
    torch.testing.assert_close(losses[0] + losses[1], losses[2])
    assert gradients[2].any()
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2], rtol=1e-4, atol=1e-5)


class Counting(nn.Module):
    """A layer that adds how often it ran: what it gives does not depend on its input alone."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.runs = layer, 0

    def forward(self, hidden_states, *args, **kwargs):
        self.runs += 1
        return self.layer(hidden_states, *args, **kwargs) + self.runs


def test_a_replay_that_gives_other_numbers_without_an_error_is_noticed(tokenizer):
    text = TextBackbone(tiny(), tokenizer)
    assert text.replays(1)
    text.model.model.layers[2] = Counting(text.model.model.layers[2])
    assert not text.replays(1)


@pytest.mark.parametrize("name", STRANGE)
def test_a_model_whose_cache_infusion_cannot_use_speaks_without(name, tokenizer, caplog):
    layers = [1, 3] if name == "convolutions" else "last half"
    task = task_on(strange(name, tokenizer), layers=layers)
    with caplog.at_level(logging.WARNING):
        task.rehearse(SAMPLES)
    if name != "narrow embedding":
        assert task.decoding == {"use_cache": False} and "generates without a KV cache" in caplog.text
    said = task.generate(Batch(SAMPLES, pictures(FEATURES)))
    for sample, feature, words in zip(SAMPLES, FEATURES[:, None], said, strict=True):  # one at a time, token by token
        ids = task.parts.text.prompt(sample.prompt)
        start = len(ids)
        with torch.no_grad(), task.parts.adapter.bind({"image": feature}):
            while len(ids) < start + 4 and ids[-1] != tokenizer.eos_token_id:
                ids.append(int(task.parts.text.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert words == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_a_usual_model_speaks_with_its_cache(tokenizer):
    assert task_on(TextBackbone(tiny(), tokenizer)).decoding == {}


def test_a_cache_that_gives_other_numbers_is_not_used(tokenizer, monkeypatch):
    task = task_on(TextBackbone(tiny(), tokenizer))
    true = generation.logits
    monkeypatch.setattr(generation, "logits", lambda parts, use_cache: [x + use_cache for x in true(parts, use_cache)])
    assert generation.decoding(task.parts) == {"use_cache": False}


def test_a_run_that_cannot_generate_is_reported_before_its_first_step(tokenizer, caplog):
    task = task_on(TextBackbone(tiny(), tokenizer), gate="sequence")
    with caplog.at_level(logging.WARNING):
        task.rehearse(SAMPLES)
    assert "will not be able to generate" in caplog.text and "set adapter.gate=prefix" in caplog.text
    with pytest.raises(ModelError, match=r"set adapter\.gate=prefix"):
        task.generate(Batch(SAMPLES, pictures(FEATURES)))


def test_nothing_is_compared_that_is_not_finite():
    model = tiny()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    assert not frozen.reproduces(model, 1, ids, torch.ones_like(ids))
