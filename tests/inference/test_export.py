"""An exported run predicts what the run predicts, on any copy of its base; an adapter attaches to a model in memory."""

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from commands import as_json
from exported import BEST, LAST, PROMPT, make_config, make_run
from folders import llm_folder, vision_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import NAMES, scramble, tiny
from transformers import AutoModelForCausalLM

import mitrain
from mitrain.core.errors import CheckpointError, ConfigError, DataError, ModelError
from mitrain.inference import scoring
from mitrain.inference.export import export
from mitrain.training import runs

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


@pytest.fixture(scope="module")
def exported(world, run):
    export(run, world / "exported")
    return world / "exported"


@pytest.fixture(scope="module")
def predictor(exported):
    return mitrain.from_pretrained(exported)


@pytest.fixture
def images(world):
    return sorted((world / "data" / "images").glob("*.png"))[:5]


def llm(world):
    return AutoModelForCausalLM.from_pretrained(world / "llm").eval()


def test_it_predicts_what_the_run_predicts(run, exported, predictor, images, capsys):
    answers = []
    for path in images:
        expected = scoring.ask(runs.open_run(run), {"image": str(path)}, PROMPT).values
        assert predictor.predict(path, PROMPT) == expected
        answers.append(tuple(expected["probabilities"].values()))
    assert len(set(answers)) == len(images)
    outputs = []
    for folder in (run, exported):
        outputs.append(as_json(capsys, "predict", folder, "--image", images[0], "--text", PROMPT))
    assert outputs[0] == outputs[1] and outputs[0]["probabilities"]


def test_a_picture_in_memory_is_as_good_as_its_file(predictor, images):
    with Image.open(images[1]) as picture:
        found = predictor.predict(picture, PROMPT, candidates=["red", "blue"])
    assert found == {**predictor.predict(images[1], PROMPT, candidates=["red", "blue"]), "image": None}
    with pytest.raises(ConfigError, match="the text is empty"):
        predictor.predict(images[1], " ")
    with pytest.raises(DataError, match="has no pixels"):
        predictor.predict(Image.new("RGB", (0, 3)), PROMPT)
    with pytest.raises(ConfigError, match="candidates='red,blue' is one text: give a list"):
        predictor.predict(images[1], PROMPT, candidates="red,blue")


def test_the_data_is_not_needed(world, predictor, images):
    before = predictor.predict(images[0], PROMPT)
    (world / "data").rename(world / "elsewhere")
    try:
        after = predictor.predict(world / "elsewhere" / "images" / images[0].name, PROMPT)
    finally:
        (world / "elsewhere").rename(world / "data")
    assert {**after, "image": before["image"]} == before and set(before["probabilities"]) == {
        "red", "green", "blue", "yellow",
    }  # fmt: skip


def test_eval_takes_an_export_too(run, exported):
    one, two = (scoring.score_run(folder, split="test", control="none") for folder in (run, exported))
    assert {**one, "run": ""} == {**two, "run": ""} and one["samples"] == 4
    with pytest.raises(CheckpointError, match="holds one checkpoint: leave out --checkpoint latest"):
        scoring.score_run(exported, split="test", control="none", which="latest")


def test_best_and_latest(world, run, capsys):
    command = ["export", str(run), "--out", str(world / "latest"), "--checkpoint", "latest", "--splits", "test"]
    made = as_json(capsys, *command, "--samples", "3")
    assert made["step"] == LAST and made["metrics"]["val"] == {"accuracy": LAST / 10, "samples": 4}
    assert made["metrics"]["test"]["samples"] == 3
    assert mitrain.from_pretrained(world / "latest").run.saved.step == LAST
    assert f"| test | {LAST} | samples | 3 |" in (world / "latest" / "README.md").read_text()


def test_the_folder_of_a_run_is_opened_at_its_best_checkpoint(world, run, predictor, images):
    opened = mitrain.from_pretrained(run)
    assert opened.run.saved.step == BEST
    assert opened.predict(images[0], PROMPT) == predictor.predict(images[0], PROMPT)
    assert mitrain.from_pretrained(run, quantize="int8").model.text.quantize == "int8"
    with pytest.raises(CheckpointError, match=f"mitrain export {run} --out DIR makes one of this run"):
        mitrain.load_adapter(llm(world), run)


