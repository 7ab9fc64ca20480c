"""`mitrain init`: what a user's table is, and a configuration that trains on it as it is."""

import csv
import json

import numpy as np
import pytest
from clips import sound_file, tone
from commands import as_json
from folders import llm_folder, vision_folder
from PIL import Image

from mitrain.cli import main
from mitrain.training import schema


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    return llm_folder(path / "llm", width=48), vision_folder(path / "vision")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path


def pictures(folder, count=40, places=""):
    """Noise in two colours."""
    rng = np.random.default_rng(0)
    (folder / places).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        values = rng.integers(0, 90, (8, 8, 3))
        values[..., number % 2] += 120
        Image.fromarray(np.kron(values, np.ones((4, 4, 1))).astype(np.uint8)).save(folder / places / f"{number}.png")
    return [f"{number}.png" for number in range(count)]


def table(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def made(capsys, *words):
    return as_json(capsys, "init", *words)


def refused(capsys, *words):
    capsys.readouterr()
    assert main(["init", *words]) == 2
    return capsys.readouterr().err


def test_one_table_of_labelled_pictures_becomes_a_run_that_trains(here, models, capsys):
    names = pictures(here, places="photos")
    table(here / "birds.csv", ("file", "title", "species"), [(n, "seen", "ab"[i % 2]) for i, n in enumerate(names)])
    llm, vision = map(str, models)
    found = made(capsys, "--data", "birds.csv", "--llm", llm, "--encoder", f"image={vision}")
    assert found["task"] == "classify" and found["inputs"] == {"file": "image"}
    assert found["columns"] == {"image": "file", "label": "species", "text": "title"}
    assert found["samples"] == {"train": 32, "val": 4, "test": 4}
    text = (here / "birds.yaml").read_text()
    assert "# of the training file, drawn for val" in text and "root: photos" in text
    assert "rank: 64" in text  # what maps are trained with: without a limit they are many times as large
    assert main(["train", "birds.yaml", "train.epochs=8", "adapter.layers=[1]", "train.lr=1e-2"]) == 0
    (run,) = (here / "runs").iterdir()
    assert as_json(capsys, "eval", run, "--split", "test")["accuracy"] == 1  # two colours


def test_the_files_beside_a_training_table_are_its_splits(here, capsys):
    names = pictures(here)
    rows = [(n, f"{i / 7:.2f}") for i, n in enumerate(names)]
    for split, part in (("train", rows[:30]), ("val", rows[30:35]), ("test", rows[35:])):
        table(here / f"{split}.csv", ("picture", "stars"), part)
    found = made(capsys, "--data", "train.csv", "--out", "stars.yaml")
    assert found["task"] == "regress" and found["samples"] == {"train": 30, "val": 5, "test": 5}
    assert found["columns"] == {"image": "picture", "target": "stars"}
    assert schema.load("stars.yaml").data.shares == {}


def test_questions_with_answers_in_json_lines(here, capsys):
    lines = [{"img": n, "question": "what is it?", "answer": "ab"[i % 2]} for i, n in enumerate(pictures(here))]
    (here / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = made(capsys, "--data", "all.jsonl")
    assert found["task"] == "answer"
    assert found["columns"] == {"image": "img", "prompt": "question", "answer": "answer"}
    (here / "all.yaml").unlink()
    capsys.readouterr()
    assert main(["init", "--data", "all.jsonl"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "inputs: image from column 'img'" in said
    assert "beside them: prompt from column 'question', answer from column 'answer'" in said


def test_sound_pictures_and_arrays_in_one_table_some_of_them_missing(here, capsys):
    names = pictures(here)
    for number in range(40):
        sound_file(here / f"{number}.wav", tone(0.1 + number / 100))
        np.save(here / f"{number}.npy", np.full((3, 7), number, np.float32))
    rows = [(n, f"{i}.wav" if i % 3 else "", f"{i}.npy", "ab"[i % 2], f"who{i // 4}") for i, n in enumerate(names)]
    table(here / "all.csv", ("photo", "voice", "numbers", "emotion", "speaker"), rows)
    made(capsys, "--data", "all.csv")
    config = schema.load("all.yaml")
    assert {name: part.takes for name, part in config.model.encoders.items()} == {
        "image": "image", "audio": "audio", "numbers": "features",
    }  # fmt: skip
    assert config.model.encoders["numbers"].width == 7 and config.data.may_lack == ("audio",)
    assert config.data.columns == {"image": "photo", "audio": "voice", "label": "emotion", "object": "speaker"}
    assert config.task.readout == ("last", "image", "audio", "numbers")
    who = [{s.object for s in config.data.read(here, split)} for split in ("train", "val", "test")]
    assert not who[0] & who[1] and not who[0] & who[2] and not who[1] & who[2]


def test_captions_are_what_is_left_and_another_task_may_be_said(here, capsys):
    rows = [(n, f"a thing of number {i}", i) for i, n in enumerate(pictures(here))]
    table(here / "all.csv", ("image", "words", "when"), rows)
    found = made(capsys, "--data", "all.csv", "--column", "text=words")
    assert found["task"] == "caption" and found["unused"] == ["when"]
    assert made(capsys, "retrieve", "--data", "all.csv", "--out", "b.yaml", "--column", "text=words")["columns"] == {
        "text": "words"
    }


def test_what_cannot_be_told_is_asked_for_in_a_line_and_nothing_is_written(here, capsys):
    names = pictures(here)
    table(here / "a.csv", ("image", "x"), [(n, "same") for n in names])
    assert "no column of a.csv is known to be the label of 'classify': say which with --column" in refused(
        capsys, "classify", "--data", "a.csv"
    )
    assert "has no column 'y' for label, only image, x" in refused(capsys, "--data", "a.csv", "--column", "label=y")
    assert "--column label: write NAME=VALUE" in refused(capsys, "--data", "a.csv", "--column", "label")
    assert "the table's inputs are image" in refused(capsys, "caption", "--data", "a.csv", "--encoder", "speech=x")
    table(here / "b.csv", ("name", "x"), [(str(i), "ab"[i % 2]) for i in range(9)])
    assert "no column of b.csv names files of a known kind (name, x)" in refused(capsys, "--data", "b.csv")
    table(here / "c.csv", ("image", "x"), [(f"far/{n}", "ab"[i % 2]) for i, n in enumerate(names)])
    assert "are neither below '.' nor in a folder in it: say where they are with --files DIR" in refused(
        capsys, "--data", "c.csv"
    )
    assert "nowhere.csv" in refused(capsys, "--data", "nowhere.csv")
    assert not list(here.glob("*.yaml"))


def test_a_configuration_that_is_there_is_kept(here, capsys):
    table(here / "a.csv", ("image", "label"), [(n, "ab"[i % 2]) for i, n in enumerate(pictures(here))])
    (here / "a.yaml").write_text("mine")
    assert "'a.yaml' is there: remove it, or choose another name with --out" in refused(capsys, "--data", "a.csv")
    assert (here / "a.yaml").read_text() == "mine"


def test_links_and_files_elsewhere_are_found_by_their_whole_path(here, capsys):
    names = pictures(here / "store" / "deep")
    (here / "photos").symlink_to(here / "store" / "deep")
    table(here / "a.csv", ("image", "label"), [(n, "ab"[i % 2]) for i, n in enumerate(names)])
    made(capsys, "--data", "a.csv")
    assert schema.load("a.yaml").data.splits == {"train": str(here / "a.csv")}


@pytest.mark.parametrize("parts", [("",), ("train", "val")])
def test_a_folder_for_each_class_is_a_classification(here, capsys, parts):
    for part in parts:
        for label in "ab":
            pictures(here, 20, f"birds/{part}/{label}")
    found = made(capsys, "--data", "birds", "--encoder", "image=dinov2-vits14")
    assert (found["task"], found["config"]) == ("classify", "birds.yaml")
    data = schema.load("birds.yaml").data
    assert data.section_name == "folders" and data.shares == ({} if parts[0] else {"val": 0.1, "test": 0.1})
    assert "leave out the task, --column, --files" in refused(capsys, "regress", "--data", "birds", "--out", "c.yaml")


def test_conversations_are_questions_whatever_their_files_are(here, models, capsys):
    pictures(here, 30, "photos")
    said = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a thing"}]
    rows = [{"id": str(i), "image": f"{i}.png", "conversations": said} for i in range(30)]
    (here / "llava.json").write_text(json.dumps(rows))
    found = made(capsys, "--data", "llava.json")
    assert (found["task"], found["inputs"], found["columns"]) == ("answer", {"image": "image"}, {})
    config = schema.load("llava.yaml")
    assert config.data.section_name == "conversations" and config.task.chat and config.data.shares["val"] == 0.1
    assert [s.inputs["image"] for s in config.data.read(here / "photos", "test")]

    def chat(*images):
        parts = [{"type": "image", "image": name} for name in images]
        content = [*parts, {"type": "text", "text": "and these?"}]
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "things"}]}

    rows = [chat(f"{i}.png", *([f"{(i + 1) % 30}.png"] if i % 2 else [])) for i in range(0, 30, 3)]
    (here / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    llm = str(models[0])
    assert made(capsys, "--data", "chat.jsonl", "--llm", llm)["inputs"] == {"image": "image", "image2": "image"}
    config = schema.load("chat.yaml")
    assert config.data.may_lack == ("image2",) and not config.task.chat
    assert "leave out the task and --column" in refused(capsys, "classify", "--data", "llava.json", "--out", "x.yaml")
    (here / "empty.json").write_text(json.dumps([{"conversations": [{**said[0], "value": "what?"}, said[1]]}]))
    assert "no conversation of empty.json has a file" in refused(capsys, "--data", "empty.json")


def test_cocos_json_with_expressions_becomes_a_run_that_trains(here, models, capsys):
    names = pictures(here, count=12, places="photos")
    mask = {"size": [32, 32], "counts": [32, 512, 480]}
    images = [{"id": i, "file_name": name, "height": 32, "width": 32} for i, name in enumerate(names)]
    spoken = [{"id": i, "image_id": i, "segmentation": mask, "phrase": "the left half"} for i in range(12)]
    (here / "mine.json").write_text(json.dumps({"images": images, "annotations": spoken}))
    llm, vision = map(str, models)
    found = made(capsys, "--data", "mine.json", "--files", "photos", "--llm", llm, "--encoder", f"image={vision}")
    assert found["task"] == "segment" and sum(found["samples"].values()) == 12
    config = schema.load(here / "mine.yaml")
    assert config.data.section_name == "expressions" and config.data.images == "photos"
    assert config.model.encoders["image"].levels[0] == config.model.encoders["image"].layer
    assert main(["train", "mine.yaml", "train.steps=2", "train.epochs=null", "--run-dir", "run"]) == 0
    (here / "table.csv").write_text("image,label\n0.png,a\n")
    assert "is no COCO JSON" in refused(capsys, "segment", "--data", "table.csv")
    assert "of COCO's JSON only expression=KEY" in refused(
        capsys, "--data", "mine.json", "--out", "b.yaml", "--column", "label=x"
    )
