"""MoPE over two frozen encoders: what a pass gives, what it depends on, what is trained."""

import math

import pytest
import torch
from modalities import pictures
from tiny_mope import SMALL, attached, model_of

from mitrain.core.errors import ModelError
from mitrain.methods import calibrate
from mitrain.methods.mope.config import MoPEConfig
from mitrain.methods.mope.mope import MoPE
from mitrain.methods.mope.prompts import LayerPrompts
from mitrain.methods.mope.standard import Standard
from mitrain.models.batch import TextBatch

EXACT = {"rtol": 0, "atol": 1e-11}
PAIRS = {
    "vit": {"text_name": "bert", "image_name": "vit"},
    "bert": {"text_name": "bert", "image_name": "dinov2_with_registers", "main": "text"},
    "llama": {"text_name": "llama", "image_name": "dinov2", "main": "text"},
    "vit from llama": {"text_name": "llama", "image_name": "vit"},
    "siglip": {"text_name": "modernbert", "image_name": "siglip_vision_model"},
    "modernbert": {"text_name": "modernbert", "image_name": "clip_vision_model", "main": "text"},
    "swin": {"text_name": "bert", "image_name": "swin"},
    "bert from swin": {"text_name": "bert", "image_name": "swin", "main": "text"},
}
everywhere = pytest.mark.parametrize("pair", PAIRS)


def record(mope: MoPE) -> list[torch.Tensor]:
    """From now on, the prompts of each prompted layer of the main encoder, in order."""
    found = []
    for layer in mope.prompts:
        layer.register_forward_hook(lambda module, args, out: found.append(out[0]))
    return found


# What a pass gives


@everywhere
def test_the_shapes_of_a_reading(pair):
    found = attached(**PAIRS[pair])
    with torch.no_grad():
        reading = found.encode()
    joint = found.models[found.mope.config.main].config.hidden_size
    assert reading.text.shape == (4, 9, 32) and torch.equal(reading.mask, found.words.mask)
    assert reading.vectors["image"].shape == (4, 32) and found.mope.attachment.encoder_width == 32
    assert reading.joint.shape == (4, joint) and found.mope.attachment.joint_width == joint
    assert found.mope.routing.shape == (len(found.mope.prompts), 4, 3)
    assert all(torch.isfinite(x).all() for x in (reading.text, reading.vectors["image"], reading.joint))


@everywhere
def test_padding_and_batch_neighbours_do_not_matter(pair):
    found = attached(**PAIRS[pair])
    hidden = found.words.mask == 0
    states = found.words.states.masked_fill(hidden[..., None], 3.0)
    changed = TextBatch(found.words.ids, found.words.mask, states, found.words.depth)
    with torch.no_grad():
        whole = found.encode()
        repadded = found.mope.encode(changed, found.picture)
        alone = [found.rows(slice(i, i + 1)).encode() for i in range(4)]
    shown = found.words.mask.bool()
    torch.testing.assert_close(repadded.joint, whole.joint, **EXACT)
    torch.testing.assert_close(repadded.text[shown], whole.text[shown], **EXACT)
    torch.testing.assert_close(torch.cat([one.joint for one in alone]), whole.joint, **EXACT)
    torch.testing.assert_close(torch.cat([one.vectors["image"] for one in alone]), whole.vectors["image"], **EXACT)


@pytest.mark.parametrize("pair", ["vit", "bert", "llama", "swin"])
def test_one_modality_alone_does_without_what_depends_on_the_other(pair):
    found = attached(**PAIRS[pair])
    main, prompts = found.mope.config.main, record(found.mope)
    with torch.no_grad():
        words, picture = found.mope.encode(found.words, None), found.mope.encode(None, found.picture)
        both = found.encode()
    assert words.joint is None and not words.vectors and picture.joint is None and picture.text is None
    text_depends, image_depends = (
        not torch.allclose(x, y) for x, y in ((words.text, both.text), (picture.vectors["image"], both.vectors["image"]))
    )
    assert (text_depends, image_depends) == (main == "text", main == "encoder")
    assert [p.shape[1] for p in prompts] == [2] * len(found.mope.prompts) + [5] * len(found.mope.prompts)