def test_segmentation_comes_with_its_head(world, images):
    run = make_run(world, "segment")
    export(run, world / "masks")
    names = load_file(world / "masks" / "mitrain.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"adapter", "head", "features"}
    found = mitrain.from_pretrained(world / "masks").predict(images[0], "red square")
    expected = scoring.ask(runs.open_run(run), {"image": str(images[0])}, "red square")
    assert np.array_equal(found.pop("mask"), expected.mask) and found == expected.values
    assert found["mask_share"] not in (0, 1)


def test_the_card_and_the_configuration_say_what_is_inside(world, exported, run):
    card, values = (exported / "README.md").read_text(), json.loads((exported / "mitrain.json").read_text())
    assert sorted(p.name for p in exported.iterdir()) == [
        "README.md",
        "mitrain.json",
        "mitrain.safetensors",
    ]
    assert values["base"] == {
        "model_type": "llama", "layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "head_dim": 8,
        "ffn_width": 64, "vocabulary": 23,
    }  # fmt: skip
    trainable = 48 * 3 + (3 + 1) * (3 * 32 + 64) + 4
    frozen = sum(p.numel() for p in llm(world).parameters())
    assert values["parameters"] == {"trainable": trainable, "frozen": frozen}
    assert f"{trainable:,}, {100 * trainable / frozen:.3g} % of the {frozen:,}" in card
    assert f"| val | {BEST} | accuracy | 0.4000 |" in card and "nan" not in card
    assert "secret" not in json.dumps(values) and str(world) not in card
    assert values["run"]["encoders"][0]["preprocess"]["size"] == 56
    assert values["run"]["config"]["model"]["device"] == "auto" and "llm" not in values["run"]["config"]["model"]


def test_other_places_and_precisions_of_the_base(world, exported, predictor, images):
    moved = mitrain.from_pretrained(
        exported, base=llm_folder(world / "copy", layers=2), encoders=[world / "vision"], dtype="fp32"
    )
    assert moved.predict(images[0], PROMPT) == predictor.predict(images[0], PROMPT)
    low = mitrain.from_pretrained(exported, quantize="int8")
    assert low.model.text.quantize == "int8"
    one, two = (p.predict(images[0], PROMPT)["probabilities"] for p in (low, predictor))
    assert one != two and one == pytest.approx(two, abs=0.2)
    values = json.loads((exported / "mitrain.json").read_text())
    (exported / "mitrain.json").write_text(json.dumps({**values, "base_model_name_or_path": str(world / "copy")}))
    assert mitrain.from_pretrained(exported).model.config.model.llm == str(world / "copy")
    (exported / "mitrain.json").write_text(json.dumps(values))


def test_the_saved_preprocessing_is_used_whatever_the_encoders_folder_says(world, run, exported, images):
    other = shutil.copytree(world / "vision", world / "regrained")
    (other / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}))
    found = mitrain.from_pretrained(exported, encoders=[other])
    assert found.predict(images[0], PROMPT) == scoring.ask(runs.open_run(run), {"image": str(images[0])}, PROMPT).values


def test_a_base_of_another_shape_is_refused_with_every_difference(world, exported):
    other = llm_folder(world / "other", layers=3, width=48)
    says = "layers 2, here 3; hidden_size 32, here 48; head_dim 8, here 12; ffn_width 64, here 96: give another"
    with pytest.raises(ModelError, match=says):
        mitrain.from_pretrained(exported, base=other)
    model = AutoModelForCausalLM.from_pretrained(other)
    before = set(dict(model.named_modules()))
    with pytest.raises(ModelError, match="layers 2, here 3; hidden_size 32, here 48"):
        mitrain.load_adapter(model, exported)
    model = llm(world)
    model.resize_token_embeddings(25)
    with pytest.raises(ModelError, match="trained on: vocabulary 23, here 25: load"):
        mitrain.load_adapter(model, exported)
    assert before == set(dict(AutoModelForCausalLM.from_pretrained(other).named_modules()))
    with pytest.raises(ModelError, match="image encoder.*width 48, here 32; channels 24, here 16: give another"):
        mitrain.from_pretrained(exported, encoders=[vision_folder(world / "narrow", layers=2, width=16)])


def test_wrong_overrides_are_the_users(exported):
    with pytest.raises(ConfigError, match="did you mean 'quantize'"):
        mitrain.from_pretrained(exported, quantise="int8")
    with pytest.raises(ConfigError, match="model.llm=3: give text"):
        mitrain.from_pretrained(exported, llm=3)
    with pytest.raises(ConfigError, match="2 encoders were given, the adapter has 1"):
        mitrain.from_pretrained(exported, encoders=["a", "b"])


def test_it_attaches_to_a_model_in_memory(world, exported, predictor):
    model, features = llm(world), torch.randn(2, 48)
    plain = model(IDS).logits
    adapter, normalize = mitrain.load_adapter(model, exported)
    infused = normalize(features)
    with torch.no_grad():
        found = model(IDS, infused={"image": infused}).logits
        with predictor.adapter.bind({"image": predictor.model.norm(features)}):
            expected = predictor.model.text.model(IDS).logits
    assert torch.equal(found, expected) and not torch.equal(found, plain)
    with pytest.raises(ModelError, match="has a mit adapter .* already: detach it first"):
        mitrain.load_adapter(model, exported)
    adapter.detach()
    assert torch.equal(model(IDS).logits, plain)


