"""A run from end to end through the command line, on folders as users have them: both tasks, resume, eval, predict."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import as_json
from folders import colour_world, run_settings
from PIL import Image

from mitrain.cli import main
from mitrain.training import checkpoint, runs
from mitrain.training.trainer import Trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with models, data, a configuration, and a cache of its own."""
    with colour_world(tmp_path_factory.mktemp("e2e"), train=48, val=16, width=48) as path:
        config = run_settings(
            path,
            vision={"layer": 2, "pool": "cls+mean"},
            name="colours",
            adapter={"name": "mit", "layers": [1, 2]},
            features={"views": 2, "noise": 0.05},
            train={
                "steps": 60, "batch": 12, "accumulate": 2, "lr": 1e-2, "eval_every": 20, "save_every": 10, "keep": 9,
                "schedule": {"name": "cosine", "warmup": 5},
            },
        )  # fmt: skip
        (path / "colours.yaml").write_text(yaml.safe_dump(config))
        yield path


def command(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def picture_size(path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


@pytest.fixture(scope="module")
def trained(world):
    config = runs.schema.load(world / "colours.yaml")
    folder = runs.create(config, world / "runs")
    Trainer(config, folder, quiet=True).fit()
    return folder


def test_it_learns_and_the_controls_lose(world, trained, capsys):
    found = {
        c: as_json(capsys, "eval", trained, "--split", "test", "--control", c)
        for c in ("none", "other-inputs", "shuffle", "frozen")
    }
    assert found["none"]["samples"] == 16 and found["none"]["accuracy"] >= 0.9
    assert found["other-inputs"]["accuracy"] <= 0.5 and found["frozen"]["accuracy"] <= 0.5
    spoken = as_json(capsys, "eval", trained, "--split", "test", "--generate")
    assert spoken["exact_match"] >= 0.9


def test_baselines_stand_beside_the_score(world, trained, capsys):
    found = as_json(capsys, "eval", trained, "--split", "test", "--baselines")
    assert set(found["baselines"]) == {"majority answer", "linear probe on the same features"}
    assert found["baselines"]["majority answer"] == {"accuracy": 0.25, "samples": 16}
    assert found["baselines"]["linear probe on the same features"]["accuracy"] >= 0.9
    code, out, _ = command(capsys, "eval", trained, "--split", "test", "--baselines")
    assert code == 0 and "  majority answer\n    accuracy             0.2500\n" in out
    assert "baselines" not in as_json(capsys, "eval", trained, "--split", "test")


def test_the_run_folder_is_complete(trained):
    assert runs.read_config(trained).hash in (trained / "config.yaml").read_text()
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["kind"] == "train"] == list(range(1, 61))
    assert [r["step"] for r in lines if r["kind"] == "val"] == [20, 40, 60]
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["steps"] == 60 and summary["seconds"]["train"] > 0
    saved = checkpoint.load(checkpoint.latest(trained))
    assert set(saved.tensors) == {"adapter", "head", "features", "optimizer"}
    names = set(saved.tensors["adapter"])
    assert names and all(name.startswith("infused.") for name in names)


def test_resuming_continues_bit_for_bit(world, trained):
    config = runs.read_config(trained)
    folder = runs.create(config, world / "runs")
    first = Trainer(config, folder, quiet=True)
    step, calls = first._step, []

    def interrupted():
        calls.append(1)
        if len(calls) == 26:
            raise KeyboardInterrupt
        return step()

    first._step = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    assert checkpoint.load(checkpoint.latest(folder)).step == 20
    torch.manual_seed(99)
    Trainer(config, folder, quiet=True).fit()
    one, two = (checkpoint.load(checkpoint.latest(f)).tensors for f in (trained, folder))
    for group in one:
        assert one[group].keys() == two[group].keys()
        for name in one[group]:
            assert torch.equal(one[group][name], two[group][name]), (group, name)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["kind"] == "train"] == list(range(1, 61))


def test_the_cache_changes_nothing(world, trained, capsys):
    plain = as_json(capsys, "train", world / "colours.yaml", "cache=false", "train.steps=6", "--runs", world / "plain")
    cached = as_json(capsys, "train", world / "colours.yaml", "train.steps=6", "--runs", world / "cached")
    one, two = (checkpoint.load(checkpoint.latest(r["run"])).tensors["adapter"] for r in (plain, cached))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


def test_activation_checkpointing_changes_nothing(world, capsys):
    results = []
    for value in ("true", "false"):
        made = as_json(
            capsys,
            "train",
            world / "colours.yaml",
            f"train.checkpoint_activations={value}",
            "train.steps=4",
            "--runs",
            world / "ac",
        )
        results.append(checkpoint.load(checkpoint.latest(made["run"])).tensors["adapter"])
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-5, atol=1e-6)


