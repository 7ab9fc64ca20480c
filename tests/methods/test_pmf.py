"""PMF: what it reads with and without the other modality, what trains, what is kept, and what it leaves untouched."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from modalities import part_of, pictures
from pmf_pairs import IMAGE_DEPTH, IMAGE_WIDTH, PAIRS, UNEVEN, models, pair
from saved import saved_bytes
from tiny import DEPTH, WIDTH

from mitrain.core.config import choose
from mitrain.core.errors import ConfigError, ModelError
from mitrain.methods.pmf.pmf import PMF, PMFConfig
from mitrain.models import layouts

# Padding and neighbours change the order of sums in matrix products, and nothing else: roundings of 1.1e-16 on values
# below 10 through a few layers.
EXACT = 1e-12
names = pytest.mark.parametrize("name", PAIRS)


def close(a, b, tolerance=EXACT):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def frozen(case):
    """What the two models say by themselves: text states (B, T, D_t) and the image's vector (B, D_v)."""
    told, shown = case.backbones["text"].base_model, case.backbones["encoder"]
    options = {"use_cache": False} if told.config.model_type == "llama" else {}
    seen = shown(**case.inputs["encoder"]).last_hidden_state
    image = seen.mean(1) if shown.config.model_type == "whisper" else seen[:, 0]
    return told(**case.inputs["text"], **options).last_hidden_state, image


def total(reading):
    return reading.text.square().mean() + reading.vectors["image"].square().mean()


@names
@torch.no_grad()
def test_one_modality_alone_is_its_frozen_model(name):
    case = pair(name, **UNEVEN)
    text, image = frozen(case)
    shown = case.words.mask.bool()
    alone, seen = case.adapter.encode(case.words, None), case.adapter.encode(None, case.picture)
    close(alone.text[shown], text[shown])
    close(seen.vectors["image"], image)
    assert (alone.vectors, seen.text, seen.mask) == ({}, None, None)
    hidden = pictures(case.picture.feature, case.picture.states, case.picture.depth, infused=False)
    unfused = case.adapter.encode(case.words, hidden)
    close(unfused.text[shown], text[shown])
    close(unfused.vectors["image"], image)


@names
@torch.no_grad()
def test_together_each_modality_depends_on_the_other(name):
    case = pair(name, **UNEVEN)
    text, image = frozen(case)
    fused = case.encode()
    assert fused.text.shape == (*case.words.ids.shape, WIDTH) and fused.vectors["image"].shape == (3, IMAGE_WIDTH)
    assert case.adapter.attachment.encoder_width == IMAGE_WIDTH and torch.equal(fused.mask, case.words.mask)
    assert (fused.vectors["image"] - image).abs().max() > 1e-3
    assert (fused.text - text)[:, 0].abs().min(1).values.max() > 1e-6  # the very first token, also under a causal mask
    turned = case.adapter.encode(case.words, case.picture.rows(torch.tensor([1, 2, 0])))
    assert (turned.text - fused.text)[:, 0].abs().max() > 1e-3
    other = case.words.states.clone()
    other[:, case.words.mask.sum(1).min() - 1] += 1.0  # a last token: the queries, too, stand behind it
    assert (case.encode(states=other).vectors["image"] - fused.vectors["image"]).abs().max() > 1e-3


@names
@torch.no_grad()
def test_padding_and_the_neighbours_in_the_batch_do_not_matter(name):
    case = pair(name, **UNEVEN)
    fused, shown = case.encode(), case.words.mask.bool()
    noise = torch.where(shown[..., None], case.words.states, torch.randn_like(case.words.states))
    noisy = case.encode(states=noise)
    close(noisy.text[shown], fused.text[shown])
    close(noisy.vectors["image"], fused.vectors["image"])
    for row in range(3):
        count = int(shown[row].sum())
        words = type(case.words)(
            case.words.ids[row : row + 1, :count],
            case.words.mask[row : row + 1, :count],
            case.words.states[row : row + 1, :count],
            case.words.depth,
        )
        alone = case.adapter.encode(words, case.picture.rows(slice(row, row + 1)))
        close(alone.text[0], fused.text[row, :count])
        close(alone.vectors["image"][0], fused.vectors["image"][row])