@pytest.mark.parametrize("pair", ["vit", "bert", "llama"])
def test_a_hidden_picture_leaves_the_main_encoder_with_static_prompts(pair):
    found = attached(**PAIRS[pair])
    main = found.mope.config.main
    with torch.no_grad():
        blind = found.encode(infused=False)
        alone = found.mope.encode(found.words if main == "text" else None, found.picture if main == "encoder" else None)
    assert found.mope.routing is None and found.mope.extra_loss() is None
    assert torch.equal(blind.text, alone.text) if main == "text" else torch.equal(blind.joint, alone.vectors["image"])
    if main == "text":
        other = pictures(found.picture.feature, found.picture.states.flip(0), found.picture.depth, infused=False)
        with torch.no_grad():
            assert torch.equal(found.mope.encode(found.words, other).joint, blind.joint)
    assert found.mope.traits.text_depends_on_input == (main == "text")


def test_texts_may_come_without_states():
    found = attached()
    with torch.no_grad():
        bare = found.mope.encode(TextBatch(found.words.ids, found.words.mask), found.picture)
        assert torch.equal(bare.joint, found.joint())


# The mathematics


def norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def affine(x, module):
    return x @ module.weight.T + module.bias


def vit_layer(layer, x, heads=4):
    """One pre-norm transformer layer, head by head."""
    inside = norm(x, layer.layernorm_before.weight, layer.layernorm_before.bias, 1e-12)
    q, k, v = (affine(inside, getattr(layer.attention, f"{name}_proj")).chunk(heads, -1) for name in "qkv")
    parts = []
    for h in range(heads):
        scores = torch.exp(q[h] @ k[h].T / math.sqrt(q[h].shape[-1]))
        parts.append(scores / scores.sum(-1, keepdim=True) @ v[h])
    x = x + affine(torch.cat(parts, -1), layer.attention.o_proj)
    inside = norm(x, layer.layernorm_after.weight, layer.layernorm_after.bias, 1e-12)
    return x + affine(gelu(affine(inside, layer.mlp.fc1)), layer.mlp.fc2)


def test_two_layers_by_hand():
    """ViT conditioned on BERT as it is: prompts, router, mapper and layers again, sample by sample."""
    found = attached(other_length=0, temperature=0.7)
    mope, vit = found.mope, found.models["encoder"]
    del vit.layers[2:], mope.prompts[2:]
    mope._encoders["encoder"].depth = 2
    with torch.no_grad():
        joint = found.joint()
        for b in range(4):
            psi = found.words.states[b, 0]
            tokens = found.picture.states[b]
            mapper = mope.mapper
            hidden = gelu(norm(affine(psi, mapper.first), mapper.norm.weight, mapper.norm.bias, 1e-5))
            mapped = gelu(affine(hidden, mapper.stages[0]))
            for i, own in enumerate(mope.prompts):
                query = torch.cat([affine(tokens.mean(0), own.router.tokens), affine(psi, own.router.condition)])
                scores = torch.exp(query @ own.router.keys / 0.7)
                dynamic = sum(scores[j] / scores.sum() * own.experts[j] for j in range(3))
                x = torch.cat([tokens[:1], own.static, dynamic, mapped[None], tokens[1:]])
                assert x.shape == (5 + 2 * 2 + 1, 32)
                x = vit_layer(vit.layers[i], x)
                tokens = torch.cat([x[:1], x[6:]])
            last = norm(x, vit.layernorm.weight, vit.layernorm.bias, 1e-12)
            torch.testing.assert_close(joint[b], last.mean(0), **EXACT)


@pytest.mark.parametrize("pair", ["vit", "llama"])
def test_permuting_the_condition_changes_dynamic_and_mapped_prompts_only(pair):
    found = attached(**PAIRS[pair], temperature=2.0)  # at 0.1 both conditions may choose one expert alone
    order, prompts = torch.tensor([2, 3, 1, 0]), record(found.mope)
    with torch.no_grad():
        if found.mope.config.main == "encoder":
            own, other = found.words, found.picture
            found.mope.encode(own, other)
            moved = TextBatch(own.ids[order], own.mask[order], own.states[order], own.depth)
            found.mope.encode(moved, other)
        else:
            found.mope.encode(found.words, found.picture)
            found.mope.encode(found.words, found.picture.rows(order))
    depth = len(found.mope.prompts)
    for before, after in zip(prompts[:depth], prompts[depth:], strict=True):
        assert torch.equal(before[:, :2], after[:, :2]) and torch.equal(before[0, :2], before[1, :2])
        for part in (slice(2, 4), slice(4, 5)):
            differ = (before[:, part] - after[:, part]).flatten(1).norm(dim=1)
            assert (differ > 1e-3).all()
    torch.testing.assert_close(prompts[0][order, 4:], prompts[depth][:, 4:], **EXACT)  # P_m follows ψ


