"""Gated cross-attention, perceptual weights, UniAdapter, LoRA beside MiT: each against its equations, by hand."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from attached import attached, bert, close, dino, inputs, made, needed, pixels, whole
from exported import PROMPT, make_config
from folders import own_cache
from methods_world import make_world
from tiny import scramble, tiny
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetModel

import mitrain
from mitrain.core.errors import ConfigError, ModelError
from mitrain.inference import scoring
from mitrain.methods.mit.mit import MiTConfig
from mitrain.models import ImageConfig
from mitrain.models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel
from mitrain.models.frozen import trunk_states
from mitrain.training.build import build
from mitrain.training.checkpoint import Checkpoint
from mitrain.training.runs import Run


def plain():
    return tiny("llama", torch.float64)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, None) for name in ("gated-xattn", "vlora", "uniadapter")),
        ("vlora", {"reads": "vector", "width": 8}),
        ("mit", {"lora_rank": 2}),
    ],
)
def test_the_first_step_is_the_frozen_models(name, values):
    adapter, model, image = attached(name, values)
    words, picture = inputs(adapter, model, image)
    with torch.no_grad():
        found = adapter.encode(words, picture)
        with adapter.disabled():
            frozen = adapter.encode(words, replace(picture, infused=False))
        assert torch.equal(found.text, frozen.text) and torch.equal(found.vectors["image"], frozen.vectors["image"])
        close(found.text, whole(plain(), words))
        scramble(adapter)
        assert not torch.allclose(adapter.encode(words, picture).text, frozen.text, atol=1e-3)


def test_gated_cross_attention_is_its_equations():
    """Both blocks by hand before the top two of four layers, the last of which the final norm follows."""
    adapter, model, image = attached("gated-xattn", {"layers": "last 2", "heads": 2, "head_dim": 4, "feed_forward": 2})
    scramble(adapter)
    words, picture = inputs(adapter, model, image)

    def block(part, x, t):
        q = part.q(F.layer_norm(x, (32,), part.norm.weight, part.norm.bias))
        (k, v), out = (t @ part.kv.weight.T).split(8, -1), []
        for head in range(2):
            one = slice(4 * head, 4 * head + 4)
            out.append((q[..., one] @ k[..., one].mT / math.sqrt(4)).softmax(-1) @ v[..., one])
        x = x + math.tanh(part.gates[0]) * torch.cat(out, -1) @ part.o.weight.T
        norm, up, _, down = part.dense
        inner = F.layer_norm(x, (32,), norm.weight, norm.bias) @ up.weight.T
        return x + math.tanh(part.gates[1]) * (inner.clamp_min(0) ** 2) @ down.weight.T

    with torch.no_grad():
        tokens = image(pixel_values=pixels()).last_hidden_state
        frozen = plain()
        for index in (2, 3):
            part = adapter.blocks[str(index)]
            frozen.model.layers[index].register_forward_pre_hook(
                lambda _, args, part=part: (block(part, args[0], tokens), *args[1:])
            )
        close(adapter.encode(words, picture).text, whole(frozen, words))
    each = 2 * 32 + 32 * 8 + 24 * 16 + 8 * 32 + 2 + 2 * 32 + 2 * 32 * 64
    assert sum(p.numel() for p in adapter.parameters()) == 2 * each


@pytest.mark.parametrize("reads", ["tokens", "vector"])
def test_perceptual_weights_are_an_update_of_each_samples_own_model(reads):
    targets = ["q", "v", "mlp"]
    adapter, model, image = attached("vlora", {"reads": reads, "layers": [1, 3], "targets": targets, "rank": 2, "width": 8})
    scramble(adapter)
    words, picture = inputs(adapter, model, image)
    with torch.no_grad():
        found = adapter.encode(words, picture).text
        factors = adapter._perceive(picture)
        assert not torch.allclose(factors[0], factors[1], atol=1e-3)
        for row in range(3):
            own = plain()
            modules = [
                own.get_submodule(f"model.layers.{layer}.{path}")
                for layer in (1, 3)
                for path in ("self_attn.q_proj", "self_attn.v_proj", *(f"mlp.{n}_proj" for n in ("gate", "up", "down")))
            ]
            for place, module in enumerate(modules):
                module.weight += adapter.ups[place] @ factors[row, place, : module.in_features].T
            one = replace(words, ids=words.ids[row : row + 1], mask=words.mask[row : row + 1])
            close(found[row], whole(own, one)[0])
    entered, wide = (24 if reads == "tokens" else 5), 48  # the widest input: the feed-forward's inner width
    decoder = 2 * (3 * 8 * 8 + 3 * 8 + 8 * 8 + 8) + 2 * 8 * 32 + 32 + 8 + 4 * 2 * 8  # its block's and the last norm
    generator = entered * 8 + 8 + 10 * 8 + 8 + decoder + 8 * wide * 2 + wide * 2
    assert sum(p.numel() for p in adapter.parameters()) == generator + 2 * 2 * (32 + 16 + 48 + 48 + 32)


def test_a_modality_that_a_sample_lacks_has_no_part_in_its_weights():
    """Of two vectors one is enough; of none the model is the frozen one, whatever lies in their rows."""
    adapter = mitrain.methods.build(
        mitrain.core.config.choose("adapter", {"name": "vlora", "reads": "vector", "width": 8}),
        {"image": 5, "sound": 3},
    )
    adapter.attach({"text": (model := plain())})
    scramble(adapter)
    adapter.eval()
    words, picture = inputs(adapter, model, dino())
    both = {"image": picture.feature, "sound": picture.feature[:, :3] - 1}
    there = {"image": torch.tensor([True, True, False]), "sound": torch.tensor([True, False, False])}
    given = replace(picture, features=both, present=there)
    noisy = replace(given, features={n: torch.where(there[n][:, None], x, 9.0) for n, x in both.items()})
    with torch.no_grad():
        found, whole_ones = adapter.encode(words, given).text, adapter.encode(words, replace(given, present={})).text
        close(adapter.encode(words, noisy).text, found)
        frozen = adapter.encode(words, None).text
    close(found[0], whole_ones[0])
    close(found[2], frozen[2])
    assert all(not torch.allclose(found[1], other[1], atol=1e-3) for other in (whole_ones, frozen))
    with pytest.raises(ConfigError, match="adapter.modalities is empty"):
        mitrain.methods.build(adapter.config.model_copy(update={"modalities": {}}))
    with pytest.raises(ConfigError, match="width=8 is not divisible by heads=3"):
        made("vlora", {"width": 8, "heads": 3})


def test_uniadapters_share_the_way_down_and_have_their_own_way_up():
    """By hand beside each feed-forward of Llama and DINOv2, which are paired from the top; four layers meet three."""
    adapter, model, image = attached("uniadapter", {"width": 4, "scale": 0.5})
    scramble(adapter)
    words, picture = inputs(adapter, model, image)

    def beside(part, side):
        def add(block, args, output):
            x = F.layer_norm(args[0], args[0].shape[-1:])
            inner = (x @ part.down.weight[:, : x.shape[-1]].T + part.down.bias).clamp_min(0)
            return output + 0.5 * (inner @ part.up[side].weight.T + part.up[side].bias)

        return add

    with torch.no_grad():
        found = adapter.encode(words, picture)
        other, seeing = plain(), dino()
        for place, (layer, own) in enumerate(
            zip(other.model.layers[::-1], [*seeing.encoder.layer[::-1], None], strict=True)
        ):
            layer.mlp.register_forward_hook(beside(adapter.pairs[place], "text"))
            if own is not None:
                own.mlp.register_forward_hook(beside(adapter.pairs[place], "encoder"))
        close(found.text, whole(other, words))
        states = trunk_states(seeing, 3, pixel_values=pixels())
        close(found.vectors["image"], seeing.layernorm(states)[:, 0])
    assert sum(p.numel() for p in adapter.parameters()) == 4 * (32 * 4 + 4 + 4 * 32 + 32) + 3 * (4 * 24 + 24)
    assert "encoder" not in adapter.pairs[3].up
    with pytest.raises(ModelError, match="uniadapter is not linear and cannot be merged"):
        adapter.merge()


@pytest.mark.parametrize("name", ["gated-xattn", "vlora", "uniadapter"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_other_language_models_have_layers_for_them(name, kind):
    """BERT's are post-norm, GPT-2's projections are its own class, and queries, keys and values one of them."""
    shape = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 67, "n_positions": 64}
    model = (
        bert() if kind == "bert" else GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2)).double().eval()
    )
    adapter, _, image = attached(name, None, model)
    words, picture = inputs(adapter, model, image)
    with torch.no_grad():
        before = whole(model, words) if name != "uniadapter" else adapter.encode(words, picture).text
        scramble(adapter)
        shown = adapter.encode(words, picture).text
    seen = words.mask.bool()
    assert not torch.allclose(shown[seen], before[seen], atol=1e-3) and torch.isfinite(shown[seen]).all()


def test_an_adapter_of_other_widths_is_refused():
    for name in ("gated-xattn", "vlora", "uniadapter"):
        adapter, model, image = attached(name)
        adapter.detach()
        with pytest.raises(ModelError, match=f"this {name} was made for models of other widths or depth: make a new one"):
            adapter.attach(needed(adapter, tiny("llama", torch.float64, hidden_size=40), image))
        adapter.attach(needed(adapter, model, image))


def test_lora_beside_mit_is_a_merged_update_of_the_infused_layers():
    adapter, model, image = attached("mit", {"layers": [1, 3], "lora_rank": 2})
    scramble(adapter)
    words, picture = inputs(adapter, model, image)
    with torch.no_grad():
        other = plain()
        modules = [other.model.layers[i].self_attn.get_submodule(n) for i in (1, 3) for n in ("q_proj", "v_proj")]
        for module, down, up in zip(modules, adapter.lora.down, adapter.lora.up, strict=True):
            module.weight += 2 * up @ down.T
        alone = mitrain.methods.build(MiTConfig(layers=[1, 3]), {"image": 5})
        alone.attach({"text": other})
        own = {name: value for name, value in adapter.state_dict().items() if not name.startswith("lora.")}
        alone.load_state_dict(own)
        close(adapter.encode(words, picture).text, alone.encode(words, picture).text)
        close(adapter.encode(words, None).text, alone.encode(words, None).text)
    assert sum(p.numel() for p in adapter.lora.parameters()) == 2 * 2 * ((32 + 32) + (32 + 16))


def test_of_two_adapters_on_a_model_the_lora_of_the_one_that_acts_counts():
    model, ids = tiny(), torch.tensor([[3, 4, 5, 6]])
    frozen = model(ids).logits
    for number, name in enumerate(("one", "two")):
        scramble(mitrain.attach(model, MiTConfig(modalities={"image": 6}, layers=[1], lora_rank=2), name=name), seed=number)
    with mitrain.using_adapter(model, "two"):
        second = model(ids).logits
    with mitrain.using_adapter(model, None):
        assert torch.equal(model(ids).logits, frozen)
    assert not torch.allclose(model(ids).logits, second, atol=1e-3) and not torch.allclose(second, frozen, atol=1e-3)


def test_lora_that_one_thread_switches_off_acts_in_the_others():
    model, ids = tiny(), torch.tensor([[3, 4, 5, 6]])
    frozen = model(ids).logits
    adapter = mitrain.attach(model, MiTConfig(modalities={"image": 6}, layers=[1], lora_rank=2))
    scramble(adapter)
    acting = model(ids).logits
    with adapter.disabled(), ThreadPoolExecutor(1) as pool:
        with adapter.disabled():
            pass
        assert torch.equal(model(ids).logits, frozen) and not torch.allclose(acting, frozen, atol=1e-3)
        assert torch.equal(pool.submit(lambda: model(ids).logits).result(), acting)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = make_world(tmp_path_factory.mktemp("opponents"))
    stages = ((1, 3, 1, 1, 8), (2, 5, 2, 6, 16), (1, 3, 1, 6, 24))
    seeing = EfficientNetLiteModel(EfficientNetLiteConfig(stem_channels=8, hidden_size=24, stages=stages))
    scramble(seeing, spread=0.5)
    seeing.save_pretrained(path / "convolutional")
    (path / "convolutional" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    with own_cache(path):
        yield path


TOKENS = [
    {"name": "gated-xattn", "layers": "all"},
    {"name": "vlora", "layers": "all"},
    {"name": "visual-prefix", "tokens": 4},
]


@pytest.mark.parametrize("map_of", [False, True], ids=["patches", "map"])
@pytest.mark.parametrize("values", [*TOKENS, {**TOKENS[1], "reads": "vector"}], ids=lambda values: values["name"])
def test_a_frozen_language_head_speaks_of_what_they_show_it(world, values, map_of):
    """Candidates are scored, and words are said by a beam search, whose rows are several for each picture."""
    config = make_config(world, adapter=values)
    if map_of:
        seeing = ImageConfig(name=str(world / "convolutional"), size=64, layer=2, input="image")
        config = config.model_copy(update={"model": config.model.model_copy(update={"encoders": {"image": seeing}})})
    model = build(config)
    scramble(model.adapter, spread=0.5)
    model.train(False)
    run = Run(world, model.config, model, Checkpoint(world, 1, None, {}, {}), {PROMPT: ("red", "green", "blue")})
    paths = sorted((world / "data").rglob("*.png"))[:2]
    asked = [scoring.Asked({"image": path}, PROMPT, None) for path in paths]
    together = [answer.values["probabilities"] for answer in scoring.ask_all(run, asked)]
    alone = [scoring.ask(run, {"image": path}, PROMPT).values["probabilities"] for path in paths]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert together[0] != pytest.approx(together[1], abs=1e-3)
    assert model.task.begins
    model.task.begins = False
    for one, other in zip(together, scoring.ask_all(run, asked), strict=True):
        assert one == pytest.approx(other.values["probabilities"], abs=1e-5), "with prompts read for each answer"
    model.task.begins = True
    blind = [answer.values["probabilities"] for answer in scoring.ask_all(run, asked, infused=False)]
    assert blind[0] == pytest.approx(blind[1], abs=1e-6) != together[0]
    generation = {"beams": 2, "max_new_tokens": 4}
    asked = [scoring.Asked({"image": path}, "one never heard", None) for path in paths]
    together = [answer.values["answer"] for answer in scoring.ask_all(run, asked, generation=generation)]
    assert together == [
        scoring.ask(run, {"image": path}, "one never heard", generation=generation).values["answer"] for path in paths
    ]


@pytest.mark.parametrize(("name", "layer"), [("uniadapter", None), ("pmf", None), ("gated-xattn", 1)])
def test_a_convolutional_encoder_serves_those_that_read_its_map_alone(world, name, layer, tmp_path):
    """ResNet's inner maps are read by their mean alone, since what comes after them runs all the same."""
    folder = world / "convolutional"
    if layer:
        folder = tmp_path / "resnet"
        ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(folder)
    config = make_config(world, "answer", {"name": name})
    seeing = ImageConfig(name=str(folder), size=64, layer=layer, input="image")
    changed = {"model": config.model.model_copy(update={"encoders": {"image": seeing}})}
    with pytest.raises(ConfigError, match=f"the method '{name}' changes an encoder's transformer layers, and .* has none"):
        build(config.model_copy(update=changed))