def test_predict_answers_with_probabilities(world, trained, capsys):
    image = next((world / "data" / "images").glob("*.png"))
    prompt = "the colour of this picture is"
    found = as_json(capsys, "predict", trained, "--image", image, "--text", prompt)
    assert found["answer"] in found["probabilities"] and sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    code, out, _ = command(capsys, "predict", trained, "--image", image, "--text", prompt, "--candidates", "red,blue")
    assert code == 0 and out.startswith("answer: ") and "red" in out


def test_an_export_is_asked_like_its_run(world, trained, capsys):
    made = as_json(capsys, "export", trained, "--out", world / "adapter", "--splits", "test")
    assert made["files"] == ["README.md", "mitrain.json", "mitrain.safetensors"]
    image = next((world / "data" / "images").glob("*.png"))
    question = ["--image", image, "--text", "the colour of this picture is"]
    one, two = (as_json(capsys, "predict", folder, *question) for folder in (trained, world / "adapter"))
    assert one == two and one["probabilities"]
    scores = [as_json(capsys, "eval", folder, "--split", "test") for folder in (trained, world / "adapter")]
    assert scores[0].pop("run") != scores[1].pop("run") and scores[0] == scores[1]
    assert made["metrics"]["test"]["accuracy"] == scores[0]["accuracy"] and made["step"] == scores[0]["step"]
    assert f"| test | {made['step']} | accuracy | {scores[0]['accuracy']:.4f} |" in (world / "adapter/README.md").read_text()


