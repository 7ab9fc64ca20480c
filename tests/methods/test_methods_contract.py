"""What every method owes, held for each name in METHODS: a new one is tested here as soon as it is registered."""

import pytest
import torch
from attached import attached, close, dino, inputs, made, needed, pixels, whole
from modalities import pictures
from tiny import CONFIGS, scramble, tiny
from transformers import AutoModel, AutoModelForCausalLM

from mitrain.core.config import KINDS, Section
from mitrain.core.errors import ConfigError, ModelError
from mitrain.methods import METHODS, build
from mitrain.models import loading
from mitrain.models.batch import Outputs, TextBatch

VARIANTS = [
    ("lora", {"where": "both", "rank": 2, "alpha": 6}),
    ("lora", {"where": "encoder", "layers": "last 1", "targets": ["q", "o", "mlp"]}),
    ("ia3", {"where": "both"}),
    ("visual-prefix", {"tokens": None, "lora_rank": 2}),
    ("full", {"layers": 1}),
    ("gated-xattn", {"layers": "all", "heads": 1, "head_dim": 8, "feed_forward": 0}),
    ("vlora", {"reads": "vector", "targets": ["q", "k", "o", "mlp"], "width": 8, "blocks": 2}),
    ("mit", {"layers": [1], "lora_rank": 2}),
    ("pmf", {"fusion_layers": 2, "query_prompts": 3, "query_context": 2, "fusion_context": 1, "map_width": 7}),
    ("mope", {"main": "text", "length": 2, "experts": 2, "standardize": True}),
]
"""Settings that change what a method is, beside each method with its settings for tiny models."""
CASES = [*((name, None) for name in METHODS), *VARIANTS]
IDS = [f"{name}-{'-'.join(map(str, values.values()))}" if values else name for name, values in CASES]
every_method = pytest.mark.parametrize(("name", "values"), CASES, ids=IDS)


def parts(reading: Outputs, words: TextBatch) -> dict[str, torch.Tensor]:
    """What a reading has, the text's states without padding."""
    text = None if reading.text is None else reading.text[words.mask.bool()]
    found = {"text": text, "image": reading.vectors.get("image"), "joint": reading.joint}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_registered_by_the_name_of_its_settings(name):
    assert METHODS[name].traits.name == name == KINDS["adapter"][name].section_name
    adapter = made(name)
    assert type(adapter.config) is KINDS["adapter"][name] and {*adapter.traits.backbones} <= {"text", "encoder"}


def test_no_method_is_left_out():
    ours = {name for name, kind in KINDS["adapter"].items() if kind.__module__.startswith("mitrain.")}
    assert ours == set(METHODS)


def test_settings_of_no_method_are_refused():
    class Stray(Section):
        """Of no adapter."""

    with pytest.raises(ConfigError, match=r"Stray .*METHODS of mitrain/methods/__init__.py"):
        build(Stray())


@every_method
def test_gradients_reach_what_is_trained_and_nothing_else_and_detaching_restores(name, values):
    model, image = tiny("llama", torch.float64), dino()
    before = {n: p.clone() for m in (model, image) for n, p in m.state_dict().items()}
    adapter = made(name, values)
    adapter.attach(needed(adapter, model, image))
    scramble(adapter)
    words, picture = inputs(adapter, model, image)
    total = sum(part.square().sum() for part in parts(adapter.encode(words, picture), words).values())
    if any(True for _ in adapter.parameters()):
        total.backward()
    assert [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []
    own = {id(p) for p in adapter.parameters()}
    assert not [n for m in (model, image) for n, p in m.named_parameters() if id(p) not in own and p.grad is not None]
    tensors = {n for n, _ in adapter.named_parameters()} | {n for n, _ in adapter.named_buffers()}
    assert set(adapter.state_dict()) == tensors
    adapter.detach()
    after = {n: p for m in (model, image) for n, p in m.state_dict().items()}
    assert after.keys() == before.keys() and all(torch.equal(p, before[n]) for n, p in after.items())
    for part in (model, image):
        assert all(p.requires_grad for p in part.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in part.modules())


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("none", "full")])
def test_parameters_are_wider_than_a_half_precision_model(name):
    """In the models' own bfloat16 steps of less than 1/256 of a value would be lost."""
    model, image, adapter = tiny("llama", torch.bfloat16), dino().bfloat16(), made(name)
    adapter.attach(needed(adapter, model, image))
    scramble(adapter)
    words, picture = inputs(adapter, model, image)
    reading = adapter.encode(words, picture)
    assert reading.text.dtype == torch.bfloat16
    sum(part.float().square().sum() for part in parts(reading, words).values()).backward()
    assert {p.grad.dtype for p in adapter.parameters()} == {p.dtype for p in adapter.parameters()} == {torch.float32}