@names
def test_every_parameter_gets_a_gradient_and_the_backbones_none(name):
    case = pair(name, **UNEVEN)
    total(case.encode()).backward()
    assert all(p.grad.abs().max() > 0 for p in case.adapter.parameters())
    own = set(case.adapter.parameters())
    assert all(p.grad is None for b in case.backbones.values() for p in b.parameters() if p not in own)


@contextmanager
def passes(backbones):
    """The (backbone, layer) of every layer that runs inside, in order."""
    ran = []
    layers = [(place, i, layer) for place in backbones for i, layer in enumerate(layouts.layers_of(backbones[place]))]
    hooks = [layer.register_forward_hook(lambda *_, where=(place, i): ran.append(where)) for place, i, layer in layers]
    yield ran
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["bert+vit", "llama+dinov2"])
def test_nothing_is_kept_for_backward_below_the_first_fusion_layer(name):
    """Each fusion layer runs twice, those below not at all; the bytes kept grow by the same amount with each."""
    backbones, kept = models(name), []
    weights = [p for b in backbones.values() for p in b.parameters()]
    for used in range(1, IMAGE_DEPTH + 1):
        case = pair(name, backbones, fusion_layers=used, **UNEVEN)
        own = [*weights, *case.adapter.parameters(), case.words.states, case.picture.states]
        with passes(backbones) as ran:
            kept.append(saved_bytes(lambda c=case: total(c.encode()), own))
        depths = {"text": DEPTH, "encoder": IMAGE_DEPTH}
        expected = [(place, depths[place] - used + i) for place in depths for i in range(used)]
        assert sorted(ran) == sorted(expected * 2)
        whole = saved_bytes(lambda c=case: total(c.encode(states=None)), own)  # the trunk runs, too
        entering = case.words.states.untyped_storage().nbytes()  # made anew there, so it may count
        assert kept[-1] <= whole <= kept[-1] + entering
        case.adapter.detach()
    assert kept[1] - kept[0] == kept[2] - kept[1] > 0.8 * kept[0]


@names
def test_checkpointing_gives_the_same_gradients_and_keeps_less(name):
    kept, gradients = [], []
    for enabled in (False, True):
        case = pair(name, fusion_layers=3, checkpoint=enabled)
        parameters = list(case.adapter.parameters())
        own = [*parameters, *(p for b in case.backbones.values() for p in b.parameters())]
        gradients.append(torch.autograd.grad(total(case.encode()), parameters))
        kept.append(saved_bytes(lambda c=case: total(c.encode()), own))
    for one, other in zip(*gradients, strict=True):
        close(one, other)
    assert kept[1] < 0.2 * kept[0]


SWITCHES = {
    "query_prompts=0": ({"query_prompts": 0}, ".query"),
    "query_context=0": ({"query_context": 0}, ".context"),
    "fusion_context=0": ({"fusion_context": 0}, ".fusion"),
    "map=linear": ({"map": "linear"}, ".map.2"),
    "direction=text-to-encoder": ({"direction": "text-to-encoder"}, "image_to_text"),
    "direction=encoder-to-text": ({"direction": "encoder-to-text"}, "text_to_image"),
}


@pytest.mark.parametrize("switch", SWITCHES)
@torch.no_grad()
def test_each_switch_leaves_its_parameters_out_and_changes_the_reading(switch):
    settings, absent = SWITCHES[switch]
    backbones = models("bert+vit")
    whole = pair("bert+vit", backbones)
    reading, kept = whole.encode(), whole.adapter.state_dict()
    assert any(absent in name for name in kept)
    whole.adapter.detach()
    case = pair("bert+vit", backbones, **settings)
    own = case.adapter.state_dict()
    assert not any(absent in name for name in own)
    same = {name for name in own if name in kept and own[name].shape == kept[name].shape}
    case.adapter.load_state_dict({**own, **{name: kept[name] for name in same}})
    changed, (text, image) = case.encode(), frozen(case)
    shown, towards = case.words.mask.bool(), settings.get("direction", "")
    assert ((changed.text - text)[shown].abs().max() < EXACT) == (towards == "text-to-encoder")
    assert ((changed.vectors["image"] - image).abs().max() < EXACT) == (towards == "encoder-to-text")
    assert (changed.text - reading.text)[shown].abs().max() > 1e-3 or towards == "encoder-to-text"
    assert (changed.vectors["image"] - reading.vectors["image"]).abs().max() > 1e-3 or towards == "text-to-encoder"
    case.adapter.detach()


