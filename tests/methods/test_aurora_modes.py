"""Mode approximation: counts on BLIP-base's shapes, the two cores, ranks and spaces, slices, starts."""

import math

import pytest
import torch
from tiny import scramble
from tiny_pair import WIDTH, aurora, pair
from torch.nn import functional as F
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from mitrain.core import config
from mitrain.core.errors import ConfigError, ModelError
from mitrain.methods.aurora.aurora import Aurora
from mitrain.methods.aurora.config import AuroraConfig

BASE, LAYERS = 768, 12  # BLIP-base: both encoders


@pytest.fixture(scope="module")
def blip_base():
    with torch.device("meta"):
        return {"text": BlipTextModel(BlipTextConfig()), "encoder": BlipVisionModel(BlipVisionConfig())}


def counted(backbones, **settings):
    adapter = Aurora(AuroraConfig(**settings)).attach(backbones)
    try:
        trainable = [p for model in backbones.values() for p in model.parameters() if p.requires_grad]
        total = sum(p.numel() for p in {id(p): p for p in trainable}.values())
        assert total == sum(p.numel() for p in adapter.parameters())
        return total, adapter
    finally:
        adapter.detach()


def vectors(adapter):
    return {part: len(table) for part, table in adapter.modes.vectors.items()}


@pytest.mark.parametrize(("rank", "paper"), [(16, 26_896), (32, 53_792), (64, 107_584), (128, 215_168)])
def test_the_papers_count_on_blip_base(blip_base, rank, paper):
    """2 · 768 · R + (N + 1) · R with N = 144: q, k, v, o of 12 vision, 12 text and 12 cross-attentions."""
    total, adapter = counted(blip_base, preset="paper", rank=rank, gqt="none")
    assert total == 2 * BASE * rank + (144 + 1) * rank == paper
    assert vectors(adapter) == {"encoder": 48, "text": 48, "fusion": 48} and adapter.modes.widths == {"shared": BASE}
    assert counted(blip_base, preset="paper", rank=rank)[0] == paper + LAYERS * 2 * BASE  # one pair per layer


@pytest.mark.parametrize(("rank", "released"), [(16, 68_992), (32, 125_696), (64, 411_136), (128, 2_358_272)])
def test_the_releases_count_on_blip_base(blip_base, rank, released):
    """U, V, R³, 12 · (4 + 8) vision and 12 · (3 + 3) text vectors, two pairs of GQT: what it names CP, term by term."""
    total, adapter = counted(blip_base, preset="released", rank=rank)
    assert total == 2 * BASE * rank + rank**3 + 216 * rank + LAYERS * 2 * 2 * BASE == released
    assert vectors(adapter) == {"encoder": 144, "text": 36, "fusion": 36} and not adapter.fusion.composed


def test_factors_of_their_own_cost_three_times_and_are_compared_at_equal_count(blip_base):
    settings = {"preset": "paper", "gqt": "none", "rank": 64}
    shared, _ = counted(blip_base, **settings)
    apart, adapter = counted(blip_base, **settings, factors="per-modality")
    assert apart == 3 * 2 * BASE * 64 + (144 + 3) * 64 and set(adapter.modes.widths) == {"encoder", "text", "fusion"}
    below, above = (counted(blip_base, **settings | {"rank": rank}, factors="per-modality")[0] for rank in (22, 23))
    assert below <= shared < above


def test_a_dual_encoder_alone_has_no_fusion_parameters(blip_base):
    total, adapter = counted(blip_base, preset="paper", fusion_layers=0)
    assert total == 2 * BASE * 64 + (96 + 1) * 64 and adapter.fusion is None


# the updates


def test_cp_is_the_dense_core_with_a_superdiagonal():
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    one, two = aurora(pair(), encoder=["q", "mlp"]), aurora(pair(), encoder=["q", "mlp"], core="dense")
    scramble(one.modes)
    with torch.no_grad():
        for table in ("down", "up", "vectors"):
            for name, value in getattr(one.modes, table).items():
                getattr(two.modes, table)[name].copy_(value)
        two.modes.core["shared"].zero_()
        index = torch.arange(3)
        two.modes.core["shared"][index, index, index] = one.modes.core["shared"]
    for a, b in zip(one._points, two._points, strict=True):
        given = F.pad(x, (0, a.into - WIDTH))
        assert torch.allclose(one.modes(a, given), two.modes(b, given), rtol=1e-12, atol=1e-12)
        assert torch.allclose(one.modes.delta(a), two.modes.delta(b), rtol=1e-12, atol=1e-12)
        assert one.modes.delta(a).abs().max() > 1e-3


@pytest.mark.parametrize("core", ["cp", "dense"])
@pytest.mark.parametrize("kind", ["bert", "blip", "llama"])
def test_every_update_has_rank_r_and_shares_its_spaces(core, kind):
    """Also where the width of keys, of the MLP or of the pictures is not the factors': the leading block of a slice."""
    adapter = aurora(pair(kind), core=core, encoder=["q", "k", "v", "o", "mlp"], text=["q", "k", "v", "o", "mlp"])
    scramble(adapter.modes)
    (width,) = adapter.modes.widths.values()
    down, up = adapter.modes.down["shared"], adapter.modes.up["shared"]
    for point in adapter._points:
        delta = adapter.modes.delta(point)
        assert delta.shape == (point.out, point.into)
        assert point.kind == "mlp" or point.rows * point.columns == 1
        for rows in delta.split(width):
            for piece in rows.split(width, 1):
                assert torch.linalg.matrix_rank(piece, rtol=1e-9) == min(3, *piece.shape)
                assert torch.linalg.matrix_rank(torch.cat([up[: len(piece)], piece], 1), rtol=1e-9) == 3
                assert torch.linalg.matrix_rank(torch.cat([down[:, : piece.shape[1]], piece]), rtol=1e-9) == 3


