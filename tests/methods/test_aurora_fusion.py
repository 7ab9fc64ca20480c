"""Aurora's fusion: the composed cross-attention, the gated query transformation, informative context enhancement."""

import math
from dataclasses import replace

import pytest
import torch
from modalities import pictures
from tiny import scramble, tiny
from tiny_pair import DEPTH, WIDTH, aurora, batch, dinov2, pair
from torch.nn import functional as F

from mitrain.core.errors import ModelError
from mitrain.methods.aurora.fusion import RESIDUAL, distinct, enhanced, gated, orthogonal, rms_of
from mitrain.models.batch import TextBatch

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def states(rows=2, tokens=5, seed=0):
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def visible(rows=2, tokens=5):
    seen = torch.ones(rows, tokens, dtype=torch.bool)
    seen[0, 3:] = False
    return seen


def softmax_attention(q, k, v, heads):
    """By hand: heads of q (B, T, D) over k, v (B, N, D)."""
    split = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    q, k, v = split
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


# the composed cross-attention


def test_a_composed_layer_is_its_formula_by_hand():
    """BERT's top layer: A ← A + s W_o softmax(W_q A · W_k z) W_v z with the fusion's own updates, then its FFN."""
    backbones = pair()
    layer = backbones["text"].encoder.layer[DEPTH - 1]
    block = layer.attention
    scramble(block.output.LayerNorm)  # a trained norm's γ and β are not 1 and 0
    adapter = aurora(backbones, fusion_layers=1, gqt="none")
    scramble(adapter)
    hidden, image = states(2, 5), states(2, 7, 1)
    found = adapter.fusion(hidden, visible(), image)
    a = block(hidden, visible()[:, None, None].expand(-1, 1, 5, -1))[0]
    norm = block.output.LayerNorm
    spread = math.sqrt(norm.weight.square().mean() + norm.bias.square().mean())
    z = spread * F.layer_norm(image, (WIDTH,))
    weights = {}
    for point in (p for p in adapter._points if p.part == "fusion"):
        weights[point.kind] = point.module.weight + adapter.modes.delta(point), point.module.bias
    q, k, v = (F.linear(x, *weights[kind]) for kind, x in (("q", a), ("k", z), ("v", z)))
    a = a + adapter.fusion.scale[0] * F.linear(softmax_attention(q, k, v, 4), *weights["o"])
    expected = layer.output(layer.intermediate(a), a)
    assert torch.allclose(found, expected, **EXACT)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_scale_0_is_the_text_alone(kind):
    backbones = pair(kind)
    words, picture = batch(backbones)
    adapter = aurora(backbones, fusion_scale=0.0)
    scramble(adapter.modes)
    reading = adapter.encode(words, picture)
    blind = adapter.encode(words, replace(picture, infused=False))
    assert torch.allclose(reading.joint, blind.joint, **EXACT)
    with torch.no_grad():
        adapter.fusion.scale.fill_(1.0)
    assert not torch.allclose(adapter.encode(words, picture).joint, blind.joint, atol=1e-3)


def test_the_pictures_scale_and_offset_do_not_matter_and_keys_get_the_texts_spread():
    backbones = pair()
    adapter = aurora(backbones)
    image = states(2, 7, 1)
    one = adapter.fusion(states(), visible(), image)
    other = adapter.fusion(states(), visible(), 1e3 * image + 5)
    assert torch.allclose(one, other, atol=1e-4)  # the norm's ε of 1e-5 beside a variance of 1
    norm = backbones["text"].encoder.layer[0].attention.output.LayerNorm
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    given = norm(torch.randn(4000, WIDTH, dtype=torch.float64))
    assert math.isclose(rms_of(norm), given.square().mean().sqrt(), rel_tol=0.02)


def test_unequal_widths_meet_in_a_fixed_orthogonal_map():
    for shape in ((32, 16), (16, 32), (5, 5)):
        q = orthogonal(*shape)
        gram = q.T @ q if shape[0] >= shape[1] else q @ q.T
        assert torch.allclose(gram, torch.eye(min(shape), dtype=torch.float64), atol=1e-12)
        assert torch.equal(q, orthogonal(*shape))
    adapter = aurora(pair("llama"))
    assert adapter.fusion.turn.shape == (32, WIDTH) and "fusion.turn" in adapter.state_dict()
    assert "turn" not in dict(adapter.fusion.named_parameters()) and not hasattr(aurora(pair()).fusion, "turn")


