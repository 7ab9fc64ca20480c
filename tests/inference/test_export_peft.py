"""What PEFT can load of ours it loads, with equal outputs; what it cannot it refuses, and never as an adapter of zeros."""

import copy
import json
import warnings

import exported
import pytest
import torch
from attached import attached as inside
from attached import dino, inputs, made, pixels
from folders import llm_folder
from peft import PeftModel
from safetensors.torch import load_file
from tiny import scramble, tiny
from tiny_encoders import sound, tiny_encoder
from transformers import AutoModel, AutoModelForCausalLM

import mitrain
from mitrain import methods
from mitrain.core import config
from mitrain.core.errors import CheckpointError
from mitrain.inference.export import export
from mitrain.methods import export_format
from mitrain.models.batch import TextBatch

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
MASK = torch.ones_like(IDS)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "mitrain.json", "mitrain.safetensors"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llm_folder(tmp_path_factory.mktemp("peft") / "llm", layers=2)


def llm(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def attached(folder, settings, **more):
    """An attached adapter with random parameters, and its model."""
    model = llm(folder)
    adapter = methods.build(config.choose("adapter", settings))
    adapter.attach({"text": model, **more})
    scramble(adapter)
    return adapter.eval(), model


def by_peft(folder, saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return PeftModel.from_pretrained(llm(folder), saved)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "lora", "rank": 3, "alpha": 5, "targets": ["q", "v", "mlp"], "layers": [1]},
        {"name": "ia3"},
        {"name": "prompt", "tokens": 2},
        {"name": "prefix", "tokens": 3},
    ],
    ids=lambda settings: settings["name"],
)
@torch.no_grad()
def test_peft_gives_what_the_adapter_gave(folder, tmp_path, settings):
    adapter, model = attached(folder, settings)
    hidden = adapter.encode(TextBatch(IDS, MASK), None).text
    expected = model.lm_head(hidden)
    adapter.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == FILES
    found = by_peft(folder, tmp_path / "saved")(input_ids=IDS, attention_mask=MASK).logits
    assert torch.equal(found[:, -IDS.shape[1] :], expected)
    assert not torch.allclose(llm(folder)(IDS).logits, expected, atol=1e-2)
    again, _ = mitrain.load_adapter(llm(folder), tmp_path / "saved")
    assert torch.equal(again.encode(TextBatch(IDS, MASK), None).text, hidden)
    assert "PeftModel.from_pretrained" in (tmp_path / "saved" / "README.md").read_text()


@torch.no_grad()
def test_of_a_run_peft_has_the_adapter_and_the_card_says_what_it_has_not(tmp_path, monkeypatch):
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "cache"))
    world = exported.make_world(tmp_path)
    run = exported.make_run(world, "segment", {"name": "lora", "rank": 2})
    export(run, tmp_path / "out")
    assert {name.split(".")[0] for name in load_file(tmp_path / "out" / "mitrain.safetensors")} == {
        "adapter", "head", "features",
    }  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "nothing else. The task head and the statistics of features are in `mitrain.safetensors` alone." in card
    assert "load_adapter(model" in card and "infused=" not in card  # which LoRA does not read
    model = mitrain.from_pretrained(tmp_path / "out").model
    expected = model.text.model.lm_head(model.adapter.encode(TextBatch(IDS, MASK), None).text)
    found = by_peft(world / "llm", tmp_path / "out")(input_ids=IDS, attention_mask=MASK).logits
    assert torch.equal(found, expected)


OTHERS = [name for name in methods.METHODS if name not in ("lora", "ia3", "prompt", "prefix")]


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_what_is_not_pefts_does_not_call_itself_pefts(tmp_path, name):
    """Every method but PEFT's own: PEFT finds nothing in the folder, and mitrain says what was said."""
    adapter, model, image = inside(name, None)
    scramble(adapter)
    saved = adapter.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "mitrain.json", "mitrain.safetensors"]
    assert "peft" not in (saved / "mitrain.json").read_text()
    card = (saved / "README.md").read_text()
    assert "PeftModel" not in card and "PEFT cannot hold this adapter and finds none in this folder" in card
    words, seen = inputs(adapter, model, image)
    expected = adapter.encode(words, seen)
    adapter.detach()
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        PeftModel.from_pretrained(model, saved)
    if adapter.traits.backbones == ("text",):
        again, _ = mitrain.load_adapter(model, saved)
        assert torch.equal(again.encode(words, seen).text, expected.text)


