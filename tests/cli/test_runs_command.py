"""`mitrain runs`: what lies in a folder of runs, without opening a model."""

import json
import os

import pytest
from commands import as_json
from folders import colour_world, run_settings

from mitrain.cli import main


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with colour_world(tmp_path_factory.mktemp("runs"), train=16, val=8, width=48) as path:
        train = {"steps": 4, "batch": 8, "eval_every": 2, "save_every": 2}
        values = run_settings(path, name="one", adapter={"name": "mit", "layers": [1, 2]}, train=train)
        (path / "run.yaml").write_text(json.dumps(values))
        for name, lr in (("one", "1e-3"), ("two", "1e-2")):
            folder = str(path / "runs" / name)
            assert main(["train", str(path / "run.yaml"), "--run-dir", folder, f"train.lr={lr}"]) == 0
        yield path


def listed(capsys, *words):
    return as_json(capsys, "runs", *words)


def test_finished_runs_are_named_with_their_scores(world, capsys):
    runs = listed(capsys, world / "runs")
    assert {os.path.basename(run["run"]) for run in runs} == {"one", "two"}
    summary = json.loads((world / "runs/one/summary.json").read_text())
    (one,) = listed(capsys, world / "runs/one")
    assert (one["state"], one["step"], one["steps"]) == ("done (last step)", 4, 4)
    assert (one["best"], one["at"], one["metric"]) == (summary["best"], summary["best_step"], "accuracy")
    assert (one["task"], one["method"]) == ("answer", "mit")


def test_what_differs_between_runs_is_shown(world, capsys):
    found = listed(capsys, world / "runs/one", world / "runs/two", "--diff")
    order = [os.path.basename(run["run"]) for run in found["runs"]]
    assert dict(zip(order, found["differing"].pop("train.lr"), strict=True)) == {"one": "0.001", "two": "0.01"}
    assert not found["differing"]
    assert main(["runs", str(world / "runs"), "--diff"]) == 0
    assert "train.lr" in capsys.readouterr().out


def test_a_run_that_says_nothing_of_itself_is_told_by_its_checkpoint(world, capsys):
    (world / "runs/two/summary.json").unlink()
    (world / "runs/two/state.json").unlink()
    (two,) = listed(capsys, world / "runs/two")
    assert (two["state"], two["step"], two["steps"]) == ("stopped", 4, 4) and two["best"] is not None


def test_damage_is_no_reason_to_fail_and_no_run_is_told(capsys, tmp_path):
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.yaml").write_text("a: [")
    (torn / "summary.json").write_text("{")
    (run,) = listed(capsys, tmp_path)
    assert (run["state"], run["task"]) == ("not begun", None)
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "is no run folder and holds none" in capsys.readouterr().err