def test_the_composed_attention_has_updates_of_its_own():
    """Those of the text layers reach the text, those of the fusion only the fused vector."""
    backbones = pair()
    words, picture = batch(backbones)
    adapter = aurora(backbones, text=["q"], fusion=["q", "v"])
    scramble(adapter)
    before = adapter.encode(words, picture)
    with torch.no_grad():
        adapter.modes.vectors["fusion"].add_(1.0)
    after = adapter.encode(words, picture)
    assert torch.equal(before.text, after.text) and not torch.allclose(before.joint, after.joint, atol=1e-3)
    assert len(adapter.modes.vectors["fusion"]) == 2 * 2 and len(adapter.modes.vectors["text"]) == DEPTH


def test_layers_of_another_make_compose_no_cross_attention():
    for name in ("gemma2", "gemma3"):
        with pytest.raises(ModelError, match=r"no cross-attention can be composed .* adapter.fusion_layers=0"):
            aurora({"text": tiny(name, torch.float64), "encoder": dinov2(torch.float64)})


def test_qwen3s_head_norms_and_grouped_heads_are_kept():
    backbones = {"text": tiny("qwen3", torch.float64), "encoder": dinov2(torch.float64)}
    words, picture = batch(backbones)
    adapter = aurora(backbones)
    one = adapter.encode(words, picture).joint
    block = backbones["text"].model.layers[-1].self_attn
    (cross,) = [h for h in block._forward_hooks.values() if "_composed_hook" in h.__qualname__]
    held = cross.__closure__
    composed = next(c.cell_contents for c in held if hasattr(c.cell_contents, "head_norms"))
    assert composed.head_norms == (block.q_norm, block.k_norm) and composed.before
    with torch.no_grad():
        block.k_norm.weight.mul_(3)
    assert not torch.allclose(adapter.encode(words, picture).joint, one, atol=1e-4)


# gated query transformation


def test_the_gate_as_written_is_one_over_t_at_the_start():
    """With γ = β = 0 the pretrained signal is divided by the text's length, padding not counted."""
    y = states()
    out = gated(y, torch.zeros_like(y), visible())
    assert torch.allclose(out[0, :3], y[0, :3] / 3, **EXACT) and torch.allclose(out[1], y[1] / 5, **EXACT)
    for kind in ("bert", "blip"):
        backbones = pair(kind)
        words, picture = batch(backbones)
        adapter = aurora(backbones, gqt="gate")
        seen = []
        adapter.fusion.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        adapter.encode(words, picture)
        plain = aurora(pair(kind), gqt="none")
        plain.fusion.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        plain.encode(words, picture)
        first = seen[0].norm(dim=-1)[2].mean() / seen[1].norm(dim=-1)[2].mean()
        assert first < 1.5 / 9  # the third text has 9 tokens


def test_the_gate_by_hand():
    y, e = states(1, 4), states(1, 4, 1)
    a = (y[0] @ e[0].T).sum(1)
    g = a.softmax(0)[:, None]
    expected = g * y[0] + (1 - g) * e[0]
    assert torch.allclose(gated(y, e, visible(1, 4) | True)[0], expected, **EXACT)


@pytest.mark.parametrize("kind", ["bert", "llama", "blip"])
def test_the_residual_form_keeps_the_signal_and_adds_its_terms(kind):
    backbones = pair(kind)
    words, picture = batch(backbones)
    plain = aurora(pair(kind), gqt="none", fusion_layers=DEPTH if kind == "blip" else 1)
    adapter = aurora(backbones, gqt="residual", fusion_layers=DEPTH if kind == "blip" else 1)
    assert torch.equal(adapter.encode(words, picture).joint, plain.encode(words, picture).joint)
    kept = []
    transform = adapter.fusion._transform

    def spy(place, y):
        out = transform(place, y)
        kept.append((place, y, adapter.fusion._pass.own, adapter.fusion._pass.across, out))
        return out

    adapter.fusion._transform = spy
    scramble(adapter.fusion)
    adapter.encode(words, picture)
    for place, y, own, across, out in kept:
        (g_s, b_s), (g_c, b_c) = adapter.fusion.gqt[place]
        expected = y + RESIDUAL * (g_s * own + b_s) + RESIDUAL * (g_c * across + b_c)
        assert torch.allclose(out, expected, **EXACT) and not torch.allclose(own, across, atol=1e-3)
        assert not torch.allclose(out, y, atol=1e-3)
    assert len(kept) == adapter.fusion.layers


# informative context enhancement


def test_ice_by_hand():
    f, e = states(1, 3)[0], states(1, 4, 1)[0]
    weights = (f @ e.T / math.sqrt(WIDTH)).softmax(-1)
    assert torch.allclose(enhanced(f, e), f + weights @ e, **EXACT)


