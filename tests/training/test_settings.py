"""What `mitrain config` shows: every setting with its meaning, and a JSON schema that takes what the product takes."""

import jsonschema
import pytest
from commands import as_json
from source_tree import ROOT

from mitrain.cli import main
from mitrain.core import config, parsing
from mitrain.core.errors import ConfigError
from mitrain.training import schema, settings

CONFIGS = [path for path in sorted(config.SHIPPED.rglob("*.yaml")) if path.parent.name != "studies"]


@pytest.fixture(scope="module")
def validator():
    found = settings.json_schema()
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_fits_the_schema_that_it_names(path, validator):
    assert not list(validator.iter_errors(config.read_file(path)))
    first = path.read_text().splitlines()[0]
    assert (path.parent / first.removeprefix("# yaml-language-server: $schema=")).resolve() == ROOT / "configs/schema.json"


@pytest.mark.parametrize(
    "change",
    ["train.stepz=3", "train.steps=0", "adapter.name=mot", "adapter.experts=4", "task.name=segmnt", "train.lr=text",
     "model.encoders.image.sizes=3", "model.dtype=fp8", "data.splits=a", "model.encoders=[a]", "seed=-1"],
)  # fmt: skip
def test_what_the_product_refuses_the_schema_refuses(change, validator):
    values = config.override(config.read_file("quickstart"), [change])
    with pytest.raises(ConfigError):
        schema.config.parse(schema.RunConfig, values)
    assert list(validator.iter_errors(values))


def test_the_committed_schema_and_page_are_those_of_the_code():
    found = (ROOT / "configs/schema.json").read_text()
    assert found == settings.schema_text(settings.json_schema()), "mitrain config --schema > configs/schema.json"
    page = (ROOT / "docs/guide/config.md").read_text()
    tables = settings.as_markdown(list(settings.settings()))
    assert page.endswith(f"{tables}\n"), (
        "put what mitrain config --keys --markdown prints at the end of docs/guide/config.md"
    )


def test_every_setting_has_a_meaning_a_type_and_its_default():
    found = {(setting.key, setting.where): setting for setting in settings.settings()}
    assert not [key for key, setting in found.items() if not setting.meaning or not setting.type]
    clip = found["train.optimizer.clip", ""]
    assert (clip.type, clip.default, clip.required) == ("number or null > 0", 1.0, False)
    assert "gradients' norm" in clip.meaning and found["model.llm", ""].required
    assert found["adapter.rank", "adapter.name=aurora"].meaning != found["adapter.rank", "adapter.name=lora"].meaning


def test_keys_are_found_by_their_beginning_or_by_a_kind(capsys):
    assert main(["config", "--keys", "adapter.rank"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == ["adapter.rank"] * 4
    assert {one["where"] for one in as_json(capsys, "config", "--keys", "mmsa")} == {"data.name=mmsa"}
    assert main(["config", "--keys", "adaptr"]) == 2
    assert "no setting begins with 'adaptr' (did you mean 'adapter'?)" in capsys.readouterr().err


def test_a_configuration_is_shown_with_every_default_and_is_one_itself(capsys, tmp_path):
    assert main(["config", "quickstart", "train.steps=7"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(text)
    again = schema.load(tmp_path / "again.yaml")
    assert again.train.steps == 7 and again == schema.load("quickstart", ["train.steps=7"])
    assert parsing.parse_yaml(text)["train"]["max_skipped"] == schema.TrainConfig().max_skipped


def test_shipped_configurations_go_by_their_names_and_a_file_comes_first(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = as_json(capsys, "config")
    assert named["quickstart"].startswith("A frozen language model") and "studies/fusion" in named
    assert main(["train", "quickstrat", "--dry-run"]) == 2
    assert "no configuration file 'quickstrat' (did you mean 'quickstart'?)" in capsys.readouterr().err
    (tmp_path / "quickstart").write_text((ROOT / "configs/quickstart.yaml").read_text().replace("quickstart", "mine"))
    assert schema.load("quickstart").name == "mine"


@pytest.mark.parametrize("words", [["quickstart", "--keys"], ["--schema", "--keys"]])
def test_one_thing_is_shown_at_a_time(capsys, words):
    assert main(["config", *words]) == 2
    assert "give one of CONFIG, --keys and --schema" in capsys.readouterr().err