def test_a_causal_model_sees_prompts_and_no_later_token():
    found = attached(**PAIRS["llama"], router_reads="condition")
    later = found.words.states.clone()
    later[:, 5:] += 1
    changed = TextBatch(found.words.ids, torch.ones_like(found.words.mask), later, 0)
    plain = TextBatch(found.words.ids, torch.ones_like(found.words.mask), found.words.states, 0)
    with torch.no_grad():
        one, other = found.mope.encode(plain, found.picture).text, found.mope.encode(changed, found.picture).text
        blind = found.mope.encode(plain, None).text
    torch.testing.assert_close(one[:, :5], other[:, :5], **EXACT)
    assert not torch.allclose(one[:, 0], blind[:, 0])  # the first token sees the picture's prompts


def test_without_prompts_a_causal_model_is_the_frozen_one():
    found = attached(**PAIRS["llama"], static=False)
    mask = found.words.mask
    with torch.no_grad():
        text = found.mope.encode(found.words, None).text
        frozen = found.models["text"].model(input_ids=found.words.ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(text[mask.bool()], frozen[mask.bool()], **EXACT)


# The switches


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"static": False}, 3),
        ({"dynamic": False}, 3),
        ({"mapped": False}, 4),
        ({"dynamic": False, "mapped": False}, 2),
        ({"router": "cpt"}, 5),
        ({"router_reads": "tokens"}, 5),
        ({"router_reads": "condition"}, 5),
        ({"routing": "top1"}, 5),
        ({"keys": "learned"}, 5),
        ({"experts": 1}, 5),
        ({"experts": 16}, 5),
        ({"other_length": 0}, 5),
        ({"mapper_norm": "none"}, 5),
        ({"temperature": 1.0}, 5),
        ({"feature": "mean"}, 5),
        ({"feature": "first"}, 5),
        ({"condition": "mean"}, 5),
        ({"condition": "last"}, 5),
    ],
)
def test_every_switch_runs_and_says_something_else(settings, tokens):
    found, usual = attached(**settings), attached()
    prompts = record(found.mope)
    assert found.mope.attachment.first_layers["text"] == (4 if found.mope.config.other_length == 0 else 0)
    assert found.mope.attachment.first_layers["encoder"] == 0
    joint = found.joint()
    assert [p.shape[1] for p in prompts] == [tokens] * 4
    assert not torch.allclose(joint, usual.joint())
    joint.square().sum().backward()
    conditioned = found.mope.config.dynamic or found.mope.config.mapped
    for name, parameter in found.mope.named_parameters():
        needless = (settings.get("experts") == 1 and ".router." in name) or (not conditioned and name.startswith("others"))
        assert (parameter.grad is None or not parameter.grad.any()) == needless, name
    assert torch.allclose(joint, found.joint(infused=False)) != conditioned


def test_a_main_encoder_without_prompts_of_its_own_stays_frozen():
    found = attached(static=False, dynamic=False, mapped=False)
    assert found.mope.attachment.first_layers["encoder"] == 4 and len(found.mope.prompts) == 0 and found.mope.mapper is None
    with torch.no_grad():
        expected = found.models["encoder"].layernorm(found.picture.states).mean(1)
        torch.testing.assert_close(found.joint(), expected, **EXACT)


# Training


@everywhere
def test_every_parameter_gets_a_gradient_and_no_frozen_one(pair):
    found = attached(**PAIRS[pair], threshold=0.0)
    found.mope.train()
    reading = found.encode()
    total, count = found.mope.extra_loss()
    (reading.joint.square().sum() + total / count).backward()
    idle = {n for n, p in found.mope.named_parameters() if p.grad is None or not p.grad.any()}
    # ModernBERT's layers 1 and 2 attend over two tokens to each side, and static prompts stand foremost of five.
    assert idle == ({"prompts.1.static", "prompts.2.static"} if pair == "modernbert" else set())
    own = {id(p) for p in found.mope.parameters()}
    for model in found.models.values():
        assert all(p.grad is None and not p.requires_grad for p in model.parameters() if id(p) not in own)