def test_ice_treats_right_and_wrong_pairs_alike():
    """A pair's vector depends on the batch only by which texts are in it: not by its place, its partner or repetitions."""
    backbones = pair()
    words, picture = batch(backbones)
    adapter = aurora(backbones, ice=True)
    scramble(adapter)
    order = torch.tensor([0, 1, 2, 0, 1, 2, 0])  # texts of right pairs, of wrong pairs, and one again
    seen = torch.tensor([0, 1, 2, 1, 2, 0, 0])
    pairs = adapter.encode(TextBatch(words.ids[order], words.mask[order]), picture.rows(seen)).joint
    right = adapter.encode(words, picture).joint
    wrong = adapter.encode(words, picture.rows(torch.tensor([1, 2, 0]))).joint
    assert torch.allclose(pairs[:3], right, **EXACT) and torch.allclose(pairs[3:6], wrong, **EXACT)
    assert torch.allclose(pairs[6], right[0], **EXACT)
    without = aurora(pair())
    without.load_state_dict(adapter.state_dict())
    plain = without.encode(TextBatch(words.ids[order], words.mask[order]), picture.rows(seen)).joint
    added = (pairs - plain).norm(dim=-1)
    assert (added[3:6] > 0.1 * added[:3].mean()).all()  # wrong pairs are enhanced too
    alone = adapter.encode(TextBatch(words.ids[:1], words.mask[:1]), picture.rows(slice(0, 1))).joint
    assert not torch.allclose(alone, right[:1], atol=1e-3)  # its neighbours' texts are what it adds


def test_equal_rows_are_found_once_each():
    ids = torch.tensor([[5, 6, 0], [5, 6, 7], [6, 5, 0], [5, 6, 7], [5, 6, 0]])
    first, group = distinct(ids)
    assert sorted(first.tolist()) == [0, 1, 2] and torch.equal(ids[first][group], ids)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rows = torch.randn(3, 4, 5).to(dtype)[[2, 0, 2, 1]]
        first, group = distinct(rows)
        assert sorted(first.tolist()) == [0, 1, 3] and torch.equal(rows[first][group], rows)


def test_each_text_and_picture_goes_through_its_encoder_once():
    backbones = pair()
    words, picture = batch(backbones)
    adapter = aurora(backbones)
    scramble(adapter)
    rows, sizes = torch.tensor([0, 1, 2, 2, 0]), {}
    for name, module in (
        ("text", backbones["text"].encoder.layer[0]),
        ("encoder", backbones["encoder"].encoder.layer[0]),
    ):
        module.register_forward_pre_hook(lambda m, args, name=name: sizes.setdefault(name, len(args[0])) and None)
    many = adapter.encode(TextBatch(words.ids[rows], words.mask[rows]), picture.rows(torch.tensor([1, 1, 2, 1, 1])))
    assert sizes == {"text": 3, "encoder": 2}
    for row, (a, b) in enumerate([(0, 1), (1, 1), (2, 2), (2, 1), (0, 1)]):
        one = adapter.encode(TextBatch(words.ids[a : a + 1], words.mask[a : a + 1]), picture.rows(slice(b, b + 1)))
        assert torch.allclose(many.joint[row], one.joint[0], **EXACT)
        assert torch.allclose(many.vectors["image"][row], one.vectors["image"][0], **EXACT)


def test_pictures_alone_need_no_contexts():
    adapter = aurora(pair(), ice=True)
    _, picture = batch(pair())
    assert adapter.encode(None, pictures(picture.feature, picture.states)).joint is None


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_gate_of_channels_starts_as_the_pretrained_text_and_opens_where_it_helps(kind):
    backbones = pair(kind)
    words, picture = batch(backbones)
    adapter = aurora(backbones, fusion_gate="channels")
    width = adapter.fusion.width
    assert adapter.fusion.scale.shape == (adapter.fusion.layers, width) and not adapter.fusion.scale.any()
    with torch.no_grad():
        assert torch.equal(
            adapter.encode(words, picture).joint, adapter.encode(words, replace(picture, infused=False)).joint
        )
    adapter.encode(words, picture).joint[:, 0].sum().backward()
    assert (adapter.fusion.scale.grad != 0).all(1).any()  # every channel of a layer has a direction of its own
    one, many = aurora(pair(kind), fusion_scale=0.3), aurora(pair(kind), fusion_gate="channels", fusion_scale=0.3)
    with torch.no_grad():
        assert torch.equal(one.encode(*batch(pair(kind))).joint, many.encode(*batch(pair(kind))).joint)
