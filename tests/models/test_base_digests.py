"""What names a frozen model: its weights, its configuration and its tokenizer, in whatever precision it is held."""

import json
import shutil

import pytest
import torch
from exported import make_run, make_world
from folders import own_cache, vision_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import mitrain
from mitrain.cli import main
from mitrain.core.errors import ModelError
from mitrain.inference.export import export
from mitrain.models import ImageConfig, ImageEncoder, TextBackbone, quant
from mitrain.models.digests import weights_of
from mitrain.training.fingerprint import differences, digest


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
    assert differing(first, base(other)) == {"settings", "config.json", "tokenizer"}


def test_what_another_transformers_takes_for_granted_is_no_other_base(folder, tmp_path, monkeypatch):
    first = base(folder)
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(LlamaConfig, "to_diff_dict", lambda self: {**config, "some_new_default": 1})
    upgraded = base(folder)
    assert differing(first, upgraded) == {"settings"}
    names = ({f"text.{name}": digest([value]) for name, value in found.items()} for found in (first, upgraded))
    there, here = names
    assert differences(there, here) == []
    before = {name: value for name, value in there.items() if name != "text.config.json"}  # as earlier versions wrote it
    assert differences(before, there) == [] and differences(before, here) == ["text.settings differs"]
    edited = here | {"text.config.json": digest(["edited"])}
    assert differences(there, edited) == ["text.settings differs"]


def test_an_encoder_is_named_by_its_weights_configuration_and_preprocessing(tmp_path):
    folder = vision_folder(tmp_path / "one")

    def of(folder, **settings):
        return ImageEncoder(ImageConfig(name=str(folder), **settings), folder, settings.pop("dtype", torch.float32)).base()

    first = of(folder)
    assert of(folder, pool="cls", layer=2) == first  # what is read of it is the run's configuration to say
    assert differing(first, of(edited(folder, tmp_path / "two", lambda t: t["layernorm.bias"].add_(1)))) == {"weights"}
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    assert differing(first, of(folder)) == {"preprocess"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with own_cache(make_world(tmp_path_factory.mktemp("frozen"))) as path:
        run = make_run(path)
        export(run, path / "exported")
        yield path, run


@pytest.mark.parametrize(("part", "name"), [("llm", "text.weights"), ("vision", "encoder0.weights")])
def test_a_run_and_its_export_know_the_models_they_were_trained_on(world, part, name, capsys, caplog):
    path, run = world
    image, words = str(next((path / "data" / "images").glob("*.png"))), "the colour of this picture is"
    asked = [["predict", "--image", image, "--text", words], ["eval", "--split", "test"]]
    file = path / part / "model.safetensors"
    before = file.read_bytes()
    edited(path / part, path / f"other {part}", lambda tensors: next(iter(tensors.values())).add_(0.5))
    try:
        file.write_bytes((path / f"other {part}" / "model.safetensors").read_bytes())
        for folder in (run, path / "exported"):
            for command, *options in asked:
                assert main([command, str(folder), *options]) == 2
                said = capsys.readouterr().err
                assert f"not those that '{folder}' was trained on ({name} differs)" in said and said.count("\n") == 1
                assert main([command, str(folder), *options, "--allow-changes"]) == 0
                assert f"{folder} was trained on other frozen models: {name} differs" in caplog.text
                capsys.readouterr()
        with pytest.raises(ModelError, match=f"{name} differs"):
            mitrain.from_pretrained(path / "exported")
        assert mitrain.from_pretrained(path / "exported", allow_changes=True)
    finally:
        file.write_bytes(before)
    for folder in (run, path / "exported"):
        assert main(["predict", str(folder), "--image", image, "--text", words]) == 0
    assert mitrain.from_pretrained(path / "exported", quantize="int8", dtype="bf16", base=path / "llm")
