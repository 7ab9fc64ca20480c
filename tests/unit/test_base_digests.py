"""What names a frozen model: its weights, its configuration and its tokenizer, in whatever precision it is held."""

import json
import shutil

import pytest
import torch
from folders import llm_folder, vision_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mitrain import quant
from mitrain.backbones import TextBackbone, VisionConfig, VisionEncoder
from mitrain.backbones.digests import weights_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llm_folder(tmp_path_factory.mktemp("base") / "llm")


def base(folder, **options):
    return TextBackbone.load(folder, options.pop("dtype", torch.float32), **options).base()


def differing(one, two):
    return {name for name in one if one[name] != two[name]}


def edited(folder, target, change):
    """A copy of ``folder`` whose tensors ``change`` has edited in place."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_it_is_the_same_in_every_precision_and_in_any_number_of_files(folder, tmp_path):
    first = base(folder)
    for options in ({"dtype": torch.bfloat16}, *({"quantize": p} for p in quant.PRECISIONS[1:])):
        assert base(folder, **options) == first
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and base(tmp_path) == first


def test_one_bit_of_one_weight_counts(folder, tmp_path):
    def flip(tensors):
        tensors["model.layers.2.mlp.down_proj.weight"].view(torch.int32)[3, 4] ^= 1

    assert differing(base(folder), base(edited(folder, tmp_path / "flipped", flip))) == {"weights"}


def test_weights_that_are_replaced_while_the_process_lives_are_read_again(folder, tmp_path):
    target = edited(folder, tmp_path / "copy", lambda tensors: None)
    first = weights_of(target, None)
    tensors = load_file(target / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, target / "new", {"format": "pt"})
    (target / "new").replace(target / "model.safetensors")
    assert weights_of(target, None) != first


def test_the_configuration_and_the_tokenizer_count(folder, tmp_path):
    first = base(folder)
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["rms_norm_eps"], config["transformers_version"] = 1e-3, "9"
    (other / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["red"], vocabulary["green"] = vocabulary["green"], vocabulary["red"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert differing(first, base(other)) == {"settings", "tokenizer"}


def test_an_encoder_is_named_by_its_weights_configuration_and_preprocessing(tmp_path):
    folder = vision_folder(tmp_path / "one")

    def of(folder, **settings):
        return VisionEncoder(
            VisionConfig(name=str(folder), **settings), folder, settings.pop("dtype", torch.float32)
        ).base()

    first = of(folder)
    assert of(folder, pool="cls", layer=2) == first  # what is read of it is the run's configuration to say
    assert differing(first, of(edited(folder, tmp_path / "two", lambda t: t["layernorm.bias"].add_(1)))) == {"weights"}
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    assert differing(first, of(folder)) == {"preprocess"}