@pytest.mark.parametrize("core", ["cp", "dense"])
def test_slice_s_of_the_mlp_is_the_core_on_its_own_vector(core):
    """The release reads a slice-fastest core slice-slowest, so that its slices are mixtures; ours are not."""
    adapter = aurora(pair(), core=core, encoder=["mlp"], text=[], fusion=["q"])
    scramble(adapter.modes)
    modes = adapter.modes
    down, up, core_of = modes.down["shared"], modes.up["shared"], modes.core["shared"]
    first, second = (p for p in adapter._points if p.layer == 1 and p.part == "encoder")
    assert (first.rows, first.columns, second.rows, second.columns) == (4, 1, 1, 4)
    for point in (first, second):
        slices = modes.delta(point).split(WIDTH, 0 if point is first else 1)
        for s, piece in enumerate(slices):
            p = modes.vectors["encoder"][point.first + s]
            mix = torch.diag(core_of * p) if core == "cp" else (core_of * p).sum(-1)
            assert torch.allclose(piece, up @ mix.T @ down, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["bert", "blip", "llama"])
@pytest.mark.parametrize("core", ["cp", "dense"])
def test_the_hooked_projection_is_the_one_with_the_updated_weight(kind, core):
    adapter = aurora(pair(kind), core=core, encoder=["q", "v", "mlp"], text=["k", "o", "mlp"])
    scramble(adapter.modes)
    for module in {point.module: None for point in adapter._points}:
        points = [point for point in adapter._points if point.module is module]
        points = [p for p in points if p.part != "fusion"] or points
        x = torch.randn(2, 3, points[0].into, dtype=torch.float64)
        weight = module.weight.clone()
        for point in points:
            weight[point.offset : point.offset + point.out] += adapter.modes.delta(point)
        expected = F.linear(x, weight, module.bias)
        found = module(x)
        if kind == "blip" or points[0].part != "fusion":
            assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11)
            assert not torch.allclose(found, F.linear(x, module.weight, module.bias), atol=1e-3)


def test_the_start_of_every_table():
    adapter = aurora(pair(), rank=8, core="dense", encoder=["q", "k", "v", "o", "mlp"])
    modes = adapter.modes
    assert not modes.up["shared"].any()
    bounds = {"down": 1 / math.sqrt(WIDTH), "core": math.sqrt(3) / 8}
    for name, bound in bounds.items():
        largest = getattr(modes, name)["shared"].abs().max()
        assert 0.9 * bound < largest <= bound
    for point in adapter._points:
        m = {"mlp": 8}.get(point.kind, 4) if point.part == "encoder" else 1
        assert modes.vectors[point.part][point.vectors].abs().max() <= math.sqrt(6 / (8 + m))
    assert modes.vectors["text"].abs().max() > math.sqrt(6 / (8 + 4))
    assert torch.equal(aurora(pair()).modes.core["shared"], torch.ones(3, dtype=torch.float64))


def test_both_cores_start_with_the_same_spread():
    """Var M x over the start's draws: λ = 1 beside the Xavier-uniform core, from 400 draws within 5 standard errors."""
    spreads = {}
    for core in ("cp", "dense"):
        backbones, values = pair(), []
        for seed in range(20):
            adapter = aurora(backbones, seed, core=core, rank=16, encoder=["q"], text=[], fusion_layers=0)
            point = adapter._points[0]
            _, _, c, p = adapter.modes._of(point)
            mix = torch.diag(c * p[0, 0]) if core == "cp" else (c * p[0, 0]).sum(-1)
            values.append((mix @ torch.randn(16, 20, dtype=torch.float64)).square().mean().item())
            adapter.detach()
        spreads[core] = torch.tensor(values)
    error = sum(v.var() / len(v) for v in spreads.values()).sqrt()
    assert abs(spreads["cp"].mean() - spreads["dense"].mean()) < 5 * error


# refusals


def test_settings_that_cannot_be_are_reported_in_a_line():
    for values, says in (
        ({"encoder": ["q", "q"]}, "names a projection twice"),
        ({"encoder": [], "text": [], "fusion": []}, "no projection is tuned"),
        ({"encoder": [], "text": [], "fusion_layers": 0}, "no projection is tuned"),
        ({"fusion": ["mlp"]}, "fusion"),
        ({"rank": 0}, "rank"),
    ):
        with pytest.raises(ConfigError, match=says):
            config.parse(AuroraConfig, values)


def test_a_projection_that_is_not_there_is_named():
    from tiny import tiny

    neox = tiny("gpt_neox", torch.float64)
    with pytest.raises(ModelError, match=r"has no projection q by a known name: leave it out of adapter.text"):
        aurora({"text": neox, "encoder": pair()["encoder"]}, fusion_layers=0)
