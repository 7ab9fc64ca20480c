"""MiT's settings, presets, parameter counts."""

import pytest
import torch
from tiny import tiny
from transformers import AutoModelForCausalLM, LlamaConfig

import mitrain
from mitrain import methods
from mitrain.core import config
from mitrain.core.errors import ConfigError
from mitrain.methods.mit.config import MiTConfig
from mitrain.methods.mit.mit import MiT

LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
RELEASED_PER_LAYER = 21_064_480


def choose(**values):
    return config.choose("adapter", {"name": "mit", **values})


def test_presets_fill_in_what_is_not_given():
    default, released, paper = (choose(preset=name) for name in ("default", "released", "paper"))
    assert choose() == default
    assert (default.gate, default.base, default.k_add, default.init) == ("prefix", 1, False, "identity")
    assert (released.gate, released.base, released.k_add, released.init) == ("sequence", 1, True, "released")
    assert released.layers == [13, 17, 21, 25, 29]
    assert (paper.gate, paper.base, paper.k_add) == ("token", 0, True)
    own = choose(preset="released", gate="prefix", layers="all")
    assert (own.gate, own.layers, own.k_add) == ("prefix", "all", True)


def test_a_resolved_configuration_reads_back_as_itself():
    for preset in ("default", "released", "paper"):
        section = choose(preset=preset, modalities={"image": 4})
        assert MiTConfig(**section.to_dict()) == section


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "papr"}, "adapter.preset='papr'"),
        ({"gate": "prefx"}, "adapter.gate='prefx'"),
        ({"base": 2}, "adapter.base=2"),
        ({"rank": 0}, "adapter.rank=0"),
        ({"modalities": {"image": 0}}, "adapter.modalities.image=0"),
        ({"modalities": {"a.b": 4}}, "'a.b' cannot name a modality"),
        ({"modalities": {"keys": 4}}, "'keys' cannot name a modality"),
        ({"layers": -1}, "layers='-1' is not understood"),
        ({"layers": True}, "layers=True: true and false are no value here"),
        ({"layers": "lst third"}, "layers='lst third' is not understood"),
        ({"layers": [1, 1]}, "stands twice"),
        ({"layer": 3}, r"unknown key 'adapter.layer' .did you mean 'layers'"),
        ({"preset": ["default"]}, "adapter.preset"),
        ({"terms": "add", "base": 0}, "base=0 without multiplying maps leaves no keys"),
        ({"terms": "multiply", "k_add": True}, "k_add adds to keys, which terms=multiply leaves out"),
    ],
)
def test_a_wrong_setting_is_one_line(values, message):
    with pytest.raises(ConfigError, match=message) as error:
        choose(**values)
    assert "\n" not in str(error.value)


def test_build():
    section = choose(layers="last half")
    adapter = methods.build(section, {"image": 6})
    assert isinstance(adapter, MiT) and adapter.feature_widths == {"image": 6}
    assert methods.build(choose(modalities={"image": 6}), {"image": 6}).feature_widths == {"image": 6}
    with pytest.raises(ConfigError, match=r"the encoders give \{'image': 7\}"):
        methods.build(choose(modalities={"image": 6}), {"image": 7})
    with pytest.raises(ConfigError, match=r"adapter.modalities is empty"):
        methods.build(section)
    with pytest.raises(ConfigError, match="is of no name in METHODS"):
        methods.build(config.Section())


def test_the_layers_must_exist_in_the_model():
    with pytest.raises(ConfigError, match="there is no layer 13, this model has layers 0 to 3"):
        mitrain.attach(tiny(), MiTConfig(preset="released", modalities={"image": 6}))


@pytest.fixture(scope="module")
def llama_2_7b():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_2_7B))


def test_the_released_form_of_llama_2_7b_has_the_published_parameters_per_layer(llama_2_7b):
    section = MiTConfig(preset="released", modalities={"image": 768})
    mit = mitrain.attach(llama_2_7b, section)
    per_layer = [sum(p.numel() for p in layer.parameters()) for layer in mit.infusions]
    assert per_layer == [RELEASED_PER_LAYER] * 5
    assert mit.layers == [13, 17, 21, 25, 29]
    assert all(p.is_meta for p in mit.parameters())
    mit.detach()


def counted(model, **settings):
    """Trained parameters of an infused layer, of what the layers share, and in all."""
    mit = mitrain.attach(model, MiTConfig(**{"modalities": {"image": 768}, "layers": "last 8", **settings}))
    parts = (mit.infusions[0], mit.projections, mit)
    mit.detach()
    return tuple(sum(p.numel() for p in part.parameters()) for part in parts)


def test_the_count_is_that_of_the_papers_share(llama_2_7b):
    per_layer, _, total = counted(llama_2_7b, preset="released")
    assert (per_layer, total) == (RELEASED_PER_LAYER, 168_515_840)
    without, _, _ = counted(llama_2_7b, preset="released", k_add=False)
    assert per_layer - without == 769 * 4096  # k_add: 3.15 M parameters per layer that train nothing


@pytest.mark.parametrize(
    ("changes", "maps", "ffn"), [({}, 3, True), ({"k_add": True, "ffn": False}, 4, False), ({"terms": "multiply"}, 2, True)]
)
def test_maps_of_low_rank_share_their_projections(llama_2_7b, changes, maps, ffn):
    """Of each modality a layer has affine maps from the rank to the heads' widths, and a factor for each head."""
    modalities = {"image": 768, "audio": 128}
    per_layer, shared, total = counted(llama_2_7b, rank=16, modalities=modalities, **changes)
    assert per_layer == 2 * (17 * (maps * 4096 + ffn * 11008) + 32)
    assert shared == 16 * (768 + 128) and total == 8 * per_layer + shared


def test_maps_follow_heads_times_width_not_the_hidden_size():
    mit = mitrain.attach(tiny("qwen3"), MiTConfig(modalities={"image": 6}, layers=[1]))
    assert mit.infusions[0].maps["image"].k_mul.out_features == 4 * 16 != 32