@torch.no_grad()
def test_without_query_prompts_nothing_is_asked_of_the_other_encoder():
    for kind in ("bert+vit", "llama+dinov2"):
        case = pair(kind, query_prompts=0)
        assert {name.split(".")[-1] for name in case.adapter.state_dict()} == {"fusion"}
        own = case.encode()
        other = case.adapter.encode(case.words, replace(case.picture, states=case.picture.states.flip(0)))
        close(own.text, other.text)
        close(own.vectors["image"].flip(0), other.vectors["image"])


def test_one_direction_alone_still_trains_all_it_has():
    for direction, part in (("text-to-encoder", "image"), ("encoder-to-text", "text")):
        case = pair("bert+vit", direction=direction)
        part_of(case.encode(), part).square().mean().backward()
        assert all(p.grad.abs().max() > 0 for p in case.adapter.parameters())


def test_prompts_start_small_and_are_as_wide_as_the_layers_that_read_them():
    torch.manual_seed(0)
    adapter = PMF(PMFConfig(query_prompts=200))
    adapter.attach(models("bert+vit"))
    link = adapter.fusion[0]["text_to_image"]
    # the deviation of n numbers scatters by sigma / sqrt(2 n): 5 such for n = 200 · 32
    assert abs(link.query.std().item() - 0.02) < 5 * 0.02 / (2 * 200 * WIDTH) ** 0.5
    assert link.query.shape == (200, WIDTH) and link.fusion.shape == (4, IMAGE_WIDTH)


def test_what_does_not_fit_is_refused_in_one_line():
    backbones = models("bert+vit")
    with pytest.raises(ConfigError, match=f"fusion_layers={DEPTH}, but the encoder model has {IMAGE_DEPTH} layers"):
        PMF(PMFConfig(fusion_layers=DEPTH)).attach(backbones)
    with pytest.raises(ModelError, match="give it the encoder model"):
        PMF(PMFConfig()).attach({"text": backbones["text"]})
    assert not hasattr(backbones["text"], "pmf") and all(p.requires_grad for p in backbones["text"].parameters())
    with pytest.raises(ConfigError, match="map_width"):
        choose("adapter", {"name": "pmf", "map": "linear", "map_width": 5})
    with pytest.raises(ConfigError, match="nothing is trained: give query_prompts"):
        choose("adapter", {"name": "pmf", "query_prompts": 0, "fusion_context": 0})
    case = pair("bert+vit", backbones)
    case.adapter.detach()
    with pytest.raises(ModelError, match="made for models of other widths"):
        case.adapter.attach({**backbones, "encoder": models("bert+vit")["text"]})
    assert all(p.requires_grad for b in backbones.values() for p in b.parameters())
    case.adapter.attach(backbones)
    with pytest.raises(ModelError, match="only its global feature"):
        case.adapter.encode(case.words, pictures(case.picture.feature))
    for wrong in ((replace(case.words, depth=0), case.picture), (case.words, replace(case.picture, depth=0))):
        with pytest.raises(ModelError, match="states are of depth 0, but pmf starts at"):
            case.adapter.encode(*wrong)


def test_texts_beyond_a_sliding_window_are_refused():
    """There, how far a prompt reaches would depend on the padding, and so on the other texts of the batch."""
    backbones = models("bert+vit") | {"text": models("llama+dinov2")["text"]}
    case = pair("bert+vit", backbones)
    case.encode()
    case.adapter.detach()
    backbones["text"].config.layer_types = ["full_attention"] * (DEPTH - 1) + ["sliding_attention"]
    backbones["text"].config.sliding_window = case.words.ids.shape[1] + 8 - 1
    case = pair("bert+vit", backbones)
    with pytest.raises(ModelError, match="17 tokens with their prompts exceed the window of 16"):
        case.encode()
    assert case.adapter.encode(case.words, None).text is not None