@every_method
def test_switched_off_the_models_are_the_frozen_ones(name, values):
    """What baselines, trunks and the control without the method read, whatever was trained."""
    adapter, model, image = attached(name, values)
    scramble(adapter)
    words, picture = inputs(adapter, model, image)
    with torch.no_grad(), adapter.conditioned(picture), adapter.disabled():
        found = whole(model, words), image(pixel_values=pixels()).last_hidden_state
        close(found[0][words.mask.bool()], whole(tiny("llama", torch.float64), words)[words.mask.bool()])
        close(found[1], dino()(pixel_values=pixels()).last_hidden_state)


@every_method
def test_an_adapter_attached_again_or_loaded_elsewhere_reads_the_same(name, values):
    adapter, model, image = attached(name, values)
    scramble(adapter)
    words, picture = inputs(adapter, model, image)
    with torch.no_grad():
        expected = parts(adapter.encode(words, picture), words)
        state = {n: p.clone() for n, p in adapter.state_dict().items()}
        adapter.detach()
        again, *_ = attached(name, values, model, adapter)
        found = parts(again.encode(words, picture), words)
        other, *_ = attached(name, values)
        other.load_state_dict(state)
        loaded = parts(other.encode(words, picture), words)
    for reading in (found, loaded):
        assert reading.keys() == expected.keys()
        for part, tensor in reading.items():
            close(tensor, expected[part])


@every_method
def test_padding_and_batch_neighbours_do_not_matter_and_alone_each_reads_itself(name, values):
    adapter, model, image = attached(name, values)
    scramble(adapter)
    with torch.no_grad():
        words, picture = inputs(adapter, model, image)
        together = adapter.encode(words, picture)
        short, own = inputs(adapter, model, image, rows=slice(1, 2))
        alone = parts(adapter.encode(short, own), short)
        ids = words.ids.masked_fill(words.mask == 0, 7)
        moved = parts(adapter.encode(TextBatch(ids, words.mask, words.states, words.depth), picture), words)
        only = adapter.encode(None, picture), adapter.encode(words, None)
        blind = adapter.encode(words, pictures(picture.feature, picture.states, picture.depth, infused=False))
    shown = words.mask.bool()
    for part, tensor in parts(together, words).items():
        close(moved[part], tensor)
        close(alone[part], together.text[1][shown[1]] if part == "text" else tensor[1:2])
    assert only[0].text is None and not only[1].vectors
    assert torch.allclose(only[1].text[shown], together.text[shown]) == (not adapter.traits.text_depends_on_input)
    assert torch.allclose(blind.text[shown], together.text[shown]) == (not adapter.traits.text_depends_on_input)


@pytest.mark.parametrize("name", METHODS)
def test_without_weights_a_method_has_the_same_tensors(name):
    """A dry run and an export build it on models without storage."""
    kind, shape = CONFIGS["llama"]
    model, image = (
        loading.empty_model(AutoModelForCausalLM, kind(**shape)),
        loading.empty_model(AutoModel, dino().config),
    )
    real, empty = attached(name)[0], made(name)
    with torch.device("meta"):
        empty.attach(needed(empty, model, image))
    shapes = [{n: t.shape for n, t in adapter.state_dict().items()} for adapter in (real, empty)]
    assert shapes[0] == shapes[1]
    assert {t.device.type for t in empty.state_dict().values()} <= {"meta"}


@pytest.mark.parametrize("name", METHODS)
def test_a_missing_backbone_is_named(name):
    adapter = made(name)
    with pytest.raises(ModelError, match=r"give it the text model"):
        adapter.attach({"encoder": dino()} if "encoder" in adapter.traits.backbones else {})
