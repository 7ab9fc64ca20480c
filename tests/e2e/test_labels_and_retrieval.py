"""The tasks classify and retrieve from end to end through the command line, on folders as users have them."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import as_json
from fifth_task import RateTask
from folders import as_label, colour_world, rewrite, run_settings

from mitrain.cli import main
from mitrain.tasks import TASKS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models, pictures of a colour with labels and captions, configurations, and a cache of its own."""
    with colour_world(tmp_path_factory.mktemp("e2e"), train=24, val=8, width=48) as path:
        rewrite(path / "data", as_label, "labels-")
        rewrite(path / "data", lambda row: as_label(row) | {"label": [row["answer"], "picture"]}, "several-")
        rewrite(path / "data", lambda row: as_label(row) | {"text": f"a {row['answer']} square"}, "captions-")
        yield path


def configuration(world, name, task, data, files):
    splits = {split: f"{files}-{split}.jsonl" for split in ("train", "val", "test")}
    config = run_settings(
        world,
        vision={"layer": 2, "pool": "cls+mean"},
        name=name,
        adapter={"name": "mit", "layers": [1, 2]},
        task=task,
        data={"root": str(world / "data"), "splits": splits, **data},
        train={
            "steps": 30, "batch": 12, "lr": 1e-2, "eval_every": 15, "save_every": 15,
            "schedule": {"name": "cosine", "warmup": 3},
        },
    )  # fmt: skip
    (world / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return world / f"{name}.yaml"


def controls(capsys, run, *names):
    return {c: as_json(capsys, "eval", run, "--split", "test", "--control", c) for c in names}


def test_one_label(world, capsys):
    config = configuration(world, "labels", {"name": "classify"}, {"name": "labelled"}, "labels")
    assert as_json(capsys, "train", config, "--dry-run")["head_parameters"] == 4 * (48 + 1)
    run = as_json(capsys, "train", config, "--runs", world / "runs")["run"]
    assert yaml.safe_load((Path(run) / "config.yaml").read_text())["data"]["classes"] == [
        "blue",
        "green",
        "red",
        "yellow",
    ]
    found = controls(capsys, run, "none", "other-inputs", "frozen", "shuffle")
    assert found["none"]["accuracy"] >= 0.8 and found["none"]["auroc"] >= 0.9 and found["none"]["samples"] == 8
    assert max(found[c]["accuracy"] for c in ("other-inputs", "frozen", "shuffle")) <= 0.5
    baselines = as_json(capsys, "eval", run, "--split", "test", "--baselines")["baselines"]
    assert (
        baselines["majority label"]["accuracy"] == 0.25 and baselines["linear probe on the same features"]["accuracy"] >= 0.8
    )
    (world / "data" / "labels-train.jsonl").rename(world / "data" / "gone.jsonl")  # the classes are the run's own
    try:
        image = world / "data" / "images" / "32.png"
        said = as_json(capsys, "predict", run, "--image", image, "--text", "this thing is")
        assert set(said["probabilities"]) == {"blue", "green", "red", "yellow"} and len(said["labels"]) == 1
    finally:
        (world / "data" / "gone.jsonl").rename(world / "data" / "labels-train.jsonl")
    made = as_json(capsys, "report", run, "--out", world / "report")
    assert [r["label"] for r in made["rows"]] == [
        "labels", "labels, another sample's image", "labels, infusion left out", "majority label",
        "linear probe on the same features", "nearest neighbours on the same features",
    ]  # fmt: skip
    assert "| macro F1 |" in made["markdown"] and (world / "report" / "labels-test.png").is_file()


def test_baselines_learn_from_the_samples_that_the_run_was_trained_on(world, capsys):
    """Four of 32 samples, evenly spread, are of one class, and then a probe knows no other."""
    config = configuration(world, "labels", {"name": "classify"}, {"name": "labelled"}, "labels")
    few = ("train.fraction=0.125", "train.batch=4", "train.steps=1", "train.eval_every=1")
    run = as_json(capsys, "train", config, *few, "--runs", world / "few")["run"]
    baselines = as_json(capsys, "eval", run, "--split", "test", "--baselines")["baselines"]
    assert {one["accuracy"] for one in baselines.values()} == {0.25} and len(baselines) == 3


def test_several_labels(world, capsys):
    data = {"name": "labelled", "multilabel": True}
    config = configuration(world, "several", {"name": "classify", "readout": ["mean"]}, data, "several")
    run = as_json(capsys, "train", config, "--runs", world / "runs")["run"]
    found = as_json(capsys, "eval", run, "--split", "test", "--baselines")
    assert found["f1_micro"] > found["baselines"]["majority label"]["f1_micro"] and found["auroc_classes"] == 4
    assert set(found["baselines"]) == {
        "majority label", "training shares", "linear probe on the same features", "nearest neighbours on the same features"
    }  # fmt: skip


def test_a_number(world, capsys):
    numbers = {"red": -2.5, "green": -0.5, "blue": 0.75, "yellow": 2.25}
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (world / "data" / f"labels-{split}.jsonl").read_text().splitlines()]
        made = [{"image": r["image"], "text": r["text"], "target": numbers[r["label"]]} for r in rows]
        (world / "data" / f"numbers-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    config = configuration(world, "numbers", {"name": "regress"}, {"name": "rated"}, "numbers")
    assert as_json(capsys, "data", "inspect", config)["splits"]["train"]["targets"]["mean"] == 0.0
    assert as_json(capsys, "train", config, "--dry-run")["head_parameters"] == 48 + 1
    made = as_json(capsys, "train", config, "--runs", world / "runs")
    found = controls(capsys, made["run"], "none", "other-inputs", "frozen", "shuffle")
    assert found["none"]["mae"] < 0.8 and found["none"]["acc2_positive"] == 1.0 and found["none"]["pearson"] > 0.9
    assert min(found[c]["mae"] for c in ("other-inputs", "frozen", "shuffle")) > 1.2
    assert main(["eval", made["run"], "--split", "test", "--control", "other-text"]) == 2  # all texts are the same
    assert "other-text control is impossible" in capsys.readouterr().err
    val = [json.loads(line) for line in (Path(made["run"]) / "metrics.jsonl").read_text().splitlines()]
    assert made["best"] == min(line["mae"] for line in val if line["kind"] == "val")
    baselines = as_json(capsys, "eval", made["run"], "--split", "test", "--baselines")["baselines"]
    assert baselines["training mean"]["mae"] == 1.5 and baselines["ridge regression on the same features"]["mae"] < 0.8
    exported = as_json(capsys, "export", made["run"], "--out", world / "export-numbers")["folder"]
    said = [
        as_json(capsys, "predict", folder, "--image", world / "data" / "images" / "32.png", "--text", "this thing is")[
            "predicted"
        ]
        for folder in (made["run"], exported)
    ]
    assert said[0] == pytest.approx(said[1], abs=2e-6)
    table = as_json(capsys, "report", made["run"], "--splits", "test", "--out", world / "report-numbers")["markdown"]
    assert "| MAE |" in table and (world / "report-numbers" / "numbers-test.png").is_file()


def test_retrieval(world, capsys):
    config = configuration(world, "captions", {"name": "retrieve", "dim": 16}, {"name": "captions"}, "captions")
    assert as_json(capsys, "train", config, "--dry-run")["head_parameters"] > 0
    run = as_json(capsys, "train", config, "--runs", world / "runs")["run"]
    found = controls(capsys, run, "none", "other-inputs", "frozen")
    assert found["none"]["recall_mean"] > 0.9 and found["none"]["images"] == 8
    assert found["other-inputs"]["recall_mean"] < 0.7 and found["frozen"]["before_reranking"]["recall_mean"] > 0.9
    baselines = as_json(capsys, "eval", run, "--split", "test", "--baselines")["baselines"]
    assert baselines["random order"]["i2t_r1"] == 0.25 and baselines.keys() == {
        "random order", "ridge regression to the text states", "nearest neighbours to the text states"
    }  # fmt: skip
    assert baselines["nearest neighbours to the text states"]["i2t_r1"] >= 0.5
    said = as_json(
        capsys, "predict", run, "--image", world / "data" / "images" / "32.png", "--text", "a red square",
        "--candidates", "a blue square,a green square",
    )  # fmt: skip
    assert len(said["scores"]) == 3 and said["rank"] == 1
    made = as_json(capsys, "report", run, "--out", world / "report")
    assert "| i→t R@1 |" in made["markdown"] and (world / "report" / "captions-test.png").is_file()


def test_mmsas_features_of_two_modalities(world, capsys):
    """Half of a clip's sentiment is heard, the other half is seen; the text says nothing."""
    folder, random = world / "mmsa", np.random.default_rng(0)
    folder.mkdir()
    parts = {}
    for part, count in (("train", 48), ("valid", 12), ("test", 12)):
        heard, seen = random.choice([-1.4, 1.4], (2, count))
        audio, vision = random.normal(0, 0.1, (count, 5, 4)), random.normal(0, 0.1, (count, 6, 3))
        audio[:, :, 0] += heard[:, None]
        audio[:, 3:] = -np.inf  # beyond each clip's end
        vision[:, :, 1] += seen[:, None]
        vision[:, :2] = 0
        parts[part] = {
            "id": [f"{part}{n}$_$0" for n in range(count)], "raw_text": np.array(["this thing is"] * count),
            "regression_labels": (heard + seen).astype(np.float32), "audio_lengths": [3] * count,
            "audio": audio.astype(np.float32), "vision": vision.astype(np.float32),
        }  # fmt: skip
    (folder / "unaligned_50.pkl").write_bytes(pickle.dumps(parts))
    config = configuration(world, "mmsa", {"name": "regress"}, {"name": "mmsa"}, "none")
    values = yaml.safe_load(config.read_text())
    values["model"]["encoders"] = {
        "audio": {"takes": "features", "width": 4}, "video": {"takes": "features", "width": 3}
    }  # fmt: skip
    values["data"] = {"name": "mmsa", "root": str(folder), "file": "unaligned_50.pkl"}
    config.write_text(yaml.safe_dump(values))
    assert as_json(capsys, "data", "inspect", config)["splits"]["train"]["samples"] == 48
    run = as_json(capsys, "train", config, "--runs", world / "runs")["run"]
    found = as_json(capsys, "eval", run, "--split", "test", "--baselines")
    assert found["mae"] < 0.7 and found["acc2_positive"] == 1.0 and found["acc7"] > 0.3
    assert found["baselines"]["ridge regression on the same features"]["mae"] < 0.2
    assert as_json(capsys, "eval", run, "--split", "test", "--control", "frozen")["mae"] > 1.2
    (folder / "unaligned_50.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert main(["train", str(config), "--runs", str(world / "payload")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("run folder")]
    assert "unaligned_50.pkl" in line and "it names os.system" in line and not list((world / "payload").glob("*"))


def test_captions(world, capsys):
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (world / "data" / f"captions-{split}.jsonl").read_text().splitlines()]
        made = [r | {"text": [r["text"], r["text"].replace("a ", "this is a ")]} for r in rows]
        (world / "data" / f"two-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    task = {"name": "caption", "template": "this picture is", "max_new_tokens": 6}
    config = configuration(world, "described", task, {"name": "captions"}, "two")
    assert as_json(capsys, "data", "inspect", config)["splits"]["train"]["captions_per_image"] == {"2": 24}
    run = as_json(capsys, "train", config, "--runs", world / "runs")["run"]
    found = controls(capsys, run, "none", "other-inputs", "frozen", "shuffle")
    assert found["none"]["images"] == 8 and found["none"]["captions"] == 16
    for metric in ("cider", "bleu4", "rouge_l"):
        assert max(found[c][metric] for c in ("other-inputs", "frozen", "shuffle")) < found["none"][metric], metric
    part = as_json(capsys, "eval", run, "--split", "test", "--samples", "4", "--baselines")
    assert part["images"] == 4 and part["captions"] == 8
    assert set(part["baselines"]) == {"commonest caption", "caption of the nearest picture"}
    said = as_json(capsys, "predict", run, "--image", world / "data" / "images" / "32.png", "--text", "a red square")
    assert "square" in said["caption"] and said["log_likelihood"] < 0
    exported = as_json(capsys, "export", run, "--out", world / "export-described")["folder"]
    again = as_json(capsys, "predict", exported, "--image", world / "data" / "images" / "32.png", "--text", "a red square")
    assert again["caption"] == said["caption"] and again["log_likelihood"] == pytest.approx(said["log_likelihood"], abs=1e-5)
    table = as_json(capsys, "report", run, "--splits", "test", "--out", world / "report-described")["markdown"]
    assert "| CIDEr |" in table and (world / "report-described" / "described-test.png").is_file()


def test_inspect_says_what_splits_share(world, capsys):
    for name in ("labels", "captions"):
        found = as_json(capsys, "data", "inspect", world / f"{name}.yaml", "--out", world / "sheet")
        assert found["splits"]["train"]["samples"] == 24 and (world / "sheet" / f"{name}.png").is_file()
        assert {shared["what"] for shared in found["shared"]} == {"text"}


def test_bad_labels_are_one_line_and_leave_no_run(world, capsys):
    config = configuration(world, "bad", {"name": "classify"}, {"name": "labelled"}, "bad")
    (world / "data" / "bad-train.jsonl").write_text('{"image": "images/0.png"}\n')
    assert main(["train", str(config), "--runs", str(world / "none")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "bad-train.jsonl:1: no 'label'" in captured.err
    assert not (world / "none").exists()


def test_a_fifth_task_needs_its_own_file_and_an_entry(world, capsys, monkeypatch):
    """Written in fifth_task.py, which imports of mitrain what any task may; the package knows nothing of it."""
    monkeypatch.setitem(TASKS, "rate", RateTask)
    numbers = {"red": "0.1", "green": "0.4", "blue": "0.6", "yellow": "0.9"}
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (world / "data" / f"{split}.jsonl").read_text().splitlines()]
        made = [r | {"answer": numbers[r["answer"]], "candidates": [], "prompt": "how bright ?"} for r in rows]
        (world / "data" / f"rates-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    config = configuration(world, "rates", {"name": "rate", "offset": 0.5}, {"name": "records"}, "rates")
    assert as_json(capsys, "data", "inspect", config)["splits"]["train"]["mean"] == pytest.approx(0.5)
    assert as_json(capsys, "train", config, "--dry-run")["head_parameters"] == 48 + 1
    run = as_json(capsys, "train", config, "--runs", world / "runs")["run"]
    found = as_json(capsys, "eval", run, "--split", "test", "--baselines")
    other = as_json(capsys, "eval", run, "--split", "test", "--control", "other-inputs")
    assert found["closeness"] > max(other["closeness"], found["baselines"]["training mean"]["closeness"]) + 0.05
    picture = next((world / "data").rglob("*.png"))
    exported = as_json(capsys, "export", run, "--out", world / "export-rates")["folder"]
    rates = [
        as_json(capsys, "predict", folder, "--image", picture, "--text", "how bright ?")["rate"]
        for folder in (run, exported)
    ]
    assert rates[0] == pytest.approx(rates[1], abs=2e-6)
    table = as_json(capsys, "report", run, "--splits", "test", "--out", world / "report-rates")
    assert {row["label"] for row in table["rows"]} >= {"rates", "training mean"}
