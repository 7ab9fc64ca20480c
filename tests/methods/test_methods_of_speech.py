"""Methods that change an encoder, on clips of unequal length and on samples that have none: for each name in METHODS."""

from dataclasses import replace

import pytest
import torch
from attached import close, made
from tiny import scramble, text, tiny
from tiny_encoders import FRAMES, sound, tiny_encoder

from mitrain.core.errors import ConfigError
from mitrain.methods import METHODS
from mitrain.models.batch import ModalityInputs, TextBatch
from mitrain.models.frozen import trunk_states

CHANGING = {
    "pmf": {},
    "mope": {"length": 2, "experts": 2},
    "mope of the text": {"main": "text", "length": 2, "experts": 2, "feature": "all"},
    "mope of the mean": {"length": 2, "experts": 2, "feature": "mean"},
    "aurora": {"rank": 4},
    "lora": {"where": "both", "rank": 2},
    "ia3": {"where": "encoder"},
    "full": {"layers": 1},
    "gated-xattn": {"heads": 2, "head_dim": 4, "feed_forward": 1},
    "vlora": {"rank": 2, "width": 8, "heads": 2},
    "uniadapter": {"width": 4},
}
"""Settings of every method that changes an encoder, but for those that only a picture serves."""
LENGTHS = ((FRAMES, FRAMES), (5, 3), (FRAMES, 6))
"""Of each clip, how many states it has, and how many of them are read out."""
each = pytest.mark.parametrize("name", CHANGING)
on = pytest.mark.parametrize(
    ("name", "words"), [*((name, "llama") for name in CHANGING), ("pmf", "bert"), ("mope", "bert"), ("aurora", "bert")]
)


def build(name: str, words: str):
    """The method with random parameters on a text model and Whisper's encoder in float64."""
    backbones = {"text": tiny("llama", torch.float64) if words == "llama" else tiny_encoder("bert", torch.float64)}
    backbones["encoder"] = tiny_encoder("whisper", torch.float64, d_model=24, encoder_layers=3)
    adapter = made(name.split()[0], CHANGING[name])
    adapter.attach({each: backbones[each] for each in adapter.traits.backbones})
    scramble(adapter)
    return adapter.eval(), backbones


def batch(adapter, backbones, lacking=None) -> tuple[TextBatch, ModalityInputs]:
    """Three texts and three clips; with ``lacking`` the clips of these samples are not there."""
    tokens, first = text(padding="right"), adapter.attachment.first_layers
    with adapter.disabled():
        below = trunk_states(backbones["text"], first["text"], **tokens)
        states = trunk_states(backbones["encoder"], first["encoder"], **sound(dtype=torch.float64))
    counts = torch.tensor(LENGTHS)
    states = states * (torch.arange(FRAMES) < counts[:, :1])[..., None]
    present = {} if lacking is None else {"speech": ~torch.tensor([i in lacking for i in range(3)])}
    inputs = ModalityInputs({"speech": torch.ones(3, 5)}, present, states, first["encoder"], "speech", counts=counts)
    return TextBatch(tokens["input_ids"], tokens["attention_mask"], below, first["text"]), inputs


def rows(words: TextBatch, index: list[int]) -> TextBatch:
    """These samples, without what is padding for all of them."""
    longest = int(words.mask[index].sum(1).max())
    return replace(
        words, ids=words.ids[index, :longest], mask=words.mask[index, :longest], states=words.states[index, :longest]
    )


def parts(outputs, words) -> dict[str, torch.Tensor]:
    text = outputs.text if outputs.text is None else outputs.text[words.mask.bool()]
    found = {"text": text, "joint": outputs.joint, **outputs.vectors}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def equal(some, others):
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        close(tensor, others[name])


def test_every_method_that_changes_an_encoder_is_here():
    changing = {name for name in METHODS if made(name).traits.changes_encoder} | {"ia3", "full"}
    assert {name.split()[0] for name in CHANGING} == changing - {"visual-prefix"}


@on
@torch.no_grad()
def test_a_clip_says_the_same_alone_and_beside_longer_ones(name, words):
    adapter, backbones = build(name, words)
    texts, inputs = batch(adapter, backbones)
    together = adapter.encode(texts, inputs)
    noise = torch.where(inputs.visible[..., None], inputs.states, torch.randn_like(inputs.states))
    equal(parts(adapter.encode(texts, replace(inputs, states=noise)), texts), parts(together, texts))
    for i, (count, _) in enumerate(LENGTHS):
        alone, own = rows(texts, [i]), inputs.rows(slice(i, i + 1))
        made = adapter.encode(alone, replace(own, states=own.states[:, :count]))
        wanted = {name: x[i : i + 1] for name, x in together.vectors.items()}
        wanted["text"] = together.text[i][texts.mask[i].bool()]
        wanted |= {} if together.joint is None else {"joint": together.joint[i : i + 1]}
        equal(parts(made, alone), wanted)


@on
@torch.no_grad()
def test_what_a_lacking_file_would_say_changes_nothing(name, words):
    adapter, backbones = build(name, words)
    texts, whole = batch(adapter, backbones)
    _, inputs = batch(adapter, backbones, lacking=(1,))
    noisy = inputs.states.clone()
    noisy[1] = torch.randn_like(noisy[1])
    outputs = adapter.encode(texts, inputs)
    if "of the text" not in name and name.startswith("mope"):  # the main encoder is one that reads no file at all
        assert (outputs.joint[1] - adapter.encode(texts, whole).joint[1]).abs().max() > 1e-6
    equal(parts(adapter.encode(texts, replace(inputs, states=noisy)), texts), parts(outputs, texts))
    if adapter.attachment.encoder_width:  # else the vector is the frozen encoder's, as it was given
        assert not outputs.vectors["speech"][1].any() and outputs.vectors["speech"][0].any()
    complete = adapter.encode(texts, whole)
    for i in (0, 2):  # nor does it change what its neighbours say
        close(outputs.text[i][texts.mask[i].bool()], complete.text[i][texts.mask[i].bool()])
        close(outputs.vectors["speech"][i], complete.vectors["speech"][i])
    blind = adapter.encode(texts, replace(whole, infused=False))
    close(outputs.text[1][texts.mask[1].bool()], blind.text[1][texts.mask[1].bool()])


@each
def test_gradients_are_finite_where_files_are_lacking(name):
    adapter, backbones = build(name, "bert")
    adapter.train()
    texts, inputs = batch(adapter, backbones, lacking=(0, 1, 2))
    outputs = adapter.encode(texts, inputs)
    total = sum(part.square().sum() for part in parts(outputs, texts).values())
    extra = adapter.extra_loss()
    (total if extra is None else total + extra[0] / extra[1]).backward()
    grads = [p.grad for p in adapter.parameters() if p.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("name", ["pmf", "aurora", "lora", "full"])
@torch.no_grad()
def test_a_method_that_is_switched_off_is_the_plain_encoder(name):
    adapter, backbones = build(name, "bert")
    _, inputs = batch(adapter, backbones)
    with adapter.disabled():
        vector = adapter.encode(None, inputs).vectors["speech"][0]
    adapter.detach()
    close(vector, backbones["encoder"](**sound(dtype=torch.float64)).last_hidden_state[0].mean(0))


def test_a_prefix_of_patches_is_refused_where_there_are_none():
    adapter = made("visual-prefix")
    with pytest.raises(ConfigError, match="squares of a picture, which WhisperEncoder does not read: put an image encoder"):
        adapter.attach({"text": tiny("llama"), "encoder": tiny_encoder("whisper")})
