"""Exports pushed to a stand-in of the Hub and opened by their names: what is published, and what is not."""

import json
from pathlib import Path

import pytest
import torch
from exported import PROMPT, make_run, make_world
from folders import own_cache
from hub import TOKEN, running
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from transformers import AutoModelForCausalLM

import mitrain
from mitrain.cli import main
from mitrain.core.errors import CheckpointError, ConfigError
from mitrain.inference.export import export
from mitrain.inference.hub import without_private
from mitrain.methods import export_format
from mitrain.methods.export_format import RunPart

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx2")  # of the Hub's client, in its uploads
NAMES = {"base": "some/llm", "encoders": ["some/vision"]}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        for name, value in (
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
            ("HF_HUB_CACHE", str(tmp_path / "hub")),
            ("HF_HUB_DISABLE_PROGRESS_BARS", True),
        ):
            monkeypatch.setattr(constants, name, value)
        yield hub


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with own_cache(make_world(tmp_path_factory.mktemp("secret-place"))) as path:
        run = make_run(path)
        export(run, path / "exported")
        yield path


def places(world):
    return {"base": world / "llm", "encoders": [world / "vision"]}


def test_what_was_pushed_is_opened_by_its_name(hub, world, capsys):
    url = mitrain.push_to_hub(world / "exported", "me/colours", license="apache-2.0", **NAMES)
    assert url == f"{hub.url}/me/colours" and not hub.private
    files = hub.repositories["me/colours"]
    assert files.keys() == {"README.md", "mitrain.json", "mitrain.safetensors"}
    assert any("PUT /large/" in asked for asked in hub.asked)  # weights go as large files
    assert files["mitrain.safetensors"] == (world / "exported" / "mitrain.safetensors").read_bytes()
    picture = world / "data" / "images" / "0.png"
    expected = mitrain.from_pretrained(world / "exported").predict(picture, PROMPT, ["red", "blue"])
    assert mitrain.from_pretrained("me/colours", **places(world)).predict(picture, PROMPT, ["red", "blue"]) == expected
    there = ["--base", str(world / "llm"), "--encoder", str(world / "vision"), "--json"]
    asked = ["--image", str(picture), "--text", PROMPT, "--candidates", "red,blue"]
    assert main(["predict", "me/colours", *asked, *there]) == 0
    assert json.loads(capsys.readouterr().out)["probabilities"] == expected["probabilities"]
    assert main(["eval", "me/colours", "--split", "test", "--data", str(world / "data"), *there]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 4
    model = AutoModelForCausalLM.from_pretrained(world / "llm")
    assert mitrain.load_adapter(model, "me/colours@main")[0].layers == [1]


def test_neither_folders_nor_answers_of_private_data_are_published(hub, world, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"base_model_name_or_path of the export is '.*llm', a folder of this machine"):
        mitrain.push_to_hub(world / "exported", "me/colours")
    with pytest.raises(ConfigError, match=r"run.config.model.encoders.image.name .* one --encoder USER/NAME"):
        mitrain.push_to_hub(world / "exported", "me/colours", base="some/llm")
    assert not hub.asked
    command = ["push", str(world / "exported"), "me/colours", "--private", "--base", "some/llm"]
    assert main([*command, "--encoder", "some/vision"]) == 0
    assert "pushed to" in capsys.readouterr().out and hub.private == {"me/colours"}
    files = hub.repositories["me/colours"]
    values = json.loads(files["mitrain.json"])
    assert values["run"]["answers"] is None and values["run"]["config"]["data"]["root"] == "data"
    for content in files.values():
        assert world.name.encode() not in content and b"yellow" not in content and b"secret" not in content
    assert json.loads((world / "exported" / "mitrain.json").read_text())["run"]["answers"]
    mitrain.push_to_hub(world / "exported", "me/open", answers=True, **NAMES)
    answers = json.loads(hub.repositories["me/open"]["mitrain.json"])["run"]["answers"]
    assert answers == {PROMPT: ["blue", "green", "red", "yellow"]}


def test_the_card_has_what_the_hub_reads(hub, world):
    mitrain.push_to_hub(world / "exported", "me/colours", license="mit", **NAMES)
    card = ModelCard(hub.repositories["me/colours"]["README.md"].decode())
    data = card.data
    assert (data.base_model, data.license, data.library_name) == ("some/llm", "mit", "mitrain")
    assert data.metrics == ["accuracy"] and {"mitrain", "mit"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("accuracy", 0.4, "val")
    assert result.task_type == "answer" and "answers are in" not in card.text
    assert "POST /api/validate-yaml" in hub.asked  # the Hub itself says before the upload whether it takes the card


def test_a_card_that_was_edited_stays(hub, world, tmp_path):
    readme = world / "exported" / "README.md"
    before = readme.read_text()
    readme.write_text(before + "\nMy own words: naïve ✓\n")
    try:
        mitrain.push_to_hub(world / "exported", "me/colours", license="mit", **NAMES)
    finally:
        readme.write_text(before)
    text = hub.repositories["me/colours"]["README.md"].decode()
    assert "My own words: naïve ✓" in text and "license: mit" in text and "base_model: some/llm" in text


def classes_of(folder, source=None):
    """The export with class names, as of a classification, and another source of its data."""
    values = json.loads((folder / "mitrain.json").read_text())
    values["run"]["config"]["data"] |= {"classes": ["patient A", "patient B"], "source": source}
    return export_format.read(folder).contents.model_copy(update={"run": RunPart(**values["run"])})


def test_class_names_of_ones_own_data_are_asked_for(world):
    folder = world / "exported"
    for source in (None, "hf:user/private", f"hf:{world}"):
        with pytest.raises(ConfigError, match=r"names of 2 classes of data of your own \(patient A, patient B\).*--answers"):
            without_private(classes_of(folder, source), "some/llm", ["some/vision"], answers=False)
        assert without_private(classes_of(folder, source), "some/llm", ["some/vision"], answers=True)["run"]["answers"]
    kept = without_private(classes_of(folder, "tuxpaint"), "some/llm", ["some/vision"], answers=False)["run"]
    assert kept["config"]["data"]["classes"] == ["patient A", "patient B"] and kept["answers"]


def test_a_folder_read_as_a_data_set_is_no_source_that_others_see(world):
    contents = classes_of(world / "exported", f"hf:{world / 'data'}")
    published = without_private(contents, "some/llm", ["some/vision"], answers=True)
    assert published["run"]["config"]["data"]["source"] == "hf:data"
    assert str(world) not in export_format.model_card(contents) and "own data" in export_format.model_card(contents)


def test_a_data_set_of_the_hub_is_in_the_metadata(world):
    card = ModelCard(export_format.model_card(classes_of(world / "exported", "hf:user/pictures:small")))
    assert card.data.datasets == ["user/pictures"] and card.data.eval_results[0].dataset_name == "user/pictures"
    assert ModelCard(export_format.model_card(classes_of(world / "exported", "tuxpaint"))).data.datasets is None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@torch.no_grad()
def test_pefts_own_files_stay_pefts(hub, world, tmp_path):
    export(make_run(make_world(tmp_path / "w"), adapter={"name": "lora", "rank": 2}), tmp_path / "lora")
    mitrain.push_to_hub(tmp_path / "lora", "me/lora", **NAMES)
    files = hub.repositories["me/lora"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "some/llm"
    (tmp_path / "got").mkdir()
    for name, content in files.items():
        (tmp_path / "got" / name).write_bytes(content)
    ids = torch.tensor([[3, 4, 5]])
    logits = []
    for folder in ("lora", "got"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "w" / "llm")
        logits.append(PeftModel.from_pretrained(model, tmp_path / folder)(ids).logits)
    assert torch.equal(*logits)


def test_what_the_hub_does_not_give_or_take_is_one_line(hub, world, tmp_path, monkeypatch, capsys):
    with pytest.raises(CheckpointError, match=r"'me/none' is no folder here, and the Hub does not give .*hf auth login"):
        mitrain.from_pretrained("me/none")
    assert main(["predict", "me/none", "--image", "a.png", "--text", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(CheckpointError, match="the Hub does not take .*license 'my own' is not known"):
        mitrain.push_to_hub(world / "exported", "me/colours", license="my own", **NAMES)
    with pytest.raises(ConfigError, match="'colours' is no name of a repository: give USER/NAME"):
        mitrain.push_to_hub(world / "exported", "colours", **NAMES)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CheckpointError, match=r"the Hub does not take 'me/colours' .*log in with a token"):
        mitrain.push_to_hub(world / "exported", "me/colours", **NAMES)
    asked = len(hub.asked)
    Path("runs").mkdir()
    with pytest.raises(CheckpointError, match="'runs/typo' is no exported adapter"):
        mitrain.load_adapter(AutoModelForCausalLM.from_pretrained(world / "llm"), "runs/typo")
    assert len(hub.asked) == asked
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="the Hub cannot be reached"):
        mitrain.from_pretrained("me/colours")


def test_without_a_connection_what_was_brought_before_is_opened_and_nothing_is_waited_for(hub, world, monkeypatch):
    mitrain.push_to_hub(world / "exported", "me/colours", license="mit", **NAMES)
    brought = export_format.local("me/colours")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    assert export_format.local("me/colours") == brought
    with pytest.raises(CheckpointError, match="'me/others' is no folder here, the Hub cannot be reached, and its cache"):
        export_format.local("me/others")
    assert not waits
