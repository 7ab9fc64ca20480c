"""Window attention with prompts: the frozen Swin without them, windows by hand with them, and no mixing of samples."""

import math

import pytest
import torch
from tiny_mope import attached, tiny_swin

from mitrain.core.errors import ModelError
from mitrain.methods.mope.swin import SwinEncoder, attend, grid_of, merge_patches, run_block
from mitrain.models.frozen import trunk_states
from mitrain.training.checkpoint import only_trainable, restore

EXACT = {"rtol": 0, "atol": 1e-11}
ROWS, SIDE, WINDOW, COUNT = 3, 8, 4, 2


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_prompts(index, tokens, mask):
    return tokens[:, :0]


@pytest.mark.parametrize(
    ("pixels", "changes"),
    [(32, {}), (16, {"depths": (2, 3), "num_heads": (2, 2)}), (24, {"depths": (2, 2), "num_heads": (2, 2)})],
)
def test_without_prompts_the_encoder_is_the_frozen_model(pixels, changes):
    """24 pixels are 12 x 12 patches, whose second stage of 6 x 6 is padded to whole windows."""
    model, image = tiny_swin(**changes), random(2, 3, pixels, pixels)
    with torch.no_grad():
        expected = model(image).last_hidden_state
        for carried in (True, False):
            encoder = SwinEncoder(model, carried)
            encoded = encoder.run(trunk_states(model, 0, pixel_values=image), None, no_prompts, None, False)
            torch.testing.assert_close(encoder.finish(encoded.tokens), expected, **EXACT)
            assert encoded.prompts.shape[1] == 0
        top = trunk_states(model, encoder.depth, pixel_values=image)
        torch.testing.assert_close(model.layernorm(top), expected, **EXACT)
    with pytest.raises(ModelError, match="depth 1 are not kept"):
        trunk_states(model, 1, pixel_values=image)


