"""Single layers of frozen transformers: one after another they are the model itself, for every family that is served."""

import pytest
import torch
from tiny import DEPTH, NAMES, WIDTH, WINDOW, text, tiny
from tiny_encoders import IMAGES, RAW, SOUNDS, TEXTS, WHISPER, pixels, sound, tiny_encoder
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2Model,
    OPTConfig,
    OPTModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperModel,
)

from mitrain.core.errors import ModelError
from mitrain.models.frozen import trunk_states
from mitrain.models.layers import Layers, beside

# The layers, masks and rotary tables are the model's own, so both ways do the same operations on the same numbers: what
# may differ is the order of the sums in matrix products, some 50 roundings of 1.1e-16 on values below 5.
EXACT = 1e-13
# transformers makes the rotary tables in float32: an angle below 16 radians is off by half of its last place, 2^-21, in
# queries and in keys, and scores of a few units pass that on to a softmax's weights and values of a few units.
ROTATED = 2 * 2**-21 * 10
WORDS = [*NAMES, *TEXTS]


def example(name, padding="right"):
    """Model, its inputs and the tokens that are no padding; float64 where transformers' eager softmax allows it."""
    dtype = torch.float32 if name == "gemma2" else torch.float64
    model = tiny(name, dtype) if name in NAMES else tiny_encoder(name, dtype)
    inputs = (
        text(padding=padding) if name in WORDS else sound(dtype=dtype, name=name) if name in SOUNDS else pixels(dtype=dtype)
    )
    mask = inputs.get("attention_mask")
    return model, inputs, None if mask is None else mask.bool()


