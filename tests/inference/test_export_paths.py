"""What is published names nobody's folders but those of the models, and their home as ~; it opens where it was made."""

import json
import shutil
from pathlib import Path

import pytest
from commands import as_json
from exported import PROMPT
from folders import colour_world

import mitrain
from mitrain.cli import main
from mitrain.core.errors import DataError
from mitrain.inference.export import export
from mitrain.inference.scoring import score_run
from mitrain.methods.export_format import data_seen, settings_from, without_home


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    home = tmp_path_factory.mktemp("alice")
    with pytest.MonkeyPatch.context() as patch, colour_world(home, train=8, val=4, layers=2):
        patch.setenv("HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def exported(world, run):
    export(run, world / "out" / "adapter")
    return world / "out" / "adapter"


def test_no_file_of_it_names_the_home_or_the_data(world, exported):
    values = json.loads((exported / "mitrain.json").read_text())
    assert values["base_model_name_or_path"] == "~/llm" and values["run"]["config"]["data"]["root"] == "../../data"
    assert values["run"]["config"]["model"]["encoders"]["image"]["name"] == "~/vision"
    assert not any(str(world).encode() in path.read_bytes() for path in exported.iterdir())


def test_it_opens_where_it_was_made_and_says_what_it_names(world, run, exported, tmp_path, capsys, caplog):
    image = next((world / "data" / "images").glob("*.png"))
    expected = mitrain.from_pretrained(exported).predict(image, PROMPT)
    moved = shutil.copytree(exported, tmp_path / "moved")
    assert as_json(capsys, "predict", moved, "--image", image, "--text", PROMPT) == expected
    assert main(["export", str(run), "--out", str(tmp_path / "again")]) == 0
    assert "folders of this machine (~/llm, ~/vision): others give --base and --encoder" in caplog.text


@pytest.mark.parametrize("what", ["run", "exported"])
def test_its_frozen_models_may_lie_elsewhere(world, what, tmp_path, capsys, request):
    folder, image = request.getfixturevalue(what), next((world / "data" / "images").glob("*.png"))
    asks = [["predict", str(folder), "--image", str(image), "--text", PROMPT], ["eval", str(folder), "--split", "test"]]

    def answers(*options):
        assert [main([*ask, "--json", *options]) for ask in asks] == [0, 0], capsys.readouterr().err
        return capsys.readouterr().out

    expected = answers()
    away = {name: str((world / name).rename(tmp_path / name)) for name in ("llm", "vision")}
    try:
        for ask in asks:
            assert main(ask) == 2
            said = capsys.readouterr().err
            assert f"the folder '{world / 'llm'}' of a frozen model is not there: say where it is with --base" in said
            assert main([*ask, "--base", away["llm"]]) == 2
            assert (
                f"'{world / 'vision'}' of a frozen model is not there: say where it is with --encoder"
                in capsys.readouterr().err
            )
            assert main([*ask, "--base", away["llm"], "--encoder", "a", "--encoder", "b"]) == 2
            assert "2 encoders were given, the adapter has 1: give one for each, in order" in capsys.readouterr().err
        places = ["--base", away["llm"], "--encoder", away["vision"]]
        assert answers(*places) == expected
        weights = Path(away["llm"]) / "model.safetensors"
        before = weights.read_bytes()
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert main([*asks[0], *places]) == 2
        assert f"not those that '{folder}' was trained on (text.weights differs)" in capsys.readouterr().err
        weights.write_bytes(before)
    finally:
        for name, place in away.items():
            Path(place).rename(world / name)


def test_its_data_is_found_beside_it_or_given(world, run, exported, tmp_path):
    expected = score_run(run, split="test", control="none")
    assert score_run(exported, split="test", control="none") == {**expected, "run": str(exported)}
    moved = shutil.copytree(exported, tmp_path / "far" / "away" / "adapter")
    with pytest.raises(DataError, match="give the data's folder with --data"):
        score_run(moved, split="test", control="none")
    found = score_run(moved, split="test", control="none", root=str(world / "data"))
    assert found == {**expected, "run": str(moved)}
    assert main(["eval", str(moved), "--data", str(world / "data")]) == 0


def test_which_paths_are_kept(monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    assert [without_home(name) for name in ("/home/alice/m", "/home/alicent/m", "owner/m", "minilm")] == [
        "~/m", "/home/alicent/m", "owner/m", "minilm",
    ]  # fmt: skip
    data = {"root": "/data/bob/pets", "splits": {"train": "/data/bob/lists/a.csv", "val": "v.csv"}, "images": None}
    model = {"llm": "/home/alice/m", "encoders": {"image": {"name": "/models/v"}}, "device": "cuda"}
    train = {"steps": 3, "init_from": "/home/alice/runs/first"}
    values = {
        "model": model,
        "data": data,
        "train": train,
        "wandb": {"project": "x"},
        "zero": {"config": "/etc/z.json"},
        "seed": 1,
    }
    found = settings_from(values, "/data/out")
    assert found == {
        "model": {"llm": "~/m", "encoders": {"image": {"name": "/models/v"}}, "device": "auto"},
        "data": {"root": "../bob/pets", "splits": {"train": "../lists/a.csv", "val": "v.csv"}, "images": None},
        "train": {"steps": 3, "init_from": "first"},
        "seed": 1,
    }
    assert settings_from(values, "/home/alice/out")["data"]["root"] == "pets"
    monkeypatch.setenv("HOME", "/")
    assert without_home("/models/m") == "/models/m"


def test_the_roots_of_earlier_exports_stay(tmp_path):
    (tmp_path / "data").mkdir()
    assert data_seen(str(tmp_path / "data"), tmp_path / "x") == str(tmp_path / "data")
    assert data_seen("mine", tmp_path) == "mine" and data_seen(None, tmp_path) is None