def windows_of(shift):
    """The tokens of each window and, token by token, the part of the picture that they come from, by counting."""
    found = {}
    for row in range(SIDE):
        for column in range(SIDE):
            r, c = (row + shift) % SIDE, (column + shift) % SIDE  # the token that a roll by -shift puts there
            wrapped = (row + shift >= SIDE, column + shift >= SIDE)
            found.setdefault((row // WINDOW, column // WINDOW), []).append((r * SIDE + c, wrapped))
    return list(found.values())


def attention_by_hand(block, states, prompts, heads=2):
    """One sample's window attention, window by window and query by query: what it adds to tokens and prompts."""
    attention, width = block.attention, states.shape[-1] // heads
    table = attention.relative_position_bias.relative_position_bias_table
    seen, new = torch.zeros_like(states), torch.zeros_like(prompts)
    windows = windows_of(block.shift_size)
    for window in windows:
        places = [place for place, _ in window]
        x = torch.cat([prompts, states[places]])
        q, k, v = (getattr(attention, f"{name}_proj")(x).unflatten(-1, (heads, width)) for name in "qkv")
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(width)
        for i, (_, here) in enumerate(window):
            for j, (_, there) in enumerate(window):
                rows, columns = i // WINDOW - j // WINDOW, i % WINDOW - j % WINDOW
                bias = table[(rows + WINDOW - 1) * (2 * WINDOW - 1) + columns + WINDOW - 1]
                scores[:, COUNT + i, COUNT + j] += bias + (0.0 if here == there else -100.0)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        out = attention.o_proj(out)
        new += out[:COUNT] / len(windows)
        seen[places] = out[COUNT:]
    return seen, new


@pytest.mark.parametrize("number", [0, 1])
def test_a_block_by_hand(number):
    """Block 1 is shifted. Each sample has prompts of its own."""
    model = tiny_swin(image_size=2 * SIDE)
    block = model.encoder.layers[0].blocks[number]
    assert block.shift_size == (0, WINDOW // 2)[number]
    states, prompts = random(ROWS, SIDE * SIDE, 8), random(ROWS, COUNT, 8, seed=1)
    with torch.no_grad():
        found = run_block(block, states, prompts, (SIDE, SIDE))
        for b in range(ROWS):
            seen, new = attention_by_hand(block, block.layernorm_before(states[b]), block.layernorm_before(prompts[b]))
            for result, before, added in ((found[0][b], states[b], seen), (found[1][b], prompts[b], new)):
                middle = before + added
                torch.testing.assert_close(result, middle + block.mlp(block.layernorm_after(middle)), **EXACT)


def test_prompts_reach_their_own_windows_only():
    model = tiny_swin()
    block = model.encoder.layers[0].blocks[1]
    states, prompts = random(ROWS, 256, 8), random(ROWS, COUNT, 8, seed=1)
    changed = prompts.clone()
    changed[1] += 1
    with torch.no_grad():
        (seen, new), (other, also) = (attend(block, states, p, (16, 16)) for p in (prompts, changed))
    assert torch.equal(seen[[0, 2]], other[[0, 2]]) and torch.equal(new[[0, 2]], also[[0, 2]])
    assert (seen[1] - other[1]).abs().amax(-1).min() > 1e-6  # every token of sample 1 sees its prompts
    assert not block.attention.relative_position_bias._forward_hooks


@pytest.mark.parametrize("stage_start", ["carried", "prompted"])
def test_a_sample_does_not_depend_on_its_neighbours(stage_start):
    found = attached("bert", "swin", stage_start=stage_start)
    with torch.no_grad():
        whole = found.joint()
        for order in ([2, 0], [1, 1, 1, 3, 0]):
            torch.testing.assert_close(found.rows(torch.tensor(order)).joint(), whole[order], **EXACT)
    assert not torch.allclose(whole[0], whole[1])


def test_which_blocks_are_prompted():
    carried, prompted = (SwinEncoder(tiny_swin(depths=(2, 2, 3)), c) for c in (True, False))
    assert (carried.widths, carried.stages, carried.entry) == ((8, 16, 32, 32), (0, 1, 2, 2), 8)
    assert prompted.widths == (8, 8, 16, 16, 32, 32, 32) and prompted.stages == (0, 0, 1, 1, 2, 2, 2)
    assert prompted.entry == 0 and carried.stage_widths == prompted.stage_widths == (8, 16, 32)
    found = attached("bert", "swin")
    assert found.mope.entry.shape == (5, 8) and len(found.mope.prompts) == 3
    assert attached("bert", "swin", stage_start="prompted").mope.entry is None


def test_carried_prompts_go_through_the_merging():
    """Into the first block of stage 1 goes what left the prompts of stage 0, merged as if a prompt had four equal parts."""
    model = tiny_swin()
    merging, states, prompts = model.encoder.layers[0].downsample, random(2, 256, 8), random(2, COUNT, 8, seed=1)
    tokens, merged = merge_patches(merging, states, prompts, (16, 16))
    torch.testing.assert_close(tokens, merging(states, (16, 16)), **EXACT)
    flat = torch.full((2, 4, 8), 0.0, dtype=torch.float64) + prompts[:, :1]
    torch.testing.assert_close(merged[:, :1], merging(flat, (2, 2)), **EXACT)  # a 2 x 2 picture of one prompt
    found = attached("bert", "swin")
    inside = {}
    for s, stage in enumerate(found.models["encoder"].encoder.layers):
        stage.blocks[0].layernorm_before.register_forward_hook(
            lambda m, args, out, s=s: inside.setdefault(s, []).append(args[0])
        )
    with torch.no_grad():
        found.joint()
    assert [x.shape[1:] for x in inside[0]] == [(256, 8), (5, 8)] and [x.shape[1:] for x in inside[1]] == [
        (64, 16),
        (5, 16),
    ]
    torch.testing.assert_close(inside[0][1], found.mope.entry.expand(4, -1, -1), **EXACT)


def test_the_feature_is_the_mean_of_prompts_and_patches():
    found = attached("bert", "swin")
    patches = attached("bert", "swin", feature="mean")
    kept = []
    encoder = found.mope._encoders["encoder"]
    found.models["encoder"].layernorm.register_forward_hook(lambda m, args, out: kept.append(out))
    with torch.no_grad():
        joint = found.joint()
        assert kept[0].shape == (4, 16 + 5, 32) and encoder.depth == 3
        torch.testing.assert_close(joint, kept[0].mean(1), **EXACT)
        torch.testing.assert_close(patches.joint(), kept[0][:, 5:].mean(1), **EXACT)


def test_swin_as_the_other_encoder_and_left_alone():
    found = attached("bert", "swin", main="text", other_length=0)
    assert found.mope.attachment.first_layers["encoder"] == 3 and found.picture.states.shape == (4, 16, 32)
    with torch.no_grad():
        reading = found.encode()
        expected = found.models["encoder"].layernorm(found.picture.states).mean(1)
    torch.testing.assert_close(reading.vectors["image"], expected, **EXACT)
    assert len(attached("bert", "swin", main="text").mope.others) == 6  # deep prompts in every block


def test_a_grid_that_is_no_square_is_refused():
    model = tiny_swin()
    assert grid_of(model, torch.zeros(1, 256, 8)) == (16, 16)
    assert grid_of(model, torch.zeros(1, 64, 8)) == (8, 8)
    with pytest.raises(ModelError, match="60 patches are neither Swin's 16 x 16 nor a square"):
        grid_of(model, torch.zeros(1, 60, 8))


def test_the_first_two_blocks_may_share_a_router_as_in_the_release_of_conditional_prompts():
    settings = {"router": "cpt", "stage_start": "prompted"}
    pair = attached("bert", "swin", **settings, shared_router=True)
    first, second = pair.mope.prompts[:2]
    assert first.router is second.router and pair.mope.prompts[2].router is not first.router
    pair.joint()
    assert torch.equal(pair.mope.routing[0], pair.mope.routing[1])
    own = attached("bert", "swin", **settings)
    own.joint()
    assert not torch.equal(own.mope.routing[0], own.mope.routing[1])
    saved = {name: tensor.clone() for name, tensor in only_trainable(pair.mope).items()}
    again = attached("bert", "swin", **settings, shared_router=True)
    restore(again.mope, saved, "prompts")
    assert torch.equal(again.joint(), pair.joint())
