"""Aurora on pairs of models: identity at the start, gradients, padding and neighbours, merging, re-attaching."""

import pytest
import torch
from modalities import part_of, pictures
from tiny import scramble
from tiny_pair import DEPTH, WIDTH, aurora, batch, blip, dinov2, pair, pixels
from torch import nn

from mitrain.core.errors import ModelError
from mitrain.methods.aurora.aurora import Aurora
from mitrain.methods.aurora.config import AuroraConfig
from mitrain.models.batch import TextBatch
from mitrain.models.frozen import last_hidden, trunk_states

KINDS = ["bert", "llama", "blip"]
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64, a few dozen operations deep on values near 1


def close(a, b):
    return torch.allclose(a, b, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_every_output_is_the_frozen_models(kind):
    backbones = pair(kind)
    words, picture = batch(backbones)
    frozen_text = last_hidden(backbones["text"], words)
    frozen_image = backbones["encoder"](pixel_values=pixels(3)).last_hidden_state
    adapter = aurora(backbones, preset="released", rank=3, dropout=0.0, ice=False)
    reading = adapter.encode(words, picture)
    seen = words.mask.bool()
    assert close(reading.text[seen], frozen_text[seen]) and close(reading.vectors["image"], frozen_image[:, 0])
    assert torch.equal(last_hidden(backbones["text"], words), frozen_text)
    scramble(adapter.modes)
    changed = adapter.encode(words, picture)
    for name in ("text", "image", "joint"):
        assert not torch.allclose(part_of(changed, name), part_of(reading, name), atol=1e-2)
    widths = adapter.attachment.joint_width, adapter.attachment.encoder_width
    assert widths == (reading.joint.shape[1], reading.vectors["image"].shape[1])


def test_blips_fused_vector_at_the_start_is_blips_own():
    model = blip(torch.float64)
    words, _ = batch({"encoder": model.vision_model})
    encoded = words.ids.clone()
    encoded[:, 0] = model.config.text_config.vocab_size - 1  # BLIP's multimodal pass begins with [ENC]
    frozen = model(encoded, pixels(3), attention_mask=words.mask)
    backbones = {"text": model.text_encoder, "encoder": model.vision_model}
    adapter = aurora(backbones)
    picture = pictures(torch.zeros(3, 2), trunk_states(model.vision_model, 0, pixel_values=pixels(3)))
    joint = adapter.encode(words, picture).joint
    assert close(joint, frozen.question_embeds[:, 0]) and close(model.itm_head(joint), frozen.itm_score)
    scramble(adapter.modes)
    changed = model(encoded, pixels(3), attention_mask=words.mask).question_embeds[:, 0]
    assert close(adapter.encode(words, picture).joint, changed) and not torch.allclose(joint, changed, atol=1e-2)


def test_the_fused_pass_begins_with_the_token_that_is_asked_for():
    model = blip(torch.float64)
    words, picture = batch({"encoder": model.vision_model})
    backbones = {"text": model.text_encoder, "encoder": model.vision_model}
    for asked, first in (("none", words.ids[:, 0]), (5, torch.full((3,), 5))):
        ids = torch.cat([first[:, None], words.ids[:, 1:]], dim=1)
        expected = model(ids, pixels(3), attention_mask=words.mask).question_embeds[:, 0]
        adapter = aurora(backbones, joint_token=asked)
        assert close(adapter.encode(words, picture).joint, expected)
        adapter.detach()


@pytest.mark.parametrize(
    ("kind", "asked", "shift", "message"),
    [("bert", 5, 0, "cross-attention of their own"), ("blip", "auto", 1, "have no .ENC."), ("blip", 10**6, 0, "ENC")],
)
def test_a_first_token_that_there_is_not_is_refused(kind, asked, shift, message):
    backbones = pair(kind)
    if shift:
        backbones["text"].config.bos_token_id -= shift
    with pytest.raises(ModelError, match=message):
        aurora(backbones, joint_token=asked)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_from_states_is_reading_from_ids(kind):
    backbones = pair(kind)
    words, picture = batch(backbones)
    adapter = aurora(backbones)
    scramble(adapter)
    states = trunk_states(backbones["text"], 0, input_ids=words.ids, attention_mask=words.mask)
    kept = states.clone()
    one, two = adapter.encode(words, picture), adapter.encode(TextBatch(words.ids, words.mask, states), picture)
    assert torch.equal(states, kept)
    assert close(one.text[words.mask.bool()], two.text[words.mask.bool()]) and close(one.joint, two.joint)
    alone, seen = adapter.encode(words, None), adapter.encode(None, picture)
    assert alone.joint is None and not alone.vectors and close(alone.text, one.text)
    assert seen.joint is None and seen.text is None and close(seen.vectors["image"], one.vectors["image"])
    assert close(last_hidden(backbones["text"], words)[words.mask.bool()], one.text[words.mask.bool()])


@pytest.mark.parametrize("core", ["cp", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_step_0_of_the_modes_only_v_learns(kind, core):
    backbones = pair(kind)
    words, picture = batch(backbones)
    adapter = aurora(backbones, core=core)
    reading = adapter.encode(words, picture)
    (reading.joint.sin().sum() + reading.vectors["image"].sin().sum()).backward()
    grads = {name: p.grad.abs().max().item() for name, p in adapter.named_parameters()}
    assert {name for name, size in grads.items() if size and name.startswith("modes")} == {"modes.up.shared"}
    assert grads["fusion.gqt"] > 0 and grads.get("fusion.scale", 1) > 0
    assert all(p.grad is None for n, p in backbones["text"].named_parameters() if not n.startswith("aurora."))
    adapter.zero_grad()
    scramble(adapter.modes)
    reading = adapter.encode(words, picture)
    (reading.joint.sin().sum() + reading.vectors["image"].sin().sum()).backward()
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())


@pytest.mark.parametrize("gqt", ["residual", "gate", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_neighbours_change_nothing(kind, gqt):
    backbones = pair(kind)
    words, picture = batch(backbones)
    adapter = aurora(backbones, gqt=gqt)
    scramble(adapter)
    together = adapter.encode(words, picture)
    for row in range(3):
        length = int(words.mask[row].sum())
        own = TextBatch(words.ids[row : row + 1, :length], words.mask[row : row + 1, :length])
        alone = adapter.encode(own, picture.rows(slice(row, row + 1)))
        assert close(alone.joint, together.joint[row : row + 1]) and close(
            alone.vectors["image"], together.vectors["image"][row : row + 1]
        )
        assert close(alone.text, together.text[row : row + 1, :length])


def test_the_picture_changes_the_fused_vector_and_nothing_else():
    for kind in KINDS:
        backbones = pair(kind)
        words, picture = batch(backbones)
        adapter = aurora(backbones)
        scramble(adapter)
        one = adapter.encode(words, picture)
        other = adapter.encode(words, picture.rows(torch.tensor([1, 2, 0])))
        assert close(one.text, other.text) and not torch.allclose(one.joint, other.joint, atol=1e-3)
        blind = adapter.encode(words, pictures(picture.feature, picture.states, 0, infused=False))
        assert close(blind.vectors["image"], one.vectors["image"]) and not torch.allclose(blind.joint, one.joint, atol=1e-3)
        name = {"bert": "mean", "llama": "last", "blip": "cls"}[kind]
        assert torch.allclose(blind.joint.float(), blind.read_out(name), rtol=1e-6, atol=1e-6)


# merging


@pytest.mark.parametrize("core", ["cp", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_give_what_the_adapter_gave(kind, core):
    """ΔW x and (W + ΔW) x differ by rounding alone: float64 and a few dozen layers' worth of it."""
    backbones = pair(kind)
    words, picture = batch(backbones)
    rest = {"gqt": "none"} if kind == "blip" else {"fusion_layers": 0}
    adapter = aurora(backbones, core=core, encoder=["q", "k", "v", "o", "mlp"], text=["v", "mlp"], **rest)
    plain = adapter.encode(words, picture)
    scramble(adapter, spread=0.5)
    adapted = adapter.encode(words, picture)
    adapter.merge()
    assert not any(hasattr(model, "aurora") or any(m._forward_hooks for m in model.modules()) for model in
                   backbones.values())  # fmt: skip
    seen = words.mask.bool()
    merged_text = last_hidden(backbones["text"], words)
    merged_image = backbones["encoder"](pixel_values=pixels(3)).last_hidden_state
    assert close(merged_text[seen], adapted.text[seen]) and close(merged_image[:, 0], adapted.vectors["image"])
    assert not torch.allclose(plain.text[seen], adapted.text[seen], atol=1e-2)
    if kind == "blip":
        encoded = words.ids.clone()
        encoded[:, 0] = backbones["text"].config.vocab_size - 1
        fused = backbones["text"](encoded, words.mask, encoder_hidden_states=merged_image).last_hidden_state
        assert close(fused[:, 0], adapted.joint) and not torch.allclose(plain.joint, adapted.joint, atol=1e-2)


def test_what_does_not_fold_is_refused_and_nothing_is_changed():
    for kind, settings, says in (
        ("bert", {}, "composed fusion shares"),
        ("blip", {}, "GQT changes states"),
        ("blip", {"gqt": "none", "ice": True}, "ICE depends on the batch"),
    ):
        backbones = pair(kind)
        adapter = aurora(backbones, **settings)
        scramble(adapter)
        before = {name: w.clone() for name, w in backbones["text"].named_parameters()}
        with pytest.raises(ModelError, match=says):
            adapter.merge()
        assert all(torch.equal(before[name], w) for name, w in backbones["text"].named_parameters())
    with pytest.raises(ModelError, match="not attached"):
        Aurora(AuroraConfig()).merge()


def test_quantised_weights_are_tuned_and_not_merged():
    from mitrain.models.quant.linear import FrozenInt8Linear

    backbones = pair(dtype=torch.float32)
    layer = backbones["encoder"].encoder.layer[DEPTH - 1]
    layer.attention.o_proj = FrozenInt8Linear.of(layer.attention.o_proj)
    first = backbones["encoder"].encoder.layer[0].attention.q_proj
    adapter = aurora(backbones, fusion_layers=0)
    _, picture = batch(backbones)
    plain = adapter.encode(None, picture).vectors["image"]
    scramble(adapter)
    assert not torch.allclose(adapter.encode(None, picture).vectors["image"], plain, atol=1e-2)
    before = first.weight.clone()
    with pytest.raises(ModelError, match="encoder model's weights are quantised or sharded"):
        adapter.merge()
    assert torch.equal(first.weight, before)


# attaching


@pytest.mark.parametrize("kind", ["blip", "llama", "shallow", "wide"])
def test_models_of_another_shape_are_refused(kind):
    adapter = aurora(pair())
    adapter.detach()
    others = pair(kind) if kind in KINDS else pair()
    if kind == "shallow":
        others["encoder"].encoder.layer = others["encoder"].encoder.layer[:2]
        others["encoder"].config.num_hidden_layers = others["encoder"].encoder.config.num_hidden_layers = 2
    if kind == "wide":
        others["encoder"] = dinov2(torch.float64, 2 * WIDTH)
    with pytest.raises(ModelError, match="make a new one"):
        adapter.attach(others)
    assert not hasattr(others["text"], "aurora")


def test_a_narrower_encoder_is_refused_where_only_the_fusion_can_tell():
    adapter = aurora(pair("llama"))
    adapter.detach()
    with pytest.raises(ModelError, match="fusion was made for models of other widths"):
        adapter.attach({**pair("llama"), "encoder": dinov2(torch.float64, WIDTH // 2)})
    bare = aurora(pair(), fusion=[], fusion_layers=1)
    bare.detach()
    bare.config = AuroraConfig(**{**bare.config.to_dict(), "fusion_layers": 0})
    with pytest.raises(ModelError, match="make a new one"):
        bare.attach(pair())


def test_what_cannot_be_attached_or_read_is_reported_in_a_line():
    backbones = pair()
    with pytest.raises(ModelError, match="give it the encoder model"):
        aurora({"text": backbones["text"]})
    with pytest.raises(ModelError, match="fusion_layers=4 does not fit the text model, which has 3 layers"):
        aurora(backbones, fusion_layers=4)
    with pytest.raises(ModelError, match="a cross-attention in each of its 3 layers: set 3, 0 or null"):
        aurora(pair("blip"), fusion_layers=2)
    adapter = aurora(backbones)
    words, picture = batch(backbones)
    with pytest.raises(ModelError, match="changes every layer of the other encoder"):
        adapter.encode(None, pictures(picture.feature))
    with pytest.raises(ModelError, match="changes every layer of the text model"):
        adapter.encode(TextBatch(words.ids, words.mask, torch.zeros(3, 9, WIDTH), 1), None)


def test_dropout_is_of_u_x_and_in_training_only():
    backbones = pair()
    words, _ = batch(backbones)
    adapter = aurora(backbones, dropout=0.5)
    scramble(adapter)
    adapter.eval()
    assert torch.equal(adapter.encode(words, None).text, adapter.encode(words, None).text)
    adapter.train()
    assert not torch.allclose(adapter.encode(words, None).text, adapter.encode(words, None).text, atol=1e-3)
    point, x = adapter._points[0], torch.randn(2000, WIDTH, dtype=torch.float64)
    adapter.modes.dropout = nn.Dropout(0.999999)
    assert torch.equal(adapter.modes(point, x), torch.zeros(2000, point.out, dtype=torch.float64))
