"""Segmenting what a second picture shows, from data to predictions, through the command line."""

import json
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
import pytest
import yaml
from commands import as_json
from folders import llm_folder, vision_folder
from mitrain_demo import objects
from mitrain_demo.compose import Style, Thing
from PIL import Image

from mitrain.cli import main
from mitrain.data.expressions import RefcocoConfig
from mitrain.inference.service import ServiceLimits
from mitrain.training import runs

testclient = pytest.importorskip("starlette.testclient", reason="needs the extra [serve]")
serving = pytest.importorskip("mitrain.inference.serving", reason="needs the extra [serve]")

PAIR = {"image": "scene.png", "reference": "photo.png"}
COLOURS = {"brick": (200, 0, 0), "leaf": (0, 190, 0), "sky": (0, 0, 210), "coal": (5, 5, 5), "snow": (250, 250, 250)}
KINDS = {"brick": "stone", "coal": "stone"}


def things() -> list[Thing]:
    drawings = [(name, size) for name in COLOURS for size in ((60, 40), (50, 50))]
    return [
        Thing(name, frozenset({name}), Image.new("RGBA", size, (*COLOURS[name], 255)), KINDS.get(name, ""))
        for name, size in drawings
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reference")
    llm_folder(path / "llm", width=48)
    vision_folder(path / "vision")
    (path / "data").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "pool", lambda things, random: things)
        objects.write_objects(path / "data", {"train": things(), "val": things()}, {"train": 6, "val": 4}, Style(), 0)
        patch.setenv("MITRAIN_CACHE", str(path / "cache"))
        yield path