@pytest.mark.parametrize("name", [*WORDS, *IMAGES, *SOUNDS])
@torch.no_grad()
def test_the_layers_one_by_one_are_the_model(name):
    model, inputs, visible = example(name)
    layers = Layers.of(model)
    assert (layers.depth, layers.width, layers.causal) == (DEPTH, WIDTH, name in NAMES)
    hidden = trunk_states(model, 0, **inputs)
    for index in range(layers.depth):
        hidden = layers.run(index, hidden, visible)
    whole = model.base_model(**inputs, **({"use_cache": False} if name in NAMES else {})).last_hidden_state
    shown = slice(None) if visible is None else visible
    tolerance = 1e-5 if name == "gemma2" else EXACT
    torch.testing.assert_close(layers.finish(hidden)[shown], whole[shown], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_with_registers", "clip_vision_model", "audio-spectrogram-transformer"])
@torch.no_grad()
def test_the_summary_is_the_class_token_that_the_model_reads_out(name):
    model, inputs, _ = example(name)
    summary = Layers.of(model).summary(trunk_states(model, DEPTH, **inputs))
    torch.testing.assert_close(summary, model(**inputs).pooler_output, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", ["whisper", "wav2vec2", "hubert", "siglip_vision_model"])
@torch.no_grad()
def test_without_a_class_token_the_summary_is_the_mean(name):
    model, inputs, _ = example(name)
    summary = Layers.of(model).summary(trunk_states(model, DEPTH, **inputs))
    torch.testing.assert_close(summary, model(**inputs).last_hidden_state.mean(1), rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3", "modernbert"])
@torch.no_grad()
def test_rotary_embeddings_come_from_the_positions(name):
    model, inputs, visible = example(name)
    layers, hidden = Layers.of(model), trunk_states(model, 0, **inputs)
    usual = layers.run(1, hidden, visible)
    count = torch.arange(hidden.shape[1]).expand(len(hidden), -1)
    shifted = layers.run(1, hidden, visible, count + 7)  # only distances count
    torch.testing.assert_close(shifted[visible], usual[visible], rtol=0, atol=ROTATED)
    assert (layers.run(1, hidden, visible, 2 * count) - usual)[visible].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "bert", "whisper", "wav2vec2"])
@torch.no_grad()
def test_padding_is_not_seen(name):
    model, inputs, visible = example(name)
    layers, hidden = Layers.of(model), trunk_states(model, 0, **inputs)
    if visible is None:
        visible = torch.arange(hidden.shape[1]) < torch.tensor([[2], [hidden.shape[1]], [4]])
    noise = torch.where(visible[..., None], hidden, torch.randn_like(hidden))
    out, other = layers.run(0, hidden, visible), layers.run(0, noise, visible)
    assert torch.equal(out[visible], other[visible])
    if name != "llama":  # a causal token does not see what comes after it, padding or not
        assert (layers.run(0, noise) - out)[visible].abs().max() > 1e-3


def test_the_window_is_what_the_layers_reach_back():
    windows = {name: Layers.of(tiny(name)).window for name in ("llama", "mistral", "gemma3")}
    assert windows == {"llama": None, "mistral": WINDOW, "gemma3": WINDOW}
    assert Layers.of(tiny_encoder("modernbert")).window == 2 and Layers.of(tiny_encoder("bert")).window is None


def small(kind, settings, **values):
    return kind(settings(**values))


SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
REFUSED = {
    "cannot be run one by one": lambda: small(CLIPTextModel, CLIPTextConfig, **SHAPE),  # causal, by its mask alone
    "joins several models": lambda: small(CLIPModel, CLIPConfig, text_config=SHAPE, vision_config=SHAPE),
    "is an encoder-decoder": lambda: WhisperModel(WhisperConfig(**WHISPER)),
    "WhisperModel is an encoder-decoder": lambda: WhisperModel(WhisperConfig(**{**WHISPER, "decoder_layers": 2})),
    "the layers of OPTModel cannot be run": lambda: small(OPTModel, OPTConfig, **SHAPE, ffn_dim=48, vocab_size=67),
    "the layers of SwinModel": lambda: small(SwinModel, SwinConfig, embed_dim=8, depths=[1, 1], num_heads=[2, 2]),
    "BloomModel": lambda: small(BloomModel, BloomConfig, hidden_size=32, n_layer=2, n_head=4, vocab_size=67),
    "causal without rotary": lambda: small(GPT2Model, GPT2Config, n_embd=32, n_layer=2, n_head=4, vocab_size=67),
    "the layers of WavLMModel": lambda: small(WavLMModel, WavLMConfig, **RAW),
    "the layers of Wav2Vec2Model": lambda: tiny_encoder("wav2vec2", add_adapter=True),
    "BertModel is causal": lambda: small(BertModel, BertConfig, **SHAPE, is_decoder=True),
    "full and sliding": lambda: tiny("llama", layer_types=["linear_attention"] * DEPTH),
    "no stack of equal": lambda: small(ResNetModel, ResNetConfig, hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8),
    "cannot run the layers of Linear": lambda: torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_served_is_refused_in_one_line(reason):
    with pytest.raises(ModelError, match=reason) as refused:
        Layers.of(REFUSED[reason]())
    assert "\n" not in str(refused.value)


def test_prompts_stand_beside_tokens_where_they_are_asked_for_and_are_parted_again():
    tokens, visible = torch.arange(6.0).reshape(2, 3, 1), torch.tensor([[True, True, False], [True, True, True]])
    before, after = torch.full((2, 1), 7.0, dtype=torch.float64), torch.full((2, 1, 1), 8.0)
    prompted = beside(tokens, visible, [before], [after], lead=1)
    assert prompted.states[..., 0].tolist() == [[0, 7, 7, 1, 2, 8], [3, 7, 7, 4, 5, 8]]
    assert prompted.states.dtype == torch.float32
    assert prompted.visible[:, 3:].tolist() == [[True, False, True], [True, True, True]]
    assert prompted.positions.tolist() == [[0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 4, 5]]  # behind the last visible token
    parts = [part[..., 0].tolist() for part in prompted.parted(prompted.states)]
    assert parts == [[[0, 1, 2], [3, 4, 5]], [[7, 7, 8], [7, 7, 8]]]
    alone = beside(tokens, None)
    assert alone.visible is None and alone.positions is None and torch.equal(alone.parted(alone.states)[0], tokens)