def test_the_regulariser_is_handed_out_once_as_sum_and_count():
    found = attached(importance=0.5, threshold=0.0)
    found.joint()
    weights = found.mope.routing
    importance = weights.sum(1)
    expected = 0.5 * (importance.std(-1) / importance.mean(-1)).square().mean()
    total, count = found.mope.extra_loss()
    assert count == 4 and (total / count).item() == pytest.approx(expected.item())
    assert found.mope.extra_loss() is None
    usage = found.mope.importance()
    torch.testing.assert_close(usage.variation.mean() * 0.5, expected, **EXACT)
    assert usage.entropy.shape == usage.top_share.shape == (4,)
    with torch.no_grad():
        found.joint()
    assert found.mope.extra_loss() is None  # a pass without gradients regularises nothing
    for settings in ({"importance": 0.0}, {"experts": 1}, {"dynamic": False}):
        other = attached(**settings)
        other.joint()
        assert other.mope.extra_loss() is None


def test_noise_and_dropout_are_there_in_training_alone_and_routing_is_reported_without_noise():
    found = attached(noise=0.5, dropout=0.0)
    with torch.no_grad():
        first, again = found.joint(), found.joint()
        clean = found.mope.routing[0]
        assert torch.equal(first, again)
        found.mope.train()
        noisy, other = found.joint(), found.joint()
        assert not torch.allclose(noisy, first) and not torch.allclose(noisy, other)
        assert torch.equal(found.mope.routing[0], clean)  # the first layer's, whose input is the same
        dropped = attached(noise=0.0, dropout=0.5)
        plain = dropped.joint()
        dropped.mope.train()
        assert not torch.allclose(plain, dropped.joint())


@pytest.mark.parametrize("pair", ["vit", "llama", "swin"])
def test_checkpointing_changes_memory_only(pair):
    saved = {}
    for checkpointing in (False, True):
        found = attached(**PAIRS[pair], threshold=0.0, checkpoint=checkpointing)
        found.mope.train()
        torch.manual_seed(7)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            loss = found.joint().square().sum() + found.mope.extra_loss()[0]
        loss.backward()
        saved[checkpointing] = sum(kept), {n: p.grad.clone() for n, p in found.mope.named_parameters()}
    assert saved[True][0] < saved[False][0] / 2
    for name, gradient in saved[True][1].items():
        torch.testing.assert_close(gradient, saved[False][1][name], **EXACT)


# Attaching


def test_models_of_other_widths_or_depth_are_refused():
    found = attached()
    keys = {f"prompts.{i}.router.keys" for i in range(4)}
    assert set(found.mope.state_dict()) == {n for n, _ in found.mope.named_parameters()} | keys
    found.mope.detach()
    with pytest.raises(ModelError, match="not attached"):
        found.encode()
    shallow = {"text": model_of("bert", torch.float64), "encoder": model_of("vit", torch.float64, num_hidden_layers=2)}
    with pytest.raises(ModelError, match="other widths or depth"):
        found.mope.attach(shallow)


def test_prompts_start_within_their_spread():
    mope = MoPE(MoPEConfig(**SMALL))
    mope.attach({"text": model_of("bert", torch.float32), "encoder": model_of("vit", torch.float32)})
    image = math.sqrt(6 / (3 * 4 * 4 + 32))  # patches of 4 pixels, width 32
    for parameters, spread in (([p.experts for p in mope.prompts], image), (list(mope.others), 0.3)):
        largest = max(p.abs().max().item() for p in parameters)
        assert 0.9 * spread < largest <= spread


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature": "last"}, "last token means something of a causal text"),
        ({"image_name": "swin", "feature": "first"}, "no CLS token"),
        ({"text_name": "llama", "main": "text", "feature": "first"}, "no CLS token"),
        ({"image_name": "siglip_vision_model", "main": "text", "condition": "first"}, "no CLS token"),
    ],
)
def test_a_read_out_that_the_encoder_lacks_is_refused(settings, message):
    with pytest.raises(ModelError, match=message):
        attached(**settings)


