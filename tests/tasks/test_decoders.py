"""The segmentation decoders against their equations, written out naively in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mitrain.core.errors import ConfigError, ModelError
from mitrain.tasks.decoders import (
    FilmDecoder,
    GroundDecoder,
    UnetDecoder,
    grounding_loss,
    to_map,
    unet_sizes,
)

GRID = (3, 4)
WIDTHS = [10, 6, 8]
CONDITION = 5
CENTRES = torch.tensor([(x, y) for y in (-2 / 3, 0, 2 / 3) for x in (-0.75, -0.25, 0.25, 0.75)], dtype=torch.float64)


def inputs(batch: int = 2, prefix: int = 1, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + GRID[0] * GRID[1]
    levels = [torch.randn(batch, tokens, c, generator=generator, dtype=torch.float64) for c in WIDTHS]
    return levels, torch.randn(batch, CONDITION, generator=generator, dtype=torch.float64)


def film_decoder(**options) -> FilmDecoder:
    torch.manual_seed(1)
    return FilmDecoder(WIDTHS, CONDITION, **({"dim": 8, "heads": 2, "ffn": 12} | options)).double()


def unet_decoder(**options) -> UnetDecoder:
    torch.manual_seed(1)
    return UnetDecoder(WIDTHS, CONDITION, **({"width": 7} | options)).double()


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_setting_has_the_published_number_of_parameters():
    with torch.device("meta"):
        assert count(FilmDecoder([1024] * 3, 4096)) == 1_620_642


def naive_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def naive_layer(x: Tensor, weights: dict[str, Tensor], heads: int) -> Tensor:
    """Post-norm transformer layer, one head at a time."""
    q, k, v = (x @ weights["self_attn.in_proj_weight"].T + weights["self_attn.in_proj_bias"]).chunk(3, dim=-1)
    outputs = []
    for qh, kh, vh in zip(*(part.chunk(heads, dim=-1) for part in (q, k, v)), strict=True):
        scores = torch.einsum("btd,bsd->bts", qh, kh) / qh.shape[-1] ** 0.5
        outputs.append(scores.softmax(-1) @ vh)
    mixed = torch.cat(outputs, -1) @ weights["self_attn.out_proj.weight"].T + weights["self_attn.out_proj.bias"]
    x = naive_norm(x + mixed, weights, "norm1")
    inner = (x @ weights["linear1.weight"].T + weights["linear1.bias"]).clamp_min(0)
    return naive_norm(x + inner @ weights["linear2.weight"].T + weights["linear2.bias"], weights, "norm2")


def ground_decoder() -> GroundDecoder:
    torch.manual_seed(1)
    return GroundDecoder(WIDTHS, CONDITION, dim=8, heads=2, ffn=12).double()


def test_what_is_meant_is_the_cosine_of_query_and_patch():
    decoder, (levels, z) = ground_decoder(), inputs()
    logits, meant = decoder.grounded(levels, z, GRID)
    scales = [(x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() for x in levels]
    h = torch.cat([(x - x.mean(-1, keepdim=True)) / s for x, s in zip(levels, scales, strict=True)], -1)
    place = torch.cat([CENTRES.new_zeros(1, 2), CENTRES])
    x = h @ decoder.look.weight.T + decoder.look.bias + place @ decoder.places[0].weight.T
    for layer in decoder.context:
        x = naive_layer(x, layer.state_dict(), 2)
    keys = torch.cat([h, x], -1) @ decoder.key.weight.T + decoder.key.bias
    cosines = torch.cosine_similarity(keys, (z @ decoder.query.weight.T + decoder.query.bias)[:, None], -1)
    torch.testing.assert_close(meant, (10 * cosines[:, 1:]).reshape(2, *GRID), rtol=1e-6, atol=1e-6)
    patches = cosines[:, 1:]
    peaks = torch.stack([cosines, cosines - patches.amax(1, True), cosines - patches.mean(1, True)], -1)
    o = h @ decoder.reduce.weight.T + decoder.reduce.bias + place @ decoder.places[1].weight.T
    o = o + peaks @ decoder.pointed.weight.T + decoder.pointed.bias
    for layer in decoder.layers:
        o = naive_layer(o, layer.state_dict(), 2)
    torch.testing.assert_close(logits, decoder.enlarge(to_map(o, 1, GRID)))


def test_a_mask_trains_nothing_of_where_it_points():
    decoder, (levels, z) = ground_decoder(), inputs()
    z.requires_grad_()
    logits, meant = decoder.grounded(levels, z, GRID)
    logits.square().sum().backward(retain_graph=True)
    grounding = [*decoder.query.parameters(), *decoder.key.parameters(), *decoder.context.parameters()]
    assert z.grad is None and all(p.grad is None for p in [*grounding, decoder.sharpness])
    assert decoder.reduce.weight.grad.abs().sum() > 0
    meant.square().sum().backward()
    assert z.grad.abs().sum() > 0 and all(p.grad is not None for p in [*grounding, decoder.sharpness])


def test_the_grounding_loss_is_the_cross_entropy_with_the_patches_shares():
    meant = torch.randn(2, 2, 2, dtype=torch.float64)
    target = torch.zeros(2, 4, 4, dtype=torch.bool)
    target[0, :2, :2], target[0, 0, 2] = True, True  # four pixels of the first patch, one of the second
    chances = meant[0].flatten().log_softmax(0)
    expected = torch.stack([-(0.8 * chances[0] + 0.2 * chances[1]), torch.tensor(0.0, dtype=torch.float64)])
    torch.testing.assert_close(grounding_loss(meant, target), expected)


def naive_film_decoder(decoder: FilmDecoder, levels: list[Tensor], z: Tensor, prefix: int, stride: int) -> Tensor:
    state, heads = decoder.state_dict(), 2
    o = None
    for i, level in enumerate(levels):
        r = level @ state[f"reduce.{i}.weight"].T + state[f"reduce.{i}.bias"]
        if "position.weight" in state:
            r[:, prefix:] += CENTRES @ state["position.weight"].T
        o = r if o is None else r + o
        if f"film.{i}.multiply.weight" in state:
            multiply = z @ state[f"film.{i}.multiply.weight"].T + state[f"film.{i}.multiply.bias"]
            add = z @ state[f"film.{i}.add.weight"].T + state[f"film.{i}.add.bias"]
            o = multiply[:, None] * o + add[:, None]
        name = f"layers.{i}."
        o = naive_layer(o, {k.removeprefix(name): w for k, w in state.items() if k.startswith(name)}, heads)
    x = o[:, prefix:].reshape(len(z), *GRID, -1).permute(0, 3, 1, 2)
    x = F.conv2d(x, state["enlarge.0.weight"], state["enlarge.0.bias"], padding=1).clamp_min(0)
    x = F.conv_transpose2d(x, state["enlarge.2.weight"], state["enlarge.2.bias"], stride=stride).clamp_min(0)
    return F.conv_transpose2d(x, state["enlarge.4.weight"], state["enlarge.4.bias"], stride=stride)


@pytest.mark.parametrize(
    ("film", "classes", "prefix", "patch", "coords"),
    [("first", 2, 1, 14, False), ("every", 1, 0, 16, True), ("first", 1, 5, 4, True)],
)
def test_film_decoder_is_its_equations(film, classes, prefix, patch, coords):
    decoder = film_decoder(film=film, classes=classes, prefix_tokens=prefix, patch=patch, coords=coords)
    levels, z = inputs(prefix=prefix)
    stride = patch // 4
    logits = decoder(levels, z, GRID)
    assert logits.shape == (2, classes, GRID[0] * stride**2, GRID[1] * stride**2)
    expected = naive_film_decoder(decoder, levels, z, prefix, stride)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-13)


def test_unet_decoder_is_its_equations():
    decoder = unet_decoder().eval()
    for name, buffer in decoder.named_buffers():
        if "running" in name:
            buffer.uniform_(-0.1, 0.1) if "mean" in name else buffer.uniform_(0.05, 0.2)
    levels, z = inputs()
    state = decoder.state_dict()
    x = z[:, :, None, None].expand(-1, -1, *GRID)
    for i, size in enumerate([(3, 4), (8, 11), (16, 22)]):
        skip = levels[i][:, 1:].reshape(2, *GRID, -1).permute(0, 3, 1, 2)
        x = torch.cat([F.interpolate(m, size=size, mode="bilinear", align_corners=True) for m in (x, skip)], 1)
        for conv, norm in ((0, 1), (3, 4)):
            x = F.conv2d(x, state[f"pairs.{i}.{conv}.weight"], padding=1)
            parts = ("running_mean", "running_var", "weight", "bias")
            mean, variance, weight, bias = (state[f"pairs.{i}.{norm}.{part}"][:, None, None] for part in parts)
            x = ((x - mean) / (variance + 1e-5).sqrt() * weight + bias).clamp_min(0)
    expected = F.conv2d(x, state["classify.weight"], state["classify.bias"])
    assert expected.std((0, 2, 3)).min() > 0.01  # not all of it died in a ReLU
    torch.testing.assert_close(decoder(levels, z, GRID), expected, rtol=1e-12, atol=1e-13)


def test_unet_sizes_are_the_published_ones():
    assert unet_sizes((24, 24), 3) == [(24, 24), (64, 64), (128, 128)]
    assert unet_sizes((24, 24), 1) == [(24, 24)]
    assert unet_sizes((6, 9), 4) == [(6, 9), (16, 24), (32, 48), (64, 96)]


def test_unet_published_input_widths():
    with torch.device("meta"):
        decoder = UnetDecoder([1024] * 3, 4096)
    assert [pair[0].in_channels for pair in decoder.pairs] == [4096 + 1024, 512 + 1024, 512 + 1024]
    assert {pair[3].out_channels for pair in decoder.pairs} == {512}


@pytest.mark.parametrize("build", [lambda: film_decoder(film="every", coords=True), unet_decoder])
def test_every_parameter_learns(build):
    decoder = build()
    levels, z = inputs()
    decoder(levels, z, GRID).square().mean().backward()
    assert [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize("build", [film_decoder, unet_decoder])
def test_half_precision_features_are_cast_to_the_decoder(build):
    decoder = build().float().eval()
    levels, z = inputs()
    halves = [level.to(torch.bfloat16) for level in levels]
    logits = decoder(halves, z.half(), GRID)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, decoder([half.float() for half in halves], z.half().float(), GRID))


@pytest.mark.parametrize(
    ("options", "word"), [({"heads": 6, "dim": 64}, "heads"), ({"film": "last"}, "film"), ({"classes": 3}, "classes")]
)
def test_impossible_settings_are_refused(options, word):
    with pytest.raises(ConfigError, match=word):
        film_decoder(**options)


def test_a_decoder_without_levels_is_refused():
    for build in (FilmDecoder, UnetDecoder):
        with pytest.raises(ConfigError, match="at least one encoder level"):
            build([], CONDITION)


@pytest.mark.parametrize("build", [film_decoder, unet_decoder])
def test_levels_that_do_not_fit_are_refused(build):
    levels, z = inputs()
    with pytest.raises(ModelError, match="3 encoder levels and got 2"):
        build()(levels[:2], z, GRID)
    with pytest.raises(ModelError, match="13 tokens where a grid of 4x4 with 1 prefix tokens makes 17"):
        build()(levels, z, (4, 4))
