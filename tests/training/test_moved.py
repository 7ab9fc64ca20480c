"""A run that was moved with its data and models is evaluated, exported and resumed as before, without any option."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from folders import colour_folder

from mitrain.cli import main
from mitrain.core import parsing
from mitrain.training import moved, runs

CONFIG = """\
name: one
model: {llm: llm, encoders: {image: vision}}
adapter: {name: mit, layers: [1, 2]}
task: {name: answer}
data: {name: records, root: data}
train: {steps: 4, batch: 8, eval_every: 4, save_every: 2}
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with models, data and a configuration that names them as they lie beside it."""
    path = tmp_path / "here" / "world"
    colour_folder(path, train=16, val=8, width=48)
    (path / "run.yaml").write_text(CONFIG)
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(path)
    return path


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_moved_run_goes_on_and_is_scored(world, tmp_path, monkeypatch):
    from mitrain.training.trainer import Trainer

    assert main(["train", "run.yaml", "--run-dir", "runs/straight"]) == 0
    own = Trainer._step

    def step(self):
        if self.engine.steps == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        assert main(["train", "run.yaml", "--run-dir", "runs/two"]) == 75
    there = tmp_path / "elsewhere" / "deeper" / "world"
    there.parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    shutil.move(world, there)
    assert main(["train", "--resume", str(there / "runs/two")]) == 0
    assert losses(there / "runs/two") == losses(there / "runs/straight")
    monkeypatch.chdir(there)
    assert main(["train", "run.yaml", "--run-dir", "runs/two"]) == 0, "a job script that is started again"
    shutil.move(there, world)  # the checkpoint of step 2 was written here, that of step 4 there
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(world / "runs/two"), "--split", "val"]) == 0
    assert main(["train", "--resume", str(world / "runs/two"), "train.steps=6", "--allow-changes"]) == 0
    assert main(["export", str(world / "runs/two"), "--out", str(world / "adapter")]) == 0


def test_an_export_that_was_moved_finds_its_data(world, tmp_path, monkeypatch):
    assert main(["train", "run.yaml", "--run-dir", "runs/straight"]) == 0
    assert main(["export", "runs/straight", "--out", "adapter"]) == 0
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world, tmp_path / "copy")
    shutil.rmtree(world / "data")
    places = ["--base", str(world / "llm"), "--encoder", str(world / "vision")]
    assert main(["eval", str(tmp_path / "copy" / "adapter"), "--split", "val", *places]) == 0


def test_data_that_is_where_it_was_is_taken_there(world, tmp_path):
    assert main(["train", "run.yaml", "--run-dir", "runs/straight"]) == 0
    shutil.copytree(world, tmp_path / "copy")
    assert runs.read_config(tmp_path / "copy/runs/straight").data.root == str(world / "data")
    shutil.rmtree(world)
    found = runs.read_config(tmp_path / "copy/runs/straight")
    assert found.data.root == str(tmp_path / "copy/data") and found.model.llm == str(tmp_path / "copy/llm")


def test_what_is_nowhere_stays_as_it_was_written(tmp_path):
    values = {"root": "/gone/data", "name": "word", "files": ["/gone/a", 5]}
    assert moved.found(values, "/gone/runs/one", tmp_path / "runs" / "one") == values
    (tmp_path / "data").mkdir()
    found = moved.found(values, "/gone/runs/one", tmp_path / "runs" / "one")
    assert found == {**values, "root": str(tmp_path / "data")}
    assert moved.found(values, None, tmp_path / "runs" / "one") == values, "a run of an earlier version"


@pytest.mark.parametrize("place", ["/plain", "/with\nline", '/with "quotes"', "/é"])
def test_the_place_is_read_as_it_was_written(place):
    text = f"# resolved\n{moved.told(Path(place))}a: 1\n"
    assert moved.written_in(text) == place and parsing.parse_yaml(text) == {"a": 1}


@pytest.mark.parametrize("text", ["", "# written in\n", "# written in [1]\n", "# written in {\n", "a: 1\n"])
def test_without_the_line_no_place_is_known(text):
    assert moved.written_in(text) is None