def config(world: Path, name: str, **changed) -> Path:
    vision = {"name": str(world / "vision"), "takes": "image", "layer": 3, "pool": "cls", "size": 112}
    values = {
        "name": name,
        "model": {
            "llm": str(world / "llm"),
            "encoders": {"image": {**vision, "levels": [3, 2], "infused": False}, "reference": vision},
        },
        "adapter": {"name": "mit", "layers": [2], "rank": 4},
        "task": {"name": "segment", "decoder": "ground", "dim": 8, "heads": 2, "ffn": 16, "loss": "bce+dice"},
        "data": {"name": "refcoco", "root": str(world / "data"), "split_by": "reference"},
        "train": {"steps": 4, "batch": 8, "lr": 1e-1, "eval_every": 2, "save_every": 2, "eval_samples": 4},
    } | changed
    (world / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return world / f"{name}.yaml"


def test_a_reference_reaches_the_mask_through_the_infusion_alone(world, capsys):
    run = as_json(capsys, "train", config(world, "infused"), "--runs", world / "runs")["run"]
    outs = {name: world / f"{name}.jsonl" for name in ("own", "other")}
    own = as_json(capsys, "eval", run, "--out", outs["own"], "--baselines")
    other = as_json(capsys, "eval", run, "--out", outs["other"], "--shuffle", "reference")
    masks = {name: [json.loads(line)["mask"] for line in path.read_text().splitlines()] for name, path in outs.items()}
    assert own["samples"] == other["samples"] == len(masks["own"]) and masks["own"] != masks["other"]
    assert {"oiou/same", "oiou"} <= set(own)
    report = as_json(capsys, "report", run, "--splits", "val", "--out", world / "report")
    labels = [row["label"] for row in report["rows"]]
    assert "infused, another sample's reference" in labels and "all objects (true masks)" in labels
    assert "| val, kind | infused | infused, another scene's expression |" in report["markdown"]
    assert f"| same | {own['oiou/same']:.3f} |" in report["markdown"]
    infused = yaml.safe_load((Path(run) / "config.yaml").read_text())
    assert infused["data"]["inputs"] == ["image", "reference"]


def test_a_users_own_photo_is_the_reference(world, capsys):
    run = as_json(capsys, "train", config(world, "asked"), "--runs", world / "runs")["run"]
    for name, size in (("scene", (90, 60)), ("photo", (40, 70))):
        Image.fromarray(np.full((size[1], size[0], 3), 200, np.uint8)).save(world / f"{name}.png")
    asked = ("predict", run, "--image", world / "scene.png", "--text", "the same thing")
    out = world / "prediction"
    found = as_json(capsys, *asked, "--input", f"reference={world / 'photo.png'}", "--out", out)
    assert found["reference"] == str(world / "photo.png")
    with Image.open(out / "mask.png") as mask, Image.open(out / "image.png") as picture:
        assert mask.size == picture.size == (90, 60)
    assert main([*map(str, asked)]) == 2 and "give --input reference=FILE" in capsys.readouterr().err
    opened = runs.open_run(run)
    page = testclient.TestClient(serving.app_of(opened, ServiceLimits()))
    assert {n: part["takes"] for n, part in page.get("/run").json()["inputs"].items()} == dict.fromkeys(PAIR, "image")
    files = {name: (world / file).read_bytes() for name, file in PAIR.items()}
    shown = page.post("/predict", data={"text": "the same thing"}, files=files).json()["mask"]
    with Image.open(BytesIO(b64decode(shown.partition(",")[2]))) as mask, Image.open(out / "mask.png") as written:
        assert np.array_equal(np.asarray(mask) > 0, np.asarray(written) > 0)


def test_samples_have_the_inputs_that_are_asked_for(world):
    section = RefcocoConfig(root=str(world / "data"), split_by="reference", inputs=("image", "reference"))
    samples = section.read(world / "data", "val")
    assert all(set(sample.inputs) == {"image", "reference"} for sample in samples)
    folder = section.file_root(world / "data")
    assert all((folder / sample.inputs["reference"]).exists() for sample in samples)
    alone = RefcocoConfig(root=str(world / "data"), split_by="reference").read(world / "data", "val")
    assert all(set(sample.inputs) == {"image"} for sample in alone)


def test_a_missing_reference_is_named(world, capsys):
    path = config(world, "text", data={"name": "refcoco", "root": str(world / "data"), "split_by": "text"})
    assert main(["train", str(path), "--runs", str(world / "runs")]) == 2
    assert "has no 'reference', which an encoder reads" in capsys.readouterr().err


def test_the_floor_counts_objects_that_no_expression_means(world):
    section = RefcocoConfig(root=str(world / "data"), split_by="reasoning")
    every, meant = section.objects(world / "data", "val"), section.read(world / "data", "val")
    of_scene = {}
    for sample in every:
        of_scene.setdefault(sample.inputs["image"], []).append(sample.mask())
    assert {sample.inputs["image"] for sample in meant} <= set(of_scene)
    assert all(2 < len(masks) < 5 and sum(mask.astype(int) for mask in masks).max() == 1 for masks in of_scene.values())


@pytest.mark.parametrize("seed", range(12))
def test_phrases_about_a_reference_hold(seed):
    random = Random(seed)
    _, shown = objects.scene(things(), Style(), random)
    names = [one.thing.name for one in shown]
    found = list(objects.about_references(shown, objects.absent(things(), shown, random)))
    for phrase in found:
        meant, name = [names[i] for i in phrase.targets], phrase.reference.name
        assert name not in phrase.text
        truth = {
            "same": meant == [name],
            "same, place": meant == [name] and names.count(name) == 2,
            "same, size": meant == [name] and names.count(name) == 2,
            "all but": name in names and name not in meant and len(meant) == len(names) - 1,
            "both": meant == [name, name],
            "another": name in names and name not in meant and KINDS.get(name) == KINDS.get(meant[0], ""),
            "kind": name not in names and KINDS.get(name) == KINDS.get(meant[0], ""),
        }
        assert truth[phrase.kind]
    assert {i for phrase in found for i in phrase.targets} == set(range(len(shown)))
