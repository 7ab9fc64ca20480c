"""Pictures, speech and arrays of one's own in one run, from end to end through the command line; some samples lack some."""

import csv
import json

import numpy as np
import pytest
import yaml
from clips import sound_file, tone
from commands import as_json
from folders import colour_folder, own_cache, whisper_folder

from mitrain.cli import main
from mitrain.inference.export import from_pretrained

HERTZ = {"red": 300, "green": 700, "blue": 1500, "yellow": 3000}
TEXTS = ("this thing is", "one sees something that is", "it is")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a CSV a split, whose columns are a picture, a clip with its colour's tone, an array, and a label."""
    path = colour_folder(tmp_path_factory.mktemp("modalities"), train=24, val=8, width=48)
    whisper_folder(path / "whisper")
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (path / "data" / f"{split}.jsonl").read_text().splitlines()]
        with open(path / "data" / f"{split}.csv", "w", newline="") as file:
            table = csv.DictWriter(file, ["image", "speech", "mine", "text", "label", "number"])
            table.writeheader()
            for number, row in enumerate(rows):
                name, colour = f"{split}{number}", row["answer"]
                sound_file(path / "data" / f"{name}.wav", tone(0.3 + 0.1 * (number % 3), hertz=HERTZ[colour]))
                np.save(path / "data" / f"{name}.npy", rng.standard_normal((2 + number % 3, 5)).astype(np.float32))
                speech = "" if number % 2 else f"{name}.wav"
                table.writerow(
                    {"image": row["image"], "speech": speech, "mine": f"{name}.npy", "text": TEXTS[number % 3],
                     "label": colour, "number": list(HERTZ).index(colour)}
                )  # fmt: skip
    with own_cache(path):
        yield path