def test_a_model_in_memory_of_other_weights_is_refused(world, exported, tmp_path, caplog):
    other = shutil.copytree(world / "llm", tmp_path / "llm")
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(other).eval()
    plain = model(IDS).logits
    with pytest.raises(ModelError, match=rf"not those that '{exported}' was trained on \(text\.weights differs\)"):
        mitrain.load_adapter(model, exported)
    assert torch.equal(model(IDS).logits, plain) and not hasattr(model, "mit")
    mitrain.load_adapter(model, exported, allow_changes=True)[0].detach()
    assert "was trained on other frozen models: text.weights differs" in caplog.text
    moved = AutoModelForCausalLM.from_pretrained(shutil.copytree(world / "llm", tmp_path / "same"), dtype=torch.bfloat16)
    caplog.clear()
    mitrain.load_adapter(moved, exported)[0].detach()
    assert not caplog.records
    model.config._name_or_path = model.name_or_path = ""
    mitrain.load_adapter(model, exported)[0].detach()
    assert "the model in memory names no folder with its weights: they are not compared" in caplog.text


def test_an_adapter_of_ones_own_loop_is_saved_and_attached_again(world, tmp_path):
    model, features = llm(world), torch.randn(2, 6)
    config = mitrain.MiTConfig(modalities={"image": 6}, layers=[1], gate="none")
    mit = mitrain.attach(model, config)
    scramble(mit)
    expected = model(IDS, infused={"image": features}).logits
    assert mit.save_pretrained(tmp_path / "mit") == tmp_path / "mit"
    other = llm(world)
    again, norm = mitrain.load_adapter(other, tmp_path / "mit")
    assert norm is None and again.config == config and torch.equal(other(IDS, infused={"image": features}).logits, expected)
    assert "load_adapter" in (tmp_path / "mit" / "README.md").read_text()
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        mit.save_pretrained(tmp_path / "mit")
    with pytest.raises(CheckpointError, match="adapter without encoders and task.*load_adapter"):
        mitrain.from_pretrained(tmp_path / "mit")
    mit.detach()
    with pytest.raises(ModelError, match="not attached to a language model"):
        mit.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_has_a_fingerprint_that_its_copy_shares(name, tmp_path):
    model, features = tiny(name), torch.randn(2, 6)
    mit = mitrain.attach(model, mitrain.MiTConfig(modalities={"image": 6}, layers=[1, 3]))
    scramble(mit)
    mit.save_pretrained(tmp_path / "mit")
    again, _ = mitrain.load_adapter(copy := tiny(name), tmp_path / "mit")
    assert again.layers == [1, 3]
    logits = [m(IDS, infused={"image": features}).logits for m in (model, copy)]
    assert torch.equal(*logits) and not torch.equal(logits[0], tiny(name)(IDS).logits)
    other = next(n for n in NAMES if n != name)
    with pytest.raises(ModelError, match="does not match what the adapter was trained on: model_type"):
        mitrain.load_adapter(tiny(other), tmp_path / "mit")


def test_threads_share_a_predictor(predictor, images):
    expected = [predictor.predict(path, PROMPT) for path in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda path: predictor.predict(path, PROMPT), [*images, *images, *images]))
    assert found == expected * 3


def test_predictors_share_a_language_model_and_say_what_each_says_alone(world, predictor, exported, images):
    """Of other layers and another task; also where threads ask both at once."""
    export(make_run(world, "segment", {"name": "mit", "layers": [0, 1], "gate": "none"}), world / "another")
    alone = mitrain.from_pretrained(world / "another")
    first = mitrain.from_pretrained(exported)
    second = mitrain.from_pretrained(world / "another", beside=first)
    assert second.model.text is first.model.text and second.adapter is not first.adapter

    def asked(path):
        mask = second.predict(path, "red square").pop("mask")
        return first.predict(path, PROMPT), mask.tobytes()

    expected = [(predictor.predict(path, PROMPT), alone.predict(path, "red square")["mask"].tobytes()) for path in images]
    assert [asked(path) for path in images] == expected
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(asked, images)) == expected
    with pytest.raises(ModelError, match="cannot share the language model of .*: model.dtype is 'bf16' here and 'fp32'"):
        mitrain.from_pretrained(world / "another", beside=first, dtype="bf16")
    export(make_run(world, "segment", {"name": "lora", "rank": 2}), world / "lora")
    with pytest.raises(ModelError, match="lora cannot take turns with another adapter"):
        mitrain.from_pretrained(world / "lora", beside=first)


def test_deepspeed_is_not_needed(exported, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # importing it raises ImportError
    assert mitrain.from_pretrained(exported).predict(images[0], PROMPT)["answer"]


def test_many_prompts_are_not_published(world, monkeypatch):
    monkeypatch.setattr(mitrain.inference.export, "PROMPTS_KEPT", 0)
    assert mitrain.inference.export.training_answers(make_config(world)) is None
    monkeypatch.setattr(mitrain.inference.export, "PROMPTS_KEPT", 1)
    assert mitrain.inference.export.training_answers(make_config(world)) == {PROMPT: ["blue", "green", "red", "yellow"]}