def test_chat_from_a_pipe_answers_as_predict_does(world, trained, capsys, monkeypatch):
    image, prompt = next((world / "data" / "images").glob("*.png")), "the colour of this picture is"
    lines = f":image {world}/none.png\n{prompt}\n:image {image}\n{prompt}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, out, err = command(capsys, "chat", trained, "--json")
    said = [line for line in err.splitlines() if line.startswith("mitrain: ")]
    assert code == 2 and "none.png" in said[-2] and "give --input image=FILE" in said[-1]
    (answer,) = json.loads(out)
    assert answer == as_json(capsys, "predict", trained, "--image", image, "--text", prompt)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "{world}", "--out", "{world}/x"], "is no run folder"),
        (["export", "{run}", "--out", "{world}/data"], "exists and is not an empty folder"),
        (["export", "{run}", "--out", "{world}/x", "--splits", "nosuch"], "nosuch"),
        (["train", "{world}/none.yaml"], "no configuration file"),
        (["train", "{world}/colours.yaml", "train.stepz=3"], "did you mean 'steps'"),
        (["train", "{world}/colours.yaml", "adapter.layers=[7]"], "7"),
        (["train", "{world}/colours.yaml", "model.llm={world}/nowhere"], "is no prepared model, no folder"),
        (["train", "{world}/colours.yaml", "data.root={world}/nowhere"], "nowhere"),
        (["eval", "{world}"], "is no run folder"),
        (["eval", "{run}", "--split", "nosuch"], "nosuch"),
        (["predict", "{run}", "--image", "{world}/none.png", "--text", "x"], "none.png"),
        (["predict", "{run}", "--image", "{world}/colours.yaml", "--text", "x"], "colours.yaml"),
        (["train", "--resume", "{world}"], "is no run folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(world, trained, capsys, arguments, words):
    filled = [a.format(world=world, run=trained) for a in arguments]
    code, out, err = command(capsys, *filled, *(["--runs", str(world / "mistakes")] if "train" in filled else []))
    lines = [line for line in err.splitlines() if line.startswith("mitrain: ")]
    assert code == 2 and out == "" and len(lines) == 1 and words in lines[0] and "Traceback" not in err


def test_dry_run_counts_without_weights(world, capsys):
    found = as_json(capsys, "train", world / "colours.yaml", "--dry-run")
    assert found["infused_layers"] == [1, 2]
    assert found["infusion_parameters_per_layer"] == (48 + 1) * (3 * 48 + 96) + 4
    assert found["trainable_parameters"] == 2 * found["infusion_parameters_per_layer"]


def test_segmentation_from_digit_scenes(world, capsys):
    """The second task through the same commands, its data prepared on first use."""
    config = yaml.safe_load((world / "colours.yaml").read_text())
    vision = {"name": str(world / "vision"), "size": 112, "levels": [3, 2], "pool": "cls", "layer": 3}
    decoder = {"dim": 16, "heads": 2, "ffn": 32, "loss": "bce+dice", "loss_size": 32}
    config |= {
        "name": "scenes",
        "model": {**config["model"], "encoders": {"image": vision}},
        "task": {"name": "segment", "readout": ["mean", "embeddings"], **decoder},
        "data": {"name": "refcoco", "source": "digit-scenes"},
        "features": {},
    }  # fmt: skip
    config["train"] |= {
        "steps": 8,
        "batch": 8,
        "accumulate": 1,
        "eval_every": 4,
        "save_every": 4,
        "eval_samples": 16,
        "lr": 1e-3,
    }
    (world / "scenes.yaml").write_text(yaml.safe_dump(config))
    made = as_json(capsys, "train", world / "scenes.yaml", "--runs", world / "runs")
    for control in ("none", "shuffle", "other-inputs"):
        found = as_json(capsys, "eval", made["run"], "--control", control, "--samples", 12)
        assert {"oiou", "miou", "precision", "samples"} <= set(found) and found["samples"] == 12
    baselines = as_json(capsys, "eval", made["run"], "--baselines", "--samples", 12)["baselines"]
    assert "all objects (true masks)" in baselines and all(one["samples"] == 12 for one in baselines.values())
    Image.fromarray(np.full((60, 90, 3), 200, np.uint8)).save(world / "new.png")
    out = world / "prediction"
    found = as_json(capsys, "predict", made["run"], "--image", world / "new.png", "--text", "the seven", "--out", out)
    assert sorted(p.name for p in out.iterdir()) == ["expression.txt", "image.png", "mask.png", "overlay.png"]
    assert picture_size(out / "mask.png") == (90, 60) and 0 <= found["mask_share"] <= 1


def test_report_makes_table_and_figure(world, trained, capsys):
    out = world / "report"
    found = as_json(capsys, "report", trained, "--out", out)
    labels = [r["label"] for r in found["rows"]]
    assert labels == [
        "colours", "colours, another sample's image", "colours, infusion left out", "majority answer",
        "linear probe on the same features",
    ]  # fmt: skip
    assert (out / "table.md").read_text() == found["markdown"] and "| test | colours |" in found["markdown"]
    assert picture_size(out / "colours-test.png")[0] > 400
    assert found["rows"][4]["mean"]["accuracy"] >= 0.9


def test_inspect_reports_and_draws(world, capsys):
    found = as_json(capsys, "data", "inspect", world / "colours.yaml", "--out", world / "sheet")
    assert set(found["splits"]) == {"train", "val", "test"}
    assert picture_size(world / "sheet" / "colours.png")[0] > 100
    code, out, _ = command(capsys, "data", "inspect", world / "scenes.yaml", "--out", world / "sheet")
    assert code == 0 and "train" in out


def test_lists_name_licences_and_prepare_is_once(world, capsys):
    models, data = as_json(capsys, "models", "list"), as_json(capsys, "data", "list")
    assert {m["name"] for m in models} == {
        *(
            "smollm2-135m-instruct",
            "all-minilm-l6-v2",
            "dinov2-vits14",
            "efficientnet-lite0",
            "whisper-base",
            "whisper-tiny.en",
        ),
        "qwen2.5-coder-0.5b",
    }
    assert {d["name"] for d in data} == {
        *(
            "fillets",
            "prompts",
            "tuxpaint",
            "tuxpaint-captions",
            "tuxpaint-entailment",
            "tuxpaint-scenes",
            "openclipart",
            "emoji",
        ),
        *(
            "digits",
            "digit-scenes",
            "dialogue",
            "voices",
            "sentiment",
            "food",
            "picture-questions",
            "games",
            "gimp-help",
        ),
        *("tuxpaint-spoken", "object-scenes", "named-pictures"),
    }
    assert all(row["licence"] for row in models + data)
    first = as_json(capsys, "data", "prepare", "digits")["digits"]
    before = {p: p.stat().st_mtime_ns for p in (world / "cache").rglob("*.jsonl")}
    assert as_json(capsys, "data", "prepare", "digits")["digits"] == first and before
    assert {p: p.stat().st_mtime_ns for p in (world / "cache").rglob("*.jsonl")} == before
    assert {d["name"] for d in as_json(capsys, "data", "list") if d["prepared"]} >= {"digits"}
    code, _, err = command(capsys, "data", "prepare", "digitz")
    assert code == 2 and "'digits'" in err


@pytest.mark.parametrize("override", ["model.dtype=bf16", "adapter.preset=released", "adapter.gate=token", "adapter.rank=4"])
def test_variants_train(world, capsys, override):
    layers = ["adapter.layers=[1, 2]", "train.steps=3", "--runs", world / "variants"]
    made = as_json(capsys, "train", world / "colours.yaml", override, *layers)
    lines = [json.loads(line) for line in (Path(made["run"]) / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in lines if r["kind"] == "train"]
    assert len(losses) == 3 and all(np.isfinite(losses)) and len(set(losses)) == 3
    assert as_json(capsys, "eval", made["run"], "--split", "test")["samples"] == 16


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives(world, capsys):
    results = []
    for device in ("cpu", "cuda"):
        arguments = [f"model.device={device}", "features.noise=0", "train.steps=4", "--runs", world / device]
        made = as_json(capsys, "train", world / "colours.yaml", *arguments)
        results.append([json.loads(line) for line in (Path(made["run"]) / "metrics.jsonl").read_text().splitlines()])
    for one, two in zip(*results, strict=True):
        if one["kind"] == "train":
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)


def test_a_missing_gpu_is_one_line(world, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, _, err = command(capsys, "train", world / "colours.yaml", "model.device=cuda", "--runs", world / "none")
    assert code == 2 and "torch sees no GPU" in err