def written(world, name, **changes):
    encoders = {
        "image": {"name": str(world / "vision"), "layer": 2, "pool": "cls+mean"},
        "speech": str(world / "whisper"),
        "mine": {"takes": "features", "width": 5},
    }
    data = {"name": "labelled", "root": str(world / "data"), "may_lack": ["speech"]}
    data["splits"] = {split: f"{split}.csv" for split in ("train", "val", "test")}
    config = {
        "name": name,
        "model": {"llm": str(world / "llm"), "encoders": encoders},
        "adapter": {"name": "mit", "layers": [1, 2]},
        "task": {"name": "classify", "readout": ["last", "image", "speech"]},
        "data": data,
        "train": {"steps": 12, "batch": 8, "lr": 1e-2, "eval_every": 6, "save_every": 6, "modality_dropout": 0.2},
    }
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value}
    (world / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return world / f"{name}.yaml"


@pytest.fixture(scope="module")
def run(world):
    assert main(["train", str(written(world, "all")), "--runs", str(world / "runs")]) == 0
    return next((world / "runs").glob("all-*"))


def test_a_run_of_three_modalities_is_trained_scored_asked_and_published(world, run, capsys):
    plain = as_json(capsys, "eval", run, "--split", "test", "--missing", "speech")
    assert plain["samples"] == 8 and set(plain["accuracy_without_speech"]) == {"0%", "25%", "50%", "75%", "100%"}
    assert plain["accuracy_without_speech"]["0%"] == plain["accuracy"]
    gone = as_json(capsys, "eval", run, "--split", "test", "--without", "speech")
    assert gone["accuracy"] == plain["accuracy_without_speech"]["100%"] and gone["without"] == {"speech": 1.0}
    assert as_json(capsys, "eval", run, "--split", "test", "--shuffle", "image")["shuffled"] == ["image"]
    files = {name: str(world / "data" / f"test0.{end}") for name, end in (("speech", "wav"), ("mine", "npy"))}
    files["image"] = str(world / "data" / json.loads((world / "data" / "test.jsonl").read_text().splitlines()[0])["image"])
    given = [part for name, file in files.items() for part in ("--input", f"{name}={file}")]
    said = as_json(capsys, "predict", run, *given, "--text", "this thing is")
    assert said["speech"] == files["speech"] and len(said["labels"]) == 1
    mute = as_json(capsys, "predict", run, *given[2:], "--text", "this thing is")
    assert "speech" not in mute and mute["probabilities"] != said["probabilities"]
    out = world / "published"
    assert main(["export", str(run), "--out", str(out)]) == 0
    capsys.readouterr()
    again = from_pretrained(out).predict(files, "this thing is")
    assert again["probabilities"] == pytest.approx(said["probabilities"], abs=1e-5)


def test_what_a_run_reads_is_said_where_a_file_is_missing_or_of_no_use(world, run, capsys):
    for arguments, words in (
        (["--image", str(world), "--text", "a"], "give --input mine=FILE"),
        (["--input", f"smell={world}"], "is none of this run's inputs: it reads image, speech, mine"),
        (["--input", "speech"], "write NAME=FILE"),
    ):
        assert main(["predict", str(run), *arguments]) == 2
        assert words in capsys.readouterr().err
    assert main(["eval", str(run), "--without", "smell"]) == 2
    assert "'smell' is none of this run's inputs: it reads image, speech, mine" in capsys.readouterr().err


def test_an_empty_cell_is_refused_unless_samples_may_go_without(world, capsys):
    strict = written(world, "strict", data={"may_lack": []})
    assert main(["train", str(strict), "--runs", str(world / "runs")]) == 2
    assert "train.csv:3: no 'speech': fill it in" in capsys.readouterr().err


def test_data_inspect_counts_each_kind_of_file(world, capsys):
    found = as_json(capsys, "data", "inspect", world / "all.yaml", "--out", world / "sheets")["splits"]["train"]
    assert (found["pictures"], found["speech_files"], found["samples_without_speech"]) == (24, 12, 12)
    assert found["broken_mine_files"] == 0


def test_numbers_are_learned_from_speech_alone_without_a_text(world, capsys):
    encoders = {"speech": {"name": str(world / "whisper")}}
    data = {"name": "rated", "columns": {"target": "number", "text": "nothing"}, "may_lack": []}
    with open(world / "data" / "train.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["speech"]]
    for split in ("train", "val"):
        with open(world / "data" / f"heard-{split}.csv", "w", newline="") as file:
            table = csv.DictWriter(file, ["speech", "number", "nothing"], extrasaction="ignore")
            table.writeheader()
            table.writerows({**row, "nothing": ""} for row in rows)
    data["splits"] = {split: f"heard-{split}.csv" for split in ("train", "val")}
    task = {"name": "regress", "readout": ["last", "speech"]}
    config = written(world, "heard", model={"encoders": encoders}, data=data, task=task)
    run = as_json(capsys, "train", config, "--runs", world / "runs", "train.steps=40", "train.modality_dropout=0")["run"]
    heard = as_json(capsys, "eval", run)
    other = as_json(capsys, "eval", run, "--shuffle", "speech")
    assert heard["mae"] < 0.5 < other["mae"]


def test_mit_without_any_input_scores_as_the_frozen_model(world, capsys):
    """Gates of 0 and factors of 1, through a whole run: the same scores as with the infusion left out."""
    config = written(world, "bare", task={"readout": ["last"]}, train={"steps": 6, "modality_dropout": 0})
    assert main(["train", str(config), "--runs", str(world / "runs")]) == 0
    folder = next((world / "runs").glob("bare-*"))
    capsys.readouterr()
    frozen = as_json(capsys, "eval", folder, "--split", "test", "--control", "frozen")
    gone = as_json(capsys, "eval", folder, "--split", "test", *"--without image --without speech --without mine".split())
    plain = as_json(capsys, "eval", folder, "--split", "test")
    measured = [{name: value for name, value in said.items() if isinstance(value, float)} for said in (gone, frozen, plain)]
    assert measured[0] == measured[1] != measured[2], measured


def test_a_control_of_an_unknown_input_is_refused_before_anything_is_read(world, run, capsys, monkeypatch):
    monkeypatch.setattr("mitrain.inference.scoring.split_of", lambda *_: pytest.fail("the split was read"))
    for control in ("--without", "--shuffle", "--missing"):
        assert main(["eval", str(run), control, "smell"]) == 2
        assert "'smell' is none of this run's inputs" in capsys.readouterr().err


def test_names_that_mean_something_else_cannot_name_an_input(world, capsys):
    speech = {"takes": "audio", "name": str(world / "whisper")}
    wrong = {
        "label": written(world, "wrong1", model={"encoders": {"label": speech}}),
        "answer": written(world, "wrong2", model={"encoders": {"speech": speech | {"input": "answer"}}}),
        "caption": written(world, "wrong3", data={"inputs": ["image", "speech", "mine", "caption"]}),
    }
    for name, config in wrong.items():
        assert main(["train", str(config), "--dry-run"]) == 2
        assert f"{name!r} cannot name a modality or an input" in capsys.readouterr().err


def test_whole_weights_on_each_rank_and_samples_that_lack_an_input_are_refused(world, capsys):
    for changes in ({}, {"data": {"may_lack": []}}):
        config = written(world, "sharded", zero={"stage": 3}, **changes)
        assert main(["train", str(config), "--dry-run"]) == 2
        assert "set zero.stage to at most 2" in capsys.readouterr().err


def test_a_method_that_changes_an_encoder_refuses_one_that_it_cannot_change(world, capsys):
    speech, mine = {"name": str(world / "whisper")}, {"takes": "features", "width": 5}
    for method, name, encoder, words in (
        (
            "visual-prefix",
            "speech",
            speech,
            "squares of a picture, which WhisperEncoder does not read: put an image encoder",
        ),
        (
            "pmf",
            "mine",
            mine,
            "changes an encoder's transformer layers, and 'features' has none: put another encoder first",
        ),
    ):
        changes = {"model": {"encoders": {name: encoder}}, "task": {"readout": ["last"]}, "data": {"may_lack": []}}
        config = written(world, method, **changes)
        config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "adapter": {"name": method}}))
        assert main(["train", str(config), "--dry-run"]) == 2
        assert words in capsys.readouterr().err