def test_what_does_not_fit_is_refused_in_one_line():
    found = attached()
    with pytest.raises(ModelError, match="4 texts and 3 files"):
        found.mope.encode(found.words, found.picture.rows(slice(3)))
    with pytest.raises(ModelError, match="give the states"):
        found.mope.encode(None, pictures(torch.zeros(4, 5)))
    with pytest.raises(ModelError, match="of depth 4 and 32 wide, but mope starts at depth 0"):
        found.mope.encode(None, pictures(torch.zeros(4, 5), found.picture.states, 4))
    with pytest.raises(ModelError, match="give it the encoder model"):
        MoPE(MoPEConfig()).attach({"text": model_of("bert", torch.float32)})


# Standardised conditions


@pytest.mark.parametrize("router", ["mope", "cpt"])
def test_standardised_routers_start_undecided_and_see_what_differs_between_samples(router):
    torch.manual_seed(0)
    config = MoPEConfig(experts=4, router=router, standardize=True)
    layer = LayerPrompts(config, 16, 64, 0.1).eval()
    psi, tokens = 3 * torch.randn(64) + 0.3 * torch.randn(256, 64), torch.randn(16) + 0.1 * torch.randn(256, 5, 16)

    def routed(condition):
        shares = layer(tokens, None, condition, None)[1]
        usage = (shares.argmax(1).bincount(minlength=4) / 256).amax()
        return float(usage), float((shares - shares.mean(0)).abs().mean())

    with torch.no_grad():
        raw = routed(psi)
        psi_standard = Standard(64)
        for standard, seen in ((psi_standard, psi), (layer.standard, layer.mean_token(tokens, None))):
            standard.watch()
            standard.see(seen)
            standard.fit()
        mended = routed(psi_standard(psi))
    assert raw[0] > 0.8 and mended[0] < 0.6  # the share of samples whose best expert is the most used one
    assert mended[1] > 2 * raw[1]  # how much the weights differ between samples


@pytest.mark.parametrize("pair", ["swin", "vit from llama"])
def test_every_pair_can_be_calibrated(pair):
    found = attached(**PAIRS[pair], rows=8, standardize=True)
    with torch.no_grad():
        calibrate(found.mope, found.encode)
        found.encode()
    scales = [value for name, value in found.mope.state_dict().items() if name.endswith("standard.scale")]
    assert len(scales) == 1 + len(found.mope.prompts) and all((scale != 1).any() for scale in scales)


def test_what_is_standardised_has_mean_0_and_variance_1_over_the_samples_seen():
    found = attached(rows=16, standardize=True)
    read = []
    found.mope.mapper.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        calibrate(found.mope, lambda: [found.rows(slice(i, i + 4)).encode() for i in range(0, 16, 4)])
        found.encode()
    varied = read[0].var(0, correction=0) > 1e-9
    assert not len(read[1:]) and varied.any()
    torch.testing.assert_close(read[0].mean(0), torch.zeros(read[0].shape[1], dtype=torch.float64), **EXACT)
    torch.testing.assert_close(read[0].var(0, correction=0)[varied], torch.ones(int(varied.sum())).double(), **EXACT)


def test_a_sample_that_lacks_its_file_is_not_in_the_statistics():
    found = attached(rows=4, standardize=True, main="text", image_name="dinov2_with_registers")
    there = torch.tensor([True, True, False, True])
    with torch.no_grad():
        calibrate(found.mope, lambda: found.encode(present={"image": there}))
        partly = {n: v.clone() for n, v in found.mope.state_dict().items() if n.startswith("standard")}
        calibrate(found.mope, found.rows(torch.tensor([0, 1, 3])).encode)
        whole = {n: v for n, v in found.mope.state_dict().items() if n.startswith("standard")}
    for name in whole:
        torch.testing.assert_close(partly[name], whole[name], **EXACT)


def test_without_the_setting_nothing_is_measured():
    found = attached()
    calibrate(found.mope, lambda: pytest.fail("no pass is needed"))
    assert not any("standard" in name for name in found.mope.state_dict())