@pytest.mark.parametrize("name", ["lora", "ia3"])
@pytest.mark.parametrize("where", ["encoder", "both"])
@pytest.mark.parametrize("kind", ["dino", "whisper"])
@torch.no_grad()
def test_peft_loads_an_encoders_half_by_itself(tmp_path, name, where, kind):
    """Of a picture's and of a sound's encoder; where the language model is changed too, each has a folder of its own."""
    model, encoder = tiny("llama"), dino().float() if kind == "dino" else tiny_encoder("whisper")
    bare = {"llm": copy.deepcopy(model), "encoder": copy.deepcopy(encoder)}
    adapter = made(name, {"where": where})
    adapter.attach({"text": model, "encoder": encoder})
    scramble(adapter)
    saved = adapter.eval().save_pretrained(tmp_path / "saved")
    folders = ["encoder", "llm"] if where == "both" else ["encoder"]
    assert sorted(path.name for path in saved.iterdir() if path.is_dir()) == folders
    asked = {"llm": {"input_ids": IDS}, "encoder": {"pixel_values": pixels().float()} if kind == "dino" else sound()}
    for folder in folders:
        plain = bare[folder](**asked[folder])[0]
        expected = (model if folder == "llm" else encoder)(**asked[folder])[0]
        found = PeftModel.from_pretrained(bare[folder], saved / folder)(**asked[folder])[0]
        assert torch.equal(found, expected) and not torch.allclose(found, plain, atol=1e-3)
        assert f'"THIS_FOLDER/{folder}")  # by PEFT without mitrain' in (saved / "README.md").read_text()
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):  # never a half for the whole
        PeftModel.from_pretrained(tiny("llama"), saved)


@torch.no_grad()
def test_of_a_run_that_changes_its_encoder_peft_loads_the_encoder_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "cache"))
    world = exported.make_world(tmp_path)
    made = export(exported.make_run(world, "segment", {"name": "lora", "where": "both", "rank": 2}), tmp_path / "out")
    assert set(made["files"]) >= {f"{folder}/{name}" for folder in ("llm", "encoder") for name in FILES[1:3]}
    settings = json.loads((tmp_path / "out" / "encoder" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(world / "vision")
    model, pixels = mitrain.from_pretrained(tmp_path / "out").model, torch.randn(1, 3, 56, 56)
    expected = model.encoders["image"].model(pixel_values=pixels).last_hidden_state
    found = PeftModel.from_pretrained(AutoModel.from_pretrained(world / "vision"), tmp_path / "out" / "encoder")
    assert torch.equal(found(pixel_values=pixels).last_hidden_state, expected)


def test_files_of_peft_that_were_changed_or_forged_are_refused(folder, tmp_path):
    attached(folder, {"name": "ia3"})[0].save_pretrained(tmp_path / "saved")
    values = json.loads((tmp_path / "saved" / "mitrain.json").read_text())
    values["peft"]["adapter_model.safetensors"]["bytes"] = 20 << 30
    forged = {**values, "checksum": export_format.folder.checksum(values)}
    weights, own = tmp_path / "saved" / "adapter_model.safetensors", tmp_path / "saved" / "mitrain.json"
    kept = own.read_text()
    own.write_text(json.dumps(forged))
    with pytest.raises(CheckpointError, match="names no file of PEFT's"):
        export_format.read(tmp_path / "saved")
    own.write_text(kept)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="adapter_model.safetensors was changed after the export"):
        export_format.read(tmp_path / "saved")