def test_a_method_that_changes_an_encoder_does_so_for_speech(world, capsys):
    """Texts and clips of unequal length, of which half the samples have none, through PMF and Whisper's encoder."""
    path = written(
        world, "asked", task={"readout": ["last", "speech"]}, model={"encoders": {"speech": str(world / "whisper")}}
    )
    config = yaml.safe_load(path.read_text())
    config |= {"adapter": {"name": "pmf", "fusion_layers": 1}}
    config["data"]["inputs"] = ["speech"]
    path.write_text(yaml.safe_dump(config))
    assert as_json(capsys, "train", path, "--dry-run")["infusion_parameters"] > 0
    run = as_json(capsys, "train", path, "--runs", world / "runs")["run"]
    plain = as_json(capsys, "eval", run, "--split", "test", "--missing", "speech")
    assert plain["samples"] == 8 and set(plain["accuracy_without_speech"]) == {"0%", "25%", "50%", "75%", "100%"}
    file = world / "data" / "test0.wav"
    said = as_json(capsys, "predict", run, "--input", f"speech={file}", "--text", "this thing is")
    other = as_json(capsys, "predict", run, "--input", f"speech={world / 'data' / 'test2.wav'}", "--text", "this thing is")
    assert said["probabilities"] != other["probabilities"]
    out = as_json(capsys, "export", run, "--out", world / "published-pmf")["folder"]
    again = as_json(capsys, "predict", out, "--input", f"speech={file}", "--text", "this thing is")
    assert again["probabilities"] == pytest.approx(said["probabilities"], abs=1e-5)


@pytest.mark.parametrize("adapter", [{"name": "none"}, {"name": "lora", "where": "encoder", "rank": 2}])
def test_pictures_and_speech_find_one_another_without_a_text(world, capsys, adapter):
    method = adapter["name"]
    for split in ("train", "val", "test"):
        rows = list(csv.DictReader((world / "data" / f"{split}.csv").read_text().splitlines()))
        pairs = [f"{row['image']},{row['speech']}" for row in rows if row["speech"]]
        (world / "data" / f"pairs-{split}.csv").write_text("\n".join(["image,speech", *pairs, ""]))
    data = {"name": "captions", "texts": False, "may_lack": []}
    data["splits"] = {split: f"pairs-{split}.csv" for split in ("train", "val", "test")}
    task = {"name": "retrieve", "partner": "speech", "matching": 0, "dim": 8}
    path = written(world, f"pairs-{method}", data=data, train={"modality_dropout": 0, "batch": 4})
    config = yaml.safe_load(path.read_text()) | {"adapter": adapter, "task": task}
    del config["model"]["encoders"]["mine"]
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    run = as_json(capsys, "train", path, "--runs", world / "runs")["run"]
    plain = as_json(capsys, "eval", run, "--split", "test", "--baselines")
    assert {"image_to_speech_r1", "speech_to_image_median_rank"} <= plain.keys() and plain["samples"] == plain["images"] == 4
    assert plain["baselines"]["random order"]["image_to_speech_r1"] == 0.25
    assert "image_to_speech_r1" in plain["baselines"]["ridge regression to the speech features"]
    other = as_json(capsys, "eval", run, "--split", "test", "--control", "shuffle")
    ranks = [said["image_to_speech_mean_rank"] + said["speech_to_image_mean_rank"] for said in (plain, other)]
    assert ranks[0] != ranks[1]  # a picture beside its own speech, and beside another's
    rows = list(csv.DictReader((world / "data" / "pairs-test.csv").read_text().splitlines()))
    files = [str(world / "data" / row["speech"]) for row in rows]
    given = ("--input", f"image={world / 'data' / rows[0]['image']}", "--input", f"speech={files[0]}")
    said = as_json(capsys, "predict", run, *given, "--candidates", ",".join(files[1:]))
    assert len(said["scores"]) == 4 and 1 <= said["rank"] <= 4
    refused = written(world, "no-texts", data=data, train={"modality_dropout": 0})
    refused.write_text(yaml.safe_dump({**config, "task": {**task, "partner": "text"}}))
    assert main(["train", str(refused), "--runs", str(world / "runs")]) == 2
    assert "data.texts=false: there is no text to find: set task.partner" in capsys.readouterr().err


def test_a_text_alone_is_read_without_an_encoder(world, capsys):
    """As sentences with ratings: trained, scored beside baselines, reported, asked."""
    rated = {"name": "rated", "root": str(world / "data"), "inputs": [], "columns": {"target": "number"}}
    rated["splits"] = {split: f"{split}.csv" for split in ("train", "val", "test")}
    config = yaml.safe_load(written(world, "words").read_text())
    config |= {
        "data": rated,
        "task": {"name": "regress"},
        "adapter": {"name": "lora", "rank": 2},
        "model": {"llm": str(world / "llm"), "encoders": {}},
    }
    (world / "words.yaml").write_text(yaml.safe_dump({**config, "train": {"steps": 2, "batch": 8}}))
    assert main(["train", str(world / "words.yaml"), "--runs", str(world / "runs")]) == 0
    run = next((world / "runs").glob("words-*"))
    capsys.readouterr()
    found = as_json(capsys, "eval", run, "--split", "test", "--baselines")
    assert found["samples"] == 8 and set(found["baselines"]) == {
        "training mean", "training median", "ridge regression on the frozen text states"
    }  # fmt: skip
    assert main(["report", str(run), "--splits", "test", "--out", str(world / "words")]) == 0
    capsys.readouterr()
    said = as_json(capsys, "predict", run, "--text", "it is")
    assert said["text"] == "it is" and np.isfinite(said["predicted"])
